"""What masks follow: a teacher's attention, maps from files, predicted losses, and pixels.

    attn        attention of a teacher: the average of the run, another encoder, or apps/maps.py
    fg          share of foreground: true masks of the data, or apps.maps --map saliency
    parts       shares of eyes, hair, clothes, ...: true parts of the data, or apps.maps --map parts
    difficulty  loss that a small network predicts, which learns during the run
    view        no score, but the pixels, of which a strategy of mask.py computes its own

Maps belong to whole images, and are cropped and flipped as the images are.

    B views   N = g * g patches of a view   M hidden patches   P parts   n training images
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from common.checkpoints import beside, model_file
from common.command import progress
from common.io import UserError
from kernels.gather import all_places, masked_patch_gather
from model import Block, init_weights, sincos_positions

IN_FILES = {"attn": "attn", "fg": "saliency", "parts": "parts"}  # score: the map of apps/maps.py
NAMES = {"attn": "attention", "fg": "foreground", "parts": "parts", "difficulty": "predicted loss"}
TRUTH = {"fg": "foreground masks", "parts": "part masks"}  # true maps that a data set may hold
ATTENTION = ("pooler", "rollout", "cls", "outlier")  # kinds of it; see `attention`
SAMPLE = 1024  # images that the mean token of each place is taken from, for `outlier`
HALF_LIFE = 0.015  # share of a run after which half of the teacher is new; 99 % after a tenth


# ---- where a score comes from --------------------------------------------------------------------
# One class for each source. pretrain.py calls the same methods of all of them.


class Source:
    """Where a score comes from. This base class is the source of masks that follow none, such as random."""

    teacher = None  # a Teacher, whose attention is the score
    predictor = None  # a network that predicts the score
    file = None  # of the teacher's maps, which a resumed run opens again

    def networks(self):
        """{name: network} of those that are saved with the run."""
        return {}

    def state_dict(self):
        return {"maps": self.file}

    def load_state_dict(self, state):
        """Nothing to restore; TeacherScore opens its maps."""

    def scores(self, index, boxes, flip, view):
        """What a strategy reads, {name: tensor}, of views u8 (B, S, S, 3), cut from images `index`.

        A score is (B, N), that of parts (B, N, P), and "view" is the views themselves.
        """
        return {}

    def loss(self, ids_mask, error):
        """The loss of a network that predicts the score, by the errors (B, M) of hidden patches."""
        return 0.0

    def update_teacher(self, encoder, step, total):
        """After an update of the encoder: the teacher follows it."""


class ViewScore(Source):
    """view: the strategy computes a score of its own from the pixels, as `detail` does in mask.py."""

    def __init__(self, shuffle=False):
        self.shuffle = shuffle

    def scores(self, index, boxes, flip, view):
        # The control: each mask follows the view before its own, so that only the content is lost.
        return {"view": view.roll(1, 0) if self.shuffle else view}


class PredictedScore(Source):
    """difficulty: the loss that a small network expects in each patch. It learns during the run."""

    def __init__(self, encoder, autocast, shuffle=False):
        self.side, self.patch = encoder.side, encoder.patch_size
        self.autocast, self.shuffle = autocast, shuffle
        self.predictor = LossPredictor(self.side, self.patch)

    def networks(self):
        return {"predictor": self.predictor}

    def scores(self, index, boxes, flip, view):
        patches = masked_patch_gather(view, all_places(view, self.patch), self.patch)
        with self.autocast():
            self.predicted = self.predictor(patches).float()  # (B, N)
        score = self.predicted.detach()
        return {"difficulty": score.roll(1, 0) if self.shuffle else score}

    def loss(self, ids_mask, error):
        # By what `scores` has predicted for this very batch.
        return ranking_loss(self.predicted.gather(1, ids_mask), error)


class MapScore(Source):
    """attn, fg or parts, from maps (n, G, G) of the training images; parts: how many a map has."""

    def __init__(self, name, encoder, maps=None, parts=0, shuffle=False):
        self.name, self.side = name, encoder.side
        self.maps, self.parts = maps, parts
        self.shuffle = shuffle

    def scores(self, index, boxes, flip, view):
        """1 everywhere before there are maps. With shuffle, the map of another image, under this crop."""
        if self.maps is None:
            return {self.name: torch.ones(len(index), self.side**2, device=boxes.device)}
        index = index.roll(1) if self.shuffle else index
        if self.name == "parts":
            return {"parts": crop_parts(self.maps, index, boxes, flip, self.side, self.parts)}
        return {self.name: crop_map(self.maps, index, boxes, flip, self.side)}


class TeacherScore(MapScore):
    """attn: the attention of a teacher, kept as maps that it makes at the start of some epochs.

    A map for every crop would add 57.5 % to a step (results/bench_masks.csv), because the teacher
    reads all patches and the encoder a quarter. Maps of whole images are made a few times, and cropped
    as the images.
    """

    def __init__(self, encoder, teacher, out, shuffle=False):
        super().__init__("attn", encoder, shuffle=shuffle)
        self.teacher, self.out = teacher, Path(out)

    def networks(self):
        return {"teacher": self.teacher.encoder} if self.teacher.learns else {}

    def load_state_dict(self, state):
        if state["maps"]:
            self.open_maps(Path(state["maps"]).name)

    def open_maps(self, name):
        """Take the teacher's maps from this file of the run."""
        self.file = name
        self.maps = data.open_tensors(self.out / name)["attn"]

    def update_teacher(self, encoder, step, total):
        if self.teacher.learns:
            self.teacher.update(encoder, step, total)


