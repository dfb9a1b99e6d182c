"""How fast images are packed and handed out.

    python -m lab.bench_data [--images N | --pack N]

Without --pack it measures the loader, into runs/bench/bench_data.csv: warm epochs over a packed
file of noise, read once before, so the speed is that of the page cache. With --pack it packs N and
N/2 generated JPEGs of 512 px, with and without the search for copies, into bench_pack.csv.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import data
from common.train import at_least, cli, pick_device, refuse_useless
from ingest import pack, toon
from lab import bench

SIDE = 128  # of the loader's images in pixels
BATCH = 128


def seconds_of(function, *args, **options):
    """How long a call takes."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(None):
        function(*args, **options)
    return time.perf_counter() - start


# ---- the loader ----------------------------------------------------------------------------------


def noise_file(path, n, side):
    """A file of n images of noise, the same few of it again and again, mapped as a packed set is."""
    some = np.random.default_rng(0).integers(0, 256, (256, side, side, 3), dtype=np.uint8)
    images = np.memmap(path, np.uint8, "w+", shape=(n, side, side, 3))
    for at in range(0, n, len(some)):
        images[at : at + len(some)] = some[: n - at]
    images.flush()
    return np.memmap(path, np.uint8, "r", shape=images.shape)


def epoch(images, number, device):
    """One shuffled epoch of the loader; a GPU gets every batch."""
    for _ in data.batches(images, data.epoch_order(len(images), 0, number), BATCH, device):
        pass
    bench.now(device)


def loader_row(n, turns, device):
    """The row of results: epochs of the loader on one file. The first one is not timed."""
    with tempfile.TemporaryDirectory() as folder:
        images = noise_file(Path(folder) / "noise", n, SIDE)
        seconds = [seconds_of(epoch, images, i, device) for i in range(turns + 1)][1:]
    count = n // BATCH * BATCH
    return {
        "file_gb": round(images.nbytes / 1e9, 2),
        "images_per_s": round(count / statistics.median(seconds)),
        "low": round(count / max(seconds)),
        "high": round(count / min(seconds)),
    }


# ---- packing -------------------------------------------------------------------------------------


def draw_jpegs(folder, n, side=512):
    """n different JPEGs in 40 folders: the upper part of a drawn face over the lower of another."""
    faces = [toon.draw(item, side)["image"] for item in toon.plan(40, 40)]
    rng = np.random.default_rng(0)
    for i in range(n):
        pair = rng.integers(0, 40, 2)
        pixels, lower = (np.roll(faces[k], rng.integers(0, side, 2), (0, 1)) for k in pair)
        cut = rng.integers(side // 4, 3 * side // 4)
        pixels[cut:] = lower[cut:]
        path = folder / f"class{i % 40}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def add_pack_rows(table, n):
    """Packing of n and n/2 images, each in a process of its own, with and without --dedupe."""
    for count in (n // 2, n):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            draw_jpegs(folder / "jpegs", count)
            for dedupe in ("off", "group"):
                keys = {"what": f"pack, --dedupe {dedupe}", "images": count}
                if table.find(**keys):
                    continue
                paths = (folder / "jpegs", folder / dedupe)
                spent = bench.alone(seconds_of, pack.pack, *paths, size=128, dedupe=dedupe)
                speed = {"seconds": round(spent, 1), "images_per_s": round(count / spent)}
                table.add(keys | speed)


def main():
    parser = bench.parser_of(__doc__)
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    add("--images", type=at_least(BATCH), default=65536, help="in the file (65536: 3.2 GB)")
    add("--pack", type=at_least(2), metavar="N", help="pack N JPEGs of 512 px instead")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.pack:
        refuse_useless(args.given - {"out", "pack"}, "with --pack")
        table = bench.Table(args.out / "bench_pack.csv", ("what", "images"), device)
        add_pack_rows(table, args.pack)
    else:
        keys = {"images": 16 * BATCH if args.small else args.images, "side": SIDE}
        table = bench.Table(args.out / "bench_data.csv", tuple(keys), device)
        if not table.find(**keys):
            table.add(keys | loader_row(keys["images"], args.turns, device))
    print(f"wrote    {table.path}")


if __name__ == "__main__":
    cli(main)
