"""What breaks it? A probe trained on clean features looks at spoiled pictures; the decoder is asked for hidden pixels.

    # on the data that the run was trained on
    python -m experiments.stress runs/NAME
    # only PSNR by ratio, as the mid-term report's table
    python -m experiments.stress runs/NAME --midterm
    # only Top-1 under this, at its headline level
    python -m experiments.stress runs/NAME --only cutout

Reads:  runs/NAME (model.safetensors, state.pt), datasets/NAME
Writes: runs/NAME/ stress.json, robustness.png, parts.png (where the parts are known),
reconstruction.png; with --only
        stress-cutout.json alone; of other data than the run's own, or of another split than val,
        into
        runs/NAME/DATANAME-SPLIT/
"""

import itertools
import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch

import data
import mask as masking
from common import features, guidance, metrics, stats
from common.checkpoints import about_model, load_encoder, load_exactly
from common.command import Parser, at_least, claim, cli, command, progress, refuse_idle
from common.evaluate import masked_mse, predict
from common.io import UserError, save_json
from common.train import commit, load_state, machine, seeded
from demo import psnr
from experiments.corruptions import SWEEPS, moved, paint
from kernels.loss import FLOOR, patch_detail
from model import MAE, put_patches, to_pixels

RATIOS = (0.25, 0.5, 0.75, 0.9)
RESOLUTIONS = (64, 96, 128, 192, 224, 320, 448)
NO_RAMP = dict.fromkeys(
    ("attn_high", "attn_low", "attn_hint"), {"start": 0, "ramp_for": 0}
)  # the run is over
GOOD, MODERATE = 18, 10  # dB, of the mid-term report


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="run folder of pretrain.py")
    add("--data", metavar="DIR", help="packed set (default: what the run was trained on)")
    add("--split", default="val", choices=["val", "dev", "test"], help="split that is looked at")
    add(
        "--images",
        type=at_least(8),
        default=512,
        metavar="N",
        help="at most so many of it, evenly spread",
    )
    add(
        "--pool",
        default="mean",
        choices=features.POOLS,
        help="pooling of the tokens that the probe sees",
    )
    add(
        "--only",
        metavar="NAMES",
        help=f"only Top-1 under these of {', '.join(SWEEPS)}, comma between",
    )
    add(
        "--midterm",
        action="store_true",
        help="only PSNR and SSIM by ratio under random masks, graded; writes nothing",
    )
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    args = parser.parse_args()
    if args.midterm:
        idle = args.given & {"only", "pool"}
        refuse_idle(idle, "with --midterm, which looks at predicted pixels alone")
    if Path(args.run).is_file():
        raise UserError(
            f"{args.run} is a file; experiments.stress wants the folder of a run, runs/NAME"
        )
    if unknown := set((args.only or "cutout").split(",")) - set(SWEEPS):
        raise UserError(f"--only {', '.join(unknown)} is unknown; there are: {', '.join(SWEEPS)}")
    return args


def open_task(args):
    """features.open_task, with the encoder, and in task.rows the images that are shown to it."""
    encoder, size = load_encoder(args.run)
    task = features.open_task(args, args.run)
    task.run, task.size, task.encoder = (
        Path(args.run),
        size,
        encoder.to(task.device).requires_grad_(False),
    )
    task.rows = data.evenly_spaced(len(task.split["images"]), args.images)
    task.out = features.results_folder(args.run, task.folder, args.split)
    return task


# ---- robustness of the probe: spoil(images u8 (B, S, S, 3), rows (B)) -> what the encoder sees of


def fit_probe(task):
    """The headline of probe.py, logistic regression on clean train features: task.scores(features
    (n, D)) -> (n, C).
    """
    found = features.of_encoder(task.encoder, task.size, task)[task.args.pool]
    fit, choose, where = features.hold_out(task.splits)
    labels = {name: split["labels"] for name, split in task.splits.items()}
    task.scores, _ = metrics.logistic_probe(
        found["train"][fit],
        labels["train"][fit],
        found[where][choose],
        labels[where][choose],
        len(task.train["header"]["classes"]),
    )


