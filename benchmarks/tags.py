"""What a tag costs: time and memory of a training step as the vocabulary grows: python -m benchmarks.tags

Arms of tags.py that name tags, on synthetic pictures and lists: mfdn asks at 30 places, whatever
the vocabulary; l2l has a query for each tag, which look at each other; bce is one linear layer.
Each in a process of its own, into runs/bench/bench_tags.csv and .png (--out results: into git).
What can't fit into the memory says so. In the number format of the machine, as tags.py has it.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import OUT, about, free_gb, now, status_mb
from common import plots, train
from common.command import Parser, at_least, claim, cli
from experiments.tables import save_csv
from model import SIZES, ViT
from tags import MFDN, hide, to_words

ARMS, WORDS, EACH = ("mfdn", "l2l", "bce"), (25, 200, 5000, 25_000), 30
IMAGES = 1000  # an epoch of so many is told


def need_gb(arm, V, batch, size, device):
    """GB that the squares of an attention among V queries take, in each block of its decoder: kept,
    and two at work.

    A GPU's fused attention writes none.
    """
    blocks, squares = max(1, size["depth"] // 6), arm == "l2l" and device.type == "cpu"
    return (blocks + 2) * batch * size["heads"] * V * V * 4 / 2**30 if squares else 0.0


def one(arm, V, batch, model, device, steps, threads):
    """A row: median time of a step, forward, backward and AdamW, and the most memory that the
    process held.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size, device = SIZES[model], torch.device(device)
    encoder = ViT(size["image_size"], size["patch_size"], size["dim"], size["depth"], size["heads"])
    net = MFDN(encoder, 48, V, arm).to(device)
    encoder.requires_grad_(arm != "bce")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(V, (batch, EACH)).sort(1).values
    words, hidden = hide(to_words(ids, V, net.length), V, 1.0, torch.Generator().manual_seed(0))
    view = torch.randint(
        256, (batch, size["image_size"], size["image_size"], 3), dtype=torch.uint8
    ).to(device)
    places, hidden = net.encoder.all_patches(view), hidden.to(device) if arm == "mfdn" else None
    words, milliseconds = words.to(device) if arm == "mfdn" else None, []
    for _ in range(steps + 1):
        start_time = now(device)
        with train.autocast_of(device, train.pick_dtype("auto", device)[0])():
            characters, tags = net(*places, words, hidden)
        loss = tags.logsumexp(1).mean() + (
            0 if characters is None else characters.logsumexp(1).mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        milliseconds.append(1000 * (now(device) - start_time))
    peak = train.peak_memory_mb(device) if device.type == "cuda" else status_mb("VmHWM")
    step = statistics.median(milliseconds[1:])
    return {
        "step_ms": round(step, 1),
        "epoch_s": round(step / batch * IMAGES / 1000, 1),
        "peak_mb": round(peak),
    }


def measure(args, device):
    """Yield rows; one that can't fit into the free memory has no times."""
    for arm in ARMS:
        for V in args.words:
            row = {"arm": arm, "tags": V, "batch": args.batch_size, "model": args.model, "note": ""}
            gb, free = need_gb(arm, V, args.batch_size, SIZES[args.model], device), free_gb(device)
            found = {"step_ms": "", "epoch_s": "", "peak_mb": ""}
            if gb > free:
                row["note"] = (
                    f"needs {gb:.0f} GB for attention among its queries; {free:.0f} are free"
                )
            else:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    words = (
                        arm,
                        V,
                        args.batch_size,
                        args.model,
                        str(device),
                        args.steps,
                        torch.get_num_threads(),
                    )
                    found = pool.submit(one, *words).result()
            yield row | found


def draw(path, rows, title):
    """Seconds of an epoch and memory, by vocabulary; a cross stands where an arm no longer fits."""
    with plots.panels(path, title, 1, 2, (9.0, 3.6)) as axes:
        labels = {"epoch_s": f"seconds for {IMAGES:,} pictures", "peak_mb": "peak memory, MB"}
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            for arm, colour, mark in zip(ARMS, plots.COLOURS, plots.MARKERS, strict=False):
                own = [r for r in rows if r["arm"] == arm]
                fits = [r for r in own if r[key] != ""]
                axis.plot(
                    [r["tags"] for r in fits],
                    [r[key] for r in fits],
                    marker=mark,
                    color=colour,
                    label=arm,
                )
                for r in own[len(fits) :][:1]:
                    axis.annotate(
                        "does\nnot fit",
                        (r["tags"], fits[-1][key]),
                        (0, -25),
                        textcoords="offset points",
                        fontsize=8,
                        color=colour,
                        ha="center",
                    )
                    axis.plot(r["tags"], fits[-1][key], "x", color=colour)
            axis.set(xscale="log", yscale="log", xlabel="tags in the vocabulary", ylabel=label)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
        axes[0].legend()


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--words",
        type=at_least(2),
        nargs="+",
        default=WORDS,
        metavar="V",
        help="vocabularies (25 200 5000 25000)",
    )
    add("--model", default="nano", choices=SIZES)
    add("--batch-size", type=at_least(1), default=16, metavar="B")
    add(
        "--steps",
        type=at_least(1),
        default=3,
        help="that are timed, after one that is not (default: 3)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of table and figure (default: runs/bench)",
    )
    args, rows, start_time = parser.parse_args(), [], time.perf_counter()
    claim([args.out / "bench_tags.csv", args.out / "bench_tags.png"])
    device = train.pick_device(args.device)
    for row in measure(args, device):
        rows.append(row | about(device))
        print(", ".join(f"{k} {v}" for k, v in row.items() if v != ""), flush=True)
    save_csv(args.out / "bench_tags.csv", rows)
    title = f"What a tag costs in training: {args.model}, {args.batch_size} pictures a step"
    draw(args.out / "bench_tags.png", rows, title)
    print(
        f"wrote    {args.out}/bench_tags.csv, .png after {time.perf_counter() - start_time:.0f} s"
    )


if __name__ == "__main__":
    cli(main)
