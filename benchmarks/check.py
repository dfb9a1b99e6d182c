"""Has anything become slower? Measures again and compares ratios with the recorded ones: python -m benchmarks.check

Run by hand before a release, on a quiet machine of the kind that results/ was made on. Absolute
times are never compared: another machine has others. A ratio, ours over a peer's in the same run,
has to keep 85 % of what results/*.csv records. Writes nothing; exits with status 1 if something
fell below.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import ROOT
from common.command import Parser, cli
from common.io import UserError
from common.train import pick_device
from experiments.tables import read_csv

LEAST = 0.85


def train_ratios(rows):
    """rows of benchmarks.train -> {what: how many times as fast as transformers}."""
    case = "{candidate} {model} {image_size} {batch} {dtype} {decoder}".format
    ours = [r for r in rows if r["candidate"].startswith("AniMask") and r["over_transformers"]]
    return {case(**r): float(r["over_transformers"]) for r in ours}


def kernel_ratios(rows):
    """rows of benchmarks.kernels -> {what: how many times as fast as the obvious way of writing
    it}.
    """
    case = "{operation} {batch} {size} {patch} {ratio}".format
    slow = {case(**r): float(r["ms"]) for r in rows if r["impl"] == "obvious"}
    others = [r for r in rows if r["impl"] != "obvious"]
    return {f"{r['impl']} {case(**r)}": slow[case(**r)] / float(r["ms"]) for r in others}


BENCHES = {  # module: (its arguments, the file that it writes on a CPU and on a GPU, its ratios)
    "train": (
        ["--quick"],
        {"cpu": "bench_train_cpu.csv", "cuda": "bench_train_cuda.csv"},
        train_ratios,
    ),
    "kernels": ([], {"cpu": "bench_kernels_cpu.csv", "cuda": "bench_kernels.csv"}, kernel_ratios),
}


def measure(module, device, folder):
    """Run a bench on this device, its files in `folder` -> its rows."""
    words, files, _ = BENCHES[module]
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{module}",
        "--device",
        device,
        *words,
        "--out",
        folder,
    ]
    if status := subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"benchmarks.{module} ended with status {status}; its message is above")
    return read_csv(Path(folder) / files[device])


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "benches", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)} (default: all)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="what is recorded"
    )
    args = parser.parse_args()
    device, slower = pick_device(args.device).type, 0
    for module in args.benches or BENCHES:
        if module not in BENCHES:
            raise UserError(f"{module} is no bench with ratios; there are: {', '.join(BENCHES)}")
        _, files, ratios = BENCHES[module]
        path = args.results / files[device]
        if not path.exists():
            raise UserError(f"{path} is not there: python -m benchmarks.{module} makes it")
        with tempfile.TemporaryDirectory() as folder:
            recorded, measured = ratios(read_csv(path)), ratios(measure(module, device, folder))
        kept = {what: now / recorded[what] for what, now in measured.items() if what in recorded}
        if not kept:
            raise UserError(f"nothing that benchmarks.{module} measures is recorded in {path}")
        for what, share in sorted(kept.items(), key=lambda pair: pair[1]):
            line = f"{share:7.1%}  {measured[what]:.2f} against {recorded[what]:.2f}: {what}"
            print("SLOWER" if share < LEAST else "as fast", line)
            slower += share < LEAST
    if slower:
        print(f"{slower} ratios kept less than {LEAST:.0%}")
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
