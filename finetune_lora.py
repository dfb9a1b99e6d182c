"""Stage 4: fine-tune an encoder to recognise characters: a head (linear), LoRA (lora), or all weights (full).

    python finetune_lora.py runs/NAME                                LoRA of rank 8, into runs/NAME-lora
    python finetune_lora.py runs/NAME --method lora:r=4              into runs/NAME-lora-r-4
    python finetune_lora.py --resume runs/NAME-lora                  continues a run
    python finetune_lora.py --resume runs/NAME-lora --split test     measures it on another split

Reads:  an encoder (runs/NAME, or a checkpoint file that common/formats.py knows), datasets/NAME
Writes: runs/NAME-METHOD/ state.pt, log.jsonl, metrics.json (of another split: metrics-SPLIT.json),
        curves.png, confusion.png, head.safetensors (all that was trained beside the encoder's own
        weights: neck, head, LoRA); for full, and with --from-scratch, model.safetensors.
        python -m apps.export runs/NAME-lora --to peft writes peft's files

The kept epoch is chosen on dev, or on a held-out tenth of train, and results are those of --split.

The tokens of a picture are pooled to one vector. The neck, a batch norm, makes the embedding of it, by
which pictures are compared, and the head a logit for each character (common/classifier.py).

    B batch   N patches   K of them shown   s side of a view   D width   C characters   P numbers of a patch
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import classifier, metrics, readout, train
from common.checkpoints import (
    fingerprint,
    flags_of,
    load_encoder,
    model_file,
    place_of,
    save_network,
)
from common.features import Subset, name_of, open_subsets, split_suffix, untrained_like
from common.groups import groups_of
from common.train import (
    Parser,
    UserError,
    at_least,
    between,
    cli,
    command,
    parse_keys,
    quoted,
    refuse_useless,
    run_name,
    save_json,
    save_safetensors,
    set_defaults,
)
from kernels.patches import masked_patch_gather

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


# ---- the flags -----------------------------------------------------------------------------------


def shares(text):
    """An argparse type: "0.5" -> (0.5, 0.5), "0.25:0.75" -> (0.25, 0.75), first and last of the run."""
    first, _, last = text.partition(":")
    return tuple(map(between(0.01, 1), (first, last or first)))


shares.__name__ = "share"  # what argparse calls a value that is none


def parse_flags(words=None):
    """The flags: for a new run those of its method's recipe, for a resumed one the saved ones.

    words: of a command line, else this one's. `settle` gives those their values that depend on the data.
    """
    parser = Parser(__doc__)
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help="runs/NAME, or a checkpoint of MAE, timm, HF")
    add("--data", metavar="DIR", help="labelled set (default: the encoder's, else datasets/toon)")
    add("--out", metavar="RUN", help="run folder (default: runs/ENCODER-METHOD)")
    add("--method", default="lora", help="linear, lora:r=8,alpha=16 or full:layer_decay=0.9")
    add("--head", default="linear", help=", ".join(classifier.HEADS))
    pools = classifier.HEAD_POOLS
    add("--pool", default="mean", choices=pools, help="mean patch token, or CLS token")
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
    train.add_flags(add)
    flags = parser.parse_args(words)
    train.take_saved_flags(flags, "split")
    if flags.resume:
        return flags
    method, _ = parse_method(flags)
    parse_head(flags)  # now, and not when pictures are packed
    if method == "lora" and flags.from_scratch:
        raise UserError("--method lora needs a trained encoder; choose full")
    refuse_useless(flags.given & NOT_READ[method], f"with --method {method}")
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


def parse_method(flags):
    """--method -> linear, lora or full, and its keys, such as r."""
    keys = METHODS
    # Random weights have nothing in their lower blocks that is worth keeping: no layer decay.
    if flags.from_scratch:
        keys = METHODS | {"full": {"layer_decay": 1.0}}
    return parse_keys(flags.method, keys, "--method")


def parse_head(flags):
    """--head -> its name, and its keys, such as margin."""
    return parse_keys(flags.head, classifier.HEADS, "--head")


def settle(flags):
    """Give every flag its value: after this, none changes.

    -> the encoder, the Subsets to learn from, to choose by and to report, and the learned classes.
    """
    encoder = open_encoder(flags)
    # Where there is no dev, a tenth of train is held out (common/features.py).
    sets, classes = open_subsets(flags.data, flags.split, flags.hold_out)
    settle_steps(flags, len(sets[0].index))
    return encoder, sets, classes


def open_encoder(flags):
    """The encoder with which training begins; settles --data, which is packed first if need be."""
    encoder = load_encoder(flags.encoder, flags.image_size)
    if flags.from_scratch:
        encoder = untrained_like(encoder, flags.seed)
    folder = flags.data or flags_of(flags.encoder).get("data", "datasets/toon")
    flags.data = str(data.open_or_pack(folder, encoder.image_size))
    seen = fingerprint(encoder), data.digest(flags.data)
    # In a set that was packed anew, pictures that the run has learned may be among those that judge it.
    # And an adapter of one encoder is nothing beside the weights of another.
    if flags.resume and seen != (flags.fingerprint, flags.digest):
        changed = f"{flags.encoder} or {flags.data} has changed since {flags.out} was begun"
        raise UserError(f"{changed}; put it back, or train again")
    flags.fingerprint, flags.digest = seen
    return encoder


def settle_steps(flags, pictures):
    """Settle --batch-size and --epochs by the number of pictures that teach."""
    flags.batch_size = min(flags.batch_size, pictures)
    # Thirty epochs of 35 pictures are thirty steps, in which a new head learns little.
    least = math.ceil(LEAST_STEPS / (pictures // flags.batch_size))
    set_defaults(flags, epochs=max(flags.epochs, least))


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
        # r. For large ranks write alpha / sqrt(r) here, which is rsLoRA (Kalajdzievski 2023,
        # arXiv:2312.03732), and give one alpha for all ranks, such as lora:r=32,alpha=16.
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
        A, B = self.factors()
        return self.base.weight + self.scale * (B @ A)

    def forward(self, x):
        A, B = self.factors()
        # First A x, which is only chunks * r numbers long: B A would be as large as the weight itself.
        return self.base(x) + self.scale * F.linear(F.linear(x, A), B)


def lora_layers(encoder):
    """{name: LoRA layer} of an encoder."""
    return {name: m for name, m in encoder.named_modules() if isinstance(m, LoRA)}


def add_lora(encoder, r=8, alpha=0.0):
    """Freeze the encoder and put LoRA on LAYERS of every block. alpha is 2r if 0.

    The arguments are keys of --method lora. What is added here to be trained is saved and read back.
    """
    dim = encoder.config["dim"]
    if not 1 <= r <= dim:
        raise UserError(f"--method lora:r={r}: the rank must lie in 1 to {dim}")
    encoder.requires_grad_(False)
    for block in encoder.blocks:
        for name, chunks in LAYERS.items():
            layer = block.get_submodule(name)
            block.set_submodule(name, LoRA(layer, r, alpha or 2 * r, chunks))


@torch.no_grad()
def merge_lora(encoder):
    """Put plain layers in place of LoRA: W + alpha/r B A."""
    # The product has the shape of the weight, so a merged encoder is as fast as a plain one. But the
    # product can't be subtracted again exactly, because the sum is rounded: training keeps them apart.
    for name, lora in lora_layers(encoder).items():
        lora.base.weight.copy_(lora.weight())
        encoder.set_submodule(name, lora.base)


def load_classifier(folder):
    """runs/NAME of this stage -> (Classifier in eval mode, header of its head file)."""
    folder = Path(folder)
    weights, header = classifier.read_head(folder)
    encoder = load_base(folder, header)
    if header["method"] == "lora":
        add_lora(encoder, **header["keys"])
    config = {name: value for name, value in header["config"].items() if name != "dim"}
    net = classifier.Classifier(encoder, len(header["classes"]), **config)
    state = {f"encoder.{name}": w for name, w in encoder.state_dict().items()} | weights
    net.load_state_dict(state)
    return net.eval(), header


def load_base(folder, header):
    """The encoder under a head: the run's own, if it trained all weights or began with random ones."""
    if (folder / "model.safetensors").exists():
        return load_encoder(folder, header["image_size"])
    place = place_of(header["base"], folder)
    if not model_file(place).exists():
        lost = f"the encoder {header['base']}, which is missing"
        raise UserError(f"{folder} was trained on {lost}; copy it to where {folder} lies")
    encoder = load_encoder(place, header["image_size"])
    # A head is nothing on other weights, and a run may have been made anew under its old name.
    if fingerprint(encoder) != header["fingerprint"]:
        raise UserError(f"{place} is not the encoder that {folder} was trained on; restore it")
    return encoder


