"""detect.py: what it learns from boxes, how answers are judged, and a run from its beginning to its use."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, refused, run_line
from PIL import Image
from test_fuzz import render_here

import data
import detect
from common.io import read_safetensors, save_safetensors
from ingest import pack, scenes
from model import ViT

pytest.importorskip(
    "pycocotools",
    reason="detectors are judged by pycocotools: pip install -r requirements-detect.txt",
)
BOXES = torch.tensor([[[8.0, 8, 24, 24], [30, 10, 62, 60], [2, 40, 5, 60]], [[-1] * 4] * 3])


def tiny():
    torch.manual_seed(0)
    return detect.Detector(ViT(64, 8, 32, 1, 2)).eval()


def test_a_box_is_taught_at_its_centre_on_the_level_of_its_size_and_weighs_one():
    heat, boxes, weight = detect.targets(BOXES, 64, 8)
    assert (
        heat.shape == weight.shape == (2, 16**2 + 8**2 + 4**2)
        and (heat[1] == 0).all()
        and (weight[1] == 0).all()
    )
    peaks = (heat[0] == 1).nonzero()[:, 0]
    first = boxes[0, peaks] == BOXES[0, 0]
    assert (
        first.all(1).sum() >= 1 and not (boxes[0, peaks] == BOXES[0, 2]).all(1).any()
    )  # 3 px wide: not asked for
    assert (peaks[first.all(1)] < 16**2).all()  # 16 px: the finest level
    second = peaks[(boxes[0, peaks] == BOXES[0, 1]).all(1)]
    assert len(second) and ((second >= 16**2) & (second < 16**2 + 8**2)).all()  # 40 px
    for k in (0, 1):
        own = (boxes[0] == BOXES[0, k]).all(1)
        assert weight[0, own].sum() == pytest.approx(1, abs=0.15)
    centre = torch.cat([detect.cells(n * n, 64 // n, "cpu") for n in (16, 8, 4)])
    assert ((centre[peaks] - 16).abs().amax(1) <= 4)[first.all(1)].all()


def test_giou_and_iou_are_what_their_formulas_say():
    a, b = torch.tensor([0.0, 0, 4, 4]), torch.tensor([2.0, 2, 6, 6])
    assert detect.iou(a, b) == pytest.approx(4 / 28) and detect.giou(a, a) == pytest.approx(1)
    assert detect.giou(a, b) == pytest.approx(4 / 28 - 1 + 28 / 36)
    far = torch.tensor([10.0, 0, 12, 4])
    assert detect.iou(a, far) == 0 and detect.giou(a, far) == pytest.approx(-1 + 24 / 48)


def test_the_loss_falls_where_answers_come_nearer():
    heat, boxes, _ = detect.targets(BOXES, 64, 8)
    sure = torch.where(heat == 1, 6.0, -6.0)
    losses = [
        detect.loss_of(logits, boxes + off, BOXES, 64, 8).item()
        for logits, off in ((sure, 0), (sure, 3), (-sure, 0), (torch.zeros_like(sure), 0))
    ]
    assert losses[0] < 0.1 < losses[1] and losses[0] < losses[3] < losses[2]
    nobody = detect.loss_of(-6 * torch.ones_like(heat[1:]), boxes[1:], BOXES[1:], 64, 8)
    assert 0 <= nobody < 0.01


def test_a_crop_stands_at_its_place_on_the_page():
    """Without blocks a token is its patch and its position: of a crop the page's, where it was cut."""
    net = tiny()
    net.encoder.blocks = torch.nn.ModuleList()
    page = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    whole, part = net.tokens(page), net.tokens(page[:, 16:48, 8:40].contiguous(), (2, 1))
    assert torch.allclose(part, whole[:, :, 2:6, 1:5], atol=1e-5)
    assert not torch.allclose(net.tokens(page[:, 16:48, 8:40].contiguous()), part, atol=1e-2)
    logits, boxes = net(torch.zeros(2, 96, 96, 3, dtype=torch.uint8))  # larger than it was made for
    assert logits.shape == (2, 24**2 + 12**2 + 6**2) and boxes.shape == (*logits.shape, 4)


