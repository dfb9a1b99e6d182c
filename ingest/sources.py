"""Where pictures come from: every layout that people have, turned into the same plain records.

`find(path)` -> (records, fetch, notes). A record says all that the source knows of one picture:

    key    its name in the data set, Unicode in NFC        place  what `fetch` needs to find its
           bytes
    label  class name or None                              split  "train", "val", "test", "dev" or
           None
    group  what a split must not tear apart, or None       tags   tuple of words
    box    (x1, y1, x2, y2) in pixels around the figure, or None

`fetch(records)` yields (record, load) in the order given, and load() -> bytes, so that a pool of
threads may call it. `notes` are lines for the user: what the path was taken for, and what was left
out. Nothing is extracted to disk and no picture is opened here. Each reader, from_...(path) ->
(records, fetch, *notes), knows one kind of source; `reader_of` is the table of them. Where only
folders tell split and class, ingest/layouts.py reads them.
"""

import csv
import fileinput
import os
import re
import shlex
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

from common.io import UserError, parse_table, regular
from ingest import layouts

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MOST_BROKEN = 0.05  # of the lines of a metadata file: where more are no JSON, it is something else
MOST_NAME = 1000  # characters of a picture's name
ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # NUL, escapes and what breaks a line
MOST_BYTES = 2**26  # a picture file larger than this is refused: 16 are held at a time
Record = namedtuple(
    "Record", "key place label split group tags box", defaults=(None, None, None, (), None)
)


def find(path, boxes_file=None, layout=None):
    """The word - or a path -> (records, fetch, notes), every key once, with the boxes of a file if
    one is given.

    layout: a pattern as layouts.py has them, for sources that only folders tell of; "-": all
    pictures, no labels.
    """
    if str(path) != "-" and (not str(path) or not Path(path).exists()):
        fix = "give a folder, an archive or a list of images, or the word toon"
        raise UserError(f"{path or 'an empty PATH'} does not exist; {fix}")
    reader = from_list if str(path) == "-" else reader_of(Path(path))
    more = {"layout": layouts.parse_layout(layout)} if layout and reader in BY_FOLDERS else {}
    records, fetch, *notes = reader(sys.stdin if str(path) == "-" else Path(path), **more)
    if not records:
        raise UserError(nothing_in("standard input" if str(path) == "-" else path))
    if reader not in BY_FOLDERS:
        notes.insert(0, layouts.told(READ_AS[reader], [(r.split, r.label) for r in records]))
    refuse_odd(path, [r.key for r in records])
    first, alike = {}, defaultdict(list)
    for r in records:
        first.setdefault(r.key, r)
    if len(first) < len(records):
        notes.append(f"{len(records) - len(first)} names came twice; the first of each is kept")
    for name in sorted({r.label for r in first.values()} - {None}):
        alike[name.casefold()].append(name)
    if same := [" and ".join(names) for names in alike.values() if len(names) > 1]:  # Miku, miku
        notes.append(f"classes that differ only in case are kept apart: {', '.join(same[:3])}")
    records, boxes = list(first.values()), read_boxes(boxes_file) if boxes_file else {}
    if boxes_file and not any(r.key in boxes for r in records):
        raise UserError(
            f"--boxes {boxes_file} names none of the images; it has {next(iter(boxes), None)!r}, "
            f"the images are named like {records[0].key!r}"
        )
    return (
        [r._replace(box=boxes.get(r.key, r.box)) for r in records] if boxes else records,
        fetch,
        notes,
    )


def refuse_odd(path, names):
    """Names are printed, and are a line each."""
    for name in names:
        if ODD.search(name) or len(name) > MOST_NAME:
            odd = f"has control characters or more than {MOST_NAME} characters; rename it"
            raise UserError(f"{path} holds the name {name[:80]!r}, which {odd}")


def nothing_in(path):
    """The error for a source without pictures; they may lie in an archive there."""
    inside = [p for p in sorted(Path(path).glob("*")) if p.name.lower().endswith(ARCHIVES)]
    if inside:
        more = f" and {len(inside) - 1} more archives" if len(inside) > 1 else ""
        return (
            f"no image found in {path}, but {inside[0].name} lies there{more}; "
            f"give the archive: python data.py {shlex.quote(str(inside[0]))}"
        )
    return f"no image found in {path}; looked for {' '.join(sorted(SUFFIXES))} in it and its subfolders"


