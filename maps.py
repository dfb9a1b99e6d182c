"""Stage 1: maps of a data set that masks are guided by: attention, foreground (saliency), parts; once, in a file.

    python maps.py --data datasets/toon --map saliency
    python maps.py --data datasets/toon --map all --run runs/NAME      only a picture: every \\
        strategy on the same faces

A set that has exact masks of its own, such as pictures with alpha, needs no maps of foreground:
they are estimates.

Reads:  datasets/NAME (the demo set is drawn if it is not there), runs/NAME where an encoder is
        asked for
Writes: maps/NAME/ saliency.safetensors, attn.safetensors or parts.safetensors, with what made it in
the header, and
        sheet-saliency.png and so on: images, maps, and what each strategy hides by them at three
        ratios;
        strategies-RUN.png where all were asked for

    attn      f16 (n, g, g)  attention in an encoder's last block, mean over heads; g patches a side
              as in the encoder
    saliency  u8 (n, 32, 32) probability of foreground, 255 is 1: coarse (colours alone) or refined
              (with an encoder)
    parts     u8 (n, g, g)   0 background, 1..K clusters of the encoder's features on the
              foreground, the largest first:
                             numbers, no names; what a cluster shows is seen on the sheet
"""

import math
import re
import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import mask as masking
from common import guidance
from common.checkpoints import ENCODER, beside, flags_of, init_from, load_beside, load_teacher
from common.command import (
    Parser,
    between,
    claim,
    cli,
    command,
    progress,
    refuse_file,
    refuse_idle,
)
from common.evaluate import hide_at_random, predict
from common.features import name_of
from common.io import UserError
from common.train import autocast_of, commit, pick_device, pick_dtype, seeded
from kernels.loss import patch_detail, patch_error
from model import MAE

SAMPLE = 1024  # images that the mean token of each place and the codebook of parts are made from
SHEET_RATIOS, DRAWS = (
    (0.5, 0.75, 0.9),
    12,
)  # DRAWS: random masks that a patch's difficulty is the mean of
NEEDED_AS = {
    name: need for need, name in guidance.IN_FILES.items()
}  # map: what strategies call it (masking.NEEDS)
MAPS = ("attn", "saliency", "parts", "all")


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--data",
        default="datasets/toon",
        metavar="DIR",
        help="packed set, or images to pack (default: the demo set)",
    )
    add(
        "--map",
        required=True,
        choices=MAPS,
        help="attention, probability of foreground, or parts of it; all: a "
        "sheet\nof every strategy, by a run and the true masks",
    )
    add("--run", metavar="RUN", help="encoder: a run of pretrain.py; for all but coarse saliency")
    add(
        "--quality",
        choices=["coarse", "refined"],
        help="saliency from colours alone, or with the encoder (default: coarse; for parts: refined)",
    )
    add(
        "--source",
        choices=guidance.SOURCES,
        help="as --attention of pretrain.py (default: what was trained)",
    )
    add(
        "--parts",
        type=between(1, 255, int),
        metavar="K",
        help="parts of the foreground (default: 6)",
    )
    add(
        "--split",
        default="train",
        choices=["train", "dev", "val", "test"],
        help="whose images (default: train)",
    )
    add("--out", metavar="DIR", help="folder to write to (default: maps/ and the name of the data)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "bf16", "fp32"],
        help="of the encoder's matrix products",
    )
    return parser.parse_args()


