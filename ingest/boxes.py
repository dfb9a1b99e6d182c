"""Pictures with any number of boxes each: what detect.py learns from, as people publish it.

    python data.py PATH --detect --out datasets/NAME

COCO        a JSON file; its pictures lie beside it, or in a folder there
iCartoonFace (Zheng et al. 2020), detection: a csv of picture,x1,y1,x2,y2; pictures lie as COCO's do
Pascal VOC  a folder with Annotations/*.xml, and pictures in JPEGImages/ or beside; it counts pixels
            from 1
YOLO        a folder with labels/**/*.txt of "class x y width height" in shares of the picture, and
            images/ of the same folders and names, or pictures beside the files; pictures without a
            file have no box

A folder train, val or test on the way to a picture is its split. All classes become one. A record's
`box` is a list of (x1, y1, x2, y2) in pixels, YOLO's in shares of the picture.
"""

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.io import UserError, regular
from ingest import layouts
from ingest.decode import on_paper, open_image
from ingest.sources import Record, fetch_files, nfc, refuse_odd, table_rows, walk

HEADERS = ("x1,y1,x2,y2", "xmin,ymin,xmax,ymax", "left,top,right,bottom")  # of a table of boxes
GRAY = (128, 128, 128)  # what fills a picture up to a square


# ---- readers: path -> {picture: [(x1, y1, x2, y2)]}, names of the classes ------------------------

# what a file of another kind, or a broken one, raises where its boxes are read
WRONG = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
WRONG += (RecursionError, ElementTree.ParseError)


def from_coco(path):
    try:
        found = json.loads(path.read_bytes())
        names = {image["id"]: "" + image["file_name"] for image in found["images"]}
        if len(names) < len(found["images"]):
            raise ValueError("two images have one id")
        kinds = {c["id"]: str(c["name"]) for c in found.get("categories", ())}
        classes, boxes = [], {name: [] for name in names.values()}
        for one in found["annotations"]:
            x, y, w, h = map(float, one["bbox"])
            boxes[names[one["image_id"]]].append((x, y, x + w, y + h))
            classes.append(kinds.get(one.get("category_id"), "face"))
    except WRONG as problem:
        told = f"{path} is no COCO file ({type(problem).__name__}: {str(problem)[:60]})"
        needs = "images with id and file_name, and annotations with image_id and bbox"
        raise UserError(f"{told}; it needs {needs}") from None
    return boxes, classes


def from_csv(path):
    boxes, classes = {}, []
    for number, row in table_rows(path):
        if number == 1 and ",".join(row[1:5]).lower() in HEADERS:
            continue
        try:
            x1, y1, x2, y2 = map(float, row[1:5])
        except ValueError:
            found = ",".join(row)[:80]
            problem = f"{path}, line {number} is not picture,x1,y1,x2,y2 but {found!r}"
            raise UserError(problem) from None
        boxes.setdefault(row[0], []).append((x1, y1, x2, y2))
        classes.append(row[5] if len(row) > 5 else "face")
    return boxes, classes


def from_voc(root):
    boxes, classes = {}, []
    for path in sorted((root / "Annotations").rglob("*.xml")):
        try:
            tree = ElementTree.parse(regular(path)).getroot()
            name = tree.findtext("filename") or path.stem + ".jpg"
            if name in boxes:
                raise ValueError(f"{name} is another file's picture")
            boxes[name] = []
            for one in tree.iter("object"):
                corners = (one.find("bndbox").findtext(k) for k in ("xmin", "ymin", "xmax", "ymax"))
                x1, y1, x2, y2 = map(float, corners)
                boxes[name].append((x1 - 1, y1 - 1, x2, y2))
                classes.append(one.findtext("name") or "face")
        except WRONG as problem:
            told = f"is not an annotation of Pascal VOC ({str(problem)[:80]}); remove it"
            raise UserError(f"{path} {told}") from None
    return boxes, classes


def place(path):
    """a/images/b.png -> a/b, and so is a/labels/b.txt, the file with its boxes."""
    parts = Path(path).with_suffix("").parts
    return nfc("/".join(x for x in parts if x not in ("images", "labels")))


def from_yolo(root):
    boxes, classes = {}, []
    labels = {place(p.relative_to(root)): p for p in sorted((root / "labels").rglob("*.txt"))}
    for name in walk(root):
        boxes.setdefault(name, [])
        for kind, box in yolo_boxes(labels.get(place(name))):
            boxes[name].append(box)
            classes.append(kind)
    lost = sorted(labels.keys() - set(map(place, boxes)))
    if lost and len(lost) == len(labels):
        problem = "no picture in images/ has folder and name of a file in labels/"
        raise UserError(f"{root}: {problem}; the first: {lost[0]}")
    return boxes | {str(labels[k].relative_to(root)): [] for k in lost}, classes


