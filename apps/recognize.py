"""Stage 5: who is in a picture? It names characters, calls others unknown, and enrols new ones.

    python -m apps.recognize runs/NAME PICTURE...               files, folders, archives; - reads a list
    python -m apps.recognize runs/NAME PAGE --detect runs/DET   each face that a run of apps/detect.py finds
    python -m apps.recognize runs/NAME --enrol WHO PICTURE...   three to five pictures, no training
    python -m apps.recognize runs/NAME --list                   who is known; --forget WHO removes one

Reads:  runs/NAME/ head.safetensors and what finetune_lora.py wrote beside it; the pictures; for a
        gallery that is missing, also the data set that the run was trained on
Writes: runs/NAME/ gallery.safetensors (built where it is missing; --enrol and --forget change it);
        answers go to standard output, a line for each picture or face

The head names the characters that it learned, but it has a name for every face, also for those of
characters that it has never seen. So each face is compared with a gallery, too: the embeddings of
known faces, each a mean over a picture and its mirror image. A face that is similar to none of them
is unknown. An enrolled character is known by its faces in the gallery alone, so nothing is trained.
A learned character takes new pictures in the same way, such as of another dress.
apps/sort.py sorts a folder by these answers, apps/learn.py learns what somebody corrected there, and
apps/unknown.py measures how good they are.

    n faces   m held-out pictures   B batch   D width of an embedding   C characters
"""

import contextlib
import itertools
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
from apps.collection import BY_FOLDS, open_all
from apps.groups import best_threshold, f1_curve
from common import door as fields
from common.classifier import pooled_of, predict
from common.door import read_json, reading
from common.features import open_subsets, place_of_learned
from common.locks import lock_beside, locked
from common.metrics import BINS, histograms
from common.train import (
    Parser,
    UserError,
    autocast_of,
    between,
    cli,
    pick_device,
    pick_dtype,
    quoted,
    read_safetensors,
    refuse_useless,
    save_safetensors,
)
from finetune_lora import load_classifier
from ingest import sources
from ingest.layouts import shows_nobody
from ingest.pictures import pictures, tell_problems, whole_pictures

GALLERY = "gallery.safetensors"
COLOURS = BINS**3  # cells of a histogram of colours
PROMISE = "folds/promise.json"  # of apps/folds.py
FACES = 500  # training pictures of a character in a gallery, at most
NEAREST = 3  # faces of a character that a picture is compared with, and faces in an answer
WHITENED = 20  # faces of a character that the whitening is fitted to
MOST_LIFT = 3  # standard deviations
LIFT = 0.1  # similarity per standard deviation of the best logit (results/TRIED.md)
SHRINK = 0.3  # share of the mean variance that is added to the covariance
MOST_REJECTED = 0.09  # share of known faces on dev called unknown; on new ones a tenth
OTHERS = 0.05  # share of other faces that may pass for one enrolled character
OF_UNKNOWN = 2000  # pictures of unknown characters that fit a threshold, at most
FOLDS = 5  # of the characters, where known ones stand in for unknown ones
LEAST, SHOTS = 3, 5  # pictures that an enrolment needs, and that its threshold is fitted to
SAME = 0.9999  # cosine of two embeddings of one picture, which differ by rounding
HANDICAP = 0.05  # so much less similar are new faces to a mean of SHOTS faces (results/TRIED.md)
ASKED = 150  # held-out pictures of each split that are asked whether an enrolment renames them
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
    add(
        "--detect", metavar="RUN", help="runs/NAME of apps/detect.py: name each face, left to right"
    )
    add(
        "--enrol", "--enroll", metavar="WHO", help="add a character, or pictures of an enrolled one"
    )
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


# ---- similarity ----------------------------------------------------------------------------------


def whitening(embeddings, labels):
    """embeddings (n, D), labels (n,) -> mean (D,), matrix (D, D).

    (x - mean) @ matrix varies alike in all directions in a class (Hatch et al. 2006, WCCN):
    matrix matrix^T is the inverse of the covariance within classes.
    """
    groups = [embeddings[rows] for rows in data.evenly_of_each(labels, WHITENED)]
    means = torch.stack([group.mean(0) for group in groups]).double()
    differences = torch.cat([group.double() - group.mean(0) for group in groups])
    W = differences.T @ differences / max(1, len(differences) - len(groups))
    W += (SHRINK * W.diagonal().mean() + 1e-9) * torch.eye(len(W), dtype=W.dtype)
    return means.mean(0).float(), torch.linalg.cholesky(torch.linalg.inv(W)).float()


