"""weights/: what ships is small, good, and taken by every stage; drawings that no data set has decide."""

import statistics
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import demo
import detect
import recognize
import tags
from common.io import read_safetensors
from finetune_lora import load_classifier
from ingest import scenes, toon

WEIGHTS = ROOT / "weights"


@pytest.fixture(scope="module")
def drawings():
    """Two of each character, no two alike -> [name], u8 (n, 128, 128, 3)."""
    people = toon.cast() * 2
    images = [
        toon.draw(toon.unseen(person, i + 1, seed=99)[i], 128)["image"]
        for i, person in enumerate(people)
    ]
    return [person["name"] for person in people], np.stack(images)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)  # an adapter knows its encoder as weights/toon


def test_they_are_small_in_16_bits_and_have_cards():
    files = list(WEIGHTS.glob("*/*.safetensors"))
    assert len(files) >= 7
    for folder in WEIGHTS.iterdir():  # 12 MB were for three of them
        assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    for path in files:
        assert torch.float32 not in {x.dtype for x in read_safetensors(path)[0].values()}, path
    for folder in WEIGHTS.iterdir():
        card = (folder / "README.md").read_text()
        assert (
            "license: mit" in card
            and "How good it is" in card
            and "Nothing was measured" not in card
        )


def test_its_encoder_fills_in_three_quarters(drawings):
    names, images = drawings
    net, header = demo.loaded(demo.load_mae, "weights/toon")
    N, found = net.encoder.side**2, []
    views = data.whole_views(
        images, torch.arange(len(names)), net.config["image_size"], demo.MACHINE.device
    )
    for rows, view in views:
        for i, own in zip(rows.tolist(), view.split(1), strict=True):
            ids_keep, ids_mask = demo.draw_mask("random", {}, N, 0.75, 1.0, i)
            found.append(demo.filled_in(net, header, own, ids_keep, ids_mask)[1])
    assert statistics.fmean(found) > 18  # dB, of the mid-term report


def test_its_recogniser_names_drawings_that_no_data_set_has(drawings):
    names, images = drawings
    net, header = load_classifier("weights/toon-lora")
    logits, embeddings = recognize.embed(net, images, nullcontext)
    rows = recognize.answers(
        names, logits, embeddings, recognize.load_gallery("weights/toon-lora"), 1
    )
    assert (
        statistics.fmean(row["name"] == who for row, who in zip(rows, names, strict=True)) >= 0.95
    )


def test_its_tagger_names_them_too_from_the_picture_alone(drawings):
    names, images = drawings
    net, header = tags.load_tagger("weights/toon-tags")
    views = data.whole_views(
        images, torch.arange(len(names)), header["image_size"], demo.MACHINE.device
    )
    with torch.no_grad():
        said = [
            header["classes"][c]
            for _, view in views
            for c in tags.answers(net, view)[0].argmax(1).tolist()
        ]
    assert statistics.fmean(a == b for a, b in zip(said, names, strict=True)) >= 0.95


def test_its_detector_finds_whom_its_recogniser_names():
    net, about = detect.load("weights/toon-det")
    known, header = load_classifier("weights/toon-lora")
    gallery = recognize.open_gallery("weights/toon-lora")
    count = dict.fromkeys(("faces", "found", "background", "right", "wrong"), 0)
    for item in [item for item in scenes.plan() if item["split"] == "val"][:16]:
        page = scenes.draw(item, 512)
        true = 512 * torch.from_numpy(page["boxes"][: len(page["names"])])
        count["faces"] += len(true)
        seen = set()
        boxes, _ = detect.faces_of(net, page["image"], about["page"], about["threshold"])
        for box in boxes:
            here = [i for i, x in enumerate(detect.iou(box, true).tolist()) if x >= 0.5]
            seen |= set(here)
            count["background"] += not here
            cut = detect.cut_out(page["image"], box.tolist(), detect.MARGIN, header["packed_size"])
            embedded = recognize.embed(known, cut[None], nullcontext)
            row = recognize.answers([""], *embedded, gallery, 0)[0]
            right = row["name"] in [page["names"][i] for i in here]
            if here and row["known"]:
                count["right" if right else "wrong"] += 1
        count["found"] += len(seen)
    assert count["found"] > 30 and count["found"] >= 0.8 * count["faces"], count
    assert count["background"] < 0.2 * count["found"], count
    assert count["right"] >= 0.5 * count["found"], count
    assert count["wrong"] <= 0.1 * count["found"], count
