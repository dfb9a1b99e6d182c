"""What guides a mask: maps of whole images, kept in a file, and cropped exactly as the images are.

    need        score of a patch                      where it comes from
    attn        attention of a teacher                the run's own average, another encoder,
                                                      or maps.py --map attn
    fg          its share of foreground               maps.py --map saliency, or the true masks
    parts       shares of eyes, hair, clothes, ...    maps.py --map parts, or the true parts
    detail      contrast of its pixels                the view itself (kernels/loss.py)
    difficulty  the loss that is predicted for it     a small head that learns during the run

A map of a whole image is far smaller than the image: a step copies only the rows of its batch.
"""

import copy
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import mask as masking
from common import distributed
from common.agreement import contrast_of
from common.checkpoints import beside, flags_of, load_teacher
from common.command import progress
from common.fields import check_arrays
from common.io import UserError
from kernels.gather import masked_patch_gather
from kernels.loss import patch_detail
from model import Block, init_weights, sincos_positions

IN_FILES = {"attn": "attn", "fg": "saliency", "parts": "parts"}  # need: the map of maps.py
# Share of a run after which half of the teacher's weights are new. The first map is made after a
# tenth of the run: the initial weights have 1 % of the teacher then, whatever the run's length.
HALF_LIFE = 0.015
LEAST_RANK = 2.5  # directions that projections use; fewer is collapse
TRUTH = {
    "fg": "foreground masks",
    "parts": "part masks",
}  # what a packed set may hold itself, under the need's name


