"""Networks in files: what a run saves, and how it is read back as an encoder, an MAE or a start.

A file of ours says in its header with which arguments model.py makes its network. Any other file is
handed to apps/formats.py, which knows the names of MAE, DINO, timm and Hugging Face. What fits only
in part is refused.
"""

import functools
import inspect
import math
import os
import sys
import tempfile
from pathlib import Path, PureWindowsPath

import torch
import torch.nn.functional as F
from torch import nn

from common.fields import (
    BOUNDS,
    ENCODER,
    EPSILON,
    SIDE,
    TEXT,
    check_arrays,
    check_fields,
    check_finite,
    list_of,
    number,
    whole,
)
from common.io import (
    UserError,
    read_header,
    read_safetensors,
    reading,
    save_safetensors,
)
from kernels.loss import FLOOR
from model import EPS, MAE, SimMIM, ViT, check_sizes, pooler_of

ROOT = Path(__file__).resolve().parent.parent  # the program's folder
BESIDE = ("encoder.pooler.", "decoder.stats_head.")  # parts of an MAE that have files of their own
PATCH_EMBED = "patch_embed.proj.weight"
POSITIONS = ("pos_embed", "decoder_pos_embed")  # of a square grid of patches

# ---- a run's files -------------------------------------------------------------------------------


