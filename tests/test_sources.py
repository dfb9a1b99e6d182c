"""Each layout as a tiny made-up fixture: its records, what is refused, what is skipped and counted."""

import io
import json
import os
import re
import shutil
import sys
import tarfile
import time
import types
import unicodedata
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call, draw_folder, refused, run_line, stage
from PIL import EpsImagePlugin, Image

import data
from common.io import UserError, open_tensors, read_json, read_safetensors
from ingest import boxes, decode, layouts, pack, pictures, sources, tags


def png(colour=(200, 30, 30), size=(24, 24), seed=0):
    noise = np.random.default_rng(seed).normal(0, 30, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(noise + colour, 0, 255))).save(file, "PNG")
    return file.getvalue()


def lay(root, names):
    """Write a different picture (or the given bytes) under each name."""
    for i, (name, content) in enumerate((n, None) if isinstance(n, str) else n for n in names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed=i) if content is None else content)
    return root


def told(path):
    """{key: (label, split)} of a source, after every picture's bytes were fetched and found to be a
    picture.
    """
    records, fetch, _ = sources.find(path)
    loaded = [(r, Image.open(io.BytesIO(load())).size) for r, load in fetch(records)]
    assert [r for r, _ in loaded] == records and {size for _, size in loaded} == {(24, 24)}
    return {r.key: (r.label, r.split) for r in records}


NAMES = ["train/初音ミク/1.png", "train/Éclair/2.png", "test/初音ミク/3.png"]
TOLD = {
    "train/初音ミク/1.png": ("初音ミク", "train"),
    "train/Éclair/2.png": ("Éclair", "train"),
    "test/初音ミク/3.png": ("初音ミク", "test"),
}


def make_tar(path, root, mode, prefix=""):
    with tarfile.open(path, mode) as tar:
        tar.add(root, prefix or ".")
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_folders_and_archives_of_any_script_tell_the_same(tmp_path, kind):
    root = lay(
        tmp_path / "set",
        [unicodedata.normalize("NFD", n) for n in NAMES] + [("train/readme.txt", b"hello")],
    )
    path = root
    if kind == "zip":
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as z:
            for file in sorted(root.rglob("*.*")):
                z.write(file, file.relative_to(root))
    elif kind != "folder":
        path = make_tar(tmp_path / f"set.{kind}", root, "w:gz" if kind == "tar.gz" else "w")
    assert told(path) == TOLD  # names come composed, however they were stored


def test_a_tar_packs_like_its_folder_and_leaves_nothing_behind(tmp_path):
    root = draw_folder(tmp_path / "images", classes=2, each=20)
    make_tar(tmp_path / "images.tar.gz", root, "w:gz", "images")
    for source, out in ((root, "a"), (tmp_path / "images.tar.gz", "b")):
        run_line(f"data.py {source} --out {tmp_path / out} --size 16 --seed 3", tmp_path, check=0)
    splits = [[data.open_split(tmp_path / n, s) for s in ("train", "val", "test")] for n in "ab"]
    pixels = [
        sorted(
            (int(y), im.tobytes())
            for s in some
            for y, im in zip(s["labels"], s["images"], strict=True)
        )
        for some in splits
    ]
    assert pixels[0] == pixels[1] and len(pixels[0]) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "images", "images.tar.gz"]


def test_old_zip_names_are_read_as_utf8_or_japanese():
    for code, name in (
        ("utf-8", "初音ミク/1.png"),
        ("cp932", "初音ミク/1.png"),
        ("cp437", "é/1.png"),
    ):
        info = zipfile.ZipInfo(name.encode(code).decode("cp437"))
        assert sources.zip_name(info) == name


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("header", [True, False])
def test_a_table_gives_labels_splits_and_tags(tmp_path, suffix, header):
    lay(tmp_path, ["a/1.png", "a/2.png", "b 3.png"])
    rows = [
        ("a/1.png", "ミク", "train", "smile 1girl" if suffix == "csv" else "smile, brown hair"),
        ("a/2.png", "", "valid", ""),
        ("b 3.png", "x", "test", "hat"),
    ]
    if header:
        rows = [("Label", "filename", "split", "tags"), *((y, p, s, t) for p, y, s, t in rows)]
    table = tmp_path / f"list.{suffix}"
    table.write_text("".join(("," if suffix == "csv" else "\t").join(r) + "\n" for r in rows))
    assert told(table) == {
        "a/1.png": ("ミク", "train"),
        "a/2.png": (None, "val"),
        "b 3.png": ("x", "test"),
    }
    first = ("smile", "1girl") if suffix == "csv" else ("smile", "brown hair")
    assert [r.tags for r in sources.find(table)[0]] == [first, (), ("hat",)]


def test_a_list_on_standard_input(tmp_path):
    root = draw_folder(tmp_path / "images", classes=2, each=10)
    names = (
        "\n".join(str(p.relative_to(tmp_path)) for p in sorted(root.rglob("*.png"), reverse=True))
        + "\nx.txt\n"
    )
    stage("data.py", "-", "--out", "out", "--size", 16, cwd=tmp_path, check=0, input=names)
    header = data.open_split(tmp_path / "out", "train")["header"]
    assert header["classes"] == ["class0", "class1"] and len(header["keys"]) == 14
    assert "give --out" in refused(stage("data.py", "-", cwd=tmp_path, input=names))
    assert "no image found" in refused(stage("data.py", "-", "--out", "no", cwd=tmp_path, input=""))


