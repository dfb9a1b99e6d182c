"""Rows of a plan -> table.md, table.csv, figure.png: every arm, every difference, every verdict.

    python -m experiments.report runs/experiments/mine-toon
    python -m experiments.report results/study/* --study results/STUDY.md   # what is published

Reads:  FOLDER/PLAN.json (what is compared), rows.jsonl or rows.csv, images.json (the illustration
        of each test image, where rows hold which images are right)
Writes: FOLDER/table.md, table.csv, and figure.png with --figure
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import metrics
from common.command import Parser, cli
from common.io import UserError, read_json, save_text
from common.stats import from_bits
from experiments import stats
from experiments.plans import COLUMNS
from experiments.tables import read_csv, save_csv

DEFAULTS = {"columns": COLUMNS, "margin": 1.0, "differences": [], "hypotheses": []}
DEFAULTS |= {"compare": ("top1", "cutout", "finetuned"), "phase": "reported", "notes": {}}
FIX = "restore it, or make the rows with experiments.run"
CURVE = ("knn_before", "knn_after", "mse_before", "mse_after")  # of the run, its start and its end
MADE = ("machine", "commit")
UNITS = {"epochs": "% of the epochs saved", "variance": "% less variance"}
UNITS["log_epochs"] = "% of the epochs saved, by logarithms"
NOTES = (
    "Mean ± std over seeds. Differences are paired by seed, with a 95 % t interval over seeds and "
    "illustrations (over seeds alone where no image's answer is kept), and p after Holm over the "
    "table. Equivalent: the difference is within {margin:g} points either way (two one-sided tests, "
    "after Holm). Under three seeds there is no interval."
)


# ---- rows ----------------------------------------------------------------------------------------


def read_rows(folder):
    """Rows of a plan, each run once, as it was written last. Half a line is a killed write."""
    rows = {}
    for name in ("rows.csv", "arms.csv"):  # published tables of runs
        for row in read_csv(folder / name):
            rows[row["arm"], int(row["seed"])] = from_csv(row)
    path = folder / "rows.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows[row["arm"], row["seed"]] = row
        except (ValueError, KeyError):
            continue
    return [row for row in rows.values() if "error" not in row]


def from_csv(row):
    """A line of a published table of runs -> a row as experiments.run writes it."""
    found = {"arm": row["arm"], "seed": int(row["seed"]), "metrics": {}, "right": {}}
    for name, text in row.items():
        if text == "":
            continue
        try:
            found["metrics"][name] = float(text)
        except ValueError:
            found[name] = text
    if "right" in row and "right" not in found["metrics"]:  # a detector counts its right answers
        found["right"] = {"top1": row["right"]}
    return found | {"seconds": found["metrics"].get("seconds")}


def open_folder(folder):
    """-> a study: plan, rows {arm: {seed: row}}, all rows, groups of the test images or None."""
    folder = Path(folder)
    plan = read_json(folder / "PLAN.json", ["plan", "arms", "seeds"], FIX)
    plan = DEFAULTS | plan
    study = SimpleNamespace(folder=folder, plan=plan, all=read_rows(folder), groups=None)
    if (folder / "images.json").exists():
        study.groups = np.array(read_json(folder / "images.json", ["groups"], FIX)["groups"])
    if not plan.get("thresholds"):
        plan["thresholds"] = thresholds(study.all)
    study.rows = {arm: {} for arm in plan["arms"]}
    for row in study.all:
        if row["arm"] in study.rows and row["seed"] in plan["seeds"]:
            study.rows[row["arm"]][row["seed"]] = row
    study.rows = {arm: seeds for arm, seeds in study.rows.items() if seeds}
    ends = [
        [r["curve"]["seconds"][-1] for r in s.values() if "curve" in r] for s in study.rows.values()
    ]
    study.then = min((np.mean(seconds) for seconds in ends if seconds), default=0.0)
    for row in study.all:
        row["metrics"] |= derived(row, study)
    return study


def thresholds(rows):
    """{arm: accuracy in the run that counts as reached}, the mean over its pilot runs."""
    found = {}
    for row in rows:
        if row.get("phase") == "pilot":
            found.setdefault(row["arm"], []).append(metrics.threshold_of(row["curve"]["linear"]))
    return {arm: round(float(np.mean(values)), 2) for arm, values in found.items()}


def derived(row, study):
    """Metrics that follow from a row's curve and times."""
    found = {}
    if row.get("curve") is None:
        return {"minutes": row["seconds"] / 60} if row.get("seconds") else {}
    curve, limits = row["curve"], study.plan["thresholds"]
    for name in ("knn", "mse"):
        if name in curve:
            found |= {f"{name}_before": curve[name][0], f"{name}_after": curve[name][-1]}
    found |= {"linear": curve["linear"][-1], "minutes": curve["seconds"][-1] / 60}
    found["linear_then"] = np.interp(study.then, curve["seconds"], curve["linear"])
    limit = limits.get(study.plan["arms"].get(row["arm"])) or next(iter(limits.values()), None)
    found["epochs"] = limit and stats.epochs_to(curve, limit)
    looks = row["metrics"].get("attention_on") or {}
    return found | {f"attention_on_{part}": share for part, share in looks.items()}


