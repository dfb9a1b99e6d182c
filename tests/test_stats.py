"""The statistics against scipy, by hand, and against a simulation. `tests/mutants.py` changes one thing at a time."""

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats

from common.stats import (
    LEAST_SEEDS,
    bootstrap,
    from_bits,
    mean_std,
    plus_minus,
    t_interval,
    to_bits,
)
from experiments import stats

D = np.array([0.4, 1.9, 1.1, 2.2, 0.7])


def test_a_paired_test_is_scipys_whatever_its_sign():
    for values in (D, -D):
        theirs = scipy.stats.ttest_1samp(values, 0)
        low, high = theirs.confidence_interval()
        ours = stats.paired(values, claim=1.0)
        assert [ours[k] for k in ("low", "high", "p")] == pytest.approx([low, high, theirs.pvalue])
        one_sided = scipy.stats.ttest_1samp(values, 1.0, alternative="less").pvalue
        assert ours["p_against"] == pytest.approx(one_sided)


def test_equivalence_is_two_one_sided_tests():
    for values in (D - 1.2, D, -D):
        below = scipy.stats.ttest_1samp(values, 2.0, alternative="less").pvalue
        above = scipy.stats.ttest_1samp(values, -2.0, alternative="greater").pvalue
        assert stats.paired(values, margin=2.0)["p_equal"] == pytest.approx(max(below, above))
    assert stats.paired(D)["p_equal"] is None


def test_words_of_a_difference():
    assert stats.word(1.0, 0.04, 0.5) == "better" and stats.word(-1.0, 0.04, 0.5) == "worse"
    assert stats.word(-0.1, 0.04, 0.5) == "worse" and stats.word(0.1, 0.04, 0.5) == "better"
    assert stats.word(0.1, 0.5, 0.04) == "equivalent" and stats.word(0.1, 0.5, 0.5) == "undecided"
    assert stats.word(0.1, 0.04, 0.04) == "better"  # a small difference, and sure
    assert stats.word(1.0, 0.05, 0.05) == "undecided" and stats.word(1.0, None, None) == "undecided"


def test_holm_goes_from_the_smallest_p_up_and_never_back_down():
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.02, 0.021, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert stats.holm([0.03, None]) == [0.06, None]


def curve(*linear):
    return {"epoch": list(range(len(linear))), "linear": list(linear)}


def test_epochs_saved_are_percent_of_the_baselines_and_a_bound_decides_nothing():
    base = [curve(0, 10, 20, 30, 40), curve(0, 10, 20, 30, 40), curve(0, 11, 20, 30, 40)]
    arm = [curve(0, 20, 40, 40, 40), curve(0, 22, 40, 40, 40), curve(0, 20, 40, 40, 40)]
    pairs = list(zip(arm, base, strict=True))
    row = stats.epochs_saved(pairs, 20.0)
    assert row["per_seed"] == pytest.approx([50, 100 * (1 - 20 / 22 / 2), 50]) and row["p"] < 0.01
    logs = stats.epochs_saved(pairs, 20.0, logs=True)
    geometric = np.exp(np.mean(np.log(1 - np.array(row["per_seed"]) / 100)))
    assert logs["effect"] == pytest.approx(100 * (1 - geometric))
    never = [(curve(0, 5, 5, 5, 5), base[0]), *pairs[1:]]
    row = stats.epochs_saved(never, 20.0, claim=10.0)
    assert row["notes"] == ["1 runs and 0 baselines of 3 never reach 20.0 %"]
    assert row["per_seed"][0] == -100 and row["p"] == 1.0 and row["p_against"] < 1.0
    never = [(arm[0], curve(0, 5, 5, 5, 5)), *pairs[1:]]
    row = stats.epochs_saved(never, 20.0, claim=99.0)
    assert row["notes"] == ["0 runs and 1 baselines of 3 never reach 20.0 %"]
    assert row["per_seed"][0] == 75 and row["p"] < 1.0 and row["p_against"] == 1.0
    same = stats.epochs_saved([(base[0], base[0]), *pairs[1:]], 20.0)
    assert same["p"] == same["p_against"] == 1.0
    assert stats.epochs_saved(pairs, 0.0)["p"] is None  # the untrained encoder has it


