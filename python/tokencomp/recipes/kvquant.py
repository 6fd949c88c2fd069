"""Around quantization of KV caches: channel maps for keys and values, and how many bits tokens get.

Maps are ``pre_scale`` and ``pre_bias`` of ``ops.kv_quantize``; allocators return numbers of bits, 0 meaning
that a token is not kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.ops.kvquant import ChannelStats
from tokencomp.recipes.common import require, require_dims

BALANCE_LIMIT = 1e4


def channel_balancer(q_absmax: Tensor, k_absmax: Tensor, *, limit: float = BALANCE_LIMIT) -> Tensor:
    """MiKV's balancer of key channels (arXiv 2402.18096): ``sqrt(max |q| / max |k|)``.

    Quantize keys with it as ``pre_scale``: ``k`` comes back as before, its error now small where queries
    are large. A kernel that works on the codes divides queries by it instead. Freeze it after the prompt.

    Args:
        q_absmax: ``[B, Hq, D]``, ``ops.channel_stats(q).absmax``; of a group the largest query head counts.
        k_absmax: ``[B, Hkv, D]``, Hkv divides Hq.
        limit: the result is in [1 / limit, limit].

    Returns:
        ``[B, Hkv, D]`` float32; 1 where either maximum is 0.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "channel_balancer"
    require_dims(op, "q_absmax", q_absmax, "[B, Hq, D]")
    require_dims(op, "k_absmax", k_absmax, "[B, Hkv, D]")
    batch, heads, size = k_absmax.shape
    fits = heads > 0 and q_absmax.shape[1] % heads == 0 and q_absmax.shape[::2] == k_absmax.shape[::2]
    expected = f"of shape [{batch}, a multiple of Hkv={heads}, {size}]"
    require(fits, op, "q_absmax", expected, list(q_absmax.shape))
    require(limit >= 1, op, "limit", ">= 1", limit)
    q = q_absmax.float().view(batch, heads, -1, size).amax(2)
    k = k_absmax.float()
    there = (q > 0) & (k > 0)
    ratio = q / torch.where(there, k, 1.0)
    return torch.where(there, ratio.sqrt().clamp(1 / limit, limit), 1.0)


def separable_scale(absmax: Tensor) -> Tensor:
    """ZipCache's channel-separable scale (arXiv 2405.14256): ``1 / sqrt(max |x|)``, for ``pre_scale``.

    A token can then share one grid among all channels. A channel that is 0 everywhere has 1.

    Args:
        absmax: ``[B, H, D]``, over the tokens of all tiers.

    Returns:
        ``[B, H, D]`` float32.
    """
    absmax = absmax.float()
    return torch.where(absmax > 0, absmax.clamp(min=torch.finfo(torch.float32).tiny).rsqrt(), 1.0)


def mean_bias(stats: ChannelStats) -> Tensor:
    """The mean of each key channel as ``pre_bias``, once frozen: ``[B, H, D]`` float32.

    The same vector off every key moves all logits of a query by one constant: attention is unchanged, and a
    log-sum-exp over the shifted keys alone is short of ``scale * <q, mean>`` (``lse_shift``).
    """
    return stats.mean


