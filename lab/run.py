"""Run a plan: every arm with every seed -> a row each, then table.md, table.csv and figure.png.

    python -m lab.run mine --arms "middle:beta=3" --seeds 3    # your mask against random
    python -m lab.run ways --arms lora:r=4 full                # ways to fine-tune against LoRA
    python -m lab.run mine --arms "random --source ../edited"  # edited code against this code
    python -m lab.run results/study/h1-toon --dry              # a published plan: what would run

Reads:  PLAN.json of a folder, or lab/mine.json, lab/ways.json; datasets/NAME
Writes: OUT/PLAN-NAME/ PLAN.json, rows.jsonl, images.json, table.md, table.csv, figure.png;
        the runs' folders under --work

A command runs once. Its folder is named by a hash of its words, of the data and of the code, so
that arms share what they have in common. After a kill, give the same command again: what has a row
is not made again, and a run that was stopped is resumed. A run that fails is a row that says so,
and is tried again.

A plan is a JSON object. In its commands, {0} is the folder of the arm's first command, {seed} and
{data} are what they say, and other words in braces stand in `set` or `made`.

plan, question, data, split    what it is called, what it asks, and of which pictures
set         {word: value}: --set replaces them
seeds       of every arm, paired
arms        {arm: the one that it is compared with}; itself: with none; "best": p counts all pairs
commands    {arm: its commands}, made one after the other
template    the commands of an arm of your own, where {arm} is what --arms says
commit      {arm: the commit whose code can make it}: today's can't
made        {word: commands}: {word} is the folder of the last one, which is made once
columns     {column: heading};   sources {column: [command, file, path in the file, factor]}
right       {column: [command, file, path]}: which pictures were right (else, intervals of seeds)
compare     columns that get a difference, an interval, p and a verdict;   less: best if small
differences, margin            further differences; how many points count as equal
curve       the command whose log.jsonl tells the epochs to a threshold
thresholds  {arm: accuracy, in percent, that counts as reached by runs that are compared with it}
hypotheses  [{id, parts: differences with a claim}];   family {id: number of parts}: all planned
together    a word that plans share whose hypotheses are corrected together
"""

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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median

import torch

import data
import mask as masking
from common.checkpoints import model_file
from common.door import read_json
from common.groups import groups_of
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
    save_text,
)
from finetune_lora import METHODS
from lab import report

ROOT = Path(__file__).resolve().parent.parent
OURS = ("mine", "ways")  # plans that take arms of your own
SOURCE = " --source "  # in an arm; behind it, the folder of a checkout whose code the arm runs
# In all arms, or the comparison is unfair.
EQUAL = {"--data", "--seed", "--split", "--out", "--epochs"}
READING = (
    "How to read it: the true difference may lie anywhere in the brackets. Where 0 is inside,\n"
    "these runs can't tell the two apart (undecided). More --seeds make the interval narrower.\n"
    "But fix their number before you look: who adds seeds until a verdict comes gets one by chance."
)
IN_PLACE = {  # what a stage writes into the folder of the run that it is given
    "probe": "probe*.json",
    "unknown": "recognize.json",
    "stress": "stress.json",
    "convnets": "recognize.json",
}
RUNNING = set()  # processes of ours
STOPPED = threading.Event()  # a thread that waited until then begins nothing more
MAKING = defaultdict(threading.Lock)  # of two arms that share a command, one makes it


# ---- one command ---------------------------------------------------------------------------------


def checkout_of(words):
    """The checkout that a command runs: "../edited/pretrain.py" names it, "pretrain.py" is ours."""
    return Path(os.path.dirname(words[0]) or ROOT)


def code_of(checkout):
    """A hash of what trains and measures, which is all but the bookkeeping of this folder."""
    folders = (".", "common", "kernels", "apps", "ingest", "lab")
    paths = sorted(path for name in folders for path in (checkout / name).glob("*.py"))
    bookkeeping = [checkout / f"lab/{name}.py" for name in ("run", "report", "stats")]
    found = [path.read_bytes() for path in paths if path not in bookkeeping]
    return hashlib.sha256(b"".join(found)).hexdigest()[:10]