def as_pictures(scores):
    """Scores (B, N) or (B, N, P) -> {name: (B, g, g)}; for parts, the largest part of each patch.

    The view is no score. What a strategy computes of it is in the priority that it returns.
    """
    pictures = {}
    for name, score in scores.items():
        if name == "view":
            continue
        score = score.argmax(2) if score.dim() == 3 else score
        side = math.isqrt(score.shape[1])
        pictures[NAMES.get(name, name)] = score.unflatten(1, (side, side))
    return pictures


# ---- the teacher ---------------------------------------------------------------------------------


class Teacher:
    """The encoder whose attention masks follow; it learns if it is the average of the run's encoder.

    attention_kind: how its attention is read (`attention`); epochs: at whose start it makes maps of
    all images.
    """

    def __init__(self, encoder, attention_kind, epochs, learns=False):
        check_attention(attention_kind, encoder)
        self.encoder = encoder.requires_grad_(False)
        self.attention_kind, self.epochs, self.learns = attention_kind, epochs, learns

    @torch.no_grad()
    def update(self, encoder, step, total):
        """The average takes a step towards the encoder."""
        momentum = ema_momentum(step, total)
        old = list(self.encoder.parameters())
        new = list(encoder.parameters())
        torch._foreach_lerp_(old, new, 1 - momentum)
        # Of buffers, such as the statistics of a BatchNorm, there is no average worth having.
        for mine, theirs in zip(self.encoder.buffers(), encoder.buffers(), strict=True):
            mine.copy_(theirs)

    def write_maps(self, images, path, autocast):
        """Write the attention to all images as f16 (n, g, g): memory does not grow with the data."""
        n = len(images)
        g = self.encoder.side
        rows = attention_rows(images, self.encoder, self.attention_kind, autocast)
        chunks = progress(rows, "attention", math.ceil(n / data.CHUNK), leave=False)
        data.write_maps(path, "attn", chunks, (n, g, g), "F16")


def average_of(encoder, attention_kind, epochs, start):
    """The Teacher that is the exponential moving average (EMA) of the run's encoder.

    Masks follow it after the share `start` of the epochs.
    """
    # a young teacher's attention is poor, so it makes new maps at a quarter and at half of the run
    at = {math.ceil(share * epochs) for share in (start, 0.25, 0.5) if share >= start}
    if min(at) >= epochs:
        print(f"warning  {epochs} epochs end before the teacher makes a map: masks stay random")
    return Teacher(copy.deepcopy(encoder).eval(), attention_kind, at, learns=True)


def ema_momentum(step, total):
    """The momentum of the average: which share of the old teacher is kept at a step.

    It rises to 1 by half a cosine (arXiv:2203.12719).
    """
    new = 1 - 0.5 ** (1 / (HALF_LIFE * total))
    return 1 - new * (math.cos(math.pi * step / total) + 1) / 2


def default_attention(flags, teacher):
    """How to read the attention of a teacher ("self", a run or a file): by what its run trained."""
    contrast = str(flags.get("contrast"))  # a public checkpoint has no flags
    if contrast.startswith("cls"):
        return "rollout"
    has_pooler = teacher != "self" and beside(teacher, "pooler").exists()
    if has_pooler or (teacher == "self" and contrast.startswith("pooler")):
        return "pooler"
    # As DINO, which trained its CLS token. MAE did not: for its file, give --attention outlier.
    is_public = not flags and model_file(teacher).is_file()
    return "cls" if is_public else "outlier"


def check_attention(kind, encoder):
    """The attention of a pooler needs a pooler."""
    if kind == "pooler" and encoder.pooler is None:
        raise UserError("--attention pooler: --contrast pooler trains one; choose outlier")


# ---- attention -----------------------------------------------------------------------------------


