"""Stage 3: what did the encoder learn? Frozen features, simple classifiers, and controls beside every number.

    python probe.py runs/NAME                     # on the data that the run was trained on
    python probe.py runs/A-s0 runs/A-s1 runs/B-s0 runs/B-s1 --data datasets/X     # and is A better than B?

Reads:  runs/NAME (model.safetensors, log.jsonl), datasets/NAME (train, val; choices are made on dev, or on a tenth
        of train)
Writes: runs/NAME/ probe.json, features.safetensors, attention.png, patches.png, neighbours.png, scatter.png,
        confusion.png; beside the run controls-DIGEST.safetensors (untrained encoder and thumbnails, for all runs);
        of several runs compare/ compare.md, compare.json, curves.png

The headline is fixed before any number is seen: logistic regression on the mean patch token, Top-1 on val. All poolings
are reported, none is chosen on val. The same command gives the same digits: features are kept in fp16, classifiers run
on the CPU, all chance comes from --seed.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch

import data
from common import compare, features, metrics, plots, stats
from common.checkpoints import load_encoder
from common.io import UserError, cli, save_text
from common.train import autocast_of, command, commit, machine, pick_device, pick_dtype, read_log, seeded
from model import untrained_like

FEW_SHOT = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
COLUMNS = (  # of the printed table: heading, where its number is in a row of probe.json
    ("Top-1", "logistic.top1"), ("Top-5", "logistic.top5"), ("F1", "logistic.macro_f1"), ("Top-1", "linear.top1"),
    ("Top-1", "knn.top1"), ("mAP", "retrieval.map"), ("R@1", "retrieval.recall1"), ("R@5", "retrieval.recall5"),
    ("1-shot", "few_shot.5-way 1-shot.mean"), ("5-shot", "few_shot.5-way 5-shot.mean"))  # fmt: skip


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument_group("what is probed").add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of pretrain.py (or a public checkpoint)")
    add("--data", metavar="DIR", help="packed set with labels (default: what the first run was trained on)")
    add("--split", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add("--views", type=int, default=3, metavar="V", help="views of a training image for the MAE recipe: whole + crops")
    add("--headline", action="store_true", help="only logistic regression and kNN on the mean token; no controls, no "
        "pictures\n(what experiments/study.py repeats for every run)")
    add("--blocks", action="store_true", help="also the mean token after each block")
    add("--snapshots", action="store_true", help="also a ridge probe of each runs/NAME/snapshots/encoder-EPOCH")
    add = parser.add_argument_group("comparison and efficiency").add_argument
    add("--threshold", type=float, metavar="PERCENT", help="kNN Top-1 to reach in the run's log\n"
        "(default: untrained + 90 %% of the gain of --reference)")
    add("--reference", metavar="RUN", help="run of the threshold (default: the first with random masks, else itself)")
    add("--claim", type=float, default=0.0, metavar="POINTS", help="a difference is supported if it is at least this")
    add("--out", metavar="DIR", help="where a comparison goes (default: compare/ beside the first run)")
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=int, default=0, help="of crops, mini-batches and episodes")
    add("--device", default="auto", help="auto, cpu, cuda, mps: of the encoder; classifiers run on the CPU")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the encoder's matrix products")
    return parser.parse_args()
# fmt: on


# ---- a run ---------------------------------------------------------------------------------------------------------


def home_of(run):
    """Where a run's results go; those of a single file to a folder of its name beside it."""
    return Path(run) if Path(run).is_dir() else Path(run).with_suffix("")


def open_task(folder, split, seed):
    """Data, labels, and what is fitted, chosen on and reported: one dict, the same for every set of features."""
    splits = features.open_splits(folder, split)
    rows, choose, choose_in = features.hold_out(splits)
    labels, header = {name: s["labels"] for name, s in splits.items()}, splits["train"]["header"]
    task = {"splits": splits, "held": split, "fit": rows, "choose": choose, "choose_in": choose_in, "labels": labels,
            "groups": {name: features.groups_of(s) for name, s in splits.items()}, "names": header["classes"],
            "labelled": data.has_labels(splits["train"]) and data.has_labels(splits[split])}  # fmt: skip
    if task["labelled"]:
        counts = torch.bincount(labels["train"][rows], minlength=len(header["classes"]))
        if lost := [header["classes"][c] for c in labels[split].unique() if counts[c] == 0]:
            raise UserError(f"{folder}: {split} has classes that train has not ({', '.join(map(str, lost[:4]))}); "
                            "pack it again: python data.py IMAGES --min-per-class 10")  # fmt: skip
        task["counts"], queries = counts, labels[split]
        drawn = {f"{w}-way {s}-shot": metrics.draw_episodes(labels["train"], queries, w, s, seeded(seed, w, s))
                 for w, s in FEW_SHOT}  # fmt: skip
        task["episodes"] = {name: e for name, e in drawn.items() if e is not None}
    return task


