"""weights/: what ships is small, good, and taken by every stage; drawings that no data set has decide."""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import accuracy_score

import data
from apps import demo, detect, recognize, segment, tags
from apps.gallery import Gallery
from common.train import read_safetensors
from finetune_lora import load_classifier
from ingest import scenes, toon


@pytest.fixture(scope="module")
def drawings():
    """One of every second character, no two alike -> [name], u8 (n, 128, 128, 3)."""
    people, images = toon.cast()[::2], []
    for i, person in enumerate(people):
        images.append(toon.draw(toon.unseen(person, i + 1, seed=99)[i], 128)["image"])
    return [person["name"] for person in people], np.stack(images)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)  # an adapter knows its encoder as weights/toon


@pytest.mark.parametrize("folder", sorted(ROOT.glob("weights/*")), ids=lambda path: path.name)
def test_they_are_small_in_16_bits_and_have_cards(folder):
    files = [*folder.glob("*.safetensors")]
    assert files and sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    for path in files:
        assert torch.float32 not in {x.dtype for x in read_safetensors(path)[0].values()}, path
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "How good it is" in card
    assert "Nothing was measured" not in card


def test_its_encoder_fills_in_three_quarters(drawings):
    names, images = drawings
    mae = net, _ = demo.loaded(demo.load_mae, "weights/toon")
    rows, found = torch.arange(len(names)), []
    for some, view in data.whole_views(images, rows, net.config["image_size"], torch.device("cpu")):
        for i, own in zip(some.tolist(), view.split(1), strict=True):
            ids = demo.draw_mask("random", {}, net.encoder.side**2, 0.75, i)
            pasted, where = demo.filled_in(*mae, own, *ids, demo.MACHINE.autocast)
            found.append(demo.psnr(pasted, own, where).item())
    assert np.mean(found) > 18  # dB


def test_its_recogniser_names_drawings_that_no_data_set_has(drawings):
    names, images = drawings
    net, _ = load_classifier("weights/toon-lora")
    gallery = Gallery.load("weights/toon-lora")
    rows = recognize.answers(names, *recognize.embed(net, images, nullcontext), gallery, 1)
    assert accuracy_score(names, [row["name"] or "unknown" for row in rows]) >= 0.95


def test_its_tagger_names_them_too_from_the_picture_alone(drawings):
    names, images = drawings
    net, header = tags.load_tagger("weights/toon-tags")
    rows, said = torch.arange(len(names)), []
    for _, view in data.whole_views(images, rows, header["image_size"], torch.device("cpu")):
        with torch.no_grad():
            said += tags.answers(net, view)[0].argmax(1).tolist()
    assert accuracy_score(names, [header["classes"][c] for c in said]) >= 0.95


@pytest.mark.slow
def test_its_detector_finds_whom_its_recogniser_names():
    net, about = detect.load("weights/toon-det")
    known, header = load_classifier("weights/toon-lora")
    gallery, count = recognize.open_gallery("weights/toon-lora"), Counter()
    for item in [item for item in scenes.plan() if item["split"] == "val"][:16]:
        page = scenes.draw(item, 512)
        true = 512 * torch.from_numpy(page["boxes"][: len(page["names"])])
        found = set()
        boxes, _ = detect.faces_of(net, page["image"], about["page"], about["threshold"])
        for box in boxes:
            here = (detect.iou(box, true) >= 0.5).nonzero()[:, 0].tolist()
            found |= set(here)
            cut = detect.cut_out(page["image"], box.tolist(), header["packed_size"])
            embedded = recognize.embed(known, cut[None], nullcontext)
            row = recognize.answers([""], *embedded, gallery, 0)[0]
            if here and row["known"]:
                right = row["name"] in [page["names"][i] for i in here]
                count["right" if right else "wrong"] += 1
            count["background"] += not here
        count["faces"] += len(true)
        count["found"] += len(found)
    assert count["found"] > 30 and count["found"] >= 0.8 * count["faces"], count
    assert count["background"] < 0.2 * count["found"], count
    assert count["right"] >= 0.5 * count["found"], count
    assert count["wrong"] <= 0.1 * count["found"], count


def test_its_segmenter_tells_a_drawing_from_what_is_behind_it():
    net, header = segment.load("weights/toon-seg")
    shares = []
    for who in [*demo.CHOSEN][:3]:
        drawn = demo.chosen_figure(who)["fg"] > 127
        found = segment.mask_of(net, demo.on_photo(who), header["image_size"], nullcontext) > 0.5
        shares.append((found[drawn].mean(), found[~drawn].mean()))
    of_drawing, of_photo = np.mean(shares, 0)
    assert of_drawing > 0.9 and of_photo < 0.5
