"""Stage 5, for a whole folder: copies of its pictures, sorted by who is in them.

    python -m apps.sort runs/NAME FOLDER --out OUT                     into OUT/WHO and OUT/unknown
    python -m apps.sort runs/NAME FOLDER --group --out OUT             one folder for faces that look alike
    python -m apps.sort runs/NAME PAGES --detect runs/DET --out OUT    to everybody on each page

Reads:  runs/NAME/ of finetune_lora.py with its gallery (apps/recognize.py); folders or files
Writes: OUT/ copies of the pictures; names.html, which shows them beside the known pictures that are most
        similar, the least sure first; sorted.csv: the name, the similarity and the copy of each;
        the gallery where it is missing

Your pictures stay where they are, and no copy replaces another file. The folders are all that counts:
a picture that has a copy anywhere in OUT, under whatever name, is done. So after a stop, give the same
command again, and move, rename and add what you like. sorted.csv is for you, and the page is drawn
from it: whatever becomes of a line there, nothing but the picture's place on the page is lost.

--group also finds characters that nobody taught. Faces that look alike, by average linkage of the cosines of
what the network sees and of their colours, share a folder; --alike says how alike they have to be. A folder
has the name of a known character if more than half of its faces are called so. Otherwise it is called
group-001, group-002 and so on, by size. Such groups depend on all pictures at once, so --group wants a
new folder each time.

Wrong copies can be moved to where they belong: apps/learn.py then learns what the folders say.
"""

import contextlib
import csv
import filecmp
import itertools
import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import torch

from apps.gallery import CELLS
from apps.groups import ALIKE, alike, check_grouped, likeness, pair_f1
from apps.pictures import file_name, shortened, tell_problems
from apps.recognize import answers, open_recogniser, parser_of, predictions
from apps.sheet import Entry, known_pictures, write_sheet
from common.locks import reserve
from common.train import UserError, atomic, between, cli, progress, quoted, refuse_useless
from ingest.layouts import UNNAMED
from ingest.pictures import picture_files

SORTED, UNKNOWN, SHEET = "sorted.csv", "unknown", "names.html"  # files and a folder of OUT
# threshold: of the similarity; guess: the best name, also where it is unknown; nearest: the most
# similar known picture of that name; box: of the face on a page
COLUMNS = ("picture", "name", "similarity", "confidence", "copy")
COLUMNS += ("threshold", "guess", "nearest", "box")
MOVED = 2.0  # how sure what a person moved is: it comes last
ADVICE = (
    "Left is your picture, right the known picture of its name that is most similar. The least sure come first, "
    "but in unknown look at all. Move wrong copies to where they belong, then give: {}"
)


def parse_args():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="FOLDER", help="folders or files, whose pictures are copied")
    add("--out", type=Path, required=True, metavar="OUT", help="a new folder, or one to go on with")
    add("--group", action="store_true", help="one folder for faces that look alike")
    add(
        "--alike", type=between(-1, 1), metavar="LEAST", default=ALIKE, help="what joins two groups"
    )
    add("--detect", metavar="RUN", help="runs/NAME of apps/detect.py: sort by each face on a page")
    args = parser.parse_intermixed_args()  # folders may stand before and after flags
    if not args.group:
        refuse_useless(args.given & {"alike"}, "without --group")
    return args


# ---- which pictures, under which names -----------------------------------------------------------


def files_to_sort(paths, out):
    """-> {file: its name below OUT/WHO} of pictures without a copy, and how many have one.

    The folders in a given folder stay. A name that is taken is one of a folder more.
    """
    same_size, taken = defaultdict(list), set()
    for file in picture_files(out).values() if out.exists() else ():
        same_size[file.stat().st_size].append(file)
        taken.add(Path(*file.relative_to(out).parts[1:]))
    wanted, done = {}, 0
    for path in paths:
        if out.resolve().is_relative_to(Path(path).resolve()):
            raise UserError(f"{out} lies in {path}, which is copied; choose another folder")
        for key, file in picture_files(path).items():
            alike = same_size[file.stat().st_size]
            if any(filecmp.cmp(file, copy, shallow=False) for copy in alike):
                done += 1
                continue
            name = Path(key if Path(path).is_dir() else file.name)
            if name in taken:
                name = Path(file.resolve().parent.name, name)
            if name in taken:
                raise UserError(f"{out} has another {name} than {file}; rename one of them")
            alike.append(file)
            taken.add(name)
            wanted[str(file)] = name
    if not wanted and not done:
        raise UserError(f"no picture was found in {', '.join(paths)}")
    return wanted, done


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


