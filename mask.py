"""Masking strategies: which patches of a view are hidden.

A strategy returns one priority per patch, (B, N). The higher the priority, the sooner the patch is
hidden. `sample` turns priorities into an exact number of hidden patches.

    B views   s their side   N = g * g patches of a view   K visible   M hidden

Arguments of a strategy:

    scores    {name: tensor}, what is known of the patches: the pixels, and what NEEDS names
              attn        (B, N)         a teacher's attention to the patch
              fg          (B, N)         share of foreground, 0 to 1
              parts       (B, N, parts)  share of each part; part 0 is the background
              difficulty  (B, N)         predicted loss of the patch
              view        (B, s, s, 3) u8: the pixels, of which a strategy can compute its own
    noise     (B, N) Gumbel noise. The top M of score + noise are M patches drawn without
              replacement with odds exp(score) (Gumbel-top-k; Kool et al. 2019, arXiv:1903.06059).
    t         progress of the run, from 0 to 1
    hidden    M, the number of patches to hide

Keyword parameters are keys of the flag: `--mask attn_high:beta=2,start=0.2`. A strategy in NEEDS
also has shuffle=1, the control: each image then gets the score of another image. Any strategy
has throw=0.4: that share of the patches, of the lowest priority, is neither seen nor predicted.

What `--mask attn_high` follows, from the network to the patches that it hides:

    guidance.make_guide       copies the encoder: the teacher, its average over the run
    ViT.patch_attention       what the teacher attends to: its pooler, which the contrastive loss trains
    Guide.make_maps           keeps that of every whole image, at the start of three epochs
    Guide.scores              cuts the maps of a batch as its images are cut: scores["attn"] (B, N)
    attn_high, guided         the logarithm, scaled, times beta, plus noise: a priority (B, N)
    sample                    hides the M patches of the highest priority

To add a strategy, write a function, add it to STRATEGIES, and say in NEEDS what it reads, if it reads
anything. For example, this one reads the pixels and hides bright patches first. Once STRATEGIES
has `"bright": bright` and NEEDS has `"bright": "view"`, it is trained, tested and drawn as others are:

    def bright(scores, noise, t, hidden, beta=1.0):
        pixels = pixels_of(scores["view"], noise)  # (B, N, p*p, 3), from 0 to 1
        return guided(pixels.mean((2, 3)), beta, noise)

To see what it hides before you train: python -m apps.masks bright bright:beta=3. A score that can't be
computed from the pixels needs a branch in Guide.scores of common/guidance.py.
"""

import inspect
import math

import torch
import torch.nn.functional as F

from kernels.patches import all_places, patch_detail

START = 0.1  # share of the run before guidance starts: until then the teacher's attention is noise
RAMP = 0.1  # share of the run over which guidance rises to its full strength
BETA = 0.5  # strength of attention: 1 was worse on the demo set, in one seed
TOP = 0.1  # share of the patches, those with the most attention, of which attn_hint shows some


# ---- soft guidance -------------------------------------------------------------------------------


def gumbel_noise(n, N, generator):
    """(n, N) standard Gumbel noise from a CPU generator."""
    # Drawn on the CPU, so that a GPU and a laptop hide the same patches. At 0 and 1 the logarithms
    # are infinite, and two infinite priorities could not be ranked.
    u = torch.rand(n, N, generator=generator).clamp_(1e-7, 1 - 1e-7)
    return -torch.log(-torch.log(u))


def standard_score(x):
    """x (B, N), scaled to mean 0 and standard deviation 1 in each image; 0 where x is constant."""
    # Each image is scaled by itself. A map with one sharp peak and a flat one then get the same
    # strength, and beta means the same for every image and every kind of score.
    centred = x - x.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    # A constant score prefers no patch. Divided by its tiny deviation, though, its rounding errors
    # would become a score of full strength.
    flat = std <= 1e-6 * x.abs().amax(1, keepdim=True)
    return torch.where(flat, 0.0, centred / std.clamp(min=1e-30))


