"""The weighted reconstruction loss of hidden patches: flat colour weighs less.

For a hidden patch with pixels x (normalised by the mean and std of ImageNet) and prediction y, both
of P numbers:

    target    t = (x - mean(x)) / sqrt(var(x) + s0^2)           with norm_pix; else t = x
    error     e = mean over P of (y - t)^2
    detail    d = sqrt(mean of (x01 - mean of its channel)^2)   x01 in [0, 1]; 0 for a flat patch
    weight    w = w_flat + (1 - w_flat) * (1 - exp(-d / tau))   1 with detail, w_flat without
    loss      L = sum(w e) / sum(w)
    gradient  dL/dy = 2 w (y - t) / (P sum(w))

The floor s0 is ours; the code of MAE has s0 = 1e-3 (He et al. 2021, arXiv:2111.06377).

Bytes of `loss_kernel` for n = B*M patches: it reads x and y, and writes dL/dy in the dtype of y.
These are n * P * (1 + 2 * size), 1.16 GB for B 2048, M 147, P 768 in bf16. One pass is enough,
because sum(w) is known before: w needs x alone, and has a small pass of its own over the bytes.
"""

import torch
from torch import Tensor

from kernels import choose_impl, constexpr, jit, launch, tl
from kernels.gather import (
    check_patches,
    gather_reference,
    load_bytes,
    normalise,
    patch_bytes,
    tile_of,
)

# MAE divides each patch by its own standard deviation. Patches of a drawing are often flat: what
# varies there is the noise of a JPEG, and it would be blown up to the variance of an eye. No
# network can predict noise, so much of the loss would be spent on it. With the floor, the target of
# a flat patch is nearly 0, and a patch with much contrast is normalised as in MAE.
FLOOR = 0.15  # s0, in units of the normalised pixels: about 0.03 of the range of raw pixels
TAU = 0.05  # detail at which the weight has risen by 63 %: a soft shadow edge


# ---- the reference -------------------------------------------------------------------------------


def loss_reference(pred, target, weight, error_of=None):
    """L = sum(w e) / sum(w), a scalar, and e (B, M). Autograd finds the gradient.

    A change of the references acts on a CPU and on a Mac. On a GPU it acts if IMPL in
    kernels/__init__.py is "torch". Otherwise the kernels run there: change them, too.
    """
    error = (error_of or squared_error)(pred, target)
    # Divided by the sum of weights and not by their number: a weight then says which patches count
    # more, and does not change the size of the gradient, on which the learning rate was chosen.
    return (weight * error).sum() / sum_of(weight), error


def sum_of(weight):
    """sum(w), or a little where there is nothing to sum: the loss of an empty batch is 0."""
    return weight.sum().clamp(min=1e-30)


def squared_error(pred, target):
    """e (B, M), the mean squared error of pred and target (B, M, P). On a GPU see loss_reference."""
    return (pred - target).square().mean(2)


def absolute_error(pred, target):
    """e (B, M), the mean absolute error of each patch, as SimMIM trains with."""
    return (pred - target).abs().mean(2)


def targets(view, ids, patch, norm_pix=True, floor=FLOOR):
    """t (B, M, P) fp32, and with norm_pix the mean and log std of each patch (B, M, 2), else None.

    Variance is unbiased, as in MAE. On a CPU, torch.var_mean would take thirty times as long.
    """
    x = gather_reference(view, ids, patch)
    if not norm_pix:
        return x, None
    # Without its mean and contrast a patch says what is drawn in it, and not how light it is, which
    # its neighbours tell. A run on faces20 that predicted raw pixels was two points worse.
    mean = x.mean(2, keepdim=True)
    x.sub_(mean)
    squares = torch.linalg.vector_norm(x, dim=2, keepdim=True).square_()
    std = (squares / (x.shape[2] - 1) + floor**2).sqrt_()
    # Pictures need the two statistics back; the logarithm lets any number stand for a deviation.
    return x.div_(std), torch.cat([mean, std.log()], 2)


def detail_reference(view, ids, patch):
    """d (B, M). In whole numbers, so that a flat patch has exactly 0.

    With n pixels, and S_c and Q_c the sum and the sum of squares of a channel:
    d^2 = mean_c (Q_c/n - (S_c/n)^2) / 255^2 = (n sum_c Q_c - sum_c S_c^2) / (3 * 255^2 n^2)
    """
    n = patch * patch
    x = patch_bytes(view, ids, patch).int()
    # Each channel has its own mean. By one mean for all, a flat red patch would seem detailed.
    columns = x.unflatten(2, (patch, patch * 3)).sum(2, dtype=torch.int32)  # rows first: vectorised
    S = columns.unflatten(2, (patch, 3)).sum(2)  # int64 (B, M, 3)
    Q = x.mul_(x).sum(2, dtype=torch.int32).long()  # (B, M)
    return (n * Q - S.mul_(S).sum(2)).float().sqrt().div_(255 * n * 3**0.5)


# ---- the kernels ---------------------------------------------------------------------------------


