"""The packing half of data.py: images -> one tensor file per split.

Reads:  whatever ingest/sources.py can read: folders and archives with a folder per class, tables,
        published data sets
Writes: datasets/NAME/duplicates.csv, the near-duplicates that were found, by their paths
        datasets/NAME/{train,val,test}.safetensors (dev, too, if --dev asks for it):
        images u8 (n, S, S, 3)    labels i64 (n), -1 without label
        fg u8 (n, S, S)           opacity of the foreground, where it is known
        parts u8 (n, S, S)        of the demo set; style u8 (n, 4), its strata
        drawn u8 (n, S, S)        of the hybrid set: how much of a pixel is drawn; 255 is all
        tags i32 (n, T)           ids of words of the header's "tags", -1 fills up. The demo set's
                                  are thinned out, as people file pictures; all_tags is the truth
        boxes f32 (n, K, 4)       faces, x1, y1, x2, y2 in shares of the picture, -1 fills up
        unknown.safetensors has pictures of other characters: folders unknown/, others/, --unknown
        The header holds classes, keys, groups, tags, style, what was skipped, and how it was made.

Packing streams: memory holds what is known of each picture, and some 250 bytes more while copies
are looked for (their thumbnails lie on the disk, a kilobyte each). The files are written into a folder
aside, which is renamed at the end: a packing that fails or is killed leaves no set at all.
data.py reads them.
"""

import contextlib
import hashlib
import math
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from common import door as fields
from common.door import aside, one_line, save_csv
from common.locks import lock_beside, locked, reserve
from common.rows import write_rows
from common.train import (
    Parser,
    UserError,
    at_least,
    between,
    open_tensors,
    parse_keys,
    progress,
    quoted,
    refuse_overwrite,
    refuse_useless,
    set_defaults,
)
from ingest import boxes, duplicates, files, hybrid, layouts, scenes, sources, tags, toon
from ingest.decode import LONG, PACKED, WARNED, decode, decode_records, look_at, reason
from ingest.splits import (
    assign_splits,
    hold_out_test,
    join_groups,
    large_enough,
    long_tailed,
    without_copies,
)

SHARES = (0.7, 0.1, 0.2)  # of train, val, test
TOON_SHARES = (0.7, 0.15, 0.15)  # the demo set has small classes
CROPS = {"centre": {}, "figure": {"margin": 0.1}}
LARGE = 256  # of packed pages
DEDUPE = ("group", "drop", "keep", "off")
# Flags that stand in the header.
AS_GIVEN = ("dev", "test", "tail", "group_by", "dedupe", "min_per_class", "min_importance")
EACH = 10  # pictures of a row of --show
UNKNOWN = "unknown"  # the file of pictures that show nobody who should be known
DTYPE = {"tags": "I32", "all_tags": "I32", "boxes": "F32"}  # others are U8
SMALL = 3000  # pictures of somebody's own set: of fewer, each should be learned
ONE_COLOUR = 8  # levels of 256 by which the pixels of such a picture differ, at most
MAX_BROKEN = 0.05  # of the pictures: where more can't be read, the set is not what it seems
REASONS = 2**18  # bytes of a header for a hundred skipped files

# What a source gives. dims: {plane: shape of one row}; fetch: for thumbnails, None where all is
# drawn; stream(records) yields (record, {plane: row} or exception); more: of the header.
Source = namedtuple("Source", "records notes dims fetch stream more", defaults=({},))


def render(records, draw, size, dims):
    """Yield (record, planes) of what draw(item, size) makes, by processes: drawing holds the GIL."""
    items = [r.place for r in records]
    try:
        workers = min(8, os.cpu_count() or 1)  # each has a torch of its own
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            rows = pool.map(draw, items, [size] * len(items), chunksize=16)
            for record, row in zip(records, rows, strict=True):
                strata = [toon.STRATA[k].index(v) for k, v in row.get("style", {}).items()]
                planes = row | {"images": row["image"], "style": np.array(strata, np.uint8)}
                yield record, {plane: planes[plane] for plane in dims}
    except (BrokenProcessPool, OSError) as problem:  # on Linux, the latter is of /dev/shm
        fix = f"memory or /dev/shm may be full, or not for you; --size {size} is large"
        raise UserError(f"processes that draw can't work ({one_line(problem)}): {fix}") from None


