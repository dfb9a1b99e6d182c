"""True parts in the place of attention: does it matter what a mask hides, or only where that lies?

    python -m lab.true_maps datasets/toon --out maps/true
    python -m lab.true_maps datasets/toon --mean --out maps/place

Reads:  train of datasets/NAME, which has part masks
Writes: OUT/attn.safetensors: f16 (n, g, g); pretrain.py --mask attn_high --teacher maps --maps OUT

A cell holds the share of its pixels that show PARTS. --mean: all pictures get one map, their
geometric mean, which knows the place of eyes and hair, but nothing of the picture.
"""

from pathlib import Path

import numpy as np

import data
from apps.maps import write_maps
from common.locks import reserve
from common.train import Parser, UserError, cli

PARTS = ("eyes", "hair", "accessory")  # what tells one character from another
GRID = 32  # cells a side
FLOOR = 0.01  # of a cell without them: masks read the logarithm


def shares(parts, ids):
    """parts u8 (n, S, S) -> fp32 (n, GRID, GRID): the share of pixels of the parts `ids`."""
    n, S, _ = parts.shape
    shown = np.isin(parts, ids).reshape(n, GRID, S // GRID, GRID, S // GRID)
    return shown.mean((2, 4), dtype=np.float32).clip(FLOOR)


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data", metavar="DIR", help="a packed set with part masks")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the maps")
    add(
        "--mean",
        action="store_true",
        help="the geometric mean of all maps for every picture: the place alone",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    split = data.open_split(data.open_or_pack(args.data), "train")
    names = split["header"].get("parts") or []
    if "parts" not in split or not {*PARTS} <= {*names} or split["header"]["size"] % GRID:
        fix = f"python data.py toon --out DIR makes some, at a size that {GRID} divides"
        raise UserError(f"{args.data} has no masks of {', '.join(PARTS)}; {fix}")
    path = args.out / "attn.safetensors"
    reserve([path])
    maps = shares(split["parts"], [names.index(name) for name in PARTS])
    if args.mean:
        # Geometric, because a mask follows the logarithm of a map.
        maps = np.broadcast_to(np.exp(np.log(maps).mean(0)), maps.shape)
    header = {"map": "attn", "grid": GRID, "data": Path(args.data).name}
    mean = ", their geometric mean" if args.mean else ""
    header |= {"source": f"the true {', '.join(PARTS)}{mean}"}
    header |= {"images": len(maps), "data_digest": data.fingerprint(split)}
    write_maps(path, "attn", [maps.astype(np.float16)], maps.shape, "F16", header)
    print(f"{path}: {len(maps)} maps of {GRID} x {GRID}, {header['source']}")


if __name__ == "__main__":
    cli(main)
