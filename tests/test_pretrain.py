"""pretrain.py as a user runs it, in a subprocess, on a small packed set; and what its loop promises."""

import json
import os
import re
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
from common.io import UserError, save_text
from common.train import commit, lr_at, read_log

QUICK = [
    "--device",
    "cpu",
    "--image-size",
    32,
    "--batch-size",
    16,
    "--epochs",
    4,
    "--decoder-depth",
    1,
]


NANO = dict(pretrain.SIZES["nano"])  # that a user has


@pytest.fixture(autouse=True, scope="module")
def few_pictures():
    """A network of 32 numbers, and no pictures but where a test asks for them: they would take most
    of the time.
    """
    with pytest.MonkeyPatch.context() as patch:
        small = dict(dim=32, depth=2, heads=1, image_size=32, patch_size=8, decoder_dim=32)
        patch.setitem(pretrain.SIZES, "nano", small)
        patch.setattr(pretrain, "draw_run", lambda *_: None)
        yield


def train(small, out, *more, check=None):
    return call(
        "pretrain.py", "--data", small, "--out", out, *QUICK, *more, cwd=out.parent, check=check
    )


def train_apart(small, out, *more, **kw):
    """In a process of its own, as a user does, and with the nano that a user has."""
    return stage("pretrain.py", "--data", small, "--out", out, *QUICK, *more, cwd=out.parent, **kw)


