"""Stage 5: who is in a picture? It names characters, calls others unknown, and enrols new ones.

    python -m apps.recognize runs/NAME PICTURE...               files, folders, archives; - reads a list
    python -m apps.recognize runs/NAME PAGE --detect runs/DET   each face that a run of apps/detect.py finds
    python -m apps.recognize runs/NAME FOLDER --sort OUT        copies them into OUT/WHO and OUT/unknown
    python -m apps.recognize runs/NAME FOLDER --group OUT       the same, one folder for faces that look alike
    python -m apps.recognize runs/NAME --enrol WHO PICTURE...   three to five pictures, no training
    python -m apps.recognize runs/NAME --list                   who is known; --forget WHO removes one
    python -m apps.recognize runs/NAME --folds 3                trains three more times, to know unknown faces
    python -m apps.recognize runs/NAME --verify                 measures verification and unknown faces

Reads:  runs/NAME/ head.safetensors and what finetune_lora.py wrote beside it
Writes: runs/NAME/ gallery.safetensors (built where it is missing; --enrol and --forget change it),
        fold-1-of-3/, ..., folds.json (--folds: runs without a part of the characters; what they say)
        recognize.json (--verify; of other data or splits in runs/NAME/DATA-SPLIT/)
        OUT/ copies of the pictures and sorted.csv (--sort, --group)

The head names the characters that it learned. The gallery holds the embeddings of known faces, each
a mean over a picture and its mirror image. A face that is similar to none of them is unknown.

    n faces   m held-out pictures   B batch   D width of an embedding   C characters
"""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import finetune_lora
from common import fields, metrics, stats
from common.classifier import pooled_of, predict, read_head
from common.command import Parser, between, cli, command, refuse_idle
from common.features import open_rows, results_folder
from common.io import (
    UserError,
    atomic,
    read_json,
    read_safetensors,
    reading,
    save_csv,
    save_json,
    save_safetensors,
)
from common.locks import claim, lock_beside, locked
from common.train import autocast_of, commit, machine, pick_device, pick_dtype
from finetune_lora import load_classifier
from ingest import sources
from ingest.pictures import picture_files, pictures, tell_problems, whole_pictures

GALLERY = "gallery.safetensors"
FACES = 500  # training pictures of a character in a gallery, at most
NEAREST = 3  # faces of a character that a picture is compared with, and faces in an answer
WHITENED = 20  # faces of a character that the whitening is fitted to
LIFT = 0.1  # similarity per standard deviation of the best logit (results/TRIED.md)
SHRINK = 0.3  # share of the mean variance that is added to the covariance
MOST_REJECTED = 0.09  # share of known faces on dev called unknown; on new ones a tenth
OTHERS = 0.05  # share of other faces that may pass for one enrolled character
FOLDS = 5  # of the characters, where known ones stand in for unknown ones
LEAST, SHOTS = 3, 5  # pictures that an enrolment needs, and that its threshold is fitted to
SAME = 0.9999  # cosine of two embeddings of one picture, which differ by rounding
HANDICAP = 0.1  # so much less similar are new faces to a mean of few faces (results/TRIED.md)
ALIKE = 0.3  # mean cosine that joins two groups; on dev, 4 characters need less and 20 need more
CENTRED = 0.5  # share of the mean of all faces that is taken away before grouping
GROUPED = 10_000  # faces at most: memory holds all pairs
RADII = np.arange(0.05, 1, 0.05)  # cosine distances that `as_ccip` tries as eps of DBSCAN
PAIRS_OF = 4000  # images that --verify takes at most; it compares all pairs
SURE = 0.8  # confidence of the names of which --verify says how many are right
FALSE_RATES = 0.001, 0.01, 0.1  # of false positives and false alarms that --verify reports
FLAGS = {  # that each task reads
    "sort": "sort threshold detect device dtype",
    "group": "group threshold detect device dtype",
    "name": "threshold json detect device dtype",
    "enrol": "enrol device dtype",
    "forget": "forget",
    "list": "list",
    "folds": "folds device dtype",
    "verify": "verify data split threshold json device dtype",
}


