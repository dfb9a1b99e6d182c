import math

import pytest
import torch

import mask as masking

INF = float("inf")
ATTENTIVE = [name for name, need in masking.NEEDS.items() if need == "attn"]
SOFT = [*ATTENTIVE, "detail", "learned"]  # guided by beta


def noise_of(B, N, seed=0):
    return masking.gumbel_noise(B, N, torch.Generator().manual_seed(seed))


def patches_of(B, N, seed=1, parts=5):
    """All that a strategy may ask for, at random."""
    draw = torch.Generator().manual_seed(seed)
    attn = torch.rand(B, N, generator=draw) ** 4 + 1e-4
    known = {name: torch.rand(B, N, generator=draw) for name in ("fg", "detail", "difficulty")}
    shares = torch.rand(B, N, parts, generator=draw)
    known |= {
        "attn": attn / attn.sum(1, keepdim=True),
        "parts": shares / shares.sum(2, keepdim=True),
    }
    return known


def hidden(priority, M):
    """(B, N) bool: the M patches that the sampler hides."""
    _, ids = masking.sample(priority, priority.shape[1] - M)
    return torch.zeros_like(priority).scatter(1, ids, 1.0).bool()


@pytest.mark.parametrize("name", masking.STRATEGIES)
@pytest.mark.parametrize(
    "N, ratio",
    [(N, r) for N in (4, 49, 144, 196) for r in (0.3, 0.5, 0.75, 0.9) if (N, r) != (4, 0.9)],
)
def test_every_strategy_hides_exactly_as_many(name, N, ratio):
    K = masking.kept(N, ratio)
    for t in (0.0, 0.4, 1.0):
        priority = masking.STRATEGIES[name](patches_of(5, N), noise_of(5, N), t, N - K)
        assert not priority.isnan().any()
        keep, hide = masking.sample(priority, K)
        assert (
            keep.shape == (5, K)
            and hide.shape == (5, N - K)
            and keep.is_contiguous()
            and hide.is_contiguous()
        )
        assert torch.equal(torch.cat([keep, hide], 1).sort(1).values, torch.arange(N).expand(5, N))


@pytest.mark.parametrize("name", ATTENTIVE)
def test_before_guidance_starts_a_strategy_is_random_bit_for_bit(name):
    noise = noise_of(4, 36)
    strategy = masking.STRATEGIES[name]
    assert torch.equal(strategy(patches_of(4, 36), noise, 0.05, 27), noise)


@pytest.mark.parametrize(
    "name", [name for name in SOFT if name != "attn_hint"]
)  # a hint shows some in any case
def test_beta_0_is_random_bit_for_bit(name):
    noise = noise_of(4, 36)
    assert torch.equal(masking.STRATEGIES[name](patches_of(4, 36), noise, 1.0, 27, beta=0.0), noise)


def test_beta_infinite_is_top_k():
    patches, noise = patches_of(6, 64), noise_of(6, 64)
    order = patches["attn"].argsort(1, descending=True)
    for name, expected in (("attn_high", order[:, :48]), ("attn_low", order[:, -48:])):
        _, hide = masking.sample(masking.STRATEGIES[name](patches, noise, 1.0, 48, beta=INF), 16)
        assert torch.equal(hide.sort(1).values, expected.sort(1).values)
    for name, key in (
        ("detail", "detail"),
        ("learned", "difficulty"),
    ):  # the lowest first, the highest at the end
        for t, largest in ((0.2, False), (1.0, True)):
            _, hide = masking.sample(masking.STRATEGIES[name](patches, noise, t, 48, beta=INF), 16)
            expected = patches[key].topk(48, largest=largest).indices
            assert torch.equal(hide.sort(1).values, expected.sort(1).values)


@pytest.mark.parametrize("name", SOFT)
def test_beta_infinite_while_the_ramp_is_0_is_random(name):
    noise = noise_of(4, 36)
    t = 0.5 if name in ("detail", "learned") else 0.0  # where its sign turns, or before it starts
    assert torch.equal(masking.STRATEGIES[name](patches_of(4, 36), noise, t, 27, beta=INF), noise)


def test_constant_scores_are_random_and_finite():
    noise = noise_of(4, 36)
    for value in (0.0, 1.0, 1e-8):
        for name in ("attn_high", "detail", "learned"):
            flat = {masking.NEEDS[name]: torch.full((4, 36), value)}
            assert torch.equal(masking.STRATEGIES[name](flat, noise, 1.0, 27), noise)


