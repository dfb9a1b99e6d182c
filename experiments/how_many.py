"""How many pictures of each character does it take? The headline of probe.py, fitted on a few, drawn several times.

    python -m experiments.how_many runs/NAME --data datasets/X

Top-1 on val by logistic regression on the frozen mean token, thumbnails beside it. Who has fewer
pictures gives all.
"""

from pathlib import Path

import torch

import data
from common import features, metrics, stats
from common.checkpoints import load_encoder
from common.command import Parser, at_least, claim, cli, command, progress, refuse_file
from common.io import UserError
from common.train import commit, machine, seeded
from experiments.tables import save_csv

EACH = (3, 5, 10, 20, 50, 100)  # pictures of each character; then all of them
FEATURES = {"mean": "mean token", "thumb4": "4x4 thumbnail", "thumb8": "8x8 thumbnail"}


def drawn_rows(rows, labels, each, draw):
    """At most `each` of the rows of every character, drawn at random -> rows of train, i64."""
    order = rows[torch.randperm(len(rows), generator=seeded(draw, each))]
    return torch.cat([order[labels[order] == c][:each] for c in labels[rows].unique()])


def measure(found, task, fit, draws):
    """Yield (feature, pictures of each character, (draws, n) bool: which pictures of the split were
    named rightly).
    """
    labels = task.train["labels"]
    _, choose, where = features.hold_out(task.splits)
    truth = task.splits[where]["labels"][choose]
    classes, largest = len(task.train["header"]["classes"]), int(labels[fit].bincount().max())
    work = [(each, draws, name) for each in EACH if each < largest for name in FEATURES]
    for each, n, name in progress(work + [(largest, 1, name) for name in FEATURES], "fits"):
        right = []
        for draw in range(n):
            rows = drawn_rows(fit, labels, each, draw)
            x = found[name]
            scores, _ = metrics.logistic_probe(
                x["train"][rows], labels[rows], x[where][choose], truth, classes
            )
            right.append(scores(x["val"]).argmax(1) == task.split["labels"])
        yield name, each if each < largest else "all", torch.stack(right)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", metavar="runs/NAME", help="run folder of pretrain.py")
    add(
        "--data",
        metavar="DIR",
        help="packed set with labels (default: what the run was trained on)",
    )
    add(
        "--draws",
        type=at_least(1),
        default=5,
        metavar="N",
        help="draws (default: 5); intervals resample them and val",
    )
    add("--out", metavar="CSV", help="the table (default: how_many.csv in the run's folder)")
    parser.set_defaults(split="val", device="auto", dtype="auto")
    args = parser.parse_args()
    out = Path(args.out or Path(args.run) / "how_many.csv")
    refuse_file(args.run)
    claim([out])
    encoder, size = load_encoder(args.run)
    task = features.open_task(args, args.run)
    if not task.labelled:
        raise UserError(f"{task.folder} needs labels on all pictures, and two characters or more")
    encoder.to(task.device).requires_grad_(False)
    found = features.of_controls(encoder, size, task) | features.of_encoder(encoder, size, task)
    made = {"machine": machine(task.device), "commit": commit(), "command": command()}
    rows, held, fit = [], data.groups_of(task.split), features.hold_out(task.splits)[0]
    for name, each, right in measure(found, task, fit, args.draws):
        top1 = {
            k: round(float(x), 1)
            for k, x in stats.bootstrap(100 * right.double(), held).items()
            if k != "p"
        }
        rows.append(
            {"features": FEATURES[name], "pictures_each": each, "draws": len(right)} | top1 | made
        )
    save_csv(out, rows)
    line = "{features:13} {pictures_each:>4} of each: Top-1 {mean:.1f} % ({low:.1f} to {high:.1f})"
    print(*[line.format(**row) for row in rows], f"wrote    {out}", sep="\n")


if __name__ == "__main__":
    cli(main)