def make_gallery(embeddings, labels, learned, lift=None, trained=None, colours=0.0):
    """Faces (n, D), labels (n,) of which the first `learned` are the head's -> a dict.

    trained: so many faces, the first ones, taught the head; None: all of its characters. The others
    were added later. who (G,): the characters of G groups of faces, first the learned ones as they
    were taught, then everybody whose faces were added: a learned one may be there twice. group (n,):
    of each face. sums (G, D). handicap: of each group of added faces. faces: unit vectors of each
    learned character that has any. growth: see there. lift: as `lift_of` returns it; None leaves the
    head out of similarities. colours: their weight, where the cosine of embeddings has 1. If it is
    not 0, the last columns are histograms.
    """
    trained = int((labels < learned).sum()) if trained is None else trained
    gallery = {"embeddings": embeddings, "labels": labels, "learned": learned, "trained": trained}
    gallery |= {"lift": lift, "colours": colours}
    plain = embeddings[:, :-COLOURS] if colours else embeddings
    gallery["mean"], gallery["matrix"] = whitening(plain[:trained], labels[:trained])
    unit = gallery["unit"] = compared(embeddings, gallery)
    gallery |= by_character(gallery, len(labels))
    gallery["growth"] = growth(gallery)
    added, number = labels[trained:].unique(return_inverse=True)
    group = torch.cat([labels[:trained], learned + number])
    sums = unit.new_zeros(learned + len(added), unit.shape[1]).index_add_(0, group, unit)
    gallery |= {"who": torch.cat([torch.arange(learned), added]), "group": group, "sums": sums}
    # The more faces a mean is of, the nearer are others to it. One or two faces are no mean yet.
    sizes = group.bincount(minlength=len(sums))[learned:]
    handicap = HANDICAP * SHOTS / sizes.clamp(min=SHOTS)
    return gallery | {"handicap": handicap.where(sizes >= LEAST, 0)}


def by_character(gallery, count):
    """Of the first `count` faces, those of each learned character: unit vectors, and histograms or None."""
    labels = gallery["labels"][:count]
    characters = [(labels == c).nonzero()[:, 0] for c in labels.unique() if c < gallery["learned"]]
    histograms = None
    if gallery["colours"]:
        histograms = [gallery["embeddings"][rows, -COLOURS:].float() for rows in characters]
    return {"faces": [gallery["unit"][rows] for rows in characters], "histograms": histograms}


def growth(gallery):
    """How much more similar faces are to learned characters that are not theirs, by what was added to these.

    Unknown faces are, too, so by this the threshold rises: else, the more was corrected, the fewer
    unknown pictures would be called so. The added faces are asked, which the network has not learned.
    """
    labels, trained, learned = (gallery[name] for name in ("labels", "trained", "learned"))
    corrected = labels[trained:][labels[trained:] < learned].unique()
    if not len(corrected):
        return 0.0
    asked = torch.arange(trained, len(labels))
    if len(corrected) == 1:
        # No added face gains by what was added to its own character, so faces of the others are asked.
        asked = torch.cat(data.evenly_of_each(labels[:trained], WHITENED))
        asked = asked[labels[asked] != corrected]
    faces, own = gallery["embeddings"][asked], labels[asked, None] == torch.arange(learned)
    before = gallery | by_character(gallery, trained)
    now, then = (similarities(faces, some).masked_fill(own, -1) for some in (gallery, before))
    return (now.amax(1) - then.amax(1)).mean().item()


def compared(embeddings, gallery):
    """embeddings (n, D) -> whitened unit vectors (n, D): their products are similarities."""
    embeddings = embeddings[:, : len(gallery["mean"])].float()  # without histograms
    return F.normalize((embeddings - gallery["mean"]) @ gallery["matrix"])


