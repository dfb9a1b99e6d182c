"""Stage 8: where are the faces? Learn it from pages with boxes, and find them in any picture.

    python detect.py weights/toon --data datasets/scenes
    # outlines; --crop: faces, which data.py reads
    python detect.py runs/NAME-det PICTURE... --out found

Reads:  an encoder; datasets/NAME with boxes: python data.py scenes draws such a set, data.py PATH
        --detect packs one
Writes: runs/NAME-det/ detector.safetensors, state.pt (what a resumed run needs), log.jsonl,
metrics.json,
        precision.png, pages.png; with pictures a JSON line for each on standard output

The network and its loss are in common/detection.py. It learns from crops of pages, which are larger
in the last epochs, and is asked about whole pages; its choices (the threshold) are made on dev.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import contextlib
import io
import itertools
import json
import shlex
import sys
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from common import distributed, train
from common.checkpoints import blank_encoder, load_encoder, load_exactly, resize_positions
from common.command import (
    Parser,
    at_least,
    between,
    claim,
    cli,
    command,
    drawing,
    progress,
    refuse_file,
    refuse_overwrite,
    refuse_unused,
)
from common.features import name_of, open_splits, split_suffix, untrained_like
from common.fields import (
    ANYTHING,
    ENCODER,
    EPSILON,
    SIDE,
    TEXT,
    check_encoder,
    check_fields,
    number,
    table_of,
)
from common.io import (
    UserError,
    atomic,
    read_header,
    read_json,
    read_safetensors,
    save_json,
    save_safetensors,
)
from common.lora import add_lora, fingerprint, merge_lora, remove_lora
from ingest.pictures import tell_problems, whole_pictures
from kernels.gather import masked_patch_gather
from model import shape_of

LOG_EVERY, CLIP, CHUNK = 10, 1.0, 16  # steps, norm of the gradient, pages at a time
RATES = {"lora": 2e-3, "full": 1e-3, "linear": 2e-3}  # peak learning rates
RESULTS = ("metrics*.json", "detector.safetensors", "precision*.png", "pages*.png")
NO_CONFIG = (
    "out",
    "resume",
    "given",
    "log",
    "device",
    "eval_on",
    "encoder",
    "pictures",
    "crop",
    "margin",
    "threshold",
    "side",
)
WIDTH = 96  # of the maps
BOUNDS = (0, 4, 8, 1e9)  # sides of a level's boxes, sqrt(w * h), in patches
NARROW = 0.54 / 6  # std of a box's Gaussian, by its side
OFF = 5.0  # weight of the error of the sides, beside 1 - GIoU
LEAST = 4  # pixels: smaller boxes of a view are not asked for
# room around a face that is cut out, as a share of its longer side: so names are found best, on dev
MARGIN = 0.2
REMEDY = "python detect.py ENCODER makes it"
FIELDS = {
    "detector": {"encoder": ENCODER, "norm_eps": EPSILON},
    "page": SIDE,
    "threshold": number(-1, 2),
    "base?": TEXT,
    "run?": table_of(ANYTHING),
}
MOST, OVERLAP = 100, 0.5  # answers of a picture, IoU of two answers for one face
SMALL = 24  # pixels: what counts as small among mistakes


class Detector(nn.Module):
    """An encoder, a pyramid of three maps, and one head for all of them. `config` is for `blank`."""

    def __init__(self, encoder):
        super().__init__()
        shape = shape_of(encoder)
        self.config, dim = {"encoder": shape, "norm_eps": encoder.norm.eps}, shape["dim"]
        self.encoder, self.patch = encoder, encoder.patch_size
        self.maps = nn.ModuleList(
            [
                nn.ConvTranspose2d(dim, WIDTH, 2, 2),
                nn.Conv2d(dim, WIDTH, 1),
                nn.Conv2d(dim, WIDTH, 2, 2),
            ]
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, WIDTH) for _ in self.maps)
        blocks = [
            (nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.GELU())
            for _ in range(2)
        ]
        self.tower = nn.Sequential(*(layer for block in blocks for layer in block))
        self.out = nn.Conv2d(WIDTH, 5, 3, padding=1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.constant_(self.out.bias, 0.0)
        nn.init.constant_(self.out.bias[:1], -4.6)  # a hundredth of the cells is a centre

    def tokens(self, view, corner=(0, 0)):
        """view u8 (B, S, S, 3) -> patch tokens (B, D, g, g). corner: the patch of the encoder's
        grid it begins at.
        """
        g, side = view.shape[1] // self.patch, self.encoder.side
        y, x = (
            i.to(view.device)
            for i in torch.meshgrid(torch.arange(g), torch.arange(g), indexing="ij")
        )
        pos, ids = None, (y + corner[0]) * side + x + corner[1]
        if g > side:  # a larger view than it was trained for: its positions lie closer together
            pos, ids = resize_positions(self.encoder.pos_embed, g), y * g + x
        here, ids = ((i.flatten().expand(len(view), -1).contiguous()) for i in (y * g + x, ids))
        tokens = self.encoder(masked_patch_gather(view, here, self.patch), ids, pos)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (g, g))

    def forward(self, view, corner=(0, 0)):
        """view u8 (B, S, S, 3) -> heat logits (B, N) and boxes (B, N, 4), x1, y1, x2, y2 in pixels,
        fp32.
        """
        tokens, found = self.tokens(view, corner), []
        for level, (to_map, norm) in enumerate(zip(self.maps, self.norms, strict=True)):
            stride = self.patch * 2**level // 2
            out = self.out(self.tower(norm(to_map(tokens)))).float().flatten(2)
            reach = 3 * stride * out[:, 1:].clamp(-5, 5).exp()
            centre = cells(out.shape[2], stride, view.device)
            found.append(
                (out[:, 0], torch.cat([centre - reach[:, :2].mT, centre + reach[:, 2:].mT], 2))
            )
        return tuple(torch.cat(x, 1) for x in zip(*found, strict=True))


def cells(n, stride, device):
    """-> (n, 2): x, y of the middle of each cell of a square map."""
    place = (torch.arange(round(n**0.5), device=device) + 0.5) * stride
    y, x = torch.meshgrid(place, place, indexing="ij")
    return torch.stack([x, y], 2).flatten(0, 1)


def header_of(path):
    """The header of a detector's file, without its weights."""
    header = read_header(path, REMEDY)[1]
    check_fields(header, FIELDS, path, REMEDY)
    return header


