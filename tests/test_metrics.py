"""Metrics, classifiers and statistics against scikit-learn, scikit-image, scipy, and against formulas by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    top_k_accuracy_score,
)
from sklearn.neighbors import KNeighborsClassifier

import demo
import probe
from common import evaluate, metrics, plots
from common.stats import bootstrap, t_interval
from experiments import stats, stress


@pytest.fixture(scope="module")
def blobs():
    """Five overlapping classes in 12 correlated dimensions: train and held features and labels."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (400,), generator=draws)
    centres, mix = torch.randn(5, 12, generator=draws), torch.randn(12, 12, generator=draws)
    x = (centres[labels] + 0.8 * torch.randn(400, 12, generator=draws)) @ mix
    return x[:300], labels[:300], x[300:], labels[300:]


# ---- scikit-learn --------------------------------------------------------------------------------


def test_the_strength_of_the_probe_is_the_best_on_the_rows_to_choose_on(blobs):
    x, labels, held, truth = blobs
    scores, C = metrics.logistic_probe(x, labels, held, truth, 6)
    z, z_held = evaluate.standardise(x, held)
    fits = [LogisticRegression(C=c, tol=1e-7, max_iter=5000) for c in metrics.STRENGTHS]
    right = [fit.fit(z, labels).score(z_held, truth) for fit in fits]
    assert metrics.STRENGTHS[right.index(max(right))] == C
    found = scores(held)
    theirs = fits[metrics.STRENGTHS.index(C)].predict_log_proba(z_held)
    assert found[:, :5].numpy() == pytest.approx(theirs, abs=1e-2)
    assert found[:, 5].isneginf().all()  # no row has this class


def test_ridge_is_sklearns(blobs):
    z, labels = evaluate.standardise(blobs[0])[0], blobs[1]
    theirs = Ridge(alpha=10.0).fit(z.numpy(), np.eye(5)[labels.numpy()])
    W, b = evaluate.ridge(z, labels, 5, 10.0)
    np.testing.assert_allclose(W.T.numpy(), theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(b.numpy(), theirs.intercept_, atol=1e-9)


def test_knn_counts_as_sklearn_does(blobs):
    x, labels, held, _ = blobs
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(x.numpy(), labels.numpy())
    found = evaluate.knn_votes(x, labels, held, 5).argmax(1)
    assert found.tolist() == theirs.predict(held.numpy()).tolist()


def test_classification_is_sklearns(blobs):
    scores, truth = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)), blobs[1][:200]
    found = scores.argmax(1)
    table = metrics.classification(scores, truth, torch.ones(5))["confusion"]
    assert metrics.macro_f1(found, truth) == pytest.approx(f1_score(truth, found, average="macro"))
    assert (np.array(table) == confusion_matrix(truth, found)).all()
    assert evaluate.topk(scores, truth, 3) == pytest.approx(
        top_k_accuracy_score(truth, scores, k=3)
    )


def test_retrieval_is_the_mean_of_sklearns_average_precision(blobs):
    x, labels = blobs[0][:120], blobs[1][:120]
    groups = torch.arange(120) // 2
    unit = torch.nn.functional.normalize(x, dim=1)
    similarity, precision, first, fifth = (unit @ unit.T).numpy(), [], [], []
    for i in range(120):
        others = (groups != groups[i]).numpy()
        right = (labels == labels[i]).numpy()[others]
        precision.append(average_precision_score(right, similarity[i][others]))
        order = right[np.argsort(-similarity[i][others])]
        first, fifth = first + [order[0]], fifth + [order[:5].any()]
    found = metrics.retrieval(x, labels, groups)
    assert found["map"] == pytest.approx(np.mean(precision), abs=1e-6)
    assert (found["recall1"], found["recall5"]) == pytest.approx((np.mean(first), np.mean(fifth)))


# ---- by hand -------------------------------------------------------------------------------------


