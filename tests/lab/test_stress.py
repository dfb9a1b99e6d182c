"""lab.stress: corruptions do what they say; the probe and the pixels are measured as a user measures them."""

import contextlib
import json

import pytest
import torch
from conftest import run_line

import mask as masking
import model
from common import metrics
from common.train import seeded
from ingest import pack, toon
from lab import stress


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
    where = torch.zeros(4, 32, 32, dtype=torch.bool)
    where[:, :5, :7] = True
    assert (stress.moved(where, seeded(1)).sum((1, 2)) == 35).all()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A demo set of six characters (12 in val), with true parts and styles, and a run on it."""
    base, plan = tmp_path_factory.mktemp("drawn"), toon.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toon, "plan", lambda **kw: plan(**kw | {"n": 120, "characters": 6}))
        pack.pack("toon", base / "toon", size=32)
        size = {"dim": 32, "depth": 2, "heads": 2}
        patch.setitem(model.SIZES, "nano", model.SIZES["nano"] | size)
        words = "--data toon --out run --model nano:image_size=32 --batch-size 16 --epochs 1"
        run_line(f"pretrain.py {words} --device cpu", base, check=0)
        patch.setattr(stress, "RATIOS", (0.5, 0.75))
        yield base


STRESS = "lab.stress run --images 16 --device cpu"


def report_of(base, words, file):
    """What a call prints, and the file that it writes."""
    text = run_line(f"{STRESS} {words}", base, check=0).stdout
    return text, json.loads((base / "run" / file).read_text())


def test_one_command_writes_what_its_docstring_says(base):
    text, report = report_of(base, "", "stress.json")
    assert set(report["robustness"]) == set(stress.SWEEPS) and "eyes" in report["parts"]
    assert [r["ratio"] for r in report["reconstruction"]] == [0.5, 0.75]
    assert all(r["psnr"] > 0 and -1 <= r["ssim"] <= 1 for r in report["reconstruction"])
    assert all(f"{r['psnr']:.2f}" in text for r in report["reconstruction"])
    text, some = report_of(base, "--only cutout,grayscale", "stress-cutout-grayscale.json")
    whole = report["robustness"]
    expected = {"cutout 0.3": whole["cutout"]["0.3"], "grayscale 1": whole["grayscale"]["1"]}
    assert some["top1"] == expected and "Top-1 under cutout 0.3" in text
    right = metrics.from_bits(some["right"]["cutout 0.3"], some["images"])
    assert 100 * right.mean() == pytest.approx(some["top1"]["cutout 0.3"])


def test_pixels_are_made_without_the_answer(base):
    """What stands in the hidden patches must not change what is predicted for them."""
    mae = stress.load_mae(base / "run")
    assert mae[1]["norm_pix"]
    view = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=seeded(0))
    ids = masking.sample(masking.gumbel_noise(2, 16, seeded(1)), 4)
    made, where = stress.filled_in(*mae, view, *ids, contextlib.nullcontext)
    other = torch.where(where[..., None], 255 - view, view)
    again, _ = stress.filled_in(*mae, other, *ids, contextlib.nullcontext)
    assert torch.equal(made, again) and torch.equal(made[~where], view[~where])
    assert where.float().mean() == 0.75


def test_the_flat_guess_is_the_mean_of_the_visible_pixels(images):
    upper = torch.zeros(4, 32, 32, dtype=torch.bool)
    upper[:, :16] = True
    guess = stress.flat_guess(images, upper)
    assert torch.equal(guess[:, 16:], images[:, 16:])
    torch.testing.assert_close(guess[:, 0, 0].float(), images[:, 16:].float().mean((1, 2)).round())
