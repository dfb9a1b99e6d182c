"""Pages composed of drawn people, each with a box, for studies of detection with few pages.

    python -m lab.pages datasets/portraits --pages 60 --out pages
    python data.py pages/boxes.csv --detect --dev 0.1 --out datasets/pages

Reads:  datasets/NAME/train.safetensors, packed from pictures with alpha
Writes: OUT/{train,test}/*.png, OUT/boxes.csv

Who is on a page of test is on no page of train. --pages 20 and --pages 60 share test and the first
20 pages.
"""

from pathlib import Path

import numpy as np
from PIL import Image

import data
from common.door import aside, save_csv
from common.locks import reserve
from common.train import Parser, UserError, at_least, cli
from ingest.scenes import FACE, MOST, VISIBLE, backdrop, corners, panels

PAGE = 256  # pixels on a side
TEST_PAGES, TEST_PEOPLE = 200, 0.3  # pages, share of the people


def place(page, owner, number, portrait, panel, rng):
    """Paste a portrait into a panel -> its pixels; there owner (PAGE, PAGE) becomes its number."""
    left, top, right, bottom = panel
    most = min(FACE[1], right - left, bottom - top)
    side = int(np.exp(rng.uniform(np.log(FACE[0]), np.log(most))))
    portrait = portrait.resize((side, side), Image.Resampling.BICUBIC)
    x, y = rng.integers(left, right - side + 1), rng.integers(top, bottom - side + 1)
    page.paste(portrait, (int(x), int(y)), portrait)
    shown = np.asarray(portrait)[..., 3] > 127
    owner[y : y + side, x : x + side][shown] = number
    return shown.sum()


def draw(portraits, rng):
    """RGBA images -> a page, and boxes (x1, y1, x2, y2) of what is seen of them, in pixels."""
    page = Image.new("RGB", (PAGE, PAGE), "white")
    owner = np.full((PAGE, PAGE), -1)
    areas = panels(rng, PAGE)
    for left, top, right, bottom in areas:
        page.paste(Image.fromarray(backdrop(rng, right - left, bottom - top)), (left, top))
    boxes, sizes = [], []
    for number in range(rng.integers(1, MOST + 1)):
        portrait = portraits[rng.integers(len(portraits))]
        panel = areas[rng.integers(len(areas))]
        sizes.append(place(page, owner, number, portrait, panel, rng))
    for number, size in enumerate(sizes):
        seen = owner == number
        if seen.sum() > VISIBLE * size:
            boxes.append(corners(seen))
    return page, boxes


def save_pages(folder, split, portraits, count, seed):
    """Write pages -> a row for each box."""
    rows = []
    (folder / split).mkdir()
    for i in range(count):
        page, boxes = draw(portraits, np.random.default_rng((*seed, i)))
        name = f"{split}/{i:04}.png"
        page.save(folder / name)
        for x1, y1, x2, y2 in boxes:
            rows.append({"path": name, "x1": x1, "y1": y1, "x2": x2, "y2": y2})
    return rows


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="DIR", help="a packed set of people, with foreground")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--pages", type=at_least(2), default=60, metavar="N", help="of train")
    add("--draw", type=at_least(0), default=0, metavar="N", help="who is where")
    return parser.parse_args()


def main():
    args = parse_args()
    reserve([args.out])
    train = data.open_split(args.data, "train")
    if "fg" not in train or not data.has_labels(train):
        raise UserError(f"{args.data} needs foreground and two people; pack pictures with alpha")
    pixels = np.concatenate([train["images"], train["fg"][..., None]], 3)
    order = np.random.default_rng(args.draw).permutation(len(train["header"]["classes"]))
    people = {"test": order[: round(TEST_PEOPLE * len(order))]}
    people["train"] = order[len(people["test"]) :]
    rows = []
    with aside(args.out) as folder:
        folder.mkdir()
        for number, (split, count) in enumerate({"train": args.pages, "test": TEST_PAGES}.items()):
            own = np.isin(train["labels"], people[split])
            portraits = [Image.fromarray(picture) for picture in pixels[own]]
            rows += save_pages(folder, split, portraits, count, (args.draw, number))
        save_csv(rows, folder / "boxes.csv")
    print(f"{args.out}: {args.pages} pages of train, {TEST_PAGES} of test, {len(rows)} boxes")


if __name__ == "__main__":
    cli(main)
