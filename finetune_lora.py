"""Stage 4: fine-tune an encoder to recognise characters: a head (linear), LoRA (lora), or all weights (full).

    python finetune_lora.py runs/NAME                                LoRA of rank 8, into runs/NAME-lora
    python finetune_lora.py runs/NAME --method lora:r=4              into runs/NAME-lora-r-4
    python finetune_lora.py --resume runs/NAME-lora                  continues a run
    python finetune_lora.py --resume runs/NAME-lora --split test     measures it on another split

Reads:  an encoder (runs/NAME, or a checkpoint file that apps/formats.py knows), datasets/NAME
Writes: runs/NAME-METHOD/ state.pt, log.jsonl, metrics.json (of another split: metrics-SPLIT.json),
        curves.png, confusion.png, head.safetensors; for lora adapter_model.safetensors and
        adapter_config.json; for full, and with --from-scratch, model.safetensors; for
        cross-validation folds/

The kept epoch is chosen on dev, or on a held-out tenth of train, and results are those of --split.
A small collection has no picture to spare for either. There, cross-validation chooses and measures
(apps/folds.py), if it is quick, there is no val, or --split folds asks for it. Then every picture is learned.

The tokens of a picture are pooled to one vector. The neck, a batch norm, makes the embedding of it, by
which pictures are compared, and the head a logit for each character (common/classifier.py).

    B batch   N patches   K of them shown   S side of a view   D width   C characters
"""

import copy
import math
import re
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import mask as masking
from common import classifier, controls, metrics, readout, stats, train
from common.checkpoints import (
    check_registered,
    fixed_view,
    flags_of,
    load_encoder,
    load_exactly,
    model_file,
    of_fixed_picture,
    places_of,
    warn_of_other_code,
)
from common.command import (
    Parser,
    at_least,
    between,
    cli,
    command,
    drawing,
    parse_keys,
    refuse_useless,
    run_name,
    set_defaults,
)
from common.features import (
    BY_FOLDS,
    Subset,
    evenly_of_each,
    name_of,
    open_all,
    open_subsets,
    split_suffix,
    untrained_like,
)
from common.fields import check_fields, one_of
from common.io import UserError, one_line, quoted, reading, save_json, save_safetensors
from common.lora import (
    ADAPTER,
    REMEDY,
    fingerprint,
    read_adapter,
    read_own_adapter,
    save_adapter,
    save_encoder,
    save_own_adapter,
)
from common.stats import standard_error
from kernels.gather import masked_patch_gather

# The recipe. Learning rates were chosen on dev of faces20 in short runs (results/TRIED.md). With LoRA at
# 0.01, training collapsed. The head is new and has everything to learn, so its rate is larger.
METHODS = {
    "linear": {},
    "lora": {"r": 8, "alpha": 0.0},  # alpha 0 is 2r
    # Lower blocks hold what every picture needs, such as edges and colours. So they should change
    # less than upper ones (Clark et al. 2020, arXiv:2003.10555). 1 is one rate for all blocks.
    "full": {"layer_decay": 0.9},  # a block's learning rate over that of the block above
}
# Early steps are cheap, because they show a quarter of the patches, so there is time for more of them.
# Later ones come closer to use, where a picture is whole. On dev, in equal time, this was better than
# one share for all steps, and also than a rise to 1. On val it helped LoRA, but made no difference to
# the fine-tuning of all weights (results/TRIED.md).
RISING = 0.25, 0.75  # share of the patches that is shown, from the first step to the last
RECIPE = {
    "linear": {"epochs": 50, "batch_size": 256, "lr": 0.0, "head_lr": 3e-2, "keep": (1.0, 1.0)},
    "lora": {"epochs": 30, "batch_size": 32, "lr": 3e-3, "head_lr": 1e-2, "keep": RISING},
    "full": {"epochs": 30, "batch_size": 32, "lr": 1e-3, "head_lr": 1e-2, "keep": RISING},
}
NOT_READ = {  # flags without an effect on a method
    "linear": {"lr", "keep", "colourless", "unfreeze_every"},
    "lora": {"unfreeze_every"},
    "full": set(),
}
LEAST_STEPS = 90  # of a run whose epochs nobody chose (results/TRIED.md)
WEIGHT_DECAY = {"linear": 1e-4, "lora": 1e-4, "full": 0.05}
WARMUP = 0.1  # share of the run in which the learning rate rises
CLIP = 1.0  # largest norm of the gradient
MIN_CROP = 0.5  # smallest share of an image in a crop; "linear" has no augmentation
COLOUR = 0.2  # brightness, contrast and saturation are multiplied by 1 +- this
CUTOUT, GRAY = 0.1, 128  # share of a view under a square of this gray (of stress tests, too)
# Without smoothing the cross-entropy never stops asking for larger logits, and the head becomes too
# sure of itself (Szegedy et al. 2016, arXiv:1512.00567, section 7).
SMOOTHING = 0.1  # share of the target that is divided equally among all classes
NEXT = "python -m apps.recognize"  # what is printed at the end; lab.convnets names its own
ORDER_STREAM = 1  # the fourth number that seeds the draws of --balanced; a step's are three
NECK_OF_CLASS = 20  # pictures of each character give the neck, a norm, its statistics at the end
NECK_IN_ALL = 256  # at most so many of these pictures do so after an epoch


def shares(text):
    """An argparse type: "0.5" -> (0.5, 0.5), "0.25:0.75" -> (0.25, 0.75), first and last of the run."""
    first, _, last = text.partition(":")
    return tuple(map(between(0.01, 1), (first, last or first)))


shares.__name__ = "share"  # what argparse calls a value that is none


