"""How true are the maps? Foreground and parts against the true masks of portraits and of the demo set.

    python -m experiments.map_quality --run runs/NAME       # into runs/truth.csv

Saliency: per-patch AUC and IoU (at 0.5), mean over images. Portraits with true alpha (--portraits;
development data that is not part of this repository) are laid on four kinds of background, in two
framings: "whole" stands the picture, as wide as the canvas, on its lower edge; "close" is its
centre square, which the person fills almost entirely. Only the half of the identities is used that
no constant was chosen on. Attention: the same AUC, and the share of it that falls on the background
over the background's share of the area (`background`; 1 is no preference), for each way to read the
run's attention. Parts: adjusted Rand index over the true foreground's patches, beside k-means on
what has learned nothing. Replaces this run's rows of the same sets in --out; --figure draws a sheet
of --data.
"""

import contextlib
import io
import itertools
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import maps
from common import guidance
from common.checkpoints import load_teacher
from common.command import Parser, claim, cli, progress, refuse_file
from common.features import untrained_like
from common.io import UserError, regular
from common.train import commit, machine, seeded
from experiments.tables import replace_rows, rows_there
from ingest import toon
from ingest.decode import open_picture

BACKGROUNDS = ("flat", "gradient", "tone", "photo")
FRAMINGS = ("whole", "close")
KEYS = ("run", "set", "map")  # of a row: the same again replaces it


# ---- portraits on backgrounds that are drawn here ------------------------------------------------


def portraits(path, framing, half=1, side=128):
    """RGBA u8 (n, side, side, 4) of every second identity: half 0 is for choices, half 1 is
    reported.
    """
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".webp"))
        people = sorted({n.split("/")[-2] for n in names})[half::2]
        pictures = [
            open_picture(io.BytesIO(archive.read(n))) for n in names if n.split("/")[-2] in people
        ]
        return torch.from_numpy(
            np.stack([framed(p.convert("RGBA"), framing, side) for p in pictures])
        )


def check_zip(path):
    if not zipfile.is_zipfile(regular(path)):
        raise UserError(
            f"{path} is no zip of portraits; --portraits none measures the demo set alone"
        )


def framed(picture, framing, side):
    """RGBA picture -> u8 (side, side, 4)."""
    w, h = picture.size
    if framing == "close":
        return np.array(
            picture.resize((side, side), Image.BICUBIC, ((w - h) / 2, 0, (w + h) / 2, h))
        )
    height, canvas = min(side, round(side * h / w)), np.zeros((side, side, 4), np.uint8)
    canvas[side - height :] = np.array(picture.resize((side, height), Image.BICUBIC))
    return canvas


def draw_background(kind, n, side, generator):
    """fp32 (n, side, side, 3) in [0, 1]: one colour; a gradient of two; a screen tone; noise as in
    a photograph.

    Noise has an amplitude of 1/frequency, as natural images do (Field 1987), mostly in luminance.
    """
    colour = 0.15 + 0.8 * torch.rand(2, n, 1, 1, 3, generator=generator)
    turn = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    y, x = torch.meshgrid(
        torch.linspace(-0.5, 0.5, side), torch.linspace(-0.5, 0.5, side), indexing="ij"
    )
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    if kind == "flat":
        return colour[0].expand(n, side, side, 3)
    if kind == "photo":
        frequency = (
            torch.fft.fftfreq(side)[:, None].hypot(torch.fft.fftfreq(side)).clamp(min=1 / side)
        )
        noise = torch.fft.ifft2(
            torch.fft.fft2(torch.randn(n, 4, side, side, generator=generator)) / frequency
        ).real
        noise = (noise / noise.std((2, 3), keepdim=True)).permute(
            0, 2, 3, 1
        )  # luminance and three channels
        return (colour[0] + 0.12 * noise[..., :1] + 0.05 * noise[..., 1:]).clamp(0, 1)
    if kind == "tone":
        period = (4 + 6 * torch.rand(n, 1, 1, generator=generator)) / side
        share = (
            2 * (2 * math.pi * u / period).cos() + 2 * (2 * math.pi * v / period).cos() + 0.5
        ).sigmoid()
    else:
        share = (u + 0.5).clamp(0, 1)
    return colour[0] * (1 - share[..., None]) + colour[1] * share[..., None]


