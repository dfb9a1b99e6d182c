"""Stage 7: drawn or photographed? Learn from labels of whole frames, and say it of every pixel of a frame that is both.

    python segment.py runs/NAME --data datasets/hybrid
    python segment.py runs/NAME-seg PICTURE... --out masks

Reads:  an encoder; datasets/NAME with the classes "drawn" and "photographed", and frames of other
        classes: mixed ones
Writes: runs/NAME-seg/ patches.safetensors (stage 1), proxies/drawn.safetensors (stage 2),
model.safetensors (stage 3),
        state.pt (what a resumed run needs), metrics.json, log.jsonl, overlays.png; with pictures
        masks and overlays

1. An encoder learns from frames of one kind, cut together; a patch is what the nearest centroid of
patch tokens is. 2. Patches of mixed frames are named, also half a patch further, and carried to the
picture's edges: proxy masks. 3. A U-Net, shown colours and what patches say, learns from them, and
from frames of one kind, cut together. No mask that somebody drew is learned from; the set's own
(plane "drawn") judge, and teach --learn-from truth alone. The source (arXiv:2410.04789) has a
SegFormer in the U-Net's place.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import csv
import itertools
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import mask as masking
from common import distributed, train
from common.checkpoints import blank_encoder, load_encoder, load_exactly
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
    working,
)
from common.features import name_of, open_splits, split_suffix
from common.fields import (
    ANYTHING,
    ENCODER,
    EPSILON,
    SIDE,
    check_encoder,
    check_fields,
    number,
    one_of,
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
from common.lora import fingerprint
from ingest.pictures import tell_problems, whole_pictures
from kernels.gather import masked_patch_gather
from model import shape_of

LOG_EVERY, CLIP = 10, 1.0  # steps, norm of the gradient
BATCH, FIRST = 32, {1: 0, 3: 10**6}  # frames of a step; a stage's first step in the log
RESULTS = ("metrics*.json", "*.safetensors", "proxies/*.safetensors", "overlays*.png")
NO_CONFIG = (
    "out",
    "resume",
    "given",
    "log",
    "device",
    "eval_on",
    "encoder",
    "pictures",
    "until",
    "share",
    "side",
    "mixed",
)
KINDS = ("photographed", "drawn")  # what a frame, a patch, a pixel may be: 0 or 1
EPS = 1e-3  # of the guided filter: contrasts under a thirtieth of the range are no edges
TOLERANCE = 2  # pixels that a border may be off
REMEDY = "remove it and run segment.py again"
PATCHES = {"encoder": ENCODER, "norm_eps": EPSILON, "decide": one_of("centroid", "cls")}
PIXELS = {
    "network": one_of("unet", "segformer"),
    "patches?": PATCHES,
    "image_size": SIDE,
    "seconds": number(0, 1e9),
}


# ---- patches: stage 1 ----------------------------------------------------------------------------


class Patches(nn.Module):
    """An encoder, a head to learn by, and centroids, which decide later. `config` is for
    blank_patches.
    """

    def __init__(self, encoder, decide):
        super().__init__()
        shape = shape_of(encoder)
        self.config, dim = (
            {"encoder": shape, "norm_eps": encoder.norm.eps, "decide": decide},
            shape["dim"],
        )
        self.encoder, self.decide, self.head = encoder, decide, nn.Linear(dim, 1)
        self.register_buffer("centroids", torch.zeros(2, dim))
        self.register_buffer("scale", torch.ones(()))  # std of a patch's score

    def forward(self, patches, ids):
        """patches (B, K, P), ids (B, K) -> logits of "drawn": (B,) of the CLS token, (B, K) of
        patches.
        """
        logits = self.head(self.encoder(patches, ids).float())[..., 0]
        return logits[:, 0], logits[:, 1:]

    def scores(self, view):
        """view u8 (B, S, S, 3) -> (B,) of the frame and (B, g, g) of its patches: over 0 where it
        is drawn.
        """
        tokens = self.encoder.features(view).float()
        if self.decide == "cls":
            s = self.head(tokens)[..., 0]
        else:  # squared distance to one centroid minus that to the other
            s = 2 * tokens @ (self.centroids[1] - self.centroids[0])
            s = s + (self.centroids[0] ** 2).sum() - (self.centroids[1] ** 2).sum()
        s, g = s / self.scale, self.encoder.side
        frame = s[:, 0] if self.decide == "cls" else s[:, 1:].mean(1)
        return frame, s[:, 1:].unflatten(1, (g, g))


def cut_masks(B, S, share, generator):
    """(B, S, S) bool: a half plane, a window or blobs in `share` of the frames, nothing in the
    others.
    """
    u = torch.rand(8, B, 1, 1, generator=generator)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, S)] * 2, indexing="ij")
    angle, (cy, cx, height, width), power = (
        2 * math.pi * u[0],
        u[1:5],
        torch.where(u[5] < 0.5, 2, 20),
    )
    plane = x * angle.cos() + y * angle.sin() > 1.2 * cy - 0.6
    v, h = (
        (y - 1.2 * cy + 0.6).abs() / (0.25 + 0.6 * height),
        (x - 1.2 * cx + 0.6).abs() / (0.25 + 0.6 * width),
    )
    blobs = (
        F.interpolate(torch.randn(B, 1, 4, 4, generator=generator), size=(S, S), mode="bicubic")[
            :, 0
        ]
        > cy - 0.5
    )
    shapes = torch.stack(
        [plane, v**power + h**power < 1, blobs]
    )  # power 2: an ellipse, 20: a rectangle
    return shapes[(3 * u[6, :, 0, 0]).long(), torch.arange(B)] & (u[7] < share)


def cut_together(view, drawn, share, generator):
    """Frames (B, S, S, 3) and masks (B, S, S), of which `share` show a part of another frame of the
    batch.
    """
    cut = cut_masks(len(view), view.shape[1], share, generator).to(view.device)
    return torch.where(cut[..., None], view.flip(0), view), torch.where(cut, drawn.flip(0), drawn)


def blank_patches(config, weights, path, prefix=""):
    """What Patches.config was -> Patches of that shape, with random weights. weights of the file at path: they have
    that shape, too."""
    check_encoder(weights, config["encoder"], path, REMEDY, f"{prefix}encoder.")
    return Patches(blank_encoder(config["encoder"], config["norm_eps"]), config["decide"])


def load_patches(path):
    """patches.safetensors -> Patches in eval mode."""
    weights, header = read_safetensors(path, REMEDY)
    check_fields(header, {"patches": PATCHES, "stage": table_of(ANYTHING)}, path, REMEDY)
    net = blank_patches(header["patches"], weights, path)
    load_exactly(net, weights, path)
    return net.eval()


# ---- from patches to pixels: stage 2 -------------------------------------------------------------


def fine_scores(net, view):
    """view u8 (B, S, S, 3) -> (B, 2g, 2g): means over frames moved by nothing and by half a patch,
    each way.
    """
    h, g = net.encoder.patch_size // 2, net.encoder.side
    total, count = torch.zeros(2, len(view), 2 * g + 1, 2 * g + 1, device=view.device)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        moved = F.pad(view.permute(0, 3, 1, 2).float(), (0, dx * h, 0, dy * h), mode="replicate")
        moved = moved[..., dy * h :, dx * h :].permute(0, 2, 3, 1).to(torch.uint8).contiguous()
        patches = net.scores(moved)[1]
        cells = patches.repeat_interleave(2, 1).repeat_interleave(2, 2)
        total[:, dy : dy + 2 * g, dx : dx + 2 * g] += cells
        count[:, dy : dy + 2 * g, dx : dx + 2 * g] += 1
    return (total / count)[:, : 2 * g, : 2 * g]


def guided_filter(values, view, radius):
    """values (B, H, W) as a linear function of brightness in each window of `view` u8 (B, H, W, 3)
    -> (B, H, W).

    Where the picture has an edge, so has the result (He, Sun & Tang 2013, equations 5, 6 and 8).
    """

    def mean(x):
        return F.avg_pool2d(x[:, None], 2 * radius + 1, 1, radius, count_include_pad=False)[:, 0]

    guide = (view.float() * view.new_tensor(data.LUMA, dtype=torch.float32)).sum(3) / 255
    m_guide, m_values = mean(guide), mean(values)
    a = (mean(guide * values) - m_guide * m_values) / (mean(guide**2) - m_guide**2 + EPS)
    return mean(a) * guide + mean(m_values - a * m_guide)


def two_means(probability):
    """(B, S, S) of frames that hold both kinds -> the same, moved: .5 is midway between the means
    over and under it.

    Whatever else is in a frame moves all of its scores; their order within the frame stays right.
    So each frame has a threshold of its own (Ridler & Calvard 1978).
    """

    def mean(x, where):
        return (x * where).sum((1, 2), keepdim=True) / where.sum((1, 2), keepdim=True).clamp(min=1)

    threshold = probability.mean((1, 2), keepdim=True)
    for _ in range(16):
        threshold = (
            mean(probability, probability > threshold) + mean(probability, probability <= threshold)
        ) / 2
    return (probability + 0.5 - threshold).clamp(0, 1)


@torch.no_grad()
def proxy_masks(net, view, autocast):
    """view u8 (B, S, S, 3) -> probability of drawn, (B, S, S), and the same before the picture's
    edges were asked.
    """
    with autocast():
        cells = fine_scores(net.eval(), view).sigmoid()
    coarse = F.interpolate(cells[:, None], size=view.shape[1:3], mode="bilinear")[:, 0]
    return guided_filter(coarse, view, net.encoder.patch_size // 2).clamp(0, 1), coarse


# ---- pixels: stage 3 -----------------------------------------------------------------------------


class Pixels(nn.Module):
    """A U-Net or SegFormer; beside colours it is shown what `patches` of stage 1, which stay as
    they are, say.
    """

    def __init__(self, network, patches=None):
        super().__init__()
        self.patches = patches and patches.requires_grad_(False)
        self.net = (UNet if network == "unet" else segformer)(3 + (patches is not None))
        self.net.to(memory_format=torch.channels_last)

    def forward(self, view):
        """view u8 (B, H, W, 3), any size -> logits of "drawn" (B, h, w) fp32, at the size of the
        network's answer.
        """
        x = view.permute(0, 3, 1, 2).float()
        seen = [x / 127.5 - 1] if self.patches is None else [x / 127.5 - 1, self.hint(x)]
        logits = self.net(torch.cat(seen, 1))
        return getattr(logits, "logits", logits)[
            :, 0
        ].float()  # transformers wraps what its networks answer

    @torch.no_grad()
    def hint(self, x):
        """Colours (B, 3, H, W), 0 to 255 -> scores of patches (B, 1, H, W)."""
        side = self.patches.encoder.side * self.patches.encoder.patch_size
        small = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True).round().byte()
        _, scores = self.patches.scores(small.permute(0, 2, 3, 1).contiguous())
        return F.interpolate(scores[:, None], size=x.shape[2:], mode="bilinear")


class UNet(nn.Module):
    """3x3 convolutions, down to a sixteenth of the side and up to half of it (Ronneberger, Fischer
    & Brox 2015).

    x (B, channels, H, W) -> logits of "drawn" (B, 1, H/2, W/2). 0.4 million parameters.
    """

    def __init__(self, channels, widths=(16, 32, 64, 96)):
        super().__init__()
        pairs = [*itertools.pairwise(widths)]
        self.stem = convs(channels, widths[0], size=5, stride=2)
        self.down = nn.ModuleList(convs(a, b, b) for a, b in [(widths[0], widths[0]), *pairs])
        self.up = nn.ModuleList(convs(a + b, a, a) for a, b in reversed(pairs))
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x):
        x, seen = self.down[0](self.stem(x)), []
        for down in self.down[1:]:
            seen.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in self.up:
            before = seen.pop()
            x = up(torch.cat([F.interpolate(x, size=before.shape[2:]), before], 1))
        return self.out(x)


def convs(*widths, size=3, stride=1):
    """A convolution, BatchNorm and ReLU from each width to the next."""
    return nn.Sequential(
        *[
            layer
            for a, b in itertools.pairwise(widths)
            for layer in (
                nn.Conv2d(a, b, size, stride, size // 2, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            )
        ]
    )


def segformer(channels):
    """A SegFormer (Xie et al. 2021) with random weights, smaller than its B0: 0.6 million
    parameters.

    The encoder's convolutions are drawn as in the paper's own code, by what each puts out;
    transformers' std of .02 all but silences those of a single channel, and nothing was learned.
    Fused attention is slower on a CPU than products.
    """
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ImportError:
        raise UserError(
            "--network segformer needs transformers: pip install transformers; unet does not"
        ) from None
    net = SegformerForSemanticSegmentation(
        SegformerConfig(
            num_labels=1,
            num_channels=channels,
            depths=[2, 2, 2, 1],
            hidden_sizes=[24, 48, 64, 96],
            num_attention_heads=[1, 2, 4, 8],
            decoder_hidden_size=64,
            drop_path_rate=0,
            classifier_dropout_prob=0,
            attn_implementation="eager",
        )
    )
    for conv in (m for m in net.segformer.modules() if isinstance(m, nn.Conv2d)):
        numbers = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
        nn.init.normal_(conv.weight, std=math.sqrt(2 / numbers))
    return net


def load_pixels(path):
    """model.safetensors of stage 3 -> its Pixels in eval mode, header of its file."""
    weights, header = read_safetensors(path, REMEDY)
    check_fields(header, PIXELS, path, REMEDY)
    config = header.get("patches")
    net = Pixels(header["network"], config and blank_patches(config, weights, path, "patches."))
    load_exactly(net, weights, path)
    return net.eval(), header


@torch.no_grad()
def pixel_masks(net, view, autocast):
    """view u8 (B, H, W, 3) -> probability of drawn (B, H, W)."""
    with autocast():
        logits = net(view)
    return F.interpolate(logits[:, None], size=view.shape[1:3], mode="bilinear")[:, 0].sigmoid()


def load(folder, device, autocast):
    """runs/NAME of segment.py -> (masks_of(view), side that it learned at, does it want squares?).

    By the segmenter, or by patches where stage 3 was not made; those want squares of that side.
    """
    last, patches = Path(folder) / "model.safetensors", Path(folder) / "patches.safetensors"
    if "network" in (read_header(last)[1] if last.exists() else {}):
        pixels, header = load_pixels(last)
        pixels.to(device)
        return (lambda view: pixel_masks(pixels, view, autocast)), header["image_size"], False
    if not patches.exists():
        raise UserError(
            f"{folder} is no run of segment.py; python segment.py ENCODER --data DIR makes one"
        )
    net = load_patches(patches).to(device)
    return (
        (lambda view: proxy_masks(net, view, autocast)[0]),
        net.encoder.side * net.encoder.patch_size,
        True,
    )


# ---- judging and showing -------------------------------------------------------------------------


def border(mask):
    """mask (B, H, W) bool -> its pixels that touch the other kind."""
    x = mask.float()[:, None]
    return ((F.max_pool2d(x, 3, 1, 1) - -F.max_pool2d(-x, 3, 1, 1))[:, 0] > 0) & mask


def within(mask, reach):
    """mask (B, H, W) bool -> pixels no further than `reach` from one of its own, in rows and
    columns.
    """
    return F.max_pool2d(mask.float()[:, None], 2 * reach + 1, 1, reach)[:, 0] > 0


def judge_masks(pairs):
    """pairs of (said, true) masks (B, H, W) bool -> percent: IoU of drawn, of photographed, their
    mean; boundary F.

    Pixels are counted over all frames together; a border counts as found within TOLERANCE pixels.
    """
    both, either, found = torch.zeros(2), torch.zeros(2), torch.zeros(4)
    for said, true in pairs:
        for k, (a, b) in enumerate(((~said, ~true), (said, true))):
            both[k] += (a & b).sum()
            either[k] += (a | b).sum()
        a, b = border(said), border(true)
        found += torch.tensor(
            [(a & within(b, TOLERANCE)).sum(), a.sum(), (b & within(a, TOLERANCE)).sum(), b.sum()]
        )
    iou = 100 * both / either.clamp(min=1)
    precision, recall = found[0] / found[1].clamp(min=1), found[2] / found[3].clamp(min=1)
    row = {
        "iou_drawn": iou[1],
        "iou_photographed": iou[0],
        "miou": iou.mean(),
        "boundary_f": 100 * 2 * precision * recall / (precision + recall).clamp(min=1e-9),
    }
    return {k: round(x.item(), 2) for k, x in row.items()}


def overlay(view, mask):
    """view u8 (B, H, W, 3), mask (B, H, W) bool -> u8, with orange over what is not drawn."""
    orange = view.new_tensor([230, 159, 0]).float()
    tinted = 0.35 * view.float() + 0.65 * orange
    return torch.where(mask[..., None].to(view.device), view.float(), tinted).round().byte()


# ---- flags --------------------------------------------------------------------------------------


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="runs/NAME, or a checkpoint of MAE, DINO, timm or HF; "
        "to use what was learned runs/NAME-seg",
    )
    parser.add_argument(
        "pictures", nargs="*", metavar="PICTURE", help="file, folder (a video's frames), archive"
    )
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add(
        "--data",
        metavar="DIR",
        help="set of frames: python data.py hybrid makes one (default: datasets/hybrid)",
    )
    add(
        "--out",
        metavar="DIR",
        help="run folder (default: the encoder's and seg); of pictures, folder of the masks",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint",
    )
    add("--eval-on", default="val", choices=["val", "test", "dev"], help="split that is reported")
    add("--until", type=int, default=3, choices=[1, 2, 3], help="last stage")
    add = parser.add_argument_group("stages 1 and 2: patches").add_argument
    add(
        "--patches",
        metavar="RUN",
        help="take both from another run of segment.py, and make stage 3 alone",
    )
    add(
        "--decide",
        default="centroid",
        choices=["centroid", "cls"],
        help="what names a patch: the nearest centroid\n"
        "of patch tokens, or a head that learned on the CLS token",
    )
    add(
        "--image-size",
        type=at_least(16),
        metavar="S",
        help="side of the frames in pixels (default: as packed)",
    )
    add("--epochs", type=at_least(1), default=70, help="passes over the frames of one kind")
    add("--lr", type=between(0, 1), default=5e-4, help="peak learning rate")
    add(
        "--keep",
        type=between(0.01, 1),
        default=0.5,
        metavar="SHARE",
        help="of the patches shown in training",
    )
    add = parser.add_argument_group("stage 3: pixels").add_argument
    add(
        "--learn-from",
        default="proxies",
        choices=["proxies", "frames", "truth"],
        help="mixed frames with proxies; "
        "frames\nof one kind alone; mixed frames with the true masks (a fully supervised control)",
    )
    add(
        "--network",
        default="unet",
        choices=["unet", "segformer"],
        help="segformer is the source's, and needs transformers",
    )
    add(
        "--no-hint",
        action="store_true",
        help="the network sees colours alone, not what stage 1 says of patches",
    )
    add(
        "--proxies",
        metavar="FILE",
        help="other masks of train than those of stage 2: saliency of maps.py",
    )
    add(
        "--flip",
        type=between(0, 1),
        default=0.0,
        metavar="SHARE",
        help="of the patches of proxies that are inverted",
    )
    add(
        "--balanced",
        action="store_true",
        help="both kinds of pixels weigh the same, however many there are",
    )
    add("--pixel-steps", type=at_least(1), default=800, metavar="N", help=f"of {BATCH} frames each")
    add("--pixel-lr", type=between(0, 1), default=2e-3, metavar="LR", help="peak learning rate")
    add = parser.add_argument_group("both").add_argument
    add(
        "--leave-out",
        metavar="WHAT=VALUE",
        help="drawings of this style are not learned from, such as line=bold",
    )
    add(
        "--cut",
        type=between(0, 1),
        default=1.0,
        metavar="SHARE",
        help="of the frames that show a part of another one, too",
    )
    add(
        "--min-crop",
        type=between(0.01, 1),
        default=0.5,
        metavar="AREA",
        help="smallest share of a frame in a crop",
    )
    add(
        "--colour",
        type=between(0, 1),
        default=0.3,
        metavar="X",
        help="brightness, contrast, saturation times 1 +- X",
    )
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation")
    add = parser.add_argument_group("what is said of pictures").add_argument
    add(
        "--mixed",
        action="store_true",
        help="all of them hold both kinds: each picture gets a threshold of its own",
    )
    add("--share", action="store_true", help="print how much of each picture is drawn, as CSV")
    add(
        "--side",
        type=between(32, 4096, int),
        metavar="PX",
        help="short side that pictures are resized to (default: as trained)",
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
    training, third = not args.pictures, args.until == 3
    refuse_unused(
        args,
        (
            (
                "data resume eval-on until decide image-size epochs lr keep cut "
                "learn-from network no-hint proxies flip "
                "balanced pixel-steps pixel-lr leave-out min-crop colour seed log",
                training,
                "is for training, not for pictures",
            ),
            (
                "share side mixed",
                not training,
                "is for pictures: python segment.py runs/NAME-seg PICTURE",
            ),
            (
                "learn-from network no-hint proxies flip balanced pixel-steps pixel-lr",
                third,
                f"is for stage 3, not for --until {args.until}",
            ),
            (
                "decide image-size epochs lr keep",
                args.patches is None,
                "is for stage 1, and --patches brings it",
            ),
            ("patches", training, "is for training, not for pictures"),
            (
                "proxies flip",
                args.learn_from == "proxies",
                f"is for proxies, not for --learn-from {args.learn_from}",
            ),
        ),
    )


# ---- the data: frames of one kind, and mixed ones ------------------------------------------------


def open_task(args, device, autocast):
    """-> what a run works with, a namespace; the comments say what is in it."""
    task, splits = (
        SimpleNamespace(args=args, device=device, autocast=autocast),
        open_splits(args.data, args.eval_on),
    )
    classes = splits["train"]["header"]["classes"]
    if missing := [kind for kind in KINDS if kind not in classes]:
        raise UserError(
            f"{args.data} has no frames labelled {missing[0]!r}, only {', '.join(map(str, classes))[:80]}; "
            "segment.py needs two folders of frames, drawn and photographed, and may have more of mixed "
            "ones: python data.py FOLDER"
        )
    kind = torch.full((len(classes) + 1,), -1)  # of a class: 0, 1, or -1: mixed, or without a label
    for k, name in enumerate(KINDS):
        kind[classes.index(name)] = k
    sets = {
        name: frames_of(split, kind, name == "train" and args.leave_out)
        for name, split in splits.items()
    }
    if "dev" not in sets:
        sets["dev"] = hold_apart(sets["train"])
    task.train, task.report = sets["train"], sets[args.eval_on]
    task.judged = {name: sets[name] for name in ("dev", args.eval_on)}  # choices are made on dev
    if none := [
        name for k, name in enumerate(KINDS) if not (task.train.kind[task.train.plain] == k).any()
    ]:
        raise UserError(
            f"{args.data}, train has no frames that are {none[0]}; there have to be frames of both kinds"
        )
    if args.until == 3 and args.learn_from != "frames" and not len(task.train.mixed):
        print(
            f"{args.data}, train has no mixed frames: no stage 3; --learn-from frames makes it without them"
        )
        args.until = 2
    if args.until == 3 and args.learn_from == "truth" and "drawn" not in task.train.split:
        raise UserError(
            f"{args.data} has no true masks to learn from; --learn-from proxies needs none"
        )
    task.encoder, _ = load_encoder(
        args.encoder, args.image_size or splits["train"]["images"].shape[1]
    )
    task.S = task.encoder.side * task.encoder.patch_size
    config = {k: v for k, v in vars(args).items() if k not in NO_CONFIG}
    task.config = config | {
        "encoder": fingerprint(task.encoder),
        "images": data.fingerprint(splits["train"]),
    }
    return task


def frames_of(split, kind, leave_out):
    """-> namespace: split, kind (n,) of each frame, and rows: plain ones (of one kind), mixed ones."""
    kinds = kind[split["labels"]]
    rows = torch.arange(len(kinds))
    if leave_out:
        rows = rows[~in_style(split, leave_out) | (kinds == KINDS.index("photographed"))]
    return SimpleNamespace(
        split=split, kind=kinds, plain=rows[kinds[rows] >= 0], mixed=rows[kinds[rows] < 0]
    )


def in_style(split, text):
    """ "line=bold" -> (n,) bool: is the drawing in a frame of this style?"""
    what, _, value = text.partition("=")
    strata = split["header"].get("style") or {}
    if value not in strata.get(what, ()):
        known = (
            "; ".join(f"{k}={'|'.join(v)}" for k, v in strata.items())
            or "none: the set knows no styles"
        )
        raise UserError(f"--leave-out {text} is unknown; there are: {known}")
    column = list(strata).index(what)
    return torch.from_numpy(np.array(split["style"])[:, column] == strata[what].index(value))


def hold_apart(frames):
    """A tenth of train leaves it, by group -> the namespace of what left."""
    apart = torch.from_numpy(data.hold_apart(data.groups_of(frames.split), frames.kind, data.APART))
    dev = SimpleNamespace(split=frames.split, kind=frames.kind)
    for name in ("plain", "mixed"):
        rows = getattr(frames, name)
        setattr(dev, name, rows[apart[rows]])
        setattr(frames, name, rows[~apart[rows]])
    return dev


def views(task, split, rows):
    """Yield (rows, u8 (B, S, S, 3)) of whole frames."""
    return data.whole_views(split["images"], rows, task.S, task.device)


# ---- stage 1: patches by labels of frames --------------------------------------------------------


def crops(task, images, masks, generator, share):
    """-> views u8 (B, S, S, 3), masks (B, S, S) of the same places; a `share` of them shows a part
    of another one.
    """
    boxes, flip = data.draw_boxes(len(images), generator, task.args.min_crop)
    colour = torch.rand(len(images), 3, generator=generator)
    view = data.jitter_colour(
        data.view_images(images, boxes, flip, task.S), colour, task.args.colour
    )
    return cut_together(
        view, data.view_maps(masks, boxes, flip, task.S).to(view.device), share, generator
    )


def patch_loss(task, net, rows, images, generator):
    """Cross-entropy of each patch that is shown; its label is the share of its pixels whose frame
    is drawn.
    """
    args, y, N = task.args, task.train.kind[rows].float(), net.encoder.side**2
    whole = net.decide == "cls"  # a CLS token has one label, its frame's
    view, drawn = crops(task, images, y[:, None, None], generator, 0 if whole else args.cut)
    noise = torch.rand(len(rows), N, generator=generator).to(view.device)
    ids, _ = masking.sample(noise, max(1, round(args.keep * N)))
    frame, patches = net(masked_patch_gather(view, ids, net.encoder.patch_size), ids)
    if whole:
        return F.binary_cross_entropy_with_logits(frame, y.to(view.device))
    share = F.avg_pool2d(drawn[:, None], net.encoder.patch_size).flatten(1).gather(1, ids)
    return F.binary_cross_entropy_with_logits(patches, share)


@torch.no_grad()
def set_centroids(task, net):
    """The mean patch token of each kind, over the frames of one kind in train; and the std of a
    patch's score.
    """
    net.eval()
    total, count, scores = (
        torch.zeros_like(net.centroids),
        torch.zeros(2, 1, device=task.device),
        [],
    )
    for index, view in views(task, task.train.split, task.train.plain):
        with task.autocast():
            tokens = net.encoder.features(view)[:, 1:].float().mean(1)
        one_hot = F.one_hot(task.train.kind[index], 2).float().to(task.device)
        total += one_hot.T @ tokens
        count += one_hot.sum(0)[:, None]
    net.centroids.copy_(total / count)
    some = task.train.plain[data.evenly_spaced(len(task.train.plain), 4 * data.CHUNK)]
    for _, view in views(task, task.train.split, some):
        with task.autocast():
            scores.append(net.scores(view)[1].flatten())
    net.scale.copy_(torch.cat(scores).std())


@torch.no_grad()
def judge_frames(task, net, frames):
    """-> share of the frames of one kind that are named rightly, in percent."""
    right = []
    for index, view in views(task, frames.split, frames.plain):
        with task.autocast():
            right.append((net.scores(view)[0] > 0).cpu() == (frames.kind[index] == 1))
    return round(100 * torch.cat(right).float().mean().item(), 2) if right else None


# ---- stage 2: proxy masks ------------------------------------------------------------------------


def write_proxies(task, net, out):
    """Proxy masks of all mixed frames of train -> out/drawn.safetensors, a row a frame of the
    split; others are 0.
    """
    split, S, n = task.train.split, task.S, len(task.train.split["labels"])
    chosen = torch.zeros(n, dtype=torch.bool).scatter(0, task.train.mixed, True)

    def rows():
        for index, view in progress(
            views(task, split, torch.arange(n)), "proxies", -(-n // data.CHUNK)
        ):
            found, some = np.zeros((len(index), S, S), np.uint8), chosen[index]
            if some.any():
                probability, _ = proxy_masks(net, view[some.to(view.device)], task.autocast)
                found[some.numpy()] = (255 * two_means(probability)).round().byte().cpu().numpy()
            yield found

    header = {
        "map": "drawn",
        "grid": S,
        "data_digest": data.fingerprint(split),
        "commit": train.commit(),
    }
    out.mkdir(parents=True, exist_ok=True)
    data.write_maps(data.map_file(out, "drawn", split), "drawn", rows(), (n, S, S), "U8", header)


# ---- stage 3: pixels -----------------------------------------------------------------------------


def masks_to_learn(task, rows):
    """Masks (B, ., .) fp32, 0 or 1: a frame of one kind is all of it, a mixed one is what
    --learn-from says.
    """
    kind, side = task.train.kind[rows], task.masks.shape[1]
    mixed = torch.from_numpy(np.asarray(task.masks[rows.numpy()]) > 127).float()
    if task.args.flip:
        mixed = torch.where(inverted(task, rows, side), 1 - mixed, mixed)
    return torch.where((kind < 0)[:, None, None], mixed, kind.clamp(min=0).float()[:, None, None])


def inverted(task, rows, side):
    """--flip: (B, side, side) bool, the same patches of a frame whenever it comes."""
    g = task.encoder.side
    draws = torch.stack(
        [torch.rand(g, g, generator=train.seeded(task.args.seed, 9, int(r))) for r in rows]
    )
    place = torch.arange(side) * g // side
    return (draws < task.args.flip)[:, place][:, :, place]


def pixel_loss(task, net, rows, images, generator):
    """Cross-entropy where the network answers; --balanced: what is drawn weighs as much as what is
    not.
    """
    view, drawn = crops(task, images, masks_to_learn(task, rows), generator, task.args.cut)
    logits = net(view)
    drawn = F.interpolate(drawn[:, None], size=logits.shape[1:], mode="area")[:, 0]
    loss = F.binary_cross_entropy_with_logits(logits, drawn, reduction="none")
    if not task.args.balanced:
        return loss.mean()
    share = drawn.mean().clamp(1e-3, 1 - 1e-3)
    return (loss * (0.5 * drawn / share + 0.5 * (1 - drawn) / (1 - share))).mean()


# ---- training: one loop for stages 1 and 3 -------------------------------------------------------


def fit(task, stage, net, rows, loss_of, total, lr, state, log):
    """Train `net` for `total` steps of loss_of(task, net, rows, images, generator), or what `state`
    leaves of them.
    """
    args, out, B = task.args, Path(task.args.out), min(BATCH, len(rows))
    per_epoch, optimizer = len(rows) // B, train.make_optimizer(net, lr, 0.05, (0.9, 0.999))
    step, seconds = 0, 0.0
    if state.get("stage") == stage:
        with train.taking_up(out / "state.pt"):
            load_exactly(net, state["model"], out / "state.pt")
            train.load_optimizer(optimizer, state["optimizer"])
            step, seconds = state["step"], state["seconds"]
    images = data.resident(task.train.split, task.device)
    stop_signal, meter, pacer = (
        train.catch_signals(),
        train.Meter(B, task.device, seconds),
        train.Pacer(),
    )

    def save():
        train.save_state(
            {
                "config": task.config,
                "stage": stage,
                "model": net.state_dict(),
                "step": step,
                "optimizer": optimizer.state_dict(),
                "seconds": meter.seconds(),
            },
            out / "state.pt",
        )

    bar = progress(total=total, initial=step, unit="step")
    for epoch in range(step // per_epoch, -(-total // per_epoch)):
        order = rows[data.epoch_order(len(rows), args.seed, epoch)][
            : B * (total - epoch * per_epoch)
        ]
        for index, some in meter.timed(
            data.batches(images, order, B, task.device, step % per_epoch)
        ):
            generator = train.seeded(args.seed, stage, epoch, step)
            with task.autocast():
                loss = loss_of(task, net.train(), index, some, generator)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            train.set_lr(optimizer, train.lr_at(step, total, 0.1 * total, lr))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            meter.add(loss.detach(), grad_norm)
            stop = stop_signal[0] if stop_signal else 0
            if step % LOG_EVERY == 0 or step == total or stop:
                row = meter.row(step, f"try a smaller learning rate than {lr:g}")
                log(step=FIRST[stage] + step, stage=stage, epoch=round(step / per_epoch, 3), **row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if stop or step == total or pacer.due():
                pacer.time(save)
                meter.restart()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    return meter.seconds()


# ---- how good it is ------------------------------------------------------------------------------


@torch.no_grad()
def judge(task, frames, masks_of):
    """masks_of(view) -> {version: (B, S, S)}, probabilities of drawn. -> {version: {kind: row of
    judge_masks}}.

    Beside the kinds stand all heterogeneous and all purely hybrid frames, where the set tells; {}
    without true masks.
    """
    if "drawn" not in frames.split:
        return {}
    header, pairs = frames.split["header"], {}
    for index, view in views(task, frames.split, frames.mixed):
        kinds, truth = (
            [header["classes"][c] for c in frames.split["labels"][index]],
            true_masks(frames, index, view),
        )
        for version, masks in masks_of(view).items():
            for kind, said, true in zip(kinds, masks > 0.5, truth, strict=True):
                pairs.setdefault(version, {}).setdefault(kind, []).append((said[None], true[None]))
    for some in pairs.values():
        groups = header.get("hybrid") or {"mixed": list(some)}
        some |= {
            name: [pair for kind in kinds for pair in some.get(kind, [])]
            for name, kinds in groups.items()
        }
    return {
        version: {name: judge_masks(found) for name, found in some.items() if found}
        for version, some in pairs.items()
    }


def versions(masks, coarse=None):
    """Probabilities (B, S, S) -> those to judge: at .5, with each frame's threshold, and coarse
    ones with theirs.
    """
    known = {"_known": masks} | ({} if coarse is None else {"_coarse": coarse})
    return {"": masks} | {name: two_means(some) for name, some in known.items()}


def judge_all(task, masks_of):
    """-> {split and version: {kind: row of judge_masks}} of dev and the reported split."""
    return {
        name + version: found
        for name, frames in task.judged.items()
        for version, found in judge(task, frames, masks_of).items()
    }


def true_masks(frames, rows, view):
    """(B, S, S) bool, at the side of `view`."""
    true = torch.from_numpy(np.array(frames.split["drawn"][rows.numpy()])).float()
    return (
        F.interpolate(true[:, None], size=view.shape[1:3], mode="area")[:, 0].to(view.device)
        > 127.5
    )


# ---- a run ---------------------------------------------------------------------------------------


def learn_patches(task, state, log):
    """Stage 1 -> the network, from its file where it is finished."""
    args, path = task.args, Path(task.args.patches or task.args.out) / "patches.safetensors"
    if path.exists() or args.patches:
        return load_patches(path).to(task.device)
    torch.manual_seed(args.seed)
    net = Patches(task.encoder, args.decide).to(task.device)
    total = args.epochs * (len(task.train.plain) // min(BATCH, len(task.train.plain)))
    seconds = fit(task, 1, net, task.train.plain, patch_loss, total, args.lr, state, log)
    with working("centroids"):
        set_centroids(task, net)
        row = {"seconds": seconds} | {
            name: judge_frames(task, net, some) for name, some in task.judged.items()
        }
    save_safetensors(net.state_dict(), path, {"patches": net.config, "stage": row})
    print(
        f"stage 1  frames named rightly: dev {row['dev']} %, {args.eval_on} {row[args.eval_on]} %; "
        f"{seconds:.0f} s"
    )
    return net


def make_proxies(task, net, masks_of):
    """Stage 2 -> rows of judge for dev and the reported split, of all `versions`."""
    args, out = task.args, Path(task.args.patches or task.args.out) / "proxies"
    if not len(task.train.mixed):
        print("stage 2  no mixed frames in train: there is nothing to make proxies for")
        return {}
    if not data.map_file(out, "drawn", task.train.split).exists():
        write_proxies(task, net, out)
    found = judge_all(task, masks_of)
    print(f"stage 2  proxies on {args.eval_on}: {in_words(found.get(args.eval_on + '_known', {}))}")
    return found


def learn_pixels(task, patches, state, log):
    """Stage 3 -> the segmenter, and its seconds; from its file where it is finished."""
    args, path = task.args, Path(task.args.out) / "model.safetensors"
    if path.exists():
        net, header = load_pixels(path)
        return net.to(task.device), header["seconds"]
    torch.manual_seed(args.seed)
    net = Pixels(args.network, None if args.no_hint else patches).to(task.device)
    if args.learn_from == "truth":
        task.masks = task.train.split["drawn"]
    elif args.proxies:
        task.masks = data.open_map(args.proxies, "saliency", task.train.split)
    elif args.learn_from == "proxies":
        task.masks = data.open_map(
            Path(args.patches or args.out) / "proxies", "drawn", task.train.split
        )
    else:
        task.masks = np.zeros((len(task.train.kind), 1, 1), np.uint8)
    rows = (
        task.train.plain
        if args.learn_from == "frames"
        else torch.cat([task.train.plain, task.train.mixed])
    )
    seconds = fit(task, 3, net, rows, pixel_loss, args.pixel_steps, args.pixel_lr, state, log)
    save_safetensors(
        net.state_dict(),
        path,
        {
            "network": args.network,
            "patches": net.patches and patches.config,
            "image_size": task.S,
            "seconds": seconds,
        },
    )
    return net.eval(), seconds


def run(args, device, autocast):
    """All stages up to --until -> the row of metrics. What is finished is only read."""
    task, out = open_task(args, device, autocast), Path(args.out)
    state = train.open_run(out, task.config, args.resume, RESULTS) or {}
    out.mkdir(parents=True, exist_ok=True)
    if not state:
        train.save_state({"config": task.config, "stage": 0}, out / "state.pt")
    finished = out / f"metrics{split_suffix(args.eval_on)}.json"
    if state and finished.exists() and read_json(finished, ["until"])["until"] >= args.until:
        print(f"run      {out} is finished")
        return read_json(finished)
    at = FIRST[state["stage"]] + state["step"] if state.get("stage") else -1
    log = train.Log(out / "log.jsonl", at, args.log, task.config)
    print(
        f"data     {args.data}: {len(task.train.plain)} of one kind, {len(task.train.mixed)} mixed, {task.S} px\n"
        f"run      {out}: stages 1 to {args.until}, --decide {args.decide}, --learn-from {args.learn_from}"
    )
    net = learn_patches(task, state, log)
    stage = read_header(Path(args.patches or out) / "patches.safetensors")[1]["stage"]
    row = {
        "run": out.name,
        "seed": args.seed,
        "data": args.data,
        "evaluated_on": args.eval_on,
        "until": args.until,
        "frames": stage,
    }

    def last(view):
        return versions(*proxy_masks(net, view, task.autocast))

    if args.until > 1:
        row["proxies"] = make_proxies(task, net, last)
    if args.until > 2:
        pixels, row["pixel_seconds"] = learn_pixels(task, net, state, log)

        def last(view):
            return versions(pixel_masks(pixels, view, task.autocast))

        row["pixels"] = judge_all(task, last)
        found = in_words(row["pixels"].get(args.eval_on, {}))
        print(f"stage 3  {args.eval_on}: {found}; {row['pixel_seconds']:.0f} s")
    if args.leave_out:
        mixed = task.report.mixed[in_style(task.report.split, args.leave_out)[task.report.mixed]]
        row["left_out"] = judge(
            task, SimpleNamespace(**vars(task.report) | {"mixed": mixed}), last
        ).get("", {})
    row |= {
        "config": task.config,
        "command": command(),
        "machine": train.machine(device),
        "commit": train.commit(),
    }
    save_json(row, finished)
    with drawing("overlays.png"):
        draw(task, net, last, out / f"overlays{split_suffix(args.eval_on)}.png")
    log.pictures()
    print(f"wrote    {out}/\nnext: python segment.py {shlex.quote(str(out))} PICTURE --out masks")
    return row


def in_words(found):
    some = [name for name in ("mixed", "purely") if name in found]
    return (
        ", ".join(f"{name} mean IoU {found[name]['miou']:.1f} %" for name in some)
        or "no true masks to judge by"
    )


@torch.no_grad()
def draw(task, net, masks_of, path, most=8):
    """Frames of the reported split, their true masks, patches, and what is said at last."""
    from common import plots

    frames = task.report if len(task.report.mixed) else task.train
    rows = frames.mixed if len(frames.mixed) else frames.plain
    rows = rows[data.evenly_spaced(len(rows), most)]
    _, view = next(views(task, frames.split, rows))
    with task.autocast():
        patches = (
            F.interpolate(net.scores(view)[1][:, None].float(), size=view.shape[1:3])[:, 0] > 0
        )
    masks = {"patches": patches, "mask": masks_of(view)[""] > 0.5}
    if "drawn" in frames.split:
        masks["true mask"] = true_masks(frames, rows, view)
    shown = [
        ("frame", view),
        *((name, overlay(view, mask)) for name, mask in masks.items()),
    ]
    plots.image_grid(path, "What is photographed, in orange", shown)


# ---- use -----------------------------------------------------------------------------------------


@torch.no_grad()
def mask_of(picture, masks_of, side, squared, device, mixed=False):
    """picture u8 (H, W, 3) -> probability of drawn (H, W): found at short side `side`, then carried
    to its edges.
    """
    H, W = picture.shape[:2]
    scale = side / min(H, W)
    size = (
        (side, side)
        if squared
        else tuple(min(8 * side, max(32, round(x * scale / 32) * 32)) for x in (W, H))
    )
    small = torch.from_numpy(np.array(Image.fromarray(picture).resize(size, Image.BICUBIC)))[
        None
    ].to(device)
    found = F.interpolate(masks_of(small)[:, None].float(), size=(H, W), mode="bilinear")[:, 0]
    full = torch.from_numpy(picture)[None].to(device)
    found = guided_filter(found, full, max(1, round(1 / scale))).clamp(0, 1)
    return (two_means(found) if mixed else found)[0].cpu().numpy()


def use(args, device, autocast):
    """Write NAME-mask.png (white is drawn) and NAME-overlay.png of each picture, or print shares."""
    masks_of, side, squared = load(args.encoder, device, autocast)
    if not args.share and not args.out:
        raise UserError(
            "--out DIR says where the masks go; --share prints how much is drawn instead"
        )
    refuse_unused(
        args, (("side", not squared, f"is for stage 3, and {args.encoder} stopped before it"),)
    )
    if args.out:
        claim([], Path(args.out) / ".lock")
    problems, count, table = [], 0, csv.writer(sys.stdout)
    if args.share:
        table.writerow(["picture", "drawn"])
    for key, picture in whole_pictures(args.pictures, problems):
        found = mask_of(picture, masks_of, args.side or side, squared, device, args.mixed)
        count += 1
        if args.share:
            table.writerow([key, f"{found.mean():.4f}"])
        if args.out:
            write_masks(Path(args.out), key, picture, found > 0.5)
    tell_problems(problems, count, False)
    if args.out:
        print(f"wrote    {args.out}/: masks and overlays of {count} pictures", file=sys.stderr)


def write_masks(out, key, picture, mask):
    out.mkdir(parents=True, exist_ok=True)
    name = "-".join(part for part in Path(key).with_suffix("").parts[-2:] if part.strip("./"))
    shown = overlay(torch.from_numpy(picture)[None], torch.from_numpy(mask)[None])[0].numpy()
    for what, pixels in (("mask", np.uint8(255 * mask)), ("overlay", shown)):
        path = out / f"{name}-{what}.png"
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
        args.out = f"runs/{name_of(args.encoder)}-seg{f'-s{args.seed}' if args.seed else ''}"
    if args.out is not None:
        refuse_file(args.out)
    if args.pictures:
        return use(args, device, train.autocast_of(device, dtype))
    if args.until == 3:
        Pixels(args.network)  # a missing library is said now, not after stages 1 and 2
    print(f"machine  {train.machine(device)}\n         {args.dtype}: {dtype_reason}")
    load_encoder(args.encoder)  # what is wrong with it is said before a data set is made
    args.data = str(data.open_or_pack(args.data or "datasets/hybrid"))
    run(args, device, train.autocast_of(device, dtype))


if __name__ == "__main__":
    cli(main)
