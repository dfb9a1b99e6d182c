import math

import pytest
import torch
import torch.nn.functional as F

import common.checkpoints as C
import model as M
from common.io import UserError
from kernels.gather import MEAN, STD, masked_patch_gather


def small_mae(**changes):
    torch.manual_seed(0)
    return M.MAE(
        **{
            "image_size": 32,
            "patch_size": 8,
            "dim": 64,
            "depth": 3,
            "heads": 4,
            "decoder_dim": 32,
            "decoder_depth": 2,
        }
        | changes
    )


def some_view(B=3, S=32):
    return torch.randint(
        0, 256, (B, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def some_ids(B=3, N=16, K=5):
    order = torch.rand(B, N, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, :K].contiguous(), order[:, K:].contiguous()


def test_sincos_positions_follow_the_formula():
    positions, D, side = M.sincos_positions(32, 5)[0], 32, 5
    assert positions[0].abs().sum() == 0
    for row, column, k in [(0, 0, 0), (2, 3, 1), (4, 1, 7)]:
        omega = 10000 ** (-k / (D / 4))
        here = positions[1 + row * side + column]
        expected = [
            math.sin(column * omega),
            math.cos(column * omega),
            math.sin(row * omega),
            math.cos(row * omega),
        ]
        found = here[[k, D // 4 + k, D // 2 + k, 3 * D // 4 + k]]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_attention_is_exact():
    q, k, v = torch.randn(3, 2, 4, 37, 16, dtype=torch.float64)
    torch.testing.assert_close(M.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_masked_pixels_never_reach_the_encoder():
    mae, view, (keep, mask) = small_mae(), some_view(), some_ids()
    other = M.put_patches(view, mask, torch.randint(0, 256, (3, 11, 192), dtype=torch.uint8))
    assert not torch.equal(view, other)
    a, b = (mae.encoder(masked_patch_gather(x, keep, 8), keep) for x in (view, other))
    assert torch.equal(a, b)


def test_decoder_without_unshuffling_is_the_papers():
    """Put every token back into image order, as the paper does, run the same blocks, pick the
    masked ones.
    """
    mae, (keep, mask) = small_mae().double(), some_ids()
    latent, d = torch.randn(3, 6, 64, dtype=torch.float64), mae.decoder
    x = d.decoder_embed(latent)
    full = torch.cat([x[:, 1:], d.mask_token.expand(3, 11, -1)], 1)
    back = torch.cat([keep, mask], 1).argsort(1)
    full = full.gather(1, back[..., None].expand(-1, -1, 32))
    full = torch.cat([x[:, :1], full], 1) + d.decoder_pos_embed
    for block in d.decoder_blocks:
        full = block(full)
    paper = d.decoder_pred(d.decoder_norm(full))[:, 1:].gather(
        1, mask[..., None].expand(-1, -1, 192)
    )
    torch.testing.assert_close(d(latent, keep, mask)[0], paper)


def test_picture_head_gives_no_gradient_to_the_rest():
    mae, (keep, mask) = small_mae(), some_ids()
    mae(torch.randn(3, 5, 192), keep, mask)[1].sum().backward()
    with_grad = [n for n, p in mae.named_parameters() if p.grad is not None]
    assert with_grad == ["decoder.stats_head.weight", "decoder.stats_head.bias"]


def test_patch_attention_is_the_last_blocks_row():
    vit, view = small_mae().encoder.eval(), some_view()
    x = vit.embed(*vit.all_patches(view))
    for block in vit.blocks[:-1]:
        x = block(x)
    q, k, _ = (
        vit.blocks[-1]
        .attn.qkv(vit.blocks[-1].norm1(x))
        .view(3, 17, 3, 4, 16)
        .permute(2, 0, 3, 1, 4)
    )
    whole = (q @ k.transpose(-2, -1) / 4).softmax(-1)  # sqrt(16)
    found = vit.patch_attention(view)
    torch.testing.assert_close(found, whole[:, :, 0, 1:])
    assert found.shape == (3, 4, 16) and (found.sum(-1) < 1).all()


def test_public_names_shapes_and_convolution(tmp_path):
    """The names of the public MAE checkpoints; the exported patch embedding is theirs: a
    convolution over (c, p, q).
    """
    mae, view = small_mae(), some_view()
    public = C.public_weights(mae)
    block = [
        "norm1.weight",
        "norm1.bias",
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "norm2.weight",
        "norm2.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    ]
    names = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
        "decoder_embed.weight",
        "decoder_embed.bias",
        "mask_token",
        "decoder_pos_embed",
        "decoder_norm.weight",
        "decoder_norm.bias",
        "decoder_pred.weight",
        "decoder_pred.bias",
    }
    names |= {f"blocks.{i}.{n}" for i in range(3) for n in block} | {
        f"decoder_blocks.{i}.{n}" for i in range(2) for n in block
    }
    assert set(public) == names
    assert public["pos_embed"].shape == (1, 17, 64) and public["patch_embed.proj.weight"].shape == (
        64,
        3,
        8,
        8,
    )
    image = (view.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(
        STD
    )[:, None, None]
    theirs = F.conv2d(
        image, public["patch_embed.proj.weight"], public["patch_embed.proj.bias"], stride=8
    )
    patches, _ = mae.encoder.all_patches(view)
    ours = mae.encoder.patch_embed["proj"](patches)
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_saved_encoder_gives_the_same_features(tmp_path):
    mae, view = small_mae().eval(), some_view()
    C.save_model(mae, tmp_path / "model.safetensors", {"step": 3})
    encoder, image_size = C.load_encoder(tmp_path)
    assert image_size == 32
    assert torch.equal(encoder.features(view), mae.encoder.features(view))


def test_a_file_that_does_not_fit_is_refused_with_both_sides(tmp_path):
    mae = small_mae()
    C.save_model(mae, tmp_path / "model.safetensors", {})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("not a model")
    for name in ("cut", "text", "absent"):
        with pytest.raises(UserError, match=name):
            C.load_encoder(tmp_path / f"{name}.safetensors")
    weights = dict(mae.encoder.state_dict())
    weights["other"] = weights.pop("norm.bias")
    weights["norm.weight"] = torch.zeros(5)
    with pytest.raises(
        UserError, match="Missing key.*norm.bias.*Unexpected key.*other.*mismatch for norm.weight"
    ):
        C.load_exactly(mae.encoder, weights, "file")


def test_pixels_survive_the_round_trip():
    view, (_, mask) = some_view(), some_ids()
    pixels = M.to_pixels(masked_patch_gather(view, mask, 8))
    assert torch.equal(M.put_patches(view, mask, pixels), view)


@pytest.mark.parametrize("change", [{"patch_size": 7}, {"dim": 66}, {"decoder_dim": 40}])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(UserError):
        small_mae(**change)
