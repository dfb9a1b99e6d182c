"""Where pictures come from: every layout that people have, turned into the same plain records.

`find(path)` -> (records, fetch, notes). A record says all that the source knows of one picture:

    key    its name in the data set, Unicode in NFC        place  what `fetch` needs to find its bytes
    label  class name or None                              split  "train", "val", "test", "dev" or None
    group  what a split must not tear apart, or None       tags   tuple of words
    box    (x1, y1, x2, y2) in pixels around the figure, or None

`fetch(records)` yields (record, load) in the order given, and load() -> bytes, so that a pool of threads may call it.
`notes` are lines for the user about what was left out. Nothing is extracted to disk and no picture is opened here.
"""

import csv
import json
import os
import re
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path

from common.io import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "dev", "test": "test"}
MOST_BYTES = 2**28  # a picture file larger than this is refused: 16 threads may hold one each
Record = namedtuple("Record", "key place label split group tags box", defaults=(None, None, None, (), None))


def find(path):
    """The word - or a path -> (records, fetch, notes). UserError where there is no picture, or none can be trusted."""
    if str(path) == "-":
        return checked("standard input", *from_list(sys.stdin))
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder, an archive or a list of images, or the word toon")
    return checked(path, *reader_of(path)(path))


def reader_of(path):
    """The function that reads this layout: published data sets by the files that only they have, then by suffix."""
    if path.is_dir():
        if (path / "labels" / "train.csv").exists():
            return from_dafre
        if (path / "icartoonface_rectrain_det.txt").exists():
            return from_icartoonface
        return from_danbooru if metadata_files(path) else from_folder
    if path.suffix.lower() in (".csv", ".tsv"):
        return from_table
    if path.suffix.lower() in (".json", ".jsonl"):
        return from_danbooru
    if zipfile.is_zipfile(path):
        return from_zip
    if tarfile.is_tarfile(path):
        return from_tar
    raise UserError(f"{path} is neither a folder nor a whole archive (zip, tar, tar.gz) nor a list (csv, tsv, jsonl)")


def checked(path, records, fetch, notes=()):
    """Every key once; a note on classes that differ only in case (Miku, miku), which stay two classes."""
    if not records:
        raise UserError(f"no image found in {path}; looked for {' '.join(sorted(SUFFIXES))} in it and its subfolders")
    first = {}
    for r in records:
        first.setdefault(r.key, r)
    once = list(first.values())
    notes = list(notes)
    if len(once) < len(records):
        notes.append(f"{len(records) - len(once)} names came twice; the first of each is kept")
    names = sorted({r.label for r in once if r.label is not None})
    folded = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(same) for same in folded.values() if len(same) > 1]
    if alike:
        notes.append(f"classes that differ only in case are kept apart: {', '.join(alike[:3])}")
    return once, fetch, notes


# ---- names ---------------------------------------------------------------------------------------------------------


def nfc(text):
    """One spelling per name: macOS writes the same letters decomposed."""
    return unicodedata.normalize("NFC", text)


def is_image(name):
    """By its suffix; what macOS and editors leave behind (__MACOSX/._x.png, .thumbnails/) is not one."""
    stem, suffix = os.path.splitext(name)
    hidden = any(part.startswith((".", "__")) and part not in (".", "..") for part in name.split("/"))
    return suffix.lower() in SUFFIXES and not hidden


def split_and_class(keys):
    """Paths -> [(split or None, class or None)]: [wrapper/][train|val|test/][class/]anything.png.

    AnimeFace Character (moeimouto) is thumb/000_hatsune_miku/face_1_2_3.png: its running numbers are no names.
    """
    parts = [key.split("/")[:-1] for key in keys]
    moeimouto = all("thumb" in p[:-1] and re.match(r"\d+_.", p[-1]) for p in parts)
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1 and parts[0][0].lower() not in SPLITS:
        parts = [p[1:] for p in parts]  # an archive often wraps everything in one folder
    if moeimouto:
        return [(None, p[-1].split("_", 1)[1]) for p in parts]
    if all(p and p[0].lower() in SPLITS for p in parts):
        return [(SPLITS[p[0].lower()], p[1] if len(p) > 1 else None) for p in parts]
    return [(None, p[0] if p else None) for p in parts]


