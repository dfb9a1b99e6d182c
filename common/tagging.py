"""Tags, judged and exchanged: average precision, thresholds, what is new but true; the lists that taggers agree on.

n pictures   V tags   scores (n, V) in [0, 1]   truth (n, V) bool
"""

import csv

import numpy as np
import torch
import torch.nn.functional as F

from common import metrics
from common.fields import is_name
from common.io import UserError, atomic, regular

TOP = 25  # the most frequent tags, of which the error is told apart
MOST = 1000  # the most frequent tags are asked for one by one: it takes half a minute
FEWEST = 8  # pictures of dev that a tag needs for a threshold of its own
GENERAL, CHARACTER = "0", "4"  # categories of tags, as boards number them
COLUMNS = ["tag_id", "name", "category", "count"]  # of selected_tags.csv


def many_hot(ids, V):
    """ids (n, T) of tags, -1 fills up; those from V on are left out -> (n, V) bool: which picture
    has which tag.
    """
    ids, hot = np.asarray(ids), np.zeros((len(ids), V + 1), bool)
    hot[np.arange(len(ids))[:, None], np.where((ids < 0) | (ids >= V), V, ids)] = True
    return hot[:, :V]


def has_tags(split):
    """Does a packed split bring lists of tags?"""
    return "tags" in split


def average_precisions(scores, truth):
    """-> (V,) average precision of each tag, nan of one that no picture has, and of those behind
    the MOST first.
    """
    from sklearn.metrics import average_precision_score

    found = np.full(truth.shape[1], np.nan)
    for tag in truth[:, :MOST].any(0).nonzero()[0]:
        found[tag] = average_precision_score(truth[:, tag], scores[:, tag])
    return found


def best_threshold(scores, truth):
    """scores (n,), truth (n,) bool -> the score from which on F1 is best, half way to the next one
    below.
    """
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(truth[order])
    last = np.r_[np.diff(scores[order]) < 0, True]  # equal scores are taken together
    at = int(np.argmax(np.where(last, f1(right, np.arange(1, len(order) + 1), truth.sum()), -1)))
    below = scores[order[at + 1]] if at + 1 < len(order) else 0.0
    return float((scores[order[at]] + below) / 2)


def common_threshold(scores, truth, bins=10_000):
    """The same for all tags together, by counts of scores in bins: there may be two hundred
    million.
    """
    edges = np.linspace(0, 1, bins + 1)
    said, right = (np.histogram(x, edges)[0][::-1].cumsum()[::-1] for x in (scores, scores[truth]))
    return float(edges[np.argmax(f1(right, said, truth.sum()))])


def fit_thresholds(scores, truth):
    """-> (V,): of each tag the threshold that is best for its F1, of a rare one that which is best
    for all together.
    """
    common = common_threshold(scores, truth)
    enough = truth.sum(0) >= FEWEST
    return np.array(
        [
            best_threshold(scores[:, t], truth[:, t]) if enough[t] else common
            for t in range(len(enough))
        ]
    )


def f1(right, said, there):
    """Counts -> F1, 0 where nothing was said and nothing is there."""
    return 2 * right / np.maximum(said + there, 1)


def judge(scores, truth, thresholds):
    """-> {"map", "micro_f1", "macro_f1", "error", "error_top"} in percent, and "ap", each tag's, None of one that no
    picture has. map and macro_f1 are means over tags that some picture has (map: of the MOST most frequent ones);
    error: wrong among all yes and no."""
    said, there = scores >= thresholds, truth.any(0)
    right, ap = said & truth, average_precisions(scores, truth)
    wrong, top = (said != truth).mean(0), np.argsort(-truth.sum(0), kind="stable")[:TOP]
    row = {
        "map": np.nanmean(ap),
        "micro_f1": f1(right.sum(), said.sum(), truth.sum()),
        "error": wrong.mean(),
        "macro_f1": f1(right.sum(0), said.sum(0), truth.sum(0))[there].mean(),
        "error_top": wrong[top].mean(),
    }
    return {k: round(100 * float(x), 3) for k, x in row.items()} | {
        "ap": [None if np.isnan(x) else round(100 * float(x), 2) for x in ap[:MOST]]
    }


def four_kinds(said, given, truth):
    """What was said of pictures, what they are filed under, what is true, bool (n, V) each ->
    {kind: bool (n, V)}.
    """
    return {
        "right": said & given,
        "missed": given & ~said,
        "new but true": said & truth & ~given,
        "new and false": said & ~truth & ~given,
    }


# ---- what frozen features know of tags and of style ----------------------------------------------

PENALTIES = 1e-3, 1e-2, 1e-1  # of the squared weights
STEPS = 60  # of L-BFGS