def test_high_hides_attention_and_low_spares_it():
    patches, noise = patches_of(200, 64), noise_of(200, 64)
    share = {}
    for name in ("random", "attn_high", "attn_low"):
        hide = hidden(masking.STRATEGIES[name](patches, noise, 1.0, 48), 48)
        share[name] = (patches["attn"] * hide).sum(1).mean().item()
    assert share["attn_low"] < 0.70 < share["random"] < 0.80 < share["attn_high"]


def test_hint_shows_a_tenth_of_what_would_be_hidden_first():
    patches, noise = patches_of(8, 100), noise_of(8, 100)
    high = masking.attn_high(patches, noise, 1.0, 75)
    hint = masking.attn_hint(patches, noise, 1.0, 75, hint=0.2)
    _, hidden_high = masking.sample(high, 25)
    _, hidden_hint = masking.sample(hint, 25)
    for a, b in zip(hidden_high.tolist(), hidden_hint.tolist(), strict=True):
        assert len(set(a) - set(b)) == 15  # a fifth of 75


def test_what_the_teacher_attends_to_least_is_thrown():
    patches, noise = patches_of(8, 100), noise_of(8, 100)
    keep, hide = masking.sample(masking.attn_high(patches, noise, 1.0, 85, beta=INF), 15, 40)
    order = patches["attn"].argsort(1)
    for i in range(8):
        assert set(keep[i].tolist()) == set(order[i, 40:55].tolist())
        assert set(hide[i].tolist()) == set(order[i, 55:].tolist())
    assert masking.kept(100, 0.85, throw=0.4) == 15
    with pytest.raises(ValueError, match="thrown"):
        masking.kept(100, 0.4, throw=0.4)


def test_the_keys_of_a_mask_are_its_keyword_parameters():
    assert masking.PARAMS["random"] == {"throw": 0.0}
    keys = {"beta": 0.5, "start": 0.1, "ramp_for": 0.1, "throw": 0.0, "shuffle": 0}
    assert masking.PARAMS["attn_high"] == keys
    assert masking.PARAMS.keys() == masking.STRATEGIES.keys()


def test_an_exact_number_is_kept_and_both_sides_have_one():
    assert masking.kept(196, 0.75) == 49 and masking.kept(10, 0.9) == 1
    for N, ratio in ((4, 0.9), (9, 0.95), (9, 0.0), (9, 1.0)):
        with pytest.raises(ValueError, match="at least 1"):
            masking.kept(N, ratio)


# ---- figure and ground: quotas -------------------------------------------------------------------


def figures(N, sizes):
    """(B, N) in {0, 1}: images whose figures have these many patches, at random places."""
    return torch.stack([(noise_of(1, N, s).argsort(1).argsort(1)[0] < s).float() for s in sizes])


@pytest.mark.parametrize("M", [50, 75, 90])
@pytest.mark.parametrize("name, side", [("fg_heavy", 1), ("bg_heavy", 0)])
def test_quotas_hold_for_empty_tiny_and_full_figures(name, side, M):
    sizes = [0, 1, 2, 10, 30, 50, 70, 90, 98, 99, 100]
    fg = figures(100, sizes)
    hide = hidden(masking.STRATEGIES[name]({"fg": fg}, noise_of(len(sizes), 100), 0.5, M), M)
    for size, row, mask in zip(sizes, fg, hide, strict=True):
        a = size if side else 100 - size  # of the side that is hidden first
        b = 100 - a
        n = int((mask & (row == side)).sum())
        low, high = max(0, M - (b - (b > 0))), min(M, a - (a > 0))
        assert n == min(max(round(0.9 * a), low), high), (size, n)
        assert int(mask.sum()) == M
        assert a == 0 or n < a  # at least one patch of each side stays visible
        assert b == 0 or M - n < b


def test_a_quota_takes_the_share_it_is_given():
    fg = figures(100, [40] * 50)
    for share, n in (
        (0.25, 15),
        (0.5, 20),
        (0.75, 30),
        (1, 39),
    ):  # .25: the ground holds 59, so 16 must come from here
        hide = hidden(masking.fg_heavy({"fg": fg}, noise_of(50, 100), 0.0, 75, share=share), 75)
        assert ((hide & (fg == 1)).sum(1) == max(n, 16)).all()


