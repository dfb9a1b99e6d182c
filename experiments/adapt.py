"""Linear, LoRA, full and from scratch side by side: rates swept on dev, then seeds, ranks and margins on val.

    python -m experiments.adapt ENCODER --data datasets/faces20 --phase rates,first,rank,margin,seeds

Calls finetune_lora.py as a user does, one run after the other, under --runs; finished ones are not run again, a killed
one goes on. Every run is a row of --out, which is written anew after each; the .md beside it sums them up. In phase
rates every method gets the same number of trials, judged on dev; the others take each method's best and report val.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from common.io import UserError, cli, read_csv, save_csv, save_text

ROOT = Path(__file__).resolve().parent.parent
RATES = {  # the trials of each method: what is swept, and its values
    "linear":  ("--head-lr", (1e-2, 3e-2, 1e-1, 3e-1)),
    "lora":    ("--lr", (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
    "full":    ("--lr", (5e-4, 1e-3, 2e-3, 4e-3)),
    "scratch": ("--lr", (2.5e-4, 5e-4, 1e-3, 2e-3)),
}  # fmt: skip
RANKS, MARGINS = (4, 16, 32), (0.1, 0.3, 0.5)  # of LoRA (8 is the default); of ArcFace
KEEP = ("run", "result", "phase", "method", "head", "r", "margin", "lr", "head_lr", "epochs", "keep", "seed",
        "evaluated_on", "top1", "top5", "macro_f1", "best_epoch", "parameters_trained", "share_trained_percent",
        "gradient_and_optimizer_mb", "step_ms", "peak_memory_mb", "seconds", "machine", "commit",
        "command")  # fmt: skip


def flags_of(method, args, phase):
    """What a method needs on the command line besides its rate."""
    epochs = args.trial_epochs if phase == "rates" else args.epochs
    words = ["--method", "full" if method == "scratch" else method]
    if method == "linear":
        return words
    words += ["--keep", args.keep, "--epochs", epochs * (args.scratch_times if method == "scratch" else 1)]
    return words + (["--from-scratch"] if method == "scratch" else [])


def plan(phase, args, best):
    """-> [(name, method, flags)] of a phase; best: {method: its flag and value} that phase rates found."""
    run = lambda m, *more: [*flags_of(m, args, phase), *more]  # noqa: E731
    if phase == "rates":
        return [(f"{m}{v:g}", m, run(m, RATES[m][0], v, "--eval-on", "dev")) for m in args.methods for v in RATES[m][1]]
    if phase in ("first", "seeds"):
        seeds = (0,) if phase == "first" else (1, 2)
        return [(f"{m}-s{s}", m, run(m, *best[m], "--seed", s)) for s in seeds for m in args.methods]
    if phase == "rank":
        return [(f"lora-r{r}", "lora", run("lora", *best["lora"], "--r", r)) for r in RANKS]
    if phase == "margin":
        heads = [("arcface", m) for m in MARGINS] + [("cosface", 0.35), ("curricularface", 0.5), ("ifa", None)]
        margin = lambda m: [] if m is None else ["--margin", m]  # noqa: E731
        return [(f"{h}{'' if m is None else m}", "lora", run("lora", *best["lora"], "--head", h, *margin(m)))
                for h, m in heads]  # fmt: skip
    raise UserError(f"--phase {phase} is unknown; choose from rates, first, rank, margin, seeds")


def chosen(rows):
    """Rows of phase rates -> {method: [flag, value]} with the highest macro-F1 on dev."""
    best = {}
    for row in rows:
        if row["phase"] == "rates" and float(row["macro_f1"]) > best.get(row["result"], (0, None))[0]:
            flag = RATES[row["result"]][0]
            best[row["result"]] = (float(row["macro_f1"]), [flag, row[flag[2:].replace("-", "_")]])
    return {method: words for method, (_, words) in best.items()}


def row_of(out, phase, method):
    """metrics.json of a run -> its row."""
    found = json.loads((out / "metrics.json").read_text())
    found = found["config"] | found | {"phase": phase, "result": method}
    return {k: round(found[k], 3) if isinstance(found[k], float) and found[k] > 1 else found[k] for k in KEEP}


def summary(rows):
    """Rows -> lines of Markdown: the methods over their seeds, then ranks and margins beside LoRA's default."""
    lines = ["| method | seeds | Top-1 | Top-5 | macro-F1 | trained | gradient, optimizer |", "|---" * 7 + "|"]
    groups = {}
    for r in rows:
        if r["phase"] not in ("rates", "rank", "margin"):
            groups.setdefault(f"{r['result']}, {r['epochs']} epochs", []).append(r)
    for name, runs in groups.items():
        cells = [name, str(len(runs)), *[spread(runs, key) for key in ("top1", "top5", "macro_f1")]]
        cells += [f"{float(runs[0]['share_trained_percent']):.2f} %", f"{runs[0]['gradient_and_optimizer_mb']} MB"]
        lines.append(f"| {' | '.join(cells)} |")
    default = [r for r in rows if r["phase"] == "first" and r["result"] == "lora"]
    for phase in ("rank", "margin"):
        if more := [r for r in rows if r["phase"] == phase]:
            lines += ["", f"| {phase} of LoRA, seed 0 | Top-1 | macro-F1 | parameters trained |", "|---|---|---|---|"]
            for r in default + more:
                name = f"r {r['r']}, {r['head']} head" + (f", margin {r['margin']}" if r["margin"] else "")
                cells = [name, f"{float(r['top1']):.2f}", f"{float(r['macro_f1']):.2f}", str(r["parameters_trained"])]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(runs, key):
    """ "91.20 ± 0.31" over runs, or the value of a single one."""
    values = [float(r[key]) for r in runs]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("encoder", help="as for finetune_lora.py")
    parser.add_argument("--data", required=True, help="packed set with a split dev")
    parser.add_argument("--runs", default="runs/adapt", help="where the runs go")
    parser.add_argument("--out", default="results/faces20/finetune.csv", help="where the rows go")
    parser.add_argument("--phase", default="rates,first", help="rates, first (seed 0), rank, margin, seeds (1 and 2)")
    parser.add_argument("--trial-epochs", type=int, default=2, help="of a run in phase rates")
    parser.add_argument("--epochs", type=int, default=8, help="of the other runs")
    parser.add_argument("--scratch-times", type=int, default=3, help="from scratch gets so many times the epochs")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the patches that a training view shows")
    parser.add_argument("--methods", default=",".join(RATES), help="of rates, first and seeds (default: %(default)s)")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    if unknown := set(args.methods) - set(RATES):
        raise UserError(f"--methods {', '.join(unknown)} is unknown; choose from {', '.join(RATES)}")
    rows = read_csv(args.out)
    for phase in args.phase.split(","):
        for name, method, flags in plan(phase, args, chosen(rows)):
            out = Path(args.runs) / f"{phase}-{name}"
            words = [args.encoder, "--data", args.data, "--out", out, "--resume", *flags]
            words = ["python", "finetune_lora.py", *map(str, words)]
            print(shlex.join(words), flush=True)
            if not (out / "metrics.json").exists():
                subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True)
            row = row_of(out, phase, method)
            rows = [r for r in rows if r["run"] != row["run"]] + [row]
            save_csv(args.out, rows)
            save_text("\n".join(summary(rows)) + "\n", Path(args.out).with_suffix(".md"))


if __name__ == "__main__":
    cli(main)