def values_of(seeds, column):
    """{seed: row} -> the numbers of a column, of the runs that have one."""
    found = [row["metrics"].get(column) for row in seeds.values()]
    return [float(x) for x in found if x is not None and x != ""]


# ---- tests ---------------------------------------------------------------------------------------


def measure(test, study):
    """{"what", "arm", "against", "claim"} -> the same with the fields of its test in stats.py.

    what: a column, "epochs", "log_epochs" or "variance". against_what: the baseline's column, where
    it is another one.
    """
    what, claim = test["what"], test.get("claim", 0.0)
    arm, base = study.rows.get(test["arm"], {}), study.rows.get(test["against"], {})
    pairs = [(arm[seed], base[seed]) for seed in sorted(arm.keys() & base.keys())]
    row = test | {"claim": claim, "planned": len(study.plan["seeds"]), "over": "seeds alone"}
    if what == "variance":
        sides = [[r["metrics"]["top1"] for r in side] for side in zip(*pairs, strict=True)]
        return row | stats.variance(*(sides or [[], []]))
    if "epochs" in what:
        limit = test.get("limit", study.plan["thresholds"].get(test["against"]))
        if limit is None:
            return row | stats.empty([]) | {"notes": ["no pilot, so no threshold"]}
        curves = [(ours["curve"], theirs["curve"]) for ours, theirs in pairs]
        return row | stats.epochs_saved(curves, limit, claim, what == "log_epochs")
    columns = what, test.get("against_what", what)
    margin = test.get("margin", study.plan["margin"])
    bits = [[right_of(r, c) for r, c in zip(pair, columns, strict=True)] for pair in pairs]
    if study.groups is not None and pairs and all(None not in pair for pair in bits):
        n = len(study.groups)
        each = [100.0 * from_bits(a, n) - 100.0 * from_bits(b, n) for a, b in bits]
        row["over"] = "seeds and illustrations"
        return row | stats.paired(np.array(each), study.groups, claim, margin)
    known = [(a["metrics"].get(columns[0]), b["metrics"].get(columns[1])) for a, b in pairs]
    each = [a - b for a, b in known if a is not None and b is not None]
    return row | stats.paired(each, None, claim, margin)


def right_of(row, column):
    """Which test images a run got right, as text; "logistic" is the name of top1 in older rows."""
    right = row.get("right") or {}
    return right.get(column) or (right.get("logistic") if column == "top1" else None)


