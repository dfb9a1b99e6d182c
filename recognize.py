"""Stage 5: who is in a picture? It names characters, calls others unknown, and enrols new ones.

    python recognize.py runs/NAME IMAGE...                 files, folders, archives; - reads a list
    python recognize.py runs/NAME IMAGE --tags runs/TAGS   with the tags that a run of tags.py finds
    python recognize.py runs/NAME PAGE --detect runs/DET   each face that a run of detect.py finds
    python recognize.py runs/NAME --enrol WHO IMAGE...     three to five pictures, no training
    python recognize.py runs/NAME --list                   who is known; --forget WHO removes one
    python recognize.py runs/NAME --verify                 measures verification and unknown faces

Reads:  runs/NAME/ head.safetensors and what finetune_lora.py wrote beside it
Writes: runs/NAME/ gallery.safetensors (built where it is missing; --enrol and --forget change it),
        recognize.json and roc.png (--verify; other data or splits: in runs/NAME/DATA-SPLIT/)

The head names the characters that it learned. The gallery holds the embeddings of known faces. A
face that is similar to none of them is unknown. Each embedding is the mean over a picture and its
mirror image.

    n faces   m held-out pictures   B batch   D width of an embedding   C characters
"""

import itertools
import json
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import tags
from common import fields, metrics
from common.classifier import pooled_of, predict, read_head
from common.command import Parser, at_least, between, claim, cli, command, drawing, refuse_idle
from common.features import open_rows, results_folder
from common.io import UserError, lock_beside, locked, read_safetensors, save_json, save_safetensors
from common.train import autocast_of, commit, machine, pick_device, pick_dtype
from finetune_lora import load_classifier
from ingest import sources
from ingest.pictures import pictures, tell_problems, whole_pictures

GALLERY = "gallery.safetensors"
FACES = 500  # training pictures of a character in a gallery, at most
NEAREST = 3  # faces of a character that a picture is compared with
WHITENED = 20  # faces of a character that the whitening is fitted to
SHRINK = 0.3  # share of the mean variance that is added to the covariance
MOST_REJECTED = 0.09  # of known faces on dev: on new ones about a tenth
OTHERS = 0.05  # share of other faces that may pass for one enrolled character
FOLDS = 5  # of the characters, where known ones stand in for unknown ones
LEAST, SHOTS = 3, 5  # pictures that an enrolment needs, and that its threshold is fitted to
# New faces lie this much further from a mean of few faces than from one of many (results/LOG.md).
HANDICAP = 0.1
SAME = 0.9999  # cosine of two embeddings of one picture, perhaps in another format
PAIRS_OF = 4000  # images of which --verify compares all pairs, at most
FALSE_RATES = 0.001, 0.01, 0.1  # of false positives and false alarms that --verify reports
FLAGS = {  # that each task reads
    "name": "threshold json nearest tags detect device dtype",
    "enrol": "enrol device dtype",
    "forget": "forget",
    "list": "list json",
    "verify": "verify data split threshold json device dtype",
}


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", metavar="runs/NAME", help="what finetune_lora.py wrote")
    add("images", nargs="*", metavar="IMAGE", help="file, folder, zip, tar; - for a list of files")
    add("--threshold", type=between(-1, 1), metavar="COSINE", help="a face below it is unknown")
    add("--json", action="store_true", help="print a JSON object a picture (--verify, --list: one)")
    add("--nearest", type=at_least(0), default=3, metavar="N", help="gallery faces in each answer")
    add("--tags", metavar="RUN", help="runs/NAME of tags.py: say what else each picture shows")
    add("--detect", metavar="RUN", help="runs/NAME of detect.py: name each face, left to right")
    add("--enrol", metavar="WHO", help="add a character, or pictures of an enrolled one")
    add("--forget", metavar="WHO", help="take an enrolled character out of the gallery")
    add("--list", action="store_true", help="say who is known, and by how many pictures")
    add("--verify", action="store_true", help="measure verification and unknown faces")
    add("--data", metavar="DIR", help="of --verify (default: what it was trained on)")
    add("--split", default="val", choices=["val", "dev", "test", "train"], help="of --verify")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    return parser.parse_intermixed_args()  # pictures may stand before and after flags


def task_of(args):
    """-> the task: "name", or one of its flags. Flags that the task does not read are refused."""
    task = next((name for name in FLAGS if name in args.given), "name")
    takes_pictures = task in ("name", "enrol")
    if takes_pictures and not args.images:
        raise UserError("give pictures: files, folders, archives; or -, a list on standard input")
    if args.images and not takes_pictures:
        raise UserError(f"--{task} takes no pictures, such as {args.images[0]}")
    refuse_idle(args.given - set(FLAGS[task].split()), f"when the task is to {task}")
    return task


