"""lab.run: what is made once, resumed, chosen on dev, refused; with stages that pretend."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LINUX, ROOT, call, flags_of, refused

from common.train import UserError, read_log
from lab import plans, report, run

STAGE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
here = pathlib.Path(__file__).parent
def flag(name, otherwise=None, words=words):
    places = [i for i, word in enumerate(words) if word == name]
    return words[places[-1] + 1] if places else otherwise
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
mask, seed = flag("--mask", words=config), int(flag("--seed", words=config))
(here / "pid.txt").write_text(str(os.getpid()))
tell(mask, seed, flag("--epochs", words=config), "resumed" if resumed else "new")
while not resumed and os.environ.get("STOP_AT") == f"{mask} {seed}":
    time.sleep(0.05)
if os.environ.get("EDIT"):
    (here / "edited.py").write_text("x")
if mask.startswith("grid"):
    sys.exit("error: no room is left on the disk")
if mask.startswith("squares"):
    sys.exit("error: the loss is not finite at step 3; try a smaller learning rate")
rows = [dict(epoch=0, knn=20.0, linear=20.0, val_mse=1.7, seconds=1.0)]
quick = 1.0 if mask == "random" else 1.5
for epoch in range(1, 11):
    rows.append(dict(epoch=epoch, loss=1 / epoch, images_per_s=100.0, memory_mb=1, seconds=8.0 * epoch))
    linear = min(60, 20 + 4.1 * epoch * quick) + seed % 3
    scores = dict(knn=linear, linear=linear, val_mse=1 / epoch, seconds=8.0 * epoch + 2)
    rows.append(dict(epoch=epoch) | scores)
save(out / "log.jsonl", *rows)
"""
PROBE = """
assert not (out / "probe-headline.json").exists(), "a probe refuses to overwrite"
mask = flag("--mask", words=json.loads(state.read_text()))
bits = {"random": "aa", "block": "ff"}.get(mask, "f0") * 3
found = {"headline": bin(int(bits, 16)).count("1") / 24, "right": {"logistic": bits}}
save(out / "probe-headline.json", found)
"""
TUNE = """
base = pathlib.Path(words[0]) / "state.pt"
blr = float(flag("--blr", 2, words=json.loads(base.read_text()))) if base.exists() else 2
out.mkdir(parents=True)
rate = float(flag("--lr", flag("--head-lr", 2)))
tell("tune", rate, flag("--seed"), flag("--split"), flag("--epochs"), blr)
if rate == 9:
    sys.exit("error: the loss is not finite at step 1; try a smaller learning rate")
dev = 50 - abs(rate - 2) - abs(blr - 2)
rows = [dict(dev_top1=x, dev_macro_f1=x, images_per_s=60.0) for x in (dev, 10.0)]
save(out / "log.jsonl", *rows)
of_val = 90 + float(os.environ.get("OF_VAL", 1)) * (rate + blr) + int(flag("--seed")) % 7
save(out / "metrics.json", {"top1": of_val, "right": "aaaaaa"})
"""
VERIFY = "save(out / 'recognize.json', {})"
PRETENDED = """
import sys
from pathlib import Path
from common.train import cli
from lab import run
run.ROOT = Path(sys.argv.pop(1))
cli(run.main)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with stages that pretend: they take no time."""
    stages = {"pretrain": PRETRAIN, "probe": PROBE, "finetune_lora": TUNE, "apps/unknown": VERIFY}
    (tmp_path / "stages/apps").mkdir(parents=True)
    for name, text in stages.items():
        (tmp_path / f"stages/{name}.py").write_text(STAGE + text)
    (tmp_path / "weights/toon").mkdir(parents=True)
    monkeypatch.setattr(run, "ROOT", tmp_path / "stages")
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


def folder_of(home, name="mine"):
    return home / "runs/lab" / f"{name}-packed"


def rows_of(home, name="mine"):
    return report.read_rows(folder_of(home, name))


def table_of(home, name="mine"):
    return (folder_of(home, name) / "table.md").read_text()


