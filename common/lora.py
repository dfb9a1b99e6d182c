"""LoRA: a small trained change beside each frozen matrix of an encoder; its files, as the `peft` library reads them.

An adapter is adapter_model.safetensors and adapter_config.json; it belongs to the one encoder that
it was made on.
"""

import hashlib
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import formats
from common.checkpoints import as_convolution, load_encoder
from common.convnets import ConvNet
from common.fields import (
    FLAG,
    SIDE,
    TEXT,
    Field,
    check_fields,
    check_finite,
    list_of,
    number,
    one_of,
    shown,
    table_of,
    whole,
)
from common.io import UserError, save_json, save_safetensors
from model import shape_of

# matrices that LoRA can change, and the Linear of a block that holds them
LAYERS = {
    "attn.qkv": ("q", "k", "v"),
    "attn.proj": ("o",),
    "mlp.fc1": ("fc1",),
    "mlp.fc2": ("fc2",),
}
TARGETS = tuple(name for names in LAYERS.values() for name in names)
ADAPTER = "adapter_model.safetensors", "adapter_config.json"
TENSOR = "base_model.model.{}.lora_{}.weight"  # peft's name for a layer's A or B
NO = Field("false", lambda v: v in (False, []))
KEEPS_THE_BASE = Field(  # initial A and B of peft that fit here; others change the encoder, too
    "true or a start that leaves the encoder as it is; "
    "peft's save_pretrained(NEW, path_initial_model_for_weight_conversion=UNTRAINED) converts it",
    lambda v: v in (True, False, "gaussian", "eva", "orthogonal", "mica"),
)
RANK, ALPHA = whole(1, 10**5), number(1e-6)
CONFIG = {  # fields of adapter_config.json: plain LoRA of an unchanged encoder; then of our header
    "peft_type": one_of("LORA"),
    "base_model_name_or_path?": TEXT,
    "r": RANK,
    "lora_alpha": ALPHA,
    "rank_pattern?": table_of(RANK),
    "alpha_pattern?": table_of(ALPHA),
    "lora_dropout?": number(0, 0.99),
    "use_rslora?": FLAG,
    "bias?": one_of("none"),
    "use_dora?": NO,
    "fan_in_fan_out?": NO,
    "modules_to_save?": NO,
    "init_lora_weights?": KEEPS_THE_BASE,
}
ABOUT = {"parts?": list_of(whole(0, 2), 1, 3), "fingerprint": TEXT, "image_size": SIDE}
REMEDY = "python finetune_lora.py ENCODER --method lora makes one"