# ---- sources -------------------------------------------------------------------------------------


def open_images(flags, size):
    """Pictures, cut as --crop says; their alpha is the foreground where most have some."""
    records, fetch, notes = sources.find(flags.path, flags.layout, flags.names)
    if flags.unknown:
        records, fetch, more = with_others(records, fetch, flags.unknown, flags.path)
        notes += more
    crop, margin = flags.crop
    transparent, long, tried = look_at(records, fetch)
    fg = transparent * 2 > tried
    if crop == "centre" and long * 2 > tried and not any(record.box for record in records):
        what = f"{long} of {tried} images that were looked at have one side over {LONG:g} times the other"
        notes.append(f"crop: {what}; their centre may miss the head: see Crops in docs/data.md")
    if transparent:
        use = "alpha is the foreground" if fg else "too few for masks, so they are laid on white"
        looked = f"{transparent} of {tried} images that were looked at have transparent pixels"
        notes.append(f"alpha: {looked}; {use}")
    dims = {"images": (size, size, 3)} | ({"fg": (size, size)} if fg else {})

    def work(record, data):
        return decode(data, size, fg, record.box, crop, margin)

    return Source(records, notes, dims, fetch, partial(decode_records, fetch=fetch, work=work))


def with_others(records, fetch, path, source):
    """Records and fetch of two sources: all pictures of `path` show nobody; and a line.

    path may lie in the folder `source`, whose records hold its pictures, too, under other keys.
    """

    def files_of(some, folder):
        root = os.path.realpath(sources.folder_of(folder))
        return [os.path.normpath(os.path.join(root, str(r.place))) for r in some]

    others, fetch_others, notes = sources.find(path, layout=())
    own = {Path(path, r.key).as_posix(): r for r in others}
    others = [r._replace(key=key, label=UNKNOWN) for key, r in own.items()]

    def fetch_both(some):
        yield from fetch([r for r in some if r.key not in own])
        yield from fetch_others([r for r in some if r.key in own])

    twice = {*files_of(others, path)}
    pairs = zip(records, files_of(records, source), strict=True)
    stay = [r for r, file in pairs if r.key not in own and file not in twice]
    notes = [f"--unknown {path}: {line}" for line in (f"{len(others)} pictures", *notes[1:])]
    return stay + others, fetch_both, notes


def open_boxes(flags, size):
    """Pictures with boxes: all of each picture, filled up to a square."""
    records, fetch, notes, shares = boxes.find(flags.path)
    most = max(1, *(len(r.box) for r in records))

    def work(record, data):
        return boxes.decode(data, size, record.box, most, shares)

    dims = {"images": (size, size, 3), "boxes": (most, 4)}
    return Source(records, notes, dims, fetch, partial(decode_records, fetch=fetch, work=work))


def drawn(records, draw, size, planes, **more):
    """A source that is drawn instead of decoded; it has no copies to look for."""
    dims = {"images": (size, size, 3)} | planes
    stream = partial(render, draw=draw, size=size, dims=dims)
    return Source(records, [], dims, None, stream, more)


def open_toon(flags, size):
    n, characters = flags.drawings or toon.COUNT, flags.characters or toon.CHARACTERS
    items = toon.plan(n=n, characters=characters, seed=flags.seed, tail=flags.tail)
    records = [
        sources.Record(i["key"], i, i["who"]["name"], tags=toon.describe(i)["tags"]) for i in items
    ]
    planes = {"fg": (size, size), "parts": (size, size), "style": (len(toon.STRATA),)}
    return drawn(records, toon.draw, size, planes, style=toon.STRATA, parts=toon.PARTS)


