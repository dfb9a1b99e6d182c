"""Stage 0: packed sets. Opened as memory maps, read ahead in batches, and cut into views on the device.

    python data.py PATH --out datasets/NAME     PATH: a folder, zip, tar, table or list of images, \\
        or the word toon
    python data.py --show datasets/NAME         a sheet of what was packed; of images not yet \\
        packed, of the two crops
    python data.py PATH --layout split/-/class  what the folders above a picture say, where that \\
        can be read in two ways

Reads:  images, in any layout that ingest/sources.py knows
Writes: datasets/NAME/{train,val,test}.safetensors (dev, too, if --dev asks for it), as
ingest/pack.py says

A split is a dict of arrays that stay in their file: a batch is copied out of the page cache, so
memory does not grow with the data set, and there are no worker processes: one thread reads ahead. A
view is a crop, flipped or not and resized, made by two matrix products; maps and masks go through
the same two.
"""

if (
    __name__ == "__main__"
):  # packing needs no torch: it has a module of its own, and starts in a third of the time
    import sys

    from common.command import cli, starting

    starting()
    from ingest.pack import main

    sys.exit(cli(main))


import hashlib
import json
import math
import shlex
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common.fields import (
    ANYTHING,
    CUT,
    NAMES,
    SIDE,
    TEXT,
    check_arrays,
    check_fields,
    check_range,
    list_of,
    one_of,
    table_of,
    whole,
)
from common.io import DTYPES, UserError, not_whole, read_header, write_rows

APART = 0.1  # of train is held apart for choices where there is no split dev
LUMA = (0.299, 0.587, 0.114)  # share of red, green and blue in brightness (ITU-R BT.601)
# whole images at a time for teachers and evaluations: on a CPU 256 were four times slower
# (results/LOG.md)
CHUNK = 64

PACKED = {  # fields of a packed split, and its arrays: n images of S x S pixels
    "classes": NAMES,
    "size": SIDE,
    "keys": list_of(TEXT),
    "crop": CUT["crop"],
    "margin": CUT["margin"],
    "split": TEXT,
    "source": TEXT,
    "groups?": list_of(ANYTHING),
    "tags?": NAMES,
    "parts?": NAMES,
    "style?": table_of(NAMES),
    "hybrid?": table_of(NAMES),
}
PLANES = {
    "images": "uint8 n S S 3",
    "labels": "int64 n",
    "fg?": "uint8 n S S",
    "parts?": "uint8 n S S",
    "drawn?": "uint8 n S S",
    "tags?": "int32 n T",
    "all_tags?": "int32 n U",
    "boxes?": "float32 n K 4",
    "heads?": "float32 n K 4",
    "style?": "uint8 n Q",
}
MAPS = {  # fields of a file of maps
    "grid": SIDE,
    "data_digest": TEXT,
    "data?": TEXT,
    "split?": TEXT,
    "parts?": whole(1, 255),
    "quality?": TEXT,
    "source?": TEXT,
    "by?": TEXT,
}
MAP_DTYPE = {"attn": "float16", "saliency": "uint8", "parts": "uint8", "drawn": "uint8"}


# ---- reading: a split is a dict of arrays that stay in the file ----------------------------------


