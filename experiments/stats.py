"""Statistics of the study: t and F tests, their power, and Holm's correction.

Intervals are of 95 %. The distributions are scipy's.
"""

import math

import numpy as np

from common.stats import LEAST_SEEDS


def t_quantile(df):
    """The t that |T| stays under with probability .95: 12.71 for df 1, 4.30 for 2, 2.78 for 4."""
    from scipy.stats import t

    return float(t.ppf((1 + 0.95) / 2, df))


def enough(differences):
    """Can an interval be said at all? Not from under three seeds, nor from seeds that all tie: that
    is no evidence.
    """
    d = np.asarray(differences, np.float64)
    return len(d) >= LEAST_SEEDS and d.std(ddof=1) > 1e-9 * max(1.0, np.abs(d).max())


def why_none(differences):
    """What stands in the place of an interval: "2 seeds: no interval"."""
    n = len(differences)
    if n < LEAST_SEEDS:
        return f"{n} seed{'s' * (n != 1)}: no interval"
    return f"{n} seeds: no interval, nothing varies"


def image_variance(each, groups):
    """each (seeds, images), groups (images) -> the squared error of the mean that the test images
    bring; illustrations.

    The images of an illustration are no independent draws, so whole illustrations vary
    (cluster-robust, of any size): with d_i the mean of image i over seeds, N images and G
    illustrations,

        s_images^2 / G = G / (G-1)  sum_g (sum_{i in g} d_i - d)^2  /  N^2

    which for illustrations of one size is the variance of their means, over G.
    """
    d, (_, ids) = (
        np.mean(each, 0, dtype=np.float64),
        np.unique(np.asarray(groups), return_inverse=True),
    )
    sums, count = np.bincount(ids, d - d.mean()), ids.max() + 1
    return count / max(count - 1, 1) * float((sums**2).sum()) / len(d) ** 2, int(count)


def errors_of(seeds, n, images=0.0, count=1):
    """Squared errors of a mean, by n seeds and by `count` illustrations -> [(standard error,
    degrees of freedom)].

    First of the seeds alone; then, where there are images, of both, A + B:

        error^2 = A + B,   df = (A + B)^2 / (A^2 / (n-1) + B^2 / (G-1))     (Satterthwaite 1946)

    Conservative: seeds are measured on the same few images, and images by the same few seeds, so
    that the noise of a single seed on a single image, the interaction, is in A and in B and is
    counted twice. Whoever uses them takes the one that claims less: with more degrees of freedom
    the second may be narrower than the first, and images that are added to a plan must never make
    it less strict.
    """
    both = [(math.sqrt(seeds), n - 1)]
    if images:
        df = (seeds + images) ** 2 / (seeds**2 / (n - 1) + images**2 / (count - 1))
        both.append((math.sqrt(seeds + images), df))
    return both


def mean_errors(differences, groups=None):
    """-> the mean of paired differences and its `errors_of`; None where they are not `enough` for
    an interval.

    differences: (seeds), or with groups (images), the illustration of each, (seeds, images).
    """
    d = np.asarray(differences, np.float64)
    images, each = ((0.0, 1), d) if groups is None else (image_variance(d, groups), d.mean(1))
    if not enough(each) or groups is not None and images[1] < 2:
        return None
    return each.mean(), errors_of(each.var(ddof=1) / len(each), len(each), *images)


def paired_t(differences, groups=None):
    """As `mean_errors` -> {mean, low, high, p}: a t interval (of seeds alone: half-width 2.48 s at
    three); or None.
    """
    from scipy.stats import t

    if (found := mean_errors(differences, groups)) is None:
        return None
    mean, errors = found
    half = max(t_quantile(df) * error for error, df in errors)
    p = max(float(2 * t.sf(abs(mean / error), df)) for error, df in errors)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def p_below(differences, claim, groups=None):
    """P of a mean as low as this one, or lower, if the true one were `claim` or more: small refutes
    it; or None.
    """
    from scipy.stats import t

    if (found := mean_errors(differences, groups)) is None:
        return None
    mean, errors = found
    return max(float(t.cdf((mean - claim) / error, df)) for error, df in errors)


def t_power(effect, std, n, images=(0.0, 1)):
    """Chance that a paired t test of n seeds sees a true effect; std: of the differences between
    seeds.

    images: what `image_variance` says of the test images, which more seeds do not change.
    """
    from scipy.stats import nct

    def power(error, df):
        limit, delta = t_quantile(df), effect / error
        far = np.nan_to_num(
            nct.cdf(-limit, df, delta)
        )  # scipy has no number for some tails of under 1e-20
        return float(nct.sf(limit, df, delta) + far)

    return (
        min(power(*pair) for pair in errors_of(std**2 / n, n, *images))
        if std
        else float(effect != 0)
    )


def seeds_needed(effect, std, power=0.8, most=100, images=(0.0, 1)):
    """The fewest paired seeds that see this effect with this chance; None if more than `most`."""
    return next(
        (n for n in range(LEAST_SEEDS, most + 1) if t_power(effect, std, n, images) >= power), None
    )


def variance_ratio(values, baseline):
    """F test: do these seeds vary less than the baseline's? -> {ratio, low, high, p (of lower),
    p_higher}.

    ratio = variance / variance of the baseline, with its interval. Needs ten seeds: F(2, 2) at
    three asks for 19.
    """
    from scipy.stats import f

    ratio = np.var(values, ddof=1) / max(np.var(baseline, ddof=1), 1e-30)
    df = len(values) - 1, len(baseline) - 1
    p, tail = float(f.cdf(ratio, *df)), (1 - 0.95) / 2
    low, high = (ratio / float(f.ppf(q, *df)) for q in (1 - tail, tail))
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "p": min(1.0, 2 * p),
        "p_higher": min(1.0, 2 * (1 - p)),
    }


def f_power(ratio, n):
    """Chance that this F test, of n seeds on either side, sees a variance that is truly `ratio` of
    the baseline's.
    """
    from scipy.stats import f

    return float(f.cdf(f.ppf((1 - 0.95) / 2, n - 1, n - 1) / ratio, n - 1, n - 1))


def holm(p_values):
    """p values of a family of hypotheses -> adjusted ones (Holm 1979): to be compared with .05 as
    they are.
    """
    p, adjusted, highest = list(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def add_holm(rows):
    """Give each row (a dict with "p") its "holm_p"; a p of None counts as 1 in the family, and
    stays None.
    """
    for row, p in zip(
        rows, holm([1.0 if row["p"] is None else row["p"] for row in rows]), strict=True
    ):
        row["holm_p"] = None if row["p"] is None else p
