"""What an encoder looks at and where its features lie: a little mathematics and the pictures of probe.py.

Imports lab.plot only; takes encoders, tensors and rows, writes a PNG.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import PowerNorm

from lab.plot import BLUE, GREEN, INK, ORANGE, PINK, save

COLOURS = (BLUE, ORANGE, GREEN, PINK, "#D55E00", "#56B4E9", "#000000", "#B59F00")
MARKERS = "os^DvPX*"

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
    figure, axes = plt.subplots(
        len(rows), len(names), figsize=(1.15 * len(names), 1.17 * len(rows) + 0.6), squeeze=False
    )
    figure.suptitle(title)
    for line, pictures in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="viridis", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
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
    lines, shown = (view[:shown].cpu().numpy(), colours[:shown]), min(shown, len(view))
    figure, axes = plt.subplots(2, shown, figsize=(1.15 * shown + 0.9, 3.1), squeeze=False)
    figure.suptitle(title)
    for line, name, pictures in zip(axes, ("picture", "tokens"), lines, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, path)


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
    spread = ((centres - mean)[own] @ white).T @ ((centres - mean)[own] @ white)
    found = torch.linalg.eigh(spread)[1][:, -2:].flip(1)
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
        if thumbnail is not None:
            axis.axhline(thumbnail, color=INK, ls=":", lw=1, label="4x4 thumbnails")
        if threshold is not None:
            axis.axhline(threshold, color=INK, ls="--", lw=1, label=f"threshold {threshold:.1f} %")
        axis.set(xlabel=label)
    axes[0].set(ylabel="kNN Top-1 during the run, %")
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, path)


def snapshot_curve(path, points, controls, title):
    """points [(epoch, Top-1 in percent)]; controls {name: Top-1} as horizontal lines."""
    figure, axis = plt.subplots(figsize=(6.0, 3.8))
    axis.plot(*zip(*points, strict=True), "o-", color=BLUE, label="snapshots")
    for (name, value), style in zip(controls.items(), ("--", ":"), strict=False):
        axis.axhline(value, color=INK, ls=style, lw=1, label=name)
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
        axis.axhline(report["clean"], color=INK, ls="--", lw=1)
        axis.axhline(report["chance"], color=INK, ls=":", lw=1)
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
    axis.axhline(report["clean"], color=INK, ls="--", lw=1, label="clean")
    axis.axhline(report["chance"], color=INK, ls=":", lw=1, label="chance")
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