def open_hybrid(flags, size):
    """Frames that are drawn, photographed or both; each photograph is in one split alone."""
    photos = {split: hybrid.open_photos(split) for split in hybrid.COUNTS}
    draw = partial(hybrid.draw, photos=photos, colours=hybrid.palettes(flags.seed))
    items = hybrid.plan(flags.seed)
    records = [sources.Record(i["key"], i, i["kind"], split=i["split"]) for i in items]
    planes = {"drawn": (size, size), "style": (len(toon.STRATA),)}
    kinds = {"mixed": hybrid.MIXED, "purely": hybrid.PURELY}
    return drawn(records, draw, size, planes, style=toon.STRATA, hybrid=kinds)


def open_scenes(flags, size):
    """Pages with drawn figures, and boxes of their faces."""
    items = scenes.plan(flags.seed)
    records = [sources.Record(i["key"], i, split=i["split"]) for i in items]
    return drawn(records, scenes.draw, size, {"boxes": (scenes.MOST, 4)})


DRAWN = {"toon": open_toon, "hybrid": open_hybrid, "scenes": open_scenes}


def open_source(flags, size):
    """What is drawn, or the pictures at the path, with or without boxes."""
    if flags.path in DRAWN:
        source = DRAWN[flags.path](flags, size)
    elif flags.detect:
        source = open_boxes(flags, size)
    else:
        source = open_images(flags, size)
    refuse_useless(flags.given & flags_without_effect(flags, source.records), "on these pictures")
    for line in source.notes:
        print(line, flush=True)
    return source


def flags_without_effect(flags, records):
    """-> names of the flags that nothing reads here: a folder has no code page, a page no class."""
    is_drawn = flags.path in DRAWN
    is_toon = flags.path == "toon"
    has_crop = not is_drawn and not flags.detect
    reader, name = sources.reader_of(flags.path, flags.layout) if has_crop else (None, "drawn")
    splits = {r.split for r in records}  # that the source brings: then pictures are not dealt
    deals = "val" not in splits
    read = (  # flags, and whether anything reads them
        ("drawings characters", is_toon),
        ("tail", is_toon or has_crop),
        ("detect group_by dedupe", not is_drawn),
        ("crop unknown", has_crop),
        ("layout", name is None),
        ("names", reader is files.open_zip),
        ("min_per_class", not flags.detect),
        ("min_importance", is_toon or has_crop),
        ("split", deals),
        ("seed", deals or "dev" in flags.given or is_drawn),
        ("dev", "dev" not in splits),
        ("test", "val" in splits and "test" not in splits),
    )
    return {name for names, effect in read if not effect for name in names.split()}


# ---- who goes where ------------------------------------------------------------------------------


def near_duplicates(records, fetch, dedupe, out):
    """Pairs (i, j) of near-duplicate records, and notes; nothing where --dedupe is off.

    The thumbnails lie in a file without a name, on the disk of `out`: a million are a gigabyte.
    """
    if dedupe == "off" or fetch is None:
        return [], []
    place = {r.key: i for i, r in enumerate(records)}  # a tar has an order of its own
    rows = decode_records(records, fetch, lambda r, data: duplicates.thumbnail(data))
    shape = (len(records), duplicates.SIDE, duplicates.SIDE)
    with tempfile.TemporaryFile(dir=Path(out).resolve().parent) as file:
        # Written as a file, and mapped privately: disks in a network may have no shared maps.
        file.truncate(math.prod(shape))
        for record, row in progress(rows, "looking for copies", len(records), unit="img"):
            if not isinstance(row, Exception):  # what can't be read stays blank
                file.seek(place[record.key] * row.nbytes)
                file.write(row.tobytes())
        file.flush()
        thumbs = np.memmap(file, np.uint8, "c", shape=shape)
        pairs = duplicates.pairs(thumbs)
        judged = duplicates.judge(thumbs, records, pairs)
    return pairs, duplicates.report(records, pairs, judged)


