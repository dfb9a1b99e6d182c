"""The pictures of finetune_lora.py and recognize.py. Takes arrays and rows, writes PNGs."""

import matplotlib.pyplot as plt
import numpy as np

from lab import metrics
from lab.plot import BLUE, INK, ORANGE, save


def training(path, rows, best, title):
    """Rows of log.jsonl -> loss, and Top-1 and macro-F1 on the pictures that choices are made on."""
    steps, held = [r for r in rows if "loss" in r], [r for r in rows if "dev_top1" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2))
    figure.suptitle(title)
    left.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], color=BLUE)
    left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    for key, label, colour in (("dev_top1", "Top-1", BLUE), ("dev_macro_f1", "macro-F1", ORANGE)):
        right.plot([r["epoch"] for r in held], [r[key] for r in held], color=colour, label=label)
    right.axvline(best, color=INK, ls=":", label=f"kept: epoch {best}")
    right.set(title="Held apart for choices", xlabel="epoch", ylabel="%", ylim=(0, 100))
    right.legend(frameon=False, fontsize=9, loc="lower left")
    save(figure, path)


def confused(path, pairs, title, each=5):
    """pairs: [(text of the true, of the predicted, pictures that were mistaken, pictures of the predicted)]."""
    figure, axes = plt.subplots(max(1, len(pairs)), 2 * each + 1, figsize=(10.5, 1.0 * max(1, len(pairs)) + 0.9),
                                squeeze=False, width_ratios=[1] * each + [0.6] + [1] * each)  # fmt: skip
    figure.suptitle(f"{title}\n")  # the texts over the first pictures need the empty line
    for axis in axes.flat:
        axis.axis("off")
    for line, (true, predicted, wrong, like) in zip(axes, pairs, strict=False):
        for axis, picture in [*zip(line[:each], wrong, strict=False), *zip(line[each + 1 :], like, strict=False)]:
            axis.imshow(picture, interpolation="antialiased")
        for axis, text in ((line[0], true), (line[each + 1], predicted)):  # wider than its picture: not in the layout
            axis.text(0, 1.04, text, transform=axis.transAxes, fontsize=8, va="bottom", in_layout=False)
    save(figure, path)


def trust(path, pairs, strangers, title):
    """ROC and PR curves of (same character, different ones), the cosines of both; of (known, strangers) where given."""
    kinds = [("two faces: same character?", BLUE, pairs)]
    kinds += [] if strangers is None else [("one face: is it known?", ORANGE, strangers)]
    figure, axes = plt.subplots(1, 2 + len(kinds), figsize=(3.5 * (2 + len(kinds)), 3.5))
    figure.suptitle(title)
    for name, colour, (positive, negative) in kinds:
        false, true = metrics.roc(positive, negative)
        axes[0].plot(100 * false, 100 * true, color=colour, label=name)
        precision, recall = metrics.precision_recall(positive, negative)
        axes[1].plot(100 * recall, 100 * precision, color=colour)
    axes[0].set(title="ROC", xlabel="false positive rate, %", ylabel="true positive rate, %", xscale="log")
    axes[0].set(xlim=(0.01, 100), ylim=(0, 100))
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[1].set(title="Precision and recall", xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 101))
    words = (("same", "different"), ("known", "stranger"))
    for axis, (name, _, scores), of in zip(axes[2:], kinds, words, strict=False):
        for part, label, colour in zip(scores, of, (BLUE, ORANGE), strict=True):
            axis.hist(part.numpy(), np.linspace(-1, 1, 61), density=True, histtype="step", color=colour, label=label)
        axis.set(title=name.split(":")[0].capitalize(), xlabel="cosine", ylabel="density", xlim=(-1, 1))
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)
