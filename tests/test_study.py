"""experiments.study: what is planned, skipped, resumed, refused, with mock stages; verdicts on synthetic rows."""

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, refused, stage

import pretrain
import probe
from common.checkpoints import save_model
from common.io import UserError
from common.stats import from_bits, to_bits
from experiments import (
    plans,
    readme_numbers,
    report,
    stats,
    study,
    study_figures,
    study_run,
    verdicts,
)
from model import MAE

PRETRAIN = """
import json, os, sys, time, pathlib
words = sys.argv[1:]
flag = lambda name: next(words[i + 1] for i in reversed(range(len(words) - 1)) if words[i] == name)
out, mask, seed = pathlib.Path(flag("--out")), flag("--mask").split(":")[0], int(flag("--seed"))
with open(pathlib.Path(__file__).parent / "calls.txt", "a") as calls:
    calls.write(f"{flag('--mask')} {seed}\\n")
while "PRETEND_UNTIL" in os.environ and seed == 2000 and not os.path.exists(os.environ["PRETEND_UNTIL"]):
    time.sleep(0.02)
if mask == "grid":
    print("machine  pretended")
    sys.exit("error: the loss is not finite at step 3")
if mask == "block":
    sys.exit("error: no such thing")
quick = {"random": 1.0, "attn_high": 1.5}.get(mask, 0.9)
rows, clock = [], 1.0
rows.append(dict(step=0, epoch=0, knn=20.0, linear=20.0, linear_thumbnail=30.0, val_mse=1.7, seconds=clock))
for epoch in range(1, 11):
    rows.append(dict(step=epoch, epoch=epoch, loss=1 / epoch, seconds=clock + 6, memory_mb=100))
    clock += 8
    knn = min(60, 20 + 4.1 * epoch * quick) + seed % 3
    rows.append(dict(step=epoch, epoch=epoch, knn=knn, linear=knn, val_mse=1 / epoch, seconds=clock))
(out / "log.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
(out / "model.safetensors").write_text("")
"""
FOUND = """
import json, pathlib, sys
flags = dict(zip(sys.argv[2:], sys.argv[3:]))
out = pathlib.Path(sys.argv[1])
found = out / f"{pathlib.Path(flags['--data']).name}-{flags['--split']}"  # its model does not say what its own data are
found.mkdir(exist_ok=True)
"""
PROBE = (
    FOUND
    + """
bits = {"random": "aa", "attn": "ff"}.get(out.name.split("-")[0].split("_")[0], "f0")
top1 = bin(int(bits, 16)).count("1") / 8
row = {"logistic": {"top1": top1, "C": 1.0, "per_class": [1]}, "knn": {"top1": top1}, "retrieval": {"map": .5}}
pool = flags["--pool"]
rows = {pool: row} | ({} if "--headline" in sys.argv else {f"untrained {pool}": row, "thumb4": row})
name = "probe-headline.json" if "--headline" in sys.argv else "probe.json"
(found / name).write_text(json.dumps({"rows": rows, "right": {"logistic": bits * 9, "knn": bits * 9},
                                    "machine": "pretended", "config": {"seed": 0, "dtype": "bf16"}}))
"""
)
STRESS = (
    FOUND
    + """
(found / "stress-cutout.json").write_text(json.dumps({"top1": {"cutout 0.3": 50.0}, "right": {"cutout 0.3": "f0" * 9}}))
"""
)
FINETUNE = """
import json, pathlib, shlex, sys
flags = dict(zip(sys.argv[2:], sys.argv[3:]))
out = pathlib.Path(flags["--out"])
out.mkdir(parents=True)
score = {"--lr": float(flags.get("--lr", 0)), "--head-lr": float(flags.get("--head-lr", 0))}
line = shlex.join(["python", "finetune_lora.py", *sys.argv[1:]])
row = dict.fromkeys(KEEP, 1) | {"run": out.name, "top1": 90.5, "command": line}
row |= {"macro_f1": 50 + 1e3 * score["--lr"] - score["--head-lr"]}
row |= {"lr": score["--lr"], "head_lr": score["--head-lr"], "epochs": flags.get("--epochs")}
row |= {"r": flags["--method"].partition("r=")[2] or "8"}
head, _, margin = flags.get("--head", "linear").partition(":margin=")
row |= {"head": head, "margin": margin}
name = "metrics.json" if flags.get("--split", "val") == "val" else f"metrics-{flags['--split']}.json"
(out / name).write_text(json.dumps({"config": {}} | row))
with open(pathlib.Path(__file__).parent / "calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
"""
PRETENDED = """
import sys
from pathlib import Path
from common.command import cli
from experiments import study, study_run
study_run.ROOT = Path(sys.argv.pop(1))
cli(study.main)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with stages that pretend: they take no time and know what to find."""
    for name, text in (
        ("pretrain.py", PRETRAIN),
        ("probe.py", PROBE),
        ("experiments/stress.py", STRESS),
    ):
        (tmp_path / "stages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stages" / name).write_text(text)
    (tmp_path / "stages" / "maps.py").write_text("")
    monkeypatch.setattr(study_run, "ROOT", tmp_path / "stages")
    monkeypatch.setattr(study_run, "commit", lambda: "abc1234")
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    return tmp_path


