"""Fused gather of patches: only the visible patches are read, converted and written.

    out[b, k, (r, q, c)] = (view[b, y*p + r, x*p + q, c] / 255 - mean[c]) / std[c]
    (y, x) = divmod(ids[b, k], S/p)

Bytes, for B views of which K patches of P = p*p*3 numbers are visible: the kernel reads B*K*P bytes
and writes B*K*P numbers. At 224 px, p 16, K 49 in bf16 that is 0.04 + 0.08 MB a view. To convert,
scale and cut the whole view first moves about 5 MB.

On the way a patch x leaves its mean and sqrt(var(x) + s0^2), eight bytes more: the loss predicts those of
hidden patches, the latter as a log, by those of visible ones.

A view is stored as (B, S, S, 3): a row of a patch of 16 px is three 16-byte loads. From planes, the
compiler would load single bytes. A patch is flattened in the order (row, column, colour).
"""

import functools

import torch
from torch import Tensor

from kernels import LARGEST, choose_impl, constexpr, jit, launch, tl

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, so that public checkpoints can be used as they are
STD = (0.229, 0.224, 0.225)
# (byte / 255 - mean) / std = byte * SCALE + SHIFT: one product and one sum for each number. Kernel
# and reference take the same two constants, so that they differ by rounding alone.
SCALE = tuple(1 / (255 * s) for s in STD)
SHIFT = tuple(-m / s for m, s in zip(MEAN, STD, strict=True))
RED, GREEN, BLUE = map(constexpr or tuple, zip(SCALE, SHIFT, strict=True))  # pairs, for a kernel

# MAE divides each patch by its own standard deviation. Patches of a drawing are often flat: what
# varies there is the noise of a JPEG, and it would be blown up to the variance of an eye. No
# network can predict noise, so much of the loss would be spent on it. With the floor, the target of
# a flat patch is nearly 0, and a patch with much contrast is normalised as in MAE.
FLOOR = 0.15  # s0, in units of the normalised pixels: about 0.03 of the range of raw pixels


