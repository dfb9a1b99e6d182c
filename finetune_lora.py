"""Stage 4: teach an encoder characters: a head on it (linear), thin adapters in it (lora), or all of it (full).

    # or: torchrun --nproc-per-node 8 ...
    python finetune_lora.py runs/toon-nano-attn_high-0.75-s0 --method lora

Reads:  an encoder (runs/NAME of pretrain.py, or a checkpoint file that common/formats.py knows) and
        datasets/NAME
Writes: runs/NAME-METHOD/ state.pt (all that a resumed run needs), head.safetensors, and what
belongs under it: for lora
        adapter_model.safetensors and adapter_config.json, for full and from scratch
        model.safetensors;
        gallery.safetensors (embeddings of training pictures, the threshold of "unknown"),
        metrics.json, log.jsonl,
        curves.png, confusion.png, confused.png (metrics-test.json and so on if it is then judged on
        another split);
        with --seeds 3 one such folder a seed, and runs/NAME-METHOD-seeds0-2.json

Choices (best epoch, threshold) are made on dev, or on a tenth of train held apart by group;
--eval-on is reported. Several processes take a slice of the views each; neck, head and evaluation
are small, and all of them compute these.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import shlex
from argparse import ArgumentTypeError, BooleanOptionalAction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import mask as masking
from common import classifier, distributed, errors, stats, train
from common.checkpoints import flags_of, load_exactly
from common.command import (
    Parser,
    at_least,
    between,
    cli,
    command,
    drawing,
    progress,
    refuse_file,
    refuse_unused,
    working,
)
from common.convnets import NETWORKS, is_convnet, load_any
from common.corruptions import cutout, squares
from common.features import epoch_rows, name_of, open_rows, split_suffix, untrained_like
from common.io import UserError, read_json, save_json, save_safetensors
from common.lora import TARGETS, add_lora, fingerprint, save_adapter, save_encoder
from kernels.gather import masked_patch_gather

LOG_EVERY, CLIP = 10, 1.0  # steps, norm of the gradient
FEW, GALLERY = (
    256,
    20,
)  # training pictures: for the neck's statistics after an epoch; of a character, also at the end
HARDEST = 4  # strata that are named at the end
RISING = "0.25:0.75"  # of the patches, from the first step to the last
# by method; learning rates were chosen on dev of faces20 in short runs (results/LOG.md)
DEFAULTS = {
    "linear": dict(
        lr=0.0,
        head_lr=3e-2,
        batch_size=256,
        weight_decay=1e-4,
        layer_decay=1.0,
        epochs=50,
        keep="1",
    ),
    "lora": dict(
        lr=3e-3,
        head_lr=1e-2,
        batch_size=32,
        weight_decay=1e-4,
        layer_decay=1.0,
        epochs=30,
        keep=RISING,
    ),
    "full": dict(
        lr=1e-3,
        head_lr=1e-2,
        batch_size=32,
        weight_decay=0.05,
        layer_decay=0.9,
        epochs=30,
        keep=RISING,
    ),
}
RESULTS = (
    "metrics.json",
    "head.safetensors",
    "gallery.safetensors",
    "model.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "curves.png",
    "confusion.png",
    "confused.png",
)
NO_CONFIG = (
    "out",
    "resume",
    "given",
    "log",
    "device",
    "eval_on",
    "seeds",
    "encoder",
)  # change nothing


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="runs/NAME, or a checkpoint of MAE, DINO, timm or HF; from "
        f"scratch also {', '.join(NETWORKS)}",
    )
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add(
        "--data",
        metavar="DIR",
        help="labelled set (default: what the encoder was trained on, else datasets/toon)",
    )
    add(
        "--out",
        metavar="DIR",
        help="run folder (default: the encoder's, and the flags that matter)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint",
    )
    add("--eval-on", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add(
        "--hold-out",
        type=at_least(0),
        default=0,
        metavar="N",
        help="characters left out: strangers for recognize.py",
    )
    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--method",
        default="lora",
        choices=DEFAULTS,
        help="head alone, low-rank adapters, everything",
    )
    add(
        "--head",
        default="linear",
        choices=classifier.HEADS,
        help="classifier; mlp has a hidden layer, ifa uses the CLS token of every block",
    )
    add(
        "--margin",
        type=between(0, 1),
        metavar="M",
        help="of a margin head (default: 0.5, cosface 0.35)",
    )
    add(
        "--scale",
        type=between(1, 1000),
        default=32,
        metavar="S",
        help="of the cosine in a margin head",
    )
    add(
        "--pool",
        default="mean",
        choices=classifier.POOLS,
        help="patch tokens averaged, or the CLS token",
    )
    add("--r", type=at_least(1), default=8, metavar="R", help="rank of LoRA")
    add("--alpha", type=at_least(0, float), metavar="A", help="its scale is alpha/r (default: 2r)")
    add(
        "--targets",
        default=",".join(TARGETS),
        metavar="NAMES",
        help="matrices that get LoRA (default: %(default)s)",
    )
    add(
        "--dropout",
        type=between(0, 0.9),
        default=0.0,
        metavar="P",
        help="before LoRA's first matrix",
    )
    add("--from-scratch", action="store_true", help="forget the encoder's weights: the control")
    add(
        "--unfreeze-every",
        type=at_least(0),
        default=0,
        metavar="EPOCHS",
        help="full: one more block, from the top",
    )
    add(
        "--image-size",
        type=at_least(1),
        metavar="PX",
        help="side of a view in pixels (default: the encoder's)",
    )
    add = parser.add_argument_group("training (defaults per method, printed)").add_argument
    add("--epochs", type=at_least(1), help="passes over the data")
    add(
        "--batch-size", type=at_least(2), metavar="B", help="images for one step"
    )  # the neck normalises over a batch
    add(
        "--lr",
        type=between(0, 1),
        help="peak learning rate of the encoder or the adapter, for any batch size",
    )
    add("--head-lr", type=between(1e-9, 1), metavar="LR", help="of neck and head")
    add(
        "--layer-decay",
        type=between(0.01, 1),
        metavar="D",
        help="a block learns at D times the one above it",
    )
    add("--weight-decay", type=between(0, 10), metavar="W", help="of matrices")
    add(
        "--warmup",
        type=between(0, 1),
        default=0.1,
        metavar="SHARE",
        help="share of the run with a rising rate",
    )
    add(
        "--patience",
        type=at_least(0),
        default=0,
        metavar="EPOCHS",
        help="stop after so many without better macro-F1",
    )
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation")
    add(
        "--seeds",
        type=at_least(1),
        default=1,
        metavar="N",
        help="runs, of seed, seed + 1, ...; then mean and std",
    )
    add = parser.add_argument_group("who is unknown (results/LOG.md, Strangers)").add_argument
    add(
        "--faces",
        type=at_least(1),
        default=500,
        metavar="N",
        help="training pictures of a character in the gallery",
    )
    add(
        "--reject",
        type=between(0, 1),
        default=classifier.MOST_REJECTED,
        metavar="SHARE",
        help="of known faces that may be called unknown, at most (default: %(default)s)",
    )
    add = parser.add_argument_group("the long tail").add_argument
    add("--balanced", action="store_true", help="draw every character equally often")
    add(
        "--logit-adjust",
        type=between(0, 10),
        default=0.0,
        metavar="TAU",
        help="tau * log(class share) on the logits",
    )
    add = parser.add_argument_group(
        "augmentation (linear without any caches its features)"
    ).add_argument
    add(
        "--augment",
        action=BooleanOptionalAction,
        help="crop, flip, colour, cutout (default: all but linear)",
    )
    add(
        "--keep",
        type=shares,
        metavar="SHARE",
        help="of the patches shown in training (PatchDropout); .25:.75 rises",
    )
    add(
        "--min-crop",
        type=between(0.01, 1),
        default=0.5,
        metavar="AREA",
        help="smallest share of an image in a crop",
    )
    add(
        "--colour",
        type=between(0, 1),
        default=0.2,
        metavar="X",
        help="brightness, contrast, saturation times 1 +- X",
    )
    add(
        "--cutout",
        type=between(0, 0.9),
        default=0.1,
        metavar="AREA",
        help="share of a view under a gray square",
    )
    add(
        "--mixup",
        type=between(0, 10),
        default=0.0,
        metavar="ALPHA",
        help="blend pairs; not with margin heads",
    )
    add(
        "--cutmix",
        type=between(0, 10),
        default=0.0,
        metavar="ALPHA",
        help="paste pairs; not with margin heads",
    )
    add(
        "--label-smoothing",
        type=between(0, 0.9),
        default=0.1,
        metavar="E",
        help="share of the target for all classes",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    add(
        "--log",
        type=train.trackers,
        default=(),
        metavar="NAMES",
        help="tensorboard,wandb beside log.jsonl",
    )
    return parser.parse_args()


def fill_defaults(args):
    """What was not given depends on the method; flags that do not go together, or are not used, are
    refused.
    """
    given = {k: v for k, v in vars(args).items() if v is not None}
    usual = DEFAULTS[args.method] | ({"layer_decay": 1.0} if args.from_scratch else {})
    vars(args).update({"augment": args.method != "linear"} | usual | given)
    args.targets = [t.strip() for t in args.targets.split(",")]
    refuse_unused(
        args,
        (
            (
                "r alpha targets dropout",
                args.method == "lora",
                f"is for --method lora, not for {args.method}",
            ),
            (
                "lr layer-decay",
                args.method != "linear",
                "is for what learns in the encoder; --method linear: --head-lr",
            ),
            (
                "keep layer-decay unfreeze-every pool",
                not is_convnet(args.encoder),
                f"is for a ViT; {args.encoder} is none",
            ),
            (
                "unfreeze-every",
                args.method == "full",
                f"is for --method full; {args.method} never unfreezes the encoder",
            ),
            (
                "margin scale",
                args.head in classifier.MARGINS,
                f"is for --head {', '.join(classifier.MARGINS)}",
            ),
            (
                "pool",
                args.head != "ifa",
                "is not for --head ifa, which reads the CLS token of every block",
            ),
            (
                "min-crop colour cutout mixup cutmix",
                args.augment,
                f"is augmentation, and {args.method} has none here; with --augment it has",
            ),
        ),
    )
    if is_convnet(args.encoder):
        args.keep = "1"
        if (
            args.method == "lora"
            or args.head == "ifa"
            or not (args.from_scratch or Path(args.encoder).exists())
        ):
            raise UserError(
                f"{args.encoder} is no ViT: give --method full --from-scratch, and a head that is not ifa"
            )
    if (args.mixup or args.cutmix) and args.head in classifier.MARGINS:
        raise UserError(
            f"--head {args.head} puts its margin on one true class: leave --mixup and --cutmix at 0"
        )
    if args.from_scratch and args.method == "lora":
        raise UserError(
            "--from-scratch has no weights to adapt: it is the control of --method full and linear"
        )


# ---- what the network sees: a view, augmented so that no two epochs are alike --------------------


def mix(view, targets, mixup, cutmix, generator):
    """Each picture with another of the batch, targets (B, C) alike; mixup and cutmix are the alphas
    of Beta, 0 is off.

    Mixup blends (Zhang et al. 2018, arXiv:1710.09412), cutmix pastes a square (Yun et al. 2019,
    arXiv:1905.04899); with both on, each batch draws which.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    order = torch.randperm(len(view), generator=generator).to(view.device)
    paste = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if paste else mixup
    share = float(rng.beta(alpha, alpha))  # of the own picture
    if paste:
        hole = squares(1, view.shape[1], 1 - share, generator).to(view.device)
        share = 1 - hole.float().mean().item()
        view = torch.where(hole[..., None], view[order], view)
    else:
        view = (share * view.float() + (1 - share) * view[order].float()).round_().to(torch.uint8)
    return view, share * targets + (1 - share) * targets[order]


