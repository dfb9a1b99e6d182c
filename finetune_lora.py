"""Stage 4: teach an encoder characters: a head on it (linear), thin adapters in it (lora), or all of it (full).

    python finetune_lora.py runs/toon-nano-attn_high-0.75-s0 --method lora     # or: torchrun --nproc-per-node 8 ...

Reads:  an encoder (runs/NAME of pretrain.py, or a checkpoint file that common/checkpoints.py knows) and datasets/NAME
Writes: runs/NAME-METHOD/ state.pt (all that a resumed run needs), head.safetensors, and what belongs under it: for lora
        adapter_model.safetensors and adapter_config.json, for full and from scratch model.safetensors;
        gallery.safetensors (embeddings of training pictures, the threshold of "unknown"), metrics.json, log.jsonl,
        curves.png, confusion.png, confused.png; with --seeds N one such folder a seed, and runs/NAME-METHOD-seeds.json

Choices (best epoch, threshold) are made on dev, or on a tenth of train held apart by group; --eval-on is reported.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import finetune_lora
import mask as masking
from common import distributed, errors
from common.checkpoints import fingerprint, load_encoder, load_exactly, save_adapter, save_encoder
from common.classifier import (
    HEADS,
    MARGINS,
    POOLS,
    Classifier,
    cached_features,
    calibrate,
    gallery_rows,
    make_optimizer,
    pooled_of,
    read_safetensors,
    save_gallery,
    save_head,
    settle,
    stamps,
    unfreeze,
)
from common.features import epoch_rows, open_rows
from common.io import UserError, cli, save_json
from common.train import (
    Pacer,
    Stopwatch,
    autocast_of,
    catch_signals,
    command,
    commit,
    lr_at,
    machine,
    open_log,
    open_run,
    peak_memory_mb,
    pick_device,
    pick_dtype,
    read_log,
    save_state,
    seeded,
)
from kernels.gather import masked_patch_gather
from model import TARGETS, add_lora, untrained_like

LOG_EVERY, CLIP = 10, 1.0  # steps, norm of the gradient
FEW = 256  # training pictures that settle the neck for a look in passing
DEFAULTS = {  # by method; rates were chosen on dev of faces20 in short runs (results/LOG.md)
    "linear": dict(lr=0.0, head_lr=3e-2, batch_size=256, weight_decay=1e-4, layer_decay=1.0, epochs=50, keep=1.0),
    "lora":   dict(lr=3e-3, head_lr=1e-2, batch_size=32, weight_decay=1e-4, layer_decay=1.0, epochs=30, keep=0.25),
    "full":   dict(lr=1e-3, head_lr=1e-2, batch_size=32, weight_decay=0.05, layer_decay=0.9, epochs=30, keep=0.25),
}  # fmt: skip


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("encoder", metavar="ENCODER", help="runs/NAME, or a checkpoint of MAE, DINO, timm or HF")
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add("--data", metavar="DIR", help="labelled set (default: what the encoder was trained on, else datasets/toon)")
    add("--out", metavar="DIR", help="run folder (default: the encoder's, and the flags that matter)")
    add("--resume", action="store_true", help="go on with the run in --out, from its last checkpoint")
    add("--eval-on", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add("--hold-out", type=int, default=0, metavar="N", help="leave N characters out: strangers for recognize.py")
    add = parser.add_argument_group("what is trained").add_argument
    add("--method", default="lora", choices=DEFAULTS, help="head alone, low-rank adapters, everything")
    add("--head", default="linear", choices=HEADS, help="classifier; ifa looks at the CLS token of every block")
    add("--margin", type=float, metavar="M", help="of a margin head (default: 0.5, cosface 0.35)")
    add("--scale", type=float, default=32, metavar="S", help="of the cosine in a margin head")
    add("--pool", default="mean", choices=POOLS, help="patch tokens averaged, or the CLS token")
    add("--r", type=int, default=8, metavar="R", help="rank of LoRA")
    add("--alpha", type=float, metavar="A", help="its scale is alpha/r (default: 2r)")
    add("--targets", default=",".join(TARGETS), metavar="NAMES", help="matrices that get LoRA (default: %(default)s)")
    add("--dropout", type=float, default=0.0, metavar="P", help="before LoRA's first matrix")
    add("--from-scratch", action="store_true", help="forget the encoder's weights: the control")
    add("--unfreeze-every", type=int, default=0, metavar="EPOCHS", help="full: one more block, from the top, each time")
    add("--image-size", type=int, metavar="PX", help="side of a view in pixels (default: the encoder's)")
    add = parser.add_argument_group("training (defaults per method, printed)").add_argument
    add("--epochs", type=int, help="passes over the data")
    add("--batch-size", type=int, metavar="B", help="images for one step")
    add("--lr", type=float, help="peak learning rate of the encoder or the adapter, for any batch size")
    add("--head-lr", type=float, metavar="LR", help="of neck and head")
    add("--layer-decay", type=float, metavar="D", help="full: each block's rate is D times that of the block above it")
    add("--weight-decay", type=float, metavar="W", help="of matrices")
    add("--warmup", type=float, default=0.1, metavar="SHARE", help="share of the run in which the rates rise")
    add("--patience", type=int, default=0, metavar="EPOCHS", help="stop after so many without better macro-F1")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--seeds", type=int, default=1, metavar="N", help="runs, of seed, seed + 1, ...; then mean and deviation")
    add = parser.add_argument_group("the long tail").add_argument
    add("--balanced", action="store_true", help="draw every character equally often")
    add("--logit-adjust", type=float, default=0.0, metavar="TAU", help="tau * log(share of the class) on the logits")
    add = parser.add_argument_group("augmentation (linear without any caches its features)").add_argument
    add("--augment", action=argparse.BooleanOptionalAction, help="crop, flip, colour, cutout (default: all but linear)")
    add("--keep", type=float, metavar="SHARE", help="of the patches that a training view shows (PatchDropout)")
    add("--min-crop", type=float, default=0.5, metavar="AREA", help="smallest share of an image that a crop shows")
    add("--colour", type=float, default=0.2, metavar="X", help="brightness, contrast, saturation times 1 +- X")
    add("--cutout", type=float, default=0.1, metavar="AREA", help="share of a view under a gray square")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="blend pairs; not with margin heads")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="paste pairs; not with margin heads")
    add("--label-smoothing", type=float, default=0.1, metavar="E", help="share of the target spread over all")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    add("--log", default="", metavar="NAMES", help="tensorboard,wandb beside log.jsonl")
    return parser.parse_args()
# fmt: on


def check(args):
    """Fill what depends on the method; every mistake that can be seen before anything is read or written."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    usual = DEFAULTS[args.method] | ({"layer_decay": 1.0} if args.from_scratch else {})
    vars(args).update({"augment": args.method != "linear", "data": None} | usual | given)
    for name, least in (("epochs", 1), ("batch_size", 2), ("seeds", 1), ("r", 1)):  # the neck normalises over a batch
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    limits = {"keep": (0.01, 1), "min_crop": (0.01, 1), "colour": (0, 1), "cutout": (0, 0.9), "warmup": (0, 1),
              "label_smoothing": (0, 0.9), "layer_decay": (0.01, 1), "dropout": (0, 0.9), "lr": (0, 1),
              "scale": (1, 1e3), "head_lr": (1e-9, 1), "weight_decay": (0, 10), "mixup": (0, 10), "cutmix": (0, 10),
              "hold_out": (0, 1e6), "logit_adjust": (0, 10), "seed": (0, 1e9), "patience": (0, 1e6),
              "unfreeze_every": (0, 1e6)}  # fmt: skip
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must lie between {low:g} and {high:g}")
    if args.margin is not None and (args.head not in MARGINS or not 0 <= args.margin <= 1):
        raise UserError(f"--margin {args.margin} must lie between 0 and 1, and is for --head {', '.join(MARGINS)}")
    if (args.mixup or args.cutmix) and args.head in MARGINS:
        raise UserError(f"--head {args.head} puts its margin on one true class: leave --mixup and --cutmix at 0")
    if args.unfreeze_every and args.method != "full":
        raise UserError(f"--unfreeze-every is for --method full; {args.method} never unfreezes the encoder")
    if args.from_scratch and args.method == "lora":
        raise UserError("--from-scratch has no weights to adapt: it is the control of --method full and linear")
    args.targets = [t.strip() for t in args.targets.split(",")]


