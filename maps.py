"""Stage 1: maps of a data set that masks are guided by: attention, figure (saliency), parts; once per image, in a file.

    python maps.py --data datasets/toon --map saliency

Reads:  datasets/NAME (the demo set is drawn if it is not there), runs/NAME where an encoder is asked for
Writes: maps/NAME/ saliency.safetensors, attn.safetensors or parts.safetensors, with what made it in the header, and
        sheet-saliency.png and so on: images, maps, and what each strategy hides by them at three ratios

    attn      f16 (n, g, g)  attention in an encoder's last block, mean over heads; g patches a side as in the encoder
    saliency  u8 (n, 32, 32) probability of figure, 255 is 1: coarse (colours alone) or refined (with an encoder)
    parts     u8 (n, g, g)   0 background, 1..K clusters of the encoder's features on the figure
"""

import argparse
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import mask as masking
from common import guidance, plots
from common.checkpoints import load_encoder
from common.evaluate import hidden_by
from common.io import UserError, cli
from common.train import autocast_of, commit, pick_device, pick_dtype, seeded

SAMPLE = 1024  # images that the mean token of each place and the codebook of parts are made from
SHEET_IMAGES, SHEET_RATIOS = 8, (0.5, 0.75, 0.9)
NEEDED_AS = {"attn": "attn", "saliency": "fg", "parts": "parts"}  # map: what strategies call it (masking.NEEDS)
FLAGS = {"attn": {"run", "source"}, "saliency": {"run", "quality"}, "parts": {"run", "quality", "parts"}}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack (default: the demo set)")
    add("--map", required=True, choices=FLAGS, help="attention, probability of figure, or parts of the figure")
    add("--run", metavar="RUN", help="encoder: a run of pretrain.py; for attn, parts and --quality refined")
    add(
        "--quality",
        choices=["coarse", "refined"],
        help="saliency from colours alone, or with the encoder (default: coarse; for parts: refined)",
    )
    add(
        "--source",
        choices=guidance.SOURCES,
        help="attention of CLS to a patch, of all patches to it, or how unusual its token is (default: as pretrain.py)",
    )
    add("--parts", type=int, metavar="K", help="parts of the figure, beside the background (default: 6)")
    add("--split", default="train", choices=["train", "dev", "val", "test"], help="whose images (default: train)")
    add("--out", metavar="DIR", help="folder to write to (default: maps/ and the name of the data)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the encoder's matrix products")
    return parser.parse_args()


def check(args):
    """What is missing, and what does not go together; then the defaults."""
    given = {name for name in ("run", "quality", "source", "parts") if getattr(args, name) is not None}
    if extra := given - FLAGS[args.map]:
        raise UserError(f"--{min(extra)} has no meaning for --map {args.map}; leave it out")
    args.quality = args.quality or {"saliency": "coarse", "parts": "refined"}.get(args.map)
    args.source = args.source or (guidance.default_source(args.run or "self") if args.map == "attn" else None)
    args.parts = 6 if args.parts is None and args.map == "parts" else args.parts
    if args.map == "saliency" and args.quality == "coarse":
        if args.run:
            raise UserError("--quality coarse uses no encoder; leave --run out, or say --quality refined")
    elif not args.run:
        raise UserError(f"--map {args.map}{' --quality refined' * (args.map == 'saliency')} needs an encoder; add "
                        "--run runs/NAME, which python pretrain.py makes")  # fmt: skip


# ---- saliency and parts: pure functions of tensors -------------------------------------------------------------------

GRID = 32  # cells a side of every saliency map, whatever the encoder's grid: view_maps resamples
CONNECTIVITY_GRID = 12  # all shortest paths between N cells cost N^3: 2 ms an image at 12, 8 ms at 16, AUC the same
BANDWIDTH = 8.0  # of a colour, in Lab units (about 2.3 are a just noticeable difference)
NOISE = 2.0  # Lab units that a step between neighbours may differ for free: grain is no edge
# Weights of the evidence in `coarse`: a logistic fit on composites of half of the portraits' identities and on train of
# the demo set; results are reported on the others. Threshold .5 leans on how large the figures of that mixture are.
WEIGHTS = dict(colour=-0.9, connectivity=-0.4, centre=1.55, bias=-2.4)

# ---- coarse: no weights of any network -------------------------------------------------------------------------------


