"""What do tags bring, and can they be done without? All arms of tags.py, several seeds each, in one table.

    python -m experiments.mfdn runs/NAME --data datasets/toon --seeds 5 --out results/tags
    # on dev
    python -m experiments.mfdn runs/NAME --data datasets/toon --rates 5e-4 1e-3 2e-3 --out \\
        results/tags

Reads:  what tags.py reads; its runs under --work, which are made if they are not there
Writes: OUT/arms.csv, a row a run with the command that makes it again; arms.md, arms.png; with
--rates OUT/rates.csv

Every arm has the same pictures, crops, epochs and batches for a seed, so that differences are
paired.
"""

import shlex
from argparse import RawTextHelpFormatter
from pathlib import Path
from statistics import fmean

from common import plots, stats
from common.command import Parser, at_least, between, cli, refuse_file
from common.io import UserError, save_text
from experiments.arms import add_flags, answers, by_arm, cell, plot_seeds, run_all
from experiments.tables import read_csv
from tags import ARMS

PARTS = {
    "half_with": ("half", "with_top1"),
    "half_without": ("half", "without_top1"),
    "with": ("end", "with_top1"),
    "without": ("end", "without_top1"),
    "map": ("tags", "map"),
    "micro_f1": ("tags", "micro_f1"),
    "macro_f1": ("tags", "macro_f1"),
    "error_top": ("tags", "error_top"),
    "error": ("tags", "error"),
    "true_map": ("tags_truth", "map"),
    "true_micro_f1": ("tags_truth", "micro_f1"),
    "true_macro_f1": ("tags_truth", "macro_f1"),
    "true_error_top": ("tags_truth", "error_top"),
    "true_error": ("tags_truth", "error"),
}  # columns, and where metrics.json has them
DEV = {"with": ("dev", "with_top1"), "without": ("dev", "without_top1"), "map": ("dev", "map")}
HEADINGS = {
    "half_with": "with tags, at the half",
    "with": "with tags",
    "half_without": "picture alone, at the half",
    "without": "picture alone",
    "map": "mAP of tags",
    "micro_f1": "F1, micro",
    "macro_f1": "F1, macro",
    "error_top": "error, top 25",
    "error": "error",
}
QUESTIONS = (  # (arm, column), (arm, column), what their difference says
    (
        ("mfdn", "without"),
        ("image", "without"),
        "full MFDN on the picture alone against the image-only ViT",
    ),
    (
        ("vilt", "without"),
        ("vilt", "with"),
        "without hidden tags: what is lost on the picture alone",
    ),
    (
        ("mfdn", "without"),
        ("mfdn", "with"),
        "with the curriculum: what is lost on the picture alone",
    ),
    (
        ("mfdn", "without"),
        ("vilt", "without"),
        "the curriculum against no hidden tags, on the picture alone",
    ),
    (
        ("mfdn", "without"),
        ("fixed", "without"),
        "the curriculum against a fixed share, on the picture alone",
    ),
    (("mfdn", "with"), ("tags", "with"), "picture and tags against the tags alone"),
    (
        ("mfdn", "map"),
        ("bce", "map"),
        "tags: MFDN against a linear head on the frozen encoder, mAP",
    ),
    (("mfdn", "map"), ("l2l", "map"), "tags: MFDN against a query for each tag, mAP"),
    (("mfdn", "micro_f1"), ("bce", "micro_f1"), "the same in F1, micro, against the linear head"),
    (("mfdn", "macro_f1"), ("bce", "macro_f1"), "the same in F1, macro"),
    (
        ("mfdn", "error_top"),
        ("l2l", "error_top"),
        "the same in error on the top 25 tags, against a query for each",
    ),
    (("mfdn", "error"), ("l2l", "error"), "the same in error on all tags"),
)


def words_of(args, arm, seed, more=()):
    """A run's folder, and what a user would type behind `python` to make it."""
    name = "-".join([arm, *(str(x).strip("-") for x in more), f"s{seed}"])
    out = Path(args.work) / Path(args.data).name / name
    flags = shlex.split(args.flags)
    return out, [
        "tags.py",
        args.encoder,
        "--data",
        args.data,
        "--arm",
        arm,
        "--seed",
        str(seed),
        *map(str, more),
        *flags,
        "--out",
        str(out),
    ]


def row_of(args, found):
    """metrics.json -> columns of a row; of a trial of --rates what it has on dev alone."""
    parts = DEV if args.rates else PARTS
    row = {column: found.get(part, {}).get(key, "") for column, (part, key) in parts.items()}
    return row | {k: found[k] for k in ("parameters", "step_ms", "seconds", "machine", "commit")}


def said(row):
    return ", ".join(
        f"{HEADINGS[k]} {row[k]:.1f}" for k in ("with", "without", "map") if row[k] != ""
    )