def check(args):
    """What is missing, and what does not go together; then the defaults."""
    args.quality = args.quality or {"saliency": "coarse", "parts": "refined"}.get(args.map)
    by_colours = args.map == "saliency" and args.quality == "coarse"
    own = {"attn": "source", "saliency": "quality", "parts": "quality parts", "all": ""}[args.map]
    takes = {"data", "map", "run", "split", "out", "device", "dtype", *own.split()}
    refuse_idle(args.given - takes, f"with --map {args.map}")
    if by_colours:
        idle = args.given & {"run", "dtype"}
        refuse_idle(idle, "with coarse saliency, which needs no encoder (--quality refined does)")
    refuse_file(args.out or "maps")
    if args.map == "attn" and args.run:
        args.source = args.source or guidance.default_source(flags_of(args.run), args.run)
    args.parts = 6 if args.parts is None and args.map == "parts" else args.parts
    if not by_colours and not args.run:
        raise UserError(
            f"--map {args.map}{' --quality refined' * (args.map == 'saliency')} needs an encoder; add "
            "--run runs/NAME, which python pretrain.py makes"
        )


# ---- coarse saliency: no weights of any network --------------------------------------------------

GRID = 32  # cells a side of every saliency map, whatever the encoder's grid: view_maps resamples
CONNECTIVITY_GRID = (
    12  # all shortest paths between N cells cost N^3: 2 ms an image at 12, 8 ms at 16, AUC the same
)
BANDWIDTH = 8.0  # of a colour, in Lab units (about 2.3 are a just noticeable difference)
NOISE = 2.0  # Lab units that a step between neighbours may differ for free: grain is no edge
# Weights of the evidence in `coarse`: a logistic fit on composites of half of the portraits'
# identities and on train of the demo set; results are reported on the others. Threshold .5 depends
# on how large that mixture's foregrounds are.
WEIGHTS = dict(colour=-0.9, connectivity=-0.4, centre=1.55, bias=-2.4)


def to_lab(images):
    """images u8 (B, S, S, 3), sRGB -> CIE Lab under D65, fp32 (B, S, S, 3): distances are what an
    eye would say.
    """
    rgb = torch.arange(256, device=images.device) / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)[images.long()]
    to_xyz = torch.tensor(
        [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9502]]
    ).T
    xyz = linear @ (to_xyz / to_xyz.sum(0)).to(images.device)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    L, a, b = 116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])
    return torch.stack([L, a, b], -1)


def cells(lab, G):
    """lab (B, S, S, 3) -> (B, G, G, 4): mean colour of each of G x G cells, and its std, a little
    texture.
    """
    x = lab.permute(0, 3, 1, 2)
    mean = F.adaptive_avg_pool2d(x, G)
    variance = (F.adaptive_avg_pool2d(x * x, G) - mean * mean).clamp(min=0).sum(1, keepdim=True)
    return torch.cat([mean, variance.sqrt()], 1).permute(0, 2, 3, 1)


def border(G):
    """(G*G,) bool: the cells of the upper, left and right edge. People stand on the lower edge: it
    says nothing.
    """
    edge = torch.ones(G, G, dtype=torch.bool)
    edge[1:, 1:-1] = False
    return edge.flatten()


def border_colour(colours):
    """colours (B, G, G, C) -> (B, G, G) in [0, 1]: the share of the border's cells that look like
    this one.

    A kernel density estimate of the background's colours, which may be several: a gradient, a
    screen tone.
    """
    x, edge = colours.flatten(1, 2), border(colours.shape[1])
    apart = torch.cdist(x, x[:, edge])  # (B, N, border cells)
    return (-apart.square() / (2 * BANDWIDTH**2)).exp().mean(2).unflatten(1, colours.shape[1:3])


def geodesic(colours):
    """colours (B, G, G, C) -> (B, N, N): the cheapest path between any two cells, over 8
    neighbours.

    A step costs its difference of colour beyond NOISE: a flat region is near to itself however far
    it stretches. Floyd and Warshall's algorithm.
    """
    B, G, x = len(colours), colours.shape[1], colours.flatten(1, 2)
    distance = x.new_full((B, G * G, G * G), float("inf"))
    distance.diagonal(dim1=1, dim2=2).zero_()
    place = torch.arange(G * G).view(G, G)
    down, right = (place[:-1], place[1:]), (place[:, :-1], place[:, 1:])
    falling, rising = (place[:-1, :-1], place[1:, 1:]), (place[1:, :-1], place[:-1, 1:])
    for start, end in (down, right, falling, rising):
        i, j = start.flatten(), end.flatten()
        distance[:, i, j] = distance[:, j, i] = ((x[:, i] - x[:, j]).norm(dim=2) - NOISE).clamp(
            min=0
        )
    for k in range(G * G):
        torch.minimum(distance, distance[:, :, k, None] + distance[:, k, None, :], out=distance)
    return distance


