"""pretrain.py as a user runs it, on a small packed set, and what its loop promises."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import call, draw_folder, equal, state_of

import data
import mask as masking
import pretrain
from common import evaluate, train
from common.formats import as_convolution
from common.train import UserError, read_log
from kernels import patches
from model import ViT

QUICK = ["--device", "cpu", "--batch-size", 16, "--epochs", 2]
SIZE = dict(dim=32, depth=2, heads=1, image_size=32, decoder_dim=32)
NANO = "nano:" + ",".join(f"{key}={value}" for key, value in SIZE.items())


@pytest.fixture(autouse=True)
def small_network(monkeypatch, no_pictures):
    """A network of 32 numbers for what runs in this process."""
    monkeypatch.setitem(pretrain.SIZES, "nano", pretrain.SIZES["nano"] | SIZE)


def train_in(out, packed, *words):
    words = ["--data", packed, "--out", out, *QUICK, *words]
    return call("pretrain.py", *words, cwd=out.parent, check=0)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """An attn_high run with its pictures, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    words = ["--data", small, "--out", out, *QUICK, "--epochs", 4, "--mask", "attn_high:start=.3"]
    return out, call("pretrain.py", *words, "--model", NANO, cwd=out.parent, check=0)


def test_a_run_writes_what_its_docstring_says(finished):
    out, done = finished
    weights = {"model.safetensors"}
    pictures = {"curves.png", "recon.png", "masks.png"}
    run = {"state.pt", "log.jsonl"}
    assert {p.name for p in out.iterdir()} == weights | pictures | run
    held = [r for r in read_log(out / "log.jsonl") if "val_mse" in r]
    assert held[-1]["val_mse"] < held[0]["val_mse"] and held[-1]["step"] == 20
    assert held[0]["knn_thumbnail"] > 0 and "attention (pooler) of self" in done.stdout
    config = state_of(out)["config"]
    peak = config["blr"] * config["batch_size"] / 256
    rows = [row for row in read_log(out / "log.jsonl") if "lr" in row]
    expected = [train.lr_at(row["step"] - 1, 20, pretrain.WARMUP * 20, peak) for row in rows]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def recipe(monkeypatch, small, *words):
    """The flags of a run after every default is filled in, and its networks; it stops before a step."""

    class Stop(Exception):
        pass

    def stop(flags, parts, *_):
        raise Stop(vars(flags), parts)

    monkeypatch.setattr(train, "Run", stop)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", str(small), "--out", "x", *words])
    with pytest.raises(Stop) as stopped:
        pretrain.main()
    return stopped.value.args


def test_a_mask_changes_nothing_but_the_mask(small, monkeypatch):
    """Views, epochs, batch, second loss and all first weights are one recipe."""
    masks = [name for name in masking.STRATEGIES if masking.NEEDS.get(name) not in ("fg", "parts")]
    found = {m: recipe(monkeypatch, small, "--mask", m) for m in masks}
    assert {flags.pop("mask") for flags, _ in found.values()} == set(masks)
    expected, networks = found["random"]
    for flags, parts in found.values():
        assert flags == expected
        for name in ("model", "contrast"):
            assert equal(parts[name].state_dict(), networks[name].state_dict())


@pytest.mark.parametrize("contrast", ["none", "pooler", "cls"])
def test_the_default_length_is_a_number_of_views(small, monkeypatch, contrast):
    flags, _ = recipe(monkeypatch, small, "--contrast", contrast)
    images, default = len(data.open_split(small, "train")["images"]), pretrain.DEFAULTS["cpu"]
    assert flags["batch_size"] == default["batch"]
    of_an_epoch = images // default["batch"] * default["batch"]
    assert abs(flags["epochs"] * of_an_epoch - default["views"]) <= of_an_epoch
    flags, _ = recipe(monkeypatch, small, "--model", "nano:simmim=1")
    assert (flags["mask"], flags["ratio"], flags["contrast"]) == ("squares", "0.6", "none")


@pytest.mark.parametrize(
    ("device", "epochs", "least", "most"),
    [
        ("cpu", 38, 8, 10),
        ("cuda", 195, 10, 20),
        ("cuda", 2604, 10, 20),
        ("cpu", 4, 3, 5),
        ("cpu", 1, 2, 2),
    ],
)
def test_a_curve_has_points_enough(device, epochs, least, most):
    flags = SimpleNamespace(epochs=epochs, contrast="none", mask="random", given={"epochs"})
    pretrain.set_length(flags, 1680, 64, torch.device(device), 1)
    points = {*range(0, epochs, flags.eval_every), epochs}
    assert least <= len(points) <= most


