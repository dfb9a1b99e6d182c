"""Agreement of views: what trains a teacher to look. Two crops of each image, masked independently, find each other.

A masked autoencoder asks nothing of its CLS token, so that token's attention says little but where
a patch is. This second, small loss does (CAN, Mishra et al. 2022, arXiv:2210.16870; MAE-CT, Lehner
et al. 2023, arXiv:2304.10520): of the CLS token, or of a pooler that reads the patch tokens and
changes nothing in them (model.Pooler). Of the 2B views of a batch, i and j being views of one
image:

    h = unit(projector(that token))
    L_i = -log exp(h_i h_j / T) / sum_k exp(h_i h_k / T)

The projector is Linear, BatchNorm, ReLU, Linear, and is dropped afterwards. The sum over k != i is
NT-Xent (SimCLR, Chen et al. 2020, arXiv:2002.05709). DCL leaves k = j out of the sum (Yeh et al.
2021, arXiv:2110.06848). A run's loss is reconstruction + W * mean of L_i.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import distributed, metrics
from common.io import UserError

HIDDEN, OUT = 1024, 128  # widths of the projector
# What --contrast compares, and how. The pooler changes no feature, so it takes the full weight.
SETTINGS = {
    "pooler": {"weight": 1.0, "temperature": 0.15, "dcl": 1.0},
    "cls": {"weight": 0.01, "temperature": 0.07, "dcl": 0.0},
    "none": {},
}


def parse_contrast(text):
    """ "cls:weight=.1" -> ("cls", {"weight": 0.1, "temperature": 0.07, "dcl": 0.0})."""
    name, _, pairs = text.partition(":")
    if name not in SETTINGS:
        raise UserError(f"--contrast {text} is unknown; choose from {', '.join(SETTINGS)}")
    settings = dict(SETTINGS[name])
    for pair in filter(None, pairs.split(",")):
        key, _, value = pair.partition("=")
        if key not in settings:
            known = ", ".join(settings) or "no parameters"
            raise UserError(f"--contrast {name} has no parameter {key!r}; it has {known}")
        settings[key] = number(value, f"--contrast {name}:{pair}", key == "temperature")
    return name, settings


def number(text, flag, positive):
    """A finite number, 0 or more; more than 0 where it must be positive."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (positive and value == 0):
        raise UserError(f"{flag}: {text!r} must be a number {'above 0' if positive else 'from 0'}")
    return value


def contrast_of(flags):
    """Which second loss a run had, by its saved flags: "pooler", "cls" or "none".

    Older runs saved its weight as a number, and the word under "contrast_by".
    """
    saved = flags.get("contrast", "none")
    if isinstance(saved, str):
        return saved
    return flags.get("contrast_by", "pooler") if saved > 0 else "none"


class Agreement(nn.Module):
    """The projector and the loss, and what the log says of them. Images of one group are nobody's
    negatives.
    """

    def __init__(self, dim, train, temperature, dcl=True):
        super().__init__()
        norm = nn.BatchNorm1d(
            HIDDEN, track_running_stats=False
        )  # it knows the batch, and nothing before it
        first, last = (
            nn.Linear(dim, HIDDEN, bias=False),
            nn.Linear(HIDDEN, OUT),
        )  # the norm would take off a bias
        self.projector = nn.Sequential(first, norm, nn.ReLU(), last)
        self.groups, self.temperature, self.dcl = data.groups_of(train), temperature, dcl
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, summary, rows):
        """summary (b, D) of this process's views, 2i and 2i+1 of one image; rows, of all processes'
        views, the images.

        -> the loss of all processes' views. Each computes the whole of it, alike, and the gradient
        of its own views:
        what made the summary needs its gradient summed over the processes, the projector does not.
        """
        h = F.normalize(
            self.projector(distributed.with_others(summary.float())), dim=1
        )  # (2B, 128)
        groups = self.groups[rows.flatten()].to(h.device)
        loss, found = agreement_loss(h, groups, self.temperature, self.dcl)
        self.last = loss.detach(), found, h.detach()
        return loss

    def statistics(self):
        """Of the last step: the loss, the share of views that find their other one first,
        directions in use.
        """
        loss, found, h = self.last
        return {
            "agreement": loss.item(),
            "found": found.item(),
            "projection_rank": metrics.effective_rank(h),
        }


def agreement_loss(h, groups, temperature, dcl):
    """h (2B, E) of length 1, views 2i and 2i+1 of one image; groups (2B,) -> DCL or NT-Xent; the
    share found first.
    """
    logits = h @ h.T / temperature
    other = (torch.arange(len(h), device=h.device) ^ 1)[:, None]
    positive = logits.gather(1, other)  # (2B, 1)
    negatives = logits.masked_fill(
        groups[:, None] == groups, -1e4
    )  # no part of a sum; itself is of its group, too
    found = (positive > negatives.amax(1, keepdim=True)).float().mean()
    among = negatives if dcl else torch.cat([positive, negatives], 1)
    return (among.logsumexp(1) - positive[:, 0]).mean(), found
