"""Networks that only some runs need: SimMIM, and the network that predicts which patches are hard.

--model nano:simmim=1 and --mask learned name them; who trains an MAE never opens this file.

    B views   N patches of a view   K visible   M hidden   P numbers of a patch   D width of the encoder
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Block, ViT, init_weights, sincos_positions

# ---- SimMIM --------------------------------------------------------------------------------------


class LinearDecoder(nn.Module):
    """The decoder of SimMIM: a mask token that the encoder sees, and one linear layer to pixels."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pred = nn.Linear(dim, patch_size * patch_size * 3)
        self.stats_head = nn.Linear(dim, 2)
        self.apply(init_weights)
        nn.init.zeros_(self.stats_head.weight)  # before it has learned, it corrects nothing
        nn.init.normal_(self.mask_token, std=0.02)


class SimMIM(nn.Module):
    """The baseline whose encoder also sees hidden places (Xie et al. 2021, arXiv:2111.09886).

    Its interface is that of MAE, but the decoder's sizes are ignored, as it is one layer. The encoder
    works on all N tokens, and learns from mask tokens, which it never meets again when it is used.
    """

    def __init__(self, **sizes):
        super().__init__()
        self.encoder = ViT(**{k: v for k, v in sizes.items() if not k.startswith("decoder_")})
        self.config = self.encoder.config
        self.decoder = LinearDecoder(self.encoder.patch_size, self.config["dim"])

    def forward(self, patches, ids_keep, ids_mask):
        """patches (B, K, P), ids_keep (B, K), ids_mask (B, M) -> pred (B, M, P), stats, None."""
        x = self.encoder.embed(patches, ids_keep)  # (B, 1+K, D)
        hidden = self.decoder.mask_token + self.encoder.pos_embed[0, 1:][ids_mask]  # (B, M, D)
        x = self.encoder.run_blocks(torch.cat([x, hidden.to(x.dtype)], 1))  # (B, 1+K+M, D)
        # One linear layer is no decoder, so the last blocks of this encoder work on reconstruction.
        # For its linear probe, the paper reads a middle block.
        x = self.encoder.norm(x[:, -ids_mask.shape[1] :])  # (B, M, D)
        return self.decoder.decoder_pred(x), self.decoder.stats_head(x.detach()), None


# ---- the network that predicts losses ------------------------------------------------------------


class LossPredictor(nn.Module):
    """Predicts which patches are hard to reconstruct, after HPM (Wang et al. 2023, arXiv:2304.05919).

    HPM's is a second decoder of the MAE's encoder. This is a network of its own, which sees all patches.
    """

    def __init__(self, side, patch_size, dim=64):
        super().__init__()
        self.embed = nn.Linear(patch_size * patch_size * 3, dim)
        self.register_buffer("positions", sincos_positions(dim, side)[:, 1:])
        self.block = Block(dim, dim // 32)
        self.score = nn.Linear(dim, 1)
        self.apply(init_weights)

    def forward(self, patches):
        """patches (B, N, p*p*3) of a view -> score (B, N), higher for a greater expected loss."""
        return self.score(self.block(self.embed(patches) + self.positions)).squeeze(-1)

    @staticmethod
    def loss(score, error):
        """Log loss of ranking every two hidden patches by their errors, as HPM; score, error (B, M)."""
        # only the order counts, because errors shrink while the model learns
        harder = (error[:, :, None] > error[:, None]).to(score.dtype)  # (B, M, M)
        return F.binary_cross_entropy_with_logits(score[:, :, None] - score[:, None], harder)