def to_lab(images):
    """images u8 (B, S, S, 3), sRGB -> CIE Lab under D65, fp32 (B, S, S, 3): distances are what an eye would say."""
    rgb = torch.arange(256, device=images.device) / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)[images.long()]
    to_xyz = torch.tensor([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9502]]).T
    xyz = linear @ (to_xyz / to_xyz.sum(0)).to(images.device)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    L, a, b = 116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])
    return torch.stack([L, a, b], -1)


def cells(lab, G):
    """lab (B, S, S, 3) -> (B, G, G, 4): mean colour of each of G x G cells, and its deviation, a little texture."""
    x = lab.permute(0, 3, 1, 2)
    mean = F.adaptive_avg_pool2d(x, G)
    variance = (F.adaptive_avg_pool2d(x * x, G) - mean * mean).clamp(min=0).sum(1, keepdim=True)
    return torch.cat([mean, variance.sqrt()], 1).permute(0, 2, 3, 1)


def border(G):
    """(G*G,) bool: the cells of the upper, left and right edge. Figures stand on the lower edge: it says nothing."""
    edge = torch.zeros(G, G, dtype=torch.bool)
    edge[0] = edge[:, 0] = edge[:, -1] = True
    edge[-1, 1:-1] = False
    return edge.flatten()


def border_colour(colours):
    """colours (B, G, G, C) -> (B, G, G) in [0, 1]: the share of the border's cells that look like this one.

    A kernel density estimate of the background's colours, which may be several (a gradient, a screen tone): no number
    of clusters has to be guessed, and a figure that crosses the border adds only a small share.
    """
    x, edge = colours.flatten(1, 2), border(colours.shape[1])
    apart = torch.cdist(x, x[:, edge])  # (B, N, border cells)
    return (-apart.square() / (2 * BANDWIDTH**2)).exp().mean(2).unflatten(1, colours.shape[1:3])


def geodesic(colours):
    """colours (B, G, G, C) -> (B, N, N): the cheapest path between any two cells, over 8 neighbours.

    A step costs its difference of colour beyond NOISE, so a flat or slowly changing region is near to itself however
    far it stretches. Floyd and Warshall's algorithm, one cell at a time for the whole batch.
    """
    B, G, x = len(colours), colours.shape[1], colours.flatten(1, 2)
    distance = x.new_full((B, G * G, G * G), float("inf"))
    distance.diagonal(dim1=1, dim2=2).zero_()
    place = torch.arange(G * G).view(G, G)
    down, right = (place[:-1], place[1:]), (place[:, :-1], place[:, 1:])
    falling, rising = (place[:-1, :-1], place[1:, 1:]), (place[1:, :-1], place[:-1, 1:])
    for start, end in (down, right, falling, rising):
        i, j = start.flatten(), end.flatten()
        distance[:, i, j] = distance[:, j, i] = ((x[:, i] - x[:, j]).norm(dim=2) - NOISE).clamp(min=0)
    for k in range(G * G):
        torch.minimum(distance, distance[:, :, k, None] + distance[:, k, None, :], out=distance)
    return distance


def boundary_connectivity(colours, scale=10.0):
    """colours (B, G, G, C) -> (B, G, G): length of a cell's region on the border over the root of its area.

    High for background, low for a figure, even for one that touches the border (Zhu et al. 2014, "Saliency
    Optimization from Robust Background Detection", eq. 5-7; regions are soft, by geodesic distance).
    """
    region = (-geodesic(colours).square() / (2 * scale**2)).exp()  # (B, N, N): does j belong to i's region?
    length = region[:, :, border(colours.shape[1])].sum(2)
    return (length / region.sum(2).sqrt()).unflatten(1, colours.shape[1:3])


def centre_prior(G):
    """(G, G): 1 in the middle, falling off as a Gaussian."""
    x = torch.linspace(-1, 1, G)
    return (-(x[:, None].square() + x.square()) / 0.8).exp()


def diffuse(values, colours, steps=6):
    """values (B, G, G), colours (B, G, G, C) -> values averaged with neighbours of like colour, edges kept."""
    down = (-(colours[:, 1:] - colours[:, :-1]).square().sum(3) / (2 * BANDWIDTH**2)).exp()  # (B, G-1, G)
    right = (-(colours[:, :, 1:] - colours[:, :, :-1]).square().sum(3) / (2 * BANDWIDTH**2)).exp()
    above, below = F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1))  # weight of the upper and the lower neighbour
    left, beyond = F.pad(right, (1, 0)), F.pad(right, (0, 1))
    for _ in range(steps):
        column = above * values.roll(1, 1) + below * values.roll(-1, 1)
        row = left * values.roll(1, 2) + beyond * values.roll(-1, 2)
        values = (values + column + row) / (1 + above + below + left + beyond)
    return values