def by_path(places, names):
    """Records whose split and class are said by their names; places and names run in parallel."""
    keys = [nfc(name.removeprefix("./")) for name in names]
    told = split_and_class(keys)
    return [Record(k, p, c, s) for k, p, (s, c) in zip(keys, places, told, strict=True)]


def refuse_escape(archive, name):
    """../x, /x and C:\\x lead out of an archive. Nothing is extracted here, but who packs that is not to be trusted."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{archive} holds the name {name!r}, which leads out of it; nothing was packed, pack it anew")


# ---- files: folder, list, table ------------------------------------------------------------------------------------


def read_whole(path):
    if os.path.getsize(path) > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES >> 20} MB")
    with open(path, "rb") as f:
        return f.read()


def fetch_files(root):
    """For records whose place is a path, relative to root or absolute."""

    def fetch(records):
        return ((r, partial(read_whole, os.path.join(root, r.place))) for r in records)

    return fetch


def walk(folder, above=()):
    """Files below a folder, sorted. Links to folders are followed, except back into a folder that we stand in."""
    status = os.stat(folder)
    me = (status.st_dev, status.st_ino)
    if me in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_symlink() and not os.path.exists(entry.path):  # to nowhere, or to itself
            continue
        if entry.is_dir():
            yield from walk(entry.path, (*above, me))
        elif entry.is_file():
            yield entry.path


def from_folder(root):
    """[train|val|test/][class/]picture.png; or pictures only, without labels."""
    names = [Path(os.path.relpath(p, root)).as_posix() for p in walk(root)]
    names = [n for n in names if is_image(n)]
    return by_path(names, names), fetch_files(root)


def from_list(lines):
    """One path a line, relative to where you stand; split and class are said by the path, as in a folder."""
    names = [os.path.normpath(line.rstrip("\r\n")) for line in lines if line.strip()]
    top = "."
    if names and all(map(os.path.isabs, names)):  # what is above all of them names neither a split nor a class
        top = os.path.commonpath([os.path.dirname(n) for n in names])
    told = sorted((n, Path(os.path.relpath(n, top)).as_posix()) for n in names)
    told = [(place, name) for place, name in told if is_image(name)]
    return by_path([place for place, _ in told], [name for _, name in told]), fetch_files(".")


def from_table(path):
    """csv or tsv of path,label[,split][,tags], with or without that header; paths relative to the table's folder.

    Tags are words with spaces between them. An empty label is no label.
    """
    columns, records = ("path", "label", "split", "tags"), []
    for number, row in table_rows(path):
        if number == 1 and "path" in [cell.strip().lower() for cell in row]:
            columns = tuple(cell.strip().lower() for cell in row)
            continue
        cells = dict(zip(columns, row, strict=False))
        if len(row) > len(columns) or not cells.get("path", "").strip():
            raise UserError(f"{path}, line {number} is not {','.join(columns)} but {','.join(row)[:80]!r}")
        split = cells.get("split", "").strip().lower()
        if split and split not in SPLITS:
            raise UserError(f"{path}, line {number}: split {split!r} is unknown; choose from train, val, test, dev")
        label = sys.intern(nfc(cells.get("label", "").strip())) or None
        tags = tuple(sys.intern(t) for t in cells.get("tags", "").split())
        place = cells["path"].strip()
        records.append(Record(nfc(place), place, label, SPLITS.get(split), cells.get("group") or None, tags))
    without = sum(r.split is None for r in records)
    if 0 < without < len(records):
        raise UserError(f"{path}: {without} of {len(records)} rows have no split; give one to all rows or to none")
    return records, fetch_files(path.parent)


def table_rows(path):
    """Yield (line number, [cells]) of a csv or tsv file, empty lines left out."""
    with open(path, newline="", encoding="utf-8-sig") as f:
        rows = csv.reader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            yield from ((rows.line_num, row) for row in rows if row)
        except (UnicodeDecodeError, csv.Error) as problem:
            raise UserError(f"{path} is not a table in UTF-8 after line {rows.line_num}: {problem}") from None


# ---- archives ------------------------------------------------------------------------------------------------------


def from_zip(path):
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as problem:
        raise UserError(f"{path} is not a whole zip archive: {problem}") from None
    infos = [i for i in archive.infolist() if not i.is_dir()]
    for info in infos:
        refuse_escape(path, info.filename)
    infos = sorted((i for i in infos if is_image(i.filename)), key=lambda i: i.filename)

    def fetch(records):
        return ((r, partial(read_member, archive, r.place)) for r in records)

    return by_path(infos, [zip_name(i) for i in infos]), fetch


def zip_name(info):
    """Without the UTF-8 flag zipfile assumes an old code page; such names are mostly UTF-8 (macOS) or Japanese."""
    if not info.flag_bits & 0x800 and not info.filename.isascii():
        for code in ("utf-8", "cp932"):
            try:
                return info.filename.encode("cp437").decode(code)
            except UnicodeError:
                continue
    return info.filename


def read_member(archive, info):
    if info.file_size > MOST_BYTES:
        raise ValueError(f"unpacks to more than {MOST_BYTES >> 20} MB")
    return archive.read(info)


def from_tar(path):
    """A tar, compressed or not: read through from its beginning for every split, never searched, never extracted."""
    names = [name for name, _ in tar_images(path, lambda name: False)]

    def fetch(records):
        wanted = {r.place: r for r in records}
        for name, data in tar_images(path, lambda name: name in wanted):
            if data is not None:
                yield wanted.pop(name), partial(bytes, data)

    return by_path(names, names), fetch


def tar_images(path, wanted):
    """Yield (name, bytes, or None if not wanted(name)) of the pictures of a tar, in its order."""
    try:
        with tarfile.open(path, "r|*") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would remember every member
                refuse_escape(path, member.name)
                if member.isfile() and is_image(member.name):
                    size = member.size if member.size <= MOST_BYTES else 0  # one too large can't be read, and is named
                    yield member.name, tar.extractfile(member).read(size) if wanted(member.name) else None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise UserError(f"{path} is not a whole tar archive: {problem}") from None


# ---- published data sets -------------------------------------------------------------------------------------------


def from_dafre(root):
    """DAF:re (Rios et al. 2021): labels/{train,val,test}.csv of class_id,path; pictures in faces/ or fullMin256/."""
    pictures = next((d for d in ("faces", "fullMin256") if (root / d).is_dir()), None)
    if pictures is None:
        raise UserError(f"{root} has DAF:re's labels but neither faces/ nor fullMin256/; unpack one there")
    names, names_file = {}, root / "labels" / "classid_classname.csv"
    if names_file.exists():
        names = {row[0]: sys.intern(nfc(row[1])) for _, row in table_rows(names_file)}
    records = []
    for split in ("train", "val", "test"):
        table = root / "labels" / f"{split}.csv"
        for number, row in table_rows(table) if table.exists() else ():
            if len(row) != 2 or is_image(row[0]) == is_image(row[1]):
                if number == 1:
                    continue  # a header
                raise UserError(f"{table}, line {number} is not class_id,path but {','.join(row)[:80]!r}")
            class_id, place = row if is_image(row[1]) else row[::-1]  # an older release has them the other way round
            records.append(Record(place, f"{pictures}/{place}", names.get(class_id, class_id), split))
    return records, fetch_files(root)


def from_icartoonface(root):
    """iCartoonFace recognition (Zheng et al. 2020): icartoonface_rectrain/IDENTITY/x.jpg, one face box per picture."""
    boxes = read_boxes(root / "icartoonface_rectrain_det.txt")
    if not (root / "icartoonface_rectrain").is_dir():
        raise UserError(f"{root} has iCartoonFace's boxes but no icartoonface_rectrain/; unpack the pictures there")
    records = [Record(n, f"icartoonface_rectrain/{n}", n.split("/")[0], box=box) for n, box in boxes.items()]
    return records, fetch_files(root)


def read_boxes(path):
    """Lines of "path x1 y1 x2 y2" in pixels, between them tabs, spaces or commas -> {path: (x1, y1, x2, y2)}."""
    number, gap = r"(-?\d+(?:\.\d+)?)", r"[\t, ]+"
    line_of_five = re.compile(rf"(.+?){gap}{number}{gap}{number}{gap}{number}{gap}{number}\s*")
    boxes = {}
    for n, line in enumerate(read_lines(path), 1):
        told = line_of_five.fullmatch(line)
        name, *box = told.groups() if told else ("", 0, 0, 0, 0)
        x1, y1, x2, y2 = map(float, box)
        if not (x1 < x2 and y1 < y2):
            raise UserError(f"{path}, line {n} is not path x1 y1 x2 y2 with x1 < x2 and y1 < y2 but {line[:80]!r}")
        boxes[nfc(name)] = (x1, y1, x2, y2)
    return boxes


def with_boxes(records, path):
    """Records with the boxes of a file, by key; UserError where it names none of them."""
    boxes = read_boxes(path)
    if not any(r.key in boxes for r in records):
        raise UserError(f"--boxes {path} names none of the images; it has {next(iter(boxes), None)!r}, "
                        f"the images are named like {records[0].key!r}")  # fmt: skip
    return [r._replace(box=boxes.get(r.key, r.box)) for r in records]


def read_lines(path):
    """The lines of a text file in UTF-8 that are not empty."""
    try:
        return [line for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} can't be read as text in UTF-8: {problem}") from None


def metadata_files(path):
    """The JSON-lines files of a Danbooru-style dump: the file itself, or metadata.json[l] or metadata/ in a folder."""
    if path.is_file():
        return [path]
    inside = [path / "metadata.jsonl", path / "metadata.json", *sorted((path / "metadata").glob("*"))]
    return [p for p in inside if p.is_file() and p.suffix in ("", ".json", ".jsonl")]


def from_danbooru(path):
    """Danbooru-style metadata, one JSON object a line; the pictures lie anywhere beside it, named by id or md5.

    The class is the character tag where there is exactly one; a picture and its parent are one group; all other tags
    are tags. A dump's metadata covers more than anybody has downloaded: lines without a picture are only counted.
    """
    root = path if path.is_dir() else path.parent
    have = {}
    for file in walk(root):
        name = Path(os.path.relpath(file, root)).as_posix()
        if is_image(name):
            have.setdefault(Path(name).stem, name)  # of 512px/ and original/ the first
            have.setdefault(name, name)
    records, absent, broken = [], 0, 0
    for line in post_lines(path):
        try:
            post = json.loads(line)
            place = next((have[n] for n in post_names(post) if n in have), None)
        except (ValueError, AttributeError, TypeError):
            broken += 1
            continue
        absent += place is None
        if place:
            records.append(post_record(post, place))
    if broken and not records:
        raise UserError(f"{path} has no line that is a post with a picture here; {broken} lines are no JSON objects")
    notes = [f"{absent} lines of the metadata have no picture here"] if absent else []
    return records, fetch_files(root), notes + ([f"{broken} lines are no JSON objects"] if broken else [])


def post_lines(path):
    for file in metadata_files(path):
        with open(file, "rb") as f:
            yield from (line for line in f if line.strip())


def post_names(post):
    """What the picture of a post may be called: a path of its own, its id, or its md5."""
    return [str(post[k]) for k in ("file_name", "path", "id", "md5") if post.get(k) is not None]


def post_record(post, place):
    """Tags come as one string (the site's API), by kind or not, as a list of {name, category} (4 is a character), or as
    {kind: list}.
    """
    if isinstance(post.get("tags"), dict):
        characters = [str(t) for t in post["tags"].get("character") or ()]
        tags = [str(t) for kind in post["tags"].values() if isinstance(kind, list) for t in kind]
    elif isinstance(post.get("tags"), list):
        both = [t if isinstance(t, dict) else {"name": t} for t in post["tags"]]
        kinds = [(str(t["name"]), str(t.get("category"))) for t in both if t.get("name")]
        characters, tags = ([t for t, k in kinds if (k == "4") is yes] for yes in (True, False))
    else:
        characters = (post.get("tag_string_character") or "").split()
        tags = (post.get("tag_string") or post.get("tag_string_general") or post.get("tags") or "").split()
    label = characters[0] if len(characters) == 1 else None
    group = post.get("parent_id") or post.get("id")
    words = tuple(sys.intern(nfc(t)) for t in tags if t not in characters)
    return Record(nfc(place), place, label and sys.intern(nfc(label)), None, group and str(group), words)
