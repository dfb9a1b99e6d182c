"""Stage 5, a recogniser of your own: learns a small collection, and later what you correct by hand.

    python -m apps.learn datasets/mine                    for the first time, into runs/mine-lora
    python -m apps.sort runs/mine-lora FOLDER --out OUT   copies into OUT/WHO and OUT/unknown
    (look at them, and move each wrong picture into the folder where it belongs, or into a new one)
    python -m apps.learn runs/mine-lora OUT               takes what the folders say now

Reads:  datasets/NAME of data.py, all of its splits, and an encoder (weights/toon);
        or OUT/ of apps/sort.py with its sorted.csv, and the run with its gallery
Writes: runs/NAME-METHOD/ as finetune_lora.py does, and folds/, with promise.json: how often names will be
        right, and how many pictures of unknown characters will be called so; or
        runs/NAME/gallery.safetensors, which gets the pictures, and
        OUT/sorted.csv, which says where they lie now, so that the next call learns what is new

For the first time, apps/folds.py measures by cross-validation, so that no picture has to be kept from
training. Where it is stopped, the same command goes on.

Corrections: where something was moved or added, somebody has looked at the folders, so the pictures that
stayed are right as well, and some of each character are learned, too: without them, a new character would
take pictures from those that look like it. Pictures in a folder that is not known yet make a new
character, three of them at least. One that was moved to unknown or others shows nobody who is
known; it is taken out of the gallery. A new training learns from all of OUT: python data.py OUT
--layout class packs it, whatever folders your pictures were in.

    n pictures   D width of an embedding
"""

import filecmp
import itertools
import math
import os
from collections import Counter
from pathlib import Path

import torch

from apps import folds
from apps.recognize import (
    Gallery,
    changing,
    known_faces,
    name_of,
    open_recogniser,
    parser_of,
    predictions,
    renamed,
    same_pictures,
)
from apps.sort import COLUMNS, SORTED, UNKNOWN, folders_of, open_sorted, save_sorted
from common.classifier import is_recogniser
from common.locks import reserve
from common.train import UserError, at_least, cli, progress, quoted, refuse_useless
from data import CHUNK, evenly_spaced
from ingest.layouts import UNNAMED, shows_nobody
from ingest.pictures import picture_files, tell_problems

OF_TRAINING = ("out", "method", "epochs", "seed")  # flags of the first time
STAYED = 50  # pictures of a character that stayed in its folder and are learned at a time, at most


