"""Stage 6: image and tags together. Learn who it is and what the picture shows, from both.

    python tags.py runs/NAME --data datasets/toon      # learn from pictures and their tags
    python tags.py runs/NAME-tags PICTURE...           # who it is, and tags with probabilities
    python tags.py --resume runs/NAME-tags             # go on with a run, with its flags

Reads:  an encoder (runs/NAME of pretrain.py, or a checkpoint file that common/formats.py knows) and
        datasets/NAME with tags; to name pictures runs/NAME-tags and the pictures
Writes: runs/NAME-tags/ state.pt (all that a resumed run needs), model.safetensors, metrics.json,
        log.jsonl, curves.png, selected_tags.csv; answers go to standard output

MFDN: the lower half of a pre-trained ViT reads the picture, a small encoder the tags, one token
each. The upper half of the ViT reads both. The picture's CLS token then names the character. A
decoder, whose queries are words and whose context is the picture, names the tags that were hidden.
(Yi et al. 2023, "Anime Character Identification and Tag Prediction by Multimodality Modeling".
Without masks and decoder it is ViLT: Kim et al. 2021, used on tags by Rios et al. 2022.)
A picture often comes without tags. So the share of hidden tags rises to 1 at half of the run.
Thresholds of tags are chosen on dev. The split of --split is judged at the half and at the end.

    B batch   K patches seen   L places for words, of which R = L - 2 for tags   D width
    V tags    C characters     N patches   n pictures
"""

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

import data
import mask as masking
from common import checkpoints, classifier, fields, train
from common.command import (
    Flags,
    Parser,
    at_least,
    between,
    claim,
    cli,
    command,
    drawing,
    parse_keys,
)
from common.features import name_of, open_rows, split_suffix
from common.fields import CUT, ENCODER, EPSILON, NAMES, SIDE, one_of, shown, whole
from common.io import UserError, atomic, read_safetensors, save_json, save_safetensors
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
TAG_WEIGHT = 0.3  # of the tags' loss; the paper's is 1. Chosen on a demo set of another seed
KEYS = {arm: {} for arm in ARMS} | {
    "mfdn": {"weight": TAG_WEIGHT},
    "fixed": {"weight": TAG_WEIGHT, "share": 0.5},
    "l2l": {"weight": TAG_WEIGHT},
}
READS_TAGS = ("mfdn", "fixed", "vilt", "tags")
HIDES_TAGS = ("mfdn", "fixed")
NAMES_TAGS = ("mfdn", "fixed", "bce", "l2l")
MASK, PAD, CLS, SEP, SPECIAL = range(5)  # words behind the V tags: V + MASK, ...

LENGTH = 32  # places for words at most, as in the paper; fewer where no picture has so many tags
KEEP = 0.25  # share of the patches that a training step reads, as in pre-training: 4 times as fast
JITTER = 0.2  # brightness, contrast and saturation change by at most this share
WARMUP = 0.1  # share of the run with a rising learning rate
HEAD_LR = 1e-3  # of layers that are new
LAYER_DECAY = 0.9  # a block learns at this share of the rate of the next
WEIGHT_DECAY = 0.05  # of matrices
CLIP = 1.0  # norm of the gradient
JUDGED = 8192  # pictures whose tags are judged at most: memory holds n * V scores
TOP_TAGS = 25  # the most frequent tags, whose error is reported apart
MOST = 1000  # tags whose average precision is computed, the most frequent: half a minute
FEWEST = 8  # pictures of dev that a tag needs for a threshold of its own
NAMED = 15  # tags that are printed of a picture at most

REMEDY = "python tags.py ENCODER --data DIR makes it"
HEADER = {  # of model.safetensors
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
    "thresholds?": fields.list_of(fields.number(-1, 2)),
    "image_size": SIDE,
} | CUT


# ---- words: a picture's tags as the network reads them -------------------------------------------


def to_words(ids, V, length, generator=None):
    """ids i64 (B, T) of tags, -1 fills up -> words (B, L): CLS, tags by rising id, SEP, PAD.

    Of more than L - 2 tags a random subset is read; without a generator the first, which are the
    most frequent.
    """
    room = length - 2
    ids = F.pad(ids, (0, max(0, room - ids.shape[1])), value=-1)
    if generator:
        rank = torch.rand(ids.shape, generator=generator)
    else:
        rank = torch.arange(ids.shape[1]).expand_as(ids).float()
    pick = rank.masked_fill(ids < 0, math.inf).argsort(dim=1, stable=True)[:, :room]
    tags = ids.gather(1, pick)
    tags = tags.masked_fill(tags < 0, V + PAD).sort(1).values
    words = F.pad(tags, (1, 1), value=V + PAD)
    words[:, 0] = V + CLS
    return words.scatter(1, 1 + (tags < V).sum(1, keepdim=True), V + SEP)


