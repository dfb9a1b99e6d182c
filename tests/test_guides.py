"""common/guidance.py: maps follow their images, the truth or a file is chosen, every strategy trains."""

import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, stage
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import mask as masking
import pretrain
from common import evaluate, guidance
from common.command import LOCKS
from common.formats import is_decoder
from common.train import read_log
from model import ViT

QUICK = ["--device", "cpu", "--model", "nano:image_size=32", "--batch-size", 16, "--epochs", 2]
SIMMIM = [*QUICK[:3], "nano:image_size=32,simmim=1", *QUICK[4:]]


@pytest.mark.parametrize(
    "epochs, start, expected",
    [
        (12, 0.1, {2, 3, 6}),
        (3, 0.1, {1, 2}),
        (400, 0.1, {40, 100, 200}),
        (8, 0.4, {4}),
        (8, 0, {0, 2, 4}),
        (8, 1, {8}),
    ],
)
def test_a_teacher_makes_new_maps_while_it_learns_fast(epochs, start, expected):
    assert guidance.average_of(ViT(32, 8, 32, 1, 1), "cls", epochs, start).epochs == expected


@pytest.mark.parametrize("total", [30, 290, 2000, 100_000])
def test_the_first_map_is_made_by_a_teacher_that_learned(total):
    """Whatever the length of a run: at its first map, the random weights have 2 % of the teacher."""
    first = int(masking.START * total)
    momenta = [guidance.ema_momentum(step, total) for step in range(first)]
    assert math.prod(momenta) < 0.02
    assert math.prod(momenta[: first // 4]) > 0.02  # an average, not a copy


def test_the_teacher_follows_the_encoder():
    """A constant encoder: the teacher has a known share of its first weights, the rest is new."""
    encoder = ViT(32, 8, 32, 1, 1)
    teacher = guidance.average_of(encoder, "cls", 10, 0.1)
    first = [w.detach().clone() for w in teacher.encoder.parameters()]
    with torch.no_grad():
        for w in encoder.parameters():
            w += 1
    for step in range(12):
        teacher.update(encoder, step, 100)
    left = guidance.initial_share(12, 100)
    assert 0 < left < 0.01
    for total in (168, 2000, 8000):  # a run of any length: before the first map that guides
        assert guidance.initial_share(round(masking.START * total), total) < 0.02
    for old, new in zip(first, teacher.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, old + (1 - left))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A packed set with true foreground masks: an ellipse of a class's colour before noise, 32 px."""
    base, rng = tmp_path_factory.mktemp("figures"), np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for c in range(3):
        (base / "pictures" / f"c{c}").mkdir(parents=True)
        for i in range(30):
            cy, cx, r = rng.uniform(8, 24), rng.uniform(8, 24), rng.uniform(4, 12)
            figure = ((y - cy) ** 2 + (x - cx) ** 2 < r**2)[..., None]
            colour = np.eye(3)[c] * 200 + rng.normal(0, 20, (32, 32, 3))
            rgba = np.concatenate(
                [np.where(figure, colour, rng.normal(128, 60, (32, 32, 3))), 255 * figure], 2
            )
            Image.fromarray(rgba.clip(0, 255).astype(np.uint8)).save(
                base / "pictures" / f"c{c}" / f"{i}.png"
            )
    words = [
        "data.py",
        base / "pictures",
        "--out",
        base / "packed",
        "--size",
        32,
        "--dedupe",
        "off",
    ]
    stage(*words, cwd=base, check=0)
    return base / "packed"


def write_parts(folder, path, parts=3):
    """Part maps as maps.py writes them: random parts on a grid of 4."""
    train = data.open_split(folder, "train")
    n = len(train["images"])
    labels = np.random.default_rng(0).integers(0, parts + 1, (n, 4, 4), dtype=np.uint8)
    header = {
        "map": "parts",
        "data_digest": data.fingerprint(train),
        "grid": 4,
        "parts": parts,
        "by": "a test",
    }
    data.write_maps(path, "parts", [labels], labels.shape, "U8", header)
    return labels


def run(monkeypatch, *words):
    """pretrain.py in this process, a smaller network, no pictures: they would take most of the time."""
    small = dict(dim=32, depth=2, heads=1, image_size=32, patch_size=8, decoder_dim=32)
    monkeypatch.setitem(pretrain.SIZES, "nano", small)
    monkeypatch.setattr(pretrain, "draw_run", lambda *_: None)
    monkeypatch.setattr(pretrain, "draw_masks", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [str(w) for w in ["pretrain.py", *words]])
    pretrain.main()
    LOCKS.close()


# ---- maps follow their images --------------------------------------------------------------------


def test_a_hot_patch_follows_crop_and_flip():
    """One bright cell in the image and the same in the map: after 40 crops they are still at one
    place.
    """
    n, S, side = 40, 64, 8
    boxes, flip = data.draw_boxes(n, torch.Generator().manual_seed(0), 0.3)
    images, maps = np.zeros((n, S, S, 3), np.uint8), np.zeros((n, side, side), np.float16)
    for i in range(n):  # a cell in the middle of what is shown
        row, column = (int(side * (boxes[i, k] + boxes[i, k + 2] / 2)) for k in (0, 1))
        images[i, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 255
        maps[i, row, column] = 1
    view = data.view_images(torch.from_numpy(images), boxes, flip, S)
    seen = torch.nn.functional.avg_pool2d(view.permute(0, 3, 1, 2).float(), 8)[:, 0].flatten(1)
    known = guidance.crop_map(maps, torch.arange(n), boxes, flip, side)
    assert (
        known.argmax(1) == seen.argmax(1)
    ).float().mean() > 0.8  # a cell on an edge may be rounded to its neighbour
    assert torch.nn.functional.cosine_similarity(known, seen).min() > 0.75
    unflipped = guidance.crop_map(maps, torch.arange(n), boxes, ~flip, side)
    assert (unflipped.argmax(1) == seen.argmax(1)).float().mean() < 0.5


def test_parts_are_shares_and_figure_is_one_of_them():
    labels = np.random.default_rng(0).integers(0, 5, (6, 32, 32), dtype=np.uint8)
    boxes, flip = data.draw_boxes(6, torch.Generator().manual_seed(0), 0.3)
    rows = torch.tensor([4, 0, 5, 1, 3, 2])
    shares = guidance.crop_parts(labels, rows, boxes, flip, 8, 5)
    assert shares.shape == (6, 64, 5)
    torch.testing.assert_close(shares.sum(2), torch.ones(6, 64))
    figure = guidance.crop_map(np.uint8(255 * (labels > 0)), rows, boxes, flip, 8)
    torch.testing.assert_close(1 - shares[..., 0], figure)


def test_what_was_hidden_of_figure_and_ground():
    fg = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    assert guidance.region_shares(fg, torch.tensor([[0, 2], [1, 2]])) == pytest.approx(
        {"fg_hidden": 1 / 3, "bg_hidden": 3 / 5}
    )
    assert guidance.region_shares(torch.zeros(1, 4), torch.tensor([[0, 1]])) == {
        "fg_hidden": 0.0,
        "bg_hidden": 0.5,
    }


def test_attention_by_part_is_1_where_attention_is_even(figures):
    split = dict(data.open_split(figures, "val"))
    split["parts"] = np.uint8(split["fg"] > 127)
    split["header"] = split["header"] | {"parts": ["ground", "figure", "nowhere"]}
    torch.manual_seed(0)
    encoder = ViT(32, 8, 32, 1, 1)
    with torch.no_grad():
        encoder.blocks[-1].attn.qkv.weight.zero_()
    found = evaluate.attention_by_part(
        encoder, split, "cls", lambda: torch.autocast("cpu", enabled=False)
    )
    assert found == {"ground": 1.0, "figure": 1.0}
    with torch.no_grad():  # now it looks at what is bright: the ratio must leave 1
        torch.nn.init.normal_(encoder.blocks[-1].attn.qkv.weight, std=0.5)
    found = evaluate.attention_by_part(
        encoder, split, "cls", lambda: torch.autocast("cpu", enabled=False)
    )
    assert abs(found["figure"] - 1) > 0.01


def test_what_is_unusual_for_its_place_is_found():
    """Pictures alike but for one patch each: that patch has the highest score, whatever the
    encoder's place codes.
    """
    torch.manual_seed(0)
    encoder, images = ViT(32, 8, 32, 2, 1), np.full((24, 32, 32, 3), 90, np.uint8)
    images[:, :, 16:] = 200  # what stands in all of them is usual
    odd = np.random.default_rng(0).integers(0, 16, 24)
    for i, k in enumerate(odd):
        images[i, k // 4 * 8 : k // 4 * 8 + 8, k % 4 * 8 : k % 4 * 8 + 8] = (255, 0, 40)

    def exact():
        return torch.autocast("cpu", enabled=False)

    ((_, score),) = guidance.attention(encoder, images, torch.arange(24), "outlier", exact)
    assert torch.equal(score.argmax(1), torch.from_numpy(odd))


# ---- every strategy, as a user runs it -----------------------------------------------------------


ALL = [*masking.STRATEGIES, *(f"{name}:shuffle=1" for name in masking.NEEDS)]
OFTEN = (
    "attn_high",
    "fg_heavy",
    "parts",
    "detail",
    "learned",
    "squares",
    "attn_low:shuffle=1",
    "learned:shuffle=1",
)


@pytest.mark.parametrize(
    "mask", [m if m in OFTEN else pytest.param(m, marks=pytest.mark.slow) for m in ALL]
)
def test_every_strategy_trains(figures, tmp_path, monkeypatch, mask):
    monkeypatch.chdir(tmp_path)
    write_parts(figures, tmp_path / "maps" / figures.name / "parts.safetensors")
    run(monkeypatch, "--data", figures, "--mask", mask, *QUICK, "--out", "out")
    rows = read_log("out/log.jsonl")
    last = [r for r in rows if "loss" in r][-1]
    assert rows[-1]["val_mse"] < rows[0]["val_mse"] and last["mask_diversity"] > 0
    if masking.NEEDS.get(mask.split(":")[0]) == "fg" and "shuffle" not in mask:
        first, other = (
            ("fg_hidden", "bg_hidden") if mask == "fg_heavy" else ("bg_hidden", "fg_hidden")
        )
        assert last[first] > last[other]
    assert ("mask_entropy" in last) == mask.startswith("learned")


def test_simmim_has_its_own_ratio_and_no_decoder(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--data", figures, *SIMMIM, "--out", "sim")
    rows = read_log("sim/log.jsonl")
    assert rows[-1]["val_mse"] < rows[0]["val_mse"]
    header = json.loads(header_of("sim/model.safetensors"))
    assert header["run"]["ratio"] == "0.6" and "decoder_depth" not in header["config"]
    words = ["--mask", "attn_high", "--teacher", "sim", *QUICK, "--out", "pupil"]
    run(monkeypatch, "--data", figures, *words)
    assert "attention (outlier) of sim" in capsys.readouterr().out


def header_of(path):
    with safe_open(path, "pt") as f:
        return f.metadata()["animask"]


def test_a_shuffled_guide_takes_the_next_images_map(figures, tmp_path, monkeypatch):
    """The same crops, and in the place of each image's map that of its neighbour in the batch."""
    seen, plain = [], guidance.crop_map

    def noted(maps, rows, *rest):
        seen.append(rows)
        return plain(maps, rows, *rest)

    monkeypatch.setattr(guidance, "crop_map", noted)
    monkeypatch.chdir(tmp_path)
    words = ["--data", figures, "--contrast", "none", *QUICK, "--epochs", 1]
    for mask in ("fg_heavy", "fg_heavy:shuffle=1"):
        run(monkeypatch, *words, "--mask", mask, "--out", mask[-1])
    half = len(seen) // 2
    assert half and all(
        torch.equal(a.roll(1), b) for a, b in zip(seen[:half], seen[half:], strict=True)
    )


@pytest.mark.parametrize(
    ("mask", "part"),
    [("learned:start=0,ramp_for=0", "predictor"), ("attn_high:start=0", "teacher")],
)
def test_a_guided_run_resumes_to_the_same_bits(figures, tmp_path, monkeypatch, mask, part):
    """The predictor, or the teacher with its maps, is a part of the state."""
    monkeypatch.chdir(tmp_path)
    words = ["--data", figures, "--mask", mask, *QUICK]
    run(monkeypatch, *words, "--out", "whole")

    plain = guidance.Guide.update_teacher

    def stop_at_5(self, encoder, step, total):
        plain(self, encoder, step, total)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(guidance.Guide, "update_teacher", stop_at_5)
        with pytest.raises(SystemExit):
            run(monkeypatch, *words, "--out", "parts")
    LOCKS.close()
    run(monkeypatch, "--resume", "parts")
    a, b = (torch.load(f"{out}/state.pt", weights_only=True) for out in ("whole", "parts"))
    for key in ("model", part):
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])
    assert a["guide"] == b["guide"]


def as_dino(run_folder, path):
    """A run's encoder in the format of DINO's full checkpoints: a student, and a teacher with
    prefixes and a head.
    """
    weights = {
        k: w for k, w in load_file(f"{run_folder}/model.safetensors").items() if not is_decoder(k)
    }
    teacher = {"module.backbone." + k: w for k, w in weights.items()} | {
        "module.head.mlp.0.weight": torch.zeros(4, 4)
    }
    student = {k: torch.zeros_like(w) for k, w in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 7}, path)


def test_a_foreign_teacher_in_two_steps(figures, tmp_path, monkeypatch, capsys):
    """--init dino.pth adapts it to these images, --teacher lets what came of it guide."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--data", figures, *QUICK, "--out", "first")
    as_dino("first", "dino.pth")
    Path("config.json").write_text('{"num_attention_heads": 1}')
    run(monkeypatch, "--data", figures, *QUICK, "--init", "dino.pth", "--out", "adapted")
    assert "dino.pth: encoder, the decoder starts anew" in capsys.readouterr().out
    for teacher, source in (("dino.pth", "cls"), ("adapted", "pooler")):
        words = ["--mask", "attn_high:beta=2", "--teacher", teacher, "--out", f"by-{teacher}"]
        run(monkeypatch, "--data", figures, *QUICK, *words)
        assert f"attention ({source}) of {teacher}" in capsys.readouterr().out
        assert Path(f"by-{teacher}/attn-00000000.safetensors").exists()


def test_a_run_goes_on_from_another_with_its_decoder_or_as_simmim(
    figures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--data", figures, *QUICK, "--out", "first")
    run(monkeypatch, "--data", figures, *SIMMIM, "--init", "first", "--out", "simmim")
    run(monkeypatch, "--data", figures, *QUICK, "--init", "simmim", "--out", "back")
    assert capsys.readouterr().out.count("the decoder starts anew") == 2
    run(monkeypatch, "--data", figures, *QUICK, "--init", "first", "--seed", 1, "--out", "adapted")
    assert "first: encoder and decoder" in capsys.readouterr().out
    rows = [
        [r for r in read_log(f"{out}/log.jsonl") if "val_mse" in r] for out in ("first", "adapted")
    ]
    assert rows[1][0]["val_mse"] == pytest.approx(
        rows[0][-1]["val_mse"], rel=0.02
    )  # it goes on where that one ended


def test_the_readmes_exercise_works_as_it_stands(figures, tmp_path, monkeypatch):
    """Its code and its entry are put into mask.py, and the mask trains."""
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(def middle.*?)```", text, re.S).group(1)
    assert len(code.strip().splitlines()) <= 10
    entry = re.search(r"add the entry `(.*?)`", text).group(1)
    source = (ROOT / "mask.py").read_text()
    source = source.replace("STRATEGIES = {", f"{code}\n\nSTRATEGIES = {{\n    {entry},")
    changed = {}
    exec(source, changed)
    for table in ("STRATEGIES", "PARAMS"):
        monkeypatch.setattr(masking, table, changed[table])
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--data", figures, "--mask", "middle:beta=3", *QUICK, "--out", "out")
    assert json.loads(Path("out/log.jsonl").read_text().splitlines()[-1])["val_mse"] > 0
    noise = masking.gumbel_noise(500, 64, torch.Generator().manual_seed(0))
    priority = changed["middle"]({}, noise, 0.5, 32)
    often = torch.zeros(64).scatter_add_(
        0, masking.sample(priority, 32)[1].flatten(), torch.ones(500 * 32)
    )
    assert often.view(8, 8)[3:5, 3:5].min() > 2 * often.view(8, 8)[0].max()


# ---- which maps ----------------------------------------------------------------------------------


def test_the_truth_goes_before_an_estimate_and_both_can_be_asked_for(
    figures, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train = data.open_split(figures, "train")
    assert guidance.open_maps("fg", "auto", figures, train)[2].startswith(
        "the true foreground masks"
    )
    n = len(train["images"])
    header = {
        "map": "saliency",
        "quality": "coarse",
        "data_digest": data.fingerprint(train),
        "grid": 2,
    }
    path = Path("maps") / figures.name / "saliency.safetensors"
    data.write_maps(path, "saliency", [np.full((n, 2, 2), 255, np.uint8)], (n, 2, 2), "U8", header)
    assert guidance.open_maps("fg", "auto", figures, train)[2].startswith(
        "the true foreground masks"
    )
    maps, _, what = guidance.open_maps("fg", path.parent, figures, train)
    assert maps.shape == (n, 2, 2) and what == f"{path.parent} coarse"
    assert guidance.open_maps("fg", "truth", figures, train)[0].shape == (n, 32, 32)
    train.pop("fg")
    assert guidance.open_maps("fg", "auto", figures, train)[2] == f"{path} coarse"


def test_missing_or_foreign_maps_name_the_command(figures, small, tmp_path):
    def refusal(*words):
        done = call("pretrain.py", *words, *QUICK, "--out", tmp_path / "out", cwd=tmp_path)
        assert not (tmp_path / "out").exists()
        return refused(done)

    assert f"python maps.py --data {small} --map saliency" in refusal(
        "--data", small, "--mask", "fg_heavy"
    )
    assert f"python maps.py --data {figures} --map parts" in refusal(
        "--data", figures, "--mask", "parts"
    )
    line = refusal("--data", small, "--mask", "bg_heavy", "--maps", "truth")
    assert "has no foreground masks" in line and "maps.py" in line
    write_parts(figures, tmp_path / "other" / "parts.safetensors")
    assert "another data set" in refusal(
        "--data", small, "--mask", "parts", "--maps", tmp_path / "other"
    )
    assert "no key 'shuffle'" in refusal("--data", small, "--mask", "random:shuffle=1")
    line = refusal("--data", small, "--init", "nowhere")
    assert "nowhere" in line