def open_tensors(path):
    """A safetensors file -> {name: memory map} and, as "header", the "animask" entry of its header."""
    entries, header = read_header(path)
    try:
        tensors = {
            name: np.memmap(path, DTYPES[dtype], "r", at, shape)
            for name, (dtype, shape, at) in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as problem:  # cut short, or not of rows
        raise not_whole(path, problem, "remove it and make it again") from None
    return tensors | {"header": header}


def open_split(folder, name):
    """datasets/NAME, "train" -> {"images": u8 (n, S, S, 3) memory map, "labels": i64 (n), "header";
    "fg", "parts"}.
    """
    path, there = (
        Path(folder) / f"{name}.safetensors",
        sorted(p.stem for p in Path(folder).glob("*.safetensors")),
    )
    if there and name not in there:
        raise UserError(
            f"{folder} has no split {name}, only {', '.join(there)}; --eval-on chooses another, "
            "data.py --split and --dev make them"
        )
    split = open_tensors(path) if there else {"header": {}}
    fix = f"python data.py IMAGES --out {shlex.quote(str(folder))} makes it"
    if not there:
        raise UserError(f"{path} does not exist; {fix}")
    check_split(split, path, fix)
    return split | {"labels": torch.from_numpy(np.array(split["labels"]))}


def check_split(split, path, fix):
    """A UserError where a packed split is not as PACKED and PLANES say."""
    header, arrays = split["header"], {k: x for k, x in split.items() if k != "header"}
    check_fields(header, PACKED, path, fix)
    n, strata = len(header["keys"]), header.get("style") or {}
    check_arrays(arrays, PLANES, path, fix, n=n, S=header["size"], Q=len(strata))
    check_range(split["labels"], -1, len(header["classes"]), "labels", path, fix)
    if n == 0 or len(header.get("groups") or header["keys"]) != n:
        raise UserError(f"{path} has {n} images, or not as many groups; {fix}")
    if odd := [k for k in ("tags", "parts", "style") if bool(header.get(k)) != (k in split)]:
        raise UserError(f"{path} has either an array {odd[0]!r} or names for it, not both; {fix}")
    for column, values in enumerate(strata.values() if "style" in split else ()):
        check_range(split["style"][:, column], 0, len(values), "styles", path, fix)


def fingerprint(split):
    """What tells one packed split from another: a hash of its header, which holds a digest of the
    pixels, too.

    Where the source lay, and what packing said of it, don't count: the same pictures are the same
    set on each machine.
    """
    about = {k: v for k, v in split["header"].items() if k not in ("source", "notes")}
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=6).hexdigest()


def has_labels(split):
    return len(split["header"]["classes"]) > 1 and bool((split["labels"] >= 0).all())


def groups_of(split):
    """-> (n) i64: images of one illustration (or near-duplicates) share a number; each its own
    where none is known.
    """
    names = split["header"].get("groups") or range(len(split["labels"]))
    return torch.from_numpy(np.unique(np.asarray(names), return_inverse=True)[1]).reshape(-1)


def hold_apart(groups, labels, share, seed=0):
    """Which rows are held apart for choices, (n,) bool: about `share` of them, by whole groups, in
    a seeded order.

    groups (n), such as illustrations with one face or several; labels (n) of any kind: two of each
    class stay.
    """
    (_, of), (_, labels) = (np.unique(np.asarray(x), return_inverse=True) for x in (groups, labels))
    left, held = np.bincount(labels), np.zeros(len(labels), bool)
    members = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
    for group in np.random.default_rng(seed).permutation(len(members)):
        taken = np.bincount(labels[members[group]], minlength=len(left))
        if held.sum() + taken.sum() <= share * len(labels) and (left - taken)[taken > 0].min() > 1:
            held[members[group]] = True
            left -= taken
    return held


# ---- maps: what maps.py makes of a split, one row per image --------------------------------------


def write_maps(path, name, chunks, shape, dtype, header=None):
    """Stream chunks (b, g, g) of maps of this whole shape (n, g, g) into a file of one tensor,
    `name`.
    """
    write_rows(
        path,
        {name: (dtype, shape[1:])},
        shape[0],
        ({name: x} for x in chunks),
        lambda: header or {},
    )


def map_file(folder, name, split):
    """maps/NAME, "saliency", split -> maps/NAME/saliency.safetensors, or saliency-val.safetensors
    of split val.
    """
    own = split["header"].get("split", "train")
    return Path(folder) / f"{name}{'' if own == 'train' else '-' + own}.safetensors"


def open_map(path, name, split):
    """The map `name` of this split's images -> memory map (n, g, g): f16 attention, u8 saliency or
    u8 parts.

    path: the file, or its folder. Missing, of other images or of another shape: a UserError with
    the right command.
    """
    path = Path(path) if Path(path).suffix == ".safetensors" else map_file(path, name, split)
    folder, own = Path(split["images"].filename).parent, split["header"].get("split", "train")
    fix = f"python maps.py --data {shlex.quote(str(folder))} --map {name}"
    fix += "" if own == "train" else f" --split {own}"
    if not path.exists():
        raise UserError(f"no {name} maps at {path}: {fix} --out {path.parent} makes them")
    fix += f" --out OTHER makes those of {folder}"
    arrays, n = open_tensors(path), len(split["images"])
    about = arrays.pop("header")
    check_fields(about, MAPS | {"map": one_of(name)}, path, fix)
    if about["data_digest"] != fingerprint(split):
        raise UserError(
            f"{path} holds maps of another data set ({about.get('data')} {about.get('split')}), "
            f"or of this one packed otherwise; {fix}"
        )
    check_arrays(arrays, {name: f"{MAP_DTYPE[name]} n g g"}, path, fix, n=n, g=about["grid"])
    return arrays[name]