@pytest.mark.parametrize("turned", [False, True])
def test_dafre_keeps_its_published_splits(tmp_path, turned):
    lay(tmp_path / "faces", ["0159/263159.jpg", "0933/194933.jpg", "0001/1001.jpg"])
    labels = tmp_path / "labels"
    labels.mkdir()
    rows = (
        ("train", 0, "0159/263159.jpg"),
        ("val", 1, "0933/194933.jpg"),
        ("test", 0, "0001/1001.jpg"),
    )
    for split, i, name in rows:
        (labels / f"{split}.csv").write_text(
            f"{name},{i}\n" if turned else f"class_id,dir\n{i},{name}\n"
        )
    (labels / "classid_classname.csv").write_text('0,hatsune_miku\n1,"初音, ミク"\n')
    assert told(tmp_path) == {
        "0159/263159.jpg": ("hatsune_miku", "train"),
        "0933/194933.jpg": ("初音, ミク", "val"),
        "0001/1001.jpg": ("hatsune_miku", "test"),
    }
    (labels / "val.csv").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(UserError, match="line 1 is not label,path"):
        sources.find(tmp_path)
    (tmp_path / "faces").rename(tmp_path / "other")
    with pytest.raises(UserError, match="unpack faces/ or fullMin256/"):
        sources.find(tmp_path)


def test_icartoonface_gives_identities_and_boxes(tmp_path):
    names = [f"personai_icartoonface_rectrain_0000{k}/x_{k}.jpg" for k in (0, 1)]
    lay(tmp_path / "icartoonface_rectrain", names)
    (tmp_path / "icartoonface_rectrain_det.txt").write_text(
        "".join(f"{n}\t2\t3\t20\t21\n" for n in names)
    )
    assert {k: v[0] for k, v in told(tmp_path).items()} == {n: n.split("/")[0] for n in names}
    assert sources.find(tmp_path)[0][0].box == (2, 3, 20, 21)
    (tmp_path / "icartoonface_rectrain_det.txt").write_text(f"{names[0]}\t20\t3\t2\t21\n")
    with pytest.raises(UserError, match="line 1 is not path x1 y1 x2 y2"):
        sources.find(tmp_path)


def test_moeimouto_loses_its_running_numbers(tmp_path):
    root = tmp_path / "animeface-character-dataset"
    lay(
        root,
        [
            "thumb/000_hatsune_miku/face_1_2_3.png",
            "thumb/001_kinomoto_sakura/face_4_5_6.png",
            ("thumb/000_hatsune_miku/color.csv", b"face_1_2_3.png,1,2,3,4,5,6\n"),
            ("README", b""),
        ],
    )
    for path in (root, tmp_path):
        assert {v[0] for v in told(path).values()} == {"hatsune_miku", "kinomoto_sakura"}


POSTS = [
    {
        "id": "263159",
        "tags": [{"id": "1", "name": "miku", "category": "4"}, {"name": "smile", "category": "0"}],
    },
    {
        "id": 7,
        "md5": "ab12",
        "tag_string": "rin smile hat",
        "tag_string_character": "rin",
        "parent_id": 263159,
    },
    {"id": 8, "tag_string_character": "len rin", "tag_string_general": "smile"},
    {"id": 10, "tags": {"general": ["hat"], "character": ["luka"]}},
    {"id": 11, "tags": [{"category": 4}]},
    {"id": 999, "tag_string": "not_downloaded"},
]


def test_danbooru_metadata_gives_character_tags_and_parents(tmp_path):
    lay(
        tmp_path,
        [
            "512px/0159/263159.jpg",
            "original/0159/263159.jpg",
            "images/ab/ab12.jpg",
            "8.png",
            "10.png",
            "11.png",
        ],
    )
    more = [
        {"id": 1000 + i} for i in range(14)
    ]  # one line in twenty may be broken, and that is one in 21
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps(p) + "\n" for p in POSTS + more) + "{broken\n"
    )
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        records, _, notes = sources.find(path)
        assert {r.key: (r.label, r.group, r.tags) for r in records} == {
            "512px/0159/263159.jpg": ("miku", "263159", ("smile",)),
            "images/ab/ab12.jpg": ("rin", "263159", ("smile", "hat")),
            "8.png": (None, "8", ("smile",)),
            "10.png": ("luka", "10", ("hat",)),
            "11.png": (None, "11", ()),
        }
        assert notes == [
            "read as Danbooru metadata: 3 classes (luka, miku, rin); 2 pictures without a label",
            "15 lines of the metadata have no picture here",
            "1 of 21 lines are no JSON objects, the first: metadata.jsonl, line 21",
        ]
    for text, lost in (("[1, 2]\nhello\n", "2 of 2"), ("{}\n" * 18 + "hello\n", "1 of 19")):
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(
            UserError, match=f"{lost} lines are no JSON objects, the first: metadata.jsonl, line"
        ):
            sources.find(tmp_path)


