"""lab.run: what is made once, resumed, compared, refused; with stages that pretend."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LINUX, ROOT, call, flags_of, refused

from lab import report, run

STAGE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
here = pathlib.Path(__file__).parent
def flag(name, words=words):
    places = [i for i, word in enumerate(words) if word == name]
    return words[places[-1] + 1] if places else None
def tell(*what):
    with open(here / "calls.txt", "a") as calls:
        calls.write(" ".join(map(str, what)) + "\\n")
def save(path, *rows):
    path.write_text("".join(json.dumps(row) + "\\n" for row in rows))
out = pathlib.Path(flag("--resume") or flag("--out") or words[0])
state = out / "state.pt"
"""
PRETRAIN = """
resumed = flag("--resume")
config = json.loads(state.read_text()) if resumed else words
out.mkdir(parents=True, exist_ok=True)
save(state, config)
mask, seed = flag("--mask", config), flag("--seed", config)
(here / "pid.txt").write_text(str(os.getpid()))
tell(mask, seed, "resumed" if resumed else "new")
while not resumed and os.environ.get("STOP_AT") == f"{mask} {seed}":
    time.sleep(0.05)
if (here / f"no {mask}").exists():
    sys.exit("error: the loss is not finite at step 3; try a smaller learning rate")
rows = [dict(epoch=0, knn=20.0, linear=20.0, val_mse=1.7, seconds=1.0)]
for epoch in range(1, 3):
    rows.append(dict(epoch=epoch, loss=1.0, seconds=8.0 * epoch))
    rows.append(dict(epoch=epoch, knn=30.0, linear=40.0, val_mse=1.0, seconds=8.0 * epoch + 2))
save(out / "log.jsonl", *rows)
"""
PROBE = """
assert not (out / "probe-headline.json").exists(), "a probe refuses to overwrite"
mask = flag("--mask", json.loads(state.read_text()))
bits = {"random": "aa", "block": "ff"}.get(mask, "f0") * 3
found = {"headline": bin(int(bits, 16)).count("1") / 24, "right": {"logistic": bits}}
save(out / "probe-headline.json", found)
"""
PRETENDED = """
import sys
from pathlib import Path
from common.train import cli
from lab import run
run.ROOT = Path(sys.argv.pop(1))
cli(run.main)
"""
MINE = "mine --arms block --seeds 2"
PLANS = [*run.OURS, *sorted(path.parent for path in ROOT.glob("results/**/PLAN.json"))]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with stages that pretend: they take no time."""
    (tmp_path / "stages").mkdir()
    for name, text in {"pretrain": PRETRAIN, "probe": PROBE}.items():
        (tmp_path / f"stages/{name}.py").write_text(STAGE + text)
    monkeypatch.setattr(run, "ROOT", tmp_path / "stages")
    monkeypatch.setattr(report, "draw_arms", lambda path, study, tests: path.touch())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(home):
    """What the pretended stages told, a line each."""
    path = home / "stages/calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def study(small, line, check=0):
    """lab.run with the words of a line -> the finished call."""
    words = [*shlex.split(line), "--data", small, "--threads", 1]
    return call("lab.run", *words, cwd=Path.cwd(), check=check)


def folder_of(home):
    return home / "runs/lab/mine-packed"


def rows_of(home):
    return report.read_rows(folder_of(home))


def table_of(home):
    return (folder_of(home) / "table.md").read_text()


# ---- rows and tables -----------------------------------------------------------------------------


def test_a_mask_of_ones_own_against_random_is_one_command_and_one_table(home, small):
    study(small, MINE)
    rows = rows_of(home)
    expected = [(arm, seed) for seed, arm in product((2000, 2001), ("random", "block"))]
    assert [(r["arm"], r["seed"]) for r in rows] == expected
    assert rows[1]["metrics"]["top1"] == 100 and rows[1]["right"] == {"top1": "ffffff"}
    assert rows[0]["curve"]["seconds"][-1] == 13 and rows[0]["machine"] and rows[0]["commit"]
    assert [len(r["commands"]) for r in rows] == [2] * 4
    assert "| `block` | 2 | 100.00 ± 0.00 |" in table_of(home)
    assert "`block` against `random` | +50.00; 2 seeds: no interval" in table_of(home)
    assert (folder_of(home) / "figure.png").exists()


def test_a_study_grows_by_what_has_no_row_and_is_made_again_from_its_file(home, small):
    line = "mine --arms block --seeds 1"
    assert "unknown" in study(small, f"{line} --dry").stdout and not (home / "runs").exists()
    study(small, line)
    before = len(calls(home))
    assert "2 runs, 2 done" in study(small, line).stdout
    assert "about" in study(small, "mine --arms block --seeds 4 --dry").stdout
    study(small, "mine --arms green --seeds 4 --jobs 2")
    assert len(calls(home)) == before + 7  # three seeds of random, four of green
    plan = json.loads((folder_of(home) / "PLAN.json").read_text())
    assert list(plan["arms"]) == ["random", "block", "green"] and plan["seeds"][-1] == 2003
    assert "other settings" in refused(study(small, "mine --set recipe= --arms block", check=2))
    old = {(row["arm"], row["seed"]): row["metrics"] for row in rows_of(home)}
    shutil.move(home / "runs", home / "old")
    study(small, "old/lab/mine-packed --arms block green --seeds 1")
    new = {(row["arm"], row["seed"]): row["metrics"] for row in rows_of(home)}
    assert len(new) == 3 and all(old[job] == new[job] for job in new)


def test_an_arm_of_edited_code_is_compared_with_the_same_arm_of_this_code(home, small):
    shutil.copytree(home / "stages", home / "an edit")
    line = "mine --arms 'block --source an edit' --seeds 1"
    assert "the same" in refused(study(small, line, check=2))
    with open(home / "an edit/probe.py", "a") as file:
        file.write("# an edit\n")
    study(small, line)
    rows = rows_of(home)
    assert [row["arm"] for row in rows[:3]] == ["random", "block", "block --source an edit"]
    assert rows[1]["code"] == rows[0]["code"] != rows[2]["code"]
    assert all(c.startswith("python 'an edit'/") for c in rows[2]["commands"])
    assert len((home / "an edit/calls.txt").read_text().splitlines()) == 1
    plan = json.loads((folder_of(home) / "PLAN.json").read_text())
    against = {"block": "random", "block --source an edit": "block"}
    assert plan["arms"] == {"random": "random"} | against
    assert "3 runs, 3 done" in study(small, line).stdout
    new = "of_the_edit --source an edit --huber 1"  # a mask and a flag that this code does not know
    plan, arms = run.with_arms(run.open_plan("mine"), [new])
    assert arms == ["random", new] and plan["arms"][new] == "random"
    assert plan["commands"][new][0].startswith("'an edit'/pretrain.py")
    assert plan["commands"][new][0].endswith("--mask of_the_edit --huber 1")
    (home / "an edit/pretrain.py").write_text("# another edit")
    assert "warning  1 rows" in study(small, f"{line} --dry").stdout  # those of the edited code


@pytest.mark.parametrize(
    "flags", ["--epochs 2", "--data x", "--source nowhere", "--source=nowhere", "--source"]
)
def test_what_an_arm_may_not_have_is_refused_before_the_first_run(home, small, flags):
    assert f"block {flags}" in refused(study(small, f"mine --arms 'block {flags}'", check=2))
    assert not (home / "runs").exists()


def test_an_encoder_that_was_made_anew_is_another_one(home, small):
    (home / "net").mkdir()
    digests = []
    for text in ("a", "b"):
        (home / "net/model.safetensors").write_text(text)
        args = SimpleNamespace(plan={}, set={"encoder": "net", "split": "val"}, data=small)
        run.open_data(args)
        digests.append(args.digest)
    assert digests[0] != digests[1]


def test_a_table_tells_minutes_and_those_of_a_core():
    plan = {"thresholds": {}}
    row = {"arm": "a", "seconds": 120.0, "core_seconds": 90.0}
    assert report.derived(row, plan) == {"minutes": 2.0, "core_minutes": 1.5}
    assert report.derived(row | {"core_seconds": None}, plan) == {"minutes": 2.0}  # on Windows


def test_epochs_to_a_threshold_are_those_of_the_arm_that_it_is_compared_with():
    plan = {"thresholds": {"a": 15.0, "b": 10.0}, "arms": {"a": "a", "c": "b", "d": "x"}}
    curve = {"epoch": [0, 1, 2], "linear": [0.0, 10.0, 20.0], "seconds": [0, 60, 120]}
    found = [report.derived({"arm": arm, "curve": curve}, plan)["epochs"] for arm in "acd"]
    assert found == [1.5, 1.0, 1.5]  # where none is its own, the first


def test_two_arms_with_one_command_share_it_whatever_a_folder_is_called(home, small):
    shutil.copytree(small, "my set")
    text = "pretrain.py --data {data} --seed {seed} --mask random"
    plan = run.open_plan("mine") | {"arms": {"a": "a", "b": "a"}, "plan": "twins"}
    plan["commands"] = dict.fromkeys("ab", [text, plan.pop("template")[1]])
    plan["differences"] = [{"what": "top1", "arm": "b", "against": "a", "text": "exploratory"}]
    Path("PLAN.json").write_text(json.dumps(plan | {"arms": {"a": "a", "b": "b"}}))
    study("my set", ". --jobs 2 --seeds 2 --work 'my runs'")
    rows = report.read_rows(home / "runs/lab/twins-my set")
    assert len(calls(home)) == 2 and len(rows) == 4
    assert "--data 'my set'" in rows[0]["commands"][0]
    with open(home / "runs/lab/twins-my set/table.csv") as file:
        found = {row["arm"]: row for row in csv.DictReader(file)}
    assert found["b"]["top1_effect"] == "" and float(found["b"]["top1"]) > 0


# ---- kills and failures --------------------------------------------------------------------------


@pytest.mark.slow
@LINUX
def test_a_plan_that_is_killed_goes_on_with_the_run_that_was_stopped(home, small):
    (home / "pretended.py").write_text(PRETENDED)
    words = [sys.executable, "pretended.py", "stages", *MINE.split(), "--data", small]
    env = os.environ | {"PYTHONPATH": str(ROOT), "STOP_AT": "block 2000"}
    killed = subprocess.Popen([*map(str, words)], cwd=home, env=env)
    end = time.time() + 60
    while "block 2000 new" not in calls(home):
        assert time.time() < end
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert [row["arm"] for row in rows_of(home)] == ["random"]
    orphan = int((home / "stages/pid.txt").read_text())
    os.kill(orphan, signal.SIGKILL)  # the stage, as where the machine goes down
    study(small, MINE)
    assert calls(home)[2] == "block 2000 resumed" and len(rows_of(home)) == 4
    unknown = [row for row in rows_of(home) if "seconds" not in row]
    assert [(row["arm"], row["seed"]) for row in unknown] == [("block", 2000)]
    assert calls(home).count("random 2000 new") == 1


def test_a_run_that_fails_is_a_row_loses_no_other_one_and_goes_on_next_time(home, small):
    (home / "stages/no block").touch()
    line = refused(study(small, f"{MINE} --jobs 2", check=2))
    assert "2 runs failed" in line and "not finite" in line
    assert "Failed: `block`, seed 2000: " in table_of(home)
    assert "| `block`" not in table_of(home) and "| `random` | 2 |" in table_of(home)
    (home / "stages/no block").unlink()
    study(small, MINE)
    assert calls(home)[4:] == [f"block {seed} resumed" for seed in (2000, 2001)]
    assert "Failed" not in table_of(home) and len(rows_of(home)) == 4


def test_a_row_that_a_kill_cut_short_costs_itself_alone(home, small):
    line = "mine --arms block --seeds 1"
    study(small, line)
    path = folder_of(home) / "rows.jsonl"
    path.write_text(path.read_text()[:-20])
    assert "2 runs, 1 done" in study(small, line).stdout
    assert len(calls(home)) == 2 and len(rows_of(home)) == 2  # its commands were done


# ---- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS, ids=lambda name: Path(name).name)
def test_every_plan_is_whole(name, monkeypatch):
    """What it names is there: arms, columns, flags of stages, words in braces."""
    plan = run.open_plan(name)
    if "template" in plan:
        plan, _ = run.with_arms(plan, plan["arms"])
    assert plan["arms"].keys() == plan["commands"].keys() | plan.get("commit", {}).keys()
    assert plan["columns"].keys() == plan["sources"].keys() and {*plan["compare"]} <= {
        *plan["columns"]
    }
    assert {*plan["arms"].values()} - {"best"} <= plan["arms"].keys()
    monkeypatch.setattr(run, "make_in_order", lambda *of: [Path("made/file")])
    args = SimpleNamespace(plan=plan, set=plan["set"], data="data")
    for text in chain(*plan["commands"].values(), *plan["made"].values()):
        command = run.filled(text, args, [Path("a")], 0)  # every word in braces is known
        words = shlex.split(command)
        stage = words[1] if words[0] == "-m" else words[0]
        assert {word for word in words if word.startswith("--")} <= flags_of(stage), text
        assert not re.search(r"[{}]", command)
    parts = [hypothesis["parts"] for hypothesis in plan.get("hypotheses", [])]
    for test in chain(plan.get("differences", []), *parts):
        assert {test["arm"], test["against"]} <= plan["arms"].keys()
