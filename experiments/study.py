"""The study: which masks teach what, with error bars. Plans runs, makes them by command line, judges their rows.

    # which runs, and how long they take
    python -m experiments.study --plan h1 --data datasets/toon --dry
    # in runs/study/results
    python -m experiments.study --plan h1 --data datasets/toon --exploratory
    # pilot; commit its plan, again
    python -m experiments.study --plan h1 --data datasets/toon --out results/study
    python -m experiments.study --plan adapt --encoder runs/NAME --data datasets/NAME --phases \\
        rates first rank

Reads:  datasets/NAME, and what the stages write to runs/study/work/NAME
Writes: OUT/PLAN-NAME/ PLAN.json, images.json, rows.jsonl, verdicts.json, table.md, table.csv,
curves.png, bars.png,
        grid.png; STUDY.md beside OUT; of plan adapt runs/adapt/NAME/finetune.csv and .md

A pilot run with a seed that is never reported fixes the threshold; the plan is committed before a
reported seed runs. rows.jsonl has one line for each run, and is what counts: the same command makes
those that are missing, after a kill or on another machine. A row's commands make it again, to the
same digits on the same kind of CPU.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

import data
import mask as masking
from common import metrics
from common.command import (
    Parser,
    at_least,
    between,
    cli,
    parse_keys,
    refuse_file,
    refuse_idle,
    refuse_overwrite,
)
from common.io import UserError, locked, read_json, save_json, save_text
from common.train import pick_device, pick_dtype
from experiments import plans, report
from experiments.study_run import (
    KEEP,
    RUNNING,
    adapt_rows,
    commands,
    execute,
    pilot_seeds,
    read_rows,
    run_one,
)
from experiments.tables import rows_there

RECIPE = "--model nano:decoder_depth=1 --batch-size 64 --blr 8e-3 --epochs 15"
PLAIN = "--flat-weight 1"  # in every arm; the weight of flat patches is a factor of its own
MAPS = {
    "coarse": ["saliency"],
    "parts": ["parts"],
}  # of maps.py
PILOT_SEED = 1000
FIRST_SEED = {
    "look": 100,
    "first": 100,
    "tune": 500,
    "exploratory": 2000,
}  # what was seen before is not reported
MOST_SEEDS = 500  # then another phase's begin
SEEDS = {"tune": 1, "look": 8, "h2": 10}  # a comparison of variances needs ten


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.HelpFormatter)
    add = parser.add_argument_group("what is asked").add_argument
    add("--plan", choices=[*plans.MAKE, "adapt", "all"], help=f"all: {', '.join(plans.ALL)}")
    add("--data", metavar="DIR", help="packed set with labels")
    add(
        "--seeds",
        type=between(1, MOST_SEEDS, int),
        metavar="N",
        help="paired seeds of every arm (default: 5; h2: 10; "
        "tune: 1)\nunder three there is no interval; with --exploratory a larger N adds seeds to what is there",
    )
    add(
        "--arms",
        nargs="+",
        default=[],
        metavar="ARM",
        help="further arms: a mask, and flags of pretrain.py behind it",
    )
    add(
        "--guided",
        default="attn_high",
        metavar="ARM",
        help="what H1 is about, as dev chose it (default: attn_high)",
    )
    add(
        "--recipe",
        default=RECIPE,
        metavar="FLAGS",
        help="of pretrain.py, for every arm (default: %(default)s)",
    )
    add(
        "--epochs",
        type=at_least(1),
        metavar="N",
        help="of every run (default: the recipe's; adapt: 8)",
    )
    add("--dino", metavar="FILE", help="checkpoint of DINO: one more teacher among the ablations")
    add = parser.add_argument_group(
        "plan adapt: linear, LoRA, full and from scratch side by side"
    ).add_argument
    add("--encoder", metavar="RUN", help="as for finetune_lora.py")
    methods, phases = (
        list(plans.LEARNING_RATES),
        "; ".join(f"{name}: {text}" for name, text in plans.PHASES.items()),
    )
    add(
        "--phases",
        nargs="+",
        default=["rates", "first"],
        choices=plans.PHASES,
        metavar="PHASE",
        help=f"{phases} (default: rates first)",
    )
    add(
        "--methods",
        nargs="+",
        default=methods,
        choices=methods,
        metavar="METHOD",
        help=f"of phases rates, first and seeds (default: {' '.join(methods)})",
    )
    add(
        "--trial-epochs",
        type=at_least(1),
        default=2,
        metavar="N",
        help="of a run in phase rates (default: 2)",
    )
    add(
        "--scratch-times",
        type=at_least(1),
        default=3,
        metavar="N",
        help="from scratch gets so many times the epochs",
    )
    add(
        "--keep",
        type=between(0.01, 1),
        default=0.25,
        metavar="SHARE",
        help="of the patches in a view (default: .25)",
    )
    add = parser.add_argument_group("how it runs").add_argument
    add(
        "--budget",
        type=between(1e-9, 1e9),
        metavar="MINUTES",
        help="start only what fits; says what is left out",
    )
    add("--jobs", type=at_least(1), default=1, metavar="N", help="runs side by side")
    add(
        "--threads",
        type=between(1, 1024, int),
        default=os.cpu_count(),
        metavar="N",
        help="of each run (default: %(default)s)",
    )
    add("--dry", action="store_true", help="say what would run, and stop")
    add(
        "--exploratory",
        action="store_true",
        help="without a committed plan; rows and tables say so",
    )
    add(
        "--report",
        action="store_true",
        help="with --out alone: tables, figures and STUDY.md anew from all rows",
    )
    add(
        "--out",
        metavar="DIR",
        help="rows, tables, figures; STUDY.md beside it (default: runs/study/results, but a "
        "plan that is reported is asked for a folder in git: results/study; adapt: runs/adapt/NAME/finetune.csv)",
    )
    add(
        "--work",
        metavar="DIR",
        help="run folders; their large files are removed after the row (default: "
        "runs/study/work; adapt: runs/adapt/NAME, all kept)",
    )
    return parser.parse_args()


def refuse_flags(args):
    """Those that are given and would not be used."""
    if args.report:
        return refuse_idle(args.given - {"report", "out"}, "with --report, which makes no runs")
    takes = ["plan", "data", "threads", "dry", "out", "work"]
    if args.plan == "adapt":
        takes += ["encoder", "phases", *adapt_flags(set(args.phases), set(args.methods))]
        chosen = f"--phases {' '.join(args.phases)} --methods {' '.join(args.methods)}"
        return refuse_idle(args.given - set(takes), f"with --plan adapt {chosen}")
    takes += ["epochs", "seeds", "arms", "recipe", "budget", "jobs"]
    takes += ["guided"] * (args.plan not in ("h2", "h3", "arms"))
    takes += ["dino"] * (args.plan in ("ablations", "all"))
    takes += ["exploratory"] * (args.plan != "tune")
    refuse_idle(args.given - set(takes), f"with --plan {args.plan}")


def adapt_flags(phases, methods):
    """Flags that these phases of plan adapt have a use for."""
    for_methods = phases & {"rates", "first", "seeds"}  # the others run LoRA alone
    tuned = methods - {"linear"} if for_methods else {"lora"}
    used = {
        "methods": for_methods,
        "trial_epochs": tuned and "rates" in phases,
        "epochs": tuned and phases - {"rates"},
        "scratch_times": for_methods and "scratch" in methods,
        "keep": tuned,
    }
    return [name for name, wanted in used.items() if wanted]


def check(args):
    """Refuse flags that do not fit together; fill in defaults that depend on the plan."""
    if args.report and not args.out:
        raise UserError("--report rewrites the tables of a folder: say which, --out results/study")
    if not args.report and not (args.plan and args.data):
        raise UserError(
            f"say --plan ({', '.join(plans.MAKE)}, adapt, all) and --data datasets/NAME; or --report --out"
        )
    refuse_flags(args)
    is_adapt = args.plan == "adapt"
    if is_adapt and not args.encoder:
        raise UserError("--plan adapt and --encoder RUN go together: what is adapted")
    for arm in [args.guided, *args.arms]:
        parse_keys(arm.split(" ")[0], masking.PARAMS, "--mask")
    if args.plan in ("tune", "look") and args.guided.split(" ")[0] != "attn_high":
        raise UserError(
            f"--guided {args.guided}: plan {args.plan} asks of attn_high alone, with its hint or as many "
            "trials as for random; name your own with --plan arms --arms ... --exploratory"
        )
    if args.plan == "look" and "--contrast " not in args.recipe:
        raise UserError(
            f"--recipe {args.recipe}: plan look is about what a second loss teaches; add --contrast pooler"
        )
    if args.epochs:
        args.recipe += f" --epochs {args.epochs}"
    if not (args.out or is_adapt or args.plan == "tune" or args.exploratory or args.dry):
        raise UserError(
            f"plan {args.plan} is reported: what it writes goes into git, so name it, --out results/study; "
            "or try masks with --exploratory"
        )
    home = f"runs/adapt/{Path(args.data or '').name}" if is_adapt else "runs/study"
    args.out = args.out or f"{home}/{'finetune.csv' if is_adapt else 'results'}"
    args.work = args.work or (home if is_adapt else f"{home}/work")
    refuse_file(args.work)
    if is_adapt:
        return check_table(Path(args.out))
    refuse_file(args.out)
    if Path(args.out).resolve() == Path(args.work).resolve():
        raise UserError(f"--out and --work are both {args.out}; give two folders")
    report.open_text(args.out)


def check_table(path):
    """Plan adapt writes a table and its .md: not over what is something else."""
    if path.suffix != ".csv":
        raise UserError(f"--out {path} of plan adapt is a table; its name ends in .csv")
    refuse_file(path.parent)
    if rows_there(path, KEEP) == []:
        refuse_overwrite([path.with_suffix(".md")])


# ---- the plan ------------------------------------------------------------------------------------


def recipe_of(text):
    """Flags of pretrain.py -> those that a plan depends on, the last where one is there twice."""
    parser = Parser(allow_abbrev=False, add_help=False)
    for name, kind, default in (
        ("blr", float, 8e-3),
        ("epochs", int, 32),
        ("ratio", str, 0.75),
        ("model", str, "nano:decoder_depth=2"),
        ("eval-every", str, "1"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    try:
        return parser.parse_known_args(shlex.split(text))[0]
    except ValueError as problem:  # a quotation mark that is never closed
        raise UserError(f"--recipe {text} is no list of flags: {problem}") from None


def digest(path):
    """12 hex digits of a file's bytes."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest()


