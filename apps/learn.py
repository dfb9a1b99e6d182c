"""Stage 5, a recogniser of your own: learns a small collection, and later what you correct by hand.

    python -m apps.learn datasets/mine                    for the first time, into runs/mine-lora
    python -m apps.sort runs/mine-lora FOLDER --out OUT   copies into OUT/WHO and OUT/unknown
    (look at them, and move each wrong picture into the folder where it belongs, or into a new one)
    python -m apps.learn runs/mine-lora OUT               takes what the folders say now

Reads:  datasets/NAME of data.py, all of its splits, and an encoder (weights/toon);
        or OUT/ of apps/sort.py (any folder per character will do), and the run with its gallery
Writes: runs/NAME-METHOD/ as finetune_lora.py does, and folds/, with promise.json: how often names will be
        right, and how many pictures of unknown characters will be called so; or
        runs/NAME/gallery.safetensors, which gets the pictures

For the first time, apps/folds.py measures by cross-validation, so that no picture has to be kept from
training. Where it is stopped, the same command goes on.

Corrections: every picture in OUT/WHO is WHO from now on, also one that you did not move, so look at all
folders first. A folder with three pictures or more that is not known yet makes a new character. Pictures
in unknown or others show strangers: what looks like them gets a name less easily from now on. And all of
these pictures move the threshold for "unknown", so that it fits what you said. group-001 waits until you
name it. A picture that is there already is not taken twice, so the command can be given again. A new training
learns from all of OUT: python data.py OUT --layout class packs it, whatever folders your pictures were in.

    n pictures   C learned characters   D width of an embedding
"""

import hashlib
from collections import defaultdict
from pathlib import Path

import torch

from apps import folds
from apps.pictures import tell_problems
from apps.recognize import changing, name_of, open_recogniser, parser_of, predictions, renamed
from apps.sort import folders_of
from common.classifier import is_recogniser
from common.train import UserError, at_least, cli, progress, quoted, refuse_useless
from ingest.layouts import UNNAMED, shows_nobody
from ingest.pictures import picture_files

OF_TRAINING = ("out", "method", "epochs", "seed")  # flags of the first time


def parse_args():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "folder",
        nargs="?",
        type=Path,
        metavar="OUT",
        help="a folder per character, checked by hand",
    )
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


def shown_in(out, names):
    """-> {file: who it shows} by the folders of OUT; "" for nobody known. names: of the gallery."""
    name_in = {folder: name for name, folder in folders_of(names).items()}
    shows = {}
    for file in picture_files(out).values():
        folder, *below = file.relative_to(out).parts
        if below and not UNNAMED.fullmatch(folder):
            nobody = shows_nobody(folder)  # unknown/ and others/, as for data.py
            who = "" if nobody else name_in.get(folder) or name_of(folder, "the folder")
            shows[str(file)] = who
    if not shows:
        raise UserError(f"{out} has no folder of a character; apps.sort makes them")
    return shows


def embedded(args, net, header, autocast, files, problems):
    """-> {file: its logits (C,) and embedding (D,)}; with --detect of those that show one face."""
    args.images = files
    faces = defaultdict(list)
    bar = progress(name="learn", total=None if args.detect else len(files))
    for keys, *outputs in predictions(args, net, header, autocast, problems):
        bar.update(len(keys))
        for key, *face in zip(keys, *outputs, strict=True):
            faces[key.rpartition("[")[0] if args.detect else key].append(face)
    bar.close()
    return {file: own[0] for file, own in faces.items() if len(own) == 1}


def by_character(shows, faces):
    """-> {who: files}, and notes on pictures that lie in folders of two characters: which one is right?"""
    copies, files, notes = defaultdict(dict), defaultdict(list), []
    for file in faces:
        digest = hashlib.sha256(Path(file).read_bytes()).digest()
        copies[digest].setdefault(shows[file], file)
    for there in copies.values():
        if len(there) > 1:
            there.pop("", None)  # it was copied out of unknown/, and not moved
        if len(there) > 1:
            one, two, *_ = there.values()
            notes.append(f"note: {one} and {two} are one picture; leave it where it belongs")
            continue
        for who, file in there.items():
            files[who].append(file)
    return files, notes


def learn(run, files_of, faces):
    """Change the gallery by {who: files} and {file: logits, embedding} -> it before and after, and lines."""
    report, of_learned = [], []
    with changing(run) as before:
        gallery = before
        for who, files in sorted(files_of.items()):  # strangers first
            embeddings = torch.stack([faces[file][1] for file in files])
            if not who:
                gallery = gallery.with_strangers(embeddings)
                continue
            try:
                gallery, lines = gallery.enrol(who, files, embeddings)
                report += lines
            except UserError as problem:  # too few of a new character; the others go on
                report.append(f"note: {problem}")
            if who in before.names[: before.learned]:
                of_learned += files
        gallery.save(run)
    for what, files in (("strangers", files_of.get("")), ("learned characters", of_learned)):
        if files:
            logits, embeddings = (torch.stack(x) for x in zip(*map(faces.get, files), strict=True))
            counts = [
                g.names_given(logits, embeddings, apart=True).count("") for g in (before, gallery)
            ]
            report.append(
                f"of your {len(files)} pictures of {what}, {counts[0]} were called unknown before, "
                f"{counts[1]} are now"
            )
    return before, gallery, report


def correct(args):
    """Take what the folders say."""
    net, header, gallery, autocast = open_recogniser(args)
    shows, problems = shown_in(args.folder, gallery.names), []
    faces = embedded(args, net, header, autocast, list(shows), problems)
    files_of, notes = by_character(shows, faces)
    before, after, lines = learn(args.run, files_of, faces)
    for line in (*notes, *lines):
        print(line)
    if left := len(shows) - len(faces) - len(problems):
        print(f"not learned: {left} pages without a face, or with several")
    print(renamed(net, before, after))
    tell_problems(problems, header["data"])
    # Below a character are the folders that its pictures came from, which may look like classes.
    words = [str(args.folder), "--layout", "class", "--out", "datasets/NAME"]
    if header["crop"] == "figure":
        words += ["--crop", f"figure:margin={header['margin']:g}"]
    if args.detect:  # from a page, data.py would cut one of its faces, or none
        cut = quoted("python", "-m", "apps.detect", args.detect, words[0], "--largest", "--out")
        print(f"next: {cut} FACES cuts the faces out")
        words[0] = "FACES"
    pack = quoted("python", "data.py", *words)
    print(f"to train anew, copy your older pictures into these folders, too, and give: {pack}")


def main():
    args = parse_args()
    if args.folder:
        correct(args)
    else:
        first_time(args)


if __name__ == "__main__":
    cli(main)
