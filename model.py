"""The networks: a Vision Transformer encoder, and the decoder of MAE.

    B  batch                                  D  width of the encoder
    s  side of a view in pixels               W  width of the decoder
    p  side of a patch in pixels              H  attention heads
    g = s / p      patches on a side          d = D / H      width of a head
    N = g * g      patches of a view          P = p * p * 3  numbers of a patch, in the order
    K  visible, M hidden patches                             (row, column, colour)
    L  tokens: of the CLS token and of patches

The encoder sees the K visible patches. The decoder adds mask tokens at the M hidden places and
predicts their pixels (MAE; He et al. 2021, arXiv:2111.06377). Behind "encoder." and "decoder.",
parameters have the names of the public MAE checkpoints. common/checkpoints.py saves and loads them.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from kernels import MEAN, STD
from kernels.patches import LARGEST, all_places, masked_patch_gather

# The decoders are narrow. MAE's decoder, 512 wide and 8 blocks deep, would cost 4.7 times as much
# as a ViT-S encoder (224 px, ratio 0.75), and it is thrown away after pre-training. A second
# block was not shown to help `nano` (results/TRIED.md); --model nano:decoder_depth=2 has one.
NARROW, WIDE = dict(decoder_dim=128, decoder_depth=1), dict(decoder_dim=256, decoder_depth=2)
SIZES = {
    "nano": dict(dim=192, depth=4, heads=3, image_size=64, patch_size=8, **NARROW),
    "tiny": dict(dim=256, depth=8, heads=4, image_size=96, patch_size=8, **NARROW),
    "small": dict(dim=384, depth=12, heads=6, image_size=128, patch_size=16, **WIDE),
    "base": dict(dim=768, depth=12, heads=12, image_size=128, patch_size=16, **WIDE),
}
EPS = 1e-6  # of each LayerNorm, as in most public ViTs
QUERY = 16  # width of a query of the pooler
MLP_RATIO = 4  # the hidden width of a block's MLP, by the width of the tokens


# ---- the transformer -----------------------------------------------------------------------------


def attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v for q, k, v (B, H, L, d); bias -inf hides a key."""
    # A GPU's fused kernel never writes the (L, L) probabilities to memory. On a CPU it has no such
    # gain: two matrix products trained `tiny` in bf16 at 222 pictures/s, and the fused one at 142.
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, L, L)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        # One matrix makes q, k and v, because public ViTs store them so. LoRA gives each of the
        # three its own factors again (LAYERS in finetune_lora.py).
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x):
        """x (B, L, D) -> q, k, v, each (B, H, L, d)."""
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x, start=0, bias=None):
        """x (B, L, D) -> (B, L - start, D): the tokens from `start` on, which attend to all."""
        q, k, v = self.queries_keys_values(x)
        # Only queries are dropped: as keys and values, the tokens before `start` can still be read.
        y = attention(q[:, :, start:], k, v, bias)  # (B, H, L - start, d)
        return self.proj(y.transpose(1, 2).flatten(2))

    def probabilities(self, x, queries):
        """Attention probabilities of the first `queries` tokens: x (B, L, D) -> (B, H, queries, L).

        In fp32. They are computed again, because a fused attention does not return them.
        """
        q, k, _ = self.queries_keys_values(x)
        # In fp32 even in autocast: `rollout` multiplies these over all blocks, and roundings would add
        # up. (For a mask alone bf16 would do, because the noise of the mask is larger.)
        with torch.autocast(x.device.type, enabled=False):
            scores = q[:, :, :queries].float() @ k.float().transpose(-2, -1)
            return (scores * q.shape[-1] ** -0.5).softmax(-1)