# ---- training: views -----------------------------------------------------------------------------


def cutout(view, share, generator):
    """A gray square of this share of the area on each view (DeVries and Taylor 2017, arXiv:1708.04552).

    In the paper, a part of the square may lie outside, so that some pictures lose little. Here none does.
    """
    B, s = view.shape[:2]
    side = round(s * math.sqrt(share))
    start = torch.randint(s - side + 1, (2, B, 1), generator=generator)  # its top and left
    pixel = torch.arange(s)
    rows, columns = (pixel >= start) & (pixel < start + side)  # (B, s) each
    square = rows[:, :, None] & columns[:, None]
    return view.masked_fill(data.send(square[..., None], view.device), GRAY)


def augmented(images, s, colourless, generator):
    """images u8 (B, ., ., 3) -> views u8 (B, s, s, 3): crop, flip, colour, cutout; a share in gray."""
    view = data.view_images(images, *data.draw_boxes(len(images), generator, MIN_CROP), s)
    # The hue stays, because the colours of hair and eyes tell who it is. But who has learned by colour
    # alone fails on a sketch, so a share of the views has none (docs/recognise.md).
    draws = torch.rand(4, len(view), generator=generator)  # four rows, as published runs drew them
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
    ids = data.send(noise, view.device).argsort(dim=1, stable=True)[:, :K].contiguous()
    return masked_patch_gather(view, ids, encoder.patch_size), ids


