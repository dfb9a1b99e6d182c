"""apps/sort.py: copies by who is in a picture, groups of faces that look alike, and a stopped sort that goes on."""

import csv
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LINUX, json_of, refused, run_line
from made import CPU, files_of
from sklearn.metrics import f1_score

from apps import groups, sort
from apps.unknown import grouping
from common.train import read_safetensors, save_safetensors, seeded
from ingest import pictures

FOLDER = "images/class0"
SORT = f"apps.sort runs/a-lora {CPU}"


def table(fresh):
    with open(fresh / "out/sorted.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_pictures_are_copied_to_who_is_in_them_and_a_stopped_sort_goes_on(fresh, tmp_path):
    before = files_of(fresh / "images")
    other = fresh / "images/photo.heic"
    other.write_bytes(b"not read")
    line = f"{SORT} images --out out"
    assert "1 .heic" in run_line(line, fresh, check=0).stderr
    other.unlink()
    rows = table(fresh)
    answers = json_of(f"apps.recognize runs/a-lora {CPU} images --json", fresh)
    names = {r["picture"]: r["name"] or "" for r in answers}
    assert {r["picture"].removeprefix("../images/"): r["name"] for r in rows} == names
    for row in rows:
        copy = fresh / "out" / row["copy"]
        assert copy.parts[len(fresh.parts) + 1] == (row["name"] or "unknown")
        assert copy.read_bytes() == (fresh / "out" / row["picture"]).read_bytes()
    assert files_of(fresh / "images") == before
    lines = (fresh / "out/sorted.csv").read_text().splitlines(keepends=True)
    (fresh / "out/sorted.csv").write_text("".join(lines[:41]))
    gone = fresh / "out" / rows[0]["copy"]
    gone.unlink()
    own = fresh / "out" / rows[41]["copy"]  # a picture that somebody put there
    copy = own.read_bytes()
    own.write_bytes(b"mine")
    assert "rename one of them" in refused(run_line(line, fresh)) and own.read_bytes() == b"mine"
    own.write_bytes(copy)
    assert "of them done" in run_line(line, fresh, check=0).stdout
    assert table(fresh) == rows and not gone.exists()
    # Nothing is copied again where all has moved, and the command is given in another folder.
    fresh.rename(tmp_path / "moved")
    again = run_line(
        f"apps.sort ../runs/a-lora ../images --out . {CPU}", tmp_path / "moved/out", check=0
    )
    assert f"{len(rows)} pictures, {len(rows)} of them done" in again.stdout


def test_a_kill_at_the_first_copy_leaves_a_folder_that_is_known_as_sorted(fresh, monkeypatch):
    def killed(*_):
        shutil.copytree("out", "killed")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sort, "copies_of", killed)
        run_line(f"{SORT} images --out out", fresh)
    assert "0 of them done" in run_line(f"{SORT} images --out killed", fresh, check=0).stdout


@LINUX
def test_no_copy_is_replaced_by_another_folder_s_picture(fresh):
    """Pictures may be read-only, and their names no text."""
    first = b"\xff-" + b"long" * 60 + b".png"
    for folder in ("a", "b"):
        (fresh / folder).mkdir()
        shutil.copy(fresh / FOLDER / "illust0_0.png", fresh / folder / "1.png")
        os.chmod(fresh / folder / "1.png", 0o444)
    (fresh / "b/2.png").write_text("hello")
    for paths, keys in ((["a"], ["1.png"]), (["a/", "b"], ["a/1.png", "b/1.png"])):
        problems = []
        assert [key for key, _ in pictures.whole_pictures(paths, problems)] == keys
        assert [key for key, _ in problems] == ["b/2.png"] * (len(paths) > 1)
    shutil.copy(fresh / FOLDER / "illust1_0.png", os.fsencode(fresh / "a") + b"/" + first)
    for name in ("\u00e9.png", "e\u0301.png"):  # one name in two spellings
        shutil.copy(fresh / FOLDER / "illust2_0.png", fresh / "a" / name)
    run_line(f"{SORT} a --out out", fresh, check=0)
    assert "4 of them done" in run_line(f"{SORT} a --out out", fresh, check=0).stdout
    run_line(f"{SORT} b --out out", fresh, check=0)
    folders = sorted(path.parent.name for path in (fresh / "out").rglob("1.png"))
    assert len(folders) == 2 and folders.count("b") == 1
    assert "rename one of them" in refused(run_line(f"{SORT} a/1.png b/1.png --out few", fresh))
    assert "4 pictures" in run_line(f"{SORT} a {fresh}/a --out twice", fresh, check=0).stdout
    run_line(f"{SORT} a b --out both", fresh, check=0)
    copies = {path.relative_to(fresh / "both") for path in (fresh / "both").rglob("1.png")}
    assert sorted(len(path.parts) for path in copies) == [2, 3]
    assert {path.parent.name for path in copies if len(path.parts) == 3} == {"b"}
    assert "5 of them done" in run_line(f"{SORT} a b --out both", fresh, check=0).stdout