class Guide:
    """What one strategy has to know of the patches of each batch, and the network, if any, that
    finds it out.

    encoder    of the run; teacher "self" is its moving average, else "maps", a run or a checkpoint
    source     of attention, one of SOURCES; maps: as open_maps has it; epochs: of the run; views:
               of each image
    need       of the mask, as in the table above, or None; weigh: the need whose score the loss is
               weighted by, or None
    swap       share of the views that get another image's background, by the data's own foreground
               or by maps
    maps       {need: (n, G, G) of the whole training images, in a file}; attention is missing
               before its first maps
    networks   {"teacher"} where it is the run's own average, {"predictor"} for the learned mask:
               part of its state
    """

    def __init__(
        self,
        strategy,
        params,
        encoder,
        train,
        folder,
        device,
        autocast,
        teacher="self",
        source="outlier",
        maps="auto",
        epochs=1,
        views=1,
        weigh=None,
        swap=0.0,
    ):
        self.need, self.shuffle = masking.NEEDS.get(strategy), params.pop("shuffle", 0) > 0
        self.weigh, self.needs = weigh, [need for need in dict.fromkeys((self.need, weigh)) if need]
        self.patch, self.side, self.device, self.autocast = (
            encoder.patch_size,
            encoder.side,
            device,
            autocast,
        )
        self.maps, self.parts, self.file, self.source, self.views, self.swap = (
            {},
            0,
            None,
            source,
            views,
            swap,
        )
        self.teacher, self.refresh_epochs, self.networks, self.beta = (
            None,
            [],
            {},
            params.get("beta", 1.0),
        )
        about = {"detail": "the contrast of each view", "difficulty": "a head that learns along"}
        if "difficulty" in self.needs:
            self.networks = {"predictor": LossPredictor(self.side, self.patch).to(device)}
        if "attn" in self.needs and teacher != "maps":
            about["attn"] = (
                f"attention of {'the average of this run' if teacher == 'self' else teacher}"
            )
            self.choose_teacher(teacher, encoder, epochs, params.get("start", masking.START))
        for need in (IN_FILES.keys() - about).intersection(self.needs):
            self.maps[need], parts, about[need] = open_maps(need, maps, folder, train)
            self.parts = parts if need == "parts" else self.parts
        self.figure = (
            open_maps("fg", "auto" if "fg" in train else maps, folder, train)[0]
            if swap > 0
            else None
        )
        self.about = "; ".join(about[need] for need in self.needs) or None

    def choose_teacher(self, teacher, encoder, epochs, start):
        """The run's own average makes maps from epoch `start` on; another encoder once, before the
        first step.
        """
        if teacher == "self":
            self.teacher, self.teacher_size = (
                copy.deepcopy(encoder),
                encoder.side * encoder.patch_size,
            )
            self.networks["teacher"] = self.teacher
            self.refresh_epochs = refresh_epochs(epochs, start)
        else:
            (self.teacher, self.teacher_size), self.refresh_epochs = load_teacher(teacher), [0]
        check_source(
            self.source, self.teacher, "--attention", "this run" if teacher == "self" else teacher
        )
        self.teacher.to(self.device).requires_grad_(False)

    def load_maps(self, name, path):
        """Take up the teacher's maps in file `name` beside the run's state.pt at path; None: there
        were none yet.
        """
        if name:
            if not re.fullmatch(r"attn-\d+\.safetensors", name):
                raise ValueError(f"maps in a file {name!r}")
            self.file, self.maps["attn"] = name, data.open_tensors(path.parent / name)["attn"]
            check_arrays({"attn": self.maps["attn"]}, {"attn": "float16 n g g"}, path, "")

    def refresh_maps(self, epoch, step, images, out):
        """Let the teacher make its maps of all images, if this is one of its epochs."""
        if epoch in self.refresh_epochs:
            self.file = f"attn-{step:08d}.safetensors"
            self.maps["attn"] = write_attention(
                self.teacher, self.teacher_size, images, out / self.file, self.autocast, self.source
            )

    def patch_scores(self, rows, boxes, flip, view, rank_slice=slice(None)):
        """-> {need: (B, N) or (B, N, P)} of the views u8 (B, S, S, 3) that were cut from images
        `rows`; {} if no need.

        shuffle=1 takes another image's map for the mask, under the same crop: what is left is not
        about this image. rank_slice: which of `rows`, those of the whole batch, the views are; the
        others belong to other processes.
        """
        return {
            need: self.scores_of(need, rows, boxes, flip, view, rank_slice) for need in self.needs
        }

    def swap_backgrounds(self, view, rows, boxes, flip, draws, rank_slice=slice(None)):
        """view u8 (B, S, S, 3) -> views; of a share `swap` of them, by draws (B,) in [0, 1], the
        background is another view's, and where that one has its figure, its background's mean
        colour.

        Then the figure alone tells whose view it is (BG_Random; Ryali et al. 2021,
        arXiv:2103.12719). The two views of an image get theirs from two others. rows: as for
        patch_scores.
        """
        if self.swap == 0:
            return view
        S, x = view.shape[1], view.float()
        fg = crop_map("fg", self.figure, rows[rank_slice], boxes, flip, S, self.device).view(
            -1, S, S, 1
        )
        colour = ((1 - fg) * x).sum((1, 2), keepdim=True) / (1 - fg).sum(
            (1, 2), keepdim=True
        ).clamp(min=1e-3)
        background = ((1 - fg) * x + fg * colour).round().to(torch.uint8)
        background = distributed.all_rows(background).roll(2 * self.views - 1, 0)[rank_slice]
        mixed = (fg * x + (1 - fg) * background).round().to(torch.uint8)
        return torch.where((draws < self.swap)[:, None, None, None], mixed, view)

    def scores_of(self, need, rows, boxes, flip, view, rank_slice):
        """What patch_scores returns, of one need."""
        shuffle = self.shuffle and need == self.need
        if need in IN_FILES:
            rows, maps = (
                (rows.roll(self.views) if shuffle else rows)[rank_slice],
                self.maps.get(need),
            )
            return crop_map(need, maps, rows, boxes, flip, self.side, self.device, self.parts)
        every = torch.arange(self.side**2, device=view.device).expand(len(view), -1).contiguous()
        if need == "detail":
            score = patch_detail(view, every, self.patch)
        else:
            with self.autocast():
                self.graph = self.networks["predictor"](
                    masked_patch_gather(view, every, self.patch)
                ).float()
            self.predicted = (
                self.graph.detach().requires_grad_()
            )  # its gradient gathers over the micro-batches
            score = self.predicted.detach()
        return distributed.all_rows(score).roll(self.views, 0)[rank_slice] if shuffle else score

    def weights(self, patches, ids_mask):
        """(B, M) of the hidden patches: the score that the loss is weighted by over its mean in the
        view, or 1.

        A tenth of the weight is everybody's (AttG, Sick et al. 2024, arXiv:2402.15172, where
        attention is the score).
        """
        if self.weigh is None:
            return 1.0
        score = patches[self.weigh]
        return 0.1 + 0.9 * (score / score.mean(1, keepdim=True).clamp(min=1e-12)).gather(
            1, ids_mask
        )

    def loss(self, now, ids_mask, error):
        """The predictor's loss on rows `now`, from the errors (B, M) of the masked patches; 0 where
        there is none.
        """
        return (
            ranking_loss(self.predicted[now].gather(1, ids_mask), error)
            if "predictor" in self.networks
            else 0.0
        )

    def backward(self):
        """After all micro-batches: the gradient that they left on the predicted scores goes on to
        the predictor.
        """
        if "predictor" in self.networks:
            self.graph.backward(self.predicted.grad)

    @torch.no_grad()
    def update_ema(self, encoder, step, total):
        """The run's own average takes a step towards the encoder."""
        if "teacher" in self.networks:
            share = 1 - ema_momentum(step, total)
            torch._foreach_lerp_(list(self.teacher.parameters()), list(encoder.parameters()), share)

    def statistics(self, patches, ids_mask, step, total):
        """What the log says of a batch's masks: diversity, what was masked of foreground and
        background, or entropy.
        """
        numbers = {"mask_diversity": masking.diversity(ids_mask, self.side**2).item()}
        if "teacher" in self.networks:
            numbers["teacher_initial"] = initial_share(step, total)
        if self.need == "fg":
            numbers |= region_shares(patches["fg"], ids_mask)
        if self.need == "difficulty":
            numbers["mask_entropy"] = masking.entropy(patches["difficulty"], self.beta).item()
        return {name: round(x, 4) for name, x in numbers.items()}

    def shown(self, patches):
        """The scores of a batch's first images as pictures, {need: (8, g, g)}; of parts the largest
        one's number.
        """
        scores = {need: patches[need][: 8 * self.views : self.views] for need in self.needs}
        flat = {
            need: score.argmax(2) if score.dim() == 3 else score for need, score in scores.items()
        }
        return {need: score.unflatten(1, (self.side, self.side)) for need, score in flat.items()}


