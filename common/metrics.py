"""What is measured, as pure functions of tensors: no files, no models. Imports nothing of ours."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

# ---- nearest neighbours --------------------------------------------------------------------------


def knn_votes(bank, bank_labels, queries, classes, k=20, temperature=0.07):
    """Votes of the k nearest of bank (n, D) for each class: queries (Q, D) -> (Q, classes).

    Cosine similarity s, votes weighted by exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978,
    section 3.4).
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for rows in torch.arange(len(queries)).split(4096):
        similarity, nearest = (queries[rows] @ bank.T).topk(min(k, len(bank)), dim=1)  # (q, k)
        votes[rows] = votes[rows].scatter_add_(
            1, bank_labels[nearest], (similarity / temperature).exp()
        )
    return votes


def retrieval(features, labels, groups, most=5000):
    """Each image queries all others for its class: {"map", "recall1", "recall5"} in [0, 1];
    features (n, D), cosine.

    groups (n) i64: images of one illustration never answer each other. Queries without a right
    answer are left out; of more than `most` images evenly spaced ones are taken. Recall@k: a right
    one is among the first k. map: mean over queries of the average precision, the mean of the
    precision at the rank of each right answer.
    """
    rows = torch.linspace(0, len(labels) - 1, min(len(labels), most)).long()
    features, labels, groups = (
        F.normalize(features[rows].float(), dim=1),
        labels[rows],
        groups[rows],
    )
    ranks, scores = torch.arange(1, len(rows) + 1, dtype=torch.float64), []
    for query in torch.arange(len(rows)).split(512):
        similarity = (features[query] @ features.T).masked_fill(
            groups[query][:, None] == groups, float("-inf")
        )
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        right = (labels[order] == labels[query][:, None]) & (
            similarity > float("-inf")
        )  # (q, n), the nearest first
        right = right[right.any(1)].double()
        precision = (right.cumsum(1) / ranks * right).sum(1) / right.sum(1)
        scores.append(torch.stack([precision, right[:, 0], right[:, :5].amax(1)]))
    return dict(
        zip(
            ("map", "recall1", "recall5"),
            (x.mean().item() for x in torch.cat(scores, 1)),
            strict=True,
        )
    )


def draw_episodes(bank_labels, labels, ways, shots, generator, episodes=600, queries=15):
    """-> examples (episodes, ways, shots) in the bank and questions (episodes, ways, queries) among
    those to be named.

    Where a class has fewer than `queries` questions the rest are -1. None where too few classes
    have enough images. Examples and questions come from different splits: no illustration is on
    both sides.
    """
    pairs = [
        ((bank_labels == c).nonzero()[:, 0], (labels == c).nonzero()[:, 0]) for c in labels.unique()
    ]
    pairs = [(e, q) for e, q in pairs if len(e) >= shots and len(q)]
    if len(pairs) < ways:
        return None

    def choose(rows, count):
        return rows[torch.randperm(len(rows), generator=generator)[:count]]

    examples = torch.empty(episodes, ways, shots, dtype=torch.long)
    questions = torch.full((episodes, ways, queries), -1)
    for i in range(episodes):
        for j, c in enumerate(choose(torch.arange(len(pairs)), ways)):
            examples[i, j] = choose(pairs[c][0], shots)
            questions[i, j, : len(pairs[c][1])] = choose(pairs[c][1], queries)
    return examples, questions


def few_shot(bank, queries, examples, questions):
    """Accuracy of each episode, (episodes,), by nearest centroid in cosine; bank (n, D), queries
    (Q, D) of two splits.

    Snell et al. 2017 with the metric of Chen et al. 2019, "A Closer Look at Few-shot
    Classification", after the bank's mean is subtracted.
    """
    centre, result = bank.float().mean(0), []
    bank, queries = (
        F.normalize(bank.float() - centre, dim=1),
        F.normalize(queries.float() - centre, dim=1),
    )
    for e, q in zip(examples.split(20), questions.split(20), strict=True):
        centroids = F.normalize(bank[e].mean(2), dim=2)  # (E, ways, D)
        predicted = (queries[q].flatten(1, 2) @ centroids.transpose(1, 2)).argmax(2).view(q.shape)
        right = (predicted == torch.arange(q.shape[1])[:, None]) & (q >= 0)
        result.append(right.sum((1, 2)).double() / (q >= 0).sum((1, 2)))
    return torch.cat(result)


# ---- classification ------------------------------------------------------------------------------


def topk(scores, labels, k):
    """Share of rows of scores (n, C) whose label is among the k highest, in [0, 1]; of equal ones
    the first counts.
    """
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return (best == labels[:, None]).any(1).double().mean().item()


