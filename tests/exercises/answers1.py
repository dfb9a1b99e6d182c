"""Evening 1: a solution, another one in other words, and wrong ones with what is to be said of them."""

import math

import torch

from mask import pixels_of


def sample(priority, K):
    order = priority.argsort(dim=1, stable=True)
    return order[:, :K], order[:, K:]


def guided(score, beta, noise):
    centred = score - score.mean(1, keepdim=True)
    std = score.std(1, unbiased=False, keepdim=True)
    return beta * torch.where(std > 1e-6, centred / std.clamp(min=1e-6), 0.0) + noise


def own(scores, noise, t, hidden, beta=2.0):
    """Red patches first."""
    r, g, b = pixels_of(scores["view"], noise).mean(2).unbind(2)
    return guided(r - (g + b) / 2, beta, noise)


def sample_by_python(priority, K):
    """Places in ascending order, picture by picture."""
    keep, hide = [], []
    for line in priority.tolist():
        order = sorted(range(len(line)), key=lambda i: line[i])
        keep.append(sorted(order[:K]))
        hide.append(sorted(order[K:]))
    return torch.tensor(keep), torch.tensor(hide)


def guided_by_pictures(score, beta, noise):
    lines = []
    for line in score:
        var, mean = torch.var_mean(line, correction=0)
        z = (line - mean) / var.sqrt()
        lines.append(beta * z.nan_to_num(0.0))
    return torch.stack(lines) + noise


def own_stripes(scores, noise, t, hidden, beta=2.0):
    """A priority without `guided`: every other column."""
    side = math.isqrt(noise.shape[1])
    column = torch.arange(noise.shape[1]) % side
    return beta * (column % 2) + noise


def fixed(scores, noise, t, hidden):
    return torch.arange(noise.shape[1]).float().expand_as(noise)


OTHER = {"sample": sample_by_python, "guided": guided_by_pictures, "own": own_stripes}
WRONG = [
    (
        "sample",
        lambda p, K: p.argsort(1, descending=True).split([K, p.shape[1] - K], 1),
        "highest priority are",
    ),
    ("sample", lambda p, K: sample(p, K)[0], "Expected 2 results, found int64 (2, 2)"),
    ("sample", lambda p, K: sample(p - 1e-3 * torch.arange(p.shape[1]), K), "of equal priorities"),
    (
        "guided",
        lambda s, beta, n: beta * (s - s.mean()) / s.std(unbiased=False) + n,
        "scaled together",
    ),
    ("guided", lambda s, beta, n: beta * (s - s.mean(1)[:, None]) / s.std(1)[:, None] + n, "N - 1"),
    ("guided", lambda s, beta, n: guided(s, 1, beta * n), "beta multiplies the noise"),
    (
        "guided",
        lambda s, beta, n: beta * (s - s.mean(1)[:, None]) / s.std(1, unbiased=False)[:, None] + n,
        "a constant score is the noise, too\n         Found nan",
    ),
    ("own", lambda *_: torch.rand(6, 64), "equal arguments"),
    ("own", lambda scores, noise, t, hidden: noise + 1, "as the mask `random`"),
    ("own", fixed, "one mask in all epochs"),
    ("own", lambda scores, noise, t, hidden: noise[:, 0], "Found float (6,)"),
    ("own", lambda scores, noise, t, hidden: noise.relu().log(), "all are finite"),
]
