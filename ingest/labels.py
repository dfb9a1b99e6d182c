"""Files that say where the faces are: COCO, tables, Pascal VOC, YOLO. One page for each picture.

Each reader, from_...(path, pictures, odd, notes), yields pages. pictures are the names of those that
lie below root_of(path); what can't be read of a label file becomes a line of the list `odd`, and
what has two meanings one of `notes`. A page says

    name    of the picture as the label file has it, or of the label file
    place   of the picture below the folder, or None, where no such picture is there
    faces   [(class, (x1, y1, x2, y2))], in pixels, YOLO's in shares of the picture
    size    (width, height) of the picture whose pixels these are, or None, if the file has no size
    split   train, val, test, dev or None, as the label file, its folder or its column `split` says
"""

import contextlib
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict, namedtuple
from os.path import splitext
from pathlib import Path

from common.door import one_line, parse_table, reading
from common.train import UserError
from ingest.files import nfc, walk
from ingest.layouts import counted, split_of
from ingest.sources import BOX, box_of, split_in, table_rows

ASIDE = ("images", "jpegimages", "labels", "annotations")  # folders for one kind of file each
UNSEEN = (-1, -1)  # a point of a face that does not show it
Page = namedtuple("Page", "name place faces size split", defaults=(None, None))


# ---- files and pictures --------------------------------------------------------------------------


def root_of(path):
    """-> the folder that holds the pictures: a folder itself, or the one around a label file.

    A label file in annotations/ may have its pictures beside that folder.
    """
    if path.is_dir():
        return path
    folder = path.absolute().parent
    return folder.parent if folder.name.lower() in ASIDE and not any(walk(folder)) else folder


def below(folder, suffix):
    """-> the files below a folder with this suffix; nothing, if it is no folder."""
    names = walk(folder, {suffix}) if folder.is_dir() else ()
    return [folder / name for name in names]


def without_aside(path):
    """train/images/b.png -> train/b.png, so that a picture and its label file have one name."""
    return nfc("/".join(part for part in Path(path).parts if part.lower() not in ASIDE))


def finder(pictures):
    """-> find(name, split=None): the picture that a label file names, or None.

    Programs write names with folders of another machine, with its slashes, or without a suffix. So
    a picture may lie in another folder, if it alone fits: by its name, and of several by the
    folders that both have, or by the split.
    """
    exact = {nfc(name): name for name in pictures}
    named, bare = defaultdict(list), defaultdict(list)  # by the name with its suffix, and without
    for key in exact:
        named[Path(key).name].append(key)
        bare[Path(key).stem].append(key)

    def find(name, split=None):
        key = nfc(name)
        if key not in exact:
            key = re.sub(r"^(\.*/)+", "", key.replace("\\", "/"))
        if key in exact:
            return exact[key]
        last = Path(key).name
        likely = named.get(last) or bare.get(last, [])
        if len(likely) > 1:
            likely = [x for x in likely if one_ends(x, key) or one_ends(splitext(x)[0], key)]
        if len(likely) > 1 and split:
            likely = [x for x in likely if split in map(split_of, Path(x).parts)]
        return exact[likely[0]] if len(likely) == 1 else None

    return find


def one_ends(a, b):
    """Is one of the two paths the end of the other?"""
    return f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}")


@contextlib.contextmanager
def noting(odd, *place):
    """with noting(odd, file, "line 3"): what can't be read is a line of `odd`, and stops nothing."""
    try:
        yield
    except UserError as problem:  # it says where
        odd.append(str(problem))
    except Exception as problem:  # as many kinds as in common.door.reading
        odd.append(f"{', '.join(map(str, place))} ({one_line(problem)})")


def size_of(width, height):
    """-> (width, height), or None: programs that do not know a size write none, or 0."""
    size = float(width or 0), float(height or 0)
    return size if min(size) > 0 else None


def around(xs, ys):
    """The box around the points of an outline."""
    return min(xs), min(ys), max(xs), max(ys)


# ---- COCO ----------------------------------------------------------------------------------------


def coco_files(path):
    """The file itself, or those in a folder, such as one for each split."""
    if path.is_file():
        return [path]
    words = b'"images"', b'"annotations"'
    return [f for f in below(path, ".json") if all(word in f.read_bytes() for word in words)]


def from_coco(path, pictures, odd, notes):
    find = finder(pictures)
    root = root_of(path)
    needs = "it needs images with id and file_name, and annotations with image_id and bbox"
    for file in coco_files(path):
        folder = file.absolute().parent.relative_to(root.absolute())
        words = re.split(r"[\W_]+", file.stem)  # instances_train2017, or train/_annotations.coco
        split = next(filter(None, map(split_of, [*words, *folder.parts])), None)
        with reading(file, "COCO file", needs):
            for image, faces in coco_images(file, odd):
                name = image["file_name"]
                place = find((folder / name).as_posix(), split) or find(name, split)
                size = size_of(image.get("width"), image.get("height"))
                # One file says nothing of the splits: whoever gives it has all of it dealt.
                yield Page(name, place, faces, size, split if path.is_dir() else None)


