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
    spoil, levels, _ = stress.SWEEPS[name]
    found = [spoil(images, level, seeded(0)) for level in levels]
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


def test_one_command_writes_what_its_docstring_says(small, tmp_path):
    shutil.copytree(small, tmp_path / "packed")
    save_network(ViT(32, 8, 32, 2, 2), tmp_path / "run/model.safetensors", {}, "encoder.")
    found = []
    for split, flags in (("test", ""), ("val", "--only cutout,grayscale")):
        line = f"lab.stress run --data packed --images 16 --device cpu --split {split} {flags}"
        run_line(line, tmp_path, check=0)
        found.append(json.loads((tmp_path / f"run/packed-{split}/stress.json").read_text()))
    assert [set(report["robustness"]) for report in found] == [
        set(stress.SWEEPS),
        {"cutout", "grayscale"},
    ]
    for report in found:
        right = metrics.from_bits(report["right"]["cutout"]["0.3"], report["images"])
        assert 100 * right.mean() == pytest.approx(report["robustness"]["cutout"]["0.3"])
