"""Tables, figures and STUDY.md from the rows of the study: every sentence is computed from them, none is written here.

Reads:  OUT/PLAN-NAME/ PLAN.json, images.json, rows.jsonl
Writes: there table.md, table.csv, verdicts.json, curves.png, bars.png, grid.png; and STUDY.md
beside OUT, whose text
        outside the two marks is left as it is
"""

import re
from pathlib import Path

import numpy as np

from common import evaluate
from common.io import UserError, read_json, save_json, save_text
from common.stats import mean_std
from experiments import plans, verdicts
from experiments.study_run import pilot_seeds, pool_of, read_rows
from experiments.tables import save_csv

UNDER_ARMS = (
    "Mean ± std over seeds. Top-1: logistic regression on the frozen {pool}. Difference: paired by seed, 95 % t "
    "interval over seeds and illustrations (over seeds alone where that is said); p after Holm over this table. In the "
    "run: a ridge on the mean token, fitted to "
    f"{evaluate.BANK_IMAGES:,} and evaluated on {evaluate.EVAL_IMAGES:,} images at most; the threshold is of this. "
    "Epochs: of those runs that reached it. Minutes: of training and its teacher, without evaluations, and without "
    "maps and encoders made before. After so many minutes: when the fastest mask was through, so that its schedule "
    "has ended and others' have not."
)
UNDER_TESTS = (
    "Power: the chance that these seeds tell an effect as large as the claim (variance: half of it) from none, with "
    "the std found and these images; support also asks that the estimate reaches the claim. Seeds for 80 %: of the "
    "claim, or where that is 0 of the effect found."
)
STRICTER = (
    "Each data set is a family of its own, and plan look one on all of its sets. Stricter than the plans, since six "
    "rows were there: pairs that are one run up to the threshold decide nothing, and Holm counts a hypothesis only if "
    "it points the right way and is whole. And since all were there: every t interval of a share of images, and its p, "
    "has the test images in it beside the seeds (squared errors add, which counts their interaction twice; "
    "Satterthwaite's degrees of freedom; never narrower than over seeds alone); epochs and variances have seeds alone; "
    "under three seeds, or where seeds do not vary, there is no interval and no p."
)
PHASES = {  # in the title of a section, and among its threats
    "reported": [""],
    "dev": [", on dev", "Numbers of dev: they choose, and prove nothing."],
    "exploratory": [
        ", exploratory",
        "Exploratory: no plan was committed; a finding needs fresh seeds.",
    ],
}
SLOW = 1.3  # times the median
BEGIN, END = "<!-- experiments.study writes from here -->", "<!-- to here -->"


def plus_minus(x, digits=1, missing="not reached"):
    """{"mean", "std"} -> "84.20 ± 0.31"; `missing` for None."""
    if x is None:
        return missing
    return f"{x['mean']:.{digits}f}" + (f" ± {x['std']:.{digits}f}" if x["std"] is not None else "")


def markdown(head, rows):
    """-> lines of a Markdown table."""
    first, *lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [first, "|---" * len(head) + "|", *lines]


def open_folder(folder):
    """-> {"plan", "rows" by arm and seed, "all" rows, "groups"}."""
    fix = f"restore it from git, or move {folder} away"
    plan = read_json(
        folder / "PLAN.json",
        ["plan", "data", "arms", "seeds", "phase", "hypotheses", "thresholds"],
        fix,
    )
    rows, groups = (
        read_rows(folder),
        np.array(read_json(folder / "images.json", ["groups"], fix)["groups"]),
    )
    return {
        "folder": folder,
        "plan": plan,
        "all": rows,
        "rows": verdicts.by_arm(plan, rows),
        "groups": groups,
    }


