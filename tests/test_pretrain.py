"""pretrain.py as a user runs it, on a small packed set, and what its loop promises."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import golden
import pytest
import torch
from conftest import ROOT, call, draw_folder, stage
from safetensors.torch import load_file

import data
import mask as masking
import pretrain
from common import train
from common.formats import is_decoder
from common.train import read_log

CPU = ["--device", "cpu", "--dtype", "fp32"]
QUICK = ["--device", "cpu", "--batch-size", 16, "--epochs", 2]
NANO = dict(pretrain.SIZES["nano"])
WHOLE = ["--model", "nano:image_size=32", *QUICK, "--epochs", 4, "--mask", "attn_high:start=.3"]


@pytest.fixture(autouse=True)
def small_network(monkeypatch, no_pictures):
    """A network of 32 numbers for what runs in this process."""
    small = dict(dim=32, depth=2, heads=1, image_size=32, patch_size=8, decoder_dim=32)
    monkeypatch.setitem(pretrain.SIZES, "nano", small)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A packed set with true foreground masks and parts."""
    folder = tmp_path_factory.mktemp("figures") / "packed"
    golden.write_packed(folder, 32, (("train", 48), ("val", 24)))
    return folder


def train_in(out, packed, *words, check=0):
    words = ["--data", packed, "--out", out, *QUICK, *words]
    return call("pretrain.py", *words, cwd=out.parent, check=check)


