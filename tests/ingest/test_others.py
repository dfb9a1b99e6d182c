"""Pictures of nobody: folders and labels that say so, --unknown, and what they never become."""

import shutil
import zipfile
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


def as_folder(folder, name):
    shutil.move(folder / "more/class0", folder / "images" / name)
    return "images"


def below_a_series(folder, name):
    (folder / "series").mkdir()
    shutil.move(folder / "images", folder / "series/fate")
    shutil.move(folder / "more/class0", folder / "series" / name)
    return "series"


def with_subfolders(folder, name):
    shutil.move(folder / "more", folder / "images" / name)
    for path in (folder / "images").glob("class*"):
        shutil.move(path, folder / "volume")
        (folder / "images" / path.name).mkdir()
        shutil.move(folder / "volume", folder / "images" / path.name / "class0")
    return "images"


def as_zip(folder, name):
    shutil.make_archive(folder / "all", "zip", folder / as_folder(folder, name))
    return "all.zip"


def as_table(folder, name):
    rows = ["path,label"]
    for path in sorted(folder.rglob("*.png")):
        label = name if "more" in path.parts else path.parent.name
        rows.append(f"{path.relative_to(folder)},{label}")
    (folder / "list.csv").write_text("\n".join(rows))
    return "list.csv"


def by_flag(folder, _):
    return "images --unknown more"


def by_flag_of_a_zip(folder, _):
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        for path in (folder / "more").rglob("*.png"):
            archive.write(path, path.name)
    return "images --unknown more.zip"


def by_flag_inside(folder, _):
    shutil.move(folder / "more", folder / "images/spare")
    (folder / "link").symlink_to("images")
    return "link --unknown images/spare"


WAYS = (as_folder, below_a_series, with_subfolders, as_zip, as_table, by_flag, by_flag_of_a_zip)
WAYS += (pytest.param(by_flag_inside, marks=LINUX),)
NAMES = ("unknown", "Others")  # one of them for each way


@pytest.mark.parametrize("way", WAYS)
def test_pictures_of_nobody_have_a_file_of_their_own_and_are_no_class(people, monkeypatch, way):
    monkeypatch.chdir(people)
    name = NAMES[len(way.__name__) % 2]
    said, splits = packed(people, f"{way(people, name)} --dedupe off")
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
