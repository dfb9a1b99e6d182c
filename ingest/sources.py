"""Where pictures come from: every layout that people have, turned into the same plain records.

`find(path)` -> (records, fetch, notes). A record says all that the source knows of one picture:

    key    its name in the data set, Unicode in NFC    place  what `fetch` needs to find its bytes
    label  class name or None                          split  train, val, test, dev or None
    group  what a split must not tear apart, or None   tags   tuple of words
    box    (x1, y1, x2, y2) in pixels around the figure, or None

`fetch(records)` yields (record, load) in the order given, and load() -> bytes, so that a pool of
threads may call it. `notes` are lines for the user: what the path was taken for, and what was left
out. Nothing is extracted to disk and no picture is opened here. Each reader, from_...(path) ->
(records, fetch, *notes), knows one kind of source; READERS is the table of them. Where only folders
tell split and class, ingest/layouts.py reads them.
"""

import csv
import json
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
from ingest import layouts, tags

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MOST_BROKEN = 0.05  # of the lines of a metadata file: where more are no JSON, it is something else
MOST_NAME = 1000  # characters of a picture's name
ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # NUL, escapes and what breaks a line
MOST_BYTES = 2**26  # a picture file larger than this is refused: 16 are held at a time
UNKNOWN = (None, None, None, (), None)
Record = namedtuple("Record", "key place label split group tags box", defaults=UNKNOWN)


def find(path, boxes_file=None, layout=None):
    """A path or the word - -> (records, fetch, notes), every key once, with the boxes of a file.

    layout: a pattern for sources that only folders tell of; "-": all pictures, no labels.
    """
    reader, name = reader_of(path)
    more = {"layout": layouts.parse_layout(layout)} if layout and not name else {}
    records, fetch, *notes = reader(sys.stdin if str(path) == "-" else Path(path), **more)
    if not records:
        raise UserError(nothing_in("standard input" if str(path) == "-" else path))
    if name:
        notes.insert(0, layouts.told(name, [(r.split, r.label) for r in records]))
    refuse_odd(path, [r.key for r in records])
    first = {}
    for r in records:
        first.setdefault(r.key, r)
    if len(first) < len(records):
        notes.append(f"{len(records) - len(first)} names came twice; the first of each is kept")
    records = list(first.values())
    notes += alike_but_for_case({r.label for r in records} - {None})
    if boxes_file:
        records = with_boxes(records, boxes_file)
    return records, fetch, notes


def reader_of(path):
    """-> the function that reads this path, and its name, None where only folders tell of pictures."""
    if str(path) == "-":
        return from_list, None
    if not str(path) or not Path(path).exists():
        fix = "give a folder, an archive or a list of images, or the word toon"
        raise UserError(f"{path or 'an empty PATH'} does not exist; {fix}")
    for fits, reader, name in READERS:
        if fits(regular(Path(path))):
            return reader, name
    known = "folder, whole archive (zip, tar, tar.gz) or list (csv, tsv, jsonl)"
    raise UserError(f"{path} is no {known}")


def refuse_odd(path, names):
    """Names are printed, and are a line each."""
    for name in names:
        if ODD.search(name) or len(name) > MOST_NAME:
            odd = f"has control characters or more than {MOST_NAME} characters; rename it"
            raise UserError(f"{path} holds the name {name[:80]!r}, which {odd}")


def alike_but_for_case(names):
    """A line for classes such as Miku and miku."""
    alike = defaultdict(list)
    for name in sorted(names):
        alike[name.casefold()].append(name)
    same = [" and ".join(some) for some in alike.values() if len(some) > 1]
    told = f"classes that differ only in case are kept apart: {', '.join(same[:3])}"
    return [told] if same else []


def with_boxes(records, boxes_file):
    boxes = read_boxes(boxes_file)
    if not any(r.key in boxes for r in records):
        named = f"it has {next(iter(boxes), None)!r}, the images are named like {records[0].key!r}"
        raise UserError(f"--boxes {boxes_file} names none of the images; {named}")
    return [r._replace(box=boxes.get(r.key, r.box)) for r in records]


