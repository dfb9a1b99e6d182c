"""Run a plan: every arm with every seed -> a row each, then table.md, table.csv and figure.png.

    python -m lab.run mine --arms "middle:beta=3" --seeds 3    # your mask against random
    python -m lab.run mine --arms "random --source ../edited"  # edited code against this code
    python -m lab.run h1 --data datasets/faces20 --dry         # what would run, and how long
    python -m lab.run tags --data datasets/toon --set encoder=runs/first

Reads:  plans.py, datasets/NAME
Writes: OUT/PLAN-NAME/ PLAN.json, rows.jsonl, trials.jsonl, images.json, table.md, table.csv,
        figure.png; the runs' folders under --work

A command runs once. Its folder is named by a hash of its words and of the data, so that arms share
what they have in common. The same command of yours goes on after any kill: what has a row is not
made again, a run that was stopped is resumed. A run that diverges is a row that says so.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

import data
import mask as masking
from common.checkpoints import model_file
from common.door import each_flag_once, read_json, require
from common.groups import groups_of
from common.locks import lock_beside, locked
from common.train import (
    Parser,
    UserError,
    at_least,
    cli,
    commit,
    machine,
    parse_keys,
    pick_device,
    read_log,
    save_json,
)
from finetune_lora import METHODS
from lab import report
from lab.plans import PLANS

ROOT = Path(__file__).resolve().parent.parent
CODE = ("*.py", "common/*.py", "kernels/*.py", "apps/*.py", "ingest/*.py", "lab/*.py")
PILOT_SEED = 1000  # and the next ones: never reported
TRIAL_SEED = 500
SOURCE = " --source "  # in an arm; behind it, the folder of a checkout whose code the arm runs
OF_ALL = {"--epochs"}  # no arm has this flag for itself: a longer run learns more
OF_PLAN = {"--data", "--seed", "--split", "--out"}
READING = (
    "How to read it: the true difference may lie anywhere in the brackets. Where 0 is inside, these\n"
    "runs can't tell the two apart (undecided). More --seeds make the interval narrower. But fix their\n"
    "number before you look: who adds seeds until a verdict comes gets one by chance."
)
IN_PLACE = {"probe": "probe*.json", "unknown": "recognize.json", "stress": "stress-*.json"}
IN_PLACE["convnets"] = "recognize.json"  # it judges, where it is given a run
KEPT = "question", "compare", "differences", "hypotheses", "margin", "axes", "family", "less"
RUNNING = set()  # processes of ours
STOPPED = threading.Event()  # a thread that waited until then begins nothing more
TRIALS = defaultdict(threading.Lock)  # of two runs that ask for one trial, one makes it
MAKING = defaultdict(threading.Lock)  # and likewise a command


class Diverged(UserError):
    """A run whose loss is not finite: it would be so again."""


# ---- one command ---------------------------------------------------------------------------------


def checkout_of(words):
    """The checkout that a command runs: "../edited/pretrain.py" names it, "pretrain.py" is ours."""
    return Path(os.path.dirname(words[0]) or ROOT)


def folder_of(words, args):
    """Where the results of a command are -> its folder, its name, what it writes in another's."""
    script = words[1] if words[0] == "-m" else Path(words[0]).name
    stem = script.removesuffix(".py").rpartition(".")[2]
    text = shlex.join([*words, args.digest, args.code[checkout_of(words)]])
    name = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    target = Path(words[2] if words[0] == "-m" and len(words) > 2 else words[1])
    in_place = stem in IN_PLACE and args.work in target.parents
    return (target if in_place else args.work / name), name, IN_PLACE.get(stem)


def make(text, args):
    """Run a command, or go on with it, unless it is done -> the file in its folder that says so."""
    words = shlex.split(text)
    out, name, files = folder_of(words, args)
    checkout = checkout_of(words)
    done = out / f"{name}.done.json"
    # Threads wait for each other also where the system has no locks. (data.py has one, too.)
    with MAKING[name], locked(lock_beside(args.work / f"{name}.run"), wait=True) as lock:
        reason = read_json(done).get("failed") if done.exists() else None
        if done.exists() and reason is None:
            return done
        if reason and not args.retry:
            raise Diverged(reason)
        if out.name != name:  # it writes into the folder of another command
            for left in out.glob(f"**/{files}"):
                left.unlink()
        elif (out / "state.pt").exists() and reason is None:
            words = [*words[: 2 if words[0] == "-m" else 1], "--resume", str(out)]
        else:
            if reason or not (out / "folds").exists():  # finished folds are not trained again
                shutil.rmtree(out, ignore_errors=True)
            words += ["--out", str(out)]
        begun = out.name == name and out.exists()  # nobody knows the time of its first part
        row = {"command": f"python {text}", "commit": commit(checkout)}
        start = time.perf_counter()
        try:
            used = execute(words, args, args.work / f"{name}.log", lock)
        except Diverged as problem:
            save_json(row | {"failed": str(problem)}, done)
            raise
        if digest_of_code(checkout) != args.code[checkout]:
            raise UserError(f"the code changed while {out} was made; give the command again")
        seconds = round(time.perf_counter() - start, 1)
        save_json(row | ({} if begun else {"core_seconds": used, "seconds": seconds}), done)
    return done


