"""The checkpoint formats of the field, read into our names and shapes. apps/export.py writes them.

Read:   MAE (He et al. 2021), encoder or full; DINO (Caron et al. 2021); DINOv2 (Oquab et
        al. 2023) without registers; timm's ViT; Hugging Face's ViT and ViTMAE. As safetensors, or
        as a .pth of tensors and plain values: nothing that a file holds is run.

Our names are MAE's, which DINO and timm share; Hugging Face's stand in a table below. Shapes decide
the architecture. What no shape tells (FACTS) is in json files in the same folder. Files of our own
come with their configuration, and common/checkpoints.py reads them.
"""

import math
import re
from pathlib import Path

import torch
from torch import nn

from common import door as fields
from common.door import read_json, read_torch, reading, regular
from common.train import UserError, read_safetensors
from kernels import MEAN, STD
from model import EPS, MAE, ViT

WRAPPERS = ("teacher", "model", "state_dict")  # keys of training checkpoints that hold weights
PREFIX = r"^((module|teacher|backbone|vit)\.)+"
DROPPED = r"(student|head|pre_logits|fc_norm|(dino|ibot)_head|classifier|pooler"
DROPPED += r"|embeddings\.mask_token)(\.|$)"
HF = {  # parts of our names: of Hugging Face's
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "encoder.layer",
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
FROM_HF = {theirs: ours for ours, theirs in HF.items()}
FROM_HF["decoder.decoder_encoder.layer"] = "decoder_blocks"
QKV = ("attn.q", "attn.k", "attn.v")  # three layers there, one here
PATCH_EMBED = "patch_embed.proj.weight"
WIDTHS = (192, 256, 320, 384, 512, 640, 768, 896, 1024, 1536)  # public ViTs with heads of 64
HEADS = {width: width // 64 for width in WIDTHS} | {1280: 16, 1408: 16, 1664: 16}
MAE_FLOOR = 1e-3  # its code adds 1e-6 to the variance of a patch, and takes the root
FACTS = {  # what no shape tells
    "heads?": fields.whole(1, 1000),
    "decoder_heads?": fields.whole(1, 1000),
    "hidden_act?": fields.one_of("gelu"),
    "norm_eps?": fields.EPSILON,
    "norm_pix?": fields.one_of(True, False),
    "floor?": fields.number(1e-6, 10),
    "mean?": fields.list_of(fields.number(), 3, 3),
    "std?": fields.list_of(fields.number(1e-6), 3, 3),
}
CONFIG = ("image_size", "patch_size", "dim", "depth", "heads", "norm_eps")  # arguments of ViT, MAE
CONFIG += ("decoder_dim", "decoder_depth", "decoder_heads")
REMEDY = "give a model of AniMask or a public checkpoint; of a run of ours, the folder"


def read_tensors(path):
    """A safetensors or torch file -> what it holds."""
    with open(regular(path), "rb") as f:
        is_safetensors = f.read(9)[8:] == b"{"  # behind the length of the head
    return read_safetensors(path, REMEDY)[0] if is_safetensors else read_torch(path, REMEDY)


def encoder_file(given):
    """A run folder or a file -> the file with the weights; a UserError says what makes one."""
    path = given / "model.safetensors" if given.is_dir() else given
    if path.exists():
        return path
    if (given / "adapter_config.json").exists():
        raise UserError(f"{given} holds only an adapter: python -m apps.export {given} --to merged")
    if any((given / f"{name}.safetensors").exists() for name in ("head", "detector")):
        raise UserError(f"{given} has no encoder of its own; give the one that it was made of")
    is_file = given.suffix[1:2].isalpha() and not given.is_dir()  # runs/lr-0.001 is none
    run = given.parent if is_file else given
    raise UserError(f"no encoder at {path}: python pretrain.py --out {run} makes one")


# ---- names ---------------------------------------------------------------------------------------


def renamed(name, table):
    """A name, the parts of it that the table knows replaced: HF gives Hugging Face's of ours.

    A model there has "vit." before names of the encoder; q, k and v are apart.
    """
    parts = "|".join(map(re.escape, table))
    return re.sub(rf"\b({parts})\b", lambda part: table[part[0]], name)


def as_convolution(weights):
    """Our weights -> public ones: the patch embedding's matrix (D, p*p*3) becomes (D, 3, p, p)."""
    if PATCH_EMBED not in weights:  # a stem of your own, which no public ViT has
        return weights
    matrix = weights[PATCH_EMBED]
    p = math.isqrt(matrix.shape[1] // 3)
    kernel = matrix.view(-1, p, p, 3).permute(0, 3, 1, 2).contiguous()
    return weights | {PATCH_EMBED: kernel}


def as_matrix(weights):
    """The way back: public weights -> ours."""
    kernel = weights[PATCH_EMBED]
    matrix = kernel.permute(0, 2, 3, 1).flatten(1).contiguous()  # as the pixels of a patch lie
    return weights | {PATCH_EMBED: matrix}


def of_decoder(name):
    """Is it a public name, or an argument of MAE, for the decoder alone?"""
    return name.startswith("decoder_") or name == "mask_token"


def in_parts(weights):
    """Public names -> those of MAE.state_dict(): encoder... and decoder..."""
    return {("decoder." if of_decoder(k) else "encoder.") + k: w for k, w in weights.items()}


def join_qkv(weights):
    """Three matrices (D, D) and biases (D,) of each block become one of (3D, D) and (3D,)."""
    for query in [k for k in weights if ".attn.q." in k]:
        parts = [weights.pop(query.replace("attn.q", part)) for part in QKV]
        weights[query.replace("attn.q", "attn.qkv")] = torch.cat(parts)
    return weights


def fold_layer_scale(weights):
    """DINOv2's x + gamma * f(x), gamma (D,), is exact as rows of the last matrix and bias of f."""
    weights = dict(weights)
    for name in [k for k in weights if k.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = weights.pop(name)
        last = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        weights[f"{last}.weight"] = gamma[:, None] * weights[f"{last}.weight"]  # (D, in)
        weights[f"{last}.bias"] = gamma * weights[f"{last}.bias"]  # (D,)
    return weights


def fold_pixels(weights, mean, std):
    """The patch embedding for (x - mean) / std = (x - MEAN) / STD * STD / std + (MEAN - mean) / std
    -> that for (x - MEAN) / STD.
    """
    name = "patch_embed.proj"
    mean = torch.tensor(mean)
    std = torch.tensor(std)
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]  # (D, 3, p, p), (D)
    scale = torch.tensor(STD) / std
    shift = (torch.tensor(MEAN) - mean) / std
    moved = bias + (kernel * shift[:, None, None]).sum((1, 2, 3))
    return weights | {f"{name}.weight": kernel * scale[:, None, None], f"{name}.bias": moved}


def our_names(loaded, path):
    """What a file holds -> {our name: tensor fp32}, the patch embedding still a convolution."""
    loaded = loaded if isinstance(loaded, dict) else {}
    inner = next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), dict)), loaded)
    tensors = {k: w for k, w in inner.items() if isinstance(w, torch.Tensor)}
    # Views of few numbers and sparse tensors are larger than their file; tied weights count twice.
    size = sum(w.numel() * w.element_size() for w in tensors.values())
    plain = all(w.layout is torch.strided and w.device.type == "cpu" for w in tensors.values())
    if not plain or size > 4 * path.stat().st_size:
        raise UserError(f"{path} has tensors that are larger than the file, or packed; {REMEDY}")
    weights = {re.sub(PREFIX, "", str(k)): w.float() for k, w in tensors.items()}
    weights = {k: w for k, w in weights.items() if not re.match(DROPPED, k)}
    if {"register_tokens", "reg_token"} & weights.keys():
        raise UserError(f"{path} has register tokens; take the checkpoint without registers")
    if "embeddings.cls_token" in weights:
        weights = join_qkv({renamed(k, FROM_HF): w for k, w in weights.items()})
    if "mask_token" in weights and weights["mask_token"].ndim == 2:
        del weights["mask_token"]  # (1, D), of DINOv2's training: no decoder's
    return fold_layer_scale(weights)