def test_dafre_takes_its_tags_from_metadata_beside_it(tmp_path):
    rows = b"0,0159/263159.jpg\n1,0007/7.jpg"
    lay(tmp_path, ["faces/0159/263159.jpg", "faces/0007/7.jpg", ("labels/train.csv", rows)])
    assert [r.tags for r in sources.find(tmp_path)[0]] == [(), ()]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(p) + "\n" for p in POSTS))
    records, _, notes = sources.find(tmp_path)
    assert [(r.label, r.tags) for r in records] == [("0", ("smile",)), ("1", ("smile", "hat"))]
    assert notes[1:] == [
        "4 lines of the metadata have no picture here",
        "2 of 2 pictures have tags",
    ]
    (tmp_path / "labels/classid_classname.csv").write_text(
        "0,Miku\n1,smile\n"
    )  # nobody's tag is his name
    (tmp_path / "metadata.jsonl").write_text(
        '{"id": 7, "tags": "smile hat"}\n{"id": 263159, "tags": "miku blue"}\n'
    )
    assert [r.tags for r in sources.find(tmp_path)[0]] == [("blue",), ("hat",)]


def test_metadata_may_be_an_array_of_posts(tmp_path):
    lay(tmp_path, ["7.png", "263159.png"])
    (tmp_path / "metadata.json").write_text(json.dumps([POSTS[0], {"id": 7}, {"id": 5}]))
    records, _, notes = sources.find(tmp_path)
    assert {r.key: r.label for r in records} == {"263159.png": "miku", "7.png": None}
    assert notes[1:] == ["1 lines of the metadata have no picture here"]


FACES = (  # as published: the folder is the last digits of Danbooru's id, then the head's box
    "0159\\263159.jpg\t0\t1,2,20,21,0.99\n"
    "0933\\194933.jpg\t1\t1,2,20,21,0.91\n"
    "0001\\1001.jpg\t1\t1,2,20,21,0.31\n"
    "0002\\1002.jpg\t1\t1,2,20,21,0.99\n"
)


def test_acrd_takes_names_and_splits_from_its_lists(tmp_path):
    """Its archive of faces has folders without leading zeros, another way than faces.tsv."""
    lay(tmp_path / "faceimgs", ["159/263159.jpg", "933/194933.jpg", "1/1001.jpg"])
    (tmp_path / "tagIds.tsv").write_text('hatsune_miku\t0\n"quoted\t1')
    with pytest.raises(UserError, match=r"put faces\.tsv"):
        sources.find(tmp_path)
    (tmp_path / "faces.tsv").write_text(FACES)
    labels = {r.key: (r.label, r.split) for r in sources.find(tmp_path)[0]}
    assert labels["faceimgs/1/1001.jpg"] == ('"quoted', None) and len(labels) == 3
    (tmp_path / "trainSplit.tsv").write_text("263159\n1002\n")
    (tmp_path / "testSplit.tsv").write_text("194933\n")
    assert told(tmp_path) == {
        "faceimgs/159/263159.jpg": ("hatsune_miku", "train"),
        "faceimgs/933/194933.jpg": ('"quoted', "test"),
    }
    assert sources.find(tmp_path)[2] == [
        'read as ACRD: train, test; 2 classes ("quoted, hatsune_miku)',
        "1 lines of faces.tsv have no picture here",
        "1 faces are in none of the lists, and left out",
    ]


def test_folders_of_kohya_lose_their_repeats_and_captions_become_tags(tmp_path):
    names = ["img/10_miku/1.png", "img/10_miku/2.png", "img/3_rin hat/1.png", "reg/1_x/1.png"]
    lay(tmp_path, names[:3])
    assert {v[0] for v in told(tmp_path).values()} == {"10_miku", "3_rin hat"}  # no captions
    texts = ["solo, brown hair,\nsmile", "1girl", "solo"]
    for name, text in zip(names, texts, strict=False):
        (tmp_path / name).with_suffix(".txt").write_text(text)
    records, _, notes = sources.find(tmp_path)
    assert notes == ["read as kohya's folders: 2 classes (miku, rin hat)"]
    assert [(r.label, r.tags) for r in records] == [
        ("miku", ("solo", "brown hair", "smile")),
        ("miku", ("1girl",)),
        ("rin hat", ("solo",)),
    ]
    assert {r.label for r in sources.find(tmp_path, layout="-")[0]} == {None}
    one = sources.find(tmp_path / "img/10_miku")[0]
    assert {r.label for r in one} == {None}


class Table:
    """What pyarrow's ParquetFile has, of two rows in each row group."""

    def __init__(self, path):
        if not Path(path).read_bytes():
            raise ValueError("Parquet file size is 0 bytes")
        about = {"info": {"features": {"label": {"names": ["miku", "rin"]}}}}
        metadata = {b"huggingface": json.dumps(about).encode()}
        names = ["file_name", "name", "image", "label", "tags"]
        self.schema_arrow = types.SimpleNamespace(names=names, metadata=metadata)
        self.num_row_groups = 2
        self.metadata = types.SimpleNamespace(
            row_group=lambda part: types.SimpleNamespace(num_rows=2)
        )

    def read_row_group(self, part, columns):
        rows = []
        for i in (2 * part, 2 * part + 1):
            image = {"bytes": png(seed=i), "path": None}
            row = {"image": image, "label": i % 2, "tags": "solo, brown hair"}
            rows.append({name: row[name] for name in columns})
        return types.SimpleNamespace(to_pylist=lambda: rows)


def test_parquet_needs_pyarrow_and_is_read_by_row_groups(tmp_path, monkeypatch):
    for split in ("train", "test"):
        lay(tmp_path, [(f"data/{split}-00000-of-00001.parquet", b"x")])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        sources.find(tmp_path)
    parquet = types.SimpleNamespace(ParquetFile=Table)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    found = told(tmp_path)
    assert len(found) == 8 and found["train-00000-of-00001/0000001"] == ("rin", "train")
    assert sources.find(tmp_path)[0][0].tags == ("solo", "brown hair")
    lay(tmp_path, [("data/val-00000-of-00001.parquet", b"")])
    with pytest.raises(UserError, match="no whole parquet file of pictures"):
        sources.find(tmp_path)


