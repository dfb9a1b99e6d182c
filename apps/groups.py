"""Groups of faces that look alike, by average linkage of their cosines, and how alike these have to be.

n faces   D width of an embedding
"""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from common.train import UserError
from data import evenly_spaced

ALIKE = 0.15  # mean cosine that joins two groups, where no held-out faces have told a better one
GRID = np.arange(-0.1, 0.65, 0.05).round(2)  # others that are tried
FEWEST = 30  # held-out faces that may choose one
CENTRED = 0.5  # share of the mean of all faces that is taken away before grouping
ASKED = 500  # held-out faces that choose one, at most
GROUPED = 10_000  # faces at most: memory holds all pairs


def centred(unit):
    """Unit vectors less a share of their mean: else all faces of a new style are alike."""
    return F.normalize(unit - CENTRED * unit.mean(0))


def check_grouped(count, what):
    """So many of them can be compared with each other."""
    if count > GROUPED:
        raise UserError(f"{count:,} {what} are more than --group takes, {GROUPED:,}; give fewer")


def alike(unit, least=ALIKE):
    """Whitened unit vectors (n, D) -> the group of each, 0, 1, ... by size: average linkage of cosines."""
    from sklearn.cluster import AgglomerativeClustering

    check_grouped(len(unit), "faces")
    if len(unit) < 2:
        return [0] * len(unit)
    settings = {"metric": "cosine", "linkage": "average", "distance_threshold": 1 - least}
    x = centred(unit).numpy()
    clusters = AgglomerativeClustering(n_clusters=None, **settings).fit_predict(x)
    by_size = Counter(clusters.tolist()).most_common()
    rank = {number: i for i, (number, _) in enumerate(by_size)}
    return [rank[number] for number in clusters.tolist()]


def pair_f1(groups, labels):
    """Groups and characters of faces (n,) -> F1 of the pairs that are in one group, in percent."""
    from sklearn.metrics.cluster import pair_confusion_matrix

    (_, false), (missed, true) = pair_confusion_matrix(labels, groups)
    return 200 * true / max(1, 2 * true + false + missed)


def f1_curve(unit, labels):
    """Held-out faces (n, D) of characters (n,) -> `pair_f1` at each threshold of GRID, f64 (g,)."""
    rows = evenly_spaced(len(unit), ASKED)
    unit, labels = unit[rows], labels[rows]
    return torch.tensor([pair_f1(alike(unit, least), labels) for least in GRID])


def best_threshold(curves, faces):
    """Some curves of so many faces together -> the threshold with the best mean F1."""
    if faces < FEWEST:
        return ALIKE
    return float(GRID[torch.stack(list(curves)).mean(0).argmax()])