def part(**changes):
    """A test that supports its claim; changes break it."""
    row = {"n": 5, "planned": 5, "effect": 2.0, "low": 1.0, "high": 3.0, "claim": 1.0, "p": 0.01}
    row |= {"p_against": 0.9, "p_equal": 0.9, "bootstrap": {"low": 0.5}}
    return row | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "supported"),
        ({"low": 0.0}, "undecided"),
        ({"effect": 0.99}, "undecided"),
        ({"effect": 1.0}, "supported"),  # the estimate reaches the claim
        ({"n": 4}, "undecided"),
        ({"p": None}, "undecided"),
        ({"p": 0.025}, "undecided"),  # times two
        ({"p": 0.0249}, "supported"),
        ({"bootstrap": {"low": 0.0}}, "undecided"),
        ({"bootstrap": None}, "supported"),
        ({"p_against": 0.012}, "refuted"),  # times four
        ({"p_against": 0.0125}, "supported"),
        ({"p_against": 0.001, "n": 4}, "undecided"),
        ({"effect": 0.1, "p_equal": 0.04}, "equivalent"),
        ({"effect": 0.1, "p_equal": 0.05}, "undecided"),
        ({"effect": 0.1, "p_equal": None}, "undecided"),
    ],
)
def test_the_verdict_of_one_part(changes, verdict):
    family = {"A": 1, "B": 3}  # B was planned, and has no rows
    (found,) = stats.judge([{"id": "A", "parts": [part(**changes)]}], family)
    assert found["verdict"] == verdict and found["id"] == "A" and len(found["parts"]) == 1


def test_a_test_that_lacks_a_run_counts_as_one_without_rows():
    """Its small p must not take its rank in Holm's method: 0.03 is the smallest of two."""
    whole, lacking = part(p_against=0.03), part(p_against=0.001, n=4)
    found = stats.judge(
        [{"id": "A", "parts": [whole]}, {"id": "B", "parts": [lacking]}], {"A": 1, "B": 1}
    )
    assert [h["parts"][0]["holm_against"] for h in found] == [0.06, 1.0]
    assert [h["verdict"] for h in found] == ["supported", "undecided"]
    assert [h["holm_p"] for h in found] == [0.02, 1.0]
    assert [h["holm_claim"] for h in found] == [0.06, 1.0]
    no_p = part(p=None, p_against=None, low=None, high=None)
    (found,) = stats.judge([{"id": "A", "parts": [no_p]}], {"A": 1})
    assert found["parts"][0]["holm_against"] is None
    assert found["p"] == found["holm_claim"] == 1.0
    sure = part(n=4, p_against=0.001), part(p_against=0.001)
    (found,) = stats.judge([{"id": "A", "parts": list(sure)}], {"A": 2})
    assert found["verdict"] == "undecided"  # one part lacks a run


def test_all_parts_of_a_hypothesis_have_to_be_equivalent():
    parts = [part(effect=0.1, p_equal=0.02), part(effect=0.1, p_equal=0.04)]
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["verdict"] == "equivalent"
    parts = [part(effect=0.1, p_equal=0.03), part(effect=0.1, p_equal=0.04)]  # times two
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["verdict"] == "undecided"


def test_a_hypothesis_is_as_strong_as_its_weakest_part():
    parts = [part(p=0.001), part(p=0.03)]
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["p"] == found["holm_p"] == 0.03 and found["verdict"] == "supported"
    parts = [part(p=0.001), part(p=0.001, effect=-0.5, low=-1.0)]
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["p"] == 1.0 and found["verdict"] == "undecided"
    parts = [part(), part(effect=0.9)]  # under its claim
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["p"] == 0.01 and found["verdict"] == "undecided"
    parts = [part(p_against=0.0249), part(p_against=0.2)]
    (found,) = stats.judge([{"id": "A", "parts": parts}], {"A": 2})
    assert found["verdict"] == "refuted"


