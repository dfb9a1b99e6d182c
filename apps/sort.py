"""Stage 5, for a whole folder: copies of its pictures, sorted by who is in them.

    python -m apps.sort runs/NAME FOLDER --out OUT                     into OUT/WHO and OUT/unknown
    python -m apps.sort runs/NAME FOLDER --group --out OUT             one folder for faces that look alike
    python -m apps.sort runs/NAME PAGES --detect runs/DET --out OUT    to everybody on each page

Reads:  runs/NAME/ of finetune_lora.py with its gallery (apps/recognize.py); folders or files
Writes: OUT/ copies of the pictures, and sorted.csv: the name, the similarity and the copy of each;
        the gallery where it is missing

Your pictures stay where they are, and no copy replaces another one. If the work was stopped, give
the same command again: it goes on with the pictures that sorted.csv does not list.

--group also finds characters that nobody taught. Faces that look alike, by average linkage of their
cosines, share a folder; how alike they have to be was measured on held-out faces, and --alike says
otherwise. A folder has the name of a known character if more than half of its faces are called so.
Otherwise it is called group-001, group-002 and so on, by size. Such groups depend on all pictures at
once, so --group wants a new folder each time.

Wrong copies can be moved to where they belong: apps/learn.py then learns them.

    n faces   D width of an embedding
"""

import contextlib
import csv
import filecmp
import io
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import torch

from apps.groups import alike, check_grouped
from apps.recognize import all_answers, answers, open_recogniser, parser_of, predictions
from common.door import reading, save_csv
from common.locks import reserve
from common.train import UserError, atomic, between, cli, progress, quoted, refuse_useless
from ingest.pictures import file_name, picture_files, shortened, tell_problems

SORTED, UNKNOWN = "sorted.csv", "unknown"  # a file and a folder of OUT
COLUMNS = ("picture", "name", "similarity", "confidence", "copy")
SAVED_AFTER = 100  # rows, and a fiftieth of those that are saved


def parse_args():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="FOLDER", help="folders or files, whose pictures are copied")
    add("--out", type=Path, required=True, metavar="OUT", help="a new folder, or one to go on with")
    add("--group", action="store_true", help="one folder for faces that look alike")
    add("--alike", type=between(-1, 1), metavar="LEAST", help="cosine that joins groups (measured)")
    add("--detect", metavar="RUN", help="runs/NAME of apps/detect.py: sort by each face on a page")
    args = parser.parse_intermixed_args()  # folders may stand before and after flags
    if not args.group:
        refuse_useless(args.given & {"alike"}, "without --group")
    return args


def sort(args, net, header, gallery, autocast):
    """Copy each picture into the folder of who is in it. What sorted.csv lists is done.

    --group: into a folder of faces that look alike, named where the gallery knows most of them.
    """
    out = args.out
    reserve([], lock=out / ".lock")
    rows = open_sorted(out / SORTED)
    if args.group and rows:
        raise UserError(f"{out} has groups already; choose another --out")
    wanted = files_to_sort(args.images, out, rows)
    args.images = not_listed(wanted, rows)
    problems = []
    if not args.group:
        done = len(wanted) - len(args.images)
        again = ", by whatever run; a new folder sorts them anew" if done else ""
        print(f"sort     {len(wanted)} pictures, {done} of them done{again}")
    answered = ()
    names = gallery.names
    if args.group:
        if not args.detect:  # now, and not after all of them are embedded
            check_grouped(len(args.images), "pictures")
        least = args.alike if "alike" in args.given else gallery.alike
        answered = grouped(predictions(args, net, header, autocast, problems), gallery, least)
        names = dict.fromkeys(row["name"] for row in answered)
    elif args.images:
        answered = all_answers(args, net, header, gallery, autocast, problems)
    copy_all(answered, args, wanted, folders_of(names), rows, out / SORTED, problems)
    tell_problems(problems, header["data"])
    words = [args.run, str(out), *(["--detect", args.detect] if args.detect else [])]
    learn = f"python -m apps.learn {quoted(*words)}"
    print(
        f"next: move wrong copies to where they belong (what stays is learned as right), then {learn}"
    )


