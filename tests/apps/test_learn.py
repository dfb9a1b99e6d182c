"""apps/learn.py: what a person moved in the folders of apps/sort.py is learned, once."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder, json_of, refused, run_line
from made import CPU
from PIL import Image

import data
from apps import detect, recognize

LEARN = f"apps.learn runs/a-lora {CPU}"
SORT = f"apps.sort runs/a-lora {CPU}"


def table(fresh):
    with open(fresh / "out/sorted.csv", newline="", encoding="utf-8") as file:
        return {row["copy"]: row["name"] for row in csv.DictReader(file)}


def learned(fresh):
    return run_line(f"{LEARN} out", fresh, check=0).stdout


def move(fresh, *copies, to):
    (fresh / "out" / to).mkdir(exist_ok=True, parents=True)
    for copy in copies:
        below = (fresh / "out" / to).joinpath(*copy.split("/")[1:])
        below.parent.mkdir(exist_ok=True, parents=True)
        (fresh / "out" / copy).rename(below)


def test_moved_and_added_pictures_are_learned_and_the_others_are_not(fresh):
    before = recognize.Gallery.load("runs/a-lora").keys
    draw_folder(fresh / "new/zoe", 1, 8, seed=5)
    run_line(f"{SORT} images/class1 new --threshold 2 --out out", fresh, check=0)
    assert "no picture was moved" in learned(fresh)
    copies = sorted(table(fresh))
    zoe = [copy for copy in copies if "zoe" in copy]
    ones = [copy for copy in copies if "zoe" not in copy]
    move(fresh, *zoe[:4], to="Zoë")
    move(fresh, ones[0], to="class1")
    move(fresh, *ones[1:4], to="others")  # which data.py takes for nobody, too
    shutil.copy(fresh / "new" / "/".join(zoe[4].split("/")[1:]), fresh / "out/Zoë/more.png")
    told = learned(fresh)
    for words in ("4 unknown -> Zoë", "1 unknown -> class1", "1 added -> Zoë"):
        assert words in told
    assert "Zoë is enrolled with 5 pictures" in told and "change their name" in told
    gallery = recognize.Gallery.load("runs/a-lora")
    assert (
        gallery.names[-1] == "Zoë"
        and "others" not in gallery.names
        and len(gallery.keys) <= len(before) + 6
    )
    rows = json_of(f"apps.recognize runs/a-lora {CPU} new --json --threshold -1", fresh)
    assert np.mean([row["name"] == "Zoë" for row in rows]) >= 0.75
    names = table(fresh)
    assert names[zoe[0].replace("unknown", "Zoë", 1)] == "Zoë" == names["Zoë/more.png"]
    assert "no picture was moved" in learned(fresh)
    # second thoughts: one of them was nobody
    move(fresh, "Zoë/more.png", to="unknown")
    assert "1 Zoë -> unknown" in learned(fresh)
    assert len(recognize.Gallery.load("runs/a-lora").keys) == len(gallery.keys) - 1


def test_what_stayed_beside_a_correction_is_learned_too(fresh):
    draw_folder(fresh / "new", 2, 12)
    for path in (fresh / "new").rglob("*.png"):  # the colours of two classes, other noise
        Image.open(path).rotate(180).save(path)
    run_line(f"{SORT} new --threshold -2 --out out", fresh, check=0)
    known = table(fresh)
    wrong = [copy for copy in known if copy.split("/")[0] != copy.split("/")[-2]]
    right = [copy for copy in known if copy not in wrong]
    assert len(right) >= 12
    count = len(recognize.Gallery.load("runs/a-lora").keys)
    move(fresh, right[0], to="unknown")
    told = learned(fresh)
    gallery = recognize.Gallery.load("runs/a-lora")
    assert count + len(known) - 1 == len(gallery.keys)
    assert f"of {len(known) - 1} pictures that stayed" in told and "of them new" in told


@pytest.mark.parametrize("right", ["class0", "class1"])
def test_of_two_copies_of_one_picture_the_one_that_was_moved_is_right(fresh, right):
    wrong = {"class0": "class1", "class1": "class0"}[right]
    draw_folder(fresh / "new", 1, 4, seed=5)
    run_line(f"{SORT} new --threshold 2 --out out", fresh, check=0)

    def name_of_twin():
        gallery = recognize.Gallery.load("runs/a-lora")
        keys = zip(gallery.keys, gallery.labels, strict=True)
        (label,) = (label for key, label in keys if "twin" in key)
        return gallery.names[label]

    first, *others = sorted(table(fresh))
    move(fresh, first, to=wrong)
    learned(fresh)  # it is one of those that stay there from now on
    below = first.split("/", 1)[1]
    Image.open(fresh / "out" / wrong / below).save(fresh / "out/unknown/twin.png")
    move(fresh, "unknown/twin.png", to=right)
    learned(fresh)
    assert name_of_twin() == right
    # moved out of its subfolder as well, it is still the picture that was sorted
    assert len(Path(others[0]).parts) > 2
    shutil.move(fresh / "out" / others[0], fresh / "out" / right / Path(others[0]).name)
    assert f"1 unknown -> {right}" in learned(fresh)
    assert name_of_twin() == right  # though a copy of it has stayed elsewhere


def test_after_a_picture_was_copied_to_a_second_folder_more_can_be_sorted(fresh):
    line = f"{SORT} images/class0 --threshold 2 --out out"
    run_line(line, fresh, check=0)
    first = min(table(fresh))
    (fresh / "out/class0").mkdir()
    shutil.copy(fresh / "out" / first, fresh / "out/class0")
    assert "1 added -> class0" in run_line(f"{LEARN} {fresh}/out", fresh, check=0).stdout
    assert "of them done" in run_line(line, fresh, check=0).stdout
    move(fresh, f"class0/{first.split('/', 1)[1]}", to="class1")
    learned(fresh)
    assert "of them done" in run_line(line, fresh, check=0).stdout


def test_the_command_that_is_told_packs_the_corrected_folders(fresh):
    """Whatever folders the pictures came from, which are kept below the characters."""
    for year in ("2018", "2019", "2020", "2021"):
        draw_folder(fresh / year, 1, 4, seed=int(year))
        shutil.move(fresh / year, fresh / "new" / year)
    run_line(f"{SORT} new --threshold 2 --out out", fresh, check=0)
    copies = sorted(table(fresh))
    move(fresh, *copies[::3], to="Ann")
    move(fresh, *copies[1::3], to="Bea")
    told = learned(fresh)
    command = told[told.index("next: ") :].split("python ")[1].split(" packs them")[0]
    run_line(command, fresh, check=0)
    split = data.open_split(fresh / "datasets/NAME", "train")
    assert split["header"]["classes"] == ["Ann", "Bea"]
    assert len(data.open_split(fresh / "datasets/NAME", "unknown")["labels"]) == len(copies[2::3])


def test_too_few_of_somebody_new_and_groups_without_a_name_are_not_learned(fresh):
    before = recognize.Gallery.load("runs/a-lora")
    run_line(f"{SORT} images/class0 --threshold 2 --out out", fresh, check=0)
    copies = sorted(table(fresh))
    move(fresh, *copies[:2], to="Ann")
    move(fresh, copies[2], to="group-001")
    told = learned(fresh)
    assert "2 pictures of Ann are too few" in told and "not learned: 2" in told
    assert recognize.Gallery.load("runs/a-lora").names == before.names
    move(fresh, *copies[3:5], to="Ann")
    assert "Ann is enrolled with 4 pictures" in learned(fresh)


def test_of_pages_those_with_one_face_are_learned(fresh, monkeypatch):
    box = [[0.1, 0.1, 0.9, 0.9], [0.2, 0.2, 0.4, 0.4]]
    count = []

    def found(net, view):
        return [(torch.tensor(box[: count[0]]), torch.tensor([0.9, 0.9])[: count[0]])]

    monkeypatch.setattr(detect, "detect", found)
    draw_folder(fresh / "new", 1, 4, seed=5)
    count.append(1)
    run_line(f"{SORT} new --threshold 2 --detect runs/a-det --out out", fresh, check=0)
    move(fresh, *sorted(table(fresh)), to="Zoe")
    count[0] = 2
    told = run_line(f"{LEARN} out --detect runs/a-det", fresh, check=0).stdout
    assert "not learned: 4" in told
    count[0] = 1
    told = run_line(f"{LEARN} out --detect runs/a-det", fresh, check=0).stdout
    assert "Zoe is enrolled with 4 pictures" in told
    assert "data.py FACES --layout class" in told and "apps.detect runs/a-det out --largest" in told


def test_a_folder_that_sort_did_not_write_is_refused(fresh):
    assert "apps.sort" in refused(run_line(f"{LEARN} images", fresh))
    refused(run_line(f"{LEARN} nowhere", fresh))
