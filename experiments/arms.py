"""Arms of a stage side by side: each run is made once and is a row of a CSV; arms are compared over paired seeds.

experiments.mfdn asks tags.py with it, and experiments.hybrid segment.py.
"""

import argparse
import os
import shlex
from concurrent.futures import ThreadPoolExecutor, as_completed

from common.command import at_least, between
from common.io import UserError, lock_beside, locked, read_json
from common.stats import mean_std, plus_minus
from experiments import stats
from experiments.study_run import execute
from experiments.tables import read_csv, replace_rows

KEYS = ("arm", "seed", "flags")


def add_flags(add, stage, folder):
    """The flags of every table of arms: what its runs get, how many run at once, and where all
    goes.
    """
    add("--flags", type=as_words, default="", help=f"more flags of {stage}, for every run")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="runs side by side")
    add(
        "--threads",
        type=between(1, 1024, int),
        default=os.cpu_count(),
        metavar="N",
        help="of each run",
    )
    add("--out", default=folder, metavar="DIR", help="tables and figure (default: %(default)s)")
    add("--work", default=folder, metavar="DIR", help="run folders (default: %(default)s)")


def as_words(text):
    """An argparse type: text that a shell could take apart."""
    try:
        return shlex.join(shlex.split(text)) and text
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{text} can't be taken apart ({problem})") from None


def line_of(args, words):
    return f"OMP_NUM_THREADS={args.threads} python {shlex.join(words)}"


def run(args, out, words):
    """Make a run, or go on with it -> its metrics.json. words: what a user would type behind
    `python`.
    """
    scores = out / "metrics.json"
    with locked(lock_beside(out), wait=True) as lock:
        if not scores.exists():
            begun = (out / "state.pt").exists()
            execute(
                [words[0], "--resume", str(out)] if begun else words,
                out.with_name(out.name + ".log"),
                args.threads,
                lock,
            )
    found = read_json(scores, ["command"], "remove its folder and run again")
    if shlex.split(found["command"])[1:] != words:
        raise UserError(f"{out} was made by other flags ({found['command']}); give another --work")
    return found


def run_all(args, jobs, path, words_of, row_of, said):
    """jobs [(arm, seed, flags)], side by side; a row is written as soon as it is there.

    words_of(args, *job) -> run folder, its command; row_of(args, metrics) -> columns of its row;
    said(row) -> text.
    """
    done = {tuple(row[k] for k in KEYS): row["command"].partition(" ")[2] for row in read_csv(path)}
    left = []
    for arm, seed, more in jobs:
        there = done.get((arm, str(seed), " ".join(map(str, more))))
        command = line_of(args, words_of(args, arm, seed, more)[1]).partition(" ")[2]
        if there not in (None, command):
            raise UserError(
                f"{path} has arm {arm} of seed {seed} by other flags ({there}); give another --out"
            )
        left += [(arm, seed, more)] * (there is None)
    print(f"{path}: {len(jobs)} runs, {len(jobs) - len(left)} done", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(run, args, *words_of(args, *job)): job for job in left}
        for future in as_completed(waiting):
            job, found = waiting[future], future.result()
            row = dict(
                zip(KEYS, (job[0], job[1], " ".join(map(str, job[2]))), strict=True)
            ) | row_of(args, found)
            row |= {"command": line_of(args, words_of(args, *job)[1])}
            replace_rows(path, [row], KEYS)
            print(f"{row['arm']} {row['flags']}, seed {row['seed']}: {said(row)}", flush=True)


def by_arm(rows, names):
    """Rows of the CSV -> {arm: {seed: row}}, in the order of names."""
    return {
        arm: {int(r["seed"]): r for r in rows if r["arm"] == arm}
        for arm in names
        if any(r["arm"] == arm for r in rows)
    }


def cell(seeds, column):
    """{seed: row} -> "mean ± std" of a column, - where no row has it."""
    values = [float(r[column]) for r in seeds.values() if r[column] != ""]
    return plus_minus(mean_std(values) if values else None)


def answers(arms, questions):
    """questions ((arm, column), (arm, column), text) -> lines: each paired difference, its
    interval, its seeds.
    """
    for (a, x), (b, y), text in questions:
        if a not in arms or b not in arms:
            continue
        seeds = sorted(
            s
            for s in arms[a].keys() & arms[b].keys()
            if arms[a][s][x] != "" and arms[b][s][y] != ""
        )
        differences = [float(arms[a][s][x]) - float(arms[b][s][y]) for s in seeds]
        if not differences:
            continue
        found, mean = stats.paired_t(differences), sum(differences) / len(differences)
        how = (
            f"{found['low']:+.1f} to {found['high']:+.1f}" if found else stats.why_none(differences)
        )
        yield f"| {text} | {mean:+.1f} ({how}; n = {len(seeds)}) |"


def plot_seeds(axis, arms, columns):
    """A dot for each seed of each arm; columns: (column, colour, marker, label), side by side."""
    for shift, (column, colour, mark, label) in zip((-0.12, 0.12), columns, strict=True):
        points = [
            (i + shift, float(r[column]))
            for i, seeds in enumerate(arms.values())
            for r in seeds.values()
            if r[column] != ""
        ]
        if points:
            axis.plot(*zip(*points, strict=True), mark, color=colour, ms=5, alpha=0.7, label=label)
    axis.set_xticks(range(len(arms)), arms)
    axis.set(xlabel="arm")
