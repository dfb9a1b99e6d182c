"""Pixels as numbers: the two constants of each colour, which kernels and references share."""

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, so that public checkpoints can be used as they are
STD = (0.229, 0.224, 0.225)
# (byte / 255 - mean) / std = byte * SCALE + SHIFT: one product and one sum for each number. Kernel
# and reference take the same two constants, so that they differ by rounding alone.
SCALE = tuple(1 / (255 * s) for s in STD)
SHIFT = tuple(-m / s for m, s in zip(MEAN, STD, strict=True))
