"""Convolutional baselines: shown what a ViT is shown, trained and judged by the same stages."""

import pytest
import torch
from conftest import call

from common.lora import fingerprint
from experiments.convnets import NETWORKS, ConvNet, load_any, save_any

pytest.importorskip("transformers", reason="pip install -e '.[segment]'")


def test_tokens_are_the_places_of_the_last_map_and_before_them_their_mean():
    net = load_any("resnet10", 64)
    view = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        tokens, other = net.train()(*net.all_patches(view)), net.features(view.flip(1))
    assert net.image_size == 64 and tokens.shape == (2, 1 + 4, NETWORKS["resnet10"])
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    assert tokens.std() > 0.01 and not torch.allclose(tokens[:, 0], other[:, 0])


def test_a_network_in_a_file_comes_back(tmp_path):
    net = ConvNet("resnet10", 32).eval()
    save_any(net, tmp_path / "model.safetensors", {})
    back = load_any(tmp_path)
    view = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert back.image_size == 32 and fingerprint(back) == fingerprint(net)
    assert torch.equal(back.features(view), net.features(view))


def test_it_learns_and_recognises_as_a_vit_does(small, tmp_path, no_pictures):
    words = ["--method", "full", "--from-scratch", "--data", small, "--epochs", 2]
    words += ["--image-size", 32, "--batch-size", 16, "--device", "cpu", "--dtype", "fp32"]
    stage = "experiments.convnets"
    call(stage, "resnet10", *words, "--out", tmp_path / "run", cwd=tmp_path, check=0)
    pictures = sorted((small.parent / "images").rglob("*.png"))[:4]
    lines = call(stage, tmp_path / "run", *pictures, cwd=tmp_path, check=0).stdout.splitlines()
    assert len(lines) == 4 and all("confidence" in line or "unknown" in line for line in lines)