def make_plan(name, args):
    """All that PLAN.json says, but for the thresholds; and the illustrations of the reported split."""
    split = "dev" if name == "tune" else "val"
    train, held = data.open_split(args.data, "train"), data.open_split(args.data, split)
    if not (data.has_labels(train) and data.has_labels(held)):
        raise UserError(
            f"{args.data}: a study needs two classes or more, and labels on all images of train and {split}"
        )
    recipe = recipe_of(args.recipe)
    plan = plans.make(
        name,
        args.arms,
        guided=args.guided,
        dino=args.dino,
        strategies=list(masking.STRATEGIES),
        data=Path(args.data).name,
        fg="truth" if "fg" in train else "{coarse}",
        parts="truth" if "parts" in train else "{parts}",
        blr=recipe.blr,
        epochs=recipe.epochs,
        ratio=recipe.ratio,
        depth=recipe.model.partition("decoder_depth=")[2].partition(",")[0] or "1",
    )
    if recipe.eval_every != "1" and plan["hypotheses"]:
        raise UserError(f"plan {name} evaluates each epoch; leave --eval-every out of --recipe")
    phase = "dev" if name == "tune" else "exploratory" if args.exploratory else "reported"
    first, count = (
        FIRST_SEED.get(phase if phase == "exploratory" else name, 0),
        args.seeds or SEEDS.get(name, 5),
    )
    flags = f"{args.recipe} {PLAIN} {plan.pop('flags', '')}".rstrip()
    family = (
        plans.FAMILY
        if name != "look"
        else plans.LOOK | {h["id"]: len(h["parts"]) for h in plan["hypotheses"]}
    )
    return plan | {
        "data": Path(args.data).name,
        "data_digest": f"{data.fingerprint(train)}-{data.fingerprint(held)}",
        "split": split,
        "recipe": flags,
        "seeds": list(range(first, first + count)),
        "pilot_seed": PILOT_SEED,
        "family": family,
        "test": plans.TEST,
        "thresholds": None,
        "dtype": None,
        "phase": phase,
        "dino": digest(args.dino) if args.dino else None,
    }, data.groups_of(held).tolist()