def judged(studies):
    """Studies -> their hypotheses with verdicts, in a list for each study.

    Holm's family: the reported studies of a data set, plan look on all its sets, else a study.
    """
    families = {}
    for study in studies:
        plan = study.plan
        study.hypotheses = [
            h | {"parts": [measure(test, study) for test in h["parts"]]} for h in plan["hypotheses"]
        ]
        key = "look" if plan["plan"] == "look" else plan["data"]
        if plan["phase"] != "reported":
            key = study.folder
        families.setdefault(key, []).append(study)
    for family in families.values():
        hypotheses = [h for study in family for h in study.hypotheses]
        planned = {h["id"]: len(h["parts"]) for h in hypotheses}
        for study in family:
            planned = study.plan.get("family", {}) | planned
        found = iter(stats.judge(hypotheses, planned))
        for study in family:
            study.hypotheses = [next(found) for _ in study.hypotheses]
    return studies


# ---- tables --------------------------------------------------------------------------------------


def markdown(head, rows):
    """-> lines of a Markdown table."""
    first, *lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [first, "|---" * len(head) + "|", *lines]


def cell(values, digits=2):
    """Numbers of several seeds -> "84.20 ± 0.31"; "-" where there is none."""
    if not values:
        return "-"
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}"


def interval(test):
    """ "+0.23 (-0.90 to +1.35; n = 5)", with what else is to be said of it."""
    if test["effect"] is None:
        return "; ".join(["-", *test["notes"]])
    if test["low"] is None:
        return "; ".join([f"{test['effect']:+.2f}", *test["notes"]])
    alone = ", over seeds alone" if test["over"] == "seeds alone" else ""
    text = (
        f"{test['effect']:+.2f} ({test['low']:+.2f} to {test['high']:+.2f}; n = {test['n']}{alone})"
    )
    return "; ".join([text, *test["notes"]])


def p_value(p):
    return "-" if p is None else f"{p:.3f}"


def differences(study):
    """Every difference of a plan -> its tests with holm_p and verdict.

    Holm's families: each compared column over its arms, and the plan's further differences.
    """
    groups = []
    for column in study.plan["compare"]:
        means = {}
        for arm, seeds in study.rows.items():
            if values_of(seeds, column):
                means[arm] = np.mean(values_of(seeds, column))
        group = []
        for arm, against in study.plan["arms"].items():
            against = max(means, key=means.get, default=arm) if against == "best" else against
            group.append({"what": column, "arm": arm, "against": against})
        groups.append([test for test in group if test["arm"] != test["against"]])
    tests = []
    for group in [*groups, study.plan["differences"]]:
        found = [test for test in (measure(test, study) for test in group) if test["n"]]
        p, equal = (stats.holm([test[k] for test in found]) for k in ("p", "p_equal"))
        for test, holm_p, q in zip(found, p, equal, strict=True):
            verdict = stats.word(test["effect"], holm_p, q)
            tests.append(test | {"holm_p": holm_p, "verdict": verdict})
    return tests


def controls(study):
    """What an encoder has to beat, where a pilot had the whole probe -> [line] or []."""
    found = next((row["controls"] for row in study.all if row.get("controls")), {})
    names = ["untrained " + study.plan.get("pool", "mean"), "thumb4", "thumb8", "thumb16"]
    known = [f"{name} {found[name]:.1f} %" for name in names if name in found]
    return [f"Controls, Top-1: {', '.join(known)}."] if known else []


def arm_table(study):
    """-> lines of Markdown: a row for each arm."""
    columns = [
        c for c in study.plan["columns"] if any(values_of(x, c) for x in study.rows.values())
    ]
    headings = [study.plan["columns"][c].format(minutes=study.then / 60) for c in columns]
    rows = []
    for arm, seeds in study.rows.items():
        note = study.plan["notes"].get(arm)
        row = [f"`{arm}`" + (f": {note}" if note else ""), len(seeds)]
        for c in columns:
            values = values_of(seeds, c)
            some = f" ({len(values)} of {len(seeds)})" if 0 < len(values) < len(seeds) else ""
            row.append(cell(values) + some)
        rows.append(row)
    return markdown(["arm", "runs", *headings], rows)


