"""What the benchmarks count, judge and write; how fast something is is no matter of tests."""

import re
import subprocess
import tarfile
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, call

from common.door import save_csv
from common.train import UserError
from lab import bench
from lab import bench_kernels as kernels
from lab import bench_step as step

CPU = torch.device("cpu")
TINY = step.Case(**step.TINY, dtype="fp32", decoder="32x1", device="cpu")


def test_bytes_of_the_kernels_are_those_of_their_docstrings():
    """bf16 has two bytes a number; 8 are a patch's place, and 4 a statistic or its gradient."""
    assert kernels.bytes_to_move("gather", 10, 768, 2) == 10 * (768 + 8 + 2 * 768 + 2 * 4)
    assert kernels.bytes_to_move("loss", 10, 768, 2) == 10 * (768 + 8 + 4 * 768 + 4 * 4)


def test_percentiles_are_of_all_turns_and_ratios_within_each():
    times = {"ours": [[1.0, 1.0, 1.0], [10.0, 10.0, 10.0]], "base": [[2.0] * 3, [20.0] * 3]}
    found = bench.compared(times, "base")
    assert found["ours"]["times_as_long_as_base"] == 0.5 and found["base"]["p50_ms"] == 11.0
    assert (found["ours"]["p20_ms"], found["ours"]["p80_ms"]) == (1.0, 10.0)
    slow = replace(TINY, candidate="transformers", compile=True)
    failed = replace(slow, compile=False)
    slower = replace(slow, attention="eager")
    turns = {
        TINY: [10.0, 100.0, 30.0],
        slow: [5.0, 50.0, 15.0],
        slower: [4.0] * 3,
        failed: [0.0] * 3,
    }
    ours, theirs = step.summary(turns)
    assert "30 images/s (10 to 100), 1.00 times" in ours
    assert "transformers (compiled, fused" in theirs and "0.50 times" in theirs


def test_the_gate_lets_through_what_agrees_and_nothing_else():
    assert step.agree([1.0, 0.9], [1.00001, 0.90001], "fp32") == ""
    assert "0.9003" in step.agree([1.0, 0.9], [1.0, 0.9003], "fp32")
    assert step.agree([1.0], [1.01], "bf16") == "" and step.agree([1.0], [1.03], "bf16")
    assert step.agree([float("nan")], [1.0], "bf16") and step.agree([], [], "fp32")


def test_a_wrong_kernel_ends_the_run_before_any_speed(monkeypatch, tmp_path):
    gather, losses = kernels.contenders(CPU)["reference"]
    found = {"reference": (gather, losses), "wrong": (gather, lambda *of: 1.001 * losses(*of))}
    monkeypatch.setattr(kernels, "contenders", lambda device: found)
    done = call("lab.bench_kernels", "--small", "--device", "cpu", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and "no speed is reported" in done.stderr
    (path,) = tmp_path.glob("*.csv")
    assert {row["operation"] for row in bench.read_table(path)} == {"gather"}  # which was right


def test_peers_that_fail_get_a_row_without_a_speed_and_our_own_failure_ends_the_run(
    monkeypatch, tmp_path
):
    """Each row is saved at once, behind those of other days."""

    def answer(function, case, *_):
        if case.candidate == "transformers":
            return {"note": "OutOfMemoryError: full"}
        return {"losses": [1.0], "seconds": 0.5, "peak_mb": 9.0}

    monkeypatch.setattr(bench, "alone", answer)
    monkeypatch.setattr(step, "export", lambda *_: None)  # which a plain ViT alone can be
    save_csv([{"candidate": "old", "machine": "another", "commit": "c"}], tmp_path / "t.csv")
    table = bench.Table(tmp_path / "t.csv", CPU)
    cases = [replace(TINY, candidate=name) for name in ("AniMask", "transformers")]
    lines = step.compare(table, cases, 2, (1, 1))
    assert len(lines) == 1 and "8 images/s" in lines[0]
    rows = bench.read_table(tmp_path / "t.csv")
    ours = ["AniMask", "transformers", "transformers", "AniMask"]
    assert [row["candidate"] for row in rows] == ["old", *ours]
    assert rows[2]["note"] == "OutOfMemoryError: full" and rows[2]["commit"]
    monkeypatch.setattr(step, "agree", lambda *_: "step 1: another loss")
    with pytest.raises(UserError, match="no speed is reported"):
        step.compare(table, [TINY], 1, (1, 1))


@pytest.mark.slow
def test_ten_minutes_of_a_gpu_are_tried_without_one(tmp_path):
    """Every step, and what is sent; the same command again does nothing."""
    words = ["bash", ROOT / "lab/gpu.sh", "--small", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    steps = re.findall(r"^== ([\w-]+), after", done.stdout, re.M)
    again = subprocess.run(words, capture_output=True, text=True)
    assert re.findall(r"^== ([\w-]+): .* skipped$", again.stdout, re.M) == steps
    with tarfile.open(tmp_path / "send/logs.tar.gz") as tar:
        sent = set(tar.getnames())
    assert {f"./{name}.log" for name in steps} | {"./run/log.jsonl"} <= sent
    with tarfile.open(tmp_path / "send/weights.0") as tar:
        assert "half/model.safetensors" in tar.getnames()