def open_study(name, args):
    """-> {"plan", "folder", "groups"}: the plan on disk if there is one, which must be what the
    flags make.
    """
    plan, groups = make_plan(name, args)
    folder = Path(args.out) / (
        f"{name}-{plan['data']}" + ("-exploratory" if plan["phase"] == "exploratory" else "")
    )
    path = folder / "PLAN.json"
    if path.exists():
        new, plan = (
            json.loads(json.dumps(plan)),
            read_json(path, plan, "restore it from git, or give another --out"),
        )
        if plan["phase"] == "exploratory" and new["seeds"][: len(plan["seeds"])] == plan["seeds"]:
            plan["seeds"] = new["seeds"]  # further seeds; the rows that are there stay
        if other := [
            k for k in new if k not in ("thresholds", "dtype", "question") and new[k] != plan.get(k)
        ]:
            raise UserError(
                f"{path} has another {', '.join(other)} than these flags make; give its flags again, or "
                "another --out (a new plan wants fresh seeds), or --exploratory"
            )
    return {"plan": plan, "folder": folder, "groups": groups}


def committed(path):
    """Is this file in git, as it stands?"""

    def git(*words):
        return subprocess.run(
            ["git", *words, path.name], cwd=path.parent, capture_output=True
        ).returncode

    return git("ls-files", "--error-unmatch") == 0 and git("diff", "--quiet", "HEAD", "--") == 0