@pytest.mark.parametrize("images", [63, 1000, 1680, 7269])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_is_as_long_for_few_images_as_for_many(device, images):
    """Also where many of them do not fill a batch, and wait for another epoch."""
    flags = SimpleNamespace(contrast="none", mask="random", given=set())
    pretrain.set_length(flags, images, 64, torch.device(device), 1)
    steps = images // flags.batch_size
    views = pretrain.DEFAULTS[device]["views"]
    assert flags.epochs * steps * flags.batch_size == pytest.approx(views, rel=0.1)


def test_a_picture_alone_has_no_other_one_to_take_a_map_or_a_pair_from():
    flags = SimpleNamespace(contrast="none", mask="fg_heavy", batch_size=1, given={"batch_size"})
    with pytest.raises(UserError, match="too few"):
        pretrain.set_length(flags, 100, 64, torch.device("cpu"), 1)


@pytest.mark.parametrize(("N", "batch"), [(64, 256), (144, 128), (256, 64)])
def test_a_step_of_a_mac_has_no_more_tokens_than_torch_adds_up_rightly(N, batch):
    flags = SimpleNamespace(contrast="none", mask="random", given=set())
    pretrain.set_length(flags, 5000, N, torch.device("mps"), 1)
    assert flags.batch_size == batch and batch * (N + 1) < 32_767


@pytest.mark.parametrize(
    "device, asked, fails, compiles",
    [
        ("cuda", None, None, True),
        ("cuda", False, None, False),
        ("cuda", None, "no C compiler", False),
        ("cuda", True, "no C compiler", False),
        ("cpu", None, "needs a GPU", False),
        ("cpu", True, "needs a GPU", True),
    ],
)
def test_all_is_compiled_or_nothing(monkeypatch, device, asked, fails, compiles):
    monkeypatch.setattr(patches, "IMPL", "auto")
    monkeypatch.setattr(patches, "why_not_triton", lambda _: fails)
    given = set() if asked is None else {"compile"}
    flags = SimpleNamespace(compile=asked, ratio="0.75", given=given)
    line = pretrain.settle_compiler(flags, torch.device(device))
    assert flags.compile is compiles
    triton = device == "cuda" and compiles
    assert f"kernels in {'triton' if triton else 'torch'}" in line
    assert ("no C compiler" in line) == (fails == "no C compiler")


def test_a_priority_without_an_order_is_refused(small, tmp_path, monkeypatch):
    """The logarithm of a foreground that is 0 in many patches."""
    monkeypatch.setitem(masking.STRATEGIES, "random", lambda p, noise, *_: noise - 1 / (noise > 0))
    words = ["--data", small, "--out", tmp_path / "run", *QUICK]
    monkeypatch.setattr(sys, "argv", [str(word) for word in ["pretrain.py", *words]])
    with pytest.raises(AssertionError, match="--mask random: .* priorities are not finite"):
        pretrain.main()


def test_what_is_random_in_training_is_not_in_evaluations(monkeypatch):
    """Dropout, which a student may add to model.py."""
    model = torch.nn.Dropout()
    found = []
    monkeypatch.setattr(evaluate, "masked_mse", lambda *_: found.append(model.training) or 0.0)
    monkeypatch.setattr(data, "has_labels", lambda _: False)
    evaluate.evaluate(model, None, None, ({}, {"header": {}}), {}, None, 1)
    assert found == [False] and model.training


def test_two_strategies_see_the_same_images_and_crops(small, tmp_path, monkeypatch):
    view_images, sample = data.view_images, masking.sample
    views, kept = [], []
    monkeypatch.setattr(data, "view_images", lambda *args: noted(views, view_images(*args)))
    monkeypatch.setattr(masking, "sample", lambda *args: noted(kept, sample(*args)))
    for name in ("random", "attn_high:start=0"):
        train_in(tmp_path / name[:4], small, "--mask", name, "--epochs", 1)
    views, kept = [x for x in views if len(x) == 16], [ids for ids, _ in kept if len(ids) == 16]
    assert len(views) == len(kept) == 10  # steps of both runs
    assert torch.equal(torch.cat(views[:5]), torch.cat(views[5:]))
    assert not torch.equal(torch.cat(kept[:5]), torch.cat(kept[5:]))


def noted(results, value):
    results.append(value)
    return value


