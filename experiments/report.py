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
DEFAULTS |= {"phase": "reported", "split": "val"}
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


def values_of(runs, column):
    """The numbers of a column, of the runs that have one."""
    found = [row["metrics"].get(column) for row in runs]
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
    known = [[values_of([r], c) for r, c in zip(pair, columns, strict=True)] for pair in pairs]
    each = [a[0] - b[0] for a, b in known if a and b]
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


def arms_of(study):
    """-> [one dict for each arm that has rows]: its runs, and a test for each compared column.

    Tests have holm_p and a word, after Holm over the table.
    """
    compare, lines = study.plan.get("compare", ("top1", "cutout", "finetuned")), []
    best = None
    if compare and study.rows:
        best = max(study.rows, key=lambda a: np.mean(values_of(study.rows[a].values(), compare[0])))
    for arm, seeds in study.rows.items():
        against = study.plan["arms"][arm]
        against = best if against == "best" else against
        line = {"arm": arm, "against": against, "runs": list(seeds.values()), "tests": {}}
        for column in compare if against in study.rows and arm != against else ():
            if len(values_of(line["runs"], column)) == len(seeds):
                test = {"what": column, "arm": arm, "against": against}
                line["tests"][column] = measure(test, study)
        lines.append(line)
    for column in compare:
        tests = [line["tests"][column] for line in lines if column in line["tests"]]
        equal = stats.holm([test["p_equal"] for test in tests])
        for test, p, q in zip(tests, stats.holm([t["p"] for t in tests]), equal, strict=True):
            test |= {"holm_p": p, "verdict": stats.word(test["effect"], p, q)}
    return lines


def controls(study):
    """A line about what an encoder has to beat, where a pilot had the whole probe."""
    for row in study.all:
        found = row.get("controls")
        if found:
            thumbnail = max(
                (x for name, x in found.items() if name.startswith("thumb")), default=0.0
            )
            untrained = found.get("untrained " + study.plan.get("pool", "mean"), 0.0)
            return [
                f"Controls: best thumbnail {thumbnail:.1f} %, untrained encoder {untrained:.1f} %."
            ]
    return []


def arm_table(study, lines):
    """-> lines of Markdown: a row for each arm."""
    columns = [c for c in study.plan["columns"] if any(values_of(x["runs"], c) for x in lines)]
    compared = [c for c in columns if any(c in line["tests"] for line in lines)]
    head = ["arm", "runs"]
    for c in columns:
        head.append(study.plan["columns"][c].format(minutes=study.then / 60))
        head += ["against", "difference", "p, Holm", "verdict"] if c in compared else []
    rows = []
    for line in lines:
        note = study.plan.get("notes", {}).get(line["arm"])
        row = [f"`{line['arm']}`" + (f": {note}" if note else ""), len(line["runs"])]
        for c in columns:
            values = values_of(line["runs"], c)
            some = 0 < len(values) < len(line["runs"])
            row.append(cell(values) + (f" ({len(values)} of {len(line['runs'])})" if some else ""))
            test = line["tests"].get(c)
            if test:
                row += [f"`{line['against']}`", interval(test), p_value(test["holm_p"])]
                row.append(test["verdict"])
            elif c in compared:
                row += ["", "", "", ""]
        rows.append(row)
    notes = [NOTES.format(margin=study.plan["margin"]), *controls(study)]
    return [*markdown(head, rows), "", *notes]


def difference_table(study):
    """-> lines of Markdown: a row for each difference that the plan asks about."""
    found = [measure(test, study) for test in study.plan["differences"]]
    found = [test for test in found if test["n"]]
    p, q = (stats.holm([test[k] for test in found]) for k in ("p", "p_equal"))
    rows = []
    for test, holm_p, equal in zip(found, p, q, strict=True):
        verdict = stats.word(test["effect"], holm_p, equal)
        rows.append([test["text"], interval(test), p_value(holm_p), verdict])
    head = ["difference", "points", "p, Holm", "verdict"]
    return ["", *markdown(head, rows)] if rows else []


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
    claim = f"**{name}: {verdict}** (p = {p:.3f} after Holm). Claim: {hypothesis['claim']}."
    return ["", claim, "", *markdown(head, rows)]


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


