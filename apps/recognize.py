"""Stage 5: who is in a picture? It names characters, calls others unknown, and enrols new ones.

    python -m apps.recognize runs/NAME PICTURE...               files, folders, archives; - reads a list
    python -m apps.recognize runs/NAME PAGE --detect runs/DET   each face that a run of apps/detect.py finds
    python -m apps.recognize runs/NAME --enrol WHO PICTURE...   three to five pictures, no training
    python -m apps.recognize runs/NAME --list                   who is known; --forget WHO removes one

Reads:  runs/NAME/ head.safetensors and what finetune_lora.py wrote beside it; the pictures; for a
        gallery that is missing, also the data set that the run was trained on
Writes: runs/NAME/ gallery.safetensors (built where it is missing; --enrol and --forget change it);
        answers go to standard output, a line for each picture or face

The head names the characters that it learned. The gallery (apps/gallery.py) says whether a face is
known at all, and it alone knows enrolled characters, so these need no training. A learned character
takes new pictures in the same way, such as of another dress. apps/sort.py sorts a folder by these
answers, apps/learn.py learns what somebody corrected there, and apps/unknown.py measures how good
they are.

    n faces   m held-out pictures   B batch   D width of an embedding   C characters
"""

import contextlib
import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from apps.collection import BY_FOLDS, open_all
from apps.gallery import GALLERY, NEAREST, Gallery, calibrate, gallery_file
from apps.pictures import tell_problems
from common import door
from common.classifier import pooled_of, predict
from common.features import open_subsets, place_of_learned
from common.locks import lock_beside, locked
from common.metrics import histograms
from common.train import (
    Parser,
    UserError,
    autocast_of,
    between,
    cli,
    copied,
    pick_device,
    pick_dtype,
    quoted,
    refuse_useless,
)
from finetune_lora import load_classifier
from ingest import sources
from ingest.layouts import shows_nobody
from ingest.pictures import pictures, whole_pictures

PROMISE = "folds/promise.json"  # of apps/folds.py
FACES = 500  # training pictures of a character in a gallery, at most
OF_UNKNOWN = 2000  # pictures of unknown characters that fit a threshold, at most
FLAGS = {  # that each task reads
    "name": "threshold json detect device dtype",
    "enrol": "enrol device dtype",
    "forget": "forget",
    "list": "list",
}


def parser_of(manual):
    """A docstring -> a parser with the flags that apps/sort.py and apps/unknown.py have, too."""
    parser = Parser(manual)
    add = parser.add_argument
    add("run", metavar="runs/NAME", help="what finetune_lora.py wrote")
    add("--threshold", type=between(-2, 2), metavar="LEAST", help="similarity of a known face")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    parser.set_defaults(json=False)  # `faces` reads it; sort and learn have no such flag
    return parser


