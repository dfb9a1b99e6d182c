"""What is drawn: pictures, and pages with boxes."""

from collections import Counter

import numpy as np
import pytest
from conftest import call
from PIL import Image

from ingest import scenes, toon

PUBLISHED = {  # of four of the 2,400: mean colour, pixels of each part, how far the head is turned
    0: ([141.3, 135.2, 161.2], [1421, 1672, 190, 135, 20, 544, 114], "frontal"),
    500: ([177.7, 156.0, 170.0], [1829, 1010, 338, 159, 4, 338, 418], "far turned"),
    800: ([151.0, 151.1, 151.9], [1352, 1713, 336, 120, 31, 56, 488], "turned"),
    1600: ([210.7, 219.3, 217.1], [904, 2341, 366, 112, 5, 266, 102], "turned"),
}


def test_the_pictures_are_those_that_were_published():
    """Every result on the demo set stands on these."""
    items = toon.plan(2400)
    for i, (colour, pixels, yaw) in PUBLISHED.items():
        drawn = toon.draw(items[i], 64)
        assert drawn["image"].mean((0, 1)) == pytest.approx(colour, abs=0.2)
        assert np.bincount(drawn["parts"].ravel(), minlength=7) == pytest.approx(pixels, abs=3)
        assert ((drawn["parts"] > 0) == (drawn["fg"] >= 128)).mean() > 0.985  # all but the rim
        assert drawn["style"]["yaw"] == yaw


def test_wardrobe_is_complete():
    behind = {a + " behind" for a in toon.ATTRIBUTES["accessory"]} & set(toon.DRAWINGS)
    names = {name.removesuffix(" behind") for name in behind} | set(toon.DRAWINGS)
    for attribute in ("hair_style", "fringe", "ahoge", "mark", "glasses", "accessory", "outfit"):
        assert {v for v in toon.ATTRIBUTES[attribute] if not v.startswith("no_")} <= names
    assert {f"{style} locks" for style in toon.ATTRIBUTES["hair_style"]} <= names
    assert {f"{mouth} mouth" for _, _, mouth, _ in toon.MOODS.values()} <= names
    assert {"hand", *toon.FOOD, *(sign for *_, sign in toon.MOODS.values() if sign)} <= names


def test_plan_is_balanced_or_long_tailed():
    items = toon.plan(2400)
    assert set(Counter(item["label"] for item in items).values()) == {50}
    assert len({item["key"] for item in items}) == 2400 and items == toon.plan(2400)
    assert all(item["key"].startswith(item["who"]["name"] + "/") for item in items)
    count = Counter(item["label"] for item in toon.plan(2400, tail=5))
    sizes = [count[label] for label in sorted(count)]
    assert sum(sizes) == 2400 and len(sizes) == 48 and min(sizes) == 5
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 10 * sizes[1]


def test_the_command_draws_one_character_in_a_picture_that_the_set_has_not(tmp_path):
    words = ("--who", "yukina", "--size", 16)
    assert "yukina.png written" in call("ingest.toon", *words, cwd=tmp_path, check=0).stdout
    assert Image.open(tmp_path / "yukina.png").size == (16, 16)


def test_characters_stay_in_their_split():
    who = {split: set() for split in scenes.COUNTS}
    for item in scenes.plan():
        who[item["split"]] |= {person["name"] for person in item["people"]}
    assert sum(map(len, who.values())) == len(set.union(*who.values())) == len(toon.cast())


def test_boxes_are_of_faces_inside_the_page_which_is_drawn_the_same_twice():
    items = [item for item in scenes.plan() if item["split"] == "val"][:8]
    pages = [scenes.draw(item, 64) for item in items]
    again = scenes.draw(items[3], 64)
    assert all(np.array_equal(again[k], pages[3][k]) for k in ("image", "boxes"))
    sizes, counts = [], []
    for page in pages:
        face = page["boxes"][page["boxes"][:, 0] >= 0]
        assert len(face) == len(page["names"])
        assert (face >= 0).all() and (face <= 1).all() and (face[:, 2:] > face[:, :2]).all()
        sizes += (face[:, 2:] - face[:, :2]).prod(1).tolist()
        counts.append(len(face))
    assert 0 in counts and max(counts) >= 4 and min(sizes) < 0.03 and max(sizes) > 0.1


def test_a_box_holds_the_face_that_was_painted(monkeypatch):
    """Draw it in front of nothing, alone: what changes on the page is the figure."""
    monkeypatch.setattr(scenes, "panels", lambda rng, size: [(0, 0, size, size)])
    monkeypatch.setattr(scenes, "backdrop", lambda rng, w, h: np.full((h, w, 3), 255, np.uint8))
    monkeypatch.setattr(scenes, "bubble", lambda *_: None)
    monkeypatch.setattr(scenes, "MOST", 1)
    seen = 0
    for item in scenes.plan()[:8]:
        page = scenes.draw(item, 96)
        figure = (page["image"] < 250).any(2)
        for x1, y1, x2, y2 in (96 * page["boxes"][: len(page["names"])]).round().astype(int):
            left, top, right, bottom = scenes.corners(figure)
            assert left <= x1 and top <= y1 and right >= x2 and bottom >= y2
            assert figure[y1:y2, x1:x2].mean() > 0.6
            seen += 1
    assert seen > 3


def test_what_a_bubble_covers_is_nobody_s():
    rng = np.random.default_rng(0)
    for _ in range(20):
        page, owner = np.full((128, 128, 3), 99, np.float32), np.ones((128, 128), np.int16)
        scenes.bubble(page, owner, rng)
        drawn = (page != 99).any(2)
        assert drawn.any() and (drawn & (owner == 1)).sum() < 0.02 * drawn.sum()
