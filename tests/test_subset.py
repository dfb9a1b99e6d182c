"""experiments.subset: a smaller set is a part of the larger, and nobody who left is in it."""

from types import SimpleNamespace

import numpy as np
from conftest import call, refused
from PIL import Image

import data
from common.io import lock_beside, locked
from experiments import report
from experiments.plans import PLANS


def subset(small, tmp_path, name, *flags):
    """-> {split: a split of the new set}; as in a plan, experiments.run holds the lock beside it."""
    words = ["experiments.subset", small, "--out", tmp_path / name, *flags]
    with locked(lock_beside(tmp_path / name)):
        call(*words, cwd=tmp_path, check=0)
    found = sorted(path.stem for path in (tmp_path / name).glob("*.safetensors"))
    return {split: data.open_split(tmp_path / name, split) for split in found}


def keys(split):
    return set(split["header"]["keys"])


def test_few_pictures_are_among_the_more_and_test_stays_whole(small, tmp_path):
    few = subset(small, tmp_path, "few", "--pictures", 3)
    more = subset(small, tmp_path, "more", "--pictures", 6)
    other = subset(small, tmp_path, "other", "--pictures", 3, "--draw", 1)
    assert few["train"]["labels"].bincount().tolist() == [3, 3, 3]
    assert more["train"]["labels"].bincount().tolist() == [6, 6, 6]
    assert keys(few["train"]) < keys(more["train"])
    assert keys(few["train"]) != keys(other["train"])
    assert keys(few["test"]) == keys(data.open_split(small, "test"))


def test_characters_who_leave_are_in_no_split(small, tmp_path):
    whole = data.open_split(small, "train")
    old = dict(zip(whole["header"]["keys"], np.array(whole["images"]), strict=True))
    found = subset(small, tmp_path, "two", "--characters", 2)
    names = found["train"]["header"]["classes"]
    assert len(names) == 2
    for split in found.values():
        for key, label in zip(split["header"]["keys"], split["labels"], strict=True):
            assert key.split("/")[-2] == names[label]
    train = found["train"]
    for key, image in zip(train["header"]["keys"], train["images"], strict=True):
        assert (image == old[key]).all()


def test_refusals(small, tmp_path):
    command = ["experiments.subset", small, "--out", tmp_path / "new"]
    assert "has 3" in refused(call(*command, "--characters", 9, cwd=tmp_path))
    call(*command, cwd=tmp_path, check=0)
    assert "--out" in refused(call(*command, cwd=tmp_path))


def test_rates_of_the_plan_are_chosen_for_every_arm():
    """An arm without a trial of its own takes that of another one, and both have the same words."""
    plan = PLANS["minutes"]
    for arm in plan["arms"]:
        name = plan["tuned_as"][arm]
        assert len(plan["trials"][name]) == 4
        assert arm.partition(", ")[0] == name.partition(", ")[0]


def test_arms_named_by_a_number_become_lines_and_others_dots(tmp_path):
    rows = {seed: {"metrics": {"top1": 80.0 + seed}} for seed in range(2)}
    arms = ["vit, 6 min", "vit, 12 min", "resnet10, 6 min", "vit, 5 labels"]
    plan = {"plan": "p", "data": "d", "columns": {"top1": "Top-1, %"}}
    study = SimpleNamespace(plan=plan, rows=dict.fromkeys(arms, rows))
    lines = report.lines_of(study)
    both = [80.0, 81.0]
    assert lines["min"] == {"vit": {6.0: both, 12.0: both}, "resnet10": {6.0: both}}
    assert lines["labels"] == {"vit": {5.0: both}}
    report.draw_lines(tmp_path / "lines.png", study, lines)
    assert Image.open(tmp_path / "lines.png").size == (1560, 630)
    study.rows["random"] = rows
    assert report.lines_of(study) == {}
