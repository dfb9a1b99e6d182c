"""Stage 3: what did the encoder learn? Frozen features, simple classifiers, and controls for every number.

    python probe.py runs/NAME                     # on the data that the run was trained on
    # is B better than A? two seeds or more of each
    python probe.py runs/A-s0 runs/A-s1 runs/B-s0 runs/B-s1

Reads:  runs/NAME (model.safetensors, log.jsonl) or a public checkpoint; datasets/NAME (train, dev and
        the reported split; without dev, a tenth of train is held out for choices)
Writes: runs/NAME/ probe.json (with --headline probe-headline.json), features.safetensors,
        attention.png, patches.png, neighbours.png; for another data set or split the same in
        runs/NAME/DATA-SPLIT/; for several runs also compare.json in --out

The headline was fixed before any number was seen: Top-1 of a logistic regression on the extremes of
the patch tokens. Its strength C is chosen on dev. Features are kept in fp16 and classifiers run on
the CPU, so the same command gives the same digits.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import torch

import data
from common import features, metrics
from common.checkpoints import flags_of, load_encoder
from common.command import Flags, Parser, between, claim, cli, command, drawing, working
from common.io import UserError, save_json
from common.train import commit, machine, read_log, seeded
from model import shape_of

FEW_SHOT = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
COLUMNS = (  # of the printed table: group, heading, where its number is in a row of probe.json
    ("logistic", "Top-1", "logistic.top1"),
    ("", "Top-5", "logistic.top5"),
    ("", "F1", "logistic.macro_f1"),
    ("kNN", "Top-1", "knn.top1"),
    ("retrieval", "mAP", "retrieval.map"),
    ("", "R@1", "retrieval.recall1"),
    ("verify", "EER", "verification.equal_error_rate"),
    ("5-way", "1-shot", "few_shot.5-way 1-shot.mean"),
    ("", "5-shot", "few_shot.5-way 5-shot.mean"),
)
LESS_IS_BETTER = {"verification.equal_error_rate"}
CONFIDENCE = 0.95


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of pretrain.py, or public checkpoints")
    add("--data", metavar="DIR", help="packed set with labels (default: that of the first run)")
    add("--split", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add(
        "--pool",
        choices=features.POOLS,
        default=features.HEADLINE,
        help=f"pooling of the headline (default: {features.HEADLINE})",
    )
    add(
        "--headline",
        action="store_true",
        help="only the headline and kNN: no controls, no pictures",
    )
    add(
        "--threshold",
        type=between(0, 100),
        metavar="PERCENT",
        help="kNN Top-1 in the run's log that counts as learned (default: random init + 90 %% of\n"
        "the gain of the first run with random masks)",
    )
    add(
        "--out",
        metavar="DIR",
        help="folder of a comparison (default: compare/ next to the first run)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, mps: of the encoder")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "bf16", "fp32"],
        help="of the encoder's products",
    )
    return Flags(parser)


# ---- what is measured on -------------------------------------------------------------------------


def open_task(args):
    """features.open_task, and what is fitted, chosen on and reported: the same for all features.

    task.home: {run: the folder of its results}; task.out: that of a comparison.
    """
    task = features.open_task(args, args.runs[0])
    task.home = {run: features.results_folder(run, task.folder, args.split) for run in args.runs}
    task.out = comparison_folder(args, task) if len(args.runs) > 1 else None
    task.labels = {name: split["labels"] for name, split in task.splits.items()}
    task.groups = {name: data.groups_of(split) for name, split in task.splits.items()}
    task.names = task.train["header"]["classes"]
    fit, choose, choose_in = features.hold_out(task.splits)
    task.uses = (("train", fit), (choose_in, choose), (args.split, slice(None)))
    task.counts = torch.bincount(task.labels["train"][fit].clamp(min=0), minlength=len(task.names))
    task.controls = {}  # {shape of an encoder: rows of its controls}
    task.pool, task.headline = args.pool, args.headline
    if task.labelled:
        check_classes(task, args.split)
        task.episodes = draw_episodes(task, args.split)
    return task


def comparison_folder(args, task):
    """Where a comparison of several runs goes."""
    first = features.home_of(args.runs[0])
    home = task.home[args.runs[0]]
    return Path(args.out or first.parent / ("compare" if home == first else f"compare-{home.name}"))


def check_classes(task, split):
    """Every class that is reported has to be in train."""
    lost = [task.names[c] for c in task.labels[split].unique() if task.counts[c] == 0]
    if lost:
        raise UserError(
            f"{task.folder}: {split} has classes that train has not ({', '.join(lost[:4])}); "
            "pack it again: python data.py IMAGES --min-per-class 10"
        )


def draw_episodes(task, split):
    """Few-shot episodes, drawn once for all features -> {"5-way 1-shot": (examples, questions)}."""
    found = {}
    for ways, shots in FEW_SHOT:
        bank, queries = task.labels["train"], task.labels[split]
        episodes = metrics.draw_episodes(bank, queries, ways, shots, seeded(0, ways, shots))
        if episodes is not None:
            found[f"{ways}-way {shots}-shot"] = episodes
    return found


def results_file(task, run):
    return task.home[run] / f"probe{'-headline' * task.headline}.json"


def rows_of(values, task):
    """values {split: (n, ...)} -> of the rows that are fitted, chosen on, reported."""
    return [values[name][rows] for name, rows in task.uses]


# ---- numbers: each function takes a set of features {split: (n, D)} ------------------------------


@working("fitting classifiers")
def measure(found, task):
    """Every number about one set of features -> (row of probe.json, {head: which images are right})."""
    reported = task.args.split
    bank, queries, labels = found["train"], found[reported], task.labels[reported]
    (x, choose, report), (y, truth, _) = rows_of(found, task), rows_of(task.labels, task)
    predict, C = metrics.logistic_probe(x, y, choose, truth, len(task.names))
    scores = {
        "logistic": predict(report),
        "knn": metrics.knn_votes(bank, task.labels["train"], queries, len(task.names)),
    }
    row = {head: metrics.classification(s, labels, task.counts) for head, s in scores.items()}
    row["logistic"]["C"] = C
    if not task.headline:
        row |= without_classifier(bank, queries, task)
    return row, {head: s.argmax(1) == labels for head, s in scores.items()}


def without_classifier(bank, queries, task):
    """Retrieval, verification and few-shot episodes: nothing is fitted.

    Few-shot accuracy is the mean of 600 episodes with half of its 95 % interval.
    """
    labels, groups = task.labels[task.args.split], task.groups[task.args.split]
    row = {"retrieval": metrics.retrieval(queries, labels, groups), "few_shot": {}}
    rows = data.evenly_spaced(len(labels), 2000)
    same, different = metrics.pair_cosines(queries[rows], labels[rows], groups[rows])
    if len(same) and len(different):
        row["verification"] = {
            "equal_error_rate": metrics.equal_error_rate(same, different),
            "tpr_at_fpr_1_percent": metrics.tpr_at_fpr(same, different, 0.01),
        }
    for name, episodes in task.episodes.items():
        accuracy = metrics.few_shot(bank, queries, *episodes)
        half = 1.96 * accuracy.std().item() / len(accuracy) ** 0.5
        row["few_shot"][name] = {"mean": accuracy.mean().item(), "half": half}
    return row


def chance(task):
    """What guessing gets, as a row: the most frequent classes of train, a random ranking."""
    labels = task.labels[task.args.split]
    share = torch.bincount(labels, minlength=len(task.names)).double() / len(labels)
    same = share.square().sum().item()
    guess = metrics.classification(
        task.counts.double().expand(len(labels), -1), labels, task.counts
    )
    return {
        "logistic": guess,
        "knn": guess,
        "retrieval": {"map": same, "recall1": same},
        "verification": {"equal_error_rate": 0.5, "tpr_at_fpr_1_percent": 0.01},
        "few_shot": {name: {"mean": 1 / int(name.split("-")[0])} for name in task.episodes},
    }


def control_rows(encoder, size, run, task):
    """Rows of the random-init encoder and of thumbnails: measured once for all runs of one shape."""
    shape = tuple(shape_of(encoder).values())
    if shape not in task.controls:
        untrained = features.untrained_like(encoder).to(task.device)
        found = features.of_controls(features.home_of(run).parent, untrained, size, task)
        task.controls[shape] = {name: measure(x, task)[0] for name, x in found.items()}
    return task.controls[shape]


# ---- epochs to a threshold -----------------------------------------------------------------------


def threshold_of(args):
    """-> (kNN Top-1 in percent to be reached, how it was fixed), (None, why) where no log tells."""
    if args.threshold is not None:
        return args.threshold, "as --threshold says"
    plain = [run for run in args.runs if flags_of(run).get("mask") == "random"]
    reference = (plain or args.runs)[0]
    knn = [r["knn"] for r in read_log(features.home_of(reference) / "log.jsonl") if "knn" in r]
    if not knn:
        return None, f"no kNN in {reference}/log.jsonl"
    return metrics.threshold_of(knn), f"random init + 90 % of the gain of {Path(reference).name}"


def efficiency(rows, threshold):
    """Rows of log.jsonl -> epochs and seconds until kNN reached the threshold (None: never).

    Seconds are those of the whole run, a teacher's maps and the evaluations included.
    """
    evaluated = [r for r in rows if "knn" in r]
    if not evaluated or threshold is None:
        return None
    knn = [r["knn"] for r in evaluated]
    reached = {
        key: metrics.first_crossing([r[key] for r in evaluated], knn, threshold)
        for key in ("epoch", "seconds")
    }
    return {
        "untrained": knn[0],
        "final": knn[-1],
        "threshold": threshold,
        "reached_epoch": reached["epoch"],
        "reached_seconds": reached["seconds"],
        "epochs": evaluated[-1]["epoch"],
        "peak_memory_mb": max((r["memory_mb"] for r in rows if "memory_mb" in r), default=None),
    }


def efficiency_line(found, how):
    if found is None:
        return "no kNN in its log: nothing about epochs"
    when = "not reached"
    if found["reached_epoch"] is not None:
        when = f"after {found['reached_epoch']:.1f} epochs, {found['reached_seconds']:.0f} s"
    return f"kNN of {found['threshold']:.1f} % in the run ({how}): {when}"


# ---- the table -----------------------------------------------------------------------------------


def percent(row, where):
    """ "few_shot.5-way 1-shot.mean" of a row, in percent; None where it has none."""
    for key in where.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return None if row is None else 100 * row


def beats(value, other, where):
    return value < other if where in LESS_IS_BETTER else value > other


def table(rows):
    """rows {name: row} -> lines; < marks what does not beat the best thumbnail."""
    columns = [where for _, _, where in COLUMNS]
    thumbs = [row for name, row in rows.items() if name.startswith("thumb")]
    best = {}
    for where in columns:
        values = [percent(row, where) for row in thumbs]
        values = [v for v in values if v is not None]
        if values:
            best[where] = min(values) if where in LESS_IS_BETTER else max(values)
    lines = [
        f"{'':18}" + "".join(f"{group:>8}" for group, _, _ in COLUMNS),
        f"{'features':18}" + "".join(f"{heading:>8}" for _, heading, _ in COLUMNS),
    ]
    for name, row in rows.items():
        judged = best if not name.startswith(("thumb", "chance")) else {}
        lines.append(f"{name:18}" + "".join(cell(row, where, judged) for where in columns).rstrip())
    return lines


def cell(row, where, best):
    """One number of the table, marked where it does not beat the best thumbnail."""
    value = percent(row, where)
    if value is None:
        return f"{'-':>7} "
    loses = where in best and not beats(value, best[where], where)
    return f"{value:7.1f}" + ("<" if loses else " ")


# ---- pictures ------------------------------------------------------------------------------------


def draw(home, encoder, size, task, found):
    """attention.png, patches.png, neighbours.png; found: features of the mean token."""
    from common import plots  # matplotlib takes a second to load

    split, train = task.split, task.train
    rows = data.evenly_spaced(len(split["images"]), data.CHUNK)
    _, view = next(data.whole_views(split["images"], rows, size, task.device))
    few = data.evenly_spaced(len(rows), 8)
    title = f"Attention of CLS in the last block: {home.name}"
    plots.attention_sheet(home / "attention.png", encoder, view[few[:5]], title)
    title = f"Patch tokens, principal components as colours: {home.name}"
    plots.patch_sheet(home / "patches.png", encoder, torch.cat([view[few], view]), title)
    rows = rows[few[:6]]
    alike = split["labels"][rows][:, None] == train["labels"] if task.labelled else None
    plots.neighbours(
        home / "neighbours.png",
        found[task.args.split][rows],
        found["train"],
        lambda index: train["images"][index.numpy()],
        split["images"][rows.numpy()],
        lambda i, j: None if alike is None else bool(alike[i, j]),
        f"{task.args.split} pictures and their nearest in train, cosine of mean tokens: {home.name}",
    )


# ---- one run -------------------------------------------------------------------------------------


def probe(run, task, threshold):
    """Extract, measure, draw and write one run -> its report."""
    encoder, size = load_encoder(run)
    encoder.to(task.device).requires_grad_(False)
    found = features.of_run(task.home[run], run, encoder, size, task)
    if not task.headline:
        with working("drawing"), drawing("attention.png and others"):
            draw(task.home[run], encoder, size, task, found["mean"])
    report = about(run, task)
    if task.labelled:
        report |= measure_run(run, encoder, size, found, task)
        log = read_log(features.home_of(run) / "log.jsonl")
        report |= {"threshold": threshold[1], "efficiency": efficiency(log, threshold[0])}
        print(efficiency_line(report["efficiency"], threshold[1]))
    else:
        print(f"{run}: no numbers, for they need labels of two classes or more")
    save_report(report, results_file(task, run))
    return report | {"path": str(run)}


def about(run, task):
    """What a report says of the run and of the data."""
    return {
        "command": command(),
        "machine": machine(task.device),
        "commit": commit(),
        "run": features.home_of(run).name,
        "config": flags_of(run),
        "data": str(task.folder),
        "split": task.args.split,
        "dtype": task.dtype,
        "images": {name: len(x) for name, x in task.labels.items()},
    }


def measure_run(run, encoder, size, found, task):
    """Rows of all features and controls, printed -> what the report says of them."""
    pool = task.pool
    found = {pool: found[pool]} if task.headline else found
    measured = {name: measure(x, task) for name, x in found.items()}
    rows = {name: row for name, (row, _) in measured.items()}
    if not task.headline:
        rows |= control_rows(encoder, size, run, task)
        rows["chance"] = chance(task)
    print("\n".join(table(rows)))
    headline = rows[pool]["logistic"]["top1"]
    right = {head: metrics.to_bits(x) for head, x in measured[pool][1].items()}
    print(f"headline {100 * headline:.1f} %: logistic regression on {pool}, {task.args.split}")
    return {
        "classes": task.names,
        "pool": pool,
        "headline": headline,
        "rows": {name: without_lists(row) if name != pool else row for name, row in rows.items()},
        "right": right,
    }


def without_lists(row):
    """A row without its confusion and its numbers of each class: those of one pooling are enough."""
    return {
        part: {k: x for k, x in numbers.items() if k not in ("per_class", "confusion")}
        for part, numbers in row.items()
    }


def save_report(report, path):
    save_json(report, path)
    text = path.read_text()
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text)  # lists of numbers on one line
    print(f"wrote    {path}")


# ---- several runs: is B better than A? -----------------------------------------------------------


def by_config(reports):
    """-> {name: {seed: report}}: runs whose flags differ in nothing but the seed."""
    groups = {}
    for report in reports:
        config = {k: v for k, v in report["config"].items() if k not in ("seed", "out")}
        seeds = groups.setdefault(json.dumps(config or report["run"], sort_keys=True), {})
        seed = report["config"].get("seed", 0)
        if seed in seeds:
            raise UserError(
                f"{report['path']} and {seeds[seed]['path']} have the same flags and the same "
                "seed; name each run once"
            )
        seeds[seed] = report
    return {re.sub(r"-s(eed-)?\d+$", "", first_of(s)["run"]): s for s in groups.values()}


def first_of(seeds):
    return next(iter(seeds.values()))


def summary(seeds):
    """{seed: report} -> mean and standard deviation over seeds, in percent or epochs."""
    row = {"runs": len(seeds)}
    for head in ("logistic", "knn"):
        values = [100 * r["rows"][r["pool"]][head]["top1"] for r in seeds.values()]
        row[head] = mean_and_deviation(values)
    epochs = [r["efficiency"]["reached_epoch"] for r in seeds.values() if r["efficiency"]]
    reached = [e for e in epochs if e is not None]
    row["epochs"] = mean_and_deviation(reached) if reached else None
    return row


def mean_and_deviation(values):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "n": len(values)}


def difference(first, other, head):
    """other minus first in points of Top-1, paired by seed: the mean and its 95 % t interval.

    The interval is None for fewer than three seeds: two give a t of 12.7.
    """
    from scipy.stats import ttest_rel

    seeds = sorted(first.keys() & other.keys())
    a, b = (
        [100 * side[s]["rows"][side[s]["pool"]][head]["top1"] for s in seeds]
        for side in (other, first)
    )
    row = {"seeds": seeds, "mean": float(np.mean(np.subtract(a, b))) if seeds else None}
    row |= {"low": None, "high": None, "p": None}
    if len(seeds) >= 3 and np.std(np.subtract(a, b)) > 0:
        test = ttest_rel(a, b)
        low, high = test.confidence_interval(CONFIDENCE)
        row |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
    return row


def in_words(row):
    """A difference as text."""
    if row["mean"] is None:
        return "no seed in common"
    if row["low"] is None:
        return f"{row['mean']:+.2f} points ({len(row['seeds'])} seeds: no interval)"
    interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
    return f"{row['mean']:+.2f} points ({interval}; p {row['p']:.3f}; {len(row['seeds'])} seeds)"


def compare(reports, task):
    """Means of each configuration and its difference from the first -> printed, and compare.json."""
    configs = by_config(reports)
    summaries = {name: summary(seeds) for name, seeds in configs.items()}
    (base, first), *others = configs.items()
    pairs = []
    for name, row in summaries.items():
        deviation = row["logistic"]["deviation"]
        spread = "" if deviation is None else f" ± {deviation:.2f}"
        print(f"{name}: headline {row['logistic']['mean']:.2f}{spread} % ({row['runs']} runs)")
    for name, other in others:
        for head in ("logistic", "knn"):
            row = {"pair": f"{name} - {base}", "head": head} | difference(first, other, head)
            pairs.append(row)
            print(f"{row['pair']}, {head}: {in_words(row)}")
    found = {"command": command(), "commit": commit(), "split": task.args.split}
    save_json(found | {"configurations": summaries, "pairs": pairs}, task.out / "compare.json")
    print(f"wrote    {task.out}/compare.json")


def main():
    args = parse_args()
    for run in args.runs:  # every mistake before minutes of work
        load_encoder(run)
    task = open_task(args)
    threshold = threshold_of(args)
    args.refuse_unread()
    for run in args.runs:
        claim([results_file(task, run)], fix="choose another --data or --split")
    if task.out:
        claim([task.out / "compare.json"])
    count = len(task.labels[args.split])
    print(f"data     {task.folder}: {args.split}, {count:,} images, {len(task.names)} classes")
    reports = []
    for run in args.runs:
        print(f"run      {run}")
        reports.append(probe(run, task, threshold))
    if task.out and task.labelled:
        compare(reports, task)
    run, folder = (shlex.quote(str(path)) for path in (args.runs[0], task.folder))
    print(f"next: python finetune_lora.py {run} --method lora --data {folder}")


if __name__ == "__main__":
    cli(main)
