"""LoRA: it starts as nothing, trains alone, merges exactly, and its files are those of `peft`."""

import json
import math

import pytest
import torch
from conftest import some_view
from safetensors.torch import load_file, save_file

import model as M
from apps.adapters import load_adapter, save_adapter
from apps.export import export
from common.checkpoints import fingerprint, load_encoder, save_network
from common.train import UserError
from finetune_lora import (
    LAYERS,
    LoRA,
    add_lora,
    lora_layers,
    merge_lora,
)

SHAPE = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 2}
ATTN = ["attn.qkv", "attn.proj"]


def small_vit(seed=0, **changes):
    torch.manual_seed(seed)
    return M.ViT(**SHAPE | changes).eval()


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def adapted(vit=None, r=4, alpha=None):
    """An encoder whose adapter is not nothing."""
    vit = vit or small_vit()
    add_lora(vit, r, alpha)
    for weight in vit.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.05)
    return vit


def save_adapted(folder):
    """Such an adapter in files; its encoder is called runs/x."""
    vit = adapted(alpha=6)
    save_adapter(vit, {"fingerprint": fingerprint(small_vit()), "image_size": 32}, folder, "runs/x")
    return vit


def test_it_starts_as_nothing_and_trains_alone():
    plain, vit = small_vit(), small_vit()
    view = some_view()
    add_lora(vit, 16)
    assert torch.equal(vit.features(view), plain.features(view))
    bound = 1 / math.sqrt(64)  # kaiming uniform with a = sqrt 5: sqrt(6 / ((1 + 5) * 64))
    A = vit.blocks[0].attn.qkv.A
    assert 0.95 * bound < A.abs().max() <= bound and abs(A.std() / bound - 3**-0.5) < 0.03
    vit.train().features(view).square().mean().backward()
    trained = {name for name, w in vit.named_parameters() if w.grad is not None}
    assert len(trained) == 2 * 2 * len(LAYERS) and all(n.endswith((".A", ".B")) for n in trained)


def test_the_fused_layer_does_what_three_adapters_would():
    lora, x = adapted(alpha=6).blocks[0].attn.qkv, torch.randn(3, 5, 64)
    parts = lora.base(x).chunk(3, 2)
    parts = [y + 6 / 4 * x @ lora.A[i].T @ lora.B[i].T for i, y in enumerate(parts)]
    torch.testing.assert_close(lora(x), torch.cat(parts, 2))


def test_lora_trains_few_parameters():
    """r (in + out) of each layer; the fused one is three, which share their input. Shapes alone."""
    with torch.device("meta"):
        encoder = M.ViT(**{k: M.SIZES["base"][k] for k in SHAPE})
    whole = sum(w.numel() for w in encoder.parameters())
    ends = [
        (chunks, encoder.blocks[0].get_submodule(name).weight.shape)
        for name, chunks in LAYERS.items()
    ]
    expected = 12 * 8 * sum(chunks * D + out for chunks, (out, D) in ends)
    add_lora(encoder, 8)
    trained = sum(w.numel() for w in encoder.parameters() if w.requires_grad)
    assert trained == expected < 0.02 * whole


def made_by_peft(kind=True, **options):
    """peft's model on our encoder, its adapter begun in this way and moved as by training."""
    import peft  # it takes seconds, also where no test of this file is run

    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["qkv", "fc1"]} | options
    config = peft.LoraConfig(init_lora_weights=kind, **options)
    return peft.get_peft_model(small_vit(), config).eval()


