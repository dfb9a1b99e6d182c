"""The Triton kernels of patches.py: gather, detail, error and its gradient. Only a GPU needs this file.

Beside each kernel stands its reference in patches.py, in plain PyTorch; tests compare them. A program
of the GPU has some patches of p x p pixels, each cut into strips, and each strip into three pieces:

    one patch of 16 px, row by row          its numbers, as a program holds them
    +--------------------------------+      x[0]  x[1]  x[2]      three blocks
    | R G B R G B R G ...    16 px   |  ->  16 +  16 +  16        WIDTH lanes each: 48 numbers of a strip
    | R G B R G B R G ...            |      16 +  16 +  16        STRIPS of them: one for each row
    | ...                            |      ...                   PATCHES times this in one program
    +--------------------------------+

So a block is (PATCHES, STRIPS, WIDTH), and a thread loads a piece of 16 bytes at once. Triton's blocks
have powers of 2 as sizes, and the 3 * 16 numbers of a strip are none. Flat patches of 768 numbers would
take 1,024 lanes, a quarter of them idle, and the colour of a lane's number would have to be computed. In
three blocks it is constant: that of number i of piece c is (16 c + i) % 3.

Bytes for n = B*M patches of P = p*p*3 numbers: the gather reads n*P bytes and writes n*P numbers. At 224
px, p 16, K 49 in bf16 that is 0.04 + 0.08 MB a view. To convert, scale and cut the whole view first moves
about 5 MB. The loss makes e of x and y, and dL/dy of dL/de; weights and sums of a number for each patch
stay in PyTorch. Forward reads x and y and leaves mean and std of x, backward reads x and y again and
writes dL/dy in the dtype of y. These are n * P * (2 + 3 * size), 1.85 GB for B 2048, M 147, P 768 in bf16.
To write dL/dy in the forward pass would be no less: it would have to be read again and multiplied by
what is then made of the loss.
"""

import os
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import jit
from triton.language import constexpr

from kernels import SCALE, SHIFT

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 2**16 if INTERPRET else 2**11  # pixels per program; the interpreter is slow per program
RED, GREEN, BLUE = map(constexpr, zip(SCALE, SHIFT, strict=True))  # pairs


# ---- how patches are shared out ------------------------------------------------------------------


