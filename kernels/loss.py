"""The weighted reconstruction loss: masked patches only, and flat colour weighs less.

For a masked patch with pixels x and prediction y, both of P numbers (x normalised by ImageNet's
mean and standard deviation):

    target  t = (x - mean(x)) / sqrt(var(x) + s0^2)           norm_pix; t = x without it
    error   e = mean over P of (y - t)^2
    detail  d = sqrt(mean of (x01 - its channel's mean)^2)    x01 in [0, 1]; 0 for a flat red patch
    weight  w = w_flat + (1 - w_flat) * (1 - exp(-d / tau))   1 on rich patches, w_flat on flat ones
    loss    L = sum(w e) / sum(w)
    gradient    dL/dy = 2 w (y - t) / (P sum(w))

The floor s0 is ours: anime patches are often perfectly flat, and without a floor norm_pix would
blow up the last bit of a JPEG to a target of unit variance. s0 = 1e-3 is the original (He et al.
2021, section 4.2).

`loss_reference` is PyTorch with autograd, and the place to try another loss. `loss_kernel` writes
the loss and the gradient in one pass over y. Bytes of the kernel, for n = B*M patches: x is read as
P bytes, y is read and dL/dy is written in y's dtype, e and w are 4 bytes a patch. n*P*(1 + 2*size)
is 1.16 GB for B 2048, M 147, P 768 in bf16. The gradient is known as soon as y - t is, if sum(w) is
known before. So w, which needs no y, is a small pass of its own over bytes. Its sum may come from
outside (`weight_sum`): then splitting a batch changes nothing.
"""

import torch
from torch import Tensor

from kernels import choose_impl, jit, launch, tl
from kernels.gather import (
    byte_scale,
    check_patches,
    gather_reference,
    load_bytes,
    normalise,
    patch_bytes,
    tile_of,
)

FLOOR = 0.15  # s0, in units of the normalised pixels: about .03 of the range of the raw ones
TAU = 0.05  # detail at which the weight has risen by 63 %: a soft shadow edge
LEAST = 1e-30  # stands for sum(w) where there is nothing to sum: the loss of an empty batch is 0


# ---- the references ------------------------------------------------------------------------------


def detail_reference(view, ids, patch):
    """d (B, M) in whole numbers, so that it is 0 and not nearly 0 on flat patches.

    With n pixels, and S_c and Q_c a channel's sum and sum of squares:
    d^2 = mean_c (Q_c/n - (S_c/n)^2) / 255^2 = (n sum_c Q_c - sum_c S_c^2) / (255^2 n^2 C)
    """
    C, n = view.shape[3], patch * patch
    x = patch_bytes(view, ids, patch).int()
    # over a patch's rows first: that is vectorised
    rows = x.unflatten(2, (patch, patch * C)).sum(2, dtype=torch.int32)
    S = rows.unflatten(2, (patch, C)).sum(2)  # int64 (B, M, C)
    wide = torch.int64 if needs_64_bits(patch, C) else torch.int32
    Q = x.mul_(x).sum(2, dtype=wide).long()  # (B, M)
    return (n * Q - S.mul_(S).sum(2)).float().sqrt().div_(255 * n * C**0.5)


def needs_64_bits(patch, C):
    """Does the sum of a patch's squared bytes overflow 32 bits? In three colours it does from 105
    px on.
    """
    return patch * patch * C * 255**2 >= 2**31


def normalise_patches_(x, floor):
    """x (B, M, P) -> (x - mean) / std in place, and (mean, std), (B, M, 1) each; unbiased variance
    as in MAE.

    torch.var_mean is one pass, but not a vectorised one on a CPU: these three take a thirtieth of
    its time.
    """
    mean = x.mean(2, keepdim=True)
    squares = torch.linalg.vector_norm(x.sub_(mean), dim=2, keepdim=True).square_()
    std = (squares / (x.shape[2] - 1) + floor**2).sqrt_()
    return x.div_(std), (mean, std)