def nothing_in(path):
    """The error for a source without pictures; they may lie in an archive there."""
    inside = [p for p in sorted(Path(path).glob("*")) if p.name.lower().endswith(ARCHIVES)]
    if inside:
        more = f" and {len(inside) - 1} more archives" if len(inside) > 1 else ""
        command = f"python data.py {shlex.quote(str(inside[0]))}"
        there = f"but {inside[0].name} lies there{more}; give the archive: {command}"
        return f"no image found in {path}, {there}"
    looked = " ".join(sorted(SUFFIXES))
    return f"no image found in {path}; looked for {looked} in it and its subfolders"


def nfc(text):
    """One spelling per name: macOS writes the same letters decomposed."""
    return unicodedata.normalize("NFC", text)


def is_image(name):
    """By its suffix; __MACOSX/._x.png and .thumbnails/x.png are not one."""
    parts = name.split("/")
    hidden = any(part.startswith((".", "__")) and part not in (".", "..") for part in parts)
    return os.path.splitext(name)[1].lower() in SUFFIXES and not hidden


# ---- folders -------------------------------------------------------------------------------------


def by_path(found, layout=None, captions=None):
    """[(place, name)] -> records whose folders say split and class, and a note: read as what.

    Numbers before names are no names: AnimeFace Character (moeimouto) counts its classes,
    thumb/000_hatsune_miku/face_1_2_3.png. kohya's scripts count repeats, 10_miku/1.png, with a
    caption beside each picture. captions {name: tags}.
    """
    keys = [nfc(name.removeprefix("./")) for _, name in found]
    dirs = [key.split("/")[:-1] for key in keys]
    captions = captions or {}
    kohya = 2 * len(captions) > len(keys)
    numbered = [d if kohya or d[-2:-1] == ["thumb"] else [] for d in dirs]
    names = [after_number(d[-1]) if d else None for d in numbered]
    other = None
    if layout is None and layouts.few(names.count(None), len(dirs)):
        what = "kohya's folders" if kohya else "AnimeFace Character"
        rows = [name and (None, name) for name in names]
    else:
        if layout is None:
            layout, other = layouts.detect(dirs)
        what, rows = "/".join(layout) or "pictures only", layouts.read(dirs, layout)
    records = []
    for key, (place, name), row in zip(keys, found, rows, strict=True):
        if row:
            records.append(Record(key, place, row[1], row[0], tags=captions.get(name, ())))
    if found and not records:
        problem = f"--layout {what} fits none of the {len(keys)} pictures, which lie like {keys[0]}"
        fix = "a split is named train, val, dev or test, or much like it"
        raise UserError(f"{problem}; {fix}")
    return records, [layouts.told(what, rows, keys, other)]


def after_number(folder):
    """000_hatsune_miku -> hatsune_miku; None where it does not begin with a number."""
    found = re.fullmatch(r"\d+_(.+)", folder)
    return found and found[1]


def read_whole(path):
    if os.path.getsize(regular(path)) > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES >> 20} MB")
    with open(path, "rb") as f:
        return f.read()


def fetch_files(records, root=""):
    """For records whose place is the path of a file, relative to root or absolute."""
    return ((r, partial(read_whole, os.path.join(root, r.place))) for r in records)


def walk(folder, prefix="", above=()):
    """Names of the images below a folder, sorted. Links that lead back are not followed."""
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
    names = list(walk(root))
    numbered = [n for n in names if after_number(Path(n).parent.name)]
    captions = tags.read_captions(root, numbered) if layout is None else {}
    records, notes = by_path([(name, name) for name in names], layout, captions)
    return records, partial(fetch_files, root=root), *notes


def from_list(lines, layout=None):
    """One path a line; split and class are said by the folders below those that all have in common."""
    paths, top = [os.path.normpath(line.rstrip("\r\n")) for line in lines if line.strip()], "."
    if paths and all(map(os.path.isabs, paths)):
        top = os.path.commonpath([os.path.dirname(p) for p in paths])
    named = sorted((p, Path(os.path.relpath(p, top)).as_posix()) for p in paths)
    records, notes = by_path([(p, name) for p, name in named if is_image(name)], layout)
    return records, fetch_files, *notes


