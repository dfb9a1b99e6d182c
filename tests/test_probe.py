"""probe.py as a user runs it, on a run of seconds; features that are refused; comparison of runs."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_folder, stage
from safetensors import safe_open
from safetensors.torch import save_file

import data
import pretrain
import probe
from common import checkpoints, features, stats
from common.command import LOCKS
from common.io import UserError
from ingest import pack
from model import ViT

QUICK = ["--device", "cpu", "--model", "nano:image_size=32", "--batch-size", "16", "--epochs", "2"]
FAST = ["--device", "cpu", "--dtype", "fp32"]


def run_probe(monkeypatch, *words, looking=False):
    """probe.main in this process; without the pictures, which are slow and checked once."""
    if not looking:
        monkeypatch.setattr(probe, "draw", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, words)])
    with LOCKS:
        probe.main()


def relative(run, other, **flags):
    """A copy of a run as if it had been made with other flags: slightly other weights."""
    shutil.copytree(run, other)
    with safe_open(run / "model.safetensors", "pt") as f:
        about = json.loads(f.metadata()["animask"])
        weights = {k: f.get_tensor(k) * (1 + 0.01 * len(other.name)) for k in f.keys()}  # noqa: SIM118
    about["run"] |= flags
    save_file(weights, other / "model.safetensors", {"animask": json.dumps(about)})


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Two seeds of random masks and one of green noise, and what probe.py printed of the first."""
    base = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        words = ["pretrain.py", "--data", small, "--out", base / "random-s0", *QUICK]
        patch.setattr(sys, "argv", [str(w) for w in words])
        pretrain.main()
    relative(base / "random-s0", base / "random-s1", seed=1)
    relative(base / "random-s0", base / "green-s0", mask="green")
    done = stage("probe.py", base / "random-s0", *FAST, cwd=base, check=0)
    return base, done


def test_one_command_writes_what_its_docstring_says(runs):
    base, done = runs
    files = {p.name for p in (base / "random-s0").iterdir()}
    assert {"probe.json", "attention.png", "neighbours.png"} <= files
    report = json.loads((base / "random-s0" / "probe.json").read_text())
    rows = report["rows"]
    controls = ["untrained extremes", "thumb4", "thumb8", "thumb16", "chance"]
    assert [*rows] == ["mean", "cls", "extremes", *controls]
    for row in rows.values():
        assert {"logistic", "knn", "retrieval", "few_shot", "verification"} == set(row)
    assert report["headline"] == rows["extremes"]["logistic"]["top1"]
    assert rows["thumb4"]["logistic"]["top1"] > 0.9  # classes are colours
    assert rows["chance"]["logistic"]["top1"] < 0.5
    assert report["efficiency"]["threshold"] > 0
    assert max(map(len, done.stdout.split("kNN of")[0].splitlines()[2:])) <= 100


@pytest.mark.slow
def test_the_same_command_gives_the_same_digits(runs, monkeypatch):
    """In another process."""
    run = runs[0] / "random-s0"
    first = json.loads((run / "probe.json").read_text())
    (run / "probe.json").unlink()
    run_probe(monkeypatch, run, *FAST)
    again = json.loads((run / "probe.json").read_text())
    assert again["rows"] == first["rows"] and again["efficiency"] == first["efficiency"]


def test_the_headline_alone_has_the_same_digits(runs, tmp_path, monkeypatch):
    shutil.copytree(runs[0] / "random-s0", tmp_path / "run")
    whole = json.loads((tmp_path / "run" / "probe.json").read_text())
    run_probe(monkeypatch, tmp_path / "run", *FAST, "--headline")
    assert json.loads((tmp_path / "run" / "probe.json").read_text()) == whole
    report = json.loads((tmp_path / "run" / "probe-headline.json").read_text())
    assert [*report["rows"]] == ["extremes", "chance"]
    for head in probe.HEADS:
        assert report["rows"]["extremes"][head] == whole["rows"]["extremes"][head]
        right = stats.from_bits(report["right"][head], report["images"]["val"])
        assert right.mean() == pytest.approx(report["rows"]["extremes"][head]["top1"])


