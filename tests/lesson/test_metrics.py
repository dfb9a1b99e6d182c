"""Scores against scikit-learn, scikit-image, and formulas that are written a second time."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken
from skimage.metrics import peak_signal_noise_ratio
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    roc_curve,
    top_k_accuracy_score,
)
from sklearn.neighbors import KNeighborsClassifier

from common import evaluate, metrics, readout
from common.train import seeded
from kernels.patches import mean_of_neighbours, targets
from mask import gumbel_noise
from model import MAE, ViT

EXACT = contextlib.nullcontext


@pytest.fixture(scope="module")
def blobs():
    """Five overlapping classes in 12 correlated dimensions: train and held features and labels."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (400,), generator=draws)
    centres, mix = torch.randn(5, 12, generator=draws), torch.randn(12, 12, generator=draws)
    x = (centres[labels] + 0.8 * torch.randn(400, 12, generator=draws)) @ mix
    return x[:300], labels[:300], x[300:], labels[300:]


def test_the_strength_of_the_probe_is_the_best_on_the_rows_to_choose_on(blobs):
    x, labels, held, truth = blobs
    scores, C = metrics.logistic_probe(x, labels, held, truth, 6)
    z, z_held = readout.standardise(x, held)
    fits = [LogisticRegression(C=c, tol=1e-7, max_iter=5000) for c in metrics.STRENGTHS]
    right = [fit.fit(z, labels).score(z_held, truth) for fit in fits]
    best = right.index(max(right))
    assert metrics.STRENGTHS[best] == C and best > 0
    found, theirs = scores(held), fits[best].predict_log_proba(z_held)
    assert found[:, :5].numpy() == pytest.approx(theirs, abs=1e-2)
    assert found[:, 5].isneginf().all()  # no row has this class