@torch.no_grad()
def attention(encoder, images, indices, kind, autocast):
    """Yield (index, (b, N) fp32): an encoder's attention to the patches of whole images `indices`.

    pooler, rollout and cls are means over heads of ViT.patch_attention. outlier needs no trained
    attention: it is the distance of a patch token from the mean token at its place. It is for a
    plain MAE, which has no loss on its CLS token.
    """
    if kind == "outlier":
        some = data.evenly_spaced(len(images), SAMPLE)
        sample = patch_tokens(encoder, images, some, autocast)
        total = sum(tokens.cpu().double().sum(0) for _, tokens in sample)  # Metal has no float64
        mean = (total / len(some)).float()  # (N, D)
        for index, tokens in patch_tokens(encoder, images, indices, autocast):
            yield index, (tokens - mean.to(tokens.device)).norm(dim=2)
        return
    device = encoder.cls_token.device
    for index, view in data.whole_views(images, indices, encoder.image_size, device):
        with autocast():
            score = encoder.patch_attention(view, kind)  # (b, H, N)
        yield index, score.float().mean(1)


def patch_tokens(encoder, images, indices, autocast):
    """Yield (index, patch tokens (b, N, D) fp32) of whole images `indices`, in order."""
    device = encoder.cls_token.device
    for index, view in data.whole_views(images, indices, encoder.image_size, device):
        with autocast():
            tokens = encoder.features(view)
        yield index, tokens[:, 1:].float()


def attention_rows(images, encoder, kind, autocast):
    """Yield (b, g, g) fp16 of all images, in order: the chunks of a file of maps."""
    indices = torch.arange(len(images))
    for _, score in attention(encoder, images, indices, kind, autocast):
        yield score.unflatten(1, (encoder.side, -1)).half().cpu().numpy()


# ---- the network that predicts losses ------------------------------------------------------------


class LossPredictor(nn.Module):
    """Predicts which patches are hard to reconstruct, after HPM (Wang et al. 2023, arXiv:2304.05919).

    HPM's is a second decoder of the MAE's encoder. This is a network of its own, which sees all patches.
    """

    def __init__(self, side, patch_size, dim=64):
        super().__init__()
        self.embed = nn.Linear(patch_size * patch_size * 3, dim)
        self.register_buffer("positions", sincos_positions(dim, side)[:, 1:])
        self.block = Block(dim, dim // 32)
        self.score = nn.Linear(dim, 1)
        self.apply(init_weights)

    def forward(self, patches):
        """patches (B, N, p*p*3) of a view -> score (B, N), higher for a greater expected loss."""
        return self.score(self.block(self.embed(patches) + self.positions)).squeeze(-1)


def ranking_loss(score, error):
    """Log loss of ranking every two hidden patches by their errors, as HPM; score, error (B, M)."""
    # only the order counts, because errors shrink while the model learns
    harder = (error[:, :, None] > error[:, None]).to(score.dtype)  # (B, M, M)
    return F.binary_cross_entropy_with_logits(score[:, :, None] - score[:, None], harder)


# ---- maps ----------------------------------------------------------------------------------------


def open_maps(score, where, folder, split):
    """The maps (n, G, G) of the training images, the number of parts, and a line about them.

    where: a folder or file of apps/maps.py; "truth": masks in the data; "auto": those, else maps/NAME.
    """
    name = IN_FILES[score]
    has_truth = score in TRUTH and score in split
    if has_truth and where in ("truth", "auto"):
        count = len(split["header"].get("parts") or [])
        return split[score], count, f"the true {TRUTH[score]} of {folder}"
    if where == "truth":
        fix = f"{data.maps_command(folder, name)} makes maps without"
        raise UserError(f"--maps truth: {folder} has no {TRUTH.get(score, 'true ' + name)}; {fix}")
    default = Path("maps") / Path(folder).name / f"{name}.safetensors"
    path = default if where == "auto" else where
    maps, header = data.open_map(path, name, split)
    notes = [str(header[key]) for key in ("source", "by") if header.get(key)]
    return maps, header.get("parts", 0) + 1, " ".join([str(path), *notes])


def crop_map(maps, index, boxes, flip, side):
    """(B, side*side): maps of these images under the same crops; u8 becomes a share in [0, 1]."""
    whole = data.take(maps, index, boxes.device)  # (B, G, G)
    score = data.view_maps(whole, boxes, flip, side).flatten(1)
    return score / 255 if whole.dtype == torch.uint8 else score


def crop_parts(maps, index, boxes, flip, side, count):
    """(B, side*side, count): the share of each part in each patch of the same crops."""
    whole = data.take(maps, index, boxes.device)  # (B, G, G)
    planes = torch.stack([whole == k for k in range(count)], 1)  # (B, count, G, G)
    Wy, Wx = data.view_matrices(boxes, flip, whole.shape[-1], side)
    return (Wy[:, None] @ planes.float() @ Wx[:, None]).flatten(2).transpose(1, 2)
