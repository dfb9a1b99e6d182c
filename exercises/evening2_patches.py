"""Evening 2: from bytes to patches, by loops, by reshape, and by a kernel.

A picture is stored as bytes (s, s, 3): row, column, colour. The encoder wants patches, each a vector of P = p * p * 3
numbers in the order (row, column, colour), normalised by the mean and deviation of each colour in ImageNet:
(byte / 255 - MEAN[c]) / STD[c] (`gather` in kernels/patches.py). You write this three times. Loops are slow and
surely right, and a reshape is what a CPU runs. A GPU can do better: only a quarter of the patches is visible, so a
kernel reads the bytes of these alone. A Triton kernel is a Python function that runs once for each *program*, and a
program works on a block of numbers at once, one in each *lane*. TRITON_INTERPRET=1 makes Triton run the programs
on the CPU, one after the other, so no GPU is needed. It is set first, before anything imports Triton.

    s = g * p side of a picture in pixels   p side of a patch   N = g * g patches, numbered row by row
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kernels import MEAN, STD

try:
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # macOS has no Triton: the check leaves the three kernels out
    jit, tl, constexpr = (lambda kernel: kernel), None, None


def one_patch(picture, place, p):
    """picture u8 (s, s, 3), place from 0 to N - 1 -> the normalised numbers of that patch, fp32 (P,), by loops."""
    raise NotImplementedError


def all_patches(view, p):
    """view u8 (B, s, s, 3) -> all patches of each picture, normalised, fp32 (B, N, P), without a loop."""
    raise NotImplementedError


@jit
def copy_kernel(x, out, BLOCK: constexpr):
    """Copies x to out. Each program copies BLOCK numbers; tl.arange wants a power of 2.

        program    0          1          2              tl.program_id(0)
        lane       0 1 2 3    0 1 2 3    0 1 2 3        tl.arange(0, BLOCK), here with BLOCK = 4
        number     0 1 2 3    4 5 6 7    8 9 10 11      what a lane reads and writes

    x and out are addresses: tl.load(x + number) reads a block, and tl.store(out + number, block) writes it.
    """
    raise NotImplementedError


@jit
def half_kernel(x, out, n, BLOCK: constexpr):
    """out = x / 2, for the first n numbers alone.

        program    0          1
        number     0 1 2 3    4 5 . .                   n = 6

    Lanes without a number (.) must neither read nor write: tl.load and tl.store take a `mask`, such as number < n.
    """
    raise NotImplementedError


@jit
def patch_kernel(picture, ids, scale, shift, out, g, p, BLOCK: constexpr):
    """Program k writes patch ids[k] of picture u8 (s, s, 3) to out (K, P), normalised: byte * scale[c] + shift[c].

        lane         0 1 2  3 4 5 | 6 7 8  9 10 11 | 12 13 14 15      p = 2, P = 12, BLOCK = 16
        colour c     0 1 2  0 1 2 | 0 1 2  0 1  2  |  .  .  .  .
        pixel row    0 0 0  0 0 0 | 1 1 1  1 1  1  |  .  .  .  .      within the patch

    All arguments but g, p and BLOCK are addresses. BLOCK is a power of 2, and at least P. A row of the picture has
    g * p * 3 bytes, and the patch at place n begins in pixel row n // g * p. Bytes become numbers by `.to(tl.float32)`.
    """
    raise NotImplementedError


# Answer in words:
# 1. With p = 16, how many bytes of a patch lie side by side in memory? How many if pictures were (3, s, s)?
# 2. 16 of 64 patches are visible. How many bytes does the kernel read, how many does it write (fp32)? And how many
#    are read and written if the whole picture is normalised first, and the patches are picked then?