def coco_images(file, odd):
    """Yield (image, its faces), but no image of which no annotation can be read."""
    table = parse_table(file.read_bytes())
    images = {str(image["id"]): image for image in table["images"]}
    if len(images) < len({(str(image["id"]), image["file_name"]) for image in table["images"]}):
        raise ValueError("two images have one id")
    kinds = {c["id"]: str(c["name"]) for c in table.get("categories", ())}
    faces = {key: [] for key in images}
    annotated = set()
    for number, one in enumerate(table["annotations"], 1):
        key = str(one.get("image_id"))
        annotated.add(key)
        with noting(odd, file.name, f"annotation {one.get('id', number)}"):
            if key not in images:
                raise ValueError(f"no image has the id {key}")
            faces[key].append((kinds.get(one.get("category_id"), "face"), coco_box(one)))
    for key, image in images.items():
        if faces[key] or key not in annotated:
            yield image, faces[key]


def coco_box(one):
    """The box of an annotation, or else the box around its polygons."""
    if one.get("bbox"):
        x, y, w, h = map(float, one["bbox"])
        return x, y, x + w, y + h
    if not one.get("segmentation") or not isinstance(one["segmentation"], list):  # or a mask
        raise ValueError("it has no bbox and no polygon")
    points = [float(x) for polygon in one["segmentation"] for x in polygon]
    return around(points[::2], points[1::2])


# ---- tables --------------------------------------------------------------------------------------


def from_csv(path, pictures, odd, notes):
    find = finder(pictures)
    pages = {}
    for where, cells in table_rows(path, ("path", *BOX, "label")):
        name = cells["path"]
        with noting(odd, where):
            box = box_of(cells, where)
            size = size_of(cells.get("width"), cells.get("height"))
            split = split_in(cells, where)
            page = pages.setdefault(name, Page(name, find(name, split), [], size, split))
            if box:
                page.faces.append((cells.get("label", "face"), box))
    yield from pages.values()


# ---- Pascal VOC ----------------------------------------------------------------------------------


def voc_files(root):
    folder = root / "Annotations"
    return below(folder if folder.is_dir() else root, ".xml")


def from_voc(root, pictures, odd, notes):
    find = finder(pictures)
    files = voc_files(root)
    stems = {nfc(file.stem) for file in files}
    seen = set()
    for file in files:
        name = file.relative_to(root)
        with noting(odd, name):
            tree = ElementTree.parse(file).getroot()
            if tree.tag != "annotation":
                raise ValueError(f"its root is {tree.tag}, not annotation")
            own = Path(without_aside(name)).with_suffix("")
            said = tree.findtext("filename") or own.name
            place = find(own.as_posix())
            # Whoever renames pictures leaves an old name in the file: it counts where it is the
            # file's own with a suffix, or where no picture is called like the file.
            if not place or Path(said).stem == own.name:
                place = find((own.parent / said).as_posix()) or find(said) or place
            stem = nfc(Path(place or "").stem)
            if place and (place in seen or (stem != nfc(own.name) and stem in stems)):
                raise ValueError(f"{place} is another file's picture")
            seen.add(place)
            faces, wrong = [], []
            for one in tree.iter("object"):
                with noting(wrong, name):
                    faces.append((one.findtext("name") or "face", voc_box(one)))
            odd += wrong
            size = size_of(*(tree.findtext(f"size/{side}") for side in ("width", "height")))
            if faces or not wrong:
                yield Page(str(name), place, faces, size)


