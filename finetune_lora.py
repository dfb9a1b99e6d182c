"""Stage 4: fine-tune an encoder to recognise characters: a head (linear), LoRA (lora), or all weights (full).

    python finetune_lora.py runs/NAME --method lora:r=8
    python finetune_lora.py --resume runs/NAME-lora                  continues a run
    python finetune_lora.py --resume runs/NAME-lora --split test     measures it on another split

Reads:  an encoder (runs/NAME, or a checkpoint file that apps/formats.py knows), datasets/NAME
Writes: runs/NAME-METHOD/ state.pt, log.jsonl, metrics.json (of another split: metrics-SPLIT.json),
        curves.png, confusion.png, head.safetensors; for lora adapter_model.safetensors and
        adapter_config.json, for full model.safetensors

The kept epoch is chosen on dev, or on a held-out tenth of train. Results are those of --split.

    B batch   N patches   K of them shown   S side of a view   D width   C characters
"""

import math
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import data
import mask as masking
from common import classifier, controls, metrics, readout, stats, train
from common.checkpoints import flags_of, load_encoder, load_exactly
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
from common.features import name_of, open_rows, some_characters, split_suffix, untrained_like
from common.io import UserError, reading, save_json, save_safetensors
from common.lora import fingerprint, read_adapter, save_adapter, save_encoder
from kernels.gather import masked_patch_gather

# The recipe. Learning rates were chosen on dev of faces20 in short runs (results/TRIED.md).
METHODS = {
    "linear": {},
    "lora": {"r": 8, "alpha": 0.0},  # alpha 0 is 2r
    "full": {"layer_decay": 0.9},  # a block's learning rate over that of the block above
}
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
WEIGHT_DECAY = {"linear": 1e-4, "lora": 1e-4, "full": 0.05}
WARMUP = 0.1  # share of the run in which the learning rate rises
CLIP = 1.0  # largest norm of the gradient
MIN_CROP = 0.5  # smallest share of an image in a crop; "linear" has no augmentation
COLOUR = 0.2  # brightness, contrast and saturation are multiplied by 1 +- this
CUTOUT, GRAY = 0.1, 128  # share of a view under a square of this gray (of stress tests, too)
SMOOTHING = 0.1  # share of the target that is divided equally among all classes
NECK_OF_CLASS = 20  # pictures of each character give the neck its statistics at the end
NECK_IN_ALL = 256  # at most so many of these pictures do so after an epoch


def shares(text):
    """An argparse type: "0.5" -> (0.5, 0.5), "0.25:0.75" -> (0.25, 0.75), first and last of the run."""
    first, _, last = text.partition(":")
    return tuple(map(between(0.01, 1), (first, last or first)))


