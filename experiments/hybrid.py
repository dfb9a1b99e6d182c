"""Drawn or photographed: what do proxy masks bring? All arms of segment.py, several seeds each, in one table.

    python -m experiments.hybrid runs/NAME --data datasets/hybrid --seeds 5 --out results/hybrid
    python -m experiments.hybrid --cues --data datasets/hybrid --out results/hybrid
    python -m experiments.hybrid runs/NAME-seg --composites --out results/hybrid

Reads:  what segment.py reads; its runs under --work, which are made if they are not there
Writes: OUT/arms.csv, a row a run with the command that makes it again; arms.md, arms.png; with
--cues OUT/cues.md: how
        well colours alone and noise alone tell frames of one kind apart, which should be little
        better than chance;
        with --composites OUT/composites.png: drawings that no run saw laid on photographs of val
        and test

Arms that differ in stage 3 alone share stage 1 of a seed.
"""

import shlex
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

import data
import segment
from common import metrics, plots, stats
from common.command import Parser, at_least, cli, command, refuse_file
from common.io import UserError, save_text
from common.train import commit
from experiments.arms import add_flags, answers, by_arm, cell, plot_seeds, run_all
from experiments.tables import read_csv
from ingest import hybrid, toon

ARMS = {  # flags of segment.py, and what they say
    "proxies": ("", "proxy masks and frames of one kind: the method"),
    "frames": ("--learn-from frames", "frames of one kind alone"),
    "truth": ("--learn-from truth", "true masks: fully supervised, a control"),
    "no_hint": ("--network unet:hint=0", "the U-Net is not shown what patches say"),
    "segformer": ("--network segformer", "a SegFormer in the place of a U-Net"),
}
OWN = ("proxies",)  # arms with a stage 1 of their own
PARTS = {
    "frames": ("frames", "val"),
    "proxy": ("proxies", "val_known", "mixed", "miou"),
    "proxy_half": ("proxies", "val", "mixed", "miou"),
    "miou": ("pixels", "val", "mixed", "miou"),
    "known": ("pixels", "val_known", "mixed", "miou"),
    "iou_drawn": ("pixels", "val", "mixed", "iou_drawn"),
    "purely": ("pixels", "val", "purely", "miou"),
    "seconds": ("frames", "seconds"),
    "pixel_seconds": ("pixel_seconds",),
}  # where metrics.json has them
HEADINGS = {
    "frames": "frames named rightly",
    "proxy_half": "proxies, threshold .5",
    "proxy": "proxies, mean IoU",
    "miou": "mean IoU, mixed",
    "known": "and own thresholds",
    "purely": "mean IoU, purely hybrid",
}
QUESTIONS = (
    (("proxies", "miou"), ("frames", "miou"), "proxies against frames of one kind alone"),
    (("proxies", "purely"), ("frames", "purely"), "the same on purely hybrid frames"),
    (("proxies", "miou"), ("truth", "miou"), "proxies against true masks"),
    (("proxies", "miou"), ("proxies", "proxy_half"), "pixels against patches, threshold .5"),
    (
        ("proxies", "known"),
        ("proxies", "proxy"),
        "pixels against the proxies that taught them, own thresholds",
    ),
    (
        ("proxies", "proxy"),
        ("proxies", "proxy_half"),
        "proxies by each frame's threshold against .5",
    ),
    (
        ("proxies", "miou"),
        ("no_hint", "miou"),
        "a U-Net shown what patches say against one that is not",
    ),
    (("proxies", "miou"), ("segformer", "miou"), "U-Net against SegFormer"),
)


def words_of(args, arm, seed, more=()):
    """A run's folder, and what a user would type behind `python` to make it."""
    place = Path(args.work) / Path(args.data).name
    words = [*shlex.split(ARMS[arm][0]), *map(str, more)]
    words += [] if arm in OWN else ["--patches", str(place / f"proxies-s{seed}")]
    out = place / f"{arm}-s{seed}"
    return out, [
        "segment.py",
        args.encoder,
        "--data",
        args.data,
        "--seed",
        str(seed),
        *words,
        *shlex.split(args.flags),
        "--out",
        str(out),
    ]


def value_at(found, path):
    for key in path:
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return "" if found == {} else found


def row_of(args, found):
    row = {column: value_at(found, path) for column, path in PARTS.items()}
    return row | {k: found[k] for k in ("machine", "commit")}


def said(row):
    return ", ".join(
        f"{HEADINGS[k]} {row[k]:.1f}" for k in ("proxy", "miou", "purely") if row[k] != ""
    )