def draw_views(flags, encoder, images, t, generator):
    """images u8 (B, ., ., 3) at t of the run, in [0, 1] -> patches (B, K, P) and their places (B, K)."""
    view = augmented(images, encoder.image_size, flags.colourless, generator)
    first, last = flags.keep
    share = first + (last - first) * t
    # It rises in steps of 1/16, because oneDNN keeps memory for every new shape.
    if first != last:
        share = round(16 * share) / 16
    return drop_patches(view, encoder, share, generator)


# ---- training: what is trained, and on what ------------------------------------------------------


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
        if macro_f1 >= self.macro_f1 - metrics.standard_error(self.macro_f1, pictures):
            self.epoch = epoch
            self.weights = {name: w.cpu().clone() for name, w in trained.state_dict().items()}

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, saved):
        vars(self).update(saved)


@dataclass
class Task:
    """A network, and the pictures that teach it, choose its epoch and judge it."""

    net: classifier.Classifier
    trained: TrainedWeights
    classes: list  # names of the characters that are learned
    train: Subset
    dev: Subset | None  # None where a number of epochs is given
    report: Subset | None  # None where others judge it
    device: torch.device
    autocast: partial
    linear: bool  # does the encoder stay as it is? Then each epoch reads the same features.
    features: dict = field(default_factory=dict)  # these are kept, {name of a split: (n, D)}

    def sizes(self):
        """Training pictures of each class, (C,)."""
        return torch.bincount(self.train.labels[self.train.index])

    def parameters_trained(self):
        """-> how many, and their share of all."""
        count = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        return count, count / sum(p.numel() for p in self.net.parameters())