def parse_args():
    """-> the flags, and `task`: "name", or the flag that says another task."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", metavar="runs/NAME", help="what finetune_lora.py wrote")
    add("images", nargs="*", metavar="PICTURE", help="file, folder, zip, tar; - for a list")
    add("--threshold", type=between(-2, 2), metavar="LEAST", help="similarity of a known face")
    add("--json", action="store_true", help="print a JSON object a picture (--verify: one)")
    add(
        "--detect", metavar="RUN", help="runs/NAME of apps/detect.py: name each face, left to right"
    )
    add("--sort", type=Path, metavar="OUT", help="copy pictures into OUT/WHO and OUT/unknown")
    add("--group", type=Path, metavar="OUT", help="the same, one folder for faces that look alike")
    add("--enrol", metavar="WHO", help="add a character, or pictures of an enrolled one")
    add("--forget", metavar="WHO", help="take an enrolled character out of the gallery")
    add("--list", action="store_true", help="say who is known, and by how many pictures")
    add("--folds", type=between(2, 10, int), metavar="N", help="train N more times without a part")
    add("--verify", action="store_true", help="measure verification and unknown faces")
    add("--data", metavar="DIR", help="of --verify (default: what it was trained on)")
    add("--split", default="val", choices=["val", "dev", "test", "train"], help="of --verify")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    args = parser.parse_intermixed_args()  # pictures may stand before and after flags
    args.task = next((name for name in FLAGS if name in args.given), "name")
    takes_pictures = args.task in ("name", "sort", "group", "enrol")
    if takes_pictures and not args.images:
        raise UserError(f"give pictures, or a folder of them, to {args.task}")
    if args.images and not takes_pictures:
        raise UserError(f"--{args.task} takes no pictures, such as {args.images[0]}")
    refuse_idle(args.given - set(FLAGS[args.task].split()), f"when the task is to {args.task}")
    return args


# ---- similarity ----------------------------------------------------------------------------------


def evenly_of_each(labels, most):
    """labels (n,) -> a list of rows for each label: at most so many, evenly spaced."""
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return [some[data.evenly_spaced(len(some), most)] for some in rows]


def whitening(embeddings, labels):
    """embeddings (n, D), labels (n,) -> mean (D,), matrix (D, D).

    (x - mean) @ matrix varies alike in all directions in a class (Hatch et al. 2006, WCCN):
    matrix matrix^T is the inverse of the covariance within classes.
    """
    groups = [embeddings[rows] for rows in evenly_of_each(labels, WHITENED)]
    means = torch.stack([group.mean(0) for group in groups]).double()
    differences = torch.cat([group.double() - group.mean(0) for group in groups])
    W = differences.T @ differences / max(1, len(differences) - len(groups))
    W += (SHRINK * W.diagonal().mean() + 1e-9) * torch.eye(len(W), dtype=W.dtype)
    return means.mean(0).float(), torch.linalg.cholesky(torch.linalg.inv(W)).float()


def make_gallery(embeddings, labels, learned, lift=None):
    """Faces (n, D), labels (n,) of which the first `learned` are the head's -> a dict.

    faces: the unit vectors of each learned character that has any. means (C, D): mean directions.
    lift: as `lift_of` returns it; None leaves the head out of similarities.
    """
    is_learned = labels < learned
    mean, matrix = whitening(embeddings[is_learned], labels[is_learned])
    gallery = {"mean": mean, "matrix": matrix, "labels": labels, "learned": learned}
    unit = compared(embeddings, gallery)
    faces = [unit[labels == c] for c in labels.unique() if c < learned]
    sums = unit.new_zeros(int(labels.max()) + 1, unit.shape[1])
    means = F.normalize(sums.index_add_(0, labels, F.normalize(unit)))
    gallery |= {"embeddings": embeddings, "lift": lift}
    return gallery | {"unit": unit, "faces": faces, "means": means}


def compared(embeddings, gallery):
    """embeddings (n, D) -> whitened unit vectors (n, D): their products are similarities."""
    return F.normalize((embeddings.float() - gallery["mean"]) @ gallery["matrix"])


def best_similarity(unit, gallery):
    """unit (n, D) -> (n,): the mean cosine with the three nearest faces of a character, the best one."""
    scores = []
    for faces in gallery["faces"]:
        nearest = (unit @ faces.T).topk(min(NEAREST, len(faces)), 1).values
        scores.append(nearest.mean(1))
    return torch.stack(scores, 1).amax(1)


def similarity_of(logits, embeddings, gallery):
    """(n, C), (n, D) -> (n,): `best_similarity`, higher where the head is surer than usual.

    LIFT for each standard deviation of the best logit of known faces. Together they separate best.
    """
    usual, per_logit = gallery["lift"] or (0.0, 0.0)
    similarity = best_similarity(compared(embeddings, gallery), gallery)
    return similarity + per_logit * (logits.amax(1) - usual)


def decide(logits, embeddings, gallery):
    """-> (n,) who, similarity, margin over its threshold (below 0: unknown), confidence.

    The head names the characters that it learned. An enrolled one wins where the mean of its faces is
    nearer, HANDICAP given, than that of every learned one. confidence: P(the name is right) where
    half of all pictures show unknown characters; nan of an enrolled one.
    """
    unit = compared(embeddings, gallery)
    learned = gallery["learned"]
    who = logits.argmax(1)
    similarity = similarity_of(logits, embeddings, gallery)
    margin = similarity - gallery["threshold"]
    a, b = gallery["platt"]
    right_name = (logits / gallery["temperature"]).softmax(1).amax(1)
    sure = right_name * (a * margin + b).sigmoid()
    to_mean = unit @ gallery["means"].T  # (n, characters)
    if to_mean.shape[1] == learned:
        return who, similarity, margin, sure
    near, enrolled = to_mean[:, learned:].max(1)
    new = near + HANDICAP > to_mean[:, :learned].amax(1)
    return (
        torch.where(new, enrolled + learned, who),
        torch.where(new, near, similarity),
        torch.where(new, near - gallery["enrolled_threshold"], margin),
        sure.masked_fill(new, torch.nan),
    )


# ---- calibration: when is it unknown, and how sure is an answer? ---------------------------------


def calibrate(embeddings, labels, held_out, unknown=None, folds=()):
    """-> a dict of numbers for the gallery's header.

    held_out: logits (m, C), embeddings (m, D), labels (m,) of known characters. unknown: the same of
    unknown ones; without them each known one stands in. folds (see `fold_of`) have more of both. At
    most MOST_REJECTED of the known are called unknown.
    The file keeps the threshold: after a change of this rule, remove gallery.safetensors.
    """
    logits, known, known_labels = held_out
    gallery = make_gallery(embeddings, labels, int(labels.max()) + 1, lift_of(logits))
    known_score = similarity_of(logits, known, gallery)
    if folds:
        known_score = torch.cat([known_score, *(fold["known"] for fold in folds)])
        unknown_score = torch.cat([fold["unknown"] for fold in folds])
    elif unknown:
        unknown_score = similarity_of(*unknown[:2], gallery)
    else:
        unknown_score = as_unknown(gallery, held_out)
    threshold = threshold_of(known_score, unknown_score)
    return {
        "threshold": threshold,
        "enrolled_threshold": enrolled_threshold(gallery, known, known_labels),
        "temperature": fit_temperature(logits, known_labels),
        "platt": fit_platt(known_score - threshold, unknown_score - threshold),
        "lift": gallery["lift"],
    }


def lift_of(logits):
    """Logits (m, C) of known held-out faces -> the gallery's "lift", which `similarity_of` reads."""
    strength = logits.amax(1)
    usual = strength.mean().item()
    spread = strength.std(correction=0).item()
    return [usual, LIFT / max(spread, 0.1 * abs(usual), 1e-6)]


