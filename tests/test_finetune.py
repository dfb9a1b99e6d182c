"""finetune_lora.py: heads against plain formulas, what its loop promises, and runs on a small packed set."""

import json
import math
import pickle
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, draw_folder

import data
import finetune_lora
from common import classifier, corruptions, errors, features, stats, train
from common.command import LOCKS
from common.io import UserError, read_safetensors
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
            patch.setattr(errors, "draw", lambda *_: None)
        try:
            with LOCKS:
                finetune_lora.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="package")
def lora(encoder, small, tmp_path_factory):
    """One finished LoRA run."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    main(
        encoder,
        "--data",
        small,
        "--method",
        "lora",
        "--keep",
        0.5,
        "--out",
        out,
        *QUICK,
        pictures=True,
    )
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
        classifier.unfreeze(net, trained, epoch, 2)
        on = [name for name, p in net.named_parameters() if p.requires_grad]
        assert on[0].startswith(first) and "head.weight" in on


# ---- what it learns from -------------------------------------------------------------------------


def test_balanced_sampling_draws_every_class_equally_often():
    labels = torch.cat([torch.full((900,), 0), torch.full((90,), 1), torch.full((10,), 2)])
    rows = torch.arange(1000)
    plain = features.epoch_rows(rows, labels, False, 0, 0)
    assert sorted(plain.tolist()) == rows.tolist()
    drawn = torch.stack(
        [torch.bincount(labels[features.epoch_rows(rows, labels, True, 0, e)]) for e in range(20)]
    )
    expected, std = 20 * 1000 / 3, math.sqrt(20 * 1000 * 2 / 9)
    assert ((drawn.sum(0) - expected).abs() < 4 * std).all()
    again = features.epoch_rows(rows, labels, True, 0, 3)
    assert torch.equal(again, features.epoch_rows(rows, labels, True, 0, 3))


def test_more_of_each_picture_is_shown_as_training_goes_on(encoder, small, tmp_path, monkeypatch):
    assert [finetune_lora.shares(text) for text in (".5", "1.0", ".25:.75")] == [
        "0.5",
        "1",
        "0.25:0.75",
    ]
    assert [finetune_lora.shown("0.25:0.75", t) for t in (0, 0.5, 1)] == [0.25, 0.5, 0.75]
    assert finetune_lora.shown("0.5", 0) == finetune_lora.shown("0.5", 1) == 0.5
    seen, real = [], finetune_lora.drop_patches
    monkeypatch.setattr(
        finetune_lora,
        "drop_patches",
        lambda view, encoder, keep, generator: (
            seen.append(keep),
            real(view, encoder, keep, generator),
        )[1],
    )
    main(
        encoder,
        "--data",
        small,
        "--method",
        "full",
        "--out",
        tmp_path / "run",
        *QUICK,
        "--keep",
        ".2:1",
    )
    assert seen[0] == 0.2 and seen == sorted(seen) and 0.2 < seen[-1] < 1


def test_augmentation_keeps_its_word():
    view = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=seeded(0))
    draws = torch.rand(len(view), 3, generator=seeded(1))
    assert (data.jitter_colour(view, draws, 1e-9).int() - view.int()).abs().max() <= 1
    assert not torch.equal(data.jitter_colour(view, draws, 0.4), view)
    gray = (corruptions.cutout(view, 0.25, seeded(1)) == corruptions.GRAY).all(3).flatten(1).sum(1)
    assert (gray >= 256).all() and (gray <= 258).all()  # a quarter of 32 x 32
    white = torch.tensor([0, 255] * 4, dtype=torch.uint8)[:, None, None, None].expand(8, 32, 32, 3)
    targets = F.one_hot(
        torch.tensor([0, 1] * 4), 2
    ).float()  # the share of white is the target of class 1
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        mixed, soft = finetune_lora.mix(white, targets, *alphas, seeded(3))
        assert torch.allclose(mixed.float().mean((1, 2, 3)) / 255, soft[:, 1], atol=2 / 255)
        assert 0 < soft[0, 1] < 1 or soft.sum() > 0 and torch.allclose(soft.sum(1), torch.ones(8))


def test_the_threshold_balances_both_mistakes_and_temperature_is_found():
    torch.manual_seed(0)
    centre, labels = torch.randn(5, 16), torch.arange(5).repeat(40)

    def face(y, n):
        return centre[y] + 0.3 * torch.randn(n, 16)

    known, strangers = face(labels, 200), centre[0] + 2 * torch.randn(1000, 16)
    scores = torch.randn(20000, 5)
    drawn = torch.multinomial(scores.softmax(1), 1)[:, 0]
    assert classifier.fit_temperature(scores * 3, drawn) == pytest.approx(3, rel=0.1)
    logits = F.normalize(known) @ F.normalize(centre).T
    gallery = face(labels, 200)
    found = classifier.calibrate(gallery, labels, logits, known, labels, strangers)
    made = classifier.make_gallery(gallery, labels, 5) | found
    score = {
        n: classifier.class_scores(classifier.compared(x, made), made).amax(1)
        for n, x in (("known", known), ("strangers", strangers))
    }
    accepted, rejected = (
        (score["strangers"] >= found["threshold"]).float().mean(),
        score["known"] < found["threshold"],
    )
    assert accepted == pytest.approx(found["false_accept"], abs=1e-6)
    assert rejected.float().mean() == pytest.approx(found["false_reject"], abs=1e-6)
    assert (
        found["false_accept"] == pytest.approx(found["false_reject"], abs=0.01)
        and found["false_reject"] < 0.091
    )
    balanced = classifier.balance(
        torch.tensor([0.3, 0.6, 0.7, 0.9]), torch.tensor([0.1, 0.2, 0.4, 0.65])
    )
    assert 0.4 < balanced < 0.61  # one of four is on the wrong side, either way
    who, _, margin, sure = classifier.decide(logits, known, made)
    assert (
        ((margin >= 0) == ~rejected).all()
        and (who == labels).float().mean() > 0.99
        and sure.mean() > 0.8
    )
    _, _, _, unsure = classifier.decide(
        F.normalize(strangers) @ F.normalize(centre).T, strangers, made
    )
    assert unsure.mean() < 0.5
    without = classifier.calibrate(gallery, labels, logits, known, labels)
    assert "left out of the gallery in turn" in without["by"] and without["threshold"] < 1


def test_no_more_known_faces_are_rejected_than_promised_however_alike_strangers_are():
    torch.manual_seed(0)
    centre, labels = torch.randn(5, 16), torch.arange(5).repeat(40)
    known, twins = (centre[labels] + 0.3 * torch.randn(200, 16) for _ in range(2))
    found = classifier.calibrate(known, labels, known @ centre.T, twins, labels, twins[:50])
    assert found["false_reject"] < 0.091 and found["false_accept"] > 0.5
    fewer = classifier.calibrate(
        known, labels, known @ centre.T, twins, labels, twins[:50], reject=0.03
    )
    assert fewer["false_reject"] <= 0.03 and fewer["threshold"] < found["threshold"]
    assert fewer["false_accept"] >= found["false_accept"]


def test_a_gallery_has_as_many_faces_as_are_asked_for(small, encoder, tmp_path):
    words = [
        encoder,
        "--data",
        small,
        "--method",
        "linear",
        "--epochs",
        1,
        "--faces",
        3,
        "--out",
        tmp_path / "run",
    ]
    call("finetune_lora.py", *words, cwd=tmp_path, check=0)
    tensors, _ = read_safetensors(tmp_path / "run" / "gallery.safetensors")
    assert tensors["labels"].bincount().tolist() == [3, 3, 3]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["faces"] == 3


def test_whitening_makes_what_faces_of_one_character_differ_in_count_less():
    torch.manual_seed(0)
    labels, centre = torch.arange(4).repeat(50), torch.randn(4, 8)
    pose = torch.zeros(200, 8)
    pose[:, 0] = 5 * torch.randn(200)  # says nothing of who it is
    faces = centre[labels] + 0.1 * torch.randn(200, 8) + pose
    mean, matrix = classifier.whitening(faces, labels)
    inside = torch.stack([((faces - mean) @ matrix)[labels == c].var(0) for c in range(4)]).mean(0)
    assert inside.max() / inside.min() < 200  # it was 2,500
    plain, white = (F.normalize(x) @ F.normalize(x).T for x in (faces, (faces - mean) @ matrix))
    alike = labels[:, None] == labels

    def gap(cosine):
        return cosine[alike].mean() - cosine[~alike].mean()

    assert gap(white) > gap(plain)


def test_reasons_of_mistakes_follow_their_rules():
    red = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    red[..., 0] = 200
    train = torch.cat([red, red.flip(3)])  # class 0 is red, class 1 is blue
    train = (train.int() + torch.randint(0, 20, train.shape, generator=seeded(0))).to(torch.uint8)
    labels = torch.tensor([0] * 4 + [1] * 4)
    noisy = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=seeded(1))
    images = torch.cat(
        [train[4:5], noisy]
    )  # a blue picture of class 0 taken for class 1; one drawn unlike all
    crops = torch.tensor([[True] * 5, [False] * 5])
    found = errors.reasons(
        images,
        torch.tensor([0, 0]),
        torch.tensor([1, 1]),
        crops,
        train,
        labels,
        torch.tensor([40, 40]),
    )
    assert found["crop"].tolist() == [True, False] and found["colour"][0] and found["style"][1]
    assert not found["few"].any() and not found["other"].any()
    few = errors.reasons(
        images,
        torch.tensor([0, 0]),
        torch.tensor([1, 1]),
        crops,
        train,
        labels,
        torch.tensor([19, 40]),
    )
    assert few["few"].all()
    assert errors.confused_pairs(torch.tensor([[5, 2, 0], [0, 9, 3], [1, 0, 4]])) == [
        (1, 2, 3),
        (0, 1, 2),
        (2, 0, 1),
    ]


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_writes_what_its_docstring_says(lora, small):
    assert {p.name for p in lora.iterdir()} == {
        "state.pt",
        "head.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "gallery.safetensors",
        "metrics.json",
        "log.jsonl",
        "curves.png",
        "confusion.png",
        "confused.png",
    }
    row = metrics_of(lora)
    wanted = """top1 top5 macro_f1 per_class by_size confusion parameters_trained share_trained_percent step_ms
                peak_memory_mb mistakes machine commit command"""
    assert set(wanted.split()) <= set(row)
    # the files alone give the same answers as the run did
    net, header = classifier.load_classifier(lora)
    held = data.open_split(small, "val")

    def autocast():
        return torch.autocast("cpu", enabled=False)

    pooled = classifier.pooled_of(
        net, held, torch.arange(len(held["images"])), header["image_size"], autocast
    )
    right = (net(pooled).argmax(1) == held["labels"]).float().mean()
    train, known = data.open_split(small, "train"), classifier.load_gallery(lora)
    rows = torch.tensor([train["header"]["keys"].index(key) for key in known["keys"]])
    pooled = classifier.pooled_of(net, train, rows, header["image_size"], autocast, mirrored=True)
    torch.testing.assert_close(net.neck(pooled), known["embeddings"], atol=1e-4, rtol=1e-4)
    assert 100 * right.item() == pytest.approx(row["top1"], abs=1e-4)
    assert (
        sum(p.numel() for n, p in net.named_parameters() if n.endswith((".A", ".B")) or "head" in n)
        == row["parameters_trained"]
    )


def test_a_finished_run_is_judged_on_another_split_when_asked(encoder, small, tmp_path):
    words, run = (
        [encoder, "--data", small, "--method", "linear", *QUICK, "--out", tmp_path / "run"],
        tmp_path / "run",
    )
    main(*words)
    first, kept = (
        metrics_of(run),
        {p.name: p.read_bytes() for p in run.iterdir() if p.name != "log.jsonl"},
    )
    main(*words, "--resume", "--eval-on", "test")
    second = json.loads((run / "metrics-test.json").read_text())
    assert (first["evaluated_on"], second["evaluated_on"]) == ("val", "test")
    seen = [sum(map(sum, row["confusion"])) for row in (first, second)]
    assert seen == [len(data.open_split(small, name)["labels"]) for name in ("val", "test")]
    again = {name: (run / name).read_bytes() for name in kept}
    assert {name for name in kept if kept[name] != again[name]} <= {
        "state.pt",
        "curves.png",
    }  # nobody enrolled is lost


def test_what_memory_cannot_hold_is_refused_before_the_first_step(
    encoder, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "free_memory", lambda _: 2**24)
    with pytest.raises(
        UserError, match="--image-size 1600 needs about .* is the largest that fits"
    ):
        main(encoder, "--data", small, "--image-size", 1600, "--out", tmp_path / "x", *QUICK)
    assert not (tmp_path / "x").exists()


def test_the_result_stands_beside_its_control_and_has_an_interval(lora, small):
    row = metrics_of(lora)
    low, high = row["top1_interval"]
    assert 0 <= low <= row["top1"] <= high <= 100 and 0 < row["thumbnails_top1"] <= 100
    right = stats.from_bits(row["right"], len(data.open_split(small, "val")["labels"]))
    assert 100 * right.mean() == pytest.approx(row["top1"], abs=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        "--method linear --r 4",
        "--method linear --alpha 4",
        "--method full --targets q",
        "--method linear --layer-decay .5",
        "--method linear --lr .1",
        "--method linear --cutout .2",
        "--method full --dropout .1",
        "--no-augment --cutout .2",
        "--no-augment --mixup 1",
        "--head linear --scale 16",
        "--head ifa --pool cls",
        "--method lora --unfreeze-every 1",
    ],
)
def test_nothing_given_is_ignored(encoder, small, tmp_path, words):
    with pytest.raises(UserError, match="leave it out"):
        main(encoder, "--data", small, "--out", tmp_path / "x", *words.split())


def test_cached_features_train_the_same_head_as_uncached_and_are_used_again(
    encoder, small, tmp_path, monkeypatch
):
    words = [encoder, "--data", small, "--method", "linear", *QUICK]
    main(*words, "--out", tmp_path / "cached")
    (cache,) = tmp_path.glob("features-*.safetensors")
    main(
        *words, "--out", tmp_path / "test", "--eval-on", "test"
    )  # another split is not in that file
    assert len(other := set(tmp_path.glob("features-*.safetensors")) - {cache}) == 1
    other.pop().unlink()
    plain = (
        classifier.pooled_of
    )  # the second run asks the encoder neither for train nor for val, but for the gallery
    monkeypatch.setattr(
        classifier, "pooled_of", lambda *args, mirrored: plain(*args, mirrored=mirrored)
    )
    main(*words, "--out", tmp_path / "again")
    monkeypatch.undo()
    cache.unlink()
    monkeypatch.setattr(classifier, "frozen_features", lambda *_: None)
    main(*words, "--out", tmp_path / "uncached")
    heads = [tmp_path / name / "head.safetensors" for name in ("cached", "again", "uncached")]
    a, b, c = (read_safetensors(path)[0] for path in heads)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.allclose(a[k].float(), c[k].float(), atol=2e-5) for k in a)
    assert metrics_of(tmp_path / "cached")["top1"] == metrics_of(tmp_path / "uncached")["top1"]


class StopAt(list):
    """What catch_signals returns: a list that is full after the loop has read it so many times."""

    def __init__(self, times):
        super().__init__([signal.SIGTERM])
        self.times = times

    def __bool__(self):
        self.times -= 1
        return self.times == 0


@pytest.mark.parametrize(
    "method, more",
    [
        ("lora", ["--dropout", 0.2, "--cutmix", 1, "--mixup", 1, "--balanced", "--keep", 0.5]),
        ("full", ["--head", "curricularface", "--unfreeze-every", 1, "--logit-adjust", 1]),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    encoder, small, tmp_path, monkeypatch, method, more
):
    words = [encoder, "--data", small, "--method", method, *QUICK, "--epochs", 3, *more]
    main(*words, "--out", tmp_path / "whole")
    out = tmp_path / "stopped"
    for after in (2, 4):  # in the first epoch, then where one ends or after
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(finetune_lora.train, "catch_signals", lambda after=after: StopAt(after))
            main(*words, "--out", out, *(["--resume"] if (out / "state.pt").exists() else []))
        assert not (out / "metrics.json").exists()
    main(*words, "--out", out, "--resume")
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


def test_seeds_early_stop_and_characters_left_out(encoder, small, tmp_path):
    words = [encoder, "--data", small, "--method", "linear", *QUICK]
    main(*words, "--out", tmp_path / "many", "--seeds", 2, "--hold-out", 1)
    summary = json.loads((tmp_path / "many-seeds0-1.json").read_text())
    each = [metrics_of(tmp_path / n)["top1"] for n in ("many", "many-s1")]
    assert summary["top1"]["mean"] == pytest.approx(sum(each) / 2)
    assert summary["top1"]["deviation"] == pytest.approx(float(np.std(each, ddof=1)), abs=1e-9)
    main(
        *words, "--out", tmp_path / "one", "--seed", 1, "--hold-out", 1
    )  # a folder that was asked for is that folder
    assert metrics_of(tmp_path / "one")["top1"] == each[1]
    header = read_safetensors(tmp_path / "many" / "gallery.safetensors")[1]
    assert len(header["names"]) == 2 and header["by"].startswith("characters left out")
    main(*words, "--out", tmp_path / "early", "--epochs", 30, "--head-lr", 1e-9, "--patience", 2)
    row = metrics_of(tmp_path / "early")
    assert read_log(tmp_path / "early" / "log.jsonl")[-1]["epoch"] == row["best_epoch"] + 2 < 30


def test_full_moves_the_encoder_and_the_control_starts_anew(encoder, small, tmp_path):
    main(
        encoder,
        "--data",
        small,
        "--method",
        "full",
        "--from-scratch",
        "--out",
        tmp_path / "run",
        *QUICK,
    )
    net, header = classifier.load_classifier(tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists() and header["method"] == "full"
    assert metrics_of(tmp_path / "run")["share_trained_percent"] == 100


class Bomb:
    def __reduce__(self):
        return (print, ("the pickle ran",))


def test_bad_input_is_one_line_and_overwrites_nothing(encoder, small, lora, tmp_path, capsys):
    def line(*words):
        with pytest.raises(UserError) as problem:
            main(encoder, "--data", small, "--out", tmp_path / "x", *words)
        assert "\n" not in str(problem.value)
        return str(problem.value)

    assert "--margin 0.3" in line("--margin", 0.3)
    assert "2 must be a number between 0.01 and 1" in line("--keep", ".5:2")
    assert ".2:.5:1 must be a share" in line("--keep", ".2:.5:1")
    assert "--mixup" in line("--head", "arcface", "--mixup", 1)
    assert "--unfreeze-every" in line("--unfreeze-every", 2)
    assert "--hold-out 2" in line("--hold-out", 2)
    assert "--from-scratch" in line("--from-scratch")
    assert "q,k,v" in line("--targets", "q,w")
    assert "--lr 7" in line("--lr", 7) and "--warmup nan" in line("--warmup", "nan")
    assert "--batch-size 1" in line("--batch-size", 1) and "--seeds 0" in line("--seeds", 0)
    before = (lora / "state.pt").read_bytes()
    assert "--resume" in line("--out", lora, "--keep", 0.5, *QUICK)
    assert "r 8 (now 4)" in line("--out", lora, "--keep", 0.5, *QUICK, "--r", 4)
    assert (lora / "state.pt").read_bytes() == before
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Bomb(), 2))
    with pytest.raises(UserError, match="evil.pth"):
        main(tmp_path / "evil.pth", "--data", small, "--out", tmp_path / "x")
    (lora.parent / "evil").mkdir(exist_ok=True)
    (lora.parent / "evil" / "state.pt").write_bytes(pickle.dumps(Bomb(), 2))
    assert "can't be read" in line("--out", lora.parent / "evil")
    assert "the pickle ran" not in capsys.readouterr().out and not (tmp_path / "x").exists()


def test_sets_that_can_not_teach_are_refused(encoder, tmp_path):
    draw_folder(tmp_path / "flat", 1, 20)
    call(
        "data.py",
        tmp_path / "flat" / "class0",
        "--out",
        tmp_path / "unlabelled",
        "--size",
        32,
        cwd=tmp_path,
        check=0,
    )
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


def test_strata_are_those_of_styles_and_tags_that_enough_pictures_have():
    header = {"style": {"palette": ["natural", "vivid"]}, "tags": ["hat", "rare"]}
    split = {
        "header": header,
        "style": np.uint8([[0]] * 20 + [[1]] * 30),
        "tags": np.int32([[0, -1]] * 25 + [[1, -1]] * 5 + [[-1, -1]] * 20),
    }
    right = torch.arange(50) < 22
    found = errors.by_stratum(split, torch.arange(50), right)
    assert found == {
        "palette: natural": {"top1": 100, "pictures": 20},
        "palette: vivid": {"top1": pytest.approx(100 * 2 / 30), "pictures": 30},
        "hat": {"top1": 88, "pictures": 25},
    }
    rows = torch.arange(20, 50)  # all of them vivid: no stratum
    assert errors.by_stratum(split, rows, right[rows], least=5).keys() == {"hat", "rare"}
    assert errors.by_stratum({"header": {}}, rows, right[rows]) == {}


def test_a_run_on_uneven_sizes_is_told_of_balanced():
    def said(sizes, **flags):
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        rows = SimpleNamespace(rows=torch.arange(len(labels)), labels=labels)
        args = SimpleNamespace(
            data="d",
            keep=".5",
            method="full",
            encoder="e",
            head="linear",
            epochs=1,
            lr=1,
            head_lr=1,
            **{"balanced": False, "logit_adjust": 0.0} | flags,
        )
        task = SimpleNamespace(train=rows, dev=rows, classes=sizes, count=1, share=1, out="o")
        return finetune_lora.start_message(args, task, 1, 1, 0)

    assert "3 characters of 4 to 24: --balanced" in said([4, 24, 9])
    for text in (said([4, 20, 9]), said([4, 24], balanced=True), said([4, 24], logit_adjust=1.0)):
        assert "--balanced" not in text
