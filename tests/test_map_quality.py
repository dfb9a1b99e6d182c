"""What says how true the maps are, against scikit-learn and by its properties."""

import csv
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.io import UserError
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


def test_rows_of_figure_and_parts(run):
    drawn = [toon.draw(item, 64) for item in toon.plan(n=4, characters=2)]
    stacked = {
        k: torch.from_numpy(np.stack([d[k] for d in drawn])) for k in ("image", "fg", "parts")
    }
    encoder, size = map_quality.load_teacher(run)
    figure = stacked["fg"] / 255
    rows = map_quality.measure_foreground("toon", stacked["image"], figure, encoder.side)
    assert [row["map"] for row in rows] == ["coarse"]
    assert all(0 <= row["auc"] <= 1 and 0 <= row["iou"] <= 1 for row in rows)
    truth = stacked["image"], figure, stacked["parts"]
    rows += map_quality.measure_parts("toon", truth, encoder, size, 3)
    assert all(-0.5 <= row["ari"] <= 1 for row in rows[1:]) and len(rows) == 5
    assert len({tuple(row) for row in rows}) == 1  # one header for the whole CSV


def test_refuses_what_has_no_truth(small, run, tmp_path, monkeypatch):
    out = tmp_path / "t.csv"
    with pytest.raises(UserError) as told:
        ask(monkeypatch, "--run", run, "--data", small, "--out", out)
    line = str(told.value)
    assert (
        "no true fg and parts" in line and "data.py toon" in line and not list(tmp_path.iterdir())
    )


def ask(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["experiments.map_quality", *map(str, words)])
    map_quality.main()


def test_rows_of_other_sets_and_runs_are_kept_and_nothing_else_is_replaced(
    run, tmp_path, monkeypatch
):
    drawn = [toon.draw(item, 32) for item in toon.plan(n=4, characters=2)]
    images, fg, parts = (
        torch.from_numpy(np.stack([d[k] for d in drawn])) for k in ("image", "fg", "parts")
    )
    monkeypatch.setattr(map_quality.data, "open_or_pack", lambda path: path)
    monkeypatch.setattr(map_quality, "true_set", lambda folder, split: (images, fg / 255, parts))
    monkeypatch.chdir(tmp_path)
    ask(monkeypatch, "--run", run, "--data", "toon")
    rows = map_quality.rows_there("runs/truth.csv", map_quality.KEYS)
    assert {r["set"] for r in rows} == {"toon val"}
    ask(monkeypatch, "--run", run, "--data", "toon")
    again = map_quality.rows_there("runs/truth.csv", map_quality.KEYS)
    assert len(again) == len(rows) and {r["set"] for r in again} == {r["set"] for r in rows}
    (tmp_path / "README.md").write_text("# mine\n\nwords\n")
    for words, says in (
        (["--out", "README.md"], "README.md is there already, and no such table"),
        (["--out", "README.md/t.csv"], "README.md is a file"),
    ):
        with pytest.raises(UserError, match=says):
            ask(monkeypatch, "--run", run, "--data", "toon", *words)
    assert (tmp_path / "README.md").read_text() == "# mine\n\nwords\n"


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
