"""The contrastive loss: two crops of an image, masked independently, get similar vectors.

A masked autoencoder has no loss on its CLS token, so the attention of that token depends mostly
on the place of a patch. This second loss trains it (CAN, Mishra et al. 2022, arXiv:2210.16870; MAE-CT,
Lehner et al. 2023, arXiv:2304.10520). Or it trains a pooler that reads the patch tokens and changes
nothing in them (model.Pooler). Of the 2B views of a batch, let i and j be the views of one image:

    h = unit(projector(s))          s (2B, D): the CLS token, or the pooler over visible patches
    L_i = -log( exp(h_i h_j / T) / sum_k exp(h_i h_k / T) )

The projector is dropped afterwards. The sum over k != i is NT-Xent (SimCLR, Chen et al. 2020,
arXiv:2002.05709). DCL leaves k = j out of the sum (Yeh et al. 2021, arXiv:2110.06848).
"""

import torch
import torch.nn.functional as F
from torch import nn

import data

HIDDEN, OUT = 1024, 128  # widths of the projector
# Keys of --contrast; ViT.summary is what is compared. The pooler's gradient ends at the tokens.
SETTINGS = {
    "pooler": {"weight": 1.0, "temperature": 0.15, "dcl": 1.0},  # AdamW: weight 2 is as 1
    "cls": {"weight": 0.01, "temperature": 0.07, "dcl": 0.0},
    "none": {},
}


class Agreement(nn.Module):
    """The projector and the loss; images of one group are not each other's negatives."""

    def __init__(self, dim, train, settings):
        super().__init__()
        first = nn.Linear(dim, HIDDEN, bias=False)  # the norm would remove a bias
        norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)
        last = nn.Linear(HIDDEN, OUT)
        self.projector = nn.Sequential(first, norm, nn.ReLU(), last)
        self.settings = settings
        self.register_buffer("groups", data.groups_of(train), persistent=False)
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, summary, rows):
        """summary (2B, D), views 2i and 2i+1 of one image; rows (2B,) of the images -> the loss."""
        h = F.normalize(self.projector(summary.float()), dim=1)  # (2B, OUT)
        groups = self.groups[data.send(rows, h.device)]
        loss, found = agreement_loss(h, groups, self.settings["temperature"], self.settings["dcl"])
        self.last = {"agreement": loss.detach(), "found": found}
        return loss

    def statistics(self):
        """Of the last step: the loss, and the share of views that find their pair."""
        return {name: x.item() for name, x in self.last.items()}


def agreement_loss(h, groups, temperature, dcl):
    """DCL or NT-Xent, and the share of views that find their pair; h (2B, E) of length 1.

    Views 2i and 2i+1 are of one image; groups (2B,).
    """
    logits = h @ h.T / temperature
    other = (torch.arange(len(h), device=h.device) ^ 1)[:, None]  # 0 <-> 1, 2 <-> 3, ...
    positive = logits.gather(1, other)  # (2B, 1)
    same = groups[:, None] == groups  # a view is of its own group, too
    negatives = logits.masked_fill(same, -1e4)
    found = (positive > negatives.amax(1, keepdim=True)).float().mean()
    among = negatives if dcl else torch.cat([positive, negatives], 1)
    return (among.logsumexp(1) - positive[:, 0]).mean(), found
