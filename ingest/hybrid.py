"""Frames that are drawn, photographed, or both: what apps/segment.py learns to tell apart, for anybody to make.

    python data.py hybrid --out datasets/hybrid

Drawings come from ingest/toon.py. Photographs ship with scikit-learn, matplotlib, scikit-image and
PyWavelets. Each is in one split alone. Half of the photographed layers are a texture like a
photograph: dead leaves (Lee, Mumford & Huang 2001), lit, out of focus in places. Nothing but what
is shown may tell the two apart. So each layer takes mean and covariance of its colours from a layer
that may be of either kind (Reinhard et al. 2001 take mean and deviation of each channel, in the
colour space lαβ), and each finished frame the same grain and the same JPEG. The true mask, `drawn`,
is for judging: only the fully supervised arm learns from it.
"""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from common.door import require
from ingest import toon
from ingest.decode import open_picture

PURE = ("drawn", "photographed")
# A drawn figure before a photograph, a framed photograph in a drawing, the two side by side.
MIXED = ("figure_on_photo", "photo_in_drawing", "panels")
# No layer is in front of another. A drawing becomes a photograph little by little: the mask is how
# much of it is drawn. Clothes are cut from a photograph, and keep the drawn folds.
PURELY = ("soft_blend", "photo_clothes")
KINDS = PURE + MIXED + PURELY
PHOTOS = {  # file: (library, split, licence and author)
    "china.jpg": ("sklearn", "train", "CC BY 2.0, danielbuechele"),
    "astronaut.png": ("skimage", "train", "public domain, NASA"),
    "grace_hopper.jpg": ("matplotlib", "train", "public domain, US Navy"),
    "coins.png": ("skimage", "train", "no known restrictions, Brooklyn Museum"),
    "clock_motion.png": ("skimage", "train", "public domain, Stefan van der Walt"),
    "grass.png": ("skimage", "train", "CC0, linolafett"),
    "moon.png": ("skimage", "train", "public domain, NASA"),
    "hubble_deep_field.jpg": ("skimage", "train", "public domain, NASA"),
    "retina.jpg": ("skimage", "train", "CC0, Mikael Haggstrom"),
    "ihc.png": ("skimage", "train", "no known restrictions, CMMI"),
    "aero.npz": ("pywt", "train", "public domain"),
    "ascent.npz": ("pywt", "train", "public domain, public-domain-image.com"),
    "camera.png": ("skimage", "dev", "CC0, Lav Varshney"),
    "brick.png": ("skimage", "dev", "CC0, CC0Textures"),
    "flower.jpg": ("sklearn", "val", "CC BY 2.0, vultilion"),
    "chelsea.png": ("skimage", "val", "CC0, Stefan van der Walt"),
    "gravel.png": ("skimage", "val", "CC0, CC0Textures"),
    "coffee.png": ("skimage", "test", "CC0, Rachel Michetti"),
    "rocket.jpg": ("skimage", "test", "public domain, SpaceX"),
}
FOLDERS = {  # of a library: where its photographs are
    "sklearn": "datasets/images",
    "skimage": "data",
    "matplotlib": "mpl-data/sample_data",
    "pywt": "data",
}
COUNTS = {  # frames of each kind of PURE, of MIXED, of PURELY
    "train": (720, 240, 0),
    "dev": (60, 20, 20),
    "val": (96, 48, 48),
    "test": (96, 48, 48),
}
TEXTURES = 0.5  # of the photographed layers: made, not photographed
PALETTES = 64  # layers of each kind whose colours are dealt out


# ---- what is photographed ------------------------------------------------------------------------


def open_photos(split):
    """The photographs of a split -> list of pictures."""
    require("segment", *FOLDERS)  # they ship the photographs
    photos = []
    for name, (library, of, _) in PHOTOS.items():
        if of == split:
            folder = Path(find_spec(library).origin).parent / FOLDERS[library]
            photos.append(open_photo(folder / name).convert("RGB"))
    return photos


def open_photo(path):
    if path.suffix == ".npz":
        return Image.fromarray(np.uint8(np.load(path)["data"]))
    return open_picture(path)


