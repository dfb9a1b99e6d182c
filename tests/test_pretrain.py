"""pretrain.py as a user runs it, on a small packed set, and what its loop promises."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call, draw_folder, refused, stage

import data
import mask as masking
import pretrain
from common import train as train_module
from common.io import save_text
from common.train import commit, lr_at, read_log

MODEL = "nano:image_size=32"
QUICK = ["--device", "cpu", "--batch-size", 16, "--epochs", 4]
NANO = dict(pretrain.SIZES["nano"])


@pytest.fixture(autouse=True, scope="module")
def small_network():
    """A network of 32 numbers, and no pictures: they would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        small = dict(dim=32, depth=2, heads=1, image_size=32, patch_size=8, decoder_dim=32)
        patch.setitem(pretrain.SIZES, "nano", small)
        patch.setattr(pretrain, "draw_run", lambda *_: None)
        patch.setattr(pretrain, "draw_masks", lambda *_: None)
        yield


def train(small, out, *more, check=None):
    words = ["--data", small, "--out", out, *QUICK]
    return call("pretrain.py", *words, *more, cwd=out.parent, check=check)


def resume(out, check=None):
    return call("pretrain.py", "--resume", out, cwd=out.parent, check=check)


def weights(out):
    return torch.load(out / "state.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """An attn_high run in a process of its own, with the nano that a user has; what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    words = ["--data", small, "--out", out, "--model", MODEL, *QUICK]
    return out, stage(
        "pretrain.py", *words, "--mask", "attn_high:start=.3", cwd=out.parent, check=0
    )


def test_a_run_writes_what_its_docstring_says(finished):
    out, done = finished
    assert {p.name for p in out.iterdir()} == {
        "attn-00000010.safetensors",
        "state.pt",
        "model.safetensors",
        "pooler.safetensors",
        "stats_head.safetensors",
        "log.jsonl",
        "curves.png",
        "recon.png",
        "masks.png",
    }
    rows = read_log(out / "log.jsonl")
    steps = [r for r in rows if "loss" in r]
    assert {"step", "epoch", "lr", "grad_norm", "images_per_s", "memory_mb"} <= set(steps[0])
    held = [r for r in rows if "val_mse" in r]
    assert held[-1]["val_mse"] < held[0]["val_mse"] and held[-1]["step"] == 20
    assert held[0]["knn_thumbnail"] > 0
    assert done.stdout.splitlines()[-1] == f"next: python probe.py {out}"


def test_the_state_holds_all_parts(finished):
    state = torch.load(finished[0] / "state.pt", weights_only=True)
    parts = {"model", "teacher", "agreement", "optimizer", "guide"}
    assert state.keys() == parts | {"config", "step", "seconds"}
    assert state["guide"] == {"maps": "attn-00000010.safetensors"}


def test_same_seed_same_weights_and_another_seed_others(small, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        train(small, tmp_path / name, "--mask", "attn_high:start=.3", "--seed", seed, check=0)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "again"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bits(small, finished, tmp_path, how):
    """Killed three times at moments that nobody chose: the weights are those of the whole run."""
    out = tmp_path / "killed"
    first = ["--data", small, "--out", out, "--model", MODEL, *QUICK]
    first += ["--mask", "attn_high:start=.3"]
    code = None
    for attempt in range(6):
        words = ["--resume", out] if (out / "state.pt").exists() else first
        process = start(tmp_path, *words)
        if attempt < 3:
            before = max([row["step"] for row in read_log(out / "log.jsonl")], default=0)
            wait_for_a_step(process, out, before)
            process.send_signal(how)
        text, errors = process.communicate(timeout=120)
        code = process.returncode
        assert "Traceback" not in errors
        if code == 0:
            break
        if how != signal.SIGKILL:
            assert code == 128 + how and f"--resume {out}" in text
    assert code == 0 and same(weights(finished[0]), weights(out))
    evaluated = [
        [r["step"] for r in read_log(run / "log.jsonl") if "val_mse" in r]
        for run in (out, finished[0])
    ]
    assert evaluated[0] == evaluated[1]


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


def recipe(monkeypatch, small, out, *words):
    """The flags of a run after every default is filled in; it stops before its first step."""

    class Stop(Exception):
        pass

    def stop(flags, *_):
        raise Stop(flags.values)

    monkeypatch.setattr(train_module, "Run", stop)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", str(small), "--out", out, *words])
    with pytest.raises(Stop) as stopped:
        pretrain.main()
    return stopped.value.args[0]


@pytest.mark.parametrize("words", [(), ("--contrast", "none"), ("--contrast", "cls")], ids=str)
def test_a_mask_changes_nothing_but_the_mask(small, monkeypatch, words):
    """Views, epochs, batch and second loss are one recipe."""
    masks = [name for name in masking.STRATEGIES if masking.NEEDS.get(name) not in ("fg", "parts")]
    found = {m: recipe(monkeypatch, small, "x", "--mask", m, *words) for m in masks}
    assert {flags.pop("mask") for flags in found.values()} == set(masks)
    for mask, flags in found.items():
        assert flags == found["random"], mask


def test_simmim_is_a_model_with_its_own_defaults(small, monkeypatch, tmp_path):
    flags = recipe(monkeypatch, small, "x", "--model", "nano:simmim=1")
    assert (flags["mask"], flags["ratio"], flags["contrast"]) == ("squares", "0.6", "none")
    line = refused(train(small, tmp_path / "x", "--model", "nano:simmim=1", "--contrast", "pooler"))
    assert "--contrast pooler" in line


@pytest.mark.parametrize("contrast", ["none", "pooler"])
def test_the_default_length_is_a_number_of_views(small, monkeypatch, contrast):
    flags = recipe(monkeypatch, small, "x", "--contrast", contrast)
    V, images = 1 + (contrast != "none"), len(data.open_split(small, "train")["images"])
    default = pretrain.DEFAULTS["cpu"]
    assert abs(flags["epochs"] * images * V - default["views"]) <= images * V
    assert flags["batch_size"] * V == default["batch"]


def test_two_strategies_see_the_same_images_and_crops(small, tmp_path, monkeypatch):
    """The views of every step, under random and under attn_high: only the masks differ."""
    seen = {}
    for name in ("random", "attn_high:start=0"):
        seen[name] = {"view": [], "keep": []}
        with monkeypatch.context() as patch:
            record(patch, data, "view_images", seen[name]["view"])
            record(patch, masking, "sample", seen[name]["keep"])
            train(small, tmp_path / name.replace(":", "-"), "--mask", name, check=0)
    a, b = seen.values()
    views = [[v for v in x["view"] if v.shape[0] == 32] for x in (a, b)]
    assert len(views[0]) == len(views[1]) == 20
    assert all(torch.equal(x, y) for x, y in zip(*views, strict=True))
    kept = zip(a["keep"][1:], b["keep"][1:], strict=False)
    assert any(not torch.equal(x[0], y[0]) for x, y in kept)


def record(patch, module, name, results):
    plain = getattr(module, name)

    def noted(*args):
        results.append(plain(*args))
        return results[-1]

    patch.setattr(module, name, noted)


def test_images_are_packed_first_and_unlabelled_ones_train_too(tmp_path):
    draw_folder(tmp_path / "pictures", classes=1, each=40)
    words = ["--data", tmp_path / "pictures" / "class0", *QUICK]
    done = call("pretrain.py", *words, cwd=tmp_path, check=0)
    assert (tmp_path / "datasets" / "class0" / "train.safetensors").exists()
    assert "kNN" not in done.stdout and "no Top-1" in done.stdout
    assert len(list((tmp_path / "runs").glob("class0-*/model.safetensors"))) == 1


def test_a_finished_run_teaches_another(small, finished, tmp_path):
    words = ["--mask", "attn_low", "--teacher", finished[0], "--ratio", ".5:.8"]
    done = train(small, tmp_path / "pupil", *words, check=0)
    assert f"attention (pooler) of {finished[0]}" in done.stdout


def test_a_ratio_is_drawn_for_each_step_and_patches_are_thrown(small, tmp_path):
    ratios = {pretrain.ratio_at("0.5-0.9", 0, (1, 0, step, 0)) for step in range(50)}
    assert len(ratios) == 50 and 0.5 < min(ratios) < 0.55 and 0.85 < max(ratios) < 0.9
    assert pretrain.ratio_at("0.5-0.9", 0, (1, 0, 7, 0)) == pretrain.ratio_at(
        "0.5-0.9", 1, (1, 0, 7, 3)
    )
    assert [pretrain.ratio_at("0.5:0.9", t, ()) for t in (0, 0.5, 1)] == [0.5, 0.7, 0.9]
    assert pretrain.ratio_at("0.75", 0.3, ()) == 0.75
    words = ["--mask", "random:throw=0.2", "--ratio", "0.5-0.7"]
    train(small, tmp_path / "thrown", *words, check=0)
    for throw in ("0.5", "-0.1"):
        done = train(small, tmp_path / "none", "--mask", f"random:throw={throw}", "--ratio", "0.5")
        assert done.returncode == 2 and "thrown" in done.stderr


def test_the_learning_rate_never_passes_its_peak():
    rates = [lr_at(step, 100, 7.3, 1.0) for step in range(100)]
    assert max(rates) == 1 and rates[6] < 1
    assert rates == sorted(rates[:8]) + sorted(rates[8:], reverse=True)


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    running = tmp_path / f".state.pt.{os.getppid()}.tmp"
    for file in (tmp_path / f".state.pt.{gone.pid}.tmp", running):
        file.write_text("half")
    save_text("whole", tmp_path / "state.pt")
    assert {p.name for p in tmp_path.iterdir()} == {"state.pt", running.name}


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == "no git"


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["--ratio", "1"], "--ratio 1"),
        (["--ratio", ".99"], "16 patches"),
        (["--ratio", "half"], "--ratio half"),
        (["--model", "nano:patch_size=7"], "7"),
        (["--model", "nano:patch_size=0"], "0"),
        (["--model", "huge"], "--model huge"),
        (["--mask", "atn_high"], "--mask atn_high"),
        (["--mask", "attn_high:gamma=1"], "'gamma'"),
        (["--batch-size", 1], "--batch-size 1"),
        (["--contrast", 1], "pooler, cls, none"),
        (["--device", "mps"], "--device mps"),
        (["--mask", "attn_high", "--teacher", "nowhere"], "nowhere"),
        (["--log", "carrierpigeon"], "carrierpigeon"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--split", "dev"], "has no split dev"),
        (["--seed", 2**70], f"--seed {2**70}"),
        # a flag without an effect
        (["--teacher", "self"], "--teacher has no effect"),
        (["--attention", "cls"], "--attention has no effect"),
        (["--maps", "auto"], "--maps has no effect"),
        (["--mask", "attn_high", "--maps", "auto"], "--maps has no effect"),
        (["--mask", "attn_low", "--teacher", "maps", "--attention", "cls"], "attn"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(small, tmp_path, words, says):
    assert says in refused(train(small, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_ours(small, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for content in (b"", b"hello", (finished[0] / "state.pt").read_bytes()[:-1000]):
        (out / "state.pt").write_bytes(content)
        assert "not a whole checkpoint" in refused(resume(out))
        assert (out / "state.pt").read_bytes() == content
    shutil.copy(finished[0] / "model.safetensors", tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 5000)
    for teacher in (tmp_path / "cut.safetensors", small / "train.safetensors"):
        words = ["--mask", "attn_high", "--teacher", teacher]
        assert teacher.name in refused(train(small, tmp_path / "new", *words))


def test_a_checkpoint_with_code_in_it_is_refused_unrun(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    (tmp_path / "out").mkdir()
    torch.save({"config": Hostile()}, tmp_path / "out" / "state.pt")
    refused(resume(tmp_path / "out"))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("step"),
        lambda s: s.pop("optimizer"),
        lambda s: s.pop("teacher"),
        lambda s: s["model"].popitem(),
        lambda s: s["guide"].update(maps="gone.safetensors"),
    ],
)
def test_a_state_that_was_changed_is_refused(finished, tmp_path, change):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    state = torch.load(out / "state.pt", weights_only=True)
    change(state)
    torch.save(state, out / "state.pt")
    before = (out / "state.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pretrain.SIZES, "nano", NANO)
        refused(resume(out))
    assert (out / "state.pt").read_bytes() == before


def test_a_folder_with_a_run_is_left_alone(small, finished):
    before = (finished[0] / "state.pt").read_bytes()
    assert "is there already" in refused(train(small, finished[0], "--mask", "random"))
    assert (finished[0] / "state.pt").read_bytes() == before


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_checkpoint(small, tmp_path):
    """A limit on the size of files makes the next save fail half-way, as a full disk does."""
    out = tmp_path / "out"
    process = start(tmp_path, "--data", small, "--out", out, "--model", MODEL, *QUICK)
    wait_for_a_step(process, out, 0)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    before = (out / "state.pt").read_bytes()

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    done = stage("pretrain.py", "--resume", out, cwd=tmp_path, preexec_fn=small_files)
    assert "could not write" in refused(done)
    assert (out / "state.pt").read_bytes() == before and not list(out.glob(".*tmp"))


def test_a_loss_that_is_not_finite_stops_and_names_the_step(small, tmp_path, monkeypatch):
    plain, calls = pretrain.reconstruction_loss, []

    def broken(*args, **kw):
        calls.append(1)
        loss, error = plain(*args, **kw)
        return loss * (float("nan") if len(calls) == 13 else 1), error

    monkeypatch.setattr(pretrain, "reconstruction_loss", broken)
    assert "not finite at step 13" in refused(train(small, tmp_path / "out"))
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert state["step"] < 13 and all(w.isfinite().all() for w in state["model"].values())


def test_log_rows_are_json(finished):
    for line in (finished[0] / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["seconds"] >= 0


@pytest.mark.parametrize(
    ("gain", "dtype"), [(0.5, torch.float32), (1.1, torch.float32), (3.0, torch.bfloat16)]
)
def test_a_cpu_gets_bf16_where_bf16_is_fast(monkeypatch, gain, dtype):
    monkeypatch.setattr(train_module, "bf16_gain", lambda: gain)
    chosen, reason = train_module.pick_dtype("auto", torch.device("cpu"))
    assert chosen == dtype and ("not faster" in reason) == (dtype == torch.float32)
    assert train_module.pick_dtype("bf16", torch.device("cpu"))[0] == torch.bfloat16
