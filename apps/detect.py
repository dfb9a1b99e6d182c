"""Stage 8: find the faces on a page. Train a detector on pages with boxes; use it on any picture.

    python -m apps.detect weights/toon --data datasets/scenes
    python -m apps.detect weights/toon-det --data datasets/pages   goes on from a detector, on other pages
    python -m apps.detect runs/NAME-det PICTURE... --out found     outlines; --crop, --largest: faces, for data.py

weights/toon-det has learned from pages that a program drew. On real art it takes a skirt or a lone eye for a
face, too: a detector that knows real art needs other data than ours, such as twenty pages of yours with boxes
(docs/detect.md). So look at what it cuts out, before anything is learned from it.

Reads:  an encoder, or a detector; a set with boxes (python data.py scenes draws one, python data.py
        PATH --detect packs others)
Writes: runs/NAME-det/ with detector.safetensors, state.pt, log.jsonl, metrics.json; for pictures
        a JSON line each on standard output, and with --crop or --largest also OUT/crops.html

A plain ViT is enough for detection (ViTDet, Li et al. 2022, arXiv:2203.16527). Its last tokens
become maps with cells of half, once and twice the patch's side. Each cell has the score of a
centre, with CenterNet's focal loss (Zhou et al. 2019, arXiv:1904.07850). It also has the distances
to the four sides of a box, with weights after TTFNet (Liu et al. 2020, arXiv:1909.00700).
Shapes: B batch, S side of a view in pixels, g its patches on a side, D width of the encoder, K boxes
of a view (-1 fills up), N cells of all maps, n of one map, k answers, H, W sides of a picture.
"""

import contextlib
import io
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from common import train
from common.checkpoints import file_of, load_encoder, model_file, resize_positions
from common.door import require, shown
from common.features import name_of, open_splits, set_apart, split_suffix, untrained_like
from common.train import Parser, UserError, at_least, between, cli, refuse_useless
from finetune_lora import add_lora, merge_lora
from kernels.patches import all_places, masked_patch_gather
from model import ViT

RATES = {"full": 1e-3, "lora": 2e-3, "linear": 2e-3, "scratch": 1e-3}  # linear has LoRA's
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.999)  # of AdamW
CLIP = 1.0  # largest norm of the gradient
WIDTH = 96  # channels of the maps
STRIDES = (0.5, 1, 2)  # from a cell of a map to the next, in patches
BOUNDS = (0, 4, 8, 1e9)  # sqrt(width * height) of a map's boxes, in patches
NARROW = 0.54 / 6  # standard deviation of a box's Gaussian, by its side (TTFNet)
SIDES_WEIGHT = 5.0  # of the error of the sides in the loss; 1 - GIoU has weight 1
LEAST = 4  # pixels: the loss leaves out smaller boxes
PAGE = 7 / 4  # side of a whole page by --view: the detector reads pages at 224 px, crops at 128 px
LATE = 0.25  # share of the epochs, the last ones, whose crops have 6/7 of the page's side
MOSAIC = 0.3  # share of the steps whose crops show four pages
COLOUR = 0.3  # brightness, contrast and saturation are multiplied by 1 +- this
MOST, OVERLAP = 100, 0.5  # answers for a picture; IoU of two answers for one face
LOWEST = 0.1  # the lowest threshold of a detector
SENSIBLE = 1 / 3  # of the largest face's side: smaller ones are not the one of --largest
EPOCHS, LEAST_VIEWS = 16, 3200  # with few pages more epochs, until so many pages were seen
MARGIN = 0.2  # room around a face that is cut out, by its longer side: recognition on dev chose it
RECIPE = ("data", "method", "view", "epochs", "batch_size", "lr", "seed", "dtype")
REMEDY = "python -m apps.detect ENCODER makes it"
LOOK = "Some may show a skirt or a lone eye: delete these before anything is learned"  # of crops


# ---- the network ---------------------------------------------------------------------------------


