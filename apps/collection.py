"""A small collection, whose every picture is learned: its splits as one."""

import numpy as np
import torch

import data
from common.features import learnable, open_alike, relabelled

BY_FOLDS = "folds"  # in the place of a split: cross-validation has measured (apps/folds.py)


def open_all(folder):
    """All splits of a set as one -> labelled pictures, as of `open_subsets`; the learned classes.

    Its pictures are copied into memory, because they come from several files.
    """
    splits = open_alike(folder, data.splits_in(folder) or ["train"])
    first = next(iter(splits.values()))
    header = dict(first["header"]) | {"split": BY_FOLDS}
    for name in ("keys", "groups"):
        lists = [split["header"].get(name) or split["header"]["keys"] for split in splits.values()]
        header[name] = sum(map(list, lists), [])
    every = {"header": header, "labels": torch.cat([x["labels"] for x in splits.values()])}
    every["images"] = np.concatenate([x["images"] for x in splits.values()])
    classes = header["classes"]
    enough = learnable(every["labels"], classes, folder)
    return relabelled("all", every, enough), [classes[c] for c in enough]
