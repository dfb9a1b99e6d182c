"""Which labels of a set are probably wrong? A classifier that never saw the picture says it.

    python -m apps.suspects runs/NAME                         of the set that the run was trained on
    python -m apps.suspects weights/toon --data datasets/mine --out suspects

All splits together are divided into five parts. A linear probe on the features of the encoder
learns from the others and judges the part that it has not seen, so that a wrong label can't teach
its own error.

Reads:  runs/NAME (an encoder), datasets/NAME with labels (all of its splits)
Writes: suspects.csv, the pictures whose label is not the most probable one, the worst first;
        suspects.png, the first of them; in the run's folder, or in --out

    n pictures   D width of the features   C classes
"""

import warnings
from pathlib import Path

import numpy as np
import torch

import data
from common import features
from common.checkpoints import load_encoder
from common.door import save_csv
from common.locks import reserve
from common.train import Parser, UserError, cli

FOLDS = 5
STRENGTH = 0.1  # C of the logistic regression; less trusts single labels less
SHOWN = 6, 8  # rows and columns of the sheet
COLUMNS = ("picture", "split", "label", "probability", "better", "its_probability")


def out_of_fold(x, labels, groups, classes):
    """Features (n, D) -> probabilities (n, C), by logistic regressions on pictures of other folds.

    Illustrations, (n,) groups, stay in one fold. A class that the other folds lack has probability 0.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    groups = np.unique(np.asarray(groups), return_inverse=True)[1]
    illustrations = [len(np.unique(groups[labels == c])) for c in labels.unique()]
    if sum(count >= FOLDS for count in illustrations) < 2:
        need = f"two classes of {FOLDS} illustrations or more each"
        raise UserError(f"suspects need {need}, because a fifth of them is held out")
    # features are correlated: L-BFGS takes minutes where Newton's method takes seconds
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, solver="newton-cg"))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    options = {"groups": groups, "cv": folds, "method": "predict_proba"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rare classes
        found = cross_val_predict(probe, x.double().numpy(), labels.numpy(), **options)
    probabilities = torch.zeros(len(x), classes, dtype=torch.float64)
    probabilities[:, labels.unique()] = torch.from_numpy(found)
    return probabilities


def ranked(probabilities, labels):
    """-> indices of those whose label is not the likeliest class, the least probable first; that class (n,).

    A class of probability 0, which no fit saw, is left out.
    """
    better = probabilities.argmax(1)
    given = probabilities.gather(1, labels[:, None])[:, 0]
    order = given.argsort(stable=True)
    return order[((better != labels) & (given > 0))[order]], better


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of pretrain.py, or a public checkpoint")
    add("--data", metavar="DIR", help="packed set with labels (default: that of the run)")
    add("--out", metavar="DIR", help="folder of the list (default: that of the run)")
    add("--device", default="auto", help="of the encoder: auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the encoder")
    return parser.parse_args()


def open_set(args):
    """-> common.features.Evaluation with every split that the set has, train first."""
    args.split = "train"
    task = features.open_task(args, args.run)
    task.splits = features.open_alike(task.folder, data.splits_in(task.folder))
    return task


def together(splits, pool):
    """{name: split}, {name: (n, D)} -> features, labels, groups and [(split, row)] of labelled pictures."""
    x, labels, groups, places = [], [], [], []
    for name, split in splits.items():
        index = (split["labels"] >= 0).nonzero()[:, 0]
        keys = split["header"].get("groups") or split["header"]["keys"]
        x.append(pool[name][index])
        labels.append(split["labels"][index])
        groups += [keys[i] for i in index]
        places += [(name, i) for i in index.tolist()]
    return torch.cat(x), torch.cat(labels), groups, places


def main():
    args = parse_args()
    task = open_set(args)
    home = Path(args.out or features.results_folder(args.run, task.folder, "val"))
    table, sheet = home / "suspects.csv", home / "suspects.png"
    reserve([table, sheet], fix="move them away")
    encoder = load_encoder(args.run)
    pool = features.of_encoder(encoder.to(task.device), task)["mean"]
    x, labels, groups, places = together(task.splits, pool)
    if len(labels.unique()) < 2:
        raise UserError(f"{task.folder} has no two labelled classes, so no label can be wrong")
    names = task.train["header"]["classes"]
    probabilities = out_of_fold(x, labels, groups, len(names))
    worst, better = ranked(probabilities, labels)
    doubted = [
        table_row(task.splits, places[i], labels[i], better[i], probabilities[i]) for i in worst
    ]
    save_csv(doubted, table, COLUMNS)
    draw(sheet, task.splits, [places[i] for i in worst], doubted)
    print(f"wrote    {table}: {len(worst)} of {len(labels)} labels are doubted, the worst first")
    if doubted:
        print(f"next: look at {sheet}; move pictures with a wrong label, and pack the set again")


def table_row(splits, place, label, better, probabilities):
    """-> a row of suspects.csv: a picture, its label, a better one, and their probabilities."""
    split, row = place
    header = splits[split]["header"]
    cells = [header["keys"][row], split]
    for c in (label, better):
        cells += [header["classes"][c], round(probabilities[c].item(), 4)]
    return dict(zip(COLUMNS, cells, strict=True))


def draw(path, splits, places, doubted):
    """The first pictures, under each its label and what it is taken for."""
    from common import plots

    size = (1.5 * SHOWN[1], 1.7 * SHOWN[0] + 0.5)
    with plots.panels(path, "Labels that may be wrong", *SHOWN, size, squeeze=False) as axes:
        for axis in axes.flat[len(places) :]:
            axis.remove()
        for axis, (split, row), cells in zip(axes.flat, places, doubted, strict=False):
            axis.set(xticks=[], yticks=[])
            axis.imshow(splits[split]["images"][row])
            axis.set_xlabel(f"{cells['label'][:16]}\nor {cells['better'][:16]}?", fontsize=7)


if __name__ == "__main__":
    cli(main)
