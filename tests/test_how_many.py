"""experiments.how_many: what it draws, and its table."""

import csv

import torch
from conftest import call, refused

from experiments import how_many


def test_a_draw_takes_so_many_of_each_and_differs_from_the_next():
    labels = torch.arange(3).repeat_interleave(torch.tensor([20, 2, 9]))
    rows = torch.arange(31)[torch.arange(31) % 2 == 0]  # 10, 1 and 5 of them
    first, again, second = (how_many.drawn_rows(rows, labels, 4, draw) for draw in (0, 0, 1))
    assert (
        labels[first].bincount().tolist() == [4, 1, 4]
        and len(first.unique()) == 9
        and (first % 2 == 0).all()
    )
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_its_table_has_a_row_for_each_number_and_each_feature(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(how_many, "EACH", (3, 200))
    words = [
        "experiments.how_many",
        run,
        "--data",
        small,
        "--draws",
        2,
        "--out",
        tmp_path / "table.csv",
    ]
    done = call(*words, cwd=tmp_path, check=0)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [r["pictures_each"] for r in rows[::3]] == ["3", "all"]
    assert {r["draws"] for r in rows[:-3]} == {"2"} and rows[-1]["draws"] == "1"
    assert all(float(r["low"]) <= float(r["mean"]) <= float(r["high"]) <= 100 for r in rows)
    assert all(
        "experiments.how_many" in r["command"] and r["machine"] and r["commit"] for r in rows
    )
    assert len(done.stdout.splitlines()) == len(rows) + 1
    assert "is there already" in refused(call(*words, cwd=tmp_path))
