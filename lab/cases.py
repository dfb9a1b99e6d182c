"""The picture in docs/tags.md: three new drawings, and what a network says of each.

    python -m lab.cases

Reads:  weights/toon-tags
Writes: results/figures/cases.png
"""

import torch

from apps import tags
from common import plots
from common.train import Parser, cli
from data import read_view
from ingest import toon

RUN = "weights/toon-tags"
SHOWN = "yukina", "mimi", "akiko"  # of each, the first drawing that no data set has
SIZE = 7.5, 5.6  # inches
MOST = 18  # lines below a drawing
MARKS = {"right": ("+", plots.GREEN), "wrong": ("x", "#D55E00"), "missed": ("-", "#808080")}


def case(tagger, person):
    """-> a drawing u8 (S, S, 3), what the network calls it, and [(tag, right, wrong or missed)]."""
    net, header = tagger
    truth = toon.draw(toon.unseen(person, 1)[0])
    view = read_view(truth["image"], net.encoder.config["image_size"])
    logits, probabilities = tags.answers(net, view)
    sure, who = logits[0].softmax(0).max(0)
    said = tags.named(probabilities[0], header)
    true = [tag for tag in truth["tags"] if tag in header["words"]]
    judged = [(f"{tag} {p:.0%}", "right" if tag in true else "wrong") for tag, p in said.items()]
    judged += [(tag, "missed") for tag in true if tag not in said]
    return view[0], f"{header['classes'][who]}, {sure:.0%}, is {person['name']}", judged


def draw(path, cases):
    """The drawings, and below each its tags, a line each."""
    with plots.panels(path, "", 2, len(cases), SIZE) as (above, below):
        plots.show_rows(above[None], [("", [view for view, _, _ in cases])])
        for picture, words, (_, name, judged) in zip(above, below, cases, strict=True):
            picture.set_title(name, fontsize=10)
            words.axis("off")
            for line, (tag, kind) in enumerate(judged):
                mark, colour = MARKS[kind]
                place = 0.1, 1 - line / MOST
                words.text(*place, f"{mark} {tag}", color=colour, fontsize=9, va="top")


@torch.no_grad()
def main():
    Parser(__doc__).parse_args()
    tagger = tags.load_tagger(RUN)
    cast = {person["name"]: person for person in toon.cast()}
    cases = [case(tagger, cast[name]) for name in SHOWN]
    draw("results/figures/cases.png", cases)


if __name__ == "__main__":
    cli(main)