def test_head_mid_and_tail():
    table = torch.tensor([[8, 2, 0], [1, 3, 0], [2, 0, 0]])
    counts = torch.tensor([500, 50, 5])
    assert metrics.by_frequency(table, counts) == {"head": 0.8, "mid": 0.75, "tail": 0.0}
    assert metrics.by_frequency(table, torch.tensor([500, 500, 500]))["tail"] is None


def test_few_shot_of_far_classes_is_perfect_and_of_noise_is_chance():
    labels, draws = torch.arange(200) % 10, torch.Generator().manual_seed(0)
    far = torch.eye(10)[labels] + 0.01 * torch.randn(200, 10, generator=draws)
    episodes = metrics.draw_episodes(labels[:100], labels[100:], 5, 1, draws, 200)
    examples, questions = episodes
    assert (
        examples.shape == (200, 5, 1) and questions.shape == (200, 5, 15) and (questions < 0).any()
    )  # 10 a class
    assert metrics.few_shot(far[:100], far[100:], *episodes).mean() == 1
    noise = torch.randn(200, 30, generator=draws)
    assert abs(metrics.few_shot(noise[:100], noise[100:], *episodes).mean() - 0.2) < 0.03
    for e, q in zip(*episodes, strict=True):
        assert (labels[:100][e[:, 0]][:, None] == labels[100:][q])[q >= 0].all()
    assert metrics.draw_episodes(labels[:100], labels[100:], 11, 1, draws) is None


def test_first_crossing_is_interpolated():
    assert metrics.first_crossing([0, 10, 20], [50, 60, 80], 70) == 15
    assert metrics.first_crossing([0, 10], [50, 60], 40) == 0
    assert metrics.first_crossing([0, 10], [50, 60], 61) is None


def test_thumbnails_are_means_of_cells():
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    cells = images.float().view(2, 4, 4, 4, 4, 3).mean((2, 4)) / 255 - 0.5  # (2, row, column, 3)
    torch.testing.assert_close(evaluate.thumbnails(images, 4), cells.permute(0, 3, 1, 2).flatten(1))


# ---- scikit-image --------------------------------------------------------------------------------


def test_psnr_and_ssim_are_skimages():
    rng = np.random.default_rng(0)
    a = rng.integers(256, size=(3, 40, 40, 3)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    everywhere = torch.ones(3, 40, 40, dtype=torch.bool)
    pair = torch.tensor(a), torch.tensor(b)
    ours, similar = demo.psnr(*pair, everywhere), stress.ssim_map(*pair)
    for i in range(3):
        assert ours[i].item() == pytest.approx(peak_signal_noise_ratio(a[i], b[i]), abs=1e-9)
        how = dict(
            channel_axis=2,
            gaussian_weights=True,
            use_sample_covariance=False,
            data_range=255,
            full=True,
        )
        _, theirs = structural_similarity(a[i].astype(float), b[i].astype(float), **how)
        assert np.abs(similar[i].numpy() - theirs.mean(2)).max() < 1e-9  # at the border, too


def test_of_equal_scores_the_first_is_the_answer():
    scores, labels = torch.ones(4, 6), torch.tensor([0, 1, 0, 5])
    assert evaluate.topk(scores, labels, 1) == (scores.argmax(1) == labels).double().mean() == 0.5
    assert evaluate.topk(scores, labels, 2) == 0.75


def test_psnr_looks_only_where_it_is_asked():
    a, where = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.bool)
    b = a.clone()
    b[0, :4], where[0, 4:] = 255, True
    b[0, 4:] = 51
    assert demo.psnr(a, b, where).item() == pytest.approx(10 * math.log10(25))
    assert demo.psnr(a, b, torch.zeros_like(where)).isnan().all()


# ---- statistics ----------------------------------------------------------------------------------