class Detector(nn.Module):
    """An encoder, three maps of its tokens, and one head for all of them."""

    def __init__(self, encoder):
        super().__init__()
        D = encoder.config["dim"]
        self.config = {"encoder": encoder.config}  # for load
        self.encoder = encoder
        self.patch = encoder.patch_size
        maps = nn.ConvTranspose2d(D, WIDTH, 2, 2), nn.Conv2d(D, WIDTH, 1), nn.Conv2d(D, WIDTH, 2, 2)
        self.maps = nn.ModuleList(maps)
        self.norms = nn.ModuleList(nn.GroupNorm(8, WIDTH) for _ in self.maps)
        layers = []
        for _ in range(2):
            layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.GELU()]
        self.tower = nn.Sequential(*layers)
        self.out = nn.Conv2d(WIDTH, 5, 3, padding=1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)
        nn.init.constant_(self.out.bias[:1], -4.6)  # a score of 0.01: few cells are a centre

    def tokens(self, view, corner=(0, 0)):
        """view u8 (B, S, S, 3) -> patch tokens (B, D, g, g), g = S / patch.

        corner: row and column in the encoder's grid at which the view begins. A view that is larger
        than the grid gets interpolated positions.
        """
        g = view.shape[1] // self.patch
        side = self.encoder.side
        ids = all_places(view, self.patch)  # (B, N) in the view's own grid
        pos, places = None, (ids // g + corner[0]) * side + ids % g + corner[1]  # in the encoder's
        if g > side:
            pos, places = resize_positions(self.encoder.pos_embed, g), ids
        tokens = self.encoder(masked_patch_gather(view, ids, self.patch), places, pos)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (g, g))

    def forward(self, view, corner=(0, 0)):
        """view u8 (B, S, S, 3) -> logits of centres (B, N), boxes x1, y1, x2, y2 (B, N, 4) in pixels."""
        tokens = self.tokens(view, corner)
        logits, boxes = [], []
        for scale, to_map, norm in zip(STRIDES, self.maps, self.norms, strict=True):
            stride = int(scale * self.patch)  # pixels from a cell to the next
            out = self.out(self.tower(norm(to_map(tokens)))).float().flatten(2)  # (B, 5, n)
            reach = 3 * stride * out[:, 1:].clamp(-5, 5).exp()  # left, up, right, down
            centre = cells(out.shape[2], stride, view.device)
            logits.append(out[:, 0])
            boxes.append(torch.cat([centre - reach[:, :2].mT, centre + reach[:, 2:].mT], 2))
        return torch.cat(logits, 1), torch.cat(boxes, 1)


def cells(n, stride, device):
    """Centres x, y of the n cells of a square map, (n, 2) in pixels."""
    place = (torch.arange(round(n**0.5), device=device) + 0.5) * stride
    y, x = torch.meshgrid(place, place, indexing="ij")
    return torch.stack([x, y], 2).flatten(0, 1)


def load(path):
    """A run of apps/detect.py, or its detector.safetensors -> the network in eval mode, and its header."""
    file = model_file(path, "detector.safetensors")
    weights, header = train.read_safetensors(file, REMEDY)
    net = Detector(ViT(**header["detector"]["encoder"]))
    net.load_state_dict(weights)
    return net.eval(), header


# ---- the loss ------------------------------------------------------------------------------------