# ---- what the network sees: a view, augmented so that no two epochs look alike -------------------------------------

GRAY = 128


def uniform(n, low, high, generator, device):
    """(n, 1, 1, 1) numbers in [low, high]."""
    return (low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)).to(device)


def jitter_colour(view, strength, generator):
    """Brightness, contrast, saturation times factors in 1 +- strength, one a picture. Hue stays: it tells who it is."""
    light, contrast, saturation = (
        uniform(len(view), 1 - strength, 1 + strength, generator, view.device) for _ in range(3)
    )
    x = view.float()
    gray = (x * x.new_tensor([0.299, 0.587, 0.114])).sum(3, keepdim=True)
    x = gray + saturation * (x - gray)
    middle = x.mean((1, 2, 3), keepdim=True)
    return ((middle + contrast * (x - middle)) * light).round_().clamp_(0, 255).to(torch.uint8)


def boxes_of(n, share, S, generator):
    """(n, S, S) bool, one square of `share` of the area each, somewhere whole inside the picture."""
    side = round(S * share**0.5)
    top, left = torch.randint(0, S - side + 1, (2, n, 1), generator=generator)
    at = torch.arange(S)
    rows, columns = (at >= top) & (at < top + side), (at >= left) & (at < left + side)
    return rows[:, :, None] & columns[:, None, :]


