"""Pages with boxes: those that are drawn, and those that others publish."""

import json
import unicodedata

import numpy as np
import pytest
from conftest import call, refused
from PIL import Image

import data
from ingest import boxes, scenes, splits, toon


@pytest.fixture(scope="module")
def pages():
    items = [item for item in scenes.plan() if item["split"] == "val"][:40]
    return items, [scenes.draw(item, 96) for item in items]


def test_a_page_is_drawn_the_same_twice_and_characters_stay_in_their_split(pages):
    items, drawn = pages
    again = scenes.draw(items[3], 96)
    assert all(np.array_equal(again[k], drawn[3][k]) for k in ("image", "boxes", "heads"))
    who = {
        s: {p["name"] for i in scenes.plan() if i["split"] == s for p in i["people"]}
        for s in scenes.COUNTS
    }
    assert sum(map(len, who.values())) == len(set.union(*who.values())) == len(toon.cast())


def test_boxes_are_of_faces_inside_the_page_and_of_heads_around_them(pages):
    sizes, counts = [], []
    for page in pages[1]:
        face, head = (page[k][page[k][:, 0] >= 0] for k in ("boxes", "heads"))
        assert len(face) == len(head) == len(page["names"])
        assert (face >= 0).all() and (face <= 1).all() and (face[:, 2:] > face[:, :2]).all()
        assert (head[:, :2] <= face[:, :2]).all() and (head[:, 2:] >= face[:, 2:]).all()
        sizes += (face[:, 2:] - face[:, :2]).prod(1).tolist()
        counts.append(len(face))
    assert 0 in counts and max(counts) >= 4 and min(sizes) < 0.02 and max(sizes) > 0.1


def test_a_box_holds_the_face_that_was_painted(monkeypatch):
    """Draw it in front of nothing, alone: what changes on the page is the figure, and the box lies
    within.
    """
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


def test_a_packed_set_of_pages_has_boxes(monkeypatch, tmp_path):
    from test_fuzz import render_here

    from ingest import pack

    monkeypatch.setattr(scenes, "COUNTS", {"train": 4, "val": 2})
    monkeypatch.setattr(pack, "render", render_here)
    said = call("data.py", "scenes", "--out", "pages", "--size", 64, cwd=tmp_path, check=0).stdout
    assert "detect.py weights/toon --data pages" in said
    split = data.open_split(tmp_path / "pages", "train")
    assert split["images"].shape == (4, 64, 64, 3) and split["boxes"].shape == split[
        "heads"
    ].shape == (4, 6, 4)
    assert split["boxes"].dtype == np.float32 and (split["labels"] == -1).all()
    assert "detect" in refused(call("data.py", "scenes", "--detect", "--out", "x", cwd=tmp_path))


# ---- what others publish -------------------------------------------------------------------------

IMAGES = '{"images": [{"file_name": %s, "id": %s}%s], "annotations": []}'  # of a COCO file
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


def as_coco(root, extra=()):
    write_pictures(root)
    ids = {name: i for i, name in enumerate(PICTURES)}
    rows = [
        {"image_id": ids[n], "category_id": 1, "bbox": [a, b, c - a, d - b]}
        for n, own in TRUE.items()
        for a, b, c, d in own
    ]
    found = {
        "images": [{"id": i, "file_name": n} for n, i in ids.items()],
        "annotations": rows + list(extra),
        "categories": [{"id": 1, "name": "face"}, {"id": 2, "name": "body"}],
    }
    (root / "boxes.json").write_text(json.dumps(found))
    return root / "boxes.json"


def as_csv(root):
    write_pictures(root)
    lines = [f"{n},{','.join(map(str, box))},face" for n, own in TRUE.items() for box in own]
    (root / "boxes.csv").write_text("\n".join(["picture,x1,y1,x2,y2,kind", *lines]))
    return root / "boxes.csv"


