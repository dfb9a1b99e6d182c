"""DINO, a baseline: an encoder that learns from views alone, with the ViT of pretrain.py.

    python -m lab.dino --data datasets/faces20 --out runs/dino

Reads:  datasets/NAME
Writes: OUT/model.safetensors, an encoder that every stage takes, log.jsonl and state.pt
        (--resume OUT goes on from there)

Of each large crop a teacher says which of K prototypes it is like. The student says the same of
every other crop of that image, small ones, too. The teacher is the student's moving average. Its
answers are centred and sharpened: they are neither all alike nor all even (Caron et al. 2021,
arXiv:2104.14294, algorithm 1).
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import train
from common.checkpoints import resize_positions, save_network
from common.train import Parser, UserError, at_least, between, cli, quoted
from kernels.patches import all_places, masked_patch_gather
from model import SIZES, ViT

PROTOTYPES, BOTTLENECK, HIDDEN = 1024, 128, 512
MIN_CROP, JITTER = 0.4, 0.3  # smallest area of a crop; colours are multiplied by 1 +- this
SHARP, SHARPER = 0.1, 0.04  # temperatures of student and teacher
WEIGHT_DECAY, CLIP = 0.05, 3.0  # CLIP: largest norm of the gradient
CENTRE, MOMENTUM = 0.9, 0.99  # how much of centre and teacher stays in a step; it rises to 1
LARGE, SMALL = 2, 4  # crops of an image; the teacher sees the large ones


class Head(nn.Module):
    """Tokens (B, D) -> (B, K), the cosines to prototypes, the rows of a matrix."""

    def __init__(self, dim):
        super().__init__()
        first, last = nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, BOTTLENECK)
        self.layers = nn.Sequential(first, nn.GELU(), last)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, BOTTLENECK))

    def forward(self, x):
        return F.normalize(self.layers(x)) @ F.normalize(self.prototypes).T


def cls_of(encoder, view):
    """view u8 (B, s, s, 3) of any side -> CLS tokens (B, D): the positions are resized to it."""
    side = view.shape[1] // encoder.patch_size
    ids = all_places(view, encoder.patch_size)
    patches = masked_patch_gather(view, ids, encoder.patch_size)
    return encoder(patches, ids, resize_positions(encoder.pos_embed, side))[:, 0].float()


def crops(images, generator, side, shrink=1.0):
    """images u8 (B, ., ., 3) -> views u8 (B, side, side, 3); shrink: of the sides of a crop."""
    boxes, flip = data.draw_boxes(len(images), generator, MIN_CROP)
    room = boxes[:, 2:] * (1 - shrink)
    corner = boxes[:, :2] + torch.rand(len(images), 2, generator=generator) * room
    boxes = torch.cat([corner, boxes[:, 2:] - room], 1)
    draws = torch.rand(len(images), 3, generator=generator)
    return data.jitter_colour(data.view_images(images, boxes, flip, side), draws, JITTER)


def step_loss(flags, net, images, generator, t, autocast):
    """Cross-entropy of the student's answers with the teacher's, of pairs of different crops.

    images u8 (B, S, S, 3); t: the share of the run that is done. The teacher follows here, too.
    """
    small = max(1, flags.image_size // 2 // flags.patch_size) * flags.patch_size
    large = [crops(images, generator, flags.image_size) for _ in range(LARGE)]
    views = large + [crops(images, generator, small, 0.5) for _ in range(SMALL)]
    follow(net, 1 - (1 - MOMENTUM) * (1 - t))
    with autocast():
        with torch.no_grad():
            taught = [net["teacher_head"](cls_of(net["teacher"], view)) for view in large]
        said = [net["head"](cls_of(net["student"], view)) for view in views]
    said, taught = torch.stack(said), torch.stack(taught)
    loss = dino_loss(said.float(), taught.float(), net["head"].centre)
    net["head"].centre.lerp_(taught.float().mean((0, 1)), 1 - CENTRE)
    return loss


def dino_loss(said, taught, centre):
    """said (V, B, K), taught (T, B, K), the first T crops alike; centre (K,) -> a number."""
    target = ((taught - centre) / SHARPER).softmax(2)
    pairs = -torch.einsum("tbk,vbk->tv", target, (said / SHARP).log_softmax(2)) / said.shape[1]
    apart = ~torch.eye(len(taught), len(said), dtype=torch.bool, device=said.device)
    return pairs[apart].mean()


@torch.no_grad()
def follow(net, momentum):
    """The teacher takes 1 - momentum of the student."""
    for new, old in (("student", "teacher"), ("head", "teacher_head")):
        for ours, theirs in zip(net[new].parameters(), net[old].parameters(), strict=True):
            theirs.lerp_(ours, 1 - momentum)


def build(flags):
    """-> the networks by their names; what is drawn comes from --seed."""
    torch.manual_seed(flags.seed)
    size = {k: SIZES[flags.model][k] for k in ("dim", "depth", "heads")}
    try:
        net = nn.ModuleDict({"student": ViT(flags.image_size, flags.patch_size, **size)})
    except ValueError as problem:
        raise UserError(f"--model {flags.model}: {problem}") from None
    net["head"] = Head(size["dim"])
    net["head"].register_buffer("centre", torch.zeros(PROTOTYPES))
    for name, of in (("teacher", "student"), ("teacher_head", "head")):
        net[name] = copy.deepcopy(net[of]).requires_grad_(False)
    return net


def read_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="packed set")
    add("--out", metavar="DIR", help="run folder")
    add("--model", choices=SIZES, default="nano")
    add("--image-size", type=at_least(16), default=64, metavar="PX")
    add("--patch-size", type=at_least(4), default=8, metavar="PX")
    add("--epochs", type=at_least(1), default=20)
    add("--batch-size", type=at_least(2), default=64, metavar="B")
    add("--lr", type=between(1e-9, 1), default=1e-3, help="peak learning rate")
    train.add_flags(add, reports=False)
    flags = parser.parse_args()
    train.take_saved_flags(flags)
    if not (flags.resume or (flags.data and flags.out)):
        raise UserError("give --data and --out, or --resume RUN")
    return flags


def main():
    flags = read_flags()
    device, autocast, machine = train.open_machine(flags)
    print(machine)
    train_set = data.open_split(flags.data, "train")
    flags.digest = data.digest(flags.data)
    images = data.resident(train_set["images"], device)
    n = len(train_set["labels"])
    B = flags.batch_size = min(flags.batch_size, n)
    per_epoch = n // B
    total = flags.epochs * per_epoch
    net = build(flags).to(device).train()
    optimizer = train.make_optimizer(net, flags.lr, WEIGHT_DECAY)
    run = train.Run(flags, {"net": net, "optimizer": optimizer}, total, per_epoch, device)
    run.resume_or_begin()
    for epoch in range(run.step // per_epoch, flags.epochs):
        order = data.epoch_order(n, flags.seed, epoch)
        for _, batch in data.batches(images, order, B, device, run.step % per_epoch):
            generator = train.seeded(flags.seed, epoch, run.step)
            t = run.step / total
            loss = step_loss(flags, net, batch, generator, t, autocast)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net["student"].parameters(), CLIP)
            lr = train.lr_at(run.step, total, 0.1 * total, flags.lr)
            train.set_lr(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad()
            run.update(loss, norm)
            if run.logs_now:
                run.log_step(lr=lr)
            run.save_if_due()
    notes = {"step": run.step, "run": run.config}
    save_network(net["teacher"], run.out / "model.safetensors", notes, "encoder.")
    print(f"wrote    {run.out}/model.safetensors after {run.seconds():.0f} s")
    print(f"next: python probe.py {quoted(run.out)}")


if __name__ == "__main__":
    cli(main)