def parse_args():
    """-> the flags, and `task`: "name", or the flag that says another task."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="PICTURE", help="file, folder, zip, tar; - for a list")
    add("--json", action="store_true", help="print a JSON object a picture")
    add("--detect", metavar="RUN", help="runs/NAME of apps/detect.py: name each face on a page")
    add("--enrol", "--enroll", metavar="WHO", help="add a character, or pictures of a known one")
    add("--forget", metavar="WHO", help="take an enrolled character out of the gallery")
    add("--list", action="store_true", help="say who is known, and by how many pictures")
    args = parser.parse_intermixed_args()  # pictures may stand before and after flags
    args.task = next((name for name in FLAGS if name in args.given), "name")
    takes_pictures = args.task in ("name", "enrol")
    if takes_pictures and not args.images:
        raise UserError(f"give pictures, or a folder of them, to {args.task}")
    if args.images and not takes_pictures:
        raise UserError(f"--{args.task} takes no pictures, such as {args.images[0]}")
    refuse_useless(args.given - set(FLAGS[args.task].split()), f"when the task is to {args.task}")
    return args


# ---- the gallery of a run ------------------------------------------------------------------------

UNMEASURED = (  # of a run that learned all characters of its set
    "most new characters may get a known name; python -m apps.learn datasets/NAME leaves each character "
    "out once, and measures it"
)


def open_gallery(run, device="auto", dtype="auto"):
    """-> the Gallery of a run. Where the run has none, it is built first."""
    if not gallery_file(run).exists():
        with locked(lock_beside(Path(run) / GALLERY), wait=True):
            if not gallery_file(run).exists():  # another process may have built it
                return build_gallery(run, device, dtype)
    return Gallery.load(run)


def is_closed(run):
    """Is it a folder that may only be read, such as one of somebody else?"""
    return Path(run).is_dir() and not os.access(run, os.W_OK)


def build_gallery(run, device, dtype):
    """-> the embeddings of training pictures, and what is calibrated on held-out ones; it is written.

    A run that learned every picture has no held-out one: its folds have measured (apps/folds.py).
    """
    net, header, autocast = open_network(run, device, dtype)
    folder = place_of_learned(header, run)
    by_folds = header["split"] == BY_FOLDS
    if by_folds:
        train, classes = open_all(folder)
    else:
        (train, dev, _), classes = open_subsets(folder, header["split"], header["hold_out"])
    outputs = partial(outputs_of, net, autocast=autocast, name="gallery", colours=by_folds)
    index = train.index[torch.cat(data.evenly_of_each(train.labels[train.index], FACES))]
    labels = train.labels[index]
    _, embeddings = outputs(train.split, index)
    if by_folds:
        numbers = json.loads((Path(run) / PROMISE).read_text())["calibration"]
        numbers |= {name: torch.tensor(numbers[name]) for name in ("held_known", "held_unknown")}
    else:
        held_out = *outputs(dev.split, dev.index), dev.labels[dev.index]
        # What --hold-out left out sets no threshold: it is there to be asked (apps/unknown.py).
        numbers = calibrate(embeddings, labels, held_out)
    keys = [train.split["header"]["keys"][i] for i in index.tolist()]
    gallery = Gallery(embeddings, labels, len(classes), names=classes, keys=keys, **numbers)
    others = open_others(folder)
    if others:
        logits, strangers = outputs(*others)
        gallery = replace(gallery, strangers=strangers)
    gallery = gallery.settled()
    if is_closed(run):
        said = [f"note: {run} may not be written by you, so this call's gallery is not kept"]
    else:
        gallery.save(run)
        said = [f"wrote {Path(run) / GALLERY}: {len(keys)} faces of {len(classes)} characters"]
    if others:
        below = gallery.similarity(logits, strangers, apart=True) < gallery.threshold
        said.append(f"{int(below.sum())} of your {len(below)} strangers are called unknown")
    elif not by_folds and not header["hold_out"]:
        said.append(f"note: {UNMEASURED}")
    print("\n".join(said), file=sys.stderr)
    return gallery


@contextlib.contextmanager
def changing(run):
    """with changing(run): what is read, changed and saved here is changed by nobody else meanwhile."""
    if is_closed(run):
        fix = f"give a copy of it: {copied(run)}"
        raise UserError(f"{run} may not be written by you, and its gallery lies there; {fix}")
    with locked(lock_beside(Path(run) / GALLERY), wait=True):
        yield Gallery.load(run)


def open_network(run, device, dtype):
    """-> the classifier of a run on its device, the header of its head, and autocast."""
    net, header = load_classifier(run)
    device = pick_device(device)
    return net.to(device), header, autocast_of(device, pick_dtype(dtype, device)[0])


def open_recogniser(args):
    """-> the classifier of a run on its device, the header of its head, its gallery, and autocast."""
    gallery = open_gallery(args.run, args.device, args.dtype)
    net, header, autocast = open_network(args.run, args.device, args.dtype)
    if args.threshold is not None:
        gallery.move_threshold(args.threshold)
    return net, header, gallery, autocast


def outputs_of(net, split, index, autocast, name="", colours=True):
    """Whole images -> logits (n, C), embeddings (n, D), each of the mean of picture and mirror image.

    With colours, histograms are the last columns of the embeddings, (n, D + CELLS of apps/gallery.py).
    """
    logits, embeddings = predict(net, pooled_of(net, split, index, autocast, name, mirrored=True))
    if not colours:
        return logits, embeddings
    views = data.whole_views(split["images"], index, net.encoder.image_size, torch.device("cpu"))
    return logits, torch.cat([embeddings, torch.cat([histograms(view) for _, view in views])], 1)


def open_others(folder):
    """-> the split of unknown characters that data.py packed, and the index of some; None without."""
    if not (Path(folder) / "unknown.safetensors").exists():
        return None
    split = data.open_split(folder, "unknown")
    return split, data.evenly_spaced(len(split["labels"]), OF_UNKNOWN)


# ---- naming --------------------------------------------------------------------------------------


def predictions(args, net, header, autocast, problems):
    """Yield (keys, logits (B, C), embeddings (B, D)) of the pictures, or with --detect of faces."""
    size = header["packed_size"]
    cut = size, header["crop"], header["margin"]
    items = (
        faces(args, size, autocast, problems)
        if args.detect
        else pictures(args.images, *cut, problems)
    )
    while some := list(itertools.islice(items, data.CHUNK)):
        keys, images = zip(*some, strict=True)
        yield list(keys), *embed(net, np.stack(images), autocast)


def faces(args, size, autocast, problems):
    """Yield (picture and box, u8 (size, size, 3)) of every face that --detect finds."""
    from apps import detect

    net, header = detect.load(args.detect)
    net.to(pick_device(args.device))
    for key, picture in whole_pictures(args.images, problems):
        with autocast():
            boxes, _ = detect.faces_of(net, picture, header["page"], header["threshold"])
        if not len(boxes):
            print(f"{door.shown(key)}: no face was found", file=sys.stderr)
            if args.json:
                print(json.dumps({"picture": key, "faces": []}, ensure_ascii=False), flush=True)
        for box in boxes.tolist():
            where = ",".join(str(round(x)) for x in box)
            yield f"{key}[{where}]", detect.cut_out(picture, box, size)


def embed(net, images, autocast):
    """NumPy squares u8 (B, ., ., 3) -> logits (B, C), embeddings (B, D)."""
    return outputs_of(net, {"images": images}, torch.arange(len(images)), autocast)


def answers(keys, logits, embeddings, gallery, nearest=NEAREST):
    """-> a dict for each picture: who it is, how sure that is, and the nearest gallery faces."""
    decisions = zip(*gallery.decide(logits, embeddings), strict=True)
    to_face = gallery.whitened(embeddings) @ gallery.unit.T  # (B, faces)
    rows = []
    for key, cosines, (who, similarity, margin, sure) in zip(keys, to_face, decisions, strict=True):
        name = gallery.names[who]
        known = bool(margin >= 0)
        faces = []
        for cosine, i in zip(*cosines.topk(min(nearest, len(cosines))), strict=True):
            face = {"name": gallery.names[gallery.labels[i]], "picture": gallery.keys[i]}
            faces.append(face | {"similarity": round(cosine.item(), 4)})
        row = {
            "picture": key,
            "name": name if known else None,
            "known": known,
            "confidence": None if sure.isnan() else round(sure.item(), 4),
            "similarity": round(similarity.item(), 4),
            "threshold": round((similarity - margin).item(), 4),
            "best_guess": name,
            "nearest": faces,
        }
        rows.append(row)
    return rows


def in_words(row):
    """One of `answers` -> the line that is printed."""
    similarity = f"similarity {row['similarity']:.2f}"
    if not row["known"]:
        who = (
            f"unknown (unlike all known characters: {similarity}, threshold {row['threshold']:.2f})"
        )
    elif row["confidence"] is None:  # the head has not learned it
        who = f"{row['name']}, by added pictures, {similarity}"
    else:
        perhaps = "" if row["confidence"] >= 0.5 else "perhaps "
        who = f"{perhaps}{row['name']}, confidence {row['confidence']:.0%}, {similarity}"
    nearest = row["nearest"][0]
    near = f"nearest: {door.shown(nearest['picture'])} {nearest['similarity']:.2f}"
    return f"{door.shown(row['picture'])}: {who}; {near}"


def all_answers(args, net, header, gallery, autocast, problems):
    """Yield the row of `answers` of each picture, or with --detect of each face."""
    for some in predictions(args, net, header, autocast, problems):
        yield from answers(*some, gallery)


def recognise(args, net, header, gallery, autocast):
    """Print who is in each picture. What can't be read is named on stderr."""
    problems, known = [], []
    for row in all_answers(args, net, header, gallery, autocast, problems):
        print(json.dumps(row, ensure_ascii=False) if args.json else in_words(row), flush=True)
        known.append(row["known"])
    tell_problems(problems, header["data"], args.json)
    if not all(known) and not args.json:
        words = f"{quoted(args.run)} --enrol WHO PICTURES makes somebody new known"
        if args.detect:  # which takes no part in --enrol: it wants faces, not pages
            words += ", from faces that apps.detect has cut out by --crop --out FOLDER"
        print(f"next: python -m apps.recognize {words}", file=sys.stderr)