def test_ridge_is_sklearns_on_features_of_mean_0_and_variance_1(blobs):
    z, other = readout.standardise(blobs[0], blobs[2])
    assert z.mean(0).abs().max() < 1e-6 and (z.std(0) - 1).abs().max() < 1e-5
    expected = (blobs[2] - blobs[0].mean(0)) / blobs[0].std(0)  # held rows by the numbers of train
    torch.testing.assert_close(other.float(), expected, rtol=1e-4, atol=1e-4)
    theirs = Ridge(alpha=10.0).fit(z.numpy(), np.eye(5)[blobs[1].numpy()])
    W, b = readout.ridge(z, blobs[1], 5, 10.0)
    np.testing.assert_allclose(W.T.numpy(), theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(b.numpy(), theirs.intercept_, atol=1e-9)


def test_knn_counts_as_sklearn_does(blobs):
    x, labels, held, _ = blobs
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(x.numpy(), labels.numpy())
    votes = readout.knn_votes(x, labels, held, 5)
    assert votes.argmax(1).tolist() == theirs.predict(held.numpy()).tolist()
    shares = votes / votes.sum(1, keepdim=True)
    np.testing.assert_allclose(shares.numpy(), theirs.predict_proba(held.numpy()), atol=1e-4)


def test_classification_is_sklearns(blobs):
    """Eight classes are known, five occur."""
    truth, known = blobs[1][:200], range(8)
    scores = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    found, row = scores.argmax(1), metrics.classification(scores, truth, torch.ones(8))
    table = confusion_matrix(truth, found, labels=known)
    assert (np.array(row["confusion"]) == table).all()
    assert row["macro_f1"] == pytest.approx(f1_score(truth, found, average="macro"))
    assert row["per_class"][:5] == pytest.approx(np.diag(table)[:5] / table.sum(1)[:5])
    assert row["per_class"][5:] == [None] * 3
    for k, value in ((1, row["top1"]), (5, row["top5"]), (3, readout.topk(scores, truth, 3))):
        assert value == pytest.approx(top_k_accuracy_score(truth, scores, k=k, labels=known))
    assert readout.topk(torch.ones(4, 6), torch.tensor([0, 1, 0, 5]), 2) == 0.75  # of equals


def test_retrieval_is_the_mean_of_sklearns_average_precision(blobs):
    x, labels = blobs[0][:120], blobs[1][:120]
    groups = torch.arange(120) // 2
    unit = F.normalize(x, dim=1)
    similarity = (unit @ unit.T).numpy()
    precision, firsts = [], []
    for i in range(120):
        others = (groups != groups[i]).numpy()
        right = (labels == labels[i]).numpy()[others]
        precision.append(average_precision_score(right, similarity[i][others]))
        order = right[np.argsort(-similarity[i][others])]
        firsts.append((order[0], order[:5].any()))
    assert metrics.retrieval(x[:3], torch.arange(3), groups[:3]) == {}  # nobody has an answer
    found = metrics.retrieval(x, labels, groups)
    first, fifth = np.mean(firsts, 0)
    expected = {"map": np.mean(precision), "recall1": first, "recall5": fifth}
    assert found == pytest.approx(expected, abs=1e-6)


def test_verification_leaves_out_pairs_of_one_illustration(blobs):
    x, labels = blobs[0][:40], blobs[1][:40]
    groups = torch.arange(40) // 2
    same, other = metrics.pair_cosines(x, labels, groups)
    cosine = F.cosine_similarity(x[:, None], x[None], dim=2)
    ours = (groups[:, None] != groups) & torch.ones(40, 40).triu(1).bool()
    alike = labels[:, None] == labels
    torch.testing.assert_close(same.sort().values, cosine[ours & alike].sort().values)
    torch.testing.assert_close(other.sort().values, cosine[ours & ~alike].sort().values)
    false, true, _ = roc_curve(*metrics.truth_and_scores(same, other), drop_intermediate=False)
    at = np.linspace(0, len(false) - 1, 10**6)  # a walk along the curve
    false, true = (np.interp(at, np.arange(len(x)), x) for x in (false, true))
    expected = false[np.abs(false - (1 - true)).argmin()]
    assert metrics.equal_error_rate(same, other) == pytest.approx(expected, abs=1e-4)


def test_few_shot_is_the_nearest_centroid(blobs):
    """Written once more: cosines to the centroid of unit vectors, the bank's mean removed."""
    x, labels, held, truth = blobs
    examples, questions = metrics.draw_episodes(labels, truth, 3, 4, seeded(0), 20, 40)
    assert examples.shape == (20, 3, 4) and questions.shape == (20, 3, 40)
    bank, asked = F.normalize(x - x.mean(0), dim=1), F.normalize(held - x.mean(0), dim=1)
    found = metrics.few_shot(x, held, examples, questions)
    for rows, queries, accuracy in zip(examples, questions, found, strict=True):
        classes = labels[rows[:, 0]]
        assert (labels[rows] == classes[:, None]).all() and len(set(classes.tolist())) == 3
        centroids, right = F.normalize(bank[rows].mean(1), dim=1), []
        for way, of_class in enumerate(queries):
            of_class = of_class[of_class >= 0]  # -1 fills up
            assert len(of_class) == (truth == classes[way]).sum() < 40
            right += ((asked[of_class] @ centroids.T).argmax(1) == way).tolist()
        assert accuracy.item() == pytest.approx(np.mean(right))
    assert metrics.draw_episodes(labels, truth, 6, 1, seeded(0)) is None
    labels, truth = (torch.cat([y, y.new_full((3,), 5)]) for y in (labels, truth))
    assert metrics.draw_episodes(labels, truth, 6, 3, seeded(0)) is not None
    assert metrics.draw_episodes(labels, truth, 6, 4, seeded(0)) is None  # three are too few


def test_small_formulas_by_hand():
    table, counts = torch.tensor([[8, 2, 0], [1, 3, 0], [2, 0, 0]]), torch.tensor([101, 20, 19])
    assert metrics.by_frequency(table, counts) == {"head": 0.8, "mid": 0.75, "tail": 0.0}
    assert metrics.by_frequency(table, torch.tensor([100, 100, 100]))["head"] is None
    assert metrics.threshold_of([50, 40, 70]) == 68  # it is crossed on a straight line
    assert metrics.first_crossing([0, 10, 30], [50, 60, 80], 70) == 20
    assert metrics.first_crossing([5, 10], [50, 60], 40) == 5
    assert metrics.first_crossing([0, 10], [50, 60], 61) is None
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) + 5
    assert readout.effective_rank(cross) == 2  # directions


def looked_at(train, held):
    """Features that `recognition` asks for: of the larger split those of train."""
    return lambda split, rows: ((train if len(split["labels"]) == 300 else held)[rows],) * 2


def test_classifiers_learn_nothing_from_the_pictures_that_they_are_judged_on():
    """Two classes change places in the held split: who learned from it would not be wrong."""
    labels = torch.arange(300) % 2
    features = torch.eye(2)[labels]
    sets = [{"images": y, "labels": y, "header": {}} for y in (labels, 1 - labels[:90])]
    found = evaluate.recognition(looked_at(features, features[:90]), *sets)
    assert found["knn"] == found["linear"] == 0
    assert found["mean_rank"] == 1  # both classes lie on one line


def test_thumbnails_are_means_of_cells():
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    cells = images.float().view(2, 4, 4, 4, 4, 3).mean((2, 4)) / 255 - 0.5  # (2, row, column, 3)
    torch.testing.assert_close(readout.thumbnails(images, 4), cells.permute(0, 3, 1, 2).flatten(1))


