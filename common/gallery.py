"""The gallery of known faces: who is on a picture, and when is it an unknown character?

    n faces   m pictures that were held out for choices   D width of an embedding   C characters

finetune_lora.py writes the gallery and calibrates it, recognize.py asks it. Faces are compared by
the cosine of their whitened embeddings. A picture whose similarity is under a threshold shows an
unknown character.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from common.classifier import REMEDY, head_of
from common.fields import (
    NAMES,
    TEXT,
    check_arrays,
    check_equal,
    check_fields,
    check_finite,
    check_range,
    list_of,
    number,
    whole,
)
from common.io import read_header, read_safetensors, save_safetensors

NEAREST = 3  # faces of a character that a picture is compared with
FEW = 20  # faces of a character that the whitening is fitted to
SHRINK = 0.3  # share of the mean variance that is added to the covariance
MOST_REJECTED = 0.09  # of known faces on dev: on new ones about a tenth
OTHERS = 0.05  # share of other faces that may pass for one enrolled character
SHOTS = 5  # pictures of an enrolment
FOLDS = 5  # of the characters, where known ones play unknown ones
# New faces lie this much further from a mean of few faces than from one of many (results/LOG.md).
HANDICAP = 0.1


# ---- similarity ----------------------------------------------------------------------------------


def centroids(embeddings, labels):
    """embeddings (n, D), labels (n,) of 0 .. C-1 -> unit vectors (C, D): the mean direction of each."""
    unit = F.normalize(embeddings.float())
    sums = unit.new_zeros(int(labels.max()) + 1, unit.shape[1]).index_add_(0, labels, unit)
    return F.normalize(sums)


def whitening(embeddings, labels):
    """embeddings (n, D) of labels (n,) -> mean (D,), matrix (D, D): (x - mean) @ matrix varies alike
    in all directions within a class.

    Within-class covariance normalisation (Hatch et al. 2006): matrix matrix^T is the inverse of the
    covariance within classes. Directions in which faces of one character differ count less.
    """
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    rows = [some[data.evenly_spaced(len(some), FEW)] for some in rows]
    means = torch.stack([embeddings[some].mean(0) for some in rows]).double()
    pairs = zip(rows, means, strict=True)
    apart = torch.cat([embeddings[some].double() - mean for some, mean in pairs])
    W = apart.T @ apart / max(1, len(apart) - len(rows))
    W += (SHRINK * W.diagonal().mean() + 1e-9) * torch.eye(len(W), dtype=W.dtype)
    return means.mean(0).float(), torch.linalg.cholesky(torch.linalg.inv(W)).float()


def make_gallery(embeddings, labels, learned):
    """Faces (n, D), labels (n,) of which the first `learned` are the head's -> a dict.

    faces: the unit vectors of each learned character; means: the mean direction of every character.
    """
    mean, matrix = whitening(embeddings[labels < learned], labels[labels < learned])
    gallery = {"mean": mean, "matrix": matrix, "labels": labels, "learned": learned}
    unit = compared(embeddings, gallery)
    faces = [unit[labels == c] for c in range(learned)]
    return gallery | {"unit": unit, "faces": faces, "means": centroids(unit, labels)}


def compared(embeddings, gallery):
    """embeddings (n, D) -> whitened unit vectors (n, D): their products are similarities."""
    return F.normalize((embeddings.float() - gallery["mean"]) @ gallery["matrix"])


def class_scores(unit, gallery):
    """unit (n, D) -> (n, learned): the mean cosine with the three nearest faces of each character.

    It is -1 where the gallery has no face of the character.
    """
    scores = []
    for faces in gallery["faces"]:
        if len(faces) == 0:
            scores.append(unit.new_full(unit.shape[:1], -1.0))
            continue
        nearest = (unit @ faces.T).topk(min(NEAREST, len(faces)), 1).values
        scores.append(nearest.mean(1))
    return torch.stack(scores, 1)


def decide(logits, embeddings, gallery):
    """Who is it? -> (n,) who, similarity, margin over its threshold (below 0: unknown), confidence.

    The head names the characters that it learned. An enrolled one has no place in the head: it wins
    where the mean of its faces is nearer, HANDICAP given, than that of every learned one.
    confidence: the probability that the name is right where half of all pictures show unknown
    characters; nan of an enrolled one.
    """
    unit, learned = compared(embeddings, gallery), gallery["learned"]
    who, similarity = logits.argmax(1), class_scores(unit, gallery).amax(1)
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


def calibrate(embeddings, labels, logits, known, known_labels, unknown=None):
    """-> a dict of plain values for the gallery's header.

    embeddings (n, D), labels (n,): the gallery. logits (m, C), known (m, D), known_labels (m,) and
    unknown (k, D): pictures that were held out for choices. Without unknown ones each known
    character plays one.

    threshold           as large a share of unknown faces reaches it as of known faces fails to; but
                        at most MOST_REJECTED of the known fail
    enrolled_threshold  for a character of SHOTS pictures
    temperature         of the head's logits (Guo et al. 2017, arXiv:1706.04599)
    platt               a, b of sigmoid(a * (similarity - threshold) + b), the probability that a
                        face is known where half of all are unknown (Platt 1999)
    """
    C = int(labels.max()) + 1
    gallery = make_gallery(embeddings, labels, C)
    score = class_scores(compared(known, gallery), gallery).amax(1)
    if unknown is None:
        other = as_unknown(embeddings, labels, known, known_labels)
        by = "known faces held apart for choices, their characters left out of the gallery in turn"
    else:
        other = class_scores(compared(unknown, gallery), gallery).amax(1)
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
        found[asked] = class_scores(compared(known[asked], gallery), gallery).amax(1)
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

CALIBRATION = {
    "threshold": number(),
    "enrolled_threshold": number(),
    "false_accept": number(),
    "false_reject": number(),
    "by": TEXT,
    "temperature": number(1e-6),
    "platt": list_of(number(), 2, 2),
}
CALIBRATED = tuple(CALIBRATION)
HEADER = {"names": NAMES, "keys": list_of(TEXT, 1), "learned": whole(1)} | CALIBRATION


def save_gallery(path, embeddings, labels, about):
    """embeddings (n, D), labels (n,); about: the fields of HEADER.

    names: of the classes 0, 1, ..., of which the first `learned` are the head's; keys: one a face.
    """
    tensors = {"embeddings": embeddings.float(), "labels": labels}
    save_safetensors(tensors, path, {name: about[name] for name in HEADER})


def gallery_header(folder):
    """The header of a run's gallery: who is in it, and what was calibrated."""
    path = Path(folder) / "gallery.safetensors"
    header = read_header(path, REMEDY)[1]
    check_fields(header, HEADER, path, REMEDY)
    return header


def load_gallery(folder):
    """-> a dict: embeddings (n, D), labels (n,), the header, and what `make_gallery` returns."""
    path = Path(folder) / "gallery.safetensors"
    tensors, header = read_safetensors(path, REMEDY)
    check_fields(header, HEADER, path, REMEDY)
    head, learned = head_of(folder), header["learned"]
    sizes = {"n": len(header["keys"]), "D": head["config"]["dim"]}
    check_arrays(tensors, {"embeddings": "float n D", "labels": "int64 n"}, path, REMEDY, **sizes)
    check_range(tensors["labels"], 0, len(header["names"]), "labels", path, REMEDY)
    check_finite(tensors, path)
    check_equal(
        path,
        REMEDY,
        names=(", ".join(header["names"][:learned]), ", ".join(head["classes"])),
        characters_with_a_face=(len(tensors["labels"].unique()), len(header["names"])),
    )
    tensors["embeddings"] = tensors["embeddings"].float()
    made = make_gallery(tensors["embeddings"], tensors["labels"], learned)
    return tensors | header | made
