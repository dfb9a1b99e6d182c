"""model.py and common/guidance.py: the formulas of the papers written once more, and what must not leak."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken, some_view

import model as M
from common.classifier import Classifier
from common.guidance import SETTINGS, Contrast, contrastive_loss
from common.train import seeded
from common.variants import SimMIM
from kernels.patches import masked_patch_gather

TINY = dict(image_size=32, patch_size=8, dim=64, depth=3, heads=4, decoder_dim=32, decoder_depth=2)


def small_mae(kind=M.MAE, **changes):
    torch.manual_seed(0)
    return shaken(kind(**TINY | changes))


def some_ids(B=3, N=16, K=5):
    order = torch.rand(B, N, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, :K].contiguous(), order[:, K:].contiguous()


def at(x, ids):
    """Rows ids (B, M) of x (B, N, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def test_sincos_positions_follow_the_formula():
    side, D = 5, 32
    positions = M.sincos_positions(D, side)[0]
    assert positions.shape == (26, 32) and not positions[0].any()
    for row, column, k in [(0, 0, 0), (2, 3, 1), (4, 1, 7)]:
        omega = 10000 ** (-k / (D / 4))
        found = positions[1 + row * side + column, [k, D // 4 + k, D // 2 + k, 3 * D // 4 + k]]
        x, y = column * omega, row * omega
        expected = [math.sin(x), math.cos(x), math.sin(y), math.cos(y)]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_attention_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 37, 16, dtype=torch.float64)
    bias = torch.zeros(37, dtype=torch.float64)
    bias[5:] = float("-inf")  # only five keys are seen
    torch.testing.assert_close(M.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    few = F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5])
    torch.testing.assert_close(M.attention(q, k, v, bias), few)


@pytest.mark.parametrize("kind", [M.MAE, SimMIM])
def test_masked_pixels_never_reach_the_network(kind):
    net, view = small_mae(kind), some_view()
    keep, mask = some_ids()
    other = M.put_patches(view, mask, torch.randint(0, 256, (3, 11, 192), dtype=torch.uint8))
    assert not torch.equal(view, other)
    first, second = (net(masked_patch_gather(x, keep, 8), keep, mask) for x in (view, other))
    assert torch.equal(first[0], second[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [M.MAE, SimMIM])
def test_the_network_is_one_graph_for_the_compiler(kind):
    """What CUDA replays: no break, and the same results and gradients (here without its code)."""
    ids = some_ids()
    x = torch.randn(3, 5, 192)
    found = []
    for compiled in (False, True):
        net = small_mae(kind)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        outputs = [o for o in run(x, *ids) if o is not None]
        sum(o.square().sum() for o in outputs).backward()
        found.append([*outputs, *(w.grad for w in net.parameters() if w.grad is not None)])
    torch.testing.assert_close(*found)


def test_the_statistics_head_and_the_pooler_give_no_gradient_to_the_rest():
    mae, (keep, mask) = small_mae(), some_ids()
    mae.encoder.pooler = M.Pooler(64, 4)
    _, stats, tokens, *_ = mae(torch.randn(3, 5, 192), keep, mask)
    (stats.sum() + mae.encoder.pooler(tokens).square().sum()).backward()
    reached = {name.rsplit(".", 1)[0] for name, p in mae.named_parameters() if p.grad is not None}
    assert reached == {"decoder.stats_head", "encoder.pooler", "encoder.pooler.kv"}


def test_the_decoder_without_unshuffling_is_the_papers():
    """Every token back in image order, the same blocks, then the masked ones are picked."""
    mae, (keep, mask) = small_mae().double(), some_ids()
    latent, d = torch.randn(3, 6, 64, dtype=torch.float64), mae.decoder
    x = d.decoder_embed(latent)
    full = torch.cat([x[:, 1:], d.mask_token.expand(3, 11, -1)], 1)
    full = at(full, torch.cat([keep, mask], 1).argsort(1))
    full = torch.cat([x[:, :1], full], 1) + d.decoder_pos_embed
    for block in d.decoder_blocks:
        full = block(full)
    paper = at(d.decoder_pred(d.decoder_norm(full))[:, 1:], mask)
    torch.testing.assert_close(d(latent, keep, mask)[0], paper)


def test_simmim_puts_its_mask_token_where_a_patch_was():
    """A network that embeds all patches, of which the hidden ones are replaced: SimMIM's own way."""
    net, view = small_mae(SimMIM), some_view()
    keep, mask = some_ids()
    vit = net.encoder
    patches, every = vit.all_patches(view)
    x = vit.patch_embed["proj"](patches)
    hidden = torch.zeros(3, 16, 1).scatter(1, mask[..., None], 1.0)
    x = x * (1 - hidden) + net.decoder.mask_token * hidden + vit.pos_embed[:, 1:]
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(3, -1, -1), x], 1)
    for block in vit.blocks:
        x = block(x)
    expected = at(net.decoder.decoder_pred(vit.norm(x))[:, 1:], mask)
    found, _, tokens, *_ = net(masked_patch_gather(view, keep, 8), keep, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert tokens is None


def test_attention_maps_are_the_formulas():
    """cls: the CLS row of the last block. rollout: the product over blocks of (A + I) / 2."""
    vit, view = small_mae().encoder, some_view()
    x, path = vit.embed(*vit.all_patches(view)), torch.eye(17)
    for block in vit.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(3, 17, 3, 4, 16)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        A = (q @ k.transpose(-2, -1) / 4).softmax(-1)  # sqrt(16)
        path = (A.mean(1) + torch.eye(17)) / 2 @ path
        x = block(x)
    torch.testing.assert_close(vit.patch_attention(view), A[:, :, 0, 1:])
    torch.testing.assert_close(vit.patch_attention(view, "rollout")[:, 0], path[:, 0, 1:])


def test_blocks_run_in_pieces_or_one_by_one_as_at_once():
    vit = small_mae().encoder
    x = vit.embed(*vit.all_patches(some_view()))
    every = vit.run_blocks(x, every=True)
    for i, block in enumerate(vit.blocks):
        assert torch.equal(every[i], block([x, *every][i]))
    assert torch.equal(vit.run_blocks(x), every[2])
    assert torch.equal(vit.run_blocks(vit.run_blocks(x, end=1), begin=1), every[2])
    assert torch.equal(vit.run_blocks(x, end=-1), every[1])
    hidden = torch.zeros(17)
    hidden[5:] = -math.inf  # keys that no block may attend to
    torch.testing.assert_close(vit.run_blocks(x, bias=hidden)[:, :5], vit.run_blocks(x[:, :5]))


READERS = {  # everything that runs the blocks of an encoder
    "features": lambda net, view, ids: net.encoder.features(view),
    "cls": lambda net, view, ids: net.encoder.patch_attention(view),
    "rollout": lambda net, view, ids: net.encoder.patch_attention(view, "rollout"),
    "pooler": lambda net, view, ids: net.encoder.patch_attention(view, "pooler"),
    "mae": lambda net, view, ids: net(masked_patch_gather(view, ids[0], 8), *ids)[0],
    "ifa": lambda net, view, ids: Classifier(net.encoder, 2, "ifa").pooled(
        *net.encoder.all_patches(view)
    ),
}


@pytest.mark.parametrize("kind", [M.MAE, SimMIM])
@pytest.mark.parametrize("name", READERS)
def test_what_is_added_to_run_blocks_reaches_every_reader(kind, name, monkeypatch):
    """Such as a LayerScale or register tokens: a loop of one's own would miss them without a word."""
    net, view, ids = small_mae(kind), some_view(), some_ids()
    net.encoder.pooler = M.Pooler(64, 4)
    before = READERS[name](net, view, ids)
    run_blocks = M.ViT.run_blocks

    def changed(self, x, *args, **options):
        x = run_blocks(self, x, *args, **options)
        return [y + y.roll(1, 1) for y in x] if isinstance(x, list) else x + x.roll(1, 1)

    monkeypatch.setattr(M.ViT, "run_blocks", changed)
    assert not torch.allclose(READERS[name](net, view, ids), before)


@pytest.mark.parametrize("S", [24, 48])
def test_views_of_another_size_are_refused(S):
    """A smaller grid of places fits into a larger one, so the upper left alone would be read."""
    encoder = small_mae().encoder
    for read in (encoder.all_patches, encoder.features, encoder.patch_attention):
        with pytest.raises(ValueError, match=f"{S} x {S} px.*32"):
            read(some_view(S=S))


def test_an_encoder_without_a_pooler_says_how_to_get_one():
    encoder = M.ViT(image_size=32, patch_size=8, dim=32, depth=1, heads=2)
    with pytest.raises(ValueError, match="load_mae"):
        encoder.patch_attention(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), "pooler")