def threshold_of(known, unknown):
    """Similarities of known (m,) and unknown (k,) faces -> the one under which a face is unknown."""
    highest = known.sort().values[int(MOST_REJECTED * len(known))].item()
    return min(balance(known, unknown), highest)


def as_unknown(gallery, held_out):
    """Similarities (m,) of known faces while a fifth of the characters at a time is left out."""
    logits, known, known_labels = held_out
    labels, embeddings = gallery["labels"], gallery["embeddings"]
    found = torch.empty(len(known))
    for fold in range(FOLDS):
        stay = labels % FOLDS != fold
        asked = known_labels % FOLDS == fold
        count = int(labels.max()) + 1
        less = make_gallery(embeddings[stay], labels[stay], count, gallery["lift"])
        others = torch.arange(logits.shape[1]) % FOLDS != fold
        heads = logits[asked][:, others]
        found[asked] = similarity_of(heads, known[asked], less)
    return found


def enrolled_threshold(gallery, known, known_labels):
    """The similarity to the mean of SHOTS faces of a character that OTHERS of other faces reach."""
    unit = compared(known, gallery)
    others = []
    for c in gallery["labels"].unique().tolist():
        faces = gallery["unit"][gallery["labels"] == c]
        mean = F.normalize(faces[data.evenly_spaced(len(faces), SHOTS)].sum(0), dim=0)
        others.append((unit @ mean)[known_labels != c])
    others = torch.cat(others).sort(descending=True).values
    return others[int(OTHERS * len(others))].item()


def balance(known, unknown):
    """-> the threshold that rejects as large a share of known (n,) as it accepts of unknown (m,)."""
    thresholds = torch.cat([known, unknown]).sort().values
    rejected = torch.searchsorted(known.sort().values, thresholds) / len(known)
    accepted = 1 - torch.searchsorted(unknown.sort().values, thresholds) / len(unknown)
    return thresholds[(rejected - accepted).abs().argmin()].item()


def fit_temperature(logits, labels):
    """The T for which softmax(logits / T) fits the labels best (Guo et al. 2017, arXiv:1706.04599)."""
    grid = torch.logspace(-2.5, 1.5, 161)
    losses = torch.stack([F.cross_entropy(logits / T, labels) for T in grid])
    return grid[losses.argmin()].item()


def fit_platt(known, unknown):
    """Margins of known (n,) and unknown (m,) -> a, b of P(known) = sigmoid(a * margin + b) (Platt 1999)."""
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([known, unknown])[:, None].numpy()
    y = [1] * len(known) + [0] * len(unknown)
    fit = LogisticRegression(C=1e3, class_weight="balanced").fit(x, y)
    return [float(fit.coef_[0, 0]), float(fit.intercept_[0])]


# ---- gallery.safetensors: the first `learned` of the names are the head's, keys are of the faces --

HEADER = {"names": fields.NAMES, "keys": fields.list_of(fields.TEXT, 1), "learned": fields.whole(1)}
HEADER |= {"threshold": fields.number(), "enrolled_threshold": fields.number()}  # of `calibrate`
HEADER |= {"temperature": fields.number(1e-6), "platt": fields.list_of(fields.number(), 2, 2)}
HEADER |= {"lift?": fields.list_of(fields.number(), 2, 2)}
REMEDY = "remove it, and apps/recognize.py builds it anew"
UNMEASURED = (  # of a run that learned all characters of its set
    "most new characters may get a known name; python -m apps.recognize {run} --folds 3 trains three more "
    "times, each time without a third of the characters, and measures it"
)


def open_gallery(run, device="auto", dtype="auto"):
    """What `load_gallery` returns. Where the run has no gallery, it is built first."""
    path = Path(run) / GALLERY
    if not path.exists():
        with locked(lock_beside(path), wait=True):
            if not path.exists():  # another process may have built it
                build_gallery(run, device, dtype)
    return load_gallery(run)


def build_gallery(run, device, dtype):
    """Write the embeddings of training pictures, and what is calibrated on held-out ones."""
    path = Path(run) / GALLERY
    faces = faces_learned(run, device, dtype)
    header = {"names": faces.classes, "keys": faces.keys, "learned": len(faces.classes)}
    header |= calibrate(faces.embeddings, faces.labels, faces.held_out, faces.unknown)
    save_gallery(path, faces.embeddings, faces.labels, header)
    count = f"{len(faces.keys)} faces of {len(faces.classes)} characters"
    print(f"wrote {path}: {count}", file=sys.stderr)
    if faces.unknown is None:
        print(f"note: {UNMEASURED.format(run=shlex.quote(str(run)))}", file=sys.stderr)


def open_network(run, device, dtype):
    """-> the classifier of a run on its device, the header of its head, and autocast."""
    net, header = load_classifier(run)
    device = pick_device(device)
    return net.to(device), header, autocast_of(device, pick_dtype(dtype, device)[0])


def outputs_of(net, split, rows, autocast, name=""):
    """Whole images -> logits (n, C), embeddings (n, D), each of the mean of picture and mirror image."""
    return predict(net, pooled_of(net, split, rows, autocast, name, mirrored=True))


def faces_learned(run, device, dtype):
    """The pictures that a run was trained on -> a namespace.

    embeddings (n, D), labels (n,), keys   training pictures, at most FACES of a character
    classes                                the names of the labels
    held_out                               logits (m, C), embeddings (m, D), labels (m,) of dev
    unknown                                the same of characters that --hold-out left out, or None
    """
    net, header, autocast = open_network(run, device, dtype)
    folder = header["data"]
    held = header.get("split", "val")
    (train, dev, _), classes = open_rows(folder, held, header.get("hold_out", 0))
    if classes != header["classes"]:
        raise UserError(f"{folder} has other characters than {run} learned; put the old set back")
    outputs = partial(outputs_of, net, autocast=autocast, name="gallery")
    rows = torch.cat([train.rows[some] for some in evenly_of_each(train.labels[train.rows], FACES)])
    keys = [train.split["header"]["keys"][i] for i in rows.tolist()]
    found = SimpleNamespace(keys=keys, classes=classes, labels=train.labels[rows])
    _, found.embeddings = outputs(train.split, rows)
    found.held_out = *outputs(dev.split, dev.rows), dev.labels[dev.rows]
    left_out = (dev.labels < 0).nonzero()[:, 0]
    found.unknown = None
    if len(left_out):
        labels = torch.as_tensor(dev.split["labels"])[left_out]
        found.unknown = *outputs(dev.split, left_out), labels
    return found


