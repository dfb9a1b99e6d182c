"""Near-duplicates: planted copies are found, strangers are not joined, and no group crosses a split."""

import io
import zipfile
from collections import Counter

import numpy as np
import pytest
from conftest import call, refused, run_line, shared_file
from PIL import Image

import data
from ingest import duplicates, toon

KINDS = ("reencoded", "resized", "cropped", "recoloured")


def copy(picture, kind, rng):
    """The picture as a site might hand it out again. Cropped: up to 8 % off each side; recoloured:
    hue turned.
    """
    w, h = picture.size
    if kind == "resized":
        return picture.resize((round(w * 0.6), round(h * 0.55)))
    if kind == "cropped":
        left, top, right, bottom = rng.uniform(0, 0.08, 4)
        return picture.crop(
            (round(left * w), round(top * h), round(w - right * w), round(h - bottom * h))
        )
    if kind == "recoloured":
        hsv = np.asarray(picture.convert("HSV")).astype(int)
        hsv[..., 0] += rng.integers(30, 226)
        return Image.fromarray((hsv % 256).astype(np.uint8), "HSV").convert("RGB")
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def thumbnail(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return duplicates.thumbnail(file.getvalue())


@pytest.fixture(scope="module")
def planted():
    """240 drawn faces, and of the first 60 a copy of each kind -> thumbnails (480, 32, 32), source
    of each (480).
    """
    rng = np.random.default_rng(0)
    items = [toon.plan(2400)[i] for i in rng.permutation(2400)[:240]]
    faces = [Image.fromarray(toon.draw(item, 96)["image"]) for item in items]
    copies = [copy(face, kind, rng) for kind in KINDS for face in faces[:60]]
    return np.stack([thumbnail(p) for p in faces + copies]), np.r_[
        np.arange(240), np.tile(np.arange(60), len(KINDS))
    ]


@pytest.mark.slow
def test_planted_copies_are_found_and_strangers_are_not(planted):
    thumbs, source = planted
    pairs = duplicates.pairs(thumbs)
    roots = np.array(duplicates.join(len(thumbs), pairs))
    for k, kind in enumerate(KINDS):
        recall = np.mean(roots[240 + 60 * k : 300 + 60 * k] == roots[:60])
        assert recall >= {"recoloured": 0.9, "cropped": 0.95}.get(kind, 1), f"{kind}: {recall:.2f}"
    false = {(source[i], source[j]) for i, j in pairs if source[i] != source[j]}
    assert len(false) <= 3  # of 28,680 pairs of strangers: one character, one pose, one background
    assert all(i < j for i, j in pairs) and pairs == sorted(set(pairs))


def test_blank_and_broken_pictures_are_nobodys_copies():
    assert duplicates.pairs(np.zeros((40, 32, 32), np.uint8)) == []
    assert duplicates.pairs(np.full((2, 32, 32), 200, np.uint8)) == []
    assert duplicates.pairs(np.zeros((0, 32, 32), np.uint8)) == []


def test_a_transparent_picture_and_its_flattened_copy_are_one():
    drawn = [toon.draw(item, 96) for item in toon.plan(2400)[::600]]
    clear = [Image.fromarray(np.dstack([d["image"], d["fg"]])) for d in drawn]
    flat = [
        Image.alpha_composite(Image.new("RGBA", c.size, "white"), c).convert("RGB") for c in clear
    ]
    assert duplicates.pairs(np.stack([thumbnail(p) for p in clear + flat])) == [
        (0, 4),
        (1, 5),
        (2, 6),
        (3, 7),
    ]


def test_join_takes_groups_together():
    assert duplicates.join(6, [(4, 5), (1, 4), (0, 2)]) == [0, 1, 0, 3, 1, 1]
    assert duplicates.join(3, []) == [0, 1, 2]


def plant(root, faces=40, seed=1):
    """A folder of drawn faces of two classes; the first ten have two copies, which lie in the other
    class's folder.
    """
    rng = np.random.default_rng(seed)
    for i, item in enumerate(toon.plan(2400)[:: 2400 // faces][:faces]):
        face = Image.fromarray(toon.draw(item, 64)["image"])
        for name, picture in {
            "": face,
            "b": copy(face, "cropped", rng),
            "c": copy(face, "resized", rng),
        }.items():
            folder = root / ("even" if (i % 2 == 0) == (name == "") else "odd")
            folder.mkdir(parents=True, exist_ok=True)
            if name == "" or i < 10:
                picture.save(folder / f"{i}{name}.png")
    return root


def keys(out, split):
    return [key.split("/")[-1] for key in data.open_split(out, split)["header"]["keys"]]


def test_groups_stay_together_and_dedupe_drops_the_copies(tmp_path):
    root = plant(tmp_path / "images")
    said = {}
    for mode in ("group", "drop", "off"):
        said[mode] = run_line(
            f"data.py {root} --out {tmp_path / mode} --size 16 --dedupe {mode}", tmp_path, check=0
        ).stdout
    where = {key: s for s in ("train", "val", "test") for key in keys(tmp_path / "group", s)}
    assert len(where) == 60 and len(set(where.values())) == 3
    assert all(where[f"{i}.png"] == where[f"{i}b.png"] == where[f"{i}c.png"] for i in range(10))
    assert "10 groups of 30 images; 10 hold several classes; 3 x " in said["group"]
    count = Counter(
        key.strip("bc.png") for s in ("train", "val", "test") for key in keys(tmp_path / "drop", s)
    )
    assert set(count.values()) == {1} and len(count) == 40 and "20 copies dropped" in said["drop"]
    assert "near-duplicates" not in said["off"]


def write_splits(root, **splits):
    """Faces under root/SPLIT; those of train are saved otherwise than their copies."""
    for split, some in splits.items():
        (root / split).mkdir(parents=True)
        for i, face in enumerate(some):
            face.save(root / split / f"{i}.jpg", quality=60 if split == "train" else 90)
    return root


@pytest.fixture(scope="module")
def faces():
    return [Image.fromarray(toon.draw(item, 64)["image"]) for item in toon.plan(2400)[::75]]  # 32


def test_copies_leave_the_given_val_and_test_but_never_train(tmp_path, faces):
    root = write_splits(
        tmp_path / "images",
        train=faces[:24],
        val=[*faces[:3], *faces[24:27]],
        test=[*faces[3:5], faces[24], faces[31]],
    )
    flags = {
        "group": (),
        "drop": ["--dedupe"],
        "kept": ["--keep-copies"],
        "off": ["--dedupe", "off"],
    }
    said = {
        mode: call(
            "data.py", root, "--out", tmp_path / mode, "--size", 16, *more, cwd=tmp_path, check=0
        ).stdout
        for mode, more in flags.items()
    }
    sizes = {
        mode: [len(keys(tmp_path / mode, s)) for s in ("train", "val", "test")] for mode in flags
    }
    assert sizes == {"group": [24, 3, 1], "drop": [24, 3, 1], "kept": [24, 6, 4], "off": [24, 6, 4]}
    assert (
        "copies across the given splits dropped: 3 from val, 3 from test; --keep-copies keeps them"
        in said["group"]
    )
    assert "6 copies dropped: 3 from val, 3 from test\n" in said["drop"]
    assert "6 groups cross the splits that the source gives, and stay as published" in said["kept"]
    assert "dropped" not in said["off"] and "as they are" not in said["off"]
    assert "groups cross" not in said["group"] + said["drop"]


@pytest.mark.parametrize("more", [[], ["--dedupe"]])
def test_a_split_that_would_be_gone_stops_the_packing(tmp_path, faces, more):
    root = write_splits(tmp_path / "images", train=faces[:20], val=faces[20:24], test=faces[:4])
    line = refused(
        call("data.py", root, "--out", tmp_path / "out", "--size", 16, *more, cwd=tmp_path)
    )
    assert "all 4 images of test are copies of others" in line and "--keep-copies" in line
    assert not (tmp_path / "out").exists()
    run_line(f"data.py {root} --out {tmp_path / 'out'} --size 16 --keep-copies", tmp_path, check=0)
    assert len(keys(tmp_path / "out", "test")) == 4


def test_keep_copies_that_would_do_nothing_is_refused(tmp_path, faces):
    root = write_splits(tmp_path / "images", train=faces[:8], test=faces[8:12])
    idle = [root, "--dedupe"], [root, "--dedupe", "off"], [root / "train"]
    for words in idle:
        line = refused(call("data.py", *words, "--out", "no", "--keep-copies", cwd=tmp_path))
        assert "--keep-copies has no effect" in line


def test_a_class_too_small_does_not_take_a_split_with_it(tmp_path, faces):
    root = write_splits(
        tmp_path / "images",
        **{"train/a": faces[:8], "train/b": faces[8:10], "test/b": faces[10:12]},
    )
    line = refused(call("data.py", root, "--out", "no", "--min-per-class", 5, cwd=tmp_path))
    assert (
        "all 2 images of test have no class of 5 or more" in line and not (tmp_path / "no").exists()
    )


@pytest.mark.slow
def test_on_real_fan_art_joins_are_copies(tmp_path):
    """Strangers would be of two classes in 19 pairs of 20. All 28 pairs were looked at: each is one picture twice; five
    of them are filed under two characters."""
    with zipfile.ZipFile(shared_file("faces20.zip")) as archive:
        names = sorted(
            n for n in archive.namelist() if n.startswith("val/") and n.endswith(".webp")
        )
        thumbs = np.stack([duplicates.thumbnail(archive.read(n)) for n in names])
    pairs = duplicates.pairs(thumbs)
    same_class = [names[i].split("/")[1] == names[j].split("/")[1] for i, j in pairs]
    assert len(pairs) >= 5 and np.mean(same_class) > 0.8, (len(pairs), np.mean(same_class))
