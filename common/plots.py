"""How every picture of the project looks, and those of a run: PNG, 150 dots per inch.

Colours are Okabe and Ito's, which the colour-blind can tell apart. Maps are drawn in viridis.
"""

import contextlib
import os
import re
import sys
import warnings
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # first: the shell's may be a name that matplotlib refuses

import matplotlib.pyplot as plt
import torch
from matplotlib import font_manager
from matplotlib.colors import PowerNorm
from matplotlib.patches import Patch

from common.train import atomic

BLUE, ORANGE, GREEN, PINK, INK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#333333"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#D55E00", "#56B4E9", "#000000", "#B59F00")
# fonts with Japanese, Chinese and Korean letters, as systems install them: for names of characters
CJK = ("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "MS Gothic", "IPAexGothic")
CJK += ("PingFang SC", "Microsoft YaHei", "Apple SD Gothic Neo", "Malgun Gothic")
INSTALLED = font_manager.get_font_names()
REMEDY = "the font Noto Sans CJK has those of Chinese, Japanese and Korean"
MOST_COUNTED = 24, 999  # classes, and pictures in a cell: more numbers could not be read
plt.rcdefaults()  # a matplotlibrc beside the run is read before, and may ask for LaTeX
plt.rcParams |= {
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans", *(name for name in CJK if name in INSTALLED)],
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "text.color": INK,
    "text.parse_math": False,  # names are text: $ begins no formula
}


def save(figure, path):
    """Write the figure atomically. A letter that no font has becomes a box, and one line says so."""
    with atomic(path) as temporary, warnings.catch_warnings(record=True) as caught:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    plt.close(figure)
    # a warning for each letter: Glyph 127807 (\N{HERB}) missing from font(s) DejaVu Sans.
    codes = [re.match(r"Glyph (\d+) .*missing from", str(w.message)) for w in caught]
    letters = "".join(dict.fromkeys(chr(int(code[1])) for code in codes if code))
    if letters:
        problem = f"no font here has {letters[:20]}, which are boxes; {REMEDY}"
        print(f"note: {Path(path).name}: {problem}", file=sys.stderr)


def readable(names, path):
    """-> the names as a figure can show them: one that no font here can draw is its place, #1, #2, ...

    A line says which is which. path: of the figure.
    """
    families = plt.rcParams["font.family"]
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in families]
    shown, numbered = [], []
    for i, name in enumerate(names, 1):
        drawn = all(any(font.get_char_index(ord(c)) for font in fonts) for c in name if c != "\n")
        shown.append(name if drawn else f"#{i}")
        if not drawn:
            numbered.append(f"#{i} {name}")
    if numbered:
        problem = "no font here has all letters of these names, so numbers stand for them: "
        print(f"note: {Path(path).name}: {problem}{', '.join(numbered)}; {REMEDY}", file=sys.stderr)
    return shown


@contextlib.contextmanager
def panels(path, title, rows, columns, size, **options):
    """with panels(...) as axes: draw on them. Then the figure of size (width, height) inches is saved."""
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    figure.suptitle(title)
    yield axes
    save(figure, path)


def plot_rows(axis, rows, x, y, *style, **options):
    """A line through those of the rows (dicts) that have y."""
    rows = [r for r in rows if y in r]
    if rows:
        axis.plot([r[x] for r in rows], [r[y] for r in rows], *style, **options)


# ---- rows of pictures ----------------------------------------------------------------------------


def show_rows(axes, rows):
    """rows [(name, pictures u8 (S, S, 3) or maps (g, g))]: a row of axes for each.

    Each map has its own scale; dark is low.
    """
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for line, (name, pictures) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture.cpu().numpy() if torch.is_tensor(picture) else picture)