# ---- what shapes tell, and what they do not ------------------------------------------------------


def facts_beside(folder):
    """-> what config.json of transformers or timm tells of the network: see FACTS."""
    files = [folder / "config.json", folder / "preprocessor_config.json"]
    config, pixels = [read_json(file) if file.exists() else {} for file in files]
    timm = (config.get("model_args") or {}) | (config.get("pretrained_cfg") or {})
    return {
        "dim": config.get("hidden_size"),
        "heads": config.get("num_attention_heads", timm.get("num_heads")),
        "decoder_heads": config.get("decoder_num_attention_heads"),
        "hidden_act": config.get("hidden_act"),
        "norm_eps": config.get("layer_norm_eps"),
        "norm_pix": config.get("norm_pix_loss"),
        "floor": config.get("norm_pix_floor"),  # of a file that apps.export wrote
        "mean": pixels.get("image_mean", timm.get("mean")),
        "std": pixels.get("image_std", timm.get("std")),
    }


def shape_of(weights):
    """-> what names and shapes of the weights tell: {image_size, patch_size, dim, depth, ...}."""
    blocks = {k.split(".")[1] for k in weights if k.startswith("blocks.")}
    decoder_blocks = {k.split(".")[1] for k in weights if k.startswith("decoder_blocks.")}
    p = weights["patch_embed.proj.weight"].shape[2]
    return {
        "image_size": math.isqrt(weights["pos_embed"].shape[1] - 1) * p,
        "patch_size": p,
        "dim": weights["cls_token"].shape[2],
        "depth": len(blocks),
        "decoder_dim": weights["mask_token"].shape[2] if "mask_token" in weights else 0,
        "decoder_depth": len(decoder_blocks),
    }


