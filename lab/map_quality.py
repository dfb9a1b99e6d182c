"""How true are the maps? Foreground, attention and parts against the true masks of the demo set.

    python -m lab.map_quality runs/NAME

Reads:  runs/NAME/model.safetensors, datasets/NAME with true masks
Writes: runs/NAME/map_quality.json and map_quality.png, which shows the maps beside the truth; of
        other data than the run's, or of another split than val, in runs/NAME/DATANAME-SPLIT/

Saliency: AUC of patches, mean over images. Attention: AUC, and its share on each part over the
part's area (1 is no preference). Masks: how often attn_high hides a patch of each part. Parts:
adjusted Rand index over patches of the true foreground, beside k-means on what has learned nothing.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score, roc_auc_score

import data
import mask as masking
from apps import maps, masks
from common import guidance, plots
from common.checkpoints import load_teacher
from common.evaluate import EVAL_RATIO
from common.features import results_folder, untrained_like
from common.locks import reserve
from common.train import Parser, UserError, cli, command, commit, machine, save_json

CPU = torch.device("cpu")
SHOWN = 10  # pictures of the sheet
DRAWS = 20  # masks of each picture

# ---- measuring: images u8 (n, S, S, 3), true foreground (n, S, S) in [0, 1] ----------------------


def tokens_of(encoder, images):
    """-> (n, N, D), all in memory: these sets are small."""
    indices = torch.arange(len(images))
    return torch.cat([x for _, x in maps.tokens_of(images, indices, encoder)])


def mean_auc(scores, truths):
    """Area under the ROC curve of each image's patches, mean over the images that have both kinds.

    scores (n, N), truths (n, N) bool.
    """
    both = truths.any(1) & ~truths.all(1)
    pairs = zip(scores[both], truths[both], strict=True)
    return np.mean([roc_auc_score(truth, score) for score, truth in pairs])


def measure_foreground(images, true, side):
    """A row of the AUC of the saliency over side x side patches."""
    found = torch.cat([maps.coarse(x) for x in images.split(data.CHUNK)])
    auc = mean_auc(maps.to_patches(found, side), maps.to_patches(true, side) > 0.5)
    return [{"map": "coarse", "auc": auc}]


def measure_attention(images, parts, names, encoder):
    """Rows of AUC and of what falls on each part, for each kind of attention, and of what its mask hides."""
    rows = []
    share = shares_of(parts, len(names), encoder.side)  # (n, N, parts)
    area = share.sum((0, 1))
    every = torch.arange(len(images))
    for kind in guidance.ATTENTION:
        if kind == "pooler" and encoder.pooler is None:
            continue
        found = guidance.attention(encoder, images.numpy(), every, kind, contextlib.nullcontext)
        score = torch.cat([x for _, x in found])
        mass = score.shape[1] * score / score.sum(1, keepdim=True)  # 1 is the mean of a picture
        auc = mean_auc(score, share[..., 0] < 0.5)
        often = how_often_hidden(score)
        by_part = [torch.einsum("bn,bnp->p", x, share) / area for x in (mass, often)]
        looked, hidden = (dict(zip(names, x, strict=True)) for x in by_part)
        rows.append({"map": f"attention, {kind}", "auc": auc} | looked)
        rows.append({"map": f"hidden by attn_high, {kind}"} | hidden)
    return rows


def how_often_hidden(attention):
    """attention (n, N) -> in which share of DRAWS masks of attn_high each patch is hidden, (n, N)."""
    n, N = attention.shape
    scores = {"attn": attention.repeat(DRAWS, 1)}
    hidden = masks.hidden_by(masking.attn_high, scores, DRAWS * n, N, EVAL_RATIO)
    return hidden.view(DRAWS, n, N).float().mean(0)


def shares_of(parts, count, side):
    """True parts u8 (n, S, S) -> the share of each in each patch, (n, N, count)."""
    return torch.stack([maps.to_patches(parts == k, side) for k in range(count)], 2)


def main_part(parts, side):
    """True parts u8 (n, S, S) -> the one that covers most of each patch, i64 (n, N)."""
    return shares_of(parts, int(parts.max()) + 1, side).argmax(2)


def inputs_of_parts(truth, encoder):
    """-> {what k-means sees: (n, N, D)}: colours, places, features without and with training."""
    images, foreground, _ = truth
    g = encoder.side
    line = torch.linspace(-1, 1, g)
    inputs = {
        "colour": maps.cells(images.float(), g)[..., :3].flatten(1, 2),
        "place": torch.cartesian_prod(line, line).expand(len(images), -1, -1),
    }
    on = maps.to_patches(foreground, g) > 0.5
    for kind, network in (("untrained features", untrained_like(encoder)), ("features", encoder)):
        tokens = tokens_of(network, images)
        inputs[kind] = maps.relative_to_foreground(tokens, on, tokens.mean(0))
    return inputs


def measure_parts(truth, encoder, K=6):
    """Rows of the adjusted Rand index. truth: images, foreground, parts u8 (n, S, S)."""
    true = main_part(truth[2], encoder.side)
    rows = []
    on = true > 0
    for kind, points in inputs_of_parts(truth, encoder).items():
        label = torch.cdist(points[on], maps.kmeans(points[on], K)).argmin(1)
        ari = adjusted_rand_score(label, true[on])
        rows.append({"map": f"parts, k-means of {kind}, K={K}", "ari": ari})
    return rows


# ---- the picture ---------------------------------------------------------------------------------


def draw(path, truth, encoder, K=6):
    """A sheet: some pictures, their figure and parts, and what maps of apps/maps.py say of both.

    Parts are clusters of the foreground that saliency finds, because a set of your own has no other.
    """
    images, foreground, parts = truth
    g = encoder.side
    shown = data.evenly_spaced(len(images), SHOWN)
    saliency = torch.cat([maps.coarse(x) for x in images.split(data.CHUNK)])
    on = maps.to_patches(saliency, g) > 0.5
    tokens = tokens_of(encoder, images)
    place = tokens.mean(0)
    centres = maps.kmeans(maps.relative_to_foreground(tokens, on, place)[on], K)
    found = maps.parts_of(tokens[shown], on[shown], place, centres).unflatten(1, (g, g))
    rows = {
        "true figure": foreground[shown],
        "saliency": saliency[shown],
        "true parts": parts[shown].long(),
        f"parts, K={K}": found.long(),
    }
    rows = [(name, masks.coloured(some)) for name, some in rows.items()]
    title = "Figure and parts: true ones, and found without labels"
    plots.image_grid(path, title, [("image", images[shown]), *rows])


def true_set(folder, split):
    """-> images, foreground in [0, 1], parts and their names of a packed set that knows its own truth."""
    packed = data.open_split(folder, split)
    if missing := [name for name in ("fg", "parts") if name not in packed]:
        fix = "python data.py toon --out datasets/toon draws a set that has"
        raise UserError(f"{folder} has no true {' and '.join(missing)} to measure against; {fix}")
    images, fg, parts = (torch.from_numpy(np.array(packed[k])) for k in ("images", "fg", "parts"))
    return images, fg / 255, parts, packed["header"]["parts"]


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="run of pretrain.py: encoder of attention and parts")
    add("--data", default="datasets/toon", help="packed set with true masks (default: demo set)")
    add("--split", default="val", choices=["train", "dev", "val", "test"], help="of --data")
    args = parser.parse_args()
    encoder = load_teacher(args.run)
    folder = Path(data.open_or_pack(args.data))
    out = results_folder(args.run, folder, args.split) / "map_quality.json"
    sheet = out.with_suffix(".png")
    reserve([out, sheet], fix="move it away")
    *truth, names = true_set(folder, args.split)
    rows = measure_foreground(*truth[:2], encoder.side)
    rows += measure_attention(truth[0], truth[2], names, encoder)
    for K in (6, 12):
        rows += measure_parts(truth, encoder, K)
    rows = [{k: x if k == "map" else round(float(x), 4) for k, x in row.items()} for row in rows]
    for row in rows:
        print(", ".join(f"{k} {x}" for k, x in row.items()))
    report = {"command": command(), "machine": machine(CPU), "commit": commit()}
    report |= {"run": Path(args.run).name, "data": str(folder), "split": args.split}
    save_json(report | {"images": len(truth[0]), "rows": rows}, out)
    draw(sheet, truth, encoder)
    print(f"wrote    {out}, {sheet.name}")


if __name__ == "__main__":
    cli(main)