def git(folder, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def commit(home):
    git(home, "add", "results")
    git(home, "commit", "-q", "-m", "rows and plan")


def ask(monkeypatch, small, *words):
    monkeypatch.setattr(
        sys, "argv", ["experiments.study", "--data", str(small), "--threads", "1", *map(str, words)]
    )
    study.main()


def calls(home):
    path = home / "stages" / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


# ---- plans ---------------------------------------------------------------------------------------


KNOWN = {
    "guided": "attn_high",
    "fg": "{coarse}",
    "parts": "{parts}",
    "dino": "d.pth",
    "strategies": ["random", "learned"],
    "data": "toon",
    "blr": 4e-3,
    "epochs": 20,
    "ratio": 0.75,
    "depth": "1",
}


@pytest.mark.parametrize("name", plans.MAKE)
def test_every_plan_is_whole(name):
    plan = plans.make(name, ["middle:beta=3 --ratio .6"], **KNOWN)
    assert "middle:beta=3 --ratio .6" in plan["arms"] and set(plan["arms"].values()) <= set(
        plan["arms"]
    )
    for hypothesis in plan["hypotheses"]:
        assert (plans.FAMILY | plans.LOOK)[hypothesis["id"]] == len(hypothesis["parts"])
        assert all(
            p["arm"] in plan["arms"] and p["against"] in plan["arms"] for p in hypothesis["parts"]
        )
        assert all(p["what"] in verdicts.UNITS for p in hypothesis["parts"])
    drawn = [
        arm for lines in plan["panels"].values() for own in lines.values() for arm in own.values()
    ]
    assert set(drawn) <= set(plan["arms"])


def test_the_proposal_is_what_is_tested():
    """The claims, part by part."""
    claims = {
        (h["id"], p["what"], p["arm"].split()[0].split(":")[0], p["against"].split()[0], p["claim"])
        for name in ("h1", "h2", "h3")
        for h in plans.make(name, **KNOWN)["hypotheses"]
        for p in h["parts"]
    }
    assert {
        ("H1", "top1", "attn_high", "random", 1.0),
        ("H1", "epochs", "attn_high", "random", 10.0),
        ("H1", "top1", "attn_high", "attn_high:shuffle=1", 0.0),
        ("H1", "top1", "attn_high", "green", 0.0),
        ("H3", "epochs", "parts", "random", 15.0),
        ("H3", "cutout", "parts", "random", 1.0),
        ("H2b at .5", "top1", "fg_heavy", "random", 0.5),
        ("H2a at .75", "variance", "bg_heavy", "random", 0.0),
        ("H2a at .5", "epochs", "bg_heavy", "random", 0.0),
    } <= claims


def test_random_and_guided_masks_get_as_many_trials():
    arms = plans.make("tune", **KNOWN)["arms"]
    plain = [arm for arm in arms if arm.split()[0] == "random"]
    assert len(plain) == len(arms) - len(plain) == 10


def test_parameters_join_an_arm():
    assert (
        plans.with_parameter("attn_high --teacher x", "shuffle=1")
        == "attn_high:shuffle=1 --teacher x"
    )
    assert plans.with_parameter("attn_high:beta=2", "shuffle=1") == "attn_high:beta=2,shuffle=1"


# ---- running -------------------------------------------------------------------------------------


def test_no_reported_seed_runs_before_its_plan_is_committed(home, small, monkeypatch, capsys):
    words = ["--plan", "h1", "--seeds", 2, "--out", "results/study"]
    ask(monkeypatch, small, *words, "--dry")
    assert (
        not calls(home)
        and not (home / "results").exists()
        and "8 to run" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="git add results/study/h1-packed"):
        ask(monkeypatch, small, *words)
    assert calls(home) == ["random 1000"]  # the pilot, which fixes the threshold
    plan = json.loads((home / "results/study/h1-packed/PLAN.json").read_text())
    assert (
        plan["thresholds"] == {"random": round(20 + 0.9 * (61 - 20), 2)}
        and plan["phase"] == "reported"
    )
    with pytest.raises(UserError, match="git add"):
        ask(monkeypatch, small, *words)  # written is not committed
    commit(home)
    ask(monkeypatch, small, *words)
    assert len(calls(home)) == 9 and sorted(calls(home)[1:3]) == [
        "attn_high 0",
        "random 0",
    ]  # whole seeds first
    with pytest.raises(UserError, match="another recipe"):
        ask(monkeypatch, small, *words, "--epochs", 3)

    folder = home / "results/study/h1-packed"
    rows = report.open_folder(folder)["rows"]
    row = rows["attn_high"][1]
    assert (
        row["commit"] == "abc1234"
        and row["machine"] == "pretended"
        and row["metrics"]["top1"] == 100.0
    )
    assert (
        row["curve"]["seconds"][:3] == [0, 6, 12] and row["seconds"]["pretrain"] == 81
    )  # evaluations are not counted
    pilot = next(r for r in study.read_rows(folder) if r["seed"] == 1000)
    assert row["commands"][0].startswith(
        "OMP_NUM_THREADS=1 python pretrain.py --eval-every 1 --model nano"
    )
    assert ["--dtype bf16" in line for line in pilot["commands"] + row["commands"]] == [
        False,
        False,
        True,
        True,
    ]
    assert (
        "in bf16" in (home / "results/STUDY.md").read_text()
    )  # the pilot's format, whatever this machine likes best
    assert {"table.md", "table.csv", "verdicts.json", "curves.png", "bars.png"} <= {
        p.name for p in folder.iterdir()
    }
    text = (home / "results/STUDY.md").read_text()
    assert "8 of 8 planned runs are there" in text and "untrained encoder 50.0 %" in text


@pytest.mark.slow
def test_what_is_done_is_skipped_in_other_plans_and_on_other_machines(
    home, small, monkeypatch, capsys
):
    words = [
        "--plan",
        "arms",
        "--arms",
        "green",
        "attn_low --ratio .5",
        "--exploratory",
        "--seeds",
        2,
    ]
    ask(monkeypatch, small, *words)
    folder = home / "runs/study/results"
    assert (
        len(calls(home)) == 7
        and "attn_low" in (folder / "arms-packed-exploratory/table.md").read_text()
    )
    (home / "runs/study/work").rename(home / "elsewhere")  # another machine has the rows alone
    ask(monkeypatch, small, *words)
    assert len(calls(home)) == 7 and "6 done, 0 to run" in capsys.readouterr().out
    ask(monkeypatch, small, "--plan", "ablations", "--exploratory", "--seeds", 1, "--budget", 1e-6)
    assert len(calls(home)) == 7  # its pilot was there, and nothing fits into the budget
    panels = json.loads(
        (home / "runs/study/results/ablations-packed-exploratory/PLAN.json").read_text()
    )["panels"]
    assert panels["decoder depth"]["random"] == {
        "1": "random",
        "2": "random --model nano:decoder_depth=2",
        "4": "random --model nano:decoder_depth=4",
    }  # the recipe has 1
    assert panels["weight of flat patches"]["raw pixels"]["1"] == "random --no-norm-pix"
    ask(monkeypatch, small, "--plan", "h3", "--exploratory", "--seeds", 1)
    assert (
        len(calls(home)) == 11
    )  # random lacks a stage of this plan, and the pilot, which makes parts, its folder
    text = (home / "runs/study/STUDY.md").read_text()
    assert "Exploratory: no plan was committed" in text and "1 seed: no interval" in text


def test_the_budget_leaves_out_whole_seeds_and_says_so(home, small, monkeypatch, capsys):
    jobs = [{"seed": s, "arm": arm} for s in range(3) for arm in ("random", "green")]
    rows = [
        {"arm": "random", "seconds": {"pretrain": 50, "probe": 10}},
        {"arm": "green", "seconds": {"pretrain": 120}},
    ]
    kept, left = study.within(jobs, rows, 6.0, 1)
    assert [j["seed"] for j in kept] == [0, 0, 1, 1] and [j["seed"] for j in left] == [2, 2]
    assert len(study.within(jobs, rows, 6.0, 2)[0]) == 6 and study.within(jobs, rows, None, 1) == (
        jobs,
        [],
    )
    ask(
        monkeypatch, small, "--plan", "arms", "--exploratory", "--budget", 3.2, "--seeds", 3
    )  # a run takes 81 s
    assert (
        "left out by --budget: random, seeds 2" in capsys.readouterr().out and len(calls(home)) == 3
    )


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_tried_again(
    home, small, monkeypatch
):
    monkeypatch.delenv(
        "PYTHONUNBUFFERED", raising=False
    )  # else what is printed comes behind the error, at exit
    words = ["--plan", "arms", "--arms", "grid", "block", "--exploratory", "--seeds", 1]
    with pytest.raises(UserError, match="1 runs failed.*block, seed 2000.*no such thing"):
        ask(monkeypatch, small, *words)
    rows = study.read_rows(home / "runs/study/results/arms-packed-exploratory")
    assert [r["error"] for r in rows if r["arm"] == "grid"] == ["diverged"]
    with pytest.raises(UserError, match="1 runs failed"):
        ask(monkeypatch, small, *words)
    assert calls(home).count("grid 2000") == 1 and calls(home).count("block 2000") == 2
    (home / "stages" / "pretrain.py").write_text(PRETRAIN.replace("block", "nothing"))
    ask(monkeypatch, small, *words)
    assert "Diverged, and left out: grid, seed 2000." in (home / "runs/study/STUDY.md").read_text()


@pytest.mark.slow
def test_a_killed_study_goes_on(home, small):
    """kill -9 of the study in its second run; the stage that it leaves behind is waited for, and
    not run twice.
    """
    command = [
        sys.executable,
        "-c",
        PRETENDED,
        home / "stages",
        "--plan",
        "arms",
        "--exploratory",
        "--seeds",
        2,
        "--data",
        small,
        "--threads",
        1,
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PRETEND_UNTIL": str(home / "go")}
    start = functools.partial(
        subprocess.Popen, [str(w) for w in command], cwd=home, env=env, stdout=subprocess.PIPE
    )
    first = start()
    while len(calls(home)) < 2:  # the pilot is through
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    rows = home / "runs/study/results/arms-packed-exploratory/rows.jsonl"
    with open(rows, "a") as file:
        file.write('{"key": "cut of')
    second = start()
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the run that the first left
        second.wait(5)
    (home / "go").touch()
    assert b"2/2 random, seed 2001" in second.communicate(timeout=100)[0] and second.returncode == 0
    assert sorted({(r["arm"], r["seed"]) for r in study.read_rows(rows.parent)}) == [
        ("random", 1000),
        ("random", 2000),
        ("random", 2001),
    ]
    assert calls(home).count("random 1000") == 1


def test_mistakes_are_one_line(home, small, monkeypatch):
    done = stage(
        "experiments/study.py",
        "--plan",
        "h1",
        "--data",
        small,
        "--arms",
        "atn_high",
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "choose from random" in refused(done)
    for words, message in (
        (["--budget", "-1"], "--budget -1"),
        (["--data", "nothing"], "nothing"),
        (["--jobs", 0], "--jobs 0"),
        (["--seeds", 501], "between 1 and 500"),
    ):
        with pytest.raises(UserError, match=message):
            ask(monkeypatch, small, "--plan", "h1", "--exploratory", *words)
    with pytest.raises(UserError, match="plan tune asks of attn_high alone"):
        ask(monkeypatch, small, "--plan", "tune", "--guided", "attn_hint")
    with pytest.raises(UserError, match="leave --eval-every out"):
        ask(
            monkeypatch,
            small,
            "--plan",
            "h1",
            "--exploratory",
            "--recipe",
            "--model nano --eval-every 4",
        )


# ---- what is written where, and what is refused --------------------------------------------------


def test_tracked_results_are_written_only_where_they_are_named(home, small, monkeypatch, capsys):
    with pytest.raises(
        UserError,
        match="plan h1 is reported: .*--out results/study; or try masks with --exploratory",
    ):
        ask(monkeypatch, small, "--plan", "h1")
    monkeypatch.setattr(sys, "argv", ["experiments.study", "--report"])
    with pytest.raises(UserError, match="say which, --out results/study"):
        study.main()
    ask(monkeypatch, small, "--plan", "h1", "--dry")
    ask(monkeypatch, small, "--plan", "arms", "--exploratory", "--seeds", 1)
    assert {p.name for p in home.iterdir()} == {"stages", "runs", ".git"}
    assert {p.name for p in (home / "runs/study").iterdir()} == {"results", "work", "STUDY.md"}


def test_a_study_is_not_spliced_into_the_text_of_others(home, small, monkeypatch):
    words = ["--plan", "arms", "--exploratory", "--seeds", 1]
    ask(monkeypatch, small, *words, "--out", "results/study")
    before = (home / "results/STUDY.md").read_bytes()
    with pytest.raises(
        UserError,
        match="results/STUDY.md tells of the studies in results/study, and would lose them",
    ):
        ask(monkeypatch, small, *words, "--out", "results/toy")
    assert (home / "results/STUDY.md").read_bytes() == before and not (
        home / "results/toy"
    ).exists()
    ask(monkeypatch, small, *words, "--out", "results/study")
    (home / "notes").write_text("mine")
    for flags, says in (
        (["--out", "notes"], "notes is a file"),
        (["--out", "notes/x"], "notes is a file"),
        (["--work", "notes"], "notes is a file"),
        (["--out", "runs/x", "--work", "runs/x"], "are both runs/x"),
    ):
        with pytest.raises(UserError, match=says):
            ask(monkeypatch, small, *words, *flags)
    assert len(calls(home)) == 2


def test_the_second_loss_is_what_plan_or_arm_says(home, small):
    """A recipe or an arm may write it either way; else there is none, as in the first plans."""
    plan = plan_of("h1") | {
        "data": "packed",
        "split": "val",
        "recipe": "--epochs 2",
        "pilot_seed": 1000,
    }
    plan |= {"data_digest": "d", "phase": "dev"}
    found = {}
    for arm in ("attn_high", "attn_high --contrast=cls", "attn_high --contrast pooler"):
        job = study.job_of(plan, arm, 0, SimpleNamespace(work="w"))
        words = study_run.commands(job, SimpleNamespace(data=small), {})["pretrain"]
        found[arm] = [
            w
            for w, before in zip(words, ["", *words], strict=False)
            if "--contrast" in (w[:10], before)
        ]
    assert [*found.values()] == [
        ["--contrast", "none"],
        ["--contrast=cls"],
        ["--contrast", "pooler"],
    ]


def test_a_threshold_of_three_pilots(home, small, monkeypatch):
    """Plan look: their mean; views and a teacher in every arm; the headline of today."""
    words = ["--plan", "look", "--seeds", 1, "--out", "results/study"]
    with pytest.raises(UserError, match="add --contrast pooler"):
        ask(monkeypatch, small, *words)
    words += ["--recipe", "--model nano --contrast pooler"]
    with pytest.raises(UserError, match="git add"):
        ask(monkeypatch, small, *words)
    assert calls(home) == ["random 1000", "random 1001", "random 1002"]
    folder = home / "results/study/look-packed"
    plan = json.loads((folder / "PLAN.json").read_text())
    ends = [60 + seed % 3 for seed in (1000, 1001, 1002)]
    assert plan["thresholds"] == {"random": round(20 + 0.9 * (sum(ends) / 3 - 20), 2)} and plan[
        "seeds"
    ] == [100]
    assert [len(row.get("controls", {})) for row in study.read_rows(folder)] == [2, 0, 0]
    commit(home)
    ask(monkeypatch, small, *words)
    assert set(calls(home)[3:]) == {f"{arm.split()[0]} 100" for arm in plan["arms"]}
    job = study.job_of(plan, "random", 100, SimpleNamespace(work="w"))
    words = study_run.commands(job, SimpleNamespace(data="d"), {})
    assert words["pretrain"].count("--contrast") == 1 and "extremes" in words["probe"]
    text = (home / "results/STUDY.md").read_text()
    assert "the pilots, seeds 1000 to 1002, each gained" in text and "tokens' extremes" in text
    assert "| H1 again on packed |" in text


def test_more_seeds_are_added_to_what_was_explored_and_to_nothing_that_is_reported(
    home, small, monkeypatch
):
    words = ["--plan", "arms", "--arms", "green", "--exploratory", "--seeds"]
    ask(monkeypatch, small, *words, 2)
    ask(monkeypatch, small, *words, 3, "--dry")
    folder = home / "runs/study/results/arms-packed-exploratory"
    assert json.loads((folder / "PLAN.json").read_text())["seeds"] == [2000, 2001]
    ask(monkeypatch, small, *words, 3)
    assert calls(home)[5:] == ["random 2002", "green 2002"]  # and nothing twice
    assert json.loads((folder / "PLAN.json").read_text())["seeds"] == [2000, 2001, 2002]
    assert (
        len(study.read_rows(folder)) == 7
        and "6 of 6 planned" in (home / "runs/study/STUDY.md").read_text()
    )
    with pytest.raises(UserError, match="has another seeds"):
        ask(monkeypatch, small, *words, 2)
    words = ["--plan", "h1", "--out", "results/study", "--seeds"]
    with pytest.raises(UserError, match="has to be in git"):
        ask(monkeypatch, small, *words, 2)
    with pytest.raises(UserError, match="has another seeds"):
        ask(monkeypatch, small, *words, 3)


ADAPT = ["--plan", "adapt", "--encoder", "runs/e"]
X = ["--exploratory"]


@pytest.mark.parametrize(
    "words, flag",
    [
        (["--plan", "h1", *X, "--encoder", "e"], "encoder"),
        (["--plan", "h1", *X, "--phases", "rates"], "phases"),
        (["--plan", "arms", *X, "--keep", ".5"], "keep"),
        (["--plan", "arms", *X, "--scratch-times", "2"], "scratch-times"),
        (["--plan", "arms", *X, "--guided", "green"], "guided"),
        (["--plan", "h1", *X, "--dino", "f"], "dino"),
        (["--plan", "tune", *X], "exploratory"),
        ([*ADAPT, "--seeds", "3"], "seeds"),
        ([*ADAPT, "--jobs", "2"], "jobs"),
        ([*ADAPT, "--recipe", "-"], "recipe"),
        ([*ADAPT, *X], "exploratory"),
        ([*ADAPT, "--budget", "3"], "budget"),
        ([*ADAPT, "--phases", "rank", "--methods", "lora"], "methods"),
        ([*ADAPT, "--phases", "first", "--trial-epochs", "3"], "trial-epochs"),
        ([*ADAPT, "--phases", "rates", "--epochs", "3"], "epochs"),
        ([*ADAPT, "--methods", "linear", "--keep", ".5"], "keep"),
        ([*ADAPT, "--methods", "full", "--scratch-times", "2"], "scratch-times"),
        (["--report", "--out", "results/study"], "data"),
        (["--report", "--out", "o", "--dry"], "data"),
    ],
)
def test_what_a_plan_would_not_use_is_refused(home, small, monkeypatch, words, flag):
    with pytest.raises(UserError, match=f"^--{flag} has no effect"):
        ask(monkeypatch, small, *words)
    assert not calls(home)


def test_an_experiment_starts_without_what_is_slow_to_load():
    """--help has torch to wait for, and nothing else."""
    names = ("study", "stress", "map_quality", "readme_numbers")
    code = f"import sys, {', '.join('experiments.' + n for n in names)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"matplotlib", "scipy", "sklearn", "transformers"} & set(done.stdout.split())


def test_the_numbers_of_the_docs_are_written_where_they_are_named(tmp_path, monkeypatch):
    def ask_for(*words):
        monkeypatch.setattr(sys, "argv", ["experiments/readme_numbers.py", *map(str, words)])
        readme_numbers.main()

    monkeypatch.setattr(readme_numbers, "run", lambda *_: pytest.fail("a stage was run"))
    with pytest.raises(UserError, match="--out"):
        ask_for()
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(UserError, match="demo.json is there already"):
        ask_for("--out", tmp_path)
    with pytest.raises(UserError, match="demo.json is a file"):
        ask_for("--out", tmp_path / "demo.json/x")
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["demo.json"]


@pytest.mark.parametrize("split, phase", [("val", "reported"), ("dev", "dev"), ("val", "pilot")])
def test_a_row_is_read_from_the_files_that_its_stages_name(tmp_path, split, phase):
    """A headline has a file of its own, another split a folder; a whole probe that lies beside them
    is another's.
    """
    out = tmp_path / "run"
    out.mkdir()
    (tmp_path / "pretrain.py").write_text(PRETRAIN)
    words = ["--out", out, "--mask", "random", "--seed", "0"]
    subprocess.run([sys.executable, tmp_path / "pretrain.py", *words], check=True)
    found = out if split == "val" else out / "packed-dev"
    found.mkdir(exist_ok=True)
    if split == "val":
        save_model(
            MAE(32, 8, 32, 1, 2, 32, 1),
            out / "model.safetensors",
            {"step": 0, "run": {"data": "packed"}},
        )
    probe = {
        "rows": {"mean": {"logistic": {"top1": 0.5}, "knn": {"top1": 0.5}}},
        "right": {"logistic": "f0"},
        "machine": "m",
        "config": {},
    }
    name = "probe.json" if phase == "pilot" else "probe-headline.json"
    for path, top1 in (
        (out / "probe.json", 0.1),
        (out / "probe-headline.json", 0.2),
        (found / name, 0.5),
    ):
        probe["rows"]["mean"]["logistic"] = {"top1": top1}
        path.write_text(json.dumps(probe))
    (found / "stress-cutout.json").write_text(
        json.dumps({"top1": {"cutout 0.3": 7}, "right": {"cutout 0.3": "0f"}})
    )
    (tmp_path / "run-full").mkdir()
    tuned = study_run.scores_of(tmp_path / "run-full", split)
    assert tuned.name == ("metrics.json" if split == "val" else "metrics-dev.json")
    tuned.write_text(json.dumps({"top1": 90.0, "right": "ff"}))
    plan = {
        "plan": "finetune",
        "data": "packed",
        "split": split,
        "recipe": "",
        "dtype": None,
        "pilot_seed": 1000,
    }
    job = {
        "out": out,
        "plan": plan,
        "phase": phase,
        "stages": ["pretrain", "probe", "stress", "finetune"],
        "key": "k",
        "arm": "random",
        "seed": 1000 if phase == "pilot" else 0,
    }
    args = SimpleNamespace(data="packed", threads=1)
    row = study_run.collect(job, args, {}, {}, "abc")
    assert (
        row["metrics"]["top1"] == 50
        and row["metrics"]["cutout"] == 7
        and row["metrics"]["finetuned"] == 90
    )
    assert row["right"] == {"logistic": "f0", "cutout": "0f", "finetuned": "ff"}


def row_folder(base):
    return next((base / "runs/study/work/packed").glob("random-s2000-*")).name


@pytest.mark.slow
def test_one_real_run(small, tmp_path, monkeypatch):
    """The real stages: a pilot and a seed; the row's own commands make the same digits."""
    monkeypatch.chdir(tmp_path)
    recipe = "--model nano:image_size=32 --batch-size 16 --epochs 2 --device cpu --dtype fp32"
    words = ["--plan", "arms", "--exploratory", "--seeds", 1, "--jobs", 2, f"--recipe={recipe}"]
    ask(monkeypatch, small, *words)
    row = report.open_folder(tmp_path / "runs/study/results/arms-packed-exploratory")["rows"][
        "random"
    ][2000]
    assert (
        row["config"]["seed"] == 2000
        and row["config"]["flat_weight"] == 1
        and len(row["curve"]["linear"]) == 3
    )
    assert not list((tmp_path / "runs").glob("**/state.pt"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the row's commands say
    for line in row["commands"]:
        words = shlex.split(line.replace(f"runs/study/work/packed/{row_folder(tmp_path)}", "again"))
        assert words[:2] == ["OMP_NUM_THREADS=1", "python"]
        monkeypatch.setattr(sys, "argv", words[2:])
        {"pretrain.py": pretrain, "probe.py": probe}[words[2]].main()
    torch.set_num_threads(threads)
    found = json.loads(next((tmp_path / "again").glob("probe*.json")).read_text())
    assert found["right"] == row["right"] and 100 * found["headline"] == row["metrics"]["top1"]


def test_adaptation_takes_the_best_rate_on_dev_and_repeats_nothing(home, small, monkeypatch):
    (home / "stages" / "finetune_lora.py").write_text(f"KEEP = {study_run.KEEP!r}\n{FINETUNE}")
    words = [
        "--plan",
        "adapt",
        "--encoder",
        "runs/e",
        "--out",
        "finetune.csv",
        "--methods",
        "linear",
        "lora",
    ]
    words += ["--phases"]
    with pytest.raises(UserError, match="phase first takes the best learning rate of linear, lora"):
        ask(monkeypatch, small, *words, "first")
    ask(monkeypatch, small, *words, "rates", "first")
    assert len(calls(home)) == 10 and all("--split dev" in line for line in calls(home)[:8])
    assert (
        "--method linear --head-lr 0.01 --seed 0" in calls(home)[8]
        and "--lr 0.012 --seed 0" in calls(home)[9]
    )
    (home / "runs").rename(home / "elsewhere")  # another machine has the table alone
    ask(monkeypatch, small, *words, "rates", "first", "rank", "margin", "seeds")
    assert (
        len(calls(home)) == 10 + 3 + 6 + 4
        and "--epochs 2" in calls(home)[4]
        and "--epochs 8" in calls(home)[9]
    )
    table = (home / "finetune.md").read_text().splitlines()
    assert table[2].startswith("| linear, ") and "| 3 | 90.50 ± 0.00 |" in table[2]
    assert "| r 32, linear head | 90.50 | 62.00 | 1 |" in table and any(
        "arcface head, margin 0.3" in x for x in table
    )
    with pytest.raises(UserError, match="--encoder RUN go together"):
        ask(monkeypatch, small, "--plan", "adapt")

    before = (home / "finetune.csv").read_bytes()
    other = [*words[:2], "--encoder", "runs/other", *words[4:]]
    with pytest.raises(UserError, match="rows of another encoder or data set"):
        ask(monkeypatch, small, *other, "first")
    with pytest.raises(
        UserError,
        match="finetune.csv has first-linear-s0 by other flags|first-lora-s0 by other flags",
    ):
        ask(monkeypatch, small, *words, "first", "--epochs", 9)
    other[other.index("finetune.csv")] = "other.csv"
    with pytest.raises(
        UserError,
        match="elsewhere/adapt/packed/rates-linear0.01 has rates-linear0.01 by other flags",
    ):
        ask(monkeypatch, small, *other, "rates", "--work", "elsewhere/adapt/packed")
    (home / "README.md").write_text("mine")
    for out, says in (("README.md", "ends in .csv"), ("README.csv", "README.md is there already")):
        with pytest.raises(UserError, match=says):
            ask(monkeypatch, small, *words, "rates", "--out", out)
    assert (home / "finetune.csv").read_bytes() == before and (
        home / "README.md"
    ).read_text() == "mine"
    ask(monkeypatch, small, *ADAPT, "--methods", "linear", "--phases", "rates", "--dry")
    assert len(calls(home)) == 10 + 3 + 6 + 4 and "runs/adapt/packed/finetune" not in str(
        list(home.glob("**/*.csv"))
    )


# ---- statistics and verdicts ---------------------------------------------------------------------


def test_a_claim_is_refuted_by_one_side_of_the_t_test_and_seeds_follow_from_power():
    d = [0.2, 0.1, -0.3, 0.4, 0.0]
    for claim in (0.5, 0.0, -0.5):
        p = scipy.stats.ttest_1samp(d, claim, alternative="less").pvalue
        assert stats.p_below(d, claim) == pytest.approx(p, abs=1e-9)
    assert (
        stats.t_power(1.0, 0.8, 8) > 0.8 > stats.t_power(1.0, 0.8, 7)
        and stats.seeds_needed(1.0, 0.8) == 8
    )
    right = np.random.default_rng(0).random(13) < 0.5
    assert (from_bits(to_bits(right), 13) == right).all()


IMAGES = 400
GROUPS = np.arange(IMAGES) // 2


def synthetic(plan, top1, quick, noise=0.4, final=60.0):
    """Rows of a plan: each arm's Top-1 in percent and how fast its kNN rises, with noise between
    seeds.
    """
    rng, rows = np.random.default_rng(0), {}
    for arm in plan["arms"]:
        rows[arm] = {}
        for seed in plan["seeds"]:
            hardness = np.random.default_rng(seed).permutation(
                IMAGES
            )  # the same images are easy in every arm
            value = top1[arm] + noise * rng.standard_normal()
            right = hardness < IMAGES * value / 100
            epoch = np.arange(0, 21)
            knn = np.minimum(
                final, 20 + 2 * epoch * quick[arm] * (1 + 0.02 * rng.standard_normal())
            )
            rows[arm][seed] = {
                "seed": seed,
                "arm": arm,
                "metrics": {"top1": 100 * right.mean()},
                "right": {k: to_bits(right) for k in ("logistic", "cutout")},
                "curve": {
                    "epoch": epoch.tolist(),
                    "linear": knn.tolist(),
                    "seconds": (60 * epoch).tolist(),
                },
            }
    return rows


def plan_of(name, seeds=5):
    plan = plans.make(name, **KNOWN)
    thresholds = {arm: 55.0 for arm in study.pilots(plan)}
    return plan | {"seeds": list(range(seeds)), "thresholds": thresholds, "family": plans.FAMILY}


def judge(plan, rows):
    measured = [
        h | {"parts": [verdicts.measure(p, plan, rows, GROUPS) for p in h["parts"]]}
        for h in plan["hypotheses"]
    ]
    return {h["id"]: h for h in verdicts.judge(measured, plan["family"])}


def h1_rows(plan, high, speed, **more):
    top1 = {arm: 80.0 for arm in plan["arms"]} | {"attn_high": high}
    return synthetic(plan, top1, {arm: 1.0 for arm in plan["arms"]} | {"attn_high": speed}, **more)


def test_epochs_are_counted_two_other_ways_beside_the_plan():
    plan = plan_of("h1") | {"thresholds": {"random": 59.9}}
    rows = h1_rows(plan, 80.0, 2.0)  # random ends at 60 after 20 epochs, attn_high after 10
    part = plan["hypotheses"][0]["parts"][1]
    by_logarithm, own = verdicts.checks(part, plan, rows)
    assert (
        by_logarithm.startswith("by logarithms of the epochs +")
        and "the threshold that these 5 baselines" in own
    )
    assert float(own.split(" ")[1]) == pytest.approx(20 + 0.9 * 40, abs=1)
    saved = [float(line.split(" +")[1].split(" ")[0]) for line in (by_logarithm, own)]
    assert saved == pytest.approx([50, 50], abs=2) and "never" not in own
    assert (
        "5 runs and 0 baselines never" in verdicts.checks(part, plan, h1_rows(plan, 80.0, 0.5))[1]
    )
    assert verdicts.checks(part, plan, h1_rows(plan_of("h1", seeds=1), 80.0, 2.0)) == []


def test_epochs_saved_by_logarithms():
    """Half the epochs and twice as many save nothing, where a mean of ratios has a loss of a
    quarter.
    """
    plan = plan_of("look")
    test, mean = (
        plans.test(what, "attn_high", "random", 10.0) for what in ("log_epochs", "epochs")
    )
    rows = h1_rows(plan, 80.0, 1.0)
    for seed, row in rows["random"].items():
        row["curve"] = rows["attn_high"][seed]["curve"] | {
            "epoch": [
                e * (2 if seed % 2 else 0.5) for e in rows["attn_high"][seed]["curve"]["epoch"]
            ]
        }
    rows["random"].pop(4)
    found, other = (verdicts.measure(t, plan, rows, GROUPS) for t in (test, mean))
    assert found["effect"] == pytest.approx(0, abs=1e-6) and other["effect"] == pytest.approx(-25)
    assert found["low"] < 0 < found["high"] < 100 and found["per_seed"] == other["per_seed"]
    even = verdicts.measure(test, plan, h1_rows(plan, 80.0, 1.4), GROUPS)
    assert (
        even["effect"] == pytest.approx(100 * (1 - 1 / 1.4), abs=3)
        and even["low"] > 10
        and verdicts.holds(even)
    )


def test_a_large_effect_is_supported():
    plan = plan_of("h1")
    found = judge(plan, h1_rows(plan, 85.0, 1.4))["H1"]
    assert found["verdict"] == "supported" and found["holm_p"] < 0.05
    top1, epochs = found["parts"][:2]
    assert top1["effect"] == pytest.approx(5, abs=0.8) and top1["bootstrap"]["low"] > 0
    assert (
        epochs["effect"] == pytest.approx(100 * (1 - 1 / 1.4), abs=3)
        and top1["n"] == 5
        and top1["power"] > 0.4
    )


def test_no_effect_refutes_a_claim_and_too_much_noise_decides_nothing():
    plan = plan_of("h1")
    found = judge(plan, h1_rows(plan, 80.0, 1.0, noise=0.1))["H1"]
    assert found["verdict"] == "refuted" and "is excluded" in found["because"]
    noisy = judge(plan, h1_rows(plan, 81.5, 1.2, noise=2.0))["H1"]
    assert noisy["verdict"] == "undecided" and noisy["parts"][0]["needed"] == "over 100"
    assert noisy["parts"][0]["power"] < 0.8


def test_a_guided_mask_that_ties_with_its_control_has_shown_nothing():
    plan = plan_of("h1")
    rows = h1_rows(plan, 85.0, 1.4)
    rows["attn_high:shuffle=1"] = rows["attn_high"]
    assert judge(plan, rows)["H1"]["verdict"] == "undecided"


@pytest.mark.parametrize("seeds, tie", [(1, False), (2, False), (2, True), (5, True)])
def test_few_seeds_or_seeds_that_tie_get_no_interval_no_p_and_no_colour(
    seeds, tie, tmp_path, monkeypatch
):
    plan = plan_of("h1", seeds)
    rows = h1_rows(plan, 85.0, 1.4)
    if tie:  # each seed names the same five images more, and is as fast
        for arm, own in rows.items():
            right = np.arange(IMAGES) < (240 if arm == "attn_high" else 235)
            for row in own.values():
                row |= {
                    "right": dict.fromkeys(("logistic", "cutout"), to_bits(right)),
                    "curve": own[0]["curve"],
                }
                row["metrics"]["top1"] = 100 * right.mean()
    table = verdicts.summary(plan, rows, GROUPS)
    test = table[1]["difference"]
    assert (
        test["low"]
        is test["high"]
        is test["p"]
        is test["holm_p"]
        is test["bootstrap"]
        is test["power"]
        is None
    )
    cells = report.compared(test)
    assert (
        f"; {seeds} seed" in cells[0]
        and "no interval" in cells[0]
        and "(" not in cells[0]
        and cells[1] == "-"
    )
    assert table[1]["top1"]["half"] is None
    found = judge(plan, rows)["H1"]
    assert found["verdict"] == "undecided" and found["p"] == 1 and " to " not in found["because"]
    assert " 0.000 " not in "\n".join(report.table_of_tests(found))
    drawn = []
    monkeypatch.setattr(study_figures, "save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr("common.plots.save", lambda figure, path: drawn.append(figure))
    values = {arm: [r["metrics"]["top1"] for r in own.values()] for arm, own in rows.items()}
    study_figures.bars(tmp_path / "bars.png", table, values, "")
    assert len(drawn[0].axes) == 1 and not drawn[0].axes[0].patches  # no bar, so none in a colour


def test_the_test_images_are_in_every_interval_of_a_share_of_them():
    plan = plan_of("h1")
    rows = h1_rows(plan, 85.0, 1.4, noise=0.05)
    test = verdicts.measure(plans.test("top1", "attn_high", "random", 1.0), plan, rows, GROUPS)
    alone = stats.paired_t(test["per_seed"])
    assert (
        test["high"] - test["low"] > 1.5 * (alone["high"] - alone["low"])
        and test["p_against"] > 0.5
    )
    assert test["over"] == "seeds and illustrations" and "alone" not in report.interval(test)
    epochs = verdicts.measure(plans.test("epochs", "attn_high", "random", 1.0), plan, rows, GROUPS)
    assert epochs["over"] == "seeds alone" and "over seeds alone)" in report.interval(epochs)


def test_pictures_of_the_study_end_at_100_percent(tmp_path, monkeypatch):
    plan, drawn = plan_of("h1"), []
    rows = synthetic(
        plan,
        dict.fromkeys(plan["arms"], 99.0),
        dict.fromkeys(plan["arms"], 5.0),
        noise=1.0,
        final=100,
    )
    table = verdicts.summary(plan, rows, GROUPS)
    monkeypatch.setattr(study_figures, "save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr("common.plots.save", lambda figure, path: drawn.append(figure))
    values = {arm: [r["metrics"]["top1"] for r in own.values()] for arm, own in rows.items()}
    study_figures.bars("bars.png", table, values, "")
    study_figures.curves(
        "c.png", {a: [r["curve"] for r in own.values()] for a, own in rows.items()}, {}, None, ""
    )
    study_figures.grid(
        "g.png", {"a": {"x": dict(zip("1234", plan["arms"], strict=False))}}, table, ""
    )
    bars, curves, grid = drawn
    assert bars.axes[0].get_xlim()[1] == 100 and {
        a.get_ylim()[1] for a in (*curves.axes, *grid.axes)
    } == {100}


def test_a_missing_seed_leaves_all_open():
    plan = plan_of("h1")
    rows = h1_rows(plan, 85.0, 1.4)
    del rows["green"][4]
    found = judge(plan, rows)["H1"]
    assert found["verdict"] == "undecided" and "4 of 5 planned seeds" in found["because"]
    assert judge(plan, {})["H1"]["verdict"] == "undecided"


def test_a_threshold_that_was_not_reached_is_a_bound():
    plan = plan_of("h1")
    slow = judge(plan, h1_rows(plan, 85.0, 0.3))[
        "H1"
    ]  # attn_high never gets there: no saving of 10 %
    assert slow["verdict"] == "refuted" and "never reached" in slow["parts"][1]["notes"][0]
    rows = h1_rows(plan, 85.0, 1.4)
    for row in rows["random"].values():
        row["curve"]["linear"] = [20.0 + e for e in row["curve"]["epoch"]]
    fast = judge(plan, rows)["H1"]  # random never does: at least this was saved
    assert (
        fast["verdict"] == "supported"
        and fast["parts"][1]["p_against"] == 1
        and fast["parts"][1]["effect"] > 25
    )
    for row in rows["attn_high"].values():
        row["curve"]["linear"] = [20.0 + e / 2 for e in row["curve"]["epoch"]]
    both = judge(plan, rows)["H1"]["parts"][1]  # equal bounds are not equal runs
    assert both["p"] is both["p_against"] is None and "nothing varies" in both["notes"][0]
    assert len(both["notes"]) == 2 and "is open" in both["notes"][1]
    plan["thresholds"]["random"] = 19.0
    assert "untrained" in judge(plan, rows)["H1"]["parts"][1]["notes"][0]


def test_variances_need_ten_seeds():
    def rows_for(seeds, spread):
        plan = plan_of("h2", seeds)
        top1, quick = (
            {arm: 80.0 for arm in plan["arms"]},
            {arm: 1.3 if "bg" in arm else 1.0 for arm in plan["arms"]},
        )
        rows = synthetic(plan, top1, quick, noise=3.0)
        calm = synthetic(plan, top1, quick, noise=spread)
        return judge(plan, rows | {arm: calm[arm] for arm in rows if "bg" in arm})

    assert rows_for(10, 0.3)["H2a at .5"]["verdict"] == "supported"
    few = rows_for(5, 0.3)["H2a at .5"]
    assert few["verdict"] == "undecided" and "need 10 seeds" in few["because"]


def test_holm_is_over_the_whole_family():
    """One hypothesis alone is judged as if the other five had been tried and had failed."""
    plan = plan_of("h1")
    found = judge(plan, h1_rows(plan, 82.0, 1.4))["H1"]
    assert found["holm_p"] == pytest.approx(min(1, 6 * found["p"]))


def test_the_epoch_that_crosses_is_interpolated_and_the_minute_is_compared():
    plan = plan_of("h1", 2)
    rows = h1_rows(plan, 80.0, 1.0)
    for row in rows["attn_high"].values():
        row["curve"] |= {
            "linear": [20.0, 50.0, 60.0],
            "epoch": [0, 10, 20],
            "seconds": [0, 1200, 2400],
        }
    assert verdicts.epochs_to(rows["attn_high"][0], 55.0) == 15
    table = {line["arm"]: line for line in verdicts.summary(plan, rows, GROUPS)}
    assert table["attn_high"]["then"] == 20 and table["attn_high"]["linear_then"]["mean"] == 50


def test_pairs_that_are_one_run_up_to_the_threshold_decide_nothing():
    """A mask that is guided later is random before: equal epochs are no finding about it, however
    often they are.
    """
    plan = plan_of("h1")
    found = judge(plan, h1_rows(plan, 85.0, 1.0, noise=0.1))["H1"]
    assert found["verdict"] == "refuted"  # each seed its own curve: noise of 2 % around no saving
    rows = h1_rows(plan, 85.0, 1.0, noise=0.1)
    for seed, row in rows["attn_high"].items():
        row["curve"] = rows["random"][seed]["curve"]
    same = judge(plan, rows)["H1"]
    assert same["verdict"] == "undecided" and "5 of 5 pairs are the same run" in same["because"]


def test_a_hypothesis_that_points_the_wrong_way_does_not_help_the_others():
    part = {
        "what": "top1",
        "n": 5,
        "planned": 5,
        "claim": 0.0,
        "low": 1.0,
        "p_against": 1.0,
        "bootstrap": None,
        "arm": "a",
        "against": "b",
        "unit": "points",
        "high": 3.0,
        "notes": [],
    }
    good, harm = part | {"effect": 2.0, "p": 0.03}, part | {"effect": -2.0, "p": 1e-4}
    found = verdicts.judge(
        [{"id": "H1", "parts": [good]}, {"id": "H3", "parts": [harm]}], {"H1": 1, "H3": 1}
    )
    assert found[0]["holm_p"] == pytest.approx(0.06) and found[0]["verdict"] == "undecided"


def test_what_comes_after_pre_training_has_its_own_difference():
    plan = plan_of("finetune", 3)
    rows = synthetic(plan, dict.fromkeys(plan["arms"], 50.0), dict.fromkeys(plan["arms"], 1.0))
    for arm, own in rows.items():
        for seed, row in own.items():
            row["metrics"]["finetuned"] = 90.0 + (
                seed - 4 if arm == "attn_high" else 0
            )  # 4, 3 and 2 points below
    text = report.arm_table(verdicts.summary(plan, rows, GROUPS), "mean")
    line = next(x for x in text if x.startswith("| `attn_high` |"))
    assert (
        "fine-tuned, %" in text[0]
        and "| 87.00 ± 1.00 | -3.00 (-5.48 to -0.52; n = 3, over seeds alone) |" in line
    )
    rng = np.random.default_rng(0)
    for own in rows.values():
        for row in own.values():
            row["right"]["finetuned"] = to_bits(
                rng.random(IMAGES) < row["metrics"]["finetuned"] / 100
            )
    with_bits = verdicts.summary(plan, rows, GROUPS)[1]["finetuned_difference"]
    assert with_bits["over"] == "seeds and illustrations" and with_bits["bootstrap"]
    assert with_bits["high"] - with_bits["low"] > 3 and "alone" not in report.interval(with_bits)