# ---- tables --------------------------------------------------------------------------------------

LIST = ("path", "label", "split", "tags")  # columns of a table whose first line does not name them
CALLED = dict.fromkeys(("dir", "file", "filename", "file_name", "image"), "path")
CALLED |= dict.fromkeys(("class", "class_id", "character"), "label")


def table_rows(path, quoting=csv.QUOTE_MINIMAL):
    """Yield (line number, [cells]) of a csv or tsv file, empty lines left out."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(regular(path), newline="", encoding="utf-8-sig") as f:
        rows = csv.reader(f, delimiter=delimiter, quoting=quoting)
        try:
            yield from ((rows.line_num, row) for row in rows if row)
        except (UnicodeDecodeError, csv.Error) as problem:
            after = f"after line {rows.line_num}: {problem}"
            raise UserError(f"{path} is not a table in UTF-8 {after}") from None


def read_table(path, columns=LIST, root="", names=None, split=None):
    """Records of a csv or tsv, whose first line may name its columns. Paths lie below `root`.

    names {label in the file: class}; split: of all rows, if there is no such column.
    """
    records = []
    for number, row in table_rows(path):
        words = [CALLED.get(word, word) for word in (cell.strip().lower() for cell in row)]
        if number == 1 and "path" in words:
            columns = words
            continue
        cells = dict(zip(columns, map(str.strip, row), strict=False))
        if len(row) > len(columns) or not cells.get("path"):
            found = ",".join(row)[:80]
            raise UserError(f"{path}, line {number} is not {','.join(columns)} but {found!r}")
        if is_image(cells.get("label", "")) and not is_image(cells["path"]):
            # an older release of DAF:re has them the other way round
            cells["path"], cells["label"] = cells["label"], cells["path"]
        given = cells.get("split", "")
        if given and not layouts.split_of(given):
            problem = f"split {given!r} is none of train, val, test, dev"
            raise UserError(f"{path}, line {number}: {problem}")
        records.append(record_of(cells, root, names or {}, layouts.split_of(given) or split))
    return records


def record_of(cells, root, names, split):
    """{column: cell} -> a record. An empty label is no label."""
    place, label = cells["path"], cells.get("label", "")
    label = sys.intern(nfc(names.get(label, label))) or None
    words = tuple(sys.intern(nfc(word)) for word in tags.words_of(cells.get("tags", "")))
    return Record(nfc(place), root + place, label, split, cells.get("group") or None, words)


def from_table(path):
    """csv or tsv of path,label[,split][,tags][,group]; paths relative to its folder."""
    records = read_table(path)
    without = sum(r.split is None for r in records)
    if 0 < without < len(records):
        fix = "give it to all or none"
        raise UserError(f"{path}: {without} of {len(records)} rows have no split; {fix}")
    return records, partial(fetch_files, root=path.parent)


def from_dafre(root):
    """DAF:re (Rios et al. 2021): labels/{train,val,test}.csv of class_id,path; faces/ or fullMin256/.

    Pictures are named by their id of Danbooru, whose metadata, if they lie there, give the tags.
    """
    folder = next((d for d in ("faces", "fullMin256") if (root / d).is_dir()), None)
    if folder is None:
        raise UserError(f"{root} has DAF:re's labels alone; unpack faces/ or fullMin256/ there")
    labels, records = root / "labels", []
    names = read_names(labels / "classid_classname.csv", 0, 1)
    for split in ("train", "val", "test"):
        table = labels / f"{split}.csv"
        if table.exists():
            records += read_table(table, ("label", "path"), f"{folder}/", names, split)
    records, notes = with_tags(root, records) if metadata_files(root) else (records, [])
    return records, partial(fetch_files, root=root), *notes


def read_names(path, key, name):
    """{cell `key`: cell `name`} of a table's rows; nothing where there is no such file."""
    quoting = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
    rows = table_rows(path, quoting) if path.exists() else ()
    return {row[key]: sys.intern(nfc(row[name])) for _, row in rows if len(row) > max(key, name)}