def coarse_logit(images):
    """images u8 (B, S, S, 3) -> log-odds of figure and the cells' colours, (B, GRID, GRID) and (B, GRID, GRID, 4)."""
    lab = to_lab(images)
    colours = cells(lab, GRID)
    connected = boundary_connectivity(cells(lab, CONNECTIVITY_GRID)).add(0.01).log()
    connected = F.interpolate(connected[:, None], size=GRID, mode="bilinear")[:, 0]
    logit = WEIGHTS["colour"] * border_colour(colours).add(0.003).log() + WEIGHTS["connectivity"] * connected
    logit = logit + WEIGHTS["centre"] * centre_prior(GRID).to(logit.device) + WEIGHTS["bias"]
    return diffuse(logit, colours), colours


def coarse(images):
    """images u8 (B, S, S, 3) -> probability of figure, (B, GRID, GRID): border colours, connectivity, centre."""
    return coarse_logit(images)[0].sigmoid()


# ---- refined: with the features of an encoder ------------------------------------------------------------------------


def to_patches(maps, g):
    """maps (B, G, G) -> (B, g*g): the mean over each patch."""
    return F.adaptive_avg_pool2d(maps[:, None].float(), g).flatten(1)


def last_tokens(encoder, view):
    """view u8 (B, S, S, 3) -> the patches' tokens (B, N, D) fp32 after the last block, before the final LayerNorm.

    On the demo set the normalised ones gave worse parts (adjusted Rand index .16 against .22) and equal cuts.
    """
    x = encoder.embed(*encoder.all_patches(view))
    for block in encoder.blocks:
        x = block(x)
    return x[:, 1:].float()


def contrast(tokens, place):
    """Patch tokens (B, N, D), their mean over many images at each place (N, D) -> unit vectors (B, N, D).

    Takes away what a token says because of where it stands (a masked autoencoder's tokens know their positions well)
    and what all patches of the picture share; what is left is how a patch differs from the others.
    """
    apart = tokens - place
    return F.normalize(apart - apart.mean(1, keepdim=True), dim=2)


def standardized(x):
    """(B, N) -> mean 0 and deviation 1 in each row; 0 where a row is constant."""
    centred = x - x.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > 1e-6, centred / deviation.clamp(min=1e-6), 0.0)


def normalized_cut(features, temperature=0.2):
    """Unit vectors (B, N, D) -> (B, N): on which side of the best cut each patch lies, mean 0 and deviation 1.

    The second smallest eigenvector of (D - W) x = lambda D x, W = exp(cosine / temperature) (Shi and Malik 2000; on
    an encoder's features TokenCut, Wang et al. 2022, arXiv:2202.11539). Its sign is arbitrary.
    """
    W = (features @ features.transpose(1, 2) / temperature).exp().cpu()  # eigh is exact and batched there
    root = W.sum(2).rsqrt()  # (B, N), D^-1/2
    _, vectors = torch.linalg.eigh(root[:, :, None] * W * root[:, None])  # ascending: of I - L, so the last is trivial
    return standardized((vectors[:, :, -2] * root * len(features[0]) ** 0.5).to(features.device))


def refined(images, tokens, place):
    """images u8 (B, S, S, 3), their patch tokens (B, N, D), place (N, D) -> probability of figure, (B, GRID, GRID).

    The cut alone ranks patches worse than `coarse` does, because in some pictures it parts hair from face or left from
    right. So it counts as much as it agrees with the coarse map: it is added to the log-odds times their correlation,
    which also gives it its sign (results/LOG.md, "refined saliency").
    """
    logit, colours = coarse_logit(images)
    g = round(tokens.shape[1] ** 0.5)
    side = normalized_cut(contrast(tokens, place))  # (B, N)
    correlation = (side * standardized(to_patches(logit, g))).mean(1, keepdim=True)
    cut = F.interpolate((correlation * side).view(-1, 1, g, g), size=GRID, mode="bilinear")[:, 0]
    return diffuse(logit + cut, colours).sigmoid()


# ---- parts: clusters of figure patches -------------------------------------------------------------------------------