def crop(photos, rng, size):
    """A square of one photo, turned, stretched, mirrored -> f32 (size, size, 3)."""
    photo = photos[rng.integers(len(photos))]
    angle = rng.normal(0, 20)
    stretch = np.exp(rng.normal(0, 0.15))
    reach = sum(abs(f(np.radians(angle))) for f in (np.cos, np.sin))  # of a turned square
    most = min(photo.width * stretch, photo.height / stretch) / reach
    scale = size / rng.uniform(min(size, most), most)
    shape = np.ceil([photo.width * stretch * scale, photo.height / stretch * scale]).astype(int)
    half = reach * size / 2
    centre = [rng.uniform(half, max(half, side - half)) for side in shape]
    turned = photo.resize(shape, Image.LANCZOS).rotate(angle, Image.BICUBIC, center=centre)
    left, top = (int(x) - size // 2 for x in centre)
    return np.float32(turned.crop((left, top, left + size, top + size)))[:, :: rng.choice([-1, 1])]


def clouds(rng, size, slope):
    """Noise whose amplitude falls as frequency^-slope -> (size, size), standard deviation 1."""
    fy = np.fft.fftfreq(size)[:, None]
    fx = np.fft.rfftfreq(size)[None]
    amplitude = np.maximum(np.hypot(fy, fx), 1 / size) ** -slope
    amplitude[0, 0] = 0
    phases = np.exp(2j * np.pi * rng.random(amplitude.shape))
    waves = np.fft.irfft2(amplitude * phases, (size, size))
    return waves / waves.std()


def surfaces(photos, rng, size):
    """Clouds and as many cuts of photographs -> list of f32 (size, size, 3), mean 0, std 1."""
    made = [np.repeat(clouds(rng, size, slope)[..., None], 3, 2) for slope in (0.6, 1.0, 1.6, 2.2)]
    cuts = (crop(photos, rng, size) for _ in made)
    return made + [(x - x.mean((0, 1))) / (x.std() + 1) for x in cuts]


def dead_leaves(photos, rng, size):
    """Ellipses and boxes of all sizes, with surfaces, light and shadows -> f32 (size, size, 3).

    Radii follow r^-3, so that it looks the same at all distances. Few large leaves are as smooth as
    a wall or a sky, many small ones as rough as gravel.
    """
    skins = surfaces(photos, rng, size)
    paints = rng.uniform(10, 245, (rng.integers(2, 7), 3))
    frame = paints[0] + rng.uniform(0, 60) * skins[rng.integers(len(skins))]
    y, x = np.mgrid[:size, :size]
    least = 0.02 * 10 ** rng.uniform(0, 1)
    for _ in range(int(1 / least * 10 ** rng.uniform(0, 1))):
        radius = size * min(0.5, least / np.sqrt(1 - rng.random()))
        cy, cx = rng.uniform(0, size, 2)
        angle = rng.uniform(0, np.pi)
        ratio = rng.uniform(0.1, 1)
        top, left = (int(max(0, c - 1.5 * radius)) for c in (cy, cx))
        here = np.s_[top : int(cy + 1.5 * radius) + 2, left : int(cx + 1.5 * radius) + 2]
        dy, dx = (y[here] - cy) / radius, (x[here] - cx) / radius
        u = dx * np.cos(angle) + dy * np.sin(angle)
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / ratio
        n = rng.choice([2, 4, 20])  # 2: an ellipse, 20: a box
        far = ((np.abs(u) ** n + np.abs(v) ** n) ** (1 / n))[..., None]
        inside = np.clip((1 - far) * radius * ratio, 0, 1)  # a soft rim of a pixel
        light = 1 + rng.uniform(0, 0.7) * (u * rng.normal() + v * rng.normal())
        light = light - rng.uniform(0, 0.4) * (u**2 + v**2)
        strength = rng.uniform(0, 50)
        skin = skins[rng.integers(len(skins))]
        skin = strength * np.roll(skin, rng.integers(size, size=2), (0, 1))[here]
        frame[here] *= 1 - rng.uniform(0, 0.8) * np.clip(3 * (1.3 - far), 0, 1)  # its shadow
        paint = paints[rng.integers(len(paints))]
        frame[here] += inside * (paint * light[..., None] + skin - frame[here])
    return np.float32(frame.clip(0, 255))


def defocus(frame, rng):
    """Blur a frame where smooth noise says that it is far from the focus -> f32, the same shape."""
    size = len(frame)
    blur = ImageFilter.GaussianBlur(size * 0.06 * rng.random() ** 2)
    blurred = np.float32(Image.fromarray(np.uint8(frame)).filter(blur))
    far = 1 / (1 + np.exp(-2 * clouds(rng, size, 2.0) - rng.normal()))[..., None]
    return np.float32(frame + far * (blurred - frame))


def photographed(photos, rng, size):
    return defocus((dead_leaves if rng.random() < TEXTURES else crop)(photos, rng, size), rng)


# ---- nothing but what is shown tells the two apart -----------------------------------------------


def statistics(layer):
    """f32 (., ., 3) -> mean (3), Cholesky factor (3, 3) of the covariance of its colours."""
    x = layer.reshape(-1, 3).astype(np.float64)
    return x.mean(0), np.linalg.cholesky(np.cov(x.T) + 4 * np.eye(3))


def recolour(layer, palette):
    """The same layer with another's mean and covariance of colours, out of (0, 255) cut off -> f32."""
    mean, root = statistics(layer)
    their_mean, their_root = palette
    plain = (layer - mean) @ np.linalg.inv(root).T
    return np.float32((plain @ their_root.T + their_mean).clip(0, 255))


def develop(frame, rng):
    """The camera of all frames: grain, uneven film, a JPEG of some quality -> u8."""
    size = len(frame)
    grain = rng.normal(0, 1, (size, size, 3)) * rng.uniform(0.3, 1)
    grain = grain + rng.normal(0, 1, (size, size, 1))
    if rng.random() < 0.5:  # coarse grain
        below, right, both = (np.roll(grain, *by) for by in ((1, 0), (1, 1), ((1, 1), (0, 1))))
        grain = (grain + below + right + both) / 2
    slope = rng.uniform(0.4, 1.2)
    gray, colour = rng.uniform(0, 8, 2)
    film = gray * clouds(rng, size, slope)[..., None]
    film = film + colour * np.stack([clouds(rng, size, slope) for _ in "rgb"], 2)
    noisy = frame + film + rng.uniform(3, 10) * grain / grain.std()
    noisy = Image.fromarray(np.uint8(noisy.round().clip(0, 255)))
    file = io.BytesIO()
    quality = int(rng.integers(50, 91))
    noisy.save(file, "JPEG", quality=quality, subsampling=int(rng.choice([0, 2])))
    return np.asarray(open_picture(file))


# ---- frames --------------------------------------------------------------------------------------


def plan(seed=0):
    """-> items {key, kind, split, seed, who} for draw()."""
    people = toon.cast(seed=seed)
    items = []
    for split, counts in COUNTS.items():
        for kinds, count in zip((PURE, MIXED, PURELY), counts, strict=True):
            for kind in np.repeat(kinds, count).tolist():
                n = len(items)
                item = {"key": f"{kind}/{n:05d}", "kind": kind, "split": split}
                items.append(item | {"seed": (seed, n), "who": people[n % len(people)]})
    return items


def palettes(seed=0):
    """Colours of layers of both kinds, of the train photographs -> list for recolour()."""
    rng = np.random.default_rng((seed, 7))
    photos = open_photos("train")
    drawn = [toon.draw(item, 32)["image"] for item in toon.plan(PALETTES, seed=seed)]
    taken = [photographed(photos, rng, 64) for _ in range(PALETTES)]
    return [statistics(layer) for layer in drawn + taken]


def ramp(rng, size, width):
    """A straight border through the middle third, `width` pixels wide -> (size, size), 0 to 1."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size]
    along = (x - size / 2) * np.cos(angle) + (y - size / 2) * np.sin(angle)
    return np.clip(0.5 + (along - rng.uniform(-1, 1) * size / 6) / width, 0, 1)


def window(rng, size):
    """Where a rectangle or an ellipse is, and its rim -> two (size, size) in 0 to 1."""
    y, x = (2 * np.mgrid[:size, :size] + 1) / size - 1
    cy, cx = rng.uniform(-0.4, 0.4, 2)
    h, w = rng.uniform(0.35, 0.7, 2)
    u = np.abs(y - cy) / h
    v = np.abs(x - cx) / w
    n = rng.choice([2, 20])  # 2: an ellipse, 20: a rectangle
    reach = (1 - (u**n + v**n) ** (1 / n)) * min(h, w) * size / 2  # about pixels from the border
    rim = rng.uniform(1, 4) * size / 128
    return np.clip(reach + 0.5, 0, 1), np.clip(reach + rim + 0.5, 0, 1)


def mix(kind, figure, drawing, photo, rng):
    """Two layers (S, S, 3) -> frame f32 (S, S, 3), how much of each pixel is drawn (S, S)."""
    size = len(drawing)
    white = np.ones(drawing.shape[:2])
    if kind in ("drawn", "photographed"):
        share = white * (kind == "drawn")
    elif kind == "figure_on_photo":
        share = figure["fg"] / 255
    elif kind == "photo_in_drawing":
        inside, framed = window(rng, size)
        ink = rng.uniform(0, 60) if rng.random() < 0.5 else 255
        drawing = drawing + framed[..., None] * (ink - drawing)
        share = 1 - inside
    elif kind == "panels":
        share = ramp(rng, size, 1)
    elif kind == "soft_blend":
        share = ramp(rng, size, size * rng.uniform(0.25, 0.6))
    else:
        share = 1 - (figure["parts"] == toon.PARTS.index("clothes"))
        light = drawing[share == 0].mean() if (share == 0).any() else 1
        folds = drawing.mean(2, keepdims=True) / max(1, light)
        photo = photo * (0.4 + 0.6 * folds.clip(0, 1.5))
    return photo + share[..., None] * (drawing - photo), share


def draw(item, size, photos, colours):
    """An item of a plan -> {image u8 (S, S, 3), drawn u8 (S, S), 255 where drawn, style}."""
    rng = np.random.default_rng(item["seed"])
    for _ in range(20):
        item_seed = (*item["seed"], int(rng.integers(2**31)))
        figure = toon.draw({"who": item["who"], "seed": item_seed}, size)
        clothes = figure["parts"] == toon.PARTS.index("clothes")
        if item["kind"] != "photo_clothes" or clothes.mean() > 0.08:  # enough is in sight
            break
    layers = figure["image"].astype(np.float32), photographed(photos[item["split"]], rng, size)
    drawing, photo = (recolour(layer, colours[rng.integers(len(colours))]) for layer in layers)
    frame, share = mix(item["kind"], figure, drawing, photo, rng)
    mask = np.uint8(255 * share + 0.5)
    return {"image": develop(frame, rng), "drawn": mask, "style": figure["style"]}
