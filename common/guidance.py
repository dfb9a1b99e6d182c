"""What guides a mask: maps of whole images, kept in a file, and cropped exactly as the images are.

    need        score of a patch                        where it comes from
    attn        attention of a teacher                  the run's own average, another encoder, or maps.py --map attn
    fg          its share of foreground                 maps.py --map saliency, or the data's true foreground masks
    parts       shares of eyes, hair, clothes, ...      maps.py --map parts, or the data's true parts
    detail      contrast of its pixels                  the view itself (kernels/loss.py)
    difficulty  the loss that is predicted for it       a small head that learns during the run (model.py)

A map of a whole image is far smaller than the image: a step copies only the rows of its batch.
"""

import copy
import math
from pathlib import Path

import torch

import data
import mask as masking
from common import distributed
from common.checkpoints import load_encoder, load_exactly
from common.command import progress
from common.io import UserError
from kernels.gather import masked_patch_gather
from kernels.loss import patch_detail
from model import LossPredictor, ranking_loss

IN_FILES = {"attn": "attn", "fg": "saliency", "parts": "parts"}  # need: the map of maps.py
EMA = 0.996  # of the run's own average; rises to 1 by half a cosine (as in AttMask)
TRUTH = {"fg": "foreground masks", "parts": "part masks"}  # what a packed set may hold itself, under the need's name


class Guide:
    """What one strategy has to know of the patches of each batch, and the network, if any, that finds it out.

    encoder    of the run; teacher "self" is its moving average, else "maps", a run or a checkpoint
    source     of attention, one of SOURCES; maps: as open_maps has it; epochs: of the run
    need       as in the table above, or None
    maps       (n, G, G) of the whole training images, in a file; None before a teacher's first maps
    networks   {"teacher"} where it is the run's own average, {"predictor"} for the learned mask: part of its state
    """

    def __init__(self, strategy, params, encoder, train, folder, device, autocast, teacher="self", source="unusual",
                 maps="auto", epochs=1):  # fmt: skip
        self.need, self.shuffle = masking.NEEDS.get(strategy), params.pop("shuffle", 0) > 0
        self.patch, self.side, self.device, self.autocast = encoder.patch_size, encoder.side, device, autocast
        self.maps, self.parts, self.file, self.source = None, 0, None, source
        self.teacher, self.refresh_epochs, self.networks, self.beta = None, [], {}, params.get("beta", 1.0)
        self.about = {"detail": "the contrast of each view", "difficulty": "a head that learns along"}.get(self.need)
        if self.need == "difficulty":
            self.networks = {"predictor": LossPredictor(self.side, self.patch).to(device)}
        elif self.need == "attn" and teacher != "maps":
            self.about = f"attention of {'the average of this run' if teacher == 'self' else teacher}"
            self.choose_teacher(teacher, encoder, epochs, params.get("start", masking.START))
        elif self.need in IN_FILES:
            self.maps, self.parts, self.about = open_maps(self.need, maps, folder, train)

    def choose_teacher(self, teacher, encoder, epochs, start):
        """The run's own average makes maps from epoch `start` on; another encoder once, before the first step."""
        if teacher == "self":
            self.teacher, self.teacher_size = copy.deepcopy(encoder), encoder.side * encoder.patch_size
            self.networks, self.refresh_epochs = {"teacher": self.teacher}, refresh_epochs(epochs, start)
        else:
            (self.teacher, self.teacher_size), self.refresh_epochs = load_encoder(teacher), [0]
        self.teacher.to(self.device).requires_grad_(False)

    def state(self):
        """What a resumed run needs of it."""
        return {name: network.state_dict() for name, network in self.networks.items()} | {"maps": self.file}

    def load(self, state, path):
        """Take up what `state` returned, from the run's state.pt at path."""
        for name, network in self.networks.items():
            load_exactly(network, state[name], path)
        if state["maps"]:
            self.file = state["maps"]
            self.maps = data.open_tensors(path.parent / self.file)["attn"]

    def refresh_maps(self, epoch, step, images, out):
        """Let the teacher make its maps of all images, if this is one of its epochs."""
        if epoch in self.refresh_epochs:
            self.file = f"attn-{step:08d}.safetensors"
            self.maps = write_attention(
                self.teacher, self.teacher_size, images, out / self.file, self.autocast, self.source
            )

    def patch_scores(self, rows, boxes, flip, view, rank_slice=slice(None)):
        """-> {need: (B, N) or (B, N, P)} of the views u8 (B, S, S, 3) that were cut from images `rows`; {} if no need.

        shuffle=1 takes another image's map under the same crop: what is left then is not about this image.
        rank_slice: which of `rows`, those of the whole batch, the views are; the others belong to other processes.
        """
        if self.need is None:
            return {}
        if self.need in IN_FILES:
            rows = (rows.roll(1) if self.shuffle else rows)[rank_slice]
            return {self.need: crop_map(self.need, self.maps, rows, boxes, flip, self.side, self.device, self.parts)}
        every = torch.arange(self.side**2, device=view.device).expand(len(view), -1).contiguous()
        if self.need == "detail":
            score = patch_detail(view, every, self.patch)
        else:
            with self.autocast():
                self.graph = self.networks["predictor"](masked_patch_gather(view, every, self.patch)).float()
            self.predicted = self.graph.detach().requires_grad_()  # its gradient gathers over the micro-batches
            score = self.predicted.detach()
        return {self.need: distributed.all_rows(score).roll(1, 0)[rank_slice] if self.shuffle else score}

    def loss(self, now, ids_mask, error):
        """The predictor's loss on rows `now`, from the errors (B, M) of the masked patches; 0 where there is none."""
        return ranking_loss(self.predicted[now].gather(1, ids_mask), error) if "predictor" in self.networks else 0.0

    def backward(self):
        """After all micro-batches: the gradient that they left on the predicted scores goes on to the predictor."""
        if "predictor" in self.networks:
            self.graph.backward(self.predicted.grad)

    @torch.no_grad()
    def update_ema(self, encoder, t):
        """The run's own average takes a step towards the encoder; its momentum goes from EMA to 1."""
        if "teacher" in self.networks:
            momentum = 1 - (1 - EMA) * (math.cos(math.pi * t) + 1) / 2
            torch._foreach_lerp_(list(self.teacher.parameters()), list(encoder.parameters()), 1 - momentum)

    def statistics(self, patches, ids_mask):
        """What the log says of a batch's masks: diversity, what was masked of foreground and background, or entropy."""
        numbers = {"mask_diversity": masking.diversity(ids_mask, self.side**2).item()}
        if self.need == "fg":
            numbers |= region_shares(patches["fg"], ids_mask)
        if self.need == "difficulty":
            numbers["mask_entropy"] = masking.entropy(patches["difficulty"], self.beta).item()
        return {name: round(x, 4) for name, x in numbers.items()}

    def shown(self, patches):
        """The scores of a batch's first images as pictures, {need: (8, g, g)}; of parts the largest one's number."""
        if self.need is None:
            return {}
        score = patches[self.need][:8]
        return {self.need: (score.argmax(2) if score.dim() == 3 else score).unflatten(1, (self.side, self.side))}


