"""Evening 3: the forward pass of a masked autoencoder.

Its encoder is a Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) that sees the visible patches
alone, and that makes it cheap. Its decoder is small. It gets the tokens of the encoder, puts one and the same
learned vector, the mask token, in the place of each hidden patch, and predicts the pixels there (He et al. 2021,
arXiv:2111.06377, section 3). Attention does not know the order of tokens, so each token carries its place, as a
position that is added to it. You write the computation, and the weights are given: a function gets a module of
model.py and uses its layers, but does not call its forward. The result has to be that of model.py.

    B pictures   N = g * g patches   K visible   M hidden   L tokens, of the CLS token and of patches
    P numbers of a patch   D width of the encoder   W width of the decoder   H heads   d = D / H
"""

import torch


def attention(layer, x):
    """Self-attention with H = layer.heads heads: x (B, L, D) -> (B, L, D).

    layer.qkv is a Linear D -> 3 D. Of its output, the first D numbers are q, then come k and v, and each holds one
    head after the other. Each head computes softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, arXiv:1706.03762,
    eq. 1), where the softmax runs over the keys. The heads side by side, (B, L, D), go through layer.proj.
    """
    raise NotImplementedError


def positions(dim, side):
    """The position of each patch of a grid, row by row: fp32 (side * side, dim).

    The first half of the numbers tells the column of the patch, the second half its row. Each half holds all sines
    and then all cosines of place * 10000 ** (-k / (dim / 4)), for k = 0 .. dim / 4 - 1, where place begins at 0.
    """
    raise NotImplementedError


def encode(vit, patches, ids):
    """patches (B, K, P) at places ids (B, K) -> tokens (B, 1 + K, D), the CLS token first.

    vit.patch_embed["proj"] makes a token of a patch. vit.pos_embed (1, 1 + N, D) holds all positions, first that of
    vit.cls_token (1, 1, D). The tokens go through each of vit.blocks, which you may call, and through vit.norm.
    """
    raise NotImplementedError


def decode(decoder, latent, ids_keep, ids_mask):
    """latent (B, 1 + K, D), what the encoder returned -> predicted patches (B, M, P), in the order of ids_mask.

    decoder.decoder_embed makes the tokens W wide. With decoder.mask_token (1, 1, W) for each hidden patch they are
    1 + N, and decoder.decoder_pos_embed (1, 1 + N, W) is added. They go through decoder.decoder_blocks, which you
    may call, and decoder.decoder_norm; decoder.decoder_pred makes pixels of the hidden ones.
    """
    raise NotImplementedError


# Answer in words:
# 1. model.py puts the mask tokens behind the visible ones, and the code of MAE puts all tokens in the order of the
#    picture. Why is the prediction the same?
# 2. How many numbers has q k^T of a head if 16 of 64 patches are visible, and how many if all are?