def test_parquet_of_the_real_library(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "image": [{"bytes": png(seed=i), "path": None} for i in range(5)],
        "label": list("ababa"),
    }
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table(rows), path, row_group_size=2)
    assert sorted(told(path).values()) == [("a", "train")] * 3 + [("b", "train")] * 2


# ---- layouts of folders --------------------------------------------------------------------------


def many(*folders, each=4):
    """Names of `each` pictures in each folder."""
    return [f"{folder}/{i}.png" for folder in folders for i in range(each)]


SPLITS = many("train/a", "train/b", "test/a", "test/b")
SERIES = many("genshin/hutao", "genshin/venti", "honkai/kiana", "honkai/mei")
WRAPPED = many("train/train_images/a", "train/train_images/b", "test/test_set/a", "test/test_set/b")
BOTH = "train/a train/b test/a test/b"
PEOPLE = "-/hutao -/venti -/kiana -/mei"
LAYOUTS = (  # pictures, read as, split/class of the records, pictures set aside, other reading
    (many("a", "b"), "class", "-/a -/b", 0, None),
    (many("x/y/a", "x/y/b"), "-/-/class", "-/a -/b", 0, None),
    (SPLITS, "split/class", BOTH, 0, None),
    ([f"set/{n}" for n in SPLITS], "-/split/class", BOTH, 0, None),
    (many("Training/a", "Training/b", "test-set/a", "test-set/b"), "split/class", BOTH, 0, None),
    (many("train/genshin/a", "train/genshin/b"), "split/-/class", "train/a train/b", 0, None),
    (WRAPPED, "split/-/class", BOTH, 0, None),
    (many("a/train", "b/train", "a/test", "b/test"), "class/split", BOTH, 0, None),
    (["x.png", *SPLITS], "split/class", BOTH, 1, None),
    (["x.png", *many("s/a", "s/b")], "-/class", "-/a -/b", 1, None),
    (["train/x.png", *SPLITS], "split/class", BOTH, 1, None),
    (many("Val", "Dev", "Rin"), "class", "-/Val -/Dev -/Rin", 0, None),
    (many("a/2019", "a/2020", "b/2019"), "class", "-/a -/b", 0, None),
    (many("a/a_faces", "b/b_faces"), "class", "-/a -/b", 0, None),
    ([*many("a", "b", each=8), "a/more/1.png", "b/else/2.png"], "class", "-/a -/b", 0, None),
    (["1.png", "2.png"], "pictures only", "-/-", 0, None),
    (many("train", "val"), "split", "train/- val/-", 0, None),
    ([*many("train/a", "train/b", "test")], "split/class", "train/a train/b test/-", 0, None),
    (
        ["thumb/x.png", *many("thumb/000_a", "thumb/001_b")],
        "AnimeFace Character",
        "-/a -/b",
        1,
        None,
    ),
    # what can be read in two ways: the line names the other one
    (SERIES, "-/class", PEOPLE, 0, "class"),
    ([f"set/{n}" for n in SERIES], "-/-/class", PEOPLE, 0, "-/class"),
    (
        many("train/s/a", "train/s/b", "train/t/c", "train/t/d"),
        "split/-/class",
        "train/a train/b train/c train/d",
        0,
        "split/class",
    ),
    (
        many(*(f"{s}/{c}" for s in "xy" for c in "abcdef"), each=1),
        "-/class",
        "-/a -/b -/c -/d -/e -/f",
        0,
        "class",
    ),
    (many("train/a", "train/b", "c", "d"), "split/class", "train/a train/b", 8, "class"),
    (
        many("a/train", "a/test", "b/train", "b/raw"),
        "class/split",
        "train/a test/a train/b",
        4,
        "class",
    ),
    ([*many("a", "b"), *(f"{i}.png" for i in range(8))], "class", "-/a -/b", 8, "-"),
    ([*many("a", "b"), *(f"{i}.png" for i in range(9))], "pictures only", "-/-", 0, "class"),
)


def as_kind(root, kind):
    """The folder itself, or a zip of it."""
    return shutil.make_archive(str(root), "zip", root) if kind == "zip" else root


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("row", range(len(LAYOUTS)))
def test_layouts_are_decided_and_told(tmp_path, row, kind):
    names, what, said, aside, other = LAYOUTS[row]
    path = as_kind(lay(tmp_path / "set", names), kind)
    records, _, notes = sources.find(path)
    assert {f"{r.split or '-'}/{r.label or '-'}" for r in records} == set(said.split())
    assert len(records) == len(names) - aside and len(notes) == 1
    labels = sorted({r.label for r in records} - {None})
    assert notes[0].startswith(f"read as {what}: ")
    assert (f"{len(labels)} class" if labels else "no labels") in notes[0]
    assert (f"; {aside} pictures set aside (" in notes[0]) == (aside > 0)
    assert notes[0].endswith("another way") == (other is not None)
    if other:
        assert f"; --layout {other} reads" in notes[0]
        assert sources.find(path, layout=other)[2][0].startswith("read as ")
    assert len(sources.find(path, layout="-")[0]) == len(names)


