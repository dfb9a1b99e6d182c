"""What is done with a folder of somebody's own: captions beside pictures, sorting, and files for other programs."""

import csv
import os
import shutil
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import json_of, refused, run_line
from made import CPU, files_of
from PIL import Image
from sklearn.metrics import f1_score

from apps import export, recognize, tags
from common.train import seeded
from ingest import pictures

FOLDER = "images/class0"
SORT = f"apps.recognize runs/a-lora {CPU}"


# ---- captions ------------------------------------------------------------------------------------


def captions(fresh, *words, check=None):
    line = f"apps.tags runs/a-tags {FOLDER} {CPU} --captions {' '.join(words)}"
    return run_line(line, fresh, check=check)


def test_captions_are_written_once_and_what_is_there_stays(fresh):
    first = fresh / FOLDER / "illust0_0.txt"
    first.write_text("a sentence.\nSolo, Blue_Hair,\n")
    before = files_of(fresh / FOLDER)
    assert "--append" in refused(captions(fresh))
    assert files_of(fresh / FOLDER) == before
    captions(fresh, "--append --threshold 0 --prepend my_style", check=0)
    pictures = sorted((fresh / FOLDER).glob("*.png"))
    texts = [path.with_suffix(".txt").read_text() for path in pictures]
    assert texts[0].startswith("a sentence.\nSolo, Blue_Hair, my_style, ")
    assert all(text.startswith("my_style, ") for text in texts[1:])
    after = files_of(fresh / FOLDER)
    assert "wrote 0 captions" in captions(fresh, "--append --threshold 0", check=0).stdout
    assert files_of(fresh / FOLDER) == after


def test_a_caption_says_what_json_says(fresh):
    captions(fresh, "--threshold 0 --without blue,Class0", check=0)
    for row in json_of(f"apps.tags runs/a-tags {FOLDER} {CPU} --threshold 0 --json", fresh):
        names = [row["name"]] if row["name"] else []
        wanted = [word for word in [*names, *row["tags"]] if word not in ("blue", "class0")]
        text = (fresh / FOLDER / row["picture"]).with_suffix(".txt").read_text()
        assert text.split(", ") == [word.replace("_", " ") for word in wanted]


def test_pictures_given_one_by_one_get_captions_but_for_broken_ones(fresh):
    files = sorted((fresh / FOLDER).glob("*.png"))[:3]
    files[1].write_bytes(b"broken")
    line = f"apps.tags runs/a-tags {' '.join(map(str, files))} {CPU} --captions"
    done = run_line(line, fresh, check=0)
    assert "skipped" in done.stderr and "beside 2 pictures" in done.stdout
    assert [file.with_suffix(".txt").exists() for file in files] == [True, False, True]


def test_brackets_of_a_tag_are_escaped_where_that_is_asked_for(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"picture": str(tmp_path / "a.png"), "name": None, "tags": {"saber_(fate)": 0.9}}
    monkeypatch.setattr(tags, "each_answer", lambda *_, **__: [row])
    asked = {"without": "", "prepend": "a (x), \\(y\\)", "append": False, "pictures": [tmp_path]}
    flags = SimpleNamespace(**asked, escape=True, refuse_unread=lambda: None)
    tags.write_captions(flags, None, {"words": ["saber_(fate)"]})
    assert (tmp_path / "a.txt").read_text() == r"a \(x\), \(y\), saber \(fate\)"


def test_underscores_become_spaces_but_for_kaomoji():
    for tag in (">_<", "o_o", "(o)_(o)"):
        assert tags.readable(tag) == tag
    for tag in ("long_hair", "saber_(fate)", "青い_目", "d_va"):
        assert tags.readable(tag) == tag.replace("_", " ")


