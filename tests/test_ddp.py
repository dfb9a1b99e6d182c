"""torchrun: several processes do what one does with the same batch; signals, lost ones, resuming on another number."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, stage

from common.lora import save_encoder
from common.train import read_log
from model import MAE, Block, ViT

QUICK = [
    "--device",
    "cpu",
    "--dtype",
    "fp32",
    "--image-size",
    32,
    "--batch-size",
    16,
    "--epochs",
    3,
]
QUICK += ["--decoder-depth", 1, "--eval-every", 3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(script, *words, cwd, processes=2):
    """A stage in several processes, in the background."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
    ]
    command += [ROOT / script]
    return subprocess.Popen(
        [str(w) for w in (*command, *words)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ONE_THREAD,
    )


def start(small, out, *more, processes=2):
    words = ["--data", small, "--out", out, *QUICK, *more]
    return torchrun("pretrain.py", *words, cwd=out.parent, processes=processes)


def alone(small, out, *more):
    return stage(
        "pretrain.py",
        "--data",
        small,
        "--out",
        out,
        *QUICK,
        *more,
        cwd=out.parent,
        check=0,
        env=ONE_THREAD,
    )


def nearly_the_same(one, other):
    """Weights {name: tensor} that differ by at most 1e-5 of the length of all of them."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([x[k].flatten().float() for k in one]) for x in (one, other))
    return (a - b).norm() <= 1e-5 * b.norm()


def losses(out):
    return {r["step"]: r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r}


def wait_for_step(process, out, step):
    """Until the state of this step, or a later one, is written."""
    while process.poll() is None:
        if (out / "state.pt").exists() and max(losses(out), default=0) >= step:
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_are_one_with_two_parts_bit_for_bit(small, tmp_path):
    """Two addends have no order: with weights of 1, whose sum is exact, rank 0 + rank 1 is part 0 +
    part 1, exactly.

    The teacher's maps come from both ranks; its looks, the optimizer and the order of the images
    are in the weights.
    """
    exact = [
        "--mask",
        "attn_high:start=.3",
        "--flat-weight",
        1,
        "--contrast",
        "none",  # the negatives of a second loss are a part's
    ]
    both = start(small, tmp_path / "both", *exact)
    text, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    alone(small, tmp_path / "one", *exact, "--accumulate", 2)
    one, two = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("one", "both")
    )
    for part in ("model", "teacher"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part]), part
    maps = [(tmp_path / name / one["maps"]).read_bytes() for name in ("one", "both")]
    assert maps[0] == maps[1] and one["maps"] == two["maps"]
    assert losses(tmp_path / "one") == losses(tmp_path / "both")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "both").iterdir()
    }
    assert text.count("wrote") == 1 and "2 processes" in text  # rank 0 speaks for all


@pytest.mark.slow
def test_four_processes_are_one(small, tmp_path):
    """Weighted patches, whose weights are summed over all; the tolerance is explained below."""
    four = start(small, tmp_path / "four", "--mask", "random", processes=4)
    text, errors = four.communicate(timeout=300)
    assert four.returncode == 0 and "4 processes" in text, errors
    alone(small, tmp_path / "one", "--mask", "random")
    outs = [tmp_path / "one", tmp_path / "four"]
    one, four = ([*losses(out).values()] for out in outs)
    assert four == pytest.approx(one, rel=1e-5)
    assert nearly_the_same(
        *(torch.load(out / "state.pt", weights_only=True)["model"] for out in outs)
    )


@pytest.mark.slow
def test_stopped_then_one_is_killed_then_one_alone_ends_it(small, tmp_path):
    """SIGTERM stops both after the same step; without one of them the other ends; one process can
    go on.

    It ends where a run that never stopped ends. In fp32 the sum of two half batches differs from
    that of the whole by some 2^-24 = 6e-8 of it; 15 steps add that up, and AdamW, which divides by
    the gradient's size, enlarges it where a gradient is nearly 0: 4e-7 of the length of all weights
    was measured, and no difference of the losses. shuffle=1 guides an image by another one's map,
    which here may belong to the other process.
    """
    words, out = ["--mask", "detail:beta=2,shuffle=1"], tmp_path / "out"
    stopped = start(small, out, *words)
    wait_for_step(stopped, out, 5)
    stopped.send_signal(signal.SIGTERM)
    text, errors = stopped.communicate(timeout=120)
    assert "stopped by SIGTERM" in text and "torchrun --nproc-per-node 2" in text, errors
    at = torch.load(out / "state.pt", weights_only=True)["step"]
    assert at == max(losses(out)) and 5 <= at < 15

    lost = start(small, out, *words, "--resume")
    wait_for_step(lost, out, at + 1)
    children = Path(f"/proc/{lost.pid}/task/{lost.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    text, errors = lost.communicate(timeout=120)
    assert lost.returncode != 0 and "wrote" not in text
    assert "another process of this run has ended" in errors or "Signal 9" in errors, errors

    alone(small, out, *words, "--resume")
    alone(small, tmp_path / "whole", *words)
    mended, whole = losses(out), losses(tmp_path / "whole")
    assert mended[5] == pytest.approx(whole[5], rel=1e-5) and mended[15] == pytest.approx(
        whole[15], rel=1e-5
    )
    assert nearly_the_same(
        *(torch.load(x / "state.pt", weights_only=True)["model"] for x in (out, tmp_path / "whole"))
    )


@pytest.mark.slow
def test_two_processes_finetune_as_one(small, tmp_path):
    """The batch norm of the neck and the margin of the head look at the whole batch, whose features
    both share.
    """
    save_encoder(ViT(32, 8, 32, 2, 2), tmp_path / "encoder.safetensors", {})
    words = [
        tmp_path / "encoder.safetensors",
        "--data",
        small,
        "--method",
        "lora",
        "--head",
        "curricularface",
    ]
    words += ["--epochs", 2, "--device", "cpu", "--dtype", "fp32", "--batch-size", 16]
    both = torchrun("finetune_lora.py", *words, "--out", tmp_path / "both", cwd=tmp_path)
    text, errors = both.communicate(timeout=300)
    assert both.returncode == 0 and text.count("wrote") == 1, errors
    stage(
        "finetune_lora.py", *words, "--out", tmp_path / "one", cwd=tmp_path, check=0, env=ONE_THREAD
    )
    one, two = (
        torch.load(tmp_path / x / "state.pt", weights_only=True)["model"] for x in ("one", "both")
    )
    assert nearly_the_same(two, one)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "both").iterdir()
    }


@pytest.mark.slow
def test_a_batch_that_cant_be_shared_is_refused(small, tmp_path):
    done = start(small, tmp_path / "out", "--batch-size", 15)
    _, errors = done.communicate(timeout=120)
    assert (
        "must be divisible by processes x --accumulate, 2 x 1: 15 is not" in errors
        and "--batch-size 16" in errors
    )
    assert not (tmp_path / "out").exists()


def test_recomputed_activations_change_no_bit():
    """--recompute trades time for memory, and nothing else."""
    torch.manual_seed(0)
    model = MAE(32, 8, 32, 2, 2, decoder_dim=32, decoder_depth=1)
    patches, ids = torch.randn(2, 4, 192), torch.arange(16).expand(2, -1)
    gradients = []
    for recompute in (False, True):
        for block in (m for m in model.modules() if isinstance(m, Block)):
            block.recompute = recompute
        model.zero_grad()
        model(patches, ids[:, :4], ids[:, 4:])[0].square().mean().backward()
        gradients.append([w.grad for w in model.parameters() if w.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
