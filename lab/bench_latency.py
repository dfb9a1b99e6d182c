"""How long one answer of each model that ships takes: python -m lab.bench_latency [RUN ...]

Writes runs/bench/bench_latency.csv. torch on --device, and on a CPU also onnxruntime with what
apps.export --to onnx writes, in turns. A detector has no ONNX file. All in fp32, on drawn faces.
"""

import functools
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from apps import detect
from apps.export import PIP, graph_of, save_onnx
from common.train import cli, pick_device
from ingest import toon
from lab import bench

SHIPPED = ["weights/toon", "weights/toon-lora", "weights/toon-tags", "weights/toon-det"]
ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]  # missing
ONNX_VERSION = "none" if ONNX else version("onnxruntime")
KEYS = ("run", "pictures", "by")
BATCHES = (1, 16)  # pictures at once


def torch_answer(run, device):
    """A run -> answer(images u8 (B, S, S, 3) of the CPU), S, and what the run is."""
    if detect.is_detector(run):
        net, header = detect.load(run)
        net.to(device)
        return lambda images: detect.detect(net, images.to(device)), header["page"], "detector"
    graph, facts = graph_of(run)
    graph.to(device)
    if isinstance(graph.answer, functools.partial):  # of a recogniser, with its gallery
        known = vars(graph.answer.keywords["gallery"])
        known |= tree_map_only(torch.Tensor, lambda x: x.to(device), known)
    return lambda images: graph(images.to(device)), graph.example.shape[1], facts["is"]


def onnx_answer(run):
    """The same of onnxruntime, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(run, path)
        model = onnxruntime.InferenceSession(str(path), options)
    return lambda images: model.run(None, {"images": images.numpy()})


@torch.no_grad()
def measure(table, run, batches, turns, device):
    """Add a row for each size of a batch and each library."""
    answer, side, kind = torch_answer(run, device)
    answers = {"torch": answer}
    if device.type == "cpu" and kind != "detector" and not ONNX:
        answers["onnxruntime"] = onnx_answer(run)
    for B in batches:
        if all(table.find(run=run, pictures=B, by=by) for by in answers):
            continue
        faces = [toon.draw(item, side)["image"] for item in toon.plan(B)]
        images = torch.from_numpy(np.stack(faces))
        calls = {by: functools.partial(call, images) for by, call in answers.items()}
        times = bench.in_turns(calls, turns, lambda call: bench.milliseconds(call, device))
        for by, columns in bench.compared(times, "torch").items():
            row = {"run": run, "pictures": B, "by": by, "is": kind, "side": side}
            table.add(row | columns)


def main():
    parser = bench.parser_of(__doc__)
    parser.add_argument("runs", nargs="*", default=SHIPPED, metavar="RUN", help="of any stage")
    args = parser.parse_args()
    device = pick_device(args.device)
    if ONNX:
        print(f"note: onnxruntime is left out, because {ONNX[0]} is missing: {PIP}")
    table = bench.Table(args.out / "bench_latency.csv", KEYS, device, onnxruntime=ONNX_VERSION)
    for run in args.runs:
        measure(table, run, (1,) if args.small else BATCHES, args.turns, device)
    print(f"wrote    {table.path}")


if __name__ == "__main__":
    cli(main)
