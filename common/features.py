"""Frozen features, extracted once and kept beside the run: what probe.py and experiments.stress share.

A set of features is a dict {"train": (V, n, D), "dev": ..., "val": ...} of fp16 tensors on the CPU: V views of every
image, the whole image first, then random crops. fp16 also when they were just made: a second run reads the same digits.
"""

import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from common import metrics
from common.evaluate import extremes
from common.io import UserError, read_header, read_safetensors, save_safetensors
from common.train import seeded

POOLS = ("mean", "cls", "extremes")  # the first is the headline
SIDES = (4, 8, 16)  # of the thumbnails
MIN_CROP = 0.4  # smallest share of an image that a further view shows, as in pretrain.py


# ---- the data: what is fitted, what is chosen on, what is reported -------------------------------------------------


def open_splits(folder, held="val"):
    """-> {"train", "dev", held: split}; dev is left out where the set has none, or where it is what is reported."""
    there = {p.stem for p in Path(folder).glob("*.safetensors")}
    names = ["train", *({"dev"} & there - {held}), held]
    splits = {name: data.open_split(folder, name) for name in names}
    classes = {name: split["header"]["classes"] for name, split in splits.items()}
    if odd := [name for name in names if classes[name] != classes["train"]]:
        own = sorted(set(classes[odd[0]]) ^ set(classes["train"]))[:4]
        raise UserError(f"{folder}: {odd[0]} has other classes than train ({', '.join(map(str, own))}, ...); "
                        "pack both in one run of data.py")  # fmt: skip
    return splits


def groups_of(split):
    """-> (n) i64: images of one illustration (or near-duplicates) share a number; each its own where none is known."""
    names = split["header"].get("groups") or range(len(split["labels"]))
    return torch.from_numpy(np.unique(np.asarray(names), return_inverse=True)[1]).reshape(-1)


def hold_out(splits):
    """-> (rows of train to fit on, rows to choose on, the name of the split those are in): dev, or a tenth of train."""
    everything = torch.arange(len(splits["train"]["labels"]))
    if "dev" in splits:
        return everything, torch.arange(len(splits["dev"]["labels"])), "dev"
    apart = data.hold_apart(groups_of(splits["train"]), splits["train"]["labels"], data.APART)
    return everything[~apart], everything[apart], "train"


# ---- extraction ----------------------------------------------------------------------------------------------------


def pooled(encoder, view, blocks):
    """view u8 (B, S, S, 3) -> {name: (B, D)}: mean token, CLS, extremes (B, 2D), and with blocks each block's mean."""
    found, x = {}, encoder.embed(*encoder.all_patches(view))
    for i, block in enumerate(encoder.blocks):
        x = block(x)
        if blocks:
            found[f"block{i + 1}"] = x[:, 1:].float().mean(1)
    x = encoder.norm(x).float()
    return found | {"mean": x[:, 1:].mean(1), "cls": x[:, 0], "extremes": extremes(x[:, 1:])}


def thumbnails_of(images, boxes, flip):
    """The controls: images u8 (B, S, S, 3) -> {"thumb4": (B, 48), ...} of the same crops."""
    view = data.view_images(images, boxes, flip, images.shape[1])
    return {f"thumb{side}": metrics.thumbnails(view, side) for side in SIDES}


def crops(n, view, seed=0):
    """Boxes (n, 4) and flips (n) of all images in this view: 0 is the whole image, the others are drawn."""
    if view == 0:
        return data.full_boxes(n)
    return data.draw_boxes(n, seeded(seed, view), MIN_CROP)


@torch.no_grad()
def extract(look, split, views, device, name=""):
    """look(images u8 (B, S, S, 3), boxes, flip) -> {pool: (B, D)}; all of a split: {pool: (views, n, D) fp16}."""
    n, chunks = len(split["images"]), []
    boxes = [crops(n, v) for v in range(views)]
    bar = tqdm(torch.arange(n).split(data.CHUNK), f"features {name}", leave=False, disable=None)
    for rows in bar:
        images = data.take(split["images"], rows, device)
        found = [look(images, *(x[rows] for x in box)) for box in boxes]
        chunks.append({pool: torch.stack([f[pool].half().cpu() for f in found]) for pool in found[0]})
    return {pool: torch.cat([c[pool] for c in chunks], 1) for pool in chunks[0]}


def encoder_look(encoder, size, autocast, clock, blocks=False):
    """What an encoder sees in a crop; adds the seconds of its forward pass to clock["forward"]."""

    def look(images, boxes, flip):
        view = data.view_images(images, boxes, flip, size)
        start_time = time.perf_counter()
        with autocast():
            found = {pool: x.cpu() for pool, x in pooled(encoder, view, blocks).items()}
        clock["forward"] = clock.get("forward", 0) + time.perf_counter() - start_time
        return found

    return look


def extract_all(look, splits, views, device, clock=None):
    """All splits -> {"train.mean": (V, n, D), "val.mean": (1, n, D), ...}; only train is seen in several views."""
    start_time, tensors = time.perf_counter(), {}
    for name, split in splits.items():
        found = extract(look, split, views if name == "train" else 1, device, name)
        tensors |= {f"{name}.{pool}": x.contiguous() for pool, x in found.items()}
    if clock is not None:
        clock["all"], clock["images"] = time.perf_counter() - start_time, sum(len(s["images"]) for s in splits.values())
    return tensors


