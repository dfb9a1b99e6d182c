"""Stage 1: maps of a data set that guide masks: attention, foreground (saliency) and parts, stored in files.

    python -m apps.maps --data datasets/toon --map saliency
    python -m apps.maps --data datasets/toon --map attn --run runs/NAME

Reads:  train of datasets/NAME (the demo set is drawn if absent), runs/NAME for an encoder
Writes: maps/NAME/MAP.safetensors, and sheet-MAP.png: what strategies hide by it

    attn      f16 (n, g, g)    attention of an encoder, mean over heads, g patches a side
    saliency  u8 (n, 32, 32)   estimated probability of foreground, by colour and place; 255 is 1
    parts     u8 (n, g, g)     0 background, 1..K clusters of foreground tokens, the largest first

    n images of the set   B of a chunk   S their side   G cells a side   C numbers of a cell's colour
    N = g * g patches   D width of the encoder   K clusters
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import mask as masking
from apps import masks
from common import guidance, train
from common.checkpoints import flags_of, load_teacher
from common.door import aside, drawing
from common.locks import reserve
from common.rows import write_rows
from common.train import Parser, UserError, between, cli, refuse_useless

SAMPLE = 1024  # images that give the mean token of each place and the clusters of parts
EXACT = contextlib.nullcontext  # fp32: maps are made once, and are nearly the same on every machine


# ---- saliency: from colours alone ----------------------------------------------------------------

GRID = 32  # cells a side of every saliency map, whatever the encoder's grid
CONNECTIVITY_GRID = 12  # shortest paths of N cells cost N^3: 2 ms an image; at 16, 8 ms, equal AUC
BANDWIDTH = 8.0  # of a colour, in Lab units; about 2.3 are a just noticeable difference
SPREAD, STEPS = 10.0, 6  # of a colour, over a whole region (the paper's sigma_clr); of `diffuse`
NOISE = 2.0  # Lab units by which neighbours may differ at no cost: grain is no edge
# Weights of a logistic fit on portraits with drawn backgrounds and on train of the demo set.
# Results are reported on other images. The threshold 0.5 depends on their share of foreground.
WEIGHTS = {"colour": -0.9, "connectivity": -0.4, "centre": 1.55, "bias": -2.4}
TO_XYZ = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9502]]


def to_lab(images):
    """u8 (B, S, S, 3) in sRGB -> fp32 (B, S, S, 3) in CIE Lab under D65."""
    rgb = torch.arange(256, device=images.device) / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)[images.long()]
    to_xyz = torch.tensor(TO_XYZ).T
    xyz = linear @ (to_xyz / to_xyz.sum(0)).to(images.device)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    fx, fy, fz = f.unbind(-1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], -1)


def cells(lab, G):
    """(B, S, S, 3) -> (B, G, G, 4): the mean colour of each cell, and its standard deviation."""
    x = lab.permute(0, 3, 1, 2)
    mean = F.adaptive_avg_pool2d(x, G)
    variance = (F.adaptive_avg_pool2d(x * x, G) - mean * mean).clamp(min=0).sum(1, keepdim=True)
    return torch.cat([mean, variance.sqrt()], 1).permute(0, 2, 3, 1)


def border(G):
    """(G*G,) bool: the cells of the upper, left and right edge. People stand on the lower edge."""
    edge = torch.ones(G, G, dtype=torch.bool)
    edge[1:, 1:-1] = False
    return edge.flatten()


def likeness(squared_distance, scale):
    """A Gaussian of the distance: 1 for equal colours."""
    return (-squared_distance / (2 * scale**2)).exp()


def border_colour(colours):
    """Colours (B, G, G, C) -> (B, G, G) in [0, 1]: the share of border cells of a like colour.

    A kernel density estimate of the background's colours, which may be several.
    """
    G = colours.shape[1]
    x = colours.flatten(1, 2)
    distance = torch.cdist(x, x[:, border(G)])  # (B, G*G, border cells)
    return likeness(distance.square(), BANDWIDTH).mean(2).unflatten(1, (G, G))


def geodesic(colours):
    """Colours (B, G, G, C) -> (B, G*G, G*G): the cheapest path between any two cells.

    A step to one of 8 neighbours costs the difference of their colours beyond NOISE. Cells of a
    flat region are near each other, however large it is. Floyd and Warshall's algorithm.
    """
    B, G = colours.shape[:2]
    x = colours.flatten(1, 2)
    distance = x.new_full((B, G * G, G * G), float("inf"))
    distance.diagonal(dim1=1, dim2=2).zero_()
    place = torch.arange(G * G).view(G, G)
    down = (place[:-1], place[1:])
    right = (place[:, :-1], place[:, 1:])
    falling = (place[:-1, :-1], place[1:, 1:])
    rising = (place[1:, :-1], place[:-1, 1:])
    for start, end in (down, right, falling, rising):
        i, j = start.flatten(), end.flatten()
        cost = ((x[:, i] - x[:, j]).norm(dim=2) - NOISE).clamp(min=0)
        distance[:, i, j] = cost
        distance[:, j, i] = cost
    for k in range(G * G):
        over_k = distance[:, :, k, None] + distance[:, k, None, :]
        torch.minimum(distance, over_k, out=distance)
    return distance


def boundary_connectivity(colours):
    """Colours (B, G, G, C) -> (B, G, G): a region's length on the border over the root of its area.

    It is high for background, and low for foreground even where that touches the border (Zhu et al.
    2014, "Saliency Optimization from Robust Background Detection"). Other than there, the
    lower edge is no border, and a step of colour costs only what goes beyond NOISE.
    """
    G = colours.shape[1]
    region = likeness(geodesic(colours).square(), SPREAD)  # (B, N, N): that j is in i's region
    length = region[:, :, border(G)].sum(2)
    return (length / region.sum(2).sqrt()).unflatten(1, (G, G))


def diffuse(values, colours):
    """values (B, G, G), averaged with neighbours of like colour (B, G, G, C). Edges stay."""
    down = (colours[:, 1:] - colours[:, :-1]).square().sum(3)  # (B, G-1, G)
    right = (colours[:, :, 1:] - colours[:, :, :-1]).square().sum(3)
    above = F.pad(likeness(down, BANDWIDTH), (0, 0, 1, 0))  # weight of the upper neighbour
    below = above.roll(-1, 1)
    before = F.pad(likeness(right, BANDWIDTH), (1, 0))
    after = before.roll(-1, 2)
    for _ in range(STEPS):
        column = above * values.roll(1, 1) + below * values.roll(-1, 1)
        row = before * values.roll(1, 2) + after * values.roll(-1, 2)
        values = (values + column + row) / (1 + above + below + before + after)
    return values


def coarse(images):
    """u8 (B, S, S, 3) -> probability of foreground, fp32 (B, GRID, GRID)."""
    lab = to_lab(images)
    colours = cells(lab, GRID)
    connected = boundary_connectivity(cells(lab, CONNECTIVITY_GRID)).add(0.01).log()
    connected = F.interpolate(connected[:, None], size=GRID, mode="bilinear")[:, 0]
    x = torch.linspace(-1, 1, GRID)
    centre = (-(x[:, None].square() + x.square()) / 0.8).exp().to(lab.device)  # 1 in the middle
    logit = WEIGHTS["colour"] * border_colour(colours).add(0.003).log()
    logit = logit + WEIGHTS["connectivity"] * connected
    logit = logit + WEIGHTS["centre"] * centre + WEIGHTS["bias"]
    return diffuse(logit, colours).sigmoid()


def saliency_rows(args, images, device):
    """-> GRID, no notes for the header, and a generator of u8 (B, GRID, GRID) of all images, in order."""
    where = torch.device("cpu") if device.type == "mps" else device  # Metal lacks the pooling
    chunks = torch.arange(len(images)).split(data.CHUNK)
    found = (coarse(data.take(images, index, where)) for index in chunks)
    return GRID, {}, ((255 * saliency).round().byte().cpu().numpy() for saliency in found)


# ---- parts: clusters of foreground tokens --------------------------------------------------------


def to_patches(maps, g):
    """(B, G, G) -> (B, g*g): the mean over each patch."""
    return F.adaptive_avg_pool2d(maps[:, None].float(), g).flatten(1)


@torch.no_grad()
def tokens_of(images, indices, encoder):
    """Yield (index, patch tokens fp32 (B, N, D) on the CPU) of the images `indices`, in order.

    Tokens leave the last block before the final LayerNorm. On the demo set, normalised tokens gave
    worse parts: an adjusted Rand index of 0.16 in place of 0.22.
    """
    device = encoder.cls_token.device
    for index, view in data.whole_views(images, indices, encoder.image_size, device):
        x = encoder.run_blocks(encoder.embed(*encoder.all_patches(view)))
        yield index, x[:, 1:].float().cpu()


def relative_to_foreground(tokens, foreground, place):
    """Tokens (B, N, D), foreground (B, N) bool, place (N, D) -> features of parts (B, N, D).

    Two means are subtracted. The mean of the picture's foreground holds its colours, by which whole
    pictures would cluster. Of the mean token of each place half remains: places tell parts apart.
    """
    apart = tokens - 0.5 * place
    weight = foreground[..., None].to(tokens.dtype)
    mean = (apart * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return apart - mean


def kmeans(x, K):
    """Points (n, D) -> K centres (K, D), the largest cluster first."""
    from sklearn.cluster import KMeans

    fit = KMeans(K, n_init=4, random_state=0).fit(x.numpy())
    sizes = np.bincount(fit.labels_, minlength=K)
    order = np.argsort(-sizes, kind="stable")
    return torch.from_numpy(fit.cluster_centers_[order])


def parts_of(tokens, foreground, place, centres):
    """-> u8 (B, N): 0 is background, 1..K the nearest of the centres (K, D)."""
    features = relative_to_foreground(tokens, foreground, place)
    label = torch.cdist(features, centres).argmin(2) + 1
    return torch.where(foreground, label, 0).to(torch.uint8)


def part_rows(args, images, device):
    """-> g, notes, and a generator of u8 (B, g, g) of all images, in order; the clusters are found first."""
    encoder = load_teacher(args.run).to(device)
    g, K = encoder.side, args.parts

    def chunks(indices):
        for index, tokens in tokens_of(images, indices, encoder):
            saliency = coarse(data.take(images, index, tokens.device))
            yield tokens, to_patches(saliency, g) > 0.5

    sample = list(chunks(data.evenly_spaced(len(images), SAMPLE)))
    total = sum(tokens.double().sum(0) for tokens, _ in sample)
    place = (total / min(len(images), SAMPLE)).float()  # the mean token of each place, (N, D)
    points = torch.cat([relative_to_foreground(x, fg, place)[fg] for x, fg in sample])
    if len(points) < K:
        raise UserError(f"--parts {K} are more than the {len(points)} patches of foreground found")
    centres = kmeans(points, K)
    labels = (parts_of(*chunk, place, centres) for chunk in chunks(torch.arange(len(images))))
    return g, {"parts": K}, (label.unflatten(1, (g, g)).numpy() for label in labels)


# ---- attention -----------------------------------------------------------------------------------


def attention_rows(args, images, device):
    """-> g, notes, and a generator of fp16 (B, g, g) of all images, in order."""
    encoder = load_teacher(args.run).to(device)
    g = encoder.side
    source = args.attention or guidance.default_attention(encoder, flags_of(args.run))
    if source == "pooler" and encoder.pooler is None:
        raise UserError("--attention pooler: --contrast pooler trains one; choose outlier")
    every = torch.arange(len(images))
    chunks = guidance.attention(encoder, images, every, source, EXACT)
    maps = (score.unflatten(1, (g, g)).half().cpu().numpy() for _, score in chunks)
    return g, {"source": source}, maps


# ---- all maps, and their files -------------------------------------------------------------------


@dataclass
class Kind:
    """What a map is for, how it is made, and how it is stored."""

    need: str  # what strategies of mask.py call it
    mask: str  # words behind --mask of pretrain.py that use it
    reads: set  # flags that it needs besides those of all maps
    rows: Callable  # of flags, images and device -> cells a side, notes for the header, chunks (B, G, G)
    dtype: str


KINDS = {
    "attn": Kind("attn", "attn_high --teacher maps", {"run", "attention"}, attention_rows, "F16"),
    "saliency": Kind("fg", "fg_heavy", set(), saliency_rows, "U8"),
    "parts": Kind("parts", "parts", {"run", "parts"}, part_rows, "U8"),
}


def write_maps(path, name, chunks, shape, dtype, header=None):
    """Write maps to a file, chunk (b, G, G) by chunk. Together they have the shape (n, G, G)."""
    rows = ({name: chunk} for chunk in chunks)
    write_rows(path, {name: (dtype, shape[1:])}, shape[0], rows, lambda: header or {})


def draw_sheet(path, name, folder, split, maps):
    """What each strategy hides whose score is known; maps (n, G, G) give one of the scores."""
    side = masks.SIDE if name == "saliency" else maps.shape[-1]
    indices, view = masks.images_of(split, side)
    where = {KINDS[name].need: path.parent}
    scores, _ = masks.read_scores(folder, split, indices, view, side, where)
    cells = torch.from_numpy(maps[indices.numpy()])
    shown = {name: cells.long() if name == "parts" else cells}
    strategies = masks.known_of(masking.STRATEGIES, scores)
    title = f"Hidden patches, by {name} maps"
    masks.draw_sheet(path, title, view, side, shown, strategies, scores)


# ---- the command ---------------------------------------------------------------------------------


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack")
    add("--map", required=True, choices=KINDS, help="what the maps show")
    add("--run", metavar="RUN", help="encoder: a run of pretrain.py; for all but saliency")
    add("--attention", choices=guidance.ATTENTION, help="default: what was trained, else outlier")
    add("--parts", type=between(1, 255, int), default=6, metavar="K", help="clusters (default: 6)")
    add("--out", metavar="DIR", help="folder to write to (default: maps/ and the name of the data)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args()
    reads = KINDS[args.map].reads
    refuse_useless(args.given - reads - {"data", "map", "out", "device"}, f"with --map {args.map}")
    if "run" in reads and not args.run:
        raise UserError(f"--map {args.map} needs an encoder of pretrain.py; add --run RUN")
    return args


def tell_next(kind, folder, out, split):
    """Print what to do with the maps."""
    words = ["python", "pretrain.py", "--data", folder, "--mask", *kind.mask.split()]
    has_truth = kind.need in split
    if has_truth:
        print(f"{folder} has true {guidance.TRUTH[kind.need]}: pretrain.py prefers them")
    if has_truth or out.resolve() != (Path("maps") / folder.name).resolve():
        words += ["--maps", out]
    print(f"next: {train.quoted(*words)}")


def main():
    args = parse_args()
    device = train.pick_device(args.device)
    folder = data.open_or_pack(args.data)
    split = data.open_split(folder, "train")
    name, kind = args.map, KINDS[args.map]
    out = Path(args.out or Path("maps") / folder.name)
    path, sheet = out / f"{name}.safetensors", out / f"sheet-{name}.png"
    reserve([path, sheet])
    images = split["images"]
    n = len(images)
    grid, notes, rows = kind.rows(args, images, device)
    bar = train.progress(rows, f"{folder.name}/{name}", math.ceil(n / data.CHUNK))
    header = {"map": name, "grid": grid, "by": args.run or "", "data": folder.name, "images": n}
    header |= {"data_digest": data.fingerprint(split), "commit": train.commit(), **notes}
    with aside(path) as made:
        write_maps(made, name, bar, (n, grid, grid), kind.dtype, header)
        with drawing(sheet.name):
            maps, _ = data.open_map(made, name, split)
            draw_sheet(made.with_name(sheet.name), name, folder, split, maps)
            del maps  # Windows renames no file that is open
    print(f"{path}: {n} maps of {grid} x {grid}; look at {sheet}")
    tell_next(kind, folder, out, split)


if __name__ == "__main__":
    cli(main)
