"""Is one configuration better than another? Runs paired by seed on the same images: a table, JSON, learning curves.

Takes the reports that probe.py made of the runs. The first configuration named is the baseline of every pair.
"""

import json
import re
from pathlib import Path

import numpy as np

from common import plots, stats
from common.io import UserError, save_json, save_text

HEADS = {"logistic": "logistic", "linear": "linear", "knn": "kNN"}


def by_config(reports):
    """-> {name: {seed: report}}: runs whose flags differ in nothing but the seed, named as the first without -sN."""
    found, names = {}, {}
    for report in reports:
        config = {k: v for k, v in report["config"].items() if k != "seed"} or {"run": report["run"]}
        key = json.dumps(config, sort_keys=True)
        name = names.setdefault(key, re.sub(r"-s\d+$", "", report["run"]))
        if name in found and key != next(k for k, n in names.items() if n == name):
            name = names[key] = report["run"]
        seed = report["config"].get("seed", 0)
        if seed in found.setdefault(name, {}):
            raise UserError(f"{report['path']} and {found[name][seed]['path']} have the same flags and the "
                                     "same seed; name each run once")  # fmt: skip
        found[name][seed] = report
    return found


def spread(values):
    """-> {"mean", "std", "n"}; no std of a single value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


def summary(seeds):
    """{seed: report} -> Top-1 of each head in percent, and when the threshold was reached by those that did."""
    reports = list(seeds.values())
    row = {head: spread([100 * r["rows"]["mean"][head]["top1"] for r in reports]) for head in HEADS}
    runs = [r["efficiency"] for r in reports if r["efficiency"]]
    for key in ("reached_epoch", "reached_seconds"):
        there = [e[key] for e in runs if e[key] is not None]
        row[key] = spread(there) if there else None
    memory = [e["peak_memory_mb"] for e in runs if e["peak_memory_mb"] is not None]
    return row | {"runs": len(reports), "peak_memory_mb": max(memory) if memory else None}


def pair(first, other, head, groups):
    """other minus first in points of Top-1, over the seeds that both have; groups (images): their illustrations."""
    seeds = sorted(first.keys() & other.keys())
    if not seeds:
        return None
    right = [[100.0 * x[s]["right"][head].double().numpy() for s in seeds] for x in (other, first)]
    difference = np.stack(right[0]) - np.stack(right[1])  # (seeds, images)
    row = {"seeds": seeds, "per_seed": difference.mean(1).tolist(), "bootstrap": stats.bootstrap(difference, groups)}
    row["t"] = stats.paired_t(difference.mean(1)) if len(seeds) > 1 else None
    return row | {"p": (row["t"] or row["bootstrap"])["p"]}


def verdict(row, claim):
    """Supported: the interval over seeds is above 0, Holm agrees, and the estimate is at least what was claimed."""
    if row["t"] is None:
        return "undecided: one seed"
    if row["holm_p"] < 0.05 and row["t"]["low"] > 0 and row["t"]["mean"] >= claim:
        return "supported"
    return "worse" if row["holm_p"] < 0.05 and row["t"]["high"] < 0 else "undecided"


def pairs(configs, groups, claim):
    """Every configuration against the first, for every head; one family for Holm."""
    (base, first), *others = configs.items()
    rows = [{"pair": f"{name} - {base}", "head": head} | found for name, other in others for head in HEADS
            if (found := pair(first, other, head, groups))]  # fmt: skip
    for row, p in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["holm_p"] = p
    return [row | {"verdict": verdict(row, claim)} for row in rows]


def plus_minus(x, digits=1):
    if x is None:
        return "not reached"
    return f"{x['mean']:.{digits}f}" + (f" ± {x['std']:.{digits}f}" if x["std"] is not None else "")


def markdown(summaries, rows, head):
    """The two tables, as Markdown."""
    columns = ("configuration", "seeds", "logistic Top-1, %", "linear", "kNN", "epochs to threshold", "seconds", "MB")
    lines = [head, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, s in summaries.items():
        reached = "" if s["reached_epoch"] is None or s["reached_epoch"]["n"] == s["runs"] else (
            f" ({s['reached_epoch']['n']} of {s['runs']})")  # fmt: skip
        top1 = " | ".join(plus_minus(s[h], 2) for h in HEADS)
        lines.append(f"| {name} | {s['runs']} | {top1} | {plus_minus(s['reached_epoch'])}{reached} | "
                     f"{plus_minus(s['reached_seconds'], 0)} | {s['peak_memory_mb']} |")  # fmt: skip
    lines += ["", "Mean ± standard deviation over seeds. Differences in points of Top-1, paired by seed, same images;",
              "t: 95 % interval over seeds; bootstrap: over seeds and illustrations; p after Holm over all rows.", "",
              "| difference | head | points | t | bootstrap | p | |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        t, b = (f"{x['low']:+.2f} to {x['high']:+.2f}" if x else "one seed" for x in (r["t"], r["bootstrap"]))
        lines.append(f"| {r['pair']} | {HEADS[r['head']]} | {r['bootstrap']['mean']:+.2f} | {t} | {b} | "
                     f"{r['holm_p']:.3f} | {r['verdict']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def write(out, reports, groups, threshold, claim):
    """compare.md, compare.json and curves.png into the folder out; prints the tables."""
    configs = by_config(reports)
    summaries = {name: summary(seeds) for name, seeds in configs.items()}
    rows = pairs(configs, groups.numpy(), claim) if len(configs) > 1 else []
    first = reports[0]
    head = f"{first['split']} of {first['config'].get('data', 'the data')}, mean token; threshold: {threshold[1]}"
    text = markdown(summaries, rows, head)
    about = {k: first[k] for k in ("command", "machine", "commit", "split")}
    save_text(text, Path(out) / "compare.md")
    report = about | {"threshold": threshold, "configurations": summaries, "pairs": rows}
    save_json(report, Path(out) / "compare.json")
    logs = {n: [[r for r in x["log"] if "knn" in r] for x in seeds.values()] for n, seeds in configs.items()}
    logs = {n: seeds for n, seeds in logs.items() if all(seeds)}
    if logs:
        thumbnail = next(iter(logs.values()))[0][0].get("knn_thumbnail")
        plots.learning_curves(Path(out) / "curves.png", logs, thumbnail, threshold[0], "Learning curves")
    print(f"{text}\nwrote    {out}/compare.md, compare.json" + (", curves.png" if logs else ""))