def deal(source, pairs, how, shares):
    """-> the records that stay, each with its split, and lines that tell what was left out."""
    records, dropped = without_copies(source.records, how["group_by"], pairs, how["dedupe"])
    records, too_small = large_enough(records, how["min_per_class"])
    rows = [(r.label, r.group) for r in records]
    named = dict(zip(("train", "val", "test"), shares, strict=True))
    splits = assign_splits([r.split for r in records], rows, named, how["dev"], how["seed"])
    splits = hold_out_test(splits, [r.group for r in records], how["test"])
    records = [r._replace(split=s) for r, s in zip(records, splits, strict=True)]
    records, others = others_apart(records)
    splits = {r.split for r in records}
    notes = dropped + too_small + others
    if "train" not in splits:
        line = "no train: stages can measure on this set, not learn from it"
        if any(r.split for r in source.records):  # and not by --split 0,0,1
            line += "; to have them dealt, give a --layout with - for split"
        notes.append(line)
    notes += unlearned(records) + spelled_alike(records)
    if how["tail"] and how["path"] != "toon":
        records, thinned = long_tailed(records, how["tail"])
        notes += thinned
    asked = named | {"dev": how["dev"]}
    dealt = ("val", "dev") if any(r.split for r in source.records) else asked
    lost = [name for name in asked if asked[name] and name in dealt and name not in splits]
    if lost:
        why = f"{len(records)} are too few"
        [(_, most)] = Counter(r.group for r in records).most_common(1)
        if most > 1 and most * 2 > len(records):
            why = f"{most} of {len(records)} are one group: copies (--dedupe off), or of one --group-by"
        notes.append(f"no picture is left for {' and '.join(lost)}: {why}")
    return records, notes


def others_apart(records):
    """Records whose label says nobody get a file of their own and no label; and lines.

    A copy of somebody's picture is left out. Where nobody has another label, nothing changes.
    """
    labels = {r.label for r in records} - {None}
    names = {label for label in labels if layouts.shows_nobody(label)}
    people = [r for r in records if r.label not in names]
    vague = sorted(filter(layouts.is_vague, labels))
    notes = []
    if vague:
        fix = f"name the folder {UNKNOWN} if it shows nobody who should be known"
        notes.append(f"learned as characters, vague as they are: {layouts.first(vague, 5)}; {fix}")
    if not names or not labels - names:
        return records, notes
    groups = {r.group for r in people if r.label is not None}
    others = [r for r in records if r.label in names]
    stay = [r._replace(label=None, split=UNKNOWN) for r in others if r.group not in groups]
    use = "they are no character, but fit what is called unknown; give another name to one who is"
    notes.append(f"{len(stay)} pictures show nobody ({', '.join(sorted(names))}): {use}")
    copies = [r.key for r in others if r.group in groups]
    what = "unknown pictures are copies of somebody's, and left out"
    return people + stay, notes + layouts.counted(sorted(copies), what)


def unlearned(records):
    """-> a line on the classes that train has too few pictures of."""
    inside = Counter(r.label for r in records if r.split == "train")
    labels = {r.label for r in records} - {None}
    rare = sorted(label for label in labels if inside[label] < 2)
    fix = "finetune_lora.py does not learn them; --min-per-class 3 leaves small ones out"
    what = "classes have fewer than two pictures in train"
    return layouts.counted(rare, what, fix) if inside else []


def spelled_alike(records):
    """-> a line on classes that differ in case, spaces and underscores alone."""
    alike = defaultdict(list)
    for label in sorted({r.label for r in records} - {None}):
        alike[re.sub(r"[\s_-]+", " ", label.casefold()).strip()].append(label)
    twice = [" and ".join(names) for names in alike.values() if len(names) > 1]
    line = f"classes that are spelled alike: {layouts.first(twice)}; give one character one name"
    return [line] if twice else []


