"""The two kernels against float64, and what surrounds them.

This file runs three times: here with the PyTorch references; under Triton's interpreter
(test_kernels_triton.py starts it); and, where there is a GPU, here with the compiled kernels. The
judge is written from the formulas, patch by patch, and shares no line with the files under test.
"""

from functools import partial

import pytest
import torch

from kernels import patches as K

GPU = torch.cuda.is_available() and not K.INTERPRET
DEVICE, IMPL = ("cuda" if GPU else "cpu"), ("triton" if GPU or K.INTERPRET else "torch")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter takes its time: of each kernel a power of two and a size with a tail, by default.
SELDOM = [pytest.mark.slow] * K.INTERPRET
SIDES = [4, 14, *(pytest.param(p, marks=SELDOM) for p in (5, 8, 16, 32))]
SHAPES = [(4, 0.75), (14, 0.75)]  # p, ratio
SHAPES += [pytest.param(*x, marks=SELDOM) for x in ((6, 0.75), (8, 0.5), (16, 0.9), (32, 0.75))]
WAYS = [(True, True), pytest.param(True, False, marks=SELDOM)]  # norm_pix, weighted
WAYS += [(False, False), pytest.param(False, True, marks=SELDOM)]
MEANT = "if you changed squared_error on purpose, change error_kernel and gradient_kernel, too"
needs_kernel = pytest.mark.skipif(IMPL == "torch", reason="about a Triton kernel")
needs_reference = pytest.mark.skipif(IMPL == "triton", reason="about the reference")


def case(p, B=3, side=4, ratio=0.5):
    """-> view u8 (B, S, S, 3) with a flat, a coloured-flat and a saturated patch, ids_keep, ids_mask."""
    random = torch.Generator().manual_seed(0)
    view = torch.randint(0, 256, (B, side * p, side * p, 3), dtype=torch.uint8, generator=random)
    view[0, :p, :p] = 255
    view[0, :p, p : 2 * p] = torch.tensor([251, 3, 77], dtype=torch.uint8)
    view[0, -p:, -p:] = (torch.rand(p, p, 3, generator=random) < 0.5) * 255
    order = torch.rand(B, side * side, generator=random).argsort(1)
    K = int(side * side * (1 - ratio))
    return [x.contiguous().to(DEVICE) for x in (view, order[:, :K], order[:, K:])]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def rand(*shape, dtype=torch.float32):
    """In [0, 1), the same in every run: a bound on rounding must not depend on luck."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2), dtype=dtype).to(DEVICE)


def patches(view, ids, p):
    """Raw patches (B, K, p*p, 3) one by one: the slow, sure way."""
    g = view.shape[1] // p
    found = []
    for image, own in zip(view, ids.tolist(), strict=True):
        corners = [(i // g * p, i % g * p) for i in own]
        found.append(torch.stack([image[y : y + p, x : x + p] for y, x in corners]))
    return torch.stack(found).flatten(2, 3)


def normalised(view, ids, p, dtype):
    """(x/255 - mean) / std in dtype, (B, K, P)."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=dtype, device=DEVICE)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=dtype, device=DEVICE)
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
    return (x.cpu().double() - torch.as_tensor(truth).cpu()).abs().max().item()


def typical(x):
    """Root mean square: the largest of a few rounding errors is luck, their typical size is not."""
    return x.double().square().mean().sqrt().item()


def assert_as_good(x, plain, truth, what):
    """The typical error is at most twice that of the same formula in torch (`plain`), or two units.

    And each number lies within one rounding to its dtype, with 20 of plain's typical errors for
    the fp32 arithmetic before it: where the mean of a white patch is one unit off, its target moves
    by five. A lone number has no typical error and gets 3 units in the last place. The interpreter
    cuts bf16 off instead of rounding, so there only the second bound counts.
    """
    mine, theirs = x.double() - truth, typical(plain.double() - truth)
    alone = 3 * 2**-23 * truth.abs().max().item() if x.ndim == 0 else 0.0
    units = 2 * 2**-23 * typical(truth)
    if not (K.INTERPRET and x.dtype == torch.bfloat16):
        assert typical(mine) <= max(2 * theirs, alone, units), what
    info = torch.finfo(x.dtype)
    one_rounding = (info.eps * truth.abs()).clamp(min=info.tiny * info.eps)  # fp16's subnormal ones
    before = 20 * theirs if x.dtype == torch.float32 else 1e-6 * typical(truth)
    assert (mine.abs() <= one_rounding + max(before, alone)).all(), what


gather = partial(K.masked_patch_gather, impl=IMPL)
detail = partial(K.patch_detail, impl=IMPL)
error_of_patches = partial(K.reconstruction_error, impl=IMPL)


