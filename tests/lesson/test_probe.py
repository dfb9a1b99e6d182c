"""probe.py as a user runs it, on a run of seconds; comparison of runs; where its results go."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from conftest import call, draw_folder, refused
from made import pristine

import data
import probe
from common import features, metrics, readout
from common.train import read_safetensors, save_safetensors
from ingest import pack
from model import ViT

FAST = ["--device", "cpu", "--dtype", "fp32"]


def run_probe(*words, cwd, check=0):
    return call("probe.py", *words, *FAST, cwd=cwd, check=check)


def relative(run, other, **flags):
    """A copy of a run as if it had been made with other flags: slightly other weights."""
    shutil.copytree(run, other)
    weights, header = read_safetensors(run / "model.safetensors")
    weights = {name: w * (1 + 0.01 * len(other.name)) for name, w in weights.items()}
    header["run"] |= flags
    save_safetensors(weights, other / "model.safetensors", header)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of random masks and one of green noise, and what probe.py printed of the first."""
    base, plain = tmp_path_factory.mktemp("runs"), pristine() / "runs/a"
    data = str(pristine() / "datasets/packed")
    relative(plain, base / "random-s0", data=data)
    relative(plain, base / "random-s1", data=data, seed=1)
    relative(plain, base / "green-s0", data=data, mask="green")
    return base, run_probe(base / "random-s0", cwd=base)


def copy(runs, name, folder):
    """A run without results."""
    skip = shutil.ignore_patterns("probe*.json", "*.png")
    return Path(shutil.copytree(runs[0] / name, folder / name, ignore=skip))


def report_of(folder, name="probe.json"):
    return json.loads((folder / name).read_text())


def test_one_command_writes_what_its_docstring_says(runs):
    base, done = runs
    pictures = {path.name for path in (base / "random-s0").glob("*.png")}
    assert pictures >= {"attention.png", "neighbours.png"}
    report = report_of(base / "random-s0")
    rows = report["rows"]
    controls = ["untrained extremes", "thumb4", "thumb8", "thumb16", "chance"]
    assert [*rows] == ["mean", "cls", "extremes", *controls]
    heads = {"logistic", "knn", "retrieval", "few_shot", "verification"}
    assert all(set(row) == heads for row in rows.values())
    assert report["headline"] == rows["extremes"]["logistic"]["top1"]
    assert rows["thumb4"]["logistic"]["top1"] > 0.9  # classes are colours
    assert rows["chance"]["logistic"]["top1"] < 0.5
    assert "kNN of" in done.stdout and "efficiency" in report


def test_a_number_of_your_own_is_kept():
    row = {"knn": {"top1": 0.5, "confusion": []}, "silhouette": 0.3}
    assert probe.slim(row, False) == {"knn": {"top1": 0.5}, "silhouette": 0.3}


def test_results_can_lie_elsewhere(runs, tmp_path):
    """As of a checkpoint of somebody else, in whose folder nothing may be written."""
    run_probe(runs[0] / "random-s0", "--headline", "--out", "results", cwd=tmp_path)
    assert (tmp_path / "results/probe-headline.json").exists()


def test_the_headline_alone_has_the_same_digits(runs, tmp_path):
    """Features are fp16, and all seeds are fixed."""
    run = copy(runs, "random-s0", tmp_path)
    run_probe(run, "--headline", cwd=tmp_path)
    report, whole = report_of(run, "probe-headline.json"), report_of(runs[0] / "random-s0")
    assert [*report["rows"]] == ["extremes", "chance"]
    for head in probe.HEADS:
        assert report["rows"]["extremes"][head] == whole["rows"]["extremes"][head]
        right = metrics.from_bits(report["right"][head], report["images"]["val"])
        assert right.mean() == pytest.approx(report["rows"]["extremes"][head]["top1"])


def test_features_are_those_of_the_encoder(small):
    encoder, split = ViT(32, 8, 32, 2, 2).eval(), features.open_splits(small)["val"]
    cpu = torch.device("cpu")
    task = SimpleNamespace(splits={"val": split}, device=cpu, autocast=torch.no_grad)
    found = features.of_encoder(encoder, task)
    view = next(data.whole_views(split["images"], torch.arange(5), 32, cpu))[1]
    with torch.no_grad():
        tokens = encoder.features(view)
    patches = tokens[:, 1:]
    expected = {"mean": patches.mean(1), "cls": tokens[:, 0]}
    expected["extremes"] = torch.cat([patches.max(1).values, patches.min(1).values], 1)
    for pool, x in expected.items():
        torch.testing.assert_close(found[pool]["val"][:5], x.half())
    colours = features.extract(probe.thumbs, 32, task)
    assert torch.equal(colours["thumb4"]["val"][:5], readout.thumbnails(view, 4).half())
    untrained = features.of_encoder(features.untrained_like(encoder), task)
    assert not torch.equal(untrained["mean"]["val"], found["mean"]["val"])


def test_a_class_that_train_lacks_and_classes_that_differ_are_named(runs, small, tmp_path):
    draw_folder(tmp_path / "images", classes=4, each=12)
    pack.pack(tmp_path / "images", tmp_path / "other", size=32)
    shutil.copytree(small, tmp_path / "mixed")
    shutil.copy(tmp_path / "other" / "val.safetensors", tmp_path / "mixed")
    words = runs[0] / "random-s1", "--data", tmp_path / "mixed"
    assert "class3" in refused(run_probe(*words, cwd=tmp_path, check=2))


