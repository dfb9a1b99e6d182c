"""Rows of a plan -> table.md, table.csv, figure.png: every arm, every difference, every verdict.

    python -m lab.report runs/lab/mine-toon
    python -m lab.report results/study/*        # what is published
    python -m lab.report results/study/look-toon --curves random attn_high green

Reads:  FOLDER/PLAN.json (what is compared; lab/run.py tells its fields), rows.jsonl, images.json
        (the illustration of each test image, where rows hold which images are right)
Writes: FOLDER/table.md, table.csv; figure.png with --figure, curves.png with --curves

A comparison is paired by seed. A hypothesis may also be of these, the first two by a row's curve:

epochs, log_epochs   until the run reaches the accuracy that the plan has as its threshold: % saved
variance             of top1 over seeds: % less
"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import metrics
from common.door import read_json, save_csv
from common.metrics import from_bits, mean_std, plus_minus
from common.train import Parser, UserError, cli, read_log, save_text
from lab import stats

DEFAULTS = {  # of what a plan may leave out; controls: Top-1 of what has learned nothing
    "margin": 1.0,
    "less": [],
    "notes": {},
    "thresholds": {},
    "differences": [],
    "hypotheses": [],
    "family": {},
    "controls": {},
}
NEEDED = ("plan", "data", "split", "question", "arms", "seeds", "columns", "compare")
FIX = "restore it, or make the rows with lab.run"
CURVE = ("knn_before", "knn_after", "mse_before", "mse_after")  # of the run: its start and its end
UNITS = {
    "epochs": "% of the epochs saved",
    "log_epochs": "% of the epochs saved, by logarithms",
    "variance": "% less variance",
}
NOTES = (
    "Mean ± std over seeds. Differences are paired by seed, with a 95 % t interval over seeds and "
    "illustrations (over seeds alone where no image's answer is kept), and p after Holm over "
    "{family}. Further differences are a family of their own. Equivalent: the difference is within "
    "±{margin:g} points (two one-sided tests, after Holm). Under three seeds there is no interval."
)

# ---- rows ----------------------------------------------------------------------------------------


def read_rows(folder):
    """Rows of a plan, each run once, as it was written last."""
    rows = [row for row in read_log(folder / "rows.jsonl") if {"arm", "seed"} <= row.keys()]
    return list({(row["arm"], row["seed"]): row for row in rows}.values())


def open_folder(folder):
    """-> a study: plan, rows {arm: {seed: row}}, rows of failed runs, and groups of the test images
    or None.
    """
    plan = DEFAULTS | read_json(folder / "PLAN.json", NEEDED, FIX)
    study = SimpleNamespace(folder=folder, plan=plan, groups=None, failed=[])
    if (folder / "images.json").exists():
        study.groups = np.array(read_json(folder / "images.json", ["groups"], FIX)["groups"])
    found = {arm: {} for arm in plan["arms"]}
    for row in read_rows(folder):
        if "failed" in row:
            study.failed.append(row)
        elif row["arm"] in found and row["seed"] in plan["seeds"]:
            row["metrics"] |= derived(row, plan)
            found[row["arm"]][row["seed"]] = row
    study.rows = {arm: seeds for arm, seeds in found.items() if seeds}
    return study


def derived(row, plan):
    """Metrics that follow from a row's curve and times."""
    curve = row.get("curve")
    limits = plan["thresholds"]
    if curve is None:
        times = {"minutes": row.get("seconds"), "core_minutes": row.get("core_seconds")}
        return {name: seconds / 60 for name, seconds in times.items() if seconds}
    limit = limits.get(plan["arms"].get(row["arm"])) or next(iter(limits.values()), None)
    found = {"linear": curve["linear"][-1], "minutes": curve["seconds"][-1] / 60}
    found["epochs"] = limit and stats.epochs_to(curve, limit)
    for name in curve.keys() & {"knn", "mse"}:
        found |= {f"{name}_before": curve[name][0], f"{name}_after": curve[name][-1]}
    return found


def values_of(seeds, column):
    """{seed: row} -> the numbers of a column, of the runs that have one."""
    found = [row["metrics"].get(column) for row in seeds.values()]
    return [float(x) for x in found if x is not None]


# ---- tests ---------------------------------------------------------------------------------------