# ---- jobs: what is to run, what is done ----------------------------------------------------------


def pilots(plan):
    """Arms that fix a threshold: the first, and those that a saving of epochs is claimed against."""
    claimed = [
        t["against"] for h in plan["hypotheses"] for t in h["parts"] if "epochs" in t["what"]
    ]
    return list(dict.fromkeys([next(iter(plan["arms"])), *claimed]))


def job_of(plan, arm, seed, args):
    key = plans.key(plan, arm, seed)
    name = re.sub(r"[^\w.-]+", "-", arm.replace(" --", "-")).strip("-")[:60]
    pilot = seed in pilot_seeds(plan)
    return {
        "key": key,
        "arm": arm,
        "seed": seed,
        "phase": "pilot" if pilot else plan["phase"],
        "stages": ["pretrain", "probe", *([] if pilot else plan["stages"])],
        "plan": plan,
        "out": Path(args.work) / plan["data"] / f"{name}-s{seed}-{key}",
    }


def done(job, rows):
    """The row of this run, of whatever study; None if it is still to be made."""
    same = (row for row in rows if row["key"] == job["key"] and row["phase"] == job["phase"])
    return next(
        (row for row in same if "error" in row or set(job["stages"]) <= set(row["stages"])), None
    )


def add_row(folder, row):
    """Append, whole or not at all; a run that is there already is replaced (it may have gained a
    stage).
    """
    rows = [r for r in read_rows(folder) if r["key"] != row["key"]] + [row]
    save_text("".join(json.dumps(r) + "\n" for r in rows), folder / "rows.jsonl")


def expected_seconds(job, rows):
    """From runs that were timed: of the same arm, else of any; None where none was."""
    timed = [(r["arm"], sum(r["seconds"].values())) for r in rows if r.get("seconds")]
    seconds = [s for arm, s in timed if arm == job["arm"]] or [s for _, s in timed]
    return sum(seconds) / len(seconds) if seconds else None


def within(jobs, rows, minutes, side_by_side):
    """-> (jobs that fit into the budget, those that don't). A seed is started with all of its arms,
    or not at all.
    """
    if minutes is None:
        return jobs, []
    kept, spent = [], 0.0
    for seed in dict.fromkeys(job["seed"] for job in jobs):
        block = [job for job in jobs if job["seed"] == seed]
        spent += sum(expected_seconds(job, rows) or 0 for job in block) / side_by_side
        if spent > 60 * minutes:
            break
        kept += block
    return kept, jobs[len(kept) :]


# ---- many runs -----------------------------------------------------------------------------------


def all_rows(args):
    """Of every study under --out: a run that two plans share is made once."""
    return [
        row
        for path in sorted(Path(args.out).glob("*/rows.jsonl"))
        for row in read_rows(path.parent)
    ]


def stop_all(*_):
    for process in list(RUNNING):
        process.terminate()  # pretrain.py saves, and goes on next time
    raise KeyboardInterrupt


