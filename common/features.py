"""Frozen features, extracted once and kept in the run's folder; the splits that stages learn from.

A set of features is a dict {"train": (n, D), "dev": ..., "val": ...} of fp16 tensors on the CPU.
They are fp16 also when they were just made, so a second run reads the same digits.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from common import metrics
from common.checkpoints import ENCODER, beside, flags_of, init_from, load_beside, model_file
from common.command import progress
from common.evaluate import extremes
from common.fields import SIDE, TEXT, check_fields, check_finite, short
from common.io import UserError, read_safetensors, save_safetensors
from common.train import autocast_of, pick_device, pick_dtype, seeded
from model import MAE, ViT, shape_of

POOLS, HEADLINE = ("mean", "cls", "extremes"), "extremes"
SIDES = (4, 8, 16)  # of the thumbnails


# ---- the data: what is fitted, what is chosen on, what is reported -------------------------------


def open_task(args, run):
    """What probe.py and experiments.stress work on: the data of args.data (or of the run), the
    machine, the splits.

    task.splits: {"train", "dev", args.split: split}; dev is left out where the set has none, or
    where it is reported.
    """
    folder, held = args.data or flags_of(run).get("data"), args.split
    if not folder:
        raise UserError(f"{run} does not say what it was trained on; give --data datasets/NAME")
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    splits = open_splits(folder, held)
    return SimpleNamespace(
        args=args,
        folder=folder,
        splits=splits,
        train=splits["train"],
        split=splits[held],
        device=device,
        labelled=data.has_labels(splits["train"]) and data.has_labels(splits[held]),
        autocast=autocast_of(device, dtype),
        dtype="fp32" if dtype == torch.float32 else "bf16",
    )


def open_splits(folder, held="val"):
    """-> {"train", "dev", held: split}, all with the same classes."""
    dev = held != "dev" and (Path(folder) / "dev.safetensors").exists()
    splits = {name: data.open_split(folder, name) for name in ("train", *["dev"] * dev, held)}
    classes = splits["train"]["header"]["classes"]
    for name, split in splits.items():
        if split["header"]["classes"] != classes:
            other = sorted(set(classes) ^ set(split["header"]["classes"]))[:4]
            raise UserError(
                f"{folder}: {name} has other classes than train ({', '.join(map(str, other))}, ...); "
                "pack both in one run of data.py"
            )
        if split["header"].get("tags") != splits["train"]["header"].get("tags"):
            raise UserError(
                f"{folder}: {name} has other tags than train; pack both in one run of data.py"
            )
    return splits


def hold_out(splits):
    """-> (rows of train to fit on, rows to choose on, the name of the split those are in): dev, or
    a tenth of train.
    """
    labels = splits["train"]["labels"]
    if "dev" in splits:
        return torch.arange(len(labels)), torch.arange(len(splits["dev"]["labels"])), "dev"
    apart = torch.from_numpy(data.hold_apart(data.groups_of(splits["train"]), labels, data.APART))
    return (~apart).nonzero()[:, 0], apart.nonzero()[:, 0], "train"


def load_mae(path):
    """A run or a checkpoint with a decoder -> MAE in eval mode; statistics of patches as its own
    run learned them.
    """
    from common.formats import read_checkpoint

    _, facts = read_checkpoint(path)
    if not facts["decoder_depth"]:
        raise UserError(f"{path} has no decoder, as SimMIM has none; give a run with another mask")
    model = MAE(
        **{k: facts[k] for k in (*ENCODER, "decoder_dim", "decoder_depth", "decoder_heads")}
    )
    init_from(model, path)
    if beside(path, "stats_head").exists():
        load_beside(model.decoder.stats_head, path, "stats_head")
    return model.eval()


def untrained_like(encoder, seed=0):
    """An encoder of the same shape as it was before it learned anything: the control of every
    feature.
    """
    torch.manual_seed(seed)
    return ViT(**shape_of(encoder)).eval()


# ---- extraction ----------------------------------------------------------------------------------


def pooled(encoder, view):
    """view u8 (B, S, S, 3) -> {"mean" (B, D), "cls" (B, D), "extremes" (B, 2D)} of the tokens."""
    x = encoder.features(view).float()
    return {"mean": x[:, 1:].mean(1), "cls": x[:, 0], "extremes": extremes(x[:, 1:])}


def thumbs(view):
    """view u8 (B, S, S, 3) -> {"thumb4", "thumb8", "thumb16"}: colours alone, no network."""
    return {f"thumb{side}": metrics.thumbnails(view, side) for side in SIDES}


@torch.no_grad()
def extract(extractor, size, task):
    """Features of whole images -> {"train.mean": (n, D) fp16, "val.mean": ...}.

    extractor(view u8 (B, size, size, 3)) -> {name: (B, D)}.
    """
    tensors = {}
    for name, split in task.splits.items():
        rows = torch.arange(len(split["images"]))
        views = data.whole_views(split["images"], rows, size, task.device)
        chunks = []
        for _, view in progress(
            views, f"features {name}", -(-len(rows) // data.CHUNK), leave=False
        ):
            with task.autocast():
                found = extractor(view)
            chunks.append({key: x.half().cpu() for key, x in found.items()})
        for key in chunks[0]:
            tensors[f"{name}.{key}"] = torch.cat([c[key] for c in chunks])
    return tensors


# ---- the model's file, and the file of its features ----------------------------------------------


def home_of(run):
    """Where a run's results go; those of a single file to a folder of its name beside it."""
    return Path(run) if Path(run).is_dir() else Path(run).with_suffix("")


def name_of(encoder):
    """A run by its name, or a checkpoint by that of its file."""
    return home_of(encoder).absolute().name


