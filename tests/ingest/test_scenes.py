"""What is drawn, pictures and pages with boxes, and the boxes that others publish."""

import json
import unicodedata
from collections import Counter

import numpy as np
import pytest
from conftest import call, refused
from PIL import Image

import data
from ingest import boxes, scenes, toon

PUBLISHED = {  # of four of the 2,400: mean colour, pixels of each part, how far the head is turned
    0: ([141.3, 135.2, 161.2], [1421, 1672, 190, 135, 20, 544, 114], "frontal"),
    500: ([177.7, 156.0, 170.0], [1829, 1010, 338, 159, 4, 338, 418], "far turned"),
    800: ([151.0, 151.1, 151.9], [1352, 1713, 336, 120, 31, 56, 488], "turned"),
    1600: ([210.7, 219.3, 217.1], [904, 2341, 366, 112, 5, 266, 102], "turned"),
}


def test_the_pictures_are_those_that_were_published():
    """Every result on the demo set stands on these."""
    items = toon.plan(2400)
    for i, (colour, pixels, yaw) in PUBLISHED.items():
        drawn = toon.draw(items[i], 64)
        assert drawn["image"].mean((0, 1)) == pytest.approx(colour, abs=0.2)
        assert np.bincount(drawn["parts"].ravel(), minlength=7) == pytest.approx(pixels, abs=3)
        assert ((drawn["parts"] > 0) == (drawn["fg"] >= 128)).mean() > 0.985  # all but the rim
        assert drawn["style"]["yaw"] == yaw


def test_wardrobe_is_complete():
    behind = {a + " behind" for a in toon.ATTRIBUTES["accessory"]} & set(toon.DRAWINGS)
    names = {name.removesuffix(" behind") for name in behind} | set(toon.DRAWINGS)
    for attribute in ("hair_style", "fringe", "ahoge", "mark", "glasses", "accessory", "outfit"):
        assert {v for v in toon.ATTRIBUTES[attribute] if not v.startswith("no_")} <= names
    assert {f"{style} locks" for style in toon.ATTRIBUTES["hair_style"]} <= names
    assert {f"{mouth} mouth" for _, _, mouth, _ in toon.MOODS.values()} <= names
    assert {"hand", *toon.FOOD, *(sign for *_, sign in toon.MOODS.values() if sign)} <= names


def test_plan_is_balanced_or_long_tailed():
    items = toon.plan(2400)
    assert set(Counter(item["label"] for item in items).values()) == {50}
    assert len({item["key"] for item in items}) == 2400 and items == toon.plan(2400)
    assert all(item["key"].startswith(item["who"]["name"] + "/") for item in items)
    count = Counter(item["label"] for item in toon.plan(2400, tail=5))
    sizes = [count[label] for label in sorted(count)]
    assert sum(sizes) == 2400 and len(sizes) == 48 and min(sizes) == 5
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 10 * sizes[1]


def test_the_command_draws_one_character_in_a_picture_that_the_set_has_not(tmp_path):
    words = ("--who", "yukina", "--size", 16)
    assert "yukina.png written" in call("ingest.toon", *words, cwd=tmp_path, check=0).stdout
    assert Image.open(tmp_path / "yukina.png").size == (16, 16)


def test_characters_stay_in_their_split():
    who = {split: set() for split in scenes.COUNTS}
    for item in scenes.plan():
        who[item["split"]] |= {person["name"] for person in item["people"]}
    assert sum(map(len, who.values())) == len(set.union(*who.values())) == len(toon.cast())


def test_boxes_are_of_faces_inside_the_page_which_is_drawn_the_same_twice():
    items = [item for item in scenes.plan() if item["split"] == "val"][:24]
    pages = [scenes.draw(item, 96) for item in items]
    again = scenes.draw(items[3], 96)
    assert all(np.array_equal(again[k], pages[3][k]) for k in ("image", "boxes"))
    sizes, counts = [], []
    for page in pages:
        face = page["boxes"][page["boxes"][:, 0] >= 0]
        assert len(face) == len(page["names"])
        assert (face >= 0).all() and (face <= 1).all() and (face[:, 2:] > face[:, :2]).all()
        sizes += (face[:, 2:] - face[:, :2]).prod(1).tolist()
        counts.append(len(face))
    assert 0 in counts and max(counts) >= 4 and min(sizes) < 0.02 and max(sizes) > 0.1


