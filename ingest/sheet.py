"""The sheet of a packed data set: pictures by class, foreground and parts, class sizes, what was left out."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

import data
from common.plots import COLOURS, INK, save, show_rows

# by part id
PART_COLOURS = ("#FFFFFF", "#0072B2", "#E69F00", "#000000", "#D55E00", "#009E73", "#CC79A7")


def dataset_sheet(path, name, splits, classes=6, each=10):
    """splits {name: open split} -> a picture file of classes, planes, sizes and notes."""
    train = splits["train"]
    header, images = train["header"], train["images"]
    if header["classes"]:
        chosen = sampled(train["labels"], classes, each)
        rows = [(header["classes"][c][:18], images[own]) for c, own in chosen]
    else:
        chosen = data.evenly_spaced(len(images), 3 * each).split(each)
        rows = [("", images[own.numpy()]) for own in chosen]
    shown = data.evenly_spaced(len(images), each)
    for plane, label in (("fg", "foreground"), ("parts", "parts")):
        rows += [(label, [laid_over(train, plane, i) for i in shown])] if plane in train else []
    figure = plt.figure(figsize=(11.5, 1.05 * len(rows) + 3.9))
    above, below = figure.subfigures(2, 1, height_ratios=[1.05 * len(rows) + 0.4, 3.2])
    sizes = ", ".join(f"{n} {len(s['images']):,}" for n, s in splits.items())
    title = f"{name}: {sizes}, {len(header['classes'])} classes, {images.shape[1]} px"
    above.suptitle(title, fontsize=13)
    show_rows(above.subplots(len(rows), each, squeeze=False), rows)
    left, right = below.subplots(1, 2, width_ratios=[3, 2])
    class_sizes(left, splits)
    right.axis("off")
    lines = {"va": "top", "fontsize": 9, "linespacing": 1.5, "transform": right.transAxes}
    right.text(0, 1, "\n".join(about_lines(splits)), **lines)
    if "parts" in train and header.get("parts"):
        parts = zip(header["parts"], PART_COLOURS, strict=False)
        patches = [Patch(fc=colour, ec=INK, lw=0.5, label=part) for part, colour in parts]
        right.legend(handles=patches, ncols=4, loc="lower left")
    save(figure, path)


def sampled(labels, classes, each):
    """-> [(class id, rows)] of the largest, the smallest and some classes between them."""
    labels = labels.numpy()
    ids, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = ids[np.argsort(-counts, kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, classes).round().astype(int))]
    return [(c, np.nonzero(labels == c)[0][:each]) for c in chosen]


def laid_over(split, plane, i):
    """Picture i with the background grayed out, or with its parts in colours, u8 (S, S, 3)."""
    picture = split["images"][i].astype(np.float32)
    if plane == "fg":
        share = split["fg"][i][..., None] / 255
        return np.uint8(picture * share + 188 * (1 - share))
    tint = np.array([to_rgb(c) for c in PART_COLOURS])[split["parts"][i] % len(PART_COLOURS)] * 255
    return np.uint8(0.35 * picture.mean(2, keepdims=True) + 0.65 * tint)


def class_sizes(axis, splits):
    """Images of each class, the largest first, by split: the long tail at a glance."""
    n = len(splits["train"]["header"]["classes"])
    if not n:
        axis.axis("off")
        axis.text(0.5, 0.5, "no labels", ha="center", va="center", transform=axis.transAxes)
        return
    labels = (s["labels"][s["labels"] >= 0] for s in splits.values())
    counts = [torch.bincount(own, minlength=n).numpy() for own in labels]
    order, bottom = np.argsort(-sum(counts), kind="stable"), np.zeros(n)
    width = 0.9 if n < 100 else 1.0
    for split, count, colour in zip(splits, counts, COLOURS, strict=False):
        axis.bar(np.arange(n) + 1, count[order], width, bottom, color=colour, label=split)
        bottom += count[order]
    axis.set(xlabel="class, by size", ylabel="images", xlim=(0.4, n + 0.6))
    axis.set_title("Class sizes", loc="left")
    axis.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def about_lines(splits):
    """What was left out or joined while packing, and what else the files hold."""
    headers = [split["header"] for split in splits.values()]
    skipped = [s for h in headers for s in h.get("skipped_first", [])]
    lines = [f"source: {headers[0]['source']}"]
    lines += [f"skipped: {sum(h.get('skipped', 0) for h in headers)}"]
    lines += [f"  {k}: {why}" for k, why in skipped[:4]] + headers[0].get("notes", [])
    lines += tag_lines(splits) if splits["train"]["header"].get("tags") else []
    lines += [f"{k}: {', '.join(v)}" for k, v in (headers[0].get("style") or {}).items()]
    pieces = []
    for line in lines:
        pieces += textwrap.wrap(line, 62, subsequent_indent="   ")
    return pieces[:16]


def tag_lines(splits):
    """How many tags there are, and the most frequent ones with their number of pictures."""
    words = splits["train"]["header"]["tags"]
    planes = [np.asarray(s["tags"]) for s in splits.values()]
    if planes[0].dtype != np.int32:
        fix = "remove it, and make it again with data.py"
        return [f"{len(words)} tags, of an older packing: {fix}"]
    count = sum(np.bincount(p[p >= 0], minlength=len(words)) for p in planes)
    each = np.concatenate([(p >= 0).sum(1) for p in planes])
    most = ", ".join(f"{words[i]} {count[i]}" for i in np.argsort(-count, kind="stable")[:8])
    image = f"{each.mean():.1f} an image ({each.max()} at most, none on {(each == 0).mean():.0%})"
    rare = f"{(count < 10).sum()} on fewer than 10 images"
    return [f"{len(words)} tags, {image}, {rare}: {most}, ..."]
