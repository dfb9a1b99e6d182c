"""One run of the study: the stages as a user calls them, and what they wrote as one row. study.py plans them."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common import features
from common.io import UserError, lock_beside, locked, save_json
from common.train import commit, read_log
from experiments import plans
from experiments.tables import replace_rows, rows_there

ROOT = Path(__file__).resolve().parent.parent
RUNNING = set()  # processes of ours


def read_rows(folder):
    """Rows of a study, each run once, as it was written last."""
    return list(
        {row["key"]: row for row in read_log(folder / "rows.jsonl") if "key" in row}.values()
    )


def number_format(plan):
    """Flags of the number format that the pilot ran in; none before there is a pilot: the machine
    chooses.
    """
    return ["--dtype", plan["dtype"]] if plan.get("dtype") else []


def pool_of(plan):
    """Which pooling of the tokens a plan is about: the mean where it does not say."""
    return plan.get("pool", "mean")


def pilot_seeds(plan):
    """Never reported: they fix the threshold."""
    return range(plan["pilot_seed"], plan["pilot_seed"] + plan.get("pilots", 1))


def is_whole(job):
    """Does this run get the whole probe? The first pilot's brings the controls."""
    return job["seed"] == job["plan"]["pilot_seed"]


def commands(job, args, ready):
    """-> {stage: words}: what a user would type behind `python`. A recipe may evaluate less often
    than every epoch.
    """
    out, data, plan = str(job["out"]), str(args.data), job["plan"]
    on = [
        "--data",
        data,
        "--split",
        plan["split"],
        "--seed",
        str(job["seed"]),
        *number_format(plan),
    ]
    recipe = shlex.split(f"{plan['recipe']} --mask {job['arm'].format(**ready)}")
    if not any(
        word.split("=")[0] == "--contrast" for word in recipe
    ):  # none unless the plan says so
        recipe += ["--contrast", "none"]
    probe = [
        "probe.py",
        out,
        "--data",
        data,
        "--split",
        plan["split"],
        "--pool",
        pool_of(plan),
        *number_format(plan),
    ]
    every = {
        "pretrain": ["pretrain.py", "--eval-every", "1", *recipe, *on, "--out", out],
        "probe": probe + ([] if is_whole(job) else ["--headline"]),
        "stress": [
            "-m",
            "experiments.stress",
            *probe[1:],
            "--only",
            "cutout",
            "--images",
            "1000000",
        ],
        "finetune": ["finetune_lora.py", out, "--method", "full", *on, "--out", f"{out}-full"],
    }
    return {stage: every[stage] for stage in job["stages"]}


def going_on(words):
    """A command -> the same, or what goes on with the run that it left in its --out."""
    if "--out" not in words:
        return words
    out = words[words.index("--out") + 1]
    begun = (Path(out) / "state.pt").exists()
    return [words[0], "--resume", str(out)] if begun else words


def execute(words, log, threads, lock=None):
    """Run a stage, what it prints goes behind the log; it holds the lock, too, should we be killed.

    A stage that fails is a UserError with its last line.
    """
    script = words if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    locks = () if lock is None else (lock,)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *script], stdout=file, stderr=file, env=env, pass_fds=locks
        )
        RUNNING.add(process)
        status = process.wait()
        RUNNING.discard(process)
    if status:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise UserError(
            f"python {shlex.join(words)} ended with {status}: {last} (all of it: {log})"
        )