def test_the_pooler_is_attention_with_one_query_a_head():
    torch.manual_seed(0)
    pooler, tokens = M.Pooler(64, 4), torch.randn(3, 17, 64)
    k, v = pooler.kv(tokens[:, 1:]).chunk(2, 2)
    k, v = (x.view(3, 16, 4, 16).transpose(1, 2) for x in (k, v))
    query = pooler.query_token[:, None].expand(3, 4, 1, 16)
    expected = F.scaled_dot_product_attention(query, k, v).flatten(1)
    torch.testing.assert_close(pooler(tokens), expected)
    assert torch.equal(pooler(torch.cat([torch.randn(3, 1, 64), tokens[:, 1:]], 1)), pooler(tokens))
    attention, _ = pooler.attention_and_values(tokens)
    torch.testing.assert_close(attention.sum(2), torch.ones(3, 4))


def test_pixels_survive_the_round_trip_with_and_without_statistics():
    view, (_, mask) = some_view(), some_ids()
    x = masked_patch_gather(view, mask, 8)
    mean, std = x.mean(2, keepdim=True), x.std(2, keepdim=True)
    for pixels in (M.to_pixels(x), M.to_pixels((x - mean) / std, torch.cat([mean, std.log()], 2))):
        assert torch.equal(M.put_patches(view, mask, pixels), view)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).repeat(3, 11, 64)
    painted = (M.put_patches(view, mask, red) == red[0, 0, :3]).all(3).float().mean((1, 2))
    assert torch.equal(painted, torch.full((3,), 11 / 16))


