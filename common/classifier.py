"""What stands on an encoder to name a character: pooling, neck and head; the gallery of known faces; their files.

    B batch   N patches   D width of the encoder   L its blocks   C characters

The encoder's tokens are pooled to one vector a picture. The neck turns it into the embedding, by
which pictures are compared; the head turns that into one logit a character. The neck is a batch
norm without parameters, as in the linear probe of MAE (He et al. 2021) and in BNNeck (Luo et al.
2019, arXiv:1903.07071).
"""

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from common.checkpoints import load_exactly
from common.command import progress
from common.convnets import load_any
from common.fields import (
    CUT,
    NAMES,
    SIDE,
    TEXT,
    check_arrays,
    check_equal,
    check_fields,
    check_finite,
    check_range,
    list_of,
    number,
    one_of,
    whole,
)
from common.io import UserError, read_header, read_safetensors, save_safetensors
from common.lora import fingerprint, load_adapter

MARGINS = {
    "arcface": 0.5,
    "cosface": 0.35,
    "curricularface": 0.5,
}  # radians, cosine, radians: the papers' values
HEADS = ("linear", "mlp", *MARGINS, "ifa")
POOLS = {"mean": lambda tokens: tokens[:, 1:].mean(1), "cls": lambda tokens: tokens[:, 0]}
HIDDEN = 512  # width of the one hidden layer of mlp
REMEDY = "python finetune_lora.py ENCODER --data DIR makes it"


class MarginHead(nn.Module):
    """Cosine classifier with a margin on the true class while it trains: (B, D) -> (B, C), scale *
    cosine.

    arcface         cos(theta + m) for the true class (Deng et al. 2019, arXiv:1801.07698, eq. 3)
    cosface         cos(theta) - m (Wang et al. 2018, arXiv:1801.09414, eq. 4)
    curricularface  arcface, and a wrong class that beats it weighs cos * (t + cos), t a moving
                    average of the true cosine: hard examples count more as training goes on (Huang
                    et al. 2020, arXiv:2004.00288, eq. 6)
    """

    def __init__(self, dim, classes, kind, margin, scale):
        super().__init__()
        self.kind, self.margin, self.scale = kind, margin, scale
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("t", torch.zeros(()))

    def forward(self, x, labels=None):
        """x (B, D); with labels (B,) the margin is on, without them (to recognise) it is not."""
        cosine = F.normalize(x) @ F.normalize(self.weight).T  # (B, C)
        if labels is None:
            return self.scale * cosine
        true, m = cosine.gather(1, labels[:, None]), self.margin  # (B, 1)
        target = true - m
        if (
            self.kind != "cosface"
        ):  # beyond theta = pi - m, where cos(theta + m) would rise again, a straight line
            sine = (1 - true.square()).clamp(min=1e-9).sqrt()
            rotated = true * math.cos(m) - sine * math.sin(m)
            target = torch.where(true > math.cos(math.pi - m), rotated, true - m * math.sin(m))
        if self.kind == "curricularface":
            if self.training:
                self.t.lerp_(true.detach().mean(), 0.01)
            cosine = torch.where(cosine > target, cosine * (self.t + cosine), cosine)
        return self.scale * cosine.scatter(1, labels[:, None], target)


class Fusion(nn.Module):
    """The neck of `ifa` (intermediate feature aggregation, Rios et al. 2022, Animesion): (B, D, L)
    -> (B, D).

    One weight a block mixes the CLS tokens of all blocks; then ReLU and LayerNorm.
    """

    def __init__(self, dim, depth):
        super().__init__()
        self.mix, self.norm = nn.Linear(depth, 1), nn.LayerNorm(dim)
        nn.init.constant_(self.mix.weight, 1 / depth)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x):
        return self.norm(F.relu(self.mix(x).squeeze(2)))


def build_head(kind, dim, classes, margin, scale):
    """(B, D) -> (B, C); ifa differs from linear in its neck alone."""
    if kind in MARGINS:
        return MarginHead(dim, classes, kind, margin, scale)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, classes))
    return nn.Linear(dim, classes)