def augment(images, targets, args, S, generator):
    """images u8 (B, ., ., 3), targets (B, C) -> view u8 (B, S, S, 3), targets."""
    if not args.augment:
        return data.view_images(images, *data.full_boxes(len(images)), S), targets
    view = data.view_images(images, *data.draw_boxes(len(images), generator, args.min_crop), S)
    if args.colour:
        view = data.jitter_colour(
            view, torch.rand(3, len(view), generator=generator).T, args.colour
        )
    if args.mixup or args.cutmix:
        view, targets = mix(view, targets, args.mixup, args.cutmix, generator)
    return (cutout(view, args.cutout, generator) if args.cutout else view), targets


def shares(text):
    """An argparse type: a share, or the first and the last of a run: ".25:.75" -> "0.25:0.75"."""
    parts = [f"{between(0.01, 1)(part):g}" for part in text.split(":")]
    if len(parts) > 2:
        raise ArgumentTypeError(
            f"{text} must be a share, such as .5, or the first and the last, such as .25:.75"
        )
    return ":".join(parts)


def shown(keep, t):
    """The share of the patches at t of a run, which begins at 0 and ends at 1; keep as `shares`
    gives it.
    """
    first, last = (float(x) for x in (keep.split(":") * 2)[:2])
    return first + (last - first) * t


