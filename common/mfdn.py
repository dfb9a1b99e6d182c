"""MFDN: a picture and its tags in one network. tags.py trains it; whoever wants tags of a picture asks `answers`.

    B batch   K patches seen   L places for words, of which R = L - 2 for tags   D width   V tags
              C characters

The lower half of a pre-trained ViT reads the picture, a small encoder the tags, one token each. The
upper half of the ViT reads both, one after the other; the picture's CLS token then names the
character. A decoder, in which words ask and patches answer, names the tags that were hidden (Yi et
al. 2023, "Anime Character Identification and Tag Prediction by Multimodality Modeling"; without
masks and decoder it is ViLT, Kim et al. 2021, as Rios et al. 2022 use it).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoints import about_model, blank_encoder, load_exactly, model_file
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
    list_of,
    number,
    one_of,
    whole,
)
from common.io import read_safetensors, save_safetensors
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


def save(net, path, about):
    """model.safetensors of a run; about joins the header: words, classes, thresholds, how pictures
    were cut.
    """
    save_safetensors(net.state_dict(), path, {"tags": net.config, **about})


def is_tagger(path):
    """Did tags.py write this run folder?"""
    return "tags" in about_model(path)


def load(folder):
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
