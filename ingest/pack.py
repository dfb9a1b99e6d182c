"""The packing half of data.py: images -> one tensor file per split.

Reads:  whatever ingest/sources.py can read: folders and archives with a folder per class, tables, published data sets
Writes: datasets/NAME/{train,val,test}.safetensors (dev, too, if --dev asks for it):
        images u8 (n, S, S, 3), labels i64 (n), -1 without label; where known fg u8 (n, S, S), the foreground's opacity,
        parts u8 (n, S, S), tags u8 (n, T), 1 where the picture has the tag, style u8 (n, 3), the demo set's strata.
        The header holds, as JSON, classes, keys, groups, tags, style, what was skipped, and how it was made.

Packing streams: memory does not grow with the pictures, but for about 5 KB each while copies are looked for
(--dedupe off for dumps of millions). data.py reads these files.
"""

import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from common.command import Parser, at_least, between, progress
from common.io import UserError, write_rows
from ingest import duplicates, sources, toon
from ingest.decode import any_alpha, decode
from ingest.splits import assign_splits, crossing, drop_copies, join_groups, large_enough

SHARES, TOON_SHARES = (0.7, 0.1, 0.2), (0.7, 0.15, 0.15)  # of train, val, test; the demo set has small classes
CROPS = ("centre", "figure")
MOST_TAGS = 512  # the most frequent ones make the vocabulary: a Danbooru dump has 400,000, most of them once


def decode_records(records, fetch, work):
    """Yield (record, work(record, bytes) or the exception), in order, on threads: Pillow decodes without the GIL."""

    def one(item):
        record, load = item
        try:
            return record, work(record, load())
        except Exception as problem:  # decoders raise a dozen kinds for a broken file; it is skipped, counted and named
            return record, problem

    items = iter(fetch(records))
    with ThreadPoolExecutor() as pool:
        while some := list(islice(items, 64)):  # in chunks, so that results never pile up in memory
            yield from pool.map(one, some)


