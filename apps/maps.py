"""Stage 1: maps of a data set that guide masks: attention, foreground (saliency) and parts, stored in files.

    python -m apps.maps --data datasets/toon --map saliency
    python -m apps.maps --data datasets/toon --map attn --run runs/NAME

Reads:  train of datasets/NAME (the demo set is drawn if absent), runs/NAME for an encoder
Writes: maps/NAME/MAP.safetensors, and sheet-MAP.png: what strategies hide by it

    attn      f16 (n, g, g)    attention of an encoder, mean over heads, g patches a side
    saliency  u8 (n, 32, 32)   estimated probability of foreground, by colour and place; 255 is 1
    parts     u8 (n, g, g)     0 background, 1..K clusters of foreground tokens, the largest first

    B images   S their side   G cells a side   N = g * g patches   D channels   K clusters
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import mask as masking
from apps import masks
from common import guidance
from common.checkpoints import flags_of, load_teacher
from common.door import aside, drawing
from common.locks import reserve
from common.rows import write_rows
from common.train import (
    Parser,
    UserError,
    between,
    cli,
    commit,
    pick_device,
    progress,
    quoted,
    refuse_useless,
)

SAMPLE = 1024  # images that give the mean token of each place and the clusters of parts
EXACT = contextlib.nullcontext  # fp32: maps are made once, and are nearly the same on every machine
NEEDED_AS = {name: need for need, name in guidance.MAPS.items()}  # map: its need in mask.py
GUIDES = {"attn": ["attn_high", "--teacher", "maps"], "saliency": ["fg_heavy"], "parts": ["parts"]}
TAKES = {"attn": {"run", "attention"}, "saliency": set(), "parts": {"run", "parts"}}  # flags


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack")
    add("--map", required=True, choices=TAKES, help="what the maps show")
    add("--run", metavar="RUN", help="encoder: a run of pretrain.py; for all but saliency")
    add("--attention", choices=guidance.ATTENTION, help="default: what was trained, else outlier")
    add("--parts", type=between(1, 255, int), default=6, metavar="K", help="clusters (default: 6)")
    add("--out", metavar="DIR", help="folder to write to (default: maps/ and the name of the data)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args()
    takes = TAKES[args.map] | {"data", "map", "out", "device"}
    refuse_useless(args.given - takes, f"with --map {args.map}")
    if "run" in takes and not args.run:
        raise UserError(f"--map {args.map} needs an encoder of pretrain.py; add --run RUN")
    return args


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


def saliency_rows(images, device):
    """Yield u8 (B, GRID, GRID) of all images, in order."""
    for index in torch.arange(len(images)).split(data.CHUNK):
        saliency = coarse(data.take(images, index, device))
        yield (255 * saliency).round().byte().cpu().numpy()


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


def part_rows(images, encoder, K):
    """-> generator of u8 (B, g, g) of all images, in order; the clusters are found first."""
    g = encoder.side

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
    return (label.unflatten(1, (g, g)).numpy() for label in labels)


def attention_rows(images, encoder, kind):
    """Yield (b, g, g) fp16 of all images, in order: the chunks of a file of maps."""
    for _, score in guidance.attention(encoder, images, torch.arange(len(images)), kind, EXACT):
        yield score.unflatten(1, (encoder.side, -1)).half().cpu().numpy()


def rows_of_map(args, images, device):
    """-> cells a side, dtype and chunks (B, G, G) of the map, in the order of the images."""
    if args.map == "saliency":
        where = torch.device("cpu") if device.type == "mps" else device  # Metal lacks the pooling
        return GRID, "U8", saliency_rows(images, where)
    encoder = load_teacher(args.run).to(device)
    if args.map == "parts":
        return encoder.side, "U8", part_rows(images, encoder, args.parts)
    args.attention = args.attention or guidance.default_attention(encoder, flags_of(args.run))
    if args.attention == "pooler" and encoder.pooler is None:
        raise UserError("--attention pooler: --contrast pooler trains one; choose outlier")
    return encoder.side, "F16", attention_rows(images, encoder, args.attention)


def write_maps(path, name, chunks, shape, dtype, header=None):
    """Write maps to a file, chunk (b, G, G) by chunk. Together they have the shape (n, G, G)."""
    rows = ({name: chunk} for chunk in chunks)
    write_rows(path, {name: (dtype, shape[1:])}, shape[0], rows, lambda: header or {})


# ---- the command ---------------------------------------------------------------------------------


def draw_sheet(path, args, folder, split, maps):
    """What each strategy hides whose score is known; maps (n, G, G) give one of the scores."""
    indices = data.evenly_spaced(len(maps), masks.SHOWN)
    side = masks.SIDE if args.map == "saliency" else maps.shape[-1]
    view = masks.whole_images(split["images"], indices, side)
    where = {NEEDED_AS[args.map]: path.parent}
    scores, _ = masks.read_scores(folder, split, indices, view, side, where)
    known = (name for name in masking.STRATEGIES if masking.NEEDS.get(name) in (None, *scores))
    strategies = {name: masking.STRATEGIES[name] for name in known}
    cells = torch.from_numpy(maps[indices.numpy()])
    shown = {args.map: cells.long() if args.map == "parts" else cells}
    title = f"Hidden patches, by {args.map} maps"
    masks.draw_sheet(path, title, view, side, shown, strategies, scores)


def advice(args, folder, out, split):
    """-> lines that say what to do with the maps."""
    need = NEEDED_AS[args.map]
    words = ["python", "pretrain.py", "--data", str(folder), "--mask", *GUIDES[args.map]]
    if need in split or out.resolve() != (Path("maps") / folder.name).resolve():
        words += ["--maps", str(out)]
    known = f"{folder} has true {guidance.TRUTH.get(need)}: pretrain.py prefers them\n"
    return f"{known if need in split else ''}next: {quoted(*words)}"


def main():
    args = parse_args()
    device = pick_device(args.device)
    folder = data.open_or_pack(args.data)
    split = data.open_split(folder, "train")
    out = Path(args.out or Path("maps") / folder.name)
    path = out / f"{args.map}.safetensors"
    sheet = out / f"sheet-{args.map}.png"
    reserve([path, sheet])
    images = split["images"]
    n = len(images)
    grid, dtype, rows = rows_of_map(args, images, device)
    bar = progress(rows, f"{folder.name}/{args.map}", math.ceil(n / data.CHUNK))
    header = {"map": args.map, "grid": grid, "by": args.run or "", "data": folder.name}
    header |= {"images": n, "data_digest": data.fingerprint(split), "commit": commit()}
    header |= {"attn": {"source": args.attention}, "parts": {"parts": args.parts}}.get(args.map, {})
    with aside(path) as made:
        write_maps(made, args.map, bar, (n, grid, grid), dtype, header)
        with drawing(sheet.name):
            maps, _ = data.open_map(made, args.map, split)
            draw_sheet(made.with_name(sheet.name), args, folder, split, maps)
            del maps  # Windows renames no file that is open
    print(f"{path}: {n} maps of {grid} x {grid}; look at {sheet}")
    print(advice(args, folder, out, split))


if __name__ == "__main__":
    cli(main)