def run_one(job, args, ready):
    """Make one run -> its row. Finished pre-training is not repeated, one that was stopped goes on."""
    out, seconds = job["out"], {}
    made = out / "made.json"  # pretrain.py is through: the commit that it ran at
    with locked(lock_beside(out), wait=True) as lock:
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("**/probe*.json"):  # of a study that was stopped before its row
            old.unlink()
        for stage, words in commands(job, args, ready).items():
            if stage == "pretrain" and made.exists() and (out / "model.safetensors").exists():
                continue
            start_time = time.perf_counter()
            try:
                execute(going_on(words), out / "study.log", args.threads, lock)
            except UserError as problem:
                if stage != "pretrain" or "the loss is not finite" not in str(problem):
                    raise
                return about(job, args, ready) | {"commit": commit(), "error": "diverged"}
            seconds[stage] = round(time.perf_counter() - start_time, 1)
            if stage == "pretrain":
                save_json({"commit": commit()}, made)
        row = collect(job, args, ready, seconds, json.loads(made.read_text())["commit"])
        (out / "state.pt").unlink(missing_ok=True)  # a hundred megabytes
    return row


def about(job, args, ready):
    """What a row says before anything is measured."""
    before = [
        group for name, group in ready.get("commands", {}).items() if f"{{{name}}}" in job["arm"]
    ]
    stages = [*sum(before, []), *commands(job, args, ready).values()]
    lines = [f"OMP_NUM_THREADS={args.threads} python {shlex.join(words)}" for words in stages]
    row = {k: job[k] for k in ("key", "arm", "seed", "phase")} | {
        k: job["plan"][k] for k in ("plan", "data", "split")
    }
    return row | {"stages": job["stages"], "commands": lines}


def curve_of(log):
    """Rows of log.jsonl -> epoch, knn, linear, mse, and seconds without evaluations, which only the
    study needs.
    """
    curve, evaluating, before = (
        {name: [] for name in ("epoch", "knn", "linear", "mse", "seconds")},
        0.0,
        0.0,
    )
    for row in log:
        if "knn" in row:
            evaluating += row["seconds"] - before
            point = row | {"mse": row["val_mse"], "seconds": row["seconds"] - evaluating}
            for name, values in curve.items():
                values.append(round(point[name], 4))
        before = row["seconds"]
    return curve


def scores_of(out, split):
    """What finetune_lora.py says of a run: metrics.json of val, metrics-SPLIT.json of another
    split.
    """
    return Path(out) / f"metrics{features.split_suffix(split)}.json"


def collect(job, args, ready, seconds, commit):
    """What the stages wrote -> the row: configuration, commands, machine, seconds, every metric,
    each image's right.
    """
    out, split, pool, log = (
        job["out"],
        job["plan"]["split"],
        pool_of(job["plan"]),
        read_log(job["out"] / "log.jsonl"),
    )
    found, name = (
        features.results_folder(out, args.data, split),
        "probe" + "-headline" * (not is_whole(job)),
    )
    probe = json.loads((found / f"{name}.json").read_text())
    heads = probe["rows"][pool]
    metrics = {"top1": 100 * heads["logistic"]["top1"], "knn": 100 * heads["knn"]["top1"]}
    metrics |= {f"{k}_logistic": v for k, v in heads["logistic"].items() if not isinstance(v, list)}
    metrics |= {k: v for k, v in heads.items() if k in ("retrieval", "few_shot")}
    metrics["linear_thumbnail"] = next(
        (r["linear_thumbnail"] for r in log if "linear_thumbnail" in r), None
    )
    metrics["peak_memory_mb"] = max((r["memory_mb"] for r in log if "memory_mb" in r), default=None)
    metrics["attention_on"] = next(
        (r["attention_on"] for r in reversed(log) if "attention_on" in r), None
    )
    seconds = seconds | {"pretrain": log[-1]["seconds"]}  # of all its starts, had it been stopped
    row = about(job, args, ready) | {
        "commit": commit,
        "machine": probe["machine"],
        "config": probe["config"],
    }
    row |= {"seconds": seconds, "metrics": metrics, "curve": curve_of(log), "right": probe["right"]}
    if is_whole(job):
        controls = {
            name: r for name, r in probe["rows"].items() if name != pool and "logistic" in r
        }
        row["controls"] = {name: 100 * r["logistic"]["top1"] for name, r in controls.items()}
    if "stress" in job["stages"]:
        stress = json.loads((found / "stress-cutout.json").read_text())
        (metrics["cutout"],), (row["right"]["cutout"],) = (
            stress["top1"].values(),
            stress["right"].values(),
        )
    if "finetune" in job["stages"]:
        tuned = json.loads(scores_of(f"{out}-full", split).read_text())
        metrics["finetuned"] = tuned["top1"]
        row["right"] |= {"finetuned": tuned["right"]} if "right" in tuned else {}
    return row