def macro_f1(predicted, labels):
    """predicted, labels (n) i64 -> mean F1 over the classes that occur in either, in [0, 1]."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels.numpy(), predicted.numpy(), average="macro"))


def by_frequency(confusion, counts, many=100, few=20):
    """Accuracy over classes with > many, between, and < few training images -> {"head", "mid",
    "tail"}, None if empty.

    The bounds are those of ImageNet-LT (Liu et al. 2019, arXiv:1904.05160). Shares of images, not
    means of classes.
    """
    result = {
        "head": counts > many,
        "mid": (counts >= few) & (counts <= many),
        "tail": counts < few,
    }
    for name, classes in result.items():
        right, images = confusion.diagonal()[classes].sum().item(), confusion[classes].sum().item()
        result[name] = right / images if images else None
    return result


def frequency_correlation(confusion, counts):
    """Pearson's r of a class's recall and the logarithm of its training images; None where either
    does not vary.
    """
    here = (confusion.sum(1) > 0) & (counts > 0)
    recall = confusion.diagonal().double() / confusion.sum(1)
    pair = torch.stack([recall[here], counts[here].double().log()])
    return (
        torch.corrcoef(pair)[0, 1].item()
        if here.sum() >= 3 and (pair.std(1) >= 1e-9).all()
        else None
    )


def classification(scores, labels, counts):
    """Everything about scores (n, C) against labels (n); counts (C) training images -> a dict,
    shares in [0, 1].

    "confusion" has the true class as row and the predicted one as column; "per_class" is the
    recall, None of no images.
    """
    C, predicted = len(counts), scores.argmax(1)
    confusion = torch.bincount(labels * C + predicted, minlength=C * C).view(C, C)
    recall = [own[c] / sum(own) if sum(own) else None for c, own in enumerate(confusion.tolist())]
    return {
        "top1": topk(scores, labels, 1),
        "top5": topk(scores, labels, 5),
        "macro_f1": macro_f1(predicted, labels),
        **by_frequency(confusion, counts),
        "frequency_correlation": frequency_correlation(confusion, counts),
        "per_class": recall,
        "confusion": confusion.tolist(),
    }


def calibration_error(sure, right, weights, bins=10):
    """Is a confidence right as often as it says? sure in [0, 1], right bool, weights: (n,) each ->
    error, points.

    The expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3) of equal bins, in [0,
    1]; points: (mean confidence, share right, weight) of each bin with a picture.
    """
    place, points = (sure * bins).long().clamp(0, bins - 1), []
    weights = (weights / weights.sum()).double()
    for b in range(bins):
        w = weights * (place == b)
        if (total := w.sum().item()) > 0:
            points.append(
                ((w * sure).sum().item() / total, (w * right).sum().item() / total, total)
            )
    return sum(total * abs(said - true) for said, true, total in points), points


def threshold_of(curve):
    """What is reached in a run counts from here: untrained + 90 % of what the run gained, curve[0]
    to curve[-1].

    An absolute threshold means nothing where an untrained encoder already has 70 %.
    """
    return curve[0] + 0.9 * (curve[-1] - curve[0])


def first_crossing(xs, ys, threshold):
    """The x at which ys first reach threshold, straight lines between the points; None where they
    never do.
    """
    i = next((i for i, y in enumerate(ys) if y >= threshold), None)
    if not i:
        return None if i is None else float(xs[0])
    share = (threshold - ys[i - 1]) / (ys[i] - ys[i - 1])
    return float(xs[i - 1] + share * (xs[i] - xs[i - 1]))


# ---- pictures and maps ---------------------------------------------------------------------------


def thumbnails(images, side):
    """images u8 (n, S, S, 3) -> (n, side*side*3) in [-.5, .5]: the mean colour of each cell, a
    feature's control.
    """
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), side)
    return small.flatten(1) / 255 - 0.5


def psnr(a, b, where):
    """Peak signal-to-noise ratio in dB of u8 pictures a, b (n, S, S, 3) over the pixels where (n,
    S, S) is true: (n,).

    10 log10(255^2 / mean squared error); nan where no pixel is asked for.
    """
    a, b, where = a.cpu(), b.cpu(), where.cpu()  # Metal has no float64
    error = (a.double() - b.double()).square().mean(3)
    return 10 * torch.log10(255**2 * where.sum((1, 2)) / (error * where).sum((1, 2)))


def auc(score, truth):
    """Area under the ROC curve in [0, 1]; score (n,), truth (n,) bool. NaN where only one kind is
    there.
    """
    from sklearn.metrics import roc_auc_score

    return (
        float(roc_auc_score(truth.numpy(), score.numpy()))
        if 0 < truth.sum() < len(truth)
        else float("nan")
    )


def iou(predicted, truth):
    """Intersection over union of two bool tensors, in [0, 1]; 1 where both are empty."""
    union = (predicted | truth).sum()
    return ((predicted & truth).sum() / union).item() if union else 1.0


# ---- verification and open set: scores of pairs that belong together (positive) and of pairs that


def pair_cosines(embeddings, labels, groups):
    """Cosine of every pair of rows -> (of one class, of different classes); pairs of one group
    (i64) are left out.

    Two faces of one illustration are alike for reasons that have nothing to do with who they are.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), 1)
    apart = groups[i] != groups[j]
    i, j = i[apart], j[apart]
    cosine = torch.cat(
        [(unit[a] * unit[b]).sum(1) for a, b in zip(i.split(2**18), j.split(2**18), strict=True)]
    )
    same = labels[i] == labels[j]
    return cosine[same], cosine[~same]


