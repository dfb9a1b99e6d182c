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


def thumbnails(images, side):
    """images u8 (n, S, S, 3) -> (n, side*side*3) in [-.5, .5]: the mean colour of each of side x side cells.

    The control of every feature: what colour alone recognises.
    """
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), side)
    return small.flatten(1) / 255 - 0.5
