"""From the bytes of a picture file, whatever it is, to a square of uint8: decode(data, size, ...).

EXIF rotation, palettes, grays of 16 bits, CMYK, animations (their first frame) and transparency all
end as RGB. What can't be read raises. What Pillow warns of is read, and told with its name.
"""

import contextlib
import io
import math
import os
import re
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.train import UserError
from ingest.layouts import counted

# Of Pillow's 40 formats. EPS is not among them: Pillow gives it to Ghostscript to be run.
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
FORMATS += ["AVIF"] * (find_spec("PIL.AvifImagePlugin") is not None)  # from Pillow 11.3
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it raises from 178 megapixels on
# A warning without a name is of no use: decode_records names the picture.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
PACKED = 128  # side of packed pictures, unless --size or larger views ask for another
PAPER = (255, 255, 255)  # the flat colour under a transparent picture
# A decoded picture takes 8 bytes a pixel: 1.5 GB for the largest that Pillow opens, 130 MB for one
# of this size. Larger ones are decoded one after the other.
LARGE = 2**24
MOST_WHOLE = 40 * 10**6  # pixels of an uncut picture; a page of A4 at 600 dpi has 35 million
LONG = 1.4  # of a picture's longer side over the other: its centre is likely to miss the head
ONE_LARGE = threading.Lock()
NOW = threading.local()  # .key: of the picture that this thread decodes
WARNED = set()  # keys of the pictures of this source whose warnings were told


def open_picture(file):
    """A path or bytes -> Pillow's image, whose pixels are not decoded yet (but for some APNGs).

    Raises UnidentifiedImageError for another format, DecompressionBombError over 178 megapixels.
    """
    img = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    if img.info.get("default_image") is True:  # an APNG's, for programs that show no animations
        img.seek(1)
    return img


@contextlib.contextmanager
def open_image(data, least):
    """Bytes -> an upright RGB or RGBA image of 8 bits, the first frame, and its scale.

    A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time; its short side stays at
    `least` or more. While the `with` lasts, no other thread opens a large picture, if this is one.
    """
    file = open_picture(data)
    turn = ONE_LARGE if file.width * file.height > LARGE else contextlib.nullcontext()
    with file, turn:
        full = file.width
        file.draft("RGB", (least, least))  # only JPEGs know what that is
        scale = file.width / full
        refuse_cut_off(file, data, least)
        img = upright(file)
        if img is not file:
            file.close()  # otherwise its pixels would stay beside those of the copy
        yield img, scale


def refuse_cut_off(img, data, least):
    """ValueError for a JPEG whose end is missing, though an end marker is there.

    libjpeg fills what is missing with gray. A whole picture may end in it, too, but there it makes
    no difference if more bytes come before the end marker.
    """
    last_row = (0, img.height - 1, *img.size)
    if img.format != "JPEG" or not np.isin(img.crop(last_row), (127, 128)).all():  # CMYK: inverted
        return
    end = data.rfind(b"\xff\xd9")
    with open_picture(data[:end] + b"\x5a" * 999 + data[end:]) as longer:
        longer.draft("RGB", (least, least))
        if longer.tobytes() != img.tobytes():
            raise ValueError("the end of the file is missing")


def upright(img):
    """-> it or a copy, RGB or RGBA of 8 bits, turned as its EXIF says."""
    ImageOps.exif_transpose(img, in_place=True)
    if img.mode.startswith(("I", "F")):
        img = eight_bits(img)
    mode = "RGBA" if img.has_transparency_data else "RGB"
    if img.mode not in (mode, "LA"):  # Pillow would copy a picture that has the mode already
        img = img.convert(mode)
    mode = "RGB" if opaque(img) else "RGBA"
    return img if img.mode == mode else img.convert(mode)