def targets(view, ids, patch, norm_pix, floor=FLOOR):
    """-> what the network has to predict, t (B, M, P) fp32, and the patches' (mean, std) if
    norm_pix.
    """
    x = gather_reference(view, ids, patch)
    return normalise_patches_(x, floor) if norm_pix else (x, None)


def squared_error(pred, target):
    """e (B, M): the mean squared error of each patch, from pred and target (B, M, P)."""
    return (pred - target).square().mean(2)


def absolute_error(pred, target):
    """e (B, M): the mean absolute error of each patch, which SimMIM trains with."""
    return (pred - target).abs().mean(2)


def loss_reference(pred, target, weight, weight_sum, error_of=None):
    """-> L = sum(w e) / sum(w), a scalar, and e (B, M). Autograd finds the gradient.

    This is the place to try another loss: what you write in these lines, or in `squared_error`,
    trains on a CPU, on a Mac, and on a GPU with --impl torch. `loss_kernel` below is the same
    mathematics with a gradient of its own; a test compares the two.
    """
    error = (error_of or squared_error)(pred, target)
    loss = (weight * error).sum() / weight_sum
    return loss, error


# ---- the kernels ---------------------------------------------------------------------------------


@jit
def detail_kernel(
    view,
    ids,
    detail,
    count,
    M,
    unit,
    S: tl.constexpr,
    p: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    PATCHES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, j, inside = tile_of(count, p * p * C, PATCHES, WIDTH)
    x = load_bytes(view, ids, count, M, n, j, inside, S, p, C).to(tl.int32)
    squares = x * x
    if WIDE:
        squares = squares.to(tl.int64)
    spread = tl.sum(squares, 1).to(tl.int64) * (p * p)  # n sum_c Q_c, (PATCHES,)
    for c in tl.static_range(C):
        total = tl.sum(tl.where((j % C == c)[None, :], x, 0), 1).to(tl.int64)  # S_c
        spread -= total * total
    tl.store(
        detail + n, tl.sqrt_rn(spread.to(tl.float32)) * unit, mask=n < count
    )  # unit = 1 / (255 n sqrt(C))


@jit
def loss_kernel(
    pred,
    view,
    ids,
    weight,
    factor,
    error,
    gradient,
    count,
    M,
    floor,
    S: tl.constexpr,
    p: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    NORM_PIX: tl.constexpr,
    GRADIENT: tl.constexpr,
    PATCHES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    P: tl.constexpr = p * p * C
    n, j, inside = tile_of(count, P, PATCHES, WIDTH)
    t = normalise(load_bytes(view, ids, count, M, n, j, inside, S, p, C), j, SCALE, SHIFT, C)
    if NORM_PIX:  # t = (x - mean) / sqrt(var + s0^2), all of it in registers
        mean = tl.sum(tl.where(inside, t, 0.0), 1) / P
        t = tl.where(inside, t - mean[:, None], 0.0)
        var = tl.sum(t * t, 1) / (P - 1)
        t = t / tl.sqrt_rn(var + floor * floor)[:, None]
    at = (
        n.to(tl.int64)[:, None] * P + j[None, :]
    )  # int64: 2.8 million patches of 16 px are 2^31 numbers
    diff = tl.where(
        inside, tl.load(pred + at, mask=inside, other=0.0).to(tl.float32) - t, 0.0
    )  # y - t
    tl.store(error + n, tl.sum(diff * diff, 1) / P, mask=n < count)  # e
    # dL/dy = w (y - t) * 2 / (P sum(w)); that factor alone would be 0 in fp16, so fp32 to the end
    if GRADIENT:
        w = tl.load(weight + n, mask=n < count, other=0.0) * tl.load(factor)
        tl.store(gradient + at, (w[:, None] * diff).to(gradient.dtype.element_ty), mask=inside)


def loss_triton(pred, view, ids, weight, factor, patch, norm_pix, floor, need_gradient):
    """-> e (B, M), and dL/dy (B, M, P) = factor * w * (y - t), factor = 2 / (P sum(w))."""
    pred, view, ids = pred.contiguous(), view.contiguous(), ids.contiguous()
    S, C = view.shape[2:]
    scale, shift = byte_scale(C)
    error = torch.empty(ids.shape, dtype=torch.float32, device=pred.device)
    gradient = torch.empty(pred.shape if need_gradient else 0, dtype=pred.dtype, device=pred.device)
    launch(
        loss_kernel,
        ids.numel(),
        pred.shape[2],
        pred,
        view,
        ids,
        weight,
        factor,
        error,
        gradient,
        ids.numel(),
        ids.shape[1],
        floor,
        S=S,
        p=patch,
        C=C,
        SCALE=scale,
        SHIFT=shift,
        NORM_PIX=norm_pix,
        GRADIENT=need_gradient,
    )
    return error, gradient


# ---- the operators, and the gradient -------------------------------------------------------------


@torch.library.custom_op("animask::patch_detail", mutates_args=())
def detail_op(view: Tensor, ids: Tensor, patch: int) -> Tensor:
    view, ids = view.contiguous(), ids.contiguous()
    S, C = view.shape[2:]
    detail = torch.empty(ids.shape, dtype=torch.float32, device=view.device)
    unit = 1 / (255 * patch * patch * C**0.5)
    launch(
        detail_kernel,
        ids.numel(),
        patch * patch * C,
        view,
        ids,
        detail,
        ids.numel(),
        ids.shape[1],
        unit,
        S=S,
        p=patch,
        C=C,
        WIDE=needs_64_bits(patch, C),
    )
    return detail


@detail_op.register_fake
def _(view, ids, patch):
    return view.new_empty(ids.shape, dtype=torch.float32)


@torch.library.custom_op("animask::reconstruction_loss", mutates_args=())
def loss_op(
    pred: Tensor,
    view: Tensor,
    ids: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    patch: int,
    norm_pix: bool,
    floor: float,
    scale: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    factor = 2 * scale / (pred.shape[2] * weight_sum)
    error, gradient = loss_triton(
        pred, view, ids, weight, factor, patch, norm_pix, floor, need_gradient
    )
    return (weight * error).sum() * (scale / weight_sum), gradient, error


@loss_op.register_fake
def _(pred, view, ids, weight, weight_sum, patch, norm_pix, floor, scale, need_gradient):
    gradient = pred.new_empty(pred.shape if need_gradient else 0)
    return weight.new_empty(()), gradient, weight.new_empty(ids.shape)


def remember_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    # or autograd fills zeros, as large as the gradient, for the other outputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def backward(ctx, by, *_):
    """The gradient that the forward pass left, times the gradient of the loss (`by`, a scalar)."""
    if torch.is_grad_enabled():
        raise NotImplementedError("the Triton loss gives no second derivative (create_graph=True)")
    (gradient,) = ctx.saved_tensors
    return None if by is None else gradient * by, *[None] * 9


loss_op.register_autograd(backward, setup_context=remember_gradient)


# ---- the dispatchers -----------------------------------------------------------------------------


def patch_detail(view, ids, patch, impl="auto"):
    """view u8 (B, S, S, C), ids (B, M) -> detail (B, M) in [0, 1]: root mean square around each
    channel's own mean.
    """
    check_patches(view, ids, patch)
    chosen, _ = choose_impl(impl, view.device)
    return (detail_op if chosen == "triton" else detail_reference)(view, ids, patch)


def detail_weight(detail, flat_weight, tau=TAU):
    """detail (any shape) -> weight of the same shape, flat_weight where detail is 0, towards 1
    above tau.
    """
    return flat_weight + (1 - flat_weight) * (1 - torch.exp(-detail / tau))


def check_loss(pred, view, ids, patch, weight, weight_sum):
    """The arguments of a loss, checked and completed -> weight (B, M) and its sum, both fp32."""
    check_patches(view, ids, patch)
    shape = (*ids.shape, patch * patch * view.shape[3])
    if pred.shape != shape or not pred.is_floating_point():
        raise ValueError(f"pred must be (B, M, P) = {shape}, not {tuple(pred.shape)} {pred.dtype}")
    exact = torch.promote_types(pred.dtype, torch.float32)
    weight = torch.ones(ids.shape, device=pred.device) if weight is None else weight.detach()
    if weight.shape != ids.shape:
        raise ValueError(f"weight must be (B, M) = {tuple(ids.shape)}, not {tuple(weight.shape)}")
    weight = weight.to(exact).contiguous()
    if weight_sum is None:
        weight_sum = weight.sum()
    weight_sum = torch.as_tensor(weight_sum, device=pred.device).detach().to(exact)
    return weight, weight_sum.clamp(min=LEAST)


def reconstruction_loss(
    pred,
    view,
    ids_mask,
    patch,
    weight=None,
    norm_pix=True,
    weight_sum=None,
    impl="auto",
    floor=FLOOR,
    scale=1.0,
    error_of=None,
    return_error=False,
):
    """pred (B, M, P), view u8 (B, S, S, C), ids_mask (B, M) -> scalar sum(w e) / sum(w),
    differentiable in pred.

    weight        (B, M), a plain tensor, 1 if None: another weighting is three lines in your script
    weight_sum    sum over the whole global batch where pred is only a part of it; None sums this
                  part's weights
    scale         on loss and gradient before the gradient is rounded to pred's dtype: fp16 needs its
                  loss scale here
    error_of      a function of pred and target; None is `squared_error`, the one that the kernel
                  knows, every other one runs the reference
    return_error  -> (loss, errors (B, M)); the errors give no gradient
    """
    weight, weight_sum = check_loss(pred, view, ids_mask, patch, weight, weight_sum)
    chosen, _ = choose_impl(impl, pred.device)
    if chosen == "triton" and error_of is None:
        if pred.dtype == torch.float64:
            raise ValueError("pred must be fp32, bf16 or fp16 for the Triton loss, not float64")
        need = torch.is_grad_enabled() and pred.requires_grad
        loss, _, error = loss_op(
            pred, view, ids_mask, weight, weight_sum, patch, norm_pix, floor, scale, need
        )
    else:
        with torch.no_grad():
            target, _ = targets(view, ids_mask, patch, norm_pix, floor)
        exact = pred.to(weight.dtype)  # fp32 where pred is bf16 or fp16
        loss, error = loss_reference(exact, target.to(exact.dtype), weight, weight_sum, error_of)
        loss = loss * scale
    return (loss, error.detach()) if return_error else loss


@torch.no_grad()
def patch_error(pred, view, ids, patch, norm_pix=True, impl="auto", floor=FLOOR):
    """Mean squared error of each masked patch, (B, M) fp32. Gives no gradient."""
    _, error = reconstruction_loss(
        pred, view, ids, patch, norm_pix=norm_pix, impl=impl, floor=floor, return_error=True
    )
    return error


def visible_stats(view, ids_keep, ids_mask, patch, floor=FLOOR):
    """What the visible patches suggest for each hidden one: their mean and log std, (B, M, 2), near
    ones first.

    Weights are distance^-3 between places. It needs no network and sees nothing hidden: what a head
    has to predict is only the rest. Without it pictures were worse than the mean visible colour
    (results/LOG.md, "pictures").
    """
    side = view.shape[2] // patch
    with torch.no_grad():
        _, (mean, std) = targets(view, ids_keep, patch, True, floor)
        hidden, seen = (
            torch.stack([ids // side, ids % side], 2).float() for ids in (ids_mask, ids_keep)
        )
        weight = torch.cdist(hidden, seen).pow(-3)  # (B, M, K); no place is both
        return weight @ torch.cat([mean, std.log()], 2) / weight.sum(2, keepdim=True)


def stats_loss(stats, view, ids_keep, ids_mask, patch, floor=FLOOR):
    """How far stats (B, M, 2) + visible_stats are from the true (mean, log std) of each masked
    patch; scalar.

    Trains the small head that lets pictures be drawn without looking at the answer.
    """
    with torch.no_grad():
        _, (mean, std) = targets(view, ids_mask, patch, True, floor)
        truth = torch.cat([mean, std.log()], 2)
    return (
        (stats.float() + visible_stats(view, ids_keep, ids_mask, patch, floor) - truth)
        .square()
        .mean()
    )