def save_gallery(path, embeddings, labels, header):
    """embeddings (n, D), labels (n,); header: the fields of HEADER, and perhaps others."""
    tensors = {"embeddings": embeddings.float(), "labels": labels}
    names = [key.removesuffix("?") for key in HEADER]
    save_safetensors(tensors, path, {name: header[name] for name in names})


def load_gallery(run):
    """-> a dict: embeddings (n, D), labels (n,), the header, and what `make_gallery` returns."""
    path = Path(run) / GALLERY
    tensors, header = read_safetensors(path, REMEDY)
    fields.check_fields(header, HEADER, path, REMEDY)
    learned, names = header["learned"], header["names"]
    _, head = read_head(run)
    arrays = {"embeddings": f"float n {head['config']['dim']}", "labels": "int64 n"}
    fields.check_arrays(tensors, arrays, path, REMEDY, n=len(header["keys"]))
    fields.check_finite(tensors, path)
    embeddings = tensors["embeddings"].float()
    labels = tensors["labels"]
    fields.check_range(labels, 0, len(names), "labels", path, REMEDY)
    if names[:learned] != head["classes"] or len(labels.unique()) != len(names):
        raise UserError(f"{path} is not of this run's characters; {REMEDY}")
    return make_gallery(embeddings, labels, learned) | header


# ---- folds: each part of the characters is unknown once --------------------------------------------


def calibrate_by_folds(args, count):
    """Train again without each part of the `count` characters; these then say what unknown ones are."""
    run, parts = args.run, args.folds
    path = Path(run) / GALLERY
    folds = []
    if parts > count or count - -(-count // parts) < 2:
        why = "a part needs one, a training two"
        raise UserError(f"{count} characters are too few for --folds {parts}: {why}")
    for part in range(1, parts + 1):
        fold = train_fold(run, f"{part}/{parts}", args.device)
        faces = faces_learned(fold, args.device, args.dtype)
        if faces.unknown is None:
            raise UserError(f"dev has no picture of part {part} of {parts}: pack it without --dev")
        folds.append(fold_of(faces))
    own = faces_learned(run, args.device, args.dtype)
    numbers = calibrate(own.embeddings, own.labels, own.held_out, None, folds)
    with locked(lock_beside(path), wait=True):
        gallery = load_gallery(run)
        save_gallery(path, gallery["embeddings"], gallery["labels"], gallery | numbers)
    found = promise(folds, numbers["threshold"])
    save_json(found | {"command": command(), "commit": commit()}, Path(run) / "folds.json")
    print(promised(found))


def train_fold(run, part, device):
    """finetune_lora.py as for this run, without a part of the characters -> the folder of that run."""
    folder = Path(run) / f"fold-{part.replace('/', '-of-')}"
    made = [*Path(run).glob("metrics*.json")]
    if not made or not Path(run, "state.pt").exists():
        raise UserError(f"{run} is no finished run of finetune_lora.py, which --folds repeats")
    words = shlex.split(read_json(made[0])["command"])[2:]
    if any(word.startswith("--hold-out") for word in words):
        raise UserError(f"{run} has held-out characters already, which tell what --folds would")
    words += ["--hold-out", part, "--out", str(folder)]
    if (folder / "state.pt").exists():
        words = ["--resume", str(folder)]
    words += ["--device", device] * (device != "auto")
    script = Path(finetune_lora.__file__)
    if not any(folder.glob("metrics*.json")) and subprocess.call([sys.executable, script, *words]):
        raise UserError(f"{folder} was not trained; the line above says why")
    return folder


def fold_of(faces):
    """`faces_learned` of a fold -> similarities of known (m,) and unknown (k,) faces, labels of these."""
    lift = lift_of(faces.held_out[0])
    gallery = make_gallery(faces.embeddings, faces.labels, len(faces.classes), lift)
    known = similarity_of(*faces.held_out[:2], gallery)
    unknown = similarity_of(*faces.unknown[:2], gallery)
    return {"known": known, "unknown": unknown, "labels": faces.unknown[2]}


def promise(folds, threshold):
    """What to expect of unknown characters, by those that were left out in turn -> folds.json, in percent."""
    shares = []
    for fold in folds:
        below = 100 * (fold["unknown"] < threshold).double()
        shares += [below[fold["labels"] == c].mean().item() for c in fold["labels"].unique()]
    known = 100 * torch.cat([fold["known"] for fold in folds]).lt(threshold).double().mean()
    found = {"characters": len(shares), "known_unknown": known.item(), "shares": shares}
    if interval := stats.t_interval(shares):
        found["unknown"] = interval["mean"]
        found["interval"] = [max(0, interval["low"]), min(100, interval["high"])]
    return found


def promised(found):
    """folds.json -> the line that is printed."""
    count = found["characters"]
    if "unknown" not in found:
        why = "are too few, or all alike, to say"
        return f"unknown  {count} characters {why} how many new ones get a known name"
    low, high = found["interval"]
    return (
        f"unknown  {found['unknown']:.0f} % of the faces of new characters will be called unknown "
        f"(95 % interval {low:.0f} to {high:.0f}, by {count} characters left out in turn), "
        f"and {found['known_unknown']:.0f} % of the known ones"
    )


# ---- naming and enrolment ------------------------------------------------------------------------


def predictions(args, net, header, autocast, problems):
    """Yield (keys, logits (B, C), embeddings (B, D)) of the pictures, or with --detect of faces."""
    size = header["packed_size"]
    cut = size, header["crop"], header["margin"]
    items = faces(args, size, problems) if args.detect else pictures(args.images, *cut, problems)
    while some := list(itertools.islice(items, data.CHUNK)):
        keys, images = zip(*some, strict=True)
        yield list(keys), *embed(net, np.stack(images), autocast)


def faces(args, size, problems):
    """Yield (picture and box, u8 (size, size, 3)) of every face that --detect finds."""
    from apps import detect

    net, header = detect.load(args.detect)
    net.to(pick_device(args.device))
    for key, picture in whole_pictures(args.images, problems):
        boxes, _ = detect.faces_of(net, picture, header["page"], header["threshold"])
        if not len(boxes):
            print(f"{fields.shown(key)}: no face was found", file=sys.stderr)
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
    decisions = zip(*decide(logits, embeddings, gallery), strict=True)
    to_face = compared(embeddings, gallery) @ gallery["unit"].T  # (B, faces)
    rows = []
    for key, cosines, (who, similarity, margin, sure) in zip(keys, to_face, decisions, strict=True):
        name = gallery["names"][who]
        known = bool(margin >= 0)
        row = {"picture": key, "name": name if known else None, "known": known}
        row["confidence"] = None if sure.isnan() else round(sure.item(), 4)
        row["similarity"] = round(similarity.item(), 4)
        row["threshold"] = round((similarity - margin).item(), 4)
        row |= {"best_guess": name, "nearest": []}
        for cosine, i in zip(*cosines.topk(min(nearest, len(cosines))), strict=True):
            face = {"name": gallery["names"][gallery["labels"][i]], "picture": gallery["keys"][i]}
            row["nearest"].append(face | {"similarity": round(cosine.item(), 4)})
        rows.append(row)
    return rows


def in_words(row):
    """One of `answers` -> the line that is printed."""
    similarity = f"similarity {row['similarity']:.2f}"
    sure = "enrolled" if row["confidence"] is None else f"confidence {row['confidence']:.0%}"
    who = f"{row['name']}, {sure}, {similarity}"
    if not row["known"]:
        limit = f"threshold {row['threshold']:.2f}"
        who = f"unknown (unlike all known characters: {similarity}, {limit})"
    line = f"{fields.shown(row['picture'])}: {who}"
    for face in row["nearest"][:1]:
        line += f"; nearest: {fields.shown(face['picture'])} {face['similarity']:.2f}"
    return line


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
        words = f"{shlex.quote(args.run)} --enrol WHO PICTURES makes somebody new known"
        print(f"next: python -m apps.recognize {words}", file=sys.stderr)


# ---- sorting: OUT/WHO/PICTURE, copies -------------------------------------------------------------

SORTED, UNKNOWN = "sorted.csv", "unknown"  # a file and a folder of OUT
COLUMNS = ("picture", "name", "similarity", "confidence", "copy")
SAVED_AFTER = 100  # pictures
FORBIDDEN = re.compile(r'[<>:"/\\|?*]|[. ]+$')  # in names of files, on some system
DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\..*)?$", re.IGNORECASE)  # on Windows


