"""Every picture of the project. Imports nothing of ours; takes arrays and rows, writes a PNG (150 dots per inch).

Colours are Okabe and Ito's, which the colour-blind can tell apart; maps are drawn in viridis.
"""

import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

BLUE, ORANGE, GREEN, PINK, INK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#333333"
GRAY = 128  # a hidden patch
PART_COLOURS = ("#FFFFFF", "#0072B2", "#E69F00", "#000000", "#D55E00", "#009E73", "#CC79A7")  # by part id
plt.rcParams |= {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"text.color": INK, "axes.labelcolor": INK, "savefig.dpi": 150, "figure.constrained_layout.use": True}


def save(figure, path):
    figure.savefig(path)
    plt.close(figure)


def image_grid(path, title, rows):
    """rows: [(name, images u8 (n, S, S, 3) or maps (n, g, g))], one line of pictures each."""
    n = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), n, figsize=(1.15 * n + 1.0, 1.15 * len(rows) + 0.5), squeeze=False)
    figure.suptitle(title)
    for line, (name, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, torch.as_tensor(pictures).cpu().numpy(), strict=True):
            axis.imshow(picture, cmap="viridis", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, path)


def reconstructions(path, original, seen, predicted, pasted, ratio):
    """Four lines of u8 (n, S, S, 3): the original, what the model saw, what it predicted, both together."""
    title = f"Reconstruction of images it never trained on, {ratio:.0%} hidden at random"
    image_grid(path, title, [("original", original), ("seen", seen), ("predicted", predicted), ("pasted", pasted)])


def masks(path, view, seen, guide, title):
    """view, seen u8 (n, S, S, 3); guide {name: (n, g, g)}, the map that guided the mask, or {}."""
    image_grid(path, title, [("view", view), *guide.items(), ("seen", seen)])


def curves(path, rows, split, title):
    """Rows of log.jsonl -> training loss, validation error and kNN Top-1 (with its controls) by epoch."""
    loss = [r for r in rows if "loss" in r]
    held = [r for r in rows if "val_mse" in r]
    has_knn = any("knn" in r for r in held)
    figure, axes = plt.subplots(1, 2 + has_knn, figsize=(3.4 * (2 + has_knn), 3.2))
    figure.suptitle(title)
    axes[0].plot([r["epoch"] for r in loss], [r["loss"] for r in loss], color=BLUE)
    axes[0].set(title="Training loss", xlabel="epoch", ylabel="weighted masked error")
    axes[1].plot([r["epoch"] for r in held], [r["val_mse"] for r in held], "o-", color=BLUE)
    axes[1].set(title=f"Masked error on {split}", xlabel="epoch", ylabel="mean squared error, fixed mask")
    if has_knn:
        knn(axes[2], held)
    save(figure, path)


def knn(axis, held):
    axis.plot([r["epoch"] for r in held], [r["knn"] for r in held], "o-", color=BLUE, label="this encoder")
    controls = held[0]
    axis.axhline(controls["knn"], color=ORANGE, ls="--", label="untrained")
    if "knn_thumbnail" in controls:
        axis.axhline(controls["knn_thumbnail"], color=INK, ls=":", label="4x4 thumbnails")
    axis.set(title="Recognition", xlabel="epoch", ylabel="kNN Top-1, %", ylim=(0, None))
    axis.legend(frameon=False, fontsize=9)


# ---- a sheet of a packed data set ----------------------------------------------------------------------------------


