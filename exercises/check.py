"""Is it right? Judges what you wrote on an evening, function by function, and then shows what it does.

    python -m exercises.check 2

Reads:  the file of that evening, here exercises/evening2_patches.py
Writes: runs/exercises/masks.png, positions.png, loss.png, once all of an evening is right

Results are compared, and not code, so any right solution will do. At the first case that differs it stops, and
says by how much, which mistake gives just these numbers, if it knows one, and what to read again.
"""

import functools
import importlib
import inspect
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # for evening 2, before anything imports Triton

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import mask as masking
from common.train import Parser, cli, read_log, seeded
from kernels import MEAN, SCALE, SHIFT, STD, patches
from model import MAE, put_patches, sincos_positions

OUT = Path("runs/exercises")
RUNS = "runs/lab/mine-toon/rows.jsonl", "results/study/first-toon/rows.jsonl"  # yours, published


# ---- what all evenings share ---------------------------------------------------------------------


class Differs(Exception):
    """A case that is not right, in words."""


def same(case, result, expected, mistakes=None, ordered=True):
    """Print that a case is right, or raise Differs. mistakes {why: what comes out then}."""
    problem = difference(result, expected, ordered)
    for why, outcome in (mistakes or {}).items():
        if problem and difference(result, outcome, ordered) is None:
            problem += f"\n         This is what comes out if {why}."
            break
    holds(case, problem is None, problem)


def holds(case, right, problem):
    """The same of a case that is judged by a yes or no."""
    if not right:
        raise Differs(f"differs  {case}\n         {problem[0].upper()}{problem[1:]}")
    print(f"right    {case}")


def difference(result, expected, ordered=True):
    """How a result differs from what is expected, a tensor or a tuple of some: a line, or None."""
    if isinstance(expected, tuple):
        n = len(expected)
        if not isinstance(result, tuple | list | np.ndarray) or len(result) != n:
            return f"expected {n} results, found {kind(result)}."
        for i in range(n):
            if problem := difference(result[i], expected[i], ordered):
                return f"Result {i + 1} of {n}: {problem}"
        return None
    expected = torch.as_tensor(expected)
    if isinstance(result, int) and expected.is_floating_point():
        result = float(result)
    if kind(result) != kind(expected):
        return f"expected {kind(expected)}, found {kind(result)}."
    result = torch.as_tensor(result).detach()
    if not ordered:
        result, expected = result.sort(-1).values, expected.sort(-1).values
    distance = (result.double() - expected.double()).abs()
    wrong = ~(distance <= 1e-4 * (expected.abs().max() or 1))  # true where it is nan
    if not wrong.any():
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    first = f"found {result[place]:.4g} where {expected[place]:.4g} is expected"
    if not place:
        return f"{first}."
    most = distance.nan_to_num(torch.inf).max()
    share = f"{wrong.sum()} of {wrong.numel()} numbers differ, by up to {most:.3g}"
    return f"{first}, at {list(place)}; {share}."


def kind(x):
    """Numbers by dtype and shape, anything else as it is printed, or by its type."""
    if not isinstance(x, torch.Tensor | np.ndarray | np.number | float | int):
        return f"{x}"[:60] if x is None or hasattr(x, "__len__") else f"a {type(x).__name__}"
    x = torch.as_tensor(x)
    return f"{'float' if x.is_floating_point() else str(x.dtype)[6:]} {tuple(x.shape)}"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