# ---- numbers: each function takes a set of features {split: (V, n, D)} ---------------------------------------------


def logistic_scores(found, task):
    """-> (scores of the held split, the C that cross-validation on train chose)."""
    labels, classes = task["labels"]["train"][task["fit"]], len(task["names"])
    x, held = metrics.standardise(found["train"][0][task["fit"]], found[task["held"]][0])
    C = metrics.chosen_strength(x, labels, classes, task["groups"]["train"][task["fit"]])
    W, b = metrics.fit_logistic(x, labels, classes, C)
    return held @ W + b, C


def linear_scores(found, task, seed):
    """-> (scores of the held split, the rate that was best on dev): the MAE recipe."""
    labels, classes = task["labels"], len(task["names"])
    scores = metrics.bn_linear(found["train"][:, task["fit"]], labels["train"][task["fit"]], classes, seed=seed)
    truth = labels[task["choose_in"]][task["choose"]]
    top1 = [metrics.topk(s, truth, 1) for s in scores(found[task["choose_in"]][0][task["choose"]])]
    best = top1.index(max(top1))
    return scores(found[task["held"]][0])[best], metrics.RATES[best]


def few_shot(found, task):
    """-> {"5-way 1-shot": {"mean", "half"}, ...}: mean of 600 episodes and half of its 95 % interval."""
    result = {}
    for name, (examples, questions) in task["episodes"].items():
        accuracy = metrics.few_shot(found["train"][0], found[task["held"]][0], examples, questions)
        half = 1.96 * accuracy.std().item() / len(accuracy) ** 0.5
        result[name] = {"mean": accuracy.mean().item(), "half": half}
    return result


def measure(found, task, seed, headline=False):
    """Every number about one set of features -> (row of probe.json, {head: which held images it got right}).

    headline: without the MAE recipe, which takes as long as all the rest.
    """
    labels, train = task["labels"][task["held"]], task["labels"]["train"]
    scores, chosen = {}, {}
    scores["logistic"], chosen["C"] = logistic_scores(found, task)
    if not headline:
        scores["linear"], chosen["rate"] = linear_scores(found, task, seed)
    scores["knn"] = metrics.knn_votes(found["train"][0], train, found[task["held"]][0], len(task["names"]))
    row = {head: metrics.classification(s, labels, task["counts"]) for head, s in scores.items()}
    row["logistic"]["C"] = chosen["C"]
    if not headline:
        row["linear"]["rate"] = chosen["rate"]
    row["retrieval"] = metrics.retrieval(found[task["held"]][0], labels, task["groups"][task["held"]])
    row["few_shot"] = few_shot(found, task)
    return row, {head: s.argmax(1) == labels for head, s in scores.items()}


def chance(task):
    """What guessing gets, in the shape of a row: the most frequent classes of train; a random ranking."""
    labels, classes = task["labels"][task["held"]], len(task["names"])
    often = task["counts"].double().expand(len(labels), -1)
    share = torch.bincount(labels, minlength=classes).double() / len(labels)
    guess = metrics.classification(often, labels, task["counts"])
    few = {name: {"mean": 1 / int(name.split("-")[0])} for name in task["episodes"]}
    return {"logistic": guess, "linear": guess, "knn": guess, "few_shot": few,
            "retrieval": {"map": share.square().sum().item(), "recall1": share.square().sum().item(),
                          "recall5": 1 - ((1 - share) ** 5 * share).sum().item()}}  # fmt: skip