def folder_of(words, args):
    """Where the results of a command are -> its folder, its name, what it writes in another's."""
    script = words[1] if words[0] == "-m" else Path(words[0]).name
    stem = script.removesuffix(".py").rpartition(".")[2]
    text = shlex.join([*words, args.digest, args.code[checkout_of(words)]])
    name = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    target = Path(words[2] if words[0] == "-m" and len(words) > 2 else words[1])
    if stem in IN_PLACE and args.work in target.parents:
        return target, name, IN_PLACE[stem]
    return args.work / name, name, None


def make(text, args):
    """Run a command, or go on with it, unless it is done -> the file in its folder that says so.

    That file holds the command and its times, and is written last: a kill leaves none.
    """
    words = shlex.split(text)
    out, name, files = folder_of(words, args)
    done = out / f"{name}.done.json"
    with MAKING[name]:
        if done.exists():
            return done
        begun = not files and out.exists()  # nobody knows the time of its first part
        if files:  # what a probe that was killed has left in the folder of another command
            for left in out.glob(f"**/{files}"):
                left.unlink()
        elif (out / "state.pt").exists():
            words = [*words[: 2 if words[0] == "-m" else 1], "--resume", str(out)]
        else:
            if not (out / "folds").exists():  # of apps.learn, which goes on with the next fold
                shutil.rmtree(out, ignore_errors=True)
            words += ["--out", str(out)]
        start = time.perf_counter()
        used = execute(words, args, args.work / f"{name}.log")
        times = {"core_seconds": used, "seconds": round(time.perf_counter() - start, 1)}
        save_json({"command": f"python {text}"} | ({} if begun else times), done)
    return done


def execute(words, args, log):
    """Run a stage -> its CPU time in seconds, or None on Windows; what it prints goes to a file."""
    if STOPPED.is_set():
        raise UserError("stopped")
    print(f"OMP_NUM_THREADS={args.threads} python {shlex.join(words)}", flush=True)
    # Python looks for imports beside the script first, so an edited checkout runs its own code.
    checkout = checkout_of(words)
    script = words if words[0] == "-m" else [checkout / Path(words[0]).name, *words[1:]]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(checkout)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen([sys.executable, *script], env=env, stdout=file, stderr=file)
        RUNNING.add(process)
        used = None
        if hasattr(os, "wait4"):  # time of a core, which other work on the machine takes less of
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            used = round(usage.ru_utime + usage.ru_stime, 1)
        status = process.wait()
        RUNNING.discard(process)
    if status:
        last = (log.read_text("utf-8", errors="replace").strip().splitlines() or ["no word"])[-1]
        raise UserError(f"python {shlex.join(words)} ended with {status}: {last} (see {log})")
    return used


# ---- a run: an arm with a seed -------------------------------------------------------------------


def make_in_order(templates, args, seed):
    """Make commands one after the other -> what `make` returns of each."""
    made = []
    for template in templates:
        made.append(make(filled(template, args, [done.parent for done in made], seed), args))
    return made


def filled(text, args, folders, seed):
    """A template -> the command: what it names in braces is made first."""
    words = args.set | {"data": shlex.quote(str(args.data)), "seed": seed}
    for name, commands in args.plan.get("made", {}).items():
        if f"{{{name}}}" in text:
            words[name] = shlex.quote(str(make_in_order(commands, args, seed)[-1].parent))
    return text.format(*(shlex.quote(str(folder)) for folder in folders), **words)


