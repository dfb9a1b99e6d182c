"""Pages with drawn figures on them: what apps/detect.py learns from, for anybody to make.

    python data.py scenes --out datasets/scenes

A page has one to four panels, each with a backdrop; figures of ingest/toon.py stand on it, large
and small, in front of each other, cut by the border; speech bubbles hide some. A tenth of the pages
shows nobody. The boxes are the painter's, of a face's outline, from the forehead to the chin.
Characters are in one split each: who is on a page of val was never seen in train.
"""

from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from ingest import toon
from ingest.boxes import padded

COUNTS = {"train": 2000, "dev": 120, "val": 240, "test": 240}  # pages
PEOPLE = {"train": 30, "dev": 6, "val": 6, "test": 6}  # characters of the cast
MOST = 6  # figures of a page
EMPTY = 0.1  # of the pages: nobody is there
FACE = (16, 160)  # width of a face in pixels of a page of 256
VISIBLE = 0.4  # of what the panel shows of a face (this much, too), for a box
IN_FACE = [toon.PARTS.index(part) for part in ("face", "eyes", "mouth")]


def plan(seed=0):
    """-> items {key, split, seed, people} for draw()."""
    people = iter(toon.cast(seed=seed))
    items = []
    for split, count in COUNTS.items():
        own = list(islice(people, PEOPLE[split]))
        for n in range(len(items), len(items) + count):
            item = {"split": split, "people": own, "seed": (seed, 5, n)}
            items.append(item | {"key": f"{split}/{n:05d}"})
    return items