def as_convolution(weights):
    """Our weights -> public ones: the patch embedding's matrix (D, p*p*3) becomes (D, 3, p, p)."""
    if PATCH_EMBED not in weights:  # a stem of your own, which no public ViT has
        return weights
    matrix = weights[PATCH_EMBED]
    if matrix.dim() != 2:
        fix = "put what you made in its place into an nn.Sequential"
        raise UserError(f"{PATCH_EMBED} is a matrix in our files; {fix}")
    p = math.isqrt(matrix.shape[1] // 3)
    kernel = matrix.view(-1, p, p, 3).permute(0, 3, 1, 2).contiguous()
    return weights | {PATCH_EMBED: kernel}


def as_matrix(weights):
    """The way back: public weights -> ours."""
    if PATCH_EMBED not in weights:
        return weights
    kernel = weights[PATCH_EMBED]
    matrix = kernel.permute(0, 2, 3, 1).flatten(1).contiguous()  # as the pixels of a patch lie
    return weights | {PATCH_EMBED: matrix}


def is_decoder(name):
    return name.startswith("decoder_") or name == "mask_token"


def encoder_of(weights):
    """The weights without a decoder's."""
    return {k: w for k, w in weights.items() if not is_decoder(k)}


def public_weights(model):
    """MAE -> {public name: tensor}: encoder... and decoder.decoder_... without their first word."""
    public = {}
    for name, w in model.state_dict().items():
        part, _, rest = name.partition(".")
        if name.startswith(BESIDE):
            continue
        # One file holds both parts, and tells them apart by these names alone.
        if part not in ("encoder", "decoder") or is_decoder(rest) != (part == "decoder"):
            raise UserError(
                f"{name} is no name for a file: call it encoder... or decoder.decoder_...; what is "
                "no part of the network, such as a teacher, joins `networks` in pretrain.py"
            )
        public[rest] = w
    return as_convolution(public)


def save_model(model, path, notes):
    """Write an MAE under its public names; notes (plain values: run, step, data) join the header.

    Beside it, what public files have no place for: pooler, by which a teacher's attention is read,
    and stats_head, which predicts mean and standard deviation of hidden patches.
    """
    for name, part in (("pooler", model.encoder.pooler), ("stats_head", model.decoder.stats_head)):
        if part is not None:
            save_safetensors(part.state_dict(), beside(path, name), {})
    if "fixed_picture" not in notes:
        notes = notes | {"fixed_picture": of_fixed_picture(model.encoder)}
    save_safetensors(public_weights(model), path, {"config": model.config, **notes})


def fixed_view(side):
    """A view u8 (1, side, side, 3) that is always the same, and like no drawing."""
    return (torch.arange(side * side * 3) * 7919 % 251).to(torch.uint8).view(1, side, side, 3)


@torch.no_grad()
def of_fixed_picture(encoder):
    """The first 16 numbers of the mean token of a fixed picture, in fp32.

    They travel in the file. If this code computes others from the same weights, model.py has changed
    in a way that no name and no shape tells, such as another activation.
    """
    view = fixed_view(encoder.image_size).to(encoder.cls_token.device)
    training, matmul = encoder.training, torch.backends.cuda.matmul
    rounds, matmul.allow_tf32 = matmul.allow_tf32, False  # TF32 would round to ten bits on a GPU
    tokens = encoder.eval().features(view)
    encoder.train(training)
    matmul.allow_tf32 = rounds
    return [round(x, 4) for x in tokens.float().mean(1)[0, :16].tolist()]


def model_file(run):
    return Path(run) / "model.safetensors" if Path(run).is_dir() else Path(run)


def about_model(run):
    """The header of a run's model: "config" of the network, "run" (the flags); {} of other files."""
    path = model_file(run)
    try:
        header = read_header(path)
    except UserError:
        return {}
    check_fields(header, {"config?": {}, "run?": {"data?": TEXT}}, path, "make the run again")
    return header


def places_of(name, run):
    """Where the path that a run names may lie -> those of the places that are there.

    It is relative to the folder in which the run was made, as runs/a is. A stage may be started in
    another one, and a run may be copied with what it names.
    """
    run = Path(run).resolve()
    tried = [Path(name), *(folder / name for folder in run.parents)]
    tried += [run.parent / PureWindowsPath(name).name, ROOT / name]  # it knows both slashes
    there = {}  # each once, by the name that was tried first
    for place in tried:
        if os.path.exists(place):
            there.setdefault(place.resolve(), place)
    return [*there.values()]


def place_of(name, run):
    """The first of these places; the name as it is where there is none."""
    return next(iter(places_of(name, run)), Path(name))


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

DECODER = {
    f"{name}?": whole(*BOUNDS[name]) for name in ("decoder_dim", "decoder_depth", "decoder_heads")
}
CONFIG = ENCODER | DECODER | {"norm_eps?": EPSILON}  # of a file of ours
REMEDY = "take another copy, or make the run again"
OTHER_CODE = "take the code that wrote it, or train again"
# Features of a fixed picture may differ by this share of their norm: weights in bf16 change them by 0.002,
# and QuickGELU in place of GELU by 0.003 to 0.04.
TOLERANCE = 0.0025


def read_network(path):
    """A run of ours or a public checkpoint -> ({our name: tensor}, of encoder and decoder; facts).

    facts: the arguments of ViT, norm_eps; decoder_dim, decoder_heads and decoder_depth, which is 0
    where there is no decoder; norm_pix and floor, which say what it predicts; fixed_picture of a
    file of ours.
    """
    file = model_file(path)
    config = about_model(file).get("config")
    if config is None:
        # The one import that runs up: a student's own run needs nobody else's names and shapes.
        from apps.formats import read_checkpoint

        return read_checkpoint(path)
    check_fields(config, CONFIG, f"{file}: config", REMEDY)
    known = {key.removesuffix("?") for key in CONFIG}
    known |= {name for kind in (ViT, MAE, SimMIM) for name in inspect.signature(kind).parameters}
    if odd := sorted(config.keys() - known):
        raise UserError(f"{file}: no network here has {', '.join(odd)}; {OTHER_CODE}")
    weights, header = read_safetensors(file, REMEDY)
    check_fields(header, {"fixed_picture?": list_of(number(), 1, 16)}, file, REMEDY)
    with reading(file, "network", REMEDY):
        weights = as_matrix({name: w.float() for name, w in weights.items()})
    facts = {"norm_eps": EPS, "norm_pix": True, "floor": FLOOR}
    facts |= {name: header[name] for name in ("norm_pix", "floor") if name in header}
    facts |= {"decoder_dim": 0, "decoder_depth": 0} | config
    facts.setdefault("decoder_heads", facts["decoder_dim"] // 32)
    facts["fixed_picture"] = header.get("fixed_picture")
    check_size(weights, facts, file, REMEDY)
    return weights, facts


def vit_arguments(facts):
    """Those of the facts that are arguments of ViT: ViT(**vit_arguments(facts))."""
    return {name: facts[name] for name in inspect.signature(ViT).parameters if name in facts}


def mae_arguments(facts):
    """Those of the facts that are arguments of MAE."""
    names = inspect.signature(MAE).parameters
    return vit_arguments(facts) | {name: facts[name] for name in names if name in facts}


def check_size(weights, facts, path, remedy):
    """A UserError if weights are too few for the network of these facts, or positions do not fit it.

    So a file that claims a huge network is refused before anything is allocated. All other names and
    shapes are checked by `load_exactly`, once the network is there.
    """
    size, p, dim, depth, heads = (facts[name] for name in ENCODER)
    width = facts.get("decoder_dim", 0)
    N = 1 + (size // p) ** 2
    with reading(path, "network", remedy):
        check_sizes(size, p, dim, depth, heads)
    there = sum(w.numel() for w in weights.values())
    wanted = dim * (N + 3 * p * p + 12 * dim * depth)
    wanted += 12 * width**2 * facts.get("decoder_depth", 0)
    # A network that somebody changed may have fewer weights than this formula says; hence the 8.
    if wanted > 8 * there + 10**6:
        raise UserError(f"{path} claims {wanted:,} weights, and holds {there:,}; {remedy}")
    positions = {"pos_embed?": "float 1 N D", "decoder_pos_embed?": "float 1 N W"}
    check_arrays(weights, positions, path, remedy, N=N, D=dim, W=width)


def load_exactly(module, weights, path):
    """Load weights into module: all of them and no others. Torch names what does not fit."""
    check_finite(weights, path)
    try:
        module.load_state_dict(weights)
    except RuntimeError as problem:
        reasons = " ".join(str(problem).split("\n\t")[1:])
        raise UserError(
            f"{path} does not fit this network: {reasons[:300]}; {OTHER_CODE}"
        ) from None


def load_mae_weights(model, weights, path, stays=BESIDE):
    """Load weights under public names into an MAE; what begins with a name of `stays` is kept."""
    loaded = {("decoder." if is_decoder(k) else "encoder.") + k: w for k, w in weights.items()}
    kept = {k: w for k, w in model.state_dict().items() if k.startswith(stays)}
    load_exactly(model, kept | loaded, path)


def resize_positions(pos, side):
    """Positions (1, 1+n*n, D) -> (1, 1+side*side, D): bicubic over the grid; the CLS row stays."""
    n = math.isqrt(pos.shape[1] - 1)
    if n == side:
        return pos
    grid = pos[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def at_size(weights, facts, image_size, path):
    """Weights and facts for views of image_size pixels (None: as they are): all positions resized.

    Where the size changes, a line first if this code computes other features than the file says.
    """
    size = image_size or facts["image_size"]
    p = facts["patch_size"]
    if not SIDE(size) or size % p:
        fix = f"take a multiple of {p} px, its patch, up to {BOUNDS['image_size'][1]}"
        raise UserError(f"{path} can't read {size} px; {fix}")
    if size == facts["image_size"]:
        return weights, facts
    if facts.get("fixed_picture"):  # it has the size of the file, so it is compared before
        encoder_with(weights, facts, path)
    there = [name for name in POSITIONS if name in weights]
    resized = {name: resize_positions(weights[name], size // p) for name in there}
    return weights | resized, facts | {"image_size": size, "fixed_picture": None}


def blank_encoder(facts, norm_eps):
    """The ViT of these facts, whose weights are still to be loaded; norm_eps is no weight."""
    encoder = ViT(**vit_arguments(facts))  # `check_size` has seen that it can be built
    set_epsilon(encoder, norm_eps)
    return encoder


def epsilon_of(encoder):
    """norm_eps for a file: what stands in for model.EPS in this encoder."""
    return getattr(encoder, "norm_eps", EPS)


def set_epsilon(encoder, norm_eps):
    """Give every LayerNorm this epsilon; one of yours, built with another one than EPS, keeps its own."""
    encoder.norm_eps = norm_eps
    for norm in encoder.modules():
        if isinstance(norm, nn.LayerNorm) and norm.eps == EPS:
            norm.eps = norm_eps


def load_encoder(path, image_size=None):
    """A run folder or any public checkpoint -> the ViT in eval mode.

    image_size: resize the positions to views of so many pixels; None keeps the trained size.
    """
    return encoder_with(*at_size(*read_network(path), image_size, path), path).eval()


def encoder_with(weights, facts, path):
    """The ViT of these facts and weights; a line if this code computes other features than the file says."""
    with torch.random.fork_rng(devices=[]):  # loading leaves the seed alone
        encoder = blank_encoder(facts, facts["norm_eps"])
    load_exactly(encoder, encoder_of(weights), path)
    warn_of_other_code(encoder, facts.get("fixed_picture"), path)
    return encoder


def warn_of_other_code(encoder, expected, path):
    """A line if this model.py computes something else from the same weights; see `of_fixed_picture`."""
    if not expected or len(computed := of_fixed_picture(encoder)) != len(expected):
        return
    computed, expected = torch.tensor(computed), torch.tensor(expected)
    off = ((computed - expected).norm() / expected.norm()).item()
    if off > TOLERANCE:
        warn_once(f"warning  {path}: its features are {100 * off:.1g} % off; {OTHER_CODE}")


@functools.cache
def warn_once(line):
    print(line, file=sys.stderr)


def load_mae(path, image_size=None):
    """A run of pretrain.py or a public MAE -> (MAE in eval mode, header).

    The MAE has the run's pooler and stats_head, if there are some; the header says norm_pix, floor.
    """
    weights, facts = at_size(*read_network(path), image_size, path)
    if not facts["decoder_depth"]:
        raise UserError(f"{path} has no decoder, as SimMIM has none; give a run without simmim=1")
    with torch.random.fork_rng(devices=[]), reading(path, "network", REMEDY):
        model = MAE(**mae_arguments(facts))
    set_epsilon(model.encoder, facts["norm_eps"])
    load_mae_weights(model, weights, path)
    if beside(path, "stats_head").exists():
        load_beside(model.decoder.stats_head, path, "stats_head")
    add_pooler(model.encoder, path)
    warn_of_other_code(model.encoder, facts.get("fixed_picture"), path)
    return model.eval(), about_model(path) | {name: facts[name] for name in ("norm_pix", "floor")}


def load_teacher(path):
    """load_encoder, and the pooler of the run, if it has one."""
    encoder = load_encoder(path)
    add_pooler(encoder, path)
    return encoder


def add_pooler(encoder, path):
    """The pooler of a run, if it has one, joins its encoder."""
    if beside(path, "pooler").exists():
        with torch.random.fork_rng(devices=[]):  # loading leaves the seed alone
            encoder.pooler = pooler_of(encoder)
        load_beside(encoder.pooler, path, "pooler")


# ---- before a run --------------------------------------------------------------------------------


@torch.no_grad()
def check_readable(model):
    """A UserError if the files of this network, MAE or SimMIM, would not give it back.

    They are written and read as at the end of a run, in a temporary folder. So who has changed
    model.py learns before the first step what would be lost.
    """
    check_registered(model)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for w in model.parameters():  # all are moved a little: what begins at zero would not be missed
        if w.is_floating_point():
            w += 0.01 * torch.rand(w.shape, generator=generator)
    # No stage reads the decoder of SimMIM again.
    part = model.encoder if isinstance(model, SimMIM) else model
    ours = answers(part)
    public_weights(model)  # a name that no file could tell is a mistake of its own
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        try:
            save_model(model, file, {"fixed_picture": None})
            again = load_encoder(file) if part is model.encoder else load_mae(file)[0]
            pairs = zip(ours, answers(again), strict=True)
            same = all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in pairs)
            reason = "its answers would differ"
        except (UserError, TypeError, ValueError, RuntimeError) as problem:
            same, reason = False, " ".join(str(problem).split())
            reason = reason.replace(f"{file}: ", "").replace(str(file), "the file")
            for advice in (REMEDY, OTHER_CODE):  # for files that somebody else has made
                reason = reason.removesuffix(f"; {advice}")
    model.load_state_dict(before)
    if not same:
        raise UserError(
            f"this network could not be read back from its file: {reason}; in model.py, put every "
            "argument of ViT and MAE into their config, what is learned into a Parameter or a buffer"
        )


def answers(net):
    """What a ViT or an MAE computes of a fixed picture in eval mode: tokens; an MAE also predicts.

    -> [tokens (1, 1+N, D)], of an MAE also pred and stats of the second half of the patches
    """
    training = net.training
    encoder = getattr(net.eval(), "encoder", net)
    patches, ids = encoder.all_patches(fixed_view(encoder.image_size))
    K = ids.shape[1] // 2
    outputs = [encoder(patches, ids)]
    if net is not encoder:
        outputs += net(patches[:, :K], ids[:, :K], ids[:, K:])[:2]
    net.train(training)
    return outputs


def check_registered(network):
    """A UserError if a module keeps a tensor or a module as a plain attribute, in a list or a dict.

    No optimizer would train it, and no file would hold it.
    """
    for where, module in network.named_modules():
        for name, value in vars(module).items():
            values = [*value.values()] if isinstance(value, dict) else value
            values = values if isinstance(values, list | tuple) else [values]
            if not name.startswith("_") and any(
                isinstance(x, torch.Tensor | nn.Module) for x in values
            ):
                raise UserError(
                    f"{where}.{name} is neither trained nor saved: make it a Parameter, a buffer, "
                    "a ParameterList or a ModuleList (of a dict, a ParameterDict or a ModuleDict); what "
                    "each forward computes anew gets a name that begins with _"
                )


# ---- a start for pre-training --------------------------------------------------------------------


def init_from(model, path):
    """Start an MAE from a checkpoint -> a line that says what was loaded.

    The encoder has to fit, and every argument of ViT but image_size. So has the decoder, where both
    have one; else the model's stays as it is. Positions are resized to the model's grid.
    """
    weights, facts = read_network(path)
    config = model.config
    size = config["image_size"]
    config = {"decoder_heads": config.get("decoder_dim", 0) // 32} | config
    decoder = "decoder_dim" in config and facts["decoder_depth"] > 0  # SimMIM's has no blocks
    kinds = (ViT, MAE) if decoder else (ViT,)
    known = [one for kind in kinds for one in inspect.signature(kind).parameters.values()]
    # A file that does not know an argument was written before there was one: then it had its default.
    theirs = {one.name: one.default for one in known} | facts
    keys = [one.name for one in known if one.name in config and one.name != "image_size"]
    if odd := [key for key in keys if config[key] != theirs[key]]:
        here, there = (", ".join(f"{k} {shape[k]}" for k in odd) for shape in (config, theirs))
        fix = ",".join(f"{k}={theirs[k]}" for k in keys if k != "decoder_heads")
        raise UserError(f"--init {path} has {there}, this run {here}; give --model nano:{fix}")
    weights, now = at_size(weights if decoder else encoder_of(weights), facts, size, path)
    load_mae_weights(model, weights, path, stays=BESIDE if decoder else (*BESIDE, "decoder."))
    warn_of_other_code(model.encoder, now.get("fixed_picture"), path)
    line = f"{path}: encoder{' and decoder' if decoder else ', the decoder starts anew'}"
    if facts["image_size"] != size:
        line += f"; positions resized from {facts['image_size']} px"
    return line
