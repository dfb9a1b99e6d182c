"""Where are the faces: what does pre-training bring, and what must learn? Arms of detect.py, several seeds each.

    python -m experiments.detection weights/toon --data datasets/scenes --seeds 3 --out \\
        results/detection
    python -m experiments.detection runs/NAME-det --sides --data datasets/scenes --out \\
        results/detection
    python -m experiments.detection weights/toon-det --names weights/toon-lora --out \\
        results/detection

Reads:  what detect.py reads; its runs under --work, which are made if they are not there
Writes: OUT/arms.csv, a row a run with the command that makes it again; arms.md, arms.png; with
--sides OUT/sides.csv:
        how good a detector is, and how long it takes, on pages of other sizes; with --names
        OUT/names.json: what a
        recogniser says of the faces that it finds, where the painter knows who they are
"""

import shlex
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

import detect
import recognize
from common import plots, stats
from common.command import Parser, at_least, cli, command, progress, refuse_file
from common.features import open_splits
from common.io import UserError, save_json, save_text
from common.train import autocast_of, commit, machine, pick_dtype
from experiments.arms import add_flags, answers, by_arm, cell, plot_seeds, run_all
from experiments.tables import read_csv, replace_rows
from finetune_lora import load_classifier
from ingest import scenes

ARMS = {  # flags of detect.py, and what they say
    "full": ("--method full", "all weights learn, from a pre-trained encoder"),
    "lora": ("--method lora", "low-rank adapters in the encoder"),
    "linear": ("--method linear", "the encoder is frozen"),
    "scratch": ("--method scratch", "all weights learn, from random ones"),
}
HEADINGS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "small",
    "ap_medium": "medium",
    "ap_large": "large",
    "ar": "AR",
}
QUESTIONS = tuple(
    ((arm, column), ("scratch", column), f"{HEADINGS[column]}, `{arm}` against `scratch`")
    for arm in ("full", "lora", "linear")
    for column in ("ap", "ap50")
)
SIDES = (128, 160, 192, 224, 256, 320, 384)  # pixels, of pages


def words_of(args, arm, seed, more=()):
    """A run's folder, and what a user would type behind `python` to make it."""
    out = Path(args.work) / Path(args.data).name / f"{arm}-s{seed}"
    return out, [
        "detect.py",
        args.encoder,
        "--data",
        args.data,
        "--seed",
        str(seed),
        *shlex.split(ARMS[arm][0]),
        *shlex.split(args.flags),
        "--out",
        str(out),
    ]


def row_of(args, found):
    columns = (*HEADINGS, "threshold", "seconds", "machine", "commit")
    return {column: found[column] for column in columns}


def in_words(row):
    return ", ".join(f"{HEADINGS[k]} {row[k]:.1f}" for k in ("ap", "ap50", "ap75"))


