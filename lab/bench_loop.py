"""Ways to run the loop of pretrain.py on a GPU: 150 steps of each, how long they take, whether losses agree.

    python -m lab.bench_loop

Writes: OUT/bench_loop.csv, a row for each way. `apart_10` and `apart_150` are the largest relative
differences of a loss from that of the first way, in so many steps (fewer with --small): what rounds
otherwise drifts apart slowly, and a recording that repeats a number which should have changed does
so at once.
"""

import itertools
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import pretrain
from common import train
from common.train import cli, pick_device, refuse_useless
from lab import bench

RECIPE = "--mask attn_high --ratio 0.75 --epochs 50 --eval-every 50"  # of the demo set: 150 steps
SMALL = "--model nano:depth=1,image_size=32 --mask random --epochs 1 --batch-size 128 --no-compile"
WARM = 50  # steps that are not timed: in the first ones, kernels are compiled and recorded


def run_way(name, words):
    """Train so, in this process -> losses of all steps, the ms of each, seconds until the first has ended."""
    if name == "without graphs":
        compiled = torch.compile
        torch.compile = lambda function, mode=None: compiled(function)
    if name == "without cuDNN's attention":
        torch.backends.cuda.enable_cudnn_sdp(False)
    losses, times = [], []
    update = train.Run.update

    def noted(run, loss, grad_norm):
        losses.append(loss.item())
        times.append(bench.now(run.device))
        update(run, loss, grad_norm)

    train.Run.update = noted
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        sys.argv = ["pretrain.py", *words.split(), "--out", str(Path(folder) / "run")]
        pretrain.main()
    ms = [1000 * (after - before) for before, after in itertools.pairwise(times)]
    return losses, ms, times[0] - start


def apart(losses, others):
    """The largest relative difference of a loss."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def main():
    args = bench.parser_of(__doc__).parse_args()
    refuse_useless(args.given & {"turns"}, "here, where each way runs once")
    device = pick_device(args.device)
    table = bench.Table(args.out / "bench_loop.csv", device)
    words = f"{SMALL if args.small else RECIPE} --device {device}"
    first = None
    for name in ("as it is", "without graphs", "without cuDNN's attention"):
        losses, ms, seconds = bench.alone(run_way, name, words)
        first = first or losses
        row = {"way": name, "steps": len(losses), "first_step_s": round(seconds, 1)}
        row["step_ms"] = round(statistics.median(ms[WARM:] or ms), 2)
        row["last_loss"] = round(losses[-1], 5)
        row["apart_10"] = f"{apart(losses[:10], first[:10]):.1e}"
        row["apart_150"] = f"{apart(losses, first):.1e}"
        table.add(row)
    print(f"wrote    {table.path}")


if __name__ == "__main__":
    cli(main)
