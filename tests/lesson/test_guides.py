"""common/guidance.py: maps follow their images, the teacher follows the encoder, the right map is chosen."""

import contextlib
import copy
import math
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from conftest import ROOT, run_line

import data
import mask as masking
from apps import masks
from apps.maps import write_maps
from common import guidance
from common.train import UserError
from model import Pooler, ViT

EXACT = contextlib.nullcontext


def noise_images(n, S=32):
    return np.random.default_rng(0).integers(0, 256, (n, S, S, 3), np.uint8)


# ---- the teacher, and maps -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "epochs, start, expected",
    [
        (12, 0.1, {2, 3, 6}),
        (400, 0.1, {40, 100, 200}),
        (8, 0.4, {4}),
        (8, 0, {0, 2, 4}),
        (8, 1, {8}),
    ],
)
def test_a_teacher_makes_new_maps_while_it_learns_fast(epochs, start, expected, capsys):
    assert guidance.map_epochs(epochs, start) == expected
    assert ("masks stay random" in capsys.readouterr().out) == (start == 1)


def test_the_teacher_is_the_moving_average_of_the_encoder():
    """In float64 and by hand; momentum rises to 1 by half a cosine, from a half-life of 1.5 %."""
    encoder = ViT(32, 8, 32, 1, 1)
    encoder.register_buffer("count", torch.zeros(()))  # a student's own
    guide = guidance.Guide("attn", encoder)
    guide.teacher = copy.deepcopy(encoder).requires_grad_(False)
    mean = [w.detach().double() for w in guide.teacher.parameters()]
    for step in range(12):
        with torch.no_grad():
            for w in encoder.parameters():
                w.add_(torch.randn_like(w))
        encoder.count += 1
        guide.update_teacher(encoder, step, 100)
        new = (1 - 0.5 ** (1 / 1.5)) * (math.cos(math.pi * step / 100) + 1) / 2
        assert guidance.ema_momentum(step, 100) == pytest.approx(1 - new)
        mean = [(1 - new) * m + new * w for m, w in zip(mean, encoder.parameters(), strict=True)]
    for expected, found in zip(mean, guide.teacher.parameters(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        assert not found.requires_grad
    assert guide.teacher.count == 12


@pytest.mark.parametrize("total", [30, 2000, 100_000])
def test_the_first_map_is_made_by_a_teacher_that_learned(total):
    """Whatever the length of a run: at its first map, random weights are 2 % of the teacher."""
    first = round(masking.START * total)

    def initial(steps):
        return math.prod(guidance.ema_momentum(step, total) for step in range(steps))

    assert initial(first) < 0.02
    assert initial(first // 4) > 0.02  # an average, not a copy


@pytest.mark.parametrize(
    ("flags", "pooler", "kind"),
    [
        ({}, False, "cls"),  # a public checkpoint, as DINO's
        ({"contrast": "none"}, False, "outlier"),
        ({"contrast": "pooler"}, True, "pooler"),
        ({"contrast": "cls:weight=0.1"}, False, "rollout"),
        ({"contrast": 0}, False, "outlier"),
    ],
)
def test_a_teacher_is_read_by_its_training(flags, pooler, kind):
    encoder = small_encoder()
    encoder.pooler = Pooler(32, 1) if pooler else None
    assert guidance.default_attention(encoder, flags) == kind


def test_the_teachers_maps_are_its_attention():
    """Means over the heads, in the order of the images."""
    torch.manual_seed(0)
    encoder, images = ViT(32, 8, 32, 2, 2), noise_images(70)
    encoder.pooler = Pooler(32, 2)
    _, view = next(data.whole_views(images, torch.arange(70), 32, torch.device("cpu")))
    for source in ("cls", "rollout", "pooler"):
        guide = guidance.Guide("attn", encoder)
        guide.kind, guide.maps = source, torch.zeros(70, 4, 4, dtype=torch.half)
        guide.make_maps(encoder, images, EXACT)
        expected = encoder.patch_attention(view, source).mean(1)
        found = guide.maps[: len(view)].flatten(1)
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-4)
        assert guide.state_dict().keys() == {"maps"} and guide.maps.shape == (70, 4, 4)


def test_what_is_unusual_for_its_place_is_found():
    torch.manual_seed(0)
    encoder, images = ViT(32, 8, 32, 2, 1), np.full((24, 32, 32, 3), 90, np.uint8)
    images[:, :, 16:] = 200  # what is in all of them is usual
    odd = np.random.default_rng(0).integers(0, 16, 24)
    for i, k in enumerate(odd):
        images[i, k // 4 * 8 : k // 4 * 8 + 8, k % 4 * 8 : k % 4 * 8 + 8] = (255, 0, 40)
    ((_, score),) = guidance.attention(encoder, images, torch.arange(24), "outlier", EXACT)
    assert torch.equal(score.argmax(1), torch.from_numpy(odd))
    tokens = encoder.features(torch.from_numpy(images))[:, 1:]
    torch.testing.assert_close(score, (tokens - tokens.mean(0)).norm(dim=2), rtol=1e-3, atol=1e-4)


def test_maps_follow_their_images_and_parts_are_shares():
    """As data.view_maps does, of these rows; the background is a part."""
    labels = np.random.default_rng(0).integers(0, 5, (6, 32, 32), dtype=np.uint8)
    boxes, flip = data.draw_boxes(6, torch.Generator().manual_seed(0), 0.3)
    rows = torch.tensor([4, 0, 5, 1, 3, 2])
    shares = guidance.crop_map(labels, rows, boxes, flip, 8, 5)
    assert shares.shape == (6, 64, 5)
    torch.testing.assert_close(shares.sum(2), torch.ones(6, 64))
    figure = np.uint8(255 * (labels > 0))
    found = guidance.crop_map(figure, rows, boxes, flip, 8)
    torch.testing.assert_close(1 - shares[..., 0], found)
    followed = data.view_maps(torch.from_numpy(figure)[rows], boxes, flip, 8) / 255
    torch.testing.assert_close(found, followed.flatten(1))


# ---- what a strategy gets ------------------------------------------------------------------------


def small_encoder():
    torch.manual_seed(0)
    return ViT(32, 8, 32, 1, 1)


@pytest.fixture
def batch():
    """Rows, boxes, flips and views of a batch of six images."""
    rows, images = torch.arange(6), torch.from_numpy(noise_images(6))
    boxes, flip = data.draw_boxes(6, torch.Generator().manual_seed(0), 0.5)
    return rows, boxes, flip, data.view_images(images[rows], boxes, flip, 32), EXACT


def test_the_control_gets_the_score_of_another_image(batch):
    """Of its map under the same crop; of its view where there is no map."""
    index, boxes, flip, view, _ = batch
    maps = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    score, other = (guide("fg", shuffle, maps).scores(*batch)["fg"] for shuffle in (False, True))
    torch.testing.assert_close(score, guidance.crop_map(maps, index, boxes, flip, 4))
    torch.testing.assert_close(other, guidance.crop_map(maps, index.roll(1), boxes, flip, 4))
    for name in ("view", "difficulty"):
        score, other = (guide(name, shuffle).scores(*batch)[name] for shuffle in (False, True))
        assert torch.equal(other, score.roll(1, 0)) and not torch.equal(score, other)


def guide(score, shuffle=False, maps=None, parts=0):
    guide = guidance.Guide(score, small_encoder(), shuffle)
    guide.map_file, guide.parts = maps, parts
    return guide


def test_each_source_gives_the_score_of_its_name(batch):
    index, boxes, flip, view, _ = batch
    assert torch.equal(guide("view").scores(*batch)["view"], view)
    maps = np.random.default_rng(0).integers(0, 4, (6, 8, 8), np.uint8)
    source = guide("parts", False, maps, 4)
    shares = guidance.crop_map(maps, index, boxes, flip, 4, 4)
    assert torch.equal(source.scores(*batch)["parts"], shares)
    assert guide(None).scores(*batch).keys() == {"view"} and not guide(None).loss(None, None)
    taught = guide("attn")
    taught.maps = torch.zeros(6, 4, 4)
    before = taught.scores(*batch)
    assert (
        torch.equal(before["view"], view) and before["attn"].unique().numel() == 1
    )  # no maps yet: masks stay random
    drawn = guidance.as_pictures({"view": view, "parts": shares, "attn": before["attn"]})
    assert torch.equal(drawn["parts"], shares.argmax(2).view(6, 4, 4))
    assert drawn["attention"].shape == (6, 4, 4) and len(drawn) == 2  # the view is no score


def test_of_a_small_grid_a_patch_stays_visible_on_the_sheet():
    assert masks.hidden_by(masking.random, {}, 2, 9, 0.9).sum(1).tolist() == [8, 8]


def test_the_predictor_learns_the_order_of_the_losses(batch):
    """Log loss of every pair of hidden patches, written once more; its gradient reaches it all."""
    source = guide("difficulty")
    error = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    ids = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :12]
    score = source.scores(*batch)["difficulty"].gather(1, ids)
    first = source.loss(ids, error)
    total = 0.0
    for s, e in zip(score.tolist(), error.tolist(), strict=True):
        for i in range(12):
            for j in range(12):
                p = 1 / (1 + math.exp(s[j] - s[i]))
                total -= math.log(p if e[i] > e[j] else 1 - p)
    assert first.item() == pytest.approx(total / (6 * 12 * 12), rel=1e-4)
    first.backward()
    learned = [w for w in source.predictor.parameters() if w is not source.predictor.score.bias]
    assert all(w.grad.any() for w in learned)
    assert not score.requires_grad
    assert source.predictor(torch.zeros(1, 16, 192)).unique().numel() == 16  # places differ
    assert guide("view").loss(ids, error) == 0


def test_the_truth_goes_before_an_estimate_and_both_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    golden.write_packed(Path("packed"), 32, (("train", 12),))
    train = data.open_split("packed", "train")
    path = Path("maps/packed/saliency.safetensors")
    header = {"by": "runs/a", "data_digest": data.fingerprint(train)}
    write_maps(path, "saliency", [np.full((12, 2, 2), 9, np.uint8)], (12, 2, 2), "U8", header)
    for where in ("auto", "truth"):
        maps, _, note = guidance.open_maps("fg", where, "packed", train)
        assert maps.shape == (12, 32, 32) and "true foreground masks" in note
    maps, _, note = guidance.open_maps("fg", path.parent, "packed", train)
    assert maps.shape == (12, 2, 2) and note == f"{path.parent} runs/a"
    assert guidance.open_maps("parts", "auto", "packed", train)[1] == 4
    own = Path("own/parts.safetensors")
    header |= {"parts": 2}  # of the foreground
    write_maps(own, "parts", [np.zeros((12, 2, 2), np.uint8)], (12, 2, 2), "U8", header)
    assert guidance.open_maps("parts", own, "packed", train)[1] == 3
    train.pop("fg")
    assert guidance.open_maps("fg", "auto", "packed", train)[2] == f"{path} runs/a"
    train["header"]["size"] = 33  # another data set
    with pytest.raises(UserError, match="another data set"):
        guidance.open_maps("fg", "auto", "packed", train)


def test_the_readmes_exercise_works_as_it_stands():
    """Its code and its entry are put into mask.py, and the mask hides the middle."""
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(def middle.*?)```", text, re.S).group(1)
    entry = re.search(r"add the entry `(.*?)`", text).group(1)
    source = (ROOT / "mask.py").read_text()
    source = source.replace("STRATEGIES = {", f"{code}\n\nSTRATEGIES = {{\n    {entry},")
    changed = {}
    exec(source, changed)
    assert "beta" in changed["PARAMS"]["middle"] and len(code.strip().splitlines()) <= 10
    noise = masking.gumbel_noise(500, 64, torch.Generator().manual_seed(0))
    priority = changed["STRATEGIES"]["middle"]({}, noise, 0.5, 32)
    _, ids = masking.sample(priority, 32)
    often = torch.bincount(ids.flatten(), minlength=64).view(8, 8)
    assert often[3:5, 3:5].min() > 2 * often[0].max()


def test_a_strategy_that_reads_pixels_is_written_in_one_file(bright, tmp_path, monkeypatch):
    """The example of mask.py's docstring: the brightest are hidden, it trains, and it is drawn."""
    noise = masking.gumbel_noise(6, 16, torch.Generator().manual_seed(0))
    view = torch.from_numpy(noise_images(6)) // 4
    view[:, :16] += 150
    priority = masking.STRATEGIES["bright"]({"view": view}, noise, 0.5, 8, beta=1e6)
    assert (masking.sample(priority, 8)[1] < 8).all()  # the upper half
    golden.write_packed(tmp_path / "packed", 32, (("train", 12), ("val", 12)))
    drawn = {}
    monkeypatch.setattr(
        "common.plots.image_grid", lambda path, _, rows, *__: drawn.update({Path(path): dict(rows)})
    )
    words = "--data packed --model nano:image_size=32 --device cpu --epochs 1 --out run"
    run_line(f"pretrain.py --mask bright:beta=2,shuffle=1 {words}", tmp_path, check=0)
    masks = drawn[Path("run/masks.png")]
    assert [*masks] == ["view", "score + noise", "seen"] and masks["score + noise"].shape[1] == 4
    run_line("apps.masks bright bright:beta=1e6 --data packed", tmp_path, check=0)
    assert {"bright", "bright:\nbeta=1e6"} < drawn[Path("masks.png")].keys()
