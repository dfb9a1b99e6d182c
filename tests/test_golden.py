"""Today's code against tests/golden.json: the same losses, weights, maps and metrics, on any kind of CPU."""

import json
import re

import golden
import pytest

COUNTED = re.compile(
    r"top[15]|macro_f1|\.(map|eer|roc_auc|auroc|knn|linear|threshold|temperature)"
)  # of 48 pictures


def differences(found, expected):
    """Names whose value is another: by more than 1e-4 of it, or where pictures are counted by more
    than two of 48.
    """
    assert found.keys() == expected.keys()
    for name, value in found.items():
        most = (
            2 / 48 * (1 if value <= 1 else 100)
            if COUNTED.search(name)
            else 1e-4 * max(1e-2, abs(value))
        )
        if abs(value - expected[name]) > most:
            yield f"{name}: {value}, was {expected[name]}"


def test_a_changed_number_is_seen():
    assert not list(
        differences({"a/mean": 0.5, "x.top1": 0.50}, {"a/mean": 0.50004, "x.top1": 0.52})
    )
    assert (
        len(list(differences({"a/mean": 0.5, "x.top1": 0.50}, {"a/mean": 0.5002, "x.top1": 0.58})))
        == 2
    )


@pytest.mark.slow
def test_every_stage_gives_what_it_gave(tmp_path):
    expected = json.loads(golden.GOLDEN.read_text())
    found = {
        case: golden.summary(values)
        for case, values in golden.run_all(golden.ROOT, tmp_path).items()
    }
    assert found.keys() == expected.keys()
    wrong = {case: list(differences(found[case], expected[case])) for case in found}
    assert not any(wrong.values()), {case: lines for case, lines in wrong.items() if lines}
