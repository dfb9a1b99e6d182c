"""What stands on an encoder to name a character: pooling, neck and head; their file.

    B batch   N patches   D width of the encoder   L its blocks   C characters

The encoder's tokens are pooled to one vector per picture. The neck turns it into the embedding, by
which pictures are compared. The head turns the embedding into one logit per character. The neck is a
batch norm without parameters, as in the linear probe of MAE (He et al. 2021). BNNeck (Luo et al. 2019,
arXiv:1903.07071) is one with a learned scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import data
from common.checkpoints import file_of
from common.train import UserError, check_format, is_decayed, read_safetensors
from model import POOLS

# Keys of --head. Margins are the papers': an angle in radians, for cosface a cosine. A new name
# needs a branch in Classifier, which otherwise refuses it.
HEADS = {
    "linear": {},
    "mlp": {},
    "arcface": {"margin": 0.5, "scale": 32.0},
    "cosface": {"margin": 0.35, "scale": 32.0},
    "curricularface": {"margin": 0.5, "scale": 32.0},
    "ifa": {},
}
MARGINS = ("arcface", "cosface", "curricularface")  # the heads that are a MarginHead
HEAD_POOLS = ("mean", "cls")  # of POOLS: those of width D
HIDDEN = 512  # width of the one hidden layer of mlp
REMEDY = (
    "python -m apps.learn or finetune_lora.py makes it; if it was stopped, give its command again"
)


class MarginHead(nn.Module):
    """scale * cosine (B, C), with a margin on the true class while it trains.

    arcface         cos(theta + m) for the true class (Deng et al. 2019, arXiv:1801.07698, eq. 3)
    cosface         cos(theta) - m (Wang et al. 2018, arXiv:1801.09414, eq. 4)
    curricularface  arcface, and the cosine of a wrong class that beats it is multiplied by
                    t + cosine. t is a moving average of the true cosine. Hard examples count more
                    as training goes on (Huang et al. 2020, arXiv:2004.00288, eq. 6).
    """

    def __init__(self, dim, classes, kind, margin, scale):
        super().__init__()
        self.kind, self.margin, self.scale = kind, margin, scale
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("t", torch.zeros(()))

    def forward(self, x, labels=None):
        """x (B, D); with labels (B,) the margin is on, without them (to recognise) it is not."""
        # Pictures are compared by their cosine later, so training uses it, too. But a softmax of numbers
        # from -1 to 1 can never be sure of one class, so they are scaled (Wang et al. 2017,
        # arXiv:1704.06369).
        cosine = F.normalize(x) @ F.normalize(self.weight).T  # (B, C)
        if labels is None:
            return self.scale * cosine
        true = cosine.gather(1, labels[:, None])  # (B, 1)
        m = self.margin
        target = true - m
        if self.kind != "cosface":
            # Beyond theta = pi - m, where cos(theta + m) would rise again, it is a straight line.
            # sin = sqrt(1 - cos^2) spares an acos. At 0 the gradient of a root is infinite.
            sine = (1 - true.square()).clamp(min=1e-9).sqrt()
            rotated = true * math.cos(m) - sine * math.sin(m)
            target = torch.where(true > math.cos(math.pi - m), rotated, true - m * math.sin(m))
        if self.kind == "curricularface":
            # t is a statistic of the batch and no weight, so no gradient may reach it.
            if self.training:
                self.t.lerp_(true.detach().mean(), 0.01)
            cosine = torch.where(cosine > target, cosine * (self.t + cosine), cosine)
        return self.scale * cosine.scatter(1, labels[:, None], target)


class Fusion(nn.Module):
    """Intermediate feature aggregation, the neck of `ifa` (Rios et al. 2022): (B, D, L) -> (B, D).

    One weight a block mixes the CLS tokens of all blocks; then ReLU and LayerNorm.
    """

    def __init__(self, dim, depth):
        super().__init__()
        self.mix = nn.Linear(depth, 1)
        self.norm = nn.LayerNorm(dim)
        nn.init.constant_(self.mix.weight, 1 / depth)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x):
        return self.norm(F.relu(self.mix(x).squeeze(2)))


class Classifier(nn.Module):
    """Encoder, neck and head. `config` and the class names travel in head.safetensors."""

    def __init__(self, encoder, classes, head="linear", pool="mean", margin=None, scale=32.0):
        super().__init__()
        dim = encoder.cls_token.shape[2]  # a network of convolutions has one, too (lab/convnets.py)
        margin = HEADS[head].get("margin") if margin is None else margin
        self.config = {"head": head, "pool": pool, "margin": margin, "scale": scale, "dim": dim}
        self.encoder = encoder
        is_ifa = head == "ifa"
        depth = len(encoder.blocks)
        # The batch norm gives all encoders features of one size, so that one learning rate fits them. It
        # has no weights of its own, because a linear layer behind it can scale and shift as well. (A
        # head with a margin can't: it normalises what it reads.)
        self.neck = Fusion(dim, depth) if is_ifa else nn.BatchNorm1d(dim, 1e-6, affine=False)
        if head in MARGINS:
            self.head = MarginHead(dim, classes, head, margin, scale)
        elif head == "mlp":
            self.head = nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, classes))
        elif head in ("linear", "ifa"):
            self.head = nn.Linear(dim, classes)
        else:
            raise UserError(f"--head {head}: Classifier has no branch for it; write one")

    def pooled(self, patches, ids):
        """patches (B, K, P) at places ids (B, K) -> fp32 (B, D); for ifa the CLS tokens (B, D, L)."""
        if self.config["head"] != "ifa":
            return POOLS[self.config["pool"]](self.encoder(patches, ids).float())
        x = self.encoder.embed(patches, ids)
        every = self.encoder.run_blocks(x, every=True)  # L times (B, 1+K, D)
        return torch.stack([tokens[:, 0].float() for tokens in every], 2)

    def forward(self, pooled, labels=None):
        """pooled -> logits (B, C), the margin on where labels (B,) are given."""
        embedding = self.neck(pooled)
        if self.config["head"] in MARGINS:
            return self.head(embedding, labels)
        return self.head(embedding)


# ---- the optimizer -------------------------------------------------------------------------------


def level_of(name, depth):
    """0 for patch embedding and tokens, 1 to depth for the blocks, depth + 1 for what follows."""
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    lowest = name.startswith("encoder.") and not name.startswith("encoder.norm")
    return 0 if lowest else depth + 1


def make_optimizer(net, lr, head_lr, weight_decay, layer_decay):
    """AdamW, whose groups keep their learning rate as "peak".

    It is head_lr, and in the encoder lr * layer_decay^(levels above). Biases, norms and tokens are
    not decayed.
    """
    depth = len(net.encoder.blocks)
    groups = {}
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        # The head is new and has everything to learn. In the pre-trained encoder, what a block knows is
        # more general the lower it stands, so each level below the head changes less (Clark et al.
        # 2020, arXiv:2003.10555).
        peak = head_lr
        if name.startswith("encoder."):
            peak = lr * layer_decay ** (depth + 1 - level_of(name, depth))
        decay = weight_decay if is_decayed(name, p) else 0.0
        group = {"params": [], "peak": peak, "weight_decay": decay}
        groups.setdefault((peak, decay), group)["params"].append(p)
    # MAE, too, has beta2 0.999 for fine-tuning, and 0.95 for pre-training (He et al. 2021, appendix A).
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.999), fused=True)


# ---- whole images --------------------------------------------------------------------------------


@torch.no_grad()
def pooled_of(net, split, index, autocast, name="", mirrored=False):
    """The neck's input for whole images: fp32 (n, D) or (n, D, L) on the CPU.

    name: of a progress bar. mirrored: the mean of picture and mirror image, in twice the time. It
    tells known from unknown characters better.
    """
    pooled = []
    encoder = net.encoder
    device = encoder.cls_token.device
    for _, view in data.whole_views(split["images"], index, encoder.image_size, device, name):
        sides = (view, view.flip(2)) if mirrored else (view,)
        with autocast():
            both = [net.pooled(*encoder.all_patches(x)).cpu() for x in sides]
        pooled.append(torch.stack(both).mean(0))
    return torch.cat(pooled)


@torch.no_grad()
def predict(net, pooled):
    """The result of `pooled_of` -> logits (n, C), embeddings (n, D) on the CPU."""
    embeddings = net.neck(pooled.to(net.encoder.cls_token.device))
    return net.head(embeddings).cpu(), embeddings.cpu()


# ---- head.safetensors, which finetune_lora.py writes ---------------------------------------------


def is_recogniser(folder):
    """Did finetune_lora.py write this run folder?"""
    return file_of(folder, "head.safetensors").is_file()


def read_head(folder):
    """-> weights of neck and head, and the header."""
    path = file_of(folder, "head.safetensors")
    weights, header = read_safetensors(path, REMEDY)
    check_format(header, path)
    return weights, header
