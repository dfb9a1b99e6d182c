"""probe.py as a user runs it, on a run of seconds; features that are refused; comparison of runs."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder, refused, stage
from safetensors import safe_open
from safetensors.torch import save_file

import data
import pretrain
import probe
from common import checkpoints, compare, features, stats
from common.command import LOCKS
from common.io import UserError
from ingest import pack
from model import ViT

QUICK = [
    "--device",
    "cpu",
    "--image-size",
    32,
    "--batch-size",
    16,
    "--epochs",
    2,
    "--decoder-depth",
    1,
]
FAST = ["--device", "cpu", "--dtype", "fp32", "--views", 2]


def run_probe(monkeypatch, *words, looking=False):
    """probe.main in this process; without the pictures, which are slow and looked at once."""
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
        words = ["pretrain.py", "--data", small, "--out", base / "random-s0", *QUICK, "--every", 1]
        patch.setattr(sys, "argv", [str(w) for w in words])
        pretrain.main()
    relative(base / "random-s0", base / "random-s1", seed=1)
    relative(base / "random-s0", base / "green-s0", mask="green")
    done = stage("probe.py", base / "random-s0", *FAST, "--snapshots", cwd=base, check=0)
    return base, done


def test_one_command_writes_what_its_docstring_says(runs):
    base, done = runs
    written = {
        "probe.json",
        "features.safetensors",
        "attention.png",
        "patches.png",
        "neighbours.png",
        "scatter.png",
        "confusion.png",
        "snapshots.png",
    }
    assert written <= {p.name for p in (base / "random-s0").iterdir()}
    assert len(list(base.glob("controls-*.safetensors"))) == 1
    report = json.loads((base / "random-s0" / "probe.json").read_text())
    rows = report["rows"]
    assert [*rows] == [
        "mean",
        "cls",
        "extremes",
        "grid",
        "attentive",
        "untrained mean",
        "untrained cls",
        "untrained extremes",
        "untrained grid",
        "thumb4",
        "thumb8",
        "thumb16",
        "chance",
    ]
    assert rows.pop("attentive")["linear"]["top1"] > 0.4  # of three colours
    for row in rows.values():
        assert {"linear", "knn", "retrieval", "few_shot"} <= set(row)
    assert [name for name, row in rows.items() if "logistic" not in row] == [
        "grid",
        "untrained grid",
    ]
    assert report["headline"] == rows["extremes"]["logistic"]["top1"]
    assert (
        rows["thumb4"]["logistic"]["top1"] > 0.9 and rows["chance"]["logistic"]["top1"] < 0.5
    )  # classes are colours
    assert [epoch for epoch, _ in report["snapshots"]] == [0, 1, 2] and report["efficiency"][
        "threshold"
    ] > 0
    assert max(map(len, done.stdout.split("wrote")[0].splitlines()[3:15])) <= 100
    assert "in the forward pass" in done.stdout and "untrained mean" in done.stdout


@pytest.mark.slow
def test_the_same_command_gives_the_same_digits(runs, monkeypatch):
    """In another process, and with features that are extracted again."""
    run = runs[0] / "random-s0"
    first = json.loads((run / "probe.json").read_text())
    for name in ("features.safetensors", "probe.json"):
        (run / name).unlink()
    run_probe(monkeypatch, run, *FAST)
    again = json.loads((run / "probe.json").read_text())
    assert again["rows"] == first["rows"] and again["efficiency"] == first["efficiency"]


def test_the_headline_alone_has_the_same_digits(runs, tmp_path, monkeypatch):
    shutil.copytree(runs[0] / "random-s0", tmp_path / "run")
    whole = json.loads((tmp_path / "run" / "probe.json").read_text())
    run_probe(monkeypatch, tmp_path / "run", *FAST[:-2], "--headline")
    assert (
        json.loads((tmp_path / "run" / "probe.json").read_text()) == whole
    )  # it has a file of its own
    report = json.loads((tmp_path / "run" / "probe-headline.json").read_text())
    assert [*report["rows"]] == ["extremes", "chance"] and not list(tmp_path.glob("controls-*"))
    assert not {"efficiency", "threshold"} & report.keys()
    for head in ("logistic", "knn"):
        assert report["rows"]["extremes"][head] == whole["rows"]["extremes"][head]
        right = stats.from_bits(report["right"][head], report["images"]["val"])
        assert right.mean() == pytest.approx(report["rows"]["extremes"][head]["top1"])
    with pytest.raises(UserError, match="one run"):
        run_probe(monkeypatch, tmp_path / "run", runs[0] / "random-s1", "--headline")


@pytest.mark.slow
def test_runs_are_compared_in_pairs(runs, monkeypatch, capsys):
    base, _ = runs
    made = (base / "random-s0" / "features.safetensors").stat().st_mtime_ns
    three = (base / "random-s0", base / "random-s1", base / "green-s0", *FAST)
    with pytest.raises(UserError, match="random-s0/probe.json is there already"):
        run_probe(monkeypatch, *three)
    (base / "random-s0" / "probe.json").unlink()
    run_probe(monkeypatch, *three)
    (base / "green-s0" / "probe.json").unlink()
    (base / "random-s1" / "probe.json").unlink()
    with pytest.raises(UserError, match="compare.json is there already"):
        run_probe(monkeypatch, *three[1:])
    assert (
        base / "random-s0" / "features.safetensors"
    ).stat().st_mtime_ns == made  # extracted once
    report = json.loads((base / "compare" / "compare.json").read_text())
    assert (
        report["configurations"]["random"]["runs"] == 2
        and report["configurations"]["green"]["runs"] == 1
    )
    assert report["configurations"]["random"]["logistic"]["std"] is not None
    assert [row["seeds"] for row in report["pairs"]] == [[0]] * 3
    assert {(row["verdict"], row["t"], row["p"]) for row in report["pairs"]} == {
        ("undecided", None, None)
    }
    assert (
        "| 1 seed: no interval | 1 seed: no interval | - | undecided |"
        in (base / "compare/compare.md").read_text()
    )
    assert (base / "compare" / "curves.png").exists() and (
        base / "compare" / "compare.md"
    ).read_text() in (capsys.readouterr().out)


def fake(run, seed, right, **config):
    top1 = {head: {"top1": right.double().mean().item()} for head in compare.HEADS}
    return {
        "run": run,
        "path": run,
        "config": {"seed": seed, **config},
        "pool": "mean",
        "rows": {"mean": top1},
        "efficiency": None,
        "right": dict.fromkeys(compare.HEADS, right),
    }


def test_a_difference_is_supported_only_where_there_is_one():
    """Five seeds: 20 points better on the same images is supported, the same accuracy on others is
    not.
    """
    draws, reports = torch.Generator().manual_seed(0), []
    for seed in range(5):
        right = torch.rand(400, generator=draws) < 0.6
        better = right | (torch.rand(400, generator=draws) < 0.5)
        other = torch.rand(400, generator=draws) < 0.6
        for name, found in (("plain", right), ("good", better), ("same", other)):
            reports.append(fake(f"{name}-s{seed}", seed, found, mask=name))
    configs = compare.by_config(reports)
    assert [*configs] == ["plain", "good", "same"]
    verdicts = {
        row["pair"]: row["verdict"] for row in compare.pairs(configs, np.arange(400), claim=5)
    }
    assert verdicts == {"good - plain": "supported", "same - plain": "undecided"}
    rows = compare.pairs(configs, np.arange(400), claim=50)  # better, but by less than was claimed
    assert {row["verdict"] for row in rows} == {"undecided"}


@pytest.mark.parametrize(
    "seeds, says", [(2, "2 seeds: no interval"), (3, "3 seeds: no interval, nothing varies")]
)
def test_seeds_that_tie_are_no_evidence(seeds, says):
    """79 pictures of which five more are right, in each seed: this was an interval of no width, and
    p 0.000.
    """
    kinds = {"a": torch.arange(79) < 40, "b": torch.arange(79) < 45}
    found = [
        fake(f"{name}-s{s}", s, right, mask=name)
        for s in range(seeds)
        for name, right in kinds.items()
    ]
    configs = compare.by_config(found)
    rows = compare.pairs(configs, np.arange(79), claim=0)
    assert all(
        r["t"] is r["bootstrap"] is r["p"] is r["holm_p"] is None and r["verdict"] == "undecided"
        for r in rows
    )
    text = compare.tables(
        {name: compare.summary(own) for name, own in configs.items()}, rows, "title"
    )
    assert f"| +6.33 | {says} | {says} | - | undecided |" in text


def test_the_interval_of_a_comparison_has_the_test_images_in_it():
    """Ten seeds with the same small noise, on 80 images: the seeds agree, and the images are few."""
    draws = torch.Generator().manual_seed(0)
    base, other = (torch.rand(80, generator=draws) < 0.6 for _ in range(2))
    flip = [torch.arange(80) == s for s in range(10)]
    found = [
        fake(f"{n}-s{s}", s, x ^ flip[s] if n == "b" else x, mask=n)
        for s in range(10)
        for n, x in (("a", base), ("b", other))
    ]
    row = compare.pairs(compare.by_config(found), np.arange(80), claim=0)[0]
    seeds = stats.paired_t(row["per_seed"])
    assert row["t"]["high"] - row["t"]["low"] > 3 * (seeds["high"] - seeds["low"])


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
    assert probe.efficiency(rows, 81)[
        "reached_epoch"
    ] is None and "not reached" in probe.efficiency_line(probe.efficiency(rows, 81), "absolute")
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
    """The first view is the whole image, unflipped; pools are what they say; thumbnails follow the
    same crop.
    """
    encoder, split = ViT(32, 8, 32, 2, 2).eval(), features.open_splits(small)["val"]
    clock = {}
    extractor = features.encoder_extractor(encoder, 32, torch.no_grad, clock)
    found = features.extract(extractor, split, 2, torch.device("cpu"))
    view = next(data.whole_views(split["images"], torch.arange(5), 32, torch.device("cpu")))[1]
    with torch.no_grad():
        tokens = encoder.features(view)
    torch.testing.assert_close(found["mean"][0, :5], tokens[:, 1:].mean(1).half())
    torch.testing.assert_close(found["cls"][0, :5], tokens[:, 0].half())
    assert found["extremes"].shape == (2, len(split["labels"]), 64) and clock["forward"] > 0
    assert not torch.equal(found["mean"][0], found["mean"][1])
    with torch.no_grad():
        blocks = features.pooled(encoder, view, True)
        first = encoder.blocks[0](encoder.embed(*encoder.all_patches(view)))
    torch.testing.assert_close(blocks["block1"], first[:, 1:].mean(1))
    assert "block2" in blocks and torch.equal(blocks["mean"], tokens[:, 1:].mean(1))


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


@pytest.mark.slow
def test_features_of_another_run_are_refused(runs, tmp_path, monkeypatch):
    base, run = runs[0], tmp_path / "run"
    shutil.copytree(base / "random-s1", run, ignore=shutil.ignore_patterns("features*"))
    shutil.copy(base / "random-s0" / "features.safetensors", run)
    before = (run / "features.safetensors").read_bytes()
    line = refused(stage("probe.py", run, *FAST, cwd=tmp_path))
    assert "another model" in line and "remove it" in line
    assert (run / "features.safetensors").read_bytes() == before
    (run / "features.safetensors").write_bytes(before[:5000])
    with pytest.raises(UserError, match="not a whole file of tensors"):
        run_probe(monkeypatch, run, *FAST)


def test_a_run_without_a_model(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no encoder at .*pretrain.py"):
        run_probe(monkeypatch, tmp_path / "run")


@pytest.mark.parametrize(
    "words, says",
    [
        (["--views", 0], "--views 0"),
        (["--seed", -1], "--seed -1"),
        (["--data", "nowhere"], "nowhere"),
        (["--split", "dev"], "no split dev"),
        (["--threshold", "nan"], "--threshold nan"),
        (["--claim", "-101"], "--claim"),
        (["--threshold", 101], "--threshold 101"),
        (["--seed", 2**64], f"--seed {2**64}"),
        (["--snapshots"], "snapshots holds none"),
        (["--reference", "nowhere"], "--reference nowhere has no kNN"),
        (["--out", "here"], "--out here is for a comparison.*leave it out"),
        (["--claim", 1], "--claim 1.0 is for"),
        (
            ["--threshold", 50, "--reference", "x"],
            "--reference x fixes the threshold.*leave it out",
        ),
        *(
            (["--headline", *words], f"{words[0]}.* is for .*leave it out")
            for words in (
                ["--reference", "x"],
                ["--threshold", 50],
                ["--views", 2],
                ["--claim", 1],
                ["--out", "x"],
                ["--snapshots"],
                ["--blocks"],
            )
        ),
    ],
)
def test_bad_flags_are_one_line(runs, tmp_path, monkeypatch, words, says):
    run = tmp_path / "run"
    shutil.copytree(
        runs[0] / "random-s1", run, ignore=shutil.ignore_patterns("snapshots", "probe*")
    )
    before = sorted(run.iterdir())
    with pytest.raises(UserError, match=says):
        run_probe(monkeypatch, run, *FAST[:-2], *words)
    assert sorted(run.iterdir()) == before


def test_results_of_other_data_stand_beside_those_of_its_own(runs, tmp_path, monkeypatch):
    draw_folder(tmp_path / "images", classes=3, each=12, seed=5)
    pack.pack(tmp_path / "images", tmp_path / "other", size=32)
    run = tmp_path / "run"
    shutil.copytree(runs[0] / "random-s0", run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for words in (["--data", tmp_path / "other"], ["--split", "test"]):
        run_probe(monkeypatch, run, *FAST[:-2], "--headline", *words)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    for name in ("other-val", "packed-test"):
        assert {p.name for p in (run / name).iterdir()} == {
            "probe-headline.json",
            "features.safetensors",
        }
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
    shutil.copytree(
        runs[0] / "random-s1", tmp_path / "run", ignore=shutil.ignore_patterns("features*", "*.png")
    )
    words, home = (
        (tmp_path / "run", "--data", tmp_path / "flat", *FAST[:-2]),
        tmp_path / "run" / "flat-val",
    )
    for flag in (["--headline"], ["--views", 2], ["--blocks"], ["--threshold", 50], ["--seed", 1]):
        with pytest.raises(
            UserError, match=f"{flag[0]}.* needs a label on every image.*leave it out"
        ):
            run_probe(monkeypatch, *words, *flag, looking=True)
    run_probe(monkeypatch, *words, looking=True)
    assert "no numbers" in capsys.readouterr().out and (home / "neighbours.png").exists()
    assert "rows" not in json.loads((home / "probe.json").read_text())
