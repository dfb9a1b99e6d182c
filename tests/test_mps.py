"""Would a training step run on Apple's GPUs? None is here, but torch ships a table of who has a kernel.

torchgen/packaged/ATen/native/native_functions.yaml, in every wheel, names the devices that have a
kernel of each ATen operator. A step runs here on the CPU under a mode that sees every operator. One
without an MPS kernel must be made of others, and then those are checked instead.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchgen
from conftest import call
from golden import write_packed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import demo
import model as M
import pretrain
import tags

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


class OperatorLog(TorchDispatchMode):
    """Notes the operators that MPS lacks, and every dtype. What is composed of others is opened up."""

    def __init__(self):
        super().__init__()
        self.missing, self.seen = set(), set()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").removesuffix(".default")
        keys = kernels_for(name) if func.namespace == "aten" else set()
        keys = keys | kernels_for(name.replace(".Scalar", ".Tensor"))  # ATen makes a tensor of it
        self.seen.add(func.name())
        composed = [key for key in COMPOSED if func.has_kernel_for_dispatch_key(key)]
        there = "MPS" in keys or name == "detach"  # which computes nothing
        if composed and not there:
            with self:
                out = func._op_dk(composed[0], *args, **(kwargs or {}))
        else:
            self.missing |= set() if there else {name}
            out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.dtypes |= {x.dtype for x in tensors}
        self.dtypes |= {x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.dtype)}
        return out


@pytest.fixture
def log(monkeypatch):
    """On a device that is no CPU, attention is the fused call; its plain form stands for it here."""
    monkeypatch.setattr(M, "attention", F.scaled_dot_product_attention)
    monkeypatch.setattr(tags, "attention", F.scaled_dot_product_attention)
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        yield OperatorLog()


def check(log):
    """Nothing is missing, there is no float64, and it was a whole step."""
    assert not log.missing and torch.float64 not in log.dtypes  # MPS has none
    whole = {"addmm", "_softmax", "native_layer_norm_backward", "_fused_adamw_"}
    assert {f"aten::{name}" for name in whole} <= log.seen
    assert "MPS" in kernels_for("_scaled_dot_product_attention_math_for_mps")


def test_what_mps_lacks_is_seen():
    with OperatorLog() as log:
        torch.poisson(torch.ones(3)).double()
    assert log.missing == {"poisson"} and torch.float64 in log.dtypes


@pytest.mark.parametrize("mask", ["attn_high:start=0", "parts", "learned"])
def test_a_step_of_pretraining_has_an_mps_kernel_for_everything(log, mask, tmp_path, monkeypatch):
    """Two steps of pretrain.py as a user runs it, without the evaluations, which the CPU computes."""
    monkeypatch.setitem(M.SIZES, "nano", M.SIZES["nano"] | {"dim": 64, "depth": 2, "heads": 2})
    for name in ("evaluate", "draw_masks", "finish"):
        monkeypatch.setattr(pretrain, name, lambda *_, **__: {})
    write_packed(tmp_path / "packed", 32, (("train", 16), ("val", 4)))
    words = ["--data", "packed", "--out", "run", "--mask", mask, "--ratio", "0.6-0.8"]
    words += ["--model", "nano:image_size=32", "--epochs", 1, "--batch-size", 8]
    with log:
        call("pretrain.py", *words, "--device", "cpu", "--dtype", "fp32", cwd=tmp_path, check=0)
    check(log)


@pytest.mark.parametrize("arm", tags.ARMS)
def test_a_step_on_tags_has_an_mps_kernel_for_everything(log, arm):
    net = tags.MFDN(M.ViT(32, 8, 64, 2, 2), 3, 10, arm, 8)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    ids = torch.tensor([[1, 2], [3, -1], [0, 9], [-1, -1]])
    words = tags.to_words(ids, 10, 8)
    hidden = words < 10 if arm in tags.HIDES_TAGS else None
    targets = words[hidden] if arm in tags.HIDES_TAGS else torch.ones(4, 10)
    view = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    batch = SimpleNamespace(words=words, hidden=hidden, targets=targets, count=5)
    with log:
        batch.patches, batch.ids = net.encoder.all_patches(view)
        sum(tags.losses(net, batch, torch.tensor([0, 1, 2, 0]))).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        tags.answers(net, view), tags.answers(net, view, ids)
    check(log)


def test_the_page_has_an_mps_kernel_for_everything(log, at, monkeypatch):
    monkeypatch.setattr(demo, "psnr", lambda a, b, where: torch.zeros(1))  # on the CPU
    picture = demo.drawing("akika", 0)
    with log, torch.inference_mode():
        for strategy in ("attn_high", "parts", "detail"):
            assert "<img" in demo.mask_page("runs/a", picture, strategy, 0.75, 1.0, 0)
        assert "<h2>" in demo.tags_page("runs/a-tags", picture)
    assert not log.missing and torch.float64 not in log.dtypes