def ridge_scores(found, task):
    """-> (Top-1 in percent on the held split, the penalty chosen on dev): the probe in one formula, for snapshots."""
    fit, choose, classes = task["fit"], task["choose"], len(task["names"])
    dev = found[task["choose_in"]][0][choose]
    x, dev, held = metrics.standardise(found["train"][0][fit], dev, found[task["held"]][0])
    fits = {p: metrics.ridge(x, task["labels"]["train"][fit], classes, p) for p in metrics.PENALTIES}
    truth = task["labels"][task["choose_in"]][choose]
    best = max(fits, key=lambda p: metrics.topk(dev @ fits[p][0] + fits[p][1], truth, 1))
    return 100 * metrics.topk(held @ fits[best][0] + fits[best][1], task["labels"][task["held"]], 1), best


# ---- tables --------------------------------------------------------------------------------------------------------


def value(row, where):
    """ "few_shot.5-way 1-shot.mean" of a row, in percent; None where it has none."""
    for key in where.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return None if row is None else 100 * row


def table(rows, task):
    """rows {name: row} -> lines of at most 100 characters; < marks what does not beat the best thumbnail."""
    thumbs = [row for name, row in rows.items() if name.startswith("thumb")]
    best = {w: max((value(r, w) for r in thumbs if value(r, w) is not None), default=None) for _, w in COLUMNS}
    lines = [f"{'':18}{'logistic':^21}{'linear':^7}{'kNN':^7}{'retrieval':^21}{'5-way':^14}",
             f"{'features':18}" + "".join(f"{name:>6} " for name, _ in COLUMNS)]  # fmt: skip
    for name, row in rows.items():
        cells = []
        for _, where in COLUMNS:
            x, low = value(row, where), best[where]
            loses = x is not None and low is not None and x <= low and not name.startswith(("thumb", "chance"))
            cells.append(f"{'-' if x is None else format(x, '.1f'):>6}" + ("<" if loses else " "))
        lines.append(f"{name:18}" + "".join(cells).rstrip())
    return [*lines, *losers(rows[features.POOLS[0]], best)]


def losers(row, best):
    """Sentences about what the headline features lose to a thumbnail."""
    names = ("logistic regression", "", "", "linear probe", "kNN", "retrieval")
    return [f"{name} on the {features.POOLS[0]} token loses to a thumbnail: {value(row, where):.1f} against "
            f"{best[where]:.1f} %" for name, (_, where) in zip(names, COLUMNS, strict=False)
            if name and best[where] is not None and value(row, where) <= best[where]]  # fmt: skip


def efficiency(rows, threshold):
    """Rows of log.jsonl -> epochs and seconds until kNN crossed the threshold (None: never), and the peak memory.

    Seconds are those of the whole run: a teacher's looks and the evaluations are in them.
    """
    held = [r for r in rows if "knn" in r]
    if not held:
        return None
    knn = [r["knn"] for r in held]
    memory = max((r["memory_mb"] for r in rows if "memory_mb" in r), default=None)
    reached = {key: metrics.first_crossing([r[key] for r in held], knn, threshold) for key in ("epoch", "seconds")}
    return {"untrained": knn[0], "final": knn[-1], "threshold": threshold, "reached_epoch": reached["epoch"],
            "reached_seconds": reached["seconds"], "epochs": held[-1]["epoch"], "peak_memory_mb": memory}  # fmt: skip


def threshold_of(args):
    """-> (kNN Top-1 in percent to be reached, how it was fixed), (None, why) where no log tells.

    Relative: untrained + 90 % of (final - untrained) of a reference run, because an absolute one means nothing where an
    untrained encoder already has 70 %.
    """
    if args.threshold is not None:
        return args.threshold, "absolute"
    plain = [run for run in args.runs if features.flags_of(run).get("mask") == "random"]
    reference = args.reference or (plain or args.runs)[0]
    knn = [r["knn"] for r in read_log(home_of(reference) / "log.jsonl") if "knn" in r]
    if not knn:
        return None, f"no kNN in {reference}/log.jsonl"
    return knn[0] + 0.9 * (knn[-1] - knn[0]), f"untrained + 90 % of the gain of {Path(reference).name}"