def value_at(folder, file, keys, args):
    """The value at "a/b/c" in a JSON file of a run; those of another split lie in its folder."""
    other = folder / f"{args.data.resolve().name}-{args.set['split']}" / file
    value = read_json(other if other.exists() else folder / file)
    for key in keys.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


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
    plan, source = args.plan, source_of(arm)
    row = {"arm": arm, "seed": seed, "data": args.data.name, "machine": args.machine}
    row |= {"commit": commit(source), "code": args.code[source], "metrics": {}, "right": {}}
    try:
        made = make_in_order(plan["commands"][arm], args, seed)
    except UserError as problem:
        return row | {"failed": str(problem)}
    folders = [done.parent for done in made]
    for name, place in plan["sources"].items():
        if place:
            step, file, keys, factor = place
            value = value_at(folders[step], file, keys, args)
            row["metrics"][name] = None if value is None else factor * value
    for name, (step, file, keys) in plan.get("right", {}).items():
        row["right"][name] = value_at(folders[step], file, keys, args)
    if "curve" in plan:
        row["curve"] = curve_of(read_log(folders[plan["curve"]] / "log.jsonl"))
    found = [read_json(done) for done in dict.fromkeys(made)]
    row["commands"] = [done["command"] for done in found]
    for name in ("seconds", "core_seconds"):
        times = [done.get(name) for done in found]
        if None not in times:
            row[name] = round(sum(times), 1)
    return row


def run_all(jobs, args):
    """Make these runs, some side by side, and write a row of each -> the rows that failed."""
    failed = []
    STOPPED.clear()
    pool = ThreadPoolExecutor(args.jobs)
    futures = {pool.submit(row_of, *job, args): job for job in jobs}
    try:
        for future in as_completed(futures):
            arm, seed = futures[future]
            row = future.result()
            with open(args.folder / "rows.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{arm}, seed {seed}: {line_of(row, args.plan)}", flush=True)
            if "failed" in row:
                failed.append(row)
    finally:
        STOPPED.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.terminate()  # a stage saves, and goes on next time
    return failed


def line_of(row, plan):
    """A row's numbers under their headings, or why it has none."""
    known = {name: value for name, value in row["metrics"].items() if value is not None}
    numbers = ", ".join(f"{plan['columns'][name]}: {value:.2f}" for name, value in known.items())
    return row.get("failed", numbers)


# ---- the plan ------------------------------------------------------------------------------------


def parts_of(arm):
    """Of "MASK FLAGS --source DIR MORE" -> what this code knows, too, DIR, flags of the edit."""
    same, _, edit = arm.partition(SOURCE)
    folder, dashes, more = edit.partition(" --")
    return same, folder, dashes + more


def source_of(arm):
    """The checkout whose code an arm runs."""
    _, folder, _ = parts_of(arm)
    return Path(folder or ROOT)


def names_of(plan):
    """{name: keys} with which an arm of your own may begin: methods, or masks."""
    return METHODS if "--method {arm}" in plan["template"][0] else masking.PARAMS


def check_arm(arm, plan):
    """An arm of your own: the flags that it may have, and the checkout that it names."""
    given = {word.split("=")[0] for word in arm.split()}
    if unequal := given & EQUAL:
        flag = min(unequal)
        raise UserError(f"--arms {arm}: the plan gives {flag}, which is equal in all arms (--set)")
    if "--source" not in given:
        parse_keys(arm.split(" ")[0], names_of(plan), "--arms")
        return
    source = source_of(arm)
    if SOURCE not in arm or not (source / "pretrain.py").exists():
        fix = "give --source DIR, a checkout of this repository, behind the flags of both"
        raise UserError(f"--arms {arm}: {fix}")
    if code_of(source) == code_of(ROOT):
        raise UserError(f"--arms {arm}: the code there is the same as here; edit it there")


def commands_of(arm, plan):
    """The template's commands for an arm."""
    same, folder, more = parts_of(arm)
    place = f"{shlex.quote(folder)}/" if folder else ""
    return [place + text.replace("{arm}", same + more) for text in plan["template"]]