def loss(pred, view, ids, p, weight=None, **options):
    error, _ = error_of_patches(pred, view, ids, p, **options)
    return K.weighted_mean(error, torch.ones_like(error) if weight is None else weight)


def stats_by_formula(view, ids, p, dtype, floor=0.15):
    """Mean and log std, (B, K, 2)."""
    x = normalised(view, ids, p, dtype)
    return torch.stack([x.mean(2), (x.var(2) + floor**2).sqrt().log()], 2)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", SIDES)
def test_gather_against_float64(p, dtype):
    view, keep, _ = case(p)
    truth, out = normalised(view, keep, p, torch.float64), gather(view, keep, p, dtype)
    assert out.dtype == dtype and out.shape == truth.shape and out.is_contiguous()
    assert_as_good(out, normalised(view, keep, p, torch.float32).to(dtype), truth, "gather")
    again, stats = gather(view, keep, p, dtype, return_stats=True, floor=0.3)
    assert torch.equal(again, out) and stats.dtype == torch.float32
    assert worst(stats, stats_by_formula(view, keep, p, torch.float64, 0.3)) < 3e-6


@pytest.mark.parametrize("p", SIDES)
def test_detail_against_float64(p):
    """Whole numbers up to one square root: nothing cancels."""
    view, _, ids = case(p, ratio=0.9)
    x = patches(view, ids, p).double() / 255
    truth = (x - x.mean(2, keepdim=True)).square().mean((2, 3)).sqrt()
    assert worst(detail(view, ids, p), truth) <= 2**-23


def test_the_squares_of_the_largest_patch_fit_in_32_bits():
    assert K.LARGEST**2 * 3 * 255**2 < 2**31 <= (K.LARGEST + 1) ** 2 * 3 * 255**2
    view = torch.full((1, 104, 104, 3), 255, dtype=torch.uint8, device=DEVICE)
    view[0, ::2] = 200
    found = detail(view, torch.zeros(1, 1, dtype=torch.long, device=DEVICE), 104)
    assert worst(found, torch.full((1, 1), 55 / 2 / 255, dtype=torch.float64)) < 1e-6


def test_flat_patches_have_no_detail_at_all():
    """White, and one colour: exactly 0, so their weight is the flat weight."""
    view, _, _ = case(14)
    d = detail(view, torch.tensor([[0, 1, 15], [5, 6, 7], [8, 9, 10]], device=DEVICE), 14)
    assert d[0, 0] == 0 and d[0, 1] == 0 and 0.45 < d[0, 2] <= 0.5  # black and white noise
    weight = K.detail_weight(d, 0.1)
    assert worst(weight[0, :2], 0.1) < 1e-7


def test_the_weight_of_a_patch_rises_by_63_percent_at_tau():
    """1 - exp(-detail / TAU), from the flat weight on: a change of detail_weight changes this test, too."""
    d = torch.linspace(0, 0.5, 9, device=DEVICE)[None]
    expected = 0.1 + 0.9 * (1 - (-d / 0.05).exp())
    assert worst(K.detail_weight(d, 0.1), expected) < 1e-7


@pytest.mark.parametrize("norm_pix, weighted", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p, ratio", SHAPES)
def test_loss_and_gradient_against_float64(p, ratio, dtype, norm_pix, weighted):
    view, _, ids = case(p, ratio=ratio)
    pred = randn(*ids.shape, p * p * 3, dtype=dtype)
    weight = rand(*ids.shape) if weighted else torch.ones(ids.shape, device=DEVICE)
    y = pred.clone().requires_grad_()
    error, stats = error_of_patches(y, view, ids, p, norm_pix)
    value = K.weighted_mean(error, weight)
    value.backward()
    plain = loss_by_formula(pred, view, ids, p, weight, norm_pix, torch.float32)
    truth = loss_by_formula(pred.double(), view, ids, p, weight, norm_pix, torch.float64)
    mine = value.detach(), y.grad, error.detach()
    assert y.grad.dtype == dtype and value.dtype == error.dtype == torch.float32
    for what, *numbers in zip(("loss", "gradient", "error"), mine, plain, truth, strict=True):
        assert_as_good(*numbers, f"{what}: {MEANT}")
    torch.testing.assert_close(K.patch_error(pred, view, ids, p, norm_pix), error.detach())
    assert worst(stats, stats_by_formula(view, ids, p, torch.float64)) < 3e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_made_of_the_loss_reaches_the_gradient(dtype):
    """A backward pass that ignored its factor would break GradScaler and sums of losses."""
    view, _, ids = case(4)
    pred = randn(*ids.shape, 48, dtype=dtype).requires_grad_()
    value = loss(pred, view, ids, 4)
    (one,) = torch.autograd.grad(value, pred, retain_graph=True)
    assert one.abs().max() > 0
    for factor in (4, -0.5):
        (many,) = torch.autograd.grad(value * factor + 7, pred, retain_graph=True)
        torch.testing.assert_close(many, one * factor)


@needs_kernel
def test_the_kernel_refuses_a_second_derivative():
    """If you changed the reference's error, change error_kernel and gradient_kernel, too."""
    view, _, ids = case(4)
    pred = randn(*ids.shape, 48).requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss(pred, view, ids, 4), pred, create_graph=True)