def test_a_box_holds_the_face_that_was_painted(monkeypatch):
    """Draw it in front of nothing, alone: what changes on the page is the figure."""
    monkeypatch.setattr(scenes, "panels", lambda rng, size: [(0, 0, size, size)])
    monkeypatch.setattr(scenes, "backdrop", lambda rng, w, h: np.full((h, w, 3), 255, np.uint8))
    monkeypatch.setattr(scenes, "bubble", lambda *_: None)
    monkeypatch.setattr(scenes, "MOST", 1)
    seen = 0
    for item in scenes.plan()[:12]:
        page = scenes.draw(item, 128)
        figure = (page["image"] < 250).any(2)
        for x1, y1, x2, y2 in (128 * page["boxes"][: len(page["names"])]).round().astype(int):
            left, top, right, bottom = scenes.corners(figure)
            assert left <= x1 and top <= y1 and right >= x2 and bottom >= y2
            assert figure[y1:y2, x1:x2].mean() > 0.6
            seen += 1
    assert seen > 5


def test_what_a_bubble_covers_is_nobody_s():
    rng = np.random.default_rng(0)
    for _ in range(20):
        page, owner = np.full((128, 128, 3), 99, np.float32), np.ones((128, 128), np.int16)
        scenes.bubble(page, owner, rng)
        drawn = (page != 99).any(2)
        assert drawn.any() and (drawn & (owner == 1)).sum() < 0.02 * drawn.sum()


# ---- what others publish -------------------------------------------------------------------------

PICTURES = {"a.png": (80, 40), "train/b.png": (30, 60), "empty.png": (20, 20)}
TRUE = {
    "a.png": [(10, 5, 30, 25), (50, 10, 80, 40)],
    "train/b.png": [(5, 20, 15, 30)],
    "empty.png": [],
}


def write_pictures(folder, named=PICTURES):
    for name, size in named.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 60, 60)).save(folder / name)


