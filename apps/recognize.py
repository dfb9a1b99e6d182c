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
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
from apps.collection import BY_FOLDS, open_all
from apps.groups import ALIKE, best_threshold, f1_curve
from apps.pictures import tell_problems
from common import door
from common.classifier import pooled_of, predict
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
from ingest.pictures import pictures, whole_pictures

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


@dataclass
class Gallery:
    """Known faces, and the numbers that say who a face shows and whether it is known at all.

    Without the numbers it only compares faces. A character whose faces were added has a mean of its
    own: a learned one may have two, one of what it was taught by and one of what was added.
    """

    # what gallery.safetensors holds
    embeddings: torch.Tensor  # (n, D) of faces; with colours, histograms are the last columns
    labels: torch.Tensor  # (n,), places in `names`
    learned: int  # characters that the head names; their names are the first ones
    trained: int = (
        None  # faces that taught the head, the first ones; None: all of learned characters
    )
    names: list = None
    keys: list = None  # of the faces
    threshold: float = None  # the similarity under which a face is unknown
    enrolled_threshold: float = None  # that of characters whom the head has not learned
    temperature: float = None  # of the logits
    platt: list = None  # see `fit_platt`
    lift: list = None  # see `lift_of`; None leaves the head out of similarities
    colours: float = 0.0  # their weight in a similarity, where the cosine of embeddings has 1
    alike: float = ALIKE  # the cosine that joins two groups of apps/sort.py

    def __post_init__(self):
        if self.trained is None:
            self.trained = int((self.labels < self.learned).sum())
        plain = self.embeddings[:, :-COLOURS] if self.colours else self.embeddings
        taught = self.labels[: self.trained]
        self.mean, self.matrix = whitening(plain[: self.trained], taught)
        self.unit = self.whitened(self.embeddings)  # (n, D)
        self.faces = self.of_learned(len(self.labels))
        self.growth = self.measure_growth()
        # Groups of faces: first the learned characters as they were taught, then everybody with added ones.
        added, number = self.labels[self.trained :].unique(return_inverse=True)
        self.who = torch.cat(
            [torch.arange(self.learned), added]
        )  # (G,), the character of each group
        self.group = torch.cat([taught, self.learned + number])  # (n,), the group of each face
        self.sums = self.unit.new_zeros(len(self.who), self.unit.shape[1])  # (G, D)
        self.sums.index_add_(0, self.group, self.unit)
        # The more faces a mean is of, the nearer are others to it. One or two faces are no mean yet.
        sizes = self.group.bincount(minlength=len(self.who))[self.learned :]
        handicap = HANDICAP * SHOTS / sizes.clamp(min=SHOTS)
        self.handicap = handicap.where(sizes >= LEAST, 0)  # of each group of added faces

    # -- the file, and changes of it

    @classmethod
    def load(cls, run):
        tensors, header = read_safetensors(Path(run) / GALLERY)
        numbers = {name: header[name] for name in HEADER if name in header}
        return cls(tensors["embeddings"].float(), tensors["labels"], **numbers)

    def save(self, run):
        tensors = {"embeddings": self.embeddings.float(), "labels": self.labels}
        header = {name: getattr(self, name) for name in HEADER}
        save_safetensors(tensors, Path(run) / GALLERY, header)

    def only(self, stay):
        """-> the gallery with the faces that stay, (n,) bool; a name without faces leaves."""
        left, labels = self.labels[stay].unique(return_inverse=True)
        names = [self.names[i] for i in left]
        keys = list(itertools.compress(self.keys, stay))
        embeddings = self.embeddings[stay]
        return replace(self, embeddings=embeddings, labels=labels, names=names, keys=keys)

    def add(self, who, keys, embeddings):
        """-> the gallery with so many faces (n, D) more of a character, new or not."""
        names = list(dict.fromkeys([*self.names, who]))
        labels = F.pad(self.labels, (0, len(keys)), value=names.index(who))
        embeddings = torch.cat([self.embeddings, embeddings])
        keys = self.keys + keys
        return replace(self, embeddings=embeddings, labels=labels, names=names, keys=keys)

    def enrol(self, who, keys, embeddings):
        """-> the gallery with embeddings (n, D) of pictures `keys`, each once, and lines that say so.

        A picture that was added under another name leaves that one; one that was learned stays there.
        """
        lines = []
        embeddings = embeddings[:, : self.embeddings.shape[1]]  # some have no colours
        same = same_pictures(embeddings, self.embeddings)  # (n, faces)
        has_name = self.shows(who)
        twins = same_pictures(embeddings, embeddings)
        new = ~(same & has_name).any(1) & ~twins.tril(-1).any(1)
        for i, face in (same & ~has_name & new[:, None]).nonzero().tolist():
            name = self.names[self.labels[face]]
            note = f"was added as {name}; it is {who} now"
            if face < self.trained:
                note = f"was learned as {name}; it stays there, too"
            lines.append(f"note: {door.shown(keys[i])} {note}")
        stay = ~(same & ~has_name).any(0)
        stay[: self.trained] = True
        total = int(has_name.sum() + new.sum())
        if total < LEAST:
            raise UserError(f"{total} pictures of {who} are too few; give {LEAST} or more")
        gallery = self.only(stay).add(who, [*itertools.compress(keys, new)], embeddings[new])
        line = f"{who} is enrolled with {total} pictures"
        if who in gallery.names[: gallery.learned]:
            line = f"{who}, who was learned in training, has {total} pictures, {int(new.sum())} of them new"
        return gallery, [*lines, f"{line}; the gallery knows {len(gallery.names)} characters"]

    def forget(self, who):
        """-> the gallery without the added pictures of a character, and a line that says so."""
        gone = self.shows(who)
        gone[: self.trained] = False
        if not gone.any():
            how = "was learned in training" if who in self.names else "is not enrolled"
            raise UserError(f"{who} {how}; only enrolled ones can be forgotten, see --list")
        gallery = self.only(~gone)
        line = f"{who} is forgotten; the gallery knows {len(gallery.names)} characters"
        if who in gallery.names:
            line = f"{who} is known from training alone; {int(gone.sum())} added pictures are forgotten"
        return gallery, line

    def shows(self, who):
        """Which faces show this character, (n,) bool?"""
        return torch.tensor([name == who for name in self.names])[self.labels]

    def move_threshold(self, threshold):
        """Set that of learned characters; that of enrolled ones moves with it, and confidences stay."""
        moved = threshold - self.threshold - self.growth
        a, b = self.platt
        self.enrolled_threshold += moved
        self.platt = [a, b + a * moved]
        self.threshold, self.growth = threshold, 0.0

    # -- similarity

    def whitened(self, embeddings):
        """embeddings (n, D) -> whitened unit vectors (n, D): their products are similarities."""
        embeddings = embeddings[:, : len(self.mean)].float()  # without histograms
        return F.normalize((embeddings - self.mean) @ self.matrix)

    def of_learned(self, count):
        """Of the first `count` faces, those of each learned character: unit vectors; histograms or None."""
        labels = self.labels[:count]
        characters = [(labels == c).nonzero()[:, 0] for c in labels.unique() if c < self.learned]
        histograms = None
        if self.colours:
            histograms = [self.embeddings[rows, -COLOURS:].float() for rows in characters]
        return [self.unit[rows] for rows in characters], histograms

    def similarities(self, embeddings, faces=None):
        """embeddings (n, D) -> (n, C): the mean cosine with the three nearest faces of each character.

        With colours it is averaged with the mean cosine of histograms, by their weight. faces: as of
        `of_learned` (default: all).
        """
        unit, histograms = faces or self.faces
        scores = nearest_of(self.whitened(embeddings), unit)
        if self.colours:
            # What a network has learned of few pictures tells these characters apart, but says little
            # of others. Colours tell less of each, but the same of all.
            alike = nearest_of(embeddings[:, -COLOURS:].float(), histograms)
            scores = (scores + self.colours * alike) / (1 + self.colours)
        return scores

    def best_similarity(self, embeddings):
        """embeddings (n, D) -> (n,): the similarity to the most similar character."""
        return self.similarities(embeddings).amax(1)

    def similarity(self, logits, embeddings):
        """(n, C), (n, D) -> (n,): `best_similarity`, higher where the head is surer than usual.

        LIFT for each standard deviation of the best logit of known faces. Together they separate best.
        """
        return lifted(self.best_similarity(embeddings), logits.amax(1), self.lift)

    def measure_growth(self):
        """How much more similar faces are to learned characters that are not theirs, by what was added to these.

        Unknown faces are, too, so by this the threshold rises: else, the more was corrected, the fewer
        unknown pictures would be called so. The added faces are asked, which the network has not learned.
        """
        labels, trained, learned = self.labels, self.trained, self.learned
        corrected = labels[trained:][labels[trained:] < learned].unique()
        if not len(corrected):
            return 0.0
        asked = torch.arange(trained, len(labels))
        if len(corrected) == 1:
            # No added face gains by what was added to its own character, so faces of the others are asked.
            asked = torch.cat(data.evenly_of_each(labels[:trained], WHITENED))
            asked = asked[labels[asked] != corrected]
        own = labels[asked, None] == torch.arange(learned)
        now = self.similarities(self.embeddings[asked]).masked_fill(own, -1)
        then = self.similarities(self.embeddings[asked], self.of_learned(trained))
        return (now.amax(1) - then.masked_fill(own, -1).amax(1)).mean().item()

    # -- who is it?

    def to_means(self, unit, own=None):
        """unit (n, D) -> cosines (n, G) with the mean of each group; own (n,): groups that leave the face out."""
        cosines = unit @ F.normalize(self.sums).T
        if own is None:
            return cosines
        others = F.normalize(self.sums[own] - unit)
        return cosines.scatter(1, own[:, None], (unit * others).sum(1, keepdim=True))

    def decide(self, logits, embeddings, own=None):
        """-> (n,) who, similarity, margin over its threshold (below 0: unknown), confidence.

        The head names the characters that it learned. Where faces were added, their character wins if
        their mean is nearer, a handicap given, than that of every learned one; own: as `to_means`. Who
        was enrolled is known by this mean, with a threshold of its own.
        confidence: P(the name is right) where half of all pictures show unknown characters;
        nan of a name that added faces gave, and not the head.
        """
        who = logits.argmax(1)
        similarity = self.similarity(logits, embeddings)
        margin = similarity - self.threshold - self.growth
        sure = confidence(logits, margin, self.temperature, self.platt)
        to_mean = self.to_means(self.whitened(embeddings), own)  # (n, G)
        if to_mean.shape[1] == self.learned:
            return who, similarity, margin, sure
        to_added = to_mean[:, self.learned :]
        best, added = (to_added + self.handicap).max(1)
        new = best > to_mean[:, : self.learned].amax(1)
        near = to_added.gather(1, added[:, None])[:, 0]
        name = torch.where(new, self.who[self.learned + added], who)
        enrolled = name >= self.learned
        return (
            name,
            torch.where(enrolled, near, similarity),
            torch.where(enrolled, near - self.enrolled_threshold, margin),
            sure.masked_fill(name != who, torch.nan),
        )

    def names_given(self, logits, embeddings, own=None):
        """-> the name of each picture, "" where it is unknown; own: see `decide`."""
        who, _, margin, _ = self.decide(logits, embeddings, own)
        return [self.names[i] if m >= 0 else "" for i, m in zip(who, margin, strict=True)]