def all_masked(V, length):
    """(1, L): a mask at every place of a tag, so that the number of tags is unknown, too."""
    words = torch.full((1, length), V + MASK)
    words[:, 0] = V + CLS
    words[:, -1] = V + SEP
    return words


def hide(words, V, share, generator):
    """words (B, L) -> with this share of the tags masked, and which ones, (B, L) bool.

    A picture of which no tag is left reads `all_masked`.
    """
    tags = words < V
    hidden = tags & (torch.rand(words.shape, generator=generator) < share)
    left = (tags & ~hidden).any(1, keepdim=True)
    masked = words.masked_fill(hidden, V + MASK)
    return torch.where(left, masked, all_masked(V, words.shape[1])), hidden


def as_read(net, ids):
    """Known tags ids (B, T), or None -> words (B, L) or (1, L), as this network learned to read."""
    nothing = all_masked(net.V, net.length)
    if ids is None and net.arm in HIDES_TAGS:
        return nothing
    ids = torch.full((1, 1), -1) if ids is None else ids
    words = to_words(ids, net.V, net.length)
    if net.arm not in HIDES_TAGS:
        return words
    return torch.where((words < net.V).any(1, keepdim=True), words, nothing)


def curriculum(step, total):
    """The share of hidden tags: 1 - (1 + cos(2 pi s/S))/2, and 1 from half of the run on.

    The paper's formula falls again after the half; its text holds it at 1.
    """
    return 1.0 if 2 * step >= total else 0.5 - 0.5 * math.cos(2 * math.pi * step / total)


def reaches(count, room):
    """Number of tags of each picture (n,) -> (R,): the share of pictures with at least 1, 2, ..."""
    return (count[:, None] > torch.arange(room)).float().mean(0)


# ---- the network ---------------------------------------------------------------------------------


class TagEncoder(nn.Module):
    """words (B, L) -> tokens (B, L, D): one token a word, with a learned position."""

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
    """As model.Attention, with queries from x (B, Q, D), keys and values from context (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context):
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, Q, d)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-norm: attention among the queries, to the picture, an MLP; (B, Q, D) -> (B, Q, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.cross = CrossAttention(dim, heads)
        self.mlp = MLP(dim, 4 * dim)

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
    """The network of every arm; `config` is what `load_tagger` builds it from.

    Sizes follow the encoder. ViT-L gives 12 blocks for the picture, 4 for the tags, 12 for both,
    and 4 to decode.
    """

    def __init__(self, encoder, C, V, arm="mfdn", length=LENGTH):
        super().__init__()
        shape = shape_of(encoder)
        dim, depth, heads = (shape[k] for k in ("dim", "depth", "heads"))
        self.config = {"encoder": shape, "norm_eps": encoder.norm.eps, "C": C, "V": V}
        self.config |= {"arm": arm, "length": length}
        self.encoder = encoder
        self.arm, self.V, self.length = arm, V, length
        self.half = depth // 2
        few = max(1, depth // 6)
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
        """patches (B, K, P) at places ids (B, K), words (B, L) where the arm reads them.

        -> logits of the characters (B, C), None of arm bce; and of tags, None where there are none:
        (B, V) tag by tag, or (., V) for the places of (B, L) that `hidden` selects, a mask or index.
        """
        x, bias, seen = self.tokens(patches, ids, words)
        for block in self.encoder.blocks[self.half :]:
            x = block(x, bias=bias)
        x = self.encoder.norm(x)
        tags = self.decoded(x, bias, seen, hidden)
        with torch.autocast(x.device.type, enabled=False):  # logits in fp32, whatever the rest is
            characters = None if self.arm == "bce" else self.head(x[:, 0].float())
            tags = None if tags is None else self.tag_head(tags.float())
        return characters, tags[:, :, 0] if self.arm == "l2l" else tags

    def tokens(self, patches, ids, words):
        """-> what the upper half reads (B, ., D), its bias, and how many tokens are the picture's."""
        x, bias, seen = None, None, 0
        if self.arm != "tags":
            x = self.encoder.embed(patches, ids)  # (B, 1+K, D)
            for block in self.encoder.blocks[: self.half]:
                x = block(x)
            seen = x.shape[1]
        if self.arm in READS_TAGS:
            bias = padding(words, self.V)
            language = self.language(words, bias) + self.kind_token[1]  # (B, L, D)
            bias = F.pad(bias, (seen, 0))
            x = language if x is None else torch.cat([x + self.kind_token[0], language], 1)
        return x, bias, seen

    def decoded(self, x, bias, seen, hidden):
        """Tokens behind the last block -> what the head for tags reads, or None."""
        if self.arm == "bce":
            return x[:, 1:].mean(1)  # (B, D)
        if self.arm == "l2l":
            return self.decoder(self.query_token.expand(x.shape[0], -1, -1), x)  # (B, V, D)
        if self.arm not in HIDES_TAGS or hidden is None:
            return None
        return self.decoder(x[:, seen:], x[:, :seen], bias[..., seen:])[hidden]