def test_pictures_to_choose_on_are_asked_for(runs, tmp_path):
    golden.write_packed(tmp_path / "packed", 32, (("train", 8), ("val", 8)))  # two of each class
    words = runs[0] / "random-s1", "--data", tmp_path / "packed"
    assert "--dev 0.1" in refused(run_probe(*words, cwd=tmp_path, check=2))


def test_without_labels_the_pictures_still_work(runs, tmp_path):
    draw_folder(tmp_path / "pictures", classes=1, each=24)
    pack.pack(tmp_path / "pictures" / "class0", tmp_path / "flat", size=32)
    run = copy(runs, "random-s1", tmp_path)
    words = run, "--data", tmp_path / "flat"
    assert "--headline" in refused(run_probe(*words, "--headline", cwd=tmp_path, check=2))
    done = run_probe(*words, cwd=tmp_path)
    assert "no numbers" in done.stdout and (run / "flat-val" / "neighbours.png").exists()
    assert "rows" not in report_of(run / "flat-val")


def test_results_of_other_data_or_splits_have_a_folder_of_their_own(tmp_path):
    own = tmp_path / "packed"
    folder_of = features.results_folder
    assert folder_of(tmp_path, own, "val", own) == tmp_path
    assert folder_of(tmp_path, own, "test", own) == tmp_path / "packed-test"
    assert folder_of(tmp_path, "other", "val", own) == tmp_path / "other-val"
    assert folder_of("x/dino.pth", own, "val") == Path("x/dino/packed-val")  # it has no data


def test_runs_are_compared_in_pairs(runs, tmp_path):
    names = ("random-s0", "random-s1", "green-s0")
    done = run_probe(*(copy(runs, name, tmp_path) for name in names), "--headline", cwd=tmp_path)
    report = report_of(tmp_path / "compare", "compare.json")
    configurations = report["configurations"]
    assert {name: row["runs"] for name, row in configurations.items()} == {"random": 2, "green": 1}
    assert configurations["random"]["logistic"]["std"] is not None
    assert [(row["seeds"], row["t"]) for row in report["pairs"]] == [([0], None)] * 2
    assert (tmp_path / "compare" / "curves.png").exists() and "1 seed(s)" in done.stdout


def fake(run, seed, right, **config):
    top1 = {head: {"top1": right.double().mean().item()} for head in probe.HEADS}
    report = {"run": run, "path": run, "config": {"seed": seed, **config}, "pool": "mean"}
    report |= {"rows": {"mean": top1}, "efficiency": None}
    return report | {"right": dict.fromkeys(probe.HEADS, right)}


def test_an_interval_is_above_zero_only_where_there_is_a_difference():
    """Five seeds: 20 points better on the same images, and the same accuracy on other images."""
    draws, reports = torch.Generator().manual_seed(0), []
    for seed in range(5):
        right = torch.rand(400, generator=draws) < 0.6
        better = right | (torch.rand(400, generator=draws) < 0.5)
        other = torch.rand(400, generator=draws) < 0.6
        for name, found in (("plain", right), ("good", better), ("same", other)):
            reports.append(fake(f"{name}-s{seed}", seed, found))  # their code may differ
    configs = probe.by_config(reports)
    assert [*configs] == ["plain", "good", "same"]
    for row in probe.differences(configs, np.arange(400)):
        low = min(row["t"]["low"], row["images"]["low"])
        assert (low > 0) == (row["pair"] == "good - plain")
    assert probe.summary(configs["plain"])["knn"]["n"] == 5
    assert probe.differences({"a": configs["plain"], "b": {9: reports[0]}}, np.arange(400)) == []
    with pytest.raises(features.UserError, match="the same seed"):
        probe.by_config([reports[0], reports[0]])


@pytest.mark.parametrize("last, expected", [(60, 58), (40, 42), (30, 42)])
def test_a_threshold_lies_above_the_start(runs, tmp_path, last, expected):
    """Ninety percent of a loss would count as reached before the first step."""
    run = copy(runs, "random-s0", tmp_path)
    rows = [{"epoch": epoch, "knn": knn} for epoch, knn in enumerate((40, 35, last))]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, source = probe.threshold_of([run])
    assert found == expected and "random-s0" in source


def test_efficiency_against_a_log():
    rows = [{"epoch": e, "seconds": 10 * e + 1, "knn": k} for e, k in ((0, 50), (10, 70), (20, 80))]
    rows.insert(1, {"epoch": 5, "seconds": 60, "memory_mb": 900})
    found = probe.efficiency(rows, 75)
    assert (found["reached_epoch"], found["reached_seconds"]) == (15, 151)
    assert probe.efficiency(rows, 81)["reached_epoch"] is None
    assert probe.efficiency([], 75) is None


@pytest.mark.parametrize("knn", [(50, 40, 45), (50, 50.5, 51), (50,)])
def test_a_run_that_gains_nothing_reaches_no_threshold(tmp_path, knn):
    """Its start would be the threshold, and every run would reach it after 0 epochs."""
    rows = [{"epoch": e, "seconds": 9.0 * e, "knn": k} for e, k in enumerate(knn)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    threshold, source = probe.threshold_of([str(tmp_path)])
    found = probe.efficiency(rows, threshold)
    assert found["reached_epoch"] is None and found["reached_seconds"] is None
    assert "no gain" in probe.efficiency_line(found, source)
    gain = [*rows, {"epoch": 9, "seconds": 90.0, "knn": 70}]
    assert probe.efficiency(gain, threshold)["reached_epoch"] > 0
