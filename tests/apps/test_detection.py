"""apps/detect.py: what it learns from boxes, how answers are judged, and a run from its beginning to its use."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import equal, json_of, refused, run_line
from made import CPU, QUICK
from PIL import Image
from test_mps import OperatorLog

import data
from apps import detect
from common.train import read_safetensors, seeded
from model import ViT

pytest.importorskip("pycocotools", reason="pip install -e '.[detect]': it is the judge")
BOXES = torch.tensor([[[8.0, 8, 24, 24], [30, 10, 62, 60], [2, 40, 5, 60]], [[-1] * 4] * 3])
TRAIN = f"apps.detect runs/a --data datasets/scenes --method lora --view 48 {QUICK}"


def tiny():
    torch.manual_seed(0)
    return detect.Detector(ViT(64, 8, 32, 1, 2)).eval()


def view_of(seed, side=64):
    return torch.randint(256, (1, side, side, 3), dtype=torch.uint8, generator=seeded(seed))


def test_a_box_is_taught_at_its_centre_on_the_level_of_its_size_and_weighs_one():
    heat, boxes, weight = detect.targets(BOXES, 64, 8)
    assert heat.shape == weight.shape == (2, 16**2 + 8**2 + 4**2)
    assert (heat[1] == 0).all() and (weight[1] == 0).all()
    peaks = (heat[0] == 1).nonzero()[:, 0]
    first, second, thin = ((boxes[0, peaks] == box).all(1) for box in BOXES[0])
    assert first.any() and (peaks[first] < 16**2).all()  # 16 px: the finest level
    assert second.any() and ((peaks[second] >= 16**2) & (peaks[second] < 320)).all()  # 40 px
    assert not thin.any()  # 3 px wide: not asked for
    for box in BOXES[0, :2]:
        weights = weight[0, (boxes[0] == box).all(1)]
        assert weights.sum() == pytest.approx(1, abs=0.15)
    centre = torch.cat([detect.cells(n * n, 64 // n, "cpu") for n in (16, 8, 4)])
    assert ((centre[peaks] - 16).abs().amax(1) <= 4)[first].all()
    inside = (centre - 16) / (detect.NARROW * 16)
    bell = (-0.5 * inside.square().sum(1)).exp()[:256]
    only = heat[0, :256] != 1
    torch.testing.assert_close(heat[0, :256][only], bell[only])


def test_giou_and_iou_are_what_their_formulas_say():
    a, b = torch.tensor([0.0, 0, 4, 4]), torch.tensor([2.0, 2, 6, 6])
    assert detect.iou(a, b) == pytest.approx(4 / 28) and detect.giou(a, a) == pytest.approx(1)
    assert detect.giou(a, b) == pytest.approx(4 / 28 - 1 + 28 / 36)
    far = torch.tensor([10.0, 0, 12, 4])
    assert detect.iou(a, far) == 0 and detect.giou(a, far) == pytest.approx(-1 + 24 / 48)


def test_no_gradient_of_boxes_makes_a_gpu_wait():
    boxes = BOXES[0].clone().requires_grad_()
    with OperatorLog() as log:
        detect.giou(boxes, BOXES[0] + 1).sum().backward()
    assert boxes.grad.any() and "aten::_local_scalar_dense" not in log.seen


def test_the_loss_falls_where_answers_come_nearer():
    heat, boxes, weight = detect.targets(BOXES, 64, 8)
    sure = torch.where(heat == 1, 6.0, -6.0)
    answers = (sure, 0), (sure, 3), (-sure, 0), (torch.zeros_like(sure), 0)
    losses = [detect.loss_of(x, boxes + off, BOXES, 64, 8).item() for x, off in answers]
    assert losses[0] < 0.1 < losses[1] and losses[0] < losses[3] < losses[2]
    nobody = detect.loss_of(-6 * torch.ones_like(heat[1:]), boxes[1:], BOXES[1:], 64, 8)
    assert 0 <= nobody < 0.01
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1).mean(2)  # three pixels off, by hand
    error = 1 - detect.giou(boxes + 3, boxes) + detect.SIDES_WEIGHT * 3 / side
    expected = (weight * error).sum() / (heat == 1).sum()
    assert losses[1] - losses[0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("cut", [detect.crops, detect.mosaic])
def test_crops_carry_their_boxes_along(cut, monkeypatch):
    """A page whose face is the only red: the boxes of its crops hold what is red there."""
    monkeypatch.setattr(detect, "COLOUR", 0.0)
    pages = torch.zeros(16, 64, 64, 3, dtype=torch.uint8)
    pages[:, 20:36, 30:50, 0] = 255
    boxes = torch.full((16, 2, 4), -1.0)
    boxes[:, 0] = torch.tensor([30, 20, 50, 36]) / 64
    view, found = cut(pages, boxes, seeded(1), 64, 0.5)
    assert view.shape == (16, 64, 64, 3) and (found[:, :, 0] >= 0).sum() > 8
    for picture, own in zip(view, found, strict=True):
        outside, own = picture[..., 0].float().clone(), own[own[:, 0] >= 0]
        for x1, y1, x2, y2 in own.round().int().tolist():
            assert picture[y1:y2, x1:x2, 0].float().mean() > 200
            outside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = 0
        assert cut is detect.mosaic or not len(own) or outside.max() < 60


def test_a_crop_stands_at_its_place_on_the_page():
    """Without blocks a token is its patch and its position: of a crop the page's, where it was cut."""
    net, page = tiny(), view_of(0)
    net.encoder.blocks = torch.nn.ModuleList()
    crop = page[:, 16:48, 8:40].contiguous()
    whole, part = net.tokens(page), net.tokens(crop, (2, 1))
    assert torch.allclose(part, whole[:, :, 2:6, 1:5], atol=1e-5)
    assert not torch.allclose(net.tokens(crop), part, atol=1e-2)
    logits, boxes = net(view_of(1, 96))  # larger than it was made for
    assert logits.shape == (1, 24**2 + 12**2 + 6**2) and boxes.shape == (*logits.shape, 4)