HEADER = [field.name for field in fields(Gallery)][2:]  # of the file, beside its two tensors


def nearest_of(unit, faces):
    """Unit vectors (n, D), a list of those of each character -> (n, C): mean products with the nearest."""
    cosines = [unit @ own.T for own in faces]
    nearest = [x.topk(min(NEAREST, x.shape[1]), 1).values.mean(1) for x in cosines]
    return torch.stack(nearest, 1)


def lifted(similarity, strength, lift):
    """Cosines (n,) and best logits (n,) -> (n,), at most 1; lift as of `lift_of`, or None."""
    usual, per_logit = lift or (0.0, 0.0)
    # A head can be far surer of one picture than of any that it was measured by. That is bounded, so
    # that it never names a face that looks like nobody's.
    most = MOST_LIFT * LIFT
    return (similarity + (per_logit * (strength - usual)).clamp(-most, most)).clamp(max=1)


def confidence(logits, margin, temperature, platt):
    """Logits (n, C), margins (n,) -> (n,): P(the name is that of a known face) P(it is known)."""
    a, b = platt
    right_name = (logits / temperature).softmax(1).amax(1)
    return right_name * (a * margin + b).sigmoid()


def same_pictures(embeddings, others):
    """Embeddings (n, D) and (m, D) -> (n, m): are they of one picture?"""
    width = min(embeddings.shape[1], others.shape[1])  # some have no colours
    return F.normalize(embeddings[:, :width]) @ F.normalize(others[:, :width]).T > SAME