def relative_to_figure(tokens, figure, place):
    """Patch tokens (B, N, D), figure (B, N) bool, place (N, D) -> what parts are told apart by, (B, N, D).

    The mean over the picture's own figure is taken away: it holds the picture's colours, by which whole pictures would
    cluster instead of parts. Of what each place has in common half is left: a part is also known by where it is.
    """
    apart, weight = tokens - 0.5 * place, figure[..., None].to(tokens.dtype)
    return apart - (apart * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def kmeans(x, K, generator, tries=4, steps=50):
    """x (n, D) -> K centres (K, D), the largest cluster first. n < K repeats points.

    Lloyd's iterations from k-means++ seeds (Arthur and Vassilvitskii 2007); the best of several tries. The generator
    is a CPU one, so that the same seed gives the same centres.
    """
    best, least = None, float("inf")
    for _ in range(tries):
        centres = seeds(x, K, generator)
        for _ in range(steps):
            label = torch.cdist(x, centres).argmin(1)
            member = F.one_hot(label, K).to(x.dtype)  # (n, K)
            count = member.sum(0)[:, None]
            moved = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        distance, label = torch.cdist(x, centres).min(1)
        if distance.square().sum() < least:
            least = distance.square().sum()
            best = centres[torch.bincount(label, minlength=K).argsort(descending=True, stable=True)]
    return best


def seeds(x, K, generator):
    """k-means++: each further seed is drawn with odds proportional to its squared distance from those there are."""
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    for _ in range(K - 1):
        odds = nearest.double().cpu().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * odds[-1]
        chosen.append(min(int(torch.searchsorted(odds, draw, right=True)), len(x) - 1))
        nearest = nearest.minimum((x - x[chosen[-1]]).square().sum(1))
    return x[chosen]


def parts_of(tokens, figure, place, centres):
    """Tokens (B, N, D), figure (B, N) bool, centres (K, D) -> u8 (B, N): 0 is background, 1..K the nearest centre."""
    label = torch.cdist(relative_to_figure(tokens, figure, place), centres).argmin(2) + 1
    return torch.where(figure, label, 0).to(torch.uint8)


# ---- what the encoder says of whole images, a chunk at a time -------------------------------------------------------


@torch.no_grad()
def tokens_of(images, rows, encoder, image_size, device, autocast):
    """Yield (images u8 (B, S, S, 3), patch tokens fp32 (B, N, D)) of rows (i64), in order."""
    for index in rows.split(data.CHUNK):
        batch = data.take(images, index, device)
        view = data.view_images(batch, *data.full_boxes(len(index)), image_size)
        with autocast():
            tokens = last_tokens(encoder, view)
        yield batch.to(home(device)), tokens.to(home(device))


def home(device):
    """Where maps.py computes: Metal has no eigh, and no pooling to a grid that does not divide the picture."""
    return torch.device("cpu") if device.type == "mps" else device


def mean_of_places(stream):
    """What the tokens at each place have in common: their mean over a sample of images, (N, D)."""
    total, count = 0, 0
    for _, tokens in stream:
        total, count = total + tokens.double().sum(0), count + len(tokens)
    return (total / count).float()


def fit_parts(stream, figure_of, place, K):
    """A codebook (K, D) for the whole data set: k-means over the figures' patches of a sample of images."""
    chosen = []
    for images, tokens in stream:
        figure = figure_of(images, tokens)
        chosen.append(relative_to_figure(tokens, figure, place)[figure])
    points = torch.cat(chosen)
    if len(points) < K:
        raise UserError(f"--parts {K} are more than the {len(points)} patches of figure that were found")
    return kmeans(points[:: math.ceil(len(points) / 20000)], K, seeded(0))


# ---- the three maps: each yields chunks of rows, in the order of the images -----------------------------------------


def coarse_rows(images, rows, device):
    for index in rows.split(data.CHUNK):
        yield as_bytes(coarse(data.take(images, index, home(device))))


def refined_rows(stream, place):
    for images, tokens in stream:
        yield as_bytes(refined(images, tokens, place))


def part_rows(stream, figure_of, place, centres, side):
    for images, tokens in stream:
        yield (
            parts_of(tokens, figure_of(images, tokens), place, centres).unflatten(1, (side, -1)).cpu().numpy()
        )


def as_bytes(probability):
    return (probability * 255).round().to(torch.uint8).cpu().numpy()


def figure_mask(images, tokens, place, quality, side):
    """Which patches are figure, (B, N) bool."""
    chance = refined(images, tokens, place) if quality == "refined" else coarse(images)
    return to_patches(chance, side) > 0.5


def rows_of_map(args, images, device):
    """-> (grid, dtype, generator of chunks) of the map that was asked for."""
    every, some = torch.arange(len(images)), data.evenly_spaced(len(images), SAMPLE)
    if args.map == "saliency" and args.quality == "coarse":
        return GRID, "U8", coarse_rows(images, every, device)
    encoder, size = load_encoder(args.run)
    encoder.to(device)
    autocast = autocast_of(device, pick_dtype(args.dtype, device)[0])
    if args.map == "attn":
        return encoder.side, "F16", guidance.attention_rows(images, encoder, size, args.source, autocast)
    if args.map == "parts" and not 1 <= args.parts <= min(encoder.side**2, 255):
        raise UserError(f"--parts {args.parts} must lie between 1 and the {encoder.side**2} patches of {args.run}")
    stream = functools.partial(tokens_of, images, encoder=encoder, image_size=size, device=device,
                               autocast=autocast)  # fmt: skip
    place = mean_of_places(stream(some))
    if args.map == "saliency":
        return GRID, "U8", refined_rows(stream(every), place)
    figure_of = functools.partial(figure_mask, place=place, quality=args.quality, side=encoder.side)
    centres = fit_parts(stream(some), figure_of, place, args.parts)
    return encoder.side, "U8", part_rows(stream(every), figure_of, place, centres, encoder.side)


# ---- the sheet ------------------------------------------------------------------------------------------------------


def draw_sheet(path, name, images, maps, parts):
    """images u8 (n, S, S, 3), maps (n, g, g) of them: what the strategies that need this map hide, and the controls."""
    g = 12 if name == "saliency" else maps.shape[-1]  # as with the demo's network; saliency has no encoder's grid
    known = {NEEDED_AS[name]: known_of(name, maps, g, parts)}
    guided = [s for s in masking.STRATEGIES if masking.NEEDS.get(s) == NEEDED_AS[name]]
    shuffled = {key: value.roll(1, 0) for key, value in known.items()}
    columns = [(s, hidden_by(s, known, g, len(images), SHEET_RATIOS)) for s in guided]
    columns += [(f"{s}\nshuffled", hidden_by(s, shuffled, g, len(images), SHEET_RATIOS)) for s in guided[:1]]
    controls = [s for s in masking.STRATEGIES if s not in masking.NEEDS]
    columns += [(s, hidden_by(s, {}, g, len(images), SHEET_RATIOS)) for s in controls]
    plots.mask_sheet(path, f"What each strategy hides, by {name} maps", images, [(name, maps)], columns)


def known_of(name, maps, g, parts):
    """maps (n, G, G) of whole images -> what the strategies get: (n, g*g), or (n, g*g, 1 + parts) shares of parts."""
    if name == "parts":
        return torch.nn.functional.one_hot(maps.flatten(1).long(), 1 + parts).float()
    return to_patches(maps, g) / (255 if name == "saliency" else 1)


def main():
    args = parse_args()
    check(args)
    device = pick_device(args.device)
    folder = data.open_or_pack(args.data)
    split = data.open_split(folder, args.split)
    path = data.map_file(args.out or Path("maps") / folder.name, args.map, split)
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or give another --out")
    grid, dtype, rows = rows_of_map(args, split["images"], device)
    n = len(split["images"])
    header = {"map": args.map, "quality": args.quality, "source": args.source, "parts": args.parts, "grid": grid,
              "by": args.run or "", "data": folder.name, "split": args.split, "images": n,
              "data_digest": data.fingerprint(split), "commit": commit()}  # fmt: skip
    header = {key: value for key, value in header.items() if value is not None}
    bar = tqdm(rows, f"{folder.name}/{path.stem}", math.ceil(n / data.CHUNK), disable=None)
    data.write_maps(path, args.map, bar, (n, grid, grid), dtype, header)
    shown = data.evenly_spaced(n, SHEET_IMAGES)
    sheet = path.with_name(f"sheet-{path.stem}.png")
    maps = torch.from_numpy(data.open_map(path, args.map, split)[shown.numpy()])
    draw_sheet(sheet, args.map, split["images"][shown.numpy()], maps, args.parts)
    strategy = next((s for s in masking.STRATEGIES if masking.NEEDS.get(s) == NEEDED_AS[args.map]), "random")
    print(f"{path}: {n} maps of {grid} x {grid}; look at {sheet}\n"
          f"next: python pretrain.py --data {folder} --mask {strategy}")  # fmt: skip


if __name__ == "__main__":
    cli(main)