def move(net):
    """Train, so to say -> the features after it."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn(weight.shape, generator=draws) * 0.05)
    return net.base_model.model.features(some_view())


def loaded(folder):
    """The features of our encoder with the adapter of this folder."""
    vit = small_vit()
    load_adapter(vit, folder)
    return vit.features(some_view())


def test_peft_loads_ours_with_the_same_output(tmp_path):
    import peft

    expected = save_adapted(tmp_path).features(some_view())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == {"attn.qkv": 12}
    net = peft.PeftModel.from_pretrained(small_vit(), tmp_path).eval()
    close(net.base_model.model.features(some_view()), expected)
    assert (expected - small_vit().features(some_view())).abs().max() > 0.1
    assert torch.equal(loaded(tmp_path), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [*ATTN, "fc1", "fc2"], "use_rslora": True, "r": 3},
        {"target_modules": r".*\.1\.mlp\.fc[12]"},
        {"target_modules": "all-linear", "kind": "gaussian"},
        {"rank_pattern": {"fc1": 2}, "alpha_pattern": {r"blocks\.1\.attn\.qkv": 3}},
        {"target_modules": ["fc2"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    ],
    ids=str,
)
def test_what_peft_made_loads_here(tmp_path, options):
    net = made_by_peft(**options)
    expected = move(net)
    net.save_pretrained(tmp_path)
    close(loaded(tmp_path), expected)


def test_the_scale_is_loaded_that_was_trained(tmp_path, monkeypatch):
    """Also where somebody has changed the formula of LoRA, here to that of rsLoRA."""
    plain = LoRA.__init__

    def stabilised(self, base, r, alpha, chunks=1):
        plain(self, base, r, alpha, chunks)
        self.scale = alpha / r**0.5

    monkeypatch.setattr(LoRA, "__init__", stabilised)
    expected = save_adapted(tmp_path).features(some_view())
    assert torch.equal(loaded(tmp_path), expected)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_changed_its_encoder_is_refused_and_can_be_converted(tmp_path, kind):
    """Without its changed encoder such an adapter would give other features."""
    net = made_by_peft(kind)
    net.save_pretrained(tmp_path / "untrained")
    expected = move(net)
    net.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
        loaded(tmp_path / "theirs")
    change_config(tmp_path / "theirs", init_lora_weights=True)
    assert (loaded(tmp_path / "theirs") - expected).norm() > 0.05 * expected.norm()
    untrained = {"path_initial_model_for_weight_conversion": str(tmp_path / "untrained")}
    net.save_pretrained(tmp_path / "converted", **untrained)
    close(loaded(tmp_path / "converted"), expected, 1e-4)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change, encoder, word",
    [
        ({"init_lora_weights": "unheard_of"}, {}, "unheard_of"),
        ({"peft_type": "IA3"}, {}, "IA3"),
        ({"use_dora": True}, {}, "use_dora"),
        ({"bias": "all"}, {}, "bias"),
        ({"modules_to_save": ["norm"]}, {}, "modules_to_save"),
        ({"alpha_pattern": {"fc9": 2}}, {}, "fc9"),
        ({"alpha_pattern": {"fc1": "2"}}, {}, "fc1"),
        ({}, {"dim": 128}, r"\(64, 4\)"),
        ({}, {"depth": 1}, "1 blocks"),
        ({}, {"seed": 7}, "fingerprint"),
    ],
)
def test_an_adapter_of_another_kind_or_encoder_is_refused(tmp_path, change, encoder, word):
    save_adapted(tmp_path)
    change_config(tmp_path, **change)
    vit = small_vit(**encoder)
    with pytest.raises(UserError, match=word):
        load_adapter(vit, tmp_path)
    assert not lora_layers(vit) and all(w.requires_grad for w in vit.parameters())


def test_half_an_adapter_is_refused(tmp_path):
    save_adapted(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[f"base_model.model.blocks.0.{[*LAYERS][-1]}.lora_A.weight"]
    save_file(weights, path)
    with pytest.raises(UserError, match="lora_A"):
        loaded(tmp_path)


def test_merged_export_is_an_encoder_of_ours(tmp_path):
    """At the image size of the adapter, which is not that of its encoder's file."""
    save_network(small_vit(), tmp_path / "base.safetensors", {}, "encoder.")
    base = adapted(load_encoder(tmp_path / "base.safetensors", image_size=48))
    digest = fingerprint(load_encoder(tmp_path / "base.safetensors"))
    notes = {"fingerprint": digest, "image_size": 48}
    save_adapter(base, notes, tmp_path / "run", tmp_path / "base.safetensors")
    out, _ = export(tmp_path / "run", "merged")
    encoder = load_encoder(out)
    assert encoder.image_size == 48 and not lora_layers(encoder)
    close(encoder.features(some_view(S=48)), base.features(some_view(S=48)))
    with pytest.raises(UserError, match="--to merged"):
        export(tmp_path / "run", "timm")


@pytest.mark.parametrize("learns", ["bd", "AB"])
def test_an_adapter_of_ones_own_needs_weight_and_forward_alone(monkeypatch, learns):
    class VeRA(LoRA):
        """d B b A x, with random A and B that stay in VeRA (arXiv:2310.11454); no alpha, no factors."""

        def __init__(self, base, r, alpha, chunks):
            torch.nn.Module.__init__(self)
            generator = torch.Generator().manual_seed(7)
            self.base = base
            A = torch.randn(r, base.in_features, generator=generator)
            B = torch.randn(base.out_features, r, generator=generator)
            first = {"A": A, "B": B, "b": torch.ones(r), "d": torch.ones(base.out_features)}
            for name, tensor in first.items():
                setattr(self, name, torch.nn.Parameter(tensor, name in learns))

        def weight(self):
            return self.base.weight + self.d[:, None] * self.B @ (self.b[:, None] * self.A)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight(), self.base.bias)

    monkeypatch.setattr("finetune_lora.LoRA", VeRA)
    encoder = adapted()
    features = encoder.features(some_view())
    merge_lora(encoder)
    close(encoder.features(some_view()), features)
