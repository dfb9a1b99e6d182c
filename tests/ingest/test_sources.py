"""Where pictures come from: each layout as a tiny fixture, what is refused, and archives that lie."""

import gzip
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import tarfile
import types
import unicodedata
import zipfile
import zlib
from collections import Counter
from itertools import product

import numpy as np
import pytest
from conftest import CODE, LINUX, ROOT, call, draw_folder, refused, run_line
from PIL import Image

import data
from apps import export
from common.train import UserError
from ingest import boxes, decode, files, layouts, pack, pictures, sources, tags


def png(seed=0, size=(24, 24)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return saved(Image.fromarray(noise), "PNG")


def saved(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def lay(root, names):
    """Write a picture of its own under each name, or the text or bytes of {name: content}."""
    contents = names if isinstance(names, dict) else dict.fromkeys(names)
    for i, (name, content) in enumerate(contents.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png(i) if content is None else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def told(path, **more):
    """{key: "split/label tag tag"} of a source, after every picture's bytes were found to be one."""
    records, fetch, _ = sources.find(path, **more)
    loaded = [(r, Image.open(io.BytesIO(load())).size) for r, load in fetch(records)]
    assert [r for r, _ in loaded] == records and {size for _, size in loaded} == {(24, 24)}
    return {r.key: " ".join([f"{r.split or '-'}/{r.label or '-'}", *r.tags]) for r in records}


# ---- what folders mean ---------------------------------------------------------------------------


def many(*folders, each=4):
    """Names of `each` pictures in each folder."""
    return [f"{folder}/{i}.png" for i, folder in product(range(each), folders)]


SPLITS = many("train/a", "train/b", "test/a", "test/b")
SERIES = many("genshin/hutao", "genshin/venti", "honkai/kiana", "honkai/mei")
OWN = many("train/train_images/a", "train/train_images/b", "test/test_set/a", "test/test_set/b")
FLAT = [f"{i}.png" for i in range(8)]
ALL = "train/a train/b test/a test/b"
INSIDE = [f"set/{folder}" for folder in ALL.split()]
PEOPLE = "-/hutao -/venti -/kiana -/mei"
NUMBERS = "class, the numbers before names left out"
NUMBERED = f"-/{NUMBERS}"
# Folders of one level in several of another: years of characters, or characters of ratings? The
# layout that a line names reads the other level.
YEARS = many("a/2019", "a/2020", "b/2019")
MORE_YEARS = many("a/2021", "a/2022", "a/best", "b/2021", "b/best")
IN_SPLITS = ("train/a/2021", "train/a/best", "train/b/2021", "train/b/x", "test/a/best", "test/b/x")
HALVES = many("train/a", "train/b")
ZERO = many("0_x", each=20)
LAYOUTS = (  # pictures, read as, split/class of the records, pictures set aside[, another layout]
    (many("a", "b"), "class", "-/a -/b", 0),
    (many("a/x"), "-/class", "-/x", 0),
    (SPLITS, "split/class", ALL, 0),
    (many("train/a", "test/b"), "split/class", "train/a test/b", 0),
    (OWN, "split/-/class", ALL, 0),
    (many("a/train", "b/train", "a/test", "b/test"), "class/split", ALL, 0),
    (["x.png", *SPLITS], "split/class", ALL, 1),
    (["set/train/x.png", *many(*INSIDE, each=6)], "-/split/class", ALL, 1),
    (many("Val", "Dev", "Rin"), "class", "-/Val -/Dev -/Rin", 0),
    (["1.png", "2.png"], "pictures only", "-/-", 0),
    (many("train", "val"), "split", "train/- val/-", 0),
    (many("val", "test", "x"), "split", "val/- test/-", 4),
    (HALVES + many("val", each=9), "split/class", "train/a train/b val/-", 0),
    (many("s/train/a", "s/train/b", "s/test"), "-/split/class", "train/a train/b test/-", 0),
    # numbers before names: AnimeFace Character, kohya's scripts, and what only looks like them
    (["thumb/x.png", *many("thumb/000_a", "thumb/001_b")], NUMBERED, "-/a -/b", 1),
    (many("img/10_a", "reg/1_b"), NUMBERED, "-/a -/b", 0),
    (many("10_a", "b"), "class", "-/10_a -/b", 0),
    (many("10_a", "5_b", "c"), NUMBERS, "-/a -/b -/c", 0),
    (many("img/10_a", "img/5_b", "img/c", "img/1_d"), f"-/{NUMBERS}", "-/a -/b -/c -/d", 0),
    (many("train/10_a", "train/5_b", "val/a"), f"split/{NUMBERS}", "train/a train/b val/a", 0),
    (many("2019_06", "2020_07"), "class", "-/2019_06 -/2020_07", 0),
    # what may be read in two ways
    (YEARS, "class", "-/a -/b", 0, "-/class"),
    (MORE_YEARS, "class", "-/a -/b", 0, "-/class"),
    (many(*IN_SPLITS), "split/class", "train/a train/b test/a test/b", 0, "split/-/class"),
    (many("a/2021_summer", "a/2022_old", "b/2021_summer"), "class", "-/a -/b", 0, "-/class"),
    (many("faces/a", "faces/b", "faces/c", "sfw/a"), "-/class", "-/a -/b -/c", 0, "class"),
    (SERIES, "-/class", PEOPLE, 0),
    # numbers above folders: of series, of how many are on a picture, of artists
    (many("01_x/a", "01_x/b", "02_y/c"), "-/class", "-/a -/b -/c", 0, "class"),
    (ZERO + many("1_y/a", "1_y/b", "2_y/c"), "-/class", "-/a -/b -/c", 20, "class"),
    (many("12345_x/a", "12345_x/b", "67890_y/a"), "-/class", "-/a -/b", 0, "class"),
    (HALVES + many("c", "d"), "split/class", "train/a train/b", 8),
    ([*many("a", "b"), *FLAT], "class", "-/a -/b", 8),
    ([*many("a", "b"), *FLAT, "x.png"], "pictures only", "-/-", 0),
)


@pytest.mark.parametrize("row", range(len(LAYOUTS)))
def test_folders_are_read_by_one_rule_and_the_line_says_how(tmp_path, row):
    names, what, said, aside, *other = LAYOUTS[row]
    lay(tmp_path, dict.fromkeys(names, b""))
    records, _, (line, *doubts) = sources.find(tmp_path)
    assert len(doubts) == len(other)
    for doubt, layout in zip(doubts, other, strict=True):
        found, _, _ = sources.find(tmp_path, layouts.parse_layout(layout))
        assert f"--layout {layout} learns {len({r.label for r in found})} (" in doubt
    assert {f"{r.split or '-'}/{r.label or '-'}" for r in records} == set(said.split())
    assert len(records) == len(names) - aside
    labels = {r.label for r in records} - {None}
    assert line.startswith(f"read as {what}: ")
    assert (f"{len(labels)} class" if labels else "no labels") in line
    assert (f"; {aside} pictures set aside (" in line) == (aside > 0)
    assert ("without a label" in line) == (bool(labels) and None in {r.label for r in records})
    assert len(sources.find(tmp_path, layout=())[0]) == len(names)


CROSSED = (  # folders of two levels that cross, the two layouts that the refusal names
    (many("a/school", "a/beach", "b/beach", "b/school", "b/party"), "class", "-/class"),
    (many("x/pixiv/a", "x/pixiv/b", "x/pixiv/c", "x/web/a", "x/web/b"), "-/class", "-/-/class"),
    (many("a/1_casual", "a/2_suit", "b/1_casual", "b/2_suit", "b/3_kimono"), "class", "-/class"),
)


@pytest.mark.parametrize("row", range(len(CROSSED)))
def test_where_either_level_may_be_the_character_a_layout_has_to_say_it(tmp_path, row):
    names, *layouts_of_both = CROSSED[row]
    lay(tmp_path, dict.fromkeys(names, b""))
    with pytest.raises(UserError, match="say which are the characters") as problem:
        sources.find(tmp_path)
    for layout in layouts_of_both:
        found, _, _ = sources.find(tmp_path, layouts.parse_layout(layout))
        assert len(found) == len(names)
        count = len({r.label for r in found})
        assert f"--layout {layout} learns {count} (" in str(problem.value)
    rows = [{"file_name": name, "label": name[0]} for name in names]
    lay(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert {r.label for r in sources.find(tmp_path)[0]} == {name[0] for name in names}


SPLIT_NAMES = {
    "train": "train TRAIN_SET train-images training trainset train2017 images_train",
    "val": "valid Validation val_data eval obj_valid_data",
    "dev": "dev development",
    "test": "testing testset test_2",
    None: "Devi valkyrie test_subject miku trainer obj_",
}


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_names_of_splits(split):
    assert {layouts.split_of(name) for name in SPLIT_NAMES[split].split()} == {split}
    assert layouts.split_of("") is None and layouts.split_of("test 2") == "test"


def test_layout_is_a_flag_that_begins_with_a_dash_too(tmp_path):
    """Levels at the end that say nothing are left out."""
    lay(tmp_path / "set", SERIES)
    said = {"class/-": "class: 2 classes (genshin, honkai)", "-/Class/": "-/class: 4 classes"}
    said |= {"-": "pictures only: no labels"}
    for layout, told in said.items():
        flags = pack.parse_flags([str(tmp_path / "set"), "--layout", layout])
        assert sources.find(flags.path, flags.layout)[2][0].startswith(f"read as {told}")


FAMILY = "\N{WOMAN}\u200d\N{GIRL} 3.png"  # a joined emoji
NAMES = ["train/初音ミク/1.png", "train/Éclair/2.png", f"test/初音ミク/{FAMILY}"]


@pytest.mark.parametrize("kind", ["folder", "zip", "gztar"])
def test_folders_and_archives_of_any_script_tell_the_same(tmp_path, kind):
    root = lay(tmp_path / "set", [unicodedata.normalize("NFD", n) for n in NAMES])
    hidden = ("__MACOSX/train/._1.png", ".thumbs/1.png", "@eaDir/1.png/THUMB.jpg")
    lay(root, {"train/readme.txt": "hello"} | dict.fromkeys(hidden, b""))
    path = root if kind == "folder" else shutil.make_archive(tmp_path / "packed", kind, root)
    assert told(path) == {  # names come composed, however they were stored
        "train/初音ミク/1.png": "train/初音ミク",
        "train/Éclair/2.png": "train/Éclair",
        f"test/初音ミク/{FAMILY}": "test/初音ミク",
    }
    assert files.is_image("__miku_drawn_by_w__1.png")  # Danbooru's name of a picture


# Names as people have them, in code pages that a zip does not tell.
PAGES = {
    "cp932": "初音ミク 暁美ほむら 涼宮ハルヒ 十六夜咲夜 博麗霊夢 イラスト 表紙 ソ能 新しいフォルダー 矢澤にこ",
    "gbk": "初音未来 洛天依 神里绫华 新建文件夹 钟离 雷电将军 王小明 孙悟空 三月七 图片",
    "cp949": "하츠네미쿠 아이유 장원영 스크린샷 렘 프리렌 최유리 뷁 학습 짱구",
    "utf-8": "初音ミク 神里绫华 하츠네미쿠 Éclair Müller Привет École 표지 表紙 ñandú",
    "cp437": "café Müller Ñandú élan für naïve garçon Ångström señor straße",
}


def zip_of_raw(raw, fields=None):
    """A zip of a picture for each name, bytes as an old program writes them; {name: extra field}."""
    file = io.BytesIO()
    stand_ins = {}
    with zipfile.ZipFile(file, "w") as archive:
        for i, name in enumerate(raw):
            stand_ins[name] = f"{i:04d}".encode() + bytes([0x21]) * (len(name) - 4)
            info = zipfile.ZipInfo(stand_ins[name].decode())
            info.extra = (fields or {}).get(name, b"")
            archive.writestr(info, png(i))
    data = file.getvalue()
    for name, stand_in in stand_ins.items():
        data = data.replace(stand_in, name)
    return data


def names_in(tmp_path, data, **more):
    (tmp_path / "old.zip").write_bytes(data)
    records, fetch, notes = sources.find(tmp_path / "old.zip", **more)
    assert {load() for _, load in fetch(records)} == {png(i) for i in range(len(records))}
    return {r.key for r in records}, notes


@pytest.mark.parametrize("code", PAGES)
@pytest.mark.parametrize("count", [3, 10])
def test_the_code_page_of_a_zip_is_found_for_all_names_together(tmp_path, code, count):
    for first in range(0, 11 - count, 3):
        words = PAGES[code].split()[first : first + count]
        names = {f"{word}/{i}.png" for i, word in enumerate(words)}
        raw = [name.encode(code) for name in sorted(names)]
        found, notes = names_in(tmp_path, zip_of_raw([*raw, b"plain/1.png"]))
        assert found == names | {"plain/1.png"}
        assert f"{count} names tell no code page, and are read as {code}," in notes[1]


def test_what_a_zip_says_of_its_names_goes_before_a_guess(tmp_path):
    """Plain ASCII, the flag of UTF-8, and Info-ZIP's field, unless it repeats another name."""
    files = {"plain/1.png": png(0), "初音ミク/1.png": png(1)}
    with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    records, _, notes = sources.find(tmp_path / "new.zip")
    assert {r.key for r in records} == {*files} and len(notes) == 1
    name, raw = "プール/1.png", "プール/1.png".encode("cp949", "replace")
    field = struct.pack("<BI", 1, zlib.crc32(raw)) + name.encode()
    field = struct.pack("<HHHHH", 0x5455, 2, 0, 0x7075, len(field)) + field
    korean = "하츠네미쿠/2.png".encode("cp949")
    data = zip_of_raw([raw, korean], {raw: field, korean: field})
    assert names_in(tmp_path, data)[0] == {name, "하츠네미쿠/2.png"}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_however_their_accents_are_written(tmp_path, forms):
    """A Mac writes an accent as a letter of its own."""
    there, listed = (unicodedata.normalize(form, "caf\u00e9/\u30ac.png") for form in forms)
    lay(tmp_path / "a", {there: None, "list.csv": f"path,label\n{listed},miku\n"})
    assert list(told(tmp_path / "a/list.csv").values()) == ["-/miku"]
    lay(tmp_path / "b", {there: None})
    lay(tmp_path / "b", {"metadata.jsonl": json.dumps({"file_name": listed, "label": "miku"})})
    assert list(told(tmp_path / "b").values()) == ["-/miku"]


def test_a_flag_overrules_the_guess(tmp_path):
    russian = ["Аска/1.png".encode("cp866"), "Рей/2.png".encode("cp866")]
    found, notes = names_in(tmp_path, zip_of_raw(russian), names="cp866")
    assert found == {"Аска/1.png", "Рей/2.png"} and "read as cp866" in notes[1]
    with pytest.raises(UserError, match="--names utf-8"):
        names_in(tmp_path, zip_of_raw(russian), names="utf-8")
    line = f"data.py {tmp_path / 'old.zip'} --out out --size 16 --dedupe off --names"
    assert "--names klingon" in refused(run_line(f"{line} klingon", tmp_path))
    assert "Аска, Рей" in run_line(f"{line} cp866", tmp_path, check=0).stdout


def test_a_name_that_does_not_fit_the_others_is_counted(tmp_path):
    """A truncated name, or one that another program added, does not decide for all."""
    names = [f"{word}/{i}.png" for i, word in enumerate(PAGES["cp949"].split())]
    cut = b"abcd/" + "미쿠".encode("cp949")[:3] + b".png"
    found, notes = names_in(tmp_path, zip_of_raw([*(n.encode("cp949") for n in names), cut]))
    assert set(names) <= found and len(found) == len(names) + 1
    assert "read as cp949" in notes[1] and "1 do not fit" in notes[1]


def test_a_list_on_standard_input_is_read_below_the_folders_that_all_have(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "dev" / ".cache", classes=2, each=10)
    names = sorted(root.rglob("*.png"), reverse=True)
    monkeypatch.setattr("sys.stdin", [f"{name}\n" for name in names] + ["\n", f"{root}/x.txt\n"])
    done = call("data.py", "-", "--out", "out", "--size", 16, cwd=tmp_path, check=0)
    assert done.stdout.startswith("read as class: 2 classes (class0, class1)\n")
    assert data.open_split(tmp_path / "out", "train")["header"]["keys"][0].startswith("class0/")
    monkeypatch.chdir(tmp_path)
    names = ["miku/train/1.png", "rin/test/2.png", "./rin/train/3.png"]
    lay(tmp_path, names)
    names[1] = "rin\\test\\2.png\r\n"  # of Windows
    monkeypatch.setattr("sys.stdin", names)
    assert [*told("-")] == ["miku/train/1.png", "rin/test/2.png", "rin/train/3.png"]


@LINUX
def test_links_are_followed_but_never_round_in_circles_and_those_to_no_file_are_counted(tmp_path):
    lay(tmp_path, ["else/rin/1.png", "set/miku/1.png"])
    os.symlink(tmp_path / "else/rin", tmp_path / "set/rin")
    os.symlink(tmp_path / "set", tmp_path / "set/miku/loop")
    os.symlink(tmp_path / "set/miku", tmp_path / "else/rin/round")
    os.symlink("self.png", tmp_path / "set/miku/self.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "set/miku/dead.png")
    keys = set(told(tmp_path / "set"))
    assert {"miku/1.png", "rin/1.png"} <= keys and len(keys) <= 4
    os.mkfifo(tmp_path / "set/miku/pipe.png")
    note = sources.find(tmp_path / "set")[2][1]
    assert "links to no file" in note and "pipes or devices" in note


LEFT = {  # files beside two pictures of rin and one of luka, what is told of them
    "miku/1.jxl miku/2.JXL rin/x": "3 files left out: 2 .jxl, 1 without suffix; the first: miku/1",
    "rin/1.png_large luka/a.heic": "2 files left out: 1 ",
    "meiko/a.jpg:orig kaito/b.psd": "kaito/b.psd",
    "rin/9.txt notes.md Thumbs.db rin/.hidden __MACOSX/x.heic": None,
}


@pytest.mark.parametrize("names", LEFT)
@pytest.mark.parametrize("kind", ["folder", "zip", "gztar", "list"])
@LINUX
def test_files_that_are_not_read_are_counted_and_the_first_is_named(
    tmp_path, monkeypatch, names, kind
):
    read = ["rin/1.png", "rin/deep/2.png", "luka/1.png"]
    root = lay(tmp_path / "set", [*read, *names.split()])
    path = root if kind == "folder" else "-"
    if kind in ("zip", "gztar"):
        path = shutil.make_archive(tmp_path / "packed", kind, root)
    monkeypatch.setattr("sys.stdin", sorted(map(str, root.rglob("*"))))
    records, _, notes = sources.find(path)
    told = LEFT[names]
    assert len(notes) == 1 + (told is not None) and len(records) == len(read)
    assert told is None or (told in notes[1] and "convert" in notes[1])


DOTTED = {  # pictures beside one of rin: are they read, or a tool's?
    ".flow/1.png .flow/deep/2.png rin/...000.png": True,
    ".hack/.hack.1.png .../...jpg rin/.png": True,
    "rin/.2B.png .gitta/.applejack.png ..hidden/1.webp": True,
    ".git/1.png .Trash-1000/files/1.png .x/.thumbnails/normal/1.png": False,
    "rin/._1.png .ipynb_checkpoints/1-checkpoint.png .@__thumb/s1001.jpg": False,
    "rin/.trashed-1700000000-x.jpg .1.png.tmp/1.png .tmp.driveupload/4.png": False,
}


@pytest.mark.parametrize("names", DOTTED)
@pytest.mark.parametrize("kind", ["folder", "zip", "gztar", "list", "list from elsewhere"])
@LINUX
def test_names_that_begin_with_a_dot_are_read_and_told_if_no_tool_keeps_them(
    tmp_path, monkeypatch, names, kind
):
    root = lay(tmp_path / ".cache" / "set", ["rin/1.png", *names.split()])
    path = root if kind == "folder" else "-"
    if kind in ("zip", "gztar"):
        path = shutil.make_archive(tmp_path / "packed", kind, root)
    monkeypatch.chdir(tmp_path if kind == "list" else root)
    found = [os.path.relpath(x) for x in root.rglob("*") if x.is_file()]
    monkeypatch.setattr("sys.stdin", found)
    records, fetch, notes = sources.find(path)
    assert len(records) == (4 if DOTTED[names] else 1)
    assert len([load() for _, load in fetch(records)]) == len(records)
    lines = [line for line in notes if "names or folders begin with a dot" in line]
    assert len(lines) == DOTTED[names] and len(notes) == 1 + len(lines)
    assert len(pictures.picture_files(root)) == len(records)  # of apps/sort.py


@LINUX
def test_links_in_a_tar_are_what_they_lead_to(tmp_path):
    lay(tmp_path / "set", ["miku/1.png", "store/ab12", "rin/4.png"])
    links = {"miku/2.png": "1.png", "rin/1.png": "../miku/2.png", "rin/2.png": "../store/ab12"}
    lost = {
        "rin/x.png": "/etc/x.png",
        "rin/y.png": "y.png",
        "rin/z.png": "../../z.png",
        "luka": "miku",
    }
    for name, to in (links | lost).items():
        os.symlink(to, tmp_path / "set" / name)
    os.link(tmp_path / "set/store/ab12", tmp_path / "set/rin/3.png")
    os.link(tmp_path / "set/rin/4.png", tmp_path / "set/miku/5.png")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("miku", "store", "rin", "luka"):
            tar.add(tmp_path / "set" / name, name)
        assert sum(member.islnk() for member in tar) == 2
    records, fetch, notes = sources.find(tmp_path / "set.tar")
    held = {r.key: load() for r, load in fetch(records)}
    assert held == {
        key: (tmp_path / "set" / key).read_bytes()
        for key in [*links, "miku/1.png", "rin/3.png", "rin/4.png", "miku/5.png"]
    }
    assert "4 files left out: 4 links to no file; the first: luka" in notes[1]


# ---- tables and published data sets --------------------------------------------------------------

FACE = "personai_icartoonface_rectrain_0000"
POSTS = """\
{"id": "263159", "tags": [{"name": "miku", "category": "4"}, {"name": "smile"}, {"name": "w", "category": "1"}]}
{"id": 7, "md5": "ab12", "tag_string": "rin smile hat", "tag_string_character": "rin", "parent_id": 263159}
{"id": 8, "tag_string_character": "len rin", "tag_string": "len rin smile w", "tag_string_artist": "w"}
{"id": 10, "tags": {"general": ["hat"], "character": ["luka"], "meta": ["highres"]}}
{"id": 11, "tags": "solo, brown hair"}
{"id": 999, "tag_string": "not_downloaded"}
"""
# as published: the folder is the last digits of Danbooru's id, then comes the head's box
FACES = (
    "0159\\263159.jpg\t0\t1,2,20,21,0.99\n0933\\194933.jpg\t1\t1,2,20,21,0.91\n"
    "0001\\1001.jpg\t1\t1,2,20,21,0.31\n0002\\1002.jpg\t1\t1,2,20,21,0.99\n"
)
PHOTOS = ("0159/263159.jpg", "0933/194933.jpg", "0001/1001.jpg")
CLASSES = {"labels/classid_classname.csv": '0,miku\n1,"初音, ミク"\n'}
DAFRE = CLASSES | dict.fromkeys(f"faces/{name}" for name in PHOTOS)
WHOLE = CLASSES | dict.fromkeys(f"fullMin256/{name}" for name in PHOTOS)
BLANK = {f"fullMin256/{name}": b"" for name in PHOTOS}
DAFRE_SAYS = dict(zip(PHOTOS, ("train/miku", "val/初音, ミク", "test/miku"), strict=True))
LABELS = {"train": "0,0159/263159.jpg", "val": "1,0933/194933.jpg", "test": "0,0001/1001.jpg"}
LABELS = {f"labels/{split}.csv": row for split, row in LABELS.items()}
TURNED = {name: ",".join(reversed(row.split(","))) for name, row in LABELS.items()}
TITLED = {name: f"class_id,dir\n{row}" for name, row in LABELS.items()}
OF_DAFRE = """\
{"id": 194933, "tag_string": "初音,_ミク hat"}
{"id": 263159, "tags": "miku blue"}
{"id": 9}
"""
OF_DAFRE_SAYS = DAFRE_SAYS | {PHOTOS[0]: "train/miku blue", PHOTOS[1]: "val/初音, ミク hat"}
# its archive of faces has folders without leading zeros, another way than faces.tsv
ACRD = dict.fromkeys(f"faceimgs/{n}.jpg" for n in ("159/263159", "933/194933", "1/1001"))
ACRD_SAYS = dict(zip(ACRD, ("-/miku", '-/"quoted', '-/"quoted'), strict=True))
ACRD_LISTED = {"faceimgs/159/263159.jpg": "train/miku", "faceimgs/933/194933.jpg": 'test/"quoted'}
ACRD |= {"tagIds.tsv": 'miku\t0\n"quoted\t1', "faces.tsv": FACES}
LISTS = {"trainSplit.tsv": "263159\n1002\n", "testSplit.tsv": "194933\n"}
CARTOONS = {f"icartoonface_rectrain/{FACE}{k}/x.jpg": None for k in (0, 1)}
BOXES = f"{FACE}0/x.jpg\t2\t3\t20\t21\n{FACE}1/x.jpg\t1\t1\t2\t2"
CARTOONS_SAY = {f"{FACE}{k}/x.jpg": f"-/{FACE}{k}" for k in (0, 1)}
DANBOORU = ["512px/0159/263159.jpg", "original/0159/263159.jpg", "images/ab/ab12.jpg"]
DANBOORU = dict.fromkeys([*DANBOORU, "8.png", "10.png", "11.png"])
DANBOORU_SAYS = {
    "512px/0159/263159.jpg": "-/miku smile",
    "images/ab/ab12.jpg": "-/rin smile hat",
    "10.png": "-/luka hat",
    "8.png": "-/- smile",
    "11.png": "-/- solo brown_hair",
}
ARRAY = '\ufeff\n[{"id": 263159, "tag_string_character": "miku"}, {"id": 7}, {"id": 5}]'
IMAGES = dict.fromkeys(["a/1.png", "a/2.png", "b 3.png"])
LISTED = {"a/1.png": "train/ミク", "a/2.png": "val/-", "b 3.png": "test/x"}
TAGGED = LISTED | {"a/1.png": "train/ミク smile 1girl", "b 3.png": "test/x brown_hair 'hat'"}
CSV = "a/1.png,ミク,train,smile 1girl\na/2.png,,valid\n\nb 3.png,x,test,\"brown hair, 'hat'\"\n"
TSV = "Label\tfilename\tsplit\nミク\ta/1.png\ttrain\n\ta/2.png\tval\nx\tb 3.png\ttest"
KOHYA = dict.fromkeys(["img/10_miku/1.png", "img/10_miku/2.png", "img/3_rin hat/3.png"])
CAPTIONS = {"img/10_miku/1.txt": "solo, brown hair,\nsmile", "img/10_miku/2.txt": "1girl"}
KOHYA_SAYS = zip(KOHYA, ("-/miku solo brown_hair smile", "-/miku 1girl", "-/rin hat"), strict=True)
ABSENT = "1 lines of faces.tsv have no picture here, the first: 0002\\1002.jpg"
UNSURE = "1 faces are in none of the lists, and left out, the first: 0001\\1001.jpg"
UNKNOWN = "lines of the metadata have no picture here, the first: metadata.jsonl, line"
LEFT_OUT = "tags: names of classes are left out of those of"
BROKEN = "1 of 21 lines are no JSON objects, and are left out, the first: metadata.jsonl, line 21"
SOURCES = {  # name: files, {key: split/label and tags}, what the notes after the first one say
    "DAF:re, faces first": (DAFRE | TITLED | BLANK, DAFRE_SAYS, []),
    "an older DAF:re": (WHOLE | TURNED, DAFRE_SAYS, []),
    "DAF:re with tags": (
        DAFRE | LABELS | {"metadata.jsonl": OF_DAFRE},
        OF_DAFRE_SAYS,
        [
            f"1 {UNKNOWN} 3",
            "2 of 3 pictures have tags",
            f"{LEFT_OUT} 2 pictures (miku, 初音,_ミク)",
        ],
    ),
    "iCartoonFace": (CARTOONS | {"icartoonface_rectrain_det.txt": BOXES}, CARTOONS_SAY, []),
    "ACRD": (ACRD, ACRD_SAYS, [ABSENT]),
    "ACRD with lists": (ACRD | LISTS, ACRD_LISTED, [ABSENT, UNSURE]),
    "Danbooru": (
        DANBOORU | {"metadata.jsonl": POSTS + 14 * '{"id": 1}\n' + "{broken\n"},
        DANBOORU_SAYS,
        [f"15 {UNKNOWN} 6", BROKEN],
    ),
    "an array of posts": (
        {"7.png": None, "263159.png": None, "list.json": ARRAY},
        {"263159.png": "-/miku", "7.png": "-/-"},
        ["1 lines of the metadata have no picture here, the first: list.json, line 3"],
    ),
    "csv": (IMAGES | {"list.csv": CSV}, TAGGED, []),
    "csv after an empty line": (IMAGES | {"list.csv": f"\n{CSV}"}, TAGGED, []),
    "tsv": (IMAGES | {"list.tsv": TSV}, LISTED, []),
    "captions of kohya": (
        KOHYA | CAPTIONS,
        dict(KOHYA_SAYS),
        ["2 of 3 pictures have a caption, the first: img/10_miku/1.png"],
    ),
    "a comma before other signs": (
        {"a;b.png": None, "c.png": None, "list.csv": 'a;b.png,x,train,"d; e"\nc.png,y,val\n'},
        {"a;b.png": "train/x d; e", "c.png": "val/y"},
        [],
    ),
    "unknown columns": (
        {"c.png": None, "list.csv": "image,who,label\nc.png,me,y\n"},
        {"c.png": "-/y"},
        [f"columns that are not read: who; known are {', '.join(sources.KNOWN)}"],
    ),
    "a table that nobody asked for": (
        {"x/1.png": None, "x/2.png": None, "metadata.csv": "file_name,label\n"},
        {"x/1.png": "-/x", "x/2.png": "-/x"},
        ["metadata.csv is not read; give that file itself if it has the labels"],
    ),
    "a name twice": (
        IMAGES | {"list.csv": "a/1.png,x\nb 3.png,y\na/1.png,y\n"},
        {"a/1.png": "-/x", "b 3.png": "-/y"},
        ["1 names came twice, the first: a/1.png; the first of each is kept"],
    ),
}


TWO = dict.fromkeys(["a/1.png", "b/2.png"])
ROWS = {  # the same table, as programs write it
    "backslashes": "path,label\na\\1.png,miku\nb\\2.png,rin\n",
    "of Excel": '\ufeffsep=;\r\nPath;Class\r\na\\1.png;"miku"\r\nb\\2.png;rin\r\n',
    "semicolons without a header": "a/1.png;miku\nb/2.png;rin\n",
    "tabs": "file\tlabels\na/1.png\tmiku\nb/2.png\trin\n",
    "a comma said": "sep=,\na/1.png,miku\nb\\2.png,rin\n",
    "quotes after a space": 'a/1.png, "miku"\nb/2.png, "rin"\n',
    "cells without a word": "path;label\na/1.png;miku\n;\nb/2.png;rin\n;\n",
    "quotes and semicolons": '"image"; "labels"\n"a/1.png"; "miku"\n"b/2.png"; "rin"\n',
}
CAPTIONED = {  # the caption of a/1.png: its file, and what it says
    "a tag a line": ("a/1.txt", "solo\nbrown hair\r\nhat\n"),
    "lines and commas": ("a/1.txt", "solo, brown hair,\nhat"),
    "a .caption": ("a/1.caption", "solo, brown_hair, hat"),
    "of gallery-dl": ("a/1.png.txt", "solo\nbrown_hair\nhat"),
    "in capitals": ("a/1.TXT", "solo brown_hair hat"),
}
ONE_CAPTION = ["1 of 2 pictures have a caption, the first: a/1.png"]
for name, text in ROWS.items():
    says = {"a/1.png": "-/miku", "b/2.png": "-/rin"}
    SOURCES[f"a table, {name}"] = (TWO | {"list.csv": text}, says, [])
for name, (file, text) in CAPTIONED.items():
    says = {"a/1.png": "-/a solo brown_hair hat", "b/2.png": "-/b"}
    SOURCES[f"captions, {name}"] = (TWO | {file: text}, says, ONE_CAPTION)


@pytest.mark.parametrize("name", SOURCES)
def test_sources_keep_their_names_splits_and_tags(tmp_path, name):
    contents, says, notes = SOURCES[name]
    lay(tmp_path, contents)
    path = next(tmp_path.glob("list.*"), tmp_path)
    assert told(path) == says
    first, *more = sources.find(path)[2]
    kind = sources.reader_of(path)[1] or (NUMBERED if "kohya" in name else "class")
    assert first.startswith(f"read as {kind}: ") and more == notes


def test_tables_give_groups_and_boxes_and_so_do_posts(tmp_path):
    rows = "path,group,x1,y1,x2,y2\na.png,7,1,2,20,21.5\nb.png,,,,,\n"
    lay(tmp_path / "list", {"list.csv": rows, "a.png": b"", "b.png": b""})
    records = sources.find(tmp_path / "list/list.csv")[0]
    assert [(r.group, r.box) for r in records] == [("7", (1, 2, 20, 21.5)), (None, None)]
    posts = lay(tmp_path / "posts", DANBOORU | {"metadata.jsonl": POSTS, "more.png": b""})
    groups = [r.group for r in sources.find(posts)[0]]
    assert groups == ["263159", "263159", "8", "10", "11"]
    assert "more.png" in [r.key for r in sources.find(posts, layout=())[0]]  # which no post names


# ---- metadata beside pictures --------------------------------------------------------------------


def lines_of(*rows):
    return "\n".join(map(json.dumps, rows))


CLASSES_OF_TWO = {"a/1.png": "-/a", "b/2.png": "-/b"}
TEXTS = [{"file_name": name, "text": "a girl, smiling"} for name in TWO]
TAGS = [{"path": name.replace("/", "\\"), "tags": "hat, smile"} for name in TWO]
BY_LABEL = [{"file_name": "a/1.png", "label": "rin"}, {"file_name": "b/2.png", "label": 7}]
IN_TRAIN = lines_of({"file_name": "1.png", "label": "rin"}, {"file_name": "9.png", "label": "x"})
METADATA = {  # files beside pictures, {key: split/label and tags}
    "texts": ({"metadata.jsonl": lines_of(*TEXTS)}, CLASSES_OF_TWO),
    "an array": ({"metadata.json": json.dumps(TEXTS)}, CLASSES_OF_TWO),
    "tags": (
        {"metadata.jsonl": lines_of(*TAGS)},
        {"a/1.png": "-/a hat smile", "b/2.png": "-/b hat smile"},
    ),
    "labels": ({"metadata.jsonl": lines_of(*BY_LABEL)}, {"a/1.png": "-/rin", "b/2.png": "-/7"}),
    "another file, of one picture": (
        {"list.jsonl": lines_of(TEXTS[1] | {"tags": "hat"})},
        {"b/2.png": "-/b hat"},
    ),
    "of a split": (
        {"train/1.png": None, "val/2.png": None, "train/metadata.jsonl": IN_TRAIN},
        {"train/1.png": "train/rin", "val/2.png": "val/-"},
    ),
    "of Danbooru": (
        {"metadata.jsonl": lines_of({"id": 1, "label": "rin"}, {"id": 2, "tag_string": "hat"})},
        {"a/1.png": "-/rin", "b/2.png": "-/- hat"},
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_adds_to_what_folders_tell_and_a_layout_overrules_it(tmp_path, name):
    contents, says = METADATA[name]
    lay(tmp_path, contents if "train/1.png" in contents else TWO | contents)
    assert told(next(tmp_path.glob("list.*"), tmp_path)) == says
    if "metadata.jsonl" in contents:
        assert told(tmp_path / "metadata.jsonl") == says
        assert told(tmp_path, layout=("class",)) == CLASSES_OF_TWO
        assert set(told(tmp_path, layout=()).values()) == {"-/-"}


class Table:
    """What pyarrow's ParquetFile has, for four rows."""

    def __init__(self, path):
        about = {"info": {"features": {"label": {"names": ["miku", "rin"]}}}}
        named = {b"huggingface": json.dumps(about).encode()} if "train" in path.name else None
        names = ["file_name", "image", "label", "tags"]
        self.schema_arrow = types.SimpleNamespace(names=names, metadata=named)
        self.rows = [{"label": label, "tags": "solo, brown hair"} for label in (0, 1, 0, -1)]
        for i, row in enumerate(self.rows):
            row["image"] = {"bytes": png(i), "path": None}

    def iter_batches(self, size, columns):
        assert columns in (["image"], ["label", "tags"]), "more is read than is asked for"
        rows = [{name: row[name] for name in columns} for row in self.rows]
        for batch in (rows[:2], rows[2:]):
            yield types.SimpleNamespace(to_pylist=lambda batch=batch: batch)


def test_parquet_needs_pyarrow_and_is_read_a_little_at_a_time(tmp_path, monkeypatch):
    lay(tmp_path, {f"data/{s}-00000-of-00001.parquet": "x" for s in ("train", "test")})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        sources.find(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=Table))
    numbers, names = ["0", "1", "0", "-"], ["miku", "rin", "miku", "-"]
    labels = [f"test/{x}" for x in numbers] + [f"train/{x}" for x in names]
    assert list(told(tmp_path).values()) == [f"{label} solo brown_hair" for label in labels]
    records, fetch, _ = sources.find(tmp_path)
    assert [load() for _, load in fetch(records[1:3])] == [png(1), png(2)]


# ---- what is refused, and what is skipped --------------------------------------------------------


def zip_of(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("a.png")
            info.filename = name  # as it is: zipfile would cut it at a NUL
            archive.writestr(info, png())
    return file.getvalue()


def header(name, length, **fields):
    """What stands before a member of a tar; fields of PAX replace those of its 512 bytes."""
    info = tarfile.TarInfo(name)
    info.size = length
    info.pax_headers = fields
    return info.tobuf(tarfile.PAX_FORMAT if fields else tarfile.GNU_FORMAT)


def member(name, content=b"x", **fields):
    return header(name, len(content), **fields) + content + bytes(-len(content) % 512)


OUTSIDE = ("../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil.png", "a\\..\\..\\b.png")
ODD = ("a\1b.png", "a\nb.png", "a\x1b[31mb.png", "a\u2028b.png", f"{'x' * 50_000}.png")
REFUSED = [  # files, a word of the refusal
    ({"labels/train.csv": "0,a.jpg"}, "faces is not there: unpack"),
    ({"icartoonface_rectrain_det.txt": "a/b.jpg\t20\t1\t2\t2"}, "x1 < x2"),
    ({"list.csv": "path,x1,y1,x2,y2\na.png,1,2,3,nose"}, "1,2,3,nose is no box"),
    ({"metadata.jsonl": "[1, 2]\nhello\n"}, "2 of 2 lines are no JSON objects"),
    ({"metadata.jsonl": '{\n"images": [],\n"annotations": []\n}\n'}, "boxes with --detect"),
    ({"metadata.jsonl": "{}\n" * 18 + "hello\n"}, "metadata.jsonl, line 19"),
    ({"metadata.jsonl": "[" * 99999}, "1 of 1 lines are no JSON objects"),
    ({"list.csv": f'"{"x" * 200_000}.png"'}, "not a table"),
    ({"list.csv": b"a.png,\xff\xfe\n"}, "not a table in UTF-8"),
    ({"list.csv": "a.png,x,nowhere"}, "line 1: split 'nowhere' is none of"),
    ({"list.csv": "a.png,x,train\nb.png,y\nc.png,z"}, "2 of 3 rows have no split"),
    ({"list.csv": "a.png,x\na.png,x,train,t,more"}, "line 2 is not path,label,split,tags"),
    ({"list.csv": ",x"}, "line 1 is not path"),
    ({"list.csv": "image_path,who\na.png,x"}, "'image_path' is no picture; name the columns path"),
    ({"list.csv": "Datei;Figur\na.png;x"}, "'Datei' is no picture; name the columns path"),
    ({"list.csv": "path,x1,y1,x2,y2\n1.png,.1,.1,.5,.5\n"}, "in pixels, or remove them"),
    ({"list.csv": "C:\\data\\a/1.png\nC:\\data\\b/2.png"}, "2 of 2 paths do not lie below"),
    ({"b.jxl": "x", "c.txt": "x"}, "1 files left out: 1 .jxl"),
    ({"list.txt": "hello"}, "is no folder"),
    ({"list.zip": zip_of("a.png").replace(b"PK\1\2", b"PK\3\3")}, "not a whole zip"),
    ({"list.tar": member("a.png", png()) + header("b.png", 4096) + bytes(512)}, "not a whole tar"),
]
GOOD, END = member("fine.png", png()), bytes(1024)
REFUSED.append(
    ({"list.tar": GOOD + header("b.png", 5 * 2**30) + END}, "unpacks to more than 128 MB; unpack")
)
for line in ("path,label,label", "file,class,Label", "path,x1,x1,y1,x2,y2"):
    row = "a.png" + ",1" * line.count(",")
    REFUSED.append(({"list.csv": f"{line}\n{row}\n", "a.png": None}, "two columns for"))
for name in OUTSIDE:
    tar = gzip.compress(GOOD + member(name, png()) + END)
    REFUSED.append(({"list.tar.gz": tar}, "leads out of it"))
    REFUSED.append(({"list.zip": zip_of("fine.png", name)}, "leads out of it"))
for name in ODD:
    tar = member("fine.png", png(), path=name) + END
    kinds = {"list.zip": zip_of(name), "list.tar": tar, "list.csv": f'"{name}",miku\n'}
    REFUSED += [({file: content}, "rename it") for file, content in kinds.items()]


@pytest.mark.parametrize("row", range(len(REFUSED)))
def test_a_broken_or_hostile_source_is_refused_in_one_line(tmp_path, row):
    contents, word = REFUSED[row]
    lay(tmp_path, contents)
    with pytest.raises(UserError, match=re.escape(word)) as problem:
        sources.find(next(tmp_path.glob("list.*"), tmp_path))
    assert len(str(problem.value)) < 500 and len(str(problem.value).splitlines()) == 1


@LINUX
def test_devices_and_pipes_are_never_opened(tmp_path):
    path = "/dev/null"
    good = lay(tmp_path / "images", ["a.png", "b.jxl"])
    (tmp_path / "set.csv").write_text(f"path\n{good}/a.png\n{path}\n")
    problems = []
    found = list(pictures.pictures([path, tmp_path / "set.csv"], 16, "centre", 0, problems))
    assert len(found) == 1 and len(problems) == 2
    assert all("device or a pipe" in why for _, why in problems)
    with pytest.raises(UserError, match="device or a pipe"):
        boxes.find(path)


def test_copies_are_found_in_a_tar_that_was_appended_to(tmp_path):
    """`tar -r` writes a name a second time: bytes then come in another order than the records."""
    contents = {f"a/{i}.png": png(i, (48, 48)) for i in range(8)}
    contents["a/8.png"] = contents["a/3.png"]
    order = [*contents, "a/0.png"]
    path = tmp_path / "set.tar"
    path.write_bytes(b"".join(member(n, contents[n]) for n in order) + bytes(1024))
    records, fetch, notes = sources.find(path)
    assert len(records) == 9 and "1 names came twice" in notes[1]
    pairs, _ = pack.near_duplicates(records, fetch, "group", tmp_path / "out")
    assert [{records[i].key for i in pair} for pair in pairs] == [{"a/3.png", "a/8.png"}]


# ---- from bytes to a square ----------------------------------------------------------------------


def odd_files():
    """One picture, red above blue, in every odd way -> {name: bytes}."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20], pixels[20:] = (255, 0, 0), (0, 0, 255)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    turned = image.transpose(Image.Transpose.ROTATE_90)
    gray = np.where(pixels[..., 0] > 0, 60000, 15000).astype(np.uint16)
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 40))]}
    return {
        "exif.jpg": saved(turned, "JPEG", exif=exif, quality=95),
        "palette.png": saved(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG", quality=95),
        "animated.gif": saved(image, "GIF", **frames),
        "deep.png": saved(Image.fromarray(gray), "PNG"),
        "gray.jpg": saved(image.convert("L"), "JPEG", quality=95),
    }


SHADES = {"deep.png": ([233] * 3, [58] * 3), "gray.jpg": ([76] * 3, [29] * 3)}


@pytest.mark.parametrize("name", odd_files())
def test_odd_files_are_decoded_upright_in_rgb(name):
    got = decode.decode(odd_files()[name], 20, fg=False)["images"].astype(int)
    above, below = SHADES.get(name, ([255, 0, 0], [0, 0, 255]))
    assert np.abs(got[:9].mean((0, 1)) - above).max() < 12
    assert np.abs(got[11:].mean((0, 1)) - below).max() < 12


def test_decoding_keeps_the_short_side_and_the_centre():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :20], picture[:, 20:60], picture[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image = decode.decode(saved(Image.fromarray(picture), "PNG"), 40, fg=False)["images"]
    assert image.shape == (40, 40, 3) and (image == (0, 255, 0)).all()


def test_a_box_beside_its_picture_is_an_error():
    with pytest.raises(ValueError, match="outside"):
        decode.decode(png(), 16, False, (30, 30, 60, 60), "figure")


def figure(centre, size=(120, 80)):
    """A blob on a two-coloured ground, around a centre."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.where((y < size[1] // 2)[..., None], (120, 190, 240), (130, 200, 120))
    pixels[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 16**2] = (230, 60, 90)
    return Image.fromarray(np.uint8(pixels))


@pytest.mark.parametrize("by", ["colours", "opaque", "alpha", "box"])
@pytest.mark.parametrize("centre", [(24, 40), (96, 40), (60, 30)])
def test_the_figure_crop_follows_box_alpha_or_colours(by, centre):
    """An alpha channel that hides nothing says nothing: then the colours count."""
    image = figure(centre)
    x, y = centre
    box = (x - 16, y - 16, x + 16, y + 16) if by == "box" else None
    if by in ("alpha", "opaque"):
        red = np.asarray(image)[..., 0] > (200 if by == "alpha" else 0)
        image.putalpha(Image.fromarray(np.uint8(red * 255)))
    got = decode.decode(saved(image, "PNG"), 40, True, box, "figure", 0.1)
    y, x = np.nonzero(got["fg"] > 128 if by == "alpha" else got["images"][..., 0] > 200)
    assert abs(y.mean() - 19.5) < 3 and abs(x.mean() - 19.5) < 3
    assert 0.3 < len(y) / 1600 < 0.8  # pi/4/1.2^2 = .55 with the margin asked for


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    """Sixteen of 170 megapixels side by side would take 32 GB."""
    monkeypatch.setattr(decode, "LARGE", 32 * 32)
    for side in (32, 33):
        with decode.open_image(png(0, (side, side)), 16):
            assert decode.ONE_LARGE.locked() == (side > 32)
    assert not decode.ONE_LARGE.locked()


def test_a_program_is_no_picture_and_pictures_are_opened_in_one_place(tmp_path):
    """Pillow without a list of formats would hand an EPS to Ghostscript."""
    lay(tmp_path, {"x.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"})
    with pytest.raises(UserError, match=r"x\.png is not .* cannot identify"):
        list(pictures.whole_pictures([tmp_path / "x.png"], []))
    opens = re.compile(r"Image\.open\(|imread|mpimg")
    found = [
        p for p in CODE if opens.search(p.read_text().replace(export.READ, ""))
    ]  # a card's text
    others = [p.relative_to(ROOT).as_posix() for p in found if p.parent.name != "tests"]
    assert others == ["ingest/decode.py"]


# ---- tags ----------------------------------------------------------------------------------------


def tagged(*lists):
    return [sources.Record(str(i), "", split="train", tags=some) for i, some in enumerate(lists)]


def test_tags_are_lists_of_ids_with_their_vocabulary(tmp_path):
    lay(tmp_path, [f"{i}.png" for i in range(20)])
    some = ["smile", "hat bow :d once{} smile"]
    rows = [f"{i}.png,c{i % 2},{some[i % 2].format(i)}" for i in range(20)]
    (tmp_path / "list.csv").write_text("path,label,tags\n" + "\n".join(rows))
    done = call("data.py", "list.csv", "--out", "out", "--size", 16, cwd=tmp_path, check=0)
    assert "tags: 3 of 11 are learned; 1 emoticons, 7 on fewer than 2 pictures" in done.stdout
    split = data.open_split(tmp_path / "out", "train")
    assert split["header"]["tags"] == ["smile", "bow", "hat"]  # by frequency, then by name
    odd = split["labels"][:, None] > 0
    assert np.array_equal(split["tags"], np.where(odd, [0, 1, 2], [0, -1, -1]))  # -1 fills up


def test_a_picture_of_many_tags_keeps_the_most_frequent_ones():
    records = tagged(*(tuple(f"tag{j}" for j in range(i + 1)) for i in range(400)))
    words, _ = tags.vocabulary(records)
    dims, stream = tags.add_planes(words, records, {}, lambda some: ((r, {}) for r in some))
    assert words[:2] == ["tag0", "tag1"] and dims == {"tags": (tags.MOST,)}
    [(_, row)] = stream(records[399:])
    assert row["tags"].tolist() == list(range(tags.MOST))


def test_brackets_lose_their_backslash_and_boxes_are_no_captions(tmp_path):
    escaped = r"hat \(red\), :\(, \[x\], smile (x)"
    lay(tmp_path, TWO | {"a/1.txt": escaped, "b/2.txt": "0 0.5 0.5 0.25 1e-1\n"})
    assert told(tmp_path) == {"a/1.png": "-/a hat_(red) :( [x] smile_(x)", "b/2.png": "-/b"}
    assert sources.find(tmp_path)[2][2].startswith("1 captions are numbers, the first: b/2.png")
    lay(tmp_path, {"b/2.txt": "笑顔, 帽子".encode("cp932")})
    assert told(tmp_path)["b/2.png"] == "-/b"
    assert sources.find(tmp_path)[2][2].startswith(
        "1 captions are not in UTF-8, the first: b/2.png"
    )


OWN_NAME = {  # a class: spellings of it that no picture of the set keeps as a tag
    "aoka": "aoka Aoka AOKA",
    "hatsune miku": "hatsune_miku Miku_Hatsune hatsune-miku character:hatsune_miku",
    "saber_(fate)": "saber saber_(fate) saber_(arthur)",
    "Rin": "rin rin_(series)",
}


@pytest.mark.parametrize("label", OWN_NAME)
def test_the_name_of_a_class_is_no_tag_in_any_layout(tmp_path, label):
    spelled = OWN_NAME[label].split()
    records = [sources.Record(str(i), "", label, tags=(t, "hat")) for i, t in enumerate(spelled)]
    records += [sources.Record("x", "", "other", tags=("rino", "aoka_blue", spelled[0]))]
    kept, (line,) = tags.without_names(records)
    assert {r.tags for r in kept[:-1]} == {("hat",)} and kept[-1].tags == ("rino", "aoka_blue")
    assert f"those of {len(records)} pictures" in line
    assert tags.without_names(kept) == (kept, [])
    lay(tmp_path, dict.fromkeys(["1.png", "2.png"]) | {"a.csv": f"1.png,{label},,{spelled[0]} hat"})
    assert told(tmp_path / "a.csv") == {"1.png": f"-/{label} hat"}


def test_words_that_say_nothing_are_left_out():
    faces = ":d ^_^ o_o >_< xD x3 0_0 ;) \\o/"
    assert all(map(tags.is_emoticon, faces.split()))
    words = "1girl hat 猫 c_cup t-shirt 3d fate/zero v ^ ..."
    assert not any(map(tags.is_emoticon, words.split()))
    assert tags.vocabulary(tagged(("a", "a"), ("b",), ("b",)))[0] == ["b"]  # twice, on one picture


def test_a_tag_of_every_picture_tells_nothing():
    lists = [("girl", "hat"), ("girl",), ("girl", "hat", "bow", "tea"), ("girl", "bow")]
    found = tags.importance([*map(set, lists)], Counter(sum(lists, ())))
    assert found["girl"] == 0 and found["tea"] == pytest.approx(0.25 * math.log(4))
    assert found["hat"] == pytest.approx((1 / 2 + 1 / 4) * math.log(2))
    assert tags.vocabulary(tagged(*lists), 0.2)[0] == ["bow", "hat"]
