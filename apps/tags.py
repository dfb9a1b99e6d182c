"""Stage 6: image and tags together. Learn who it is and what the picture shows, from both.

    python -m apps.tags runs/NAME --data datasets/toon      # learn from pictures and their tags
    python -m apps.tags runs/NAME-tags PICTURE...           # who it is, and tags with probabilities
    python -m apps.tags runs/NAME-tags FOLDER --captions    # PICTURE.txt beside each picture of a folder
    python -m apps.tags runs/NAME-tags FOLDER --captions --names runs/NAME-lora     # its names come first
    python -m apps.tags runs/NAME-lora FOLDER --captions    # nothing but the names of a recogniser
    python -m apps.tags --resume runs/NAME-tags             # go on with a run, with its flags

Reads:  an encoder (runs/NAME of pretrain.py, or a checkpoint file that common/formats.py knows) and
        datasets/NAME with tags; to name pictures runs/NAME-tags and the pictures; for captions
        perhaps runs/NAME-lora of finetune_lora.py, with its gallery (apps/recognize.py)
Writes: runs/NAME-tags/ state.pt (all that a resumed run needs), model.safetensors, metrics.json,
        log.jsonl; answers go to standard output, and with --captions beside the pictures

    picture -> lower half of a pre-trained ViT --+
                                                 +-> upper half -> CLS token -> the character
    tags, some hidden -> a small encoder --------+           +-> decoder -> the hidden tags

This is MFDN (Yi et al. 2023, "Anime Character Identification and Tag Prediction by Multimodality
Modeling"). Without hidden tags and decoder it is ViLT (Kim et al. 2021; Rios et al. 2022 use it on
tags). A tag is one token. The decoder's queries are the words, its context is the picture. Often a
picture comes without tags, so the share of hidden tags rises to 1 at half of the run.

    B batch   n pictures   S side of a view   N patches   K patches seen   P numbers of a patch   D width
    V tags    C characters   T known tags of a picture   L places for words, of which R = L - 2 for tags
    Q queries of the decoder: L
"""

import itertools
import json
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import mask as masking
from apps import captions
from apps.pictures import tell_problems
from common import checkpoints, classifier, train
from common.door import shown
from common.features import Subset, name_of, open_subsets, split_suffix
from common.readout import topk
from common.train import Parser, UserError, at_least, between, cli, parse_keys, refuse_useless
from ingest.pictures import pictures
from kernels.patches import masked_patch_gather
from model import (
    EPS,
    MLP,
    MLP_RATIO,
    Attention,
    Block,
    ViT,
    attention,
    init_weights,
    shrink_branches,
)

ARMS = {  # what is read, and what is learned besides the character
    "mfdn": "picture and tags; hidden tags, more and more of them, and all from the half on",
    "fixed": "picture and tags; hidden tags, always the same share",
    "vilt": "picture and tags; none is ever hidden",
    "image": "the picture alone",
}
TAG_WEIGHT = 0.3  # of the tags' loss; the paper's is 1. Chosen on a demo set of another seed
ARM_KEYS = {arm: {} for arm in ARMS} | {
    "mfdn": {"weight": TAG_WEIGHT},
    "fixed": {"weight": TAG_WEIGHT, "share": 0.5},
}
HIDES_TAGS = ("mfdn", "fixed")  # and so learns to name them
READS_TAGS = (*HIDES_TAGS, "vilt")
MASK, PAD, CLS, SEP, SPECIAL = range(5)  # words behind the V tags: V + MASK, ...

LENGTH = 32  # places for words at most, as in the paper; fewer where no picture has so many tags
KEEP = 0.25  # share of the patches that a training step reads, as in pre-training: 4 times as fast
JITTER = 0.2  # brightness, contrast and saturation change by at most this share
WARMUP = 0.1  # share of the run with a rising learning rate
HEAD_LR = 1e-3  # of layers that are new
LAYER_DECAY = 0.9  # a block learns at this share of the rate of the next
WEIGHT_DECAY = 0.05  # of matrices
CLIP = 1.0  # norm of the gradient
MIN_CROP = 0.5  # smallest share of an image in a crop
JUDGED = 8192  # pictures whose tags are evaluated at most: memory holds n * V scores
TOP_TAGS = 25  # the most frequent tags, whose error is reported separately
AP_TAGS = 1000  # the most frequent tags, whose average precision is computed: half a minute
FEWEST = 8  # pictures of dev that a tag needs for a threshold of its own
BINS = 10_000  # of scores, for the threshold of rare tags
NAMED = 15  # tags of a picture that are printed at most
MOST_UNKNOWN = 0.09  # share of known faces on dev whose best name is so unsure that it is "unknown"

