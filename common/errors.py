"""What a classifier gets wrong, which characters it confuses, and why; and its scores in percent.

Reasons are defined by rules that can be measured; a mistake may have several, or none of them
("other"):

    few     the true character has fewer than 20 training pictures
    crop    at least 3 of 5 slightly tighter views (4 corners and the centre, 85 % of each side) are
            recognised
    colour  colour alone makes the same mistake: of the mean 4x4 thumbnails of all characters, the
            predicted is nearest
    style   drawn unlike the true character's training pictures: further from their mean style than
            95 % of them; style is the mean and std of saturation, brightness and of the step
            between neighbouring pixels
"""

import numpy as np
import torch

import data
from common import metrics
from common.train import read_log

CROPS = torch.tensor(
    [[y, x, 0.85, 0.85] for y, x in ((0, 0), (0, 0.15), (0.15, 0), (0.15, 0.15), (0.075, 0.075))]
)


# ---- scores, in percent --------------------------------------------------------------------------


def dev_scores(logits, labels):
    """What is logged after every epoch."""
    macro_f1 = metrics.macro_f1(logits.argmax(1), labels)
    return {"dev_top1": 100 * metrics.topk(logits, labels, 1), "dev_macro_f1": 100 * macro_f1}


def scores(logits, labels, sizes, names):
    """metrics.classification, each class under its name; sizes (C,): its training pictures."""
    found = metrics.classification(logits, labels, sizes)
    percent = {
        k: 100 * found[k]
        for k in ("top1", "top5", "macro_f1", "head", "mid", "tail")
        if found[k] is not None
    }
    each = zip(names, found["per_class"], map(sum, found["confusion"]), sizes.tolist(), strict=True)
    return {
        "top1": percent.pop("top1"),
        "top5": percent.pop("top5"),
        "macro_f1": percent.pop("macro_f1"),
        "by_size": percent,
        "frequency_correlation": found["frequency_correlation"],
        "per_class": {
            n: {"top1": 100 * r if c else None, "pictures": c, "trained_on": s}
            for n, r, c, s in each
        },
        "confusion": found["confusion"],
    }


def in_styles(split, rows):
    """Rows (n,) of a split -> {"palette: vivid": (n,) bool}: which of them are drawn so; {} of a
    set without styles.
    """
    strata = enumerate((split["header"].get("style") or {}).items())
    return {
        f"{stratum}: {value}": torch.from_numpy(np.asarray(split["style"])[rows, column] == i)
        for column, (stratum, values) in strata
        for i, value in enumerate(values)
    }


def by_stratum(split, rows, right, least=20):
    """Top-1 of pictures that share a style or a tag, as packed -> {name: {"top1": in percent,
    "pictures"}}.

    rows (n,) of a split, right (n,) bool; strata of fewer than `least` pictures, or of all, are
    left out.
    """
    found = in_styles(split, rows)
    if tags := split["header"].get("tags"):
        found |= {
            t: torch.from_numpy((np.asarray(split["tags"])[rows] == i).any(1))
            for i, t in enumerate(tags)
        }
    found = {
        name: right[there] for name, there in found.items() if least <= there.sum() < len(rows)
    }
    return {
        k: {"top1": 100 * r.double().mean().item(), "pictures": len(r)} for k, r in found.items()
    }


def over_seeds(rows):
    """Metrics of several seeds -> {number: {"mean", "deviation", "of each"}} of the plain numbers
    that they share.
    """
    shared = set.intersection(*map(set, rows)) - {"seed"}
    values = {
        k: [float(r[k]) for r in rows]
        for k, v in rows[0].items()
        if k in shared and isinstance(v, int | float)
    }
    return {
        k: {"mean": float(np.mean(v)), "deviation": float(np.std(v, ddof=1)), "of each": v}
        for k, v in values.items()
    }


# ---- reasons of mistakes: pure functions of tensors ----------------------------------------------


