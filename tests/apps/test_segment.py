"""Drawn or photographed: the made frames, patches by labels of frames, proxies, pixels, and the command line."""

import csv
import json
import shutil
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_folder, refused, run_line
from made import CPU
from PIL import Image
from sklearn.metrics import jaccard_score

import data
from apps import segment
from common.train import seeded
from ingest import hybrid
from model import ViT

QUICK = f"--epochs 2 --pixel-steps 1 {CPU}"


# ---- the made frames -----------------------------------------------------------------------------


def test_a_photograph_is_in_one_split_and_says_whose_it_is():
    assert {split for _, split, _ in hybrid.PHOTOS.values()} == set(hybrid.COUNTS)
    assert all(licence for _, _, licence in hybrid.PHOTOS.values())
    photos = [*chain.from_iterable(map(hybrid.open_photos, hybrid.COUNTS))]
    assert len(photos) == len(hybrid.PHOTOS) == 19
    assert all(photo.mode == "RGB" and min(photo.size) >= 200 for photo in photos)


def test_masks_say_what_is_drawn():
    """Without grain and JPEG a drawn pixel is the drawing's, a photographed one the photograph's."""
    rng = np.random.default_rng(0)
    figure = hybrid.toon.draw(hybrid.toon.plan(1)[0], 64)
    drawing, photo = np.full((64, 64, 3), 200.0), np.full((64, 64, 3), 20.0)
    for kind in hybrid.KINDS:
        frame, share = hybrid.mix(kind, figure, drawing.copy(), photo, rng)
        assert frame[share == 0].max(initial=0) <= 40, kind  # folds may lighten clothes
        if kind != "photographed":  # all but the rim of a window
            assert (frame[share == 1] == 200).mean() > 0.85, kind
        if kind in segment.KINDS:
            assert share.mean() == segment.KINDS.index(kind)
        else:
            assert 0.02 < share.mean() < 0.98, kind
    share = hybrid.mix("soft_blend", figure, drawing, photo, rng)[1]
    assert ((share > 0.05) & (share < 0.95)).mean() > 0.15


def test_layers_take_mean_and_covariance_of_another():
    rng = np.random.default_rng(1)
    layer = np.float32(128 + 20 * rng.normal(size=(64, 64, 3)) @ rng.normal(size=(3, 3)))
    palette = np.array([120.0, 130, 140]), np.linalg.cholesky(np.diag([90.0, 60, 30]) + 20)
    mean, root = hybrid.statistics(hybrid.recolour(layer, palette))
    assert mean == pytest.approx(palette[0], abs=0.5)
    assert root == pytest.approx(palette[1], rel=0.15, abs=0.6)  # a little is added to the diagonal


@pytest.mark.slow
def test_the_packed_set_tells_kinds_and_masks(tmp_path, monkeypatch):
    few = {"train": (2, 1, 0), "dev": (1, 1, 1), "val": (3, 2, 2), "test": (1, 1, 1)}
    monkeypatch.setattr(hybrid, "COUNTS", few)
    run_line("data.py hybrid --out packed --size 32", tmp_path, check=0)
    val = data.open_split(tmp_path / "packed", "val")
    header, names = val["header"], np.array(val["header"]["classes"])[val["labels"]]
    assert header["hybrid"] == {"mixed": list(hybrid.MIXED), "purely": list(hybrid.PURELY)}
    assert len(val["labels"]) == 2 * 3 + 5 * 2
    assert (val["drawn"][names == "drawn"] == 255).all()
    assert (val["drawn"][names == "photographed"] == 0).all()
    assert 0.05 < (val["drawn"][np.isin(names, hybrid.MIXED)] > 127).mean() < 0.95


# ---- patches, proxies, masks ---------------------------------------------------------------------


def brightness(view):
    """In the place of the scores of patches: frames (None), patches (B, S/8, S/8)."""
    return None, view.float().mean(3).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4))


def test_the_nearest_centroid_decides():
    torch.manual_seed(0)
    net = segment.Patches(ViT(32, 8, 32, 1, 2)).eval()
    view = torch.randint(0, 256, (3, 32, 32, 3), generator=seeded(0), dtype=torch.uint8)
    net.centroids.copy_(torch.randn(2, 32, generator=seeded(1)))
    frame, patches = net.scores(view)
    tokens = net.encoder.features(view)[:, 1:]
    near = torch.cdist(tokens, net.centroids.expand(3, 2, 32)).argmin(2).view(3, 4, 4)
    assert torch.equal(patches > 0, near == 1)
    mean = torch.cdist(tokens.mean(1), net.centroids).argmin(1)  # a frame is the mean of patches
    assert torch.equal(frame > 0, mean == 1)


class Brightness(torch.nn.Module):
    """In the place of a network: the mean of each patch."""

    encoder = ViT(32, 8, 32, 1, 2)

    def forward(self, patches, ids):
        return patches.mean(2)


