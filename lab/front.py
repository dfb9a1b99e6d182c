"""The picture at the top of README.md: two drawings, each under two masks, and what a network predicts.

    python -m lab.front

Reads:  weights/toon
Writes: results/figures/front-light.png and front-dark.png
"""

import torch

import mask as masking
from apps import masks
from common import evaluate, guidance, plots
from common.checkpoints import load_mae
from common.train import Parser, cli, seeded
from data import read_view
from ingest import toon

RUN = "weights/toon"
SHOWN = {"yukiko": 1, "mimi": 2}  # a character, and which of its drawings that no data set has
RATIO = 0.75
COLUMNS = (
    "a new drawing",
    "three quarters are\nhidden by chance",
    "the network\npredicts",
    "what a teacher\nattends to",
    "hidden more often\nwhere it attends",
    "the network\npredicts",
)
SIZE = 9, 3.5  # inches
INKS = {"light": (plots.INK, "white"), "dark": ("#E6EDF3", "#0D1117")}  # the two pages of GitHub


def row_of(mae, person, which):
    """A drawing, and under both masks what is visible and what is predicted: six pictures."""
    net, target = mae
    S, p, g = net.config["image_size"], net.config["patch_size"], net.encoder.side
    view = read_view(toon.draw(toon.unseen(person, which + 1)[which])["image"], S)
    attention = {"attn": net.encoder.patch_attention(view, "pooler").mean(1)}
    ((_, cells),) = guidance.as_pictures(attention).items()
    K = masking.kept(g * g, RATIO)
    noise = masking.gumbel_noise(1, g * g, seeded(1))
    row = [view[0]]
    for strategy in (masking.random, masking.attn_high):
        ids_keep, ids_mask = masking.sample(strategy(attention, noise, 1.0, g * g - K), K)
        predicted, _ = evaluate.filled_in(net, target, view, ids_keep, ids_mask)
        row += [evaluate.hide(view, ids_mask, p)[0], predicted[0]]
    return [*row[:3], masks.coloured(cells)[0], *row[3:]]


def draw(path, rows):
    with plots.panels(path, "", len(rows), len(COLUMNS), SIZE) as axes:
        plots.show_rows(axes, rows)
        for axis, name in zip(axes[0], COLUMNS, strict=True):
            axis.set_title(name, fontsize=10)


@torch.no_grad()
def main():
    Parser(__doc__).parse_args()
    mae = load_mae(RUN)
    cast = {person["name"]: person for person in toon.cast()}
    rows = [("", row_of(mae, cast[name], which)) for name, which in SHOWN.items()]
    for name, (ink, paper) in INKS.items():
        colours = {"axes.titlecolor": ink, "axes.facecolor": paper, "savefig.facecolor": paper}
        with plots.plt.rc_context(colours):
            draw(f"results/figures/front-{name}.png", rows)


if __name__ == "__main__":
    cli(main)