def best_rate(path, arm):
    """The flags with which --rates found this arm best on dev: by characters on the picture alone, those with tags
    where it sees none, tags where it names nothing else; none where it was not tried."""
    key, tried = {"tags": "with", "bce": "map"}.get(arm, "without"), {}
    for row in (row for row in read_csv(path) if row["arm"] == arm):
        tried.setdefault(row["flags"], []).append(float(row[key]))
    return tuple(max(tried, key=lambda flags: fmean(tried[flags])).split()) if tried else ()


# ---- the table -----------------------------------------------------------------------------------


def column_of(rows, name):
    """What is known of tags: against the truth where the set knows it, else as pictures are filed."""
    return f"true_{name}" if any(r.get(f"true_{name}") for r in rows) else name


def questions(rows):
    """QUESTIONS with the columns that these rows have."""
    return [
        ((a, column_of(rows, x)), (b, column_of(rows, y)), text)
        for (a, x), (b, y), text in QUESTIONS
    ]


def write_table(args, rows):
    """OUT/arms.md and arms.png of the rows that are there."""
    arms, truth = by_arm(rows, ARMS), any(r["true_map"] for r in rows)
    columns = [column_of(rows, k) for k in HEADINGS]
    title = f"Arms of tags.py on {Path(args.data).name}, val; mean ± std over seeds, in percent"
    lines = [
        f"# {title}",
        "",
        "| arm | seeds | " + " | ".join(HEADINGS.values()) + " | minutes |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for arm, seeds in arms.items():
        minutes = stats.mean_std([float(r["seconds"]) / 60 for r in seeds.values()])["mean"]
        cells = [cell(seeds, column) for column in columns]
        lines.append(
            f"| `{arm}`: {ARMS[arm]} | {len(seeds)} | " + " | ".join(cells) + f" | {minutes:.1f} |"
        )
    against = "all the tags that are true" if truth else "the tags that pictures are filed under"
    lines += [
        "",
        f"Top-1 of characters. Tags are judged against {against}, from the picture alone; error: wrong among "
        "all yes and no. Thresholds of tags are from dev. `vilt` has seen pictures without tags in training: "
        "those that are filed under nothing.",
        "",
        "| difference, points | mean (95 % t interval over paired seeds) |",
        "|---|---|",
        *answers(arms, questions(rows)),
        "",
        "![Top-1 by arm](arms.png)",
        "",
    ]
    save_text("\n".join(lines), Path(args.out) / "arms.md")
    draw(Path(args.out) / "arms.png", arms, f"What tags bring: {Path(args.data).name}, val")


def draw(path, arms, title):
    """Top-1 of each arm, with tags and on the picture alone, at the half and at the end: dots are
    seeds.
    """
    arms = {
        arm: seeds
        for arm, seeds in arms.items()
        if any(r["with"] or r["without"] for r in seeds.values())
    }
    with plots.panels(path, title, 1, 2, (9.6, 3.8), sharey=True) as axes:
        for axis, when in zip(axes, ("half_", ""), strict=True):
            plot_seeds(
                axis,
                arms,
                (
                    (f"{when}with", plots.ORANGE, "s", "picture and tags"),
                    (f"{when}without", plots.BLUE, "o", "picture alone"),
                ),
            )
            axis.set(title="at the half of the run" if when else "at its end")
        plots.percent(axes[0])
        axes[0].set(ylabel="characters, Top-1, %")
        axes[0].legend()


def main():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=RawTextHelpFormatter)
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="as for tags.py")
    add(
        "--data",
        default="datasets/toon",
        metavar="DIR",
        help="set with labels and tags (default: %(default)s)",
    )
    add(
        "--arms",
        nargs="+",
        default=list(ARMS),
        choices=ARMS,
        metavar="ARM",
        help="default: all",
    )
    add(
        "--seeds",
        type=at_least(1),
        metavar="N",
        help="of each arm, from 100 on (default: 5); of a rate, from 500 (1)",
    )
    add(
        "--rates",
        type=between(1e-6, 1),
        nargs="+",
        default=[],
        metavar="LR",
        help="try these learning rates on dev instead; of --arm bce, of its head",
    )
    add_flags(add, "tags.py", "runs/mfdn")
    args = parser.parse_args()
    refuse_file(args.out)
    if not (Path(args.data) / "train.safetensors").exists():
        raise UserError(f"{args.data} is no packed set; python data.py toon draws one with tags")
    if args.rates:
        seeds = range(500, 500 + (args.seeds or 1))
        jobs = [
            (arm, seed, ("--lr", lr)) for seed in seeds for lr in args.rates for arm in args.arms
        ]
        return run_all(args, jobs, Path(args.out) / "rates.csv", words_of, row_of, said)
    path = Path(args.out) / "arms.csv"
    rates = {arm: best_rate(Path(args.out) / "rates.csv", arm) for arm in args.arms}
    jobs = [
        (arm, seed, rates[arm]) for seed in range(100, 100 + (args.seeds or 5)) for arm in args.arms
    ]
    run_all(args, jobs, path, words_of, row_of, said)
    write_table(args, read_csv(path))
    print(f"wrote    {args.out}/arms.csv, arms.md, arms.png")


if __name__ == "__main__":
    cli(main)
