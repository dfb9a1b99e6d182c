"""Boxes that others publish: how their label files are read, and whether the boxes fit the pixels."""

import json
import unicodedata

import numpy as np
import pytest
from conftest import call, refused
from PIL import Image, ImageDraw

import data
from common.train import UserError
from ingest import boxes, labels, pack


def write_pictures(folder, named):
    for name, size in named.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 60, 60)).save(folder / name)


def write_texts(folder, texts):
    """Files {name: text} -> what is read of them: the one beside the pictures, or the folder."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / next((name for name in texts if "/" not in name), "")


FILENAME = "<annotation><filename>%s</filename>%s</annotation>"
FACE = "<object><name>%s</name><bndbox><xmin>%d</xmin><ymin>%d</ymin>"
FACE += "<xmax>%d</xmax><ymax>%d</ymax></bndbox></object>"


def test_boxes_fit_a_large_jpeg_that_is_decoded_smaller(tmp_path):
    image = Image.new("RGB", (640, 320), "blue")
    image.paste("red", (320, 80, 480, 240))
    image.save(tmp_path / "a.jpg", quality=95)
    row = boxes.decode((tmp_path / "a.jpg").read_bytes(), 40, [(320, 80, 480, 240)], 1, False)
    x1, y1, x2, y2 = (40 * row["boxes"][0]).round().astype(int)
    assert (x1, y1, x2, y2) == (20, 5, 30, 15)
    red = row["images"][..., 0] > 128
    assert red[y1:y2, x1:x2].mean() > 0.95 and red[:20].sum() - red[y1:y2, x1:x2].sum() < 10


def test_pictures_of_one_name_in_two_folders_keep_their_own_boxes(tmp_path, monkeypatch):
    write_pictures(tmp_path / "yolo/images", {"train/a.png": (40, 40), "val/a.png": (40, 40)})
    lines = {"train/a": "0 .5 .5 .5 .5", "val/a": "0 .25 .25 .5 .5", "val/gone": "0 .5 .5 .1 .1"}
    write_texts(tmp_path, {f"yolo/labels/{at}.txt": text for at, text in lines.items()})
    records, _, notes, _ = boxes.find(tmp_path / "yolo")
    found = {r.split: r.box for r in records}
    assert found == {"train": [(0.25, 0.25, 0.75, 0.75)], "val": [(0, 0, 0.5, 0.5)]}
    assert "1 pictures are not there, the first: labels/val/gone.txt" in notes
    monkeypatch.chdir(tmp_path)
    assert data.open_split(data.open_or_pack("yolo", pages=True), "val")["boxes"].shape == (1, 1, 4)


def test_a_picture_is_found_by_its_name_where_that_is_one_pictures_alone():
    accent = "caf\u00e9.png"
    there = ["x/a.png", "y/a.png", "y/b.png", unicodedata.normalize("NFD", accent)]
    told = ["./x/a.png", "a.png", "b.png", accent, "p/c.png"]
    found = {"./x/a.png": "x/a.png", "b.png": "y/b.png", accent: there[3]}
    find = labels.finder(there)
    assert {name: find(name) for name in told if find(name)} == found


IMAGES = '{"images": [{"file_name": %s, "id": %s}%s], "annotations": []}'
WRONG = (  # files, the text of each, a word of the refusal
    ("x.json", "[1, 2]", "not a whole COCO file"),
    ("x.json", IMAGES % (7, 1, ""), "COCO file"),
    ("x.json", IMAGES % ('"a.png"', 1, ', {"id": 1, "file_name": "b.png"}'), "two images have one"),
    ("x.json", IMAGES % ('"no.png"', 1, ""), "none of the 1 pictures"),
    ("x.json", IMAGES % ('"a.png"', 1, ""), "has no box"),
    ("x.json", IMAGES % ('"a\\nb.png"', 1, ""), "rename it"),
    ("x.csv", "a.png,1,2,3,4\na.png,1,2,,4", "line 2: 1,2,,4 is no box"),
    ("Annotations/a.xml", FILENAME % ("a.png", "<object/>"), "Annotations/a.xml"),
    ("Annotations/a.xml Annotations/b.xml", FILENAME % ("a.png", ""), "another file's picture"),
    ("labels/a.txt", "0 .5 .5 .1 .1 .9\n0 .1 .1 .9 .1 .5 .9 .1", "labels/a.txt, line 2"),
    ("labels/a.txt", "0 9 9 4 4", "labels/a.txt, line 1"),
    ("x.txt", "", "is no set of boxes"),
)


@pytest.mark.parametrize("row", range(len(WRONG)))
def test_what_is_no_set_of_boxes_is_named(tmp_path, row):
    names, text, word = WRONG[row]
    write_pictures(tmp_path, {"a.png": (9, 9)})
    path = write_texts(tmp_path, dict.fromkeys(names.split(), text))
    assert word in refused(call("data.py", path, "--detect", "--out", "packed", cwd=tmp_path))
    assert not (tmp_path / "packed").exists()


# ---- the ways in which programs lay out and write them -------------------------------------------

RED = (250, 30, 30)
SHAPES = {"a": (80, 40), "b": (30, 60), "c": (20, 20)}
FACES_OF = {"a": [(10, 5, 30, 25), (50, 10, 80, 40)], "b": [(5, 20, 15, 30)], "c": []}


def draw(path, stem, side=1, turn=None):
    """A picture whose faces are red, of `side` times its size; EXIF may turn it afterwards."""
    image = Image.new("RGB", SHAPES[stem], (60, 90, 120))
    for x1, y1, x2, y2 in FACES_OF[stem]:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), RED)
    exif = Image.Exif()
    if turn:
        exif[boxes.ORIENTATION] = turn
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize([round(side * x) for x in image.size], Image.BOX).save(path, exif=exif)


def coco(named, polygons=False, text=False, shares=False, unsized=False):
    """{file_name: stem} -> a COCO file."""
    images, annotations = [], []
    for i, (name, stem) in enumerate(named.items()):
        key = str(i) if text else i
        w, h = SHAPES[stem]
        size = {} if unsized or shares else {"width": w, "height": h}
        images.append({"id": key, "file_name": name} | size)
        for x1, y1, x2, y2 in FACES_OF[stem]:
            one = {"id": len(annotations), "image_id": i}
            if polygons:
                one["segmentation"] = [[x1, y1, x2, y1, x2, y2], [x1, y2, x2, y2, x1, y1]]
            elif shares:
                one["bbox"] = [x1 / w, y1 / h, (x2 - x1) / w, (y2 - y1) / h]
            else:
                one["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(one)
    return json.dumps({"images": images, "annotations": annotations})


def yolo(stem, line="0 {x} {y} {w} {h}"):
    w, h = SHAPES[stem]
    lines = []
    for x1, y1, x2, y2 in FACES_OF[stem]:
        middle = {"x": (x1 + x2) / 2 / w, "y": (y1 + y2) / 2 / h}
        middle |= {"w": (x2 - x1) / w, "h": (y2 - y1) / h}
        lines.append(line.format(**middle, x1=x1 / w, y1=y1 / h, x2=x2 / w, y2=y2 / h))
    return "\n".join(lines)


def voc(stem, filename="", sized=True):
    w, h = SHAPES[stem] if sized else (0, 0)  # as labelImg writes where it does not know
    said = f"<filename>{filename}</filename>" if filename else ""
    size = f"<size><width>{w}</width><height>{h}</height></size>"
    found = "".join(FACE % ("face", x1 + 1, y1 + 1, x2, y2) for x1, y1, x2, y2 in FACES_OF[stem])
    return f'<annotation verified="no">{said}{size}{found}</annotation>'


BOTH = {"a.png": "a", "b.png": "b"}
THREE = BOTH | {"c.png": "c"}  # nobody is on it
ROWS = [f"{s}.png,{x1},{y1},{x2},{y2},face" for s in "ab" for x1, y1, x2, y2 in FACES_OF[s]]
ROWS = "\n".join([*ROWS, "c.png,,,,"])
TREES = {"train/images/a.png": "a", "valid/images/b.png": "b"}
SAME = {"train2017/1.png": "a", "val2017/1.png": "b"}
OUTLINE = "1 {x1} {y1} {x2} {y1} {x2} {y2} {x1} {y2}"
POLYGON = (
    "<object><polygon><pt><x>11</x><y>6</y></pt><pt><x>30</x><y>25</y></pt></polygon></object>"
)
POLYGON += "<object><polygon><x1>51</x1><y1>11</y1><x2>80</x2><y2>40</y2></polygon></object>"
KEYPOINTS = "0 {x} {y} {w} {h} .9 .9 .1 .1"
FOLDERS = {  # {picture: which}, {label file: its text}; x.json or x.csv is given to data.py, else the folder
    "YOLO, folders of splits": (
        TREES,
        {"train/labels/a.txt": yolo("a"), "valid/labels/b.txt": yolo("b")},
    ),
    "YOLO, beside": (
        BOTH,
        {"a.txt": yolo("a"), "b.txt": yolo("b"), "classes.txt": "face", "README.txt": "from x\n"},
    ),
    "YOLO, beside in CVAT's folder": (
        {"obj_train_data/a.png": "a", "obj_train_data/b.png": "b"},
        {f"obj_train_data/{x}.txt": yolo(x) for x in "ab"} | {"train.txt": "data/a.png"},
    ),
    "YOLO, two suffixes and blank lines": (
        {"images/a.png": "a", "images/b.png": "b"},
        {"labels/a.png.txt": f"\n{yolo('a')}\n \n", "labels/b.png.txt": "\ufeff" + yolo("b")},
    ),
    "YOLO, capitals": (
        {"Images/a.png": "a", "Images/b.png": "b"},
        {"Labels/a.TXT": yolo("a"), "Labels/b.txt": yolo("b"), "Labels/classes.txt": "face"},
    ),
    "YOLO beside Pascal VOC's folders": (
        {"JPEGImages/a.png": "a", "JPEGImages/b.png": "b"},
        {"labels/a.txt": yolo("a"), "labels/b.txt": yolo("b")},
    ),
    "YOLO, outlines": (
        BOTH,
        {"a.txt": yolo("a", OUTLINE), "b.txt": yolo("b", OUTLINE + " {x1} {y1}")},
    ),
    "YOLO, keypoints": (
        BOTH,
        {f"{x}.txt": yolo(x, KEYPOINTS) for x in "ab"} | {"data.yaml": "kpt_shape: [2, 2]"},
    ),
    "COCO beside each split": (
        {"train/1.png": "a", "valid/1.png": "b"},
        {
            f"{x}/_annotations.coco.json": coco({"1.png": y})
            for x, y in (("train", "a"), ("valid", "b"))
        },
    ),
    "COCO, annotations/ beside the splits": (
        SAME,
        {
            f"annotations/of_{x}.json": coco({"1.png": y})
            for x, y in (("train2017", "a"), ("val2017", "b"))
        },
    ),
    "COCO, one file in annotations/": (
        {"train2017/a.png": "a", "train2017/b.png": "b"},
        {"annotations/x.json": coco(BOTH)},
    ),
    "COCO, splits of one folder of pictures": (
        {"images/a.png": "a", "images/b.png": "b"},
        {"train.json": coco({"a.png": "a"}), "val.json": coco({"b.png": "b"}), "notes.json": "[]"},
    ),
    "COCO, polygons and ids that are text": (
        BOTH,
        {"x.json": coco(BOTH, polygons=True, text=True)},
    ),
    "COCO, shares": (BOTH, {"x.json": coco(BOTH, shares=True)}),
    "COCO of Windows": (
        {"images/a.png": "a", "images/b.png": "b"},
        {"x.json": coco({"images\\a.png": "a", "D:\\set\\images\\b.png": "b"})},
    ),
    "Pascal VOC without suffixes": (
        {"JPEGImages/a.png": "a", "JPEGImages/b.png": "b"},
        {"Annotations/a.xml": voc("a", "a"), "Annotations/b.xml": voc("b")},
    ),
    "Pascal VOC with old names": (
        {"JPEGImages/a.png": "a", "JPEGImages/b.png": "b"},
        {"Annotations/a.xml": voc("a", "IMG_1.jpg"), "Annotations/b.xml": voc("b", "a.png")},
    ),
    "Pascal VOC with names of its own": (
        {"JPEGImages/a.png": "a", "JPEGImages/b.png": "b"},
        {"Annotations/1.xml": voc("a", "a.png"), "Annotations/2.xml": voc("b", "b.png")},
    ),
    "Pascal VOC beside, and equal names": (
        {"train/1.png": "a", "valid/1.png": "b"},
        {"train/1.xml": voc("a", "1.png", sized=False), "valid/1.xml": voc("b")},
    ),
    "Pascal VOC in another folder, polygons": (
        BOTH,
        {"annotations/a.xml": f"<annotation>{POLYGON}</annotation>", "annotations/b.xml": voc("b")},
    ),
    "YOLO of a picture without faces": (
        {f"images/{name}": stem for name, stem in THREE.items()},
        {"labels/a.txt": yolo("a"), "labels/b.txt": yolo("b")},
    ),
    "Pascal VOC of a picture without faces, and other files": (
        {f"JPEGImages/{name}": stem for name, stem in THREE.items()},
        {f"Annotations/{x}.xml": voc(x, f"{x}.png") for x in "abc"} | {"more/about.xml": "nothing"},
    ),
    "COCO of a picture without faces": (THREE, {"x.json": coco(THREE)}),
    "csv": (THREE, {"x.csv": f"picture,x1,y1,x2,y2,kind\n{ROWS}"}),
    "csv of columns without names": (THREE, {"x.csv": ROWS}),
    "csv of Open Images": (THREE, {"x.csv": f"ID,XMin,YMin,XMax,YMax,Class\n{ROWS}"}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_layout_as_programs_write_it_gives_the_same_boxes(name, tmp_path):
    named, texts = FOLDERS[name]
    for place, stem in named.items():
        draw(tmp_path / place, stem)
    write_texts(tmp_path, texts)
    given = next((file for file in texts if file.endswith(("x.json", "x.csv"))), "")
    records, fetch, notes, shares = boxes.find(tmp_path / given)
    assert f"{len(named)} pictures, 3 boxes" in notes[0]
    assert not [x for x in notes[1:] if "shares" not in x]
    assert {record.place for record in records} == set(named)
    for record, load in fetch(records):
        stem = named[record.place]
        row = boxes.decode(load(), 40, record.box, len(record.box), shares)
        truth = np.reshape(FACES_OF[stem], (-1, 4))
        assert np.allclose(max(SHAPES[stem]) * row["boxes"], truth, atol=1e-4)
    if {"train" in str(place) and "val" in str(named) for place in named} == {True, False}:
        assert {named[r.place]: r.split for r in records} == {"a": "train", "b": "val"}


def test_a_page_is_filled_up_to_a_square_and_its_boxes_to_a_list(tmp_path):
    draw(tmp_path / "b.png", "b")
    row = boxes.decode((tmp_path / "b.png").read_bytes(), 40, FACES_OF["b"], 2, False)
    assert np.allclose(row["boxes"], [np.divide(FACES_OF["b"][0], 60), [-1] * 4])
    gray = (row["images"] == boxes.GRAY).all(2)
    assert gray.shape == (40, 40) and gray[:, 20:].all() and not gray[:, :20].any()


def test_boxes_that_are_wrong_are_cut_off_or_left_out_and_said(tmp_path):
    """One reaches out of its picture, three are empty or inverted, one is another picture's."""
    extra = [{"image_id": 0, "category_id": 2, "bbox": [70, 30, 30, 30]}]
    extra += [{"image_id": 0, "bbox": [5, 5, -3, 4]}, {"image_id": 1, "bbox": [1, 1, 0, 9]}]
    extra += [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 1e7, 9]}]
    found = json.loads(coco(THREE))
    found["annotations"] += extra
    found["categories"] = [{"id": 1, "name": "face"}, {"id": 2, "name": "body"}]
    path = write_texts(tmp_path / "set", {"x.json": json.dumps(found)})
    for name, stem in THREE.items():
        draw(tmp_path / "set" / name, stem)
    records, fetch, notes, _ = boxes.find(path)
    assert "2 classes are taken as one: face, body" in notes
    assert "3 boxes are empty or inverted, and left out, the first: a.png" in notes[-1]
    assert [len(r.box) for r in records] == [3, 1, 0]
    content = next(fetch(records))[1]()
    row = boxes.decode(content, 40, records[0].box, 3, False)["boxes"]
    assert np.allclose(row[2], (70 / 80, 30 / 80, 1, 40 / 80))
    row = boxes.decode(content, 40, [(-9, -9, 20, 40)], 1, False)["boxes"]
    assert np.allclose(row, (0, 0, 20 / 80, 40 / 80))
    assert boxes.usable((0, 0, 999_999, 9)) and not boxes.usable((0, 0, 1e6, 9))
    with pytest.raises(ValueError, match="outside of the picture"):
        boxes.decode(content, 40, [(81, 1, 99, 9)], 1, False)
    words = (path, "--detect", "--out", "packed", "--split", ".4,.3,.3")
    call("data.py", *words, cwd=tmp_path, check=0)
    found = [data.open_split(tmp_path / "packed", p.stem) for p in (tmp_path / "packed").iterdir()]
    own = np.concatenate([split["boxes"].reshape(-1, 4) for split in found])
    assert (own[:, 0] >= 0).sum() == 4 and own.max() <= 1 and found[0]["header"]["size"] == 256


