"""The two kernels against float64, and what surrounds them.

This file runs three times over: here with the PyTorch references; in a process of its own under
Triton's interpreter (test_kernels_triton.py starts it); and, where there is a GPU, here on that GPU
with the compiled kernels. The judge is written from the formulas, patch by patch, and shares no
line with the files under test. `plain` is the same mathematics in PyTorch with the network's dtype;
an error may be at most twice as large as plain's.
"""

import pytest
import torch

import kernels
from kernels import gather as G
from kernels import loss as L

GPU = torch.cuda.is_available() and not kernels.INTERPRET
DEVICE, IMPL = ("cuda" if GPU else "cpu"), ("triton" if GPU or kernels.INTERPRET else "torch")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_kernel = pytest.mark.skipif(
    IMPL == "torch", reason="about a Triton kernel: runs in the interpreter's process"
)


def case(p, B=3, side=4, ratio=0.5, seed=0):
    """-> view u8 (B, S, S, 3) with a flat, a coloured-flat and a saturated patch, ids_keep and
    ids_mask, contiguous.
    """
    random = torch.Generator().manual_seed(seed)
    view = torch.randint(0, 256, (B, side * p, side * p, 3), dtype=torch.uint8, generator=random)
    view[0, :p, :p] = 255
    view[0, :p, p : 2 * p] = torch.tensor([251, 3, 77], dtype=torch.uint8)
    view[0, -p:, -p:] = (torch.rand(p, p, 3, generator=random) < 0.5) * 255
    order = torch.rand(B, side * side, generator=random).argsort(1)
    K = int(side * side * (1 - ratio))
    return [x.contiguous().to(DEVICE) for x in (view, order[:, :K], order[:, K:])]


