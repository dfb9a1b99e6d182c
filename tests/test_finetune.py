"""finetune_lora.py: heads against plain formulas, what its loop promises, and runs on a small packed set."""

import json
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import call, draw_folder

import data
import finetune_lora
from common import classifier, plots, stats, train
from common.command import LOCKS
from common.io import UserError
from common.lora import save_encoder
from common.train import read_log, seeded
from model import ViT

QUICK = ["--device", "cpu", "--dtype", "fp32", "--epochs", 2, "--batch-size", 16]


@pytest.fixture(scope="package")
def encoder(tmp_path_factory):
    """A very small encoder that never learned anything, as a run folder."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("encoder")
    save_encoder(ViT(32, 8, 32, 2, 2), out / "model.safetensors", {})
    return out


def main(*words, pictures=False):
    """finetune_lora.py in this process: a subprocess would spend seconds on imports, and so do the
    pictures.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune_lora.py", *map(str, words)])
        if not pictures:
            patch.setattr(plots, "training", lambda *_: None)
            patch.setattr(plots, "confusion", lambda *_: None)
        try:
            with LOCKS:
                finetune_lora.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def top1_of(out, packed):
    """What the files of a run alone say of the pictures of val, in percent."""
    net, _ = finetune_lora.load_classifier(out)
    held = data.open_split(packed, "val")
    autocast = train.autocast_of(torch.device("cpu"), torch.float32)
    pooled = classifier.pooled_of(net, held, torch.arange(len(held["images"])), autocast)
    return 100 * (net(pooled).argmax(1) == held["labels"]).float().mean().item()