def read_flags():
    """The flags: for a new run those of its method's recipe, for a resumed one the saved ones."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help="runs/NAME, or a checkpoint of MAE, timm, HF")
    add("--data", metavar="DIR", help="labelled set (default: the encoder's, else datasets/toon)")
    add("--out", metavar="RUN", help="run folder (default: runs/ENCODER-METHOD)")
    add("--method", default="lora", help="linear, lora:r=8,alpha=16 or full:layer_decay=0.9")
    add("--head", default="linear", help=", ".join(classifier.HEADS))
    add(
        "--pool",
        default="mean",
        choices=classifier.HEAD_POOLS,
        help="mean patch token, or CLS token",
    )
    add("--from-scratch", action="store_true", help="random weights in the encoder: the control")
    add("--unfreeze-every", type=at_least(0), default=0, metavar="EPOCHS", help="epochs per block")
    add("--hold-out", type=at_least(0), default=0, metavar="N", help="leave out N characters")
    add("--image-size", type=at_least(1), metavar="PX", help="side of a view (the encoder's)")
    add("--epochs", type=at_least(1), help="passes over the data (default: of the method)")
    add("--batch-size", type=at_least(2), metavar="B", help="images of a step")
    add("--lr", type=between(0, 1), help="peak learning rate of the encoder or the adapter")
    add("--head-lr", type=between(1e-9, 1), metavar="LR", help="peak learning rate of the head")
    add("--balanced", action="store_true", help="draw every character equally often")
    add("--logit-adjust", type=between(0, 10), default=0.0, metavar="TAU", help="for a long tail")
    add("--keep", type=shares, metavar="SHARE", help="of the patches shown; 0.25:0.75 rises")
    add("--colourless", type=between(0, 1), default=0.1, metavar="SHARE", help="of views in gray")
    train.add_flags(add, reports=False)
    splits = ["val", "dev", "test", BY_FOLDS]
    add(
        "--split", choices=splits, help="what is reported (a small set: folds, then all is learned)"
    )
    flags = parser.parse_args()
    saved = train.take_saved_flags(flags, "split")
    if flags.resume:
        if BY_FOLDS in (saved["split"], flags.split) and saved["split"] != flags.split:
            fix = f"python -m apps.unknown {quoted(flags.out)} --data OTHER measures other pictures"
            kind = "learned every picture" if saved["split"] == BY_FOLDS else "holds pictures back"
            raise UserError(f"--split {flags.split}: {flags.out} {kind}; leave it out, or {fix}")
        return flags
    method, _ = parse_keys(flags.method, METHODS, "--method")
    parse_keys(flags.head, classifier.HEADS, "--head")  # now, and not when pictures are packed
    if method == "lora" and flags.from_scratch:
        raise UserError("--method lora needs a trained encoder; choose full")
    refuse_useless(flags.given & NOT_READ[method], f"with --method {method}")
    if flags.split == BY_FOLDS:
        refuse_useless(flags.given & {"hold_out"}, "with --split folds")
    if flags.head == "ifa":
        refuse_useless(flags.given & {"pool"}, "with --head ifa")
    # Where every character is drawn equally often, log p is one constant, which softmax ignores.
    if flags.balanced:
        refuse_useless(flags.given & {"logit_adjust"}, "with --balanced")
    set_defaults(flags, **RECIPE[method])
    in_name = {"head", "from_scratch", "seed"}
    name = run_name(flags, name_of(flags.encoder), flags.method, only=in_name)
    set_defaults(flags, out=f"runs/{name}", command=command())
    return flags


# ---- LoRA: low-rank adapters ---------------------------------------------------------------------

# Layers that get LoRA, here and in apps/detect.py, and how many matrices each stacks. A ViT keeps q, k
# and v in one Linear, because one large product is faster than three. One pair of factors would make
# them share its r directions of the input, so each gets factors of its own, as in the paper.
LAYERS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}


class LoRA(nn.Module):
    """A frozen Linear plus a trained low-rank product: W x + b + alpha/r B A x (Hu et al. 2021, eq. 3).

    Each of the equal `chunks` of the output has its own A and B. B starts at zero.
    """

    def __init__(self, base, r, alpha, chunks=1):
        super().__init__()
        self.base = base
        # B A is a sum of r products. With a fixed alpha, dividing by r lets another rank work with the
        # same learning rate (section 4.1). The default alpha = 2r undoes that: the factor is 2 for every
        # r. For large ranks try alpha / sqrt(r), which is rsLoRA (Kalajdzievski 2023, arXiv:2312.03732),
        # with one alpha for all ranks, such as lora:r=32,alpha=16.
        self.scale = alpha / r
        device = base.weight.device
        # B A is zero at first, so that training begins at the pre-trained encoder. If A were zero, too,
        # neither would have a gradient: that of B contains A, and that of A contains B.
        self.A = nn.Parameter(torch.empty(chunks, r, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(chunks, base.out_features // chunks, r, device=device))
        # Drawn as the weights of nn.Linear, as in the authors' code and in peft; the paper says
        # Gaussian. One A at a time, because of a tensor with three dimensions kaiming_uniform_ takes
        # r * in for the number of inputs, as if it were a convolution.
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def factors(self):
        """-> A (chunks*r, in) and B (out, chunks*r): the As stacked, the Bs on a diagonal."""
        return self.A.flatten(0, 1), torch.block_diag(*self.B)

    def weight(self):
        """W + alpha/r B A, (out, in): the one matrix that could stand in place of this layer."""
        return equation_3(self)

    def forward(self, x):
        A, B = self.factors()
        # First A x, which is only chunks * r numbers long: B A would be as large as the weight itself.
        return self.base(x) + self.scale * F.linear(F.linear(x, A), B)


def lora_layers(encoder):
    """{name: LoRA layer} of an encoder."""
    return {name: m for name, m in encoder.named_modules() if isinstance(m, LoRA)}


def learned(encoder):
    """{name: parameter} of what is trained in an encoder with an adapter."""
    return {name: w for name, w in encoder.named_parameters() if w.requires_grad}


@torch.no_grad()
def computes(lora, weight_of):
    """Is the output of a LoRA layer the same as weight_of(layer) x + b?"""
    # On the CPU: a GPU may round products to TF32, and then what is equal would not seem so.
    layer = copy.deepcopy(lora).cpu().eval()
    x = torch.linspace(-1, 1, layer.base.in_features)[None]
    y = F.linear(x, weight_of(layer), layer.base.bias)
    return torch.allclose(layer(x), y, rtol=1e-3, atol=1e-4)


def equation_3(lora):
    """W + alpha/r B A, all that peft computes. LoRA.weight says the same until somebody changes it."""
    A, B = lora.factors()
    return lora.base.weight + lora.scale * (B @ A)


def is_plain(encoder):
    """Is its adapter a LoRA as peft knows it: is nothing learned but A and B, and used as in eq. 3?"""
    layers = lora_layers(encoder)
    if learned(encoder).keys() != {f"{name}.{factor}" for name in layers for factor in "AB"}:
        return False
    # A layer of a student's may learn an A and a B, too, and have no scale or no chunks.
    if not all(hasattr(x, "scale") and x.A.dim() == x.B.dim() == 3 for x in layers.values()):
        return False
    if not all(computes(lora, equation_3) for lora in layers.values()):
        return False
    shapes = {}  # of each kind of layer: peft has one rank and one alpha for those of all blocks
    for name, lora in layers.items():
        kind = re.sub(r"^blocks\.\d+\.", "", name)
        shapes.setdefault(kind, set()).add((*lora.A.shape, lora.scale))
    return all(len(some) == 1 for some in shapes.values())


def add_lora(encoder, r=8, alpha=0.0):
    """Freeze the encoder and put LoRA on LAYERS of every block. alpha is 2r if 0.

    The arguments are keys of --method lora. What is added here to be trained is saved and read back.
    """
    dim = encoder.config["dim"]
    if not 1 <= r <= dim:
        raise UserError(f"--method lora:r={r}: the rank must lie in 1 to {dim}")
    encoder.requires_grad_(False)
    for block in dict.fromkeys(encoder.blocks):  # each once, where one stands in several places
        for name, chunks in LAYERS.items():
            layer = dict(block.named_modules()).get(name)
            if not isinstance(layer, nn.Linear) or layer.out_features % chunks:
                fix = "LAYERS in finetune_lora.py names the layers of a block that get LoRA"
                raise UserError(f"a block has no Linear {name} of {chunks} equal parts; {fix}")
            block.set_submodule(name, LoRA(layer, r, alpha or 2 * r, chunks))


def why_not_merged(encoder):
    """Why plain layers can't stand in place of the adapter, or None if they can."""
    layers = lora_layers(encoder)
    for name, lora in layers.items():
        if not computes(lora, type(lora).weight):
            return (
                f"the forward of {name} does not multiply by its `weight`; let both say the same "
                "(finetune_lora.py). What is no product with one matrix can't be merged"
            )
    with torch.random.fork_rng(devices=[]):
        plain = untrained_like(encoder).state_dict()
    modules = encoder.named_modules(remove_duplicate=False)  # a block may stand in several places
    bases = {name: m.base.state_dict() for name, m in modules if isinstance(m, LoRA)}
    inside = tuple(f"{name}." for name in bases)
    merged = {name for name in encoder.state_dict() if not name.startswith(inside)}
    merged |= {f"{name}.{key}" for name, base in bases.items() for key in base}
    odd = sorted(merged ^ plain.keys())
    return f"{odd[0]} is in this network or in a plain one, and not in both" if odd else None