def boundary_connectivity(colours, scale=10.0):
    """colours (B, G, G, C) -> (B, G, G): length of a cell's region on the border over the root of
    its area.

    High for background, low for foreground, even where it touches the border (Zhu et al. 2014,
    "Saliency Optimization from Robust Background Detection", eq. 5-7; regions are soft, by geodesic
    distance).
    """
    region = (
        -geodesic(colours).square() / (2 * scale**2)
    ).exp()  # (B, N, N): does j belong to i's region?
    length = region[:, :, border(colours.shape[1])].sum(2)
    return (length / region.sum(2).sqrt()).unflatten(1, colours.shape[1:3])


def diffuse(values, colours, steps=6):
    """values (B, G, G), colours (B, G, G, C) -> values averaged with neighbours of like colour,
    edges kept.
    """
    down = (
        -(colours[:, 1:] - colours[:, :-1]).square().sum(3) / (2 * BANDWIDTH**2)
    ).exp()  # (B, G-1, G)
    right = (-(colours[:, :, 1:] - colours[:, :, :-1]).square().sum(3) / (2 * BANDWIDTH**2)).exp()
    above, below = (
        F.pad(down, (0, 0, 1, 0)),
        F.pad(down, (0, 0, 0, 1)),
    )  # weight of the upper and the lower neighbour
    left, beyond = F.pad(right, (1, 0)), F.pad(right, (0, 1))
    for _ in range(steps):
        column = above * values.roll(1, 1) + below * values.roll(-1, 1)
        row = left * values.roll(1, 2) + beyond * values.roll(-1, 2)
        values = (values + column + row) / (1 + above + below + left + beyond)
    return values


def coarse_logit(images):
    """images u8 (B, S, S, 3) -> log-odds of foreground (B, GRID, GRID), the cells' colours (B,
    GRID, GRID, 4).
    """
    lab = to_lab(images)
    colours = cells(lab, GRID)
    connected = boundary_connectivity(cells(lab, CONNECTIVITY_GRID)).add(0.01).log()
    connected = F.interpolate(connected[:, None], size=GRID, mode="bilinear")[:, 0]
    x = torch.linspace(-1, 1, GRID)
    centre = (
        (-(x[:, None].square() + x.square()) / 0.8).exp().to(lab.device)
    )  # 1 in the middle, falls as a Gaussian
    logit = (
        WEIGHTS["colour"] * border_colour(colours).add(0.003).log()
        + WEIGHTS["connectivity"] * connected
    )
    logit = logit + WEIGHTS["centre"] * centre + WEIGHTS["bias"]
    return diffuse(logit, colours), colours


def coarse(images):
    """images u8 (B, S, S, 3) -> probability of foreground, (B, GRID, GRID), by colours alone."""
    return coarse_logit(images)[0].sigmoid()


# ---- refined saliency: with the features of an encoder -------------------------------------------


def to_patches(maps, g):
    """maps (B, G, G) -> (B, g*g): the mean over each patch."""
    return F.adaptive_avg_pool2d(maps[:, None].float(), g).flatten(1)


def contrast(tokens, place):
    """Patch tokens (B, N, D), their mean over many images at each place (N, D) -> unit vectors (B,
    N, D).

    Without what a token says because of its place, and without what all patches of the picture
    share.
    """
    apart = tokens - place
    return F.normalize(apart - apart.mean(1, keepdim=True), dim=2)


