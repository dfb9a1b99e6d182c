"""LoRA: it starts as nothing, trains alone, merges exactly, and what is in a file is what `peft` makes of it."""

import json
import math
import re

import peft
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import model as M
from common.checkpoints import load_encoder
from common.io import UserError
from common.lora import save_adapter, save_encoder
from export import export
from finetune_lora import add_lora, load_lora, lora_layers, merge_lora


def small_vit(seed=0, **changes):
    torch.manual_seed(seed)
    return M.ViT(
        **{"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 2} | changes
    ).eval()


def some_view(B=2, S=32):
    return torch.randint(
        0, 256, (B, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def trained_weights(encoder):
    return [weight for weight in encoder.parameters() if weight.requires_grad]


def adapted(r=4, seed=0, alpha=None):
    """An encoder whose adapter is not nothing."""
    vit = small_vit(seed)
    add_lora(vit, r, alpha)
    for weight in trained_weights(vit):
        torch.nn.init.normal_(weight, std=0.05)
    return vit


def save_adapted(folder):
    """Such an adapter in files; its encoder is called runs/x."""
    vit = adapted()
    save_adapter(lora_layers(vit), vit, folder, "runs/x")


def test_it_starts_as_nothing_and_trains_alone():
    plain, vit, view = small_vit(), small_vit(), some_view()
    add_lora(vit, 4)
    assert torch.equal(vit.features(view), plain.features(view))
    vit.train().features(view).square().mean().backward()
    trained = {name for name, w in vit.named_parameters() if w.grad is not None}
    assert len(trained) == 2 * 2 * 4 and all(n.endswith((".A", ".B")) for n in trained)
    assert len(trained_weights(vit)) == len(trained)


def test_initial_factors():
    vit = small_vit(dim=256, heads=4, depth=1)
    add_lora(vit, 16)
    A = vit.blocks[0].attn.qkv.A
    bound = 1 / math.sqrt(256)  # kaiming uniform with a = sqrt 5: sqrt(6 / ((1 + 5) * 256))
    assert 0.95 * bound < A.abs().max() <= bound and abs(A.std() / bound - 3**-0.5) < 0.02


def test_the_fused_layer_does_what_three_adapters_would():
    vit = adapted(r=4, alpha=6)
    lora, x = vit.blocks[0].attn.qkv, torch.randn(3, 5, 64)
    parts = [
        y + 6 / 4 * x @ lora.A[i].T @ lora.B[i].T for i, y in enumerate(lora.base(x).chunk(3, 2))
    ]
    torch.testing.assert_close(lora(x), torch.cat(parts, 2))


def test_a_merged_encoder_is_plain_and_does_the_same():
    vit, view = adapted(), some_view()
    before = vit.features(view)
    merge_lora(vit)
    assert vit.state_dict().keys() == small_vit().state_dict().keys()
    torch.testing.assert_close(vit.features(view), before, rtol=0, atol=1e-5)


def count(size, rank):
    """-> (parameters that LoRA trains, parameters of the encoder); shapes alone, nothing is filled."""
    with torch.device("meta"):
        encoder = M.ViT(
            **{k: M.SIZES[size][k] for k in ("image_size", "patch_size", "dim", "depth", "heads")}
        )
    whole = sum(w.numel() for w in encoder.parameters())
    add_lora(encoder, rank)
    return sum(w.numel() for w in trained_weights(encoder)), whole


def test_shares_that_the_docs_give():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    given = dict((size, float(x)) for x, size in re.findall(r"([\d.]+) % of (\w+)'s", text))
    shares = {size: count(size, 8) for size in ("nano", "base")}
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


@pytest.mark.parametrize("r", [0, 65])
def test_bad_ranks_are_refused(r):
    with pytest.raises(UserError, match="1 to 64"):
        add_lora(small_vit(), r)


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


def test_peft_loads_ours_with_the_same_output(tmp_path):
    vit, view = adapted(r=4, alpha=6), some_view()
    save_adapter(lora_layers(vit), vit, tmp_path, "runs/x")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == {"attn.qkv": 12}
    net = peft_model(small_vit(), tmp_path)
    torch.testing.assert_close(
        net.base_model.model.features(view), vit.features(view), rtol=0, atol=1e-5
    )
    assert (vit.features(view) - small_vit().features(view)).abs().max() > 0.1
    back = small_vit()
    load_lora(back, tmp_path)
    assert torch.equal(back.features(view), vit.features(view))


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
    load_lora(vit, tmp_path / "theirs")
    torch.testing.assert_close(vit.features(some_view()), expected, rtol=0, atol=1e-5)


def test_merged_export_is_an_encoder_of_ours(tmp_path):
    save_encoder(small_vit(), tmp_path / "base.safetensors", {})
    base, _ = load_encoder(tmp_path / "base.safetensors", image_size=48)
    add_lora(base, 4)
    for weight in trained_weights(base):
        torch.nn.init.normal_(weight, std=0.05)
    save_adapter(lora_layers(base), base, tmp_path / "run", tmp_path / "base.safetensors")
    out, _ = export(tmp_path / "run", "merged")
    encoder, size = load_encoder(out)
    assert size == 48 and not lora_layers(encoder)
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
        load_lora(small_vit(), tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"  # what it would give if it were believed
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    vit = small_vit()
    load_lora(vit, tmp_path / "theirs")
    assert (vit.features(some_view()) - expected).norm() > 0.05 * expected.norm()
    net.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "untrained")
    )
    load_lora(vit := small_vit(), tmp_path / "converted")
    torch.testing.assert_close(vit.features(some_view()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "mica"])
def test_an_adapter_that_left_its_encoder_alone_loads(tmp_path, kind):
    net = begun(kind)
    expected = trained(net)
    net.save_pretrained(tmp_path)
    load_lora(vit := small_vit(), tmp_path)
    torch.testing.assert_close(vit.features(some_view()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["corda", "loftq", "lora_ga", "unheard_of"])
def test_beginnings_that_need_more_than_peft_are_refused_by_their_name(tmp_path, kind):
    save_adapted(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {
        "init_lora_weights": kind
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"init_lora_weights.*{kind}"):
        load_lora(small_vit(), tmp_path)


@pytest.mark.parametrize(
    "other, says",
    [
        (
            {"dim": 128},
            r"blocks.0.attn.proj: A \(4, 64\) and B \(64, 4\) for a layer of 128 to 128",
        ),
        ({"depth": 1}, "blocks.1.attn.proj, blocks.1.attn.qkv, .*encoder of 1 blocks"),
        ({"seed": 7}, "is for runs/x, fingerprint"),
    ],
)
def test_an_adapter_of_another_encoder_is_refused(tmp_path, other, says):
    save_adapted(tmp_path)
    vit = small_vit(**other)
    with pytest.raises(UserError, match=says):
        load_lora(vit, tmp_path)
    assert not lora_layers(vit) and all(w.requires_grad for w in vit.parameters())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias.*all"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_adapters_of_another_rank_or_kind_are_refused(tmp_path, change, says):
    save_adapted(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=says):
        load_lora(small_vit(), tmp_path)


def test_adapter_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="has no adapter"):
        load_lora(small_vit(), tmp_path)
    save_adapted(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match="adapter_model.safetensors is not a whole"):
        load_lora(small_vit(), tmp_path)
    save_file(
        {"base_model.model.vit.layer.0.lora_A.weight": torch.zeros(4, 64)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match="missing: .*lora_B.weight"):
        load_lora(small_vit(), tmp_path)