# ---- enrolment -----------------------------------------------------------------------------------


def enrol(args, net, header, autocast):
    """Add these pictures to the gallery, under one name, and tell what that changes."""
    who = name_of(args.enrol, "--enrol")
    problems, keys, embeddings = [], [], []
    for some, _, more in predictions(args, net, header, autocast, problems):
        keys += some
        embeddings.append(more)
    if problems:
        raise UserError(f"{problems[0][1]}; nobody was enrolled")
    with changing(args.run) as before:
        after, lines = before.enrol(who, keys, torch.cat(embeddings))
        after.save(args.run)
    print("\n".join(lines))
    print(renamed(net, before, after))
    again = f"python -m apps.recognize {quoted(args.run)}"
    print(f"next: {again} PICTURE")
    if after.keys != before.keys:
        print(f"undo: {again} {quoted(f'--forget={who}')} takes out all that was ever added of it")


def name_of(text, source):
    """What somebody wrote -> a name in one spelling."""
    who = sources.nfc(text.strip())
    if not door.is_name(who):
        raise UserError(f"{source} {door.short(who)} is no name; give a few printable letters")
    if shows_nobody(who):
        fix = "pictures of nobody known belong into a folder of this name when data.py packs a set"
        raise UserError(f"{source} {who} would be a character of this name; {fix}")
    return who