def test_two_spellings_of_a_tag_are_one(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("Long_Hair, saber \\(fate\\)")
    assert not tags.add_caption(file, ["long hair", "saber (fate)"])
    assert tags.add_caption(file, ["smile", "smile"])
    assert file.read_text() == "Long_Hair, saber \\(fate\\), smile"


# ---- sorting -------------------------------------------------------------------------------------


def table(fresh):
    with open(fresh / "out/sorted.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_pictures_are_copied_to_who_is_in_them_and_a_stopped_sort_goes_on(fresh):
    before = files_of(fresh / "images")
    line = f"{SORT} images --sort out"
    run_line(line, fresh, check=0)
    rows = table(fresh)
    names = {r["picture"]: r["name"] or "" for r in json_of(f"{SORT} images --json", fresh)}
    assert {r["picture"].removeprefix("images/"): r["name"] for r in rows} == names
    for row in rows:
        copy = fresh / "out" / row["copy"]
        assert copy.parts[len(fresh.parts) + 1] == (row["name"] or "unknown")
        assert copy.read_bytes() == (fresh / row["picture"]).read_bytes()
    assert files_of(fresh / "images") == before
    lines = (fresh / "out/sorted.csv").read_text().splitlines(keepends=True)
    (fresh / "out/sorted.csv").write_text("".join(lines[:41]))
    gone = fresh / "out" / rows[0]["copy"]
    gone.unlink()
    assert "40 of them done" in run_line(line, fresh, check=0).stdout
    assert table(fresh) == rows and not gone.exists()


def test_a_kill_at_the_first_copy_leaves_a_folder_that_is_known_as_sorted(fresh, monkeypatch):
    def killed(*_):
        shutil.copytree("out", "killed")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recognize, "copies_of", killed)
        run_line(f"{SORT} images --sort out", fresh)
    assert "0 of them done" in run_line(f"{SORT} images --sort killed", fresh, check=0).stdout


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
    run_line(f"{SORT} a --sort out", fresh, check=0)
    assert "4 of them done" in run_line(f"{SORT} a --sort out", fresh, check=0).stdout
    assert "rename one of them" in refused(run_line(f"{SORT} b --sort out", fresh))
    assert "4 pictures" in run_line(f"{SORT} a {fresh}/a --sort twice", fresh, check=0).stdout


def test_a_threshold_moves_no_confidence(fresh):
    rows = []
    for words in ("", "--threshold 1", "--threshold -1"):
        answers = json_of(f"{SORT} {FOLDER} --json {words}", fresh)
        rows.append([row["confidence"] for row in answers])
    assert rows[0] == pytest.approx(rows[1], abs=1e-3) == rows[2]


def test_faces_that_look_alike_are_one_group():
    sizes = torch.tensor([5, 7, 1])
    centres = torch.eye(3, 16).repeat_interleave(sizes, 0)
    unit = F.normalize(centres + 0.1 * torch.randn(13, 16, generator=seeded(0)))
    assert recognize.alike(unit) == [1] * 5 + [0] * 7 + [2]
    assert recognize.alike(unit[:1]) == [0]
    row = recognize.grouping(unit, torch.arange(3).repeat_interleave(sizes))
    assert set(row.values()) == {100}
    truth = torch.tensor([0] * 5 + [1] * 3 + [2] * 5)
    merged = recognize.grouping(unit, truth)
    pairs_f1 = 200 * 19 / (31 + 23)  # 19 pairs are in both, of 10 + 21 and of 10 + 3 + 10
    assert merged["pair_f1"] == pytest.approx(pairs_f1, abs=1e-3)
    one, two = torch.triu_indices(13, 13, 1)
    cosines = (recognize.centred(unit)[one] * recognize.centred(unit)[two]).sum(1)
    best = max(f1_score(truth[one] == truth[two], cosines >= least) for least in cosines)
    assert merged["ccip_f1"] == pytest.approx(100 * best, abs=1e-3)
    names = recognize.names_of([0, 0, 0, 1, 1], ["a", "a", None, "b", None])
    assert names == {0: "a", 1: "group-002"}


def test_a_folder_is_grouped_and_what_is_known_has_its_name(fresh):
    run_line(f"{SORT} images --group out", fresh, check=0)
    rows = table(fresh)
    assert len(rows) == 72
    for row in rows:
        assert (fresh / "out" / row["copy"]).read_bytes() == (fresh / row["picture"]).read_bytes()
        assert row["copy"].split("/")[0] == row["name"]
    named = [row for row in rows if not row["name"].startswith("group-")]
    right = [row["name"] in row["picture"] for row in named]
    assert named and np.mean(right) > 0.8
    assert "groups already" in refused(run_line(f"{SORT} images --group out", fresh))


def test_every_character_has_a_folder_that_every_system_allows():
    names = ["re:zero", "re?zero", "Miku", "miku", "unknown", "CON", "a/b", "dot.", "初音ミク"]
    folders = recognize.folders_of(names)
    assert folders["初音ミク"] == "初音ミク" and folders["Miku"] == "Miku"
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    for folder in folders.values():
        assert not set('<>:"/\\|?*') & set(folder) and folder[-1] not in ". "
        assert folder.casefold() not in ("con", "unknown")


def asked_as_by_others(folder, path):
    """Probabilities by name, computed as programs do that know WD taggers alone."""
    model = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    entry = model.get_inputs()[0]
    side = entry.shape[1]
    picture = Image.open(path).convert("RGB")
    square = Image.new("RGB", [max(picture.size)] * 2, (255, 255, 255))
    square.paste(picture, [(square.width - length) // 2 for length in picture.size])
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    [found] = model.run([model.get_outputs()[0].name], {entry.name: pixels[None, :, :, ::-1]})
    with open(folder / "selected_tags.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert entry.type == "tensor(float)" and found.shape == (1, len(rows))
    kinds = [row["category"] for row in rows]
    assert kinds == sorted(kinds, key="904".find)
    return {(row["name"], row["category"]): p for row, p in zip(rows, found[0], strict=True)}


@pytest.mark.slow
def test_a_tagger_and_a_recogniser_answer_by_the_contract_of_wd_taggers(fresh, monkeypatch):
    """Sides of 96 and 32 px: Pillow resizes to a fourth or less in other steps."""
    monkeypatch.setattr(export, "WD_SIDE", 96)
    picture = Image.open(fresh / FOLDER / "illust0_0.png").convert("RGB")
    picture.resize((96, 96), Image.Resampling.BICUBIC).save(fresh / "x.png")
    for run in ("a-tags", "a-lora"):
        run_line(f"apps.export runs/{run} --to wd", fresh, check=0)
    found = asked_as_by_others(fresh / "runs/a-tags/wd", fresh / "x.png")
    (row,) = json_of(f"apps.tags runs/a-tags x.png {CPU} --threshold 0 --json", fresh)
    for tag, p in row["tags"].items():
        assert found[tag, "0"] == pytest.approx(p, abs=1e-4)
    assert found[row["name"], "4"] == pytest.approx(row["confidence"], abs=1e-4)
    assert len(found) == len(row["tags"]) + 3
    found = asked_as_by_others(fresh / "runs/a-lora/wd", fresh / "x.png")
    (row,) = json_of(f"{SORT} x.png --json", fresh)
    wanted = row["confidence"] if row["known"] else 0.0
    assert max(found.values()) == pytest.approx(wanted, abs=1e-4)
    assert "names nothing" in refused(run_line("apps.export runs/a --to wd --out wd", fresh))
