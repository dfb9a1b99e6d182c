"""Where pictures come from: every layout that people have, turned into the same plain records.

`find(path)` -> (records, fetch, notes). A record says all that the source knows of one picture:

    key    its name in the data set, Unicode in NFC    place  what `fetch` needs to find its bytes
    label  class name or None                          split  train, val, test, dev or None
    group  what a split must not tear apart, or None   tags   tuple of words
    box    (x1, y1, x2, y2) in pixels around the figure, or None

`fetch(records)` yields (record, load), of a tar or a parquet file in its own order, and load() ->
bytes, so that a pool of threads may call it. `notes` are lines for the user: what the path was taken
for, and what was left out. Each reader, from_...(path) -> (records, fetch, *notes), knows one kind of
source; READERS is the table of them. Where only folders tell split and class, ingest/files.py finds
the pictures and ingest/layouts.py reads their folders. No picture is opened here.
"""

import contextlib
import csv
import itertools
import json
import os
import re
import zipfile
from collections import namedtuple
from functools import partial
from pathlib import Path

from common.door import parse_table, reading, regular
from common.train import UserError
from ingest import files, layouts, tags
from ingest.files import files_below, is_image, nfc, open_folder, open_list, walk

MOST_BROKEN = 0.05  # of the lines of a metadata file: where more are no JSON, it is something else
MOST_ABSENT = 0.5  # of the paths in a list: where more are not there, they lie somewhere else
MOST_NAME = 1000  # characters of a picture's name
ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # NUL, escapes and what breaks a line
UNKNOWN = (None, None, None, (), None)
Record = namedtuple("Record", "key place label split group tags box", defaults=UNKNOWN)


def find(path, layout=None, names=None):
    """A path or the word - -> (records, fetch, notes), every key once.

    layout: a pattern for sources that only folders tell of; (): all pictures, no labels.
    names: the code page of a zip's names, where they do not tell it.
    """
    reader, name = reader_of(path, layout)
    if reader is files.open_zip:
        reader = partial(files.open_zip, code=names)
    question = None
    if name:
        records, fetch, *notes = reader(Path(path))
        notes.insert(0, layouts.described(name, [(r.split, r.label) for r in records]))
    else:
        pictures, fetch, *more = reader(Path(path))
        records, notes, question = by_path(pictures, layout)
        notes += more
    if reader in (open_folder, open_beside) and layout != ():
        if layout is None:
            records, lines, has_labels = with_metadata(records, Path(path))
            notes += lines
            question = None if has_labels else question
        records, lines = tags.with_captions(records, folder_of(path))
        notes += lines
    if not records:
        fix = "give an archive itself; data.py reads a file of boxes with --detect"
        if reader is from_danbooru and Path(path).is_dir():
            fix = "no line of its metadata names one; --layout class reads the folders alone"
        looked = f"looked for {' '.join(sorted(files.SUFFIXES))} in it and its subfolders"
        raise UserError("; ".join([f"no image found in {path}", *notes[1:], looked, fix]))
    if question:
        raise UserError(f"{path}: {question}")
    first, again = {}, []
    for r in records:
        if r.key in first:
            again.append(r.key)
        first.setdefault(r.key, r)
    refuse_odd(path, first)
    if reader in (from_table, open_list):
        refuse_absent([r.place for r in first.values()], Path(path).parent)
    notes += layouts.counted(sorted(again), "names came twice", "the first of each is kept")
    records, lines = tags.without_names(list(first.values()))
    return records, fetch, notes + lines


def reader_of(path, layout=None):
    """-> the function that reads this path, and its name, None where folders tell of pictures.

    With a layout they alone do, whatever else lies in a folder; but pictures in parquet have none.
    """
    known = "folder, whole archive (zip, tar, tar.gz) or list (csv, tsv, jsonl)"
    reader, name = choose(path, READERS, known)
    if layout is not None and Path(path).is_dir() and reader is not from_parquet:
        return open_folder, None
    return reader, name