@pytest.fixture(scope="package")
def lora(encoder, small, tmp_path_factory):
    """One finished LoRA run."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    words = [encoder, "--data", small, "--method", "lora", "--keep", 0.5, "--out", out, *QUICK]
    main(*words, pictures=True)
    return out


# ---- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", classifier.MARGINS)
def test_margin_heads_are_their_formula(kind):
    torch.manual_seed(0)
    head, m, s = classifier.MarginHead(6, 5, kind, 0.5, 16.0).double(), 0.5, 16.0
    head.t.fill_(0.3)
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(5, (40,))
    x[0] = -head.weight[y[0]].detach()  # theta = pi: theta + m would come round again
    found = head.eval()(x, y).detach()
    for i in range(40):
        for j in range(5):
            cosine = float(F.cosine_similarity(x[i], head.weight[j].detach(), dim=0))
            theta = math.acos(
                max(-1, min(1, float(F.cosine_similarity(x[i], head.weight[y[i]].detach(), dim=0))))
            )
            with_margin = (
                math.cos(theta + m) if theta + m <= math.pi else math.cos(theta) - m * math.sin(m)
            )
            with_margin = math.cos(theta) - m if kind == "cosface" else with_margin
            hard = kind == "curricularface" and cosine > with_margin
            expected = with_margin if j == y[i] else cosine * (0.3 + cosine) if hard else cosine
            assert found[i, j].item() == pytest.approx(s * expected, abs=1e-4)
    plain = s * F.normalize(x) @ F.normalize(head.weight).T
    torch.testing.assert_close(head(x), plain)  # no margin where there are no labels


def test_curricular_face_remembers_the_true_cosine_only_while_it_trains():
    torch.manual_seed(0)
    head, x, y = (
        classifier.MarginHead(6, 5, "curricularface", 0.5, 16.0),
        torch.randn(8, 6),
        torch.randint(5, (8,)),
    )
    head.eval()(x, y)
    assert head.t == 0
    head.train()(x, y)
    cosine = (F.normalize(x) * F.normalize(head.weight[y])).sum(1)
    assert head.t.item() == pytest.approx(0.01 * cosine.mean().item(), abs=1e-6)


def test_ifa_mixes_the_cls_token_of_every_block():
    torch.manual_seed(0)
    vit = ViT(32, 8, 32, 2, 2).eval()
    net, view = (
        classifier.Classifier(vit, 3, "ifa").eval(),
        torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),
    )
    pooled = net.pooled(*vit.all_patches(view))
    torch.testing.assert_close(vit.norm(pooled[:, :, -1]), vit.features(view)[:, 0])
    expected = net.head(
        F.layer_norm((pooled @ net.neck.mix.weight[0] + net.neck.mix.bias).relu(), (32,))
    )
    torch.testing.assert_close(net(pooled), expected)


def test_learning_rates_fall_from_block_to_block_and_unfreezing_goes_down_from_the_top():
    net = classifier.Classifier(ViT(32, 8, 32, 2, 2), 3)
    rate = {
        id(p): group["peak"]
        for group in classifier.make_optimizer(net, 1e-3, 1e-2, 0.05, 0.5).param_groups
        for p in group["params"]
    }
    named = {name: rate[id(p)] for name, p in net.named_parameters()}
    assert named["head.weight"] == 1e-2 and named["encoder.norm.weight"] == 1e-3
    assert (
        named["encoder.blocks.1.mlp.fc1.weight"] == 5e-4
        and named["encoder.blocks.0.attn.qkv.bias"] == 2.5e-4
    )
    assert named["encoder.patch_embed.proj.weight"] == named["encoder.cls_token"] == 1.25e-4
    trained = {name for name, _ in net.named_parameters()}
    for epoch, first in (
        (0, "encoder.norm"),
        (2, "encoder.blocks.1"),
        (4, "encoder.blocks.0"),
        (6, "encoder.cls_token"),
    ):
        finetune_lora.unfreeze(net, trained, epoch, 2)
        on = [name for name, p in net.named_parameters() if p.requires_grad]
        assert on[0].startswith(first) and "head.weight" in on


# ---- what it learns from -------------------------------------------------------------------------


def test_balanced_sampling_draws_every_class_equally_often():
    labels = torch.cat([torch.full((900,), 0), torch.full((90,), 1), torch.full((10,), 2)])
    rows = torch.arange(1000)
    plain = finetune_lora.epoch_rows(rows, labels, False, 0, 0)
    assert sorted(plain.tolist()) == rows.tolist()
    epochs = [finetune_lora.epoch_rows(rows, labels, True, 0, e) for e in range(20)]
    drawn = torch.bincount(labels[torch.cat(epochs)])
    expected, std = 20 * 1000 / 3, math.sqrt(20 * 1000 * 2 / 9)
    assert ((drawn - expected).abs() < 4 * std).all()
    assert torch.equal(epochs[3], finetune_lora.epoch_rows(rows, labels, True, 0, 3))


def test_more_of_each_picture_is_shown_as_training_goes_on(encoder, small, tmp_path, monkeypatch):
    assert [finetune_lora.shares(text) for text in (".5", ".25:.75")] == [(0.5, 0.5), (0.25, 0.75)]
    seen, real = [], finetune_lora.drop_patches
    monkeypatch.setattr(
        finetune_lora,
        "drop_patches",
        lambda view, encoder, keep, generator: (
            seen.append(keep),
            real(view, encoder, keep, generator),
        )[1],
    )
    words = [encoder, "--data", small, "--method", "full", "--out", tmp_path / "run", *QUICK]
    main(*words, "--keep", ".2:1")
    assert seen[0] == 0.2 and seen == sorted(seen) and 0.2 < seen[-1] < 1


def test_augmentation_keeps_its_word():
    view = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=seeded(0))
    draws = torch.rand(len(view), 3, generator=seeded(1))
    assert (data.jitter_colour(view, draws, 1e-9).int() - view.int()).abs().max() <= 1
    assert not torch.equal(data.jitter_colour(view, draws, 0.4), view)
    gray = (
        (finetune_lora.cutout(view, 0.25, seeded(1)) == finetune_lora.GRAY).all(3).flatten(1).sum(1)
    )
    assert (gray >= 256).all() and (gray <= 258).all()  # a quarter of 32 x 32


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_writes_what_its_docstring_says(lora, small):
    assert {p.name for p in lora.iterdir()} == {
        "state.pt",
        "head.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.json",
        "log.jsonl",
        "curves.png",
        "confusion.png",
    }
    row = metrics_of(lora)
    wanted = """top1 top5 macro_f1 by_size confusion parameters_trained share_trained_percent step_ms
                peak_memory_mb machine commit command"""
    assert set(wanted.split()) <= set(row)
    # the files alone give the same answers as the run did
    assert top1_of(lora, small) == pytest.approx(row["top1"], abs=1e-4)


def test_a_finished_run_is_judged_on_another_split_when_asked(encoder, small, tmp_path):
    words, run = [encoder, "--data", small, "--method", "linear", *QUICK], tmp_path / "run"
    main(*words, "--out", run)
    first = metrics_of(run)
    kept = {p.name: p.read_bytes() for p in run.iterdir() if p.name != "log.jsonl"}
    main("--resume", run, "--split", "test")
    second = json.loads((run / "metrics-test.json").read_text())
    assert (first["evaluated_on"], second["evaluated_on"]) == ("val", "test")
    seen = [sum(map(sum, row["confusion"])) for row in (first, second)]
    assert seen == [len(data.open_split(small, name)["labels"]) for name in ("val", "test")]
    changed = {name for name in kept if kept[name] != (run / name).read_bytes()}
    assert changed <= {"state.pt", "curves.png"}  # nobody enrolled is lost


def test_the_result_stands_beside_its_control_and_has_an_interval(lora, small):
    row = metrics_of(lora)
    low, high = row["top1_interval"]
    assert 0 <= low <= row["top1"] <= high <= 100 and 0 < row["thumbnails_top1"] <= 100
    right = stats.from_bits(row["right"], len(data.open_split(small, "val")["labels"]))
    assert 100 * right.mean() == pytest.approx(row["top1"], abs=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        "--method linear --lr .1",
        "--method linear --keep .5",
        "--method lora --unfreeze-every 1",
        "--head ifa --pool cls",
    ],
)
def test_nothing_given_is_ignored(encoder, small, tmp_path, words):
    with pytest.raises(UserError, match="has no effect"):
        main(encoder, "--data", small, "--out", tmp_path / "x", *words.split())


def test_cached_features_are_those_of_the_files(encoder, small, tmp_path):
    main(encoder, "--data", small, "--method", "linear", "--out", tmp_path / "x", *QUICK)
    assert top1_of(tmp_path / "x", small) == pytest.approx(metrics_of(tmp_path / "x")["top1"])


def stop_at(patch, step):
    """A run gets a SIGTERM in this step."""
    update = train.Run.update

    def update_and_stop(run, *words):
        update(run, *words)
        if run.step == step:
            run.stop.append(signal.SIGTERM)

    patch.setattr(train.Run, "update", update_and_stop)


@pytest.mark.parametrize(
    "method, more",
    [
        ("lora", ["--balanced", "--keep", 0.5]),
        ("full", ["--head", "curricularface", "--unfreeze-every", 1, "--logit-adjust", 1]),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    encoder, small, tmp_path, monkeypatch, method, more
):
    words = [encoder, "--data", small, "--method", method, *QUICK, "--epochs", 3, *more]
    main(*words, "--out", tmp_path / "whole")
    out = tmp_path / "stopped"
    for step in (2, 8):  # within an epoch of 4 steps, and at the end of one
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, step)
            main(*(["--resume", out] if (out / "state.pt").exists() else [*words, "--out", out]))
        assert not (out / "metrics.json").exists()
    main("--resume", out)
    a, b = (torch.load(p / "state.pt", weights_only=True) for p in (tmp_path / "whole", out))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(
        torch.equal(a["best"]["weights"][k], b["best"]["weights"][k]) for k in a["best"]["weights"]
    )
    rows = [
        [r["loss"] for r in read_log(p / "log.jsonl") if "loss" in r][-1]
        for p in (tmp_path / "whole", out)
    ]
    assert rows[0] == rows[1] and metrics_of(out)["top1"] == metrics_of(tmp_path / "whole")["top1"]


def test_full_moves_the_encoder_and_the_control_starts_anew(encoder, small, tmp_path):
    words = [encoder, "--data", small, "--method", "full", "--from-scratch", *QUICK]
    main(*words, "--out", tmp_path / "run")
    net, header = finetune_lora.load_classifier(tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists() and header["method"] == "full"
    assert metrics_of(tmp_path / "run")["share_trained_percent"] == 100


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--head arcface:r=3", "no key 'r'"),
        ("--method lora:r=0", "r=0"),
        ("--method pca", "pca is unknown"),
        ("--keep .2:.5:1", "invalid shares value"),
        ("--keep .5:2", "between 0.01 and 1"),
        ("--hold-out 2", "--hold-out 2"),
        ("--batch-size 1", "--batch-size 1"),
    ],
)
def test_bad_flags_are_refused(encoder, small, tmp_path, words, says):
    with pytest.raises(UserError, match=says):
        main(encoder, "--data", small, "--out", tmp_path / "x", *words.split())
    assert not (tmp_path / "x").exists()


def test_what_is_there_is_left_alone(encoder, small, lora, tmp_path):
    before = (lora / "state.pt").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        main(encoder, "--data", small, "--out", lora, *QUICK)
    with pytest.raises(UserError, match="--lr has no effect beside --resume"):
        main("--resume", lora, "--lr", 0.1)
    with pytest.raises(UserError, match="give an ENCODER"):
        main("--data", small)
    assert (lora / "state.pt").read_bytes() == before


def test_sets_that_can_not_teach_are_refused(encoder, tmp_path):
    draw_folder(tmp_path / "flat", 1, 20)
    words = [tmp_path / "flat" / "class0", "--out", tmp_path / "unlabelled", "--size", 32]
    call("data.py", *words, cwd=tmp_path, check=0)
    with pytest.raises(UserError, match="without a label"):
        main(encoder, "--data", tmp_path / "unlabelled", "--out", tmp_path / "x")
    draw_folder(tmp_path / "pics" / "train", 3, 12)
    draw_folder(tmp_path / "pics" / "val", 3, 4, seed=1)
    for extra in list((tmp_path / "pics" / "train" / "class2").iterdir())[1:]:
        extra.unlink()
    words = [tmp_path / "pics", "--out", tmp_path / "one", "--size", 32, "--dedupe", "off"]
    call("data.py", *words, cwd=tmp_path, check=0)
    with pytest.raises(UserError, match="class2.*--min-per-class"):
        main(encoder, "--data", tmp_path / "one", "--out", tmp_path / "x")