def panels(rng, size):
    """-> boxes (left, top, right, bottom) in pixels: the page, or two to four parts of it."""
    kind = rng.integers(4)
    gutter = max(1, size // 40)
    cut = rng.uniform(0.35, 0.65, 2) * size
    x, y = (int(c) for c in cut)
    if kind == 0 or rng.random() < 0.4:
        return [(0, 0, size, size)]
    rows = [(0, y - gutter), (y + gutter, size)]
    if kind == 1:
        return [(0, top, size, bottom) for top, bottom in rows]
    columns = [(0, x - gutter), (x + gutter, size)]
    halves = [(left, top, right, bottom) for top, bottom in rows for left, right in columns]
    return halves if kind == 2 else [(0, 0, size, y - gutter), *halves[2:]]


def backdrop(rng, width, height):
    """-> u8 (height, width, 3) of the painter's backdrops; some are paper."""
    if rng.random() < 0.2:
        return np.full((height, width, 3), rng.integers(215, 256), np.uint8)
    kind = toon.pick(rng, ("gradient_background", "simple_background", *toon.PATTERNS))
    side = max(width, height)
    image = toon.backdrop(kind, toon.pick(rng, toon.GRADES), rng, 2 * side).reduce(2)
    return np.asarray(image)[:height, :width]


def corners(where):
    """(H, W) bool -> (x1, y1, x2, y2) around what is True."""
    rows, columns = where.any(1).nonzero()[0], where.any(0).nonzero()[0]
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def place(page, owner, number, item, panel, rng):
    """Draw a figure into a panel -> box and mask of its face; None: too little is seen.

    owner i16 (S, S): which figure each pixel shows; it becomes `number` where this one is.
    """
    left, top, right, bottom = panel
    size = len(page)
    low, high = (x * size / 256 for x in FACE)
    most = max(low + 1, min(high, 0.8 * min(right - left, bottom - top)))
    width = np.exp(rng.uniform(np.log(low), np.log(most)))
    side = max(24, round(width / 0.5))  # a face takes about half the width of a drawing
    figure = toon.draw(item, side)
    face = np.isin(figure["parts"], IN_FACE)
    x1, y1, x2, y2 = figure["face"]
    face[int(y2) + 1 :] = False  # the neck
    if not face.any():
        return None
    x = int(rng.uniform(left, right) - (x1 + x2) / 2)
    y = int(rng.uniform(top, bottom) - (y1 + y2) / 2) if rng.random() < 0.6 else bottom - side
    a = max(left, x)
    b = max(top, y)
    c = min(right, x + side)
    d = min(bottom, y + side)
    if a >= c or b >= d:
        return None
    there = np.s_[b - y : d - y, a - x : c - x]
    here = np.s_[b:d, a:c]
    share = figure["fg"][there][..., None] / 255
    page[here] += share * (figure["image"][there] - page[here])
    owner[here][share[..., 0] > 0.5] = number
    mask = np.zeros((size, size), bool)
    edge = ((left, top), (right, bottom))
    mask[here] = face[there]
    box = (figure["face"].reshape(2, 2) + (x, y)).clip(*edge).ravel()
    return (box, mask) if mask.sum() > VISIBLE * face.sum() else None


def bubble(page, owner, rng):
    """A speech bubble with scribbles for words."""
    size = len(page)
    w, h = rng.uniform(0.08, 0.2, 2) * size
    x, y = rng.uniform(w, size - w), rng.uniform(h, size - h)
    tip = rng.choice([-1, 1], 2)[0]  # the second is drawn since published pages had one
    layer = Image.fromarray(np.uint8(page))
    hole = Image.new("L", (size, size))
    for pen, fill in ((ImageDraw.Draw(layer), (255, 255, 255)), (ImageDraw.Draw(hole), 255)):
        pen.polygon([(x - w / 4, y), (x + w / 4, y), (x + tip * w, y + 1.5 * h)], fill=fill)
        line = (30, 25, 35) if fill != 255 else 255
        pen.ellipse((x - w, y - h, x + w, y + h), fill=fill, outline=line)
    pen = ImageDraw.Draw(layer)
    for line in np.arange(y - h / 2, y + h / 2, max(3, size / 50)):
        ends = x + rng.uniform(0.3, 0.65, 2) * w * (-1, 1)
        pen.line((ends[0], line, ends[1], line + rng.normal()), fill=(60, 55, 70))
    page[:] = np.asarray(layer)
    owner[np.asarray(hole) > 0] = -1


def draw(item, size=256):
    """An item of a plan -> {image u8 (S, S, 3), boxes f32 (MOST, 4), names of who is in them}.

    Boxes are x1, y1, x2, y2 in shares of the page; -1 fills up.
    """
    rng = np.random.default_rng(item["seed"])
    page = np.full((size, size, 3), 255, np.float32)
    owner = np.full((size, size), -1, np.int16)
    areas = panels(rng, size)
    for left, top, right, bottom in areas:
        page[top:bottom, left:right] = backdrop(rng, right - left, bottom - top)
    count = 0 if rng.random() < EMPTY else rng.integers(1, MOST + 1)
    faces = []
    for number in range(count):
        who = item["people"][rng.integers(len(item["people"]))]
        drawing = {"who": who, "seed": (*item["seed"], number)}
        panel = areas[rng.integers(len(areas))]
        faces.append((place(page, owner, number, drawing, panel, rng), who["name"]))
    for _ in range(rng.integers(3)):
        bubble(page, owner, rng)
    boxes, names = [], []
    for number, (face, name) in enumerate(faces):
        if face and (face[1] & (owner == number)).sum() > VISIBLE * face[1].sum():
            boxes.append(face[0] / size)
            names.append(name)
    image = np.uint8(page.round().clip(0, 255))
    return {"image": image, "boxes": padded(np.reshape(boxes, (-1, 4)), MOST), "names": names}


def outlined(page, boxes):
    """page u8 (H, W, 3), boxes (k, 4) in its pixels -> the page with their outlines."""
    picture = Image.fromarray(page)
    pen = ImageDraw.Draw(picture)
    for box in boxes.tolist():
        pen.rectangle(box, outline=(230, 60, 20), width=max(1, round(len(page) / 150)))
    return np.asarray(picture)