def write_table(args, rows):
    """OUT/arms.md and arms.png of the rows that are there."""
    arms = by_arm(rows, ARMS)
    title = f"Arms of segment.py on {Path(args.data).name}, val; mean ± std over seeds, in percent"
    lines = [
        f"# {title}",
        "",
        "| arm | seeds | " + " | ".join(HEADINGS.values()) + " | minutes |",
        "|---" * (len(HEADINGS) + 3) + "|",
    ]
    for arm, seeds in arms.items():
        took = [
            (float(r["pixel_seconds"]) + (float(r["seconds"]) if arm in OWN else 0)) / 60
            for r in seeds.values()
        ]
        cells = [cell(seeds, column) for column in HEADINGS]
        minutes = stats.mean_std(took)["mean"]
        lines.append(
            f"| `{arm}`: {ARMS[arm][1]} | {len(seeds)} | "
            + " | ".join(cells)
            + f" | {minutes:.1f} |"
        )
    lines += ["", "Pixels are counted over all frames together."]
    lines += [
        "",
        "| difference, points | mean (95 % t interval over paired seeds) |",
        "|---|---|",
        *answers(arms, QUESTIONS),
        "",
        "![Mean IoU by arm](arms.png)",
        "",
    ]
    save_text("\n".join(lines), Path(args.out) / "arms.md")
    draw(Path(args.out) / "arms.png", arms, f"Drawn or photographed: {Path(args.data).name}, val")


def draw(path, arms, title):
    """Mean IoU of each arm on mixed and on purely hybrid frames: dots are seeds."""
    with plots.panels(path, title, 1, 1, (9.6, 3.8)) as axis:
        plot_seeds(
            axis,
            arms,
            (
                ("miou", plots.BLUE, "o", "mixed frames"),
                ("purely", plots.ORANGE, "s", "purely hybrid frames"),
            ),
        )
        plots.percent(axis)
        axis.set(ylabel="mean IoU, %")
        axis.legend()


# ---- do colours or noise give a frame away? ------------------------------------------------------


def colours(images):
    """Mean and covariance of the colours of each frame u8 (n, S, S, 3) -> (n, 9)."""
    x = images.reshape(len(images), -1, 3).astype(np.float64)
    return np.concatenate([x.mean(1), [np.cov(one.T)[np.triu_indices(3)] / 100 for one in x]], 1)


def histograms(images, bins=4):
    """Square roots of the shares of bins^3 colours -> (n, bins^3)."""
    place = (images.reshape(len(images), -1, 3) // (256 // bins)).astype(np.int64) @ [
        bins**2,
        bins,
        1,
    ]
    return np.sqrt([np.bincount(one, minlength=bins**3) / len(one) for one in place])


def noise(images, side=8, quiet=0.05):
    """What is left of the most even squares of each frame when its neighbours' mean is taken away -> (n, 8): how much,
    how it hangs together, how often it is extreme, how much of it is colour, and how large it is at JPEG's borders."""
    x = images.astype(np.float32)
    gray = x @ np.float32(data.LUMA)
    left = residual(gray)
    squares = tiles(left, side)  # (n, m, side, side)
    rank = squares.std((2, 3)).argsort(1)[:, : max(1, int(quiet * squares.shape[1]))]
    even = np.take_along_axis(squares, rank[..., None, None], 1)
    std = even.std((1, 2, 3)) + 0.1
    near = [(even[..., k:] * even[..., :-k]).mean((1, 2, 3)) / std**2 for k in (1, 2)]
    near += [(even[:, :, 1:] * even[:, :, :-1]).mean((1, 2, 3)) / std**2]
    hue = [
        np.take_along_axis(tiles(residual(x[..., c] - gray), side), rank[..., None, None], 1).std(
            (1, 2, 3)
        )
        for c in (0, 2)
    ]
    jpeg = np.abs(even[..., [0, -1]]).mean((1, 2, 3)) / (
        np.abs(even[..., 1:-1]).mean((1, 2, 3)) + 0.1
    )
    return np.stack(
        [
            np.log(std),
            *near,
            (even**4).mean((1, 2, 3)) / std**4,
            *np.log(np.array(hue) + 0.1),
            jpeg,
        ],
        1,
    )


def residual(x):
    """(n, H, W) minus the mean of its four neighbours."""
    return x - (np.roll(x, 1, 1) + np.roll(x, -1, 1) + np.roll(x, 1, 2) + np.roll(x, -1, 2)) / 4


