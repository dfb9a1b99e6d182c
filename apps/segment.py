"""Stage 7: drawn or photographed? Learn from labels of whole frames, and answer for each pixel.

    python -m apps.segment runs/NAME --data datasets/hybrid
    python -m apps.segment runs/NAME-seg PICTURE... --out masks

Reads:  an encoder; a set of frames with the classes "drawn" and "photographed", and others: mixed
Writes: runs/NAME-seg/ with patches.safetensors (stage 1), model.safetensors (stage 3), state.pt,
        log.jsonl, metrics.json; for pictures the share of each that is drawn, as CSV on standard
        output, and with --out masks and overlays

1. Patches: an encoder learns from frames of one kind. A patch gets the kind of the nearest centroid.
2. Proxies: patches of mixed frames become masks by a guided filter and a threshold for each frame.
3. Pixels: a U-Net sees colours and scores of patches. It learns from proxies and frames of one kind.

In both trainings a frame shows a part of another one. True masks (plane "drawn" of the set) are for
evaluation, and for training with --learn-from truth alone. After "Hybrid compositions"
(arXiv:2410.04789), which uses a SegFormer and not a U-Net.
Shapes: B batch, n frames of a set, S side of a view in pixels, g patches on a side, K patches seen,
P numbers of a patch, D width of the encoder, H, W any sides.
"""

import csv
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import mask as masking
from common import train
from common.checkpoints import about_model, load_encoder, model_file
from common.features import name_of, open_splits, set_apart, split_suffix
from common.train import Parser, UserError, at_least, cli, parse_keys, refuse_useless
from kernels.patches import masked_patch_gather
from model import ViT

KINDS = ("photographed", "drawn")  # of a frame, a patch, a pixel: 0 or 1
NETWORKS = {"unet": {"hint": True}}  # hint=0: colours alone
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.999)  # of AdamW
CLIP = 1.0  # largest norm of the gradient
PIXEL_LR = 2e-3  # peak learning rate of stage 3
FEW = 50  # frames of a kind in train: under it a note
KEEP = 0.5  # share of the patches that stage 1 sees in training: fewer take less time
MIN_CROP, COLOUR = 0.5, 0.3  # smallest area of a crop; brightness, contrast, saturation: 1 +- this
EPS = 1e-3  # of the guided filter: contrasts under 1/30 of the range are no edges
LARGEST = 2048  # longer side of a picture whose mask is found at full size, in pixels
REMEDY = "python -m apps.segment ENCODER --data DIR makes it"


# ---- stage 1: patches ----------------------------------------------------------------------------


class Patches(nn.Module):
    """An encoder, a head for training, and the mean token of each kind (centroids)."""

    def __init__(self, encoder):
        super().__init__()
        dim = encoder.config["dim"]
        self.config = {"encoder": encoder.config}  # for blank_patches
        self.encoder = encoder
        self.head = nn.Linear(dim, 1)
        self.register_buffer("centroids", torch.zeros(2, dim))
        self.register_buffer("scale", torch.ones(()))  # standard deviation of a patch's score

    def forward(self, patches, ids):
        """patches (B, K, P), ids (B, K) -> logits of "drawn" of each patch (B, K)."""
        return self.head(self.encoder(patches, ids).float())[:, 1:, 0]

    def scores(self, view):
        """view u8 (B, S, S, 3) -> (B,) of the frame and (B, g, g) of its patches; over 0 is drawn.

        The squared distance to the photographed centroid minus that to the drawn one, scaled.
        """
        tokens = self.encoder.features(view)[:, 1:].float()  # (B, g * g, D)
        photographed, drawn = self.centroids
        scores = 2 * tokens @ (drawn - photographed)
        scores = (scores + (photographed**2).sum() - (drawn**2).sum()) / self.scale
        return scores.mean(1), scores.unflatten(1, (self.encoder.side, self.encoder.side))


def blank_patches(config):
    """Patches of a saved shape with random weights."""
    return Patches(ViT(**config["encoder"]))


