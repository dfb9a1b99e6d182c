"""exercises/: right answers pass in any words, wrong ones are told what is wrong, and so is who has not begun.

The files of exercises/ are a student's, so no test here wants them unwritten. Evening 2 needs Triton's interpreter,
which has to be on before Triton is imported: its answers are judged by this file in a process of its own.
"""

import importlib
import os
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, call, python, refused

from exercises import check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NUMBERS = [2] if INTERPRETED else [1, 3, 4, 5, 6]
ANSWERS = {number: importlib.import_module(f"answers{number}") for number in NUMBERS}
WRONG = [(number, *wrong) for number in NUMBERS for wrong in ANSWERS[number].WRONG]
once = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
JUDGES = {number: list(judges) for number, (_, judges, _) in check.EVENINGS.items()}
JUDGES[2] += check.KERNELS


def answer(number, **changed):
    return SimpleNamespace(**vars(ANSWERS[number]) | changed)


def later(*_):
    raise NotImplementedError


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_answer_passes_also_in_other_words(number, capsys):
    assert check.check(number, answer(number)) == []
    assert check.check(number, answer(number, **ANSWERS[number].OTHER)) == []
    said = capsys.readouterr().out
    assert said.count("right    ") >= 2 * len(JUDGES[number]) and "not written" not in said


@pytest.mark.parametrize("number, name, function, fragment", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong_and_what_to_read(number, name, function, fragment):
    with pytest.raises(check.Differs) as problem:
        check.check(number, answer(number, **{name: function}))
    assert fragment in str(problem.value) and "Read again: " in str(problem.value)


@once
def test_evening_2_in_the_interpreter():
    pytest.importorskip("triton", reason="there is no Triton here")
    words = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    text = python(*words, TRITON_INTERPRET="1")
    assert int(re.search(r"(\d+) passed", text)[1]) >= 11, text


# ---- what is not written, and what is no answer --------------------------------------------------


@once
def test_what_is_not_written_comes_last_and_the_rest_is_judged(capsys):
    assert check.check(6, answer(6, holm=later, interval=later)) == ["interval", "holm"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "sign_flips" and said[1].startswith("right")
    assert said[-1] == "not written yet: interval, holm (1 of 3 written)"


@once
@pytest.mark.parametrize("wrong", [None, "text", [1, 2]], ids=str)
def test_what_are_no_numbers_is_named_with_what_is_expected(wrong):
    with pytest.raises(
        check.Differs, match=r"Expected float \(2, 5, 48\), found (None|text|\[1, 2\])\."
    ):
        check.check(4, answer(4, target=lambda x, floor: wrong))


@once
def test_who_calls_what_is_not_written_waits(capsys):
    assert check.check(1, answer(1, guided=later, own=lambda *_: later())) == ["guided"]
    assert "own\nwaits" in capsys.readouterr().out


@once
def test_an_exception_of_the_answer_stays_its_own():
    with pytest.raises(ZeroDivisionError):
        check.check(4, answer(4, target=lambda x, floor: 1 / 0))


@once
def test_without_triton_the_kernels_are_left_out_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(check.patches, "TRITON", False)
    assert check.check(2, SimpleNamespace()) == ["one_patch", "all_patches"]
    assert capsys.readouterr().out.count("Triton is not installed") == 1


# ---- the command, and the page -------------------------------------------------------------------


@once
@pytest.mark.parametrize("words", [["7"], ["masks"], []], ids=str)
def test_an_evening_that_is_none_is_one_line(words, tmp_path):
    assert "evening" in refused(call("exercises.check", *words, cwd=tmp_path))


SEEN = {
    1: "masks.png",
    3: "positions.png",
    4: "loss.png",
    5: "A begins at 0, too",
    6: "attn_high: ",
}
SELDOM = [pytest.param(number, marks=pytest.mark.slow) for number in (1, 3, 4, 5)]


@once
@pytest.mark.parametrize("number", [6, *SELDOM])
def test_the_command_judges_and_shows(number, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.setattr(check, "answer_of", answer)
    said = call("exercises.check", number, cwd=tmp_path, check=0).stdout
    assert SEEN[number] in said
    assert not SEEN[number].endswith("png") or (tmp_path / "runs/exercises" / SEEN[number]).exists()


@once
def test_a_mistake_and_what_is_not_written_end_with_1(tmp_path, monkeypatch):
    for changed in ({"target": ANSWERS[4].one_mean}, {"target": later}):
        monkeypatch.setattr(
            check, "answer_of", lambda number, changed=changed: answer(4, **changed)
        )
        assert "target" in call("exercises.check", 4, cwd=tmp_path, check=1).stdout


@once
@pytest.mark.parametrize("number", check.EVENINGS)
def test_a_file_has_what_is_judged_and_places_to_read_are_there(number):
    (file,) = ROOT.glob(f"exercises/evening{number}_*.py")
    text = file.read_text()
    for judge in JUDGES[number]:
        name = judge.__name__.removeprefix("judge_")
        assert re.search(rf"^(def|class) {name}\(", text, re.M), name
        for place in judge.__doc__.split("; "):
            source = re.match(r"\w+/\w+\.\w+", place)
            where = (ROOT / source[0]).read_text() if source else text
            words = re.findall(r'`.*?`|".*?"', place)
            assert all(word.strip('`"') in where for word in words), place
            assert not source or words, f"{place}: where in it?"


@pytest.mark.slow
@once
def test_the_file_of_evening_2_can_be_read_without_triton():
    code = "import sys; sys.modules['triton'] = None; from exercises import evening2_patches as e"
    python("-c", f"{code}; assert e.tl is None and e.jit(len) is len")
