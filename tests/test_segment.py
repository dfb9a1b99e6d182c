"""Drawn or photographed: the made frames, patches by labels of frames, proxies, pixels, and the command line."""

import csv
import json
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, draw_folder, refused
from PIL import Image

import data
import segment
from common.train import seeded
from ingest import hybrid
from model import ViT

QUICK = ["--epochs", 2, "--pixel-steps", 1, "--device", "cpu", "--dtype", "fp32"]
FEW = {"train": (12, 4, 0), "dev": (2, 1, 1), "val": (3, 2, 2), "test": (1, 1, 1)}


@pytest.fixture(scope="module")
def photos():
    return {split: hybrid.open_photos(split) for split in FEW}


@pytest.fixture(scope="module")
def colours():
    return hybrid.palettes()


@pytest.fixture(scope="package")
def frames(tmp_path_factory):
    """A folder with a few packed frames of every kind, 32 px, and an untrained encoder."""
    from common.checkpoints import save_model
    from model import MAE

    base, counts = tmp_path_factory.mktemp("frames"), hybrid.COUNTS
    hybrid.COUNTS = FEW
    try:
        call("data.py", "hybrid", "--out", "packed", "--size", 32, cwd=base, check=0)
    finally:
        hybrid.COUNTS = counts
    torch.manual_seed(0)
    (base / "encoder").mkdir()
    save_model(MAE(32, 8, 32, 2, 2, 32, 1), base / "encoder" / "model.safetensors", {})
    return base


@pytest.fixture(scope="package")
def learned(frames):
    call(
        "segment.py", "encoder", "--data", "packed", "--out", "learned", *QUICK, cwd=frames, check=0
    )
    return frames / "learned"


# ---- the made frames -----------------------------------------------------------------------------


def test_a_photograph_is_in_one_split_and_says_whose_it_is(photos):
    assert sum(map(len, photos.values())) == len(hybrid.PHOTOS) == 19
    assert {split for _, split, _ in hybrid.PHOTOS.values()} == set(hybrid.COUNTS)
    assert all(
        photo.mode == "RGB" and min(photo.size) >= 200 for some in photos.values() for photo in some
    )
    assert all(licence for _, _, licence in hybrid.PHOTOS.values())


def test_masks_say_what_is_drawn(photos, colours):
    """Without grain and JPEG a drawn pixel is the drawing's, a photographed one the photograph's."""
    rng = np.random.default_rng(0)
    figure = hybrid.toon.draw(hybrid.toon.plan(1)[0], 64)
    drawing, photo = np.full((64, 64, 3), 200.0), np.full((64, 64, 3), 20.0)
    for kind in hybrid.KINDS:
        frame, share = hybrid.mix(kind, figure, drawing.copy(), photo, rng)
        inside = share == 1
        assert frame[share == 0].max(initial=0) <= 40, kind  # folds may lighten clothes
        assert kind == "photographed" or (frame[inside] == 200).mean() > 0.85, (
            kind
        )  # all but the rim of a window
        assert share.mean() == {"drawn": 1, "photographed": 0}.get(
            kind, pytest.approx(0.5, abs=0.48)
        ), kind
    assert ((share > 0) & (share < 1)).sum() == 0  # of clothes
    share = hybrid.mix("soft_blend", figure, drawing, photo, rng)[1]
    assert ((share > 0.05) & (share < 0.95)).mean() > 0.15


def test_frames_are_made_again_alike(photos, colours):
    items = [item for item in hybrid.plan() if item["kind"] in hybrid.MIXED][::160]
    for item in items:
        a, b = (hybrid.draw(dict(item), 32, photos, colours) for _ in range(2))
        assert (
            all(np.array_equal(a[k], b[k]) for k in ("image", "drawn")) and a["style"] == b["style"]
        )
        assert a["image"].shape == (32, 32, 3) and a["drawn"].dtype == a["image"].dtype == np.uint8


def test_layers_take_mean_and_covariance_of_another(colours):
    rng = np.random.default_rng(1)
    layer = np.float32(128 + 20 * rng.normal(size=(64, 64, 3)) @ rng.normal(size=(3, 3)))
    palette = np.array([120.0, 130, 140]), np.linalg.cholesky(np.diag([90.0, 60, 30]) + 20)
    mean, root = hybrid.statistics(hybrid.recolour(layer, palette))
    assert mean == pytest.approx(palette[0], abs=0.5)
    assert root == pytest.approx(
        palette[1], rel=0.15, abs=0.6
    )  # both have a little added to the diagonal