def folder_of(path):
    """A folder itself, or the one that a file lies in."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def choose(path, readers, known):
    """-> the first of the readers (does it fit, reader, name) that fits, and its name."""
    if str(path) != "-" and not (str(path) and Path(path).exists()):
        fix = "give a folder, an archive or a list of images, or the word toon"
        raise UserError(f"{path or 'an empty PATH'} does not exist; {fix}")
    for fits, reader, name in readers:
        if fits(regular(Path(path))):
            return reader, name
    raise UserError(f"{path} is no {known}")


def left_out(lines, among, what, path, fix="correct or remove them"):
    """A note on what is left out, or none; a UserError where that is more than a twentieth."""
    if len(lines) > MOST_BROKEN * among:
        raise UserError(f"{path}: {len(lines)} of {among} {what}, the first: {lines[0]}; {fix}")
    return layouts.counted(lines, f"of {among} {what}, and are left out")


def refuse_odd(path, names):
    """Names are printed, and are a line each."""
    for name in names:
        if ODD.search(name) or len(name) > MOST_NAME:
            odd = f"has control characters or more than {MOST_NAME} characters; rename it"
            raise UserError(f"{path} holds the name {name[:80]!r}, which {odd}")


def refuse_absent(names, root):
    """A list that was written elsewhere: most of what it names is not there."""
    absent = [name for name in names if not os.path.exists(root / name)]
    if len(absent) > MOST_ABSENT * len(names):
        count = f"{len(absent)} of {len(names)} paths do not lie below {root.resolve()}"
        raise UserError(f"{count}, the first: {absent[0]}; write them relative to it")


# ---- what folders tell ---------------------------------------------------------------------------


def by_path(pictures, layout=None):
    """[(place, name)] -> records whose folders say split and class; lines: read as what; a question."""
    named = [(place, nfc(name.removeprefix("./"))) for place, name in pictures]
    named, others = without_others(named, layout)
    dirs = [key.split("/")[:-1] for _, key in named]
    rows, what, doubts, question = layouts.understand(dirs, layout)
    pairs = [*zip(named, rows, strict=True)]
    records = [Record(key, place, row[1], row[0]) for (place, key), row in pairs if row]
    aside = [key for (_, key), row in pairs if row is None]
    if named and not records:
        problem = f"--layout {what} fits none of the {len(rows)} pictures, such as {named[0][1]}"
        raise UserError(f"{problem}; a split is named train, val, dev or test, or much like it")
    line = layouts.described(what, [row for row in rows if row], aside)
    return records + others, [line, *doubts], question


def without_others(named, layout):
    """[(place, key)] -> those of somebody, and records of those in a folder unknown or others.

    unknown/1.png may lie beside series/miku/1.png, where it would not fit the pattern.
    """
    is_other = [layouts.shows_nobody(Path(key).parent.name) for _, key in named]
    if layout is not None or all(is_other):
        return named, []
    others = [pair for pair, other in zip(named, is_other, strict=True) if other]
    some = [pair for pair, other in zip(named, is_other, strict=True) if not other]
    return some, [Record(key, place, Path(key).parent.name) for place, key in others]


# ---- tables --------------------------------------------------------------------------------------

COLUMNS = ("path", "label", "split", "tags")  # of a table whose first line does not name them
BOX = ("x1", "y1", "x2", "y2")
KNOWN = (*COLUMNS, "group", *BOX)
EXCEL = re.compile(r"sep=(.)\r?\n?$")  # the first line of a csv, where Excel is told its separator
CALLED = dict.fromkeys(("dir", "file", "filename", "file_name", "image", "picture"), "path")
CALLED |= dict.fromkeys(("labels", "class", "class_id", "character"), "label")
CALLED |= dict(zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True))
CALLED |= dict(zip(("left", "top", "right", "bottom"), BOX, strict=True))


def header_of(row):
    """The columns that a first line names, or None. The first column of a table of boxes is a path."""
    words = [cell.strip().lower() for cell in row]
    words = [CALLED.get(word, word) for word in words]
    if "path" in words:
        return words
    return ["path", *words[1:]] if "x1" in words else None


def style_of(path):
    """How a table separates its cells: a csv by what makes a header or a picture of its first lines.

    Where numbers have a comma, Excel writes semicolons; and it may say so in a line before the first.
    """
    if path.suffix.lower() != ".csv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with open(regular(path), encoding="utf-8-sig", errors="replace") as f:
        lines = [*itertools.islice((line for line in f if line.strip()), 2)]  # one may be a header
    if said := EXCEL.match("".join(lines[:1])):
        return {"delimiter": said[1], "skipinitialspace": True}
    for sign, line in itertools.product(",;\t", lines):
        cells = [cell.strip(' "\n') for cell in line.split(sign)]
        if header_of(cells) or any(map(is_image, cells)):
            return {"delimiter": sign, "skipinitialspace": True}
    return {"skipinitialspace": True}


def table_rows(path, columns=COLUMNS):
    """Yield (where, {column: cell}) of a csv, or of a file with tabs between its cells.

    Its first line may name the columns. `where` is for messages. Tabs go without quotes.
    """
    style = style_of(path)
    with open(regular(path), newline="", encoding="utf-8-sig") as f:
        lines = ("\n" if EXCEL.match(line) else line for line in f)  # the count of lines stays
        rows = csv.reader(lines, **style)
        try:
            for number, row in enumerate(row for row in rows if any(map(str.strip, row))):
                if number == 0 and header_of(row):
                    columns = header_of(row)
                    if again := [name for name in KNOWN if columns.count(name) > 1]:
                        raise csv.Error(f"it has two columns for {again[0]}; remove one")
                    continue
                where = f"{path}, line {rows.line_num}"
                cells = dict(zip(columns, map(str.strip, row), strict=False))
                if len(row) > len(columns) or ("path" in columns and not cells.get("path")):
                    line = f"{','.join(row)[:80]!r}"
                    raise UserError(f"{where} is not {','.join(columns)} but {line}")
                yield where, cells
        except (UnicodeDecodeError, csv.Error) as problem:
            after = f"after line {rows.line_num}: {problem}"
            raise UserError(f"{path} is not a table in UTF-8 {after}") from None


def box_of(cells, where):
    """The box in the cells of a row, four numbers; None where they are empty or not there."""
    numbers = [cells.get(name, "") for name in BOX]
    if not any(numbers):
        return None
    try:
        return tuple(map(float, numbers))
    except ValueError:
        raise UserError(f"{where}: {','.join(numbers)} is no box {','.join(BOX)}") from None


def split_in(cells, where):
    """The split in the cells of a row, or None."""
    given = cells.get("split", "")
    if given and not layouts.split_of(given):
        raise UserError(f"{where}: split {given!r} is none of train, val, test, dev")
    return layouts.split_of(given)


def read_table(path, columns=COLUMNS, names=None, split=None):
    """Records of a table.

    names {label in the file: class}; split: of all rows, if there is no such column.
    """
    records = []
    for where, cells in table_rows(path, columns):
        if is_image(cells.get("label", "")) and not is_image(cells["path"]):
            # an older release of DAF:re has them the other way round
            cells["path"], cells["label"] = cells["label"], cells["path"]
        box = box_of(cells, where)
        if box and not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"{where}: of a box x1 < x2 and y1 < y2, not {box}")
        label = cells.get("label")
        cells |= {"label": (names or {}).get(label, label), "box": box}
        cells |= {"split": split_in(cells, where) or split}
        records.append(record_of(cells, cells["path"]))
    return records


def record_of(cells, place):
    """{column: cell} -> a record. An empty label is no label; tags are a text or a list."""
    label, group = cells.get("label"), cells.get("group")
    words = cells.get("tags") or ()
    return Record(
        nfc(cells["path"]),
        place,
        label=None if label in (None, "") else tags.word(label),
        split=cells.get("split"),
        group=str(group) if group else None,
        tags=tags.words_of(words) if isinstance(words, str) else tuple(map(tags.word, words)),
        box=cells.get("box"),
    )


def read_names(path, columns):
    """{id: name} of a table with these two columns; nothing where there is no such file."""
    rows = table_rows(path, columns) if path.exists() else ()
    return {cells["id"]: cells.get("name") for _, cells in rows}


def from_table(path):
    """csv or tsv of path,label[,split][,tags][,group][,x1,y1,x2,y2]; paths relative to its folder."""
    records = read_table(path)
    boxes = [r.box for r in records if r.box]
    if boxes and max(map(max, boxes)) <= 1:
        fix = f"write {', '.join(BOX)} in pixels, or remove them"
        raise UserError(f"{path}: no box reaches beyond 1; {fix}")
    named = [is_image(r.place) for r in records[:2]]
    if named == [False, True]:
        fix = f"name the columns {', '.join(KNOWN)}"
        raise UserError(f"{path}: {records[0].key!r} is no picture; {fix}")
    _, cells = next(table_rows(path), ("", {}))
    unread = [name for name in cells if name not in KNOWN]
    notes = []
    if unread:
        notes = [f"columns that are not read: {', '.join(unread)}; known are {', '.join(KNOWN)}"]
    records = [moved(r, files.as_it_lies(r.place, path.parent)) for r in records]
    without = sum(r.split is None for r in records)
    if 0 < without < len(records):
        fix = "give it to all or none"
        raise UserError(f"{path}: {without} of {len(records)} rows have no split; {fix}")
    return records, files_below(path.parent), *notes


def moved(record, place):
    """A record of a picture that lies elsewhere than a table says."""
    return record if place == record.place else record._replace(key=nfc(place), place=place)


# ---- published data sets -------------------------------------------------------------------------


def from_dafre(root):
    """DAF:re (Rios et al. 2021): labels/{train,val,test}.csv of class_id,path; faces/ or fullMin256/.

    Pictures are named by their id of Danbooru, whose metadata, if they lie there, give the tags.
    """
    names = read_names(root / "labels/classid_classname.csv", ("id", "name"))
    records, notes = [], []
    for split in ("train", "val", "test"):
        table = root / f"labels/{split}.csv"
        if table.exists():
            records += read_table(table, ("label", "path"), names, split)
    if metadata_files(root):
        posts, notes = read_posts(root, {Path(r.key).stem: r.key for r in records})
        words = {post.key: post.tags for post in posts}
        notes.append(f"{sum(map(bool, words.values()))} of {len(records)} pictures have tags")
        records = [r._replace(tags=words.get(r.key, ())) for r in records]
    folder = next((d for d in ("faces", "fullMin256") if (root / d).is_dir()), "faces")
    return records, files_below(root / folder), *notes


def from_acrd(root):
    """ACRD (Wang 2019, Danbooru2018AnimeCharacterRecognitionDataset): faces.tsv of path, id of the
    character, head; tagIds.tsv of name, id; {train,val,test}Split.tsv of ids of Danbooru.

    The faces lie anywhere below, each named by its id of Danbooru. Those in no list, where there
    are lists, are left out as in the paper's baseline: a detector was not sure of them.
    """
    names = read_names(root / "tagIds.tsv", ("name", "id"))
    lists = {}
    for split in ("train", "val", "test"):
        lists |= dict.fromkeys(read_names(root / f"{split}Split.tsv", ("id",)), split)
    have = {Path(name).stem: name for name in walk(root)}
    records, absent, unsure = [], [], []
    for r in read_table(root / "faces.tsv", ("path", "label", "head"), names=names):
        number = Path(r.place.replace("\\", "/")).stem
        if number not in have:
            absent.append(r.place)
        if lists and number not in lists:
            unsure.append(r.place)
        elif number in have:
            records.append(moved(r, have[number])._replace(split=lists.get(number)))
    notes = layouts.counted(absent, "lines of faces.tsv have no picture here")
    notes += layouts.counted(unsure, "faces are in none of the lists, and left out")
    return records, files_below(root), *notes


def from_icartoonface(root):
    """iCartoonFace (Zheng et al. 2020): icartoonface_rectrain/IDENTITY/x.jpg, and boxes of faces."""
    records = read_table(root / "icartoonface_rectrain_det.txt", ("path", *BOX))
    named = [r._replace(label=r.key.split("/")[0]) for r in records]
    return named, files_below(root / "icartoonface_rectrain")


# ---- parquet -------------------------------------------------------------------------------------

IMAGES = ("image", "img", "picture", "jpg", "png", "webp")  # names of a column of pictures


def parquet_files(path):
    """{file: split} of a file, or of those with names of splits in a folder or in data/ there.

    train-00000-of-00002.parquet is of train.
    """
    files = [path] if path.is_file() else [*path.glob("*.parquet"), *path.glob("data/*.parquet")]
    files = [file for file in sorted(files) if file.suffix.lower() == ".parquet"]
    splits = {file: layouts.split_of(re.split(r"[-.]", file.name)[0]) for file in files}
    return {file: split for file, split in splits.items() if split or path.is_file()}


def from_parquet(path):
    """Parquet as Hugging Face writes it: image of {bytes, path}, label, tags; files name their split."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} holds parquet files; pip install pyarrow reads them") from None
    records = []
    for file, split in parquet_files(path).items():
        with reading(file, "parquet file of pictures", "take another copy"):
            records += parquet_records(file, split, ParquetFile(file))
    return records, partial(fetch_rows, opened=ParquetFile)


