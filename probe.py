"""Stage 3: what did the encoder learn? Classifiers on frozen features, compared with controls.

    python probe.py runs/NAME                     # on the data that the run was trained on
    python probe.py runs/A-s0 runs/A-s1 runs/B-s0 runs/B-s1    # is B better than A?

Reads:  runs/NAME (model.safetensors, log.jsonl) or a public checkpoint; datasets/NAME (train, dev,
        val; without dev a tenth of train is held out for choices)
Writes: runs/NAME/ probe.json (by --headline probe-headline.json), attention.png, neighbours.png;
        of another data set or split the same in runs/NAME/DATA-SPLIT/; of several runs
        compare/compare.json and curves.png

The headline was chosen on dev of faces20: Top-1 of a linear probe (logistic regression) on the
largest and smallest values of the patch tokens. The same command with one --dtype gives the same
digits, because features are fp16, classifiers run on the CPU, and all random numbers have fixed seeds.

    n pictures of a split   D width of their features   B batch   s side of a view   N patches
"""

import json
import re
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from common import features, metrics, readout
from common.checkpoints import flags_of, load_teacher
from common.groups import groups_of
from common.train import (
    Parser,
    UserError,
    cli,
    command,
    commit,
    machine,
    quoted,
    read_log,
    refuse_overwrite,
    refuse_useless,
    save_json,
    seeded,
)
from model import POOLS

