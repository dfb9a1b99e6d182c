"""How true are the maps? Foreground, attention and parts against the true masks of the demo set.

    python -m experiments.map_quality --run runs/NAME       # into runs/truth.csv

Saliency: per-patch AUC and IoU (at .5) of coarse, refined, and the normalised cut alone, mean over
images. Attention: AUC, and its share on the background over the background's area (`background`; 1
is no preference). Parts: adjusted Rand index over patches of the true foreground, beside k-means on
what has learned nothing.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch

import data
import maps
import mask as masking
from common import guidance
from common.checkpoints import load_teacher
from common.command import Parser, cli, refuse_file
from common.features import untrained_like
from common.io import UserError
from common.train import commit, machine, seeded
from experiments.tables import replace_rows, rows_there

KEYS = ("run", "set", "map")  # of a row: the same again replaces it
SCORES = ("auc", "iou", "auc_gain", "gain_half_width_95", "ari", "background")


# ---- measuring: images u8 (n, S, S, 3), true foreground (n, S, S) in [0, 1] -----------------------


def tokens_of(encoder, size, images):
    """-> (n, N, D), all in memory: these sets are small."""
    rows, cpu = torch.arange(len(images)), torch.device("cpu")
    found = maps.tokens_of(images, rows, encoder, size, cpu, contextlib.nullcontext)
    return torch.cat([x for _, x in found])


def iou(predicted, truth):
    """Intersection over union of two bool tensors, in [0, 1]; 1 where both are empty."""
    union = (predicted | truth).sum()
    return ((predicted & truth).sum() / union).item() if union else 1.0


def foreground_scores(saliency, true, side):
    """saliency (n, G, G) -> AUC and IoU of each image's side x side patches, (n, 2) with NaNs."""
    pairs = zip(maps.to_patches(saliency, side), maps.to_patches(true, side) > 0.5, strict=True)
    return torch.tensor([[maps.auc(x, t), iou(x > 0.5, t)] for x, t in pairs])


def cut_alone(images, tokens, place):
    """The refined map without the coarse one, but for its sign."""
    side, g = maps.normalized_cut(maps.contrast(tokens, place)), math.isqrt(tokens.shape[1])
    here = masking.standard_score(maps.to_patches(maps.coarse_logit(images)[0], g))
    return (side * (side * here).mean(1, keepdim=True).sign()).sigmoid().view(-1, g, g)


def row_of(name, kind, images, **scores):
    """A row of the CSV; what was not measured is empty."""
    row = {"set": name, "map": kind, "images": len(images)} | dict.fromkeys(SCORES, "")
    return row | {k: round(x, 4) for k, x in scores.items()}


def measure_foreground(name, images, true, encoder, size):
    """Rows of coarse, cut alone and refined, with what each gains over coarse, image by image."""
    tokens = tokens_of(encoder, size, images)
    place, pieces = tokens.mean(0), (images.split(data.CHUNK), tokens.split(data.CHUNK))
    found = {
        "coarse": [maps.coarse(x) for x in pieces[0]],
        "cut alone": [cut_alone(x, t, place) for x, t in zip(*pieces, strict=True)],
        "refined": [maps.refined(x, t, place) for x, t in zip(*pieces, strict=True)],
    }
    rows, coarse = [], None
    for kind, saliency in found.items():
        score = foreground_scores(torch.cat(saliency), true, encoder.side)
        coarse = score if coarse is None else coarse
        gain = (score - coarse)[:, 0]
        gain = gain[gain.isfinite()]
        row = row_of(name, kind, images, auc=score[:, 0].nanmean().item())
        row |= {
            "iou": round(score[:, 1].mean().item(), 4),
            "auc_gain": round(gain.mean().item(), 4),
        }
        row["gain_half_width_95"] = round(1.96 * gain.std().item() / len(gain) ** 0.5, 4)
        rows.append(row)
    return rows


def measure_attention(name, images, true, encoder, size):
    """A row of AUC and of what falls on the background for each source of attention."""
    rows, share, every = [], maps.to_patches(true, encoder.side), torch.arange(len(images))
    exact = contextlib.nullcontext
    sources = [x for x in guidance.SOURCES if x != "pooler" or encoder.pooler is not None]
    for source in sources:
        found = guidance.attention(encoder, size, images.numpy(), every, source, exact)
        score = torch.cat([x for _, x in found])
        auc = [maps.auc(x, t) for x, t in zip(score, share > 0.5, strict=True)]
        mass = ((1 - share) * score / score.sum(1, keepdim=True)).sum() / (1 - share).mean(1).sum()
        scores = {"auc": torch.tensor(auc).nanmean().item(), "background": mass.item()}
        rows.append(row_of(name, f"attention, {source}", images, **scores))
    return rows


def main_part(parts, side):
    """True parts u8 (n, S, S) -> the one that covers most of each patch, i64 (n, N)."""
    kinds = range(int(parts.max()) + 1)
    return torch.stack([maps.to_patches(parts == k, side) for k in kinds], 2).argmax(2)


def inputs_of_parts(truth, encoder, size):
    """{what k-means sees: (n, N, D)}: colour, place, features of an untrained and of this encoder."""
    images, foreground, _ = truth
    g = encoder.side
    line = torch.linspace(-1, 1, g)
    inputs = {
        "colour": maps.cells(images.float(), g)[..., :3].flatten(1, 2),
        "place": torch.cartesian_prod(line, line).expand(len(images), -1, -1),
    }
    on = maps.to_patches(foreground, g) > 0.5
    for kind, network in (("untrained features", untrained_like(encoder)), ("features", encoder)):
        tokens = tokens_of(network, size, images)
        inputs[kind] = maps.relative_to_foreground(tokens, on, tokens.mean(0))
    return inputs


def measure_parts(name, truth, encoder, size, K=6):
    """Rows of the adjusted Rand index. truth: images, foreground, parts u8 (n, S, S)."""
    from sklearn.metrics import adjusted_rand_score

    true, rows = main_part(truth[2], encoder.side), []
    on = true > 0
    for kind, points in inputs_of_parts(truth, encoder, size).items():
        label = torch.cdist(points[on], maps.kmeans(points[on], K, seeded(0))).argmin(1)
        ari = adjusted_rand_score(label, true[on])
        rows.append(row_of(name, f"parts, k-means of {kind}, K={K}", truth[0], ari=ari))
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
    add("--run", required=True, help="run of pretrain.py: encoder of refined maps and parts")
    add("--data", default="datasets/toon", help="packed set with true masks (default: demo set)")
    add("--split", default="val", choices=["train", "dev", "val", "test"], help="of --data")
    add("--out", default="runs/truth.csv", metavar="CSV", help="gets these rows; others are kept")
    args = parser.parse_args()
    refuse_file(Path(args.out).parent)
    rows_there(args.out, KEYS)
    truth = true_set(data.open_or_pack(args.data), args.split)
    encoder, size = load_teacher(args.run)
    name = f"{Path(args.data).name} {args.split}"
    rows = measure_foreground(name, *truth[:2], encoder, size)
    rows += measure_attention(name, *truth[:2], encoder, size)
    for K in (6, 12):
        rows += measure_parts(name, truth, encoder, size, K)
    run, made = Path(args.run).name, {"machine": machine(torch.device("cpu")), "commit": commit()}
    replace_rows(args.out, [{"run": run} | row | made for row in rows], KEYS)
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    print(f"wrote    {args.out}")


if __name__ == "__main__":
    cli(main)
