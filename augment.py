"""What is done to a view so that no two epochs look alike: colour, cutout, mixup and cutmix. Tensors in, tensors out.

Views are u8 (B, S, S, 3) on any device and stay so: the encoder reads bytes. Crop and flip are loader.py's. All chance
comes from a CPU generator, so that a resumed run draws the same.
"""

import numpy as np
import torch

import loader

GRAY = 128


def uniform(n, low, high, generator, device):
    """(n, 1, 1, 1) numbers in [low, high]."""
    return (low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)).to(device)


def jitter_colour(view, strength, generator):
    """Brightness, contrast, saturation times factors in 1 +- strength, one a picture. Hue stays: it tells who it is."""
    light, contrast, saturation = (
        uniform(len(view), 1 - strength, 1 + strength, generator, view.device) for _ in range(3)
    )
    x = view.float()
    gray = (x * x.new_tensor([0.299, 0.587, 0.114])).sum(3, keepdim=True)
    x = gray + saturation * (x - gray)
    middle = x.mean((1, 2, 3), keepdim=True)
    return ((middle + contrast * (x - middle)) * light).round_().clamp_(0, 255).to(torch.uint8)


def boxes_of(n, share, S, generator):
    """(n, S, S) bool, one square of `share` of the area each, somewhere whole inside the picture."""
    side = round(S * share**0.5)
    top, left = torch.randint(0, S - side + 1, (2, n, 1), generator=generator)
    at = torch.arange(S)
    rows, columns = (at >= top) & (at < top + side), (at >= left) & (at < left + side)
    return rows[:, :, None] & columns[:, None, :]


def cutout(view, share, generator):
    """A gray square over `share` of each picture (DeVries and Taylor 2017, arXiv:1708.04552)."""
    hole = boxes_of(len(view), share, view.shape[1], generator).to(view.device)
    return view.masked_fill(hole[..., None], GRAY)


def mix(view, targets, mixup, cutmix, generator):
    """Each picture with another of the batch, targets (B, C) alike; mixup and cutmix are the alphas of Beta, 0 is off.

    Mixup blends (Zhang et al. 2018, arXiv:1710.09412), cutmix pastes a square (Yun et al. 2019, arXiv:1905.04899);
    with both on, each batch draws which.
    """
    chance = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    order = torch.randperm(len(view), generator=generator).to(view.device)
    paste = cutmix > 0 and (mixup == 0 or chance.random() < 0.5)
    alpha = cutmix if paste else mixup
    share = float(chance.beta(alpha, alpha))  # of the own picture
    if paste:
        hole = boxes_of(1, 1 - share, view.shape[1], generator).to(view.device)
        share = 1 - hole.float().mean().item()
        view = torch.where(hole[..., None], view[order], view)
    else:
        view = (share * view.float() + (1 - share) * view[order].float()).round_().to(torch.uint8)
    return view, share * targets + (1 - share) * targets[order]


def augmented(batch, targets, args, S, draws):
    """images u8 (B, ., ., 3), targets (B, C) -> view u8 (B, S, S, 3), targets. All chance is drawn on the CPU."""
    if not args.augment:
        return loader.view_images(batch, *loader.full_boxes(len(batch)), S), targets
    view = loader.view_images(batch, *loader.draw_boxes(len(batch), draws, args.min_crop), S)
    if args.colour:
        view = jitter_colour(view, args.colour, draws)
    if args.mixup or args.cutmix:
        view, targets = mix(view, targets, args.mixup, args.cutmix, draws)
    return (cutout(view, args.cutout, draws) if args.cutout else view), targets