# ---- plan adapt: runs of finetune_lora.py, a row of a CSV each -----------------------------------

KEEP = (
    "run",
    "result",
    "phase",
    "method",
    "head",
    "r",
    "margin",
    "lr",
    "head_lr",
    "epochs",
    "keep",
    "seed",
    "evaluated_on",
    "top1",
    "top5",
    "macro_f1",
    "best_epoch",
    "parameters_trained",
    "share_trained_percent",
    "gradient_and_optimizer_mb",
    "step_ms",
    "peak_memory_mb",
    "seconds",
    "machine",
    "commit",
    "command",
)


def method_flags(method, args, phase):
    """What a method needs on the command line besides its learning rate."""
    if method == "linear":
        return ["--method", "linear"]
    epochs = args.trial_epochs if phase == "rates" else args.epochs or 8
    flags = [
        "--keep",
        args.keep,
        "--epochs",
        epochs * (args.scratch_times if method == "scratch" else 1),
    ]
    return (
        ["--method", "full", *flags, "--from-scratch"]
        if method == "scratch"
        else ["--method", method, *flags]
    )


def adapt_rows(args, path):
    """Yield the rows at path, a CSV, as runs are added. What has a row is not repeated, a killed
    run goes on.
    """
    rows, wanted = rows_there(path, KEEP), [str(args.encoder), "--data", str(args.data)]
    if other := [r["command"] for r in rows if flags_in(r["command"])[: len(wanted)] != wanted]:
        raise UserError(
            f"{path} has rows of another encoder or data set ({other[0]}); give another --out"
        )
    for phase in args.phases:
        for name, method, flags in plans.trials(
            phase, args.methods, plans.best_learning_rates(rows)
        ):
            out = Path(args.work) / f"{phase}-{name}"
            flags = ["--out", out, *method_flags(method, args, phase), *flags]
            words = ["finetune_lora.py", *wanted, *map(str, flags)]
            print(line := shlex.join(["python", *words]), flush=True)
            if args.dry:
                continue
            scores = scores_of(out, "dev" if phase == "rates" else "val")
            old = [r for r in rows if r["run"] == out.name]
            there = [json.loads(scores.read_text())] if scores.exists() else []
            for place, row in [(path, r) for r in old] + [(out, r) for r in there]:
                if flags_in(row["command"]) != flags_in(line):
                    raise UserError(
                        f"{place} has {out.name} by other flags ({row['command']}); give them again, or "
                        "another --out and --work"
                    )
            if old:
                yield rows
                continue
            if not there:
                with locked(lock_beside(out), wait=True) as lock:
                    words = going_on(words)
                    execute(words, out.with_suffix(".log"), args.threads, lock)
            found = json.loads(scores.read_text())
            found = found["config"] | found | {"phase": phase, "result": method}
            found["keep"] = "1" if method == "linear" else args.keep
            row = {k: found.get(k, "") for k in KEEP}
            for k, v in row.items():
                row[k] = round(v, 3) if isinstance(v, float) and v > 1 else v
            replace_rows(path, [row], ["run"])
            yield (rows := rows_there(path, KEEP))


def flags_in(line):
    """A command line of finetune_lora.py -> its words, without the script and the run folder: what
    decides its row.
    """
    words = shlex.split(line)[2:]
    at = words.index("--out") if "--out" in words else len(words)
    return words[:at] + words[at + 2 :]