def test_runs_are_compared_in_pairs(runs, tmp_path, monkeypatch, capsys):
    names = ("random-s0", "random-s1", "green-s0")
    for name in names:
        skip = shutil.ignore_patterns("probe*.json", "*.png")
        shutil.copytree(runs[0] / name, tmp_path / name, ignore=skip)
    words = (*(tmp_path / name for name in names), *FAST, "--headline")
    run_probe(monkeypatch, *words)
    report = json.loads((tmp_path / "compare" / "compare.json").read_text())
    configurations = report["configurations"]
    assert {name: row["runs"] for name, row in configurations.items()} == {"random": 2, "green": 1}
    assert configurations["random"]["logistic"]["std"] is not None
    assert [(row["seeds"], row["t"]) for row in report["pairs"]] == [([0], None)] * 2
    assert (tmp_path / "compare" / "curves.png").exists()
    assert "1 seed(s): no t interval" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        run_probe(monkeypatch, *words)


def fake(run, seed, right, **config):
    top1 = {head: {"top1": right.double().mean().item()} for head in probe.HEADS}
    return {
        "run": run,
        "path": run,
        "config": {"seed": seed, **config},
        "pool": "mean",
        "rows": {"mean": top1},
        "efficiency": None,
        "right": dict.fromkeys(probe.HEADS, right),
    }


def test_an_interval_is_above_zero_only_where_there_is_a_difference():
    """Five seeds: 20 points better on the same images, and the same accuracy on other images."""
    draws, reports = torch.Generator().manual_seed(0), []
    for seed in range(5):
        right = torch.rand(400, generator=draws) < 0.6
        better = right | (torch.rand(400, generator=draws) < 0.5)
        other = torch.rand(400, generator=draws) < 0.6
        for name, found in (("plain", right), ("good", better), ("same", other)):
            reports.append(fake(f"{name}-s{seed}", seed, found, mask=name))
    configs = probe.by_config(reports)
    assert [*configs] == ["plain", "good", "same"]
    for row in probe.differences(configs, np.arange(400)):
        better = row["pair"] == "good - plain"
        low = min(row["t"]["low"], row["images"]["low"])
        assert (low > 0) == better
    assert probe.summary(configs["plain"])["knn"]["n"] == 5
    with pytest.raises(UserError, match="the same seed"):
        probe.by_config([reports[0], reports[0]])


def test_efficiency_against_a_log():
    rows = [
        {"epoch": 0, "seconds": 1, "knn": 50},
        {"epoch": 5, "seconds": 60, "memory_mb": 900},
        {"epoch": 10, "seconds": 101, "knn": 70},
        {"epoch": 20, "seconds": 201, "knn": 80},
    ]
    found = probe.efficiency(rows, 75)
    assert (found["reached_epoch"], found["reached_seconds"], found["peak_memory_mb"]) == (
        15,
        151,
        900,
    )
    assert probe.efficiency(rows, 81)["reached_epoch"] is None
    assert probe.efficiency([], 75) is None


def test_without_dev_a_tenth_of_train_is_held_apart_by_group(small):
    parts = features.open_splits(small)
    parts["train"]["header"]["groups"] = [
        f"g{i // 4}" for i in range(len(parts["train"]["labels"]))
    ]
    fit, choose, where = features.hold_out(parts)
    groups = data.groups_of(parts["train"])
    assert where == "train" and 0.05 < len(choose) / len(groups) < 0.2
    assert not set(groups[fit].tolist()) & set(groups[choose].tolist())


def test_features_are_those_of_the_encoder(small):
    """Pools of the tokens of the whole image; thumbnails of the same image."""
    encoder, split = ViT(32, 8, 32, 2, 2).eval(), features.open_splits(small)["val"]
    cpu = torch.device("cpu")
    task = SimpleNamespace(splits={"val": split}, device=cpu, autocast=torch.no_grad)
    found = features.extract(lambda view: features.pooled(encoder, view), 32, task)
    view = next(data.whole_views(split["images"], torch.arange(5), 32, cpu))[1]
    with torch.no_grad():
        tokens = encoder.features(view)
    torch.testing.assert_close(found["mean"]["val"][:5], tokens[:, 1:].mean(1).half())
    torch.testing.assert_close(found["cls"]["val"][:5], tokens[:, 0].half())
    assert found["extremes"]["val"].shape == (len(split["labels"]), 64)


