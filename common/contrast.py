"""The contrastive loss: two views of a picture get vectors that are more alike than those of others.

A masked autoencoder has no loss of its own for the CLS token (its decoder only reads it). So the
attention of that token depends mostly on the place of a patch, and a mask that follows it would
hide the border. This second loss trains an attention that means something:

    pooler   a small network reads the patch tokens (model.Pooler). No gradient passes from it to
             the encoder, which stays a plain MAE's, to the bit
    cls      the CLS token itself, and with it the encoder. CAN (Mishra et al. 2022,
             arXiv:2210.16870) trains both losses at once, MAE-CT (Lehner et al. 2023,
             arXiv:2304.10520) one after the other

The first view of a picture is the one that the MAE reconstructs. A share of the pictures gets a
second one, on another background and in other colours, of which only the visible patches are read.
Let i and j be the two views of a picture, and k any view of the batch:

    h = unit(projector(s))          s (D): what pooler or CLS token says of the visible patches
    L_i = -log( exp(h_i h_j / T) / sum_k exp(h_i h_k / T) )

The sum over k != i is NT-Xent (normalised temperature-scaled cross-entropy; SimCLR, Chen et al. 2020,
arXiv:2002.05709). DCL (decoupled contrastive learning, Yeh et al. 2021, arXiv:2110.06848) leaves k = j
out of the sum, too: otherwise a pair that is alike already makes the gradient of all its negatives
small. The projector is dropped after training.

    b pictures of a step   m of them have a second view   D width of the encoder   E of a vector
"""

import torch
import torch.nn.functional as F
from torch import nn

import data
import mask as masking

HIDDEN, OUT = 1024, 128  # widths of the projector
JITTER = 0.3  # by so much brightness, contrast and saturation of a second view change at most
# Keys of --contrast. share: of the pictures that get a second view; every: in how many steps one
# has the loss. The pooler has less to learn than the encoder, so that every second step is enough.
# Another weight of pooler would change nothing: AdamW divides by the size of the gradient, and no other
# loss trains it. That of cls counts, because the encoder has the MAE's loss, too.
SETTINGS = {
    "pooler": {"weight": 1.0, "temperature": 0.15, "dcl": 1, "share": 0.5, "every": 2},
    "cls": {"weight": 0.01, "temperature": 0.07, "dcl": 0, "share": 1.0, "every": 1},
    "none": {},
}


class Contrast(nn.Module):
    """The second views, the pooler, the projector and the loss.

    figures: foreground masks u8 (n, S, S) of all training pictures, or None. Pictures of one
    group are not each other's negatives.
    """

    def __init__(self, encoder, settings, train_set, figures, min_crop):
        super().__init__()
        dim = encoder.config["dim"]
        first = nn.Linear(dim, HIDDEN, bias=False)  # the norm would remove a bias
        norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)
        last = nn.Linear(HIDDEN, OUT)
        self.projector = nn.Sequential(first, norm, nn.ReLU(), last)
        self.register_buffer("groups", data.groups_of(train_set), persistent=False)
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)
        self.image_size, self.patches = encoder.image_size, encoder.side**2
        self.settings, self.min_crop = settings, min_crop
        self._figures = figures  # data, so its name begins with _ (check_registered)
        self.pooler = encoder.pooler  # None: the CLS token is compared, and the encoder learns
        self.trains_encoder = encoder.pooler is None

    def draw(self, images, index, generator):
        """What the second views of the first m images u8 (b, S, S, 3) are made of, on their device.

        -> images, figures u8 (m, S, S) or None, boxes (m, 4), flips (m,), colours (m, 3) and noise
        (m, N), for `second_views`; and groups (b,) of all images, for `forward`.
        """
        # Two at least, for the background of another picture.
        m = min(len(images), max(2, round(self.settings["share"] * len(images))))
        device = images.device
        figures = None if self._figures is None else data.take(self._figures, index[:m], device)
        boxes, flip = data.draw_boxes(m, generator, self.min_crop)
        colours = torch.rand(m, 3, generator=generator)
        noise = masking.gumbel_noise(m, self.patches, generator)
        numbers = [data.send(x, device) for x in (boxes, flip, colours, noise)]
        return images[:m], figures, *numbers, self.groups[data.send(index, device)]

    def second_views(self, images, figures, boxes, flip, colours, noise, K):
        """What `draw` drew -> views u8 (m, s, s, 3), and their visible places (m, K).

        In other colours and, where the figures are known, on the background of another picture: what
        tells a picture from the others has to be found on the figure, and not behind it.
        """
        view = data.view_images(images, boxes, flip, self.image_size)
        if figures is not None:
            fg = data.view_maps(figures, boxes, flip, self.image_size)[..., None] / 255
            view = data.swap_backgrounds(view, fg)  # fg (m, s, s, 1)
        view = data.jitter_colour(view, colours, JITTER)
        # A random mask, whatever --mask is. If the masks of both views followed one map, like places would
        # be visible in both, and which ones they are would tell the pair.
        ids_keep, _ = masking.sample(noise, K)
        return view, ids_keep

    def summary(self, tokens):
        """tokens (B, 1+K, D) -> (B, D)."""
        return tokens[:, 0] if self.pooler is None else self.pooler(tokens)

    def forward(self, tokens, second, groups):
        """tokens (b, 1+K, D) of the MAE's views, second (m, 1+K, D), groups (b,) of the images.

        -> the weighted loss, and two numbers for the log: the loss, and the share of views that find
        their pair.
        """
        m = len(second)
        # Second views first: then rows i and m + i are the two views of a picture.
        summaries = torch.cat([self.summary(second), self.summary(tokens)])  # (m + b, D)
        h = F.normalize(self.projector(summaries.float()), dim=1)  # (m + b, E)
        groups = torch.cat([groups[:m], groups])
        settings = self.settings
        T, dcl = settings["temperature"], settings["dcl"]
        loss, pairs_found = contrastive_loss(h, groups, m, T, dcl)
        return settings["weight"] * loss, torch.stack([loss.detach(), pairs_found])

    def statistics(self, numbers):
        """The second result of `forward`, or None -> numbers for the log."""
        names = "contrastive_loss", "pairs_found"
        return {} if numbers is None else dict(zip(names, numbers.tolist(), strict=True))


def contrastive_loss(h, groups, m, temperature, dcl):
    """DCL or NT-Xent, and the share of views that find their pair; h (n, E) of length 1.

    Views i and m + i are of one picture, for i < m. Views from 2m on have no pair in the batch, and
    serve as negatives. groups (n,).
    """
    logits = h[: 2 * m] @ h.T / temperature  # (2m, n)
    pair = torch.arange(2 * m, device=h.device).roll(m)[:, None]  # 0 <-> m, 1 <-> m + 1, ...
    positive = logits.gather(1, pair)  # (2m, 1)
    same = groups[: 2 * m, None] == groups  # a view is of its own group, too
    negatives = logits.masked_fill(same, -1e4)
    pairs_found = (positive > negatives.amax(1, keepdim=True)).float().mean()
    among = negatives if dcl else torch.cat([positive, negatives], 1)
    loss = among.logsumexp(1) - positive[:, 0]
    # A view whose batch is all of its own group has nothing to be told from.
    return loss.where(~same.all(1), 0).mean(), pairs_found
