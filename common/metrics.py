"""What is measured of a trained network, as pure functions of tensors: no files, no models.

First how good features and classifiers are. Then the controls: what colours alone tell. Last, whether a
difference is more than chance.

scikit-learn and scipy are imported where a result is judged, not where a stage starts.

    n images   D width of the features   C classes
"""

import copy
import functools
import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

import data
from common.readout import ridge, standardise, thumbnails, topk

LEAST_SEEDS = 3  # of an interval: two give a t of 12.7, and tie by chance
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of the ridge regression on thumbnails
BINS = 8  # of red, green and blue
SVM_IMAGES = 4000  # of train, at most
COSTS = (1, 10, 100)  # C of the SVM; one is chosen on dev

# ---- nearest neighbours --------------------------------------------------------------------------


def retrieval(features, labels, groups, most=5000):
    """Each image queries all others for its class: {"map", "recall1", "recall5"} in [0, 1].

    Of more than `most` images so many are taken, evenly spaced, because their number counts squared.
    features (n, D) are compared by cosine; images of one of the groups (n) never answer each other.
    Queries without a right answer are left out; {} if all are. Recall@k: a right answer is among
    the first k. map: mean over queries of the mean precision at the rank of each right answer.
    """
    some = data.evenly_spaced(len(labels), most)
    features = F.normalize(features[some].float(), dim=1)
    labels, groups = labels[some], groups[some]
    n = len(some)
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    scores = []
    for query in torch.arange(n).split(512):
        own_group = groups[query][:, None] == groups
        similarity = (features[query] @ features.T).masked_fill(own_group, float("-inf"))
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        same = labels[order] == labels[query][:, None]
        right = same & (similarity > float("-inf"))  # (q, n), the nearest first
        right = right[right.any(1)].double()
        precision = (right.cumsum(1) / ranks * right).sum(1) / right.sum(1)
        scores.append(torch.stack([precision, right[:, 0], right[:, :5].amax(1)]))
    scores = torch.cat(scores, 1)
    if not scores.numel():
        return {}
    means = [score.mean().item() for score in scores]
    return dict(zip(("map", "recall1", "recall5"), means, strict=True))


def draw_episodes(bank_labels, labels, ways, shots, generator, episodes=600, queries=15):
    """-> indices of examples (episodes, ways, shots) and of questions (episodes, ways, queries).

    Examples are in the bank, and questions in another split. Where a class has fewer questions, the
    rest are -1. None where too few classes have enough images.
    """
    classes = [c for c in labels.unique() if (bank_labels == c).sum() >= shots]
    if len(classes) < ways:
        return None

    of_bank = [(bank_labels == c).nonzero()[:, 0] for c in classes]
    of_split = [(labels == c).nonzero()[:, 0] for c in classes]

    def choose(indices, count):
        return indices[torch.randperm(len(indices), generator=generator)[:count]]

    examples = torch.empty(episodes, ways, shots, dtype=torch.long)
    questions = torch.full((episodes, ways, queries), -1)
    for i in range(episodes):
        for j, c in enumerate(choose(torch.arange(len(classes)), ways)):
            examples[i, j] = choose(of_bank[c], shots)
            questions[i, j, : len(of_split[c])] = choose(of_split[c], queries)
    return examples, questions


def few_shot(bank, queries, examples, questions):
    """Accuracy of each episode, (episodes,), by the nearest mean of a class.

    Snell et al. 2017 (arXiv:1703.05175) take the Euclidean distance. This is the cosine of centred
    features, as in SimpleShot (Wang et al. 2019, arXiv:1911.04623).
    bank (n, D) and queries (Q, D) are of two splits; the bank's mean is subtracted from both.
    """
    centre = bank.float().mean(0)
    bank = F.normalize(bank.float() - centre, dim=1)
    queries = F.normalize(queries.float() - centre, dim=1)
    result = []
    for e, q in zip(examples.split(20), questions.split(20), strict=True):
        centroids = F.normalize(bank[e].mean(2), dim=2)  # (E, ways, D)
        predicted = (queries[q].flatten(1, 2) @ centroids.transpose(1, 2)).argmax(2).view(q.shape)
        right = (predicted == torch.arange(q.shape[1])[:, None]) & (q >= 0)
        result.append(right.sum((1, 2)).double() / (q >= 0).sum((1, 2)))
    return torch.cat(result)