def tile(p):
    """The sizes of a program for patches of p x p pixels; strips are rows of a patch, or 16 px of one."""
    piece = 16 if p % 16 == 0 else p  # numbers of a piece: as many as a strip has pixels
    strips, width = triton.next_power_of_2(p * p // piece), triton.next_power_of_2(piece)
    patches = max(1, TILE // (strips * width))
    warps = min(32, max(4, patches * strips * width // 512))
    return dict(piece=piece, PATCHES=patches, STRIPS=strips, WIDTH=width, num_warps=warps)


def launch(kernel, ids, p, *args, **constants):
    """Run a kernel over all patches ids (B, K) of p x p pixels."""
    # CUDA refuses a grid of no programs.
    if ids.numel() == 0:
        return
    shape = tile(p)
    programs = triton.cdiv(ids.numel(), shape["PATCHES"])
    # Triton launches on the current GPU, which need not be the one that holds the tensors.
    with torch.cuda.device_of(ids):  # without effect on a CPU
        kernel[(programs,)](*args, p=p, **constants, **shape)


# ---- the gather ----------------------------------------------------------------------------------
# A program holds PATCHES patches, each of STRIPS strips. Their
# numbers are three blocks (PATCHES, STRIPS, WIDTH), one for each piece of a strip: x[0], x[1], x[2].
# side, p and piece are constants, so that the compiler sees that 16 lanes read 16 bytes at an address that
# 16 divides, and knows the colour of every number.


@jit
def lanes_of(
    ids,
    count,
    K,
    side: constexpr,
    p: constexpr,
    piece: constexpr,
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
    row = place // (side // p) * p + strip // (p // piece)
    column = place % (side // p) * p + strip % (p // piece) * piece
    byte = (n // K).to(tl.int64) * (side * side * 3) + row * (side * 3) + column * 3 + i
    number = n.to(tl.int64) * (p * p * 3) + strip * (piece * 3) + i
    return n, i, byte, number, (strip < p * p // piece) & (i < piece)


@jit
def load_pieces(at, mask, piece: constexpr):
    """The three pieces of which the first begins at this pointer."""
    a = tl.load(at, mask=mask, other=0)
    b = tl.load(at + piece, mask=mask, other=0)
    c = tl.load(at + 2 * piece, mask=mask, other=0)
    return a, b, c


@jit
def normalise(x, i, piece: constexpr):
    """byte * SCALE[c] + SHIFT[c]. A strip begins with the red of a pixel."""
    return (
        normalised(x[0], i % 3),
        normalised(x[1], (piece + i) % 3),
        normalised(x[2], (2 * piece + i) % 3),
    )


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
    side: constexpr,
    p: constexpr,
    piece: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, number, inside = lanes_of(ids, count, K, side, p, piece, PATCHES, STRIPS, WIDTH)
    mask = (n < count) & inside
    x = normalise(load_pieces(view + byte, mask, piece), i, piece)  # (byte/255 - mean) / std
    for c in tl.static_range(3):
        tl.store(out + number + c * piece, x[c].to(out.dtype.element_ty), mask=mask)
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
    launch(
        gather_kernel, ids, patch, *tensors, ids.numel(), ids.shape[1], floor, side=view.shape[2]
    )
    return out, mean, std


@gather_op.register_fake
def _(view, ids, patch, dtype, floor):
    # torch.compile runs this in place of the kernel, to learn shape and dtype of what will come.
    out = view.new_empty(*ids.shape, patch * patch * 3, dtype=dtype)
    return out, *(view.new_empty(ids.shape, dtype=torch.float32) for _ in range(2))


# ---- the loss ------------------------------------------------------------------------------------


@jit
def detail_kernel(
    view,
    ids,
    detail,
    count,
    M,
    side: constexpr,
    p: constexpr,
    piece: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, _, inside = lanes_of(ids, count, M, side, p, piece, PATCHES, STRIPS, WIDTH)
    x = load_pieces(view + byte, (n < count) & inside, piece)
    # d is a small difference of large numbers, exact only in integers: up to 104 px they fit into
    # int32. Their products with the number of pixels do not, and are int64.
    a = x[0].to(tl.int32)
    b = x[1].to(tl.int32)
    c = x[2].to(tl.int32)
    spread = sum_of_patch(a * a + b * b + c * c, inside).to(tl.int64) * (p * p)  # n sum_c Q_c
    for colour in tl.static_range(3):
        some = tl.where(i % 3 == colour, a, 0)
        some += tl.where((piece + i) % 3 == colour, b, 0)
        some += tl.where((2 * piece + i) % 3 == colour, c, 0)
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
    side: constexpr,
    p: constexpr,
    piece: constexpr,
    NORM_PIX: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, number, inside = lanes_of(ids, count, M, side, p, piece, PATCHES, STRIPS, WIDTH)
    mask = (n < count) & inside
    x = normalise(load_pieces(view + byte, mask, piece), i, piece)
    m, s = mean_and_std_of(x, inside, p, floor)
    tl.store(mean + n, m, mask=n < count)
    tl.store(std + n, s, mask=n < count)
    squares = 0.0
    # y is not loaded before: it would double the registers of a thread, and halve the threads.
    for c in tl.static_range(3):
        target = (x[c] - m) * (1 / s) if NORM_PIX else x[c]
        y = tl.load(pred + number + c * piece, mask=mask, other=0).to(tl.float32)
        diff = y - target
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
    side: constexpr,
    p: constexpr,
    piece: constexpr,
    NORM_PIX: constexpr,
    PATCHES: constexpr,
    STRIPS: constexpr,
    WIDTH: constexpr,
):
    n, i, byte, number, inside = lanes_of(ids, count, M, side, p, piece, PATCHES, STRIPS, WIDTH)
    mask = (n < count) & inside
    x = normalise(load_pieces(view + byte, mask, piece), i, piece)
    m = tl.load(mean + n, mask=n < count, other=0)
    s = tl.load(std + n, mask=n < count, other=1)
    factor = tl.load(slope + n, mask=n < count, other=0) * (2 / (p * p * 3))
    for c in tl.static_range(3):
        target = (x[c] - m) * (1 / s) if NORM_PIX else x[c]
        y = tl.load(pred + number + c * piece, mask=mask, other=0).to(tl.float32)
        # Only the product is rounded: in fp16 the factor alone might be 0.
        g = (factor * (y - target)).to(gradient.dtype.element_ty)
        tl.store(gradient + number + c * piece, g, mask=mask)


# ---- the operators of the loss, and its gradient -------------------------------------------------


@torch.library.custom_op("animask::patch_detail", mutates_args=())
def detail_op(view: Tensor, ids: Tensor, patch: int) -> Tensor:
    view, ids = view.contiguous(), ids.contiguous()
    detail = torch.empty(ids.shape, dtype=torch.float32, device=view.device)
    M = ids.shape[1]
    launch(detail_kernel, ids, patch, view, ids, detail, ids.numel(), M, side=view.shape[2])
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
    constants = dict(side=view.shape[2], NORM_PIX=norm_pix)
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
    """slope (B, M), dL/de -> dL/dy (B, M, P) = slope * 2 (y - z) / P."""
    slope, pred, view, ids = (x.contiguous() for x in (slope, pred, view, ids))
    gradient = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    tensors = (slope, pred, view, ids, mean, std, gradient)
    constants = dict(side=view.shape[2], NORM_PIX=norm_pix)
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