# ---- similarity ----------------------------------------------------------------------------------


def evenly_of_each(labels, most):
    """labels (n,) -> a list of rows for each label: at most so many, evenly spaced."""
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return [some[data.evenly_spaced(len(some), most)] for some in rows]


def centroids(embeddings, labels):
    """embeddings (n, D), labels (n,) of 0 .. C-1 -> unit vectors (C, D): the mean directions."""
    unit = F.normalize(embeddings.float())
    sums = unit.new_zeros(int(labels.max()) + 1, unit.shape[1]).index_add_(0, labels, unit)
    return F.normalize(sums)


def whitening(embeddings, labels):
    """embeddings (n, D) of labels (n,) -> mean (D,), matrix (D, D).

    (x - mean) @ matrix varies alike in all directions within a class. So directions in which the
    faces of one character differ count less. Within-class covariance normalisation (Hatch et al.
    2006): matrix matrix^T is the inverse of the covariance within classes.
    """
    groups = [embeddings[rows] for rows in evenly_of_each(labels, WHITENED)]
    means = torch.stack([group.mean(0) for group in groups]).double()
    pairs = zip(groups, means, strict=True)
    differences = torch.cat([group.double() - mean for group, mean in pairs])
    W = differences.T @ differences / max(1, len(differences) - len(groups))
    W += (SHRINK * W.diagonal().mean() + 1e-9) * torch.eye(len(W), dtype=W.dtype)
    return means.mean(0).float(), torch.linalg.cholesky(torch.linalg.inv(W)).float()


def make_gallery(embeddings, labels, learned):
    """Faces (n, D), labels (n,) of which the first `learned` are the head's -> a dict.

    faces: the unit vectors of each learned character that has any. means: the mean direction of every character.
    """
    mean, matrix = whitening(embeddings[labels < learned], labels[labels < learned])
    gallery = {"mean": mean, "matrix": matrix, "labels": labels, "learned": learned}
    unit = compared(embeddings, gallery)
    faces = [unit[labels == c] for c in labels.unique() if c < learned]
    return gallery | {"unit": unit, "faces": faces, "means": centroids(unit, labels)}


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


def decide(logits, embeddings, gallery):
    """Who is it? -> (n,) who, similarity, margin over its threshold (below 0: unknown), confidence.

    The head names the characters that it learned. An enrolled one has no logit: it wins where the
    mean of its faces is nearer, HANDICAP given, than that of every learned one.
    confidence: the probability that the name is right where half of all pictures show unknown
    characters; nan of an enrolled one.
    """
    unit, learned = compared(embeddings, gallery), gallery["learned"]
    who, similarity = logits.argmax(1), best_similarity(unit, gallery)
    margin, (a, b) = similarity - gallery["threshold"], gallery["platt"]
    sure = (logits / gallery["temperature"]).softmax(1).amax(1) * (a * margin + b).sigmoid()
    to_mean = unit @ gallery["means"].T  # (n, characters)
    if to_mean.shape[1] == learned:
        return who, similarity, margin, sure
    near, enrolled = to_mean[:, learned:].max(1)
    new = near + HANDICAP > to_mean[:, :learned].amax(1)
    return (
        torch.where(new, enrolled + learned, who),
        torch.where(new, near, similarity),
        torch.where(new, near - gallery["enrolled_threshold"], margin),
        sure.masked_fill(new, math.nan),
    )


# ---- calibration: when is it unknown, and how sure is an answer? ---------------------------------


def calibrate(embeddings, labels, held_out, unknown=None):
    """-> a dict of plain values for the gallery's header.

    embeddings (n, D), labels (n,): the gallery. held_out: logits (m, C), embeddings (m, D) and
    labels (m,) of known characters. unknown (k, D): embeddings of unknown ones. Without them each
    known character stands in for one.

    threshold           as large a share of unknown faces reaches it as of known faces fails to; but
                        at most MOST_REJECTED of the known fail
    enrolled_threshold  for a character of SHOTS pictures
    temperature         of the head's logits (Guo et al. 2017, arXiv:1706.04599)
    platt               a, b of sigmoid(a * (similarity - threshold) + b), the probability that a
                        face is known where half of all are unknown (Platt 1999)
    """
    logits, known, known_labels = held_out
    gallery = make_gallery(embeddings, labels, int(labels.max()) + 1)
    score = best_similarity(compared(known, gallery), gallery)
    if unknown is None:
        other = as_unknown(embeddings, labels, known, known_labels)
        by = "known faces held apart for choices, their characters left out of the gallery in turn"
    else:
        other = best_similarity(compared(unknown, gallery), gallery)
        by = "characters left out of training, held apart for choices"
    most = min(int(MOST_REJECTED * len(score)), len(score) - 1)
    threshold = min(balance(score, other), score.sort().values[most].item())
    return {
        "threshold": threshold,
        "enrolled_threshold": enrolled_threshold(gallery, known, known_labels),
        "by": by,
        "false_accept": (other >= threshold).float().mean().item(),
        "false_reject": (score < threshold).float().mean().item(),
        "temperature": fit_temperature(logits, known_labels),
        "platt": fit_platt(score - threshold, other - threshold),
    }