def test_layout_is_a_flag_that_begins_with_a_dash_too(tmp_path):
    lay(tmp_path / "set", SERIES)
    done = call(
        "data.py", "set", "--layout", "-/class", "--out", "out", "--size", 16, cwd=tmp_path, check=0
    )
    assert "read as -/class: 4 classes (hutao, kiana, mei, ...)" in done.stdout
    assert data.open_split(tmp_path / "out", "train")["header"]["classes"] == [
        "hutao",
        "kiana",
        "mei",
        "venti",
    ]


@pytest.mark.parametrize("k, n", [(3, 8), (4, 80), (5, 100)])
def test_a_few_are_three_pictures_or_a_twentieth_and_under_half(k, n):
    assert layouts.few(k, n) and not layouts.few(k + 1, n)
    assert not layouts.few(3, 6)


def inside(**folders):
    """Pictures in sub-folders: inside(a="xy") is a/x and a/y."""
    pairs = []
    for folder, names in folders.items():
        pairs += [("", [folder, name]) for name in names]
    return pairs


def test_folders_are_classes_where_what_is_inside_is_alike():
    assert layouts.alike_inside(inside(a="xyzw", b="xyzw"))
    assert not layouts.alike_inside(inside(a="xyzwv", b="xyzwv"))  # many names in few folders
    assert not layouts.alike_inside(inside(a="xu", b="xv"))  # half of them shared
    assert layouts.alike_inside(inside(a="xyu", b="xyv"))
    assert layouts.alike_inside(inside(a="x", b="y"))


def test_the_line_names_splits_classes_and_what_is_set_aside():
    rows = [("test", "b"), ("train", "c"), ("train", "a"), ("train", "d"), ("train", None)]
    line = layouts.told("split/class", [*rows, None, None, None], [*"12345", "z", "x", "y"])
    classes = "train, test; 4 classes (a, b, c, ...); 1 pictures without a label"
    assert line == f"read as split/class: {classes}; 3 pictures set aside (x, y, ...)"
    assert layouts.told("-", [(None, None)]) == "read as -: no labels"
    assert layouts.told("class", [(None, "a")]) == "read as class: 1 class (a)"


SPLIT_NAMES = {
    "train": "train TRAIN_SET train-images training trainset train2017 images_train",
    "val": "valid Validation val_data",
    "dev": "dev",
    "test": "testing testset test_2",
    None: "Devi valkyrie test_subject miku trainer",
}


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_names_of_splits(split):
    assert {layouts.split_of(name) for name in SPLIT_NAMES[split].split()} == {split}
    assert layouts.split_of("") is None and layouts.split_of("test 2") == "test"


# ---- what is refused, and what is skipped --------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil.png"]
)
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path, name, kind):
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("fine.png", png())
            z.writestr(zipfile.ZipInfo(name), png())
    else:
        with tarfile.open(path, "w:gz") as tar:
            for n in ("fine.png", name):
                info = tarfile.TarInfo(n)
                info.size = len(png())
                tar.addfile(info, io.BytesIO(png()))
    line = refused(call("data.py", path, "--out", "out", cwd=tmp_path))
    assert "leads out of it" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_cut_tar_is_refused(tmp_path, kind):
    root = draw_folder(tmp_path / "images", classes=2, each=10)
    path = make_tar(tmp_path / f"set.{kind}", root, "w:gz" if kind == "tar.gz" else "w")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "not a whole tar" in refused(call("data.py", path, "--out", "out", cwd=tmp_path))
    assert not list((tmp_path / "out").glob("*"))