def measure(test, study):
    """{"what", "arm", "against", "claim"} -> the same with the fields of its test in stats.py.

    what: a column, "epochs", "log_epochs" or "variance". against_what: the baseline's column, where
    it is another one. A claim, which only hypotheses have, is in the unit of what is measured.
    """
    what = test["what"]
    claim = test.get("claim", 0.0)
    arm = study.rows.get(test["arm"], {})
    base = study.rows.get(test["against"], {})
    pairs = [(arm[seed], base[seed]) for seed in sorted(arm.keys() & base.keys())]
    row = test | {"claim": claim, "planned": len(study.plan["seeds"]), "over": "seeds alone"}
    row["bootstrap"] = None
    if what == "variance":
        sides = [[r["metrics"]["top1"] for r in side] for side in zip(*pairs, strict=True)]
        return row | stats.variance(*(sides or [[], []]), claim)
    if what in ("epochs", "log_epochs"):
        limit = study.plan["thresholds"].get(test["against"])
        if limit is None:
            return row | stats.empty([]) | {"notes": ["the plan has no threshold"]}
        curves = [(ours["curve"], theirs["curve"]) for ours, theirs in pairs]
        return row | stats.epochs_saved(curves, limit, claim, what == "log_epochs")
    columns = what, test.get("against_what", what)
    margin = study.plan["margin"]
    right = [[right_of(r, c, study) for r, c in zip(pair, columns, strict=True)] for pair in pairs]
    if pairs and all(answers is not None for pair in right for answers in pair):
        each = [100.0 * ours - 100.0 * theirs for ours, theirs in right]
        row |= {"over": "seeds and illustrations"}
        row |= stats.paired(np.array(each), study.groups, claim, margin)
        if "claim" in test and row["p"] is not None:
            row["bootstrap"] = metrics.bootstrap(each, study.groups)
        return row
    known = [(a["metrics"].get(columns[0]), b["metrics"].get(columns[1])) for a, b in pairs]
    each = [a - b for a, b in known if a is not None and b is not None]
    return row | stats.paired(each, None, claim, margin)


def right_of(row, column, study):
    """Which of the test images a run got right, (n,) bool; None where this is not known of each.

    A run that left some characters out was asked for fewer. In older rows, top1 is "logistic".
    """
    right = row.get("right") or {}
    text = right.get(column) or (right.get("logistic") if column == "top1" else None)
    return from_bits(text, len(study.groups)) if text and study.groups is not None else None


def judged(studies):
    """Studies -> the same with their hypotheses, measured, each with its verdict.

    Holm's family: the studies that a plan says to be judged together (`together`), else a study.
    """
    families = {}
    for study in studies:
        families.setdefault(study.plan.get("together", study.folder), []).append(study)
        study.hypotheses = [
            h | {"parts": [measure(test, study) for test in h["parts"]]}
            for h in study.plan["hypotheses"]
        ]
    for family in families.values():
        hypotheses = [h for study in family for h in study.hypotheses]
        planned = {name: n for study in family for name, n in study.plan["family"].items()}
        found = iter(stats.judge(hypotheses, planned))
        for study in family:
            study.hypotheses = [next(found) for _ in study.hypotheses]
    return studies


def differences(study):
    """Every difference of a plan -> its tests with holm_p and verdict.

    Holm's families: each compared column over its arms, and the plan's further differences. Those
    that lack rows count, too, with p = 1, and stay open. The best arm is chosen by the runs that
    are tested: any pair could have been asked about, so all pairs count.
    """
    families = []
    for column in study.plan["compare"]:
        means = {arm: np.mean(values_of(seeds, column) or -1) for arm, seeds in study.rows.items()}
        best = max(means, key=means.get, default=None)
        family, pairs = [], 0
        for arm, against in study.plan["arms"].items():
            if against == "best":
                pairs, against = math.comb(len(study.plan["arms"]), 2), best
            if arm != against:
                family.append({"what": column, "arm": arm, "against": against, "planned_for": arm})
        families.append((family, pairs))
    tests = []
    for family, pairs in [*families, (study.plan["differences"], 0)]:
        found = [measure(test, study) for test in family]
        unasked = [None] * (pairs - len(found))
        whole = [test if stats.whole(test) else {"p": None, "p_equal": None} for test in found]
        p, equal = (stats.holm([test[k] for test in whole] + unasked) for k in ("p", "p_equal"))
        for test, holm_p, q in zip(found, p, equal, strict=False):
            if test["n"]:
                sign = -1 if test["what"] in study.plan["less"] else 1
                verdict = stats.word(sign * test["effect"], holm_p, q)
                if test["n"] < test["planned"]:
                    verdict = "open: runs are missing"  # or a look could decide when to stop
                tests.append(test | {"holm_p": holm_p, "verdict": verdict})
    return tests


# ---- tables --------------------------------------------------------------------------------------


def markdown(head, rows):
    """-> lines of a Markdown table."""
    first, *lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [first, "|---" * len(head) + "|", *lines]


def cell(values, digits=2):
    """Numbers of several seeds -> "84.20 ± 0.31"; "-" where there is none."""
    return plus_minus(mean_std(values) if values else None, digits)