# ---- packing -------------------------------------------------------------------------------------


def pack(path, out, **flags):
    """Pack PATH into the folder `out`, as the command does: pack("toon", "datasets/toon", seed=1)."""
    words = [str(path), "--out", str(out)]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag}={value}")
    write_set(parse_flags(words))


def write_set(flags):
    """Pack a source, while no other process writes OUT: a stage that packs first goes on for hours."""
    source, out = (Path(path).resolve() for path in (flags.path, flags.out))
    is_there = flags.path not in (*DRAWN, "-") and source.exists()
    if is_there and source.is_relative_to(out):  # nobody should remove that
        fix = f"python data.py {quoted(flags.path)} --out datasets/OTHER packs them elsewhere"
        raise UserError(f"{flags.out} holds the pictures themselves; {fix}")
    with locked(lock_beside(flags.out)):
        with contextlib.suppress(OSError):
            os.rmdir(flags.out)  # an empty folder is not in the way
        refuse_overwrite([flags.out])
        write_splits(flags)


def write_splits(flags):
    """Write OUT/{train,val,test[,dev]}.safetensors and print what was done."""
    path = flags.path
    large = path == "scenes" or flags.detect
    size = flags.size or (LARGE if large else PACKED)
    source = open_source(flags, size)
    WARNED.clear()  # of another source
    how = vars(flags)
    shares = how["split"] or (TOON_SHARES if path == "toon" else SHARES)
    # Mistakes show now, and not after the search for copies, which reads every picture.
    class_names(large_enough(source.records, how["min_per_class"])[0])
    join_groups(source.records, how["group_by"], [])
    pairs, lines = near_duplicates(source.records, source.fetch, how["dedupe"], how["out"])
    records, more = deal(source, pairs, how, shares)
    lines += more
    words, left_out = tags.vocabulary(records, how["min_importance"])
    dims, stream = tags.add_planes(words, records, source.dims, source.stream, path == "toon")
    lines += left_out
    for line in lines:
        print(line, flush=True)
    about = {"format": 1, "source": path, "classes": class_names(records), "size": size}
    about |= {"split_seed": how["seed"], "split_shares": shares}
    about |= dict(zip(("crop", "margin"), how["crop"], strict=True))
    about |= {name: how[name] for name in AS_GIVEN}
    about |= {"tags": words, "notes": source.notes + lines, "style": None, "parts": None}
    copies = duplicates.rows(source.records, pairs, records, sources.folder_of(path))
    write_all(how["out"], records, dims, stream, about | source.more, copies)


def class_names(records):
    """Sorted; a UserError for one that is no name."""
    names = sorted({r.label for r in records} - {None})
    for name in names:
        if not fields.is_name(name):
            fix = f"give 1 to {fields.LETTERS} printable letters"
            raise UserError(f"the class {fields.short(name)} is no name; {fix}")
    return names


# ---- files: all of them, or none -----------------------------------------------------------------


def write_split(path, rows, dims, records, labels, about):
    """Stream rows (record, {plane: array} or exception) into a file.

    -> [(key, why)] of skipped ones, and keys of pictures that have one colour. The file is a header,
    then images, fg, parts, ..., labels. dims is {plane: shape of one row}.
    """
    kept, skipped, plain = [], [], []
    pixels = hashlib.blake2b(digest_size=6)

    def readable():
        for record, row in rows:
            if isinstance(row, Exception):
                skipped.append((record.key, reason(row)))
                continue
            kept.append(record)
            if np.ptp(row["images"].reshape(-1, 3), 0).max() < ONE_COLOUR:
                plain.append(record.key)
            label = np.array([labels[record.label]], np.int64)
            planes = {p: row[p][None] for p in dims} | {"labels": label}
            for plane in planes.values():  # a corrected label or box makes another set, too
                pixels.update(np.ascontiguousarray(plane).data)
            yield planes

    def header():
        some = kept or records  # before the first row: of all, so that there is room for it
        keys, groups = [r.key for r in some], [r.group for r in some]
        own = {"keys": keys, "groups": None if groups == keys else groups}
        own |= {"pixels": pixels.hexdigest(), "skipped": len(skipped)}
        return about | own | {"skipped_first": skipped[:100]}

    planes = {p: (DTYPE.get(p, "U8"), shape) for p, shape in dims.items()} | {"labels": ("I64", ())}
    write_rows(path, planes, len(records), readable(), header, REASONS)
    return skipped, plain


