"""Every picture of the project but the study's: takes arrays and rows, writes a PNG (150 dots per inch).

Colours are Okabe and Ito's, which the colour-blind can tell apart; maps are drawn in viridis.
"""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.patches import Patch

from common import metrics
from common.io import atomic

BLUE, ORANGE, GREEN, PINK, INK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#333333"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#D55E00", "#56B4E9", "#000000", "#B59F00")
MARKERS = "os^DvPX*"
GRAY = 128  # a hidden patch
PART_COLOURS = ("#FFFFFF", "#0072B2", "#E69F00", "#000000", "#D55E00", "#009E73", "#CC79A7")  # by part id
plt.rcParams |= {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"text.color": INK, "axes.labelcolor": INK, "savefig.dpi": 150, "figure.constrained_layout.use": True}


def save(figure, path):
    """Whole or not at all, as every file here."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    plt.close(figure)


def bare(axis, picture):
    """A picture u8 (S, S, 3) or a map (g, g), with no frame around it; a map has its own scale, dark is low."""
    axis.imshow(picture, cmap="viridis", interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def image_grid(path, title, rows, margin=(1.0, 0.5)):
    """rows: [(name, images u8 (n, S, S, 3) or maps (n, g, g))], one line of pictures each; margin in inches."""
    n = len(rows[0][1])
    size = (1.15 * n + margin[0], 1.15 * len(rows) + margin[1])
    figure, axes = plt.subplots(len(rows), n, figsize=size, squeeze=False)
    figure.suptitle(title)
    for line, (name, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, torch.as_tensor(pictures).cpu().numpy(), strict=True):
            bare(axis, picture)
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


def controls(axis, lines):
    """Horizontal lines to compare with: [(value, style, label)]; those without a value are left out."""
    for value, style, label in lines:
        if value is not None:
            axis.axhline(value, color=INK, ls=style, lw=1, label=label)


# ---- a sheet of a packed data set ----------------------------------------------------------------------------------


def dataset_sheet(path, name, splits, classes=6, each=10):
    """splits: {name: open split}. Pictures by class; foreground, parts laid over some; class sizes; what is missing."""
    train = splits["train"]
    header, images, labels = train["header"], train["images"], train["labels"].numpy()
    over = [p for p in ("fg", "parts") if p in train]
    if header["classes"]:
        rows = [(header["classes"][c], index) for c, index in sampled(labels, classes, each)]
    else:
        some = list(evenly_spaced(len(images), 3 * each))
        rows = [("", some[i : i + each]) for i in range(0, len(some), each)]
    figure = plt.figure(figsize=(11.5, 1.05 * (len(rows) + len(over)) + 3.9))
    above, below = figure.subfigures(2, 1, height_ratios=[1.05 * (len(rows) + len(over)) + 0.4, 3.2])
    sizes = ", ".join(f"{n} {len(s['images']):,}" for n, s in splits.items())
    above.suptitle(f"{name}: {sizes}, {len(header['classes'])} classes, {images.shape[1]} px", fontsize=13)
    axes = above.subplots(len(rows) + len(over), each, squeeze=False)
    for line, (label, index) in zip(axes, rows, strict=False):
        picture_line(line, label[:18], [images[i] for i in index])
    shown = list(evenly_spaced(len(images), each))
    for line, plane in zip(axes[len(rows) :], over, strict=True):
        picture_line(line, {"fg": "foreground", "parts": "parts"}[plane], [laid_over(train, plane, i) for i in shown])
    left, right = below.subplots(1, 2, width_ratios=[3, 2])
    class_sizes(left, splits)
    right.axis("off")
    right.text(0, 1, "\n".join(about_lines(splits)), va="top", fontsize=9, linespacing=1.5, transform=right.transAxes)
    if "parts" in over and header.get("parts"):
        patches = [Patch(fc=c, ec=INK, lw=0.5, label=p) for p, c in zip(header["parts"], PART_COLOURS, strict=False)]
        right.legend(handles=patches, ncols=4, loc="lower left", frameon=False, fontsize=9)
    save(figure, path)


def evenly_spaced(n, k):
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
    """Picture i with the background grayed out, or with its parts in colours, u8 (S, S, 3)."""
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
    x = F.interpolate(x, (side, side), mode="area" if shrink else "nearest")
    return x[0].permute(1, 2, 0).round().byte().numpy()


def darkened(picture, hidden):
    """picture u8 (S, S, 3) with its hidden patches, (g, g) bool, nearly black: what is left is what the model sees."""
    place = np.arange(len(picture)) * len(hidden) // len(picture)
    mask = np.asarray(hidden)[place][:, place, None]
    return np.where(mask, np.uint8(0.16 * picture.mean(2, keepdims=True) + 38), picture)


def tiled(columns, gap=4):
    """Columns of n pictures u8 (s, s, 3) -> one picture, white between them."""
    padded = [[np.pad(p, ((0, gap), (0, gap), (0, 0)), constant_values=255) for p in column] for column in columns]
    return np.hstack([np.vstack(column) for column in padded])


# ---- what an encoder looks at: the pictures of probe.py --------------------------------------------------------------

# ---- attention -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_by_block(encoder, view):
    """view u8 (B, S, S, 3) -> yields each block's attention probabilities, (B, H, 1+N, 1+N), row: who looks."""
    x = encoder.embed(*encoder.all_patches(view))
    for block in encoder.blocks:
        B, N, D = x.shape
        H = block.attn.heads
        q, k, _ = block.attn.qkv(block.norm1(x)).view(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4)
        yield (q @ k.transpose(-2, -1) * (D // H) ** -0.5).softmax(-1)
        x = block(x)


def attention_maps(encoder, view):
    """-> attention of CLS in the last block (B, H, g, g), and its rollout through all blocks (B, g, g).

    Rollout (Abnar and Zuidema 2020, arXiv:2005.00928): the product over blocks of (A + I) / 2, A the mean over heads.
    """
    flow = None
    for attention in attention_by_block(encoder, view):
        step = (attention.mean(1) + torch.eye(attention.shape[-1], device=attention.device)) / 2
        flow = step if flow is None else step @ flow
    side = encoder.side
    return attention[:, :, 0, 1:].unflatten(2, (side, side)), flow[:, 0, 1:].unflatten(1, (side, side))


def attention_sheet(path, encoder, view, title):
    """Rows: pictures; columns: the picture, each head of the last block, their mean, the rollout."""
    heads, rollout = (x.float().cpu().numpy() for x in attention_maps(encoder, view))
    names = ["picture", *[f"head {i + 1}" for i in range(heads.shape[1])], "mean", "rollout"]
    rows = [[picture, *own, own.mean(0), flow]
            for picture, own, flow in zip(view.cpu().numpy(), heads, rollout, strict=True)]  # fmt: skip
    sheet(path, title, names, rows)


def sheet(path, title, names, rows):
    """rows of pictures u8 (S, S, 3) and maps (g, g), under column names; each map has its own scale, dark is low."""
    size = (1.15 * len(names), 1.17 * len(rows) + 0.6)
    figure, axes = plt.subplots(len(rows), len(names), figsize=size, squeeze=False)
    figure.suptitle(title)
    for line, pictures in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            bare(axis, picture)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    save(figure, path)


# ---- patches as colours --------------------------------------------------------------------------------------------


def principal(x, k):
    """x (n, D) -> (n, k): its k principal components, each turned so that its largest loading is positive."""
    x = x.double() - x.double().mean(0)
    vectors = torch.linalg.eigh(x.T @ x)[1][:, -k:].flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return x @ (vectors * signs)


@torch.no_grad()
def patch_colours(encoder, view):
    """view u8 (B, S, S, 3) -> (B, g, g, 3) in [0, 1]: three principal components of all patch tokens as red, green,
    blue, each from its 1 % to its 99 % quantile. Alike colours, in one picture or two, are alike tokens.

    What tokens at one place share over all pictures is taken off first: else the components show the place alone.
    """
    tokens = encoder.features(view)[:, 1:].float().cpu()
    parts = principal((tokens - tokens.mean(0)).flatten(0, 1), 3)
    low, high = torch.quantile(parts, torch.tensor([0.01, 0.99], dtype=parts.dtype), dim=0)
    colours = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.view(len(view), encoder.side, encoder.side, 3)


def patch_sheet(path, encoder, view, title, shown=8):
    """The first pictures of view and their tokens as colours; all of view gives the components."""
    colours = (patch_colours(encoder, view) * 255).round().to(torch.uint8).numpy()
    image_grid(path, title, [("picture", view[:shown]), ("tokens", colours[:shown])], margin=(0.9, 0.8))


# ---- where classes lie ---------------------------------------------------------------------------------------------


def discriminants(x, labels, shrink=0.1):
    """Fisher's linear discriminants: x (n, D) -> (mean (D), directions (D, 2)) that spread the classes most.

    Solves S_between w = v S_within w; S_within is shrunk by 10 % towards a multiple of I, so that it can be inverted.
    """
    x, mean = x.double(), x.double().mean(0)
    classes, own = labels.unique(return_inverse=True)
    centres = torch.stack([x[own == i].mean(0) for i in range(len(classes))])
    inside = (x - centres[own]).T @ (x - centres[own]) / len(x)
    inside = (1 - shrink) * inside + shrink * inside.diagonal().mean() * torch.eye(len(inside), dtype=x.dtype)
    values, vectors = torch.linalg.eigh(inside)
    white = vectors * values.clamp(min=1e-12).rsqrt()
    between = ((centres - mean)[own] @ white).T @ ((centres - mean)[own] @ white)
    found = torch.linalg.eigh(between)[1][:, -2:].flip(1)
    found = found * found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    return mean, white @ found


def scatter(path, train, labels, held, held_labels, names, title, most=8):
    """Left: principal components of held features (no labels used). Right: discriminants fitted on train."""
    shown = torch.bincount(labels, minlength=len(names)).argsort(descending=True, stable=True)[:most]
    inside, own = torch.isin(held_labels, shown), torch.isin(labels, shown)
    mean, directions = discriminants(train[own], labels[own])
    panels = {"Principal components (labels not used)": principal(held[inside], 2),
              "Fisher's discriminants (fitted on train)": (held[inside].double() - mean) @ directions}  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.4))
    figure.suptitle(title)
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        for c, colour, marker in zip(shown.tolist(), COLOURS, MARKERS, strict=False):
            at = points[held_labels[inside] == c]
            axis.scatter(*at.T, s=18, color=colour, marker=marker, alpha=0.75, lw=0, label=str(names[c])[:16])
        axis.set(title=name, xlabel="first", ylabel="second", xticks=[], yticks=[])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=9)
    save(figure, path)


