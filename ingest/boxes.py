"""Pictures with any number of boxes each: what apps/detect.py learns from, as people publish it.

    python data.py PATH --detect --out datasets/NAME

COCO        a JSON file; its pictures lie beside it, or in a folder there, or beside its folder
            annotations/. Or a folder with such files, one for each split
iCartoonFace (Zheng et al. 2020), detection: a csv of picture,x1,y1,x2,y2; pictures lie as COCO's do
Pascal VOC  a folder with *.xml in Annotations/, or anywhere; it counts pixels from 1
YOLO        a folder with *.txt of "class x y width height" in shares of the picture, in folders
            labels/ beside images/, or beside the pictures; pictures without a file have no box

A folder train, val or test on the way to a picture is its split. All classes become one. A record's
`box` is a list of (x1, y1, x2, y2) in pixels, YOLO's in shares of the picture. ingest/labels.py
reads the files; here the boxes come to fit the pixels, and what does not fit is left out and told.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from common.train import UserError
from ingest import labels, layouts
from ingest.decode import on_paper, open_image, open_picture
from ingest.files import files_below, nfc, read_whole, walk
from ingest.layouts import counted
from ingest.sources import Record, choose, left_out, refuse_odd

GRAY = (128, 128, 128)  # what fills a picture up to a square
ORIENTATION = 0x0112  # the field of EXIF: how a stored picture becomes upright
# where it swaps x and y: which of the two, 0 or 1, then counts from the other side
FLIPS = {5: [], 6: [0], 7: [0, 1], 8: [1]}


# ---- records -------------------------------------------------------------------------------------


def split_of_page(page):
    """Its split, by the folders of its picture or else by its label file."""
    folders = map(layouts.split_of, Path(page.place).parts[:-1])
    return next(filter(None, folders), page.split)


def of_their_own(pages):
    """Pages -> the same. Where two found one picture, it belongs to the one that names its path.

    The other names a picture that is not there, and found this one because nothing else has its name.
    """
    by_path = [
        bool(p.place)
        and labels.one_ends(nfc(p.place), nfc(p.name.replace("\\", "/")))
        and p.split in (None, split_of_page(p))
        for p in pages
    ]
    taken = {p.place for p, named in zip(pages, by_path, strict=True) if named}
    return [
        p._replace(place=None) if p.place in taken and not named else p
        for p, named in zip(pages, by_path, strict=True)
    ]


def find(path):
    """-> (records, fetch, notes, are boxes shares): as sources.find, but `box` is a list of boxes."""
    path = Path(path)
    reader, layout = choose(path, labels.READERS, labels.KNOWN)
    root = labels.root_of(path)
    pictures = list(walk(root))
    odd, unsure = [], []
    pages = of_their_own(list(reader(path, pictures, odd, unsure)))
    refuse_odd(path, [page.name for page in pages])
    faces = [face for page in pages for face in page.faces]
    count = len({page.place or page.name for page in pages})
    notes = [f"read as {layout}: {count} pictures, {len(faces)} boxes"]
    notes += left_out(odd, len(odd) + len(faces), "labels can't be used", path)
    kinds = [kind for kind, _ in Counter(kind for kind, _ in faces).most_common()]
    pages = [page._replace(faces=[box for _, box in page.faces]) for page in pages]
    shares = layout == "YOLO" or max((x for _, box in faces for x in box), default=2) <= 1
    if shares and layout != "YOLO":
        notes.append("no box reaches beyond 1, so all are taken for shares of the picture")
    pages, absent = present(pages, path)
    notes += absent + unsure
    unnamed = sorted({*pictures} - {page.place for page in pages})
    fix = "a picture without a face needs a label file, or an entry, without boxes"
    notes += counted(unnamed, "pictures have no label that can be read, and are left out", fix)
    bare = [page.place for page in pages if not page.faces]
    if 2 * len(bare) > len(pages):
        fix = "where nobody has boxed them yet, give the boxed ones alone"
        notes += counted(bare, "pictures have no box, and count as pages without a face", fix)
    if len(kinds) > 1:
        notes.append(f"{len(kinds)} classes are taken as one: {', '.join(kinds[:5])}")
    pages, empty = without_empty(pages)
    notes += empty
    if not shares:
        pages, changed = fitted(pages, root, path)
        notes += changed
    records, repeated = records_of(pages)
    if not any(record.box for record in records):
        raise UserError(f"{path} has no box of a picture that is there")
    return records, files_below(root), notes + repeated, shares


def present(pages, path):
    """-> the pages whose picture is there, and a note on the others."""
    absent = list(dict.fromkeys(page.name for page in pages if not page.place))
    pages = [page for page in pages if page.place]
    if not pages:
        named = f"none of the {len(absent)} pictures that {path} names lies beside it"
        raise UserError(f"{named}; the first: {next(iter(absent), None)!r}")
    return pages, counted(absent, "pictures are not there")


def without_empty(pages):
    wrong = [f"{page.name} {box}" for page in pages for box in page.faces if not usable(box)]
    pages = [page._replace(faces=list(filter(usable, page.faces))) for page in pages]
    return pages, counted(wrong, "boxes are empty or inverted, and left out")


def usable(box):
    return all(abs(x) < 1e6 for x in box) and box[0] < box[2] and box[1] < box[3]


def records_of(pages):
    """-> a record for each picture, and a note on boxes that are there twice.

    A detector would learn that two faces lie in one place, and miss one of them in every test.
    """
    boxes, splits = {}, {}
    for page in pages:
        boxes.setdefault(page.place, []).extend(map(tuple, page.faces))
        splits[page.place] = split_of_page(page)
    records, twice = [], []
    for place, faces in boxes.items():
        own = list(dict.fromkeys(faces))
        twice += [place] * (len(faces) - len(own))
        records.append(Record(nfc(place), place, split=splits[place], box=own))
    return records, counted(twice, "boxes repeat another of their picture, and are left out")


# ---- boxes and pixels ----------------------------------------------------------------------------


def fitted(pages, root, path):
    """Pages -> those whose boxes fit their pixels, now or after a change, and notes on the others."""
    fitting, odd, scaled, turned = [], [], [], []
    for page in pages:
        shape = shape_of(root / page.place) if page.size and page.faces else None
        if shape:  # what can't be opened is named when it is packed
            try:
                own, scales, turns = fit(np.array(page.faces), page.size, *shape)
            except ValueError as problem:
                odd.append(f"{page.place} ({problem})")
                continue
            scaled += [page.place] * scales
            turned += [page.place] * turns
            if scales or turns:
                page = page._replace(faces=own.tolist())
        fitting.append(page)
    notes = left_out(odd, len(pages), "pictures can't be used", path)
    notes += counted(scaled, "pictures have boxes that are scaled to the pixels")
    notes += counted(turned, "pictures have boxes that are turned as EXIF says")
    return fitting, notes


def shape_of(file):
    """-> (width, height) as it is stored, and its FLIPS or None; None, if it can't be opened.

    Image.Image's own getexif: a PNG's would decode all of the picture.
    """
    try:
        with open_picture(read_whole(file)) as img:
            return img.size, FLIPS.get(Image.Image.getexif(img).get(ORIENTATION))
    except Exception:  # as many kinds as in decode_records
        return None


def fit(boxes, size, stored, flips):
    """Boxes (k, 4) in pixels of a picture of `size` -> in those of the upright file; what was done.

    A picture may have been resized after it was boxed, and boxes may belong to the picture as it is
    stored, before EXIF turns it. Its proportions tell which, but for half a turn: there boxes are
    taken for those of the upright picture. ValueError where the proportions are of neither.
    """
    upright = stored if flips is None else stored[::-1]
    turned = off(size, stored) < off(size, upright)
    like = stored if turned else upright
    if off(size, like) > sum(size) + sum(like):  # more than rounding to whole pixels
        own, its = (" x ".join(f"{x:g}" for x in shape) for shape in (size, upright))
        raise ValueError(f"its boxes are for {own} pixels, it has {its}")
    corners = boxes.reshape(-1, 2, 2) / size
    if turned:
        corners = corners[..., ::-1].copy()
        corners[..., flips] = 1 - corners[..., flips]
        corners.sort(1)  # upper left, lower right
    return (corners * upright).reshape(-1, 4), tuple(size) != like, turned


def off(a, b):
    """How far two sizes (width, height) are from one proportion, in pixels times pixels."""
    return abs(a[0] * b[1] - a[1] * b[0])


def decode(data, size, boxes, most, shares):
    """A picture, filled up to a square -> {"images": u8 (S, S, 3), "boxes": f32 (most, 4)}.

    Boxes are (x1, y1, x2, y2) in shares of that square, cut off at the border of the picture; -1
    fills up. A box outside of the picture is a ValueError.
    """
    square = Image.new("RGB", (size, size), GRAY)
    with open_image(data, 2 * size) as (img, scale):
        side = max(img.size)
        shown = [max(1, round(x * size / side)) for x in img.size]
        square.paste(on_paper(img).resize(shown, Image.Resampling.BICUBIC, reducing_gap=2.0))
    edge = np.array([*img.size, *img.size], np.float32)
    in_pixels = np.array(boxes, np.float32).reshape(-1, 4) * (edge if shares else scale)
    inside = in_pixels.clip(0, edge)
    if not (inside[:, 2:] > inside[:, :2]).all():
        raise ValueError("a box lies outside of the picture")
    return {"images": np.asarray(square), "boxes": padded(inside / side, most)}


def padded(boxes, most):
    """(k, 4) -> f32 (most, 4): -1 fills up."""
    rows = np.full((most, 4), -1, np.float32)
    rows[: len(boxes)] = boxes
    return rows
