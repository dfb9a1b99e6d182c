"""The checkpoint formats of the field: any of them -> our names and shapes. export.py writes them.

Read:   AniMask; MAE (He et al. 2021), encoder or full; DINO (Caron et al. 2021); DINOv2 (Oquab et
        al. 2023) without registers; timm's ViT; Hugging Face's ViT and ViTMAE. As safetensors, or
        as a .pth of tensors and plain values.

Our names are MAE's, which DINO and timm share; Hugging Face's stand in the tables below. Shapes
decide the architecture. The number of heads, the epsilon of the LayerNorms and the mean and std of
the pixels are read from the header or from the json files beside the checkpoint. Nothing that a
file holds is ever run.
"""

import argparse
import math
import re
import warnings
from pathlib import Path

import torch

from common.fields import (
    ENCODER,
    EPSILON,
    FLAG,
    check_arrays,
    check_blocks,
    check_encoder,
    check_fields,
    list_of,
    number,
    one_of,
    shown,
    whole,
)
from common.io import UserError, check_size, parse_table, read_safetensors, regular
from kernels.gather import MEAN, STD

EPS = 1e-6  # of the LayerNorms, here and in every public ViT but Hugging Face's
WRAPPERS = ("teacher", "model", "state_dict")  # keys of training checkpoints that hold weights
PREFIX = r"^((module|teacher|backbone|vit)\.)+"
DROPPED = (
    r"(head|pre_logits|fc_norm|dino_head|ibot_head|classifier|pooler|embeddings\.mask_token)(\.|$)"
)

HF = {  # ours: Hugging Face's, without .weight and .bias
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
HF_BLOCKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_TOKENS = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
}
QKV = ("attn.q", "attn.k", "attn.v")  # three layers there, one here
WIDTHS = (192, 256, 320, 384, 512, 640, 768, 896, 1024, 1536)  # public ViTs with heads of 64
HEADS = {width: width // 64 for width in WIDTHS} | {1280: 16, 1408: 16, 1664: 16}
VIT = {  # what makes it a ViT: width D, 1 + N places, patches of p x p
    "cls_token": "float 1 1 D",
    "pos_embed": "float 1 N D",
    "patch_embed.proj.weight": "float D 3 p p",
    "patch_embed.proj.bias": "float D",
    "mask_token?": "float 1 1 W",
}
REMEDY = "give a model of AniMask or a public checkpoint; of a run of ours, the folder"

# Fields of a header of ours, then of the json files of others
MODEL = {
    "config": ENCODER
    | {
        "decoder_dim?": whole(1, 2**14),
        "decoder_depth?": whole(0, 1000),
        "decoder_heads?": whole(1, 1000),
        "norm_eps?": EPSILON,
    },
    "norm_pix?": FLAG,
    "floor?": number(0),
}
THREE = list_of(number(), 3, 3)
THREE_POSITIVE = list_of(number(1e-6), 3, 3)
CONFIG = {
    "num_attention_heads?": whole(1, 1000),
    "decoder_num_attention_heads?": whole(1, 1000),
    "hidden_size?": whole(1, 2**14),
    "layer_norm_eps?": EPSILON,
    "norm_pix_loss?": FLAG,
    "hidden_act?": one_of("gelu"),
    "model_args?": {"num_heads?": whole(1, 1000)},
    "pretrained_cfg?": {"num_heads?": whole(1, 1000), "mean?": THREE, "std?": THREE_POSITIVE},
}
PIXELS = {"image_mean?": THREE, "image_std?": THREE_POSITIVE}


def check_tensors(tensors, path):
    """Tensors that are larger than their file are refused: views of few numbers, or sparse ones."""
    size, room = 0, 4 * Path(path).stat().st_size  # tied weights count twice
    for name, w in tensors.items():
        size += w.numel() * w.element_size()
        if w.layout is not torch.strided or w.device.type != "cpu" or w.is_quantized or size > room:
            raise UserError(
                f"{path}: {shown(str(name))} {tuple(w.shape)} is larger than the file, or packed; "
                "save it as plain tensors"
            )


def read_tensors(path):
    """A safetensors or torch file -> (what it holds, our header or {}). Its first bytes say which
    it is.
    """
    try:
        with open(regular(path), "rb") as f:
            start = f.read(9)
        if start[8:] != b"{" and start[:1] in (
            b"P",
            b"\x80",
        ):  # a zip, or a bare pickle as torch wrote before 1.6
            check_size(path)
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # about old pickles; training checkpoints keep their arguments too
                return torch.load(path, map_location="cpu", weights_only=True), {}
    except (
        Exception
    ) as problem:  # torch.load raises half a dozen kinds for a truncated or foreign file
        code = re.search(r"GLOBAL (\S+)", str(problem))
        line = shown(str(problem).strip().split("\n")[0][:100]) or "it is cut short"
        reason = f"it wants to run {code[1]} and was not opened" if code else line
        raise UserError(
            f"{path} is not a whole AniMask model or public checkpoint ({reason})"
        ) from None
    return read_safetensors(path, "it should be a model of AniMask or a public checkpoint")


def read_json(path, table):
    """-> dict, whose fields are as the table says; {} where there is no file."""
    try:
        content = parse_table(Path(path).read_text()) if Path(path).exists() else {}
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} can't be read as JSON ({problem})") from None
    check_fields(content, table, path, "mend it, or take another copy")
    return content