def as_unknown(embeddings, labels, known, known_labels):
    """The best similarities (m,) of known faces as unknown ones, by cross-validation.

    A fifth of the characters at a time is left out of gallery and whitening.
    """
    C = int(labels.max()) + 1
    folds = min(FOLDS, C)
    found = torch.empty(len(known))
    for fold in range(folds):
        stay, asked = labels % folds != fold, known_labels % folds == fold
        gallery = make_gallery(embeddings[stay], labels[stay], C)
        found[asked] = best_similarity(compared(known[asked], gallery), gallery)
    return found


def enrolled_threshold(gallery, known, known_labels):
    """The similarity to the mean of SHOTS faces of a character that OTHERS of other faces reach."""
    unit, others = compared(known, gallery), []
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
    """The T of a fine grid whose softmax(logits / T) gives the labels the highest likelihood."""
    grid = torch.logspace(-2.5, 1.5, 161)
    losses = torch.stack([F.cross_entropy(logits / T, labels) for T in grid])
    return grid[losses.argmin()].item()


def fit_platt(known, unknown):
    """Margins of known (n,) and unknown (m,) -> [a, b] of a logistic regression with equal classes."""
    from sklearn.linear_model import LogisticRegression

    x, y = torch.cat([known, unknown])[:, None].numpy(), [1] * len(known) + [0] * len(unknown)
    fit = LogisticRegression(C=1e3, class_weight="balanced").fit(x, y)
    return [float(fit.coef_[0, 0]), float(fit.intercept_[0])]


# ---- gallery.safetensors -------------------------------------------------------------------------

HEADER = {
    "names": fields.NAMES,  # of the classes 0, 1, ...
    "keys": fields.list_of(fields.TEXT, 1),  # of the faces
    "learned": fields.whole(1),  # so many classes, the first ones, are the head's
    "threshold": fields.number(),  # this and what follows: of `calibrate`
    "enrolled_threshold": fields.number(),
    "false_accept": fields.number(),
    "false_reject": fields.number(),
    "by": fields.TEXT,
    "temperature": fields.number(1e-6),
    "platt": fields.list_of(fields.number(), 2, 2),
}
REMEDY = "remove it, and recognize.py builds it anew"


def open_gallery(run, device="auto", dtype="auto"):
    """What `load_gallery` returns; where the run has no gallery, it is built first."""
    path = Path(run) / GALLERY
    if not path.exists():
        read_head(run)  # a UserError where there is no run
        with gallery_lock(run):
            if not path.exists():  # another process may have built it
                build_gallery(run, device, dtype)
    return load_gallery(run)


def gallery_lock(run):
    """with gallery_lock(run): nobody else builds or changes its gallery; others wait."""
    return locked(lock_beside(Path(run) / GALLERY), wait=True)


def build_gallery(run, device, dtype):
    """Write the embeddings of training pictures, and what is calibrated on held-out ones."""
    path = Path(run) / GALLERY
    net, header = load_classifier(run)
    folder = header["data"]
    if not Path(folder).exists():
        raise UserError(f"{path} is built of {folder}, which is not there; put that data set back")
    held = header.get("split", "val")
    (train, dev, _), classes = open_rows(folder, held, header.get("hold_out", 0))
    if classes != header["classes"]:
        raise UserError(f"{folder} has other characters than {run} learned; put the old set back")
    device = pick_device(device)
    autocast = autocast_of(device, pick_dtype(dtype, device)[0])
    net.to(device)

    def faces(images, rows):
        pooled = pooled_of(net, images.split, rows, autocast, "gallery", mirrored=True)
        return predict(net, pooled)  # logits, embeddings

    known = [train.rows[some] for some in evenly_of_each(train.labels[train.rows], FACES)]
    known = torch.cat(known)
    embeddings, labels = faces(train, known)[1], train.labels[known]
    held_out = *faces(dev, dev.rows), dev.labels[dev.rows]
    left_out = (dev.labels < 0).nonzero()[:, 0]  # by --hold-out: they stand for unknown characters
    unknown = faces(dev, left_out)[1] if len(left_out) else None
    about = calibrate(embeddings, labels, held_out, unknown)
    keys = [train.split["header"]["keys"][i] for i in known.tolist()]
    about |= {"names": classes, "keys": keys, "learned": len(classes)}
    save_gallery(path, embeddings, labels, about)
    print(f"wrote {path}: {len(keys)} faces of {len(classes)} characters", file=sys.stderr)


