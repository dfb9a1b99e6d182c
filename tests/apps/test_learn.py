"""apps/learn.py: what the folders of apps/sort.py say is learned, once."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_folder, json_of, refused, run_line
from made import CPU

import data
from apps import detect
from apps.gallery import Gallery

LEARN = f"apps.learn runs/a-lora {CPU} out"
SORT = f"apps.sort runs/a-lora {CPU} --out out --threshold 2"  # all are unknown


def sorted_copies(fresh, words):
    run_line(f"{SORT} {words}", fresh, check=0)
    with open(fresh / "out/sorted.csv", newline="", encoding="utf-8") as file:
        return sorted(row["copy"] for row in csv.DictReader(file))


def learned(fresh):
    """What is told, and {name: pictures} of the gallery."""
    told = run_line(LEARN, fresh, check=0).stdout
    gallery = Gallery.load("runs/a-lora")
    return told, dict(zip(gallery.names, gallery.labels.bincount().tolist(), strict=True))


def move(fresh, *copies, to):
    for copy in copies:
        below = (fresh / "out" / to).joinpath(*copy.split("/")[1:])
        below.parent.mkdir(exist_ok=True, parents=True)
        (fresh / "out" / copy).rename(below)


def test_every_picture_is_whom_its_folder_says_once_and_second_thoughts_count(fresh):
    draw_folder(fresh / "new/zoe", 1, 8, seed=5)
    before = Gallery.load("runs/a-lora")
    copies = sorted_copies(fresh, "images/class1 new")
    zoe = [copy for copy in copies if "zoe" in copy]
    move(fresh, *zoe[:5], to="Zoë")
    move(fresh, *[copy for copy in copies if "zoe" not in copy][1:4], to="others")
    there = sorted(path for path in (fresh / "out").rglob("*"))
    told, names = learned(fresh)
    assert sorted(path for path in (fresh / "out").rglob("*")) == there
    assert "Zoë is enrolled with 5 pictures" in told and "get another name now" in told
    assert names.keys() == {*before.names, "Zoë"} and names["Zoë"] == 5
    rows = json_of(f"apps.recognize runs/a-lora {CPU} new --json --threshold -1", fresh)
    assert np.mean([row["name"] == "Zoë" for row in rows]) >= 0.75
    assert learned(fresh)[1] == names
    move(fresh, zoe[0].replace("unknown", "Zoë", 1), to="unknown")  # one of them was nobody
    assert learned(fresh)[1] == names | {"Zoë": 4}
    assert len(before.keys) + 4 == len(Gallery.load("runs/a-lora").keys)


@pytest.mark.parametrize("right", ["class0", "class1"])
def test_a_picture_leaves_the_character_that_it_was_added_to(fresh, right):
    wrong = {"class0": "class1", "class1": "class0"}[right]
    draw_folder(fresh / "new", 1, 4, seed=5)
    (first, second, *_) = sorted_copies(fresh, "new")
    before = learned(fresh)[1]
    move(fresh, first, to=wrong)
    wrongly = before | {wrong: before[wrong] + 1}
    assert learned(fresh)[1] == wrongly
    # In both folders: which of them is right, nobody can know.
    below = first.split("/", 1)[1]
    (fresh / "out" / right).joinpath(below).parent.mkdir(parents=True)
    shutil.copy(fresh / "out" / wrong / below, fresh / "out" / right / below)
    told, names = learned(fresh)
    assert "are one picture" in told and names == wrongly
    (fresh / "out" / wrong / below).unlink()
    assert learned(fresh)[1] == before | {right: before[right] + 1}
    # copied out of unknown, and not moved
    shutil.copy(fresh / "out" / second, fresh / "out" / right / "second.png")
    assert learned(fresh)[1] == before | {right: before[right] + 2}
    assert "4 of them done" in run_line(f"{SORT} new", fresh, check=0).stdout


def test_too_few_of_somebody_new_and_groups_without_a_name_are_not_learned(fresh):
    before = Gallery.load("runs/a-lora")
    copies = sorted_copies(fresh, "images/class0")
    move(fresh, *copies[:2], to="Ann")
    move(fresh, copies[2], to="group-001")
    told, names = learned(fresh)
    assert "2 pictures of Ann are too few" in told and list(names) == before.names
    move(fresh, *copies[3:5], to="Ann")
    assert "Ann is enrolled with 4 pictures" in learned(fresh)[0]
    refused(run_line(f"apps.learn runs/a-lora {CPU} nowhere", fresh))


def test_the_command_that_is_told_packs_the_corrected_folders(fresh):
    """Whatever folders the pictures came from, which are kept below the characters."""
    for year in ("2018", "2019", "2020", "2021"):
        draw_folder(fresh / year, 1, 4, seed=int(year))
        shutil.move(fresh / year, fresh / "new" / year)
    copies = sorted_copies(fresh, "new")
    move(fresh, *copies[::3], to="Ann")
    move(fresh, *copies[1::3], to="Bea")
    told = learned(fresh)[0]
    run_line(told.split("and give: python ")[1].split("\n")[0], fresh, check=0)
    split = data.open_split(fresh / "datasets/NAME", "train")
    assert split["header"]["classes"] == ["Ann", "Bea"]
    assert len(data.open_split(fresh / "datasets/NAME", "unknown")["labels"]) == len(copies[2::3])


def test_of_pages_those_with_one_face_are_learned(fresh, monkeypatch):
    box = [[0.1, 0.1, 0.9, 0.9], [0.2, 0.2, 0.4, 0.4]]
    count = [1]

    def found(net, view):
        return [(torch.tensor(box[: count[0]]), torch.tensor([0.9, 0.9])[: count[0]])]

    monkeypatch.setattr(detect, "detect", found)
    draw_folder(fresh / "new", 1, 4, seed=5)
    move(fresh, *sorted_copies(fresh, "new --detect runs/a-det"), to="Zoe")
    for count[0], words in ((2, "not learned: 4"), (1, "Zoe is enrolled with 4 pictures")):
        told = run_line(f"{LEARN} --detect runs/a-det", fresh, check=0).stdout
        assert words in told and ("Zoe" in told) == (count[0] == 1)
    assert "data.py FACES --layout class" in told and "apps.detect runs/a-det out --largest" in told