# ---- names and groups ----------------------------------------------------------------------------


def named(batches, gallery):
    """What `predictions` yields -> yield the rows of `answers`, each with its embedding.

    "nearest" is the most similar known picture of the best guess.
    """
    for keys, logits, embeddings in batches:
        to_face = gallery.whitened(embeddings) @ gallery.unit.T  # (B, faces)
        rows = answers(keys, logits, embeddings, gallery)
        for row, own, cosines in zip(rows, embeddings, to_face, strict=True):
            others = ~gallery.shows(row["best_guess"])
            nearest = gallery.keys[cosines.masked_fill(others, -2).argmax()]
            yield row | {"nearest": nearest}, own


def grouped(batches, gallery, least, wanted):
    """What `predictions` yields -> the rows of `named`, with the name of the face's group.

    least: the mean likeness that joins two groups. wanted: as of `files_to_sort`.
    """
    rows, embeddings = [], []
    for row, embedding in named(batches, gallery):
        rows.append(row)
        embeddings.append(embedding)
        check_grouped(len(rows), "faces")
    if not rows:
        raise UserError("no face was found, so there is nothing to group")
    embeddings = torch.stack(embeddings)
    pairs = likeness(gallery.whitened(embeddings), embeddings[:, -CELLS:])
    groups = alike(pairs, least)
    names = names_of(groups, [row["name"] for row in rows])
    different = {*names.values()}
    count = f"{len(different)}, {len(different & {*gallery.names})} of them named"
    print(f"groups   {count}; by --alike {least:g}: less gives fewer groups, more gives purer ones")
    folders = [str(wanted[file_of(row, wanted)].parent) for row in rows]
    if len({*folders}) > 1:
        agree = pair_f1(groups, folders)
        print(
            f"         if your own folders are right: pairs in one group have an F1 of {agree:.0f} %"
        )
    return [row | {"name": names[number]} for row, number in zip(rows, groups, strict=True)]


def names_of(groups, names):
    """Group and name (None: unknown) of each face -> {group: its name}, as most of its faces."""
    names_in, name_of, unnamed = defaultdict(Counter), {}, itertools.count(1)
    for number, name in zip(groups, names, strict=True):
        names_in[number][name] += 1
    for number, inside in sorted(names_in.items()):
        [(name, count)] = inside.most_common(1)
        known = name is not None and 2 * count > inside.total()
        name_of[number] = name if known else f"group-{next(unnamed):03}"
    return name_of


# ---- copies --------------------------------------------------------------------------------------


def file_of(row, wanted):
    """The file of an answer, whose key is the file, or with --detect the file and a box."""
    key = row["picture"]
    return key if key in wanted else key.rpartition("[")[0]


def copy_all(answered, wanted, folders, out):
    """Rows of `named`, in the order of pictures -> copies, and a line of each in sorted.csv.

    A page goes to everybody on it.
    """
    count = 0
    with open(out / SORTED, "a", newline="", encoding="utf-8", errors="surrogateescape") as table:
        writer = csv.writer(table)
        if not table.tell():  # it is new
            writer.writerow(COLUMNS)
            table.flush()  # from now on the folder is known as ours
        for file, faces in itertools.groupby(answered, lambda row: file_of(row, wanted)):
            best = {}  # the most similar face of each character
            for face in sorted(faces, key=lambda face: face["similarity"]):
                best[face["name"] or ""] = face
            for who, face in best.items():
                copy = out / folders.get(who, UNKNOWN) / wanted[file]
                with atomic(copy) as temporary:
                    shutil.copyfile(file, temporary)
                with contextlib.suppress(OSError):  # not every disk keeps times and modes
                    shutil.copystat(file, copy)
                numbers = face["similarity"], face["confidence"]
                place = copy.relative_to(out).as_posix()
                how = face["threshold"], face["best_guess"], face["nearest"]
                box = face["picture"].removeprefix(file).strip("[]")
                writer.writerow((file, who, *numbers, place, *how, box))
                table.flush()  # a killed sort is one picture short on the page, at most
                count += 1
    print(f"wrote    {out}/: {count} copies, listed in {out / SORTED}")


