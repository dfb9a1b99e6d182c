"""Today's code against tests/golden.json: the same losses, weights, maps and scores, on any CPU."""

import functools
import json
import re

import golden
import pytest
from conftest import run_line

EXPECTED = json.loads(golden.GOLDEN.read_text())
FAST = ("random", "attn_high", "lora_arcface", "tags")
SCORES = "map|eer|roc_auc|auroc|knn|linear|threshold|temperature"
COUNTED = re.compile(rf"top[15]|macro_f1|\.({SCORES})")  # of 48 pictures
# Convolutions round otherwise on each kind of CPU, and steps of apps.segment enlarge that.
SHARE = {"segment": 0.2}


def differences(found, expected, share=1e-4):
    """Names of other values: by more than this share of it, or by more than 2 of 48 pictures."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        most = (1e-4 if name == "log.jsonl/0.loss" else share) * max(1e-2, abs(value))
        if COUNTED.search(name):
            most = 2 / 48 * (1 if value <= 1 else 100)
        if abs(value - expected[name]) > most:
            yield f"{name}: {value}, was {expected[name]}"


def test_a_changed_number_is_seen():
    old = {"a/mean": 0.5, "x.top1": 0.50}
    assert not list(differences(old, {"a/mean": 0.50004, "x.top1": 0.52}))
    assert len(list(differences(old, {"a/mean": 0.5002, "x.top1": 0.58}))) == 2


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(case) -> the folder in which the case, and the cases that it stands on, have run."""
    work = tmp_path_factory.mktemp("golden")
    golden.write_data(work)

    @functools.cache
    def make(case):
        for line in golden.CASES[case]:
            for other in golden.CASES.keys() & set(re.findall(r"runs/(\w+)", line)) - {case}:
                make(other)
            run_line(line, cwd=work, check=0)
        return work

    return make


OFTEN = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in EXPECTED]


@pytest.mark.parametrize("case", OFTEN)
def test_a_stage_gives_what_it_gave(make, case, no_pictures):
    found = golden.summary(golden.outcome(make(case), case))
    changed = list(differences(found, EXPECTED[case], SHARE.get(case, 1e-4)))
    assert not changed, (
        "was this meant? python tests/golden.py --write makes new values, in minutes"
    )


def test_every_case_is_compared():
    assert EXPECTED.keys() == golden.CASES.keys()
