"""experiments.subset: a smaller set is a part of the larger, and nobody who left is in it."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, refused
from PIL import Image

import data
from common.io import UserError, lock_beside, locked
from common.lora import save_encoder
from common.suspects import out_of_fold
from experiments import report
from model import ViT


def subset(small, tmp_path, name, *flags):
    """-> {split: a split of the new set}; as in a plan, experiments.run holds the lock beside it."""
    words = ["experiments.subset", small, "--out", tmp_path / name, *flags]
    with locked(lock_beside(tmp_path / name)):
        call(*words, cwd=tmp_path, check=0)
    found = [path.stem for path in (tmp_path / name).glob("*.safetensors")]
    return {split: data.open_split(tmp_path / name, split) for split in found}


def pictures_of(split):
    """{key: pixels}"""
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


def test_characters_who_leave_are_in_no_split(small, tmp_path):
    found = subset(small, tmp_path, "two", "--characters", 2)
    names = found["train"]["header"]["classes"]
    assert len(names) == 2
    for name, split in found.items():
        assert pictures_of(split).items() < pictures_of(data.open_split(small, name)).items()
        for key, label in zip(split["header"]["keys"], split["labels"], strict=True):
            assert key.split("/")[-2] == names[label]


def test_wrong_labels_are_listed_and_probe_py_doubts_them(small, tmp_path):
    """The encoder never learned anything, but the classes have a colour each."""
    old, new = data.open_split(small, "train"), subset(small, tmp_path, "wrong", "--wrong", 0.1)
    changed = (old["labels"] != new["train"]["labels"]).nonzero()[:, 0].tolist()
    assert changed == new["train"]["header"]["planted"]
    assert len(changed) == round(len(old["labels"]) / 10)
    save_encoder(ViT(32, 8, 32, 2, 2), tmp_path / "run/model.safetensors", {})
    (tmp_path / "wrong/val.safetensors").unlink()  # only train is read
    words = ["run", "--data", "wrong", "--suspects", "--out", "s", "--device", "cpu"]
    said = call("probe.py", *words, cwd=tmp_path, check=0).stdout
    with open(tmp_path / "s/suspects.csv") as file:
        rows = list(csv.DictReader(file))
    worst = {row["picture"] for row in rows[: len(changed)]}
    found = [i for i in changed if new["train"]["header"]["keys"][i] in worst]
    assert len(found) >= 0.7 * len(changed) and f"planted  {len(found)} of the first" in said
    assert all(row["label"] != row["better"] for row in rows)
    assert Image.open(tmp_path / "s/suspects.png").size[0] > 1000
    assert "suspects.csv is there already" in refused(call("probe.py", *words, cwd=tmp_path))
    with pytest.raises(UserError, match="two classes of 5 illustrations"):
        out_of_fold(torch.randn(8, 4), torch.tensor([0, 1] * 4), torch.zeros(8), 2)


def test_a_folder_of_each_character_has_its_pictures(small, tmp_path):
    call("experiments.subset", small, "--folders", "--out", "pictures", cwd=tmp_path, check=0)
    split = data.open_split(small, "train")
    for label, name in enumerate(split["header"]["classes"]):
        there = [np.asarray(Image.open(p)) for p in (tmp_path / "pictures" / name).iterdir()]
        own = split["images"][(split["labels"] == label).numpy()]
        assert {x.tobytes() for x in there} == {x.tobytes() for x in own}


def test_arms_named_by_a_number_become_lines_and_others_dots(tmp_path):
    rows = {seed: {"metrics": {"top1": 80.0 + seed}} for seed in range(2)}
    arms = ["vit, 6 min", "vit, 12 min", "resnet10, 6 min", "vit, 5 labels"]
    plan = {"plan": "p", "data": "d", "columns": {"top1": "Top-1, %"}, "axes": {}}
    study = SimpleNamespace(plan=plan, rows=dict.fromkeys(arms, rows))
    lines = report.lines_of(study)
    both = [80.0, 81.0]
    assert lines["min"] == {"vit": {6.0: both, 12.0: both}, "resnet10": {6.0: both}}
    assert lines["labels"] == {"vit": {5.0: both}}
    report.draw_lines(tmp_path / "lines.png", study, lines)
    assert Image.open(tmp_path / "lines.png").size == (1560, 630)
    study.rows["random"] = rows
    assert report.lines_of(study) == {}
