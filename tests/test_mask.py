import pytest
import torch

import mask as masking

GUIDED = [name for name in masking.STRATEGIES if name in masking.NEEDS]


def noise_of(B, N, seed=0):
    return masking.gumbel_noise(B, N, torch.Generator().manual_seed(seed))


def patches_of(B, N, M, seed=1):
    attn = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-4
    return {"attn": attn / attn.sum(1, keepdim=True), "masked": M}


@pytest.mark.parametrize("name", masking.STRATEGIES)
@pytest.mark.parametrize(
    "N, ratio", [(N, r) for N in (4, 49, 144, 196) for r in (0.3, 0.5, 0.75, 0.9) if (N, r) != (4, 0.9)]
)
def test_every_strategy_hides_exactly_as_many(name, N, ratio):
    K = masking.kept(N, ratio)
    priority = masking.STRATEGIES[name](patches_of(5, N, N - K), noise_of(5, N), 1.0)
    keep, hidden = masking.sample(priority, K)
    assert keep.shape == (5, K) and hidden.shape == (5, N - K) and keep.is_contiguous() and hidden.is_contiguous()
    assert torch.equal(torch.cat([keep, hidden], 1).sort(1).values, torch.arange(N).expand(5, N))


@pytest.mark.parametrize("name", GUIDED)
def test_before_guidance_starts_a_strategy_is_random_bit_for_bit(name):
    noise = noise_of(4, 36)
    strategy = masking.STRATEGIES[name]
    assert torch.equal(strategy(patches_of(4, 36, 27), noise, 0.05), noise)
    if name != "attn_hint":  # a hint shows some patches even where nothing is preferred
        assert torch.equal(strategy(patches_of(4, 36, 27), noise, 1.0, beta=0.0), noise)


def test_beta_infinite_is_top_k():
    patches, noise = patches_of(6, 64, 48), noise_of(6, 64)
    order = patches["attn"].argsort(1, descending=True)
    for name, expected in (("attn_high", order[:, :48]), ("attn_low", order[:, -48:])):
        _, hidden = masking.sample(masking.STRATEGIES[name](patches, noise, 1.0, beta=float("inf")), 16)
        assert torch.equal(hidden.sort(1).values, expected.sort(1).values)


def test_constant_scores_are_random_and_finite():
    noise = noise_of(4, 36)
    for value in (0.0, 1.0, 1e-8):
        found = masking.attn_high({"attn": torch.full((4, 36), value), "masked": 27}, noise, 1.0)
        assert torch.equal(found, noise)


def test_high_hides_attention_and_low_spares_it():
    patches, noise = patches_of(200, 64, 48), noise_of(200, 64)
    share = {}
    for name in ("random", "attn_high", "attn_low"):
        _, hidden = masking.sample(masking.STRATEGIES[name](patches, noise, 1.0), 16)
        share[name] = patches["attn"].gather(1, hidden).sum(1).mean().item()
    assert share["attn_low"] < 0.70 < share["random"] < 0.80 < share["attn_high"]


def test_hint_shows_a_tenth_of_what_would_be_hidden_first():
    patches, noise = patches_of(8, 100, 75), noise_of(8, 100)
    high = masking.attn_high(patches, noise, 1.0)
    hint = masking.attn_hint(patches, noise, 1.0, hint=0.2)
    _, hidden_high = masking.sample(high, 25)
    _, hidden_hint = masking.sample(hint, 25)
    for a, b in zip(hidden_high.tolist(), hidden_hint.tolist(), strict=True):
        assert len(set(a) - set(b)) == 15  # a fifth of 75


@pytest.mark.parametrize("text, says", [
    ("attn_hihg", "did you mean attn_high"), ("zzz", "there are: random"), ("attn_high:betta=2", "it has: beta, start"),
    ("attn_high:beta=x", "not a number"), ("attn_high:beta=-1", "0 or more"), ("random:beta=1", "none")])  # fmt: skip
def test_bad_names_and_parameters(text, says):
    with pytest.raises(ValueError, match=says):
        masking.parse_mask(text)


def test_good_names_and_parameters():
    assert masking.parse_mask("random") == ("random", {})
    assert masking.parse_mask("attn_hint:beta=2,hint=.1") == ("attn_hint", {"beta": 2.0, "hint": 0.1})


def test_ratio():
    assert masking.parse_ratio("0.75") == (0.75, 0.75) and masking.parse_ratio(".5:.9") == (0.5, 0.9)
    for bad in ("0", "1", "-.5", "x", ".5:", ".5:.6:.7", "1.5"):
        with pytest.raises(ValueError, match="--ratio"):
            masking.parse_ratio(bad)
    assert masking.kept(196, 0.75) == 49 and masking.kept(10, 0.9) == 1
    for N, ratio in ((4, 0.9), (9, 0.95)):
        with pytest.raises(ValueError, match="at least 1"):
            masking.kept(N, ratio)


def test_write_your_own_in_three_lines(monkeypatch):
    def mine(patches, noise, t, beta=1.0):
        return masking.guided(patches["attn"], beta, noise)

    monkeypatch.setitem(masking.STRATEGIES, "mine", mine)
    name, params = masking.parse_mask("mine:beta=3")
    keep, hidden = masking.sample(masking.STRATEGIES[name](patches_of(2, 36, 27), noise_of(2, 36), 0.5, **params), 9)
    assert hidden.shape == (2, 27)
