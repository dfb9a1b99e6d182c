"""The Triton kernels where there is no GPU: in the interpreter, through the compiler, and in a training run.

TRITON_INTERPRET has to be set before triton is first imported and to stay, and nothing compiles
while it is: so the interpreter and the compiler work in processes of their own, and this one in
neither.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="there is no Triton here, so there are no kernels to test")
INTERPRETER = os.environ | {"TRITON_INTERPRET": "1"}


def python(*words, **env):
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | env, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_kernels_in_the_interpreter():
    told = python(
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "tests/test_kernels.py",
        TRITON_INTERPRET="1",
    )
    assert int(re.search(r"(\d+) passed", told)[1]) > 100, told
    assert (
        "about a Triton kernel" not in told
    )  # the tests that need one were not skipped: it was the interpreter


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """{(kernel, target, S, p, dtype): what the compiled kernel needs}."""
    cache = str(tmp_path_factory.mktemp("triton"))
    rows = json.loads(
        python(
            "-W", "ignore", "tests/compile_kernels.py", TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0"
        )
    )
    return {(r["kernel"], r["target"], r["S"], r["p"], r["dtype"]): r for r in rows}


@pytest.mark.slow
@pytest.mark.parametrize("target", [75, 80, 90, 120])
def test_no_kernel_spills(resources, target):
    assert (
        resources.pop(("greedy", 90, 0, 0, "fp32"), dict(spills=1))["spills"] > 0
    )  # a spill would be seen
    ours = {name: r for name, r in resources.items() if name[1] == target}
    assert {name[0] for name in ours} == {"gather", "detail", "loss"}
    for name, r in ours.items():
        assert r["spills"] == 0, name
        assert r["registers"] <= 64, (
            name
        )  # 65,536 of them serve 1024 threads: half of what a multiprocessor can hold


@pytest.mark.slow
@pytest.mark.parametrize("target", [75, 80, 90, 120])
def test_bytes_are_loaded_sixteen_at_a_time(resources, target):
    for (kernel, where, S, p, dtype), r in resources.items():
        if where == target and kernel in ("gather", "detail", "loss"):
            wide, size = r["loads"].count(16), dict(fp32=4, bf16=2, fp16=2)[dtype]
            if (
                S % 16 == 0 and p % 16 == 0
            ):  # one load of 16 bytes; and for 16 predictions beside it, `size` of them
                assert wide == (1 + size if kernel == "loss" else 1) and r["loads"][0] >= 4, (
                    kernel,
                    S,
                    p,
                    dtype,
                )
            if p == 8:  # rows of 24 bytes: 8 is what divides every address
                assert 8 in r["loads"] and r["loads"][0] >= 4, (kernel, S, p, dtype)
            if p == 14:  # rows of 42 bytes: the test would see loads that are narrow
                assert r["loads"][0] == 2


PRETRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kernels
import pretrain
from common.command import cli
kernels.IMPL = sys.argv.pop(1)
cli(pretrain.main)
"""


def steps(small, out, impl, env):
    """Train for a few epochs of one step each -> [(loss, gradient norm)] of every step, and the
    last evaluation.
    """
    words = ["--data", small, "--out", out, "--model", "nano:image_size=32", "--epochs", 5]
    words += ["--eval-every", 5, "--batch-size", 512, "--device", "cpu", "--dtype", "fp32"]
    command = [sys.executable, "-c", PRETRAIN, impl, *map(str, words)]
    done = subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"kernels in {impl}" in done.stdout
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(r["loss"], r["grad_norm"]) for r in rows if "loss" in r], [
        r["val_mse"] for r in rows if "val_mse" in r
    ]


@pytest.mark.slow
def test_a_run_with_the_kernels_agrees_step_by_step(small, tmp_path):
    plain, plain_mse = steps(small, tmp_path / "torch", "torch", dict(os.environ))
    fused, fused_mse = steps(small, tmp_path / "triton", "triton", INTERPRETER)
    assert len(plain) == len(fused) == 5 and len({loss for loss, _ in plain}) == 5
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    assert fused_mse == pytest.approx(plain_mse, rel=2e-4)
    assert fused[0] == pytest.approx(
        plain[0], rel=1e-5
    )  # before rounding has been carried through any step


@pytest.mark.slow
def test_everything_but_the_kernels_works_without_triton():
    """macOS has none: imports, the references and the gradient go on; asking for Triton says why
    not.
    """
    python(
        "-c",
        """
import sys
sys.modules["triton"] = None  # import triton: ImportError
import torch, kernels
from kernels.loss import patch_detail, reconstruction_loss
from kernels.gather import masked_patch_gather
view, ids = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8), torch.tensor([[0, 3], [1, 2]])
pred = masked_patch_gather(view, ids, 4).requires_grad_()
reconstruction_loss(pred, view, ids, 4, patch_detail(view, ids, 4)).backward()
assert pred.grad.abs().sum() > 0
assert kernels.choose_impl("auto", "cpu")[0] == "torch"
try:
    kernels.choose_impl("triton", "cpu")
except ValueError as problem:
    assert "not installed" in str(problem)
else:
    raise AssertionError("triton was accepted")
""",
    )
