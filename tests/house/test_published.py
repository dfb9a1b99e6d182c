"""results/: every interval, p and verdict from its rows; tables, figures in prose and pictures are what rows say."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, call

from common import metrics
from lab import report
from lab.run import open_plan

RESULTS = ROOT / "results"
STUDIES = sorted(path.parent for path in RESULTS.glob("study/*/verdicts.json"))
TABLES = sorted(path.parent for path in RESULTS.rglob("PLAN.json"))
TABLES = [folder for folder in TABLES if folder.parent.name != "unfinished"]  # without a table
README = (ROOT / "README.md").read_text()
NUMBERS = ("effect", "low", "high", "p", "p_against", "holm_against")


def near(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def judged():
    return {study.folder: study for study in report.judged([*map(report.open_folder, TABLES)])}


# ---- verdicts ------------------------------------------------------------------------------------


def test_there_are_thirty_tests_and_ten_verdicts():
    found = []
    for folder in STUDIES:
        found += json.loads((folder / "verdicts.json").read_text())
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


@pytest.mark.parametrize("folder", TABLES, ids=lambda folder: folder.name)
def test_every_published_table_follows_from_its_rows(folder, judged, tmp_path):
    """table.md to the letter, table.csv to 1e-6 of what it says."""
    study = judged[folder]
    study.folder = tmp_path
    report.write(study, figure=(folder / "figure.png").exists())
    study.folder = folder
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    old, new = (list(csv.DictReader((f / "table.csv").open())) for f in (folder, tmp_path))
    assert len(old) == len(new) >= 1 and old[0].keys() == new[0].keys()
    for a, b in zip(old, new, strict=True):
        for name, text in a.items():
            number = re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text)
            same = float(b[name]) == near(float(text)) if number else b[name] == text
            assert same, (a["arm"], name, text, b[name])


def test_the_command_writes_a_published_table_again(tmp_path):
    old = RESULTS / "baselines/faces20-tail"
    folder = shutil.copytree(old, tmp_path / old.name, ignore=shutil.ignore_patterns("table.*"))
    call("lab.report", folder, "--figure", cwd=tmp_path, check=0)
    again = (folder / "table.md").read_text()
    assert again.startswith((old / "table.md").read_text()) and "figure.png" in again
    assert (folder / "figure.png").exists()


def test_the_page_of_the_study_says_what_the_rows_say(judged):
    """STUDY.md has a line for each verdict, and one for each mask of a plan with at most ten."""
    text = (RESULTS / "STUDY.md").read_text()
    for study in [judged[folder] for folder in TABLES if folder.parent.name == "study"]:
        for h in study.hypotheses:
            line = [h["id"].split(" on ")[0], study.plan["data"], h["verdict"]]
            line += [report.p_value(h["holm_p"]), report.p_value(h["holm_claim"])]
            assert f"| {' | '.join(line)} |\n" in text
        section = re.search(rf"^## {study.folder.name}\b(?!-).*?(?=^## |\Z)", text, re.M | re.S)[0]
        column = study.plan.get("shown", "top1")
        tests = {t["arm"]: t for t in report.differences(study)[::-1] if t["what"] == column}
        for arm, seeds in study.rows.items() if len(study.rows) <= 10 else ():
            line = f"| `{arm}` | {report.cell(report.values_of(seeds, column), 1)} | "
            if arm in tests:
                low, high = (f"{tests[arm][side]:+.1f}" for side in ("low", "high"))
                line += f"{tests[arm]['effect']:+.1f} ({low} to {high}) | {tests[arm]['verdict']} |"
            assert line in section


def test_pairs_are_paired_by_seed_though_rows_are_in_another_order(tmp_path):
    right = {("a", 0): "f0", ("a", 1): "ff", ("a", 2): "f8", ("b", 2): "0f", ("b", 0): "f8"}
    rows = []
    for (arm, seed), bits in right.items():
        row = {"arm": arm, "seed": seed, "metrics": {}, "right": {"top1": bits}}
        rows.append(json.dumps(row) + "\n")
    plan = dict.fromkeys(report.NEEDED, "x") | {"arms": {"a": "b", "b": "b"}, "seeds": [0, 1, 2]}
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "PLAN.json").write_text(json.dumps(plan))
    (tmp_path / "images.json").write_text(json.dumps({"groups": [0, 0, 1, 1, 2, 2, 3, 3]}))
    study = report.open_folder(tmp_path)
    found = report.measure({"what": "top1", "arm": "a", "against": "b"}, study)
    assert found["per_seed"] == [-12.5, 12.5] and found["p"] is None and found["n"] == 2


def test_a_planned_arm_without_rows_counts_in_the_correction():
    arms = {"a": "b", "b": "b", "never run": "b"}
    plan = report.DEFAULTS | {"arms": arms, "seeds": [0, 1, 2], "compare": ["top1"]}
    study = SimpleNamespace(plan=plan, groups=None, rows={"a": {}, "b": {}})
    for seed, top1 in enumerate([1.0, 2.0, 4.0]):
        study.rows["a"][seed] = {"metrics": {"top1": top1}}
        study.rows["b"][seed] = {"metrics": {"top1": 0.0}}
    (found,) = report.differences(study)
    assert found["arm"] == "a" and found["holm_p"] == pytest.approx(2 * found["p"])


@pytest.mark.parametrize("arm", ["toon-lora", "toon-full"])
@pytest.mark.parametrize("measure", ["pair_f1", "adjusted_rand", "ccip_f1", "ccip_adjusted_rand"])
def test_the_means_of_groups_follow_from_their_rows(arm, measure):
    with open(RESULTS / "strangers/groups.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["split"]) == (arm, "test")]
    newest = rows[-5:]
    values = [float(row[measure]) for row in newest]
    said = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert len({row["seed"] for row in newest}) == 5
    assert said in (ROOT / "docs/results.md").read_text()


# ---- numbers in prose, pictures ------------------------------------------------------------------


def test_the_minutes_of_the_exercise_follow_from_rows():
    """Rows of plan variants have the recipe of plan mine."""
    text = re.search(r"about (\d+) minutes of\s+one fast core", README)
    rows = report.read_rows(RESULTS / "study/variants-toon")
    some = [row["core_seconds"] for row in rows if row["arm"] in ("random", "attn_high")]
    assert text[1] == f"{6 * np.median(some) / 60:.0f}"
    recipes = [
        open_plan(name)["set"]["recipe"] for name in ("mine", RESULTS / "study/variants-toon")
    ]
    assert recipes[0] == recipes[1]


def test_the_seconds_of_the_first_command_follow_from_rows():
    """A run that was resumed counts its last part alone: fewer seconds than its curve has."""
    rows = report.read_rows(RESULTS / "study/first-toon")
    whole = [row["seconds"] for row in rows if row["seconds"] > row["curve"]["seconds"][-1]]
    said = (
        f"took {np.median(whole):.0f} s (the median `seconds` of {len(whole)} of [{len(rows)} rows]"
    )
    assert said in (ROOT / "docs/machines.md").read_text()


def test_h3_on_the_demo_set_depends_on_its_threshold(judged):
    """results/STUDY.md says what another threshold would have found."""
    study = judged[RESULTS / "study/h3-toon"]
    base = study.rows["random"].values()
    limit = np.mean([metrics.threshold_of(row["curve"]["linear"]) for row in base])
    test = study.hypotheses[0]["parts"][0]
    plan = study.plan | {"thresholds": {test["against"]: float(limit)}}
    other = SimpleNamespace(**vars(study) | {"plan": plan})
    other = report.measure(test, other)
    text = (RESULTS / "STUDY.md").read_text()
    assert f"saves {test['effect']:.0f} % of the epochs" in text
    assert f"random masks, {limit:.1f} %, it saves" in text
    assert f"{other['effect']:.1f} % ({other['low']:.0f} to {other['high']:+.0f})" in text


LINES = [line for page in sorted((ROOT / "docs").glob("*.md")) for line in page.open()]


def stand(*cells):
    """Whether a table of the pages has a row with these cells, side by side and in this order."""
    return any(f"| {' | '.join(cells)} |" in line for line in LINES)


@pytest.mark.parametrize(
    "arm", ["random", "attn_high", "attn_hint", "attn_high:shuffle=1", "green"]
)
def test_top5_and_knn_of_a_mask_follow_from_rows(arm, judged):
    cells = [f"`{arm}`"]
    for folder in ("study/look-toon", "study/look-faces20"):
        seeds = judged[RESULTS / folder].rows[arm]
        top5 = [100 * x for x in report.values_of(seeds, "top5_logistic")]
        values = [report.values_of(seeds, "top1"), top5, report.values_of(seeds, "knn")]
        cells += [report.cell(x, 1) for x in values]
    assert stand(*cells)


@pytest.mark.parametrize("data", ["toon", "faces20"])
def test_frequency_against_accuracy_follows_from_rows(data, judged):
    seeds = judged[RESULTS / f"study/look-{data}"].rows["random"]
    r = report.cell(report.values_of(seeds, "frequency_correlation_logistic")).removeprefix("-")
    assert f" {r}" in "".join(LINES).replace("+", "")


def test_knn_of_the_first_command_follows_from_rows(judged):
    study = judged[RESULTS / "study/first-toon"]
    for seeds in study.rows.values():
        knn, error = (report.values_of(seeds, name) for name in ("knn_after", "mse_after"))
        assert stand(report.cell(knn, 1), f"{np.mean(error):.2f}")


def test_each_kind_of_pixels_follows_from_rows(judged):
    study = judged[RESULTS / "hybrid"]
    for arm in ("frames", "proxies", "truth"):
        both, drawn = (report.values_of(study.rows[arm], name) for name in ("miou", "iou_drawn"))
        photographed = 2 * np.array(both) - drawn  # the mean is of these two
        assert stand(report.cell(drawn, 1), report.cell([*photographed], 1))


def test_what_stands_in_place_of_proxies_follows_from_rows(judged):
    study = judged[RESULTS / "hybrid"]
    for arm in ("flip10", "flip20", "balanced", "saliency", "cls", "bold"):
        test = report.measure({"what": "miou", "arm": arm, "against": "proxies"}, study)
        effect = f"{test['effect']:+.1f} ({test['low']:+.1f} to {test['high']:+.1f})"
        assert stand(report.cell(report.values_of(study.rows[arm], "miou"), 1), effect)


def test_what_is_filled_in_follows_from_rows():
    found = json.loads((RESULTS / "filled_toon.json").read_text())["by_ratio"]
    assert len(found) == 4
    for ratio, kinds in found.items():
        some = [kinds[k] for k in ("all", "flat", "detailed")]
        some += [row["neighbours"] for row in some]
        cells = [f"{row['psnr']:.1f}, {row['ssim']:.2f}" for row in some]
        assert stand(f"{float(ratio):.0%}".replace("%", " %"), *cells)


def tracked(pattern):
    words = ["git", "ls-files", "-z", "--", *pattern]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[:-1]


def test_pictures_are_few_and_each_is_shown():
    pictures = tracked(["results/**.png"])
    pages = tracked(["README.md", "docs/*.md", "results/*.md"])
    text = "".join((ROOT / p).read_text() for p in pages)
    assert len(pictures) <= 16
    assert len({(ROOT / p).read_bytes() for p in pictures}) == len(pictures)
    assert not [p for p in pictures if p.removeprefix("results/") not in text]


def test_every_file_of_results_is_named():
    """In a page, a card, a README or a list of trials; of a plan that has run, its folder is."""
    pages = tracked(["*.md", ":!results/**/table.md"])
    text = "".join((ROOT / p).read_text() for p in pages)
    plans = {p.parent.relative_to(ROOT).as_posix() for p in RESULTS.rglob("PLAN.json")}
    plain = {"PLAN.json", "rows.jsonl", "table.md", "table.csv", "images.json", "verdicts.json"}
    for path in map(Path, tracked(["results/**", ":!results/unfinished"])):
        of_plan = path.parent.as_posix() in plans and path.name in plain
        named = path.parent.name if of_plan else path.name
        assert named in text, path


def test_rows_stay():
    files = tracked(["results/**/rows.jsonl"])
    assert len(files) == 42
    rows = sum(len((ROOT / p).read_text().splitlines()) for p in files)
    assert rows >= 1414