def test_a_broken_picture_is_sorted_once_it_is_mended(fresh):
    whole = (fresh / FOLDER / "illust0_0.png").read_bytes()
    (fresh / FOLDER / "illust0_0.png").write_bytes(b"broken")
    (fresh / "out").mkdir()
    (fresh / "out/.DS_Store").write_bytes(b"of a Mac")
    run_line(f"{SORT} images --out out", fresh, check=0)
    assert "class0/illust0_0.png" not in {row["picture"][-20:] for row in table(fresh)}
    assert "0 copies" in run_line(f"{SORT} images --out out", fresh, check=0).stdout
    (fresh / FOLDER / "illust0_0.png").write_bytes(whole)
    assert "1 copies" in run_line(f"{SORT} images --out out", fresh, check=0).stdout
    (row,) = [x for x in table(fresh) if x["picture"] == f"../{FOLDER}/illust0_0.png"]
    assert (fresh / "out" / row["copy"]).read_bytes() == whole


def test_faces_that_look_alike_are_one_group():
    sizes = torch.tensor([5, 7, 1])
    centres = torch.eye(3, 16).repeat_interleave(sizes, 0)
    unit = F.normalize(centres + 0.1 * torch.randn(13, 16, generator=seeded(0)))
    assert groups.alike(unit) == [1] * 5 + [0] * 7 + [2]
    assert groups.alike(unit[:1]) == [0]
    row = grouping(unit, torch.arange(3).repeat_interleave(sizes))
    assert set(row.values()) == {100}
    truth = torch.tensor([0] * 5 + [1] * 3 + [2] * 5)
    merged = grouping(unit, truth)
    pairs_f1 = 200 * 19 / (31 + 23)  # 19 pairs are in both, of 10 + 21 and of 10 + 3 + 10
    assert merged["pair_f1"] == pytest.approx(pairs_f1, abs=1e-3)
    one, two = torch.triu_indices(13, 13, 1)
    cosines = (groups.centred(unit)[one] * groups.centred(unit)[two]).sum(1)
    best = max(f1_score(truth[one] == truth[two], cosines >= least) for least in cosines)
    assert merged["ccip_f1"] == pytest.approx(100 * best, abs=1e-3)
    names = sort.names_of([0, 0, 0, 1, 1], ["a", "a", None, "b", None])
    assert names == {0: "a", 1: "group-001"}


def test_held_out_faces_choose_how_alike_a_group_is():
    """In the first set characters are near to each other, in the second their faces are far apart."""
    draws = seeded(0)
    chosen = []
    for noise, near in ((0.1, 0.3), (0.25, 0.0)):
        centres = torch.eye(6, 16).repeat_interleave(8, 0) + near
        unit = F.normalize(centres + noise * torch.randn(48, 16, generator=draws))
        labels = torch.arange(6).repeat_interleave(8)
        found = groups.f1_curve(unit, labels)
        least = groups.best_threshold([found, found], len(unit))
        by_hand = [groups.pair_f1(groups.alike(unit, x), labels) for x in groups.GRID]
        assert max(by_hand) == by_hand[list(groups.GRID).index(least)] > 80
        chosen.append(least)
        assert groups.best_threshold([found], groups.FEWEST - 1) == groups.ALIKE
    assert chosen[0] > chosen[1]


def test_more_alike_faces_make_more_groups_and_the_run_knows_how_alike(fresh):
    counts = []
    for i, words in enumerate(("--alike -0.9", "--alike 0.95", "")):
        said = run_line(f"{SORT} images --group --out out{i} {words}", fresh, check=0).stdout
        counts.append(int(said.split("groups ")[1].split(",")[0]))
    assert counts[0] == 1 < counts[2] <= counts[1]
    path = fresh / "runs/a-lora/gallery.safetensors"
    tensors, header = read_safetensors(path)
    assert f"--alike {header['alike']:g}" in said
    save_safetensors(tensors, path, header | {"alike": 0.0})
    assert (
        "--alike 0 joined" in run_line(f"{SORT} images --group --out zero", fresh, check=0).stdout
    )
    refused(run_line(f"{SORT} images --alike 0.2 --out more", fresh))


def test_a_folder_is_grouped_and_what_is_known_has_its_name(fresh):
    run_line(f"{SORT} images --group --out out", fresh, check=0)
    rows = table(fresh)
    assert len(rows) == 72
    for row in rows:
        assert (fresh / "out" / row["copy"]).read_bytes() == (
            fresh / "out" / row["picture"]
        ).read_bytes()
        assert row["copy"].split("/")[0] == row["name"]
    named = [row for row in rows if not row["name"].startswith("group-")]
    right = [row["name"] in row["picture"] for row in named]
    assert named and np.mean(right) > 0.8
    assert "groups already" in refused(run_line(f"{SORT} images --group --out out", fresh))


def test_every_character_has_a_folder_that_every_system_allows():
    names = [
        "re:zero",
        "re?zero",
        "Miku",
        "miku",
        "unknown",
        "CON",
        "a/b",
        "dot.",
        "初音ミク",
        ".hack",
    ]
    names += ["ミ" * 100, "ミ" * 99 + "ク"]
    folders = sort.folders_of(names)
    assert folders["初音ミク"] == "初音ミク" and folders["Miku"] == "Miku"
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    for folder in folders.values():
        assert not set('<>:"/\\|?*') & set(folder) and folder[-1] not in ". "
        assert folder[0] != "." and len(folder.encode()) < 255
        assert folder.casefold() not in ("con", "unknown")
