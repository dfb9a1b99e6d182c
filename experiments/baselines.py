"""Recognition beside the baselines that the field would pick: equal minutes, equal trials on dev, one table.

    python -m experiments.baselines --data datasets/NAME --dry    # what would run
    python -m experiments.baselines --data datasets/NAME --out results/baselines
    python -m experiments.baselines --data datasets/NAME --table margin

Reads:  datasets/NAME
Writes: OUT/NAME/ (behind it -TABLE) plan.json (epochs, learning rates), rows.csv with a row a run
and the command that
        makes it again, table.md, table.json, table.png

Four tables: `recognition` has the baselines, `tail` what is done where few characters have most
pictures (a set of data.py --tail), `margin` how the threshold of "unknown" moves with the margin of
a head, and `shape` which pictures, patches, batches and depths transfer best.

pilot   an epoch of everything: how many epochs fill --pretrain-minutes and --minutes of one core
tune    three learning rates each, in a third of the epochs, judged on dev
final   every arm with --seeds seeds on val (large networks one), and once with characters left out:
        strangers, few-shot

A linear or mlp head on frozen features takes seconds, and gets its usual 50 epochs. Run folders
stay under --work; what is there is not made again, so that a plan can be stopped at any time.
"""

import shlex
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
from common import metrics, plots, stats
from common.classifier import pooled_of, predict
from common.command import Parser, at_least, between, cli, refuse_file
from common.io import UserError, lock_beside, locked, read_json, save_json, save_text
from common.train import autocast_of, commit, pick_dtype, read_log, seeded
from experiments import convnets
from experiments.arms import add_flags as flags_of_arms
from experiments.arms import by_arm, cell, line_of
from experiments.corruptions import SWEEPS
from experiments.study_run import execute
from experiments.tables import read_csv, replace_rows
from finetune_lora import load_classifier

VIT = "--model nano --batch-size 64"  # 64 px in patches of 8
ENCODERS = {  # command of pre-training, the flag of its learning rate, trials
    "mae": (
        f"pretrain.py {VIT} --mask random --contrast none",
        "--blr",
        (4e-3, 8e-3, 16e-3),
    ),
    "agree": (
        f"pretrain.py {VIT} --mask random --contrast cls",
        "--blr",
        (4e-3, 8e-3, 16e-3),
    ),
    "simmim": ("pretrain.py --model nano:simmim=1 --batch-size 64", "--blr", (2e-3, 4e-3, 8e-3)),
    "simclr": (f"-m experiments.views simclr {VIT}", "--lr", (5e-4, 1e-3, 2e-3)),
    "dino": (f"-m experiments.views dino {VIT}", "--lr", (5e-4, 1e-3, 2e-3)),
}
METHODS = {  # flags of finetune_lora.py, the flag of the learning rate, trials
    "linear": ("--method linear", "--head-lr", (1e-2, 3e-2, 1e-1)),
    "lora": ("--method lora --keep .25", "--lr", (1e-3, 3e-3, 1e-2)),
    "full": ("--method full --keep .25", "--lr", (3e-4, 1e-3, 3e-3)),
}
SCRATCH = "--method full --from-scratch --image-size 64"
ARMS = {
    f"{encoder}-{method}": (encoder, *METHODS[method]) for encoder in ENCODERS for method in METHODS
}
ARMS |= {
    "mae-mlp": ("mae", "--method linear --head mlp", "--head-lr", (3e-3, 1e-2, 3e-2)),
    "mae-ifa": ("mae", "--method linear --head ifa", "--head-lr", (1e-2, 3e-2, 1e-1)),
    "agree-lora-rise": ("agree", "--method lora --keep .25:.75", *METHODS["lora"][1:]),
    "agree-full-rise": ("agree", "--method full --keep .25:.75", *METHODS["full"][1:]),
    "vit": ("mae", f"{SCRATCH} --keep .25", *METHODS["full"][1:]),
}
for network in ("resnet10", "resnet50", "efficientnet_b0"):
    for head in ("", "arcface"):
        name = "-".join(filter(None, (network, head)))
        ARMS[name] = network, f"{SCRATCH} --head {head or 'linear'}", "--lr", (3e-4, 1e-3, 3e-3)
