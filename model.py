"""The network: a Vision Transformer encoder and the MAE decoder. common/checkpoints.py saves and loads them.

Shapes used everywhere
    B batch   S image side   p patch side   g = S/p patches a side   N = g*g patches   K kept   M =
              N-K masked
    D encoder width   W decoder width   H heads   P = p*p*3 numbers in a patch, ordered (row,
                      column, colour)

The encoder sees the K kept patches only; the decoder gets them back with mask tokens in the other M
places and predicts the pixels of those (He et al. 2021, "Masked Autoencoders Are Scalable Vision
Learners", arXiv:2111.06377). Parameter names are those of the public MAE checkpoints, so that a
file can be exchanged in both directions.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.io import UserError
from kernels.gather import MEAN, STD, masked_patch_gather

# width, depth, heads of the encoder; image and patch side, width of the decoder that go with it
SIZES = {
    "nano": dict(dim=192, depth=4, heads=3, image_size=64, patch_size=8, decoder_dim=128),
    "tiny": dict(dim=256, depth=8, heads=4, image_size=96, patch_size=8, decoder_dim=128),
    "small": dict(dim=384, depth=12, heads=6, image_size=128, patch_size=16, decoder_dim=256),
    "base": dict(dim=768, depth=12, heads=12, image_size=128, patch_size=16, decoder_dim=256),
}


def attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v for q, k, v (B, H, N, d); exact everywhere. bias: -inf
    hides a key.

    A GPU wins with the fused kernel, which never writes the (N, N) probabilities. A CPU does not at
    the lengths of an MAE: there two plain matrix products were faster (results/LOG.md, "attention
    on a CPU").
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, start=0, bias=None):
        """x (B, N, D) -> (B, N - start, D): what the tokens from `start` on take from all; bias as
        in attention().
        """
        B, N, D = x.shape
        q, k, v = (
            self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )  # 3 x (B, H, N, d)
        return self.proj(
            attention(q[:, :, start:], k, v, bias).transpose(1, 2).reshape(B, N - start, D)
        )

    def probabilities(self, x, queries):
        """Attention probabilities: x (B, 1+N, D) -> (B, H, 1+N, 1+N), or only the first `queries`
        of its rows, fp32.

        A fused attention returns no probabilities, so the rows that are needed are computed again.
        """
        B, N, D = x.shape
        q, k, _ = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q[:, :, :queries] @ k.transpose(-2, -1)).float() * (D // self.heads) ** -0.5
        return scores.softmax(-1)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) -> (B, N - start, D); tokens before `start` are read,
    and not updated.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x, start=0, bias=None):
        x = x[:, start:] + self.attn(self.norm1(x), start, bias)
        return x + self.mlp(self.norm2(x))


def sincos_positions(dim, side):
    """Fixed 2-D sine-cosine positions, (1, 1 + side*side, dim); row 0 is the CLS token's and is
    zero.

    The first half of the numbers encodes the column, the second the row, each as [sin, cos] of
    position * 10000^(-k / (dim/4)), k = 0 .. dim/4 - 1 (Vaswani et al. 2017, in two dimensions as
    in MAE).
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32) / (dim / 4))
    angle = torch.arange(side, dtype=torch.float32)[:, None] * omega  # (side, dim/4)
    one_axis = torch.cat([angle.sin(), angle.cos()], 1)  # (side, dim/2)
    column = one_axis[None, :].expand(side, -1, -1)
    row = one_axis[:, None].expand(-1, side, -1)
    positions = torch.cat([column, row], 2).reshape(1, side * side, dim)
    return torch.cat([torch.zeros(1, 1, dim), positions], 1)


