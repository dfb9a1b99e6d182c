"""Stage 8: where are the faces? Learn it from pages with boxes, and find them in any picture.

    python detect.py weights/toon --data datasets/scenes
    # outlines; --crop: faces, which data.py reads
    python detect.py runs/NAME-det PICTURE... --out found

Reads:  an encoder; datasets/NAME with boxes: python data.py scenes draws such a set, data.py PATH
        --detect packs one
Writes: runs/NAME-det/ detector.safetensors, state.pt (what a resumed run needs), log.jsonl,
metrics.json,
        precision.png, pages.png; with pictures a JSON line for each on standard output

The network and its loss are in common/detection.py. It learns from crops of pages, which are larger
in the last epochs, and is asked about whole pages; its choices (the threshold) are made on dev.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import itertools
import json
import shlex
import sys
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
from common import detection, distributed, train
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
)
from common.features import name_of, open_splits, split_suffix, untrained_like
from common.io import UserError, atomic, read_json, save_json, save_safetensors
from common.lora import fingerprint
from finetune_lora import add_lora, merge_lora
from ingest.pictures import tell_problems, whole_pictures

LOG_EVERY, CLIP, CHUNK = 10, 1.0, 16  # steps, norm of the gradient, pages at a time
RATES = {"lora": 2e-3, "full": 1e-3, "linear": 2e-3}  # peak learning rates
RESULTS = ("metrics*.json", "detector.safetensors", "precision*.png", "pages*.png")
NO_CONFIG = (
    "out",
    "resume",
    "given",
    "log",
    "device",
    "eval_on",
    "encoder",
    "pictures",
    "crop",
    "margin",
    "threshold",
    "side",
)


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="runs/NAME, or a checkpoint of MAE, DINO, timm or HF; "
        "to use what was learned runs/NAME-det",
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="file, folder, archive")
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add(
        "--data",
        metavar="DIR",
        help="set with boxes: python data.py scenes makes one (default: datasets/scenes)",
    )
    add(
        "--boxes",
        default="boxes",
        choices=["boxes", "heads"],
        help="faces, or heads with hair and hats",
    )
    add(
        "--out",
        metavar="DIR",
        help="run folder (default: the encoder's and det); of pictures, a folder for them",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint",
    )
    add("--eval-on", default="val", choices=["val", "test", "dev"], help="split that is reported")
    add = parser.add_argument_group("how").add_argument
    add(
        "--method",
        default="full",
        choices=RATES,
        help="of the encoder: frozen (linear), low-rank, everything",
    )
    add(
        "--from-scratch",
        action="store_true",
        help="control: the encoder begins with random weights",
    )
    add(
        "--page",
        type=between(32, 4096, int),
        metavar="PX",
        help="side of whole pages (default: 1.75 times --view)",
    )
    add(
        "--view",
        type=between(16, 4096, int),
        default=128,
        metavar="PX",
        help="side of crops, in pixels",
    )
    add("--epochs", type=at_least(1), default=16, help="passes over the pages")
    add(
        "--late",
        type=between(0, 1),
        default=0.25,
        metavar="SHARE",
        help="of the epochs, the last ones: crops are nearly whole pages",
    )
    add("--batch-size", type=at_least(1), default=16, metavar="B", help="crops of a step")
    add(
        "--lr",
        type=between(0, 1),
        help="peak learning rate (default: lora 2e-3, linear 2e-3, full 1e-3)",
    )
    add(
        "--mosaic",
        type=between(0, 1),
        default=0.3,
        metavar="SHARE",
        help="of the steps whose crops show four pages",
    )
    add(
        "--colour",
        type=between(0, 1),
        default=0.3,
        metavar="X",
        help="brightness, contrast, saturation times 1 +- X",
    )
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation")
    add = parser.add_argument_group("what is done with pictures").add_argument
    add("--crop", action="store_true", help="write each face as a picture of its own")
    add(
        "--margin",
        type=between(0, 3),
        default=detection.MARGIN,
        help="room around a cropped face, as a share of it",
    )
    add(
        "--threshold",
        type=between(0, 1),
        metavar="SCORE",
        help="of an answer, at least (default: dev's best)",
    )
    add(
        "--side",
        type=between(32, 4096, int),
        metavar="PX",
        help="pictures are resized to it (default: as trained)",
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
    training = not args.pictures
    refuse_unused(
        args,
        (
            (
                "data boxes resume eval-on method from-scratch page view epochs late "
                "batch-size lr mosaic colour seed log",
                training,
                "is for training, not for pictures",
            ),
            (
                "crop margin threshold side",
                not training,
                "is for pictures: python detect.py runs/NAME-det PICTURE",
            ),
            ("margin", args.crop, "is for --crop"),
        ),
    )
    if args.from_scratch and args.method != "full":
        raise UserError(
            f"--from-scratch trains all weights; with --method {args.method} they would stay random: "
            "give --method full"
        )


# ---- the data ------------------------------------------------------------------------------------


def open_task(args, device, autocast):
    """-> what a run works with, a namespace."""
    task, splits = (
        SimpleNamespace(args=args, device=device, autocast=autocast),
        open_splits(args.data, args.eval_on),
    )
    train_split, task.report = splits["train"], splits[args.eval_on]
    rows = torch.arange(len(train_split["images"]))
    apart = torch.from_numpy(
        data.hold_apart(data.groups_of(train_split), np.zeros(len(rows)), data.APART)
    )
    task.rows = rows if "dev" in splits else rows[~apart]
    task.train, task.dev = (
        train_split,
        (splits["dev"], None) if "dev" in splits else (train_split, rows[apart]),
    )
    parts = {"train": (train_split, task.rows), "dev": task.dev, args.eval_on: (task.report, None)}
    for name, (split, some) in parts.items():
        if args.boxes not in split or (boxes_of(split, args.boxes, some) < 0).all():
            raise UserError(
                f"{args.data} has no {args.boxes} on pages of {name}; python data.py scenes draws pages "
                "with some, python data.py PATH --detect packs your own"
            )
    two = 2 * load_encoder(args.encoder)[0].patch_size  # a cell of the coarsest map
    task.page = args.page or args.view * 7 // 4 // two * two
    if args.view > task.page:
        raise UserError(
            f"--view {args.view} is larger than the pages of {task.page} px; give at most that"
        )
    if args.view % two or task.page % two:
        raise UserError(
            f"--view {args.view} and pages of {task.page} px must be multiples of {two}, two patches of "
            f"{args.encoder}"
        )
    task.late = max(
        args.view, task.page * 6 // 7 // two * two
    )  # side of the crops of the last epochs
    task.encoder, _ = load_encoder(args.encoder, task.page)
    config = {k: v for k, v in vars(args).items() if k not in NO_CONFIG}
    task.config = config | {
        "encoder": fingerprint(task.encoder),
        "images": data.fingerprint(train_split),
        "truth": blake2b(np.array(train_split[args.boxes]), digest_size=6).hexdigest(),
    }
    return task


def boxes_of(split, name, rows):
    """-> (n, K, 4) fp32, in shares of the pages; -1 fills up. rows: None takes all."""
    return torch.from_numpy(np.array(split[name] if rows is None else split[name][rows.numpy()]))


def crops(args, images, boxes, generator, side, least, most=1.0):
    """Pages u8 (B, ., ., 3), boxes (B, K, 4) in shares -> crops u8 (B, side, side, 3), boxes in
    their pixels.

    Crops have a share of `least` to `most` of the page's side; boxes of which little is left are
    taken out.
    """
    share = least + (most - least) * torch.rand(len(images), 1, generator=generator)
    corner = torch.rand(len(images), 2, generator=generator) * (1 - share)  # top, left
    flip = torch.rand(len(images), generator=generator) < 0.5
    view = data.view_images(images, torch.cat([corner, share, share], 1), flip, side)
    draws = torch.rand(len(images), 3, generator=generator)
    origin = corner.flip(1).repeat(1, 2)[:, None]
    there, moved = boxes[..., :1] >= 0, (boxes - origin) / share[:, None]
    mirrored = torch.stack([1 - moved[..., 2], moved[..., 1], 1 - moved[..., 0], moved[..., 3]], 2)
    moved = torch.where(flip[:, None, None], mirrored, moved)
    left = moved.clamp(0, 1)
    kept = there[..., 0] & (
        (left[..., 2:] - left[..., :2]).prod(2) > 0.3 * (moved[..., 2:] - moved[..., :2]).prod(2)
    )
    return data.jitter_colour(view, draws, args.colour), torch.where(
        kept[..., None], left * side, -1.0
    )


def mosaic(args, images, boxes, generator, side, least):
    """The same, each crop of four pages: the batch's, one further in each corner."""
    half, views, found = side // 2, [], []
    for turn, (y, x) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
        view, own = crops(
            args, images.roll(turn, 0), boxes.roll(turn, 0), generator, half, 0.7 * least, 0.7
        )
        views.append(view)
        found.append(torch.where(own >= 0, own + torch.tensor([x, y, x, y]), own))
    rows = torch.cat(views[:2], 2), torch.cat(views[2:], 2)
    return torch.cat(rows, 1), torch.cat(found, 1)