TABLES = {"recognition": list(ARMS)}  # the arms of each; those of the others begin with mae-full
for table, more in (
    (
        "tail",
        {
            "balanced": "--balanced",
            "adjusted": "--logit-adjust 1",
            "arcface": "--head arcface:margin=.3",
            "cosface": "--head cosface:margin=.2",
        },
    ),
    (
        "margin",
        {
            f"{head}-{m:g}": f"--head {head}:margin={m:g}"
            for head, margins in (("arcface", (0.1, 0.3, 0.5)), ("cosface", (0.1, 0.2, 0.35)))
            for m in margins
        },
    ),
):
    full, *rates = METHODS["full"]
    new = {f"mae-full-{name}": ("mae", f"{full} {flags}", *rates) for name, flags in more.items()}
    TABLES[table], ARMS = ["mae-full", *new], ARMS | new
SHAPES = {
    "64p4": "--model nano:patch_size=4",
    "64p16": "--model nano:patch_size=16",
    "96p8": "--model nano:image_size=96",
    "96p12": "--model nano:image_size=96,patch_size=12",
    "128p16": "--model nano:image_size=128,patch_size=16",
    "b32": "--batch-size 32",
    "b128": "--batch-size 128",
    "tiny": "--model tiny",
}
for name, flags in SHAPES.items():
    ENCODERS["mae" + name] = f"{ENCODERS['mae'][0]} {flags}", *ENCODERS["mae"][1:]
    ARMS[f"mae{name}-full"] = "mae" + name, *METHODS["full"]
TABLES["shape"] = ["mae-full", *(f"mae{name}-full" for name in SHAPES)]
LARGE = ("resnet50", "efficientnet_b0")  # networks that get one seed
CACHED = ("linear", "mlp", "ifa")  # arms that learn from features which are computed once
LEFT_OUT, BATCHES = (
    5,
    (1, 64),
)  # characters, of the run with strangers; pictures at once, of latency
GRAY = (
    8  # difference of the colours of a pixel, of 255, in the mean of a picture: less is no colour
)
CPU = torch.device("cpu")  # where answers are timed, and spoiled pictures named
GOOD = {
    "top1": "Top-1",
    "top5": "Top-5",
    "macro_f1": "macro-F1",
    "head": "head",
    "mid": "mid",
    "tail": "tail",
    "tpr_at_fpr_0.1": "TPR at FPR .1 %",
    "tpr_at_fpr_1": "1 %",
    "tpr_at_fpr_10": "10 %",
    "eer": "EER",
    "roc_auc": "ROC-AUC",
    "spoiled": "spoiled",
}
NEW = {
    "auroc_unknown": "AUROC",
    "dir_at_far_1": "DIR at FAR 1 %",
    "dir_at_far_10": "10 %",
    "threshold": "threshold, %",
    "known_rejected": "known refused",
    "strangers_unknown": "strangers refused",
    "strangers_unknown_at_5": "at 5 % of the known",
    "calibration_error": "confidence off by",
    "one_shot": "5-way, one shot",
    "five_shot": "five",
}
PANELS = {
    "recognition": (("top1", "Top-1, %"), ("tpr_at_fpr_1", "right pairs accepted at FPR 1 %, %")),
    "tail": (("top1", "Top-1, %"), ("macro_f1", "macro-F1, %")),
    "margin": (
        ("threshold", "threshold of the cosine, %"),
        ("strangers_unknown_at_5", "strangers refused at 5 % of the known, %"),
    ),
}
COST = {
    "epochs": "epochs",
    "parameters_m": "parameters, M",
    "gflop": "GFLOP a picture",
    "step_ms": "step, ms",
    "peak_memory_mb": "peak memory, MB",
    "ms_1": "ms for 1",
    "ms_64": "ms for 64",
}


# ---- runs: made once, by the stages as a user calls them -----------------------------------------


