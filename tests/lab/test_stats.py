"""The statistics against scipy, by hand, and against simulations."""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from common.metrics import (
    bootstrap,
    from_bits,
    mean_std,
    plus_minus,
    share_interval,
    t_interval,
    to_bits,
)
from lab import report, stats

D = np.array([0.4, 1.9, 1.1, 2.2, 0.7])
INTERVAL = ("low", "high", "p")


def near(numbers):
    return pytest.approx(list(numbers))


def of(row, names):
    return [row[name] for name in names]


# ---- paired differences over seeds ---------------------------------------------------------------


@pytest.mark.parametrize("values", [D, -D, D - 1.2])
def test_a_paired_test_is_scipys(values):
    def p(mean, side):
        return scipy.stats.ttest_1samp(values, mean, alternative=side).pvalue

    theirs = scipy.stats.ttest_1samp(values, 0)
    row = stats.paired(values, claim=1.0, margin=2.0)
    assert of(row, INTERVAL) == near([*theirs.confidence_interval(), theirs.pvalue])
    assert row["p_against"] == pytest.approx(p(1.0, "less"))
    assert row["p_equal"] == pytest.approx(max(p(2.0, "less"), p(-2.0, "greater")))  # TOST
    assert row["effect"] == pytest.approx(values.mean())
    assert (row["n"], row["notes"], row["per_seed"]) == (5, [], near(values))
    alone = stats.paired(values)
    assert of(t_interval(values), INTERVAL) == near(of(alone, INTERVAL))


TIES = ([-6.33] * 3, [100 * 0.6833 - 75.0] * 5)
FEW = ([], [-6.33], [-6.33, -6.33], [1.0, 2.0])


@pytest.mark.parametrize("d", [*FEW, *TIES])
def test_two_seeds_and_seeds_that_tie_say_no_interval_and_no_p(d):
    why = "nothing varies" if len(d) > 2 else "under three"
    note = f"{len(d)} seed{'' if len(d) == 1 else 's'}: no interval, {why}"
    images = np.array(d)[:, None] + np.arange(8)  # though the images vary
    for row in [stats.paired(d, margin=9.0)] + [stats.paired(images, np.arange(8))] * bool(d):
        assert row["notes"] == [note] and row["n"] == len(d)
        assert set(of(row, [*INTERVAL, "p_against", "p_equal"])) == {None}
    assert stats.paired(d)["per_seed"] == d
    assert stats.paired(d)["effect"] == (pytest.approx(np.mean(d)) if d else None)
    assert t_interval(d) is None