def test_answers_are_peaks_and_none_is_given_twice():
    net = tiny()
    logits, boxes = torch.full((1, 336), -9.0), torch.zeros(1, 336, 4)
    answers = {
        40: (3.0, [8, 8, 24, 24]),
        41: (2.0, [8, 8, 28, 24]),  # beside a peak, no peak
        300: (1.0, [9, 8, 24, 24]),  # of the next level, the same face
        200: (0.5, [40, 40, 70, 60]),
    }
    for cell, (score, box) in answers.items():
        logits[0, cell], boxes[0, cell] = score, torch.tensor(box, dtype=torch.float)
    net.forward = lambda view: (logits, boxes)
    found, scores = detect.detect(net, view_of(0))[0]
    sure = scores > 0.5
    assert sure.sum() == 2 and torch.allclose(scores[sure], torch.tensor([3.0, 0.5]).sigmoid())
    peak, beside = torch.tensor([3.0, 2.0]).sigmoid().square()  # neighbours say where a box is, too
    side = (24 * peak + 28 * beside) / (peak + beside)
    expected = torch.tensor([[8.0, 8, side, 24], [40, 40, 64, 60]])
    assert torch.allclose(64 * found[sure], expected, atol=1e-3)
    few = detect.detect(tiny(), view_of(0))[0][1]
    assert len(few) and (few.diff() <= 0).all()  # the surest is the first, also of few


def test_answers_are_judged_as_coco_does():
    truth = [torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]]), torch.zeros(0, 4)]
    nobody = torch.zeros(0, 4), torch.zeros(0)
    row = detect.coco([(truth[0], torch.tensor([0.9, 0.8])), nobody], truth, 256)
    assert row["ap"] == row["ap50"] == row["ar"] == 100 and row["ap_small"] is None
    assert row["threshold"] == pytest.approx(0.8)
    shifted = [(truth[0] + 0.02, torch.tensor([0.9, 0.8])), nobody]
    row = detect.coco(shifted, truth, 256)
    assert row["ap75"] == 25.25 and row["ap50"] == 100  # IoU 0.68, the surer one, and 0.82
    nothing = detect.coco([nobody] * 2, truth, 256)
    assert nothing["ap"] == 0 and nothing["threshold"] == detect.LOWEST
    false = torch.tensor([[0.6, 0.0, 0.7, 0.1], [0.0, 0.8, 0.1, 0.9]])
    mixed = [(torch.cat([truth[0], false]), torch.tensor([0.9, 0.5, 0.3, 0.2])), nobody]
    assert detect.coco(mixed, truth, 256)["threshold"] == pytest.approx(0.5)  # the best F1


def test_what_is_cut_out_is_the_face_and_room_around_it():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:20, 30:40] = 255
    room = detect.cut_out(picture, (30, 10, 40, 20))  # a fifth of its side
    assert room.shape == (14, 14, 3) and (room[2:12, 2:12] == 255).all()
    assert room.mean() == pytest.approx(255 * (10 / 14) ** 2)
    assert detect.cut_out(picture, (0, 0, 10, 40), 16).shape == (16, 16, 3)


