"""experiments.run: what is made once, resumed, chosen on dev, refused; with stages that pretend."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from conftest import call, refused

from experiments import plans, report, run

STAGE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
here = pathlib.Path(__file__).parent
def flag(name, otherwise=None):
    places = [i for i, word in enumerate(words) if word == name]
    return words[places[-1] + 1] if places else otherwise
"""
PRETRAIN = (
    STAGE
    + """
resumed = flag("--resume")
out = pathlib.Path(resumed or flag("--out"))
config = json.loads((out / "state.pt").read_text()) if resumed else words
out.mkdir(parents=True, exist_ok=True)
(out / "state.pt").write_text(json.dumps(config))
words = config
mask, seed = flag("--mask"), int(flag("--seed"))
(here / "pid.txt").write_text(str(os.getpid()))
with open(here / "calls.txt", "a") as calls:
    calls.write(f"{mask} {seed} {flag('--epochs')} {'resumed' if resumed else 'new'}\\n")
while not resumed and os.environ.get("STOP_AT") == f"{mask} {seed}":
    time.sleep(0.05)
if mask.startswith("grid"):
    sys.exit("error: no room is left on the disk")
if mask.startswith("squares"):
    sys.exit("error: the loss is not finite at step 3; try a smaller learning rate")
rows = [dict(epoch=0, knn=20.0, linear=20.0, val_mse=1.7, seconds=1.0)]
quick = 1.0 if mask == "random" else 1.5
for epoch in range(1, 11):
    rows.append(dict(epoch=epoch, loss=1 / epoch, images_per_s=100.0, seconds=8.0 * epoch))
    linear = min(60, 20 + 4.1 * epoch * quick) + seed % 3
    rows.append(dict(epoch=epoch, knn=linear, linear=linear, val_mse=1 / epoch, seconds=8.0 * epoch + 2))
(out / "log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
)
PROBE = (
    STAGE
    + """
out = pathlib.Path(words[0])
assert not (out / "probe-headline.json").exists(), "a probe refuses to overwrite"
config = json.loads((out / "state.pt").read_text())
mask = config[config.index("--mask") + 1]
bits = {"random": "aa", "block": "ff"}.get(mask, "f0") * 3
found = {"headline": bin(int(bits, 16)).count("1") / 24, "right": {"logistic": bits}}
(out / "probe-headline.json").write_text(json.dumps(found))
"""
)
TUNE = (
    STAGE
    + """
out = pathlib.Path(flag("--out"))
out.mkdir(parents=True)
rate = float(flag("--lr", flag("--head-lr", 0)))
with open(here / "calls.txt", "a") as calls:
    calls.write(f"tune {rate} {flag('--seed')} {flag('--split')} {flag('--epochs')}\\n")
if rate == 9:
    sys.exit("error: the loss is not finite at step 1; try a smaller learning rate")
best = 50 - abs(rate - 2)
dev = [dict(dev_top1=x, dev_macro_f1=x, images_per_s=60.0) for x in (best, 10.0)]
(out / "log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in dev))
row = {"top1": 90.0 + rate + int(flag("--seed")) % 7, "right": "aaaaaa"}
(out / "metrics.json").write_text(json.dumps(row))
"""
)
PRETENDED = """
import sys
from pathlib import Path
from common.command import cli
from experiments import run
run.ROOT = Path(sys.argv.pop(1))
cli(run.main)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with stages that pretend: they take no time."""
    stages = tmp_path / "stages"
    stages.mkdir()
    for name, text in (("pretrain", PRETRAIN), ("probe", PROBE), ("finetune_lora", TUNE)):
        (stages / f"{name}.py").write_text(text)
    (stages / "recognize.py").write_text(
        STAGE + "(pathlib.Path(words[0]) / 'recognize.json').write_text('{}')"
    )
    (tmp_path / "weights/toon").mkdir(parents=True)
    monkeypatch.setattr(run, "ROOT", stages)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(home):
    path = home / "stages/calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def study(small, *words, check=0):
    done = call(
        "experiments.run", *words, "--data", small, "--threads", 1, cwd=Path.cwd(), check=check
    )
    return done.stdout


def rows_of(home, name="mine-packed"):
    return report.read_rows(home / "runs/experiments" / name)


def test_a_mask_of_ones_own_against_random_is_one_command_and_one_table(home, small):
    study(small, "mine", "--arms", "block", "--seeds", 3)
    rows = rows_of(home)
    assert [(r["arm"], r["seed"]) for r in rows] == [
        (arm, seed) for seed in (2000, 2001, 2002) for arm in ("random", "block")
    ]
    assert rows[1]["metrics"]["top1"] == 100 and rows[1]["right"] == {"top1": "ffffff"}
    assert rows[0]["curve"]["seconds"][-1] == 61 and rows[0]["machine"] and rows[0]["commit"]
    assert [len(r["commands"]) for r in rows] == [2] * 6
    table = (home / "runs/experiments/mine-packed/table.md").read_text()
    assert "| `block` | 3 | 100.00 ± 0.00 |" in table
    assert "`block` against `random` | +50.00; 3 seeds: no interval" in table
    assert (home / "runs/experiments/mine-packed/figure.png").exists()
    before = len(calls(home))
    assert "6 runs, 6 done" in study(small, "mine", "--arms", "block", "--seeds", 3)
    study(small, "mine", "--arms", "green", "--seeds", 4)
    assert len(calls(home)) == before + 5  # a seed of random, four of green
    other = ["--set", "recipe=--epochs 2", "--arms", "block", "--data", small]
    assert "by other settings" in refused(call("experiments.run", "mine", *other, cwd=home))
    plan = json.loads((home / "runs/experiments/mine-packed/PLAN.json").read_text())
    assert list(plan["arms"]) == ["random", "block", "green"] and plan["seeds"][-1] == 2003


def test_two_arms_with_one_command_share_it(home, small):
    text = "pretrain.py --data {data} --seed {seed} --mask random"
    plan = plans.PLANS["mine"] | {"arms": {"a": [text, plans.PROBE], "b": [text, plans.PROBE]}}
    del plan["template"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.PLANS, "mine", plan)
        study(small, "mine", "--seeds", 2, "--jobs", 2)
    assert len(calls(home)) == 2 and len(rows_of(home)) == 4


def test_pilots_give_the_threshold_and_are_never_reported(home, small):
    study(small, "h1", "--arms", "random", "green", "--seeds", 3)
    folder = home / "runs/experiments/h1-packed"
    pilot = [row for row in report.read_rows(folder) if row["phase"] == "pilot"]
    assert [(row["arm"], row["seed"]) for row in pilot] == [("random", 1000)]
    opened = report.open_folder(folder)
    end = pilot[0]["curve"]["linear"]
    assert opened.thresholds == {"random": round(end[0] + 0.9 * (end[-1] - end[0]), 2)}
    assert all(seed < 3 for seeds in opened.rows.values() for seed in seeds)
    assert (
        "**H1: undecided**" in (folder / "table.md").read_text()
    )  # an arm of its claim is missing


def start(home, small, *words, **env):
    (home / "pretended.py").write_text(PRETENDED)
    root = str(Path(run.__file__).resolve().parent.parent)
    command = [sys.executable, "pretended.py", "stages", "mine", "--data", small]
    words = [*command, "--arms", "block", *words]
    env = os.environ | {"PYTHONPATH": root} | env
    return subprocess.Popen(
        list(map(str, words)), cwd=home, env=env, stdout=subprocess.PIPE, text=True
    )


def until(true):
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in a minute")


def test_a_plan_that_is_killed_goes_on_with_the_run_that_was_stopped(home, small):
    killed = start(home, small, "--seeds", 2, STOP_AT="block 2000")
    until(lambda: "block 2000 None new" in calls(home))
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert [row["arm"] for row in rows_of(home)] == ["random"]
    orphan = int((home / "stages/pid.txt").read_text())
    os.kill(orphan, signal.SIGKILL)  # the stage, as where the machine goes down
    study(small, "mine", "--arms", "block", "--seeds", 2)
    assert calls(home)[2] == "block 2000 None resumed" and len(rows_of(home)) == 4
    assert [line for line in calls(home) if line.startswith("random 2000")] == [
        "random 2000 None new"
    ]


def test_two_processes_lose_no_row_and_make_no_run_twice(home, small):
    both = [start(home, small, "--seeds", 2) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(calls(home)) == len(set(calls(home))) == 4
    assert {(r["arm"], r["seed"]) for r in rows_of(home)} == {
        (arm, seed) for arm in ("random", "block") for seed in (2000, 2001)
    }


def test_a_half_written_line_costs_its_row_alone(tmp_path):
    run.add_row(tmp_path, {"arm": "a", "seed": 0})
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"arm": "b", "se')
    run.add_row(tmp_path, {"arm": "c", "seed": 0})
    assert [row["arm"] for row in report.read_rows(tmp_path)] == ["a", "c"]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def mine(home, small, *words):
    return call("experiments.run", "mine", "--data", small, *words, cwd=home)


def test_a_run_that_fails_loses_no_other_row_and_is_made_again(home, small):
    words = ("--arms", "grid", "block", "--seeds", 2, "--jobs", 2)
    line = refused(mine(home, small, *words))
    assert "no room is left" in line and "2 runs failed" in line
    made = {(r["arm"], r["seed"]) for r in rows_of(home)}
    assert made == set(product(("random", "block"), (2000, 2001)))
    assert "`block`" in (home / "runs/experiments/mine-packed/table.md").read_text()
    before = len(calls(home))
    assert "2 runs failed" in refused(mine(home, small, *words))
    assert len(calls(home)) == before + 2


def test_a_fault_of_the_code_loses_no_other_row(home, small, monkeypatch):
    found = run.row_of

    def broken(arm, seed, args):
        return found(arm, seed, args) if arm == "random" else {}["top1"]

    monkeypatch.setattr(run, "row_of", broken)
    line = refused(mine(home, small, "--arms", "block", "--seeds", 2))
    assert "2 runs failed" in line and "KeyError('top1')" in line
    assert [row["seed"] for row in rows_of(home)] == [2000, 2001]


def test_a_run_that_diverges_is_a_row_once(home, small):
    words = ("--arms", "squares", "--seeds", 3)
    assert mine(home, small, *words).returncode == 0
    failed = [row for row in rows_of(home) if "failed" in row]
    assert [row["arm"] for row in failed] == ["squares"] * 3
    table = (home / "runs/experiments/mine-packed/table.md").read_text()
    assert "Failed: `squares`, seed 2000: " in table and "not finite at step 3" in table
    assert "| `squares`" not in table and "| `random` | 3 |" in table
    before = len(calls(home))
    assert mine(home, small, *words).returncode == 0 and len(calls(home)) == before
    assert mine(home, small, *words, "--retry").returncode == 0
    assert calls(home)[before:] == [f"squares {seed} None new" for seed in (2000, 2001, 2002)]
    assert len((home / "runs/experiments/mine-packed/rows.jsonl").read_text().splitlines()) == 9


def test_a_trial_that_diverges_is_the_worst(home, small, monkeypatch):
    trials = {"lora": plans.rates("--lr", 9, 5, 7)}
    monkeypatch.setitem(run.PLANS, "adapt", plans.PLANS["adapt"] | {"trials": trials})
    study(small, "adapt", "--arms", "lora", "--seeds", 1)
    assert [row["flags"] for row in rows_of(home, "adapt-packed")] == ["--lr 5"]


def test_trials_are_judged_on_dev_and_equally_many(home, small, monkeypatch):
    """Each arm has its trials with a seed that is not reported; the best flags make all its seeds."""
    trials = {"lora": plans.rates("--lr", 1, 2, 3), "full": plans.rates("--lr", 3, 4, 5)}
    plan = plans.PLANS["adapt"] | {"trials": trials, "seeds": range(2)}
    monkeypatch.setitem(run.PLANS, "adapt", plan)
    study(small, "adapt", "--arms", "lora", "full")
    assert len([line for line in calls(home) if " 500 None" in line]) == 6
    rows = rows_of(home, "adapt-packed")
    assert {(r["arm"], r["flags"]) for r in rows} == {("lora", "--lr 2"), ("full", "--lr 3")}
    assert "`full`" in (home / "runs/experiments/adapt-packed/table.md").read_text()


def test_every_arm_gets_equal_minutes(home, small, monkeypatch):
    """One epoch is timed: 60 s of a core at the images a second that the log tells, by the images."""
    plan = plans.PLANS["baselines"]
    trials = {"mae": plans.rates("--blr", 1, 2), "mae-full": plans.rates("--lr", 1, 2)}
    monkeypatch.setitem(run.PLANS, "baselines", plan | {"trials": trials})
    words = ("--set", "minutes=1", "encoder_minutes=2", "--seeds", 1)
    study(small, "baselines", "--arms", "mae-full", *words)
    images = len(run.data.open_split(small, "train")["images"])
    made = [line for line in calls(home) if line.startswith("random 0")]
    assert made[-1].split()[2] == str(round(60 * 2 * 100 / images))
    tuned = [line for line in calls(home) if line.startswith("tune 2.0 0")]
    assert tuned[-1].split()[-1] == str(round(60 * 60 / images))
    third = [line for line in calls(home) if line.startswith("tune 1.0 500")]
    assert third[-1].split()[-1] == str(round(60 * 60 / 3 / images))
    assert rows_of(home, "baselines-packed")[0]["flags"] == "--lr 2"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["mine", "--arms", "nonsense"], "nonsense"),
        (["mine", "--arms", "block:size=nonsense"], "size"),
        (["mine", "--arms", "fg_heavy --maps truth"], "no true maps"),
        (["mine", "--data", "nowhere"], "nowhere"),
        (["mine", "--set", "recipe"], "NAME=VALUE"),
        (["mine", "--set", "split=test2"], "test2"),
        (["adapt", "--set", "encoder=runs/none"], "runs/none does not exist"),
        (["detection"], "python data.py scenes"),
        (["tags"], "no tags"),
        (["hybrid"], "no drawn"),
        (["baselines", "--arms", "resnet10"], "transformers"),
        (["hybrid", "--arms", "nonsense"], "proxies"),
        (["mine", "--set", "recipe=--device cuda"], "cuda"),
    ],
)
def test_what_is_not_there_is_one_line_before_the_first_run(
    home, small, words, reason, monkeypatch
):
    find = run.importlib.util.find_spec
    monkeypatch.setattr(
        run.importlib.util, "find_spec", lambda n: None if n == "transformers" else find(n)
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    data = [] if "--data" in words else ["--data", small]
    line = refused(call("experiments.run", *words, *data, cwd=home))
    assert reason in line and not calls(home) and not (home / "runs").exists()


def test_dry_says_what_would_run_and_writes_nothing(home, small):
    text = study(small, "h2", "--dry", "--seeds", 1)
    assert "fg_heavy:shuffle=1 --maps {coarse} --ratio 0.5, seed 0" in text
    assert "random --ratio 0.5, seed 1000" in text  # the other ratio has a threshold of its own
    assert not (home / "runs").exists()


@pytest.mark.parametrize("name", plans.PLANS)
def test_every_plan_says_what_would_run(name, home, small, monkeypatch):
    open_split = run.data.open_split
    planes = dict.fromkeys(plans.PLANS[name].get("planes", ()))
    monkeypatch.setattr(run.data, "open_split", lambda *words: open_split(*words) | planes)
    lines = study(small, name, "--dry", "--seeds", 1).splitlines()
    arms = {line.strip().rpartition(", seed ")[0] for line in lines[1:]}
    assert arms == plans.PLANS[name]["arms"].keys()


@pytest.mark.parametrize("name", plans.PLANS)
def test_every_plan_is_whole(name):
    """What it compares are its arms; what stands in braces is made or set; commands are stages."""
    plan = plans.PLANS[name]
    known = {*plan.get("made", {}), *plan["set"], "data", "seed", "epochs", "arm"}
    for arm, commands in plan["arms"].items():
        for text in [arm, *commands, *sum(plan.get("made", {}).values(), [])]:
            named = set(run.re.findall(r"\{([a-z]\w*)\}", text))
            assert named <= known, (arm, named - known)
            word = text.split()[1 if text.startswith("-m") else 0]
            path = run.Path(run.__file__).parent.parent / (
                word if word.endswith(".py") else word.replace(".", "/") + ".py"
            )
            assert text == arm or path.exists(), text
    tests = [
        *plan.get("differences", []),
        *(t for h in plan.get("hypotheses", []) for t in h["parts"]),
    ]
    for test in tests:
        assert {test["arm"], test["against"]} <= plan["arms"].keys()
        columns = {test["what"], test.get("against_what", test["what"])}
        assert columns <= {*plan["columns"], "variance", "log_epochs"}
    for arm in plan.get("trials", {}):
        assert arm in plan["arms"] or arm in plan.get("made", {})


def test_every_flag_of_a_plan_is_its_stages(tmp_path):
    known = {}
    for plan in plans.PLANS.values():
        recipe = plan["set"].get("recipe", "")
        made = [*plan["arms"].values(), *plan.get("made", {}).values(), [plan.get("judge", "")]]
        for text in filter(None, sum(map(list, made), [])):
            words = text.replace("{recipe}", recipe).split()
            stage = words[1] if words[0] == "-m" else words[0]
            if "--verify" in words:
                stage = "recognize.py"
            if stage not in known:
                page = call(stage, "--help", cwd=tmp_path, check=0).stdout
                known[stage] = set(run.re.findall(r"--[a-z][\w-]*", page))
            used = {word for word in words if word.startswith("--")}
            assert used <= known[stage], (text, used - known[stage])