def parse_args():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="OUT", help="of apps/sort.py, corrected by hand")
    add("--detect", metavar="RUN", help="as for apps/sort.py: pages with one face are learned")
    add("--encoder", default="weights/toon", help="where training begins, for the first time")
    add("--out", metavar="RUN", help="run folder (default: runs/NAME-METHOD)")
    add("--method", default="lora", help="linear, lora or full, as of finetune_lora.py")
    add("--epochs", type=at_least(1), help="at most (default: of the method)")
    add("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_intermixed_args()  # OUT may stand behind flags
    if args.folder:
        refuse_useless(args.given & {"threshold", "encoder", *OF_TRAINING}, "on corrections")
    else:
        refuse_useless(args.given & {"threshold", "detect"}, "on a first training")
        if is_recogniser(args.run):
            raise UserError(f"{args.run} has learned already; give OUT of apps.sort to correct it")
    return args


def first_time(args):
    """Learn a packed collection, or one that is packed first."""
    out = args.out or f"runs/{Path(args.run).name}-{args.method}".replace(":", "-")
    words = [args.encoder, "--data", args.run, "--out", out]
    for name in sorted(args.given & {*OF_TRAINING, "device", "dtype"} - {"out"}):
        words += [f"--{name}", str(getattr(args, name))]
    folds.learn_all(words)


def who_is_in(rows, names):
    """Rows of sorted.csv, names of a gallery -> {folder of OUT: its character; unknown: ""}."""
    who_in = {folder: name for name, folder in folders_of(names).items()}
    who_in |= {Path(row["copy"]).parts[0]: row["name"] for row in rows if row["copy"]}
    return who_in | {UNKNOWN: ""}


def by_hand(out, rows, names):
    """-> {file below OUT: who it shows, "" for nobody known}, and {file: its old row} of those that moved.

    A file that no row of sorted.csv lists was moved, if there is a row with its name, or was added.
    """
    who_of = who_is_in(rows, names)
    copies = {Path(row["copy"]): row for row in rows if row["copy"]}
    left = {Path(*copy.parts[1:]): row for copy, row in copies.items() if not (out / copy).exists()}
    named = {}  # the same, by the name of the file alone: it may have been moved out of its subfolder
    for below, row in left.items():
        named.setdefault(below.name, []).append(row)
    shows, moved = {}, {}
    for file in picture_files(out).values():
        copy = file.relative_to(out)
        folder = copy.parts[0]
        if len(copy.parts) < 2 or UNNAMED.fullmatch(folder):
            continue
        if folder not in who_of:
            nobody = shows_nobody(folder)  # unknown/ and others/, as for data.py
            who_of[folder] = "" if nobody else name_of(folder, "the folder")
        shows[str(file)] = who_of[folder]
        if copy not in copies:
            added = dict.fromkeys(COLUMNS, "") | {"picture": os.path.abspath(file)}
            equal = (row for row in named.get(copy.name, ()) if is_copy(file, row["picture"]))
            moved[str(file)] = left.get(Path(*copy.parts[1:])) or next(equal, added)
    return shows, moved


def is_copy(file, original):
    """Is a file the copy of another one, which may be gone?"""
    return os.path.exists(original) and filecmp.cmp(file, original, shallow=False)


def line_of_moves(shows, moved):
    """-> a line on what was moved from where to where, and on what was added."""
    ways = Counter()
    for file, row in moved.items():
        was = row["name"] or UNKNOWN
        ways[f"{was if row['copy'] else 'added'} -> {shows[file] or UNKNOWN}"] += 1
    return f"moved    {len(moved)} pictures: {', '.join(f'{n} {way}' for way, n in ways.most_common())}"


def embedded(args, net, header, autocast, files, problems):
    """-> {file: logits (C,), embedding (D,)}; with --detect of those that show one face."""
    args.images = list(files)
    faces_of = {}
    chunks = None if args.detect else math.ceil(len(files) / CHUNK)  # a page may have several faces
    batches = predictions(args, net, header, autocast, problems)
    for some in progress(batches, "learn", chunks):
        for key, *numbers in zip(*some, strict=True):
            file = key.rpartition("[")[0] if args.detect else key
            faces_of.setdefault(file, []).append(numbers)
    return {file: faces[0] for file, faces in faces_of.items() if len(faces) == 1}


def learn(run, shows, moved, faces):
    """Change the gallery by what the folders say -> the files that it has taken."""
    done, report = [], []
    with changing(run) as gallery:
        known = {*gallery.names}
        # What was moved comes last, and what was added before stays where it is: of two copies of one
        # picture, the one that somebody moved is right.
        for last, who in itertools.product((False, True), sorted({*shows.values()})):
            own = [file for file in shows if shows[file] == who and file in faces]
            files = [file for file in own if file in moved] if last else []
            # Of somebody new, all pictures come together, because there have to be enough of them.
            is_new = who not in known
            if who and last == is_new:
                stayed = [file for file in own if file not in moved]
                stayed = [file for file in stayed if not was_added(faces[file][1], gallery)]
                files += [stayed[i] for i in evenly_spaced(len(stayed), STAYED)]
            if not files:
                continue
            embeddings = torch.stack([faces[file][1] for file in files])
            try:
                if who:
                    gallery, lines = gallery.enrol(who, files, embeddings)
                else:
                    gallery, lines = without(gallery, embeddings)
            except UserError as problem:  # too few of a new character; the others go on
                lines, files = [f"note: {problem}"], []
            report += lines
            done += files
        if done:
            gallery.save(run)
    for line in report:
        print(line)
    return done


def was_added(embedding, gallery):
    """Is this picture, an embedding (D,), one of those that were added to a gallery?"""
    return same_pictures(embedding[None], gallery.embeddings[gallery.trained :]).any()


def without(gallery, embeddings):
    """-> the gallery without pictures (n, D) that were added and show nobody known, and a line."""
    stay = ~same_pictures(embeddings, gallery.embeddings).any(0)
    stay[: gallery.trained] = True
    gone = f"{int((~stay).sum())} of them left the gallery"
    fix = "a new training sets its threshold by them"
    return gallery.only(stay), [f"unknown: {len(embeddings)} pictures, {gone}; {fix}"]


def agreeing(gallery, shows, faces):
    """-> the files whose answer is what their folder says."""
    files = [file for file in shows if file in faces]
    if not files:
        return set()
    logits, embeddings = (torch.stack(part) for part in zip(*map(faces.get, files), strict=True))
    names = gallery.names_given(logits, embeddings)
    return {file for file, name in zip(files, names, strict=True) if name == shows[file]}


def main():
    args = parse_args()
    if not args.folder:
        return first_time(args)
    out = args.folder
    table = out / SORTED
    if not table.exists():
        raise UserError(
            f"{table} is not there; python -m apps.sort RUN FOLDER --out {out} writes it"
        )
    reserve([], lock=out / ".lock")
    rows = open_sorted(table)
    net, header, before, autocast = open_recogniser(args)
    shows, moved = by_hand(out, rows, before.names)
    if not moved:
        return print(f"{out}: no picture was moved or added since the last time")
    print(line_of_moves(shows, moved))
    problems = []
    faces = embedded(args, net, header, autocast, shows, problems)
    done = {*learn(args.run, shows, moved, faces)}
    taken = {file: row for file, row in moved.items() if file in done}
    gone = {id(row) for row in taken.values()}
    rows = [row for row in rows if id(row) not in gone]
    for file, row in taken.items():
        copy = Path(file).relative_to(out).as_posix()
        rows.append(row | {"name": shows[file], "copy": copy})
    save_sorted(rows, table)
    after = Gallery.load(args.run)
    stayed, asked = faces.keys() - moved.keys(), faces.keys() & moved.keys()
    taught = sum(shows[file] != "" for file in done)
    agreed, agree = (agreeing(gallery, shows, faces) for gallery in (before, after))
    print(
        f"names    of {len(stayed)} pictures that stayed, {len(agreed & stayed)} had the name of their "
        f"folder, and {len(agree & stayed)} have it now; of {len(asked)} that were moved, "
        f"{len(agree & asked)} have it now ({taught} of all were just learned)"
    )
    if nobody := {file for file in faces if not shows[file]}:
        was, now = len(agreed & nobody), len(agree & nobody)
        print(
            f"unknown  of {len(nobody)} pictures of nobody known, {was} were called so, and {now} are now"
        )
    print(renamed(*known_faces(args.run, net, header, autocast, before), before, after))
    tell_problems(problems, header["data"])
    if left := moved.keys() - done:
        print(f"not learned: {len(left)}, such as {min(left)}")
    # Below a character are the folders that its pictures came from, which may look like classes.
    words = [str(out), "--layout", "class", "--out", "datasets/NAME"]
    if header["crop"] == "figure":
        words += ["--crop", f"figure:margin={header['margin']:g}"]
    first = f"copy your older pictures into the folders of {out}"
    if args.detect:
        # A page with several faces lies in several folders, and one of its faces would be cut out.
        cut = quoted("python", "-m", "apps.detect", args.detect, str(out), "--largest", "--out")
        first += f", take out pages with several faces, and cut: {cut} FACES"
        words[0] = "FACES"
    pack = quoted("python", "data.py", *words)
    print(f"next: {first}; then {pack} packs them for a new training")


if __name__ == "__main__":
    cli(main)
