"""Is a difference more than chance? Student's t, the bootstrap over seeds and illustrations, Holm. Pure functions."""

import math

import numpy as np


def t_two_sided(t, df):
    """P(|T| > |t|) for Student's t with df (an integer) degrees of freedom: the finite sums of Abramowitz and
    Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(df))
    term = total = math.cos(angle) if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if df % 2:
        return 1 - 2 / math.pi * (angle + math.sin(angle) * (total if df > 1 else 0))
    return 1 - math.sin(angle) * total


def t_quantile(df, confidence=0.95):
    """The t that |T| stays under with this probability: 12.71 for df 1, 4.30 for 2, 2.78 for 4; by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 1 - confidence else (low, middle)
    return high


def paired_t(differences, confidence=0.95):
    """Differences of paired seeds, two or more -> {mean, low, high, p}: a t interval (half-width 2.48 s at three)."""
    d = np.asarray(differences, np.float64)
    mean, error = d.mean(), d.std(ddof=1) / math.sqrt(len(d))
    half = t_quantile(len(d) - 1, confidence) * error
    p = t_two_sided(mean / error, len(d) - 1) if error else float(mean == 0)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def bootstrap(differences, groups, draws=2000, confidence=0.95, seed=0):
    """differences (seeds, images), such as right minus right in points; groups (images) -> {mean, low, high, p}.

    Resamples seeds and illustrations, both with replacement: never single images, of which an illustration may hold
    several. Percentile interval; p is twice the smaller share of draws on the far side of 0. With one seed it says
    nothing about training again.
    """
    d, (_, ids) = np.asarray(differences, np.float64), np.unique(np.asarray(groups), return_inverse=True)
    size, rng = np.bincount(ids), np.random.default_rng(seed)
    sums = np.stack([np.bincount(ids, row) for row in d])  # (seeds, groups)
    means = np.empty(draws)
    for i in range(draws):
        times_group = np.bincount(rng.integers(len(size), size=len(size)), minlength=len(size))
        times_seed = np.bincount(rng.integers(len(d), size=len(d)), minlength=len(d)) / len(d)
        means[i] = times_seed @ sums @ times_group / (size @ times_group)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    side = min((means <= 0).mean(), (means >= 0).mean())
    return {"mean": d.mean(), "low": low, "high": high, "p": min(1.0, 2 * max(side, 1 / draws))}


def holm(p_values):
    """p values of a family of hypotheses -> adjusted ones (Holm 1979): to be compared with .05 as they are."""
    p, adjusted, highest = list(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