def best_similarity(embeddings, gallery):
    """embeddings (n, D) -> (n,): the similarity to the most similar character."""
    return similarities(embeddings, gallery).amax(1)


def similarities(embeddings, gallery):
    """embeddings (n, D) -> (n, C): the mean cosine with the three nearest faces of each character.

    With colours it is averaged with the mean cosine of histograms, by their weight.
    """
    scores = nearest_of(compared(embeddings, gallery), gallery["faces"])
    if weight := gallery["colours"]:
        # What a network has learned of few pictures tells these characters apart, but says little of
        # others. Colours tell less of each, but the same of all.
        alike = nearest_of(embeddings[:, -COLOURS:].float(), gallery["histograms"])
        scores = (scores + weight * alike) / (1 + weight)
    return scores


def nearest_of(unit, faces):
    """Unit vectors (n, D), a list of those of each character -> (n, C): mean products with the nearest."""
    cosines = [unit @ own.T for own in faces]
    nearest = [x.topk(min(NEAREST, x.shape[1]), 1).values.mean(1) for x in cosines]
    return torch.stack(nearest, 1)


def similarity_of(logits, embeddings, gallery):
    """(n, C), (n, D) -> (n,): `best_similarity`, higher where the head is surer than usual.

    LIFT for each standard deviation of the best logit of known faces. Together they separate best.
    """
    similarity = best_similarity(embeddings, gallery)
    return lifted(similarity, logits.amax(1), gallery["lift"])


def lifted(similarity, strength, lift):
    """Cosines (n,) and best logits (n,) -> (n,), at most 1; lift as of `lift_of`, or None."""
    usual, per_logit = lift or (0.0, 0.0)
    # A head can be far surer of one picture than of any that it was measured by. That is bounded, so
    # that it never names a face that looks like nobody's.
    most = MOST_LIFT * LIFT
    return (similarity + (per_logit * (strength - usual)).clamp(-most, most)).clamp(max=1)


def to_means(unit, gallery, own=None):
    """unit (n, D) -> cosines (n, G) with the mean of each group; own (n,): groups that leave the face out."""
    sums = gallery["sums"]
    cosines = unit @ F.normalize(sums).T
    if own is None:
        return cosines
    others = F.normalize(sums[own] - unit)
    return cosines.scatter(1, own[:, None], (unit * others).sum(1, keepdim=True))


def decide(logits, embeddings, gallery, own=None):
    """-> (n,) who, similarity, margin over its threshold (below 0: unknown), confidence.

    The head names the characters that it learned. Where faces were added, their character wins if
    their mean is nearer, a handicap given, than that of every learned one; own: as `to_means`. Who
    was enrolled is known by this mean, with a threshold of its own.
    confidence: P(the name is right) where half of all pictures show unknown characters;
    nan of a name that added faces gave, and not the head.
    """
    unit = compared(embeddings, gallery)
    learned = gallery["learned"]
    who = logits.argmax(1)
    similarity = similarity_of(logits, embeddings, gallery)
    margin = similarity - gallery["threshold"] - gallery["growth"]
    sure = confidence(logits, margin, gallery)
    to_mean = to_means(unit, gallery, own)  # (n, G)
    if to_mean.shape[1] == learned:
        return who, similarity, margin, sure
    to_added = to_mean[:, learned:]
    best, added = (to_added + gallery["handicap"]).max(1)
    new = best > to_mean[:, :learned].amax(1)
    near = to_added.gather(1, added[:, None])[:, 0]
    name = torch.where(new, gallery["who"][learned + added], who)
    enrolled = name >= learned
    return (
        name,
        torch.where(enrolled, near, similarity),
        torch.where(enrolled, near - gallery["enrolled_threshold"], margin),
        sure.masked_fill(name != who, torch.nan),
    )


def confidence(logits, margin, gallery):
    """Logits (n, C), margins (n,) -> (n,): P(the name is that of a known face) P(it is known)."""
    a, b = gallery["platt"]
    right_name = (logits / gallery["temperature"]).softmax(1).amax(1)
    return right_name * (a * margin + b).sigmoid()


