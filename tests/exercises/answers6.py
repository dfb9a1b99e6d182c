"""Evening 6: a solution, another one in other words, and wrong ones with what is to be said of them."""

import itertools
import operator
import statistics

import numpy as np
from scipy import stats


def interval(ours, theirs, quantile=None, ddof=1):
    d = np.array(ours) - np.array(theirs)
    n = len(d)
    half = (quantile or stats.t.ppf(0.975, n - 1)) * d.std(ddof=ddof) / np.sqrt(n)
    return d.mean(), d.mean() - half, d.mean() + half


def sign_flips(differences):
    d = np.array(differences)
    signs = np.array([*itertools.product([-1, 1], repeat=len(d))])
    return np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9)


def holm(p):
    order = np.argsort(p)
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(p) - rank) * p[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def interval_by_hand(ours, theirs):
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, error = statistics.fmean(d), statistics.stdev(d) / len(d) ** 0.5
    low, high = stats.t.interval(0.95, len(d) - 1, mean, error)
    return [mean, low, high]


def sign_flips_by_bits(differences):
    n, count = len(differences), 0
    for bits in range(2**n):
        total = sum(x if bits >> i & 1 else -x for i, x in enumerate(differences))
        count += abs(total) / n > abs(sum(differences)) / n - 1e-9
    return count / 2**n


def holm_by_numpy(p):
    p = np.array(p)
    order = p.argsort()
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[order.argsort()]


def unpaired(ours, theirs):
    low, high = stats.ttest_ind(ours, theirs).confidence_interval()
    return (low + high) / 2, low, high


def unbounded(p):
    ordered = sorted(p)
    return [max(x * (len(p) - i) for i, x in enumerate(ordered) if x <= y) for y in p]


def counted(differences, count):
    """As sign_flips, where `count` decides which of two sums is as far."""
    choices = itertools.product([-1, 1], repeat=len(differences))
    sums = [abs(sum(map(operator.mul, choice, differences))) for choice in choices]
    return sum(count(x, abs(sum(differences))) for x in sums) / len(sums)


OTHER = {"interval": interval_by_hand, "sign_flips": sign_flips_by_bits, "holm": holm_by_numpy}
WRONG = [
    ("interval", lambda a, b: interval(a, b, 1.96), "normal distribution"),
    ("interval", lambda a, b: interval(a, b, ddof=0), "divides by n, and not"),
    ("interval", unpaired, "and not pairs"),
    ("interval", lambda a, b: interval(a, b)[1:], "Expected 3 results, found ("),
    ("sign_flips", lambda d: sign_flips(d) / 2, "one side is counted"),
    ("sign_flips", lambda d: counted(d, operator.gt), "the data themselves"),
    ("sign_flips", lambda d: counted(d, operator.ge), "but for their rounding"),
    ("holm", lambda p: [min(1, len(p) * x) for x in p], "Bonferroni"),
    ("holm", lambda p: sorted(holm(p)), "sorted"),
    (
        "holm",
        lambda p: [x * (len(p) - sorted(p).index(x)) for x in p],
        "smaller than the one before",
    ),
    (
        "holm",
        lambda p: [max(x * (len(p) - i) for i, x in enumerate(sorted(p)) if x <= y) for y in p],
        "none is above 1",
    ),
]