def make(args, out, words):
    """Make a run, or go on with it, unless made.json says that it is through -> its folder."""
    words = [*words, "--data", args.data, "--out", str(out)]
    line = line_of(args, words)
    with locked(lock_beside(out), wait=True) as lock:
        if (out / "made.json").exists():
            there = read_json(out / "made.json", ["command"], "remove its folder and run again")[
                "command"
            ]
            if there.partition(" ")[2] != line.partition(" ")[2]:
                raise UserError(f"{out} was made by other flags ({there}); give another --work")
            return out
        print(line, flush=True)
        if (out / "state.pt").exists():
            script = words[:2] if words[0] == "-m" else words[:1]
            words = [*script, "--resume", str(out)]
        execute(words, out.with_name(out.name + ".log"), args.threads, lock)
        save_json({"command": line, "commit": commit()}, out / "made.json")
    return out


def encoder_of(args, name, rate, epochs, seed, phase):
    """What an arm stands on: a pre-trained run, or the name of a network that begins with random
    weights.
    """
    if name not in ENCODERS:
        return name
    command, flag, _ = ENCODERS[name]
    words = [*shlex.split(command), flag, f"{rate:g}", "--epochs", str(epochs), "--seed", str(seed)]
    words += ["--eval-every", "1000"] if words[0] == "pretrain.py" else []
    return str(make(args, args.home / f"{phase}-{name}-{rate:g}-s{seed}", words))


def tuned(args, arm, encoder, rate, epochs, seed, phase, more=()):
    """A run of finetune_lora.py -> its folder. epochs None: the default of its method."""
    _, command, flag, _ = ARMS[arm]
    script = ["finetune_lora.py"]
    if convnets.is_convnet(encoder):
        script = ["-m", "experiments.convnets"]
    words = [
        *script,
        encoder,
        *shlex.split(command),
        flag,
        f"{rate:g}",
        "--seed",
        str(seed),
        *more,
    ]
    return make(
        args,
        args.home / f"{phase}-{arm}-{rate:g}-s{seed}",
        words + ["--epochs", str(epochs)] * bool(epochs),
    )


def core_seconds(args, out):
    """Of an epoch: of the training steps alone, in the median."""
    speed = statistics.median(
        row["images_per_s"] for row in read_log(out / "log.jsonl") if "images_per_s" in row
    )
    return args.threads * args.images / speed


def dev_top1(out):
    """The best epoch's, on dev or what was held apart of train."""
    return max(row["dev_top1"] for row in read_log(out / "log.jsonl") if "dev_top1" in row)


# ---- the plan ------------------------------------------------------------------------------------


def pilot(args, plan):
    """Epochs of every encoder and arm."""
    for name in args.encoders:
        if name not in plan["epochs"]:
            out = Path(
                encoder_of(args, name, statistics.median_low(ENCODERS[name][2]), 1, 0, "pilot")
            )
            plan["epochs"][name] = max(
                1, round(60 * args.pretrain_minutes / core_seconds(args, out))
            )
            save_json(plan, args.plan)
    for arm in args.arms:
        if arm not in plan["epochs"] and not is_cached(arm):
            name, _, _, rates = ARMS[arm]
            first = statistics.median_low(ENCODERS[name][2] if name in ENCODERS else [0])
            encoder = encoder_of(args, name, first, 1, 0, "pilot")
            out = tuned(args, arm, encoder, statistics.median_low(rates), 1, 0, "pilot")
            plan["epochs"][arm] = max(1, round(60 * args.minutes / core_seconds(args, out)))
            save_json(plan, args.plan)


def is_cached(arm):
    return arm.split("-")[-1] in CACHED


def third(epochs):
    return epochs and max(1, round(epochs / 3))


def tune(args, plan):
    """Learning rates: of encoders by a linear head on dev, then of arms on the best encoder of seed
    0.
    """

    def encoder_trial(job):
        name, rate = job
        run = encoder_of(args, name, rate, third(plan["epochs"][name]), 0, "tune")
        words = ["finetune_lora.py", run, "--method", "linear"]
        return dev_top1(make(args, Path(run + "-linear"), words))

    def arm_trial(job):
        arm, rate = job
        on = final_encoder(args, plan, arm, 0), rate, third(plan["epochs"].get(arm)), 0
        return dev_top1(tuned(args, arm, *on, "tune"))

    choose(args, plan, {name: ENCODERS[name][2] for name in args.encoders}, encoder_trial)
    side_by_side(args, lambda arm: final_encoder(args, plan, arm, 0), one_an_encoder(args.arms))
    choose(args, plan, {arm: ARMS[arm][3] for arm in args.arms}, arm_trial)