def is_decoder(name):
    return name.startswith("decoder_") or name == "mask_token"


def encoder_of(weights):
    """The weights without a decoder's."""
    return {k: w for k, w in weights.items() if not is_decoder(k)}


def hf_names(depth, decoder_depth):
    """{our name: Hugging Face's name} of all parameters, with q, k and v apart as they are there."""
    stems = dict(HF)
    for (ours, theirs), n in zip(HF_BLOCKS.items(), (depth, decoder_depth), strict=True):
        stems |= {
            f"{ours}.{i}.{a}": f"{theirs}.{i}.{b}" for i in range(n) for a, b in HF_BLOCK.items()
        }
    return {a + end: b + end for a, b in stems.items() for end in (".weight", ".bias")} | HF_TOKENS


def count_blocks(names, stem):
    """How many different i there are in names that begin with `stem`.i."""
    return len(
        {m[1] for m in (re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in names) if m}
    )


def from_hf(weights):
    """Hugging Face's names -> ours; q, k, v are stacked into qkv. Names that are not known stay, to
    be reported.
    """
    weights = {
        k.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): w
        for k, w in weights.items()
    }
    depths = [count_blocks(weights, theirs.removeprefix("vit.")) for theirs in HF_BLOCKS.values()]
    ours = {theirs.removeprefix("vit."): name for name, theirs in hf_names(*depths).items()}
    weights = {ours.get(k, k): w for k, w in weights.items()}
    for name in [k for k in weights if ".attn.q." in k]:
        three = [name.replace("attn.q", matrix) for matrix in QKV]
        if all(k in weights for k in three):
            weights[name.replace("attn.q", "attn.qkv")] = torch.cat([weights.pop(k) for k in three])
    return weights


def fold_layer_scale(weights):
    """DINOv2's x + gamma * f(x), gamma (D,) for each branch, is exact as rows of the branch's last
    matrix and bias.
    """
    weights = dict(weights)
    for name in [k for k in weights if k.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = weights.pop(name)
        last = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        for key, scale in (
            (f"{last}.weight", gamma[:, None]),
            (f"{last}.bias", gamma),
        ):  # (D, in), (D,)
            if key in weights:
                weights[key] = scale * weights[key]
    return weights


def fold_pixels(weights, mean, std):
    """An encoder made for (x - mean) / std is given (x - MEAN) / STD here: its patch embedding
    takes up the difference.

    (x - mean) / std = (x - MEAN) / STD * STD / std + (MEAN - mean) / std.
    """
    name, mean, std = "patch_embed.proj", torch.tensor(mean), torch.tensor(std)
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]  # (D, 3, p, p), (D)
    scale, shift = torch.tensor(STD) / std, (torch.tensor(MEAN) - mean) / std
    moved = bias + (kernel * shift[:, None, None]).sum((1, 2, 3))
    return weights | {f"{name}.weight": kernel * scale[:, None, None], f"{name}.bias": moved}


def our_names(loaded, path):
    """What a file holds -> {our name: tensor fp32}, the patch embedding still a convolution."""
    loaded = loaded if isinstance(loaded, dict) else {}
    inner = next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), dict)), loaded)
    tensors = {k: w for k, w in inner.items() if isinstance(w, torch.Tensor)}
    check_tensors(tensors, path)
    weights = {
        re.sub(PREFIX, "", str(k)): w.float()
        for k, w in tensors.items()
        if not str(k).startswith("student.")
    }
    weights = {k: w for k, w in weights.items() if not re.match(DROPPED, k)}
    if {"register_tokens", "reg_token"} & weights.keys():
        raise UserError(
            f"{path} has register tokens: this encoder knows none, and attention without them would be "
            "another; take the checkpoint without registers"
        )
    weights = fold_layer_scale(from_hf(weights) if "embeddings.cls_token" in weights else weights)
    if (
        "mask_token" in weights and weights["mask_token"].ndim == 2
    ):  # DINOv2's (1, D): of its training, no decoder's
        del weights["mask_token"]
    check_arrays(weights, VIT, path, REMEDY)
    return weights