@pytest.mark.parametrize("size", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_seeds_tie_when_they_differ_by_rounding_alone(size, sign):
    """The bound is 1e-9 of the largest value, and 1e-9 of values below 1."""
    step = 1e-9 * max(1.0, size)
    for factor, ties in ((0.9, True), (1.1, False)):
        d = factor * step * np.array([-1, 0, 1])  # their deviation is one step, or near it
        assert (stats.paired(sign * (size + d))["p"] is None) == ties
        assert (t_interval(sign * (size + d)) is None) == ties


# ---- seeds and test images, variances ------------------------------------------------------------


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
    t, mean = scipy.stats.t, each.mean()
    row = stats.paired(each, np.arange(30), claim=1.0, margin=2.0)
    assert row["high"] - row["effect"] == pytest.approx(t.ppf(0.975, df) * error)
    assert row["effect"] - row["low"] == pytest.approx(t.ppf(0.975, df) * error)
    assert row["p"] == pytest.approx(2 * t.sf(abs(mean) / error, df))
    assert row["p_against"] == pytest.approx(t.cdf((mean - 1) / error, df))
    outside = max(t.cdf((mean - 2) / error, df), t.sf((mean + 2) / error, df))
    assert row["p_equal"] == pytest.approx(outside)


def test_images_never_make_an_interval_narrower_or_a_p_smaller():
    """With their degrees of freedom alone they would: seeds differ much here, 500 images hardly."""
    each = np.array([0.0, 1.0, 3.0])[:, None] + np.random.default_rng(0).normal(0, 2, 500)
    alone = stats.paired(each.mean(1), claim=5.0, margin=9.0)
    both = stats.paired(each, np.arange(500), claim=5.0, margin=9.0)
    assert stats.paired(each, np.zeros(500))["p"] is None  # one illustration
    (_, df), (error, more) = stats.errors_of(each, np.arange(500))
    half = scipy.stats.t.ppf(0.975, more) * error
    assert more > df and half < alone["high"] - alone["effect"]
    assert both == alone


def test_the_interval_of_a_ratio_of_variances_is_that_of_f():
    rng = np.random.default_rng(1)
    calm, wild = rng.normal(0, 1, 12), rng.normal(0, 2, 10)
    ratio, law = calm.var(ddof=1) / wild.var(ddof=1), scipy.stats.f(11, 9)
    row, back = stats.variance(calm, wild), stats.variance(wild, calm)
    bounds = [100 * (1 - ratio / law.ppf(q)) for q in (0.025, 0.975)]
    assert of(row, INTERVAL) == near([*bounds, 2 * law.cdf(ratio)]) and 0 < row["p"] < 0.5
    assert of(row, ("n", "notes", "per_seed")) == [12, [], []]
    assert row["p_against"] == pytest.approx(law.sf(ratio))
    assert back["n"] == 10 and back["p"] == pytest.approx(row["p"])
    assert back["p_against"] == pytest.approx(scipy.stats.f(9, 11).sf(1 / ratio))
    assert back["effect"] == pytest.approx(100 * (1 - 1 / ratio))
    halved = scipy.stats.f(11, 9).sf(ratio / 0.5)  # the claim: half of the variance
    assert stats.variance(calm, wild, 50)["p_against"] == pytest.approx(halved)


def test_few_seeds_and_seeds_that_tie_have_no_variance_to_compare():
    few, many = np.random.default_rng(2).normal(size=(2, 10))
    row = stats.variance(few[:9], many)
    assert row["p"] == row["p_against"] == 1.0 and row["low"] < row["effect"] < row["high"]
    assert row["notes"] == ["variances need 10 seeds, there are 9"]
    assert stats.variance(many, few[:9])["notes"] == []
    for sides in ((np.ones(10), many), (many, np.ones(10))):
        row = stats.variance(*sides)
        assert row["effect"] is row["p"] is None
        assert row["notes"] == ["10 seeds: no interval, nothing varies"]


# ---- epochs to a threshold -----------------------------------------------------------------------


def curve(*linear):
    return {"epoch": list(range(len(linear))), "linear": list(linear)}


def reached_after(*epochs):
    """Curves that reach 20 % after these epochs of four."""
    return [curve(*np.minimum(40, np.arange(5) * 20 / x)) for x in epochs]


NEVER = curve(0, 5, 5, 5, 5)
RATIOS = np.array([0.5, 0.8, 0.4, 0.7])
PAIRS = list(zip(reached_after(*2 * RATIOS), reached_after(2, 2, 2, 2), strict=True))


def test_epochs_saved_are_percent_of_the_baselines():
    saved = 100 * (1 - RATIOS)
    row = stats.epochs_saved(PAIRS, 20.0, claim=10.0)
    assert row["per_seed"] == near(saved) and row["effect"] == pytest.approx(saved.mean())
    assert row["notes"] == [] and row["p"] == pytest.approx(scipy.stats.ttest_1samp(saved, 0)[1])
    against = scipy.stats.ttest_1samp(saved, 10, alternative="less").pvalue
    assert row["p_against"] == pytest.approx(against)


def test_logarithms_of_epochs_give_a_geometric_mean_and_keep_the_sign():
    logs = np.log(RATIOS)
    row = stats.epochs_saved(PAIRS, 20.0, claim=10.0, logs=True)
    found = scipy.stats.ttest_1samp(logs, 0)
    high, low = 100 * (1 - np.exp(found.confidence_interval()))
    effect = 100 * (1 - np.exp(logs.mean()))
    assert effect > 0  # fewer epochs are epochs saved
    assert of(row, ("effect", *INTERVAL)) == near([effect, low, high, found.pvalue])
    assert row["per_seed"] == near(100 * (1 - RATIOS))
    against = scipy.stats.ttest_1samp(logs, math.log(0.9), alternative="greater").pvalue
    assert row["p_against"] == pytest.approx(against)
    back = stats.epochs_saved([pair[::-1] for pair in PAIRS], 20.0, logs=True)
    assert back["effect"] == pytest.approx(100 * (1 - np.exp(-logs.mean())))
    few = stats.epochs_saved(PAIRS[:2], 20.0, logs=True)
    assert few["p"] is few["low"] is None and few["per_seed"] == near([50, 20])


@pytest.mark.parametrize(
    ("pair", "note", "percent", "undecided"),  # note: of the first pair, which replaces PAIRS[0]
    [
        ((NEVER, PAIRS[0][1]), "1 runs and 0 baselines of 4 never reach 20.0 %", -100, {"p"}),
        ((PAIRS[0][0], NEVER), "0 runs and 1 baselines of 4 never reach 20.0 %", 75, {"p_against"}),
        ((NEVER, NEVER), "1 runs and 1 baselines of 4 never reach 20.0 %", 0, {"p", "p_against"}),
        ((PAIRS[0][1],) * 2, "1 pairs are one run up to the threshold", 0, {"p", "p_against"}),
    ],
)
def test_a_run_that_never_arrives_decides_only_what_a_bound_can(pair, note, percent, undecided):
    row = stats.epochs_saved([pair, *PAIRS[1:]], 20.0, claim=50.0)
    assert row["notes"] == [note] and row["per_seed"][0] == pytest.approx(percent)
    assert {name for name in ("p", "p_against") if row[name] == 1.0} == undecided


def test_epochs_of_two_seeds_of_none_and_from_the_start_say_nothing():
    assert stats.epochs_saved([], 20.0)["effect"] is None
    few = stats.epochs_saved([(NEVER, PAIRS[0][1]), (PAIRS[0][0], NEVER)], 20.0)
    assert few["p"] is few["p_against"] is None
    row = stats.epochs_saved(PAIRS, 0.0)
    assert row["n"] == 4 and row["effect"] is row["p"] is None
    assert row["notes"] == ["the random-init encoder has the threshold of 0.0 % already"]


# ---- verdicts, and common/metrics.py -------------------------------------------------------------


WORDS = {  # (effect, p, p_equal): word
    (1.0, 0.04, 0.5): "better",
    (0.1, 0.04, 0.04): "better",  # a small difference, and sure
    (-1.0, 0.04, 0.5): "worse",
    (0.1, 0.5, 0.04): "equivalent",
    (1.0, 0.05, 0.05): "undecided",
    (1.0, None, None): "undecided",
}


def test_holm_goes_from_the_smallest_p_up_and_never_back_down_and_words_of_a_difference():
    assert {case: stats.word(*case) for case in WORDS} == WORDS
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.02, 0.021, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert stats.holm([0.03, None]) == [0.06, None]


def part(**changes):
    """A test that supports its claim; changes break it."""
    row = {"n": 5, "planned": 5, "effect": 2.0, "low": 1.0, "high": 3.0, "claim": 1.0, "p": 0.01}
    return row | {"p_against": 0.9} | changes


VERDICTS = [  # of hypothesis A; its parts, and the parts of B, of which there is no row
    ([{}], 3, "supported"),
    ([{"low": 0.0}], 3, "undecided"),
    ([{"effect": 0.99}], 3, "undecided"),
    ([{"effect": 1.0}], 3, "supported"),  # the estimate reaches the claim
    ([{"n": 4}], 3, "undecided"),
    ([{"p": None}], 3, "undecided"),
    ([{"p": 0.025}], 3, "undecided"),  # times two
    ([{"p": 0.0249}], 3, "supported"),
    ([{"p_against": 0.012}], 3, "refuted"),  # times four
    ([{"p_against": 0.0125}], 3, "supported"),
    ([{"p_against": 0.001, "n": 4}], 3, "undecided"),
    # a hypothesis is as strong as its weakest part
    ([{"p": 0.001}, {"p": 0.03}], 0, "supported"),
    ([{"p": 0.001}, {"p": 0.06}], 0, "undecided"),
    ([{}, {"effect": -0.5, "low": -1.0}], 0, "undecided"),
    ([{}, {"effect": 0.9}], 0, "undecided"),
    ([{"p_against": 0.0249}, {"p_against": 0.2}], 0, "refuted"),
    ([{"p_against": 0.001, "n": 4}, {"p_against": 0.001}], 0, "undecided"),  # one lacks a run
]


@pytest.mark.parametrize(("parts", "others", "verdict"), VERDICTS)
def test_the_verdict_of_a_hypothesis(parts, others, verdict):
    family = {"A": len(parts), "B": others} if others else {"A": len(parts)}
    (found,) = stats.judge([{"id": "A", "parts": [part(**x) for x in parts]}], family)
    assert found["verdict"] == verdict
    assert found["id"] == "A" and len(found["parts"]) == len(parts)


def test_a_test_that_lacks_a_run_counts_as_one_without_rows():
    """Its small p must not take its rank in Holm's method: 0.03 is the smallest of two."""
    whole, lacking = part(p_against=0.03), part(p_against=0.001, n=4)
    hypotheses = [{"id": "A", "parts": [whole]}, {"id": "B", "parts": [lacking]}]
    found = stats.judge(hypotheses, {"A": 1, "B": 1})
    assert [h["parts"][0]["holm_against"] for h in found] == [0.06, 1.0]
    assert of(found[0], ("p", "holm_p", "holm_claim")) == [0.01, 0.02, 0.06]
    assert of(found[1], ("p", "holm_p", "holm_claim")) == [1.0, 1.0, 1.0]
    no_p = part(p=None, p_against=None, low=None, high=None)
    (found,) = stats.judge([{"id": "A", "parts": [no_p]}], {"A": 1})
    assert found["parts"][0]["holm_against"] is None
    assert of(found, ("p", "holm_p", "holm_claim")) == [1.0, 1.0, 1.0]
    wrong_way = part(effect=-0.5, low=-1.0, p=0.001)
    (found,) = stats.judge([{"id": "A", "parts": [wrong_way]}], {"A": 1})
    assert found["p"] == 1.0


def a_study(means, against):
    """A study of arms with these means, five seeds each."""
    noise = np.random.default_rng(0).normal(0, 1, (len(means), 5))
    rows = {}
    for (arm, mean), some in zip(means.items(), noise, strict=True):
        rows[arm] = {seed: {"metrics": {"top1": mean + x}} for seed, x in enumerate(some)}
    plan = report.DEFAULTS | {"compare": ["top1"], "seeds": range(5), "margin": 0.5}
    plan["arms"] = dict.fromkeys(means, against)
    return SimpleNamespace(plan=plan, rows=rows, groups=None)


def test_where_the_best_arm_is_the_baseline_all_pairs_count():
    """Of four arms there are six pairs, any of which could have been asked about."""
    study = a_study({"a": 50.0, "b": 47.0, "c": 46.0, "d": 40.0}, "best")
    found = {row["arm"]: row for row in report.differences(study)}
    assert found.keys() == {"b", "c", "d"} and {row["against"] for row in found.values()} == {"a"}
    smallest = min(found.values(), key=lambda row: row["p"])
    assert smallest["holm_p"] == pytest.approx(6 * smallest["p"])
    study.plan["arms"] = dict.fromkeys("abcd", "a")
    planned = {row["arm"]: row for row in report.differences(study)}
    assert planned[smallest["arm"]]["holm_p"] == pytest.approx(3 * smallest["p"])


def test_a_difference_that_lacks_a_run_is_open_and_takes_no_rank():
    """b has a smaller p than c. Without a run of it, c has the smallest of two, b no verdict."""
    study = a_study({"a": 50.0, "b": 30.0, "c": 45.0}, "a")
    b, c = report.differences(study)
    assert b["p"] < c["p"] and c["holm_p"] == max(c["p"], b["holm_p"]) and b["verdict"] == "worse"
    study.plan["less"] = ["top1"]  # of which less is better
    assert report.differences(study)[0]["verdict"] == "better"
    del study.rows["b"][4]
    b, again = report.differences(study)
    assert b["verdict"] == "open: runs are missing" and b["holm_p"] is None
    assert again["holm_p"] == pytest.approx(2 * c["p"])


def test_two_studies_may_have_a_hypothesis_of_one_name():
    twins = [{"id": "A", "parts": [part(p=p)]} for p in (0.04, 0.01)]
    found = [of(h, ("p", "holm_p")) for h in stats.judge(twins, {"A": 1})]
    assert found == [[0.04, 0.04], [0.01, 0.02]]


def test_mean_and_deviation_are_of_samples():
    found = mean_std([1.0, 2.0, 4.0])
    assert of(found, ("mean", "std", "n")) == near([7 / 3, math.sqrt(7 / 3), 3])
    assert mean_std([2.0]) == {"mean": 2.0, "std": None, "n": 1}
    assert [plus_minus(x) for x in (found, mean_std([2.0]), None)] == ["2.3 ± 1.5", "2.0", "-"]
    right = [True, False, False, False, False, True, True, True, True, True]
    assert to_bits(right) == "87c0:10"
    assert from_bits("87c0:10", 10).tolist() == from_bits("87c0", 10).tolist() == right
    assert from_bits("87c0", 20) is from_bits("87c0:10", 12) is None  # it left some characters out


def test_the_share_of_few_pictures_that_are_all_right_has_an_interval():
    """And of many, where illustrations are whole, the bootstrap is wider, and stays."""
    reach = 196 * math.sqrt(22 / 24 * 2 / 24 / 20)
    assert share_interval(np.ones(20), np.arange(20)) == near([100 - reach, 100])
    assert share_interval(np.zeros(20), np.arange(20)) == near([0, reach])
    right = np.arange(400) % 40 < 20
    found = bootstrap(100.0 * right[None], np.arange(400) // 20)
    assert share_interval(right, np.arange(400) // 20) == (found["low"], found["high"])


def test_the_bootstrap_is_what_its_formula_says():
    """The same draws in the plainest way: every seed and illustration as often as it was drawn."""
    d, groups = np.random.default_rng(3).normal(0.4, 1, (3, 8)), np.array([0, 0, 1, 2, 2, 2, 3, 4])
    rng, means = np.random.default_rng(0), []
    for _ in range(50):
        illustrations, seeds = rng.integers(5, size=5), rng.integers(3, size=3)
        values = [d[s, groups == g] for s, g in product(seeds, illustrations)]
        means.append(np.concatenate(values).mean())
    means = np.array(means)
    side = min((means <= 0).mean(), (means >= 0).mean())
    found = bootstrap(d, groups, draws=50)
    expected = [d.mean(), *np.quantile(means, (0.025, 0.975)), 2 * side]
    assert of(found, ("mean", *INTERVAL)) == near(expected) and 0.05 < found["p"] < 1
    assert bootstrap(-d, groups, draws=50)["p"] == found["p"]
    assert bootstrap(np.ones((3, 8)), groups, draws=50)["p"] == 2 / 50
    assert bootstrap(np.zeros((3, 8)), groups, draws=50)["p"] == 1.0
    assert bootstrap(np.ones((3, 8)), groups)["p"] == 2 / 2000