def test_sizes_are_those_of_the_literature():
    """ViT-S has 22 and ViT-B 86 million parameters (Touvron et al. 2020, arXiv:2012.12877)."""
    millions = {}
    with torch.device("meta"):
        for name, size in M.SIZES.items():
            shape = {k: v for k, v in size.items() if not k.startswith("decoder_")}
            vit = M.ViT(**shape)
            millions[name] = round(sum(w.numel() for w in vit.parameters()) / 1e6, 1)
            more = {k: p.default for k, p in inspect.signature(M.ViT).parameters.items()}
            assert vit.config == more | shape  # an argument of your own may have a default
    assert (millions["small"], millions["base"]) == (21.6, 85.6)


# ---- two views of one image find each other; images of one illustration are no negatives ---------


def by_hand(h, groups, m, T, dcl):
    """The formula at the head of common/guidance.py, one exponential after the other."""
    total = 0.0
    for i in range(2 * m):
        j = (i + m) % (2 * m)
        among = [k for k in range(len(h)) if groups[k] != groups[i] or (k == j and not dcl)]
        total -= math.log(math.exp(h[i] @ h[j] / T) / sum(math.exp(h[i] @ h[k] / T) for k in among))
    return total / (2 * m)


@pytest.mark.parametrize("dcl", [False, True])
def test_the_loss_is_the_formula(dcl):
    """Pictures 0 and 3 are near-duplicates: their views are nobody's negatives among themselves."""
    h = F.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0, 4])  # of 4 second views, and of 5 first ones
    loss, _ = contrastive_loss(h, groups, 4, 0.3, dcl)
    assert loss.item() == pytest.approx(by_hand(h, groups.tolist(), 4, 0.3, dcl), rel=1e-5)
    apart = by_hand(h, [0, 1, 2, 3, 0, 1, 2, 3, 4], 4, 0.3, dcl)
    assert loss.item() != pytest.approx(apart, rel=1e-3)


