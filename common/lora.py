"""Files of LoRA adapters, as the `peft` library reads and writes them; files of encoders.

An adapter is adapter_model.safetensors and adapter_config.json. It belongs to the one encoder that
it was trained on, which a fingerprint names. The method itself is in finetune_lora.py.
"""

import hashlib
import math
import re
from pathlib import Path

import torch
from torch import nn

from common import formats
from common.checkpoints import as_convolution, load_encoder
from common.fields import (
    FLAG,
    SIDE,
    TEXT,
    Field,
    check_fields,
    check_finite,
    number,
    one_of,
    short,
    table_of,
    whole,
)
from common.io import UserError, save_json, save_safetensors
from model import shape_of

ADAPTER = "adapter_model.safetensors", "adapter_config.json"
TENSOR = "base_model.model.{}.lora_{}.weight"  # peft's name for a layer's A or B
NO = Field("false", lambda v: v in (False, []))
# Initial A and B of peft that leave the encoder as it is. PiSSA and OLoRA change it, too.
KEEPS_THE_BASE = Field(
    "true or a start that leaves the encoder as it is; "
    "peft's save_pretrained(NEW, path_initial_model_for_weight_conversion=UNTRAINED) converts it",
    lambda v: v in (True, False, "gaussian", "eva", "orthogonal", "mica"),
)
RANK = whole(1, 10**5)
ALPHA = number(1e-6)
CONFIG = {  # fields of adapter_config.json: plain LoRA of an unchanged encoder
    "peft_type": one_of("LORA"),
    "base_model_name_or_path?": TEXT,
    "r": RANK,
    "lora_alpha": ALPHA,
    "rank_pattern?": table_of(RANK),
    "alpha_pattern?": table_of(ALPHA),
    "use_rslora?": FLAG,
    "bias?": one_of("none"),
    "use_dora?": NO,
    "fan_in_fan_out?": NO,
    "modules_to_save?": NO,
    "init_lora_weights?": KEEPS_THE_BASE,
}
ABOUT = {"fingerprint": TEXT, "image_size": SIDE}  # our header of the tensors
REMEDY = "python finetune_lora.py ENCODER --method lora makes one"


def save_encoder(encoder, path, about):
    """Write an encoder without a decoder; `about` joins the header."""
    config = shape_of(encoder) | {"norm_eps": encoder.norm.eps}
    save_safetensors(as_convolution(encoder.state_dict()), path, {"config": config, **about})


def fingerprint(encoder):
    """12 hex digits of an encoder's weights, without its adapter and its positions."""
    digest = hashlib.sha256()
    weights = {k.replace(".base.", "."): w for k, w in encoder.state_dict().items()}
    for name, weight in sorted(weights.items()):
        if name != "pos_embed" and not name.endswith((".A", ".B")):
            digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_adapter(layers, encoder, folder, base):
    """Write {layer: (A (r, in), B (out, r), scale)}; `base` is the file or run of the encoder.

    Layers have the same names, ranks and scales in every block. peft has one rank and one alpha;
    those of other layers are patterns. Our header adds the encoder's fingerprint and image size.
    """
    tensors = {}
    for name, (A, B, _) in layers.items():
        tensors |= {TENSOR.format(name, "A"): A, TENSOR.format(name, "B"): B}
    ranks, alphas = {}, {}
    for name, (A, _, scale) in layers.items():
        short = re.sub(r"^blocks\.\d+\.", "", name)
        ranks[short] = len(A)
        alphas[short] = scale * len(A)
    least = min(ranks, key=ranks.get)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "target_modules": sorted(ranks),
        "r": ranks[least],
        "rank_pattern": {k: v for k, v in ranks.items() if v != ranks[least]},
        "lora_alpha": alphas[least],
        "alpha_pattern": {k: v for k, v in alphas.items() if v != alphas[least]},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "task_type": None,
    }
    size = encoder.side * encoder.patch_size
    about = {"fingerprint": fingerprint(encoder), "image_size": size}
    save_safetensors(tensors, Path(folder) / ADAPTER[0], about)
    save_json(config, Path(folder) / ADAPTER[1], 2)


