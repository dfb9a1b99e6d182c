"""experiments.pages: boxes are where people are, and nobody is on pages of train and of test."""

import csv

import numpy as np
from conftest import run_line
from PIL import Image

PEOPLE = 4


def test_a_box_holds_a_person_of_its_split_alone(tmp_path):
    """A person is a disc of one colour."""
    y, x = np.mgrid[:32, :32]
    for who in range(PEOPLE):
        picture = np.zeros((32, 32, 4), np.uint8)
        picture[(x - 16) ** 2 + (y - 16) ** 2 < 12**2] = (255, 60 * who, 0, 255)
        for number in range(8):
            path = tmp_path / f"images/{who}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    run_line("data.py images --out packed --size 32 --dedupe off", tmp_path, check=0)
    run_line("experiments.pages packed --pages 8 --out pages", tmp_path, check=0)
    seen = {"train": set(), "test": set()}
    for row in csv.DictReader((tmp_path / "pages/boxes.csv").open()):
        page = np.asarray(Image.open(tmp_path / "pages" / row["path"]))
        box = {side: round(float(row[side])) for side in ("x1", "y1", "x2", "y2")}
        inside = page[box["y1"] : box["y2"], box["x1"] : box["x2"]]
        red = inside[..., 0] > 250
        assert red.mean() > 0.3
        seen[row["path"].split("/")[0]].add(round(np.median(inside[red, 1]) / 60))
    assert seen["train"] | seen["test"] == set(range(PEOPLE))
    assert not seen["train"] & seen["test"]