def test_a_ratio_may_rise():
    assert pretrain.ends_of("0.5:0.9") == (0.5, 0.9) and pretrain.ends_of("0.75") == (0.75, 0.75)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--dtype bf16", "--contrast pooler:dcl=0", "--compile"])
def test_other_ways_to_compute_it(small, tmp_path, words):
    train_in(tmp_path / "out", small, *words.split(), "--epochs", 1)
    row = [r for r in read_log(tmp_path / "out" / "log.jsonl") if "contrastive_loss" in r][-1]
    assert 0 < row["contrastive_loss"] < 6


def test_the_losses_are_one_graph_for_the_compiler(small, tmp_path, monkeypatch):
    """What a GPU compiles: no break, with and without second views, and the same losses."""
    compile_ = torch.compile
    one_graph = dict(backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, **one_graph))
    losses = []
    for flag in ("--compile", "--no-compile"):
        train_in(tmp_path / flag, small, flag, "--mask", "attn_high", "--dtype", "fp32")
        rows = read_log(tmp_path / flag / "log.jsonl")
        losses.append([r[k] for r in rows for k in ("loss", "contrastive_loss") if k in r])
    assert len(losses[0]) > 2 and losses[0] == pytest.approx(losses[1], rel=2e-4)


NO_ATTENTION = [name for name, need in masking.NEEDS.items() if need in ("view", "difficulty")]


@pytest.mark.parametrize("mask", ["random", *NO_ATTENTION])
def test_the_pooler_changes_no_bit_of_encoder_and_decoder(small, tmp_path, mask):
    """Beside any mask that reads no attention, the MAE of --contrast pooler is that of none."""
    for contrast in ("none", "pooler"):
        words = ["--mask", mask, "--contrast", contrast, "--epochs", 2]
        train_in(tmp_path / contrast, small, *words)
    plain, both = (state_of(tmp_path / name)["model"] for name in ("none", "pooler"))
    own = {name for name in both if name.startswith("encoder.pooler.")}
    assert len(own) == 2 and both.keys() - own == plain.keys()
    assert all(torch.equal(plain[name], both[name]) for name in plain)


def test_the_pooler_learns_beside_it_and_cls_trains_the_encoder(small, tmp_path):
    changed = {}
    for name, weight in (("pooler", "encoder.pooler.kv.weight"), ("cls", "encoder.cls_token")):
        found = []
        for share in (0, 1):  # of the loss
            out = tmp_path / f"{name}{share}"
            train_in(out, small, "--contrast", f"{name}:weight={share}", "--epochs", 1)
            found.append(state_of(out)["model"])
        changed[name] = {k for k, w in found[0].items() if not torch.equal(w, found[1][k])}
        assert weight in changed[name]
    assert changed["pooler"] == {"encoder.pooler.kv.weight", "encoder.pooler.query_token"}
    assert "decoder.decoder_pred.weight" in changed["cls"]  # which reads the encoder


def test_a_run_teaches_another_and_a_public_checkpoint_does_in_two_steps(small, tmp_path):
    """--init dino.pth adapts it to these images; --teacher lets what came of it guide."""
    weights = as_convolution(ViT(32, 8, dim=32, depth=2, heads=1).state_dict())
    dino = {f"module.backbone.{name}": w for name, w in weights.items()}
    torch.save({"teacher": dino, "epoch": 7}, tmp_path / "dino.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 1}')
    done = train_in(tmp_path / "adapted", small, "--init", tmp_path / "dino.pth", "--epochs", 1)
    assert "the decoder starts anew" in done.stdout
    for name, source in (("dino.pth", "cls"), ("adapted", "pooler")):
        words = ["--mask", "attn_low:beta=2", "--teacher", tmp_path / name, "--epochs", 1]
        done = train_in(tmp_path / f"by-{name}", small, *words)
        assert f"attention ({source}) of {tmp_path / name}" in done.stdout
        maps = state_of(tmp_path / f"by-{name}")["guide"]["maps"]
        assert (maps > 0).all() and len(maps) == len(data.open_split(small, "train")["images"])


def test_images_are_packed_first_and_unlabelled_ones_train_too(tmp_path):
    draw_folder(tmp_path / "pictures", classes=1, each=40)
    words = ["--data", tmp_path / "pictures" / "class0", *QUICK]
    done = call("pretrain.py", *words, cwd=tmp_path, check=0)
    assert (tmp_path / "datasets" / "class0" / "train.safetensors").exists()
    assert "kNN" not in done.stdout and "no Top-1" in done.stdout
    assert len(list((tmp_path / "runs").glob("class0-*/model.safetensors"))) == 1