def test_answers_are_peaks_and_none_is_given_twice():
    net = tiny()
    logits = torch.full((1, 336), -9.0)
    boxes = torch.zeros(1, 336, 4)
    for cell, score, box in (
        (40, 3.0, [8, 8, 24, 24]),
        (41, 2.0, [8, 8, 28, 24]),  # 41: beside a peak, no peak
        (300, 1.0, [9, 8, 24, 24]),
        (200, 0.5, [40, 40, 70, 60]),
    ):
        logits[0, cell], boxes[0, cell] = score, torch.tensor(box, dtype=torch.float)
    net.forward = lambda view: (logits, boxes)
    found, scores = detect.detect(net, torch.zeros(1, 64, 64, 3, dtype=torch.uint8))[0]
    sure = scores > 0.5
    assert sure.sum() == 2 and torch.allclose(scores[sure], torch.tensor([3.0, 0.5]).sigmoid())
    peak, beside = torch.tensor([3.0, 2.0]).sigmoid().square()  # neighbours say where a box is, too
    side = (24 * peak + 28 * beside) / (peak + beside)
    assert torch.allclose(
        64 * found[sure], torch.tensor([[8.0, 8, side, 24], [40, 40, 64, 60]]), atol=1e-3
    )


def test_the_surest_answer_is_the_first_also_where_there_are_few():
    for seed in range(8):
        view = torch.randint(
            256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        scores = detect.detect(tiny(), view)[0][1]
        assert len(scores) and (scores.diff() <= 0).all()


def test_answers_are_judged_as_coco_does():
    truth = [torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]]), torch.zeros(0, 4)]
    nobody = torch.zeros(0, 4), torch.zeros(0)
    row = detect.coco([(truth[0], torch.tensor([0.9, 0.8])), nobody], truth, 256)
    assert row["ap"] == row["ap50"] == row["ar"] == 100 and row["ap_small"] is None
    assert len(row["precision"]) == 101 and row["threshold"] == pytest.approx(0.8)
    shifted = [(truth[0] + 0.02, torch.tensor([0.9, 0.8])), nobody]
    assert 30 < detect.coco(shifted, truth, 256)["ap"] < 90
    nothing = detect.coco([nobody] * 2, truth, 256)
    assert nothing["ap"] == 0 and nothing["threshold"] == detect.LOWEST
    false = torch.tensor([[0.6, 0.0, 0.7, 0.1], [0.0, 0.8, 0.1, 0.9]])
    mixed = [(torch.cat([truth[0], false]), torch.tensor([0.9, 0.5, 0.3, 0.2])), nobody]
    assert detect.coco(mixed, truth, 256)["threshold"] == pytest.approx(0.5)  # the best F1