# ---- calibration: when is it unknown, and how sure is an answer? ---------------------------------


def calibrate(embeddings, labels, held_out, unknown=None):
    """-> a dict of numbers for the gallery's header, where a run has held-out pictures.

    held_out: logits (m, C), embeddings (m, D), labels (m,) of known characters. unknown: the same of
    unknown ones, which may be few: each known one stands in for one, too.
    The file keeps the threshold: after a change of this rule, remove gallery.safetensors.
    """
    logits, known, known_labels = held_out
    gallery = Gallery(embeddings, labels, int(labels.max()) + 1, lift=lift_of(logits))
    known_score = gallery.similarity(logits, known)
    new_score = as_unknown(gallery, held_out)
    if unknown:
        new_score = torch.cat([new_score, gallery.similarity(*unknown[:2])])
    numbers = {"enrolled_threshold": enrolled_threshold(gallery, known, known_labels)}
    numbers["lift"] = gallery.lift
    curve = f1_curve(gallery.whitened(known), known_labels)
    numbers["alike"] = best_threshold([curve], len(known))
    return numbers | decided(logits, known_labels, known_score, new_score)


def decided(logits, labels, known, unknown):
    """Logits (m, C), labels (m,) and similarities (m,) of known faces, those of unknown ones (k,)
    -> threshold and confidence. At most MOST_REJECTED of the known are called unknown."""
    threshold = threshold_of(known, unknown)
    numbers = {"threshold": threshold, "temperature": fit_temperature(logits, labels)}
    return numbers | {"platt": fit_platt(known - threshold, unknown - threshold)}