def cutout(view, share, generator):
    """A gray square over `share` of each picture (DeVries and Taylor 2017, arXiv:1708.04552)."""
    hole = boxes_of(len(view), share, view.shape[1], generator).to(view.device)
    return view.masked_fill(hole[..., None], GRAY)


def mix(view, targets, mixup, cutmix, generator):
    """Each picture with another of the batch, targets (B, C) alike; mixup and cutmix are the alphas of Beta, 0 is off.

    Mixup blends (Zhang et al. 2018, arXiv:1710.09412), cutmix pastes a square (Yun et al. 2019, arXiv:1905.04899);
    with both on, each batch draws which.
    """
    chance = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    order = torch.randperm(len(view), generator=generator).to(view.device)
    paste = cutmix > 0 and (mixup == 0 or chance.random() < 0.5)
    alpha = cutmix if paste else mixup
    share = float(chance.beta(alpha, alpha))  # of the own picture
    if paste:
        hole = boxes_of(1, 1 - share, view.shape[1], generator).to(view.device)
        share = 1 - hole.float().mean().item()
        view = torch.where(hole[..., None], view[order], view)
    else:
        view = (share * view.float() + (1 - share) * view[order].float()).round_().to(torch.uint8)
    return view, share * targets + (1 - share) * targets[order]


def augmented(batch, targets, args, S, draws):
    """images u8 (B, ., ., 3), targets (B, C) -> view u8 (B, S, S, 3), targets. All chance is drawn on the CPU."""
    if not args.augment:
        return data.view_images(batch, *data.full_boxes(len(batch)), S), targets
    view = data.view_images(batch, *data.draw_boxes(len(batch), draws, args.min_crop), S)
    if args.colour:
        view = jitter_colour(view, args.colour, draws)
    if args.mixup or args.cutmix:
        view, targets = mix(view, targets, args.mixup, args.cutmix, draws)
    return (cutout(view, args.cutout, draws) if args.cutout else view), targets




