"""How true are the maps? Foreground, attention and parts against the true masks of the demo set.

    python -m experiments.map_quality --run runs/NAME       # into runs/truth.csv

Saliency: AUC and IoU (at 0.5) of patches, mean over images. Attention: AUC, and its share on the
background over the background's area (`background`; 1 is no preference). Parts: adjusted Rand index
over patches of the true foreground, beside k-means on what has learned nothing.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch

import data
import maps
from common import guidance
from common.checkpoints import load_teacher
from common.command import Parser, cli, refuse_file
from common.features import untrained_like
from common.io import UserError
from common.train import commit, machine
from experiments.tables import replace_rows, rows_there

KEYS = ("run", "set", "map")  # of a row: the same again replaces it
SCORES = ("auc", "iou", "auc_gain", "gain_half_width_95", "ari", "background")


# ---- measuring: images u8 (n, S, S, 3), true foreground (n, S, S) in [0, 1] -----------------------


def tokens_of(encoder, size, images):
    """-> (n, N, D), all in memory: these sets are small."""
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
    """saliency (n, G, G) -> AUC and IoU of each image's side x side patches, (n, 2) with NaNs."""
    pairs = zip(maps.to_patches(saliency, side), maps.to_patches(true, side) > 0.5, strict=True)
    return torch.tensor([[auc_of(x, t), iou(x > 0.5, t)] for x, t in pairs])


def row_of(name, kind, images, **scores):
    """A row of the CSV; what was not measured is empty."""
    row = {"set": name, "map": kind, "images": len(images)} | dict.fromkeys(SCORES, "")
    return row | {k: round(x, 4) for k, x in scores.items()}


def measure_foreground(name, images, true, side):
    """A row of AUC and IoU of the saliency over side x side patches."""
    found = torch.cat([maps.coarse(x) for x in images.split(data.CHUNK)])
    scores = foreground_scores(found, true, side)
    auc, overlap = scores[:, 0].nanmean().item(), scores[:, 1].mean().item()
    return [row_of(name, "coarse", images, auc=auc, iou=overlap)]


def measure_attention(name, images, true, encoder):
    """A row of AUC and of what falls on the background for each source of attention."""
    rows, share, every = [], maps.to_patches(true, encoder.side), torch.arange(len(images))
    exact = contextlib.nullcontext
    sources = [x for x in guidance.SOURCES if x != "pooler" or encoder.pooler is not None]
    for source in sources:
        found = guidance.attention(encoder, images.numpy(), every, source, exact)
        score = torch.cat([x for _, x in found])
        auc = [auc_of(x, t) for x, t in zip(score, share > 0.5, strict=True)]
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
        label = torch.cdist(points[on], maps.kmeans(points[on], K)).argmin(1)
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
    add("--run", required=True, help="run of pretrain.py: encoder of attention and parts")
    add("--data", default="datasets/toon", help="packed set with true masks (default: demo set)")
    add("--split", default="val", choices=["train", "dev", "val", "test"], help="of --data")
    add("--out", default="runs/truth.csv", metavar="CSV", help="gets these rows; others are kept")
    args = parser.parse_args()
    refuse_file(Path(args.out).parent)
    rows_there(args.out, KEYS)
    truth = true_set(data.open_or_pack(args.data), args.split)
    encoder, size = load_teacher(args.run)
    name = f"{Path(args.data).name} {args.split}"
    rows = measure_foreground(name, *truth[:2], encoder.side)
    rows += measure_attention(name, *truth[:2], encoder)
    for K in (6, 12):
        rows += measure_parts(name, truth, encoder, size, K)
    run, made = Path(args.run).name, {"machine": machine(torch.device("cpu")), "commit": commit()}
    replace_rows(args.out, [{"run": run} | row | made for row in rows], KEYS)
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    print(f"wrote    {args.out}")


if __name__ == "__main__":
    cli(main)