def lift_of(logits):
    """Logits (m, C) of known held-out faces -> the gallery's lift: the usual one, and similarity per logit."""
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
    similarity = torch.empty(len(known))
    for fold in range(FOLDS):
        stay = gallery.labels % FOLDS != fold
        asked = known_labels % FOLDS == fold
        faces = gallery.embeddings[stay], gallery.labels[stay]
        less = Gallery(*faces, gallery.learned, lift=gallery.lift)
        others = torch.arange(logits.shape[1]) % FOLDS != fold
        similarity[asked] = less.similarity(logits[asked][:, others], known[asked])
    return similarity


def enrolled_threshold(gallery, known, known_labels):
    """The similarity to the mean of SHOTS faces of a character that OTHERS of other faces reach."""
    unit = gallery.whitened(known)
    others = []
    for c in gallery.labels.unique().tolist():
        faces = gallery.unit[gallery.labels == c]
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


# ---- the gallery of a run ------------------------------------------------------------------------

UNMEASURED = (  # of a run that learned all characters of its set
    "most new characters may get a known name; python -m apps.learn datasets/NAME leaves each character "
    "out once, and measures it"
)


def open_gallery(run, device="auto", dtype="auto"):
    """-> the Gallery of a run. Where the run has none, it is built first."""
    path = Path(run) / GALLERY
    if not path.exists():
        with locked(lock_beside(path), wait=True):
            if not path.exists():  # another process may have built it
                build_gallery(run, device, dtype)
    return Gallery.load(run)


