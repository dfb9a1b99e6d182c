"""How well does a network fill in what is hidden? By the share that is hidden, and by kind of patch.

    python -m lab.filled runs/NAME --data datasets/toon

Reads:  runs/NAME/model.safetensors, datasets/NAME
Writes: OUT/filled.json, default runs/NAME/; of other data than the run's, or of another split than val,
        in runs/NAME/DATANAME-SPLIT/

Flat and detailed patches are those to which --flat-weight 0 would give less than half a weight, and the
rest (kernels/patches.py). Beside each PSNR stands that of the mean colour of visible neighbours, which
needs no network. A PSNR is of the mean squared error of all pixels of a kind, and no mean over pictures: a
patch that is filled in exactly has none of its own.
"""

from collections import defaultdict
from pathlib import Path

import torch

import data
from common.checkpoints import flags_of, load_mae
from common.evaluate import EVAL_IMAGES, filled_in, masked_views, neighbours_in
from common.features import results_folder
from common.locks import reserve
from common.train import Parser, cli, command, commit, machine, pick_device, save_json
from kernels.patches import detail_weight, patch_bytes, patch_detail

RATIOS = (0.25, 0.5, 0.75, 0.9)


def squared_errors(view, filled, ids, patch):
    """Mean squared error of the bytes of each patch: u8 (B, s, s, 3) twice, ids (B, M) -> (B, M) fp64."""
    true, guess = (patch_bytes(x, ids, patch).double() for x in (view, filled))
    return (true - guess).square().mean(2)


def kinds_of(view, ids, patch):
    """{kind: which patches are of it, bool (B, M)}."""
    flat = detail_weight(patch_detail(view, ids, patch), 0) < 0.5
    return {"all": torch.ones_like(flat), "flat": flat, "detailed": ~flat}


@torch.no_grad()
def measure(model, split, target_options, ratio):
    """-> {kind: {patches, psnr, neighbours}} of the pictures of a split, in dB; of kinds that they have."""
    errors = defaultdict(list)
    for view, ids_keep, ids_mask in masked_views(model, split, EVAL_IMAGES, ratio):
        p = model.config["patch_size"]
        filled, _ = filled_in(model, target_options, view, ids_keep, ids_mask)
        blurred = neighbours_in(view, ids_keep, ids_mask, p)
        both = [squared_errors(view, guess, ids_mask, p) for guess in (filled, blurred)]
        both = torch.stack(both, 2)  # (B, M, 2)
        for kind, members in kinds_of(view, ids_mask, p).items():
            errors[kind].append(both[members])
    rows = {}
    for kind, parts in errors.items():
        every = torch.cat(parts)  # (patches of the kind, 2)
        if not len(every):
            continue
        ours, neighbours = (10 * torch.log10(255**2 / every.mean(0))).tolist()
        rows[kind] = {"patches": len(every), "psnr": round(ours, 3)}
        rows[kind]["neighbours"] = round(neighbours, 3)
    return rows


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="run of pretrain.py")
    add("--data", metavar="DIR", help="packed set (default: that of the run)")
    add("--split", default="val", choices=["val", "dev", "test"], help="of --data")
    add("--out", type=Path, metavar="DIR", help="of the results (default: the run)")
    args = parser.parse_args()
    model, header = load_mae(args.run)
    folder = Path(data.open_or_pack(args.data or flags_of(args.run)["data"]))
    out = (args.out or results_folder(args.run, folder, args.split)) / "filled.json"
    reserve([out])
    target_options = {name: header[name] for name in ("norm_pix", "floor")}
    report = {"command": command(), "machine": machine(pick_device("cpu")), "commit": commit()}
    report |= {"run": Path(args.run).name, "data": str(folder), "split": args.split}
    split = data.open_split(folder, args.split)
    report["by_ratio"] = {str(r): measure(model, split, target_options, r) for r in RATIOS}
    for ratio, kinds in report["by_ratio"].items():
        cells = [
            f"{kind} {row['psnr']:.2f} ({row['neighbours']:.2f})" for kind, row in kinds.items()
        ]
        print(f"{float(ratio):.0%} hidden, PSNR in dB (that of neighbours): {', '.join(cells)}")
    save_json(report, out)
    print(f"wrote    {out}")


if __name__ == "__main__":
    cli(main)