def build_task(flags, encoder, sets, classes, device, autocast):
    """Put a new head on the encoder, and LoRA into it where --method says so -> the Task.

    sets: to learn from, to choose by and to report, as of `settle`.
    """
    method, keys = parse_method(flags)
    head, head_keys = parse_head(flags)
    torch.manual_seed(flags.seed)
    encoder.requires_grad_(method == "full")
    if method == "lora":
        add_lora(encoder, **keys)
    net = classifier.Classifier(encoder, len(classes), head, flags.pool, **head_keys).to(device)
    # What has a gradient now is trained, saved and read back, whatever the method is called.
    return Task(net, TrainedWeights(net), classes, *sets, device, autocast, method == "linear")


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
    norm, then the last block, and one more block every `every` epochs. trained: names of weights.
    """
    depth = len(net.encoder.blocks)
    # While the head is still random, its gradients mean little, and could spoil good features (Kumar et
    # al. 2022, arXiv:2202.10054). So blocks can wait until it has learned something.
    for name, p in net.named_parameters():
        if name in trained:
            p.requires_grad_(classifier.level_of(name, depth) > depth - epoch // every)


def pooled_or_cached(task, subset, index):
    """The neck's input for whole pictures, `index` of a set: fp32 on the CPU, (n, D). Leaves the net in eval mode."""
    net = task.net.eval()
    if not task.linear:
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
    chosen = index[torch.cat(data.evenly_of_each(task.train.labels[index], NECK_OF_CLASS))]
    chosen = chosen[data.evenly_spaced(len(chosen), most or len(chosen))]
    pooled = pooled_or_cached(task, task.train, chosen)
    task.net.neck.running_mean.copy_(pooled.mean(0))
    task.net.neck.running_var.copy_(pooled.var(0))


def predict(task, subset):
    """-> logits (n, C) and labels (n,) of whole pictures, those of a Subset."""
    logits, _ = classifier.predict(task.net.eval(), pooled_or_cached(task, subset, subset.index))
    return logits, subset.labels[subset.index]


