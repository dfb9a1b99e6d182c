"""Where the figure is and what its parts are, without labels: from colours alone (coarse), from an encoder's features
(refined, parts). Tensors in, tensors out; maps.py is the stage that writes the files. Imports nothing of ours.

    B images   S side in pixels   G cells a side of a saliency map   g patches a side of an encoder   N = G*G or g*g

What is asked of a method is how well it ranks the patches of a picture (AUC) and where it cuts (IoU at .5), against
true figure masks: lab/truth.py measures both.
"""

import torch
import torch.nn.functional as F

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
    above, below, left, beyond = F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)), F.pad(right, (1, 0)), F.pad(right, (0, 1))
    for _ in range(steps):
        total = values + above * values.roll(1, 1) + below * values.roll(-1, 1)
        total = total + left * values.roll(1, 2) + beyond * values.roll(-1, 2)
        values = total / (1 + above + below + left + beyond)
    return values


def coarse(images):
    """images u8 (B, S, S, 3) -> probability of figure, (B, GRID, GRID): border colours, connectivity, centre."""
    lab = to_lab(images)
    colours = cells(lab, GRID)
    connected = boundary_connectivity(cells(lab, CONNECTIVITY_GRID)).add(0.01).log()
    connected = F.interpolate(connected[:, None], size=GRID, mode="bilinear")[:, 0]
    logit = WEIGHTS["colour"] * border_colour(colours).add(0.003).log() + WEIGHTS["connectivity"] * connected
    logit = logit + WEIGHTS["centre"] * centre_prior(GRID).to(logit.device) + WEIGHTS["bias"]
    return diffuse(logit, colours).sigmoid()