@torch.no_grad()
def right_of(task, spoil=None, rows=None, encoder=None, size=None, chunk=data.CHUNK):
    """(n,) bool: which of the images, spoiled or as they are, the clean probe names rightly."""
    encoder, size, found = encoder or task.encoder, size or task.size, []
    rows = task.rows if rows is None else rows
    for some in rows.split(chunk):
        images = data.take(task.split["images"], some, task.device)
        view = data.view_images(
            spoil(images, some) if spoil else images, *data.full_boxes(len(some)), size
        )
        with task.autocast():
            found.append(features.pooled(encoder, view)[task.args.pool].half().cpu())
    return task.scores(torch.cat(found)).argmax(1) == task.split["labels"][rows]


def percent(right):
    return 100 * right.double().mean().item()


def corrupted(name, level):
    """-> spoil, at this level of a sweep; each level draws its own random numbers."""
    function, levels, _, _ = SWEEPS[name]
    generator = seeded(0, levels.index(level))
    return lambda images, rows: function(images, level, generator)


def hidden_part(task, k, generator=None):
    """-> spoil: part k is painted gray; with a generator the same shape elsewhere is, as control."""

    def spoil(images, rows):
        where = torch.from_numpy(task.split["parts"][rows.numpy()] == k)
        return paint(images, moved(where, generator) if generator else where)

    return spoil


def robustness(task):
    """Top-1 under every level of every corruption: {name: {level: percent}}."""
    return {
        name: {str(level): percent(right_of(task, corrupted(name, level))) for level in levels}
        for name, (_, levels, *_) in progress(SWEEPS.items(), "robustness", leave=False)
    }


def without_parts(task):
    """By which part does it recognise? Each but the background painted gray, and as control the
    same shape elsewhere.

    -> {part: {"area", "hidden", "control"}}: share of the picture, Top-1 without the part, Top-1
    without the control.
    """
    result, parts = {}, torch.from_numpy(task.split["parts"][task.rows.numpy()])
    for k, name in progress(
        list(enumerate(task.split["header"]["parts"]))[1:], "parts", leave=False
    ):
        hidden, control = (right_of(task, hidden_part(task, k, g)) for g in (None, seeded(0, k)))
        area = (parts == k).float().mean((1, 2)).mean().item()
        result[name] = {"area": area, "hidden": percent(hidden), "control": percent(control)}
    return result


def in_styles(split, rows):
    """Rows (n,) of a split -> {"palette: vivid": (n,) bool}: which are drawn so; {} without styles."""
    found = {}
    for column, (stratum, values) in enumerate((split["header"].get("style") or {}).items()):
        drawn = torch.from_numpy(np.asarray(split["style"])[rows, column])
        found |= {f"{stratum}: {value}": drawn == i for i, value in enumerate(values)}
    return found


def by_style(task, right):
    """Top-1 and number of images of each value of each of the demo set's strata, on clean pictures."""
    found = {name: right[here] for name, here in in_styles(task.split, task.rows).items()}
    return {
        name: {"top1": percent(x) if len(x) else None, "images": len(x)}
        for name, x in found.items()
    }


def by_resolution(task, clean):
    """Views of 64 to 448 px, positions resized: Top-1, that at the trained size on the same images,
    images a second.

    Attention's memory and time grow with the fourth power of the side: fewer images (at least 48)
    in smaller chunks.
    """
    result = []
    sides = [s for s in RESOLUTIONS if s % task.encoder.patch_size == 0]
    for side in progress(sides, "resolutions", leave=False):
        encoder = load_encoder(task.run, side)[0].to(task.device).requires_grad_(False)
        some = data.evenly_spaced(len(clean), max(48, int(len(clean) * (task.size / side) ** 2)))
        chunk = max(1, math.floor(data.CHUNK * min(1, (task.size / side) ** 4)))
        start_time = time.perf_counter()
        right = right_of(task, None, task.rows[some], encoder, side, chunk)
        speed = len(some) / (time.perf_counter() - start_time)
        result.append(
            {
                "side": side,
                "top1": percent(right),
                "top1_trained_size": percent(clean[some]),
                "images": len(some),
                "images_per_s": round(speed, 1),
            }
        )
    return result