def header(name, size, kind=b"0"):
    """The 512 bytes that stand before a member of a tar."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(**fields):
    """A PAX header, which replaces fields of the next one."""
    found = b""
    for name, value in fields.items():
        body = f" {name.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(body), 2**20) if len(str(n)) + len(body) == n)
        found += f"{length}".encode() + body
    return header("pax", len(found), b"x") + padded(found)


def member(name, data):
    return header(name, len(data)) + padded(data)


SPARSE_1 = {"GNU_sparse_major": 1, "GNU_sparse_minor": 0, "GNU_sparse_realsize": 9}
BAD_TARS = {  # what follows a good member -> a word of the refusal
    "a size of 10^20": (pax(size=10**20) + member("b.png", b"x"), "says 1000000"),
    "a size of 100 GB": (pax(size=10**11) + member("b.png", b"x"), "says 1000000"),
    "a long PAX header": (header("pax", 5 * 2**30, b"x"), "header of 5368709120"),
    "a long global PAX header": (header("pax", 5 * 2**30, b"g"), "header of 5368709120"),
    "a long name": (header("long", 5 * 2**30, b"L"), "header of 5368709120"),
    "a long link": (header("long", 5 * 2**30, b"K"), "header of 5368709120"),
    "a negative header": (header("long", -512, b"L"), "header of -512"),
    "3,000 PAX headers": (pax(comment="x") * 3000 + member("b.png", b"x"), "not a whole tar"),
    "a broken charset": (pax(size="\ud7ff").replace(b"\xed\x9f", b"\xff\xff"), "not a whole tar"),
    "sparse of old GNU": (header("b.png", 512, b"S") + bytes(512), "sparse"),
    "sparse 0.0": (pax(GNU_sparse_size="abc") + member("b.png", b"x"), "sparse"),
    "sparse 0.1": (pax(GNU_sparse_map="1,x") + member("b.png", b"x"), "sparse"),
    "sparse 1.0": (pax(**SPARSE_1) + member("b.png", b"1\nzz\n"), "sparse"),
}


@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize("kind", BAD_TARS)
def test_a_tar_whose_headers_lie_is_refused_before_it_is_read(tmp_path, kind, place):
    bad, word = BAD_TARS[kind]
    path = tmp_path / "set.tar"
    path.write_bytes((member("a.png", png()) if place == "later" else b"") + bad + bytes(1024))
    with pytest.raises(UserError, match=word if place == "later" else "whole") as problem:
        sources.find(path)
    assert len(str(problem.value)) < 300


@pytest.mark.parametrize("bad", ["version", "name", "offset"])
def test_a_zip_with_an_odd_directory_is_refused(tmp_path, bad):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())
    whole = bytearray(path.read_bytes())
    at = whole.index(b"PK\x01\x02")  # the entry of the directory
    if bad == "version":
        whole[at + 6] = 255
    elif bad == "name":
        whole[at + 9] |= 8  # it is UTF-8, says this bit
        whole[at + 46] = 255
    else:
        whole[-10:-6] = b"\xff\xff\xff\x7f"  # bytes of the directory
    path.write_bytes(whole)
    with pytest.raises(UserError, match="not a whole zip"):
        sources.find(path)


ODD_NAMES = ["a\0b.png", "a\nb.png", "a\x1b[31mb.png", "a\u2028b.png", f"{'x' * 50_000}.png"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar", "csv", "list"])
def test_a_name_that_is_not_one_line_of_text_is_refused(tmp_path, monkeypatch, name, kind):
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo("a.png")
            info.filename = name.replace("\0", "\1")  # zipfile cuts names at a NUL
            archive.writestr(info, png())
    elif kind == "tar":
        path.write_bytes(pax(path=name) + member("a.png", png()) + bytes(1024))
    elif kind == "csv":
        path.write_text(f'path,label\n"{name}",miku\n', newline="")
    elif kind == "list":
        monkeypatch.setattr("sys.stdin", [name])
        path = "-"
    with pytest.raises(UserError, match="rename it|not a table") as problem:
        sources.find(path)
    assert len(str(problem.value)) < 500 and len(str(problem.value).splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has neither")
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_devices_and_pipes_are_never_opened(tmp_path, kind):
    path = "/dev/zero" if kind == "device" else tmp_path / "pipe.png"
    if kind == "pipe":
        os.mkfifo(path)
    good = lay(tmp_path / "images", ["a.png", "b.png"])
    (tmp_path / "set.csv").write_text(f"path\n{good}/a.png\n{path}\n")
    problems = []
    found = list(pictures.pictures([path, tmp_path / "set.csv"], 16, "centre", 0, problems))
    assert len(found) == 1 and len(problems) == 2
    assert all("device or a pipe" in why for _, why in problems)
    readers = (sources.find, partial(sources.find, good), boxes.find)
    for read in (*readers, open_tensors, read_safetensors, read_json):
        with pytest.raises(UserError, match="device or a pipe"):
            read(path)


def test_formats_that_take_much_memory_may_have_fewer_pixels(tmp_path, monkeypatch):
    monkeypatch.setitem(decode.MOST_PIXELS, "WEBP", 99)
    problems = []
    for name in ("a.webp", "a.png"):
        Image.new("RGB", (10, 10)).save(tmp_path / name)
    assert len(list(pictures.whole_pictures([tmp_path], problems))) == 1
    assert problems == [
        ("a.webp", "a.webp is not a picture that can be read: 10x10 pixels of WEBP are too many")
    ]


def test_a_file_with_an_odd_name_is_printed_with_escapes(capsys):
    pictures.tell_problems([("a", "a\x1b[31m.png is no picture")], None)
    assert "a\\x1b[31m.png is no picture" in capsys.readouterr().err


def test_a_zip_with_a_damaged_directory_is_refused(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"PK\x01\x02", b"PK\xff\xff"))
    with pytest.raises(UserError, match="not a whole zip"):
        sources.find(path)


def test_copies_are_found_in_a_tar_that_was_appended_to(tmp_path):
    """`tar -r` writes a name a second time: what is fetched then comes in another order than the
    records.
    """
    pictures = {
        f"a/{i}.png": png(seed=i, colour=(20 * i, 90, 200 - 20 * i), size=(48, 48))
        for i in range(8)
    }
    pictures["a/8.png"] = pictures["a/3.png"]
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in [*pictures, "a/0.png"]:
            info = tarfile.TarInfo(name)
            info.size = len(pictures[name])
            tar.addfile(info, io.BytesIO(pictures[name]))
    records, fetch, notes = sources.find(tmp_path / "set.tar")
    assert len(records) == 9 and notes[1:] == ["1 names came twice; the first of each is kept"]
    pairs, _ = pack.near_duplicates(records, fetch, "group", tmp_path / "out")
    assert [{records[i].key for i in pair} for pair in pairs] == [{"a/3.png", "a/8.png"}]


def test_where_a_list_of_whole_paths_lies_says_nothing_of_splits_and_classes(tmp_path):
    lay(tmp_path / "dev" / ".cache" / "set", ["miku/1.png", "miku/2.png", "rin/3.png"])
    root = tmp_path / "dev" / ".cache" / "set"
    lines = [f"{root}/miku/1.png\n", f"{root}/rin/3.png\n", f"{root}/miku/2.png\n", "\n"]
    records, fetch, note = sources.from_list(lines)
    assert note == "read as class: 2 classes (miku, rin)"
    assert {r.key: (r.label, r.split) for r in records} == {
        "miku/1.png": ("miku", None),
        "miku/2.png": ("miku", None),
        "rin/3.png": ("rin", None),
    }
    assert all(load() == (root / r.key).read_bytes() for r, load in fetch(records))


def test_links_are_followed_but_never_round_in_circles(tmp_path):
    lay(tmp_path / "else", ["rin/1.png"])
    lay(tmp_path / "set", ["miku/1.png"])
    os.symlink(tmp_path / "else" / "rin", tmp_path / "set" / "rin")
    os.symlink(tmp_path / "set", tmp_path / "set" / "miku" / "loop")
    os.symlink(tmp_path / "set" / "miku", tmp_path / "else" / "rin" / "round")
    os.symlink("self.png", tmp_path / "set" / "miku" / "self.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "set" / "miku" / "dead.png")
    keys = set(told(tmp_path / "set"))
    assert {"miku/1.png", "rin/1.png"} <= keys and len(keys) <= 4


def test_names_that_differ_in_case_are_told_and_doubles_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z, pytest.warns(UserWarning):
        for i, name in enumerate(["Miku/1.png", "miku/1.png", "rin/1.png", "rin/1.png"]):
            z.writestr(name, png(seed=i))
    records, _, notes = sources.find(tmp_path / "set.zip")
    assert [r.key for r in records] == ["Miku/1.png", "miku/1.png", "rin/1.png"]
    assert notes == [
        "read as class: 3 classes (Miku, miku, rin)",
        "1 names came twice; the first of each is kept",
        "classes that differ only in case are kept apart: Miku and miku",
    ]


def test_min_per_class_leaves_small_classes_out(tmp_path):
    draw_folder(tmp_path / "images", classes=3, each=12)
    lay(tmp_path / "images", [f"rare/{i}.png" for i in range(5)])
    done = run_line("data.py images --out out --size 16 --min-per-class 6", tmp_path, check=0)
    assert "5 images left out: 1 classes have fewer than 6" in done.stdout
    assert data.open_split(tmp_path / "out", "train")["header"]["classes"] == [
        "class0",
        "class1",
        "class2",
    ]


def saved(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def odd_files():
    """One picture, red above blue, in every odd way -> {name: bytes}."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20], pixels[20:] = (255, 0, 0), (0, 0, 255)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    gray = np.where(pixels[..., :1] > 0, 60000, 15000).astype(np.uint16)[..., 0]
    return {
        "exif.jpg": saved(
            image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95
        ),
        "palette.png": saved(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG", quality=95),
        "animated.gif": saved(
            image, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40))]
        ),
        "deep.png": saved(Image.fromarray(gray), "PNG"),
        "gray.jpg": saved(image.convert("L"), "JPEG", quality=95),
    }


