"""Every picture of the project but the study's: takes arrays and rows, writes a PNG (150 dots per inch).

Colours are Okabe and Ito's, which the colour-blind can tell apart; maps are drawn in viridis.
"""

import contextlib
import os
import sys
import warnings
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # first: the shell's may be a name that matplotlib refuses

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.colors import PowerNorm

from common import metrics
from common.io import atomic

BLUE, ORANGE, GREEN, PINK, INK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#333333"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#D55E00", "#56B4E9", "#000000", "#B59F00")
MARKERS = "os^DvPX*"
plt.rcParams |= {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
plt.rcParams |= {
    "text.color": INK,
    "axes.labelcolor": INK,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
plt.rcParams |= {"legend.frameon": False, "legend.fontsize": 9}
plt.rcParams["text.parse_math"] = False  # names are text: $ begins no formula
# names of characters in Japanese, Chinese, Korean: what systems bring for them, where it is
# installed
CJK = ("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "MS Gothic", "IPAexGothic")
plt.rcParams["font.family"] = [
    "DejaVu Sans",
    *(name for name in CJK if name in font_manager.get_font_names()),
]


def save(figure, path):
    """Whole or not at all, as every file here; letters that no font here has are boxes, and one
    line says so.
    """
    with atomic(path) as temporary, warnings.catch_warnings(record=True) as told:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    boxes = [w for w in told if "missing from" in str(w.message)]  # a warning for each letter
    for other in (w for w in told if w not in boxes):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if boxes:
        print(
            f"note: no font here has all letters of {path}: some are boxes; Noto Sans CJK has them",
            file=sys.stderr,
        )
    plt.close(figure)


@contextlib.contextmanager
def panels(path, title, rows, columns, size, **options):
    """with panels(...) as axes: draw on them; the figure of size (width, height) in inches is saved
    at the end.
    """
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    figure.suptitle(title)
    yield axes
    save(figure, path)


def plot_rows(axis, rows, x, y, *style, **options):
    """A line through those of the rows (dicts) that have y."""
    rows = [r for r in rows if y in r]
    if rows:
        axis.plot([r[x] for r in rows], [r[y] for r in rows], *style, **options)


def controls(axis, lines):
    """Horizontal lines to compare with: [(value, style, label)]; those without a value are left
    out.
    """
    for value, style, label in lines:
        if value is not None:
            axis.axhline(value, color=INK, ls=style, lw=1, label=label)


def percent(axis, along="y", low=None):
    """Call it when all is drawn: an axis of percentages ends at 0 and 100, whatever its margins;
    low: begins there.
    """
    bottom, top = getattr(axis, f"get_{along}lim")()
    getattr(axis, f"set_{along}lim")(max(bottom, 0) if low is None else low, min(top, 100))


def shared_legend(axis, place="outside right", **options):
    """One legend beside all panels: of what this one shows."""
    axis.figure.legend(*axis.get_legend_handles_labels(), loc=place, **options)


# ---- lines of pictures ---------------------------------------------------------------------------


def show_rows(axes, rows):
    """rows [(name, pictures u8 (S, S, 3) or maps (g, g))]: a line of axes for each; a None leaves
    its place empty.

    Each map has its own scale; dark is low.
    """
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for line, (name, pictures) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, picture in zip(line, pictures, strict=False):
            if picture is not None:
                axis.imshow(picture.cpu().numpy() if torch.is_tensor(picture) else picture)


def image_grid(path, title, rows, columns=()):
    """rows as in show_rows, all of one length; columns: names over them."""
    n, names = len(rows[0][1]), bool(rows[0][0])
    size = (1.15 * n + names, 1.15 * len(rows) + (0.7 if columns else 0.5))
    with panels(path, title, len(rows), n, size, squeeze=False) as axes:
        show_rows(axes, rows)
        for axis, name in zip(axes[0], columns, strict=False):
            axis.set_title(name, fontsize=9)


@torch.no_grad()
def attention_sheet(path, encoder, view, title):
    """A line for each picture of view u8 (B, S, S, 3): each head of the last block, their mean, the
    rollout.
    """
    heads, flow = encoder.patch_attention(view), encoder.patch_attention(view, "rollout")[:, 0]
    maps = torch.cat([heads, heads.mean(1, keepdim=True), flow[:, None]], 1).unflatten(
        2, (encoder.side, -1)
    )
    names = ["picture", *[f"head {i + 1}" for i in range(heads.shape[1])], "mean", "rollout"]
    image_grid(
        path, title, [("", [picture, *own]) for picture, own in zip(view, maps, strict=True)], names
    )


@torch.no_grad()
def patch_sheet(path, encoder, view, title, shown=8):
    """The first pictures of view u8 (B, S, S, 3) and their tokens as colours: alike colours are
    alike tokens.

    Red, green and blue are three principal components of all tokens of view, each from its 1 % to
    its 99 % quantile. What tokens at one place share over all pictures is taken off first: else the
    components show the place alone.
    """
    tokens = encoder.features(view)[:, 1:].cpu().double()  # (B, N, D); Metal has no float64
    x = principal((tokens - tokens.mean(0)).flatten(0, 1), 3)
    low, high = np.quantile(x, (0.01, 0.99), axis=0)
    colours = (
        ((x - low) / np.maximum(high - low, 1e-12))
        .clip(0, 1)
        .reshape(len(view), encoder.side, encoder.side, 3)
    )
    image_grid(path, title, [("picture", view[:shown]), ("tokens", colours[:shown])])


def neighbours(path, queries, bank, same, title):
    """Each query and its 8 nearest of the bank by cosine.

    queries, bank: (features (n, D), pictures u8 (n, S, S, 3)); same (Q, n) bool: of one class. A
    neighbour of the same class has a green frame, another an orange, dashed one; without classes
    (None) the frames are gray.
    """
    unit = [F.normalize(x.float(), dim=1) for x, _ in (queries, bank)]
    similarity, nearest = (unit[0] @ unit[1].T).topk(8, dim=1)
    size = (10.2, 1.32 * len(nearest) + 0.6)
    with panels(path, title, len(nearest), 9, size, squeeze=False) as axes:
        rows = zip(queries[1], nearest.numpy(), strict=True)
        show_rows(axes, [("", [query, *bank[1][found]]) for query, found in rows])
        axes[0, 0].set_title("query", fontsize=9)
        for i, j in np.ndindex(*nearest.shape):
            axis = axes[i, j + 1]
            colour, style, width = "#BBBBBB", "-", 1
            if same is not None:
                right = bool(same[i, nearest[i, j]])
                colour, style, width = (GREEN, "-", 3) if right else (ORANGE, "--", 3)
            axis.spines[:].set(visible=True, color=colour, linestyle=style, linewidth=width)
            axis.set_xlabel(f"{similarity[i, j]:.2f}", fontsize=8, labelpad=2)


def confused(path, pairs, title, each=5):
    """pairs: [(text of the true, of the predicted, pictures that were mistaken, pictures of the
    predicted)].
    """
    n, widths = max(1, len(pairs)), [1] * each + [0.6] + [1] * each  # a gap between the two
    rows = [("", [*wrong, *[None] * (each + 1 - len(wrong)), *like]) for _, _, wrong, like in pairs]
    size = (10.5, 1.0 * n + 0.9)
    with panels(
        path, f"{title}\n", n, 2 * each + 1, size, squeeze=False, width_ratios=widths
    ) as axes:
        show_rows(axes, rows or [("", [])])
        for line, texts in zip(axes[:, [0, each + 1]], pairs, strict=False):
            for axis, text in zip(
                line, texts[:2], strict=True
            ):  # wider than its picture: not in the layout
                axis.text(
                    0,
                    1.04,
                    text,
                    transform=axis.transAxes,
                    fontsize=8,
                    va="bottom",
                    in_layout=False,
                )


# ---- a sheet of maps and masks -------------------------------------------------------------------


def mask_sheet(path, title, images, maps, columns, width=1100):
    """What each strategy hides: a block of rows for each ratio, a row for each image, a column for
    each strategy.

    images u8 (n, S, S, 3); maps [(name, (n, g, g))]: whole numbers (u8 or i64) of at most 12 kinds
    are drawn as parts, the rest in viridis; columns [(name, {ratio: (n, g, g) bool, True where
    hidden})]. width: of all columns, in pixels.
    """
    images, ratios = np.asarray(images), list(columns[0][1])
    names = ["image", *(name for name, _ in maps), *(name for name, _ in columns)]
    n, S = images.shape[:2]
    side = (
        min(max(S, 64), width // len(names) - 4) + 4
    )  # of a picture and the gap beside it, in pixels; names need 64
    gap = ((0, 0), *[(0, round(4 * S / (side - 4)))] * 2, (0, 0))
    dark = np.uint8(0.16 * images.mean(3, keepdims=True) + 38)  # a hidden patch
    beside = [images, *(enlarged(coloured(torch.as_tensor(m)), S) for _, m in maps)]
    size = (side * len(names) / 150 + 0.5, (side * n / 150 + 0.3) * len(ratios) + 0.8)
    with panels(path, title, len(ratios), 1, size, squeeze=False) as axes:
        for axis, ratio in zip(axes[:, 0], ratios, strict=True):
            masked = [
                np.where(enlarged(hidden[ratio], S)[..., None], dark, images)
                for _, hidden in columns
            ]
            axis.imshow(
                np.hstack([np.vstack(np.pad(c, gap, constant_values=255)) for c in beside + masked])
            )
            axis.set(yticks=[], xticks=[], ylabel=f"{ratio:.0%} hidden")
            axis.spines[:].set_visible(False)
        top = axes[0, 0]
        top.xaxis.tick_top()
        top.set_xticks(
            (np.arange(len(names)) + 0.5) * top.get_xlim()[1] / len(names), names, fontsize=6.5
        )
        top.tick_params(length=0)


def coloured(maps):
    """maps (n, g, g) -> u8 (n, g, g, 3): parts by number, the rest in viridis (floats from 0 to
    their maximum).
    """
    if not maps.is_floating_point() and maps.max() <= 12:
        kinds = plt.get_cmap("tab20")(np.arange(12) * 2 % 20 + np.arange(12) // 10)[:, :3]
        return np.uint8(255 * np.vstack([[[0.93] * 3], kinds])[maps.numpy()])
    top = (
        maps.float().amax((1, 2), keepdim=True).clamp(min=1e-9) if maps.is_floating_point() else 255
    )
    return np.uint8(255 * plt.get_cmap("viridis")((maps / top).float().numpy())[..., :3])


def enlarged(maps, side):
    """maps (n, g, g, ...) -> (n, side, side, ...): a patch becomes a square of pixels."""
    place = np.arange(side) * maps.shape[1] // side
    return np.asarray(maps)[:, place][:, :, place]


# ---- training ------------------------------------------------------------------------------------


def curves(path, rows, split, title):
    """Rows of log.jsonl -> training loss, validation error, Top-1 (with its controls) and
    attention, by epoch.
    """
    held = [r for r in rows if "val_mse" in r]
    optional = {"knn": recognition, "attention_on": attention_on}
    more = [draw for key, draw in optional.items() if any(key in r for r in held)]
    with panels(path, title, 1, 2 + len(more), (3.4 * (2 + len(more)), 3.2)) as axes:
        plot_rows(axes[0], rows, "epoch", "loss", color=BLUE)
        axes[0].set(title="Training loss", xlabel="epoch", ylabel="weighted masked error")
        plot_rows(axes[1], held, "epoch", "val_mse", "o-", color=BLUE)
        axes[1].set(
            title=f"Masked error on {split}",
            xlabel="epoch",
            ylabel="mean squared error, fixed mask",
        )
        for draw, axis in zip(more, axes[2:], strict=True):
            draw(axis, held)


def attention_on(axis, held):
    """How much more attention each part gets than its area, by epoch; only where the data knows the
    parts.
    """
    shares = [{"epoch": r["epoch"]} | r.get("attention_on", {}) for r in held]
    styles = {
        "eyes": ("o-", BLUE),
        "mouth": ("s-", PINK),
        "hair": ("^-", ORANGE),
        "face": ("v--", GREEN),
    }
    for name, (mark, colour) in (styles | {"background": ("x:", INK)}).items():
        plot_rows(axis, shares, "epoch", name, mark, color=colour, label=name, markersize=4)
    axis.axhline(1, color=INK, lw=0.8)
    axis.set(title="Where the teacher looks", xlabel="epoch", ylabel="attention / area, shares")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def recognition(axis, held):
    """Top-1 of the kNN and of the linear probe by epoch, each with what a thumbnail has."""
    for key, mark, colour, name in (("linear", "s-", GREEN, "linear"), ("knn", "o-", BLUE, "kNN")):
        if key in held[0]:
            plot_rows(axis, held, "epoch", key, mark, color=colour, label=name, markersize=5)
            axis.axhline(
                held[0][f"{key}_thumbnail"], color=colour, ls=":", label=f"4x4 thumbnails, {name}"
            )
    axis.set(title="Recognition", xlabel="epoch", ylabel="Top-1, %")
    percent(axis, low=0)
    axis.legend()


def training(path, rows, best, title):
    """Rows of log.jsonl of finetune_lora.py -> loss; Top-1 and macro-F1 on the pictures that
    choices are made on.
    """
    with panels(path, title, 1, 2, (8.4, 3.2)) as (left, right):
        plot_rows(left, rows, "epoch", "loss", color=BLUE)
        left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
        plot_rows(right, rows, "epoch", "dev_top1", color=BLUE, label="Top-1")
        plot_rows(right, rows, "epoch", "dev_macro_f1", color=ORANGE, label="macro-F1")
        right.axvline(best, color=INK, ls=":", label=f"kept: epoch {best}")
        right.set(title="Held apart for choices", xlabel="epoch", ylabel="%", ylim=(0, 100))
        right.legend(loc="lower left")


def learning_curves(path, groups, thumbnail, threshold, title):
    """groups {name: [rows of a seed's log]}: kNN by epoch and by seconds; thin lines: seeds, thick:
    their mean.
    """
    limits = [
        (thumbnail, ":", "4x4 thumbnails"),
        (threshold, "--", f"threshold {threshold or 0:.1f} %"),
    ]
    names = {"epoch": "epochs", "seconds": "seconds of the run, teacher included"}
    with panels(path, title, 1, 2, (9.6, 3.9), sharey=True) as axes:
        for axis, (key, label) in zip(axes, names.items(), strict=True):
            for colour, marker, (name, seeds) in zip(
                COLOURS, MARKERS, groups.items(), strict=False
            ):
                for rows in seeds:
                    plot_rows(axis, rows, key, "knn", color=colour, lw=0.8, alpha=0.5)
                if len({len(rows) for rows in seeds}) == 1:
                    x, y = (
                        np.mean([[r[k] for r in rows] for rows in seeds], 0) for k in (key, "knn")
                    )
                    axis.plot(
                        x,
                        y,
                        marker=marker,
                        ms=4,
                        lw=2,
                        color=colour,
                        label=f"{name}, {len(seeds)} seed(s)",
                    )
            controls(axis, limits)
            axis.set(xlabel=label)
        percent(axes[0])  # both share it
        axes[0].set(ylabel="kNN Top-1 during the run, %")
        axes[0].legend(loc="lower right")


# ---- where classes lie ---------------------------------------------------------------------------


def principal(x, k):
    """x (n, D) -> numpy (n, k): its k principal components, each turned so that its largest loading
    is positive.
    """
    from sklearn.decomposition import PCA

    return PCA(k, svd_solver="covariance_eigh").fit_transform(x.double().numpy())


def confusion(path, table, names, title):
    """table (C, C): rows the true class, columns the one found, shares of the row in percent."""
    table = np.asarray(table, float)
    share = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    with panels(path, title, 1, 1, (7.2, 6.4)) as axis:
        image = axis.imshow(
            share, cmap="viridis", norm=PowerNorm(0.5, 0, 100)
        )  # mistakes are a few per cent each
        axis.figure.colorbar(
            image, label="% of the true class", shrink=0.85, ticks=[0, 2, 10, 25, 50, 100]
        )
        labels = [str(n)[:12] for n in names] if len(names) <= 50 else []
        size = max(5, min(10, 260 / len(names)))
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
        axis.set_yticks(range(len(labels)), labels, fontsize=size)
        axis.set(xlabel="class found", ylabel="true class")


# ---- verification --------------------------------------------------------------------------------


def plot_verification(path, pairs, strangers, title, reliable=()):
    """ROC and PR curves of (same character, different ones) and (known, strangers), and their
    scores; None: without.

    reliable: points of metrics.calibration_error, in a panel of their own.
    """
    from sklearn.metrics import precision_recall_curve

    kinds = [
        ("two faces: same character?", BLUE, pairs, ("same", "different"), "similarity"),
        ("one face: is it known?", ORANGE, strangers, ("known", "stranger"), "margin"),
    ]
    kinds = [kind for kind in kinds if kind[2]]
    n = 2 + len(kinds) + bool(reliable)
    with panels(path, title, 1, n, (3.5 * n, 3.5)) as axes:
        if reliable:
            said, true, weight = (100 * np.array(x) for x in zip(*reliable, strict=True))
            axes[-1].plot((0, 100), (0, 100), color=INK, ls=":")
            axes[-1].plot(said, true, color=BLUE)
            axes[-1].scatter(said, true, 8 + 4 * weight, color=BLUE)
            axes[-1].set(
                title="Is the confidence right?", xlabel="confidence, %", ylabel="named rightly, %"
            )
        for (name, colour, scores, words, what), axis in zip(
            kinds, axes[2 : 2 + len(kinds)], strict=True
        ):
            false, true = metrics.roc(*scores)
            axes[0].plot(100 * false, 100 * true, color=colour, label=name)
            precision, recall, _ = precision_recall_curve(*metrics.truth_and_scores(*scores))
            axes[1].plot(100 * recall, 100 * precision, color=colour)
            for own, label, shade in zip(scores, words, (BLUE, ORANGE), strict=True):
                axis.hist(
                    own.numpy(),
                    np.linspace(-1, 1, 61),
                    density=True,
                    histtype="step",
                    color=shade,
                    label=label,
                )
            axis.set(
                title=name.split(":")[0].capitalize(), xlabel=what, ylabel="density", xlim=(-1, 1)
            )
            axis.legend(fontsize=8)
        axes[0].set(
            title="ROC",
            xlabel="false positive rate, %",
            ylabel="true positive rate, %",
            xscale="log",
        )
        axes[0].xaxis.set_major_formatter("{x:g}")  # the one of a log axis writes formulas
        axes[0].set(xlim=(0.01, 100), ylim=(0, 100))
        axes[0].legend(fontsize=8, loc="upper left")
        axes[1].set(title="Precision and recall", xlabel="recall, %", ylabel="precision, %")
        axes[1].set(xlim=(0, 100), ylim=(0, 100))