def parquet_records(file, split, table):
    """A record for each row of a file; nothing of its pictures is read.

    Labels may be numbers of classes, whose names Hugging Face writes into the file; -1 is none.
    """
    schema = table.schema_arrow
    records = []
    image = next((name for name in IMAGES if name in schema.names), None)
    if image is None:
        raise ValueError(f"no column image, but {', '.join(schema.names)}")
    columns = {CALLED.get(name, name): name for name in schema.names if name != image}
    columns = {known: columns[known] for known in ("label", "tags") if known in columns}
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    names = (features.get(columns.get("label")) or {}).get("names") or ()
    classes = dict(enumerate(names)) | {-1: None}
    for number, row in enumerate(rows_of(table, [*columns.values()])):
        cells = {known: row[name] for known, name in columns.items()}
        cells["label"] = classes.get(cells.get("label"), cells.get("label"))
        cells |= {"path": f"{file.stem}/{number:07d}", "split": split}
        records.append(record_of(cells, (file, image, number)))
    return records


def rows_of(table, columns):
    """Yield {column: cell} of each row, a few rows at a time."""
    for batch in table.iter_batches(64, columns=columns):
        yield from batch.to_pylist()


def fetch_rows(records, opened):
    """For records whose place is (file, column, row): each file is read through."""
    wanted = {r.place: r for r in records}
    for file, image in dict.fromkeys(r.place[:2] for r in records):
        for number, cells in enumerate(rows_of(opened(file), [image])):
            if record := wanted.get((file, image, number)):
                yield record, partial(image_bytes, cells[image])


