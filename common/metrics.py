"""What is measured, as pure functions of tensors: no files, no models. Imports nothing of ours."""

import math

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


def ssim_map(a, b):
    """Structural similarity of u8 pictures a, b (n, S, S, 3) at every pixel, mean over colours: (n,
    S, S).

    Wang et al. 2004: an 11 x 11 Gaussian window of std 1.5, K1 .01, K2 .03, population covariance;
    mirrored borders.
    """
    from scipy.ndimage import gaussian_filter

    a, b = a.double().cpu(), b.double().cpu()

    def blur(p):
        return torch.from_numpy(gaussian_filter(p.numpy(), (0, 1.5, 1.5, 0), truncate=3.5))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = (
        blur(a * a) - mean_a**2,
        blur(b * b) - mean_b**2,
        blur(a * b) - mean_a * mean_b,
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(3)


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


# ---- classifiers on frozen features: ridge, logistic regression, the MAE linear probe ------------

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of ridge
STRENGTHS = (
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
)  # C of the logistic regression, the most regularised first
LEARNING_RATES = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
)  # base values of the MAE recipe's sweep, for a batch of 256


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


def axes_of(x, classes):
    """x (n, D) -> eigenvalues (D), eigenvectors (D, D) of X^T X / (n classes): the axes of the
    steps of `logistic`.
    """
    return torch.linalg.eigh(x.T @ x / (len(x) * classes))