def execute(words, args, log, lock):
    """Run a stage -> its CPU time in seconds, or None on Windows; what it prints goes to a file.

    It holds our lock, too, should we be killed.
    """
    print(f"OMP_NUM_THREADS={args.threads} python {shlex.join(words)}", flush=True)
    # Python looks for imports beside the script first, so an edited checkout runs its own code.
    checkout = checkout_of(words)
    script = words if words[0] == "-m" else [checkout / Path(words[0]).name, *words[1:]]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(checkout)}
    held = () if lock is None else (lock,)
    with open(log, "ab") as file:
        pipes = {"stdout": file, "stderr": file}
        process = subprocess.Popen([sys.executable, *script], env=env, pass_fds=held, **pipes)
        RUNNING.add(process)
        if STOPPED.is_set():
            process.terminate()
        used = None
        if hasattr(os, "wait4"):  # time of a core, which other work on the machine takes less of
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            used = round(usage.ru_utime + usage.ru_stime, 1)
        status = process.wait()
        RUNNING.discard(process)
    if status:
        last = (log.read_text("utf-8", errors="replace").strip().splitlines() or ["no word"])[-1]
        kind = Diverged if "is not finite at step" in last else UserError
        raise kind(f"python {shlex.join(words)} ended with {status}: {last} (see {log})")
    return used


# ---- a chain of commands -------------------------------------------------------------------------


def chain(templates, args, seed, flags="", share=1.0):
    """Make commands one after the other, flags behind the first -> what `make` returns of each."""
    made = []
    encoder = templates in args.plan.get("made", {}).values()
    budget = "encoder_minutes" if encoder else "minutes", share
    for i, template in enumerate(templates):
        text = template if i else f"{template} {flags}".strip()
        folders = [done.parent for done in made]
        made.append(make(filled(text, args, folders, seed, budget), args))
    return made


def filled(text, args, folders, seed, budget):
    """A template -> the command: what it names in braces is made first."""
    words = args.set | {"data": shlex.quote(str(args.data)), "seed": seed}
    folders = [shlex.quote(str(folder)) for folder in folders]
    for name, commands in args.plan.get("made", {}).items():
        if f"{{{name}}}" in text:
            made = chain(commands, args, seed, best_flags(name, args))
            words[name] = shlex.quote(str(made[-1].parent))
    if "{epochs}" in text:
        words["epochs"] = epochs_in(text.format(*folders, **words | {"epochs": 1}), args, *budget)
    return shlex.join(each_flag_once(shlex.split(text.format(*folders, **words))))


def epochs_in(command, args, minutes, share):
    """How many epochs of a command fill the plan's minutes of one core: one epoch is timed."""
    log = read_log(make(command, args).parent / "log.jsonl")
    speed = median(row["images_per_s"] for row in log if "images_per_s" in row)
    seconds = 60 * share * float(args.set[minutes]) / args.threads
    return max(1, round(seconds * speed / args.images))


def best_flags(name, args):
    """The flags with which an arm, or what arms are made of, is best on dev."""
    name = args.plan.get("tuned_as", {}).get(name, name)
    trials = args.plan.get("trials", {}).get(name, [""])
    if len(trials) == 1:
        return trials[0]
    scores = {flags: score_of(name, flags, args) for flags in trials}
    return max(scores, key=scores.get)


def score_of(name, flags, args):
    """The score of a trial on dev, from trials.jsonl where it is there; -1: it diverged."""
    path = args.folder / "trials.jsonl"
    with TRIALS[name, flags]:
        for row in read_log(path):
            of_code = row.get("code", args.code[ROOT])  # older rows do not say it
            same = (row["name"], row["flags"], of_code) == (name, flags, args.code[ROOT])
            if same and not (args.retry and row["score"] < 0):
                return row["score"]
        score = score_on_dev(name, flags, args)
        row = {"name": name, "flags": flags, "seed": TRIAL_SEED, "score": score}
        add_row(path, row | {"code": args.code[ROOT]})
        return score


