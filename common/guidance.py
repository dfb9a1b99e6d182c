"""What masks follow, and what teaches it: a teacher's attention, other scores, and the contrastive loss.

A score of each patch is one of these; mask.py says which strategy reads which:

    attn        attention of a teacher: the average of the run, another encoder, or apps/maps.py
    fg          share of foreground: true masks of the data, or apps.maps --map saliency
    parts       shares of eyes, hair, clothes, ...: true parts of the data, or apps.maps --map parts
    difficulty  loss that a small network predicts, which learns during the run
    view        no score, but the pixels, of which a strategy of mask.py computes its own

Maps belong to whole images, and are cropped and flipped as the images are.

A masked autoencoder has no loss of its own for the CLS token (its decoder only reads it). So the
attention of that token depends mostly on the place of a patch, and a mask that follows it would
hide the border. A second loss, the class Contrast, trains an attention that means something:

    pooler   a small network reads the patch tokens (model.Pooler). No gradient passes from it to
             the encoder, which stays what it is without this loss, to the bit
    cls      the CLS token itself, and with it the encoder. CAN (Mishra et al. 2022,
             arXiv:2210.16870) trains both losses at once, MAE-CT (Lehner et al. 2023,
             arXiv:2304.10520) one after the other

    B views   s their side   N = g * g patches of a view   K visible, M hidden patches
    n training images   S their side   G side of a map   D width of the encoder
    b images of a step, m of them have a second view   E numbers of a vector that is compared
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import mask as masking
from common.checkpoints import flags_of, load_teacher
from common.groups import groups_of
from common.train import UserError, progress
from kernels.patches import all_places, masked_patch_gather

# Scores that are maps of whole images, and what apps/maps.py calls such a file.
MAPS = {"attn": "attn", "fg": "saliency", "parts": "parts"}
NAMES = {"attn": "attention", "fg": "foreground", "parts": "parts", "difficulty": "predicted loss"}
TRUTH = {"fg": "foreground masks", "parts": "part masks"}  # true maps that a data set may hold
ATTENTION = ("pooler", "rollout", "cls", "outlier")  # kinds of it; see `attention`
SAMPLE = 1024  # images that the mean token of each place is taken from, for `outlier`
HALF_LIFE = 0.015  # share of a run after which half of the teacher is new; 99 % after a tenth
HIDDEN, OUT = 1024, 128  # widths of the projector
JITTER = 0.3  # by so much brightness, contrast and saturation of a second view change at most
# Keys of --contrast. share: of the pictures that get a second view; every: in how many steps one
# has the loss. The pooler has less to learn than the encoder, so that every second step is enough.
# Another weight of pooler would change nothing: AdamW divides by the size of the gradient, and no other
# loss trains it. That of cls counts, because the encoder has the MAE's loss, too.
SETTINGS = {
    "pooler": {"weight": 1.0, "temperature": 0.15, "dcl": 1, "share": 0.5, "every": 2},
    "cls": {"weight": 0.01, "temperature": 0.07, "dcl": 0, "share": 1.0, "every": 1},
    "none": {},
}

# ---- what a mask follows -------------------------------------------------------------------------


class Guide(nn.Module):
    """The score that a mask follows. It has one of three sources, and `scores` reads it at each step:

    maps       of all training images, cropped as the images are. They come from files, or are the
               attention of a teacher: of another checkpoint, or of the average of the run's encoder
    predictor  a network that learns which patches are hard
    view       the pixels themselves

    It is part of a run's state: the average, its maps and the predictor go on as they were.
    """

    def __init__(self, score, encoder, shuffle=False):
        super().__init__()
        self.score, self.shuffle = score, shuffle
        self.side, self.patch = encoder.side, encoder.patch_size
        # Maps of a file (n, G, G) stay in it; `parts` is how many parts they name, 0 of other maps.
        self.map_file, self.parts = None, 0
        # Maps of a teacher (n, g, g) are a part of the state.
        self.register_buffer("maps", None)
        self.teacher, self.kind = None, None  # the average, and which attention of it is read
        self.epochs = set()  # at whose start it makes its maps anew
        self.predictor = None
        if score == "difficulty":
            from common.variants import LossPredictor

            self.predictor = LossPredictor(self.side, self.patch)

    @torch.no_grad()
    def make_maps(self, teacher, images, autocast):
        """The teacher's attention to all images: in fp16, 128 bytes a picture on a grid of 8 x 8."""
        # A map for every crop would add 57.5 % to a step (results/bench_masks.csv), because the teacher
        # reads all patches and the encoder a quarter. Maps of whole images are made a few times.
        indices, g = torch.arange(len(images)), self.side
        chunks = attention(teacher, images, indices, self.kind, autocast)
        bar = progress(chunks, "attention", math.ceil(len(images) / data.CHUNK), leave=False)
        for index, score in bar:
            self.maps[index[0] : index[-1] + 1] = score.unflatten(1, (g, g)).half()

    def scores(self, index, boxes, flip, view, autocast):
        """What a strategy reads, {name: tensor}, of views u8 (B, s, s, 3), cut from images `index`.

        "view" are the views themselves. A score is (B, N), that of parts (B, N, parts). With shuffle, the
        control, each image gets all of it from the one before it in the batch: only the content is lost.
        """
        own = view
        if self.shuffle:
            # Another image's map under this crop, and another view.
            index, view = index.roll(1), view.roll(1, 0)
        scores = {"view": view}
        if self.score in MAPS:
            maps = self.maps if self.map_file is None else self.map_file
            scores[self.score] = crop_map(maps, index, boxes, flip, self.side, self.parts)
        if self.predictor is not None:
            patches = masked_patch_gather(own, all_places(own, self.patch), self.patch)
            with autocast():
                self.predicted = self.predictor(patches).float()  # (B, N)
            score = self.predicted.detach()
            scores[self.score] = score.roll(1, 0) if self.shuffle else score
        return scores

    def loss(self, ids_mask, error):
        """The loss of the predictor for this batch, by the errors (B, M) of hidden patches; else 0."""
        if self.predictor is None:
            return 0.0
        return self.predictor.loss(self.predicted.gather(1, ids_mask), error)

    @torch.no_grad()
    def update_teacher(self, encoder, step, total):
        """The average takes a step towards the encoder."""
        if self.teacher is None:
            return
        old, new = list(self.teacher.parameters()), list(encoder.parameters())
        torch._foreach_lerp_(old, new, 1 - ema_momentum(step, total))
        # Of buffers, such as the statistics of a BatchNorm, there is no average worth having.
        for mine, theirs in zip(self.teacher.buffers(), encoder.buffers(), strict=True):
            mine.copy_(theirs)