def save_gallery(path, embeddings, labels, about):
    """embeddings (n, D), labels (n,); about: the fields of HEADER."""
    tensors = {"embeddings": embeddings.float(), "labels": labels}
    save_safetensors(tensors, path, {name: about[name] for name in HEADER})


def load_gallery(run):
    """-> a dict: embeddings (n, D), labels (n,), the header, and what `make_gallery` returns."""
    path = Path(run) / GALLERY
    tensors, header = read_safetensors(path, REMEDY)
    fields.check_fields(header, HEADER, path, REMEDY)
    (_, head), learned = read_head(run), header["learned"]
    sizes = {"n": len(header["keys"]), "D": head["config"]["dim"]}
    arrays = {"embeddings": "float n D", "labels": "int64 n"}
    fields.check_arrays(tensors, arrays, path, REMEDY, **sizes)
    labels = tensors["labels"]
    fields.check_range(labels, 0, len(header["names"]), "labels", path, REMEDY)
    fields.check_finite(tensors, path)
    found = {"names": header["names"][:learned], "characters_with_a_face": len(labels.unique())}
    wanted = {"names": head["classes"], "characters_with_a_face": len(header["names"])}
    table = {name: fields.one_of(value) for name, value in wanted.items()}
    fields.check_fields(found, table, path, REMEDY)
    tensors["embeddings"] = tensors["embeddings"].float()
    return tensors | header | make_gallery(tensors["embeddings"], labels, learned)


# ---- naming --------------------------------------------------------------------------------------


def predictions(args, net, header, autocast, problems, blank=None):
    """Yield (keys, u8 images (B, ., ., 3), logits (B, C), embeddings (B, D)) of the pictures.

    problems, blank: lists that get what can't be read, and the pages on which --detect finds no face.
    """
    size = header["packed_size"]
    items = pictures(args.images, size, header["crop"], header["margin"], problems)
    if args.detect:
        items = faces(args, size, problems, blank)
    while some := list(itertools.islice(items, data.CHUNK)):
        keys, images = zip(*some, strict=True)
        images = np.stack(images)
        yield list(keys), torch.from_numpy(images), *embed(net, images, autocast)


def faces(args, size, problems, blank):
    """Yield (picture and box, u8 (size, size, 3)) of every face that --detect finds."""
    import detect

    net, about = detect.load(args.detect)
    net.to(pick_device(args.device))
    for key, picture in whole_pictures(args.images, problems):
        boxes, _ = detect.faces_of(net, picture, about["page"], about["threshold"])
        if not len(boxes):
            blank.append(key)
            print(f"{fields.shown(key)}: no face was found", file=sys.stderr)
        for box in boxes.tolist():
            where = ",".join(str(round(x)) for x in box)
            yield f"{key}[{where}]", detect.cut_out(picture, box, detect.MARGIN, size)


def embed(net, images, autocast):
    """NumPy squares u8 (B, ., ., 3) -> logits (B, C), embeddings (B, D)."""
    rows = torch.arange(len(images))
    return predict(net, pooled_of(net, {"images": images}, rows, autocast, mirrored=True))


def answers(keys, logits, embeddings, gallery, nearest):
    """-> a dict for each picture: who it is, how sure that is, and the nearest gallery faces."""
    decisions = zip(*decide(logits, embeddings, gallery), strict=True)
    to_face = compared(embeddings, gallery) @ gallery["unit"].T  # (B, faces)
    rows = []
    for key, cosines, (who, similarity, margin, sure) in zip(keys, to_face, decisions, strict=True):
        name, known = gallery["names"][who], bool(margin >= 0)
        near = []
        for j in cosines.topk(min(nearest, len(cosines)))[1]:
            face = {"name": gallery["names"][gallery["labels"][j]], "picture": gallery["keys"][j]}
            near.append(face | {"similarity": round(cosines[j].item(), 4)})
        row = {
            "picture": key,
            "name": name if known else None,
            "known": known,
            "confidence": None if sure.isnan() else round(sure.item(), 4),
            "similarity": round(similarity.item(), 4),
            "threshold": round((similarity - margin).item(), 4),
            "best_guess": name,
            "nearest": near,
        }
        rows.append(row)
    return rows


