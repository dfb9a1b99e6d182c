"""Stage 6: image and tags together. Learn who it is and what the picture shows, from both; ask with the picture alone.

    python tags.py runs/NAME --data datasets/toon              # or: torchrun --nproc-per-node 8 ...
    # who it is, and tags with their probabilities
    python tags.py runs/NAME-tags PICTURE...

Reads:  an encoder (runs/NAME of pretrain.py, or a checkpoint file that common/formats.py knows) and
        datasets/NAME with tags; to use it runs/NAME-tags, pictures, and a tagger's
        selected_tags.csv
Writes: runs/NAME-tags/ state.pt (all that a resumed run needs), model.safetensors, metrics.json,
log.jsonl, curves.png,
        sheet.png, selected_tags.csv (our tags, as taggers list them); answers go to standard
        output, or to --csv

A picture often comes without tags, so hidden tags
wean the network: their share rises to all of them at the half of the run. Thresholds of tags are
chosen on dev, or on a tenth of train held apart by group; --eval-on is reported, at the half and at
the end.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import csv
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
from torch import nn
from tqdm import tqdm

import data
import mask as masking
from common import classifier, distributed, metrics, train
from common.checkpoints import (
    about_model,
    blank_encoder,
    flags_of,
    load_encoder,
    load_exactly,
    model_file,
)
from common.command import (
    Parser,
    at_least,
    between,
    claim,
    cli,
    command,
    drawing,
    progress,
    refuse_file,
    refuse_unused,
    working,
)
from common.features import name_of, open_rows, split_suffix
from common.fields import (
    CUT,
    ENCODER,
    EPSILON,
    NAMES,
    SIDE,
    check_arrays,
    check_encoder,
    check_equal,
    check_fields,
    is_name,
    list_of,
    number,
    one_of,
    shown,
    whole,
)
from common.io import (
    UserError,
    atomic,
    read_json,
    read_safetensors,
    regular,
    save_json,
    save_safetensors,
)
from common.lora import fingerprint
from ingest.pictures import pictures, tell_problems
from kernels.gather import masked_patch_gather
from model import MLP, Attention, Block, attention, init_weights, shape_of, shrink_branches

ARMS = {  # what is read, and what is learned besides the character
    "mfdn": "picture and tags; hidden tags, more and more of them, and all from the half on",
    "fixed": "picture and tags; hidden tags, always the same share",
    "vilt": "picture and tags; none is ever hidden",
    "image": "the picture alone",
    "tags": "the tags alone: what they tell of the character",
    "bce": "tags by a linear head on the frozen encoder, no characters",
    "l2l": "the picture alone; each tag by a query of its own, yes or no",
}
READS_TAGS, HIDES_TAGS = ("mfdn", "fixed", "vilt", "tags"), ("mfdn", "fixed")
NAMES_TAGS = ("mfdn", "fixed", "bce", "l2l")
MASK, PAD, CLS, SEP, SPECIAL = range(5)  # come behind the V tags: V + MASK, ...
REMEDY = "python tags.py ENCODER --data DIR makes it"
FIELDS = {
    "tags": {
        "encoder": ENCODER | {"depth": whole(2, 1000)},
        "norm_eps": EPSILON,
        "C": whole(1, 10**6),
        "V": whole(1, 10**6),
        "arm": one_of(*ARMS),
        "length": whole(2, 10**4),
    },
    "words": NAMES,
    "classes": NAMES,
    "thresholds?": list_of(number(-1, 2)),
    "image_size": SIDE,
} | CUT
TOP = 25  # the most frequent tags, of which the error is told apart
MOST = 1000  # the most frequent tags are asked for one by one: it takes half a minute
FEWEST = 8  # pictures of dev that a tag needs for a threshold of its own
GENERAL, CHARACTER = "0", "4"  # categories of tags, as boards number them
COLUMNS = ["tag_id", "name", "category", "count"]  # of selected_tags.csv
LOG_EVERY, CLIP = 10, 1.0  # steps, norm of the gradient
HEAD_LR = {"bce": 3e-2}  # a linear head on its own wants more
JUDGED = 8192  # pictures at most whose tags are judged: a number for each picture and tag is kept
SHOWN = 8  # pictures on the sheet
RESULTS = ("metrics*.json", "model.safetensors", "curves.png", "sheet*.png", "selected_tags.csv")
NO_CONFIG = (
    "out",
    "resume",
    "given",
    "log",
    "device",
    "eval_on",
    "encoder",
    "pictures",
    "json",
    "top",
    "csv",
    "like",
    "tell",
    "threshold",
)


# ---- words: a picture's tags as the network reads them -------------------------------------------


def to_words(ids, V, length, generator=None):
    """ids i64 (B, T) of tags, -1 fills up -> words (B, L): CLS, the tags from small to large ids,
    SEP, PAD.

    Where there are more than L - 2, a random subset; without a generator the first, which are the
    most frequent.
    """
    room = length - 2
    ids = F.pad(ids, (0, max(0, room - ids.shape[1])), value=-1)
    rank = torch.arange(ids.shape[1]).expand_as(ids).float()
    rank = torch.rand(ids.shape, generator=generator) if generator else rank
    pick = rank.masked_fill(ids < 0, math.inf).argsort(dim=1, stable=True)[:, :room]
    tags = ids.gather(1, pick)
    tags = tags.masked_fill(tags < 0, V + PAD).sort(1).values
    words = F.pad(tags, (1, 1), value=V + PAD)
    words[:, 0] = V + CLS
    return words.scatter(1, 1 + (tags < V).sum(1, keepdim=True), V + SEP)


def nothing_told(V, length):
    """(1, L): as many masks as there is room for. How many tags a picture has is not told either."""
    words = torch.full((1, length), V + MASK)
    words[:, 0], words[:, -1] = V + CLS, V + SEP
    return words


def hide(words, V, share, generator):
    """words (B, L) -> with this share of the tags behind masks, and which ones (B, L) bool; where none is left to be
    seen, or there was none, nothing is told."""
    tags = words < V
    hidden = tags & (torch.rand(words.shape, generator=generator) < share)
    left = (tags & ~hidden).any(1, keepdim=True)
    return torch.where(
        left, words.masked_fill(hidden, V + MASK), nothing_told(V, words.shape[1])
    ), hidden


def as_read(net, ids):
    """ids (B, T) of tags that are known, or None where no picture's are -> words (B, L), or (1, L), as this network
    learned to read them."""
    nothing = nothing_told(net.V, net.length)
    if ids is None and net.arm in HIDES_TAGS:
        return nothing
    words = to_words(torch.full((1, 1), -1) if ids is None else ids, net.V, net.length)
    return (
        torch.where((words < net.V).any(1, keepdim=True), words, nothing)
        if net.arm in HIDES_TAGS
        else words
    )


def curriculum(step, total):
    """The share of tags that is hidden: 1 - (1 + cos(2 pi s/S))/2, and 1 from the half on.

    The paper's formula falls again after the half; its text holds it.
    """
    return 1.0 if 2 * step >= total else 0.5 - 0.5 * math.cos(2 * math.pi * step / total)


def reaches(count, room):
    """How many tags each picture has (n,) -> (room,): the share of pictures that have at least 1,
    2, ... of them.
    """
    return (count[:, None] > torch.arange(room)).float().mean(0)


# ---- the network ---------------------------------------------------------------------------------


class TagEncoder(nn.Module):
    """words (B, L) -> tokens (B, L, D); a word is one token, its place in the list is learned."""

    def __init__(self, V, length, dim, depth, heads):
        super().__init__()
        self.embed = nn.Embedding(V + SPECIAL, dim)
        self.pos_token = nn.Parameter(torch.zeros(1, length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        shrink_branches(self.blocks)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.pos_token, std=0.02)

    def forward(self, words, bias):
        x = self.embed(words) + self.pos_token
        for block in self.blocks:
            x = block(x, bias=bias)
        return self.norm(x)


class CrossAttention(nn.Module):
    """As model.Attention, but x (B, Q, D) asks, and context (B, N, D) answers."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x, context):
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, Q, d)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-norm: the queries among themselves, then the picture, then an MLP; (B, Q, D) -> (B, Q,
    D).
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.cross, self.mlp = (
            Attention(dim, heads),
            CrossAttention(dim, heads),
            MLP(dim, 4 * dim),
        )

    def forward(self, x, context, bias=None):
        x = x + self.attn(self.norm1(x), bias=bias)
        x = x + self.cross(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


class TagDecoder(nn.Module):
    """Queries (B, Q, D) and the picture's tokens (B, N, D) -> (B, Q, D)."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        shrink_branches(self.blocks)

    def forward(self, x, context, bias=None):
        for block in self.blocks:
            x = block(x, context, bias)
        return self.norm(x)


class MFDN(nn.Module):
    """The network of every arm. Sizes follow the encoder: for ViT-L 12 blocks for the picture, 4 for the tags, 12 for
    both, 4 to decode. `config` is what load() builds it from."""

    def __init__(self, encoder, C, V, arm="mfdn", length=32):
        super().__init__()
        shape = shape_of(encoder)
        dim, depth, heads = (shape[k] for k in ("dim", "depth", "heads"))
        self.config = {
            "encoder": shape,
            "norm_eps": encoder.norm.eps,
            "C": C,
            "V": V,
            "arm": arm,
            "length": length,
        }
        self.encoder, self.arm, self.V, self.length = encoder, arm, V, length
        self.half, few = depth // 2, max(1, depth // 6)
        self.register_buffer("reach", torch.ones(length - 2))  # see `reaches`
        if arm in READS_TAGS:
            self.language = TagEncoder(V, length, dim, few, heads)
            self.kind_token = nn.Parameter(torch.zeros(2, dim))  # of the picture, of words
        if arm in HIDES_TAGS or arm == "l2l":
            self.decoder = TagDecoder(dim, few, heads)
        if arm == "l2l":
            self.query_token = nn.Parameter(0.02 * torch.randn(1, V, dim))
        if arm in NAMES_TAGS:
            self.tag_head = nn.Linear(dim, 1 if arm == "l2l" else V)
            nn.init.zeros_(self.tag_head.bias)
        if arm != "bce":
            self.head = nn.Linear(dim, C)
            nn.init.zeros_(self.head.bias)

    def forward(self, patches, ids, words=None, hidden=None):
        """patches (B, K, P) at places ids (B, K), words (B, L) where the arm reads them -> logits of the characters
        (B, C) or None, and of tags: (B, V) one by one, or (., V), which tag stands at each place of (B, L) that hidden
        asks for, a mask or an index; None where there are none."""
        x = None if self.arm == "tags" else self.encoder.embed(patches, ids)
        lower, upper = self.encoder.blocks[: self.half], self.encoder.blocks[self.half :]
        for block in () if x is None else lower:
            x = block(x)
        if self.arm in READS_TAGS:
            seen, bias = 0 if x is None else x.shape[1], padding(words, self.V)
            language = self.language(words, bias) + self.kind_token[1]
            x = language if x is None else torch.cat([x + self.kind_token[0], language], 1)
            bias = F.pad(bias, (seen, 0))
        else:
            seen, bias = x.shape[1], None
        for block in upper:
            x = block(x, bias=bias)
        x, tags = self.encoder.norm(x), None
        if self.arm == "bce":
            tags = x[:, 1:].mean(1)
        elif self.arm == "l2l":
            tags = self.decoder(self.query_token.expand(x.shape[0], -1, -1), x)
        elif self.arm in HIDES_TAGS and hidden is not None:
            tags = self.decoder(x[:, seen:], x[:, :seen], bias[..., seen:])[hidden]
        with torch.autocast(
            x.device.type, enabled=False
        ):  # logits in fp32, whatever the rest is in
            characters = None if self.arm == "bce" else self.head(x[:, 0].float())
            tags = None if tags is None else self.tag_head(tags.float())
        return characters, tags[:, :, 0] if self.arm == "l2l" else tags


def padding(words, V):
    """words (B, L) -> (B, 1, 1, L): minus infinity where there is no word, for attention."""
    return torch.zeros(words.shape, device=words.device).masked_fill(words == V + PAD, -math.inf)[
        :, None, None
    ]


# ---- what it says of a picture -------------------------------------------------------------------


@torch.no_grad()
def answers(net, view, ids=None, ask_tags=True):
    """view u8 (B, S, S, 3), whole; ids (B, T) of tags that are known, -1 fills up, None: none are.

    -> logits (B, C) of characters, None of arm bce; probabilities (B, V) of tags, from the picture
    alone, None where
    ids are given, nobody asks, or the arm names none. Where hidden tags are named one by one, a
    picture has a tag if it
    stands at any place: the sum over places of (share of pictures that get there) * (probability
    that it stands there).
    """
    ask_tags, words = ask_tags and ids is None and net.arm in NAMES_TAGS, None
    if net.arm in READS_TAGS:
        words = as_read(net, ids).to(view.device).expand(view.shape[0], -1)
    every = (slice(None), slice(1, -1)) if ask_tags else None  # place of a tag: between CLS and SEP
    characters, tags = net(*net.encoder.all_patches(view), words, every)
    if not ask_tags:
        return characters, None
    if net.arm in HIDES_TAGS:
        return characters, (net.reach[:, None] * tags.softmax(2)).sum(1).clamp(
            max=1
        )  # of (B, R, V)
    return characters, tags.sigmoid()


def named(tags, header, threshold=None, most=15):
    """Probabilities (V,) -> {tag: probability} of those over their thresholds, or over this one,
    the highest first.
    """
    least = (
        torch.tensor(header["thresholds"])
        if threshold is None
        else torch.full_like(tags, threshold)
    )
    over = (tags >= least).nonzero()[:, 0]
    best = over[tags[over].argsort(descending=True, stable=True)].tolist()[:most]
    return {header["words"][i]: round(tags[i].item(), 4) for i in best}


def in_words(tags):
    """What `named` found, as text."""
    return ", ".join(f"{tag} {p:.2f}" for tag, p in tags.items())


# ---- files ---------------------------------------------------------------------------------------


def save_tagger(net, path, about):
    """model.safetensors of a run; about joins the header: words, classes, thresholds, how pictures
    were cut.
    """
    save_safetensors(net.state_dict(), path, {"tags": net.config, **about})


def is_tagger(path):
    """Did tags.py write this run folder?"""
    return "tags" in about_model(path)


def load_tagger(folder):
    """runs/NAME of tags.py -> (MFDN in eval mode, header of its model file)."""
    path = model_file(folder)
    weights, header = read_safetensors(path, REMEDY)
    check_fields(header, FIELDS, path, REMEDY)
    config, words = header["tags"], len(header["words"])
    rows = {"reach": "float R", "head.weight?": "float C D", "tag_head.bias?": "float V"}
    sizes = {"R": config["length"] - 2, "C": config["C"], "D": config["encoder"]["dim"]}
    sizes["V"] = 1 if config["arm"] == "l2l" else words
    check_equal(
        path,
        REMEDY,
        classes=(len(header["classes"]), config["C"]),
        words=(words, config["V"]),
        thresholds=(len(header.get("thresholds") or []), words * (config["arm"] in NAMES_TAGS)),
        image_size=(header["image_size"], config["encoder"]["image_size"]),
    )
    check_encoder(weights, config["encoder"], path, REMEDY, "encoder.")
    check_arrays(weights, rows, path, REMEDY, **sizes)
    encoder = blank_encoder(config["encoder"], config["norm_eps"])
    net = MFDN(encoder, config["C"], config["V"], config["arm"], config["length"])
    load_exactly(net, weights, path)
    return net.eval(), header


# ---- how tags are judged --------------------------------------------------------------------


def many_hot(ids, V):
    """ids (n, T) of tags, -1 fills up; those from V on are left out -> (n, V) bool: which picture
    has which tag.
    """
    ids, hot = np.asarray(ids), np.zeros((len(ids), V + 1), bool)
    hot[np.arange(len(ids))[:, None], np.where((ids < 0) | (ids >= V), V, ids)] = True
    return hot[:, :V]


def has_tags(split):
    """Does a packed split bring lists of tags?"""
    return "tags" in split


def average_precisions(scores, truth):
    """-> (V,) average precision of each tag, nan of one that no picture has, and of those behind
    the MOST first.
    """
    from sklearn.metrics import average_precision_score

    found = np.full(truth.shape[1], np.nan)
    for tag in truth[:, :MOST].any(0).nonzero()[0]:
        found[tag] = average_precision_score(truth[:, tag], scores[:, tag])
    return found


def best_threshold(scores, truth):
    """scores (n,), truth (n,) bool -> the score from which on F1 is best, half way to the next one
    below.
    """
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(truth[order])
    last = np.r_[np.diff(scores[order]) < 0, True]  # equal scores are taken together
    at = int(np.argmax(np.where(last, f1(right, np.arange(1, len(order) + 1), truth.sum()), -1)))
    below = scores[order[at + 1]] if at + 1 < len(order) else 0.0
    return float((scores[order[at]] + below) / 2)


def common_threshold(scores, truth, bins=10_000):
    """The same for all tags together, by counts of scores in bins: there may be two hundred
    million.
    """
    edges = np.linspace(0, 1, bins + 1)
    said, right = (np.histogram(x, edges)[0][::-1].cumsum()[::-1] for x in (scores, scores[truth]))
    return float(edges[np.argmax(f1(right, said, truth.sum()))])


def fit_thresholds(scores, truth):
    """-> (V,): of each tag the threshold that is best for its F1, of a rare one that which is best
    for all together.
    """
    common = common_threshold(scores, truth)
    enough = truth.sum(0) >= FEWEST
    return np.array(
        [
            best_threshold(scores[:, t], truth[:, t]) if enough[t] else common
            for t in range(len(enough))
        ]
    )


def f1(right, said, there):
    """Counts -> F1, 0 where nothing was said and nothing is there."""
    return 2 * right / np.maximum(said + there, 1)


def judge(scores, truth, thresholds):
    """-> {"map", "micro_f1", "macro_f1", "error", "error_top"} in percent, and "ap", each tag's, None of one that no
    picture has. map and macro_f1 are means over tags that some picture has (map: of the MOST most frequent ones);
    error: wrong among all yes and no."""
    said, there = scores >= thresholds, truth.any(0)
    right, ap = said & truth, average_precisions(scores, truth)
    wrong, top = (said != truth).mean(0), np.argsort(-truth.sum(0), kind="stable")[:TOP]
    row = {
        "map": np.nanmean(ap),
        "micro_f1": f1(right.sum(), said.sum(), truth.sum()),
        "error": wrong.mean(),
        "macro_f1": f1(right.sum(0), said.sum(0), truth.sum(0))[there].mean(),
        "error_top": wrong[top].mean(),
    }
    return {k: round(100 * float(x), 3) for k, x in row.items()} | {
        "ap": [None if np.isnan(x) else round(100 * float(x), 2) for x in ap[:MOST]]
    }


def four_kinds(said, given, truth):
    """What was said of pictures, what they are filed under, what is true, bool (n, V) each ->
    {kind: bool (n, V)}.
    """
    return {
        "right": said & given,
        "missed": given & ~said,
        "new but true": said & truth & ~given,
        "new and false": said & ~truth & ~given,
    }


# ---- what frozen features know of tags and of style ----------------------------------------------

PENALTIES = 1e-3, 1e-2, 1e-1  # of the squared weights
STEPS = 60  # of L-BFGS


def many_logistic(x, truth, penalty):
    """x (n, D) standardised, truth fp32 (n, V) -> W (D, V), b (V,): a logistic regression for each
    tag, all at once.
    """
    W, b = (
        torch.zeros(shape, requires_grad=True)
        for shape in ((x.shape[1], truth.shape[1]), truth.shape[1])
    )
    solver = torch.optim.LBFGS([W, b], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        error = (
            F.binary_cross_entropy_with_logits(x @ W + b, truth)
            + penalty / truth.shape[1] * W.square().sum()
        )
        error.backward()
        return error

    solver.step(closure)
    return W.detach(), b.detach()


def tag_row(features, truths, words):
    """features (n, D) and truths (n, V) bool of what is fitted, chosen on, reported -> map,
    penalty, ap of each.

    As many logistic regressions as tags; the one penalty of all is that which is best on what is
    chosen on.
    """
    (x, choose, report), (y, truth, judged) = features, (some.numpy() for some in truths)
    z = [some.float() for some in metrics.standardise(x, choose, report)]
    fits = {p: many_logistic(z[0], torch.from_numpy(y).float(), p) for p in PENALTIES}

    def score(z, fit):
        return (z @ fit[0] + fit[1]).numpy()

    best = max(PENALTIES, key=lambda p: np.nanmean(average_precisions(score(z[1], fits[p]), truth)))
    ap = average_precisions(score(z[2], fits[best]), judged)
    return {
        "map": float(np.nanmean(ap)),
        "penalty": best,
        "ap": {
            w: None if np.isnan(a) else round(float(a), 4) for w, a in zip(words, ap, strict=True)
        },
    }


def style_row(features, styles, groups, strata):
    """styles u8 (n, 3) of what is fitted and reported -> {stratum: {"top1", "macro_f1", "guess"}} by the headline's
    logistic regression; guess: of the most frequent value."""
    (x, _, report), (y, _, truth), row = features, styles, {}
    for i, (name, values) in enumerate(strata.items()):
        learned, labels = y[:, i].long(), truth[:, i].long()
        scores, _ = metrics.logistic_probe(x, learned, len(values), groups)
        said = scores(report).argmax(1)
        row[name] = {
            "top1": (said == labels).double().mean().item(),
            "macro_f1": metrics.macro_f1(said, labels),
            "guess": (labels == learned.mode().values).double().mean().item(),
        }
    return row


# ---- lists of tags as the WD taggers have them ---------------------------------------------------


def read_selected(path):
    """selected_tags.csv: columns tag_id, name, category, count -> list of its rows, in its order."""
    try:
        with open(regular(path), newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"{path} can't be read as a list of tags: {problem}") from None
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise UserError(
            f"{path} is no list of tags: its first line has to name {', '.join(COLUMNS)}"
        )
    names = [row["name"] for row in rows]
    for at, row in enumerate(rows):
        if not is_name(row["name"]) or not row["category"] or row["name"] in names[:at]:
            raise UserError(
                f"{path}, entry {at + 1} is no tag of its own, with name and category: {row['name']!r}"
            )
    return rows


def write_selected(path, words, counts):
    """The same of ours: ids are places in the list, counts pictures of train."""
    rows = [
        [i, word, GENERAL, int(n)] for i, (word, n) in enumerate(zip(words, counts, strict=True))
    ]
    write_csv(path, [COLUMNS, *rows])


def write_csv(path, rows):
    """Write an iterable of rows as they come, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def in_their_order(selected, words, classes):
    """Rows of selected_tags.csv -> for each the column of ours, [tags, then characters] or -1; and
    those they lack.

    Names are compared in lower case, with _ for spaces; their characters are our classes.
    """

    def plain(name):
        return name.strip().lower().replace(" ", "_")

    tags = {plain(w): i for i, w in enumerate(words)}
    people = {plain(c): len(words) + i for i, c in enumerate(classes)}
    columns = []
    for row in selected:
        names = people if row["category"] == CHARACTER else tags
        columns.append(names.get(plain(row["name"]), -1))
    theirs = {plain(row["name"]) for row in selected}
    return np.array(columns), [w for w in words if plain(w) not in theirs]


# ---- the sheet -----------------------------------------------------------------------------------

SIGNS = {
    "right": "+",
    "missed": "-",
    "new but true": "*",
    "new and false": "x",
}  # where colours can't be told apart


def draw_sheet(path, title, images, kinds, words, names):
    """Pictures u8 (n, S, S, 3), the four kinds of their tags (n, V), (true name, said name) of each
    -> sheet.png.
    """
    from common import plots

    columns, colours = (
        2,
        dict(zip(SIGNS, (plots.BLUE, "#999999", plots.GREEN, "#D55E00"), strict=True)),
    )
    rows = -(-len(images) // columns)
    title += "\n" + "     ".join(f"{sign} {kind}" for kind, sign in SIGNS.items())
    with plots.panels(
        path,
        title,
        rows,
        2 * columns,
        (11, 2.15 * rows + 0.9),
        squeeze=False,
        gridspec_kw={"width_ratios": [1, 1.75] * columns},
    ) as axes:
        for axis in axes.flat:
            axis.axis("off")
        for i, (image, (true, said)) in enumerate(zip(images, names, strict=True)):
            picture, text = axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
            picture.imshow(image)
            picture.set_title(
                true if true == said else f"{true}, said: {said}", fontsize=8, loc="left"
            )
            lines = [
                (k, line)
                for k in SIGNS
                for line in lines_of(k, [words[t] for t in kinds[k][i].nonzero()[0]])
            ]
            for at, (kind, line) in enumerate(lines):
                text.text(
                    0,
                    1 - at * 0.105,
                    line,
                    color=colours[kind],
                    fontsize=7.5,
                    va="top",
                    family="monospace",
                )


def lines_of(kind, tags, width=40, most=4):
    """Tags of a kind -> lines of so many letters, the sign before each tag."""
    lines, line = [], ""
    for tag in tags:
        if len(line) + len(tag) + 3 > width and line:
            lines.append(line)
            line = ""
        line += f"{SIGNS[kind]}{tag} "
    lines += [line] * bool(line)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + "..."]


# ---- the command line ----------------------------------------------------------------------


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="runs/NAME, or a checkpoint of MAE, DINO, timm or HF; "
        "to use what was learned runs/NAME-tags",
    )
    parser.add_argument(
        "pictures",
        nargs="*",
        metavar="PICTURE",
        help="file, folder, archive, - for a list of files",
    )
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add(
        "--data",
        metavar="DIR",
        help="set with labels and tags (default: what the encoder learned from, or toon)",
    )
    add(
        "--out",
        metavar="DIR",
        help="run folder (default: the encoder's, tags, and the flags that matter)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint",
    )
    add("--eval-on", default="val", choices=["val", "test"], help="split that is reported")
    add = parser.add_argument_group("what is learned").add_argument
    arms = "\n".join(f"{arm}: {text}" for arm, text in ARMS.items())
    add("--arm", default="mfdn", choices=ARMS, help=arms)
    add(
        "--tag-ratio",
        type=between(0, 1),
        default=0.5,
        metavar="R",
        help="share of tags that --arm fixed hides",
    )
    add(
        "--tag-weight",
        type=between(0, 100),
        default=0.3,
        metavar="W",
        help="of the tags' loss beside the character's",
    )
    add(
        "--length",
        type=between(4, 512, int),
        metavar="L",
        help="places for words; two hold no tag (default: 32, or\n"
        "fewer where no picture has so many)",
    )
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(2), default=30, help="passes over the data")
    add("--batch-size", type=at_least(1), default=32, metavar="B", help="images for one step")
    add("--lr", type=between(0, 1), default=5e-4, help="peak learning rate of the encoder")
    add(
        "--head-lr",
        type=between(1e-9, 1),
        metavar="LR",
        help="of what is new (default: 1e-3; of --arm bce 3e-2)",
    )
    add(
        "--layer-decay",
        type=between(0.01, 1),
        default=0.9,
        metavar="D",
        help="a block learns at D times the next",
    )
    add("--weight-decay", type=between(0, 10), default=0.05, metavar="W", help="of matrices")
    add(
        "--warmup",
        type=between(0, 1),
        default=0.1,
        metavar="SHARE",
        help="share of the run with a rising rate",
    )
    add(
        "--optimizer",
        default="adamw",
        choices=["adamw", "sgd"],
        help="sgd, with momentum .9, is the paper's",
    )
    add(
        "--schedule",
        default="cosine",
        choices=["cosine", "two-stage"],
        help="two-stage is the paper's: 1 to .6 in three fifths of the run, .6 to 0 in the rest",
    )
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help="of weights, order, augmentation and hidden tags",
    )
    add(
        "--keep",
        type=between(0.01, 1),
        default=0.25,
        metavar="SHARE",
        help="of the patches shown in training",
    )
    add(
        "--min-crop",
        type=between(0.01, 1),
        default=0.5,
        metavar="AREA",
        help="smallest share of an image in a crop",
    )
    add(
        "--colour",
        type=between(0, 1),
        default=0.2,
        metavar="X",
        help="brightness, contrast, saturation times 1 +- X",
    )
    add = parser.add_argument_group("what is said of pictures").add_argument
    add(
        "--tell",
        metavar="WORDS",
        help="tags of the pictures that are known, with spaces between them",
    )
    add(
        "--threshold",
        type=between(0, 1),
        metavar="P",
        help="of every tag (default: its own, from dev)",
    )
    add("--top", type=at_least(1), default=15, metavar="N", help="tags that are named at most")
    add("--json", action="store_true", help="print a JSON object a picture")
    add("--csv", metavar="FILE", help="a row a picture, a column a tag, instead of lines")
    add(
        "--like",
        metavar="FILE",
        help="selected_tags.csv of a tagger: --csv gets its columns, in its order",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    add(
        "--log",
        type=train.trackers,
        default=(),
        metavar="NAMES",
        help="tensorboard,wandb beside log.jsonl",
    )
    return parser.parse_intermixed_args()


def refuse_flags(args):
    training, hides = not args.pictures, args.arm in HIDES_TAGS
    frozen, blind = args.arm == "bce", args.arm == "tags"
    refuse_unused(
        args,
        (
            (
                "data out resume eval-on arm tag-ratio tag-weight length epochs batch-size lr head-lr layer-decay "
                "weight-decay warmup optimizer schedule seed keep min-crop colour log",
                training,
                "is for training, not for pictures",
            ),
            (
                "tell threshold top json csv like",
                not training,
                "is for pictures: python tags.py runs/NAME-tags PICTURE",
            ),
            ("tag-ratio", args.arm == "fixed", f"is for --arm fixed, not for {args.arm}"),
            (
                "tag-weight",
                hides or args.arm == "l2l",
                f"is for arms with a loss of both, not for {args.arm}",
            ),
            (
                "length",
                args.arm in READS_TAGS,
                f"is for arms that read tags, not for {args.arm}",
            ),
            (
                "lr layer-decay",
                not frozen,
                "is for what learns in the encoder; --arm bce has --head-lr alone",
            ),
            ("keep min-crop colour", not blind, "is for pictures, and --arm tags sees none"),
            ("like", args.csv is not None, "is for --csv FILE"),
            (
                "threshold top json",
                args.csv is None,
                "is for lines; --csv writes every probability",
            ),
            (
                "tell",
                args.csv is None or args.like is not None,
                "changes who it is, and --csv without --like writes tags alone",
            ),
        ),
    )
    if args.tell is not None and not args.tell.strip():
        raise UserError("--tell is empty; give tags, or leave it out")


# ---- the data: pictures, characters, tags --------------------------------------------------------


def open_task(args, device, autocast):
    """-> what a run works with, a namespace; the comments say what is in it."""
    task = SimpleNamespace(device=device, autocast=autocast, arm=args.arm)
    (task.train, task.dev, task.report), task.classes = open_rows(
        args.data, args.eval_on, hold_out=0
    )
    task.words = task.train.split["header"]["tags"]
    for images in (task.train, task.dev, task.report):
        if not has_tags(images.split) or not (images.split["tags"][images.rows.numpy()] >= 0).any():
            raise UserError(
                f"{args.data}, {images.name} has no tags; a table with a column of them, or "
                "metadata.jsonl, brings them: python data.py IT --out DIR"
            )
    task.each = torch.from_numpy((task.train.split["tags"] >= 0).sum(1))[
        task.train.rows
    ]  # tags of a picture
    args.length = args.length or min(32, max(2, int(task.each.max())) + 2)
    encoder, task.S = load_encoder(args.encoder)  # S: side of a view
    if len(encoder.blocks) < 2:
        raise UserError(
            f"{args.encoder} has one block, and half of the blocks see the picture alone; give 2 or more"
        )
    torch.manual_seed(args.seed)
    base = fingerprint(encoder)  # before training
    task.net = MFDN(encoder, len(task.classes), len(task.words), args.arm, args.length).to(device)
    encoder.requires_grad_(args.arm != "bce")
    task.net.reach.copy_(reaches(task.each, args.length - 2))
    config = {
        k: v for k, v in vars(args).items() if k not in NO_CONFIG
    }  # a run is resumed under the same
    task.config = config | {"encoder": base, "images": data.fingerprint(task.train.split)}
    return task


def tags_of(images, rows, plane="tags"):
    """rows (n,) of a split -> ids i64 (n, T), -1 fills up; plane "all_tags": the truth, where a set
    knows it.
    """
    return torch.from_numpy(np.array(images.split[plane][rows.numpy()])).long()


def truth_of(images, rows, V, plane="tags"):
    """-> (n, V) bool."""
    return many_hot(tags_of(images, rows, plane), V)


def rows_judged(images):
    return images.rows[data.evenly_spaced(len(images.rows), JUDGED)]


def augment(images, args, task, B, mine, generator):
    """images u8 (b, ., ., 3), this process's slice `mine` of B -> patches (b, K, P), places (b, K),
    drawn for all B.
    """
    boxes, flip = data.draw_boxes(B, generator, args.min_crop)
    colour, N = torch.rand(B, 3, generator=generator), task.net.encoder.side**2
    noise, K = torch.rand(B, N, generator=generator), max(1, round(args.keep * N))
    view = data.view_images(images, boxes[mine], flip[mine], task.S)
    view = data.jitter_colour(view, colour[mine], args.colour)
    ids, _ = masking.sample(noise[mine].to(view.device), K)
    return masked_patch_gather(view, ids, task.net.encoder.patch_size), ids


# ---- how good it is ------------------------------------------------------------------------------


@torch.no_grad()
def characters(task, images, name=""):
    """Top-1 and Top-5 of whole pictures, in percent: {"with_top1", "with_top5"} with their tags, {"without_top1",
    "without_top5"} without, those that the arm has."""
    net, ranks = task.net.eval(), {"with": [], "without": []}
    chunks = data.whole_views(images.split["images"], images.rows, task.S, task.device)
    for index, view in progress(
        chunks, name, -(-len(images.rows) // data.CHUNK), leave=False, disable=not name
    ):
        asked = {"with": tags_of(images, index)} if task.arm in READS_TAGS else {}
        for key, ids in (asked | ({} if task.arm == "bce" else {"without": None})).items():
            with task.autocast():
                logits, _ = answers(net, view, ids, ask_tags=False)
            order = logits.cpu().argsort(dim=1, descending=True, stable=True)
            ranks[key].append((order == images.labels[index][:, None]).int().argmax(1))
    return {
        f"{key}_top{k}": round(100 * (torch.cat(rank) < k).double().mean().item(), 3)
        for key, rank in ranks.items()
        if rank
        for k in (1, 5)
    }


@torch.no_grad()
def answers_of(task, images, rows):
    """Whole pictures alone -> the most probable class of each (n,), None of arm bce; scores of tags
    (n, V).
    """
    guesses, scores = [], []
    for _, view in data.whole_views(images.split["images"], rows, task.S, task.device):
        with task.autocast():
            logits, tags = answers(task.net.eval(), view)
        guesses += [] if logits is None else [logits.argmax(1).cpu()]
        scores.append(tags.cpu())
    return torch.cat(guesses) if guesses else None, torch.cat(scores).numpy()


def judge_tags(task, scores):
    """Scores (n, V) of the reported split -> rows of numbers, as filed and against the truth; mAP on dev, as filed;
    thresholds, which are chosen there."""
    dev, report, V = rows_judged(task.dev), rows_judged(task.report), len(task.words)
    (_, on_dev), filed = answers_of(task, task.dev, dev), truth_of(task.dev, dev, V)
    thresholds = fit_thresholds(on_dev, filed)
    planes = {"tags": "tags", "tags_truth": "all_tags"}
    truths = {
        k: truth_of(task.report, report, V, plane)
        for k, plane in planes.items()
        if plane in task.report.split
    }
    rows = {key: judge(scores, truth, thresholds) for key, truth in truths.items()}
    if "tags_truth" in truths:
        kinds = four_kinds(scores >= thresholds, truths["tags"], truths["tags_truth"])
        rows["tags_truth"]["counts"] = {kind: int(some.sum()) for kind, some in kinds.items()}
    return rows, judge(on_dev, filed, thresholds)["map"], thresholds


# ---- training ------------------------------------------------------------------------------------


def make_optimizer(net, args):
    """AdamW or SGD over the groups of common/classifier.py; "peak" of a group is its learning rate."""
    adamw = classifier.make_optimizer(
        net, args.lr, args.head_lr, args.weight_decay, args.layer_decay
    )
    if args.optimizer == "adamw":
        return adamw
    groups = [
        {k: group[k] for k in ("params", "peak", "weight_decay")} for group in adamw.param_groups
    ]
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


def rate(step, total, args):
    """The share of its peak that a learning rate has: warm-up, then a cosine to 0, or the paper's
    two of them.
    """
    if args.schedule == "cosine" or step < args.warmup * total:
        return train.lr_at(step, total, args.warmup * total, 1.0)
    at = step / total
    return (
        0.8 + 0.2 * math.cos(math.pi * at / 0.6)
        if at < 0.6
        else 0.3 + 0.3 * math.cos(math.pi * (at - 0.6) / 0.4)
    )


def losses(net, batch, y, B):
    """This process's share of the losses of a batch of B, the character's and the tags', sums over
    all processes.

    batch: patches, ids, words, hidden, targets, count. Where tags are hidden, cross-entropy at each
    hidden place, mean over the `count` of the whole batch; else binary, over all tags, per tag that
    is there.
    """
    logits, tags = net(batch.patches, batch.ids, batch.words, batch.hidden)
    who = (
        0.0 * net.reach.sum() if logits is None else F.cross_entropy(logits, y, reduction="sum") / B
    )
    if tags is None:
        return who, torch.zeros_like(who)
    if batch.hidden is None:
        return who, F.binary_cross_entropy_with_logits(
            tags, batch.targets, reduction="sum"
        ) / batch.count
    return who, F.cross_entropy(tags, batch.targets, reduction="sum") / batch.count


def make_batch(args, task, rows, images, share, mine, generator):
    """What one step works on, drawn for the whole batch and cut to this process's slice: see
    `losses`.
    """
    B, V, batch = (
        len(rows),
        len(task.words),
        SimpleNamespace(patches=None, ids=None, words=None, hidden=None),
    )
    if args.arm != "tags":
        batch.patches, batch.ids = augment(images, args, task, B, mine, generator)
    if args.arm in READS_TAGS:
        words = truth = to_words(tags_of(task.train, rows), V, args.length, generator)  # (B, L)
        if args.arm in HIDES_TAGS:
            words, hidden = hide(truth, V, share, generator)
            batch.count, batch.hidden = max(1, int(hidden.sum())), hidden[mine].to(task.device)
            batch.targets = truth[mine][hidden[mine]].to(task.device)
        batch.words = words[mine].to(task.device)
    elif args.arm in NAMES_TAGS:
        there = torch.from_numpy(truth_of(task.train, rows, V)).float()
        batch.targets, batch.count = there[mine].to(task.device), max(1.0, float(there.sum()))
    return batch


def save_run(args, task, optimizer, step, seconds, half):
    state = {
        "config": task.config,
        "model": task.net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "half": half,
    }
    train.save_state(state, Path(args.out) / "state.pt")


def start_message(args, task, per_epoch, B, step):
    count = sum(p.numel() for p in task.net.parameters() if p.requires_grad)
    return (
        f"data     {args.data}: {len(task.train.rows):,} images, {len(task.classes)} characters, "
        f"{len(task.words)} tags, {task.each.double().mean():.1f} an image\n"
        f"model    --arm {args.arm}: {ARMS[args.arm]}; {count:,} parameters learn\n"
        f"run      {args.out}: {args.epochs} epochs of {per_epoch} steps of {B} images"
        + (f", from step {step}" if step else "")
    )


def fit(args, device, autocast):
    """One run -> its row of metrics. A finished one is only read."""
    rank, world = distributed.place()
    task, out = open_task(args, device, autocast), Path(args.out)
    net, rows_train = task.net, task.train.rows
    optimizer = make_optimizer(net, args)
    state = train.open_run(out, task.config, args.resume, RESULTS)
    finished = out / f"metrics{split_suffix(args.eval_on)}.json"
    if state and finished.exists():
        print(f"run      {out} is finished")
        return read_json(finished, ["end"])
    B = min(args.batch_size, len(rows_train))
    if B % world:
        raise UserError(
            f"--batch-size must be divisible by processes: {B} is not by {world}; choose another"
        )
    mine = slice(
        rank * B // world, (rank + 1) * B // world
    )  # rows of a batch that this process works on
    per_epoch = len(rows_train) // B
    total = per_epoch * args.epochs
    images = data.resident(task.train.split, device)

    step, seconds, half = 0, 0.0, {}
    with train.taking_up(out / "state.pt"):
        if state:
            load_exactly(net, state["model"], out / "state.pt")
            train.load_optimizer(optimizer, state["optimizer"])
            step, seconds, half = state["step"], state["seconds"], state["half"]
    log = train.Log(
        out / "log.jsonl", step if state else -1, args.log, task.config, write=rank == 0
    )
    print(start_message(args, task, per_epoch, B, step))
    stop_signal, meter, pacer, parts = (
        train.catch_signals(),
        train.Meter(B, device, seconds),
        train.Pacer(),
        [],
    )
    bar = progress(total=total, initial=step, unit="step", disable=rank > 0)

    for epoch in range(step // per_epoch, args.epochs):
        order = rows_train[data.epoch_order(len(rows_train), args.seed, epoch)]
        for rows, some in meter.timed(
            data.batches(images, order, B, device, step % per_epoch, mine)
        ):
            # view and tags; all random numbers are drawn here, on the CPU
            share = args.tag_ratio if args.arm == "fixed" else curriculum(step, total)
            batch = make_batch(
                args, task, rows, some, share, mine, train.seeded(args.seed, epoch, step)
            )

            # forward, loss, backward
            with autocast():
                who, what = losses(net.train(), batch, task.train.labels[rows][mine].to(device), B)
            loss = who + args.tag_weight * what
            loss.backward()

            # update
            distributed.all_reduce_gradients(net.parameters())
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, total, args)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # log, evaluate, save
            bar.update()
            meter.add(loss.detach(), grad_norm)
            parts.append(torch.stack([who.detach(), what.detach()]))
            stop, ended = (
                distributed.largest(stop_signal[0] if stop_signal else 0),
                step % per_epoch == 0,
            )
            if step % LOG_EVERY == 0 or ended or stop:
                row = meter.row(
                    step,
                    f"{out}/state.pt keeps the last good state. Try smaller learning rates than "
                    f"--lr {args.lr:g} --head-lr {args.head_lr:g}",
                )
                of_who, of_tags = distributed.all_reduce(torch.stack(parts).mean(0)).tolist()
                shares = {"hidden": share} if args.arm in HIDES_TAGS else {}
                log(
                    step=step,
                    epoch=round(step / per_epoch, 4),
                    lr=group["lr"],
                    character_loss=of_who,
                    tag_loss=of_tags,
                    **shares,
                    **row,
                )
                parts = []
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if ended:
                row = characters(task, task.dev)
                log(
                    step=step,
                    epoch=epoch + 1,
                    **{f"dev_{k}": x for k, x in row.items()},
                    seconds=meter.seconds(),
                )
                tqdm.write(f"epoch {epoch + 1:<4} dev " + accuracy_in_words(row))
                if epoch + 1 == args.epochs // 2:
                    half = {args.eval_on: characters(task, task.report, "reported split")}
            if rank == 0 and (stop or step == total or ended and pacer.due()):
                pacer.time(save_run, args, task, optimizer, step, meter.seconds(), half)
                meter.restart()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    row = {} if rank > 0 else write_results(args, task, half, B, meter)
    log.pictures()
    return row


# ---- after the loop ------------------------------------------------------------------------------


def accuracy_in_words(row):
    """{"with_top1": .., "without_top1": ..} -> "Top-1 78.0 % with tags, 60.2 % without"."""
    said = [
        f"{row[f'{key}_top1']:.1f} % {text}"
        for key, text in (("with", "with tags"), ("without", "without"))
        if f"{key}_top1" in row
    ]
    return f"Top-1 {', '.join(said)}" if said else "no characters"


def write_results(args, task, half, B, meter):
    """Judge the network on pictures that decided nothing, and write all files but state.pt -> the
    row of metrics.
    """
    out, suffix = Path(args.out), split_suffix(args.eval_on)
    end = characters(task, task.report, "reported split")
    log = train.read_log(out / "log.jsonl")
    steps, dev = (
        [row for row in log if "loss" in row],
        [row for row in log if "loss" not in row][-1],
    )
    row = {
        "run": out.name,
        "arm": args.arm,
        "seed": args.seed,
        "data": args.data,
        "evaluated_on": args.eval_on,
        "half": half.get(args.eval_on, {}),
        "end": end,
        "dev": {k.removeprefix("dev_"): x for k, x in dev.items() if k.startswith("dev_")},
        "parameters": sum(p.numel() for p in task.net.parameters()),
        "step_ms": round(float(np.median([1000 * B / r["images_per_s"] for r in steps])), 2),
        "peak_memory_mb": max(r["memory_mb"] for r in steps),
        "seconds": meter.seconds(),
        "config": task.config,
        "command": command(),
        "machine": train.machine(task.device),
        "commit": train.commit(),
    }
    guesses = scores = thresholds = None
    if args.arm in NAMES_TAGS:
        with working("judging tags"):
            guesses, scores = answers_of(task, task.report, rows_judged(task.report))
            judged, dev_map, thresholds = judge_tags(task, scores)
        row |= judged | {"dev": row["dev"] | {"map": dev_map}}
    split = task.train.split
    about = {
        "run": task.config,
        "words": task.words,
        "classes": task.classes,
        "image_size": task.S,
        "data": args.data,
        "thresholds": None if thresholds is None else thresholds.tolist(),
        "base": str(args.encoder),
        "packed_size": split["images"].shape[1],
        "crop": split["header"]["crop"],
        "margin": split["header"]["margin"],
    }
    save_tagger(task.net, out / "model.safetensors", about)
    ids = np.asarray(split["tags"])
    counts = np.bincount(ids[ids >= 0], minlength=len(task.words))
    write_selected(out / "selected_tags.csv", task.words, counts)
    # behind all files of the network: where it stands, the run is finished
    save_json(row, out / f"metrics{suffix}.json")
    with drawing("curves.png or sheet.png"):
        draw(args, task, log, guesses, scores, thresholds)
    best = row.get("tags_truth") or row.get("tags")
    print(f"{args.eval_on:<9}{accuracy_in_words(end)}")
    if best:
        print(
            "tags     mAP {map:.1f} %, F1 {micro_f1:.1f} % (micro), {macro_f1:.1f} % (macro)".format(
                **best
            )
        )
    print(
        f"wrote    {out}/ after {row['seconds']:.0f} s\nnext: python tags.py {shlex.quote(str(out))} PICTURE"
    )
    return row


def draw(args, task, log, guesses, scores, thresholds):
    """curves.png, and of an arm that names tags sheet.png: tags right, missed, new but true, new
    and false.
    """
    from common import plots

    out = Path(args.out)
    plots.tag_curves(out / "curves.png", log, f"{out.name} on {Path(args.data).name}")
    if thresholds is None:
        return
    rows, V = rows_judged(task.report), len(task.words)
    some = data.evenly_spaced(len(rows), SHOWN)
    given = truth_of(task.report, rows[some], V)
    truth = truth_of(
        task.report, rows[some], V, "all_tags" if "all_tags" in task.report.split else "tags"
    )
    kinds = four_kinds(scores[some.numpy()] >= thresholds, given, truth)
    true = [task.classes[c] for c in task.report.labels[rows[some]]]
    guess = true if guesses is None else [task.classes[c] for c in guesses[some]]
    path = out / f"sheet{split_suffix(args.eval_on)}.png"
    title = f"Tags of {args.eval_on}, from the picture alone: {out.name}"
    images = task.report.split["images"][rows[some].numpy()]
    draw_sheet(path, title, images, kinds, task.words, list(zip(true, guess, strict=True)))


# ---- use -----------------------------------------------------------------------------------------


def known_tags(args, net, header):
    """--tell -> ids (1, T) for every picture, None: nothing is known; tags that the run lacks are
    named and skipped.
    """
    ids, told = {word: i for i, word in enumerate(header["words"])}, (args.tell or "").split()
    if lost := [word for word in told if word not in ids]:
        print(
            f"{len(lost)} of {len(told)} tags are none of this run's, and skipped: {' '.join(lost)}",
            file=sys.stderr,
        )
    found = sorted({ids[word] for word in told if word in ids})
    if len(found) > net.length - 2:
        print(f"of {len(found)} tags the {net.length - 2} most frequent are read", file=sys.stderr)
    return torch.tensor([found]) if found else None


def refuse_arm(args, net):
    """What a run of this arm can't be asked."""
    arm, names = f"{args.encoder} is a run of --arm {net.arm}", net.arm in NAMES_TAGS
    if net.arm == "tags" and args.tell is None:
        raise UserError(f"{arm}, which sees no picture; tell it tags: --tell 'WORD WORD'")
    refuse_unused(
        args,
        (
            ("tell", net.arm in READS_TAGS, f"is for a run that reads tags, and {arm}"),
            ("csv threshold top", names, f"is for a run that names tags, and {arm}"),
        ),
    )


def predictions(args, net, header, device, autocast, problems):
    """Yield (key, probabilities of characters (C,) or None, of tags (V,) or None) of each picture."""
    known = known_tags(args, net, header)
    items = pictures(
        args.pictures, header["packed_size"], header["crop"], header["margin"], problems
    )
    while some := list(itertools.islice(items, data.CHUNK)):
        keys, images = zip(*some, strict=True)
        images = torch.from_numpy(np.stack(images)).to(device)
        view = data.view_images(images, *data.full_boxes(len(images)), header["image_size"])
        with autocast():
            logits, tags = answers(net, view)
            if known is not None:
                logits, _ = answers(net, view, known.expand(len(images), -1))
        logits, tags = (None if x is None else x.cpu() for x in (logits, tags))
        for i, key in enumerate(keys):
            yield (
                key,
                None if logits is None else logits[i].softmax(0),
                None if tags is None else tags[i],
            )


def say(args, header, key, characters, tags):
    """What is printed of one picture: a dict."""
    row = {"picture": key}
    if characters is not None:
        row |= {
            "name": header["classes"][characters.argmax()],
            "confidence": round(characters.max().item(), 4),
        }
    if tags is not None:
        row["tags"] = named(tags, header, args.threshold, args.top)
    return row


def line(row):
    who = f"{row['name']} {row['confidence']:.0%}; " if "name" in row else ""
    return f"{shown(row['picture'])}: {who}{in_words(row.get('tags', {}))}".removesuffix("; ")


def use(args, device, autocast):
    """Say of each picture who it is, and its tags; or write all probabilities as a table."""
    net, header = load_tagger(args.encoder)
    refuse_arm(args, net)
    problems, count = [], 0
    found = predictions(args, net.to(device), header, device, autocast, problems)
    if args.csv:
        return write_table(args, net, header, found, problems)
    for key, characters, tags in found:
        row = say(args, header, key, characters, tags)
        print(json.dumps(row, ensure_ascii=False) if args.json else line(row), flush=True)
        count += 1
    tell_problems(problems, count, args.json)


def write_table(args, net, header, found, problems):
    """--csv: a row a picture, probabilities of our tags, or of another tagger's in its order; 0 of
    what we have not.
    """
    claim([args.csv], fix="choose another --csv")
    columns, names, written = np.arange(net.V), header["words"], []
    if args.like:
        selected = read_selected(args.like)
        columns, lost = in_their_order(selected, names, header["classes"])
        names = [row["name"] for row in selected]
        print(
            f"{args.like}: {(columns >= 0).sum()} of its {len(columns)} tags are ours, the rest are 0; it lacks "
            f"{len(lost)} of ours" + (f": {' '.join(lost[:5])} ..." if lost else ""),
            file=sys.stderr,
        )

    def rows():
        yield ["picture", *names]
        for key, characters, tags in found:
            characters = torch.zeros(net.config["C"]) if characters is None else characters
            ours = torch.cat(
                [tags, characters, torch.zeros(1)]
            ).numpy()  # the last one is what -1 asks for
            written.append(key)
            yield [key, *(f"{x:.5f}" for x in ours[columns])]
        tell_problems(problems, len(written), False)

    write_csv(args.csv, rows())
    print(f"wrote    {args.csv}: {len(written)} pictures, {len(names)} tags")


def main():
    args = parse_args()
    refuse_flags(args)
    device = train.pick_device(args.device)
    dtype, dtype_reason = train.pick_dtype(args.dtype, device)
    autocast = train.autocast_of(device, dtype)
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    if args.pictures:
        return use(args, device, autocast)
    if is_tagger(args.encoder):
        raise UserError(
            f"{args.encoder} is a run of tags.py: give pictures to ask it, or an encoder to train another"
        )
    args.head_lr = args.head_lr or HEAD_LR.get(args.arm, 1e-3)
    print(f"machine  {train.machine(device)}\n         {args.dtype}: {dtype_reason}")
    _, _, device = distributed.join(device)
    load_encoder(args.encoder)  # what is wrong with it is said before a data set is drawn
    with distributed.zero_first():
        args.data = str(
            data.open_or_pack(args.data or flags_of(args.encoder).get("data", "datasets/toon"))
        )
    arm, seed = "" if args.arm == "mfdn" else f"-{args.arm}", f"-s{args.seed}" if args.seed else ""
    args.out = args.out or f"runs/{name_of(args.encoder)}-tags{arm}{seed}"
    refuse_file(args.out)
    fit(args, device, autocast)
    distributed.leave()


if __name__ == "__main__":
    cli(main)