def test_within_a_side_chance_decides():
    fg = figures(100, [50]).expand(2000, -1)
    often = hidden(masking.fg_heavy({"fg": fg}, noise_of(2000, 100), 0.5, 75), 75).float().mean(0)
    for side, expected in ((1, 0.9), (0, 0.6)):
        assert (often[fg[0] == side] - expected).abs().max() < 0.05


# ---- parts: from a portion of each to whole ones -------------------------------------------------


def part_map(N, sizes, images):
    """(images, N, P) shares of parts of these sizes, at random places."""
    part = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = torch.stack([part[noise_of(1, N, s).argsort(1)[0]] for s in range(images)])
    return torch.nn.functional.one_hot(rows, len(sizes)).float()


def test_parts_are_hidden_in_portions_first_and_whole_at_the_end():
    sizes = [40, 0, 20, 16, 24]  # an empty part too
    shares = part_map(100, sizes, 64)
    patches, noise = {"parts": shares}, noise_of(64, 100)
    masks = {t: hidden(masking.parts(patches, noise, t, 75), 75).float() for t in (0, 1)}
    found = {t: torch.einsum("bn,bnp->bp", m, shares) for t, m in masks.items()}
    assert (
        found[0] - 0.75 * torch.tensor(sizes)
    ).abs().max() <= 1  # as exact as whole patches allow
    area = torch.tensor(sizes).float()
    touched = (found[1] > 0) & (found[1] < area)
    assert (touched.sum(1) <= 1).all() and (
        found[1].sum(1) == 75
    ).all()  # at most one part is cut in two


def test_the_curriculum_can_be_off():
    patches, noise = {"parts": part_map(64, [32, 16, 16], 8)}, noise_of(8, 64)
    still = [masking.parts(patches, noise, t, 48, whole=0.5) for t in (0.0, 0.7)]
    assert torch.equal(*still)
    assert torch.equal(
        masking.parts(patches, noise, 1.0, 48), masking.parts(patches, noise, 0.3, 48, whole=1.0)
    )
    halfway = math.sqrt(0.5)
    torch.testing.assert_close(masking.parts(patches, noise, halfway, 48), still[0])


# ---- masks without a map -------------------------------------------------------------------------


def neighbours_alike(mask, g):
    """Share of horizontally and vertically neighbouring patches that are both hidden or both
    visible.
    """
    m = mask.unflatten(1, (g, g))
    return (
        torch.cat([(m[:, 1:] == m[:, :-1]).flatten(), (m[:, :, 1:] == m[:, :, :-1]).flatten()])
        .float()
        .mean()
        .item()
    )


def test_blocks_and_green_noise_are_smoother_than_random_and_a_grid_is_regular():
    noise, alike = noise_of(200, 144), {}
    for name in ("random", "block", "green", "grid"):
        alike[name] = neighbours_alike(hidden(masking.STRATEGIES[name]({}, noise, 0.5, 72), 72), 12)
    assert alike["random"] == pytest.approx(0.5, abs=0.02)
    assert alike["block"] > 0.8 > alike["green"] > 0.65
    grid = hidden(masking.grid({}, noise, 0.5, 108), 108).unflatten(1, (6, 2, 6, 2))
    assert (grid.sum((2, 4)) == 3).all() and ((~grid).flatten(3).any(3).sum((1, 2)) >= 6).all()
    assert (
        len({tuple(m.flatten().tolist()) for m in grid}) == 4
    )  # four regular grids, drawn by chance


def test_squares_hides_whole_squares():
    hide = hidden(masking.squares({}, noise_of(50, 144), 0.5, 88), 88).unflatten(1, (6, 2, 6, 2))
    assert set(hide.sum((2, 4)).flatten().tolist()) == {0, 4}


def test_diversity_and_entropy_name_a_collapse():
    same = masking.sample(noise_of(1, 64).expand(32, -1), 16)[1]
    assert masking.diversity(same, 64) == pytest.approx(0, abs=1e-6)
    assert masking.diversity(masking.sample(noise_of(512, 64), 16)[1], 64) == pytest.approx(
        1, abs=0.02
    )
    score = torch.rand(8, 64)
    assert masking.entropy(score, 0.0) == pytest.approx(1) and masking.entropy(score, 50.0) < 0.2
