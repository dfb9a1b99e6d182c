"""The weighted reconstruction loss: masked patches only, flat colour counts less.

For a masked patch with pixels x and prediction y, both of P numbers (x normalised by ImageNet's mean and deviation):

    target  t = (x - mean(x)) / sqrt(var(x) + s0^2)      norm_pix; t = x without it
    error   e = mean over P of (y - t)^2
    detail  d = sqrt(mean of (x01 - its channel's mean)^2)         x01 in [0, 1]; a flat red patch has detail 0
    weight  w = w_flat + (1 - w_flat) * (1 - exp(-d / tau))        1 on rich patches, w_flat on perfectly flat ones
    loss    L = sum(w e) / sum(w)                                  gradient  dL/dy = 2 w (y - t) / (P sum(w))

The floor s0 is ours: anime patches are often perfectly flat, and without a floor norm_pix would blow up the last bit
of a JPEG to a target of unit variance. s0^2 = 1e-6 is the original (He et al. 2021, section 4.2).
The weight does not depend on the prediction, so it is a small pass of its own over bytes; its sum may come from
outside (`weight_sum`), so that splitting a batch over steps or machines changes nothing.
"""

import torch

from kernels import choose_impl
from kernels.gather import patch_bytes, scale_shift

FLOOR = 0.15  # s0, in units of the normalised pixels: about .03 of the range of the raw ones
TAU = 0.05  # detail at which the weight has risen by 63 %: a soft shadow edge


def patch_detail(view, ids, patch, impl="auto"):
    """view u8 (B, S, S, 3), ids (B, M) -> detail (B, M) in [0, 1]: root mean square around each channel's own mean."""
    choose_impl(impl, view.device)
    x = patch_bytes(view, ids, patch).float().unflatten(2, (-1, 3))  # (B, M, p*p, 3)
    return x.var(2, correction=0).mean(2).sqrt() / 255


def detail_weight(detail, flat_weight, tau=TAU):
    """detail (any shape) -> weight of the same shape, flat_weight where detail is 0, towards 1 above tau."""
    return flat_weight + (1 - flat_weight) * (1 - torch.exp(-detail / tau))


def patch_stats(x, floor=FLOOR):
    """Normalised pixels (B, M, P) -> their mean and floored deviation, (B, M, 1) each; unbiased variance as in MAE."""
    var, mean = torch.var_mean(x, 2, keepdim=True)
    return mean, (var + floor**2).sqrt()


def targets(view, ids, patch, norm_pix, floor=FLOOR):
    """-> what the network has to predict, (B, M, P) fp32, and the patches' (mean, deviation) if norm_pix."""
    scale, shift = scale_shift(patch * patch * 3, view.device)
    x = torch.addcmul(shift, patch_bytes(view, ids, patch), scale)
    if not norm_pix:
        return x, None
    mean, std = patch_stats(x, floor)
    return (x - mean) / std, (mean, std)


def patch_error(pred, view, ids, patch, norm_pix=True):
    """Mean squared error of each masked patch, (B, M) fp32."""
    target, _ = targets(view, ids, patch, norm_pix)
    return (pred.float() - target).square().mean(2)


def reconstruction_loss(
    pred, view, ids_mask, patch, weight=None, norm_pix=True, weight_sum=None, impl="auto"
):
    """pred (B, M, P), view u8 (B, S, S, 3), ids_mask (B, M) -> scalar sum(w e) / sum(w), differentiable in pred.

    weight (B, M) is a plain tensor, 1 if None: another weighting is three lines in your script.
    weight_sum: the sum over the whole global batch where pred is only a part of it; None sums this part's weights.
    """
    choose_impl(impl, pred.device)
    error = patch_error(pred, view, ids_mask, patch, norm_pix)
    if weight is None:
        weight = torch.ones_like(error)
    return (weight * error).sum() / (weight.sum() if weight_sum is None else weight_sum)


def stats_loss(stats, view, ids_mask, patch):
    """How far the predicted (mean, log deviation) of each masked patch, (B, M, 2), are from the true ones; scalar.

    Trains the small head that lets pictures be drawn without looking at the answer. An eighth of the batch is enough.
    """
    some = max(1, len(stats) // 8)
    with torch.no_grad():
        _, (mean, std) = targets(view[:some], ids_mask[:some], patch, norm_pix=True)
        truth = torch.cat([mean, std.log()], 2)
    return (stats[:some].float() - truth).square().mean()
