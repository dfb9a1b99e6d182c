"""How many parameters LoRA trains, for every model and rank: python -m experiments.lora_share

Gradients and AdamW's two moments are three numbers for each trained parameter: their share is the same. No network is
filled, only shapes are counted. Writes results/lora_share.csv.
"""

import argparse

import torch

from common.io import cli, save_csv
from common.lora import TARGETS, add_lora
from common.train import commit, machine
from model import SIZES, ViT

RANKS = (4, 8, 16, 32)


def count(size, rank, targets=tuple(TARGETS)):
    """-> (parameters that LoRA trains, parameters of the encoder)."""
    shape = {k: SIZES[size][k] for k in ("image_size", "patch_size", "dim", "depth", "heads")}
    with torch.device("meta"):
        encoder = ViT(**shape)
    whole = sum(w.numel() for w in encoder.parameters())
    return sum(w.numel() for w in add_lora(encoder, rank, targets=targets)), whole


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="results/lora_share.csv", help="CSV file")
    args = parser.parse_args()
    rows = []
    for size in SIZES:
        for rank in RANKS:
            trained, whole = count(size, rank)
            rows.append({"model": size, "rank": rank, "targets": " ".join(TARGETS), "lora_parameters": trained,
                         "encoder_parameters": whole, "share_percent": round(100 * trained / whole, 2),
                         "machine": machine(torch.device("cpu")), "commit": commit()})  # fmt: skip
            print(f"{size:6} rank {rank:2}: {trained:9,} of {whole:11,} parameters, {rows[-1]['share_percent']:.2f} %")
    save_csv(args.out, rows)


if __name__ == "__main__":
    cli(main)