# ---- rows and tables -----------------------------------------------------------------------------


MINE = "mine --arms block --seeds 3"


def test_a_run_whose_code_changed_meanwhile_gives_no_row(small, home, monkeypatch):
    monkeypatch.setenv("EDIT", "1")
    assert "the code changed" in refused(study(small, MINE, check=None))
    assert not (folder_of(home) / "rows.jsonl").exists()
    study(small, MINE)
    assert len(rows_of(home)) == 6


def test_a_mask_of_ones_own_against_random_is_one_command_and_one_table(home, small):
    study(small, MINE)
    rows = rows_of(home)
    expected = [(arm, seed) for seed, arm in product((2000, 2001, 2002), ("random", "block"))]
    assert [(r["arm"], r["seed"]) for r in rows] == expected
    assert rows[1]["metrics"]["top1"] == 100 and rows[1]["right"] == {"top1": "ffffff"}
    assert rows[0]["curve"]["seconds"][-1] == 61 and rows[0]["machine"] and rows[0]["commit"]
    assert [len(r["commands"]) for r in rows] == [2] * 6
    assert "| `block` | 3 | 100.00 ± 0.00 |" in table_of(home)
    assert "`block` against `random` | +50.00; 3 seeds: no interval" in table_of(home)
    assert (folder_of(home) / "figure.png").exists()
    plan, _ = run.with_masks(plans.PLANS["h2"], ["block"])
    assert run.against(plan, "block") == "random"  # where arms have several baselines, too
    _, arms = run.with_masks(plans.PLANS["content"], [plans.TRUE_MAPS])
    assert arms == [plans.PLACE, plans.TRUE_MAPS]  # random masks are no baseline of these


def test_a_plan_grows_by_what_has_no_row_and_by_the_same_settings(home, small, monkeypatch):
    study(small, MINE)
    before = len(calls(home))
    path = folder_of(home) / "rows.jsonl"
    path.write_text(path.read_text().replace('"code": "', '"code": "older'))
    assert "6 runs, 6 done" in (said := study(small, MINE).stdout)
    assert "6 rows were made by other code" in said
    study(small, "mine --arms green --seeds 4")
    assert len(calls(home)) == before + 5  # a seed of random, four of green
    other = study(small, "mine --set 'recipe=--epochs 2' --arms block", check=2)
    assert "by other settings" in refused(other)
    plan = plans.PLANS["mine"]
    column = ("Top-1, %", 1, "probe-headline.json", "rows/extremes/knn/top1", 100)
    monkeypatch.setitem(run.PLANS, "mine", plan | {"columns": plan["columns"] | {"top1": column}})
    assert "by other settings" in refused(study(small, MINE, check=2))
    plan = json.loads((folder_of(home) / "PLAN.json").read_text())
    assert list(plan["arms"]) == ["random", "block", "green"] and plan["seeds"][-1] == 2003
    study(small, "look --arms random --seeds 1")
    (folder,) = home.glob("runs/lab/look-*")
    plan = json.loads((folder / "PLAN.json").read_text())
    assert plan["seeds"] == [*plans.PLANS["look"]["seeds"]]
    assert plan["arms"].keys() >= plans.PLANS["look"]["arms"].keys()


