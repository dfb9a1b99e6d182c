"""Stage 0: pack images into one tensor file per split; the loader and the views that feed every other stage.

    python data.py PATH --out datasets/NAME          PATH: a folder or zip of images, or the word toon (the demo set)

Reads:  a folder per class, or a flat folder without labels, or a zip of either; with or without train/val/test folders
Writes: datasets/NAME/{train,val,test}.safetensors (dev, too, if --dev asks for it):
        images u8 (n, S, S, 3), labels i64 (n), -1 without label; fg u8 (n, S, S), the figure's opacity, and parts u8 (n, S, S)
        where known. The header's "animask" entry is JSON: classes, keys, groups, what was skipped, and how it was made.

Packing streams (memory does not grow with the set) and reading maps the file: a batch is copied out of the page cache.
"""

import argparse
import contextlib
import io
import json
import math
import queue
import random
import re
import threading
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lab import toon
from plumbing import UserError, atomic, cli

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "dev", "test": "test"}
PAPER = (255, 255, 255)  # the flat colour under a transparent picture
DTYPES = {"U8": np.uint8, "I64": np.int64, "F16": np.float16}  # as safetensors names them
CHUNK = 64  # whole images at a time for teachers and evaluations: on a CPU 256 were four times slower than 64


# ---- sources: where the images are, and what their paths say -------------------------------------------------------