def interval(test):
    """ "+0.23 (-0.90 to +1.35; n = 5)", with what else is to be said of it."""
    text = "-" if test["effect"] is None else f"{test['effect']:+.2f}"
    if test["low"] is not None:
        some = f" of {test['planned']}" if test["n"] < test["planned"] else ""
        alone = ", over seeds alone" if test["over"] == "seeds alone" else ""
        text += f" ({test['low']:+.2f} to {test['high']:+.2f}; n = {test['n']}{some}{alone})"
    return "; ".join([text, *test["notes"]])


def p_value(p):
    return "-" if p is None else f"{p:.3f}"


def arm_table(study):
    """-> lines of Markdown: a row for each arm, and the controls."""
    columns = {
        name: heading
        for name, heading in study.plan["columns"].items()
        if any(values_of(seeds, name) for seeds in study.rows.values())
    }
    rows = []
    for arm, seeds in study.rows.items():
        note = study.plan["notes"].get(arm)
        row = [f"`{arm}`" + (f": {note}" if note else ""), len(seeds)]
        for name in columns:
            values = values_of(seeds, name)
            some = f" ({len(values)} of {len(seeds)})" if 0 < len(values) < len(seeds) else ""
            row.append(cell(values) + some)
        rows.append(row)
    known = [f"{name} {value:.1f} %" for name, value in study.plan["controls"].items()]
    controls = [f"Controls, Top-1: {', '.join(known)}.", ""] if known else []
    return [*markdown(["arm", "runs", *columns.values()], rows), "", *controls]


def difference_table(study, tests):
    """-> lines of Markdown: a row for each difference."""
    rows = []
    for test in tests:
        heading = study.plan["columns"].get(test["what"], test["what"])
        text = test.get("text", f"{heading}: `{test['arm']}` against `{test['against']}`")
        rows.append([text, interval(test), p_value(test["holm_p"]), test["verdict"]])
    return markdown(["difference", "points", "p, Holm", "verdict"], rows)


def hypothesis_table(hypothesis):
    """-> lines of Markdown: the verdict, and a row for each part of the hypothesis."""
    rows = []
    for test in hypothesis["parts"]:
        draws = test["bootstrap"]
        row = {
            "what": UNITS.get(test["what"], f"points of {test['what']}"),
            "arm": f"`{test['arm']}`",
            "against": f"`{test['against']}`",
            "claim": f"{test['claim']:g}",
            "found": interval(test),
            "bootstrap, seeds x illustrations": "-",
            "p of no effect": p_value(test["p"]),
            "p of the claim, Holm": p_value(test["holm_against"]),
        }
        if draws:
            text = f"{draws['low']:+.2f} to {draws['high']:+.2f}"
            row["bootstrap, seeds x illustrations"] = text
        rows.append(row)
    p, claim = hypothesis["holm_p"], hypothesis["holm_claim"]
    text = f"**{hypothesis['id']}: {hypothesis['verdict']}** (after Holm: p of no effect {p:.3f}, "
    text += f"smallest p of a claim {claim:.3f})."
    if "claim" in hypothesis:
        text += f" Claim: {hypothesis['claim']}."
    return ["", text, "", *markdown(rows[0], [row.values() for row in rows])]


def csv_row(arm, tests, study):
    """A row of table.csv: every column with its deviation, every difference to the baseline."""
    seeds = study.rows[arm]
    row = {"arm": arm, "against": study.plan["arms"][arm], "seeds": len(seeds)}
    for name in [*study.plan["columns"], *(CURVE if "linear" in study.plan["columns"] else ())]:
        values = values_of(seeds, name)
        row[name] = np.mean(values) if values else None
        row[f"{name}_deviation"] = np.std(values, ddof=1) if len(values) > 1 else None
    for name in study.plan["compare"]:
        found = [x for x in tests if x.get("planned_for") == arm and x["what"] == name]
        for field in ("effect", "low", "high", "holm_p", "verdict"):
            row[f"{name}_{field}"] = found[0][field] if found else None
    for name in ("machine", "commit"):
        row[name] = "; ".join(sorted({run.get(name, "") for run in seeds.values()}))
    return {k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()}