def eight_bits(img):
    """16-bit grays, 32-bit integers and floats -> L. Pillow would clip them at 255."""
    pixels = np.nan_to_num(np.asarray(img, np.float32))  # what is no number is black
    most = pixels.max()
    top = 1 if img.mode == "F" and most <= 1 else 255
    if most > 255 or img.mode.startswith("I;16"):  # which may be a dark one
        top = 65535
    return Image.fromarray(np.uint8(255 * np.clip(pixels / top, 0, 1) + 0.5))


def opaque(img):
    """Does the image hide nothing? Many a PNG has an alpha channel that nobody painted."""
    return img.mode == "RGB" or img.getextrema()[-1][0] == 255


def foreground_box(img, border=3, side=32):
    """Where the foreground is, coarsely: (x1, y1, x2, y2) in pixels, by alpha or unlike the rim.

    A pixel is background as far as many pixels of the picture's border have its colour; a
    foreground that leaves the picture has a few there, too, so the share counts and not the
    nearest. The box holds all but 3 % on each side.
    """
    if img.mode == "RGBA":
        return img.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox() or (0, 0, *img.size)
    small = img.resize((side, side), Image.Resampling.BOX, reducing_gap=2.0)
    small = np.asarray(small, np.float32) / 255
    rim = np.ones((side, side), bool)
    rim[border:, border:-border] = False  # the lower border belongs to the figure mostly
    # (side^2, colours of the border)
    apart = ((small.reshape(-1, 1, 3) - small[rim][::2]) ** 2).sum(2)
    background = np.exp(-apart / 0.02).mean(1).reshape(side, side)
    salience = np.maximum(0, background[rim].mean() * 0.5 - background)
    if salience.sum() == 0:
        return (0, 0, *img.size)
    grid = np.linspace(0, 1, side + 1)
    ends = []
    for mass in (salience.sum(0), salience.sum(1)):  # of columns, of rows
        ends.append(np.interp((0.03, 0.97), np.r_[0, np.cumsum(mass)] / mass.sum(), grid))
    (x1, x2), (y1, y2) = ends
    return x1 * img.width, y1 * img.height, x2 * img.width, y2 * img.height


def square(img, box=None, margin=0.0):
    """The square to cut -> (left, top, right, bottom): the centre, or around a box.

    Of a box taller than the picture is wide it keeps the top, where the head is.
    """
    w, h = img.size
    x1, y1, x2, y2 = box or (0, 0, w, h)
    least = 0.2 * min(w, h)  # never a speck blown up
    side = min(w, h, max(x2 - x1, y2 - y1, least) * (1 + 2 * margin))
    left, top = (x1 + x2 - side) / 2, (y1 + y2 - side) / 2
    if box and y2 - y1 > side:
        top = min(top, y1 - margin * (y2 - y1))
    left, top = max(0, min(left, w - side)), max(0, min(top, h - side))
    return left, top, left + side, top + side


def figure_of(picture, margin=0.1):
    """u8 (H, W, 3) -> the square around its figure, u8 (s, s, 3), as `decode` cuts it."""
    img = Image.fromarray(picture)
    area = [round(x) for x in square(img, foreground_box(img), margin)]
    return np.array(img.crop(area))


def resized(img, area, size):
    """The square `area` of an image, size x size pixels."""
    return img.resize((size, size), Image.Resampling.BICUBIC, area, reducing_gap=2.0)


def decode(data, size, fg, box=None, crop="centre", margin=0.1):
    """Bytes of an image file -> {"images": u8 (S, S, 3)[, "fg": u8 (S, S)]}, cut by `crop`.

    Pillow weights colours by their alpha when it resizes; the result is laid on PAPER.
    """
    least = 2 * size if crop == "centre" else 4 * size if box is None else 2**15  # a small box
    with open_image(data, least) as (img, scale):
        if crop == "figure":
            box = [scale * x for x in box] if box else foreground_box(img)
            if box[0] >= img.width or box[1] >= img.height or min(box[2:]) <= 0:
                raise ValueError("its box lies outside of the picture")
        area = square(img, box if crop == "figure" else None, margin)
        img = resized(img, area, size)
    planes = {"images": np.asarray(on_paper(img))}
    return planes | ({"fg": np.asarray(img.convert("RGBA"))[..., 3]} if fg else {})


