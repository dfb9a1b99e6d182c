"""mask.py: exact counts, no bias where none is wanted, and what each strategy promises to hide."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import mask as masking

HUGE = 1e6
SOFT = ("attn_high", "attn_low", "detail", "learned")  # guided by beta alone
SIZES = [(4, 0.3), (4, 0.75), (49, 0.3), (49, 0.75), (144, 0.5), (144, 0.9)]


def noise_of(B, N, seed=0):
    return masking.gumbel_noise(B, N, torch.Generator().manual_seed(seed))


def patches_of(B, N, parts=5):
    """All that a strategy may ask for, at random."""
    draw = torch.Generator().manual_seed(1)
    attn = torch.rand(B, N, generator=draw) ** 4 + 1e-4
    known = {name: torch.rand(B, N, generator=draw) for name in ("fg", "difficulty")}
    # In pictures many patches are exactly 0 or 1, where a logarithm or a quotient is infinite.
    known["fg"] = (3 * known["fg"] - 1).clamp(0, 1)
    side = 4 * math.isqrt(N)
    known["view"] = torch.randint(0, 256, (B, side, side, 3), generator=draw, dtype=torch.uint8)
    shares = torch.rand(B, N, parts, generator=draw)
    known["attn"] = attn / attn.sum(1, keepdim=True)
    known["parts"] = shares / shares.sum(2, keepdim=True)
    for name in sorted({*masking.NEEDS.values()} - known.keys()):  # a score of your own
        known[name] = torch.rand(B, N, generator=draw)
    return known


def hidden(name, patches, noise, M, t=1.0, **keys):
    """(B, N) bool: the M patches that a strategy hides."""
    priority = masking.STRATEGIES[name](patches, noise, t, M, **keys)
    _, ids = masking.sample(priority, priority.shape[1] - M)
    return torch.zeros_like(priority).scatter(1, ids, 1.0).bool()


# ---- counts and chance ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", masking.STRATEGIES)
def test_every_strategy_hides_exactly_as_many(name):
    for N, ratio in SIZES:
        K = masking.kept(N, ratio)
        known = patches_of(5, N)
        known["view"][-1] = (
            200  # one colour, as in large areas of drawings: the logarithm of its detail is infinite
        )
        for t in (0.0, 0.4, 1.0):
            priority = masking.STRATEGIES[name](known, noise_of(5, N), t, N - K)
            assert priority.isfinite().all()
            keep, hide = masking.sample(priority, K)
            assert keep.shape == (5, K) and keep.is_contiguous() and hide.is_contiguous()
            every = torch.cat([keep, hide], 1).sort(1).values
            assert torch.equal(every, torch.arange(N).expand(5, N))


@pytest.mark.parametrize("name", ["random", "squares", "grid", "fg_heavy"])
def test_no_place_is_favoured(name):
    """Of 20,000 images each patch is hidden three of four times; of a side, as often as its quota."""
    fg = figures(16, [8])
    keys = {"share": 0.9} if name == "fg_heavy" else {}
    patches = {"fg": fg.expand(20_000, -1)}
    often = hidden(name, patches, noise_of(20_000, 16), 12, **keys).float().mean(0)
    expected = torch.where(fg[0] == 1, 7 / 8, 5 / 8) if name == "fg_heavy" else 0.75
    assert (often - expected).abs().max() < 0.015


def test_the_first_patch_is_drawn_with_the_odds_of_its_score():
    """Gumbel-top-k: P(patch is hidden first) = softmax(beta * standard score)."""
    score = torch.tensor([[0.1, 0.4, 0.2, 0.9]]).expand(40_000, -1)
    priority = masking.guided(score, 0.7, noise_of(40_000, 4))
    drawn = priority.argmax(1).bincount(minlength=4) / 40_000
    z = (score[0] - score[0].mean()) / score[0].std(unbiased=False)
    torch.testing.assert_close(drawn, (0.7 * z).softmax(0), rtol=0, atol=0.01)


def test_an_exact_number_is_kept_and_both_sides_have_one():
    assert (masking.kept(196, 0.75), masking.kept(10, 0.9)) == (49, 1)
    assert masking.kept(100, 0.85, throw=0.4) == 15
    assert masking.kept(4, 0.5, throw=0.25) == 2
    for N, ratio, throw in ((4, 0.9, 0), (9, 0.0, 0), (9, 1.0, 0), (100, 0.4, 0.4), (9, 0.5, -0.1)):
        with pytest.raises(ValueError, match="at least 1"):
            masking.kept(N, ratio, throw)


def test_the_pixels_of_a_patch_are_those_at_its_place():
    view = patches_of(2, 9)["view"]
    pixels = masking.pixels_of(view, torch.zeros(2, 9))
    assert pixels.shape == (2, 9, 16, 3)
    for k in range(9):
        top, left = 4 * (k // 3), 4 * (k % 3)
        square = view[:, top : top + 4, left : left + 4].reshape(2, 16, 3)
        assert torch.equal(pixels[:, k], square / 255)


# ---- guidance: from random to certain ------------------------------------------------------------


@pytest.mark.parametrize("name", SOFT)
def test_without_strength_or_before_its_start_a_guide_is_random_bit_for_bit(name):
    strategy = masking.STRATEGIES[name]
    patches, noise = patches_of(4, 36), noise_of(4, 36)
    turn = 0.5 if name in ("detail", "learned") else 0.05  # its sign turns, or it has not begun
    assert torch.equal(strategy(patches, noise, 1.0, 27, beta=0.0), noise)
    assert torch.equal(strategy(patches, noise, turn, 27), noise)
    assert torch.equal(strategy(patches, noise, turn, 27, beta=HUGE), noise)
    flat = {"view": torch.full_like(patches["view"], 7)}
    flat |= dict.fromkeys(("attn", "difficulty"), torch.full((4, 36), 0.3))
    assert torch.equal(strategy(flat, noise, 1.0, 27), noise)


@pytest.mark.parametrize("name", SOFT)
def test_beta_infinite_is_top_k(name):
    """attn_low hides the least attended; detail and learned begin with the lowest."""
    patches = patches_of(6, 64)
    score = patches.get(masking.NEEDS[name])
    if name == "detail":
        score = masking.pixels_of(patches["view"], torch.zeros(6, 64)).std(2).square().sum(2)
    for t in (0.2, 1.0):
        lowest = name == "attn_low" or (name in ("detail", "learned") and t < 0.5)
        first = score.topk(48, 1, largest=not lowest).indices
        found = hidden(name, patches, noise_of(6, 64), 48, t, beta=HUGE)
        assert torch.equal(found, torch.zeros_like(score).scatter(1, first, 1.0).bool())


def test_guidance_rises_on_a_straight_line():
    rising = [masking.ramp(t, 0.2, 0.4) for t in (0.1, 0.2, 0.4, 0.6, 1)]
    assert rising == pytest.approx([0, 0, 0.5, 1, 1])
    assert [masking.ramp(t, 0.2, 0) for t in (0.1, 0.2)] == [0, 1]
    for name in ("attn_high", "attn_low", "learned"):
        strategy = functools.partial(masking.STRATEGIES[name], patches_of(4, 36), noise_of(4, 36))
        found = strategy(0.3, 27, beta=2.0, start=0.2, ramp_for=0.4)
        expected = strategy(0.3, 27, beta=0.5, start=0.0, ramp_for=0.0)
        torch.testing.assert_close(found, expected)


def test_a_hint_shows_a_share_of_the_most_attended_tenth_by_chance():
    """As many others are hidden. None are shown before guidance starts, and no more than may be visible."""
    patches, noise = patches_of(400, 100), noise_of(400, 100)
    high = hidden("attn_high", patches, noise, 75, beta=HUGE)
    top = patches["attn"].argsort(1)[:, -10:]
    for hint, t, count in ((0.5, 1.0, 5), (0.1, 1.0, 1), (1.0, 1.0, 10), (1.0, 0.14, 4), (0, 1, 0)):
        found = hidden("attn_hint", patches, noise, 75, t, beta=HUGE, hint=hint)
        assert ((high & ~found).sum(1) == count).all() and (found.sum(1) == 75).all()
        shown = ~found.gather(1, top)
        assert (shown.sum(1) == count).all()
        assert (shown.float().mean(0) - count / 10).abs().max() < 0.1  # no rank is preferred
    assert hidden("attn_hint", patches, noise, 95, hint=1.0).sum(1).eq(95).all()
    before = hidden("attn_hint", patches, noise, 75, 0.05)
    assert torch.equal(before, hidden("random", {}, noise, 75))
    no_map = {"attn": torch.ones(400, 100)}  # of a teacher that has made none yet
    for M in (75, 95):
        assert torch.equal(hidden("attn_hint", no_map, noise, M), hidden("random", {}, noise, M))


def test_what_the_teacher_attends_to_least_is_thrown():
    patches, noise = patches_of(8, 100), noise_of(8, 100)
    keep, hide = masking.sample(masking.attn_high(patches, noise, 1.0, 45, beta=HUGE), 15, 40)
    order = patches["attn"].argsort(1)
    assert torch.equal(keep.sort(1).values, order[:, 40:55].sort(1).values)
    assert torch.equal(hide.sort(1).values, order[:, 55:].sort(1).values)
    hinted = masking.attn_hint(patches, noise, 1.0, 45, beta=HUGE, hint=0.9)
    keep, _ = masking.sample(hinted, 15, 40)
    assert ((keep[..., None] == order[:, None, 90:]).any(2).sum(1) == 9).all()  # hints are seen


# ---- quotas of figure, ground and parts ----------------------------------------------------------


def figures(N, sizes):
    """(B, N) in {0, 1}: images whose figures have these many patches, at random places."""
    rows = [noise_of(1, N, size).argsort(1).argsort(1)[0] < size for size in sizes]
    return torch.stack(rows).float()


@pytest.mark.parametrize("M", [50, 75, 90])
@pytest.mark.parametrize("name, side", [("fg_heavy", 1), ("bg_heavy", 0)])
def test_quotas_hold_for_empty_tiny_and_full_figures(name, side, M):
    sizes = 40 * [0, 1, 2, 10, 30, 50, 70, 90, 98, 99, 100]
    fg = figures(100, sizes)
    found = hidden(name, {"fg": fg}, noise_of(len(sizes), 100), M, share=0.9)
    for size, row, mask in zip(sizes, fg, found, strict=True):
        a = size if side else 100 - size  # of the side that is hidden first
        b = 100 - a
        n = int((mask & (row == side)).sum())
        low, high = max(0, M - (b - (b > 0))), min(M, a - (a > 0))
        assert n == min(max(round(0.9 * a), low), high), size
        assert a == 0 or n < a  # at least one patch of each side stays visible
        assert b == 0 or M - n < b


def test_a_quota_takes_the_share_and_spares_what_it_is_given():
    fg = figures(100, [40] * 50)

    def count(**keys):
        found = hidden("fg_heavy", {"fg": fg}, noise_of(50, 100), 75, **keys)
        return set((found & (fg == 1)).sum(1).tolist())

    # at 0.25: the background has 59 to hide, so 16 must come from the foreground
    assert [count(share=share) for share in (0.25, 0.5, 0.75, 1)] == [{16}, {20}, {30}, {39}]
    assert count(share=1, spare=5) == {35}


def part_map(N, sizes, images):
    """(images, N, P) shares of parts of these sizes, at random places."""
    part = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = torch.stack([part[noise_of(1, N, s).argsort(1)[0]] for s in range(images)])
    return F.one_hot(rows, len(sizes)).float()


def test_parts_are_hidden_in_portions_first_and_whole_at_the_end():
    area = torch.tensor([40, 0, 20, 16, 24])  # an empty part too
    shares = part_map(100, area.tolist(), 64)
    found = {}
    for t in (0, 1):
        mask = hidden("parts", {"parts": shares}, noise_of(64, 100), 75, t).float()
        found[t] = torch.einsum("bn,bnp->bp", mask, shares)
    assert (found[0] - 0.75 * area).abs().max() <= 1  # as exact as whole patches allow
    touched = (found[1] > 0) & (found[1] < area)
    assert (touched.sum(1) <= 1).all()  # at most one part is cut in two
    often = (found[1] == area)[:, area > 0].float().mean(0)
    assert often.min() > 0.3 and often.max() < 1  # chance decides which parts are whole


def test_the_curriculum_can_be_off():
    patches, noise = {"parts": part_map(64, [32, 16, 16], 8)}, noise_of(8, 64)

    def priority(t, **keys):
        return masking.parts(patches, noise, t, 48, **keys)

    assert torch.equal(priority(0.0, whole=0.5), priority(0.7, whole=0.5))
    assert torch.equal(priority(1.0), priority(0.3, whole=1.0))
    torch.testing.assert_close(priority(math.sqrt(0.5)), priority(0.0, whole=0.5))


# ---- masks without a score -----------------------------------------------------------------------


@pytest.mark.parametrize("size, b", [(0.5, 5), (0.4, 4), (0.01, 2), (2.0, 10)])
def test_a_block_has_the_highest_rank_of_its_square(size, b):
    noise = noise_of(3, 100)
    rank = noise.argsort(1).argsort(1).float().view(3, 10, 10)
    found = masking.block({}, noise, 0.5, 75, size=size) - 1e-3 * noise
    for y in range(10):
        for x in range(10):
            rows = slice(max(0, y - (b - 1) // 2), y + b // 2 + 1)
            columns = slice(max(0, x - (b - 1) // 2), x + b // 2 + 1)
            highest = rank[:, rows, columns].amax((1, 2))
            torch.testing.assert_close(found[:, 10 * y + x], highest, rtol=0, atol=1e-3)


def test_green_noise_is_a_difference_of_gaussian_blurs():
    """The filter is normalised at the border, where a part of it lies outside."""
    noise = noise_of(1, 144)
    i = torch.arange(12.0)

    def blurred(std):
        kernel = torch.exp(-((i[:, None] - i) ** 2) / (2 * std**2))
        kernel = kernel / kernel.sum(1, keepdim=True)
        return torch.einsum("yi,xj,ij->yx", kernel, kernel, noise.view(12, 12))

    found = masking.green({}, noise, 0.5, 72)
    torch.testing.assert_close(found.view(12, 12), blurred(1.0) - blurred(2.0), rtol=0, atol=1e-4)


def test_a_grid_keeps_one_of_four_and_squares_hide_all_four():
    noise = noise_of(50, 144)
    kept = ~hidden("grid", {}, noise, 108).unflatten(1, (6, 2, 6, 2))
    assert (kept.sum((2, 4)) == 1).all()
    assert len({tuple(m.flatten().tolist()) for m in kept}) == 4  # four grids, drawn by chance
    for unit in (2, 3):
        found = hidden("squares", {}, noise, 72, unit=unit)
        cells = found.unflatten(1, (12 // unit, unit, 12 // unit, unit)).sum((2, 4))
        assert set(cells.flatten().tolist()) == {0, unit**2}
