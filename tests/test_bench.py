"""What the benches count and refuse; what they measure is no matter of tests."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import benchmarks.data
from benchmarks import kernels, step, train
from common.checkpoints import save_model
from common.io import UserError
from experiments.tables import replace_rows, rows_there, save_csv
from model import MAE

TINY = {
    "device": "cpu",
    "model": "nano",
    "image_size": 16,
    "patch_size": 8,
    "ratio": 0.5,
    "batch": 2,
    "warmup": 2,
    "dtype": "fp32",
}


def test_flops_are_those_of_the_formula():
    """A block: 6 T D^2 for q, k and v of all T tokens, 18 U D^2 for proj and MLP of the U that it
    updates, 4 U T D for q k^T and A v. Backward is twice forward, but for what needs no gradient of
    its input: pixels, the head's features.
    """
    S, p, D, depth, W, blocks, K = 48, 16, 32, 3, 64, 2, 5
    N, P = (S // p) ** 2, 3 * p * p

    def block(T, D, U):
        return (6 * T + 18 * U) * D**2 + 4 * U * T * D

    decoder = (
        2 * (K + 1) * D * W
        + (blocks - 1) * block(N + 1, W, N + 1)
        + block(N + 1, W, N - K)
        + 2 * (N - K) * W * P
    )
    once = 2 * K * P * D + 2 * (N - K) * W * 2  # patch embedding, head for pictures
    expected = 3 * (depth * block(K + 1, D, K + 1) + decoder) + 2 * once
    with torch.device("meta"):
        model = MAE(S, p, D, depth, 2, W, blocks)
    assert train.step_flops(model, K) == expected


def test_eight_gpus_on_paper():
    """ViT-B's .45 GB at 1000 images/s and 100 a GPU: 100 ms of work, 1.75 * 1.5 + .6 = 3.225 ms of
    talk.
    """
    assert train.on_paper(1000, 100, 0.45e9) == pytest.approx(800 / 0.103225)
    assert train.on_paper(1000, 100, 0) == pytest.approx(8000)


def test_the_gate_lets_through_what_agrees_and_nothing_else():
    assert train.agree([1.0, 0.9], [1.00001, 0.90001], "fp32") == ""
    assert "step 2" in train.agree([1.0, 0.9], [1.0, 0.9003], "fp32")
    assert train.agree([1.0], [1.01], "bf16") == "" and train.agree([1.0], [1.03], "bf16")
    assert train.agree([float("nan")], [1.0], "bf16") and train.agree([], [], "fp32")


@pytest.fixture
def in_process(monkeypatch):
    """Candidates as objects of this process: a torch and a transformers that are imported once."""

    class Here:
        def __init__(self, case):
            self.step = step.make_step(case, torch.device("cpu"))()
            losses = [float(self.step(i)) for i in range(case["warmup"])]
            self.first = {"losses": losses, "waits": ""}

    monkeypatch.setattr(
        train, "started", lambda stack, case, name: ((here := Here(case)), here.first)
    )


@pytest.mark.slow
def test_same_weights_and_noise_give_the_losses_of_transformers_and_others_no_speed(
    in_process, monkeypatch, tmp_path
):
    pytest.importorskip("transformers")
    small = {
        name: c | {"decoder": [32, 1]}
        for name, c in train.CANDIDATES.items()
        if not c.get("compile")
    }
    monkeypatch.setattr(train, "CANDIDATES", small)
    names = [
        "AniMask",
        "transformers",
        "transformers, memory kept, eager attention",
        "AniMask, light, whole step",
    ]
    assert list(train.gated(None, TINY, names, tmp_path)) == names
    monkeypatch.setattr(step, "FLOOR", 0.5)  # another loss
    with pytest.raises(train.UserError, match="AniMask, fp32: step 1.*no speed is reported"):
        train.gated(None, TINY, ["AniMask"], tmp_path / "again")


def test_phases_of_a_step_are_all_there(monkeypatch, tmp_path):
    case = TINY | {"net": "ours", "decoder": [32, 1], "whole": True, "weights": str(tmp_path / "w")}
    model = step.build(case)
    save_model(model, tmp_path / "w.safetensors", {"step": 0, "run": {}, "norm_pix": True})
    took = step.timed_phases(step.make_step(case, torch.device("cpu")), torch.device("cpu"), 2)
    assert list(took) == list(train.PHASES) and all(ms > 0 for ms in took.values())


def test_a_candidate_that_dies_and_one_that_is_unknown_are_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.train",
        "--only",
        "nobody",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--only nobody is no candidate" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bench, words, says",
    [
        (benchmarks.data, ["--pack", 4, "--images", 9], "--images has no effect"),
        (benchmarks.data, ["--pack", 4, "--batch-size", 9], "--batch-size has no effect"),
        (benchmarks.data, ["--scale", "--side", 9], "--side has no effect"),
        (benchmarks.data, ["--scale", "--pack", 4], "--scale has no effect"),
        (kernels, ["--device", "cpu", "--batch", 4], "--batch has no effect with a CPU"),
        (train, ["--quick", "--repeats", 9], "--repeats has no effect with --quick"),
    ],
)
def test_a_bench_refuses_what_it_would_not_use(bench, words, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
    with pytest.raises(UserError, match=says):
        bench.main()


@pytest.mark.parametrize(
    "bench, words, name",
    [
        (benchmarks.data, ["--pack", 4], "bench_pack.csv"),
        (benchmarks.data, [], "bench_data.csv"),
        (kernels, ["--device", "cpu"], "bench_kernels_cpu.png"),
        (train, ["--device", "cpu"], "bench_train_cpu.md"),
    ],
)
def test_a_bench_replaces_nothing_and_leaves_results_alone(
    bench, words, name, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs/bench" / name  # where it writes without --out
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
    with pytest.raises(UserError, match=f"{name} is there already; rm "):
        bench.main()
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_rows_take_the_place_of_those_with_their_keys(tmp_path):
    path = tmp_path / "t.csv"
    save_csv(path, [{"run": "a", "x": 1}, {"run": "b", "x": 2}])
    replace_rows(path, [{"run": "b", "x": 3, "new": 4}], ["run"])
    assert rows_there(path, ["run"]) == [
        {"run": "a", "x": "1", "new": ""},
        {"run": "b", "x": "3", "new": "4"},
    ]
    path.write_bytes(b"\xff\x00\n" * 3)
    with pytest.raises(UserError, match="no such table"):
        rows_there(path, ["run"])


@pytest.mark.slow
def test_rows_can_be_tabled_and_drawn(tmp_path):
    case = TINY | {"image_size": 32}
    rows = [train.row_of(case, name, [2.0, 1.0, 3.0], 100.4, 0.1, {}) for name in train.CANDIDATES]
    rows = [r | train.against_the_peer(r, rows) for r in rows]
    assert (
        rows[0]["images_per_s"] == 2.0
        and rows[0]["over_transformers"] == 1.0
        and rows[0]["decoder"] == "512x8"
    )
    rows[-3] |= {f"{phase}_ms": 1.0 for phase in train.PHASES}
    train.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert len(train.table(rows).splitlines()) == len(rows) + 2 and json.dumps(rows)