def sort(args, net, header, gallery, autocast):
    """--sort: copy each picture into the folder of who is in it. What sorted.csv lists is done.

    --group: into a folder of faces that look alike, named where the gallery knows most of them.
    """
    out = args.sort or args.group
    claim([], lock=out / ".lock")
    rows = open_sorted(out / SORTED)
    if args.group and rows:
        raise UserError(f"{out} has groups already; choose a new folder for --group")
    wanted = files_to_sort(args.images, out, rows)
    args.images = not_listed(wanted, rows)
    problems = []
    if args.sort:
        done = len(wanted) - len(args.images)
        again = ", by whatever run; a new folder sorts them anew" if done else ""
        print(f"sort     {len(wanted)} pictures, {done} of them done{again}")
    found = ()
    names = gallery["names"]
    if args.group:
        found = grouped(predictions(args, net, header, autocast, problems), gallery)
        names = dict.fromkeys(row["name"] for row in found)
    elif args.images:
        found = all_answers(args, net, header, gallery, autocast, problems)
    copy_all(found, args, wanted, folders_of(names), rows, out / SORTED)
    tell_problems(problems, header["data"])


def grouped(found, gallery):
    """What `predictions` yields -> the rows of `answers`, named by the group of the face."""
    rows, units = [], []
    for keys, logits, embeddings in found:
        rows += answers(keys, logits, embeddings, gallery)
        units.append(compared(embeddings, gallery))
    if not rows:
        raise UserError("no face was found, so there is nothing to group")
    groups = alike(torch.cat(units))
    names = names_of(groups, [row["name"] for row in rows])
    known = set(names.values()) & set(gallery["names"])
    print(f"groups   {len(set(names.values()))}, {len(known)} of them named")
    return [row | {"name": names[number]} for row, number in zip(rows, groups, strict=True)]


def alike(unit):
    """Whitened unit vectors (n, D) -> the group of each, 0, 1, ... by size: average linkage of cosines."""
    from sklearn.cluster import AgglomerativeClustering

    if len(unit) > GROUPED:
        raise UserError(f"{len(unit):,} faces are more than --group takes, {GROUPED:,}; give fewer")
    if len(unit) < 2:
        return [0] * len(unit)
    settings = {"metric": "cosine", "linkage": "average", "distance_threshold": 1 - ALIKE}
    found = AgglomerativeClustering(n_clusters=None, **settings).fit_predict(centred(unit).numpy())
    by_size = Counter(found.tolist()).most_common()
    rank = {number: i for i, (number, _) in enumerate(by_size)}
    return [rank[number] for number in found.tolist()]


def centred(unit):
    """Unit vectors less a share of their mean: else all faces of a new style are alike."""
    return F.normalize(unit - CENTRED * unit.mean(0))


