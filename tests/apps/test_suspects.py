"""apps.suspects: labels that were planted wrong are doubted first."""

import csv

import numpy as np
import pytest
import torch
from conftest import call, refused

import data
from apps.suspects import out_of_fold
from common.checkpoints import save_network
from common.train import UserError, read_safetensors, save_safetensors
from model import ViT


def plant(source, target):
    """A copy of a packed set in which a tenth of train has another label -> their rows."""
    target.mkdir()
    for path in source.glob("*.safetensors"):
        tensors, header = read_safetensors(path)
        if path.stem == "train":
            labels = tensors["labels"]
            rows = np.random.default_rng(0).permutation(len(labels))[: round(len(labels) / 10)]
            labels[rows] = (labels[rows] + 1) % len(header["classes"])
        save_safetensors(tensors, target / path.name, header)
    return rows


def test_wrong_labels_are_doubted_first(small, tmp_path):
    """The encoder never learned anything, but the classes have a colour each."""
    rows = plant(small, tmp_path / "wrong")
    keys = data.open_split(tmp_path / "wrong", "train")["header"]["keys"]
    save_network(ViT(32, 8, 32, 2, 2), tmp_path / "run/model.safetensors", {}, "encoder.")
    words = ["run", "--data", "wrong", "--out", "s", "--device", "cpu"]
    call("apps.suspects", *words, cwd=tmp_path, check=0)
    with open(tmp_path / "s/suspects.csv") as file:
        suspects = list(csv.DictReader(file))
    worst = {row["picture"] for row in suspects[: len(rows)]}
    assert sum(keys[row] in worst for row in rows) >= 0.7 * len(rows)
    assert all(row["label"] != row["better"] for row in suspects)
    assert {row["split"] for row in suspects} <= {path.stem for path in small.glob("*.safetensors")}
    assert (tmp_path / "s/suspects.png").exists()
    assert "suspects.csv is there already" in refused(call("apps.suspects", *words, cwd=tmp_path))


def test_too_few_illustrations_are_refused():
    with pytest.raises(UserError, match="two classes of 5 illustrations"):
        out_of_fold(torch.randn(8, 4), torch.tensor([0, 1] * 4), torch.zeros(8), 2)