def read_flags():
    """The flags: for a new run those of its method's recipe, for a resumed one the saved ones."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help="runs/NAME, or a checkpoint of MAE, timm, HF")
    add("--data", metavar="DIR", help="labelled set (default: the encoder's, else datasets/toon)")
    add("--out", metavar="RUN", help="run folder (default: runs/ENCODER-METHOD)")
    add("--method", default="lora", help="linear, lora:r=8,alpha=16 or full:layer_decay=0.9")
    add("--head", default="linear", help=", ".join(classifier.HEADS))
    add("--pool", default="mean", choices=classifier.POOLS, help="mean patch token, or CLS token")
    add("--from-scratch", action="store_true", help="random weights in the encoder: the control")
    add("--unfreeze-every", type=at_least(0), default=0, metavar="EPOCHS", help="epochs per block")
    add("--hold-out", type=some_characters, default=0, metavar="N", help="leave out N, or 1/3")
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
    flags = parser.parse_args()
    train.take_saved_flags(flags, "split")
    if flags.resume:
        return flags
    method, _ = parse_keys(flags.method, METHODS, "--method")
    refuse_useless(flags.given & NOT_READ[method], f"with --method {method}")
    refuse_useless(flags.given & {"pool"} if flags.head == "ifa" else (), "with --head ifa")
    set_defaults(flags, **RECIPE[method])
    in_name = {"head", "from_scratch", "seed"}  # of the flags that were given
    name = run_name(flags, name_of(flags.encoder), flags.method, leave_out=flags.given - in_name)
    set_defaults(flags, out=f"runs/{name}", command=command())
    return flags


# ---- LoRA: low-rank adapters ---------------------------------------------------------------------

# Layers that get LoRA, here and in apps/detect.py, and how many matrices each stacks: q, k and v are 3.
LAYERS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}


class LoRA(nn.Module):
    """A frozen Linear plus a trained low-rank product: W x + b + alpha/r B A x (Hu et al. 2021, eq. 3).

    Each of the equal `chunks` of the output has its own A and B. B starts at zero.
    """

    def __init__(self, base, r, alpha, chunks=1):
        super().__init__()
        self.base = base
        self.scale = alpha / r
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(chunks, r, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(chunks, base.out_features // chunks, r, device=device))
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def factors(self):
        """-> A (chunks*r, in) and B (out, chunks*r): the As stacked, the Bs on a diagonal."""
        return self.A.flatten(0, 1), torch.block_diag(*self.B)

    def forward(self, x):
        A, B = self.factors()
        return self.base(x) + self.scale * F.linear(F.linear(x, A), B)


def lora_layers(encoder):
    """{name: (A (r, in), B (out, r), scale)}, all that is saved; the output gains scale * B A x."""
    modules = {k: m for k, m in encoder.named_modules() if isinstance(m, LoRA)}
    return {name: (*lora.factors(), lora.scale) for name, lora in modules.items()}


def add_lora(encoder, r=8, alpha=None):
    """Freeze the encoder and put LoRA on LAYERS of every block. alpha is 2r if None."""
    dim = encoder.cls_token.shape[2]
    if not 1 <= r <= dim:
        raise UserError(f"--method lora:r={r}: the rank must lie in 1 to {dim}")
    encoder.requires_grad_(False)
    for block in encoder.blocks:
        for name, chunks in LAYERS.items():
            block.set_submodule(name, LoRA(block.get_submodule(name), r, alpha or 2 * r, chunks))


@torch.no_grad()
def merge_lora(encoder):
    """Put plain layers in place of LoRA: W + alpha/r B A."""
    for name, (A, B, scale) in lora_layers(encoder).items():
        base = encoder.get_submodule(name).base
        base.weight += scale * (B @ A)
        encoder.set_submodule(name, base)


@torch.no_grad()
def load_lora(encoder, folder):
    """Put the adapter of a folder, ours or one that peft made, on a plain encoder; freeze both."""
    for name, (A, B, scale) in read_adapter(folder, encoder).items():
        lora = LoRA(encoder.get_submodule(name), len(A), 1.0)
        lora.A[0], lora.B[0] = A, B
        lora.scale = scale
        encoder.set_submodule(name, lora)
    encoder.requires_grad_(False)


def load_classifier(folder):
    """runs/NAME of this stage -> (Classifier in eval mode, header of its head file)."""
    folder = Path(folder)
    weights, header = classifier.read_head(folder)
    base = folder if (folder / "model.safetensors").exists() else Path(header["base"])
    encoder = load_encoder(base, header["image_size"])
    if fingerprint(encoder) != header["fingerprint"]:
        raise UserError(f"{base} is not the encoder that {folder} was trained on; restore it")
    if header["method"] == "lora":
        load_lora(encoder, folder)
    config = {k: value for k, value in header["config"].items() if k != "dim"}
    with reading(folder / "head.safetensors", "head", classifier.REMEDY):
        net = classifier.Classifier(encoder, len(header["classes"]), **config)
    whole = {f"encoder.{k}": w for k, w in encoder.state_dict().items()} | weights
    load_exactly(net, whole, folder / "head.safetensors")
    return net.eval(), header


# ---- training: views, network, loop --------------------------------------------------------------


def cutout(view, share, generator):
    """A gray square of this share of the area on each view (DeVries and Taylor 2017, arXiv:1708.04552)."""
    B, S = view.shape[:2]
    side = round(S * math.sqrt(share))
    start = torch.randint(S - side + 1, (2, B, 1), generator=generator)  # its top and left
    at = torch.arange(S)
    rows, columns = (at >= start) & (at < start + side)  # (B, S) each
    square = rows[:, :, None] & columns[:, None]
    return view.masked_fill(data.send(square[..., None], view.device), GRAY)


def augmented(images, S, colourless, generator):
    """images u8 (B, ., ., 3) -> views u8 (B, S, S, 3): crop, flip, colour, cutout; a share in gray."""
    view = data.view_images(images, *data.draw_boxes(len(images), generator, MIN_CROP), S)
    draws = torch.rand(4, len(view), generator=generator)
    view = data.jitter_colour(view, draws.T, COLOUR, colourless)
    return cutout(view, CUTOUT, generator)


def drop_patches(view, encoder, keep, generator):
    """view u8 -> random patches (B, K, P), their places (B, K): PatchDropout, arXiv:2208.07220."""
    N = encoder.side**2
    K = max(1, round(keep * N))
    if K == N:
        return encoder.all_patches(view)
    noise = torch.rand(len(view), N, generator=generator)
    ids, _ = masking.sample(data.send(noise, view.device), K)
    return masked_patch_gather(view, ids, encoder.patch_size), ids


def pooled_views(task, images, t, generator):
    """images u8 (B, ., ., 3) at t of the run, in [0, 1] -> (B, D) before the neck, (B, D, L) for ifa."""
    view = augmented(images, task.net.encoder.image_size, task.colourless, generator)
    first, last = task.keep
    share = first + (last - first) * t
    if first != last:  # in steps of 1/16: oneDNN keeps memory for every new shape
        share = round(16 * share) / 16
    patches, ids = drop_patches(view, task.net.encoder, share, generator)
    with task.autocast():
        return task.net.pooled(patches, ids)


class TrainedWeights:
    """The tensors of a network that are trained, as a part of state.pt: loading copies into them."""

    def __init__(self, net):
        self.tensors = {}  # with the neck's statistics, which are no parameters
        for name, w in net.state_dict(keep_vars=True).items():
            if w.requires_grad or not name.startswith("encoder."):
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
    train: SimpleNamespace  # sets of common.features.open_rows
    dev: SimpleNamespace
    report: SimpleNamespace
    keep: tuple  # share of the patches that is shown, in the first and in the last step
    colourless: float  # share of the views in gray
    out: Path
    device: torch.device
    autocast: partial
    features: dict = field(default_factory=dict)  # of a frozen encoder, {name of a set: (n, D)}

    def sizes(self):
        """Training pictures of each class, (C,)."""
        return torch.bincount(self.train.labels[self.train.rows])

    def parameters_trained(self):
        """-> how many, and their share of all."""
        count = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        return count, count / sum(p.numel() for p in self.net.parameters())


def open_task(flags, device, autocast):
    """The data, the network, and which of its weights are trained."""
    method, keys = parse_keys(flags.method, METHODS, "--method")
    head, head_keys = parse_keys(flags.head, classifier.HEADS, "--head")
    if method == "lora" and (flags.from_scratch or keys["alpha"] < 0):
        raise UserError("--method lora needs a trained encoder and alpha=0 or more; choose full")

    encoder = load_encoder(flags.encoder, flags.image_size)
    folder = flags.data or flags_of(flags.encoder).get("data", "datasets/toon")
    flags.data = str(data.open_or_pack(folder, encoder.image_size))
    sets, classes = open_rows(flags.data, flags.split, flags.hold_out)
    flags.batch_size = min(flags.batch_size, len(sets[0].rows))

    if flags.from_scratch:
        encoder = untrained_like(encoder, flags.seed)
        keys |= {"layer_decay": 1.0} if "layer_decay" not in flags.method else {}
    digest = fingerprint(encoder)
    flags.fingerprint = getattr(flags, "fingerprint", digest)  # a resumed run has one
    if flags.fingerprint != digest:
        raise UserError(
            f"{flags.encoder} has changed since {flags.out} began; put the old one back"
        )
    torch.manual_seed(flags.seed)
    encoder.requires_grad_(method == "full")
    if method == "lora":
        add_lora(encoder, keys["r"], keys["alpha"])
    pool = "mean" if head == "ifa" else flags.pool
    net = classifier.Classifier(encoder, len(classes), head, pool, **head_keys).to(device)
    views = (flags.keep, flags.colourless)
    where = (Path(flags.out), device, autocast)
    return Task(
        method, head, keys | head_keys, net, TrainedWeights(net), classes, *sets, *views, *where
    )


def epoch_rows(rows, labels, balanced, seed, epoch):
    """The order of an epoch; balanced: drawn with replacement, every class equally likely."""
    if not balanced:
        return rows[data.epoch_order(len(rows), seed, epoch)]
    odds = 1 / torch.bincount(labels[rows]).double()[labels[rows]]
    generator = train.seeded(seed, epoch)
    return rows[torch.multinomial(odds, len(rows), replacement=True, generator=generator)]


def unfreeze(net, trained, epoch, every):
    """Progressive unfreezing (Howard and Ruder 2018): the head first, one more block every `every` epochs."""
    depth = len(net.encoder.blocks)
    for name, p in net.named_parameters():
        if name in trained:
            p.requires_grad_(not every or classifier.level_of(name, depth) > depth - epoch // every)


def pooled_of(task, images, rows):
    """The neck's input for whole images. A frozen encoder sees every picture of a split once."""
    pooled = partial(classifier.pooled_of, task.net.eval(), images.split, autocast=task.autocast)
    if task.method != "linear":
        return pooled(rows)
    if images.name not in task.features:
        every = torch.arange(len(images.split["images"]))
        task.features[images.name] = pooled(every, name="features")
    return task.features[images.name][rows]