def confused_pairs(confusion, most=6):
    """confusion (C, C), true by predicted -> [(true, predicted, count)], the most frequent first."""
    wrong, C = confusion - confusion.diag().diag(), len(confusion)
    counts, flat = (x[:most].tolist() for x in wrong.flatten().sort(descending=True, stable=True))
    return [(i // C, i % C, n) for n, i in zip(counts, flat, strict=True) if n > 0]


def style_of(images):
    """images u8 (n, S, S, 3) -> (n, 6): mean and std of saturation, brightness, and steps between
    pixels.
    """
    x = images.float() / 255
    high, low = x.amax(3), x.amin(3)
    step = (high[:, 1:, 1:] - high[:, :-1, :-1]).abs()
    planes = ((high - low) / high.clamp(min=1e-3), high, step)
    return torch.stack([f(p.flatten(1), 1) for p in planes for f in (torch.mean, torch.std)], 1)


def far_in_style(train, train_labels, styles, labels):
    """Rows whose style (n, 6) is further from their class's mean than 95 % of its training
    pictures, (n,) bool.
    """
    scale, far = train.std(0) + 1e-6, torch.zeros(len(styles), dtype=torch.bool)
    for c in labels.unique():
        own, rows = train[train_labels == c] / scale, labels == c
        reach = (own - own.mean(0)).norm(dim=1).quantile(0.95)
        far[rows] = (styles[rows] / scale - own.mean(0)).norm(dim=1) > reach
    return far


def reasons(images, labels, predicted, crops_right, train, train_labels, counts):
    """Why each mistake may have been made -> {reason: (n,) bool}.

    images u8 (n, S, S, 3) with their labels and what was predicted; crops_right (n, 5) bool for the
    views of CROPS; train u8 (m, S, S, 3) some training pictures, counts (C,) how many each class
    has.
    """
    small = metrics.thumbnails(train, 4)
    means = torch.stack(
        [small[train_labels == c].mean(0) for c in range(int(train_labels.max()) + 1)]
    )
    nearest = torch.cdist(metrics.thumbnails(images, 4), means).argmin(1)  # by colour alone
    found = {
        "few": counts[labels] < 20,
        "crop": crops_right.sum(1) >= 3,
        "colour": nearest == predicted,
        "style": far_in_style(style_of(train), train_labels, style_of(images), labels),
    }
    return found | {"other": ~torch.stack(list(found.values())).any(0)}


def thumbnail_top1(task, side=8):
    """The control: Top-1 in percent on task.report of a ridge regression on thumbnails, its penalty
    chosen on dev.
    """
    found = []
    for images in (task.train, task.dev, task.report):
        chunks = (
            data.take(images.split["images"], rows, torch.device("cpu"))
            for rows in images.rows.split(1024)
        )
        found.append(
            (torch.cat([metrics.thumbnails(x, side) for x in chunks]), images.labels[images.rows])
        )
    return metrics.ridge_top1(*zip(*found, strict=True), len(task.classes))


# ---- of a run: task is the namespace of finetune_lora.open_task ----------------------------------


def explain(task, logits):
    """Why pictures of task.report, logits (n, C), were mistaken -> {"count", reason: % of the
    mistakes}.
    """
    report, train, right = task.report, task.train, []
    truth, predicted = report.labels[report.rows], logits.argmax(1)
    wrong = (predicted != truth).nonzero()[:, 0]
    if len(wrong) == 0:
        return {"count": 0}
    images = data.take(report.split["images"], report.rows[wrong], torch.device("cpu"))
    for box in CROPS:
        for some in images.split(data.CHUNK):
            boxes, flip = box.expand(len(some), 4), torch.zeros(len(some), dtype=torch.bool)
            view = data.view_images(some.to(task.device), boxes, flip, task.S)
            with task.autocast():
                pooled = task.net.pooled(*task.net.encoder.all_patches(view))
            right.append(task.net(pooled).argmax(1).cpu())
    right = torch.cat(right).view(len(CROPS), -1).T.eq(truth[wrong, None])  # (n, 5)
    counts = torch.bincount(train.labels[train.labels >= 0], minlength=logits.shape[1])
    shown = data.take(train.split["images"], task.gallery, torch.device("cpu"))
    found = reasons(
        images, truth[wrong], predicted[wrong], right, shown, train.labels[task.gallery], counts
    )
    return {"count": len(wrong)} | {
        k: round(100 * v.float().mean().item(), 1) for k, v in found.items()
    }


def draw(task, row, logits, title, suffix=""):
    """curves.png, confusion.png, confused.png of a run with these metrics and the logits (n, C) of
    task.report.

    suffix: behind the names of the two that show the split that is reported.
    """
    from common import plots  # matplotlib takes half a second to load

    report, train, out = task.report, task.train, task.out
    truth, predicted, names, pairs = report.labels[report.rows], logits.argmax(1), task.classes, []
    for true, other, n in confused_pairs(torch.tensor(row["confusion"])):
        wrong = report.rows[(truth == true) & (predicted == other)][:5].numpy()
        like = train.rows[train.labels[train.rows] == other][:5].numpy()
        pairs.append(
            (
                f"{names[true]}, {n} times",
                f"recognised as {names[other]}, who looks like this",
                report.split["images"][wrong],
                train.split["images"][like],
            )
        )
    plots.training(out / "curves.png", read_log(out / "log.jsonl"), row["best_epoch"], title)
    plots.confusion(out / f"confusion{suffix}.png", row["confusion"], names, title)
    plots.confused(out / f"confused{suffix}.png", pairs, f"Most confused: {title}")
