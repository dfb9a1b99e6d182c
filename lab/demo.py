"""The README's first command, its random twin, and the probe of both: python -m lab.demo

Runs them as a user would, one after the other in a folder of its own, and writes results/demo.json, probe_toon.json
(the guided run's) and the pictures of results/figures/: what the guided run hid, predicted and learned.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import plumbing

ROOT = Path(__file__).resolve().parent.parent
MASKS = ("attn_high", "random")  # the first run also draws the demo set
PICTURES = {"recon": "recon", "masks": "masks", "curves": "curves", "attention": "probe-attention",
            "patches": "probe-patches", "neighbours": "probe-neighbours", "scatter": "probe-scatter"}  # fmt: skip


def run(folder, *words):
    """A stage, in this folder -> seconds that it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=folder, check=True)
    return time.perf_counter() - began


def summary(out, seconds):
    """What a run's log says, in the README's terms."""
    rows = plumbing.read_log(out / "log.jsonl")
    held, steps = [r for r in rows if "knn" in r], [r for r in rows if "loss" in r]
    return {"knn": round(held[-1]["knn"], 1), "knn_untrained": round(held[0]["knn"], 1),
            "knn_thumbnail": round(held[0]["knn_thumbnail"], 1), "mse_before": round(held[0]["val_mse"], 3),
            "mse_after": round(held[-1]["val_mse"], 3), "command_seconds": round(seconds),
            "run_seconds": round(rows[-1]["seconds"], 1), "peak_memory_mb": steps[-1]["memory_mb"],
            "data_wait_percent": round(100 * sum(r["data_wait"] for r in steps) / len(steps), 3)}  # fmt: skip


def probed(out):
    """The lines of a run's probe.json that the README quotes, in percent: logistic regression, Top-1 on val."""
    rows = json.loads((out / "probe.json").read_text())["rows"]
    top1 = {name: round(100 * row["logistic"]["top1"], 1) for name, row in rows.items()}
    names = ("mean", "extremes", "untrained mean", "untrained extremes", "chance")
    best = max(x for name, x in top1.items() if name.startswith("thumb"))
    return {"probe_" + name.replace(" ", "_"): top1[name] for name in names} | {"probe_best_thumbnail": best}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="results/demo.json", help="where the figures go")
    args = parser.parse_args()
    result = {"command": "python -m lab.demo", "machine": plumbing.machine(torch.device("cpu"))}
    result["commit"] = plumbing.commit()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        for mask in MASKS:
            words = ["--mask", mask, "--ratio", "0.75", "--device", "cpu", "--out", f"runs/{mask}"]
            result[mask] = summary(runs / mask, run(folder, "pretrain.py", *words))
        guided, plain = (result[mask]["run_seconds"] for mask in MASKS)
        result["attn_high_costs_percent_more"] = round(100 * (guided / plain - 1), 1)
        result["probe_seconds"] = round(run(folder, "probe.py", *(f"runs/{mask}" for mask in MASKS)))
        for mask in MASKS:
            result[mask] |= probed(runs / mask)
        shutil.copy(runs / MASKS[0] / "probe.json", ROOT / "results" / "probe_toon.json")
        for name, called in PICTURES.items():
            shutil.copy(runs / MASKS[0] / f"{name}.png", ROOT / "results" / "figures" / f"{called}.png")
    with plumbing.atomic(args.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    plumbing.cli(main)
