"""Every picture of the project. Imports nothing of ours; takes arrays and rows, writes a PNG (150 dots per inch).

Colours are Okabe and Ito's, which the colour-blind can tell apart; maps are drawn in viridis.
"""

import textwrap
from pathlib import Path

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
    """Whole or not at all, as every file here."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format=path.suffix[1:])
    temporary.replace(path)
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
    """Rows of log.jsonl -> training loss, validation error, Top-1 (with its controls) and attention, by epoch."""
    loss = [r for r in rows if "loss" in r]
    held = [r for r in rows if "val_mse" in r]
    has_knn, has_parts = any("knn" in r for r in held), any("attention_on" in r for r in held)
    panels = 2 + has_knn + has_parts
    figure, axes = plt.subplots(1, panels, figsize=(3.4 * panels, 3.2))
    figure.suptitle(title)
    axes[0].plot([r["epoch"] for r in loss], [r["loss"] for r in loss], color=BLUE)
    axes[0].set(title="Training loss", xlabel="epoch", ylabel="weighted masked error")
    axes[1].plot([r["epoch"] for r in held], [r["val_mse"] for r in held], "o-", color=BLUE)
    axes[1].set(title=f"Masked error on {split}", xlabel="epoch", ylabel="mean squared error, fixed mask")
    if has_knn:
        recognition(axes[2], held)
    if has_parts:
        attention_on(axes[-1], [r for r in held if "attention_on" in r])
    save(figure, path)


def attention_on(axis, held):
    """How much more attention each part gets than its area, by epoch; only where the data knows the parts."""
    names, marks = ("eyes", "mouth", "hair", "face", "background"), ("o-", "s-", "^-", "v--", "x:")
    for name, mark, colour in zip(names, marks, (BLUE, PINK, ORANGE, GREEN, INK), strict=True):
        points = [(r["epoch"], r["attention_on"][name]) for r in held if name in r["attention_on"]]
        if points:
            axis.plot(*zip(*points, strict=True), mark, color=colour, label=name, markersize=4)
    axis.axhline(1, color=INK, lw=0.8)
    axis.set(title="Where the teacher looks", xlabel="epoch", ylabel="attention / area, shares")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def recognition(axis, held):
    """Top-1 of the kNN and of the linear probe by epoch, each with what a thumbnail has."""
    for key, mark, colour, name in (("linear", "s-", GREEN, "linear"), ("knn", "o-", BLUE, "kNN")):
        if key in held[0]:
            axis.plot([r["epoch"] for r in held], [r[key] for r in held], mark, color=colour, label=name, markersize=5)
            axis.axhline(held[0][f"{key}_thumbnail"], color=colour, ls=":", label=f"4x4 thumbnails, {name}")
    axis.set(title="Recognition", xlabel="epoch", ylabel="Top-1, %", ylim=(0, None))
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


# ---- a sheet of maps and masks -------------------------------------------------------------------------------------


def mask_sheet(path, title, images, maps, columns, width=1100):
    """What each strategy hides: a block of rows for each ratio, a row for each image, a column for each strategy.

    images u8 (n, S, S, 3); maps [(name, (n, g, g))]: whole numbers (u8 or i64) of at most 12 kinds are drawn as parts,
    the rest in viridis; columns [(name, {ratio: (n, g, g) bool, True where hidden})]. width: of all columns, in pixels.
    """
    side = min(images.shape[1], width // (1 + len(maps) + len(columns)) - 4)
    pictures = [resized(image, side) for image in images]
    beside = [pictures] + [[resized(m, side) for m in coloured(torch.as_tensor(m))] for _, m in maps]
    names, n = ["image", *(name for name, _ in maps), *(name for name, _ in columns)], len(images)
    ratios = list(columns[0][1])
    wide, high = (side + 4) * len(names) / 150 + 0.5, (side + 4) * n / 150 + 0.3
    figure, axes = plt.subplots(len(ratios), 1, figsize=(wide, high * len(ratios) + 0.8), squeeze=False)
    figure.suptitle(title, fontsize=11)
    for k, (axis, ratio) in enumerate(zip(axes[:, 0], ratios, strict=True)):
        masked = [[darkened(p, h) for p, h in zip(pictures, hidden[ratio], strict=True)] for _, hidden in columns]
        axis.imshow(tiled(beside + masked), interpolation="nearest")
        axis.set(yticks=[], xticks=[], ylabel=f"{ratio:.0%} hidden")
        axis.spines[:].set_visible(False)
        if k == 0:
            axis.xaxis.tick_top()
            axis.set_xticks([(i + 0.5) * (side + 4) - 2 for i in range(len(names))], names, fontsize=6.5)
            axis.tick_params(length=0)
    save(figure, path)


def coloured(maps):
    """maps (n, g, g) -> u8 (n, g, g, 3): parts by number, the rest in viridis (floats from 0 to their maximum)."""
    if not maps.is_floating_point() and maps.max() <= 12:
        kinds = plt.get_cmap("tab20")(np.arange(12) * 2 % 20 + np.arange(12) // 10)[:, :3]
        return np.uint8(255 * np.vstack([[[0.93] * 3], kinds])[maps.numpy()])
    x = maps.float() if maps.is_floating_point() else maps / 255
    top = x.amax((1, 2), keepdim=True).clamp(min=1e-9) if maps.is_floating_point() else 1
    return np.uint8(255 * plt.get_cmap("viridis")((x / top).numpy())[..., :3])


def resized(picture, side):
    """u8 (S, S, 3) -> u8 (side, side, 3): the mean of pixels where it shrinks, squares where it grows."""
    x = torch.as_tensor(np.array(picture)).permute(2, 0, 1)[None].float()
    shrink = x.shape[2] > side
    how = {"mode": "area"} if shrink else {"mode": "nearest"}
    return torch.nn.functional.interpolate(x, (side, side), **how)[0].permute(1, 2, 0).round().byte().numpy()


def darkened(picture, hidden):
    """picture u8 (S, S, 3) with its hidden patches, (g, g) bool, nearly black: what is left is what the model sees."""
    place = np.arange(len(picture)) * len(hidden) // len(picture)
    mask = np.asarray(hidden)[place][:, place, None]
    return np.where(mask, np.uint8(0.16 * picture.mean(2, keepdims=True) + 38), picture)


def tiled(columns, gap=4):
    """Columns of n pictures u8 (s, s, 3) -> one picture, white between them."""
    padded = [[np.pad(p, ((0, gap), (0, gap), (0, 0)), constant_values=255) for p in column] for column in columns]
    return np.hstack([np.vstack(column) for column in padded])
