"""The Triton kernels where there is no GPU: in the interpreter, through the compiler, in a training run.

TRITON_INTERPRET has to be set before triton is first imported, and nothing compiles while it is.
So the interpreter works in processes of its own.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import python
from golden import write_packed
from made import NANO

triton = pytest.importorskip("triton", reason="there is no Triton here: no kernels to test")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import fused  # noqa: E402


@pytest.mark.parametrize(
    "mark, least", [("not slow", 40), pytest.param("slow", 70, marks=pytest.mark.slow)]
)
def test_the_kernels_in_the_interpreter(mark, least):
    words = ["-m", "pytest", "-q", "-rs", "-n0", "-m", mark, "-p", "no:cacheprovider"]
    text = python(*words, "tests/lesson/test_kernels.py", TRITON_INTERPRET="1")
    assert int(re.search(r"(\d+) passed", text)[1]) >= least, text
    assert "about a Triton kernel" not in text, "tests that need the interpreter were skipped"


# ---- compiled for GPUs that are not here ---------------------------------------------------------

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = (75, 80, 90, 120)  # T4; A100; H100 and H200; GeForce RTX 50
COMPILED = [(224, 16, "bf16", target) for target in TARGETS]  # S, p, dtype, target
COMPILED += [(224, 16, "fp32", 75), (224, 16, "fp16", 75), (224, 14, "bf16", 80)]
COMPILED += [(96, 8, "bf16", 90), (128, 32, "bf16", 90), (128, 16, "bf16", 90)]
KERNELS = {"gather": fused.gather_kernel, "detail": fused.detail_kernel}
KERNELS |= {"error": fused.error_kernel, "gradient": fused.gradient_kernel}
TYPES = {"view": "*u8", "ids": "*i64", "count": "i32", "K": "i32", "M": "i32", "floor": "fp32"}
TYPES |= dict.fromkeys(("detail", "slope", "error", "mean", "std"), "*fp32")


def compiled(kernel, types, constants, target):
    """Compile as a launch with pointers that 16 divides would."""
    options = {"num_warps": constants.pop("num_warps")}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"]
    divisible = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def needs(binary):
    """-> registers and bytes of stack (spills) of a thread; bytes of each load, from the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", f.name]
        usage = subprocess.check_output(command, text=True)
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # such as ld.global.v4.b32: 16 bytes
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\s", binary.asm["ptx"])
    sizes = sorted(int(count or 1) * int(bits) // 8 for count, bits in loads)
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"], "loads": sizes}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("S, p, dtype, target", COMPILED)
def test_no_kernel_spills_and_bytes_are_loaded_sixteen_at_a_time(
    S, p, dtype, target, tmp_path, monkeypatch
):
    """65,536 registers serve 640 threads with 96 each, of which each has 9 loads under way.

    A row of 16 px is three pieces of 16 bytes, one of 8 px three of 8, one of 14 px three of 14.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = TYPES | dict.fromkeys(("out", "pred", "gradient"), f"*{dtype}")
    for name, kernel in KERNELS.items():
        constants = {"side": S, "p": p, "NORM_PIX": True}
        needed = needs(compiled(kernel, types, constants | fused.tile(p), target))
        assert needed["spills"] == 0 and needed["registers"] <= (160 if p == 14 else 96), name
        wide, narrowest = needed["loads"].count(16), needed["loads"][0]
        if p % 16 == 0:  # for each piece two or four loads of 16 predictions, too
            predictions = (
                {"fp32": 4, "bf16": 2, "fp16": 2}[dtype] if "pred" in kernel.arg_names else 0
            )
            assert wide == 3 + 3 * predictions and narrowest >= 4, name
        if p == 8:
            assert 8 in needed["loads"] and narrowest >= 4, name
        if p == 14:
            assert narrowest == 2, "the test would not see narrow loads"


PRETRAIN = """
import sys
from kernels import patches
import pretrain
from common import plots
from common.train import cli
plots.curves = plots.image_grid = lambda *_: None
patches.IMPL = sys.argv.pop(1)
cli(pretrain.main)
"""
SMALL = f"{NANO},dim=32,depth=2,heads=2"


@pytest.mark.slow
def test_a_run_with_the_kernels_agrees_step_by_step(tmp_path):
    """Five steps. Before rounding has been carried through any of them, the match is closer."""
    write_packed(tmp_path / "packed", 32, (("train", 16), ("val", 16)))
    rows = {}
    for impl in ("torch", "triton"):
        words = ["--data", "packed", "--out", impl, "--model", SMALL, "--epochs", 5]
        words += ["--batch-size", 16, "--device", "cpu", "--dtype", "fp32", "--eval-every", 1]
        env = {"TRITON_INTERPRET": "1"} if impl == "triton" else {}
        text = python("-c", PRETRAIN, impl, *words, cwd=tmp_path, **env)
        assert f"kernels in {impl}" in text
        lines = (tmp_path / impl / "log.jsonl").read_text().splitlines()
        rows[impl] = [row for row in map(json.loads, lines) if "loss" in row]
    assert len(rows["torch"]) == 5
    for i, (ours, theirs) in enumerate(zip(rows["triton"], rows["torch"], strict=True)):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4 if i else 1e-5)


WITHOUT = "import pytest, sys; sys.modules['triton'] = None; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.slow
def test_everything_but_the_kernels_works_without_triton():
    """macOS has none: the references and their gradient go on."""
    words = ["-q", "-n0", "-p", "no:cacheprovider", "tests/lesson/test_kernels.py"]
    assert " passed" in python("-c", WITHOUT, *words, CUDA_VISIBLE_DEVICES="")
