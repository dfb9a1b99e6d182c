"""experiments.subset: a smaller set is a part of the larger, and nobody who left is in it."""

from types import SimpleNamespace

from conftest import call
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
    found = [path.stem for path in (tmp_path / name).glob("*.safetensors")]
    return {split: data.open_split(tmp_path / name, split) for split in found}


def pictures_of(split):
    """{key: pixels}"""
    return {k: x.tobytes() for k, x in zip(split["header"]["keys"], split["images"], strict=True)}


def test_few_pictures_are_among_the_more_and_test_stays_whole(small, tmp_path):
    flags = {"few": (3, 0), "more": (6, 0), "other": (3, 1)}  # pictures of each, draw
    sets = {
        name: subset(small, tmp_path, name, "--pictures", n, "--draw", draw)
        for name, (n, draw) in flags.items()
    }
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