def test_a_run_writes_what_it_says(base):
    row = json.loads((base / "runs/a-det/metrics.json").read_text())
    split = data.open_split(base / "datasets/scenes", "val")
    truth = np.array(split["boxes"])
    assert (split["labels"] == -1).all()  # of pages
    assert row["faces"] == (truth[..., 0] >= 0).sum() and row["pages"] == 4
    net, header = detect.load(base / "runs/a-det")
    names = [name for name, _ in net.named_parameters()]
    assert header["page"] == 80 and not [x for x in names if x.endswith((".A", ".B"))]
    run_line("apps.export runs/a-det --to half --out half", base, check=0)
    assert detect.load(base / "half")[1] == header


def test_the_last_quarter_of_the_epochs_learns_from_nearly_whole_pages(base, monkeypatch):
    sides, loss_of = [], detect.loss_of

    def noted(*words):
        sides.append(words[3])
        return loss_of(*words)

    monkeypatch.setattr(detect, "loss_of", noted)
    words = "--epochs 4 --batch-size 16 --method full --out runs/late"
    run_line(f"{TRAIN} {words}", base, check=0)
    assert sides == 3 * [48] + [64]  # one step an epoch; pages of 80


def test_few_pages_are_seen_for_more_epochs(base, monkeypatch):
    seen, line = [], f"apps.detect runs/a --data datasets/scenes --view 48 {CPU} --out runs/few"
    monkeypatch.setattr(detect, "learn", lambda *learned: seen.append(learned[-1]))
    monkeypatch.setattr(detect, "write_results", lambda *written: None)
    for least, epochs in ((500, 32), (100, 16)):  # there are 16 pages
        monkeypatch.setattr(detect, "LEAST_VIEWS", least)
        run_line(line + str(least), base, check=0)
        assert seen[-1].total == epochs
    run_line(f"{line} --epochs 3", base, check=0)
    assert seen[-1].total == 3


def test_a_detector_goes_on_with_all_of_its_weights(base):
    more = f"apps.detect runs/a-det --data datasets/scenes --epochs 1 {CPU} --lr 0 --batch-size 8"
    run_line(f"{more} --view 48 --out runs/more", base, check=0)
    files = [base / f"runs/{name}/detector.safetensors" for name in ("a-det", "more")]
    assert equal(*(read_safetensors(file)[0] for file in files))
    assert "pages of 80 px" in refused(run_line(f"{more} --view 64 --out runs/other", base))


def finding(monkeypatch, *boxes):
    """From now on these boxes are found on every page, with falling scores."""
    scores = torch.linspace(0.9, 0.8, len(boxes))
    found = torch.tensor(boxes).reshape(-1, 4), scores
    monkeypatch.setattr(detect, "detect", lambda net, view: [found])


def test_it_is_used_on_pictures_of_any_size(base, monkeypatch):
    """A face's cut has room around it; what has no pixel on the picture is no face."""
    Image.new("RGB", (200, 100), (90, 90, 90)).save(base / "wide.png")
    Image.new("RGB", (1, 1)).save(base / "dot.png")
    use = f"apps.detect runs/a-det wide.png {CPU}"
    finding(monkeypatch, [0.25, 0.25, 0.5, 0.5], [0.2, 0.6, 0.4, 0.9])  # the second: below it
    wide, dot = json_of(f"{use} dot.png --out found --crop", base)
    assert wide["faces"] == [{"box": [50, 50, 100, 100], "score": 0.9}] and dot["width"] == 1
    assert Image.open(base / "found/wide_0.png").size == (70, 70)
    # The same bytes are there: nothing is lost.
    run_line(f"{use} --out found --crop", base, check=0)
    Image.new("RGB", (200, 100), (9, 9, 9)).save(base / "wide.png")
    assert "already" in refused(run_line(f"{use} --out found --crop", base))
    Image.new("RGB", (64, 64)).save(base / "wide.jpg")
    wide, other = json_of(f"{use} wide.jpg --out shown --threshold 0.95", base)
    assert wide["faces"] == other["faces"] == []  # a page without a face is fine
    assert Image.open(base / "shown/wide.png").size == (200, 100)
    assert len([*(base / "shown").glob("*.png")]) == 2  # of one name


MAIN = (  # side and score of each box -> the one that the picture is of
    ([(40, 0.64), (60, 0.39)], 0),  # a face above a skirt
    ([(60, 0.7), (40, 0.64)], 0),
    ([(10, 0.9), (50, 0.5)], 1),  # somebody far behind
    ([(30, 0.6), (100, 0.3), (20, 0.8)], 1),
    ([(5, 0.2)], 0),
)