def truth_and_scores(positive, negative):
    """-> what scikit-learn's metrics take: (n,) 1 for the positive, 0 for the negative, and the
    scores in fp64.
    """
    return np.repeat([1, 0], [len(positive), len(negative)]), torch.cat(
        [positive, negative]
    ).double().numpy()


def roc(positive, negative):
    """Scores -> false and true positive rates (fp64) of "accept from here on", for each distinct
    score, from 0 to 1.
    """
    from sklearn.metrics import roc_curve

    curve = roc_curve(*truth_and_scores(positive, negative), drop_intermediate=False)
    return torch.from_numpy(curve[0]), torch.from_numpy(curve[1])


def tpr_at_fpr(positive, negative, most):
    """The largest true positive rate at a false positive rate of at most `most`."""
    false, true = roc(positive, negative)
    return true[false <= most].max().item()


def equal_error_rate(positive, negative):
    """Where the ROC curve has as many false accepts as false rejects, interpolated on a straight
    line.
    """
    false, true = roc(positive, negative)
    gap = false - (1 - true)  # rises from -1 to 1
    k = int((gap >= 0).nonzero()[0])
    share = -gap[k - 1] / (gap[k] - gap[k - 1])
    return (false[k - 1] + share * (false[k] - false[k - 1])).item()


def detection_rate(known, right, strangers, far):
    """Detection and identification rate, DIR, at a false alarm rate of at most far (Phillips et al.
    2011, chapter 21).

    known (n,) scores of known faces, right (n,) whether the best name is theirs, strangers (m,)
    scores of unknown ones: the share of known faces that are named rightly and score above all but
    the allowed number of strangers.
    """
    allowed = int(far * len(strangers) + 1e-9)
    threshold = (
        strangers.sort(descending=True).values[allowed]
        if allowed < len(strangers)
        else float("-inf")
    )
    return ((known > threshold) & right).double().mean().item()


# ---- classifiers on frozen features ---------------------------------------------------------------

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of ridge
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression, the most regularised first


def standardise(train, *others):
    """-> all in float64, shifted and scaled by the mean and std of train (n, D): a constant column
    becomes 0.
    """
    mean, std = train.double().mean(0), train.double().std(0) + 1e-6
    return [(x.double() - mean) / std for x in (train, *others)]


def ridge(x, labels, classes, penalty):
    """Least squares onto one-hot labels, closed form -> (W (D, C), b (C)); x (n, D) float64,
    standardised.

    W = (X^T X + penalty I)^-1 X^T Y (Hoerl and Kennard 1970): the linear probe that has no training
    loop.
    """
    Y = F.one_hot(labels, classes).to(x.dtype)
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ (Y - Y.mean(0))), Y.mean(0)


def ridge_top1(features, labels, classes):
    """Top-1 in percent of ridge regression; features ((n, D), (m, D), (k, D)) and labels of three
    sets of rows: those that are fitted, those that the penalty is chosen on, and those that are
    reported.
    """
    x, choose, report = standardise(*features)
    fits = [ridge(x, labels[0], classes, penalty) for penalty in PENALTIES]
    W, b = max(fits, key=lambda fit: topk(choose @ fit[0] + fit[1], labels[1], 1))
    return 100 * topk(report @ W + b, labels[2], 1)


def logistic_probe(x, labels, choose, truth, classes):
    """Logistic regression on standardised features -> (a function from (k, D) to scores, C).

    x (n, D) and labels (n) are fitted; C is the best on choose (m, D) and truth (m), the smaller of
    equals. Scores are log probabilities (k, classes), -inf for a class without a row.
    """
    from sklearn.linear_model import LogisticRegression

    z, held = (rows.numpy() for rows in standardise(x, choose))
    # features are correlated: L-BFGS takes minutes where Newton's method takes seconds
    model = LogisticRegression(solver="newton-cg", tol=1e-6, max_iter=1000, warm_start=True)
    best, best_right = None, -1
    for C in STRENGTHS:
        model.set_params(C=C).fit(z, labels.numpy())
        right = int((model.predict(held) == truth.numpy()).sum())
        if right > best_right:
            best, best_right = copy.deepcopy(model), right

    def scores(new):
        found = torch.full((len(new), classes), float("-inf"), dtype=torch.float64)
        z = standardise(x, new)[1].numpy()
        found[:, best.classes_] = torch.from_numpy(best.predict_log_proba(z))
        return found

    return scores, best.C


def effective_rank(x):
    """x (n, D) -> exp of the entropy of its singular values' shares: how many directions it uses
    (Roy, Vetterli 2007).

    1 is collapse: all rows differ in one direction.
    """
    values = torch.linalg.svdvals((x - x.mean(0)).float().cpu())
    share = values / values.sum().clamp(min=1e-30)
    return round(torch.special.entr(share).sum().exp().item(), 2)