def open_all(root):
    """-> all studies under root, each with its "table" (a line for each arm) and its judged
    "hypotheses".

    The reported studies of a data set are one family, and stand together; so is plan look on all
    sets; others each its own.
    """
    order, families = list(plans.QUESTIONS), {}
    found = [path.parent for path in Path(root).glob("*/PLAN.json")]
    found.sort(
        key=lambda f: (f.name.endswith("-exploratory"), order.index(f.name.split("-")[0]), f.name)
    )
    for study in map(open_folder, found):
        plan, rows, groups = (study[k] for k in ("plan", "rows", "groups"))
        study["table"] = verdicts.summary(plan, rows, groups)
        study["hypotheses"] = [
            h | {"parts": [verdicts.measure(t, plan, rows, groups) for t in h["parts"]]}
            for h in plan["hypotheses"]
        ]
        own = study["folder"].name if plan["phase"] != "reported" else ""
        families.setdefault(("look" if plan["plan"] == "look" else plan["data"], own), []).append(
            study
        )
    for family in families.values():
        planned = {name: n for study in family for name, n in study["plan"]["family"].items()}
        judged = iter(verdicts.judge([h for s in family for h in s["hypotheses"]], planned))
        for study in family:
            study["hypotheses"] = [next(judged) for _ in study["hypotheses"]]
    return sum(families.values(), [])


# ---- tables --------------------------------------------------------------------------------------


def number(x, digits=1):
    """{"mean", "std"} -> "84.20 ± 0.31"; a dash where nothing was measured."""
    return plus_minus(x, digits, "-")


def interval(test):
    """ "+0.23 (-0.90 to +1.35; n = 5)"; with "over seeds alone" behind it where no image's right or
    wrong is kept.
    """
    if test["low"] is None:
        return "-" if test["effect"] is None else f"{test['effect']:+.2f}"
    alone = f", over {verdicts.SEEDS_ALONE}" if test["over"] == verdicts.SEEDS_ALONE else ""
    return "{effect:+.2f} ({low:+.2f} to {high:+.2f}; n = {n}{alone})".format(**test, alone=alone)


def p_value(test, key):
    return "-" if test[key] is None else f"{test[key]:.3f}"


def compared(test):
    """-> the cells of a difference to the baseline, empty in the baseline's own line."""
    return (
        ["; ".join([interval(test), *test["notes"]]), p_value(test, "holm_p")] if test else ["", ""]
    )


def arm_table(table, pool):
    """-> lines of Markdown: a row for each arm."""
    names = {"cutout": "under Cutout .3", "finetuned": "fine-tuned"}
    extra = [key for key in names if any(key in line for line in table)]
    head = [
        "mask",
        "runs",
        "Top-1, %",
        "against",
        "difference, points",
        "p, Holm",
        "in the run, %",
        "epochs to threshold",
        "minutes",
        f"after {table[0]['then']:.1f} min, %",
    ]
    for key in extra:
        head += [f"{names[key]}, %", "difference there, points", "p, Holm"]
    rows = []
    for line in table:
        test, n = line.get("difference"), line["n"]
        of_all = "" if line["reached"] == n else f" ({line['reached']} of {n})"
        row = [
            f"`{line['arm']}`",
            n,
            number(line["top1"], 2),
            f"`{line['against']}`" if test else "",
            *compared(test),
        ]
        row += [number(line["linear"]), number(line["epochs"]) + of_all]
        row += [number(line["minutes"]), number(line["linear_then"])]
        for key in extra:
            row += [number(line.get(key), 2), *compared(line.get(verdicts.DIFFERENCES[key]))]
        rows.append(row)
    return [
        *markdown(head, rows),
        "",
        UNDER_ARMS.format(pool={"mean": "mean token"}.get(pool, f"tokens' {pool}")),
    ]


def table_of_tests(hypothesis):
    """-> lines of Markdown: a row for each test of a hypothesis."""
    head = (
        "what",
        "mask",
        "against",
        "claim",
        "found (95 % t interval over seeds and illustrations)",
        "95 % bootstrap, seeds x illustrations",
        "p, were there no effect",
        "p, were it the claim or more, Holm",
        "power",
        "seeds for 80 %",
    )
    rows = []
    for t in hypothesis["parts"]:
        found, boot = "; ".join([interval(t), *t["notes"]]), t["bootstrap"]
        rows.append(
            [
                t["unit"],
                f"`{t['arm']}`",
                f"`{t['against']}`",
                f"{t['claim']:g}",
                found,
                f"{boot['low']:+.2f} to {boot['high']:+.2f}" if boot else "-",
                *(p_value(t, key) for key in ("p", "holm_against", "power")),
                t.get("needed") or "-",
            ]
        )
    return [
        *markdown(head, rows),
        "",
        f"p = {hypothesis['holm_p']:.3f} after Holm over all hypotheses. {UNDER_TESTS}",
    ]