class MLP(nn.Module):
    """Two linear layers with a GELU between them. `init_weights` sets their first weights."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, eps=EPS):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, MLP_RATIO * dim)

    def forward(self, x, start=0, bias=None):
        """x (B, L, D) -> (B, L - start, D): tokens before `start` are read, and not updated."""
        # Pre-norm: the sum over blocks is never normalised, so the last block's gradient also
        # reaches the first unchanged. Post-norm (the first transformer) needs a longer warm-up.
        x = x[:, start:] + self.attn(self.norm1(x), start, bias)
        return x + self.mlp(self.norm2(x))


def sincos_positions(dim, side):
    """Fixed 2-D sine-cosine positions, (1, 1 + side*side, dim); row 0, the CLS token's, is zero.

    The first half of the numbers encodes the column, the second half the row. Each is [sin, cos] of
    position * 10000^(-k / (dim/4)), k = 0 .. dim/4 - 1 (Vaswani et al. 2017, arXiv:1706.03762).
    """
    # Nothing here is learned, as in MAE: a hidden patch has its place from the first step on,
    # however rarely it was visible. Learned positions, such as DINO's, replace these on loading.
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32) / (dim / 4))
    angle = torch.arange(side, dtype=torch.float32)[:, None] * omega  # (side, dim/4)
    one_axis = torch.cat([angle.sin(), angle.cos()], 1)  # (side, dim/2)
    # Column before row, although a picture's shape is said the other way round: MAE's checkpoints
    # were trained with this order.
    column = one_axis[None, :].expand(side, -1, -1)
    row = one_axis[:, None].expand(-1, side, -1)
    positions = torch.cat([column, row], 2).reshape(1, side * side, dim)
    return torch.cat([torch.zeros(1, 1, dim), positions], 1)


def init_weights(module):
    """Xavier uniform for every nn.Linear, however its class began it, and 0 for its bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def shrink_branches(blocks):
    """Scale what a branch adds to the residual stream by 1/sqrt(2 depth) (GPT-2; Radford 2019).

    MAE does not scale them, and warms up for 40 epochs.
    """
    # A residual stream is a sum over 2 depth branches. If each adds the variance 1, the sum has 2
    # depth; with this factor it has 1, whatever the depth. On the demo set, the masked error after
    # 12 epochs was 0.601, and 0.623 without. Branches that begin at zero came close (0.604).
    with torch.no_grad():
        for block in set(blocks):  # one block may stand in several places
            block.attn.proj.weight.mul_((2 * len(blocks)) ** -0.5)
            block.mlp.fc2.weight.mul_((2 * len(blocks)) ** -0.5)


# ---- the encoder ---------------------------------------------------------------------------------


