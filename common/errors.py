"""What a classifier gets wrong, with whom it confuses whom, and why: pure functions of tensors.

Reasons are defined by rules that can be measured; a mistake may have several, or none of them ("other"):

    few     the true character has fewer than 20 training pictures
    crop    at least 3 of 5 slightly tighter views (4 corners and the centre, 85 % of each side) are recognised
    colour  colour alone makes the same mistake: of the mean 4x4 thumbnails of all characters, the nearest is hers
    style   drawn unlike the true character's training pictures: further from their mean style than 95 % of them;
            style is the mean and deviation of saturation, brightness and of the step between neighbouring pixels
"""

import torch

import data
from common import metrics, plots
from common.train import read_log

REASONS = {"few": "too few pictures", "crop": "crop", "colour": "colour", "style": "style", "other": "other"}
CROPS = torch.tensor([[y, x, 0.85, 0.85] for y, x in ((0, 0), (0, 0.15), (0.15, 0), (0.15, 0.15), (0.075, 0.075))])


def quick(logits, labels):
    """What is looked at after every epoch, in percent."""
    table = metrics.confusion(logits.argmax(1), labels, logits.shape[1])
    return {"dev_top1": 100 * metrics.topk(logits, labels, 1), "dev_macro_f1": 100 * metrics.macro_f1(table)}


def scores(logits, labels, sizes, names):
    """metrics.classification in percent, each class under its name; sizes (C,) are its training pictures."""
    found = metrics.classification(logits, labels, sizes)
    percent = {k: 100 * found[k] for k in ("top1", "top5", "macro_f1", "head", "mid", "tail") if found[k] is not None}
    table = torch.tensor(found["confusion"])
    each = zip(names, found["per_class"], table.sum(1).tolist(), sizes.tolist(), strict=True)
    return {"top1": percent.pop("top1"), "top5": percent.pop("top5"), "macro_f1": percent.pop("macro_f1"),
            "by_size": percent, "frequency_correlation": found["frequency_correlation"],
            "per_class": {n: {"top1": 100 * r if c else None, "pictures": c, "trained_on": s} for n, r, c, s in each},
            "confusion": found["confusion"]}  # fmt: skip


def confused_pairs(confusion, most=6):
    """confusion (C, C), true by predicted -> [(true, predicted, count)], the most frequent first."""
    wrong = confusion - confusion.diag().diag()
    counts, flat = wrong.flatten().sort(descending=True, stable=True)
    C = len(confusion)
    return [(int(i) // C, int(i) % C, int(n)) for n, i in zip(counts[:most], flat[:most], strict=True) if n > 0]


def style_of(images):
    """images u8 (n, S, S, 3) -> (n, 6): mean and deviation of saturation, brightness, and steps between pixels."""
    x = images.float() / 255
    high, low = x.amax(3), x.amin(3)
    step = (high[:, 1:, 1:] - high[:, :-1, :-1]).abs()
    planes = ((high - low) / high.clamp(min=1e-3), high, step)
    return torch.stack([f(p.flatten(1), 1) for p in planes for f in (torch.mean, torch.std)], 1)


def far_in_style(train, train_labels, styles, labels):
    """Rows whose style (n, 6) is further from their class's mean than 95 % of its training pictures, (n,) bool."""
    scale = train.std(0) + 1e-6
    far = torch.zeros(len(styles), dtype=torch.bool)
    for c in labels.unique():
        own, mine = train[train_labels == c] / scale, labels == c
        reach = (own - own.mean(0)).norm(dim=1).quantile(0.95)
        far[mine] = (styles[mine] / scale - own.mean(0)).norm(dim=1) > reach
    return far


def nearest_colour(train, train_labels, images):
    """The class whose mean 4x4 thumbnail is nearest: images u8 (n, S, S, 3) -> (n,)."""
    small = metrics.thumbnails(train, 4)
    means = torch.stack([small[train_labels == c].mean(0) for c in range(int(train_labels.max()) + 1)])
    return torch.cdist(metrics.thumbnails(images, 4), means).argmin(1)


def reasons(images, labels, predicted, crops_right, train, train_labels, counts):
    """Why each mistake may have been made -> {reason: (n,) bool}.

    images u8 (n, S, S, 3) with their labels and what was predicted; crops_right (n, 5) bool for the views of CROPS;
    train u8 (m, S, S, 3) some training pictures, counts (C,) how many each class has.
    """
    found = {
        "few": counts[labels] < 20,
        "crop": crops_right.sum(1) >= 3,
        "colour": nearest_colour(train, train_labels, images) == predicted,
        "style": far_in_style(style_of(train), train_labels, style_of(images), labels),
    }
    return found | {"other": ~torch.stack(list(found.values())).any(0)}


def over_seeds(rows):
    """Metrics of several seeds -> {number: {"mean", "deviation", "of each"}} of the plain numbers that they share."""
    numbers = [
        k for k, v in rows[0].items() if isinstance(v, int | float) and k != "seed" and all(k in r for r in rows)
    ]
    values = {k: torch.tensor([float(r[k]) for r in rows], dtype=torch.float64) for k in numbers}
    return {k: {"mean": v.mean().item(), "deviation": v.std().item(), "of each": v.tolist()} for k, v in values.items()}


# ---- of a run ---


@torch.no_grad()
def explain(net, held, logits, truth, known, labels, S, autocast):
    """Why pictures were mistaken, by the rules above -> {"count", reason: share of the mistakes in percent}.

    held, known: (split, rows) of what was asked, logits (n, C), truth (n,), and of training pictures; labels of train.
    """
    wrong = (logits.argmax(1) != truth).nonzero()[:, 0]
    if len(wrong) == 0:
        return {"count": 0}
    cpu, device, right = torch.device("cpu"), net.encoder.cls_token.device, []
    images = data.take(held[0]["images"], held[1][wrong], cpu)
    for box in CROPS:
        for part, y in zip(images.split(data.CHUNK), truth[wrong].split(data.CHUNK), strict=True):
            boxes, flip = box.expand(len(part), 4), torch.zeros(len(part), dtype=torch.bool)
            view = data.view_images(part.to(device), boxes, flip, S)
            with autocast():
                pooled = net.pooled(*net.encoder.all_patches(view))
            right.append(net(pooled).argmax(1).cpu() == y)
    right = torch.cat(right).view(len(CROPS), -1).T
    split, rows = known
    sizes = torch.bincount(labels[labels >= 0], minlength=logits.shape[1])
    shown = data.take(split["images"], rows, cpu)
    found = reasons(images, truth[wrong], logits[wrong].argmax(1), right, shown, labels[rows], sizes)
    return {"count": len(wrong)} | {k: round(100 * v.float().mean().item(), 1) for k, v in found.items()}


def draw(out, row, held, logits, truth, train, labels, names, title):
    """curves.png, confusion.png, confused.png; held and train: (split, rows)."""
    plots.training(out / "curves.png", read_log(out / "log.jsonl"), row["best_epoch"], title)
    plots.confusion(out / "confusion.png", row["confusion"], names, title)
    predicted, pairs = logits.argmax(1), []
    for true, other, n in confused_pairs(torch.tensor(row["confusion"])):
        wrong = held[1][(truth == true) & (predicted == other)][:5]
        like = train[1][labels[train[1]] == other][:5]
        pairs.append((f"{names[true]}, {n} times", f"recognised as {names[other]}, who looks like this",
                      held[0]["images"][wrong.numpy()], train[0]["images"][like.numpy()]))  # fmt: skip
    plots.confused(out / "confused.png", pairs, f"Most confused: {title}")