def test_an_interval_is_2_48_deviations_wide_at_three_seeds():
    d = [1.0, 2.5, 1.8]
    found, ours = stats.paired(d), t_interval(d)
    names = ("low", "high", "p")
    assert [found[k] for k in names] == pytest.approx([ours[k] for k in names])
    half = (found["high"] - found["effect"]) / np.std(d, ddof=1)
    assert half == pytest.approx(2.484, abs=1e-3)


@pytest.mark.parametrize(
    "d", [[], [-6.33], [-6.33, -6.33], [1.0, 2.0], [-6.33] * 3, [100 * 0.6833 - 75.0] * 5]
)
def test_two_seeds_and_seeds_that_tie_say_no_interval_and_no_p(d):
    each = np.repeat(np.array(d)[:, None], 8, 1) + np.arange(8)  # though the images vary
    for found in [stats.paired(d)] + [stats.paired(each, np.arange(8))] * bool(d):
        assert found["low"] is found["high"] is found["p"] is found["p_against"] is None
        name = f"{len(d)} seed{'' if len(d) == 1 else 's'}: no interval"
        assert found["notes"][0].startswith(name)


def test_the_error_of_the_test_images_is_that_of_means_of_illustrations():
    """Of groups of one size: the variance of their means over G. Of others: by hand."""
    each = np.random.default_rng(0).normal(size=(4, 60))
    variance, count = stats.image_variance(each, np.arange(60) // 3)
    means = each.mean(0).reshape(20, 3).mean(1)
    assert count == 20 and variance == pytest.approx(means.var(ddof=1) / 20)
    d, groups = np.array([[1.0, 2.0, 6.0]]), ["a", "a", "b"]  # mean 3: sums of -3 and +3
    assert stats.image_variance(d, groups) == (pytest.approx(2 / 1 * (9 + 9) / 9), 2)


def test_both_errors_make_the_interval_and_the_degrees_of_freedom_are_satterthwaites():
    seeds, images = np.random.default_rng(3), np.random.default_rng(4)
    each = seeds.normal(0, 1, (5, 30)) + images.normal(0, 3, 30)
    A, (B, G) = each.mean(1).var(ddof=1) / 5, stats.image_variance(each, np.arange(30))
    df, error = (A + B) ** 2 / (A**2 / 4 + B**2 / (G - 1)), math.sqrt(A + B)
    t = scipy.stats.t
    found = stats.paired(each, np.arange(30), claim=1.0, margin=2.0)
    assert found["high"] - found["effect"] == pytest.approx(t.ppf(0.975, df) * error)
    assert found["p"] == pytest.approx(2 * t.sf(abs(each.mean()) / error, df))
    assert found["p_against"] == pytest.approx(t.cdf((each.mean() - 1) / error, df))
    outside = max(t.cdf((each.mean() - 2) / error, df), t.sf((each.mean() + 2) / error, df))
    assert found["p_equal"] == pytest.approx(outside)


def test_images_never_make_an_interval_narrower_or_a_p_smaller():
    """With their degrees of freedom alone they would: seeds differ much here, 500 images hardly."""
    each = np.array([0.0, 1.0, 3.0])[:, None] + np.random.default_rng(0).normal(0, 2, 500)
    alone = stats.paired(each.mean(1), claim=5.0, margin=9.0)
    both = stats.paired(each, np.arange(500), claim=5.0, margin=9.0)
    (_, df), (error, more) = stats.errors_of(each, np.arange(500))
    half = scipy.stats.t.ppf(0.975, more) * error
    assert more > df and half < alone["high"] - alone["effect"]
    assert both | {"bootstrap": None} == alone


def test_an_interval_covers_what_other_images_would_have_said():
    """200 experiments of 5 seeds on 40 images that truly tie: seeds alone are misled by images."""
    rng, missed, alone = np.random.default_rng(2), 0, 0
    for _ in range(200):
        d = rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 1, 40) + rng.normal(0, 0.2, (5, 40))
        errors = stats.errors_of(d, np.arange(40))
        p = [2 * scipy.stats.t.sf(abs(d.mean()) / error, df) for error, df in errors]
        missed += max(p) < 0.05
        alone += stats.paired(d.mean(1))["p"] < 0.05
    assert missed <= 20 and alone > 60