@pytest.mark.parametrize("faces,main", MAIN)
def test_the_main_face_has_the_best_score_among_large_ones(faces, main):
    boxes = torch.tensor([[10, 20, 10 + side, 20 + side / 2] for side, _ in faces])
    scores = torch.tensor([score for _, score in faces])
    assert detect.main_face(boxes, scores).tolist() == [main]
    assert detect.main_face(boxes[:0], scores[:0]).tolist() == []


def test_a_picture_without_a_face_is_cut_around_its_figure(base, monkeypatch):
    finding(monkeypatch)
    picture = np.full((120, 80, 3), 255, np.uint8)
    picture[70:110, 20:50] = 30
    for name in ("a/1.png", "b/2.png"):
        (base / "whole" / name).parent.mkdir(parents=True)
        Image.fromarray(picture).save(base / "whole" / name)
    use = f"apps.detect runs/a-det whole {CPU} --out whole-cut"
    done = run_line(f"{use} --largest", base, check=0)
    assert "2 pictures show no face" in done.stderr
    cuts = sorted(str(path.relative_to(base / "whole-cut")) for path in base.glob("whole-cut/*/*"))
    assert cuts == ["a/1_figure.png", "b/2_figure.png"]
    cut = np.array(Image.open(base / "whole-cut" / cuts[0]))
    assert cut.shape[0] == cut.shape[1] < 60 and (cut == 30).any(2).sum() > 0.9 * 40 * 30


def test_the_main_face_of_each_picture_keeps_its_folder(base, monkeypatch):
    finding(monkeypatch, [0.1, 0.3, 0.2, 0.4], [0.4, 0.3, 0.9, 0.7])
    use = f"apps.detect runs/a-det images {CPU} --out cut"
    run_line(f"{use} --largest", base, check=0)
    cuts = sorted(path.relative_to(base / "cut") for path in (base / "cut").rglob("*.png"))
    there = (path.relative_to(base / "images") for path in (base / "images").rglob("*.png"))
    assert cuts == sorted(path.with_name(f"{path.stem}_0.png") for path in there)
    sizes = [Image.open(base / "cut" / path).size[0] for path in cuts]
    assert min(sizes) > Image.open(base / "images/class0/illust0_0.png").size[0] / 2


def test_crops_are_looked_at_the_least_sure_first(base, monkeypatch):
    """The page does not get in the way of data.py, and says what to do before it."""
    finding(monkeypatch, [0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9])
    done = run_line(f"apps.detect runs/a-det images {CPU} --crop --out twice", base, check=0)
    assert "look at twice/crops.html" in done.stderr and "data.py twice" in done.stderr
    text = (base / "twice/crops.html").read_text("utf-8")
    cuts = [path.relative_to(base / "twice").as_posix() for path in base.glob("twice/*/*.png")]
    assert sorted(re.findall(r'href="(.*?png)"', text)) == sorted(cuts) and len(cuts) == 144
    assert text.index("score 0.80") < text.rindex("score 0.80") < text.index("score 0.90")
    said = run_line("data.py twice --out datasets/twice --size 32", base, check=0).stdout
    assert "read as class: 3 classes" in said and "left out" not in said


@pytest.mark.parametrize("how", ["--largest", ""])
def test_pictures_with_long_names_are_written_and_kept_apart(base, monkeypatch, how):
    """A name as long as a file's may be has no room for the number of its face, or its folder."""
    finding(monkeypatch, [0.1, 0.3, 0.3, 0.5])
    names = [249 * "x" + end for end in "ab"] + [83 * "\u3042" + end for end in "ab"]  # of 3 bytes
    for name in names:
        (base / "long/of").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(base / f"long/of/{name}.png")
    run_line(f"apps.detect runs/a-det long {CPU} {how} --out short{how}", base, check=0)
    cuts = [path.stem for path in (base / f"short{how}").rglob("*.png")]
    assert len(cuts) == len(names) and all(cut.endswith("_0") == bool(how) for cut in cuts)


def test_a_page_s_faces_are_named_one_by_one(base, monkeypatch):
    """apps.recognize --detect: a line for each face, by a recogniser of whole drawings."""
    Image.new("RGB", (64, 64), (200, 90, 90)).save(base / "page.png")
    use = f"apps.recognize runs/a-lora {CPU} --detect runs/a-det page.png --json"
    finding(monkeypatch, [0.5, 0.25, 0.75, 0.5], [0.1, 0.1, 0.3, 0.3])
    found = [row["picture"] for row in json_of(use, base)]
    assert found == ["page.png[6,6,19,19]", "page.png[32,16,48,32]"]
    finding(monkeypatch)
    assert json_of(use, base) == [{"picture": "page.png", "faces": []}]