def in_words(row):
    """One of `answers` -> the line that is printed."""
    sure = "enrolled" if row["confidence"] is None else f"confidence {row['confidence']:.0%}"
    like = f"similarity {row['similarity']:.2f}"
    who = f"{row['name']}, {sure}, {like}"
    if not row["known"]:
        who = f"unknown (most like {row['best_guess']}, {like} under {row['threshold']:.2f})"
    near = [f"{fields.shown(face['picture'])} {face['similarity']:.2f}" for face in row["nearest"]]
    words = tags.in_words(row.get("tags", {}))
    parts = [f"{fields.shown(row['picture'])}: {who}"]
    parts += [f"nearest: {', '.join(near)}"] if near else []
    parts += [f"tags: {words}"] if words else []
    return "; ".join(parts)


def tagger(run, recogniser, device, autocast):
    """runs/NAME of tags.py -> a function from images u8 (B, ., ., 3) to {"tags": ...} of each.

    recogniser: the header of the recogniser; both get the same pictures.
    """
    net, header = tags.load_tagger(run)
    if any(header[key] != recogniser[key] for key in ("packed_size", "crop", "margin")):
        raise UserError(f"--tags {run} learned from pictures of another cut; train both on one set")
    if net.arm not in tags.NAMES_TAGS:
        raise UserError(f"--tags {run} is of --arm {net.arm}, which names no tags; give --arm mfdn")
    net.to(device)

    def tags_of(images):
        boxes = data.full_boxes(len(images))
        view = data.view_images(images.to(device), *boxes, header["image_size"])
        with autocast():
            _, found = tags.answers(net, view)
        return [{"tags": tags.named(row.cpu(), header)} for row in found]

    return tags_of


def recognise(args, net, header, gallery, autocast):
    """Print who is in each picture; those that can't be read are named on stderr."""
    problems, blank, count, unknown = [], [], 0, 0
    device = net.encoder.cls_token.device
    tags_of = tagger(args.tags, header, device, autocast) if args.tags else None
    found = predictions(args, net, header, autocast, problems, blank)
    for keys, images, logits, embeddings in found:
        rows = answers(keys, logits, embeddings, gallery, args.nearest)
        tagged = tags_of(images) if tags_of else [{}] * len(rows)
        for row, more in zip(rows, tagged, strict=True):
            row |= more
            print(json.dumps(row, ensure_ascii=False) if args.json else in_words(row), flush=True)
            unknown += not row["known"]
        count += len(keys)
    tell_problems(problems, count + len(blank), args.json)
    if unknown and not args.json:
        fix = f"{shlex.quote(args.run)} --enrol WHO PICTURES makes somebody new known"
        print(f"next: python recognize.py {fix}", file=sys.stderr)


# ---- enrolment -----------------------------------------------------------------------------------


def is_new(embeddings, known):
    """embeddings (n, D) -> (n,): is the picture neither among known (m, D) nor in an earlier row?"""
    unit, known = F.normalize(embeddings), F.normalize(known)
    is_known = (unit @ known.T > SAME).any(1)
    is_repeated = (torch.tril(unit @ unit.T, -1) > SAME).any(1)
    return ~(is_known | is_repeated)


def enrol(args, net, header, autocast):
    """Add these pictures to the gallery, under one name."""
    who = sources.nfc(args.enrol.strip())
    if not fields.is_name(who):
        fix = f"give 1 to {fields.LETTERS} printable letters"
        raise UserError(f"--enrol {fields.short(who)} is no name; {fix}")
    if who in header["classes"]:
        raise UserError(f"{who} was learned in training and is known already; enrol another name")
    problems, keys, embeddings = [], [], []
    for some, _, _, more in predictions(args, net, header, autocast, problems):
        keys += some
        embeddings.append(more)
    if problems:
        raise UserError(f"{problems[0][1]}; nobody was enrolled")
    print(add_faces(args.run, who, keys, torch.cat(embeddings)))
    next_words = f"{shlex.quote(args.run)} PICTURE, or --forget {shlex.quote(who)}"
    print(f"next: python recognize.py {next_words}")


def add_faces(run, who, keys, embeddings):
    """Add embeddings (n, D) of pictures `keys` to the run's gallery -> a line that says so."""
    with gallery_lock(run):
        gallery = load_gallery(run)
        names = gallery["names"] if who in gallery["names"] else [*gallery["names"], who]
        label = names.index(who)
        old = gallery["labels"] == label
        new = is_new(embeddings, gallery["embeddings"][old])
        added, total = int(new.sum()), int(new.sum() + old.sum())
        if added < len(new):
            print(f"{len(new) - added} of {len(new)} pictures are there already, and count once")
        if total < LEAST:
            raise UserError(f"{added} different pictures of {who} are too few; give {LEAST} to 5")
        labels = torch.cat([gallery["labels"], torch.full((added,), label)])
        new_keys = [key for key, is_added in zip(keys, new, strict=True) if is_added]
        about = gallery | {"names": names, "keys": gallery["keys"] + new_keys}
        together = torch.cat([gallery["embeddings"], embeddings[new]])
        save_gallery(Path(run) / GALLERY, together, labels, about)
    return f"{who} is enrolled with {total} pictures; the gallery knows {len(names)} characters"


