"""Groups of faces that look alike, by average linkage of their cosines.

n faces   D width of an embedding   H of a histogram of colours
"""

from collections import Counter

import torch.nn.functional as F

from common.train import UserError

ALIKE = 0.3  # mean likeness that joins two groups (results/TRIED.md)
CENTRED = 0.8  # share of the mean of all faces that is taken away before they are compared
GROUPED = 10_000  # faces at most: memory holds all pairs


def likeness(unit, colours):
    """Whitened unit vectors (n, D) and histograms (n, H) -> (n, n): the mean of their two cosines."""
    # A network that learned few characters says little of others. Colours say as much of these.
    one, two = centred(unit), centred(colours)
    return (one @ one.T + two @ two.T) / 2


def centred(x):
    """Vectors (n, D) less a share of their mean, of length 1: else all faces of a new style are alike."""
    return F.normalize(x - CENTRED * x.mean(0))


def check_grouped(count, what):
    """So many of them can be compared with each other."""
    if count > GROUPED:
        raise UserError(f"{count:,} {what} are more than --group takes, {GROUPED:,}; give fewer")


def alike(pairs, least=ALIKE):
    """`likeness` (n, n) -> the group of each face, 0, 1, ... by size: average linkage."""
    from sklearn.cluster import AgglomerativeClustering

    check_grouped(len(pairs), "faces")
    if len(pairs) < 2:
        return [0] * len(pairs)
    settings = {"metric": "precomputed", "linkage": "average", "distance_threshold": 1 - least}
    clusters = AgglomerativeClustering(n_clusters=None, **settings).fit_predict((1 - pairs).numpy())
    by_size = Counter(clusters.tolist()).most_common()
    rank = {number: i for i, (number, _) in enumerate(by_size)}
    return [rank[number] for number in clusters.tolist()]


def pair_f1(groups, labels):
    """Groups and characters of faces (n,) -> F1 of the pairs that are in one group, in percent."""
    from sklearn.metrics.cluster import pair_confusion_matrix

    (_, false), (missed, true) = pair_confusion_matrix(labels, groups)
    return 200 * true / max(1, 2 * true + false + missed)