# ---- whose features: the model's file ------------------------------------------------------------------------------


def model_file(run):
    return Path(run) / "model.safetensors" if Path(run).is_dir() else Path(run)


def about_model(run):
    """What the header of a run's model says: "config" of the network, "run" (the flags), "step"; {} of other files."""
    try:
        return read_header(model_file(run))[1]
    except UserError:
        return {}


def flags_of(run):
    """The flags under which a run was made; {} where its file does not say."""
    return about_model(run).get("run", {})


# ---- the file ------------------------------------------------------------------------------------------------------


def digest(path):
    """12 hex digits of a file's bytes."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest()


def covers(there, wanted):
    """Was a file made under a header that has all that is asked for? More views, blocks or splits do no harm."""
    more = there["views"] >= wanted["views"] and there["blocks"] >= wanted["blocks"]
    same = all(there.get(k) == v for k, v in wanted.items() if k not in ("views", "blocks", "data"))
    return more and same and wanted["data"].items() <= there["data"].items()


def cached(path, header, make):
    """Tensors of path if it was made under this header; else make() them and write it.

    Features of another model are refused: whoever copied them here has to say so by removing the file.
    """
    path = Path(path)
    if path.exists():
        tensors, there = read_safetensors(path, "remove it and run again")
        if there.get("model") != header["model"]:
            raise UserError(f"{path} holds features of another model ({there.get('model')}, this one is "
                            f"{header['model']}); remove it and run again")  # fmt: skip
        if covers(there, header):
            return tensors
    tensors = make()
    save_safetensors(tensors, path, header)
    return tensors


def sets(tensors, views, blocks=False):
    """{"train.mean": x, ...} -> {"mean": {"train": x (views, n, D), "val": y}, ...}; blocks only if asked for."""
    found = {}
    for key, x in tensors.items():
        split, _, pool = key.partition(".")
        if blocks or not pool.startswith("block"):
            found.setdefault(pool, {})[split] = x[:views]
    return found


def header_of(model, splits, size, dtype, views, blocks):
    """What the features depend on."""
    digests = {name: data.fingerprint(split) for name, split in splits.items()}
    return {"model": model, "data": digests, "image_size": size, "dtype": dtype, "views": views, "blocks": blocks}


def of_run(folder, model_file, encoder, size, splits, autocast, dtype, views=1, blocks=False):
    """-> ({pool: {split: (V, n, D)}}, clock); from folder/features.safetensors, or extracted and written there.

    clock: seconds "all" and "forward" and the number of "images" where they were extracted now, else empty.
    """
    clock, device = {}, encoder.cls_token.device
    look = encoder_look(encoder, size, autocast, clock, blocks)
    header = header_of(digest(model_file), splits, size, dtype, views, blocks)
    make = lambda: extract_all(look, splits, views, device, clock)  # noqa: E731
    return sets(cached(Path(folder) / "features.safetensors", header, make), views, blocks), clock


def shape_of(encoder, size):
    """What makes two untrained encoders the same."""
    return (size, encoder.patch_size, encoder.cls_token.shape[2], len(encoder.blocks), encoder.blocks[0].attn.heads)


def of_controls(folder, untrained, size, splits, autocast, dtype, views=1):
    """The same for the untrained encoder and for thumbnails: {"untrained mean": ..., "thumb4": ..., ...}.

    They depend on the architecture and the data alone: one file in the folder of runs serves all runs alike.
    """
    device = untrained.cls_token.device
    header = header_of(f"untrained {shape_of(untrained, size)}", splits, size, dtype, views, False)
    name = hashlib.blake2b(json.dumps(header).encode(), digest_size=6).hexdigest()

    def make():
        look = encoder_look(untrained, size, autocast, {})
        tensors = extract_all(look, splits, views, device)
        tensors = {k.replace(".", ".untrained "): x for k, x in tensors.items()}
        return tensors | extract_all(thumbnails_of, splits, views, device)

    return sets(cached(Path(folder) / f"controls-{name}.safetensors", header, make), views)


def chunk_for(side, native):
    """Images at a time where an encoder sees side x side patches instead of native x native: memory goes by N^2."""
    return max(1, math.floor(data.CHUNK * min(1, (native / side) ** 4)))


# ---- labelled rows: learned from, chosen by, reported ----------------------------------------------------------------

def open_labelled(folder, name):
    """A split all of whose pictures have a label."""
    split = data.open_split(folder, name)
    if not data.has_labels(split):
        raise UserError(f"{folder} has pictures without a label in {name}, or only one class; python data.py FOLDER, "
                        "a folder per character, makes one with labels")  # fmt: skip
    return split


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
        apart = data.hold_apart(groups_of(train)[rows], train["labels"][rows], data.APART)
        dev, held, rows = train, rows[apart], rows[~apart]
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
        return rows[data.epoch_order(len(rows), seed, epoch)]
    odds = 1 / torch.bincount(labels[rows]).double()[labels[rows]]
    return rows[torch.multinomial(odds, len(rows), replacement=True, generator=seeded(seed, epoch))]