def test_an_arm_of_edited_code_is_compared_with_the_same_arm_of_this_code(home, small):
    shutil.copytree(home / "stages", home / "an edit")
    line = "mine --arms 'block --source an edit' --seeds 2"
    assert "the same" in refused(study(small, line, check=2))
    with open(home / "an edit/probe.py", "a") as file:
        file.write("# an edit\n")
    study(small, line)
    rows = rows_of(home)
    assert [row["arm"] for row in rows[:3]] == ["random", "block", "block --source an edit"]
    assert rows[1]["code"] == rows[0]["code"] != rows[2]["code"]
    assert all(c.startswith("python 'an edit/") for c in rows[2]["commands"])
    assert len((home / "an edit/calls.txt").read_text().splitlines()) == 2
    plan = json.loads((folder_of(home) / "PLAN.json").read_text())
    against = {"block": "random", "block --source an edit": "block"}
    assert plan["arms"] == {"random": "random"} | against
    assert "6 runs, 6 done" in study(small, line).stdout
    new = "middle --source an edit --huber 1"  # a mask and a flag that the edited code alone has
    plan, arms = run.with_masks(plans.PLANS["mine"], [new])
    assert arms == ["random", new] and plan["against"][new] == "random"
    assert plan["arms"][new][0].startswith("'an edit'/pretrain.py")
    assert plan["arms"][new][0].endswith("--mask middle --huber 1")
    (home / "an edit/pretrain.py").write_text("# another edit")
    assert "warning  2 rows" in study(small, line).stdout  # those of the edited code alone
    h3 = study(small, "h3 --arms 'parts --source an edit'", check=2)
    assert "another checkout" in refused(h3)  # lab.stress is a module


@pytest.mark.parametrize(
    "flags", ["--epochs 2", "--data x", "--source nowhere", "--source=nowhere", "--source"]
)
def test_what_an_arm_may_not_have_is_refused_before_the_first_run(home, small, flags):
    line = refused(study(small, f"mine --arms 'block {flags}'", check=2))
    assert f"block {flags}" in line
    assert not (home / "runs").exists()


def test_a_split_that_no_command_reads_can_not_be_set(home, small):
    assert "--set split has no effect" in refused(study(small, "ways --set split=test", check=2))


def test_a_network_that_was_made_anew_is_another_one(home, small):
    (home / "net").mkdir()
    digests = []
    for text in ("a", "b"):
        (home / "net/model.safetensors").write_text(text)
        flags = {"name": "tags", "set": plans.PLANS["adapt"]["set"] | {"encoder": "net"}}
        args = SimpleNamespace(**flags, plan=plans.PLANS["adapt"], data=small, threads=1)
        run.check(args, [])
        digests.append(args.digest)
    assert digests[0] != digests[1]