def as_voc(root):
    (root / "Annotations").mkdir(parents=True)
    write_pictures(root / "JPEGImages")
    for name, own in TRUE.items():
        box = "<xmin>%s</xmin><ymin>%s</ymin><xmax>%s</xmax><ymax>%s</ymax>"
        text = "".join(
            f"<object><name>face</name><bndbox>{box % (a + 1, b + 1, c, d)}</bndbox></object>"
            for a, b, c, d in own
        )
        text = f"<annotation><filename>{name.split('/')[-1]}</filename>{text}</annotation>"
        (root / "Annotations" / f"{name.split('/')[-1][:-4]}.xml").write_text(text)
    return root


def as_yolo(root):
    (root / "labels/train").mkdir(parents=True)
    write_pictures(root / "images")
    for name, own in TRUE.items():
        w, h = PICTURES[name]
        lines = [
            f"0 {(a + c) / 2 / w} {(b + d) / 2 / h} {(c - a) / w} {(d - b) / h}"
            for a, b, c, d in own
        ]
        if lines:
            (root / "labels" / f"{name[:-4]}.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("write", [as_coco, as_csv, as_voc, as_yolo])
def test_every_layout_gives_the_same_boxes(write, tmp_path):
    records, fetch, notes, shares = boxes.find(write(tmp_path / "set"))
    found = {}
    for record, load in fetch(records):
        row = boxes.decode(load(), 40, record.box, 2, shares, clipped := [])
        assert clipped == [0] and row["images"].shape == (40, 40, 3)
        found[record.key.split("/")[-1]] = row["boxes"], row["images"], record.split
    for name, own in TRUE.items():
        if name == "empty.png" and write is as_csv:  # a table can't name a picture without a box
            continue
        told, image, split = found[name.split("/")[-1]]
        side, n = max(PICTURES[name]), len(own)
        assert (
            np.allclose(told[:n], np.reshape(own, (-1, 4)) / side, atol=1e-5)
            and (told[n:] == -1).all()
        )
        shown = (
            np.abs(image.astype(int) - (200, 60, 60)).max(2) < 10
        )  # the picture; the rest is filled up
        assert shown.sum() == np.prod([round(40 * x / side) for x in PICTURES[name]])
        assert split == ("train" if "/" in name else None)


def test_boxes_that_are_wrong_are_cut_off_or_left_out_and_said(tmp_path):
    extra = [
        {"image_id": 0, "category_id": 2, "bbox": [70, 30, 30, 30]},
        {"image_id": 0, "bbox": [5, 5, -3, 4]},
        {"image_id": 1, "category_id": 1, "bbox": [1, 1, 0, 9]},
    ]
    path = as_coco(tmp_path / "set", extra)
    result = call(
        "data.py", path, "--detect", "--out", "packed", "--split", ".4,.3,.3", cwd=tmp_path, check=0
    )
    assert "2 classes are taken as one: face, body" in result.stdout
    assert "2 boxes are empty or inverted, and left out, the first: a.png 5,5,2,9" in result.stdout
    assert "1 boxes reached out of their pictures" in result.stdout
    found = [
        data.open_split(tmp_path / "packed", p.stem)
        for p in (tmp_path / "packed").glob("*.safetensors")
    ]
    own = np.concatenate([split["boxes"].reshape(-1, 4) for split in found])
    assert (own[:, 0] >= 0).sum() == 4 and own.max() <= 1


def test_pictures_of_one_name_in_two_folders_keep_their_own_boxes(tmp_path):
    write_pictures(tmp_path / "yolo/images", {"train/a.png": (40, 40), "val/a.png": (40, 40)})
    for at, text in (
        ("train/a", "0 .5 .5 .5 .5"),
        ("val/a", "0 .25 .25 .5 .5"),
        ("val/gone", "0 .5 .5 .1 .1"),
    ):
        (tmp_path / f"yolo/labels/{at}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"yolo/labels/{at}.txt").write_text(text)
    records, _, notes, _ = boxes.find(tmp_path / "yolo")
    assert {r.split: r.box for r in records} == {
        "train": [(0.25, 0.25, 0.75, 0.75)],
        "val": [(0, 0, 0.5, 0.5)],
    }
    assert "1 pictures are not there, the first: labels/val/gone.txt" in notes
    write_pictures(
        tmp_path / "csv", {"x/a.png": (40, 40), "y/a.png": (40, 40), "y/b.png": (40, 40)}
    )
    (tmp_path / "csv/t.csv").write_text(
        "a.png,1,2,3,4\nz/a.png,1,2,3,4\ny/a.png,5,6,7,8\nb.png,1,1,9,9\n"
    )
    records, _, notes, _ = boxes.find(tmp_path / "csv/t.csv")
    assert {r.key: r.box for r in records} == {"y/a.png": [(5, 6, 7, 8)], "y/b.png": [(1, 1, 9, 9)]}
    assert "2 pictures are not there, the first: a.png" in notes  # two have that name


def test_a_picture_is_found_by_its_name_where_that_is_one_pictures_alone():
    accent = "caf\u00e9.png"
    there = ["x/a.png", "y/a.png", "y/b.png", unicodedata.normalize("NFD", accent)]
    told = ["./x/a.png", "a.png", "b.png", accent, "p/c.png"]
    assert list(boxes.find_places(told, there).values()) == [
        "x/a.png",
        None,
        "y/b.png",
        there[3],
        None,
    ]
    assert boxes.find_places(["p/b.png", "q/b.png"], there) == {"p/b.png": None, "q/b.png": None}


def test_pictures_without_a_split_beside_given_ones_are_train():
    rows, shares = [(None, str(i)) for i in range(40)], dict(train=0.5, val=0.25, test=0.25)
    dealt = splits.assign_splits(["val"] * 10 + [None] * 30, rows, shares, 0, 0)
    assert dealt == ["val"] * 10 + ["train"] * 30
    assert {"train", "val", "test"} == set(splits.assign_splits([None] * 40, rows, shares, 0, 0))


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("x.json", "[1, 2]", "is no COCO file"),
        ("x.json", '{"images": []}', "is no COCO file"),
        ("x.json", "[" * 99999, "is no COCO file"),
        ("x.json", IMAGES % (7, 1, ""), "is no COCO file"),
        (
            "x.json",
            IMAGES % ('"a.png"', 1, ', {"id": 1, "file_name": "b.png"}'),
            "two images have one id",
        ),
        (
            "x.json",
            IMAGES % ('"a.png"', 1, ', {"id": 2, "file_name": "./a.png"}'),
            "names a.png twice",
        ),
        ("x.json", IMAGES % ('"a.png"', "[1]", ""), "is no COCO file"),
        ("x.csv", "a.png,1,2,3,nose", "line 1 is not pict"),
        (
            "x.json",
            '{"images": [{"id": 1, "file_name": "no.png"}], "annotations": []}',
            "none of the 1 pictures",
        ),
        ("x.csv", "a.png,1,2,3,4\na.png,1,2,x,4", "line 2 is not picture,x1,y1,x2,y2"),
        (
            "Annotations/a.xml",
            "<annotation><object/></annotation>",
            "is not an annotation of Pascal VOC",
        ),
        ("labels/a.txt", "0 .5 .5 here .1", "line 1 is not class x y width height"),
        ("x.txt", "", "no boxes that we know"),
        ("labels/a.txt", "0 .1 .1 .9 .1 .5 .9", "line 1 is not class"),
        ("labels/a.txt", "0 9 9 4 4", "line 1 is not cl"),
        ("labels/a.txt", "\xff\xfe0", "line 1 is not class"),
        ("labels/b.txt", "0 .5 .5 .1 .1", "no picture in images/"),
    ],
)
def test_what_is_no_set_of_boxes_is_named(name, text, said, tmp_path):
    write_pictures(tmp_path, {"a.png": (9, 9)})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text, "latin-1")
    path = tmp_path if "/" in name else tmp_path / name
    assert said in refused(call("data.py", path, "--detect", "--out", "packed", cwd=tmp_path))
    assert not (tmp_path / "packed").exists()
