"""Pictures of nobody: folders and labels that say so, --unknown, and what they never become."""

import shutil
from pathlib import Path

import pytest
from conftest import LINUX, draw_folder, refused, run_line

import data


@pytest.fixture
def people(tmp_path):
    """images/class0, class1 and more/class0, with pictures of their own."""
    draw_folder(tmp_path / "images", 2, 20)
    draw_folder(tmp_path / "more", 1, 10, seed=7)
    return tmp_path


def packed(folder, words, out="out"):
    """-> what is said, and the splits."""
    said = run_line(f"data.py {words} --out {out} --size 16", folder, check=0).stdout
    splits = {
        path.stem: data.open_split(folder / out, path.stem) for path in Path(out).glob("*.s*")
    }
    return said, splits


WAYS = {  # what is moved where, and what is given to data.py
    "a folder": ({"more/class0": "images/NAME"}, "images"),
    "a folder beside a series": ({"images": "new/fate", "more/class0": "new/NAME"}, "new"),
    "a folder of folders": (
        {"images/class0": "new/class0/a", "images/class1": "new/class1/a", "more": "new/NAME"},
        "new",
    ),
    "a zip": ({"more/class0": "images/NAME"}, "images.zip"),
    "a table": ({"more/class0": "more/NAME"}, "list.csv"),
    "a flag": ({}, "images --unknown more"),
    "a flag and a zip": ({}, "images --unknown more.zip"),
    "a flag and a folder inside": ({"more": "images/spare"}, "link --unknown images/spare"),
}


def move(folder, moves, given, name):
    """Lay the pictures out so, the others in folders of this name; and what a way needs beside it."""
    for old, new in moves.items():
        new = folder / new.replace("NAME", name)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / old, new)
    if ".zip" in given:
        archive = given.split()[-1].removesuffix(".zip")
        shutil.make_archive(folder / archive, "zip", folder / archive)
    if "link" in given:
        (folder / "link").symlink_to("images")
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*.png"))]
    rows = [f"{path},{path.parent.name}" for path in paths]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))


@LINUX
@pytest.mark.parametrize("way", WAYS)
def test_pictures_of_nobody_have_a_file_of_their_own_and_are_no_class(people, monkeypatch, way):
    monkeypatch.chdir(people)
    moves, given = WAYS[way]
    move(people, moves, given, "Others" if way in ("a zip", "a table") else "unknown")
    said, splits = packed(people, f"{given} --dedupe off")
    assert "10 pictures show nobody" in said
    others = splits.pop("unknown")
    assert len(others["labels"]) == 10 and (others["labels"] == -1).all()
    assert others["header"]["classes"] == ["class0", "class1"]
    assert sum(len(split["labels"]) for split in splits.values()) == 40
    assert all((split["labels"] >= 0).all() for split in splits.values())


def test_the_deal_of_the_others_does_not_change(people, monkeypatch):
    monkeypatch.chdir(people)
    _, without = packed(people, "images --dedupe off", "without")
    _, splits = packed(people, "images --unknown more --dedupe off", "with")
    count = {name: split["labels"].bincount().tolist() for name, split in without.items()}
    del splits["unknown"]
    assert count == {name: split["labels"].bincount().tolist() for name, split in splits.items()}


def test_the_sheet_of_a_set_shows_them_too(people, monkeypatch):
    monkeypatch.chdir(people)
    _, splits = packed(people, "images --unknown more --dedupe off", "with")
    drawn = {}
    monkeypatch.setattr("common.plots.image_grid", lambda path, title, rows: drawn.update(rows))
    run_line("data.py --show with", people, check=0)
    assert (drawn["unknown"] == splits["unknown"]["images"][:10]).all()
    assert "class0" in drawn


def test_a_copy_of_somebody_is_not_nobody(people, monkeypatch):
    monkeypatch.chdir(people)
    shutil.copytree(people / "images/class1", people / "images/unknown")
    draw_folder(people / "new", 1, 4, seed=9)
    for path in (people / "new/class0").iterdir():
        path.rename(people / "images/unknown" / f"new-{path.name}")
    said, splits = packed(people, "images")
    assert "are copies of somebody's" in said and "unknown/illust0_0.png" in said
    assert all("new-" in key for key in splits["unknown"]["header"]["keys"])


def test_vague_folders_are_hinted_at_and_lonely_ones_are_characters(people, monkeypatch):
    monkeypatch.chdir(people)
    shutil.move(people / "more/class0", people / "images/misc")
    said, splits = packed(people, "images")
    assert (
        "misc" in splits["train"]["header"]["classes"] and "misc; name the folder unknown" in said
    )
    shutil.move(people / "images/misc", people / "images/group-002")
    assert "group-002; name the folder unknown" in packed(people, "images", "grouped")[0]
    shutil.move(people / "images/group-002", people / "alone/unknown")
    _, splits = packed(people, "alone", "alone-packed")
    assert "unknown" not in splits and splits["train"]["header"]["classes"] == ["unknown"]
    assert "--unknown" in refused(run_line("data.py toon --out toon --unknown images", people))
