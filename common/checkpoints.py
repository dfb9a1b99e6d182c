"""Networks in files: those of a run, public checkpoints as encoder or start, LoRA adapters as `peft` reads them.

What fits only in part is refused, and the line says what is missing and what is left over.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import formats
from common.formats import as_convolution, count_blocks, is_decoder, read_checkpoint, save_weights
from common.io import UserError
from model import SIZES, LoRA, ViT, lora_layers, merge_lora, remove_lora

ENCODER = ("image_size", "patch_size", "dim", "depth", "heads")  # what a ViT is built from
ADAPTER = "adapter_model.safetensors", "adapter_config.json"


# ---- our own files: public names and shapes, the configuration in the header ---------------------------------------


def public_weights(model):
    """MAE -> {public name: tensor}: the patch embedding as a convolution (D, 3, p, p), the picture head left out."""
    return as_convolution({k.split(".", 1)[1]: w for k, w in model.state_dict().items() if "stats_head" not in k})


def save_model(model, path, about):
    """Write an MAE for everybody else; `about` (a plain dict: run, step, data) joins the header."""
    save_weights(public_weights(model), path, {"animask": {"config": model.config, **about}})


def save_encoder(encoder, path, about):
    """Write an encoder alone, without a decoder; an adapter has to be merged and removed before."""
    if lora_layers(encoder):
        raise ValueError("merge_lora and remove_lora first: a file of ours holds plain layers")
    p, dim, blocks = encoder.patch_size, encoder.cls_token.shape[2], encoder.blocks
    sizes = (encoder.side * p, p, dim, len(blocks), blocks[0].attn.heads)
    config = dict(zip(ENCODER, sizes, strict=True)) | {"norm_eps": encoder.norm.eps}
    save_weights(as_convolution(encoder.state_dict()), path, {"animask": {"config": config, **about}})


def check_exactly(module, weights, path):
    """Names and shapes of weights have to be those of module; what is missing, left over or other is named."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f"{k} {tuple(weights[k].shape)} against {tuple(own[k].shape)}" for k in own.keys() & weights.keys()
              if weights[k].shape != own[k].shape]  # fmt: skip
    if missing or extra or shapes:
        some = [f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                for what, names in (("missing", missing), ("left over", extra), ("other shape", shapes))
                if names]  # fmt: skip
        raise UserError(f"{path} does not fit this model; " + "; ".join(some))


def load_exactly(module, weights, path, assign=False):
    """Load weights into module, all of them and no others; assign: a module without memory takes their tensors."""
    check_exactly(module, weights, path)
    module.load_state_dict(weights, assign=assign)


# ---- any checkpoint -> a network -----------------------------------------------------------------------------------