def init_weights(module):
    """Xavier uniform for every matrix, the patch embedding included; biases 0; LayerNorm stays at 1
    and 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def shrink_branches(blocks):
    """Scale what each branch adds to the residual stream by 1/sqrt(2 depth), as GPT-2 does (Radford
    et al. 2019).

    Not in MAE, which warms up for 40 epochs. Runs of minutes gain: results/LOG.md, "the demo
    recipe".
    """
    with torch.no_grad():
        for block in blocks:
            block.attn.proj.weight.mul_((2 * len(blocks)) ** -0.5)
            block.mlp.fc2.weight.mul_((2 * len(blocks)) ** -0.5)


class Pooler(nn.Module):
    """Reads the patch tokens, one learned query a head; what it attends to is a map of what
    matters.

    Gradients stop at the tokens: it learns from what an encoder has found out, and changes nothing
    in it.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query_token = nn.Parameter(torch.randn(heads, dim // heads))
        self.kv = nn.Linear(
            dim, 2 * dim, bias=False
        )  # a key's changes nothing, and rounding would move it
        nn.init.xavier_uniform_(self.kv.weight)

    def keys_and_values(self, tokens):
        """tokens (B, 1+N, D) -> attention (B, H, N) and values (B, H, N, d), fp32."""
        k, v = (
            self.kv(tokens[:, 1:].detach().float())
            .unflatten(2, (2, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        return torch.einsum("bhnd,hd->bhn", k, self.query_token * k.shape[3] ** -0.5).softmax(2), v

    def forward(self, tokens):
        """tokens (B, 1+N, D), the CLS token first and not read -> (B, D)."""
        A, v = self.keys_and_values(tokens)
        return torch.einsum("bhn,bhnd->bhd", A, v).flatten(1)


class ViT(nn.Module):
    """The encoder. It takes patches, not images, so that what is masked never reaches it."""

    def __init__(self, image_size, patch_size, dim, depth, heads):
        super().__init__()
        self.patch_size = patch_size
        self.side = image_size // patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(patch_size * patch_size * 3, dim)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(dim, self.side))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pooler = None  # or a Pooler, which pre-training adds for agreement and attention
        self.apply(init_weights)
        shrink_branches(self.blocks)
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, patches, ids, pos=None):
        """patches (B, K, P) that stand at places ids (B, K) -> tokens (B, 1+K, D); pos: others than
        its own.
        """
        pos = self.pos_embed if pos is None else pos
        x = self.patch_embed["proj"](patches) + pos[0, 1:][ids]
        cls = (self.cls_token + pos[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls.to(x.dtype), x], 1)

    def forward(self, patches, ids, pos=None):
        """patches (B, K, P), ids (B, K) -> normalised tokens (B, 1+K, D), the CLS token first."""
        x = self.embed(patches, ids, pos)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def summary(self, tokens):
        """tokens (B, 1+K, D) -> (B, D), what two views of an image are compared by: the pooler's,
        or the CLS token.
        """
        return tokens[:, 0] if self.pooler is None else self.pooler(tokens)

    def all_patches(self, view):
        """view u8 (B, S, S, 3) -> every patch (B, N, P) and its place (B, N): nothing masked."""
        ids = torch.arange(self.side**2, device=view.device).expand(view.shape[0], -1).contiguous()
        return masked_patch_gather(view, ids, self.patch_size), ids

    def features(self, view):
        """view u8 (B, S, S, 3), nothing masked -> tokens (B, 1+N, D)."""
        return self(*self.all_patches(view))

    def patch_attention(self, view, source="cls"):
        """view u8 (B, S, S, 3) -> attention to each patch, (B, H, N) fp32.

        source "cls": from the CLS token in the last block, as in DINO and AttMask; "received":
        there from all patches, their mean over i of A_ij, which also says something where nothing
        was trained through the CLS token, as in an MAE; "rollout": from the CLS token through all
        blocks, H = 1; "pooler": from the pooler's queries.
        """
        if source == "pooler":
            return self.pooler.keys_and_values(self.features(view))[0]
        if source == "rollout":
            return self.rollout(view)
        x = self.embed(*self.all_patches(view))
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        A = last.attn.probabilities(last.norm1(x), 1 if source == "cls" else x.shape[1])
        return A[:, :, 0, 1:] if source == "cls" else A[:, :, 1:, 1:].mean(2)

    def rollout(self, view):
        """What the CLS token takes from each patch through all blocks, (B, 1, N): the product over blocks of
        (mean over heads of A + I) / 2 (Abnar and Zuidema 2020, arXiv:2005.00928)."""
        x = self.embed(*self.all_patches(view))
        path = torch.eye(x.shape[1], device=x.device)
        for block in self.blocks:
            A = block.attn.probabilities(block.norm1(x), x.shape[1]).mean(1)
            path, x = (A @ path + path) / 2, block(x)
        return path[:, None, 0, 1:]


class Decoder(nn.Module):
    """Predicts the pixels of the masked patches from the encoder's tokens; thrown away after
    pre-training.
    """

    def __init__(self, side, patch_size, dim, decoder_dim, decoder_depth, decoder_heads=None):
        super().__init__()
        heads = decoder_heads or decoder_dim // 32  # MAE: 512 wide, 16 heads
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_positions(decoder_dim, side))
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size * patch_size * 3)
        self.stats_head = nn.Linear(decoder_dim, 2)  # ours: mean and log std, for pictures only
        self.apply(init_weights)
        shrink_branches(self.decoder_blocks)
        nn.init.zeros_(self.stats_head.weight)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent, ids_keep, ids_mask):
        """latent (B, 1+K, D) -> pred (B, M, P) and stats (B, M, 2) of the masked patches, in the
        order of ids_mask.

        The papers' code puts the tokens back into image order first. Attention does not depend on
        the order of its tokens, only on the positions that were added to them: we append the mask
        tokens and save two gathers, and the masked patches are then simply the last M rows. Nobody
        asks for the visible ones, so the last block only reads them: same prediction, same
        gradients, a quarter of its MLP saved. stats, what is left to be said of means and log stds
        by kernels.loss.visible_stats, gives no gradient to the rest of the network.
        """
        pos = self.decoder_pos_embed[0]
        x = self.decoder_embed(latent)
        visible = x + torch.cat([pos[:1].expand(len(x), 1, -1), pos[1:][ids_keep]], 1)
        hidden = self.mask_token + pos[1:][ids_mask]
        x = torch.cat([visible, hidden.to(visible.dtype)], 1)  # (B, 1+N, W)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_norm(self.decoder_blocks[-1](x, latent.shape[1]))  # (B, M, W)
        return self.decoder_pred(x), self.stats_head(x.detach())


class MAE(nn.Module):
    """Encoder and decoder. `config` is what its constructor was called with: it travels in every
    file we write.
    """

    def __init__(
        self,
        image_size,
        patch_size,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads=None,
    ):
        super().__init__()
        self.config = dict(
            image_size=image_size,
            patch_size=patch_size,
            dim=dim,
            depth=depth,
            heads=heads,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
        )
        check_config(**self.config)
        if decoder_heads and decoder_heads != decoder_dim // 32:
            self.config["decoder_heads"] = decoder_heads
        self.encoder = ViT(image_size, patch_size, dim, depth, heads)
        self.decoder = Decoder(
            self.encoder.side, patch_size, dim, decoder_dim, decoder_depth, decoder_heads
        )

    def forward(self, patches, ids_keep, ids_mask):
        """patches (B, K, P), ids_keep (B, K), ids_mask (B, M) -> pred (B, M, P), stats (B, M, 2),
        tokens.
        """
        tokens = self.encoder(patches, ids_keep)
        return *self.decoder(tokens, ids_keep, ids_mask), tokens


class LinearDecoder(nn.Module):
    """What SimMIM has instead of a decoder: a mask token that the encoder sees, and one linear
    layer to pixels.
    """

    def __init__(self, patch_size, dim):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pred = nn.Linear(dim, patch_size * patch_size * 3)
        self.stats_head = nn.Linear(dim, 2)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)