def adapt_tables(rows):
    """Rows of plan adapt -> lines of Markdown: methods over their seeds, ranks and margins beside
    LoRA's default.
    """
    groups, cells = {}, []
    for r in rows:
        if r["phase"] not in ("rates", "rank", "margin"):
            groups.setdefault(f"{r['result']}, {r['epochs']} epochs", []).append(r)

    def score(runs, key):
        return number(mean_std([float(r[key]) for r in runs]), 2)

    for name, runs in groups.items():
        share, memory = runs[0]["share_trained_percent"], runs[0]["gradient_and_optimizer_mb"]
        scores = (score(runs, key) for key in ("top1", "top5", "macro_f1"))
        cells.append([name, len(runs), *scores, f"{float(share):.2f} %", f"{memory} MB"])
    columns = ("method", "seeds", "Top-1", "Top-5", "macro-F1", "trained", "gradient, optimizer")
    lines, default = (
        markdown(columns, cells),
        [r for r in rows if r["phase"] == "first" and r["result"] == "lora"],
    )
    for phase in ("rank", "margin"):
        if more := [r for r in rows if r["phase"] == phase]:
            named = ((r, f"r {r['r']}, {r['head']} head", r["margin"]) for r in default + more)
            cells = [
                [
                    name + (f", margin {margin}" if margin else ""),
                    score([r], "top1"),
                    score([r], "macro_f1"),
                    r["parameters_trained"],
                ]
                for r, name, margin in named
            ]
            columns = (f"{phase} of LoRA, seed 0", "Top-1", "macro-F1", "parameters trained")
            lines += ["", *markdown(columns, cells)]
    return lines


def mean_or_none(values):
    return None if None in values else float(np.mean(values))


def flat(line, runs):
    """A row of the CSV: numbers with their machine and commit."""
    cells = {"arm": line["arm"], "against": line["against"], "seeds": line["n"]}
    for key in ("top1", "linear", "cutout", "finetuned", "epochs", "minutes", "linear_then"):
        x = line.get(key) or {"mean": None, "std": None}
        cells |= {key: x["mean"], f"{key}_deviation": x["std"]}
    cells |= {k: line.get("difference", {}).get(k) for k in ("effect", "low", "high", "holm_p")}
    for name in ("cutout_difference", "finetuned_difference"):
        cells |= {f"{name}_{k}": line.get(name, {}).get(k) for k in ("effect", "low", "high")}
    for key in ("knn", "mse"):  # in the run, at its start and its end
        curves = [r["curve"][key] for r in runs if key in r["curve"]] or [[None]]
        cells |= {
            f"{key}_{word}": mean_or_none([c[at] for c in curves])
            for word, at in (("before", 0), ("after", -1))
        }
    looks = [r["metrics"].get("attention_on") or {} for r in runs]
    cells |= {
        f"attention_on_{part}": mean_or_none([x.get(part) for x in looks]) for part in looks[0]
    }
    cells = {k: round(float(x), 4) if isinstance(x, float) else x for k, x in cells.items()}
    return cells | {
        name: "; ".join(sorted({r[name] for r in runs})) for name in ("machine", "commit")
    }


# ---- a study's folder ----------------------------------------------------------------------------


def write(study):
    """Tables, verdicts and figures of one of `open_all` -> a line about what was written."""
    from experiments import study_figures  # matplotlib takes a second to load

    plan, folder, table = (study[k] for k in ("plan", "folder", "table"))
    if not table:
        return f"{folder}: no reported run is there yet"
    done = {arm: list(runs.values()) for arm, runs in study["rows"].items() if runs}
    save_text("\n".join(arm_table(table, pool_of(plan))) + "\n", folder / "table.md")
    save_csv(folder / "table.csv", [flat(line, done[line["arm"]]) for line in table])
    save_json(study["hypotheses"], folder / "verdicts.json")
    few, most = min(map(len, done.values())), max(map(len, done.values()))
    seeds = f"{few} to {most} seeds" if few < most else f"{most} seed{'s' * (most > 1)}"
    title = f"{plan['plan']} on {plan['data']}, {plan['split']}, {seeds}"
    logs = {arm: [r["curve"] for r in runs] for arm, runs in done.items()}
    thumbnail = next(iter(done.values()))[0]["metrics"].get("linear_thumbnail")
    study_figures.curves(
        folder / "curves.png", logs, plan["thresholds"], thumbnail, f"Learning curves: {title}"
    )
    values = {arm: [r["metrics"]["top1"] for r in runs] for arm, runs in done.items()}
    study_figures.bars(folder / "bars.png", table, values, f"Frozen encoder: {title}")
    if plan["panels"]:
        study_figures.grid(
            folder / "grid.png", plan["panels"], table, f"One factor at a time: {title}"
        )
    return f"{folder}/table.md, table.csv, verdicts.json, figures"


