"""results/: every interval, p and verdict from its rows; tables, figures in prose and pictures are what rows say."""

import csv
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT

from experiments import report, stats

RESULTS = ROOT / "results"
STUDIES = sorted(path.parent for path in RESULTS.glob("study/*/PLAN.json"))
TABLES = sorted(path.parent for path in RESULTS.rglob("PLAN.json"))
NUMBERS = ("effect", "low", "high", "p", "p_against", "holm_against")


def near(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def judged():
    return {study.folder: study for study in report.judged([*map(report.open_folder, TABLES)])}


# ---- verdicts ------------------------------------------------------------------------------------


def test_there_are_thirty_tests_and_ten_verdicts():
    found = [h for folder in STUDIES for h in json.loads((folder / "verdicts.json").read_text())]
    assert len(found) == 10 and sum(len(h["parts"]) for h in found) == 30
    words = [h["verdict"] for h in found]
    assert words.count("refuted") == 2 and words.count("undecided") == 8


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_published_test_follows_from_the_rows(folder, judged):
    published = json.loads((folder / "verdicts.json").read_text())
    for old, new in zip(published, judged[folder].hypotheses, strict=True):
        assert (old["id"], old["verdict"]) == (new["id"], new["verdict"])
        assert [new[k] for k in ("p", "holm_p")] == near([old[k] for k in ("p", "holm_p")])
        for a, b in zip(old["parts"], new["parts"], strict=True):
            names = ("what", "arm", "against", "claim", "n", "planned", "over")
            assert {k: a[k] for k in names} == {k: b[k] for k in names}
            for name in NUMBERS:
                assert b[name] == near(a[name]), (a["arm"], name)
            assert b["per_seed"] == near(a.get("per_seed", []))
            for name in ("mean", "low", "high") if a["bootstrap"] else ():
                assert b["bootstrap"][name] == near(a["bootstrap"][name])


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_threshold_is_that_of_the_pilots(folder):
    plan = json.loads((folder / "PLAN.json").read_text())
    assert report.thresholds(report.read_rows(folder)) == plan["thresholds"]


@pytest.mark.parametrize("folder", TABLES, ids=lambda folder: folder.name)
def test_every_published_table_follows_from_its_rows(folder, judged, tmp_path):
    """table.md to the letter, table.csv to 1e-6 of what it says."""
    study = judged[folder]
    study.folder = tmp_path
    report.write(study)
    study.folder = folder
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    old, new = (list(csv.DictReader((f / "table.csv").open())) for f in (folder, tmp_path))
    assert len(old) == len(new) >= 2 and old[0].keys() == new[0].keys()
    for a, b in zip(old, new, strict=True):
        for name, text in a.items():
            number = re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text)
            same = float(b[name]) == near(float(text)) if number else b[name] == text
            assert same, (a["arm"], name, text, b[name])


def test_no_table_says_an_interval_of_under_three_seeds():
    for path in RESULTS.rglob("table.md"):
        for line in path.read_text().splitlines():
            runs = re.match(r"\| `[^|]*\| (\d+) \|", line)
            if runs and int(runs[1]) < 3:
                assert "; n = " not in line, (path, line)
            assert not re.search(r"; n = [12][,)]", line), (path, line)


# ---- what the statistics must not get wrong: each case fails if one thing is changed -------------

D = np.array([0.4, 1.9, 1.1, 2.2, 0.7])


def test_a_paired_test_is_scipys_whatever_its_sign():
    for values in (D, -D):
        theirs = scipy.stats.ttest_1samp(values, 0)
        low, high = theirs.confidence_interval()
        ours = stats.paired(values, claim=1.0)
        assert [ours[k] for k in ("low", "high", "p")] == pytest.approx([low, high, theirs.pvalue])
        one_sided = scipy.stats.ttest_1samp(values, 1.0, alternative="less").pvalue
        assert ours["p_against"] == pytest.approx(one_sided)


def test_equivalence_is_two_one_sided_tests():
    for values in (D - 1.2, D, -D):
        below = scipy.stats.ttest_1samp(values, 2.0, alternative="less").pvalue
        above = scipy.stats.ttest_1samp(values, -2.0, alternative="greater").pvalue
        assert stats.paired(values, margin=2.0)["p_equal"] == pytest.approx(max(below, above))
    assert stats.paired(D)["p_equal"] is None


