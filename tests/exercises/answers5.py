"""Evening 5: a solution, another one in other words, and wrong ones with what is to be said of them."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRA(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        bound = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


@torch.no_grad()
def merge(lora):
    merged = copy.deepcopy(lora.base)
    merged.weight += lora.scale * lora.B @ lora.A
    return merged


def trained(network):
    sizes = [(w.numel(), w.requires_grad) for w in network.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


class OtherLoRA(nn.Module):
    def __init__(self, base, r, alpha):
        nn.Module.__init__(self)
        for w in base.parameters():
            w.requires_grad = False
        self.base, self.r, self.alpha = base, r, alpha
        n_out, n_in = base.weight.shape
        self.A = nn.Parameter(torch.zeros(r, n_in))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(n_out, r))

    def forward(self, x):
        W = self.base.weight + self.alpha / self.r * self.B.matmul(self.A)
        return x @ W.T + self.base.bias


def merge_by_two_columns(lora):
    """W is what the layer makes of the unit vectors."""
    n_out, n_in = lora.base.weight.shape
    merged = nn.Linear(n_in, n_out)
    with torch.no_grad():
        bias = lora(torch.zeros(1, n_in))
        merged.weight.copy_((lora(torch.eye(n_in)) - bias).T)
        merged.bias.copy_(bias[0])
    return merged


def trained_by_vectors(network):
    every = nn.utils.parameters_to_vector(network.parameters())
    learned = nn.utils.parameters_to_vector([w for w in network.parameters() if w.requires_grad])
    return len(learned), len(every)


class FreeBase(LoRA):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        base.requires_grad_(True)


class RandomB(LoRA):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.normal_(self.B)


class ZeroA(LoRA):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.zeros_(self.A)


class Unscaled(LoRA):
    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


class Turned(LoRA):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.A, self.B = nn.Parameter(self.A.T), nn.Parameter(self.B.T)


def merge_in_place(lora):
    lora.base.weight += lora.scale * lora.B.data @ lora.A.data
    return lora.base


def merge_without_bias(lora):
    merged = merge(lora)
    merged.bias = None
    return merged


OTHER = {"LoRA": OtherLoRA, "trained": trained_by_vectors, "merge": merge_by_two_columns}
WRONG = [
    ("LoRA", Turned, "Found ((64, 4), (4, 8))"),
    ("LoRA", RandomB, "it begins as base, because B is 0"),
    ("LoRA", ZeroA, "A is uniform\n         Its largest number is 0"),
    ("LoRA", FreeBase, "base.bias"),
    ("LoRA", Unscaled, "alpha / r is left out"),
    ("merge", merge_in_place, "a second merge would add B A again"),
    ("merge", merge_without_bias, "the bias is left out"),
    ("merge", lambda lora: lora, "a plain Linear\n         Found a LoRA"),
    (
        "trained",
        lambda net: (sum(w.requires_grad for w in net.parameters()), 4),
        "tensors are counted",
    ),
    ("trained", lambda net: (trained(net)[1],) * 2, "frozen numbers are counted"),
]
