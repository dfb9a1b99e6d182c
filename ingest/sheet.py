"""The sheet of a packed data set: pictures by class, foreground and parts."""

import numpy as np
from matplotlib.colors import to_rgb

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
    for plane, name in (("fg", "foreground"), ("parts", "parts")):
        rows += [(name, [laid_over(split, plane, i) for i in some])] if plane in split else []
    plots.image_grid(path, title, rows or [("", images[some])])


def laid_over(split, plane, i):
    """Picture i with the background grayed out, or with its parts in colours, u8 (S, S, 3)."""
    picture = split["images"][i].astype(np.float32)
    if plane == "fg":
        share = split["fg"][i][..., None] / 255
        return np.uint8(picture * share + 188 * (1 - share))
    colours = 255 * np.array([to_rgb(colour) for colour in ("white", *plots.COLOURS)])
    tint = colours[split["parts"][i] % len(colours)]
    return np.uint8(0.35 * picture.mean(2, keepdims=True) + 0.65 * tint)