# ---- classification ------------------------------------------------------------------------------


def macro_f1(predicted, labels):
    """predicted, labels (n) i64 -> mean F1 over the classes that occur in either, in [0, 1]."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels.numpy(), predicted.numpy(), average="macro"))


def by_frequency(confusion, counts):
    """Accuracy in classes with > 100, between, and < 20 training images; None of no images.

    The bounds are those of ImageNet-LT (Liu et al. 2019, arXiv:1904.05160).
    """
    head = counts > 100
    tail = counts < 20
    shares = {}
    for name, group in {"head": head, "mid": ~(head | tail), "tail": tail}.items():
        images = confusion[group].sum().item()
        shares[name] = confusion.diagonal()[group].sum().item() / images if images else None
    return shares


def classification(scores, labels, counts):
    """scores (n, C), labels (n), counts (C) of training images -> a dict of shares in [0, 1].

    "confusion" has the true class as row; "per_class" is the recall, None of no images.
    """
    C = len(counts)
    predicted = scores.argmax(1)
    confusion = torch.bincount(labels * C + predicted, minlength=C * C).view(C, C)
    rows = confusion.tolist()
    return {
        "top1": topk(scores, labels, 1),
        "top5": topk(scores, labels, 5),
        "macro_f1": macro_f1(predicted, labels),
        **by_frequency(confusion, counts),
        "per_class": [row[c] / sum(row) if sum(row) else None for c, row in enumerate(rows)],
        "confusion": rows,
    }


def threshold_of(curve):
    """What counts as reached: the accuracy of the random-init encoder and 90 % of the run's gain."""
    return curve[0] + 0.9 * (curve[-1] - curve[0])


def first_crossing(xs, ys, threshold):
    """The x at which ys first reach threshold, on straight lines between points; None if never."""
    i = next((i for i, y in enumerate(ys) if y >= threshold), None)
    if i is None:
        return None
    if i == 0:
        return float(xs[0])
    share = (threshold - ys[i - 1]) / (ys[i] - ys[i - 1])
    return float(xs[i - 1] + share * (xs[i] - xs[i - 1]))


# ---- verification: scores of pairs of one class (positive) and of two (negative) -----------------


def pair_cosines(embeddings, labels, groups):
    """Cosine of every pair of rows, but of pairs of one group -> (of one class, of different ones)."""
    unit = F.normalize(embeddings.float(), dim=1)
    pairs = torch.triu_indices(len(unit), len(unit), 1)
    i, j = pairs[:, groups[pairs[0]] != groups[pairs[1]]]
    chunks = zip(i.split(2**18), j.split(2**18), strict=True)
    cosine = torch.cat([(unit[a] * unit[b]).sum(1) for a, b in chunks])
    same = labels[i] == labels[j]
    return cosine[same], cosine[~same]


def truth_and_scores(positive, negative):
    """-> what scikit-learn's metrics take: 1 for positive and 0 for negative, and the fp64 scores."""
    truth = np.repeat([1, 0], [len(positive), len(negative)])
    return truth, torch.cat([positive, negative]).double().numpy()


def auroc(positive, negative):
    """The area under the ROC curve: how often a positive score is above a negative one, in [0, 1]."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*truth_and_scores(positive, negative)))


def equal_error_rate(positive, negative):
    """Where the shares of false accepts and of false rejects are equal, on straight lines."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(*truth_and_scores(positive, negative), drop_intermediate=False)
    gap = false - (1 - true)  # rises from -1 to 1
    return float(np.interp(0, gap, false))


# ---- classifiers on frozen features --------------------------------------------------------------

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression, the most regularised first