def state(out):
    return torch.load(out / "state.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- a run from end to end -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """An attn_high run in a process of its own, with the nano that a user has; what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, stage("pretrain.py", "--data", small, "--out", out, *WHOLE, cwd=out.parent, check=0)


def test_a_run_writes_what_its_docstring_says(finished):
    out, done = finished
    weights = {"model.safetensors", "pooler.safetensors", "stats_head.safetensors"}
    pictures = {"curves.png", "recon.png", "masks.png"}
    run = {"attn-00000010.safetensors", "state.pt", "log.jsonl"}
    assert {p.name for p in out.iterdir()} == weights | pictures | run
    held = [r for r in read_log(out / "log.jsonl") if "val_mse" in r]
    assert held[-1]["val_mse"] < held[0]["val_mse"] and held[-1]["step"] == 20
    assert held[0]["knn_thumbnail"] > 0 and "attention (pooler) of self" in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: python probe.py {out}"


def test_the_learning_rate_of_a_run_ends_near_0_and_its_teacher_learned(finished):
    out, _ = finished
    rates = [r["lr"] for r in read_log(out / "log.jsonl") if "lr" in r]
    assert 0 < rates[-1] < 0.02 * max(rates)
    torch.manual_seed(0)
    size = NANO | {"image_size": 32, "decoder_depth": 1}
    begin, end = pretrain.MAE(**size).encoder.state_dict(), state(out)
    for name, w in end["teacher"].items():
        if name.endswith("fc1.weight"):
            moved = (end["model"][f"encoder.{name}"] - begin[name]).norm()
            assert 0.2 * moved < (w - begin[name]).norm() < moved


# ---- kill and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--mask learned:start=0,ramp_for=0", ("predictor",)),
        ("--mask attn_high:start=0 --contrast cls:weight=.5", ("teacher", "agreement")),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits(small, tmp_path, monkeypatch, words, parts):
    """Stopped in the middle of an epoch: teacher, maps, predictor and projector are saved, too."""
    train_in(tmp_path / "whole", small, *words.split())
    plain = train.Run.update

    def stop_at_7(run, *numbers):
        plain(run, *numbers)
        if run.step == 7:
            run.stop.append(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "update", stop_at_7)
        train_in(tmp_path / "run", small, *words.split(), check=143)
    assert state(tmp_path / "run")["step"] == 7
    call("pretrain.py", "--resume", tmp_path / "run", cwd=tmp_path, check=0)
    one, two = (state(tmp_path / name) for name in ("whole", "run"))
    for part in ("model", *parts):
        assert same(one[part], two[part]), part
    assert one["guide"] == two["guide"]


def start(cwd, *words):
    command = [sys.executable, ROOT / "pretrain.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(w) for w in command], cwd=cwd, **pipes)


def wait_for_a_step(process, out, more_than):
    """Until the log has a step beyond `more_than`, or the run has ended."""
    while process.poll() is None:
        rows = read_log(out / "log.jsonl")
        if rows and rows[-1]["step"] > more_than:
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_resumes_to_the_same_bits(small, finished, tmp_path, how):
    """Killed three times at moments that nobody chose."""
    out, words = tmp_path / "killed", ["--data", small, "--out", tmp_path / "killed", *WHOLE]
    for _ in range(3):
        process = start(tmp_path, *words)
        before = max([row["step"] for row in read_log(out / "log.jsonl")], default=0)
        wait_for_a_step(process, out, before)
        process.send_signal(how)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors and process.returncode in (0, 128 + how, -how)
        words = ["--resume", out]
    stage("pretrain.py", *words, cwd=tmp_path, check=0)
    assert same(state(finished[0])["model"], state(out)["model"])
    logs = [read_log(folder / "log.jsonl") for folder in (out, finished[0])]
    evaluated = [[row["step"] for row in log if "val_mse" in row] for log in logs]
    assert evaluated[0] == evaluated[1]


# ---- what every mask shares ----------------------------------------------------------------------


def recipe(monkeypatch, small, *words):
    """The flags of a run after every default is filled in; it stops before its first step."""

    class Stop(Exception):
        pass

    def stop(flags, *_):
        raise Stop(flags.values)

    monkeypatch.setattr(train, "Run", stop)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", str(small), "--out", "x", *words])
    with pytest.raises(Stop) as stopped:
        pretrain.main()
    return stopped.value.args[0]


def test_a_mask_changes_nothing_but_the_mask(small, monkeypatch):
    """Views, epochs, batch and second loss are one recipe."""
    masks = [name for name in masking.STRATEGIES if masking.NEEDS.get(name) not in ("fg", "parts")]
    found = {m: recipe(monkeypatch, small, "--mask", m) for m in masks}
    assert {flags.pop("mask") for flags in found.values()} == set(masks)
    assert all(flags == found["random"] for flags in found.values())


@pytest.mark.parametrize("contrast, V", [("none", 1), ("pooler", 2)])
def test_the_default_length_is_a_number_of_views(small, monkeypatch, contrast, V):
    flags = recipe(monkeypatch, small, "--contrast", contrast)
    images, default = len(data.open_split(small, "train")["images"]), pretrain.DEFAULTS["cpu"]
    assert abs(flags["epochs"] * images * V - default["views"]) <= images * V
    assert flags["batch_size"] * V == default["batch"]
    flags = recipe(monkeypatch, small, "--model", "nano:simmim=1")
    assert (flags["mask"], flags["ratio"], flags["contrast"]) == ("squares", "0.6", "none")


def test_two_strategies_see_the_same_images_and_crops(small, tmp_path, monkeypatch):
    """The views of every step, under random and under attn_high: only the masks differ."""
    seen = {}
    for name in ("random", "attn_high:start=0"):
        views, kept = [], []
        with monkeypatch.context() as patch:
            record(patch, data, "view_images", views)
            record(patch, masking, "sample", kept)
            train_in(tmp_path / name[:4], small, "--mask", name, "--epochs", 1)
        seen[name] = [x for x in views if len(x) == 32], [ids for ids, _ in kept if len(ids) == 32]
    (views, kept), (other_views, others) = seen.values()
    assert len(views) == len(kept) == 5
    assert all(torch.equal(x, y) for x, y in zip(views, other_views, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(kept, others, strict=True))


def record(patch, module, name, results):
    plain = getattr(module, name)

    def noted(*args):
        results.append(plain(*args))
        return results[-1]

    patch.setattr(module, name, noted)


def test_a_ratio_rises_or_is_drawn_for_each_step():
    drawn = {pretrain.ratio_at("0.5-0.9", 0, (1, 0, step, 0)) for step in range(50)}
    assert len(drawn) == 50 and 0.5 < min(drawn) < 0.55 and 0.85 < max(drawn) < 0.9
    of_processes = {pretrain.ratio_at("0.5-0.9", t, (1, 0, 7, t)) for t in (0, 1)}
    assert len(of_processes) == 1
    assert [pretrain.ratio_at("0.5:0.9", t, ()) for t in (0, 0.5, 1)] == [0.5, 0.7, 0.9]
    assert pretrain.ratio_at("0.75", 0.3, ()) == 0.75


# ---- other ways to run it ------------------------------------------------------------------------

OFTEN = ("fg_heavy", "detail", "learned:shuffle=1", "random:throw=0.2")
NAMES = [*masking.STRATEGIES, *(f"{name}:shuffle=1" for name in masking.NEEDS)]
RARELY = [pytest.param(m, marks=pytest.mark.slow) for m in NAMES if m not in OFTEN]


@pytest.mark.parametrize("mask", [*OFTEN, *RARELY])
def test_every_strategy_trains(figures, tmp_path, mask):
    train_in(tmp_path / "out", figures, "--mask", mask, "--ratio", "0.5-0.7")
    rows = read_log(tmp_path / "out" / "log.jsonl")
    last = [r for r in rows if "loss" in r][-1]
    assert rows[-1]["val_mse"] < rows[0]["val_mse"] and last["mask_diversity"] > 0
    if mask in ("fg_heavy", "bg_heavy"):
        first = last["fg_hidden"] > last["bg_hidden"]
        assert first == (mask == "fg_heavy")


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--dtype bf16", "--contrast pooler:dcl=0", "--compile"])
def test_other_ways_to_compute_it(small, tmp_path, words):
    train_in(tmp_path / "out", small, *words.split(), "--epochs", 1)
    row = [r for r in read_log(tmp_path / "out" / "log.jsonl") if "agreement" in r][-1]
    assert 0 < row["agreement"] < 6


def test_a_pooler_leaves_the_encoder_as_it_is(small, tmp_path):
    """Whatever its loss weighs: random masks have no guide, so the weights are the same bits."""
    for weight in (0, 3):
        words = ["--contrast", f"pooler:weight={weight}", "--epochs", 1]
        train_in(tmp_path / str(weight), small, *words)
    one, two = (state(tmp_path / name)["model"] for name in "03")
    assert {k for k in one if not torch.equal(one[k], two[k])} == {
        "encoder.pooler.kv.weight",
        "encoder.pooler.query_token",
    }


def test_a_run_teaches_another_and_a_public_checkpoint_does_in_two_steps(figures, tmp_path):
    """--init dino.pth adapts it to these images; --teacher lets what came of it guide."""
    train_in(tmp_path / "first", figures, "--epochs", 1)
    weights = load_file(tmp_path / "first" / "model.safetensors")
    dino = {f"module.backbone.{k}": w for k, w in weights.items() if not is_decoder(k)}
    student = {k: torch.zeros_like(w) for k, w in dino.items()}
    torch.save({"student": student, "teacher": dino, "epoch": 7}, tmp_path / "dino.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 1}')
    done = train_in(tmp_path / "adapted", figures, "--init", tmp_path / "dino.pth", "--epochs", 1)
    assert "the decoder starts anew" in done.stdout
    for name, source in (("dino.pth", "cls"), ("adapted", "pooler")):
        words = ["--mask", "attn_low:beta=2", "--teacher", tmp_path / name, "--epochs", 1]
        done = train_in(tmp_path / f"by-{name}", figures, *words)
        assert f"attention ({source}) of {tmp_path / name}" in done.stdout
        assert Path(tmp_path / f"by-{name}" / "attn-00000000.safetensors").exists()
    words = ["--init", tmp_path / "first", "--model", "nano:simmim=1", "--epochs", 1]
    assert "starts anew" in train_in(tmp_path / "simmim", figures, *words).stdout
    done = train_in(tmp_path / "on", figures, "--init", tmp_path / "first", "--epochs", 1)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("first", "on")]
    ends = [[row["val_mse"] for row in log if "val_mse" in row] for log in logs]
    assert "encoder and decoder" in done.stdout and "before training" in done.stdout
    assert ends[1][0] == pytest.approx(ends[0][-1], rel=0.02)  # it goes on where that one ended


def test_images_are_packed_first_and_unlabelled_ones_train_too(tmp_path):
    draw_folder(tmp_path / "pictures", classes=1, each=40)
    words = ["--data", tmp_path / "pictures" / "class0", *QUICK]
    done = call("pretrain.py", *words, cwd=tmp_path, check=0)
    assert (tmp_path / "datasets" / "class0" / "train.safetensors").exists()
    assert "kNN" not in done.stdout and "no Top-1" in done.stdout
    assert len(list((tmp_path / "runs").glob("class0-*/model.safetensors"))) == 1