def dataset_sheet(path, name, splits, classes=6, each=10):
    """splits: {name: open split}. Pictures by class; figure and parts laid over some; class sizes; what was skipped."""
    train = splits["train"]
    header, images, labels = train["header"], train["images"], train["labels"].numpy()
    over = [p for p in ("fg", "parts") if p in train]
    if header["classes"]:
        rows = [(header["classes"][c], index) for c, index in sampled(labels, classes, each)]
    else:
        some = list(spread(len(images), 3 * each))
        rows = [("", some[i : i + each]) for i in range(0, len(some), each)]
    figure = plt.figure(figsize=(11.5, 1.05 * (len(rows) + len(over)) + 3.9))
    above, below = figure.subfigures(2, 1, height_ratios=[1.05 * (len(rows) + len(over)) + 0.4, 3.2])
    sizes = ", ".join(f"{n} {len(s['images']):,}" for n, s in splits.items())
    above.suptitle(f"{name}: {sizes}, {len(header['classes'])} classes, {images.shape[1]} px", fontsize=13)
    axes = above.subplots(len(rows) + len(over), each, squeeze=False)
    for line, (label, index) in zip(axes, rows, strict=False):
        picture_line(line, label[:18], [images[i] for i in index])
    shown = list(spread(len(images), each))
    for line, plane in zip(axes[len(rows) :], over, strict=True):
        picture_line(line, {"fg": "figure", "parts": "parts"}[plane], [laid_over(train, plane, i) for i in shown])
    left, right = below.subplots(1, 2, width_ratios=[3, 2])
    class_sizes(left, splits)
    right.axis("off")
    right.text(0, 1, "\n".join(about_lines(splits)), va="top", fontsize=9, linespacing=1.5, transform=right.transAxes)
    if "parts" in over and header.get("parts"):
        patches = [Patch(fc=c, ec=INK, lw=0.5, label=p) for p, c in zip(header["parts"], PART_COLOURS, strict=False)]
        right.legend(handles=patches, ncols=4, loc="lower left", frameon=False, fontsize=9)
    save(figure, path)


def spread(n, k):
    """k of 0..n-1, evenly spread, none twice."""
    return dict.fromkeys(i * n // k for i in range(k))


def sampled(labels, classes, each):
    """-> [(class id, rows)] of the largest, the smallest and some classes between them."""
    ids, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = ids[np.lexsort((ids, -counts))]
    chosen = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, classes).round().astype(int))]
    return [(int(c), np.nonzero(labels == c)[0][:each].tolist()) for c in chosen]


def picture_line(axes, label, pictures):
    for axis in axes:
        axis.axis("off")
    for axis, picture in zip(axes, pictures, strict=False):
        axis.imshow(picture, interpolation="antialiased")
    axes[0].text(-0.06, 0.5, label, transform=axes[0].transAxes, ha="right", va="center", fontsize=9)


def laid_over(split, plane, i):
    """Picture i with the ground grayed out, or with its parts in colours, u8 (S, S, 3)."""
    picture = split["images"][i].astype(np.float32)
    if plane == "fg":
        share = split["fg"][i][..., None] / 255
        return np.uint8(picture * share + (GRAY + 60) * (1 - share))
    tint = np.array([to_rgb(c) for c in PART_COLOURS])[split["parts"][i] % len(PART_COLOURS)] * 255
    return np.uint8(0.35 * picture.mean(2, keepdims=True) + 0.65 * tint)


def class_sizes(axis, splits):
    """Images of each class, the largest first, by split: the long tail at a glance."""
    n = len(splits["train"]["header"]["classes"])
    if not n:
        axis.axis("off")
        axis.text(0.5, 0.5, "no labels", ha="center", va="center", transform=axis.transAxes)
        return
    counts = {s: np.bincount(x["labels"].numpy()[x["labels"].numpy() >= 0], minlength=n) for s, x in splits.items()}
    order, bottom = np.argsort(-sum(counts.values()), kind="stable"), np.zeros(n)
    for (split, count), colour in zip(counts.items(), (BLUE, ORANGE, GREEN, PINK), strict=False):
        axis.bar(np.arange(n) + 1, count[order], 0.9 if n < 100 else 1.0, bottom, color=colour, label=split)
        bottom += count[order]
    axis.set(xlabel="class, by size", ylabel="images", xlim=(0.4, n + 0.6))
    axis.set_title("Class sizes", loc="left")
    axis.legend(frameon=False, fontsize=9, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def about_lines(splits):
    """What was left out or joined while packing, and what else the files hold."""
    header = splits["train"]["header"]
    skipped = [s for x in splits.values() for s in x["header"].get("skipped_first", [])]
    count = sum(x["header"].get("skipped", 0) for x in splits.values())
    lines = [f"source: {header['source']}", f"skipped: {count}"] + [f"  {k}: {why}" for k, why in skipped[:4]]
    lines += header.get("notes", [])
    if header.get("tags"):
        lines.append(f"{len(header['tags'])} tags: {', '.join(header['tags'][:8])}, ...")
    if header.get("style"):
        lines += [f"{k}: {', '.join(v)}" for k, v in header["style"].items()]
    return [part for line in lines for part in textwrap.wrap(line, 62, subsequent_indent="   ")][:16]