@torch.no_grad()
def renamed(net, before, after):
    """Two galleries -> a line: how many pictures that taught the head have another name in the second.

    Each of them is asked apart from itself. But the network has learned them by heart.
    """
    embeddings = before.embeddings[: before.trained]
    plain = embeddings[:, : len(before.mean)]  # without histograms
    logits = net.head(plain.to(net.encoder.cls_token.device)).cpu()
    names = [gallery.names_given(logits, embeddings, apart=True) for gallery in (before, after)]
    changed = Counter(pair for pair in zip(*names, strict=True) if pair[0] != pair[1])
    ways = [
        f"{n} {old or 'unknown'} -> {new or 'unknown'}" for (old, new), n in changed.most_common(3)
    ]
    line = f"of {before.trained} pictures that were learned, {changed.total()} get another name now"
    if ways:
        line += f" ({', '.join(ways)})"
    return f"{line}; of new ones it may be more"


def forget(run, who):
    """Take a character's added pictures out of the run's gallery."""
    open_gallery(run)  # it is built where it is missing
    with changing(run) as gallery:
        gallery, line = gallery.forget(sources.nfc(who.strip()))
        gallery.save(run)
    print(line)


def list_known(gallery):
    """Print who is known, a line each."""
    for i, name in enumerate(gallery.names):
        faces = gallery.shows(name)
        more = int(faces[gallery.trained :].sum())
        how = "learned in training" if i < gallery.learned else "enrolled"
        added = f", {more} of them added" if i < gallery.learned and more else ""
        print(f"{name}: {how}, {int(faces.sum())} pictures{added}")


def main():
    args = parse_args()
    if args.task == "list":
        return list_known(open_gallery(args.run))
    if args.task == "forget":
        return forget(args.run, args.forget)
    net, header, gallery, autocast = open_recogniser(args)
    if args.task == "enrol":
        return enrol(args, net, header, autocast)
    recognise(args, net, header, gallery, autocast)


if __name__ == "__main__":
    cli(main)