@torch.no_grad()
def merge_lora(encoder):
    """Put plain layers in place of LoRA: W + alpha/r B A. A UserError where that would be another network."""
    if reason := why_not_merged(encoder):
        raise UserError(f"this adapter can't be merged: {reason}")
    # The product has the shape of the weight, so a merged encoder is as fast as a plain one. But the
    # product can't be subtracted again exactly, because the sum is rounded: training keeps them apart.
    for name, lora in lora_layers(encoder).items():
        lora.base.weight.copy_(lora.weight())
        encoder.set_submodule(name, lora.base)


@torch.no_grad()
def load_lora(encoder, folder):
    """Put the adapter of a folder, ours or one that peft made, on a plain encoder; freeze both."""
    if own := read_own_adapter(folder, encoder):
        tensors, keys = own
        with reading(Path(folder) / ADAPTER[1], "adapter", REMEDY):
            add_lora(encoder, **keys)
        kept = {k: w for k, w in encoder.state_dict().items() if k not in learned(encoder)}
        load_exactly(encoder, kept | tensors, folder)
        encoder.requires_grad_(False)
        return
    for name, (A, B, scale) in read_adapter(folder, encoder).items():
        # A file has the stacked A and the block-diagonal B, so q, k and v come back as one pair of rank
        # 3r. It gives the same output. But training would fill the zeros of B, so both are frozen.
        lora = LoRA(encoder.get_submodule(name), len(A), 1.0)
        lora.A[0], lora.B[0] = A, B
        lora.scale = scale
        encoder.set_submodule(name, lora)
    encoder.requires_grad_(False)


def load_base(name, folder, image_size, digest=None):
    """The encoder that the run or adapter in a folder names -> the ViT in eval mode.

    digest: its fingerprint, None of an adapter that does not tell it.
    """
    places = [place for place in places_of(name, folder) if model_file(place).exists()]
    for place in places:
        encoder = load_encoder(place, image_size)
        # An adapter is nothing on other weights, so the name of an encoder is not enough.
        if digest in (None, fingerprint(encoder)):
            return encoder
    if places:
        raise UserError(f"{places[0]} is not the encoder that {folder} was trained on; restore it")
    looked = "not in this folder, not above the run, and not in the program's folder"
    fix = f"copy it to {Path(folder).with_name(Path(name).name)}"
    raise UserError(
        f"{folder} was trained on the encoder {name}, which is missing: {looked}; {fix}"
    )