def score_on_dev(name, flags, args):
    """The score of a trial; none is worse than one that diverges."""
    plan = args.plan
    share = plan.get("trial_share", 1.0)
    file, key = plan["dev"]
    with contextlib.suppress(Diverged):
        if name in plan.get("made", {}):
            made = chain(plan["made"][name], args, TRIAL_SEED, flags, share)
            judge = plan["judge"].replace("{0}", shlex.quote(str(made[-1].parent)))
            out = chain([judge], args, TRIAL_SEED)[0].parent
        else:
            out = chain(plan["arms"][name][:1], args, TRIAL_SEED, flags, share)[0].parent
        if file.endswith(".jsonl"):
            return max(row[key] for row in read_log(out / file) if key in row)
        return value_at(out / file, key)
    return -1.0


# ---- one run: an arm with a seed -----------------------------------------------------------------


def value_at(path, keys):
    """The value at "a/b/c" in a JSON file; None where it has none."""
    value = read_json(path)
    for key in keys.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def found_in(folder, file, keys, args):
    """The value in a file of a run; results of another split are in a folder of its name."""
    other = folder / f"{args.data.resolve().name}-{args.set['split']}" / file
    return value_at(other if other.exists() else folder / file, keys)


def curve_of(log):
    """Rows of log.jsonl -> epoch, knn, linear, mse, and seconds without the evaluations."""
    curve = {name: [] for name in ("epoch", "knn", "linear", "mse", "seconds")}
    evaluating, before = 0.0, 0.0
    for row in log:
        if None not in map(row.get, ("knn", "linear", "val_mse")):
            evaluating += row["seconds"] - before
            point = row | {"mse": row["val_mse"], "seconds": row["seconds"] - evaluating}
            for name, values in curve.items():
                values.append(round(point[name], 4))
        before = row.get("seconds", before)
    return curve


def row_of(arm, seed, args):
    """Make the runs of an arm with a seed -> its row."""
    plan = args.plan
    source = source_of(arm)
    row = {"arm": arm, "seed": seed, "phase": "run", "data": args.data.name}
    row |= {"commit": commit(source), "code": args.code[source]}
    row |= {"machine": machine(args.device), "metrics": {}, "right": {}}
    if seed in range(PILOT_SEED, PILOT_SEED + plan.get("pilots", 0)):
        row["phase"] = "pilot"
    try:
        row["flags"] = best_flags(arm, args)
        made = chain(plan["arms"][arm], args, seed, row["flags"])
    except Diverged as problem:
        return row | {"failed": str(problem)}
    folders = [done.parent for done in made]
    for name, (_, *source) in plan["columns"].items():
        if source:
            step, file, keys, factor = source
            value = found_in(folders[step], file, keys, args)
            row["metrics"][name] = None if value is None else factor * value
    for name, (step, file, keys) in plan.get("right", {}).items():
        row["right"][name] = found_in(folders[step], file, keys, args)
    if "curve" in plan:
        row["curve"] = curve_of(read_log(folders[plan["curve"]] / "log.jsonl"))
    found = [read_json(done) for done in dict.fromkeys(made)]
    row["commands"] = [done["command"] for done in found]
    for name in ("seconds", "core_seconds"):
        times = [done.get(name) for done in found]
        if None not in times:
            row[name] = round(sum(times), 1)
    return row


def add_row(path, row):
    """Append a row, whole, behind whatever a killed process left."""
    with locked(lock_beside(path), wait=True), open(path, "ab+") as file:
        end = file.tell()
        file.seek(max(0, end - 1))
        torn = end > 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


# ---- all runs ------------------------------------------------------------------------------------