def open_source(path):
    """A folder or zip -> (keys, read): the images' paths inside it, sorted, and a function key -> bytes."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder or a zip of images, or the word toon for the demo set")
    if path.is_dir():
        keys, read = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()], folder_reader(path)
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        keys, read = [i.filename for i in archive.infolist() if not i.is_dir()], archive.read
    else:
        raise UserError(f"{path} is neither a folder nor a whole zip archive")
    keys = sorted(k for k in keys if is_image(k))
    if not keys:
        raise UserError(f"no image found in {path}; looked for {' '.join(sorted(SUFFIXES))} in it and its subfolders")
    return keys, read


def folder_reader(root):
    return lambda key: (root / key).read_bytes()


def is_image(key):
    """By its suffix; what macOS and editors leave behind (__MACOSX/._x.png, .thumbnails/) is not one."""
    return Path(key).suffix.lower() in SUFFIXES and not any(part.startswith((".", "__")) for part in key.split("/"))


def split_and_class(keys):
    """Paths -> [(split or None, class or None)]: [wrapper/][train|val|test/][class/]anything.png."""
    parts = [key.split("/")[:-1] for key in keys]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1 and parts[0][0].lower() not in SPLITS:
        parts = [p[1:] for p in parts]  # a zip often wraps everything in one folder
    given = all(p and p[0].lower() in SPLITS for p in parts)
    if given:
        return [(SPLITS[p[0].lower()], p[1] if len(p) > 1 else None) for p in parts]
    return [(None, p[0] if p else None) for p in parts]


def group_of(key, pattern):
    """What must not be torn apart by a split: the REGEX's first group in the file's stem, or else the whole path."""
    match = pattern and pattern.search(Path(key).stem)
    return (match.group(1) if match.groups() else match.group(0)) if match else key


def deal(rows, shares, seed):
    """Deal rows of (class, group) into shares {split: fraction}: stratified by class, groups whole -> [split].

    Groups come in a seeded random order, large ones first; each goes where its classes lack most.
    """
    members, owed = defaultdict(list), Counter()
    for i, (label, group) in enumerate(rows):
        members[group].append(i)
        for split, share in shares.items():
            owed[split, label] += share
    order = sorted(members)
    random.Random(seed).shuffle(order)
    split_of = [None] * len(rows)
    for group in sorted(order, key=lambda g: -len(members[g])):
        classes = Counter(rows[i][0] for i in members[group])
        split = max(shares, key=lambda s: sum(n * owed[s, c] for c, n in classes.items()))
        for i in members[group]:
            split_of[i] = split
        for c, n in classes.items():
            owed[split, c] -= n
    return split_of


def assign_splits(given, rows, shares, dev, seed):
    """Splits that came with the images stay; else rows of (class, group) are dealt. A missing val, and dev, leave train."""
    splits = list(given) if None not in given else deal(rows, shares, seed)
    for name, share in (("val", shares["val"]), ("dev", dev)):
        if share and name not in splits:
            train = [i for i, s in enumerate(splits) if s == "train"]
            for i, s in zip(train, deal([rows[i] for i in train], {"train": 1 - share, name: share}, seed), strict=True):
                splits[i] = s
    return splits


# ---- decoding ------------------------------------------------------------------------------------------------------


def decode(data, size, fg):
    """Bytes of an image file -> {"images": u8 (S, S, 3)[, "fg": u8 (S, S)]}: short side to S, centre square.

    A transparent image is resized with its colours weighted by its alpha (Pillow does that), then laid on PAPER.
    """
    with Image.open(io.BytesIO(data)) as img:
        if img.format == "JPEG":
            img.draft("RGB", (size * 2, size * 2))  # decodes at a fraction of the size, never below twice ours
        img = img.convert("RGBA" if has_alpha(img) else "RGB")
    scale = size / min(img.size)
    img = img.resize([max(size, round(side * scale)) for side in img.size], Image.Resampling.BICUBIC, reducing_gap=2.0)
    left, top = (img.width - size) // 2, (img.height - size) // 2
    img = img.crop((left, top, left + size, top + size))
    alpha = img.getchannel("A") if img.mode == "RGBA" else Image.new("L", img.size, 255)
    flat = Image.composite(img.convert("RGB"), Image.new("RGB", img.size, PAPER), alpha)
    return {"images": np.asarray(flat)} | ({"fg": np.asarray(alpha)} if fg else {})


def has_alpha(img):
    return img.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in img.info


def any_alpha(keys, read):
    """Do the images carry the figure's mask? Looks at the headers of up to 64 of them, evenly spread."""
    some, found = keys[:: max(1, len(keys) // 64)], 0
    for key in some:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(read(key))) as img:  # a broken one is named later
            found += has_alpha(img)
    return found * 2 > len(some)


def decoded(keys, read, size, fg):
    """Yield (key, row or the exception), in order, two threads or more at work: Pillow decodes outside the GIL."""

    def one(key):
        try:
            return decode(read(key), size, fg)
        except Exception as problem:  # decoders raise a dozen kinds for a broken file; it is skipped, counted and named
            return problem

    with ThreadPoolExecutor() as pool:
        for i in range(0, len(keys), 256):  # in chunks, so that results never pile up in memory
            yield from zip(keys[i : i + 256], pool.map(one, keys[i : i + 256]), strict=True)


def drawn(items, size):
    """The demo set: yield (key, row) of lab/toon.py's items, drawn by a process per core (Pillow draws inside the GIL)."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for item, row in zip(items, pool.map(toon.draw, items, [size] * len(items), chunksize=16), strict=True):
            yield item["key"], {"images": row["image"], "fg": row["fg"], "parts": row["parts"]}


# ---- packing -------------------------------------------------------------------------------------------------------


def write_split(path, rows, planes, size, keys, labels, groups, about):
    """Stream rows (key, {plane: array} or exception) into a safetensors file -> [(key, why)] of the skipped ones.

    The file is a header, then images, fg, parts, labels. Room for all keys is laid out first and every row goes straight
    to its place; if some were skipped, the later planes move up at the end; the header is written last, over its room.
    """
    shape = {p: (size, size, 3) if p == "images" else (size, size) for p in planes}
    stride = {p: math.prod(shape[p]) for p in planes}
    room = len(header_json(keys, groups, about, [])) + 2**17  # and space for the reasons of a hundred skipped files
    starts = [8 + room + len(keys) * before for before in np.cumsum([0, *stride.values()]).tolist()]
    kept, skipped = [], []
    with atomic(path) as temporary, open(temporary, "w+b") as f:
        for key, row in rows:
            if isinstance(row, Exception):
                skipped.append((key, " ".join(str(row).split())[:100] or type(row).__name__))
                continue
            for p, start in zip(planes, starts, strict=False):
                f.seek(start + len(kept) * stride[p])
                f.write(np.ascontiguousarray(row[p]).data)
            kept.append(key)
        check_skipped(path, skipped, len(keys))
        f.seek(close_gaps(f, [(start, len(kept) * stride[p]) for p, start in zip(planes, starts, strict=False)]))
        f.write(np.array([labels[k] for k in kept], "<i8").tobytes())
        f.truncate()
        f.seek(0)
        metadata = header_json(kept, groups, about, skipped)
        f.write(file_header(room, metadata, shape, len(kept)))
    return skipped


def header_json(keys, groups, about, skipped):
    """The "animask" entry of the header; groups are written only where they are not the keys themselves."""
    torn = any(groups[k] != k for k in keys)
    return json.dumps(about | {"keys": keys, "groups": [groups[k] for k in keys] if torn else None,
                               "skipped": len(skipped), "skipped_first": skipped[:100]})  # fmt: skip


def check_skipped(path, skipped, n):
    if len(skipped) > 0.05 * n:
        raise UserError(f"{len(skipped)} of {n} images for {path} can't be read, more than 5 %; the first: "
                        + "; ".join(f"{key} ({why})" for key, why in skipped[:3]))  # fmt: skip


def close_gaps(f, spans):
    """Move each (start, bytes) span up to the end of the one before it -> the end of the last."""
    end = spans[0][0]
    for start, count in spans:
        for i in range(0, count if start > end else 0, 2**24):
            f.seek(start + i)
            chunk = f.read(min(2**24, count - i))
            f.seek(end + i)
            f.write(chunk)
        end += count
    return end


def file_header(room, metadata, shape, n):
    """The head of a safetensors file: its length (u64), then JSON, padded with spaces to `room` bytes."""
    entries, at = {"__metadata__": {"animask": metadata}}, 0
    for name, dtype, dims, width in [*[(p, "U8", s, 1) for p, s in shape.items()], ("labels", "I64", (), 8)]:
        size = n * math.prod(dims) * width
        entries[name] = {"dtype": dtype, "shape": [n, *dims], "data_offsets": [at, at + size]}
        at += size
    return room.to_bytes(8, "little") + json.dumps(entries).encode().ljust(room)


def find_images(path, size, group_by):
    """PATH -> keys, [(split or None, class or None)], groups {key: group}, planes, and stream(keys) of decoded rows."""
    keys, read = open_source(path)
    try:
        pattern = re.compile(group_by) if group_by else None
    except re.error as problem:
        raise UserError(f"--group-by {group_by} is not a regular expression: {problem}") from None
    planes = ("images", "fg") if any_alpha(keys, read) else ("images",)
    groups = {k: group_of(k, pattern) for k in keys}
    return keys, split_and_class(keys), groups, planes, lambda some: decoded(some, read, size, "fg" in planes)


def find_toon(size, seed):
    """The same for the demo set, which is drawn instead of decoded."""
    items = {item["key"]: item for item in toon.plan(seed=seed)}
    found = [(None, key.split("/")[0]) for key in items]
    stream = lambda some: drawn([items[k] for k in some], size)  # noqa: E731
    return list(items), found, {k: k for k in items}, ("images", "fg", "parts"), stream


def pack(path, out, size=128, shares=(0.7, 0.1, 0.2), dev=0.0, seed=0, group_by=None):
    """Pack PATH into out/{train,val,test[,dev]}.safetensors and print what was done."""
    keys, found, groups, planes, stream = find_toon(size, seed) if str(path) == "toon" else find_images(path, size, group_by)
    classes = {k: c for k, (_, c) in zip(keys, found, strict=True)}
    names = sorted({c for c in classes.values() if c is not None})
    labels = {k: names.index(c) if c is not None else -1 for k, c in classes.items()}
    rows = [(classes[k], groups[k]) for k in keys]
    splits = assign_splits([s for s, _ in found], rows, dict(zip(("train", "val", "test"), shares, strict=True)), dev, seed)
    about = {"format": 1, "source": str(path), "classes": names, "size": size,
             "split_seed": seed, "split_shares": shares, "dev": dev, "group_by": group_by}  # fmt: skip
    for split in sorted(set(splits), key=["train", "dev", "val", "test"].index):
        own = [k for k, s in zip(keys, splits, strict=True) if s == split]
        bar = tqdm(stream(own), f"{Path(out).name}/{split}", len(own), unit="img", disable=None)
        skipped = write_split(Path(out) / f"{split}.safetensors", bar, planes, size, own, labels, groups, about | {"split": split})
        print(f"{out}/{split}.safetensors: {len(own) - len(skipped)} images of {size} px, {len(names)} classes"
              + (f"; skipped {len(skipped)}, the first: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""))  # fmt: skip


# ---- reading: a split is a dict of arrays that stay in the file ----------------------------------------------------


def open_tensors(path):
    """A safetensors file -> {name: memory map} and, as "header", the "animask" entry of its header."""
    try:
        with open(path, "rb") as f:
            room = int.from_bytes(f.read(8), "little")
            entries = json.loads(f.read(min(room, 2**30)))
        tensors = {"header": json.loads(entries.pop("__metadata__")["animask"])}
        for name, e in entries.items():
            tensors[name] = np.memmap(path, DTYPES[e["dtype"]], "r", 8 + room + e["data_offsets"][0], tuple(e["shape"]))
    except (OSError, ValueError, KeyError, OverflowError) as problem:
        reason = " ".join(str(problem).split())[:80]
        raise UserError(f"{path} is not a whole file of AniMask ({reason}); remove it and make it again") from None
    return tensors


def open_split(folder, name):
    """datasets/NAME, "train" -> {"images": u8 (n, S, S, 3) memory map, "labels": i64 (n), maybe "fg", "parts", "header"}."""
    path = Path(folder) / f"{name}.safetensors"
    if not path.exists():
        raise UserError(f"{path} does not exist; python data.py IMAGES --out {folder} makes it")
    split = open_tensors(path)
    if "images" not in split:
        raise UserError(f"{path} holds no images; python data.py IMAGES --out {folder} makes it")
    return split | {"labels": torch.from_numpy(np.array(split["labels"]))}


def write_rows(path, name, chunks, shape, dtype, header=None):
    """Stream chunks (b, ...) of one tensor of this whole shape into a safetensors file."""
    count = math.prod(shape) * DTYPES[dtype]().itemsize
    entry = {name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, count]}}
    head = json.dumps({"__metadata__": {"animask": json.dumps(header or {})}} | entry).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    with atomic(path) as temporary, open(temporary, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for chunk in chunks:
            f.write(np.ascontiguousarray(chunk).data)


def has_labels(split):
    return len(split["header"]["classes"]) > 1 and bool((split["labels"] >= 0).all())


def dataset_folder(data, image_size=128):
    """What --data names -> a packed folder: drawn (the demo set) or packed (images) first where it is not one yet."""
    path = Path(data)
    if (path / "train.safetensors").exists():
        return path
    if path.name == "toon" and not path.exists():
        print(f"drawing the demo set into {path} (once)")
        pack("toon", path)
        return path
    out = Path("datasets") / path.stem
    if not (out / "train.safetensors").exists():
        pack(path, out, max(128, image_size))
    elif open_split(out, "train")["header"]["source"] != str(data):
        raise UserError(f"{out} was packed from another place; python data.py {data} --out datasets/OTHER, then --data that")
    return out


# ---- the loader: one prefetch thread, no worker processes ----------------------------------------------------------


def resident(split, device):
    """The images as one tensor on a GPU if they fit in a quarter of its free memory, else the memory map as it is."""
    if device.type != "cuda" or split["images"].nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return split["images"]
    return torch.from_numpy(np.asarray(split["images"])).to(device)


def take(images, index, device):
    """Rows index (i64, CPU) of a memory map or resident tensor -> u8 (B, S, S, 3) on device."""
    if isinstance(images, torch.Tensor):
        return images[index.to(device)]
    batch = torch.from_numpy(images[index.numpy()])
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def epoch_order(n, seed, epoch):
    """The order of the images in an epoch: the same for every strategy with this seed."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def batches(images, order, batch_size, device, start=0):
    """Yield (index (B,), images u8 (B, S, S, 3) on device) from batch `start` on, read ahead; the rest of n/B is left out."""
    chunks = order[: len(order) // batch_size * batch_size].split(batch_size)[start:]
    return prefetch((index, take(images, index, device)) for index in chunks)


def prefetch(items, depth=2):
    """Iterate over items, a thread making the next `depth` of them meanwhile."""
    ready, done, stop = queue.Queue(depth), object(), threading.Event()

    def work():
        try:
            for item in items:
                while not stop.is_set():
                    with contextlib.suppress(queue.Full):
                        ready.put(item, timeout=0.1)
                        break
                if stop.is_set():
                    return
            ready.put(done)
        except Exception as problem:
            ready.put(problem)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()


# ---- views: crop, flip and resize as two matrix products -----------------------------------------------------------


def draw_boxes(n, generator, min_area):
    """Random resized crops: boxes (n, 4) = top, left, height, width in [0, 1], and flips (n,) bool, drawn on the CPU.

    Area uniform in [min_area, 1], aspect log-uniform in [3/4, 4/3], as in He et al. 2021.
    """
    u = torch.rand(5, n, generator=generator)
    area, aspect = min_area + (1 - min_area) * u[0], torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    height, width = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    return torch.stack([u[2] * (1 - height), u[3] * (1 - width), height, width], 1), u[4] < 0.5


def full_boxes(n):
    """The whole image, unflipped: what evaluation and teachers look at."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(n, 4), torch.zeros(n, dtype=torch.bool)


def resampling_matrix(start, length, n_in, n_out):
    """(B,) start and length of a crop in [0, 1] -> (B, n_out, n_in): row i holds the weights of output pixel i.

    A triangle filter as wide as the reduction (antialiased linear, the same as Pillow's BILINEAR); rows sum to 1.
    """
    step = length * n_in / n_out  # input pixels for one output pixel, (B,)
    centre = (start * n_in)[:, None] + (torch.arange(n_out, device=start.device) + 0.5) * step[:, None] - 0.5
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
    """images u8 (B, S, S, 3) -> views u8 (B, side, side, 3) on the same device: what the kernels read."""
    B, S = images.shape[:2]
    Wy, Wx = view_matrices(boxes.to(images.device), flip.to(images.device), S, side)
    rows = (Wy @ images.flatten(2).float()).view(B, side, S, 3)
    view = rows.transpose(2, 3).reshape(B, side * 3, S) @ Wx  # (B, side*3, side)
    view = view.view(B, side, 3, side).transpose(2, 3).contiguous()  # the kernels read patch rows of 3p bytes
    return view.round_().clamp_(0, 255).to(torch.uint8)


def view_maps(maps, boxes, flip, side):
    """maps (B, G, G) of the whole images -> the same crops of them, fp32 (B, side, side): they follow the images."""
    Wy, Wx = view_matrices(boxes.to(maps.device), flip.to(maps.device), maps.shape[-1], side)
    return Wy @ maps.float() @ Wx


def whole_views(images, rows, side, device):
    """Yield (index, view u8 (B, side, side, 3)) of the whole, uncropped images `rows` (i64), in order."""
    for index in rows.split(CHUNK):
        yield index, view_images(take(images, index, device), *full_boxes(len(index)), side)


# ---- command line --------------------------------------------------------------------------------------------------


def parse_shares(text):
    try:
        shares = [float(x) for x in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares, default=0) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
        raise UserError(f"--split {text} must be three shares for train,val,test that sum to 1, such as .7,.1,.2")
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", help="folder or zip of images, or the word toon for the demo set")
    parser.add_argument("--out", help="folder for the packed splits (default: datasets/ and the name of PATH)")
    parser.add_argument("--size", type=int, default=128, help="side of the packed images in pixels")
    parser.add_argument("--split", default=".7,.1,.2", help="shares of train,val,test where the source has no such folders")
    parser.add_argument("--dev", type=float, default=0.0, help="share of train held apart for choices, such as .1")
    parser.add_argument("--group-by", metavar="REGEX", help="files whose stems match alike stay in one split: '^[^_]+'")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the drawn demo set")
    args = parser.parse_args()
    out = args.out or f"datasets/{Path(args.path).stem}"
    if not 8 <= args.size <= 4096:
        raise UserError(f"--size {args.size} is not a side between 8 and 4096 pixels")
    if not 0 <= args.dev < 1:
        raise UserError(f"--dev {args.dev} is not a share in [0, 1)")
    if (Path(out) / "train.safetensors").exists():
        raise UserError(f"{out} is packed already; give another --out, or remove it first")
    pack(args.path, out, args.size, parse_shares(args.split), args.dev, args.seed, args.group_by)
    print(f"next: python pretrain.py --data {out}")


if __name__ == "__main__":
    cli(main)