def load_classifier(folder):
    """runs/NAME of this stage -> (Classifier in eval mode, header of its head file)."""
    folder = Path(folder)
    weights, header = classifier.read_head(folder)
    method = {"method": one_of(*METHODS)}
    check_fields(header, method, folder / "head.safetensors", classifier.REMEDY)
    # A run has an encoder of its own if it trained all weights or began with random ones. Others name theirs.
    base = folder if (folder / "model.safetensors").exists() else header["base"]
    encoder = load_base(base, folder, header["image_size"], header["fingerprint"])
    # Files decide as well: without its adapter, a run would answer, but not as it has learned.
    if header["method"] == "lora" or (folder / ADAPTER[0]).exists():
        load_lora(encoder, folder)
    config = {key: value for key, value in header["config"].items() if key != "dim"}
    with reading(folder / "head.safetensors", "head", classifier.REMEDY):
        net = classifier.Classifier(encoder, len(header["classes"]), **config)
    state = {f"encoder.{name}": w for name, w in encoder.state_dict().items()} | weights
    load_exactly(net, state, folder / "head.safetensors")
    warn_of_other_code(encoder, header.get("fixed_picture"), folder / "head.safetensors")
    return net.eval(), header


# ---- training: views -----------------------------------------------------------------------------


def cutout(view, share, generator):
    """A gray square of this share of the area on each view (DeVries and Taylor 2017, arXiv:1708.04552).

    In the paper, a part of the square may lie outside, so that some pictures lose little. Here none does.
    """
    B, S = view.shape[:2]
    side = round(S * math.sqrt(share))
    start = torch.randint(S - side + 1, (2, B, 1), generator=generator)  # its top and left
    pixel = torch.arange(S)
    rows, columns = (pixel >= start) & (pixel < start + side)  # (B, S) each
    square = rows[:, :, None] & columns[:, None]
    return view.masked_fill(data.send(square[..., None], view.device), GRAY)


def augmented(images, S, colourless, generator):
    """images u8 (B, ., ., 3) -> views u8 (B, S, S, 3): crop, flip, colour, cutout; a share in gray."""
    view = data.view_images(images, *data.draw_boxes(len(images), generator, MIN_CROP), S)
    # The hue stays, because the colours of hair and eyes tell who it is. But who has learned by colour
    # alone fails on a sketch, so a share of the views has none (docs/recognise.md).
    draws = torch.rand(4, len(view), generator=generator)
    view = data.jitter_colour(view, draws.T, COLOUR, colourless)
    return cutout(view, CUTOUT, generator)


def drop_patches(view, encoder, keep, generator):
    """view u8 -> random patches (B, K, P), their places (B, K): PatchDropout, arXiv:2208.07220."""
    N = encoder.side**2
    K = max(1, round(keep * N))
    if K == N:
        return encoder.all_patches(view)
    # Dropped patches are not even embedded, as in an MAE, so a step costs less. It is augmentation, too,
    # because no single patch can be relied on.
    noise = torch.rand(len(view), N, generator=generator)
    ids, _ = masking.sample(data.send(noise, view.device), K)
    return masked_patch_gather(view, ids, encoder.patch_size), ids


def draw_views(task, images, t, generator):
    """images u8 (B, ., ., 3) at t of the run, in [0, 1] -> patches (B, K, P) and their places (B, K)."""
    encoder = task.net.encoder
    view = augmented(images, encoder.image_size, task.colourless, generator)
    first, last = task.keep
    share = first + (last - first) * t
    # It rises in steps of 1/16, because oneDNN keeps memory for every new shape.
    if first != last:
        share = round(16 * share) / 16
    return drop_patches(view, encoder, share, generator)


# ---- training: what a run works with -------------------------------------------------------------


class TrainedWeights:
    """The tensors of a network that are trained, as a part of state.pt: loading copies into them."""

    def __init__(self, net):
        self.tensors = {}
        # A frozen encoder is in a file of its own, so checkpoints of LoRA stay small. What is outside the
        # encoder is saved whole: the statistics of the neck are no parameters, but are part of it. So
        # are those of a BatchNorm inside the encoder.
        for name, w in net.state_dict(keep_vars=True).items():
            if w.requires_grad or not name.startswith("encoder.") or "running_" in name:
                self.tensors[name] = w.detach()

    def state_dict(self):
        return dict(self.tensors)

    def load_state_dict(self, saved):
        for name, w in self.tensors.items():
            w.copy_(saved[name])


@dataclass
class Best:
    """The highest macro-F1 on dev so far, and the epoch that is kept, as a part of state.pt."""

    macro_f1: float = -1.0
    epoch: int = 0
    weights: dict = field(default_factory=dict)

    def update(self, macro_f1, epoch, pictures, trained):
        """Keep this epoch if it is within a standard error of the best: F1 in %, of so many pictures."""
        self.macro_f1 = max(macro_f1, self.macro_f1)
        # Dev is small, so the single best of many epochs is the best by luck, too. Of those that can't be
        # told apart, the latest has learned most. It recognised more unknown characters as such
        # (results/TRIED.md). The error is that of an accuracy, because macro-F1 has no simple one.
        if macro_f1 >= self.macro_f1 - standard_error(self.macro_f1, pictures):
            self.epoch = epoch
            self.weights = {name: w.cpu().clone() for name, w in trained.state_dict().items()}

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, saved):
        vars(self).update(saved)


@dataclass
class Task:
    """What a run works with; see `open_task`."""

    method: str  # linear, lora or full
    head: str
    keys: dict  # of --method and --head, such as r and margin
    net: classifier.Classifier
    trained: TrainedWeights
    classes: list  # names of the characters that are learned
    train: Subset
    dev: Subset  # None where folds have chosen the number of epochs
    report: Subset  # None where folds have measured
    keep: tuple  # share of the patches that is shown, in the first and in the last step
    colourless: float  # share of the views in gray
    out: Path
    device: torch.device
    autocast: partial
    stop: int = 0  # the epoch after which it ends and that is kept, where dev does not choose one
    features: dict = field(default_factory=dict)  # of a frozen encoder, {name of a set: (n, D)}

    def sizes(self):
        """Training pictures of each class, (C,)."""
        return torch.bincount(self.train.labels[self.train.index])

    def parameters_trained(self):
        """-> how many, and their share of all."""
        count = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        return count, count / sum(p.numel() for p in self.net.parameters())


