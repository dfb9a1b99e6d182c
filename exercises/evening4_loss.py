"""Evening 4: the loss of a drawing.

The network predicts each hidden patch, and its error is a mean of squares. Two things are made for drawings here.
First, what is predicted is not a patch x, but (x - mean) / deviation (norm_pix, He et al. 2021, section 3): the
network learns what is drawn, and not how light it is. But many patches of a drawing are flat, and what varies in
them is the noise of a JPEG, which would be blown up to the size of an eye. So a floor is put under the deviation.
Secondly, a flat patch is easy, so it weighs less than one with lines in it. You write target, weight and loss
(docs/masks.md, "The loss"; kernels/patches.py has the formulas in its docstring), and the gradient by hand, as the
kernel for a GPU has it. It is compared with autograd, and with finite differences of your loss.

    B pictures   M hidden patches of each   p side of a patch   P = p * p * 3 numbers of a patch
"""

import torch


def target(x, floor):
    """Patches x (B, M, P) -> what is to be predicted, (B, M, P): (x - mean) / sqrt(var + floor^2).

    Mean and variance are those of the P numbers of the patch. The variance is unbiased (divided by P - 1).
    """
    raise NotImplementedError


def weight(pixels, flat_weight, tau=0.05):
    """pixels (B, M, p * p, 3) of patches, from 0 to 1 -> the weight of each patch (B, M).

    detail  d = sqrt(mean of (pixel - mean of its colour in the patch)^2), the outer mean over pixels and colours
    weight  w = flat_weight + (1 - flat_weight) * (1 - exp(-d / tau))
    """
    raise NotImplementedError


def loss(pred, z, w):
    """L = sum(w e) / sum(w), a scalar: pred (B, M, P), targets z (B, M, P), weights w (B, M).

    e (B, M) is the mean of (pred - z)^2 over P. No gradient goes into w, because a weight that is itself learned
    would lower the loss by looking away.
    """
    raise NotImplementedError


def gradient(pred, z, w):
    """dL / dpred (B, M, P) of this loss, by a formula that you derive on paper: without autograd."""
    raise NotImplementedError


# Answer in words:
# 1. Why is the loss divided by the sum of the weights, and not by the number of patches? Think of a batch that is
#    mostly flat, and of pretrain.py, which clips the norm of the gradient to 1.
# 2. The check prints what becomes of a white patch with noise, with the floor and with that of MAE, 0.001. What would
#    the network spend its effort on? And what is the target of a perfectly white patch if the floor is 0?