def with_tags(root, records):
    """Records with the tags that Danbooru's metadata have of them, and notes."""
    posts, notes = read_posts(root, {Path(r.key).stem: r.key for r in records})

    def plain(name):
        return name.lower().replace(" ", "_")

    # whoever wrote no categories has the characters among the tags
    people = {plain(r.label) for r in records if r.label}
    of = {r.key: tuple(t for t in r.tags if plain(t) not in people) for r in posts}
    notes.append(f"{sum(map(bool, of.values()))} of {len(records)} pictures have tags")
    return [r._replace(tags=of.get(r.key, ())) for r in records], notes if posts else notes[:-1]


def from_acrd(root):
    """ACRD (Wang 2019, Danbooru2018AnimeCharacterRecognitionDataset): faces.tsv of path, id of the
    character, box; tagIds.tsv of name, id; {train,val,test}Split.tsv of ids of Danbooru.

    The faces lie anywhere below, each named by its id of Danbooru. Those in no list, where there
    are lists, are left out as in the paper's baseline: a detector was not sure of them.
    """
    if not (root / "faces.tsv").exists():
        raise UserError(f"{root} has tagIds.tsv alone; put faces.tsv and the pictures there")
    names = read_names(root / "tagIds.tsv", 1, 0)
    split_of = {}
    for split in ("train", "val", "test"):
        split_of |= dict.fromkeys(read_names(root / f"{split}Split.tsv", 0, 0), split)
    have = {Path(name).stem: name for name in walk(root)}
    records, absent, unsure = [], 0, 0
    for r in read_table(root / "faces.tsv", ("path", "label", "box"), names=names):
        number = Path(r.place.replace("\\", "/")).stem
        place = have.get(number)
        absent += place is None
        unsure += bool(split_of) and number not in split_of
        if place and (number in split_of or not split_of):
            records.append(r._replace(key=nfc(place), place=place, split=split_of.get(number)))
    told = [f"{absent} lines of faces.tsv have no picture here"] if absent else []
    told += [f"{unsure} faces are in none of the lists, and left out"] if unsure else []
    return records, partial(fetch_files, root=root), *told


def from_icartoonface(root):
    """iCartoonFace (Zheng et al. 2020): icartoonface_rectrain/IDENTITY/x.jpg, and boxes of faces."""
    boxes = read_boxes(root / "icartoonface_rectrain_det.txt")
    folder = root / "icartoonface_rectrain"
    if not folder.is_dir():
        fix = "unpack icartoonface_rectrain/ there"
        raise UserError(f"{root} has iCartoonFace's boxes alone; {fix}")
    records = [Record(n, n, n.split("/")[0], box=box) for n, box in boxes.items()]
    return records, partial(fetch_files, root=folder)


def read_boxes(path):
    """Lines of path x1 y1 x2 y2 in pixels -> {path: (x1, y1, x2, y2)}."""
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


# ---- parquet -------------------------------------------------------------------------------------


def parquet_files(path):
    """The file itself, or those with names of splits in a folder, or in data/ there."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    inside = [*path.glob("*.parquet"), *path.glob("data/*.parquet")]
    return sorted(p for p in inside if split_of_file(p))


def split_of_file(path):
    """train-00000-of-00002.parquet -> train."""
    return layouts.split_of(re.split(r"[-.]", path.name)[0])


COLUMNS = {  # of a parquet file: the first of these that it has
    "image": ("image", "img", "picture", "jpg", "png", "webp"),
    "label": ("label", "character", "class", "name"),
    "tags": ("tags",),
}
# what pyarrow raises for a broken file, and our code for one of another kind
BROKEN_PARQUET = (ValueError, OSError, LookupError, AttributeError, TypeError)


def from_parquet(path):
    """Parquet as Hugging Face writes it: image of {bytes, path}, label, tags; files name their split."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} holds parquet files; pip install pyarrow reads them") from None
    tables, records = {}, []
    for file in parquet_files(path):
        try:
            tables[file] = parquet.ParquetFile(file)
            records += parquet_records(file, tables[file])
        except BROKEN_PARQUET as problem:
            told = str(problem)[:100]
            raise UserError(f"{file} is no whole parquet file of pictures: {told}") from None
    return records, partial(fetch_rows, tables=tables)