class LossPredictor(nn.Module):
    """Predicts from a view which patches will be hard to reconstruct: one small block over all of
    them.

    It guides the mask "learned", in the manner of HPM (Wang et al. 2023), and shares nothing with
    the encoder.
    """

    def __init__(self, side, patch_size, dim=64):
        super().__init__()
        self.embed = nn.Linear(patch_size * patch_size * 3, dim)
        self.register_buffer("positions", sincos_positions(dim, side)[:, 1:])
        self.block = Block(dim, dim // 32)
        self.score = nn.Linear(dim, 1)
        self.apply(init_weights)

    def forward(self, patches):
        """patches (B, N, P), all of a view's -> a score (B, N), higher where a greater loss is
        expected.
        """
        return self.score(self.block(self.embed(patches) + self.positions)).squeeze(-1)


def ranking_loss(score, error):
    """score, error (B, M): log loss of saying for every pair of patches which one has the greater
    error; a scalar.

    Only the order counts, because errors shrink while the model learns (HPM, Wang et al. 2023,
    arXiv:2304.05919).
    """
    harder = (error[:, :, None] > error[:, None]).to(score.dtype)  # (B, M, M)
    return F.binary_cross_entropy_with_logits(score[:, :, None] - score[:, None], harder)


def warn_of_collapse(step, numbers):
    """Say so where learned masks or projections are nearly the same for all images, or masks leave
    nothing to chance.

    numbers: what the log says of the step.
    """
    if "mask_entropy" in numbers and min(numbers["mask_diversity"], numbers["mask_entropy"]) <= 0.2:
        tqdm.write(
            f"step {step}: the learned masks have collapsed: diversity {numbers['mask_diversity']:.2f}, entropy "
            f"{numbers['mask_entropy']:.2f} (random masks have 1 and 1); try a smaller beta"
        )
    if numbers.get("projection_rank", math.inf) < LEAST_RANK:
        tqdm.write(
            f"step {step}: the agreement has collapsed: projections use {numbers['projection_rank']:.1f} of 128 "
            "directions; try a larger --batch-size, or a higher temperature, --contrast pooler:temperature=.3"
        )


def refresh_epochs(epochs, start):
    """Epochs before which the self-teacher makes its maps: when guidance starts, at a quarter and
    at half of the run.

    A young teacher still looks at the background (of 12 epochs, 0.48 of its area after 4 and 0.34
    after 8). A set of maps costs up to an epoch of training: a forward pass over all patches
    instead of a quarter of them.
    """
    return {math.ceil(share * epochs) for share in (start, 0.25, 0.5) if share >= start}


def ema_momentum(step, total):
    """How much of the teacher stays at this step: rises to 1 by half a cosine, as in AttMask.

    AttMask (arXiv:2203.12719) begins at 0.996. In a run of a few hundred steps such a teacher would
    keep most of its random weights, so the half-life is a share of the run instead.
    """
    new = 1 - 0.5 ** (1 / (HALF_LIFE * total))
    return 1 - new * (math.cos(math.pi * step / total) + 1) / 2


def initial_share(steps, total):
    """How much of the teacher are still the weights that the run began with, after so many steps."""
    return math.prod(ema_momentum(step, total) for step in range(steps))


SOURCES = ("pooler", "rollout", "cls", "outlier")
SAMPLE = 1024  # images that the usual token of each place is the mean of


def flags_of_teacher(args, teacher):
    """The flags under which the teacher learned: those of this run, args, of its own run, or {} of
    any other file.
    """
    return vars(args) if teacher == "self" else flags_of(teacher)


def default_source(flags, teacher):
    """What to read a teacher's attention by, from the flags that it learned under; teacher: "self",
    a run, a file.

    Its pooler, if it has one; the CLS token where something trained it: through all blocks where
    --contrast did, in the last one where nothing is known but that it is a file, as DINO's are;
    else what needs no training.
    """
    contrast = contrast_of(flags)
    by_cls = contrast == "cls"
    if contrast != "none" and (by_cls or teacher == "self" or beside(teacher, "pooler").exists()):
        return "rollout" if by_cls else "pooler"
    return "cls" if not flags and Path(teacher).is_file() else "outlier"


def check_source(source, encoder, flag, name):
    """A UserError where the attention of a pooler is asked of an encoder without one; flag: that
    asks for it.
    """
    if source == "pooler" and encoder.pooler is None:
        raise UserError(
            f"{flag} pooler: {name} has no pooler, which --contrast pooler trains; {flag} outlier needs nothing "
            "that was trained"
        )


def is_trained(source, flags, teacher):
    """Did something train what this attention is read from?"""
    if source == "pooler":
        return True
    return source in ("cls", "rollout") and default_source(flags, teacher) in ("cls", "rollout")


@torch.no_grad()
def attention(encoder, image_size, images, rows, source, autocast):
    """Yield (index, (b, N) fp32): an encoder's attention to each patch of whole images `rows`, mean
    over heads.

    "outlier" is the length of token - mean token of its place; all others are attention proper
    (ViT.patch_attention). In a plain masked autoencoder that mostly tells where a patch is: nothing
    trains its CLS token.
    """
    if source == "outlier":
        some = data.evenly_spaced(len(images), SAMPLE)
        sample = patch_tokens(encoder, image_size, images, some, autocast)
        usual = (
            sum(t.cpu().double().sum(0) for _, t in sample) / len(some)
        ).float()  # Metal has no float64
        for index, tokens in patch_tokens(encoder, image_size, images, rows, autocast):
            yield index, (tokens - usual.to(tokens.device)).norm(dim=2)
        return
    for index, view in data.whole_views(images, rows, image_size, encoder.cls_token.device):
        with autocast():
            score = encoder.patch_attention(view, source)  # (b, H, N)
        yield index, score.float().mean(1)


def patch_tokens(encoder, image_size, images, rows, autocast):
    """Yield (index, patch tokens (b, N, D) fp32) of whole images `rows`, in order."""
    for index, view in data.whole_views(images, rows, image_size, encoder.cls_token.device):
        with autocast():
            tokens = encoder.features(view)
        yield index, tokens[:, 1:].float()


def attention_rows(images, encoder, image_size, source, autocast, rows=None):
    """Yield (b, g, g) fp16 of images `rows`, or of all, in order: the chunks of a file of maps."""
    rows = torch.arange(len(images)) if rows is None else rows
    for _, score in attention(encoder, image_size, images, rows, source, autocast):
        yield score.unflatten(1, (encoder.side, -1)).half().cpu().numpy()


def write_attention(teacher, image_size, images, path, autocast, source):
    """The teacher's attention to all images, (n, g, g), in a file -> the same as a memory map.

    It belongs to the state of a run, and memory does not grow with the data. Several processes look
    at a share of the images each, into a file each; rank 0 joins them. Shares are whole chunks: the
    same bits as one process makes.
    """
    rank, world = distributed.place()
    shape, chunks = (teacher.side, teacher.side), math.ceil(len(images) / data.CHUNK)
    shares = torch.arange(len(images)).split(math.ceil(chunks / world) * data.CHUNK)
    files = [path.with_suffix(f".part{i}") for i in range(len(shares))] if world > 1 else [path]
    if rank < len(shares):
        rows = attention_rows(images, teacher, image_size, source, autocast, shares[rank])
        total = math.ceil(len(shares[rank]) / data.CHUNK)
        bar = progress(rows, "attention", total, leave=False, disable=rank > 0)
        data.write_maps(files[rank], "attn", bar, (len(shares[rank]), *shape), "F16")
    if world > 1:
        distributed.largest(0)  # all files are there
        with distributed.zero_first():
            if rank == 0:
                data.write_maps(path, "attn", rows_of(files), (len(images), *shape), "F16")
                for file in path.parent.glob(f"{path.stem}.part*"):
                    file.unlink()
    return data.open_tensors(path)["attn"]


def rows_of(paths):
    """Yield the maps (b, g, g) of several files, one after the other."""
    for path in paths:
        maps = data.open_tensors(path)["attn"]
        for at in range(0, len(maps), data.CHUNK):
            yield maps[at : at + data.CHUNK]


def open_maps(need, where, folder, train):
    """The maps of the training images -> (rows (n, G, G), how many parts they tell apart, a line
    about them).

    where: a folder or file of maps.py; "truth", the masks that the data set brings; "auto", those,
    else maps/NAME. An estimate never takes the place of exact masks unless it is asked for.
    """
    name, has_truth = IN_FILES[need], need in TRUTH and need in train
    if where == "truth" or where == "auto" and has_truth:
        if not has_truth:
            raise UserError(
                f"--maps truth: {folder} has no {TRUTH.get(need, 'true ' + name)}; "
                f"python maps.py --data {folder} --map {name} makes maps without"
            )
        return (
            train[need],
            len(train["header"].get("parts") or []),
            f"the true {TRUTH[need]} of {folder}",
        )
    path = (
        data.map_file(Path("maps") / Path(folder).name, name, train) if where == "auto" else where
    )
    maps = data.open_map(path, name, train)
    about = data.open_tensors(maps.filename)["header"]
    how = [about[key] for key in ("quality", "source", "by") if about.get(key)]
    return maps, about.get("parts", 0) + 1, " ".join([str(path), *map(str, how)])


def crop_map(need, maps, rows, boxes, flip, side, device, count=0):
    """Maps of these rows, cropped and flipped as their images were -> (B, side*side), or (B,
    side*side, count) parts.

    Attention keeps its scale, foreground is a share in [0, 1], parts are the share of each part in
    each patch.
    """
    if maps is None:  # before the teacher's first maps
        return torch.ones(len(rows), side * side, device=device)
    whole = data.send(torch.from_numpy(maps[rows.numpy()]), torch.device(device))  # (B, G, G)
    if need == "parts":
        planes = torch.stack([whole == k for k in range(count)], 1)  # (B, count, G, G)
        Wy, Wx = data.view_matrices(boxes.to(device), flip.to(device), whole.shape[-1], side)
        return (Wy[:, None] @ planes.float() @ Wx[:, None]).flatten(2).transpose(1, 2)
    score = data.view_maps(whole, boxes, flip, side).flatten(1)
    return score / 255 if need == "fg" else score


def region_shares(fg, ids_mask):
    """fg (B, N), ids_mask (B, M) -> {"fg_hidden", "bg_hidden"}: the masked share of foreground and
    background.
    """
    masked = torch.zeros_like(fg).scatter(1, ids_mask, 1.0)
    foreground = (fg > 0.5).float()
    sides = {"fg_hidden": foreground, "bg_hidden": 1 - foreground}
    return {k: ((masked * x).sum() / x.sum().clamp(min=1)).item() for k, x in sides.items()}