def write_all(out, records, dims, stream, about, copies):
    """One file per split, all or none; stops where too many pictures, or a whole split, are broken.

    copies: rows of duplicates.csv.
    """
    classes = about["classes"]
    labels = {name: i for i, name in enumerate(classes)} | {None: -1}
    lost, lines = [], []
    with aside(out) as folder:  # a set is there whole, or not at all
        folder.mkdir()
        if copies:
            save_csv(copies, folder / "duplicates.csv")
        for split in (UNKNOWN, *reversed(layouts.ORDER)):
            own = [r for r in records if r.split == split]
            if not own:
                continue
            path = Path(out) / f"{split}.safetensors"
            rows = progress(stream(own), f"{Path(out).name}/{split}", len(own), unit="img")
            header = about | {"split": split}
            skipped, plain = write_split(folder / path.name, rows, dims, own, labels, header)
            lost += skipped
            first = "; ".join(f"{key} ({why})" for key, why in skipped[:3])
            if len(lost) > MAX_BROKEN * len(records) or len(skipped) == len(own):
                broken = f"{len(lost)} of {len(records)} images can't be read"
                broken += f", and {len(skipped)} of {len(own)} for {path}"
                raise UserError(f"{broken}; move them away, or copy them anew; the first: {first}")
            n = len(own) - len(skipped)
            size = about["size"]
            why = f"; skipped {len(skipped)}: {first}" if skipped else ""
            if plain:  # such as the blank middle of a tall screenshot
                why += f"; of one colour, so look at them: {layouts.first(plain)}"
            lines.append(f"{path}: {n} images of {size} px, {len(classes)} classes{why}")
    print("\n".join(fields.shown(line) for line in lines))


# ---- command line --------------------------------------------------------------------------------


def default_out(path):
    """images/ -> datasets/images; set.tar.gz -> datasets/set."""
    name = os.fsencode(Path(path).resolve().name).decode(errors="replace")  # flags have to be text
    return Path("datasets") / (name if Path(path).is_dir() else name.split(".")[0])


def parse_shares(text):
    with contextlib.suppress(ValueError):
        shares = [float(x) for x in text.split(",")]
        if len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6:
            return shares
    wanted = "three shares for train,val,test that sum to 1, such as 0.7,0.1,0.2"
    raise UserError(f"--split {text} must be {wanted}")


def parse_crop(text):
    """figure:margin=0.2 -> ("figure", 0.2)."""
    name, keys = parse_keys(text, CROPS, "--crop")
    return name, (CROPS["figure"] | keys)["margin"]


def code_page(text):
    try:
        b"a".decode(text)
    except (LookupError, UnicodeError):  # also of one that is no code page, such as zip or utf-16
        fix = "give one that Python knows, such as cp932, gbk, big5, cp949 or cp866"
        raise UserError(f"--names {text} is no code page; {fix}") from None
    return text


def regex(text):
    try:
        return re.compile(text).pattern
    except re.error as problem:
        raise UserError(f"--group-by {text} is not a regular expression: {problem}") from None