class Classifier(nn.Module):
    """Encoder, neck and head. `config` and the class names travel in head.safetensors."""

    def __init__(self, encoder, classes, head="linear", pool="mean", margin=None, scale=32.0):
        super().__init__()
        dim, margin = encoder.cls_token.shape[2], MARGINS.get(head) if margin is None else margin
        self.config = {"head": head, "pool": pool, "margin": margin, "scale": scale, "dim": dim}
        self.encoder = encoder
        self.neck = (
            Fusion(dim, len(encoder.blocks))
            if head == "ifa"
            else nn.BatchNorm1d(dim, 1e-6, affine=False)
        )
        self.head = build_head(head, dim, classes, margin, scale)

    def pooled(self, patches, ids):
        """patches (B, K, P) at places ids (B, K) -> fp32 (B, D); the CLS tokens of all blocks, (B,
        D, L), for ifa.
        """
        if self.config["head"] != "ifa":
            return POOLS[self.config["pool"]](self.encoder(patches, ids).float())
        x, cls_tokens = self.encoder.embed(patches, ids), []
        for block in self.encoder.blocks:
            x = block(x)
            cls_tokens.append(x[:, 0].float())
        return torch.stack(cls_tokens, 2)

    def forward(self, pooled, labels=None):
        """pooled -> logits (B, C), the margin on where labels (B,) are given."""
        embedding = self.neck(pooled)
        return (
            self.head(embedding, labels) if self.config["head"] in MARGINS else self.head(embedding)
        )


def level_of(name, depth):
    """0 for the patch embedding and the tokens, 1 to depth for the blocks, depth + 1 for what
    follows them.
    """
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1 if name.startswith(("encoder.norm", "neck", "head")) else 0


def make_optimizer(net, lr, head_lr, weight_decay, layer_decay):
    """AdamW; "peak" of a group is its learning rate: head_lr, in the encoder lr *
    layer_decay^(blocks above).
    """
    depth, groups = len(net.encoder.blocks), {}
    for name, p in ((name, p) for name, p in net.named_parameters() if p.requires_grad):
        decayed = lr * layer_decay ** (depth + 1 - level_of(name, depth))
        peak = decayed if name.startswith("encoder.") else head_lr
        decay = weight_decay if p.ndim > 1 and not name.endswith("_token") else 0.0
        group = groups.setdefault(
            (peak, decay), {"params": [], "peak": peak, "weight_decay": decay}
        )
        group["params"].append(p)
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.999), fused=True)