@jit
def detail_kernel(
    view, ids, detail, count, M, S: constexpr, p: constexpr, PATCHES: constexpr, WIDTH: constexpr
):
    n, j, inside = tile_of(count, p * p * 3, PATCHES, WIDTH)
    x = load_bytes(view, ids, count, M, n, j, inside, S, p).to(tl.int32)
    # d is a small difference of large numbers, exact only in integers: up to 104 px they fit into
    # int32. Their products with the number of pixels do not, and are int64.
    spread = tl.sum(x * x, 1).to(tl.int64) * (p * p)  # n sum_c Q_c, (PATCHES,)
    for c in tl.static_range(3):
        total = tl.sum(tl.where((j % 3 == c)[None, :], x, 0), 1).to(tl.int64)  # S_c
        spread -= total * total
    unit: constexpr = 1 / (255 * p * p * 3**0.5)
    tl.store(detail + n, tl.sqrt_rn(spread.to(tl.float32)) * unit, mask=n < count)


@jit
def loss_kernel(
    pred,
    view,
    ids,
    weight,
    factor,  # 2 / (P sum(w))
    error,
    gradient,
    count,
    M,
    floor,
    S: constexpr,
    p: constexpr,
    NORM_PIX: constexpr,
    GRADIENT: constexpr,
    PATCHES: constexpr,
    WIDTH: constexpr,
):
    P: constexpr = p * p * 3
    n, j, inside = tile_of(count, P, PATCHES, WIDTH)
    t = normalise(load_bytes(view, ids, count, M, n, j, inside, S, p), j)
    if NORM_PIX:  # t = (x - mean) / sqrt(var + s0^2), all of it in registers
        mean = tl.sum(tl.where(inside, t, 0.0), 1) / P
        t = tl.where(inside, t - mean[:, None], 0.0)
        var = tl.sum(t * t, 1) / (P - 1)
        t = t / tl.sqrt_rn(var + floor * floor)[:, None]
    at = n.to(tl.int64)[:, None] * P + j[None, :]  # int64: 2.8 million patches of 16 px are 2^31
    y = tl.load(pred + at, mask=inside, other=0.0).to(tl.float32)
    diff = tl.where(inside, y - t, 0.0)
    tl.store(error + n, tl.sum(diff * diff, 1) / P, mask=n < count)  # e
    # y and t are in registers now, so the gradient costs a write. A backward kernel would have to
    # read and normalise all of it again. In fp16 the factor alone would be 0, so the product is
    # fp32.
    if GRADIENT:
        w = tl.load(weight + n, mask=n < count, other=0.0) * tl.load(factor)
        tl.store(gradient + at, (w[:, None] * diff).to(gradient.dtype.element_ty), mask=inside)


# ---- the operators, and the gradient -------------------------------------------------------------