def show(flags):
    """--show: a sheet of a packed folder -> what was written, and what comes next."""
    folder = Path(flags.path)
    refuse_useless(flags.given - {"path", "show"}, "beside --show")
    names = [n for n in (*layouts.ORDER, UNKNOWN) if (folder / f"{n}.safetensors").exists()]
    if not names:
        raise UserError(f"--show {folder}: there is no packed set; python data.py PATH packs one")
    path = folder / "sheet.png"
    reserve([path], fix="move it away")
    from common import plots

    splits = {n: open_tensors(folder / f"{n}.safetensors") for n in names}
    shown = splits.get("train") or splits[names[0]]
    sizes = ", ".join(f"{n} {len(split['images']):,}" for n, split in splits.items())
    header = shown["header"]
    title = f"{folder}: {sizes}, {len(header['classes'])} classes, {header['size']} px"
    print("\n".join([title, *header.get("notes", [])]))
    for name, split in splits.items():
        if "tags" in split:
            counts = (split["tags"] >= 0).sum(1)
            some = f"{(counts > 0).sum():,} of {len(counts):,} pictures have tags"
            print(f"tags of {name}: {some}, {counts[counts > 0].mean():.1f} each")
    rows = sheet_rows(shown)
    if "train" in splits and UNKNOWN in splits:
        images = splits[UNKNOWN]["images"]
        rows.append((UNKNOWN, images[evenly_spaced(len(images), EACH)]))
    plots.image_grid(path, title, rows)
    return f"{path} written; next: {to_learn(folder)}"