def test_a_json_for_each_split_gives_the_split(tmp_path):
    for stem in "ab":
        draw(tmp_path / f"images/{stem}.png", stem)
    annotations = tmp_path / "annotations"
    write_texts(
        annotations, {"in_train.json": coco({"a.png": "a"}), "in_val.json": coco({"b.png": "b"})}
    )
    found = {r.key: r.split for r in boxes.find(tmp_path)[0]}
    assert found == {"images/a.png": "train", "images/b.png": "val"}
    alone = boxes.find(annotations / "in_train.json")[0]
    assert [r.split for r in alone] == [None]  # whoever gives one file has all of it dealt


# ---- boxes and pixels ----------------------------------------------------------------------------


def overlap(path):
    """IoU of what is red and what is in a box, for each picture that is read."""
    records, fetch, notes, shares = boxes.find(path)
    found = {}
    for record, load in fetch(records):
        row = boxes.decode(load(), 96, record.box, max(1, len(record.box)), shares)
        red = (row["images"][..., 0] > 150) & (row["images"][..., 1] < 60)
        inside = np.zeros_like(red)
        for x1, y1, x2, y2 in (96 * row["boxes"][: len(record.box)]).round().astype(int):
            inside[y1:y2, x1:x2] = True
        found[record.key] = (inside & red).sum() / (inside | red).sum()
    return found, notes


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("turn", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("side", [0.5, 1])
def test_boxes_of_a_stored_picture_turn_and_scale_with_it(tmp_path, suffix, turn, side):
    named = {f"{stem}.{suffix}": stem for stem in "ab"}
    for name, stem in named.items():
        draw(tmp_path / name, stem, side, turn)
    found, notes = overlap(write_texts(tmp_path, {"x.json": coco(named)}))
    assert min(found.values()) > 0.75
    assert sum("turned" in note for note in notes) == (turn > 1)
    assert sum("scaled" in note for note in notes) == (side != 1)


def test_boxes_of_the_upright_picture_stay(tmp_path):
    """A browser turns a picture before somebody draws boxes on it. Half a turn has no other size."""
    for turn, stem in ((6, "a"), (3, "b")):
        upright = Image.new("RGB", SHAPES[stem], (60, 90, 120))
        x1, y1, x2, y2 = FACES_OF[stem][0]
        upright.paste(RED, (x1, y1, x2, y2))
        back = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[turn]
        exif = Image.Exif()
        exif[boxes.ORIENTATION] = turn
        upright.transpose(back).save(tmp_path / f"{stem}.png", exif=exif)
    rows = "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,80,40,x,10,5,30,25\n"
    found, notes = overlap(write_texts(tmp_path, {"x.csv": rows + "b.png,30,60,x,5,20,15,30\n"}))
    assert min(found.values()) > 0.9 and len(notes) == 1


def test_boxes_of_another_shape_leave_with_their_picture(tmp_path):
    named = {f"{i}.png": "a" for i in range(40)}
    for name, stem in named.items():
        draw(tmp_path / name, stem)
    Image.new("RGB", (50, 40)).save(tmp_path / "7.png")  # somebody cropped it
    path = write_texts(tmp_path, {"x.json": coco(named)})
    found, notes = overlap(path)
    assert len(found) == 39 and "7.png" not in found and min(found.values()) > 0.9
    assert "1 of 40 pictures" in notes[-1] and "7.png" in notes[-1] and "50 x 40" in notes[-1]
    for i in range(3):
        Image.new("RGB", (50, 40)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"4 of 40 pictures .*0\.png"):
        boxes.find(path)
    write_texts(tmp_path, {"x.json": coco(named, unsized=True)})
    assert len(boxes.find(path)[0]) == 40  # without sizes, nobody can tell


# ---- repeated and odd labels ---------------------------------------------------------------------

TWICE = {
    "YOLO, each line twice": {f"{x}.txt": f"{yolo(x)}\n{yolo(x)}" for x in "ab"},
    "YOLO, two classes": {
        f"{x}.txt": f"{yolo(x)}\n{yolo(x, '7 {x} {y} {w} {h} 0.5')}" for x in "ab"
    },
    "Pascal VOC, each object twice": {
        f"{x}.xml": voc(x).replace(
            "</size>", f"</size>{voc(x).split('</size>')[1].split('</ann')[0]}"
        )
        for x in "ab"
    },
    "COCO, two files": {"instances.json": coco(BOTH), "person_keypoints.json": coco(BOTH)},
}


@pytest.mark.parametrize("name", TWICE)
def test_a_box_that_is_there_twice_is_one_and_is_counted(name, tmp_path):
    for place, stem in BOTH.items():
        draw(tmp_path / place, stem)
    write_texts(tmp_path, TWICE[name])
    records, _, notes, _ = boxes.find(tmp_path)
    assert {r.key: len(r.box) for r in records} == {"a.png": 2, "b.png": 1}
    assert "3 boxes repeat" in notes[-1] and "a.png" in notes[-1]


MANY = {f"{i}.png": "b" for i in range(30)}  # a box each
ODD = {  # what can't be read, and how many pictures stay
    "COCO, no such image": ({"image_id": 99, "bbox": [1, 1, 5, 5]}, 30),
    "COCO, no box": ({"image_id": 3}, 30),
    "COCO, no box, and no other": ({"image_id": 3}, 29),
    "COCO, an empty box and a mask": (
        {"image_id": 3, "bbox": [], "segmentation": {"counts": "x"}},
        30,
    ),
    "COCO, three numbers": ({"image_id": 3, "bbox": [1, 2, 3]}, 30),
    "YOLO, a word": (f"{yolo('b')}\nface", 30),
    "YOLO, pixels": (f"{yolo('b')}\n0 15 30 10 10", 30),
    "YOLO, nothing but commas": ("0,.5,.5,.1,.1", 29),
    "Pascal VOC, cut off": (voc("b")[:90], 29),
    "Pascal VOC, empty": ("", 29),
    "Pascal VOC, an object without a box": (voc("b").replace("</ann", "<object/></ann"), 30),
    "csv, no number": ("3.png,1,2,three,4", 30),
}


@pytest.mark.parametrize("name", ODD)
def test_one_odd_label_is_named_and_more_than_a_twentieth_is_an_error(name, tmp_path):
    wrong, stay = ODD[name]
    for place, stem in MANY.items():
        draw(tmp_path / place, stem)

    def write(odd):
        """The set with so many odd labels -> what is given to data.py."""
        if name.startswith("COCO"):
            found = json.loads(coco(MANY))
            if "no other" in name:
                del found["annotations"][3]
            found["annotations"] += [{"id": "odd3"} | wrong] * odd
            return write_texts(tmp_path, {"x.json": json.dumps(found)})
        if name.startswith("csv"):
            rows = [f"{picture},5,20,15,30" for picture in MANY]
            return write_texts(tmp_path, {"x.csv": "\n".join(rows + [wrong] * odd)})
        good, suffix = (yolo("b"), "txt") if name.startswith("YOLO") else (voc("b"), "xml")
        labelled = {f"{i}.{suffix}": wrong if 3 <= i < 3 + odd else good for i in range(30)}
        write_texts(tmp_path, labelled)
        return tmp_path

    records, _, notes, _ = boxes.find(write(1))
    assert len(records) == stay and sum(len(r.box) for r in records) == stay
    assert "1 of 3" in notes[1]
    lost = [note for note in notes[2:] if "1 pictures have no label" in note]
    assert len(lost) == len(notes) - 2 == 30 - stay
    first = notes[1].split("the first: ")[1]
    assert ("line 31" if name.startswith("csv") else "3") in first
    with pytest.raises(UserError, match="2 of 3"):
        boxes.find(write(2))


def test_two_files_of_one_picture_are_not_mixed(tmp_path):
    """A file is copied to begin another, and its <filename> stays: with a picture of its own, or not."""
    for place, stem in MANY.items():
        draw(tmp_path / place, stem)
    named = {f"of{i}.xml": voc("b", f"{i}.png") for i in range(29)} | {"29.xml": voc("b", "29.png")}
    for copied in ("1copy.xml", "z.xml"):
        write_texts(
            tmp_path, named | {copied: voc("a", "29.png" if copied == "1copy.xml" else "7.png")}
        )
        records, _, notes, _ = boxes.find(tmp_path)
        assert {len(r.box) for r in records} == {1} and f"the first: {copied}" in notes[1]
        (tmp_path / copied).unlink()


def landmarks(box, middle, spread, count):
    """x y width height of a box, and points in it as programs find them: two eyes, a nose, a mouth."""
    at = np.array([(-0.2, -0.15), (0.2, -0.15), (0, 0.05), (-0.15, 0.25), (0.15, 0.25)][:count])
    return [*box, *(middle + spread * at * box[2:]).ravel()]


def ring(x, y, side, corners, start=0.0):
    angles = start + np.arange(corners) * 2 * np.pi / corners
    return np.stack([x + side * np.cos(angles), y + side * np.sin(angles)], 1).ravel()


AT = np.random.default_rng(0).uniform(0.3, 0.6, (12, 2))  # a face a picture, in its middle
SIDES = np.random.default_rng(1).uniform(0.1, 0.3, (12, 2))
FACES = [np.r_[at, side] for at, side in zip(AT, SIDES, strict=True)]
POINTED = {  # numbers of each line; do they say a box and points?
    "15 columns": ([landmarks(f, f[:2], 1, 5) for f in FACES], True),
    "13 columns": ([landmarks(f, f[:2], 0.9, 4) for f in FACES], True),
    "a profile whose nose is outside": (
        [landmarks(f, f[:2] + (f[2] * 0.4 * (i < 4), 0), 1, 5) for i, f in enumerate(FACES)],
        True,
    ),
    "nobody found the points": ([[*f, *[-1] * 10] for f in FACES], True),
    "19 columns, with what is visible": (
        [[*f, *np.insert(landmarks(f, f[:2], 1, 5)[4:], [2, 4, 6, 8, 10], 2)] for f in FACES],
        True,
    ),
    "points in some, and none in others": (
        [[*f, *[0] * 10] if i % 2 else landmarks(f, f[:2], 1, 5) for i, f in enumerate(FACES)],
        True,
    ),
    "a single face at the border": (
        [landmarks(np.array([0.11, 0.42, 0.22, 0.4]), (0.11, 0.42), 1, 5)],
        True,
    ),
    "outlines of seven points": ([ring(x, y, 0.1, 7, x) for x, y in AT], False),
    "small ones in the middle": ([ring(x, y, 0.03, 20, y) for x, y in AT], False),
    "turned squares": ([ring(x, y, 0.05, 4, 9 * x) for x, y in AT], False),
}


@pytest.mark.parametrize("name", POINTED)
def test_a_box_with_points_is_no_outline_and_a_line_says_so(tmp_path, name):
    lines, are_boxes = POINTED[name]
    write_pictures(tmp_path, {f"{i}.png": (40, 40) for i in range(len(lines))})
    texts = {f"labels/{i}.txt": " ".join(map(str, [0, *x])) for i, x in enumerate(lines)}
    write_texts(tmp_path, texts)
    records, _, notes, _ = boxes.find(tmp_path)
    for record in records:
        x = lines[int(record.key.split(".")[0])]
        truth = labels.around(x[::2], x[1::2])
        if are_boxes:
            truth = np.r_[x[0] - x[2] / 2, x[1] - x[3] / 2, x[0] + x[2] / 2, x[1] + x[3] / 2]
        assert np.allclose(record.box, [truth])
    assert any("look like boxes with points" in note for note in notes) == are_boxes


def test_lines_that_may_be_boxes_with_points_are_told(tmp_path):
    """Of ten outlines three look so: they stay outlines, but who has points learns what to write."""
    lines = [ring(x, y, 0.1, 8, x) for x, y in AT[:8]] + [
        landmarks(f, f[:2], 1, 5) for f in FACES[:3]
    ]
    write_pictures(tmp_path, {f"{i}.png": (40, 40) for i in range(len(lines))})
    texts = {f"{i}.txt": " ".join(map(str, [0, *x])) for i, x in enumerate(lines)}
    write_texts(tmp_path, texts)
    notes = boxes.find(tmp_path)[2]
    assert any("3 of 11 outlines may be" in note and "kpt_shape" in note for note in notes)
    write_texts(tmp_path, {"data.yaml": "kpt_shape: [5, 2]"})
    assert len(boxes.find(tmp_path)[2]) == 1


HALF = [f"{i}.png" for i in range(5)]  # of ten
FEW = {
    "Pascal VOC": {f"Annotations/{i}.xml": voc("b") for i in range(5)},
    "COCO": {"annotations/some.json": coco(dict.fromkeys(HALF, "b"))},
    "csv": {"x.csv": "\n".join(f"{name},5,20,15,30" for name in HALF)},
}


@pytest.mark.parametrize("name", FEW)
def test_pictures_that_no_label_file_names_are_counted(tmp_path, name):
    for i in range(10):
        draw(tmp_path / f"{i}.png", "b")
    records, _, notes, _ = boxes.find(write_texts(tmp_path, FEW[name]))
    assert len(records) == 5
    assert sum("5 pictures have no label" in note and "5.png" in note for note in notes) == 1


@pytest.mark.parametrize("slash", "/\\")
def test_boxes_of_a_picture_that_is_not_there_are_of_no_other_one(tmp_path, slash):
    """A list of two folders with pictures of one name, and only one of them is there."""
    write_pictures(tmp_path / "one", {"a.png": (40, 40)})
    rows = "one/a.png,1,1,9,9\ntwo/a.png,20,20,30,30\n"
    rows = rows.replace("/", slash)
    write_texts(tmp_path, {"boxes.csv": f"path,x1,y1,x2,y2\n{rows}"})
    records, _, notes, _ = boxes.find(tmp_path / "boxes.csv")
    assert [r.box for r in records] == [[(1, 1, 9, 9)]]
    assert any(f"two{slash}a.png" in note for note in notes)


def test_a_missing_picture_of_val_gives_no_boxes_to_train(tmp_path):
    """Two COCO files whose pictures have one name, and that of val is not there."""
    for split in ("train", "valid"):
        write_pictures(tmp_path / split, {"a.png": (40, 40), f"{split}.png": (40, 40)})
        images = [{"id": i, "file_name": x} for i, x in enumerate(("a.png", f"{split}.png"))]
        side = 10 if split == "train" else 20
        faces = [{"image_id": i, "bbox": [1, 1, side, side], "category_id": 1} for i in (0, 1)]
        text = json.dumps({"images": images, "annotations": faces})
        write_texts(tmp_path, {f"{split}/_annotations.coco.json": text})
    (tmp_path / "valid/a.png").unlink()
    records, _, notes, _ = boxes.find(tmp_path)
    assert {r.place: r.box for r in records} == {
        "train/a.png": [(1, 1, 11, 11)],
        "train/train.png": [(1, 1, 11, 11)],
        "valid/valid.png": [(1, 1, 21, 21)],
    }
    assert any("1 pictures are not there" in note for note in notes)


def test_a_table_of_boxes_may_tell_the_split_and_bare_pictures_are_told(tmp_path):
    names = [f"{i}.png" for i in range(5)]
    write_pictures(tmp_path, dict.fromkeys(names, (40, 40)))
    rows = ["0.png,1,1,9,9,train", "1.png,1,1,9,9,val", *(f"{x},,,,,train" for x in names[2:])]
    text = "\n".join(["path,x1,y1,x2,y2,split", *rows])
    records, _, notes, _ = boxes.find(write_texts(tmp_path, {"boxes.csv": text}))
    assert {r.place: r.split for r in records}["1.png"] == "val"
    assert any("3 pictures have no box" in note for note in notes)


def test_the_sheet_shows_the_boxes_of_pages(tmp_path):
    for place, stem in MANY.items():
        draw(tmp_path / place, stem)
    path = write_texts(tmp_path, {"x.json": coco(MANY)})
    pack.pack(path, tmp_path / "packed", detect=True, size=60, dedupe="off")
    rows = dict(pack.sheet_rows(data.open_split(tmp_path / "packed", "train")))
    changed = (rows["pictures"] != np.stack(rows["boxes"])).any(3)
    assert changed[:, 20:31, 5:16].sum() == changed.sum() > 0  # around the face
    assert not changed[:, 22:28, 7:13].any()
    said = call("data.py", "--show", "packed", cwd=tmp_path, check=0).stdout
    assert "written" in said and "weights/toon-det --data packed --out runs/packed-det" in said
    assert "sheet.png is there already" in refused(
        call("data.py", "--show", "packed", cwd=tmp_path)
    )