def confusion(path, table, names, title):
    """table (C, C): rows the true class, columns the one found, shares of the row in percent."""
    table = np.asarray(table, float)
    share = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(7.2, 6.4))
    drawn = axis.imshow(share, cmap="viridis", norm=PowerNorm(0.5, 0, 100))  # mistakes are a few per cent each
    figure.colorbar(drawn, label="% of the true class", shrink=0.85, ticks=[0, 2, 10, 25, 50, 100])
    few = len(names) <= 50
    ticks = range(len(names)) if few else []
    size = max(5, min(10, 260 / len(names)))
    axis.set_xticks(ticks, [str(n)[:12] for n in names] if few else [], rotation=90, fontsize=size)
    axis.set_yticks(ticks, [str(n)[:12] for n in names] if few else [], fontsize=size)
    axis.set(title=title, xlabel="class found", ylabel="true class")
    save(figure, path)


# ---- neighbours ----------------------------------------------------------------------------------------------------


def neighbours(path, queries, bank, images, query_images, right, title):
    """Each query and its nearest: queries (Q, D), bank (n, D); images(rows), query_images u8 (Q, S, S, 3).

    right(query, row) -> True, False, or None where nothing is known of the class: the colour of the frame.
    """
    similarity, nearest = (F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T).topk(8, dim=1)
    figure, axes = plt.subplots(len(queries), 9, figsize=(10.2, 1.32 * len(queries) + 0.6), squeeze=False)
    figure.suptitle(title)
    for i, line in enumerate(axes):
        line[0].imshow(query_images[i])
        for j, (axis, picture) in enumerate(zip(line[1:], images(nearest[i]), strict=True)):
            axis.imshow(picture)
            axis.set_xlabel(f"{similarity[i, j]:.2f}", fontsize=8, labelpad=2)
            frame(axis, right(i, int(nearest[i, j])))
        for axis in line:
            axis.set(xticks=[], yticks=[])
    axes.flat[0].set_title("query", fontsize=9)
    save(figure, path)