def efficiency_line(found, how):
    if found is None:
        return "no kNN in its log: nothing about efficiency"
    when = "not reached" if found["reached_epoch"] is None else (
        f"after {found['reached_epoch']:.1f} epochs, {found['reached_seconds']:.0f} s")  # fmt: skip
    return f"kNN of {found['threshold']:.1f} % in the run ({how}): {when}; peak memory {found['peak_memory_mb']} MB"


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw(home, name, encoder, size, task, found):
    """attention.png, patches.png, neighbours.png; with labels also scatter.png."""
    split, train, labels = task["splits"][task["held"]], task["splits"]["train"], task["labels"]
    rows = data.evenly_spaced(len(split["images"]), data.CHUNK)
    view = next(data.whole_views(split["images"], rows, size, encoder.cls_token.device))[1]
    few = data.evenly_spaced(len(rows), 8)
    plots.attention_sheet(
        home / "attention.png", encoder, view[few[:5]], f"Attention of CLS in the last block: {name}"
    )
    view = torch.cat([view[few], view])
    plots.patch_sheet(home / "patches.png", encoder, view, f"Patch tokens, principal components as colours: {name}")
    rows = rows[few[:6]]
    bank, held = found["mean"]["train"][0], found["mean"][task["held"]][0]
    alike = labels[task["held"]][rows][:, None] == labels["train"] if task["labelled"] else None  # (6, n)
    right = lambda i, j: None if alike is None else bool(alike[i, j])  # noqa: E731
    pictures = lambda index: train["images"][index.numpy()]  # noqa: E731
    title = f"{task['held']} pictures and their nearest in train, cosine of mean tokens: {name}"
    title += "\n(green: the same character, dashed: another)" if task["labelled"] else ""
    plots.neighbours(home / "neighbours.png", held[rows], bank, pictures, split["images"][rows.numpy()], right, title)
    if task["labelled"]:
        title = f"{task['held']}, mean token, 8 largest classes: {name}"
        truth = labels[task["held"]]
        plots.scatter(home / "scatter.png", bank, labels["train"], held, truth, task["names"], title)


# ---- one run, and several ------------------------------------------------------------------------------------------


def probe(run, args, task, autocast, device, threshold, controls):
    """Extract, measure, draw and write one run -> what a comparison needs of it."""
    encoder, size = load_encoder(run)
    encoder.to(device).requires_grad_(False)
    home, name = home_of(run), home_of(run).name
    found, clock = features.of_run(home, features.model_file(run), encoder, size, task["splits"], autocast, args.dtype,
                                   args.views, args.blocks)  # fmt: skip
    if clock:
        print(f"features {clock['images']:,} images, {args.views} views of train, in {clock['all']:.0f} s, "
              f"{100 * clock['forward'] / clock['all']:.1f} % of it in the forward pass")  # fmt: skip
    if args.headline:
        found = {"mean": found["mean"]}
    else:
        draw(home, name, encoder, size, task, found)
    config = features.flags_of(run)
    report = {"command": command(), "machine": machine(device),
              "commit": commit(), "run": name, "config": config, "split": args.split, "seed": args.seed,
              "dtype": args.dtype, "views": args.views,
              "images": {k: len(v) for k, v in task["labels"].items()}}  # fmt: skip
    if not task["labelled"]:
        print(f"{run}: no numbers, they need two classes or more and a label on every image of train and "
              f"{args.split}; attention.png, patches.png and neighbours.png were drawn")  # fmt: skip
        return write(home, report) | {"right": {}}
    start_time = time.perf_counter()
    rows, right = {}, {}
    for pool, x in in_order(found).items():
        rows[pool], right[pool] = measure(x, task, args.seed, args.headline)
    shape = features.shape_of(encoder, size)
    if args.headline:
        controls[shape] = {}
    elif shape not in controls:  # they are the same for all runs of one shape
        made = features.of_controls(home.parent, untrained_like(encoder).to(device), size, task["splits"], autocast,
                                    args.dtype, args.views)  # fmt: skip
        controls[shape] = {pool: measure(x, task, args.seed)[0] for pool, x in in_order(made).items()}
    rows |= controls[shape] | {"chance": chance(task)}
    if not args.headline:
        plots.confusion(home / "confusion.png", rows["mean"]["logistic"]["confusion"], task["names"],
                          f"Logistic regression on mean tokens, {args.split}: {name}")  # fmt: skip
    log = read_log(home / "log.jsonl")
    report |= {"classes": task["names"], "headline": rows["mean"]["logistic"]["top1"], "rows": slim(rows),
               "right": {head: stats.to_bits(x) for head, x in right["mean"].items()}, "threshold": threshold[1],
               "efficiency": None if threshold[0] is None else efficiency(log, threshold[0])}  # fmt: skip
    print("\n".join(table(rows, task)))
    took = time.perf_counter() - start_time
    print(efficiency_line(report["efficiency"], threshold[1]) + f"; heads took {took:.0f} s")
    if args.snapshots:
        report["snapshots"] = snapshots(home, task, autocast, device)
    write(home, report)
    return report | {"right": right["mean"], "log": log, "path": str(run)}


