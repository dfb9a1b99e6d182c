"""Evening 4: a solution, another one in other words, and wrong ones with what is to be said of them."""

import torch


def target(x, floor):
    return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + floor**2).sqrt()


def weight(pixels, flat_weight, tau=0.05):
    d = (pixels - pixels.mean(2, keepdim=True)).square().mean((2, 3)).sqrt()
    return flat_weight + (1 - flat_weight) * (1 - torch.exp(-d / tau))


def loss(pred, z, w):
    e = (pred - z).square().mean(2)
    w = w.detach()
    return (w * e).sum() / w.sum()


def gradient(pred, z, w):
    return 2 * w[..., None] * (pred - z) / (pred.shape[2] * w.sum())


def target_by_patches(x, floor):
    patches = []
    for patch in x.flatten(0, 1):
        centred = patch - patch.sum() / len(patch)
        var = (centred @ centred) / (len(patch) - 1)
        patches.append(centred / torch.hypot(var.sqrt(), torch.tensor(floor)))
    return torch.stack(patches).view_as(x)


def weight_by_colours(pixels, flat_weight, tau=0.05):
    var = pixels.var(2, unbiased=False).mean(2)  # of each colour, then their mean
    return 1 - (1 - flat_weight) * (-var.sqrt() / tau).exp()


def loss_by_einsum(pred, z, w):
    share = (w / w.sum()).detach()
    return torch.einsum("bm,bmp,bmp->", share, pred - z, pred - z) / z.shape[-1]


def gradient_by_loops(pred, z, w):
    out = torch.zeros_like(pred)
    for b in range(len(pred)):
        for m in range(pred.shape[1]):
            out[b, m] = w[b, m] / w.sum() * 2 / pred.shape[2] * (pred[b, m] - z[b, m])
    return out


def one_mean(pixels, flat_weight, tau=0.05):
    return weight(pixels.flatten(2)[..., None], flat_weight, tau)


OTHER = {
    "target": target_by_patches,
    "weight": weight_by_colours,
    "loss": loss_by_einsum,
    "gradient": gradient_by_loops,
}
WRONG = [
    (
        "target",
        lambda x, s: (x - x.mean(2)[..., None]) / (x.std(2)[..., None] + s),
        "added to the deviation",
    ),
    ("target", lambda x, s: target(x, s**0.5), "not squared"),
    ("target", lambda x, s: target(x, s) * 0 + x, "numbers differ, by up to"),
    ("weight", one_mean, "a flat red patch"),
    ("loss", lambda pred, z, w: loss(pred, z, w) * w.mean(), "by the number of patches"),
    ("loss", lambda pred, z, w: (w * (pred - z).square().mean(2)).sum() / w.sum(), "detach"),
    ("loss", lambda pred, z, w: (pred - z).square().mean(2), "found float (2, 5)"),
    (
        "gradient",
        lambda pred, z, w: 2 * w[..., None] * (pred - z) / pred.shape[2],
        "sum of weights is left out",
    ),
    ("gradient", lambda pred, z, w: gradient(z, pred, w), "sign is turned"),
]
