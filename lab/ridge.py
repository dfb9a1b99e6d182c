"""A linear probe in one formula, for a first look at a run: python -m lab.ridge runs/NAME --data datasets/X

The penalty is chosen on dev (10 % of train held apart: python data.py ... --dev .1), the figure is val's. The same for
the untrained encoder and for thumbnails: a feature has to beat both to have learned anything. Adds a row to --out.
"""

import argparse
import functools
from pathlib import Path

import torch

import loader
import plumbing
from checkpoints import load_encoder
from evaluate import pooled_tokens, thumbnails
from lab import metrics
from model import untrained_like

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def mean_tokens(encoder, image_size, split):
    """-> (n, D) fp32: the mean of the patch tokens of all whole images of a split."""
    dtype, _ = plumbing.pick_dtype("auto", torch.device("cpu"))
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    rows = torch.arange(len(split["images"]))
    return pooled_tokens(encoder, image_size, autocast, split, rows, pool=lambda tokens: tokens.mean(1))


def chosen_ridge(features, splits):
    """-> (Top-1 of val in percent, the penalty that was best on dev); features(split) -> (n, D)."""
    train, dev, val = (features(splits[name]).double() for name in ("train", "dev", "val"))
    labels = {name: split["labels"] for name, split in splits.items()}
    score = {p: metrics.ridge_top1(train, labels["train"], dev, labels["dev"], p) for p in PENALTIES}
    best = max(score, key=score.get)
    return 100 * metrics.ridge_top1(train, labels["train"], val, labels["val"], best), best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder of pretrain.py")
    parser.add_argument("--data", required=True, help="packed dataset with train, dev and val")
    parser.add_argument("--out", default="results/ridge.csv", help="CSV that gets one more row")
    args = parser.parse_args()
    splits = {name: loader.open_split(args.data, name) for name in ("train", "dev", "val")}
    encoder, size = load_encoder(args.run)
    best, penalty = chosen_ridge(functools.partial(mean_tokens, encoder, size), splits)
    plain, _ = chosen_ridge(functools.partial(mean_tokens, untrained_like(encoder), size), splits)
    small = max(chosen_ridge(functools.partial(thumbnails, side=side), splits)[0] for side in (4, 8, 16))
    rows = plumbing.read_log(Path(args.run) / "log.jsonl")
    seconds = [r["seconds"] for r in rows if "loss" in r]
    row = {"run": Path(args.run).name, "data": Path(args.data).name, "val_top1": round(best, 2), "penalty": penalty,
           "untrained_top1": round(plain, 2), "best_thumbnail_top1": round(small, 2), "epochs": rows[-1]["epoch"],
           "train_seconds": round(seconds[-1]), "knn": round(rows[-1]["knn"], 2),
           "machine": plumbing.machine(torch.device("cpu")), "commit": plumbing.commit()}  # fmt: skip
    plumbing.save_csv(args.out, plumbing.read_csv(args.out) + [row])
    print(", ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    plumbing.cli(main)
