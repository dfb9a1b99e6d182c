"""The diagram in README.md: the network, and one step of pre-training, drawn with a real picture.

    python -m lab.diagram

Reads:  weights/toon
Writes: results/figures/step-light.png, step-dark.png
"""

import torch
from matplotlib.patches import FancyBboxPatch

import mask as masking
from apps import masks
from common import evaluate, guidance, plots
from common.checkpoints import load_mae
from common.train import Parser, cli, seeded
from data import read_view
from ingest import toon
from kernels.patches import detail_weight, patch_detail
from lab.front import INKS, RATIO, RUN

WHO = "mimi"
SIZE = WIDTH, HEIGHT = 10, 4.35  # inches, as all places below
SIDE = 1.25  # of a picture
X = 0.15, 1.85, 3.55, 5.2, 6.85, 8.55  # of the columns
UPPER, LOWER = 2.55, 0.4  # of the two rows
FLAT = 0.1  # --flat-weight


def pictures_of(mae):
    """{what it shows: u8 (S, S, 3) or numbers (g, g)} of one drawing."""
    net, target = mae
    S, p, g = net.config["image_size"], net.config["patch_size"], net.encoder.side
    person = next(person for person in toon.cast() if person["name"] == WHO)
    view = read_view(toon.draw(toon.unseen(person, 3)[2])["image"], S)
    attention = {"attn": net.encoder.patch_attention(view, "pooler").mean(1)}
    ((_, cells),) = guidance.as_pictures(attention).items()
    K = masking.kept(g * g, RATIO)
    priority = masking.attn_high(
        attention, masking.gumbel_noise(1, g * g, seeded(1)), 1.0, g * g - K
    )
    ids_keep, ids_mask = masking.sample(priority, K)
    predicted, where = evaluate.filled_in(net, target, view, ids_keep, ids_mask)
    weight = torch.full((1, g * g), torch.nan)  # of seen patches: none
    weight.scatter_(1, ids_mask, detail_weight(patch_detail(view, ids_mask, p), FLAT))
    return {
        "view": view[0],
        "seen": evaluate.hide(view, ids_mask, p)[0],
        "tokens": torch.zeros(g * g).scatter(0, ids_keep[0], 1.0).view(g, g),
        "predicted": torch.where(where[..., None], predicted, evaluate.GRAY)[0],
        "weight": weight.view(g, g),
        "attention": masks.coloured(cells)[0],
    }


def draw(path, shown, config, ink, paper):
    figure = plots.plt.figure(figsize=SIZE, layout="none", facecolor=paper)
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

    def below(column, text):
        words(X[column] + SIDE / 2, LOWER - 0.05, text, va="top")

    picture(0, UPPER, "view", "a crop of a drawing")
    picture(1, UPPER, "seen", "a quarter of its\npatches is visible")
    size = f"{config['depth']} blocks,\n{config['dim']} wide"
    box(2, UPPER, "encoder", f"{size};\nreads only the\npatches it sees", plots.BLUE)
    two = plots.plt.matplotlib.colors.ListedColormap(["#9A9A9A", plots.BLUE])
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
    words(
        X[1] + SIDE / 2 + 0.1,
        middle,
        "attention and noise\nchoose what to hide",
        ha="left",
        va="center",
    )
    box(4, LOWER, "loss", "squared error of\nhidden patches,\na weighted mean", "#B5562A")
    picture(5, LOWER, "weight", "", cmap="viridis")
    below(5, "weight of hidden patches:\nflat colour counts less")
    foot = UPPER - 0.04
    line((X[0] + SIDE / 2, foot), (X[0] + SIDE / 2, LOWER + SIDE + 0.04))
    along(LOWER, 0, 1)
    line((X[1] + SIDE / 2, LOWER + SIDE + 0.04), (X[1] + SIDE / 2, foot))
    line((X[5] + SIDE / 2, foot), (X[5] + SIDE / 2, LOWER + SIDE + 0.04))
    line((X[5] - 0.03, LOWER + SIDE / 2), (X[4] + SIDE + 0.05, LOWER + SIDE / 2))
    up = X[4] + SIDE / 2
    line((up, LOWER + SIDE + 0.04), (up, foot), linestyle="--")
    back = {"connectionstyle": "arc3,rad=0.15", "linestyle": "--"}
    line((X[4], LOWER + SIDE - 0.1), (X[2] + SIDE - 0.2, foot), **back)
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