def test_the_bootstrap_covers_the_truth():
    """200 experiments of 5 seeds and 80 images with no true difference: about 5 % of the intervals
    miss 0.
    """
    rng, missed = np.random.default_rng(1), 0
    for _ in range(200):
        d = rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 1, (5, 80))
        found = bootstrap(d, np.arange(80), draws=300)
        missed += not found["low"] <= 0 <= found["high"]
    assert 2 <= missed <= 40  # a percentile bootstrap over few seeds is known to be somewhat narrow


# ---- rows that say no interval -------------------------------------------------------------------


def test_what_has_no_interval_says_why_and_keeps_its_mean():
    row = stats.paired([2.0, 4.0], claim=1.0, margin=1.0)
    assert row == dict.fromkeys(stats.FIELDS) | {
        "effect": 3.0,
        "n": 2,
        "per_seed": [2.0, 4.0],
        "notes": ["2 seeds: no interval, under three"],
    }
    assert stats.paired([])["effect"] is None
    assert stats.paired([5.0])["notes"] == ["1 seed: no interval, under three"]
    assert stats.paired([5.0] * 3)["notes"] == ["3 seeds: no interval, nothing varies"]


def test_seeds_tie_when_they_differ_by_rounding_alone():
    """The bound is 1e-9 of the largest value, and 1e-9 of values below 1."""
    for size in (0.01, 1.0, 1e6):
        step = 1e-9 * max(1.0, size)
        near = [size - 0.9 * step, size, size + 0.9 * step]  # the deviation is 0.9 steps
        far = [size - 1.1 * step, size, size + 1.1 * step]
        for sign in (1, -1):
            assert stats.paired(sign * np.array(near))["p"] is None
            assert stats.paired(sign * np.array(far))["p"] is not None


def test_images_of_one_illustration_say_no_interval():
    values = np.random.default_rng(0).normal(size=(5, 4))
    assert stats.paired(values, np.zeros(4))["p"] is None
    assert stats.paired(values, np.array([0, 0, 1, 1]))["p"] is not None


def test_the_fields_of_a_test_are_complete():
    values = np.random.default_rng(0).normal(size=(5, 40))
    row = stats.paired(values, np.arange(40))
    assert row["effect"] == pytest.approx(values.mean()) and row["n"] == 5 and row["notes"] == []
    assert row["per_seed"] == pytest.approx(values.mean(1))
    assert row["bootstrap"] == bootstrap(values, np.arange(40))
    assert row["high"] - row["effect"] == pytest.approx(row["effect"] - row["low"])
    assert stats.paired(values.mean(1))["bootstrap"] is None


# ---- variances, by scipy -------------------------------------------------------------------------


def test_the_interval_of_a_ratio_of_variances_is_that_of_f():
    rng = np.random.default_rng(1)
    calm, wild = rng.normal(0, 1, 12), rng.normal(0, 2, 10)
    ratio, law = calm.var(ddof=1) / wild.var(ddof=1), scipy.stats.f(11, 9)
    row = stats.variance(calm, wild)
    bounds = [100 * (1 - ratio / law.ppf(q)) for q in (0.025, 0.975)]
    assert [row["low"], row["high"]] == pytest.approx(bounds)
    assert row["p"] == pytest.approx(2 * law.cdf(ratio)) and 0 < row["p"] < 0.5
    assert row["n"] == 12 and row["notes"] == [] and row["per_seed"] == []
    assert row["p_against"] == 0.5
    back = stats.variance(wild, calm)
    assert back["p"] == 1.0
    assert back["p_against"] == pytest.approx(scipy.stats.f(9, 11).sf(1 / ratio))
    assert back["n"] == 10 and back["effect"] == pytest.approx(100 * (1 - 1 / ratio))