def reader_of(path):
    """The function that reads this layout: published data sets by the files that only they have
    come first.
    """
    layouts = (
        (lambda p: (p / "labels" / "train.csv").exists(), from_dafre),
        (lambda p: (p / "icartoonface_rectrain_det.txt").exists(), from_icartoonface),
        (metadata_files, from_danbooru),
        (Path.is_dir, from_folder),
        (lambda p: p.suffix.lower() in (".csv", ".tsv"), from_table),
        (zipfile.is_zipfile, from_zip),
        (is_tar, from_tar),
    )
    for fits, reader in layouts:
        if fits(regular(path)):
            return reader
    raise UserError(
        f"{path} is no folder, whole archive (zip, tar, tar.gz) or list (csv, tsv, jsonl)"
    )


def has_layout(path):
    """Do only folders tell what a picture of this source is?"""
    if str(path) == "-" or not Path(path).exists():
        return True
    return reader_of(Path(path)) in BY_FOLDERS


def nfc(text):
    """One spelling per name: macOS writes the same letters decomposed."""
    return unicodedata.normalize("NFC", text)


def is_image(name):
    """By its suffix; what macOS and editors leave behind (__MACOSX/._x.png, .thumbnails/) is not
    one.
    """
    stem, suffix = os.path.splitext(name)
    hidden = any(
        part.startswith((".", "__")) and part not in (".", "..") for part in name.split("/")
    )
    return suffix.lower() in SUFFIXES and not hidden


def by_path(found, layout=None):
    """[(place, name)] -> records whose folders say split and class, and a note: read as what.

    AnimeFace Character (moeimouto) is thumb/000_hatsune_miku/face_1_2_3.png: its running numbers
    are no names.
    """
    keys = [nfc(name.removeprefix("./")) for _, name in found]
    dirs = [key.split("/")[:-1] for key in keys]
    names = [after_number(d[-1]) if len(d) > 1 and d[-2] == "thumb" else None for d in dirs]
    other = None
    if layout is None and layouts.few(names.count(None), len(dirs)):
        what, rows = "AnimeFace Character", [name and (None, name) for name in names]
    else:
        if layout is None:
            layout, other = layouts.detect(dirs)
        what, rows = "/".join(layout) or "pictures only", layouts.read(dirs, layout)
    records = [
        Record(key, place, row[1], row[0])
        for key, (place, _), row in zip(keys, found, rows, strict=True)
        if row
    ]
    if found and not records:
        problem = f"--layout {what} fits none of the {len(keys)} pictures, which lie like {keys[0]}"
        fix = "a split is named train, val, dev or test, or much like it"
        raise UserError(f"{problem}; {fix}")
    return records, [layouts.told(what, rows, keys, other)]


def after_number(folder):
    """000_hatsune_miku -> hatsune_miku; None where it does not begin with a number."""
    found = re.fullmatch(r"\d+_(.+)", folder)
    return found and found[1]


# ---- files: folder, list, table ------------------------------------------------------------------


def read_whole(path):
    if os.path.getsize(regular(path)) > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES >> 20} MB")
    with open(path, "rb") as f:
        return f.read()


def fetch_files(records, root=""):
    """For records whose place is the path of a file, relative to root or absolute."""
    return ((r, partial(read_whole, os.path.join(root, r.place))) for r in records)


