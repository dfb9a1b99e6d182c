"""LoRA: it starts as nothing, trains alone, merges exactly, and what is in a file is what `peft` makes of it."""

import math

import pytest
import torch

import model as M
from plumbing import UserError


def small_vit(seed=0, **changes):
    torch.manual_seed(seed)
    return M.ViT(**{"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 2} | changes).eval()


def some_view(B=2, S=32):
    return torch.randint(0, 256, (B, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def adapted(r=4, seed=0, **options):
    """An encoder whose adapter is not nothing."""
    vit = small_vit(seed)
    for weight in M.add_lora(vit, r, **options):
        torch.nn.init.normal_(weight, std=0.05)
    return vit


def test_it_starts_as_nothing_and_trains_alone():
    plain, vit, view = small_vit(), small_vit(), some_view()
    weights = M.add_lora(vit, 4, dropout=0.1)
    assert torch.equal(vit.features(view), plain.features(view))
    vit.train().features(view).square().mean().backward()
    trained = {name for name, w in vit.named_parameters() if w.grad is not None}
    assert len(weights) == len(trained) == 2 * 2 * 4 and all(n.endswith((".A", ".B")) for n in trained)
    assert all(w.grad is not None for w in weights)


def test_initial_factors():
    lora = M.add_lora(small_vit(dim=256, heads=4, depth=1), 16)[0]
    bound = 1 / math.sqrt(256)  # kaiming uniform with a = sqrt 5: sqrt(6 / ((1 + 5) * 256))
    assert 0.95 * bound < lora.abs().max() <= bound and abs(lora.std() / bound - 3**-0.5) < 0.02


def test_the_fused_layer_does_what_three_adapters_would():
    vit = adapted(r=4, alpha=6, targets=("q", "v", "o"))
    lora, x = vit.blocks[0].attn.qkv, torch.randn(3, 5, 64)
    q, k, v = lora.base(x).chunk(3, 2)
    q = q + 6 / 4 * x @ lora.A[0].T @ lora.B[0].T
    v = v + 6 / 4 * x @ lora.A[1].T @ lora.B[1].T
    torch.testing.assert_close(lora(x), torch.cat([q, k, v], 2))
    assert set(M.lora_layers(vit)) == {f"blocks.{i}.attn.{n}" for i in range(2) for n in ("qkv", "proj")}


def test_merge_and_unmerge_are_explicit():
    vit, view = adapted(), some_view()
    before, base = vit.features(view), vit.blocks[0].attn.qkv.base.weight.clone()
    for mode in (True, False):
        assert torch.equal(vit.train(mode).blocks[0].attn.qkv.base.weight, base)
    M.merge_lora(vit)
    torch.testing.assert_close(vit.features(view), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="already merged"):
        M.merge_lora(vit)
    M.unmerge_lora(vit)
    torch.testing.assert_close(vit.blocks[0].attn.qkv.base.weight, base, rtol=0, atol=1e-7)
    torch.testing.assert_close(vit.features(view), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not merged"):
        M.unmerge_lora(vit)
    M.merge_lora(vit)
    M.remove_lora(vit)
    assert vit.state_dict().keys() == small_vit().state_dict().keys()
    torch.testing.assert_close(vit.features(view), before, rtol=0, atol=1e-5)


def share(size, r):
    """LoRA's share of the parameters, all six targets, without making the network's memory."""
    keys = ("image_size", "patch_size", "dim", "depth", "heads")
    with torch.device("meta"):
        vit = M.ViT(**{k: M.SIZES[size][k] for k in keys})
    whole = sum(w.numel() for w in vit.parameters())
    return sum(w.numel() for w in M.add_lora(vit, r)), whole


def test_share_of_the_parameters():
    """1.33 M of ViT-B at rank 8, about 1.5 %; the narrower the network, the larger the share: r/D."""
    assert share("base", 8)[0] == 1_327_104
    trained, whole = share("base", 8)
    assert 0.014 < trained / whole < 0.017
    shares = [share(size, 8)[0] / share(size, 8)[1] for size in ("nano", "tiny", "small", "base")]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("options, says", [
    ({"targets": ("q", "x")}, "'q,x'"), ({"targets": ()}, "targets ''"), ({"r": 0}, "rank 0"), ({"r": 65}, "1 to 64"),
    ({"dropout": 1.0}, "dropout 1.0")])  # fmt: skip
def test_bad_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        M.add_lora(small_vit(), **options)


def test_two_adapters_are_refused():
    with pytest.raises(UserError, match="already"):
        M.add_lora(adapted())