class LoRA(nn.Module):
    """A frozen Linear and a trained change of low rank: W x + b + alpha/r B A dropout(x) (Hu et al.
    2021, eq. 3).

    The output may be `of` equal chunks, as q, k and v in one matrix are 3; each of `chunks` has its
    own A and B. B starts at zero: the adapted layer starts as the plain one. train() and eval()
    switch the dropout, and never merge.
    """

    def __init__(self, base, r, alpha, dropout=0.0, chunks=(0,), of=1):
        super().__init__()
        self.base, self.scale, self.chunks, self.of = base, alpha / r, tuple(chunks), of
        self.dropout, self.merged = nn.Dropout(dropout), False
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(len(chunks), r, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(len(chunks), base.out_features // of, r, **like))
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.train(
            base.training
        )  # or the dropout of an adapter put on an encoder in eval mode would be at work

    def factors(self):
        """-> A (n*r, in) and B (out, n*r) of all n chunks: the As on top of each other, the Bs on a
        diagonal.
        """
        empty = self.B.new_empty(self.B.shape[1], 0)  # the rows of a chunk that is not adapted
        B = dict(zip(self.chunks, self.B, strict=True))
        return self.A.flatten(0, 1), torch.block_diag(*(B.get(i, empty) for i in range(self.of)))

    def forward(self, x):
        if self.merged:
            return self.base(x)
        A, B = self.factors()
        return self.base(x) + self.scale * F.linear(F.linear(self.dropout(x), A), B)


def lora_layers(encoder):
    """-> {name: LoRA} of an encoder, names as they were before: blocks.0.attn.qkv and so on."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, LoRA)}


def add_lora(encoder, r=8, alpha=None, dropout=0.0, targets=TARGETS):
    """Freeze the encoder and put LoRA of rank r on `targets` in every block -> its parameters, the
    only trained ones.

    alpha is 2r if None. targets: names of TARGETS; q, k and v have factors of their own in the
    fused matrix.
    """
    if not targets or set(targets) - set(TARGETS):
        raise UserError(
            f"LoRA targets '{','.join(targets)}': choose one or more of {','.join(TARGETS)}"
        )
    dim = encoder.cls_token.shape[2]
    if not 1 <= r <= dim or not 0 <= dropout < 1:
        raise UserError(
            f"LoRA of rank {r}, dropout {dropout}: the rank must lie in 1 to {dim}, the dropout in [0, 1)"
        )
    if lora_layers(encoder):
        raise UserError("this encoder has an adapter already: merge it first")
    encoder.requires_grad_(False)
    alpha = 2 * r if alpha is None else alpha
    for block in encoder.blocks:
        for layer, names in LAYERS.items():
            if chunks := [i for i, name in enumerate(names) if name in targets]:
                lora = LoRA(block.get_submodule(layer), r, alpha, dropout, chunks, len(names))
                block.set_submodule(layer, lora)
    return [weight for weight in encoder.parameters() if weight.requires_grad]


@torch.no_grad()
def merge_lora(encoder, sign=1):
    """Add every adapter to its frozen matrix, which then does the work of both: W += alpha/r B A,
    in fp32.
    """
    for name, lora in lora_layers(encoder).items():
        if lora.merged == (sign > 0):
            raise ValueError(f"{name} is {'already' if lora.merged else 'not'} merged")
        A, B = lora.factors()
        weight = lora.base.weight
        weight.copy_(weight.float() + sign * lora.scale * (B.float() @ A.float()))
        lora.merged = sign > 0


def unmerge_lora(encoder):
    """Undo merge_lora, to fp32 rounding."""
    merge_lora(encoder, -1)


def remove_lora(encoder):
    """Put the plain Linear layers back: with the adapter in them if it was merged, without it if
    not.
    """
    for name, lora in lora_layers(encoder).items():
        encoder.set_submodule(name, lora.base)


def save_encoder(encoder, path, about):
    """Write an encoder alone, without a decoder; an adapter has to be merged and removed before."""
    if lora_layers(encoder):
        raise ValueError("merge_lora and remove_lora first: a file of ours holds plain layers")
    if isinstance(encoder, ConvNet):
        return save_safetensors(encoder.state_dict(), path, {"config": encoder.config, **about})
    config = shape_of(encoder) | {"norm_eps": encoder.norm.eps}
    save_safetensors(as_convolution(encoder.state_dict()), path, {"config": config, **about})


def fingerprint(encoder):
    """12 hex digits of an encoder's weights, adapter and positions left out: an adapter belongs to
    one encoder.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(
        (k.replace(".base.", "."), w) for k, w in encoder.state_dict().items()
    ):
        if name != "pos_embed" and not name.endswith((".A", ".B")):
            digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_adapter(encoder, folder, base):
    """Write the LoRA of an encoder; `base` is the run or file that load_encoder made it from.

    q, k and v become one adapter of the fused layer, exactly: A = [Aq; Ak; Av], B block diagonal,
    rank and alpha times three; where rank and alpha differ from those of most layers, peft has them
    as patterns. Our header adds what `peft` does not need: which of q, k and v, the encoder's
    fingerprint, its image size.
    """
    layers, tensors = lora_layers(encoder), {}
    if not layers or any(lora.merged for lora in layers.values()):
        raise ValueError("there is no adapter to be saved, or it is merged: unmerge_lora first")
    for name, lora in layers.items():
        tensors[TENSOR.format(name, "A")], tensors[TENSOR.format(name, "B")] = lora.factors()
    qkv = next((list(lora.chunks) for lora in layers.values() if lora.of == 3), None)
    about = {
        "parts": qkv,
        "fingerprint": fingerprint(encoder),
        "image_size": encoder.side * encoder.patch_size,
    }

    ranks = {name: len(lora.chunks) * lora.A.shape[1] for name, lora in layers.items()}
    alphas = {name: lora.scale * ranks[name] for name, lora in layers.items()}
    short = {
        name: re.sub(r"^blocks\.\d+\.", "", name) for name in layers
    }  # one name for the same layer of all blocks
    if len({(short[k], ranks[k], alphas[k]) for k in layers}) * len(encoder.blocks) != len(layers):
        short = {
            name: name for name in layers
        }  # an adapter from elsewhere, of some blocks or of several ranks
    r, alpha = min(ranks.values()), alphas[min(ranks, key=ranks.get)]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "target_modules": sorted(set(short.values())),
        "r": r,
        "rank_pattern": {short[k]: v for k, v in ranks.items() if v != r},
        "lora_alpha": alpha,
        "alpha_pattern": {short[k]: v for k, v in alphas.items() if v != alpha},
        "lora_dropout": next(iter(layers.values())).dropout.p,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "task_type": None,
    }
    save_safetensors(tensors, Path(folder) / ADAPTER[0], about)
    save_json(config, Path(folder) / ADAPTER[1], 2)


def read_adapter(folder):
    """-> adapter_config.json, {layer: (A, B)}, our header or {}. Only plain LoRA of an unchanged
    encoder.
    """
    path, about = (Path(folder) / name for name in ADAPTER)
    if not path.exists() or not about.exists():
        raise UserError(f"{folder} has no adapter: that is {' and '.join(ADAPTER)}")
    config = formats.read_json(about, CONFIG)
    tensors, header = formats.read_tensors(path)
    check_fields(tensors, {}, path, REMEDY)
    if header:
        check_fields(header, ABOUT, path, REMEDY)
    names = sorted({re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", k) for k in tensors})
    wanted = {TENSOR.format(name, factor) for name in names for factor in "AB"}
    if wanted != tensors.keys() or not names:
        missing, extra = sorted(wanted - tensors.keys())[:3], sorted(tensors.keys() - wanted)[:3]
        raise UserError(
            f"{path} is no LoRA of a ViT; missing: {', '.join(missing)}; left over: {', '.join(extra)}"
        )
    formats.check_tensors(tensors, path)
    check_finite(tensors, path)
    for key in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
        if not any(ends_in(name, key) for name in names):
            raise UserError(
                f"{about} has a pattern {shown(key)[:100]!r}, and no layer's name ends so; patterns are "
                "compared letter by letter: write names in its place"
            )
    pairs = {k: [tensors[TENSOR.format(k, factor)].float() for factor in "AB"] for k in names}
    return config, pairs, header


def ends_in(name, key):
    """Is the key of a pattern the last parts of a layer's name? peft would match it as a regular
    expression, which takes for ever where somebody wants it to.
    """
    plain = key.removeprefix("^").replace("\\.", ".")
    return f".{name}".endswith(f".{plain}")


def pattern_value(patterns, name, otherwise):
    """What rank_pattern or alpha_pattern says of a layer."""
    return next((v for k, v in (patterns or {}).items() if ends_in(name, k)), otherwise)


def lora_from(name, base, A, B, config, qkv, folder):
    """A (r, in) and B (out, r) of a file as LoRA on the Linear base; `qkv`, which of the three, get
    their own.
    """
    rank = pattern_value(config.get("rank_pattern"), name, config["r"])
    chunks, of = (qkv, 3) if qkv and name.endswith("attn.qkv") else ([0], 1)
    fits = A.shape == (rank, base.in_features) and B.shape == (base.out_features, rank)
    if not fits or rank % len(chunks) or len(set(chunks)) != len(chunks):
        raise UserError(
            f"the adapter in {folder} does not fit {name}: A {tuple(A.shape)} and B {tuple(B.shape)} "
            f"against rank {rank} and a layer of {base.in_features} to {base.out_features}"
        )
    alpha = pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    r, width = rank // len(chunks), base.out_features // of
    lora = LoRA(base, r, scale * r, config.get("lora_dropout") or 0.0, chunks, of)
    with torch.no_grad():
        lora.A.copy_(A.view_as(lora.A))
        for i, k in enumerate(chunks):
            lora.B[i] = B[k * width : (k + 1) * width, i * r : (i + 1) * r]
    return lora


def load_adapter(encoder, folder):
    """Put the LoRA of a folder, ours or one that `peft` made on our ViT, on a plain encoder -> its
    parameters.

    The encoder is frozen, as by add_lora. Nothing is changed before all of it is known to fit.
    """
    config, pairs, about = read_adapter(folder)
    if lora_layers(encoder):
        raise UserError("this encoder has an adapter already: merge_lora and remove_lora first")
    linear = {k: m for k, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    if odd := ", ".join(sorted(pairs.keys() - linear.keys())[:3]):
        depth = len(encoder.blocks)
        raise UserError(
            f"the adapter in {folder} has {odd}, which this encoder of {depth} blocks has not"
        )
    layers = {
        k: lora_from(k, linear[k], A, B, config, about.get("parts"), folder)
        for k, (A, B) in pairs.items()
    }
    if about and about["fingerprint"] != fingerprint(encoder):
        base = f"{config.get('base_model_name_or_path')}, fingerprint {about['fingerprint']}"
        raise UserError(
            f"the adapter in {folder} is for {base}; this encoder's is {fingerprint(encoder)}"
        )
    encoder.requires_grad_(False)
    for name, lora in layers.items():
        encoder.set_submodule(name, lora)
    return [weight for weight in encoder.parameters() if weight.requires_grad]


def load_merged(folder, image_size=None):
    """A folder with an adapter -> the encoder that it was made on with the adapter merged in, and
    its image size.
    """
    config, _, about = read_adapter(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{folder}/{ADAPTER[1]} does not say which encoder it is for: base_model_name_or_path"
        )
    encoder, size = load_encoder(base, image_size or about.get("image_size"))
    load_adapter(encoder, folder)
    merge_lora(encoder)
    remove_lora(encoder)
    return encoder, size
