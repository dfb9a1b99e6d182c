"""Checkpoints of the field against the libraries that made them: the same features, loss and attention.

The networks are tiny and randomly initialised; their weights are so large that a wrong matrix shows.
"""

import argparse
import importlib
import json
import os
import pickle
import zipfile
from itertools import product

import pytest
import torch
from conftest import call, equal, shaken, some_view
from safetensors.torch import load_file, save_file

import common.checkpoints as C
import model as M
from apps.export import export, save_hf
from common import formats
from common.train import UserError
from common.variants import SimMIM
from kernels import MEAN, STD
from kernels.patches import masked_patch_gather, reconstruction_error

TINY = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 2}
HF = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
HF |= {"intermediate_size": 256, "image_size": 32, "patch_size": 8, "attn_implementation": "eager"}
HF_DECODER = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1}
HF_DECODER |= {"decoder_intermediate_size": 256, "norm_pix_loss": True, "layer_norm_eps": 1e-6}
TWO_HEADS = {"num_attention_heads": 2}  # 64 wide is one head, if nobody says otherwise


@pytest.fixture(autouse=True)
def small_is_public(monkeypatch):
    """The small networks of these tests count as a public size: one head of 64."""
    monkeypatch.setitem(formats.HEADS, 64, 1)


@pytest.fixture
def transformers():
    """The library: it takes seconds, so it is not imported where no test of this file is run."""
    return importlib.import_module("transformers")


def small_mae(**changes):
    torch.manual_seed(0)
    return shaken(M.MAE(**TINY | {"decoder_dim": 64, "decoder_depth": 1} | changes))


def pixels(view, mean=MEAN, std=STD):
    """What other libraries are given: (B, 3, S, S) fp32."""
    x = view.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def public(encoder):
    """The weights of an encoder under public names."""
    return formats.as_convolution({k: w.clone() for k, w in encoder.state_dict().items()})


def public_mae(mae):
    """The same of a whole MAE; no public file has a head of statistics."""
    own = {k: w.clone() for k, w in mae.state_dict().items() if not k.startswith(C.STATS_HEAD)}
    return formats.as_convolution({k.partition(".")[2]: w for k, w in own.items()})


def save_encoder(encoder, path):
    C.save_network(encoder, path, {}, "encoder.")


def write_config(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))


# ---- Hugging Face, both directions ---------------------------------------------------------------


