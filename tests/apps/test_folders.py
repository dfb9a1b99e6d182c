"""What is done with a folder of somebody's own: captions beside pictures."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, json_of, refused, run_line
from made import CPU, files_of
from PIL import Image

from apps import captions
from common.train import UserError, read_safetensors, save_safetensors
from ingest import sources

FOLDER = "images/class0"


def captioned(fresh, *words, check=None):
    line = f"apps.tags runs/a-tags {FOLDER} {CPU} --captions {' '.join(words)}"
    return run_line(line, fresh, check=check)


def test_captions_are_written_once_and_what_is_there_stays(fresh):
    first = fresh / FOLDER / "illust0_0.txt"
    first.write_text("a sentence.\nSolo, Blue_Hair,\n")
    before = files_of(fresh / FOLDER)
    assert "--append" in refused(captioned(fresh))
    assert files_of(fresh / FOLDER) == before
    captioned(fresh, "--append --threshold 0 --prepend my_style", check=0)
    pictures = sorted((fresh / FOLDER).glob("*.png"))
    texts = [path.with_suffix(".txt").read_text() for path in pictures]
    # who it is comes before what is there
    assert re.match("my_style, class., a sentence.\nSolo, Blue_Hair, ", texts[0])
    assert all(text.startswith("my_style, ") for text in texts[1:])
    after = files_of(fresh / FOLDER)
    assert "wrote 0 captions" in captioned(fresh, "--append --threshold 0", check=0).stdout
    assert files_of(fresh / FOLDER) == after


SAID = "a photo of ohwx_girl in a park"
ADDED = (  # what is there, tags, what is to stand before them, the caption afterwards
    ("my, 1girl, solo\n", ["Rem", "hat"], ["my", "Rem"], "my, Rem, 1girl, solo, hat"),
    ("1girl blue_hair\n", ["blue hair", "hat"], ["my style"], "my_style 1girl blue_hair hat"),
    (SAID, ["my style", "hat", "Solo"], ["my_style", "solo"], f"my_style, solo, {SAID}, hat"),
    ("，my，1girl、solo，\n", ["hat"], ["my", "Rem"], "my, Rem, 1girl、solo, hat"),
    ("Long_Hair, x \\(y\\)", ["long hair", "x (y)"], [], None),  # two spellings are one
    ("Long_Hair", ["hat", "hat"], [], "Long_Hair, hat"),
)


@pytest.mark.parametrize(("there", "words", "first", "caption"), ADDED)
def test_tags_join_a_caption_in_its_own_style_and_once(tmp_path, there, words, first, caption):
    file = tmp_path / "x.txt"
    file.write_text(there)
    assert captions.add_caption(file, words, first) == (caption is not None)
    assert file.read_text() == (caption or there)


def test_boxes_of_yolo_are_not_taken_for_captions(fresh):
    picture = next((fresh / FOLDER).glob("*.png"))
    boxes = picture.with_suffix(".txt")
    boxes.write_text("0 .5 .5 .2 .2\n")
    assert "boxes of YOLO" in refused(captioned(fresh, "--append"))
    assert boxes.read_text() == "0 .5 .5 .2 .2\n"


def test_a_caption_in_another_code_page_is_named_before_the_work(fresh):
    picture = sorted((fresh / FOLDER).glob("*.png"))[-1]
    picture.with_suffix(".txt").write_bytes("初音".encode("cp932"))
    assert "save it as UTF-8" in refused(captioned(fresh, "--append"))
    assert len(list((fresh / FOLDER).glob("*.txt"))) == 1


def test_a_caption_says_what_json_says(fresh):
    captioned(fresh, "--threshold 0 --without blue,Class0", check=0)
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


def test_brackets_of_a_tag_are_escaped_where_that_is_asked_for(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"picture": str(tmp_path / "a.png"), "name": None, "tags": {"saber_(fate)": 0.9}}
    asked = {"without": "", "prepend": "a (x), \\(y\\)", "append": False, "pictures": [tmp_path]}
    flags = SimpleNamespace(**asked, escape=True, names=None, encoder="runs/a-tags")
    captions.write_captions(flags, lambda files, problems: [row])
    assert (tmp_path / "a.txt").read_text() == r"a \(x\), \(y\), saber \(fate\)"
    (record,), _, _ = sources.find(tmp_path)  # and data.py reads what was written
    assert record.tags == ("a_(x)", "(y)", "saber_(fate)")


def test_the_character_is_the_recognisers_and_it_may_write_captions_alone(fresh):
    asked = f"apps.recognize runs/a-lora {CPU} {FOLDER} --json"
    middle = np.median([row["similarity"] for row in json_of(asked, fresh)]).item()
    path = fresh / "runs/a-lora/gallery.safetensors"
    tensors, header = read_safetensors(path)
    # Half of the pictures are known, whatever the network has learned.
    save_safetensors(tensors, path, header | {"threshold": middle})
    rows = json_of(asked, fresh)
    names = {row["picture"]: row["name"] for row in rows}
    assert None in names.values() and "class0" in names.values()
    captioned(fresh, "--names runs/a-lora --threshold 0 --prepend style", check=0)
    answers = json_of(f"apps.tags runs/a-tags {FOLDER} {CPU} --threshold 0 --json", fresh)
    texts = {
        row["picture"]: (fresh / FOLDER / row["picture"]).with_suffix(".txt") for row in answers
    }
    for row in answers:
        wanted = ["style", *filter(None, [names[row["picture"]]]), *row["tags"]]
        text = texts[row["picture"]].read_text()
        assert text.split(", ") == [word.replace("_", " ") for word in wanted]
        texts[row["picture"]].unlink()
    line = f"apps.tags runs/a-lora {FOLDER} {CPU} --captions"
    said = run_line(line, fresh, check=0).stdout
    assert f"{sum(map(bool, names.values()))} of them" in said
    for picture, name in names.items():
        assert texts[picture].exists() == bool(name)
        assert not name or texts[picture].read_text() == name
    assert "--captions" in refused(run_line(f"apps.tags runs/a-lora {FOLDER} {CPU}", fresh))


def test_guesses_of_the_demo_set_are_no_captions(fresh):
    before = files_of(fresh / FOLDER)
    for network in ("toon-tags", "toon-lora"):
        line = f"apps.tags {ROOT}/weights/{network} {FOLDER} {CPU} --captions"
        assert "demo set alone" in refused(run_line(line, fresh))
    assert files_of(fresh / FOLDER) == before


@pytest.mark.parametrize("name", ["a.caption", "a.png.txt", "a.TXT"])
def test_a_caption_of_another_suffix_is_there_already(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / name).write_text("solo")
    with pytest.raises(UserError, match="--append"):
        captions.caption_files([tmp_path], append=False)
    assert captions.caption_files([tmp_path], True) == {str(tmp_path / "a.png"): tmp_path / name}


def test_underscores_become_spaces_but_for_kaomoji():
    for tag in (">_<", "o_o", "(o)_(o)"):
        assert captions.readable(tag) == tag
    for tag in ("long_hair", "saber_(fate)", "青い_目", "d_va"):
        assert captions.readable(tag) == tag.replace("_", " ")