def names_of(groups, names):
    """Group and name (None: unknown) of each face -> {group: its name}, as most of its faces."""
    names_in, found = {}, {}
    for number, name in zip(groups, names, strict=True):
        names_in.setdefault(number, []).append(name)
    for number, inside in sorted(names_in.items()):
        [(name, count)] = Counter(inside).most_common(1)
        known = name is not None and 2 * count > len(inside)
        found[number] = name if known else f"group-{number + 1:03}"
    return found


def copy_all(found, args, wanted, folders, rows, table):
    """Rows of `answers`, in the order of pictures -> copies, and a row of each in sorted.csv."""

    def file_of(row):
        return row["picture"].rpartition("[")[0] if args.detect else row["picture"]

    before = len(rows)
    save_csv(rows, table, COLUMNS)  # from now on the folder is known as ours
    try:
        for count, (file, faces) in enumerate(itertools.groupby(found, file_of), 1):
            rows += copies_of(file, faces, wanted[file], folders, table.parent)
            if count % SAVED_AFTER == 0:
                save_csv(rows, table, COLUMNS)
        without_copy = not_listed(wanted, rows)  # not to be read, or without a face
        rows += [dict.fromkeys(COLUMNS, "") | {"picture": file} for file in without_copy]
    finally:  # Ctrl-C, too
        save_csv(rows, table, COLUMNS)
    copies = [row["copy"] != "" for row in rows]
    more = f"{sum(copies[before:])} copies, {sum(copies)} in all"
    print(f"wrote    {table.parent}/: {more}, listed in {table}")


