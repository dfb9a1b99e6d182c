"""A recogniser asked at other sizes than it was trained at: python -m benchmarks.sides runs/NAME-lora --data datasets/X

Positions are resized, pictures as well (over the packed size nothing new is in them). Top-1 on val,
and milliseconds to look at one picture and at 16 at once (recognize.py looks at the mirror image,
too). Into runs/bench/bench_sides.csv (--out results: into git).
"""

import statistics
from pathlib import Path

import torch

import data
from benchmarks import OUT, about, now
from common.checkpoints import resize_positions
from common.command import Parser, at_least, claim, cli
from common.io import UserError
from common.train import autocast_of, pick_dtype
from experiments.tables import save_csv
from finetune_lora import load_classifier

CPU = torch.device("cpu")


@torch.no_grad()
def measure(run, data_dir, side, turns, autocast):
    """-> a row."""
    net, header = load_classifier(run)
    encoder, split = net.encoder, data.open_split(data_dir, "val")
    if side % encoder.patch_size:
        raise UserError(
            f"{run} has patches of {encoder.patch_size} px: --sides {side} is no multiple of it"
        )
    encoder.side, pos = side // encoder.patch_size, encoder.pos_embed
    encoder.pos_embed = resize_positions(pos, encoder.side)
    ids = torch.tensor([header["classes"].index(name) for name in split["header"]["classes"]])
    row, right = (
        {
            "run": str(run),
            "trained_at": header["image_size"],
            "side": side,
            "patches": encoder.side**2,
        },
        [],
    )

    def named(view):
        with autocast():
            pooled = net.pooled(*encoder.all_patches(view))
        return net.head(net.neck(pooled.float())).argmax(1)

    at_once = min(
        64, max(1, 2**25 // encoder.side**4)
    )  # attention needs memory for all pairs of patches
    for rows in torch.arange(len(split["images"])).split(at_once):
        view = data.view_images(
            data.take(split["images"], rows, CPU), *data.full_boxes(len(rows)), side
        )
        right.append(named(view) == ids[split["labels"][rows]])
    view = view[:1].repeat(16, 1, 1, 1)
    row["top1"] = round(100 * torch.cat(right).double().mean().item(), 2)
    for n in (1, 16):
        times = []
        for _ in range(turns + 1):  # the first warms up
            start_time = now(CPU)
            named(view[:n])
            times.append(1000 * (now(CPU) - start_time))
        row[f"ms_{n}"] = round(statistics.median(times[1:]), 2)
    return row | about(CPU)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="a recogniser: runs/NAME-lora, weights/toon-lora")
    add("--data", required=True, metavar="DIR", help="packed set of its characters")
    add(
        "--sides",
        type=at_least(8),
        nargs="+",
        default=[64, 96, 128, 192, 224, 320, 448],
        metavar="PX",
        help="of views (default: 64 to 448)",
    )
    add("--turns", type=at_least(1), default=10, help="that are timed (default: 10)")
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the table (default: runs/bench)",
    )
    args, rows = parser.parse_args(), []
    claim([args.out / "bench_sides.csv"])
    autocast = autocast_of(CPU, pick_dtype("auto", CPU)[0])
    for side in args.sides:
        rows.append(measure(args.run, args.data, side, args.turns, autocast))
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    save_csv(args.out / "bench_sides.csv", rows)
    print(f"wrote    {args.out}/bench_sides.csv")


if __name__ == "__main__":
    cli(main)
