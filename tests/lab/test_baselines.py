"""Baselines of pretrain.py: DINO by hand, and convolutional networks in the same stages."""

import json
import math

import pytest
import torch
from conftest import call, run_line, some_view

from common.checkpoints import fingerprint, load_encoder
from common.train import read_safetensors, seeded
from lab import dino
from lab.convnets import NETWORKS, ConvNet, load_any, save_any
from model import SIZES, ViT


def test_the_loss_of_dino_is_the_cross_entropy_of_different_crops():
    torch.manual_seed(0)
    said, taught = torch.randn(3, 4, 5), torch.randn(2, 4, 5)
    centre = torch.randn(5)
    total = []
    for t, v in ((0, 1), (0, 2), (1, 0), (1, 2)):
        p = ((taught[t] - centre) / dino.SHARPER).softmax(1)
        total.append(-(p * (said[v] / dino.SHARP).log_softmax(1)).sum(1).mean())
    expected = torch.stack(total).mean()
    torch.testing.assert_close(dino.dino_loss(said, taught, centre), expected)
    same = torch.zeros(2, 3, 8)
    assert dino.dino_loss(same, same, torch.zeros(8)).item() == pytest.approx(math.log(8))


def test_a_view_of_the_full_size_has_the_encoders_own_token_and_a_small_one_fewer_patches():
    torch.manual_seed(0)
    encoder, view = ViT(32, 8, 64, 2, 2), torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(dino.cls_of(encoder, view), encoder.features(view)[:, 0])
    assert dino.cls_of(encoder, view[:, ::2, ::2].contiguous()).shape == (2, 64)


def test_small_crops_lie_in_the_picture_and_are_small(monkeypatch):
    monkeypatch.setattr(dino, "JITTER", 0.0)
    ramp = torch.arange(64, dtype=torch.uint8)
    images = ramp[None, None, :, None].expand(256, 64, 64, 3).contiguous()
    wide, small = (dino.crops(images, seeded(0), 16, x).float() for x in (1.0, 0.5))

    def span(x):
        return (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).mean()

    assert 0.4 < span(small) / span(wide) < 0.6


def test_what_it_writes_is_an_encoder(small, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "nano", SIZES["nano"] | {"dim": 32, "depth": 1, "heads": 2})
    words = "--out run --image-size 32 --batch-size 32 --epochs 1 --device cpu"
    run_line(f"lab.dino --data {small} {words}", tmp_path, check=0)
    encoder = load_encoder(tmp_path / "run")
    assert encoder.image_size == 32 and encoder.side == 4


# ---- convolutional networks ----------------------------------------------------------------------


def test_tokens_are_the_places_of_the_last_map_and_before_them_their_mean():
    net, view = load_any("resnet10", 64), some_view(2, 64)
    with torch.no_grad():
        tokens, other = net.train()(*net.all_patches(view)), net.features(view.flip(1))
    assert net.image_size == 64 and tokens.shape == (2, 1 + 4, NETWORKS["resnet10"])
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    assert tokens.std() > 0.01 and not torch.allclose(tokens[:, 0], other[:, 0])


def test_a_network_in_a_file_comes_back(tmp_path):
    net = ConvNet("resnet10", 32).eval()
    save_any(net, tmp_path / "model.safetensors", {})
    back = load_any(tmp_path)
    view = some_view(2)
    assert back.image_size == 32 and fingerprint(back) == fingerprint(net)
    assert torch.equal(back.features(view), net.features(view))


def test_it_learns_and_recognises_as_a_vit_does(small, tmp_path, no_pictures):
    learn = f"--method full --from-scratch --data {small} --split val --epochs 2 --out run"
    size = "--image-size 32 --batch-size 32 --device cpu --dtype fp32"
    run_line(f"lab.convnets resnet10 {learn} {size}", tmp_path, check=0)
    pictures = sorted((small.parent / "images").rglob("*.png"))[:4]
    lines = call("lab.convnets", "run", *pictures, cwd=tmp_path, check=0).stdout.splitlines()
    assert len(lines) == 4 and all("confidence" in line or "unknown" in line for line in lines)
    # Its statistics are part of what it learned: after a stop they are there again.
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    weights = read_safetensors(tmp_path / "run/model.safetensors")[0]
    running = {k: w for k, w in weights.items() if "running_" in k}
    assert running
    for part in (state["model"], state["best"]["weights"]):
        assert running.keys() <= {name.removeprefix("encoder.") for name in part}
    (tmp_path / "run/metrics.json").unlink()
    run_line("lab.convnets --resume run", tmp_path, check=0)
    again = read_safetensors(tmp_path / "run/model.safetensors")[0]
    assert all(torch.equal(again[name], w) for name, w in running.items())
    run_line("lab.convnets run --device cpu", tmp_path, check=0)
    row = json.loads((tmp_path / "run/recognize.json").read_text())
    assert row["verification"]["positive_pairs"] > 0 and row["open_set"]["known"] > 0
