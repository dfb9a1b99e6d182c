"""What guides a mask: maps of whole images, made once, kept in a file, and cut exactly as the images are.

    need        what is known of the patches           where it comes from
    attn        attention of a teacher                  the run's own average, another encoder, or maps.py --map attn
    fg          how much of it is figure                maps.py --map saliency, or the data's true figure masks
    parts       shares of eyes, hair, clothes, ...      maps.py --map parts, or the data's true parts
    detail      contrast of its pixels                  the view itself (kernels/loss.py)
    difficulty  the loss that is predicted for it       a small head that learns during the run (model.py)

A map of a whole image is far smaller than the image: a step copies only the rows of its batch.
"""

import copy
import math
from pathlib import Path

import torch
from tqdm import tqdm

import data
import mask as masking
from common import distributed
from common.checkpoints import load_encoder, load_exactly
from common.io import UserError, send
from kernels.gather import masked_patch_gather
from kernels.loss import patch_detail
from model import LossPredictor, ranking_loss

IN_FILES = {"attn": "attn", "fg": "saliency", "parts": "parts"}  # need: the map of maps.py
EMA = 0.996  # of the run's own average; rises to 1 by half a cosine (as in AttMask)
TRUTH = {"fg": "figure masks", "parts": "part masks"}  # what a packed set may hold itself, under the need's name


class Guide:
    """What one strategy has to know of the patches of each batch, and the network, if any, that finds it out.

    need       as in the table above, or None
    maps       (n, G, G) of the whole training images, in a file; None before a teacher's first look
    networks   {"teacher"} where it is the run's own average, {"predictor"} for the learned mask: part of its state
    """

    def __init__(self, strategy, params, args, model, folder, train, device, autocast):
        self.need, self.shuffle = masking.NEEDS.get(strategy), params.pop("shuffle", 0) > 0
        self.patch, self.side, self.device, self.autocast = args.patch_size, model.encoder.side, device, autocast
        self.maps, self.parts, self.file, self.source = None, 0, None, args.attention
        self.teacher, self.looks, self.networks, self.beta = None, [], {}, params.get("beta", 1.0)
        self.what = {"detail": "the contrast of each view", "difficulty": "a head that learns along"}.get(self.need)
        if self.need == "difficulty":
            self.networks = {"predictor": LossPredictor(self.side, self.patch).to(device)}
        elif self.need == "attn" and args.teacher != "maps":
            self.what = f"attention of {'the average of this run' if args.teacher == 'self' else args.teacher}"
            self.choose_teacher(args, model.encoder, params.get("start", masking.START))
        elif self.need in IN_FILES:
            self.maps, self.parts, self.what = open_maps(self.need, args.maps, folder, train)

    def choose_teacher(self, args, encoder, start):
        """The run's own average looks from epoch `start` on; another encoder looks once, before the first step."""
        if args.teacher == "self":
            self.teacher, self.teacher_size = copy.deepcopy(encoder), args.image_size
            self.networks, self.looks = {"teacher": self.teacher}, looks_at(args.epochs, start)
        else:
            (self.teacher, self.teacher_size), self.looks = load_encoder(args.teacher), [0]
        self.teacher.to(self.device).requires_grad_(False)

    def state(self):
        return {name: network.state_dict() for name, network in self.networks.items()} | {"maps": self.file}

    def load(self, state, path):
        for name, network in self.networks.items():
            load_exactly(network, state[name], path)
        if state["maps"]:
            self.file = state["maps"]
            self.maps = data.open_tensors(path.parent / self.file)["attn"]

    def look(self, epoch, step, images, out):
        """Let the teacher make its maps of all images, if this is one of its epochs."""
        if epoch in self.looks:
            self.file = f"attn-{step:08d}.safetensors"
            self.maps = write_attention(
                self.teacher, self.teacher_size, images, out / self.file, self.autocast, self.source
            )

    def known(self, rows, boxes, flip, view, mine=slice(None)):
        """-> {need: (B, N) or (B, N, P)} of the views u8 (B, S, S, 3) that were cut from images `rows`; {} if no need.

        shuffle=1 takes another image's map under the same crop: what is left then is not about this image.
        mine: which of `rows`, those of the whole batch, the views are; the others belong to other processes.
        """
        if self.need is None:
            return {}
        if self.need in IN_FILES:
            rows = (rows.roll(1) if self.shuffle else rows)[mine]
            return {self.need: cut(self.need, self.maps, rows, boxes, flip, self.side, self.device, self.parts)}
        every = torch.arange(self.side**2, device=view.device).expand(len(view), -1).contiguous()
        if self.need == "detail":
            known = patch_detail(view, every, self.patch)
        else:
            with self.autocast():
                self.graph = self.networks["predictor"](masked_patch_gather(view, every, self.patch)).float()
            self.guess = self.graph.detach().requires_grad_()  # its gradient gathers over the parts of a batch
            known = self.guess.detach()
        return {self.need: distributed.all_rows(known).roll(1, 0)[mine] if self.shuffle else known}

    def loss(self, part, ids_mask, error):
        """What the predictor learns from the errors (B, M) of the hidden patches; 0 where there is none."""
        return ranking_loss(self.guess[part].gather(1, ids_mask), error) if "predictor" in self.networks else 0.0

    def learn(self):
        """After the backward passes of a batch's parts: what they ask of the guess goes on to the predictor."""
        if "predictor" in self.networks:
            self.graph.backward(self.guess.grad)

    @torch.no_grad()
    def follow(self, encoder, t):
        """The run's own average takes a step towards the encoder; its momentum goes from EMA to 1."""
        if "teacher" in self.networks:
            momentum = 1 - (1 - EMA) * (math.cos(math.pi * t) + 1) / 2
            torch._foreach_lerp_(list(self.teacher.parameters()), list(encoder.parameters()), 1 - momentum)

    def statistics(self, patches, ids_mask):
        """What the log says of a batch's masks: diversity, and what was hidden of figure and ground, or the entropy."""
        numbers = {"mask_diversity": masking.diversity(ids_mask, self.side**2).item()}
        if self.need == "fg":
            numbers |= region_shares(patches["fg"], ids_mask)
        if self.need == "difficulty":
            numbers["mask_entropy"] = masking.entropy(patches["difficulty"], self.beta).item()
        return {name: round(x, 4) for name, x in numbers.items()}