def shown_patches(view, encoder, keep, draws):
    """view u8 (B, S, S, 3) -> patches (B, K, P) and places (B, K): a random share of them (arXiv:2208.07220).

    An encoder that learned from a quarter of each picture can read a part, and a step costs as much less.
    """
    K = max(1, round(keep * encoder.side**2))
    if encoder.side**2 == K:
        return encoder.all_patches(view)
    noise = torch.rand(len(view), encoder.side**2, generator=draws).to(view.device)
    ids, _ = masking.sample(noise, K)
    return masked_patch_gather(view, ids, encoder.patch_size), ids


def soft_cross_entropy(logits, targets):
    """Mean over the batch of -sum_c target_c log softmax(logits)_c, both (B, C)."""
    return -(targets * logits.log_softmax(1)).sum(1).mean()


# ---- the run -------------------------------------------------------------------------------------------------------


def run_name(args):
    """The encoder's name and the flags that matter."""
    path = Path(args.encoder)
    words = [path.name if path.is_dir() else path.stem, args.method]
    words += [] if args.head == "linear" else [args.head]
    words += [f"r{args.r}"] if args.method == "lora" and args.r != 8 else []
    words += ["scratch"] if args.from_scratch else []
    return "-".join(words)


def data_of(encoder):
    """The data set that an encoder of pretrain.py was trained on; the demo set for others."""
    path = Path(encoder)
    try:
        return read_safetensors(path / "model.safetensors" if path.is_dir() else path)[1]["run"]["data"]
    except (UserError, KeyError, TypeError):
        return "datasets/toon"


def config_of(args, seed, mark):
    """What decides the weights: a run can only be resumed under the same."""
    leave_out = ("out", "resume", "log", "device", "eval_on", "seeds", "encoder")
    return {k: v for k, v in vars(args).items() if k not in leave_out} | {"seed": seed, "encoder": mark}


def build(args, seed, classes, device):
    """-> the classifier with only what `--method` trains left trainable, image size, fingerprint of its base."""
    encoder, S = load_encoder(args.encoder, args.image_size)
    if args.from_scratch:
        encoder = untrained_like(encoder, seed)
    mark = fingerprint(encoder)
    torch.manual_seed(seed)
    if args.method == "lora":
        add_lora(encoder, args.r, args.alpha, args.dropout, args.targets)
    else:
        encoder.requires_grad_(args.method == "full")
    return Classifier(encoder, classes, args.head, args.pool, args.margin, args.scale).to(device), S, mark


def trained_names(net):
    """What a checkpoint holds: all that is trained, and the buffers of neck and head."""
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    return trained | {name for name in net.state_dict() if not name.startswith("encoder.")}


def load_trained(net, weights, names, path):
    """Load exactly these names into the network."""
    if weights.keys() != names:
        raise UserError(f"{path} does not hold what this run trains; choose another --out")
    load_exactly(net, net.state_dict() | weights, path)