REMEDY = "python -m apps.tags ENCODER --data DIR makes it"


# ---- words: a picture's tags as the network reads them -------------------------------------------


def to_words(ids, V, length, generator=None):
    """ids i64 (B, T) of tags, -1 fills up -> words (B, L): CLS, tags by rising id, SEP, PAD.

    Of more than L - 2 tags a random subset is read, without a generator the most frequent ones.
    """
    R = length - 2
    ids = F.pad(ids, (0, max(0, R - ids.shape[1])), value=-1)
    rank = torch.arange(ids.shape[1]).expand_as(ids).float()
    if generator:
        rank = torch.rand(ids.shape, generator=generator)
    chosen = rank.masked_fill(ids < 0, math.inf).argsort(dim=1, stable=True)[:, :R]
    tags = ids.gather(1, chosen)
    tags = tags.masked_fill(tags < 0, V + PAD).sort(1).values  # (B, R)
    words = F.pad(tags, (1, 1), value=V + PAD)
    words[:, 0] = V + CLS
    behind_tags = 1 + (tags < V).sum(1, keepdim=True)
    return words.scatter(1, behind_tags, V + SEP)


def all_masked(V, length):
    """Words (1, L) with a mask at every place of a tag: even the number of tags is unknown."""
    return torch.tensor([[V + CLS, *[V + MASK] * (length - 2), V + SEP]])


def hide(words, V, share, generator):
    """words (B, L) -> words with this share of the tags masked; which are hidden, (B, L) bool.

    A picture without a visible tag gets `all_masked`.
    """
    hidden = (words < V) & (torch.rand(words.shape, generator=generator) < share)
    masked = words.masked_fill(hidden, V + MASK)
    some_visible = (masked < V).any(1, keepdim=True)
    return torch.where(some_visible, masked, all_masked(V, words.shape[1])), hidden


def known_words(net, ids):
    """ids (B, T) of known tags, or None -> words (B, L) or (1, L).

    Networks that learned with hidden tags get `all_masked` where no tag is known.
    """
    if ids is None and net.arm in HIDES_TAGS:
        return all_masked(net.V, net.length)  # without a sort, which onnx lacks
    words = to_words(torch.full((1, 1), -1) if ids is None else ids, net.V, net.length)
    if net.arm not in HIDES_TAGS:
        return words
    some_known = (words < net.V).any(1, keepdim=True)
    return torch.where(some_known, words, all_masked(net.V, net.length))


def curriculum(step, total):
    """The share of hidden tags at a step: 1 - (1 + cos(2 pi step/total))/2, and 1 from the half on.

    The paper's formula falls again after the half. Its text keeps the share at 1.
    """
    return 1.0 if 2 * step >= total else 0.5 - 0.5 * math.cos(2 * math.pi * step / total)


def reaches(count, room):
    """Number of tags of each picture (n,) -> share of pictures with at least 1, 2, ..., R tags (R,)."""
    return (count[:, None] > torch.arange(room)).float().mean(0)


# ---- the network ---------------------------------------------------------------------------------