def drop_patches(view, encoder, keep, generator):
    """view u8 (B, S, S, 3) -> patches (B, K, P) and places (B, K): a random share of them
    (arXiv:2208.07220).

    An encoder that learned from a quarter of each picture can read a detail alone, and a step costs
    as much less.
    """
    N = encoder.side**2
    K = max(1, round(keep * N))
    if K == N:
        return encoder.all_patches(view)
    ids, _ = masking.sample(torch.rand(len(view), N, generator=generator).to(view.device), K)
    return masked_patch_gather(view, ids, encoder.patch_size), ids


# ---- before the loop: names, network, data -------------------------------------------------------


def open_task(args, seed, out, device, autocast):
    """-> what a run works with, a namespace; the comments say what is in it."""
    task = SimpleNamespace(out=out, device=device, autocast=autocast, features=None)
    (task.train, task.dev, task.report), task.classes = open_rows(
        args.data, args.eval_on, args.hold_out
    )
    of_class = [
        task.train.rows[task.train.labels[task.train.rows] == c] for c in range(len(task.classes))
    ]
    task.gallery, task.known = (
        torch.cat([rows[data.evenly_spaced(len(rows), n)] for rows in of_class])
        for n in (GALLERY, args.faces)
    )

    encoder, task.S = load_any(args.encoder, args.image_size)  # S: side of a view
    encoder = untrained_like(encoder, seed) if args.from_scratch else encoder
    task.base = fingerprint(encoder)  # before training
    torch.manual_seed(seed)
    encoder.requires_grad_(args.method == "full")
    if args.method == "lora":
        add_lora(encoder, args.r, args.alpha, args.dropout, args.targets)
    task.net = classifier.Classifier(
        encoder, len(task.classes), args.head, args.pool, args.margin, args.scale
    )
    # {name: weight} in the network's memory: what is trained, with the neck's statistics, and the
    # rest
    weights = task.net.to(device).state_dict(keep_vars=True)
    task.trained = {
        k: w.detach() for k, w in weights.items() if w.requires_grad or not k.startswith("encoder.")
    }
    task.frozen = {k: w for k, w in weights.items() if k not in task.trained}
    task.count = sum(p.numel() for p in task.net.parameters() if p.requires_grad)
    task.share = task.count / sum(p.numel() for p in task.net.parameters())
    config = {k: v for k, v in vars(args).items() if k not in NO_CONFIG}
    task.config = config | {
        "seed": seed,
        "encoder": task.base,
    }  # a run can only be resumed under the same
    return task


