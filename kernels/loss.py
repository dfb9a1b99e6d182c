"""The weighted reconstruction loss: masked patches only, flat colour counts less; loss and gradient in one pass.

For a masked patch with pixels x and prediction y, both of P numbers (x normalised by ImageNet's
mean and std):

    target  t = (x - mean(x)) / sqrt(var(x) + s0^2)      norm_pix; t = x without it
    error   e = mean over P of (y - t)^2
    detail  d = sqrt(mean of (x01 - its channel's mean)^2)         x01 in [0, 1]; a flat red patch
            has detail 0
    weight  w = w_flat + (1 - w_flat) * (1 - exp(-d / tau))        1 on rich patches, w_flat on
            perfectly flat ones
    loss    L = sum(w e) / sum(w)                                  gradient  dL/dy = 2 w (y - t) /
            (P sum(w))

The floor s0 is ours: anime patches are often perfectly flat, and without a floor norm_pix would
blow up the last bit of a JPEG to a target of unit variance. s0 = 1e-3 is the original (He et al.
2021, section 4.2).

Bytes, for n = B*M patches: x is read as P bytes, y read and dL/dy written in y's dtype, e and w are
4 bytes a patch. n*P*(1 + 2*size) is 1.16 GB for B 2048, M 147, P 768 in bf16. Autograd would keep t
and y - t in memory and come back for them; but dL/dy is known as soon as y - t is, if sum(w) is
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
    """d in whole numbers, so that it is 0 and not nearly 0 on flat patches; n pixels, S_c and Q_c a
    channel's sum
    and sum of squares:   d^2 = mean_c (Q_c/n - (S_c/n)^2) / 255^2 = (n sum_c Q_c - sum_c S_c^2) /
                          (255^2 n^2 C)
    """
    C, n = view.shape[3], patch * patch
    x = patch_bytes(view, ids, patch).int()
    rows = x.unflatten(2, (patch, patch * C)).sum(
        2, dtype=torch.int32
    )  # over a patch's rows first: vectorised
    S = rows.unflatten(2, (patch, C)).sum(2)  # int64 (B, M, C)
    Q = (
        x.mul_(x).sum(2, dtype=torch.int64 if needs_64_bits(patch, C) else torch.int32).long()
    )  # (B, M)
    return (n * Q - S.mul_(S).sum(2)).float().sqrt().div_(255 * n * C**0.5)


def needs_64_bits(patch, C):
    """Does the sum of a patch's squared bytes overflow 32 bits? In three colours it does from 105
    px on.
    """
    return patch * patch * C * 255**2 >= 2**31


def mean_square(x, patch):
    """x (B, M, P) -> (B, M), the mean of its squares. Row by row of the patch: as fast, and twice
    as exact in fp32.
    """
    rows = torch.linalg.vector_norm(
        x.unflatten(2, (patch, -1)), dim=3
    )  # no array of squares is made
    return rows.square_().sum(2).div_(x.shape[2])


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


def loss_reference(pred, view, ids, weight, factor, patch, norm_pix, floor, need_gradient):
    """-> e (B, M), and dL/dy (B, M, P) = factor * w * (y - t), factor = 2 / (P sum(w)).

    One buffer holds t, then y - t, then the gradient: no other array of that size is made.
    """
    exact = torch.promote_types(pred.dtype, torch.float32)
    t = targets(view, ids, patch, norm_pix, floor)[0].to(exact)
    for y, x in zip(
        pred.split(16), t.split(16), strict=True
    ):  # in parts: what torch converts to fp32 stays small
        torch.sub(y, x, out=x)
    error = mean_square(t, patch)
    if not need_gradient:
        return error, pred.new_empty(0)
    return error, t.mul_((factor * weight)[..., None]).to(pred.dtype)


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


@jit
def scale_kernel(gradient, by, count, P: tl.constexpr, PATCHES: tl.constexpr, WIDTH: tl.constexpr):
    """gradient *= by. Where `by` is 1 nothing is moved, and the CPU need not wait to find out."""
    n, j, inside = tile_of(count, P, PATCHES, WIDTH)
    at, factor = n.to(tl.int64)[:, None] * P + j[None, :], tl.load(by)
    if factor != 1:
        x = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(gradient + at, x.to(gradient.dtype.element_ty), mask=inside)


def loss_triton(pred, view, ids, weight, factor, patch, norm_pix, floor, need_gradient):
    """What `loss_reference` gives, by the kernel."""
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    factor = 2 * scale / (pred.shape[2] * weight_sum)
    run = loss_triton if impl == "triton" else loss_reference
    error, gradient = run(pred, view, ids, weight, factor, patch, norm_pix, floor, need_gradient)
    return (weight * error).sum() * (scale / weight_sum), gradient, error


@loss_op.register_fake
def _(pred, view, ids, weight, weight_sum, patch, norm_pix, floor, scale, need_gradient, impl):
    gradient = pred.new_empty(pred.shape if need_gradient else 0)
    return weight.new_empty(()), gradient, weight.new_empty(ids.shape)


def remember_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(
        False
    )  # or autograd fills zeros, as large as the gradient, for the other outputs
    ctx.save_for_backward(output[1])
    ctx.impl = inputs[-1]


def scale_(gradient, by, impl):
    """gradient *= by, untouched where by is 1: one more pass over memory would cost nearly what the
    loss did.
    """
    if impl == "triton":
        count, P = gradient.shape[:2].numel(), gradient.shape[2]
        launch(scale_kernel, count, P, gradient, by, count, P=P)
    elif by.device.type != "cpu" or by != 1:
        gradient.mul_(by)


def backward(ctx, by, *_):
    """Backward: the gradient that the forward left, times that of what was made of the loss (`by`,
    a scalar).

    In place, unless somebody comes back: retain_graph, or torch.compile, whose graphs know no
    writing in place.
    """
    if by is None:
        return (None,) * 11
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "reconstruction_loss gives no second derivative (create_graph=True)"
        )
    (gradient,) = ctx.saved_tensors
    if type(gradient) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient * by
    else:
        scale_(gradient, by, ctx.impl)
    return gradient, *[None] * 10


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


def loss_gradient_error(
    pred, view, ids, patch, weight, norm_pix, weight_sum, impl, floor, scale, need_gradient
):
    """What both functions below are made of: the arguments checked and completed, the operator
    called.
    """
    check_patches(view, ids, patch)
    chosen, _ = choose_impl(impl, pred.device)
    shape, exact = (
        (*ids.shape, patch * patch * view.shape[3]),
        torch.promote_types(pred.dtype, torch.float32),
    )
    if (
        pred.shape != shape
        or not pred.is_floating_point()
        or (chosen == "triton" and exact == torch.float64)
    ):
        raise ValueError(
            f"pred must be (B, M, P) = {shape} in fp32, bf16, fp16, not {tuple(pred.shape)} {pred.dtype}"
        )
    weight = torch.ones(ids.shape, device=pred.device) if weight is None else weight.detach()
    if weight.shape != ids.shape:
        raise ValueError(f"weight must be (B, M) = {tuple(ids.shape)}, not {tuple(weight.shape)}")
    weight = weight.to(exact).contiguous()
    total = (
        weight.sum()
        if weight_sum is None
        else torch.as_tensor(weight_sum, device=pred.device).detach().to(exact)
    )
    total = total.clamp(min=LEAST)
    return loss_op(
        pred, view, ids, weight, total, patch, norm_pix, floor, scale, need_gradient, chosen
    )


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
    return_error=False,
):
    """pred (B, M, P), view u8 (B, S, S, C), ids_mask (B, M) -> scalar sum(w e) / sum(w),
    differentiable in pred.

    weight        (B, M), a plain tensor, 1 if None: another weighting is three lines in your script
    weight_sum    sum over the whole global batch where pred is only a part of it; None sums this
                  part's weights
    scale         on loss and gradient before the gradient is rounded to pred's dtype: fp16 needs
                  its loss scale here
    return_error  -> (loss, errors (B, M)); the errors give no gradient
    """
    need = torch.is_grad_enabled() and pred.requires_grad
    loss, _, error = loss_gradient_error(
        pred, view, ids_mask, patch, weight, norm_pix, weight_sum, impl, floor, scale, need
    )
    return (loss, error) if return_error else loss


def absolute_loss(
    pred, view, ids_mask, patch, weight, norm_pix, weight_sum, floor=FLOOR, return_error=True
):
    """SimMIM's loss, sum(w mean|y - t|) / sum(w), -> (loss, errors (B, M)): plain PyTorch, it is
    only a baseline.
    """
    error = (pred.float() - targets(view, ids_mask, patch, norm_pix, floor)[0]).abs().mean(2)
    loss = (weight * error).sum() / weight_sum.clamp(min=LEAST)
    return (loss, error.detach()) if return_error else loss


def patch_error(pred, view, ids, patch, norm_pix=True, impl="auto", floor=FLOOR):
    """Mean squared error of each masked patch, (B, M) fp32. Gives no gradient:
    `reconstruction_loss` does.
    """
    return loss_gradient_error(
        pred.detach(), view, ids, patch, None, norm_pix, None, impl, floor, 1.0, False
    )[2]


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