def with_arms(plan, asked):
    """A plan that has these arms, and what they are compared with -> the plan, and the arms to run.

    An arm of your own is compared with the plan's first one. Edited code is compared with the same
    arm of this code, where this code knows the mask or method.
    """
    first = next(iter(plan["arms"]))
    found = {arm: commands_of(arm, plan) for arm in plan["arms"]}
    plan["commands"] = found | plan.get("commands", {})
    wanted = []
    for arm in asked:
        same, folder, _ = parts_of(arm)
        pairs = [(arm, first)]
        if folder and re.split("[: ]", same)[0] in names_of(plan):
            pairs = [(same, first), (arm, same)]
        for name, other in pairs:
            if name not in plan["arms"]:
                check_arm(name, plan)
                plan["arms"][name] = other
                plan["commands"][name] = commands_of(name, plan)
            wanted += [plan["arms"][name], name]
    return plan, list(dict.fromkeys(wanted))


def open_plan(name):
    """The plan of a name, or of a folder with PLAN.json."""
    path = Path(__file__).with_name(f"{name}.json") if name in OURS else Path(name) / "PLAN.json"
    return read_json(path, report.NEEDED, f"give a folder of results, or {', '.join(OURS)}")


def save_plan(args, seeds):
    """PLAN.json: what the rows are compared by. Arms and seeds of earlier calls stay.

    Arms and seeds of the plan are planned also where fewer were asked for: p is corrected for all
    of them, and until all are there, nothing is decided.
    """
    path = args.folder / "PLAN.json"
    plan = args.plan | {"set": args.set, "digest": args.digest, "data": args.data.name}
    plan |= {"split": args.set["split"], "seeds": sorted({*plan["seeds"], *seeds})}
    if path.exists():
        old = read_json(path)
        same = all(old[k] == plan[k] for k in ("set", "digest", "made", "sources"))
        shared = old["commands"].keys() & plan["commands"].keys()
        if not same or any(old["commands"][arm] != plan["commands"][arm] for arm in shared):
            other = f"other settings, data or commands ({old['set']})"
            raise UserError(f"{path} is of {other}; give those again, or another --out")
        plan |= {k: old[k] | plan[k] for k in ("arms", "commands")}
        plan["seeds"] = sorted({*old["seeds"], *plan["seeds"]})
    save_json(plan, path)
    if plan.get("right"):
        found = {"split": plan["split"], "groups": args.groups}
        save_json(found, args.folder / "images.json", None)


def open_data(args):
    """The pictures of a plan, packed if need be; their digest, and that of the encoder."""
    args.data = Path(data.open_or_pack(args.data or f"datasets/{args.plan['data']}"))
    held = data.open_split(args.data, args.set["split"])
    if args.plan.get("right") and not data.has_labels(held):
        raise UserError(f"{args.data}: this plan needs two classes, and labels on all images")
    args.groups = groups_of(held).tolist()
    args.digest = data.digest(args.data)
    encoder = args.set.get("encoder")
    if encoder and not Path(encoder).exists():
        raise UserError(f"{encoder} does not exist; give --set encoder=RUN, of pretrain.py")
    if encoder:  # one that was trained anew is another one
        args.digest += "-" + hashlib.sha256(model_file(encoder).read_bytes()).hexdigest()[:6]