def make_guide(score, flags, encoder, train_set, autocast, start, shuffle):
    """The Guide of a strategy that reads this score; masks follow it after the share `start` of a run."""
    guide = Guide(score, encoder, shuffle)
    if score not in MAPS:
        return guide
    if score != "attn" or flags.teacher == "maps":
        guide.map_file, guide.parts, note = open_maps(score, flags.maps, flags.data, train_set)
        print(f"score    {note}")
        return guide
    # Until there are maps, all patches have the same attention, so the noise alone decides.
    shape = len(train_set["images"]), encoder.side, encoder.side
    guide.maps = torch.zeros(shape, dtype=torch.half, device=encoder.device)
    if flags.teacher == "self":
        trained = vars(flags)
        teacher = guide.teacher = copy.deepcopy(encoder).eval().requires_grad_(False)
        guide.epochs = map_epochs(flags.epochs, start)
    else:
        trained = flags_of(flags.teacher)
        teacher = load_teacher(flags.teacher).to(encoder.device).requires_grad_(False)
    guide.kind = flags.attention or default_attention(teacher, trained)
    print(f"score    attention ({guide.kind}) of {flags.teacher}")
    if guide.kind == "pooler" and teacher.pooler is None:
        raise UserError("--attention pooler: --contrast pooler trains one; choose outlier")
    if guide.teacher is None and not flags.resume:  # a resumed run has the maps in its state
        guide.make_maps(teacher, train_set["images"], autocast)
    return guide


def map_epochs(epochs, start):
    """At whose start the average of the encoder makes maps: when masks begin to follow, then two more."""
    at = {math.ceil(share * epochs) for share in (start, 0.25, 0.5) if share >= start}
    if min(at) >= epochs:
        print(f"warning  {epochs} epochs end before the teacher makes a map: masks stay random")
    return at