def facts_beside(path, header):
    """What shapes can't tell: of a file of ours from its header, else from config.json and the like
    beside it.
    """
    if header:
        check_fields(header, MODEL, path, "python pretrain.py makes an encoder")
        return header["config"] | {"norm_pix": header.get("norm_pix", True)}
    config = read_json(path.parent / "config.json", CONFIG)
    pixels = read_json(path.parent / "preprocessor_config.json", PIXELS)
    timm = (config.get("model_args") or {}) | (config.get("pretrained_cfg") or {})
    facts = {
        "heads": config.get("num_attention_heads", timm.get("num_heads")),
        "dim": config.get("hidden_size"),
        "decoder_heads": config.get("decoder_num_attention_heads"),
        "norm_eps": config.get("layer_norm_eps"),
        "norm_pix": config.get("norm_pix_loss"),
        "mean": pixels.get("image_mean", timm.get("mean")),
        "std": pixels.get("image_std", timm.get("std")),
    }
    return {k: v for k, v in facts.items() if v is not None}


def check_heads(width, heads, key, owner):
    """A number of heads changes no shape: a wrong one would be seen nowhere but in the features."""
    if heads is None or width % heads:
        raise UserError(
            f"{owner} is {width} wide, and {heads or 'an unknown number of'} heads can't share it; "
            f'a config.json beside it has to say {{"{key}": N}}'
        )


def encoder_file(given):
    """A run folder or a file -> the file with the weights; a UserError says what makes one."""
    path = given / "model.safetensors" if given.is_dir() else given
    if path.exists():
        return path
    if (given / "adapter_config.json").exists():
        raise UserError(
            f"{given} holds only an adapter: python export.py {given} --to merged makes it an encoder"
        )
    run = given.parent if given.suffix else given
    raise UserError(f"no encoder at {path}: python pretrain.py --out {run} makes one")


def shape_of(weights, path):
    """-> what the shapes of the weights say of a ViT: {image_size, patch_size, dim, depth, ...}."""
    positions = weights["pos_embed"].shape[1]
    side = math.isqrt(max(positions - 1, 0))
    if positions < 2 or side**2 != positions - 1:
        raise UserError(
            f"{path} has {positions} positions: not a square grid and one for the CLS token"
        )
    p = weights["patch_embed.proj.weight"].shape[2]
    width = weights["mask_token"].shape[-1] if "mask_token" in weights else 0
    return {
        "image_size": side * p,
        "patch_size": p,
        "dim": weights["cls_token"].shape[2],
        "depth": count_blocks(weights, "blocks"),
        "decoder_dim": width,
        "decoder_depth": count_blocks(weights, "decoder_blocks"),
    }


def with_defaults(facts, shape):
    """The heads and the epsilon, which no shape tells: those given, else those of public ViTs."""
    width = shape["decoder_dim"]
    usual = {
        "heads": HEADS.get(shape["dim"]),
        "decoder_heads": None if width % 32 else width // 32,
        "norm_eps": EPS,
    }
    return usual | facts | shape


def read_checkpoint(path):
    """Any known format -> ({our name: tensor}, of an encoder or a whole MAE; facts: how a ViT of
    these is built).

    facts: image_size, patch_size, dim, depth, heads, norm_eps; decoder_dim, decoder_heads and
    decoder_depth, which is 0 where there is no decoder; norm_pix where it is known. What can't be
    loaded as it was trained is a UserError.
    """
    given = Path(path)
    path = encoder_file(given)
    loaded, header = read_tensors(path)
    try:
        weights, facts = our_names(loaded, path), facts_beside(path, header)
    except (RuntimeError, IndexError):
        raise UserError(f"{path} has weights of shapes that do not go together; {REMEDY}") from None
    shape = shape_of(weights, path)
    dim, width = shape["dim"], shape["decoder_dim"]
    if facts.get("dim", dim) != dim:
        raise UserError(
            f"{path} is {dim} wide, config.json beside it says {facts['dim']}: they are not of one model"
        )
    facts = with_defaults(facts, shape)
    check_heads(dim, facts["heads"], "num_attention_heads", path)
    if width and facts["decoder_depth"]:
        check_heads(
            width, facts["decoder_heads"], "decoder_num_attention_heads", f"the decoder of {path}"
        )
    check_encoder(weights, facts, path, REMEDY)
    check_blocks(weights, "decoder_blocks", facts["decoder_depth"], width, path, REMEDY)
    if "mean" in facts and "std" in facts:
        weights = fold_pixels(weights, facts["mean"], facts["std"])
    matrix = (
        weights["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
    )  # (D, p*p*3), as a patch is laid out
    return weights | {"patch_embed.proj.weight": matrix.contiguous()}, facts