def test_words_of_a_difference():
    assert stats.word(1.0, 0.04, 0.5) == "better" and stats.word(-1.0, 0.04, 0.5) == "worse"
    assert stats.word(0.1, 0.5, 0.04) == "equivalent" and stats.word(0.1, 0.5, 0.5) == "undecided"
    assert stats.word(0.1, 0.04, 0.04) == "better"  # a small difference, and sure
    assert stats.word(1.0, 0.05, 0.05) == "undecided" and stats.word(1.0, None, None) == "undecided"


def test_holm_goes_from_the_smallest_p_up_and_never_back_down():
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.02, 0.021, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert stats.holm([0.03, None]) == [0.06, None]


def test_variances_need_ten_seeds_and_go_one_way():
    rng = np.random.default_rng(0)
    calm, wild = rng.normal(0, 1, 10), rng.normal(0, 9, 10)
    row = stats.variance(calm, wild)
    ratio = calm.var(ddof=1) / wild.var(ddof=1)
    assert row["effect"] == pytest.approx(100 * (1 - ratio)) and row["low"] > 0
    assert row["p"] == pytest.approx(2 * scipy.stats.f.cdf(ratio, 9, 9)) and row["p_against"] == 0.5
    back = stats.variance(wild, calm)
    assert back["p"] == 1.0 and back["p_against"] < 1e-5 and back["high"] < 0
    assert stats.variance(calm[:9], wild[:9])["p"] == 1.0
    assert stats.variance(calm[:2], wild)["effect"] is None


def curve(*linear):
    return {"epoch": list(range(len(linear))), "linear": list(linear)}


def test_epochs_saved_are_percent_of_the_baselines_and_a_bound_decides_nothing():
    base = [curve(0, 10, 20, 30, 40), curve(0, 10, 20, 30, 40), curve(0, 11, 20, 30, 40)]
    arm = [curve(0, 20, 40, 40, 40), curve(0, 22, 40, 40, 40), curve(0, 20, 40, 40, 40)]
    pairs = list(zip(arm, base, strict=True))
    row = stats.epochs_saved(pairs, 20.0)
    assert row["per_seed"] == pytest.approx([50, 100 * (1 - 20 / 22 / 2), 50]) and row["p"] < 0.01
    logs = stats.epochs_saved(pairs, 20.0, logs=True)
    geometric = np.exp(np.mean(np.log(1 - np.array(row["per_seed"]) / 100)))
    assert logs["effect"] == pytest.approx(100 * (1 - geometric))
    never = [(curve(0, 5, 5, 5, 5), base[0]), *pairs[1:]]
    row = stats.epochs_saved(never, 20.0, claim=10.0)
    assert row["per_seed"][0] == -100 and row["p"] == 1.0 and row["p_against"] < 1.0
    never = [(arm[0], curve(0, 5, 5, 5, 5)), *pairs[1:]]
    row = stats.epochs_saved(never, 20.0, claim=99.0)
    assert row["per_seed"][0] == 75 and row["p"] < 1.0 and row["p_against"] == 1.0
    same = stats.epochs_saved([(base[0], base[0]), *pairs[1:]], 20.0)
    assert same["p"] == same["p_against"] == 1.0
    assert stats.epochs_saved(pairs, 0.0)["p"] is None  # the untrained encoder has it


def part(**changes):
    """A test that supports its claim; changes break it."""
    row = {"n": 5, "planned": 5, "effect": 2.0, "low": 1.0, "high": 3.0, "claim": 1.0, "p": 0.01}
    row |= {"p_against": 0.9, "p_equal": 0.9, "bootstrap": {"low": 0.5}}
    return row | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "supported"),
        ({"low": 0.0}, "undecided"),
        ({"effect": 0.99}, "undecided"),
        ({"effect": 1.0}, "supported"),  # the estimate reaches the claim
        ({"n": 4}, "undecided"),
        ({"p": None}, "undecided"),
        ({"p": 0.025}, "undecided"),  # times two
        ({"p": 0.0249}, "supported"),
        ({"bootstrap": {"low": 0.0}}, "undecided"),
        ({"bootstrap": None}, "supported"),
        ({"p_against": 0.012}, "refuted"),  # times four
        ({"p_against": 0.0126}, "supported"),
        ({"p_against": 0.001, "n": 4}, "undecided"),
        ({"effect": 0.1, "p_equal": 0.04}, "equivalent"),
        ({"effect": 0.1, "p_equal": 0.05}, "undecided"),
        ({"effect": 0.1, "p_equal": None}, "undecided"),
    ],
)
def test_the_verdict_of_one_part(changes, verdict):
    family = {"A": 1, "B": 3}  # B was planned, and has no rows
    (found,) = stats.judge([{"id": "A", "parts": [part(**changes)]}], family)
    assert found["verdict"] == verdict