def draw_arms(path, study, tests):
    """A bar for each arm, and a dot for each of its seeds; beside it, its difference from its baseline.

    tests: of `differences`. Without one of a compared column, the bars stand alone.
    """
    from common import plots  # matplotlib takes half a second to load

    column = next(iter(study.plan["compare"] or study.plan["columns"]))
    planned = {test["arm"]: test for test in tests if test.get("planned_for")}
    planned = {arm: test for arm, test in planned.items() if test["what"] == column}
    panels = 2 if planned else 1
    size = (3 + 3.4 * panels, 1.4 + 0.28 * len(study.rows))
    title = f"{study.plan['plan']} on {study.plan['data']}: a bar is a mean, a dot a seed"
    shape = {"sharey": True, "squeeze": False}
    with plots.panels(path, title, 1, panels, size, **shape) as axes:
        bars = axes[0, 0]
        for i, (arm, seeds) in enumerate(study.rows.items()):
            values = values_of(seeds, column)
            bars.barh(i, np.mean(values) if values else 0, color=plots.BLUE, alpha=0.3)
            bars.plot(values, [i] * len(values), "o", ms=4, alpha=0.7, color=plots.BLUE)
            if arm in planned:
                draw_difference(axes[0, 1], i, planned[arm], plots.INK)
        bars.set(xlabel=study.plan["columns"].get(column, column))
        bars.set_yticks(range(len(study.rows)), list(study.rows))
        bars.set_ylim(len(study.rows) - 0.5, -0.5)
        if planned:
            axes[0, 1].axvline(0, color=plots.INK, lw=0.8)
            axes[0, 1].set(xlabel="difference, points (95 % interval)")
        for axis in axes.flat:
            axis.grid(axis="x", alpha=0.3)


def draw_difference(axis, i, test, colour):
    """A test as a dot in row i, with its interval where there is one."""
    axis.plot(test["effect"], i, "o", ms=5, color=colour)
    if test["low"] is not None:
        axis.plot([test["low"], test["high"]], [i, i], color=colour)


def draw_curves(path, study, arms):
    """Accuracy by epoch: the mean over seeds, in a band of one standard deviation."""
    from common import plots

    if unknown := [arm for arm in arms if arm not in study.rows]:
        raise UserError(f"no rows of {', '.join(unknown)}; there are: {', '.join(study.rows)}")
    seeds = max(len(study.rows[arm]) for arm in arms)
    title = (
        f"{study.plan['plan']} on {study.plan['data']}: means of {seeds} seeds, bands of one std"
    )
    with plots.panels(path, title, 1, 2, (9.6, 4.2)) as axes:
        for arm, colour in zip(arms, plots.COLOURS, strict=False):
            curves = [row["curve"] for row in study.rows[arm].values()]
            for axis, name in zip(axes, ("linear", "knn"), strict=True):
                values = np.array([curve[name] for curve in curves])  # (seeds, evaluations)
                mean, std = values.mean(0), values.std(0, ddof=min(1, len(values) - 1))
                epochs = curves[0]["epoch"]
                axis.plot(epochs, mean, color=colour, label=arm)
                axis.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
        axes[0].set(title="Linear probe during the run", xlabel="epoch", ylabel="Top-1, %")
        axes[1].set(title="kNN during the run", xlabel="epoch", ylabel="Top-1, %")
        for axis in axes:
            plots.legend_below(axis, 2)


def write(study, figure=False, curves=()):
    """The files of one of `judged`. curves: the arms of curves.png."""
    plan, folder = study.plan, study.folder
    if not study.rows:
        raise UserError(f"{folder} has no row yet; lab.run makes them")
    tests = differences(study)
    text = [f"# {plan['plan']} on {plan['data']}, {plan['split']}: {plan['question']}", ""]
    text += [*arm_table(study), *difference_table(study, tests), ""]
    text += [f"Failed: `{r['arm']}`, seed {r['seed']}: {r['failed']}\n" for r in study.failed]
    family = "the planned arms of a column"
    if tests and "best" in plan["arms"].values():
        family = "all pairs of arms, because these runs chose the best"
    text.append(NOTES.format(family=family, margin=plan["margin"]))
    for hypothesis in study.hypotheses:
        text += hypothesis_table(hypothesis)
    if figure:
        draw_arms(folder / "figure.png", study, tests)
        text += ["", "![One dot is one seed](figure.png)"]
    if curves:
        draw_curves(folder / "curves.png", study, curves)
    save_text("\n".join(text) + "\n", folder / "table.md")
    rows = [csv_row(arm, tests, study) for arm in study.rows]
    save_csv(rows, folder / "table.csv")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="of a plan's rows")
    add("--figure", action="store_true", help="draw figure.png, too")
    add("--curves", nargs="+", default=[], metavar="ARM", help="draw learning curves of these, too")
    args = parser.parse_args()
    studies = judged([open_folder(folder) for folder in args.folders])
    drawn = ", figure.png" * args.figure + ", curves.png" * bool(args.curves)
    for study in studies:
        write(study, args.figure, args.curves)
        print(f"wrote    {study.folder}/table.md, table.csv{drawn}")


if __name__ == "__main__":
    cli(main)