def test_neither_brightness_nor_contrast_tells_the_two_apart(photos, colours):
    items = {
        kind: [i for i in hybrid.plan() if i["kind"] == kind][:40]
        for kind in ("drawn", "photographed")
    }
    found = [
        np.stack([hybrid.draw(i, 32, photos, colours)["image"] for i in some])
        for some in items.values()
    ]
    for measure in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3))):
        a, b = (measure(x.astype(float)) for x in found)
        assert abs(a.mean() - b.mean()) < 3 * np.sqrt(a.var() / len(a) + b.var() / len(b))


def test_the_packed_set_tells_kinds_photographs_and_masks(frames):
    train, val = (data.open_split(frames / "packed", name) for name in ("train", "val"))
    header = val["header"]
    assert header["hybrid"] == {"mixed": list(hybrid.MIXED), "purely": list(hybrid.PURELY)}
    assert sum("photograph" in note and "CC" in note for note in header["notes"]) >= 6
    assert len(train["labels"]) == 2 * 12 + 3 * 4 and len(val["labels"]) == 2 * 3 + 5 * 2
    names = np.array(header["classes"])[val["labels"]]
    assert (val["drawn"][names == "drawn"] == 255).all() and (
        val["drawn"][names == "photographed"] == 0
    ).all()
    assert 0.05 < (val["drawn"][np.isin(names, hybrid.MIXED)] > 127).mean() < 0.95


# ---- patches, proxies, masks ---------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    return segment.Patches(ViT(32, 8, 32, 1, 2)).eval()


def test_the_nearest_centroid_decides():
    net, view = (
        tiny(),
        torch.randint(0, 256, (3, 32, 32, 3), generator=seeded(0), dtype=torch.uint8),
    )
    net.centroids.copy_(torch.randn(2, 32, generator=seeded(1)))
    frame, patches = net.scores(view)
    tokens = net.encoder.features(view)[:, 1:]
    near = torch.cdist(tokens, net.centroids.expand(3, 2, 32)).argmin(2).view(3, 4, 4)
    assert torch.equal(patches > 0, near == 1)
    mean = torch.cdist(tokens.mean(1), net.centroids).argmin(
        1
    )  # a frame is where the mean of its patches is
    assert torch.equal(frame > 0, mean == 1)


def test_patches_of_another_frame_keep_its_label(monkeypatch):
    """One frame is black and photographed, one white and drawn: a patch's label has to be its
    brightness.
    """
    seen = []

    class Net(torch.nn.Module):
        encoder = ViT(32, 8, 32, 1, 2)

        def forward(self, patches, ids):
            seen.append(patches.mean(2))
            return patches.mean(2)

    monkeypatch.setattr(
        segment.F, "binary_cross_entropy_with_logits", lambda logits, labels: seen.append(labels)
    )
    for name, value in {"MIN_CROP": 1, "COLOUR": 0, "KEEP": 0.75}.items():
        monkeypatch.setattr(segment, name, value)
    task = SimpleNamespace(S=32, train=SimpleNamespace(kind=torch.tensor([0, 1])))
    images = (
        torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]
        .expand(2, 32, 32, 3)
        .contiguous()
    )
    segment.patch_loss(task, Net(), torch.tensor([0, 1]), images, seeded(3))
    patches, labels = seen
    low, high = patches.min(), patches.max()
    assert torch.allclose((patches - low) / (high - low), labels, atol=1e-5) and labels.shape == (
        2,
        12,
    )
    assert 0 < labels[0].sum() < 12  # and some are another frame's


def test_cuts_have_all_shapes_and_no_frame_is_cut_more_often_than_asked():
    cut = segment.cut_masks(400, 32, 0.25, seeded(0))
    assert (
        0.2 < cut.any((1, 2)).float().mean() < 0.3
        and not segment.cut_masks(9, 32, 0, seeded(0)).any()
    )
    corners = segment.cut_masks(400, 32, 1, seeded(1))[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(1)
    assert 0.2 < (corners == 0).float().mean() < 0.6  # windows, and a few blobs
    assert all((corners == n).any() for n in range(5))
    view, drawn = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8), torch.rand(6, 32, 32)
    shown, masks = segment.cut_together(view, drawn, 1, seeded(2))
    theirs = masks != drawn
    assert theirs.any((1, 2)).all() and torch.equal(shown[theirs], view.flip(0)[theirs])
    assert torch.equal(shown[~theirs], view[~theirs]) and torch.equal(
        masks[theirs], drawn.flip(0)[theirs]
    )


