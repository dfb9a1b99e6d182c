"""Evening 2: a solution, another one in other words, and wrong ones. Run it with TRITON_INTERPRET=1."""

import torch
import triton.language as tl
from triton import jit
from triton.language import constexpr

from kernels import MEAN, STD


def one_patch(picture, place, p):
    g = picture.shape[0] // p
    top, left = place // g * p, place % g * p
    numbers = []
    for row in range(p):
        for column in range(p):
            for c in range(3):
                byte = picture[top + row, left + column, c].item()
                numbers.append((byte / 255 - MEAN[c]) / STD[c])
    return torch.tensor(numbers)


def all_patches(view, p):
    B, s = view.shape[:2]
    g = s // p
    x = (view / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return x.reshape(B, g, p, g, p, 3).transpose(2, 3).reshape(B, g * g, p * p * 3)


@jit
def copy_kernel(x, out, BLOCK: constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + number, tl.load(x + number))


@jit
def half_kernel(x, out, n, BLOCK: constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + number, tl.load(x + number, mask=number < n) / 2, mask=number < n)


@jit
def bytes_of(picture, place, lane, g, p):
    row = place // g * p + lane // (3 * p)
    byte = picture + row * g * p * 3 + place % g * p * 3 + lane % (3 * p)
    return tl.load(byte, mask=lane < p * p * 3).to(tl.float32)


@jit
def patch_kernel(picture, ids, scale, shift, out, g, p, BLOCK: constexpr):
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    mask = lane < p * p * 3
    c = lane % 3
    x = bytes_of(picture, tl.load(ids + k), lane, g, p)
    x = x * tl.load(scale + c) + tl.load(shift + c)
    tl.store(out + k * p * p * 3 + lane, x, mask=mask)


def one_patch_by_slices(picture, place, p):
    row, column = divmod(place, len(picture) // p)
    cut = picture[p * row : p * (row + 1), p * column : p * (column + 1)].numpy()
    return torch.tensor((cut / 255 - MEAN) / STD, dtype=torch.float32).flatten()


def all_patches_by_unfold(view, p):
    x = view.float().sub_(255 * torch.tensor(MEAN)).div_(255 * torch.tensor(STD))
    return x.unfold(1, p, p).unfold(2, p, p).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


@jit
def patch_kernel_by_pixels(picture, ids, scale, shift, out, g, p, BLOCK: constexpr):
    """Lanes are pixels, and the colours come one after the other."""
    pixel = tl.arange(0, BLOCK)
    inside = pixel < p * p
    place = tl.load(ids + tl.program_id(0)).to(tl.int32)
    first = (place // g * p + pixel // p) * (g * p) + place % g * p + pixel % p
    for c in tl.static_range(3):
        x = tl.load(picture + 3 * first + c, mask=inside, other=0).to(tl.float32)
        x = x * tl.load(scale + c) + tl.load(shift + c)
        tl.store(out + (tl.program_id(0) * p * p + pixel) * 3 + c, x, mask=inside)


@jit
def copies_the_first(x, out, BLOCK: constexpr):
    number = tl.arange(0, BLOCK)
    tl.store(out + number, tl.load(x + number))


@jit
def half_without_a_mask(x, out, n, BLOCK: constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + number, tl.load(x + number) / 2)


@jit
def patch_without_a_mask(picture, ids, scale, shift, out, g, p, BLOCK: constexpr):
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    x = bytes_of(picture, tl.load(ids + k), lane, g, p)
    x = x * tl.load(scale + lane % 3) + tl.load(shift + lane % 3)
    tl.store(out + k * p * p * 3 + lane, x, mask=k * p * p * 3 + lane < 4 * p * p * 3)


@jit
def patch_of_thirds(picture, ids, scale, shift, out, g, p, BLOCK: constexpr):
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    mask = lane < p * p * 3
    c = lane // (p * p)
    x = bytes_of(picture, tl.load(ids + k), lane, g, p)
    x = x * tl.load(scale + c, mask=mask) + tl.load(shift + c, mask=mask)
    tl.store(out + k * p * p * 3 + lane, x, mask=mask)


def normal(view):
    return (view / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


OTHER = {
    "one_patch": one_patch_by_slices,
    "all_patches": all_patches_by_unfold,
    "patch_kernel": patch_kernel_by_pixels,
}
WRONG = [
    (
        "one_patch",
        lambda x, place, p: one_patch(x, place % 3 * 3 + place // 3, p),
        "place are swapped",
    ),
    ("one_patch", lambda x, place, p: one_patch(x.transpose(0, 1), 7, p), "column by column"),
    ("one_patch", lambda x, place, p: one_patch(255 * x.int(), place, p), "divided by 255"),
    (
        "one_patch",
        lambda x, place, p: one_patch(x, place, p).view(p, p, 3),
        "found float (4, 4, 3)",
    ),
    ("all_patches", lambda view, p: normal(view).reshape(2, 9, 48), "into strips"),
    (
        "all_patches",
        lambda view, p: all_patches(view, p).unflatten(2, (16, 3)).transpose(2, 3).flatten(2),
        "the colour comes first",
    ),
    ("copy_kernel", copies_the_first, "Found 0 where"),
    ("half_kernel", half_without_a_mask, "the store has no mask"),
    ("patch_kernel", patch_without_a_mask, "Lanes from 48 on write"),
    ("patch_kernel", patch_of_thirds, "has one colour"),
]
