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


def drawing_of(net, name, which):
    """A drawing that no data set has -> its view u8 (1, S, S, 3), what the pooler attends to, a picture of that."""
    person = next(person for person in toon.cast() if person["name"] == name)
    drawn = toon.draw(toon.unseen(person, which + 1)[which])
    view = read_view(drawn["image"], net.config["image_size"])
    attention = {"attn": net.encoder.patch_attention(view, "pooler").mean(1)}
    ((_, cells),) = guidance.as_pictures(attention).items()
    return view, attention, masks.coloured(cells)[0]


def hidden_by(strategy, attention):
    """-> ids_keep (1, K) and ids_mask (1, M), with the same noise each time."""
    N = attention["attn"].shape[1]
    K = masking.kept(N, RATIO)
    noise = masking.gumbel_noise(1, N, seeded(1))
    return masking.sample(strategy(attention, noise, 1.0, N - K), K)


def row_of(mae, name, which):
    """A drawing, and under both masks what is visible and what is predicted: six pictures."""
    net, target = mae
    view, attention, cells = drawing_of(net, name, which)
    row = [view[0]]
    for strategy in (masking.random, masking.attn_high):
        ids_keep, ids_mask = hidden_by(strategy, attention)
        predicted, _ = evaluate.filled_in(net, target, view, ids_keep, ids_mask)
        row += [evaluate.hide(view, ids_mask, net.config["patch_size"])[0], predicted[0]]
    return [*row[:3], cells, *row[3:]]


def draw(path, rows):
    with plots.panels(path, "", len(rows), len(COLUMNS), SIZE) as axes:
        plots.show_rows(axes, rows)
        for axis, name in zip(axes[0], COLUMNS, strict=True):
            axis.set_title(name, fontsize=10)


@torch.no_grad()
def main():
    Parser(__doc__).parse_args()
    mae = load_mae(RUN)
    rows = [("", row_of(mae, name, which)) for name, which in SHOWN.items()]
    for name, (ink, paper) in INKS.items():
        colours = {"axes.titlecolor": ink, "axes.facecolor": paper, "savefig.facecolor": paper}
        with plots.plt.rc_context(colours):
            draw(f"results/figures/front-{name}.png", rows)


if __name__ == "__main__":
    cli(main)