def test_a_dry_call_tells_the_time_by_rows_of_the_same_settings(home, small):
    dry = "mine --arms block --dry --jobs 2 --seeds"
    assert "unknown" in study(small, f"{dry} 3").stdout
    study(small, MINE)
    path = folder_of(home) / "rows.jsonl"
    rows = [row | {"seconds": 60.0 * row["seed"]} for row in rows_of(home)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = study(small, f"{dry} 5").stdout.splitlines()[-1]
    assert "4 runs of 2001.0 minutes" in said and "about 4002 minutes" in said
    assert "unknown" in study(small, f"{dry} 5 --set recipe=").stdout


def test_a_table_tells_minutes_and_those_of_a_core():
    study = SimpleNamespace(thresholds={})
    row = {"arm": "a", "seconds": 120.0, "core_seconds": 90.0}
    assert report.derived(row, study) == {"minutes": 2.0, "core_minutes": 1.5}
    assert report.derived(row | {"core_seconds": 0.0}, study) == {"minutes": 2.0}  # on Windows


def test_folders_may_have_spaces_in_their_names(home, small):
    shutil.copytree(small, "my set")
    study("my set", "mine --seeds 1 --work 'my runs'")
    (row,) = report.read_rows(home / "runs/lab/mine-my set")
    assert "--data 'my set'" in row["commands"][0] and len(calls(home)) == 1


def test_a_csv_has_the_differences_to_the_planned_baseline_alone(home, small, monkeypatch):
    further = plans.differences(("block.top1", "random.top1", "exploratory"))
    plan = plans.PLANS["mine"] | {"differences": further, "against": {"block": "block"}}
    monkeypatch.setitem(run.PLANS, "mine", plan)
    study(small, "mine --arms random block green --seeds 3")
    table = (folder_of(home) / "table.csv").read_text().splitlines()
    rows = {row["arm"]: row for row in csv.DictReader(table)}
    assert rows["block"]["top1_effect"] == "" and float(rows["block"]["top1"]) > 0


def test_two_arms_with_one_command_share_it(home, small, monkeypatch):
    text = "pretrain.py --data {data} --seed {seed} --mask random"
    plan = plans.PLANS["mine"] | {"arms": {"a": [text, plans.PROBE], "b": [text, plans.PROBE]}}
    del plan["template"]
    monkeypatch.setitem(run.PLANS, "mine", plan)
    study(small, "mine --seeds 2 --jobs 2")
    assert len(calls(home)) == 2 and len(rows_of(home)) == 4


def test_a_half_written_line_costs_its_row_alone(tmp_path):
    run.add_row(tmp_path / "rows.jsonl", {"arm": "a", "seed": 0})
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"arm": "b", "se')
    run.add_row(tmp_path / "rows.jsonl", {"arm": "c", "seed": 0})
    assert [row["arm"] for row in report.read_rows(tmp_path)] == ["a", "c"]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


# ---- choices -------------------------------------------------------------------------------------


def test_pilots_give_the_threshold_and_are_never_reported(home, small):
    study(small, "h1 --arms random green --seeds 3")
    pilot = [row for row in rows_of(home, "h1") if row["phase"] == "pilot"]
    assert [(row["arm"], row["seed"]) for row in pilot] == [("random", 1000)]
    opened = report.open_folder(folder_of(home, "h1"))
    end = pilot[0]["curve"]["linear"]
    assert opened.thresholds == {"random": round(end[0] + 0.9 * (end[-1] - end[0]), 2)}
    assert {max(seeds) for seeds in opened.rows.values()} == {2}
    assert "**H1: undecided**" in table_of(home, "h1")  # an arm of its claim is missing


def adapt(small, monkeypatch, words, **trials):
    """Plan adapt with the learning rates that these arms try."""
    trials = {arm: plans.rates("--lr", *values) for arm, values in trials.items()}
    monkeypatch.setitem(run.PLANS, "adapt", plans.PLANS["adapt"] | {"trials": trials})
    study(small, f"adapt --arms {' '.join(trials)} {words}")


def test_trials_are_judged_on_dev_by_a_seed_that_is_not_reported(home, small, monkeypatch):
    """Where only the plan's folder is left, its choices stand: no trial is made again."""
    trials = {"lora": (1, 2, 3), "full": (9, 5, 7)}  # 9 diverges, which is the worst
    adapt(small, monkeypatch, "--seeds 2 --jobs 4", **trials)
    rows = read_log(folder_of(home, "adapt") / "trials.jsonl")
    assert sorted(row["flags"] for row in rows) == [f"--lr {x}" for x in (1, 2, 3, 5, 7, 9)]
    assert len([line for line in calls(home) if " 500 None" in line]) == 6
    shutil.rmtree(home / "runs/work")
    before = len(calls(home))
    adapt(small, monkeypatch, "--seeds 3", **trials)
    assert not [line for line in calls(home)[before:] if " 500 None" in line]
    found = {(row["arm"], row["seed"], row["flags"]) for row in rows_of(home, "adapt")}
    best = [("lora", "--lr 2"), ("full", "--lr 5")]
    seeds = plans.PLANS["adapt"]["seeds"]
    assert found == {(arm, seed, flags) for (arm, flags), seed in product(best, seeds)}


def baselines(small, monkeypatch):
    """Plan baselines with two rates for the encoder and two for an arm."""
    trials = {"mae": plans.rates("--blr", 1, 2), "mae-full": plans.rates("--lr", 1, 2)}
    monkeypatch.setitem(run.PLANS, "baselines", plans.PLANS["baselines"] | {"trials": trials})
    study(small, "baselines --arms mae-full --set minutes=1 encoder_minutes=2 --seeds 1")


def test_every_arm_gets_equal_minutes_and_the_best_rates(home, small, monkeypatch):
    """One epoch is timed: 60 s of a core at the images a second that the log tells, by the images."""
    baselines(small, monkeypatch)
    images = len(run.data.open_split(small, "train")["images"])
    made = [line.split() for line in calls(home)]
    assert [x for x in made if x[:2] == ["random", "0"]][-1][2] == str(round(12000 / images))
    final = [x for x in made if x[:3] == ["tune", "2.0", "0"]][-1]
    assert final[-2:] == [str(round(3600 / images)), "2.0"]  # the encoder with the best rate
    third = [x for x in made if x[:3] == ["tune", "1.0", "500"]][-1]
    assert third[-2] == str(round(1200 / images))
    assert rows_of(home, "baselines")[0]["flags"] == "--lr 2"


def test_no_choice_depends_on_what_is_reported(home, small, monkeypatch):
    """Where val says the opposite, everything but the reported numbers is the same."""
    found = []
    for sign in ("1", "-1"):
        monkeypatch.setenv("OF_VAL", sign)
        (home / sign).mkdir()
        monkeypatch.chdir(home / sign)
        baselines(small, monkeypatch)
        found.append(rows_of(home / sign, "baselines")[0])
    clean, poisoned = found
    assert clean.pop("metrics") != poisoned.pop("metrics")
    times = {"seconds": 0, "core_seconds": 0}
    assert clean | times == poisoned | times


# ---- kills, faults and divergence ----------------------------------------------------------------


@pytest.mark.slow
@LINUX
def test_a_plan_that_is_killed_goes_on_with_the_run_that_was_stopped(home, small):
    (home / "pretended.py").write_text(PRETENDED)
    words = [sys.executable, "pretended.py", "stages", *MINE.split(), "--data", small]
    env = os.environ | {"PYTHONPATH": str(ROOT), "STOP_AT": "block 2000"}
    killed = subprocess.Popen([*map(str, words)], cwd=home, env=env)
    end = time.time() + 60
    while "block 2000 None new" not in calls(home):
        assert time.time() < end
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert [row["arm"] for row in rows_of(home)] == ["random"]
    orphan = int((home / "stages/pid.txt").read_text())
    os.kill(orphan, signal.SIGKILL)  # the stage, as where the machine goes down
    study(small, MINE)
    assert calls(home)[2] == "block 2000 None resumed" and len(rows_of(home)) == 6
    unknown = [row for row in rows_of(home) if "seconds" not in row]
    assert [(row["arm"], row["seed"]) for row in unknown] == [("block", 2000)]
    assert calls(home).count("random 2000 None new") == 1


def test_folds_that_a_killed_run_has_finished_stay(tmp_path, monkeypatch):
    """apps/learn.py goes on with the next one; a run without folds begins in an empty folder."""
    args = SimpleNamespace(work=tmp_path, digest="d", code={run.ROOT: "c"}, threads=1, retry=False)
    monkeypatch.setattr(run, "execute", lambda *_: None)
    monkeypatch.setattr(run, "digest_of_code", lambda _: "c")
    for command, kept in (
        ("-m apps.learn a", "folds/1/answers.safetensors"),
        ("probe.py b", "left.txt"),
    ):
        path = run.folder_of(shlex.split(command), args)[0] / kept
        path.parent.mkdir(parents=True)
        path.touch()
        run.make(command, args)
        assert path.exists() == kept.startswith("folds")


def test_after_a_stop_a_thread_that_waited_begins_nothing(tmp_path, monkeypatch):
    """It waited for a lock that another run held, and gets it when that one is stopped, too."""
    monkeypatch.setattr(run, "STOPPED", threading.Event())
    run.STOPPED.set()
    more = SimpleNamespace(threads=1), tmp_path / "log", None
    with pytest.raises(UserError, match="ended with -15"):
        run.execute(["-m", "timeit", "-n1", "-r1", "__import__('time').sleep(9)"], *more)


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_that_fails_loses_no_other_row_and_is_made_again(home, small, monkeypatch, broken):
    """The stage says why, or the fault is in our code."""
    found, words = run.row_of, "mine --arms grid block --seeds 2 --jobs 2"

    def row_of(arm, seed, args):
        return {}["top1"] if broken and arm == "grid" else found(arm, seed, args)

    monkeypatch.setattr(run, "row_of", row_of)
    line = refused(study(small, words, check=2))
    assert "2 runs failed" in line and ("KeyError" if broken else "no room is left") in line
    made = {(r["arm"], r["seed"]) for r in rows_of(home)}
    assert made == set(product(("random", "block"), (2000, 2001)))
    assert "`block`" in table_of(home)
    before = len(calls(home))
    assert "2 runs failed" in refused(study(small, words, check=2))
    assert len(calls(home)) == before + 2 * (not broken)


def test_a_run_that_diverges_is_a_row_once(home, small):
    words = "mine --arms squares --seeds 3"
    study(small, words)
    assert [row["arm"] for row in rows_of(home) if "failed" in row] == ["squares"] * 3
    assert "Failed: `squares`, seed 2000: " in table_of(home)
    assert "| `squares`" not in table_of(home) and "| `random` | 3 |" in table_of(home)
    before = len(calls(home))
    study(small, words)
    assert len(calls(home)) == before
    study(small, f"{words} --retry")
    assert calls(home)[before:] == [f"squares {seed} None new" for seed in (2000, 2001, 2002)]
    assert len((folder_of(home) / "rows.jsonl").read_text().splitlines()) == 9


def test_hypotheses_of_the_study_are_corrected_for_together():
    """Also where one plan alone has run: the family of each is all six."""
    assert "family" in run.KEPT
    families = [plans.PLANS[name]["family"] for name in ("h1", "h2", "h3")]
    h2 = [f"H2{kind} at {ratio}" for ratio in ("0.75", "0.5") for kind in "ab"]
    assert families == 3 * [{"H1": 4, "H3": 3} | dict.fromkeys(h2, 2)]


@pytest.mark.parametrize("name", plans.PLANS)
def test_every_plan_is_whole(name, home, small, monkeypatch):
    """It says what it would run. What it names is there: arms, flags of stages, words in braces."""
    plan, open_split = plans.PLANS[name], run.data.open_split
    planes = dict.fromkeys(plan.get("planes", ()))

    def opened(folder, split):  # small has no dev
        return open_split(folder, "test" if split == "dev" else split) | planes

    monkeypatch.setattr(run.data, "open_split", opened)
    lines = study(small, f"{name} --dry --seeds 1").stdout.splitlines()
    assert {line.strip().rpartition(", seed ")[0] for line in lines[1:-1]} == plan["arms"].keys()
    assert not (home / "runs").exists()
    known = {*plan.get("made", {}), *plan["set"], "data", "seed", "epochs", "arm"}
    made = [*plan["arms"].values(), *plan.get("made", {}).values(), [plan.get("judge", "")]]
    commands = list(filter(None, chain(*made)))
    for text in [*plan["arms"], *commands]:
        words = {word for word in run.re.findall(r"\{(.*?)\}", text) if not word.isdigit()}
        assert words <= known and all(word[0].isalpha() for word in words), text
    for text in commands:
        words = text.replace("{recipe}", plan["set"].get("recipe", "")).split()
        stage = words[1] if words[0] == "-m" else words[0]
        assert {word for word in words if word.startswith("--")} <= flags_of(stage), text
    monkeypatch.setattr(run, "chain", lambda templates, *of: [home / "made/file"])
    monkeypatch.setattr(run, "best_flags", lambda name, args: "")
    monkeypatch.setattr(run, "epochs_in", lambda *of: 1)
    args = SimpleNamespace(
        plan=plan, set={"recipe": ""} | plan["set"] | {"arm": "random"}, data=small
    )
    for text in commands:  # every word in braces is filled in
        assert "{" not in run.filled(text, args, [home], 0, ("minutes", 1))
    parts = [hypothesis["parts"] for hypothesis in plan.get("hypotheses", [])]
    for test in chain(plan.get("differences", []), *parts):
        assert {test["arm"], test["against"]} <= plan["arms"].keys()
        columns = {test["what"], test.get("against_what", test["what"])}
        assert columns <= {*plan["columns"], "variance", "log_epochs"}
    assert plan.get("trials", {}).keys() <= {*plan["arms"], *plan.get("made", {})}