# ---- the page ------------------------------------------------------------------------------------


def entry_of(line):
    """A line of sorted.csv -> how the page shows the copy; a ValueError or csv.Error where it can't be read."""
    [cells] = csv.reader([line])
    row = dict(zip(COLUMNS, cells, strict=True))
    similarity = float(row["similarity"])
    known = bool(row["name"]) and similarity >= float(row["threshold"])
    if not known:
        sure = -similarity  # the less it is like anybody, the surer is it that nobody knows it
        words = f"unlike all (similarity {similarity:.2f}); nearest is {row['guess']}"
    elif row["confidence"]:
        sure = float(row["confidence"])
        words = f"{row['guess']}, confidence {sure:.0%}"
    else:
        sure = 0.0  # added pictures give no confidence
        words = f"{row['guess']}, by added pictures, similarity {similarity:.2f}"
    of_folder = "" if UNNAMED.fullmatch(row["name"]) else row["name"]
    if of_folder != (row["guess"] if known else ""):  # most of its group are called otherwise
        sure -= 2
    box = tuple(map(int, row["box"].split(","))) if row["box"] else ()
    return Entry(row["copy"], sure, words, row["nearest"], box)


def draw_sheet(out, header, run, learn):
    """Write names.html by sorted.csv, a section for each folder; learn: the next command.

    Somebody may have moved copies, or changed the file: a copy is found where it lies now, and a line
    that can't be read is left out.
    """
    below = {}  # the name of a copy below its folder: no other copy has it, but of one page
    for file in picture_files(out).values():
        place = file.relative_to(out)
        below[place.parts[1:]] = place.as_posix()
    entries, sections = {}, defaultdict(list)
    with open(out / SORTED, newline="", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            with contextlib.suppress(ValueError, csv.Error):  # the first line is one of these
                entry = entry_of(line)
                entries[entry.file] = entry  # a copy that was deleted and made again has two
    for file, entry in sorted(entries.items()):
        if not os.path.isfile(out / file):
            moved = below.get(Path(file).parts[1:])
            if moved is None or moved in entries:  # deleted, or another copy of a page
                continue
            words = f"you moved it here; it was called {Path(file).parts[0]}"
            entry = entry._replace(file=moved, sure=MOVED, words=words, near="")
        sections[entry.file.split("/")[0]].append(entry)
    keys = {entry.near for entries in sections.values() for entry in entries}
    known = known_pictures(keys, header, run)
    write_sheet(out / SHEET, f"Sorted: {out}", ADVICE.format(learn), sections, known)


def main():
    args = parse_args()
    net, header, gallery, autocast = open_recogniser(args)
    out = args.out
    reserve([], lock=out / ".lock")
    there = [path for path in out.iterdir() if not path.name.startswith(".")]
    if there and (args.group or not (out / SORTED).exists()):
        raise UserError(f"{out} has files of its own, or groups; choose a new folder")
    wanted, done = files_to_sort(args.images, out)
    print(f"sort     {len(wanted) + done} pictures, {done} of them done")
    args.images, problems, names, answered = list(wanted), [], gallery.names, ()
    if args.group:
        if not args.detect:  # now, and not after all of them are embedded
            check_grouped(len(wanted), "pictures")
        batches = predictions(args, net, header, autocast, problems)
        answered = grouped(batches, gallery, args.alike, wanted)
        names = dict.fromkeys(row["name"] for row in answered)
    elif wanted:
        batches = predictions(args, net, header, autocast, problems)
        answered = (row for row, _ in named(batches, gallery))
    bar = progress(answered, "sort", None if args.detect else len(wanted))
    copy_all(bar, wanted, folders_of(names), out)
    tell_problems(problems, header["data"])
    words = [args.run, str(out), *(["--detect", args.detect] if args.detect else [])]
    learn = f"python -m apps.learn {quoted(*words)}"
    draw_sheet(out, header, args.run, learn)
    look = f"look at {out / SHEET}, where the least sure come first"
    print(f"next: {look}; move wrong copies to where they belong, then {learn}")


if __name__ == "__main__":
    cli(main)