def predict(task, images, most=None):
    """-> logits (n, C) and labels (n,) of whole pictures: the rows of task.dev or report.

    The neck first gets mean and variance of whole training pictures, NECK_OF_CLASS of each class. In
    training it averaged over pictures that were cropped and in part hidden.
    """
    if task.head != "ifa":  # the neck of ifa has no statistics
        rows = task.train.rows
        labels = task.train.labels[rows]
        of_class = [rows[labels == c] for c in range(len(task.classes))]
        some = torch.cat([one[data.evenly_spaced(len(one), NECK_OF_CLASS)] for one in of_class])
        some = some[data.evenly_spaced(len(some), most or len(some))]
        pooled = pooled_of(task, task.train, some)
        task.net.neck.running_mean.copy_(pooled.mean(0))
        task.net.neck.running_var.copy_(pooled.var(0))
    logits, _ = classifier.predict(task.net.eval(), pooled_of(task, images, images.rows))
    return logits, images.labels[images.rows]


def finetune(flags, task):
    """Train for --epochs -> (run, the latest epoch within a standard error of the best on dev)."""
    net = task.net
    device = task.device
    C = len(task.classes)
    train_rows, labels = task.train.rows, task.train.labels
    B, seed, balanced = flags.batch_size, flags.seed, flags.balanced
    per_epoch = len(train_rows) // B
    total = per_epoch * flags.epochs
    unfreeze_every = flags.unfreeze_every if task.method == "full" else 0
    lr = 0.0 if task.method == "linear" else flags.lr
    settings = lr, flags.head_lr, WEIGHT_DECAY[task.method], task.keys.get("layer_decay", 1.0)
    optimizer = classifier.make_optimizer(net, *settings)
    sizes = task.sizes()
    prior = sizes / len(train_rows)  # of each character: Menon et al. 2020, arXiv:2007.07314
    adjust = (flags.logit_adjust * prior.log()).to(device)
    best = Best()
    parts = {"model": task.trained, "optimizer": optimizer, "best": best}
    run = train.Run(flags, parts, total, per_epoch, device)
    run.resume_or_begin()
    count, share = task.parameters_trained()
    print(
        f"data     {flags.data}: {C} characters of {sizes.min()} to {sizes.max()} pictures, "
        f"{len(task.dev.rows)} pictures for choices\n"
        f"run      {task.out}: {flags.method} of {flags.encoder}, {flags.head} head, {count:,} "
        f"parameters trained ({share:.2%}), step {run.step} of {total}"
    )
    images = data.resident(task.train.split["images"], device)
    if task.method == "linear":
        images = pooled_of(task, task.train, torch.arange(len(images)))

    right = []
    for epoch in range(run.step // per_epoch, flags.epochs):
        net.train()
        unfreeze(net, task.trained.tensors, epoch, unfreeze_every)
        order = epoch_rows(train_rows, labels, balanced, seed, epoch)
        for rows, batch in data.batches(images, order, B, device, run.step % per_epoch):
            # view: all random numbers are drawn here, on the CPU
            generator = train.seeded_step(seed, epoch, run.step)
            if task.method != "linear":
                batch = pooled_views(task, batch, run.step / total, generator)  # (B, D)

            # forward, loss: cross-entropy with smoothed targets
            y = data.send(labels[rows], device)  # (B,)
            logits = net(batch, y)  # (B, C)
            target = F.one_hot(y, C) * (1 - SMOOTHING) + SMOOTHING / C  # (B, C)
            loss = -(target * (logits + adjust).log_softmax(1)).sum(1).mean()

            # update
            loss.backward()
            learning = [p for p in net.parameters() if p.requires_grad]
            grad_norm = nn.utils.clip_grad_norm_(learning, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(run.step, total, WARMUP * total, group["peak"])
            optimizer.step()
            optimizer.zero_grad()
            run.update(loss, grad_norm)

            # log, evaluate, save
            right.append((logits.argmax(1) == y).float().mean())
            if run.logs_now:
                top1 = 100 * torch.stack(right).mean().item()
                run.log_step(lr=optimizer.param_groups[-1]["lr"], train_top1=top1)
                right = []
            if run.step % per_epoch == 0:
                scores, truth = predict(task, task.dev, NECK_IN_ALL)
                top1 = 100 * readout.topk(scores, truth, 1)
                f1 = 100 * metrics.macro_f1(scores.argmax(1), truth)
                run.log(epoch=epoch + 1, dev_top1=top1, dev_macro_f1=f1)
                best.macro_f1 = max(f1, best.macro_f1)
                error = math.sqrt(best.macro_f1 * (100 - best.macro_f1) / len(truth))
                if (
                    f1 >= best.macro_f1 - error
                ):  # within a standard error: the later one learned more
                    best.epoch = epoch + 1
                    weights = task.trained.state_dict()
                    best.weights = {name: w.cpu().clone() for name, w in weights.items()}
            run.save_if_due()
    task.trained.load_state_dict(best.weights)
    return run, best.epoch


# ---- how good it is, and the files ---------------------------------------------------------------


def results(flags, task, run, best_epoch):
    """-> the row of metrics.json, in percent, measured on the pictures of --split."""
    logits, truth = predict(task, task.report)
    right = logits.argmax(1) == truth
    found = metrics.classification(logits, truth, task.sizes())
    groups = data.groups_of(task.report.split)[task.report.rows].numpy()
    interval = stats.bootstrap(100.0 * right[None].double().numpy(), groups)
    row = {"run": task.out.name, "method": task.method, "head": task.head, "seed": flags.seed}
    row |= {"data": flags.data, "evaluated_on": flags.split, "best_epoch": best_epoch}
    row |= {k: 100 * found[k] for k in ("top1", "top5", "macro_f1")}
    row["by_size"] = {k: 100 * found[k] for k in ("head", "mid", "tail") if found[k] is not None}
    row["top1_interval"] = [round(interval[k], 2) for k in ("low", "high")]
    row["colourless_top1"] = 100 * readout.topk(*predict(task, controls.in_gray(task.report)), 1)
    sets = task.train, task.dev, task.report
    row["thumbnails_top1"] = controls.thumbnail_top1(*sets)
    row["histograms_top1"] = controls.histogram_top1(*sets)
    row |= {"confusion": found["confusion"], "right": stats.to_bits(right)}
    count, share = task.parameters_trained()
    row |= {"parameters_trained": count, "share_trained_percent": round(100 * share, 3)}
    row |= train.cost_of_steps(task.out / "log.jsonl", run.batch_size)
    row |= {"seconds": run.seconds(), "config": run.config | task.keys, "command": flags.command}
    return row | {"commit": train.commit(), "machine": train.machine(task.device)}


def write_network(flags, task, run):
    """head.safetensors, and under it the adapter or the whole encoder."""
    encoder, split = task.net.encoder, task.train.split
    if task.method == "lora":
        save_adapter(lora_layers(encoder), encoder, task.out, flags.encoder)
    elif task.method == "full" or flags.from_scratch:
        save_encoder(encoder, task.out / "model.safetensors", {"step": run.step, "run": run.config})
    head = {k: w for k, w in task.trained.tensors.items() if not k.startswith("encoder.")}
    header = {"config": task.net.config, "classes": task.classes, "method": task.method}
    header |= {"base": str(flags.encoder), "fingerprint": fingerprint(encoder)}
    header |= {"image_size": encoder.image_size, "packed_size": split["images"].shape[1]}
    header |= {name: split["header"][name] for name in ("crop", "margin")}
    header |= {"data": flags.data, "split": flags.split, "hold_out": flags.hold_out}
    save_safetensors(head, task.out / "head.safetensors", header)


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
        image = axis.imshow(percents.numpy(), norm=PowerNorm(0.5, 0, 100))  # shows small shares
        axis.figure.colorbar(image, label="% of the true class")
        axis.set(xlabel="predicted class", ylabel="true class")
        if len(names) <= 50:
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axis.set_yticks(range(len(names)), names, fontsize=6)


@torch.no_grad()
def write_results(flags, task, run, best_epoch):
    """All files but state.pt. A network that is there already stays as it is."""
    out = task.out
    suffix = split_suffix(flags.split)
    row = results(flags, task, run, best_epoch)
    if not any(out.glob("metrics*.json")):
        write_network(flags, task, run)
    save_json(row, out / f"metrics{suffix}.json")  # the last file: where it is, the run is finished
    with drawing("curves.png or confusion.png"):
        title = f"{out.name}: Top-1 {row['top1']:.1f} % on {flags.split}"
        draw_curves(out / "curves.png", train.read_log(out / "log.jsonl"), best_epoch, title)
        draw_confusion(out / f"confusion{suffix}.png", row["confusion"], task.classes, title)
    low, high = row["top1_interval"]
    print(
        f"{flags.split:<9}Top-1 {row['top1']:.2f} % (95 % interval {low:.1f} to {high:.1f}), macro-F1 "
        f"{row['macro_f1']:.2f} %; without colour Top-1 {row['colourless_top1']:.1f} %\n"
        f"controls thumbnails {row['thumbnails_top1']:.1f} %, histograms {row['histograms_top1']:.1f} %\n"
        f"wrote    {out}/ after {row['seconds']:.0f} s, epoch {best_epoch} kept\n"
        f"next: python -m apps.recognize {shlex.quote(str(out))} PICTURE"
    )


def main():
    flags = read_flags()
    done = Path(flags.out) / f"metrics{split_suffix(flags.split)}.json"
    if flags.resume and done.exists():
        return print(f"run      {flags.out} is finished: {done}; --split test measures it on test")
    device, autocast, machine = train.open_machine(flags)
    print(machine)
    task = open_task(flags, device, autocast)
    write_results(flags, task, *finetune(flags, task))


if __name__ == "__main__":
    cli(main)