def normalized_cut(features, temperature=0.2):
    """Unit vectors (B, N, D) -> (B, N): on which side of the best cut each patch lies, mean 0 and
    std 1.

    The second smallest eigenvector of (D - W) x = lambda D x, W = exp(cosine / temperature) (Shi
    and Malik 2000; on an encoder's features TokenCut, Wang et al. 2022, arXiv:2202.11539). Its sign
    is arbitrary.
    """
    W = (
        (features @ features.transpose(1, 2) / temperature).exp().cpu()
    )  # eigh is exact and batched there
    root = W.sum(2).rsqrt()  # (B, N), D^-1/2
    _, vectors = torch.linalg.eigh(
        root[:, :, None] * W * root[:, None]
    )  # ascending: of I - L, so the last is trivial
    return masking.standard_score(
        (vectors[:, :, -2] * root * len(features[0]) ** 0.5).to(features.device)
    )


def refined(images, tokens, place):
    """images u8 (B, S, S, 3), their patch tokens (B, N, D), place (N, D) -> probability of
    foreground, (B, GRID, GRID).

    The cut alone ranks patches worse than `coarse` does: in some pictures it parts hair from face.
    It is added to the log-odds times its correlation with them, which also gives it its sign
    (results/LOG.md, "refined saliency").
    """
    logit, colours = coarse_logit(images)
    g = round(tokens.shape[1] ** 0.5)
    side = normalized_cut(contrast(tokens, place))  # (B, N)
    correlation = (side * masking.standard_score(to_patches(logit, g))).mean(1, keepdim=True)
    cut = F.interpolate((correlation * side).view(-1, 1, g, g), size=GRID, mode="bilinear")[:, 0]
    return diffuse(logit + cut, colours).sigmoid()


# ---- parts: clusters of foreground patches -------------------------------------------------------