@pytest.fixture
def held():
    """A split of five pictures of noise."""
    return {"images": np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return shaken(
        MAE(decoder_dim=32, decoder_depth=1, image_size=32, patch_size=8, dim=32, depth=1, heads=2)
    )


def test_the_masked_error_is_the_formula_under_the_fixed_mask(model, held):
    """And the predicted statistics are those of the head, added to those of visible patches."""
    found = evaluate.masked_mse(model, held, {"norm_pix": False, "floor": 0.15}, EXACT)
    order = gumbel_noise(5, 16, seeded(0)).argsort(1)
    keep, hide = order[:, :4].contiguous(), order[:, 4:].contiguous()
    view = torch.from_numpy(held["images"])
    patches, _ = model.encoder.all_patches(view)  # (5, 16, P)

    def at(ids):
        return patches.gather(1, ids[..., None].expand(-1, -1, 192))

    pred, stats, *_ = model(at(keep), keep, hide)
    assert found == pytest.approx((pred - at(hide)).square().mean().item(), rel=1e-5)
    expected = stats + mean_of_neighbours(targets(view, keep, 8)[1], keep, hide, 4)
    torch.testing.assert_close(evaluate.predict(model, view, keep, hide, EXACT)[1], expected)


def test_a_picture_of_a_reconstruction_pastes_the_prediction_over_what_was_hidden(model, held):
    lines = evaluate.reconstruct(model, held, {"norm_pix": True, "floor": 0.15})
    original, seen, predicted, pasted, neighbours = (pictures for _, pictures in lines)
    hidden = (seen == 128).all(3, keepdim=True)
    assert torch.equal(original, torch.from_numpy(held["images"]))
    assert hidden.float().mean() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(pasted, torch.where(hidden, predicted, original))
    assert torch.equal(neighbours, torch.where(hidden, neighbours, original))
    assert not torch.equal(neighbours, pasted)


def test_the_baseline_of_a_reconstruction_is_the_mean_colour_of_near_visible_patches(held):
    """Each hidden patch by a loop; and what is hidden has no part in it."""
    view = torch.from_numpy(held["images"][:1])
    order = gumbel_noise(1, 16, seeded(0)).argsort(1)
    keep, hide = order[:, :4].contiguous(), order[:, 4:].contiguous()
    found = evaluate.neighbours_in(view, keep, hide, 8)
    for patch in hide[0].tolist():
        y, x = divmod(patch, 4)
        total = colour = 0
        for other in keep[0].tolist():
            v, u = divmod(other, 4)
            near = math.dist((y, x), (v, u)) ** -3
            mean = view[0, 8 * v : 8 * v + 8, 8 * u : 8 * u + 8].double().mean((0, 1))
            total, colour = total + near, colour + near * mean
        filled = found[0, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].double()
        assert (filled - colour / total).abs().max() < 0.51  # it is rounded
    other = evaluate.hide(view, hide, 8)
    assert torch.equal(evaluate.neighbours_in(other, keep, hide, 8), found)


def test_the_psnr_of_a_run_is_the_mean_over_pictures_that_are_not_blank(model, held):
    norm = {"norm_pix": True, "floor": 0.15}
    view, keep, hide = next(evaluate.masked_views(model, held, 5))
    pasted, where = evaluate.filled_in(model, norm, view, keep, hide)
    ours = evaluate.psnr(pasted, view, where)
    baseline = evaluate.psnr(evaluate.neighbours_in(view, keep, hide, 8), view, where)
    expected = 5, ours.mean().item(), baseline.mean().item()
    assert evaluate.mean_psnr(model, held, norm) == pytest.approx(expected)
    held["images"] = held["images"].copy()
    held["images"][0] = 255  # its neighbours tell all
    n, *means = evaluate.mean_psnr(model, held, norm)
    assert n == 4 and means == pytest.approx([ours[1:].mean().item(), baseline[1:].mean().item()])


def test_attention_by_part_is_its_share_over_the_share_of_the_area(held):
    """1 where attention is even; 2 and 0 where all of it is on the half that is the figure."""
    half = np.zeros((5, 32, 32), np.uint8)
    half[:, :16] = 1
    held |= {"parts": half, "header": {"parts": ["background", "figure", "nowhere"]}}
    torch.manual_seed(0)
    encoder = ViT(32, 8, 32, 1, 1)

    def look():
        return evaluate.attention_by_part(encoder, held, "cls", EXACT)

    torch.nn.init.zeros_(encoder.blocks[0].attn.qkv.weight)
    assert look() == {"background": 1.0, "figure": 1.0}
    torch.nn.init.normal_(encoder.blocks[0].attn.qkv.weight, std=0.5)
    held["images"] = held["images"][1:3]  # here a random encoder attends to the upper half alone
    assert look() == pytest.approx({"figure": 2, "background": 0}, abs=0.05)


def test_psnr_is_skimages():
    rng = np.random.default_rng(0)
    a = rng.integers(256, size=(3, 40, 40, 3)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    everywhere = torch.ones(3, 40, 40, dtype=torch.bool)
    pair = torch.tensor(a), torch.tensor(b)
    ours = evaluate.psnr(*pair, everywhere)
    for i in range(3):
        assert ours[i].item() == pytest.approx(peak_signal_noise_ratio(a[i], b[i]), abs=1e-9)
    everywhere[:, :20] = False
    expected = 10 * math.log10(255**2 / np.mean((a[0, 20:] - b[0, 20:].astype(float)) ** 2))
    assert evaluate.psnr(*pair, everywhere)[0].item() == pytest.approx(expected)