def composite(rgba, kind, seed=0):
    """RGBA u8 (n, S, S, 4) on a background -> images u8 (n, S, S, 3), true foreground fp32 (n, S,
    S) in [0, 1].
    """
    behind = draw_background(kind, len(rgba), rgba.shape[1], seeded(seed, BACKGROUNDS.index(kind)))
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + 255 * behind * (1 - alpha)).round().to(torch.uint8), alpha[
        ..., 0
    ]


# ---- measuring -----------------------------------------------------------------------------------


def tokens_of(encoder, size, images):
    """images u8 (n, S, S, 3) -> (n, N, D), all in memory: these sets are small."""
    rows = torch.arange(len(images))
    return torch.cat([x for _, x in maps.tokens_of(images, rows, encoder, size)])


def iou(predicted, truth):
    """Intersection over union of two bool tensors, in [0, 1]; 1 where both are empty."""
    union = (predicted | truth).sum()
    return ((predicted & truth).sum() / union).item() if union else 1.0


def auc_of(score, truth):
    """Area under the ROC curve of score (n,), truth (n,) bool. NaN where truth has one kind."""
    from sklearn.metrics import roc_auc_score

    if truth.all() or not truth.any():
        return float("nan")
    return float(roc_auc_score(truth.numpy(), score.numpy()))


def foreground_scores(saliency, true, side):
    """saliency, true (n, G, G) in [0, 1] -> AUC and IoU of each image's side x side patches, (n, 2)
    with NaNs.
    """
    pairs = zip(maps.to_patches(saliency, side), maps.to_patches(true, side) > 0.5, strict=True)
    return torch.tensor([[auc_of(x, t), iou(x > 0.5, t)] for x, t in pairs])


def row_of(name, kind, images, **scores):
    """A row of the CSV; what was not measured is empty."""
    empty = dict.fromkeys(("auc", "iou", "auc_gain", "gain_half_width_95", "ari", "background"), "")
    return {"set": name, "map": kind, "images": len(images)} | empty | scores


def measure_foreground(name, images, true, side):
    """A row of AUC and IoU over side x side patches, and the saliency (n, G, G)."""
    found = torch.cat([maps.coarse(x) for x in images.split(data.CHUNK)])
    scores = foreground_scores(found, true, side)
    auc, overlap = scores[:, 0].nanmean().item(), scores[:, 1].mean().item()
    return [row_of(name, "coarse", images, auc=auc, iou=overlap)], found


def measure_attention(name, images, true, encoder, sources):
    """Rows of AUC and of what falls on the background, a row for each source of attention."""
    rows, share = [], maps.to_patches(true, encoder.side)  # (n, N)
    exact = contextlib.nullcontext
    for source in sources:
        rows_of_all = torch.arange(len(images))
        found = guidance.attention(encoder, images.numpy(), rows_of_all, source, exact)
        score = torch.cat([x for _, x in found])
        auc = (
            torch.tensor([auc_of(x, t) for x, t in zip(score, share > 0.5, strict=True)])
            .nanmean()
            .item()
        )
        mass = ((1 - share) * score / score.sum(1, keepdim=True)).sum() / (1 - share).mean(1).sum()
        rows.append(row_of(name, f"attention, {source}", images, auc=auc, background=mass.item()))
    return rows


def main_part(parts, side, kinds):
    """True parts u8 (n, S, S) -> the one that covers most of each patch, i64 (n, N)."""
    return torch.stack([maps.to_patches(parts == k, side) for k in range(kinds)], 2).argmax(2)


def measure_parts(name, images, parts, foreground, encoder, size, kinds, K=6):
    """Rows of the adjusted Rand index over true foreground patches: features, and k-means without
    learning.
    """
    from sklearn.metrics import adjusted_rand_score

    true, g, rows = main_part(parts, encoder.side, kinds), encoder.side, []
    on, line = true > 0, torch.linspace(-1, 1, g)
    inputs = {
        "colour": maps.cells(images.float(), g)[..., :3].flatten(1, 2),
        "place": torch.cartesian_prod(line, line).expand(len(images), -1, -1),
    }
    for kind, network in (("untrained features", untrained_like(encoder)), ("features", encoder)):
        tokens = tokens_of(network, size, images)
        inputs[kind] = maps.relative_to_foreground(
            tokens, maps.to_patches(foreground, g) > 0.5, tokens.mean(0)
        )
    for kind, points in inputs.items():
        label = torch.cdist(points[on], maps.kmeans(points[on], K)).argmin(1)
        ari = adjusted_rand_score(label, true[on])
        rows.append(row_of(name, f"parts, k-means of {kind}, K={K}", images, ari=ari))
    return rows