@needs_reference
def test_simmims_absolute_error_trains():
    """The slope is the sign of the error."""
    view, _, ids = case(4)
    weight = rand(*ids.shape, dtype=torch.float64) + 0.1
    pred = randn(*ids.shape, 48, dtype=torch.float64).requires_grad_()
    with pytest.raises(ValueError, match="error_of has to return a number for each patch"):
        loss(pred, view, ids, 4, weight, error_of=lambda y, t: (y - t).abs())
    value = loss(pred, view, ids, 4, weight, error_of=K.absolute_error)
    (found,) = torch.autograd.grad(value, pred)
    slope = (pred.detach() - K.targets(view, ids, 4)[0].double()).sign()
    torch.testing.assert_close(found, weight[..., None] * slope / (48 * weight.sum()))


def test_the_gradient_is_fp32_until_it_is_rounded():
    """In fp16 the factor 2 / (P sum(w)) alone would be 0."""
    view, _, ids = case(4)
    pred = (2**10 * randn(*ids.shape, 48)).to(torch.float16).requires_grad_()
    weight = torch.full(ids.shape, 1e5, device=DEVICE)
    (found,) = torch.autograd.grad(loss(pred, view, ids, 4, weight), pred)
    truth = loss_by_formula(pred.double(), view, ids, 4, weight, True, torch.float64)[1]
    assert typical(found - truth) < 2**-10 * typical(truth), MEANT