def take_out(run, who):
    """Remove an enrolled character from the run's gallery -> a line that says so."""
    who = sources.nfc(who.strip())
    with gallery_lock(run):
        gallery = load_gallery(run)
        if who not in gallery["names"]:
            raise UserError(f"{who} is not enrolled; --list says who is")
        label = gallery["names"].index(who)
        if label < gallery["learned"]:
            raise UserError(f"{who} was learned in training; only enrolled ones can be forgotten")
        stay = gallery["labels"] != label
        labels = gallery["labels"][stay]
        labels = labels - (labels > label).long()
        keys = [key for key, stays in zip(gallery["keys"], stay, strict=True) if stays]
        names = [name for name in gallery["names"] if name != who]
        about = gallery | {"names": names, "keys": keys}
        save_gallery(Path(run) / GALLERY, gallery["embeddings"][stay], labels, about)
    lost = len(stay) - len(keys)
    return f"{who} is forgotten, with {lost} pictures; the gallery knows {len(names)} characters"


def list_known(args, gallery):
    """Print who is known, a line each."""
    counts = torch.bincount(gallery["labels"]).tolist()
    rows = []
    for name, n in zip(gallery["names"], counts, strict=True):
        rows.append({"name": name, "pictures": n, "learned": len(rows) < gallery["learned"]})
    if args.json:
        return print(json.dumps(rows, ensure_ascii=False))
    for row in rows:
        how = "learned in training" if row["learned"] else "enrolled"
        print(f"{row['name']}: {how}, {row['pictures']} pictures")


# ---- measured: the same character or not, and unknown characters ---------------------------------


def faces_of(net, gallery, folder, name, autocast):
    """Pictures of a packed split -> a namespace: what they show, and what `decide` makes of them.

    true (n,): the gallery's number of each picture's character, -1 of an unknown one.
    """
    split = data.open_split(folder, name)
    rows = data.evenly_spaced(len(split["images"]), PAIRS_OF)
    pooled = pooled_of(net, split, rows, autocast, f"faces of {folder}", mirrored=True)
    logits, embeddings = predict(net, pooled)
    ids = {who: i for i, who in enumerate(gallery["names"])}
    known = [ids.get(who, -1) for who in split["header"]["classes"]]
    true = torch.tensor([*known, -1])[split["labels"][rows]]  # the last: without a label
    who, _, margin, sure = decide(logits, embeddings, gallery)
    labels, groups = split["labels"][rows], data.groups_of(split)[rows]
    pairs = metrics.pair_cosines(compared(embeddings, gallery), labels, groups)
    if not data.has_labels(split):
        pairs = torch.empty(0), torch.empty(0)
    return SimpleNamespace(pairs=pairs, true=true, right=who == true, margin=margin, sure=sure)


def percent(shares):
    return {k: round(100 * float(share), 3) for k, share in shares.items()}


