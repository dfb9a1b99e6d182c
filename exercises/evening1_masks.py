"""Evening 1: which patches are hidden?

A masked autoencoder cuts a picture into N patches, hides M of them from its encoder, and learns to predict these.
A mask decides which ones. In this project, every mask is a priority for each patch, and a sampler hides the M
patches of the highest priority. Their number is the same in every picture, because the visible patches of a batch
are stacked to one tensor. If the priority is noise, the mask is random, as in He et al. 2021 (arXiv:2111.06377,
section 3). It can also be a score, such as the attention of a teacher. But a score alone would hide the same
patches of a picture in every epoch. So noise is added to it, and `beta` says how far the score may overrule the
noise. It is Gumbel noise, because then the hidden patches are drawn without replacement with odds exp(beta * z)
(Kool et al. 2019, arXiv:1903.06059).

    B pictures   s their side in pixels   N = g * g patches of a picture   K visible   M = N - K hidden
"""

import torch

from mask import pixels_of, rows_and_columns  # for your own mask


def sample(priority, K):
    """priority (B, N) -> ids_keep (B, K) and ids_mask (B, M), int64: the places of visible and hidden patches.

    Of each picture, the K patches of the lowest priority stay visible. Of patches with the same priority, those
    with the lower place do, so that every machine hides the same: `argsort` has a `stable` for that.
    """
    raise NotImplementedError


def guided(score, beta, noise):
    """score (B, N), noise (B, N) -> the priority (B, N) = beta * z + noise.

    z is the score minus its mean over the patches of the picture, divided by its standard deviation there, which
    is the root of the mean square (with N, and not N - 1). In a picture whose score is constant, z is 0.
    """
    raise NotImplementedError


def own(scores, noise, t, hidden, beta=2.0):
    """A mask of your own -> the priority of each patch (B, N). The arguments are those of every mask in mask.py.

    scores["view"] are the pixels, u8 (B, s, s, 3); noise is Gumbel noise (B, N); t is the progress of the run, 0
    to 1; hidden is M. Nothing else may decide, so draw no random numbers here. For example, hide stripes, a
    corner, dark patches or red ones first. `rows_and_columns(noise)` and `pixels_of(view, noise)` help.
    """
    raise NotImplementedError


# Answer in words:
# 1. "Hide all patches with a priority above 0" would be shorter. What would go wrong with a batch?
# 2. In masks.png, a percentage is the share of the hidden patches that are among the top M of the score. Why is
#    it not 0 % for beta 0? And what would a network never be asked to predict with a beta of 1000?