@functools.cache
def drawings(n, side):
    """Views u8 (n, side, side, 3) of characters of the demo set."""
    from data import read_view
    from ingest import toon

    items = [toon.unseen(who, 1)[0] for who in toon.cast()[:: 48 // n][:n]]
    return torch.cat([read_view(toon.draw(item)["image"], side) for item in items])


# ---- evening 1. The docstring of each judge says what to read again ------------------------------


def judge_sample(answer):
    """He et al. 2021, section 3, Masking; of equal priorities, the docstring of sample"""
    priority = torch.tensor([[3.0, 0.5, 2.0, 0.0, 1.0], [0.0, 5.0, 4.0, 9.0, 7.0]])
    right = torch.tensor([[1, 3], [0, 2]]), torch.tensor([[0, 2, 4], [1, 3, 4]])
    turned = torch.tensor([[0, 2], [3, 4]]), torch.tensor([[1, 3, 4], [0, 1, 2]])
    mistakes = {"the patches of the highest priority are the visible ones": turned}
    same("2 of 5 patches are visible", answer.sample(priority, 2), right, mistakes, ordered=False)
    first = torch.arange(100).expand(3, -1)
    result, right = answer.sample(torch.zeros(3, 100), 25), (first[:, :25], first[:, 25:])
    same("of equal priorities the first are visible", result, right, ordered=False)


def judge_guided(answer):
    """docs/masks.md, what `beta` is; of a constant score, the docstring of guided"""
    noise = masking.gumbel_noise(4, 64, seeded(0))
    score = 5 + randn(4, 64) * torch.tensor([[1.0], [10.0], [0.1], [3.0]])
    together = (score - score.mean()) / score.std(unbiased=False)
    mistakes = {
        "the scores of all pictures are scaled together": 2 * together + noise,
        "the deviation divides by N - 1": masking.guided(score, 2 * (63 / 64) ** 0.5, noise),
        "beta multiplies the noise": masking.standard_score(score) + 2 * noise,
    }
    right = masking.guided(score, 2.0, noise)
    same("beta 2", answer.guided(score, 2.0, noise), right, mistakes)
    same("beta 0 is the noise, so a random mask", answer.guided(score, 0.0, noise), noise)
    same("a constant score is the noise, too", answer.guided(torch.ones(4, 64), 2.0, noise), noise)
    top = answer.guided(score, 1e6, noise).argsort(1)[:, 16:]
    same("beta 1e6 hides the top", top, score.argsort(1)[:, 16:], ordered=False)


def judge_own(answer):
    """the docstring of own; docs/masks.md, what `beta` is"""
    scores = {"view": drawings(6, 64)}
    noise, other = (masking.gumbel_noise(6, 64, seeded(seed)) for seed in (0, 1))

    def hidden(noise, of=answer.own):
        return masking.sample(of(scores, noise, 1.0, 48), 16)[1].sort(1).values

    priority = answer.own(scores, noise, 1.0, 48)
    holds("a number for each patch", kind(priority) == kind(noise), f"found {kind(priority)}.")
    holds("all are finite", priority.isfinite().all(), "A logarithm or a quotient of 0?")
    once, again = hidden(noise), hidden(noise)
    problem = "Two calls with equal arguments hide other patches."
    holds("only the arguments decide", torch.equal(once, again), problem)
    problem = "It hides the same patches as the mask `random`."
    holds("not random", not torch.equal(once, hidden(noise, masking.random)), problem)
    problem = "With other noise it hides the same patches, so a picture has one mask in all epochs."
    holds("it follows the noise, too", not torch.equal(once, hidden(other)), problem)


def show_masks(answer):
    """Hidden patches, and their share that is among the top of the score"""
    from common.evaluate import hide

    view = drawings(8, 96)
    noise = masking.gumbel_noise(8, 144, seeded(0))
    score = patches.patch_detail(view, patches.all_places(view, 8), 8)
    top = torch.zeros(8, 144).scatter(1, score.argsort(1)[:, 36:], 1.0)
    rows = [("picture", view), ("score: detail", score.view(8, 12, 12))]
    for beta in (0.0, 0.5, 2.0, 1000.0):
        _, ids = answer.sample(answer.guided(score, beta, noise), 36)
        share = top.gather(1, ids).mean()
        rows.append((f"beta {beta:g}: {share:.0%}", hide(view, ids, 8)))
    _, ids = answer.sample(answer.own({"view": view}, noise, 1.0, 108), 36)
    return [*rows, ("own", hide(view, ids, 8))]


# ---- evening 2 -----------------------------------------------------------------------------------


def picture_of_bytes():
    """u8 (12, 12, 3): 3 x 3 patches of 4 px, of 48 numbers each."""
    return torch.randint(256, (12, 12, 3), generator=seeded(0)).byte()


def judge_one_patch(answer):
    """kernels/patches.py, the formula `gather`"""
    picture = picture_of_bytes()
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    right = (picture[4:8, 8:12] / 255 - mean) / std
    swapped = (picture[8:12, 4:8] / 255 - mean) / std
    mistakes = {
        "row and column of the place are swapped": swapped.flatten(),
        "the pixels go column by column": right.transpose(0, 1).flatten(),
        "the bytes are not divided by 255": ((picture[4:8, 8:12] - mean) / std).flatten(),
        "the colour comes first: (colour, row, column)": right.permute(2, 0, 1).flatten(),
    }
    same("patch 5 of 3 x 3", answer.one_patch(picture, 5, 4), right.flatten(), mistakes)


def judge_all_patches(answer):
    """kernels/patches.py, the formula `gather`"""
    view = torch.stack([picture_of_bytes(), 255 - picture_of_bytes()])
    normal = view * torch.tensor(SCALE) + torch.tensor(SHIFT)
    planes = F.unfold(normal.permute(0, 3, 1, 2), 4, stride=4).transpose(1, 2)  # (2, 9, 3 * 16)
    right = planes.unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
    mistakes = {
        "memory is cut without a transpose, into strips": normal.reshape(2, 9, 48),
        "the colour comes first: (colour, row, column)": planes,
    }
    same("two views, as torch's unfold cuts them", answer.all_patches(view, 4), right, mistakes)


def judge_copy_kernel(answer):
    """the drawing in copy_kernel"""
    x, out = randn(32), torch.zeros(32)
    answer.copy_kernel[(4,)](x, out, BLOCK=8)
    same("32 numbers by 4 programs of 8 lanes", out, x)


def judge_half_kernel(answer):
    """the drawing in half_kernel"""
    x, out = randn(16), torch.full((16,), 9.0)
    answer.half_kernel[(3,)](x, out, 10, BLOCK=4)
    same("10 numbers by 3 programs of 4 lanes", out[:10], x[:10] / 2)
    problem = "Lanes that have no number write, too: the store has no mask, or a wrong one."
    holds("what lies behind stays as it was", (out[10:] == 9).all(), problem)


def judge_patch_kernel(answer):
    """the drawing in patch_kernel"""
    picture, ids = picture_of_bytes(), torch.tensor([7, 2, 3])
    scale, shift, out = torch.tensor(SCALE), torch.tensor(SHIFT), torch.full((4, 48), 9.0)
    answer.patch_kernel[(3,)](picture, ids, scale, shift, out, 3, 4, BLOCK=64)
    every = patches.gather_reference(picture[None], torch.arange(9)[None], 4)[0]
    bytes_of = patches.patch_bytes(picture[None], ids[None], 4)[0]
    third = torch.arange(48) // 16
    mistakes = {
        "a third of the lanes has one colour": bytes_of * scale[third] + shift[third],
        "program k writes patch k, and not ids[k]": every[:3],
    }
    same("patches 7, 2 and 3 of 9", out[:3], every[ids], mistakes)
    problem = "Lanes from 48 on write, too: the store has no mask, or a wrong one."
    holds("what lies behind stays as it was", (out[3] == 9).all(), problem)


# ---- evening 3 -----------------------------------------------------------------------------------


def small_mae():
    """A network with random biases, norms and tokens, patches (3, 4, 192), and ids in random order."""
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, dim=64, depth=2, heads=2)
    net = MAE(decoder_dim=32, decoder_depth=2, decoder_heads=2, **sizes).requires_grad_(False)
    for w in net.parameters():
        w += 0.1 * torch.randn_like(w)
    order = torch.rand(3, 16).argsort(1)
    return net, torch.randn(3, 4, 192), order[:, :4], order[:, 4:]


def judge_attention(answer):
    """Vaswani et al. 2017, eq. 1 and section 3.2.2; the docstring of attention"""
    net, *_ = small_mae()
    layer, x = net.encoder.blocks[0].attn, randn(3, 7, 64)
    q, k, v = layer.queries_keys_values(x)

    def joined(y):
        return layer.proj(y.transpose(1, 2).flatten(2))

    judge = F.scaled_dot_product_attention
    mistakes = {
        "the scores are not divided by sqrt(d)": joined(judge(q, k, v, scale=1.0)),
        "the softmax runs over the queries": joined((q @ k.mT / 32**0.5).softmax(-2) @ v),
        "the heads are joined without a transpose": layer.proj(judge(q, k, v).reshape(3, 7, 64)),
    }
    right = joined(judge(q, k, v))
    same("two heads, as torch has it", answer.attention(layer, x), right, mistakes)


def judge_positions(answer):
    """the docstring of positions"""
    right = sincos_positions(16, 3)[0, 1:]
    mistakes = {"the row comes before the column": right.roll(8, 1)}
    same("3 x 3 patches, 16 numbers", answer.positions(16, 3), right, mistakes)


def judge_encode(answer):
    """He et al. 2021, section 3, MAE encoder"""
    net, x, ids, _ = small_mae()
    vit, index = net.encoder, torch.arange(4).expand(3, -1)
    mistakes = {
        "a patch has the position of its index, and not of its place": vit(x, index),
        "the last norm is left out": vit.run_blocks(vit.embed(x, ids)),
    }
    same("4 of 16 patches", answer.encode(vit, x, ids), vit(x, ids), mistakes)


def judge_decode(answer):
    """He et al. 2021, section 3, MAE decoder"""
    net, x, ids_keep, ids_mask = small_mae()
    latent = net.encoder(x, ids_keep)
    right, _ = net.decoder(latent, ids_keep, ids_mask)
    turned = right.gather(1, ids_mask.argsort(1)[..., None].expand_as(right))
    mistakes = {"predictions are in the order of the picture, and not of ids_mask": turned}
    result = answer.decode(net.decoder, latent, ids_keep, ids_mask)
    same("12 hidden patches", result, right, mistakes)


def show_positions(answer):
    """How similar is the position of a patch to that of the others?"""
    x = F.normalize(answer.positions(64, 12), dim=1)
    return [("cosine", [(x @ x[place]).view(12, 12) for place in (0, 40, 77, 138)])]


# ---- evening 4 -----------------------------------------------------------------------------------


def judge_target(answer):
    """docs/masks.md, "The loss"; kernels/patches.py, the formula `target`"""
    x = 0.3 * randn(2, 5, 48) + randn(2, 5, 1, seed=1)
    centred, var = x - x.mean(2, keepdim=True), x.var(2, keepdim=True)
    mistakes = {
        "the floor is added to the deviation, not to the variance": centred / (var.sqrt() + 0.15),
        "the floor is not squared": centred / (var + 0.15).sqrt(),
        "the variance divides by P": centred / (var * 47 / 48 + 0.15**2).sqrt(),
    }
    same("floor 0.15", answer.target(x, 0.15), centred / (var + 0.15**2).sqrt(), mistakes)


def judge_weight(answer):
    """docs/masks.md, "The loss"; kernels/patches.py, the formulas `detail` and `weight`"""
    size = torch.tensor([0.0, 0.02, 0.1, 0.3]).view(4, 1, 1)
    x = torch.tensor([0.6, 0.1, 0.3]) + size * torch.rand(2, 4, 16, 3, generator=seeded(0))
    d = (x - x.mean(2, keepdim=True)).square().mean((2, 3)).sqrt()
    one_mean = (x - x.mean((2, 3), keepdim=True)).square().mean((2, 3)).sqrt()
    of = patches.detail_weight
    mistakes = {"one mean serves all colours, so a flat red patch has detail": of(one_mean, 0.1)}
    same("flat and detailed patches", answer.weight(x, 0.1), of(d, 0.1), mistakes)


def some_loss():
    """pred, z (2, 5, 48) and w (2, 5), and the loss and its gradient by autograd; float64."""
    pred, z = randn(2, 2, 5, 48).double()
    w = torch.rand(2, 5, generator=seeded(1)).double()
    pred.requires_grad_()
    value = (w * (pred - z).square().mean(2)).sum() / w.sum()
    return pred.detach(), z, w, value.detach(), torch.autograd.grad(value, pred)[0]


def judge_loss(answer):
    """kernels/patches.py, the formulas `error` and `loss`; the docstring of loss"""
    pred, z, w, right, _ = some_loss()
    mistakes = {
        "it is divided by the number of patches, and not by the sum of weights": right * w.mean(),
        "the weights are left out": (pred - z).square().mean(),
        "e is a sum over P, and not a mean": right * 48,
    }
    result = answer.loss(pred.requires_grad_(), z, w.requires_grad_())
    same("10 patches", result, right, mistakes)
    result.backward()
    holds("no gradient goes into w", w.grad is None, "w has a gradient: detach it.")


def judge_gradient(answer):
    """kernels/patches.py, the formula `gradient`"""
    pred, z, w, _, right = some_loss()
    result = answer.gradient(pred, z, w)
    mistakes = {
        "the sum of weights is left out": right * w.sum(),
        "the 2 of the square is left out": right / 2,
        "the P of the mean is left out": right * 48,
        "its sign is turned": -right,
    }
    same("as autograd has it", result, right, mistakes)
    step = torch.zeros_like(pred)
    step[1, 3, 7] = 1e-4
    slope = (answer.loss(pred + step, z, w) - answer.loss(pred - step, z, w)) / 2e-4
    same("as a finite difference of your loss has it", result[1, 3, 7], slope.detach())


def show_loss(answer):
    """What is predicted, and how much it weighs"""
    noise = torch.randint(-2, 3, (6, 96, 96, 3), generator=seeded(0))  # gray levels, as of a JPEG
    view = (drawings(6, 96) + noise).clamp(0, 255).byte()
    ids = patches.all_places(view, 8)
    x, bytes_of = patches.gather_reference(view, ids, 8), patches.patch_bytes(view, ids, 8)
    white = 2.64 + 0.01 * randn(1, 1, 192)  # of less than a gray level
    rows = [("with noise", view)]
    for floor in (0.15, 0.001):
        size = answer.target(white, floor).std()
        print(f"a white patch with noise, floor {floor:g}: its target has the deviation {size:.2f}")
        pixels = (128 + 48 * answer.target(x, floor)).clamp(0, 255).byte()
        rows.append((f"floor {floor:g}", put_patches(view, ids, pixels)))
    weight = answer.weight(bytes_of.unflatten(2, (64, 3)) / 255, 0.1)
    return [*rows, ("weight", weight.view(6, 12, 12))]


# ---- evening 5 -----------------------------------------------------------------------------------


def some_lora(answer):
    """A layer 64 -> 8 of rank 4 and scale 1.5, and x (2, 5, 64)."""
    torch.manual_seed(0)
    return answer.LoRA(nn.Linear(64, 8), 4, 6), randn(2, 5, 64)


def judge_LoRA(answer):
    """Hu et al. 2021, section 4.1 and eq. 3; the docstring of LoRA.__init__"""
    lora, x = some_lora(answer)
    shapes = tuple(lora.A.shape), tuple(lora.B.shape)
    holds("A is (4, 64), B is (8, 4)", shapes == ((4, 64), (8, 4)), f"found {shapes}.")
    most = lora.A.abs().max()
    problem = f"Its largest number is {most:.3g}, and 1 / sqrt(64) is 0.125."
    holds("A is uniform", 0.11 < most <= 0.125, problem)
    same("it begins as base, because B is 0", lora(x), lora.base(x))
    trains = {name for name, w in lora.named_parameters() if w.requires_grad}
    holds("only A and B get a gradient", trains == {"A", "B"}, f"found {sorted(trains)}.")
    nn.init.normal_(lora.B)
    change = x @ (lora.B @ lora.A).T
    mistakes = {"alpha / r is left out": lora.base(x) + change, "base is left out": 1.5 * change}
    same("rank 4, alpha 6, B not 0", lora(x), lora.base(x) + 1.5 * change, mistakes)


def judge_merge(answer):
    """Hu et al. 2021, section 4.1, No Additional Inference Latency"""
    lora, x = some_lora(answer)
    nn.init.normal_(lora.B)
    before, change = lora.base.weight.clone(), x @ (lora.B @ lora.A).T
    right = lora.base(x) + 1.5 * change
    merged = answer.merge(lora)
    holds("a plain Linear", type(merged) is nn.Linear, f"found {kind(merged)}.")
    mistakes = {"the bias is left out": right - lora.base.bias}
    mistakes["alpha / r is left out"] = right - change / 2
    same("the same output", merged(x), right, mistakes)
    problem = "Its weight has changed, so a second merge would add B A again."
    holds("base stays as it was", torch.equal(before, lora.base.weight), problem)


def judge_trained(answer):
    """torch.nn.Parameter: requires_grad, numel"""
    network = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    network[0].requires_grad_(False)
    mistakes = {
        "tensors are counted, and not their numbers": (2, 4),
        "frozen numbers are counted as trained": (131, 131),
    }
    same("104 frozen numbers and 27 others", answer.trained(network), (27, 131), mistakes)


def show_lora(answer):
    """Layers that learn a change of rank 2."""
    x, change = randn(256, 32), randn(32, 2, seed=1) @ randn(2, 32, seed=2) / 32**0.5
    for r, start in ((1, ""), (2, ""), (8, ""), (8, ", A begins at 0, too")):
        torch.manual_seed(0)
        lora = answer.LoRA(nn.Linear(32, 32), r, 2 * r)
        if start:
            nn.init.zeros_(lora.A)
        wanted = lora.base(x).detach() + x @ change
        optimizer = torch.optim.AdamW([lora.A, lora.B], lr=0.01)
        for _ in range(300):
            loss = (lora(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        count, _ = answer.trained(lora)
        print(f"a change of rank 2, learned with r = {r}{start}: {count} trained, loss {loss:.3f}")


# ---- evening 6 -----------------------------------------------------------------------------------

OURS, THEIRS = [53.1, 49.7, 55.2, 51.0, 54.4], [50.8, 50.3, 52.1, 50.5, 51.9]


def judge_interval(answer):
    """docs/results.md, "Differences are paired by seed"; the docstring of interval"""
    from scipy import stats

    d = np.subtract(OURS, THEIRS)
    half = np.ptp(stats.ttest_rel(OURS, THEIRS).confidence_interval()) / 2
    apart = np.ptp(stats.ttest_ind(OURS, THEIRS).confidence_interval()) / 2
    halves = {
        "the quantile is that of a normal distribution": 1.96 * d.std(ddof=1) / 5**0.5,
        "the deviation divides by n, and not by n - 1": half * 0.8**0.5,
        "it is not divided by sqrt(n)": half * 5**0.5,
        "ours and theirs are two samples, and not pairs": apart,
    }
    mistakes = {why: (d.mean(), d.mean() - x, d.mean() + x) for why, x in halves.items()}
    right = d.mean(), d.mean() - half, d.mean() + half
    same("five pairs, as scipy's ttest_rel", answer.interval(OURS, THEIRS), right, mistakes)


def judge_sign_flips(answer):
    """the docstring of sign_flips"""
    from scipy import stats

    d = np.subtract(OURS, THEIRS)
    p = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    mistakes = {
        "one side is counted": p / 2,
        "the signs of the data themselves are not counted": p - 2 / 32,
    }
    same("as scipy's permutation_test", answer.sign_flips(d.tolist()), p, mistakes)
    equal = answer.sign_flips([0.9, -0.4, -0.7, 0.8, -0.1])
    same("means that are equal, but for their rounding", equal, 26 / 32)


def judge_holm(answer):
    """the docstring of holm"""
    from lab import stats

    p = [0.04, 0.001, 0.3, 0.021, 0.02]
    mistakes = {
        "one may be smaller than the one before it": (0.08, 0.005, 0.3, 0.063, 0.08),
        "all are multiplied by m (Bonferroni)": (0.2, 0.005, 1.0, 0.105, 0.1),
        "they are returned sorted": tuple(stats.holm(sorted(p))),
    }
    same("five tests, as lab/stats.py", answer.holm(p), tuple(stats.holm(p)), mistakes)
    same("none is above 1", answer.holm([0.5, 0.9, 0.6]), (1.0, 1.0, 1.0))


def show_experiment(answer):
    """The differences of your runs, if there are some, else of published ones."""
    file = next(file for file in RUNS if Path(file).exists())
    top1 = {}
    for row in read_log(Path(file)):
        if "failed" not in row:
            top1.setdefault(row["arm"], {})[row["seed"]] = row["metrics"]["top1"]
    random = top1.pop("random", {})
    for arm, values in top1.items():
        pairs = [(values[seed], random[seed]) for seed in values.keys() & random.keys()]
        if len(pairs) > 1:
            mean, low, high = answer.interval(*zip(*pairs, strict=True))
            print(f"{arm}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {len(pairs)} seeds)")
    print(f"from {file}, against random; lab.run also allows for the choice of test pictures")


# ---- the command ---------------------------------------------------------------------------------

EVENINGS = {  # number: file, who judges the functions in it, who shows what they do
    1: ("masks", [judge_sample, judge_guided, judge_own], show_masks),
    2: ("patches", [judge_one_patch, judge_all_patches], None),
    3: ("network", [judge_attention, judge_positions, judge_encode, judge_decode], show_positions),
    4: ("loss", [judge_target, judge_weight, judge_loss, judge_gradient], show_loss),
    5: ("lora", [judge_LoRA, judge_merge, judge_trained], show_lora),
    6: ("experiment", [judge_interval, judge_sign_flips, judge_holm], show_experiment),
}
KERNELS = [judge_copy_kernel, judge_half_kernel, judge_patch_kernel]


def written(answer, name):
    """Is it there, and more than `raise NotImplementedError`? A kernel's function is its `fn`."""
    function = getattr(answer, name, None)
    source = inspect.getsource(getattr(function, "fn", function)) if function else ""
    return bool(source) and "raise NotImplementedError" not in source


def check(number, answer):
    """Judge a module, or anything with its names -> what is not written yet. Differs at the first mistake."""
    _, judges, _ = EVENINGS[number]
    if number == 2 and patches.TRITON:
        judges = judges + KERNELS
    elif number == 2:
        print("left out the three kernels, because Triton is not installed here")
    names = {judge.__name__.removeprefix("judge_"): judge for judge in judges}
    missing = [name for name in names if not written(answer, name)]
    for name in names:
        if name in missing:
            continue
        print(name)
        try:
            names[name](answer)
        except Differs as problem:
            raise Differs(f"{problem}\n         Read again: {names[name].__doc__}.") from None
        except NotImplementedError:
            if not missing:
                raise
            print("waits    it calls what is not written yet")
    if missing:
        done = len(names) - len(missing)
        print(f"not written yet: {', '.join(missing)} ({done} of {len(names)} written)")
    return missing


def answer_of(evening):
    """The module of an evening."""
    return importlib.import_module(f"exercises.evening{evening}_{EVENINGS[evening][0]}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("evening", type=int, choices=EVENINGS, help="its number")
    evening = parser.parse_args().evening
    answer, show = answer_of(evening), EVENINGS[evening][2]
    try:
        missing = check(evening, answer)
    except Differs as problem:
        print(problem)
        sys.exit(1)
    if missing:
        sys.exit(1)
    torch.set_num_threads(1)  # matrices are small here, and threads would wait for each other
    rows = show(answer) if show else None
    if rows:
        from common.plots import image_grid

        path = OUT / f"{show.__name__.removeprefix('show_')}.png"
        image_grid(path, show.__doc__, rows)
        print(f"wrote    {path}: look at it")
    print("All is right. Now answer the questions at the end of the file.")


if __name__ == "__main__":
    cli(main)