def logistic(x, labels, classes, C, start=None, most=1000, tolerance=1e-8, axes=None):
    """Multinomial logistic regression by L-BFGS -> (W (D, classes), b (classes)), in the precision
    of x (n, D).

    Minimises C * sum_i -log p(label_i | x_i) + |W|^2 / 2, the intercept b free: scikit-learn's
    LogisticRegression, divided by C n, so that one tolerance (of the largest gradient) serves every
    C and n. Features are correlated, so the steps are taken in variables V, W = P V, in which the
    curvature X^T X / (n classes) + I / (C n) is the identity: several times fewer steps. start: a
    (W, b) to go on from; axes: axes_of(x), if they are known.
    """
    n, D = x.shape
    values, vectors = axes or axes_of(x, classes)
    roots = (values.clamp(min=0) + 1 / (C * n)).sqrt()
    P, inverse = (vectors * (roots**power) @ vectors.T for power in (-1, 1))
    V = torch.zeros(D + 1, classes, dtype=x.dtype)
    if start is not None:
        V[:-1], V[-1] = inverse @ start[0], start[1]
    z, target, rows = x @ P, F.one_hot(labels, classes).to(x.dtype), torch.arange(n)
    solver = torch.optim.LBFGS(
        [V],
        max_iter=most,
        max_eval=2 * most,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss():
        log_p, W = (
            torch.addmm(V[-1], z, V[:-1]).log_softmax(1),
            P @ V[:-1],
        )  # (n, classes), (D, classes)
        error = log_p.exp().sub_(target).div_(n)
        V.grad = torch.cat([z.T @ error + P @ W / (C * n), error.sum(0)[None]])
        return -log_p[rows, labels].mean() + W.square().sum() / (2 * C * n)

    solver.step(loss)
    return P @ V[:-1], V[-1]


def folds(groups, k=5, seed=0):
    """groups (n) of whatever kind -> (n,) i64 fold of each image; a group is never split, sizes are
    nearly equal.
    """
    _, ids, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    fold = np.zeros(len(sizes), np.int64)
    fold[order] = np.cumsum(sizes[order]) * k // (len(ids) + 1)
    return torch.from_numpy(fold[ids])


def chosen_strength(x, labels, classes, groups, strengths=STRENGTHS):
    """The C with the best Top-1 in 5-fold cross-validation, the smaller of equals; x (n, D)
    float64, standardised.

    From the most regularised on, until one is worse than the best so far, each C from the solution
    of the one before. float32 and a gradient of 1e-3 suffice to choose among decades.
    """
    x, fold, best, best_right = x.float(), folds(groups), None, -1
    starts, axes = [None] * 5, [axes_of(x[fold != i], classes) for i in range(5)]
    for C in strengths:
        right = 0
        for i in range(5):
            train, test = fold != i, fold == i
            starts[i] = W, b = logistic(
                x[train], labels[train], classes, C, starts[i], 100, 1e-3, axes[i]
            )
            right += int(((x[test] @ W + b).argmax(1) == labels[test]).sum())
        if right < best_right:
            break
        if right > best_right:
            best, best_right = C, right
    return best


def fit_logistic(x, labels, classes, C):
    """Roughly in float32, then to a gradient of 1e-6 in float64: a third of the time, the same
    answer.
    """
    W, b = logistic(x.float(), labels, classes, C, most=200, tolerance=1e-5)
    return logistic(x, labels, classes, C, (W.double(), b.double()), tolerance=1e-6)


def logistic_probe(x, labels, classes, groups):
    """The headline: x (n, D) standardised, C by cross-validation -> a function from (m, D) to
    scores (m, C), and C.
    """
    z = standardise(x)[0]
    C = chosen_strength(z, labels, classes, groups)
    W, b = fit_logistic(z, labels, classes, C)
    return lambda new: standardise(x, new)[1] @ W + b, C


def bn_linear(views, labels, classes, lrs=LEARNING_RATES, epochs=90, batch=256, warmup=10, seed=0):
    """The MAE recipe (He et al. 2021, appendix A): BatchNorm without affine, then linear ->
    scores(x), (n, C) per lr.

    views (V, n, D): features of V views of each image; an epoch shows one of them, drawn at random.
    lrs are for 256 images, warm-up and half a cosine as in the paper. Plain SGD, momentum .9, no
    decay: LARS is for the paper's batches of 16,384, and at 256 it is one more constant to choose.
    All lrs train at once, as columns of one matrix.
    """
    V, n, D = views.shape
    batch, R = min(batch, n), len(lrs)
    peak = torch.tensor(lrs).repeat_interleave(classes) * batch / 256  # (R*classes)
    W, b = torch.zeros(D, R * classes), torch.zeros(R * classes)
    speed_W, speed_b, mean, var = (
        torch.zeros_like(W),
        torch.zeros_like(b),
        torch.zeros(D),
        torch.ones(D),
    )
    generator, steps, target = (
        torch.Generator().manual_seed(seed),
        n // batch,
        F.one_hot(labels, classes).float(),
    )
    for epoch in range(epochs):
        shown = torch.randint(V, (n,), generator=generator)
        for i, rows in enumerate(
            torch.randperm(n, generator=generator)[: steps * batch].split(batch)
        ):
            x = views[shown[rows], rows].float()
            batch_var, batch_mean = torch.var_mean(x, 0, correction=0)
            mean, var = (
                mean.lerp(batch_mean, 0.1),
                var.lerp(batch_var * batch / max(1, batch - 1), 0.1),
            )
            x = (x - batch_mean) * (batch_var + 1e-6).rsqrt()
            error = torch.addmm(b, x, W).view(batch, R, classes).softmax(2)
            error = (error - target[rows][:, None]).view(
                batch, -1
            ) / batch  # the cross-entropy's gradient
            now = epoch + i / steps
            factor = (
                now / warmup
                if now < warmup
                else (1 + math.cos(math.pi * (now - warmup) / (epochs - warmup))) / 2
            )
            speed_W, speed_b = 0.9 * speed_W + x.T @ error, 0.9 * speed_b + error.sum(0)
            W, b = W - factor * peak * speed_W, b - factor * peak * speed_b
    scale = (var + 1e-6).rsqrt()
    return lambda x: (
        torch.addmm(b, (x.float() - mean) * scale, W).view(len(x), R, classes).unbind(1)
    )


def attentive(tokens, labels, classes, lr, epochs=20, batch=256, hidden=128, seed=0):
    """Pooling that is learned with the classifier -> scores(tokens), (n, classes); tokens (n, N, D)
    of patches, fp16.

    A small network scores each token, the softmax over an image's tokens weighs their mean, then as
    bn_linear has it: BatchNorm without affine, linear (ABMILP; Przewiezlikowski et al. 2024,
    arXiv:2412.03215). AdamW, half a cosine.
    """
    generator, (n, _, D) = torch.Generator().manual_seed(seed), tokens.shape

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * shape[0] ** -0.5).requires_grad_()

    A, a, W, b = (
        draw(D, hidden),
        draw(hidden, 1),
        draw(D, classes),
        torch.zeros(classes, requires_grad=True),
    )
    norm, steps = torch.nn.BatchNorm1d(D, affine=False), max(1, n // batch) * epochs
    optimizer = torch.optim.AdamW([A, a, W, b], lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def scores(x):
        weight = (torch.tanh(x @ A) @ a).softmax(1)  # (B, N, 1)
        return norm((weight * x).sum(1)) @ W + b

    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator)[: max(1, n // batch) * batch].split(
            batch
        ):
            F.cross_entropy(scores(tokens[rows].float()), labels[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    norm.eval()
    return lambda new: torch.cat([scores(x.float()).detach() for x in new.split(batch)])


def effective_rank(x):
    """x (n, D) -> exp of the entropy of its singular values' shares: how many directions it uses
    (Roy, Vetterli 2007).

    1 is collapse: all rows differ in one direction.
    """
    values = torch.linalg.svdvals((x - x.mean(0)).float().cpu())
    share = values / values.sum().clamp(min=1e-30)
    return round(torch.special.entr(share).sum().exp().item(), 2)
