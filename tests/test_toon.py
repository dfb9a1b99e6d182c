"""The drawn data set: deterministic, well-formed, and not recognised by its thumbnails."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from conftest import call
from PIL import Image

from ingest import toon


@pytest.fixture(scope="module")
def sample():
    """A drawing of each of 48 characters, at a quarter of the usual size."""
    return [toon.draw(item, 32) for item in toon.plan(96)[::2]]


def test_draw_is_deterministic_and_well_formed():
    for item in toon.plan(3, 3):
        a, b = toon.draw(item, 128), toon.draw(dict(item), 128)
        assert all(np.array_equal(a[k], b[k]) for k in ("image", "fg", "parts"))
        assert (a["tags"], a["style"]) == (b["tags"], b["style"])
        assert a["image"].shape == (128, 128, 3) and a["fg"].shape == a["parts"].shape == (128, 128)
        assert {a[k].dtype for k in ("image", "fg", "parts")} == {np.dtype("uint8")}
        assert a["tags"] and all(isinstance(t, str) and t for t in a["tags"])
        assert all(a["style"][name] in values for name, values in toon.STRATA.items())
    assert not np.array_equal(*(toon.draw(item)["image"] for item in toon.plan(2, 1)))


PUBLISHED = {  # mean colour, and pixels of each part, of three of the 2,400
    0: ([141.3, 135.2, 161.2], [1421, 1672, 190, 135, 20, 544, 114]),
    800: ([151.0, 151.1, 151.9], [1352, 1713, 336, 120, 31, 56, 488]),
    1600: ([210.7, 219.3, 217.1], [904, 2341, 366, 112, 5, 266, 102]),
}


def test_the_pictures_are_those_that_were_published():
    """Every result on the demo set stands on these."""
    items = toon.plan(2400)
    for i, (colour, pixels) in PUBLISHED.items():
        drawn = toon.draw(items[i], 64)
        assert drawn["image"].mean((0, 1)) == pytest.approx(colour, abs=0.2)
        assert np.bincount(drawn["parts"].ravel(), minlength=7) == pytest.approx(pixels, abs=3)


def test_alpha_and_parts_agree():
    drawn = [toon.draw(item) for item in toon.plan(12, 12)]
    fg, figure = np.stack([d["fg"] for d in drawn]), np.stack([d["parts"] for d in drawn]) > 0
    assert np.where(figure, fg > 200, fg < 60).mean() > 0.98  # the rest is the antialiased rim
    assert (figure == (fg >= 128)).mean() > 0.995


def test_every_picture_shows_figure_and_background_and_every_part_occurs(sample):
    share = np.array([(d["parts"] > 0).mean() for d in sample])
    assert share.min() > 0.2 and share.max() < 0.95
    seen = [set(np.unique(d["parts"])) for d in sample]
    assert set().union(*seen) == set(range(len(toon.PARTS)))
    always = {toon.PARTS.index(part) for part in ("background", "hair", "face", "eyes", "clothes")}
    assert np.mean([always <= ids for ids in seen]) > 0.97


@pytest.mark.parametrize("characters", (6, 24, 48, 96))
def test_cast_shares_every_value_and_tells_everybody_apart(characters):
    people = toon.cast(characters)
    assert people == toon.cast(characters) and len({p["name"] for p in people}) == characters
    for attribute, values in toon.ATTRIBUTES.items():
        counts = Counter(p[attribute] for p in people)
        assert set(counts) <= set(values) and min(counts.values()) >= 2, attribute
        if characters >= 48:
            assert set(counts) == set(values) and max(counts.values()) < 0.7 * characters, attribute
    for p, q in combinations(people, 2):
        assert sum(p[a] != q[a] for a in toon.ATTRIBUTES) >= 3


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
    count = Counter(item["label"] for item in toon.plan(2400, tail=1.2))
    sizes = [count[label] for label in sorted(count)]
    assert sum(sizes) == 2400 and len(sizes) == 48 and min(sizes) >= 5
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 10 * sizes[-1]


@pytest.mark.slow
def test_identity_is_not_in_the_thumbnail():
    """Ridge regression of the identity on 4 x 4 block means."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    items = toon.plan(576)
    items = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    images = np.stack([toon.draw(item, 64)["image"] for item in items]).astype(float)
    x = images.reshape(576, 4, 16, 4, 16, 3).mean((2, 4)).reshape(576, -1)
    x, y = StandardScaler().fit_transform(x), np.array([item["label"] for item in items])
    for strength in (1, 10, 100):
        guess = RidgeClassifier(strength).fit(x[:400], y[:400]).predict(x[400:])
        assert (guess == y[400:]).mean() < 0.6


def test_the_sheet_is_a_picture_of_rows_and_columns(tmp_path):
    words = ("--rows", 1, "--columns", 2, "--size", 16, "--out", "a.png")
    assert "a.png written" in call("ingest.toon", *words, cwd=tmp_path, check=0).stdout
    assert Image.open(tmp_path / "a.png").size == (32, 16)


def test_the_yaw_that_is_stored_is_the_yaw_that_was_drawn(monkeypatch):
    drawn, pose = [], toon.Canvas.pose

    def watched(canvas, yaw, *more):
        drawn.append(abs(yaw))
        return pose(canvas, yaw, *more)

    monkeypatch.setattr(toon.Canvas, "pose", watched)
    said = [toon.draw(item, 16)["style"]["yaw"] for item in toon.plan(40, 4)]
    assert len(drawn) == 4 * 40 and set(said) == {"frontal", "turned", "far turned"}
    for name, yaw in zip(said, drawn[::4], strict=True):  # the head's pose comes first
        assert name == ("frontal" if yaw <= 0.2 else "turned" if yaw <= 0.4 else "far turned")
