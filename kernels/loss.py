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

The kernels make e of x and y, and dL/dy of dL/de; weights and sums of a number for each patch stay
in PyTorch. Bytes for n = B*M patches: forward reads x and y and leaves mean and std of x,
backward reads x and y again and writes dL/dy in the dtype of y. These are n * P * (2 + 3 * size),
1.85 GB for B 2048, M 147, P 768 in bf16. To write dL/dy in the forward pass would be no less: it
would have to be read again and multiplied by what is then made of the loss.
"""

from functools import partial

import torch
from torch import Tensor

from kernels import choose_impl, constexpr, jit, launch, tl
from kernels.gather import (
    FLOOR,
    check_patches,
    gather_reference,
    lanes_of,
    load_pieces,
    mean_and_std,
    mean_and_std_of,
    normalise,
    patch_bytes,
    stack_stats,
    sum_of_patch,
)

TAU = 0.05  # detail at which the weight has risen by 63 %: a soft shadow edge


# ---- the reference -------------------------------------------------------------------------------


def squared_error(pred, target):
    """e (B, M), the mean squared error of pred and target (B, M, P).

    A GPU does not run this, but the kernel below; reconstruction_error says when.
    """
    return (pred - target).square().mean(2)


def absolute_error(pred, target):
    """e (B, M), the mean absolute error of each patch, as SimMIM trains with."""
    return (pred - target).abs().mean(2)


def targets(view, ids, patch, norm_pix=True, floor=FLOOR):
    """t (B, M, P) fp32, and the mean and log std of each patch (B, M, 2)."""
    x = gather_reference(view, ids, patch)
    mean, std = mean_and_std(x, floor)
    # Without its mean and deviation a patch says what is drawn in it, and not how light it is, which
    # its neighbours tell. A run on faces20 that predicted raw pixels was two points worse. Pictures
    # need the two statistics back.
    if norm_pix:
        x.sub_(mean[..., None]).div_(std[..., None])
    return x, stack_stats(mean, std)


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
    view,
    ids,
    detail,
    count,
    M,
    S: constexpr,
    p: constexpr,
    w: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, _, inside = lanes_of(ids, count, M, S, p, w, PATCHES, STRIPS, WIDTH)
    x = load_pieces(view + byte, (n < count) & inside, w)
    # d is a small difference of large numbers, exact only in integers: up to 104 px they fit into
    # int32. Their products with the number of pixels do not, and are int64.
    a = x[0].to(tl.int32)
    b = x[1].to(tl.int32)
    c = x[2].to(tl.int32)
    spread = sum_of_patch(a * a + b * b + c * c, inside).to(tl.int64) * (p * p)  # n sum_c Q_c
    for colour in tl.static_range(3):
        some = tl.where(i % 3 == colour, a, 0)
        some += tl.where((w + i) % 3 == colour, b, 0)
        some += tl.where((2 * w + i) % 3 == colour, c, 0)
        total = sum_of_patch(some, inside).to(tl.int64)  # S_c
        spread -= total * total
    unit: constexpr = 1 / (255 * p * p * 3**0.5)
    tl.store(detail + n, tl.sqrt_rn(spread.to(tl.float32)) * unit, mask=n < count)


@jit
def error_kernel(
    pred,
    view,
    ids,
    error,
    mean,
    std,
    count,
    M,
    floor,
    S: constexpr,
    p: constexpr,
    w: constexpr,
    NORM_PIX: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, number, inside = lanes_of(ids, count, M, S, p, w, PATCHES, STRIPS, WIDTH)
    mask = (n < count) & inside
    x = normalise(load_pieces(view + byte, mask, w), i, w)
    m, s = mean_and_std_of(x, inside, p, floor)
    tl.store(mean + n, m, mask=n < count)
    tl.store(std + n, s, mask=n < count)
    squares = 0.0
    # y is not loaded before: it would double the registers of a thread, and halve the threads.
    for c in tl.static_range(3):
        t = (x[c] - m) * (1 / s) if NORM_PIX else x[c]
        y = tl.load(pred + number + c * w, mask=mask, other=0).to(tl.float32)
        diff = y - t
        squares += diff * diff
    tl.store(error + n, sum_of_patch(squares, inside) / (p * p * 3), mask=n < count)  # e


@jit
def gradient_kernel(
    slope,  # of the loss by the errors, (B, M)
    pred,
    view,
    ids,
    mean,
    std,
    gradient,
    count,
    M,
    S: constexpr,
    p: constexpr,
    w: constexpr,
    NORM_PIX: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, number, inside = lanes_of(ids, count, M, S, p, w, PATCHES, STRIPS, WIDTH)
    mask = (n < count) & inside
    x = normalise(load_pieces(view + byte, mask, w), i, w)
    m = tl.load(mean + n, mask=n < count, other=0)
    s = tl.load(std + n, mask=n < count, other=1)
    factor = tl.load(slope + n, mask=n < count, other=0) * (2 / (p * p * 3))
    for c in tl.static_range(3):
        t = (x[c] - m) * (1 / s) if NORM_PIX else x[c]
        y = tl.load(pred + number + c * w, mask=mask, other=0).to(tl.float32)
        # Only the product is rounded: in fp16 the factor alone might be 0.
        g = (factor * (y - t)).to(gradient.dtype.element_ty)
        tl.store(gradient + number + c * w, g, mask=mask)


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


@torch.library.custom_op("animask::reconstruction_error", mutates_args=())
def error_op(
    pred: Tensor, view: Tensor, ids: Tensor, patch: int, norm_pix: bool, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> e, and mean and std of the patches, (B, M) each."""
    pred, view, ids = pred.contiguous(), view.contiguous(), ids.contiguous()
    empty = partial(torch.empty, ids.shape, dtype=torch.float32, device=pred.device)
    error, mean, std = empty(), empty(), empty()
    tensors = (pred, view, ids, error, mean, std)
    constants = dict(S=view.shape[2], NORM_PIX=norm_pix)
    launch(error_kernel, ids, patch, *tensors, ids.numel(), ids.shape[1], floor, **constants)
    return error, mean, std