def image_bytes(cell):
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise ValueError("the row holds no picture")
    files.refuse_large(len(data))
    return data


# ---- Danbooru's metadata -------------------------------------------------------------------------

# Kinds of tags that are not general ones, and their numbers.
NAMING = {"artist": "1", "copyright": "3", "character": "4", "meta": "5"}


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
    group; general tags are its tags. A dump's metadata covers more than anybody has downloaded: lines
    without a picture are only counted.
    """
    root = path if path.is_dir() else path.parent
    have = {}
    for name in walk(root):
        for alias in (Path(name).stem, name):
            have.setdefault(nfc(alias), name)  # of 512px/ and original/ the first
    records, notes = read_posts(path, have)
    return records, files_below(root), *notes


def posts_of(file):
    """Yield (line, post) of a file, an array of posts or one a line; None for what is no post."""
    with open(file, "rb") as f:
        if f.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            with contextlib.suppress(ValueError, RecursionError):  # lines that begin with a bracket
                yield from enumerate(json.loads(file.read_bytes()), 1)
                return
        f.seek(0)
        for number, line in enumerate(f, 1):
            post = None
            with contextlib.suppress(ValueError):
                post = parse_table(line)
            if line.strip():
                yield number, post


def read_posts(path, have):
    """The metadata at path -> (records of posts whose picture is in have, notes)."""
    count = absent = 0
    first = None  # of the lines whose picture is not there
    broken, records = [], []
    for file in metadata_files(path):
        for number, post in posts_of(file):
            count += 1
            line = f"{file.name}, line {number}"
            try:
                record = record_of_post(post, have)
            except (AttributeError, TypeError):
                broken.append(line)
                continue
            if record:
                records.append(record)
                continue
            first = first or line
            absent += 1
    fix = "correct or remove them, or let --layout read folders alone"
    fix += "; data.py reads a file of boxes with --detect"
    line = f"{absent} lines of the metadata have no picture here, the first: {first}"
    notes = [line] if absent else []
    return records, notes + left_out(broken, count, "lines are no JSON objects", path, fix)


def tags_of_post(post):
    """-> the words of a post and its characters, without artist, copyright and meta tags.

    Tags are a string, a list of words or {name, category} (4: character), or {kind: list}.
    """
    lists = {kind: (post.get(f"tag_string_{kind}") or "").split() for kind in NAMING}
    words = post.get("tags")
    if isinstance(words, dict):
        lists |= {kind: some for kind, some in words.items() if isinstance(some, list)}
        words = sum(lists.values(), [])
    elif isinstance(words, list):
        named = [t for t in words if isinstance(t, dict) and t.get("name")]
        for kind, number in NAMING.items():
            of_kind = [t["name"] for t in named if str(t.get("category")) in (kind, number)]
            lists[kind] = of_kind or lists[kind]
        words = [t["name"] for t in named] + [t for t in words if not isinstance(t, dict)]
    else:
        strings = post.get("tag_string") or post.get("tag_string_general")
        words = strings.split() if strings else tags.words_of(words or "")
    left_out = set().union(*(lists[kind] for kind in NAMING))
    return [t for t in words if t not in left_out], lists["character"]


def record_of_post(post, have):
    """None where its picture is not in have."""
    said = [post.get(field) for field in ("file_name", "path", "id", "md5")]
    keys = [nfc(str(value)) for value in said if value is not None]
    keys += [key.replace("\\", "/") for key in keys]
    place = next((have[key] for key in keys if key in have), None)
    if place is None:
        return None
    words, people = tags_of_post(post)
    cells = {"path": place, "tags": words, "group": post.get("parent_id") or post.get("id")}
    cells["label"] = people[0] if len(people) == 1 else None
    if isinstance(post.get("label"), str | int):
        cells["label"] = post["label"]
    return record_of(cells, place)


# ---- metadata beside class folders ---------------------------------------------------------------

READ = {"file_name", "path", "label", "tags", "id", "md5"}  # fields of such lines


def first_post(path):
    """The first line of the metadata at path that is an object, or nothing."""
    posts = (post for file in metadata_files(path) for _, post in posts_of(file))
    return next((post for post in posts if isinstance(post, dict)), {})


def names_files(path):
    """Is it of Hugging Face's imagefolder: does it name files, and nothing as Danbooru does?"""
    post = first_post(path)
    danbooru = any(key.startswith("tag_string") for key in post)
    return not danbooru and bool({"file_name", "path"} & post.keys())


