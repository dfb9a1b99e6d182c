"""Fused masked-patch gather: only the patches that are kept are read, converted and written.

    out[b, k, (r, q, c)] = (view[b, y*p + r, x*p + q, c] / 255 - mean[c]) / std[c]
    (y, x) = divmod(ids[b, k], S/p)

Bytes, for B images of which K patches of P = p*p*C numbers are kept:

    fused       reads B*K*P bytes, writes B*K*P numbers
    as usual    converts, scales, shifts and cuts the whole view, then drops three quarters of it

At 224 px, p 16, K 49 in bf16 that is 0.04 + 0.08 MB an image, against about 5 MB for each of the
usual steps.

A view is stored (B, S, S, C), so that a row of a patch is p*C bytes side by side: 48 bytes, three
16-byte loads, for p = 16. Stored as planes, the rows of a patch would be 16 bytes each, and the
compiler loads them one byte at a time. The result feeds a plain matrix product with the patch
embedding; a patch flattens to (row, column, colour).
"""

import functools

import torch
from torch import Tensor

from kernels import choose_impl, jit, launch, tl

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, so that public checkpoints can be used as they are
STD = (0.229, 0.224, 0.225)


def byte_scale(C):
    """C channels -> two tuples: byte * scale[c] + shift[c] is the normalised value, (byte/255 -
    mean) / std.

    Three channels take ImageNet's mean and std; one, two or four take the average of those, each
    channel.
    """
    mean, std = (MEAN, STD) if C == 3 else ((sum(MEAN) / 3,) * C, (sum(STD) / 3,) * C)
    return tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def check_patches(view, ids, patch):
    """What every operation on patches asks of its input; a ValueError says what is wrong."""
    S, device = view.shape[-2], view.device
    if (
        view.dtype != torch.uint8
        or view.ndim != 4
        or view.shape[1] != S
        or not 1 <= view.shape[3] <= 4
    ):
        raise ValueError(
            f"view must be uint8 (B, S, S, 1 to 4), not {view.dtype} {tuple(view.shape)}"
        )
    if patch < 1 or S % patch:
        raise ValueError(f"patches of {patch} px do not divide a view of {S} px")
    if (
        ids.ndim != 2
        or ids.shape[0] != view.shape[0]
        or ids.dtype != torch.int64
        or ids.device != device
    ):
        wrong = f"{ids.dtype} {tuple(ids.shape)} on {ids.device}"
        raise ValueError(f"ids must be int64 (B, K), B = {len(view)}, on {device}, not {wrong}")
    if (
        device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling()
    ):  # on a GPU a look is a wait
        low, high = ids.aminmax()
        if low < 0 or high >= (S // patch) ** 2:
            raise ValueError(
                f"ids from {low} to {high} are not all among {(S // patch) ** 2} patches"
            )


# ---- the reference -------------------------------------------------------------------------------


def patch_bytes(view, ids, patch):
    """view u8 (B, S, S, C), ids i64 (B, K) -> the raw bytes of those patches, u8 (B, K, P).

    To cut up the whole view first looks wasteful. It copies bytes, a quarter of one pass in fp32,
    and makes a row of each patch: a CPU copies rows up to eight times as fast as it indexes (B,
    S/p, p, S/p, p*C) in two places.
    """
    B, S, _, C = view.shape
    g = S // patch
    rows = (
        view.reshape(B * g, patch, g, patch * C)
        .transpose(1, 2)
        .reshape(B * g * g, patch * patch * C)
    )  # (B*N, P)
    image = torch.arange(B, device=view.device)[:, None]
    return rows.index_select(0, (image * g * g + ids).flatten()).view(*ids.shape, patch * patch * C)


def gather_reference(view, ids, patch, dtype=torch.float32):
    """The formula in PyTorch: (B, S, S, C), (B, K) -> (B, K, P) of dtype.

    Converted once, then in place: what mixes uint8 and fp32 in one operation can be 20 times slower
    on a CPU (p = 8).
    """
    x = patch_bytes(view, ids, patch).float()
    scale, shift = scale_of_patch(view.shape[3], patch, view.device)
    return x.mul_(scale).add_(shift).to(dtype)


@functools.cache
def scale_of_patch(C, patch, device):
    """byte_scale for every number of a patch, (P,) each; kept: to make a tensor on a GPU from
    numbers is a wait.
    """
    return tuple(torch.tensor(v, device=device).repeat(patch * patch) for v in byte_scale(C))


# ---- the kernel ----------------------------------------------------------------------------------
# A program holds PATCHES patches in WIDTH lanes each, the next power of 2 after P: lanes beyond P
# are masked off. S, p and C are constants of the compiled kernel: only so does the compiler see
# that 16 neighbouring lanes read 16 neighbouring bytes at an address that 16 divides (8 for p = 8,
# whose rows are 24 bytes), and makes one load of them.


@jit
def tile_of(count, P: tl.constexpr, PATCHES: tl.constexpr, WIDTH: tl.constexpr):
    """-> n (PATCHES,) which patches, j (WIDTH,) which numbers of a patch, inside (PATCHES, WIDTH)
    what exists.
    """
    n = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    j = tl.arange(0, WIDTH)
    return n, j, (n < count)[:, None] & (j < P)[None, :]


@jit
def load_bytes(
    view, ids, count, K, n, j, inside, S: tl.constexpr, p: tl.constexpr, C: tl.constexpr
):
    """Bytes of the patches n, (PATCHES, WIDTH), 0 where not inside. Offsets are int64: a batch may
    pass 2^31.
    """
    place = tl.load(ids + n, mask=n < count, other=0)
    y, x = place // (S // p), place % (S // p)
    first = (
        (n // K).to(tl.int64) * (S * S * C) + y * (p * S * C) + x * (p * C)
    )  # the patch's first byte
    within = (j // (p * C)) * (S * C) + j % (
        p * C
    )  # row j // (p*C) begins S*C bytes after the one above
    return tl.load(view + first[:, None] + within[None, :], mask=inside, other=0)


@jit
def normalise(x, j, SCALE: tl.constexpr, SHIFT: tl.constexpr, C: tl.constexpr):
    """byte * scale[c] + shift[c], c = j % C. Selected, not looked up: a table would be a load for
    each number.
    """
    scale, shift = tl.full(j.shape, SCALE[0], tl.float32), tl.full(j.shape, SHIFT[0], tl.float32)
    for c in tl.static_range(1, C):
        scale, shift = tl.where(j % C == c, SCALE[c], scale), tl.where(j % C == c, SHIFT[c], shift)
    return x.to(tl.float32) * scale[None, :] + shift[None, :]


@jit
def gather_kernel(
    view,
    ids,
    out,
    count,
    K,
    S: tl.constexpr,
    p: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    PATCHES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    P: tl.constexpr = p * p * C
    n, j, inside = tile_of(count, P, PATCHES, WIDTH)
    x = load_bytes(view, ids, count, K, n, j, inside, S, p, C)
    x = normalise(x, j, SCALE, SHIFT, C)  # (byte/255 - mean) / std
    tl.store(
        out + n.to(tl.int64)[:, None] * P + j[None, :], x.to(out.dtype.element_ty), mask=inside
    )


# ---- the operator: what torch.compile sees. No autograd: pixels go in ----------------------------


@torch.library.custom_op("animask::masked_patch_gather", mutates_args=())
def gather_op(view: Tensor, ids: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    view, ids = (
        view.contiguous(),
        ids.contiguous(),
    )  # ids.argsort(1)[:, :K] is not: other ids would be read
    S, C = view.shape[2:]
    scale, shift = byte_scale(C)
    out = torch.empty(*ids.shape, patch * patch * C, dtype=dtype, device=view.device)
    launch(
        gather_kernel,
        ids.numel(),
        out.shape[2],
        view,
        ids,
        out,
        ids.numel(),
        ids.shape[1],
        S=S,
        p=patch,
        C=C,
        SCALE=scale,
        SHIFT=shift,
    )
    return out


@gather_op.register_fake
def _(view, ids, patch, dtype):
    return view.new_empty(*ids.shape, patch * patch * view.shape[3], dtype=dtype)


# ---- the dispatcher ------------------------------------------------------------------------------


def masked_patch_gather(view, ids, patch, dtype=torch.float32, impl="auto"):
    """view u8 (B, S, S, C), ids i64 (B, K) -> normalised patches (B, K, P) of dtype. Not
    differentiable: pixels in.

    impl is "auto", "torch" or "triton"; see `kernels.choose_impl`. ValueError where shapes or ids
    do not fit.
    """
    check_patches(view, ids, patch)
    chosen, _ = choose_impl(impl, view.device)
    return (gather_op if chosen == "triton" else gather_reference)(view, ids, patch, dtype)
