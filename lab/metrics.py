"""What is measured, as pure functions of tensors: no files, no models. Imports nothing of ours."""

import torch
import torch.nn.functional as F


def knn_top1(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Share of queries (Q, D) whose class wins among their k nearest of bank (n, D), in [0, 1].

    Cosine similarity s, votes weighted by exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4).
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (Q, k)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=bank.device)
    votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
    return (votes.argmax(1) == labels).float().mean().item()


def ridge_top1(train, train_labels, held, held_labels, penalty):
    """Share right in [0, 1] of ridge regression onto one-hot labels: features (n, D) standardised, closed form.

    W = (Z^T Z + penalty I)^-1 Z^T Y (Hoerl and Kennard 1970): the linear probe that has no training loop.
    """
    mean, std = train.double().mean(0), train.double().std(0) + 1e-6
    Z, Y = (train - mean) / std, F.one_hot(train_labels).double()
    W = torch.linalg.solve(Z.T @ Z + penalty * torch.eye(Z.shape[1], dtype=Z.dtype), Z.T @ (Y - Y.mean(0)))
    scores = (held - mean) / std @ W + Y.mean(0)
    return (scores.argmax(1) == held_labels).double().mean().item()


def thumbnails(images, side):
    """images u8 (n, S, S, 3) -> (n, side*side*3) in [-.5, .5]: the mean colour of each of side x side cells.

    The control of every feature: what colour alone recognises.
    """
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), side)
    return small.flatten(1) / 255 - 0.5


# ---- maps against truth ----------------------------------------------------------------------------------------------


def auc(score, truth):
    """Area under the ROC curve in [0, 1]: how often a true entry outranks a false one; score (n,), truth (n,) bool.

    By ranks (Mann and Whitney 1947); equal scores share their mean rank. NaN where only one kind is there.
    """
    values, where, count = torch.unique(score, return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[where].double()  # from 1
    true, false = int(truth.sum()), int((~truth).sum())
    if not true or not false:
        return float("nan")
    return ((rank[truth].sum() - true * (true + 1) / 2) / (true * false)).item()


def iou(found, truth):
    """Intersection over union of two bool tensors, in [0, 1]; 1 where both are empty."""
    union = (found | truth).sum()
    return ((found & truth).sum() / union).item() if union else 1.0


def adjusted_rand(a, b):
    """Agreement of two clusterings (n,) of whole numbers: 1 is the same up to names, 0 what chance gives.

    (Index - expected) / (maximum - expected), the index being the number of pairs that are together in both (Hubert
    and Arabie 1985).
    """
    _, a = torch.unique(a, return_inverse=True)
    _, b = torch.unique(b, return_inverse=True)
    table = torch.bincount(a * (int(b.max()) + 1) + b, minlength=(int(a.max()) + 1) * (int(b.max()) + 1)).double()
    table = table.view(int(a.max()) + 1, -1)
    pairs = lambda counts: (counts * (counts - 1) / 2).sum()  # noqa: E731
    together, in_a, in_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = in_a * in_b / pairs(table.sum())
    most = (in_a + in_b) / 2
    return 1.0 if most == expected else ((together - expected) / (most - expected)).item()
