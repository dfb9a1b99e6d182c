"""The sheet of a packed data set: pictures by class, foreground and parts."""

import numpy as np

import data
from common import plots


def dataset_sheet(path, title, split, classes=6, each=10):
    """Draw pictures of the largest, the smallest and some classes between them, of an open split."""
    images, labels = split["images"], split["labels"].numpy()
    ids, counts = np.unique(labels[labels >= 0], return_counts=True)
    by_size = ids[np.argsort(-counts, kind="stable")]
    rows = []
    for label in by_size[data.evenly_spaced(len(by_size), classes).numpy()]:
        own = np.nonzero(labels == label)[0][:each]
        rows.append((split["header"]["classes"][label][:18], images[own]))
    some = data.evenly_spaced(len(images), each).numpy()
    for plane, name in (("images", "picture"), ("fg", "foreground"), ("parts", "parts")):
        rows += [(name, split[plane][some])] if plane in split else []
    plots.image_grid(path, title, rows)