def on_paper(img):
    """RGB or RGBA -> RGB: what is transparent shows PAPER."""
    if img.mode == "RGBA":
        img = Image.alpha_composite(Image.new("RGBA", img.size, PAPER), img).convert("RGB")
    return img


def centre_of(picture, size):
    """A path, an image of Pillow, or pixels u8 (H, W) or (H, W, 3 or 4) -> u8 (size, size, 3), as `decode`."""
    if isinstance(picture, str | os.PathLike):
        try:
            return decode(Path(picture).read_bytes(), size, False)["images"]
        except Exception as problem:  # decoders raise a dozen kinds
            raise UserError(f"{picture} can't be read as a picture: {reason(problem)}") from None
    if not isinstance(picture, Image.Image):
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            shape = f"{pixels.dtype} {pixels.shape}"
            raise UserError(f"pixels must be uint8 (H, W, 3), from 0 to 255, not {shape}")
        picture = Image.fromarray(pixels)
    img = upright(picture.copy())
    return np.array(on_paper(resized(img, square(img), size)))


def whole(data):
    """Bytes of an image file -> u8 (H, W, 3), uncut, and its scale: below 1 over MOST_WHOLE pixels."""
    with open_image(data, 2**12) as (img, scale):  # a JPEG that can be halved has 2^26 pixels
        full = img.width / scale
        over = math.sqrt(img.width * img.height / MOST_WHOLE)
        if over > 1:
            img = img.reduce(math.ceil(over))  # which takes less memory than a resize
        return np.array(on_paper(img)), img.width / full


# ---- many pictures -------------------------------------------------------------------------------


@contextlib.contextmanager
def named_warnings():
    """While it lasts, Pillow's warnings are kept; at its end a line tells whose they are, once."""
    kept, show = {}, warnings.showwarning

    def keep(message, *where, **more):
        if not hasattr(NOW, "key"):  # another thread's
            show(message, *where, **more)
        elif NOW.key not in WARNED:
            kept.setdefault(NOW.key, f"{NOW.key} ({reason(message)})")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="PIL")
        warnings.showwarning = keep
        yield
    WARNED.update(kept)
    for line in counted(sorted(kept.values()), "pictures make Pillow warn", "look at them"):
        tqdm.write(line, file=sys.stderr)  # above a bar


def decode_records(records, fetch, work, at_once=16):
    """Yield (record, work(record, bytes) or exception), in order: Pillow decodes without the GIL."""

    def one(item):
        record, load = item
        NOW.key = record.key
        try:
            return record, work(record, load())
        except MemoryError:
            fix = "close other programs, or give a smaller --size"
            raise UserError(f"memory is full while {record.key} is read; {fix}") from None
        # decoders raise a dozen kinds for a broken file; it is skipped, counted and named
        except Exception as problem:
            return record, problem

    items = iter(fetch(records))
    with named_warnings(), ThreadPoolExecutor() as pool:
        waiting = deque(pool.submit(one, item) for item in islice(items, at_once))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(one, item) for item in islice(items, 1))
            yield done


def reason(problem):
    """Why a picture can't be read, in words. What Python prints of an object, <...>, is no reason."""
    words = " ".join(re.sub(r"<[^<>]*>", "", str(problem)).split())
    return words[:100] or type(problem).__name__


def look_at(records, fetch):
    """-> how many of 64 images have transparent pixels, how many are long, how many were looked at."""
    some = records[:: math.ceil(len(records) / 64)]
    transparent = long = 0
    for _, load in fetch(some):
        with contextlib.suppress(Exception):  # a broken one is named later
            img = open_picture(load())
            long += max(img.size) > LONG * min(img.size)
            transparent += img.has_transparency_data and not opaque(img.convert("RGBA"))
    return transparent, long, len(some)