def test_predicted_statistics_learn_the_true_ones():
    """They are added to a guess: the mean over visible patches, weighted by distance^-3."""
    view, keep, ids = case(8)
    seen, hidden = (stats_by_formula(view, some, 8, torch.float64) for some in (keep, ids))
    at = [torch.stack([some // 4, some % 4], 2).double() for some in (ids, keep)]
    weight = (at[0][:, :, None] - at[1][:, None]).square().sum(3) ** -1.5  # (B, M, K)
    guess = weight @ seen / weight.sum(2, keepdim=True)
    _, stats = gather(view, keep, 8, return_stats=True)
    zero = torch.zeros(*ids.shape, 2, device=DEVICE)
    assert worst(K.predicted_stats(zero, stats, keep, ids, 4), guess) < 1e-5
    off = torch.tensor([0.0, 0.6], device=DEVICE)
    found = K.predicted_stats((hidden - guess).float() + off, stats, keep, ids, 4)
    _, true = error_of_patches(torch.zeros(*ids.shape, 192, device=DEVICE), view, ids, 8)
    assert K.stats_loss(found, true).item() == pytest.approx(0.18, abs=1e-4)  # mean of 0 and 0.6^2


# ---- edges ---------------------------------------------------------------------------------------


def test_what_is_not_contiguous_gives_the_same():
    """ids.argsort(1)[:, :K] has rows that lie apart."""
    view, keep, _ = case(8)
    ids = torch.stack([keep, keep.flip(1)], 2)[:, :, 0]
    wide = torch.zeros(3, 32, 32, 4, dtype=torch.uint8, device=DEVICE)
    wide[..., :3] = view
    pred, apart = randn(192, *keep.shape).permute(1, 2, 0), wide[..., :3]
    assert not any(x.is_contiguous() for x in (ids, apart, pred))
    assert torch.equal(gather(apart, ids, 8), gather(view, keep, 8))
    assert torch.equal(detail(apart, ids, 8), detail(view, keep, 8))
    a, b = pred.detach().requires_grad_(), pred.contiguous().requires_grad_()
    first, second = loss(a, apart, ids, 8), loss(b, view, keep, 8)
    assert torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(first, a)[0], torch.autograd.grad(second, b)[0])


@pytest.mark.parametrize("B, M", [(0, 4), (2, 0)])
def test_what_is_empty_has_no_loss(B, M):
    view = torch.zeros(B, 32, 32, 3, dtype=torch.uint8, device=DEVICE)
    ids = torch.zeros(B, M, dtype=torch.int64, device=DEVICE)
    pred = randn(B, M, 192).requires_grad_()
    loss(pred, view, ids, 8).backward()
    patches, stats = gather(view, ids, 8, return_stats=True)
    assert pred.grad.shape == patches.shape == (B, M, 192) and stats.shape == (B, M, 2)
    assert detail(view, ids, 8).shape == (B, M) and loss(pred, view, ids, 8) == 0


@needs_kernel
def test_offsets_pass_two_to_the_31():
    """2.15e9 bytes lie before the ninth image: too many for an int32. Untouched pages are free."""
    view = torch.empty(9, 9472, 9472, 3, dtype=torch.uint8, device=DEVICE)
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
    """Outputs are cut from larger arrays of NaN. P = 588 in 1024 lanes: there is a tail."""
    real, guard = torch.empty, 512
    arrays = []

    def poisoned(*shape, dtype=torch.float32, device=None):
        shape = real(*shape, device="meta").shape
        whole = torch.full((shape.numel() + 2 * guard,), float("nan"), dtype=dtype, device=device)
        arrays.append(whole)
        return whole[guard : guard + shape.numel()].view(shape)

    view, keep, ids = case(14)
    pred = randn(*ids.shape, 588).requires_grad_()
    monkeypatch.setattr(torch, "empty", poisoned)
    found = [gather(view, keep, 14), gather(view, keep, 14, torch.bfloat16), detail(view, ids, 14)]
    found += error_of_patches(pred, view, ids, 14)
    found += torch.autograd.grad(3 * found[-2].sum(), pred)
    monkeypatch.undo()
    assert len(arrays) == 11 and all(x.isfinite().all() for x in found)
    for whole in arrays:
        assert whole[:guard].isnan().all() and whole[-guard:].isnan().all()
        assert whole[guard:-guard].isfinite().all()


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(view=torch.zeros(3, 16, 20, 3, dtype=torch.uint8)), "uint8"),
        (dict(patch=5), "divide"),
        (dict(ids=torch.zeros(2, 8, dtype=torch.int64)), "B = 3"),
        (dict(ids=torch.full((3, 8), 16)), "16 patches"),
        (dict(ids=torch.full((3, 8), -1)), "16 patches"),
        (dict(pred=torch.zeros(3, 8, 47)), "pred"),
        (dict(weight=torch.ones(3, 1)), "weight"),
    ],
)
def test_what_does_not_fit_is_refused(change, word):
    if word == "16 patches" and GPU:
        pytest.skip("a GPU's ids are not checked: that would be a wait in every step")
    view, _, ids = case(4)
    given = dict(pred=torch.zeros(3, 8, 48), view=view, ids=ids, patch=4, weight=None) | change
    on = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given.values()]
    with pytest.raises(ValueError, match=word):
        loss(*on)


@pytest.mark.slow
@needs_kernel
def test_opcheck():
    view, keep, ids = case(4)
    pred, slope = randn(*ids.shape, 48), rand(*ids.shape)
    from kernels import fused

    _, mean, std = fused.gather_op(view, ids, 4, torch.float32, 0.15)
    for y in (pred.clone().requires_grad_(), pred.bfloat16(), pred.double()):
        torch.library.opcheck(fused.error_op, (y, view, ids, 4, True, 0.15))
        torch.library.opcheck(fused.gradient_op, (slope, y.detach(), view, ids, mean, std, 4, True))
    torch.library.opcheck(fused.gather_op, (view, keep.flip(1), 4, torch.bfloat16, 0.15))
    torch.library.opcheck(fused.detail_op, (view, ids, 4))


def test_triton_is_chosen_where_a_kernel_runs_and_never_replaced_silently(monkeypatch):
    view, keep, _ = case(4)
    assert [K.choose_impl("auto", d) for d in ("cpu", "mps")] == ["torch", "torch"]
    assert K.choose_impl("auto", "cuda") == ("triton" if GPU else "torch")
    asked = [("cpu", "needs a GPU"), ("mps", "mps"), ("cuda", "fails here")]
    for device, word in asked[: 2 if GPU else 3]:
        if K.INTERPRET and device == "cpu":
            continue
        with pytest.raises(ValueError, match=word if K.TRITON else "not installed"):
            K.choose_impl("triton", device)
    if not K.INTERPRET:
        with pytest.raises(ValueError, match="choose torch"):
            K.masked_patch_gather(view.cpu(), keep.cpu(), 4, impl="triton")
    monkeypatch.setattr(K, "IMPL", "torch")
    assert K.choose_impl("auto", "cuda") == "torch"