def load(path):
    """A run of detect.py, or its detector.safetensors -> the network, and its header."""
    path = Path(path) / "detector.safetensors" if Path(path).is_dir() else Path(path)
    weights, header = read_safetensors(path, REMEDY)
    check_fields(header, FIELDS, path, REMEDY)
    shape = header["detector"]["encoder"]
    check_encoder(weights, shape, path, REMEDY, "encoder.")
    net = Detector(blank_encoder(shape, header["detector"]["norm_eps"]))
    load_exactly(net, weights, path)
    return net.eval(), header


# ---- what is learned -----------------------------------------------------------------------------


def targets(boxes, S, patch):
    """boxes (B, K, 4) in pixels of views -> heat (B, N), box of each cell (B, N, 4), its weight (B,
    N).

    A box stands on the level of its size: a Gaussian around its centre, which weighs 1 in all.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    size, middle, there = sides.prod(2).sqrt(), boxes[..., :2] + sides / 2, sides.amin(2) >= LEAST
    parts = []
    for level, (low, high) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        stride = patch * 2**level // 2
        centre = cells((S // stride) ** 2, stride, boxes.device)
        own = there & (size >= low * patch) & (size < high * patch)
        away = (centre - middle[:, :, None]) / (NARROW * sides[:, :, None] + 1e-6)  # (B, K, n, 2)
        bell = (-0.5 * away.square().sum(3)).exp() * own[:, :, None]
        nearest = (centre - middle[:, :, None]).abs().amax(
            3
        ) <= stride / 2  # the cell that holds the centre
        parts.append(torch.where(nearest & own[:, :, None], 1.0, bell))
    bell = torch.cat(parts, 2)
    heat, who = bell.max(1)
    weight = heat / bell.sum(2).clamp(min=1e-6).gather(1, who)
    return heat, boxes.gather(1, who[..., None].expand(-1, -1, 4)), weight * (heat > 0.05)


def giou(a, b):
    """Boxes (..., 4) -> generalised IoU (Rezatofighi et al. 2019), (...)."""

    def area(x):
        return (x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1)

    both = torch.cat(
        [torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1
    )
    hull = torch.cat(
        [torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1
    )
    union = (area(a) + area(b) - area(both)).clamp(min=1e-6)
    return area(both) / union - 1 + union / area(hull).clamp(min=1e-6)


def loss_of(logits, said, boxes, S, patch):
    """Focal loss of the heat; of each box 1 - GIoU and OFF times the error of its sides, by its
    size -> a number.
    """
    heat, true, weight = targets(boxes, S, patch)
    p, peak = logits.sigmoid().clamp(1e-4, 1 - 1e-4), heat == 1
    focal = torch.where(peak, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
    size = (true[..., 2:] - true[..., :2]).clamp(min=1).mean(2)
    off = (said - true).abs().mean(2) / size
    found = weight * (1 - giou(said, true) + OFF * off)
    return (found.sum() - focal.sum()) / peak.sum().clamp(min=1)


# ---- answers -------------------------------------------------------------------------------------


@torch.no_grad()
def detect(net, view):
    """view u8 (B, S, S, 3) -> list of (boxes (k, 4) in shares of the view, scores (k,)), the surest
    first.
    """
    logits, boxes = net(view)
    S, scores = view.shape[1], logits.sigmoid()
    kept, at = [], 0
    for level in range(len(net.maps)):
        g = S // (net.patch * 2**level // 2)
        heat, said = (
            x[:, at : at + g * g].mT.unflatten(2, (g, g)) for x in (scores[..., None], boxes)
        )
        kept.append(
            (F.max_pool2d(heat, 3, 1, 1) == heat).flatten(1)
        )  # a cell that is no peak of its map is no centre
        near = F.avg_pool2d(heat**2 * said, 3, 1, 1) / F.avg_pool2d(heat**2, 3, 1, 1).clamp(
            min=1e-12
        )
        boxes[:, at : at + g * g] = near.flatten(
            2
        ).mT  # the mean of a cell and its neighbours, the surest most
        at += g * g
    answers = []
    for p, where, peak in zip(scores, boxes.clamp(0, S) / S, torch.cat(kept, 1), strict=True):
        best = torch.where(peak, p, 0).topk(min(MOST, int(peak.sum()))).indices
        best = best[((where[best, 2:] - where[best, :2]) > 0).all(1)]
        best = best[suppress(where[best])]
        answers.append((where[best].cpu(), p[best].cpu()))
    return answers


def suppress(boxes):
    """Boxes (k, 4), the surest first -> indices of those that stay: no surer one covers the same
    (NMS).
    """
    left, stay = torch.arange(len(boxes), device=boxes.device), []
    while len(left):
        stay.append(left[0])
        left = left[1:][iou(boxes[left[0]], boxes[left[1:]]) < OVERLAP]
    return torch.stack(stay) if stay else left


def iou(a, b):
    """Boxes (..., 4) and (..., 4), broadcast -> IoU (...)."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = sum((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b))
    return both / (areas - both).clamp(min=1e-9)