def patches(view, ids, p):
    """Raw patches (B, K, p*p, 3) one by one: the slow, sure way."""
    g = view.shape[1] // p
    cut = [
        [image[i // g * p : i // g * p + p, i % g * p : i % g * p + p] for i in own]
        for image, own in zip(view, ids.tolist(), strict=True)
    ]
    return torch.stack([torch.stack(own) for own in cut]).flatten(2, 3)


def normalised(view, ids, p, dtype):
    """(x/255 - mean) / std in dtype, (B, K, P)."""
    mean, std = torch.tensor(
        [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=dtype, device=view.device
    )
    return ((patches(view, ids, p).to(dtype) / 255 - mean) / std).flatten(2)


def loss_by_formula(pred, view, ids, p, weight, norm_pix, dtype):
    """-> loss, gradient of pred's dtype (autograd's), errors: every formula as it stands, in dtype."""
    t = normalised(view, ids, p, dtype)
    if norm_pix:
        t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 0.15**2).sqrt()
    pred = pred.detach().requires_grad_()
    error = (pred.to(dtype) - t).square().mean(2)
    loss = (weight.to(dtype) * error).sum() / weight.to(dtype).sum()
    return loss.detach(), torch.autograd.grad(loss, pred)[0], error.detach()


def worst(x, truth):
    return (x.double() - truth).abs().max().item()


def typical(x):
    """Root mean square: the largest of a few rounding errors is luck, their typical size is not."""
    return x.double().square().mean().sqrt().item()


def assert_as_good(x, plain, truth, what):
    """Typical error at most twice that of the same mathematics in torch; each number within one
    rounding to its dtype.

    "Within one rounding" has 10 of plain's typical errors added: those of the fp32 arithmetic
    before the rounding. A lone number has no typical error, it gets 3 units in the last place. The
    interpreter cuts bf16 off instead of rounding, which alone doubles the typical error: there only
    the second bound counts.
    """
    info, mine, theirs = torch.finfo(x.dtype), x.double() - truth, typical(plain.double() - truth)
    alone = 3 * 2**-23 * truth.abs().max().item() if x.ndim == 0 else 0.0
    if not (kernels.INTERPRET and x.dtype == torch.bfloat16):
        assert typical(mine) <= max(2 * theirs, alone), (
            f"{what}: {typical(mine):.2e} against {theirs:.2e}"
        )
    one_rounding = (info.eps * truth.abs()).clamp(
        min=info.tiny * info.eps
    )  # the second for fp16's subnormal numbers
    before = 10 * theirs if x.dtype == torch.float32 else 1e-6 * typical(truth)
    assert (mine.abs() <= one_rounding + max(before, alone)).all(), what


def gather(*args, **more):
    return G.masked_patch_gather(*args, **more, impl=IMPL)


def detail(*args):
    return L.patch_detail(*args, impl=IMPL)


def loss(*args, **more):
    return L.reconstruction_loss(*args, **more, impl=IMPL)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [4, 5, 8, 14, 16])
def test_gather_against_float64(p, dtype):
    view, keep, _ = case(p)
    truth = normalised(view, keep, p, torch.float64)
    out = gather(view, keep, p, dtype)
    assert out.dtype == dtype and out.shape == truth.shape and out.is_contiguous()
    assert_as_good(out, normalised(view, keep, p, torch.float32).to(dtype), truth, "gather")


@pytest.mark.parametrize("p", [4, 5, 8, 14, 16])
def test_detail_against_float64(p):
    view, _, ids = case(p, ratio=0.9)
    x = patches(view, ids, p).double() / 255
    truth = (x - x.mean(2, keepdim=True)).square().mean((2, 3)).sqrt()
    assert (
        worst(detail(view, ids, p), truth) <= 2**-23
    )  # whole numbers up to one square root: no cancellation


def test_the_squares_of_the_largest_patch_fit_in_32_bits():
    assert kernels.LARGEST**2 * 3 * 255**2 < 2**31 <= (kernels.LARGEST + 1) ** 2 * 3 * 255**2
    view = torch.full((1, 104, 104, 3), 255, dtype=torch.uint8, device=DEVICE)
    view[0, ::2] = 200
    found = detail(view, torch.zeros(1, 1, dtype=torch.long, device=DEVICE), 104)
    assert worst(found, torch.full((1, 1), 55 / 2 / 255, dtype=torch.float64)) < 1e-6


def test_flat_patches_have_no_detail_at_all():
    view, _, _ = case(14)
    ids = torch.tensor([[0, 1, 15], [5, 6, 7], [8, 9, 10]], device=DEVICE)
    d = detail(view, ids, 14)
    assert d[0, 0] == 0 and d[0, 1] == 0  # white; one colour: exactly, not nearly
    assert 0.45 < d[0, 2] <= 0.5  # black and white noise
    weight = L.detail_weight(d, 0.1)
    assert worst(weight[0, :2], 0.1) < 1e-7 and weight[0, 2] > 0.99 and weight[1:].min() > 0.9


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p, ratio", [(4, 0.75), (6, 0.75), (8, 0.5), (14, 0.75), (16, 0.9)])
def test_loss_and_gradient_against_float64(p, ratio, dtype, norm_pix, weighted):
    view, _, ids = case(p, ratio=ratio)
    random = torch.Generator().manual_seed(1)
    pred = torch.randn(*ids.shape, p * p * 3, generator=random).to(DEVICE, dtype)
    weight = (torch.rand(ids.shape, generator=random) if weighted else torch.ones(ids.shape)).to(
        DEVICE
    )
    y = pred.clone().requires_grad_()
    value, error = loss(y, view, ids, p, weight if weighted else None, norm_pix, return_error=True)
    value.backward()
    mine = value.detach(), y.grad, error
    plain = loss_by_formula(pred, view, ids, p, weight, norm_pix, torch.float32)
    truth = loss_by_formula(pred.double(), view, ids, p, weight, norm_pix, torch.float64)
    assert y.grad.dtype == dtype and value.dtype == error.dtype == torch.float32
    for what, *numbers in zip(("loss", "gradient", "error"), mine, plain, truth, strict=True):
        assert_as_good(*numbers, what)
    assert torch.equal(L.patch_error(pred, view, ids, p, norm_pix, IMPL), error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_made_of_the_loss_reaches_the_gradient(dtype):
    """opcheck does not notice a backward that ignores its grad_out; GradScaler and accumulation
    would.
    """
    view, _, ids = case(4)
    pred = (
        torch.randn(*ids.shape, 48, generator=torch.Generator().manual_seed(1))
        .to(DEVICE, dtype)
        .requires_grad_()
    )
    (one,) = torch.autograd.grad(loss(pred, view, ids, 4), pred)
    (many,) = torch.autograd.grad(loss(pred, view, ids, 4) * 4 + 7, pred)
    assert one.abs().max() > 0
    torch.testing.assert_close(many, one * 4)
    value = loss(pred, view, ids, 4)
    for f in (2, 1, -0.5):
        (got,) = torch.autograd.grad(value * f, pred, retain_graph=True)
        torch.testing.assert_close(got, one * f)
    leaf = pred.detach().requires_grad_()
    value = loss(leaf, view, ids, 4)
    for _ in range(3):
        value.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, one * 3)


@needs_kernel
def test_the_kernel_has_no_second_derivative():
    view, _, ids = case(4)
    pred = torch.randn(*ids.shape, 48).to(DEVICE).requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss(pred, view, ids, 4), pred, create_graph=True)