def check_memory(args, task, images):
    """Refuse what memory can't hold: a step of so many images, or an evaluation of whole ones."""
    blocks, p = task.net.encoder.blocks, task.net.encoder.patch_size
    if not blocks:  # a convolutional network
        return
    shape = task.net.config["dim"], len(blocks), blocks[0].attn.heads
    keep = max(shown(args.keep, 0), shown(args.keep, 1))
    item, fused, learns = (
        4 if args.dtype == "fp32" else 2,
        task.device.type != "cpu",
        args.method != "linear",
    )

    def need(image_size):
        N = (image_size // p) ** 2
        step = train.step_memory([(max(1, round(keep * N)), *shape)], images, item, fused, learns)
        return max(step, train.step_memory([(N, *shape)], data.CHUNK, item, fused, False))

    train.check_memory(task.device, task.S, p, need, "a smaller --batch-size or --keep")


def start_message(args, task, steps, batch, step):
    """What is printed before the first step; steps: of an epoch."""
    n, held, C = len(task.train.rows), len(task.dev.rows), len(task.classes)
    keep = " to ".join(f"{float(share):.0%}" for share in args.keep.split(":"))
    sizes, told = (
        torch.bincount(task.train.labels[task.train.rows]),
        args.balanced or args.logit_adjust,
    )
    uneven = f" of {sizes.min()} to {sizes.max()}: --balanced names the rare ones better"
    uneven = uneven if sizes.max() > 5 * sizes.min() and not told else ""
    return (
        f"data     {args.data}: {n} images to learn from, {held} to choose by, {C} characters{uneven}\n"
        f"model    {args.method} of {args.encoder}, {args.head} head: {task.count:,} parameters trained, "
        f"{task.share:.2%}\nrun      {task.out}: {args.epochs} epochs of {steps} steps of {batch} images, "
        f"learning rates {args.lr:.2g} and {args.head_lr:.2g}, {keep} of the patches"
        + (f"; going on from step {step}" if step else "")
    )


def save_run(task, optimizer, step, seconds, best):
    """state.pt: everything that a resumed run needs."""
    state = {"model": task.trained, "optimizer": optimizer.state_dict(), "config": task.config}
    train.save_state(
        state | {"step": step, "seconds": seconds, "best": best}, task.out / "state.pt"
    )


def predict(task, images, rows, name="", bn_stats=False):
    """-> logits (n, C), embeddings (n, D) of whole images, rows of task.train, dev or report; name:
    of a progress bar.

    bn_stats: the neck gets the mean and variance of these rows first. In training it averaged over
    its last few hundred batches, of pictures that were cropped and in part hidden.
    """
    net = task.net.eval()
    pooled = (
        task.features[images.name][rows]
        if task.features
        else classifier.pooled_of(net, images.split, rows, task.S, task.autocast, name)
    )
    if bn_stats and task.config["head"] != "ifa":
        net.neck.running_mean.copy_(pooled.mean(0))
        net.neck.running_var.copy_(pooled.var(0))
    return classifier.predict(net, pooled)


def evaluate(task):
    """Top-1 and macro-F1 on dev, in percent; a few training pictures give the neck its statistics."""
    predict(
        task, task.train, task.gallery[data.evenly_spaced(len(task.gallery), FEW)], bn_stats=True
    )
    logits, _ = predict(task, task.dev, task.dev.rows)
    return errors.dev_scores(logits, task.dev.labels[task.dev.rows])


def finetune(args, seed, out, device, autocast):
    """One run, with one seed -> its row of metrics. A finished one is only read, or judged on
    another --eval-on.
    """
    rank, world = distributed.place()
    task = open_task(args, seed, out, device, autocast)
    net, train_rows, labels, C = task.net, task.train.rows, task.train.labels, len(task.classes)
    optimizer = classifier.make_optimizer(
        net, args.lr, args.head_lr, args.weight_decay, args.layer_decay
    )
    state = train.open_run(out, task.config, args.resume, RESULTS)
    if state and (out / f"metrics{split_suffix(args.eval_on)}.json").exists():
        print(f"run      {out} is finished")
        return read_json(out / f"metrics{split_suffix(args.eval_on)}.json", ["top1"])
    B = min(args.batch_size, len(train_rows))
    if B % world:
        raise UserError(
            f"--batch-size must be divisible by processes: {B} is not by {world}; choose another"
        )
    rank_slice = slice(
        rank * B // world, (rank + 1) * B // world
    )  # rows of a batch whose views this process works on
    check_memory(args, task, B // world)
    per_epoch = len(train_rows) // B
    total = per_epoch * args.epochs
    if (
        args.method == "linear" and not args.augment and args.keep == "1"
    ):  # the same views in each epoch
        with distributed.zero_first():
            task.features = classifier.frozen_features(
                task, args.dtype
            )  # {name of the split: (n, D)}
    images = (
        task.features["train"].to(device)
        if task.features
        else data.resident(task.train.split, device)
    )
    log_prior = torch.bincount(labels[train_rows], minlength=C)
    log_prior = (log_prior / log_prior.sum()).log().to(device)

    step, seconds, best = 0, 0.0, {"epoch": 0, "macro_f1": -1.0, "weights": {}}
    with train.taking_up(out / "state.pt"):
        if state:
            load_exactly(net, task.frozen | state["model"], out / "state.pt")
            train.load_optimizer(optimizer, state["optimizer"])
            step, seconds, best = state["step"], state["seconds"], state["best"]
    log = train.Log(
        out / "log.jsonl", step if state else -1, args.log, task.config, write=rank == 0
    )
    print(start_message(args, task, per_epoch, B, step))
    stop_signal, meter, pacer, right = (
        train.catch_signals(),
        train.Meter(B, device, seconds),
        train.Pacer(),
        [],
    )
    bar = progress(total=total, initial=step, unit="step", disable=rank > 0)

    for epoch in range(step // per_epoch, args.epochs):
        if args.patience and epoch - distributed.largest(best["epoch"]) >= args.patience:
            break
        classifier.unfreeze(net.train(), task.trained, epoch, args.unfreeze_every)
        order = epoch_rows(train_rows, labels, args.balanced, seed, epoch)
        for rows, batch in meter.timed(data.batches(images, order, B, device, step % per_epoch)):
            # view; all random numbers are drawn here, on the CPU (LoRA's dropout reads the global
            # generator)
            generator = train.seeded(seed, epoch, step)
            torch.manual_seed(int(generator.initial_seed() >> 1))
            y = labels[rows].to(device)  # (B,)
            targets = (
                F.one_hot(y, C) * (1 - args.label_smoothing) + args.label_smoothing / C
            )  # (B, C)
            if not task.features:
                view, targets = augment(batch, targets, args, task.S, generator)
                keep = shown(args.keep, step / total)
                patches, ids = drop_patches(view, net.encoder, keep, generator)  # (B, K, P), (B, K)
                with task.autocast():
                    batch = net.pooled(patches[rank_slice], ids[rank_slice])
                batch = distributed.with_others(batch)  # (B, D)

            # forward, loss, backward
            logits = net(batch, y)  # (B, C)
            log_p = (logits + args.logit_adjust * log_prior).log_softmax(1)
            loss = -(targets * log_p).sum(1).mean()  # cross-entropy with soft targets
            loss.backward()

            # update
            distributed.all_reduce_gradients(net.encoder.parameters())
            grad_norm = torch.nn.utils.clip_grad_norm_(
                [p for p in net.parameters() if p.requires_grad], CLIP
            )
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(step, total, args.warmup * total, group["peak"])
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            # log, evaluate, save
            bar.update()
            meter.add(
                loss.detach() / world, grad_norm
            )  # the meter sums over processes, which all have the same loss
            right.append((logits.argmax(1) == y).float().mean())
            stop, ended = (
                distributed.largest(stop_signal[0] if stop_signal else 0),
                step % per_epoch == 0,
            )
            if step % LOG_EVERY == 0 or ended or stop:
                row = meter.row(
                    step,
                    f"{out}/state.pt keeps the last good state. Try smaller learning rates than "
                    f"--lr {args.lr:g} --head-lr {args.head_lr:g}",
                )
                top1, right = 100 * torch.stack(right).mean().item(), []
                log(
                    step=step,
                    epoch=round(step / per_epoch, 4),
                    lr=group["lr"],
                    train_top1=top1,
                    **row,
                )
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if ended:
                row = evaluate(task)
                log(step=step, epoch=epoch + 1, **row, seconds=meter.seconds())
                if not task.features or step == total:
                    tqdm.write(
                        f"epoch {epoch + 1:<4} dev Top-1 {row['dev_top1']:.1f} %, "
                        f"macro-F1 {row['dev_macro_f1']:.1f} %"
                    )
                if row["dev_macro_f1"] > best["macro_f1"]:
                    best = {
                        "epoch": epoch + 1,
                        "macro_f1": row["dev_macro_f1"],
                        "weights": {k: w.cpu().clone() for k, w in task.trained.items()},
                    }
            if rank == 0 and (stop or step == total or ended and pacer.due()):
                pacer.time(save_run, task, optimizer, step, meter.seconds(), best)
                meter.restart()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    if rank > 0:
        return {}
    if step < total:  # stopped early
        save_run(task, optimizer, step, meter.seconds(), best)
    load_exactly(net, task.frozen | best["weights"], out / "state.pt")
    row = write_results(args, task, best["epoch"], step, B, meter)
    log.pictures()
    return row


# ---- after the loop: the files, and how good it is -----------------------------------------------


@torch.no_grad()
def write_results(args, task, best_epoch, step, batch, meter):
    """Judge the network on pictures that decided nothing, write all files but state.pt -> the row
    of metrics.

    A network that is there already stays as it is, and so does its gallery, in which somebody may
    be enrolled.
    """
    report, out = task.report, task.out
    where = {"commit": train.commit(), "machine": train.machine(task.device)}
    judged_before = (out / "head.safetensors").exists() and any(out.glob("metrics*.json"))
    calibration = classifier.gallery_header(out) if judged_before else write_gallery(args, task)
    logits, _ = predict(task, report, report.rows, "reported split")
    sizes = torch.bincount(task.train.labels[task.train.rows])  # training pictures of each class
    steps = [row for row in train.read_log(out / "log.jsonl") if "loss" in row]
    step_ms = np.median([1000 * batch / row["images_per_s"] for row in steps])
    right = logits.argmax(1) == report.labels[report.rows]
    share = stats.bootstrap(
        100.0 * right[None].double().numpy(), data.groups_of(report.split)[report.rows].numpy()
    )
    with working("asking why pictures are mistaken"):
        thumbnails, mistakes = errors.thumbnail_top1(task), errors.explain(task, logits)
    row = {
        "run": out.name,
        "method": args.method,
        "head": args.head,
        "seed": task.config["seed"],
        "data": args.data,
        "evaluated_on": args.eval_on,
        **errors.scores(logits, report.labels[report.rows], sizes, task.classes),
        "top1_interval": [round(share["low"], 2), round(share["high"], 2)],
        "by_stratum": errors.by_stratum(report.split, report.rows, right),
        "thumbnails_top1": thumbnails,
        "best_epoch": best_epoch,
        "parameters_trained": task.count,
        "share_trained_percent": round(100 * task.share, 3),
        "gradient_and_optimizer_mb": round(12 * task.count / 2**20, 2),
        "step_ms": round(float(step_ms), 2),
        "peak_memory_mb": max(row["memory_mb"] for row in steps),
        "seconds": meter.seconds(),
        "calibration": {k: calibration[k] for k in classifier.CALIBRATED},
        "config": task.config,
        **where,
        "command": command(),
        "right": stats.to_bits(right),
        "mistakes": mistakes,
    }
    if not judged_before:
        write_network(args, task, step, where)
    title = f"{args.method}, {args.head} head, {Path(args.data).name}: Top-1 {row['top1']:.1f} % on {args.eval_on}"
    # behind all files of the network: where it stands, the run is finished
    save_json(row, out / f"metrics{split_suffix(args.eval_on)}.json")
    with drawing("curves.png, confusion.png or confused.png"):
        errors.draw(task, row, logits, title, split_suffix(args.eval_on))
    print(result_message(row, out))
    return row


def result_message(row, out):
    """What is printed at the end: the result beside its control, and the command that follows."""
    (low, high), c = row["top1_interval"], row["calibration"]
    strata = sorted((r["top1"], r["pictures"], name) for name, r in row["by_stratum"].items())[
        :HARDEST
    ]
    hardest = ", ".join(f"{name} {top1:.0f} % of {n}" for top1, n, name in strata)
    return (
        f"{row['evaluated_on']:<9}Top-1 {row['top1']:.2f} % ({low:.1f} to {high:.1f} by its illustrations; 8x8 "
        f"thumbnails: {row['thumbnails_top1']:.1f} %), Top-5 {row['top5']:.2f} %, macro-F1 {row['macro_f1']:.2f}"
        f" %, epoch {row['best_epoch']} kept\n"
        + f"hardest  {hardest}\n"
        * bool(strata)
        + f"unknown  on dev {100 * c['false_reject']:.0f} % of known faces, {100 - 100 * c['false_accept']:.0f} % of "
        f"strangers ({c['by']})\nwrote    {out}/ after {row['seconds']:.0f} s\n"
        f"next: python recognize.py {shlex.quote(str(out))} PICTURE names a character, and with --verify "
        "measures how far to trust it"
    )


def write_gallery(args, task):
    """gallery.safetensors, the embeddings of task.known -> what `calibrate` found on dev."""
    predict(task, task.train, task.gallery, bn_stats=True)

    def faces(images, rows):
        pooled = classifier.pooled_of(
            task.net, images.split, rows, task.S, task.autocast, "gallery", mirrored=True
        )
        return classifier.predict(task.net, pooled)

    embeddings, labels, dev = (
        faces(task.train, task.known)[1],
        task.train.labels[task.known],
        task.dev,
    )
    strangers = (dev.labels < 0).nonzero()[
        :, 0
    ]  # left out by --hold-out: what "unknown" looks like
    unknown = faces(dev, strangers)[1] if len(strangers) else None
    known = *faces(dev, dev.rows), dev.labels[dev.rows]
    calibration = classifier.calibrate(embeddings, labels, *known, unknown, args.reject)
    keys = [task.train.split["header"]["keys"][i] for i in task.known.tolist()]
    path = task.out / "gallery.safetensors"
    classifier.save_gallery(
        path, embeddings, labels, task.classes, keys, len(task.classes), calibration
    )
    return calibration


def write_network(args, task, step, where):
    """head.safetensors, and under it the adapter or the whole encoder."""
    encoder, split = task.net.encoder, task.train.split
    about = {
        "config": task.net.config,
        "classes": task.classes,
        "method": args.method,
        "base": str(args.encoder),
        "fingerprint": task.base
        if args.method == "lora"
        else fingerprint(encoder),  # of what the head stands on
        "image_size": task.S,
        "data": args.data,
        "packed_size": split["images"].shape[1],
        "crop": split["header"]["crop"],
        "margin": split["header"]["margin"],
        **where,
    }
    if args.method == "lora":
        save_adapter(encoder, task.out, args.encoder)
    if args.method == "full" or args.from_scratch:
        save_encoder(encoder, task.out / "model.safetensors", {"step": step, "run": task.config})
    weights = {
        k: w for k, w in task.trained.items() if not k.startswith("encoder.")
    }  # of neck and head
    save_safetensors(weights, task.out / "head.safetensors", about)


def main():
    args = parse_args()
    fill_defaults(args)
    device = train.pick_device(args.device)
    dtype, dtype_reason = train.pick_dtype(args.dtype, device)
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    print(f"machine  {train.machine(device)}\n         {args.dtype}: {dtype_reason}")
    _, _, device = distributed.join(device)
    load_any(
        args.encoder, args.image_size
    )  # what is wrong with it is said before a data set is drawn
    with distributed.zero_first():
        args.data = str(
            data.open_or_pack(args.data or flags_of(args.encoder).get("data", "datasets/toon"))
        )
    autocast = train.autocast_of(device, dtype)
    words = [name_of(args.encoder), args.method, args.head.removeprefix("linear")]
    words += [
        f"r{args.r}" if args.method == "lora" and args.r != 8 else "",
        "scratch" if args.from_scratch else "",
    ]
    base = Path(args.out or "runs/" + "-".join(filter(None, words)))
    refuse_file(base)
    bare = (
        args.seed if args.seed == 0 or args.out and args.seeds == 1 else None
    )  # the seed whose folder has no -sN
    rows = [
        finetune(
            args,
            seed,
            base if seed == bare else base.with_name(f"{base.name}-s{seed}"),
            device,
            autocast,
        )
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    distributed.leave()
    if args.seeds > 1:
        name = f"{base.name}-seeds{args.seed}-{args.seed + args.seeds - 1}{split_suffix(args.eval_on)}.json"
        summary, path = errors.over_seeds(rows), base.with_name(name)
        save_json(summary | {k: rows[0][k] for k in ("command", "machine", "commit")}, path)
        words = (
            f"{k} {summary[k]['mean']:.2f} +- {summary[k]['deviation']:.2f}"
            for k in ("top1", "top5", "macro_f1")
        )
        print(f"{args.seeds} seeds: {', '.join(words)}; wrote {path}")


if __name__ == "__main__":
    cli(main)