def unfreeze(net, trained, epoch, every):
    """Progressive unfreezing (Howard and Ruder 2018): the head first, then, from the top, a block
    more each `every`.
    """
    depth = len(net.encoder.blocks)
    for name, p in net.named_parameters():
        if name in trained:
            p.requires_grad_(not every or level_of(name, depth) > depth - epoch // every)


# ---- features of whole images --------------------------------------------------------------------


@torch.no_grad()
def pooled_of(net, split, rows, S, autocast, name="", mirrored=False):
    """What stands before the neck, for whole images: fp32 (n, D) or (n, D, L) on the CPU; name: of
    a progress bar.

    mirrored: the mean of the picture and its mirror image, which costs twice the time and tells
    strangers better.
    """
    pooled, device = [], net.encoder.cls_token.device
    views = data.whole_views(split["images"], rows, S, device)
    for _, view in progress(
        views, name, -(-len(rows) // data.CHUNK), leave=False, disable=not name
    ):
        with autocast():
            both = [
                net.pooled(*net.encoder.all_patches(x)).cpu()
                for x in (view, view.flip(2))[: 1 + mirrored]
            ]
        pooled.append(torch.stack(both).mean(0))
    return torch.cat(pooled)


@torch.no_grad()
def predict(net, pooled):
    """What `pooled_of` found -> logits (n, C), embeddings (n, D) on the CPU."""
    embeddings = torch.cat(
        [net.neck(p.to(net.encoder.cls_token.device)) for p in pooled.split(4096)]
    )
    return net.head(embeddings).cpu(), embeddings.cpu()


def frozen_features(task, dtype):
    """A frozen encoder's features of whole splits -> {name: (n, D)}, computed once and kept beside
    the run.

    task: the namespace of finetune_lora.open_task. The file's name has the digest of all that they
    depend on; the encoder's fingerprint, task.base, knows its weights but not its heads.
    """
    net, splits = (
        task.net,
        {images.name: images.split for images in (task.train, task.report, task.dev)},
    )
    sets = sorted((name, data.fingerprint(split)) for name, split in splits.items())
    heads, pool = net.encoder.blocks[0].attn.heads, net.config["pool"]
    key = repr((task.base, heads, task.S, pool, net.config["head"] == "ifa", dtype, sets))
    path = task.out.parent / f"features-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if path.exists():
        return read_safetensors(path)[0]
    features = {}
    for name, split in splits.items():
        rows = torch.arange(len(split["images"]))
        features[name] = pooled_of(net, split, rows, task.S, task.autocast, f"features of {name}")
    save_safetensors(features, path)
    return features


# ---- the gallery: known faces as embeddings ------------------------------------------------------

NEAREST = 3  # faces of a character that a picture is compared with
FEW, SHRINK = (
    20,
    0.3,
)  # faces of a character that the whitening is fitted to; of its covariance's mean variance, added
MOST_REJECTED = 0.09  # of known faces that were held apart: on new ones about a tenth
OTHERS, SHOTS = (
    0.05,
    5,
)  # share of other faces that may pass for one enrolled character; pictures of an enrolment
# new faces lie this much further from a mean of few faces than from one of many (results/LOG.md)
HANDICAP = 0.1
CALIBRATED = (
    "threshold",
    "enrolled_threshold",
    "false_accept",
    "false_reject",
    "by",
    "temperature",
    "platt",
)


def centroids(embeddings, labels):
    """embeddings (n, D), labels (n,) of 0 .. C-1 -> unit vectors (C, D): the mean direction of each
    class.
    """
    unit = F.normalize(embeddings.float())
    sums = unit.new_zeros(int(labels.max()) + 1, unit.shape[1]).index_add_(0, labels, unit)
    return F.normalize(sums)


def whitening(embeddings, labels):
    """embeddings (n, D) of labels (n,) -> mean (D,), matrix (D, D): (x - mean) @ matrix varies
    alike in all directions within a class.

    Within-class covariance normalisation (Hatch et al. 2006): matrix matrix^T is the inverse of the
    covariance of what faces of one character differ in. Such directions say nothing of who it is,
    and cosines then leave them out.
    """
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    rows = [own[data.evenly_spaced(len(own), FEW)] for own in rows]
    means = torch.stack([embeddings[own].mean(0) for own in rows]).double()
    apart = torch.cat([embeddings[own].double() - m for own, m in zip(rows, means, strict=True)])
    W = apart.T @ apart / max(1, len(apart) - len(rows))
    W += (SHRINK * W.diagonal().mean() + 1e-9) * torch.eye(len(W), dtype=W.dtype)
    return means.mean(0).float(), torch.linalg.cholesky(torch.linalg.inv(W)).float()


def make_gallery(embeddings, labels, learned):
    """Faces (n, D), labels (n,) of which the first `learned` are the head's -> what `class_scores`
    and `decide` take.

    faces: those of each learned character, apart; means: the mean direction of every character.
    """
    mean, matrix = whitening(embeddings[labels < learned], labels[labels < learned])
    gallery = {"mean": mean, "matrix": matrix, "labels": labels, "learned": learned}
    unit = compared(embeddings, gallery)
    faces = [unit[labels == c] for c in range(learned)]
    return gallery | {"unit": unit, "faces": faces, "means": centroids(unit, labels)}


def compared(embeddings, gallery):
    """embeddings (n, D) -> unit vectors (n, D), whitened as the gallery is: their products are
    similarities.
    """
    return F.normalize((embeddings.float() - gallery["mean"]) @ gallery["matrix"])


def class_scores(unit, gallery):
    """Similarity to each learned character: unit (n, D) -> (n, learned), the mean cosine with its
    three nearest faces.

    -1 where the gallery has no face of it.
    """
    scores = []
    for own in gallery["faces"]:
        k = min(NEAREST, len(own))
        scores.append(
            (unit @ own.T).topk(k, 1).values.mean(1) if k else unit.new_full(unit.shape[:1], -1.0)
        )
    return torch.stack(scores, 1)


def calibrate(
    embeddings, labels, logits, known, known_labels, strangers=None, reject=MOST_REJECTED
):
    """When a face is unknown, and how sure an answer is -> a dict of plain values for the gallery's
    header.

    embeddings (n, D), labels (n,): the gallery. logits (m, C), known (m, D), known_labels (m,) and
    strangers (k, D): pictures that were held apart for choices. Without strangers each known face
    plays one. threshold: the similarity that as large a share of strangers reaches as of known
    faces fails to; but at most a share `reject` of these fails. enrolled_threshold: for a character
    of SHOTS pictures. temperature: of the head's logits (Guo et al. 2017, arXiv:1706.04599); platt:
    a, b of the probability sigmoid(a * (similarity - threshold) + b) that a face is known where
    half of all are strangers (Platt 1999).
    """
    C = int(labels.max()) + 1
    gallery = make_gallery(embeddings, labels, C)
    score = class_scores(compared(known, gallery), gallery).amax(1)
    if strangers is None:
        other = as_strangers(embeddings, labels, known, known_labels)
        by = "known faces held apart for choices, their characters left out of the gallery in turn"
    else:
        other = class_scores(compared(strangers, gallery), gallery).amax(1)
        by = "characters left out of training, held apart for choices"
    threshold = min(
        balance(score, other),
        score.sort().values[min(int(reject * len(score)), len(score) - 1)].item(),
    )
    accepted, rejected = (
        (other >= threshold).float().mean().item(),
        (score < threshold).float().mean().item(),
    )
    return {
        "threshold": threshold,
        "enrolled_threshold": enrolled_threshold(gallery, known, known_labels),
        "by": by,
        "false_accept": accepted,
        "false_reject": rejected,
        "temperature": fit_temperature(logits, known_labels),
        "platt": fit_platt(score - threshold, other - threshold),
    }


def as_strangers(embeddings, labels, known, known_labels, folds=5):
    """Known faces as strangers -> their best similarities (m,): cross-validation over the
    characters.

    A fifth of the characters at a time is left out of gallery and whitening, and their faces are
    asked for.
    """
    found, folds = torch.empty(len(known)), min(folds, int(labels.max()) + 1)
    for fold in range(folds):
        stay, asked = labels % folds != fold, known_labels % folds == fold
        gallery = make_gallery(embeddings[stay], labels[stay], int(labels.max()) + 1)
        found[asked] = class_scores(compared(known[asked], gallery), gallery).amax(1)
    return found


def enrolled_threshold(gallery, known, known_labels):
    """The similarity to the mean of SHOTS faces of a character that OTHERS of the faces of all
    others reach.
    """
    unit, others = compared(known, gallery), []
    for c in gallery["labels"].unique().tolist():
        own = gallery["unit"][gallery["labels"] == c]
        mean = F.normalize(own[data.evenly_spaced(len(own), SHOTS)].sum(0), dim=0)
        others.append((unit @ mean)[known_labels != c])
    others = torch.cat(others).sort(descending=True).values
    return others[int(OTHERS * len(others))].item()


def balance(known, strangers):
    """-> the threshold that rejects as large a share of known (n,) as it accepts of strangers (m,)."""
    thresholds = torch.cat([known, strangers]).sort().values
    rejected = torch.searchsorted(known.sort().values, thresholds) / len(known)
    accepted = 1 - torch.searchsorted(strangers.sort().values, thresholds) / len(strangers)
    return thresholds[(rejected - accepted).abs().argmin()].item()


def fit_temperature(logits, labels):
    """The T of a fine grid whose softmax(logits / T) gives the labels the highest likelihood."""
    grid = torch.logspace(-2.5, 1.5, 161)
    losses = torch.stack([F.cross_entropy(logits / T, labels) for T in grid])
    return grid[losses.argmin()].item()


def fit_platt(known, strangers):
    """Margins of known (n,) and of strangers (m,) -> [a, b] of a logistic regression, both kinds
    weighing the same.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = torch.cat([known, strangers])[:, None].numpy(), [1] * len(known) + [0] * len(strangers)
    fit = LogisticRegression(C=1e3, class_weight="balanced").fit(x, y)
    return [float(fit.coef_[0, 0]), float(fit.intercept_[0])]


def decide(logits, embeddings, gallery):
    """Who is it? -> (n,) who, similarity, margin over its threshold (below 0: unknown), confidence.

    The head names those that it learned. An enrolled character has no place in it: it wins where
    the mean of its faces is nearer than that of every learned one, HANDICAP given. confidence: the
    probability that the name is right where half of all pictures show strangers; nan of an enrolled
    one, whose similarity is no probability.
    """
    unit, learned = compared(embeddings, gallery), gallery["learned"]
    similarity, who = class_scores(unit, gallery).amax(1), logits.argmax(1)
    margin, (a, b) = similarity - gallery["threshold"], gallery["platt"]
    sure = (logits / gallery["temperature"]).softmax(1).amax(1) * (a * margin + b).sigmoid()
    to_mean = unit @ gallery["means"].T  # (n, characters)
    if to_mean.shape[1] == learned:
        return who, similarity, margin, sure
    near, enrolled = to_mean[:, learned:].max(1)
    new = near + HANDICAP > to_mean[:, :learned].amax(1)
    own = near - gallery["enrolled_threshold"]
    return (
        torch.where(new, enrolled + learned, who),
        torch.where(new, near, similarity),
        torch.where(new, own, margin),
        sure.masked_fill(new, math.nan),
    )


# ---- files: head.safetensors (neck and head; finetune_lora.py writes it) and gallery.safetensors -


NUMBER = number()
HEAD = {
    "base": TEXT,
    "classes": NAMES,
    "config": {
        "head": one_of(*HEADS),
        "pool": one_of(*POOLS),
        "margin?": number(0, 10),
        "scale": number(1e-6),
        "dim": whole(1, 2**14),
    },
    "method": TEXT,
    "image_size": SIDE,
    "fingerprint": TEXT,
    "data": TEXT,
} | CUT
GALLERY = {
    "names": NAMES,
    "keys": list_of(TEXT, 1),
    "learned": whole(1),
    "threshold": NUMBER,
    "enrolled_threshold": NUMBER,
    "false_accept": NUMBER,
    "false_reject": NUMBER,
    "by": TEXT,
    "temperature": number(1e-6),
    "platt": list_of(NUMBER, 2, 2),
}


def head_of(folder):
    """The header of a run's head file, without its weights."""
    path = Path(folder) / "head.safetensors"
    header = read_header(path, REMEDY)[1]
    check_fields(header, HEAD, path, REMEDY)
    return header


def gallery_header(folder):
    """The same of its gallery: who is in it, and what was calibrated."""
    path = Path(folder) / "gallery.safetensors"
    header = read_header(path, REMEDY)[1]
    check_fields(header, GALLERY, path, REMEDY)
    return header


def load_classifier(folder):
    """runs/NAME of finetune_lora.py -> (Classifier in eval mode, header of its head file)."""
    folder, path = Path(folder), Path(folder) / "head.safetensors"
    weights, header = read_safetensors(path, REMEDY)
    check_fields(header, HEAD, path, REMEDY)
    base = folder if (folder / "model.safetensors").exists() else Path(header["base"])
    encoder, _ = load_any(base, header["image_size"])
    if fingerprint(encoder) != header["fingerprint"]:
        raise UserError(
            f"{base} is not the encoder that {folder} was trained on any more; "
            "put that one back, or run finetune_lora.py again"
        )
    if header["method"] == "lora":
        load_adapter(encoder, folder)
    config = (header["config"][k] for k in ("head", "pool", "margin", "scale"))
    net = Classifier(encoder, len(header["classes"]), *config)
    load_exactly(net, {f"encoder.{k}": w for k, w in encoder.state_dict().items()} | weights, path)
    return net.eval(), header


def save_gallery(path, embeddings, labels, names, keys, learned, about):
    """names of the classes 0, 1, ..., the first `learned` the head's; keys: one a picture; about:
    CALIBRATED.
    """
    tensors = {"embeddings": embeddings.float(), "labels": labels}
    save_safetensors(tensors, path, {"names": names, "keys": keys, "learned": learned, **about})


def load_gallery(folder):
    """-> a dict: embeddings (n, D), labels (n,), the header's entries, and what `make_gallery`
    makes of them.
    """
    path = Path(folder) / "gallery.safetensors"
    tensors, header = read_safetensors(path, REMEDY)
    check_fields(header, GALLERY, path, REMEDY)
    head = head_of(folder)
    C, learned = len(header["names"]), header["learned"]
    sizes = {"n": len(header["keys"]), "D": head["config"]["dim"]}
    check_arrays(tensors, {"embeddings": "float n D", "labels": "int64 n"}, path, REMEDY, **sizes)
    check_range(tensors["labels"], 0, C, "labels", path, REMEDY)
    check_finite(tensors, path)
    check_equal(
        path,
        REMEDY,
        names=(", ".join(header["names"][:learned]), ", ".join(head["classes"])),
        characters_with_a_face=(len(tensors["labels"].unique()), C),
    )
    tensors["embeddings"] = tensors["embeddings"].float()
    return (
        tensors | header | make_gallery(tensors["embeddings"], tensors["labels"], header["learned"])
    )