def padding(words, V):
    """words (B, L) -> bias of attention (B, 1, 1, L): minus infinity where there is no word."""
    bias = torch.zeros(words.shape, device=words.device)
    return bias.masked_fill(words == V + PAD, -math.inf)[:, None, None]


# ---- its answers, and its file -------------------------------------------------------------------


@torch.no_grad()
def answers(net, view, ids=None, ask_tags=True):
    """view u8 (B, S, S, 3), whole; ids (B, T) of known tags, -1 fills up, None where none are known.

    -> logits of characters (B, C), None of arm bce; probabilities of tags (B, V) from the picture
    alone, None where ids are given, nobody asks, or the arm names none. Where hidden tags are named
    place by place, the probability of a tag is a sum over places: (share of pictures that have so
    many tags) * (probability of the tag at this place).
    """
    ask_tags = ask_tags and ids is None and net.arm in NAMES_TAGS
    words = None
    if net.arm in READS_TAGS:
        words = as_read(net, ids).to(view.device).expand(view.shape[0], -1)
    every = (slice(None), slice(1, -1)) if ask_tags else None  # place of a tag: between CLS and SEP
    characters, tags = net(*net.encoder.all_patches(view), words, every)
    if not ask_tags:
        return characters, None
    if net.arm not in HIDES_TAGS:
        return characters, tags.sigmoid()
    return characters, (net.reach[:, None] * tags.softmax(2)).sum(1).clamp(max=1)  # of (B, R, V)


def named(probabilities, header, threshold=None):
    """(V,) -> {tag: probability} over its own threshold, or over this one, the highest first."""
    least = torch.tensor(header["thresholds"])
    least = least if threshold is None else torch.full_like(least, threshold)
    over = (probabilities >= least).nonzero()[:, 0]
    best = over[probabilities[over].argsort(descending=True, stable=True)].tolist()[:NAMED]
    return {header["words"][i]: round(probabilities[i].item(), 4) for i in best}


def in_words(numbers):
    """{name: number} as text."""
    return ", ".join(f"{name} {x:.2f}" for name, x in numbers.items())


def is_tagger(path):
    """Did tags.py write this run folder?"""
    return "tags" in checkpoints.about_model(path)


def load_tagger(folder):
    """runs/NAME of tags.py -> (MFDN in eval mode, header of its model file)."""
    path = checkpoints.model_file(folder)
    weights, header = read_safetensors(path, REMEDY)
    fields.check_fields(header, HEADER, path, REMEDY)
    config, words = header["tags"], len(header["words"])
    sizes = {"C": len(header["classes"]), "V": words, "image_size": header["image_size"]}
    sizes["thresholds"] = len(header.get("thresholds") or [])
    wanted = {"C": fields.one_of(config["C"]), "V": fields.one_of(config["V"])}
    wanted["thresholds"] = fields.one_of(words * (config["arm"] in NAMES_TAGS))
    wanted["image_size"] = fields.one_of(config["encoder"]["image_size"])
    fields.check_fields(sizes, wanted, path, REMEDY)
    fields.check_encoder(weights, config["encoder"], path, REMEDY, "encoder.")
    encoder = checkpoints.blank_encoder(config["encoder"], config["norm_eps"])
    net = MFDN(encoder, config["C"], config["V"], config["arm"], config["length"])
    checkpoints.load_exactly(net, weights, path)
    return net.eval(), header


# ---- what is learned from ------------------------------------------------------------------------


