"""The packing half of data.py: images -> one tensor file per split.

Reads:  whatever ingest/sources.py can read: folders and archives with a folder per class, tables,
        published data sets
Writes: datasets/NAME/{train,val,test}.safetensors (dev, too, if --dev asks for it):
        images u8 (n, S, S, 3), labels i64 (n), -1 without label; where known fg u8 (n, S, S), the
        foreground's opacity,
        parts u8 (n, S, S), tags i32 (n, T), ids of words of the header's "tags", -1 fills up, style
        u8 (n, 3), the demo
        set's strata; there tags are thinned out, as people file pictures, and all_tags i32 (n, T)
        are the truth;
        boxes f32 (n, K, 4) of faces, x1, y1, x2, y2 in shares of the picture, -1 fills up; of pages
        heads, too.
        The header holds, as JSON, classes, keys, groups, tags, style, what was skipped, and how it
        was made.

Packing streams: memory holds what is known of each picture, and some 250 bytes more while copies
are looked for (their thumbnails lie on the disk, a kilobyte each). The files are written into a folder
aside, which is renamed at the end: a packing that fails or is killed leaves no set at all.
data.py reads them.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from common import fields
from common.command import (
    Parser,
    at_least,
    between,
    claim,
    progress,
    refuse_file,
    refuse_idle,
    refuse_overwrite,
)
from common.io import UserError, lock_beside, locked, open_tensors
from ingest import duplicates, layouts, sources, tags, toon
from ingest.decode import count_alpha, decode, reason
from ingest.rows import write_rows
from ingest.splits import assign_splits, hold_out_test, large_enough, long_tailed, without_copies

SHARES, TOON_SHARES = (
    (0.7, 0.1, 0.2),
    (0.7, 0.15, 0.15),
)  # of train, val, test; the demo set has small classes
CROPS = ("centre", "figure")
DRAWN = ("toon", "hybrid", "scenes")  # what a painter makes
LARGE = 256  # side of packed pages; of other pictures SIDE
SIDE = 128
DTYPE = {
    "tags": "I32",
    "all_tags": "I32",
    "boxes": "F32",
    "heads": "F32",
}  # of planes; others are U8
WRITTEN = ("test", "val", "dev", "train")
TOO_BROKEN = 0.05  # of the pictures: where more can't be read, the set is not what it seems
ROOM, PAINT = (
    2**28,
    256,
)  # bytes of decoded pictures at a time; bytes that the painter takes for a pixel


def decode_records(records, fetch, work, at_once=16):
    """Yield (record, work(record, bytes) or the exception), in order, on threads: Pillow decodes
    without the GIL.
    """

    def one(item):
        record, load = item
        try:
            return record, work(record, load())
        except MemoryError:
            fix = "close other programs, or give a smaller --size"
            raise UserError(f"memory is full while {record.key} is read; {fix}") from None
        # decoders raise a dozen kinds for a broken file; it is skipped, counted and named
        except Exception as problem:
            return record, problem

    items = iter(fetch(records))
    with ThreadPoolExecutor() as pool:
        waiting = deque(pool.submit(one, item) for item in islice(items, at_once))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(one, item) for item in islice(items, 1))
            yield done


def render(records, draw, size, dims, processes):
    """Yield (record, planes) of what draw(item, size) makes, by a process per core (drawing holds
    the GIL).
    """
    items = [r.place for r in records]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            rows = pool.map(draw, items, [size] * len(items), chunksize=16)
            for r, row in zip(records, rows, strict=True):
                style = np.array(
                    [toon.STRATA[k].index(v) for k, v in row.get("style", {}).items()], np.uint8
                )
                yield r, {p: (row | {"images": row["image"], "style": style})[p] for p in dims}
        except BrokenProcessPool:
            problem = f"a process that draws was killed: memory may be full; --size {size} is large"
            raise UserError(problem) from None


def at_once(size, each, most):
    """How many pictures of this size, `each` bytes a pixel, memory holds at the same time, up to
    `most`.
    """
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if hasattr(os, "sysconf")
        else 2**33
    )
    with contextlib.suppress(ImportError):  # Windows has no limits to ask for
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        memory = limit if 0 < limit < memory else memory
    if (fit := memory // (each * size**2)) < 1:
        raise UserError(
            f"--size {size} takes {each * size**2 / 2**30:.1f} GB of memory for one picture, and there are "
            f"{memory / 2**30:.1f}; --size {math.isqrt(memory // each)} fits"
        )
    return int(min(fit, most))


# ---- packing -------------------------------------------------------------------------------------


def write_split(path, rows, dims, records, labels, about):
    """Stream rows (record, {plane: array} or exception) into a safetensors file -> [(key, why)] of
    the skipped ones.

    The file is a header, then images, fg, parts, ..., labels. dims is {plane: shape of one row}.
    """
    kept, skipped, pixels = [], [], hashlib.blake2b(digest_size=6)

    def readable():
        for record, row in rows:
            if isinstance(row, Exception):
                skipped.append((record.key, reason(row)))
                continue
            kept.append(record)
            pixels.update(np.ascontiguousarray(row["images"]).data)
            yield {p: row[p][None] for p in dims} | {"labels": np.array([labels[record.label]])}

    def header(records, **more):
        groups = (
            [r.group for r in records] if any(r.group != r.key for r in records) else None
        )  # None: the keys
        more |= {"keys": [r.key for r in records], "groups": groups}
        return about | more | {"skipped": len(skipped), "skipped_first": skipped[:100]}

    planes = {p: (DTYPE.get(p, "U8"), shape) for p, shape in dims.items()} | {"labels": ("I64", ())}
    room = (
        len(json.dumps(json.dumps(header(records)))) + 2**18
    )  # reasons for a hundred skipped files

    def end():
        return header(kept, pixels=pixels.hexdigest())

    write_rows(path, planes, len(records), readable(), end, room)
    return skipped


def check_skipped(out, skipped, n, most):
    """Stop where more than a share `most` of n images can't be read."""
    if len(skipped) > most * n:
        first = "; ".join(f"{key} ({why})" for key, why in skipped[:3])
        raise UserError(
            f"{len(skipped)} of {n} images for {out} can't be read, more than {100 * most:g} % "
            f"(--max-broken SHARE allows more); the first: {first}"
        )