def load_patches(path):
    """A run of apps/segment.py, or its patches.safetensors -> Patches in eval mode."""
    weights, header = train.read_safetensors(model_file(path, "patches.safetensors"), REMEDY)
    net = blank_patches(header["patches"])
    net.load_state_dict(weights)
    return net.eval()


def cut_masks(B, S, generator):
    """(B, S, S) bool: a half plane, a window or blobs in each frame."""
    u = torch.rand(8, B, 1, 1, generator=generator)  # the last is drawn since published runs had it
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, S)] * 2, indexing="ij")
    cy, cx, height, width = u[1:5]
    angle = 2 * math.pi * u[0]
    half_plane = x * angle.cos() + y * angle.sin() > 1.2 * cy - 0.6
    v = (y - 1.2 * cy + 0.6).abs() / (0.25 + 0.6 * height)
    h = (x - 1.2 * cx + 0.6).abs() / (0.25 + 0.6 * width)
    power = torch.where(u[5] < 0.5, 2, 20)  # an ellipse, nearly a rectangle
    window = v**power + h**power < 1
    noise = torch.randn(B, 1, 4, 4, generator=generator)
    blobs = F.interpolate(noise, size=(S, S), mode="bicubic")[:, 0] > cy - 0.5
    which = (3 * u[6, :, 0, 0]).long()
    return torch.stack([half_plane, window, blobs])[which, torch.arange(B)]


def cut_together(view, drawn, generator):
    """Frames (B, S, S, 3) and masks (B, S, S); each shows a part of another frame."""
    cut = data.send(cut_masks(len(view), view.shape[1], generator), view.device)
    return torch.where(cut[..., None], view.flip(0), view), torch.where(cut, drawn.flip(0), drawn)


def crops(task, images, masks, generator):
    """Frames u8 (B, ., ., 3), masks (B, ., .) -> augmented views (B, S, S, 3), masks (B, S, S)."""
    boxes, flip = data.draw_boxes(len(images), generator, MIN_CROP)
    colour = torch.rand(len(images), 3, generator=generator)
    view = data.jitter_colour(data.view_images(images, boxes, flip, task.S), colour, COLOUR)
    drawn = data.send(data.view_maps(masks, boxes, flip, task.S), view.device)
    return cut_together(view, drawn, generator)


def patch_loss(task, net, index, images, generator):
    """Cross-entropy of the patches seen; the target of a patch is the share of it that is drawn."""
    kind = task.train.kind[index].float()
    N = net.encoder.side**2
    patch = net.encoder.patch_size
    view, drawn = crops(task, images, kind[:, None, None], generator)
    noise = data.send(torch.rand(len(index), N, generator=generator), view.device)
    ids, _ = masking.sample(noise, max(1, round(KEEP * N)))
    logits = net(masked_patch_gather(view, ids, patch), ids)
    share = F.avg_pool2d(drawn[:, None], patch).flatten(1).gather(1, ids)
    return F.binary_cross_entropy_with_logits(logits, share)


@torch.no_grad()
def set_centroids(task, net):
    """Set the mean patch token of each kind over train, and the standard deviation of scores."""
    net.eval()
    net.scale.fill_(1.0)
    total = torch.zeros_like(net.centroids)
    count = torch.zeros(2, 1, device=task.device)
    for index, view in views(task, task.train, task.train.plain):
        with task.autocast():
            tokens = net.encoder.features(view)[:, 1:].float().mean(1)
        one_hot = data.send(F.one_hot(task.train.kind[index], 2).float(), task.device)
        total += one_hot.T @ tokens
        count += one_hot.sum(0)[:, None]
    net.centroids.copy_(total / count)
    some = task.train.plain[data.evenly_spaced(len(task.train.plain), 4 * data.CHUNK)]
    scores = []
    for _, view in views(task, task.train, some):
        with task.autocast():
            scores.append(net.scores(view)[1].flatten())
    net.scale.copy_(torch.cat(scores).std())


