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
from test_lora import plain_lora

import data
import finetune_lora
from apps import recognize
from common import classifier, controls, features, metrics, stats, train
from common.checkpoints import load_encoder
from common.io import read_safetensors, save_safetensors
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
    net = SimpleNamespace(encoder=ViT(32, 8, 32, 1, 1))
    task = SimpleNamespace(keep=(0.25, 1), colourless=0, net=net)
    views = [finetune_lora.draw_views(task, some_view(), t, seeded(0)) for t in (0, 0.5, 1)]
    assert [ids.shape[1] for _, ids in views] == [4, 10, 16]


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_a_share_of_the_crops_has_no_colour(share):
    images = torch.randint(256, (1, 16, 16, 3), dtype=torch.uint8, generator=seeded(0))
    crops = finetune_lora.augmented(images.expand(2000, -1, -1, -1), 16, share, seeded(1)).int()
    gray = (crops.amax(3) - crops.amin(3) <= 1).all(1).all(1)
    assert gray.float().mean().item() == pytest.approx(share, abs=0.02)


def test_pictures_without_colour_are_as_bright():
    images = some_view().numpy()
    gray = controls.Gray(images)[np.array([2, 0])]
    assert gray.shape == (2, 32, 32, 3) and (gray == gray[..., :1]).all()
    red, green, blue = images[[2, 0]].astype(float).transpose(3, 0, 1, 2)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    assert np.abs(gray[..., 0] - bright).max() <= 0.5001


def test_the_control_chooses_its_penalty_on_dev(monkeypatch):
    """Two fits: one is always right on dev and wrong on the reported pictures, and the other way round."""
    always = {1.0: 0, 2.0: 1}  # penalty: the class that its fit names

    def ridge(x, labels, C, penalty):
        return torch.zeros(x.shape[1], C).double(), torch.eye(C).double()[always[penalty]]

    monkeypatch.setattr(controls, "ridge", ridge)
    monkeypatch.setattr(controls, "PENALTIES", tuple(always))
    split, sets = {"images": np.zeros((4, 16, 16, 3), np.uint8)}, []
    for labels in ([0, 0, 1, 1], [0] * 4, [1] * 4):
        labels = torch.tensor(labels)
        sets.append(SimpleNamespace(split=split, index=torch.arange(4), labels=labels))
    assert controls.thumbnail_top1(*sets) == 0


def test_histograms_count_colours_in_eight_cells_a_channel():
    image = np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8)
    counts, _ = np.histogramdd(image.reshape(-1, 3), [8] * 3, [(0, 256)] * 3)
    found = controls.histograms(torch.from_numpy(image)[None])
    np.testing.assert_allclose(found[0].square() * 81, counts.ravel(), atol=1e-4)


