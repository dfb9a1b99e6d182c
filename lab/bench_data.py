"""How fast the loader hands out images, and how much memory it takes: python -m lab.bench_data

Writes results/bench_data.csv. The packed file is made of noise and really written; it is read once before the clock
starts: what is measured is the way out of a warm page cache.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import loader
import plumbing


def noisy_split(folder, n, side):
    """A packed train split of n images of noise."""
    count = n * side * side * 3
    entries = {"__metadata__": {"animask": json.dumps({"classes": [], "keys": []})},
               "images": {"dtype": "U8", "shape": [n, side, side, 3], "data_offsets": [0, count]},
               "labels": {"dtype": "I64", "shape": [n], "data_offsets": [count, count + 8 * n]}}  # fmt: skip
    head = json.dumps(entries).encode().ljust(1024)
    with open(Path(folder) / "train.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        noise = np.random.default_rng(0).integers(0, 256, 2**26, dtype=np.uint8)
        for at in range(0, count, len(noise)):
            f.write(noise[: min(len(noise), count - at)].data)
        f.write(bytes(8 * n))
    return loader.open_split(folder, "train")


def anonymous_mb():
    """Memory of this process that no file backs, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def epoch(split, batch_size, number):
    """One shuffled epoch -> (images a second, most anonymous memory in MB)."""
    order, most, count = loader.epoch_order(len(split["images"]), 0, number), 0.0, 0
    began = time.perf_counter()
    for i, (index, _) in enumerate(loader.batches(split["images"], order, batch_size, torch.device("cpu"))):
        count += len(index)
        most = max(most, anonymous_mb()) if i % 64 == 0 else most
    return count / (time.perf_counter() - began), most


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=65536, help="images in the file (65536 of 128 px are 3.2 GB)")
    parser.add_argument("--side", type=int, default=128, help="their side in pixels")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", default="results/bench_data.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        split = noisy_split(folder, args.images, args.side)
        before = anonymous_mb()
        epoch(split, args.batch_size, 0)  # warms the page cache
        rates, memory = zip(*[epoch(split, args.batch_size, i) for i in (1, 2, 3)], strict=True)
    row = {"images": args.images, "side": args.side, "file_gb": round(args.images * args.side**2 * 3 / 1e9, 2),
           "images_per_s": round(statistics.median(rates)), "anonymous_mb_added": round(max(memory) - before, 1),
           "machine": plumbing.machine(torch.device("cpu")), "commit": plumbing.commit()}  # fmt: skip
    plumbing.save_csv(args.out, [row])
    print(", ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    plumbing.cli(main)
