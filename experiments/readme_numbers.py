"""The README's first command, its random twin, the probe of both, and its third command.

    python -m experiments.readme_numbers --out runs/readme
    python -m experiments.readme_numbers --out results    # in git: the numbers that the docs quote

Runs them as a user would, one after the other in a folder of its own, and writes OUT/demo.json,
probe_toon.json (the guided run's) and the pictures of OUT/figures/: what the guided run hid,
predicted and learned. Then the third command, and pictures that the set has not:
OUT/demo_recognition.json (--run runs/NAME: only this, from that run).
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

import data
from common.checkpoints import load_teacher
from common.command import Parser, claim, cli, command, progress
from common.io import UserError, save_json
from common.train import commit, machine, read_log
from ingest import toon

ROOT = Path(__file__).resolve().parent.parent
MASKS = ("attn_high", "random")  # the first run also draws the demo set
PICTURES = ("recon", "masks", "curves")  # of pretrain.py
PROBE_PICTURES = ("attention", "patches", "neighbours")


def run(folder, *words):
    """Run a stage in this folder -> seconds."""
    start_time = time.perf_counter()
    if status := subprocess.run(
        [sys.executable, ROOT / words[0], *words[1:]], cwd=folder
    ).returncode:
        raise UserError(f"{words[0]} ended with status {status}; its message stands above")
    return time.perf_counter() - start_time


def summary(out, seconds):
    """What a run's log says, in the README's terms."""
    rows = read_log(out / "log.jsonl")
    held, steps = [r for r in rows if "knn" in r], [r for r in rows if "loss" in r]
    return {
        "knn": round(held[-1]["knn"], 1),
        "knn_untrained": round(held[0]["knn"], 1),
        "knn_thumbnail": round(held[0]["knn_thumbnail"], 1),
        "mse_before": round(held[0]["val_mse"], 3),
        "mse_after": round(held[-1]["val_mse"], 3),
        "command_seconds": round(seconds),
        "run_seconds": round(rows[-1]["seconds"], 1),
        "peak_memory_mb": steps[-1]["memory_mb"],
        "data_wait_percent": round(100 * sum(r["data_wait"] for r in steps) / len(steps), 3),
    }


def probed(out):
    """The lines of a run's probe.json that the README quotes, in percent: logistic regression,
    Top-1 on val.
    """
    rows = json.loads((out / "probe.json").read_text())["rows"]
    top1 = {
        name: round(100 * row["logistic"]["top1"], 1)
        for name, row in rows.items()
        if "logistic" in row
    }
    names = ("mean", "extremes", "untrained extremes", "chance")
    best = max(x for name, x in top1.items() if name.startswith("thumb"))
    return {"probe_" + name.replace(" ", "_"): top1[name] for name in names} | {
        "probe_best_thumbnail": best
    }


def recognised(folder, encoder, results):
    """The third command -> its scores, and how many of three new pictures of each character it
    names rightly.
    """
    lora, pictures = folder / "runs/lora", folder / "new"
    seconds = run(folder, "finetune_lora.py", encoder, "--method", "lora", "--out", lora)
    pictures.mkdir()
    for person in progress(toon.cast(), "new pictures", leave=False):
        for i, item in enumerate(toon.unseen(person, 3)):
            Image.fromarray(toon.draw(item)["image"]).save(pictures / f"{person['name']}-{i}.png")
    words = [sys.executable, ROOT / "recognize.py", lora, pictures, "--json"]
    output = subprocess.run(words, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    answers = [json.loads(line) for line in output.splitlines()]
    metrics = json.loads((lora / "metrics.json").read_text())
    shutil.copy(lora / "confusion.png", results / "figures")
    return {
        "command_seconds": round(seconds),
        "top1": round(metrics["top1"], 1),
        "top5": round(metrics["top5"], 1),
        "new_pictures": len(answers),
        "unknown": sum(a["name"] is None for a in answers),
        "named_rightly": sum(a["name"] == a["picture"].rsplit("-", 1)[0] for a in answers),
    }


def about():
    return {"command": command(), "commit": commit(), "machine": machine(torch.device("cpu"))}


def first_and_twin(folder, results):
    """The first command, its twin, their probes -> the guided run; writes demo.json and the
    figures.
    """
    result, runs = about(), folder / "runs"
    for mask in MASKS:
        words = ["--mask", mask, "--ratio", "0.75", "--device", "cpu", "--out", f"runs/{mask}"]
        result[mask] = summary(runs / mask, run(folder, "pretrain.py", *words))
    guided, plain = (result[mask]["run_seconds"] for mask in MASKS)
    result["attn_high_costs_percent_more"] = round(100 * (guided / plain - 1), 1)
    result["probe_seconds"] = round(run(folder, "probe.py", *(f"runs/{mask}" for mask in MASKS)))
    for mask in MASKS:
        result[mask] |= probed(runs / mask)
    shutil.copy(runs / MASKS[0] / "probe.json", results / "probe_toon.json")
    for name in PICTURES + PROBE_PICTURES:
        prefix = "probe-" if name in PROBE_PICTURES else ""
        shutil.copy(runs / MASKS[0] / f"{name}.png", results / "figures" / f"{prefix}{name}.png")
    draw_attention(
        folder, {mask: runs / mask for mask in MASKS}, results / "figures" / "attention.png"
    )
    save_json(result, results / "demo.json")
    return runs / MASKS[0]


@torch.no_grad()
def draw_attention(folder, runs, path, n=10):
    """What is looked at in pictures of the demo set: by a plain MAE's CLS token, and by the pooler
    of a guided run.
    """
    from common import plots  # matplotlib takes a second to load

    split, lines = data.open_split(folder / "datasets/toon", "val"), []
    rows = data.evenly_spaced(len(split["images"]), n)
    for name, run, source in (
        ("plain MAE:\nCLS token", runs["random"], "cls"),
        ("agreement:\npooler", runs["attn_high"], "pooler"),
    ):
        encoder, size = load_teacher(run)
        _, view = next(data.whole_views(split["images"], rows, size, torch.device("cpu")))
        score = encoder.patch_attention(view, source).mean(1).unflatten(1, (encoder.side, -1))
        lines = lines or [("view", view)]
        lines.append((name, score))
    plots.image_grid(
        path,
        "What a teacher looks at, before and after it is trained to find the other view",
        lines,
    )


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, help="only the third command, from this run of the first")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of numbers and pictures: results is the one in git, runs/readme is not",
    )
    args = parser.parse_args()
    results, names = (
        args.out.resolve(),
        ["demo_recognition.json"] + ["demo.json", "probe_toon.json"] * (not args.run),
    )
    claim([args.out / name for name in names])
    (results / "figures").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        guided = args.run.resolve() if args.run else first_and_twin(folder, results)
        found = recognised(folder, guided, results) | about()
    save_json(found, results / "demo_recognition.json")
    print(f"{json.dumps(found, indent=1)}\nwrote    {args.out}: {', '.join(names)}, figures/")


if __name__ == "__main__":
    cli(main)