def yolo_boxes(path):
    """Yield (class, box in shares) of the lines of a file, if there is one."""
    lines = regular(path).read_text("utf-8-sig", "replace").splitlines() if path else ()
    for number, line in enumerate(lines, 1):
        try:
            kind, x, y, w, h, *sure = map(float, line.split())
            if len(sure) > 1 or max(x, y, w, h) > 2:  # an outline, or pixels
                raise ValueError
        except ValueError:
            wanted = "class x y width height, in shares of the picture"
            problem = f"{path}, line {number} is not {wanted}, but {line[:60]!r}"
            raise UserError(problem) from None
        yield f"{kind:g}", (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


READERS = (
    (lambda p: p.suffix.lower() == ".json", from_coco, "COCO"),
    (lambda p: p.suffix.lower() == ".csv", from_csv, "a table of boxes"),
    (lambda p: (p / "Annotations").is_dir(), from_voc, "Pascal VOC"),
    (lambda p: (p / "labels").is_dir(), from_yolo, "YOLO"),
)


def reader_of(path):
    for fits, reader, name in READERS:
        if fits(path):
            return reader, name
    files = "give a COCO file (.json), a csv of picture,x1,y1,x2,y2, or a folder with"
    folders = "Annotations/*.xml (Pascal VOC) or labels/*.txt (YOLO)"
    raise UserError(f"{path} has no boxes that we know: {files} {folders}")


# ---- records -------------------------------------------------------------------------------------


def find(path):
    """-> (records, fetch, notes, are boxes shares): as sources.find, but `box` is a list of boxes."""
    path = regular(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file or a folder of boxes")
    reader, name = reader_of(path)
    boxes, classes = reader(path)
    refuse_odd(path, boxes)
    root = path if path.is_dir() else path.parent
    places = find_places(list(boxes), list(walk(root)))
    notes = [f"read as {name}: {len(boxes)} pictures, {len(classes)} boxes"]
    lost = [told for told, place in places.items() if not place]
    if len(lost) == len(boxes):
        named = f"none of the {len(boxes)} pictures that {path} names lies in {root}"
        raise UserError(f"{named}; the first: {next(iter(boxes), None)!r}")
    notes += [f"{len(lost)} pictures are not there, the first: {lost[0]}"] if lost else []
    if len(kinds := Counter(classes)) > 1:
        most = ", ".join(kind for kind, _ in kinds.most_common(5))
        notes.append(f"{len(kinds)} classes are taken as one: {most}")
    records, wrong = [], []
    for told, place in places.items():
        good = [box for box in boxes[told] if usable(box)]
        wrong += [(told, box) for box in boxes[told] if not usable(box)]
        if place:
            records.append(Record(nfc(place), place, split=split_of(place), box=good))
    if wrong:
        first = f"{wrong[0][0]} {','.join(f'{x:g}' for x in wrong[0][1])}"
        told = "boxes are empty or inverted, and left out, the first:"
        notes.append(f"{len(wrong)} {told} {first}")
    if twice := [key for key, n in Counter(r.key for r in records).items() if n > 1]:
        raise UserError(f"{path} names {twice[0]} twice, in two ways; name each picture once")
    return records, partial(fetch_files, root=root), notes, reader is from_yolo


def find_places(told, found):
    """What a file calls its pictures, and pictures that are there -> {told: found or None}.

    A picture may lie in another folder, if its name is that of one picture alone, in both lists.
    """
    bare, named = (Counter(Path(nfc(n)).name for n in names) for names in (found, told))
    exact = {nfc(name): name for name in found}
    alone = {}
    for key, name in exact.items():
        last = Path(key).name
        if bare[last] == named[last] == 1:
            alone[last] = name
    places = {}
    for name in told:
        key = nfc(name).removeprefix("./")
        places[name] = exact.get(key) or alone.get(Path(key).name)
    return places


def usable(box):
    return all(abs(x) < 1e6 for x in box) and box[0] < box[2] and box[1] < box[3]


def split_of(place):
    named = map(layouts.split_of, Path(place).parts[:-1])
    return next(filter(None, named), None)


def decode(data, size, boxes, most, shares, clipped):
    """A picture, filled up to a square -> {"images": u8 (S, S, 3), "boxes": f32 (most, 4)}.

    Boxes are (x1, y1, x2, y2) in shares of that square; -1 fills up. What leaves the picture is cut
    off, and counted in the list `clipped`.
    """
    square = Image.new("RGB", (size, size), GRAY)
    with open_image(data, 2 * size) as (img, scale):
        side = max(img.size)
        shown = [max(1, round(x * size / side)) for x in img.size]
        square.paste(on_paper(img).resize(shown, Image.Resampling.BICUBIC, reducing_gap=2.0))
    edge = np.array([*img.size, *img.size], np.float32)
    found = np.array(boxes, np.float32).reshape(-1, 4) * (edge if shares else scale)
    inside = found.clip(0, edge)
    clipped.append(int((np.abs(inside - found) > 1).any(1).sum()))
    inside = inside[(inside[:, 2:] > inside[:, :2]).all(1)] / side
    return {"images": np.asarray(square), "boxes": padded(inside, most)}


def padded(boxes, most):
    """(k, 4) -> f32 (most, 4): -1 fills up."""
    rows = np.full((most, 4), -1, np.float32)
    rows[: len(boxes)] = boxes
    return rows