def in_order(found):
    """Poolings as they are printed: mean, cls, extremes, then blocks; thumbnails last."""
    order = [*features.POOLS, *(f"untrained {p}" for p in features.POOLS), *(f"thumb{side}" for side in features.SIDES)]
    extra = sorted(found.keys() - set(order), key=lambda name: (len(name), name))
    return {name: found[name] for name in [*order[:3], *extra, *order[3:]] if name in found}


def slim(rows):
    """One confusion is enough, and per-class numbers of the headline."""
    return {name: {part: {k: x for k, x in numbers.items() if (name, part) == ("mean", "logistic")
                          or k not in ("per_class", "confusion")} for part, numbers in row.items()}
            for name, row in rows.items()}  # fmt: skip


def write(home, report):
    text = json.dumps(report, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)  # lists on one line
    save_text(text + "\n", home / "probe.json")
    print(f"wrote    {home}/probe.json, features.safetensors and its figures")
    return report


def snapshots(home, task, autocast, device):
    """Ridge Top-1 of every runs/NAME/snapshots/encoder-EPOCH.safetensors -> [[epoch, Top-1]], and snapshots.png."""
    files = sorted(home.glob("snapshots/encoder-*.safetensors"), key=lambda p: float(p.stem.split("-")[1]))
    if not files:
        raise UserError(f"{home}/snapshots holds none; python pretrain.py --every 1 keeps one of every epoch")
    first = load_encoder(files[0])[0]
    networks = [(0.0, untrained_like(first))] + [(float(f.stem.split("-")[1]), load_encoder(f)[0]) for f in files]
    points = []
    for epoch, encoder in networks:
        size = encoder.side * encoder.patch_size
        look = features.encoder_look(encoder.to(device).requires_grad_(False), size, autocast, {})
        found = features.sets(features.extract_all(look, task["splits"], 1, device), 1)
        points.append([epoch, ridge_scores(found["mean"], task)[0]])
        print(f"epoch {epoch:<6g} ridge Top-1 {points[-1][1]:.1f} %" + (" untrained" if epoch == 0 else ""))
    plots.snapshot_curve(home / "snapshots.png", points[1:], {"untrained": points[0][1]}, f"Snapshots of {home.name}")
    return points


def main():
    args = parse_args()
    if args.views < 1 or args.seed < 0:
        raise UserError(
            f"--views {args.views} must be at least 1" if args.views < 1 else f"--seed {args.seed} is below 0"
        )
    if args.headline:
        if len(args.runs) > 1 or args.snapshots:
            raise UserError("--headline takes one run and no --snapshots: a comparison needs every head")
        args.views = 1
    for run in args.runs:
        load_encoder(run)  # every mistake before hours of work
    folder = args.data or features.flags_of(args.runs[0]).get("data")
    if not folder:
        raise UserError(f"{args.runs[0]} does not say what it was trained on; give --data datasets/NAME")
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    autocast = autocast_of(device, dtype)
    task, threshold, controls = open_task(folder, args.split, args.seed), threshold_of(args), {}
    print(f"data     {folder}: {args.split}, {len(task['labels'][args.split]):,} images, {len(task['names'])} classes")
    reports = []
    for run in args.runs:
        print(f"run      {run}")
        reports.append(probe(run, args, task, autocast, device, threshold, controls))
    if len(reports) > 1 and task["labelled"]:
        out = Path(args.out or home_of(args.runs[0]).parent / "compare")
        groups = task["groups"][args.split]
        compare.write(out, reports, groups, threshold, args.claim)


if __name__ == "__main__":
    cli(main)