FEW_SHOT = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
PAIRED = 2000  # most images for verification: the number of their pairs grows with the square
LEAST_GAIN = 2.0  # points of kNN: a few hundred pictures can't tell less from chance
INTERVAL = "{low:+.2f} to {high:+.2f}"
HEADS = {"logistic": "logistic regression", "knn": "kNN"}
COLUMNS = {  # of the printed table: the keys of a number in a row of probe.json, and its heading
    "logistic.top1": "linear",
    "logistic.top5": "Top-5",
    "logistic.macro_f1": "F1",
    "knn.top1": "kNN",
    "retrieval.map": "mAP",
    "retrieval.recall1": "R@1",
    "verification.auc": "AUROC",
    "few_shot.5-way 1-shot.mean": "1-shot",
    "few_shot.5-way 5-shot.mean": "5-shot",
}
LEGEND = """\
In %: Top-1, Top-5 and macro-F1 of the linear probe; Top-1 of kNN; retrieval (mAP, R@1);
AUROC of pairs, same character or not; 5-way few-shot accuracy.
< marks what is not better than the best thumbnail."""


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of pretrain.py, or public checkpoints")
    add("--data", metavar="DIR", help="packed set with labels (default: that of the first run)")
    add("--split", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add(
        "--pool",
        default=features.HEADLINE,
        choices=POOLS,
        help="how tokens become one vector",
    )
    add(
        "--headline",
        action="store_true",
        help="one pool: no controls, no verification, no pictures",
    )
    add(
        "--out",
        metavar="DIR",
        help="of the results (default: the run; of several: compare/ next to the first)",
    )
    add("--device", default="auto", help="of the encoder: auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the encoder")
    return parser.parse_args()


# ---- what is measured on -------------------------------------------------------------------------


@dataclass
class Task(features.Evaluation):
    """What is measured of every set of features: the same rows, classes and episodes."""

    pool: str  # how the tokens become one vector
    headline: bool  # this pool alone, without controls, verification and pictures
    folders: dict  # {run: folder of its results}
    out: Path | None  # of a comparison; None for one run
    fit: torch.Tensor | None = None  # which pictures of train the linear probe learns from
    choose: torch.Tensor | None = None  # which pictures its regularisation is chosen on
    choose_in: str = "dev"  # the split that these are in, dev or train
    counts: torch.Tensor | None = None  # fitted pictures of each class, (C,)
    episodes: dict = field(default_factory=dict)  # of few-shot classification, by their name
    controls: dict = field(default_factory=dict)  # {shape of an encoder: rows of its controls}

    def __post_init__(self):
        self.labels = {name: split["labels"] for name, split in self.splits.items()}
        self.groups = groups_of(self.split)
        self.names = self.train["header"]["classes"]
        self.filename = "probe-headline.json" if self.headline else "probe.json"


def open_task(flags):
    """Everything that is the same for all features of this call."""
    task = features.open_task(flags, flags.runs[0])
    useless = set() if task.labelled else {"pool", "headline"}
    refuse_useless(flags.given & useless, "where pictures lack labels")
    folders = {run: features.results_folder(run, task.folder, task.held) for run in flags.runs}
    out = None
    if len(flags.runs) > 1:
        out = comparison_folder(flags, folders)
    elif flags.out:
        folders = {flags.runs[0]: Path(flags.out)}
    headline = task.labelled and flags.headline
    task = Task(**vars(task), pool=flags.pool, headline=headline, folders=folders, out=out)
    if task.labelled:
        open_labels(task)
    fix = "choose another --data or --split, or add or leave out --headline"
    if flags.out and not out:
        fix = "choose another --out"
    for folder in folders.values():
        refuse_overwrite([folder / task.filename], fix)
    if out:
        refuse_overwrite([out / "compare.json"])
    return task


def comparison_folder(flags, folders):
    """compare/ next to the first run; compare-DATA-SPLIT/ for other data or another split."""
    first = features.home_of(flags.runs[0])
    own = folders[flags.runs[0]]
    name = "compare" if own == first else f"compare-{own.name}"
    return Path(flags.out or first.parent / name)


def open_labels(task):
    """Pictures to fit on and to choose on, class sizes, few-shot episodes."""
    # The reported split is for reporting alone. What is chosen on it looks better than it is, so the
    # regularisation has other pictures: dev, or a tenth of train. (With --split dev, both are dev: it
    # is for choices between runs, and not for results.)
    task.fit, task.choose, task.choose_in = features.set_apart_to_choose(task)
    labels = task.labels["train"]
    queries = task.labels[task.held]
    task.counts = torch.bincount(labels[task.fit], minlength=len(task.names))
    if missing := [str(task.names[c]) for c in queries.unique() if task.counts[c] == 0]:
        remedy = "pack it again: python data.py IMAGES --min-per-class 10"
        problem = f"{task.held} has classes that train has not ({', '.join(missing[:4])})"
        raise UserError(f"{task.folder}: {problem}; {remedy}")
    # The episodes are drawn once, with a seed of their own, so that all features get the same questions.
    for ways, shots in FEW_SHOT:
        episodes = metrics.draw_episodes(labels, queries, ways, shots, seeded(0, ways, shots))
        if episodes is not None:
            task.episodes[f"{ways}-way {shots}-shot"] = episodes


# ---- numbers: each function takes a set of features {split: (n, D)} ------------------------------


def measure(vectors, task):
    """Every number of one set of features -> (row of probe.json, {head: which images are right})."""
    bank = vectors["train"]
    queries = vectors[task.held]
    labels = task.labels[task.held]
    C = len(task.names)
    # logistic_probe standardises first: a feature with small numbers needs large weights, which the penalty would
    # forbid. Mean and deviation are those of the fitted pictures, because the others stand for pictures
    # that nobody has seen yet. Features are rounded to fp16, and scikit-learn fits on the CPU in
    # float64, so that errors of rounding hardly ever reach a digit that is printed.
    classify, strength = metrics.logistic_probe(
        bank[task.fit],
        task.labels["train"][task.fit],
        vectors[task.choose_in][task.choose],
        task.labels[task.choose_in][task.choose],
        C,
    )
    # Two heads, because they ask different questions. A linear probe may ignore all directions that do
    # not help, so it asks whether the character can be read off at all. kNN learns nothing and compares
    # whole vectors, so it asks whether the character is what makes two pictures similar.
    scores = {
        "logistic": classify(queries),
        "knn": readout.knn_votes(bank, task.labels["train"], queries, C),
    }
    row = {head: metrics.classification(s, labels, task.counts) for head, s in scores.items()}
    row["logistic"]["C"] = strength  # of scikit-learn: large means little regularisation
    # Pictures of one illustration never answer each other: finding a drawing is no recognition.
    row["retrieval"] = metrics.retrieval(queries, labels, task.groups)
    row["few_shot"] = few_shot(bank, queries, task)
    if not task.headline:
        row["verification"] = verification(queries, labels, task.groups)
    return row, {head: s.argmax(1) == labels for head, s in scores.items()}


def few_shot(bank, queries, task):
    """Mean accuracy over 600 episodes, and half of its 95 % interval, for each kind of episode."""
    row = {}
    for name, episodes in task.episodes.items():
        accuracy = metrics.few_shot(bank, queries, *episodes)
        # It is the error of the draw of episodes alone: another seed of pre-training may differ by more.
        half = 1.96 * accuracy.std().item() / len(accuracy) ** 0.5
        row[name] = {"mean": accuracy.mean().item(), "half": half}
    return row


def verification(x, labels, groups):
    """Are two pictures of one class? By their cosine: area under the ROC curve, equal error rate."""
    index = data.evenly_spaced(len(x), PAIRED)
    same, other = metrics.pair_cosines(x[index], labels[index], groups[index])
    if not len(same) or not len(other):
        return {}
    # The area needs no threshold: it is the probability that a pair of one class has the larger cosine.
    auc = metrics.auroc(same, other)
    return {"auc": auc, "equal_error_rate": metrics.equal_error_rate(same, other)}


def chance(task):
    """What guessing gets, as a row: the most frequent classes of train; a random ranking."""
    # Where classes differ in size, chance is more than 1/C: who always says the largest class is right
    # as often as that class occurs.
    labels = task.labels[task.held]
    share = torch.bincount(labels, minlength=len(task.names)).double() / len(labels)
    guess = task.counts.double().expand(len(labels), -1)
    guess = metrics.classification(guess, labels, task.counts)
    same = share.square().sum().item()  # probability that two pictures have one class
    return {
        "logistic": guess,
        "knn": guess,
        "retrieval": {"map": same, "recall1": same},
        "verification": {"auc": 0.5, "equal_error_rate": 0.5},
        "few_shot": {name: {"mean": 1 / int(name.split("-")[0])} for name in task.episodes},
    }


def thumbs(view):
    """view u8 (B, s, s, 3) -> {"thumb4", "thumb8", "thumb16"}: colours alone, no network."""
    view = view.cpu()  # Metal lacks the pooling
    return {f"thumb{side}": readout.thumbnails(view, side) for side in (4, 8, 16)}


def control_rows(encoder, task):
    """Rows of the random-init encoder and of thumbnails: measured once for all runs of one shape."""
    # An encoder of random weights is no blank: it mixes the pixels, and a linear probe reads colours and
    # edges from that. Only what a run gains over that row was learned. Thumbnails tell how far colours alone
    # lead. A character has its hair colour, so that is far: 82.5 % on faces20 (docs/results.md).
    shape = json.dumps(encoder.config)
    if shape not in task.controls:
        untrained = features.untrained_like(encoder).to(task.device)
        pooled = features.of_encoder(untrained, task)
        thumbnails = features.extract(thumbs, task.train["images"].shape[1], task)  # as packed
        controls = {f"untrained {task.pool}": pooled[task.pool]} | thumbnails
        task.controls[shape] = {name: measure(x, task)[0] for name, x in controls.items()}
    return task.controls[shape]


def percent(row, keys):
    """ "knn.top1" of a row, in percent; None where it has none."""
    for key in keys.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return None if row is None else 100 * row


def label_of(name):
    """A row's name as printed: "untrained mean" is "random-init mean", "thumb4" is "thumbnail 4x4"."""
    name = re.sub(r"^thumb(\d+)$", r"thumbnail \1x\1", name)
    return name.replace("untrained", "random-init")


def table(rows):
    """rows {name: row} -> lines; < marks what is not better than the best thumbnail."""
    best = {}
    for keys in COLUMNS:
        values = [percent(row, keys) for name, row in rows.items() if name.startswith("thumb")]
        best[keys] = max((value for value in values if value is not None), default=-1)
    lines = [f"{'features':20}" + "".join(f"{heading:>7} " for heading in COLUMNS.values())]
    for name, row in rows.items():
        line = f"{label_of(name):20}"
        for keys in COLUMNS:
            value = percent(row, keys)
            loses = value is not None and value <= best[keys]
            mark = "<" if loses and not name.startswith(("thumb", "chance")) else " "
            line += f"{'-' if value is None else f'{value:.1f}':>7}{mark}"
        lines.append(line.rstrip())
    return [*lines, LEGEND]


# ---- epochs to a threshold -----------------------------------------------------------------------


def threshold_of(runs):
    """-> (the threshold, kNN Top-1 in percent, and its source); (None, why) if there is none.

    The reference is the first run with random masks, else the first run.
    """
    # A round number such as 70 % would mean nothing where random weights have 70 % already. So the
    # threshold is nine tenths of the way from there to the end of a run with random masks. Where that
    # run gained nothing, its start would be a threshold that every run has reached after 0 epochs.
    plain = [run for run in runs if flags_of(run).get("mask") == "random"]
    reference = (plain or runs)[0]
    log = read_log(features.home_of(reference) / "log.jsonl")
    knn = [row["knn"] for row in log if "knn" in row]
    if not knn:
        return None, f"no kNN in {reference}/log.jsonl"
    name = Path(reference).name
    threshold, least = metrics.threshold_of(knn), knn[0] + LEAST_GAIN
    if threshold < least:
        return least, f"random init + {LEAST_GAIN:g} points, as {name} hardly gained"
    return threshold, f"random init + 90 % of the gain of {name}"


def efficiency(rows, threshold):
    """Rows of log.jsonl -> epochs and seconds until kNN reached the threshold; None: no kNN in it.

    Seconds are those of the whole run, with a teacher's maps and the evaluations.
    """
    evaluated = [row for row in rows if "knn" in row]
    if threshold is None or not evaluated:
        return None
    knn = [row["knn"] for row in evaluated]
    epochs, seconds = ([row[key] for row in evaluated] for key in ("epoch", "seconds"))
    return {
        "threshold": threshold,
        "gain": max(knn[1:], default=knn[0]) - knn[0],
        "reached_epoch": metrics.first_crossing(epochs, knn, threshold),
        "reached_seconds": metrics.first_crossing(seconds, knn, threshold),
    }


def efficiency_line(row, source):
    if row is None:
        return f"epochs to threshold: not known, {source}"
    reached = "not reached"
    if row["reached_epoch"] is not None:
        reached = f"reached after {row['reached_epoch']:.1f} epochs, {row['reached_seconds']:.0f} s"
    elif row["gain"] < LEAST_GAIN:
        reached = f"no gain, at most {row['gain']:+.1f} points after the start"
    return f"kNN of {row['threshold']:.1f} % in the run ({source}): {reached}"


# ---- pictures ------------------------------------------------------------------------------------


@torch.no_grad()
def draw_attention(path, name, encoder, task, index):
    """A line for each picture: each head of the last block, their mean, the rollout, the pooler."""
    from common import plots  # matplotlib takes a second to load: only where a picture is drawn

    _, view = next(data.whole_views(task.split["images"], index, encoder.image_size, task.device))
    # The last block alone shows where CLS looks among tokens that are mixed by then. The rollout
    # multiplies all blocks, so it tells which patches of the picture reached it (arXiv:2005.00928).
    heads = encoder.patch_attention(view)  # (B, heads, N)
    rollout = encoder.patch_attention(view, "rollout")  # (B, 1, N)
    maps = [heads, heads.mean(1, keepdim=True), rollout]
    names = ["picture", *(f"CLS, head {i + 1}" for i in range(heads.shape[1]))]
    names += ["CLS, mean", "CLS, rollout"]
    if encoder.pooler is not None:
        maps.append(encoder.patch_attention(view, "pooler").mean(1, keepdim=True))
        names.append("pooler")
    grids = torch.cat(maps, 1).unflatten(2, (encoder.side, -1))  # (B, len(names) - 1, g, g)
    lines = [("", [picture, *grid]) for picture, grid in zip(view, grids, strict=True)]
    title = f"Attention to each patch: {name}"
    plots.image_grid(path, title, lines, names)


def draw_neighbours(path, name, vectors, task, index):
    """A line for each picture: it, and its 8 nearest of train, the cosine of their vectors under them.

    main compares mean tokens, whatever --pool is; the votes of kNN in the table follow --pool.
    A neighbour of the picture's class has a green frame, another a dashed one.
    """
    from common import plots

    images, bank = task.split["images"], task.train["images"]
    queries = F.normalize(vectors[task.held][index].float(), dim=1)
    cosine = queries @ F.normalize(vectors["train"].float(), dim=1).T
    cosine, nearest = cosine.topk(8, dim=1)
    same = task.split["labels"][index][:, None] == task.train["labels"][nearest]
    title = f"{task.held} pictures and their nearest in train: {name}"
    n = len(index)
    with plots.panels(path, title, n, 9, (10.2, 1.32 * n + 0.6), squeeze=False) as axes:
        pairs = zip(index.tolist(), nearest.numpy(), strict=True)
        plots.show_rows(axes, [("", [images[i], *bank[neighbours]]) for i, neighbours in pairs])
        for i, j in np.ndindex(n, 8):
            axis = axes[i, j + 1]
            axis.set_xlabel(f"{cosine[i, j]:.2f}", fontsize=8, labelpad=2)
            if task.labelled:
                colour, style = (plots.GREEN, "-") if same[i, j] else (plots.ORANGE, "--")
                axis.spines[:].set(visible=True, color=colour, linestyle=style, linewidth=3)


# ---- one run -------------------------------------------------------------------------------------


def probe(run, task, threshold):
    """Extract, measure, draw and write one run -> what a comparison needs. threshold: number, source."""
    print(f"run      {run}")
    folder = task.folders[run]
    encoder = load_teacher(run)  # with the pooler, if it has one: it is drawn
    encoder.to(task.device).requires_grad_(False)
    pooled = features.of_encoder(encoder, task)
    report = {
        "command": command(),
        "machine": machine(task.device),
        "commit": commit(),
        "run": features.home_of(run).name,
        "config": flags_of(run),
        "data": str(task.folder),
        "split": task.held,
        "dtype": task.dtype,
        "images": {name: len(x) for name, x in task.labels.items()},
    }
    if not task.headline:
        index = data.evenly_spaced(len(task.split["images"]), 8)
        name = features.home_of(run).name
        draw_attention(folder / "attention.png", name, encoder, task, index[:5])
        draw_neighbours(folder / "neighbours.png", name, pooled["mean"], task, index[:6])
    right = {}
    log = read_log(features.home_of(run) / "log.jsonl")
    if task.labelled:
        numbers, right = measure_run(encoder, pooled, task)
        report |= numbers | {"efficiency": efficiency(log, threshold[0])}
        print(efficiency_line(report["efficiency"], threshold[1]))
    else:
        print(f"{run}: no numbers: accuracy needs two classes, and a label on every picture")
    save_json(report, folder / task.filename)
    print(f"wrote    {folder / task.filename}")
    return report | {"right": right, "log": log, "path": str(run)}


def measure_run(encoder, pooled, task):
    """Rows of all features and controls, printed -> (the report's part, which images are right)."""
    pools = [task.pool] if task.headline else POOLS
    measured = {pool: measure(pooled[pool], task) for pool in pools}
    rows = {pool: row for pool, (row, _) in measured.items()}
    right = measured[task.pool][1]
    if not task.headline:
        rows |= control_rows(encoder, task)
    rows["chance"] = chance(task)
    print("\n".join(table(rows)))
    numbers = {
        "classes": task.names,
        "pool": task.pool,
        "headline": rows[task.pool]["logistic"]["top1"],
        "rows": {name: slim(row, name == task.pool) for name, row in rows.items()},
        "right": {head: metrics.to_bits(x) for head, x in right.items()},
    }
    return numbers, right


def slim(row, is_headline):
    """A row without its confusion and per-class numbers, unless it is the headline's."""
    if is_headline:
        return row
    large = ("per_class", "confusion")
    kept = {}
    for head, numbers in row.items():
        if isinstance(numbers, dict):  # and not one number, as of your own
            numbers = {key: value for key, value in numbers.items() if key not in large}
        kept[head] = numbers
    return kept


# ---- several runs --------------------------------------------------------------------------------


def by_config(reports):
    """{name: {seed: report}}: runs of one name, without -sN, whose flags differ in the seed alone."""
    groups = {}
    for report in reports:
        # Only runs that differ in nothing but their seed may be averaged. So all other flags must be equal,
        # whatever the folders are called.
        flags = report["config"]
        config = {flag: value for flag, value in flags.items() if flag not in ("seed", "out")}
        name = re.sub(r"-s(eed-)?\d+\b", "", report["run"])
        seeds = groups.setdefault((name, json.dumps(config, sort_keys=True)), {})
        seed = flags.get("seed", 0)
        if seed in seeds:
            first = seeds[seed]["path"]
            alike = f"{report['path']} and {first} have the same flags and the same seed"
            raise UserError(f"{alike}; if their code differs, give one of the folders another name")
        seeds[seed] = report
    named = {}
    for (name, _), seeds in groups.items():
        first = next(iter(seeds.values()))
        named[first["path"] if name in named else name] = seeds
    return named


def summary(seeds):
    """{seed: report} -> mean and standard deviation of each head's Top-1, and epochs to threshold."""
    reports = list(seeds.values())
    row = {"runs": len(reports)}
    for head in HEADS:
        row[head] = metrics.mean_std([100 * r["rows"][r["pool"]][head]["top1"] for r in reports])
    epochs = [r["efficiency"]["reached_epoch"] for r in reports if r["efficiency"]]
    epochs = [epoch for epoch in epochs if epoch is not None]
    row["reached_epoch"] = metrics.mean_std(epochs) if epochs else None
    return row


def differences(configs, groups):
    """Every configuration against the first, for each head, over the seeds that both have."""
    (base, first), *others = configs.items()
    rows = []
    for name, other in others:
        # Two runs of one seed have the same initial weights, order of pictures and crops. What these do
        # is in both, so it leaves the difference, and fewer seeds are enough.
        seeds = sorted(first.keys() & other.keys())
        for head in HEADS if seeds else ():
            right, right_first = (
                np.stack([runs[seed]["right"][head] for seed in seeds]) for runs in (other, first)
            )
            points = 100.0 * (right.astype(float) - right_first)  # (seeds, images)
            row = {"pair": f"{name} - {base}", "head": head, "seeds": seeds}
            row["per_seed"] = points.mean(1).tolist()
            # Would the difference hold for other seeds and other pictures? The bootstrap draws both anew.
            # It draws whole illustrations, whose faces are right or wrong together: drawn one by one,
            # they would count as more evidence than they are. The t interval is about seeds alone.
            row["images"] = metrics.bootstrap(points, groups)
            row["t"] = metrics.t_interval(points.mean(1))
            rows.append(row)
    return rows


def difference_line(row):
    """ "b - a, kNN: +1.20 points; 95 % interval ... over seeds and illustrations, ... by t over seeds".

    With one seed, illustrations alone are drawn.
    """
    t = f"{len(row['seeds'])} seed(s): no t interval"
    if row["t"]:
        t = f"{INTERVAL.format(**row['t'])} by t over seeds"
    over = "seeds and illustrations" if len(row["seeds"]) > 1 else "illustrations alone"
    both = f"{INTERVAL.format(**row['images'])} over {over}"
    mean = row["images"]["mean"]
    return f"{row['pair']}, {HEADS[row['head']]}: {mean:+.2f} points; 95 % interval {both}, {t}"


def compare(reports, task, threshold):
    """Mean and standard deviation of each configuration, paired differences: printed and written."""
    configs = by_config(reports)
    summaries = {name: summary(seeds) for name, seeds in configs.items()}
    print("Top-1 as mean ± standard deviation over seeds, and epochs until the threshold of kNN")
    print(f"{'configuration':28}{'runs':>5}{'linear, %':>14}{'kNN, %':>14}{'epochs':>14}")
    for name, row in summaries.items():
        cells = [metrics.plus_minus(row[key]) for key in ("logistic", "knn", "reached_epoch")]
        print(f"{name[:27]:28}{row['runs']:>5}" + "".join(f"{cell:>14}" for cell in cells))
    rows = differences(configs, task.groups.numpy())
    print(*map(difference_line, rows), sep="\n")
    if len(configs) > 1 and not rows:
        print("no difference: no other configuration has a seed of the first")
    report = {"command": command(), "machine": machine(task.device), "commit": commit()}
    report |= {"split": task.held, "pool": task.pool, "threshold": threshold}
    report |= {"configurations": summaries, "pairs": rows}
    save_json(report, task.out / "compare.json")
    if any(report["log"] for report in reports):  # public checkpoints have none
        thumbnails = [row["knn_thumbnail"] for row in reports[0]["log"] if "knn_thumbnail" in row]
        thumbnail = thumbnails[0] if thumbnails else None
        curves(configs, task.out / "curves.png", threshold[0], thumbnail)
    print(f"wrote    {task.out}/compare.json")


def curves(configs, path, threshold, thumbnail):
    """kNN by epoch and by second in the logs of the runs: a line each, a colour a configuration."""
    from common import plots

    limits = {"threshold": (threshold, "--"), "4x4 thumbnails": (thumbnail, ":")}
    labels = {"epoch": "epochs", "seconds": "seconds of the run, teacher included"}
    with plots.panels(path, "Learning curves", 1, 2, (9.6, 3.9), sharey=True) as axes:
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            for colour, (name, seeds) in zip(cycle(plots.COLOURS), configs.items(), strict=False):
                legend = f"{name}, {len(seeds)} seed(s)"
                for report in seeds.values():
                    rows = report["log"]
                    plots.plot_rows(axis, rows, key, "knn", "o-", ms=4, color=colour, label=legend)
                    legend = None  # one entry of the legend for all seeds
            axis.set(xlabel=label)
            for legend, (value, style) in limits.items():
                if value is not None:
                    name = f"{legend}, {value:.1f} %"
                    axis.axhline(value, color=plots.INK, ls=style, lw=1, label=name)
        axes[0].set(ylabel="kNN Top-1 during the run, %")
        axes[0].legend(loc="lower right")


def main():
    flags = parse_args()
    # A run that can't be read shows here, and not after the hours that its neighbours take.
    for run in flags.runs:
        load_teacher(run)
    task = open_task(flags)
    images = len(task.labels[task.held])
    print(f"data     {task.folder}: {task.held}, {images:,} images, {len(task.names)} classes")
    # Two runs of one seed can't be averaged. That is said now, and not after the last run.
    if task.labelled:
        runs = [(str(run), features.home_of(run).name) for run in flags.runs]
        by_config([{"config": flags_of(r), "run": name, "path": r} for r, name in runs])
    threshold = threshold_of(flags.runs)
    reports = [probe(run, task, threshold) for run in flags.runs]
    if len(reports) > 1 and task.labelled:
        compare(reports, task, threshold)
    run, folder = (quoted(path) for path in (flags.runs[0], task.folder))
    step = f"finetune_lora.py {run} --method lora --data {folder}"
    if not task.labelled:
        step = f"probe.py {run} --data DIR, a set with labels; python data.py FOLDER makes one"
    print(f"next: python {step}")


if __name__ == "__main__":
    cli(main)
