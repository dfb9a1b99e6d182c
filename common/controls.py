"""Controls of a recogniser: accuracy by colours alone, without a network; pictures without colour."""

import functools
from dataclasses import replace

import torch

import data
from common.features import evenly_of_each
from common.readout import ridge, standardise, thumbnails, topk

CPU = torch.device("cpu")
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of the ridge regression on thumbnails
BINS = 8  # of red, green and blue
SVM_IMAGES = 4000  # of train, at most
COSTS = (1, 10, 100)  # C of the SVM; one is chosen on dev


def histograms(images):
    """images u8 (n, S, S, 3) -> (n, BINS^3): square roots of the shares of colours, all of one area."""
    bins = images.flatten(1, 2).long() * BINS // 256
    place = (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]
    # images.shape[0] and not len(images), which would be a constant in an ONNX file.
    counts = torch.zeros(images.shape[0], BINS**3, device=images.device)
    counts = counts.scatter_add(1, place, torch.ones_like(place, dtype=counts.dtype))
    return (counts / place.shape[1]).sqrt()


def features_of(extract, images, index):
    """extract(u8 (b, S, S, 3)) -> (b, D), of packed pictures, index (n,) of a set -> (n, D)."""
    chunks = (data.take(images.split["images"], some, CPU) for some in index.split(1024))
    return torch.cat([extract(chunk) for chunk in chunks])


def thumbnail_top1(train, dev, report):
    """Three Subsets -> Top-1 in percent of a ridge regression on thumbnails, chosen on dev."""
    sets = train, dev, report
    small = [features_of(functools.partial(thumbnails, side=8), x, x.index) for x in sets]
    labels = [images.labels[images.index] for images in sets]
    x, choose, judged = standardise(*small)
    fits = [ridge(x, labels[0], int(labels[0].max()) + 1, penalty) for penalty in PENALTIES]
    W, b = max(fits, key=lambda fit: topk(choose @ fit[0] + fit[1], labels[1], 1))
    return 100 * topk(judged @ W + b, labels[2], 1)


def histogram_svms(train, costs=COSTS):
    """-> support vector machines on histograms of colours, one for each of the costs.

    If there are more than SVM_IMAGES pictures, they learn so many of them at most, because their time
    grows with the square: equally many of each character, as far as it has them.
    """
    from sklearn.svm import SVC

    some, labels = train.index, train.labels[train.index]
    if len(some) > SVM_IMAGES:
        share = max(1, SVM_IMAGES // len(labels.unique()))
        some = some[torch.cat(evenly_of_each(labels, share))]
    x = features_of(histograms, train, some)
    return [SVC(C=cost).fit(x, train.labels[some]) for cost in costs]


def histogram_top1(train, dev, report):
    """A control: Top-1 in percent of an SVM on histograms of colours, its cost chosen on dev."""
    judged = [(features_of(histograms, y, y.index), y.labels[y.index]) for y in (dev, report)]
    best = max(histogram_svms(train), key=lambda fit: fit.score(*judged[0]))
    return 100 * best.score(*judged[1])


class Gray:
    """Packed pictures u8 (n, S, S, 3), of which an index gives its rows without colour."""

    def __init__(self, images):
        self.images = images
        self.shape = images.shape

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        images = torch.from_numpy(self.images[index]).float()
        gray = (images @ torch.tensor(data.LUMA)).round().to(torch.uint8)
        return gray[..., None].expand(-1, -1, -1, 3).numpy()


def in_gray(images):
    """A Subset -> the same without colour."""
    split = images.split | {"images": Gray(images.split["images"])}
    return replace(images, name=f"{images.name} in gray", split=split)
