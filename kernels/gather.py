"""Fused gather of patches: only the visible patches are read, converted and written.

    out[b, k, (r, q, c)] = (view[b, y*p + r, x*p + q, c] / 255 - mean[c]) / std[c]
    (y, x) = divmod(ids[b, k], S/p)

Bytes, for B views of which K patches of P = p*p*3 numbers are visible: the kernel reads B*K*P bytes
and writes B*K*P numbers. At 224 px, p 16, K 49 in bf16 that is 0.04 + 0.08 MB a view. To convert,
scale and cut the whole view first moves about 5 MB.

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


def gather_reference(view, ids, patch, dtype=torch.float32):
    """The formula in PyTorch: view (B, S, S, 3), ids (B, K) -> (B, K, P) of dtype."""
    x = patch_bytes(view, ids, patch).float()
    scale, shift = scale_of_patch(patch, view.device)
    return x.mul_(scale).add_(shift).to(dtype)


@functools.cache
def scale_of_patch(patch, device):
    """SCALE and SHIFT for every number of a patch, (P,) each. Cached: a copy to a GPU is a wait."""
    return tuple(torch.tensor(v, device=device).repeat(patch * patch) for v in (SCALE, SHIFT))


# ---- the kernel ----------------------------------------------------------------------------------
# A program holds PATCHES patches in WIDTH lanes each; lanes beyond P are masked off. S and p are
# constants, so that the compiler sees that 16 lanes read 16 bytes at an address that 16 divides.


@jit
def tile_of(count, P: constexpr, PATCHES: constexpr, WIDTH: constexpr):
    """n (PATCHES,), the patches; j (WIDTH,), the numbers of a patch; inside, those that exist."""
    n = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    j = tl.arange(0, WIDTH)
    return n, j, (n < count)[:, None] & (j < P)[None, :]


@jit
def load_bytes(view, ids, count, K, n, j, inside, S: constexpr, p: constexpr):
    """Bytes of the patches n, (PATCHES, WIDTH). Offsets are int64: a batch may pass 2^31 bytes."""
    place = tl.load(ids + n, mask=n < count, other=0)
    y = place // (S // p)
    x = place % (S // p)
    first = (n // K).to(tl.int64) * (S * S * 3) + y * (p * S * 3) + x * (p * 3)  # byte of a patch
    within = (j // (p * 3)) * (S * 3) + j % (p * 3)  # the next row begins S*3 bytes later
    return tl.load(view + first[:, None] + within[None, :], mask=inside, other=0)


@jit
def normalise(x, j):
    """byte * SCALE[c] + SHIFT[c], c = j % 3. A table would need a load for each number."""
    # The colour of number j is j % 3, as colours are the fastest index of a patch.
    scale = tl.where(j % 3 == 0, RED[0], tl.where(j % 3 == 1, GREEN[0], BLUE[0]))
    shift = tl.where(j % 3 == 0, RED[1], tl.where(j % 3 == 1, GREEN[1], BLUE[1]))
    return x.to(tl.float32) * scale[None, :] + shift[None, :]


@jit
def gather_kernel(
    view, ids, out, count, K, S: constexpr, p: constexpr, PATCHES: constexpr, WIDTH: constexpr
):
    P: constexpr = p * p * 3
    n, j, inside = tile_of(count, P, PATCHES, WIDTH)
    x = load_bytes(view, ids, count, K, n, j, inside, S, p)
    x = normalise(x, j)  # (byte/255 - mean) / std
    at = n.to(tl.int64)[:, None] * P + j[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


# ---- the operator: what torch.compile sees. It has no autograd: its input is pixels --------------


@torch.library.custom_op("animask::masked_patch_gather", mutates_args=())
def gather_op(view: Tensor, ids: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    # A kernel gets an address, and knows neither shape nor strides: what is not contiguous would be
    # read in a wrong order, without an error. ids.argsort(1)[:, :K] is such a tensor.
    view = view.contiguous()
    ids = ids.contiguous()
    out = torch.empty(*ids.shape, patch * patch * 3, dtype=dtype, device=view.device)
    K = ids.shape[1]
    launch(gather_kernel, ids, patch, view, ids, out, ids.numel(), K, S=view.shape[2])
    return out


@gather_op.register_fake
def _(view, ids, patch, dtype):
    # torch.compile runs this in place of the kernel, to learn shape and dtype of what will come.
    return view.new_empty(*ids.shape, patch * patch * 3, dtype=dtype)


# ---- the dispatcher ------------------------------------------------------------------------------


def masked_patch_gather(view, ids, patch, dtype=torch.float32, impl="auto"):
    """view u8 (B, S, S, 3), ids i64 (B, K) -> normalised patches (B, K, P) of dtype.

    impl is "auto", "torch" or "triton" (`kernels.choose_impl`). A ValueError where shapes or ids
    do not fit. Not differentiable.
    """
    check_patches(view, ids, patch)
    operation = gather_op if choose_impl(impl, view.device) == "triton" else gather_reference
    return operation(view, ids, patch, dtype)
