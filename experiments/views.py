"""SimCLR and DINO: encoders that learn from views alone, with the ViT, crops and optimizer of pretrain.py. Baselines.

    python -m experiments.views dino --data datasets/faces20 --out runs/dino

Reads:  datasets/NAME
Writes: OUT/model.safetensors, an encoder that every stage takes, and log.jsonl

simclr  two crops of each image; each finds the other one among all crops of the batch by its CLS
        token (Chen et al. 2020, arXiv:2002.05709; common/agreement.py)
dino    of each large crop a teacher says which of K prototypes it is like; the student says the
        same of every other crop of that image, small ones, too. The teacher is the student's moving
        average. Its answers are centred and sharpened: they are neither all alike nor all even
        (Caron et al. 2021, arXiv:2104.14294, algorithm 1)
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import train
from common.agreement import Agreement
from common.checkpoints import resize_positions
from common.command import Parser, at_least, between, claim, cli, progress
from common.lora import save_encoder
from kernels.gather import masked_patch_gather
from model import SIZES, ViT

PROTOTYPES, BOTTLENECK, HIDDEN = 1024, 128, 512
SHARP, SHARPER = 0.1, 0.04  # temperatures of student and teacher
CENTRE, LARGE = 0.9, 2  # how much of the centre stays in a step; crops that the teacher sees


class Head(nn.Module):
    """DINO's: tokens (B, D) -> (B, K), the cosines to prototypes, which are the rows of a matrix of
    unit length.
    """

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, BOTTLENECK)
        )
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, BOTTLENECK))

    def forward(self, x):
        return F.normalize(self.layers(x)) @ F.normalize(self.prototypes).T


def cls_of(encoder, view):
    """view u8 (B, s, s, 3) of any side -> CLS tokens (B, D): the positions are resized to it."""
    side = view.shape[1] // encoder.patch_size
    ids = torch.arange(side**2, device=view.device).expand(len(view), -1).contiguous()
    patches = masked_patch_gather(view, ids, encoder.patch_size)
    return encoder(patches, ids, resize_positions(encoder.pos_embed, side))[:, 0].float()


def crops(args, images, generator, side, shrink=1.0):
    """images u8 (B, ., ., 3) -> views u8 (B, side, side, 3); shrink: of the sides of a crop."""
    boxes, flip = data.draw_boxes(len(images), generator, args.min_crop)
    room = boxes[:, 2:] * (1 - shrink)
    corner = boxes[:, :2] + torch.rand(len(images), 2, generator=generator) * room
    boxes = torch.cat([corner, boxes[:, 2:] - room], 1)
    draws = torch.rand(len(images), 3, generator=generator)
    return data.jitter_colour(data.view_images(images, boxes, flip, side), draws, args.jitter)


def simclr(args, net, rows, images, generator, t):
    """NT-Xent of 2B views."""
    views = torch.stack(
        [crops(args, images, generator, args.image_size) for _ in range(2)], 1
    ).flatten(0, 1)
    with args.autocast():
        summary = cls_of(net["student"], views)
    return net["agreement"](summary, rows.repeat_interleave(2))


def dino(args, net, rows, images, generator, t):
    """Cross-entropy of the student's answers with the teacher's, of pairs of different crops."""
    small = args.image_size // 2 // args.patch_size * args.patch_size
    large = [crops(args, images, generator, args.image_size) for _ in range(LARGE)]
    views = large + [crops(args, images, generator, small, 0.5) for _ in range(args.small)]
    follow(net, 1 - (1 - args.momentum) * (1 - t))
    with args.autocast():
        with torch.no_grad():
            taught = torch.stack(
                [net["teacher_head"](cls_of(net["teacher"], view)) for view in large]
            )
        said = torch.stack([net["head"](cls_of(net["student"], view)) for view in views])
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


METHODS = {"simclr": simclr, "dino": dino}


def build(args, train_set):
    """-> the networks by their names; what is drawn comes from --seed."""
    torch.manual_seed(args.seed)
    size = {k: SIZES[args.model][k] for k in ("dim", "depth", "heads")}
    net = nn.ModuleDict({"student": ViT(args.image_size, args.patch_size, **size)})
    if args.method == "simclr":
        net["agreement"] = Agreement(
            size["dim"], train_set, {"temperature": args.temperature, "dcl": 0}
        )
        return net
    net["head"] = Head(size["dim"])
    net["head"].register_buffer("centre", torch.zeros(PROTOTYPES))
    for name, of in (("teacher", "student"), ("teacher_head", "head")):
        net[name] = copy.deepcopy(net[of]).requires_grad_(False)
    return net


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("method", choices=METHODS)
    add("--data", required=True, metavar="DIR", help="packed set")
    add("--out", required=True, metavar="DIR", help="run folder")
    add("--model", choices=SIZES, default="nano")
    add("--image-size", type=at_least(16), default=64, metavar="PX")
    add("--patch-size", type=at_least(4), default=8, metavar="PX")
    add("--epochs", type=at_least(1), default=20)
    add("--batch-size", type=at_least(2), default=64, metavar="B")
    add("--lr", type=between(1e-9, 1), default=1e-3, help="peak learning rate")
    add(
        "--min-crop",
        type=between(0.01, 1),
        default=0.4,
        metavar="AREA",
        help="smallest share of an image in a crop",
    )
    add(
        "--jitter",
        type=between(0, 1),
        default=0.3,
        metavar="J",
        help="brightness, contrast, saturation times 1 +- J",
    )
    add("--temperature", type=between(0.01, 1), default=0.1, metavar="T", help="of simclr")
    add("--small", type=at_least(0), default=4, metavar="N", help="small crops, of dino")
    add(
        "--momentum",
        type=between(0, 1),
        default=0.99,
        metavar="M",
        help="of dino's teacher, rising to 1",
    )
    add("--seed", type=at_least(0), default=0)
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"])
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.out)
    claim([out / "model.safetensors"], out / ".lock")
    device = train.pick_device(args.device)
    args.autocast = train.autocast_of(device, train.pick_dtype(args.dtype, device)[0])
    train_set = data.open_split(args.data, "train")
    net, n = build(args, train_set).to(device).train(), len(train_set["labels"])
    B = min(args.batch_size, n)
    images, total, step = data.resident(train_set, device), args.epochs * (n // B), 0
    optimizer = train.make_optimizer(net, args.lr, 0.05)
    config = {
        k: v for k, v in vars(args).items() if k not in ("given", "autocast", "out", "device")
    }
    out.mkdir(parents=True, exist_ok=True)
    log, meter = train.Log(out / "log.jsonl", -1), train.Meter(B, device)
    bar = progress(total=total, unit="step")
    for epoch in range(args.epochs):
        order = data.epoch_order(n, args.seed, epoch)
        for rows, batch in meter.timed(data.batches(images, order, B, device)):
            loss = METHODS[args.method](
                args, net, rows, batch, train.seeded(args.seed, epoch, step), step / total
            )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net["student"].parameters(), 3.0)
            lr = train.set_lr(optimizer, train.lr_at(step, total, 0.1 * total, args.lr))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            meter.add(loss.detach(), norm)
        row = meter.row(step, f"try a smaller --lr than {args.lr:g}")
        log(step=step, epoch=epoch + 1, lr=lr, **row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    bar.close()
    encoder = net["teacher" if args.method == "dino" else "student"]
    save_encoder(
        encoder, out / "model.safetensors", {"step": step, "run": config | {"data": args.data}}
    )
    print(
        f"wrote    {out}/model.safetensors after {meter.seconds():.0f} s; next: python probe.py {out}"
    )


if __name__ == "__main__":
    cli(main)