def stress_probe(task):
    """Everything about the probe: a part of the report."""
    clean, most_frequent = right_of(task), torch.bincount(task.train["labels"]).argmax()
    chance = percent(task.split["labels"][task.rows] == most_frequent)
    report = {
        "clean": percent(clean),
        "chance": chance,
        "pool": task.args.pool,
        "robustness": robustness(task),
        "resolution": by_resolution(task, clean),
    }
    if "parts" in task.split:
        report["parts"] = without_parts(task)
    if "style" in task.split:
        report["style"] = by_style(task, clean)
    return report


def stress_some(task):
    """--only: the few numbers that a study needs of every run, with each image's right or wrong."""
    levels = {name: SWEEPS[name][3] for name in task.args.only.split(",")}
    right = {
        f"{name} {level}": right_of(task, corrupted(name, level))
        for name, level in progress(levels.items(), "robustness", leave=False)
    }
    print("\n".join(f"Top-1 under {name}: {percent(x):.1f} %" for name, x in right.items()))
    return {
        "top1": {k: percent(x) for k, x in right.items()},
        "right": {k: stats.to_bits(x) for k, x in right.items()},
    }


# ---- reconstruction ------------------------------------------------------------------------------


def load_mae(run, device):
    """The whole network with its picture head, from state.pt, and how its targets are normalised."""
    path = Path(run) / "state.pt"
    if not path.exists():
        raise UserError(
            f"{run} has no state.pt: pictures need the head that predicts each patch's statistics, "
            "which model.safetensors leaves out"
        )
    state = load_state(path)
    if "decoder.decoder_pos_embed" not in state["model"]:
        raise UserError(f"{run} is no MAE (SimMIM has no decoder): nothing to reconstruct by ratio")
    model, flags = MAE(**about_model(run)["config"]), state["config"]
    load_exactly(
        model, {k: w for k, w in state["model"].items() if not k.startswith("encoder.pooler")}, path
    )
    norm = {
        "norm_pix": not flags.get("no_norm_pix", False),
        "floor": flags.get("norm_floor", FLOOR),
    }
    return model.to(device).eval(), norm


def patches_of(model, split, rows, view):
    """What strategies need of these views, as far as it is known: the dict `patches` of mask.py."""
    _, ids = model.encoder.all_patches(view)
    maps, where = {}, (rows, *data.full_boxes(len(rows)), model.encoder.side)
    if "fg" in split:
        maps["fg"] = guidance.crop_map(split["fg"], *where)
    if "parts" in split:
        count = len(split["header"].get("parts", ()))
        maps["parts"] = guidance.crop_parts(split["parts"], *where, count)
    maps = {need: score.to(view.device) for need, score in maps.items()}
    attention = model.encoder.patch_attention(view).float().mean(1)
    return maps | {"attn": attention, "detail": patch_detail(view, ids, model.config["patch_size"])}