def render_toon(records, size):
    """The demo set: yield (record, planes), drawn by a process per core (drawing holds the GIL)."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        items = [r.place for r in records]
        for r, row in zip(records, pool.map(toon.draw, items, [size] * len(items), chunksize=16), strict=True):
            style = np.array([toon.STRATA[k].index(v) for k, v in row["style"].items()], np.uint8)
            yield r, {"images": row["image"], "fg": row["fg"], "parts": row["parts"], "style": style}


# ---- packing -------------------------------------------------------------------------------------------------------


def write_split(path, rows, dims, records, labels, about):
    """Stream rows (record, {plane: array} or exception) into a safetensors file -> [(key, why)] of the skipped ones.

    The file is a header, then images, fg, parts, ..., labels. dims is {plane: shape of one row}.
    """
    kept, skipped, pixels = [], [], hashlib.blake2b(digest_size=6)

    def readable():
        for record, row in rows:
            if isinstance(row, Exception):
                skipped.append((record.key, " ".join(str(row).split())[:100] or type(row).__name__))
                continue
            kept.append(record)
            pixels.update(np.ascontiguousarray(row["images"]).data)
            yield {p: row[p][None] for p in dims} | {"labels": np.array([labels[record.label]])}

    def header(records, **more):
        groups = [r.group for r in records] if any(r.group != r.key for r in records) else None  # None: the keys
        more |= {"keys": [r.key for r in records], "groups": groups}
        return about | more | {"skipped": len(skipped), "skipped_first": skipped[:100]}

    planes = {p: ("U8", shape) for p, shape in dims.items()} | {"labels": ("I64", ())}
    room = len(json.dumps(json.dumps(header(records)))) + 2**18  # reasons for a hundred skipped files
    end = lambda: header(kept, pixels=pixels.hexdigest())  # noqa: E731
    write_rows(path, planes, len(records), readable(), end, room)
    return skipped


def check_skipped(out, skipped, n):
    if len(skipped) > 0.05 * n:
        first = "; ".join(f"{key} ({why})" for key, why in skipped[:3])
        raise UserError(f"{len(skipped)} of {n} images for {out} can't be read, more than 5 %; the first: {first}")


def open_images(path, size, crop, margin, boxes):
    """-> records, notes, dims {plane: shape of one row}, fetch, and stream(records) of decoded rows."""
    records, fetch, notes = sources.find(path, boxes)
    fg = any_alpha(records, fetch)
    dims = {"images": (size, size, 3)} | ({"fg": (size, size)} if fg else {})
    work = lambda r, data: decode(data, size, fg, r.box, crop, margin)  # noqa: E731
    return records, notes, dims, fetch, lambda some: decode_records(some, fetch, work)


def open_toon(size, seed, tail=0.0):
    """The same for the demo set, which is drawn instead of decoded; it has no copies to look for."""
    items = toon.plan(seed=seed, tail=tail)
    records = [sources.Record(i["key"], i, i["key"].split("/")[0], tags=toon.describe(i)["tags"]) for i in items]
    dims = {"images": (size, size, 3), "fg": (size, size), "parts": (size, size), "style": (3,)}
    return records, [], dims, None, lambda some: render_toon(some, size)


def near_duplicates(records, fetch, dedupe):
    """Pairs (i, j) of near-duplicate records, and lines that tell of them; nothing where --dedupe is off."""
    if dedupe == "off" or fetch is None:
        return [], []
    with tempfile.TemporaryFile() as f:  # takes no memory; of a file that can't be read the thumbnail stays blank
        thumbs = np.memmap(f, np.uint8, "w+", shape=(len(records), duplicates.SIDE, duplicates.SIDE))
    place = {r.key: i for i, r in enumerate(records)}  # a tar has an order of its own
    rows = decode_records(records, fetch, lambda r, data: duplicates.thumbnail(data))
    for record, row in progress(rows, "looking for copies", len(records), unit="img"):
        if not isinstance(row, Exception):
            thumbs[place[record.key]] = row
    pairs = duplicates.pairs(thumbs)
    return pairs, duplicates.report(records, pairs)


def add_tags(records, dims, stream):
    """The vocabulary (most frequent first, MOST_TAGS at most), and dims and stream with a multi-hot plane "tags"."""
    count = Counter(t for r in records for t in r.tags)
    words = sorted(count, key=lambda t: (-count[t], t))[:MOST_TAGS]
    column = {t: i for i, t in enumerate(words)}

    def tagged(some):
        for r, row in stream(some):
            if not isinstance(row, Exception):
                row["tags"] = np.zeros(len(words), np.uint8)
                row["tags"][[column[t] for t in r.tags if t in column]] = 1
            yield r, row

    return (words, dims | {"tags": (len(words),)}, tagged) if words else (words, dims, stream)


def pack(path, out, size=128, shares=None, dev=0.0, seed=0, group_by=None, crop="centre", margin=0.1,
         boxes=None, least=0, dedupe="group", tail=0.0):  # fmt: skip
    """Pack PATH into out/{train,val,test[,dev]}.safetensors and print what was done."""
    is_toon = str(path) == "toon"
    shares = shares or (TOON_SHARES if is_toon else SHARES)
    source = open_toon(size, seed, tail) if is_toon else open_images(path, size, crop, margin, boxes)
    records, notes, dims, fetch, stream = source
    pairs, told = near_duplicates(records, fetch, dedupe)
    notes += told
    if dedupe == "drop":
        stay = drop_copies(records, pairs)
        notes.append(f"{len(records) - len(stay)} copies dropped")
        records, pairs = [records[i] for i in stay], []
    records, few = large_enough(join_groups(records, group_by, pairs), least)
    rows, named = [(r.label, r.group) for r in records], dict(zip(("train", "val", "test"), shares, strict=True))
    splits = assign_splits([r.split for r in records], rows, named, dev, seed)
    records = [r._replace(split=s) for r, s in zip(records, splits, strict=True)]
    words, dims, stream = add_tags(records, dims, stream)
    notes += few + crossing(records)
    classes = sorted({r.label for r in records} - {None})
    about = {"format": 1, "source": str(path), "classes": classes, "size": size, "split_seed": seed,
             "split_shares": shares, "dev": dev, "tail": tail, "group_by": group_by, "crop": crop, "margin": margin,
             "dedupe": dedupe, "min_per_class": least, "tags": words, "notes": notes,
             "style": toon.STRATA if is_toon else None, "parts": toon.PARTS if is_toon else None}  # fmt: skip
    print("\n".join(notes), end="\n" * bool(notes))
    write_all(out, records, classes, dims, stream, about)


def write_all(out, records, classes, dims, stream, about):
    """One file per split; train comes last, because where it stands a data set is whole. All or none are left."""
    labels = {name: i for i, name in enumerate(classes)} | {None: -1}
    paths, lost = {split: Path(out) / f"{split}.safetensors" for split in ("test", "val", "dev", "train")}, []
    for path in paths.values():  # what a packing that was killed has left
        path.unlink(missing_ok=True)
    try:
        for split, path in paths.items():
            if own := [r for r in records if r.split == split]:
                bar = progress(stream(own), f"{Path(out).name}/{split}", len(own), unit="img")
                skipped = write_split(path, bar, dims, own, labels, about | {"split": split})
                lost += skipped
                check_skipped(out, lost, len(records))
                if len(skipped) == len(own):  # few of all, but nothing is left of this split
                    check_skipped(path, skipped, len(own))
                told = f"; skipped {len(skipped)}, the first: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
                print(f"{path}: {len(own) - len(skipped)} images of {about['size']} px, {len(classes)} classes{told}")
    except BaseException:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise


# ---- command line ----------------------------------------------------------------------------------------------------


def default_out(path):
    """images/ -> datasets/images; set.tar.gz -> datasets/set."""
    name = Path(path).resolve().name
    return Path("datasets") / (name if Path(path).is_dir() else name.split(".")[0])


def parse_shares(text):
    try:
        shares = [float(x) for x in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares, default=0) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
        raise UserError(f"--split {text} must be three shares for train,val,test that sum to 1, such as .7,.1,.2")
    return shares


def regex(text):
    try:
        return re.compile(text).pattern
    except re.error as problem:
        raise UserError(f"--group-by {text} is not a regular expression: {problem}") from None


def show(args, out):
    """--show: of a packed folder a sheet of what is in it, of other images the figure's crop beside the centre's."""
    from common import plots  # heavy: only when a picture is asked for
    from data import open_split

    if (Path(args.path) / "train.safetensors").exists():
        names = [n for n in ("train", "dev", "val", "test") if (Path(args.path) / f"{n}.safetensors").exists()]
        path = Path(args.path) / "sheet.png"
        plots.dataset_sheet(path, args.path, {n: open_split(args.path, n) for n in names})
    else:
        records, fetch, _ = sources.find(args.path, args.boxes)
        both = lambda r, data: [decode(data, args.size, False, r.box, c, args.margin)["images"] for c in CROPS]  # noqa: E731
        rows = decode_records(records[:: math.ceil(len(records) / 12)], fetch, both)
        pictures = [row for _, row in rows if isinstance(row, list)]  # of each image one by each crop
        if not pictures:
            raise UserError(f"none of the images of {args.path} that were tried can be read")
        path = Path(f"{out}_crops.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(f"--crop {c}", np.stack(p)) for c, p in zip(CROPS, zip(*pictures, strict=True), strict=True)]
        plots.image_grid(path, "What --crop keeps", rows)
    print(f"{path} written")


def main():
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", help="folder, zip, tar, csv, tsv or jsonl of images, - for a list of files, or toon, the demo set")
    add("--out", help="folder for the packed splits (default: datasets/ and the name of PATH)")
    add("--show", action="store_true", help="draw a sheet of a packed folder, or of the crops of images; pack nothing")
    add("--size", type=between(8, 4096, int), default=128, help="side of the packed images in pixels")
    add("--crop", choices=CROPS, default="centre", help="the centre square, or the figure by its box, alpha or colours")
    add("--margin", type=between(0, 2), default=0.1, help="room around the figure, as a share of it on each side")
    add("--boxes", metavar="FILE", help="lines of: path x1 y1 x2 y2 in pixels, for --crop figure")
    default = f"(default: {SHARES}; toon: {TOON_SHARES})".replace("0.", ".")
    add("--split", type=parse_shares, help=f"shares of train,val,test where the source does not give them {default}")
    add("--dev", type=between(0, 0.99), default=0.0, help="share of train held apart for choices, such as .1")
    add("--group-by", type=regex, metavar="REGEX", help="files whose stems match alike stay in one split: '^[^_]+'")
    add("--dedupe", nargs="?", const="drop", default="group", choices=("group", "drop", "off"),
        help="near-duplicates stay in one split (group), one of them stays (drop, the bare flag), or off")  # fmt: skip
    add("--min-per-class", type=at_least(0), default=0, metavar="N", help="leave out classes with fewer images")
    add("--tail", type=between(0, 5), default=0.0, help="toon only: class sizes follow rank^-TAIL; 0 is balanced")
    add("--seed", type=at_least(0), default=0, help="of the split and of the drawn demo set")
    args = parser.parse_args()
    if args.tail and args.path != "toon":
        raise UserError(f"--tail {args.tail:g} is for the demo set: python data.py toon")
    if args.path == "-" and not args.out:
        raise UserError("a list on standard input has no name; give --out datasets/NAME")
    out = args.out or default_out(args.path)
    if args.show:
        return show(args, out)
    if (Path(out) / "train.safetensors").exists():
        raise UserError(f"{out} is packed already; give another --out, or remove it first")
    pack(args.path, out, args.size, args.split, args.dev, args.seed, args.group_by, args.crop,
         args.margin, args.boxes, args.min_per_class, args.dedupe, args.tail)  # fmt: skip
    print(f"next: python data.py --show {out}, or python pretrain.py --data {out}")