def choose(args, plan, trials, trial):
    """plan["rates"] gets the best of the rates {name: rates}; plan["trials"] keeps what all of them
    reached.
    """
    jobs = [
        (name, rate)
        for name, rates in trials.items()
        if name not in plan["rates"]
        for rate in rates
    ]
    found = dict(zip(jobs, side_by_side(args, trial, jobs), strict=True))
    for name in dict.fromkeys(name for name, _ in jobs):
        reached = {rate: top1 for (other, rate), top1 in found.items() if other == name}
        plan["rates"][name] = max(reached, key=reached.get)
        plan["trials"][name] = {f"{rate:g}": round(top1, 2) for rate, top1 in reached.items()}
        print(f"{name}: {plan['trials'][name]} on dev", flush=True)
    save_json(plan, args.plan)


def one_an_encoder(arms):
    """The first arm of each encoder that is pre-trained."""
    return list({ARMS[arm][0]: arm for arm in reversed(arms) if ARMS[arm][0] in ENCODERS}.values())


def final_encoder(args, plan, arm, seed):
    name = ARMS[arm][0]
    return encoder_of(args, name, plan["rates"].get(name), plan["epochs"].get(name), seed, "final")


def seeds_of(args, arm):
    return 1 if arm.split("-")[0] in LARGE else args.seeds


def side_by_side(args, function, jobs):
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(function, jobs))


# ---- what a run is worth -------------------------------------------------------------------------


def final(args, plan):
    """Every arm with every seed -> rows.csv."""
    done = {(row["arm"], row["seed"]) for row in read_csv(args.rows)}
    for seed in range(args.seeds):
        left = [
            arm for arm in args.arms if (arm, str(seed)) not in done and seed < seeds_of(args, arm)
        ]
        side_by_side(
            args, lambda arm, seed=seed: final_encoder(args, plan, arm, seed), one_an_encoder(left)
        )

        def run(arm, seed=seed):
            on = (
                final_encoder(args, plan, arm, seed),
                plan["rates"][arm],
                plan["epochs"].get(arm),
                seed,
            )
            outs = [tuned(args, arm, *on, "final")]
            if seed == 0 and args.classes > LEFT_OUT + 1:
                outs.append(tuned(args, arm, *on, "strangers", ("--hold-out", str(LEFT_OUT))))
            for out in outs:
                if (out / "recognize.json").exists():
                    continue
                script = ["recognize.py"]
                if convnets.is_convnet(out):
                    script = ["-m", "experiments.convnets"]
                words = [*script, str(out), "--verify"]
                execute(words, out.with_name(out.name + ".log"), args.threads)
            return outs

        for arm, outs in zip(left, side_by_side(args, run, left), strict=True):
            row = {"arm": arm, "seed": seed} | row_of(args, *outs)
            replace_rows(args.rows, [row], ("arm", "seed"))
            print(f"{arm}, seed {seed}: Top-1 {row['top1']:.1f} %", flush=True)


def row_of(args, out, strangers=None):
    """A run, and the one with strangers -> columns of rows.csv."""
    found, verified = (
        read_json(out / name, [], "remove it") for name in ("metrics.json", "recognize.json")
    )
    row = {
        k: found[k] for k in ("top1", "top5", "macro_f1", "step_ms", "peak_memory_mb", "best_epoch")
    }
    row |= {"epochs": found["config"]["epochs"]} | {
        k: found["by_size"].get(k, "") for k in ("head", "mid", "tail")
    }
    row |= {
        k: v for k, v in verified.get("verification", {}).items() if k in GOOD
    }  # {}: no two pictures of anybody
    (net, header), autocast = load_classifier(out), autocast_of(CPU, args.dtype)
    row |= spoiled(args, net, header, autocast) | cost(net, header["image_size"], autocast)
    if strangers:
        new = read_json(strangers / "recognize.json", ["open_set"], "remove it")
        new |= new["open_set"] | {"threshold": 100 * new["threshold"]}
        row |= {k: v for k, v in new.items() if k in NEW}
        row |= few_shot(args, *load_classifier(strangers), autocast)
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} | {
        "right": found["right"],
        "machine": found["machine"],
        "commit": found["commit"],
        "command": read_json(out / "made.json", ["command"], "remove it")["command"],
    }