def hidden_pixels(ids_mask, side, S):
    """ids_mask (B, M) -> (B, S, S) bool."""
    grid = torch.zeros(
        len(ids_mask), side * side, dtype=torch.bool, device=ids_mask.device
    ).scatter_(1, ids_mask, True)
    return (
        grid.unflatten(1, (side, side))
        .repeat_interleave(S // side, 1)
        .repeat_interleave(S // side, 2)
    )


def flat_guess(view, where):
    """The control: hidden pixels get the mean colour of the visible ones of the same picture."""
    seen = ~where[..., None]
    colour = (view.float() * seen).sum((1, 2), keepdim=True) / seen.sum((1, 2), keepdim=True)
    return torch.where(seen, view, colour.round().to(torch.uint8))


def ssim_map(a, b):
    """Structural similarity of u8 pictures a, b (n, S, S, 3) at every pixel, mean over colours: (n,
    S, S).

    Wang et al. 2004: an 11 x 11 Gaussian window of std 1.5, K1 .01, K2 .03, population covariance;
    mirrored borders.
    """
    from scipy.ndimage import gaussian_filter

    a, b = a.double().cpu(), b.double().cpu()

    def blur(p):
        return torch.from_numpy(gaussian_filter(p.numpy(), (0, 1.5, 1.5, 0), truncate=3.5))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = (
        blur(a * a) - mean_a**2,
        blur(b * b) - mean_b**2,
        blur(a * b) - mean_a * mean_b,
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(3)


@torch.no_grad()
def reconstruct(model, view, patches, strategy, ratio, noise, norm, autocast):
    """-> (view with its hidden patches predicted, u8 (B, S, S, 3); where they are (B, S, S)).

    norm_pix is undone with predicted statistics only: the true ones would leak the answer.
    """
    N = model.encoder.side**2
    K = masking.kept(N, ratio)
    priority = masking.STRATEGIES[strategy](patches, noise, 1.0, N - K, **NO_RAMP.get(strategy, {}))
    ids_keep, ids_mask = masking.sample(priority, K)
    pred, patch_stats = predict(model, view, ids_keep, ids_mask, autocast, norm["floor"])
    pixels = to_pixels(pred, patch_stats if norm["norm_pix"] else None)
    return put_patches(view, ids_mask, pixels), hidden_pixels(
        ids_mask, model.encoder.side, view.shape[1]
    )


def pixel_scores(view, pasted, where, foreground):
    """(B,) each: PSNR and SSIM on hidden pixels: all, foreground, background where known, and of
    the flat guess.
    """
    similarity, regions = ssim_map(pasted, view), {"": where}
    if foreground is not None:
        regions |= {"_figure": where & foreground, "_ground": where & ~foreground}
    scores = {"psnr_flat": psnr(flat_guess(view, where), view, where)}
    for name, here in regions.items():
        scores[f"psnr{name}"] = psnr(pasted, view, here)
        scores[f"ssim{name}"] = (similarity * here).sum((1, 2)) / here.sum((1, 2))
    return scores


@torch.no_grad()
def reconstruction(model, norm, task, strategies=None):
    """[{"strategy", "ratio", "psnr", "ssim", "psnr_figure", ...}]: means over images, dB and [0,
    1].
    """
    split, S, N, total = task.split, model.config["image_size"], model.encoder.side**2, {}
    views = data.whole_views(split["images"], task.rows, S, task.device)
    for rows, view in progress(views, "pixels", leave=False):
        patches, foreground = patches_of(model, split, rows, view), None
        noise = torch.cat([masking.gumbel_noise(1, N, seeded(0, i)) for i in rows.tolist()]).to(
            task.device
        )
        if "fg" in split:
            fg = torch.from_numpy(split["fg"][rows.numpy()])
            foreground = data.view_maps(fg, *data.full_boxes(len(rows)), S) > 127.5
        known = [
            s
            for s in masking.STRATEGIES
            if s != "squares" and masking.NEEDS.get(s) in (None, *patches)
        ]
        for strategy, ratio in itertools.product(strategies or known, RATIOS):
            pasted, where = reconstruct(
                model, view, patches, strategy, ratio, noise, norm, task.autocast
            )
            for name, x in pixel_scores(view.cpu(), pasted.cpu(), where.cpu(), foreground).items():
                total.setdefault((strategy, ratio), {}).setdefault(name, []).append(x)
    return [
        {"strategy": s, "ratio": r} | {name: mean(torch.cat(x)) for name, x in scores.items()}
        for (s, r), scores in total.items()
    ]


def mean(x):
    """Of the images that have such pixels; None if none has."""
    x = x[x.isfinite()]
    return x.mean().item() if len(x) else None


# ---- tables --------------------------------------------------------------------------------------


def grade(psnr):
    return "good" if psnr > GOOD else "moderate" if psnr >= MODERATE else "poor"


def midterm(rows):
    """The table of the mid-term report: over 18 dB good, 10 to 17 moderate (to 18 here: no gap)."""
    lines = [
        f"{r['ratio']:>5.0%}   {r['psnr']:8.2f}   {r['ssim']:.3f}   {grade(r['psnr']):9} {r['psnr_flat']:11.2f}"
        for r in rows
        if r["strategy"] == "random"
    ]
    return ["hidden   PSNR, dB   SSIM   grade      mean colour, dB", *lines]


def number(x, digits=1):
    return "-" if x is None else f"{x:.{digits}f}"


def robust_lines(report):
    lines = [
        f"{'spoiled by':22} Top-1, %   (clean {report['clean']:.1f}, chance {report['chance']:.1f})"
    ]
    for name, levels in report["robustness"].items():
        cells = "  ".join(f"{level} {x:.1f}" for level, x in levels.items())
        lines.append(f"{name + ', ' + SWEEPS[name][2] if len(levels) > 1 else name:30} {cells}")
    lines += [
        f"without {name:14} {x['hidden']:5.1f}   the same shape elsewhere {x['control']:5.1f}   "
        f"({100 * x['area']:.1f} % of the picture)"
        for name, x in report.get("parts", {}).items()
    ]
    lines += [
        f"{x['side']:4} px {x['top1']:5.1f}   trained size {x['top1_trained_size']:5.1f} on the same "
        f"{x['images']} images   {x['images_per_s']:.0f} images/s"
        for x in report["resolution"]
    ]
    return lines + [
        f"{name:22} {number(x['top1']):>5}   {x['images']} images"
        for name, x in report.get("style", {}).items()
    ]


def pixel_lines(rows):
    columns = {
        "psnr": 9,
        "psnr_figure": 6,
        "psnr_ground": 6,
        "psnr_flat": 12,
        "ssim": 11,
        "ssim_figure": 6,
        "ssim_ground": 6,
    }  # width of each
    lines = [
        f"{'mask':10} {'ratio':>5}   PSNR: all     fg     bg  mean colour   SSIM: all     fg     bg"
    ]
    for r in rows:
        cells = (
            f"{number(r.get(k), 3 if 'ssim' in k else 1):>{width}}" for k, width in columns.items()
        )
        lines.append(f"{r['strategy']:10} {r['ratio']:5.2f}   {' '.join(cells)}")
    return lines


# ---- the command ---------------------------------------------------------------------------------


def names_of(task):
    """The files that this command writes."""
    if task.args.only:
        return [f"stress-{task.args.only.replace(',', '-')}.json"]
    probe = ["robustness.png", *["parts.png"] * ("parts" in task.split)] if task.labelled else []
    return ["stress.json", *probe, "reconstruction.png"]


def check(task):
    """Every mistake before minutes of work."""
    claim([task.out / name for name in names_of(task)])
    if task.args.only and not task.labelled:
        raise UserError(
            f"--only {task.args.only} needs two classes or more, and labels on all images of {task.folder}"
        )


def draw(task, report, names):
    """The pictures of a report."""
    from experiments import stress_figures  # matplotlib takes a second to load

    out, run = task.out, task.run.name
    if "robustness.png" in names:
        stress_figures.robustness(
            out / "robustness.png", report, SWEEPS, f"Robustness of the probe: {run}"
        )
    if "parts.png" in names:
        stress_figures.parts(out / "parts.png", report, f"Recognised by which part? {run}")
    stress_figures.reconstruction(
        out / "reconstruction.png", report["reconstruction"], f"Hidden pixels: {run}"
    )


def main():
    task = open_task(parse_args())
    args, out, names = task.args, task.out, names_of(task)
    if not args.midterm:
        check(task)
    if not args.only:
        model, norm = load_mae(task.run, task.device)
    if args.midterm:
        print("\n".join(midterm(reconstruction(model, norm, task, ["random"]))))
        return
    report = {
        "command": command(),
        "machine": machine(task.device),
        "commit": commit(),
        "run": task.run.name,
        "data": str(task.folder),
        "split": args.split,
        "images": len(task.rows),
    }
    if task.labelled:
        fit_probe(task)
    if args.only:
        save_json(report | stress_some(task), out / names[0])
        print(f"wrote    {out}/{names[0]}")
        return
    if task.labelled:
        report |= stress_probe(task)
        print("\n".join(robust_lines(report)), flush=True)
    else:
        print("no robustness: that needs two classes or more, and labels on all images")
    report["masked_mse"] = masked_mse(model, task.split, norm, task.autocast)
    report["reconstruction"] = reconstruction(model, norm, task)
    print("\n".join(pixel_lines(report["reconstruction"])))
    of = "normalised pixels; pictures by predicted statistics" if norm["norm_pix"] else "raw pixels"
    print(f"masked error under the fixed random mask {report['masked_mse']:.4f} of {of}")
    save_json(report, out / names[0])
    draw(task, report, names)
    print(
        f"wrote    {out}/{', '.join(names)}; python probe.py {shlex.quote(args.run)} has the clean numbers and their "
        "controls"
    )


if __name__ == "__main__":
    cli(main)
