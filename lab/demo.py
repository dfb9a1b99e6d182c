"""The README's first command, and its random twin, measured: python -m lab.demo

Runs both as a user would, one after the other in a folder of its own, and writes results/demo.json and the pictures of
results/figures/: the demo set, and what the guided run hid, predicted and learned.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="results/demo.json", help="where the figures go")
    args = parser.parse_args()
    result = {"command": "python -m lab.demo", "machine": plumbing.machine(torch.device("cpu"))}
    result["commit"] = plumbing.commit()
    with tempfile.TemporaryDirectory() as folder:
        for mask in ("attn_high", "random"):  # the first also draws the demo set
            out = Path(folder) / "runs" / mask
            seconds = run(folder, "pretrain.py", "--mask", mask, "--ratio", "0.75", "--device", "cpu", "--out", out)
            result[mask] = summary(out, seconds)
        guided, plain = (result[mask]["run_seconds"] for mask in ("attn_high", "random"))
        result["attn_high_costs_percent_more"] = round(100 * (guided / plain - 1), 1)
        figures = ROOT / "results" / "figures"
        figures.mkdir(exist_ok=True)
        for name in ("recon", "masks", "curves"):
            shutil.copy(Path(folder) / "runs" / "attn_high" / f"{name}.png", figures / f"{name}.png")
    with plumbing.atomic(args.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    plumbing.cli(main)
