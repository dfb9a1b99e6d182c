"""Is a difference more than chance? Paired t tests, the F test, Holm's correction, and verdicts.

Intervals are of 95 %. Every test returns the same fields, and None where the data allow no number:

effect, low, high   the mean and its interval
p                   of no effect, two-sided
p_against           of an effect as large as the claim, one-sided: small refutes the claim
p_equal             of an effect as large as the margin, either way: small shows equivalence (TOST)
"""

import numpy as np
from scipy.stats import f, t

from common import metrics
from common.metrics import LEAST_SEEDS, varies

TEN = 10  # seeds that a comparison of variances needs: at three, F(2, 2) asks for a ratio of 19
LEVEL = 0.05
FIELDS = ("effect", "low", "high", "p", "p_against", "p_equal")


def empty(values):
    """The fields of a test that has no interval."""
    n = len(values)
    why = "nothing varies" if n >= LEAST_SEEDS else "under three"
    row = dict.fromkeys(FIELDS) | {"n": n, "per_seed": [float(x) for x in values]}
    row["effect"] = float(np.mean(values)) if n else None
    return row | {"notes": [f"{n} seed{'s' * (n != 1)}: no interval, {why}"]}


# ---- paired differences --------------------------------------------------------------------------


def image_variance(values, groups):
    """Squared error of the mean that the test images bring, and the number of illustrations.

    values (seeds, images), groups (images): the illustration of each. Images of one illustration
    are no independent draws, so whole illustrations vary (cluster-robust). With d_i the mean of
    image i over seeds, N images and G illustrations:

        G / (G-1)  sum_g (sum_{i in g} d_i - d)^2  /  N^2
    """
    mean = np.mean(values, 0)
    ids = np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(ids, mean - mean.mean())
    count = len(sums)
    return count / (count - 1) * float((sums**2).sum()) / len(mean) ** 2, count


def errors_of(values, groups):
    """[(standard error of the mean, degrees of freedom)]: of seeds alone, and of both with images.

    The squared errors of n seeds, A, and of G illustrations, B, add. Degrees of freedom:
    (A + B)^2 / (A^2 / (n-1) + B^2 / (G-1)) (Satterthwaite 1946). Users take the less certain of
    the two, so that test images never make an interval narrower.
    """
    each = values if groups is None else values.mean(1)
    n = len(each)
    A = each.var(ddof=1) / n
    errors = [(A**0.5, n - 1)]
    if groups is not None:
        B, count = image_variance(values, groups)
        df = (A + B) ** 2 / (A**2 / (n - 1) + B**2 / (count - 1))
        errors.append(((A + B) ** 0.5, df))
    return errors


def paired(values, groups=None, claim=0.0, margin=1.0):
    """Paired differences -> the fields of a t test.

    values (seeds), or with groups (images), the illustration of each, (seeds, images).
    """
    values = np.asarray(values, np.float64)
    each = values if groups is None else values.mean(1)
    row = empty(each)
    if not varies(each) or groups is not None and len(np.unique(groups)) < 2:
        return row
    errors = errors_of(values, groups)
    mean = row["effect"]
    half = max(float(t.ppf(0.975, df)) * error for error, df in errors)
    row |= {"low": mean - half, "high": mean + half, "notes": []}
    row["p"] = max(float(2 * t.sf(abs(mean) / error, df)) for error, df in errors)
    row["p_against"] = max(float(t.cdf((mean - claim) / error, df)) for error, df in errors)
    row["p_equal"] = max(float(t.sf((margin - abs(mean)) / error, df)) for error, df in errors)
    return row


# ---- other columns of a run: epochs to a threshold, and how much seeds vary ----------------------


def epochs_to(curve, threshold):
    """Epochs until a curve {"epoch", "linear"} first reaches the threshold; None: never."""
    return metrics.first_crossing(curve["epoch"], curve["linear"], threshold)