class SimMIM(nn.Module):
    """The baseline whose encoder also sees the masked places, as mask tokens (Xie et al. 2021,
    arXiv:2111.09886).

    Same interface as MAE; the encoder works on all N tokens instead of K, which is what MAE saves.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, **_):
        super().__init__()
        self.config = dict(
            image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads
        )
        check_config(**self.config, decoder_dim=32)
        self.encoder = ViT(image_size, patch_size, dim, depth, heads)
        self.decoder = LinearDecoder(patch_size, dim)

    def forward(self, patches, ids_keep, ids_mask):
        """patches (B, K, P), ids_keep (B, K), ids_mask (B, M) -> pred (B, M, P), stats (B, M, 2),
        None.
        """
        x = self.encoder.embed(patches, ids_keep)
        hidden = self.decoder.mask_token + self.encoder.pos_embed[0, 1:][ids_mask]
        x = torch.cat([x, hidden.to(x.dtype)], 1)  # attention does not mind the order: see Decoder
        for block in self.encoder.blocks:
            x = block(x)
        x = self.encoder.norm(x[:, -ids_mask.shape[1] :])  # (B, M, D)
        return self.decoder.decoder_pred(x), self.decoder.stats_head(x.detach()), None


def check_config(image_size, patch_size, dim, heads, decoder_dim, **_):
    if image_size < 1 or patch_size < 1 or image_size % patch_size:
        fits = [p for p in (4, 6, 8, 12, 14, 16, 32) if image_size % p == 0]
        raise UserError(
            f"--image-size {image_size} is not a multiple of --patch-size {patch_size}; "
            f"patch sizes that divide it: {', '.join(map(str, fits)) or 'none of the usual'}"
        )
    if dim % heads or dim % 4:
        raise UserError(
            f"a width of {dim} can't be shared by {heads} heads; choose a multiple of {math.lcm(heads, 4)}"
        )
    if decoder_dim < 32 or decoder_dim % 32:
        raise UserError(
            f"--decoder-dim {decoder_dim} must be a multiple of 32, the width of one of its heads"
        )


def shape_of(encoder):
    """What a ViT of this shape is built from: ViT(**shape_of(encoder))."""
    p, dim, blocks = encoder.patch_size, encoder.cls_token.shape[2], encoder.blocks
    return dict(
        image_size=encoder.side * p,
        patch_size=p,
        dim=dim,
        depth=len(blocks),
        heads=blocks[0].attn.heads,
    )


# ---- patches back to pixels ----------------------------------------------------------------------


def to_pixels(pred, stats=None):
    """pred (B, M, P) -> u8 (B, M, P); stats (B, M, 2) of evaluate.predict, mean and log std, undo
    norm_pix.
    """
    if stats is not None:
        pred = pred * stats[..., 1:].exp() + stats[..., :1]
    std, mean = (
        torch.tensor(x, device=pred.device).repeat(pred.shape[2] // 3) for x in (STD, MEAN)
    )
    return ((pred * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def put_patches(view, ids, patches):
    """A copy of view u8 (B, S, S, 3) with patches u8 (B, M, P) at places ids (B, M)."""
    B, S = view.shape[:2]
    p = math.isqrt(patches.shape[2] // 3)
    out = view.clone().view(B, S // p, p, S // p, 3 * p)
    pictures, patches = (
        torch.arange(B, device=view.device)[:, None],
        patches.unflatten(2, (p, 3 * p)),
    )
    out[pictures, ids // (S // p), :, ids % (S // p)] = patches
    return out.view(B, S, S, 3)
