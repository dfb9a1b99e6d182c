"""What breaks it? A probe trained on clean features looks at spoiled pictures; the decoder is asked for hidden pixels.

    python -m experiments.stress runs/NAME                     # on the data that the run was trained on
    python -m experiments.stress runs/NAME --midterm           # only PSNR by ratio, as the mid-term report's table
    python -m experiments.stress runs/NAME --only cutout       # only Top-1 under this, at its headline level

Reads:  runs/NAME (model.safetensors, state.pt; features.safetensors of probe.py, or it is made), datasets/NAME
Writes: runs/NAME/ stress.json, robustness.png, parts.png (where the parts are known), reconstruction.png; with --only
        stress-cutout.json alone
"""

import argparse
import functools
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import mask as masking
from common import corruptions, features, guidance, metrics, plots, stats
from common.checkpoints import load_encoder, load_exactly
from common.evaluate import masked_mse, predict
from common.io import UserError, cli, save_json
from common.train import autocast_of, commit, load_state, machine, pick_device, pick_dtype, seeded
from kernels.loss import FLOOR, patch_detail
from model import MAE, put_patches, to_pixels

RATIOS = (0.25, 0.5, 0.75, 0.9)
RESOLUTIONS = (64, 96, 128, 192, 224, 320, 448)
FINISHED = {"attn_high": dict(start=0, ramp_for=0), "attn_low": dict(start=0, ramp_for=0),
            "attn_hint": dict(start=0, ramp_for=0)}  # the run is over: no ramp  # fmt: skip
GOOD, MODERATE = 18, 10  # dB, of the mid-term report


# ---- robustness of the probe ---------------------------------------------------------------------------------------


def fit_probe(found, splits, held):
    """The headline of probe.py: logistic regression on clean train features -> scores(features (n, D))."""
    train, labels = splits["train"], splits["train"]["labels"]
    rows, _, _ = features.hold_out(splits)
    clean, classes = found["train"][0][rows], len(train["header"]["classes"])
    (x,), y = metrics.standardise(clean), labels[rows]
    W, b = metrics.fit_logistic(x, y, classes, metrics.chosen_strength(x, y, classes, features.groups_of(train)[rows]))
    return lambda new: metrics.standardise(clean, new)[1] @ W + b


class Judge:
    """Top-1 in percent of the clean probe on pictures that were spoiled: an encoder, a probe and the pictures.

    rows: the images of the split that are looked at; pool: which pooling of the tokens.
    """

    def __init__(self, encoder, size, scores, split, rows, pool, autocast):
        self.encoder, self.size, self.scores, self.split, self.rows = encoder, size, scores, split, rows
        self.pool, self.autocast, self.device = pool, autocast, encoder.cls_token.device

    @torch.no_grad()
    def right(self, spoil, rows=None, encoder=None, size=None, chunk=data.CHUNK):
        """(n,) bool: spoil(images u8 (B, S, S, 3), rows) is what the encoder sees of each of these images."""
        encoder, size, found = encoder or self.encoder, size or self.size, []
        rows = self.rows if rows is None else rows
        for part in rows.split(chunk):
            images = spoil(data.take(self.split["images"], part, self.device), part)
            view = data.view_images(images, *data.full_boxes(len(part)), size)
            with self.autocast():
                found.append(features.pooled(encoder, view, False)[self.pool].half().cpu())
        return self.scores(torch.cat(found)).argmax(1) == self.split["labels"][rows]

    def top1(self, spoil, **more):
        return percent(self.right(spoil, **more))


def percent(right):
    return 100 * right.double().mean().item()


def robustness(judge):
    """Top-1 under every level of every corruption: {name: {level: percent}}."""
    result = {}
    for name, (spoil, levels, _, _) in tqdm(corruptions.SWEEPS.items(), "robustness", leave=False, disable=None):
        draws = [seeded(0, i) for i in range(len(levels))]
        result[name] = {}
        for level, draw in zip(levels, draws, strict=True):
            spoiled = functools.partial(spoil, level=level, generator=draw)
            result[name][str(level)] = judge.top1(lambda images, _, spoiled=spoiled: spoiled(images))
    return result