@error_op.register_fake
def _(pred, view, ids, patch, norm_pix, floor):
    return tuple(view.new_empty(ids.shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("animask::reconstruction_gradient", mutates_args=())
def gradient_op(
    slope: Tensor,
    pred: Tensor,
    view: Tensor,
    ids: Tensor,
    mean: Tensor,
    std: Tensor,
    patch: int,
    norm_pix: bool,
) -> Tensor:
    """slope (B, M), dL/de -> dL/dy (B, M, P) = slope * 2 (y - t) / P."""
    slope, pred, view, ids = (x.contiguous() for x in (slope, pred, view, ids))
    gradient = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    tensors = (slope, pred, view, ids, mean, std, gradient)
    constants = dict(S=view.shape[2], NORM_PIX=norm_pix)
    launch(gradient_kernel, ids, patch, *tensors, ids.numel(), ids.shape[1], **constants)
    return gradient


@gradient_op.register_fake
def _(slope, pred, view, ids, mean, std, patch, norm_pix):
    return pred.new_empty(pred.shape)


def remember(ctx, inputs, output):
    pred, view, ids, *ctx.settings, _ = inputs  # patch, norm_pix
    _, mean, std = output
    ctx.mark_non_differentiable(mean, std)
    ctx.set_materialize_grads(False)  # no zeros for them
    ctx.save_for_backward(pred, view, ids, mean, std)


def backward(ctx, slope, *_):
    # The kernel's own dependence on pred is unknown to autograd. A second derivative would come out
    # as 0, which is wrong.
    if torch.is_grad_enabled():
        raise NotImplementedError("the Triton loss gives no second derivative (create_graph=True)")
    return gradient_op(slope, *ctx.saved_tensors, *ctx.settings), *[None] * 5


error_op.register_autograd(backward, setup_context=remember)


# ---- the dispatchers -----------------------------------------------------------------------------


def patch_detail(view, ids, patch, impl="auto"):
    """view u8 (B, S, S, 3), ids (B, M) -> detail (B, M) in [0, 0.5]."""
    check_patches(view, ids, patch)
    operation = detail_op if choose_impl(impl, view.device) == "triton" else detail_reference
    return operation(view, ids, patch)


def detail_weight(detail, flat_weight):
    """Weight of patches with this detail, of the same shape: flat_weight at 0, towards 1 above TAU."""
    # The weight rises smoothly: a threshold would part two patches that differ by one gray level.
    # That 0.1 helps has not been shown (demo set: -1.4 points, -5.1 to 2.2); 1 is plain MAE.
    return flat_weight + (1 - flat_weight) * (1 - torch.exp(-detail / TAU))


def reconstruction_error(
    pred, view, ids, patch, norm_pix=True, floor=FLOOR, error_of=None, impl="auto"
):
    """e (B, M), differentiable in pred (B, M, P), and mean and log std of the patches (B, M, 2).

    view u8 (B, S, S, 3), ids i64 (B, M)
    error_of  a function such as `absolute_error`: it runs the reference; None: squared_error
    """
    check_patches(view, ids, patch)
    if pred.shape != (*ids.shape, patch * patch * 3):
        shape = (*ids.shape, patch * patch * 3)
        raise ValueError(
            f"pred must be {shape}, the pixels of these patches, not {tuple(pred.shape)}"
        )
    # A change of the references acts on a CPU and on a Mac. On a GPU it acts if IMPL in
    # kernels/__init__.py is "torch". Otherwise the kernels run there: change them, too.
    if choose_impl(impl, pred.device) == "triton" and error_of is None:
        error, *stats = error_op(pred, view, ids, patch, norm_pix, floor)
        return error, stack_stats(*stats)
    target, stats = targets(view, ids, patch, norm_pix, floor)
    pred = pred.to(torch.promote_types(pred.dtype, target.dtype))  # fp32 where it was bf16 or fp16
    error = (error_of or squared_error)(pred, target.to(pred.dtype))
    if error.shape != ids.shape:
        shapes = f"a number for each patch, {tuple(ids.shape)}, and not {tuple(error.shape)}"
        raise ValueError(f"error_of has to return {shapes}")
    return error, stats


def weighted_mean(error, weight):
    """L = sum(w e) / sum(w), a scalar, of error and weight (B, M). 0 if there are none."""
    if weight.shape != error.shape:
        raise ValueError(f"weight must be {tuple(error.shape)}, not {tuple(weight.shape)}")
    # Without the detach, a weight that is itself learned would lower the loss by looking away.
    weight = weight.detach().to(error.dtype)
    # Divided by the sum of weights and not by their number: a weight then says which patches count
    # more, and the gradient keeps its size, for which the clipping of its norm was chosen.
    return (weight * error).sum() / weight.sum().clamp(min=1e-30)


@torch.no_grad()
def patch_error(pred, view, ids, patch, norm_pix=True, floor=FLOOR):
    """e (B, M) fp32, the mean squared error of each hidden patch: the measure, whatever the loss."""
    target, _ = targets(view, ids, patch, norm_pix, floor)
    return (pred.float() - target).square().mean(2)


# ---- statistics of patches: they undo norm_pix in pictures ---------------------------------------


def mean_of_neighbours(values, ids_keep, ids_mask, g):
    """values (B, K, V) of visible patches -> (B, M, V): their mean for each hidden one, near ones first.

    The weight is distance^-3 on a grid of g x g patches.
    """
    hidden, visible = ids_mask[:, :, None], ids_keep[:, None]
    squares = (hidden // g - visible // g).square() + (hidden % g - visible % g).square()
    # No place is both hidden and visible, so no distance is 0.
    weight = squares.float().sqrt().pow(-3)  # (B, M, K)
    return weight @ values / weight.sum(2, keepdim=True)


def predicted_stats(stats, visible_stats, ids_keep, ids_mask, g):
    """Mean and log std of hidden patches (B, M, 2): what the head says, stats (B, M, 2), added to
    the mean of those of visible patches (B, K, 2).
    """
    # A decoder that predicts normalised patches is never asked for their means, so its tokens
    # hardly hold them. Visible neighbours do: on the demo set theirs explains 65 % of the variance
    # of the means. The head learns the rest.
    return stats.float() + mean_of_neighbours(visible_stats, ids_keep, ids_mask, g)


def stats_loss(predicted, hidden_stats):
    """Mean squared distance of `predicted_stats` from the true ones, (B, M, 2)."""
    # The true statistics train the head, but no picture or PSNR may use them: a patch's mean is
    # most of what it looks like, so a prediction that is given it looks far better than it is.
    return (predicted - hidden_stats).square().mean()