# ---- looking -------------------------------------------------------------------------------------


def test_rollout_is_a_share_of_attention_and_of_one_block_half_of_it():
    view = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        rollout = ViT(32, 8, 32, 3, 2).eval().patch_attention(view, "rollout")[:, 0]
        one = ViT(32, 8, 32, 1, 2).eval()
        torch.testing.assert_close(
            one.patch_attention(view, "rollout")[:, 0], one.patch_attention(view).mean(1) / 2
        )
    assert rollout.shape == (2, 16) and (rollout.sum(1) < 1).all() and (rollout >= 0).all()


# ---- bad input -----------------------------------------------------------------------------------


def test_a_run_without_a_model(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no encoder at .*pretrain.py"):
        run_probe(monkeypatch, tmp_path / "run")


@pytest.mark.parametrize(
    "words, says",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--split", "dev"], "no split dev"),
        (["--out", "here"], "--out has no effect here"),
    ],
)
def test_bad_flags_are_one_line(runs, tmp_path, monkeypatch, words, says):
    run = tmp_path / "run"
    shutil.copytree(runs[0] / "random-s1", run, ignore=shutil.ignore_patterns("probe*"))
    before = sorted(run.iterdir())
    with pytest.raises(UserError, match=says):
        run_probe(monkeypatch, run, *FAST, *words)
    assert {p.name for p in run.iterdir()} - {p.name for p in before} <= {".probe.json.lock"}


def test_results_of_other_data_stand_beside_those_of_its_own(runs, tmp_path, monkeypatch):
    draw_folder(tmp_path / "images", classes=3, each=12, seed=5)
    pack.pack(tmp_path / "images", tmp_path / "other", size=32)
    run = tmp_path / "run"
    shutil.copytree(runs[0] / "random-s0", run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for words in (["--data", tmp_path / "other"], ["--split", "test"]):
        run_probe(monkeypatch, run, *FAST, "--headline", *words)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    for name in ("other-val", "packed-test"):
        assert [p.name for p in (run / name).iterdir()] == ["probe-headline.json"]
    report = json.loads((run / "other-val" / "probe-headline.json").read_text())
    assert report["run"] == "run" and report["data"] == str(tmp_path / "other")
    with pytest.raises(UserError, match="probe-headline.json is there already"):
        run_probe(monkeypatch, run, "--device", "cpu", "--headline", "--data", tmp_path / "other")
    own = checkpoints.flags_of(run)["data"]
    assert (
        features.results_folder(run, own, "val")
        == run
        == features.results_folder(run, Path(own) / ".", "val")
    )
    assert features.results_folder("x/dino.pth", own, "val") == Path(
        "x/dino/packed-val"
    )  # it has no data of its own


def test_classes_that_differ_between_train_and_val_are_named(runs, small, tmp_path, monkeypatch):
    draw_folder(tmp_path / "images", classes=4, each=12)
    pack.pack(tmp_path / "images", tmp_path / "other", size=32)
    shutil.copytree(small, tmp_path / "mixed")
    shutil.copy(tmp_path / "other" / "val.safetensors", tmp_path / "mixed")
    with pytest.raises(UserError, match="val has other classes than train .*class3"):
        run_probe(monkeypatch, runs[0] / "random-s1", "--data", tmp_path / "mixed")


def test_without_labels_the_pictures_still_work(runs, tmp_path, monkeypatch, capsys):
    draw_folder(tmp_path / "pictures", classes=1, each=24)
    pack.pack(tmp_path / "pictures" / "class0", tmp_path / "flat", size=32)
    shutil.copytree(runs[0] / "random-s1", tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    words, home = (
        (tmp_path / "run", "--data", tmp_path / "flat", *FAST),
        tmp_path / "run" / "flat-val",
    )
    with pytest.raises(UserError, match="--headline has no effect here"):
        run_probe(monkeypatch, *words, "--headline", looking=True)
    run_probe(monkeypatch, *words, looking=True)
    assert "no numbers" in capsys.readouterr().out and (home / "neighbours.png").exists()
    assert "rows" not in json.loads((home / "probe.json").read_text())
