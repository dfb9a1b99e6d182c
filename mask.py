"""Which patches are hidden: every strategy, and the one sampler. Tensors in, tensors out.

A strategy is a function that returns one priority per patch, (B, N), noise included: the higher, the sooner masked.
The sampler turns priorities into an exact count by a stable argsort. To write your own, add a function and its name in
STRATEGIES; its keyword parameters can then be set from the command line: --mask mine:beta=2

    def mine(patches, noise, t, beta=1.0):
        return guided(patches["attn"], beta, noise)

patches  what is known of the view's patches, a dict of (B, N) tensors that followed the crop and the flip: "attn" is
         the attention that the teacher's CLS token pays to each (NEEDS says which strategy asks for which)
noise    (B, N) Gumbel noise, drawn on the CPU from (seed, epoch, step): adding it to a score and taking the top M draws
         M patches without replacement, with odds exp(score) (Gumbel-top-k; Kool et al. 2019, arXiv:1903.06059)
t        progress of the run, 0 at its start and 1 at its end
"""

import difflib
import inspect

import torch

START, RAMP = 0.1, 0.1  # shares of the run before guidance by a self-teacher starts, and until it is full


def gumbel_noise(n, N, generator):
    """-> (n, N) standard Gumbel noise from a CPU generator."""
    u = torch.rand(n, N, generator=generator).clamp_(1e-7, 1 - 1e-7)
    return -torch.log(-torch.log(u))


def standard_score(x):
    """(B, N) -> mean 0 and deviation 1 within each image; 0 where an image's values are all the same."""
    centred = x - x.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    flat = deviation <= 1e-6 * x.abs().amax(1, keepdim=True)
    return torch.where(flat, 0.0, centred / deviation.clamp(min=1e-30))


def guided(score, beta, noise):
    """Soft guidance by a score (B, N): beta 0 is random masking bit for bit, beta infinite hides the top scores."""
    if beta == 0:
        return noise
    z = standard_score(score)
    return z + noise * 1e-6 if beta == float("inf") else beta * z + noise


def ramp(t, start, length):
    """0 until t = start, then straight up to 1 at t = start + length: a young teacher's attention is noise."""
    return min(1.0, max(0.0, (t - start) / length)) if length > 0 else float(t >= start)


# ---- strategies ----------------------------------------------------------------------------------------------------


def random(patches, noise, t):
    """Uniform: every patch alike (MAE, He et al. 2021)."""
    return noise


def attn_high(patches, noise, t, beta=1.0, start=START, ramp_for=RAMP):
    """Hides what the teacher looks at, so that the important is what must be understood (AttMask, arXiv:2203.12719)."""
    return guided(log_attention(patches), beta * ramp(t, start, ramp_for), noise)


def attn_low(patches, noise, t, beta=1.0, start=START, ramp_for=RAMP):
    """Hides what the teacher overlooks: the easy opposite."""
    return guided(-log_attention(patches), beta * ramp(t, start, ramp_for), noise)


def attn_hint(patches, noise, t, beta=1.0, start=START, ramp_for=RAMP, hint=0.1):
    """attn_high, but a share `hint` of the patches it would hide first is shown (AttMask-Hint)."""
    priority = attn_high(patches, noise, t, beta, start, ramp_for)
    return show_some(priority, patches["masked"], hint, noise) if ramp(t, start, ramp_for) > 0 else priority


STRATEGIES = {"random": random, "attn_high": attn_high, "attn_low": attn_low, "attn_hint": attn_hint}
NEEDS = {"attn_high": "attn", "attn_low": "attn", "attn_hint": "attn"}  # the map that must be there
# --------------------------------------------------------------------------------------------------------------------


def log_attention(patches):
    """Attention is a probability, spread over decades: its logarithm is what can be compared."""
    return patches["attn"].clamp(min=1e-6).log()


def show_some(priority, M, share, noise):
    """Of the M patches with the highest priority show round(share * M), those with the lowest noise: they go last."""
    count = min(round(share * M), priority.shape[1] - M)
    if count == 0:
        return priority
    top = priority.argsort(dim=1, descending=True, stable=True)[:, :M]
    shown = top.gather(1, noise.gather(1, top).argsort(dim=1, stable=True)[:, :count])
    return priority.scatter(1, shown, float("-inf"))


def sample(priority, K):
    """The one sampler: priority (B, N) -> ids_keep (B, K), ids_mask (B, N-K), both contiguous; K is exact."""
    order = priority.argsort(dim=1, stable=True)
    return order[:, :K].contiguous(), order[:, K:].contiguous()


def kept(N, ratio):
    """How many of N patches stay visible at this ratio: int(N * (1 - ratio)), as in MAE."""
    K = int(N * (1 - ratio) + 1e-9)
    if not 0 < ratio < 1 or not 0 < K < N:
        raise ValueError(f"--ratio {ratio:g} of {N} patches leaves {K} visible and {N - K} masked; "
                         "both must be at least 1, and .75 is usual")  # fmt: skip
    return K


def parse_ratio(text):
    """ "0.75" -> (.75, .75); ".5:.9", from the first epoch to the last, -> (.5, .9)."""
    try:
        first, last = [float(x) for x in (text.split(":") * 2)[:2]] if text.count(":") < 2 else [None] * 2
        if 0 < first < 1 and 0 < last < 1:
            return first, last
    except (ValueError, TypeError):
        pass
    raise ValueError(f"--ratio {text} must lie between 0 and 1, such as .75, or be a schedule such as .5:.9")


def parse_mask(text):
    """ "attn_high:beta=2,start=.2" -> ("attn_high", {"beta": 2.0, "start": .2}); what is unknown is a ValueError."""
    name, _, given = text.partition(":")
    if name not in STRATEGIES:
        close = difflib.get_close_matches(name, STRATEGIES, 1, 0.3)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"--mask {name} is unknown; {hint}there are: {', '.join(STRATEGIES)}")
    known = [p for p in inspect.signature(STRATEGIES[name]).parameters if p not in ("patches", "noise", "t")]
    params = {}
    for pair in filter(None, given.split(",")):
        key, _, value = pair.partition("=")
        if key not in known:
            raise ValueError(f"--mask {name} has no parameter {key!r}; it has: {', '.join(known) or 'none'}")
        try:
            params[key] = float(value)
        except ValueError:
            raise ValueError(f"--mask {name}: {key}={value!r} is not a number") from None
        if params[key] != params[key] or params[key] < 0:
            raise ValueError(f"--mask {name}: {key}={value} must be 0 or more")
    return name, params