def epochs_saved(pairs, threshold, claim=0.0, logs=False):
    """[(curve, baseline's curve)] -> the fields of a test of the percent of epochs saved.

    A run that never reaches the threshold counts with its last epoch. That is a bound, so it may
    decide only what a bound can. logs: a geometric mean, since a mean of ratios leans against the
    arm where the baseline's epochs vary.
    """
    reached = [[epochs_to(curve, threshold) for curve in pair] for pair in pairs]
    late = sum(ours is None for ours, _ in reached)
    base_late = sum(theirs is None for _, theirs in reached)
    same = sum(ours is not None and ours == theirs for ours, theirs in reached)
    last = [[curve["epoch"][-1] for curve in pair] for pair in pairs]
    epochs = np.where(np.equal(reached, None), last, reached).astype(float).reshape(-1, 2)
    if (epochs == 0).any():
        note = f"the random-init encoder has the threshold of {threshold:.1f} % already"
        return empty([]) | {"n": len(pairs), "notes": [note]}
    ratio = epochs[:, 0] / epochs[:, 1]
    row = paired(100 * (1 - ratio), claim=claim)
    if logs:
        row = paired(-100 * np.log(ratio), claim=-100 * np.log1p(-claim / 100))
        known = [k for k in ("effect", "low", "high") if row[k] is not None]
        row |= {k: float(-100 * np.expm1(-row[k] / 100)) for k in known}
        row["per_seed"] = (100 * (1 - ratio)).tolist()
    if row["p"] is not None and (same or late):
        row["p"] = 1.0
    if row["p"] is not None and (same or base_late):
        row["p_against"] = 1.0
    if same:
        row["notes"].append(f"{same} pairs are one run up to the threshold")
    if late or base_late:
        found = f"{late} runs and {base_late} baselines of {len(pairs)}"
        row["notes"].append(f"{found} never reach {threshold:.1f} %")
    return row | {"p_equal": None}


def variance(values, baseline, claim=0.0):
    """F test, as if unpaired -> percent less variance over seeds than the baseline's.

    Under ten seeds p is 1, which decides nothing.
    """
    for side in (values, baseline):
        if not varies(side):
            return empty(side) | {"effect": None}
    n = len(values)
    df = (len(values) - 1, len(baseline) - 1)
    ratio = np.var(values, ddof=1) / np.var(baseline, ddof=1)
    low, high = (ratio / float(f.ppf(q, *df)) for q in (0.975, 0.025))
    row = dict.fromkeys(FIELDS) | {"n": n, "per_seed": [], "effect": 100 * (1 - ratio)}
    row |= {"low": 100 * (1 - high), "high": 100 * (1 - low)}
    if n < TEN:
        note = f"variances need {TEN} seeds, there are {n}"
        return row | {"p": 1.0, "p_against": 1.0, "notes": [note]}
    p = 2 * min(float(f.cdf(ratio, *df)), float(f.sf(ratio, *df)))
    against = float(f.sf(ratio / (1 - claim / 100), *df))
    return row | {"p": p, "p_against": against, "notes": []}


# ---- verdicts ------------------------------------------------------------------------------------


def holm(p_values):
    """p of a family -> adjusted ones, to be compared with 0.05 (Holm 1979). None counts as 1."""
    p = [1.0 if x is None else x for x in p_values]
    adjusted = list(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = None if p_values[i] is None else highest
    return adjusted


def word(effect, p, p_equal):
    """p values after Holm -> "better", "worse", "equivalent" or "undecided"."""
    if p is not None and p < LEVEL:
        return "better" if effect > 0 else "worse"
    return "equivalent" if p_equal is not None and p_equal < LEVEL else "undecided"


def whole(test):
    """Are all planned seeds there, and do they allow a p? Else a test decides nothing."""
    return test["p"] is not None and test["n"] == test["planned"]


def judge(hypotheses, family):
    """Hypotheses {"id", "parts": tests} -> the same with p, holm_p, holm_claim and verdict.

    family {id: number of parts}: all that were planned; one without rows counts with p = 1.
    Supported: every part is above 0 and at least its claim, and the largest p of its parts is under
    0.05 after Holm. Refuted: one part excludes its claim, after Holm over all parts. All else is
    undecided.
    """
    absent = [family[name] for name in family.keys() - {h["id"] for h in hypotheses}]
    p = [
        max(x["p"] if whole(x) and x["effect"] > 0 else 1.0 for x in h["parts"]) for h in hypotheses
    ]
    tests = [test for h in hypotheses for test in h["parts"]]
    against = [test["p_against"] if whole(test) else 1.0 for test in tests]
    for test, adjusted in zip(tests, holm(against + [1.0] * sum(absent)), strict=False):
        test["holm_against"] = None if test["p"] is None else adjusted
    found = []
    for h, own, holm_p in zip(hypotheses, p, holm(p + [1.0] * len(absent)), strict=False):
        claims = [test["holm_against"] for test in h["parts"] if test["p"] is not None]
        numbers = {"p": own, "holm_p": holm_p, "holm_claim": min(claims, default=1.0)}
        found.append(h | numbers | {"verdict": verdict(h["parts"], holm_p)})
    return found


def verdict(tests, holm_p):
    """-> "supported", "refuted" or "undecided", which is also what lacks a planned run."""
    if any(test["n"] != test["planned"] for test in tests):
        return "undecided"
    if any(whole(test) and test["holm_against"] < LEVEL for test in tests):
        return "refuted"
    reached = all(whole(x) and x["low"] > 0 and x["effect"] >= x["claim"] for x in tests)
    return "supported" if reached and holm_p < LEVEL else "undecided"