def lse_shift(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """What to add to log-sum-exps over keys from which ``mean`` was taken: ``scale * <q, mean>``.

    Args:
        q: ``[B, Hq, T, D]``.
        mean: ``[B, Hkv, D]``, Hkv divides Hq.

    Returns:
        ``[B, Hq, T]`` float32.

    Raises:
        ValueError: a shape that is not as above.
    """
    op = "lse_shift"
    require_dims(op, "q", q, "[B, Hq, T, D]")
    require_dims(op, "mean", mean, "[B, Hkv, D]")
    batch, heads, tokens, size = q.shape
    fits = mean.shape[1] > 0 and heads % mean.shape[1] == 0 and mean.shape[::2] == (batch, size)
    require(fits, op, "mean", f"of shape [{batch}, a divisor of Hq={heads}, {size}]", list(mean.shape))
    groups = q.float().view(batch, mean.shape[1], -1, tokens, size)
    return scale * torch.einsum("bhgtd,bhd->bhgt", groups, mean.float()).reshape(batch, heads, tokens)


def qaq_key_bits(
    spread: Tensor,
    tokens: int,
    *,
    error: float,
    q_norm: float = 300.0,
    low: int = 0,
    high: int = 4,
    recent: int = 1,
) -> Tensor:
    """QAQ's bits of keys (arXiv 2403.04643) for an error of about ``error`` in the attention output.

    A key may be off by ``sqrt(12 / |q| * ln(S^3 / (S - 1) * error^2 + 1))``.

    Args:
        spread: ``[..., S]`` max - min of each token's key.
        tokens: S, at least 2, the length of the sequence.
        q_norm: |q|, a constant of the method.
        low, high: bits are in [low, high]; the last ``recent`` tokens have ``high``.

    Returns:
        ``[..., S]`` int32.

    Raises:
        ValueError: a number that is not as above.
    """
    op = "qaq_key_bits"
    require(tokens >= 2, op, "tokens", ">= 2", tokens)
    require(error > 0 and q_norm > 0, op, "error and q_norm", "> 0", (error, q_norm))
    bound = math.sqrt(12 / q_norm * math.log(tokens**3 / (tokens - 1) * error**2 + 1))
    return _bits_for(op, spread.float(), torch.tensor(bound), low, high, recent)


def qaq_value_bits(
    spread: Tensor,
    attention: Tensor,
    tokens: int,
    *,
    error: float,
    low: int = 0,
    high: int = 4,
    recent: int = 1,
) -> Tensor:
    """QAQ's bits of values (arXiv 2403.04643): value t may be off by ``sqrt(12 / S) * error / attention_t``.

    Args:
        spread: ``[..., S]`` max - min of each token's value.
        attention: ``[..., S]``, the largest weight each token got from the last rows; 0 leaves it ``low``.
        tokens, low, high, recent: as in ``qaq_key_bits``.

    Returns:
        ``[..., S]`` int32.

    Raises:
        ValueError: a number that is not as above.
    """
    op = "qaq_value_bits"
    require(tokens >= 1, op, "tokens", ">= 1", tokens)
    require(error > 0, op, "error", "> 0", error)
    bound = math.sqrt(12 / tokens) * error / attention.float()
    return _bits_for(op, spread.float(), bound, low, high, recent)


def _bits_for(op: str, spread: Tensor, bound: Tensor, low: int, high: int, recent: int) -> Tensor:
    """``ceil(log2(spread / (2 bound) + 1))`` within [low, high]."""
    require(0 <= low <= high, op, "low", f"in [0, high={high}]", low)
    require(recent >= 0, op, "recent", ">= 0", recent)
    bits = torch.log2(spread / (2 * bound.to(spread.device)) + 1).ceil().clamp(low, high).to(torch.int32)
    if recent:
        bits[..., -recent:] = high
    return bits


def mikv_tiers(score: Tensor, keep: float, *, recent: float = 0.5) -> Tensor:
    """Which tokens stay in the high tier (MiKV, arXiv 2402.18096): the newest, then the highest scores.

    Of S tokens ``floor(keep S)`` stay, ``floor(recent * that)`` of them the newest.

    Args:
        score: ``[B, H, S]`` float32, for example ``accumulated_attention``.
        keep: share of the high tier, in [0, 1].
        recent: share of it that goes to the newest.

    Returns:
        ``[B, H, n]`` int32, ascending.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "mikv_tiers"
    require_dims(op, "score", score, "[B, H, S]")
    require(0 <= keep <= 1, op, "keep", "in [0, 1]", keep)
    require(0 <= recent <= 1, op, "recent", "in [0, 1]", recent)
    count = math.floor(keep * score.shape[2] + 1e-9)
    index, _ = ops.topk_select(score.float().flatten(0, 1), count, tail=math.floor(count * recent + 1e-9))
    return index.view(*score.shape[:2], count)


def mean_bits(shares: Sequence[tuple[float, float]]) -> float:
    """Bits an element of a mix: ``(share, bits)`` of each tier; what shares leave of 1 is gone."""
    total = sum(share for share, _ in shares)
    fits = all(share >= 0 for share, _ in shares) and total <= 1 + 1e-9
    require(fits, "mean_bits", "shares", "not negative and at most 1 together", total)
    return sum(share * bits for share, bits in shares)


def stored_bits(bits: int, group: int) -> float:
    """Bits an element of a quantized tier, its (step, minimum) in float16 included."""
    require(group >= 1, "stored_bits", "group", ">= 1", group)
    return bits + 32 / group