def open_beside(path):
    return open_folder(folder_of(path))


def with_metadata(records, path):
    """Records with labels and tags of metadata beside them, or in folders of splits; lines; has it labels?

    Where it has labels, folders are no classes. Of a file, only pictures that it names are kept.
    """
    inside = sorted(path.iterdir()) if path.is_dir() else ()
    splits = [folder for folder in inside if folder.is_dir() and layouts.split_of(folder.name)]
    of, notes = {}, []
    for place in filter(names_files, [path, *splits]):
        above = f"{nfc(place.name)}/" if place in splits else ""
        keys = [r.key for r in records if r.key.startswith(above)]
        posts, lines = read_posts(place, {key.removeprefix(above): key for key in keys})
        of |= {post.key: post for post in posts}
        tagged = sum(bool(post.tags) for post in posts)
        line = f"metadata of {place}: {len(posts)} of {len(keys)} pictures, {tagged} with tags"
        unread = ", ".join(sorted(first_post(place).keys() - READ))
        notes += [f"{line}; not read: {unread}" if unread else line, *lines]
    if (path / "metadata.csv").is_file():
        notes.append("metadata.csv is not read; give that file itself if it has the labels")
    if path.is_file():
        records = [r for r in records if r.key in of]
    records = [r._replace(tags=of[r.key].tags) if r.key in of else r for r in records]
    labels = {post.label for post in of.values()} - {None}
    if labels:
        of_post = {key: post.label for key, post in of.items()}
        records = [r._replace(label=of_post.get(r.key)) for r in records]
        count = f"{len(labels)} classes ({layouts.first(labels)})"
        notes.append(f"labels are those of the metadata: {count}; --layout reads folders")
    return records, notes, bool(labels)


# ---- the readers ---------------------------------------------------------------------------------


def holds(name):
    return lambda path: (path / name).exists()


# Does it fit, the reader, what the path is taken for (None: folders tell split and class, where no
# metadata beside them do). Published data sets, by files that only they have, come first.
READERS = (
    (lambda path: str(path) == "-", open_list, None),
    (holds("labels/train.csv"), from_dafre, "DAF:re"),
    (holds("icartoonface_rectrain_det.txt"), from_icartoonface, "iCartoonFace"),
    (holds("tagIds.tsv"), from_acrd, "ACRD"),
    (names_files, open_beside, None),
    (metadata_files, from_danbooru, "Danbooru metadata"),
    (parquet_files, from_parquet, "parquet"),
    (Path.is_dir, open_folder, None),
    (lambda path: path.suffix.lower() in (".csv", ".tsv"), from_table, "a table"),
    (zipfile.is_zipfile, files.open_zip, None),
    (files.is_tar, files.open_tar, None),
)
