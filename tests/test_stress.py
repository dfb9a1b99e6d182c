"""experiments.stress: corruptions do what they say; the probe and the pixels are measured as a user measures them."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
from conftest import call

import mask as masking
import model
from common import stats
from common.command import LOCKS
from common.io import UserError
from experiments import stress
from ingest import pack, toon


@pytest.fixture(scope="module")
def images():
    """Smooth pictures: what rotation and JPEG are made for."""
    draws = torch.Generator().manual_seed(0)
    small = torch.randint(256, (4, 3, 4, 4), generator=draws).float()
    big = torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(0, 255)
    return big.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous()


def apart(a, b):
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("name", stress.SWEEPS)
def test_every_corruption_spoils_and_repeats_itself(images, name):
    spoil, levels, _, headline = stress.SWEEPS[name]
    found = [spoil(images, level, torch.Generator().manual_seed(0)) for level in levels]
    assert (
        all(x.shape == images.shape and x.dtype == torch.uint8 for x in found)
        and headline in levels
    )
    assert torch.equal(found[0], spoil(images, levels[0], torch.Generator().manual_seed(0)))
    strength = [apart(x, images) for x in found]
    assert max(strength) > 0.5 and (
        name not in ("cutout", "blur", "jpeg") or strength == sorted(strength)
    )


def test_cutout_has_the_area_that_was_asked(images):
    spoiled = stress.cutout(images, 0.25, torch.Generator().manual_seed(0))
    changed = (spoiled != images).any(3).float().mean((1, 2))
    assert ((changed - 0.25).abs() < 0.02).all()
    where = torch.zeros(4, 32, 32, dtype=torch.bool)
    where[:, :5, :7] = True
    assert (stress.moved(where, torch.Generator().manual_seed(1)).sum((1, 2)) == 35).all()


def test_turning_there_and_back_or_not_at_all(images):
    quarter = stress.rotation(images, 90, None)
    assert torch.equal(stress.rotation(images, 0, None), images)
    assert torch.equal(stress.scale(images, 1.0, None), images)
    assert any(torch.equal(quarter, images.rot90(k, (1, 2))) for k in (1, -1))
    assert (
        apart(stress.hue(stress.hue(images, 120, None), 240, None), images) < 12
    )  # but for clipping
    gray = stress.channels_last(stress.luminance(images))
    assert apart(stress.hue(gray, 60, None), gray) < 0.6 and (gray[..., 0] == gray[..., 2]).all()


def test_line_art_of_one_colour_is_white():
    assert (stress.line_art(torch.full((1, 8, 8, 3), 90, dtype=torch.uint8), 1, None) == 255).all()


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A demo set of six characters (12 in val), with true parts and styles, and a run on it."""
    base, plan = tmp_path_factory.mktemp("drawn"), toon.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toon, "plan", lambda **kw: plan(**kw | {"n": 120}, characters=6))
        pack.pack("toon", base / "toon", size=32)
        patch.setitem(
            model.SIZES, "nano", model.SIZES["nano"] | {"dim": 32, "depth": 2, "heads": 2}
        )
        quick = ["--model", "nano:image_size=32", "--batch-size", 16, "--epochs", 1]
        words = ["--data", base / "toon", "--out", base / "run", *quick, "--device", "cpu"]
        call("pretrain.py", *words, cwd=base, check=0)
    return base


def run_stress(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["experiments.stress", *map(str, words)])
    with LOCKS:
        stress.main()


def test_one_command_writes_what_its_docstring_says(drawn, monkeypatch, capsys):
    monkeypatch.setattr(stress, "RESOLUTIONS", (32, 64))
    monkeypatch.setattr(stress, "RATIOS", (0.5, 0.75))
    run_stress(monkeypatch, drawn / "run", "--images", 16, "--device", "cpu")
    report, text = json.loads((drawn / "run" / "stress.json").read_text()), capsys.readouterr().out
    assert set(report["robustness"]) == set(stress.SWEEPS) and "eyes" in report["parts"]
    assert report["images"] == 16
    same = report["resolution"][0]  # the size that it was trained at
    assert same["side"] == 32 and same["top1"] == same["top1_trained_size"] == report["clean"]
    assert [r["ratio"] for r in report["reconstruction"]] == [0.5, 0.75]
    assert all(r["psnr"] > 0 and -1 <= r["ssim"] <= 1 for r in report["reconstruction"])
    assert "masked error under the fixed random mask" in text and "without eyes" in text