def csv_row(line, study):
    """A row of table.csv: every column with its deviation, every difference, machines and commits."""
    row = {"arm": line["arm"], "against": line["against"], "seeds": len(line["runs"])}
    more = [name for name in line["runs"][0]["metrics"] if name.startswith("attention_on_")]
    for name in [*study.plan["columns"], *CURVE, *more]:
        values = values_of(line["runs"], name)
        row[name] = float(np.mean(values)) if values else None
        if name in study.plan["columns"]:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[f"{name}_deviation"] = spread
    for column, test in line["tests"].items():
        row |= {f"{column}_{k}": test[k] for k in ("effect", "low", "high", "holm_p", "verdict")}
    row = {k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()}
    for name in ("machine", "commit"):
        row[name] = "; ".join(sorted({run.get(name, "") for run in line["runs"]}))
    return row


def draw(path, lines, study):
    """A dot for each seed, one panel for each of the first two columns."""
    from common import plots  # matplotlib takes a second to load

    columns = list(study.plan["columns"])[:2]
    size = (4.8 * len(columns), 1.4 + 0.28 * len(lines))
    title = f"{study.plan['plan']} on {study.plan['data']}: a dot is a seed"
    with plots.panels(path, title, 1, len(columns), size, sharey=True, squeeze=False) as axes:
        for axis, column in zip(axes[0], columns, strict=True):
            for i, line in enumerate(lines):
                values = values_of(line["runs"], column)
                axis.plot(values, [i] * len(values), "o", ms=5, alpha=0.7, color=plots.BLUE)
            axis.set(xlabel=study.plan["columns"][column].format(minutes=study.then / 60))
            axis.grid(axis="x", alpha=0.3)
        axes[0, 0].set_yticks(range(len(lines)), [line["arm"] for line in lines])
        axes[0, 0].invert_yaxis()


def write(study, figure=False):
    """The files of one of `judged`."""
    plan, folder, lines = study.plan, study.folder, arms_of(study)
    if not lines:
        raise UserError(f"{folder} has no row yet; experiments.run makes them")
    text = [f"# {plan['plan']} on {plan['data']}, {plan['split']}: {plan['question']}", ""]
    text += [*arm_table(study, lines), *difference_table(study)]
    for hypothesis in study.hypotheses:
        text += hypothesis_table(hypothesis, study)
    if figure:
        draw(folder / "figure.png", lines, study)
        text += ["", "![One dot is one seed](figure.png)"]
    save_text("\n".join(text) + "\n", folder / "table.md")
    rows = [csv_row(line, study) for line in lines]
    columns = dict.fromkeys(name for row in rows for name in row if name not in MADE)
    columns |= dict.fromkeys(MADE)
    save_csv(folder / "table.csv", [{c: row.get(c) for c in columns} for row in rows])


# ---- STUDY.md ------------------------------------------------------------------------------------

MARKS = "<!-- experiments.report writes from here -->", "<!-- to here -->"


def section(study, top):
    """A study in STUDY.md -> lines: what was asked and made, and each arm with its difference."""
    plan, lines = study.plan, arms_of(study)
    seeds = f"{min(plan['seeds'])} to {max(plan['seeds'])}"
    kind = "" if plan["phase"] == "reported" else f", {plan['phase']}"
    folder = study.folder.relative_to(top)
    made = f"{sum(len(line['runs']) for line in lines)} runs, seeds {seeds}"
    text = [f"## {study.folder.name}{kind}", ""]
    text += [f"{plan['question']} {made} ([table]({folder}/table.md)).", ""]
    if len(lines) > 10:
        best = max(lines, key=lambda line: np.mean(values_of(line["runs"], "top1")))
        return [*text, f"The best of {len(lines)} arms is `{best['arm']}`.", ""]
    rows = []
    for line in lines:
        test = line["tests"].get("top1")
        found = f"{test['effect']:+.1f}" if test else ""
        if test and test["low"] is not None:
            found += f" ({test['low']:+.1f} to {test['high']:+.1f})"
        top1 = cell(values_of(line["runs"], "top1"), 1)
        rows.append([f"`{line['arm']}`", top1, found, test["verdict"] if test else ""])
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