def test_scores_between_patches_are_means_of_moved_frames():
    """A network that answers with the brightness of a patch, on a frame with one bright square of
    half a patch.
    """
    view = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    view[:, 8:12, 8:12] = 240

    def brightness(x):
        return (None, x.float().mean(3).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)))

    net = SimpleNamespace(encoder=SimpleNamespace(patch_size=8, side=4), scores=brightness)
    fine = segment.fine_scores(net, view)
    assert (
        fine.shape == (1, 8, 8)
        and fine[0, 2, 2] == fine.max()
        and fine[0, 2, 2] == pytest.approx(60)
    )
    assert fine[0, 2, 3] == fine[0, 3, 2] == pytest.approx(30) and fine[0, 6, 6] == 0


def test_two_means_finds_the_halves_of_each_frame_whatever_its_level():
    true = torch.arange(24)[None] < torch.tensor([6, 12, 20])[:, None]
    low = torch.tensor([0.1, 0.2, 0.62])[:, None]
    probability = (low + 0.25 * true)[:, None].expand(3, 24, 24) + 0.02 * torch.randn(3, 24, 24)
    moved = segment.two_means(probability)
    assert ((moved > 0.5) == true[:, None]).all() and not (
        (probability > 0.5) == true[:, None]
    ).all((1, 2)).any()
    assert segment.two_means(torch.full((1, 4, 4), 0.9)).isfinite().all()


def test_a_large_picture_is_masked_on_a_smaller_copy(monkeypatch):
    """A network that takes bright pixels for drawn, and a picture whose right half is bright."""
    monkeypatch.setattr(segment, "LARGEST", 64)
    monkeypatch.setattr(
        segment, "pixel_masks", lambda net, view, autocast: (view[..., 0] > 128).float()
    )
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[:, 80:] = 255
    net = torch.nn.Linear(1, 1)
    found = segment.mask_of(net, picture, 32, None)
    assert found.shape == (96, 160)
    assert (found[:, :70] < 0.2).all() and (found[:, 90:] > 0.8).all()


def test_the_guided_filter_moves_a_blurred_border_to_the_edge():
    view = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    view[:, :, 18:] = 200
    blurred = torch.sigmoid((torch.arange(32.0) - 16) / 3).expand(1, 32, 32)
    found, true = segment.guided_filter(blurred, view, 4), (torch.arange(32) >= 18).float()
    assert torch.equal((found > 0.5).float(), true.expand(1, 32, 32))
    assert ((blurred > 0.5) != (true > 0)).any() and found[0, 16, 18] - found[
        0, 16, 17
    ] > 0.3  # a step, not a slope
    flat = segment.guided_filter(torch.full((1, 32, 32), 0.3), view, 4)
    assert flat == pytest.approx(torch.full((1, 32, 32), 0.3), abs=1e-5)


@pytest.mark.parametrize(("name", "part"), [("unet", 2), ("segformer", 4)])
def test_networks_of_pixels_begin_at_chance_and_answer_for_frames_of_any_size(name, part):
    torch.manual_seed(0)
    net = segment.Pixels(name, segment.Patches(ViT(32, 8, 32, 2, 2)))
    noise, target = (
        torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8),
        torch.rand(4, 64 // part, 64 // part),
    )
    logits = net.train()(noise)
    assert torch.nn.functional.binary_cross_entropy_with_logits(logits, target) < 0.9
    masks = segment.pixel_masks(net.eval(), noise[:1, :36, :50], nullcontext)
    assert masks.shape == (1, 36, 50) and masks.min() >= 0 and masks.max() <= 1


def test_the_network_of_pixels_is_shown_scores_where_their_patches_are():
    patches = segment.Patches(ViT(32, 8, 32, 2, 2))
    patches.scores = lambda view: (
        None,
        view.float().mean(3).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)),
    )
    net, view = (
        segment.Pixels("unet", patches),
        torch.zeros(1, 64, 96, 3),
    )  # seen by the encoder at 32 by 32
    view[:, 32:, :48] = 200
    hint = net.hint(view.permute(0, 3, 1, 2))
    assert (
        hint.shape == (1, 1, 64, 96)
        and hint[0, 0, 60, 4] == pytest.approx(200)
        and hint[0, 0, 4, 4] == 0
    )
    assert hint[0, 0, 60, 90] == 0 and not hint.requires_grad


