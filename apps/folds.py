"""Cross-validation of a small collection: what finetune_lora.py measures before it learns every picture.

    python finetune_lora.py weights/toon --data datasets/mine                 by itself, if it is quick
    python finetune_lora.py weights/toon --data datasets/mine --split folds   however long it takes

Reads:  datasets/NAME, all of its splits
Writes: runs/NAME/ folds/1.safetensors, ... (answers of the networks of the folds), folds/promise.json
        (what follows from them); where it is stopped, the same command goes on with the next fold

A collection of seven characters with twenty pictures each has no picture to spare: held-out ones
teach nothing, and fourteen of them say little. So FOLDS networks are trained, each without a part of
the pictures, and without some characters at all. Each picture is asked twice: once of a network that
learned its character by other pictures, and once of one that has never seen this character. The
first answers say how often names are right, both together say which similarity is too low for a
name. Then one more network learns everything, and all pictures teach.

    n pictures   m held-out ones   k of characters left out   C characters
"""

import copy
import json
import math
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import data
import finetune_lora
from apps.groups import best_threshold, f1_curve
from apps.recognize import (
    FACES,
    PROMISE,
    best_similarity,
    compared,
    confidence,
    decided,
    enrolled_threshold,
    make_gallery,
    open_others,
    outputs_of,
)
from apps.unknown import reliability
from common import controls, metrics, readout, train
from common.command import progress, started_as
from common.features import can_leave_out, evenly_of_each, relabelled
from common.io import UserError, quoted, read_safetensors, save_json, save_safetensors
from common.locks import reserve
from common.stats import least_error, standard_error

FOLDS = 5  # networks, or as many as there are characters
MINUTES = 3  # that cross-validation may take where nobody asked for it
ENOUGH = 10, 5  # pictures of a character, characters: from here on a promise says something
COLOURS = 1.0  # their weight in a similarity (results/TRIED.md)
MEASURED = "colourless", "thumbnails", "histograms"  # Top-1 of a picture in gray, and controls
CURVES = "dev_top1", "dev_macro_f1"
SHARE = 0.6  # what a fold costs: it learns 4/5 of the characters, and of these 3/4 of the pictures


# ---- who learns what -----------------------------------------------------------------------------