def open_task(flags, device, autocast):
    """The data, the network, and which of its weights are trained."""
    encoder = fresh_encoder(flags)
    folder = flags.data or flags_of(flags.encoder).get("data", "datasets/toon")
    flags.data = str(data.open_or_pack(folder, encoder.image_size))
    train.same_as_begun(flags, "fingerprint", fingerprint(encoder), flags.encoder)
    flags.split = flags.split or split_for(flags, encoder, device, autocast)
    if flags.split == BY_FOLDS:
        # Folds choose the epoch and measure, so no picture has to be kept from training.
        every, classes = open_all(flags.data)
        sets = every, None, None
    else:
        # Where there is no dev, a tenth of train is held out (common/features.py).
        sets, classes = open_subsets(flags.data, flags.split, flags.hold_out)
    train.same_as_begun(flags, "digest", data.digest(flags.data), flags.data)
    pictures = len(sets[0].index)
    flags.batch_size = min(flags.batch_size, pictures)
    if flags.method != "linear":  # there, no gradient passes through the encoder
        tokens = encoder.side**2 * max(flags.keep) + 1  # of a view, at most
        train.warn_of_metal(round(flags.batch_size * tokens), device)
    # Thirty epochs of 35 pictures are thirty steps, in which a new head learns little.
    least = math.ceil(LEAST_STEPS / (pictures // flags.batch_size))
    set_defaults(flags, epochs=max(flags.epochs, least))
    return task_of(flags, encoder, sets, classes, device, autocast)


def fresh_encoder(flags):
    """The encoder as training begins with it: that of the command, or with random weights."""
    encoder = load_encoder(flags.encoder, flags.image_size)
    return untrained_like(encoder, flags.seed) if flags.from_scratch else encoder


def split_for(flags, encoder, device, autocast):
    """What is reported where nobody asks: folds of a small collection, val of other sets."""
    if flags.hold_out or not data.is_small(flags.data):
        return "val"
    if (Path(flags.out) / BY_FOLDS).exists():  # the command was stopped there, and is given again
        return BY_FOLDS
    from apps import folds  # runs up, as in main

    return BY_FOLDS if folds.are_quick(flags, encoder, device, autocast) else "val"


def task_of(flags, encoder, sets, classes, device, autocast):
    """An encoder with a new head, and LoRA where it is asked for, for sets of `open_subsets`."""
    method, keys = parse_keys(flags.method, METHODS, "--method")
    head, head_keys = parse_keys(flags.head, classifier.HEADS, "--head")
    # Random weights have nothing in their lower blocks that is worth keeping: no layer decay.
    if flags.from_scratch and method == "full" and "layer_decay" not in flags.method:
        keys["layer_decay"] = 1.0
    torch.manual_seed(flags.seed)
    encoder.requires_grad_(method == "full")
    if method == "lora":
        add_lora(encoder, **keys)
    net = classifier.Classifier(encoder, len(classes), head, flags.pool, **head_keys).to(device)
    return Task(
        method=method,
        head=head,
        keys=keys | head_keys,
        net=net,
        trained=TrainedWeights(net),
        classes=classes,
        train=sets[0],
        dev=sets[1],
        report=sets[2],
        keep=flags.keep,
        colourless=flags.colourless,
        out=Path(flags.out),
        device=device,
        autocast=autocast,
    )


def describe(flags, task):
    """Print what is learned by what."""
    sizes = task.sizes()
    names = task.train.split["header"]["classes"]
    choose = "folds choose" if task.dev is None else f"{len(task.dev.index)} dev pictures choose"
    count, share = task.parameters_trained()
    print(
        f"data     {flags.data}: {len(task.classes)} of {len(names)} characters, "
        f"with {sizes.min()} to {sizes.max()} training pictures; {choose} the epoch\n"
        f"run      {task.out}: {flags.method} of {flags.encoder}, {flags.head} head, {count:,} "
        f"parameters trained ({share:.2%})"
    )
    rare = [name for name in names if name not in task.classes]
    if rare and not flags.hold_out:
        line = f"note: too few pictures to learn {rare[0]}, one of {len(rare)} such characters"
        print(f"{line}; apps.recognize --enrol makes a character known by three pictures")


# ---- training: the loop --------------------------------------------------------------------------


def draw_order(index, labels, balanced, seed, epoch):
    """The order of an epoch; balanced: drawn with replacement, every class equally likely."""
    if not balanced:
        return index[data.epoch_order(len(index), seed, epoch)]
    # An epoch stays as long as before. So frequent characters lose some of their pictures, and the few
    # pictures of rare ones come again and again: only augmentation makes them different.
    weights = 1 / torch.bincount(labels[index]).double()[labels[index]]
    generator = train.seeded(seed, epoch, 0, ORDER_STREAM)
    return index[torch.multinomial(weights, len(index), replacement=True, generator=generator)]


def unfreeze(net, trained, epoch, every):
    """Gradual unfreezing (Howard and Ruder 2018, arXiv:1801.06146): first the head and the encoder's last
    norm, then the last block, and one more block every `every` epochs.
    """
    depth = len(net.encoder.blocks)
    # While the head is still random, its gradients mean little, and could spoil good features (Kumar et
    # al. 2022, arXiv:2202.10054). So blocks can wait until it has learned something.
    for name, p in net.named_parameters():
        if name in trained:
            p.requires_grad_(not every or classifier.level_of(name, depth) > depth - epoch // every)


def pooled_of(task, subset, index):
    """The neck's input for whole pictures, `index` of a set: fp32 on the CPU, (n, D)."""
    net = task.net.eval()
    if task.method != "linear":
        return classifier.pooled_of(net, subset.split, index, task.autocast)
    # Without augmentation, a frozen encoder gives the same features in every epoch: once is enough.
    if subset.name not in task.features:
        every = torch.arange(len(subset.split["images"]))
        pooled = classifier.pooled_of(net, subset.split, every, task.autocast, "features")
        task.features[subset.name] = pooled
    return task.features[subset.name][index]


def settle_neck(task, most=None):
    """Give the neck mean and variance of whole training pictures, NECK_OF_CLASS of each class.

    In training it averages over crops whose patches are in part hidden, and over earlier weights. The
    features of whole pictures are others: LoRA had 4.9 % on dev with that average, and 88.0 % with
    these statistics (results/TRIED.md). It is the PreciseBN of Wu and Johnson 2021, arXiv:2105.07576.
    """
    # Another neck, such as the LayerNorm of ifa, takes each picture by itself.
    if not isinstance(task.net.neck, nn.BatchNorm1d):
        return
    index = task.train.index
    chosen = index[torch.cat(evenly_of_each(task.train.labels[index], NECK_OF_CLASS))]
    chosen = chosen[data.evenly_spaced(len(chosen), most or len(chosen))]
    pooled = pooled_of(task, task.train, chosen)
    task.net.neck.running_mean.copy_(pooled.mean(0))
    task.net.neck.running_var.copy_(pooled.var(0))


def predict(task, subset):
    """-> logits (n, C) and labels (n,) of whole pictures, those of task.dev or task.report."""
    logits, _ = classifier.predict(task.net.eval(), pooled_of(task, subset, subset.index))
    return logits, subset.labels[subset.index]


def finetune(flags, task, make_run=train.Run):
    """Train for --epochs -> (run, the latest epoch within a standard error of the best on dev).

    With task.stop it is that one, whatever dev says. make_run: what surrounds the loop; apps/folds.py
    has one that writes no files.
    """
    net = task.net
    device = task.device
    C = len(task.classes)
    train_index, labels = task.train.index, task.train.labels
    B, seed = flags.batch_size, flags.seed
    per_epoch = len(train_index) // B
    total = per_epoch * flags.epochs

    linear = task.method == "linear"
    optimizer = classifier.make_optimizer(
        net,
        lr=flags.lr,
        head_lr=flags.head_lr,
        weight_decay=WEIGHT_DECAY[task.method],
        layer_decay=task.keys.get("layer_decay", 1.0),
    )
    # tau log p(character) is added in the loss, and not when a picture is named. So the logits need not
    # learn how frequent a character is, and a rare one is not passed over (Menon et al. 2020,
    # arXiv:2007.07314).
    sizes = task.sizes()
    prior = sizes / len(train_index)
    adjustment = (flags.logit_adjust * prior.log()).to(device)  # (C,)

    best = Best()
    state = {"model": task.trained, "optimizer": optimizer, "best": best}
    # The schedule is that of `total` steps, so a run that stops earlier ends with a rate above 0.
    last = task.stop or flags.epochs
    run = make_run(flags, state, per_epoch * last, per_epoch, device)
    run.resume_or_begin()
    pictures = task.train.split["images"]
    every = torch.arange(len(pictures))
    inputs = pooled_of(task, task.train, every) if linear else data.resident(pictures, device)

    hits = []  # share of each batch that is recognised, since the last row of the log
    for epoch in range(run.step // per_epoch, last):
        net.train()
        unfreeze(net, task.trained.tensors, epoch, flags.unfreeze_every)
        order = draw_order(train_index, labels, flags.balanced, seed, epoch)
        for index, batch in data.batches(inputs, order, B, device, run.step % per_epoch):
            # 1. views
            # All random numbers are drawn on the CPU from these three, so that a GPU and a laptop see
            # the same crops, and a resumed run sees those that it would have seen.
            generator = train.seeded_step(seed, epoch, run.step)
            if not linear:
                patches, ids = draw_views(task, batch, run.step / total, generator)

            # 2. forward
            # With --method linear the encoder ran before the loop: the batch is its pooled tokens.
            if linear:
                pooled = batch  # (B, D), for ifa (B, D, L)
            else:
                with task.autocast():
                    pooled = net.pooled(patches, ids)
            y = data.send(labels[index], device)  # (B,)
            # The encoder has run; this is neck and head, in fp32, because statistics of a batch and a softmax
            # suffer from the 8 bits of bf16, and cost almost nothing. A margin head makes the true class
            # harder by its margin, so it has to know the labels.
            logits = net(pooled, y)  # (B, C)

            # 3. loss
            # It is F.cross_entropy with label_smoothing, written out to show what is averaged.
            target = F.one_hot(y, C) * (1 - SMOOTHING) + SMOOTHING / C  # (B, C)
            loss = -(target * (logits + adjustment).log_softmax(1)).sum(1).mean()

            # 4. update
            loss.backward()
            # A block that is still frozen has no gradient, so AdamW leaves it alone, its decay included.
            learning = [p for p in net.parameters() if p.requires_grad]
            grad_norm = nn.utils.clip_grad_norm_(learning, CLIP)
            # One schedule for all, but each group has its own peak: the head's, or that of its block.
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(run.step, total, WARMUP * total, group["peak"])
            optimizer.step()
            optimizer.zero_grad()
            run.update(loss, grad_norm)
            # ifa reads tokens before the encoder's last norm, whose weights would be named as unused.
            if run.step == 1 and task.head != "ifa":
                train.name_unused(net, optimizer)

            # 5. log, evaluate, save
            # The accuracies stay on the device until a row is due: asking for one waits for the GPU. A
            # margin holds the right character's logit back, so with one they are lower than on dev.
            hits.append((logits.argmax(1) == y).float().mean())
            if run.logs_now:
                train_top1 = 100 * torch.stack(hits).mean().item()
                head_lr = optimizer.param_groups[-1]["lr"]  # the last group is the head's
                run.log_step(head_lr=head_lr, train_top1=train_top1)
                hits = []
            if run.step % per_epoch == 0 and task.dev:
                settle_neck(task, NECK_IN_ALL)
                dev_logits, truth = predict(task, task.dev)
                top1 = 100 * readout.topk(dev_logits, truth, 1)
                # Macro-F1 chooses, because it counts a rare character as much as a frequent one.
                macro_f1 = 100 * metrics.macro_f1(dev_logits.argmax(1), truth)
                run.log(epoch=epoch + 1, dev_top1=top1, dev_macro_f1=macro_f1)
                best.update(macro_f1, epoch + 1, len(truth), task.trained)
            run.save_if_due()
    if task.dev and not task.stop:
        task.trained.load_state_dict(best.weights)
        last = best.epoch
    settle_neck(task)
    return run, last


# ---- how good it is, and the files ---------------------------------------------------------------


@dataclass
class Answers:
    """What the network says of the pictures to report: those of --split, or of all folds (apps/folds.py)."""

    logits: torch.Tensor  # (n, C)
    labels: torch.Tensor  # (n,)
    groups: torch.Tensor  # (n,): pictures of one illustration have one number
    colourless_top1: float  # in percent, of the same pictures in gray
    thumbnails_top1: float  # in percent, of two controls
    histograms_top1: float
    epoch: int = 0  # that folds have chosen
    curve: list = field(default_factory=list)  # further rows for curves.png
    lines: list = field(default_factory=list)  # to be printed


def measure(task):
    """-> the Answers of a network for the pictures of --split."""
    sets = task.train, task.dev, task.report
    return Answers(
        *predict(task, task.report),
        data.groups_of(task.report.split)[task.report.index],
        100 * readout.topk(*predict(task, controls.in_gray(task.report)), 1),
        # How much do colours tell without any network? An accuracy is good only where it beats these two.
        controls.thumbnail_top1(*sets),
        controls.histogram_top1(*sets),
    )


def results(flags, task, run, best_epoch, answers):
    """-> the row of metrics.json, in percent."""
    correct = answers.logits.argmax(1) == answers.labels
    measured = metrics.classification(answers.logits, answers.labels, task.sizes())
    # Faces of one illustration are right or wrong together. So whole illustrations are drawn anew for
    # the interval: with single faces it would be too narrow.
    interval = stats.share_interval(correct, answers.groups)
    row = {"run": task.out.name, "method": task.method, "head": task.head, "seed": flags.seed}
    row |= {"data": flags.data, "evaluated_on": flags.split, "best_epoch": best_epoch}
    row |= {key: 100 * measured[key] for key in ("top1", "top5", "macro_f1")}
    by_size = {key: measured[key] for key in ("head", "mid", "tail")}
    row["by_size"] = {key: 100 * top1 for key, top1 in by_size.items() if top1 is not None}
    row["top1_interval"] = [round(bound, 2) for bound in interval]
    for name in ("colourless_top1", "thumbnails_top1", "histograms_top1"):
        row[name] = getattr(answers, name)
    # Which pictures were right, one bit each: two runs can then be compared picture by picture.
    row |= {"confusion": measured["confusion"], "right": stats.to_bits(correct)}
    count, share = task.parameters_trained()
    row |= {"parameters_trained": count, "share_trained_percent": round(100 * share, 3)}
    row |= train.cost_of_steps(task.out / "log.jsonl", run.batch_size)
    row |= {"seconds": run.seconds(), "config": run.config | task.keys, "command": flags.command}
    return row | {"commit": train.commit(), "machine": train.machine(task.device)}


def write_network(flags, task, folder, notes):
    """head.safetensors, and under it the adapter or the whole encoder, to which the notes belong."""
    encoder, split = task.net.encoder, task.train.split
    digest = flags.fingerprint  # of the encoder as it was before training
    if task.method == "lora":
        write_adapter(encoder, task.keys, digest, folder, flags.encoder)
    # Whatever else is trained in an encoder, and random weights, which no other file has.
    elif flags.from_scratch or any(name.startswith("encoder.") for name in task.trained.tensors):
        save_encoder(encoder, folder / "model.safetensors", notes)
        digest = fingerprint(encoder)
    head = {name: w for name, w in task.trained.tensors.items() if not name.startswith("encoder.")}
    header = {"config": task.net.config, "classes": task.classes, "method": task.method}
    header |= {"base": str(flags.encoder), "fingerprint": digest}
    # New pictures must be cut and resized as those of the training set were.
    header |= {"image_size": encoder.image_size, "packed_size": split["images"].shape[1]}
    header |= {name: split["header"][name] for name in ("crop", "margin")}
    header |= {"data": flags.data, "digest": flags.digest}
    header |= {"split": flags.split, "hold_out": flags.hold_out}
    header["fixed_picture"] = of_fixed_picture(encoder)
    save_safetensors(head, folder / "head.safetensors", header)


def write_adapter(encoder, keys, digest, folder, base):
    """The adapter of an encoder: for peft, too, if it is a plain LoRA; keys are those of --method."""
    notes = {"fingerprint": digest, "image_size": encoder.image_size}
    if is_plain(encoder):
        layers = lora_layers(encoder).items()
        save_adapter({name: (*x.factors(), x.scale) for name, x in layers}, notes, folder, base)
    else:
        keys = {name: keys[name] for name in METHODS["lora"]}
        save_own_adapter(learned(encoder), keys, notes, folder, base)


@torch.no_grad()
def check_readable(flags, task):
    """A UserError if the files of this run would not give its network back, before it trains.

    They are written and read in a temporary folder. So who has changed LoRA, a head or the encoder
    learns before the first step what would be lost.
    """
    check_registered(task.net)
    before = {name: w.clone() for name, w in task.trained.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    # All that is trained is moved a little: B begins at zero, and what it multiplies would not be seen.
    for w in task.trained.tensors.values():
        if w.is_floating_point():
            w += 0.01 * torch.rand(w.shape, generator=generator).to(w.device)
    if task.method == "lora" and (reason := why_not_merged(task.net.encoder)):
        print(f"note: this adapter can be trained, but not be merged later: {reason}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_network(flags, task, Path(folder), {})
            again, _ = load_classifier(folder)
        # Both on one device: on another, products are rounded in another way.
        ours, theirs = answer(task.net.eval()), answer(again.to(task.device))
        same = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
        reason = "its answers would differ"
        # What is not trained, such as random matrices, may be drawn anew, and the answers tell too little
        # of it. (A LoRA of several chunks comes back from peft's file as one, of another shape.)
        kept = again.state_dict()
        for name, w in task.net.state_dict().items():
            x, y = kept.get(name, w).float(), w.float()
            if x.shape == y.shape and not torch.allclose(x, y, rtol=1e-3, atol=1e-3):
                same, reason = False, f"it would have another {name}"
                break
    except (UserError, TypeError, ValueError, RuntimeError) as problem:
        same, reason = False, one_line(problem)
    task.trained.load_state_dict(before)
    if not same:
        raise UserError(
            f"this network could not be read back from its files: {reason}; what is learned has to be "
            "a Parameter of the encoder, LoRA, neck or head, and arguments have to be in config; what is "
            "random and stays so has a generator with a seed of its own"
        )


def answer(net):
    """The logits (1, C) of a network in eval mode for a fixed picture."""
    view = fixed_view(net.encoder.image_size).to(net.encoder.cls_token.device)
    return net(net.pooled(*net.encoder.all_patches(view))).cpu()


def draw_curves(path, rows, best, title):
    """Rows of log.jsonl -> the loss; Top-1 and macro-F1 on dev, by epoch."""
    from common import plots  # matplotlib takes half a second to load

    with plots.panels(path, title, 1, 2, (8.4, 3.2)) as (left, right):
        plots.plot_rows(left, rows, "epoch", "loss", color=plots.BLUE)
        left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
        plots.plot_rows(right, rows, "epoch", "dev_top1", color=plots.BLUE, label="Top-1")
        plots.plot_rows(right, rows, "epoch", "dev_macro_f1", color=plots.ORANGE, label="macro-F1")
        right.axvline(best, color=plots.INK, ls=":", label=f"kept: epoch {best}")
        right.set(title="Dev", xlabel="epoch", ylabel="%", ylim=(0, 100))
        right.legend(loc="lower left")


def draw_confusion(path, table, names, title):
    """Counts (C, C), rows the true class, columns the predicted one: in percent of each row."""
    from matplotlib.colors import PowerNorm

    from common import plots

    table = torch.tensor(table).double()
    percents = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    with plots.panels(path, title, 1, 1, (7.2, 6.4)) as axis:
        # The square root of a share decides its colour, because rare mistakes should be seen.
        image = axis.imshow(percents.numpy(), norm=PowerNorm(0.5, 0, 100))
        axis.figure.colorbar(image, label="% of the true class")
        axis.set(xlabel="predicted class", ylabel="true class")
        if len(names) <= 50:
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axis.set_yticks(range(len(names)), names, fontsize=6)


@torch.no_grad()
def write_results(flags, task, run, best_epoch, answers):
    """All files but state.pt. A network that is there already stays as it is."""
    out = task.out
    suffix = split_suffix(flags.split)
    row = results(flags, task, run, best_epoch, answers)
    if not any(out.glob("metrics*.json")):
        write_network(flags, task, task.out, {"step": run.step, "run": run.config})
    # Before it come all other files that matter: where it is, the run is finished.
    save_json(row, out / f"metrics{suffix}.json")
    with drawing("curves.png or confusion.png"):
        title = f"{out.name}: Top-1 {row['top1']:.1f} % on {flags.split}"
        rows = train.read_log(out / "log.jsonl") + answers.curve
        draw_curves(out / "curves.png", rows, best_epoch, title)
        draw_confusion(out / f"confusion{suffix}.png", row["confusion"], task.classes, title)
    low, high = row["top1_interval"]
    print(
        f"{flags.split:<9}Top-1 {row['top1']:.2f} % (95 % interval {low:.1f} to {high:.1f}), "
        f"macro-F1 {row['macro_f1']:.2f} %; the same pictures in gray: Top-1 "
        f"{row['colourless_top1']:.1f} %\n"
        f"controls Top-1 by thumbnails {row['thumbnails_top1']:.1f} %, by histograms of colours "
        f"{row['histograms_top1']:.1f} %"
    )
    for line in answers.lines:
        print(line)
    print(
        f"wrote    {out}/ after {row['seconds']:.0f} s of training; the weights are those of epoch {best_epoch}\n"
        f"next: {NEXT} {quoted(out)} PICTURE"
    )


def main():
    flags = read_flags()
    done = Path(flags.out) / f"metrics{split_suffix(flags.split)}.json"
    if flags.resume and done.exists():
        more = "" if flags.split in (BY_FOLDS, "test") else "; --split test measures it on test"
        return print(f"run      {flags.out} is finished: {done}{more}")
    device, autocast, machine = train.open_machine(flags)
    print(machine)
    task = open_task(flags, device, autocast)
    check_readable(flags, task)
    describe(flags, task)
    answers = None
    if flags.split == BY_FOLDS:
        from apps import folds  # runs up: it repeats the training of this script, part by part

        answers = folds.cross_validate(flags, task)
        task.stop = answers.epoch
    run, epoch = finetune(flags, task)
    write_results(flags, task, run, epoch, answers or measure(task))


if __name__ == "__main__":
    cli(main)