def at_headline(judge, names):
    """Which images stay right under these corruptions, each at its headline level, as in `robustness`: {name: (n,)}."""
    result = {}
    for name in names:
        spoil, levels, _, level = corruptions.SWEEPS[name]
        spoiled = functools.partial(spoil, level=level, generator=seeded(0, levels.index(level)))
        result[f"{name} {level}"] = judge.right(lambda images, _, spoiled=spoiled: spoiled(images))
    return result


def without_parts(judge):
    """Each part painted gray, and as control the same shape elsewhere: which part does it recognise by?

    -> {part: {"area", "hidden", "control"}}: share of the picture, Top-1 without the part, Top-1 without the control.
    """
    names, planes, result = judge.split["header"]["parts"], judge.split["parts"], {}
    for k, name in enumerate(names):
        if k == 0:  # the background
            continue
        draws, area = seeded(0, k), []

        def hide(images, rows, k=k, move=None, area=area):
            where = torch.from_numpy(planes[rows.numpy()] == k)
            area.append(where.float().mean((1, 2)))
            return corruptions.paint(images, where if move is None else corruptions.moved(where, move))

        hidden = judge.top1(hide)
        control = judge.top1(functools.partial(hide, move=draws))
        result[name] = {"area": torch.cat(area).mean().item(), "hidden": hidden, "control": control}
    return result


def by_style(judge, right):
    """Top-1 and number of images of each value of each of the demo set's strata, on clean pictures."""
    style, result = torch.from_numpy(judge.split["style"][judge.rows.numpy()].astype("int64")), {}
    for column, (stratum, values) in enumerate(judge.split["header"]["style"].items()):
        for i, value in enumerate(values):
            here = right[style[:, column] == i]
            result[f"{stratum}: {value}"] = {"top1": percent(here) if len(here) else None, "images": len(here)}
    return result


def by_resolution(judge, run, clean):
    """Views of 64 to 448 px, positions resized: Top-1, that at the trained size on the same images, images a second.

    Fewer images where they are dear (attention grows with the fourth power of the side), but at least 48.
    """
    result, p = [], judge.encoder.patch_size
    for side in (s for s in RESOLUTIONS if s % p == 0):
        encoder, _ = load_encoder(run, side)
        encoder.to(judge.device).requires_grad_(False)
        count = min(len(judge.rows), max(48, int(len(judge.rows) * (judge.size / side) ** 2)))
        some = data.evenly_spaced(len(judge.rows), count)
        start_time = time.perf_counter()
        right = judge.right(lambda images, _: images, rows=judge.rows[some], encoder=encoder, size=side,
                            chunk=features.chunk_for(side, judge.size))  # fmt: skip
        speed = len(some) / (time.perf_counter() - start_time)
        result.append({"side": side, "top1": percent(right), "top1_trained_size": percent(clean[some]),
                       "images": len(some), "images_per_s": round(speed, 1)})  # fmt: skip
    return result


# ---- reconstruction ------------------------------------------------------------------------------------------------


def load_mae(run, device):
    """The whole network with its picture head, from state.pt, and how its targets are normalised."""
    state = load_state(Path(run) / "state.pt") if (Path(run) / "state.pt").exists() else None
    if not state:
        raise UserError(f"{run} has no state.pt: pictures need the head that predicts each patch's statistics, "
                        "which model.safetensors leaves out")  # fmt: skip
    weights, config = state["model"], features.about_model(run)["config"]
    if "decoder.decoder_pos_embed" not in weights:
        raise UserError(f"{run} is no MAE (SimMIM has no decoder): nothing to reconstruct by ratio")
    model = MAE(**config)
    load_exactly(model, weights, Path(run) / "state.pt")
    flags = state["config"]
    norm = {"norm_pix": not flags.get("no_norm_pix", False), "floor": flags.get("norm_floor", FLOOR)}
    return model.to(device).eval(), norm


