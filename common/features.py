"""Features of a frozen encoder, and the splits that stages learn from.

A set of features is a dict {"train": (n, D), "dev": ..., "val": ...} of fp16 tensors on the CPU.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from common.checkpoints import flags_of, place_of
from common.groups import groups_of, hold_apart
from common.train import UserError, open_machine
from model import POOLS, ViT

APART = 0.1  # share of train that is held out for choices, if there is no split dev
HEADLINE = "extremes"  # the pool that is reported where nobody asks for another


def home_of(run):
    """Where a run's results go; those of a single file to a folder of its name beside it."""
    return Path(run) if Path(run).is_dir() else Path(run).with_suffix("")


def name_of(encoder):
    """A run by its name, or a checkpoint by that of its file."""
    return home_of(encoder).absolute().name


def split_suffix(split):
    """Of files that depend on the reported split: metrics.json of val, metrics-test.json of test."""
    return "" if split == "val" else f"-{split}"


def results_folder(run, folder, split, trained_on=None):
    """RUN where the data are those that it was trained on and the split is val, else RUN/DATA-SPLIT."""
    folder = Path(folder).resolve()
    trained_on = trained_on or set_of(run)
    if trained_on and Path(trained_on).resolve() == folder and split == "val":
        return home_of(run)
    return home_of(run) / f"{folder.name}-{split}"


# ---- data to fit on, to choose on and to report --------------------------------------------------


@dataclass
class Evaluation:
    """What a frozen encoder is measured on."""

    folder: str  # of the data
    splits: dict  # {"train", "dev" where the set has one, and the split that is reported}
    held: str  # name of the latter
    device: torch.device
    dtype: str
    autocast: partial

    @property
    def train(self):
        return self.splits["train"]

    @property
    def split(self):
        return self.splits[self.held]

    @property
    def labelled(self):
        return data.has_labels(self.train) and data.has_labels(self.split)


def open_task(args, run):
    """The data of args.data, or of the run, and the machine of args.device and args.dtype."""
    folder = args.data or set_of(run)
    if not folder:
        raise UserError(f"{run} does not say what it was trained on; give --data datasets/NAME")
    device, autocast, _ = open_machine(args)
    splits = open_splits(folder, args.split)
    return Evaluation(str(folder), splits, args.split, device, args.dtype, autocast)


def open_splits(folder, held="val"):
    """-> {"train", "dev" where there is one, held: split}, all with the same classes and tags."""
    names = ["train", held]
    if held in ("val", "test") and (Path(folder) / "dev.safetensors").exists():
        names.insert(1, "dev")
    return open_alike(folder, names)


def open_alike(folder, names):
    """-> {name: split} of a set; a UserError where one has other classes or tags than the first."""
    splits = {name: data.open_split(folder, name) for name in names}
    first = names[0]
    for name, split in splits.items():
        for key in ("classes", "tags"):
            here = split["header"].get(key)
            there = splits[first]["header"].get(key)
            if here != there:
                odd = sorted(map(str, set(here or ()) ^ set(there or ())))[:4]
                odd = f"({', '.join(odd)}, ...); pack both in one run of data.py"
                raise UserError(f"{folder}: {name} has other {key} than {first} {odd}")
    return splits


def place_of_learned(header, run):
    """Where the set that a recogniser learned lies now; a UserError if another set lies there.

    header: of its head.safetensors.
    """
    place = place_of(header["data"], run)
    check_learned(header, run, place)
    return place


def check_learned(header, run, place):
    """A UserError if a packed set is not the one that a recogniser learned.

    In a set that was packed anew, pictures that it has learned may be among those that measure it.
    """
    known = header.get("digest")  # older files do not say it
    if known and data.splits_in(place) and data.digest(place) != known:
        fix = "put the old set back, or train again"
        raise UserError(f"{place} was packed anew since {run} learned from it; {fix}")


def set_of(run):
    """The packed set that a run of pretrain.py was trained on, where it lies now; None: it does not say."""
    name = flags_of(run).get("data")
    return name and place_of(name, run)


@dataclass
class Subset:
    """Some pictures of a split, with labels."""

    name: str  # of the split
    split: dict  # as data.open_split returns it
    index: torch.Tensor  # (n,): which pictures of the split
    labels: torch.Tensor  # of all pictures of the split: the class among the learned ones, or -1