def test_crops_carry_their_boxes_along(monkeypatch):
    """A page whose face is the only red: the boxes of its crops hold what is red there."""
    monkeypatch.setattr(detect, "COLOUR", 0.0)
    pages = torch.zeros(16, 64, 64, 3, dtype=torch.uint8)
    pages[:, 20:36, 30:50, 0] = 255
    boxes = torch.tensor([[[30, 20, 50, 36]]]).expand(16, 1, 4) / 64
    boxes = torch.cat([boxes, -torch.ones(16, 1, 4)], 1)
    for cut in (detect.crops, detect.mosaic):
        view, found = cut(pages, boxes, torch.Generator().manual_seed(1), 64, 0.5)
        assert view.shape == (16, 64, 64, 3)
        seen = 0
        for picture, own in zip(view, found, strict=True):
            for x1, y1, x2, y2 in own[own[:, 0] >= 0].round().int().tolist():
                assert picture[y1:y2, x1:x2, 0].float().mean() > 200
                seen += 1
            outside = picture[..., 0].float().clone()
            for x1, y1, x2, y2 in own[own[:, 0] >= 0].int().tolist():
                outside[max(0, y1 - 1) : y2 + 2, max(0, x1 - 1) : x2 + 2] = 0
            assert cut is detect.mosaic or len(own[own[:, 0] >= 0]) == 0 or outside.max() < 60
        assert seen > 8 and (found[:, 1:2] == -1).all() | (cut is detect.mosaic)


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with datasets/scenes, of 24 pages, and runs/det, what two epochs made of a random
    encoder.
    """
    root = tmp_path_factory.mktemp("detect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "COUNTS", {"train": 16, "dev": 4, "val": 4})
        patch.setattr(pack, "render", render_here)
        call("data.py", "scenes", "--out", "datasets/scenes", "--size", 64, cwd=root, check=0)
    return root


WORDS = (
    "--data",
    "datasets/scenes",
    "--view",
    48,
    "--batch-size",
    8,
    "--device",
    "cpu",
    "--method",
    "lora",
)


def trained(pages, encoder, out, *more):
    return call("detect.py", encoder, *WORDS, "--out", out, *more, cwd=pages)


@pytest.fixture(scope="module")
def encoder(pages):
    from common.lora import save_encoder

    torch.manual_seed(0)
    (pages / "runs/enc").mkdir(parents=True)
    save_encoder(ViT(64, 8, 192, 2, 3), pages / "runs/enc/model.safetensors", {"step": 1})
    return "runs/enc"


@pytest.fixture(scope="module")
def det(pages, encoder):
    assert trained(pages, encoder, "runs/det", "--epochs", 2).returncode == 0
    return pages / "runs/det"


def test_a_run_writes_what_it_says(det):
    row = json.loads((det / "metrics.json").read_text())
    truth = data.open_split(det.parent.parent / "datasets/scenes", "val")["boxes"]
    assert (
        row["faces"] == (np.array(truth)[..., 0] >= 0).sum()
        and row["pages"] == 4
        and 0 <= row["ap"] <= 100
    )
    net, header = detect.load(det)
    assert header["page"] == 80 and not [
        name for name, _ in net.named_parameters() if name.endswith((".A", ".B"))
    ]


def test_the_last_quarter_of_the_epochs_learns_from_nearly_whole_pages(pages, encoder, monkeypatch):
    sides, loss_of = [], detect.loss_of
    monkeypatch.setattr(detect, "loss_of", lambda *words: sides.append(words[3]) or loss_of(*words))
    trained(pages, encoder, "runs/late", "--epochs", 4, "--method", "full")
    assert sides == 6 * [48] + 2 * [64]  # two steps an epoch; pages of 80


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(pages, encoder, det, monkeypatch):
    real, steps = detect.step_loss, []

    def some(*words):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)  # as kill would: the run ends after this step
        return real(*words)

    monkeypatch.setattr(detect, "step_loss", some)
    stopped = trained(pages, encoder, "runs/cut", "--epochs", 2)
    assert stopped.returncode == 128 + 15 and len(steps) == 3
    assert "is there already" in refused(trained(pages, encoder, "runs/cut", "--epochs", 2))
    call("detect.py", "--resume", "runs/cut", cwd=pages, check=0)
    assert len(steps) == 4
    a, b = (detect.load(p)[0].state_dict() for p in (det, pages / "runs/cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    call("detect.py", "--resume", "runs/cut", "--split", "dev", cwd=pages, check=0)
    assert (pages / "runs/cut/metrics-dev.json").exists() and len(steps) == 4


def test_it_is_used_on_pictures_of_any_size(pages, det, monkeypatch):
    face = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.0, 0.0, 0.1, 0.1]])
    monkeypatch.setattr(detect, "detect", lambda net, view: [(face, torch.tensor([0.9, 0.01]))])
    Image.new("RGB", (200, 100), (90, 90, 90)).save(pages / "wide.png")
    Image.new("RGB", (1, 1)).save(pages / "dot.png")
    done = run_line(f"detect.py {det} wide.png dot.png --out found --crop", pages, check=0)
    wide, dot = map(json.loads, done.stdout.splitlines())
    assert wide["faces"] == [{"box": [50, 50, 100, 100], "score": 0.9}] and dot["width"] == 1
    assert Image.open(pages / "found/wide_0.png").size == (70, 70)
    assert "already" in refused(
        call("detect.py", det, "wide.png", "--out", "found", "--crop", cwd=pages)
    )
    below = torch.tensor(
        [[0.25, 0.25, 0.5, 0.5], [0.2, 0.6, 0.4, 0.9]]
    )  # the second in what makes it a square
    monkeypatch.setattr(detect, "detect", lambda net, view: [(below, torch.tensor([0.9, 0.8]))])
    done = call("detect.py", det, "wide.png", "--out", "square", "--crop", cwd=pages, check=0)
    assert len(json.loads(done.stdout)["faces"]) == len(list((pages / "square").iterdir())) == 1
    call("detect.py", det, "wide.png", "--out", "shown", "--threshold", 0.95, cwd=pages, check=0)
    assert Image.open(pages / "shown/wide.png").size == (200, 100)  # a page without a face is fine


def test_half_of_it_answers_as_the_whole_and_has_a_card(pages, det):
    call("export.py", det, "--to", "half", "--out", "half", cwd=pages, check=0)
    (whole, about), (half, same) = detect.load(det), detect.load(pages / "half")
    view = torch.randint(
        0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        torch.testing.assert_close(half(view)[1], whole(view)[1], rtol=0, atol=0.5)  # pixels
    text = (pages / "half/README.md").read_text()
    assert about == same and "license: mit" in text and "| boxes | `boxes` |" in text
    assert "ap50" in text


def test_what_is_asked_wrongly_is_refused(pages, encoder, det, small):
    def said(*words):
        return refused(call("detect.py", *words, cwd=pages))

    assert "has no boxes" in said(encoder, "--data", small)
    assert "detector.safetensors does not exist" in said(encoder, "wide.png")
    assert "does not exist" in said("runs/none", "wide.png")
    assert "multiple of 16" in said(encoder, *WORDS, "--out", "x", "--view", 40)
    assert "detect.py ENCODER makes it" in said(Path(encoder) / "model.safetensors", "wide.png")
    weights, header = read_safetensors(det / "detector.safetensors")
    for i, lost in enumerate(
        ({"page": None}, {"threshold": "high"}, {"detector": {"encoder": {}, "norm_eps": 1e-6}})
    ):
        save_safetensors(weights, pages / f"odd{i}.safetensors", header | lost)
        assert "detect.py ENCODER makes it" in said(f"odd{i}.safetensors", "wide.png")
    assert "--epochs has no effect" in said(det, "wide.png", "--epochs", 3)
    assert "--crop has no effect" in said(encoder, *WORDS, "--out", "x", "--crop")
    assert "--out DIR says where" in said(det, "wide.png", "--crop")
    (pages / "text.png").write_text("no picture")
    assert "not a picture" in said(det, "text.png")


def test_a_page_s_faces_are_named_one_by_one(pages, det, small, tagged, monkeypatch):
    """recognize.py --detect: a line for each face, by the recogniser that was learned from whole
    drawings.
    """
    run = pages / "runs/known"
    words = ["--data", small, "--method", "linear", "--epochs", 1, "--device", "cpu", "--out", run]
    call("finetune_lora.py", tagged / "encoder", *words, cwd=pages, check=0)
    faces = torch.tensor([[0.5, 0.25, 0.75, 0.5], [0.1, 0.1, 0.3, 0.3]])
    monkeypatch.setattr(detect, "detect", lambda net, view: [(faces, torch.tensor([0.9, 0.8]))])
    Image.new("RGB", (64, 64), (200, 90, 90)).save(pages / "page.png")
    lines = call(
        "recognize.py", run, "page.png", "--detect", det, "--json", cwd=pages, check=0
    ).stdout.splitlines()
    assert [json.loads(line)["picture"] for line in lines] == [
        "page.png[6,6,19,19]",
        "page.png[32,16,48,32]",
    ]
    monkeypatch.setattr(detect, "detect", lambda net, view: [(faces[:0], torch.zeros(0))])
    done = call("recognize.py", run, "page.png", "--detect", det, cwd=pages, check=0)
    assert done.stdout == "" and "page.png: no face was found" in done.stderr
    (pages / "torn.png").write_text("no picture")
    done = call("recognize.py", run, "page.png", "torn.png", "--detect", det, cwd=pages, check=0)
    assert (
        "page.png: no face was found" in done.stderr
        and "skipped: torn.png is not a picture" in done.stderr
    )
    assert "torn.png is not" in refused(
        call("recognize.py", run, "torn.png", "--detect", det, cwd=pages)
    )
    done = call(
        "recognize.py", run, "page.png", "--detect", "runs/enc/model.safetensors", cwd=pages
    )
    assert "detect.py ENCODER makes it" in refused(done)


def test_what_is_cut_out_is_the_face_and_room_around_it():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:20, 30:40] = 255
    assert (detect.cut_out(picture, (30, 10, 40, 20), 0) == 255).all()
    room = detect.cut_out(picture, (30, 10, 40, 20), 0.5)
    assert (
        room.shape == (20, 20, 3)
        and (room[5:15, 5:15] == 255).all()
        and room.mean() == pytest.approx(255 / 4)
    )
    assert detect.cut_out(picture, (0, 0, 10, 40), 1, 16).shape == (
        16,
        16,
        3,
    )  # reaches out of the picture


def test_the_page_shows_faces_and_names_them(pages, det, small, tagged, monkeypatch):
    import demo

    monkeypatch.chdir(pages)
    if not Path("runs/a").exists():
        shutil.copytree(tagged / "encoder", "runs/a")
    picture = demo.drawing("akika", 0)
    assert "python detect.py" in demo.answer("Pages", "runs/a", picture)
    shutil.copytree(det, "runs/a-det")
    assert demo.choose_run("runs/a-det") == "runs/a"
    assert demo.made_of("runs/a", "-*/detector.safetensors") == "runs/a-det"
    faces = torch.tensor([[0.5, 0.25, 0.75, 0.5], [0.1, 0.1, 0.3, 0.3]])
    monkeypatch.setattr(detect, "detect", lambda net, view: [(faces, torch.tensor([0.9, 0.8]))])
    text = demo.pages_page("runs/a-det", picture)
    assert (
        text.count("<img") == 3 and "score 0.80" in text and "detect.py runs/a-det PICTURE" in text
    )
    words = ["--data", small, "--method", "linear", "--epochs", 1, "--device", "cpu"]
    call("finetune_lora.py", "runs/a", *words, cwd=pages, check=0)
    text = demo.pages_page("runs/a-det", picture)
    assert text.count("<img") == 3 and "score" not in text and "--detect runs/a-det" in text
    monkeypatch.setattr(detect, "detect", lambda net, view: [(faces[:0], torch.zeros(0))])
    assert "0 faces" in demo.pages_page("runs/a-det", picture)
