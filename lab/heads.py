"""Classifiers on frozen features, as pure functions of tensors: ridge, logistic regression, the MAE linear probe.

Imports nothing of ours. All on the CPU: the same digits whatever device made the features.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of ridge
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of the logistic regression, the most regularised first
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # base learning rates of the MAE recipe's sweep, for a batch of 256


def standardise(train, *others):
    """-> all in float64, shifted and scaled by the mean and deviation of train (n, D): a constant column becomes 0."""
    mean, std = train.double().mean(0), train.double().std(0) + 1e-6
    return [(x.double() - mean) / std for x in (train, *others)]


def ridge(x, labels, classes, penalty):
    """Least squares onto one-hot labels, closed form -> (W (D, C), b (C)); x (n, D) float64, standardised.

    W = (X^T X + penalty I)^-1 X^T Y (Hoerl and Kennard 1970): the linear probe that has no training loop.
    """
    Y = F.one_hot(labels, classes).to(x.dtype)
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ (Y - Y.mean(0))), Y.mean(0)


def axes_of(x, classes):
    """x (n, D) -> eigenvalues (D), eigenvectors (D, D) of X^T X / (n classes): the axes of the steps of `logistic`."""
    return torch.linalg.eigh(x.T @ x / (len(x) * classes))


def logistic(x, labels, classes, C, start=None, most=1000, tolerance=1e-8, axes=None):
    """Multinomial logistic regression by L-BFGS -> (W (D, classes), b (classes)), in the precision of x (n, D).

    Minimises C * sum_i -log p(label_i | x_i) + |W|^2 / 2, the intercept b free: scikit-learn's LogisticRegression.
    The sum is divided by C n, so that one tolerance (of the largest gradient) serves every C and n.
    Features are correlated, so the steps are taken in variables V, W = P V, in which the curvature
    X^T X / (n classes) + I / (C n) is the identity: several times fewer steps, the same minimum.
    start: a (W, b) to go on from, such as the solution at a smaller C; axes: axes_of(x), if they are known.
    """
    n, D = x.shape
    values, vectors = axes or axes_of(x, classes)
    roots = (values.clamp(min=0) + 1 / (C * n)).sqrt()
    P, inverse = (vectors * (roots**power) @ vectors.T for power in (-1, 1))
    V = torch.zeros(D + 1, classes, dtype=x.dtype)
    if start is not None:
        V[:-1], V[-1] = inverse @ start[0], start[1]
    z, target, rows = x @ P, F.one_hot(labels, classes).to(x.dtype), torch.arange(n)
    solver = torch.optim.LBFGS([V], max_iter=most, max_eval=2 * most, tolerance_grad=tolerance, tolerance_change=0,
                               history_size=10, line_search_fn="strong_wolfe")  # fmt: skip

    def loss():
        log_p, W = torch.addmm(V[-1], z, V[:-1]).log_softmax(1), P @ V[:-1]  # (n, classes), (D, classes)
        error = log_p.exp().sub_(target).div_(n)
        V.grad = torch.cat([z.T @ error + P @ W / (C * n), error.sum(0)[None]])
        return -log_p[rows, labels].mean() + W.square().sum() / (2 * C * n)

    solver.step(loss)
    return P @ V[:-1], V[-1]


def folds(groups, k=5, seed=0):
    """groups (n) of whatever kind -> (n,) i64 fold of each image; a group is never split, sizes are nearly equal."""
    _, ids, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    fold = np.zeros(len(sizes), np.int64)
    fold[order] = np.cumsum(sizes[order]) * k // (len(ids) + 1)
    return torch.from_numpy(fold[ids])


def chosen_strength(x, labels, classes, groups, strengths=STRENGTHS):
    """The C with the best Top-1 in 5-fold cross-validation, the smaller of equals; x (n, D) float64, standardised.

    From the most regularised on, until one is worse than the best so far. In float32 and to a gradient of 1e-3, each C
    from the solution of the one before: to choose among decades takes no digits.
    """
    fold, best, x = folds(groups), (-1, None), x.float()
    starts = [None] * 5
    axes = [axes_of(x[fold != i], classes) for i in range(5)]
    for C in strengths:
        right = 0
        for i in range(5):
            inside, outside = fold != i, fold == i
            starts[i] = W, b = logistic(x[inside], labels[inside], classes, C, starts[i], 100, 1e-3, axes[i])
            right += int(((x[outside] @ W + b).argmax(1) == labels[outside]).sum())
        if right < best[0]:
            break
        best = max(best, (right, C), key=lambda pair: pair[0])
    return best[1]


def fit_logistic(x, labels, classes, C):
    """Roughly in float32, then to a gradient of 1e-6 in float64: a third of the time, the same answer."""
    W, b = logistic(x.float(), labels, classes, C, most=200, tolerance=1e-5)
    return logistic(x, labels, classes, C, (W.double(), b.double()), tolerance=1e-6)


def bn_linear(views, labels, classes, rates=RATES, epochs=90, batch=256, warmup=10, seed=0):
    """The MAE recipe (He et al. 2021, appendix A): BatchNorm without affine, then linear -> [scores(x), one per rate].

    views (V, n, D): features of V views of each image; an epoch shows one of them, drawn at random. Rates are for 256
    images, warm-up and half a cosine as in the paper. Plain SGD, momentum .9, no decay: LARS is for the paper's batches
    of 16,384, and at 256 it is one more constant to choose. All rates train at once, as columns of one matrix.
    """
    V, n, D = views.shape
    batch, R = min(batch, n), len(rates)
    lr = torch.tensor(rates).repeat_interleave(classes) * batch / 256  # (R*classes)
    W, b = torch.zeros(D, R * classes), torch.zeros(R * classes)
    speed_W, speed_b, mean, var = torch.zeros_like(W), torch.zeros_like(b), torch.zeros(D), torch.ones(D)
    draws, steps, target = torch.Generator().manual_seed(seed), n // batch, F.one_hot(labels, classes).float()
    for epoch in range(epochs):
        shown = torch.randint(V, (n,), generator=draws)
        for i, rows in enumerate(torch.randperm(n, generator=draws)[: steps * batch].split(batch)):
            x = views[shown[rows], rows].float()
            batch_var, batch_mean = torch.var_mean(x, 0, correction=0)
            mean, var = mean.lerp(batch_mean, 0.1), var.lerp(batch_var * batch / max(1, batch - 1), 0.1)
            x = (x - batch_mean) * (batch_var + 1e-6).rsqrt()
            error = torch.addmm(b, x, W).view(batch, R, classes).softmax(2)
            error = (error - target[rows][:, None]).view(batch, -1) / batch
            now = epoch + i / steps
            factor = now / warmup if now < warmup else (1 + math.cos(math.pi * (now - warmup) / (epochs - warmup))) / 2
            speed_W, speed_b = 0.9 * speed_W + x.T @ error, 0.9 * speed_b + error.sum(0)
            W, b = W - factor * lr * speed_W, b - factor * lr * speed_b

    def scores(x):
        every = torch.addmm(b, (x.float() - mean) * (var + 1e-6).rsqrt(), W).view(len(x), R, classes)
        return every.unbind(1)

    return scores