def test_few_seeds_and_seeds_that_tie_have_no_variance_to_compare():
    rng = np.random.default_rng(2)
    few, many = rng.normal(size=9), rng.normal(size=10)
    row = stats.variance(few, many)
    assert row["p"] == row["p_against"] == 1.0 and row["effect"] is not None
    assert row["notes"] == ["variances need 10 seeds, there are 9"]
    assert row["low"] < row["effect"] < row["high"]
    assert stats.variance(many, few)["notes"] == []
    for sides in ((np.ones(10), many), (many, np.ones(10))):
        row = stats.variance(*sides)
        assert row["effect"] is row["p"] is None
        assert row["notes"] == ["10 seeds: no interval, nothing varies"]


# ---- epochs --------------------------------------------------------------------------------------


def test_epochs_that_are_bounds_are_noted():
    base = [curve(0, 10, 20, 30), curve(0, 11, 20, 30), curve(0, 12, 20, 30)]
    arm = [curve(0, 20, 30, 30), curve(0, 22, 30, 30), curve(0, 20, 30, 30)]
    never = curve(0, 1, 1, 1)
    row = stats.epochs_saved([(never, base[0]), (arm[1], never), (arm[2], base[2])], 20.0)
    assert row["notes"] == ["1 runs and 1 baselines of 3 never reach 20.0 %"]
    assert row["p"] == row["p_against"] == 1.0
    row = stats.epochs_saved([(base[0], base[0]), (arm[1], base[1]), (arm[2], base[2])], 20.0)
    assert row["notes"] == ["1 pairs are one run up to the threshold"] and row["per_seed"][0] == 0
    row = stats.epochs_saved(list(zip(arm, base, strict=True)), 20.0)
    assert row["notes"] == [] and row["p"] < 1 and row["p_against"] < 1
    row = stats.epochs_saved(list(zip(arm, base, strict=True)), 0.0)
    assert row["n"] == 3 and row["effect"] is None
    assert row["notes"] == ["the random-init encoder has the threshold of 0.0 % already"]
    both = [(never, never), (arm[1], base[1]), (arm[2], base[2])]
    row = stats.epochs_saved(both, 20.0)  # two runs that never arrive are not one run
    assert row["notes"] == ["1 runs and 1 baselines of 3 never reach 20.0 %"]
    assert stats.epochs_saved([], 20.0)["effect"] is None
    few = stats.epochs_saved([(never, base[0]), (arm[1], never)], 20.0)
    assert few["p"] is few["p_against"] is None  # two seeds say nothing


def test_the_logarithms_of_ratios_have_a_t_test():
    ratios = np.array([0.5, 0.8, 0.4, 0.7])
    pairs = [(curve(0, 20 / r), curve(0, 20)) for r in ratios]  # reached after r epochs, and one
    logs = np.log(ratios)
    row = stats.epochs_saved(pairs, 20.0, claim=10.0, logs=True)
    found = scipy.stats.ttest_1samp(logs, 0)
    high, low = 100 * (1 - np.exp(found.confidence_interval()))
    assert [row["low"], row["high"]] == pytest.approx([low, high])
    assert row["effect"] == pytest.approx(100 * (1 - np.exp(logs.mean())))
    assert row["per_seed"] == pytest.approx(100 * (1 - ratios))
    assert row["p"] == pytest.approx(found.pvalue)
    against = scipy.stats.ttest_1samp(logs, math.log(0.9), alternative="greater").pvalue
    assert row["p_against"] == pytest.approx(against)
    plain = stats.epochs_saved(pairs, 20.0, claim=10.0)
    against = scipy.stats.ttest_1samp(100 * (1 - ratios), 10, alternative="less").pvalue
    assert plain["p_against"] == pytest.approx(against)
    few = stats.epochs_saved(pairs[:2], 20.0, logs=True)
    assert few["p"] is few["low"] is None and few["per_seed"] == pytest.approx([50, 20])