def finetune(flags, task, epochs=None):
    """Train -> (run, the epoch whose weights are kept): the latest within a standard error of the best on dev.

    epochs: end after so many of the --epochs, and keep the last one, whatever dev says.
    """
    net, device = task.net, task.device
    method, keys = parse_method(flags)
    C = len(task.classes)
    train_index, labels = task.train.index, task.train.labels
    B, seed = flags.batch_size, flags.seed
    per_epoch = len(train_index) // B
    # The schedule is that of `total` steps, so a run that ends earlier ends with a rate above 0.
    total = per_epoch * flags.epochs
    last = epochs or flags.epochs

    optimizer = classifier.make_optimizer(
        net,
        lr=flags.lr,
        head_lr=flags.head_lr,
        weight_decay=WEIGHT_DECAY[method],
        layer_decay=keys.get("layer_decay", 1.0),
    )
    # tau log p(character) is added in the loss, and not when a picture is named. So the logits need not
    # learn how frequent a character is, and a rare one is not passed over (Menon et al. 2020,
    # arXiv:2007.07314).
    prior = task.sizes() / len(train_index)
    adjustment = (flags.logit_adjust * prior.log()).to(device)  # (C,)

    best = Best()
    state = {"model": task.trained, "optimizer": optimizer, "best": best}
    run = train.Run(flags, state, per_epoch * last, per_epoch, device)
    run.resume_or_begin()
    pictures = task.train.split["images"]
    every = torch.arange(len(pictures))
    inputs = (
        pooled_or_cached(task, task.train, every)
        if task.linear
        else data.resident(pictures, device)
    )

    hits = []  # share of each batch that is recognised, since the last row of the log
    for epoch in range(run.step // per_epoch, last):
        net.train()
        if flags.unfreeze_every:
            unfreeze(net, task.trained.tensors, epoch, flags.unfreeze_every)
        order = draw_order(train_index, labels, flags.balanced, seed, epoch)
        for index, batch in data.batches(inputs, order, B, device, run.step % per_epoch):
            # 1. views
            # All random numbers are drawn on the CPU from these three, so that a GPU and a laptop see
            # the same crops, and a resumed run sees those that it would have seen.
            generator = train.seeded(seed, epoch, run.step)
            if not task.linear:
                patches, ids = draw_views(flags, net.encoder, batch, run.step / total, generator)

            # 2. forward
            # With --method linear the encoder ran before the loop: the batch is its pooled tokens.
            if task.linear:
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
            rate = train.lr_at(run.step, total, WARMUP * total, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
            run.update(loss, grad_norm)

            # 5. log, evaluate, save
            # The accuracies stay on the device until a row is due: asking for one waits for the GPU. A
            # margin holds the right character's logit back, so with one they are lower than on dev.
            hits.append((logits.argmax(1) == y).float().mean())
            if run.logs_now:
                train_top1 = 100 * torch.stack(hits).mean().item()
                run.log_step(head_lr=rate * flags.head_lr, train_top1=train_top1)
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
    # Later epochs may have been worse on dev: the weights of the kept one come back.
    if task.dev and not epochs:
        task.trained.load_state_dict(best.weights)
        last = best.epoch
    settle_neck(task)
    return run, last


# ---- how good it is, and the files ---------------------------------------------------------------


def scores(logits, labels, groups, sizes):
    """-> numbers of metrics.json, in percent; logits (n, C), labels (n,), groups (n,), sizes (C,) of train.

    groups: pictures of one illustration have one number.
    """
    correct = logits.argmax(1) == labels
    measured = metrics.classification(logits, labels, sizes)
    row = {key: 100 * measured[key] for key in ("top1", "top5", "macro_f1")}
    by_size = {key: measured[key] for key in ("head", "mid", "tail")}
    row["by_size"] = {key: 100 * top1 for key, top1 in by_size.items() if top1 is not None}
    # Faces of one illustration are right or wrong together. So whole illustrations are drawn anew for
    # the interval: with single faces it would be too narrow.
    interval = metrics.share_interval(correct, groups)
    row["top1_interval"] = [round(bound, 2) for bound in interval]
    # Which pictures were right, one bit each: two runs can then be compared picture by picture.
    return row | {"confusion": measured["confusion"], "right": metrics.to_bits(correct)}


def measure(task):
    """`scores` of the pictures of --split, and of their controls."""
    logits, labels = predict(task, task.report)
    row = scores(logits, labels, groups_of(task.report.split)[task.report.index], task.sizes())
    gray, _ = predict(task, metrics.in_gray(task.report))
    row["colourless_top1"] = 100 * readout.topk(gray, labels, 1)
    # How much do colours tell without any network? An accuracy is good only where it beats these two.
    sets = task.train, task.dev, task.report
    row["thumbnails_top1"] = metrics.thumbnail_top1(*sets)
    row["histograms_top1"] = metrics.histogram_top1(*sets)
    return row


def write_network(flags, task, run):
    """head.safetensors: all that was trained. Of an encoder without a file of its own, model.safetensors."""
    encoder, header = task.net.encoder, task.train.split["header"]
    method, keys = parse_method(flags)
    folder = Path(flags.out)
    trained = task.trained.tensors
    base = flags.fingerprint
    if flags.from_scratch or method == "full":
        notes = {"step": run.step, "run": run.config}
        save_network(encoder, folder / "model.safetensors", notes, "encoder.")
        trained = {name: w for name, w in trained.items() if not name.startswith("encoder.")}
        base = fingerprint(encoder)
    notes = {"format": train.FORMAT, "config": task.net.config, "classes": task.classes}
    notes |= {"method": method, "keys": keys}
    notes |= {"base": str(flags.encoder), "fingerprint": base, "image_size": encoder.image_size}
    # New pictures must be cut and resized as those of the training set were.
    notes |= {name: header[name] for name in ("crop", "margin")}
    notes["packed_size"] = task.train.split["images"].shape[1]
    notes |= {name: getattr(flags, name) for name in ("data", "digest", "split", "hold_out")}
    save_safetensors(trained, folder / "head.safetensors", notes)


def write_results(flags, task, run, epoch, row):
    """metrics.json, of a row of `measure`, and the pictures -> the row; epoch: the one that is kept."""
    from common import plots  # matplotlib takes half a second to load

    out, suffix = Path(flags.out), split_suffix(flags.split)
    method, keys = parse_method(flags)
    head, head_keys = parse_head(flags)
    count, share = task.parameters_trained()
    about = {"run": out.name, "method": method, "head": head, "seed": flags.seed}
    about |= {"data": flags.data, "evaluated_on": flags.split, "best_epoch": epoch}
    row = about | row | {"parameters_trained": count}
    row["share_trained_percent"] = round(100 * share, 3)
    row |= train.cost_of_steps(run.log_path, run.batch_size)
    row |= {"seconds": run.seconds(), "config": run.config | keys | head_keys}
    row |= {"command": flags.command, "commit": run.commit, "machine": train.machine(task.device)}
    save_json(row, out / f"metrics{suffix}.json")  # where it is, the run is finished
    title = f"{out.name}: Top-1 {row['top1']:.1f} % on {flags.split}"
    # Without dev, other networks have measured it, which lack a part of its pictures each.
    held = "Dev" if task.dev else f"Held-out pictures of the {flags.split}"
    plots.tuning_curves(out / "curves.png", train.read_log(run.log_path), epoch, title, held)
    plots.confusion(out / f"confusion{suffix}.png", row["confusion"], task.classes, title)
    return row


def tell(flags, row):
    """Print a row of metrics.json, and what comes next."""
    low, high = row["top1_interval"]
    print(
        f"{flags.split:<9}Top-1 {row['top1']:.2f} % (95 % interval {low:.1f} to {high:.1f}), "
        f"macro-F1 {row['macro_f1']:.2f} %; the same pictures in gray: Top-1 "
        f"{row['colourless_top1']:.1f} %\n"
        f"controls Top-1 by thumbnails {row['thumbnails_top1']:.1f} %, by histograms of colours "
        f"{row['histograms_top1']:.1f} %\n"
        f"wrote    {flags.out}/ after {row['seconds']:.0f} s of training; the weights are those of epoch "
        f"{row['best_epoch']}\n"
        f"next: {NEXT} {quoted(flags.out)} PICTURE"
    )


def main():
    flags = parse_flags()
    done = Path(flags.out) / f"metrics{split_suffix(flags.split)}.json"
    if flags.resume and done.exists():
        more = "" if flags.split == "test" else "; --split test measures it on test"
        return print(f"run      {flags.out} is finished: {done}{more}")
    device, autocast, machine = train.open_machine(flags)
    print(machine)
    encoder, sets, classes = settle(flags)
    task = build_task(flags, encoder, sets, classes, device, autocast)

    sizes = task.sizes()
    count, share = task.parameters_trained()
    print(
        f"data     {flags.data}: {len(classes)} of {len(task.train.split['header']['classes'])} characters, "
        f"with {sizes.min()} to {sizes.max()} training pictures; {len(task.dev.index)} dev pictures "
        f"choose the epoch\n"
        f"run      {flags.out}: {flags.method} of {flags.encoder}, {flags.head} head, {count:,} "
        f"parameters trained ({share:.2%})"
    )
    run, epoch = finetune(flags, task)
    # A network that is there already stays as it is: --resume with another --split only measures it.
    if not any(run.out.glob("metrics*.json")):
        write_network(flags, task, run)
    tell(flags, write_results(flags, task, run, epoch, measure(task)))


if __name__ == "__main__":
    cli(main)