def targets(boxes, S, patch):
    """The targets of each cell: heat (B, N), box (B, N, 4), weight of that box (B, N).

    boxes (B, K, 4) in pixels. A box belongs to the map of its size. Its heat is a Gaussian around
    its centre, and 1 in the cell of the centre. Its weights sum to at most 1 (in TTFNet to the logarithm
    of its area, so that there a large face counts more).
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    size = sides.prod(2).sqrt()
    middle = boxes[..., :2] + sides / 2
    large_enough = sides.amin(2) >= LEAST
    maps = []
    for scale, low, high in zip(STRIDES, BOUNDS, BOUNDS[1:], strict=False):
        stride = int(scale * patch)
        centre = cells((S // stride) ** 2, stride, boxes.device)
        here = (large_enough & (size >= low * patch) & (size < high * patch))[:, :, None]
        away = centre - middle[:, :, None]  # (B, K, n, 2)
        scaled = away / (NARROW * sides[:, :, None] + 1e-6)
        bell = (-0.5 * scaled.square().sum(3)).exp() * here
        holds_centre = away.abs().amax(3) <= stride / 2
        maps.append(torch.where(holds_centre & here, 1.0, bell))
    bells = torch.cat(maps, 2)  # (B, K, N)
    heat, which = bells.max(1)  # a cell belongs to the box with the highest bell
    weight = heat / bells.sum(2).clamp(min=1e-6).gather(1, which)
    return heat, boxes.gather(1, which[..., None].expand(-1, -1, 4)), weight * (heat > 0.05)


def area(boxes):
    """Boxes (..., 4) -> (...); an inverted box has none."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height  # the gradient of prod would make a GPU's host wait


def intersection(a, b):
    """Boxes (..., 4) and (..., 4), broadcast -> the box that both cover (..., 4), or an inverted one."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    return torch.cat([low, high], -1)


def iou(a, b):
    """Boxes (..., 4) and (..., 4), broadcast -> intersection over union (...)."""
    both = area(intersection(a, b))
    return both / (area(a) + area(b) - both).clamp(min=1e-9)


def giou(a, b):
    """Boxes (..., 4) -> generalised IoU (...) (Rezatofighi et al. 2019, arXiv:1902.09630)."""
    both = intersection(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])
    hull = torch.cat([low, torch.maximum(a[..., 2:], b[..., 2:])], -1)  # around both
    union = (area(a) + area(b) - area(both)).clamp(min=1e-6)
    return area(both) / union - 1 + union / area(hull).clamp(min=1e-6)


def loss_of(logits, predicted, boxes, S, patch):
    """Focal loss of the centres, plus GIoU and relative side error of the boxes, per face.

    logits (B, N), predicted (B, N, 4): what the network answers; boxes (B, K, 4): the truth.
    """
    heat, true, weight = targets(boxes, S, patch)
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    is_centre = heat == 1
    focal = torch.where(is_centre, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
    side = (true[..., 2:] - true[..., :2]).clamp(min=1).mean(2)
    sides_error = (predicted - true).abs().mean(2) / side
    box_loss = weight * (1 - giou(predicted, true) + SIDES_WEIGHT * sides_error)
    return (box_loss.sum() - focal.sum()) / is_centre.sum().clamp(min=1)


# ---- from maps to faces --------------------------------------------------------------------------


@torch.no_grad()
def detect(net, view):
    """view u8 (B, S, S, 3) -> for each boxes (k, 4) in shares of it and scores (k,), best first."""
    logits, boxes = net(view)
    S = view.shape[1]
    scores = logits.sigmoid()
    sizes = [(S // int(scale * net.patch)) ** 2 for scale in STRIDES]  # cells of each map
    maps = map(peaks_of, scores.split(sizes, 1), boxes.split(sizes, 1))
    peaks, boxes = (torch.cat(parts, 1) for parts in zip(*maps, strict=True))
    boxes = boxes.clamp(0, S) / S
    answers = []
    for score, corners, peak in zip(scores, boxes, peaks, strict=True):
        best = torch.where(peak, score, 0).topk(min(MOST, int(peak.sum()))).indices
        best = best[(corners[best, 2:] > corners[best, :2]).all(1)]
        best = best[suppress(corners[best])]
        answers.append((corners[best].cpu(), score[best].cpu()))
    return answers


def peaks_of(heat, boxes):
    """Scores (B, n) and boxes (B, n, 4) of one map -> its local maxima (B, n), smoothed boxes.

    A smoothed box is the mean over a cell and its eight neighbours, weighted by score squared.
    """
    g = round(heat.shape[1] ** 0.5)
    heat = heat[:, None].unflatten(2, (g, g))
    peak = F.max_pool2d(heat, 3, 1, 1) == heat
    weighted = heat**2 * boxes.mT.unflatten(2, (g, g))
    mean = F.avg_pool2d(weighted, 3, 1, 1) / F.avg_pool2d(heat**2, 3, 1, 1).clamp(min=1e-12)
    return peak.flatten(1), mean.flatten(2).mT


def suppress(boxes):
    """Non-maximum suppression: boxes (k, 4), best score first -> indices of those that stay."""
    left = torch.arange(len(boxes), device=boxes.device)
    stay = []
    while len(left):
        stay.append(left[0])
        left = left[1:][iou(boxes[left[0]], boxes[left[1:]]) < OVERLAP]
    return torch.stack(stay) if stay else left


def faces_of(net, picture, side, threshold):
    """Faces of a picture u8 (H, W, 3), from left to right: boxes (k, 4) in its pixels, scores (k,).

    The network sees it on a gray square of about `side` pixels, a multiple of two patches.
    """
    H, W = picture.shape[:2]
    S = max(1, round(side / (2 * net.patch))) * 2 * net.patch
    size = [max(1, round(x * S / max(H, W))) for x in (W, H)]
    page = Image.new("RGB", (S, S), (128, 128, 128))
    page.paste(Image.fromarray(picture).resize(size, Image.BICUBIC, reducing_gap=2.0))
    view = torch.from_numpy(np.array(page))[None].to(net.out.weight.device)
    boxes, scores = detect(net, view)[0]
    corner = torch.tensor([W, H, W, H])
    boxes = (boxes / (corner / max(H, W))).clamp(0, 1) * corner
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # and not in the gray
    kept = (inside & (scores >= threshold)).nonzero()[:, 0]
    order = kept[boxes[kept, 0].argsort()]
    return boxes[order], scores[order]


def main_face(boxes, scores):
    """Faces (k, 4), (k,) -> the index of the one that the picture is of, (1,), or none of none.

    It has the best score among those that are not much smaller than the largest box: that one is
    often no face, but something round and large, such as a skirt.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    large = sides >= SENSIBLE * sides.max() if len(sides) else sides > 0
    return torch.where(large, scores, -1).argsort(descending=True, stable=True)[:1]