CHANGED = (
    "the gradient of loss_kernel is not autograd's through loss_reference (kernels/loss.py): "
    "if you changed the reference's error, change `diff` and `gradient` in loss_kernel, too"
)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p, ratio", [(4, 0.75), (14, 0.5), (5, 0.9)])
def test_the_kernels_gradient_is_the_references(p, ratio, dtype):
    view, _, ids = case(p, ratio=ratio)
    random = torch.Generator().manual_seed(2)
    pred = torch.randn(*ids.shape, p * p * 3, generator=random).to(DEVICE, dtype)
    weight = torch.rand(ids.shape, generator=random).to(DEVICE)
    found = []
    for impl in ("torch", "triton"):
        leaf = pred.clone().requires_grad_()
        value = L.reconstruction_loss(leaf, view, ids, p, weight, impl=impl)
        (3 * value + 1).backward()
        found.append((value.detach(), leaf.grad))
    (value, gradient), (fused, fused_gradient) = found
    close = 2**-6 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-5
    assert torch.allclose(fused, value, rtol=1e-5), CHANGED
    size = gradient.float().abs().max().item()
    assert torch.allclose(
        fused_gradient.float(), gradient.float(), rtol=close, atol=close * size / 16
    ), CHANGED


def huber(pred, target):
    return torch.nn.functional.huber_loss(pred, target, reduction="none", delta=0.3).mean(2)


def upper_half_counts_twice(pred, target):
    error = (pred - target).square().mean(2)
    return error * torch.linspace(2, 1, error.shape[1])


@pytest.mark.skipif(IMPL == "triton", reason="the reference is what a student edits")
@pytest.mark.parametrize("error_of", [L.absolute_error, huber, upper_half_counts_twice])
def test_another_error_in_the_reference_trains(monkeypatch, error_of):
    """The gradient is what the new formula says, in float64 and written out by hand."""
    view, _, ids = case(4)
    weight = torch.rand(ids.shape, dtype=torch.float64) + 0.1
    pred = torch.randn(*ids.shape, 48, dtype=torch.float64, requires_grad=True)
    (squared,) = torch.autograd.grad(loss(pred, view, ids, 4, weight), pred)
    monkeypatch.setattr(L, "squared_error", error_of)
    (changed,) = torch.autograd.grad(loss(pred, view, ids, 4, weight), pred)
    diff = pred.detach() - L.targets(view, ids, 4, True)[0].double()
    slope = {
        L.absolute_error: diff.sign(),
        huber: diff.clamp(-0.3, 0.3),
        upper_half_counts_twice: 2 * diff * torch.linspace(2, 1, ids.shape[1])[None, :, None],
    }[error_of]
    torch.testing.assert_close(changed, weight[..., None] * slope / (48 * weight.sum()))
    assert not torch.allclose(changed, squared)