def true_set(folder, split):
    """-> images, foreground in [0, 1], parts of a packed set that knows its own truth."""
    packed = data.open_split(folder, split)
    if missing := [name for name in ("fg", "parts") if name not in packed]:
        raise UserError(
            f"{folder} has no true {' and '.join(missing)} to measure against; the demo set has: "
            "python data.py toon --out datasets/toon"
        )
    images, fg, parts = (torch.from_numpy(np.array(packed[k])) for k in ("images", "fg", "parts"))
    return images, fg / 255, parts


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--run",
        required=True,
        help="a run folder of pretrain.py: the encoder of attention and parts",
    )
    add(
        "--data",
        default="datasets/toon",
        help="packed set with true foreground and parts (default: the demo set)",
    )
    add("--split", default="val", choices=["train", "dev", "val", "test"], help="of --data")
    add(
        "--portraits",
        default="../shared/data/portraits70_alpha.zip",
        help="zip of RGBA pictures, or none",
    )
    add(
        "--out",
        default="runs/truth.csv",
        metavar="CSV",
        help="where this run's rows of these sets are replaced, and "
        "others kept\n(default: runs/truth.csv)",
    )
    add(
        "--figure",
        metavar="PNG",
        help="draw a sheet of --data here (only of data that may be shown)",
    )
    args = parser.parse_args()
    check(args)
    images, foreground, parts = true_set(data.open_or_pack(args.data), args.split)
    encoder, size = load_teacher(args.run)
    sources = [x for x in guidance.SOURCES if x != "pooler" or encoder.pooler is not None]
    name, kinds = f"{Path(args.data).name} {args.split}", len(toon.PARTS)
    rows, found = measure_foreground(name, images, foreground, encoder.side)
    rows += measure_attention(name, images, foreground, encoder, sources)
    for K in (6, 12):
        rows += measure_parts(name, images, parts, foreground, encoder, size, kinds, K)
    sets = list(itertools.product(FRAMINGS, BACKGROUNDS)) if args.portraits != "none" else []
    for framing, kind in progress(sets, "portraits"):
        laid = composite(portraits(args.portraits, framing), kind)
        rows += measure_foreground(f"portraits {framing}, {kind}", *laid, encoder.side)[0]
        rows += measure_attention(f"portraits {framing}, {kind}", *laid, encoder, sources)
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    run, made = Path(args.run).name, {"machine": machine(torch.device("cpu")), "commit": commit()}
    replace_rows(args.out, [{"run": run} | row | made for row in rows], KEYS)
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    if args.figure:
        draw(args.figure, name, images, foreground, parts, found, encoder, size)
    print(f"wrote    {args.out}" + (f" and {args.figure}" if args.figure else ""))


def check(args):
    """Every mistake before minutes of work."""
    refuse_file(Path(args.out).parent)
    rows_there(args.out, KEYS)
    if args.portraits != "none":
        check_zip(args.portraits)
    if args.figure:
        claim([args.figure], fix="choose another --figure")
        if Path(args.figure).suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(
                f"--figure {args.figure} is drawn as .png, .pdf or .svg; give such a name"
            )


def draw(path, name, images, foreground, parts, found, encoder, size, n=10):
    """Images, true and found foreground, true and found parts: one line each."""
    from common import plots  # matplotlib takes a second to load

    some, tokens = data.evenly_spaced(len(images), n), tokens_of(encoder, size, images)
    place, on = tokens.mean(0), maps.to_patches(found, encoder.side) > 0.5
    centres = maps.kmeans(maps.relative_to_foreground(tokens, on, place)[on], 6)
    label = maps.parts_of(tokens, on, place, centres).unflatten(1, (encoder.side, -1))
    lines = [
        ("image", images[some]),
        ("true foreground", foreground[some]),
        ("coarse", found[some]),
        ("true parts", maps.coloured(parts[some])),
        ("parts, K=6", maps.coloured(label[some])),
    ]
    plots.image_grid(path, f"Foreground and parts without labels, {name}", lines)


if __name__ == "__main__":
    cli(main)