def grouped(batches, gallery, least):
    """What `predictions` yields -> the rows of `answers`, named by the group of the face.

    least: the mean cosine that joins two groups.
    """
    rows, units = [], []
    for keys, logits, embeddings in batches:
        rows += answers(keys, logits, embeddings, gallery)
        units.append(gallery.whitened(embeddings))
        check_grouped(len(rows), "faces")
    if not rows:
        raise UserError("no face was found, so there is nothing to group")
    groups = alike(torch.cat(units), least)
    names = names_of(groups, [row["name"] for row in rows])
    known = set(names.values()) & set(gallery.names)
    count = f"{len(set(names.values()))}, {len(known)} of them named"
    print(
        f"groups   {count}; --alike {least:g} joined them: less makes fewer, more makes purer ones"
    )
    return [row | {"name": names[number]} for row, number in zip(rows, groups, strict=True)]


def names_of(groups, names):
    """Group and name (None: unknown) of each face -> {group: its name}, as most of its faces."""
    names_in, name_of, unnamed = {}, {}, itertools.count(1)
    for number, name in zip(groups, names, strict=True):
        names_in.setdefault(number, []).append(name)
    for number, inside in sorted(names_in.items()):
        [(name, count)] = Counter(inside).most_common(1)
        known = name is not None and 2 * count > len(inside)
        name_of[number] = name if known else f"group-{next(unnamed):03}"
    return name_of


def copy_all(answered, args, wanted, folders, rows, table, problems):
    """Rows of `answers`, in the order of pictures -> copies, and a row of each in sorted.csv.

    problems: (key, why) of pictures that can't be read, which fills while `answered` is read.
    """

    def file_of(row):
        return row["picture"].rpartition("[")[0] if args.detect else row["picture"]

    before = saved = len(rows)
    save_sorted(rows, table)  # from now on the folder is known as ours
    try:
        pictures = None if args.detect else len(args.images)  # a page may have several faces
        for file, faces in itertools.groupby(progress(answered, "sort", pictures), file_of):
            rows += copies_of(file, faces, wanted[file], folders, table.parent)
            if len(rows) > 1.02 * saved + SAVED_AFTER:  # all of it is written each time
                save_sorted(rows, table)
                saved = len(rows)
        # Of the others, those without a face are done. Those that can't be read may be mended.
        unread = {key for key, _ in problems}
        left = [file for file in not_listed(wanted, rows) if file not in unread]
        rows += [dict.fromkeys(COLUMNS, "") | {"picture": os.path.abspath(file)} for file in left]
    except UserError:
        # After an earlier call, perhaps nothing is left but what can't be read.
        if not before or {*args.images} - {key for key, _ in problems}:
            raise
    finally:  # Ctrl-C, too
        save_sorted(rows, table)
    copies = [row["copy"] != "" for row in rows]
    more = f"{sum(copies[before:])} copies, {sum(copies)} in all"
    if len(copies) > sum(copies):
        more += f" ({len(copies) - sum(copies)} pictures show no face, and were not copied)"
    print(f"wrote    {table.parent}/: {more}, listed in {table}")