@pytest.mark.skipif(IMPL == "triton", reason="in float64, which only the reference takes")
@pytest.mark.parametrize("norm_pix", [True, False])
def test_gradcheck(norm_pix):
    view, _, ids = case(3, B=2, side=2)
    weight = torch.rand(ids.shape, dtype=torch.float64) + 0.1
    pred = torch.randn(*ids.shape, 27, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: 3 * loss(y, view, ids, 3, weight, norm_pix) - 1, pred)


def test_the_gradient_is_fp32_until_it_is_rounded():
    """In fp16 the factor 2 / (P sum(w)) alone would be 0."""
    view, _, ids = case(4)
    pred = (2**10 * torch.randn(*ids.shape, 48)).to(DEVICE, torch.float16).requires_grad_()
    weight = torch.full(ids.shape, 1e5, device=DEVICE)
    (found,) = torch.autograd.grad(loss(pred, view, ids, 4, weight), pred)
    truth = loss_by_formula(pred.double(), view, ids, 4, weight, True, torch.float64)[1]
    assert typical(found - truth) < 2**-10 * typical(truth)


# ---- edges ---------------------------------------------------------------------------------------


def test_one_masked_patch_and_a_flat_one():
    view = torch.full((1, 8, 8, 3), 200, dtype=torch.uint8, device=DEVICE)
    ids, pred = (
        torch.tensor([[2]], device=DEVICE),
        torch.zeros(1, 1, 48, device=DEVICE, requires_grad=True),
    )
    value = loss(pred, view, ids, 4, L.detail_weight(detail(view, ids, 4), 0.1))
    value.backward()
    centred = normalised(
        view, ids, 4, torch.float64
    )  # a flat patch: only its colour, which norm_pix takes away
    expected = ((centred - centred.mean()) / (centred.var() + 0.15**2).sqrt()).square().mean()
    assert worst(value.detach(), expected) < 1e-6 and pred.grad.isfinite().all()


def test_an_empty_batch_has_loss_zero():
    view = torch.zeros(0, 8, 8, 3, dtype=torch.uint8, device=DEVICE)
    ids = torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    pred = torch.zeros(0, 3, 48, device=DEVICE, requires_grad=True)
    value = loss(pred, view, ids, 4)
    value.backward()
    assert value == 0 and pred.grad.shape == pred.shape
    assert gather(view, ids, 4).shape == (0, 3, 48) and detail(view, ids, 4).shape == (0, 3)


def test_what_is_not_contiguous_gives_the_same():
    view, keep, _ = case(8)
    ids = torch.stack([keep, keep.flip(1)], 2)[
        :, :, 0
    ]  # what ids.argsort(1)[:, :K] looks like: rows that lie apart
    wide = torch.zeros(3, 32, 32, 4, dtype=torch.uint8, device=DEVICE)
    wide[..., :3] = view
    pred = (
        torch.randn(192, *keep.shape, generator=torch.Generator().manual_seed(1))
        .to(DEVICE)
        .permute(1, 2, 0)
    )
    assert (
        not ids.is_contiguous() and not wide[..., :3].is_contiguous() and not pred.is_contiguous()
    )
    assert torch.equal(gather(wide[..., :3], ids, 8), gather(view, keep, 8))
    assert torch.equal(detail(wide[..., :3], ids, 8), detail(view, keep, 8))
    a, b = pred.detach().requires_grad_(), pred.contiguous().requires_grad_()
    first, second = loss(a, wide[..., :3], ids, 8), loss(b, view, keep, 8)
    assert torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(first, a)[0], torch.autograd.grad(second, b)[0])