def frame(axis, right):
    """A green solid frame for the same class, an orange dashed one for another, thin gray where nobody knows."""
    colour, style, width = {True: (GREEN, "-", 3), False: (ORANGE, "--", 3), None: ("#BBBBBB", "-", 1)}[right]
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linestyle=style, linewidth=width)


# ---- learning curves -----------------------------------------------------------------------------------------------


def learning_curves(path, groups, thumbnail, threshold, title):
    """groups {name: [rows of a seed's log]}: kNN by epoch and by seconds; thin lines: seeds, thick: their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), sharey=True)
    figure.suptitle(title)
    for colour, marker, (name, seeds) in zip(COLOURS, MARKERS, groups.items(), strict=False):
        for axis, key in zip(axes, ("epoch", "seconds"), strict=True):
            for rows in seeds:
                axis.plot([r[key] for r in rows], [r["knn"] for r in rows], color=colour, lw=0.8, alpha=0.5)
            if len({len(rows) for rows in seeds}) == 1:
                x, y = (np.mean([[r[k] for r in rows] for rows in seeds], 0) for k in (key, "knn"))
                axis.plot(x, y, marker=marker, ms=4, lw=2, color=colour, label=f"{name}, {len(seeds)} seed(s)")
    for axis, label in zip(axes, ("epochs", "seconds of the run, teacher included"), strict=True):
        line = f"threshold {threshold or 0:.1f} %"
        controls(axis, [(thumbnail, ":", "4x4 thumbnails"), (threshold, "--", line)])
        axis.set(xlabel=label)
    axes[0].set(ylabel="kNN Top-1 during the run, %")
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, path)


def snapshot_curve(path, points, others, title):
    """points [(epoch, Top-1 in percent)]; others {name: Top-1} as horizontal lines."""
    figure, axis = plt.subplots(figsize=(6.0, 3.8))
    axis.plot(*zip(*points, strict=True), "o-", color=BLUE, label="snapshots")
    controls(axis, [(value, style, name) for (name, value), style in zip(others.items(), ("--", ":"), strict=False)])
    axis.set(title=title, xlabel="epoch", ylabel="ridge probe Top-1, %")
    axis.legend(frameon=False, fontsize=9)
    save(figure, path)


# ---- stress --------------------------------------------------------------------------------------------------------


def robustness(path, report, sweeps, title):
    """Top-1 by level of every sweep, the clean level (dashed) and chance (dotted); single-level ones as bars."""
    curves = [name for name, levels in report["robustness"].items() if len(levels) > 1]
    figure, axes = plt.subplots(2, 4, figsize=(11.5, 5.2), sharey=True)
    figure.suptitle(title)
    for axis, name in zip(axes.flat, curves, strict=False):
        levels = report["robustness"][name]
        axis.plot(range(len(levels)), levels.values(), "o-", color=BLUE)
        axis.set_xticks(range(len(levels)), levels)
        axis.set(title=name, xlabel=sweeps[name][2])
    single = {n: next(iter(v.values())) for n, v in report["robustness"].items() if n not in curves}
    rest = list(axes.flat[len(curves) :])
    rest[0].bar(range(len(single)), single.values(), 0.55, color=BLUE)
    rest[0].set_xticks(range(len(single)), single)
    rest[0].set(title="without colour")
    sides = [r["side"] for r in report["resolution"]]
    rest[1].plot(sides, [r["top1"] for r in report["resolution"]], "o-", color=BLUE)
    rest[1].set(title="resolution", xlabel="side of the view, px", xscale="log")
    some = [s for i, s in enumerate(sides) if i == 0 or s > 1.3 * sides[i - 1]]
    rest[1].set_xticks(some, [str(s) for s in some])
    rest[1].minorticks_off()
    for axis in rest[2:]:
        axis.axis("off")
    for axis in [*axes.flat[: len(curves)], *rest[:2]]:
        controls(axis, [(report["clean"], "--", None), (report["chance"], ":", None)])
    for line in axes:
        line[0].set(ylabel="Top-1, % (dashed: clean)", ylim=(0, None))
    save(figure, path)


def parts(path, report, title):
    """Top-1 with each part painted gray, beside the same shape elsewhere."""
    names = list(report["parts"])
    figure, axis = plt.subplots(figsize=(7.2, 3.6))
    at = np.arange(len(names))
    for shift, key, colour, hatch in ((-0.2, "hidden", BLUE, ""), (0.2, "control", ORANGE, "//")):
        label = "the part is gray" if key == "hidden" else "the same shape elsewhere is gray"
        values = [report["parts"][n][key] for n in names]
        axis.bar(at + shift, values, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label)
    controls(axis, [(report["clean"], "--", "clean"), (report["chance"], ":", "chance")])
    axis.set_xticks(at, [f"{n}\n{100 * report['parts'][n]['area']:.1f} %" for n in names], fontsize=9)
    axis.set(title=title, xlabel="part, and its share of the picture", ylabel="Top-1, %", ylim=(0, None))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=9)
    save(figure, path)


def reconstruction(path, rows, title):
    """PSNR on hidden pixels by ratio, a line per strategy; dotted: the mean colour of what is seen, random masks."""
    names = list(dict.fromkeys(r["strategy"] for r in rows))
    figure, axes = plt.subplots(1, 2, figsize=(9.8, 4.2))
    figure.suptitle(title)
    for axis, key, label in zip(axes, ("psnr", "ssim"), ("PSNR on hidden pixels, dB", "SSIM there"), strict=True):
        for i, name in enumerate(names):
            own = [r for r in rows if r["strategy"] == name]
            style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "ls": "-" if i < 8 else "--", "ms": 5}
            axis.plot([r["ratio"] for r in own], [r[key] for r in own], label=name, **style)
        axis.set(xlabel="share of patches hidden", ylabel=label)
    plain = [r for r in rows if r["strategy"] == "random"]
    axes[0].plot([r["ratio"] for r in plain], [r["psnr_flat"] for r in plain], ":", color=INK, label="mean colour")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=9)
    save(figure, path)


# ---- recognition: the pictures of finetune_lora.py and recognize.py --------------------------------------------------

def training(path, rows, best, title):
    """Rows of log.jsonl -> loss, and Top-1 and macro-F1 on the pictures that choices are made on."""
    steps, held = [r for r in rows if "loss" in r], [r for r in rows if "dev_top1" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2))
    figure.suptitle(title)
    left.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], color=BLUE)
    left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    for key, label, colour in (("dev_top1", "Top-1", BLUE), ("dev_macro_f1", "macro-F1", ORANGE)):
        right.plot([r["epoch"] for r in held], [r[key] for r in held], color=colour, label=label)
    right.axvline(best, color=INK, ls=":", label=f"kept: epoch {best}")
    right.set(title="Held apart for choices", xlabel="epoch", ylabel="%", ylim=(0, 100))
    right.legend(frameon=False, fontsize=9, loc="lower left")
    save(figure, path)


def confused(path, pairs, title, each=5):
    """pairs: [(text of the true, of the predicted, pictures that were mistaken, pictures of the predicted)]."""
    figure, axes = plt.subplots(max(1, len(pairs)), 2 * each + 1, figsize=(10.5, 1.0 * max(1, len(pairs)) + 0.9),
                                squeeze=False, width_ratios=[1] * each + [0.6] + [1] * each)  # fmt: skip
    figure.suptitle(f"{title}\n")  # the texts over the first pictures need the empty line
    for axis in axes.flat:
        axis.axis("off")
    for line, (true, predicted, wrong, like) in zip(axes, pairs, strict=False):
        for axis, picture in [*zip(line[:each], wrong, strict=False), *zip(line[each + 1 :], like, strict=False)]:
            axis.imshow(picture, interpolation="antialiased")
        for axis, text in ((line[0], true), (line[each + 1], predicted)):  # wider than its picture: not in the layout
            axis.text(0, 1.04, text, transform=axis.transAxes, fontsize=8, va="bottom", in_layout=False)
    save(figure, path)


def plot_verification(path, pairs, strangers, title):
    """ROC and PR curves of (same character, different ones), the cosines of both; of (known, strangers) where given."""
    kinds = [("two faces: same character?", BLUE, pairs)]
    kinds += [] if strangers is None else [("one face: is it known?", ORANGE, strangers)]
    figure, axes = plt.subplots(1, 2 + len(kinds), figsize=(3.5 * (2 + len(kinds)), 3.5))
    figure.suptitle(title)
    for name, colour, (positive, negative) in kinds:
        false, true = metrics.roc(positive, negative)
        axes[0].plot(100 * false, 100 * true, color=colour, label=name)
        precision, recall = metrics.precision_recall(positive, negative)
        axes[1].plot(100 * recall, 100 * precision, color=colour)
    axes[0].set(title="ROC", xlabel="false positive rate, %", ylabel="true positive rate, %", xscale="log")
    axes[0].set(xlim=(0.01, 100), ylim=(0, 100))
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[1].set(title="Precision and recall", xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 101))
    words = (("same", "different"), ("known", "stranger"))
    for axis, (name, _, scores), of in zip(axes[2:], kinds, words, strict=False):
        for part, label, colour in zip(scores, of, (BLUE, ORANGE), strict=True):
            axis.hist(part.numpy(), np.linspace(-1, 1, 61), density=True, histtype="step", color=colour, label=label)
        axis.set(title=name.split(":")[0].capitalize(), xlabel="cosine", ylabel="density", xlim=(-1, 1))
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)
