"""Which patches are hidden: every strategy, and the one sampler. Tensors in, tensors out.

A strategy is a function that returns one priority per patch, (B, N), noise included: the higher,
the sooner masked. The sampler turns priorities into an exact count by a stable argsort. To write
your own, add a function and its name in STRATEGIES; its keyword parameters can then be set from the
command line: --mask mine:beta=2

    def mine(patches, noise, t, beta=1.0):
        return guided(patches["attn"], beta, noise)

patches  what is known of the view's patches, a dict of tensors that followed the crop and the flip;
         NEEDS says which strategy asks for which. "attn" (B, N): the attention that the teacher
         pays to each; "fg" (B, N): its share of foreground, 0 to 1; "parts" (B, N, P): the share of
         each part, the background being part 0; "detail" (B, N): contrast of its pixels;
         "difficulty" (B, N): the loss that is predicted for it; "masked": M, how many to hide
noise    (B, N) Gumbel noise, drawn on the CPU from (seed, epoch, step): adding it to a score and
         taking the top M draws M patches without replacement, with odds exp(score) (Gumbel-top-k;
         Kool et al. 2019, arXiv:1903.06059)
t        progress of the run, 0 at its start and 1 at its end

Any strategy with a need also takes shuffle=1, the control: pretrain.py then guides each image by
another one's map.
"""

import difflib
import inspect
import math

import torch
import torch.nn.functional as F

START, RAMP = (
    0.1,
    0.1,
)  # shares of the run before guidance by a self-teacher starts, and until it is full
# of attention; 1 hides a teacher's favourites so well that too little of them is seen
# (results/LOG.md)
BETA = 0.5


def gumbel_noise(n, N, generator):
    """-> (n, N) standard Gumbel noise from a CPU generator."""
    u = torch.rand(n, N, generator=generator).clamp_(1e-7, 1 - 1e-7)
    return -torch.log(-torch.log(u))


def standard_score(x):
    """(B, N) -> mean 0 and std 1 within each image; 0 where an image's values are all the same."""
    centred = x - x.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    flat = std <= 1e-6 * x.abs().amax(1, keepdim=True)
    return torch.where(flat, 0.0, centred / std.clamp(min=1e-30))


def guided(score, beta, noise):
    """Soft guidance by a score (B, N): beta 0 is random masking bit for bit, beta infinite hides
    the top scores.
    """
    if beta == 0 or beta != beta:  # infinity times a ramp that is still 0 is not a number
        return noise
    z = standard_score(score)
    return math.copysign(1, beta) * z + 1e-6 * noise if math.isinf(beta) else beta * z + noise


def ramp(t, start, length):
    """0 until t = start, then straight up to 1 at t = start + length: a young teacher's attention
    is noise.
    """
    return min(1.0, max(0.0, (t - start) / length)) if length > 0 else float(t >= start)


# ---- strategies without a map: the baselines and the controls ------------------------------------


def random(patches, noise, t):
    """Uniform: every patch alike (MAE, He et al. 2021)."""
    return noise


def simmim(patches, noise, t, unit=2):
    """Squares of unit x unit patches; with it pretrain.py builds SimMIM instead of MAE (Xie et al.
    2021).
    """
    row, column = rows_and_columns(noise)
    g, unit = column.numel(), max(1, int(unit))
    corner = (
        row // unit * unit * g + column // unit * unit
    )  # the patch whose noise speaks for the whole square
    return ranks(noise)[:, corner.flatten()] + 1e-3 * noise