def spoiled(args, net, header, autocast):
    """Top-1 under the headline level of each corruption, in the mean."""
    split, S, right = data.open_split(args.data, "val"), header["image_size"], {}
    ids = torch.tensor([header["classes"].index(name) for name in split["header"]["classes"]])
    for rows, view in data.whole_views(split["images"], torch.arange(len(split["images"])), S, CPU):
        for name, (spoil, _, _, level) in SWEEPS.items():
            with torch.no_grad(), autocast():
                pooled = net.pooled(
                    *net.encoder.all_patches(spoil(view, level, seeded(0, int(rows[0]))))
                )
            right.setdefault(name, []).append(
                predict(net, pooled.float())[0].argmax(1) == ids[split["labels"][rows]]
            )
    return {
        "spoiled": 100
        * statistics.fmean(torch.cat(r).double().mean().item() for r in right.values())
    }


@torch.no_grad()
def cost(net, S, autocast, turns=10):
    """Parameters, operations and milliseconds to name a picture; a multiplication and an addition
    are two.
    """
    row = {"parameters_m": sum(p.numel() for p in net.parameters()) / 1e6}
    for n in BATCHES:
        view, times = torch.randint(256, (n, S, S, 3), dtype=torch.uint8), []
        for _ in range(turns + 1):
            start_time = time.perf_counter()
            with autocast():
                pooled = net.pooled(*net.encoder.all_patches(view))
            predict(net, pooled.float())
            times.append(1000 * (time.perf_counter() - start_time))
        row[f"ms_{n}"] = statistics.median(times[1:])  # the first warms up
    with FlopCounterMode(display=False) as counter:
        net.pooled(*net.encoder.all_patches(view[:1]))
    return row | {"gflop": counter.get_total_flops() / 1e9}


def few_shot(args, net, header, autocast):
    """5-way episodes among the characters that were left out: examples from train, questions from
    val.
    """
    sets = [data.open_split(args.data, name) for name in ("train", "val")]
    new = torch.tensor([name not in header["classes"] for name in sets[0]["header"]["classes"]])
    rows = [new[split["labels"]].nonzero()[:, 0] for split in sets]
    labels = [split["labels"][r] for split, r in zip(sets, rows, strict=True)]
    found = [pooled_of(net, split, r, autocast) for split, r in zip(sets, rows, strict=True)]
    found = [predict(net, pooled)[1] for pooled in found]
    row = {}
    for name, shots in (("one_shot", 1), ("five_shot", 5)):
        episodes = metrics.draw_episodes(*labels, 5, shots, seeded(0, 5, shots))
        if episodes is not None:
            row[name] = 100 * metrics.few_shot(*found, *episodes).mean().item()
    return row


# ---- the table -----------------------------------------------------------------------------------