def known_of(model, split, rows, view):
    """What strategies may want to know of these views, as far as it is known."""
    g, p, device = model.encoder.side, model.config["patch_size"], view.device
    boxes, every = data.full_boxes(len(rows)), model.encoder.all_patches(view)[1]
    known = {"attn": model.encoder.patch_attention(view).float().mean(1), "detail": patch_detail(view, every, p)}
    if "fg" in split:
        known["fg"] = guidance.crop_map("fg", split["fg"], rows, *boxes, g, device)
    if "parts" in split:
        count = len(split["header"]["parts"])
        known["parts"] = guidance.crop_map("parts", split["parts"], rows, *boxes, g, device, count)
    return known


def strategies(known):
    return [s for s in masking.STRATEGIES if s != "simmim" and masking.NEEDS.get(s) in (None, *known)]


def hidden_pixels(ids_mask, side, S):
    """ids_mask (B, M) -> (B, S, S) bool."""
    grid = torch.zeros(len(ids_mask), side * side, dtype=torch.bool, device=ids_mask.device).scatter_(1, ids_mask, True)
    return grid.unflatten(1, (side, side)).repeat_interleave(S // side, 1).repeat_interleave(S // side, 2)


def flat_guess(view, where):
    """The control: hidden pixels get the mean colour of the visible ones of the same picture."""
    seen = ~where[..., None]
    colour = (view.float() * seen).sum((1, 2), keepdim=True) / seen.sum((1, 2), keepdim=True)
    return torch.where(seen, view, colour.round().to(torch.uint8))


@torch.no_grad()
def reconstruct(model, view, known, strategy, ratio, noise, norm, autocast):
    """-> (view with its hidden patches predicted, u8 (B, S, S, 3); where they are (B, S, S)).

    norm_pix is undone with predicted statistics only: the true ones would leak the answer.
    """
    N = model.encoder.side**2
    K = masking.kept(N, ratio)
    own = FINISHED.get(strategy, {})
    priority = masking.STRATEGIES[strategy](known | {"masked": N - K}, noise, 1.0, **own)
    ids_keep, ids_mask = masking.sample(priority, K)
    pred, stats = predict(model, view, ids_keep, ids_mask, autocast, norm["floor"])
    pixels = to_pixels(pred, stats if norm["norm_pix"] else None)
    return put_patches(view, ids_mask, pixels), hidden_pixels(ids_mask, model.encoder.side, view.shape[1])


def scores_of(view, pasted, where, figure):
    """(B,) each: PSNR and SSIM on hidden pixels: all, foreground, background where known, and of the flat guess."""
    similar, regions = metrics.ssim_map(pasted, view), {"": where}
    if figure is not None:
        regions |= {"_figure": where & figure, "_ground": where & ~figure}
    found = {"psnr_flat": metrics.psnr(flat_guess(view, where), view, where)}
    for name, here in regions.items():
        found[f"psnr{name}"] = metrics.psnr(pasted, view, here)
        found[f"ssim{name}"] = (similar * here).sum((1, 2)) / here.sum((1, 2))
    return found


def reconstruction(model, split, rows, norm, autocast, only=None):
    """[{"strategy", "ratio", "psnr", "ssim", "psnr_figure", ...}]: means over images, dB and [0, 1]."""
    device, S, total = model.encoder.cls_token.device, model.config["image_size"], {}
    for part, view in tqdm(data.whole_views(split["images"], rows, S, device), "pixels", leave=False, disable=None):
        with torch.no_grad():
            known = known_of(model, split, part, view)
        noise = torch.cat(
            [masking.gumbel_noise(1, model.encoder.side**2, seeded(0, i)) for i in part.tolist()]
        )
        figure = None
        if "fg" in split:
            fg = torch.from_numpy(split["fg"][part.numpy()]).to(device)
            figure = data.view_maps(fg, *data.full_boxes(len(part)), S) > 127.5
        for strategy in only or strategies(known):
            for ratio in RATIOS:
                pasted, where = reconstruct(model, view, known, strategy, ratio, noise.to(device), norm, autocast)
                for name, x in scores_of(view.cpu(), pasted.cpu(), where.cpu(),
                                         None if figure is None else figure.cpu()).items():  # fmt: skip
                    total.setdefault((strategy, ratio), {}).setdefault(name, []).append(x)
    return [{"strategy": s, "ratio": r} | {name: mean(torch.cat(x)) for name, x in found.items()}
            for (s, r), found in total.items()]  # fmt: skip


def mean(x):
    """Of the images that have such pixels; None if none has."""
    x = x[x.isfinite()]
    return x.mean().item() if len(x) else None


# ---- tables --------------------------------------------------------------------------------------------------------


def grade(psnr):
    return "good" if psnr > GOOD else "moderate" if psnr >= MODERATE else "poor"


def midterm(rows):
    """The table of the mid-term report: over 18 dB good, 10 to 17 moderate (to 18 here: no gap)."""
    lines = ["hidden   PSNR, dB   SSIM   grade      mean colour, dB"]
    lines += [f"{r['ratio']:>5.0%}   {r['psnr']:8.2f}   {r['ssim']:.3f}   {grade(r['psnr']):9} {r['psnr_flat']:11.2f}"
              for r in rows if r["strategy"] == "random"]  # fmt: skip
    return lines


def number(x, digits=1):
    return "-" if x is None else f"{x:.{digits}f}"


def robust_lines(report):
    lines = [f"{'spoiled by':22} Top-1, %   (clean {report['clean']:.1f}, chance {report['chance']:.1f})"]
    for name, levels in report["robustness"].items():
        cells = "  ".join(f"{level} {x:.1f}" for level, x in levels.items())
        lines.append(f"{name + ', ' + corruptions.SWEEPS[name][2] if len(levels) > 1 else name:30} {cells}")
    for name, x in report.get("parts", {}).items():
        lines.append(f"without {name:14} {x['hidden']:5.1f}   the same shape elsewhere {x['control']:5.1f}   "
                     f"({100 * x['area']:.1f} % of the picture)")  # fmt: skip
    for x in report["resolution"]:
        lines.append(f"{x['side']:4} px {x['top1']:5.1f}   trained size {x['top1_trained_size']:5.1f} on the same "
                     f"{x['images']} images   {x['images_per_s']:.0f} images/s")  # fmt: skip
    for name, x in report.get("style", {}).items():
        lines.append(f"{name:22} {number(x['top1']):>5}   {x['images']} images")
    return lines


def pixel_lines(rows):
    lines = [f"{'mask':10} {'ratio':>5}   PSNR: all figure ground  mean colour   SSIM: all figure ground"]
    for r in rows:
        cells = [number(r.get(f"psnr{k}")) for k in ("", "_figure", "_ground", "_flat")]
        cells += [number(r.get(f"ssim{k}"), 3) for k in ("", "_figure", "_ground")]
        lines.append(f"{r['strategy']:10} {r['ratio']:5.2f}   {cells[0]:>9} {cells[1]:>6} {cells[2]:>6} {cells[3]:>12}"
                     f" {cells[4]:>11} {cells[5]:>6} {cells[6]:>6}")  # fmt: skip
    return lines


# ---- the command ---------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("run", help="run folder of pretrain.py")
    add("--data", metavar="DIR", help="packed set (default: what the run was trained on)")
    add("--split", default="val", choices=["val", "dev", "test"], help="split that is looked at")
    add("--images", type=int, default=512, metavar="N", help="at most so many of it, evenly spread")
    add("--pool", default="mean", choices=features.POOLS, help="pooling of the tokens that the probe sees")
    add("--only", metavar="NAMES", help=f"only Top-1 under these of {', '.join(corruptions.SWEEPS)}, comma between")
    add("--midterm", action="store_true", help="only PSNR and SSIM by ratio under random masks, graded")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    return parser.parse_args()


def judge_of(args, encoder, size, splits, autocast, dtype):
    split = splits[args.split]
    found, _ = features.of_run(args.run, Path(args.run) / "model.safetensors", encoder, size, splits, autocast, dtype)
    scores = fit_probe(found[args.pool], splits, args.split)
    rows = data.evenly_spaced(len(split["images"]), args.images)
    return Judge(encoder, size, scores, split, rows, args.pool, autocast)


def only_some(args, judge):
    """--only: the few numbers that a study asks of every run, with each image's right or wrong."""
    right = at_headline(judge, args.only.split(","))
    print("\n".join(f"Top-1 under {name}: {percent(x):.1f} %" for name, x in right.items()))
    return {"top1": {k: percent(x) for k, x in right.items()}, "right": {k: stats.to_bits(x) for k, x in right.items()}}


def stress_probe(args, judge, splits):
    """Everything about the probe -> a part of the report."""
    split = judge.split
    clean = judge.right(lambda images, _: images)
    often = torch.bincount(splits["train"]["labels"]).argmax()
    report = {"clean": percent(clean), "chance": percent(split["labels"][judge.rows] == often), "pool": args.pool,
              "robustness": robustness(judge), "resolution": by_resolution(judge, args.run, clean)}  # fmt: skip
    if "parts" in split:
        report["parts"] = without_parts(judge)
    if "style" in split:
        report["style"] = by_style(judge, clean)
    return report


def main():
    args = parse_args()
    if Path(args.run).is_file():
        raise UserError(f"{args.run} is a file; experiments.stress wants the folder of a run, runs/NAME")
    if args.images < 8:
        raise UserError(f"--images {args.images} must be at least 8")
    if unknown := set((args.only or "cutout").split(",")) - set(corruptions.SWEEPS):
        raise UserError(f"--only {', '.join(unknown)} is unknown; there are: {', '.join(corruptions.SWEEPS)}")
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    autocast = autocast_of(device, dtype)
    encoder, size = load_encoder(args.run)
    encoder.to(device).requires_grad_(False)
    folder = args.data or features.flags_of(args.run).get("data")
    if not folder:
        raise UserError(f"{args.run} does not say what it was trained on; give --data datasets/NAME")
    splits, run = features.open_splits(folder, args.split), Path(args.run)
    split = splits[args.split]
    report = {"command": f"python -m experiments.stress {shlex.join(sys.argv[1:])}", "machine": machine(device),
              "commit": commit(), "run": run.name, "data": str(folder), "split": args.split,
              "images": min(args.images, len(split["images"]))}  # fmt: skip
    rows = data.evenly_spaced(len(split["images"]), args.images)
    if args.midterm:
        model, norm = load_mae(run, device)
        print("\n".join(midterm(reconstruction(model, split, rows, norm, autocast, ["random"]))))
        return
    labelled = data.has_labels(splits["train"]) and data.has_labels(split)
    if labelled:
        judge = judge_of(args, encoder, size, splits, autocast, "fp32" if dtype == torch.float32 else "bf16")
    elif args.only:
        raise UserError(f"--only {args.only} needs two classes or more, and labels on all images of {folder}")
    if args.only:
        save_json(report | only_some(args, judge), run / f"stress-{args.only.replace(',', '-')}.json")
        return
    if labelled:
        report |= stress_probe(args, judge, splits)
        print("\n".join(robust_lines(report)))
        plots.robustness(run / "robustness.png", report, corruptions.SWEEPS, f"Robustness of the probe: {run.name}")
        if "parts" in report:
            plots.parts(run / "parts.png", report, f"Recognised by which part? {run.name}")
    else:
        print("no robustness: that needs two classes or more, and labels on all images")
    model, norm = load_mae(run, device)
    report["masked_mse"] = masked_mse(model, split, norm, autocast)
    report["reconstruction"] = reconstruction(model, split, rows, norm, autocast)
    print("\n".join(pixel_lines(report["reconstruction"])))
    of = "normalised pixels; pictures by predicted statistics" if norm["norm_pix"] else "raw pixels"
    print(f"masked error under the fixed random mask {report['masked_mse']:.4f} of {of}")
    plots.reconstruction(run / "reconstruction.png", report["reconstruction"], f"Hidden pixels: {run.name}")
    save_json(report, run / "stress.json")
    print(f"wrote    {run}/stress.json, robustness.png, reconstruction.png")


if __name__ == "__main__":
    cli(main)