def learnable(labels, classes, folder):
    """-> the numbers of the classes with two pictures; a UserError where there are fewer than two."""
    sizes = np.bincount(labels[labels >= 0], minlength=len(classes))
    enough = np.nonzero(sizes >= 2)[0]
    if len(enough) < 2:
        fix = "python data.py FOLDER, a folder per character, makes a set with labels"
        raise UserError(f"{folder}: fewer than two classes have two pictures to learn; {fix}")
    return enough


def relabelled(name, split, learned):
    """A split and the numbers of the learned classes -> the Subset of their pictures."""
    # The last of them is what the label -1 reads: a picture without a label.
    new_label = torch.full((len(split["header"]["classes"]) + 1,), -1)
    new_label[learned] = torch.arange(len(learned))
    labels = new_label[split["labels"]]
    index = (labels >= 0).nonzero()[:, 0]
    return Subset(name, split, index, labels)


def set_apart(splits, index=None):
    """-> which pictures of train to fit on (of these, or of all), which to choose on, in which split.

    It is dev (also where that is reported, which is for choices between runs), or train, of which a
    tenth is held out, whole illustrations, always the same.
    """
    train = splits["train"]
    index = torch.arange(len(train["labels"])) if index is None else index
    if "dev" in splits:
        return index, torch.arange(len(splits["dev"]["labels"])), "dev"
    apart = hold_apart(groups_of(train)[index], train["labels"][index], APART)
    apart = torch.from_numpy(apart)
    return index[~apart], index[apart], "train"


def set_apart_to_choose(task):
    """`set_apart` of a task's splits; a UserError if no picture is left to choose the regularisation on."""
    fit, choose, where = set_apart(task.splits)
    if not len(choose):
        fix = "data.py needs more pictures, or a dev split: --dev 0.1"
        raise UserError(f"{task.folder} has no picture to choose the regularisation on; {fix}")
    return fit, choose, where


def open_subsets(folder, held, left_out):
    """-> Subsets with labels to learn from, to choose by and to report; the learned classes.

    left_out: so many characters are not learned, the same ones of each data set. Neither are classes
    with fewer than two pictures in train.
    """
    splits = open_splits(folder, held)
    classes = splits["train"]["header"]["classes"]
    labels = splits["train"]["labels"]
    enough = learnable(labels, classes, folder)
    learned = np.setdiff1d(enough, np.random.default_rng(0).permutation(len(classes))[:left_out])
    if len(learned) < 2:
        raise UserError(f"--hold-out {left_out} leaves fewer than two of {len(classes)} characters")
    sets = {name: relabelled(name, split, learned) for name, split in splits.items()}
    train = sets["train"]
    train.index, chosen, where = set_apart(splits, train.index)
    dev = sets["dev"] if where == "dev" else replace(train, index=chosen)
    for name, some in {"dev": dev, held: sets[held]}.items():
        if not len(some.index):
            share = "--dev 0.1" if name == "dev" else "--split .6,.2,.2"
            fix = f"data.py needs more pictures, or a larger share for it: {share}"
            raise UserError(f"{folder} has no picture of a learned character for {name}; {fix}")
    return [train, dev, sets[held]], [classes[c] for c in learned]


# ---- features ------------------------------------------------------------------------------------


def untrained_like(encoder, seed=0):
    """A random-init encoder of the same shape: the control of every feature."""
    torch.manual_seed(seed)
    return ViT(**encoder.config).eval()


def pooled(encoder, view):
    """view u8 (B, s, s, 3) -> {"mean" (B, D), "cls" (B, D), "extremes" (B, 2D)} of the tokens."""
    tokens = encoder.features(view).float()
    return {name: pool(tokens) for name, pool in POOLS.items()}


@torch.no_grad()
def extract(extractor, size, task):
    """Features of whole images of all splits -> {pool: {split: (n, D) fp16}}.

    extractor(view u8 (B, size, size, 3)) -> {pool: (B, D)}.
    """
    features = {}
    for name, split in task.splits.items():
        images = split["images"]
        chunks = []
        index = torch.arange(len(images))
        bar = f"features {name}"
        for _, view in data.whole_views(images, index, size, task.device, bar):
            with task.autocast():
                pools = extractor(view)
            # fp16 takes half the memory, and hides most of the tiny differences between machines.
            chunks.append({pool: x.half().cpu() for pool, x in pools.items()})
        for pool in chunks[0]:
            x = torch.cat([chunk[pool] for chunk in chunks])
            features.setdefault(pool, {})[name] = x
    return features


def of_encoder(encoder, task):
    """-> {pool: {split: (n, D)}} of an encoder's tokens."""
    return extract(partial(pooled, encoder), encoder.image_size, task)