# ---- STUDY.md ------------------------------------------------------------------------------------


def setup(study):
    """How it was measured, in sentences."""
    plan, groups = study["plan"], study["groups"]
    there, planned = sum(map(len, study["rows"].values())), len(plan["arms"]) * len(plan["seeds"])
    thresholds = ", ".join(f"{t:.1f} % (by `{a}`)" for a, t in plan["thresholds"].items())
    first, *more = plan["seeds"]
    seeds = f"seeds {first} to {more[-1]}" if more else f"seed {first}"
    pilot, *more = pilot_seeds(plan)
    pilots = (
        f"the pilots, seeds {pilot} to {more[-1]}, each" if more else f"the pilot, seed {pilot},"
    )
    lines = [
        f"{there} of {planned} planned runs are there: {len(plan['arms'])} masks, {seeds}, each `pretrain.py "
        f"{plan['recipe']}`. Numbers are on `{plan['split']}` of {plan['data']}: {len(groups):,} images of "
        f"{len(np.unique(groups)):,} illustrations. The threshold, of the ridge in the run, is {thresholds}: "
        f"untrained + 90 % of what {pilots} gained."
    ]
    for row in study["all"]:
        if (
            row["seed"] == plan["pilot_seed"]
            and row.get("controls")
            and row["arm"] == next(iter(plan["arms"]))
        ):
            thumb = max((v for k, v in row["controls"].items() if k.startswith("thumb")), default=0)
            untrained = row["controls"][f"untrained {pool_of(plan)}"]
            lines.append(
                f"By logistic regression the pilot has {row['metrics']['top1']:.1f} %, its untrained encoder "
                f"{untrained:.1f} %, the best thumbnail {thumb:.1f} %."
            )
    return lines


def findings(table):
    """The best arm per epoch, and per minute."""
    best, quick = (
        max(table, key=lambda x: x["top1"]["mean"]),
        max(table, key=lambda x: x["linear_then"]["mean"]),
    )
    return (
        f"Highest Top-1 at the end: `{best['arm']}`, {number(best['top1'], 2)} %. Highest in the run after "
        f"{quick['then']:.1f} minutes, when the fastest arm was through: `{quick['arm']}`, "
        f"{number(quick['linear_then'])} %."
    )


def when_reached(arm, runs, limit):
    """How many runs of a baseline reach the threshold of its pilot, and when."""
    reached = [e for row in runs if (e := verdicts.epochs_to(row, limit)) is not None]
    line = f"{len(reached)} of {len(runs)} runs of `{arm}` reach its threshold"
    if not reached:
        return f"{line}."
    mean, last = np.mean(reached), runs[0]["curve"]["epoch"][-1]
    late = ": a mask that begins to be guided later can hardly save any" if mean < last / 4 else ""
    return f"{line}, after {mean:.1f} of {last:g} epochs{late}."