def check_patches(view, ids, patch):
    """A ValueError where the arguments of an operation on patches do not fit together."""
    S = view.shape[-2]
    N = (S // patch) ** 2
    if view.dtype != torch.uint8 or view.ndim != 4 or view.shape[1:] != (S, S, 3):
        raise ValueError(f"view must be uint8 (B, S, S, 3), not {view.dtype} {tuple(view.shape)}")
    if S % patch or patch > LARGEST:
        raise ValueError(f"a patch of {patch} px must divide {S} px, and have at most {LARGEST} px")
    if ids.ndim != 2 or ids.shape[0] != view.shape[0] or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 (B, K), B = {len(view)}, not {tuple(ids.shape)}")
    # A kernel would read whatever lies at the address of a place that does not exist. On a CPU the
    # check is cheap; on a GPU its answer would be a wait in every step.
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= N:
            raise ValueError(f"ids from {low} to {high} are not all among {N} patches")


# ---- the reference -------------------------------------------------------------------------------


def all_places(view, patch):
    """The places of all patches of views (B, S, S, 3): (B, N)."""
    N = (view.shape[1] // patch) ** 2
    return torch.arange(N, device=view.device).expand(view.shape[0], -1).contiguous()


def patch_bytes(view, ids, patch):
    """view u8 (B, S, S, 3), ids i64 (B, K) -> the bytes of those patches, u8 (B, K, P).

    The whole view is cut up first: a CPU copies rows eight times as fast as it indexes two axes.
    """
    B, S = view.shape[:2]
    g = S // patch
    N = g * g
    P = patch * patch * 3
    patches = view.reshape(B * g, patch, g, patch * 3).transpose(1, 2).reshape(B * N, P)
    image = torch.arange(B, device=view.device)[:, None]
    # Bytes are gathered, and numbers are made of them afterwards: a quarter of the memory is moved.
    return patches.index_select(0, (image * N + ids).flatten()).view(*ids.shape, P)


def gather_reference(view, ids, patch):
    """The formula in PyTorch: view (B, S, S, 3), ids (B, K) -> (B, K, P) fp32."""
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


# ---- the kernel ----------------------------------------------------------------------------------
# A program holds PATCHES patches, each of STRIPS strips of w pixels (see `kernels.tile`). Their
# numbers are three blocks (PATCHES, STRIPS, WIDTH), one for each piece of a strip: x[0], x[1], x[2].
# S, p and w are constants, so that the compiler sees that 16 lanes read 16 bytes at an address that
# 16 divides, and knows the colour of every number.


@jit
def lanes_of(
    ids,
    count,
    K,
    S: constexpr,
    p: constexpr,
    w: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    """n, the patches of this program, and i, the numbers of a piece, each along its own axis.

    And where the first pieces begin: byte of the views, number of the patches. Both are int64,
    because a batch may pass 2^31 bytes. Lanes that do not exist are not `inside`.
    """
    n = (tl.program_id(0) * PATCHES + tl.arange(0, PATCHES))[:, None, None]
    strip = tl.arange(0, STRIPS)[None, :, None]
    i = tl.arange(0, WIDTH)[None, None, :]
    place = tl.load(ids + n, mask=n < count, other=0).to(tl.int32)
    row = place // (S // p) * p + strip // (p // w)
    column = place % (S // p) * p + strip % (p // w) * w
    byte = (n // K).to(tl.int64) * (S * S * 3) + row * (S * 3) + column * 3 + i
    number = n.to(tl.int64) * (p * p * 3) + strip * (w * 3) + i
    return n, i, byte, number, (strip < p * p // w) & (i < w)


@jit
def load_pieces(at, mask, w: constexpr):
    """The three pieces of which the first begins at this pointer."""
    a = tl.load(at, mask=mask, other=0)
    b = tl.load(at + w, mask=mask, other=0)
    c = tl.load(at + 2 * w, mask=mask, other=0)
    return a, b, c


@jit
def normalise(x, i, w: constexpr):
    """byte * SCALE[c] + SHIFT[c]. A strip begins with the red of a pixel."""
    return normalised(x[0], i % 3), normalised(x[1], (w + i) % 3), normalised(x[2], (2 * w + i) % 3)


@jit
def normalised(x, c):
    # A table of constants would need a load for each number.
    scale = tl.where(c == 0, RED[0], tl.where(c == 1, GREEN[0], BLUE[0]))
    shift = tl.where(c == 0, RED[1], tl.where(c == 1, GREEN[1], BLUE[1]))
    return x.to(tl.float32) * scale + shift


@jit
def sum_of_patch(x, inside):
    """(PATCHES, STRIPS, WIDTH) -> (PATCHES, 1, 1)."""
    # One warp holds all lanes of a patch of up to 16 px, so that none waits for another.
    return tl.sum(tl.sum(tl.where(inside, x, 0), 2, keep_dims=True), 1, keep_dims=True)


@jit
def mean_and_std_of(x, inside, p: constexpr, floor):
    """Mean and sqrt(var + floor^2) of each patch, (PATCHES, 1, 1)."""
    P: constexpr = p * p * 3
    mean = sum_of_patch(x[0] + x[1] + x[2], inside) / P
    a = x[0] - mean
    b = x[1] - mean
    c = x[2] - mean
    var = sum_of_patch(a * a + b * b + c * c, inside) / (P - 1)
    return mean, tl.sqrt_rn(var + floor * floor)


@jit
def gather_kernel(
    view,
    ids,
    out,
    mean,
    std,
    count,
    K,
    floor,
    S: constexpr,
    p: constexpr,
    w: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, number, inside = lanes_of(ids, count, K, S, p, w, PATCHES, STRIPS, WIDTH)
    mask = (n < count) & inside
    x = normalise(load_pieces(view + byte, mask, w), i, w)  # (byte/255 - mean) / std
    for c in tl.static_range(3):
        tl.store(out + number + c * w, x[c].to(out.dtype.element_ty), mask=mask)
    # The numbers are in registers now, so their mean and deviation cost eight bytes a patch.
    m, s = mean_and_std_of(x, inside, p, floor)
    tl.store(mean + n, m, mask=n < count)
    tl.store(std + n, s, mask=n < count)


# ---- the operator: what torch.compile sees. It has no autograd: its input is pixels --------------


@torch.library.custom_op("animask::masked_patch_gather", mutates_args=())
def gather_op(
    view: Tensor, ids: Tensor, patch: int, dtype: torch.dtype, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> patches (B, K, P), mean and std (B, K)."""
    # A kernel gets an address, and knows neither shape nor strides: what is not contiguous would be
    # read in a wrong order, without an error. ids.argsort(1)[:, :K] is such a tensor.
    view = view.contiguous()
    ids = ids.contiguous()
    out = torch.empty(*ids.shape, patch * patch * 3, dtype=dtype, device=view.device)
    mean = torch.empty(ids.shape, dtype=torch.float32, device=view.device)
    std = torch.empty(ids.shape, dtype=torch.float32, device=view.device)
    tensors = (view, ids, out, mean, std)
    launch(gather_kernel, ids, patch, *tensors, ids.numel(), ids.shape[1], floor, S=view.shape[2])
    return out, mean, std


@gather_op.register_fake
def _(view, ids, patch, dtype, floor):
    # torch.compile runs this in place of the kernel, to learn shape and dtype of what will come.
    out = view.new_empty(*ids.shape, patch * patch * 3, dtype=dtype)
    return out, *(view.new_empty(ids.shape, dtype=torch.float32) for _ in range(2))


# ---- the dispatcher ------------------------------------------------------------------------------


def masked_patch_gather(
    view, ids, patch, dtype=torch.float32, impl="auto", return_stats=False, floor=FLOOR
):
    """view u8 (B, S, S, 3), ids i64 (B, K) -> normalised patches (B, K, P) of dtype.

    impl is "auto", "torch" or "triton" (`kernels.choose_impl`). A ValueError where shapes or ids
    do not fit. Not differentiable.
    return_stats  -> (patches, mean and log std of each (B, K, 2) fp32)
    """
    check_patches(view, ids, patch)
    if choose_impl(impl, view.device) == "triton":
        x, *stats = gather_op(view, ids, patch, dtype, floor)
    else:
        x = gather_reference(view, ids, patch)
        stats = mean_and_std(x, floor) if return_stats else None
        x = x.to(dtype)
    return (x, stack_stats(*stats)) if return_stats else x