def run(args, seed, out, device, dtype, rank, world):
    """One run, with one seed -> its row of metrics. A finished one is only read, or judged on another --eval-on.

    Several processes share the encoder's work on a batch: each takes a slice of the views. Neck, head and evaluation
    are small and done by all of them alike; rank 0 writes.
    """
    autocast = autocast_of(device, dtype)
    parts, own = open_rows(args.data, args.eval_on, args.hold_out)
    (train, train_rows), (dev, dev_rows), (held, held_rows) = parts
    dev_name = "train" if dev is train else "dev"
    names = [name for name, k in zip(train["header"]["classes"], own, strict=True) if k >= 0]
    net, S, mark = build(args, seed, len(names), device)
    trained = trained_names(net)
    optimizer = make_optimizer(net, args.lr, args.head_lr, args.weight_decay, args.layer_decay)
    config = config_of(args, seed, mark)
    state = open_run(out, config, args.resume)
    if state and (out / "metrics.json").exists():
        row = json.loads((out / "metrics.json").read_text())
        if row["evaluated_on"] == args.eval_on:  # else the finished weights are judged on the other split, too
            print(f"run      {out} is finished")
            return row

    # a frozen encoder that sees the same views each epoch is asked once; its features then are the "images"
    bank = None
    if args.method == "linear" and not args.augment and args.keep == 1:
        heads = net.encoder.blocks[0].attn.heads  # which the weights don't show
        key = f"{mark} {heads} {S} {args.pool} {args.head == 'ifa'} {args.dtype} {args.eval_on} {stamps(args.data)}"
        key = hashlib.sha256(key.encode())
        path = out.parent / f"features-{key.hexdigest()[:12]}.safetensors"
        splits = {"train": train, args.eval_on: held} | ({} if dev is train else {"dev": dev})
        with distributed.zero_first():
            bank = cached_features(net, args.data, splits, S, autocast, path)
    images = data.resident(train, device) if bank is None else bank["train"].to(device)

    shown = gallery_rows(own[train["labels"]], train_rows)  # some whole training pictures of everybody
    labels, prior = own[train["labels"]], torch.bincount(own[train["labels"]][train_rows], minlength=len(names))
    prior = (prior / prior.sum()).log().to(device)
    B = min(args.batch_size, len(train_rows))
    if B % world:
        raise UserError(f"a batch of {B} images can't be shared by {world} processes: choose another --batch-size")
    mine = slice(rank * B // world, (rank + 1) * B // world)
    per_epoch = len(train_rows) // B
    total = per_epoch * args.epochs
    step, seconds, best = 0, 0.0, {"epoch": 0, "macro_f1": -1.0, "weights": {}}
    if state:
        load_trained(net, state["model"], trained, out / "state.pt")
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, best = state["step"], state["seconds"], state["best"]
    log = open_log(out / "log.jsonl", step if state else -1, args.log, config, write=rank == 0)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    share = count / sum(p.numel() for p in net.parameters())
    print(f"data     {args.data}: {len(train_rows)} images to learn from, {len(dev_rows)} to choose by, "
          f"{len(names)} characters")  # fmt: skip
    print(f"model    {args.method} of {args.encoder}, {args.head} head: {count:,} parameters trained, {share:.2%}")
    print(f"run      {out}: {args.epochs} epochs of {per_epoch} steps of {B} images, rates {args.lr:.2g} and "
          f"{args.head_lr:.2g}, {args.keep:.0%} of the patches"
          + (f"; going on from step {step}" if state else ""))  # fmt: skip

    def clock():
        return seconds + time.perf_counter() - began

    def save():
        if rank > 0:
            return
        weights = {k: v for k, v in net.state_dict().items() if k in trained}
        about = {"config": config, "step": step, "seconds": clock(), "best": best}
        save_state({"model": weights, "optimizer": optimizer.state_dict()} | about, out / "state.pt")

    @torch.no_grad()
    def looked_at(name, split, rows, what=""):
        """-> logits (n, C), embeddings (n, D) of whole images, on the CPU."""
        pooled = bank[name][rows] if bank else pooled_of(net, split, rows, S, autocast, what)
        embeddings = torch.cat([net.neck(p.to(device)) for p in pooled.split(4096)])
        logits = net.head(embeddings)
        return logits.cpu(), embeddings.cpu()

    @torch.no_grad()
    def settled(rows):
        """Give the neck the statistics of whole pictures, before anything is looked at -> those before the neck."""
        net.eval()
        whole = bank["train"][rows] if bank else pooled_of(net, train, rows, S, autocast)
        settle(net.neck, whole)
        return whole

    asked, began = catch_signals(), time.perf_counter()
    waiting, losses, last_save = Stopwatch(), [], Pacer()
    bar = tqdm(total=total, initial=step, unit="step", disable=True if rank else None)

    for epoch in range(step // per_epoch, args.epochs):
        if args.patience and epoch - distributed.largest(best["epoch"]) >= args.patience:
            break
        unfreeze(net.train(), trained, epoch, args.unfreeze_every)
        order = epoch_rows(train_rows, labels, args.balanced, seed, epoch)
        for rows, batch in waiting.timed(data.batches(images, order, B, device, start=step % per_epoch)):
            # what is seen; all chance is drawn here, on the CPU (LoRA's dropout reads the global generator)
            draws = seeded(seed, epoch, step)
            torch.manual_seed(int(draws.initial_seed() >> 1))
            y = labels[rows].to(device)  # (B,)
            targets = F.one_hot(y, len(names)) * (1 - args.label_smoothing) + args.label_smoothing / len(names)
            if bank is None:
                view, targets = finetune_lora.augmented(batch, targets, args, S, draws)
                patches, ids = shown_patches(view, net.encoder, args.keep, draws)
                with autocast():
                    batch = net.pooled(patches[mine], ids[mine])
                batch = distributed.with_others(batch, mine)  # (B, D)

            # forward, backward, step
            logits = net(batch, y)
            loss = soft_cross_entropy(logits + args.logit_adjust * prior, targets)
            loss.backward()
            distributed.all_reduce_gradients(net.encoder.parameters())
            norm = torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], CLIP)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, args.warmup * total, group["peak"])
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()

            # log, evaluate, save
            losses.append(torch.stack([loss.detach(), norm, (logits.argmax(1) == y).float().mean()]))
            stop, ended = distributed.largest(asked[0] if asked else 0), step % per_epoch == 0
            if step % LOG_EVERY == 0 or ended or stop:
                now, losses = torch.stack(losses).cpu(), []
                if not now.isfinite().all():
                    raise UserError(
                        f"the loss is not finite before step {step}; {out}/state.pt keeps the last good state. "
                        f"Try smaller rates than --lr {args.lr:g} --head-lr {args.head_lr:g}"
                    )
                share_waited, spent = waiting.share()
                log(step=step, epoch=round(step / per_epoch, 4), loss=now[:, 0].mean().item(), lr=group["lr"],
                    grad_norm=now[:, 1].mean().item(), train_top1=100 * now[:, 2].mean().item(),
                    images_per_s=round(len(now) * B / spent, 1), data_wait=round(share_waited, 5),
                    memory_mb=round(peak_memory_mb(device)), seconds=round(clock(), 2))  # fmt: skip
                bar.set_postfix(loss=f"{now[:, 0].mean():.3f}")
            if ended:
                settled(shown[data.spread(len(shown), FEW)])
                logits, _ = looked_at(dev_name, dev, dev_rows)
                row = errors.quick(logits, own[dev["labels"]][dev_rows])
                log(step=step, epoch=epoch + 1, **row, seconds=round(clock(), 2))
                if bank is None or step == total:
                    tqdm.write(
                        f"epoch {epoch + 1:<4} dev Top-1 {row['dev_top1']:.1f} %, macro-F1 {row['dev_macro_f1']:.1f} %"
                    )
                if row["dev_macro_f1"] > best["macro_f1"]:
                    weights = {k: v.detach().cpu().clone() for k, v in net.state_dict().items() if k in trained}
                    best = {"epoch": epoch + 1, "macro_f1": row["dev_macro_f1"], "weights": weights}
            if stop or step == total or ended and last_save.due():
                last_save.time(save)
                waiting.share()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    if rank > 0:
        return {}
    if step < total:  # stopped early
        save()

    # the best epoch by dev, judged on pictures that decided nothing
    load_trained(net, best["weights"], trained, out / "state.pt")
    whole = settled(shown)
    dev_seen, seen = looked_at(dev_name, dev, dev_rows), looked_at(args.eval_on, held, held_rows, "reported split")
    gallery = net.neck(whole.to(device)).cpu()
    about = {"method": args.method, "base": str(args.encoder), "fingerprint": mark, "image_size": S, "data": args.data,
             "packed_size": train["images"].shape[1], **{k: train["header"][k] for k in ("crop", "margin")},
             "commit": commit(), "machine": machine(device)}  # fmt: skip
    strangers = (own[dev["labels"]] < 0).nonzero()[:, 0]  # left out by --hold-out: what "unknown" looks like
    unknown = looked_at(dev_name, dev, strangers)[1] if len(strangers) else None
    threshold = calibrate(gallery, labels[shown], *dev_seen, own[dev["labels"]][dev_rows], unknown)
    keys = [train["header"]["keys"][i] for i in shown.tolist()]
    save_gallery(out / "gallery.safetensors", gallery, labels[shown], names, keys, threshold)
    if args.method == "lora":
        save_adapter(net.encoder, out, args.encoder)
    if args.method == "full" or args.from_scratch:
        about["fingerprint"] = fingerprint(net.encoder)
        save_encoder(net.encoder, out / "model.safetensors", {"step": step, "run": config})
    save_head(net, names, out / "head.safetensors", about)

    # the report
    truth, counts = own[held["labels"]][held_rows], torch.bincount(labels[train_rows], minlength=len(names))
    row = {"run": out.name, "method": args.method, "head": args.head, "seed": seed, "data": args.data,
           "evaluated_on": args.eval_on, **errors.scores(seen[0], truth, counts, names), "best_epoch": best["epoch"],
           "parameters_trained": count, "share_trained_percent": round(100 * share, 3),
           "gradient_and_optimizer_mb": round(12 * count / 2**20, 2),
           **speed(read_log(out / "log.jsonl"), B), "seconds": round(clock(), 1),
           "calibration": threshold, "config": config, "machine": about["machine"], "commit": about["commit"],
           "command": command()}  # fmt: skip
    row["mistakes"] = errors.explain(net, (held, held_rows), seen[0], truth, (train, shown), labels, S, autocast)
    title = f"{args.method}, {args.head} head, {Path(args.data).name}: Top-1 {row['top1']:.1f} % on {args.eval_on}"
    errors.draw(out, row, (held, held_rows), seen[0], truth, (train, train_rows), labels, names, title)
    save_json(row, out / "metrics.json")  # last: where it stands, the run is finished
    print(f"{args.eval_on:<9}Top-1 {row['top1']:.2f} %, Top-5 {row['top5']:.2f} %, macro-F1 {row['macro_f1']:.2f} %, "
          f"epoch {best['epoch']} kept")  # fmt: skip
    print(f"wrote    {out}/ after {clock():.0f} s; python recognize.py {out} PICTURE names a character")
    return row


