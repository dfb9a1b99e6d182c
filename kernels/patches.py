"""What is computed of single patches: the gather of visible ones, and the loss of hidden ones.

For a patch at place id of a view, with the pixels x (normalised by the mean and std of ImageNet), and
for a hidden one its prediction y, both of P numbers:

    gather    out[b, k, (r, q, c)] = (view[b, row*p + r, column*p + q, c] / 255 - mean[c]) / std[c]
              (row, column) = divmod(ids[b, k], s/p)
    target    z = (x - mean(x)) / sqrt(var(x) + s0^2)           with norm_pix; else z = x
    error     e = mean over P of (y - z)^2
    detail    d = sqrt(mean of (x01 - mean of its channel)^2)   x01 in [0, 1]; 0 for a flat patch
    weight    w = w_flat + (1 - w_flat) * (1 - exp(-d / tau))   1 with detail, w_flat without
    loss      L = sum(w e) / sum(w)
    gradient  dL/dy = 2 w (y - z) / (P sum(w))

The floor s0 is ours; the code of MAE has s0 = 1e-3 (He et al. 2021, arXiv:2111.06377).

Every operation stands here in a few lines of PyTorch, which run anywhere: the references. The gather, the
detail and the error also have Triton kernels in fused.py, which write no intermediate result to memory. A
dispatcher chooses between the two. With TRITON_INTERPRET=1, Triton's interpreter runs the kernels on a CPU,
for tests.

    B views   s their side   p side of a patch   N = (s/p)^2 patches   P = p*p*3 numbers of a patch
    K visible, M hidden patches, or any others that ids (B, K) names

A view is stored as (B, s, s, 3): a row of a patch of 16 px is three 16-byte loads. From planes, the
compiler would load single bytes. A patch is flattened in the order (row, column, colour).
"""

import functools
import os
from importlib.util import find_spec

import torch

from kernels import SCALE, SHIFT

# MAE divides each patch by its own standard deviation. Patches of a drawing are often flat: what
# varies there is the noise of a JPEG, and it would be blown up to the variance of an eye. No
# network can predict noise, so much of the loss would be spent on it. With the floor, the target of
# a flat patch is nearly 0, and a patch with much contrast is normalised as in MAE.
FLOOR = 0.15  # s0, in units of the normalised pixels: about 0.03 of the range of raw pixels
TAU = 0.05  # detail at which the weight has risen by 63 %: a soft shadow edge
LARGEST = 104  # px of a patch: from 105 on, a sum of squared bytes overflows int32

# ---- which implementation runs -------------------------------------------------------------------

IMPL = "auto"  # "torch": a GPU runs the references, too, so that what you change there trains
TRITON = find_spec("triton") is not None  # macOS has none
INTERPRET = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (7, 0)  # compute capability; torch.compile refuses older GPUs, too


def choose_impl(impl, device):
    """impl "auto", "torch" or "triton" -> "torch" or "triton"; a ValueError if it can't run here."""
    device = torch.device(device)
    impl = IMPL if impl == "auto" else impl
    problem = why_not_triton(device)
    # Who asks for the kernel by name gets it or an error. If the reference ran in its place, a test
    # or a benchmark of the kernel would pass without it.
    if impl == "triton" and problem:
        raise ValueError(f"impl triton: {problem}; choose torch")
    if impl == "auto":
        return "triton" if device.type == "cuda" and not problem else "torch"
    return impl


@torch.compiler.assume_constant_result  # torch.compile asks it, and does not trace it
def why_not_triton(device):
    """The reason why the kernels can't run on this device, or None."""
    if not TRITON:
        return "Triton is not installed (pip install triton, on Windows triton-windows; macOS has none)"
    if device.type == "cpu":
        note = "on a CPU, TRITON_INTERPRET=1 runs its interpreter, for tests"
        return None if INTERPRET else f"Triton needs a GPU ({note})"
    if device.type != "cuda":
        return f"Triton does not run on {device.type}"
    return why_no_kernel_runs(device)