def default_attention(encoder, flags):
    """How to read the attention of an encoder: by what its run trained, whose flags are {} if unknown."""
    if encoder.pooler is not None:
        return "pooler"
    # A public checkpoint has no flags. DINO trained its CLS token. MAE did not: for its file, give
    # --attention outlier.
    if not flags:
        return "cls"
    return "rollout" if str(flags.get("contrast")).startswith("cls") else "outlier"


def as_pictures(scores):
    """Scores (B, N) or (B, N, parts) -> {name: (B, g, g)}; for parts, the largest part of each patch.

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


def ema_momentum(step, total):
    """The momentum of the average: which share of the old teacher is kept at a step.

    It rises to 1 by half a cosine (arXiv:2203.12719).
    """
    new = 1 - 0.5 ** (1 / (HALF_LIFE * total))
    return 1 - new * (math.cos(math.pi * step / total) + 1) / 2


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
    device = encoder.device
    for index, view in data.whole_views(images, indices, encoder.image_size, device):
        with autocast():
            score = encoder.patch_attention(view, kind)  # (b, H, N)
        yield index, score.float().mean(1)


def patch_tokens(encoder, images, indices, autocast):
    """Yield (index, patch tokens (b, N, D) fp32) of whole images `indices`, in order."""
    device = encoder.device
    for index, view in data.whole_views(images, indices, encoder.image_size, device):
        with autocast():
            tokens = encoder.features(view)
        yield index, tokens[:, 1:].float()


# ---- what teaches the attention ------------------------------------------------------------------


class Contrast(nn.Module):
    """The contrastive loss: two views of a picture get vectors that are more alike than those of others.

    The first view of a picture is the one that the MAE reconstructs. A share of the pictures gets a
    second one, on another background and in other colours, of which only the visible patches are read.
    Let i and j be the two views of a picture, and k any view of the batch:

        h = unit(projector(u))          u (D): what pooler or CLS token says of the visible patches
        L_i = -log( exp(h_i h_j / T) / sum_k exp(h_i h_k / T) )

    The sum over k != i is NT-Xent (normalised temperature-scaled cross-entropy; SimCLR, Chen et al. 2020,
    arXiv:2002.05709). DCL (decoupled contrastive learning, Yeh et al. 2021, arXiv:2110.06848) leaves k = j
    out of the sum, too: otherwise a pair that is alike already makes the gradient of all its negatives
    small. The projector is dropped after training.

    figures: foreground masks u8 (n, S, S) of all training pictures, or None. Pictures of one
    group are not each other's negatives.
    """

    def __init__(self, encoder, settings, train_set, figures, min_crop):
        super().__init__()
        dim = encoder.config["dim"]
        first = nn.Linear(dim, HIDDEN, bias=False)  # the norm would remove a bias
        norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)
        last = nn.Linear(HIDDEN, OUT)
        self.projector = nn.Sequential(first, norm, nn.ReLU(), last)
        self.register_buffer("groups", groups_of(train_set), persistent=False)
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)
        self.image_size, self.patches = encoder.image_size, encoder.side**2
        self.settings, self.min_crop = settings, min_crop
        self.figures = figures
        self.pooler = encoder.pooler  # None: the CLS token is compared, and the encoder learns
        self.trains_encoder = encoder.pooler is None

    def second_views(self, images, index, K, generator):
        """Second views of the first m of the images u8 (b, S, S, 3), which are `index` of the set.

        -> views u8 (m, s, s, 3), and their visible places (m, K). They are in other colours and, where the
        figures are known, on the background of another picture: what tells a picture from the others has
        to be found on the figure, and not behind it.
        """
        # Two at least, for the background of another picture.
        m = min(len(images), max(2, round(self.settings["share"] * len(images))))
        device = images.device
        boxes, flip = data.draw_boxes(m, generator, self.min_crop)
        colours = torch.rand(m, 3, generator=generator)
        noise = masking.gumbel_noise(m, self.patches, generator)
        boxes, flip, colours, noise = (data.send(x, device) for x in (boxes, flip, colours, noise))
        view = data.view_images(images[:m], boxes, flip, self.image_size)
        if self.figures is not None:
            figures = data.take(self.figures, index[:m], device)
            fg = data.view_maps(figures, boxes, flip, self.image_size)[..., None] / 255
            view = data.swap_backgrounds(view, fg)  # fg (m, s, s, 1)
        view = data.jitter_colour(view, colours, JITTER)
        # A random mask, whatever --mask is. If the masks of both views followed one map, like places would
        # be visible in both, and which ones they are would tell the pair.
        ids_keep, _ = masking.sample(noise, K)
        return view, ids_keep

    def summary(self, tokens):
        """tokens (B, 1+K, D) -> (B, D)."""
        return tokens[:, 0] if self.pooler is None else self.pooler(tokens)

    def forward(self, tokens, second, index):
        """tokens (b, 1+K, D) of the MAE's views, second (m, 1+K, D), index (b,) of the images.

        -> the weighted loss, and two numbers for the log: the loss, and the share of views that find
        their pair.
        """
        m = len(second)
        # Second views first: then i and m + i are the two views of a picture.
        summaries = torch.cat([self.summary(second), self.summary(tokens)])  # (m + b, D)
        h = F.normalize(self.projector(summaries.float()), dim=1)  # (m + b, E)
        groups = self.groups[data.send(index, tokens.device)]
        groups = torch.cat([groups[:m], groups])
        settings = self.settings
        T, dcl = settings["temperature"], settings["dcl"]
        loss, pairs_found = contrastive_loss(h, groups, m, T, dcl)
        return settings["weight"] * loss, torch.stack([loss.detach(), pairs_found])


def contrastive_loss(h, groups, m, temperature, dcl):
    """DCL or NT-Xent, and the share of views that find their pair; h (m + b, E) of length 1.

    Views i and m + i are of one picture, for i < m. Views from 2m on have no pair in the batch, and
    serve as negatives. groups (m + b,).
    """
    logits = h[: 2 * m] @ h.T / temperature  # (2m, m + b)
    pair = torch.arange(2 * m, device=h.device).roll(m)[:, None]  # 0 <-> m, 1 <-> m + 1, ...
    positive = logits.gather(1, pair)  # (2m, 1)
    same = groups[: 2 * m, None] == groups  # a view is of its own group, too
    negatives = logits.masked_fill(same, -1e4)
    pairs_found = (positive > negatives.amax(1, keepdim=True)).float().mean()
    among = negatives if dcl else torch.cat([positive, negatives], 1)
    loss = among.logsumexp(1) - positive[:, 0]
    # A view whose batch is all of its own group has nothing to be told from.
    return loss.where(~same.all(1), 0).mean(), pairs_found


# ---- maps of files -------------------------------------------------------------------------------


def open_maps(score, where, folder, split):
    """The maps (n, G, G) of the training images, the number of parts (0 of others), and a line about them.

    where: a folder or file of apps/maps.py; "truth": masks in the data; "auto": those, else maps/NAME.
    """
    name = MAPS[score]
    has_truth = score in TRUTH and score in split
    if has_truth and where in ("truth", "auto"):
        count = len(split["header"]["parts"]) if score == "parts" else 0
        return split[score], count, f"the true {TRUTH[score]} of {folder}"
    if where == "truth":
        fix = f"{data.maps_command(folder, name)} makes maps without"
        raise UserError(f"--maps truth: {folder} has no {TRUTH.get(score, 'true ' + name)}; {fix}")
    default = Path("maps") / Path(folder).name / f"{name}.safetensors"
    path = default if where == "auto" else where
    maps, header = data.open_map(path, name, split)
    notes = [str(header[key]) for key in ("source", "by") if header.get(key)]
    count = header["parts"] + 1 if score == "parts" else 0  # the background is a part, too
    return maps, count, " ".join([str(path), *notes])


def crop_map(maps, index, boxes, flip, side, parts=0):
    """(B, side*side): maps of these images under the same crops; u8 becomes a share in [0, 1].

    With parts, the maps hold their numbers: (B, side*side, parts), the share of each part in each patch.
    """
    whole = data.take(maps, index, boxes.device)  # (B, G, G)
    if not parts:
        score = data.view_maps(whole, boxes, flip, side).flatten(1)
        return score / 255 if whole.dtype == torch.uint8 else score
    planes = torch.stack([whole == k for k in range(parts)], 1)  # (B, parts, G, G)
    Wy, Wx = data.view_matrices(boxes, flip, whole.shape[-1], side)
    return (Wy[:, None] @ planes.float() @ Wx[:, None]).flatten(2).transpose(1, 2)