def cut_out(picture, box, size=None):
    """The square around a box, and room, u8 (s, s, 3); outside of the picture its border is repeated."""
    x1, y1, x2, y2 = box
    half = max(1.0, max(x2 - x1, y2 - y1) * (0.5 + MARGIN))
    steps = np.arange(round(2 * half))
    rows = (steps + round((y1 + y2) / 2 - half)).clip(0, picture.shape[0] - 1)
    columns = (steps + round((x1 + x2) / 2 - half)).clip(0, picture.shape[1] - 1)
    square = Image.fromarray(picture[rows][:, columns])
    if size:
        square = square.resize((size, size), Image.BICUBIC, reducing_gap=2.0)
    return np.array(square)


def coco(answers, truth, side):
    """pycocotools' numbers in percent, and "threshold".

    answers: as `detect` gives them; truth: list of (k, 4) in shares; side: of a page, in pixels.
    AP is the mean over IoU 0.5 to 0.95; small faces have under 32^2 pixels, large ones over 96^2.
    The threshold is the score with the best F1 at IoU 0.5.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        true = coco_set(truth, [None] * len(truth), side)
        judged = COCOeval(true, coco_set(*zip(*answers, strict=True), side), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    names = "ap ap50 ap75 ap_small ap_medium ap_large ar_1 ar_10 ar ar_small ar_medium ar_large"
    row = {}
    for name, x in zip(names.split(), judged.stats.tolist(), strict=True):
        row[name] = round(100 * x, 2) if x >= 0 else None  # no face of this size
    precision = np.maximum(judged.eval["precision"][0, :, 0, 0, -1], 0)
    recall = judged.params.recThrs
    scores = judged.eval["scores"][0, :, 0, 0, -1]
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    threshold = max(LOWEST, scores[f1.argmax()].item())
    return row | {"threshold": round(threshold, 3)}


def coco_set(boxes, scores, side):
    """Boxes of each page, and their scores or None -> pycocotools' COCO."""
    from pycocotools.coco import COCO

    rows = []
    for page, (some, sure) in enumerate(zip(boxes, scores, strict=True)):
        for i, (x1, y1, x2, y2) in enumerate((np.asarray(some, float) * side).tolist()):
            w, h = x2 - x1, y2 - y1
            row = {"id": len(rows) + 1, "image_id": page, "category_id": 1, "iscrowd": 0}
            row |= {"bbox": [x1, y1, w, h], "area": w * h}
            rows.append(row if sure is None else row | {"score": sure[i].item()})
    annotated = COCO()
    images = [{"id": page} for page in range(len(boxes))]
    annotated.dataset = {"images": images, "categories": [{"id": 1}], "annotations": rows}
    annotated.createIndex()
    return annotated