# ---- a run ---------------------------------------------------------------------------------------


def build(task):
    """-> the network on the device, and its optimizer."""
    args, encoder = task.args, task.encoder
    torch.manual_seed(args.seed)
    if args.from_scratch:
        encoder = untrained_like(encoder, args.seed)
    encoder.requires_grad_(args.method == "full")
    if args.method == "lora":
        add_lora(encoder)
    net = detection.Detector(encoder).to(task.device)
    return net, train.make_optimizer(net, args.lr, 0.05, (0.9, 0.999))


def learn(task, net, optimizer, state, log):
    """Train for --epochs, or what `state` leaves of them -> seconds."""
    args, out, n = task.args, Path(task.args.out), len(task.rows)
    B = min(args.batch_size, n)
    per_epoch, step, seconds = n // B, 0, 0.0
    if "model" in state:
        with train.taking_up(out / "state.pt"):
            load_exactly(net, state["model"], out / "state.pt")
            train.load_optimizer(optimizer, state["optimizer"])
            step, seconds = state["step"], state["seconds"]
    late, total = round((1 - args.late) * args.epochs), args.epochs * per_epoch
    images = data.resident(task.train, task.device)
    stop_signal, meter, pacer = (
        train.catch_signals(),
        train.Meter(B, task.device, seconds),
        train.Pacer(),
    )

    def save():
        train.save_state(
            {
                "config": task.config,
                "model": net.state_dict(),
                "step": step,
                "seconds": meter.seconds(),
                "optimizer": optimizer.state_dict(),
            },
            out / "state.pt",
        )

    bar = progress(total=total, initial=step, unit="step")
    for epoch in range(step // per_epoch, args.epochs):
        order = task.rows[data.epoch_order(n, args.seed, epoch)]
        for rows, pages in meter.timed(
            data.batches(images, order, B, task.device, step % per_epoch)
        ):
            loss = step_loss(
                task, net.train(), rows, pages, epoch >= late, train.seeded(args.seed, epoch, step)
            )
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            train.set_lr(optimizer, train.lr_at(step, total, 0.1 * total, args.lr))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            meter.add(loss.detach(), grad_norm)
            stop = stop_signal[0] if stop_signal else 0
            if step % LOG_EVERY == 0 or step == total or stop:
                row = meter.row(step, f"try a smaller --lr than {args.lr:g}")
                log(step=step, epoch=round(step / per_epoch, 3), **row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if stop or step == total or pacer.due():
                pacer.time(save)
                meter.restart()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    return meter.seconds()


def step_loss(task, net, rows, pages, late, generator):
    """The loss of a batch of crops; a crop stands at some place of the encoder's grid, as crops of
    whole pages do.
    """
    args, boxes = task.args, boxes_of(task.train, task.args.boxes, rows)
    cut = mosaic if torch.rand(1, generator=generator) < args.mosaic else crops
    side, least = (task.late, 0.7) if late else (args.view, 0.5)
    view, boxes = cut(args, pages, boxes, generator, side, least)
    room = (task.page - side) // net.patch + 1
    corner = torch.randint(room, (2,), generator=generator).tolist()
    with task.autocast():
        logits, said = net(view, corner)
    return detection.loss_of(logits, said, boxes.to(task.device), side, net.patch)


def write_results(task, net, seconds):
    """-> the row of metrics.json: how good it is on the reported split, by a threshold of dev; and
    the answers there.
    """
    args, out = task.args, Path(task.args.out)
    answers, truth = judge(task, net, *task.dev)
    threshold = detection.best_threshold(answers, truth)
    answers, truth = judge(task, net, task.report, None)
    side = task.report["images"].shape[1]  # sizes of faces are told in pixels of the packed pages
    row, precision = detection.coco(answers, truth, side)
    row = {
        "run": out.name,
        "seed": args.seed,
        "data": args.data,
        "evaluated_on": args.eval_on,
    } | row
    row |= {
        "threshold": threshold,
        "mistakes": detection.mistakes(answers, truth, threshold, side),
        "precision": precision,
        "pages": len(truth),
        "faces": sum(map(len, truth)),
        "seconds": round(seconds, 1),
        "config": task.config,
        "command": command(),
        "machine": train.machine(task.device),
        "commit": train.commit(),
    }
    return row, answers


def draw(task, row, answers):
    """precision.png, and pages.png: pages of the reported split with outlines."""
    from common import plots
    from ingest.toon import write_sheet

    args, out = task.args, Path(task.args.out)
    suffix = split_suffix(args.eval_on)
    title = f"{out.name} on {args.eval_on} of {Path(args.data).name}"
    plots.plot_precision(out / f"precision{suffix}.png", row["precision"], row, title)
    pages = [
        outlined(np.array(task.report["images"][i]), answers[i], row["threshold"])
        for i in data.evenly_spaced(len(answers), 8).tolist()
    ]
    write_sheet(out / f"pages{suffix}.png", pages, 2, 4, task.page)


def judge(task, net, split, rows):
    """-> answers and truth of pages, lists in the order of rows."""
    every, answers = torch.arange(len(split["images"])) if rows is None else rows, []
    net.eval()
    for some in progress(every.split(CHUNK), "judging"):
        view = data.view_images(
            data.take(split["images"], some, task.device), *data.full_boxes(len(some)), task.page
        )
        with task.autocast():
            answers += detection.detect(net, view)
    return answers, [own[own[:, 0] >= 0] for own in boxes_of(split, task.args.boxes, rows)]


def outlined(page, answer, threshold):
    from ingest.scenes import outlined as draw

    boxes, scores = answer
    return draw(page, boxes[scores >= threshold].numpy())


def run(args, device, autocast):
    """A run from its beginning to metrics.json -> what stands there. What is finished is only read."""
    task, out = open_task(args, device, autocast), Path(args.out)
    state, finished = (
        train.open_run(out, task.config, args.resume, RESULTS) or {},
        out / f"metrics{split_suffix(args.eval_on)}.json",
    )
    out.mkdir(parents=True, exist_ok=True)
    if state and finished.exists():
        print(f"run      {out} is finished")
        return read_json(finished)
    log = train.Log(out / "log.jsonl", state.get("step", -1), args.log, task.config)
    net, optimizer = build(task)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(
        f"data     {args.data}: {len(task.rows)} pages of {task.page} px, crops of {args.view}, late {task.late} px\n"
        f"run      {out}: {args.method}, {count:,} parameters trained, {args.epochs} epochs, rate {args.lr:g}"
    )
    seconds = learn(task, net, optimizer, state, log)
    if args.method == "lora":  # the file is a plain network
        merge_lora(net.encoder)
    row, answers = write_results(task, net, seconds)
    header = {
        "detector": net.config,
        "base": args.encoder,
        "page": task.page,
        "threshold": row["threshold"],
        "run": task.config,
    }
    save_safetensors(net.state_dict(), out / "detector.safetensors", header)
    save_json(row, finished)
    with drawing("precision.png or pages.png"):
        draw(task, row, answers)
    log.pictures()
    wrong = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in row["mistakes"].items())
    print(
        f"{args.eval_on:<9}AP {row['ap']:.1f}, AP50 {row['ap50']:.1f}, AP75 {row['ap75']:.1f} %; "
        f"{row['faces']} faces on {row['pages']} pages\nanswers  {wrong}, at a score of {row['threshold']:g}\n"
        f"wrote    {out}/ after {seconds:.0f} s\nnext: python detect.py {shlex.quote(str(out))} PICTURE --out found"
    )
    return row


# ---- use -----------------------------------------------------------------------------------------


def use(args, device, autocast):
    """A JSON line for each picture; --out: the pictures with outlines, or, by --crop, the faces."""
    net, header = detection.load(args.encoder)
    net, threshold = (
        net.to(device),
        header["threshold"] if args.threshold is None else args.threshold,
    )
    if args.crop and not args.out:
        raise UserError("--crop writes pictures; --out DIR says where")
    if args.out:
        claim([], Path(args.out) / ".lock")
    problems, count, taken = [], 0, set()
    for key, picture in whole_pictures(args.pictures, problems):
        with autocast():
            boxes, scores = detection.faces_of(net, picture, args.side or header["page"], threshold)
        count += 1
        print(
            json.dumps(
                {
                    "picture": key,
                    "width": picture.shape[1],
                    "height": picture.shape[0],
                    "faces": [
                        {"box": [round(x) for x in box], "score": round(score, 3)}
                        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
                    ],
                },
                ensure_ascii=False,
            )
        )
        if args.out:
            write_pictures(args, own_name(key, taken), picture, boxes)
    tell_problems(problems, count, False)
    if args.out:
        print(f"wrote    {args.out}/ of {count} pictures", file=sys.stderr)


def own_name(key, taken):
    """A picture's folder and name, with a number where another one's is the same -> what its
    results are called.
    """
    name = "-".join(part for part in Path(key).with_suffix("").parts[-2:] if part.strip("./"))
    own = next(
        n
        for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        if n not in taken
    )
    taken.add(own)
    return own


def write_pictures(args, name, picture, boxes):
    """The picture with outlines, or, by --crop, its faces."""
    from ingest.scenes import outlined as draw

    shown = {
        name: draw(picture, boxes.numpy() / np.array([picture.shape[1], picture.shape[0]] * 2))
    }
    if args.crop:
        shown = {
            f"{name}_{i}": detection.cut_out(picture, box, args.margin)
            for i, box in enumerate(boxes.tolist())
        }
    for stem, pixels in shown.items():
        path = Path(args.out) / f"{stem}.png"
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
        args.out = f"runs/{name_of(args.encoder)}-det{f'-s{args.seed}' if args.seed else ''}"
    if args.out is not None:
        refuse_file(args.out)
    autocast = train.autocast_of(device, dtype)
    if args.pictures:
        return use(args, device, autocast)
    args.lr = RATES[args.method] if args.lr is None else args.lr
    detection.needs_pycocotools()  # said now, not after the training
    print(f"machine  {train.machine(device)}\n         {args.dtype}: {dtype_reason}")
    load_encoder(args.encoder)  # what is wrong with it is said before a data set is made
    args.data = str(data.open_or_pack(args.data or "datasets/scenes"))
    run(args, device, autocast)


if __name__ == "__main__":
    cli(main)