def test_patches_of_another_frame_keep_its_label(monkeypatch):
    """One frame is black and photographed, one white and drawn: a patch's label is its brightness."""
    seen = []
    loss = "binary_cross_entropy_with_logits"
    monkeypatch.setattr(segment.F, loss, lambda logits, labels: seen.extend((logits, labels)))
    for name, value in {"MIN_CROP": 1, "COLOUR": 0, "KEEP": 0.75}.items():
        monkeypatch.setattr(segment, name, value)
    task = SimpleNamespace(S=32, train=SimpleNamespace(kind=torch.tensor([0, 1])))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 32, 32, 3)
    segment.patch_loss(task, Brightness(), torch.tensor([0, 1]), images, seeded(3))
    patches, labels = seen
    low, high = patches.min(), patches.max()
    assert torch.allclose((patches - low) / (high - low), labels, atol=1e-5)
    assert labels.shape == (2, 12) and 0 < labels[0].sum() < 12  # some are another frame's


def test_cuts_have_all_shapes_and_every_frame_is_cut():
    corners = segment.cut_masks(400, 32, seeded(1))[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(1)
    assert 0.2 < (corners == 0).float().mean() < 0.6  # windows, and a few blobs
    assert all((corners == n).any() for n in range(5))
    view, drawn = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8), torch.rand(6, 32, 32)
    shown, masks = segment.cut_together(view, drawn, seeded(2))
    theirs = masks != drawn
    assert theirs.any((1, 2)).all() and torch.equal(shown[theirs], view.flip(0)[theirs])
    assert torch.equal(masks[theirs], drawn.flip(0)[theirs])
    assert torch.equal(shown[~theirs], view[~theirs])


def test_scores_between_patches_are_means_of_moved_frames():
    """Scores are the brightness of a patch; one bright square has half a patch's side."""
    view = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    view[:, 8:12, 8:12] = 240
    net = SimpleNamespace(encoder=SimpleNamespace(patch_size=8, side=4), scores=brightness)
    fine = segment.fine_scores(net, view)
    assert fine.shape == (1, 8, 8) and fine[0, 2, 2] == fine.max() == pytest.approx(60)
    assert fine[0, 2, 3] == fine[0, 3, 2] == pytest.approx(30) and fine[0, 6, 6] == 0


def test_two_means_finds_the_halves_of_each_frame_whatever_its_level():
    true = torch.arange(24)[None] < torch.tensor([6, 12, 20])[:, None]
    low = torch.tensor([0.1, 0.2, 0.62])[:, None]
    noise = 0.02 * torch.randn(3, 24, 24, generator=seeded(0))
    probability = (low + 0.25 * true)[:, None].expand(3, 24, 24) + noise
    moved = segment.two_means(probability)
    assert ((moved > 0.5) == true[:, None]).all()
    assert not ((probability > 0.5) == true[:, None]).all((1, 2)).any()
    assert segment.two_means(torch.full((1, 4, 4), 0.9)).isfinite().all()


def test_the_guided_filter_moves_a_blurred_border_to_the_edge():
    view = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    view[:, :, 18:] = 200
    blurred = torch.sigmoid((torch.arange(32.0) - 16) / 3).expand(1, 32, 32)
    found, true = segment.guided_filter(blurred, view, 4), (torch.arange(32) >= 18).float()
    assert torch.equal((found > 0.5).float(), true.expand(1, 32, 32))
    assert ((blurred > 0.5) != (true > 0)).any()
    assert found[0, 16, 18] - found[0, 16, 17] > 0.3  # a step, not a slope
    flat = segment.guided_filter(torch.full((1, 32, 32), 0.3), view, 4)
    assert flat == pytest.approx(torch.full((1, 32, 32), 0.3), abs=1e-5)


def test_masks_to_learn_are_those_of_mixed_frames_else_the_frames_kind():
    masks = np.full((3, 2, 2), 200, np.uint8)
    masks[:, 0] = 100
    task = SimpleNamespace(masks=masks, train=SimpleNamespace(kind=torch.tensor([0, 1, -1])))
    found = segment.masks_to_learn(task, torch.arange(3))
    assert found.tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [1, 1]]]


# ---- networks of pixels --------------------------------------------------------------------------


def test_the_network_of_pixels_begins_at_chance_and_answers_for_frames_of_any_size():
    torch.manual_seed(0)
    net = segment.Pixels(segment.Patches(ViT(32, 8, 32, 2, 2)))
    noise = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    target, loss = torch.rand(4, 32, 32), torch.nn.BCEWithLogitsLoss()
    assert loss(net.train()(noise), target) < 0.9
    masks = segment.pixel_masks(net.eval(), noise[:1, :36, :50], nullcontext)
    assert masks.shape == (1, 36, 50) and masks.min() >= 0 and masks.max() <= 1


