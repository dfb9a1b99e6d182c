"""Fused masked-patch gather: only the patches that are kept are read, converted and written.

    out[b, j, (r, q, c)] = (view[b, y*p + r, x*p + q, c] / 255 - mean[c]) / std[c],   (y, x) = divmod(ids[b, j], g)

Bytes: reads K/N of the uint8 view, writes B*K*P numbers of the compute dtype. The obvious way (normalise the whole
view, cut it into patches, index them) moves the whole view in floating point twice, then drops three quarters.

The result feeds a plain matrix product with the patch embedding; a patch flattens to (row, column, colour).
"""

import torch

from kernels import choose_impl

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, so that public checkpoints can be used as they are
STD = (0.229, 0.224, 0.225)


def scale_shift(width, device):
    """(width,) each: x*scale + shift is the normalised value of byte x; width is any multiple of 3, colour fastest."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    repeat = width // 3
    return (1 / (255 * std)).repeat(repeat).to(device), (-mean / std).repeat(repeat).to(device)


def patch_bytes(view, ids, patch):
    """view u8 (B, S, S, 3), ids i64 (B, K) -> the raw bytes of those patches, u8 (B, K, P)."""
    B, S = view.shape[:2]
    g = S // patch
    grid = view.reshape(B, g, patch, g, patch * 3)  # (batch, patch row, row, patch column, column and colour)
    image = torch.arange(B, device=view.device)[:, None]
    return grid[image, ids // g, :, ids % g].flatten(2)  # index dimensions come first: (B, K, p, 3p)


def gather_reference(view, ids, patch, dtype=torch.float32):
    """The formula above in PyTorch: (B, S, S, 3), (B, K) -> (B, K, P) of dtype."""
    scale, shift = scale_shift(patch * patch * 3, view.device)
    return torch.addcmul(shift, patch_bytes(view, ids, patch), scale).to(dtype)


def masked_patch_gather(view, ids, patch, dtype=torch.float32, impl="auto"):
    """view u8 (B, S, S, 3), ids i64 (B, K) -> normalised patches (B, K, P) of dtype. Not differentiable: pixels in.

    impl is "auto", "torch" or "triton"; see `kernels.choose_impl`.
    """
    choose_impl(impl, view.device)
    return gather_reference(view, ids, patch, dtype)