def test_nothing_that_is_there_is_replaced(drawn, monkeypatch, tmp_path):
    run = shutil.copytree(
        drawn / "run", tmp_path / "run", ignore=shutil.ignore_patterns("stress*", "*.png")
    )
    (run / "stress.json").write_text("mine")
    with pytest.raises(UserError, match="stress.json is there already"):
        run_stress(monkeypatch, run, "--images", 8)
    words = [run, "--images", 8, "--device", "cpu", "--only", "cutout"]
    run_stress(monkeypatch, *words)
    with pytest.raises(UserError, match=r"stress-cutout\.json is there already"):
        run_stress(monkeypatch, *words)
    shutil.copytree(drawn / "toon", tmp_path / "other")
    run_stress(monkeypatch, *words, "--data", tmp_path / "other")
    run_stress(monkeypatch, *words, "--split", "test")
    where = [
        p.parent.relative_to(run).as_posix() for p in sorted(run.glob("**/stress-cutout.json"))
    ]
    assert sorted(where) == [".", "other-val", "toon-test"]
    assert json.loads((run / "toon-test/stress-cutout.json").read_text())["split"] == "test"


@pytest.mark.parametrize("words", [["--only", "cutout"], ["--pool", "cls"]])
def test_what_the_mid_terms_table_would_not_use_is_refused(drawn, monkeypatch, words):
    with pytest.raises(UserError, match=f"{words[0]} has no effect with --midterm"):
        run_stress(monkeypatch, drawn / "run", "--midterm", *words)


def test_only_one_corruption_is_what_the_whole_sweep_says(drawn, monkeypatch, capsys):
    run_stress(
        monkeypatch, drawn / "run", "--images", 16, "--device", "cpu", "--only", "cutout,grayscale"
    )
    report = json.loads((drawn / "run" / "stress-cutout-grayscale.json").read_text())
    whole = json.loads((drawn / "run" / "stress.json").read_text())["robustness"]
    assert report["top1"] == {
        "cutout 0.3": whole["cutout"]["0.3"],
        "grayscale 1": whole["grayscale"]["1"],
    }
    right = stats.from_bits(report["right"]["cutout 0.3"], report["images"])
    assert (
        100 * right.mean() == pytest.approx(report["top1"]["cutout 0.3"])
        and "Top-1 under cutout 0.3" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="cutot is unknown"):
        run_stress(monkeypatch, drawn / "run", "--only", "cutot")


def test_the_mid_terms_table_is_one_flag(drawn, monkeypatch, capsys):
    run_stress(monkeypatch, drawn / "run", "--midterm", "--images", 8, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["25%", "50%", "75%", "90%"]
    assert all(set(line.split()) & {"good", "moderate", "poor"} for line in lines[1:5])
    grades = [stress.grade(x) for x in (18.1, 18.0, 10.0, 9.9)]
    assert grades == ["good", "moderate", "moderate", "poor"]


def test_pixels_are_made_without_the_answer(drawn):
    """What stands in the hidden patches must not change what is predicted for them: no statistic of
    theirs is used.
    """
    mae = stress.load_mae(drawn / "run", torch.device("cpu"))
    assert mae[1]["norm_pix"]
    draws = torch.Generator().manual_seed(0)
    view = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=draws)
    noise, exact = masking.gumbel_noise(2, 16, draws), contextlib.nullcontext
    made, where = stress.reconstruct(mae, view, 0.75, noise, exact)
    other = torch.where(where[..., None], 255 - view, view)
    again, _ = stress.reconstruct(mae, other, 0.75, noise, exact)
    assert (
        torch.equal(made, again)
        and torch.equal(made[~where], view[~where])
        and where.float().mean() == 0.75
    )


def test_pixels_hidden_are_those_of_the_mask():
    ids = torch.tensor([[0, 5]])
    where = stress.hidden_pixels(ids, 4, 32)
    assert where.sum() == 2 * 64 and where[0, :8, :8].all() and where[0, 8:16, 8:16].all()


def test_the_flat_guess_is_the_mean_of_what_is_seen(images):
    where = torch.zeros(4, 32, 32, dtype=torch.bool)
    where[:, :16] = True
    guess = stress.flat_guess(images, where)
    assert torch.equal(guess[:, 16:], images[:, 16:])
    torch.testing.assert_close(guess[:, 0, 0].float(), images[:, 16:].float().mean((1, 2)).round())
