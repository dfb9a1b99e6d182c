"""Evening 5: LoRA, a small matrix beside a frozen one.

A network is trained, and now has to learn characters. LoRA (Hu et al. 2021, arXiv:2106.09685) leaves each of its
matrices W as it is, and learns what is added to it, as a product B A of two thin matrices. If W is (out, in), then
A is (r, in) and B is (out, r), so with a small rank r few numbers are trained. B begins at zero, so that training
begins at the network as it was. In the end, W + alpha / r * B A is one matrix, and the merged network costs no more
than the old one. You write the layer and the merge, and count what is trained. Then the check breaks your layer:
A begins at zero, too. In finetune_lora.py, the same layer has three pairs of A and B for q, k and v.

    in, out: widths of a layer   r rank   n rows of a batch, which may be several axes
"""

import torch
from torch import nn


class LoRA(nn.Module):
    """base(x) + alpha / r * B A x (Hu et al. 2021, eq. 3), where base is a frozen nn.Linear."""

    def __init__(self, base, r, alpha):
        """Sets self.base, and the parameters self.A (r, in) and self.B (out, r).

        A is drawn uniformly from -1 / sqrt(in) to 1 / sqrt(in), as in the authors' code, and B is 0. The
        parameters of base get no gradient.
        """
        raise NotImplementedError

    def forward(self, x):
        """x (n, in) -> (n, out)."""
        raise NotImplementedError


def merge(lora):
    """A LoRA layer -> a new nn.Linear that computes the same. Base stays as it is."""
    raise NotImplementedError


def trained(network):
    """How many numbers of a network are trained, and how many it has: two ints."""
    raise NotImplementedError


# Answer in words:
# 1. With slope = dL/dy (n, out), write down dL/dA and dL/dB. What moves in the first step if B = 0? And if A = 0, too?
# 2. The check learns a change of rank 2 with r = 1, 2 and 8. Why does r = 1 stop where it does, and what does r = 8
#    cost for nothing?
# 3. Of your three runs with weights/toon: how large would a difference on dev have to be before you believe it?