# ---- calibration: when is it unknown, and how sure is an answer? ---------------------------------


def calibrate(embeddings, labels, held_out, unknown=None):
    """-> a dict of numbers for the gallery's header, where a run has held-out pictures.

    held_out: logits (m, C), embeddings (m, D), labels (m,) of known characters. unknown: the same of
    unknown ones, which may be few: each known one stands in for one, too.
    The file keeps the threshold: after a change of this rule, remove gallery.safetensors.
    """
    logits, known, known_labels = held_out
    gallery = make_gallery(embeddings, labels, int(labels.max()) + 1, lift_of(logits))
    known_score = similarity_of(logits, known, gallery)
    new_score = as_unknown(gallery, held_out)
    if unknown:
        new_score = torch.cat([new_score, similarity_of(*unknown[:2], gallery)])
    numbers = {"enrolled_threshold": enrolled_threshold(gallery, known, known_labels)}
    numbers["lift"] = gallery["lift"]
    curve = f1_curve(compared(known, gallery), known_labels)
    numbers["alike"] = best_threshold([curve], len(known))
    return numbers | decided(logits, known_labels, known_score, new_score)


def decided(logits, labels, known, unknown):
    """Logits (m, C), labels (m,) and similarities (m,) of known faces, those of unknown ones (k,)
    -> threshold and confidence. At most MOST_REJECTED of the known are called unknown."""
    threshold = threshold_of(known, unknown)
    numbers = {"threshold": threshold, "temperature": fit_temperature(logits, labels)}
    return numbers | {"platt": fit_platt(known - threshold, unknown - threshold)}


def lift_of(logits):
    """Logits (m, C) of known held-out faces -> the gallery's "lift", which `similarity_of` reads."""
    strength = logits.amax(1)
    usual = strength.mean().item()
    spread = strength.std(correction=0).item()
    # A head that is equally sure of all pictures can't say which of them are known. What differs in
    # the last digits is rounding, and divided by it every other logit would be the largest.
    if spread < 1e-4 * max(1.0, abs(usual)):
        return [usual, 0.0]
    return [usual, LIFT / max(spread, 0.1 * abs(usual))]


def threshold_of(known, unknown):
    """Similarities of known (m,) and unknown (k,) faces -> the one under which a face is unknown."""
    highest = known.sort().values[int(MOST_REJECTED * len(known))].item()
    return min(balance(known, unknown), highest)


def as_unknown(gallery, held_out):
    """Similarities (m,) of known faces while a fifth of the characters at a time is left out."""
    logits, known, known_labels = held_out
    labels, embeddings = gallery["labels"], gallery["embeddings"]
    similarity = torch.empty(len(known))
    for fold in range(FOLDS):
        stay = labels % FOLDS != fold
        asked = known_labels % FOLDS == fold
        less = make_gallery(embeddings[stay], labels[stay], gallery["learned"], gallery["lift"])
        others = torch.arange(logits.shape[1]) % FOLDS != fold
        heads = logits[asked][:, others]
        similarity[asked] = similarity_of(heads, known[asked], less)
    return similarity


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
    """The T for which softmax(logits / T) fits the labels best (Guo et al. 2017, arXiv:1706.04599).

    A logit of -inf is that of a character which a network did not learn.
    """
    grid = torch.logspace(-1, 1.5, 101)
    losses = []
    for T in grid:
        log_p = (logits / T).log_softmax(1)
        # Where all names are right, a T of 0 would fit best, and every name would be certain. So one
        # more picture is counted, which shows each character equally.
        nobody = -log_p[logits > -torch.inf].mean()
        losses.append(F.nll_loss(log_p, labels, reduction="sum") + nobody)
    return grid[torch.stack(losses).argmin()].item()


