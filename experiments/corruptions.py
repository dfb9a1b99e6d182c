"""Ways to spoil a picture, as pure functions: images u8 (B, S, S, 3), a level, a CPU generator -> u8 (B, S, S, 3).

Lengths are in pixels of a 128 px picture and grow with the picture.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import LUMA
from finetune_lora import GRAY, cutout
from ingest.decode import open_picture


def to_u8(x):
    return x.round().clamp(0, 255).to(torch.uint8)


def channels_last(x):
    """fp32 (B, C, S, S) -> u8 (B, S, S, 3)."""
    return to_u8(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def luminance(images):
    """-> fp32 (B, 1, S, S)."""
    return (images.float() @ torch.tensor(LUMA, device=images.device))[:, None]


def paint(images, where):
    """where (B, S, S) bool turns gray."""
    return torch.where(where[..., None].to(images.device), images.new_tensor(GRAY), images)


def moved(where, generator):
    """The same shapes (B, S, S) at random places, wrapped around: as much area, but of nothing in
    particular.
    """
    shifts = torch.randint(where.shape[1], (len(where), 2), generator=generator).tolist()
    return torch.stack([w.roll(shift, (0, 1)) for w, shift in zip(where, shifts, strict=True)])


def turned(images, degrees, factor):
    """Turned around the centre and enlarged by a factor; the border is repeated where nothing is
    known.
    """
    a = math.radians(degrees)
    matrix = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]) / factor
    x = images.permute(0, 3, 1, 2).float()
    at = F.affine_grid(matrix.to(x).expand(len(x), 2, 3), x.shape, align_corners=False)
    return channels_last(F.grid_sample(x, at, "bilinear", "border", align_corners=False))


def blur(images, level, generator):
    """Gaussian of this std."""
    sigma = level * images.shape[1] / 128
    reach = min(math.ceil(3 * sigma), images.shape[1] - 1)
    line = torch.exp(
        -(torch.arange(-reach, reach + 1, device=images.device).float() ** 2) / (2 * sigma**2)
    )
    line = line / line.sum()
    x = images.permute(0, 3, 1, 2).float()
    y = F.pad(x, (reach,) * 4, "reflect").flatten(0, 1)[:, None]
    return channels_last(
        F.conv2d(F.conv2d(y, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1)).view_as(x)
    )


def jpeg(images, level, generator):
    result = []
    for picture in images.cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=int(level))
        result.append(np.array(open_picture(file)))
    return torch.from_numpy(np.stack(result)).to(images.device)


def hue(images, level, generator):
    """Colours turned around the gray axis by this angle: brightness (the mean of red, green, blue)
    stays.
    """
    a = math.radians(level)
    turn = torch.full((3, 3), (1 - math.cos(a)) / 3) + math.cos(a) * torch.eye(3)
    turn += math.sin(a) / math.sqrt(3) * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return to_u8(images.float() @ turn.T.to(images.device))


def grayscale(images, level, generator):
    return channels_last(luminance(images))


def line_art(images, level, generator):
    """What is darker than its brightest neighbour, dark on white: lines and edges stay, colour and
    shade go.
    """
    gray = luminance(images)
    return channels_last(255 - 3 * (F.max_pool2d(gray, 3, 1, 1) - gray))


SWEEPS = {  # name: (function, levels, what a level is, the level of the headline table)
    "cutout": (cutout, (0.1, 0.2, 0.3, 0.4, 0.5), "share of the area", 0.3),
    "rotation": (
        lambda images, level, _: turned(images, level, 1.0),
        (10, 20, 45, 90, 180),
        "degrees",
        20,
    ),
    "scale": (
        lambda images, level, _: turned(images, 0.0, level),
        (0.5, 0.75, 1.25, 1.5, 2.0),
        "factor",
        0.75,
    ),
    "blur": (blur, (0.5, 1, 2, 4), "std, px of 128", 1),
    "jpeg": (jpeg, (75, 50, 25, 10, 5), "quality", 25),
    "hue": (hue, (15, 30, 60, 120, 180), "degrees", 60),
    "grayscale": (grayscale, (1,), "", 1),
    "line art": (line_art, (1,), "", 1),
}