def fetch_rows(records, tables):
    """For records whose place is (file, row group, row). One row group at a time is held."""
    held, images = None, []
    for r in records:
        file, part, row = r.place
        if held != (file, part):
            column = columns_of(tables[file])["image"]
            rows = tables[file].read_row_group(part, columns=[column]).to_pylist()
            held, images = (file, part), [cells[column] for cells in rows]
        yield r, partial(image_bytes, images[row])


def columns_of(table):
    """{meaning: name of the column}, of those that a parquet file has."""
    have, found = table.schema_arrow.names, {}
    for meaning, names in COLUMNS.items():
        named = [name for name in names if name in have]
        found |= {meaning: named[0]} if named else {}
    if "image" not in found:
        raise ValueError(f"no column image, but {', '.join(have)}")
    return found


def parquet_records(file, table):
    """A record for each row of a file; nothing of its pictures is read."""
    columns, records = columns_of(table), []
    label, words = columns.get("label"), columns.get("tags")
    asked = [name for name in (label, words) if name]
    about = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(label, {}).get("names")
    for part in range(table.num_row_groups):
        rows = [{}] * table.metadata.row_group(part).num_rows
        rows = table.read_row_group(part, columns=asked).to_pylist() if asked else rows
        for row, cells in enumerate(rows):
            name, tagged = cells.get(label), cells.get(words) or ()
            name = names[name] if names and isinstance(name, int) and name >= 0 else name
            name = None if name in (None, "", -1) else nfc(str(name))
            tagged = tags.words_of(tagged) if isinstance(tagged, str) else tuple(map(str, tagged))
            key = f"{file.stem}/{len(records):07d}"
            record = Record(key, (file, part, row), name, split_of_file(file), tags=tagged)
            records.append(record)
    return records


def image_bytes(cell):
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or len(data) > MOST_BYTES:
        raise ValueError(f"the row holds no picture of up to {MOST_BYTES >> 20} MB")
    return data


# ---- archives ------------------------------------------------------------------------------------


def refuse_escape(archive, name):
    """../x, /x and C:\\x lead out of an archive, and who packs that is not to be trusted."""
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
    images = [info for info in archive.infolist() if is_image(info.filename)]
    images.sort(key=lambda info: info.filename)

    def fetch(records):
        return ((r, partial(read_member, archive, r.place)) for r in records)

    records, notes = by_path([(info, zip_name(info)) for info in images], layout)
    return records, fetch, *notes


def zip_name(info):
    """Names without the UTF-8 flag are mostly UTF-8 (macOS) or Japanese, not cp437."""
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
    """A tar is read through from its beginning for every split, and never extracted."""

    def fetch(records):
        wanted = {r.place: r for r in records}
        for name, data in tar_images(path, wanted):
            if data is not None:
                yield wanted.pop(name), partial(bytes, data)

    records, notes = by_path([(name, name) for name, _ in tar_images(path)], layout)
    return records, fetch, *notes


# ---- tar: its headers say how much follows, and nothing is read before that is checked