def show(rows, titles=None, legend=None):
    """A figure of a notebook. rows {name: pictures or maps}, as many in each row.

    titles {name of a row: what stands over each of its pictures}; legend {name: colour}.
    """
    n = len(next(iter(rows.values())))
    size = (1.75 * n + 1, 1.75 * len(rows))
    figure, axes = plt.subplots(len(rows), n, figsize=size, dpi=72, squeeze=False)
    with plt.rc_context({"image.interpolation": "nearest"}):  # a pixel is a square, not a blur
        show_rows(axes, rows.items())
    for axis in axes.flat:  # a frame, because a light picture would run into the page
        axis.spines[:].set(visible=True, color="silver")
    for line, name in zip(axes, rows, strict=True):
        for axis, title in zip(line, (titles or {}).get(name, []), strict=False):
            axis.set_title(title, fontsize=10)
    if legend:
        patches = [Patch(color=colour, label=name) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    plt.show()


def image_grid(path, title, rows, columns=()):
    """rows as in show_rows, all of one length; columns: names over them."""
    names = readable([name for name, _ in rows], path)
    rows = [(name, pictures) for name, (_, pictures) in zip(names, rows, strict=True)]
    n = len(rows[0][1])
    letters = max(len(line) for name, _ in rows for line in name.split("\n"))  # of the longest line
    size = (1.15 * n + 0.09 * letters, 1.15 * len(rows) + (0.7 if columns else 0.5))
    with panels(path, title, len(rows), n, size, squeeze=False) as axes:
        show_rows(axes, rows)
        for axis, name in zip(axes[0], columns, strict=False):
            axis.set_title(name, fontsize=9)


# ---- pre-training --------------------------------------------------------------------------------


def curves(path, rows, split, title):
    """Rows of log.jsonl of pretrain.py -> loss, masked error, Top-1 and attention, by epoch."""
    held = [r for r in rows if "val_mse" in r]
    optional = {"knn": recognition, "attention_on": attention_on}
    more = [draw for key, draw in optional.items() if any(key in r for r in held)]
    lines = 1 + (len(more) + 1) // 2  # of two panels each
    with panels(path, title, lines, 2, (8, 0.3 + 3.2 * lines), squeeze=False) as grid:
        axes = grid.flat
        plot_rows(axes[0], rows, "epoch", "loss", color=BLUE)
        axes[0].set(title="Training loss", xlabel="epoch", ylabel="weighted masked error")
        plot_rows(axes[1], held, "epoch", "val_mse", "o-", color=BLUE)
        axes[1].set(title=f"Masked error on {split}", xlabel="epoch")
        axes[1].set(ylabel="mean squared error, fixed mask")
        for draw, axis in zip(more, axes[2:], strict=False):
            draw(axis, held)
        for axis in axes[2 + len(more) :]:
            axis.remove()


def legend_below(axis, columns):
    """A legend under the label of the x axis, where it covers no curve, whatever the data."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns)


def attention_on(axis, held):
    """How much more attention each part gets than its area, by epoch, where the data has parts."""
    ratios = [{"epoch": r["epoch"]} | r.get("attention_on", {}) for r in held]
    styles = {"eyes": ("o-", BLUE), "mouth": ("s-", PINK), "hair": ("^-", ORANGE)}
    styles |= {"face": ("v--", GREEN), "background": ("x:", INK)}
    for name, (mark, colour) in styles.items():
        plot_rows(axis, ratios, "epoch", name, mark, color=colour, label=name, markersize=4)
    axis.axhline(1, color=INK, lw=0.8)
    axis.set(title="What the teacher attends to", xlabel="epoch", ylabel="attention / area, shares")
    legend_below(axis, 3)


def recognition(axis, held):
    """Top-1 of kNN and of a linear probe (ridge regression) by epoch, each with what a thumbnail has."""
    for key, mark, colour, name in (("linear", "s-", GREEN, "ridge"), ("knn", "o-", BLUE, "kNN")):
        plot_rows(axis, held, "epoch", key, mark, color=colour, label=name, markersize=5)
        # It is in the row of step 0, which may have been moved away.
        control = held[0].get(f"{key}_thumbnail")
        if control is not None:
            axis.axhline(control, color=colour, ls=":", label=f"4x4 thumbnails, {name}")
    axis.set(title="Recognition", xlabel="epoch", ylabel="Top-1, %")
    axis.set_ylim(bottom=0)
    legend_below(axis, 2)


# ---- fine-tuning ---------------------------------------------------------------------------------


def tuning_curves(path, rows, best, title, held="Dev"):
    """Rows of log.jsonl of finetune_lora.py -> the loss; Top-1 and macro-F1 by epoch.

    held: the pictures of which these are.
    """
    with panels(path, title, 1, 2, (8.4, 3.2)) as (left, right):
        plot_rows(left, rows, "epoch", "loss", color=BLUE)
        left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
        plot_rows(right, rows, "epoch", "dev_top1", color=BLUE, label="Top-1")
        plot_rows(right, rows, "epoch", "dev_macro_f1", color=ORANGE, label="macro-F1")
        right.axvline(best, color=INK, ls=":", label=f"kept: epoch {best}")
        right.set(title=held, xlabel="epoch", ylabel="%", ylim=(0, 100))
        right.legend(loc="lower left")


def confusion(path, table, names, title):
    """Counts (C, C), rows the true class, columns the predicted one: colours are percent of each row.

    Where there is room, the counts stand in the cells: of few pictures a percentage says little.
    """
    names = readable(names, path)
    classes, most = MOST_COUNTED
    table = torch.tensor(table).double()
    percents = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    with panels(path, title, 1, 1, (7.2, 6.4)) as axis:
        # The square root of a share decides its colour, because rare mistakes should be seen.
        image = axis.imshow(percents.numpy(), norm=PowerNorm(0.5, 0, 100))
        axis.figure.colorbar(image, label="% of the true class")
        axis.set(xlabel="predicted class", ylabel="true class")
        if len(names) <= classes and table.max() <= most:
            axis.set_xlabel("predicted class; a number counts pictures")
            for row, column in table.nonzero().tolist():
                colour = "black" if percents[row, column] > 40 else "white"  # on bright, on dark
                style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
                axis.text(column, row, f"{table[row, column]:.0f}", **style)
        if len(names) <= 50:
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axis.set_yticks(range(len(names)), names, fontsize=6)