@torch.no_grad()
def judge_frames(task, net, frames):
    """Accuracy on frames of one kind, in percent; None without such frames."""
    if not len(frames.plain):
        return None
    right = []
    for index, view in views(task, frames, frames.plain):
        with task.autocast():
            right.append((net.scores(view)[0] > 0).cpu() == (frames.kind[index] == 1))
    return round(100 * torch.cat(right).float().mean().item(), 2)


# ---- stage 2: proxy masks ------------------------------------------------------------------------


def fine_scores(net, view):
    """view u8 (B, S, S, 3) -> (B, 2g, 2g): mean scores over frames moved by half a patch or not."""
    h = net.encoder.patch_size // 2
    g = net.encoder.side
    total, count = torch.zeros(2, len(view), 2 * g + 1, 2 * g + 1, device=view.device)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        moved = F.pad(view.permute(0, 3, 1, 2).float(), (0, dx * h, 0, dy * h), mode="replicate")
        moved = moved[..., dy * h :, dx * h :].permute(0, 2, 3, 1).to(torch.uint8).contiguous()
        cells = net.scores(moved)[1].repeat_interleave(2, 1).repeat_interleave(2, 2)
        total[:, dy : dy + 2 * g, dx : dx + 2 * g] += cells
        count[:, dy : dy + 2 * g, dx : dx + 2 * g] += 1
    return (total / count)[:, : 2 * g, : 2 * g]


def guided_filter(values, view, radius):
    """values (B, H, W) with their borders moved to the edges of view u8 (B, H, W, 3).

    In each window the result is linear in the brightness (He, Sun & Tang 2013, eq. 5, 6 and 8).
    """

    def mean(x):
        return F.avg_pool2d(x[:, None], 2 * radius + 1, 1, radius, count_include_pad=False)[:, 0]

    guide = (view.float() * view.new_tensor(data.LUMA, dtype=torch.float32)).sum(3) / 255
    m_guide, m_values = mean(guide), mean(values)
    a = (mean(guide * values) - m_guide * m_values) / (mean(guide**2) - m_guide**2 + EPS)
    return mean(a) * guide + mean(m_values - a * m_guide)


def two_means(probability):
    """Probabilities (B, S, S) of mixed frames, moved so that 0.5 is each frame's own threshold.

    The threshold lies midway between the means over and under it (Ridler & Calvard 1978). What else
    is in a frame moves all of its scores, and keeps their order.
    """

    def mean(x, where):
        return (x * where).sum((1, 2), keepdim=True) / where.sum((1, 2), keepdim=True).clamp(min=1)

    threshold = probability.mean((1, 2), keepdim=True)
    for _ in range(16):
        over = probability > threshold
        under = probability <= threshold
        threshold = (mean(probability, over) + mean(probability, under)) / 2
    return (probability + 0.5 - threshold).clamp(0, 1)


@torch.no_grad()
def proxy_masks(net, view, autocast):
    """view u8 (B, S, S, 3) -> probability of drawn (B, S, S)."""
    with autocast():
        cells = fine_scores(net.eval(), view).sigmoid()
    coarse = F.interpolate(cells[:, None], size=view.shape[1:3], mode="bilinear")[:, 0]
    return guided_filter(coarse, view, net.encoder.patch_size // 2).clamp(0, 1)


def proxies_of(task, net):
    """Masks u8 (n, S, S) of train: proxies of mixed frames, 0 elsewhere."""
    masks = np.zeros((len(task.train.kind), task.S, task.S), np.uint8)
    for index, view in views(task, task.train, task.train.mixed, "proxies"):
        probability = two_means(proxy_masks(net, view, task.autocast))
        masks[index.numpy()] = (255 * probability).round().byte().cpu().numpy()
    return masks


# ---- stage 3: pixels -----------------------------------------------------------------------------


class Pixels(nn.Module):
    """A U-Net; it sees colours, and the scores of stage 1 where `patches` are given."""

    def __init__(self, patches=None):
        super().__init__()
        self.patches = patches
        self.net = UNet(3 + (patches is not None))
        self.net.to(memory_format=torch.channels_last)

    def forward(self, view):
        """view u8 (B, H, W, 3), any size -> logits of "drawn" (B, h, w) fp32; h, w: the network's."""
        x = view.permute(0, 3, 1, 2).float()
        seen = [x / 127.5 - 1] if self.patches is None else [x / 127.5 - 1, self.hint(x)]
        return self.net(torch.cat(seen, 1))[:, 0].float()

    @torch.no_grad()
    def hint(self, x):
        """Colours (B, 3, H, W), 0 to 255 -> scores of patches (B, 1, H, W); no gradient."""
        side = self.patches.encoder.image_size
        small = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True).round().byte()
        _, scores = self.patches.scores(small.permute(0, 2, 3, 1).contiguous())
        return F.interpolate(scores[:, None], size=x.shape[2:], mode="bilinear")