# ---- any picture ---------------------------------------------------------------------------------


def squared(picture, side, patch):
    """Picture u8 (H, W, 3) -> (1, S, S, 3) for the network, S a multiple of two patches, and its
    share of S (2).
    """
    S, (h, w) = max(1, round(side / (2 * patch))) * 2 * patch, picture.shape[:2]
    size = [max(1, round(x * S / max(h, w))) for x in (w, h)]
    page = Image.new("RGB", (S, S), (128, 128, 128))
    page.paste(Image.fromarray(picture).resize(size, Image.BICUBIC, reducing_gap=2.0))
    return torch.from_numpy(np.array(page))[None], torch.tensor([w, h]) / max(h, w)


def faces_of(net, picture, side, threshold):
    """Picture u8 (H, W, 3), its longer side made `side` -> boxes (k, 4) in its pixels, scores (k,),
    left to right.
    """
    view, share = squared(picture, side, net.patch)
    boxes, scores = detect(net, view.to(net.out.weight.device))[0]
    sure = scores >= threshold
    edge = torch.tensor([picture.shape[1], picture.shape[0]] * 2)
    boxes, scores = (boxes[sure] / share.repeat(2)).clamp(0, 1) * edge, scores[sure]
    inside = (
        (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
    )  # and not in what fills up the square
    order = inside[boxes[inside, 0].argsort()]
    return boxes[order], scores[order]


def cut_out(picture, box, margin, size=None):
    """The square around a box, u8 (s, s, 3), resized to `size`: outside of the picture its border
    is repeated.
    """
    x1, y1, x2, y2 = box
    half = max(1.0, max(x2 - x1, y2 - y1) * (0.5 + margin))
    left, top, side = round((x1 + x2) / 2 - half), round((y1 + y2) / 2 - half), round(2 * half)
    rows, columns = (
        (np.arange(side) + start).clip(0, most - 1)
        for start, most in zip((top, left), picture.shape, strict=False)
    )
    square = Image.fromarray(picture[rows][:, columns])
    return np.array(
        square.resize((size, size), Image.BICUBIC, reducing_gap=2.0) if size else square
    )


# ---- how good they are ---------------------------------------------------------------------------


def needs_pycocotools():
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise UserError(
            "detectors are judged by pycocotools: pip install -r requirements-detect.txt"
        ) from None


def coco(answers, truth, side):
    """answers as `detect` gives them, truth list of (k, 4) in shares, side of a picture in pixels
    -> pycocotools' row.

    AP over IoU .5 to .95, AP50, AP75, AP and AR by size (small: under 32 x 32 pixels, large: over
    96 x 96), in percent; with the precision at IoU .5 for 101 recalls.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(i, boxes, **more):
        for x1, y1, x2, y2 in (np.asarray(boxes, float) * side).tolist():
            w, h = x2 - x1, y2 - y1
            yield {
                "image_id": i,
                "category_id": 1,
                "bbox": [x1, y1, w, h],
                "area": w * h,
                "iscrowd": 0,
            } | more

    said = [
        row | {"score": s}
        for i, (boxes, scores) in enumerate(answers)
        for row, s in zip(rows(i, boxes), scores.tolist(), strict=True)
    ]
    true, sets = [row for i, boxes in enumerate(truth) for row in rows(i, boxes)], []
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        for found in (true, said):
            one = COCO()
            one.dataset = {
                "images": [{"id": i} for i in range(len(truth))],
                "categories": [{"id": 1}],
                "annotations": [row | {"id": n} for n, row in enumerate(found, 1)],
            }
            one.createIndex()
            sets.append(one)
        judged = COCOeval(*sets, "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    names = (
        "ap",
        "ap50",
        "ap75",
        "ap_small",
        "ap_medium",
        "ap_large",
        "ar_1",
        "ar_10",
        "ar",
        "ar_small",
        "ar_medium",
        "ar_large",
    )
    row = {
        name: round(100 * x, 2) if x >= 0 else None
        for name, x in zip(names, judged.stats.tolist(), strict=True)
    }
    return row, np.maximum(judged.eval["precision"][0, :, 0, 0, -1], 0).round(4).tolist()


def mistakes(answers, truth, threshold, side):
    """Answers over the threshold at IoU .5 -> counts: right, double, off (IoU .1 to .5),
    background; and missed faces.

    Missed are small ones (under SMALL pixels), those at the border or behind another one
    ("covered"), and others.
    """
    count = dict.fromkeys(
        ("right", "double", "off", "background", "missed_small", "missed_covered", "missed"), 0
    )
    for (boxes, scores), true in zip(answers, truth, strict=True):
        overlap, taken = iou(boxes[:, None], true[None]), torch.zeros(len(true), dtype=torch.bool)
        for row in overlap[scores >= threshold]:
            free, most = row.masked_fill(taken, 0), max(row, default=0)
            if max(free, default=0) >= 0.5:
                count["right"] += 1
                taken[free.argmax()] = True
            else:
                count["double" if most >= 0.5 else "off" if most >= 0.1 else "background"] += 1
        for i in (~taken).nonzero()[:, 0]:
            small = (true[i, 2:] - true[i, :2]).min() * side < SMALL
            others = torch.cat([true[:i], true[i + 1 :]])
            covered = (
                true[i].min() < 0.01 or true[i].max() > 0.99 or (iou(true[i], others) > 0.05).any()
            )
            count["missed_small" if small else "missed_covered" if covered else "missed"] += 1
    return count


def best_threshold(answers, truth):
    """The score with the best F1 at IoU .5: where as little as possible is missed and made up."""
    levels, best = torch.linspace(0.1, 0.9, 33), []
    for level in levels.tolist():
        n = mistakes(answers, truth, level, 1)
        wrong = sum(n.values()) - n["right"]
        best.append(2 * n["right"] / max(1, 2 * n["right"] + wrong))
    return round(levels[int(np.argmax(best))].item(), 3)


# ---- flags --------------------------------------------------------------------------------------


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="runs/NAME, or a checkpoint of MAE, DINO, timm or HF; "
        "to use what was learned runs/NAME-det",
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="file, folder, archive")
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add(
        "--data",
        metavar="DIR",
        help="set with boxes: python data.py scenes makes one (default: datasets/scenes)",
    )
    add(
        "--boxes",
        default="boxes",
        choices=["boxes", "heads"],
        help="faces, or heads with hair and hats",
    )
    add(
        "--out",
        metavar="DIR",
        help="run folder (default: the encoder's and det); of pictures, a folder for them",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint",
    )
    add("--eval-on", default="val", choices=["val", "test", "dev"], help="split that is reported")
    add = parser.add_argument_group("how").add_argument
    add(
        "--method",
        default="full",
        choices=RATES,
        help="of the encoder: frozen (linear), low-rank, everything",
    )
    add(
        "--from-scratch",
        action="store_true",
        help="control: the encoder begins with random weights",
    )
    add(
        "--page",
        type=between(32, 4096, int),
        metavar="PX",
        help="side of whole pages (default: 1.75 times --view)",
    )
    add(
        "--view",
        type=between(16, 4096, int),
        default=128,
        metavar="PX",
        help="side of crops, in pixels",
    )
    add("--epochs", type=at_least(1), default=16, help="passes over the pages")
    add(
        "--late",
        type=between(0, 1),
        default=0.25,
        metavar="SHARE",
        help="of the epochs, the last ones: crops are nearly whole pages",
    )
    add("--batch-size", type=at_least(1), default=16, metavar="B", help="crops of a step")
    add(
        "--lr",
        type=between(0, 1),
        help="peak learning rate (default: lora 2e-3, linear 2e-3, full 1e-3)",
    )
    add(
        "--mosaic",
        type=between(0, 1),
        default=0.3,
        metavar="SHARE",
        help="of the steps whose crops show four pages",
    )
    add(
        "--colour",
        type=between(0, 1),
        default=0.3,
        metavar="X",
        help="brightness, contrast, saturation times 1 +- X",
    )
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation")
    add = parser.add_argument_group("what is done with pictures").add_argument
    add("--crop", action="store_true", help="write each face as a picture of its own")
    add(
        "--margin",
        type=between(0, 3),
        default=MARGIN,
        help="room around a cropped face, as a share of it",
    )
    add(
        "--threshold",
        type=between(0, 1),
        metavar="SCORE",
        help="of an answer, at least (default: dev's best)",
    )
    add(
        "--side",
        type=between(32, 4096, int),
        metavar="PX",
        help="pictures are resized to it (default: as trained)",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    add(
        "--log",
        type=train.trackers,
        default=(),
        metavar="NAMES",
        help="tensorboard,wandb beside log.jsonl",
    )
    return parser.parse_intermixed_args()


def refuse_flags(args):
    training = not args.pictures
    refuse_unused(
        args,
        (
            (
                "data boxes resume eval-on method from-scratch page view epochs late "
                "batch-size lr mosaic colour seed log",
                training,
                "is for training, not for pictures",
            ),
            (
                "crop margin threshold side",
                not training,
                "is for pictures: python detect.py runs/NAME-det PICTURE",
            ),
            ("margin", args.crop, "is for --crop"),
        ),
    )
    if args.from_scratch and args.method != "full":
        raise UserError(
            f"--from-scratch trains all weights; with --method {args.method} they would stay random: "
            "give --method full"
        )


# ---- the data ------------------------------------------------------------------------------------


def open_task(args, device, autocast):
    """-> what a run works with, a namespace."""
    task, splits = (
        SimpleNamespace(args=args, device=device, autocast=autocast),
        open_splits(args.data, args.eval_on),
    )
    train_split, task.report = splits["train"], splits[args.eval_on]
    rows = torch.arange(len(train_split["images"]))
    apart = torch.from_numpy(
        data.hold_apart(data.groups_of(train_split), np.zeros(len(rows)), data.APART)
    )
    task.rows = rows if "dev" in splits else rows[~apart]
    task.train, task.dev = (
        train_split,
        (splits["dev"], None) if "dev" in splits else (train_split, rows[apart]),
    )
    parts = {"train": (train_split, task.rows), "dev": task.dev, args.eval_on: (task.report, None)}
    for name, (split, some) in parts.items():
        if args.boxes not in split or (boxes_of(split, args.boxes, some) < 0).all():
            raise UserError(
                f"{args.data} has no {args.boxes} on pages of {name}; python data.py scenes draws pages "
                "with some, python data.py PATH --detect packs your own"
            )
    two = 2 * load_encoder(args.encoder)[0].patch_size  # a cell of the coarsest map
    task.page = args.page or args.view * 7 // 4 // two * two
    if args.view > task.page:
        raise UserError(
            f"--view {args.view} is larger than the pages of {task.page} px; give at most that"
        )
    if args.view % two or task.page % two:
        raise UserError(
            f"--view {args.view} and pages of {task.page} px must be multiples of {two}, two patches of "
            f"{args.encoder}"
        )
    task.late = max(
        args.view, task.page * 6 // 7 // two * two
    )  # side of the crops of the last epochs
    task.encoder, _ = load_encoder(args.encoder, task.page)
    config = {k: v for k, v in vars(args).items() if k not in NO_CONFIG}
    task.config = config | {
        "encoder": fingerprint(task.encoder),
        "images": data.fingerprint(train_split),
        "truth": blake2b(np.array(train_split[args.boxes]), digest_size=6).hexdigest(),
    }
    return task


def boxes_of(split, name, rows):
    """-> (n, K, 4) fp32, in shares of the pages; -1 fills up. rows: None takes all."""
    return torch.from_numpy(np.array(split[name] if rows is None else split[name][rows.numpy()]))


def crops(args, images, boxes, generator, side, least, most=1.0):
    """Pages u8 (B, ., ., 3), boxes (B, K, 4) in shares -> crops u8 (B, side, side, 3), boxes in
    their pixels.

    Crops have a share of `least` to `most` of the page's side; boxes of which little is left are
    taken out.
    """
    share = least + (most - least) * torch.rand(len(images), 1, generator=generator)
    corner = torch.rand(len(images), 2, generator=generator) * (1 - share)  # top, left
    flip = torch.rand(len(images), generator=generator) < 0.5
    view = data.view_images(images, torch.cat([corner, share, share], 1), flip, side)
    draws = torch.rand(len(images), 3, generator=generator)
    origin = corner.flip(1).repeat(1, 2)[:, None]
    there, moved = boxes[..., :1] >= 0, (boxes - origin) / share[:, None]
    mirrored = torch.stack([1 - moved[..., 2], moved[..., 1], 1 - moved[..., 0], moved[..., 3]], 2)
    moved = torch.where(flip[:, None, None], mirrored, moved)
    left = moved.clamp(0, 1)
    kept = there[..., 0] & (
        (left[..., 2:] - left[..., :2]).prod(2) > 0.3 * (moved[..., 2:] - moved[..., :2]).prod(2)
    )
    return data.jitter_colour(view, draws, args.colour), torch.where(
        kept[..., None], left * side, -1.0
    )


def mosaic(args, images, boxes, generator, side, least):
    """The same, each crop of four pages: the batch's, one further in each corner."""
    half, views, found = side // 2, [], []
    for turn, (y, x) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
        view, own = crops(
            args, images.roll(turn, 0), boxes.roll(turn, 0), generator, half, 0.7 * least, 0.7
        )
        views.append(view)
        found.append(torch.where(own >= 0, own + torch.tensor([x, y, x, y]), own))
    rows = torch.cat(views[:2], 2), torch.cat(views[2:], 2)
    return torch.cat(rows, 1), torch.cat(found, 1)


# ---- a run ---------------------------------------------------------------------------------------


def build(task):
    """-> the network on the device, and its optimizer."""
    args, encoder = task.args, task.encoder
    torch.manual_seed(args.seed)
    if args.from_scratch:
        encoder = untrained_like(encoder, args.seed)
    encoder.requires_grad_(args.method == "full")
    if args.method == "lora":
        add_lora(encoder)
    net = Detector(encoder).to(task.device)
    return net, train.make_optimizer(net, args.lr, 0.05, (0.9, 0.999))


def learn(task, net, optimizer, state, log):
    """Train for --epochs, or what `state` leaves of them -> seconds."""
    args, out, n = task.args, Path(task.args.out), len(task.rows)
    B = min(args.batch_size, n)
    per_epoch, step, seconds = n // B, 0, 0.0
    if "model" in state:
        with train.taking_up(out / "state.pt"):
            load_exactly(net, state["model"], out / "state.pt")
            train.load_optimizer(optimizer, state["optimizer"])
            step, seconds = state["step"], state["seconds"]
    late, total = round((1 - args.late) * args.epochs), args.epochs * per_epoch
    images = data.resident(task.train, task.device)
    stop_signal, meter, pacer = (
        train.catch_signals(),
        train.Meter(B, task.device, seconds),
        train.Pacer(),
    )

    def save():
        train.save_state(
            {
                "config": task.config,
                "model": net.state_dict(),
                "step": step,
                "seconds": meter.seconds(),
                "optimizer": optimizer.state_dict(),
            },
            out / "state.pt",
        )

    bar = progress(total=total, initial=step, unit="step")
    for epoch in range(step // per_epoch, args.epochs):
        order = task.rows[data.epoch_order(n, args.seed, epoch)]
        for rows, pages in meter.timed(
            data.batches(images, order, B, task.device, step % per_epoch)
        ):
            loss = step_loss(
                task, net.train(), rows, pages, epoch >= late, train.seeded(args.seed, epoch, step)
            )
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            train.set_lr(optimizer, train.lr_at(step, total, 0.1 * total, args.lr))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            meter.add(loss.detach(), grad_norm)
            stop = stop_signal[0] if stop_signal else 0
            if step % LOG_EVERY == 0 or step == total or stop:
                row = meter.row(step, f"try a smaller --lr than {args.lr:g}")
                log(step=step, epoch=round(step / per_epoch, 3), **row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if stop or step == total or pacer.due():
                pacer.time(save)
                meter.restart()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    return meter.seconds()


def step_loss(task, net, rows, pages, late, generator):
    """The loss of a batch of crops; a crop stands at some place of the encoder's grid, as crops of
    whole pages do.
    """
    args, boxes = task.args, boxes_of(task.train, task.args.boxes, rows)
    cut = mosaic if torch.rand(1, generator=generator) < args.mosaic else crops
    side, least = (task.late, 0.7) if late else (args.view, 0.5)
    view, boxes = cut(args, pages, boxes, generator, side, least)
    room = (task.page - side) // net.patch + 1
    corner = torch.randint(room, (2,), generator=generator).tolist()
    with task.autocast():
        logits, said = net(view, corner)
    return loss_of(logits, said, boxes.to(task.device), side, net.patch)


def write_results(task, net, seconds):
    """-> the row of metrics.json: how good it is on the reported split, by a threshold of dev; and
    the answers there.
    """
    args, out = task.args, Path(task.args.out)
    answers, truth = judge(task, net, *task.dev)
    threshold = best_threshold(answers, truth)
    answers, truth = judge(task, net, task.report, None)
    side = task.report["images"].shape[1]  # sizes of faces are told in pixels of the packed pages
    row, precision = coco(answers, truth, side)
    row = {
        "run": out.name,
        "seed": args.seed,
        "data": args.data,
        "evaluated_on": args.eval_on,
    } | row
    row |= {
        "threshold": threshold,
        "mistakes": mistakes(answers, truth, threshold, side),
        "precision": precision,
        "pages": len(truth),
        "faces": sum(map(len, truth)),
        "seconds": round(seconds, 1),
        "config": task.config,
        "command": command(),
        "machine": train.machine(task.device),
        "commit": train.commit(),
    }
    return row, answers


def draw(task, row, answers):
    """precision.png, and pages.png: pages of the reported split with outlines."""
    from common import plots
    from ingest.toon import write_sheet

    args, out = task.args, Path(task.args.out)
    suffix = split_suffix(args.eval_on)
    title = f"{out.name} on {args.eval_on} of {Path(args.data).name}"
    plots.plot_precision(out / f"precision{suffix}.png", row["precision"], row, title)
    pages = [
        outlined(np.array(task.report["images"][i]), answers[i], row["threshold"])
        for i in data.evenly_spaced(len(answers), 8).tolist()
    ]
    write_sheet(out / f"pages{suffix}.png", pages, 2, 4, task.page)


def judge(task, net, split, rows):
    """-> answers and truth of pages, lists in the order of rows."""
    every, answers = torch.arange(len(split["images"])) if rows is None else rows, []
    net.eval()
    for some in progress(every.split(CHUNK), "judging"):
        view = data.view_images(
            data.take(split["images"], some, task.device), *data.full_boxes(len(some)), task.page
        )
        with task.autocast():
            answers += detect(net, view)
    return answers, [own[own[:, 0] >= 0] for own in boxes_of(split, task.args.boxes, rows)]


def outlined(page, answer, threshold):
    from ingest.scenes import outlined as draw

    boxes, scores = answer
    return draw(page, boxes[scores >= threshold].numpy())


def run(args, device, autocast):
    """A run from its beginning to metrics.json -> what stands there. What is finished is only read."""
    task, out = open_task(args, device, autocast), Path(args.out)
    state, finished = (
        train.open_run(out, task.config, args.resume, RESULTS) or {},
        out / f"metrics{split_suffix(args.eval_on)}.json",
    )
    out.mkdir(parents=True, exist_ok=True)
    if state and finished.exists():
        print(f"run      {out} is finished")
        return read_json(finished)
    log = train.Log(out / "log.jsonl", state.get("step", -1), args.log, task.config)
    net, optimizer = build(task)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(
        f"data     {args.data}: {len(task.rows)} pages of {task.page} px, crops of {args.view}, late {task.late} px\n"
        f"run      {out}: {args.method}, {count:,} parameters trained, {args.epochs} epochs, rate {args.lr:g}"
    )
    seconds = learn(task, net, optimizer, state, log)
    if args.method == "lora":  # the file is a plain network
        merge_lora(net.encoder)
        remove_lora(net.encoder)
    row, answers = write_results(task, net, seconds)
    header = {
        "detector": net.config,
        "base": args.encoder,
        "page": task.page,
        "threshold": row["threshold"],
        "run": task.config,
    }
    save_safetensors(net.state_dict(), out / "detector.safetensors", header)
    save_json(row, finished)
    with drawing("precision.png or pages.png"):
        draw(task, row, answers)
    log.pictures()
    wrong = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in row["mistakes"].items())
    print(
        f"{args.eval_on:<9}AP {row['ap']:.1f}, AP50 {row['ap50']:.1f}, AP75 {row['ap75']:.1f} %; "
        f"{row['faces']} faces on {row['pages']} pages\nanswers  {wrong}, at a score of {row['threshold']:g}\n"
        f"wrote    {out}/ after {seconds:.0f} s\nnext: python detect.py {shlex.quote(str(out))} PICTURE --out found"
    )
    return row


# ---- use -----------------------------------------------------------------------------------------


def use(args, device, autocast):
    """A JSON line for each picture; --out: the pictures with outlines, or, by --crop, the faces."""
    net, header = load(args.encoder)
    net, threshold = (
        net.to(device),
        header["threshold"] if args.threshold is None else args.threshold,
    )
    if args.crop and not args.out:
        raise UserError("--crop writes pictures; --out DIR says where")
    if args.out:
        claim([], Path(args.out) / ".lock")
    problems, count, taken = [], 0, set()
    for key, picture in whole_pictures(args.pictures, problems):
        with autocast():
            boxes, scores = faces_of(net, picture, args.side or header["page"], threshold)
        count += 1
        print(
            json.dumps(
                {
                    "picture": key,
                    "width": picture.shape[1],
                    "height": picture.shape[0],
                    "faces": [
                        {"box": [round(x) for x in box], "score": round(score, 3)}
                        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
                    ],
                },
                ensure_ascii=False,
            )
        )
        if args.out:
            write_pictures(args, own_name(key, taken), picture, boxes)
    tell_problems(problems, count, False)
    if args.out:
        print(f"wrote    {args.out}/ of {count} pictures", file=sys.stderr)


def own_name(key, taken):
    """A picture's folder and name, with a number where another one's is the same -> what its
    results are called.
    """
    name = "-".join(part for part in Path(key).with_suffix("").parts[-2:] if part.strip("./"))
    own = next(
        n
        for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        if n not in taken
    )
    taken.add(own)
    return own


def write_pictures(args, name, picture, boxes):
    """The picture with outlines, or, by --crop, its faces."""
    from ingest.scenes import outlined as draw

    shown = {
        name: draw(picture, boxes.numpy() / np.array([picture.shape[1], picture.shape[0]] * 2))
    }
    if args.crop:
        shown = {
            f"{name}_{i}": cut_out(picture, box, args.margin)
            for i, box in enumerate(boxes.tolist())
        }
    for stem, pixels in shown.items():
        path = Path(args.out) / f"{stem}.png"
        refuse_overwrite([path])
        with atomic(path) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG")


def main():
    args = parse_args()
    refuse_flags(args)
    device = train.pick_device(args.device)
    dtype, dtype_reason = train.pick_dtype(args.dtype, device)
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    if not args.pictures and args.out is None:
        args.out = f"runs/{name_of(args.encoder)}-det{f'-s{args.seed}' if args.seed else ''}"
    if args.out is not None:
        refuse_file(args.out)
    autocast = train.autocast_of(device, dtype)
    if args.pictures:
        return use(args, device, autocast)
    args.lr = RATES[args.method] if args.lr is None else args.lr
    needs_pycocotools()  # said now, not after the training
    print(f"machine  {train.machine(device)}\n         {args.dtype}: {dtype_reason}")
    load_encoder(args.encoder)  # what is wrong with it is said before a data set is made
    args.data = str(data.open_or_pack(args.data or "datasets/scenes"))
    run(args, device, autocast)


if __name__ == "__main__":
    cli(main)
