"""Stage 3: what did the encoder learn? Frozen features, simple classifiers, and controls beside every number.

    python probe.py runs/NAME                     # on the data that the run was trained on
    # and is A better than B?
    python probe.py runs/A-s0 runs/A-s1 runs/B-s0 runs/B-s1 --data datasets/X

Reads:  runs/NAME (model.safetensors, log.jsonl), datasets/NAME (train, val; choices are made on
        dev, or on a tenth of train)
Writes: runs/NAME/ probe.json (by --headline probe-headline.json), features.safetensors,
attention.png, patches.png,
        neighbours.png, scatter.png, confusion.png; of data that are not the run's own, or of
        another split than val,
        to runs/NAME/DATA-SPLIT/; beside the run controls-DIGEST.safetensors (untrained encoder and
        thumbnails, for all
        runs); of several runs compare/, or compare-DATA-SPLIT/, with compare.md, compare.json,
        curves.png

The headline is fixed before any number is seen: logistic regression, Top-1 on val, on the largest
and smallest values
of the patch tokens, a pooling that was chosen on dev (results/LOG.md, "A teacher that can look").
All are reported. The
same command gives the same digits: features are kept in fp16, classifiers run on the CPU, all
random numbers come from
--seed.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import torch

import data
from common import features, guidance, metrics, stats
from common.checkpoints import flags_of, load_encoder
from common.command import (
    Parser,
    at_least,
    between,
    claim,
    cli,
    command,
    drawing,
    refuse_unused,
    working,
)
from common.io import UserError, save_text
from common.train import commit, machine, read_log, seeded
from model import shape_of

FEW_SHOT = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
COLUMNS = (  # of the printed table: heading, where its number is in a row of probe.json
    ("Top-1", "logistic.top1"),
    ("Top-5", "logistic.top5"),
    ("F1", "logistic.macro_f1"),
    ("Top-1", "linear.top1"),
    ("Top-1", "knn.top1"),
    ("mAP", "retrieval.map"),
    ("R@1", "retrieval.recall1"),
    ("R@5", "retrieval.recall5"),
    ("1-shot", "few_shot.5-way 1-shot.mean"),
    ("5-shot", "few_shot.5-way 5-shot.mean"),
)
WIDEST = 2048  # features that logistic regression takes
TOKENS_OF, ATTENTIVE_RATES = (
    8192,
    (1e-3, 3e-3),
)  # training images at most, and learning rates, of attentive pooling
WORDS = {
    "mean": "the mean token",
    "cls": "the CLS token",
    "extremes": "largest and smallest values",
    "grid": "4x4 means",
}
COMPARED = {
    "logistic.top1": "logistic regression",
    "linear.top1": "linear probe",
    "knn.top1": "kNN",
    "retrieval.map": "retrieval",
}  # with a thumbnail, in words


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("what is probed").add_argument
    add(
        "runs", nargs="+", metavar="RUN", help="run folders of pretrain.py (or a public checkpoint)"
    )
    add(
        "--data",
        metavar="DIR",
        help="packed set with labels (default: what the first run was trained on)",
    )
    add("--split", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add(
        "--views",
        type=at_least(1),
        default=3,
        metavar="V",
        help="views of a training image for the MAE recipe: whole + crops",
    )
    add(
        "--headline",
        action="store_true",
        help="only logistic regression and kNN on one pooling; no controls, no "
        "pictures\n(what experiments/study.py repeats for every run)",
    )
    add(
        "--pool",
        choices=features.POOLS[:3],
        default=features.HEADLINE,
        help=f"whose number is the headline (default: {features.HEADLINE})",
    )
    add("--blocks", action="store_true", help="also the mean token after each block")
    add(
        "--snapshots",
        action="store_true",
        help="also a ridge probe of each runs/NAME/snapshots/encoder-EPOCH",
    )
    add = parser.add_argument_group("comparison and efficiency").add_argument
    add(
        "--threshold",
        type=between(0, 100),
        metavar="PERCENT",
        help="kNN Top-1 to reach in the run's log\n"
        "(default: untrained + 90 %% of the gain of --reference)",
    )
    add(
        "--reference",
        metavar="RUN",
        help="run of the threshold (default: the first with random masks, else itself)",
    )
    add(
        "--claim",
        type=between(-100, 100),
        default=0.0,
        metavar="POINTS",
        help="a difference is supported if it is at least this",
    )
    add(
        "--out",
        metavar="DIR",
        help="where a comparison goes (default: compare/ beside the first run)",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=at_least(0), default=0, help="of mini-batches and episodes")
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda, mps: of the encoder; classifiers run on the CPU",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "bf16", "fp32"],
        help="of the encoder's matrix products",
    )
    return parser.parse_args()


def flags_used(args, labelled=True, folder=""):
    """The table for refuse_unused: asked before the data are read, and when it is known whether
    they have labels.
    """
    several, labels = len(args.runs) > 1, f"needs a label on every image of {folder}"
    return (
        (
            "headline pool views blocks snapshots threshold reference claim out seed",
            labelled,
            labels,
        ),
        ("headline", not several, "is for one run: a comparison needs every head"),
        (
            "views blocks snapshots threshold reference",
            not args.headline,
            "is for a whole probe, not for --headline",
        ),
        ("claim out", several, "is for a comparison of several runs"),
        (
            "reference",
            args.threshold is None,
            "fixes the threshold that --threshold gives as a number",
        ),
    )


def check(args, task):
    """Nothing given is ignored, nothing that is there replaced; and then the defaults of what was
    not given.
    """
    refuse_unused(args, flags_used(args, task.labelled, task.folder))
    several = len(args.runs) > 1
    args.views = 1 if args.headline or not task.labelled else args.views
    for run in args.runs:
        claim([results_file(run, task)], fix="choose another --headline, --data or --split")
    if several and task.labelled:
        claim([task.out / "compare.json"])


def results_file(run, task):
    return task.home[run] / f"probe{'-headline' * task.args.headline}.json"


# ---- what is measured on -------------------------------------------------------------------------


def open_task(args):
    """features.open_task, with what is fitted, chosen on and reported: the same for every set of
    features.

    task.home: {run: where its results go}; task.out: where those of a comparison go.
    """
    task = features.open_task(args, args.runs[0])
    task.home = {run: features.results_folder(run, task.folder, args.split) for run in args.runs}
    first, own = features.home_of(args.runs[0]), task.home[args.runs[0]]
    task.out = Path(
        args.out or first.parent / ("compare" if own == first else f"compare-{own.name}")
    )
    check(args, task)
    fit, choose, choose_in = features.hold_out(task.splits)
    task.uses, task.fit = (("train", fit), (choose_in, choose), (args.split, slice(None))), fit
    task.labels = {name: split["labels"] for name, split in task.splits.items()}
    task.groups = {name: data.groups_of(split) for name, split in task.splits.items()}
    task.names, task.threshold, task.controls = (
        task.train["header"]["classes"],
        (None, "not asked for"),
        {},
    )
    if not task.labelled:
        return task
    task.tagged = not args.headline and "tags" in task.train
    if not args.headline:
        task.threshold = threshold_of(args)
    bank, queries = task.labels["train"], task.labels[args.split]
    task.counts = torch.bincount(bank[fit], minlength=len(task.names))
    if lost := [str(task.names[c]) for c in queries.unique() if task.counts[c] == 0]:
        raise UserError(
            f"{task.folder}: {args.split} has classes that train has not ({', '.join(lost[:4])}); "
            "pack it again: python data.py IMAGES --min-per-class 10"
        )
    episodes = {
        f"{ways}-way {shots}-shot": metrics.draw_episodes(
            bank, queries, ways, shots, seeded(args.seed, ways, shots)
        )
        for ways, shots in FEW_SHOT
    }
    task.episodes = {name: e for name, e in episodes.items() if e is not None}
    return task


def rows_of(values, task):
    """values {split: (n, ...), or (V, n, D) in several views} -> of the rows that are fitted,
    chosen on, reported.
    """
    return [
        (values[name][0] if values[name].ndim == 3 else values[name])[rows]
        for name, rows in task.uses
    ]


# ---- numbers: each function takes a set of features {split: (V, n, D)} ---------------------------


def logistic_scores(found, task):
    """-> scores of the reported rows, and the C that cross-validation on train chose."""
    (x, _, report), (y, _, _) = rows_of(found, task), rows_of(task.labels, task)
    scores, C = metrics.logistic_probe(x, y, len(task.names), task.groups["train"][task.fit])
    return scores(report), {"C": C}


def linear_scores(found, task):
    """-> scores of the reported rows, and the learning rate that was best on dev: the MAE recipe."""
    (_, choose, report), (y, truth, _) = rows_of(found, task), rows_of(task.labels, task)
    scores = metrics.bn_linear(found["train"][:, task.fit], y, len(task.names), seed=task.args.seed)
    top1 = [metrics.topk(s, truth, 1) for s in scores(choose)]
    best = top1.index(max(top1))
    return scores(report)[best], {"rate": metrics.LEARNING_RATES[best]}


@working("fitting classifiers")
def measure(found, task):
    """Every number about one set of features -> (row of probe.json, {head: which reported images it
    got right}).

    --headline leaves out the MAE recipe, which takes as long as all the rest. Wide features (a 4x4
    grid) have no
    logistic regression, whose solver would take minutes. Few-shot accuracy is the mean of 600
    episodes with half of its
    95 % interval.
    """
    bank, queries, labels = found["train"][0], found[task.args.split][0], task.split["labels"]
    heads = {"logistic": logistic_scores(found, task)} if bank.shape[1] <= WIDEST else {}
    if not task.args.headline:
        heads["linear"] = linear_scores(found, task)
    heads["knn"] = metrics.knn_votes(bank, task.train["labels"], queries, len(task.names)), {}
    row = {
        head: metrics.classification(scores, labels, task.counts) | choice
        for head, (scores, choice) in heads.items()
    }
    row |= {
        "retrieval": metrics.retrieval(queries, labels, task.groups[task.args.split]),
        "few_shot": {},
    }
    for name, episodes in task.episodes.items():
        accuracy = metrics.few_shot(bank, queries, *episodes)
        half = 1.96 * accuracy.std().item() / len(accuracy) ** 0.5
        row["few_shot"][name] = {"mean": accuracy.mean().item(), "half": half}
    return row, {head: scores.argmax(1) == labels for head, (scores, _) in heads.items()}


@working("attentive pooling")
def attentive_row(encoder, size, task):
    """The row of a pooling that is learned with the classifier; its learning rate is the one that
    was best on dev.
    """
    found = []
    for name, rows in task.uses:
        rows = torch.arange(len(task.labels[name]))[rows]
        rows = rows[data.evenly_spaced(len(rows), TOKENS_OF)] if not found else rows
        images = task.splits[name]["images"]
        chunks = guidance.patch_tokens(encoder, size, images, rows, task.autocast)
        found.append((torch.cat([x.half().cpu() for _, x in chunks]), task.labels[name][rows]))
    (fit, y), (choose, truth), (report, labels) = found
    scores = [
        metrics.attentive(fit, y, len(task.names), lr, seed=task.args.seed)
        for lr in ATTENTIVE_RATES
    ]
    top1 = [metrics.topk(s(choose), truth, 1) for s in scores]
    best = top1.index(max(top1))
    row = metrics.classification(scores[best](report), labels, task.counts)
    return {"linear": row | {"rate": ATTENTIVE_RATES[best]}}


def chance(task):
    """What guessing gets, in the shape of a row: the most frequent classes of train; a random
    ranking.
    """
    labels = task.split["labels"]
    share = torch.bincount(labels, minlength=len(task.names)).double() / len(labels)
    guess = metrics.classification(
        task.counts.double().expand(len(labels), -1), labels, task.counts
    )
    same = share.square().sum().item()
    return {
        "logistic": guess,
        "linear": guess,
        "knn": guess,
        "few_shot": {name: {"mean": 1 / int(name.split("-")[0])} for name in task.episodes},
        "retrieval": {
            "map": same,
            "recall1": same,
            "recall5": 1 - ((1 - share) ** 5 * share).sum().item(),
        },
    }


def ridge_top1(found, task):
    """Top-1 in percent on the reported rows, the penalty chosen on dev: the probe in one formula,
    for snapshots.
    """
    return metrics.ridge_top1(rows_of(found, task), rows_of(task.labels, task), len(task.names))


@working("asking for tags and style")
def pictured_rows(home, encoder, size, found, task):
    """What the headline's pooling and its controls know of tags and of style -> {name: row},
    printed a line each.
    """
    untrained, pool, header = (
        features.untrained_like(encoder).to(task.device),
        task.args.pool,
        task.train["header"],
    )
    controls = features.of_controls(home.parent, untrained, size, task, task.args.views)
    names = [f"untrained {pool}", *(f"thumb{side}" for side in features.SIDES)]
    asked = {
        name: rows_of(x, task)
        for name, x in ({pool: found[pool]} | {k: controls[k] for k in names}).items()
    }
    rows = {name: {} for name in asked}
    import tags as tagging  # only here: it loads another stage

    if task.tagged:
        words, plane = (
            header["tags"][: tagging.MOST],
            "all_tags" if "all_tags" in task.train else "tags",
        )
        hot = {
            k: torch.from_numpy(tagging.many_hot(split[plane], len(words)))
            for k, split in task.splits.items()
        }
        for name, x in asked.items():
            rows[name]["tags"] = tagging.tag_row(x, rows_of(hot, task), words)
    if "style" in task.train:
        style = {k: torch.from_numpy(np.array(split["style"])) for k, split in task.splits.items()}
        for name, x in asked.items():
            groups = task.groups["train"][task.fit]
            rows[name]["style"] = tagging.style_row(
                x, rows_of(style, task), groups, header["style"]
            )
    for name, row in rows.items():
        tags, styles = row.get("tags"), row.get("style", {}).items()
        said = [f"tags, mAP {100 * tags['map']:.1f} %"] if tags else []
        said += [
            f"{k} {100 * x['top1']:.1f} ({100 * x['guess']:.1f} by guessing)" for k, x in styles
        ]
        print(f"{name:20}{', '.join(said)}")
    return rows


# ---- tables --------------------------------------------------------------------------------------


def value(row, where):
    """ "few_shot.5-way 1-shot.mean" of a row, in percent; None where it has none."""
    for key in where.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return None if row is None else 100 * row


def table(rows, pool):
    """rows {name: row} -> lines of at most 100 characters; < marks what does not beat the best
    thumbnail.

    Where those of this pooling lose to one, a line says so.
    """
    numbers = {
        name: {where: value(row, where) for _, where in COLUMNS} for name, row in rows.items()
    }
    thumbs = [row for name, row in numbers.items() if name.startswith("thumb")]
    best = {where: max((row[where] or 0 for row in thumbs), default=-1) for _, where in COLUMNS}
    loses = {
        name: [where for where, x in row.items() if x is not None and x <= best[where]]
        for name, row in numbers.items()
        if not name.startswith(("thumb", "chance"))
    }
    lines = [
        f"{'':18}{'logistic':^21}{'linear':^7}{'kNN':^7}{'retrieval':^21}{'5-way':^14}",
        f"{'features':18}" + "".join(f"{name:>6} " for name, _ in COLUMNS),
    ]
    for name, row in numbers.items():
        texts = {where: "-" if x is None else f"{x:.1f}" for where, x in row.items()}
        cells = [
            f"{text:>6}" + ("<" if where in loses.get(name, ()) else " ")
            for where, text in texts.items()
        ]
        lines.append(f"{name:18}" + "".join(cells).rstrip())
    return lines + [
        f"{COMPARED[where]} on {WORDS[pool]} loses to a thumbnail: {numbers[pool][where]:.1f} against "
        f"{best[where]:.1f} %"
        for where in loses[pool]
        if where in COMPARED
    ]


def efficiency(rows, threshold):
    """Rows of log.jsonl -> epochs and seconds until kNN crossed the threshold (None: never), and
    the peak memory.

    Seconds are those of the whole run: a teacher's maps and the evaluations are in them.
    """
    evaluated = [r for r in rows if "knn" in r]
    if not evaluated:
        return None
    knn = [r["knn"] for r in evaluated]
    epoch, seconds = (
        metrics.first_crossing([r[k] for r in evaluated], knn, threshold)
        for k in ("epoch", "seconds")
    )
    memory = max((r["memory_mb"] for r in rows if "memory_mb" in r), default=None)
    return {
        "untrained": knn[0],
        "final": knn[-1],
        "threshold": threshold,
        "reached_epoch": epoch,
        "reached_seconds": seconds,
        "epochs": evaluated[-1]["epoch"],
        "peak_memory_mb": memory,
    }


def threshold_of(args):
    """-> (kNN Top-1 in percent to be reached, how it was fixed), (None, why) where no log tells.

    Relative to a reference run, by metrics.threshold_of, unless --threshold gives a number.
    """
    if args.threshold is not None:
        return args.threshold, "as --threshold says"
    plain = [run for run in args.runs if flags_of(run).get("mask") == "random"]
    reference = args.reference or (plain or args.runs)[0]
    knn = [r["knn"] for r in read_log(features.home_of(reference) / "log.jsonl") if "knn" in r]
    if args.reference and not knn:
        raise UserError(
            f"--reference {reference} has no kNN in its log.jsonl; give a run on labelled data"
        )
    if not knn:
        return None, f"no kNN in {reference}/log.jsonl"
    return metrics.threshold_of(knn), f"untrained + 90 % of the gain of {Path(reference).name}"


def efficiency_line(found, how):
    if found is None:
        return "no kNN in its log: nothing about efficiency"
    when = (
        "not reached"
        if found["reached_epoch"] is None
        else (f"after {found['reached_epoch']:.1f} epochs, {found['reached_seconds']:.0f} s")
    )
    return f"kNN of {found['threshold']:.1f} % in the run ({how}): {when}; peak memory {found['peak_memory_mb']} MB"


# ---- pictures ------------------------------------------------------------------------------------


def draw(home, encoder, size, task, found):
    """attention.png, patches.png, neighbours.png; with labels also scatter.png. found: features of
    the mean token.
    """
    from common import plots  # matplotlib takes a second to load: only where a picture is drawn

    split, train, held_name, name = task.split, task.train, task.args.split, home.name
    if not (home / "model.safetensors").exists():  # other data, or another split
        name = f"{home.parent.name} on {home.name}"
    rows = data.evenly_spaced(len(split["images"]), data.CHUNK)
    _, view = next(data.whole_views(split["images"], rows, size, task.device))
    few = data.evenly_spaced(len(rows), 8)
    title = f"Attention of CLS in the last block: {name}"
    plots.attention_sheet(home / "attention.png", encoder, view[few[:5]], title)
    title = f"Patch tokens, principal components as colours: {name}"
    plots.patch_sheet(home / "patches.png", encoder, torch.cat([view[few], view]), title)
    rows, bank, held, alike = rows[few[:6]], found["train"][0], found[held_name][0], None
    title = f"{held_name} pictures and their nearest in train, cosine of mean tokens: {name}"
    if task.labelled:
        alike = split["labels"][rows][:, None] == train["labels"]  # (6, n)
        title += "\n(green: the same character, dashed: another)"

    def right(i, j):
        return None if alike is None else bool(alike[i, j])

    def pictures(index):
        return train["images"][index.numpy()]

    plots.neighbours(
        home / "neighbours.png",
        held[rows],
        bank,
        pictures,
        split["images"][rows.numpy()],
        right,
        title,
    )
    if task.labelled:
        title = f"{held_name}, mean token, 8 largest classes: {name}"
        plots.scatter(
            home / "scatter.png", bank, train["labels"], held, split["labels"], task.names, title
        )


# ---- one run, and several ------------------------------------------------------------------------


def probe(run, task):
    """Extract, measure, draw and write one run -> what a comparison needs of it."""
    args, home = task.args, task.home[run]
    encoder, size = load_encoder(run)
    encoder.to(task.device).requires_grad_(False)
    found, clock = features.of_run(home, run, encoder, size, task, args.views, args.blocks)
    report = {
        "command": command(),
        "machine": machine(task.device),
        "commit": commit(),
        "run": features.home_of(run).name,
        "config": flags_of(run),
        "data": str(task.folder),
        "split": args.split,
        "seed": args.seed,
        "dtype": task.dtype,
        "views": args.views,
        "images": {name: len(x) for name, x in task.labels.items()},
    }
    if clock:
        print(
            f"features {sum(report['images'].values()):,} images, {args.views} views of train, in "
            f"{clock['all']:.0f} s, {100 * clock['forward'] / clock['all']:.1f} % of it in the forward pass"
        )
    if args.headline:
        found = {args.pool: found[args.pool]}
    else:
        with working("drawing"), drawing("attention.png and others"):
            draw(home, encoder, size, task, found["mean"])
    if not task.labelled:
        print(
            f"{run}: no numbers, they need two classes or more and a label on every image of train and "
            f"{args.split}; attention.png, patches.png and neighbours.png were drawn"
        )
        return write(results_file(run, task), report) | {"right": {}}
    numbers, right, log = measure_run(run, encoder, size, found, task)
    report |= numbers
    if args.snapshots:
        report["snapshots"] = snapshots(run, task)
    write(results_file(run, task), report)
    return report | {"right": right, "log": log, "path": str(run)}


def measure_run(run, encoder, size, found, task):
    """Rows of all features and controls, printed -> the report's part, which images are right, and
    the run's log.
    """
    log, (threshold, how) = read_log(features.home_of(run) / "log.jsonl"), task.threshold
    start_time, home, pool = time.perf_counter(), task.home[run], task.args.pool
    measured = {name: measure(x, task) for name, x in in_order(found).items()}
    rows, right = {name: row for name, (row, _) in measured.items()}, measured[pool][1]
    if not task.args.headline:
        from common import plots

        rows["attentive"] = attentive_row(encoder, size, task)
        rows |= control_rows(features.home_of(run), encoder, size, task)
        title = f"Logistic regression on {WORDS[pool]}, {task.args.split}: {home.name}"
        with drawing("confusion.png"):
            plots.confusion(
                home / "confusion.png", rows[pool]["logistic"]["confusion"], task.names, title
            )
    rows["chance"] = chance(task)
    print("\n".join(table(rows, pool)))
    numbers = {
        "classes": task.names,
        "pool": pool,
        "headline": rows[pool]["logistic"]["top1"],
        "rows": slim(rows, pool),
        "right": {head: stats.to_bits(x) for head, x in right.items()},
    }
    if not task.args.headline and (task.tagged or "style" in task.train):
        numbers["pictured"] = pictured_rows(features.home_of(run), encoder, size, found, task)
    if not task.args.headline:
        numbers |= {
            "threshold": how,
            "efficiency": None if threshold is None else efficiency(log, threshold),
        }
        print(efficiency_line(numbers["efficiency"], how), end="; ")
    print(f"heads took {time.perf_counter() - start_time:.0f} s")
    return numbers, right, log


def control_rows(home, encoder, size, task):
    """Rows of the untrained encoder and of thumbnails: measured once for all runs of one shape."""
    shape = tuple(shape_of(encoder).values())
    if shape not in task.controls:
        untrained = features.untrained_like(encoder).to(task.device)
        found = features.of_controls(home.parent, untrained, size, task, task.args.views)
        task.controls[shape] = {pool: measure(x, task)[0] for pool, x in in_order(found).items()}
    return task.controls[shape]


def in_order(found):
    """Poolings as they are printed: mean, cls, extremes, grid, then blocks; thumbnails last."""
    order = [
        *features.POOLS,
        *(f"untrained {p}" for p in features.POOLS),
        *(f"thumb{side}" for side in features.SIDES),
    ]
    extra = sorted(found.keys() - set(order), key=lambda name: (len(name), name))
    return {name: found[name] for name in [*features.POOLS, *extra, *order] if name in found}


def slim(rows, pool):
    """One confusion is enough, and per-class numbers of the headline."""
    return {
        name: {
            part: {
                k: x
                for k, x in numbers.items()
                if (name, part) == (pool, "logistic") or k not in ("per_class", "confusion")
            }
            for part, numbers in row.items()
        }
        for name, row in rows.items()
    }


def write(path, report):
    text = json.dumps(report, indent=1)
    text = re.sub(
        r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text
    )  # lists on one line
    save_text(text + "\n", path)
    print(
        f"wrote    {path}, features.safetensors"
        + ("" if "headline" in path.name else " and its figures")
    )
    return report


def snapshot_files(run):
    """-> {epoch: file} of runs/NAME/snapshots/encoder-EPOCH.safetensors."""
    home = features.home_of(run)
    files = {float(f.stem.split("-")[1]): f for f in home.glob("snapshots/encoder-*.safetensors")}
    if not files:
        raise UserError(
            f"{home}/snapshots holds none; python pretrain.py --every 1 keeps one of every epoch"
        )
    return files


def snapshots(run, task):
    """Ridge Top-1 of every snapshot of a run -> [[epoch, Top-1]], and snapshots.png."""
    from common import plots

    files, points = snapshot_files(run), []
    for epoch in (0.0, *sorted(files)):
        encoder, size = load_encoder(files[epoch or min(files)])
        encoder = (
            (encoder if epoch else features.untrained_like(encoder))
            .to(task.device)
            .requires_grad_(False)
        )
        extractor = features.encoder_extractor(encoder, size, task.autocast, {})
        tensors = features.extract_all(extractor, task, 1)
        with working("ridge regression"):
            points.append(
                [epoch, ridge_top1({name: tensors[f"{name}.mean"] for name in task.splits}, task)]
            )
        print(
            f"epoch {epoch:<6g} ridge Top-1 {points[-1][1]:.1f} %"
            + (" untrained" if epoch == 0 else "")
        )
    title = f"Snapshots of {features.home_of(run).name}"
    plots.snapshot_curve(
        task.home[run] / "snapshots.png", points[1:], {"untrained": points[0][1]}, title
    )
    return points


def main():
    args = parse_args()
    refuse_unused(args, flags_used(args))
    for run in args.runs:  # every mistake before hours of work
        load_encoder(run)
        if args.snapshots:
            snapshot_files(run)
    task = open_task(args)
    images = len(task.labels[args.split])
    print(f"data     {task.folder}: {args.split}, {images:,} images, {len(task.names)} classes")
    reports = []
    for run in args.runs:
        print(f"run      {run}")
        reports.append(probe(run, task))
    if len(reports) > 1 and task.labelled:
        from common import compare

        with working("comparing"):
            compare.write(task.out, reports, task.groups[args.split], task.threshold, args.claim)
    run, folder = (shlex.quote(str(path)) for path in (args.runs[0], task.folder))
    print(
        f"next: python finetune_lora.py {run} --method lora --data {folder}"
        if task.labelled
        else f"next: python probe.py {run} --data DIR, a set with labels; python data.py FOLDER makes one"
    )


if __name__ == "__main__":
    cli(main)
