"""Is one configuration better than another? Runs paired by seed on the same images: a table, JSON, learning curves.

Takes the reports that probe.py made of the runs. The first configuration named is the baseline of
every pair.
"""

import json
import re
from pathlib import Path

import numpy as np

from common import stats
from common.io import UserError, save_json, save_text

HEADS = {"logistic": "logistic", "linear": "linear", "knn": "kNN"}


def by_config(reports):
    """-> {name: {seed: report}}: runs whose flags differ in nothing but the seed, named as the
    first without -sN.
    """
    groups, named = {}, {}
    for report in reports:
        config = {k: v for k, v in report["config"].items() if k != "seed"} or {
            "run": report["run"]
        }
        seeds, seed = (
            groups.setdefault(json.dumps(config, sort_keys=True), {}),
            report["config"].get("seed", 0),
        )
        if seed in seeds:
            raise UserError(
                f"{report['path']} and {seeds[seed]['path']} have the same flags and the same seed; "
                "name each run once"
            )
        seeds[seed] = report
    for seeds in groups.values():
        first = next(iter(seeds.values()))
        names = re.sub(r"-s\d+$", "", first["run"]), first["run"], first["path"]
        named[next(name for name in names if name not in named)] = seeds
    return named


def summary(seeds):
    """{seed: report} -> Top-1 of each head in percent, and when the threshold was reached by those
    that did.
    """
    reports = list(seeds.values())
    row = {
        head: stats.mean_std([100 * r["rows"][r["pool"]][head]["top1"] for r in reports])
        for head in HEADS
    }
    runs = [r["efficiency"] for r in reports if r["efficiency"]]

    def measured(key):
        return [e[key] for e in runs if e[key] is not None]

    for key in ("reached_epoch", "reached_seconds"):
        row[key] = stats.mean_std(measured(key)) if measured(key) else None
    return row | {
        "runs": len(reports),
        "peak_memory_mb": max(measured("peak_memory_mb"), default=None),
    }


def pair(first, other, head, groups):
    """other minus first in points of Top-1, over the seeds that both have; groups (images): their
    illustrations.

    "t", "bootstrap" and "p" are None where the seeds allow no interval.
    """
    seeds = sorted(first.keys() & other.keys())
    if not seeds:
        return None
    right = [[100.0 * x[s]["right"][head].double().numpy() for s in seeds] for x in (other, first)]
    difference = np.stack(right[0]) - np.stack(right[1])  # (seeds, images)
    row = {
        "seeds": seeds,
        "per_seed": difference.mean(1).tolist(),
        "mean": float(difference.mean()),
    }
    t = stats.paired_t(difference, groups)
    return row | {"t": t, "bootstrap": t and stats.bootstrap(difference, groups), "p": t and t["p"]}


def verdict(row, claim):
    """Supported: the interval is above 0, Holm agrees, and the estimate is at least what was
    claimed.
    """
    if row["t"] is None:
        return "undecided"
    if row["holm_p"] < 0.05 and row["t"]["low"] > 0 and row["t"]["mean"] >= claim:
        return "supported"
    return "worse" if row["holm_p"] < 0.05 and row["t"]["high"] < 0 else "undecided"


def pairs(configs, groups, claim):
    """Every configuration against the first, for every head; one family for Holm."""
    (base, first), *others = configs.items()
    rows = [
        {"pair": f"{name} - {base}", "head": head} | row
        for name, other in others
        for head in HEADS
        if (row := pair(first, other, head, groups))
    ]
    stats.add_holm(rows)
    return [row | {"verdict": verdict(row, claim)} for row in rows]


def plus_minus(x, digits=1, missing="not reached"):
    """{"mean", "std"} -> "84.20 ± 0.31"; `missing` for None."""
    if x is None:
        return missing
    return f"{x['mean']:.{digits}f}" + (f" ± {x['std']:.{digits}f}" if x["std"] is not None else "")


def markdown(head, rows):
    """-> lines of a Markdown table."""
    first, *lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [first, "|---" * len(head) + "|", *lines]


def tables(summaries, rows, title):
    """The two tables, as Markdown."""
    cells = []
    for name, s in summaries.items():
        n = s["reached_epoch"]["n"] if s["reached_epoch"] else s["runs"]
        epochs = plus_minus(s["reached_epoch"]) + (
            f" ({n} of {s['runs']})" if n < s["runs"] else ""
        )
        cells.append(
            [
                name,
                s["runs"],
                *(plus_minus(s[head], 2) for head in HEADS),
                epochs,
                plus_minus(s["reached_seconds"], 0),
                s["peak_memory_mb"],
            ]
        )
    columns = (
        "configuration",
        "seeds",
        "logistic Top-1, %",
        "linear",
        "kNN",
        "epochs to threshold",
        "seconds",
        "MB",
    )
    lines = [
        title,
        "",
        *markdown(columns, cells),
        "",
        "Mean ± standard deviation over seeds. Differences in points of Top-1, paired by seed, same images;",
        "t, bootstrap: 95 % intervals over seeds and illustrations; p after Holm over all rows.",
        "",
    ]
    cells = []
    for r in rows:
        none = stats.why_none(r["per_seed"])
        both = (
            f"{x['low']:+.2f} to {x['high']:+.2f}" if x else none for x in (r["t"], r["bootstrap"])
        )
        p = "-" if r["holm_p"] is None else f"{r['holm_p']:.3f}"
        cells.append([r["pair"], HEADS[r["head"]], f"{r['mean']:+.2f}", *both, p, r["verdict"]])
    return (
        "\n".join(
            lines + markdown(("difference", "head", "points", "t", "bootstrap", "p", ""), cells)
        )
        + "\n"
    )


def write(out, reports, groups, threshold, claim):
    """compare.md, compare.json and curves.png into the folder out; prints the tables."""
    from common import plots  # matplotlib takes a second to load

    configs, first, out = by_config(reports), reports[0], Path(out)
    summaries = {name: summary(seeds) for name, seeds in configs.items()}
    rows = pairs(configs, groups.numpy(), claim) if len(configs) > 1 else []
    data = first["config"].get("data", "the data")
    title = f"{first['split']} of {data}, {first['pool']} of tokens; threshold: {threshold[1]}"
    text = tables(summaries, rows, title)
    save_text(text, out / "compare.md")
    report = {k: first[k] for k in ("command", "machine", "commit", "split")}
    save_json(
        report | {"threshold": threshold, "configurations": summaries, "pairs": rows},
        out / "compare.json",
    )
    logs = {
        n: [[r for r in x["log"] if "knn" in r] for x in seeds.values()]
        for n, seeds in configs.items()
    }
    if logs := {n: seeds for n, seeds in logs.items() if all(seeds)}:
        thumbnail = next(iter(logs.values()))[0][0].get("knn_thumbnail")
        plots.learning_curves(out / "curves.png", logs, thumbnail, threshold[0], "Learning curves")
    print(f"{text}\nwrote    {out}/compare.md, compare.json" + (", curves.png" if logs else ""))