# ---- the loader: one prefetch thread, no worker processes ----------------------------------------


def resident(split, device):
    """The images as one tensor on a GPU if they fit in a quarter of its free memory, else the
    memory map as it is.
    """
    if device.type != "cuda" or split["images"].nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return split["images"]
    images = torch.empty(split["images"].shape, dtype=torch.uint8, device=device)
    for i in range(0, len(images), 4096):
        images[i : i + 4096] = torch.from_numpy(np.array(split["images"][i : i + 4096]))
    return images


def send(x, device):
    """A CPU tensor to the device, without waiting for it: only from pinned memory does a copy to a
    GPU not wait.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def take(images, index, device):
    """Rows index (i64, CPU) of a memory map or resident tensor -> u8 (B, S, S, 3) on device."""
    if isinstance(images, torch.Tensor):
        return images[send(index, device)]
    return send(torch.from_numpy(images[index.numpy()]), device)


def epoch_order(n, seed, epoch):
    """The order of the images in an epoch: the same for every strategy with this seed."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def batches(images, order, batch_size, device, start=0, rank_slice=slice(None), times=1):
    """Yield (index (B,), images u8 (B, S, S, 3) on device) from batch `start` on; the rest of n/B
    is left out.

    rank_slice: this process's slice of each batch; only those images are read, the index is the
    whole batch's. times: how often each image comes, one after the other, for several views of it.
    """
    chunks = order[: len(order) // batch_size * batch_size].split(batch_size)[start:]
    read = prefetch((index, take(images, index[rank_slice], device)) for index in chunks)
    return (tuple(x.repeat_interleave(times, 0) if times > 1 else x for x in pair) for pair in read)


def prefetch(items, depth=3):
    """Iterate over items, a thread making the next `depth` of them meanwhile; what it raises is
    raised here.

    On a CPU the items should be made without parallel torch operations: a second team of OpenMP
    threads makes the loop's own fall asleep between its operations, and a step take half as long
    again.
    """
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, items, end))
            yield item


# ---- views: crop, flip and resize as two matrix products -----------------------------------------


def draw_boxes(n, generator, min_area):
    """Random resized crops: boxes (n, 4) = top, left, height, width in [0, 1], and flips (n,) bool,
    drawn on the CPU.

    Area uniform in [min_area, 1], aspect log-uniform in [3/4, 4/3], as in He et al. 2021.
    """
    u = torch.rand(5, n, generator=generator)
    area, aspect = min_area + (1 - min_area) * u[0], torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    height, width = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    return torch.stack([u[2] * (1 - height), u[3] * (1 - width), height, width], 1), u[4] < 0.5