def collapse_warning(numbers):
    """-> a warning where learned masks are nearly the same for all images, or leave nothing to chance; else ""."""
    if "mask_entropy" not in numbers or min(numbers["mask_diversity"], numbers["mask_entropy"]) > 0.2:
        return ""
    return (f"the learned masks have collapsed: diversity {numbers['mask_diversity']:.2f}, entropy "
            f"{numbers['mask_entropy']:.2f} (random masks have 1 and 1); try a smaller beta")  # fmt: skip


def refresh_epochs(epochs, start):
    """Epochs before which the self-teacher makes its maps: when guidance starts, then every 20th or tenth of the run.

    Making them costs nearly an epoch of training: a forward pass over all the patches instead of a quarter of them.
    """
    return range(math.ceil(start * epochs), epochs, max(20, epochs // 10))


SOURCES = ("cls", "received", "unusual")
SAMPLE = 1024  # images that the usual token of each place is the mean of


def default_source(teacher):
    """ "cls" for a checkpoint file, as DINO's are; "unusual" for an MAE of ours, whose CLS token nothing trains."""
    return "cls" if Path(teacher).is_file() else "unusual"


@torch.no_grad()
def attention(encoder, image_size, images, rows, source, autocast):
    """Yield (index, (b, N) fp32): an encoder's attention to each patch of whole images `rows`, mean over heads.

    "cls" and "received" are attention proper (ViT.patch_attention). In a masked autoencoder both mostly tell where a
    patch is: the CLS token is trained by nothing. "unusual" is the length of token - mean token of its place, and
    finds eyes and accessories (results/LOG.md, "where an MAE looks").
    """
    if source == "unusual":
        some = data.evenly_spaced(len(images), SAMPLE)
        sample = patch_tokens(encoder, image_size, images, some, autocast)
        usual = sum(t.cpu().double().sum(0) for _, t in sample) / len(some)  # Metal has no float64
        usual = usual.float().to(encoder.cls_token.device)
        for index, tokens in patch_tokens(encoder, image_size, images, rows, autocast):
            yield index, (tokens - usual).norm(dim=2)
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

    It belongs to the state of a run, and memory does not grow with the data. Several processes look at a share of the
    images each, into a file each; rank 0 joins them. Shares are whole chunks: the same bits as one process makes.
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
    """The maps of the training images -> (rows (n, G, G), how many parts they tell apart, a line about them).

    where: a folder or file of maps.py; "truth", the masks that the data set brings; "auto", those, else maps/NAME. An
    estimate never takes the place of exact masks unless it is asked for.
    """
    name, has_truth = IN_FILES[need], need in TRUTH and need in train
    if where == "truth" or where == "auto" and has_truth:
        if not has_truth:
            raise UserError(f"--maps truth: {folder} has no {TRUTH.get(need, 'true ' + name)}; "
                            f"python maps.py --data {folder} --map {name} makes maps without")  # fmt: skip
        return train[need], len(train["header"].get("parts") or []), f"the true {TRUTH[need]} of {folder}"
    path = data.map_file(Path("maps") / Path(folder).name, name, train) if where == "auto" else where
    maps = data.open_map(path, name, train)
    about = data.open_tensors(maps.filename)["header"]
    how = [about[key] for key in ("quality", "source", "by") if about.get(key)]
    return maps, about.get("parts", 0) + 1, " ".join([str(path), *map(str, how)])


def crop_map(need, maps, rows, boxes, flip, side, device, count=0):
    """Maps of these rows, cropped and flipped as their images were -> (B, side*side), or (B, side*side, count) parts.

    Attention keeps its scale, foreground is a share in [0, 1], parts are the share of each part in each patch.
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
    """fg (B, N), ids_mask (B, M) -> {"fg_hidden", "bg_hidden"}: the masked share of foreground and background."""
    masked = torch.zeros_like(fg).scatter(1, ids_mask, 1.0)
    foreground = (fg > 0.5).float()
    sides = {"fg_hidden": foreground, "bg_hidden": 1 - foreground}
    return {k: ((masked * x).sum() / x.sum().clamp(min=1)).item() for k, x in sides.items()}
