"""Is a difference more than chance? Student's t, F, power, the bootstrap over seeds and illustrations, Holm.

Pure functions. No scipy at runtime: each distribution is the few lines that are needed (tests compare them with it).
"""

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


def p_below(differences, claim):
    """P of a mean as low as this one, or lower, if the true one were `claim` or more: small refutes the claim."""
    d = np.asarray(differences, np.float64)
    mean, error = d.mean(), d.std(ddof=1) / math.sqrt(len(d))
    if error == 0:
        return float(mean >= claim)
    p = t_two_sided((mean - claim) / error, len(d) - 1) / 2
    return p if mean < claim else 1 - p


def t_power(effect, deviation, n, confidence=0.95):
    """Chance that a paired t test of n seeds sees a true effect; deviation: of the differences between seeds.

    The noncentral t, as a mean over s = sqrt(chi2 / df): P(|Z + delta| > t s), delta = effect sqrt(n) / deviation.
    """
    if deviation == 0:
        return float(effect != 0)
    df, delta = n - 1, effect * math.sqrt(n) / deviation
    s = (np.arange(1000) + 0.5) * (1 + 8 / math.sqrt(df)) / 1000
    density = np.exp((df - 1) * np.log(s) - df * s * s / 2 + df / 2)
    limit = t_quantile(df, confidence) * s
    normal = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
    return float((density * (normal(delta - limit) + normal(-delta - limit))).sum() / density.sum())


def seeds_needed(effect, deviation, power=0.8, most=100):
    """The fewest paired seeds that see this effect with this chance; None if more than `most`."""
    return next((n for n in range(2, most + 1) if t_power(effect, deviation, n) >= power), None)


def f_below(f, df1, df2):
    """P(F < f), the incomplete beta function I_x(df1/2, df2/2) at x = df1 f / (df1 f + df2), over x = sin^2 angle."""
    a, b, x = df1 / 2, df2 / 2, df1 * f / (df1 * f + df2)
    half = math.asin(math.sqrt(x)) / 2
    nodes, weights = np.polynomial.legendre.leggauss(200)
    angle = half * (nodes + 1)
    area = half * (weights * np.sin(angle) ** (2 * a - 1) * np.cos(angle) ** (2 * b - 1)).sum()
    return float(2 * area * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)))


def f_quantile(p, df1, df2):
    """The f with P(F < f) = p, by bisection of its logarithm."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f_below(math.exp(middle), df1, df2) < p else (low, middle)
    return math.exp(high)


def variance_ratio(values, baseline, confidence=0.95):
    """Do these seeds vary less than the baseline's? -> {ratio, low, high, p (of lower), p_higher}: the F test.

    ratio = variance / variance of the baseline, with its interval. Needs ten seeds: F(2, 2) at three asks for 19.
    """
    first, other = (np.var(np.asarray(x, np.float64), ddof=1) for x in (values, baseline))
    df = len(values) - 1, len(baseline) - 1
    ratio = first / max(other, 1e-30)
    p, tail = f_below(ratio, *df), (1 - confidence) / 2
    return {"ratio": ratio, "low": ratio / f_quantile(1 - tail, *df), "high": ratio / f_quantile(tail, *df),
            "p": min(1.0, 2 * p), "p_higher": min(1.0, 2 * (1 - p))}  # fmt: skip


def f_power(ratio, n, confidence=0.95):
    """Chance that this F test, of n seeds on either side, sees a variance that is truly `ratio` of the baseline's."""
    return f_below(f_quantile((1 - confidence) / 2, n - 1, n - 1) / ratio, n - 1, n - 1)


def to_bits(right):
    """(n,) bool -> hexadecimal text, eight images in two digits: which images a probe got right, small in a row."""
    return np.packbits(np.asarray(right, bool)).tobytes().hex()


def from_bits(text, n):
    """What `to_bits` wrote -> (n,) bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(bool)


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
