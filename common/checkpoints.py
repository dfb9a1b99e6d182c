"""Networks in files: what a run saves, and any public checkpoint as an encoder or as a start.

What fits only in part is refused, and the line says what is missing and what is left over.
common/formats.py, which knows the names of MAE, DINO, timm and Hugging Face, is imported only where
a checkpoint is read.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.fields import (
    ENCODER,
    SIDE,
    TEXT,
    Field,
    check_fields,
    check_finite,
    number,
)
from common.io import UserError, read_header, read_safetensors, save_safetensors
from model import SIZES, Pooler, ViT

# Older runs saved the weight of the second loss as a number, and its word in another field.
WEIGHT_OR_WORD = Field("a word or a weight", lambda v: TEXT.fits(v) or number(0, 100).fits(v))
ABOUT = {
    "config?": {"network?": TEXT},
    "run?": {"data?": TEXT, "mask?": TEXT, "contrast?": WEIGHT_OR_WORD},
}


def as_convolution(weights):
    """Our weights -> public ones: the patch embedding's matrix (D, p*p*3) becomes (D, 3, p, p)."""
    kernel = weights["patch_embed.proj.weight"]
    p = math.isqrt(kernel.shape[1] // 3)
    return weights | {
        "patch_embed.proj.weight": kernel.view(-1, p, p, 3).permute(0, 3, 1, 2).contiguous()
    }


def public_weights(model):
    """MAE -> {public name: tensor}: the patch embedding as a convolution (D, 3, p, p), what is only
    ours left out.
    """
    ours = ("decoder.stats_head", "encoder.pooler")
    return as_convolution(
        {k.split(".", 1)[1]: w for k, w in model.state_dict().items() if not k.startswith(ours)}
    )


def save_model(model, path, about):
    """Write an MAE for everybody else; `about` (a plain dict: run, step, data) joins the header."""
    save_safetensors(public_weights(model), path, {"config": model.config, **about})


def load_exactly(module, weights, path, assign=False):
    """Load weights into module: all of them and no others. Torch names what does not fit.

    assign: a module on the device "meta", which has no memory, takes their tensors as its own.
    """
    check_finite(weights, path)
    try:
        module.load_state_dict(weights, assign=assign)
    except RuntimeError as problem:
        reasons = " ".join(str(problem).split("\n\t")[1:])
        raise UserError(f"{path} does not fit this model: {reasons[:300]}") from None


def model_file(run):
    return Path(run) / "model.safetensors" if Path(run).is_dir() else Path(run)


def about_model(run):
    """What the header of a run's model says: "config" of the network, "run" (the flags), "step"; {}
    of other files.
    """
    try:
        header = read_header(model_file(run))[1]
    except UserError:
        return {}
    check_fields(header, ABOUT, model_file(run), "make the run again")
    return header


def flags_of(run):
    """The flags under which a run was made; {} where its file does not say."""
    return about_model(run).get("run", {})


def resize_positions(pos, side):
    """Positions (1, 1+n*n, D) -> (1, 1+side*side, D): bicubic over the grid, the CLS token's row as
    it is.
    """
    n = math.isqrt(pos.shape[1] - 1)
    if n == side:
        return pos
    grid = pos[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def at_size(weights, facts, image_size, path):
    """Weights and facts for views of image_size pixels (None: as they are): all positions resized."""
    size, p = image_size or facts["image_size"], facts["patch_size"]
    if size < p or size % p or not SIDE.fits(size):
        raise UserError(
            f"{path} has patches of {p} px: --image-size {size} is no multiple of it, or too large"
        )
    resized = {
        k: resize_positions(w, size // p) for k, w in weights.items() if k.endswith("pos_embed")
    }
    return weights | resized, facts | {"image_size": size}


def blank_encoder(shape, norm_eps):
    """A ViT of this shape whose weights are still to be loaded; epsilons of its norms are no
    weights.
    """
    encoder = ViT(**{k: shape[k] for k in ENCODER})
    for norm in (m for m in encoder.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = norm_eps
    return encoder


def load_encoder(path, image_size=None):
    """A run folder or any checkpoint that common/formats.py knows -> the ViT in eval mode, and its
    image size.

    image_size: resize the positions to views of so many pixels; None keeps the size that it was
    trained at.
    """
    from common.formats import encoder_of, read_checkpoint

    weights, facts = at_size(*read_checkpoint(path), image_size, path)
    with torch.random.fork_rng(
        devices=[]
    ):  # loading leaves the seed alone; "meta" would import torch's compiler
        encoder = blank_encoder(facts, facts["norm_eps"])
    load_exactly(encoder, encoder_of(weights), path, assign=True)
    return encoder.eval(), facts["image_size"]


def save_beside(model, run):
    """What public files have no place for: pooler.safetensors, which a teacher's attention is read by, where
    pre-training trained one; stats_head.safetensors, which tells mean and contrast of a hidden patch in a picture."""
    for name, part in (("pooler", model.encoder.pooler), ("stats_head", model.decoder.stats_head)):
        if part is not None:
            save_safetensors(part.state_dict(), Path(run) / f"{name}.safetensors", {})


def beside(path, name):
    """Where such a file of a run, or of its weights, stands if it has one; a snapshot has none."""
    return model_file(path).with_name(f"{name}.safetensors")


def load_beside(part, path, name):
    load_exactly(
        part,
        read_safetensors(beside(path, name), "remove it, or make the run again")[0],
        beside(path, name),
    )


def load_teacher(path):
    """load_encoder, and the pooler of the run, if it has one -> the encoder and its image size."""
    encoder, size = load_encoder(path)
    if beside(path, "pooler").exists():
        encoder.pooler = Pooler(encoder.cls_token.shape[2], encoder.blocks[0].attn.heads)
        load_beside(encoder.pooler, path, "pooler")
    return encoder, size


def init_from(model, path):
    """Start an MAE from a checkpoint: encoder complete; decoder complete, or absent and left as it
    is.

    -> a line that says what was loaded. Positions are resized to the model's grid. Another width,
    depth, number of
    heads, patch or decoder is a UserError with both sides and the flags that would fit.
    """
    from common.formats import encoder_of, is_decoder, read_checkpoint

    keys, own = ("dim", "depth", "heads", "patch_size"), model.config
    weights, facts = read_checkpoint(path)
    here, there = (", ".join(f"{k} {c[k]}" for k in keys) for c in (own, facts))
    if here != there:
        size = next((s for s, c in SIZES.items() if all(c[k] == facts[k] for k in keys[:3])), None)
        fix = (
            f"give --model {size} --patch-size {facts['patch_size']}"
            if size
            else "no --model has that shape"
        )
        raise UserError(f"--init {path} has {there}, this run {here}; {fix}")
    decoder = "decoder_dim" in own and facts["decoder_depth"] > 0  # SimMIM's one layer starts anew
    width, depth = facts["decoder_dim"], facts["decoder_depth"]
    if decoder and (width, depth) != (own["decoder_dim"], own["decoder_depth"]):
        raise UserError(
            f"--init {path} has a decoder {width} wide and {depth} deep, this run one of "
            f"{own['decoder_dim']} and {own['decoder_depth']}; "
            f"give --decoder-dim {width} --decoder-depth {depth}"
        )
    heads = own.get("decoder_heads", own.get("decoder_dim", 0) // 32)
    if decoder and facts["decoder_heads"] != heads:
        raise UserError(
            f"--init {path} has a decoder of {facts['decoder_heads']} heads, this run one of {heads}"
        )
    weights, _ = at_size(
        weights if decoder else encoder_of(weights), facts, own["image_size"], path
    )
    loaded = {("decoder." if is_decoder(k) else "encoder.") + k: w for k, w in weights.items()}
    kept = (
        "encoder.pooler",
        "decoder.stats_head" if decoder else "decoder.",
    )  # as they are in the model
    load_exactly(
        model, {k: w for k, w in model.state_dict().items() if k.startswith(kept)} | loaded, path
    )
    grid = (
        ""
        if facts["image_size"] == own["image_size"]
        else f"; positions resized from {facts['image_size']} px"
    )
    return f"{path}: encoder{' and decoder' if decoder else ', the decoder starts anew'}{grid}"