class UNet(nn.Module):
    """Convolutions, down to 1/16 of the side and up to 1/2 (Ronneberger, Fischer & Brox 2015).

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
        x = self.down[0](self.stem(x))
        seen = []
        for down in self.down[1:]:
            seen.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in self.up:
            before = seen.pop()
            x = up(torch.cat([F.interpolate(x, size=before.shape[2:]), before], 1))
        return self.out(x)


def convs(*widths, size=3, stride=1):
    """A convolution, BatchNorm and ReLU from each width to the next."""
    layers = []
    for a, b in itertools.pairwise(widths):
        conv = nn.Conv2d(a, b, size, stride, size // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


def is_segmenter(path):
    """Did apps/segment.py write this run folder?"""
    return "network" in about_model(path)


def load(path):
    """A run of apps/segment.py -> Pixels in eval mode, header of model.safetensors."""
    weights, header = train.read_safetensors(model_file(path), REMEDY)
    if "network" not in header:
        raise UserError(f"{path} makes no masks; {REMEDY}")
    config = header.get("patches")
    net = Pixels(config and blank_patches(config))
    net.load_state_dict(weights)
    return net.eval(), header


@torch.no_grad()
def pixel_masks(net, view, autocast):
    """view u8 (B, H, W, 3) -> probability of drawn (B, H, W)."""
    with autocast():
        logits = net(view)
    return F.interpolate(logits[:, None], size=view.shape[1:3], mode="bilinear")[:, 0].sigmoid()


def masks_to_learn(task, index):
    """Masks (B, ., .) fp32, 0 or 1: of a mixed frame from task.masks, else all of it is one kind."""
    kind = task.train.kind[index][:, None, None]
    mixed = torch.from_numpy(np.asarray(task.masks[index.numpy()]) > 127).float()
    return torch.where(kind < 0, mixed, kind.clamp(min=0).float())


def pixel_loss(task, net, index, images, generator):
    """Cross-entropy at the size of the network's answer."""
    view, drawn = crops(task, images, masks_to_learn(task, index), generator)
    logits = net(view)
    drawn = F.interpolate(drawn[:, None], size=logits.shape[1:], mode="area")[:, 0]
    return F.binary_cross_entropy_with_logits(logits, drawn)


# ---- evaluation ----------------------------------------------------------------------------------


def judge_masks(pairs):
    """Pairs of (predicted, true) masks (B, H, W) bool -> IoU over all of them, of each kind, in %."""
    both, either = torch.zeros(2), torch.zeros(2)
    for predicted, true in pairs:
        for kind, (a, b) in enumerate([(~predicted, ~true), (predicted, true)]):
            both[kind] += (a & b).sum().cpu()
            either[kind] += (a | b).sum().cpu()
    iou = 100 * both / either.clamp(min=1)
    row = {"iou_drawn": iou[1], "iou_photographed": iou[0], "miou": iou.mean()}
    return {k: round(x.item(), 2) for k, x in row.items()}