def resize_positions(pos, side):
    """Positions (1, 1+n*n, D) -> (1, 1+side*side, D): bicubic over the grid, the CLS token's row as it is."""
    n = math.isqrt(pos.shape[1] - 1)
    if n == side:
        return pos
    grid = pos[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def at_size(weights, facts, image_size, path):
    """Weights and facts for views of image_size pixels (None: as they are): all positions resized."""
    size, p = image_size or facts["image_size"], facts["patch_size"]
    if size < p or size % p:
        raise UserError(f"{path} has patches of {p} px: an image size of {size} px is no multiple of it")
    resized = {k: resize_positions(w, size // p) for k, w in weights.items() if k.endswith("pos_embed")}
    return weights | resized, facts | {"image_size": size}


def load_encoder(path, image_size=None):
    """A run folder or any checkpoint that common/formats.py knows -> the ViT in eval mode, and its image size.

    image_size: resize the positions to views of so many pixels; None keeps the size that it was trained at.
    """
    weights, facts = at_size(*read_checkpoint(path), image_size, path)
    with torch.device("meta"):  # shapes only: nothing is drawn, so that loading leaves the seed alone
        encoder = ViT(**{k: facts[k] for k in ENCODER})
    for norm in (m for m in encoder.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = facts["norm_eps"]
    load_exactly(encoder, {k: w for k, w in weights.items() if not is_decoder(k)}, path, assign=True)
    return encoder.eval(), facts["image_size"]


def decoder_shape(weights):
    """-> (width, depth) of the decoder."""
    return weights.get("mask_token", torch.empty(0)).shape[-1], count_blocks(weights, "decoder_blocks")


def check_decoder(weights, facts, config, path):
    """A decoder comes whole or not at all: one of another shape is an error with the flags that would fit it."""
    width, depth = decoder_shape(weights)
    if (width, depth) != (config["decoder_dim"], config["decoder_depth"]):
        raise UserError(f"--init {path} has a decoder {width} wide and {depth} deep, this run one of "
                        f"{config['decoder_dim']} and {config['decoder_depth']}; "
                        f"give --decoder-dim {width} --decoder-depth {depth}")  # fmt: skip
    if facts.get("decoder_heads", width // 32) != width // 32:
        raise UserError(f"--init {path} has a decoder of {facts['decoder_heads']} heads, here it has {width // 32}; "
                        "export it without its decoder: python export.py FILE --to timm")  # fmt: skip


def init_from(model, path):
    """Start an MAE from a checkpoint: encoder complete; decoder complete, or absent and left as it is.

    -> a line that says what was taken. Positions are resized to the model's grid. Another width, depth, number of
    heads, patch or decoder is a UserError with both sides and the flags that would fit.
    """
    keys, own = ("dim", "depth", "heads", "patch_size"), model.config
    weights, facts = read_checkpoint(path)
    here, there = (", ".join(f"{k} {c[k]}" for k in keys) for c in (own, facts))
    if here != there:
        size = next((s for s, c in SIZES.items() if all(c[k] == facts[k] for k in keys[:3])), None)
        mend = f"give --model {size} --patch-size {facts['patch_size']}" if size else "no --model has that shape"
        raise UserError(f"--init {path} has {there}, this run {here}; {mend}")
    decoder = "decoder_dim" in own and count_blocks(weights, "decoder_blocks") > 0  # SimMIM's one layer starts anew
    if decoder:
        check_decoder(weights, facts, own, path)
    else:
        weights = {k: w for k, w in weights.items() if not is_decoder(k)}
    weights, _ = at_size(weights, facts, own["image_size"], path)
    taken = {("decoder." if is_decoder(k) else "encoder.") + k: w for k, w in weights.items()}
    kept = {k: w for k, w in model.state_dict().items()
            if "stats_head" in k or (k.startswith("decoder.") and not decoder)}  # fmt: skip
    load_exactly(model, kept | taken, path)
    grid = "" if facts["image_size"] == own["image_size"] else f"; positions resized from {facts['image_size']} px"
    return f"{path}: encoder{' and decoder' if decoder else ', the decoder starts anew'}{grid}"


# ---- LoRA adapters: adapter_model.safetensors and adapter_config.json, as `peft` reads them ------------------------


def fingerprint(encoder):
    """12 hex digits of an encoder's weights, adapter and positions left out: an adapter belongs to one encoder."""
    digest = hashlib.sha256()
    for name, weight in sorted((k.replace(".base.", "."), w) for k, w in encoder.state_dict().items()):
        if name != "pos_embed" and not name.endswith((".A", ".B")):
            digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def tensor_name(layer, factor):
    return f"base_model.model.{layer}.lora_{factor}.weight"


def peft_config(encoder, base):
    """adapter_config.json: rank and alpha of most layers, and those of the fused qkv, which differ, as patterns."""
    layers = lora_layers(encoder)
    ranks = {name: len(lora.parts) * lora.A.shape[1] for name, lora in layers.items()}
    alphas = {name: lora.scale * ranks[name] for name, lora in layers.items()}
    short = {name: re.sub(r"^blocks\.\d+\.", "", name) for name in layers}  # one name for the same layer of all blocks
    if len({(short[k], ranks[k], alphas[k]) for k in layers}) * len(encoder.blocks) != len(layers):
        short = {name: name for name in layers}  # an adapter from elsewhere, of some blocks or of several ranks
    r, alpha = min(ranks.values()), alphas[min(ranks, key=ranks.get)]
    return {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": sorted(set(short.values())),
        "r": r, "rank_pattern": {short[k]: v for k, v in ranks.items() if v != r},
        "lora_alpha": alpha, "alpha_pattern": {short[k]: v for k, v in alphas.items() if v != alpha},
        "lora_dropout": next(iter(layers.values())).dropout.p, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "inference_mode": True, "task_type": None,
    }  # fmt: skip


def save_adapter(encoder, folder, base):
    """Write the LoRA of an encoder; `base` is the run or file that load_encoder made it from.

    q, k and v become one adapter of the fused layer, exactly: A = [Aq; Ak; Av], B block diagonal, rank and alpha times
    three. Our header adds what `peft` does not need: the parts, the encoder's fingerprint, its image size.
    """
    layers = lora_layers(encoder)
    if not layers or any(lora.merged for lora in layers.values()):
        raise ValueError("there is no adapter to be saved, or it is merged: unmerge_lora first")
    tensors = {tensor_name(k, f): w for k, lora in layers.items() for f, w in zip("AB", lora.factors(), strict=True)}
    parts = next((list(lora.parts) for lora in layers.values() if lora.of == 3), None)
    about = {"parts": parts, "fingerprint": fingerprint(encoder), "image_size": encoder.side * encoder.patch_size}
    save_weights(tensors, Path(folder) / ADAPTER[0], {"animask": about})
    formats.save_json(Path(folder) / ADAPTER[1], peft_config(encoder, base))


def read_adapter(folder):
    """-> adapter_config.json, {layer: (A, B)}, our header or {}. Only plain LoRA is understood."""
    path, config = Path(folder) / ADAPTER[0], formats.read_json(Path(folder) / ADAPTER[1])
    if not config or not path.exists():
        raise UserError(f"{folder} has no adapter: that is {' and '.join(ADAPTER)}")
    odd = [k for k in ("use_dora", "fan_in_fan_out", "modules_to_save") if config.get(k)]
    odd += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    if config.get("peft_type") != "LORA" or odd:
        raise UserError(f"{path} is {' '.join([str(config.get('peft_type')), *odd])}; only plain LoRA is known here")
    tensors, header = formats.read_tensors(path)
    names = sorted({re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", k) for k in tensors})
    wanted = {tensor_name(name, factor) for name in names for factor in "AB"}
    if wanted != tensors.keys() or not names:
        missing, extra = sorted(wanted - tensors.keys())[:3], sorted(tensors.keys() - wanted)[:3]
        raise UserError(f"{path} is no LoRA of a ViT; missing: {', '.join(missing)}; left over: {', '.join(extra)}")
    pairs = {name: [tensors[tensor_name(name, factor)].float() for factor in "AB"] for name in names}
    return config, pairs, json.loads(header.get("animask", "{}"))


def pattern_value(patterns, name, otherwise):
    """What rank_pattern or alpha_pattern says of a layer: keys are regular expressions of a name's end, as in peft."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), otherwise)


def lora_from(name, base, A, B, config, parts, folder):
    """A (r, in) and B (out, r) of a file as LoRA on the Linear base; parts of qkv get factors of their own."""
    rank = pattern_value(config.get("rank_pattern"), name, config.get("r"))
    if A.shape != (rank, base.in_features) or B.shape != (base.out_features, rank):
        raise UserError(f"the adapter in {folder} does not fit {name}: A {tuple(A.shape)} and B {tuple(B.shape)} "
                        f"against rank {rank} and a layer of {base.in_features} to {base.out_features}")  # fmt: skip
    alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    parts, of = (parts, 3) if parts and name.endswith("attn.qkv") else ([0], 1)
    r, width = rank // len(parts), base.out_features // of
    lora = LoRA(base, r, scale * r, config.get("lora_dropout", 0.0), parts, of)
    with torch.no_grad():
        lora.A.copy_(A.view_as(lora.A))
        for i, part in enumerate(parts):
            lora.B[i] = B[part * width : (part + 1) * width, i * r : (i + 1) * r]
    return lora


def load_adapter(encoder, folder):
    """Put the LoRA of a folder, ours or one that `peft` made on our ViT, on a plain encoder -> its parameters.

    The encoder is frozen, as by add_lora. Nothing is changed before all of it is known to fit.
    """
    config, pairs, about = read_adapter(folder)
    if lora_layers(encoder):
        raise UserError("this encoder has an adapter already: merge_lora and remove_lora first")
    linear = {k: m for k, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    if unknown := sorted(pairs.keys() - linear.keys()):
        raise UserError(f"the adapter in {folder} has {', '.join(unknown[:3])}, which this encoder of "
                        f"{len(encoder.blocks)} blocks has not")  # fmt: skip
    layers = {k: lora_from(k, linear[k], A, B, config, about.get("parts"), folder) for k, (A, B) in pairs.items()}
    if about and about["fingerprint"] != fingerprint(encoder):
        base = f"{config.get('base_model_name_or_path')}, fingerprint {about['fingerprint']}"
        raise UserError(f"the adapter in {folder} is for {base}; this encoder's is {fingerprint(encoder)}")
    encoder.requires_grad_(False)
    for name, lora in layers.items():
        encoder.set_submodule(name, lora)
    return [weight for weight in encoder.parameters() if weight.requires_grad]


def load_merged(folder, image_size=None):
    """A folder with an adapter -> the encoder that it was made on with the adapter merged in, and its image size."""
    config, _, about = read_adapter(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder}/{ADAPTER[1]} does not say which encoder it is for: base_model_name_or_path")
    encoder, size = load_encoder(base, image_size or about.get("image_size"))
    load_adapter(encoder, folder)
    merge_lora(encoder)
    remove_lora(encoder)
    return encoder, size


# ---- networks -> files for others ----------------------------------------------------------------------------------