@torch.library.custom_op("animask::patch_detail", mutates_args=())
def detail_op(view: Tensor, ids: Tensor, patch: int) -> Tensor:
    view, ids = view.contiguous(), ids.contiguous()
    detail = torch.empty(ids.shape, dtype=torch.float32, device=view.device)
    M = ids.shape[1]
    launch(detail_kernel, ids, patch, view, ids, detail, ids.numel(), M, S=view.shape[2])
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
    patch: int,
    norm_pix: bool,
    floor: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> L, dL/dy (B, M, P) or nothing, e (B, M)."""
    pred, view, ids = pred.contiguous(), view.contiguous(), ids.contiguous()
    # Known before the kernel runs, because no weight depends on pred. Otherwise the gradient would
    # take a second pass, to be divided by the sum.
    total = sum_of(weight)
    factor = 2 / (pred.shape[2] * total)
    error = torch.empty(ids.shape, dtype=torch.float32, device=pred.device)
    gradient = torch.empty(pred.shape if with_gradient else 0, dtype=pred.dtype, device=pred.device)
    tensors = (pred, view, ids, weight, factor, error, gradient)
    constants = dict(S=view.shape[2], NORM_PIX=norm_pix, GRADIENT=with_gradient)
    launch(loss_kernel, ids, patch, *tensors, ids.numel(), ids.shape[1], floor, **constants)
    return (weight * error).sum() * (1 / total), gradient, error


@loss_op.register_fake
def _(pred, view, ids, weight, patch, norm_pix, floor, with_gradient):
    gradient = pred.new_empty(pred.shape if with_gradient else 0)
    return weight.new_empty(()), gradient, weight.new_empty(ids.shape)


def remember_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros, as large as the gradient, for the other outputs
    ctx.save_for_backward(output[1])


def backward(ctx, grad_loss, *_):
    """The gradient that the forward pass left, times the gradient of the loss, a scalar."""
    # What is saved is a tensor of numbers, whose own dependence on pred autograd can't see. A
    # second derivative would come out as 0, which is wrong.
    if torch.is_grad_enabled():
        raise NotImplementedError("the Triton loss gives no second derivative (create_graph=True)")
    (gradient,) = ctx.saved_tensors
    grad_pred = None if grad_loss is None else gradient * grad_loss
    return grad_pred, *[None] * 7  # none for the other inputs


loss_op.register_autograd(backward, setup_context=remember_gradient)


# ---- the dispatchers -----------------------------------------------------------------------------


def patch_detail(view, ids, patch, impl="auto"):
    """view u8 (B, S, S, 3), ids (B, M) -> detail (B, M) in [0, 1]."""
    check_patches(view, ids, patch)
    operation = detail_op if choose_impl(impl, view.device) == "triton" else detail_reference
    return operation(view, ids, patch)


def detail_weight(detail, flat_weight, tau=TAU):
    """Weight of patches with this detail, of the same shape: flat_weight at 0, towards 1 above tau."""
    # The weight rises smoothly: a threshold would part two patches that differ by one gray level.
    # That 0.1 helps has not been shown (demo set: -1.4 points, -5.1 to 2.2); 1 is plain MAE.
    return flat_weight + (1 - flat_weight) * (1 - torch.exp(-detail / tau))


def check_loss(pred, view, ids, patch, weight):
    """The weight (B, M), in fp32. A ValueError where shapes do not fit."""
    check_patches(view, ids, patch)
    # Without the detach, a weight that is itself learned would lower the loss by looking away.
    weight = torch.ones(ids.shape, device=pred.device) if weight is None else weight.detach()
    shape = (*ids.shape, patch * patch * 3)
    if pred.shape != shape or weight.shape != shape[:2]:
        shapes = f"{tuple(pred.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"pred must be {shape}, and weight {shape[:2]}, not {shapes}")
    return weight.to(torch.promote_types(pred.dtype, torch.float32)).contiguous()


def reconstruction_loss(
    pred,
    view,
    ids_mask,
    patch,
    weight=None,
    norm_pix=True,
    impl="auto",
    floor=FLOOR,
    error_of=None,
    return_error=False,
):
    """L, a scalar that is differentiable in pred (B, M, P); view u8 (B, S, S, 3), ids_mask (B, M).

    weight        (B, M), 1 if None
    error_of      a function such as `absolute_error`: it runs the reference; None: squared_error
    return_error  -> (L, e (B, M)); the errors give no gradient
    """
    weight = check_loss(pred, view, ids_mask, patch, weight)
    if choose_impl(impl, pred.device) == "triton" and error_of is None:
        with_gradient = torch.is_grad_enabled() and pred.requires_grad
        settings = patch, norm_pix, floor, with_gradient
        loss, _, error = loss_op(pred, view, ids_mask, weight, *settings)
    else:
        target, _ = targets(view, ids_mask, patch, norm_pix, floor)
        pred = pred.to(weight.dtype)  # fp32 where it was bf16 or fp16
        loss, error = loss_reference(pred, target.to(pred.dtype), weight, error_of)
    return (loss, error.detach()) if return_error else loss


@torch.no_grad()
def patch_error(pred, view, ids, patch, norm_pix=True, floor=FLOOR):
    """e (B, M) fp32, the mean squared error of each hidden patch: the measure, whatever the loss."""
    target, _ = targets(view, ids, patch, norm_pix, floor)
    return (pred.float() - target).square().mean(2)


# ---- statistics of patches: they undo norm_pix in pictures ---------------------------------------


def visible_stats(view, ids_keep, ids_mask, patch, floor=FLOOR):
    """Mean and log std of each hidden patch, estimated from visible ones, (B, M, 2).

    Their mean, weighted by distance^-3. The statistics head learns the rest.
    """
    # A decoder that predicts normalised patches is never asked for their means, so its tokens
    # hardly hold them. Visible neighbours do: on the demo set theirs explains 65 % of the variance
    # of the means.
    _, stats = targets(view, ids_keep, patch, True, floor)  # (B, K, 2)
    return mean_of_neighbours(stats, ids_keep, ids_mask, view.shape[2] // patch)


def mean_of_neighbours(values, ids_keep, ids_mask, g):
    """values (B, K, V) of visible patches -> (B, M, V): their mean for each hidden one, near ones first.

    The weight is distance^-3 on a grid of g x g patches.
    """
    hidden, visible = ids_mask[:, :, None], ids_keep[:, None]
    squares = (hidden // g - visible // g).square() + (hidden % g - visible % g).square()
    # No place is both hidden and visible, so no distance is 0.
    weight = squares.float().sqrt().pow(-3)  # (B, M, K)
    return weight @ values / weight.sum(2, keepdim=True)


def stats_loss(stats, view, ids_keep, ids_mask, patch, floor=FLOOR):
    """Mean squared distance of stats (B, M, 2) + visible_stats from the true statistics."""
    # The true statistics train the head, but no picture or PSNR may use them: a patch's mean is
    # most of what it looks like, so a prediction that is given it looks far better than it is.
    _, target = targets(view, ids_mask, patch, True, floor)
    estimate = stats.float() + visible_stats(view, ids_keep, ids_mask, patch, floor)
    return (estimate - target).square().mean()
