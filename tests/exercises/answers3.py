"""Evening 3: a solution, another one in other words, and wrong ones with what is to be said of them."""

import math

import torch
import torch.nn.functional as F


def attention(layer, x):
    B, L, D = x.shape
    H = layer.heads
    q, k, v = (y.view(B, L, H, D // H).transpose(1, 2) for y in layer.qkv(x).chunk(3, 2))
    A = (q @ k.transpose(2, 3) / math.sqrt(D // H)).softmax(3)
    return layer.proj((A @ v).transpose(1, 2).reshape(B, L, D))


def positions(dim, side):
    omega = 10000 ** (-torch.arange(dim // 4) / (dim / 4))
    angle = torch.arange(side)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([one.repeat(side, 1), one.repeat_interleave(side, 0)], 1)


def encode(vit, patches, ids):
    pos = vit.pos_embed[0]
    x = vit.patch_embed["proj"](patches) + pos[1 + ids]
    cls = (vit.cls_token[0] + pos[:1]).expand(len(x), 1, -1)
    x = torch.cat([cls, x], 1)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


def decode(decoder, latent, ids_keep, ids_mask):
    """In the order of the picture, as MAE."""
    x = decoder.decoder_embed(latent)
    B, K, W = x[:, 1:].shape
    hidden = decoder.mask_token.expand(B, ids_mask.shape[1], W)
    places = torch.cat([ids_keep, ids_mask], 1)
    x = torch.cat(
        [x[:, :1], torch.cat([x[:, 1:], hidden], 1).gather(1, at(places.argsort(1), W))], 1
    )
    x = x + decoder.decoder_pos_embed
    for block in decoder.decoder_blocks:
        x = block(x)
    x = decoder.decoder_pred(decoder.decoder_norm(x[:, 1:]))
    return x.gather(1, at(ids_mask, x.shape[2]))


def at(ids, width):
    return ids[..., None].expand(-1, -1, width)


def attention_by_heads(layer, x):
    heads = []
    q, k, v = layer.qkv(x).split(x.shape[2], 2)
    for qh, kh, vh in zip(*(y.chunk(layer.heads, 2) for y in (q, k, v)), strict=True):
        scores = torch.einsum("bid,bjd->bij", qh, kh) / qh.shape[2] ** 0.5
        heads.append(torch.einsum("bij,bjd->bid", F.softmax(scores, -1), vh))
    return layer.proj(torch.cat(heads, -1))


def positions_by_loops(dim, side):
    out = torch.zeros(side * side, dim)
    q = dim // 4
    for row in range(side):
        for column in range(side):
            for k in range(q):
                for half, place in enumerate((column, row)):
                    angle = place * 10000 ** (-k / q)
                    out[row * side + column, 2 * q * half + k] = math.sin(angle)
                    out[row * side + column, 2 * q * half + q + k] = math.cos(angle)
    return out


def encode_all_then_drop(vit, patches, ids):
    """As MAE: positions are added in the order of the picture, and patches are picked then."""
    whole = patches.new_zeros(len(ids), vit.side**2, patches.shape[2]).scatter(
        1, at(ids, 192), patches
    )
    x = vit.patch_embed["proj"](whole) + vit.pos_embed[:, 1:]
    x = x.gather(1, at(ids, x.shape[2]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    return vit.norm(torch.nn.Sequential(*vit.blocks)(x))


def decode_appended(decoder, latent, ids_keep, ids_mask):
    """Behind the visible ones, as model.py."""
    pos = decoder.decoder_pos_embed.squeeze(0)
    places = F.pad(torch.cat([ids_keep, ids_mask], 1) + 1, (1, 0))
    hidden = decoder.mask_token.repeat(len(latent), ids_mask.shape[1], 1)
    x = torch.cat([decoder.decoder_embed(latent), hidden], 1) + pos[places]
    x = torch.nn.Sequential(*decoder.decoder_blocks)(x)[:, latent.shape[1] :]
    return decoder.decoder_pred(decoder.decoder_norm(x))


def with_scores(layer, x, dim, scale):
    B, L, D = x.shape
    q, k, v = layer.queries_keys_values(x)
    y = (q @ k.mT * scale).softmax(dim) @ v
    return layer.proj(y.transpose(1, 2).flatten(2))


def joined_without_a_transpose(layer, x):
    y = F.scaled_dot_product_attention(*layer.queries_keys_values(x))
    return layer.proj(y.reshape(x.shape))


OTHER = {
    "attention": attention_by_heads,
    "positions": positions_by_loops,
    "encode": encode_all_then_drop,
    "decode": decode_appended,
}
WRONG = [
    ("attention", lambda layer, x: with_scores(layer, x, -1, 1.0), "not divided by sqrt(d)"),
    ("attention", lambda layer, x: with_scores(layer, x, -2, 32**-0.5), "over the queries"),
    ("attention", joined_without_a_transpose, "without a transpose"),
    ("attention", lambda layer, x: attention(layer, x)[:, 1:], "found float (3, 6, 64)"),
    (
        "positions",
        lambda dim, side: positions(dim, side).roll(dim // 2, 1),
        "row comes before the column",
    ),
    (
        "encode",
        lambda vit, x, ids: encode(vit, x, torch.arange(4).expand(3, -1)),
        "position of its index",
    ),
    ("encode", lambda vit, x, ids: vit.run_blocks(vit.embed(x, ids)), "last norm"),
    (
        "decode",
        lambda net, x, keep, mask: decode(net, x, keep, mask.sort(1).values),
        "in the order of the picture",
    ),
]