def test_the_t_interval_is_scipys_and_2_48_deviations_wide_at_three_seeds():
    d = [1.0, 2.5, 1.8]
    found, theirs = stats.paired(d), scipy_stats.ttest_1samp(d, 0)
    low, high = theirs.confidence_interval()
    assert (found["low"], found["high"], found["p"]) == pytest.approx((low, high, theirs.pvalue))
    ours = t_interval(d)
    assert [ours[k] for k in ("low", "high", "p")] == pytest.approx(
        [found[k] for k in ("low", "high", "p")]
    )
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
    t = scipy_stats.t
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
    half = scipy_stats.t.ppf(0.975, more) * error
    assert more > df and half < alone["high"] - alone["effect"]
    assert both | {"bootstrap": None} == alone


def test_an_interval_covers_what_other_images_would_have_said():
    """200 experiments of 5 seeds on 40 images that truly tie: seeds alone are misled by images."""
    rng, missed, alone = np.random.default_rng(2), 0, 0
    for _ in range(200):
        d = rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 1, 40) + rng.normal(0, 0.2, (5, 40))
        errors = stats.errors_of(d, np.arange(40))
        p = [2 * scipy_stats.t.sf(abs(d.mean()) / error, df) for error, df in errors]
        missed += max(p) < 0.05
        alone += stats.paired(d.mean(1))["p"] < 0.05
    assert missed <= 20 and alone > 60


def test_the_bootstrap_resamples_illustrations_not_images():
    """Ten copies of each image in one illustration: the interval must be as wide as that of one of
    each.
    """
    rng = np.random.default_rng(0)
    one = rng.normal(0.5, 1, (3, 60))
    alone = bootstrap(one, np.arange(60))
    copied = bootstrap(one.repeat(10, 1), np.arange(60).repeat(10))
    wrong = bootstrap(one.repeat(10, 1), np.arange(600))
    assert copied["low"] == pytest.approx(alone["low"]) and copied["high"] == pytest.approx(
        alone["high"]
    )
    assert wrong["high"] - wrong["low"] < 0.7 * (alone["high"] - alone["low"])
    assert alone["mean"] == pytest.approx(one.mean()) and bootstrap(one, np.arange(60)) == alone


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


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0] and stats.holm([]) == []
    # what has no p is in the family all the same
    assert stats.holm([0.02, None]) == [0.04, None]


def test_an_axis_of_percentages_ends_at_100():
    for values, expected in (([90, 100], 100), ([40, 60], 61), ([0, 1], 1.05)):
        _, axis = plots.plt.subplots()
        axis.plot(values)
        plots.percent(axis)
        low, high = axis.get_ylim()
        assert high == pytest.approx(expected) and low >= 0
        axis.barh([0, 1], [150, 20])
        plots.percent(axis, "x", low=10)
        assert axis.get_xlim() == (10, 100)
        plots.plt.close()


def test_every_picture_of_percentages_ends_at_100(monkeypatch, tmp_path):
    """All is right everywhere: matplotlib's margins would go to 105 %."""
    seen = []
    monkeypatch.setattr(
        plots, "save", lambda figure, path: (seen.append(figure), plots.plt.close(figure))
    )
    log = [
        {
            "epoch": e,
            "seconds": e,
            "knn": 100.0,
            "knn_thumbnail": 9.0,
            "linear": 100.0,
            "linear_thumbnail": 9.0,
            "loss": 1.0,
            "val_mse": 1.0,
        }
        for e in (0, 1)
    ]
    plots.curves("x.png", log, "val", "")
    probe.curves({"a": {0: {"log": log}, 1: {"log": log}}}, "x.png", 99.0, 9.0)
    axes = [axis for figure in seen for axis in figure.axes]
    shown = [
        a for a in axes if any(w in a.get_ylabel() for w in ("Top-1", "rate, %", "precision, %"))
    ]
    assert len(seen) == 2 and len(shown) >= 2 and all(a.get_ylim()[1] <= 100 for a in shown)
