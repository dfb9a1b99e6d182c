"""What a step of pre-training is made of: python -m lab.bench_parts [FLAGS of pretrain.py]

Starts pretrain.py as a user does, and stops it after some steps. Writes runs/bench/parts.json, and
prints it: ms of a step by the wall's clock and, on a GPU, how many kernels it has and their ms, by
kind. A step that takes longer than its kernels waits for its host.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from torch import profiler
from torch.autograd import DeviceType

import pretrain
from common import train
from common.train import UserError, cli, refuse_useless, save_json
from lab import bench

DEFAULT = "--mask attn_high:start=0 --ratio 0.75"
SMALL = "--model nano:depth=1,image_size=32,decoder_dim=32 --epochs 2 --batch-size 64 --mask random"
COUNTS = {"cuda": (40, 120, 10), "cpu": (3, 4, 1)}  # steps that compile, are timed, and profiled
KINDS = {  # by words of the names of kernels; the first that fits
    "handwritten": ("gather_kernel", "detail_kernel", "error_kernel", "gradient_kernel"),
    "compiled": ("triton_",),
    "attention": ("sdpa", "flash", "fmha", "attention", "cudnn"),
    "optimizer": ("multi_tensor", "FusedAdam"),
    "product": ("gemm", "nvjet", "cutlass", "cublas", "splitK"),
    "copy": ("Memcpy", "Memset", "copy", "CatArray"),
}


class Enough(Exception):
    """The run has been long enough."""


def watched(found):
    """A train.Run that writes what it measures into the dict `found`, and then raises Enough."""

    class Watched(train.Run):
        def resume_or_begin(self):
            super().resume_or_begin()
            warm, timed, profiled = COUNTS["cpu" if self.device.type == "cpu" else "cuda"]
            steps = 0, 1, warm, warm + timed, warm + timed + profiled
            self.marks = dict.fromkeys(steps, bench.now(self.device))
            self.profile = profiler.profile()

        def update(self, loss, grad_norm):
            super().update(loss, grad_norm)
            if self.step not in self.marks:
                return
            self.marks[self.step] = bench.now(self.device)
            begin, first, warm, timed, end = self.marks
            if self.step == timed:
                found["first_step_s"] = round(self.marks[first] - self.marks[begin], 1)
                seconds = self.marks[timed] - self.marks[warm]
                found["step_ms"] = round(1000 * seconds / (timed - warm), 3)
                found["peak_mb"] = round(train.peak_memory_mb(self.device))
                self.profile.start()
            if self.step == end:
                self.profile.stop()
                found.update(kernels_of(self.profile, end - timed))
                raise Enough

    return Watched


def kernels_of(profile, steps):
    """How many kernels a step has, their ms, by kind, and those that take most."""
    kinds, names = {}, {}
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            ms = event.time_range.elapsed_us() / 1000 / steps
            fits = (kind for kind, words in KINDS.items() if any(w in event.name for w in words))
            kind = next(fits, "other")
            kinds[kind] = kinds.get(kind, 0.0) + ms
            count, total = names.get(event.name[:100], (0.0, 0.0))
            names[event.name[:100]] = (count + 1 / steps, total + ms)
    if not kinds:
        return {}
    slow = sorted(names.items(), key=lambda item: -item[1][1])[:40]
    return {
        "kernels": round(sum(count for count, _ in names.values()), 1),
        "kernels_ms": round(sum(kinds.values()), 3),
        "by_kind_ms": {kind: round(ms, 3) for kind, ms in sorted(kinds.items())},
        "slowest": [f"{ms:.3f} ms, {count:.1f} x {name}" for name, (count, ms) in slow],
    }


def main():
    args, flags = bench.parser_of(__doc__).parse_known_args()
    refuse_useless(args.given & {"turns"}, "here, where one run is timed")
    flags = flags or (SMALL if args.small else DEFAULT).split()
    found = {"flags": " ".join(flags), "commit": train.commit()}
    train.Run = watched(found)
    pretrain.evaluate = lambda *args: {}
    pretrain.draw_masks = lambda *args: None
    folder = Path(tempfile.mkdtemp())
    sys.argv = ["pretrain.py", *flags, "--device", args.device, "--out", str(folder / "run")]
    try:
        pretrain.main()
        raise UserError("the run ended before its steps were timed; give it more --epochs")
    except Enough:
        found["machine"] = train.machine(train.pick_device(args.device))
        save_json(found, args.out / "parts.json")
        print(json.dumps({k: v for k, v in found.items() if k != "slowest"}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    cli(main)