def open_task(flags, device, autocast):
    """-> what a run works with, a namespace: the sets, the network and how they are cut."""
    arm, keys = parse_keys(flags.arm, KEYS, "--arm")
    task = SimpleNamespace(device=device, autocast=autocast, arm=arm)
    task.weight = keys.get("weight", TAG_WEIGHT)
    task.share = keys.get("share")  # of hidden tags; None: the curriculum
    task.min_crop = None if arm == "tags" else flags.min_crop
    sets, task.classes = open_rows(flags.data, flags.split, 0)
    task.train, task.dev, task.report = sets
    task.words = task.train.split["header"]["tags"]
    for images in sets:
        refuse_untagged(images, flags.data)
    count = torch.from_numpy((task.train.split["tags"] >= 0).sum(1))[task.train.rows]
    length = min(LENGTH, max(2, int(count.max())) + 2)
    encoder, task.side = checkpoints.load_encoder(flags.encoder)  # side of a view
    if len(encoder.blocks) < 2:
        raise UserError(
            f"{flags.encoder} has one block, and half of the blocks see the picture alone; "
            "give an encoder of 2 or more"
        )
    torch.manual_seed(flags.seed)
    task.net = MFDN(encoder, len(task.classes), len(task.words), arm, length).to(device)
    task.net.reach.copy_(reaches(count, length - 2))
    encoder.requires_grad_(arm != "bce")
    return task


def refuse_untagged(images, folder):
    """A set without a single tag is a UserError."""
    tags = images.split.get("tags")
    if tags is None or not (tags[images.rows.numpy()] >= 0).any():
        raise UserError(
            f"{folder}, {images.name} has no tags; a table with a column of them, or metadata.jsonl, "
            "brings them: python data.py IT --out DIR"
        )


def many_hot(ids, V):
    """ids (n, T) of tags, -1 fills up, those from V on are left out -> (n, V) bool."""
    ids = np.asarray(ids)
    hot = np.zeros((len(ids), V + 1), bool)
    hot[np.arange(len(ids))[:, None], np.where((ids < 0) | (ids >= V), V, ids)] = True
    return hot[:, :V]


def tags_of(images, rows, plane="tags"):
    """rows (n,) -> ids i64 (n, T), -1 fills up; plane "all_tags": the truth, where a set has it."""
    return torch.from_numpy(np.array(images.split[plane][rows.numpy()])).long()


def make_batch(task, rows, images, share, generator):
    """What one step works on, every random number drawn from `generator`.

    -> patches, ids, words, and for the tags: hidden (B, L) bool where tags are hidden, targets, and
    count, by which their loss is divided.
    """
    V = len(task.words)
    batch = SimpleNamespace(patches=None, ids=None, words=None, hidden=None)
    if task.arm != "tags":
        batch.patches, batch.ids = augment(task, images, generator)
    if task.arm in READS_TAGS:
        words = truth = to_words(tags_of(task.train, rows), V, task.net.length, generator)  # (B, L)
        if task.arm in HIDES_TAGS:
            words, hidden = hide(truth, V, share, generator)
            batch.hidden = hidden.to(task.device)
            batch.targets = truth[hidden].to(task.device)
            batch.count = max(1, int(hidden.sum()))
        batch.words = words.to(task.device)
    elif task.arm in NAMES_TAGS:
        there = torch.from_numpy(many_hot(tags_of(task.train, rows), V)).float()
        batch.targets = there.to(task.device)
        batch.count = max(1.0, float(there.sum()))
    return batch


def augment(task, images, generator):
    """images u8 (B, ., ., 3) -> patches (B, K, P) of a random view, and their places (B, K)."""
    B, N = len(images), task.net.encoder.side**2
    boxes, flip = data.draw_boxes(B, generator, task.min_crop)
    colour = torch.rand(B, 3, generator=generator)
    noise = torch.rand(B, N, generator=generator)
    view = data.view_images(images, boxes, flip, task.side)
    view = data.jitter_colour(view, colour, JITTER)
    ids, _ = masking.sample(noise.to(view.device), max(1, round(KEEP * N)))
    return masked_patch_gather(view, ids, task.net.encoder.patch_size), ids


# ---- training ------------------------------------------------------------------------------------


def losses(net, batch, y):
    """-> the characters' loss, a cross-entropy, and the tags'; 0 where the arm has none.

    The tags' is a cross-entropy at each hidden place. Where no tag is hidden, it is a binary one
    over all tags, divided by the number of tags that are there.
    """
    logits, tags = net(batch.patches, batch.ids, batch.words, batch.hidden)
    who = 0.0 * net.reach.sum() if logits is None else F.cross_entropy(logits, y)
    if tags is None:
        return who, torch.zeros_like(who)
    loss = F.cross_entropy
    if batch.hidden is None:
        loss = F.binary_cross_entropy_with_logits
    return who, loss(tags, batch.targets, reduction="sum") / batch.count