def tiles(x, side):
    """(n, H, W) -> (n, H/side * W/side, side, side)."""
    n, H, W = x.shape
    x = x[:, : H // side * side, : W // side * side].reshape(n, H // side, side, W // side, side)
    return x.transpose(0, 1, 3, 2, 4).reshape(n, -1, side, side)


def cues(args):
    """OUT/cues.md: frames of one kind, named by logistic regression and by boosted trees from each
    cue alone.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = {name: plain_frames(data.open_split(args.data, name)) for name in ("train", "val")}
    lines = [
        "# What gives a frame away?",
        "",
        f"`{command()}`, commit {commit()}. Frames of one kind, val, named "
        f"rightly, in percent; chance is {100 * max(m := sets['val'][1].mean(), 1 - m):.0f}.",
        "",
        "| from | logistic regression | boosted trees |",
        "|---|---|---|",
    ]

    def thumbnails(x):
        return metrics.thumbnails(torch.from_numpy(x), 16).numpy()

    for name, cue in (
        ("mean and covariance of colours", colours),
        ("histogram of 64 colours", histograms),
        ("noise of the most even squares", noise),
        ("thumbnail of 16 px", thumbnails),
    ):
        x, held = (cue(sets[split][0]) for split in ("train", "val"))
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        models = linear, HistGradientBoostingClassifier()
        scores = [100 * m.fit(x, sets["train"][1]).score(held, sets["val"][1]) for m in models]
        lines.append(f"| {name} | " + " | ".join(f"{s:.1f}" for s in scores) + " |")
        print(lines[-1], flush=True)
    save_text("\n".join(lines) + "\n", Path(args.out) / "cues.md")


def plain_frames(split):
    """-> images u8 (n, S, S, 3) and is each drawn? (n,) of frames of one kind."""
    names = np.array(split["header"]["classes"])[split["labels"].numpy()]
    rows = np.nonzero(np.isin(names, segment.KINDS))[0]
    return np.array(split["images"][rows]), names[rows] == "drawn"


# ---- composites by hand --------------------------------------------------------------------------


def composites(args, side=384):
    """OUT/composites.png: two drawings on each photograph of val and test, without grain or JPEG,
    and their masks.
    """
    net, header = segment.load(args.encoder)
    photos, rows, scores = (
        [p for split in ("val", "test") for p in hybrid.open_photos(split)],
        [],
        [],
    )
    for k, person in enumerate(toon.cast()[3 : 3 + 2 * len(photos)]):
        figure = toon.draw(toon.unseen(person, 1, seed=k)[0], side)
        true, photo = (
            figure["fg"][..., None] / 255,
            np.array(ImageOps.fit(photos[k // 2], (side, side))),
        )
        picture = np.uint8(true * figure["image"] + (1 - true) * photo + 0.5)
        said = segment.mask_of(net, picture, header["image_size"], nullcontext, mixed=True) > 0.5
        said, true = (torch.from_numpy(x)[None] for x in (said, figure["fg"] > 127))
        scores.append(segment.judge_masks([(said, true)])["miou"])
        rows.append((picture, segment.overlay(torch.from_numpy(picture)[None], said)[0].numpy()))
    print(
        "mean IoU "
        + " ".join(f"{score:.0f}" for score in scores)
        + f"; mean {np.mean(scores):.1f} %"
    )
    title = f"Drawings on photographs that no run saw, --mixed: what counts as photographed, in orange; {commit()}"
    lines = zip(("picture", "mask"), zip(*rows, strict=True), strict=True)
    plots.image_grid(
        Path(args.out) / "composites.png",
        title,
        list(lines),
        [f"{score:.0f} %" for score in scores],
    )


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help="as for segment.py")
    add(
        "--data",
        default="datasets/hybrid",
        metavar="DIR",
        help="set of frames (default: %(default)s)",
    )
    add(
        "--arms",
        nargs="+",
        default=list(ARMS),
        choices=ARMS,
        metavar="ARM",
        help=f"default: {' '.join(ARMS)}",
    )
    add(
        "--seeds",
        type=at_least(1),
        default=5,
        metavar="N",
        help="of each arm, from 100 on (default: 5)",
    )
    add(
        "--cues",
        action="store_true",
        help="how well colours and noise alone tell frames apart, instead",
    )
    add(
        "--composites",
        action="store_true",
        help="ENCODER is a run of segment.py: composites by hand, instead",
    )
    add_flags(add, "segment.py", "runs/hybrid")
    args = parser.parse_args()
    refuse_file(args.out)
    if args.composites and args.encoder:
        return composites(args)
    if not (Path(args.data) / "train.safetensors").exists():
        raise UserError(f"{args.data} is no packed set; python data.py hybrid makes one")
    if args.cues:
        return cues(args)
    if not args.encoder:
        raise UserError("an encoder is missing: runs/NAME of pretrain.py")
    path, seeds = Path(args.out) / "arms.csv", range(100, 100 + args.seeds)
    for arms in (
        [a for a in args.arms if a in OWN],
        [a for a in args.arms if a not in OWN],
    ):  # proxies come first
        run_all(
            args, [(arm, seed, ()) for seed in seeds for arm in arms], path, words_of, row_of, said
        )
    write_table(args, read_csv(path))
    print(f"wrote    {args.out}/arms.csv, arms.md, arms.png")


if __name__ == "__main__":
    cli(main)
