"""Where the faces are: the network of detect.py, what it learns from boxes, and how its answers are judged.

    B batch   S side of a view in pixels   K boxes of a view, -1 fills up   N cells of all levels
              D width

A plain ViT is enough for detection (ViTDet, Li et al. 2022, arXiv:2203.16527): its last tokens
become maps of half, once and twice the patch's side. On them stand a heat map of centres, with
CenterNet's focal loss (Zhou et al. 2019, arXiv:1904.07850), and at each cell the distances to the
four sides of a box, weighted as in TTFNet (arXiv:1909.00700).
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.checkpoints import blank_encoder, load_exactly, resize_positions
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
from common.io import UserError, read_header, read_safetensors
from kernels.gather import masked_patch_gather
from model import shape_of

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
