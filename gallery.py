"""Known faces as embeddings: which class a new one is nearest to, and when it is like none of them.

gallery.safetensors holds embeddings (n, D) and labels (n,), and in its header the names of the classes, a key for each
picture, and what was calibrated on pictures held apart: the threshold of "unknown" and how sure an answer is.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from classifier import read_safetensors
from plumbing import UserError, save_safetensors

GALLERY = 20  # training pictures of a character that are kept


def gallery_rows(labels, rows, most=GALLERY):
    """At most `most` of rows (i64) of each class, evenly spread."""
    chosen = []
    for c in labels[rows].unique():
        own = rows[labels[rows] == c]
        chosen.append(own[torch.linspace(0, len(own) - 1, min(most, len(own))).long()])
    return torch.cat(chosen)


def centroids(embeddings, labels):
    """embeddings (n, D), labels (n,) of 0 .. C-1 -> unit vectors (C, D): the mean direction of each class."""
    unit = F.normalize(embeddings.float())
    sums = unit.new_zeros(int(labels.max()) + 1, unit.shape[1]).index_add_(0, labels, unit)
    return F.normalize(sums)


def calibrate(gallery, gallery_labels, logits, known, labels, strangers=None):
    """When a face is unknown, and how sure an answer is -> a dict of plain values for the gallery's header.

    logits (n, C), known (n, D), labels (n,) and strangers (m, D): pictures that were held apart for choices.
    threshold: the cosine to the nearest class that as large a share of strangers reaches as of known faces fails to.
    Without strangers each known face plays one, its own class taken out of the gallery; the network has learned that
    it is none of the others, so a real stranger passes more often than that share.
    temperature: of the head's logits, cosine_temperature: of the cosines (Guo et al. 2017, arXiv:1706.04599).
    """
    middle = centroids(gallery, gallery_labels)
    cosine = F.normalize(known) @ middle.T
    if strangers is None:
        impostor = cosine.scatter(1, labels[:, None], -1.0)
        by = "known faces held apart for choices, their own class taken out"
    else:
        impostor, by = F.normalize(strangers) @ middle.T, "characters left out of training, held apart for choices"
    threshold, rejected, accepted = balance(cosine.amax(1), impostor.amax(1))
    return {"threshold": threshold, "false_accept": accepted, "false_reject": rejected, "by": by,
            "temperature": fit_temperature(logits, labels),
            "cosine_temperature": fit_temperature(cosine, labels)}  # fmt: skip


def balance(known, strangers):
    """-> the threshold that rejects as large a share of known (n,) as it accepts of strangers (m,), and both shares."""
    cuts = torch.cat([known, strangers]).sort().values
    rejected = torch.searchsorted(known.sort().values, cuts) / len(known)
    accepted = 1 - torch.searchsorted(strangers.sort().values, cuts) / len(strangers)
    k = (rejected - accepted).abs().argmin()
    return cuts[k].item(), rejected[k].item(), accepted[k].item()


def fit_temperature(logits, labels):
    """The T of a fine grid whose softmax(logits / T) gives the labels the highest likelihood."""
    grid = torch.logspace(-2.5, 1.5, 161)
    losses = torch.stack([F.cross_entropy(logits / T, labels) for T in grid])
    return grid[losses.argmin()].item()


def save_gallery(path, embeddings, labels, names, keys, about):
    """names of the classes 0, 1, ...; keys: one a picture; about: what `calibrate` found."""
    header = {"names": names, "keys": keys, **about}
    tensors = {"embeddings": embeddings.float().contiguous(), "labels": labels.contiguous()}
    save_safetensors(tensors, path, {"animask": json.dumps(header)})


def load_gallery(folder):
    """-> a dict: embeddings (n, D), labels (n,), the header's entries, and ready to compare: unit (n, D), centroids."""
    path = Path(folder) / "gallery.safetensors"
    tensors, header = read_safetensors(path)
    if not {"embeddings", "labels"} <= tensors.keys() or not {"names", "keys", "threshold"} <= header.keys():
        raise UserError(f"{path} is not a gallery; finetune_lora.py makes it anew")
    if len(tensors["embeddings"]) == 0 or len(tensors["embeddings"]) != len(header["keys"]):
        raise UserError(f"{path} holds {len(tensors['embeddings'])} faces of {len(header['keys'])} that it names; "
                        "finetune_lora.py makes it anew")  # fmt: skip
    unit = F.normalize(tensors["embeddings"])
    return tensors | header | {"unit": unit, "centroids": centroids(unit, tensors["labels"])}