def relative_to_foreground(tokens, foreground, place):
    """Patch tokens (B, N, D), foreground (B, N) bool, place (N, D) -> what parts are told apart by,
    (B, N, D).

    The mean over the picture's own foreground is taken away: it holds the picture's colours, by
    which whole pictures would cluster instead of parts. Of what each place has in common half is
    left: a part is known by its place, too.
    """
    apart, weight = tokens - 0.5 * place, foreground[..., None].to(tokens.dtype)
    return apart - (apart * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def kmeans(x, K, generator, tries=4, steps=50):
    """x (n, D) -> K centres (K, D), the largest cluster first. n < K repeats points.

    Lloyd's iterations; the best of several tries. scikit-learn's KMeans finds other parts, as good
    as these: the figures of results/truth.csv are of these. The generator is a CPU one: the same
    seed gives the same centres.
    """
    best, least = None, float("inf")
    for _ in range(tries):
        centres = first_centres(x, K, generator)
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


def first_centres(x, K, generator):
    """k-means++ (Arthur and Vassilvitskii 2007): each is drawn with odds of its squared distance
    from those before.
    """
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    for _ in range(K - 1):
        odds = nearest.double().cpu().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * odds[-1]
        chosen.append(min(int(torch.searchsorted(odds, draw, right=True)), len(x) - 1))
        nearest = nearest.minimum((x - x[chosen[-1]]).square().sum(1))
    return x[chosen]


def parts_of(tokens, foreground, place, centres):
    """Tokens (B, N, D), foreground (B, N) bool, centres (K, D) -> u8 (B, N): 0 is background, 1..K
    the nearest.
    """
    label = torch.cdist(relative_to_foreground(tokens, foreground, place), centres).argmin(2) + 1
    return torch.where(foreground, label, 0).to(torch.uint8)


# ---- what the encoder says of whole images, a chunk at a time ------------------------------------


def home(device):
    """Where maps are computed: Metal has no eigh, and no pooling to a grid that does not divide the
    picture.
    """
    return torch.device("cpu") if device.type == "mps" else device


@torch.no_grad()
def tokens_of(images, rows, encoder, image_size, device, autocast):
    """Yield (images u8 (B, S, S, 3), patch tokens fp32 (B, N, D)) of rows (i64), in order.

    Tokens after the last block, before the final LayerNorm: on the demo set the normalised ones
    gave worse parts (adjusted Rand index .16 against .22) and equal cuts.
    """
    for index, view in data.whole_views(images, rows, image_size, device):
        with autocast():
            x = encoder.embed(*encoder.all_patches(view))
            for block in encoder.blocks:
                x = block(x)
        yield data.take(images, index, home(device)), x[:, 1:].float().to(home(device))


def with_foreground(stream, place, quality):
    """Yield (tokens (B, N, D), which patches are foreground (B, N) bool) of a stream of (images,
    tokens).
    """
    for images, tokens in stream:
        probability = refined(images, tokens, place) if quality == "refined" else coarse(images)
        yield tokens, to_patches(probability, math.isqrt(len(place))) > 0.5


def rows_of_map(args, images, device):
    """-> (g, dtype, generator of chunks (b, g, g)) of the map that was asked for, in the order of
    the images.
    """
    every, some = torch.arange(len(images)), data.evenly_spaced(len(images), SAMPLE)
    if args.map == "saliency" and args.quality == "coarse":
        chunks = (data.take(images, index, home(device)) for index in every.split(data.CHUNK))
        return GRID, "U8", ((255 * coarse(chunk)).round().byte().cpu().numpy() for chunk in chunks)
    encoder, size = load_teacher(args.run)
    g, autocast = encoder.to(device).side, autocast_of(device, pick_dtype(args.dtype, device)[0])
    if args.map == "attn":
        guidance.check_source(args.source, encoder, "--source")
        return g, "F16", guidance.attention_rows(images, encoder, args.source, autocast)
    if args.map == "parts" and args.parts > g**2:
        raise UserError(
            f"--parts {args.parts} must lie between 1 and the {g**2} patches of {args.run}"
        )

    def stream(rows):
        return tokens_of(images, rows, encoder, size, device, autocast)

    total = sum(tokens.double().sum(0) for _, tokens in stream(some))
    place = (total / len(some)).float()  # what the tokens at each place have in common, (N, D)
    if args.map == "saliency":
        return (
            GRID,
            "U8",
            (
                (255 * refined(*chunk, place)).round().byte().cpu().numpy()
                for chunk in stream(every)
            ),
        )

    def masked(rows):
        return with_foreground(stream(rows), place, args.quality)

    points = torch.cat(
        [relative_to_foreground(tokens, mask, place)[mask] for tokens, mask in masked(some)]
    )
    if len(points) < args.parts:
        raise UserError(
            f"--parts {args.parts} are more than the {len(points)} patches of foreground that were found"
        )
    centres = kmeans(
        points[:: math.ceil(len(points) / 20000)], args.parts, seeded(0)
    )  # one codebook, (K, D)
    chunks = (parts_of(tokens, mask, place, centres) for tokens, mask in masked(every))
    return g, "U8", (chunk.unflatten(1, (g, g)).cpu().numpy() for chunk in chunks)


# ---- sheets: what strategies hide ----------------------------------------------------------------


def hidden_by(strategy, patches, g, n, ratios, t=1.0):
    """What a strategy would hide of n images, patches a dict as in mask.py -> {ratio: (n, g, g)
    bool}, for sheets.

    t = 1 is the end of a run: guidance is full, and a curriculum has become hard. Every strategy
    gets the same noise.
    """
    noise, hidden = masking.gumbel_noise(n, g * g, seeded(0)), {}
    for ratio in ratios:
        K = masking.kept(g * g, ratio)
        _, ids_mask = masking.sample(masking.STRATEGIES[strategy](patches, noise, t, g * g - K), K)
        hidden[ratio] = (
            torch.zeros(n, g * g, dtype=torch.bool).scatter(1, ids_mask, True).view(n, g, g)
        )
    return hidden


def coloured(maps):
    """maps (n, g, g) -> u8 (n, g, g, 3): parts by number, the rest in viridis.

    Whole numbers of at most 12 kinds are parts. Floats go from 0 to their image's maximum.
    """
    from matplotlib import colormaps

    if not maps.is_floating_point() and maps.max() <= 12:
        kinds = np.arange(12)
        colours = colormaps["tab20"](kinds * 2 % 20 + kinds // 10)[:, :3]
        return np.uint8(255 * np.vstack([[[0.93] * 3], colours])[maps.numpy()])
    top = 255
    if maps.is_floating_point():
        top = maps.float().amax((1, 2), keepdim=True).clamp(min=1e-9)
    return np.uint8(255 * colormaps["viridis"]((maps / top).float().numpy())[..., :3])


def enlarged(maps, side):
    """maps (n, g, g, ...) -> (n, side, side, ...): a patch becomes a square of pixels."""
    place = np.arange(side) * maps.shape[1] // side
    return np.asarray(maps)[:, place][:, :, place]


def mask_sheet(path, title, images, maps, columns, width=1100):
    """A block of rows for each ratio, a row for each image, a column for each strategy.

    images u8 (n, S, S, 3); maps [(name, (n, g, g))]; columns [(name, {ratio: (n, g, g) bool, True
    where hidden})]; width of all columns in pixels.
    """
    from common import plots

    images = np.asarray(images)
    ratios = list(columns[0][1])
    names = ["image", *(name for name, _ in maps), *(name for name, _ in columns)]
    n, S = images.shape[:2]
    side = min(max(S, 64), width // len(names) - 4) + 4  # of a picture and its gap; names need 64
    gap = (0, round(4 * S / (side - 4)))
    dark = np.uint8(0.16 * images.mean(3, keepdims=True) + 38)  # a hidden patch
    unmasked = [images, *(enlarged(coloured(scores), S) for _, scores in maps)]

    def stacked(pictures):
        return np.vstack(np.pad(pictures, ((0, 0), gap, gap, (0, 0)), constant_values=255))

    size = (side * len(names) / 150 + 0.5, (side * n / 150 + 0.3) * len(ratios) + 0.8)
    with plots.panels(path, title, len(ratios), 1, size, squeeze=False) as axes:
        for axis, ratio in zip(axes[:, 0], ratios, strict=True):
            masked = []
            for _, hidden in columns:
                is_hidden = enlarged(hidden[ratio], S)[..., None]
                masked.append(np.where(is_hidden, dark, images))
            axis.imshow(np.hstack([stacked(pictures) for pictures in unmasked + masked]))
            axis.set(yticks=[], xticks=[], ylabel=f"{ratio:.0%} hidden")
            axis.spines[:].set_visible(False)
        top = axes[0, 0]
        top.xaxis.tick_top()
        middles = (np.arange(len(names)) + 0.5) * top.get_xlim()[1] / len(names)
        top.set_xticks(middles, names, fontsize=6.5)
        top.tick_params(length=0)


def draw_sheet(path, title, images, maps, strategies, scores, g, **options):
    """What strategies hide of images u8 (n, S, S, 3) by the scores of their g*g patches; maps:
    [(name, (n, g, g))].

    The first strategy that is guided is also shown by the maps of another image, the control.
    """
    columns, shuffled = [], {need: score.roll(1, 0) for need, score in scores.items()}
    control = next(s for s in strategies if s in masking.NEEDS)
    for s in strategies:
        by = {s: scores} | ({f"{s}\nshuffle=1": shuffled} if s == control else {})
        columns += [
            (name, hidden_by(s, some, g, len(images), SHEET_RATIOS)) for name, some in by.items()
        ]
    mask_sheet(path, title, images, maps, columns, **options)


def sheet_of_map(path, name, images, maps, parts):
    """What the strategies that need these maps (n, g, g) hide by them, beside those that need none."""
    need, rows = NEEDED_AS[name], data.evenly_spaced(len(maps), 8)
    g = (
        12 if name == "saliency" else maps.shape[-1]
    )  # as with the demo's network; saliency has no encoder's grid
    whole = data.full_boxes(len(rows))
    if need == "parts":
        scores = {need: guidance.crop_parts(maps, rows, *whole, g, 1 + parts)}
    else:
        scores = {need: guidance.crop_map(maps, rows, *whole, g)}
    strategies = [s for s in masking.STRATEGIES if masking.NEEDS.get(s) == need]
    strategies += [s for s in masking.STRATEGIES if s not in masking.NEEDS]
    shown, title = (
        [(name, torch.from_numpy(maps[rows.numpy()]))],
        f"What each strategy hides, by {name} maps",
    )
    draw_sheet(path, title, images[rows.numpy()], shown, strategies, scores, g)


def load_mae(path):
    """A run or a checkpoint with a decoder -> MAE in eval mode, with its run's statistics of patches."""
    from common.formats import read_checkpoint

    _, facts = read_checkpoint(path)
    if not facts["decoder_depth"]:
        raise UserError(f"{path} has no decoder, as SimMIM has none; give a run with another mask")
    shape = (*ENCODER, "decoder_dim", "decoder_depth", "decoder_heads")
    model = MAE(**{key: facts[key] for key in shape})
    init_from(model, path)
    if beside(path, "stats_head").exists():
        load_beside(model.decoder.stats_head, path, "stats_head")
    return model.eval()


@torch.no_grad()
def difficulty(model, view, autocast):
    """view u8 (B, S, S, 3) -> (B, N): each patch's mean error over random masks, what the mask
    `learned` predicts.
    """
    B, N, p = len(view), model.encoder.side**2, model.config["patch_size"]
    total, count = (
        torch.zeros(B, N, device=view.device),
        torch.full((B, N), 1e-9, device=view.device),
    )
    for i in range(DRAWS):
        ids_keep, ids = hide_at_random(masking.gumbel_noise(B, N, seeded(i)), view.device)
        pred, _ = predict(model, view, ids_keep, ids, autocast)
        total.scatter_add_(1, ids, patch_error(pred, view, ids, p))
        count.scatter_add_(1, ids, torch.ones(ids.shape, device=view.device))
    return total / count


def sheet_of_all(path, run, split, device, dtype):
    """Every strategy on the same four faces. Attention and difficulty are the run's, foreground and
    parts the true.
    """
    if not split["header"].get("parts") or "fg" not in split:
        raise UserError(
            "--map all needs true parts; python data.py toon --out datasets/toon makes a set with them"
        )
    model, autocast = load_mae(run).to(device), autocast_of(device, dtype)
    size, g, p = model.config["image_size"], model.encoder.side, model.config["patch_size"]
    rows = data.evenly_spaced(len(split["images"]), 4)
    index, view = next(data.whole_views(split["images"], rows, size, device))
    chunks = guidance.attention(model.encoder, split["images"], rows, "outlier", autocast)
    _, every = model.encoder.all_patches(view)  # (4, N)
    scores = {
        "attn": torch.cat([score for _, score in chunks]).cpu(),
        "detail": patch_detail(view, every, p).cpu(),
        "difficulty": difficulty(model, view, autocast).cpu(),
    }
    whole, count = data.full_boxes(len(index)), len(split["header"]["parts"])
    scores["fg"] = guidance.crop_map(split["fg"], index, *whole, g)
    scores["parts"] = guidance.crop_parts(split["parts"], index, *whole, g, count)
    shown = {"attention": scores["attn"], "parts": scores["parts"].argmax(2)}
    maps = [(name, score.unflatten(1, (g, g))) for name, score in shown.items()]
    title = "What each strategy hides first, at the end of a run"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(path, title, view.cpu(), maps, list(masking.STRATEGIES), scores, g, width=1350)
    print(f"{path}: every strategy on the same faces")


def main():
    args = parse_args()
    check(args)
    device = pick_device(args.device)
    folder = data.open_or_pack(args.data)
    split = data.open_split(folder, args.split)
    out = Path(args.out or Path("maps") / folder.name)
    if args.map == "all":
        named = name_of(args.run) + ("" if args.split == "train" else f"-{args.split}")
        path = out / f"strategies-{named}.png"
        claim([path])
        sheet_of_all(path, args.run, split, device, pick_dtype(args.dtype, device)[0])
        return print(f"next: python pretrain.py --data {shlex.quote(str(folder))} --mask STRATEGY")
    path = data.map_file(out, args.map, split)
    sheet = path.with_name(f"sheet-{path.stem}.png")
    claim([path, sheet])
    grid, dtype, rows = rows_of_map(args, split["images"], device)
    n = len(split["images"])
    header = {
        "map": args.map,
        "quality": args.quality,
        "source": args.source,
        "parts": args.parts,
        "grid": grid,
        "by": args.run or "",
        "data": folder.name,
        "split": args.split,
        "images": n,
        "data_digest": data.fingerprint(split),
        "commit": commit(),
    }
    header = {key: value for key, value in header.items() if value is not None}
    bar = progress(rows, f"{folder.name}/{path.stem}", math.ceil(n / data.CHUNK))
    data.write_maps(path, args.map, bar, (n, grid, grid), dtype, header)
    maps = data.open_map(path, args.map, split)
    sheet_of_map(sheet, args.map, split["images"], maps, args.parts)
    print(
        "\n".join(
            [
                f"{path}: {n} maps of {grid} x {grid}; look at {sheet}",
                *about_maps(args, folder, split, maps),
                next_line(args, folder, out, split),
            ]
        )
    )


def auc(score, truth):
    """Area under the ROC curve in [0, 1]; score (n,), truth (n,) bool. NaN where truth has one kind."""
    from sklearn.metrics import roc_auc_score

    if truth.all() or not truth.any():
        return float("nan")
    return float(roc_auc_score(truth.numpy(), score.numpy()))


def about_maps(args, folder, split, maps):
    """-> lines: what the maps are, and how near they are to the exact masks of a set that has some."""
    lines = []
    if args.map == "parts":
        how = "colours alone" if args.quality == "coarse" else "colours and the encoder"
        lines = [
            f"parts are {args.parts} clusters of the encoder's features, numbered by size, without names; "
            f"what is foreground was found by {how}"
        ]
    if args.map in ("saliency", "parts") and "fg" in split:
        rows = data.evenly_spaced(len(maps), 256).numpy()
        score = torch.from_numpy(maps[rows]).float()
        true = to_patches(torch.from_numpy(split["fg"][rows]), maps.shape[-1]).flatten() > 127
        if args.map == "parts":
            score = (score > 0).float()
        area = auc(score.flatten(), true)
        lines.append(
            f"{folder} has exact foreground masks: this estimate has an AUC of {area:.2f} against them"
        )
    if has_exact(args.map, split):
        lines.append(
            f"without --maps, pretrain.py takes the exact {guidance.TRUTH[NEEDED_AS[args.map]]}"
        )
    return lines


def has_exact(name, split):
    return NEEDED_AS[name] in guidance.TRUTH and NEEDED_AS[name] in split


def next_line(args, folder, out, split):
    """-> the command that finds these maps; those of another split than train guide no training."""
    if args.split != "train":
        train = re.sub(r" --split[ =]\S+", "", command())
        return f"maps of {args.split} are to look at and to measure; training is guided by those of train: {train}"
    strategy = next(s for s in masking.STRATEGIES if masking.NEEDS.get(s) == NEEDED_AS[args.map])
    found = out.resolve() == (Path("maps") / folder.name).resolve() and not has_exact(
        args.map, split
    )
    words = ["python", "pretrain.py", "--data", str(folder), "--mask", strategy]
    words += ["--teacher", "maps"] * (args.map == "attn") + ([] if found else ["--maps", str(out)])
    return f"next: {shlex.join(words)}"


if __name__ == "__main__":
    cli(main)
