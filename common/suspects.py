"""Which labels of train are probably wrong? What a classifier says that never saw the picture.

n pictures   D width of the features   C classes
"""

from pathlib import Path

import numpy as np
import torch

import data
from common import features, metrics
from common.checkpoints import load_encoder
from common.command import claim, drawing, refuse_idle
from common.io import UserError, save_csv

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
            raise UserError(f"--suspects needs {need}, since it holds out a fifth of train")
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


def open_train(flags):
    """-> the task of features.py with the split train alone, and the folder of the results."""
    if len(flags.runs) > 1:
        raise UserError(f"--suspects is of one run; leave {flags.runs[1]} out")
    refuse_idle(flags.given & {"split"}, "on suspects, which are labels of train")
    flags.values["split"] = "train"  # no other is read
    task = features.open_task(flags, flags.runs[0])
    if not task.labelled:
        raise UserError(f"{task.folder} has no two labelled classes; --suspects doubts labels")
    task.splits = {"train": task.train}
    home = flags.out or features.results_folder(flags.runs[0], task.folder, "val")
    flags.refuse_unread()
    return task, Path(home)


def write_suspects(flags):
    """suspects.csv and suspects.png of probe.py --suspects -> what was found, as lines."""
    task, home = open_train(flags)
    table, sheet = home / "suspects.csv", home / "suspects.png"
    claim([table, sheet], fix="move them away")
    encoder = load_encoder(flags.runs[0])
    x = features.of_encoder(encoder.to(task.device), task)["mean"]["train"]
    split = task.train
    names = split["header"]["classes"]
    labels = split["labels"]
    probabilities = out_of_fold(x, labels, data.groups_of(split), len(names))
    rows, better = ranked(probabilities, labels)
    save_csv(table_rows(split, rows, better, probabilities), table, COLUMNS)
    with drawing("suspects.png"):
        draw(sheet, split, rows, better)
    line = f"wrote    {table}: {len(rows)} of {len(labels)} labels are doubted, the worst first"
    planted = split["header"].get("planted")  # by lab/subset.py
    if not planted:
        return line
    right = {*rows[: len(planted)].tolist()} & {*planted}
    return f"{line}\nplanted  {len(right)} of the first {len(planted)} labels were planted"


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