OWN = {  # files of each method: full moves the encoder, so it is saved, too
    "linear": set(),
    "lora": {"adapter_model.safetensors", "adapter_config.json"},
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
    right = stats.from_bits(row["right"], len(held["labels"]))
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


def test_a_run_goes_on_with_its_own_set_and_protocol_alone(at, no_pictures):
    """Else pictures that it has learned could be among those that judge it."""
    shutil.copytree("datasets/packed", "datasets/again")
    words = f"finetune_lora.py runs/a --data datasets/again --split val {QUICK} --method linear"
    run_line(f"{words} --out runs/on", at, check=0)
    assert "holds pictures back" in refused(run_line(f"{RESUME} --split folds", at))
    done = run_line(RESUME, at, check=0).stdout
    assert "--split test measures it" in done
    done = run_line(f"{RESUME} --split test", at, check=0)
    assert "--split test" not in run_line(f"{RESUME} --split test", at, check=0).stdout
    path = at / "datasets/again/train.safetensors"
    tensors, header = read_safetensors(path)
    save_safetensors(tensors, path, header | {"pixels": "other"})
    (at / "runs/on/metrics-test.json").unlink()
    told = refused(run_line(f"{RESUME} --split test", at))
    assert "datasets/again has changed since runs/on began" in told


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
    groups = data.groups_of(fit.split)
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
    assert recognize.faces_learned(at / "runs/thin", "cpu", "fp32").others is None


# ---- an adapter that somebody changed ------------------------------------------------------------


def test_a_method_that_trains_a_part_of_the_encoder_is_read_back(at, monkeypatch):
    """Biases alone, as in BitFit: what is trained is written, whatever the method is called."""

    class Biases(classifier.Classifier):
        def __init__(self, encoder, *args, **keys):
            super().__init__(encoder, *args, **keys)
            for name, p in encoder.named_parameters():
                p.requires_grad_(name.endswith("bias"))

    monkeypatch.setattr(classifier, "Classifier", Biases)
    for table in ("METHODS", "NOT_READ", "RECIPE", "WEIGHT_DECAY"):
        known = getattr(finetune_lora, table)
        monkeypatch.setitem(known, "bitfit", known["full"])
    run_line(f"{TUNE} --method bitfit --out runs/biases", at, check=0)
    before, after = (load_encoder(at / run).state_dict() for run in ("runs/a", "runs/biases"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("bias") for name in changed)


@plain_lora
def test_an_adapter_whose_files_would_lose_something_is_refused_before_it_trains(
    at, monkeypatch, capsys
):
    """What is learned beside A and B comes back under its name; what is no Parameter would not."""
    call = f"{TUNE} --method lora:r=2 --out runs/changed"

    class Scaled(finetune_lora.LoRA):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            self.s = torch.nn.Parameter(torch.ones(self.base.out_features, 1))

        def weight(self):
            return self.s * super().weight()

        def forward(self, x):
            return F.linear(x, self.weight() + shift, self.base.bias)

    shift = 0.0
    monkeypatch.setattr(finetune_lora, "LoRA", Scaled)
    run_line(call, at, check=0)
    net, _ = finetune_lora.load_classifier(at / "runs/changed")
    lengths = [layer.s for layer in finetune_lora.lora_layers(net.encoder).values()]
    assert lengths and not any((s == 1).all() for s in lengths)
    config = json.loads((at / "runs/changed/adapter_config.json").read_text())
    assert config["peft_type"] != "LORA"  # peft refuses it

    class Forgetful(Scaled):
        def forward(self, x):
            if not hasattr(self, "shift"):
                self.shift = torch.rand(1)  # no Parameter and no buffer
            return super().forward(x) + self.shift

    monkeypatch.setattr(finetune_lora, "LoRA", Forgetful)
    done = run_line(call.replace("changed", "lost"), at, check=2)
    assert "read back" in done.stderr and not (at / "runs/lost").exists()

    class Drawn(Scaled):
        """As in VeRA, A stays as it is drawn; but it is drawn anew when the file is read."""

        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            self.A.requires_grad_(False)

    monkeypatch.setattr(finetune_lora, "LoRA", Drawn)
    done = run_line(call.replace("changed", "lost"), at, check=2)
    assert "another encoder.blocks.0" in done.stderr and not (at / "runs/lost").exists()


@plain_lora
def test_a_recogniser_that_other_code_reads_is_warned_of(at, monkeypatch, capsys):
    run_line(f"{TUNE} --method lora:r=2 --out runs/before", at, check=0)
    finetune_lora.load_classifier(at / "runs/before")
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(finetune_lora.LoRA, "forward", lambda self, x: self.base(x) + 0.1)
    finetune_lora.load_classifier(at / "runs/before")
    assert "its features are" in capsys.readouterr().err


@plain_lora
def test_an_adapter_that_trains_in_part_or_cannot_be_merged_says_so_at_the_start(at, monkeypatch):
    class Unused(finetune_lora.LoRA):
        """Its `weight` is scaled, and its `forward` was forgotten."""

        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            self.s = torch.nn.Parameter(torch.full((self.base.out_features, 1), 2.0))

        def weight(self):
            return self.s * super().weight()

    assert "note" not in run_line(f"{TUNE} --method lora:r=2 --out runs/plain", at, check=0).stdout
    monkeypatch.setattr(finetune_lora, "LoRA", Unused)
    said = run_line(f"{TUNE} --method lora:r=2 --out runs/unused", at, check=0).stdout
    assert "encoder.blocks.0.attn.qkv.s" in said and "not be merged" in said


def test_an_adapter_with_dropout_is_plain_and_one_with_a_rank_for_each_block_is_not(monkeypatch):
    """peft knows one rank for all blocks. Dropout is off where an adapter is used."""
    plain = finetune_lora.LoRA

    class Dropping(plain):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, self.training))

    sizes = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 2}
    for kind, expected in ((Dropping, True), (plain, False)):
        monkeypatch.setattr(finetune_lora, "LoRA", kind)
        encoder = ViT(**sizes)
        finetune_lora.add_lora(encoder, 2)
        if not expected:
            encoder.blocks[1].attn.qkv = plain(encoder.blocks[1].attn.qkv.base, 4, 8, 3)
        assert finetune_lora.is_plain(encoder) == expected