def evenly_spaced(n, most):
    """Indices of at most `most` of n things, from the first to the last."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


def sheet_rows(split, classes=12, each=EACH):
    """Pictures of large, small and other classes; and some with their boxes, foreground and parts."""
    images = split["images"]
    labels = split["labels"]
    ids, counts = np.unique(labels[labels >= 0], return_counts=True)
    by_size = ids[np.argsort(-counts, kind="stable")]
    rows = []
    for label in by_size[evenly_spaced(len(by_size), classes)]:
        own = np.nonzero(labels == label)[0][:each]
        rows.append((split["header"]["classes"][label][:18], images[own]))
    some = evenly_spaced(len(images), each)
    rows.append(("pictures", images[some]))
    if "boxes" in split:
        size = split["header"]["size"]
        pages = zip(images[some], split["boxes"][some], strict=True)
        rows.append(("boxes", [scenes.outlined(x, size * own[own[:, 0] >= 0]) for x, own in pages]))
    if "fg" in split:
        rows.append(("foreground", np.stack([split["fg"][some]] * 3, 3)))  # gray: one scale for all
    if "parts" in split:
        shades = split["parts"][some] * (255 // len(split["header"]["parts"]))
        rows.append(("parts", np.stack([shades] * 3, 3)))
    return rows


def many_of(labels):
    """How many classes have two pictures or more?"""
    return int((np.bincount(labels[labels >= 0]) > 1).sum())


def to_learn(out):
    """The command that learns from a packed set, with the masks and the split that it has."""
    files = [Path(out) / f"{name}.safetensors" for name in ("train", "val", "test", "dev")]
    splits = {file.stem: open_tensors(file) for file in files if file.exists()}
    data = f"--data {quoted(str(out))}"
    have = [name for name in splits if name != "train"]
    split = f" --split {have[0]}" if have and have[0] != "val" else ""
    if "train" not in splits:
        return f"python -m apps.unknown RUN {data}{split}"
    train = splits["train"]
    header = train["header"]
    # toon-det has learned from the pages that we draw, and needs fewer of others (docs/detect.md).
    start = "weights/toon" if header["source"] == "scenes" else "weights/toon-det"
    name = quoted(f"runs/{Path(out).name}-det")
    frames = {*hybrid.PURE} <= {*header["classes"]}
    labels = np.concatenate([split["labels"] for split in splits.values()])
    small = len(labels) < SMALL and header["source"] not in DRAWN and not frames
    can_learn = many_of(train["labels"]) >= 2
    mask = " --mask fg_heavy" if "fg" in train else ""
    why = "finetune_lora.py can't learn from it: no two classes have two pictures in train"
    fix = "pack it again with a val, such as by --split .7,.1,.2"
    rows = (  # does it fit, what comes next
        ("boxes" in train, f"python -m apps.detect {start} {data} --out {name}"),
        # it is cross-validated, over all splits
        (small and many_of(labels) >= 3, f"python -m apps.learn {quoted(str(out))}"),
        (not have, f"{fix}: pretrain.py needs one, to evaluate on"),
        (frames, f"python -m apps.segment weights/toon {data}{split}"),
        # two characters: val is reported
        (small and can_learn, f"python finetune_lora.py weights/toon {data}{split}"),
        (can_learn, f"python pretrain.py {data}{mask}{split}"),
        (True, f"python pretrain.py {data}{mask}{split}; {why}"),
    )
    return next(command for fits, command in rows if fits)


def parse_flags(words=None):
    parser = Parser(__doc__, prog="data.py")
    add = parser.add_argument
    share = between(0, 0.99)
    side = between(8, 4096, int)
    kinds = f"folder, zip, tar, csv, tsv, jsonl, - for a list of files, or {', '.join(DRAWN)}"
    add("path", help=kinds)
    add("--out", help="folder for the packed splits (default: datasets/ and the name of PATH)")
    add("--show", action="store_true", help="draw a sheet of a packed folder")
    add("--detect", action="store_true", help="PATH has boxes: COCO, Pascal VOC, YOLO or a csv")
    add("--layout", type=layouts.parse_layout, help="split/-/class; -: no labels (default: found)")
    add("--names", type=code_page, help="code page of a zip's names, as cp949 (default: guessed)")
    add("--unknown", metavar="DIR", help="pictures of other characters (also: a folder unknown)")
    add("--size", type=side, help=f"side in pixels (default: {PACKED}; pages {LARGE})")
    centre = {"type": parse_crop, "default": parse_crop("centre")}
    add("--crop", help="centre (default), or figure:margin=0.1 by box, alpha or colours", **centre)
    add("--split", type=parse_shares, help=f"shares of train,val,test (default: {SHARES})")
    add("--dev", type=share, default=0.0, help="share of train held apart for choices, such as 0.1")
    add("--test", type=share, default=0.0, help="share of a given val that becomes test")
    add("--group-by", type=regex, help="files whose stems match alike stay in one split: '^[^_]+'")
    what = "copies stay in one split (group), one stays (drop), all stay (keep), no search (off)"
    kinds = {"default": "group", "const": "drop", "nargs": "?", "choices": DEDUPE}
    add("--dedupe", help=what, **kinds)
    add("--min-per-class", type=at_least(0), default=0, help="leave out classes of fewer images")
    add("--min-importance", type=at_least(0.0), default=0, help="leave out tags of less TF-IDF")
    add("--tail", type=between(0, 5), default=0.0, help="class sizes in train follow rank^-TAIL")
    add("--drawings", type=at_least(1), help=f"toon only: how many (default: {toon.COUNT})")
    many = between(2, toon.MOST, int)  # of more, toon.cast would look for long
    add("--characters", type=many, help=f"toon only: of how many (default: {toon.CHARACTERS})")
    add("--seed", type=at_least(0), default=0, help="of the split and of the drawn demo set")
    words = iter(sys.argv[1:] if words is None else words)  # argparse takes -/class for a flag
    joined = [f"--layout={next(words, '')}" if w == "--layout" else w for w in words]
    return parser.parse_args(joined)


def main():
    flags = parse_flags()
    if flags.show:
        return print(show(flags))
    if flags.path == "-" and not flags.out:
        raise UserError("a list on standard input has no name; give --out datasets/NAME")
    set_defaults(flags, out=str(default_out(flags.path)))
    write_set(flags)
    out = flags.out
    look = f"python data.py --show {quoted(out)}"
    print(f"{out} is packed; next: {look}, or {to_learn(out)}")