def walk(folder, prefix="", above=()):
    """Names of the images below a folder, sorted. Links are followed, except back into a folder
    that we stand in.
    """
    here = os.path.realpath(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if here not in above else ():
        if entry.is_symlink() and not os.path.exists(entry.path):  # to nowhere, or to itself
            continue
        if entry.is_dir():
            yield from walk(entry.path, f"{prefix}{entry.name}/", (*above, here))
        elif is_image(prefix + entry.name) and entry.is_file():
            yield prefix + entry.name


def from_folder(root, layout=None):
    """[wrapper/][train|val|test/][class/]picture.png; or pictures only, without labels."""
    records, notes = by_path([(name, name) for name in walk(root)], layout)
    return records, partial(fetch_files, root=root), *notes


def from_list(lines, layout=None):
    """One path a line, relative to where you stand; split and class are said by the path, as in a
    folder.
    """
    paths, top = [os.path.normpath(line.rstrip("\r\n")) for line in lines if line.strip()], "."
    if paths and all(
        map(os.path.isabs, paths)
    ):  # what is above all of them names neither a split nor a class
        top = os.path.commonpath([os.path.dirname(p) for p in paths])
    named = sorted((p, Path(os.path.relpath(p, top)).as_posix()) for p in paths)
    records, notes = by_path([(p, name) for p, name in named if is_image(name)], layout)
    return records, fetch_files, *notes


def from_table(path):
    """csv or tsv of path,label[,split][,tags][,group], or with a header of its own; paths relative
    to its folder.

    Tags are words with spaces between them. An empty label is no label.
    """
    columns, records = ["path", "label", "split", "tags"], []
    for number, row in table_rows(path):
        if number == 1 and "path" in (names := [cell.strip().lower() for cell in row]):
            columns = names
            continue
        cells = dict(zip(columns, map(str.strip, row), strict=False))
        place, split = cells.get("path"), cells.get("split", "").lower()
        if len(row) > len(columns) or not place:
            found = ",".join(row)[:80]
            raise UserError(f"{path}, line {number} is not {','.join(columns)} but {found!r}")
        if split and not layouts.split_of(split):
            raise UserError(
                f"{path}, line {number}: split {split!r} is none of train, val, test, dev"
            )
        label = sys.intern(nfc(cells.get("label", ""))) or None
        tags = tuple(sys.intern(nfc(tag)) for tag in cells.get("tags", "").split())
        records.append(
            Record(
                nfc(place), place, label, layouts.split_of(split), cells.get("group") or None, tags
            )
        )
    without = sum(r.split is None for r in records)
    if 0 < without < len(records):
        raise UserError(
            f"{path}: {without} of {len(records)} rows have no split; give it to all or none"
        )
    return records, partial(fetch_files, root=path.parent)


def table_rows(path):
    """Yield (line number, [cells]) of a csv or tsv file, empty lines left out."""
    with open(regular(path), newline="", encoding="utf-8-sig") as f:
        rows = csv.reader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            yield from ((rows.line_num, row) for row in rows if row)
        except (UnicodeDecodeError, csv.Error) as problem:
            after = f"after line {rows.line_num}: {problem}"
            raise UserError(f"{path} is not a table in UTF-8 {after}") from None


# ---- archives ------------------------------------------------------------------------------------


def refuse_escape(archive, name):
    """../x, /x and C:\\x lead out of an archive. Nothing is extracted here, but who packs that is
    not to be trusted.
    """
    if ".." in re.split(r"[/\\]", name) or re.match(r"/|\\|[A-Za-z]:", name):
        raise UserError(f"{archive} holds the name {name!r}, which leads out of it; pack it anew")


def from_zip(path, layout=None):
    """A zip: its members are read in place, by name."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as problem:
        raise UserError(f"{path} is not a whole zip archive: {problem}") from None
    for name in archive.namelist():
        refuse_escape(path, name)
    images = sorted(
        (i for i in archive.infolist() if is_image(i.filename)), key=lambda i: i.filename
    )

    def fetch(records):
        return ((r, partial(read_member, archive, r.place)) for r in records)

    records, notes = by_path([(info, zip_name(info)) for info in images], layout)
    return records, fetch, *notes


def zip_name(info):
    """Without the UTF-8 flag zipfile assumes an old code page; such names are mostly UTF-8 (macOS)
    or Japanese.
    """
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        for code in ("utf-8", "cp932"):
            try:
                name = info.filename.encode("cp437").decode(code)
                break
            except UnicodeError:
                continue
    return name.replace("\\", "/")  # some tools on Windows write those between folders


def read_member(archive, info):
    if info.file_size > MOST_BYTES:
        raise ValueError(f"unpacks to more than {MOST_BYTES >> 20} MB")
    return archive.read(info)


def from_tar(path, layout=None):
    """A tar, compressed or not: read through from its beginning for every split, never searched,
    never extracted.
    """

    def fetch(records):
        wanted = {r.place: r for r in records}
        for name, data in tar_images(path, wanted):
            if data is not None:
                yield wanted.pop(name), partial(bytes, data)

    records, notes = by_path([(name, name) for name, _ in tar_images(path)], layout)
    return records, fetch, *notes


# ---- tar: its headers say how much follows, and nothing is read before that is checked

MOST_HEADER = 2**20  # bytes of a long name, or of a set of PAX fields
ANNOUNCED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# What tarfile raises for a broken header, besides its own errors.
BROKEN_TAR = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, RecursionError)


def refuse_sparse(*_):
    raise tarfile.ReadError("it holds a sparse file; pack it without --sparse")


class Member(tarfile.TarInfo):
    """A header of a tar. Long headers and sparse files are refused before they are read."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type in ANNOUNCED and not 0 <= member.size <= MOST_HEADER:
            raise tarfile.ReadError(f"it has a header of {member.size} bytes")
        if member.type == tarfile.GNUTYPE_SPARSE:
            refuse_sparse()
        return member

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = refuse_sparse


def is_tar(path):
    try:
        with tarfile.open(path, "r|*", tarinfo=Member):
            return True
    except BROKEN_TAR:
        return False


def tar_images(path, wanted=()):
    """Yield (name, bytes, or None if it is not wanted) of the pictures of a tar, in its order."""
    most = 2**30 + 1000 * os.path.getsize(path)  # pictures hardly shrink when they are packed
    try:
        with tarfile.open(path, "r|*", tarinfo=Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would remember every member
                refuse_escape(path, member.name)
                if member.offset_data + member.size > most:
                    raise tarfile.ReadError(f"{member.name[:80]!r} says {member.size} bytes")
                if member.isfile() and is_image(member.name):
                    size = (
                        member.size if member.size <= MOST_BYTES else 0
                    )  # one too large can't be read, and is named
                    yield (
                        member.name,
                        tar.extractfile(member).read(size) if member.name in wanted else None,
                    )
    except BROKEN_TAR as problem:
        raise UserError(f"{path} is not a whole tar archive: {problem}") from None


# ---- published data sets -------------------------------------------------------------------------


def from_dafre(root):
    """DAF:re (Rios et al. 2021): labels/{train,val,test}.csv of class_id,path; pictures in faces/
    or fullMin256/.

    Its pictures are Danbooru's, named by their id: where metadata lie beside the labels, they give
    the tags.
    """
    pictures = next((d for d in ("faces", "fullMin256") if (root / d).is_dir()), None)
    if pictures is None:
        raise UserError(f"{root} has DAF:re's labels alone; unpack faces/ or fullMin256/ there")
    names_file, records = root / "labels" / "classid_classname.csv", []
    names = (
        {row[0]: sys.intern(nfc(row[1])) for _, row in table_rows(names_file)}
        if names_file.exists()
        else {}
    )
    tables = {split: root / "labels" / f"{split}.csv" for split in ("train", "val", "test")}
    for split, table in tables.items():
        for number, row in table_rows(table) if table.exists() else ():
            if len(row) == 2 and is_image(row[0]) != is_image(row[1]):
                class_id, place = sorted(
                    row, key=is_image
                )  # an older release has them the other way round
                records.append(
                    Record(place, f"{pictures}/{place}", names.get(class_id, class_id), split)
                )
            elif number > 1:  # the first is a header
                found = ",".join(row)[:80]
                raise UserError(f"{table}, line {number} is not class_id,path but {found!r}")
    posts, notes = (
        read_posts(root, {Path(r.key).stem: r.key for r in records})
        if metadata_files(root)
        else ([], [])
    )

    def plain(name):
        return name.lower().replace(" ", "_")

    people = {
        plain(r.label) for r in records
    }  # whoever wrote no categories has the characters among the tags
    of = {r.key: tuple(t for t in r.tags if plain(t) not in people) for r in posts}
    notes += (
        [f"{sum(map(bool, of.values()))} of {len(records)} pictures have tags"] if posts else []
    )
    return (
        [r._replace(tags=of.get(r.key, ())) for r in records],
        partial(fetch_files, root=root),
        *notes,
    )


def from_icartoonface(root):
    """iCartoonFace recognition (Zheng et al. 2020): icartoonface_rectrain/IDENTITY/x.jpg, one face
    box per picture.
    """
    boxes, folder = (
        read_boxes(root / "icartoonface_rectrain_det.txt"),
        root / "icartoonface_rectrain",
    )
    if not folder.is_dir():
        raise UserError(
            f"{root} has iCartoonFace's boxes alone; unpack icartoonface_rectrain/ there"
        )
    records = [Record(n, n, n.split("/")[0], box=box) for n, box in boxes.items()]
    return records, partial(fetch_files, root=folder)


def read_boxes(path):
    """Lines of "path x1 y1 x2 y2" in pixels, between them tabs, spaces or commas -> {path: (x1, y1,
    x2, y2)}.
    """
    try:
        lines = regular(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} can't be read as text in UTF-8: {problem}") from None
    line_of_five, boxes = re.compile(r"(.+?)" + 4 * r"[\t, ]+(-?\d+(?:\.\d+)?)" + r"\s*"), {}
    for n, line in enumerate(filter(str.strip, lines), 1):
        told = line_of_five.fullmatch(line)
        name, *box = told.groups() if told else ("", 0, 0, 0, 0)
        x1, y1, x2, y2 = map(float, box)
        if not (x1 < x2 and y1 < y2):
            wanted = "path x1 y1 x2 y2 with x1 < x2 and y1 < y2"
            raise UserError(f"{path}, line {n} is not {wanted} but {line[:80]!r}")
        boxes[nfc(name)] = (x1, y1, x2, y2)
    return boxes


def metadata_files(path):
    """The JSON-lines files of a Danbooru-style dump: the file itself, or metadata.json[l] or
    metadata/ in a folder.
    """
    if path.is_file():
        return [path] if path.suffix.lower() in (".json", ".jsonl") else []
    inside = [
        path / "metadata.jsonl",
        path / "metadata.json",
        *sorted((path / "metadata").glob("*")),
    ]
    return [p for p in inside if p.is_file() and p.suffix in ("", ".json", ".jsonl")]


def from_danbooru(path):
    """Danbooru-style metadata, one JSON object a line; the pictures lie anywhere beside it, named
    by id or md5.

    The class is the character tag where there is exactly one; a picture and its parent are one
    group; all other tags are tags. A dump's metadata covers more than anybody has downloaded: lines
    without a picture are only counted.
    """
    root, have = path if path.is_dir() else path.parent, {}
    for name in walk(root):
        for alias in (Path(name).stem, name):
            have.setdefault(alias, name)  # of 512px/ and original/ the first
    records, notes = read_posts(path, have)
    return records, partial(fetch_files, root=root), *notes


def read_posts(path, have):
    """Lines of the metadata at path -> (records of the posts whose id or name is in have {name:
    picture}, notes).
    """
    lines, absent, broken, records = 0, 0, [], []
    with fileinput.input(metadata_files(path), mode="rb") as file:
        for line in filter(bytes.strip, file):
            lines += 1
            try:
                post = parse_table(line)
                names = [
                    str(post[k])
                    for k in ("file_name", "path", "id", "md5")
                    if post.get(k) is not None
                ]
                found = next((have[n] for n in names if n in have), None)
                records += [post_record(post, found)] if found else []
                absent += not found
            except (ValueError, AttributeError, TypeError, RecursionError):
                broken.append(f"{Path(file.filename()).name}, line {file.filelineno()}")
    lost = f"{len(broken)} of {lines} lines are no JSON objects, the first: {(broken or [''])[0]}"
    if len(broken) > MOST_BROKEN * lines:
        raise UserError(f"{path} is no metadata of pictures: {lost}; correct or remove them")
    return records, [f"{absent} lines of the metadata have no picture here"] * bool(absent) + [
        lost
    ] * bool(broken)


def post_record(post, place):
    """Tags are one string (the site's API), a list of words or {name, category} (4: a character),
    or {kind: list}.
    """
    tags = post.get("tags")
    if isinstance(tags, dict):
        characters = tags.get("character") or ()
        tags = [t for some in tags.values() if isinstance(some, list) for t in some]
    elif isinstance(tags, list):
        named = [t for t in tags if not isinstance(t, dict) or t.get("name")]
        characters = [
            t["name"] for t in named if isinstance(t, dict) and str(t.get("category")) == "4"
        ]
        tags = [t["name"] if isinstance(t, dict) else t for t in named]
    else:
        characters = (post.get("tag_string_character") or "").split()
        tags = (post.get("tag_string") or post.get("tag_string_general") or tags or "").split()
    characters, tags = ([sys.intern(nfc(str(t))) for t in some] for some in (characters, tags))
    label, group = (
        characters[0] if len(characters) == 1 else None,
        post.get("parent_id") or post.get("id"),
    )
    return Record(
        nfc(place),
        place,
        label,
        None,
        group and str(group),
        tuple(t for t in tags if t not in characters),
    )


BY_FOLDERS = (from_folder, from_list, from_zip, from_tar)  # only folders tell split and class
READ_AS = {
    from_dafre: "DAF:re",
    from_icartoonface: "iCartoonFace",
    from_danbooru: "Danbooru metadata",
    from_table: "a table",
}