# ---- common/stats.py -----------------------------------------------------------------------------


def test_mean_and_deviation_are_of_samples():
    assert mean_std([1.0, 2.0, 4.0]) == {
        "mean": pytest.approx(7 / 3),
        "std": pytest.approx(math.sqrt(7 / 3)),
        "n": 3,
    }
    assert mean_std([2.0]) == {"mean": 2.0, "std": None, "n": 1}
    assert mean_std([2.0, 3.0])["std"] == pytest.approx(math.sqrt(0.5))
    assert plus_minus(mean_std([1.0, 2.0, 4.0])) == "2.3 ± 1.5"
    assert plus_minus(mean_std([2.0])) == "2.0" and plus_minus(None) == "-"


def test_the_t_interval_of_two_and_of_seeds_that_tie_is_none():
    assert LEAST_SEEDS == 3
    assert t_interval([1.0, 2.0]) is t_interval([]) is t_interval([5.0] * 4) is None
    found = t_interval([1.0, 2.5, 1.8])
    assert found["mean"] == pytest.approx(5.3 / 3)
    for size in (0.01, 1.0, 1e6):
        step = 1e-9 * max(1.0, size) * math.sqrt(1.5)  # of a deviation of 1e-9
        for sign in (1, -1):
            d = sign * np.array([size - step, size, size + step])
            assert t_interval(size * sign + 0.9 * (d - size * sign)) is None
            assert t_interval(size * sign + 1.1 * (d - size * sign)) is not None


def test_bits_are_eight_to_two_digits():
    right = [True, False, False, False, False, True, True, True, True, True]
    assert to_bits(right) == "87c0"
    assert from_bits("87c0", 10).tolist() == right


def test_the_bootstrap_is_what_its_formula_says():
    """The same draws in the plainest way: every seed and illustration as often as it was drawn."""
    d, groups = np.random.default_rng(3).normal(0.4, 1, (3, 8)), np.array([0, 0, 1, 2, 2, 2, 3, 4])
    rng, means = np.random.default_rng(0), []
    for _ in range(50):
        illustrations, seeds = rng.integers(5, size=5), rng.integers(3, size=3)
        values = [d[s, groups == g] for s, g in product(seeds, illustrations)]
        means.append(np.concatenate(values).mean())
    low, high = np.quantile(means, (0.025, 0.975))
    side = min(np.mean(np.array(means) <= 0), np.mean(np.array(means) >= 0))
    found = bootstrap(d, groups, draws=50)
    assert [found["low"], found["high"]] == pytest.approx([low, high])
    assert found["mean"] == pytest.approx(d.mean())
    assert found["p"] == pytest.approx(2 * side) and 0.05 < found["p"] < 1
    assert bootstrap(-d, groups, draws=50)["p"] == found["p"]
    assert bootstrap(np.ones((3, 8)), groups, draws=50)["p"] == 2 / 50
    assert bootstrap(np.zeros((3, 8)), groups, draws=50)["p"] == 1.0


def test_the_sampler_makes_the_mistakes_that_it_says():
    from mutants import all_mutants

    source = "y = max(a, 3) - b * f(c, 0.5) if a < b and not c else None  # é\n"
    found = {after for _, _, after, _ in all_mutants(source)}
    assert found >= {"4", "2", "0.25", "min", "f(0.5, c)", "b / f(c, 0.5)", "b", "a <= b", "c"}
    assert found >= {"max(a, 3) + b * f(c, 0.5)", "a < b or not c", "max(a, 3)", "None"}
    assert "max(3, a)" not in found  # the same
    assert all(text.endswith("# é\n") for *_, text in all_mutants(source))
