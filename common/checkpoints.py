"""Networks in files: what a run saves, and how it is read back as an encoder, an MAE or a start.

A file of ours holds a network's state_dict, under its own names, and in its header the arguments with which
model.py makes the network: loading makes it again, and copies the weights into it, all of them or none. Any
other file is handed to common/formats.py, which knows the names of MAE, DINO, timm and Hugging Face.
"""

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from common.train import (
    FORMAT,
    ROOT,
    UserError,
    check_format,
    read_header,
    read_safetensors,
    save_safetensors,
)
from kernels.patches import FLOOR
from model import MAE, ViT, pooler_of

POSITIONS = ("encoder.pos_embed", "decoder.decoder_pos_embed")  # of a square grid of patches
POOLER, STATS_HEAD = "encoder.pooler.", "decoder.stats_head."  # parts that no public checkpoint has
QUERIES = f"{POOLER}query_token"  # (heads, d): how many queries a run's pooler has


# ---- a run's files -------------------------------------------------------------------------------


def save_network(network, path, notes, prefix=""):
    """Write a network; notes (plain values, such as run and step) join the header.

    prefix: "encoder." for an encoder alone, so that all files have the same names for it.
    """
    weights = {prefix + name: w for name, w in network.state_dict().items()}
    save_safetensors(weights, path, {"format": FORMAT, "config": network.config, **notes})


def fingerprint(encoder):
    """12 hex digits of the weights of an encoder: what was learned on top of it belongs to no other."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        # Positions are resized with the picture: at another image size it is still the same encoder.
        # Where they learn, all other weights do, too, and tell two encoders apart.
        if name != "pos_embed":
            digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def file_of(run, name=""):
    """A file of a run's folder. Those of what ships, such as weights/toon, are found from every folder."""
    here, shipped = Path(run, name), Path(ROOT, run, name)
    is_shipped = here.parts[:1] == ("weights",) and shipped.is_file() and not here.is_file()
    return shipped if is_shipped else here


def model_file(run, name="model.safetensors"):
    """The file of this name in a run's folder, or the file itself where one is given."""
    file = file_of(run)
    return file if file.is_file() else file_of(run, name)


def about_model(run):
    """The header of a run's model: "config" of the network, "run" (the flags); {} of other files."""
    try:
        return read_header(model_file(run))
    except UserError:
        return {}


def flags_of(run):
    """The flags under which a run was made; {} where its file does not say."""
    return about_model(run).get("run", {})


def place_of(name, run):
    """Where the path that a run names lies now: as it is, in the program, or beside the run."""
    places = [Path(name), ROOT / name, *(folder / name for folder in Path(run).resolve().parents)]
    return next((place for place in places if place.exists()), Path(name))


# ---- loading -------------------------------------------------------------------------------------


def read_network(path):
    """A run of ours or a public checkpoint -> {name: tensor}, config, header.

    The names are those of MAE.state_dict(). config: the arguments of MAE or, where there is no decoder
    of blocks, of ViT. The header says at least norm_pix and floor, what the decoder predicts.
    """
    file = model_file(path)
    header = about_model(file)
    if "config" not in header:
        # Only here, because a student's own run needs nobody else's names and shapes.
        from common.formats import read_checkpoint

        return read_checkpoint(path)
    check_format(header, file)
    weights = {name: w.float() for name, w in read_safetensors(file)[0].items()}
    return weights, header["config"], {"norm_pix": True, "floor": FLOOR} | header


def resize_positions(pos, side):
    """Positions (1, 1+n*n, D) -> (1, 1+side*side, D): bicubic over the grid; the CLS row stays."""
    n = math.isqrt(pos.shape[1] - 1)
    if n == side:
        return pos
    grid = pos[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def at_size(weights, config, image_size):
    """Weights and config for views of image_size pixels (None: as they are): all positions resized."""
    size, p = image_size or config["image_size"], config["patch_size"]
    if size % p:
        raise UserError(f"an encoder of patches of {p} px can't read {size} px; take a multiple")
    there = [name for name in POSITIONS if name in weights]
    resized = {name: resize_positions(weights[name], size // p) for name in there}
    return weights | resized, config | {"image_size": size}


def is_decoder(name):
    """Is it an argument of MAE for its decoder alone?"""
    return name.startswith("decoder_")


def load_encoder(path, image_size=None, pooler=False):
    """A run folder or any public checkpoint -> the ViT in eval mode.

    image_size: resize the positions to views of so many pixels; None keeps the trained size.
    pooler: take the run's pooler, too, if it has one.
    """
    weights, config, _ = read_network(path)
    weights, config = at_size(weights, config, image_size)
    encoder = ViT(**{name: value for name, value in config.items() if not is_decoder(name)})
    if pooler and QUERIES in weights:
        encoder.pooler = pooler_of(encoder, len(weights[QUERIES]))
    own = {k.removeprefix("encoder."): w for k, w in weights.items() if k.startswith("encoder.")}
    if encoder.pooler is None:
        own = {name: w for name, w in own.items() if not name.startswith("pooler.")}
    encoder.load_state_dict(own)
    return encoder.eval()


def load_teacher(path):
    """load_encoder, and the pooler of the run, if it has one."""
    return load_encoder(path, pooler=True)


def load_mae(path, image_size=None):
    """A run of pretrain.py or a public MAE -> (MAE in eval mode, header).

    The MAE has the run's pooler, if it has one; the header says norm_pix and floor.
    """
    weights, config, header = read_network(path)
    weights, config = at_size(weights, config, image_size)
    if "decoder_depth" not in config:
        raise UserError(f"{path} has no decoder, as SimMIM has none; give a run without simmim=1")
    model = MAE(**config)
    if QUERIES in weights:
        model.encoder.pooler = pooler_of(model.encoder, len(weights[QUERIES]))
    # A public MAE has no stats_head. Ours is zero at first, and then corrects nothing.
    new = {k: w for k, w in model.state_dict().items() if k.startswith(STATS_HEAD)}
    model.load_state_dict(new | weights)
    return model.eval(), header


def init_from(model, path):
    """Start an MAE from a checkpoint -> a line that says what was loaded.

    The encoder has to fit, but for the size of its views: positions are resized to the model's grid.
    So has the decoder, where both have one; else the model's stays as it is.
    """
    weights, theirs, _ = read_network(path)
    ours = model.config
    both = "decoder_depth" in theirs and "decoder_depth" in ours  # SimMIM's has no blocks
    # No shape tells the heads, nor an argument of yours that adds no weight.
    alike = ours.keys() & theirs.keys() - {"image_size", "norm_eps"}
    alike = {key for key in alike if both or not is_decoder(key)}
    if odd := sorted(key for key in alike if ours[key] != theirs[key]):
        there, here = (", ".join(f"{k} {shape[k]}" for k in odd) for shape in (theirs, ours))
        fix = ",".join(f"{key}={theirs[key]}" for key in sorted(alike))
        raise UserError(f"--init {path} has {there}, this run {here}; give --model nano:{fix}")
    weights, _ = at_size(weights, theirs, ours["image_size"])
    taken = "encoder.", "decoder." if both else "encoder."
    weights = {k: w for k, w in weights.items() if k.startswith(taken) and not k.startswith(POOLER)}
    model.load_state_dict(model.state_dict() | weights)
    line = f"{path}: encoder{' and decoder' if both else ', the decoder starts anew'}"
    if ours["image_size"] != theirs["image_size"]:
        line += f"; positions resized from {theirs['image_size']} px"
    return line
