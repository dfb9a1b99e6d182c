"""How well does a network fill in what is hidden? By the share that is hidden, and by kind of patch.

    python -m lab.filled runs/NAME --data datasets/toon

Reads:  runs/NAME/model.safetensors, datasets/NAME
Writes: OUT/filled.json, filled.png; by default in runs/NAME/, and of other data than the run's, or of
        another split than val, in runs/NAME/DATANAME-SPLIT/

Flat and detailed patches are those to which --flat-weight 0 would give less than half a weight, and the
rest (kernels/patches.py). Beside each PSNR stands that of the mean colour of visible neighbours, which
needs no network. A PSNR is of the mean squared error of all pixels of a kind, and no mean over pictures: a
patch that is filled in exactly has none of its own. SSIM (Wang et al. 2004, doi:10.1109/TIP.2003.819861)
compares structure, not values: 1 is equal. It is the mean of its map over the pixels of a kind, by
scikit-image: windows of 7 px, which reach over the border of a patch, and means of the three colours.

The picture shows one drawing with more and more of it hidden: what is hidden once stays hidden.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import data
from common import plots
from common.checkpoints import flags_of, load_mae
from common.door import require
from common.evaluate import EVAL_IMAGES, filled_in, hide, masked_views, neighbours_in
from common.features import results_folder
from common.locks import reserve
from common.train import Parser, cli, command, commit, machine, pick_device, save_json
from kernels.patches import detail_weight, patch_bytes, patch_detail

RATIOS = (0.25, 0.5, 0.75, 0.9)


def squared_errors(view, filled, ids, patch):
    """Mean squared error of the bytes of each patch: u8 (B, s, s, 3) twice, ids (B, M) -> (B, M) fp64."""
    true, guess = (patch_bytes(x, ids, patch).double() for x in (view, filled))
    return (true - guess).square().mean(2)


def similarity(view, filled, ids, patch):
    """SSIM of each patch, as squared_errors."""
    from skimage.metrics import structural_similarity

    maps = [
        structural_similarity(a.numpy(), b.numpy(), channel_axis=2, full=True)[1]
        for a, b in zip(view.cpu(), filled.cpu(), strict=True)
    ]
    every = torch.as_tensor(np.stack(maps)).mean(3)  # (B, s, s)
    every = every.unflatten(1, (-1, patch)).unflatten(3, (-1, patch)).mean((2, 4))  # (B, g, g)
    return every.flatten(1).gather(1, ids.cpu())


def kinds_of(view, ids, patch):
    """{kind: which patches are of it, bool (B, M)}."""
    flat = detail_weight(patch_detail(view, ids, patch), 0) < 0.5
    return {"all": torch.ones_like(flat), "flat": flat, "detailed": ~flat}


@torch.no_grad()
def measure(model, split, target_options, ratio):
    """-> {kind: {patches, psnr in dB, ssim, neighbours: {psnr, ssim}}} of the pictures of a split."""
    errors = defaultdict(list)
    alike = defaultdict(list)
    p = model.config["patch_size"]
    for view, ids_keep, ids_mask in masked_views(model, split, EVAL_IMAGES, ratio):
        filled, _ = filled_in(model, target_options, view, ids_keep, ids_mask)
        blurred = neighbours_in(view, ids_keep, ids_mask, p)
        guesses = filled, blurred
        both = torch.stack([squared_errors(view, x, ids_mask, p) for x in guesses], 2)  # (B, M, 2)
        structure = torch.stack([similarity(view, x, ids_mask, p) for x in guesses], 2)
        for kind, members in kinds_of(view, ids_mask, p).items():
            errors[kind].append(both[members])
            alike[kind].append(structure[members])
    rows = {}
    for kind in errors:
        error = torch.cat(errors[kind])  # (patches of the kind, 2)
        if len(error):
            psnr = 10 * torch.log10(255**2 / error.mean(0))
            ssim = torch.cat(alike[kind]).mean(0)
            ours, neighbours = (
                {"psnr": round(a, 3), "ssim": round(b, 3)}
                for a, b in zip(psnr.tolist(), ssim.tolist(), strict=True)
            )
            rows[kind] = {"patches": len(error), **ours, "neighbours": neighbours}
    return rows


@torch.no_grad()
def draw(path, model, split, target_options):
    """One picture in four columns; a row for each ratio."""
    rows = []
    for ratio in RATIOS:
        view, ids_keep, ids_mask = next(masked_views(model, split, 1, ratio))
        filled, _ = filled_in(model, target_options, view, ids_keep, ids_mask)
        p = model.config["patch_size"]
        blurred = neighbours_in(view, ids_keep, ids_mask, p)
        line = view, hide(view, ids_mask, p), filled, blurred
        rows.append((f"{100 * ratio:.0f} % hidden", torch.cat(line)))
    columns = "original", "what is seen", "filled in", "the colour of\nneighbours"
    plots.image_grid(path, "", rows, columns)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="run of pretrain.py")
    add("--data", metavar="DIR", help="packed set (default: that of the run)")
    add("--split", default="val", choices=["val", "dev", "test"], help="of --data")
    add("--out", type=Path, metavar="DIR", help="of the results (default: the run)")
    args = parser.parse_args()
    require("segment", "skimage")
    model, header = load_mae(args.run)
    folder = Path(data.open_or_pack(args.data or flags_of(args.run)["data"]))
    out = args.out or results_folder(args.run, folder, args.split)
    reserve([out / "filled.json", out / "filled.png"])
    target_options = {name: header[name] for name in ("norm_pix", "floor")}
    report = {"command": command(), "machine": machine(pick_device("cpu")), "commit": commit()}
    report |= {"run": Path(args.run).name, "data": str(folder), "split": args.split}
    split = data.open_split(folder, args.split)
    report["by_ratio"] = {str(r): measure(model, split, target_options, r) for r in RATIOS}
    for ratio, kinds in report["by_ratio"].items():
        cells = [
            f"{kind} {row['psnr']:.2f} ({row['neighbours']['psnr']:.2f})"
            for kind, row in kinds.items()
        ]
        print(f"{float(ratio):.0%} hidden, PSNR in dB (that of neighbours): {', '.join(cells)}")
    save_json(report, out / "filled.json")
    draw(out / "filled.png", model, split, target_options)
    print(f"wrote    {out}/filled.json, filled.png")


if __name__ == "__main__":
    cli(main)
