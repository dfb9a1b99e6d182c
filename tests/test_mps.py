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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import mask as masking
import model as M
import tags
from common import guidance
from common.agreement import SETTINGS, Agreement
from common.train import make_optimizer, seeded
from kernels.gather import masked_patch_gather
from kernels.loss import (
    absolute_error,
    detail_weight,
    patch_detail,
    reconstruction_loss,
    stats_loss,
)

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


def masks_and_attention(teacher, predictor, view, boxes, flip, noise):
    """Every score and every strategy -> ids_keep, ids_mask and the predicted difficulty."""
    labels, rows = torch.randint(0, 5, (4, 8, 8), dtype=torch.uint8).numpy(), torch.arange(4)
    tokens, every = teacher.all_patches(view)
    guess = predictor(tokens)
    sources = ("cls", "rollout", "pooler")
    patches = {
        "fg": guidance.crop_map(labels, rows, boxes, flip, 4),
        "parts": guidance.crop_parts(labels, rows, boxes, flip, 4, 5),
        "attn": sum(teacher.patch_attention(view, source).mean(1) for source in sources),
        "detail": patch_detail(view, every, 8),
        "difficulty": guess.detach(),
    }
    for strategy in masking.STRATEGIES.values():
        ids_keep, ids_mask = masking.sample(strategy(patches, noise, 0.9, 12), 4)
    masking.diversity(ids_mask, 16)
    guidance.region_shares(patches["fg"], ids_mask)
    return ids_keep, ids_mask, guess


def test_a_training_step_has_an_mps_kernel_for_everything(log):
    """The body of pretrain.py's loop on one batch: what is done on the device."""
    model = M.MAE(32, 8, 64, 2, 2, 32, 1)
    teacher, optimizer = M.MAE(**model.config).encoder, make_optimizer(model, 1e-3, 0.05)
    model.encoder.pooler, teacher.pooler = M.Pooler(64, 2), M.Pooler(64, 2)
    agreement = Agreement(64, {"header": {}, "labels": torch.zeros(2)}, SETTINGS["pooler"])
    images, draws = torch.randint(0, 256, (4, 40, 40, 3), dtype=torch.uint8), seeded(0)
    boxes, flip = data.draw_boxes(4, draws, 0.4)
    noise, predictor = masking.gumbel_noise(4, 16, draws), guidance.LossPredictor(4, 8)
    follow = guidance.Teacher(teacher, "pooler", set(), learns=True)
    colours, swaps = torch.rand(4, 3, generator=draws), torch.rand(4, generator=draws)
    with log:
        view = data.view_images(images, boxes, flip, 32)
        view = data.swap_backgrounds(view, torch.ones(4, 32, 32, 1), swaps, 0.7, 2)
        view = data.jitter_colour(view, colours, 0.3)
        found = masks_and_attention(teacher, predictor, view, boxes, flip, noise)
        ids_keep, ids_mask, guess = found
        weight = detail_weight(patch_detail(view, ids_mask, 8), 0.1)
        pred, stats, tokens = model(masked_patch_gather(view, ids_keep, 8), ids_keep, ids_mask)
        loss, error = reconstruction_loss(pred, view, ids_mask, 8, weight, return_error=True)
        loss = loss + reconstruction_loss(pred, view, ids_mask, 8, weight, error_of=absolute_error)
        loss = loss + stats_loss(stats, view, ids_keep, ids_mask, 8)
        loss = loss + guidance.ranking_loss(guess.gather(1, ids_mask), error)
        (loss + agreement(model.encoder.summary(tokens), torch.arange(4) // 2)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        follow.update(model.encoder, 5, 10)
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
