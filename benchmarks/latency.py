"""How long an answer takes, by torch and by onnxruntime: python -m benchmarks.latency runs/NAME [runs/NAME-lora ...]

What export.py --to onnx writes of each run, on the CPU, in fp32, side by side and in turns;
medians. Into runs/bench/bench_latency.csv (--out results: into git).
"""

import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

from benchmarks import OUT, about
from common.command import Parser, at_least, claim, cli
from experiments.tables import save_csv
from export import graph_of, save_onnx


@torch.no_grad()
def measure(run, batches, turns):
    """Yield a row for each size of a batch of noise: medians of both."""
    graph, facts = graph_of(run)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(run, path)
        onnx = onnxruntime.InferenceSession(str(path), options)
        megabytes = path.stat().st_size / 2**20
    for B in batches:
        x = torch.randint(256, (B, *graph.example.shape[1:]), dtype=torch.uint8)
        ways = {
            "torch_ms": lambda x=x: graph(x),
            "onnx_ms": lambda x=x: onnx.run(None, {"images": x.numpy()}),
        }
        found = {name: [] for name in ways}
        for _ in range(turns + 1):
            for name, call in ways.items():
                start_time = time.perf_counter()
                call()
                found[name].append(1000 * (time.perf_counter() - start_time))
        row = {
            name: round(statistics.median(times[1:]), 2) for name, times in found.items()
        }  # the first warms up
        yield {
            "run": str(run),
            "is": facts["is"],
            "side": facts["side"],
            "pictures": B,
            **row,
            "onnx_over_torch": round(row["onnx_ms"] / row["torch_ms"], 2),
            "file_mb": round(megabytes, 1),
            **about(torch.device("cpu"), onnxruntime=onnxruntime.__version__),
        }


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="encoders, recognisers, taggers")
    add(
        "--batch-size",
        type=at_least(1),
        nargs="+",
        default=[1, 16],
        metavar="B",
        help="pictures at once (1 16)",
    )
    add("--turns", type=at_least(1), default=20, help="that are timed (default: 20)")
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the table (default: runs/bench)",
    )
    args, rows = parser.parse_args(), []
    claim([args.out / "bench_latency.csv"])
    for run in args.runs:
        for row in measure(run, args.batch_size, args.turns):
            rows.append(row)
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    save_csv(args.out / "bench_latency.csv", rows)
    print(f"wrote    {args.out}/bench_latency.csv")


if __name__ == "__main__":
    cli(main)