def block(patches, noise, t, size=0.3):
    """Large squares, `size` of the grid's side, at random places: much context is lost at once
    (BEiT's, MAE fig. 6).
    """
    g = math.isqrt(noise.shape[1])
    b = min(g, max(2, round(size * g)))
    padded = F.pad(ranks(noise).unflatten(1, (1, g, g)), ((b - 1) // 2, b // 2) * 2)
    return (
        F.max_pool2d(padded, b, 1).flatten(1) + 1e-3 * noise
    )  # a patch that is drawn takes its square with it


def grid(patches, noise, t):
    """Keeps one patch of every 2x2, at the same place in all of them: the easiest puzzle (MAE fig.
    6).
    """
    row, column = rows_and_columns(noise)
    place = (row % 2 * 2 + column % 2).flatten()  # (N,), 0 to 3
    return (
        ranks(noise[:, :4])[:, place] + 1e-3 * noise
    )  # which place goes first is drawn for each image


def green(patches, noise, t, fine=1.0, coarse=2.0):
    """Band-passed noise, blobs neither fine nor coarse: a structured mask without data (ColorMAE,
    arXiv:2407.13036).

    fine, coarse: stds in patches of the two Gaussians whose difference is the band.
    """
    g = math.isqrt(noise.shape[1])
    field = noise.unflatten(1, (g, g))
    narrow, wide = (blur_matrix(g, s, noise.device) for s in (fine, coarse))
    return (narrow @ field @ narrow.T - wide @ field @ wide.T).flatten(1) + 1e-6 * noise


# ---- S1: a teacher's attention -------------------------------------------------------------------


def attn_high(patches, noise, t, beta=BETA, start=START, ramp_for=RAMP):
    """Hides what the teacher attends to: what matters has to be predicted (AttMask,
    arXiv:2203.12719).
    """
    return guided(log_attention(patches), beta * ramp(t, start, ramp_for), noise)


def attn_low(patches, noise, t, beta=BETA, start=START, ramp_for=RAMP):
    """Hides what the teacher does not attend to: the easy opposite."""
    return guided(-log_attention(patches), beta * ramp(t, start, ramp_for), noise)


def attn_hint(patches, noise, t, beta=BETA, start=START, ramp_for=RAMP, hint=0.1):
    """attn_high, but a share `hint` of the patches it would hide first is shown (AttMask-Hint)."""
    priority = attn_high(patches, noise, t, beta, start, ramp_for)
    return (
        show_some(priority, patches["masked"], hint, noise)
        if ramp(t, start, ramp_for) > 0
        else priority
    )


# ---- S2: foreground and background ---------------------------------------------------------------


def fg_heavy(patches, noise, t, share=0.9, spare=1):
    """Hides `share` of the foreground, the rest from the background; `spare` patches of each side
    stay visible.
    """
    return side_quota(patches["fg"] > 0.5, patches["masked"], noise, share, spare)


def bg_heavy(patches, noise, t, share=0.9, spare=1):
    """Hides `share` of the background, the rest from the foreground: the face stays visible."""
    return side_quota(patches["fg"] <= 0.5, patches["masked"], noise, share, spare)


# ---- S3: from easy to hard -----------------------------------------------------------------------


def parts(patches, noise, t, power=2, whole=None):
    """From a portion of each part to whole parts: eyes, hair, clothes (SemMAE, Li et al. 2022,
    arXiv:2206.10207).

    Easy is 1 - t^power; `whole` fixes how much of the mask are whole parts (0 to 1) instead: no
    curriculum.
    """
    member = F.one_hot(
        patches["parts"].argmax(2), patches["parts"].shape[2]
    )  # (B, N, P), the part of each patch
    easy = 1 - (t**power if whole is None else min(whole, 1.0))
    area, M = member.sum(1), patches["masked"]  # (B, P)
    turn = noise.repeat(1, area.shape[1])[:, : area.shape[1]].argsort(
        1
    )  # the order in which whole parts are hidden
    in_turn = area.gather(1, turn)
    left = M - (in_turn.cumsum(1) - in_turn)  # what is still to hide when a part's turn comes
    wholes = torch.zeros_like(area).scatter(1, turn, left.clamp(min=0).minimum(in_turn))
    return by_quota(easy * area * M / noise.shape[1] + (1 - easy) * wholes, member, noise)


def detail(patches, noise, t, beta=1.0):
    """Flat colour is hidden first, fine detail later: simple to complex, for drawings."""
    return guided(patches["detail"], beta * (2 * t - 1), noise)


def learned(patches, noise, t, beta=1.0, start=START, ramp_for=RAMP):
    """By a head that predicts each patch's loss, from the easy to the hard: in the manner of CL-MAE
    and HPM.

    CL-MAE (Madan et al. 2024, arXiv:2308.14572) turns its sign from help to hinder; HPM (Wang et
    al. 2023, arXiv:2304.05919) predicts losses by ranking them. No gradient passes the mask here:
    masked tokens are dropped.
    """
    return guided(patches["difficulty"], beta * ramp(t, start, ramp_for) * (2 * t - 1), noise)


STRATEGIES = {
    f.__name__: f
    for f in (
        random,
        simmim,
        block,
        grid,
        green,
        attn_high,
        attn_low,
        attn_hint,
        fg_heavy,
        bg_heavy,
        parts,
        detail,
        learned,
    )
}
NEEDS = dict(
    attn_high="attn",
    attn_low="attn",
    attn_hint="attn",
    fg_heavy="fg",
    bg_heavy="fg",
    parts="parts",
    detail="detail",
    learned="difficulty",
)  # what must be known of the patches
# --------------------------------------------------------------------------------------------------


def log_attention(patches):
    """Attention is a probability, spread over decades: its logarithm is what can be compared."""
    return patches["attn"].clamp(min=1e-6).log()


def show_some(priority, M, share, noise):
    """Of the M patches with the highest priority show round(share * M), those with the lowest
    noise: they go last.
    """
    count = min(round(share * M), priority.shape[1] - M)
    if count == 0:
        return priority
    top = priority.argsort(dim=1, descending=True, stable=True)[:, :M]
    shown = top.gather(1, noise.gather(1, top).argsort(dim=1, stable=True)[:, :count])
    return priority.scatter(1, shown, float("-inf"))


def rows_and_columns(noise):
    """-> the row (g, 1) and the column (1, g) of each patch of a square grid."""
    index = torch.arange(math.isqrt(noise.shape[1]), device=noise.device)
    return index[:, None], index[None]


def ranks(noise):
    """(B, N) -> 0 for the lowest of each row to N-1 for the highest: whole numbers, which 1e-3 *
    noise can't mix.
    """
    return noise.argsort(1).argsort(1).float()


def blur_matrix(g, std, device):
    """(g, g): a Gaussian around each place of a line of g; rows sum to 1. B @ x @ B.T blurs a
    picture x.
    """
    distance = torch.arange(g, device=device)[:, None] - torch.arange(g, device=device)
    weight = torch.exp(-0.5 * (distance / max(std, 1e-3)) ** 2)
    return weight / weight.sum(1, keepdim=True)


def by_quota(quota, member, noise):
    """Priority that hides quota (B, P) patches of each part, member (B, N, P) in {0, 1}, those with
    high noise first.

    score = quota - (rank within the part + 1/2): where the quotas are whole numbers with sum M, the
    top M fill them.
    """
    order = noise.argsort(dim=1, descending=True, stable=True)
    sorted_member = member.gather(1, order[..., None].expand_as(member))
    rank = ((sorted_member.cumsum(1) - 1) * sorted_member).sum(
        2
    )  # (B, N), 0 for the first of each part
    score = (sorted_member * quota[:, None]).sum(2) - rank - 0.5
    return torch.empty_like(noise).scatter(1, order, score.to(noise.dtype)) + 1e-3 * noise


def side_quota(side, M, noise, share, spare):
    """Priority that hides `share` of one side, (B, N) bool, as far as M and `spare` visible ones of
    each allow.

    n = clip(round(share * a), max(0, M - (b - spare)), min(M, a - spare)) of the a patches of this
    side, M - n of the b of the other; nothing is spared of a side that is empty.
    """
    a = side.sum(1)
    b = side.shape[1] - a
    low = (M - b + (b > 0) * spare).clamp(min=0)
    high = (a - (a > 0) * spare).clamp(min=0, max=M)
    n = (share * a).round().maximum(low).minimum(high)
    return by_quota(torch.stack([M - n, n], 1), F.one_hot(side.long(), 2), noise)


def sample(priority, K):
    """The one sampler: priority (B, N) -> ids_keep (B, K), ids_mask (B, N-K), both contiguous; K is
    exact.
    """
    order = priority.argsort(dim=1, stable=True)
    return order[:, :K].contiguous(), order[:, K:].contiguous()


def kept(N, ratio):
    """How many of N patches stay visible at this ratio: int(N * (1 - ratio)), as in MAE."""
    K = int(N * (1 - ratio) + 1e-9)
    if not 0 < ratio < 1 or not 0 < K < N:
        raise ValueError(
            f"--ratio {ratio:g} of {N} patches leaves {K} visible and {N - K} masked; "
            "both must be at least 1, and .75 is usual"
        )
    return K


def parse_ratio(text):
    """ "0.75" -> (.75, .75); ".5:.9", from the first epoch to the last, -> (.5, .9)."""
    try:
        first, last = (
            [float(x) for x in (text.split(":") * 2)[:2]] if text.count(":") < 2 else [None] * 2
        )
        if 0 < first < 1 and 0 < last < 1:
            return first, last
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"--ratio {text} must lie between 0 and 1, such as .75, or be a schedule such as .5:.9"
    )


def parse_mask(text):
    """ "attn_high:beta=2,start=.2" -> ("attn_high", {"beta": 2.0, "start": .2}); what is unknown is
    a ValueError.
    """
    name, _, given = text.partition(":")
    if name not in STRATEGIES:
        close = difflib.get_close_matches(name, STRATEGIES, 1, 0.3)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"--mask {name} is unknown; {hint}there are: {', '.join(STRATEGIES)}")
    known = [
        p
        for p in inspect.signature(STRATEGIES[name]).parameters
        if p not in ("patches", "noise", "t")
    ]
    known += ["shuffle"] if name in NEEDS else []
    params = {}
    for pair in filter(None, given.split(",")):
        key, _, value = pair.partition("=")
        if key in params:
            raise ValueError(f"--mask {name} has {key} twice; give it once")
        if key not in known:
            raise ValueError(
                f"--mask {name} has no parameter {key!r}; it has: {', '.join(known) or 'none'}"
            )
        try:
            params[key] = float(value)
        except ValueError:
            raise ValueError(f"--mask {name}: {key}={value!r} is not a number") from None
        if params[key] != params[key] or params[key] < 0:
            raise ValueError(f"--mask {name}: {key}={value} must be 0 or more")
    if {"power", "whole"} <= params.keys():
        raise ValueError(
            f"--mask {name}: power shapes the curriculum, and whole={params['whole']:g} is without one; "
            "leave one of them out"
        )
    return name, params


def diversity(ids_mask, N):
    """How differently the images of a batch are masked, ids_mask (B, M): 1 is as random masks do, 0
    is all alike.

    Mean pairwise Hamming distance over its expectation 2 r (1 - r) for independent masks of the
    same ratio r.
    """
    B, M = ids_mask.shape
    count = torch.bincount(ids_mask.flatten(), minlength=N)
    often = count / B  # the share of the images in which a patch is hidden
    return (often * (1 - often)).mean() * B / max(B - 1, 1) / (M / N * (1 - M / N))


def entropy(score, beta):
    """How open a guided mask is, score (B, N): entropy of softmax(beta z) over log N. 1 is random,
    0 deterministic.
    """
    odds = (beta * standard_score(score)).log_softmax(1)
    return -(odds.exp() * odds).sum(1).mean() / math.log(score.shape[1])
