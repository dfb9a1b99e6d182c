"""How fast images are packed and handed out, and what memory that takes: python -m benchmarks.data [--pack N | --scale]

Without --pack: the loader, into results/bench_data.csv. With it: data.py on so many generated JPEGs of 512 px, and the
opening of a table of a million rows, into results/bench_pack.csv. With --scale: files of 10,000 to a million images of
32 px, epochs of the loader and some steps of pretrain.py on each, into results/bench_scale.csv.
For the loader the packed file is made of noise and really written; it is read once before the clock starts: what is
measured is the way out of a warm page cache.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from common.io import UserError, cli, save_csv
from common.train import commit, machine, read_log
from ingest import toon

SCALE = (10_000, 100_000, 1_000_000)


def noisy_split(folder, n, side, name="train"):
    """A packed split of n images of noise."""
    count = n * side * side * 3
    entries = {"__metadata__": {"animask": json.dumps({"classes": [], "keys": []})},
               "images": {"dtype": "U8", "shape": [n, side, side, 3], "data_offsets": [0, count]},
               "labels": {"dtype": "I64", "shape": [n], "data_offsets": [count, count + 8 * n]}}  # fmt: skip
    head = json.dumps(entries).encode().ljust(1024)
    Path(folder).mkdir(exist_ok=True)
    with open(Path(folder) / f"{name}.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        noise = np.random.default_rng(0).integers(0, 256, 2**26, dtype=np.uint8)
        for at in range(0, count, len(noise)):
            f.write(noise[: min(len(noise), count - at)].data)
        f.write(bytes(8 * n))
    return data.open_split(folder, name)


def anonymous_mb(process="self"):
    """Memory of a process that no file backs, in MB (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def epoch(split, batch_size, number):
    """One shuffled epoch -> (images a second, most anonymous memory in MB)."""
    order, most, count = data.epoch_order(len(split["images"]), 0, number), 0.0, 0
    began = time.perf_counter()
    for i, (index, _) in enumerate(data.batches(split["images"], order, batch_size, torch.device("cpu"))):
        count += len(index)
        most = max(most, anonymous_mb()) if i % 64 == 0 else most
    return count / (time.perf_counter() - began), most


# ---- scale ---------------------------------------------------------------------------------------------------------


def trained(folder, rows_to_log):
    """pretrain.py on a packed folder until it has logged so many rows -> (median images a second, waiting, MB)."""
    command = [sys.executable, "pretrain.py", "--data", folder, "--out", folder / "run", "--image-size", 32,
               "--epochs", 1000, "--device", "cpu", "--eval-every", 1000]  # fmt: skip
    process = subprocess.Popen([str(w) for w in command], stdout=subprocess.DEVNULL)
    log, rows = folder / "run" / "log.jsonl", []
    while len(rows) < rows_to_log and process.poll() is None:
        time.sleep(0.5)
        rows = [r for r in read_log(log) if "loss" in r]
    if process.poll() is not None:
        raise UserError(f"pretrain.py ended with status {process.returncode}; its message is above")
    memory = anonymous_mb(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    rows = rows[2:]  # the first are slower: memory is touched for the first time
    return statistics.median(r["images_per_s"] for r in rows), statistics.median(r["data_wait"] for r in rows), memory


def scale_rows(sizes, batch_size, side=32, rows_to_log=20):
    """Rows of results: for each number of images an epoch of the loader, warm, and training; both should be flat."""
    for n in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "noise"
            split = noisy_split(folder, n, side)
            noisy_split(folder, 64, side, "val")
            before = anonymous_mb()
            epoch(split, batch_size, 0)
            rates, memory = zip(*[epoch(split, batch_size, i) for i in (1, 2, 3)], strict=True)
            training, waited, mb = trained(folder, rows_to_log)
        yield {"images": n, "side": side, "loader_images_per_s": round(statistics.median(rates)),
               "loader_mb_added": round(max(memory) - before, 1), "training_images_per_s": round(training, 1),
               "data_wait_percent": round(100 * waited, 3), "training_anonymous_mb": round(mb)}  # fmt: skip


# ---- packing -------------------------------------------------------------------------------------------------------


def draw_jpegs(folder, n, side=512):
    """n different JPEGs of quality 90: the upper part of one drawn face over the lower one of another, both shifted."""
    faces = [Image.fromarray(toon.draw(item, side)["image"]).convert("HSV") for item in toon.plan(40, 40)]
    rng = np.random.default_rng(0)
    for i in range(n):
        upper, lower = (np.roll(np.asarray(faces[k]), rng.integers(0, side, 2), (0, 1)) for k in rng.integers(0, 40, 2))
        pixels = np.where(np.arange(side)[:, None, None] < rng.integers(side // 4, 3 * side // 4), upper, lower)
        pixels[..., 0] += np.uint8(rng.integers(256))
        path = Path(folder) / f"class{i % 40}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, "HSV").convert("RGB").save(path, quality=90)
    return Path(folder)


WATCHED = """
import sys, threading, time, data
from lab import sources
from benchmarks.data import anonymous_mb
def look():
    while True:
        most[0] = max(most[0], anonymous_mb() - base)
        time.sleep(0.05)
base, most, began = anonymous_mb(), [0.0], time.perf_counter()
threading.Thread(target=look, daemon=True).start()
CODE
seconds = time.perf_counter() - began
time.sleep(0.1)
print("@", seconds, most[0])
"""


def timed(code, *words):
    """Run Python code of one line in a process of its own -> (seconds it took, most anonymous memory in MB)."""
    whole = WATCHED.replace("CODE", code)
    done = subprocess.run([sys.executable, "-c", whole, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    return tuple(float(x) for x in done.stdout.split("@")[1].split())


def pack_rows(n):
    """Rows of results: packing n and n/2 images with and without looking for copies; a table of a million rows."""
    code = "data.pack(sys.argv[1], sys.argv[2], size=128, dedupe=sys.argv[3])"
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("half", n // 2), ("all", n)):
            images = draw_jpegs(Path(folder) / name, count)
            for dedupe in ("off", "group"):
                seconds, mb = timed(code, images, Path(folder) / f"{name}_{dedupe}", dedupe)
                yield {"what": f"pack, --dedupe {dedupe}", "images": count, "seconds": round(seconds, 1),
                       "images_per_s": round(count / seconds), "anonymous_mb_added": round(mb)}  # fmt: skip
        table = Path(folder) / "million.csv"
        table.write_text("".join(f"faces/{i % 1000:04d}/{i}.jpg,character_{i % 3000}\n" for i in range(10**6)))
        seconds, mb = timed("found = sources.find(sys.argv[1])", table)
        yield {"what": "open a csv", "images": 10**6, "seconds": round(seconds, 1),
               "images_per_s": round(10**6 / seconds), "anonymous_mb_added": round(mb)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=65536, help="images in the file (65536 of 128 px are 3.2 GB)")
    parser.add_argument("--side", type=int, default=128, help="their side in pixels")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pack", type=int, metavar="N", help="measure packing of N JPEGs of 512 px instead")
    parser.add_argument("--scale", nargs="*", type=int, metavar="N", help="files of N images (10000 100000 1000000)")
    parser.add_argument("--out", help="default: results/bench_data.csv, bench_pack.csv or bench_scale.csv")
    args = parser.parse_args()
    about = {"machine": machine(torch.device("cpu")), "commit": commit()}
    if args.pack or args.scale is not None:
        made = pack_rows(args.pack) if args.pack else scale_rows(args.scale or SCALE, args.batch_size)
        rows = [row | about for row in made]
        save_csv(args.out or f"results/bench_{'pack' if args.pack else 'scale'}.csv", rows)
        return print("\n".join(", ".join(f"{k} {v}" for k, v in row.items()) for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        split = noisy_split(folder, args.images, args.side)
        before = anonymous_mb()
        epoch(split, args.batch_size, 0)  # warms the page cache
        rates, memory = zip(*[epoch(split, args.batch_size, i) for i in (1, 2, 3)], strict=True)
    row = {"images": args.images, "side": args.side, "file_gb": round(args.images * args.side**2 * 3 / 1e9, 2),
           "images_per_s": round(statistics.median(rates)), "anonymous_mb_added": round(max(memory) - before, 1),
           **about}  # fmt: skip
    save_csv(args.out or "results/bench_data.csv", [row])
    print(", ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    cli(main)