def difference_table(study, tests):
    """-> lines of Markdown: a row for each difference."""
    rows = []
    for test in tests:
        heading = study.plan["columns"].get(test["what"], test["what"])
        text = test.get("text", f"{heading}: `{test['arm']}` against `{test['against']}`")
        rows.append([text, interval(test), p_value(test["holm_p"]), test["verdict"]])
    return markdown(["difference", "points", "p, Holm", "verdict"], rows)


def hypothesis_table(hypothesis, study):
    """-> lines of Markdown: the verdict, and a row for each part of the hypothesis."""
    rows = []
    for test in hypothesis["parts"]:
        what = UNITS.get(test["what"], f"points of {test['what']}")
        boot = test["bootstrap"]
        boot = f"{boot['low']:+.2f} to {boot['high']:+.2f}" if boot else "-"
        row = [what, f"`{test['arm']}`", f"`{test['against']}`", f"{test['claim']:g}"]
        row += [interval(test), boot, p_value(test["p"]), p_value(test["holm_against"])]
        rows.append(row)
        rows += [
            [f"not planned: {name}", *row[1:4], text, "-", "-", "-"]
            for name, text in other_counts(test, study)
        ]
    name, verdict, p = (hypothesis[k] for k in ("id", "verdict", "holm_p"))
    head = ["what", "arm", "against", "claim", "found", "bootstrap, seeds x illustrations"]
    head += ["p of no effect", "p of the claim, Holm"]
    text = f"**{name}: {verdict}** (p = {p:.3f} after Holm)."
    if "claim" in hypothesis:
        text += f" Claim: {hypothesis['claim']}."
    return ["", text, "", *markdown(head, rows)]


def other_counts(test, study):
    """Epochs saved, counted in two other ways -> [(name, interval)]; none where that has no effect.

    A mean of ratios leans against the arm where the baseline's epochs vary, and one pilot may be a
    lucky seed.
    """
    if test["what"] != "epochs" or test["low"] is None:
        return []
    base = study.rows[test["against"]].values()
    own = float(np.mean([metrics.threshold_of(row["curve"]["linear"]) for row in base]))
    logs = measure(test | {"what": "log_epochs"}, study)
    other = measure(test | {"limit": own}, study)
    return [
        ("by logarithms", interval(logs)),
        (f"a threshold of {own:.1f} %, from all baselines", interval(other)),
    ]


def csv_row(arm, tests, study):
    """A row of table.csv: every column with its deviation, every difference to the baseline."""
    seeds = study.rows[arm]
    row = {"arm": arm, "against": study.plan["arms"][arm], "seeds": len(seeds)}
    looks = [name for name in next(iter(seeds.values()))["metrics"] if "attention_on_" in name]
    for name in [*study.plan["columns"], *CURVE, *looks]:
        values = values_of(seeds, name)
        row[name] = float(np.mean(values)) if values else None
        if name in study.plan["columns"]:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[f"{name}_deviation"] = spread
    for test in tests:
        if test["arm"] == arm and "text" not in test:
            row["against"] = test["against"]
            fields = ("effect", "low", "high", "holm_p", "verdict")
            row |= {f"{test['what']}_{k}": test[k] for k in fields}
    row = {k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()}
    for name in MADE:
        row[name] = "; ".join(sorted({run.get(name, "") for run in seeds.values()}))
    return row


def draw(path, study):
    """A dot for each seed, one panel for each of the first two columns."""
    from common import plots  # matplotlib takes a second to load

    columns = list(study.plan["columns"])[:2]
    size = (4.8 * len(columns), 1.4 + 0.28 * len(study.rows))
    title = f"{study.plan['plan']} on {study.plan['data']}: a dot is a seed"
    with plots.panels(path, title, 1, len(columns), size, sharey=True, squeeze=False) as axes:
        for axis, column in zip(axes[0], columns, strict=True):
            for i, seeds in enumerate(study.rows.values()):
                values = values_of(seeds, column)
                axis.plot(values, [i] * len(values), "o", ms=5, alpha=0.7, color=plots.BLUE)
            axis.set(xlabel=study.plan["columns"][column].format(minutes=study.then / 60))
            axis.grid(axis="x", alpha=0.3)
        axes[0, 0].set_yticks(range(len(study.rows)), list(study.rows))
        axes[0, 0].invert_yaxis()


