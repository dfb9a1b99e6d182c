"""Drawn or photographed: the networks of segment.py, masks between patches and pixels, and how masks are judged.

B batch   S side of a view in pixels   g patches on a side   K patches seen   D width   H, W sides
          of any picture
"""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from common.checkpoints import blank_encoder, load_exactly
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
from common.io import UserError, read_header, read_safetensors
from model import shape_of

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
