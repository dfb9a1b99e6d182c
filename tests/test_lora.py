"""LoRA: it starts as nothing, trains alone, merges exactly, and what is in a file is what `peft` makes of it."""

import json
import math
import re

import peft
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import common.lora as C
import model as M
from common.checkpoints import load_encoder
from common.io import UserError
from export import export


def small_vit(seed=0, **changes):
    torch.manual_seed(seed)
    return M.ViT(
        **{"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 2} | changes
    ).eval()


def some_view(B=2, S=32):
    return torch.randint(
        0, 256, (B, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def adapted(r=4, seed=0, **options):
    """An encoder whose adapter is not nothing."""
    vit = small_vit(seed)
    for weight in C.add_lora(vit, r, **options):
        torch.nn.init.normal_(weight, std=0.05)
    return vit


def test_it_starts_as_nothing_and_trains_alone():
    plain, vit, view = small_vit(), small_vit(), some_view()
    weights = C.add_lora(vit, 4, dropout=0.1)
    assert (
        torch.equal(vit.features(view), plain.features(view))
        and not vit.blocks[0].attn.qkv.dropout.training
    )
    vit.train().features(view).square().mean().backward()
    trained = {name for name, w in vit.named_parameters() if w.grad is not None}
    assert len(weights) == len(trained) == 2 * 2 * 4 and all(
        n.endswith((".A", ".B")) for n in trained
    )
    assert all(w.grad is not None for w in weights)


def test_initial_factors():
    lora = C.add_lora(small_vit(dim=256, heads=4, depth=1), 16)[0]
    bound = 1 / math.sqrt(256)  # kaiming uniform with a = sqrt 5: sqrt(6 / ((1 + 5) * 256))
    assert 0.95 * bound < lora.abs().max() <= bound and abs(lora.std() / bound - 3**-0.5) < 0.02


def test_the_fused_layer_does_what_three_adapters_would():
    vit = adapted(r=4, alpha=6, targets=("q", "v", "o"))
    lora, x = vit.blocks[0].attn.qkv, torch.randn(3, 5, 64)
    q, k, v = lora.base(x).chunk(3, 2)
    q = q + 6 / 4 * x @ lora.A[0].T @ lora.B[0].T
    v = v + 6 / 4 * x @ lora.A[1].T @ lora.B[1].T
    torch.testing.assert_close(lora(x), torch.cat([q, k, v], 2))
    assert set(C.lora_layers(vit)) == {
        f"blocks.{i}.attn.{n}" for i in range(2) for n in ("qkv", "proj")
    }


def test_merge_and_unmerge_are_explicit():
    vit, view = adapted(), some_view()
    before, base = vit.features(view), vit.blocks[0].attn.qkv.base.weight.clone()
    for mode in (True, False):
        assert torch.equal(vit.train(mode).blocks[0].attn.qkv.base.weight, base)
    C.merge_lora(vit)
    torch.testing.assert_close(vit.features(view), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="already merged"):
        C.merge_lora(vit)
    C.unmerge_lora(vit)
    torch.testing.assert_close(vit.blocks[0].attn.qkv.base.weight, base, rtol=0, atol=1e-7)
    torch.testing.assert_close(vit.features(view), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not merged"):
        C.unmerge_lora(vit)
    C.merge_lora(vit)
    C.remove_lora(vit)
    assert vit.state_dict().keys() == small_vit().state_dict().keys()
    torch.testing.assert_close(vit.features(view), before, rtol=0, atol=1e-5)


def count(size, rank):
    """-> (parameters that LoRA trains, parameters of the encoder); shapes alone, nothing is filled."""
    with torch.device("meta"):
        encoder = M.ViT(
            **{k: M.SIZES[size][k] for k in ("image_size", "patch_size", "dim", "depth", "heads")}
        )
    whole = sum(w.numel() for w in encoder.parameters())
    return sum(w.numel() for w in C.add_lora(encoder, rank)), whole


def test_shares_that_the_docs_give():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    given = dict((size, float(x)) for x, size in re.findall(r"([\d.]+) % of (\w+)'s", text))
    shares = {size: count(size, 8) for size in M.SIZES}
    assert given == {
        size: round(100 * trained / whole, 2) for size, (trained, whole) in shares.items()
    }


def test_share_of_the_parameters():
    """1.33 M of ViT-B at rank 8, about 1.5 %; the narrower the network, the larger the share."""
    trained, whole = count("base", 8)
    assert trained == 12 * 8 * (4 * 2 * 768 + 2 * (768 + 3072)) == 1_327_104
    assert 0.014 < trained / whole < 0.017
    shares = [count(size, 8)[0] / count(size, 8)[1] for size in ("nano", "tiny", "small", "base")]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"targets": ("q", "x")}, "'q,x'"),
        ({"targets": ()}, "targets ''"),
        ({"r": 0}, "rank 0"),
        ({"r": 65}, "1 to 64"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        C.add_lora(small_vit(), **options)


def test_two_adapters_are_refused():
    with pytest.raises(UserError, match="already"):
        C.add_lora(adapted())


# ---- adapter files, and the `peft` library -------------------------------------------------------


def peft_model(vit, folder):
    return peft.PeftModel.from_pretrained(vit, folder).eval()


def made_by_peft(folder, seed=5, **options):
    """An adapter that peft made on our encoder -> its features."""
    torch.manual_seed(seed)
    net = peft.get_peft_model(
        small_vit(), peft.LoraConfig(**{"r": 4, "lora_alpha": 10} | options)
    ).eval()
    for name, weight in net.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    net.save_pretrained(folder)
    return net.base_model.model.features(some_view())


@pytest.mark.parametrize("targets", [tuple(C.TARGETS), ("q", "v"), ("v",), ("k", "o", "fc2")])
def test_peft_loads_ours_with_the_same_output(tmp_path, targets):
    vit, view = adapted(r=4, alpha=6, dropout=0.1, targets=targets), some_view()
    C.save_adapter(vit, tmp_path, "runs/x")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    fused = [t for t in targets if t in "qkv"]
    if len(fused) < len(targets):
        assert (config["r"], config["lora_alpha"]) == (4, 6)
        assert config["rank_pattern"] == ({"attn.qkv": 4 * len(fused)} if len(fused) > 1 else {})
    net = peft_model(small_vit(), tmp_path)
    torch.testing.assert_close(
        net.base_model.model.features(view), vit.features(view), rtol=0, atol=1e-5
    )
    assert (vit.features(view) - small_vit().features(view)).abs().max() > 0.1
    back = small_vit()
    weights = C.load_adapter(back, tmp_path)
    assert torch.equal(back.features(view), vit.features(view)) and all(
        w.requires_grad for w in weights
    )
    pairs = zip(weights, [w for w in vit.parameters() if w.requires_grad], strict=True)
    assert all(
        torch.equal(a, b) for a, b in pairs
    )  # q, k and v are apart again: training can go on


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["qkv"]},
        {"target_modules": ["attn.qkv", "attn.proj", "fc1", "fc2"], "use_rslora": True},
        {"target_modules": r".*\.1\.mlp\.fc[12]"},
        {"target_modules": "all-linear"},
        {
            "target_modules": ["qkv", "fc1"],
            "rank_pattern": {"fc1": 2},
            "alpha_pattern": {r"blocks\.1\.attn\.qkv": 3},
        },
        {"target_modules": ["fc2"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    ],
)
def test_what_peft_made_loads_here(tmp_path, options):
    expected = made_by_peft(tmp_path / "theirs", **options)
    vit = small_vit()
    C.load_adapter(vit, tmp_path / "theirs")
    torch.testing.assert_close(vit.features(some_view()), expected, rtol=0, atol=1e-5)
    C.save_adapter(vit, tmp_path / "again", "runs/x")  # and back to peft, whatever its ranks are
    net = peft_model(small_vit(), tmp_path / "again")
    torch.testing.assert_close(
        net.base_model.model.features(some_view()), expected, rtol=0, atol=1e-5
    )


def test_merged_export_is_an_encoder_of_ours(tmp_path):
    C.save_encoder(small_vit(), tmp_path / "base.safetensors", {})
    base, _ = load_encoder(tmp_path / "base.safetensors", image_size=48)
    for weight in C.add_lora(base, 4):
        torch.nn.init.normal_(weight, std=0.05)
    C.save_adapter(base, tmp_path / "run", tmp_path / "base.safetensors")
    out, _ = export(tmp_path / "run", "merged")
    encoder, size = load_encoder(out)
    assert size == 48 and not C.lora_layers(encoder)
    torch.testing.assert_close(
        encoder.features(some_view(S=48)), base.features(some_view(S=48)), rtol=0, atol=1e-5
    )
    with pytest.raises(UserError, match="holds only an adapter: .* --to merged"):
        export(tmp_path / "run", "timm")


def begun(kind):
    """peft's model on our encoder, its adapter begun in this way."""
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["qkv", "fc1"], init_lora_weights=kind
    )
    return peft.get_peft_model(small_vit(), config).eval()


def trained(net):
    """What training does to an adapter -> the features after it."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "lora_" in name:
                weight.add_(
                    torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05
                )
    return net.base_model.model.features(some_view())


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_its_encoder_is_refused_and_can_be_converted(tmp_path, kind):
    net = begun(kind)
    net.save_pretrained(tmp_path / "untrained")
    expected = trained(net)
    net.save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        UserError, match=f"init_lora_weights.*{kind}.*path_initial_model_for_weight_conversion"
    ):
        C.load_adapter(small_vit(), tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"  # what it would give if it were believed
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    vit = small_vit()
    C.load_adapter(vit, tmp_path / "theirs")
    assert (vit.features(some_view()) - expected).norm() > 0.05 * expected.norm()
    net.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "untrained")
    )
    C.load_adapter(vit := small_vit(), tmp_path / "converted")
    torch.testing.assert_close(vit.features(some_view()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "mica"])
def test_an_adapter_that_left_its_encoder_alone_loads(tmp_path, kind):
    net = begun(kind)
    expected = trained(net)
    net.save_pretrained(tmp_path)
    C.load_adapter(vit := small_vit(), tmp_path)
    torch.testing.assert_close(vit.features(some_view()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["corda", "loftq", "lora_ga", "unheard_of"])
def test_beginnings_that_need_more_than_peft_are_refused_by_their_name(tmp_path, kind):
    C.save_adapter(adapted(), tmp_path, "runs/x")
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {
        "init_lora_weights": kind
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"init_lora_weights.*{kind}"):
        C.load_adapter(small_vit(), tmp_path)


@pytest.mark.parametrize(
    "other, says",
    [
        (
            {"dim": 128},
            r"blocks.0.attn.proj: A \(4, 64\) and B \(64, 4\) against rank 4 and a layer of 128 to 128",
        ),
        ({"depth": 1}, "blocks.1.attn.proj, blocks.1.attn.qkv, .*encoder of 1 blocks"),
        ({"seed": 7}, "is for runs/x, fingerprint"),
    ],
)
def test_an_adapter_of_another_encoder_is_refused(tmp_path, other, says):
    C.save_adapter(adapted(), tmp_path, "runs/x")
    vit = small_vit(**other)
    with pytest.raises(UserError, match=says):
        C.load_adapter(vit, tmp_path)
    assert not C.lora_layers(vit) and all(w.requires_grad for w in vit.parameters())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"r": 8}, "against rank 8"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias.*all"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_adapters_of_another_rank_or_kind_are_refused(tmp_path, change, says):
    C.save_adapter(adapted(), tmp_path, "runs/x")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=says):
        C.load_adapter(small_vit(), tmp_path)


def test_adapter_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="has no adapter"):
        C.load_adapter(small_vit(), tmp_path)
    C.save_adapter(adapted(), tmp_path, "runs/x")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match="adapter_model.safetensors is not a whole"):
        C.load_adapter(small_vit(), tmp_path)
    save_file(
        {"base_model.model.vit.layer.0.lora_A.weight": torch.zeros(4, 64)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match="missing: .*lora_B.weight"):
        C.load_adapter(small_vit(), tmp_path)
    for vit in (small_vit(), adapted()):
        if C.lora_layers(vit):
            C.merge_lora(vit)
        with pytest.raises(ValueError):
            C.save_adapter(vit, tmp_path / "new", "runs/x")
    assert not (tmp_path / "new").exists()
