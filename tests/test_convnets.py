"""Convolutional baselines: shown what a ViT is shown, trained and judged by the same stages."""

import sys

import pytest
import torch
from conftest import call, refused

from common.lora import fingerprint
from experiments.convnets import NETWORKS, ConvNet, load_any, save_any

pytest.importorskip("transformers", reason="pip install -r requirements-segment.txt")
QUICK = ["--image-size", 32, "--batch-size", 16, "--device", "cpu", "--dtype", "fp32"]


@pytest.mark.parametrize(
    ("name", "places"),
    [("resnet10", 1), ("efficientnet_b0", 1)],
)
def test_tokens_are_the_places_of_the_last_map_and_before_them_their_mean(name, places):
    net, size = load_any(name, 32)
    view = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        tokens, other = net.train()(*net.all_patches(view)), net.features(view.flip(1))
    assert size == 32 and tokens.shape[0] == 2 and tokens.shape[2] == NETWORKS[name]
    assert tokens.shape[1] == 1 + places
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    assert tokens.std() > 0.01 and not torch.allclose(tokens[:, 0], other[:, 0])


def test_a_network_in_a_file_comes_back(tmp_path):
    net = ConvNet("resnet10", 32).eval()
    save_any(net, tmp_path / "model.safetensors", {})
    back, size = load_any(tmp_path)
    assert size == 32 and fingerprint(back) == fingerprint(net)
    view = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(back.features(view), net.features(view))


def test_it_learns_and_recognises_as_a_vit_does(small, tmp_path):
    words = ["--method", "full", "--from-scratch", "--data", small, "--epochs", 8, *QUICK]
    stage = "experiments.convnets"
    call(stage, "resnet10", *words, "--out", tmp_path / "run", cwd=tmp_path, check=0)
    pictures = sorted((small.parent / "images").rglob("*.png"))[:4]
    done = call(stage, tmp_path / "run", *pictures, cwd=tmp_path, check=0)
    named = done.stdout.splitlines()
    assert len(named) == 4 and sum("confidence" in line or "unknown" in line for line in named) == 4


def test_without_transformers_it_is_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = ["--method", "full", "--from-scratch", "--data", small, *QUICK]
    line = refused(call("experiments.convnets", "resnet10", *words, cwd=tmp_path))
    assert "pip install -r requirements-segment.txt" in line
