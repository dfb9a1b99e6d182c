"""experiments.baselines: a plan is kept and gone on with, its choices are dev's, and its table says who wins."""

import csv
import json
import shutil
from contextlib import nullcontext

import pytest
from conftest import call, refused

from common import classifier
from experiments import baselines
from experiments.convnets import ConvNet

TINY = "--model nano:image_size=32 --batch-size 8"
ENCODERS = {
    "mae": (
        f"pretrain.py {TINY} --mask random --contrast none",
        "--blr",
        (1e-3, 2e-3),
    )
}
ARMS = {
    "mae-linear": ("mae", "--method linear", "--head-lr", (1e-2, 3e-2)),
    "vit": ("mae", "--method full --from-scratch --image-size 32", "--lr", (1e-3,)),
}


@pytest.fixture
def plan(monkeypatch, small, tmp_path):
    """A plan of two arms, run in this process -> what makes it, and the stages that were called."""
    called = []

    def execute(words, log, threads, lock=None):
        called.append(words)
        name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        call(name, *rest, cwd=tmp_path, check=0)

    monkeypatch.setattr(baselines, "execute", execute)
    monkeypatch.setattr(
        baselines, "side_by_side", lambda args, function, jobs: [function(job) for job in jobs]
    )
    monkeypatch.setattr(baselines, "ENCODERS", ENCODERS)
    monkeypatch.setattr(baselines, "ARMS", ARMS)
    monkeypatch.setattr(baselines, "LEFT_OUT", 1)
    words = [
        "experiments.baselines",
        "--data",
        small,
        "--arms",
        *ARMS,
        "--minutes",
        0.001,
        "--pretrain-minutes",
        0.001,
    ]
    words += ["--threads", 2, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    return words, called


@pytest.mark.slow
def test_a_plan_is_made_once_and_gone_on_with(plan, small, tmp_path):
    words, called = plan
    assert "hours here" in call(*words, "--dry", cwd=tmp_path, check=0).stdout and not called
    call(*words, "--seeds", 1, cwd=tmp_path, check=0)
    out = tmp_path / "out" / small.name
    rows = {row["arm"]: row for row in csv.DictReader((out / "rows.csv").open())}
    assert (
        rows.keys() == ARMS.keys()
        and float(rows["vit"]["parameters_m"]) > 1 < float(rows["vit"]["gflop"]) * 1000
    )
    assert all(row["auroc_unknown"] and row["spoiled"] and row["eer"] for row in rows.values())
    table = (out / "table.md").read_text()
    assert "too few characters" in table and "| best |" in table and (out / "table.png").exists()
    found = json.loads((out / "plan.json").read_text())
    for name, trials in found["trials"].items():  # what dev found best, and no other figure
        assert trials[f"{found['rates'][name]:g}"] == max(trials.values())
        assert len(trials) == len(ENCODERS.get(name, ARMS.get(name))[-1])
    assert (
        sum("recognize.py" in line for line in called) == 4
        and sum("--hold-out" in line for line in called) == 2
    )

    before = len(called)
    call(*words, "--seeds", 1, cwd=tmp_path, check=0)
    assert len(called) == before
    shutil.rmtree(tmp_path / "work" / small.name / f"final-vit-{found['rates']['vit']:g}-s0")
    (out / "rows.csv").write_text("\n".join((out / "rows.csv").read_text().splitlines()[:2]) + "\n")
    call(*words, "--seeds", 1, cwd=tmp_path, check=0)
    assert [line[0] for line in called[before:]] == ["finetune_lora.py", "recognize.py"]

    said = refused(call(*words[:-4], "--minutes", 7, *words[-4:], cwd=tmp_path))
    assert "another minutes (0.001)" in said and "--out" in said


def test_its_cost_counts_what_a_network_does():
    net = classifier.Classifier(ConvNet("resnet10@4", 32), 3).eval()
    row = baselines.cost(net, 32, nullcontext, turns=1)
    first = (
        16 * 16 * 7 * 7 * 3 * 40 * 2
    )  # operations of the first convolution: 40 maps of 16 x 16, each of 7 x 7 x 3
    assert first / 1e9 < row["gflop"] < 0.1 and row["ms_1"] > 0 < row["ms_64"]
    assert row["parameters_m"] == pytest.approx(sum(p.numel() for p in net.parameters()) / 1e6)


def test_a_set_that_is_not_there_is_named(tmp_path):
    assert "no packed set" in refused(
        call("experiments.baselines", "--data", "datasets/none", cwd=tmp_path)
    )