def draw_folds(labels, groups, count):
    """labels (n,) and groups (n,) -> the fold of each character, (C,), and of each picture, (n,).

    The network of a fold learns neither its characters nor its pictures. So the pictures of a
    character are dealt to the other folds, whose networks know it; whole groups at a time.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    C = labels.max() + 1
    rng = np.random.default_rng(0)
    of_character = np.empty(C, int)
    of_character[rng.permutation(C)] = np.arange(C) % count
    of_picture = np.full(len(labels), -1)
    for c in rng.permutation(C):
        folds = [fold for fold in range(count) if fold != of_character[c]]
        for group in rng.permutation(np.unique(groups[(labels == c) & (of_picture < 0)])):
            # To a fold with the fewest pictures of this character; of several, with the fewest in all.
            sizes = [((labels == c) & (of_picture == fold)).sum() for fold in folds]
            alike = [fold for fold, n in zip(folds, sizes, strict=True) if n == min(sizes)]
            of_picture[groups == group] = min(alike, key=lambda fold: (of_picture == fold).sum())
    return of_character, of_picture


def sets_of(every, classes, of_character, of_picture, fold):
    """A set of all pictures -> sets that a fold learns from and is asked about, of characters that it
    leaves out (their index in the split), and the numbers of the characters that it learns."""
    labels = every.labels[every.index]
    held = torch.from_numpy(of_picture == fold)
    left_out = torch.from_numpy(of_character == fold)[labels]
    learned = labels[~held & ~left_out].unique()
    names = every.split["header"]["classes"]
    fit = relabelled("all", every.split, [names.index(classes[c]) for c in learned])
    known = torch.isin(labels, learned)
    dev = replace(fit, index=every.index[held & known])
    fit.index = every.index[~held & known]
    return fit, dev, every.index[left_out], learned


# ---- the networks of the folds -------------------------------------------------------------------


class FoldRun(train.Run):
    """A training that leaves no files: its steps move the bar of all folds, and its log stays here."""

    def __init__(self, *args, bar):
        super().__init__(*args)
        self.bar = bar
        self.writes = False
        self.rows = []

    def resume_or_begin(self):
        """It begins anew: a fold takes a minute."""

    def log(self, **row):
        self.rows.append(row)

    def save_if_due(self):
        """Stop if asked to: folds before this one are kept."""
        if self.stop:
            self.bar.close()
            print(
                f"stopped by {self.stop[0].name}; the same command goes on after the last whole fold"
            )
            sys.exit(128 + self.stop[0])


def steps_of_epoch(flags, images):
    """Steps in which a set of `open_subsets` is seen once."""
    return len(images.index) // flags.batch_size


def train_fold(flags, whole, sets, learned, bar):
    """Train without the pictures of a fold -> its Task and its run."""
    flags = copy.copy(flags)
    flags.resume, flags.log = None, ()
    # As many steps as when everything is learned, of smaller batches. With fewer, it would learn less,
    # and known pictures would seem less similar than they will be.
    flags.batch_size = max(2, len(sets[0].index) // steps_of_epoch(flags, whole.train))
    classes = [whole.classes[c] for c in learned]
    encoder = finetune_lora.fresh_encoder(flags)
    task = finetune_lora.task_of(
        flags, encoder, (*sets, None), classes, whole.device, whole.autocast
    )
    # Pictures that choose an epoch can't measure it, so each fold keeps its last one.
    task.stop = flags.epochs
    # For training, a frozen encoder sees each picture once, and not once for each fold.
    task.features = whole.features
    run, _ = finetune_lora.finetune(flags, task, partial(FoldRun, bar=bar))
    return task, run


@torch.no_grad()
def answers_of(task, left_out, learned, C, folds, others=None):
    """What the network of one of `folds` says of pictures that it was not taught -> {name: tensor}.

    logits (m, C) and similarity (m,) of held-out pictures of its characters, the same of `left_out`, index
    (k,) of unknown ones, and the control's scores of both. A logit of a character that it did not
    learn is -inf. Which held-out ones have the right name, also in gray and by the controls, (m,).
    unit (m, D) and unknown_unit (k, D): faces as they are compared. others: a split, and an index of
    pictures that show nobody; they are asked, too.
    """
    outputs = partial(outputs_of, task.net.eval(), task.train.split, autocast=task.autocast)
    index, labels = task.train.index, task.dev.labels[task.dev.index]
    of_each = evenly_of_each(task.train.labels[index], FACES)
    index = index[torch.cat(of_each)]
    faces, numbers = outputs(index)[1], task.train.labels[index]
    place = torch.cat(
        [torch.arange(len(some)) for some in of_each]
    )  # among the faces of a character

    def gallery_of(some):
        return make_gallery(faces[some], numbers[some], len(learned), colours=COLOURS)

    gallery = gallery_of(slice(None))
    # In the end every picture is learned, and is one more that a face can be similar to: of known
    # characters by the part that this fold has not seen, of unknown ones also by its characters. So
    # how much similarity grows with such a part is measured here, and added.
    fewer = (place + 1) % (folds - 1) > 0
    smaller = [gallery_of(fewer)]
    smaller_yet = [gallery_of(fewer & (numbers % folds != part)) for part in range(folds)]

    colour_scores = histogram_scorer(task.train)

    def answer(asked, galleries):
        some, embeddings = outputs(asked)
        logits = torch.full((len(asked), C), -torch.inf)
        logits[:, learned] = some
        colours = colour_scores(asked)
        said = {"logits": logits, "similarity": grown(embeddings, gallery, galleries)}
        said |= {"colours": colours.amax(1), "unit": compared(embeddings, gallery)}
        return said, embeddings, colours.argmax(1)

    known, embeddings, by_colours = answer(task.dev.index, smaller)
    unknown, _, _ = answer(left_out, smaller_yet)
    if others:
        _, shown = outputs_of(task.net.eval(), *others, autocast=task.autocast)
        known["others_similarity"] = grown(shown, gallery, smaller_yet)
    gray, _ = finetune_lora.predict(task, controls.in_gray(task.dev))
    thumbnails = thumbnail_scores(task.train, task.dev.index)
    return known | {
        **{f"unknown_{name}": x for name, x in unknown.items()},
        "enrolled_threshold": torch.tensor(enrolled_threshold(gallery, embeddings, labels)),
        "colourless": gray.argmax(1) == labels,
        "thumbnails": thumbnails.argmax(1) == labels,
        "histograms": by_colours == labels,
    }


def grown(embeddings, gallery, smaller):
    """(n, D) -> (n,): similarities as they will be in a gallery that is larger by a step.

    smaller: galleries that lack as much as this one will gain.
    """
    now = best_similarity(embeddings, gallery)
    before = torch.stack([best_similarity(embeddings, less) for less in smaller]).mean(0)
    return now + (now - before).mean()


def answers_of_folds(flags, task, of_character, of_picture):
    """Train the folds, or read those that are finished -> a list of `answers_of` with index and labels."""
    every, classes, count = task.train, task.classes, int(of_picture.max()) + 1
    parts = [sets_of(every, classes, of_character, of_picture, fold) for fold in range(count)]
    if not all(len(dev.index) and len(learned) > 1 for _, dev, _, learned in parts):
        fix = "give two illustrations or more of each character (copies are one), or --split val"
        raise UserError(f"a part of {flags.data} has too few pictures or characters; {fix}")
    of_start = train.UNSAVED | {"out", "device", "command"}  # others, where a run goes on
    config = {k: v for k, v in vars(flags).items() if k not in of_start}
    config = json.loads(json.dumps(config))  # as it will be read back
    others = open_others(flags.data)
    others = others if others and len(others[1]) >= count else None
    config["others"] = others and data.fingerprint(others[0])
    steps = flags.epochs * steps_of_epoch(flags, every)
    bar = progress(total=steps * count, name="folds", unit="step")
    answers = []
    for fold, (fit, dev, left_out, learned) in enumerate(parts):
        path = task.out / "folds" / f"{fold + 1}.safetensors"
        if path.exists():
            tensors, header = read_safetensors(path)
            if not config.items() <= header.items():
                raise UserError(f"{path} is of another command; rm -r {quoted(path.parent)}")
            bar.update(steps)
        else:
            trained, run = train_fold(flags, task, (fit, dev), learned, bar)
            some = others and (others[0], others[1][fold::count])  # each picture is asked once
            tensors = answers_of(trained, left_out, learned, len(classes), count, some)
            for name in CURVES:  # of each epoch
                tensors[name] = torch.tensor([row[name] for row in run.rows if name in row])
            save_safetensors(tensors, path, config)
            run.save_if_due()  # somebody may have stopped it while the answers were made
        of_known = {"index": dev.index, "labels": every.labels[dev.index]}
        answers.append(tensors | of_known | {"unknown_labels": every.labels[left_out]})
    bar.close()
    return answers


def curves_of(folds):
    """-> rows as of log.jsonl: Top-1 and macro-F1 of each epoch, their means over the folds."""
    means = [torch.stack([fold[name] for fold in folds]).mean(0).tolist() for name in CURVES]
    rows = enumerate(zip(*means, strict=True), 1)
    return [{"epoch": epoch, **dict(zip(CURVES, row, strict=True))} for epoch, row in rows]


def epoch_of(rows, pictures):
    """The latest epoch whose macro-F1 is within a standard error of the best, as of `Best`."""
    curve = torch.tensor([row["dev_macro_f1"] for row in rows])
    best = curve.max()
    return int((curve >= best - standard_error(best, pictures)).nonzero()[-1]) + 1


# ---- controls, without a dev to choose on --------------------------------------------------------


def thumbnail_scores(train, index):
    """A ridge regression on thumbnails, its penalty fixed: scores (m, C) of pictures, index (m,) of the split."""
    small_side = partial(readout.thumbnails, side=8)
    small = [controls.features_of(small_side, train, some) for some in (train.index, index)]
    x, judged = readout.standardise(*small)
    labels = train.labels[train.index]
    W, b = readout.ridge(x, labels, int(labels.max()) + 1, controls.PENALTIES[2])
    return judged @ W + b


def histogram_scorer(train):
    """An SVM on histograms of colours, its cost fixed -> a function of an index (m,): scores (m, C), 0 on a border."""
    [fit] = controls.histogram_svms(train, controls.COSTS[1:2])

    def scores(index):
        x = controls.features_of(controls.histograms, train, index)
        distance = torch.from_numpy(fit.decision_function(x))
        # Of two characters scikit-learn gives one number: above 0 it is the second.
        return distance if distance.ndim > 1 else torch.stack([-distance, distance], 1)

    return scores


# ---- what follows from their answers -------------------------------------------------------------


def together(folds):
    """A list of `answers_of_folds` -> one namespace: what all of them say.

    others_similarity (k,): of pictures of nobody, perhaps none. alike: see `best_threshold`.
    """
    answers = SimpleNamespace()
    for name in folds[0].keys() - {"enrolled_threshold", "unit", "unknown_unit", *CURVES}:
        setattr(answers, name, torch.cat([fold[name] for fold in folds]))
    thresholds = torch.stack([fold["enrolled_threshold"] for fold in folds])
    answers.enrolled_threshold = thresholds.mean().item()
    # Each fold by itself, because scores of two networks, or of two machines, differ in scale.
    for name, kind in (("auroc", "similarity"), ("colours_auroc", "colours")):
        scores = [100 * metrics.auroc(fold[kind], fold[f"unknown_{kind}"]) for fold in folds]
        setattr(answers, name, sum(scores) / len(scores))
    if "others_similarity" not in folds[0]:
        answers.others_similarity = torch.empty(0)
    curves = []
    for fold in folds:  # each has embeddings of its own
        unit = torch.cat([fold["unit"], fold["unknown_unit"]])
        curves.append(f1_curve(unit, torch.cat([fold["labels"], fold["unknown_labels"]])))
    answers.alike = best_threshold(curves, len(answers.unknown_labels))
    return answers


def share_of(hits, labels, of_new=False):
    """Which pictures (n,) of characters (n,) do it: their share -> {"mean", "low", "high"}, in percent.

    Of the pictures of these characters, or of_new: the mean over characters, because others will have
    other numbers of pictures. The faces of one are alike in how they are judged, so the interval is
    Student's, over characters. Where all of them agree it would have no width, so its standard error
    is at least `least_error`.
    """
    from scipy.stats import t as student

    shares = np.array([hits[labels == c].double().mean().item() for c in labels.unique()])
    C, n = len(shares), len(hits)
    mean = shares.mean() if of_new else hits.double().mean().item()
    error = max(shares.std(ddof=1) / C**0.5 if C > 1 else 0.5, least_error(mean, n))
    if of_new:  # it is to hold for as many other characters, which differ as much as these
        error *= 2**0.5
    reach = student.ppf(0.975, max(1, C - 1)) * error
    low, high = max(0, mean - reach), min(1, mean + reach)
    return {"mean": 100 * mean, "low": 100 * low, "high": 100 * high}


def promise(answers, numbers, sizes):
    """What to expect, by `together` and the numbers of the calibration -> promise.json, in percent."""
    row = {"characters": len(sizes), "pictures": int(sizes.sum()), "least": int(sizes.min())}
    named = answers.similarity >= numbers["threshold"]
    right = named & (answers.logits.argmax(1) == answers.labels)
    row["names_right"] = 100 * right.double().mean().item()
    row["known_unknown"] = share_of(answers.similarity < numbers["threshold"], answers.labels)
    below = answers.unknown_similarity < numbers["threshold"]
    row["unknown"] = share_of(below, answers.unknown_labels, of_new=True)
    if len(answers.others_similarity):
        below = answers.others_similarity < numbers["threshold"]
        row["others"] = 100 * below.double().mean().item()
    row |= {"auroc": answers.auroc, "colours_auroc": answers.colours_auroc}
    sure = confidence(answers.logits, answers.similarity - numbers["threshold"], numbers)
    unsure = confidence(
        answers.unknown_logits, answers.unknown_similarity - numbers["threshold"], numbers
    )
    return row | reliability(sure, answers.logits.argmax(1) == answers.labels, unsure)


def promised(row):
    """promise.json -> what is printed, in lines."""
    known, new = row["known_unknown"], row["unknown"]
    share = "{mean:.0f} % (95 % interval {low:.0f} to {high:.0f})"
    small = row["least"] < ENOUGH[0] or row["characters"] < ENOUGH[1]
    if small:
        share = "{low:.0f} to {high:.0f} %"
    both = f"{row['auroc']:.1f} %; {row['colours_auroc']:.1f} %"
    wins = ", so colours alone tell better" if row["colours_auroc"] > row["auroc"] else ""
    cells = {
        "new characters' pictures called unknown": share.format(**new),
        "known characters' pictures called unknown": share.format(**known),
        "AUROC; of an SVM on histograms of colours": both + wins,
    }
    if "others" in row:
        cells["pictures of nobody called unknown"] = f"{row['others']:.0f} %"
    if small:
        least, C = row["least"], row["characters"]
        there = f"{C} characters, one of them with {least} pictures"
        cells["too few to say how many"] = f"{there}; {ENOUGH[1]} with {ENOUGH[0]} each say more"
    elif row["right_when_sure"] is not None:
        right = f"{row['right_when_sure']:.0f} %, if half of all pictures show new characters"
        cells["names right, of confidence 80 % or more"] = right
    width = max(map(len, cells))
    lines = [f"         {name:<{width}}  {value}" for name, value in cells.items()]
    C, folds = row["characters"], row["folds"]
    count = " to ".join(str(k) for k in dict.fromkeys((C - math.ceil(C / folds), C - C // folds)))
    among = f"{count} of the {C} characters at a time"
    note = f"note: Top-1 was measured among {among}, so among all it may be lower"
    lines = [note, "unknown" + lines[0][len("unknown") :], *lines[1:]]
    if not small:
        right, wrong = row["names_right"], 100 - new["mean"]
        short = f"in short: of 100 new pictures of these characters, about {right:.0f} get the right name"
        lines.insert(0, f"{short}; of 100 of other characters, about {wrong:.0f} get a wrong one")
    return lines


# ---- all of it -----------------------------------------------------------------------------------


def are_quick(flags, encoder, device, autocast):
    """Can this set be cross-validated in MINUTES? If not, a line names the command and the minutes."""
    if not can_leave_out(flags.data):
        print(
            "note: of two characters none can be left out, to see what new ones look like; take three"
        )
        return False
    names = data.splits_in(flags.data)
    if "val" not in names:  # there is no other way
        return True
    pictures = sum(len(data.open_split(flags.data, name)["labels"]) for name in names)
    minutes = minutes_of(flags, encoder, pictures, device, autocast)
    if minutes > MINUTES:
        words = quoted(*started_as(), *sys.argv[1:])
        print(
            f"note: val is reported, and only train is learned from; python {words} --split folds "
            f"measures by all {pictures} pictures and learns all, in about {minutes:.0f} minutes more"
        )
    return minutes <= MINUTES


def minutes_of(flags, encoder, pictures, device, autocast):
    """How long the folds of so many pictures will take, by two passes through the encoder."""
    learns = not flags.method.startswith("linear")
    encoder = copy.deepcopy(encoder).to(device).requires_grad_(learns).train()
    B, S = min(flags.batch_size, pictures), encoder.image_size
    view = torch.full((B, S, S, 3), finetune_lora.GRAY, dtype=torch.uint8, device=device)
    shown = partial(finetune_lora.drop_patches, encoder=encoder, keep=np.mean(flags.keep))
    for _ in range(2):
        start = time.perf_counter()
        with autocast():
            loss = encoder(*shown(view, generator=train.seeded(0))).float().sum()
        if learns:
            loss.backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start  # of the second one, when all is warm
    if not learns:  # but each fold asks every picture and its mirror image
        return FOLDS * 2 * pictures / B * seconds / 60
    steps = max(finetune_lora.LEAST_STEPS, flags.epochs * pictures / B)
    return FOLDS * SHARE * steps * seconds / 60


def cross_validate(flags, task):
    """Train the networks of the folds -> the Answers of all of them, for every picture.

    Writes promise.json, whose "calibration" apps/recognize.py takes for the gallery.
    """
    reserve([], task.out / ".lock")
    if not flags.resume:
        train.refuse_results(task.out)  # said before the folds are trained, and not after
    every, groups = task.train, data.groups_of(task.train.split)
    count = min(FOLDS, len(task.classes))
    if count < 3:
        why = "one of three has to be left out, to see what a new character looks like"
        raise UserError(f"--split folds can't be done with {count} characters: {why}; --split val")
    parts = draw_folds(every.labels[every.index], groups[every.index], count)
    folds = answers_of_folds(flags, task, *parts)
    answers = together(folds)
    unknown = torch.cat([answers.unknown_similarity, answers.others_similarity])
    numbers = decided(answers.logits, answers.labels, answers.similarity, unknown)
    numbers |= {"enrolled_threshold": answers.enrolled_threshold, "alike": answers.alike}
    # The head's logits have no part in these similarities: those of a network that learned few
    # pictures say less of unknown characters than colours do, and mixed in they made it worse.
    numbers |= {"lift": [0.0, 0.0], "colours": COLOURS}
    curve = curves_of(folds)
    epoch = epoch_of(curve, len(answers.labels))
    row = promise(answers, numbers, task.sizes()) | {"folds": count, "epoch": epoch}
    row |= {"calibration": numbers, "command": flags.command, "commit": train.commit()}
    save_json(row, task.out / PROMISE)
    of_controls = {
        f"{name}_top1": 100 * getattr(answers, name).double().mean().item() for name in MEASURED
    }
    return finetune_lora.Answers(
        answers.logits,
        answers.labels,
        groups[answers.index],
        **of_controls,
        curve=curve,
        epoch=epoch,
        lines=promised(row),
    )