def fit_platt(known, unknown):
    """Margins of known (n,) and unknown (m,) -> a, b of P(known) = sigmoid(a * margin + b) (Platt 1999).

    Half of all faces count as unknown. Targets are Platt's, (n + 1) / (n + 2) and 1 / (m + 2): few
    faces that are told apart without a mistake do not make it certain.
    """
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([known, unknown])
    n, m = len(known), len(unknown)
    target = torch.cat([torch.full((n,), (n + 1) / (n + 2)), torch.full((m,), 1 / (m + 2))])
    weight = torch.cat([torch.full((n,), 1 / n), torch.full((m,), 1 / m)]) * (n + m) / 2
    twice = torch.cat([x, x])[:, None].numpy()
    y = [1] * (n + m) + [0] * (n + m)
    weights = torch.cat([weight * target, weight * (1 - target)]).numpy()
    fit = LogisticRegression(C=1e3).fit(twice, y, weights)
    return [float(fit.coef_[0, 0]), float(fit.intercept_[0])]


# ---- gallery.safetensors: the first `learned` of the names are the head's, keys are of the faces --

# trained: faces that taught the head, which come first; alike: the cosine that joins two groups of apps/sort.py
HEADER = "names", "keys", "learned", "threshold", "enrolled_threshold", "temperature", "platt"
HEADER += "lift", "colours", "alike", "trained"
REMEDY = "remove it, and apps/recognize.py builds it anew"
FOLDS_REMEDY = "python -m apps.learn datasets/NAME makes it, in a new run"
UNMEASURED = (  # of a run that learned all characters of its set
    "most new characters may get a known name; python -m apps.learn datasets/NAME leaves each character "
    "out once, and measures it"
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
    if faces.held_out:
        header |= calibrate(faces.embeddings, faces.labels, faces.held_out, faces.others)
    else:
        promise = Path(run) / PROMISE
        with reading(promise, "measure of the folds", FOLDS_REMEDY):
            header |= read_json(promise)["calibration"]
    header["trained"] = len(faces.keys)
    save_gallery(path, header | {"embeddings": faces.embeddings, "labels": faces.labels})
    count = f"{len(faces.keys)} faces of {len(faces.classes)} characters"
    print(f"wrote {path}: {count}", file=sys.stderr)
    if faces.others:
        gallery = load_gallery(run)
        below = similarity_of(*faces.others[:2], gallery) < gallery["threshold"]
        share = f"{below.float().mean():.0%} of the {len(below)} pictures of nobody"
        print(f"note: {share} are called unknown; they have decided the threshold", file=sys.stderr)
    elif faces.held_out and not faces.left_out:
        print(f"note: {UNMEASURED}", file=sys.stderr)


def open_network(run, device, dtype):
    """-> the classifier of a run on its device, the header of its head, and autocast."""
    net, header = load_classifier(run)
    device = pick_device(device)
    return net.to(device), header, autocast_of(device, pick_dtype(dtype, device)[0])


def open_recogniser(args):
    """-> the classifier of a run on its device, the header of its head, its gallery, and autocast."""
    gallery = open_gallery(args.run, args.device, args.dtype)
    net, header, autocast = open_network(args.run, args.device, args.dtype)
    if args.threshold is not None:  # of learned characters; that of enrolled ones moves with it
        moved = args.threshold - gallery["threshold"] - gallery["growth"]
        gallery["enrolled_threshold"] += moved
        gallery["platt"][1] += gallery["platt"][0] * moved  # the confidence stays
        gallery |= {"threshold": args.threshold, "growth": 0.0}
    return net, header, gallery, autocast


def outputs_of(net, split, index, autocast, name="", colours=True):
    """Whole images -> logits (n, C), embeddings (n, D), each of the mean of picture and mirror image.

    With colours, histograms are the last columns of the embeddings, (n, D + COLOURS).
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


def faces_learned(run, device, dtype):
    """The pictures that a run was trained on -> a namespace.

    embeddings (n, D), labels (n,), keys   training pictures, at most FACES of a character
    classes                                the names of the labels
    held_out                               logits (m, C), embeddings (m, D), labels (m,) of dev
    others                                 the same of pictures of nobody in the set, or None
    left_out                               what --hold-out left out, for apps/unknown.py to ask

    A run that learned every picture has no held_out: its folds have measured (apps/folds.py).
    """
    net, header, autocast = open_network(run, device, dtype)
    folder = place_of_learned(header, run)
    held = header.get("split", "val")
    hold_out = header.get("hold_out", 0)
    by_folds = held == BY_FOLDS
    if by_folds:
        train, classes = open_all(folder)
    else:
        (train, dev, _), classes = open_subsets(folder, held, hold_out)
    if classes != header["classes"]:
        raise UserError(f"{folder} has other characters than {run} learned; put the old set back")
    outputs = partial(outputs_of, net, autocast=autocast, name="gallery", colours=by_folds)
    chosen = torch.cat(data.evenly_of_each(train.labels[train.index], FACES))
    index = train.index[chosen]
    keys = [train.split["header"]["keys"][i] for i in index.tolist()]
    learned = SimpleNamespace(keys=keys, classes=classes, labels=train.labels[index])
    _, learned.embeddings = outputs(train.split, index)
    learned.held_out = learned.others = None
    learned.left_out = hold_out
    if by_folds:
        return learned
    learned.held_out = *outputs(dev.split, dev.index), dev.labels[dev.index]
    # Pictures of the characters that --hold-out left out set no threshold: they are there to be asked.
    if others := open_others(folder):
        split, index = others
        learned.others = *outputs(split, index), split["labels"][index]
    return learned


def in_file(gallery):
    """What a gallery's file holds, without what `make_gallery` computes of it."""
    return {name: gallery[name] for name in ("embeddings", "labels", *HEADER) if name in gallery}


def save_gallery(path, gallery):
    """gallery: embeddings (n, D), labels (n,), the fields of HEADER, and perhaps others."""
    header = in_file(gallery)
    tensors = {"embeddings": header.pop("embeddings").float(), "labels": header.pop("labels")}
    save_safetensors(tensors, path, header)


def load_gallery(run):
    """-> a dict: embeddings (n, D), labels (n,), the header, and what `make_gallery` returns."""
    path = Path(run) / GALLERY
    tensors, header = read_safetensors(path, REMEDY)
    learned, labels = header["learned"], tensors["labels"]
    trained = header.get("trained") or int((labels < learned).sum())  # older files do not say it
    colours = header.get("colours", 0.0)
    faces = tensors["embeddings"].float()
    gallery = make_gallery(faces, labels, learned, trained=trained, colours=colours)
    return gallery | header | {"trained": trained}


# ---- naming and enrolment ------------------------------------------------------------------------


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
            print(f"{fields.shown(key)}: no face was found", file=sys.stderr)
            if args.json:
                print(json.dumps({"picture": key, "faces": []}, ensure_ascii=False), flush=True)
        for box in boxes.tolist():
            where = ",".join(str(round(x)) for x in box)
            yield f"{key}[{where}]", detect.cut_out(picture, box, size)


def embed(net, images, autocast):
    """NumPy squares u8 (B, ., ., 3) -> logits (B, C), embeddings (B, D)."""
    return outputs_of(net, {"images": images}, torch.arange(len(images)), autocast)


def names_given(logits, embeddings, gallery, own=None):
    """-> the name of each picture, "" where it is unknown; own: see `decide`."""
    who, _, margin, _ = decide(logits, embeddings, gallery, own)
    return [gallery["names"][i] if m >= 0 else "" for i, m in zip(who, margin, strict=True)]


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
    added = row["confidence"] is None  # the head has not learned them
    sure = "by added pictures" if added else f"confidence {row['confidence']:.0%}"
    perhaps = "" if added or row["confidence"] >= 0.5 else "perhaps "
    who = f"{perhaps}{row['name']}, {sure}, {similarity}"
    if not row["known"]:
        limit = f"threshold {row['threshold']:.2f}"
        if limit.split()[1] == similarity.split()[1]:
            similarity = f"similarity {row['similarity']:.4f}"
            limit = f"threshold {row['threshold']:.4f}"
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
        words = f"{quoted(args.run)} --enrol WHO PICTURES makes somebody new known"
        if args.detect:  # which takes no part in --enrol: it wants faces, not pages
            words += ", from faces that apps.detect has cut out by --crop --out FOLDER"
        print(f"next: python -m apps.recognize {words}", file=sys.stderr)


def enrol(args, net, header, autocast):
    """Add these pictures to the gallery, under one name, and tell what that changes."""
    who = name_of(args.enrol, "--enrol")
    problems, keys, embeddings = [], [], []
    for some, _, more in predictions(args, net, header, autocast, problems):
        keys += some
        embeddings.append(more)
    if problems:
        raise UserError(f"{problems[0][1]}; nobody was enrolled")
    before = load_gallery(args.run)
    print("\n".join(add_faces(args.run, who, keys, torch.cat(embeddings))))
    after = load_gallery(args.run)
    print(renamed(*known_faces(args.run, net, header, autocast, before), before, after))
    again = f"python -m apps.recognize {quoted(args.run)}"
    print(f"next: {again} PICTURE")
    if after["keys"] != before["keys"]:
        print(f"undo: {again} {quoted(f'--forget={who}')} takes out all that was ever added of it")


def name_of(text, source):
    """What somebody wrote -> a name in one spelling."""
    who = sources.nfc(text.strip())
    if not fields.is_name(who):
        raise UserError(f"{source} {fields.short(who)} is no name; give a few printable letters")
    if shows_nobody(who):
        fix = "pictures of nobody known belong into a folder of this name when data.py packs a set"
        raise UserError(f"{source} {who} would be a character of this name; {fix}")
    return who


def add_faces(run, who, keys, embeddings):
    """Add embeddings (n, D) of pictures `keys` to the run's gallery -> lines that say so."""
    path = Path(run) / GALLERY
    with locked(lock_beside(path), wait=True):
        gallery, lines = with_named(load_gallery(run), who, keys, embeddings)
        save_gallery(path, gallery)
    return lines


def with_named(gallery, who, keys, embeddings):
    """-> the gallery with embeddings (n, D) of pictures `keys`, each once, and lines that say so.

    A picture that was added under another name leaves that one; one that was learned stays there.
    """
    lines = []
    names, labels, trained = gallery["names"], gallery["labels"], gallery["trained"]
    embeddings = embeddings[:, : gallery["embeddings"].shape[1]]  # some have no colours
    same = same_pictures(embeddings, gallery["embeddings"])  # (n, faces)
    has_name = torch.tensor([name == who for name in names])[labels]
    twins = same_pictures(embeddings, embeddings)
    new = ~(same & has_name).any(1) & ~twins.tril(-1).any(1)
    for i, face in (same & ~has_name & new[:, None]).nonzero().tolist():
        there = "was learned as" if face < trained else "was added as"
        now = "it stays there, too" if face < trained else f"it is {who} now"
        lines.append(f"note: {fields.shown(keys[i])} {there} {names[labels[face]]}; {now}")
    stay = ~(same & ~has_name).any(0)
    stay[:trained] = True
    total = int(has_name.sum() + new.sum())
    if total < LEAST:
        raise UserError(f"{total} pictures of {who} are too few; give {LEAST} or more")
    kept = [*itertools.compress(keys, new)]
    gallery = with_faces(only(gallery, stay), who, kept, embeddings[new])
    count = len(gallery["names"])
    if gallery["names"].index(who) < gallery["learned"]:
        line = f"{who}, who was learned in training, has {total} pictures, {int(new.sum())} of them new"
    else:
        line = f"{who} is enrolled with {total} pictures"
    return gallery, [*lines, f"{line}; the gallery knows {count} characters"]


def same_pictures(embeddings, others):
    """Embeddings (n, D) and (m, D) -> (n, m): are they of one picture?"""
    width = min(embeddings.shape[1], others.shape[1])  # some have no colours
    return F.normalize(embeddings[:, :width]) @ F.normalize(others[:, :width]).T > SAME


def only(gallery, stay):
    """What a gallery's file holds, with the faces that stay, (n,) bool; a name without faces leaves."""
    left, labels = gallery["labels"][stay].unique(return_inverse=True)
    names = [gallery["names"][i] for i in left]
    keys = list(itertools.compress(gallery["keys"], stay))
    changed = {"names": names, "keys": keys, "labels": labels}
    return in_file(gallery) | changed | {"embeddings": gallery["embeddings"][stay]}


def with_faces(gallery, who, keys, embeddings):
    """What a gallery's file holds, and so many faces (n, D) more of a character, new or not."""
    names = list(dict.fromkeys([*gallery["names"], who]))
    labels = F.pad(gallery["labels"], (0, len(keys)), value=names.index(who))
    changed = {"names": names, "keys": gallery["keys"] + keys, "labels": labels}
    changed["embeddings"] = torch.cat([gallery["embeddings"], embeddings])
    return in_file(gallery) | changed


@torch.no_grad()
def known_faces(run, net, header, autocast, gallery):
    """Pictures of learned characters -> logits (m, C), embeddings (m, D), groups (m,) or None, what they are.

    They are held-out ones. Where folds have learned all of them, or the data set is not there any
    more, they are those of the gallery, each of which is left out of its group's mean; but the network
    has learned these by heart.
    """
    trained = gallery["trained"]
    embeddings = gallery["embeddings"][:trained]
    own, what = gallery["group"][:trained], "pictures that were learned"
    with contextlib.suppress(UserError):
        held = header.get("split", "val")
        place = place_of_learned(header, run)
        sets, classes = open_subsets(place, held, header.get("hold_out", 0))
        if classes != header["classes"]:
            raise UserError("another set lies there")  # nobody reads it: the gallery's are asked
        parts = []
        for some in sets[1:2] if held == "dev" else sets[1:]:  # there, both are the same pictures
            index = some.index[data.evenly_spaced(len(some.index), ASKED)]
            parts.append(outputs_of(net, some.split, index, autocast)[1])
        embeddings, own, what = torch.cat(parts), None, "held-out pictures of learned characters"
    seen = embeddings[:, : len(gallery["mean"])]  # without histograms
    logits = net.head(seen.to(net.encoder.cls_token.device)).cpu()
    return logits, embeddings, own, what


def renamed(logits, embeddings, own, what, before, after):
    """What `known_faces` returns -> a line: how many of them have another name in the second gallery."""
    names = [names_given(logits, embeddings, gallery, own) for gallery in (before, after)]
    changed = Counter(pair for pair in zip(*names, strict=True) if pair[0] != pair[1])
    ways = [
        f"{n} {old or 'unknown'} -> {new or 'unknown'}" for (old, new), n in changed.most_common(3)
    ]
    line = f"{changed.total()} of {len(logits)} {what} change their name"
    if ways:
        line += f" ({', '.join(ways)})"
    return line if own is None else f"{line}; new ones of these characters do so more often"


def take_out(run, who):
    """Remove a character's added pictures from the run's gallery -> a line that says so."""
    who = sources.nfc(who.strip())
    path = Path(run) / GALLERY
    with locked(lock_beside(path), wait=True):
        gallery = load_gallery(run)
        named = torch.tensor([name == who for name in gallery["names"]])[gallery["labels"]]
        named[: gallery["trained"]] = False
        if not named.any():
            how = "was learned in training" if who in gallery["names"] else "is not enrolled"
            raise UserError(f"{who} {how}; only enrolled ones can be forgotten, see --list")
        gallery = only(gallery, ~named)
        save_gallery(path, gallery)
    if who in gallery["names"]:
        return (
            f"{who} is known from training alone; {int(named.sum())} added pictures are forgotten"
        )
    return f"{who} is forgotten; the gallery knows {len(gallery['names'])} characters"


def list_known(gallery):
    """Print who is known, a line each."""
    counts = torch.bincount(gallery["labels"]).tolist()
    for i, (name, n) in enumerate(zip(gallery["names"], counts, strict=True)):
        how = "learned in training" if i < gallery["learned"] else "enrolled"
        more = int((gallery["labels"][gallery["trained"] :] == i).sum())
        added = f", {more} of them added" if i < gallery["learned"] and more else ""
        print(f"{name}: {how}, {n} pictures{added}")


def main():
    args = parse_args()
    if args.task == "list":
        return list_known(open_gallery(args.run))
    if args.task == "forget":
        open_gallery(args.run)  # it is built where it is missing
        return print(take_out(args.run, args.forget))
    net, header, gallery, autocast = open_recogniser(args)
    if args.task == "enrol":
        return enrol(args, net, header, autocast)
    recognise(args, net, header, gallery, autocast)


if __name__ == "__main__":
    cli(main)