@functools.cache
def why_no_kernel_runs(device):
    """Run a small kernel on a GPU -> the reason why it can't, or None."""
    # Triton compiles it, and its link to the driver, here and now. For that it needs a C compiler, the headers of
    # Python, and a GPU that it knows. Whether all of them are there and fit is known once a kernel has run.
    try:
        if torch.cuda.get_device_capability(device) < OLDEST:
            return f"Triton needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or more"
        from kernels import fused

        view = torch.zeros(1, 16, 16, 3, dtype=torch.uint8, device=device)
        place = torch.zeros(1, 1, dtype=torch.int64, device=device)
        fused.gather_op(view, place, 16, torch.float32, FLOOR)[0].cpu()
    except Exception as problem:  # of Triton, of the compiler that it calls, or of the driver
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0][:100]
        return f"Triton fails here ({reason}); it needs a C compiler and Python.h (apt install gcc python3-dev)"
    return None


def check_patches(view, ids, patch):
    """A ValueError where the arguments of an operation on patches do not fit together."""
    s = view.shape[-2]
    N = (s // patch) ** 2
    if view.dtype != torch.uint8 or view.ndim != 4 or view.shape[1:] != (s, s, 3):
        raise ValueError(f"view must be uint8 (B, s, s, 3), not {view.dtype} {tuple(view.shape)}")
    if s % patch or patch > LARGEST:
        raise ValueError(f"a patch of {patch} px must divide {s} px, and have at most {LARGEST} px")
    if ids.ndim != 2 or ids.shape[0] != view.shape[0] or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 (B, K), B = {len(view)}, not {tuple(ids.shape)}")
    # A kernel would read whatever lies at the address of a place that does not exist. On a CPU the
    # check is cheap; on a GPU its answer would be a wait in every step.
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= N:
            raise ValueError(f"ids from {low} to {high} are not all among {N} patches")


# ---- the references: patches and their statistics -------------------------------------------------


def all_places(view, patch):
    """The places of all patches of views (B, s, s, 3): (B, N)."""
    N = (view.shape[1] // patch) ** 2
    return torch.arange(N, device=view.device).expand(view.shape[0], -1).contiguous()


def patch_bytes(view, ids, patch):
    """view u8 (B, s, s, 3), ids i64 (B, K) -> the bytes of those patches, u8 (B, K, P).

    The whole view is cut up first: a CPU copies rows eight times as fast as it indexes two axes.
    """
    B, s = view.shape[:2]
    g = s // patch
    N = g * g
    P = patch * patch * 3
    patches = view.reshape(B * g, patch, g, patch * 3).transpose(1, 2).reshape(B * N, P)
    image = torch.arange(B, device=view.device)[:, None]
    # Bytes are gathered, and numbers are made of them afterwards: a quarter of the memory is moved.
    return patches.index_select(0, (image * N + ids).flatten()).view(*ids.shape, P)


def gather_reference(view, ids, patch):
    """The formula in PyTorch: view (B, s, s, 3), ids (B, K) -> (B, K, P) fp32."""
    x = patch_bytes(view, ids, patch).float()
    scale, shift = scale_of_patch(patch, view.device)
    return x.mul_(scale).add_(shift)


def mean_and_std(x, floor):
    """Mean and sqrt(var + floor^2) of patches x (B, K, P), (B, K) each.

    Variance is unbiased, as in MAE. On a CPU, torch.var_mean would take thirty times as long.
    """
    mean = x.mean(2)
    squares = torch.linalg.vector_norm(x - mean[..., None], dim=2).square_()
    return mean, (squares / (x.shape[2] - 1) + floor**2).sqrt_()


def stack_stats(mean, std):
    """Statistics of patches, (B, K, 2): the logarithm lets any number stand for a deviation."""
    return torch.stack([mean, std.log()], 2)


@functools.cache
def scale_of_patch(patch, device):
    """SCALE and SHIFT for every number of a patch, (P,) each. Cached: a copy to a GPU is a wait."""
    return tuple(torch.tensor(v, device=device).repeat(patch * patch) for v in (SCALE, SHIFT))


# ---- the references: target, error, detail ---------------------------------------------------------


def squared_error(pred, target):
    """e (B, M), the mean squared error of pred and target (B, M, P). A GPU has a kernel for this one."""
    return (pred - target).square().mean(2)


def absolute_error(pred, target):
    """e (B, M), the mean absolute error of each patch, as SimMIM trains with."""
    return (pred - target).abs().mean(2)


def targets(view, ids, patch, norm_pix=True, floor=FLOOR):
    """z (B, M, P) fp32, and the mean and log std of each patch (B, M, 2)."""
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


# ---- the dispatchers -----------------------------------------------------------------------------


def masked_patch_gather(
    view, ids, patch, dtype=torch.float32, impl="auto", return_stats=False, floor=FLOOR
):
    """view u8 (B, s, s, 3), ids i64 (B, K) -> normalised patches (B, K, P) of dtype.

    impl is "auto", "torch" or "triton" (`patches.choose_impl`). A ValueError where shapes or ids
    do not fit. Not differentiable.
    return_stats  -> (patches, mean and log std of each (B, K, 2) fp32)
    """
    check_patches(view, ids, patch)
    if choose_impl(impl, view.device) == "triton":
        from kernels import fused  # only here, because a CPU and a Mac need no Triton

        x, *stats = fused.gather_op(view, ids, patch, dtype, floor)
    else:
        x = gather_reference(view, ids, patch)
        stats = mean_and_std(x, floor) if return_stats else None
        x = x.to(dtype)
    return (x, stack_stats(*stats)) if return_stats else x


def patch_detail(view, ids, patch, impl="auto"):
    """view u8 (B, s, s, 3), ids (B, M) -> detail (B, M) in [0, 0.5]."""
    check_patches(view, ids, patch)
    if choose_impl(impl, view.device) == "triton":
        from kernels import fused

        return fused.detail_op(view, ids, patch)
    return detail_reference(view, ids, patch)


def detail_weight(detail, flat_weight):
    """Weight of patches with this detail, of the same shape: flat_weight at 0, towards 1 above TAU."""
    # The weight rises smoothly: a threshold would part two patches that differ by one gray level.
    # That 0.1 helps has not been shown (demo set: -1.4 points, -5.1 to 2.2); 1 is plain MAE.
    return flat_weight + (1 - flat_weight) * (1 - torch.exp(-detail / TAU))


def reconstruction_error(
    pred, view, ids, patch, norm_pix=True, floor=FLOOR, error_of=squared_error, impl="auto"
):
    """e (B, M), differentiable in pred (B, M, P), and mean and log std of the patches (B, M, 2).

    view u8 (B, s, s, 3), ids i64 (B, M)
    error_of  (pred, target), (B, M, P) each -> (B, M). Only of squared_error there is a kernel
    """
    check_patches(view, ids, patch)
    if pred.shape != (*ids.shape, patch * patch * 3):
        shape = (*ids.shape, patch * patch * 3)
        raise ValueError(
            f"pred must be {shape}, the pixels of these patches, not {tuple(pred.shape)}"
        )
    # A change of the references acts on a CPU and on a Mac. On a GPU the kernels run, so change them, too,
    # or set IMPL above to "torch". Another error_of acts everywhere.
    if choose_impl(impl, pred.device) == "triton" and error_of is squared_error:
        from kernels import fused

        error, *stats = fused.error_op(pred, view, ids, patch, norm_pix, floor)
        return error, stack_stats(*stats)
    target, stats = targets(view, ids, patch, norm_pix, floor)
    pred = pred.to(torch.promote_types(pred.dtype, target.dtype))  # fp32 where it was bf16 or fp16
    error = error_of(pred, target.to(pred.dtype))
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
    """values (B, K, V) of visible patches -> (B, M, V): their mean for each hidden one, where near ones count more.

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