def test_views_that_find_their_pair_are_counted():
    h, groups = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    assert contrastive_loss(h, groups, 4, 0.1, True)[1] == 1
    swapped = h[[1, 0, 2, 3, 4, 5, 6, 7]]  # two pictures have a view of each other
    assert contrastive_loss(swapped, groups, 4, 0.1, True)[1] == 0.5
    assert contrastive_loss(torch.ones(8, 4) / 2, groups, 4, 0.1, True)[1] == 0  # a collapse


def test_a_batch_of_one_illustration_has_nothing_to_tell_a_view_from():
    h = torch.eye(4).repeat(2, 1)
    assert contrastive_loss(h, torch.zeros(8), 4, 0.1, True)[0] == 0


def contrast_of(settings, figures=None):
    header = {"groups": ["a", "b", "a", "c"]}
    train_set = {"header": header, "labels": torch.zeros(4)}
    torch.manual_seed(0)
    return Contrast(M.ViT(32, 8, 32, 1, 1), settings, train_set, figures, 0.4)


@pytest.mark.parametrize(("share", "count"), [(0.01, 2), (0.5, 3), (1.0, 6)])
def test_a_second_view_has_another_one_to_take_the_background_from(share, count):
    contrast = contrast_of(SETTINGS["cls"] | {"share": share})
    images = torch.zeros(6, 32, 32, 3, dtype=torch.uint8)
    view, _ = contrast.second_views(images, torch.tensor([0, 1, 2, 3, 0, 1]), 4, seeded(0))
    assert len(view) == count


def test_the_projector_is_a_normed_network_on_the_groups_of_the_data():
    contrast = contrast_of(SETTINGS["cls"] | {"weight": 3.0, "temperature": 0.15, "dcl": 1})
    tokens, others = torch.randn(4, 5, 32), torch.randn(2, 5, 32)
    summary, second = tokens[:, 0], others[:, 0]
    index = torch.tensor([0, 3, 2, 1])
    first, _, _, last = contrast.projector
    x = torch.cat([second, summary]) @ first.weight.T
    x = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()).relu()
    h = F.normalize(x @ last.weight.T + last.bias, dim=1)
    assert (first.weight.shape, last.weight.shape) == ((1024, 32), (128, 1024))
    expected = by_hand(h.detach(), [0, 2, 0, 2, 0, 1], 2, 0.15, True)
    loss, found = contrast(tokens, others, index)
    assert loss.item() == pytest.approx(3 * expected, rel=1e-4)
    assert found[0].item() == pytest.approx(expected, rel=1e-4) and 0 <= found[1] <= 1
    loss.backward()
    assert all(w.grad.any() for w in contrast.parameters())


def test_second_views_are_of_the_first_pictures_in_front_of_other_backgrounds():
    """Figures are gray squares: whatever the crop and the colours, a background is another picture's."""
    level = torch.tensor([10, 90, 170, 250], dtype=torch.uint8)[:, None, None, None]
    images = level.expand(4, 64, 64, 3).clone()
    figures = np.zeros((4, 64, 64), np.uint8)
    figures[:, 24:40, 24:40] = 255
    images[:, 24:40, 24:40] = 128
    contrast = contrast_of(SETTINGS["pooler"] | {"share": 0.5}, figures)
    contrast.min_crop = 1.0
    view, ids = contrast.second_views(images, torch.arange(4), 4, seeded(3))
    assert (view.shape, ids.shape) == ((2, 32, 32, 3), (2, 4))
    assert contrast.groups.tolist() == [0, 1, 0, 2]
    corners = view[:, 0, 0, 0].float() / view[:, 16, 16, 0]  # brightness cancels
    assert corners[0] > 0.5 > corners[1]  # of pictures 1 and 0; their own are 0.08 and 0.7
    again = contrast.second_views(images, torch.arange(4), 4, seeded(3))
    assert torch.equal(view, again[0]) and torch.equal(ids, again[1])


def test_simmim_takes_no_size_of_a_decoder_also_of_a_students_own():
    assert small_mae(SimMIM, decoder_of_mine=1).config == small_mae(SimMIM).config