def guided(score, beta, noise):
    """Priority from a score (B, N): beta 0 is random masking, a huge beta hides the top scores."""
    # The noise alone is random masking, and beta decides how far the score may overrule it. A plain
    # top-k would hide the same patches of a picture in every epoch, so the network would never be
    # asked for the others. Gumbel noise has the deviation 1.28 and the score has 1: at beta 0.5,
    # noise leads.
    return beta * standard_score(score) + noise


def ramp(t, start, length):
    """0 until t = start, then a straight line to 1 at t = start + length."""
    return min(1.0, max(0.0, (t - start) / length)) if length > 0 else float(t >= start)


# ---- strategies without a score: the baselines ---------------------------------------------------


def random(scores, noise, t, hidden):
    """Every patch has the same chance (MAE, He et al. 2021, arXiv:2111.06377)."""
    return noise


def squares(scores, noise, t, hidden, unit=2):
    """Squares of unit x unit patches (SimMIM, Xie et al. 2021, arXiv:2111.09886)."""
    row, column = rows_and_columns(noise)
    # All patches of a square take the rank of its first patch, and not its noise: two squares whose
    # noise is nearly the same would mix, and each would be hidden in part.
    corner = unit * (row // unit * column.numel() + column // unit)
    return ranks(noise)[:, corner.flatten()] + 1e-3 * noise  # ranks are whole: noise breaks ties


def block(scores, noise, t, hidden, size=0.3):
    """Squares at random places; size is their side as a share of the grid's (MAE, fig. 6).

    On a grid of 8 x 8 patches, as `nano`, `small` and `base` have, 0.3 is only 2 of them; 0.5 is 4.
    """
    g = math.isqrt(noise.shape[1])
    b = min(g, max(2, round(size * g)))
    rank = ranks(noise).unflatten(1, (1, g, g))
    padded = F.pad(rank, ((b - 1) // 2, b // 2) * 2)
    # Squares that are drawn one by one overlap, so nobody knows how many patches they will hide.
    # Here every patch takes the highest rank around it instead, which paints a square around each
    # high rank, and `sample` takes as many patches as it wants.
    highest = F.max_pool2d(padded, b, 1).flatten(1)
    return highest + 1e-3 * noise


def grid(scores, noise, t, hidden):
    """Keeps one patch of every 2 x 2, the same one in all of them (MAE, fig. 6)."""
    row, column = rows_and_columns(noise)
    # At ratio 0.75 three of the four places of every square are hidden in full. At another ratio,
    # the noise decides which patches of the last place are.
    place = (row % 2 * 2 + column % 2).flatten()  # (N,) in 0 to 3
    return ranks(noise[:, :4])[:, place] + 1e-3 * noise  # four noises order the four places


def green(scores, noise, t, hidden, fine=1.0, coarse=2.0):
    """Band-passed noise: blobs that are neither fine nor coarse (ColorMAE, arXiv:2407.13036).

    fine, coarse: standard deviations, in patches, of the two Gaussians whose difference is the band.
    """
    g = math.isqrt(noise.shape[1])
    field = noise.unflatten(1, (g, g))
    narrow = blur_matrix(g, fine, noise.device)
    wide = blur_matrix(g, coarse, noise.device)
    # The narrow blur removes single patches, and the difference removes large areas. At ratio 0.5,
    # 50 % of neighbours are alike in a random mask. With deviations of 0.6 and 1.5 it was 57 %, hardly
    # more; with 1 and 2, 71 %.
    band = narrow @ field @ narrow.T - wide @ field @ wide.T
    return band.flatten(1) + 1e-6 * noise


# ---- attention of a teacher ----------------------------------------------------------------------


def attn_high(scores, noise, t, hidden, beta=BETA, start=START, ramp_for=RAMP):
    """Hides what the teacher attends to (AttMask, Kakogeorgiou et al. 2022, arXiv:2203.12719)."""
    # AttMask takes the top scores themselves, at every step, from a teacher that sees every crop.
    # Here, as in AMT (Liu et al. 2022, arXiv:2211.15362), the maps of a picture are cached, and a mask
    # is drawn with odds that follow them. Until `start` beta is 0, because a teacher that has learned
    # nothing attends to nothing in particular.
    return guided(log_attention(scores), beta * ramp(t, start, ramp_for), noise)


def attn_low(scores, noise, t, hidden, beta=BETA, start=START, ramp_for=RAMP):
    """Hides what the teacher does not attend to: the opposite of attn_high."""
    return guided(-log_attention(scores), beta * ramp(t, start, ramp_for), noise)


def attn_hint(scores, noise, t, hidden, beta=BETA, start=START, ramp_for=RAMP, hint=0.5):
    """attn_high, but of the tenth of the patches with the most attention a share `hint` is shown.

    Chance draws these, as in AttMask-Hint of the same paper. They hold so much of the attention that
    a little less of it is hidden than by random masks.
    """
    priority = attn_high(scores, noise, t, hidden, beta, start, ramp_for)
    # Before guidance starts there is nothing to give a hint about, and the mask is the same, to the
    # bit, as that of `attn_high` with this seed. Then hints come one by one.
    tenth = round(TOP * noise.shape[1])
    count = round(hint * ramp(t, start, ramp_for) * tenth)
    if count == 0:
        return priority
    # Where attention is equal everywhere, as before the first map, the noise decides, and not the place.
    by_noise = noise.argsort(dim=1)
    attention = scores["attn"].gather(1, by_noise)
    order = attention.argsort(dim=1, descending=True, stable=True)
    top = by_noise.gather(1, order[:, :tenth])
    drawn = noise.gather(1, top).argsort(1)[:, :count]
    return show(top.gather(1, drawn), priority, hidden)


# ---- foreground and background -------------------------------------------------------------------


def fg_heavy(scores, noise, t, hidden, share=0.9, spare=1):
    """Hides `share` of the foreground first; `spare` patches of each side stay visible."""
    # The quota is the same for every image, if M patches are enough for it. A score would hide more of
    # the foreground on average, but by how much would depend on how large the figure is.
    return side_quota(scores["fg"] > 0.5, hidden, noise, share, spare)


def bg_heavy(scores, noise, t, hidden, share=0.9, spare=1):
    """Hides `share` of the background first; `spare` patches of each side stay visible."""
    # `spare` leaves a patch of each side to see, because the colours of a side of which nothing is
    # visible can only be guessed.
    return side_quota(scores["fg"] <= 0.5, hidden, noise, share, spare)


# ---- from easy to hard ---------------------------------------------------------------------------


def parts(scores, noise, t, hidden, power=2.0, whole=-1.0):
    """From a share of each part to whole parts (SemMAE, Li et al. 2022, arXiv:2206.10207).

    The share of the mask that is whole parts is t^power, or `whole`, if that is 0 to 1.
    """
    # Easy at first: some of each part is hidden, and the rest of the part tells what is missing.
    # Hard at the end: a whole eye is gone, and has to be inferred from the rest of the face.
    whole = t**power if whole < 0 else whole
    largest = scores["parts"].argmax(2)  # (B, N)
    member = F.one_hot(largest, scores["parts"].shape[2])  # (B, N, parts)
    area = member.sum(1)  # (B, parts), patches of each
    count = area.shape[1]
    # The noise that is there anyway also puts the parts in a random order. So a strategy draws no
    # numbers of its own, and is a function of its arguments alone.
    order = noise.repeat(1, count)[:, :count].argsort(1)  # there may be more parts than patches
    sorted_area = area.gather(1, order)
    area_before = sorted_area.cumsum(1) - sorted_area
    # Parts are hidden whole in this order until M patches are; the last one is cut to what is left.
    sorted_whole = (hidden - area_before).clamp(min=0).minimum(sorted_area)
    whole_parts = torch.zeros_like(area).scatter(1, order, sorted_whole)
    # Both terms sum to M over the parts, so at any mixture the quotas can all be filled.
    quota = (1 - whole) * area * hidden / noise.shape[1] + whole * whole_parts
    return by_quota(quota, member, noise)


def detail(scores, noise, t, hidden, beta=1.0):
    """Hides flat colour first and fine detail later; halfway, at t = 1/2, it is random."""
    # Flat colour is easy: its neighbours tell it. The sign of beta turns halfway, so that the
    # hidden patches go from what can be copied to what has to be understood.
    view = scores["view"]
    p = patch_side(view, noise.shape[1])
    score = patch_detail(view, all_places(view, p), p)  # (B, N)
    return guided(score, beta * (2 * t - 1), noise)


def learned(scores, noise, t, hidden, beta=1.0, start=START, ramp_for=RAMP):
    """By the loss that a small network predicts, from easy to hard.

    CL-MAE (Madan et al. 2023, arXiv:2308.16572) turns the sign during the run. HPM (Wang et al.
    2023, arXiv:2304.05919) predicts losses by ranking them. No gradient passes through the mask.
    """
    # CL-MAE trains the mask against the MAE. Hidden patches are dropped, which has no gradient, so
    # here a network learns to predict losses by itself, and the mask only reads what it predicts.
    return guided(scores["difficulty"], beta * ramp(t, start, ramp_for) * (2 * t - 1), noise)


NEEDS = {  # strategy: the score that it reads beside the pixels; "view" are the pixels alone
    "attn_high": "attn",
    "attn_low": "attn",
    "attn_hint": "attn",
    "fg_heavy": "fg",
    "bg_heavy": "fg",
    "parts": "parts",
    "detail": "view",
    "learned": "difficulty",
}
STRATEGIES = {
    "random": random,
    "squares": squares,
    "block": block,
    "grid": grid,
    "green": green,
    "attn_high": attn_high,
    "attn_low": attn_low,
    "attn_hint": attn_hint,
    "fg_heavy": fg_heavy,
    "bg_heavy": bg_heavy,
    "parts": parts,
    "detail": detail,
    "learned": learned,
}


def keywords(strategy):
    """{key: default} of the parameters that a user can set. Each strategy has `throw`, too."""
    parameters = inspect.signature(strategy).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


PARAMS = {name: keywords(strategy) | {"throw": 0.0} for name, strategy in STRATEGIES.items()}
for name in PARAMS.keys() & NEEDS:
    # The control of every guided mask: it has the same shapes and areas, but of another picture. A
    # guided mask that is no better than its control has not profited from what its score says.
    PARAMS[name]["shuffle"] = 0


# ---- helpers of the strategies -------------------------------------------------------------------


def pixels_of(view, noise):
    """Views u8 (B, s, s, 3) -> (B, N, p*p, 3): the pixels of each patch, from 0 to 1."""
    p = patch_side(view, noise.shape[1])
    # Rows and columns of pixels are each split in two: of which patch, and where in it.
    cells = view.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # (B, g, p, g, p, 3)
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2) / 255


def patch_side(view, N):
    """p, the side in pixels of each of the N patches of views (B, s, s, 3)."""
    return view.shape[1] // math.isqrt(N)


def log_attention(scores):
    """(B, N): the logarithm, because attention is a probability with many orders of magnitude."""
    return scores["attn"].clamp(min=1e-6).log()


def show(shown, priority, M):
    """A priority by which M other patches are hidden than those at places `shown` (B, n)."""
    # For each patch that is shown, another one has to be hidden, or the number would not be exact.
    # So no more can be shown than there are other patches to take their place.
    count = min(shown.shape[1], priority.shape[1] - M)
    rank = priority.argsort(dim=1, descending=True, stable=True).argsort(1).float()
    # Rank 0 is hidden first. The last that can replace them has the rank M + count - 1.
    return -rank.scatter(1, shown[:, :count], M + count - 0.5)


def rows_and_columns(noise):
    """The row (g, 1) and the column (1, g) of each patch of the grid."""
    index = torch.arange(math.isqrt(noise.shape[1]), device=noise.device)
    return index[:, None], index[None]


def ranks(noise):
    """(B, N): 0 for the lowest of each image to N - 1 for the highest, as whole numbers."""
    # The first argsort lists the patches by their noise, and the second inverts that list.
    return noise.argsort(1).argsort(1).float()


def blur_matrix(g, std, device):
    """(g, g): a Gaussian around each place of a line; rows sum to 1. W @ x @ W.T blurs an image x."""
    distance = torch.arange(g, device=device)[:, None] - torch.arange(g, device=device)
    weight = torch.exp(-0.5 * (distance / std) ** 2)
    return weight / weight.sum(1, keepdim=True)


def by_quota(quota, member, noise):
    """Priority that hides quota (B, parts) patches of each part; member (B, N, parts) is 0 or 1.

    Within a part, patches with high noise come first: score = quota - (rank + 1/2). Where quotas
    are whole numbers with the sum M, the top M patches fill them.
    """
    # With patches sorted by noise, a cumulative sum counts how many of the same part come before.
    # A patch has a positive score if its rank is below its part's quota, so the positive ones are
    # what is to be hidden. If quotas are fractions, the top M hold the number above or below each.
    order = noise.argsort(dim=1, descending=True, stable=True)
    sorted_member = member.gather(1, order[..., None].expand_as(member))
    rank = ((sorted_member.cumsum(1) - 1) * sorted_member).sum(2)  # (B, N), 0 is first of its part
    score = (sorted_member * quota[:, None]).sum(2) - rank - 0.5
    return torch.empty_like(noise).scatter(1, order, score.to(noise.dtype)) + 1e-3 * noise


def side_quota(side, M, noise, share, spare):
    """Priority that hides `share` of one side, (B, N) bool, and takes the rest from the other side.

    Of the `area` of this side, n = round(share * area) patches are hidden, and M - n of the `rest`.
    The number n is clipped so that `spare` patches of each side stay visible, if it has any.
    """
    area = side.sum(1)  # (B,)
    rest = side.shape[1] - area
    # If M is larger than the other side, this side has to give the rest, whatever `share` says: a
    # figure of 70 % of the picture can't stay visible at ratio 0.75.
    low = (M - rest + (rest > 0) * spare).clamp(min=0)
    high = (area - (area > 0) * spare).clamp(min=0, max=M)
    n = (share * area).round().maximum(low).minimum(high)
    return by_quota(torch.stack([M - n, n], 1), F.one_hot(side.long(), 2), noise)


# ---- from priorities to patches ------------------------------------------------------------------


def kept(N, ratio, throw=0.0):
    """K = int(N * (1 - ratio)), the patches that stay visible, as in MAE."""
    # Rounding makes 100 * (1 - 0.9) a little less than 10, and int() would make 9 of it.
    K = int(N * (1 - ratio) + 1e-9)
    M = N - K - round(throw * N)
    if K < 1 or M < 1 or throw < 0:
        left = f"{K} visible and {M} hidden of {N} patches, {throw:g} of them thrown"
        raise ValueError(f"{ratio:g} leaves {left}; at least 1 of each is needed, as with 0.75")
    return K


def sample(priority, K, T=0):
    """priority (B, N) -> ids_keep (B, K), ids_mask (B, N - K - T), both contiguous; exact numbers.

    The T patches of the lowest priority are thrown: they are in neither. AMT (Liu et al. 2022,
    arXiv:2211.15362) throws those in the middle, and shows the lowest.
    """
    # A threshold on the priorities would leave another number of patches visible in each image,
    # which no tensor (B, K) holds. A sort gives exactly K. It is stable, so that ties are hidden
    # alike anywhere.
    order = priority.argsort(dim=1, stable=True)
    return order[:, T : T + K].contiguous(), order[:, T + K :].contiguous()
