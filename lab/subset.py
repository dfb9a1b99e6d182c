"""A packed set with fewer characters or fewer pictures, for studies of small collections.

    python -m lab.subset datasets/mine --pictures 5 --out datasets/mine-5
    python -m lab.subset datasets/mine --characters 16 --draw 3 --out datasets/mine-16
    python -m lab.subset datasets/mine --pictures 80 --folders --out pictures

Reads:  datasets/NAME
Writes: OUT/{train,dev,val,test}.safetensors; with --folders the pictures of train, OUT/WHO/*.png

--characters: the others leave every split. --pictures: of train and dev so many of each character
stay; val and test stay whole. The smaller of two subsets of one --draw is a part of the larger.
--choose: a whole dev is its val, so that a choice is judged by many pictures, and not by those of val.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

import data
from apps.pictures import file_name
from common.door import aside
from common.locks import reserve
from common.train import Parser, UserError, at_least, cli, read_safetensors, save_safetensors
from ingest.layouts import ORDER

THINNED = ("train", "dev")
PER_IMAGE = ("keys", "groups")  # lists of the header


def order_of(name, draw):
    """A number that orders names at random, the same way in every call with one draw."""
    return hashlib.blake2b(f"{draw}/{name}".encode()).digest()


def pictures_of(labels, keys, count, draw):
    """labels (n,), names of the pictures -> rows, ascending: at most `count` of each label."""
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen += sorted(rows, key=lambda row: order_of(keys[row], draw))[:count]
    return np.sort(np.array(chosen, int))


def thinned(tensors, header, classes, pictures, draw):
    """A split -> the same with these classes, and of each at most so many pictures (None: all)."""
    old = header["classes"]
    # The last one is of pictures without a label, -1.
    new_label = np.array([*(classes.index(x) if x in classes else -1 for x in old), -1])
    labels = new_label[tensors["labels"]]
    rows = np.flatnonzero(labels >= 0)
    if pictures is not None:
        keys = [header["keys"][row] for row in rows]
        rows = rows[pictures_of(labels[rows], keys, pictures, draw)]
    tensors = {name: array[rows] for name, array in tensors.items()}
    tensors["labels"] = tensors["labels"].new_tensor(labels[rows])
    lists = {name: [header[name][row] for row in rows] for name in PER_IMAGE if header.get(name)}
    pixels = hashlib.blake2b(digest_size=6)  # of all planes and labels, as in ingest/pack.py
    for plane in tensors.values():
        pixels.update(plane.numpy().data)
    return tensors, header | lists | {"classes": classes, "pixels": pixels.hexdigest()}


def save_pictures(tensors, header, folder):
    """Write each picture to its character's folder."""
    names = [file_name(name) for name in header["classes"]]  # a label may be ../x
    if len(set(names)) < len(names):
        raise UserError(f"two characters of {folder} would share a folder; rename one")
    for i, (image, label) in enumerate(zip(tensors["images"], tensors["labels"], strict=True)):
        path = folder / names[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="DIR", help="a packed set with labels")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--characters", type=at_least(2), metavar="N", help="how many stay (default: all)")
    add("--pictures", type=at_least(2), metavar="N", help="of each in train and in dev, at most")
    add("--choose", action="store_true", help="val is the dev of DIR, whole; there is no test")
    add("--folders", action="store_true", help="write pictures, as somebody collects them")
    add("--draw", type=at_least(0), default=0, metavar="N", help="which ones stay")
    return parser.parse_args()


def main():
    args = parse_args()
    reserve([args.out])
    train = data.open_split(args.data, "train")
    if not data.has_labels(train):
        raise UserError(f"{args.data} has no labels, or one character; choose another set")
    if args.choose and not (args.data / "dev.safetensors").exists():
        raise UserError(f"--choose: {args.data} has no dev; pack it with --dev 0.1")
    names = train["header"]["classes"]
    if args.characters and args.characters > len(names):
        raise UserError(f"--characters {args.characters}: {args.data} has {len(names)}")
    chosen = sorted(names, key=lambda name: order_of(name, args.draw))[: args.characters]
    classes = [name for name in names if name in chosen]
    sources = {name: name for name in ORDER}
    if args.choose:
        sources = {"train": "train", "dev": "dev", "val": "dev"}
    if args.folders:
        sources = {"train": "train"}
    with aside(args.out) as folder:
        folder.mkdir()
        for name, source in sources.items():
            path = args.data / f"{source}.safetensors"
            if not path.exists():
                continue
            pictures = args.pictures if name in THINNED else None
            tensors, header = thinned(*read_safetensors(path), classes, pictures, args.draw)
            if args.folders:
                save_pictures(tensors, header, folder)
            else:
                save_safetensors(tensors, folder / f"{name}.safetensors", header | {"split": name})
            print(f"{args.out}, {name}: {len(tensors['labels']):,} images")
    print(f"{len(classes)} of {len(names)} characters: {', '.join(classes)}")


if __name__ == "__main__":
    cli(main)