def files_to_sort(paths, out, rows):
    """-> {file: its name below OUT/WHO}, each file once; the folders in a given folder stay.

    Where two of several folders have one name, the second copy lies in a folder of its own.

    No picture takes the name of another one, nor that of a copy that a row of sorted.csv lists.
    """
    wanted = {}  # absolute path: (path as given, name)
    copied = [(row["picture"], Path(row["copy"])) for row in rows if row["copy"]]
    # A picture that somebody added to OUT, and apps/learn.py learned, may have the name of another one.
    inside = out.resolve()
    copied = [row for row in copied if not Path(row[0]).resolve().is_relative_to(inside)]
    taken = {Path(*copy.parts[1:]): file for file, copy in copied}

    def is_taken(name, file):
        """Does another picture have this name? If not, the file has it from now on."""
        return os.path.abspath(taken.setdefault(name, file)) != os.path.abspath(file)

    for path in paths:
        if out.resolve().is_relative_to(Path(path).resolve()):
            raise UserError(f"{out} lies in {path}, which is copied; choose another folder")
        for key, file in picture_files(path).items():
            name = Path(key if Path(path).is_dir() else file.name)
            if Path(path).is_dir() and is_taken(name, file):
                name = Path(Path(path).resolve().name, name)
            if is_taken(name, file):
                raise UserError(f"{taken[name]} and {file} have one name; rename one of them")
            wanted.setdefault(os.path.abspath(file), (str(file), name))
    if not wanted:
        raise UserError(f"no picture was found in {', '.join(paths)}")
    return dict(wanted.values())


def not_listed(wanted, rows):
    """The files of `wanted` that no row of sorted.csv names, by whatever path."""
    listed = {os.path.abspath(row["picture"]) for row in rows}
    return [file for file in wanted if os.path.abspath(file) not in listed]


def open_sorted(table):
    """-> the rows of sorted.csv. A folder with other things in it is not ours."""
    if table.exists():
        with reading(table, "table of apps/sort.py", "choose another --out"):
            _, *rows = csv.reader(io.StringIO(table.read_text("utf-8", "surrogateescape")))
            rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        return [row | {"picture": os.path.abspath(table.parent / row["picture"])} for row in rows]
    if any(not path.name.startswith(".") for path in table.parent.iterdir()):  # .lock, .DS_Store
        raise UserError(f"{table.parent} has files, and no {SORTED}; choose a new folder")
    return []


def save_sorted(rows, table):
    """Rows with absolute paths -> sorted.csv, in which they begin at its folder.

    So both can be moved, and the next command can be given in another folder.
    """
    cells = []
    for row in rows:
        picture = row["picture"]
        with contextlib.suppress(ValueError):  # it lies on another drive
            picture = Path(os.path.relpath(picture, table.parent)).as_posix()
        cells.append(row | {"picture": picture})
    save_csv(cells, table, COLUMNS)


def folders_of(names):
    """-> {character: folder}: names of files on every system, no two alike, none `unknown`."""
    folders = {}
    taken = {UNKNOWN}
    for name in names:
        folder = shortened(file_name(name), name)
        while folder.casefold() in taken:
            folder += "_"
        taken.add(folder.casefold())
        folders[name] = folder
    return folders


def copies_of(file, faces, name, folders, out):
    """Copy a picture to everybody on it -> rows of sorted.csv, the most similar face of each."""
    best = {}
    for face in sorted(faces, key=lambda face: face["similarity"]):
        best[face["name"] or ""] = face
    rows = []
    for who, face in best.items():
        copy = Path(folders.get(who, UNKNOWN), name)
        (out / copy).parent.mkdir(parents=True, exist_ok=True)
        # After a kill a copy may be there without its row. Anything else was put there by somebody.
        if (out / copy).exists() and not filecmp.cmp(file, out / copy, shallow=False):
            raise UserError(f"{out / copy} is there, and no copy of {file}; rename one of them")
        with atomic(out / copy) as temporary:
            shutil.copyfile(file, temporary)
        with contextlib.suppress(OSError):  # not every disk keeps times and modes
            shutil.copystat(file, out / copy)  # it may forbid to write
        numbers = face["similarity"], face["confidence"]
        cells = os.path.abspath(file), who, *numbers, copy.as_posix()
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def main():
    args = parse_args()
    sort(args, *open_recogniser(args))


if __name__ == "__main__":
    cli(main)