def check_pretraining(ours, theirs, view):
    """Same features, prediction and loss under the same noise, with MAE's own floor, s0^2 = 1e-6."""
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    order = noise.argsort(1)
    keep, hidden = order[:, :4].contiguous(), order[:, 4:].contiguous()
    with torch.no_grad():
        out = theirs(pixels(view), noise=noise)
        pred, _, tokens = ours(masked_patch_gather(view, keep, 8), keep, hidden)
        encoded = theirs.vit(pixels(view), noise=noise).last_hidden_state
    close(tokens, encoded)
    close(pred, out.logits.gather(1, hidden[..., None].expand(-1, -1, 192)), 2e-5)
    # the squared error of MAE, whatever yours is by now
    squared = {"error_of": lambda pred, target: (pred - target).square().mean(2)}
    error, _ = reconstruction_error(pred, view, hidden, 8, floor=1e-3, **squared)
    close(error.mean(), out.loss)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_hugging_face_mae_is_ours_and_goes_back(tmp_path, heads, transformers):
    """The heads of the decoder are believed: they change no shape."""
    torch.manual_seed(1)
    config = transformers.ViTMAEConfig(**HF, **HF_DECODER, decoder_num_attention_heads=heads)
    theirs = shaken(transformers.ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path / "hf")
    ours = small_mae(decoder_heads=heads)
    assert "encoder and decoder" in C.init_from(ours, tmp_path / "hf")
    check_pretraining(ours.eval(), theirs, some_view())
    C.save_network(ours, tmp_path / "run" / "model.safetensors", {"norm_pix": True})
    folder, use = export(tmp_path / "run", "hf")
    load = transformers.ViTMAEForPreTraining.from_pretrained
    back, info = load(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    check_pretraining(ours, back.eval(), some_view())
    C.init_from(again := small_mae(decoder_heads=heads), folder)
    assert equal(public_mae(again), public_mae(ours)) and "ViTMAE" in use
    with pytest.raises(UserError, match=f"decoder_heads {heads}"):
        C.init_from(small_mae(decoder_heads=1), tmp_path / "hf")


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_hugging_face_vit_is_ours(tmp_path, kind, transformers):
    """Its epsilon is 1e-12, its positions are learned, its pixels had another mean."""
    torch.manual_seed(2)
    theirs = shaken(getattr(transformers, kind)(transformers.ViTConfig(**HF)))
    theirs.save_pretrained(tmp_path)
    half = [0.5, 0.5, 0.5]
    text = json.dumps({"image_mean": half, "image_std": half})
    (tmp_path / "preprocessor_config.json").write_text(text)
    encoder = C.load_encoder(tmp_path)
    vit, view = getattr(theirs, "vit", theirs), some_view(S=48)
    with torch.no_grad():
        out = vit(pixels(some_view(), half, half), output_attentions=True)
        assert encoder.image_size == 32 and encoder.norm.eps == 1e-12
        close(encoder.features(some_view()), out.last_hidden_state)
        close(encoder.patch_attention(some_view()), out.attentions[-1][:, :, 0, 1:])
        larger = C.load_encoder(tmp_path, image_size=48)
        out = vit(pixels(view, half, half), interpolate_pos_encoding=True)
        assert larger.image_size == 48
        close(larger.features(view), out.last_hidden_state)


def test_an_encoder_alone_goes_to_hugging_face_and_back(tmp_path, transformers):
    """At another image size."""
    save_encoder(small_mae().encoder, tmp_path / "model.safetensors")
    folder, _ = export(tmp_path, "hf", image_size=48)
    load, view = transformers.ViTModel.from_pretrained, some_view(S=48)
    theirs, info = load(folder, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    back = C.load_encoder(folder)
    assert back.image_size == 48
    with torch.no_grad():
        close(theirs(pixels(view)).last_hidden_state, back.features(view))


# ---- MAE, DINO, DINOv2, timm: the same names, in their own wrappings -----------------------------


def wrapped(mae):
    """What the public files of each kind hold, made of our weights by renaming."""
    encoder, args = public(mae.encoder), argparse.Namespace(lr=1e-3, output_dir="out")
    head = {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
    dino = {f"module.backbone.{k}": w for k, w in encoder.items()}
    dino["module.head.mlp.0.weight"] = torch.zeros(2, 64)
    student = {k: w + 1 for k, w in dino.items()}
    dinov2 = {f"teacher.backbone.{k}": w for k, w in encoder.items()}
    dinov2 |= {"teacher.dino_head.last.weight": torch.zeros(2, 2), "student.cls_token": args}
    norm = {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.zeros(64)}
    return {
        "MAE's encoder": {"model": encoder},
        "MAE": {"model": public_mae(mae), "optimizer": {"step": 3}, "args": args},
        "DINO's encoder, as timm has it": encoder,
        "DINO": {"student": student, "teacher": dino, "epoch": 9, "args": args},
        "DINOv2": {"model": dinov2},
        "timm": encoder | head | norm,
        "timm's checkpoint": {"state_dict": encoder | head, "arch": "vit_small", "args": args},
    }


def test_public_files_are_encoders(tmp_path):
    """As zip and as old pickles; timm's also as safetensors."""
    mae = small_mae()
    features = mae.encoder.features(some_view())
    write_config(tmp_path, **TWO_HEADS)
    files = wrapped(mae)
    save_file(files["timm"], tmp_path / "timm.safetensors", {"format": "pt"})
    for as_zip, (kind, content) in product((True, False), files.items()):
        path = tmp_path / f"{kind}, {as_zip}.bin"
        torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    paths = [path for path in tmp_path.iterdir() if path.name != "config.json"]
    assert len(paths) == 2 * len(files) + 1
    for path in paths:
        encoder = C.load_encoder(path)
        assert encoder.image_size == 32, path
        assert torch.equal(encoder.features(some_view()), features), path


def test_dinov2_layer_scale_is_folded_exactly(tmp_path):
    mae, view = small_mae(image_size=28, patch_size=14, heads=1), some_view(S=28)
    weights, gammas = public(mae.encoder), {}
    x = mae.encoder.embed(*mae.encoder.all_patches(view))
    for i, block in enumerate(mae.encoder.blocks):  # DINOv2's block, as its paper has it
        first, second = torch.rand(2, 64, generator=torch.Generator().manual_seed(i))
        x = x + first * block.attn(block.norm1(x))
        x = x + second * block.mlp(block.norm2(x))
        gammas |= {f"blocks.{i}.ls1.gamma": first, f"blocks.{i}.ls2.gamma": second}
    torch.save(weights | gammas | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2.pth")
    encoder = C.load_encoder(tmp_path / "dinov2.pth")
    assert encoder.image_size == 28
    close(encoder.features(view), mae.encoder.norm(x))
    torch.save(weights | {"register_tokens": torch.zeros(1, 4, 64)}, tmp_path / "dinov2.pth")
    with pytest.raises(UserError, match="register tokens"):
        C.load_encoder(tmp_path / "dinov2.pth")


def test_heads_are_those_of_the_public_sizes_or_of_a_config(tmp_path):
    """MAE's ViT-H is 1280 wide and has 16 heads: with width / 64, features would be 86 % off."""
    expected = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
    assert {width: formats.HEADS[width] for width in expected} == expected
    torch.save(public(M.ViT(16, 16, 128, 1, 16)), tmp_path / "x.pth")
    with pytest.raises(UserError, match="num_attention_heads"):
        C.load_encoder(tmp_path / "x.pth")
    write_config(tmp_path, num_attention_heads=16)
    assert C.load_encoder(tmp_path / "x.pth").blocks[0].attn.heads == 16


# ---- export --------------------------------------------------------------------------------------


def test_export_for_timm_is_its_vit(tmp_path):
    """timm needs torchvision, which may not import beside a CPU torch: its shapes are also here."""
    save_encoder(shaken(M.ViT(**TINY)), tmp_path / "model.safetensors")
    out, line = export(tmp_path, "timm", image_size=48)
    weights = load_file(out)
    assert weights.keys() == public(M.ViT(**TINY)).keys() and "num_heads=2" in line
    assert weights["patch_embed.proj.weight"].shape == (64, 3, 8, 8)
    assert weights["pos_embed"].shape == (1, 37, 64)
    timm = pytest.importorskip("timm.models", exc_type=Exception)
    size = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    theirs = timm.VisionTransformer(48, 8, num_classes=0, **size).eval()
    theirs.load_state_dict(weights, strict=True)
    ours, view = C.load_encoder(tmp_path, 48), some_view(S=48)
    with torch.no_grad():
        close(theirs.forward_features(pixels(view)), ours.features(view), 3e-5)


@pytest.mark.parametrize("kind", [M.MAE, SimMIM])
def test_export_as_mae_holds_everything_that_is_public(tmp_path, kind):
    """Of SimMIM the encoder alone: no MAE has its decoder."""
    net = shaken(kind(**TINY | {"heads": 1}, decoder_dim=64, decoder_depth=1))
    C.save_network(net, tmp_path / "model.safetensors", {})
    out, _ = export(tmp_path, "mae", tmp_path / "mae.safetensors")
    expected = public_mae(net) if kind == M.MAE else public(net.encoder)
    assert equal(load_file(out), expected)
    assert not [k for k in load_file(out) if "stats_head" in k]
    encoder, view = C.load_encoder(out), some_view()
    assert torch.equal(encoder.features(view), net.encoder.features(view))


def test_init_takes_the_encoder_and_leaves_the_decoder(tmp_path):
    """Positions are resized to the larger views."""
    mae, new = small_mae(heads=1), small_mae(heads=1, image_size=48, decoder_dim=32)
    torch.save(public(mae.encoder), tmp_path / "dino.pth")
    before = {k: w.clone() for k, w in new.decoder.state_dict().items()}
    line = C.init_from(new, tmp_path / "dino.pth")
    assert "decoder starts anew" in line and "32 px" in line
    assert equal(new.decoder.state_dict(), before)
    larger, view = C.load_encoder(tmp_path / "dino.pth", 48), some_view(S=48)
    assert torch.equal(new.encoder.features(view), larger.features(view))


# ---- bad input -----------------------------------------------------------------------------------


class Hostile:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "hacked"),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_unrun(tmp_path, as_zip):
    spoiled, run = {"model": Hostile(tmp_path), "config": {}}, tmp_path / "run"
    run.mkdir()
    torch.save(spoiled, tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match="mkdir"):
        C.load_encoder(tmp_path / "x.pth")
    os.rename(tmp_path / "x.pth", run / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        call("pretrain.py", "--resume", run, cwd=tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "changes, config, word",
    [
        ({"norm.bias": None}, TWO_HEADS, "norm.bias"),
        ({"reg": torch.zeros(2)}, TWO_HEADS, "reg"),
        ({"blocks.99999999.norm1.bias": torch.zeros(64)}, TWO_HEADS, "blocks.2"),
        ({"pos_embed": torch.zeros(1, 19, 64)}, TWO_HEADS, "pos_embed"),
        ({"patch_embed.proj.weight": torch.zeros(64, 1, 8, 8)}, TWO_HEADS, "patch_embed"),
        ({}, {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({}, {"num_attention_heads": 5}, "5 heads"),
    ],
)
def test_a_match_in_part_is_refused_by_name(tmp_path, changes, config, word):
    weights = public(small_mae().encoder) | changes
    torch.save({k: w for k, w in weights.items() if w is not None}, tmp_path / "x.pth")
    write_config(tmp_path, **config)
    with pytest.raises(UserError, match=word):
        C.load_encoder(tmp_path / "x.pth")


def test_a_pth_that_is_larger_than_its_file_is_refused(tmp_path):
    weights = {"cls_token": torch.zeros(1, 1, 1).expand(1, 1, 10**10)}  # 40 GB in 1 kB
    torch.save(weights, tmp_path / "view.pth")
    with pytest.raises(UserError, match="larger than the file"):
        C.load_encoder(tmp_path / "view.pth")
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in files.items():
            new.writestr(name, content)
    with pytest.raises(UserError, match="packed"):
        C.load_encoder(tmp_path / "small.pth")


# ---- a network that somebody changed -------------------------------------------------------------


class Adding(M.ViT):
    """With buffers of kinds that no public file has, and layers whose names begin as those of others."""

    def __init__(self, *args, dim, **sizes):
        super().__init__(*args, dim=dim, **sizes)
        self.register_buffer("local", torch.tensor([True, False]))
        self.register_buffer("turns", torch.linspace(0, 1, 3, dtype=torch.float64))
        self.pooler_norm = torch.nn.LayerNorm(dim, eps=0.1)
        self.norm = torch.nn.LayerNorm(dim, eps=0.01)

    def forward(self, *args):
        return self.pooler_norm(super().forward(*args)) * (1 + self.local.sum() + self.turns.sum())


def test_what_a_network_adds_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(M, "ViT", Adding)
    monkeypatch.setattr(C, "ViT", Adding)
    model = M.MAE(**TINY, decoder_dim=64, decoder_depth=1)
    model.encoder.pooler_norm.weight.data += 1
    C.save_network(model, tmp_path / "model.safetensors", {"run": {"data": "here"}})
    assert C.flags_of(tmp_path) == {"data": "here"}
    close(C.load_encoder(tmp_path).features(some_view(32)), model.encoder.features(some_view(32)))
    assert equal(C.load_mae(tmp_path)[0].state_dict(), model.state_dict())
    save_encoder(model.encoder, tmp_path / "encoder.safetensors")
    again = C.load_encoder(tmp_path / "encoder.safetensors")
    close(again.features(some_view(32)), model.encoder.features(some_view(32)))


class Waving(M.ViT):
    """With an argument that adds no weight."""

    def __init__(self, wave=0, **sizes):
        super().__init__(**sizes)
        self.config["wave"] = wave


def test_init_asks_every_argument_of_the_network(tmp_path, monkeypatch):
    """Also one that no weight tells of."""
    for module in (M, C):
        monkeypatch.setattr(module, "ViT", Waving)
    C.save_network(small_mae(wave=1), tmp_path / "model.safetensors", {})
    assert "encoder and decoder" in C.init_from(small_mae(wave=1), tmp_path)
    with pytest.raises(UserError, match="wave 1, this run wave 0; .*wave=1"):
        C.init_from(small_mae(), tmp_path)


def test_an_mae_comes_back_whole(tmp_path):
    """The same prediction, statistics and attention of the pooler, from a folder alone."""
    model = small_mae()
    model.encoder.pooler = shaken(M.Pooler(64, 2))
    C.save_network(model, tmp_path / "model.safetensors", {"norm_pix": False})
    copy, header = C.load_mae(tmp_path)
    keep, hidden = torch.arange(16).expand(3, -1).split([4, 12], 1)
    patches = masked_patch_gather(some_view(S=32), keep.contiguous(), 8)
    for x, y in zip(model.eval()(patches, keep, hidden), copy(patches, keep, hidden), strict=True):
        close(x, y)
    view = some_view(S=32)
    attention = copy.encoder.patch_attention(view, "pooler")
    close(attention, model.encoder.patch_attention(view, "pooler"))
    assert header["norm_pix"] is False


def test_a_public_file_tells_what_was_predicted(tmp_path):
    for told in ({"norm_pix": False, "floor": 0.15}, {"norm_pix": True, "floor": 0.2}):
        C.save_network(small_mae(), tmp_path / "model.safetensors", told)
        folder = tmp_path / f"hf-{told['norm_pix']}"
        folder.mkdir()
        save_hf(tmp_path, folder, None)
        assert C.load_mae(folder)[1] == told
    config = json.loads((folder / "config.json").read_text())
    del config["norm_pix_floor"]
    (folder / "config.json").write_text(json.dumps(config))
    assert C.load_mae(folder)[1]["floor"] == 1e-3  # of a file of others
