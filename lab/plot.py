"""Every picture of the project. Imports nothing of ours; takes arrays and rows, writes a PNG (150 dots per inch).

Colours are Okabe and Ito's, which the colour-blind can tell apart; maps are drawn in viridis.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

BLUE, ORANGE, GREEN, PINK, INK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#333333"
GRAY = 128  # a hidden patch
plt.rcParams |= {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"text.color": INK, "axes.labelcolor": INK, "savefig.dpi": 150, "figure.constrained_layout.use": True}


def save(figure, path):
    figure.savefig(path)
    plt.close(figure)


def image_grid(path, title, rows):
    """rows: [(name, images u8 (n, S, S, 3) or maps (n, g, g))], one line of pictures each."""
    n = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), n, figsize=(1.15 * n + 1.0, 1.15 * len(rows) + 0.5), squeeze=False)
    figure.suptitle(title)
    for line, (name, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, torch.as_tensor(pictures).cpu().numpy(), strict=True):
            axis.imshow(picture, cmap="viridis", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, path)


def reconstructions(path, original, seen, predicted, pasted, ratio):
    """Four lines of u8 (n, S, S, 3): the original, what the model saw, what it predicted, both together."""
    title = f"Reconstruction of images it never trained on, {ratio:.0%} hidden at random"
    image_grid(path, title, [("original", original), ("seen", seen), ("predicted", predicted), ("pasted", pasted)])


def masks(path, view, seen, guide, title):
    """view, seen u8 (n, S, S, 3) and, where there is one, the map that guided the mask, (n, g, g)."""
    image_grid(path, title, [("view", view), *([] if guide is None else [("attention", guide)]), ("seen", seen)])


def curves(path, rows, split, title):
    """Rows of log.jsonl -> training loss, validation error and kNN Top-1 (with its controls) by epoch."""
    loss = [r for r in rows if "loss" in r]
    held = [r for r in rows if "val_mse" in r]
    has_knn = any("knn" in r for r in held)
    figure, axes = plt.subplots(1, 2 + has_knn, figsize=(3.4 * (2 + has_knn), 3.2))
    figure.suptitle(title)
    axes[0].plot([r["epoch"] for r in loss], [r["loss"] for r in loss], color=BLUE)
    axes[0].set(title="Training loss", xlabel="epoch", ylabel="weighted masked error")
    axes[1].plot([r["epoch"] for r in held], [r["val_mse"] for r in held], "o-", color=BLUE)
    axes[1].set(title=f"Masked error on {split}", xlabel="epoch", ylabel="mean squared error, fixed mask")
    if has_knn:
        knn(axes[2], held)
    save(figure, path)


def knn(axis, held):
    axis.plot([r["epoch"] for r in held], [r["knn"] for r in held], "o-", color=BLUE, label="this encoder")
    controls = held[0]
    axis.axhline(controls["knn"], color=ORANGE, ls="--", label="untrained")
    if "knn_thumbnail" in controls:
        axis.axhline(controls["knn_thumbnail"], color=INK, ls=":", label="4x4 thumbnails")
    axis.set(title="Recognition", xlabel="epoch", ylabel="kNN Top-1, %", ylim=(0, None))
    axis.legend(frameon=False, fontsize=9)
