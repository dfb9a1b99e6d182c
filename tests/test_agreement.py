"""common/agreement.py: two views of one image find each other; images of one illustration are no negatives."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.agreement import SETTINGS, Agreement, agreement_loss


def by_hand(h, groups, T, dcl):
    """The formula at the head of common/agreement.py, one exponential after the other."""
    total = 0.0
    for i in range(len(h)):
        j = i + 1 if i % 2 == 0 else i - 1
        among = [k for k in range(len(h)) if groups[k] != groups[i] or (k == j and not dcl)]
        total -= math.log(math.exp(h[i] @ h[j] / T) / sum(math.exp(h[i] @ h[k] / T) for k in among))
    return total / len(h)


@pytest.mark.parametrize("dcl", [False, True])
def test_the_loss_is_the_formula(dcl):
    """Images 0 and 3 are near-duplicates: four views that are nobody's negatives among themselves."""
    h = F.normalize(torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = torch.tensor([0, 1, 2, 0, 4]).repeat_interleave(2)
    loss, _ = agreement_loss(h, groups, 0.3, dcl)
    assert loss.item() == pytest.approx(by_hand(h, groups.tolist(), 0.3, dcl), rel=1e-5)
    apart = by_hand(h, torch.arange(5).repeat_interleave(2).tolist(), 0.3, dcl)
    assert loss.item() != pytest.approx(apart, rel=1e-3)


def test_views_that_find_their_pair_are_counted():
    h, groups = torch.eye(4).repeat_interleave(2, 0), torch.arange(4).repeat_interleave(2)
    assert agreement_loss(h, groups, 0.1, True)[1] == 1
    swapped = h[[0, 2, 1, 3, 4, 5, 6, 7]]  # two images have a view of each other
    assert agreement_loss(swapped, groups, 0.1, True)[1] == 0.5
    assert agreement_loss(torch.ones(8, 4) / 2, groups, 0.1, True)[1] == 0  # a collapse finds none


def test_the_projector_is_a_normed_network_on_the_groups_of_the_data():
    torch.manual_seed(0)
    header = {"groups": ["a", "b", "a", "c"]}
    agreement = Agreement(32, {"header": header, "labels": torch.zeros(4)}, SETTINGS["pooler"])
    summary, rows = torch.randn(8, 32), torch.tensor([0, 0, 3, 3, 2, 2, 1, 1])
    first, _, _, last = agreement.projector
    x = summary @ first.weight.T
    x = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()).relu()
    h = F.normalize(x @ last.weight.T + last.bias, dim=1)
    assert (first.weight.shape, last.weight.shape) == ((1024, 32), (128, 1024))
    expected = by_hand(h.detach(), [0, 0, 2, 2, 0, 0, 1, 1], 0.15, True)
    assert agreement(summary, rows).item() == pytest.approx(expected, rel=1e-4)
    found = agreement.statistics()
    assert found["agreement"] == pytest.approx(expected, rel=1e-4) and 0 <= found["found"] <= 1
    agreement(summary, rows).backward()
    assert all(w.grad.any() for w in agreement.parameters())