def full_boxes(n):
    """The whole image, unflipped: what evaluation and teachers see."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(n, 4), torch.zeros(n, dtype=torch.bool)


def resampling_matrix(start, length, n_in, n_out):
    """(B,) start and length of a crop in [0, 1] -> (B, n_out, n_in): row i holds the weights of
    output pixel i.

    A triangle filter as wide as the reduction (antialiased linear, the same as Pillow's BILINEAR);
    rows sum to 1.
    """
    step = length * n_in / n_out  # input pixels for one output pixel, (B,)
    centre = (
        (start * n_in)[:, None]
        + (torch.arange(n_out, device=start.device) + 0.5) * step[:, None]
        - 0.5
    )
    distance = torch.arange(n_in, device=start.device) - centre[:, :, None]  # (B, n_out, n_in)
    weight = (1 - distance.abs() / step.clamp(min=1)[:, None, None]).clamp(min=0)
    return weight / weight.sum(2, keepdim=True)


def view_matrices(boxes, flip, n_in, n_out):
    """boxes (B, 4), flip (B,) -> Wy (B, n_out, n_in), Wx (B, n_in, n_out): view = Wy @ image @ Wx."""
    Wy = resampling_matrix(boxes[:, 0], boxes[:, 2], n_in, n_out)
    Wx = resampling_matrix(boxes[:, 1], boxes[:, 3], n_in, n_out)
    Wx = torch.where(flip[:, None, None], Wx.flip(1), Wx)
    return Wy, Wx.transpose(1, 2)


def view_images(images, boxes, flip, side):
    """images u8 (B, S, S, 3) -> views u8 (B, side, side, 3) on the same device: what the kernels
    read.
    """
    B, S = images.shape[:2]
    Wy, Wx = view_matrices(boxes.to(images.device), flip.to(images.device), S, side)
    rows = (Wy @ images.flatten(2).float()).view(B, side, S, 3)
    view = rows.transpose(2, 3).reshape(B, side * 3, S) @ Wx  # (B, side*3, side)
    view = (
        view.view(B, side, 3, side).transpose(2, 3).contiguous()
    )  # the kernels read patch rows of 3p bytes
    return view.round_().clamp_(0, 255).to(torch.uint8)


def jitter_colour(images, draws, level):
    """images u8 (B, S, S, 3) -> with brightness, contrast and saturation times 1 +- level, by draws
    (B, 3) in [0, 1].

    Hue stays: it tells who it is.
    """
    if level == 0:
        return images
    light, contrast, saturation = (
        (1 - level + 2 * level * draws).to(images.device).T[..., None, None, None]
    )
    x = images.float()
    gray = (x * x.new_tensor(LUMA)).sum(3, keepdim=True)
    x = gray + saturation * (x - gray)
    mean = x.mean((1, 2, 3), keepdim=True)
    return ((mean + contrast * (x - mean)) * light).round().clamp(0, 255).to(torch.uint8)


def swap_backgrounds(view, fg, draws, share, views):
    """Views u8 (B, S, S, 3), a share of them with the background of another view.

    fg (B, S, S, 1): 1 on the figure, 0 on the background; draws (B,) in [0, 1] choose the views.
    Where the other view has its figure, its mean background colour stands. Then the figure alone
    tells whose view it is (BG_Random; Ryali et al. 2021, arXiv:2103.12719). `views` views of an
    image are neighbours in the batch, and get the backgrounds of different images.
    """
    if share == 0:
        return view
    x, bg = view.float(), 1 - fg
    colour = (bg * x).sum((1, 2), keepdim=True) / bg.sum((1, 2), keepdim=True).clamp(min=1e-3)
    background = (bg * x + fg * colour).round().to(torch.uint8)  # the figure is painted over
    background = background.roll(2 * views - 1, 0)
    mixed = (fg * x + bg * background).round().to(torch.uint8)
    swapped = (draws < share)[:, None, None, None]
    return torch.where(swapped, mixed, view)


def view_maps(maps, boxes, flip, side):
    """maps (B, G, G) of the whole images -> the same crops of them, fp32 (B, side, side): they
    follow the images.
    """
    Wy, Wx = view_matrices(boxes.to(maps.device), flip.to(maps.device), maps.shape[-1], side)
    return Wy @ maps.float() @ Wx


def evenly_spaced(n, most):
    """At most `most` of n rows, from the first to the last."""
    return torch.linspace(0, n - 1, min(n, most)).long()


def whole_views(images, rows, side, device):
    """Yield (index, view u8 (B, side, side, 3)) of the whole, uncropped images `rows` (i64), in
    order.
    """
    for index in rows.split(CHUNK):
        yield index, view_images(take(images, index, device), *full_boxes(len(index)), side)


def open_or_pack(path, image_size=128):
    """What --data names -> a packed folder: drawn (the demo set) or packed (images) first where it
    is not one yet.
    """
    path = Path(path)
    if (path / "train.safetensors").exists():
        return path
    from ingest.pack import (
        default_out,
        pack,
    )  # only now: the painter, archives and decoders are behind it

    if path.name in ("toon", "hybrid", "scenes") and not any(path.glob("*")):
        print(f"drawing {path} (once)")
        pack(path.name, path)
        return path
    out = default_out(path)
    if not (out / "train.safetensors").exists():
        pack(path, out, max(128, image_size))
    elif Path(open_split(out, "train")["header"]["source"]).resolve() != path.resolve():
        raise UserError(
            f"{out} was packed from another place; "
            f"python data.py {shlex.quote(str(path))} --out datasets/OTHER, then --data that"
        )
    return out
