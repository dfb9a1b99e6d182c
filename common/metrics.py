"""What is measured of a trained network, as pure functions of tensors: no files, no models."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from common.readout import standardise, topk

# ---- nearest neighbours --------------------------------------------------------------------------


def retrieval(features, labels, groups, most=5000):
    """Each image queries all others for its class: {"map", "recall1", "recall5"} in [0, 1].

    Of more than `most` images so many are taken, evenly spaced, because their number counts squared.
    features (n, D) are compared by cosine; images of one of the groups (n) never answer each other.
    Queries without a right answer are left out; {} if all are. Recall@k: a right answer is among
    the first k. map: mean over queries of the mean precision at the rank of each right answer.
    """
    some = torch.linspace(0, len(labels) - 1, min(len(labels), most)).long()  # evenly spaced
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
