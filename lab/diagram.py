"""The diagram in README.md: the network, and one step of pre-training, drawn with a real picture.

    python -m lab.diagram

Reads:  weights/toon
Writes: results/figures/step-light.png, step-dark.png
"""

import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch

import mask as masking
from common import evaluate, plots
from common.checkpoints import load_mae
from common.train import Parser, cli
from kernels.patches import detail_weight, patch_detail
from lab.front import INKS, RUN, drawing_of, hidden_by

WHO = "mimi", 2  # a character, and which of its drawings that no data set has
WIDTH, HEIGHT = 10, 4.35  # inches, as all places below
SIDE = 1.25  # of a picture
X = 0.15, 1.85, 3.55, 5.2, 6.85, 8.55  # of the columns
UPPER, LOWER = 2.55, 0.4  # of the two rows
FLAT = 0.1  # the default of --flat-weight


def pictures_of(mae):
    """{what it shows: u8 (S, S, 3) or numbers (g, g)} of one drawing."""
    net, target = mae
    p, g = net.config["patch_size"], net.encoder.side
    view, attention, cells = drawing_of(net, *WHO)
    ids_keep, ids_mask = hidden_by(masking.attn_high, attention)
    predicted, where = evaluate.filled_in(net, target, view, ids_keep, ids_mask)
    weight = torch.full((1, g * g), torch.nan)  # of seen patches: none
    weight.scatter_(1, ids_mask, detail_weight(patch_detail(view, ids_mask, p), FLAT))
    return {
        "view": view[0],
        "seen": evaluate.hide(view, ids_mask, p)[0],
        "tokens": torch.zeros(g * g).scatter(0, ids_keep[0], 1.0).view(g, g),
        "predicted": torch.where(where[..., None], predicted, evaluate.GRAY)[0],
        "weight": weight.view(g, g),
        "attention": cells,
    }


def draw(path, shown, config, ink, paper):
    figure = plots.plt.figure(figsize=(WIDTH, HEIGHT), layout="none", facecolor=paper)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    page.axis("off")
    arrow = {"arrowstyle": "-|>", "color": ink, "lw": 1.2}

    def words(x, y, text, **style):
        style = {"ha": "center", "va": "bottom", "fontsize": 9, "color": ink} | style
        page.text(x, y, text, **style)

    def picture(column, row, name, text, **style):
        x = X[column]
        axis = figure.add_axes((x / WIDTH, row / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT))
        axis.imshow(shown[name], **style)
        axis.axis("off")
        words(x + SIDE / 2, row + SIDE + 0.06, text)

    def box(column, row, title, text, colour):
        x = X[column]
        style = {"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.02"}
        page.add_patch(FancyBboxPatch((x, row), SIDE, SIDE, **style))
        middle = x + SIDE / 2
        words(middle, row + 0.9, title, color="white", weight="bold", fontsize=10)
        words(middle, row + 0.82, text, color="white", va="top", fontsize=8)

    def line(start, end, **style):
        page.annotate("", end, start, arrowprops=arrow | style)

    def along(row, first, last):
        line((X[first] + SIDE + 0.03, row + SIDE / 2), (X[last] - 0.03, row + SIDE / 2))

    def between(column, down, **style):
        x = X[column] + SIDE / 2
        ends = (x, UPPER - 0.04), (x, LOWER + SIDE + 0.04)
        line(*(ends if down else ends[::-1]), **style)

    def below(column, text):
        words(X[column] + SIDE / 2, LOWER - 0.05, text, va="top")

    picture(0, UPPER, "view", "a crop of a drawing")
    picture(1, UPPER, "seen", "a quarter of its\npatches is visible")
    size = f"{config['depth']} blocks,\n{config['dim']} wide"
    box(2, UPPER, "encoder", f"{size};\nreads only the\npatches it sees", plots.BLUE)
    two = ListedColormap(["#9A9A9A", plots.BLUE])
    picture(3, UPPER, "tokens", "its tokens, and mask\ntokens in their places", cmap=two)
    size = f"{config['decoder_depth']} blocks,\n{config['decoder_dim']} wide"
    box(4, UPPER, "decoder", f"{size};\ndiscarded after\npre-training", plots.BLUE)
    picture(5, UPPER, "predicted", "what it predicts")
    for first in range(5):
        along(UPPER, first, first + 1)

    box(0, LOWER, "teacher", "a slowly updated\ncopy of the\nencoder", "#8A5A9E")
    picture(1, LOWER, "attention", "")
    below(1, "its attention")
    middle = (UPPER + LOWER + SIDE) / 2
    left = {"ha": "left", "va": "center"}
    words(X[1] + SIDE / 2 + 0.1, middle, "attention and noise\nchoose what to hide", **left)
    box(4, LOWER, "loss", "squared error of\nhidden patches,\na weighted mean", "#B5562A")
    picture(5, LOWER, "weight", "", cmap="viridis")
    below(5, "weight of hidden patches:\nflat colour counts less")
    between(0, down=True)
    along(LOWER, 0, 1)
    between(1, down=False)
    between(5, down=True)
    line((X[5] - 0.03, LOWER + SIDE / 2), (X[4] + SIDE + 0.05, LOWER + SIDE / 2))
    between(4, down=False, linestyle="--")
    back = {"connectionstyle": "arc3,rad=0.15", "linestyle": "--"}
    line((X[4], LOWER + SIDE - 0.1), (X[2] + SIDE - 0.2, UPPER - 0.04), **back)
    words(X[3] + 1.15, middle + 0.08, "gradients", fontsize=8, style="italic")
    plots.save(figure, path)


@torch.no_grad()
def main():
    Parser(__doc__).parse_args()
    mae = load_mae(RUN)
    shown = pictures_of(mae)
    for name, (ink, paper) in INKS.items():
        with plots.plt.rc_context({"savefig.facecolor": paper}):
            draw(f"results/figures/step-{name}.png", shown, mae[0].config, ink, paper)


if __name__ == "__main__":
    cli(main)