def run_all(study, jobs, args, ready):
    """Make these runs, some side by side; a row is written as soon as it is there. -> lines about
    those that failed.
    """
    failed, rows, pool = [], all_rows(args), ThreadPoolExecutor(args.jobs)
    waiting = {pool.submit(run_one, job, args, ready): job for job in jobs}
    try:
        for count, future in enumerate(as_completed(list(waiting)), 1):
            job = waiting.pop(future)
            name = f"{job['arm']}, seed {job['seed']}"
            try:
                row = future.result()
                add_row(study["folder"], row)
                rows.append(row)
                result = (
                    row.get("error")
                    or f"Top-1 {row['metrics']['top1']:.1f} %, {sum(row['seconds'].values()):.0f} s"
                )
            except UserError as problem:
                failed.append(f"{name}: {problem}")
                result = f"failed: {problem}"
            left = (
                sum(expected_seconds(other, rows) or 0 for other in waiting.values())
                / args.jobs
                / 60
            )
            print(f"{count}/{len(jobs)} {name}: {result}; about {left:.0f} min left", flush=True)
    except BaseException:  # Ctrl-C, a closed pipe, a full disk: nobody waits for what still runs
        for process in list(RUNNING):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failed


def reuse_or_run(study, jobs, args, budget=None):
    """Rows that exist, here or in another study, are reused; the other jobs run as far as the
    budget goes.

    -> lines about those that failed.
    """
    others, here = all_rows(args), {r["key"]: r for r in read_rows(study["folder"])}
    rows = {job["key"]: done(job, [*here.values(), *others]) for job in jobs}
    now, left_out = within([job for job in jobs if not rows[job["key"]]], others, budget, args.jobs)
    say(study, jobs, now, left_out, others, args)
    if args.dry:
        return []
    for key, row in rows.items():
        if row and here.get(key) != row:
            add_row(study["folder"], row)
    return run_all(study, now, args, make_ready(study["plan"], now, args))


def say(study, jobs, now, left_out, rows, args):
    """What will run, what is left out, and how long it takes."""
    seconds = [expected_seconds(job, rows) for job in now]
    time_left = (
        f", about {sum(seconds) / 60 / args.jobs:.0f} min"
        if all(seconds)
        else ", no run was timed yet"
    )
    print(
        f"{study['folder']}: {len(jobs)} runs, {len(jobs) - len(now) - len(left_out)} done, {len(now)} to run"
        + (time_left if now else ""),
        flush=True,
    )
    dtype, device = study["plan"].get("dtype") or "auto", pick_device("auto")
    if now and pick_dtype(dtype, device)[0] != pick_dtype("auto", device)[0]:
        print(
            f"  in {dtype}, as the pilot was; this machine would have chosen otherwise, and may be slow at it"
        )
    for word, some in (("to run", now if args.dry else []), ("left out by --budget", left_out)):
        for arm in dict.fromkeys(job["arm"] for job in some):
            print(
                f"  {word}: {arm}, seeds {', '.join(str(job['seed']) for job in some if job['arm'] == arm)}"
            )


def make_ready(plan, jobs, args):
    """Make what these arms have in braces -> {name: path, "commands": {name: [words]}}."""
    needed = set(re.findall(r"\{(\w+)\}", " ".join(job["arm"] for job in jobs)))
    pilot = job_of(plan, pilots(plan)[0], PILOT_SEED, args)
    home, first = (
        pilot["out"].with_name(f"maps-{pilot['key']}"),
        [commands(pilot, args, {})["pretrain"]],
    )
    ready = {"pilot": pilot["out"], "dino": args.dino, **{name: home / name for name in MAPS}}
    ready["commands"] = {"pilot": first}
    if (
        needed & {"pilot", "parts"} and not (pilot["out"] / "made.json").exists()
    ):  # made on another machine
        run_one(pilot, args, {})
    for name in sorted(needed & MAPS.keys()):
        words = [
            "maps.py",
            "--data",
            str(args.data),
            "--map",
            *MAPS[name],
            "--out",
            str(ready[name]),
        ]
        if name != "coarse":
            words += ["--run", str(pilot["out"])]
        if not list(ready[name].glob("*.safetensors")):
            home.mkdir(parents=True, exist_ok=True)
            execute(words, home / f"{name}.log", args.threads)
        ready["commands"][name] = [words] if name == "coarse" else [*first, words]
    return ready