def read_files(folder):
    """-> adapter_config.json, {layer: [A, B]}, our header or {}. Other kinds of LoRA are refused."""
    path, about = (Path(folder) / name for name in ADAPTER)
    if not path.exists() or not about.exists():
        raise UserError(f"{folder} has no adapter: that is {' and '.join(ADAPTER)}")
    config = formats.read_json(about, CONFIG)
    tensors, header = formats.read_tensors(path)
    check_fields(header, ABOUT if header else {}, path, REMEDY)
    names = sorted({re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", k) for k in tensors})
    wanted = {TENSOR.format(name, "A") for name in names}
    wanted |= {TENSOR.format(name, "B") for name in names}
    if wanted != tensors.keys() or not names:
        missing = ", ".join(sorted(wanted - tensors.keys())[:3])
        raise UserError(f"{path} is no LoRA of a ViT; missing: {missing}; {REMEDY}")
    formats.check_tensors(tensors, path)
    check_finite(tensors, path)
    for key in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
        if not any(ends_in(name, key) for name in names):
            raise UserError(
                f"{about} has a pattern {key[:100]!r}, and no layer's name ends so; write the "
                "names of layers in its place"
            )
    pairs = {k: [tensors[TENSOR.format(k, factor)].float() for factor in "AB"] for k in names}
    return config, pairs, header


def ends_in(name, key):
    """Is the key of a pattern the last part of a layer's name? A regular expression, as in peft,
    may take for ever.
    """
    plain = key.removeprefix("^").replace("\\.", ".")
    return f".{name}".endswith(f".{plain}")


def pattern_value(patterns, name, otherwise):
    """The rank or alpha of a layer: that of the first pattern that fits its name."""
    return next((v for k, v in (patterns or {}).items() if ends_in(name, k)), otherwise)


def read_adapter(folder, encoder):
    """The adapter of a folder, ours or one that peft made -> {layer: (A (r, in), B (out, r), scale)}.

    One that was trained on another encoder, or does not fit this one, is a UserError.
    """
    config, pairs, header = read_files(folder)
    linear = {k: m for k, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    if odd := sorted(pairs.keys() - linear.keys()):
        depth = len(encoder.blocks)
        raise UserError(
            f"the adapter in {folder} has {', '.join(odd[:3])}, which this encoder of {depth} "
            "blocks has not"
        )
    layers = {}
    for name, (A, B) in pairs.items():
        rank = pattern_value(config.get("rank_pattern"), name, config["r"])
        alpha = pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
        wide, high = linear[name].in_features, linear[name].out_features
        if A.shape != (rank, wide) or B.shape != (high, rank):
            raise UserError(
                f"the adapter in {folder} does not fit {name}: A {tuple(A.shape)} and B "
                f"{tuple(B.shape)} against rank {rank} and a layer of {wide} to {high}"
            )
        layers[name] = A, B, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if header and header["fingerprint"] != fingerprint(encoder):
        base = (
            f"{config.get('base_model_name_or_path')}, fingerprint {short(header['fingerprint'])}"
        )
        raise UserError(
            f"the adapter in {folder} is for {base}; this encoder's is {fingerprint(encoder)}"
        )
    return layers


@torch.no_grad()
def load_merged(folder, image_size=None):
    """A folder with an adapter -> its encoder with W + scale B A in place of W, and its image size."""
    config, _, header = read_files(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{folder}/{ADAPTER[1]} does not say which encoder it is for: base_model_name_or_path"
        )
    encoder, size = load_encoder(base, image_size or header.get("image_size"))
    for name, (A, B, scale) in read_adapter(folder, encoder).items():
        encoder.get_submodule(name).weight += scale * (B @ A)
    return encoder, size
