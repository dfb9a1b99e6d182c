"""Is a difference more than chance? Student's t over seeds, the bootstrap over seeds and illustrations.

Intervals are of 95 %. scipy is imported where a result is judged, not where a stage starts.
"""

import math

import numpy as np

LEAST_SEEDS = 3  # of an interval: two give a t of 12.7, and tie by chance


def mean_std(values):
    """-> {"mean", "std", "n"}; no std of a single value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


def plus_minus(measured, digits=1):
    """{"mean", "std"} -> "84.2 ± 0.3"; "-" for None."""
    if measured is None:
        return "-"
    std = "" if measured["std"] is None else f" ± {measured['std']:.{digits}f}"
    return f"{measured['mean']:.{digits}f}{std}"


def varies(values):
    """Can an interval be said? Not from under three seeds, nor from seeds that all tie."""
    spread = 1e-9 * max(1.0, np.abs(values).max(initial=0))
    return len(values) >= LEAST_SEEDS and np.std(values, ddof=1) > spread


def t_interval(differences):
    """Paired differences, one of each seed -> {"mean", "low", "high", "p"} by Student's t.

    None where nothing `varies`: that is no evidence.
    """
    from scipy.stats import ttest_1samp

    d = np.asarray(differences, np.float64)
    if not varies(d):
        return None
    test = ttest_1samp(d, 0)
    low, high = test.confidence_interval(0.95)
    return {"mean": d.mean(), "low": float(low), "high": float(high), "p": float(test.pvalue)}


def standard_error(percent, n):
    """Of a share of n pictures, in percent as the share is: sqrt(p (1 - p) / n)."""
    return (percent * (100 - percent) / n) ** 0.5


def least_error(share, n):
    """The smallest standard error that n pictures allow a share of them, 0 to 1.

    That of n independent ones, sqrt(p (1 - p) / n). It would be 0 where all of them agree, so p counts
    two hits and two misses more (after Agresti and Coull 1998, who divide by n + 4).
    """
    likely = (share * n + 2) / (n + 4)
    return (likely * (1 - likely) / n) ** 0.5


def share_interval(right, groups):
    """right (n,) bool, groups (n,) -> low, high: the bootstrap of their share, in percent.

    It draws whole groups, and is at least as wide as that of n independent pictures.
    """
    interval = bootstrap(100.0 * np.asarray(right, np.float64)[None], groups)
    reach = 196 * least_error(interval["mean"] / 100, len(right))
    low = min(interval["low"], max(0.0, interval["mean"] - reach))
    high = max(interval["high"], min(100.0, interval["mean"] + reach))
    return low, high


def to_bits(right):
    """(n,) bool, which images a probe got right -> "87c0:10": two hexadecimal digits for eight images; n."""
    return f"{np.packbits(np.asarray(right, bool)).tobytes().hex()}:{len(right)}"


def from_bits(text, n):
    """The text of `to_bits` -> (n,) bool; None if it is of fewer or more images.

    Older texts have no n, and are asked by whole bytes.
    """
    digits, _, count = text.partition(":")
    bits = np.frombuffer(bytes.fromhex(digits), np.uint8)
    fits = int(count) == n if count else len(bits) == math.ceil(n / 8)
    return np.unpackbits(bits, count=n).astype(bool) if fits else None


def bootstrap(differences, groups, draws=2000):
    """differences (seeds, images), groups (images,) -> {"mean", "low", "high", "p"}.

    Seeds and illustrations are resampled with replacement; an illustration may hold several images.
    Percentile interval; p is twice the smaller share of draws on the far side of 0.
    """
    d = np.asarray(differences, np.float64)
    _, ids = np.unique(groups, return_inverse=True)
    size = np.bincount(ids)
    rng = np.random.default_rng(0)
    sums = np.stack([np.bincount(ids, row) for row in d])  # (seeds, groups)
    means = np.empty(draws)
    for i in range(draws):
        times_group = np.bincount(rng.integers(len(size), size=len(size)), minlength=len(size))
        times_seed = np.bincount(rng.integers(len(d), size=len(d)), minlength=len(d)) / len(d)
        means[i] = times_seed @ sums @ times_group / (size @ times_group)
    low, high = np.quantile(means, [0.025, 0.975])
    side = min((means <= 0).mean(), (means >= 0).mean())
    return {"mean": d.mean(), "low": low, "high": high, "p": min(1.0, 2 * max(side, 1 / draws))}