def write(study, figure=False):
    """The files of one of `judged`."""
    plan, folder = study.plan, study.folder
    if not study.rows:
        raise UserError(f"{folder} has no row yet; experiments.run makes them")
    tests = differences(study)
    text = [f"# {plan['plan']} on {plan['data']}, {plan['split']}: {plan['question']}", ""]
    text += [*arm_table(study), "", *controls(study), "", *difference_table(study, tests), ""]
    text.append(NOTES.format(margin=plan["margin"]))
    for hypothesis in study.hypotheses:
        text += hypothesis_table(hypothesis, study)
    if figure:
        draw(folder / "figure.png", study)
        text += ["", "![One dot is one seed](figure.png)"]
    save_text("\n".join(text) + "\n", folder / "table.md")
    rows = [csv_row(arm, tests, study) for arm in study.rows]
    columns = dict.fromkeys(name for row in rows for name in row if name not in MADE)
    columns |= dict.fromkeys(MADE)
    save_csv(folder / "table.csv", [{c: row.get(c) for c in columns} for row in rows])


# ---- STUDY.md ------------------------------------------------------------------------------------

MARKS = "<!-- experiments.report writes from here -->", "<!-- to here -->"


def section(study, top):
    """A study in STUDY.md -> lines: what was asked and made, and each arm with its difference."""
    plan, seeds = study.plan, study.plan["seeds"]
    kind = "" if plan["phase"] == "reported" else f", {plan['phase']}"
    made = f"{sum(map(len, study.rows.values()))} runs, seeds {min(seeds)} to {max(seeds)}"
    text = [f"## {study.folder.name}{kind}", ""]
    link = f"[table]({study.folder.relative_to(top)}/table.md)"
    text += [f"{plan['question']} {made} ({link}).", ""]
    if len(study.rows) > 10:
        best = max(study.rows, key=lambda arm: np.mean(values_of(study.rows[arm], "top1")))
        return [*text, f"The best of {len(study.rows)} arms is `{best}`.", ""]
    tests = {test["arm"]: test for test in differences(study) if test["what"] == "top1"}
    rows = []
    for arm, runs in study.rows.items():
        row = [f"`{arm}`", cell(values_of(runs, "top1"), 1), "", ""]
        if arm in tests:
            test = tests[arm]
            row[2] = f"{test['effect']:+.1f} ({test['low']:+.1f} to {test['high']:+.1f})"
            row[3] = test["verdict"]
        rows.append(row)
    return [*text, *markdown(["mask", "Top-1, %", "difference", "verdict"], rows), ""]


def write_study(studies, path):
    """STUDY.md: the verdicts, and a section for each study. What stands outside the marks is kept."""
    before, rest = path.read_text().split(MARKS[0])
    rows = [
        [h["id"].split(" on ")[0], study.plan["data"], h["verdict"], f"{h['holm_p']:.3f}"]
        for study in studies
        for h in study.hypotheses
    ]
    lines = [*markdown(["hypothesis", "data", "verdict", "p, Holm"], rows), ""]
    for study in studies:
        lines += section(study, path.parent)
    save_text("\n".join([before + MARKS[0], *lines, MARKS[1]]) + rest.split(MARKS[1])[1], path)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a plan's rows")
    parser.add_argument("--figure", action="store_true", help="draw figure.png, too")
    parser.add_argument(
        "--study", type=Path, metavar="FILE", help="write their sections anew in it"
    )
    args = parser.parse_args()
    studies = judged([open_folder(folder) for folder in args.folders])
    for study in studies:
        write(study, args.figure)
        print(f"wrote    {study.folder}/table.md, table.csv{', figure.png' * args.figure}")
    if args.study:
        write_study(studies, args.study)


if __name__ == "__main__":
    cli(main)
