"""How fast images are packed and handed out, and what memory that takes.

    python -m benchmarks.data [--pack N | --dump N | --scale]

Without --pack: the loader, into runs/bench/bench_data.csv. With it: data.py on so many generated
JPEGs of 512 px, and the opening of a table of a million rows, into bench_pack.csv. With --dump:
what a whole dump asks for besides its pictures, Danbooru-style metadata of so many lines (24 tags
each) and the search for copies among as many thumbnails, and a quarter of both, into
bench_dump.csv. With --scale: files of 10,000 to a million images of 32 px, epochs of the loader and
some steps of pretrain.py on each, into bench_scale.csv. (--out results: into git.) For the loader
the packed file is made of noise and really written; it is read once before the clock starts: what
is measured is the way out of a warm page cache.
"""

import contextlib
import json
import multiprocessing
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from benchmarks import OUT, ROOT, about, status_mb
from common.command import Parser, at_least, claim, cli, refuse_idle
from common.io import UserError
from common.train import read_log
from experiments.tables import save_csv
from ingest import duplicates, pack, sources, tags, toon
from ingest.rows import write_rows

SCALE = (10_000, 100_000, 1_000_000)


def noisy_split(folder, n, side, name="train"):
    """A packed split of n images of noise, the same few of it again and again."""
    noise = np.random.default_rng(0).integers(
        0, 256, (2**26 // (3 * side**2), side, side, 3), dtype=np.uint8
    )
    sizes = [min(len(noise), n - at) for at in range(0, n, len(noise))]
    rows = ({"images": noise[:count], "labels": np.zeros(count, np.int64)} for count in sizes)
    planes = {"images": ("U8", (side, side, 3)), "labels": ("I64", ())}
    about = {"classes": ["noise"], "keys": [""] * n, "size": side, "split": name, "source": "noise"}
    about |= {"crop": "centre", "margin": 0.1}
    write_rows(Path(folder) / f"{name}.safetensors", planes, n, rows, lambda: about)
    return data.open_split(folder, name)


def watched(function, *args, **options):
    """-> (seconds that a call takes, most anonymous memory that it adds in MB)."""
    readings, ended = [status_mb("RssAnon")], threading.Event()

    def watch():
        while not ended.wait(0.01):
            readings.append(status_mb("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    start_time = time.perf_counter()
    with contextlib.redirect_stdout(None):
        function(*args, **options)
    seconds = time.perf_counter() - start_time
    ended.set()
    return seconds, max(*readings, status_mb("RssAnon")) - readings[0]


def epoch(images, batch_size, number):
    """One shuffled epoch of the loader."""
    for _ in data.batches(
        images, data.epoch_order(len(images), 0, number), batch_size, torch.device("cpu")
    ):
        pass


def warm_epochs(images, batch_size):
    """Three epochs after one that fills the page cache -> (median images a second, most memory
    added in MB).
    """
    seconds, memory = zip(*[watched(epoch, images, batch_size, i) for i in range(4)], strict=True)
    count = len(images) // batch_size * batch_size
    return round(count / statistics.median(seconds[1:])), round(max(memory), 1)


def loader_rows(n, side, batch_size):
    """The row of results: the loader on one file."""
    with tempfile.TemporaryDirectory() as folder:
        speed, added = warm_epochs(noisy_split(folder, n, side)["images"], batch_size)
    yield {
        "images": n,
        "side": side,
        "file_gb": round(n * side**2 * 3 / 1e9, 2),
        "images_per_s": speed,
        "anonymous_mb_added": added,
    }


# ---- scale ---------------------------------------------------------------------------------------


def trained(folder, rows_to_log):
    """pretrain.py on a packed folder until it has logged so many rows -> median images a second, MB."""
    flags = [
        "--model",
        "nano:image_size=32",
        "--epochs",
        "1000",
        "--device",
        "cpu",
        "--eval-every",
        "1000",
    ]
    command = [
        sys.executable,
        ROOT / "pretrain.py",
        "--data",
        folder,
        "--out",
        folder / "run",
        *flags,
    ]
    process, rows = subprocess.Popen(command, stdout=subprocess.DEVNULL), []
    while len(rows) < rows_to_log and process.poll() is None:
        time.sleep(0.5)
        rows = [r for r in read_log(folder / "run" / "log.jsonl") if "loss" in r]
    if process.poll() is not None:
        raise UserError(f"pretrain.py ended with status {process.returncode}; its message is above")
    memory = status_mb("RssAnon", process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    speed = statistics.median(r["images_per_s"] for r in rows[2:])
    return speed, memory  # without the first rows: there memory is touched for the first time


def scale_rows(sizes, batch_size, side=32, rows_to_log=20):
    """Rows of results: for each number of images an epoch of the loader, warm, and training; both
    should be flat.
    """
    for n in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "noise"
            noisy_split(folder, 64, side, "val")
            speed, added = warm_epochs(noisy_split(folder, n, side)["images"], batch_size)
            training, mb = trained(folder, rows_to_log)
        yield {
            "images": n,
            "side": side,
            "loader_images_per_s": speed,
            "loader_mb_added": added,
            "training_images_per_s": round(training, 1),
            "training_anonymous_mb": round(mb),
        }


# ---- packing -------------------------------------------------------------------------------------


def draw_jpegs(folder, n, side=512):
    """n different JPEGs of quality 90 in 40 folders: the upper part of a drawn face over the lower
    part of another.
    """
    faces = [
        Image.fromarray(toon.draw(item, side)["image"]).convert("HSV") for item in toon.plan(40, 40)
    ]
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"class{i}").mkdir(parents=True)
    for i in range(n):
        upper, lower = (
            np.roll(np.asarray(faces[k]), rng.integers(0, side, 2), (0, 1))
            for k in rng.integers(0, 40, 2)
        )
        pixels = np.where(
            np.arange(side)[:, None, None] < rng.integers(side // 4, 3 * side // 4), upper, lower
        )
        pixels[..., 0] += np.uint8(rng.integers(256))
        Image.fromarray(pixels, "HSV").convert("RGB").save(
            folder / f"class{i % 40}" / f"{i}.jpg", quality=90
        )


def pack_row(what, n, function, *args, **options):
    """A row of results: one call, in a process of its own, that takes up n images."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds, mb = pool.submit(watched, function, *args, **options).result()
    return {
        "what": what,
        "images": n,
        "seconds": round(seconds, 1),
        "images_per_s": round(n / seconds),
        "anonymous_mb_added": round(mb),
    }


def pack_rows(n):
    """Rows of results: packing n and n/2 images with and without the search for copies; a table of
    a million rows.
    """
    with tempfile.TemporaryDirectory() as place:
        folder, table = Path(place), Path(place) / "million.csv"
        for count in (n // 2, n):
            draw_jpegs(folder / f"{count}", count)
            for dedupe in ("off", "group"):
                paths = (folder / f"{count}", folder / f"{count}_{dedupe}")
                yield pack_row(
                    f"pack, --dedupe {dedupe}", count, pack.pack, *paths, size=128, dedupe=dedupe
                )
        table.write_text(
            "".join(f"faces/{i % 1000:04d}/{i}.jpg,character_{i % 3000}\n" for i in range(10**6))
        )
        yield pack_row("open a csv", 10**6, sources.find, table)


def write_dump(folder, n, words=25_000, each=24):
    """metadata.jsonl of n posts as the site's API has them, tags by Zipf's law, and n empty files
    named by ids.
    """
    rng, folder = np.random.default_rng(0), Path(folder)
    (folder / "512px").mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as file:
        for at in range(0, n, 4096):
            tags = rng.zipf(1.3, (min(4096, n - at), each)) % words
            for i, row in enumerate(tags.tolist(), at):
                named, who = " ".join(f"tag_number_{t}" for t in row), f"character_{i % 14413}"
                post = {
                    "id": i,
                    "md5": f"{i:032x}",
                    "rating": "g",
                    "score": i % 99,
                    "tag_string_character": who,
                }
                file.write(json.dumps(post | {"tag_string": f"{who} {named}"}) + "\n")
                (folder / "512px" / f"{i}.jpg").touch()


def words_of(folder):
    """Read a dump and choose its vocabulary: all of packing that comes before the first picture is
    opened.
    """
    records, _, _ = sources.find(folder)
    tags.vocabulary([r._replace(split="train") for r in records], above=0.2)


def copies_among(n):
    """Search n thumbnails for copies: blurred noise, in a file; one in 50 is another's, with a
    little noise on it.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryFile() as file:
        thumbs = np.memmap(file, np.uint8, "w+", shape=(n, duplicates.SIDE, duplicates.SIDE))
        for at in range(0, n, 4096):
            coarse = rng.integers(0, 256, (len(thumbs[at : at + 4096]), 8, 8)).astype(np.float32)
            smooth = np.repeat(np.repeat(coarse, 4, 1), 4, 2)
            smooth = (
                smooth
                + np.roll(smooth, 2, 1)
                + np.roll(smooth, 2, 2)
                + np.roll(smooth, (2, 2), (1, 2))
            ) / 4
            copies = smooth[0:-1:50]
            copies[:] = smooth[1::50] + rng.normal(0, 3, copies.shape)
            thumbs[at : at + 4096] = smooth.clip(0, 255)
        duplicates.pairs(thumbs)


def dump_rows(n):
    """Rows of results: a quarter of n, and n; what a picture more adds is the difference over their
    number.
    """
    for count in (n // 4, n):
        with tempfile.TemporaryDirectory() as place:
            write_dump(Path(place) / "dump", count)
            yield pack_row("read metadata, choose tags", count, words_of, Path(place) / "dump")
        yield pack_row("search for copies", count, copies_among, count)


USES = {  # flags of each measurement
    "pack": ["pack"],
    "dump": ["dump"],
    "scale": ["scale", "batch_size"],
    "data": ["images", "side", "batch_size"],
}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--images",
        type=at_least(1),
        default=65536,
        help="images in the file (65536 of 128 px are 3.2 GB)",
    )
    add("--side", type=at_least(1), default=128, help="their side in pixels")
    add("--batch-size", type=at_least(1), default=128)
    add(
        "--pack", type=at_least(2), metavar="N", help="measure packing of N JPEGs of 512 px instead"
    )
    add(
        "--dump",
        type=at_least(400),
        metavar="N",
        help="measure metadata of N lines, and copies among N thumbnails",
    )
    add(
        "--scale",
        nargs="*",
        type=at_least(1),
        metavar="N",
        help="files of N images (10000 100000 1000000)",
    )
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the CSV (default: runs/bench)",
    )
    args, where, rows = parser.parse_args(), about(torch.device("cpu")), []
    tasks = [name for name in USES if getattr(args, name, None) is not None]
    task = tasks[0] if tasks else "data"
    refuse_idle(args.given - {"out", *USES[task]}, f"with --{task}")
    path = args.out / f"bench_{task}.csv"
    claim([path])
    if task == "pack":
        found = pack_rows(args.pack)
    elif task == "dump":
        found = dump_rows(args.dump)
    elif task == "scale":
        found = scale_rows(args.scale or SCALE, args.batch_size)
    else:
        found = loader_rows(args.images, args.side, args.batch_size)
    for row in found:
        rows.append(row | where)
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    save_csv(path, rows)
    print(f"wrote    {path}")


if __name__ == "__main__":
    cli(main)