class Pooler(nn.Module):
    """Reads the patch tokens by one learned query per head. Its attention is a map of what matters.

    A plain MAE has no loss of its own for the CLS token (the decoder only reads it), so that token's
    attention tells little but the place of a patch. The pooler has one, the contrastive loss, and its
    gradient stops at the tokens.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query_token = nn.Parameter(torch.randn(heads, dim // heads))
        # A bias of the keys would add the same q b to every score of a head, and softmax removes
        # what all scores have in common. Its gradient would be rounding alone, but AdamW would
        # still move it.
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        nn.init.xavier_uniform_(self.kv.weight)

    def attention_and_values(self, tokens):
        """tokens (B, 1+K, D) -> attention (B, H, K), values (B, H, K, d).

        In autocast they are rounded to bf16, which is less than the noise that a mask adds.
        """
        # Without the detach, the pooler would learn by changing the encoder, and not by reading it.
        # A mere 0.03 of its gradient took a linear classifier from 37.5 to 28.0 % on the demo set:
        # telling one drawing from the next is easy by its light and colours, which say nothing of
        # the character.
        kv = self.kv(tokens[:, 1:].detach().float())  # (B, K, 2 D)
        k, v = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.query_token * k.shape[3] ** -0.5  # (H, d)
        return torch.einsum("bhnd,hd->bhn", k, query).softmax(2), v

    def forward(self, tokens):
        """tokens (B, 1+K, D) -> (B, D). The CLS token comes first, and is not read."""
        A, v = self.attention_and_values(tokens)
        return torch.einsum("bhn,bhnd->bhd", A, v).flatten(1)


def pooler_of(encoder, heads=None):
    """A new pooler that fits an encoder; heads: those of weights that are there."""
    # A query settles on one kind of patch, and chance decides on which. With the three heads of `nano`, the
    # attention to eyes depended on the seed. Narrow queries cost hardly more, and the mean of many is much the
    # same in every run (results/TRIED.md).
    dim = encoder.config["dim"]
    return Pooler(dim, heads or dim // math.gcd(dim, QUERY))


def extremes(tokens):
    """Patch tokens (B, N, D) -> (B, 2D): the largest and smallest value of each feature."""
    return torch.cat([tokens.amax(1), tokens.amin(1)], 1)


POOLS = {  # tokens (B, 1+K, D), the CLS token first -> one vector for each picture
    "mean": lambda tokens: tokens[:, 1:].mean(1),
    "cls": lambda tokens: tokens[:, 0],
    "extremes": lambda tokens: extremes(tokens[:, 1:]),
}


class ViT(nn.Module):
    """The encoder. It takes patches, not images, so that hidden patches never reach it."""

    def __init__(self, image_size, patch_size, dim, depth, heads, norm_eps=EPS):
        # All arguments. They go into every file of weights, from which ViT(**config) builds it again.
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        check_sizes(image_size, patch_size, dim, depth, heads)
        self.config = config
        self.image_size = image_size
        self.patch_size = patch_size
        self.side = image_size // patch_size  # g
        # MAE embeds by a convolution over the whole picture. Here patches arrive cut out, so a
        # linear layer does the same. The dict is there for its public name, patch_embed.proj.
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(patch_size * patch_size * 3, dim)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # A buffer is saved and moved to the GPU with the weights, but no optimizer trains it.
        self.register_buffer("pos_embed", sincos_positions(dim, self.side))
        self.blocks = nn.ModuleList(Block(dim, heads, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.pooler = None  # or a Pooler, which pre-training adds
        self.apply(init_weights)
        # This has to follow init_weights, which would overwrite what it scales.
        shrink_branches(self.blocks)
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def device(self):
        return self.cls_token.device

    def embed(self, patches, ids, pos=None):
        """patches (B, K, P) at places ids (B, K) -> tokens (B, 1+K, D); pos replaces pos_embed."""
        pos = self.pos_embed if pos is None else pos
        # MAE embeds every patch and then drops the hidden ones. Embedding the visible ones alone
        # gives the same tokens. A patch keeps its place by its position, not by its index, so that
        # ids can be in any order.
        x = self.patch_embed["proj"](patches) + pos[0, 1:][ids]  # (B, K, D)
        cls = (self.cls_token + pos[:, :1]).expand(x.shape[0], -1, -1)  # (B, 1, D)
        return torch.cat([cls.to(x.dtype), x], 1)

    def forward(self, patches, ids, pos=None):
        """patches (B, K, P), ids (B, K) -> normalised tokens (B, 1+K, D), the CLS token first."""
        return self.norm(self.run_blocks(self.embed(patches, ids, pos)))

    def run_blocks(self, x, begin=0, end=None, bias=None, every=False):
        """x (B, L, D) through blocks[begin:end] -> (B, L, D); every: a list, x after each block."""
        # Only here do tokens go through an encoder's blocks. What is added, such as register tokens, is
        # then in pre-training and in every head. (The two maps below compute attention by themselves.)
        outputs = []
        for block in self.blocks[begin:end]:
            x = block(x, bias=bias)
            # Only on request, because an output that nobody keeps is freed after the next block.
            if every:
                outputs.append(x)
        return outputs if every else x

    def all_patches(self, view):
        """view u8 (B, s, s, 3), s = image_size -> all patches (B, N, P) and their places (B, N)."""
        s = self.image_size
        # Without this check, the upper left of a larger view would be read, and the rest ignored:
        # `ids` are the places of this encoder's grid, and all of them exist in a larger grid, too.
        if view.dim() != 4 or view.shape[3] != 3:
            shape = tuple(view.shape)
            raise ValueError(
                f"views are u8 (B, {s}, {s}, 3), not {shape}; of one picture: view[None]"
            )
        if view.shape[1:3] != (s, s):
            size = " x ".join(str(side) for side in view.shape[1:3])
            raise ValueError(
                f"views of {size} px, but the encoder reads {s}: resize them to {s} px"
            )
        ids = all_places(view, self.patch_size)
        return masked_patch_gather(view, ids, self.patch_size), ids

    def features(self, view):
        """view u8 (B, s, s, 3), nothing hidden -> tokens (B, 1+N, D)."""
        return self(*self.all_patches(view))

    def patch_attention(self, view, kind="cls"):
        """view u8 (B, s, s, 3) -> attention to each patch, (B, H, N).

        kind  "cls": of the CLS token in the last block, as in DINO and AttMask; "rollout": of the
              CLS token through all blocks, H = 1; "pooler": of the pooler's queries
        """
        if kind == "pooler":
            if self.pooler is None:
                raise ValueError(
                    "this encoder has no pooler: load_mae or load_teacher of common/checkpoints.py "
                    "read the one of a run; without one, take the kind cls or rollout"
                )
            return self.pooler.attention_and_values(self.features(view))[0]
        if kind == "rollout":
            return self.rollout(view)
        if kind != "cls":
            raise ValueError(f"patch_attention has no branch for {kind!r}: write one")
        # Of the last block only one row of softmax(q k^T) is wanted, so it does not run. Index 0
        # among the keys is the CLS token itself; it is dropped, so a map sums to less than 1.
        x = self.run_blocks(self.embed(*self.all_patches(view)), end=-1)  # (B, 1+N, D)
        last = self.blocks[-1]
        return last.attn.probabilities(last.norm1(x), 1)[:, :, 0, 1:]

    def rollout(self, view):
        """Attention of the CLS token through all blocks: view u8 (B, s, s, 3) -> (B, 1, N).

        The product over blocks of (A + I) / 2, A the mean over heads (arXiv:2005.00928).
        """
        x = self.embed(*self.all_patches(view))  # (B, 1+N, D)
        # The last block alone tells what is read from tokens that are mixtures by then. The product
        # over all blocks follows the mixing back to the patches.
        path = torch.eye(x.shape[1], device=x.device)
        inputs = [x, *self.run_blocks(x, end=-1, every=True)]  # of each block
        for block, x in zip(self.blocks, inputs, strict=True):
            A = block.attn.probabilities(block.norm1(x), x.shape[1]).mean(1)  # (B, 1+N, 1+N)
            # The identity in (A + I) / 2 is the residual connection, by which a token stays itself.
            with torch.autocast(x.device.type, enabled=False):  # in fp32, as A is
                path = (A @ path + path) / 2
        return path[:, None, 0, 1:]


def check_sizes(image_size, patch_size, dim, depth, heads):
    """A ValueError where patches do not divide the view, or heads do not divide the width."""
    if min(image_size, patch_size, dim, depth, heads) < 1:
        raise ValueError("image_size, patch_size, dim, depth and heads must be at least 1")
    if patch_size > LARGEST or image_size % patch_size:
        advice = f"choose one up to {LARGEST} that divides it, such as 8 or 16"
        raise ValueError(f"patch size {patch_size} does not fit image size {image_size}; {advice}")
    # Positions have a sine and a cosine for each of two axes: hence the 4.
    if dim % heads or dim % 4:
        raise ValueError(f"width {dim}, {heads} heads; choose a multiple of {math.lcm(heads, 4)}")


# ---- MAE -----------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Predicts hidden pixels. Its parts have the names of MAE's, decoder_... and mask_token."""

    def __init__(self, encoder, decoder_dim, decoder_depth, heads):
        super().__init__()
        side, patch_size = encoder.side, encoder.patch_size
        dim = encoder.config["dim"]
        if heads < 1 or decoder_dim % heads or decoder_dim % 32 or decoder_depth < 1:
            advice = "choose a width that 32 divides, and a depth of at least 1"
            sizes = f"width {decoder_dim}, depth {decoder_depth}, {heads} heads"
            raise ValueError(f"a decoder of {sizes}; {advice}")
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_positions(decoder_dim, side))
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=EPS)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size * patch_size * 3)
        # norm_pix removes each patch's mean and standard deviation from what is predicted, but a
        # picture needs them. The true ones would leak the answer, so visible neighbours suggest two numbers
        # for each patch (kernels.patches.predicted_stats), and this head learns to correct them.
        self.stats_head = nn.Linear(decoder_dim, 2)
        self.apply(init_weights)
        shrink_branches(self.decoder_blocks)
        nn.init.zeros_(self.stats_head.weight)  # before it has learned, it corrects nothing
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent, ids_keep, ids_mask):
        """latent (B, 1+K, D) -> pred (B, M, P) and stats (B, M, 2), in the order of ids_mask.

        M tokens come out, and not N: what is visible is not predicted.
        """
        pos = self.decoder_pos_embed[0]  # (1+N, W)
        x = self.decoder_embed(latent)  # (B, 1+K, W)
        cls_pos = pos[:1].expand(len(x), 1, -1)
        visible = x + torch.cat([cls_pos, pos[1:][ids_keep]], 1)
        # One vector stands for every hidden patch. Its position alone says which one is meant.
        hidden = self.mask_token + pos[1:][ids_mask]  # (B, M, W)
        # The code of MAE puts mask tokens back into image order. Attention knows no order but the
        # positions that tokens carry, so appending them gives the same prediction without a gather.
        x = torch.cat([visible, hidden.to(visible.dtype)], 1)  # (B, 1+K+M, W)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        # Nobody reads what the last block would make of the visible tokens, so it updates the mask
        # tokens alone. That is exact, and at ratio 0.75 saves a quarter of this block's MLP.
        x = self.decoder_blocks[-1](x, start=latent.shape[1])  # (B, M, W)
        x = self.decoder_norm(x)
        # Pictures must not change what the network learns, so the gradient of this head stops here.
        return self.decoder_pred(x), self.stats_head(x.detach())