def threats(study):
    """What the rows themselves say against the result."""
    plan, arms = (
        study["plan"],
        {arm: list(runs.values()) for arm, runs in study["rows"].items() if runs},
    )
    rows, n_seeds, n = sum(arms.values(), []), len(plan["seeds"]), len(pilot_seeds(plan))
    pilots = f"{n} pilot seeds" if n > 1 else "one pilot seed"
    lines = [f"One data set ({plan['data']}), one recipe; the threshold comes from {pilots}."]
    lines += [
        when_reached(arm, arms[arm], limit)
        for arm, limit in plan["thresholds"].items()
        if arm in arms
    ]
    slow = 0
    for runs in arms.values():
        seconds = np.array([r["curve"]["seconds"][-1] for r in runs])
        slow += (seconds / np.median(seconds) > SLOW).sum()
    if slow:
        lines.append(
            f"{slow} of {len(rows)} runs took over {SLOW:g} times the median of their mask, perhaps beside "
            "other work: minutes are not to be compared."
        )
    machines, commits = sorted({r["machine"] for r in rows}), sorted({r["commit"] for r in rows})
    formats = " and ".join(sorted({r["config"].get("dtype", "an unknown format") for r in rows}))
    lines.append(
        f"{len(rows)} runs on {len(machines)} kind(s) of machine ({'; '.join(machines)}), in {formats}, at "
        f"{len(commits)} commit(s) ({', '.join(commits)})."
    )
    if dirty := sum(r["commit"].endswith("+") for r in rows):
        lines.append(f"{dirty} of them were made with code that no commit holds.")
    if lost := [
        f"{r['arm']}, seed {r['seed']}"
        for r in study["all"]
        if "error" in r and r["seed"] in plan["seeds"]
    ]:
        lines.append(f"Diverged, and left out: {'; '.join(lost)}.")
    if missing := sum(max(0, n_seeds - len(runs)) for runs in study["rows"].values()) - len(lost):
        lines.append(f"{missing} planned runs are missing: what is said here is preliminary.")
    return [f"- {line}" for line in lines + PHASES[plan["phase"]][1:]]


def section(study, top):
    """A study as a section of STUDY.md -> lines; top: the folder that STUDY.md is in."""
    plan, table, folder = study["plan"], study["table"], study["folder"].relative_to(top)
    name = plan["plan"].upper() if plan["hypotheses"] else plan["plan"]
    title = f"## {name} on {plan['data']}{PHASES[plan['phase']][0]}: {plan['question']}"
    lines = [title, "", *setup(study), ""]
    if not table:
        return [*lines, "No run is there yet.", ""]
    lines += [*arm_table(table, pool_of(plan)), "", findings(table), ""]
    lines += [
        f"![{name}]({folder}/{name}.png)"
        for name in ("curves", "bars", "grid")
        if (study["folder"] / f"{name}.png").exists()
    ]
    for h in study["hypotheses"]:
        lines += [
            "",
            f"**{h['id']}: {h['verdict']}.** Claim: {h['claim']}. Decided by: {h['because']}.",
            "",
        ]
        lines += table_of_tests(h)
        for t in h["parts"]:
            if t["what"] == "epochs" and (other := verdicts.checks(t, plan, study["rows"])):
                lines += [
                    "",
                    f"Not planned, to check the epochs that `{t['arm']}` saves, %: {'; '.join(other)}.",
                ]
    return [*lines, "", "Threats:", "", *threats(study), ""]


def open_text(root):
    """-> path of STUDY.md beside root, what stands before and behind its marks; refuses that of
    another folder.
    """
    path = Path(root).parent / "STUDY.md"
    old = path.read_text() if path.exists() else f"# The study\n\n{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        raise UserError(
            f"{path} lost its marks {BEGIN} and {END}; put them back, or remove the file"
        )
    before, (inside, after) = old.split(BEGIN)[0], old.split(BEGIN, 1)[1].split(END, 1)
    if others := set(re.findall(r"^!\[\w+\]\(([^/()]+)/", inside, re.M)) - {Path(root).name}:
        raise UserError(
            f"{path} tells of the studies in {path.parent / min(others)}, and would lose them; "
            "give an --out in another folder"
        )
    return path, before, after


def write_study(studies, root):
    """STUDY.md: all studies under root -> its path. What stands outside the marks is kept."""
    path, before, after = open_text(root)
    rows = [
        [
            h["id"] if " on " in h["id"] else f"{h['id']} on {s['folder'].name.split('-', 1)[1]}",
            h["verdict"],
            h["because"],
        ]
        for s in studies
        for h in s["hypotheses"]
    ]
    lines = [*markdown(("hypothesis", "verdict", "decided by"), rows), ""] if rows else []
    for rules in dict.fromkeys(s["plan"]["test"] for s in studies):
        lines += [
            f"A verdict follows these rules, which stand in the plans. {rules} {STRICTER}",
            "",
        ]
    lines += [
        "Supported so means an effect whose estimate reaches the claim, not that the whole interval does.",
        "",
    ]
    for study in studies:
        lines += section(study, path.parent)
    save_text("\n".join([before + BEGIN, *lines, END]) + after, path)
    return path
