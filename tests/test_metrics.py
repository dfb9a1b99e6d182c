"""Metrics, classifiers and statistics against scikit-learn, scikit-image, scipy, and against formulas by hand."""

import math

import numpy as np
import pytest
import torch
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
from experiments import stress


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


# ---- pictures of numbers -------------------------------------------------------------------------


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