@torch.no_grad()
def judge(task, masks_of):
    """masks_of(view) -> probabilities (B, S, S); {split: {kind: row of judge_masks}} of them.

    "_known" behind a split's name: each frame has its own threshold. The set names groups of kinds
    ("mixed", "purely"), which have rows, too. {} without true masks.
    """
    pairs = {}
    for name, frames in task.judged.items():
        if "drawn" not in frames.split:
            continue
        for index, view in views(task, frames, frames.mixed):
            masks = masks_of(view)
            true = data.take(frames.split["drawn"], index, view.device)[:, None].float()
            truth = F.interpolate(true, size=view.shape[1:3], mode="area")[:, 0] > 127.5
            for version, predicted in ((name, masks), (f"{name}_known", two_means(masks))):
                of_kind = pairs.setdefault(version, {})
                for i, mask, true in zip(index, predicted > 0.5, truth, strict=True):
                    for kind in kinds_of(frames.split, i):
                        of_kind.setdefault(kind, []).append((mask[None], true[None]))
    return {v: {k: judge_masks(p) for k, p in some.items()} for v, some in pairs.items()}


def kinds_of(split, row):
    """The class of a frame, and the groups of classes that it is in."""
    header = split["header"]
    kind = header["classes"][split["labels"][row]]
    groups = header.get("hybrid") or {"mixed": header["classes"]}
    return [kind, *(name for name, kinds in groups.items() if kind in kinds)]