def speed(rows, B):
    """Rows of log.jsonl -> the median step time and the most memory held."""
    steps = [r for r in rows if "loss" in r]
    return {"step_ms": round(float(np.median([1000 * B / r["images_per_s"] for r in steps])), 2),
            "peak_memory_mb": max(r["memory_mb"] for r in steps)}  # fmt: skip


def main():
    args = parse_args()
    check(args)
    device = pick_device(args.device)
    dtype, dtype_why = pick_dtype(args.dtype, device)
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    print(f"machine  {machine(device)}\n         {args.dtype}: {dtype_why}")
    rank, world, device = distributed.join(device)
    load_encoder(args.encoder, args.image_size)  # what is wrong with it is said before a data set is drawn
    with distributed.zero_first():
        args.data = str(data.open_or_pack(args.data or data_of(args.encoder)))
    base = Path(args.out or f"runs/{run_name(args)}")
    seeds = range(args.seed, args.seed + args.seeds)
    alone = args.seed == 0 or args.out and args.seeds == 1  # the first seed, and a folder that was asked for, are bare
    outs = [base.with_name(base.name + ("" if alone and seed == args.seed else f"-s{seed}")) for seed in seeds]
    rows = [run(args, seed, out, device, dtype, rank, world) for seed, out in zip(seeds, outs, strict=True)]
    distributed.leave()
    if args.seeds > 1:
        summary, path = errors.over_seeds(rows), base.with_name(base.name + "-seeds.json")
        save_json(summary | {k: rows[0][k] for k in ("command", "machine", "commit")}, path)
        told = (f"{k} {summary[k]['mean']:.2f} +- {summary[k]['deviation']:.2f}" for k in ("top1", "top5", "macro_f1"))
        print(f"{args.seeds} seeds: {', '.join(told)}; wrote {path}")


if __name__ == "__main__":
    cli(main)