class MAE(nn.Module):
    """Encoder and decoder. vit: the arguments of ViT. `config` holds all; it is saved with the weights."""

    def __init__(self, decoder_dim, decoder_depth, decoder_heads=None, **vit):
        super().__init__()
        decoder_heads = decoder_heads or decoder_dim // 32  # heads of width 32, as in MAE
        self.encoder = ViT(**vit)
        self.decoder = Decoder(self.encoder, decoder_dim, decoder_depth, decoder_heads)
        self.config = self.encoder.config | {
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads,
        }

    def forward(self, patches, ids_keep, ids_mask):
        """patches (B, K, P) -> pred (B, M, P), stats (B, M, 2), tokens (B, 1+K, D).

        ids_keep (B, K) and ids_mask (B, M) are the places of the visible and the hidden patches.
        """
        # The asymmetry is what makes MAE cheap: most of the weights see a quarter of the patches.
        tokens = self.encoder(patches, ids_keep)
        pred, stats = self.decoder(tokens, ids_keep, ids_mask)
        return pred, stats, tokens


# ---- patches back to pixels ----------------------------------------------------------------------


def to_pixels(pred, stats=None):
    """pred (B, M, P) -> u8 (B, M, P); stats (B, M, 2), mean and log std, undo norm_pix.

    It passes no gradient, as bytes have none.
    """
    if stats is not None:
        # The head predicts the logarithm of a standard deviation, so that none comes out negative.
        pred = pred * stats[..., 1:].exp() + stats[..., :1]
    repeats = pred.shape[2] // 3
    std = torch.tensor(STD, device=pred.device).repeat(repeats)  # (P,)
    mean = torch.tensor(MEAN, device=pred.device).repeat(repeats)
    return ((pred * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def put_patches(view, ids, patches):
    """A copy of view u8 (B, s, s, 3) with patches u8 (B, M, P) at places ids (B, M)."""
    B, s = view.shape[:2]
    p = math.isqrt(patches.shape[2] // 3)
    g = s // p
    out = view.clone()
    # This is a view of the copy: what is written into `grid` stands in `out`.
    grid = out.view(B, g, p, g, 3 * p).transpose(2, 3)  # (image, row, column, pixel row, pixels)
    image = torch.arange(B, device=view.device)[:, None]
    grid[image, ids // g, ids % g] = patches.unflatten(2, (p, 3 * p))
    return out
