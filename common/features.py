"""Features of a frozen encoder, and the splits that stages learn from.

A set of features is a dict {"train": (n, D), "dev": ..., "val": ...} of fp16 tensors on the CPU.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from common import metrics
from common.checkpoints import flags_of
from common.command import progress
from common.evaluate import extremes
from common.fields import check_finite
from common.io import UserError
from common.train import autocast_of, pick_device, pick_dtype, seeded
from model import ViT, shape_of

POOLS, HEADLINE = ("mean", "cls", "extremes"), "extremes"
SIDES = (4, 8, 16)  # of the thumbnails


# ---- names of results ----------------------------------------------------------------------------


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
    trained_on = trained_on or flags_of(run).get("data")
    if trained_on and Path(trained_on).resolve() == folder and split == "val":
        return home_of(run)
    return home_of(run) / f"{folder.name}-{split}"


# ---- the data: what is fitted, what is chosen on, what is reported -------------------------------


def open_task(args, run):
    """What probe.py works on: the data of args.data (or of the run), the machine, the splits.

    task.splits: {"train", "dev", args.split: split}; dev is left out where the set has none, or
    where it is reported.
    """
    folder = args.data or flags_of(run).get("data")
    if not folder:
        raise UserError(f"{run} does not say what it was trained on; give --data datasets/NAME")
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    splits = open_splits(folder, args.split)
    train, held = splits["train"], splits[args.split]
    return SimpleNamespace(
        args=args,
        folder=folder,
        splits=splits,
        train=train,
        split=held,
        device=device,
        labelled=data.has_labels(train) and data.has_labels(held),
        autocast=autocast_of(device, dtype),
        dtype="fp32" if dtype == torch.float32 else "bf16",
    )


def open_splits(folder, held="val"):
    """-> {"train", "dev", held: split}, all with the same classes and tags."""
    names = ["train", held]
    if held != "dev" and (Path(folder) / "dev.safetensors").exists():
        names.insert(1, "dev")
    splits = {name: data.open_split(folder, name) for name in names}
    for name, split in splits.items():
        for key in ("classes", "tags"):
            here, there = split["header"].get(key), splits["train"]["header"].get(key)
            if here != there:
                odd = ", ".join(sorted(map(str, set(here or ()) ^ set(there or ())))[:4])
                fix = "pack both in one run of data.py"
                raise UserError(f"{folder}: {name} has other {key} than train ({odd}, ...); {fix}")
    return splits


def dev_of_train(split, rows):
    """Which of these rows of train are held out as dev, by illustration: (len(rows),) bool."""
    groups = data.groups_of(split)[rows]
    return torch.from_numpy(data.hold_apart(groups, split["labels"][rows], data.APART))


def hold_out(splits):
    """-> rows of train to fit on, rows to choose on, the name of the split those are in.

    The rows to choose on are dev, or a tenth of train.
    """
    rows = torch.arange(len(splits["train"]["labels"]))
    if "dev" in splits:
        return rows, torch.arange(len(splits["dev"]["labels"])), "dev"
    apart = dev_of_train(splits["train"], rows)
    return rows[~apart], rows[apart], "train"


def open_rows(folder, held, hold_out):
    """-> sets of labelled pictures to learn from, to choose by and to report, and the learned names.

    Each set is a namespace: name, split, rows, labels. A label is an image's class among the
    learned, -1 of others. hold_out classes are not learned: the same ones for each data set.
    """
    splits = open_splits(folder, held)
    for name, split in splits.items():
        if not data.has_labels(split):
            fix = "python data.py FOLDER, a folder per character, makes a set with labels"
            raise UserError(f"{folder}: {name} has pictures without a label, or one class; {fix}")
    classes = splits["train"]["header"]["classes"]
    if len(classes) - hold_out < 2:
        raise UserError(f"--hold-out {hold_out} leaves fewer than two of {len(classes)} characters")
    order = np.random.default_rng(0).permutation(len(classes))
    learned = torch.from_numpy(np.sort(order[hold_out:]))
    new_label = torch.full((len(classes),), -1)
    new_label[learned] = torch.arange(len(learned))
    sets = {}
    for name, split in splits.items():
        labels = new_label[split["labels"]]
        rows = (labels >= 0).nonzero()[:, 0]
        sets[name] = SimpleNamespace(name=name, split=split, rows=rows, labels=labels)
    train = sets["train"]
    if "dev" not in sets:
        apart = dev_of_train(train.split, train.rows)
        sets["dev"] = SimpleNamespace(**vars(train) | {"rows": train.rows[apart]})
        train.rows = train.rows[~apart]
    names = [classes[c] for c in learned]
    refuse_few(folder, train, sets["dev"], names)
    return [train, sets["dev"], sets[held]], names


def refuse_few(folder, train, dev, names):
    """Every learned character needs two pictures in train, and dev needs one of any."""
    sizes = torch.bincount(train.labels[train.rows], minlength=len(names))
    if sizes.min() < 2:
        few = f"{sizes.min()} training pictures of {names[sizes.argmin()]}, and 2 are needed"
        fix = "data.py --min-per-class 5 leaves small classes out, recognize.py --enrol adds them"
        raise UserError(f"{folder} has {few}; {fix}")
    if len(dev.rows) == 0:
        raise UserError(f"{folder} has too few pictures to choose on; data.py --dev .1 makes dev")


def epoch_rows(rows, labels, balanced, seed, epoch):
    """The order of an epoch; balanced: drawn with replacement, every class equally likely."""
    if not balanced:
        return rows[data.epoch_order(len(rows), seed, epoch)]
    odds = 1 / torch.bincount(labels[rows]).double()[labels[rows]]
    return rows[torch.multinomial(odds, len(rows), replacement=True, generator=seeded(seed, epoch))]


# ---- features ------------------------------------------------------------------------------------


def untrained_like(encoder, seed=0):
    """A random-init encoder of the same shape: the control of every feature."""
    torch.manual_seed(seed)
    return ViT(**shape_of(encoder)).eval()


def pooled(encoder, view):
    """view u8 (B, S, S, 3) -> {"mean" (B, D), "cls" (B, D), "extremes" (B, 2D)} of the tokens."""
    x = encoder.features(view).float()
    return {"mean": x[:, 1:].mean(1), "cls": x[:, 0], "extremes": extremes(x[:, 1:])}


def thumbs(view):
    """view u8 (B, S, S, 3) -> {"thumb4", "thumb8", "thumb16"}: colours alone, no network."""
    return {f"thumb{side}": metrics.thumbnails(view, side) for side in SIDES}


@torch.no_grad()
def extract(extractor, size, task):
    """Features of whole images of all splits -> {pool: {split: (n, D) fp16}}.

    extractor(view u8 (B, size, size, 3)) -> {pool: (B, D)}.
    """
    found = {}
    for name, split in task.splits.items():
        rows = torch.arange(len(split["images"]))
        views = data.whole_views(split["images"], rows, size, task.device)
        count = -(-len(rows) // data.CHUNK)
        chunks = []
        for _, view in progress(views, f"features {name}", count, leave=False):
            with task.autocast():
                pools = extractor(view)
            chunks.append({pool: x.half().cpu() for pool, x in pools.items()})
        for pool in chunks[0]:
            found.setdefault(pool, {})[name] = torch.cat([chunk[pool] for chunk in chunks])
        check_finite({pool: x[name] for pool, x in found.items()}, f"features of {name}")
    return found


def of_encoder(encoder, size, task):
    """-> {pool: {split: (n, D)}} of an encoder's tokens."""
    return extract(partial(pooled, encoder), size, task)


def of_controls(encoder, size, task):
    """The same of a random-init encoder and of thumbnails: "untrained mean", ..., "thumb16"."""
    untrained = untrained_like(encoder).to(task.device)
    found = of_encoder(untrained, size, task)
    packed = task.train["images"].shape[1]  # thumbnails are of the packed images
    return {f"untrained {pool}": x for pool, x in found.items()} | extract(thumbs, packed, task)