def check(args, arms):
    """What a plan needs, before its first run: splits, labels, masks, libraries, a GPU."""
    plan = args.plan
    train, held = (data.open_split(args.data, name) for name in ("train", args.set["split"]))
    if plan.get("right") and not (data.has_labels(train) and data.has_labels(held)):
        raise UserError(f"{args.data}: this plan needs two classes, and labels on all images")
    for name, fix in plan.get("planes", {}).items():
        if name not in train:
            raise UserError(f"{args.data} has no {name}, which {args.name} needs; {fix} makes some")
    args.digest = data.digest(args.data)
    commands = json.dumps([plan["arms"][arm] for arm in arms] + [plan.get("made")])
    networks = {args.set.get("encoder"), *re.findall(r"weights/[\w-]+", commands)} - {None}
    for file in map(model_file, sorted(networks)):
        if file.is_file():  # a network that was made anew is another one
            args.digest += f"-{digest_of([file])[:6]}"
    args.images = len(train["images"])
    args.groups = groups_of(held).tolist()
    encoder = args.set.get("encoder")
    if encoder and not Path(encoder).exists():
        raise UserError(f"{encoder} does not exist; give --set encoder=RUN, of pretrain.py")
    text = shlex.join([*arms, *args.set.values(), *(c for arm in arms for c in plan["arms"][arm])])
    for word, (extra, library) in plan.get("needs", {}).items():
        if word in text:
            require(extra, library)
    torch.set_num_threads(args.threads)  # a row names the machine so
    asked = re.search(r"--device (\w+)", text)
    args.device = pick_device(asked[1] if asked else "auto")
    for arm in arms if "template" in plan else ():
        if SOURCE not in arm:  # edited code may know others
            parse_keys(arm.split(" ")[0], names_of(plan), "--arms")
        if arm not in PLANS[args.name]["arms"]:
            check_flags(arm, args)
        if "--maps truth" in arm and "fg" not in train:
            raise UserError(f"{args.data} has no true maps: {arm} can't run there")


def check_flags(arm, args):
    """An arm of the user's own: the flags that it may have, and the checkout that it names."""
    given = {word.split("=")[0] for word in arm.split()}
    if planned := given & OF_PLAN:
        raise UserError(f"--arms {arm}: the plan gives {min(planned)}; leave it out")
    if unequal := given & OF_ALL:
        flag = min(unequal)
        everyone = shlex.quote(f"recipe={args.set['recipe']} {flag} ...")
        raise UserError(f"--arms {arm}: {flag} has to be equal in all arms: --set {everyone}")
    source = source_of(arm)
    if ("--source" in given) != (SOURCE in arm) or not (source / "pretrain.py").exists():
        raise UserError(
            f"--arms {arm}: give --source DIR, a checkout of this repository, behind the flags of both"
        )
    if SOURCE in arm and any(command.startswith("-m") for command in args.plan["template"]):
        raise UserError(f"--arms {arm}: plan {args.name} can't run another checkout; plan mine can")
    if SOURCE in arm and digest_of_code(source) == digest_of_code(ROOT):
        raise UserError(f"--arms {arm}: the code there is the same as here; edit it there")


def source_of(arm):
    """The checkout whose code an arm runs."""
    return Path(arm.partition(SOURCE)[2].partition(" --")[0] or ROOT)


def against(plan, arm):
    """The arm that an arm is compared with."""
    where = plan["against"]
    return where.get(arm, arm) if isinstance(where, dict) else where


def names_of(plan):
    """{name: keys} with which an arm of the user's own may begin: methods, or masks."""
    return METHODS if "--method {arm}" in plan["template"][0] else masking.PARAMS


def with_masks(plan, arms):
    """A plan with arms of the user's own; what an arm is compared with is among the arms.

    For an arm of the user's that is the plan's first one. For edited code it is the same arm of this
    code, where this code knows the mask or method.
    """
    edited = {}
    for arm in arms:
        same, source, _ = arm.partition(SOURCE)
        if source:
            known = re.split("[: ]", same)[0] in names_of(plan)
            edited[arm] = same if known else next(iter(plan["arms"]))
    arms = [*edited.values(), *arms]
    own = [arm for arm in arms if arm not in plan["arms"]]
    commands = plan["arms"] | dict.fromkeys(own, plan["template"])
    for arm, templates in commands.items():
        same, _, edit = arm.partition(SOURCE)
        # Flags behind the folder are those of the edited code alone.
        source, *more = edit.partition(" --")
        source = f"{shlex.quote(source)}/" if source else ""
        scripts = [template.replace("{arm}", same + "".join(more)) for template in templates]
        commands[arm] = [source + script for script in scripts]
    baselines = dict.fromkeys(commands, next(iter(plan["arms"])))
    if isinstance(plan["against"], dict):
        baselines |= plan["against"]
    baselines |= edited
    arms = list(dict.fromkeys([*(baselines[arm] for arm in arms), *arms]))
    return plan | {"arms": commands, "against": baselines}, arms