def prepare(study, args):
    """Run the pilots, if that was not done before; PLAN.json is then written once and for all.

    A threshold is metrics.threshold_of the pilot's ridge, or the mean of several pilots'. Their
    number format is that of all runs to come, on whatever machine: half of a comparison in bf16
    would be none.
    """
    plan, folder = study["plan"], study["folder"]
    if plan["thresholds"] is not None:
        if not args.dry and json.loads((folder / "PLAN.json").read_text()) != plan:
            save_json(plan, folder / "PLAN.json")  # seeds were added
        return
    jobs = [job_of(plan, arm, seed, args) for arm in pilots(plan) for seed in pilot_seeds(plan)]
    if failed := reuse_or_run(study, jobs, args):
        raise UserError(f"the pilot failed, and there is no threshold without it: {failed[0]}")
    if args.dry:
        return
    rows = {row["key"]: row for row in read_rows(folder)}
    rows = [rows[job["key"]] for job in jobs]
    if lost := [row["arm"] for row in rows if "error" in row]:
        raise UserError(
            f"the pilot of {lost[0]} diverged: there is nothing to compare with; "
            "try a smaller --blr in --recipe"
        )
    formats = {row["config"].get("dtype") for row in rows}
    if len(formats) > 1:
        raise UserError(
            f"the pilots ran in {' and '.join(map(str, formats))}, perhaps on two machines; make them anew "
            "on one: remove their folders and rows"
        )
    plan["thresholds"] = {
        arm: round(
            fmean(
                metrics.threshold_of(row["curve"]["linear"]) for row in rows if row["arm"] == arm
            ),
            2,
        )
        for arm in pilots(plan)
    }
    plan["dtype"] = formats.pop()
    save_json({"split": plan["split"], "groups": study["groups"]}, folder / "images.json", None)
    save_json(plan, folder / "PLAN.json")


def run_studies(studies, args):
    """Pilots and plans first, all of them; then, if they are committed, the runs -> lines about
    those that failed.
    """
    for study in studies:
        prepare(study, args)
    folders = [s["folder"] for s in studies if s["plan"]["phase"] == "reported" and not args.dry]
    if new := [str(folder) for folder in folders if not committed(folder / "PLAN.json")]:
        raise UserError(
            "the plan has to be in git before a reported seed runs; look at it, then: git add "
            f"{' '.join(new)} && git commit -m Plan, and this command again "
            "(or --exploratory)"
        )
    start_time, failed = time.perf_counter(), []
    for study in studies:
        left = (
            None if args.budget is None else args.budget - (time.perf_counter() - start_time) / 60
        )
        plan = study["plan"]  # seed by seed: whatever stops the study leaves whole pairs
        jobs = [job_of(plan, arm, seed, args) for seed in plan["seeds"] for arm in plan["arms"]]
        failed += reuse_or_run(study, jobs, args, left)
    return failed


def adapt(args):
    """Plan adapt: no pilot and no committed plan; learning rates are chosen on dev, the rest is
    reported on val.
    """
    path = Path(args.out)
    for rows in adapt_rows(args, path):
        save_text("\n".join(report.adapt_tables(rows)) + "\n", path.with_suffix(".md"))
    if not args.dry:
        print(f"wrote    {path} and .md")


def main():
    args = parse_args()
    check(args)
    signal.signal(signal.SIGTERM, stop_all)
    if args.plan == "adapt":
        return adapt(args)
    with contextlib.ExitStack() as locks:
        names = plans.ALL if args.plan == "all" else [args.plan]
        studies = [] if args.report else [open_study(name, args) for name in names]
        for study in [] if args.dry else studies:
            locks.enter_context(locked(study["folder"] / ".lock"))
        failed = run_studies(studies, args)
        if args.dry:
            return
        judged, changed = report.open_all(args.out), [study["folder"] for study in studies]
        for study in judged:
            if args.report or study["folder"] in changed:
                print(f"wrote    {report.write(study)}", flush=True)
        print(
            f"wrote    {report.write_study(judged, args.out)}: read it; its PLAN.json, rows.jsonl and tables are in "
            f"{shlex.quote(str(args.out))}"
        )
    if failed:
        raise UserError(f"{len(failed)} runs failed, repeat the command; the first: {failed[0]}")


if __name__ == "__main__":
    cli(main)