def voc_box(one):
    """The box of an object, or else the box around its polygon. Pixels count from 1."""
    if (box := one.find("bndbox")) is not None:
        x1, y1, x2, y2 = (float(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
    elif (outline := one.find("polygon")) is not None:  # of x1, y1, x2, ..., or of points x, y
        named = {axis: [p for p in outline.iter() if p.tag[0] == axis] for axis in "xy"}
        x1, y1, x2, y2 = around(*([float(p.text) for p in named[axis]] for axis in "xy"))
    else:
        raise ValueError("an object has no bndbox and no polygon")
    return x1 - 1, y1 - 1, x2, y2


# ---- YOLO ----------------------------------------------------------------------------------------


def yolo_files(root):
    """The texts in folders named labels; where there are none, all."""
    texts = below(root, ".txt")
    return [f for f in texts if in_labels(f, root)] or texts


def in_labels(file, root):
    return "labels" in map(str.lower, file.relative_to(root).parts[:-1])


def from_yolo(root, pictures, odd, notes):
    files = {without_aside(f.relative_to(root).with_suffix("")): f for f in yolo_files(root)}
    lines = {f: f.read_text("utf-8-sig", "replace").splitlines() for f in files.values()}
    keypoints = any(b"kpt_shape" in f.read_bytes() for f in below(root, ".yaml"))
    keypoints = keypoints or look_like_boxes(lines, notes)
    used = set()
    for name in pictures:
        key = without_aside(name)
        key = key if key in files else splitext(key)[0]  # p.png.txt, or p.txt
        used.add(key)
        file = files.get(key)
        faces, wrong = yolo_faces(file, lines.get(file, ()), keypoints)
        odd += wrong
        if faces or not wrong:
            yield Page(name, name, faces)
    for key in sorted(files.keys() - used):
        faces, _ = yolo_faces(files[key], lines[files[key]], keypoints)
        if faces:  # it is no list of classes, and no README
            yield Page(str(files[key].relative_to(root)), None, faces)


def yolo_faces(file, lines, keypoints):
    """-> [(class, box)] of the lines of a file, and those that can't be read."""
    faces, odd = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with noting(odd, f"{file.parent.name}/{file.name}", f"line {number}"):
                kind, *numbers = map(float, line.split())
                faces.append((f"{kind:g}", yolo_box(numbers, keypoints)))
    return faces, odd


def yolo_box(numbers, keypoints):
    """x y width height, and a confidence or keypoints; or x y x y x y ..., an outline."""
    if len(numbers) in (4, 5) or (len(numbers) > 5 and (keypoints or UNSEEN in pairs(numbers))):
        x, y, w, h = numbers[:4]
        box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    elif len(numbers) > 5 and len(numbers) % 2 == 0:
        box = around(numbers[::2], numbers[1::2])
    else:
        raise ValueError(f"class and {len(numbers)} numbers are no box and no outline")
    if max(map(abs, box)) > 3:
        raise ValueError("a line is class x y width height in shares of the picture")
    return box


def pairs(numbers):
    """The points behind x y width height: x y each, or x y and whether it is visible. Or none."""
    rest = numbers[4:]
    if len(rest) % 3 == 0 and {*rest[2::3]} <= {-1, 0, 1, 2}:
        return list(zip(rest[::3], rest[1::3], strict=True))
    return list(zip(rest[::2], rest[1::2], strict=True)) if len(rest) % 2 == 0 else []


def look_like_boxes(files, notes):
    """{file: its lines} -> are the long ones boxes with points? No field says so: a third is enough.

    Few outlines do, and most boxes, except for those of faces that fill their picture.
    """
    likely, long = [], 0
    for file, lines in files.items():
        for line in lines:
            with contextlib.suppress(ValueError):  # no numbers: it is named when it is read
                numbers = [float(x) for x in line.split()[1:]]
                if len(numbers) > 5 and pairs(numbers):
                    long += 1
                    if is_box_with_points(numbers):
                        likely.append(f"{file.parent.name}/{file.name}")
    are_boxes = 3 * len(likely) > long
    if are_boxes:
        what = "long lines look like boxes with points, so all are read so"
        notes += counted(likely, f"of {long} {what}", "--show draws the boxes")
    elif 10 * len(likely) > long:
        fix = "if all are, write kpt_shape: [5, 2] into a data.yaml there"
        notes += counted(likely, f"of {long} outlines may be boxes with points", fix)
    return are_boxes


def is_box_with_points(numbers):
    """Or an outline? Its second pair is a point near the others, and no width and height."""
    x, y, w, h = numbers[:4]
    points = pairs(numbers)
    seen = [point for point in points if min(point) > 0]  # 0 0 is not seen
    if UNSEEN in points or not seen:
        return True
    x1, y1, x2, y2 = around(*zip(*seen, (x, y), strict=True))
    reach = max(x2 - x1, y2 - y1) / (4 if len(points) > 3 else 1)  # one of few may lie far away
    beside = x1 - reach <= w <= x2 + reach and y1 - reach <= h <= y2 + reach
    return not beside and all(abs(a - x) <= 0.6 * w and abs(b - y) <= 0.6 * h for a, b in seen)


# ---- the readers ---------------------------------------------------------------------------------


def holds_voc(root):
    return any(re.search(rb"<annotation[\s>]", f.read_bytes()[:1000]) for f in below(root, ".xml"))


# Does it fit, the reader, what the path is taken for. Files that lie in a folder of their own come
# first, since other texts, tables and notes may lie beside pictures.
READERS = (
    (lambda p: p.suffix.lower() == ".json" and p.is_file(), from_coco, "COCO"),
    (lambda p: p.suffix.lower() == ".csv" and p.is_file(), from_csv, "a table of boxes"),
    (lambda p: below(p / "Annotations", ".xml"), from_voc, "Pascal VOC"),
    (lambda p: any(in_labels(f, p) for f in yolo_files(p)), from_yolo, "YOLO"),
    (lambda p: p.is_dir() and coco_files(p), from_coco, "COCO"),
    (holds_voc, from_voc, "Pascal VOC"),
    (yolo_files, from_yolo, "YOLO"),
)
KNOWN = "set of boxes: unpack archives; give a COCO file (.json), a csv of picture,x1,y1,x2,y2, or a folder with "
KNOWN += "pictures and such files, with *.xml (Pascal VOC) or *.txt (YOLO)"
