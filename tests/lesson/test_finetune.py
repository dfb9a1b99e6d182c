"""finetune_lora.py: heads against plain formulas, what its loop promises, and runs on a small packed set."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_folder, refused, run_line, some_view, state_of
from made import QUICK

import data
import finetune_lora
from apps import recognize
from common import classifier, features, metrics, train
from common.groups import groups_of
from common.train import read_log, seeded
from model import ViT

RESUME = "finetune_lora.py --resume runs/on"
TUNE = f"finetune_lora.py runs/a --data datasets/packed --split val {QUICK}"


# ---- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", classifier.MARGINS)
def test_margin_heads_are_their_formula(kind):
    torch.manual_seed(0)
    m, s = 0.5, 16.0
    head = classifier.MarginHead(6, 5, kind, m, s).double().eval()
    head.t.fill_(0.3)
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(5, (40,))
    x[0] = -head.weight[y[0]].detach()  # theta = pi: theta + m would come round again
    found = head(x, y).detach()
    plain = F.cosine_similarity(x[:, None], head.weight.detach()[None], dim=2).clamp(-1, 1)
    for i in range(40):
        theta = math.acos(plain[i, y[i]])
        bent = math.cos(theta + m) if theta + m <= math.pi else math.cos(theta) - m * math.sin(m)
        target = math.cos(theta) - m if kind == "cosface" else bent
        for j, cosine in enumerate(plain[i].tolist()):
            hard = kind == "curricularface" and cosine > target
            expected = target if j == y[i] else cosine * (0.3 + cosine) if hard else cosine
            assert found[i, j].item() == pytest.approx(s * expected, abs=1e-4)
    torch.testing.assert_close(head(x).detach(), s * plain)  # no margin where there are no labels
    assert head.t == pytest.approx(0.3)
    head.train()(x, y)
    mean = plain.gather(1, y[:, None]).mean().item()
    moved = 0.99 * 0.3 + 0.01 * mean if kind == "curricularface" else 0.3
    assert head.t.item() == pytest.approx(moved)


def test_ifa_mixes_the_cls_token_of_every_block():
    torch.manual_seed(0)
    vit = ViT(32, 8, 32, 2, 2).eval()
    net = classifier.Classifier(vit, 3, "ifa").eval()
    view = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    pooled = net.pooled(*vit.all_patches(view))
    torch.testing.assert_close(vit.norm(pooled[:, :, -1]), vit.features(view)[:, 0])
    mixed = (pooled @ net.neck.mix.weight[0] + net.neck.mix.bias).relu()
    torch.testing.assert_close(net(pooled), net.head(F.layer_norm(mixed, (32,))))


def test_learning_rates_fall_from_block_to_block_and_unfreezing_goes_down_from_the_top():
    net = classifier.Classifier(ViT(32, 8, 32, 2, 2), 3)
    optimizer = classifier.make_optimizer(net, 1e-3, 1e-2, 0.05, 0.5)
    rate = {}
    for group in optimizer.param_groups:
        rate |= {id(p): group["peak"] for p in group["params"]}
    expected = {"head.weight": 1e-2, "encoder.norm.weight": 1e-3, "encoder.cls_token": 1.25e-4}
    expected |= {"encoder.blocks.1.norm2.weight": 5e-4, "encoder.blocks.0.attn.qkv.bias": 2.5e-4}
    named = dict(net.named_parameters())
    assert {name: rate[id(named[name])] for name in expected} == expected
    firsts = {0: "norm", 1: "norm", 2: "blocks.1", 4: "blocks.0", 6: "cls_token"}
    for epoch, first in firsts.items():
        finetune_lora.unfreeze(net, set(named), epoch, 2)
        on = [name for name, p in net.named_parameters() if p.requires_grad]
        assert on[0].startswith(f"encoder.{first}") and "head.weight" in on


# ---- what it learns from -------------------------------------------------------------------------


def test_balanced_sampling_draws_every_class_equally_often():
    labels = torch.arange(3).repeat_interleave(torch.tensor([900, 90, 10]))
    rows = torch.arange(1000)
    plain = finetune_lora.draw_order(rows, labels, False, 0, 0)
    assert sorted(plain.tolist()) == rows.tolist()
    epochs = [finetune_lora.draw_order(rows, labels, True, 0, e) for e in range(20)]
    drawn = torch.bincount(labels[torch.cat(epochs)])
    expected, std = 20 * 1000 / 3, math.sqrt(20 * 1000 * 2 / 9)
    assert ((drawn - expected).abs() < 4 * std).all()
    assert torch.equal(epochs[3], finetune_lora.draw_order(rows, labels, True, 0, 3))


def test_augmentation_keeps_its_word():
    draws = torch.Generator().manual_seed(0)
    view = torch.randint(0, 128, (8, 32, 32, 3), dtype=torch.uint8, generator=draws)
    cut = finetune_lora.cutout(view, 0.25, seeded(1)) == finetune_lora.GRAY
    assert (cut.all(3).flatten(1).sum(1) == 256).all()  # a quarter of 32 x 32
    assert cut.all(3).any(2).sum(1).tolist() == [16] * 8  # as a square
    encoder = ViT(32, 8, 32, 1, 1)
    patches, ids = finetune_lora.drop_patches(view, encoder, 0.3, seeded(0))
    every, _ = encoder.all_patches(view)
    assert ids.shape == (8, 5) and len({tuple(row.tolist()) for row in ids.sort(1).values}) == 8
    assert torch.equal(patches, every.gather(1, ids[..., None].expand(-1, -1, 192)))


def test_the_share_of_patches_that_are_seen_moves_on_a_line():
    encoder = ViT(32, 8, 32, 1, 1)
    flags = SimpleNamespace(keep=(0.25, 1), colourless=0)
    draw = finetune_lora.draw_views
    views = [draw(flags, encoder, some_view(), t, seeded(0)) for t in (0, 0.5, 1)]
    assert [ids.shape[1] for _, ids in views] == [4, 10, 16]


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_a_share_of_the_crops_has_no_colour(share):
    images = torch.randint(256, (1, 16, 16, 3), dtype=torch.uint8, generator=seeded(0))
    crops = finetune_lora.augmented(images.expand(2000, -1, -1, -1), 16, share, seeded(1)).int()
    gray = (crops.amax(3) - crops.amin(3) <= 1).all(1).all(1)
    assert gray.float().mean().item() == pytest.approx(share, abs=0.02)


def test_pictures_without_colour_are_as_bright():
    images = some_view().numpy()
    gray = metrics.Gray(images)[np.array([2, 0])]
    assert gray.shape == (2, 32, 32, 3) and (gray == gray[..., :1]).all()
    red, green, blue = images[[2, 0]].astype(float).transpose(3, 0, 1, 2)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    assert np.abs(gray[..., 0] - bright).max() <= 0.5001


def test_the_control_chooses_its_penalty_on_dev(monkeypatch):
    """Two fits: one is always right on dev and wrong on the reported pictures, and the other way round."""
    always = {1.0: 0, 2.0: 1}  # penalty: the class that its fit names

    def ridge(x, labels, C, penalty):
        return torch.zeros(x.shape[1], C).double(), torch.eye(C).double()[always[penalty]]

    monkeypatch.setattr(metrics, "ridge", ridge)
    monkeypatch.setattr(metrics, "PENALTIES", tuple(always))
    split, sets = {"images": np.zeros((4, 16, 16, 3), np.uint8)}, []
    for labels in ([0, 0, 1, 1], [0] * 4, [1] * 4):
        labels = torch.tensor(labels)
        sets.append(SimpleNamespace(split=split, index=torch.arange(4), labels=labels))
    assert metrics.thumbnail_top1(*sets) == 0


def test_histograms_count_colours_in_eight_cells_a_channel():
    image = np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8)
    counts, _ = np.histogramdd(image.reshape(-1, 3), [8] * 3, [(0, 256)] * 3)
    found = metrics.histograms(torch.from_numpy(image)[None])
    np.testing.assert_allclose(found[0].square() * 81, counts.ravel(), atol=1e-4)


OWN = {  # files of each method: full moves the encoder, so it is saved, too
    "linear": set(),
    "lora": set(),
    "full": {"model.safetensors"},
}


@pytest.mark.parametrize("method", OWN)
def test_a_run_writes_what_its_docstring_says(at, method, no_pictures):
    """Its files give the answers that it reports. linear keeps features of pictures in memory."""
    out = at / "runs" / method
    run_line(f"{TUNE} --method {method} --out {out}", at, check=0)
    files = OWN[method] | {"state.pt", "head.safetensors", "metrics.json", "log.jsonl"}
    assert {path.name for path in out.iterdir()} == files
    row = json.loads((out / "metrics.json").read_text())
    net, _ = finetune_lora.load_classifier(out)
    held = data.open_split("datasets/packed", "val")
    autocast = train.autocast_of(torch.device("cpu"), "fp32")
    pooled = classifier.pooled_of(net, held, torch.arange(len(held["images"])), autocast)
    said = net(pooled).argmax(1) == held["labels"]
    assert 100 * said.float().mean().item() == pytest.approx(row["top1"], abs=1e-4)
    low, high = row["top1_interval"]
    assert 0 <= low <= row["top1"] <= high <= 100 and 0 < row["thumbnails_top1"] <= 100
    right = metrics.from_bits(row["right"], len(held["labels"]))
    assert 100 * right.mean() == pytest.approx(row["top1"], abs=1e-4)
    assert (row["share_trained_percent"] == 100) == (method == "full")
    scores = [x["dev_macro_f1"] for x in read_log(out / "log.jsonl") if "dev_top1" in x]
    n = len(features.open_subsets("datasets/packed", "val", 0)[0][1].index)
    best = max(scores) / 100
    near = [i for i, x in enumerate(scores) if x / 100 >= best - (best * (1 - best) / n) ** 0.5]
    # the latest epoch within a standard error of the best one
    assert state_of(out)["best"]["epoch"] == row["best_epoch"] == near[-1] + 1


def test_a_late_epoch_that_is_much_worse_is_not_kept(at, monkeypatch, no_pictures):
    scores = itertools.chain((0.5, 0.9, 0.88, 0.2), itertools.repeat(0.2))
    monkeypatch.setattr(metrics, "macro_f1", lambda *_: next(scores))
    out = at / "runs" / "late"
    run_line(f"{TUNE} --method linear --epochs 4 --out {out}", at, check=0)
    assert state_of(out)["best"]["epoch"] == 3


def test_a_run_goes_on_with_its_own_set_alone(at, no_pictures):
    """Else pictures that it has learned could be among those that judge it."""
    shutil.copytree("datasets/packed", "datasets/again")
    words = f"finetune_lora.py runs/a --data datasets/again --split val {QUICK} --method linear"
    run_line(f"{words} --out runs/on", at, check=0)
    done = run_line(RESUME, at, check=0).stdout
    assert "--split test measures it" in done
    done = run_line(f"{RESUME} --split test", at, check=0)
    assert "--split test" not in run_line(f"{RESUME} --split test", at, check=0).stdout
    shutil.rmtree("datasets/again")
    shutil.copytree("datasets/other", "datasets/again")  # the same pictures, dealt anew
    (at / "runs/on/metrics-test.json").unlink()
    assert "has changed since" in refused(run_line(f"{RESUME} --split test", at))


@pytest.mark.parametrize("with_dev", [False, True])
def test_what_is_chosen_on_is_dev_or_a_tenth_of_train(small, tmp_path, with_dev):
    folder = tmp_path / "packed"
    shutil.copytree(small, folder)
    if with_dev:
        shutil.copy(small / "test.safetensors", folder / "dev.safetensors")
    (fit, dev, report), classes = features.open_subsets(folder, "val", 0)
    assert report.name == "val"
    assert len(report.index) == len(data.open_split(small, "val")["labels"])
    assert fit.name == "train" and dev.name == ("dev" if with_dev else "train")
    every = sorted(fit.index.tolist() + ([] if with_dev else dev.index.tolist()))
    assert every == list(range(len(fit.labels)))
    groups = groups_of(fit.split)
    if not with_dev:
        assert 0.05 < len(dev.index) / len(every) < 0.2
        assert not set(groups[fit.index].tolist()) & set(groups[dev.index].tolist())
    (fit, dev, report), some = features.open_subsets(folder, "val", 1)
    assert len(some) == 2 and set(fit.labels[fit.index].tolist()) == {0, 1}
    for images in (fit, dev, report):
        names = [classes[c] for c in images.split["labels"][images.index]]
        assert names == [some[c] for c in images.labels[images.index]]


@pytest.fixture
def thin(at):
    """A packed list: two classes of 24 pictures, one of a single one, and 11 pictures without a label."""
    root = draw_folder(at / "thin", classes=3, each=24)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    labels = {name: name.split("/")[0] for name in names[:49]}
    rows = [f"{name},{labels.get(name, '')}" for name in names[:60]]
    (root / "list.csv").write_text("\n".join(["path,label", *rows]))
    words = "--size 32 --dedupe off --out datasets/thin"
    done = run_line(f"data.py thin/list.csv {words}", at, check=0)
    assert "python finetune_lora.py weights/toon --data datasets/thin" in done.stdout
    return at / "datasets/thin"


def test_what_has_no_label_or_no_second_picture_is_not_learned(at, thin, no_pictures):
    sets, classes = features.open_subsets(thin, "val", 0)
    assert classes == ["class0", "class1"]
    for images in sets:
        true = images.split["labels"][images.index]
        assert set(true.tolist()) == {0, 1} and images.labels[images.index].equal(true)
    fit = sets[0]
    assert (fit.split["labels"] == -1).any() and (fit.split["labels"] == 2).any()
    assert (fit.labels[fit.split["labels"] == 2] == -1).all()
    line = f"finetune_lora.py runs/a --data datasets/thin --split val {QUICK} --method linear --out runs/thin"
    assert "2 of 3 characters" in run_line(line, at, check=0).stdout
    assert recognize.open_gallery(at / "runs/thin", "cpu", "fp32").names == classes


# ---- an adapter that somebody changed ------------------------------------------------------------


def test_an_adapter_of_ones_own_is_read_back(at, monkeypatch):
    """DoRA, say: what is learned beside A and B is in the file, under its name."""

    class Scaled(finetune_lora.LoRA):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            self.s = torch.nn.Parameter(torch.ones(self.base.out_features, 1))

        def weight(self):
            return self.s * super().weight()

        def forward(self, x):
            return F.linear(x, self.weight(), self.base.bias)

    monkeypatch.setattr(finetune_lora, "LoRA", Scaled)
    run_line(f"{TUNE} --method lora:r=2 --out runs/changed", at, check=0)
    net, _ = finetune_lora.load_classifier(at / "runs/changed")
    lengths = [layer.s for layer in finetune_lora.lora_layers(net.encoder).values()]
    assert lengths and not any((s == 1).all() for s in lengths)