def many_logistic(x, truth, penalty):
    """x (n, D) standardised, truth fp32 (n, V) -> W (D, V), b (V,): a logistic regression for each
    tag, all at once.
    """
    W, b = (
        torch.zeros(shape, requires_grad=True)
        for shape in ((x.shape[1], truth.shape[1]), truth.shape[1])
    )
    solver = torch.optim.LBFGS([W, b], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        error = (
            F.binary_cross_entropy_with_logits(x @ W + b, truth)
            + penalty / truth.shape[1] * W.square().sum()
        )
        error.backward()
        return error

    solver.step(closure)
    return W.detach(), b.detach()


def tag_row(features, truths, words):
    """features (n, D) and truths (n, V) bool of what is fitted, chosen on, reported -> map,
    penalty, ap of each.

    As many logistic regressions as tags; the one penalty of all is that which is best on what is
    chosen on.
    """
    (x, choose, report), (y, truth, judged) = features, (some.numpy() for some in truths)
    z = [some.float() for some in metrics.standardise(x, choose, report)]
    fits = {p: many_logistic(z[0], torch.from_numpy(y).float(), p) for p in PENALTIES}

    def score(z, fit):
        return (z @ fit[0] + fit[1]).numpy()

    best = max(PENALTIES, key=lambda p: np.nanmean(average_precisions(score(z[1], fits[p]), truth)))
    ap = average_precisions(score(z[2], fits[best]), judged)
    return {
        "map": float(np.nanmean(ap)),
        "penalty": best,
        "ap": {
            w: None if np.isnan(a) else round(float(a), 4) for w, a in zip(words, ap, strict=True)
        },
    }


def style_row(features, styles, groups, strata):
    """styles u8 (n, 3) of what is fitted and reported -> {stratum: {"top1", "macro_f1", "guess"}} by the headline's
    logistic regression; guess: of the most frequent value."""
    (x, _, report), (y, _, truth), row = features, styles, {}
    for i, (name, values) in enumerate(strata.items()):
        learned, labels = y[:, i].long(), truth[:, i].long()
        scores, _ = metrics.logistic_probe(x, learned, len(values), groups)
        said = scores(report).argmax(1)
        row[name] = {
            "top1": (said == labels).double().mean().item(),
            "macro_f1": metrics.macro_f1(said, labels),
            "guess": (labels == learned.mode().values).double().mean().item(),
        }
    return row


# ---- lists of tags as the WD taggers have them ---------------------------------------------------


def read_selected(path):
    """selected_tags.csv: columns tag_id, name, category, count -> list of its rows, in its order."""
    try:
        with open(regular(path), newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"{path} can't be read as a list of tags: {problem}") from None
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise UserError(
            f"{path} is no list of tags: its first line has to name {', '.join(COLUMNS)}"
        )
    names = [row["name"] for row in rows]
    for at, row in enumerate(rows):
        if not is_name(row["name"]) or not row["category"] or row["name"] in names[:at]:
            raise UserError(
                f"{path}, entry {at + 1} is no tag of its own, with name and category: {row['name']!r}"
            )
    return rows


def write_selected(path, words, counts):
    """The same of ours: ids are places in the list, counts pictures of train."""
    rows = [
        [i, word, GENERAL, int(n)] for i, (word, n) in enumerate(zip(words, counts, strict=True))
    ]
    write_csv(path, [COLUMNS, *rows])


def write_csv(path, rows):
    """Write an iterable of rows as they come, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def in_their_order(selected, words, classes):
    """Rows of selected_tags.csv -> for each the column of ours, [tags, then characters] or -1; and
    those they lack.

    Names are compared in lower case, with _ for spaces; their characters are our classes.
    """

    def plain(name):
        return name.strip().lower().replace(" ", "_")

    tags = {plain(w): i for i, w in enumerate(words)}
    people = {plain(c): len(words) + i for i, c in enumerate(classes)}
    columns = []
    for row in selected:
        names = people if row["category"] == CHARACTER else tags
        columns.append(names.get(plain(row["name"]), -1))
    theirs = {plain(row["name"]) for row in selected}
    return np.array(columns), [w for w in words if plain(w) not in theirs]


# ---- the sheet -----------------------------------------------------------------------------------

SIGNS = {
    "right": "+",
    "missed": "-",
    "new but true": "*",
    "new and false": "x",
}  # where colours can't be told apart


def draw_sheet(path, title, images, kinds, words, names):
    """Pictures u8 (n, S, S, 3), the four kinds of their tags (n, V), (true name, said name) of each
    -> sheet.png.
    """
    from common import plots

    columns, colours = (
        2,
        dict(zip(SIGNS, (plots.BLUE, "#999999", plots.GREEN, "#D55E00"), strict=True)),
    )
    rows = -(-len(images) // columns)
    title += "\n" + "     ".join(f"{sign} {kind}" for kind, sign in SIGNS.items())
    with plots.panels(
        path,
        title,
        rows,
        2 * columns,
        (11, 2.15 * rows + 0.9),
        squeeze=False,
        gridspec_kw={"width_ratios": [1, 1.75] * columns},
    ) as axes:
        for axis in axes.flat:
            axis.axis("off")
        for i, (image, (true, said)) in enumerate(zip(images, names, strict=True)):
            picture, text = axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
            picture.imshow(image)
            picture.set_title(
                true if true == said else f"{true}, said: {said}", fontsize=8, loc="left"
            )
            lines = [
                (k, line)
                for k in SIGNS
                for line in lines_of(k, [words[t] for t in kinds[k][i].nonzero()[0]])
            ]
            for at, (kind, line) in enumerate(lines):
                text.text(
                    0,
                    1 - at * 0.105,
                    line,
                    color=colours[kind],
                    fontsize=7.5,
                    va="top",
                    family="monospace",
                )


def lines_of(kind, tags, width=40, most=4):
    """Tags of a kind -> lines of so many letters, the sign before each tag."""
    lines, line = [], ""
    for tag in tags:
        if len(line) + len(tag) + 3 > width and line:
            lines.append(line)
            line = ""
        line += f"{SIGNS[kind]}{tag} "
    lines += [line] * bool(line)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + "..."]