def judge(task, net, split, index):
    """Answers for whole pages, and their true boxes, both in the order of index."""
    answers = []
    net.eval()
    for _, view in data.whole_views(split["images"], index, task.page, task.device, "judging"):
        with task.autocast():
            answers += detect(net, view)
    return answers, [true[true[:, 0] >= 0] for true in boxes_of(split, index)]


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Task:
    """What a run works with."""

    train: dict  # a split
    index: torch.Tensor  # which of its pages are learned from
    dev: tuple  # split and index to choose by
    report: tuple  # split and index that are reported
    view: int  # side of a crop in pixels
    page: int  # side of a whole page that is judged
    late: int  # side of a page at the end of training
    encoder: ViT
    heads: dict  # other weights of a detector that is trained on
    device: torch.device
    autocast: partial


def open_task(flags, device, autocast):
    """Splits, which pages of them, sides of the views in pixels, the encoder."""
    splits = open_splits(flags.data, flags.split)
    flags.digest = data.digest(flags.data)
    index, chosen, where = set_apart(splits)
    dev = (splits[where], chosen)
    held = splits[flags.split]
    report = (held, torch.arange(len(held["images"])))
    parts = {"train": (splits["train"], index), "dev": dev, flags.split: report}
    for name, (split, some) in parts.items():
        if "boxes" not in split or (boxes_of(split, some) < 0).all():
            fix = "python data.py scenes draws pages with some, python data.py PATH --detect packs others"
            if "boxes" in split:
                fix = "box more pages, or pack more of them for it: --split .7,.3,0 --dev .2"
            raise UserError(f"{flags.data} has no boxes on pages of {name}; {fix}")
    two = 2 * load_start(flags.encoder)[0].patch_size  # a cell of the coarsest map
    if flags.view % two:
        raise UserError(f"--view {flags.view} must be a multiple of {two}, which is two patches")
    page = int(flags.view * PAGE) // two * two
    sides = (flags.view, page, max(flags.view, page * 6 // 7 // two * two))
    start = load_start(flags.encoder, page)
    return Task(splits["train"], index, dev, report, *sides, *start, device, autocast)


def is_detector(path):
    """Is this the folder of a detector?"""
    return file_of(path, "detector.safetensors").is_file()


def load_start(path, page=None):
    """-> an encoder for pages of this side, and {}; of a detector its encoder and its other weights."""
    if not is_detector(path):
        return load_encoder(path, page), {}
    net, header = load(path)
    if page not in (None, header["page"]):
        raise UserError(f"{path} reads pages of {header['page']} px; give the --view of that run")
    heads = {k: w for k, w in net.state_dict().items() if not k.startswith("encoder.")}
    return net.encoder, heads


def boxes_of(split, index):
    """Boxes of some pages, (n, K, 4) fp32 in shares of the page; -1 fills up."""
    return torch.from_numpy(np.array(split["boxes"][index.numpy()]))


def crops(images, boxes, generator, side, least, most=1.0):
    """Pages u8 (B, ., ., 3), boxes (B, K, 4) in shares -> crops (B, side, side, 3), boxes in pixels.

    A crop takes a share from least to most of a page's side. Boxes with under 0.3 inside leave.
    """
    share = least + (most - least) * torch.rand(len(images), 1, generator=generator)
    corner = torch.rand(len(images), 2, generator=generator) * (1 - share)  # top, left
    flip = torch.rand(len(images), generator=generator) < 0.5
    view = data.view_images(images, torch.cat([corner, share, share], 1), flip, side)
    view = data.jitter_colour(view, torch.rand(len(images), 3, generator=generator), COLOUR)
    origin = corner.flip(1).repeat(1, 2)[:, None]
    moved = (boxes - origin) / share[:, None]
    mirrored = torch.stack([1 - moved[..., 2], moved[..., 1], 1 - moved[..., 0], moved[..., 3]], 2)
    moved = torch.where(flip[:, None, None], mirrored, moved)
    inside = moved.clamp(0, 1)
    kept = (boxes[..., 0] >= 0) & (area(inside) > 0.3 * area(moved))
    return view, torch.where(kept[..., None], inside * side, -1.0)


def mosaic(images, boxes, generator, side, least):
    """The same, but each crop shows four pages of the batch, one in each quarter."""
    half = side // 2
    views = []
    quarters = []
    for turn, (y, x) in enumerate([(0, 0), (0, half), (half, 0), (half, half)]):
        pages, truth = images.roll(turn, 0), boxes.roll(turn, 0)
        view, inside = crops(pages, truth, generator, half, 0.7 * least, 0.7)
        views.append(view)
        quarters.append(torch.where(inside >= 0, inside + torch.tensor([x, y, x, y]), inside))
    upper = torch.cat(views[:2], 2)
    lower = torch.cat(views[2:], 2)
    return torch.cat([upper, lower], 1), torch.cat(quarters, 1)


def build(task, method, seed):
    """The network on the device; of its encoder learns all (full, scratch), LoRA, or nothing."""
    torch.manual_seed(seed)
    if method == "scratch":
        return Detector(untrained_like(task.encoder, seed).requires_grad_()).to(task.device)
    encoder = task.encoder.requires_grad_(method == "full")
    if method == "lora":
        add_lora(encoder)
    net = Detector(encoder)
    net.load_state_dict(task.heads, strict=False)  # the encoder has its weights already
    return net.to(task.device)


def step_loss(task, net, index, pages, late, generator):
    """The loss of a batch of crops, at a random place of a whole page's grid of patches."""
    boxes = boxes_of(task.train, index)
    cut = mosaic if torch.rand(1, generator=generator) < MOSAIC else crops
    side, least = (task.late, 0.7) if late else (task.view, 0.5)
    view, boxes = cut(pages, boxes, generator, side, least)
    room = (task.page - side) // net.patch + 1
    corner = torch.randint(room, (2,), generator=generator).tolist()
    with task.autocast():
        logits, predicted = net(view, corner)
    return loss_of(logits, predicted, data.send(boxes, task.device), side, net.patch)


def learn(flags, task, net, optimizer, run):
    """Train from the run's step to its last one."""
    images = data.resident(task.train["images"], task.device)
    epochs = run.total // run.per_epoch
    first_late = round((1 - LATE) * epochs)
    for epoch in range(run.step // run.per_epoch, epochs):
        order = task.index[data.epoch_order(len(task.index), flags.seed, epoch)]
        start = run.step % run.per_epoch
        batches = data.batches(images, order, run.batch_size, task.device, start)
        for index, pages in batches:
            generator = train.seeded(flags.seed, epoch, run.step)
            loss = step_loss(task, net.train(), index, pages, epoch >= first_late, generator)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            lr = train.lr_at(run.step, run.total, 0.1 * run.total, flags.lr)
            train.set_lr(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad()
            run.update(loss, grad_norm)
            if run.step % train.LOG_EVERY == 0 or run.step == run.total or run.stop:
                run.log_step()
                run.save_if_due()


def fit(flags, device, autocast):
    """Train a detector, or go on with it, then evaluate it and write its files."""
    task = open_task(flags, device, autocast)
    enough = math.ceil(LEAST_VIEWS / len(task.index))
    train.set_defaults(flags, lr=RATES[flags.method], epochs=max(EPOCHS, enough))
    flags.batch_size = min(flags.batch_size, len(task.index))
    net = build(task, flags.method, flags.seed)
    optimizer = train.make_optimizer(net, flags.lr, WEIGHT_DECAY, BETAS)
    per_epoch = len(task.index) // flags.batch_size
    parts = {"model": net, "optimizer": optimizer}
    run = train.Run(flags, parts, flags.epochs * per_epoch, per_epoch, device)
    run.resume_or_begin()
    print(f"data     {flags.data}: {len(task.index)} pages of {task.page} px, crops of {task.view}")
    print(f"run      {run.out}: {flags.method}, {flags.epochs} epochs, rate {flags.lr:g}")
    learn(flags, task, net, optimizer, run)
    if flags.method == "lora":  # the file is a plain network
        merge_lora(net.encoder)
    write_results(flags, task, net, run)


def write_results(flags, task, net, run):
    """Evaluate the detector with the threshold that is best on dev, and write its two files."""
    side = task.report[0]["images"].shape[1]
    threshold = coco(*judge(task, net, *task.dev), side)["threshold"]
    answers, truth = judge(task, net, *task.report)
    scores = coco(answers, truth, side) | {"threshold": threshold}
    recipe = {name: getattr(flags, name) for name in RECIPE}
    header = {"detector": net.config, "base": flags.encoder, "run": recipe}
    header |= {"page": task.page, "threshold": threshold}
    train.save_safetensors(net.state_dict(), run.out / "detector.safetensors", header)
    row = {"command": flags.command, "commit": train.commit()}
    row |= {"machine": train.machine(task.device), "evaluated_on": flags.split}
    row |= {"seconds": run.seconds(), "config": recipe}
    row |= {"run": run.out.name, "data": flags.data, "seed": flags.seed}
    row |= scores | {"pages": len(truth), "faces": sum(map(len, truth))}
    train.save_json(row, run.out / f"metrics{split_suffix(flags.split)}.json")
    aps = f"AP {row['ap']:.1f}, AP50 {row['ap50']:.1f}, AP75 {row['ap75']:.1f} %"
    print(f"{flags.split:<9}{aps}; {row['faces']} faces on {row['pages']} pages")
    print(f"wrote    {run.out}/ after {run.seconds():.0f} s")
    print(f"next: python -m apps.detect {train.quoted(run.out)} PICTURE --out found")


# ---- pictures ------------------------------------------------------------------------------------


def use(flags, device, autocast):
    """A JSON line for each picture; with --out the pictures with outlines, or with --crop faces."""
    from apps.pictures import save_pngs, tell_problems
    from apps.sheet import Entry, write_sheet
    from ingest.pictures import whole_pictures

    crop = flags.crop or flags.largest
    if crop and not flags.out:
        raise UserError("--crop and --largest write pictures; --out DIR says where")
    net, header = load(flags.encoder)
    net.to(device)
    train.set_defaults(flags, threshold=header["threshold"])
    problems, without, cut = [], [], []
    pages = faces = 0
    for key, picture in whole_pictures(flags.pictures, problems):
        with autocast():
            boxes, scores = faces_of(net, picture, header["page"], flags.threshold)
        if flags.largest:
            main = main_face(boxes, scores)
            boxes, scores = boxes[main], scores[main]
        row = {"picture": key, "width": picture.shape[1], "height": picture.shape[0], "faces": []}
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
            row["faces"].append({"box": [round(x) for x in box], "score": round(score, 3)})
        print(json.dumps(row, ensure_ascii=False))
        pages, faces = pages + 1, faces + len(boxes)
        if flags.largest and not len(boxes):
            without.append(key)
        if flags.out:
            files = save_pngs(flags.out, key, to_write(picture, boxes, flags), in_folders=crop)
            if crop:
                cut += [Entry(*row) for row in as_told(files, scores.tolist())]
    if without:
        note = f"{len(without)} pictures show no face, such as {shown(without[0])}"
        print(f"note: {note}; their figure was cut out", file=sys.stderr)
    if flags.out:
        print(f"wrote    {flags.out}/: {faces} faces of {pages} pictures", file=sys.stderr)
    tell_problems(problems, header["run"]["data"])
    if cut:
        sheet = Path(flags.out, "crops.html")
        write_sheet(sheet, f"Cut out: {flags.out}", LOOK, {"The least sure first": cut})
        pack = f"python data.py {train.quoted(flags.out)}"
        print(f"next: look at {sheet}. {LOOK}; then {pack}", file=sys.stderr)


def as_told(files, scores):
    """Yield (path, score, words) of each crop; one without a score is a figure."""
    for i, file in enumerate(files):
        score = scores[i] if scores else 0.0
        words = f"score {score:.2f}" if scores else "no face was found: the figure"
        yield file.as_posix(), score, words


def to_write(picture, boxes, flags):
    """-> {end of a file's name: u8 (., ., 3)}: the picture with outlines, or what is cut out of it."""
    from ingest.decode import figure_of
    from ingest.scenes import outlined

    if flags.largest and not len(boxes):  # a picture less would be worse than a larger cut
        return {"_figure": figure_of(picture)}
    if flags.crop or flags.largest:
        return {f"_{i}": cut_out(picture, box) for i, box in enumerate(boxes.tolist())}
    return {"": outlined(picture, boxes)}


# ---- the command ---------------------------------------------------------------------------------


def parse_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("encoder", metavar="ENCODER", nargs="?", help="a run or checkpoint; for pictures a run-det")
    add("pictures", nargs="*", metavar="PICTURE", help="file, folder, archive")
    add = parser.add_argument_group("training").add_argument
    add("--data", default="datasets/scenes", metavar="DIR", help="packed set with boxes")
    add("--method", default="full", choices=RATES, help="what learns; scratch: from random weights")
    add("--view", type=between(16, 2048, int), default=128, metavar="PX", help="side of crops")
    add("--epochs", type=at_least(1), help=f"passes over the pages ({EPOCHS}, with few pages more)")
    add("--batch-size", type=at_least(1), default=16, metavar="B", help="crops of a step")
    add("--lr", type=between(0, 1), help="peak learning rate (default: by --method)")
    add = parser.add_argument_group("pictures").add_argument
    add("--crop", action="store_true", help="write each face in its picture's folder; look at them")
    add("--largest", action="store_true", help="the same of its main face, or else its figure")
    add("--threshold", type=between(0, 1), metavar="SCORE", help="default: the best one on dev")
    add = parser.add_argument_group("run and machine").add_argument
    add("--out", metavar="DIR", help="run folder (default: runs/NAME-det); for pictures a folder")
    train.add_flags(add)
    flags = parser.parse_intermixed_args()  # flags may stand between pictures
    of_pictures = {"crop", "largest", "threshold"}
    if flags.pictures:
        refuse_useless(flags.given - of_pictures - {"out", "device", "dtype"}, "on pictures")
    else:
        refuse_useless(flags.given & of_pictures, "on training")
    return flags


def main():
    flags = parse_flags()
    train.take_saved_flags(flags, "split")
    device, autocast, machine = train.open_machine(flags)
    if flags.pictures:
        return use(flags, device, autocast)
    require("detect", "pycocotools")  # found out now, not after the training
    name = train.run_name(flags, f"{name_of(flags.encoder)}-det", only={"seed"})
    train.set_defaults(flags, out=f"runs/{name}", command=train.command())
    print(machine)
    load_start(flags.encoder)  # before a data set is made
    flags.data = str(data.open_or_pack(flags.data, pages=True))
    fit(flags, device, autocast)


if __name__ == "__main__":
    cli(main)
