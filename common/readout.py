"""What can be read off frozen features without training a network: pure functions of tensors.

A good encoder puts pictures of one character close to each other (kNN), or on one side of a plane
(ridge). Thumbnails are the control: what colour alone tells.

    n images   D width of the features   C classes
"""

import torch
import torch.nn.functional as F


def knn_votes(bank, bank_labels, queries, classes, k=20, temperature=0.07):
    """Votes of the k nearest of bank (n, D) for each class: queries (Q, D) -> (Q, classes).

    A vote weighs exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4).
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for chunk in torch.arange(len(queries)).split(4096):
        similarity, nearest = (queries[chunk] @ bank.T).topk(min(k, len(bank)), dim=1)  # (q, k)
        weights = (similarity / temperature).exp()
        votes[chunk] = votes[chunk].scatter_add_(1, bank_labels[nearest], weights)
    return votes


def standardise(train, *others):
    """-> all in float64, shifted and scaled by the mean and standard deviation of train (n, D)."""
    mean = train.double().mean(0)
    # Train alone gives both numbers: other pictures are to be judged, so nothing may be learned of them.
    std = train.double().std(0) + 1e-6  # a constant column becomes 0
    return [(x.double() - mean) / std for x in (train, *others)]


def ridge(x, labels, classes, penalty):
    """Least squares onto one-hot labels -> (W (D, C), b (C)); x (n, D) float64, standardised.

    W = (X^T X + penalty I)^-1 X^T Y (Hoerl and Kennard 1970): linear regression in closed form.
    """
    Y = F.one_hot(labels, classes).to(x.dtype)
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ (Y - Y.mean(0))), Y.mean(0)


def topk(scores, labels, k):
    """Share of rows of scores (n, C) whose label is among the k highest; of ties, the first ones."""
    # topk() of torch breaks ties as it likes; a stable sort gives the same answer on every machine.
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return (best == labels[:, None]).any(1).double().mean().item()


def thumbnails(images, side):
    """images u8 (n, S, S, 3) -> (n, side*side*3) in [-0.5, 0.5]: the mean colour of each cell."""
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), side)
    return small.flatten(1) / 255 - 0.5


def effective_rank(x):
    """x (n, D) -> exp of the entropy of its singular values' shares (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals((x - x.mean(0)).float().cpu())
    share = values / values.sum().clamp(min=1e-30)
    return round(torch.special.entr(share).sum().exp().item(), 2)
