"""Would a training step run on Apple's GPUs? None is here, but torch ships a table of who has a kernel.

torchgen/packaged/ATen/native/native_functions.yaml, in every wheel, names the devices that have a
kernel of each ATen operator. A step runs here on the CPU under a mode that sees every operator. One
without an MPS kernel must be made of others, and then those are checked instead.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchgen
from conftest import run_line
from golden import write_packed
from made import CPU, NANO
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as M
from apps import demo, tags

KEYS = torch._C.DispatchKey
COMPOSED = [KEYS.CompositeImplicitAutograd, KEYS.CompositeExplicitAutograd]
COMPOSED += [KEYS.CompositeExplicitAutogradNonFunctional]


@functools.cache
def table():
    """{"mm.out": {"CPU", "MPS", ...}}; "-> name" is the operator whose kernels this one uses."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    kernels = {}
    for entry in path.read_text().split("\n- func: ")[1:]:
        lines = re.findall(r"^    ([A-Z]\w*(?:, \w+)*):", entry, re.M)  # "    CPU, MPS: mm_out"
        delegates = re.findall(r"^  structured_delegate: (\S+)", entry, re.M)
        keys = set(", ".join(lines).split(", ")) | {f"-> {name}" for name in delegates}
        kernels[entry.split("(")[0]] = keys
    return kernels


def kernels_for(name):
    """Operator "mm" or "add.Tensor" -> the dispatch keys that have a kernel of it."""
    keys = table().get(name, set())
    return keys.union(*(kernels_for(k[3:]) for k in keys if k.startswith("-> ")))


@functools.cache
def composition(func):
    """An operator -> its ATen name, whether MPS has a kernel of it, and the key that opens it up, or None."""
    name = func.name().removeprefix("aten::").removesuffix(".default")
    keys = kernels_for(name) if func.namespace == "aten" else set()
    keys = keys | kernels_for(name.replace(".Scalar", ".Tensor"))  # ATen makes a tensor of it
    there = "MPS" in keys or name == "detach"  # which computes nothing
    composed = [key for key in COMPOSED if func.has_kernel_for_dispatch_key(key)]
    return name, there, composed[0] if composed and not there else None


class OperatorLog(TorchDispatchMode):
    """Notes the operators that MPS lacks, and every dtype. What is composed of others is opened up."""

    def __init__(self):
        super().__init__()
        self.missing, self.seen = set(), set()
        self.dtypes = set()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch would import its compiler first, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, there, key = composition(func)
        self.seen.add(func.name())
        if key is not None:
            with self:
                return func._op_dk(key, *args, **(kwargs or {}))
        if not there:
            self.missing.add(name)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                self.dtypes.add(x.dtype)
            elif isinstance(x, torch.dtype):
                self.dtypes.add(x)
        return out


@pytest.fixture
def log(monkeypatch):
    """On a device that is no CPU, attention is the fused call; its plain form stands for it here."""
    monkeypatch.setattr(M, "attention", F.scaled_dot_product_attention)
    monkeypatch.setattr(tags, "attention", F.scaled_dot_product_attention)
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        yield OperatorLog()


def test_what_mps_lacks_is_seen():
    with OperatorLog() as log:
        torch.poisson(torch.ones(3)).double()
    assert log.missing == {"poisson"} and torch.float64 in log.dtypes


PRETRAIN = f"pretrain.py --data true --ratio .6:.8 --model {NANO},dim=64,depth=2,heads=2"
OURS = "runs/a --data datasets/packed"
STEPS = [f"{PRETRAIN} --mask {mask}" for mask in ("attn_high:start=0", "parts", "learned")]
STEPS += [f"apps.tags {OURS} --arm mfdn"]  # the other arms have no operator that it lacks
STEPS += [f"finetune_lora.py {OURS} --split val --method {method}" for method in ("lora", "full")]
REPORTS = {"apps.tags.write_results": None, "finetune_lora.write_results": None}
REPORTS |= {"finetune_lora.measure": None, "finetune_lora.tell": None}  # and what they return
REPORTS |= {"pretrain.evaluate": {}, "pretrain.draw_masks": None, "pretrain.draw_run": None}
REPORTS |= {"apps.tags.topk": 0.0, "common.readout.topk": 0.0, "common.metrics.macro_f1": 0.0}
OF_EVERY_STEP = {"addmm", "_softmax", "native_layer_norm", "native_layer_norm_backward"}
OF_EVERY_STEP |= {"_fused_adamw_"}


@pytest.mark.parametrize("line", STEPS)
def test_a_step_has_an_mps_kernel_for_everything(log, line, at, tmp_path, monkeypatch):
    """Each stage as a user runs it, without the reports, which the CPU computes."""
    for name, found in REPORTS.items():
        monkeypatch.setattr(name, lambda *_, found=found, **__: found)
    write_packed(at / "true", 32, (("train", 16), ("val", 4)))
    with log:
        run_line(f"{line} --epochs 2 --batch-size 16 --out {tmp_path}/run {CPU}", at, check=0)
    assert not log.missing and torch.float64 not in log.dtypes  # MPS has none
    assert {f"aten::{name}" for name in OF_EVERY_STEP} <= log.seen
    assert "MPS" in kernels_for("_scaled_dot_product_attention_math_for_mps")


def test_the_page_has_an_mps_kernel_for_everything(log, at, monkeypatch):
    monkeypatch.setattr(demo, "psnr", lambda a, b, where: torch.zeros(1))  # on the CPU
    picture = demo.drawing("akika")
    with log, torch.inference_mode():
        for strategy in ("attn_high", "parts", "detail"):
            assert "<img" in demo.mask_page("runs/a", picture, strategy, "grid", 0.75, 0)
        assert "apps.tags" in demo.tags_page("runs/a-tags", picture, 0.1)
    assert not log.missing and torch.float64 not in log.dtypes