MOST_HEADER = 2**20  # bytes of a long name, or of a set of PAX fields
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
ANNOUNCED = (*LONG, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
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
                    # one too large can't be read, and is named
                    size = member.size if member.size <= MOST_BYTES else 0
                    asked = member.name in wanted
                    yield member.name, tar.extractfile(member).read(size) if asked else None
    except BROKEN_TAR as problem:
        raise UserError(f"{path} is not a whole tar archive: {problem}") from None


# ---- Danbooru's metadata -------------------------------------------------------------------------


def metadata_files(path):
    """The file itself, or metadata.json[l] or metadata/ in a folder."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".json", ".jsonl") else []
    inside = [path / "metadata.jsonl", path / "metadata.json"]
    inside += sorted((path / "metadata").glob("*"))
    return [p for p in inside if p.is_file() and p.suffix in ("", ".json", ".jsonl")]


def from_danbooru(path):
    """Danbooru-style metadata; the pictures lie anywhere beside it, named by id or md5.

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


def texts_of(file):
    """Yield (line number, JSON text) of each post in a file; an array of posts is one text a post."""
    with open(file, "rb") as f:
        if f.read(1) == b"[":
            try:
                posts = json.loads(file.read_bytes())
                yield from enumerate(map(json.dumps, posts), 1)
                return
            except (ValueError, RecursionError):
                pass  # lines that begin with a bracket
        f.seek(0)
        yield from ((number, line) for number, line in enumerate(f, 1) if line.strip())


def read_posts(path, have):
    """The metadata at path -> (records of posts whose picture is in have, notes)."""
    count, absent = 0, 0
    broken, records = [], []
    for file in metadata_files(path):
        for number, text in texts_of(file):
            count += 1
            try:
                post = parse_table(text)
                found = picture_of(post, have)
                records += [post_record(post, found)] if found else []
                absent += not found
            except (ValueError, AttributeError, TypeError, RecursionError):
                broken.append(f"{file.name}, line {number}")
    lost = f"{len(broken)} of {count} lines are no JSON objects, the first: {(broken or [''])[0]}"
    if len(broken) > MOST_BROKEN * count:
        raise UserError(f"{path} is no metadata of pictures: {lost}; correct or remove them")
    notes = [f"{absent} lines of the metadata have no picture here"] if absent else []
    return records, notes + [lost] * bool(broken)


def picture_of(post, have):
    keys = [k for k in ("file_name", "path", "id", "md5") if post.get(k) is not None]
    return next((have[str(post[k])] for k in keys if str(post[k]) in have), None)


def post_record(post, place):
    """Tags are a string, a list of words or {name, category} (4: character), or {kind: list}."""
    words = post.get("tags")
    if isinstance(words, dict):
        characters = words.get("character") or ()
        lists = [some for some in words.values() if isinstance(some, list)]
        words = [word for some in lists for word in some]
    elif isinstance(words, list):
        named = [t for t in words if isinstance(t, dict) and t.get("name")]
        characters = [t["name"] for t in named if str(t.get("category")) == "4"]
        words = [t["name"] for t in named] + [t for t in words if not isinstance(t, dict)]
    else:
        characters = (post.get("tag_string_character") or "").split()
        words = post.get("tag_string") or post.get("tag_string_general") or words or ""
        words = words.split()
    characters, words = ([sys.intern(nfc(str(t))) for t in some] for some in (characters, words))
    label = characters[0] if len(characters) == 1 else None
    group = post.get("parent_id") or post.get("id")
    kept = tuple(word for word in words if word not in characters)
    return Record(nfc(place), place, label, None, group and str(group), kept)


# ---- the readers ---------------------------------------------------------------------------------


def holds(name):
    return lambda path: (path / name).exists()


def is_table(path):
    return path.suffix.lower() in (".csv", ".tsv")


# Does it fit, the reader, what the path is taken for (None: only folders tell split and class).
# Published data sets, by the files that only they have, come first.
READERS = (
    (holds("labels/train.csv"), from_dafre, "DAF:re"),
    (holds("icartoonface_rectrain_det.txt"), from_icartoonface, "iCartoonFace"),
    (holds("tagIds.tsv"), from_acrd, "ACRD"),
    (metadata_files, from_danbooru, "Danbooru metadata"),
    (parquet_files, from_parquet, "parquet"),
    (Path.is_dir, from_folder, None),
    (is_table, from_table, "a table"),
    (zipfile.is_zipfile, from_zip, None),
    (is_tar, from_tar, None),
)