def test_the_network_of_pixels_is_shown_scores_where_their_patches_are():
    patches = segment.Patches(ViT(32, 8, 32, 2, 2))
    patches.scores = brightness
    view = torch.zeros(1, 64, 96, 3)  # seen by the encoder at 32 by 32
    view[:, 32:, :48] = 200
    hint = segment.Pixels(patches).hint(view.permute(0, 3, 1, 2))
    assert hint.shape == (1, 1, 64, 96) and not hint.requires_grad
    assert hint[0, 0, 60, 4] == pytest.approx(200)
    assert hint[0, 0, 4, 4] == hint[0, 0, 60, 90] == 0


def test_a_large_picture_is_masked_on_a_smaller_copy(monkeypatch):
    """A network that takes bright pixels for drawn, and a picture whose right half is bright."""
    monkeypatch.setattr(segment, "LARGEST", 64)
    monkeypatch.setattr(segment, "pixel_masks", lambda net, view, _: (view[..., 0] > 128).float())
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[:, 80:] = 255
    found = segment.mask_of(torch.nn.Linear(1, 1), picture, 32, None)
    assert found.shape == (96, 160)
    assert (found[:, :70] < 0.2).all() and (found[:, 90:] > 0.8).all()


def test_masks_are_judged_as_by_scikit_learn():
    share = torch.tensor([0.4, 0.6]).view(2, 1, 1, 1)
    found, true = torch.rand(2, 3, 8, 8, generator=seeded(0)) > share
    row = segment.judge_masks([(found[:1], true[:1]), (found[1:], true[1:])])
    drawn = 100 * jaccard_score(true.flatten(), found.flatten())
    photographed = 100 * jaccard_score(~true.flatten(), ~found.flatten())
    assert row["iou_drawn"] == pytest.approx(drawn, abs=0.01)
    assert row["iou_photographed"] == pytest.approx(photographed, abs=0.01)
    assert row["miou"] == pytest.approx((drawn + photographed) / 2, abs=0.01)


# ---- the stage -----------------------------------------------------------------------------------


def test_three_stages_leave_their_files_and_numbers(base):
    """Accuracy and proxies are found again from the file of stage 1 alone."""
    run = base / "runs/a-seg"
    row = json.loads((run / "metrics.json").read_text())
    assert row["pixels"]["val"].keys() == {"mixed", "panels"}
    for stage in ("proxies", "pixels"):
        assert row[stage].keys() == {"dev", "val", "dev_known", "val_known"}
    net = segment.load_patches(run)
    train, val = (data.open_split(base / "datasets/frames", name) for name in ("train", "val"))
    train, val = (segment.frames_of(x, torch.arange(len(x["labels"]))) for x in (train, val))
    task = SimpleNamespace(S=32, device=torch.device("cpu"), autocast=nullcontext, train=train)
    assert segment.judge_frames(task, net, val) == row["frames"]["val"]
    masks = segment.proxies_of(task, net)
    assert masks.shape == (36, 32, 32) and not masks[train.plain].any()
    assert masks[train.mixed].any((1, 2)).all()


@pytest.mark.parametrize("mixed", ["", "--mixed"])
def test_pictures_of_any_size_get_a_mask_an_overlay_and_their_share(base, mixed):
    sizes = {"wide": (90, 40), "dot": (1, 1), "own": (32, 32)}
    rng = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{name}.png")
    (base / "none.png").write_text("no picture")
    out = base / f"masks{mixed}"
    files = " ".join(f"{name}.png" for name in (*sizes, "none"))
    done = run_line(f"apps.segment runs/a-seg {files} --out {out} {CPU} {mixed}", base, check=0)
    assert "none.png is not a picture" in done.stderr
    rows = {row["picture"]: float(row["drawn"]) for row in csv.DictReader(done.stdout.splitlines())}
    assert rows.keys() == {f"{name}.png" for name in sizes}
    for name, (width, height) in sizes.items():
        mask = np.asarray(Image.open(out / f"{name}-mask.png"))
        assert mask.shape == (height, width) and set(mask.flat) <= {0, 255}
        assert rows[f"{name}.png"] == pytest.approx((mask == 255).mean(), abs=1e-4)
        assert (out / f"{name}-overlay.png").exists()


def test_stage_1_of_another_run_is_used_and_not_written_again(base):
    words = "--patches runs/a-seg --learn-from frames --network unet:hint=0 --pixel-steps 1"
    line = f"apps.segment runs/a --data datasets/frames {words} {CPU} --out runs/again"
    run_line(line, base, check=0)
    assert not (base / "runs/again/patches.safetensors").exists()
    assert segment.load(base / "runs/again")[0].patches is None


def test_folders_of_ones_own_frames_are_enough(base):
    draw_folder(base / "own", classes=2, each=16)
    for i, name in enumerate(segment.KINDS):
        shutil.move(base / f"own/class{i}", base / "own" / name)
    run_line("data.py own --out datasets/own --size 32", base, check=0)
    line = f"apps.segment runs/a --data datasets/own --out runs/own {QUICK}"
    assert "no mixed frames" in refused(run_line(line, base))
    run_line(f"{line} --learn-from frames", base, check=0)
    assert json.loads((base / "runs/own/metrics.json").read_text())["pixels"] == {}