def chosen(args):
    """-> the plan, the arms that are asked for, and [(arm, seed)], seed by seed: whole pairs."""
    plan = args.plan
    arms = list(args.arms or plan["arms"])
    if "template" in plan:
        plan, arms = with_masks(plan, arms)
    unknown = [arm for arm in arms if arm not in plan["arms"]]
    if unknown:
        raise UserError(f"--arms {unknown[0]} is unknown; choose from {', '.join(plan['arms'])}")
    first = plan["seeds"][0]
    count = args.seeds or len(plan["seeds"])
    seeds = range(first, first + count)
    bases = {against(plan, arm) for arm in arms}
    pilots = range(PILOT_SEED, PILOT_SEED + plan.get("pilots", 0))
    jobs = [(arm, seed) for seed in pilots for arm in arms if arm in bases]
    return plan, arms, seeds, jobs + [(arm, seed) for seed in seeds for arm in arms]


def unlike(old, new):
    """The names that two tables share with other values."""
    return [name for name, value in new.items() if old.get(name, value) != value]


def save_plan(args, arms, seeds, folder):
    """PLAN.json: what the rows are compared by. Arms and seeds of earlier calls stay."""
    path = folder / "PLAN.json"
    with locked(lock_beside(path), wait=True):
        now = {"set": args.set, "digest": args.digest}
        tables = {
            "commands": {arm: args.plan["arms"][arm] for arm in arms},
            "made": args.plan.get("made", {}),
            "sources": {name: list(column[1:]) for name, column in args.plan["columns"].items()},
        }
        old = read_json(path) if path.exists() else {"arms": {}, "seeds": []} | now
        if unlike(old, now) or any(unlike(old.get(k, {}), table) for k, table in tables.items()):
            other = f"other settings, data or commands ({old['set']})"
            raise UserError(f"{folder} has rows by {other}; give those again, or another --out")
        plan = {name: args.plan[name] for name in KEPT if name in args.plan} | now
        plan |= {"plan": args.name, "data": args.data.name, "split": args.set["split"]}
        plan["columns"] = {name: column[0] for name, column in args.plan["columns"].items()}
        # Arms and seeds that the plan names are planned also where fewer were asked for: p is corrected
        # for all of them, and until all are there, nothing is decided.
        planned = [*PLANS[args.name]["arms"], *arms]
        plan["arms"] = old["arms"] | {arm: against(args.plan, arm) for arm in planned}
        plan["seeds"] = sorted({*old["seeds"], *seeds, *args.plan["seeds"]})
        plan |= {k: old.get(k, {}) | table for k, table in tables.items()}
        save_json(plan, path, None)
        if args.plan.get("right"):
            found = {"split": args.set["split"], "groups": args.groups}
            save_json(found, folder / "images.json", None)


def code_files(checkout):
    """Its Python files but the tests, in order."""
    paths = sorted(path for pattern in CODE for path in Path(checkout).glob(pattern))
    return [path for path in paths if path.is_file()]  # Emacs leaves links to nothing


def digest_of(paths):
    """A hash of what these files hold, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def digest_of_code(checkout):
    """A hash of what trains and measures: after an edit, rows that are there are of other code."""
    ours = [checkout / f"lab/{name}.py" for name in ("plans", "run", "report", "stats")]
    return digest_of(path for path in code_files(checkout) if path not in ours)[:10]


def said(row, plan):
    """A row's numbers under their headings, or why it has none."""
    columns = {name: column[0] for name, column in plan["columns"].items()}
    known = {name: value for name, value in row["metrics"].items() if value is not None}
    numbers = ", ".join(f"{columns[name]}: {value:.2f}" for name, value in known.items())
    return row.get("failed", numbers)


def run_all(jobs, args, folder):
    """Make these runs, some side by side; each row is written when it is there -> failures."""
    failed = []

    def one(job):
        try:
            row = row_of(*job, args)
            add_row(folder / "rows.jsonl", row)
            print(f"{job[0]}, seed {job[1]}: {said(row, args.plan)}", flush=True)
        except Exception as problem:  # whatever it is, the other runs go on
            reason = problem if isinstance(problem, UserError) else repr(problem)
            failed.append(f"{job[0]}, seed {job[1]}: {reason}")
            print(f"failed: {failed[-1]}", flush=True)

    STOPPED.clear()
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for future in [pool.submit(one, job) for job in jobs]:
            future.result()
    finally:
        STOPPED.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            # A stage saves, and goes on next time. Windows would kill it, but has told it already.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30 if os.name == "nt" else 0)
            process.terminate()
    return failed