def collapsed(numbers):
    """-> a warning where learned masks are nearly the same for all images, or leave nothing to chance; else ""."""
    if "mask_entropy" not in numbers or min(numbers["mask_diversity"], numbers["mask_entropy"]) > 0.2:
        return ""
    return (f"the learned masks have collapsed: diversity {numbers['mask_diversity']:.2f}, entropy "
            f"{numbers['mask_entropy']:.2f} (random masks have 1 and 1); try a smaller beta")  # fmt: skip


def looks_at(epochs, start):
    """Epochs before which the self-teacher makes its maps: when guidance starts, then every 20th or tenth of the run.

    A look costs nearly an epoch of training: a forward pass over all the patches instead of a quarter of them.
    """
    return range(math.ceil(start * epochs), epochs, max(20, epochs // 10))


SOURCES = ("cls", "received", "unusual")
SAMPLE = 1024  # images that the usual token of each place is the mean of


def usual_source(teacher):
    """ "cls" for a checkpoint file, as DINO's are; "unusual" for an MAE of ours, whose CLS token nothing trains."""
    return "cls" if Path(teacher).is_file() else "unusual"


@torch.no_grad()
def attention(encoder, image_size, images, rows, source, autocast):
    """Yield (index, (b, N) fp32): how much an encoder makes of each patch of whole images `rows`, mean over heads.

    "cls" and "received" are attention proper (ViT.patch_attention). In a masked autoencoder both mostly tell where a
    patch is: the CLS token is trained by nothing. "unusual" is the length of token - mean token of its place, and
    finds eyes and accessories (results/LOG.md, "where an MAE looks").
    """
    if source == "unusual":
        some = data.spread(len(images), SAMPLE)
        sample = patch_tokens(encoder, image_size, images, some, autocast)
        usual = sum(t.cpu().double().sum(0) for _, t in sample) / len(some)  # Metal has no float64
        usual = usual.float().to(encoder.cls_token.device)
        for index, tokens in patch_tokens(encoder, image_size, images, rows, autocast):
            yield index, (tokens - usual).norm(dim=2)
        return
    for index, view in data.whole_views(images, rows, image_size, encoder.cls_token.device):
        with autocast():
            found = encoder.patch_attention(view, source)
        yield index, found.float().mean(1)


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
    """Attention of the teacher to all images, (n, g, g), in a file -> the same as a memory map.

    It belongs to the state of a run, and memory does not grow with the data. Several processes look at a share of the
    images each, into a file each; rank 0 joins them. Shares are whole chunks: the same bits as one process makes.
    """
    rank, world = distributed.place()
    shape, chunks = (teacher.side, teacher.side), math.ceil(len(images) / data.CHUNK)
    shares = torch.arange(len(images)).split(math.ceil(chunks / world) * data.CHUNK)
    parts = [path.with_suffix(f".part{i}") for i in range(len(shares))] if world > 1 else [path]
    if rank < len(shares):
        rows = attention_rows(images, teacher, image_size, source, autocast, shares[rank])
        total = math.ceil(len(shares[rank]) / data.CHUNK)
        bar = tqdm(rows, "attention", total, leave=False, disable=True if rank else None)
        data.write_rows(parts[rank], "attn", bar, (len(shares[rank]), *shape), "F16")
    if world > 1:
        distributed.largest(0)  # all parts are there
        with distributed.zero_first():
            if rank == 0:
                data.write_rows(path, "attn", rows_of(parts), (len(images), *shape), "F16")
                for part in path.parent.glob(f"{path.stem}.part*"):
                    part.unlink()
    return data.open_tensors(path)["attn"]


def rows_of(paths):
    """Yield the maps (b, g, g) of several files, one after the other."""
    for path in paths:
        maps = data.open_tensors(path)["attn"]
        for at in range(0, len(maps), data.CHUNK):
            yield maps[at : at + data.CHUNK]


def open_maps(need, where, folder, train):
    """The maps of the training images -> (rows (n, G, G), how many parts they tell apart, a line about them).

    where: a folder or file of maps.py; "truth", the masks that the data set brings; "auto", maps/NAME, else the truth.
    """
    name, has_truth = IN_FILES[need], need in TRUTH and need in train
    path = data.map_file(Path("maps") / Path(folder).name, name, train) if where == "auto" else where
    if where == "truth" or (where == "auto" and has_truth and not path.exists()):
        if not has_truth:
            raise UserError(f"--maps truth: {folder} has no {TRUTH.get(need, 'true ' + name)}; "
                            f"python maps.py --data {folder} --map {name} makes maps without")  # fmt: skip
        return train[need], len(train["header"].get("parts") or []), f"the true {TRUTH[need]} of {folder}"
    maps = data.open_map(path, name, train)
    about = data.open_tensors(maps.filename)["header"]
    how = [about[key] for key in ("quality", "source", "by") if about.get(key)]
    return maps, about.get("parts", 0) + 1, " ".join([str(path), *map(str, how)])


def cut(need, maps, rows, boxes, flip, side, device, count=0):
    """Maps of these rows, cropped and flipped as their images were -> (B, side*side), or (B, side*side, count) parts.

    Attention keeps its scale, figure is a share in [0, 1], parts are the share of each part in each patch.
    """
    if maps is None:  # before the teacher's first look
        return torch.ones(len(rows), side * side, device=device)
    whole = send(torch.from_numpy(maps[rows.numpy()]), torch.device(device))  # (B, G, G)
    if need == "parts":
        planes = torch.stack([whole == k for k in range(count)], 1)  # (B, count, G, G)
        Wy, Wx = data.view_matrices(boxes.to(device), flip.to(device), whole.shape[-1], side)
        return (Wy[:, None] @ planes.float() @ Wx[:, None]).flatten(2).transpose(1, 2)
    known = data.view_maps(whole, boxes, flip, side).flatten(1)
    return known / 255 if need == "fg" else known


def region_shares(fg, ids_mask):
    """fg (B, N), ids_mask (B, M) -> {"fg_hidden", "bg_hidden"}: which share of figure and ground is hidden."""
    hidden = torch.zeros_like(fg).scatter(1, ids_mask, 1.0)
    figure = (fg > 0.5).float()
    shares = {"fg_hidden": figure, "bg_hidden": 1 - figure}
    return {k: ((hidden * x).sum() / x.sum().clamp(min=1)).item() for k, x in shares.items()}