def write_texts(folder, texts):
    """Files {name: text} -> what is read of them: the one beside the pictures, or the folder."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / next((name for name in texts if "/" not in name), "")


COCO = {
    "images": [{"id": i, "file_name": name} for i, name in enumerate(PICTURES)],
    "categories": [{"id": 1, "name": "face"}, {"id": 2, "name": "body"}],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 1, "bbox": [10, 5, 20, 20]},
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [50, 10, 30, 30]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 20, 10, 10]},
    ],
}
ROWS = """\
a.png,10,5,30,25,face
a.png,50,10,80,40,face
train/b.png,5,20,15,30,face
empty.png,,,,
"""
FILENAME = "<annotation><filename>%s</filename>%s</annotation>"
FACE = "<object><name>%s</name><bndbox><xmin>%d</xmin><ymin>%d</ymin>"
FACE += "<xmax>%d</xmax><ymax>%d</ymax></bndbox></object>"
FACES = FACE % ("face", 11, 6, 30, 25) + FACE % ("face", 51, 11, 80, 40)
VOC = {  # it counts from 1, and the last pixel is inside
    "Annotations/a.xml": FILENAME % ("a.png", FACES),
    "Annotations/b.xml": FILENAME % ("b.png", FACE % ("face", 6, 21, 15, 30)),
    "Annotations/empty.xml": FILENAME % ("empty.png", ""),
    "more/about.xml": "no annotation",
}
YOLO = {
    "labels/a.txt": "0 .25 .375 .25 .5\n0 .8125 .625 .375 .75",
    "labels/train/b.txt": "0 .3333333 .4166667 .3333333 .1666667",
}
LAYOUTS = {  # files, and the folder of the pictures
    "COCO": ({"x.json": json.dumps(COCO)}, ""),
    "csv": ({"x.csv": f"picture,x1,y1,x2,y2,kind\n{ROWS}"}, ""),
    "csv of columns without names": ({"x.csv": ROWS}, ""),
    "csv of Open Images": ({"x.csv": f"ID,XMin,YMin,XMax,YMax,Class\n{ROWS}"}, ""),
    "Pascal VOC": (VOC, "JPEGImages"),
    "YOLO": (YOLO, "images"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_boxes(name, tmp_path):
    texts, folder = LAYOUTS[name]
    write_pictures(tmp_path / folder)
    records, fetch, notes, shares = boxes.find(write_texts(tmp_path, texts))
    assert "3 pictures, 3 boxes" in notes[0] and len(notes) == 1
    found = {r.key.split("/")[-1]: (r, load()) for r, load in fetch(records)}
    for name in TRUE:
        record, content = found[name.split("/")[-1]]
        row = boxes.decode(content, 40, record.box, 2, shares)
        side, own = max(PICTURES[name]), np.reshape(TRUE[name], (-1, 4))
        assert np.allclose(row["boxes"][: len(own)], own / side, atol=1e-5)
        assert (row["boxes"][len(own) :] == -1).all() and row["boxes"].shape == (2, 4)
        shown = np.abs(row["images"].astype(int) - (200, 60, 60)).max(2) < 10
        width, height = (round(40 * x / side) for x in PICTURES[name])
        assert row["images"].shape == (40, 40, 3) and shown.sum() == width * height
        assert shown[:height, :width].all()  # the rest is filled up
        assert record.split == ("train" if "/" in name else None)


def test_boxes_that_are_wrong_are_cut_off_or_left_out_and_said(tmp_path):
    """One reaches out of its picture, three are empty or inverted, one is another picture's."""
    extra = [{"image_id": 0, "category_id": 2, "bbox": [70, 30, 30, 30]}]
    extra += [{"image_id": 0, "bbox": [5, 5, -3, 4]}, {"image_id": 1, "bbox": [1, 1, 0, 9]}]
    extra += [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 1e7, 9]}]
    found = COCO | {"annotations": COCO["annotations"] + extra}
    path = write_texts(tmp_path / "set", {"x.json": json.dumps(found)})
    write_pictures(tmp_path / "set")
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
    assert boxes.find_places(told, there) == found


IMAGES = '{"images": [{"file_name": %s, "id": %s}%s], "annotations": []}'
WRONG = (  # files, the text of each, a word of the refusal
    ("x.json", "[1, 2]", "not a whole COCO file"),
    ("x.json", IMAGES % (7, 1, ""), "COCO file"),
    ("x.json", IMAGES % ('"a.png"', 1, ', {"id": 1, "file_name": "b.png"}'), "two images have one"),
    ("x.json", IMAGES % ('"no.png"', 1, ""), "none of the 1 pictures"),
    ("x.json", IMAGES % ('"a.png"', 1, ""), "has no box"),
    ("x.json", IMAGES % ('"a\\nb.png"', 1, ""), "rename it"),
    ("x.csv", "a.png,1,2,3,4\na.png,1,2,,4", "line 2: 1,2,,4 is no box"),
    ("Annotations/a.xml", FILENAME % ("a.png", "<object/>"), "a.xml is not a whole annotation"),
    ("Annotations/a.xml Annotations/b.xml", FILENAME % ("a.png", ""), "another file's picture"),
    ("labels/a.txt", "0 .5 .5 .1 .1 .9\n0 .1 .1 .9 .1 .5 .9", "boxes, line 2"),
    ("labels/a.txt", "0 9 9 4 4", "boxes, line 1"),
    ("x.txt", "", "is no set of boxes"),
)


@pytest.mark.parametrize("row", range(len(WRONG)))
def test_what_is_no_set_of_boxes_is_named(tmp_path, row):
    names, text, word = WRONG[row]
    write_pictures(tmp_path, {"a.png": (9, 9)})
    path = write_texts(tmp_path, dict.fromkeys(names.split(), text))
    assert word in refused(call("data.py", path, "--detect", "--out", "packed", cwd=tmp_path))
    assert not (tmp_path / "packed").exists()
