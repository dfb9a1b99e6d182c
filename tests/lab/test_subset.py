"""lab.subset and pages: a smaller set is a part of the larger; a box holds one person."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import call, run_line
from made import render_here
from PIL import Image

import data
from common.train import UserError
from ingest import pack
from lab import pages
from lab.subset import save_pictures, thinned


def subset(small, tmp_path, name, *flags):
    """-> {split: a split of the new set}."""
    words = ["lab.subset", small, "--out", tmp_path / name, *flags]
    call(*words, cwd=tmp_path, check=0)
    found = [path.stem for path in (tmp_path / name).glob("*.safetensors")]
    return {split: data.open_split(tmp_path / name, split) for split in found}


def pictures_of(split):
    return {k: x.tobytes() for k, x in zip(split["header"]["keys"], split["images"], strict=True)}


def test_few_pictures_are_among_the_more_and_test_stays_whole(small, tmp_path):
    flags = {"few": (3, 0), "more": (6, 0), "other": (3, 1)}  # pictures of each, draw
    sets = {}
    for name, (n, draw) in flags.items():
        sets[name] = subset(small, tmp_path, name, "--pictures", n, "--draw", draw)
    few, more, other = (pictures_of(splits["train"]) for splits in sets.values())
    assert sets["few"]["train"]["labels"].bincount().tolist() == [3, 3, 3]
    assert len(more) == 18 and few.items() < more.items() and few.keys() != other.keys()
    assert pictures_of(sets["few"]["test"]) == pictures_of(data.open_split(small, "test"))


def test_a_choice_is_judged_by_the_whole_dev(small, tmp_path):
    words = ["lab.subset", small, "--choose", "--out", tmp_path / "none"]
    assert "has no dev; pack it with --dev" in call(*words, cwd=tmp_path, check=2).stderr
    shutil.copytree(small, tmp_path / "with-dev")
    shutil.copy(small / "test.safetensors", tmp_path / "with-dev/dev.safetensors")
    found = subset(tmp_path / "with-dev", tmp_path, "choice", "--pictures", 2, "--choose")
    assert found.keys() == {"train", "dev", "val"} and found["val"]["header"]["split"] == "val"
    assert pictures_of(found["val"]) == pictures_of(data.open_split(small, "test"))
    assert found["dev"]["labels"].bincount().tolist() == [2, 2, 2]


def test_a_label_is_no_path(tmp_path):
    tensors = {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "labels": torch.tensor([0, 1])}
    save_pictures(tensors, {"classes": ["../a", ".."]}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_", "_._a"]
    with pytest.raises(UserError, match="would share a folder"):
        save_pictures(tensors, {"classes": ["a/b", "a:b"]}, tmp_path)


def test_pictures_without_a_label_and_splits_without_a_character_stay_so():
    tensors = {"images": torch.zeros(4, 2, 2, 3), "labels": torch.tensor([0, 1, -1, -1])}
    header = {"classes": ["a", "b"], "keys": list("wxyz")}
    for classes, kept in ((["a"], ["w"]), (["b"], ["x"]), ([], [])):
        for pictures in (None, 5):
            found, about = thinned(tensors, header, classes, pictures, draw=0)
            assert about["keys"] == kept and found["labels"].tolist() == [0] * len(kept)


def test_characters_who_leave_are_in_no_split(small, tmp_path):
    found = subset(small, tmp_path, "two", "--characters", 2)
    names = found["train"]["header"]["classes"]
    assert len(names) == 2
    for name, split in found.items():
        assert pictures_of(split).items() < pictures_of(data.open_split(small, name)).items()
        for key, label in zip(split["header"]["keys"], split["labels"], strict=True):
            assert key.split("/")[-2] == names[label]


def test_a_folder_of_each_character_has_its_pictures(small, tmp_path):
    call("lab.subset", small, "--folders", "--out", "pictures", cwd=tmp_path, check=0)
    split = data.open_split(small, "train")
    for label, name in enumerate(split["header"]["classes"]):
        there = [np.asarray(Image.open(p)) for p in (tmp_path / "pictures" / name).iterdir()]
        own = split["images"][(split["labels"] == label).numpy()]
        assert {x.tobytes() for x in there} == {x.tobytes() for x in own}


PEOPLE = 4


def test_a_box_holds_a_person_of_its_split_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "TEST_PAGES", 16)
    monkeypatch.setattr(pack, "render", render_here)
    y, x = np.mgrid[:32, :32]
    for who in range(PEOPLE):
        picture = np.zeros((32, 32, 4), np.uint8)
        picture[(x - 16) ** 2 + (y - 16) ** 2 < 12**2] = (255, 60 * who, 0, 255)
        for number in range(6):
            path = tmp_path / f"images/{who}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    run_line("data.py images --out packed --size 32 --dedupe off", tmp_path, check=0)
    run_line("lab.pages packed --pages 8 --out pages", tmp_path, check=0)
    seen = {"train": set(), "test": set()}
    for row in csv.DictReader((tmp_path / "pages/boxes.csv").open()):
        page = np.asarray(Image.open(tmp_path / "pages" / row["path"]))
        box = {side: round(float(row[side])) for side in ("x1", "y1", "x2", "y2")}
        inside = page[box["y1"] : box["y2"], box["x1"] : box["x2"]]
        red = inside[..., 0] > 250
        assert red.mean() > 0.3
        seen[row["path"].split("/")[0]].add(round(np.median(inside[red, 1]) / 60))
    assert seen["train"] | seen["test"] == set(range(PEOPLE))
    assert not seen["train"] & seen["test"]