def fit(flags, task):
    """Train the network -> its Run."""
    net, labels, train_rows = task.net, task.train.labels, task.train.rows
    seed, epochs, device = flags.seed, flags.epochs, task.device
    B = flags.values["batch_size"] = min(flags.batch_size, len(train_rows))
    per_epoch = len(train_rows) // B
    total = per_epoch * epochs
    head_lr = flags.lr if task.arm == "bce" else HEAD_LR
    optimizer = classifier.make_optimizer(net, flags.lr, head_lr, WEIGHT_DECAY, LAYER_DECAY)
    flags.read |= {"log", "resume"}  # Run reads them
    flags.refuse_unread()
    parts = {"model": net, "optimizer": optimizer}
    run = train.Run(flags, parts, total, per_epoch, device)
    print(
        f"data     {len(train_rows):,} images, {len(task.classes)} characters, {len(task.words)} tags"
    )
    print(f"run      {run.out}: {total} steps, {per_epoch} an epoch, from step {run.step}")
    images = data.resident(task.train.split, device)
    pairs = []  # the two losses of each step since the last row of the log
    for epoch in range(run.step // per_epoch, epochs):
        order = train_rows[data.epoch_order(len(train_rows), seed, epoch)]
        start = run.step % per_epoch
        for rows, some in run.timed(data.batches(images, order, B, device, start)):
            # view and tags: all random numbers are drawn here, on the CPU
            share = curriculum(run.step, total) if task.share is None else task.share
            batch = make_batch(task, rows, some, share, train.seeded(seed, epoch, run.step))

            # forward, loss, backward
            with task.autocast():
                who, what = losses(net.train(), batch, labels[rows].to(device))
            loss = who + task.weight * what
            loss.backward()

            # update
            grad_norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(run.step, total, WARMUP * total, group["peak"])
            optimizer.step()
            optimizer.zero_grad()
            run.update(loss, grad_norm)

            # log, evaluate, save
            pairs.append(torch.stack([who.detach(), what.detach()]))
            if run.logs_now:
                who, what = torch.stack(pairs).mean(0).tolist()
                more = {"hidden": share} if task.arm in HIDES_TAGS else {}
                run.log_step(lr=group["lr"], character_loss=who, tag_loss=what, **more)
                pairs = []
            if run.step % per_epoch == 0:
                evaluate(run, task, epoch + 1)
            run.save_if_due()
    return run


def evaluate(run, task, epoch):
    """Log the accuracies on dev; those of the reported split at half of the run are kept."""
    row = accuracies(task, task.dev)
    run.log(epoch=epoch, **{f"dev_{k}": x for k, x in row.items()}, seconds=run.seconds())
    run.bar.write(f"epoch {epoch:<4} dev {in_words(row)}")
    if epoch == run.total // run.per_epoch // 2:
        # state.pt keeps it with the flags
        run.config["half"] = {task.report.name: accuracies(task, task.report)}


# ---- how good it is ------------------------------------------------------------------------------


@torch.no_grad()
def accuracies(task, images):
    """Top-1 and Top-5 of whole pictures, percent: {"with_top1", "with_top5", "without_top1", ...}.

    With their tags and without, as far as the arm reads tags and names characters.
    """
    ways = ["with"] * (task.arm in READS_TAGS) + ["without"] * (task.arm != "bce")
    ranks = {way: [] for way in ways}
    for rows, view in data.whole_views(images.split["images"], images.rows, task.side, task.device):
        for way in ways:
            with task.autocast():
                ids = tags_of(images, rows) if way == "with" else None
                logits, _ = answers(task.net.eval(), view, ids, ask_tags=False)
            order = logits.cpu().argsort(dim=1, descending=True, stable=True)
            ranks[way].append((order == images.labels[rows][:, None]).int().argmax(1))
    found = {}
    for way, parts in ranks.items():
        for k in (1, 5):
            right = torch.cat(parts) < k
            found[f"{way}_top{k}"] = round(100 * right.double().mean().item(), 3)
    return found


@torch.no_grad()
def tag_scores(task, images, rows):
    """Probabilities (n, V) of the tags of whole pictures, from the pictures alone."""
    scores = []
    for _, view in data.whole_views(images.split["images"], rows, task.side, task.device):
        with task.autocast():
            _, probabilities = answers(task.net.eval(), view)
        scores.append(probabilities.cpu())
    return torch.cat(scores).numpy()


def judge_tags(task):
    """-> {"tags": row, "tags_truth": row where the set knows all tags} of the reported split, mAP
    on dev, and the thresholds, which are chosen there.
    """
    V = len(task.words)
    dev = task.dev.rows[data.evenly_spaced(len(task.dev.rows), JUDGED)]
    report = task.report.rows[data.evenly_spaced(len(task.report.rows), JUDGED)]
    on_dev, filed = tag_scores(task, task.dev, dev), many_hot(tags_of(task.dev, dev), V)
    thresholds = fit_thresholds(on_dev, filed)
    scores, found = tag_scores(task, task.report, report), {}
    for key, plane in (("tags", "tags"), ("tags_truth", "all_tags")):
        if plane in task.report.split:
            truth = many_hot(tags_of(task.report, report, plane), V)
            found[key] = judge(scores, truth, thresholds)
    return found, judge(on_dev, filed, thresholds)["map"], thresholds


def judge(scores, truth, thresholds):
    """scores (n, V), truth (n, V) bool -> numbers in percent, and "ap": each tag's, None without one.

    map and macro_f1 are means over tags that some picture has (map: of the MOST most frequent ones);
    error is the share of wrong answers among all yes and no.
    """
    found, there = scores >= thresholds, truth.any(0)
    right, ap = found & truth, average_precisions(scores, truth)
    wrong, top = (found != truth).mean(0), np.argsort(-truth.sum(0), kind="stable")[:TOP_TAGS]
    row = {
        "map": np.nanmean(ap),
        "micro_f1": f1(right.sum(), found.sum(), truth.sum()),
        "error": wrong.mean(),
        "macro_f1": f1(right.sum(0), found.sum(0), truth.sum(0))[there].mean(),
        "error_top": wrong[top].mean(),
    }
    row = {key: round(100 * float(x), 3) for key, x in row.items()}
    return row | {"ap": [None if np.isnan(x) else round(100 * float(x), 2) for x in ap[:MOST]]}


def average_precisions(scores, truth):
    """-> (V,) average precision of each tag; nan of one that no picture has, and behind MOST."""
    from sklearn.metrics import average_precision_score

    found = np.full(truth.shape[1], np.nan)
    for tag in truth[:, :MOST].any(0).nonzero()[0]:
        found[tag] = average_precision_score(truth[:, tag], scores[:, tag])
    return found


def f1(right, found, there):
    """Counts -> F1, 0 where nothing was found and nothing is there."""
    return 2 * right / np.maximum(found + there, 1)


def fit_thresholds(scores, truth):
    """-> (V,): the threshold with each tag's best F1; rare tags get the best of all together."""
    common = common_threshold(scores, truth)
    thresholds = np.full(truth.shape[1], common)
    for tag in (truth.sum(0) >= FEWEST).nonzero()[0]:
        thresholds[tag] = best_threshold(scores[:, tag], truth[:, tag])
    return thresholds


def best_threshold(scores, truth):
    """scores (n,), truth (n,) bool -> the score with the best F1, half way to the next one below."""
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(truth[order])
    last = np.r_[np.diff(scores[order]) < 0, True]  # equal scores are taken together
    at = int(np.argmax(np.where(last, f1(right, np.arange(1, len(order) + 1), truth.sum()), -1)))
    below = scores[order[at + 1]] if at + 1 < len(order) else 0.0
    return float((scores[order[at]] + below) / 2)


def common_threshold(scores, truth, bins=10_000):
    """The same for all tags together, by counts in bins: there may be 200 million scores."""
    edges = np.linspace(0, 1, bins + 1)
    found, right = (np.histogram(x, edges)[0][::-1].cumsum()[::-1] for x in (scores, scores[truth]))
    return float(edges[np.argmax(f1(right, found, truth.sum()))])


def write_results(flags, task, run):
    """Judge the network on pictures that decided nothing, and write all files but state.pt."""
    out, log = run.out, train.read_log(run.out / "log.jsonl")
    row = metrics_row(flags, task, run, log)
    header = header_of(flags, task, run)
    print(f"{flags.split:<9}{in_words(row['end'])}")
    if task.arm in NAMES_TAGS:
        judged, row["dev"]["map"], thresholds = judge_tags(task)
        header["thresholds"] = thresholds.tolist()
        row |= judged
        best = judged.get("tags_truth", judged["tags"])
        print(
            f"tags     mAP {best['map']:.1f} %, F1 {best['micro_f1']:.1f} % (micro), "
            f"{best['macro_f1']:.1f} % (macro)"
        )
    save_safetensors(task.net.state_dict(), out / "model.safetensors", header)
    write_selected(out / "selected_tags.csv", task)
    save_json(row, out / f"metrics{split_suffix(flags.split)}.json")  # the last: all is done
    with drawing("curves.png"):
        plot_curves(out / "curves.png", log, f"{out.name} on {Path(flags.data).name}")
    print(
        f"wrote    {out}/ after {row['seconds']:.0f} s\n"
        f"next: python tags.py {shlex.quote(str(out))} PICTURE"
    )


def metrics_row(flags, task, run, log):
    """-> metrics.json without the tags' numbers."""
    steps = [row for row in log if "loss" in row]
    dev = [row for row in log if "loss" not in row][-1]
    speed = float(np.median([row["images_per_s"] for row in steps]))
    return {
        "run": run.out.name,
        "arm": task.arm,
        "seed": flags.seed,
        "data": flags.data,
        "evaluated_on": flags.split,
        "half": run.config.get("half", {}).get(flags.split, {}),
        "end": accuracies(task, task.report),
        "dev": {k.removeprefix("dev_"): x for k, x in dev.items() if k.startswith("dev_")},
        "parameters": sum(p.numel() for p in task.net.parameters()),
        "step_ms": round(1000 * run.batch_size / speed, 2),
        "peak_memory_mb": max(row["memory_mb"] for row in steps),
        "seconds": run.seconds(),
        "config": run.config,
        "command": flags.command,
        "machine": train.machine(task.device),
        "commit": train.commit(),
    }


def header_of(flags, task, run):
    """-> what model.safetensors says of its network and of the pictures that it takes."""
    split = task.train.split
    return {
        "tags": task.net.config,
        "run": run.config,
        "words": task.words,
        "classes": task.classes,
        "image_size": task.side,
        "data": flags.data,
        "thresholds": None,
        "base": flags.encoder,
        "packed_size": split["images"].shape[1],
        "crop": split["header"]["crop"],
        "margin": split["header"]["margin"],
    }


def write_selected(path, task):
    """The tags as taggers list them; ids are places in the list, counts pictures of train."""
    ids = np.asarray(task.train.split["tags"])
    counts = np.bincount(ids[ids >= 0], minlength=len(task.words))
    rows = []
    for i, (word, count) in enumerate(zip(task.words, counts, strict=True)):
        rows.append({"tag_id": i, "name": word, "category": 0, "count": int(count)})
    with atomic(path) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot_curves(path, rows, title):
    """Rows of log.jsonl -> losses and the share of hidden tags, and Top-1 on dev, by epoch."""
    from common import plots

    with plots.panels(path, title, 1, 2, (8.4, 3.4)) as (left, right):
        plots.plot_rows(left, rows, "epoch", "character_loss", label="character")
        plots.plot_rows(left, rows, "epoch", "tag_loss", "--", label="tags")
        plots.plot_rows(left, rows, "epoch", "hidden", ":", label="share of hidden tags")
        plots.plot_rows(right, rows, "epoch", "dev_with_top1", "s-", label="picture and tags")
        plots.plot_rows(right, rows, "epoch", "dev_without_top1", "o-", label="picture alone")
        left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy, nats")
        right.set(title="Characters on dev", xlabel="epoch", ylabel="Top-1, %", ylim=(0, 100))
        left.legend()
        if right.lines:  # arm bce names no characters
            right.legend()


# ---- use -----------------------------------------------------------------------------------------


def use(flags, device, autocast):
    """Print who each picture shows, and its tags."""
    from ingest.pictures import pictures, tell_problems

    net, header = load_tagger(flags.encoder)
    tell = flags.tell if net.arm in READS_TAGS else None
    threshold = flags.threshold if net.arm in NAMES_TAGS else None
    as_json = flags.json
    flags.refuse_unread()
    known = known_tags(tell or "", net, header)
    if net.arm == "tags" and known is None:
        raise UserError(
            f"{flags.encoder} is a run of --arm tags, which sees no picture; "
            "tell it tags that it knows: --tell 'WORD WORD'"
        )
    net.to(device)
    problems, count = [], 0
    cut = (header["packed_size"], header["crop"], header["margin"])
    items = pictures(flags.pictures, *cut, problems)
    while some := list(itertools.islice(items, data.CHUNK)):
        keys, images = zip(*some, strict=True)
        images = torch.from_numpy(np.stack(images)).to(device)
        view = data.view_images(images, *data.full_boxes(len(images)), header["image_size"])
        with autocast():
            logits, tags = answers(net, view)
            if known is not None:
                logits, _ = answers(net, view, known.expand(len(images), -1))
        for i, key in enumerate(keys):
            row = {"picture": key}
            if logits is not None:
                sure, who = logits[i].cpu().softmax(0).max(0)
                row |= {"name": header["classes"][who], "confidence": round(sure.item(), 4)}
            if tags is not None:
                row["tags"] = named(tags[i].cpu(), header, threshold)
            print(json.dumps(row, ensure_ascii=False) if as_json else line_of(row), flush=True)
        count += len(keys)
    tell_problems(problems, count, as_json)


def known_tags(text, net, header):
    """--tell -> ids (1, T) of known tags, or None; words that this run has not learned are named."""
    words = text.split()
    lost = [word for word in words if word not in header["words"]]
    if lost:
        line = f"{len(lost)} of {len(words)} tags are none of this run's, and skipped"
        print(f"{line}: {' '.join(lost)}", file=sys.stderr)
    found = sorted({header["words"].index(word) for word in words if word not in lost})
    return torch.tensor([found]) if found else None


def line_of(row):
    """An answer as a line of text."""
    who = f"{row['name']} {row['confidence']:.0%}; " if "name" in row else ""
    return f"{shown(row['picture'])}: {who}{in_words(row.get('tags', {}))}".removesuffix("; ")


# ---- the command ---------------------------------------------------------------------------------


def read_flags():
    """The flags; those of a run that is resumed come from its state.pt."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.parse_args = parser.parse_intermixed_args  # flags may stand between pictures
    add = parser.add_argument
    add(
        "encoder", nargs="?", metavar="ENCODER", help="runs/NAME, or a checkpoint of MAE, DINO, ..."
    )
    add("pictures", nargs="*", metavar="PICTURE", help="file, folder, archive; ENCODER: NAME-tags")
    add = parser.add_argument_group("what to learn").add_argument
    add("--data", metavar="DIR", help="set with labels and tags (default: the encoder's, or toon)")
    add("--out", metavar="DIR", help="run folder (default: named by the encoder and the flags)")
    add("--resume", metavar="RUN", help="go on with this run, with its flags")
    arms = "\n".join(f"{arm}: {text}" for arm, text in ARMS.items())
    add("--arm", default="mfdn", help=f"{arms}\nkeys: mfdn, fixed, l2l:weight=.3; fixed:share=.5")
    add("--split", default="val", choices=["val", "test"], help="the split that is reported")
    add("--epochs", type=at_least(2), default=30, help="passes over the data")
    add("--batch-size", type=at_least(1), default=32, metavar="B", help="images for one step")
    add("--lr", type=between(0, 1), help="of the encoder (default: 5e-4); arm bce: its head (3e-2)")
    add("--min-crop", type=between(0.01, 1), default=0.5, metavar="AREA", help="smallest crop")
    add("--seed", type=at_least(0), default=0, help="of weights, order, views and hidden tags")
    add = parser.add_argument_group("what is printed of pictures").add_argument
    add("--tell", metavar="WORDS", help="known tags of the pictures, with spaces between them")
    add("--threshold", type=between(0, 1), metavar="P", help="of every tag (default: its own)")
    add("--json", action="store_true", help="print a JSON object a picture")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of matrix products")
    add("--log", type=train.trackers, default=(), metavar="NAMES", help="tensorboard,wandb")
    flags = Flags(parser)
    if bool(flags.encoder) == bool(flags.resume):
        parser.error("give an ENCODER, or --resume RUN, which knows its encoder")
    if flags.resume:
        saved = train.load_state(Path(flags.resume) / "state.pt")["config"]
        flags.take_saved(saved, ("device", "log", *flags.given & {"split"}))
        flags.values["out"] = flags.resume
    return flags


def complete(flags):
    """Values of flags that were not given, and depend on others. A resumed run has them."""
    if flags.lr is None:
        flags.values["lr"] = 3e-2 if flags.arm == "bce" else 5e-4
    checkpoints.load_encoder(flags.encoder)  # its faults show before a data set is drawn
    folder = flags.data or checkpoints.flags_of(flags.encoder).get("data", "datasets/toon")
    flags.values["data"] = str(data.open_or_pack(folder))
    leave_out = flags.given - {"arm", "seed"}
    name = flags.name(f"{name_of(flags.encoder)}-tags", leave_out=leave_out)
    flags.values["out"] = flags.out or f"runs/{name}"
    flags.values["command"] = command()


def main():
    flags = read_flags()
    device = train.pick_device(flags.device)
    dtype, reason = train.pick_dtype(flags.dtype, device)
    autocast = train.autocast_of(device, dtype)
    if flags.pictures:
        return use(flags, device, autocast)
    if is_tagger(flags.encoder):
        raise UserError(
            f"{flags.encoder} is a run of tags.py: give pictures to name, or an encoder to train"
        )
    flags.values["dtype"] = "fp32" if dtype == torch.float32 else "bf16"
    print(f"machine  {train.machine(device)}, {flags.dtype}: {reason}")
    if not flags.resume:
        complete(flags)
    done = Path(flags.out) / f"metrics{split_suffix(flags.split)}.json"
    if flags.resume and done.exists():
        claim([], Path(flags.out) / ".lock")  # a killed process may have left its own
        print(f"run      {flags.out} is finished: {done}; --split test judges it on another split")
        return
    task = open_task(flags, device, autocast)
    run = fit(flags, task)
    write_results(flags, task, run)


if __name__ == "__main__":
    cli(main)