def write_table(args):
    """table.md, table.json and table.png of the rows that are there; the best arm is the one with
    the highest Top-1.
    """
    rows = [
        {column: row.get(column, "") for column in (*row, *GOOD, *NEW, *COST)}
        for row in read_csv(args.rows)
    ]
    arms = by_arm(rows, ARMS)
    order = sorted(
        arms, key=lambda arm: -statistics.fmean(float(r["top1"]) for r in arms[arm].values())
    )
    val = data.open_split(args.data, "val")
    behind = {arm: against(arms[arm], arms[order[0]], val) for arm in order}
    arms = {
        arm: arms[arm]
        for arm in (TABLES["margin"] if args.table == "margin" else order)
        if arm in arms
    }
    good, new = ([c for c in columns if any(r[c] != "" for r in rows)] for columns in (GOOD, NEW))
    title = f"{args.table.capitalize()} on {args.data_name}, val"
    about = (
        f"`{VIT}`; {args.minutes:g} min of one core for each arm, {args.pretrain_minutes:g} for each encoder "
        "before. Behind: points of Top-1 behind the best arm, with a 95 % interval by seeds and illustrations. "
        f"Spoiled: Top-1 under eight corruptions.{missing(good + new)} {hardest(arms, val)}"
    )
    strangers = (
        f"{LEFT_OUT} characters left out of training, seed 0: who is refused by the threshold of dev, and "
        "few-shot episodes among those five:"
    )
    lines = [
        f"# {title}, in percent; mean ± std over seeds",
        "",
        about,
        "",
        *table_lines(arms, good, GOOD, cell, behind),
        "",
        strangers,
        "",
        *table_lines(arms, new, NEW, cell),
        "",
        "What it costs:",
        "",
        *table_lines(arms, COST, COST, mean),
        "",
        "![The arms, a dot a seed](table.png)",
        "",
    ]
    save_text("\n".join(lines), args.out / "table.md")
    cells = {
        arm: {c: cell(of, c) for c in good + new} | {c: mean(of, c) for c in COST}
        for arm, of in arms.items()
    }
    save_json(
        {arm: {"behind": behind[arm]} | found for arm, found in cells.items()},
        args.out / "table.json",
    )
    draw(
        args.out / "table.png",
        arms,
        f"{title}: a dot is a seed",
        PANELS.get(args.table, PANELS["recognition"]),
    )


def hardest(arms, split):
    """How many pictures no arm names, and how those without colour fare."""
    n, pixels = len(split["labels"]), np.asarray(split["images"]).astype(np.int16)
    right = np.array(
        [stats.from_bits(row["right"], n) for of in arms.values() for row in of.values()], bool
    )
    gray = (pixels.max(3) - pixels.min(3)).mean((1, 2)) < GRAY
    words = [
        f"of {k.sum()} pictures {name} colour {100 * right[:, k].mean():.1f} % are named rightly"
        for name, k in (("without", gray), ("with", ~gray))
        if k.any()
    ]
    return f"No arm names {(~right.any(0)).sum()} of {n} pictures; in the mean of the arms, {', '.join(words)}."


def missing(good):
    """Why a column is not there."""
    why = {
        "head": "no character has more than 100 pictures",
        "tail": "none has fewer than 20",
        "eer": "no character has two illustrations in val",
        "one_shot": "too few characters to leave five out",
    }
    said = [f"{(GOOD | NEW)[c]} ({text})" for c, text in why.items() if c not in good]
    return f" Columns left out: {', '.join(said)}." if said else ""