def time_of(jobs, args):
    """How long these runs take, by the rows that there are of this plan and its settings -> a line.

    Those in args.folder were made here; published ones perhaps on a faster machine.
    """
    for folder in (args.folder, *sorted(ROOT.glob(f"results/*/{args.folder.name}"))):
        rows = [row for row in report.read_rows(folder) if "seconds" in row]
        if rows and read_json(folder / "PLAN.json").get("set") == args.set:
            break
    else:
        return "how long is unknown: no run of this plan with these settings has a row yet"
    each = median(row["seconds"] for row in rows) / 60
    total = each * len(jobs) / args.jobs
    machines = " and ".join(sorted({row["machine"] for row in rows}))
    text = f"about {total:.0f} minutes: {len(jobs)} runs of {each:.1f} minutes, the median of "
    text += f"{len(rows)} in {os.path.relpath(folder)} ({machines})"
    commands = shlex.join(command for arm, _ in jobs for command in args.plan["arms"][arm])
    if any(f"{{{name}}}" in commands for name in args.plan.get("made", {})):
        text += "; what the arms share is made first, and comes on top"
    return text


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", choices=PLANS, metavar="PLAN", help=", ".join(PLANS))
    add("--data", default="datasets/toon", metavar="DIR", help="packed set (default: %(default)s)")
    add(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="only these; masks or methods, with flags, --source DIR",
    )
    add("--seeds", type=at_least(1), metavar="N", help="of every arm (default: the plan's)")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="words in braces of the plan")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="runs side by side")
    add("--threads", type=at_least(1), default=os.cpu_count(), metavar="N", help="of each run")
    add("--out", type=Path, default=Path("runs/lab"), metavar="DIR", help="of the tables")
    add("--work", type=Path, default=Path("runs/work"), metavar="DIR", help="of the runs' folders")
    add("--retry", action="store_true", help="try again what diverged")
    add("--dry", action="store_true", help="pack --data if need be, say what would run, and stop")
    args = parser.parse_args()
    if unknown := [pair for pair in args.set if "=" not in pair]:
        raise UserError(f"--set {unknown[0]} is no NAME=VALUE")
    args.plan = PLANS[args.name]
    given = dict(pair.split("=", 1) for pair in args.set)
    if unknown := sorted(given.keys() - args.plan["set"].keys()):
        known = ", ".join(args.plan["set"])
        raise UserError(f"--set {unknown[0]} is unknown; {args.name} has {known}")
    commands = json.dumps([args.plan.get(name) for name in ("arms", "template", "made", "judge")])
    if "split" in given and "{split}" not in commands:
        raise UserError(f"--set split has no effect: commands of plan {args.name} choose their own")
    args.set = args.plan["set"] | given
    return args


def main():
    args = parse_args()
    args.plan, arms, seeds, jobs = chosen(args)
    args.data = Path(data.open_or_pack(args.data))
    check(args, arms)
    args.folder = folder = args.out / f"{args.name}-{args.data.name}"
    rows = [row for row in report.read_rows(folder) if not (args.retry and "failed" in row)]
    done = {(row["arm"], row["seed"]) for row in rows}
    left = [job for job in jobs if job not in done]
    print(f"{folder}: {len(jobs)} runs, {len(jobs) - len(left)} done", flush=True)
    sources = {source_of(arm) for arm in [*arms, *(row["arm"] for row in rows)]}
    args.code = {source: digest_of_code(source) for source in sources | {ROOT}}
    codes = [(row.get("code"), args.code[source_of(row["arm"])]) for row in rows]
    if older := sum(made not in (None, now) for made, now in codes):
        again = shlex.join(["rm", "-r", str(folder)])
        print(f"warning  {older} rows were made by other code; {again}, and they are made again")
    if args.dry:
        print(*(f"  {arm}, seed {seed}" for arm, seed in left), sep="\n")
        print(time_of(left, args))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which nohup ignores
    save_plan(args, arms, seeds, folder)
    failed = run_all(left, args, folder)
    study = report.judged([report.open_folder(folder)])[0]
    if study.rows:
        report.write(study, figure=True)
        print("", (folder / "table.md").read_text("utf-8"), READING, sep="\n")
        print(f"wrote    {folder}/table.md, table.csv, figure.png")
    if failed:
        raise UserError(f"{len(failed)} runs failed, repeat the command; the first: {failed[0]}")
    if not study.rows:
        raise UserError(f"every run diverged, see {folder}/rows.jsonl; --retry makes them again")


if __name__ == "__main__":
    cli(main)