def files_to_sort(paths, out, rows):
    """-> {file: its name below OUT/WHO}, each file once; the folders in a given folder stay.

    No picture takes the name of another one, nor that of a copy that a row of sorted.csv lists.
    """
    wanted = {}  # absolute path: (path as given, name)
    taken = {Path(*Path(row["copy"]).parts[1:]): row["picture"] for row in rows if row["copy"]}
    for path in paths:
        if out.resolve().is_relative_to(Path(path).resolve()):
            raise UserError(f"{out} lies in {path}, which is copied; choose another folder")
        for key, file in picture_files(path).items():
            name = Path(key if Path(path).is_dir() else file.name)
            other = taken.setdefault(name, file)
            if os.path.abspath(other) != os.path.abspath(file):
                raise UserError(f"{other} and {file} have one name; rename one of them")
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
        with reading(table, "table of --sort", "choose another --sort"):
            _, *rows = csv.reader(io.StringIO(table.read_text("utf-8", "surrogateescape")))
            return [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    if any(path.name != ".lock" for path in table.parent.iterdir()):
        raise UserError(f"{table.parent} has files, and no {SORTED}; choose a new folder")
    return []


def folders_of(names):
    """-> {character: folder}: names of files on every system, no two alike, none `unknown`."""
    folders = {}
    taken = {UNKNOWN}
    for name in names:
        folder = FORBIDDEN.sub("_", name)
        while folder.casefold() in taken or DEVICES.match(folder):
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
        with atomic(out / copy) as temporary:
            shutil.copyfile(file, temporary)
        with contextlib.suppress(OSError):  # not every disk keeps times and modes
            shutil.copystat(file, out / copy)  # it may forbid to write
        numbers = face["similarity"], face["confidence"]
        rows.append(dict(zip(COLUMNS, (file, who, *numbers, copy), strict=True)))
    return rows


def enrol(args, net, header, autocast):
    """Add these pictures to the gallery, under one name."""
    who = sources.nfc(args.enrol.strip())
    if not fields.is_name(who):
        raise UserError(f"--enrol {fields.short(who)} is no name; give a few printable letters")
    if who in header["classes"]:
        raise UserError(f"{who} was learned in training and is known already; enrol another name")
    problems, keys, embeddings = [], [], []
    for some, _, more in predictions(args, net, header, autocast, problems):
        keys += some
        embeddings.append(more)
    if problems:
        raise UserError(f"{problems[0][1]}; nobody was enrolled")
    print(add_faces(args.run, who, keys, torch.cat(embeddings)))
    words = f"{shlex.quote(args.run)} PICTURE, or {shlex.quote(f'--forget={who}')}"
    print(f"next: python -m apps.recognize {words}")


def add_faces(run, who, keys, embeddings):
    """Add embeddings (n, D) of pictures `keys`, each once, to the run's gallery -> a line that says so."""
    path = Path(run) / GALLERY
    with locked(lock_beside(path), wait=True):
        gallery = load_gallery(run)
        names = gallery["names"] if who in gallery["names"] else [*gallery["names"], who]
        label = names.index(who)
        own = gallery["embeddings"][gallery["labels"] == label]
        unit = F.normalize(torch.cat([own, embeddings]))
        is_known = (unit @ unit.T > SAME).tril(-1).any(1)  # as a face before it
        new = ~is_known[len(own) :]
        keys = list(itertools.compress(keys, new))
        labels = F.pad(gallery["labels"], (0, len(keys)), value=label)
        total = int((labels == label).sum())
        if total < LEAST:
            raise UserError(f"{total} pictures of {who} are too few; give {LEAST} to {SHOTS}")
        header = gallery | {"names": names, "keys": gallery["keys"] + keys}
        save_gallery(path, torch.cat([gallery["embeddings"], embeddings[new]]), labels, header)
    return f"{who} is enrolled with {total} pictures; the gallery knows {len(names)} characters"


def take_out(run, who):
    """Remove an enrolled character from the run's gallery -> a line that says so."""
    who = sources.nfc(who.strip())
    path = Path(run) / GALLERY
    with locked(lock_beside(path), wait=True):
        gallery = load_gallery(run)
        names = gallery["names"]
        if who not in names[gallery["learned"] :]:
            how = "was learned in training" if who in names else "is not enrolled"
            raise UserError(f"{who} {how}; only enrolled ones can be forgotten, see --list")
        label = names.index(who)
        stay = gallery["labels"] != label
        labels = gallery["labels"] - (gallery["labels"] > label).long()
        keys = list(itertools.compress(gallery["keys"], stay))
        header = gallery | {"names": names[:label] + names[label + 1 :], "keys": keys}
        save_gallery(path, gallery["embeddings"][stay], labels[stay], header)
    return f"{who} is forgotten; the gallery knows {len(names) - 1} characters"


def list_known(gallery):
    """Print who is known, a line each."""
    counts = torch.bincount(gallery["labels"]).tolist()
    for i, (name, n) in enumerate(zip(gallery["names"], counts, strict=True)):
        how = "learned in training" if i < gallery["learned"] else "enrolled"
        print(f"{name}: {how}, {n} pictures")


# ---- measured: the same character or not, and unknown characters ---------------------------------


def faces_of(net, gallery, folder, name, autocast):
    """Pictures of a packed split -> a namespace: the truth, and what `decide` returns.

    unit     (n, D), as `compared`
    labels   (n,), the set's, -1 of pictures without one; groups (n,)
    true     (n,), numbers of characters in the gallery, -1 of an unknown one
    right    (n,), is the name true?
    margin   (n,), and sure, as `decide`
    """
    split = data.open_split(folder, name)
    rows = data.evenly_spaced(len(split["images"]), PAIRS_OF)
    logits, embeddings = outputs_of(net, split, rows, autocast, f"faces of {folder}")
    ids = {who: i for i, who in enumerate(gallery["names"])}
    known = [ids.get(who, -1) for who in split["header"]["classes"]]
    labels = split["labels"][rows]
    groups = data.groups_of(split)[rows]
    true = torch.tensor([*known, -1])[labels]  # the last: without a label
    who, _, margin, sure = decide(logits, embeddings, gallery)
    found = {"unit": compared(embeddings, gallery), "labels": labels, "groups": groups}
    return SimpleNamespace(**found, true=true, right=who == true, margin=margin, sure=sure)


def verification(same, other):
    """Cosines of pairs of one character (n,) and of two (m,): can they be told apart? In percent."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    pairs = metrics.truth_and_scores(same, other)
    false, true, _ = roc_curve(*pairs, drop_intermediate=False)
    shares = {f"tpr_at_fpr_{100 * rate:g}": true[false <= rate].max() for rate in FALSE_RATES}
    shares["roc_auc"] = roc_auc_score(*pairs)
    shares["eer"] = metrics.equal_error_rate(same, other)
    shares["average_precision"] = average_precision_score(*pairs)
    counts = {"positive_pairs": len(same), "negative_pairs": len(other)}
    return {name: round(100 * float(share), 3) for name, share in shares.items()} | counts


def open_set(known, right, enrolled, unknown):
    """Which pictures show unknown characters? In percent, of margins over the threshold.

    Margins of known (n,) and unknown (m,) ones; right (n,): is the name true; enrolled (n,): is it enrolled?
    """
    from sklearn.metrics import roc_auc_score

    counts = {"known": len(known), "strangers": len(unknown), "enrolled": int(enrolled.sum())}
    named = (right & (known >= 0)).double()
    shares = {"known_rejected": (known < 0).double().mean(), "known_named_rightly": named.mean()}
    if enrolled.any() and not enrolled.all():
        shares["enrolled_named_rightly"] = named[enrolled].mean()
    if len(unknown):
        for rate in FALSE_RATES:
            shares[f"dir_at_far_{100 * rate:g}"] = detection_rate(known, right, unknown, rate)
        shares["auroc_unknown"] = roc_auc_score(*metrics.truth_and_scores(known, unknown))
        shares["strangers_unknown"] = (unknown < 0).double().mean()
        at_5 = known.quantile(0.05)  # the threshold that 5 % of the known fail
        shares["strangers_unknown_at_5"] = (unknown < at_5).double().mean()
    return {name: round(100 * float(share), 3) for name, share in shares.items()} | counts


def detection_rate(known, right, unknown, far):
    """Detection and identification rate at a false alarm rate of at most far < 1 (Phillips et al. 2011).

    Scores of known (n,) and unknown (m,) faces; right (n,): is the best name of a known one true?
    """
    allowed = int(far * len(unknown) + 1e-9)  # unknown faces that may get a name
    threshold = unknown.sort(descending=True).values[allowed]
    return ((known > threshold) & right).double().mean().item()


def reliability(known, is_right, unknown, bins=10):
    """How true are confidences? In percent, where half of all pictures are unknown.

    known (n,), unknown (m,); is_right (n,), of the names of known ones. Those of enrolled ones have
    no confidence (nan).
    calibration_error: mean gap of confidence and accuracy in equal bins (Guo et al. 2017,
    arXiv:1706.04599). right_when_sure: of names with a confidence of SURE or more; None without any.
    """
    sure = torch.cat([known, unknown])
    right = F.pad(is_right.double(), (0, len(unknown)))
    weights = torch.cat([torch.ones(len(x)).double() / len(x) for x in (known, unknown)])
    there = ~sure.isnan()
    sure, right, weights = (x[there] for x in (sure, right, weights))
    place = (sure * bins).long().clamp(0, bins - 1)
    gaps = torch.bincount(place, weights * (sure.double() - right))
    error = gaps.abs().sum() / weights.sum()
    good = ((known >= SURE) & is_right).double().mean()
    named = (known >= SURE).double().mean() + (unknown >= SURE).double().mean()
    share = round(100 * (good / named).item(), 3) if named else None
    return {"calibration_error": round(100 * error.item(), 3), "right_when_sure": share}


def grouping(unit, labels):
    """Faces (n, D) of characters (n,) in groups as of --group: how well do groups and characters agree?"""
    from sklearn.metrics import adjusted_rand_score
    from sklearn.metrics.cluster import pair_confusion_matrix

    groups = alike(unit)
    (_, false), (missed, true) = pair_confusion_matrix(labels, groups)
    f1 = 200 * true / max(1, 2 * true + false + missed)
    found = {"pair_f1": f1, "adjusted_rand": 100 * adjusted_rand_score(labels, groups)}
    found |= as_ccip(unit, labels)
    return {name: round(float(value), 3) for name, value in found.items()}


def as_ccip(unit, labels):
    """The two measures of CCIP (huggingface.co/deepghs/ccip), in percent, on faces (n, D) of (n,).

    F1 of the pairs that show one character, and the adjusted Rand index of DBSCAN's groups of two
    faces or more. Threshold and eps are the best ones for these very faces, so both are upper bounds.
    """
    from sklearn.cluster import DBSCAN
    from sklearn.metrics import adjusted_rand_score, precision_recall_curve

    unit = centred(unit)
    cosines = unit @ unit.T
    one, two = torch.triu_indices(len(unit), len(unit), 1)
    precision, recall, _ = precision_recall_curve(labels[one] == labels[two], cosines[one, two])
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    distances = (1 - cosines).clamp(min=0).numpy()
    indices = []
    for eps in RADII:
        groups = DBSCAN(eps=eps, min_samples=2, metric="precomputed").fit_predict(distances)
        indices.append(adjusted_rand_score(labels, groups))
    return {"ccip_f1": 100 * f1.max(), "ccip_adjusted_rand": 100 * max(indices)}


def measure(asked, own, learned):
    """Two of `faces_of` -> what recognize.json says of them, as far as there is any.

    asked: of the set that is measured; pairs are of its labelled pictures. own: of a set
    with known characters. learned: by the head.
    """
    row = {}
    labelled = asked.labels >= 0
    faces = asked.unit[labelled], asked.labels[labelled], asked.groups[labelled]
    pairs = metrics.pair_cosines(*faces)
    if all(map(len, pairs)):
        row["verification"] = verification(*pairs)
    is_unknown = asked.true < 0
    unknown = asked.margin[is_unknown]
    known = own.true >= 0
    enrolled = own.true >= learned
    to_group = is_unknown & labelled
    if len(asked.labels[to_group].unique()) > 1:
        row["groups"] = grouping(asked.unit[to_group], asked.labels[to_group])
    if known.any():
        row["open_set"] = open_set(own.margin[known], own.right[known], enrolled[known], unknown)
    of_head = known & ~enrolled
    if of_head.any() and len(unknown):
        row |= reliability(own.sure[of_head], own.right[of_head], asked.sure[is_unknown])
    return row


def verify(args, net, header, gallery, autocast):
    """Write recognize.json. Of a set without known characters, those of the run's report are compared."""
    folder = Path(data.open_or_pack(args.data or header["data"]))
    home = results_folder(args.run, folder, args.split, header["data"])
    claim([home / "recognize.json"], fix="choose another --data or --split")
    asked = own = faces_of(net, gallery, folder, args.split, autocast)
    if (asked.true < 0).all() and Path(header["data"]).exists():
        own = faces_of(net, gallery, header["data"], header.get("split", "val"), autocast)
    found = measure(asked, own, gallery["learned"])
    if not found:
        raise UserError(f"{folder} has no two labelled characters in {args.split} to measure")
    row = {"run": str(args.run), "data": str(folder), "split": args.split}
    row |= {"threshold": gallery["threshold"]} | found
    row |= {"command": command(), "commit": commit()}
    row["machine"] = machine(net.encoder.cls_token.device)
    save_json(row, home / "recognize.json")
    print(json.dumps(row, ensure_ascii=False) if args.json else "\n".join(table(row)))
    print(f"wrote {home}/recognize.json", file=sys.stderr)


LINES = (  # of --verify, from the numbers of recognize.json; a line whose number is missing is left out
    "{data}, {split}",
    "pairs of the same character or not: AUROC {roc_auc:.1f} %, equal error rate {eer:.1f} %",
    "{known:,} pictures of known characters: "
    "{known_named_rightly:.1f} % named correctly, {known_rejected:.1f} % called unknown",
    "{enrolled:,} of them of enrolled ones: {enrolled_named_rightly:.1f} % named correctly",
    "{strangers:,} pictures of unknown characters: {strangers_unknown:.1f} % called unknown, "
    "AUROC against known ones {auroc_unknown:.1f} %",
    "faces of unknown characters in groups: pair F1 {pair_f1:.1f} %, "
    "adjusted Rand index {adjusted_rand:.1f} %",
    "by CCIP's measures, at the best threshold for these faces: pair F1 {ccip_f1:.1f} %, "
    "adjusted Rand index {ccip_adjusted_rand:.1f} %",
    "calibration error of the confidence: {calibration_error:.1f} points",
    "right, of names with a confidence of 80 % or more: {right_when_sure:.1f} %",
    "no unknown characters in this set; --data OTHER, or finetune_lora.py --hold-out 4, has some",
)


def table(row):
    """recognize.json -> the lines that are printed."""
    found = row | row.get("verification", {}) | row.get("open_set", {}) | row.get("groups", {})
    lines = []
    for line in LINES if found.get("strangers") == 0 else LINES[:-1]:
        with contextlib.suppress(KeyError, TypeError):  # missing, or None
            lines.append(line.format_map(found))
    return lines


def main():
    args = parse_args()
    gallery = open_gallery(args.run, args.device, args.dtype)
    if args.task == "folds":
        return calibrate_by_folds(args, gallery["learned"])
    if args.task == "list":
        return list_known(gallery)
    if args.task == "forget":
        return print(take_out(args.run, args.forget))
    net, header, autocast = open_network(args.run, args.device, args.dtype)
    if args.threshold is not None:  # of learned characters; that of enrolled ones moves with it
        moved = args.threshold - gallery["threshold"]
        gallery["enrolled_threshold"] += moved
        gallery["platt"][1] += gallery["platt"][0] * moved  # the confidence stays
        gallery["threshold"] = args.threshold
    if args.task == "enrol":
        return enrol(args, net, header, autocast)
    work = {"verify": verify, "sort": sort, "group": sort, "name": recognise}[args.task]
    work(args, net, header, gallery, autocast)


if __name__ == "__main__":
    cli(main)
