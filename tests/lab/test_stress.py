"""lab.stress: corruptions do what they say; the probe is measured as a user measures it."""

import json
import shutil

import pytest
import torch
from conftest import run_line

from common import metrics
from common.checkpoints import save_network
from common.train import seeded
from lab import stress
from model import ViT


@pytest.fixture(scope="module")
def images():
    """Smooth pictures: what rotation and JPEG are made for."""
    small = torch.randint(256, (4, 3, 4, 4), generator=seeded(0)).float()
    big = torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(0, 255)
    return big.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous()


def apart(a, b):
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("name", stress.SWEEPS)
def test_every_corruption_spoils_and_repeats_itself(images, name):
    spoil, levels, _, headline = stress.SWEEPS[name]
    found = [spoil(images, level, seeded(0)) for level in levels]
    assert headline in levels
    assert all(x.shape == images.shape and x.dtype == torch.uint8 for x in found)
    assert torch.equal(found[0], spoil(images, levels[0], seeded(0)))
    strength = [apart(x, images) for x in found]
    assert max(strength) > 0.5
    assert name not in ("cutout", "blur", "jpeg") or strength == sorted(strength)


def test_turning_there_and_back_or_not_at_all(images):
    quarter = stress.rotation(images, 90, None)
    assert any(torch.equal(quarter, images.rot90(k, (1, 2))) for k in (1, -1))
    assert torch.equal(stress.rotation(images, 0, None), images)
    assert torch.equal(stress.scale(images, 1.0, None), images)
    around = stress.hue(stress.hue(images, 120, None), 240, None)
    assert apart(around, images) < 12  # but for clipping
    gray = stress.channels_last(stress.luminance(images))
    assert apart(stress.hue(gray, 60, None), gray) < 0.6
    flat = torch.full((1, 8, 8, 3), 90, dtype=torch.uint8)
    assert (stress.line_art(flat, 1, None) == 255).all()


def report_of(base, words, file):
    """What a call prints, and the file that it writes."""
    line = f"lab.stress run --data packed --images 16 --device cpu {words}"
    text = run_line(line, base, check=0).stdout
    return text, json.loads((base / "run" / file).read_text())


def test_one_command_writes_what_its_docstring_says(small, tmp_path):
    shutil.copytree(small, tmp_path / "packed")
    save_network(ViT(32, 8, 32, 2, 2), tmp_path / "run/model.safetensors", {}, "encoder.")
    _, report = report_of(tmp_path, "--split test", "packed-test/stress.json")
    assert set(report["robustness"]) == set(stress.SWEEPS)
    file = "packed-test/stress-cutout-grayscale.json"
    text, some = report_of(tmp_path, "--split test --only cutout,grayscale", file)
    whole = report["robustness"]
    expected = {"cutout 0.3": whole["cutout"]["0.3"], "grayscale 1": whole["grayscale"]["1"]}
    assert some["top1"] == expected and "Top-1 under cutout 0.3" in text
    right = metrics.from_bits(some["right"]["cutout 0.3"], some["images"])
    assert 100 * right.mean() == pytest.approx(some["top1"]["cutout 0.3"])
