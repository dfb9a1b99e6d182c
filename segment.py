"""Stage 7: drawn or photographed? Learn from labels of whole frames, and say it of every pixel of a frame that is both.

    python segment.py runs/NAME --data datasets/hybrid
    python segment.py runs/NAME-seg PICTURE... --out masks

Reads:  an encoder; datasets/NAME with the classes "drawn" and "photographed", and frames of other
        classes: mixed ones
Writes: runs/NAME-seg/ patches.safetensors (stage 1), proxies/drawn.safetensors (stage 2),
model.safetensors (stage 3),
        state.pt (what a resumed run needs), metrics.json, log.jsonl, overlays.png; with pictures
        masks and overlays

1. An encoder learns from frames of one kind, cut together; a patch is what the nearest centroid of
patch tokens is. 2. Patches of mixed frames are named, also half a patch further, and carried to the
picture's edges: proxy masks. 3. A U-Net, shown colours and what patches say, learns from them, and
from frames of one kind, cut together. No mask that somebody drew is learned from; the set's own
(plane "drawn") judge, and teach --learn-from truth alone. The source (arXiv:2410.04789) has a
SegFormer in the U-Net's place.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import csv
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import mask as masking
from common import distributed, segmenting, train
from common.checkpoints import load_encoder, load_exactly
from common.command import (
    Parser,
    at_least,
    between,
    claim,
    cli,
    command,
    drawing,
    progress,
    refuse_file,
    refuse_overwrite,
    refuse_unused,
    working,
)
from common.features import name_of, open_splits, split_suffix
from common.io import UserError, atomic, read_header, read_json, save_json, save_safetensors
from common.lora import fingerprint
from ingest.pictures import tell_problems, whole_pictures
from kernels.gather import masked_patch_gather

LOG_EVERY, CLIP = 10, 1.0  # steps, norm of the gradient
BATCH, FIRST = 32, {1: 0, 3: 10**6}  # frames of a step; a stage's first step in the log
RESULTS = ("metrics*.json", "*.safetensors", "proxies/*.safetensors", "overlays*.png")
NO_CONFIG = (
    "out",
    "resume",
    "given",
    "log",
    "device",
    "eval_on",
    "encoder",
    "pictures",
    "until",
    "share",
    "side",
    "mixed",
)


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="runs/NAME, or a checkpoint of MAE, DINO, timm or HF; "
        "to use what was learned runs/NAME-seg",
    )
    parser.add_argument(
        "pictures", nargs="*", metavar="PICTURE", help="file, folder (a video's frames), archive"
    )
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add(
        "--data",
        metavar="DIR",
        help="set of frames: python data.py hybrid makes one (default: datasets/hybrid)",
    )
    add(
        "--out",
        metavar="DIR",
        help="run folder (default: the encoder's and seg); of pictures, folder of the masks",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint",
    )
    add("--eval-on", default="val", choices=["val", "test", "dev"], help="split that is reported")
    add("--until", type=int, default=3, choices=[1, 2, 3], help="last stage")
    add = parser.add_argument_group("stages 1 and 2: patches").add_argument
    add(
        "--patches",
        metavar="RUN",
        help="take both from another run of segment.py, and make stage 3 alone",
    )
    add(
        "--decide",
        default="centroid",
        choices=["centroid", "cls"],
        help="what names a patch: the nearest centroid\n"
        "of patch tokens, or a head that learned on the CLS token",
    )
    add(
        "--image-size",
        type=at_least(16),
        metavar="S",
        help="side of the frames in pixels (default: as packed)",
    )
    add("--epochs", type=at_least(1), default=70, help="passes over the frames of one kind")
    add("--lr", type=between(0, 1), default=5e-4, help="peak learning rate")
    add(
        "--keep",
        type=between(0.01, 1),
        default=0.5,
        metavar="SHARE",
        help="of the patches shown in training",
    )
    add = parser.add_argument_group("stage 3: pixels").add_argument
    add(
        "--learn-from",
        default="proxies",
        choices=["proxies", "frames", "truth"],
        help="mixed frames with proxies; "
        "frames\nof one kind alone; mixed frames with the true masks (a fully supervised control)",
    )
    add(
        "--network",
        default="unet",
        choices=["unet", "segformer"],
        help="segformer is the source's, and needs transformers",
    )
    add(
        "--no-hint",
        action="store_true",
        help="the network sees colours alone, not what stage 1 says of patches",
    )
    add(
        "--proxies",
        metavar="FILE",
        help="other masks of train than those of stage 2: saliency of maps.py",
    )
    add(
        "--flip",
        type=between(0, 1),
        default=0.0,
        metavar="SHARE",
        help="of the patches of proxies that are inverted",
    )
    add(
        "--balanced",
        action="store_true",
        help="both kinds of pixels weigh the same, however many there are",
    )
    add("--pixel-steps", type=at_least(1), default=800, metavar="N", help=f"of {BATCH} frames each")
    add("--pixel-lr", type=between(0, 1), default=2e-3, metavar="LR", help="peak learning rate")
    add = parser.add_argument_group("both").add_argument
    add(
        "--leave-out",
        metavar="WHAT=VALUE",
        help="drawings of this style are not learned from, such as line=bold",
    )
    add(
        "--cut",
        type=between(0, 1),
        default=1.0,
        metavar="SHARE",
        help="of the frames that show a part of another one, too",
    )
    add(
        "--min-crop",
        type=between(0.01, 1),
        default=0.5,
        metavar="AREA",
        help="smallest share of a frame in a crop",
    )
    add(
        "--colour",
        type=between(0, 1),
        default=0.3,
        metavar="X",
        help="brightness, contrast, saturation times 1 +- X",
    )
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation")
    add = parser.add_argument_group("what is said of pictures").add_argument
    add(
        "--mixed",
        action="store_true",
        help="all of them hold both kinds: each picture gets a threshold of its own",
    )
    add("--share", action="store_true", help="print how much of each picture is drawn, as CSV")
    add(
        "--side",
        type=between(32, 4096, int),
        metavar="PX",
        help="short side that pictures are resized to (default: as trained)",
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
    return parser.parse_intermixed_args()


def refuse_flags(args):
    training, third = not args.pictures, args.until == 3
    refuse_unused(
        args,
        (
            (
                "data resume eval-on until decide image-size epochs lr keep cut "
                "learn-from network no-hint proxies flip "
                "balanced pixel-steps pixel-lr leave-out min-crop colour seed log",
                training,
                "is for training, not for pictures",
            ),
            (
                "share side mixed",
                not training,
                "is for pictures: python segment.py runs/NAME-seg PICTURE",
            ),
            (
                "learn-from network no-hint proxies flip balanced pixel-steps pixel-lr",
                third,
                f"is for stage 3, not for --until {args.until}",
            ),
            (
                "decide image-size epochs lr keep",
                args.patches is None,
                "is for stage 1, and --patches brings it",
            ),
            ("patches", training, "is for training, not for pictures"),
            (
                "proxies flip",
                args.learn_from == "proxies",
                f"is for proxies, not for --learn-from {args.learn_from}",
            ),
        ),
    )


# ---- the data: frames of one kind, and mixed ones ------------------------------------------------


def open_task(args, device, autocast):
    """-> what a run works with, a namespace; the comments say what is in it."""
    task, splits = (
        SimpleNamespace(args=args, device=device, autocast=autocast),
        open_splits(args.data, args.eval_on),
    )
    classes = splits["train"]["header"]["classes"]
    if missing := [kind for kind in segmenting.KINDS if kind not in classes]:
        raise UserError(
            f"{args.data} has no frames labelled {missing[0]!r}, only {', '.join(map(str, classes))[:80]}; "
            "segment.py needs two folders of frames, drawn and photographed, and may have more of mixed "
            "ones: python data.py FOLDER"
        )
    kind = torch.full((len(classes) + 1,), -1)  # of a class: 0, 1, or -1: mixed, or without a label
    for k, name in enumerate(segmenting.KINDS):
        kind[classes.index(name)] = k
    sets = {
        name: frames_of(split, kind, name == "train" and args.leave_out)
        for name, split in splits.items()
    }
    if "dev" not in sets:
        sets["dev"] = hold_apart(sets["train"])
    task.train, task.report = sets["train"], sets[args.eval_on]
    task.judged = {name: sets[name] for name in ("dev", args.eval_on)}  # choices are made on dev
    if none := [
        name
        for k, name in enumerate(segmenting.KINDS)
        if not (task.train.kind[task.train.plain] == k).any()
    ]:
        raise UserError(
            f"{args.data}, train has no frames that are {none[0]}; there have to be frames of both kinds"
        )
    if args.until == 3 and args.learn_from != "frames" and not len(task.train.mixed):
        print(
            f"{args.data}, train has no mixed frames: no stage 3; --learn-from frames makes it without them"
        )
        args.until = 2
    if args.until == 3 and args.learn_from == "truth" and "drawn" not in task.train.split:
        raise UserError(
            f"{args.data} has no true masks to learn from; --learn-from proxies needs none"
        )
    task.encoder, _ = load_encoder(
        args.encoder, args.image_size or splits["train"]["images"].shape[1]
    )
    task.S = task.encoder.side * task.encoder.patch_size
    config = {k: v for k, v in vars(args).items() if k not in NO_CONFIG}
    task.config = config | {
        "encoder": fingerprint(task.encoder),
        "images": data.fingerprint(splits["train"]),
    }
    return task


def frames_of(split, kind, leave_out):
    """-> namespace: split, kind (n,) of each frame, and rows: plain ones (of one kind), mixed ones."""
    kinds = kind[split["labels"]]
    rows = torch.arange(len(kinds))
    if leave_out:
        rows = rows[~in_style(split, leave_out) | (kinds == segmenting.KINDS.index("photographed"))]
    return SimpleNamespace(
        split=split, kind=kinds, plain=rows[kinds[rows] >= 0], mixed=rows[kinds[rows] < 0]
    )


def in_style(split, text):
    """ "line=bold" -> (n,) bool: is the drawing in a frame of this style?"""
    what, _, value = text.partition("=")
    strata = split["header"].get("style") or {}
    if value not in strata.get(what, ()):
        known = (
            "; ".join(f"{k}={'|'.join(v)}" for k, v in strata.items())
            or "none: the set knows no styles"
        )
        raise UserError(f"--leave-out {text} is unknown; there are: {known}")
    column = list(strata).index(what)
    return torch.from_numpy(np.array(split["style"])[:, column] == strata[what].index(value))


def hold_apart(frames):
    """A tenth of train leaves it, by group -> the namespace of what left."""
    apart = torch.from_numpy(data.hold_apart(data.groups_of(frames.split), frames.kind, data.APART))
    dev = SimpleNamespace(split=frames.split, kind=frames.kind)
    for name in ("plain", "mixed"):
        rows = getattr(frames, name)
        setattr(dev, name, rows[apart[rows]])
        setattr(frames, name, rows[~apart[rows]])
    return dev


def views(task, split, rows):
    """Yield (rows, u8 (B, S, S, 3)) of whole frames."""
    return data.whole_views(split["images"], rows, task.S, task.device)


# ---- stage 1: patches by labels of frames --------------------------------------------------------


def crops(task, images, masks, generator, share):
    """-> views u8 (B, S, S, 3), masks (B, S, S) of the same places; a `share` of them shows a part
    of another one.
    """
    boxes, flip = data.draw_boxes(len(images), generator, task.args.min_crop)
    colour = torch.rand(len(images), 3, generator=generator)
    view = data.jitter_colour(
        data.view_images(images, boxes, flip, task.S), colour, task.args.colour
    )
    return segmenting.cut_together(
        view, data.view_maps(masks, boxes, flip, task.S).to(view.device), share, generator
    )


def patch_loss(task, net, rows, images, generator):
    """Cross-entropy of each patch that is shown; its label is the share of its pixels whose frame
    is drawn.
    """
    args, y, N = task.args, task.train.kind[rows].float(), net.encoder.side**2
    whole = net.decide == "cls"  # a CLS token has one label, its frame's
    view, drawn = crops(task, images, y[:, None, None], generator, 0 if whole else args.cut)
    noise = torch.rand(len(rows), N, generator=generator).to(view.device)
    ids, _ = masking.sample(noise, max(1, round(args.keep * N)))
    frame, patches = net(masked_patch_gather(view, ids, net.encoder.patch_size), ids)
    if whole:
        return F.binary_cross_entropy_with_logits(frame, y.to(view.device))
    share = F.avg_pool2d(drawn[:, None], net.encoder.patch_size).flatten(1).gather(1, ids)
    return F.binary_cross_entropy_with_logits(patches, share)


@torch.no_grad()
def set_centroids(task, net):
    """The mean patch token of each kind, over the frames of one kind in train; and the std of a
    patch's score.
    """
    net.eval()
    total, count, scores = (
        torch.zeros_like(net.centroids),
        torch.zeros(2, 1, device=task.device),
        [],
    )
    for index, view in views(task, task.train.split, task.train.plain):
        with task.autocast():
            tokens = net.encoder.features(view)[:, 1:].float().mean(1)
        one_hot = F.one_hot(task.train.kind[index], 2).float().to(task.device)
        total += one_hot.T @ tokens
        count += one_hot.sum(0)[:, None]
    net.centroids.copy_(total / count)
    some = task.train.plain[data.evenly_spaced(len(task.train.plain), 4 * data.CHUNK)]
    for _, view in views(task, task.train.split, some):
        with task.autocast():
            scores.append(net.scores(view)[1].flatten())
    net.scale.copy_(torch.cat(scores).std())


@torch.no_grad()
def judge_frames(task, net, frames):
    """-> share of the frames of one kind that are named rightly, in percent."""
    right = []
    for index, view in views(task, frames.split, frames.plain):
        with task.autocast():
            right.append((net.scores(view)[0] > 0).cpu() == (frames.kind[index] == 1))
    return round(100 * torch.cat(right).float().mean().item(), 2) if right else None


# ---- stage 2: proxy masks ------------------------------------------------------------------------


def write_proxies(task, net, out):
    """Proxy masks of all mixed frames of train -> out/drawn.safetensors, a row a frame of the
    split; others are 0.
    """
    split, S, n = task.train.split, task.S, len(task.train.split["labels"])
    chosen = torch.zeros(n, dtype=torch.bool).scatter(0, task.train.mixed, True)

    def rows():
        for index, view in progress(
            views(task, split, torch.arange(n)), "proxies", -(-n // data.CHUNK)
        ):
            found, some = np.zeros((len(index), S, S), np.uint8), chosen[index]
            if some.any():
                probability, _ = segmenting.proxy_masks(
                    net, view[some.to(view.device)], task.autocast
                )
                found[some.numpy()] = (
                    (255 * segmenting.two_means(probability)).round().byte().cpu().numpy()
                )
            yield found

    header = {
        "map": "drawn",
        "grid": S,
        "data_digest": data.fingerprint(split),
        "commit": train.commit(),
    }
    out.mkdir(parents=True, exist_ok=True)
    data.write_maps(data.map_file(out, "drawn", split), "drawn", rows(), (n, S, S), "U8", header)


# ---- stage 3: pixels -----------------------------------------------------------------------------


def masks_to_learn(task, rows):
    """Masks (B, ., .) fp32, 0 or 1: a frame of one kind is all of it, a mixed one is what
    --learn-from says.
    """
    kind, side = task.train.kind[rows], task.masks.shape[1]
    mixed = torch.from_numpy(np.asarray(task.masks[rows.numpy()]) > 127).float()
    if task.args.flip:
        mixed = torch.where(inverted(task, rows, side), 1 - mixed, mixed)
    return torch.where((kind < 0)[:, None, None], mixed, kind.clamp(min=0).float()[:, None, None])


def inverted(task, rows, side):
    """--flip: (B, side, side) bool, the same patches of a frame whenever it comes."""
    g = task.encoder.side
    draws = torch.stack(
        [torch.rand(g, g, generator=train.seeded(task.args.seed, 9, int(r))) for r in rows]
    )
    place = torch.arange(side) * g // side
    return (draws < task.args.flip)[:, place][:, :, place]


def pixel_loss(task, net, rows, images, generator):
    """Cross-entropy where the network answers; --balanced: what is drawn weighs as much as what is
    not.
    """
    view, drawn = crops(task, images, masks_to_learn(task, rows), generator, task.args.cut)
    logits = net(view)
    drawn = F.interpolate(drawn[:, None], size=logits.shape[1:], mode="area")[:, 0]
    loss = F.binary_cross_entropy_with_logits(logits, drawn, reduction="none")
    if not task.args.balanced:
        return loss.mean()
    share = drawn.mean().clamp(1e-3, 1 - 1e-3)
    return (loss * (0.5 * drawn / share + 0.5 * (1 - drawn) / (1 - share))).mean()


# ---- training: one loop for stages 1 and 3 -------------------------------------------------------


def fit(task, stage, net, rows, loss_of, total, lr, state, log):
    """Train `net` for `total` steps of loss_of(task, net, rows, images, generator), or what `state`
    leaves of them.
    """
    args, out, B = task.args, Path(task.args.out), min(BATCH, len(rows))
    per_epoch, optimizer = len(rows) // B, train.make_optimizer(net, lr, 0.05, (0.9, 0.999))
    step, seconds = 0, 0.0
    if state.get("stage") == stage:
        with train.taking_up(out / "state.pt"):
            load_exactly(net, state["model"], out / "state.pt")
            train.load_optimizer(optimizer, state["optimizer"])
            step, seconds = state["step"], state["seconds"]
    images = data.resident(task.train.split, task.device)
    stop_signal, meter, pacer = (
        train.catch_signals(),
        train.Meter(B, task.device, seconds),
        train.Pacer(),
    )

    def save():
        train.save_state(
            {
                "config": task.config,
                "stage": stage,
                "model": net.state_dict(),
                "step": step,
                "optimizer": optimizer.state_dict(),
                "seconds": meter.seconds(),
            },
            out / "state.pt",
        )

    bar = progress(total=total, initial=step, unit="step")
    for epoch in range(step // per_epoch, -(-total // per_epoch)):
        order = rows[data.epoch_order(len(rows), args.seed, epoch)][
            : B * (total - epoch * per_epoch)
        ]
        for index, some in meter.timed(
            data.batches(images, order, B, task.device, step % per_epoch)
        ):
            generator = train.seeded(args.seed, stage, epoch, step)
            with task.autocast():
                loss = loss_of(task, net.train(), index, some, generator)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            train.set_lr(optimizer, train.lr_at(step, total, 0.1 * total, lr))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            meter.add(loss.detach(), grad_norm)
            stop = stop_signal[0] if stop_signal else 0
            if step % LOG_EVERY == 0 or step == total or stop:
                row = meter.row(step, f"try a smaller learning rate than {lr:g}")
                log(step=FIRST[stage] + step, stage=stage, epoch=round(step / per_epoch, 3), **row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if stop or step == total or pacer.due():
                pacer.time(save)
                meter.restart()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    return meter.seconds()


# ---- how good it is ------------------------------------------------------------------------------


@torch.no_grad()
def judge(task, frames, masks_of):
    """masks_of(view) -> {version: (B, S, S)}, probabilities of drawn. -> {version: {kind: row of
    judge_masks}}.

    Beside the kinds stand all heterogeneous and all purely hybrid frames, where the set tells; {}
    without true masks.
    """
    if "drawn" not in frames.split:
        return {}
    header, pairs = frames.split["header"], {}
    for index, view in views(task, frames.split, frames.mixed):
        kinds, truth = (
            [header["classes"][c] for c in frames.split["labels"][index]],
            true_masks(frames, index, view),
        )
        for version, masks in masks_of(view).items():
            for kind, said, true in zip(kinds, masks > 0.5, truth, strict=True):
                pairs.setdefault(version, {}).setdefault(kind, []).append((said[None], true[None]))
    for some in pairs.values():
        groups = header.get("hybrid") or {"mixed": list(some)}
        some |= {
            name: [pair for kind in kinds for pair in some.get(kind, [])]
            for name, kinds in groups.items()
        }
    return {
        version: {name: segmenting.judge_masks(found) for name, found in some.items() if found}
        for version, some in pairs.items()
    }


def versions(masks, coarse=None):
    """Probabilities (B, S, S) -> those to judge: at .5, with each frame's threshold, and coarse
    ones with theirs.
    """
    known = {"_known": masks} | ({} if coarse is None else {"_coarse": coarse})
    return {"": masks} | {name: segmenting.two_means(some) for name, some in known.items()}


def judge_all(task, masks_of):
    """-> {split and version: {kind: row of judge_masks}} of dev and the reported split."""
    return {
        name + version: found
        for name, frames in task.judged.items()
        for version, found in judge(task, frames, masks_of).items()
    }


def true_masks(frames, rows, view):
    """(B, S, S) bool, at the side of `view`."""
    true = torch.from_numpy(np.array(frames.split["drawn"][rows.numpy()])).float()
    return (
        F.interpolate(true[:, None], size=view.shape[1:3], mode="area")[:, 0].to(view.device)
        > 127.5
    )


# ---- a run ---------------------------------------------------------------------------------------


def learn_patches(task, state, log):
    """Stage 1 -> the network, from its file where it is finished."""
    args, path = task.args, Path(task.args.patches or task.args.out) / "patches.safetensors"
    if path.exists() or args.patches:
        return segmenting.load_patches(path).to(task.device)
    torch.manual_seed(args.seed)
    net = segmenting.Patches(task.encoder, args.decide).to(task.device)
    total = args.epochs * (len(task.train.plain) // min(BATCH, len(task.train.plain)))
    seconds = fit(task, 1, net, task.train.plain, patch_loss, total, args.lr, state, log)
    with working("centroids"):
        set_centroids(task, net)
        row = {"seconds": seconds} | {
            name: judge_frames(task, net, some) for name, some in task.judged.items()
        }
    save_safetensors(net.state_dict(), path, {"patches": net.config, "stage": row})
    print(
        f"stage 1  frames named rightly: dev {row['dev']} %, {args.eval_on} {row[args.eval_on]} %; "
        f"{seconds:.0f} s"
    )
    return net


def make_proxies(task, net, masks_of):
    """Stage 2 -> rows of judge for dev and the reported split, of all `versions`."""
    args, out = task.args, Path(task.args.patches or task.args.out) / "proxies"
    if not len(task.train.mixed):
        print("stage 2  no mixed frames in train: there is nothing to make proxies for")
        return {}
    if not data.map_file(out, "drawn", task.train.split).exists():
        write_proxies(task, net, out)
    found = judge_all(task, masks_of)
    print(f"stage 2  proxies on {args.eval_on}: {in_words(found.get(args.eval_on + '_known', {}))}")
    return found


def learn_pixels(task, patches, state, log):
    """Stage 3 -> the segmenter, and its seconds; from its file where it is finished."""
    args, path = task.args, Path(task.args.out) / "model.safetensors"
    if path.exists():
        net, header = segmenting.load_pixels(path)
        return net.to(task.device), header["seconds"]
    torch.manual_seed(args.seed)
    net = segmenting.Pixels(args.network, None if args.no_hint else patches).to(task.device)
    if args.learn_from == "truth":
        task.masks = task.train.split["drawn"]
    elif args.proxies:
        task.masks = data.open_map(args.proxies, "saliency", task.train.split)
    elif args.learn_from == "proxies":
        task.masks = data.open_map(
            Path(args.patches or args.out) / "proxies", "drawn", task.train.split
        )
    else:
        task.masks = np.zeros((len(task.train.kind), 1, 1), np.uint8)
    rows = (
        task.train.plain
        if args.learn_from == "frames"
        else torch.cat([task.train.plain, task.train.mixed])
    )
    seconds = fit(task, 3, net, rows, pixel_loss, args.pixel_steps, args.pixel_lr, state, log)
    save_safetensors(
        net.state_dict(),
        path,
        {
            "network": args.network,
            "patches": net.patches and patches.config,
            "image_size": task.S,
            "seconds": seconds,
        },
    )
    return net.eval(), seconds


def run(args, device, autocast):
    """All stages up to --until -> the row of metrics. What is finished is only read."""
    task, out = open_task(args, device, autocast), Path(args.out)
    state = train.open_run(out, task.config, args.resume, RESULTS) or {}
    out.mkdir(parents=True, exist_ok=True)
    if not state:
        train.save_state({"config": task.config, "stage": 0}, out / "state.pt")
    finished = out / f"metrics{split_suffix(args.eval_on)}.json"
    if state and finished.exists() and read_json(finished, ["until"])["until"] >= args.until:
        print(f"run      {out} is finished")
        return read_json(finished)
    at = FIRST[state["stage"]] + state["step"] if state.get("stage") else -1
    log = train.Log(out / "log.jsonl", at, args.log, task.config)
    print(
        f"data     {args.data}: {len(task.train.plain)} of one kind, {len(task.train.mixed)} mixed, {task.S} px\n"
        f"run      {out}: stages 1 to {args.until}, --decide {args.decide}, --learn-from {args.learn_from}"
    )
    net = learn_patches(task, state, log)
    stage = read_header(Path(args.patches or out) / "patches.safetensors")[1]["stage"]
    row = {
        "run": out.name,
        "seed": args.seed,
        "data": args.data,
        "evaluated_on": args.eval_on,
        "until": args.until,
        "frames": stage,
    }

    def last(view):
        return versions(*segmenting.proxy_masks(net, view, task.autocast))

    if args.until > 1:
        row["proxies"] = make_proxies(task, net, last)
    if args.until > 2:
        pixels, row["pixel_seconds"] = learn_pixels(task, net, state, log)

        def last(view):
            return versions(segmenting.pixel_masks(pixels, view, task.autocast))

        row["pixels"] = judge_all(task, last)
        found = in_words(row["pixels"].get(args.eval_on, {}))
        print(f"stage 3  {args.eval_on}: {found}; {row['pixel_seconds']:.0f} s")
    if args.leave_out:
        mixed = task.report.mixed[in_style(task.report.split, args.leave_out)[task.report.mixed]]
        row["left_out"] = judge(
            task, SimpleNamespace(**vars(task.report) | {"mixed": mixed}), last
        ).get("", {})
    row |= {
        "config": task.config,
        "command": command(),
        "machine": train.machine(device),
        "commit": train.commit(),
    }
    save_json(row, finished)
    with drawing("overlays.png"):
        draw(task, net, last, out / f"overlays{split_suffix(args.eval_on)}.png")
    log.pictures()
    print(f"wrote    {out}/\nnext: python segment.py {shlex.quote(str(out))} PICTURE --out masks")
    return row


def in_words(found):
    some = [name for name in ("mixed", "purely") if name in found]
    return (
        ", ".join(f"{name} mean IoU {found[name]['miou']:.1f} %" for name in some)
        or "no true masks to judge by"
    )


@torch.no_grad()
def draw(task, net, masks_of, path, most=8):
    """Frames of the reported split, their true masks, patches, and what is said at last."""
    from common import plots

    frames = task.report if len(task.report.mixed) else task.train
    rows = frames.mixed if len(frames.mixed) else frames.plain
    rows = rows[data.evenly_spaced(len(rows), most)]
    _, view = next(views(task, frames.split, rows))
    with task.autocast():
        patches = (
            F.interpolate(net.scores(view)[1][:, None].float(), size=view.shape[1:3])[:, 0] > 0
        )
    masks = {"patches": patches, "mask": masks_of(view)[""] > 0.5}
    if "drawn" in frames.split:
        masks["true mask"] = true_masks(frames, rows, view)
    shown = [
        ("frame", view),
        *((name, segmenting.overlay(view, mask)) for name, mask in masks.items()),
    ]
    plots.image_grid(path, "What is photographed, in orange", shown)


# ---- use -----------------------------------------------------------------------------------------


@torch.no_grad()
def mask_of(picture, masks_of, side, squared, device, mixed=False):
    """picture u8 (H, W, 3) -> probability of drawn (H, W): found at short side `side`, then carried
    to its edges.
    """
    H, W = picture.shape[:2]
    scale = side / min(H, W)
    size = (
        (side, side)
        if squared
        else tuple(min(8 * side, max(32, round(x * scale / 32) * 32)) for x in (W, H))
    )
    small = torch.from_numpy(np.array(Image.fromarray(picture).resize(size, Image.BICUBIC)))[
        None
    ].to(device)
    found = F.interpolate(masks_of(small)[:, None].float(), size=(H, W), mode="bilinear")[:, 0]
    full = torch.from_numpy(picture)[None].to(device)
    found = segmenting.guided_filter(found, full, max(1, round(1 / scale))).clamp(0, 1)
    return (segmenting.two_means(found) if mixed else found)[0].cpu().numpy()


def use(args, device, autocast):
    """Write NAME-mask.png (white is drawn) and NAME-overlay.png of each picture, or print shares."""
    masks_of, side, squared = segmenting.load(args.encoder, device, autocast)
    if not args.share and not args.out:
        raise UserError(
            "--out DIR says where the masks go; --share prints how much is drawn instead"
        )
    refuse_unused(
        args, (("side", not squared, f"is for stage 3, and {args.encoder} stopped before it"),)
    )
    if args.out:
        claim([], Path(args.out) / ".lock")
    problems, count, table = [], 0, csv.writer(sys.stdout)
    if args.share:
        table.writerow(["picture", "drawn"])
    for key, picture in whole_pictures(args.pictures, problems):
        found = mask_of(picture, masks_of, args.side or side, squared, device, args.mixed)
        count += 1
        if args.share:
            table.writerow([key, f"{found.mean():.4f}"])
        if args.out:
            write_masks(Path(args.out), key, picture, found > 0.5)
    tell_problems(problems, count, False)
    if args.out:
        print(f"wrote    {args.out}/: masks and overlays of {count} pictures", file=sys.stderr)


def write_masks(out, key, picture, mask):
    out.mkdir(parents=True, exist_ok=True)
    name = "-".join(part for part in Path(key).with_suffix("").parts[-2:] if part.strip("./"))
    shown = segmenting.overlay(torch.from_numpy(picture)[None], torch.from_numpy(mask)[None])[
        0
    ].numpy()
    for what, pixels in (("mask", np.uint8(255 * mask)), ("overlay", shown)):
        path = out / f"{name}-{what}.png"
        refuse_overwrite([path])
        with atomic(path) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG")


def main():
    args = parse_args()
    refuse_flags(args)
    device = train.pick_device(args.device)
    dtype, dtype_reason = train.pick_dtype(args.dtype, device)
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    if not args.pictures and args.out is None:
        args.out = f"runs/{name_of(args.encoder)}-seg{f'-s{args.seed}' if args.seed else ''}"
    if args.out is not None:
        refuse_file(args.out)
    if args.pictures:
        return use(args, device, train.autocast_of(device, dtype))
    if args.until == 3:
        segmenting.Pixels(args.network)  # a missing library is said now, not after stages 1 and 2
    print(f"machine  {train.machine(device)}\n         {args.dtype}: {dtype_reason}")
    load_encoder(args.encoder)  # what is wrong with it is said before a data set is made
    args.data = str(data.open_or_pack(args.data or "datasets/hybrid"))
    run(args, device, train.autocast_of(device, dtype))


if __name__ == "__main__":
    cli(main)