def build_gallery(run, device, dtype):
    """Write the embeddings of training pictures, and what is calibrated on held-out ones."""
    faces = faces_learned(run, device, dtype)
    if faces.held_out:
        numbers = calibrate(faces.embeddings, faces.labels, faces.held_out, faces.others)
    else:
        numbers = json.loads((Path(run) / PROMISE).read_text())["calibration"]
    names = {"names": faces.classes, "keys": faces.keys}
    gallery = Gallery(faces.embeddings, faces.labels, len(faces.classes), **names, **numbers)
    gallery.save(run)
    count = f"{len(faces.keys)} faces of {len(faces.classes)} characters"
    print(f"wrote {Path(run) / GALLERY}: {count}", file=sys.stderr)
    if faces.others:
        below = gallery.similarity(*faces.others[:2]) < gallery.threshold
        share = f"{below.float().mean():.0%} of the {len(below)} pictures of nobody"
        print(f"note: {share} are called unknown; they have decided the threshold", file=sys.stderr)
    elif faces.held_out and not faces.left_out:
        print(f"note: {UNMEASURED}", file=sys.stderr)


@contextlib.contextmanager
def changing(run):
    """with changing(run): what is read, changed and saved here is changed by nobody else meanwhile."""
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
        row = {"picture": key, "name": name if known else None, "known": known}
        row["confidence"] = None if sure.isnan() else round(sure.item(), 4)
        row["similarity"] = round(similarity.item(), 4)
        row["threshold"] = round((similarity - margin).item(), 4)
        row |= {"best_guess": name, "nearest": []}
        for cosine, i in zip(*cosines.topk(min(nearest, len(cosines))), strict=True):
            face = {"name": gallery.names[gallery.labels[i]], "picture": gallery.keys[i]}
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
    line = f"{door.shown(row['picture'])}: {who}"
    for face in row["nearest"][:1]:
        line += f"; nearest: {door.shown(face['picture'])} {face['similarity']:.2f}"
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
    with changing(args.run) as before:
        after, lines = before.enrol(who, keys, torch.cat(embeddings))
        after.save(args.run)
    print("\n".join(lines))
    print(renamed(*known_faces(args.run, net, header, autocast, before), before, after))
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
def known_faces(run, net, header, autocast, gallery):
    """Pictures of learned characters -> logits (m, C), embeddings (m, D), groups (m,) or None, what they are.

    They are held-out ones. Where folds have learned all of them, or the data set is not there any
    more, they are those of the gallery, each of which is left out of its group's mean; but the network
    has learned these by heart.
    """
    embeddings = gallery.embeddings[: gallery.trained]
    own, what = gallery.group[: gallery.trained], "pictures that were learned"
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
    seen = embeddings[:, : len(gallery.mean)]  # without histograms
    logits = net.head(seen.to(net.encoder.cls_token.device)).cpu()
    return logits, embeddings, own, what


def renamed(logits, embeddings, own, what, before, after):
    """What `known_faces` returns -> a line: how many of them have another name in the second gallery."""
    names = [gallery.names_given(logits, embeddings, own) for gallery in (before, after)]
    changed = Counter(pair for pair in zip(*names, strict=True) if pair[0] != pair[1])
    ways = [
        f"{n} {old or 'unknown'} -> {new or 'unknown'}" for (old, new), n in changed.most_common(3)
    ]
    line = f"{changed.total()} of {len(logits)} {what} change their name"
    if ways:
        line += f" ({', '.join(ways)})"
    return line if own is None else f"{line}; new ones of these characters do so more often"


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
