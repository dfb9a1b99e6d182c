"""Would a training step run on Apple's GPUs? There is none here, but torch ships its own table of who has a kernel.

torchgen/packaged/ATen/native/native_functions.yaml, in every wheel, names for each ATen operator
the devices that have a kernel (a Linux build's live dispatcher can't say: MPS kernels are compiled
on macOS only). A step of MAE, from the bytes of the images to the optimizer, runs here on the CPU
under a mode that sees every operator. One without an MPS kernel must be made of others, and then
those are looked at instead.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchgen
from torch._subclasses.fake_tensor import FakeTensorMode
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

COMPOSED = (
    torch._C.DispatchKey.CompositeImplicitAutograd,
    torch._C.DispatchKey.CompositeExplicitAutograd,
    torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional,
)


@functools.cache
def table():
    """{"mm.out": {"CPU", "MPS", ...}}; "-> name" stands for the operator whose kernels this one
    uses.
    """
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    kernels = {}
    for entry in path.read_text().split("\n- func: ")[1:]:
        keys = re.findall(
            r"^    ([A-Z]\w*(?:, \w+)*):", entry, re.M
        )  # "    CPU, CUDA, MPS: mm_out"
        delegate = re.findall(r"^  structured_delegate: (\S+)", entry, re.M)
        kernels[entry.split("(")[0]] = {k for line in keys for k in line.split(", ")} | {
            f"-> {d}" for d in delegate
        }
    return kernels


def kernels_for(name):
    """Operator "mm" or "add.Tensor" -> the dispatch keys that have a kernel of it."""
    keys = table().get(name, set())
    return keys.union(*(kernels_for(k[3:]) for k in keys if k.startswith("-> ")))


class OperatorLog(TorchDispatchMode):
    """Notes every operator that MPS has to have, and every dtype. What is composed of others is
    opened up.
    """

    def __init__(self):
        super().__init__()
        self.missing, self.seen, self.dtypes = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").removesuffix(".default")
        keys = kernels_for(name) if func.namespace == "aten" else set()
        keys = keys | kernels_for(
            name.replace(".Scalar", ".Tensor")
        )  # ATen makes a tensor of the number
        self.seen.add(func.name())
        composed = [key for key in COMPOSED if func.has_kernel_for_dispatch_key(key)]
        if "MPS" in keys or name == "detach":  # which computes nothing
            out = func(*args, **(kwargs or {}))
        elif composed:  # opened up; ours too, they are made of ATen's
            with self:
                out = func._op_dk(composed[0], *args, **(kwargs or {}))
        else:
            self.missing.add(name)
            out = func(*args, **(kwargs or {}))
        self.dtypes |= {
            x.dtype for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)
        }
        self.dtypes |= {x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.dtype)}
        return out


def training_step(log):
    """The body of pretrain.py's loop on one batch: what is done on the device, and nothing that is
    drawn on the CPU.
    """
    torch.manual_seed(0)
    model = M.MAE(
        image_size=32, patch_size=8, dim=64, depth=2, heads=2, decoder_dim=32, decoder_depth=1
    )
    teacher, optimizer = (
        M.MAE(**model.config).encoder.requires_grad_(False),
        make_optimizer(model, 1e-3, 0.05),
    )
    model.encoder.pooler, teacher.pooler = M.Pooler(64, 2), M.Pooler(64, 2)
    agreement = Agreement(64, {"header": {}, "labels": torch.zeros(2)}, SETTINGS["pooler"])
    images, draws = torch.randint(0, 256, (4, 40, 40, 3), dtype=torch.uint8), seeded(0)
    boxes, flip = data.draw_boxes(4, draws, 0.4)
    noise = masking.gumbel_noise(4, 16, draws)
    labels = torch.randint(0, 5, (4, 8, 8), dtype=torch.uint8).numpy()
    predictor, rows = guidance.LossPredictor(4, 8), torch.arange(4)
    follow = guidance.Teacher(teacher, "pooler", set(), learns=True)
    with log, sdpa_kernel(SDPBackend.MATH):
        view = data.view_images(images, boxes, flip, 32)
        patches = {
            "fg": guidance.crop_map(labels, rows, boxes, flip, 4),
            "parts": guidance.crop_parts(labels, rows, boxes, flip, 4, 5),
        }
        figure = guidance.crop_map(labels, rows, boxes, flip, 32).view(4, 32, 32, 1)
        view = data.swap_backgrounds(view, figure, torch.rand(4, generator=draws), 0.7, 2)
        view = data.jitter_colour(view, torch.rand(4, 3, generator=draws), 0.3)
        sources = ("cls", "rollout", "pooler")
        attention = [teacher.patch_attention(view, source).mean(1) for source in sources]
        patches["attn"] = sum(attention)
        tokens, every = teacher.all_patches(view)
        guess = predictor(tokens)
        patches |= {"detail": patch_detail(view, every, 8), "difficulty": guess.detach()}
        for strategy in masking.STRATEGIES.values():
            ids_keep, ids_mask = masking.sample(strategy(patches, noise, 0.9, 12), 4)
        weight = detail_weight(patch_detail(view, ids_mask, 8), 0.1)
        pred, stats, tokens = model(masked_patch_gather(view, ids_keep, 8), ids_keep, ids_mask)
        loss, error = reconstruction_loss(pred, view, ids_mask, 8, weight, True, return_error=True)
        loss = loss + reconstruction_loss(pred, view, ids_mask, 8, weight, error_of=absolute_error)
        heads = stats_loss(stats, view, ids_keep, ids_mask, 8) + guidance.ranking_loss(
            guess.gather(1, ids_mask), error
        )
        agreed = agreement(tokens[:, 0], rows // 2) + agreement(
            model.encoder.summary(tokens), rows // 2
        )
        (loss / 2 + heads + agreed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        follow.update(model.encoder, 5, 10)
        (
            masking.diversity(ids_mask, 16),
            guidance.region_shares(patches["fg"], ids_mask),
            masking.entropy(guess, 1.0),
        )


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """model.attention takes two matrix products on a CPU; any other device gets the fused call,
    here its plain form.
    """
    monkeypatch.setattr(M, "attention", F.scaled_dot_product_attention)


def test_a_training_step_has_an_mps_kernel_for_everything(as_on_a_gpu):
    log = OperatorLog()
    training_step(log)
    assert not log.missing
    assert torch.float64 not in log.dtypes  # MPS has none
    # and it was a whole step: the encoder, the loss, the backward, the
    # optimizer
    assert {
        "aten::addmm",
        "aten::_softmax",
        "aten::native_layer_norm_backward",
        "aten::index_select",
        "aten::linalg_vector_norm",
        "aten::_fused_adamw_",
        "aten::lerp_.Scalar",
    } <= log.seen
    assert "MPS" in kernels_for(
        "_scaled_dot_product_attention_math_for_mps"
    )  # what stands there for the plain form


@pytest.mark.parametrize("arm", tags.ARMS)
def test_a_step_on_tags_has_an_mps_kernel_for_everything(as_on_a_gpu, monkeypatch, arm):
    monkeypatch.setattr(tags, "attention", F.scaled_dot_product_attention)
    torch.manual_seed(0)
    net, log = tags.MFDN(M.ViT(32, 8, 64, 2, 2), 3, 10, arm, 8), OperatorLog()
    optimizer, ids = (
        torch.optim.AdamW(net.parameters(), fused=True),
        torch.tensor([[1, 2], [3, -1], [0, 9], [-1, -1]]),
    )
    words = tags.to_words(ids, 10, 8)
    hidden = words < 10 if arm in tags.HIDES_TAGS else None
    targets = words[hidden] if arm in tags.HIDES_TAGS else torch.ones(4, 10)
    view = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    batch = SimpleNamespace(words=words, hidden=hidden, targets=targets, count=5)
    with log, sdpa_kernel(SDPBackend.MATH):
        batch.patches, batch.ids = net.encoder.all_patches(view)
        sum(tags.losses(net, batch, torch.tensor([0, 1, 2, 0]))).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        tags.answers(net, view), tags.answers(net, view, ids)
    assert not log.missing and torch.float64 not in log.dtypes
    assert {"aten::native_layer_norm_backward", "aten::_fused_adamw_"} <= log.seen


@pytest.mark.parametrize(
    "name, intruder",
    [
        ("_linalg_svd", lambda x: torch.linalg.svd(x)),
        ("_linalg_eigh", lambda x: torch.linalg.eigh(x @ x.T)),
        (
            "_upsample_bilinear2d_aa_backward",
            lambda x: (
                F.interpolate(
                    x[None, None].clone().requires_grad_(),
                    size=(3, 3),
                    mode="bilinear",
                    antialias=True,
                )
                .sum()
                .backward()
            ),
        ),
        ("linalg_lstsq", lambda x: torch.linalg.lstsq(x, x)),
        ("mode", lambda x: x.mode()),
        ("poisson", lambda x: torch.poisson(x)),
    ],
)
def test_an_operator_that_mps_lacks_is_seen(name, intruder):
    log = OperatorLog()
    with log:
        intruder(torch.rand(5, 5))
    assert any(name in missing for missing in log.missing), log.missing


def test_float64_is_seen():
    log = OperatorLog()
    with log:
        torch.ones(3).mul(2.0)
    assert not log.missing and torch.float64 not in log.dtypes
    with log:
        torch.ones(3).double()
    assert torch.float64 in log.dtypes


class NoDoubles(TorchDispatchMode):
    """Metal has no float64: a tensor of it there is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        doubles = [
            x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dtype == torch.float64
        ]
        assert not [x for x in doubles if x.device.type == "mps"], func
        return out


def test_what_is_unusual_is_found_without_float64(monkeypatch):
    """With tensors that have a device and a shape, and no values: torch can pretend to be on a Mac."""
    with FakeTensorMode(), NoDoubles():
        tokens = torch.empty(6, 16, 32, device="mps")
        monkeypatch.setattr(guidance, "patch_tokens", lambda *_: [(torch.arange(6), tokens)])
        encoder = SimpleNamespace(cls_token=tokens)
        ((_, found),) = guidance.attention(encoder, range(6), torch.arange(6), "outlier", None)
        assert (
            found.device.type == "mps" and found.shape == (6, 16) and found.dtype == torch.float32
        )
        with pytest.raises(AssertionError):
            tokens.double()


def test_the_table_is_read_rightly():
    assert (
        "MPS" in kernels_for("mm") and "MPS" not in table()["mm"]
    )  # through structured_delegate: mm.out
    assert {"CPU", "MPS"} <= kernels_for("index_select") and "MPS" not in kernels_for("poisson")
    assert len(table()) > 2000 and sum("MPS" in keys for keys in table().values()) > 300