def verification(same, other):
    """Cosines of pairs of one character (n,) and of two (m,): can they be told apart? In percent."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    shares = {f"tpr_at_fpr_{100 * r:g}": tpr_at_fpr(same, other, r) for r in FALSE_RATES}
    pairs = metrics.truth_and_scores(same, other)
    shares |= {
        "roc_auc": roc_auc_score(*pairs),
        "eer": metrics.equal_error_rate(same, other),
        "average_precision": average_precision_score(*pairs),
    }
    return percent(shares) | {"positive_pairs": len(same), "negative_pairs": len(other)}


def open_set(known, right, enrolled, unknown):
    """Who is unknown? In percent, of margins over the threshold.

    known (n,), unknown (m,): margins of pictures of known and of unknown characters. right (n,): is
    the name true? enrolled (n,): is it a character that was never trained on?
    """
    from sklearn.metrics import roc_auc_score

    counts = {"known": len(known), "strangers": len(unknown), "enrolled": int(enrolled.sum())}
    named = right & (known >= 0)
    shares = {
        "known_rejected": (known < 0).double().mean(),
        "known_named_rightly": named.double().mean(),
    }
    if enrolled.any() and not enrolled.all():
        shares["enrolled_named_rightly"] = named[enrolled].double().mean()
        shares["learned_named_rightly"] = named[~enrolled].double().mean()
    if len(unknown):
        for rate in FALSE_RATES:
            found = detection_rate(known, right, unknown, rate)
            shares[f"dir_at_far_{100 * rate:g}"] = found
        at_5 = known.quantile(0.05)  # the threshold that 5 % of the known fail
        shares["auroc_unknown"] = roc_auc_score(*metrics.truth_and_scores(known, unknown))
        shares["strangers_unknown"] = (unknown < 0).double().mean()
        shares["strangers_unknown_at_5"] = (unknown < at_5).double().mean()
    return percent(shares) | counts


def reliability(known, right, unknown):
    """The calibration error of confidences in percent, where half of all pictures are unknown.

    known (n,), right (n,), unknown (m,). An enrolled name has no confidence (nan) and is left out.
    """
    sure = torch.cat([known, unknown])
    right = torch.cat([right, torch.zeros(len(unknown), dtype=torch.bool)])
    weights = torch.cat([torch.full((len(x),), 1 / len(x)) for x in (known, unknown)])
    there = ~sure.isnan()
    error = calibration_error(sure[there], right[there], weights[there])
    return round(100 * error, 3)


def table(row):
    """recognize.json -> the lines that are printed."""
    lines = [f"{row['data']}, {row['split']}"]
    pairs, found = row.get("verification"), row.get("open_set", {"strangers": 0})
    rates = [f"{100 * rate:g}" for rate in FALSE_RATES]
    at = " / ".join(rates)
    if pairs:
        accepted = " / ".join(f"{pairs[f'tpr_at_fpr_{rate}']:.1f}" for rate in rates)
        lines += [
            "the same character or not",
            f"  ROC-AUC {pairs['roc_auc']:.1f} %, equal error rate {pairs['eer']:.1f} %, "
            f"average precision {pairs['average_precision']:.1f} %",
            f"  right pairs accepted {accepted} % where {at} % of the wrong ones are "
            f"({pairs['positive_pairs']:,} and {pairs['negative_pairs']:,} pairs)",
        ]
    if "known" in found:
        right, rejected = found["known_named_rightly"], found["known_rejected"]
        lines.append(f"{found['known']:,} pictures of known characters")
        lines.append(f"  {right:.1f} % named rightly, {rejected:.1f} % called unknown")
    if "enrolled_named_rightly" in found:
        enrolled, learned = found["enrolled_named_rightly"], found["learned_named_rightly"]
        those = f"{enrolled:.1f} % of the {found['enrolled']:,} of enrolled ones"
        lines.append(f"  named rightly: {those}, {learned:.1f} % of the others")
    if "calibration_error" in row:
        error = f"{row['calibration_error']:.1f} points off in the mean"
        lines.append(f"confidences are {error}, where half are strangers")
    if not found["strangers"]:
        return lines + [
            "no strangers in this set: --data OTHER with other characters measures them; "
            "finetune_lora.py --hold-out 4 leaves four out of training"
        ]
    named = " / ".join(f"{found[f'dir_at_far_{rate}']:.1f}" for rate in rates)
    return lines + [
        f"{found['strangers']:,} pictures of strangers",
        f"  {found['strangers_unknown']:.1f} % called unknown"
        f" ({found['strangers_unknown_at_5']:.1f} % where 5 % of the known were)",
        f"  {named} % of the known named rightly where {at} % of the strangers get a name; known "
        f"against strangers: ROC-AUC {found['auroc_unknown']:.1f} %",
    ]


def verify(args, net, header, gallery, autocast):
    """recognize.json and roc.png: do two faces show one character, and who is unknown?

    Where all pictures show unknown characters, the known ones are those of its own data.
    """
    folder = Path(data.open_or_pack(args.data or header["data"]))
    home = results_folder(args.run, folder, args.split, header["data"])
    claim([home / "recognize.json"], fix="choose another --data or --split")
    row = {"run": str(args.run), "data": str(folder), "split": args.split}
    row["threshold"] = gallery["threshold"]
    found = faces_of(net, gallery, folder, args.split, autocast)
    pairs = found.pairs if min(map(len, found.pairs)) else None
    if pairs:
        row["verification"] = verification(*pairs)
    unknown, unsure = found.margin[found.true < 0], found.sure[found.true < 0]
    if (found.true < 0).all() and Path(header["data"]).exists():
        found = faces_of(net, gallery, header["data"], "val", autocast)
        row["known_of"] = header["data"]
    known = found.true >= 0
    margins, enrolled = found.margin[known], found.true[known] >= gallery["learned"]
    if known.any():
        row["open_set"] = open_set(margins, found.right[known], enrolled, unknown)
    learned = known & (found.true < gallery["learned"])
    if learned.any() and len(unknown):
        row["calibration_error"] = reliability(found.sure[learned], found.right[learned], unsure)
    if not pairs and not known.any():
        raise UserError(f"{folder} has no two labelled characters in {args.split} to measure")
    row |= {"command": command(), "commit": commit()}
    row["machine"] = machine(net.encoder.cls_token.device)
    save_json(row, home / "recognize.json")
    margins = (margins, unknown) if len(margins) and len(unknown) else None
    with drawing("roc.png"):
        title = f"{Path(args.run).name} on {folder.name}"
        plot_verification(home / "roc.png", pairs, margins, title)
    print(json.dumps(row, ensure_ascii=False) if args.json else "\n".join(table(row)))
    print(f"wrote {home}/recognize.json, roc.png", file=sys.stderr)


# ---- rates, and the picture of --verify ----------------------------------------------------------


def tpr_at_fpr(positive, negative, most):
    """The largest true positive rate at a false positive rate of at most `most`."""
    from sklearn.metrics import roc_curve

    pairs = metrics.truth_and_scores(positive, negative)
    false, true, _ = roc_curve(*pairs, drop_intermediate=False)
    return true[false <= most].max()


def detection_rate(known, right, unknown, far):
    """Detection and identification rate at a false alarm rate of at most far.

    known (n,) scores of known faces, right (n,) whether the best name is theirs, unknown (m,)
    scores of unknown characters (Phillips et al. 2011, chapter 21).
    """
    allowed = int(far * len(unknown) + 1e-9)  # unknown faces that may get a name
    threshold = float("-inf")
    if allowed < len(unknown):
        threshold = unknown.sort(descending=True).values[allowed]
    return ((known > threshold) & right).double().mean().item()


def calibration_error(sure, right, weights, bins=10):
    """Expected calibration error, in [0, 1], of confidences in equal bins: (n,) each.

    The mean distance of the confidence and the share of right names (Guo et al. 2017,
    arXiv:1706.04599, equation 3).
    """
    place = (sure * bins).long().clamp(0, bins - 1)
    weights = (weights / weights.sum()).double()
    error = 0
    for b in range(bins):
        w = weights * (place == b)
        total = w.sum().item()
        if total > 0:
            confidence, accuracy = (w * sure).sum().item() / total, (w * right).sum().item() / total
            error += total * abs(confidence - accuracy)
    return error


def plot_verification(path, pairs, faces, title):
    """ROC and precision-recall curves, and histograms of scores; a kind that is None is left out.

    pairs: cosines of one character and of two; faces: margins of known and of unknown characters.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    from common import plots  # matplotlib takes half a second to load

    kinds = []
    if pairs:
        labels = ("same", "different")
        kinds.append(("two faces: same character?", plots.BLUE, pairs, labels, "similarity"))
    if faces:
        labels = ("known", "unknown")
        kinds.append(("one face: is it known?", plots.ORANGE, faces, labels, "margin"))
    n = 2 + len(kinds)
    with plots.panels(path, title, 1, n, (3.5 * n, 3.5)) as axes:
        for axis, (name, colour, scores, labels, what) in zip(axes[2:], kinds, strict=True):
            truth_and_scores = metrics.truth_and_scores(*scores)
            false, true, _ = roc_curve(*truth_and_scores)
            axes[0].plot(100 * false, 100 * true, color=colour, label=name)
            precision, recall, _ = precision_recall_curve(*truth_and_scores)
            axes[1].plot(100 * recall, 100 * precision, color=colour)
            bins = np.linspace(-1, 1, 61)
            for x, label, shade in zip(scores, labels, (plots.BLUE, plots.ORANGE), strict=True):
                axis.hist(x.numpy(), bins, density=True, histtype="step", color=shade, label=label)
            axis.set(title=name.split(":")[0].capitalize(), xlim=(-1, 1))
            axis.set(xlabel=what, ylabel="density")
            axis.legend(fontsize=8)
        axes[0].set(title="ROC", xlim=(0.01, 100), ylim=(0, 100), xscale="log")
        axes[0].set(xlabel="false positive rate, %", ylabel="true positive rate, %")
        axes[0].xaxis.set_major_formatter("{x:g}")  # the one of a log axis writes formulas
        axes[0].legend(fontsize=8, loc="upper left")
        axes[1].set(title="Precision and recall", xlim=(0, 100), ylim=(0, 100))
        axes[1].set(xlabel="recall, %", ylabel="precision, %")


def main():
    args = parse_args()
    task = task_of(args)
    gallery = open_gallery(args.run, args.device, args.dtype)
    if task == "list":
        return list_known(args, gallery)
    if task == "forget":
        return print(take_out(args.run, args.forget))
    net, header = load_classifier(args.run)
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.threshold is not None:  # of learned characters; that of enrolled ones moves with it
        gallery["enrolled_threshold"] += args.threshold - gallery["threshold"]
        gallery["threshold"] = args.threshold
    net, autocast = net.to(device), autocast_of(device, dtype)
    if task == "enrol":
        return enrol(args, net, header, autocast)
    work = verify if task == "verify" else recognise
    work(args, net, header, gallery, autocast)


if __name__ == "__main__":
    cli(main)
