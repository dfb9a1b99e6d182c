"""Which labelled pictures a classifier learns from, chooses by, and is judged on: rows of packed splits.

Choices (early stop, thresholds, rates) are made on split dev, or where there is none on a tenth of train that is held
apart by group; what is reported is another split.
"""

from pathlib import Path

import numpy as np
import torch

import loader
import plumbing
from plumbing import UserError

HELD = 0.1  # of train is held apart where there is no split dev


def open_labelled(folder, name):
    """A split all of whose pictures have a label."""
    split = loader.open_split(folder, name)
    if not loader.has_labels(split):
        raise UserError(f"{folder} has pictures without a label in {name}, or only one class; python data.py FOLDER, "
                        "a folder per character, makes one with labels")  # fmt: skip
    return split


def hold_apart(split, rows, share, seed=0):
    """Rows (i64) -> (to learn from, about `share` of them held apart); no group is torn, two of each class stay."""
    groups = np.array(split["header"]["groups"] or split["header"]["keys"])[rows.numpy()]
    labels = split["labels"][rows].numpy()
    names, of = np.unique(groups, return_inverse=True)
    left, held = np.bincount(labels), np.zeros(len(rows), bool)
    members = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
    for group in np.random.default_rng(seed).permutation(len(names)):
        taken = np.bincount(labels[members[group]], minlength=len(left))
        if held.sum() + taken.sum() <= share * len(rows) and (left - taken)[taken > 0].min() > 1:
            held[members[group]] = True
            left -= taken
    return rows[torch.from_numpy(~held)], rows[torch.from_numpy(held)]


def choose_classes(names, out):
    """-> ids of the classes that are learned: all but `out` of them, always the same for one data set."""
    if len(names) - out < 2:
        raise UserError(f"--hold-out {out} leaves fewer than two of {len(names)} characters to learn")
    return torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(names))[out:]))


def open_rows(folder, eval_on, hold_out):
    """-> [(split, rows) to learn from, to choose by, to report], and each class's id among the learned, -1 if none."""
    train, report = open_labelled(folder, "train"), open_labelled(folder, eval_on)
    classes = train["header"]["classes"]
    if report["header"]["classes"] != classes:
        raise UserError(f"{folder}: train and {eval_on} do not name the same classes; pack them together")
    chosen = choose_classes(classes, hold_out)
    own = torch.full((len(classes),), -1)
    own[chosen] = torch.arange(len(chosen))
    rows = (own[train["labels"]] >= 0).nonzero()[:, 0]
    if (Path(folder) / "dev.safetensors").exists():
        dev = open_labelled(folder, "dev")
        held = (own[dev["labels"]] >= 0).nonzero()[:, 0]
    else:
        dev, (rows, held) = train, hold_apart(train, rows, HELD)
    sizes = torch.bincount(own[train["labels"][rows]], minlength=len(chosen))
    if sizes.min() < 2:
        raise UserError(
            f"{folder} has {sizes.min()} training pictures of {classes[chosen[sizes.argmin()]]}, and a character "
            "needs 2: data.py --min-per-class 5 leaves small ones out, recognize.py --enrol adds them later"
        )
    if len(held) == 0:
        raise UserError(f"{folder} has too few pictures to hold some apart for choices; data.py --dev .1 makes a split")
    known = (own[report["labels"]] >= 0).nonzero()[:, 0]
    return [(train, rows), (dev, held), (report, known)], own


def epoch_rows(rows, labels, balanced, seed, epoch):
    """The order of an epoch; balanced: drawn with replacement, every class equally likely."""
    if not balanced:
        return rows[loader.epoch_order(len(rows), seed, epoch)]
    odds = 1 / torch.bincount(labels[rows]).double()[labels[rows]]
    return rows[torch.multinomial(odds, len(rows), replacement=True, generator=plumbing.seeded(seed, epoch))]