def time_of(rows, left, args):
    """How long these runs take, by rows that are there -> a line."""
    times = [row["seconds"] / 60 for row in rows if isinstance(row.get("seconds"), float)]
    if not times:
        return f"{len(left)} runs; how long one takes is unknown until a row is there"
    minutes = median(times)
    machines = " and ".join(sorted({row["machine"] for row in rows}))
    each = f"{len(left)} runs of {minutes:.1f} minutes, the median of {len(times)} ({machines})"
    total = f"about {minutes * len(left) / args.jobs:.0f} minutes"
    return f"{total}: {each}; what arms share is made once, and comes on top"


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", metavar="PLAN", help="mine, ways, or a folder with PLAN.json")
    add("--data", metavar="DIR", help="packed set (default: datasets/ and the plan's)")
    add("--arms", nargs="+", metavar="ARM", help="only these; of mine: masks, of ways: methods")
    add("--seeds", type=at_least(1), metavar="N", help="of every arm (default: the plan's)")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="words in braces of the plan")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="runs side by side")
    add("--threads", type=at_least(1), default=os.cpu_count(), metavar="N", help="of each run")
    add("--out", type=Path, default=Path("runs/lab"), metavar="DIR", help="of the tables")
    add("--work", type=Path, default=Path("runs/work"), metavar="DIR", help="of the runs' folders")
    add("--dry", action="store_true", help="pack --data if need be, say what would run, and stop")
    args = parser.parse_args()
    args.plan = open_plan(args.name)
    if unknown := [pair for pair in args.set if "=" not in pair]:
        raise UserError(f"--set {unknown[0]} is no NAME=VALUE")
    given = dict(pair.split("=", 1) for pair in args.set)
    if unknown := sorted(given.keys() - args.plan["set"].keys()):
        known = ", ".join(args.plan["set"])
        raise UserError(f"--set {unknown[0]} is unknown; {args.plan['plan']} has {known}")
    args.set = args.plan["set"] | given
    return args


def main():
    args = parse_args()
    plan = args.plan
    arms = args.arms or list(plan["arms"])
    if "template" in plan:
        plan, arms = with_arms(plan, arms)
    for arm, version in plan.get("commit", {}).items():
        print(f"left out {arm}: the code of commit {version} can make it")
    if unknown := set(arms) - plan["arms"].keys():
        known = ", ".join(plan["arms"])
        raise UserError(f"--arms {min(unknown)} is unknown; choose from {known}")
    arms = [arm for arm in arms if arm in plan["commands"]]
    open_data(args)
    args.folder = args.out / f"{plan['plan']}-{args.data.name}"
    seeds = plan["seeds"][: args.seeds]
    if args.seeds:
        seeds = range(seeds[0], seeds[0] + args.seeds)
    # Seed by seed, and not arm by arm: a plan that is stopped has whole pairs to compare.
    jobs = [(arm, seed) for seed in seeds for arm in arms]
    rows = report.read_rows(args.folder)
    done = {(row["arm"], row["seed"]) for row in rows if "failed" not in row}
    left = [job for job in jobs if job not in done]
    print(f"{args.folder}: {len(jobs)} runs, {len(jobs) - len(left)} done", flush=True)
    # The hash of each code is of the beginning, so that an edit during a plan makes nothing anew.
    sources = {ROOT, *map(source_of, [*arms, *(row["arm"] for row in rows)])}
    args.code = {source: code_of(source) for source in sources}
    if older := sum(row.get("code") != args.code[source_of(row["arm"])] for row in rows):
        fix = f"without {args.folder} all are made anew"
        print(f"warning  {older} rows were made by other code; {fix}")
    if args.dry:
        print(*(f"  {arm}, seed {seed}" for arm, seed in left), sep="\n")
        print(time_of(rows or report.read_rows(Path(args.name)), left, args))
        return
    torch.set_num_threads(args.threads)  # of the runs; a row names its machine with them
    args.machine = machine(pick_device("auto"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which nohup ignores
    save_plan(args, seeds)
    # Without a row that a kill cut short, because the next one would be written behind it.
    save_text("".join(json.dumps(row) + "\n" for row in rows), args.folder / "rows.jsonl")
    failed = run_all(left, args)
    study = report.judged([report.open_folder(args.folder)])[0]
    if not study.rows:
        raise UserError(f"every run failed; the first: {study.failed[0]['failed']}")
    report.write(study, figure=True)
    print("", (args.folder / "table.md").read_text("utf-8"), READING, sep="\n")
    print(f"wrote    {args.folder}/table.md, table.csv, figure.png")
    if failed:
        why = f"the first: {failed[0]['failed']}"
        raise UserError(f"{len(failed)} runs failed; the same command tries again; {why}")


if __name__ == "__main__":
    cli(main)