def write_table(args, rows):
    """OUT/arms.md and arms.png of the rows that are there."""
    arms, out = by_arm(rows, ARMS), Path(args.out)
    title = f"Arms of detect.py on {Path(args.data).name}, val; mean ± std over seeds, in percent"
    lines = [
        f"# {title}",
        "",
        "| arm | seeds | " + " | ".join(HEADINGS.values()) + " | minutes |",
        "|---" * (len(HEADINGS) + 3) + "|",
    ]
    for arm, seeds in arms.items():
        minutes = stats.mean_std([float(r["seconds"]) / 60 for r in seeds.values()])["mean"]
        cells = [
            f"`{arm}`: {ARMS[arm][1]}",
            str(len(seeds)),
            *(cell(seeds, c) for c in HEADINGS),
            f"{minutes:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    flags = f"`{args.flags or 'the defaults'}`"
    lines += [
        "",
        f"Every run with {flags}, {args.threads} thread(s) a run, {args.jobs} at once; minutes are those of "
        "training. AP as COCO has it, over IoU .5 to .95; a face is small under 32 x 32 pixels of a packed page, "
        "large over 96 x 96.",
        "",
        "| difference, points | mean (95 % t interval over paired seeds) |",
        "|---|---|",
        *answers(arms, QUESTIONS),
        "",
        "![AP by arm](arms.png)",
        "",
    ]
    save_text("\n".join(lines), out / "arms.md")
    with plots.panels(
        out / "arms.png", f"Faces found: {Path(args.data).name}, val", 1, 1, (7.2, 3.4)
    ) as axis:
        plot_seeds(axis, arms, (("ap50", plots.BLUE, "o", "AP50"), ("ap", plots.ORANGE, "s", "AP")))
        plots.percent(axis)
        axis.set(ylabel="AP on val, %")
        axis.legend()


def sides(args, device=torch.device("cpu")):  # noqa: B008
    """OUT/sides.csv: a detector asked at each of SIDES, about val; seconds are those of one page at
    a time.
    """
    net, header = detect.load(args.encoder)
    autocast, split = (
        autocast_of(device, pick_dtype("auto", device)[0]),
        open_splits(args.data, "val")["val"],
    )
    if "boxes" not in split:
        raise UserError(f"{args.data} has no boxes; python data.py scenes draws pages with some")
    packed = split["images"].shape[1]
    for side in SIDES:
        task = SimpleNamespace(
            boxes=header["run"]["boxes"], device=device, autocast=autocast, page=side
        )
        said, truth = detect.judge(task, net, split, torch.arange(len(split["images"])))
        found = detect.coco(said, truth, packed)
        took = []
        for page in split["images"][:16]:
            start_time = time.perf_counter()
            with autocast():
                detect.faces_of(net, page, side, header["threshold"])
            took.append(1000 * (time.perf_counter() - start_time))
        row = {"detector": args.encoder, "side": side} | {k: found[k] for k in HEADINGS}
        row |= {"ms": round(statistics.median(took), 1)}
        row |= {
            "pages_per_s": round(1000 / row["ms"], 1),
            "machine": machine(device),
            "commit": commit(),
        }
        replace_rows(
            Path(args.out) / "sides.csv", [row | {"command": command()}], ("detector", "side")
        )
        print(f"{side} px: {in_words(row)}, {row['ms']} ms a page", flush=True)


def names(detector, recogniser, pages, side=512):
    """Pages as scenes.plan has them -> {right, wrong, unknown, background: answers, missed: faces;
    median widths}.

    Widths of the answers that are right and of the unknown are in pixels of a page of 256.
    """
    (net, about), (known, header), widths = (
        detect.load(detector),
        load_classifier(recogniser),
        defaultdict(list),
    )
    gallery, found = (
        recognize.open_gallery(recogniser),
        dict.fromkeys(("right", "wrong", "unknown", "background", "missed"), 0),
    )
    for page in map(lambda item: scenes.draw(item, side), progress(pages, "naming")):
        true, seen = side * torch.from_numpy(page["boxes"][: len(page["names"])]), set()
        boxes, _ = detect.faces_of(net, page["image"], about["page"], about["threshold"])
        for box in boxes:
            cut = detect.cut_out(page["image"], box.tolist(), detect.MARGIN, header["packed_size"])
            row = recognize.answers(
                [""], *recognize.embed(known, cut[None], nullcontext), gallery, 0
            )[0]
            own = [i for i, x in enumerate(detect.iou(box, true).tolist()) if x >= 0.5]
            right = row["name"] in [page["names"][i] for i in own]
            said = (
                "background"
                if not own
                else "unknown"
                if not row["known"]
                else "right"
                if right
                else "wrong"
            )
            found[said] += 1
            widths[said].append(256 / side * (box[2] - box[0]).item())
            seen |= set(own)
        found["missed"] += len(true) - len(seen)
    return found | {
        f"{k}_width": round(statistics.median(widths[k] or [0]), 1) for k in ("right", "unknown")
    }


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="as for detect.py; with --sides a run of it")
    add(
        "--data",
        default="datasets/scenes",
        metavar="DIR",
        help="set with boxes (default: %(default)s)",
    )
    add(
        "--arms",
        nargs="+",
        default=list(ARMS),
        choices=ARMS,
        metavar="ARM",
        help=f"default: {' '.join(ARMS)}",
    )
    add(
        "--seeds",
        type=at_least(1),
        default=3,
        metavar="N",
        help="of each arm, from 0 on (default: 3)",
    )
    add("--sides", action="store_true", help="a detector on pages of other sizes, instead")
    add(
        "--names",
        metavar="RUN",
        help="what this recogniser says of the faces that a detector finds on val, instead",
    )
    add_flags(add, "detect.py", "runs/detection")
    args = parser.parse_args()
    refuse_file(args.out)
    if args.names:
        found = names(
            args.encoder, args.names, [item for item in scenes.plan() if item["split"] == "val"]
        )
        row = found | {
            "command": command(),
            "machine": machine(torch.device("cpu")),
            "commit": commit(),
        }
        save_json(row, Path(args.out) / "names.json")
        return print(", ".join(f"{n} {name}" for name, n in found.items()))
    if not (Path(args.data) / "train.safetensors").exists():
        raise UserError(f"{args.data} is no packed set; python data.py scenes makes one")
    if args.sides:
        return sides(args)
    jobs = [(arm, seed, ()) for seed in range(args.seeds) for arm in args.arms]
    run_all(args, jobs, Path(args.out) / "arms.csv", words_of, row_of, in_words)
    write_table(args, read_csv(Path(args.out) / "arms.csv"))
    print(f"wrote    {args.out}/arms.csv, arms.md, arms.png")


if __name__ == "__main__":
    cli(main)