def facts_of(weights, path):
    """-> what shapes tell, and what they do not, of weights under our names."""
    shape = shape_of(weights)
    beside = facts_beside(path.parent)
    table = FACTS | {"dim?": fields.one_of(shape["dim"])}
    fields.check_fields(beside, table, f"{path} or the config.json beside it", REMEDY)
    facts = {"heads": HEADS.get(shape["dim"]), "decoder_heads": shape["decoder_dim"] // 32}
    # A file of MAE does not say whether its pixels were normalised. The published ones for fine-tuning were
    # trained so, and those for pictures were not (PRETRAIN.md of MAE).
    facts |= {"norm_eps": EPS, "norm_pix": True, "floor": MAE_FLOOR}
    facts |= {k: v for k, v in beside.items() if v is not None} | shape
    if not facts["heads"]:  # they change no shape: wrong ones would be seen in the features alone
        fix = 'a config.json in its folder has to say {"num_attention_heads": N}'
        raise UserError(f"{path} is {shape['dim']} wide, and nothing tells its heads; {fix}")
    return facts


def read_checkpoint(path):
    """Any known format -> weights, config and header, as common.checkpoints.read_network."""
    path = encoder_file(Path(path))
    loaded = read_tensors(path)
    with reading(path, "ViT", REMEDY):
        weights = our_names(loaded, path)
        if "cls_token" not in weights:
            raise UserError(f"{path} has no cls_token: it is no ViT; {REMEDY}")
        facts = facts_of(weights, path)
        if "mean" in facts and "std" in facts:
            weights = fold_pixels(weights, facts["mean"], facts["std"])
        weights = in_parts(as_matrix(weights))
        config = {key: facts[key] for key in CONFIG}
        if not facts["decoder_depth"]:
            config = {key: value for key, value in config.items() if not of_decoder(key)}
        check_fits(weights, config, path)
    return weights, config, {key: facts[key] for key in ("norm_pix", "floor")}


def check_fits(weights, config, path):
    """A UserError where weights are not those of a network with these arguments."""
    with torch.device("meta"):  # shapes alone, without memory
        whole = "decoder_depth" in config
        net = MAE(**config) if whole else nn.ModuleDict({"encoder": ViT(**config)})
    shapes = {k: w.shape for k, w in net.state_dict().items() if "stats_head" not in k}
    found = {k: w.shape for k, w in weights.items()}
    odd = [k for k in shapes | found if shapes.get(k) != found.get(k)]
    if odd:
        raise UserError(f"{path} does not fit, for example {', '.join(odd[:4])}; {REMEDY}")