@needs_kernel
def test_offsets_pass_two_to_the_31():
    """Before the ninth of these images lie 2.15e9 bytes, more than an int32 counts; pages nobody
    touches are free.
    """
    view = torch.empty(9, 9472, 9472, 3, dtype=torch.uint8, device=DEVICE)
    assert view[8].storage_offset() > 2**31
    last, block = (9472 // 16) ** 2 - 1, case(16)[0][1, :16, :16]
    view[:, -16:, -16:] = 0
    view[8, -16:, -16:] = block
    ids = torch.full((9, 1), last, device=DEVICE)
    expected = gather(block[None], torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 16)
    assert torch.equal(gather(view, ids, 16)[8], expected[0])
    d = detail(view, ids, 16)[:, 0]
    assert d[:8].max() == 0 and d[8] > 0


@needs_kernel
def test_every_number_is_written_and_none_beside(monkeypatch):
    """Outputs are cut from larger arrays of NaN: what a kernel leaves out stays NaN, what it writes
    beside does not.
    """
    arrays, real, guard = [], torch.empty, 512

    def poisoned(*shape, dtype=torch.float32, device=None):
        shape = real(*shape, device="meta").shape
        whole = torch.full((shape.numel() + 2 * guard,), float("nan"), dtype=dtype, device=device)
        arrays.append(whole)
        return whole[guard : guard + shape.numel()].view(shape)

    view, keep, ids = case(14)  # P = 588 in 1024 lanes: there is a tail to be careful with
    pred = torch.randn(*ids.shape, 588).to(DEVICE).requires_grad_()
    monkeypatch.setattr(torch, "empty", poisoned)
    outputs = [
        gather(view, keep, 14),
        gather(view, keep, 14, torch.bfloat16),
        detail(view, ids, 14),
    ]
    value, error = loss(pred, view, ids, 14, return_error=True)
    outputs += [value, error, *torch.autograd.grad(value * 3, pred)]
    monkeypatch.undo()
    assert len(arrays) == 5 and all(x.isfinite().all() for x in outputs)
    for whole in arrays:
        assert (
            whole[:guard].isnan().all()
            and whole[-guard:].isnan().all()
            and whole[guard:-guard].isfinite().all()
        )


def test_the_same_bits_every_time():
    view, _, ids = case(8, B=8)
    pred = torch.randn(*ids.shape, 192).to(DEVICE).requires_grad_()
    first, again = (loss(pred, view, ids, 8, detail(view, ids, 8)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.autograd.grad(first, pred)[0], torch.autograd.grad(again, pred)[0])


def test_autocast_changes_nothing():
    view, keep, ids = case(8)
    pred = torch.randn(*ids.shape, 192).to(DEVICE)
    plain = gather(view, keep, 8), detail(view, ids, 8), loss(pred, view, ids, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = gather(view, keep, 8), detail(view, ids, 8), loss(pred, view, ids, 8)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(view=torch.zeros(3, 16, 16, 3)), "uint8"),
        (dict(view=torch.zeros(3, 16, 20, 3, dtype=torch.uint8)), "uint8"),
        (dict(view=torch.zeros(3, 16, 16, 4, dtype=torch.uint8)), "uint8"),
        (dict(patch=5), "must divide"),
        (dict(ids=torch.zeros(2, 8, dtype=torch.int64)), "B = 3"),
        (dict(ids=torch.zeros(3, 8)), "int64"),
        (dict(ids=torch.full((3, 8), 16)), "ids from 16"),
        (dict(ids=torch.full((3, 8), -1)), "ids from -1"),
        (dict(pred=torch.zeros(3, 8, 47)), "pred"),
        (dict(weight=torch.ones(3, 7)), "weight"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    view, _, ids = case(4)
    if "ids from" in words and GPU:
        pytest.skip("a GPU's ids are not looked at: that would be a wait in every step")
    given = dict(view=view, ids=ids, patch=4, pred=torch.zeros(3, 8, 48), weight=None) | change
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=words):
        loss(given["pred"], given["view"], given["ids"], given["patch"], given["weight"])


# ---- what torch.compile sees, and who is chosen --------------------------------------------------


@needs_kernel
def test_opcheck():
    view, keep, ids = case(4)
    pred, weight = torch.randn(*ids.shape, 48).to(DEVICE), torch.rand(ids.shape).to(DEVICE)
    for y in (pred.clone().requires_grad_(), pred.bfloat16()):
        arguments = (y, view, ids, weight, 4, True, 0.15, y.requires_grad)
        torch.library.opcheck(L.loss_op, arguments)
    torch.library.opcheck(G.gather_op, (view, keep.flip(1), 4, torch.bfloat16))
    torch.library.opcheck(L.detail_op, (view, ids, 4))


def test_one_graph_under_compile():
    view, keep, ids = case(4)
    pred = (
        torch.randn(*ids.shape, 48, generator=torch.Generator().manual_seed(1))
        .to(DEVICE)
        .requires_grad_()
    )

    def step(y):
        weight = L.detail_weight(detail(view, ids, 4), 0.1)
        return loss(y, view, ids, 4, weight) * 3 + gather(view, keep, 4).mean()

    compiled = torch.compile(
        step, fullgraph=True, backend="aot_eager"
    )  # graphs as always, no compiler needed
    ours, theirs = step(pred), compiled(pred)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, pred), torch.autograd.grad(ours, pred))


