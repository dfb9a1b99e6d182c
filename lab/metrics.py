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


# ---- verification and open set: scores of pairs that belong together (positive) and of pairs that do not -------------


def pair_cosines(embeddings, labels, groups):
    """Cosine of every pair of rows -> (of one class, of different classes); pairs of one group (i64) are left out.

    Two faces of one illustration are alike for reasons that have nothing to do with who they are.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), 1)
    apart = groups[i] != groups[j]
    i, j = i[apart], j[apart]
    cosine = torch.cat([(unit[a] * unit[b]).sum(1) for a, b in zip(i.split(2**18), j.split(2**18), strict=True)])
    same = labels[i] == labels[j]
    return cosine[same], cosine[~same]


def roc(positive, negative):
    """Scores -> false and true positive rates (fp64) of "accept from here on", for each distinct score, from 0 to 1."""
    scores = torch.cat([positive, negative]).double()
    is_true = torch.arange(len(scores)) < len(positive)
    scores, order = scores.sort(descending=True)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])  # of equal scores
    true = is_true[order].cumsum(0)[last].double()
    false = (~is_true[order]).cumsum(0)[last].double()
    zero = true.new_zeros(1)
    return torch.cat([zero, false / len(negative)]), torch.cat([zero, true / len(positive)])


def roc_auc(positive, negative):
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half."""
    return torch.trapezoid(*roc(positive, negative)[::-1]).item()


def tpr_at_fpr(positive, negative, most):
    """The largest true positive rate at a false positive rate of at most `most`."""
    false, true = roc(positive, negative)
    return true[false <= most].max().item()


def equal_error_rate(positive, negative):
    """Where the ROC curve has as many false accepts as false rejects, interpolated on a straight line."""
    false, true = roc(positive, negative)
    gap = false - (1 - true)  # rises from -1 to 1
    k = int((gap >= 0).nonzero()[0])
    share = -gap[k - 1] / (gap[k] - gap[k - 1])
    return (false[k - 1] + share * (false[k] - false[k - 1])).item()


def precision_recall(positive, negative):
    """Scores -> precision and recall (fp64) for each distinct score, from the highest on."""
    false, true = roc(positive, negative)
    hits, wrong = true[1:] * len(positive), false[1:] * len(negative)
    return hits / (hits + wrong), true[1:]


def average_precision(positive, negative):
    """Sum of precision times the step in recall, over the distinct scores (no interpolation)."""
    precision, recall = precision_recall(positive, negative)
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum().item()


def detection_rate(known, right, strangers, far):
    """Detection and identification rate, DIR, at a false alarm rate of at most far (Phillips et al. 2011, chapter 21).

    known (n,) scores of known faces, right (n,) whether the best name is theirs, strangers (m,) scores of unknown
    ones: the share of known faces that are named rightly at or above the lowest score that lets few strangers in.
    """
    allowed = int(far * len(strangers) + 1e-9)
    bar = strangers.sort(descending=True).values[allowed] if allowed < len(strangers) else float("-inf")
    return ((known > bar) & right).double().mean().item()