def test_no_convolution_of_a_segformer_is_silent():
    torch.manual_seed(0)
    convs = [
        m for m in segment.segformer(3).modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1
    ]
    loud = [conv(torch.randn(4, conv.in_channels, 16, 16)).std().item() for conv in convs]
    assert len(convs) == 7 and min(loud) > 0.7 and max(loud) < 2


def test_masks_are_judged_as_by_hand():
    true, said = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    true[:, :, :4], said[:, :, :6] = True, True
    row = segment.judge_masks([(said, true)])
    assert row["iou_drawn"] == pytest.approx(100 * 32 / 48, abs=0.01)
    assert row["iou_photographed"] == pytest.approx(100 * 16 / 32, abs=0.01)
    assert row["miou"] == pytest.approx((200 / 3 + 50) / 2, abs=0.01)


# ---- the stage -----------------------------------------------------------------------------------


def test_three_stages_leave_their_files_and_numbers(learned):
    found = json.loads((learned / "metrics.json").read_text())
    assert 0 <= found["frames"]["val"] <= 100
    assert found["pixels"]["val"].keys() >= {"mixed", "purely", "panels"}
    for stage in ("proxies", "pixels"):
        assert found[stage].keys() == {"dev", "val", "dev_known", "val_known"}


def test_the_nearest_centroid_names_frames_as_its_file_says(learned):
    """Accuracy and proxies again, from the file of stage 1 alone."""
    net = segment.load_patches(learned / "patches.safetensors")
    splits = {name: data.open_split(learned.parent / "packed", name) for name in ("train", "val")}
    frames = {k: segment.frames_of(s, torch.arange(len(s["labels"]))) for k, s in splits.items()}
    task = SimpleNamespace(S=32, device=torch.device("cpu"), autocast=nullcontext)
    found = json.loads((learned / "metrics.json").read_text())
    assert segment.judge_frames(task, net, frames["val"]) == found["frames"]["val"]
    task.train = frames["train"]
    masks = segment.proxies_of(task, net)
    assert masks.shape == (36, 32, 32) and not masks[task.train.plain].any()
    assert masks[task.train.mixed].any((1, 2)).all()


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    frames, learned, tmp_path, monkeypatch, step
):
    """Stopped in stage 1 and in stage 3 (its first step is the third of all)."""
    update, count = segment.train.Run.update, []

    def stopping(self, *words):
        count.append(1)
        if len(count) == step:
            signal.raise_signal(signal.SIGTERM)
        return update(self, *words)

    monkeypatch.setattr(segment.train.Run, "update", stopping)
    out = tmp_path / "run"
    words = [frames / "encoder", "--data", frames / "packed", "--out", out, *QUICK]
    stopped = call("segment.py", *words, cwd=frames)
    assert stopped.returncode == 128 + 15 and not (out / "metrics.json").exists()
    assert "is there already" in refused(call("segment.py", *words, cwd=frames))
    call("segment.py", "--resume", out, cwd=frames, check=0)
    assert len(count) == 3
    for name in ("patches", "model"):
        a, b = (
            segment.read_safetensors(place / f"{name}.safetensors")[0] for place in (learned, out)
        )
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    call("segment.py", "--resume", out, "--split", "test", cwd=frames, check=0)
    assert (out / "metrics-test.json").exists() and len(count) == 3


def test_masks_to_learn_are_proxies_truth_or_none(frames, learned):
    split = data.open_split(frames / "packed", "train")
    of_class = [
        {"photographed": 0, "drawn": 1}.get(name, -1) for name in split["header"]["classes"]
    ]
    kind = torch.tensor(of_class)[split["labels"]]
    task = SimpleNamespace(masks=split["drawn"], train=SimpleNamespace(kind=kind))
    rows = torch.arange(len(kind))
    masks = segment.masks_to_learn(task, rows)
    assert torch.equal(masks, (torch.from_numpy(np.array(split["drawn"])) > 127).float())