def logistic_probe(x, labels, choose, truth, classes):
    """Logistic regression on standardised features -> (a function from (k, D) to scores, C).

    x (n, D) and labels (n) are fitted; C is the best on choose (m, D) and truth (m), the smaller of
    equals. Scores are log probabilities (k, classes), -inf for a class without a row.
    """
    from sklearn.linear_model import LogisticRegression

    z, held = (rows.numpy() for rows in standardise(x, choose))
    # features are correlated: L-BFGS takes minutes where Newton's method takes seconds
    model = LogisticRegression(solver="newton-cg", tol=1e-6, max_iter=1000, warm_start=True)
    fits = [copy.deepcopy(model.set_params(C=C).fit(z, labels.numpy())) for C in STRENGTHS]
    best = max(fits, key=lambda fit: fit.score(held, truth.numpy()))

    def scores(new):
        log_p = torch.full((len(new), classes), float("-inf"), dtype=torch.float64)
        z = standardise(x, new)[1].numpy()
        log_p[:, best.classes_] = torch.from_numpy(best.predict_log_proba(z))
        return log_p

    return scores, best.C


# ---- controls: a recogniser by colours alone; pictures without colour ------------------------------


def histograms(images):
    """images u8 (n, S, S, 3) -> (n, BINS^3): square roots of the shares of colours, all of one area."""
    bins = images.flatten(1, 2).long() * BINS // 256
    place = (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]
    # images.shape[0] and not len(images), which would be a constant in an ONNX file.
    counts = torch.zeros(images.shape[0], BINS**3, device=images.device)
    counts = counts.scatter_add(1, place, torch.ones_like(place, dtype=counts.dtype))
    return (counts / place.shape[1]).sqrt()


def features_of(extract, images, index):
    """extract(u8 (b, S, S, 3)) -> (b, D), of packed pictures, index (n,) of a set -> (n, D)."""
    chunks = (data.take(images.split["images"], some, some.device) for some in index.split(1024))
    return torch.cat([extract(chunk) for chunk in chunks])


def thumbnail_top1(train, dev, report):
    """Three Subsets -> Top-1 in percent of a ridge regression on thumbnails, chosen on dev."""
    sets = train, dev, report
    small = [features_of(functools.partial(thumbnails, side=8), x, x.index) for x in sets]
    labels = [images.labels[images.index] for images in sets]
    x, choose, judged = standardise(*small)
    fits = [ridge(x, labels[0], int(labels[0].max()) + 1, penalty) for penalty in PENALTIES]
    W, b = max(fits, key=lambda fit: topk(choose @ fit[0] + fit[1], labels[1], 1))
    return 100 * topk(judged @ W + b, labels[2], 1)


def histogram_svms(train, costs=COSTS):
    """-> support vector machines on histograms of colours, one for each of the costs.

    If there are more than SVM_IMAGES pictures, they learn so many of them at most, because their time
    grows with the square: equally many of each character, as far as it has them.
    """
    from sklearn.svm import SVC

    some, labels = train.index, train.labels[train.index]
    if len(some) > SVM_IMAGES:
        share = max(1, SVM_IMAGES // len(labels.unique()))
        some = some[torch.cat(data.evenly_of_each(labels, share))]
    x = features_of(histograms, train, some)
    return [SVC(C=cost).fit(x, train.labels[some]) for cost in costs]


def histogram_top1(train, dev, report):
    """A control: Top-1 in percent of an SVM on histograms of colours, its cost chosen on dev."""
    judged = [(features_of(histograms, y, y.index), y.labels[y.index]) for y in (dev, report)]
    best = max(histogram_svms(train), key=lambda fit: fit.score(*judged[0]))
    return 100 * best.score(*judged[1])


class Gray:
    """Packed pictures u8 (n, S, S, 3), of which an index gives its rows without colour."""

    def __init__(self, images):
        self.images = images
        self.shape = images.shape

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        images = torch.from_numpy(self.images[index]).float()
        gray = (images @ torch.tensor(data.LUMA)).round().to(torch.uint8)
        return gray[..., None].expand(-1, -1, -1, 3).numpy()


def in_gray(images):
    """A Subset -> the same without colour."""
    split = images.split | {"images": Gray(images.split["images"])}
    return replace(images, name=f"{images.name} in gray", split=split)


# ---- is a difference more than chance? Intervals of 95 % -------------------------------------------


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