@pytest.mark.parametrize("name", odd_files())
def test_odd_files_are_decoded_upright_in_rgb(name):
    got = decode.decode(odd_files()[name], 20, fg=False)["images"].astype(int)
    top, bottom = got[:9].mean((0, 1)), got[11:].mean((0, 1))
    want = {"deep.png": ([233] * 3, [58] * 3), "gray.jpg": ([76] * 3, [29] * 3)}.get(
        name, ([255, 0, 0], [0, 0, 255])
    )
    assert np.abs(top - want[0]).max() < 12 and np.abs(bottom - want[1]).max() < 12, (top, bottom)


def test_bombs_and_broken_files_are_skipped_and_named(tmp_path):
    root = draw_folder(tmp_path / "images", classes=2, each=40)
    bomb = saved(
        Image.new("1", (14000, 14000)), "PNG"
    )  # a few kilobytes that unpack to 196 megapixels
    whole = saved(Image.effect_noise((64, 64), 60), "JPEG")
    lay(
        root,
        [
            ("class0/bomb.png", bomb),
            ("class1/cut.jpg", whole[: len(whole) // 2]),
            ("class1/empty.png", b""),
        ],
    )
    done = call(
        "data.py", root, "--out", "out", "--size", 16, "--split", "1,0,0", cwd=tmp_path, check=0
    )
    header = data.open_split(tmp_path / "out", "train")["header"]
    skipped = dict(header["skipped_first"])
    assert (
        set(skipped) == {"class0/bomb.png", "class1/cut.jpg", "class1/empty.png"}
        and header["skipped"] == 3
    )
    assert "decompression bomb" in skipped["class0/bomb.png"] and "skipped 3" in done.stdout


def test_pictures_that_are_decoded_at_the_same_time_share_the_memory(tmp_path, monkeypatch):
    """Sixteen of 88 megapixels side by side took 6 GB."""
    names = [f"{i}.png" for i in range(16)]
    lay(tmp_path, names)
    monkeypatch.setattr(decode, "PIXELS", decode.Room(2 * 24 * 24))
    upright = decode.upright
    busy, counts = [], []

    def slow(img):
        busy.append(img)
        counts.append(len(busy))
        time.sleep(0.01)
        busy.remove(img)
        return upright(img)

    monkeypatch.setattr(decode, "upright", slow)
    problems = []
    found = list(pictures.pictures([tmp_path], 16, "centre", 0, problems))
    assert len(found) == 16 and not problems and max(counts) == 2
    assert decode.PIXELS.free == 2 * 24 * 24


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
OTHER_FORMATS = {
    "a program": EPS + b"(made) (w) file closefile showpage\n",
    "an endless program": EPS + b"{} loop\n",
    "wmf": b"\xd7\xcd\xc6\x9a"
    + bytes(6)
    + b"\x09\x00" * 3
    + bytes(6)
    + b"\x01\x00\t\x00"
    + bytes(40),
    "pdf": b"%PDF-1.4\n1 0 obj <</Type /Catalog>> endobj\ntrailer <</Root 1 0 R>>\n%%EOF\n",
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_other_formats_are_no_pictures_and_start_no_program(tmp_path, monkeypatch, kind):
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\necho started > {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow asks once a process
    lay(tmp_path, [("x.png", OTHER_FORMATS[kind])])
    problems = []
    with pytest.raises(UserError, match=r"x\.png is not .* cannot identify"):
        list(pictures.whole_pictures([tmp_path / "x.png"], problems))
    assert not (tmp_path / "started").exists()


def test_pictures_are_opened_in_one_place():
    """Pillow without a list of formats would hand an EPS to Ghostscript."""
    code = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if p.parent.name != "tests"]
    found = [p for p in code if re.search(r"Image\.open\(|imread|mpimg", p.read_text())]
    assert [p.relative_to(ROOT).as_posix() for p in found] == ["ingest/decode.py"]


def test_a_failure_in_a_later_split_leaves_no_half_set(tmp_path):
    for split, each in (("train", 20), ("test", 10)):
        draw_folder(tmp_path / "images" / split, classes=2, each=each)
    for i in range(4):
        (tmp_path / "images" / "train" / "class0" / f"illust{i}_0.png").write_bytes(b"no picture")
    assert "more than 5 %" in refused(
        call("data.py", "images", "--out", "out", "--size", 16, cwd=tmp_path)
    )
    assert not list((tmp_path / "out").glob("*"))


# ---- tags, strata, the crop ----------------------------------------------------------------------


def test_tags_are_lists_of_ids_with_their_vocabulary(tmp_path):
    lay(tmp_path, [f"{i}.png" for i in range(20)])
    rows = [f"{i}.png,c{i % 2},,{f'hat :d once{i} smile' if i % 2 else 'smile'}" for i in range(20)]
    (tmp_path / "list.csv").write_text("path,label,split,tags\n" + "\n".join(rows))
    call("data.py", "list.csv", "--out", "out", "--size", 16, cwd=tmp_path, check=0)
    split = data.open_split(tmp_path / "out", "train")
    assert split["header"]["tags"] == ["smile", "hat"] and split["tags"].shape == (
        len(split["images"]),
        2,
    )
    assert (split["tags"][:, 0] == 0).all() and (
        split["tags"][:, 1] == split["labels"].numpy() * 2 - 1
    ).all()
    done = call("data.py", "list.csv", "--out", "told", "--size", 16, cwd=tmp_path, check=0)
    assert "tags: 2 of 10 are learned; 1 emoticons, 7 on fewer than 2 pictures" in done.stdout


def test_emoticons_are_told_from_words():
    faces = ":d ^_^ o_o >_< xD x3 0_0 ;) \\o/"
    assert all(map(tags.is_emoticon, faces.split()))
    words = "1girl hat 猫 c_cup t-shirt 3d fate/zero v ..."
    assert not any(map(tags.is_emoticon, words.split()))


def test_a_tag_that_is_said_twice_of_one_picture_is_on_one():
    lists = [("a", "a"), ("b",), ("b",)]
    twice = [sources.Record(str(i), "", split="train", tags=some) for i, some in enumerate(lists)]
    assert tags.vocabulary(twice)[0] == ["b"]


def test_a_picture_of_many_tags_keeps_the_most_frequent_ones():
    lists = [tuple(f"tag{j}" for j in range(i + 1)) for i in range(400)]
    records = [sources.Record(str(i), "", split="train", tags=some) for i, some in enumerate(lists)]
    words, _ = tags.vocabulary(records)
    dims, stream = tags.add_planes(words, records, {}, lambda some: ((r, {}) for r in some))
    assert words[:2] == ["tag0", "tag1"] and dims == {"tags": (tags.MOST,)}
    rows = [row["tags"] for _, row in stream(records[::399])]
    assert rows[0].tolist() == [0] + [tags.NONE] * (tags.MOST - 1) and rows[1].tolist() == list(
        range(tags.MOST)
    )


def figure(centre, size=(120, 80)):
    """A blob on a two-coloured ground, around a centre."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.where((y < size[1] // 2)[..., None], (120, 190, 240), (130, 200, 120)).astype(
        np.uint8
    )
    pixels[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 16**2] = (230, 60, 90)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("by", ["colours", "alpha", "box"])
@pytest.mark.parametrize("centre", [(24, 40), (96, 40), (60, 30)])
def test_the_figure_crop_follows_box_alpha_or_colours(by, centre):
    image = figure(centre)
    box = (centre[0] - 16, centre[1] - 16, centre[0] + 16, centre[1] + 16) if by == "box" else None
    if by == "alpha":
        red = np.asarray(image)[..., 0] > 200
        image.putalpha(Image.fromarray(np.uint8(red * 255)))
    got = decode.decode(saved(image, "PNG"), 40, by == "alpha", box, "figure", 0.1)
    y, x = np.nonzero(got["images"][..., 0] > 200) if by != "alpha" else np.nonzero(got["fg"] > 128)
    assert abs(y.mean() - 19.5) < 3 and abs(x.mean() - 19.5) < 3
    assert 0.3 < len(y) / 1600 < 0.8  # pi/4/1.2^2 = .55 with the margin asked for