def weights(out):
    return torch.load(out / "state.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """One uninterrupted attn_high run, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_apart(small, out, "--mask", "attn_high:start=.3", check=0)


def test_a_run_writes_what_its_docstring_says(finished):
    out, done = finished
    assert {p.name for p in out.iterdir()} - {"attn-00000010.safetensors"} == {
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
    assert {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "images_per_s",
        "data_wait",
        "memory_mb",
    } <= set(steps[0])
    held = [r for r in rows if "val_mse" in r]
    assert (
        held[-1]["val_mse"] < held[0]["val_mse"]
        and held[0]["knn_thumbnail"] > 0
        and held[-1]["step"] == 20
    )
    assert "untrained" in done.stdout and "model.safetensors" in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: python probe.py {out}"
    assert all("%|" in line or line.endswith(" s") for line in done.stderr.splitlines()), (
        done.stderr
    )  # slow: progress


def test_same_seed_same_weights_and_another_seed_others(small, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        train(small, tmp_path / name, "--mask", "attn_high:start=.3", "--seed", seed, check=0)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "again"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


@pytest.mark.slow  # test_agreement.py stops a run and resumes it in seconds
@pytest.mark.parametrize(
    "how, times",
    [
        (signal.SIGKILL, 1),
        (signal.SIGTERM, 1),
        (signal.SIGKILL, 3),
        (signal.SIGTERM, 3),
        (signal.SIGINT, 3),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(small, finished, tmp_path, how, times):
    """Killed several times, at moments that nobody chose, and resumed: the weights are those of the
    whole run.
    """
    out = tmp_path / "killed"
    command = [
        sys.executable,
        str(ROOT / "pretrain.py"),
        "--data",
        small,
        "--out",
        out,
        *QUICK,
        "--mask",
        "attn_high:start=.3",
    ]
    stops = 0
    for attempt in range(6):
        before = max([row["step"] for row in read_log(out / "log.jsonl")], default=0)
        process = subprocess.Popen(
            [str(w) for w in [*command, "--resume"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if attempt < times:
            wait_for_a_step(process, out, more_than=before)
            process.send_signal(how)
        text, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        stops += 1
        assert "Traceback" not in errors
        if how != signal.SIGKILL:
            assert "--resume" in text, (process.returncode, text, errors)
            assert process.returncode == 128 + how
            torch.load(out / "state.pt", weights_only=True)
    assert stops >= min(times, 2) and process.returncode == 0
    assert same(weights(finished[0]), weights(out))
    assert [r["step"] for r in read_log(out / "log.jsonl") if "val_mse" in r] == [
        r["step"] for r in read_log(finished[0] / "log.jsonl") if "val_mse" in r
    ]


def wait_for_a_step(process, out, more_than):
    """Until the log holds a step that this process made, beyond `more_than`, or the run has ended."""
    while process.poll() is None:
        rows = read_log(out / "log.jsonl")
        if rows and rows[-1]["step"] > more_than:
            return
        time.sleep(0.02)


def test_accumulation_changes_nothing_but_rounding(small, finished, tmp_path):
    """The weights of the loss are summed over the whole batch, so its parts may be any number."""
    losses = {}
    for parts in (1, 4):
        out = tmp_path / f"parts{parts}"
        train(small, out, "--dtype", "fp32", "--accumulate", parts, check=0)
        losses[parts] = [r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[4]), rtol=1e-3, atol=0)


def resolved(monkeypatch, small, *words):
    """The configuration that a run has after every default is filled in."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", str(small), *map(str, words)])
    args = pretrain.parse_args()
    pretrain.fill_defaults(args, torch.device("cpu"), torch.float32)
    train_set, _ = pretrain.open_data(args)
    pretrain.set_length(args, len(train_set["images"]), torch.device("cpu"))
    return pretrain.config_of(args)


@pytest.mark.parametrize("words", [(), ("--contrast", "none"), ("--contrast", "cls")], ids=str)
def test_a_mask_changes_nothing_but_the_mask(small, monkeypatch, words):
    """Views, epochs, batch, augmentation and second loss are one recipe. SimMIM is the exception."""
    masks = [name for name in masking.STRATEGIES if name != "squares"]
    found = {mask: resolved(monkeypatch, small, "--mask", mask, *words) for mask in masks}
    assert {config.pop("mask") for config in found.values()} == set(masks)
    for mask, config in found.items():
        assert config == found["random"], mask


def test_simmim_has_no_second_loss(small, monkeypatch):
    config = resolved(monkeypatch, small, "--mask", "squares")
    assert config["contrast"] == "none" and config["views"] == 1


@pytest.mark.parametrize("contrast", ["none", "pooler"])
def test_the_default_length_is_a_number_of_views(small, monkeypatch, contrast):
    config = resolved(monkeypatch, small, "--contrast", contrast)
    images = len(data.open_split(small, "train")["images"])
    views = config["epochs"] * images * config["views"]
    assert abs(views - pretrain.VIEWS["cpu"]) <= images * config["views"]
    assert config["batch_size"] * config["views"] == pretrain.BATCH_VIEWS["cpu"]


def test_two_strategies_see_the_same_images_and_crops(small, tmp_path, monkeypatch):
    """Record what every step looks at, under random and under attn_high: only the masks may differ."""
    seen = {}
    for name in ("random", "attn_high:start=0"):
        seen[name] = {"view": [], "keep": []}
        patched(monkeypatch, data, "view_images", seen[name]["view"])
        patched(monkeypatch, masking, "sample", seen[name]["keep"])
        words = [
            "pretrain.py",
            "--data",
            small,
            "--out",
            tmp_path / name.replace(":", "-"),
            *QUICK,
            "--mask",
            name,
        ]
        monkeypatch.setattr(sys, "argv", [str(w) for w in words])
        pretrain.main()
        monkeypatch.undo()
    a, b = seen["random"], seen["attn_high:start=0"]
    views = [[v for v in x["view"] if v.shape[0] == 32] for x in (a, b)]
    assert len(views[0]) == len(views[1]) == 20 and all(
        torch.equal(x, y) for x, y in zip(*views, strict=True)
    )
    assert any(
        not torch.equal(x[0], y[0]) for x, y in zip(a["keep"][1:], b["keep"][1:], strict=False)
    )


def patched(monkeypatch, module, name, record):
    plain = getattr(module, name)

    def noted(*args):
        record.append(plain(*args))
        return record[-1]

    monkeypatch.setattr(module, name, noted)


def test_images_are_packed_first_and_unlabelled_ones_train_too(tmp_path):
    draw_folder(tmp_path / "pictures", classes=1, each=40)
    done = call(
        "pretrain.py", "--data", tmp_path / "pictures" / "class0", *QUICK, cwd=tmp_path, check=0
    )
    assert (tmp_path / "datasets" / "class0" / "train.safetensors").exists()
    assert "kNN" not in done.stdout and "no Top-1" in done.stdout
    assert len(list((tmp_path / "runs").glob("class0-*/model.safetensors"))) == 1


def test_a_finished_run_teaches_another(small, finished, tmp_path):
    done = train(
        small,
        tmp_path / "pupil",
        "--mask",
        "attn_low",
        "--teacher",
        finished[0],
        "--ratio",
        ".5:.8",
        check=0,
    )
    assert "masked MSE" in done.stdout


def test_the_learning_rate_never_passes_its_peak():
    rates = [
        lr_at(step, 100, 7.3, 1.0) for step in range(100)
    ]  # a warm-up of no whole number of steps
    assert (
        max(rates) == 1
        and rates[6] < 1
        and rates == sorted(rates[:8]) + sorted(rates[8:], reverse=True)
    )


def test_the_floor_of_norm_pix_is_a_flag(small, tmp_path):
    """A low floor blows up the last bits of flat patches; the run says so in its name, header and
    loss.
    """
    train(small, tmp_path / "low", "--norm-floor", 0.001, check=0)
    train(small, tmp_path / "default", check=0)
    first = [
        next(r["val_mse"] for r in read_log(tmp_path / n / "log.jsonl")) for n in ("low", "default")
    ]
    assert first[0] != first[1]
    assert "--norm-floor 2 must be" in refused(train(small, tmp_path / "bad", "--norm-floor", 2))


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, running = (
        tmp_path / f".state.pt.{gone.pid}.tmp",
        tmp_path / f".state.pt.{os.getppid()}.tmp",
    )
    for file in (left, running):
        file.write_text("half")
    save_text("whole", tmp_path / "state.pt")
    assert not left.exists() and running.exists() and (tmp_path / "state.pt").read_text() == "whole"


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == "no git"


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["--ratio", "1"], "--ratio 1"),
        (["--ratio", "0"], "--ratio 0"),
        (["--ratio", ".99"], "16 patches"),
        (["--patch-size", 7], "image size 32 is not a multiple of patch size 7"),
        (["--mask", "atn_high"], "choose from random"),
        (["--mask", "attn_high:gamma=1"], "no key 'gamma'"),
        (["--epochs", 0], "--epochs 0"),
        (["--batch-size", 16, "--accumulate", 3], "--accumulate 3"),
        (["--flat-weight", 2], "--flat-weight 2"),
        (["--impl", "triton"], "--impl triton"),
        (["--device", "mps"], "--device mps"),
        (["--device", "cpu:x"], "--device cpu:x"),
        (["--mask", "attn_high", "--teacher", "nowhere"], "nowhere"),
        (["--log", "carrierpigeon"], "carrierpigeon"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--eval-on", "dev"], "has no split dev, only test, train, val"),
        (["--patch-size", 0], "--patch-size 0"),
        (["--seed", -1], "--seed -1"),
        (["--data", ""], "--data gives no value"),
        (["--seed", 2**70], f"--seed {2**70} must be"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(small, tmp_path, words, says):
    assert says in refused(train(small, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_left_alone(small, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        done = call("pretrain.py", "--data", small, "--out", out, *QUICK, cwd=tmp_path)
        assert f"{tmp_path}/file is a file, and" in refused(done)
    assert (tmp_path / "file").read_text() == "mine"


def test_files_that_are_not_ours(small, finished, tmp_path):
    out = tmp_path / "out"
    for content in (b"", b"hello", (finished[0] / "state.pt").read_bytes()[:-1000]):
        out.mkdir(exist_ok=True)
        (out / "state.pt").write_bytes(content)
        assert "can't be read" in refused(train(small, out, "--resume"))
        assert (out / "state.pt").read_bytes() == content
    torch.save({"weights": torch.zeros(3)}, out / "state.pt")
    assert "no field 'config'" in refused(train(small, out, "--resume"))
    shutil.copy(finished[0] / "model.safetensors", tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 5000)
    line = refused(
        train(
            small,
            tmp_path / "new",
            "--mask",
            "attn_high",
            "--teacher",
            tmp_path / "cut.safetensors",
        )
    )
    assert "cut.safetensors is not a whole" in line
    line = refused(
        train(
            small, tmp_path / "new", "--mask", "attn_high", "--teacher", small / "train.safetensors"
        )
    )
    assert "train.safetensors has no array" in line  # ours, but a data set


def test_a_checkpoint_with_code_in_it_is_refused_unrun(small, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    (tmp_path / "out").mkdir()
    torch.save({"config": Hostile()}, tmp_path / "out" / "state.pt")
    refused(train(small, tmp_path / "out", "--resume"))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "words, flag",
    [
        (["--teacher", "self"], "teacher"),
        (["--teacher", "nowhere"], "teacher"),
        (["--attention", "cls"], "attention"),
        (["--maps", "auto"], "maps"),
        (["--mask", "fg_heavy", "--teacher", "self"], "teacher"),
        (["--mask", "attn_high", "--maps", "auto"], "maps"),
        (["--mask", "learned", "--attention", "cls"], "attention"),
        (["--mask", "attn_low", "--teacher", "maps", "--attention", "cls"], "attention"),
        (["--every", 5], "every"),
        (["--no-norm-pix", "--norm-floor", 0.1], "norm-floor"),
        (["--mask", "squares"], "decoder-depth"),
        (["--mask", "squares", "--decoder-dim", 64], "decoder-dim"),
    ],
)
def test_no_flag_is_ignored(small, tmp_path, words, flag):
    line = refused(train(small, tmp_path / "out", *words))
    assert (
        line.startswith(f"error: --{flag} ")
        and line.endswith("; leave it out")
        and not (tmp_path / "out").exists()
    )


def test_flags_that_are_used_are_no_part_of_the_network(finished):
    config = torch.load(finished[0] / "state.pt", weights_only=True)["config"]
    assert not {"given", "resume", "out"} & config.keys()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--image-size", 8192], "the largest that fits"),
        (["--decoder-dim", 320000], "no --image-size fits"),
        (["--image-size", 10**9], "the largest that fits"),
    ],
)
def test_what_memory_cannot_hold_is_refused_before_the_first_step(
    small, tmp_path, monkeypatch, words, says
):
    line = refused(train(small, tmp_path / "out", *words))
    assert says in line and "GB of memory" in line and not (tmp_path / "out").exists()
    monkeypatch.setattr(train_module, "free_memory", lambda _: 2**28)
    line = refused(train(small, tmp_path / "out", "--image-size", 256))
    size = int(re.search(r"--image-size (\d+) is the largest", line)[1])
    assert 32 < size < 256 and size % 8 == 0
    checked = []
    monkeypatch.setattr(train_module, "make_optimizer", lambda *_: checked.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it fits: the run gets as far as its optimizer
        train(small, tmp_path / "fits", "--image-size", size)
    assert (
        "the largest" in refused(train(small, tmp_path / "out", "--image-size", size + 8))
        and checked
    )


def test_the_estimate_of_memory_follows_what_is_asked_for():
    def step(n=64, D=192, images=16, item=4, fused=False, learns=True):
        return train_module.step_memory([(n, D, 4, 3)], images, item, fused, learns)

    weights = 16 * 12 * 192**2 * 4
    assert (
        step(images=32) - weights == 2 * (step() - weights)
        and step(item=2) < step()
        and step(learns=False) < step()
    )
    long, fused = step(n=4096), step(n=4096, fused=True)
    assert long - fused == 16 * 3 * 4096**2 * 4 * (
        4 + 3
    )  # probabilities of four blocks, and three at work
    assert train_module.free_memory(torch.device("cpu")) > 2**20


def test_a_finished_run_without_its_state_is_not_replaced(small, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (
        "log.jsonl",
        "attn-00000010.safetensors",
    ):  # what a run leaves that was killed at its start
        shutil.copy(finished[0] / name, out)
    done = train(small, out, "--epochs", 1, "--resume", check=0)
    assert f"nothing to resume in {out}: a new run" in done.stdout
    (out / "state.pt").unlink()
    before = (out / "model.safetensors").read_bytes()
    for more in ((), ("--resume",)):
        line = refused(train(small, out, "--epochs", 1, "--seed", 1, *more))
        assert "model.safetensors is there already; remove it (rm " in line
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("step"),
        lambda s: s.pop("optimizer"),
        lambda s: s.update(step="many"),
        lambda s: s.pop("teacher"),
        lambda s: s["model"].popitem(),
        lambda s: s.update(model=3),
        lambda s: s.update(maps="gone.safetensors"),
    ],
)
def test_a_state_that_was_changed_names_the_fix(small, finished, tmp_path, change):
    shutil.copytree(finished[0], tmp_path / "out")
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "out" / "state.pt")
    before = (tmp_path / "out" / "state.pt").read_bytes()
    words = [
        "pretrain.py",
        "--data",
        small,
        "--out",
        tmp_path / "out",
        *QUICK,
        "--mask",
        "attn_high:start=.3",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pretrain.SIZES, "nano", NANO)
        line = refused(call(*words, "--resume", cwd=tmp_path))
    assert "not as it was written" in line or "has to be" in line
    assert "rm -r" in line
    assert (tmp_path / "out" / "state.pt").read_bytes() == before


def test_a_log_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    log = train_module.Log(tmp_path / "log.jsonl", -1)
    log(step=1)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="could not write .*log.jsonl: No space left.*--resume"):
        log(step=2)


def test_a_folder_with_a_run_is_left_alone(small, finished):
    before = (finished[0] / "state.pt").read_bytes()
    assert "--resume goes on" in refused(train(small, finished[0], "--mask", "attn_high:start=.3"))
    line = refused(train(small, finished[0], "--mask", "random", "--seed", 5, "--resume"))
    assert "mask attn_high:start=.3 (now random)" in line and "seed 0 (now 5)" in line
    assert (finished[0] / "state.pt").read_bytes() == before


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_checkpoint(small, tmp_path):
    """The first save fits, a limit on the size of files makes the next ones fail half-way, as a
    full disk does.
    """
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "pretrain.py", "--data", small, "--out", out, *QUICK]
    stopped = subprocess.Popen([str(w) for w in command], stdout=subprocess.DEVNULL)
    wait_for_a_step(stopped, out, 0)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(60)
    before = (out / "state.pt").read_bytes()

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    line = refused(train_apart(small, out, "--resume", preexec_fn=small_files))
    assert "could not write" in line and "state.pt" in line
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
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(train_module, "bf16_gain", lambda: gain)
    chosen, reason = train_module.pick_dtype("auto", torch.device("cpu"))
    assert chosen == dtype and f"{gain:.1f} times" in reason
    assert train_module.pick_dtype("bf16", torch.device("cpu"))[0] == torch.bfloat16
