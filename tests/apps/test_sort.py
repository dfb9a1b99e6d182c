"""apps/sort.py: copies by who is in a picture, groups of faces that look alike, and a stopped sort that goes on."""

import csv
import os
import re
import shutil
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LINUX, json_of, refused, run_line
from made import CPU, files_of
from sklearn.metrics import f1_score

from apps import groups, sheet, sort
from apps.unknown import grouping
from common.train import seeded

FOLDER = "images/class0"
SORT = f"apps.sort runs/a-lora {CPU}"


def table(fresh):
    with open(fresh / "out/sorted.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_pictures_are_copied_to_who_is_in_them_and_a_stopped_sort_goes_on(fresh, monkeypatch):
    before = files_of(fresh / "images")
    line, plain, copied = f"{SORT} images --out out", shutil.copyfile, []

    def killed(*words):
        copied.append(words)
        if len(copied) == 41:
            raise KeyboardInterrupt
        return plain(*words)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", killed)
        run_line(line, fresh, check=130)
    assert len([*(fresh / "out").rglob("*.png")]) == 40
    first, second = sorted((fresh / "out").rglob("*.png"))[:2]
    (fresh / "out/Ann").mkdir()
    first.rename(fresh / "out/Ann/renamed.png")  # somebody knows it
    second.write_bytes(b"mine")
    assert "39 of them done" in run_line(line, fresh, check=0).stdout
    assert second.read_bytes() == b"mine"
    answers = json_of(f"apps.recognize runs/a-lora {CPU} images --json", fresh)
    names = {r["picture"]: r["name"] or "unknown" for r in answers}
    rows = table(fresh)
    for row in rows:
        picture = row["picture"].removeprefix("images/")
        assert row["copy"].split("/")[0] == names.pop(picture, row["name"])
    assert not names and len(rows) == 73 and len({row["copy"] for row in rows}) == 73
    assert len(on_page(fresh / "out/names.html")) == 72  # but for the one that was moved
    assert files_of(fresh / "images") == before
    shutil.move(fresh / "images", fresh / "elsewhere")  # whatever the path, what has a copy is done
    again = run_line(f"{SORT} elsewhere --out out", fresh, check=0).stdout
    assert "72 pictures, 72 of them done" in again


def on_page(path):
    """-> (the folder of its section, its file, what is said of it) of each picture on a page."""
    found = []
    for part in path.read_text("utf-8").split("<h2 ")[1:]:
        heading = unescape(re.search(r">(.*) \(\d+\)</h2>", part)[1])
        for figure in part.split("<figure>")[1:]:
            words = unescape(re.search(r"<figcaption>(.*?)<small>", figure)[1])
            found.append((heading, unquote(re.search(r'href="(.*?)"', figure)[1]), words))
    return found


def test_the_page_shows_what_is_there_with_a_known_picture_and_the_least_sure_first(fresh):
    run_line(f"{SORT} images --out out", fresh, check=0)
    rows = {row["copy"]: row for row in table(fresh)}
    (moved, away), (broken, row) = [*rows.items()][:2]
    (fresh / "out" / moved).unlink()
    del rows[moved], rows[broken]
    (fresh / away["picture"]).unlink()
    file = fresh / "out/sorted.csv"
    file.write_text(file.read_text("utf-8").replace(f",{row['similarity']},", ',"much,'), "utf-8")
    run_line(f"{SORT} images --out out", fresh, check=0)
    found = on_page(fresh / "out/names.html")
    assert {file for _, file, _ in found} == rows.keys()
    for folder in {folder for folder, _, _ in found}:
        own = [rows[file] for heading, file, _ in found if heading == folder]
        assert {row["copy"].split("/")[0] for row in own} == {folder}
        unknown = folder == "unknown"  # there, the most similar one is the least sure
        sure = [-float(row["similarity"]) if unknown else float(row["confidence"]) for row in own]
        assert sure == sorted(sure)
    for _, file, words in found:
        name = rows[file]["name"]
        assert name in rows[file]["nearest"]  # each picture of class0 has a path with class0
        assert words.startswith(f"{name}, confidence " if name else "unlike all")
    text = (fresh / "out/names.html").read_text("utf-8")
    known = {row["nearest"] for row in rows.values()}
    assert text.count("data:image/jpeg") == len(known) > 3  # each once
    shutil.rmtree(fresh / "datasets/packed")  # then their names are all there is
    shutil.move(fresh / "images", fresh / "elsewhere")
    run_line(f"{SORT} elsewhere --out out", fresh, check=0)
    assert "data:image" not in (fresh / "out/names.html").read_text("utf-8")
    assert len(on_page(fresh / "out/names.html")) == len(rows)
    old = next(iter(rows))
    was, below = old.split("/", 1)
    new = fresh / "out/Ann" / below
    new.parent.mkdir(parents=True)
    (fresh / "out" / old).rename(new)
    run_line(f"{SORT} elsewhere --out out", fresh, check=0)
    line = "Ann", f"Ann/{below}", f"you moved it here; it was called {was}"
    assert line in on_page(fresh / "out/names.html")


@LINUX
def test_names_are_text_on_the_page(tmp_path):
    """Also of files: somebody else may have chosen them."""
    name, odd = '<b>"miku" & 初音', "a#?%41 <i>\udcff.png"
    entries = [sheet.Entry(odd, 0.5, name, name), sheet.Entry("2.png", 0.1, "first")]
    picture = np.zeros((8, 8, 3), np.uint8)
    sheet.write_sheet(tmp_path / "p.html", name, "do", {name: entries}, {name: picture})
    text = (tmp_path / "p.html").read_text("utf-8")
    assert "<b>" not in text and "<i>" not in text and "初音" in text
    assert [words for _, _, words in on_page(tmp_path / "p.html")] == ["first", name]
    assert 'href="a%23%3F%2541%20%3Ci%3E%FF.png"' in text


@LINUX
def test_no_copy_is_replaced_by_another_folder_s_picture(fresh):
    """Pictures may be read-only, and their names no text."""
    first = b"\xff-" + b"long" * 60 + b".png"
    for i, folder in enumerate("ab"):
        (fresh / folder).mkdir()
        shutil.copy(fresh / FOLDER / f"illust{i}_0.png", fresh / folder / "1.png")
        os.chmod(fresh / folder / "1.png", 0o444)
    shutil.copy(fresh / FOLDER / "illust3_0.png", os.fsencode(fresh / "a") + b"/" + first)
    for i, name in enumerate(("\u00e9.png", "e\u0301.png")):  # one name in two spellings
        shutil.copy(fresh / FOLDER / f"illust{4 + i}_0.png", fresh / "a" / name)
    run_line(f"{SORT} a --out out", fresh, check=0)
    assert "4 of them done" in run_line(f"{SORT} a --out out", fresh, check=0).stdout
    run_line(f"{SORT} b --out out", fresh, check=0)
    copies = sorted((fresh / "out").rglob("1.png"), key=lambda path: len(path.parts))
    assert [path.parent.name == "b" for path in copies] == [False, True]
    assert "5 of them done" in run_line(f"{SORT} a b --out out", fresh, check=0).stdout
    for folder in ("c/b", "d/b"):
        (fresh / folder).mkdir(parents=True)
        shutil.copy(fresh / FOLDER / f"illust{'cd'.index(folder[0]) + 6}_0.png", fresh / folder)
        (next((fresh / folder).iterdir())).rename(fresh / folder / "1.png")
    assert "rename one of them" in refused(run_line(f"{SORT} c/b --out out", fresh))


def test_a_broken_picture_is_sorted_once_it_is_mended(fresh):
    whole = (fresh / FOLDER / "illust0_0.png").read_bytes()
    (fresh / FOLDER / "illust0_0.png").write_bytes(b"broken")
    (fresh / "out").mkdir()
    (fresh / "out/.DS_Store").write_bytes(b"of a Mac")
    run_line(f"{SORT} images --out out", fresh, check=0)
    assert len(table(fresh)) == 71
    (fresh / FOLDER / "illust0_0.png").write_bytes(whole)
    assert "1 copies" in run_line(f"{SORT} images --out out", fresh, check=0).stdout
    assert (fresh / "out" / table(fresh)[-1]["copy"]).read_bytes() == whole
    (fresh / "own").mkdir()
    (fresh / "own/file.txt").write_text("somebody's")
    refused(run_line(f"{SORT} images --out own", fresh))


def test_faces_that_look_alike_are_one_group():
    sizes = torch.tensor([5, 7, 1])
    centres = torch.eye(3, 16).repeat_interleave(sizes, 0)
    unit, colours = F.normalize(centres + 0.1 * torch.randn(2, 13, 16, generator=seeded(0)), dim=2)
    pairs = groups.likeness(unit, colours)
    one, two = (F.normalize(x - groups.CENTRED * x.mean(0)) for x in (unit, colours))
    torch.testing.assert_close(pairs, (one @ one.T + two @ two.T) / 2)
    assert groups.alike(pairs) == [1] * 5 + [0] * 7 + [2]
    assert groups.alike(pairs[:1, :1]) == [0]
    row = grouping(pairs, torch.arange(3).repeat_interleave(sizes))
    assert set(row.values()) == {100}
    truth = torch.tensor([0] * 5 + [1] * 3 + [2] * 5)
    merged = grouping(pairs, truth)
    pairs_f1 = 200 * 19 / (31 + 23)  # 19 pairs are in both, of 10 + 21 and of 10 + 3 + 10
    assert merged["pair_f1"] == pytest.approx(pairs_f1, abs=1e-3)
    one, two = torch.triu_indices(13, 13, 1)
    cosines = pairs[one, two]
    best = max(f1_score(truth[one] == truth[two], cosines >= least) for least in cosines)
    assert merged["ccip_f1"] == pytest.approx(100 * best, abs=1e-3)
    names = sort.names_of([0, 0, 0, 1, 1], ["a", "a", None, "b", None])
    assert names == {0: "a", 1: "group-001"}


def test_the_more_alike_faces_have_to_be_the_more_groups_there_are(fresh):
    counts = []
    for i, words in enumerate(("--alike -0.9", "--alike 0.95", "")):
        said = run_line(f"{SORT} images --group --out out{i} {words}", fresh, check=0).stdout
        counts.append(int(said.split("groups ")[1].split(",")[0]))
    assert counts[0] == 1 < counts[2] <= counts[1]
    assert re.search(r"if your own folders are right: .* F1 of [5-9]\d %", said)
    refused(run_line(f"{SORT} images --alike 0.2 --out more", fresh))


def test_a_folder_is_grouped_and_what_is_known_has_its_name(fresh):
    run_line(f"{SORT} images --group --out out", fresh, check=0)
    rows = table(fresh)
    assert len(rows) == 72
    for row in rows:
        assert (fresh / "out" / row["copy"]).read_bytes() == (fresh / row["picture"]).read_bytes()
        assert row["copy"].split("/")[0] == row["name"]
    found = {file: heading for heading, file, _ in on_page(fresh / "out/names.html")}
    assert found == {row["copy"]: row["name"] for row in rows}
    named = [row for row in rows if not row["name"].startswith("group-")]
    right = [row["name"] in row["picture"] for row in named]
    assert named and np.mean(right) > 0.8
    refused(run_line(f"{SORT} images --group --out out", fresh))


def test_every_character_has_a_folder_that_every_system_allows():
    names = ["re:zero", "re?zero", "Miku", "miku", "unknown", "CON", "a/b", "dot.", "初音ミク"]
    names += [".hack", "ミ" * 100, "ミ" * 99 + "ク"]
    folders = sort.folders_of(names)
    assert folders["初音ミク"] == "初音ミク" and folders["Miku"] == "Miku"
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    for folder in folders.values():
        assert not set('<>:"/\\|?*') & set(folder) and folder[-1] not in ". "
        assert folder[0] != "." and len(folder.encode()) < 255
        assert folder.casefold() not in ("con", "unknown")