def split_suffix(split):
    """Behind the names of files that depend on the reported split: metrics.json of val,
    metrics-test.json of test.
    """
    return "" if split == "val" else f"-{split}"


def results_folder(run, folder, split, own=None):
    """Where results of a run go: RUN where the data are its own and the split is val, else
    RUN/DATANAME-SPLIT.
    """
    own = own or flags_of(run).get("data")
    here = own and Path(own).resolve() == Path(folder).resolve() and split == "val"
    return home_of(run) if here else home_of(run) / f"{Path(folder).resolve().name}-{split}"


def digest(path):
    """12 hex digits of a file's bytes."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest()


def header_of(model, size, task):
    """What the features depend on."""
    digests = {name: data.fingerprint(split) for name, split in task.splits.items()}
    return {"model": model, "data": digests, "image_size": size, "dtype": task.dtype}


CACHED = {"model": TEXT, "data": {}, "image_size": SIDE, "dtype": TEXT}


def cached(path, header, make):
    """-> {pool: {split: (n, D)}} from path, if it was made under this header, else of make().

    Features of another model are refused: whoever copied them here has to remove the file.
    """
    remedy = "remove it and run again"
    tensors, there = read_safetensors(path, remedy) if path.exists() else (None, header)
    check_fields(there, CACHED, path, remedy)
    if there["model"] != header["model"]:
        raise UserError(
            f"{path} holds features of another model ({short(there['model'])}, this one is "
            f"{header['model']}); {remedy}"
        )
    if tensors is None or there != header:
        tensors = make()
        save_safetensors(tensors, path, header)
    check_finite(tensors, path)
    found = {}
    for key, x in tensors.items():
        split, _, pool = key.partition(".")
        found.setdefault(pool, {})[split] = x
    return found


def of_run(folder, run, encoder, size, task):
    """-> {pool: {split: (n, D)}} from folder/features.safetensors, or extracted and written there."""
    header = header_of(digest(model_file(run)), size, task)

    def make():
        return extract(partial(pooled, encoder), size, task)

    return cached(Path(folder) / "features.safetensors", header, make)


def of_controls(folder, untrained, size, task):
    """The same of the random-init encoder and of thumbnails: {"untrained mean": ..., "thumb4": ...}.

    They depend on the architecture and the data alone, so one file in the folder of runs serves
    all runs.
    """
    header = header_of(f"untrained {tuple(shape_of(untrained).values())}", size, task)
    name = hashlib.blake2b(json.dumps(header).encode(), digest_size=6).hexdigest()

    def tokens(view):
        return {f"untrained {pool}": x for pool, x in pooled(untrained, view).items()}

    def make():
        packed = task.train["images"].shape[1]  # thumbnails are of the packed images
        return extract(tokens, size, task) | extract(thumbs, packed, task)

    return cached(Path(folder) / f"controls-{name}.safetensors", header, make)


# ---- labelled rows: learned from, chosen by, reported --------------------------------------------


def open_rows(folder, held, hold_out):
    """-> what is learned from, chosen by and reported, and the names of the classes that are
    learned.

    Each of the three is a namespace: name, split, rows, labels: the id of each image's class among
    the learned, -1 of others. All classes are learned but hold_out of them, always the same for one
    data set.
    """
    splits = open_splits(folder, held)
    if unlabelled := [name for name, split in splits.items() if not data.has_labels(split)]:
        raise UserError(
            f"{folder} has pictures without a label in {unlabelled[0]}, or only one class; python data.py "
            "FOLDER, a folder per character, makes one with labels"
        )
    train, classes = splits["train"], splits["train"]["header"]["classes"]
    if len(classes) - hold_out < 2:
        raise UserError(
            f"--hold-out {hold_out} leaves fewer than two of {len(classes)} characters to learn"
        )
    chosen = torch.from_numpy(
        np.sort(np.random.default_rng(0).permutation(len(classes))[hold_out:])
    )
    own = torch.full((len(classes),), -1)
    own[chosen] = torch.arange(len(chosen))
    rows = {name: (own[split["labels"]] >= 0).nonzero()[:, 0] for name, split in splits.items()}
    if "dev" not in splits:
        apart = data.hold_apart(
            data.groups_of(train)[rows["train"]], train["labels"][rows["train"]], data.APART
        )
        splits["dev"], rows["dev"], rows["train"] = (
            train,
            rows["train"][apart],
            rows["train"][~apart],
        )
    sizes = torch.bincount(own[train["labels"][rows["train"]]], minlength=len(chosen))
    if sizes.min() < 2:
        raise UserError(
            f"{folder} has {sizes.min()} training pictures of {classes[chosen[sizes.argmin()]]}, and a "
            "character needs 2: data.py --min-per-class 5 leaves small ones out, recognize.py --enrol adds "
            "them later"
        )
    if len(rows["dev"]) == 0:
        raise UserError(
            f"{folder} has too few pictures to hold some apart for choices; data.py --dev .1 makes a split"
        )
    sets = [
        SimpleNamespace(
            name="train" if splits[name] is train else name,
            split=splits[name],
            rows=rows[name],
            labels=own[splits[name]["labels"]],
        )
        for name in ("train", "dev", held)
    ]
    return sets, [classes[c] for c in chosen]


def epoch_rows(rows, labels, balanced, seed, epoch):
    """The order of an epoch; balanced: drawn with replacement, every class equally likely."""
    if not balanced:
        return rows[data.epoch_order(len(rows), seed, epoch)]
    odds = 1 / torch.bincount(labels[rows]).double()[labels[rows]]
    return rows[torch.multinomial(odds, len(rows), replacement=True, generator=seeded(seed, epoch))]
