"""What breaks it? A probe that was trained on clean features sees corrupted pictures.

    python -m lab.stress runs/NAME
    python -m lab.stress runs/NAME --only cutout,blur

Reads:  runs/NAME (model.safetensors), datasets/NAME
Writes: runs/NAME/stress.json; of other data than the run's, or of another split than val, in
        runs/NAME/DATANAME-SPLIT/
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter

import data
from common import features, metrics
from common.checkpoints import load_encoder
from common.locks import reserve
from common.train import (
    Parser,
    UserError,
    at_least,
    cli,
    command,
    commit,
    machine,
    progress,
    save_json,
    seeded,
)
from finetune_lora import cutout
from ingest.decode import open_picture
from model import POOLS

# ---- corruptions: images u8 (B, S, S, 3), a level, a CPU generator -> u8 (B, S, S, 3) ------------
# Lengths are in pixels of a 128 px picture, and grow with the picture.


def channels_last(x):
    """fp32 (B, 1 or 3, S, S) -> u8 (B, S, S, 3)."""
    x = x.round().clamp(0, 255).to(torch.uint8)
    return x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def luminance(images):
    """-> fp32 (B, 1, S, S)."""
    return (images.float() @ torch.tensor(data.LUMA, device=images.device))[:, None]


def rotation(images, level, generator, factor=1.0):
    """Turned around the centre and enlarged; the border is repeated where nothing is known."""
    a = math.radians(level)
    matrix = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]) / factor
    x = images.permute(0, 3, 1, 2).float()
    at = F.affine_grid(matrix.to(x).expand(len(x), 2, 3), x.shape, align_corners=False)
    # Where a place lies outside, the nearest pixel counts. Metal knew no padding_mode="border" up to torch 2.9, so
    # the places are kept inside, between the centres of the outermost pixels.
    edge = 1 - 1 / x.shape[2]
    at = at.clamp(-edge, edge)
    return channels_last(F.grid_sample(x, at, "bilinear", align_corners=False))


def scale(images, level, generator):
    return rotation(images, 0.0, generator, level)


def blur(images, level, generator):
    """Gaussian of this standard deviation."""
    sigma = level * images.shape[1] / 128
    x = images.cpu().numpy().astype(np.float32)
    x = gaussian_filter(x, (0, sigma, sigma, 0), mode="mirror", truncate=3)
    return torch.from_numpy(x.round().astype(np.uint8)).to(images.device)


def jpeg(images, level, generator):
    result = []
    for picture in images.cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=int(level))
        result.append(np.array(open_picture(file)))
    return torch.from_numpy(np.stack(result)).to(images.device)


def hue(images, level, generator):
    """Colours turned around the gray axis by this angle; the mean of red, green, blue stays."""
    a = math.radians(level)
    turn = torch.full((3, 3), (1 - math.cos(a)) / 3) + math.cos(a) * torch.eye(3)
    turn += math.sin(a) / math.sqrt(3) * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return channels_last((images.float() @ turn.T.to(images.device)).permute(0, 3, 1, 2))


def grayscale(images, level, generator):
    return channels_last(luminance(images))


def line_art(images, level, generator):
    """What is darker than its brightest neighbour, dark on white: lines stay, colour goes."""
    gray = luminance(images)
    return channels_last(255 - 3 * (F.max_pool2d(gray, 3, 1, 1) - gray))


SWEEPS = {  # name: (function, levels, what a level is)
    "cutout": (cutout, (0.1, 0.2, 0.3, 0.4, 0.5), "share of the area"),
    "rotation": (rotation, (10, 20, 45, 90, 180), "degrees"),
    "scale": (scale, (0.5, 0.75, 1.25, 1.5, 2.0), "factor"),
    "blur": (blur, (0.5, 1, 2, 4), "std, px of 128"),
    "jpeg": (jpeg, (75, 50, 25, 10, 5), "quality"),
    "hue": (hue, (15, 30, 60, 120, 180), "degrees"),
    "grayscale": (grayscale, (1,), ""),
    "line art": (line_art, (1,), ""),
}


# ---- the probe -----------------------------------------------------------------------------------


def fit_probe(task):
    """The headline of probe.py on clean features: task.scores(features (n, D)) -> (n, C)."""
    fit, choose, where = features.set_apart_to_choose(task)
    found = features.of_encoder(task.encoder, task)[task.args.pool]
    y = task.train["labels"][fit]
    truth = task.splits[where]["labels"][choose]
    classes = len(task.train["header"]["classes"])
    x = found["train"][fit]
    held = found[where][choose]
    task.scores, _ = metrics.logistic_probe(x, y, held, truth, classes)


@torch.no_grad()
def right_of(task, spoil=None):
    """(n,) bool: which images, corrupted or as they are, the clean probe classifies correctly.

    spoil: images u8 (B, S, S, 3) -> what the encoder sees of them.
    """
    found = []
    for some in task.index.split(data.CHUNK):
        images = data.take(task.split["images"], some, task.device)
        images = spoil(images) if spoil else images
        boxes = data.full_boxes(len(some))
        view = data.view_images(images, *boxes, task.encoder.image_size)
        with task.autocast():
            found.append(features.pooled(task.encoder, view)[task.args.pool].half().cpu())
    return task.scores(torch.cat(found)).argmax(1) == task.split["labels"][task.index]


def percent(right):
    return 100 * right.double().mean().item()


def corrupted(name, level):
    """-> spoil, at this level of a sweep; each level draws its own random numbers."""
    function, levels, _ = SWEEPS[name]
    generator = seeded(0, levels.index(level))
    return lambda images: function(images, level, generator)


def measure(task, names):
    """-> {name: {level: which images are right, (n,) bool}} under these corruptions."""
    found = {}
    for name in progress(names, "robustness", leave=False):
        levels = SWEEPS[name][1]
        found[name] = {str(x): right_of(task, corrupted(name, x)) for x in levels}
    return found


def over_levels(function, found):
    """{name: {level: x}} -> the same with function(x)."""
    return {name: {level: function(x) for level, x in rows.items()} for name, rows in found.items()}


# ---- the command ---------------------------------------------------------------------------------


def lines_of(report):
    """Top-1 under everything, as lines."""
    lines = [f"Top-1, %: clean {report['clean']:.1f}, chance {report['chance']:.1f}"]
    for name, levels in report["robustness"].items():
        cells = "  ".join(f"{level} {x:.1f}" for level, x in levels.items())
        lines.append(f"{name:10} {SWEEPS[name][2]:18} {cells}")
    return lines


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="run folder of pretrain.py")
    add("--data", metavar="DIR", help="packed set (default: what the run was trained on)")
    add("--split", default="val", choices=["val", "dev", "test"], help="split that is measured")
    add("--images", type=at_least(8), default=512, metavar="N", help="at most, evenly spread")
    add("--pool", default=features.HEADLINE, choices=POOLS, help="of the patch tokens")
    add("--only", default=",".join(SWEEPS), metavar="NAMES", help="of these (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(SWEEPS):
        raise UserError(f"--only {', '.join(unknown)} is unknown; there are: {', '.join(SWEEPS)}")
    return args


def open_task(args):
    """features.open_task, with the encoder, and in task.index the images that are shown to it."""
    encoder = load_encoder(args.run)
    task = features.open_task(args, args.run)
    task.args = args
    task.run = Path(args.run)
    task.encoder = encoder.to(task.device).requires_grad_(False)
    task.index = data.evenly_spaced(len(task.split["images"]), args.images)
    task.out = features.results_folder(args.run, task.folder, args.split)
    return task


def main():
    task = open_task(parse_args())
    args = task.args
    out = task.out / "stress.json"
    reserve([out], fix="move it away")
    if not task.labelled:
        raise UserError(f"this needs two classes, and labels on all of {task.folder}")
    report = {"command": command(), "machine": machine(task.device), "commit": commit()}
    report |= {"run": task.run.name, "data": str(task.folder), "split": args.split}
    report["images"] = len(task.index)
    fit_probe(task)
    most_frequent = torch.bincount(task.train["labels"]).argmax()
    report |= {"pool": args.pool, "clean": percent(right_of(task))}
    report["chance"] = percent(task.split["labels"][task.index] == most_frequent)
    found = measure(task, args.only.split(","))
    report["robustness"] = over_levels(percent, found)
    report["right"] = over_levels(metrics.to_bits, found)
    print(*lines_of(report), sep="\n")
    save_json(report, out)
    print(f"wrote    {out}")


if __name__ == "__main__":
    cli(main)
