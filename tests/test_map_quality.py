"""What says how true the maps are, against scikit-learn and by its properties."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused

from common.train import seeded
from experiments import map_quality
from ingest import toon

judge = pytest.importorskip("sklearn.metrics")


def test_auc_of_one_kind_is_undefined_and_of_a_constant_a_half():
    assert np.isnan(map_quality.auc_of(torch.rand(5), torch.ones(5, dtype=torch.bool)))
    assert map_quality.auc_of(torch.ones(6), torch.tensor([True, False] * 3)) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_iou_is_the_jaccard_score(seed):
    found, true = torch.rand(2, 200, generator=seeded(seed)) < 0.4
    assert map_quality.iou(found, true) == pytest.approx(judge.jaccard_score(true, found), abs=1e-6)
    assert map_quality.iou(found & False, true & False) == 1.0


# ---- the script ----------------------------------------------------------------------------------


def test_measures_of_a_perfect_map_and_of_its_opposite():
    true = torch.zeros(3, 16, 16)
    true[:, 4:12, 4:12] = 1
    right, wrong = (map_quality.foreground_scores(found, true, 8) for found in (true, 1 - true))
    assert torch.equal(right, torch.ones(3, 2)) and torch.equal(wrong, torch.zeros(3, 2))


def test_the_main_part_is_the_one_that_covers_most():
    parts = torch.zeros(1, 4, 4, dtype=torch.uint8)
    parts[0, :2, :2] = torch.tensor([[1, 1], [1, 2]])
    assert map_quality.main_part(parts, 2).tolist() == [[1, 0, 0, 0]]


@pytest.fixture
def truth():
    drawn = [toon.draw(item, 32) for item in toon.plan(n=4, characters=2)]
    names = ("image", "fg", "parts")
    images, fg, parts = (torch.from_numpy(np.stack([d[k] for d in drawn])) for k in names)
    return images, fg / 255, parts


def test_every_score_is_in_its_range(truth, run):
    encoder, size = map_quality.load_teacher(run)
    (coarse,) = map_quality.measure_foreground(*truth[:2], encoder.side)
    assert 0 <= coarse["auc"] <= 1 and 0 <= coarse["iou"] <= 1
    for row in map_quality.measure_attention(*truth[:2], encoder):
        assert 0 <= row["auc"] <= 1 and row["background"] > 0
    parts = map_quality.measure_parts(truth, encoder, size, 3)
    assert len(parts) == 4 and all(-0.5 <= row["ari"] <= 1 for row in parts)


def test_the_command_writes_one_file_and_replaces_none(truth, run, small, monkeypatch):
    monkeypatch.setattr(map_quality, "true_set", lambda folder, split: truth)
    call("experiments.map_quality", run, "--data", small, cwd=small.parent, check=0)
    found = json.loads((run / "packed-val/map_quality.json").read_text())
    assert found["images"] == 4 and found["rows"][0]["map"] == "coarse"
    done = call("experiments.map_quality", run, "--data", small, cwd=small.parent)
    assert "is there already" in refused(done)
    shutil.rmtree(run / "packed-val")


def test_refuses_what_has_no_truth(small, run):
    line = refused(call("experiments.map_quality", run, "--data", small, cwd=small.parent))
    assert "no true fg and parts" in line and "data.py toon" in line


def test_the_committed_figures_say_what_is_claimed():
    """Coarse reaches .90 wherever a figure leaves some border free; refined gains; parts beat
    colours.
    """
    with open(ROOT / "results" / "truth.csv", newline="") as f:
        rows = {(row["run"], row["set"], row["map"]): row for row in csv.DictReader(f)}
    figures = [key for key in rows if key[2] == "coarse" and "close" not in key[1]]
    assert {key[1] for key in figures} >= {
        f"portraits whole, {g}" for g in ("flat", "gradient", "tone", "photo")
    } | {"toon val"}
    for run, name, _ in figures:
        coarse, refined = (rows[run, name, kind] for kind in ("coarse", "refined"))
        assert float(coarse["auc"]) >= 0.9 and float(refined["auc"]) > float(coarse["auc"])
    for run, name, kind in rows:
        if kind.startswith("parts, k-means of features"):
            other = rows[run, name, kind.replace("features", "colour")]
            assert float(rows[run, name, kind]["ari"]) > float(other["ari"])
