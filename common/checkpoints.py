"""Networks in files: what a run saves, and how it is read back as an encoder or as a start.

A file of ours says in its header which network it holds. Any other is handed to apps/formats.py,
which knows the names of MAE, DINO, timm and Hugging Face. What fits only in part is refused.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.fields import (
    ENCODER,
    EPSILON,
    SIDE,
    TEXT,
    check_arrays,
    check_encoder,
    check_fields,
    check_finite,
    whole,
)
from common.io import UserError, open_tensors, read_safetensors, reading, save_safetensors
from model import EPS, MLP_RATIO, Pooler, ViT

# ---- a run's files -------------------------------------------------------------------------------


def as_convolution(weights):
    """Our weights -> public ones: the patch embedding's matrix (D, p*p*3) becomes (D, 3, p, p)."""
    matrix = weights["patch_embed.proj.weight"]
    p = math.isqrt(matrix.shape[1] // 3)
    kernel = matrix.view(-1, p, p, 3).permute(0, 3, 1, 2).contiguous()
    return weights | {"patch_embed.proj.weight": kernel}


def as_matrix(weights):
    """The way back: public weights -> ours."""
    kernel = weights["patch_embed.proj.weight"]
    matrix = kernel.permute(0, 2, 3, 1).flatten(1).contiguous()  # as the pixels of a patch lie
    return weights | {"patch_embed.proj.weight": matrix}


def is_decoder(name):
    return name.startswith("decoder_") or name == "mask_token"


def encoder_of(weights):
    """The weights without a decoder's."""
    return {k: w for k, w in weights.items() if not is_decoder(k)}


def public_weights(model):
    """MAE -> {public name: tensor}; what no public MAE has is left out. Names have to differ."""
    ours = ("decoder.stats_head", "encoder.pooler")
    state = [(k, w) for k, w in model.state_dict().items() if not k.startswith(ours)]
    public = {k.split(".", 1)[-1]: w for k, w in state}
    if len(public) < len(state):
        raise UserError("two weights get one public name; call those of a decoder decoder_...")
    return as_convolution(public)


def save_model(model, path, notes):
    """Write an MAE under its public names; notes (plain values: run, step, data) join the header.

    Beside it, what public files have no place for: pooler, by which a teacher's attention is read,
    and stats_head, which predicts mean and contrast of hidden patches.
    """
    for name, part in (("pooler", model.encoder.pooler), ("stats_head", model.decoder.stats_head)):
        if part is not None:
            save_safetensors(part.state_dict(), beside(path, name), {})
    save_safetensors(public_weights(model), path, {"config": model.config, **notes})


def model_file(run):
    return Path(run) / "model.safetensors" if Path(run).is_dir() else Path(run)


def about_model(run):
    """The header of a run's model: "config" of the network, "run" (the flags); {} of other files."""
    path = model_file(run)
    try:
        header = open_tensors(path)["header"]
    except UserError:
        return {}
    check_fields(header, {"config?": {}, "run?": {"data?": TEXT}}, path, "make the run again")
    return header


def flags_of(run):
    """The flags under which a run was made; {} where its file does not say."""
    return about_model(run).get("run", {})


def beside(path, name):
    """The file of a part (pooler, stats_head) that a run keeps apart; it may be missing."""
    return model_file(path).with_name(f"{name}.safetensors")


def load_beside(part, path, name):
    file = beside(path, name)
    load_exactly(part, read_safetensors(file, "remove it, or make the run again")[0], file)


# ---- loading -------------------------------------------------------------------------------------

CONFIG = ENCODER | {"norm_eps?": EPSILON, "decoder_heads?": whole(1, 1000)}  # of a file of ours
CONFIG |= {"decoder_dim?": whole(1, 2**14), "decoder_depth?": whole(0, 1000)}
REMEDY = "take another copy, or make the run again"


def read_network(path):
    """A run of ours or a public checkpoint -> ({our name: tensor}, of encoder and decoder; facts).

    facts: the arguments of ViT, norm_eps; decoder_dim, decoder_heads and decoder_depth, which is 0
    where there is no decoder; norm_pix where it is known.
    """
    file = model_file(path)
    config = about_model(file).get("config")
    if config is None:
        # The one import that runs up: a student's own run needs nobody else's names and shapes.
        from apps.formats import read_checkpoint

        return read_checkpoint(path)
    check_fields(config, CONFIG, f"{file}: config", REMEDY)
    weights, header = read_safetensors(file, REMEDY)
    with reading(file, "network", REMEDY):
        weights = as_matrix({name: w.float() for name, w in weights.items()})
    facts = {"norm_eps": EPS, "norm_pix": header.get("norm_pix", True)}
    facts |= {"decoder_dim": 0, "decoder_depth": 0} | config
    facts.setdefault("decoder_heads", facts["decoder_dim"] // 32)
    check_network(weights, facts, file, REMEDY)
    return weights, facts


def check_network(weights, facts, path, remedy):
    """A UserError if weights have other shapes than facts say: such a network is not even built."""
    check_encoder(weights, facts, path, remedy)
    width = facts["decoder_dim"]
    names = [f"decoder_blocks.{i}.mlp.fc1.weight" for i in range(facts["decoder_depth"])]
    table = dict.fromkeys(names, "float F D")
    check_arrays(weights, table, path, remedy, D=width, F=MLP_RATIO * width)


def load_exactly(module, weights, path):
    """Load weights into module: all of them and no others. Torch names what does not fit."""
    check_finite(weights, path)
    try:
        module.load_state_dict(weights)
    except RuntimeError as problem:
        reasons = " ".join(str(problem).split("\n\t")[1:])
        raise UserError(f"{path} does not fit this model: {reasons[:300]}") from None


def resize_positions(pos, side):
    """Positions (1, 1+n*n, D) -> (1, 1+side*side, D): bicubic over the grid; the CLS row stays."""
    n = math.isqrt(pos.shape[1] - 1)
    if n == side:
        return pos
    grid = pos[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def at_size(weights, facts, image_size, path):
    """Weights and facts for views of image_size pixels (None: as they are): all positions resized."""
    size = image_size or facts["image_size"]
    p = facts["patch_size"]
    if not SIDE(size) or size % p:
        raise UserError(f"--image-size {size} is no multiple of {p} px, a patch of {path}, or huge")
    positions = [name for name in weights if name.endswith("pos_embed")]
    resized = {name: resize_positions(weights[name], size // p) for name in positions}
    return weights | resized, facts | {"image_size": size}


def blank_encoder(shape, norm_eps):
    """A ViT of this shape whose weights are still to be loaded; norm_eps is no weight."""
    encoder = ViT(**{k: shape[k] for k in ENCODER})  # `check_network` has seen that it can be built
    for norm in (m for m in encoder.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = norm_eps
    return encoder


def load_encoder(path, image_size=None):
    """A run folder or any public checkpoint -> the ViT in eval mode.

    image_size: resize the positions to views of so many pixels; None keeps the trained size.
    """
    weights, facts = at_size(*read_network(path), image_size, path)
    with torch.random.fork_rng(devices=[]):  # loading leaves the seed alone
        encoder = blank_encoder(facts, facts["norm_eps"])
    load_exactly(encoder, encoder_of(weights), path)
    return encoder.eval()


def load_teacher(path):
    """load_encoder, and the pooler of the run, if it has one."""
    encoder = load_encoder(path)
    if beside(path, "pooler").exists():
        encoder.pooler = Pooler(encoder.cls_token.shape[2], encoder.blocks[0].attn.heads)
        load_beside(encoder.pooler, path, "pooler")
    return encoder


# ---- a start for pre-training --------------------------------------------------------------------


def init_from(model, path):
    """Start an MAE from a checkpoint -> a line that says what was loaded.

    The encoder has to fit. So has the decoder, where both have one; else the model's stays as it
    is. Positions are resized to the model's grid.
    """
    weights, facts = read_network(path)
    config = model.config
    size = config["image_size"]
    config = {"decoder_heads": config.get("decoder_dim", 0) // 32} | config
    decoder = "decoder_dim" in config and facts["decoder_depth"] > 0  # SimMIM's has no blocks
    keys = ["dim", "depth", "heads", "patch_size"]
    keys += ["decoder_dim", "decoder_depth", "decoder_heads"] if decoder else []
    if odd := [key for key in keys if config[key] != facts[key]]:
        here, there = (", ".join(f"{k} {shape[k]}" for k in odd) for shape in (config, facts))
        fix = ",".join(f"{k}={facts[k]}" for k in keys if k != "decoder_heads")
        raise UserError(f"--init {path} has {there}, this run {here}; give --model nano:{fix}")
    weights, _ = at_size(weights if decoder else encoder_of(weights), facts, size, path)
    loaded = {("decoder." if is_decoder(k) else "encoder.") + k: w for k, w in weights.items()}
    stays = ("encoder.pooler", "decoder.stats_head" if decoder else "decoder.")
    kept = {k: w for k, w in model.state_dict().items() if k.startswith(stays)}
    load_exactly(model, kept | loaded, path)
    line = f"{path}: encoder{' and decoder' if decoder else ', the decoder starts anew'}"
    if facts["image_size"] != size:
        line += f"; positions resized from {facts['image_size']} px"
    return line
