"""Which labels of train are probably wrong? What a classifier says that never saw the picture.

    python -m apps.suspects runs/NAME                         of the set that the run was trained on
    python -m apps.suspects weights/toon --data datasets/mine --out suspects

Train is divided into five parts. A linear probe on the features of the encoder learns from the
others and judges the part that it has not seen, so that a wrong label can't teach its own error.

Reads:  runs/NAME (an encoder), datasets/NAME with labels (train alone)
Writes: suspects.csv, the pictures whose label is not the most probable one, the worst first;
        suspects.png, the first of them; in the run's folder, or in --out

    n pictures   D width of the features   C classes
"""

from pathlib import Path

import numpy as np
import torch

import data
from common import features, metrics
from common.checkpoints import load_encoder
from common.command import Parser, cli, drawing
from common.io import UserError, save_csv
from common.locks import reserve

FOLDS = 5
SHOWN = 6, 8  # rows and columns of the sheet
COLUMNS = ("picture", "label", "probability", "better", "its_probability")


def out_of_fold(x, labels, groups, classes):
    """Features (n, D) -> probabilities (n, C), by logistic regressions on pictures of other folds.

    Illustrations stay in one fold. The strength is chosen on the fold behind the judged one.
    """
    group_of = np.unique(np.asarray(groups), return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(group_of.max() + 1)
    fold = torch.from_numpy(order[group_of] % FOLDS)
    found = torch.empty(len(x), classes, dtype=torch.float64)
    for k in range(FOLDS):
        judged = fold == k
        choose = fold == (k + 1) % FOLDS
        fit = ~(judged | choose)
        if not judged.any() or not choose.any() or len(labels[fit].unique()) < 2:
            need = f"two classes of {FOLDS} illustrations or more each"
            raise UserError(f"suspects need {need}, because a fifth of train is held out")
        parts = x[fit].float(), labels[fit], x[choose].float(), labels[choose]
        classify, _ = metrics.logistic_probe(*parts, classes)
        found[judged] = classify(x[judged].float()).exp()
    return found


def ranked(probabilities, labels):
    """-> rows whose label is not the likeliest class, the least probable first, and that class (n,).

    A class that no fit saw has probability 0, and is left out.
    """
    better = probabilities.argmax(1)
    given = probabilities.gather(1, labels[:, None])[:, 0]
    rows = given.argsort(stable=True)
    return rows[((better != labels) & (given > 0))[rows]], better


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of pretrain.py, or a public checkpoint")
    add("--data", metavar="DIR", help="packed set with labels (default: that of the run)")
    add("--out", metavar="DIR", help="folder of the list (default: that of the run)")
    add("--device", default="auto", help="of the encoder: auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the encoder")
    args = parser.parse_args()
    args.split = "train"  # the only one that is read
    return args


def main():
    args = parse_args()
    task = features.open_task(args, args.run)
    if not task.labelled:
        raise UserError(f"{task.folder} has no two labelled classes, so no label can be wrong")
    task.splits = {"train": task.train}
    home = Path(args.out or features.results_folder(args.run, task.folder, "val"))
    table, sheet = home / "suspects.csv", home / "suspects.png"
    reserve([table, sheet], fix="move them away")
    encoder = load_encoder(args.run)
    x = features.of_encoder(encoder.to(task.device), task)["mean"]["train"]
    split = task.train
    names = split["header"]["classes"]
    labels = split["labels"]
    probabilities = out_of_fold(x, labels, data.groups_of(split), len(names))
    rows, better = ranked(probabilities, labels)
    save_csv(table_rows(split, rows, better, probabilities), table, COLUMNS)
    with drawing("suspects.png"):
        draw(sheet, split, rows, better)
    print(f"wrote    {table}: {len(rows)} of {len(labels)} labels are doubted, the worst first")
    planted = split["header"].get("planted")  # by lab/subset.py
    if planted:
        right = {*rows[: len(planted)].tolist()} & {*planted}
        print(f"planted  {len(right)} of the first {len(planted)} labels were planted")


def table_rows(split, rows, better, probabilities):
    """-> a row of suspects.csv for each picture: its label, a better one, and their probabilities."""
    names = split["header"]["classes"]
    labels = split["labels"]
    found = []
    for i in rows.tolist():
        cells = [split["header"]["keys"][i]]
        for c in (labels[i], better[i]):
            cells += [names[c], round(probabilities[i, c].item(), 4)]
        found.append(dict(zip(COLUMNS, cells, strict=True)))
    return found


def draw(path, split, rows, better):
    """The first pictures, under each its label and what it is taken for."""
    from common import plots

    names = split["header"]["classes"]
    labels = split["labels"]
    size = (1.5 * SHOWN[1], 1.7 * SHOWN[0] + 0.5)
    with plots.panels(path, "Labels that are probably wrong", *SHOWN, size, squeeze=False) as axes:
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        for axis, i in zip(axes.flat, rows.tolist(), strict=False):
            axis.imshow(split["images"][i])
            axis.set_xlabel(f"{names[labels[i]][:16]}\nor {names[better[i]][:16]}?", fontsize=7)


if __name__ == "__main__":
    cli(main)
