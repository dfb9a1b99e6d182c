"""Pictures with any number of boxes each: what apps/detect.py learns from, as people publish it.

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

import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.io import UserError, parse_table, reading, regular
from ingest import layouts
from ingest.decode import on_paper, open_image
from ingest.files import fetch_files, walk
from ingest.sources import BOX, Record, box_of, choose, nfc, refuse_odd, table_rows

GRAY = (128, 128, 128)  # what fills a picture up to a square


# ---- readers: yield (picture, class, box); the box is None of a picture without boxes -------------


def from_coco(path):
    needs = "it needs images with id and file_name, and annotations with image_id and bbox"
    with reading(path, "COCO file", needs):
        found = parse_table(path.read_bytes())
        names = {image["id"]: "" + image["file_name"] for image in found["images"]}
        if len(names) < len(found["images"]):
            raise ValueError("two images have one id")
        kinds = {c["id"]: str(c["name"]) for c in found.get("categories", ())}
        yield from ((name, None, None) for name in names.values())
        for one in found["annotations"]:
            x, y, w, h = map(float, one["bbox"])
            kind = kinds.get(one.get("category_id"), "face")
            yield names[one["image_id"]], kind, (x, y, x + w, y + h)


def from_csv(path):
    for where, cells in table_rows(path, ("path", *BOX, "label")):
        yield cells["path"], cells.get("label", "face"), box_of(cells, where)


def from_voc(root):
    seen = set()
    for path in sorted((root / "Annotations").rglob("*.xml")):
        with reading(path, "annotation of Pascal VOC", "remove it"):
            tree = ElementTree.parse(path).getroot()
            name = tree.findtext("filename") or path.stem + ".jpg"
            if name in seen:
                raise ValueError(f"{name} is another file's picture")
            seen.add(name)
            yield name, None, None
            for one in tree.iter("object"):
                corners = (one.find("bndbox").findtext(k) for k in ("xmin", "ymin", "xmax", "ymax"))
                x1, y1, x2, y2 = map(float, corners)
                yield name, one.findtext("name") or "face", (x1 - 1, y1 - 1, x2, y2)


def from_yolo(root):
    def place(path):
        """a/images/b.png -> a/b, and so is a/labels/b.txt, the file with its boxes."""
        parts = Path(path).with_suffix("").parts
        return nfc("/".join(x for x in parts if x not in ("images", "labels")))

    names = list(walk(root))
    labels = [p for p in sorted((root / "labels").rglob("*")) if p.suffix.lower() == ".txt"]
    files = {place(p.relative_to(root)): p for p in labels}
    for name in names:
        yield name, None, None
        for kind, box in yolo_boxes(files.get(place(name))):
            yield name, kind, box
    for lost in sorted(files.keys() - set(map(place, names))):
        yield str(files[lost].relative_to(root)), None, None


def yolo_boxes(path):
    """Yield (class, box in shares) of the lines of a file, if there is one."""
    lines = regular(path).read_text("utf-8-sig", "replace").splitlines() if path else ()
    wanted = "class x y width height in shares of the picture"
    for number, line in enumerate(lines, 1):
        with reading(path, f"file of boxes, line {number}", f"a line is {wanted}"):
            kind, x, y, w, h, *sure = map(float, line.split())
            if len(sure) > 1 or max(x, y, w, h) > 2:  # an outline, or pixels
                raise ValueError(line)
            yield f"{kind:g}", (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


READERS = (
    (lambda p: p.suffix.lower() == ".json", from_coco, "COCO"),
    (lambda p: p.suffix.lower() == ".csv", from_csv, "a table of boxes"),
    (lambda p: (p / "Annotations").is_dir(), from_voc, "Pascal VOC"),
    (lambda p: (p / "labels").is_dir(), from_yolo, "YOLO"),
)


KNOWN = "set of boxes: give a COCO file (.json), a csv of picture,x1,y1,x2,y2, or a folder "
KNOWN += "with Annotations/*.xml (Pascal VOC) or labels/*.txt (YOLO)"


# ---- records -------------------------------------------------------------------------------------


def find(path):
    """-> (records, fetch, notes, are boxes shares): as sources.find, but `box` is a list of boxes."""
    path = Path(path)
    reader, layout = choose(path, READERS, KNOWN)
    rows = list(reader(path))
    names = list(dict.fromkeys(name for name, _, _ in rows))
    refuse_odd(path, names)
    root = path if path.is_dir() else path.parent
    places = find_places(names, list(walk(root)))
    if not places:
        named = f"none of the {len(names)} pictures that {path} names lies beside it"
        raise UserError(f"{named}; the first: {next(iter(names), None)!r}")
    boxes = {place: [] for place in places.values()}
    for name, _, box in rows:
        if name in places and box and usable(box):
            boxes[places[name]].append(box)
    if not any(boxes.values()):
        raise UserError(f"{path} has no box of a picture that is there")
    records = []
    for place, own in boxes.items():
        split = next(filter(None, map(layouts.split_of, Path(place).parts[:-1])), None)
        records.append(Record(nfc(place), place, split=split, box=own))
    notes = about_boxes(layout, rows, [name for name in names if name not in places])
    return records, partial(fetch_files, root=root), notes, layout == "YOLO"


def about_boxes(layout, rows, lost):
    """Lines on what was read, pictures that are not there, several classes, and wrong boxes."""
    found = [row for row in rows if row[2]]
    notes = [f"read as {layout}: {len({row[0] for row in rows})} pictures, {len(found)} boxes"]
    if lost:
        notes.append(f"{len(lost)} pictures are not there, the first: {lost[0]}")
    kinds = [kind for kind, _ in Counter(kind for _, kind, _ in found).most_common()]
    if len(kinds) > 1:
        notes.append(f"{len(kinds)} classes are taken as one: {', '.join(kinds[:5])}")
    if wrong := [f"{name} {box}" for name, _, box in found if not usable(box)]:
        told = "boxes are empty or inverted, and left out, the first:"
        notes.append(f"{len(wrong)} {told} {wrong[0]}")
    return notes


def find_places(told, found):
    """Names of pictures in a file, and pictures that are there -> {told: found}, of those found.

    A picture may lie in another folder, if it alone has its name.
    """
    exact = {nfc(name): name for name in found}
    count = Counter(Path(key).name for key in exact)
    alone = {Path(key).name: name for key, name in exact.items() if count[Path(key).name] == 1}
    places = {}
    for name in told:
        key = nfc(name).removeprefix("./")
        place = exact.get(key) or alone.get(Path(key).name)
        places |= {name: place} if place else {}
    return places


def usable(box):
    return all(abs(x) < 1e6 for x in box) and box[0] < box[2] and box[1] < box[3]


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
    found = np.array(boxes, np.float32).reshape(-1, 4) * (edge if shares else scale)
    inside = found.clip(0, edge)
    if not (inside[:, 2:] > inside[:, :2]).all():
        raise ValueError("a box lies outside of the picture")
    return {"images": np.asarray(square), "boxes": padded(inside / side, most)}


def padded(boxes, most):
    """(k, 4) -> f32 (most, 4): -1 fills up."""
    rows = np.full((most, 4), -1, np.float32)
    rows[: len(boxes)] = boxes
    return rows