def table_lines(arms, columns, names, text, behind=None):
    """text({seed: row}, column) -> what stands in a place; behind {arm: text}: one more column."""
    head = ["arm", "seeds", *(["behind"] if behind else []), *(names[c] for c in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arm, seeds in arms.items():
        cells = [
            arm,
            str(len(seeds)),
            *([behind[arm]] if behind else []),
            *(text(seeds, c) for c in columns),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mean(seeds, column):
    """{seed: row} -> the mean of a column, to three digits or whole."""
    value = statistics.fmean(float(r[column]) for r in seeds.values())
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def against(seeds, best, split):
    """Top-1 minus the best arm's, over the same seeds and pictures -> "-1.2 (-2.0 to -.4)"."""
    if seeds is best:
        return "best"
    groups, n = data.groups_of(split).numpy(), len(split["labels"])
    both = sorted(seeds.keys() & best.keys())
    right = [[stats.from_bits(rows[s]["right"], n) for s in both] for rows in (seeds, best)]
    found = stats.bootstrap(100.0 * (np.int8(right[0]) - np.int8(right[1])), groups)
    return f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def draw(path, arms, title, panels):
    """A dot for each seed, the best arm above; panels: (column, its name), two."""
    kinds = {True: ("pre-trained ViT", plots.BLUE), False: ("from scratch", plots.ORANGE)}
    with plots.panels(path, title, 1, 2, (9.6, 1.2 + 0.24 * len(arms)), sharey=True) as axes:
        for axis, (column, name) in zip(axes, panels, strict=True):
            for pretrained, (label, colour) in kinds.items():
                points = [
                    (float(r[column]), i)
                    for i, (arm, seeds) in enumerate(arms.items())
                    for r in seeds.values()
                    if (arm.split("-")[0] in ENCODERS) == pretrained and r[column] != ""
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), "o", color=colour, ms=5, alpha=0.7, label=label
                    )
            plots.percent(axis, "x")
            axis.set(xlabel=name)
            axis.grid(axis="y", alpha=0.3)
        axes[0].set_yticks(range(len(arms)), arms)
        axes[0].invert_yaxis()
        axes[0].legend()


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="packed set with labels")
    add("--table", choices=TABLES, default="recognition", help="which one (default: %(default)s)")
    add(
        "--arms",
        nargs="+",
        choices=ARMS,
        metavar="ARM",
        help=f"default: the table's; all: {' '.join(ARMS)}",
    )
    add(
        "--seeds",
        type=at_least(1),
        default=3,
        metavar="N",
        help="of each arm, from 0 on (default: 3)",
    )
    add(
        "--minutes",
        type=between(1e-4, 1e4),
        default=3,
        metavar="M",
        help="of one core for each arm (default: 3)",
    )
    add(
        "--pretrain-minutes",
        type=between(1e-4, 1e4),
        default=6,
        metavar="M",
        help="for each encoder (default: 6)",
    )
    add("--dry", action="store_true", help="say what would run, and stop")
    flags_of_arms(add, None, "runs/baselines")
    return parser.parse_args()


def say_plan(args):
    """How much would run, in minutes of one core."""
    learn, quick = (
        [a for a in args.arms if not is_cached(a)],
        [a for a in args.arms if is_cached(a)],
    )
    gone = [a for a in TABLES[args.table] if a not in args.arms]
    encoders = len(args.encoders) * args.pretrain_minutes * (1 + args.seeds)
    arms = args.minutes * sum(1 + seeds_of(args, arm) + 1 for arm in learn)
    print(
        f"encoders {', '.join(args.encoders)}: trials and {args.seeds} seeds, {encoders:g} minutes of one core\n"
        f"arms     {', '.join(learn)}: trials, {args.seeds} seeds ({', '.join(LARGE)} one), one with strangers, "
        f"{arms:g} minutes\n"
        f"seconds  {', '.join(quick)}\nleft out {', '.join(gone) or 'nothing'}\n"
        f"in all   {(encoders + arms) / 60 / args.threads / args.jobs:.1f} hours here"
    )


def main():
    args = parse_args()
    refuse_file(args.out)
    if not (Path(args.data) / "train.safetensors").exists():
        raise UserError(
            f"{args.data} is no packed set; python data.py FOLDER makes one, a folder per character"
        )
    train = data.open_split(args.data, "train")
    args.images, args.classes = len(train["labels"]), len(train["header"]["classes"])
    args.data_name, args.arms = Path(args.data).name, args.arms or TABLES[args.table]
    args.encoders = [name for name in ENCODERS if any(ARMS[arm][0] == name for arm in args.arms)]
    args.dtype = pick_dtype("auto", CPU)[0]
    folder = args.data_name.removesuffix(f"-{args.table}") + f"-{args.table}" * (
        args.table != "recognition"
    )
    args.out, args.home = Path(args.out) / folder, Path(args.work) / args.data_name
    args.plan, args.rows = args.out / "plan.json", args.out / "rows.csv"
    say_plan(args)
    if args.dry:
        return
    about = {
        "minutes": args.minutes,
        "pretrain_minutes": args.pretrain_minutes,
        "data": data.fingerprint(train),
    }
    plan = (
        read_json(args.plan, ["epochs", "rates", "trials"], "remove it")
        if args.plan.exists()
        else {**about, "epochs": {}, "rates": {}, "trials": {}}
    )
    if other := [k for k in about if plan.get(k) != about[k]]:
        raise UserError(
            f"{args.plan} was made with another {other[0]} ({plan.get(other[0])}); give another --out"
        )
    torch.set_num_threads(args.threads)
    convnets.in_stages()
    pilot(args, plan)
    tune(args, plan)
    final(args, plan)
    write_table(args)
    print(f"wrote    {args.out}/rows.csv, table.md, table.json, table.png")


if __name__ == "__main__":
    cli(main)
