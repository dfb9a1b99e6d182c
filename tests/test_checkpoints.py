"""Checkpoints of the field against the libraries that made them: the same features, loss, prediction and attention.

The networks are tiny and randomly initialised, their weights large enough that a wrong matrix would
show.
"""

import argparse
import json
import os

import pytest
import torch
import transformers
from conftest import ROOT, call, refused
from safetensors.torch import load_file, save_file

import common.checkpoints as C
import model as M
from common import formats
from common.command import parse_keys
from common.io import UserError
from common.lora import save_encoder
from export import export
from kernels.gather import MEAN, STD, masked_patch_gather
from kernels.loss import reconstruction_loss

TINY = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 2}
HF = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 8,
    "attn_implementation": "eager",
}
HF_DECODER = {
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 256,
}


def shaken(module, seed=0):
    """Every parameter moved: biases and norms too, which begin at 0 and 1 and would hide a mistake."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in module.named_parameters():
            if "pos_embed" not in name and "position" not in name:
                w.add_(torch.randn(w.shape, generator=noise) * 0.1)
    return module.eval()


def small_mae(**changes):
    torch.manual_seed(0)
    return shaken(M.MAE(**TINY | {"decoder_dim": 64, "decoder_depth": 1} | changes))


def some_view(B=3, S=32):
    return torch.randint(
        0, 256, (B, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def pixels(view, mean=MEAN, std=STD):
    """What other libraries are given: (B, 3, S, S) fp32."""
    x = view.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def public(encoder):
    return C.as_convolution({k: w.clone() for k, w in encoder.state_dict().items()})


# ---- Hugging Face, both directions ---------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_mae(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.ViTMAEConfig(**HF, **HF_DECODER, norm_pix_loss=True, layer_norm_eps=1e-6)
    theirs = shaken(transformers.ViTMAEForPreTraining(config))
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return theirs, folder


def check_pretraining(ours, theirs, view):
    """Same features, prediction and loss under the same noise: norm_pix with MAE's own floor, s0^2
    = 1e-6.
    """
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    order = noise.argsort(1)
    keep, hidden = order[:, :4].contiguous(), order[:, 4:].contiguous()
    with torch.no_grad():
        out = theirs(pixels(view), noise=noise)
        pred, *_ = ours(masked_patch_gather(view, keep, 8), keep, hidden)
    close(pred, out.logits.gather(1, hidden[..., None].expand(-1, -1, 192)), 2e-5)
    loss = reconstruction_loss(pred, view, hidden, 8, norm_pix=True, floor=1e-3)
    close(loss, out.loss)
    with torch.no_grad():
        everything = theirs.vit(
            pixels(view), noise=torch.arange(16.0).expand(3, -1)
        )  # in order, 4 of them kept
        first = torch.arange(4).expand(3, -1).contiguous()
        close(
            ours.encoder(masked_patch_gather(view, first, 8), first), everything.last_hidden_state
        )


def test_a_hugging_face_mae_is_ours(hf_mae):
    theirs, folder = hf_mae
    ours = small_mae()
    assert "encoder and decoder" in C.init_from(ours, folder)
    check_pretraining(ours.eval(), theirs, some_view())


def test_our_mae_is_a_hugging_face_mae(tmp_path):
    ours = small_mae()
    C.save_model(ours, tmp_path / "model.safetensors", {"norm_pix": True})
    folder, use = export(tmp_path, "hf")
    assert "ViTMAEForPreTraining" in use
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    check_pretraining(ours, theirs.eval(), some_view())
    back = M.MAE(**ours.config)
    C.init_from(back, folder)
    assert all(torch.equal(w, C.public_weights(ours)[k]) for k, w in C.public_weights(back).items())
    vit, info = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        out, features = (
            vit(pixels(some_view()), output_attentions=True),
            ours.encoder.features(some_view()),
        )
    close(features, out.last_hidden_state)
    close(ours.encoder.patch_attention(some_view()), out.attentions[-1][:, :, 0, 1:])


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_hugging_face_vit_is_ours(tmp_path, kind):
    """Its epsilon is 1e-12, its positions are learned, and its pixels had another mean: all is
    taken up.
    """
    torch.manual_seed(2)
    theirs = shaken(getattr(transformers, kind)(transformers.ViTConfig(**HF)))
    theirs.save_pretrained(tmp_path)
    half = [0.5, 0.5, 0.5]
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": half, "image_std": half})
    )
    encoder, size = C.load_encoder(tmp_path)
    vit = getattr(theirs, "vit", theirs)
    with torch.no_grad():
        out = vit(pixels(some_view(), half, half), output_attentions=True)
        assert size == 32 and encoder.norm.eps == 1e-12
        close(encoder.features(some_view()), out.last_hidden_state)
        close(encoder.patch_attention(some_view()), out.attentions[-1][:, :, 0, 1:])
        larger, size = C.load_encoder(tmp_path, image_size=48)
        out = vit(pixels(some_view(S=48), half, half), interpolate_pos_encoding=True)
        assert size == 48
        close(larger.features(some_view(S=48)), out.last_hidden_state)


def test_an_encoder_alone_goes_to_hugging_face_and_back(tmp_path):
    encoder = small_mae().encoder
    save_encoder(encoder, tmp_path / "model.safetensors", {})
    folder, use = export(tmp_path, "hf", image_size=48)
    theirs, info = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert "ViTModel" in use and not info["missing_keys"] and not info["unexpected_keys"]
    back, size = C.load_encoder(folder)
    view = some_view(S=48)
    with torch.no_grad():
        close(theirs(pixels(view)).last_hidden_state, back.features(view))
        assert size == 48 and torch.equal(
            C.load_encoder(tmp_path, 48)[0].features(view), back.features(view)
        )


# ---- MAE, DINO, DINOv2, timm: the same names, in their own wrappings -----------------------------


def wrapped(kind, mae):
    """What the public files of each kind hold, made of our weights by renaming."""
    encoder = public(mae.encoder)
    head = {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
    dino = {f"module.backbone.{k}": w for k, w in encoder.items()} | {
        "module.head.mlp.0.weight": torch.zeros(2, 64)
    }
    args = argparse.Namespace(lr=1e-3, output_dir="out")
    return {
        "mae_encoder": {"model": encoder},
        "mae_full": {
            "model": C.public_weights(mae),
            "optimizer": {"step": 3},
            "args": args,
            "epoch": 7,
        },
        "dino": encoder,
        "dino_full": {
            "student": {k: w + 1 for k, w in dino.items()},
            "teacher": dino,
            "epoch": 9,
            "args": args,
        },
        "dinov2_full": {
            "model": {f"teacher.backbone.{k}": w for k, w in encoder.items()}
            | {"teacher.dino_head.last_layer.weight": torch.zeros(2, 2), "student.cls_token": args}
        },
        "timm": encoder
        | head
        | {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.zeros(64)},
        "timm_checkpoint": {
            "state_dict": encoder | head,
            "arch": "vit_small_patch16_224",
            "args": args,
        },
    }[kind]


ROUGH_HEADS = {"num_attention_heads": 2}  # 64 wide is one head here, if nobody says otherwise


@pytest.fixture(autouse=True)
def small_is_public(monkeypatch):
    """The small networks of these tests count as a public size: one head of 64."""
    monkeypatch.setitem(formats.HEADS, 64, 1)


@pytest.mark.parametrize(
    "kind",
    ["mae_encoder", "mae_full", "dino", "dino_full", "dinov2_full", "timm", "timm_checkpoint"],
)
@pytest.mark.parametrize("as_zip", [True, False])
def test_public_files_are_encoders(tmp_path, kind, as_zip):
    mae, path = small_mae(), tmp_path / "anything.bin"
    torch.save(wrapped(kind, mae), path, _use_new_zipfile_serialization=as_zip)
    (tmp_path / "config.json").write_text(json.dumps(ROUGH_HEADS))
    encoder, size = C.load_encoder(path)
    assert size == 32 and torch.equal(
        encoder.features(some_view()), mae.encoder.features(some_view())
    )


def test_timm_safetensors(tmp_path):
    mae = small_mae(heads=1)
    save_file(wrapped("timm", mae), tmp_path / "x.safetensors", {"format": "pt"})
    encoder, _ = C.load_encoder(tmp_path / "x.safetensors")  # dim/64 heads
    assert torch.equal(encoder.features(some_view()), mae.encoder.features(some_view()))


def test_dinov2_layer_scale_is_folded_exactly(tmp_path):
    mae, view = small_mae(image_size=28, patch_size=14, heads=1), some_view(S=28)
    weights, noise = public(mae.encoder), torch.Generator().manual_seed(3)
    gammas = {
        f"blocks.{i}.ls{j}.gamma": torch.rand(64, generator=noise) for i in range(2) for j in (1, 2)
    }
    torch.save(weights | gammas | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2.pth")
    encoder, size = C.load_encoder(tmp_path / "dinov2.pth")
    x = mae.encoder.embed(*mae.encoder.all_patches(view))
    for i, block in enumerate(mae.encoder.blocks):  # DINOv2's block, as its paper has it
        x = x + gammas[f"blocks.{i}.ls1.gamma"] * block.attn(block.norm1(x))
        x = x + gammas[f"blocks.{i}.ls2.gamma"] * block.mlp(block.norm2(x))
    assert size == 28
    close(encoder.features(view), mae.encoder.norm(x))
    torch.save(
        weights | gammas | {"register_tokens": torch.zeros(1, 4, 64)}, tmp_path / "dinov2.pth"
    )
    with pytest.raises(UserError, match="register tokens"):
        C.load_encoder(tmp_path / "dinov2.pth")


def timm_names(depth):
    """The parameters of timm 1.0's vit_small_patch16_224 and kin with num_classes=0, as its
    state_dict has them.
    """
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    stems = [
        "patch_embed.proj",
        *(f"blocks.{i}.{layer}" for i in range(depth) for layer in layers),
        "norm",
    ]
    return {"cls_token", "pos_embed"} | {
        f"{stem}.{end}" for stem in stems for end in ("weight", "bias")
    }


def test_export_for_timm_has_its_names_and_shapes(tmp_path):
    """vit_small_patch16_224: 384 wide, 12 deep, 197 positions. Held against timm itself where it
    can be imported.
    """
    torch.manual_seed(0)
    vit = shaken(M.ViT(128, 16, 384, 12, 6))
    save_encoder(vit, tmp_path / "model.safetensors", {})
    out, line = export(tmp_path, "timm", image_size=224)
    found = {k: tuple(w.shape) for k, w in load_file(out).items()}
    assert found.keys() == timm_names(12)
    assert found["patch_embed.proj.weight"] == (384, 3, 16, 16) and found["pos_embed"] == (
        1,
        197,
        384,
    )
    assert found["blocks.11.attn.qkv.weight"] == (1152, 384) and found["blocks.0.mlp.fc1.bias"] == (
        1536,
    )
    assert "vit_small_patch16_224" in line and "img_size=224" in line and "num_heads=6" in line
    try:
        import timm
    except Exception as problem:  # it needs torchvision, which does not import beside a CPU torch
        pytest.skip(
            f"names and shapes fit; timm itself does not import here ({type(problem).__name__})"
        )
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(load_file(out), strict=True)
    view = some_view(B=1, S=224)
    with torch.no_grad():
        close(
            theirs.forward_features(pixels(view)),
            C.load_encoder(tmp_path, 224)[0].features(view),
            3e-5,
        )


def test_export_as_mae_holds_everything_and_nothing_else(tmp_path):
    mae = small_mae()
    C.save_model(mae, tmp_path / "model.safetensors", {})
    done = call(
        "export.py",
        tmp_path,
        "--to",
        "mae",
        "--out",
        tmp_path / "mae.safetensors",
        cwd=ROOT,
        check=0,
    )
    assert "mae.safetensors" in done.stdout and done.stderr == ""
    written, expected = load_file(tmp_path / "mae.safetensors"), C.public_weights(mae)
    assert written.keys() == expected.keys() and all(
        torch.equal(written[k], expected[k]) for k in written
    )
    line = refused(call("export.py", tmp_path, "--to", "merged", cwd=ROOT))
    assert "has no adapter" in line
    for out in (tmp_path / "model.safetensors", tmp_path):
        with pytest.raises(UserError, match="is there already"):
            export(tmp_path, "mae", out)


def test_export_replaces_nothing(tmp_path):
    C.save_model(small_mae(), tmp_path / "run" / "model.safetensors", {})
    mine = tmp_path / "README.md"
    mine.write_text("mine")

    def run(*words):
        return call("export.py", tmp_path / "run", *words, cwd=tmp_path)

    assert "README.md is there already" in refused(run("--to", "timm", "--out", mine))
    for below in (mine / "hf", mine / "x" / "timm.safetensors"):
        assert "README.md" in refused(run("--to", "hf", "--out", below))
    assert f"{tmp_path} is there already" in refused(run("--to", "timm", "--out", tmp_path))
    assert mine.read_text() == "mine"
    for to, name in (("timm", "timm.safetensors"), ("hf", "hf/model.safetensors")):
        assert run("--to", to).returncode == 0
        before = (tmp_path / "run" / name).read_bytes()
        assert f"{name.split('/')[0]} is there already" in refused(
            run("--to", to, "--image-size", 64)
        )
        assert (tmp_path / "run" / name).read_bytes() == before
    line = refused(run("--to", "mae", "--image-size", 8 * 10**7))
    assert "--image-size 80000000" in line and not (tmp_path / "run" / "mae.safetensors").exists()


def test_a_simmim_run_goes_out_as_its_encoder(tmp_path):
    model = M.SimMIM(32, 8, 64, 2, 1)
    C.save_model(model, tmp_path / "run" / "model.safetensors", {})
    for to in ("timm", "mae"):
        out, _ = export(tmp_path / "run", to, tmp_path / f"{to}.safetensors")
        encoder, _ = C.load_encoder(out) if to == "mae" else (None, None)
        assert not [k for k in load_file(out) if "decoder" in k or "mask_token" in k]
        if encoder:
            view = some_view(B=2, S=32)
            assert torch.equal(encoder.features(view), model.encoder.features(view))


# ---- a start for pre-training --------------------------------------------------------------------


def test_init_takes_the_encoder_and_leaves_the_decoder(tmp_path):
    mae, new = small_mae(heads=1), small_mae(heads=1, image_size=48, decoder_dim=32)
    torch.save(public(mae.encoder), tmp_path / "dino.pth")
    before = {k: w.clone() for k, w in new.decoder.state_dict().items()}
    line = C.init_from(new, tmp_path / "dino.pth")
    assert "decoder starts anew" in line and "resized from 32 px" in line
    assert all(torch.equal(w, before[k]) for k, w in new.decoder.state_dict().items())
    view, (larger, _) = some_view(S=48), C.load_encoder(tmp_path / "dino.pth", 48)
    assert torch.equal(new.encoder.features(view), larger.features(view))


def test_init_goes_on_with_a_decoder_that_fits(tmp_path):
    mae, new = small_mae(heads=1), small_mae(heads=1)
    with torch.no_grad():
        for w in new.parameters():
            w.zero_()
    C.save_model(mae, tmp_path / "model.safetensors", {})
    assert "encoder and decoder" in C.init_from(new, tmp_path)
    theirs, ours = mae.state_dict(), new.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if "stats_head" not in k)
    assert not ours["decoder.stats_head.weight"].any()  # ours alone, in no public file


@pytest.mark.parametrize(
    "change, says",
    [
        ({"decoder_dim": 32}, "decoder_dim 64.*run decoder_dim 32.*--model .*decoder_dim=64"),
        ({"decoder_depth": 2}, "decoder_depth 1.*run decoder_depth 2.*--model .*decoder_depth=1"),
        ({"depth": 3}, "depth 2, this run depth 3.*--model .*depth=2"),
        ({"heads": 4}, "heads 2, this run heads 4.*--model .*heads=2"),
        ({"patch_size": 16}, "patch_size 8, this run patch_size 16.*--model .*patch_size=8"),
        ({"dim": 128}, "dim 64, this run dim 128.*--model .*dim=64"),
    ],
)
def test_init_of_another_shape_names_both(tmp_path, change, says):
    C.save_model(small_mae(), tmp_path / "model.safetensors", {})
    new = small_mae(**change)
    before = {k: w.clone() for k, w in new.state_dict().items()}
    with pytest.raises(UserError, match=says):
        C.init_from(new, tmp_path)
    assert all(torch.equal(w, before[k]) for k, w in new.state_dict().items())


def test_init_names_the_flags_that_would_fit(tmp_path):
    c = {k: M.SIZES["nano"][k] for k in ("dim", "depth", "heads")}
    save_encoder(M.ViT(32, 8, **c), tmp_path / "nano.safetensors", {})
    with pytest.raises(UserError, match="give --model") as told:
        C.init_from(small_mae(), tmp_path / "nano.safetensors")
    words = str(told.value).split("--model ")[1]
    assert parse_keys(words, M.SIZES, "--model")[1] == M.SIZES["nano"]


def test_half_a_decoder_is_refused(tmp_path):
    weights = C.public_weights(small_mae(heads=1))
    del weights["decoder_norm.bias"]
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="Missing key.*decoder.decoder_norm.bias"):
        C.init_from(small_mae(heads=1), tmp_path / "x.pth")
    for to in ("mae", "timm", "hf"):
        with pytest.raises(UserError, match="Missing key.*decoder_norm.bias"):
            export(tmp_path / "x.pth", to)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_loading_leaves_the_seed_and_the_training_alone(tmp_path):
    C.save_model(small_mae(), tmp_path / "model.safetensors", {})
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    encoder, _ = C.load_encoder(tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert (
        all(w.requires_grad and not w.is_meta for w in encoder.parameters())
        and not encoder.training
    )
    encoder.train().features(some_view()).sum().backward()


def test_resized_positions_keep_what_is_smooth():
    """A ramp stays a ramp, the CLS row stays itself, the same grid is not touched."""
    ramp = torch.linspace(0, 1, 8)
    grid = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), 2)
    pos = torch.cat([torch.full((1, 1, 2), 7.0), grid.view(1, 64, 2)], 1)
    assert C.resize_positions(pos, 8) is pos
    out = C.resize_positions(pos, 16)
    assert torch.equal(out[:, 0], pos[:, 0]) and out.shape == (1, 257, 2)
    grid = out[0, 1:].view(16, 16, 2)[4:-4, 4:-4]
    down, across = (
        grid[2:] - grid[:-2],
        grid[:, 2:] - grid[:, :-2],
    )  # two steps here are one of the ramp, 1/7
    close(down, torch.tensor([1 / 7, 0]).expand_as(down))
    close(across, torch.tensor([0, 1 / 7]).expand_as(across))


# ---- bad input -----------------------------------------------------------------------------------


class Hostile:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "hacked"),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_unrun(tmp_path, as_zip):
    torch.save(
        {"model": Hostile(tmp_path)}, tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip
    )
    with pytest.raises(UserError, match=r"wants to run \w+\.mkdir"):
        C.load_encoder(tmp_path / "x.pth")
    assert not (tmp_path / "hacked").exists()


def test_files_that_are_no_checkpoint_are_one_line(tmp_path):
    torch.save(wrapped("mae_full", small_mae()), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"Please log in",
        "pickled": b"\x80\x04K\x01.",
        "zip": b"PK\x03\x04 no",
        "cut": whole[: len(whole) // 2],
        "json": b"12345678{not json",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as told:
            C.load_encoder(tmp_path / name)
        assert "\n" not in str(told.value)
    foreign = (
        (torch.zeros(3), "cls_token"),
        ({"model": {"a": torch.zeros(3)}}, "cls_token"),
        ([1], "cls_token"),
        ({"model": small_mae().state_dict()}, "the folder"),
    )
    for what, says in foreign:
        torch.save(what, tmp_path / "other.pth")
        with pytest.raises(UserError, match=says):
            C.load_encoder(tmp_path / "other.pth")
    for path in (tmp_path, tmp_path / "nothing.pth"):
        with pytest.raises(UserError, match="no encoder at"):
            C.load_encoder(path)


def changed(weights, **changes):
    """weights with some put in, taken out (None) or replaced; __ stands for a dot."""
    changes = {k.replace("__", "."): w for k, w in changes.items()}
    return {k: w for k, w in (weights | changes).items() if w is not None}


@pytest.mark.parametrize(
    "changes, config, says",
    [
        (
            {"norm__bias": None, "reg": torch.zeros(2)},
            ROUGH_HEADS,
            "Missing key.*norm.bias.*Unexpected key.*reg",
        ),
        (
            {"blocks__1__norm1__bias": torch.zeros(3)},
            ROUGH_HEADS,
            "size mismatch for .*norm1.bias",
        ),
        ({"blocks__99999999__norm1__bias": torch.zeros(64)}, ROUGH_HEADS, "has no array.*blocks.2"),
        ({"pos_embed": torch.zeros(1, 19, 64)}, ROUGH_HEADS, r"pos_embed.*\(1, 19, 64\)"),
        ({"pos_embed": torch.zeros(17, 64)}, ROUGH_HEADS, "pos_embed"),
        (
            {"patch_embed__proj__weight": torch.zeros(64, 1, 8, 8)},
            ROUGH_HEADS,
            r"patch_embed.*\(64, 64\)",
        ),
        ({"norm__bias": None}, {"hidden_size": 32}, "config.json.*dim.*32"),
        ({}, {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({}, {"num_attention_heads": 5}, "5 heads"),
        ({"dist_token": torch.zeros(1, 1, 64)}, ROUGH_HEADS, "Unexpected key.*dist_token"),
    ],
)
def test_a_match_in_part_lists_both_sides(tmp_path, changes, config, says):
    torch.save(changed(public(small_mae().encoder), **changes), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        C.load_encoder(tmp_path / "x.pth")


def test_heads_that_nobody_says_and_sizes_that_do_not_fit(tmp_path):
    torch.save(public(M.ViT(32, 8, 48, 1, 3)), tmp_path / "x.pth")
    with pytest.raises(UserError, match="num_attention_heads"):
        C.load_encoder(tmp_path / "x.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    with pytest.raises(UserError, match="no multiple"):
        C.load_encoder(tmp_path / "x.pth", image_size=36)
    assert C.load_encoder(tmp_path / "x.pth")[0].blocks[0].attn.heads == 3
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        C.load_encoder(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "dim, heads", [(1280, 16), (1408, 16), (1664, 16), (1536, 24), (1024, 16), (192, 3)]
)
def test_heads_of_the_public_sizes(tmp_path, dim, heads):
    """MAE's ViT-H is 1280 wide and has 16 heads of 80: width / 64 would be 20, and its features 86
    % off.
    """
    vit = M.ViT(16, 16, dim, 1, heads).eval()
    torch.save(public(vit), tmp_path / "x.pth")
    found, view = C.load_encoder(tmp_path / "x.pth")[0], some_view(S=16)
    assert found.blocks[0].attn.heads == heads and torch.equal(
        found.features(view), vit.features(view)
    )


def test_a_width_that_no_public_network_has_needs_a_config(tmp_path):
    torch.save(
        public(M.ViT(16, 16, 1152, 1, 16)), tmp_path / "x.pth"
    )  # 18 heads of 64 would go, too
    with pytest.raises(UserError, match=r"1152 wide, .* heads; .* \{\"num_attention_heads\": N\}"):
        C.load_encoder(tmp_path / "x.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 16}')
    assert C.load_encoder(tmp_path / "x.pth")[0].blocks[0].attn.heads == 16
    for wrong in (0, -1, 7, "16", 2.0):
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": wrong}))
        with pytest.raises(UserError, match="heads"):
            C.load_encoder(tmp_path / "x.pth")


def test_decoder_heads_are_believed(tmp_path):
    """A Hugging Face MAE whose decoder has 4 heads of 16: the same prediction and loss here, there
    and back again.
    """
    torch.manual_seed(1)
    config = transformers.ViTMAEConfig(
        **HF,
        **HF_DECODER | {"decoder_num_attention_heads": 4},
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
    )
    theirs = shaken(transformers.ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path / "hf")
    C.init_from(ours := small_mae(decoder_heads=4), tmp_path / "hf")
    check_pretraining(ours.eval(), theirs, some_view())
    assert ours.config["decoder_heads"] == 4
    C.save_model(ours, tmp_path / "ours" / "model.safetensors", {"norm_pix": True})
    C.init_from(again := small_mae(decoder_heads=4), tmp_path / "ours")
    check_pretraining(again.eval(), theirs, some_view())
    folder, _ = export(tmp_path / "ours", "hf")
    back = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    check_pretraining(ours, back, some_view())
    assert M.MAE(**ours.config).decoder.decoder_blocks[0].attn.heads == 4
    with pytest.raises(UserError, match="decoder_heads 4"):
        C.init_from(small_mae(), tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(config.to_dict() | {"decoder_num_attention_heads": 5})
    )
    with pytest.raises(UserError, match="decoder_heads 5"):
        C.init_from(small_mae(), tmp_path / "hf")


def test_the_table_knows_every_name():
    """Each parameter of ours has a Hugging Face name of its own, which leads back to it."""
    ours = []
    for name in C.public_weights(small_mae()):
        parts = formats.QKV if "attn.qkv" in name else ["attn.qkv"]
        ours += [name.replace("attn.qkv", part) for part in parts]
    theirs = [formats.renamed(name, formats.HF) for name in ours]
    assert len(set(theirs)) == len(ours) and not set(theirs) & set(ours)
    assert [formats.renamed(name, formats.FROM_HF) for name in theirs] == ours