def test_auto_takes_torch_where_there_is_no_gpu(monkeypatch):
    assert [kernels.choose_impl("auto", d)[0] for d in ("cpu", "mps")] == ["torch", "torch"]
    assert kernels.choose_impl("auto", "cpu")[1] == "the PyTorch reference serves cpu"
    with pytest.raises(ValueError, match="Triton does not run on mps"):
        kernels.choose_impl("triton", "mps")
    with pytest.raises(ValueError, match="numpy is unknown"):
        kernels.choose_impl("numpy", "cpu")
    monkeypatch.setattr(kernels, "IMPL", "torch")
    assert kernels.choose_impl("auto", "cuda") == ("torch", "as IMPL says")


@pytest.mark.skipif(kernels.INTERPRET, reason="the interpreter does run on a CPU")
def test_triton_without_a_gpu_is_an_error_and_not_a_fallback(monkeypatch):
    view, keep, _ = case(4)
    with pytest.raises(ValueError, match="Triton needs a GPU"):
        G.masked_patch_gather(view.cpu(), keep.cpu(), 4, impl="triton")
    monkeypatch.setattr(kernels, "IMPL", "triton")
    with pytest.raises(ValueError, match="Triton needs a GPU"):
        L.patch_detail(view.cpu(), keep.cpu(), 4)
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="not installed"):
        kernels.choose_impl("triton", "cuda")


def test_predicted_statistics_learn_the_true_ones():
    view, ids_keep, ids = case(8)
    x = normalised(view, ids, 8, torch.float64)
    _, truth = L.targets(view, ids, 8)
    assert worst(truth[..., 0], x.mean(2)) < 1e-5
    assert worst(truth[..., 1].exp(), (x.var(2) + 0.15**2).sqrt()) < 1e-5
    stats = truth - L.visible_stats(view, ids_keep, ids, 8)
    assert L.stats_loss(stats, view, ids_keep, ids, 8) < 1e-9
    assert (
        L.stats_loss(stats + torch.tensor([0.0, 1.0], device=stats.device), view, ids_keep, ids, 8)
        > 0.4
    )


def test_visible_patches_suggest_the_statistics_of_hidden_ones():
    """A picture whose light rises from left to right: a hidden patch is guessed from its
    neighbours, not from all.
    """
    rise = torch.linspace(0, 255, 64).to(torch.uint8).expand(3, 64, 64).permute(1, 2, 0)
    view = rise[None].contiguous()
    every = torch.arange(64)[None]
    hidden = (every // 8 + every % 8) % 2 == 1  # a chessboard
    ids_keep, ids_mask = every[~hidden][None], every[hidden][None]
    guess = L.visible_stats(view, ids_keep, ids_mask, 8)
    _, truth = L.targets(view, ids_mask, 8)
    assert (guess - truth)[..., 0].abs().mean() < 0.15 * truth[..., 0].std()

    def loss(stats):
        return L.stats_loss(stats, view, ids_keep, ids_mask, 8)

    assert loss(torch.zeros_like(guess)) < 0.1 * loss(-guess)
    changed = view.clone()
    changed[0, :8, 8:16] = 0  # what is hidden is not looked at
    assert torch.equal(L.visible_stats(changed, ids_keep, ids_mask, 8), guess)