def test_pictures_get_masks_overlays_and_shares(learned, tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("wide", (90, 40)), ("dot", (1, 1)), ("square", (32, 32))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    (tmp_path / "none.png").write_text("no picture")
    names = ["wide.png", "dot.png", "square.png"]
    done = call(
        "segment.py",
        learned,
        *names,
        "none.png",
        "--out",
        "masks",
        cwd=tmp_path,
        check=0,
    )
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [r["picture"] for r in rows] == names and "none.png is not a picture" in done.stderr
    for row in rows:
        stem = row["picture"].removesuffix(".png")
        mask = np.asarray(Image.open(tmp_path / f"masks/{stem}-mask.png"))
        assert mask.shape == np.asarray(Image.open(tmp_path / row["picture"])).shape[:2] and set(
            mask.flat
        ) <= {0, 255}
        assert 0 <= float(row["drawn"]) <= 1 and (tmp_path / f"masks/{stem}-overlay.png").exists()
    assert "is there already" in refused(
        call("segment.py", learned, "dot.png", "--out", "masks", cwd=tmp_path)
    )
    call("segment.py", learned, "../dot.png", "--out", "up", cwd=tmp_path / "masks", check=0)
    assert sorted(p.name for p in (tmp_path / "masks/up").iterdir()) == [
        "dot-mask.png",
        "dot-overlay.png",
    ]


def test_stage_1_of_another_run_and_no_mixed_frames(frames, learned, tmp_path):
    words = ["encoder", "--data", "packed", "--out", tmp_path / "run", "--patches", learned]
    quick = [*QUICK[2:], "--learn-from", "frames", "--network", "unet:hint=0"]
    call("segment.py", *words, *quick, cwd=frames, check=0)
    assert not (tmp_path / "run/patches.safetensors").exists()
    assert segment.load(tmp_path / "run")[0].patches is None
    Image.new("RGB", (50, 30), "white").save(tmp_path / "white.png")
    call("segment.py", tmp_path / "run", "white.png", cwd=tmp_path, check=0)
    assert "--epochs has no effect" in refused(
        call("segment.py", *words[:4], tmp_path / "x", *words[5:], *QUICK, cwd=frames)
    )


def test_folders_of_ones_own_frames_are_enough(frames, tmp_path):
    """Without masks, without mixed frames, without a split dev."""
    draw_folder(tmp_path / "own", classes=2, each=16)
    for i, name in enumerate(segment.KINDS):
        (tmp_path / f"own/class{i}").rename(tmp_path / "own" / name)
    call("data.py", "own", "--out", "packed", "--size", 32, cwd=tmp_path, check=0)
    words = ["segment.py", frames / "encoder", "--data", "packed", "--out", "run", *QUICK]
    assert "no mixed frames" in refused(call(*words, cwd=tmp_path))
    call(*words, "--learn-from", "frames", cwd=tmp_path, check=0)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["pixels"] == {}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data", "none"], "does not exist"),
        (["--network", "unet:depth=3"], "has no key"),
        (["--mixed"], "--mixed has no effect"),
        (["--patches", "nowhere"], "nowhere/patches.safetensors does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(frames, tmp_path, words, reason):
    words = [
        "segment.py",
        "encoder",
        "--data",
        "packed",
        "--out",
        tmp_path / "run",
        *words,
        "--device",
        "cpu",
    ]
    assert reason in refused(call(*words, cwd=frames))


def test_sets_without_the_two_kinds_and_runs_of_others_are_refused(
    frames, small, learned, tmp_path
):
    words = ["segment.py", frames / "encoder", "--data", small, "--out", tmp_path / "run"]
    assert "no frames labelled 'photographed'" in refused(call(*words, cwd=tmp_path))
    other = call("segment.py", frames / "encoder", "x.png", cwd=tmp_path)
    assert "segment.py ENCODER --data DIR makes it" in refused(other)
    assert "x.png" in refused(call("segment.py", learned, "x.png", cwd=tmp_path))


def test_without_transformers_a_segformer_is_refused(frames, tmp_path, monkeypatch):
    monkeypatch.setitem(segment.sys.modules, "transformers", None)
    words = [
        "segment.py",
        "encoder",
        "--data",
        "packed",
        "--out",
        tmp_path / "run",
        "--network",
        "segformer",
    ]
    assert "pip install transformers; unet does not" in refused(call(*words, cwd=frames))
