"""Is a difference more than chance? Student's t, F, power, the bootstrap over seeds and illustrations, Holm.

Intervals are of 95 %. The distributions are scipy's, imported where a result is judged, not where a stage starts.
"""

import math

import numpy as np


def mean_std(values):
    """-> {"mean", "std", "n"}; no std of a single value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


def t_quantile(df):
    """The t that |T| stays under with probability .95: 12.71 for df 1, 4.30 for 2, 2.78 for 4."""
    from scipy.stats import t

    return float(t.ppf((1 + 0.95) / 2, df))


def mean_error(differences):
    """-> the mean of two or more paired differences, its standard error, and the degrees of freedom."""
    d = np.asarray(differences, np.float64)
    return d.mean(), d.std(ddof=1) / math.sqrt(len(d)), len(d) - 1


def paired_t(differences):
    """Differences of paired seeds, two or more -> {mean, low, high, p}: a t interval (half-width 2.48 s at three)."""
    from scipy.stats import t

    mean, error, df = mean_error(differences)
    half = t_quantile(df) * error
    p = float(2 * t.sf(abs(mean / error), df)) if error else float(mean == 0)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def p_below(differences, claim):
    """P of a mean as low as this one, or lower, if the true one were `claim` or more: small refutes the claim."""
    from scipy.stats import t

    mean, error, df = mean_error(differences)
    return float(t.cdf((mean - claim) / error, df)) if error else float(mean >= claim)


def t_power(effect, std, n):
    """Chance that a paired t test of n seeds sees a true effect; std: of the differences between seeds."""
    from scipy.stats import nct

    if std == 0:
        return float(effect != 0)
    limit, delta = t_quantile(n - 1), effect * math.sqrt(n) / std
    return float(nct.sf(limit, n - 1, delta) + nct.cdf(-limit, n - 1, delta))


def seeds_needed(effect, std, power=0.8, most=100):
    """The fewest paired seeds that see this effect with this chance; None if more than `most`."""
    return next((n for n in range(2, most + 1) if t_power(effect, std, n) >= power), None)


def variance_ratio(values, baseline):
    """F test: do these seeds vary less than the baseline's? -> {ratio, low, high, p (of lower), p_higher}.

    ratio = variance / variance of the baseline, with its interval. Needs ten seeds: F(2, 2) at three asks for 19.
    """
    from scipy.stats import f

    ratio = np.var(values, ddof=1) / max(np.var(baseline, ddof=1), 1e-30)
    df = len(values) - 1, len(baseline) - 1
    p, tail = float(f.cdf(ratio, *df)), (1 - 0.95) / 2
    low, high = (ratio / float(f.ppf(q, *df)) for q in (1 - tail, tail))
    return {"ratio": ratio, "low": low, "high": high, "p": min(1.0, 2 * p), "p_higher": min(1.0, 2 * (1 - p))}


def f_power(ratio, n):
    """Chance that this F test, of n seeds on either side, sees a variance that is truly `ratio` of the baseline's."""
    from scipy.stats import f

    return float(f.cdf(f.ppf((1 - 0.95) / 2, n - 1, n - 1) / ratio, n - 1, n - 1))


def to_bits(right):
    """(n,) bool -> hexadecimal text, eight images in two digits: which images a probe got right, small in a row."""
    return np.packbits(np.asarray(right, bool)).tobytes().hex()


def from_bits(text, n):
    """What `to_bits` wrote -> (n,) bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(bool)


def bootstrap(differences, groups, draws=2000):
    """differences (seeds, images), such as right minus right in points; groups (images) -> {mean, low, high, p}.

    Resamples seeds and illustrations, both with replacement: never single images, of which an illustration may hold
    several. Percentile interval; p is twice the smaller share of draws on the far side of 0.
    """
    d, (_, ids) = np.asarray(differences, np.float64), np.unique(np.asarray(groups), return_inverse=True)
    size, rng = np.bincount(ids), np.random.default_rng(0)
    sums = np.stack([np.bincount(ids, row) for row in d])  # (seeds, groups)
    means = np.empty(draws)
    for i in range(draws):
        times_group = np.bincount(rng.integers(len(size), size=len(size)), minlength=len(size))
        times_seed = np.bincount(rng.integers(len(d), size=len(d)), minlength=len(d)) / len(d)
        means[i] = times_seed @ sums @ times_group / (size @ times_group)
    low, high = np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    side = min((means <= 0).mean(), (means >= 0).mean())
    return {"mean": d.mean(), "low": low, "high": high, "p": min(1.0, 2 * max(side, 1 / draws))}


def holm(p_values):
    """p values of a family of hypotheses -> adjusted ones (Holm 1979): to be compared with .05 as they are."""
    p, adjusted, highest = list(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
