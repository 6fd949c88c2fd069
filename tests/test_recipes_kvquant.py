"""Channel maps and bit allocators around quantization: worked examples, identities, bad input."""

import math
from typing import Any

import pytest
import torch
from tokencomp import ops, recipes
from torch import Tensor


def rows(*values: float) -> Tensor:
    return torch.tensor([[values]])


def test_balancer() -> None:
    got = recipes.channel_balancer(rows(8, 1, 1, 2), rows(2, 16, 1, 2))
    assert got.tolist() == [[[2, 0.25, 1, 1]]]
    k, q = torch.tensor([[[[1.0, 16, -1, 2]]]]), torch.tensor([8.0, 1, 1, -2])
    for scale, logit in ((got, 19.667), (None, -2.333)):
        codes, params = ops.kv_quantize(k, 2, group=4, pre_scale=scale)
        back = ops.kv_dequantize(codes, params, 2, group=4, pre_scale=scale)
        assert float(back[0, 0, 0] @ q) == pytest.approx(logit, abs=1e-2)


def test_balancer_takes_the_largest_query_head_and_is_one_without_data() -> None:
    q = torch.tensor([[[4.0, 0, 1], [16.0, 0, 1e30]]])
    assert recipes.channel_balancer(q, rows(1, 1, 1e-30)).tolist() == [[[4, 1, 1e4]]]
    assert recipes.channel_balancer(q, rows(0, 0, 1)).tolist() == [[[1, 1, 1e4]]]


def test_separable_scale() -> None:
    x = torch.tensor([[0, 1, 2, -8], [3, -1, 0, 8], [1.5, 2, -2, 4], [-3, 0.5, 1, -4]])
    got = 1 / recipes.separable_scale(ops.channel_stats(x[None, None]).absmax)
    torch.testing.assert_close(got, rows(1.73205, 1.41421, 1.41421, 2.82843), rtol=1e-5, atol=1e-5)
    assert recipes.separable_scale(rows(0, 4)).tolist() == [[[1, 0.5]]]


def test_mean_removal_changes_no_attention_and_saves_the_keys() -> None:
    q, k = torch.randn(2, 4, 3, 64), torch.randn(2, 2, 200, 64)
    k[..., 7] += 40
    mean, scale = recipes.mean_bias(ops.channel_stats(k)), 0.125
    lse = ops.attention_lse(q, k, scale=scale, causal=False)
    shifted = ops.attention_lse(q, k - mean[:, :, None], scale=scale, causal=False)
    got = shifted + recipes.lse_shift(q, mean, scale)
    torch.testing.assert_close(got, lse, rtol=1e-4, atol=1e-3)
    errors = []
    for bias in (None, mean):
        codes, params = ops.kv_quantize(k, 4, group=64, pre_bias=bias)
        back = ops.kv_dequantize(codes, params, 4, group=64, pre_bias=bias)
        errors.append(float((back - k).square().mean()))
    assert errors[1] < 0.05 * errors[0]


def plain_bits(spread: float, bound: float, low: int, high: int) -> int:
    return min(high, max(low, math.ceil(math.log2(spread / (2 * bound) + 1))))


def test_qaq_keys() -> None:
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0, 0.0])
    bound = math.sqrt(12 / 300 * math.log(1000**3 / 999 * 3**2 + 1))
    got = recipes.qaq_key_bits(spread * 10, 1000, error=3)
    want = [plain_bits(10 * s, bound, 0, 4) for s in spread.tolist()]
    assert got.tolist() == [*want[:-1], 4]  # the last token has all
    assert len(set(want)) > 2
    assert int(recipes.qaq_key_bits(spread, 1000, error=3, low=2, recent=0).min()) == 2


def test_qaq_values() -> None:
    attention = torch.tensor([0.5, 0.1, 0.01, 0.0, 0.2])
    got = recipes.qaq_value_bits(torch.full((5,), 4.0), attention, 1200, error=0.5, recent=1)
    bounds = [math.sqrt(12 / 1200) * 0.5 / a if a else math.inf for a in attention.tolist()]
    assert got.tolist() == [*(plain_bits(4.0, b, 0, 4) for b in bounds[:-1]), 4]
    assert int(got[3]) == 0


def test_mikv_tiers() -> None:
    score = rows(0.9, 0.1, 0.5, 0.3, 0.05, 0.2)
    assert recipes.mikv_tiers(score, 0.5).tolist() == [[[0, 2, 5]]]
    assert recipes.mikv_tiers(score, 1.0).tolist() == [[[0, 1, 2, 3, 4, 5]]]
    assert recipes.mikv_tiers(score, 0.0).shape == (1, 1, 0)
    assert recipes.mikv_tiers(rows(*range(10)), 0.3).shape == (1, 1, 3)  # floor(2.9999...) is 3


def test_bits_of_a_mix() -> None:
    """Published sizes of MiKV with a fifth of the tokens in the high tier, groups of 64."""
    low = recipes.stored_bits(2, 64)
    for high, percent in ((16, 32.5), (8.5, 23.1), (4.5, 18.1), (2.5, 15.6)):
        assert recipes.mean_bits([(0.2, high), (0.8, low)]) / 16 * 100 == pytest.approx(percent, abs=0.06)
    assert recipes.mean_bits([(0.5, 4), (0.25, 2)]) == 2.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.channel_balancer(rows(1), torch.ones(1, 2, 1)), "q_absmax must be of shape"),
        (lambda: recipes.channel_balancer(torch.ones(2), rows(1)), r"q_absmax must have shape \[B, Hq, D\]"),
        (lambda: recipes.channel_balancer(rows(1), rows(1), limit=0.5), "limit must be >= 1, got 0.5"),
        (
            lambda: recipes.lse_shift(torch.ones(1, 2, 3, 4), torch.ones(1, 3, 4), 1.0),
            "mean must be of shape",
        ),
        (lambda: recipes.qaq_key_bits(torch.ones(3), 1, error=1), "tokens must be >= 2, got 1"),
        (lambda: recipes.qaq_key_bits(torch.ones(3), 9, error=0), "error and q_norm must be > 0"),
        (lambda: recipes.qaq_value_bits(torch.ones(3), torch.ones(3), 9, error=1, low=5), "low must be in"),
        (lambda: recipes.mikv_tiers(rows(1), 1.5), r"keep must be in \[0, 1\], got 1.5"),
        (lambda: recipes.mean_bits([(0.7, 4), (0.7, 2)]), "shares must be not negative"),
        (lambda: recipes.stored_bits(4, 0), "group must be >= 1, got 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
