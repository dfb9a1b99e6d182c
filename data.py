"""Stage 0: pack images into one tensor file per split.

    python data.py PATH --out datasets/NAME          PATH: a folder or zip of images, or the word toon (the demo set)

Reads:  a folder per class, or a flat folder without labels, or a zip of either; with or without train/val/test folders
Writes: datasets/NAME/{train,val,test}.safetensors (dev, too, if --dev asks for it):
        images u8 (n, S, S, 3), labels i64 (n), -1 without label; where known fg u8 (n, S, S), the figure's opacity, and
        parts u8 (n, S, S). The header holds, as JSON, classes, keys, groups, what was skipped, and how it was made.

Packing streams: memory does not grow with the set. loader.py reads these files.
"""

import argparse
import contextlib
import io
import json
import math
import random
import re
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lab import toon
from loader import open_split
from plumbing import UserError, atomic, cli

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "dev", "test": "test"}
TOON_SHARES = (0.7, 0.15, 0.15)
PAPER = (255, 255, 255)  # the flat colour under a transparent picture


# ---- sources: where the images are, and what their paths say -------------------------------------------------------


def open_source(path):
    """A folder or zip -> (keys, read): the images' paths inside it, sorted, and a function key -> bytes."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder or a zip of images, or the word toon for the demo set")
    if path.is_dir():
        keys, read = ([p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()], folder_reader(path))
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
    """Given splits stay; else rows of (class, group) are dealt. A missing val, and dev, are taken out of train."""
    splits = list(given) if None not in given else deal(rows, shares, seed)
    for name, share in (("val", shares["val"]), ("dev", dev)):
        if share and name not in splits:
            train = [i for i, s in enumerate(splits) if s == "train"]
            for i, s in zip(
                train, deal([rows[i] for i in train], {"train": 1 - share, name: share}, seed), strict=True
            ):
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
    """The demo set: yield (key, row) of lab/toon.py's items, drawn by a process per core (drawing holds the GIL)."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for item, row in zip(items, pool.map(toon.draw, items, [size] * len(items), chunksize=16), strict=True):
            yield item["key"], {"images": row["image"], "fg": row["fg"], "parts": row["parts"]}


# ---- packing -------------------------------------------------------------------------------------------------------


def write_split(path, rows, planes, size, keys, labels, groups, about):
    """Stream rows (key, {plane: array} or exception) into a safetensors file -> [(key, why)] of the skipped ones.

    The file is a header, then images, fg, parts, labels. Room for all keys is laid out first and every row goes
    straight to its place; if some were skipped, the later planes move up at the end; the header comes last.
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
    keys, found, groups, planes, stream = (
        find_toon(size, seed) if str(path) == "toon" else find_images(path, size, group_by)
    )
    classes = {k: c for k, (_, c) in zip(keys, found, strict=True)}
    names = sorted({c for c in classes.values() if c is not None})
    labels = {k: names.index(c) if c is not None else -1 for k, c in classes.items()}
    rows = [(classes[k], groups[k]) for k in keys]
    splits = assign_splits(
        [s for s, _ in found], rows, dict(zip(("train", "val", "test"), shares, strict=True)), dev, seed
    )
    about = {"format": 1, "source": str(path), "classes": names, "size": size,
             "split_seed": seed, "split_shares": shares, "dev": dev, "group_by": group_by}  # fmt: skip
    for split in sorted(set(splits), key=["train", "dev", "val", "test"].index):
        own = [k for k, s in zip(keys, splits, strict=True) if s == split]
        bar = tqdm(stream(own), f"{Path(out).name}/{split}", len(own), unit="img", disable=None)
        skipped = write_split(
            Path(out) / f"{split}.safetensors", bar, planes, size, own, labels, groups, about | {"split": split}
        )
        lost = f"; skipped {len(skipped)}, the first: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        print(f"{out}/{split}.safetensors: {len(own) - len(skipped)} images of {size} px, {len(names)} classes{lost}")


# ---- command line ----------------------------------------------------------------------------------------------------


def dataset_folder(data, image_size=128):
    """What --data names -> a packed folder: drawn (the demo set) or packed (images) first where it is not one yet."""
    path = Path(data)
    if (path / "train.safetensors").exists():
        return path
    if path.name == "toon" and not path.exists():
        print(f"drawing the demo set into {path} (once)")
        pack("toon", path, shares=TOON_SHARES)
        return path
    out = Path("datasets") / path.stem
    if not (out / "train.safetensors").exists():
        pack(path, out, max(128, image_size))
    elif open_split(out, "train")["header"]["source"] != str(data):
        raise UserError(
            f"{out} was packed from another place; python data.py {data} --out datasets/OTHER, then --data that"
        )
    return out


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
    parser.add_argument(
        "--split", default=".7,.1,.2", help="shares of train,val,test where the source has no such folders"
    )
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