def test_a_hypothesis_is_as_strong_as_its_weakest_part():
    parts = [part(p=0.001), part(p=0.03)]
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["p"] == found["holm_p"] == 0.03 and found["verdict"] == "supported"
    parts = [part(p=0.001), part(p=0.001, effect=-2.0, low=-3.0)]
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["p"] == 1.0 and found["verdict"] == "undecided"
    parts = [part(p_against=0.0249), part(p_against=0.2)]
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["verdict"] == "refuted"


def test_pairs_are_paired_by_seed_and_illustration(tmp_path):
    """Seeds in another order, a seed that one arm lacks, and images of one illustration."""
    bits = {("a", 0): "f0", ("a", 1): "ff", ("a", 2): "f8", ("b", 2): "0f", ("b", 0): "f8"}
    rows = [
        {"arm": a, "seed": s, "metrics": {}, "right": {"top1": x}} for (a, s), x in bits.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"plan": "x", "arms": {"a": "b", "b": "b"}, "seeds": [0, 1, 2]}
    (tmp_path / "PLAN.json").write_text(json.dumps(plan))
    (tmp_path / "images.json").write_text(json.dumps({"groups": [0, 0, 1, 1, 2, 2, 3, 3]}))
    found = report.measure(
        {"what": "top1", "arm": "a", "against": "b"}, report.open_folder(tmp_path)
    )
    assert found["per_seed"] == [-12.5, 12.5] and found["p"] is None and found["n"] == 2


# ---- numbers in prose, pictures ------------------------------------------------------------------


def test_the_table_of_adaptation_follows_from_its_rows():
    with open(RESULTS / "faces20/finetune.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["phase"] in ("first", "seeds")]
    text = (RESULTS / "faces20/finetune.md").read_text()
    for method, epochs in {(r["result"], r["epochs"]) for r in rows}:
        runs = [r for r in rows if (r["result"], r["epochs"]) == (method, epochs)]
        cells = []
        for name in ("top1", "top5", "macro_f1"):
            cells.append(report.cell([float(r[name]) for r in runs]))
        assert f"| {method}, {epochs} epochs | {len(runs)} | {' | '.join(cells)} |" in text


def tracked(pattern):
    words = ["git", "ls-files", "-z", "--", *pattern]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[:-1]


def test_pictures_are_few_and_each_is_shown():
    pictures = tracked(["results/**.png"])
    text = "".join(
        (ROOT / p).read_text() for p in tracked(["README.md", "docs/*.md", "results/*.md"])
    )
    assert len(pictures) <= 10
    assert len({(ROOT / p).read_bytes() for p in pictures}) == len(pictures)
    assert not [p for p in pictures if p.removeprefix("results/") not in text]


def test_json_stands_on_one_line():
    long = [p for p in tracked(["results/**.json"]) if (ROOT / p).read_text().count("\n") > 1]
    assert not long


@pytest.mark.parametrize(
    "name",
    ["tags", "detection", "hybrid", *(f"baselines/{p.name}" for p in RESULTS.glob("baselines/*"))],
)
def test_no_row_of_a_table_is_lost(name, judged):
    path = next(p for p in (RESULTS / name).glob("*.csv") if p.stem in ("rows", "arms"))
    with open(path, newline="") as file:
        count = len(list(csv.DictReader(file)))
    assert count == sum(len(seeds) for seeds in judged[RESULTS / name].rows.values()) > 0


def test_rows_stay():
    """As many rows of runs as were ever published."""
    lines = {
        Path(p).parent.name: len((ROOT / p).read_text().splitlines())
        for p in tracked(["results/study/*/rows.jsonl"])
    }
    assert lines == {
        "ablations-toon": 39,
        "arms-toon": 46,
        "arms-toon-exploratory": 16,
        "finetune-toon": 16,
        "first-toon": 26,
        "first-toon-two-recipes": 11,
        "h1-faces20": 21,
        "h1-toon": 21,
        "h2-faces20": 42,
        "h3-faces20": 16,
        "h3-toon": 16,
        "look-faces20": 59,
        "look-toon": 67,
        "tune-faces20": 21,
    }