class TagEncoder(nn.Module):
    """words (B, L) -> tokens (B, L, D): one token a word, with a learned position."""

    def __init__(self, V, length, dim, depth, heads):
        super().__init__()
        self.embed = nn.Embedding(V + SPECIAL, dim)
        self.pos_token = nn.Parameter(torch.zeros(1, length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
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
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.cross = CrossAttention(dim, heads)
        self.mlp = MLP(dim, MLP_RATIO * dim)

    def forward(self, x, context, bias=None):
        x = x + self.attn(self.norm1(x), bias=bias)
        x = x + self.cross(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


class TagDecoder(nn.Module):
    """Queries (B, Q, D) and the picture's tokens (B, N, D) -> (B, Q, D)."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.apply(init_weights)
        shrink_branches(self.blocks)

    def forward(self, x, context, bias=None):
        for block in self.blocks:
            x = block(x, context, bias)
        return self.norm(x)


class MFDN(nn.Module):
    """The network of every arm; `config` is what `load_tagger` builds it from.

    ViT-L gives 12 blocks for the picture, 4 for the tags, 12 for both, and 4 to decode.
    """

    def __init__(self, encoder, C, V, arm="mfdn", length=LENGTH):
        super().__init__()
        shape = encoder.config
        dim, heads = shape["dim"], shape["heads"]
        layers = max(1, shape["depth"] // 6)
        self.config = {"encoder": shape, "C": C, "V": V, "arm": arm, "length": length}
        self.encoder = encoder
        self.half = shape["depth"] // 2
        self.arm, self.V, self.length = arm, V, length
        self.register_buffer("reach", torch.ones(length - 2))  # see `reaches`
        if arm in READS_TAGS:
            self.language = TagEncoder(V, length, dim, layers, heads)
            self.kind_token = nn.Parameter(torch.zeros(2, dim))  # added to the picture, to words
        if arm in HIDES_TAGS:
            self.decoder = TagDecoder(dim, layers, heads)
            self.tag_head = nn.Linear(dim, V)
            nn.init.zeros_(self.tag_head.bias)
        self.head = nn.Linear(dim, C)
        nn.init.zeros_(self.head.bias)

    def forward(self, patches, ids, words=None, hidden=None):
        """patches (B, K, P) at places ids (B, K), words (B, L) where the arm reads them.

        -> logits of the characters (B, C), and of tags, (B, V) or (., V) for the places that `hidden`,
        an index of (B, L), selects; None without it.
        """
        x = self.encoder.embed(patches, ids)  # (B, 1+K, D)
        x = self.encoder.run_blocks(x, end=self.half)
        seen = x.shape[1]  # tokens of the picture
        bias = tags = None
        if self.arm in READS_TAGS:
            bias = torch.zeros(words.shape, device=words.device)
            bias = bias.masked_fill(words == self.V + PAD, -math.inf)[:, None, None]  # (B, 1, 1, L)
            language = self.language(words, bias) + self.kind_token[1]  # (B, L, D)
            bias = F.pad(bias, (seen, 0))  # no picture's token is padding
            x = torch.cat([x + self.kind_token[0], language], 1)
        x = self.encoder.norm(self.encoder.run_blocks(x, begin=self.half, bias=bias))
        if hidden is not None:
            tags = self.decoder(x[:, seen:], x[:, :seen], bias[..., seen:])[hidden]
        with torch.autocast(x.device.type, enabled=False):  # logits in fp32, whatever the rest is
            characters = self.head(x[:, 0].float())
            tags = None if tags is None else self.tag_head(tags.float())
        return characters, tags


# ---- its answers, and its file -------------------------------------------------------------------


@torch.no_grad()
def answers(net, view, ids=None, ask_tags=True):
    """view u8 (B, S, S, 3), whole; ids (B, T) of known tags, -1 fills up, None where none are known.

    -> logits of characters (B, C); probabilities of tags (B, V) from the picture alone, None where
    ids are given, `ask_tags` is off, or the arm names no tags. The network answers for each place of
    a tag. The probability of a tag is a sum over places: (share of pictures with so many tags) *
    (probability of the tag at this place).
    """
    ask_tags = ask_tags and ids is None and net.arm in HIDES_TAGS
    words = None
    if net.arm in READS_TAGS:
        words = known_words(net, ids).to(view.device).expand(view.shape[0], -1)
    places = (slice(None), slice(1, -1)) if ask_tags else None  # of tags: between CLS and SEP
    characters, tags = net(*net.encoder.all_patches(view), words, places)
    if not ask_tags:
        return characters, None
    return characters, (net.reach[:, None] * tags.softmax(2)).sum(1).clamp(max=1)  # of (B, R, V)


def named(probabilities, header, threshold=None, most=NAMED):
    """(V,) -> {tag: probability} over its own threshold, or over this one, the highest first."""
    thresholds = torch.tensor(header["thresholds"])
    if threshold is not None:
        thresholds.fill_(threshold)
    over = (probabilities >= thresholds).nonzero()[:, 0]
    order = probabilities[over].argsort(descending=True, stable=True)
    best = over[order].tolist()[:most]
    return {header["words"][i]: round(probabilities[i].item(), 4) for i in best}


def in_words(numbers):
    """{name: number} as text."""
    return ", ".join(f"{name} {x:.2f}" for name, x in numbers.items())


def is_tagger(path):
    """Did apps/tags.py write this run folder?"""
    return "tags" in checkpoints.about_model(path)


def load_tagger(folder):
    """runs/NAME of apps/tags.py -> (MFDN in eval mode, header of its model file)."""
    weights, header = train.read_safetensors(checkpoints.model_file(folder), REMEDY)
    if "tags" not in header:
        raise UserError(f"{folder} names no tags; {REMEDY}")
    config = header["tags"]
    encoder = ViT(**config["encoder"])
    net = MFDN(encoder, config["C"], config["V"], config["arm"], config["length"])
    net.load_state_dict(weights)
    return net.eval(), header


# ---- what is learned from ------------------------------------------------------------------------


@dataclass
class Task:
    """What a run works with."""

    arm: str
    weight: float  # of the loss on tags
    share: float | None  # of hidden tags; None: the curriculum
    net: MFDN
    classes: list  # names of the characters
    words: list  # the tags
    train: Subset
    dev: Subset
    report: Subset
    side: int  # of a view, in pixels
    device: torch.device
    autocast: partial


def open_task(flags, device, autocast):
    """The sets, the network and the settings of the arm."""
    arm, keys = parse_keys(flags.arm, ARM_KEYS, "--arm")
    sets, classes = open_subsets(flags.data, flags.split, 0)
    train_set = sets[0]
    flags.digest = data.digest(flags.data)
    for images in sets:
        if "tags" not in images.split or not (tags_of(images, images.index) >= 0).any():
            fix = "python data.py LIST --out DIR packs a table with a column of tags"
            raise UserError(f"{flags.data}, {images.name} has no tags; {fix}")
    words = train_set.split["header"]["tags"]
    count = (tags_of(train_set, train_set.index) >= 0).sum(1)
    length = min(LENGTH, max(2, int(count.max())) + 2)
    encoder = checkpoints.load_encoder(flags.encoder)
    torch.manual_seed(flags.seed)
    net = MFDN(encoder, len(classes), len(words), arm, length).to(device)
    net.reach.copy_(reaches(count, length - 2))
    settings = (arm, keys.get("weight", TAG_WEIGHT), keys.get("share"))
    machine = (encoder.image_size, device, autocast)
    return Task(*settings, net, classes, words, *sets, *machine)


def tags_of(images, index, plane="tags"):
    """index (n,) -> ids i64 (n, T), -1 fills up; plane "all_tags": the truth, where a set has it."""
    return torch.from_numpy(np.array(images.split[plane][index.numpy()])).long()


def many_hot(ids, V):
    """ids (n, T) of tags; those under 0 and from V on are left out -> (n, V) bool."""
    ids = np.asarray(ids)
    hot = np.zeros((len(ids), V + 1), bool)
    np.put_along_axis(hot, np.where((ids < 0) | (ids >= V), V, ids), True, axis=1)
    return hot[:, :V]


def make_batch(task, index, images, share, generator):
    """The input and targets of one step; every random number is drawn from `generator`.

    -> (patches, ids, words, hidden), as MFDN takes them: hidden is an index of (B, L). Targets (.,)
    are the ids of hidden tags. share: of tags that are hidden.
    """
    V = len(task.words)
    patches, ids = augment(task, images, generator)
    words = hidden = targets = None
    if task.arm in READS_TAGS:
        words = to_words(tags_of(task.train, index), V, task.net.length, generator)
    if task.arm in HIDES_TAGS:
        truth = words
        words, where = hide(truth, V, share, generator)
        targets = data.send(truth[where], task.device)
        places = where.nonzero(as_tuple=True)  # counted here: a GPU would make us wait
        hidden = tuple(data.send(x, task.device) for x in places)
    if words is not None:
        words = data.send(words, task.device)
    return (patches, ids, words, hidden), targets


def augment(task, images, generator):
    """images u8 (B, ., ., 3) -> patches (B, K, P) of a random view, and their places (B, K)."""
    B = len(images)
    N = task.net.encoder.side**2
    boxes, flip = data.draw_boxes(B, generator, MIN_CROP)
    colour = torch.rand(B, 3, generator=generator)
    noise = torch.rand(B, N, generator=generator)
    view = data.view_images(images, boxes, flip, task.side)
    view = data.jitter_colour(view, colour, JITTER)
    ids, _ = masking.sample(data.send(noise, view.device), max(1, round(KEEP * N)))
    return masked_patch_gather(view, ids, task.net.encoder.patch_size), ids


# ---- training ------------------------------------------------------------------------------------


def losses(net, inputs, targets, labels):
    """-> mean cross-entropy of the characters, and of hidden places of tags; 0 where the arm hides none."""
    characters, tags = net(*inputs)
    tag_loss = torch.zeros((), device=labels.device)
    if tags is not None:
        total = F.cross_entropy(tags, targets, reduction="sum")
        tag_loss = total / max(1, len(targets))
    return F.cross_entropy(characters, labels), tag_loss


def open_run(flags, task):
    """-> the Run of this training, and the optimizer."""
    count = len(task.train.index)
    batch_size = flags.batch_size = min(flags.batch_size, count)
    per_epoch = count // batch_size
    total = per_epoch * flags.epochs
    optimizer = classifier.make_optimizer(task.net, flags.lr, HEAD_LR, WEIGHT_DECAY, LAYER_DECAY)
    parts = {"model": task.net, "optimizer": optimizer}
    run = train.Run(flags, parts, total, per_epoch, task.device)
    run.resume_or_begin()
    print(f"data     {count:,} images, {len(task.classes)} characters, {len(task.words)} tags")
    print(f"run      {run.out}: {total} steps, {per_epoch} an epoch, from step {run.step}")
    return run, optimizer


def fit(task, run, optimizer, seed):
    """Train the network from the run's step to its last one."""
    net = task.net
    labels = task.train.labels
    device = task.device
    images = data.resident(task.train.split["images"], device)
    pairs = []  # the two losses of each step since the last row of the log
    for epoch in range(run.step // run.per_epoch, run.total // run.per_epoch):
        order = task.train.index[data.epoch_order(len(task.train.index), seed, epoch)]
        start = run.step % run.per_epoch
        for index, some in data.batches(images, order, run.batch_size, device, start):
            # view and hidden tags: all random numbers are drawn here, on the CPU
            share = curriculum(run.step, run.total) if task.share is None else task.share
            generator = train.seeded(seed, epoch, run.step)
            inputs, targets = make_batch(task, index, some, share, generator)
            # forward, loss, backward
            y = data.send(labels[index], device)  # (B,)
            with task.autocast():
                character_loss, tag_loss = losses(net.train(), inputs, targets, y)
            loss = character_loss + task.weight * tag_loss
            loss.backward()
            # update
            grad_norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(run.step, run.total, WARMUP * run.total, group["peak"])
            optimizer.step()
            optimizer.zero_grad()
            run.update(loss, grad_norm)
            # log, evaluate, save
            pairs.append(torch.stack([character_loss.detach(), tag_loss.detach()]))
            if run.logs_now:
                means = torch.stack(pairs).mean(0).tolist()
                row = {"character_loss": means[0], "tag_loss": means[1]}
                row["head_lr"] = optimizer.param_groups[-1]["lr"]
                if task.arm in HIDES_TAGS:
                    row["hidden"] = share
                run.log_step(**row)
                pairs = []
            if run.step % run.per_epoch == 0:
                evaluate(run, task, epoch + 1)
            run.save_if_due()


def evaluate(run, task, epoch):
    """Log the accuracies on dev; those of the reported split at half of the run are kept."""
    row = accuracies(task, task.dev)
    run.log(epoch=epoch, **{f"dev_{k}": x for k, x in row.items()})
    run.bar.write(f"epoch {epoch:<4} dev {in_words(row)}")
    if epoch == run.total // run.per_epoch // 2:
        # state.pt keeps it with the flags
        run.config["half"] = {task.report.name: accuracies(task, task.report)}


# ---- how good it is ------------------------------------------------------------------------------


@torch.no_grad()
def whole_answers(task, images, index, with_tags=False, ask_tags=False):
    """`answers` of whole pictures -> logits (n, C), probabilities (n, V) or None, on the CPU."""
    logits, tags = [], []
    for some, view in data.whole_views(images.split["images"], index, task.side, task.device):
        ids = tags_of(images, some) if with_tags else None
        with task.autocast():
            characters, probabilities = answers(task.net.eval(), view, ids, ask_tags)
        logits.append(characters.cpu())
        if probabilities is not None:
            tags.append(probabilities.cpu())
    return torch.cat(logits), torch.cat(tags) if tags else None


def accuracies(task, images):
    """Top-1 and Top-5 of whole pictures, percent: {"with_top1", "with_top5", "without_top1", ...}.

    With their tags, if the arm reads any, and without.
    """
    row = {}
    for way in ("with", "without") if task.arm in READS_TAGS else ("without",):
        logits, _ = whole_answers(task, images, images.index, with_tags=way == "with")
        for k in (1, 5):
            row[f"{way}_top{k}"] = round(100 * topk(logits, images.labels[images.index], k), 3)
    return row


def judge_tags(task):
    """-> {"tags": row, "tags_truth": row where the set knows all tags} of the reported split, mAP
    on dev, and the thresholds (V,), which are chosen there. Tags are named from pictures alone.
    """
    V = len(task.words)
    index, scores = scores_of(task, task.dev)
    truth = many_hot(tags_of(task.dev, index), V)
    thresholds = fit_thresholds(scores, truth)
    dev_map = judge(scores, truth, thresholds)["map"]
    index, scores = scores_of(task, task.report)
    judged = {}
    for key, plane in (("tags", "tags"), ("tags_truth", "all_tags")):
        if plane in task.report.split:
            truth = many_hot(tags_of(task.report, index, plane), V)
            judged[key] = judge(scores, truth, thresholds)
    return judged, dev_map, thresholds.tolist()


def scores_of(task, images):
    """-> the index (n,) of at most JUDGED pictures, and the probabilities of their tags, (n, V)."""
    index = images.index[data.evenly_spaced(len(images.index), JUDGED)]
    _, scores = whole_answers(task, images, index, ask_tags=True)
    return index, scores.numpy()


def judge(scores, truth, thresholds):
    """scores (n, V), truth (n, V) bool -> numbers in percent, and "ap": each tag's, None without one.

    map and macro_f1 are means over tags of at least one picture (map: of the AP_TAGS most frequent);
    error is the share of wrong answers among all yes and no.
    """
    from sklearn.metrics import average_precision_score

    predicted = scores >= thresholds
    there = truth.any(0)
    right = predicted & truth
    wrong = (predicted != truth).mean(0)
    top = np.argsort(-truth.sum(0), kind="stable")[:TOP_TAGS]
    ap = np.full(min(AP_TAGS, len(there)), np.nan)
    for tag in there[:AP_TAGS].nonzero()[0]:
        ap[tag] = average_precision_score(truth[:, tag], scores[:, tag])
    row = {
        "map": np.nanmean(ap),
        "micro_f1": f1(right.sum(), predicted.sum(), truth.sum()),
        "error": wrong.mean(),
        "macro_f1": f1(right.sum(0), predicted.sum(0), truth.sum(0))[there].mean(),
        "error_top": wrong[top].mean(),
    }
    row = {key: round(100 * float(x), 3) for key, x in row.items()}
    return row | {"ap": [None if np.isnan(x) else round(100 * float(x), 2) for x in ap]}


def f1(right, predicted, there):
    """Counts -> F1, 0 where nothing is predicted and nothing is there."""
    return 2 * right / np.maximum(predicted + there, 1)


def fit_thresholds(scores, truth):
    """scores (n, V), truth (n, V) bool -> the threshold with each tag's best F1 (V,).

    Rare tags get the best threshold of all tags together: up to 200 million scores, so in bins.
    """
    edges = np.linspace(0, 1, BINS + 1)
    predicted = np.histogram(scores, edges)[0]
    right = np.histogram(scores[truth], edges)[0]
    predicted, right = predicted[::-1].cumsum()[::-1], right[::-1].cumsum()[::-1]  # over each edge
    thresholds = np.full(truth.shape[1], edges[f1(right, predicted, truth.sum()).argmax()])
    for tag in (truth.sum(0) >= FEWEST).nonzero()[0]:
        thresholds[tag] = best_threshold(scores[:, tag], truth[:, tag])
    return thresholds


def best_threshold(scores, truth):
    """scores (n,), truth (n,) bool -> the score with the best F1, half way to the next one below."""
    falling, level = np.unique(-scores, return_inverse=True)  # equal scores are one level
    predicted = np.bincount(level).cumsum()
    right = np.bincount(level, truth).cumsum()
    levels = np.append(-falling, 0).astype(scores.dtype)
    best = f1(right, predicted, truth.sum()).argmax()
    return float((levels[best] + levels[best + 1]) / 2)


def least_confidence(task):
    """The confidence that all but MOST_UNKNOWN of the names on dev have, from the picture alone."""
    logits, _ = whole_answers(task, task.dev, task.dev.index)
    best = logits.softmax(1).amax(1).sort().values
    return best[int(MOST_UNKNOWN * len(best))].item()


# ---- the files of a run --------------------------------------------------------------------------


def write_results(flags, task, run):
    """Evaluate the network on pictures that decided nothing, and write all files but state.pt."""
    out = run.out
    row = metrics_row(flags, task, run)
    print(f"{flags.split:<9}{in_words(row['end'])}")
    thresholds = None
    if task.arm in HIDES_TAGS:
        judged, row["dev"]["map"], thresholds = judge_tags(task)
        row |= judged
        best = judged.get("tags_truth", judged["tags"])
        means = f"F1 {best['micro_f1']:.1f} % (micro), {best['macro_f1']:.1f} % (macro)"
        print(f"tags     mAP {best['map']:.1f} %, {means}")
    split = task.train.split
    header = {"tags": task.net.config, "run": run.config, "words": task.words}
    header |= {"classes": task.classes, "image_size": task.side, "data": flags.data}
    header |= {"thresholds": thresholds, "least_confidence": least_confidence(task)}
    header |= {"base": flags.encoder, "packed_size": split["images"].shape[1]}
    header |= {key: split["header"][key] for key in ("crop", "margin")}
    train.save_safetensors(task.net.state_dict(), out / "model.safetensors", header)
    train.save_json(row, out / f"metrics{split_suffix(flags.split)}.json")  # the last: all is done
    print(f"wrote    {out}/ after {row['seconds']:.0f} s")
    print(f"next: python -m apps.tags {train.quoted(out)} PICTURE")


def metrics_row(flags, task, run):
    """-> metrics.json without the tags' numbers."""
    log = train.read_log(run.out / "log.jsonl")
    dev = next((row for row in reversed(log) if "loss" not in row), {})
    row = {"run": run.out.name, "arm": task.arm, "seed": flags.seed, "data": flags.data}
    row |= {"evaluated_on": flags.split, "half": run.config.get("half", {}).get(flags.split, {})}
    row["end"] = accuracies(task, task.report)
    row["dev"] = {k.removeprefix("dev_"): x for k, x in dev.items() if k.startswith("dev_")}
    row["parameters"] = sum(p.numel() for p in task.net.parameters())
    row |= train.cost_of_steps(run.out / "log.jsonl", run.batch_size)
    row |= {"seconds": run.seconds(), "config": run.config, "command": flags.command}
    return row | {"machine": train.machine(task.device), "commit": train.commit()}


# ---- use -----------------------------------------------------------------------------------------


def use(flags, device, autocast):
    """Print who each picture shows, and its tags, or write captions."""
    if classifier.is_recogniser(flags.encoder):
        return use_names_alone(flags)
    net, header = load_tagger(flags.encoder)
    if net.arm not in HIDES_TAGS:
        refuse_useless(flags.given & {"threshold"}, f"on a run of --arm {net.arm}")
    net.to(device)
    most = len(header["words"]) if flags.captions else NAMED
    options = {"threshold": flags.threshold, "autocast": autocast, "most": most}
    answer = partial(answer_rows, net, header, **options)
    learned_from = header.get("data")
    if flags.captions:
        return captions.write_captions(flags, partial(each_answer, answer, header), learned_from)
    problems = []
    for row in each_answer(answer, header, flags.pictures, problems):
        line = json.dumps(row, ensure_ascii=False) if flags.json else line_of(row)
        print(line, flush=True)
    tell_problems(problems, learned_from, flags.json)


def use_names_alone(flags):
    """Captions by a recogniser, which knows no tags."""
    if not flags.captions:
        run = train.quoted(flags.encoder)
        fix = f"python -m apps.recognize {run} PICTURE prints names, --captions writes them"
        raise UserError(f"{flags.encoder} knows characters and no tags: {fix}")
    refuse_useless(flags.given & {"names", "threshold"}, "on a recogniser, which knows no tags")
    flags.names = flags.encoder
    captions.write_captions(flags)


def each_answer(answer, header, paths, problems):
    """Yield a row of `answer_rows` for each picture of the paths, in order."""
    cut = (header["packed_size"], header["crop"], header["margin"])
    items = pictures(paths, *cut, problems)
    while some := list(itertools.islice(items, data.CHUNK)):
        yield from answer(some)


def answer_rows(net, header, some, threshold, autocast, most=NAMED):
    """(key, picture u8 (s, s, 3)) of some pictures -> a row of each: its name, confidence, tags."""
    keys, images = zip(*some, strict=True)
    images = torch.from_numpy(np.stack(images)).to(net.reach.device)
    view = data.view_images(images, *data.full_boxes(len(images)), header["image_size"])
    with autocast():
        logits, tags = answers(net, view)
    rows = []
    for i, key in enumerate(keys):
        sure, who = logits[i].cpu().softmax(0).max(0)
        name = header["classes"][who]
        known = sure >= header["least_confidence"]
        row = {"picture": key, "name": name if known else None, "best_guess": name}
        row["confidence"] = round(sure.item(), 4)
        if tags is not None:
            row["tags"] = named(tags[i].cpu(), header, threshold, most)
        rows.append(row)
    return rows


def line_of(row):
    """An answer as a line of text."""
    who = row["name"] or f"unknown, or {row['best_guess']}"
    line = f"{shown(row['picture'])}: {who} {row['confidence']:.0%}"
    if row.get("tags"):
        line += f"; {in_words(row['tags'])}"
    return line


# ---- the command ---------------------------------------------------------------------------------


def read_flags():
    """The flags; those of a run that is resumed come from its state.pt."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help="runs/NAME, or a checkpoint of MAE, DINO ...")
    add("pictures", nargs="*", metavar="PICTURE", help="file, folder, archive; ENCODER: NAME-tags")
    add = parser.add_argument_group("what to learn").add_argument
    add("--data", metavar="DIR", help="set with labels and tags (default: the encoder's, or toon)")
    add("--out", metavar="DIR", help="run folder (default: named by the encoder and the flags)")
    arms = "\n".join(f"{arm}: {text}" for arm, text in ARMS.items())
    add("--arm", default="mfdn", help=f"{arms}\nkeys: mfdn, fixed:weight=0.3; fixed:share=0.5")
    add("--epochs", type=at_least(2), default=30, help="passes over the data")
    add("--batch-size", type=at_least(1), default=32, metavar="B", help="images for one step")
    add("--lr", type=between(0, 1), default=5e-4, help="of the encoder")
    add = parser.add_argument_group("what is printed of pictures").add_argument
    add("--threshold", type=between(0, 1), metavar="P", help="of every tag (default: its own)")
    add("--json", action="store_true", help="print a JSON object a picture")
    add("--captions", action="store_true", help="write PICTURE.txt beside each picture")
    add("--append", action="store_true", help="to captions that are there, what they lack")
    add("--without", default="", metavar="TAGS", help="leave these out, 'solo, long hair'")
    add("--prepend", default="", metavar="WORDS", help="put these first in each caption")
    add("--names", metavar="RUN", help="runs/NAME-lora, which gives a caption its character")
    add("--escape", action="store_true", help="brackets in captions as \\( and \\)")
    train.add_flags(parser.add_argument_group("run and machine").add_argument)
    flags = parser.parse_intermixed_args()  # flags may stand between pictures
    parse_keys(flags.arm, ARM_KEYS, "--arm")  # now, and not when pictures are packed
    refuse_flags(flags)
    train.take_saved_flags(flags, "split")
    return flags


def refuse_flags(flags):
    """Flags of training have no effect on pictures, and the other way round."""
    of_captions = {"captions", "append", "without", "prepend", "escape", "names"}
    of_pictures = {"threshold", "json"} | of_captions
    machine = {"device", "dtype"}
    if not flags.pictures:
        refuse_useless(flags.given & of_pictures, "on training")
    elif flags.captions:
        refuse_useless(flags.given - {"threshold"} - of_captions - machine, "on captions")
    else:
        useless = flags.given - {"threshold", "json"} - machine
        refuse_useless(useless, "on pictures, without --captions")


def fill_defaults(flags):
    """Values of flags that were not given, and depend on others. A resumed run has them."""
    encoder = checkpoints.load_encoder(flags.encoder)  # its faults show before a set is drawn
    folder = flags.data or checkpoints.flags_of(flags.encoder).get("data", "datasets/toon")
    flags.data = str(data.open_or_pack(folder, encoder.image_size))
    name = train.run_name(flags, f"{name_of(flags.encoder)}-tags", only={"arm", "seed"})
    train.set_defaults(flags, out=f"runs/{name}", command=train.command())


def main():
    flags = read_flags()
    device, autocast, machine = train.open_machine(flags)
    if flags.pictures:
        return use(flags, device, autocast)
    if is_tagger(flags.encoder):
        fix = "give pictures, or another encoder"
        raise UserError(f"{flags.encoder} is a run of apps/tags.py: {fix}")
    print(machine)
    if not flags.resume:
        fill_defaults(flags)
    task = open_task(flags, device, autocast)
    run, optimizer = open_run(flags, task)
    fit(task, run, optimizer, flags.seed)
    write_results(flags, task, run)


if __name__ == "__main__":
    cli(main)