def open_images(path, size, crop, margin, boxes, layout):
    """-> records, notes, dims {plane: shape of one row}, fetch, stream(records) of decoded rows,
    more of the header.
    """
    records, fetch, notes = sources.find(path, boxes, layout)
    print("\n".join(notes), flush=True)
    found, tried = count_alpha(records, fetch)
    fg = found * 2 > tried
    rest = (
        "of the others all is foreground"
        if fg
        else "they are laid on white: too few for foreground masks"
    )
    if found:
        notes.append(
            f"alpha: {found} of {tried} images that were looked at have transparent pixels"
            + f"; {rest}" * (not fg or found < tried)
        )
        print(notes[-1])
    dims = {"images": (size, size, 3)} | ({"fg": (size, size)} if fg else {})

    def work(r, data):
        return decode(data, size, fg, r.box, crop, margin)

    chunk = at_once(size, 32, min(16, max(1, ROOM // (4 * size**2))))
    return records, notes, dims, fetch, lambda some: decode_records(some, fetch, work, chunk), {}


def open_toon(size, seed, tail=0.0, drawings=None):
    """The same for the demo set, which is drawn instead of decoded; it has no copies to look for."""
    processes = at_once(size, PAINT, os.cpu_count() or 1)
    items = toon.plan(n=drawings or toon.COUNT, seed=seed, tail=tail)
    records = [
        sources.Record(i["key"], i, i["key"].split("/")[0], tags=toon.describe(i)["tags"])
        for i in items
    ]
    dims = {
        "images": (size, size, 3),
        "fg": (size, size),
        "parts": (size, size),
        "style": (len(toon.STRATA),),
    }
    more = {"style": toon.STRATA, "parts": toon.PARTS}
    return (
        records,
        [],
        dims,
        None,
        lambda some: render(some, toon.draw, size, dims, processes),
        more,
    )


def open_hybrid(size, seed):
    """The same for frames that are drawn, photographed, or both; its photographs are in one split
    each.
    """
    from ingest import hybrid

    processes = at_once(size, PAINT, os.cpu_count() or 1)
    draw = partial(
        hybrid.draw,
        photos={s: hybrid.open_photos(s) for s in hybrid.COUNTS},
        colours=hybrid.palettes(seed),
    )
    records = [sources.Record(i["key"], i, i["kind"], split=i["split"]) for i in hybrid.plan(seed)]
    dims = {"images": (size, size, 3), "drawn": (size, size), "style": (len(toon.STRATA),)}
    notes = [f"{kind}: {text}" for kind, text in hybrid.KINDS.items()]
    notes += [
        f"photograph {name}, from {of}, for {split}: {by}"
        for name, (of, split, by) in hybrid.PHOTOS.items()
    ]
    more = {"style": toon.STRATA, "hybrid": {"mixed": hybrid.MIXED, "purely": hybrid.PURELY}}
    return records, notes, dims, None, lambda some: render(some, draw, size, dims, processes), more


def open_scenes(size, seed):
    """The same for pages with drawn figures, and boxes of their faces."""
    from ingest import scenes

    records = [sources.Record(i["key"], i, split=i["split"]) for i in scenes.plan(seed)]
    dims = {"images": (size, size, 3), "boxes": (scenes.MOST, 4), "heads": (scenes.MOST, 4)}
    processes = at_once(size, PAINT, os.cpu_count() or 1)
    return (
        records,
        [],
        dims,
        None,
        lambda some: render(some, scenes.draw, size, dims, processes),
        {},
    )


def open_boxes(path, size):
    """The same for pictures with boxes: all of each picture, filled up to a square."""
    from ingest import boxes

    records, fetch, notes, shares = boxes.find(path)
    print("\n".join(notes), flush=True)
    most, clipped = max(1, *(len(r.box) for r in records)), []
    dims = {"images": (size, size, 3), "boxes": (most, 4)}

    def work(r, data):
        return boxes.decode(data, size, r.box, most, shares, clipped)

    chunk = at_once(size, 32, min(16, max(1, ROOM // (4 * size**2))))

    def stream(some):
        clipped.clear()
        yield from decode_records(some, fetch, work, chunk)
        if any(clipped):
            print(
                f"{sum(clipped)} boxes reached out of their pictures, and were cut off or left out",
                flush=True,
            )

    return records, notes, dims, fetch, stream, {}


def near_duplicates(records, fetch, dedupe, out):
    """Pairs (i, j) of near-duplicate records, and lines that tell of them; nothing where --dedupe
    is off.

    The thumbnails lie in a file without a name, on the disk of `out`: a million of them are a
    gigabyte.
    """
    if dedupe == "off" or fetch is None:
        return [], []
    place = {r.key: i for i, r in enumerate(records)}  # a tar has an order of its own
    rows = decode_records(records, fetch, lambda r, data: duplicates.thumbnail(data))
    with tempfile.TemporaryFile(
        dir=next(p for p in Path(out).resolve().parents if p.is_dir())
    ) as file:
        thumbs = np.memmap(
            file, np.uint8, "w+", shape=(len(records), duplicates.SIDE, duplicates.SIDE)
        )
        for record, row in progress(rows, "looking for copies", len(records), unit="img"):
            if not isinstance(row, Exception):  # what can't be read stays blank
                thumbs[place[record.key]] = row
        pairs = duplicates.pairs(thumbs)
    return pairs, duplicates.report(records, pairs)


def check_source(path, records, args):
    """Flags that do nothing where the source brings its own splits; and a source without a train."""
    brings = {r.split for r in records}
    if None not in brings and "train" not in brings:
        fix = "name one train, or give a --layout with - for split to have them dealt"
        raise UserError(f"{path} brings {' and '.join(sorted(brings))}, but no train; {fix}")
    idle = set()
    if None not in brings and "val" in brings:
        idle |= {"split"} if path in DRAWN or "dev" in args.given else {"split", "seed"}
    if "dev" in brings:
        idle.add("dev")
    if "val" not in brings or "test" in brings:
        idle.add("test")
    refuse_idle(args.given & idle, f"beside the splits that {path} brings, which are kept")
    if None in brings:
        refuse_idle(args.given & {"keep_copies"}, "without splits that the source brings")
    if not any(r.tags for r in records):
        tag_flags = {"min_per_tag", "tag_importance", "emoticons"}
        refuse_idle(args.given & tag_flags, f"on {path}, which has no tags")


def pack(path, out, **flags):
    """Pack PATH into the folder `out`, as the command does: pack("toon", "datasets/toon", seed=1)."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    pack_as_told(parse_args([str(path), "--out", str(out), *words]))


def pack_as_told(args):
    """The same by parsed flags, while no other process writes the folder."""
    refuse_file(args.out)
    with locked(lock_beside(args.out)):
        with contextlib.suppress(OSError):
            os.rmdir(args.out)  # an empty folder is not in the way
        refuse_overwrite([args.out])
        write_set(args)


def write_set(args):
    """Pack args.path into args.out/{train,val,test[,dev]}.safetensors and print what was done."""
    path, out = args.path, args.out
    size = args.size or (LARGE if args.detect or path == "scenes" else SIDE)
    shares = args.split or (TOON_SHARES if path == "toon" else SHARES)
    source = open_source(args, size)
    records, notes, dims, fetch, stream, more = source
    check_source(path, records, args)
    refuse_full_disk(out, dims, len(records), size)
    pairs, told = near_duplicates(records, fetch, args.dedupe, out)
    records, dropped = without_copies(records, args.group_by, pairs, args.dedupe, args.keep_copies)
    records, few = large_enough(records, args.min_per_class)
    rows = [(r.label, r.group) for r in records]
    named = dict(zip(("train", "val", "test"), shares, strict=True))
    splits = assign_splits([r.split for r in records], rows, named, args.dev, args.seed)
    splits = hold_out_test(splits, [r.group for r in records], args.test)
    records = [r._replace(split=s) for r, s in zip(records, splits, strict=True)]
    thinned = []
    if args.tail and path != "toon":
        records, thinned = long_tailed(records, args.tail)
    words, left_out = tags.vocabulary(
        records, args.min_per_tag, args.tag_importance, args.emoticons
    )
    dims, stream = tags.add_planes(words, records, dims, stream, thin=path == "toon")
    told += dropped + few + thinned + left_out
    told += too_few_to_deal(splits, named | {"dev": args.dev}, source[0])
    print("\n".join(told), end="\n" * bool(told), flush=True)
    classes = sorted({r.label for r in records} - {None})
    for name in classes:
        if not fields.is_name(name):
            fix = f"give 1 to {fields.LETTERS} printable letters"
            raise UserError(f"the class {fields.short(name)} is no name; {fix}")
    about = {
        "format": 1,
        "source": path,
        "classes": classes,
        "size": size,
        "split_seed": args.seed,
        "split_shares": shares,
        "dev": args.dev,
        "test": args.test,
        "tail": args.tail,
        "group_by": args.group_by,
        "crop": args.crop,
        "margin": args.margin,
        "dedupe": args.dedupe,
        "min_per_class": args.min_per_class,
        "tags": words,
        "notes": notes + told,
        "style": None,
        "parts": None,
    } | more
    write_all(out, records, dims, stream, args.max_broken, about)


def open_source(args, size):
    """What open_toon, open_hybrid, open_scenes, open_boxes or open_images gives of the path."""
    if args.path == "toon":
        return open_toon(size, args.seed, args.tail, args.drawings)
    if args.path == "hybrid":
        return open_hybrid(size, args.seed)
    if args.path == "scenes":
        return open_scenes(size, args.seed)
    if args.detect:
        return open_boxes(args.path, size)
    return open_images(args.path, size, args.crop, args.margin, args.boxes, args.layout)


def too_few_to_deal(splits, shares, records):
    """A line for a split that was asked for and got no picture; of splits that the source brings
    only val is dealt.
    """
    dealt = ("val", "dev") if records[0].split else shares
    lost = [s for s in shares if shares[s] and s in dealt and s not in splits]
    return (
        [f"no picture is left for {' and '.join(lost)}: {len(splits)} are too few"] if lost else []
    )


# ---- files: all of them, or none -----------------------------------------------------------------


def refuse_full_disk(out, dims, n, size):
    """Say before the work that the files will not fit."""
    free = shutil.disk_usage(next(p for p in Path(out).resolve().parents if p.is_dir())).free
    if (need := n * sum(map(math.prod, dims.values()))) > free:
        raise UserError(
            f"{out} takes {need / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free there; --size "
            f"{int(0.99 * size * math.sqrt(free / need))} fits"
        )


@contextlib.contextmanager
def written_aside(out):
    """A folder beside `out`, which gets its name at the end: a set is there whole, or not at all."""
    folder = Path(out).with_name(f".{Path(out).name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a packing that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_all(out, records, dims, stream, max_broken, about):
    """One file per split, all or none; a split of which nothing can be read is none."""
    labels = {name: i for i, name in enumerate(about["classes"])} | {None: -1}
    lost, told = [], []
    with written_aside(out) as folder:
        for split in WRITTEN:
            if own := [r for r in records if r.split == split]:
                path = Path(out) / f"{split}.safetensors"
                rows = progress(stream(own), f"{Path(out).name}/{split}", len(own), unit="img")
                skipped = write_split(
                    folder / path.name, rows, dims, own, labels, about | {"split": split}
                )
                lost += skipped
                check_skipped(out, lost, len(records), max_broken)
                if len(skipped) == len(own):
                    first = f"the first: {skipped[0][0]} ({skipped[0][1]})"
                    raise UserError(f"none of {len(own)} images for {path} can be read; {first}")
                why = (
                    f"; skipped {len(skipped)}, the first: {skipped[0][0]} ({skipped[0][1]})"
                    if skipped
                    else ""
                )
                told.append(
                    f"{path}: {len(own) - len(skipped)} images of {about['size']} px, "
                    f"{len(about['classes'])} classes{why}"
                )
    print("\n".join(fields.shown(line) for line in told))


# ---- command line --------------------------------------------------------------------------------


def default_out(path):
    """images/ -> datasets/images; set.tar.gz -> datasets/set."""
    name = Path(path).resolve().name
    return Path("datasets") / (name if Path(path).is_dir() else name.split(".")[0])


def parse_shares(text):
    try:
        shares = [float(x) for x in text.split(",")]
    except ValueError:
        shares = []
    are_shares = len(shares) == 3 and all(0 <= x <= 1 for x in shares)
    if not (are_shares and shares[0] > 0 and abs(sum(shares) - 1) <= 1e-6):
        wanted = "three shares for train,val,test that sum to 1, such as 0.7,0.1,0.2"
        raise UserError(f"--split {text} must be {wanted}")
    return shares


def regex(text):
    try:
        return re.compile(text).pattern
    except re.error as problem:
        raise UserError(f"--group-by {text} is not a regular expression: {problem}") from None


def pattern(text):
    layouts.parse_layout(text)
    return text


def is_packed(folder):
    return (Path(folder) / "train.safetensors").exists()


def show(args):
    """--show: of a packed folder a sheet of what is in it, of other images the figure's crop beside
    the centre's.
    """
    path = (
        Path(args.path) / "sheet.png"
        if is_packed(args.path)
        else Path(f"{default_out(args.path)}_crops.png")
    )
    claim([path], fix="move it away")
    from common import plots  # heavy: only when a picture is asked for
    from data import open_split
    from ingest import sheet

    if is_packed(args.path):
        names = [
            n
            for n in ("train", "dev", "val", "test")
            if (Path(args.path) / f"{n}.safetensors").exists()
        ]
        sheet.dataset_sheet(path, args.path, {n: open_split(args.path, n) for n in names})
        return f"{path} written; next: {to_learn(args.path)}"
    records, fetch, _ = sources.find(args.path, args.boxes, "-")

    def both(r, data):
        return [
            decode(data, args.size or SIDE, False, r.box, c, args.margin)["images"] for c in CROPS
        ]

    some = records[:: math.ceil(len(records) / 12)]
    rows = progress(decode_records(some, fetch, both), "cropping", len(some), unit="img")
    pictures = [row for _, row in rows if isinstance(row, list)]  # of each image one by each crop
    if not pictures:
        raise UserError(f"none of the images of {args.path} that were tried can be read")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        (f"--crop {c}", np.stack(p))
        for c, p in zip(CROPS, zip(*pictures, strict=True), strict=True)
    ]
    plots.image_grid(path, "What --crop keeps", rows)
    return f"{path} written; next: python data.py {shlex.quote(args.path)}, with --crop figure if its row is better"


def to_learn(out):
    """The command that learns from a packed set: by its own foreground masks, and on a split that
    it has.
    """
    tensors = open_tensors(Path(out) / "train.safetensors")
    have = [s for s in ("val", "test", "dev") if (Path(out) / f"{s}.safetensors").exists()]
    if "boxes" in tensors:
        return shlex.join(["python", "detect.py", "weights/toon", "--data", str(out)])
    words = ["python", "pretrain.py", "--data", str(out)]
    words += ["--mask", "fg_heavy"] if "fg" in tensors else []
    words += ["--split", have[0]] if have and have[0] != "val" else []
    if not have:
        return "pack it again with a val: pretrain.py needs one, to evaluate on"
    few = (
        "; probe.py and finetune_lora.py need labels of two classes or more"
        if len(tensors["header"]["classes"]) < 2
        else ""
    )
    return shlex.join(words) + few


def parse_args(words=None):
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "path",
        help="folder, zip, tar, csv, tsv or jsonl of images, - for a list of files, or toon, the\n"
        "demo set, hybrid, frames that are drawn, photographed or both, or scenes, pages with faces",
    )
    add(
        "--detect",
        action="store_true",
        help="PATH has boxes of faces: a COCO file, a csv of picture,x1,y1,x2,y2, a\n"
        "folder in Pascal VOC's or YOLO's layout",
    )
    add("--out", help="folder for the packed splits (default: datasets/ and the name of PATH)")
    add(
        "--show",
        action="store_true",
        help="draw a sheet of a packed folder, or of the crops of images; pack nothing",
    )
    add(
        "--layout",
        type=pattern,
        metavar="PATTERN",
        help="what the folders say, from the outside: split, class or - (nothing), such as split/-/class;\n"
        "- alone: no labels (default: found, and told)",
    )
    add(
        "--size",
        type=between(8, 4096, int),
        help=f"side of the packed images in pixels (default: {SIDE}; of pages\n{LARGE})",
    )
    add(
        "--crop",
        choices=CROPS,
        default="centre",
        help="the centre square, or the figure by its box, alpha or colours",
    )
    add(
        "--margin",
        type=between(0, 2),
        default=0.1,
        help="room around the figure, as a share of it on each side",
    )
    add("--boxes", metavar="FILE", help="lines of: path x1 y1 x2 y2 in pixels, for --crop figure")
    default = f"(default: {SHARES}; toon: {TOON_SHARES})"
    add(
        "--split",
        type=parse_shares,
        help=f"shares of train,val,test where the source does not give them {default}",
    )
    add(
        "--dev",
        type=between(0, 0.99),
        default=0.0,
        help="share of train held apart for choices, such as 0.1",
    )
    add(
        "--test",
        type=between(0, 0.99),
        default=0.0,
        help="share of val held apart as test, by illustration, where the source gives val alone",
    )
    add(
        "--group-by",
        type=regex,
        metavar="REGEX",
        help="files whose stems match alike stay in one split: '^[^_]+'",
    )
    add(
        "--dedupe",
        nargs="?",
        const="drop",
        default="group",
        choices=("group", "drop", "off"),
        help="near-duplicates stay in one split, and leave the val and test that the source gives (group);\n"
        "one of them stays (drop, the bare flag); or off",
    )
    add(
        "--keep-copies",
        action="store_true",
        help="copies that cross the splits of the source stay, as published",
    )
    add(
        "--max-broken",
        type=between(0, 1),
        default=TOO_BROKEN,
        metavar="SHARE",
        help=f"of pictures that can't be read, at most; they are skipped (default: {TOO_BROKEN:g})",
    )
    add(
        "--min-per-class",
        type=at_least(0),
        default=0,
        metavar="N",
        help="leave out classes with fewer images",
    )
    add(
        "--min-per-tag",
        type=at_least(1),
        default=2,
        metavar="N",
        help="tags on fewer pictures of train are left out",
    )
    add(
        "--tag-importance",
        type=between(0, 1e9),
        default=0.0,
        metavar="X",
        help="and those with no more of it; 0.2 is MFDN's (default: 0, not asked)",
    )
    add("--emoticons", action="store_true", help="keep tags such as :d and ^_^")
    add(
        "--tail",
        type=between(0, 5),
        default=0.0,
        help="class sizes follow rank^-TAIL; of pictures in train alone",
    )
    add(
        "--drawings",
        type=at_least(1),
        metavar="N",
        help=f"toon only: how many (default: {toon.COUNT})",
    )
    add("--seed", type=at_least(0), default=0, help="of the split and of the drawn demo set")
    words = iter(sys.argv[1:] if words is None else words)  # argparse takes -/class for a flag
    args = parser.parse_args(
        [f"--layout={next(words, '')}" if w == "--layout" else w for w in words]
    )
    check(args)
    return args


def check(args):
    """Flags that do not go together; those that the source decides about are left to check_source."""
    if args.show and args.path in (*DRAWN, "-"):
        raise UserError(f"--show needs a folder or an archive, not {args.path}; pack it first")
    if args.out == "":
        raise UserError("--out is empty; give a folder")
    if args.path == "-" and not args.out:
        raise UserError("a list on standard input has no name; give --out datasets/NAME")
    task, takes = uses_of(args)
    refuse_idle(args.given - set(takes.split()), task)
    if args.crop != "figure" and not args.show:
        refuse_idle(args.given & {"margin", "boxes"}, "without --crop figure")
    if args.dedupe != "group":
        refuse_idle(args.given & {"keep_copies"}, f"with --dedupe {args.dedupe}")


def uses_of(args):
    """-> in words, and names of flags: what is done with the path, and what that has a use for."""
    dealing = "out size split dev test seed"
    words = "min_per_class min_per_tag tag_importance emoticons"
    copies = "group_by dedupe keep_copies max_broken"
    if args.show and is_packed(args.path):
        return "with --show of a packed set", "show"
    if args.show:
        return "with --show, which packs nothing", "show size margin boxes"
    if args.path in DRAWN:
        more = "tail drawings" if args.path == "toon" else ""
        return f"on {args.path}, which is drawn", f"{dealing} {words} {more}"
    if args.detect:
        return "with --detect", f"detect {dealing} {copies}"
    source = Path(args.path)
    by_folders = args.path == "-" or not source.exists()
    by_folders = by_folders or sources.reader_of(source) in sources.BY_FOLDERS
    layout = "layout" if by_folders else ""
    return f"on {args.path}", f"{dealing} {words} {copies} {layout} crop margin boxes tail"


def main():
    args = parse_args()
    if args.show:
        return print(show(args))
    args.out = args.out or str(default_out(args.path))
    pack_as_told(args)
    look = f"python data.py --show {shlex.quote(args.out)}"
    print(f"{args.out} is packed; next: {look}, or {to_learn(args.out)}")
