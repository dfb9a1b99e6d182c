"""common/agreement.py: two views of one image find each other, in every way of running; and what follows the result."""

import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused

import data
import pretrain as stage
from common import guidance
from common.agreement import Agreement, agreement_loss
from common.checkpoints import load_teacher
from common.evaluate import effective_rank
from common.train import read_log
from experiments import stress
from model import MAE, SIZES, ViT

CLS = ["--contrast", "cls:weight=.5", "--mask", "attn_high"]
TINY = ["--device", "cpu", "--model", "nano:image_size=32", "--batch-size", 16]
DCL = {"temperature": 0.15, "dcl": 1}


@pytest.fixture(autouse=True, scope="module")
def small_nano():
    """Half as wide, a sixth as deep, for what runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "nano", SIZES["nano"] | {"dim": 96, "depth": 2})
        yield


def pretrain(data, out, *words, check=0):
    words = ["--data", data, "--out", out, *TINY, "--epochs", 2, *words]
    return call("pretrain.py", *words, cwd=out.parent, check=check)


def by_hand(h, groups, T, dcl):
    """The formula at the head of common/agreement.py, one exponential after the other."""
    total = 0.0
    for i in range(len(h)):
        j = i + 1 if i % 2 == 0 else i - 1
        among = [k for k in range(len(h)) if groups[k] != groups[i] or (k == j and not dcl)]
        total -= math.log(math.exp(h[i] @ h[j] / T) / sum(math.exp(h[i] @ h[k] / T) for k in among))
    return total / len(h)


@pytest.mark.parametrize("dcl", [False, True])
def test_the_loss_is_the_formula(dcl):
    """Images 0 and 3 are near-duplicates: four views that are nobody's negatives among themselves."""
    h = F.normalize(torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = torch.tensor([0, 1, 2, 0, 4]).repeat_interleave(2)
    loss, _ = agreement_loss(h, groups, 0.3, dcl)
    assert loss.item() == pytest.approx(by_hand(h, groups.tolist(), 0.3, dcl), rel=1e-5)
    assert loss.item() != pytest.approx(
        by_hand(h, torch.arange(5).repeat_interleave(2).tolist(), 0.3, dcl), rel=1e-3
    )


def test_what_is_found_is_counted():
    h = F.normalize(torch.eye(4).repeat_interleave(2, 0), dim=1)
    groups = torch.arange(4).repeat_interleave(2)
    assert agreement_loss(h, groups, 0.1, True)[1] == 1
    assert (
        agreement_loss(h[[0, 2, 1, 3, 4, 5, 6, 7]], groups, 0.1, True)[1] == 0.5
    )  # two images have the other's


def test_effective_rank_counts_directions():
    turn = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    flat = torch.randn(500, 3, dtype=torch.float64) @ turn[:3]
    assert 2.9 < effective_rank(flat + 5) <= 3
    assert effective_rank(torch.arange(20.0)[:, None] * torch.ones(8)) == 1


def test_the_projector_learns_to_find_the_other_view():
    """Two noisy copies of each of 16 vectors, in 60 steps."""
    torch.manual_seed(0)
    agreement = Agreement(32, {"header": {}, "labels": torch.zeros(16)}, DCL)
    things, rows = (x.repeat_interleave(2, 0) for x in (torch.randn(16, 32), torch.arange(16)))
    optimizer, seen = torch.optim.AdamW(agreement.parameters(), 1e-3), []
    for _ in range(60):
        agreement(things + 2 * torch.randn(32, 32), rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(agreement.statistics())
    first, last = (sum(s["found"] for s in part) / 10 for part in (seen[:10], seen[-10:]))
    assert last > first + 0.1
    assert seen[-1]["agreement"] < seen[0]["agreement"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("agreement") / "whole"
    return out, pretrain(small, out, *CLS)


def test_a_run_learns_its_cls_token_and_follows_it(finished):
    out, done = finished
    rows = [r for r in read_log(out / "log.jsonl") if "agreement" in r]
    assert rows and all(0 <= r["found"] <= 1 and r["agreement"] > 0 for r in rows)
    assert "attention (rollout) of self" in done.stdout and "warning" not in done.stdout
    assert any(r.get("mean_rank", 0) > 1 for r in read_log(out / "log.jsonl"))
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["agreement"]["projector.0.weight"].shape == (1024, 96)
    assert state["model"]["encoder.cls_token"].shape == (1, 1, 96)
    from safetensors.torch import load_file

    assert not any("projector" in name for name in load_file(out / "model.safetensors"))


def test_a_stopped_run_ends_with_the_same_bits(small, finished, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch by a signal that comes after four steps."""
    from common import train

    class Four(list):
        def __bool__(self):
            Four.asked += 1
            return Four.asked >= 4

    Four.asked = 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "catch_signals", lambda: Four([signal.SIGTERM]))
        pretrain(small, tmp_path / "run", *CLS, check=143)
    assert 0 < torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] < 10
    call("pretrain.py", "--resume", tmp_path / "run", cwd=tmp_path, check=0)
    one, two = (
        torch.load(out / "state.pt", weights_only=True) for out in (finished[0], tmp_path / "run")
    )
    for part in ("model", "teacher", "agreement"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part]), part


def test_a_pooler_leaves_the_encoder_as_it_is(small, tmp_path):
    """Whatever its loss weighs: under random masks, which no attention guides, the weights are the
    same to the bit.
    """
    for name, weight in (("a", 0.1), ("b", 3)):
        pretrain(small, tmp_path / name, "--contrast", f"pooler:weight={weight}", "--epochs", 1)
    one, two = (
        torch.load(tmp_path / x / "state.pt", weights_only=True)["model"] for x in ("a", "b")
    )
    assert one.keys() == two.keys() and "encoder.pooler.query_token" in one
    assert all(torch.equal(one[k], two[k]) for k in one if "pooler" not in k)
    assert not torch.equal(one["encoder.pooler.kv.weight"], two["encoder.pooler.kv.weight"])


def test_the_default_teacher_has_a_pooler_and_gives_it_away(small, tmp_path):
    """attn_high alone: two views, a pooler; its run is a teacher for another, and maps.py draws
    what it attends to.
    """
    done = pretrain(small, tmp_path / "a", "--mask", "attn_high", "--epochs", 1)
    assert "attention (pooler) of self" in done.stdout
    assert (tmp_path / "a" / "pooler.safetensors").exists()
    words = ["--mask", "attn_hint", "--teacher", tmp_path / "a", "--contrast", "none"]
    done = pretrain(small, tmp_path / "b", *words, "--epochs", 1)
    assert f"attention (pooler) of {tmp_path}/a" in done.stdout
    call(
        "maps.py",
        "--data",
        small,
        "--map",
        "attn",
        "--run",
        tmp_path / "a",
        "--out",
        tmp_path / "maps",
        cwd=tmp_path,
        check=0,
    )
    encoder, _ = load_teacher(tmp_path / "a")
    split = data.open_split(small, "train")
    _, view = next(data.whole_views(split["images"], torch.arange(8), 32, torch.device("cpu")))
    with torch.no_grad():
        expected = encoder.patch_attention(view, "pooler")
    assert expected.shape == (8, 3, 16) and torch.allclose(expected.sum(2), torch.ones(8, 3))
    maps = data.open_map(tmp_path / "maps", "attn", split)[:8].astype("f4")
    assert abs(maps.reshape(8, 16) - expected.mean(1).numpy()).max() < 1e-3
    wrong = pretrain(
        small,
        tmp_path / "c",
        "--mask",
        "attn_high",
        "--contrast",
        "none",
        "--attention",
        "pooler",
        check=2,
    )
    assert "--attention pooler" in refused(wrong)
    wrong = call(
        "maps.py",
        "--data",
        small,
        "--map",
        "attn",
        "--run",
        tmp_path / "b",
        "--attention",
        "pooler",
        "--out",
        tmp_path / "none",
        cwd=tmp_path,
        check=2,
    )
    assert "--attention pooler" in refused(wrong)
    stress.load_mae(
        tmp_path / "a", torch.device("cpu")
    )  # the network alone: a pooler is no part of it


@pytest.mark.slow
def test_a_teacher_with_a_pooler_is_judged_where_parts_are_known(small, tmp_path, monkeypatch):
    """The log says where its attention goes, while a network without a pooler learns from it."""
    open_split = data.open_split

    def with_parts(*words):
        split = open_split(*words)
        parts = np.random.default_rng(0).integers(0, 2, (len(split["images"]), 32, 32), np.uint8)
        return split | {
            "parts": parts,
            "header": split["header"] | {"parts": ["background", "hair"]},
        }

    pretrain(small, tmp_path / "a", "--mask", "attn_high", "--epochs", 1)
    monkeypatch.setattr(data, "open_split", with_parts)
    pretrain(
        small, tmp_path / "b", "--mask", "attn_high", "--teacher", tmp_path / "a", "--epochs", 1
    )
    on = [r["attention_on"] for r in read_log(tmp_path / "b" / "log.jsonl") if "attention_on" in r]
    assert (
        len(on) == 2 and on[0] == on[1] and on[0]["hair"] > 0
    )  # the teacher's, which does not learn


@pytest.mark.parametrize(
    ("flags", "teacher", "files", "source"),
    [
        ({}, "dino.pth", [], "cls"),
        ({"contrast": "none"}, "run", [], "outlier"),
        ({"contrast": "pooler"}, "self", [], "pooler"),
        ({"contrast": "cls"}, "run", [], "rollout"),
        ({"contrast": 0}, "run/model.safetensors", ["run/model.safetensors"], "outlier"),
        ({"contrast": 1, "contrast_by": "cls"}, "run", [], "rollout"),
        ({"contrast": 1, "contrast_by": "pooler"}, "self", [], "pooler"),
        ({"contrast": 1, "contrast_by": "pooler"}, "run", ["run/pooler.safetensors"], "pooler"),
        (
            {"contrast": 1, "contrast_by": "pooler"},
            "run/snapshots/e.safetensors",
            ["run/pooler.safetensors"],
            "outlier",
        ),
    ],
)
def test_a_teacher_is_read_by_what_was_trained(
    tmp_path, monkeypatch, flags, teacher, files, source
):
    """A plain run's own file is no foreign checkpoint, and a snapshot has no pooler."""
    monkeypatch.chdir(tmp_path)
    for name in ["run/snapshots/e.safetensors", "dino.pth", *files]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert guidance.default_source(flags, teacher) == source


def test_the_rollout_is_the_product_over_blocks():
    torch.manual_seed(0)
    encoder, view = ViT(32, 8, 32, 2, 2), torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        x, factors = encoder.embed(*encoder.all_patches(view)), []
        for block in encoder.blocks:
            A = block.attn.probabilities(block.norm1(x), 17).mean(1)
            factors.append(0.5 * A + 0.5 * torch.eye(17))
            x = block(x)
        found = encoder.patch_attention(view, "rollout")
    torch.testing.assert_close(found[:, 0], (factors[1] @ factors[0])[:, 0, 1:])


def test_backgrounds_are_another_images():
    """Left half figure, right half background: of swapped views only the right half changes, to
    another image's.
    """
    fg = np.zeros((4, 32, 32), np.uint8)
    fg[:, :, :16] = 255
    shades = torch.arange(8, dtype=torch.uint8) * 20  # 2 views of 4 images
    view = shades[:, None, None, None].repeat(1, 32, 32, 3)
    rows, (boxes, flip) = torch.arange(4).repeat_interleave(2), data.full_boxes(8)
    draws = torch.full((8, 4), 0.5)  # colours times 1
    draws[:, 3] = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.1, 0.9, 0.1, 0.1])
    mixed = stage.augment(view, fg, rows, boxes, flip, draws)
    assert torch.equal(mixed[:, :, :15], view[:, :, :15])
    right = mixed[:, 0, -1, 0].tolist()
    assert [i for i in range(8) if right[i] != 20 * i] == [0, 1, 4, 6, 7]
    others = [x // 40 for x in right]  # the image that it comes from
    assert (
        all(others[i] != i // 2 for i in (0, 1, 4, 6, 7))
        and others[0] != others[1]
        and others[6] != others[7]
    )
    assert torch.equal(stage.augment(view, None, rows, boxes, flip, draws), view)


@pytest.mark.slow
def test_a_run_without_contrast_has_no_projector(small, tmp_path):
    for name, words in (
        ("none", ["--contrast", "none"]),
        ("zero", ["--contrast", "pooler:weight=0"]),
    ):
        pretrain(small, tmp_path / name, "--epochs", 1, *words)
    one, two = (torch.load(tmp_path / x / "state.pt", weights_only=True) for x in ("none", "zero"))
    assert "agreement" in two and "agreement" not in one


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--dtype", "bf16"], ["--contrast", "pooler:dcl=0"]])
def test_other_ways_to_run_it(small, tmp_path, words):
    pretrain(small, tmp_path / "run", "--epochs", 1, *words)
    row = [r for r in read_log(tmp_path / "run" / "log.jsonl") if "agreement" in r][-1]
    assert 0 < row["agreement"] < 1.5 * math.log(32) + 1 and math.isfinite(row["loss"])


@pytest.mark.slow
def test_compiled(small, tmp_path):
    pretrain(small, tmp_path / "run", "--compile", "--epochs", 1)


@pytest.mark.slow
def test_a_teacher_that_nothing_trained_is_warned_of(small, finished, tmp_path):
    """Its own average without --contrast, and a run that had none; not a run that had it."""
    plain = ["--mask", "attn_high", "--epochs", 1]
    blind = pretrain(small, tmp_path / "a", *plain, "--contrast", "none", "--attention", "cls")
    assert "nothing trains the attention (cls)" in blind.stdout
    other = pretrain(
        small, tmp_path / "b", *plain, "--teacher", tmp_path / "a", "--attention", "cls"
    )
    assert "nothing trains" in other.stdout
    seeing = pretrain(small, tmp_path / "c", *plain, "--teacher", finished[0])
    assert "nothing trains" not in seeing.stdout
    assert "attention (rollout) of" in seeing.stdout


def test_views_of_one_image_are_neighbours():
    """Views 2i and 2i+1 of a batch of V*B are crops of image i."""
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 2, 2, 3).numpy()
    order = torch.tensor([4, 2, 0, 5])
    ((rows, views),) = data.batches(images, order, 4, torch.device("cpu"), times=2)
    assert rows.tolist() == views[:, 0, 0, 0].tolist() == [4, 4, 2, 2, 0, 0, 5, 5]


def test_a_model_returns_its_tokens():
    model = MAE(32, 8, 64, 1, 2, 32, 1)
    patches, ids = torch.randn(2, 4, 192), torch.arange(16).expand(2, 16)
    *_, tokens = model(patches, ids[:, :4], ids[:, 4:])
    torch.testing.assert_close(tokens, model.encoder(patches, ids[:, :4]))