def overlay(picture, mask):
    """picture u8 (H, W, 3), mask (H, W) bool -> u8, with orange over what is not drawn."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    tinted = (0.35 * levels + 0.65 * np.float32([230, 159, 0])).round()  # (256, 3)
    # A table of levels, because floats of a large picture would be gigabytes.
    tinted = Image.fromarray(picture).point(np.uint8(tinted).T.ravel().tolist())
    return np.where(mask[..., None], picture, np.array(tinted))


# ---- a run ---------------------------------------------------------------------------------------


@dataclass
class Task:
    """What a run works with."""

    train: SimpleNamespace  # frames, as of `frames_of`
    judged: dict  # {"dev" and the split that is reported: frames}
    encoder: ViT
    S: int  # side of a view in pixels
    device: torch.device
    autocast: partial
    masks: np.ndarray | None = None  # (n, ., .) of train, which stage 3 learns from


@dataclass
class Stage:
    """A network, and how it learns."""

    number: int  # 1 or 3
    net: nn.Module
    index: torch.Tensor  # frames of train to learn from
    loss: Callable  # of task, net, index, frames, generator
    lr: float  # the peak learning rate
    first: int = 0  # step of the run
    steps: int = 0  # 0: it has learned in another run
    optimizer: torch.optim.Optimizer | None = None


def open_task(flags, device, autocast):
    """Frames of each split, and the encoder."""
    splits = open_splits(flags.data, flags.split)
    flags.digest = data.digest(flags.data)
    for kind in KINDS:
        if kind not in splits["train"]["header"]["classes"]:
            fix = "python data.py FOLDER packs the folders drawn, photographed, and more of mixed frames"
            raise UserError(f"{flags.data} has no frames labelled {kind!r}; {fix}")
    fitted, chosen, where = set_apart(splits)
    frames = frames_of(splits["train"], fitted)
    held = splits[flags.split]
    report = frames_of(held, torch.arange(len(held["labels"])))
    judged = {"dev": frames_of(splits[where], chosen), flags.split: report}
    counts = frames.kind[frames.plain].bincount(minlength=len(KINDS))
    fewest = int(counts.argmin())
    if not counts[fewest]:
        raise UserError(f"{flags.data} has in train frames of one kind alone; both are needed")
    if counts[fewest] < FEW:
        print(f"note     {counts[fewest]} {KINDS[fewest]} frames are few: many masks will be wrong")
    if flags.learn_from == "truth" and "drawn" not in frames.split:
        raise UserError(f"{flags.data} has no true masks; --learn-from proxies needs none")
    if flags.learn_from != "frames" and not len(frames.mixed):
        raise UserError(f"{flags.data} has no mixed frames; --learn-from frames needs none")
    encoder = load_encoder(flags.encoder, splits["train"]["images"].shape[1])
    return Task(frames, judged, encoder, encoder.image_size, device, autocast)


def frames_of(split, index):
    """Some frames of a split: kind (n,) of all, -1 if mixed, and the index of plain and of mixed ones."""
    kind = torch.full((len(split["header"]["classes"]) + 1,), -1)  # the last: without a label
    for k, name in enumerate(KINDS):
        kind[split["header"]["classes"].index(name)] = k
    kind = kind[split["labels"]]
    plain = index[kind[index] >= 0]
    mixed = index[kind[index] < 0]
    return SimpleNamespace(split=split, kind=kind, plain=plain, mixed=mixed)


def views(task, frames, index, name=""):
    """Yield (index, u8 (B, S, S, 3)) of whole frames; name: of a bar."""
    return data.whole_views(frames.split["images"], index, task.S, task.device, name)


def fit(task, run, part, seed):
    """Train the network of a stage from the run's step to the last step of the stage."""
    images = data.resident(task.train.split["images"], task.device)
    done = run.step - part.first  # steps of this stage
    B = min(run.batch_size, len(part.index))
    per_epoch = len(part.index) // B
    for epoch in range(done // per_epoch, math.ceil(part.steps / per_epoch)):
        order = part.index[data.epoch_order(len(part.index), seed, epoch)]
        order = order[: B * (part.steps - epoch * per_epoch)]  # the last epoch may be a part of one
        batches = data.batches(images, order, B, task.device, done % per_epoch)
        for index, frames in batches:
            generator = train.seeded(seed, part.number, epoch, done)
            with task.autocast():
                loss = part.loss(task, part.net.train(), index, frames, generator)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(part.net.parameters(), CLIP)
            lr = train.lr_at(done, part.steps, 0.1 * part.steps, part.lr)
            train.set_lr(part.optimizer, lr)
            part.optimizer.step()
            part.optimizer.zero_grad()
            run.update(loss, grad_norm)
            done += 1
            if done % train.LOG_EVERY == 0 or done == part.steps or run.stop:
                run.log_step(stage=part.number, epoch=round(done / per_epoch, 3))
                run.save_if_due()


def patch_stage(flags, task):
    """Stage 1: patches learn from frames of one kind, or are taken from another run."""
    index = task.train.plain
    if flags.patches:
        net = load_patches(flags.patches).to(task.device)
        size = net.encoder.image_size
        if size != task.S:
            fix = f"pack the set with --size {size}, or leave out --patches"
            why = f"reads {size} px, and {flags.data} has {task.S} px"
            raise UserError(f"{flags.patches} {why}; {fix}")
        return Stage(1, net, index, patch_loss, flags.lr)
    torch.manual_seed(flags.seed)
    net = Patches(task.encoder).to(task.device)
    steps = flags.epochs * (len(index) // min(flags.batch_size, len(index)))
    optimizer = train.make_optimizer(net, flags.lr, WEIGHT_DECAY, BETAS)
    return Stage(1, net, index, patch_loss, flags.lr, steps=steps, optimizer=optimizer)


def pixel_stage(flags, task, one):
    """Stage 3: pixels learn from frames of one kind and of mixed ones; `one` is stage 1."""
    index = task.train.plain
    if flags.learn_from != "frames":
        index = torch.cat([index, task.train.mixed])
    _, keys = parse_keys(flags.network, NETWORKS, "--network")
    torch.manual_seed(flags.seed)
    net = Pixels(one.net if keys["hint"] else None).to(task.device)
    optimizer = train.make_optimizer(net.net, PIXEL_LR, WEIGHT_DECAY, BETAS)
    return Stage(3, net, index, pixel_loss, PIXEL_LR, one.steps, flags.pixel_steps, optimizer)


def learn_patches(flags, task, run, one):
    """Train stage 1, set the centroids, write patches.safetensors -> its accuracies."""
    fit(task, run, one, flags.seed)
    set_centroids(task, one.net)
    row = {name: judge_frames(task, one.net, some) for name, some in task.judged.items()}
    run.save()
    header = {"patches": one.net.config}
    train.save_safetensors(one.net.state_dict(), run.out / "patches.safetensors", header)
    if row[flags.split] is not None:
        print(f"stage 1  {row[flags.split]} % of the frames of one kind in {flags.split} are right")
    return row


def learn_pixels(flags, task, run, one, three):
    """Stages 2 and 3: make the masks, train, write model.safetensors -> seconds of the training."""
    task.masks = np.zeros((len(task.train.kind), 1, 1), np.uint8)
    if flags.learn_from == "truth":
        task.masks = task.train.split["drawn"]
    elif flags.learn_from == "proxies":
        task.masks = proxies_of(task, one.net)
    start = run.seconds() if run.step == three.first else None  # None: it was stopped in this stage
    fit(task, run, three, flags.seed)
    run.save()
    header = {"network": "unet", "patches": three.net.patches and one.net.config}
    header |= {"image_size": task.S, "run": {"data": flags.data, "encoder": flags.encoder}}
    train.save_safetensors(three.net.state_dict(), run.out / "model.safetensors", header)
    return None if start is None else run.seconds() - start


def run_stages(flags, device, autocast):
    """All stages, or what a resumed run has left of them, and metrics.json."""
    task = open_task(flags, device, autocast)
    one = patch_stage(flags, task)
    three = pixel_stage(flags, task, one)
    parts = {"model": three.net, "optimizer": three.optimizer}
    if one.steps:
        parts |= {"patches": one.net, "patches_optimizer": one.optimizer}
    per_epoch = max(1, len(one.index) // flags.batch_size)
    run = train.Run(flags, parts, one.steps + three.steps, per_epoch, device)
    run.resume_or_begin()
    frames = f"{len(one.index)} frames of one kind, {len(task.train.mixed)} mixed"
    print(f"data     {flags.data}: {frames}, {task.S} px\nrun      {run.out}")
    held = flags.split
    row = {"run": run.out.name, "seed": flags.seed, "data": flags.data, "evaluated_on": held}
    if one.steps:
        row["frames"] = learn_patches(flags, task, run, one)
    row["proxies"] = judge(task, lambda view: proxy_masks(one.net, view, autocast))
    row["pixel_seconds"] = learn_pixels(flags, task, run, one, three)
    row["pixels"] = judge(task, lambda view: pixel_masks(three.net.eval(), view, autocast))
    row |= {"config": run.config, "command": flags.command}
    row |= {"machine": train.machine(device), "commit": train.commit()}
    train.save_json(row, run.out / f"metrics{split_suffix(held)}.json")
    for stage, name in (("stage 2", "proxies"), ("stage 3", "pixels")):
        for kind, scores in row[name].get(held, {}).items():
            print(f"{stage}  {name}, {kind} frames: mean IoU {scores['miou']:.1f} %")
    print(f"wrote    {run.out}/")
    print(f"next: python -m apps.segment {train.quoted(run.out)} PICTURE --out masks")


# ---- pictures ------------------------------------------------------------------------------------


def mask_of(net, picture, side, autocast, mixed=False):
    """picture u8 (H, W, 3) -> probability of drawn (H, W), found at short side `side`.

    A guided filter moves its borders to the picture's edges; its time grows with the square of the
    size, so it works on a copy of at most LARGEST pixels a side. mixed: see two_means.
    """
    H, W = picture.shape[:2]
    ratio = min(1, LARGEST / max(H, W))
    device = next(net.parameters()).device
    size = [max(1, round(ratio * x)) for x in (W, H)]
    copy = Image.fromarray(picture).resize(size, Image.BICUBIC)
    guide = torch.from_numpy(np.array(copy))[None].to(device)
    scale = side / min(size)
    seen = [min(8 * side, max(32, round(x * scale / 32) * 32)) for x in size]
    small = torch.from_numpy(np.array(copy.resize(seen, Image.BICUBIC)))[None].to(device)
    probability = pixel_masks(net, small, autocast)[:, None].float()
    probability = F.interpolate(probability, size=guide.shape[1:3], mode="bilinear")[:, 0]
    probability = guided_filter(probability, guide, max(1, round(1 / scale))).clamp(0, 1)
    probability = two_means(probability) if mixed else probability
    return F.interpolate(probability[:, None], size=(H, W), mode="bilinear")[0, 0].cpu().numpy()


def use(flags, device, autocast):
    """Print the share of each picture that is drawn; --out: write its mask and an overlay."""
    from apps.pictures import save_pngs, tell_problems
    from ingest.pictures import whole_pictures

    net, header = load(flags.encoder)
    net.to(device)
    out, mixed = flags.out, flags.mixed
    problems = []
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["picture", "drawn"])
    for key, picture in whole_pictures(flags.pictures, problems):
        probability = mask_of(net, picture, header["image_size"], autocast, mixed)
        drawn = probability > 0.5
        table.writerow([key, f"{drawn.mean():.4f}"])
        if out:
            mask = np.uint8(255 * drawn)  # white is drawn
            save_pngs(out, key, {"-mask": mask, "-overlay": overlay(picture, drawn)})
    tell_problems(problems, header["run"]["data"])


# ---- the command ---------------------------------------------------------------------------------


def parse_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("encoder", metavar="ENCODER", nargs="?", help="a run or checkpoint; for pictures a run-seg")
    add("pictures", nargs="*", metavar="PICTURE", help="file, folder (a video's frames), archive")
    add = parser.add_argument_group("training").add_argument
    add("--data", default="datasets/hybrid", metavar="DIR", help="packed set of frames")
    add("--patches", metavar="RUN", help="take stage 1 from another run of apps/segment.py")
    add("--epochs", type=at_least(1), default=70, help="of stage 1: passes over frames of one kind")
    add("--lr", type=at_least(0, float), default=5e-4, help="peak learning rate of stage 1")
    sources = ["proxies", "frames", "truth"]
    add("--learn-from", default="proxies", choices=sources, help="of stage 3; frames: of one kind")
    add("--network", default="unet", help="of stage 3; unet:hint=0: colours alone")
    add("--pixel-steps", type=at_least(1), default=800, metavar="N", help="of stage 3")
    add("--batch-size", type=at_least(1), default=32, metavar="B", help="frames of a step")
    add = parser.add_argument_group("pictures").add_argument
    add("--mixed", action="store_true", help="all hold both kinds: each gets its own threshold")
    add = parser.add_argument_group("run and machine").add_argument
    add("--out", metavar="DIR", help="run folder (default: runs/NAME-seg); for pictures a folder")
    train.add_flags(add)
    flags = parser.parse_intermixed_args()  # flags may stand between pictures
    parse_keys(flags.network, NETWORKS, "--network")  # now, and not when pictures are packed
    if flags.pictures:
        refuse_useless(flags.given - {"mixed", "out", "device", "dtype"}, "on pictures")
    else:
        refuse_useless(flags.given & {"mixed"}, "on training")
    if flags.patches:
        refuse_useless(flags.given & {"epochs", "lr"}, "beside --patches")
    return flags


def main():
    flags = parse_flags()
    train.take_saved_flags(flags, "split")
    device, autocast, machine = train.open_machine(flags)
    if flags.pictures:
        return use(flags, device, autocast)
    name = train.run_name(flags, f"{name_of(flags.encoder)}-seg", only={"seed"})
    train.set_defaults(flags, out=f"runs/{name}", command=train.command())
    print(machine)
    load_encoder(flags.encoder)  # before a data set is made
    flags.data = str(data.open_or_pack(flags.data))
    run_stages(flags, device, autocast)


if __name__ == "__main__":
    cli(main)
