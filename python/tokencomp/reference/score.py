"""Attention scores in plain PyTorch: the specification of the operators in ``tokencomp.ops.score``.

One picture for all of them. Query row t of sequence b sits at position p = ``q_position[b, t]`` (default
``S - T + t``) and sees the keys j of the half-open range

    max(starts[b], p - window + 1) <= j < min(lengths[b], p + 1)

where the parts with p apply only under ``causal``. Where positions are used at all (``causal``, or
``q_position`` is given) a row outside ``[starts[b], lengths[b])`` is padding and sees nothing. The logit of a
pair is ``z = scale * <q, k>``, then ``softcap * tanh(z / softcap)`` if asked for, then ``+ key_bias``; NaN
counts as -inf.
"""

import torch
from torch import Tensor

from tokencomp.ops.page_pools import PagePools
from tokencomp.reference.page_rows import gather_pages

INF = float("inf")


def visible(
    batch: int,
    rows: int,
    keys: int,
    *,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """``[B, T, S]`` bool: which keys each query row sees."""
    key = torch.arange(keys)
    start = torch.zeros(batch, dtype=torch.long) if starts is None else starts.cpu().long()
    length = torch.full((batch,), keys) if lengths is None else lengths.cpu().long()
    seen = (key >= start[:, None]) & (key < length[:, None])
    seen = seen[:, None].expand(batch, rows, keys)
    if not causal and q_position is None:
        return seen.clone()
    position = torch.arange(rows) + keys - rows if q_position is None else q_position.cpu().long()
    position = position.expand(batch, rows)
    inside = (position >= start[:, None]) & (position < length[:, None])
    seen = seen & inside[..., None]
    if causal:
        seen = seen & (key <= position[..., None])
        if window is not None:
            seen = seen & (key > position[..., None] - window)
    return seen


def attention_logits(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``[B, Hq, T, S]`` logits, -inf where the row does not see the key or the logit is NaN."""
    batch, heads, rows, dim = q.shape
    group = heads // k.shape[1]
    product = q.to(dtype) @ k.to(dtype).repeat_interleave(group, dim=1).transpose(-1, -2)
    z = product * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if key_bias is not None:
        bias = key_bias.to(dtype)
        bias = bias[:, None] if bias.dim() == 2 else bias.repeat_interleave(group, dim=1)
        z = z + bias[:, :, None]
    seen = visible(
        batch,
        rows,
        k.shape[2],
        q_position=q_position,
        lengths=lengths,
        starts=starts,
        causal=causal,
        window=window,
    )
    return torch.where(seen.to(z.device)[:, None] & ~z.isnan(), z, -INF)


def _lse(z: Tensor) -> Tensor:
    """Natural log-sum-exp over the last dimension; -inf where there is nothing to sum."""
    if z.shape[-1] == 0:
        return z.new_full(z.shape[:-1], -INF)
    return torch.logsumexp(z, dim=-1)


def attention_lse(q: Tensor, k: Tensor, *, dtype: torch.dtype = torch.float64, **options: object) -> Tensor:
    """``[B, Hq, T]``: ``log sum_j exp z``; -inf for a row that sees no key."""
    return _lse(attention_logits(q, k, dtype=dtype, **options))  # type: ignore[arg-type]


def probabilities(
    q: Tensor, k: Tensor, lse: Tensor, *, dtype: torch.dtype = torch.float64, **options: object
) -> Tensor:
    """``[B, Hq, T, S]``: ``exp(z - lse)``; rows whose lse is not finite are zero."""
    z = attention_logits(q, k, dtype=dtype, **options)  # type: ignore[arg-type]
    known = lse.isfinite()[..., None]
    return torch.where(known & (z > -INF), torch.exp(z - lse.to(dtype).nan_to_num(0, 0, 0)[..., None]), 0.0)


def _weighted(p: Tensor, row_weight: Tensor | None, power: int) -> Tensor:
    p = p**power
    if row_weight is None:
        return p
    weight = row_weight[:, None] if row_weight.dim() == 2 else row_weight
    weight = weight.to(p.dtype)[..., None]
    return torch.where(weight > 0, weight * p, 0.0)


def reduce_heads(score: Tensor, kv_heads: int, heads: str) -> Tensor:
    """``[B, Hq, S]`` per query head to ``[B, H*, S]``: none, kv_sum, kv_mean, kv_max, mean or rms."""
    batch, query_heads, keys = score.shape
    if heads == "none":
        return score
    if heads == "mean":
        return score.mean(1, keepdim=True)
    if heads == "rms":
        return score.square().mean(1, keepdim=True).sqrt()
    grouped = score.view(batch, kv_heads, query_heads // kv_heads, keys)
    if heads == "kv_max":
        return grouped.amax(2)
    return grouped.mean(2) if heads == "kv_mean" else grouped.sum(2)


def column_score(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    row_weight: Tensor | None = None,
    rows: str = "sum",
    heads: str = "none",
    power: int = 1,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> Tensor:
    """``[B, H*, S]``: ``sum`` or ``max`` over the rows of ``w_t * exp(z - lse_t) ** power``, then the
    heads.
    """
    weighted = _weighted(probabilities(q, k, lse, dtype=dtype, **options), row_weight, power)
    score = weighted.amax(2) if rows == "max" and q.shape[2] else weighted.sum(2)
    return reduce_heads(score, k.shape[1], heads)


def diagonal_score(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    row_weight: Tensor | None = None,
    q_position: Tensor | None = None,
    heads: str = "none",
    power: int = 1,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> Tensor:
    """``[B, H*, S]``: entry o sums ``w_t * p[t, j] ** power`` over the pairs with ``position(t) - j = o``."""
    p = _weighted(probabilities(q, k, lse, q_position=q_position, dtype=dtype, **options), row_weight, power)
    batch, query_heads, rows, keys = p.shape
    position = torch.arange(rows) + keys - rows if q_position is None else q_position.cpu().long()
    offset = position.expand(batch, rows)[..., None] - torch.arange(keys)
    inside = ((offset >= 0) & (offset < keys)).to(p.device)
    flat = torch.where(inside[:, None], p, 0.0).flatten(2)
    where = offset.clamp(0, max(keys - 1, 0)).to(p.device)[:, None].expand_as(p).flatten(2)
    score = p.new_zeros(batch, query_heads, keys)
    if keys:
        score.scatter_add_(2, where, flat)
    return reduce_heads(score, k.shape[1], heads)


def qk_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_table: Tensor | None = None,
    k_min: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    quantized: PagePools | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``[B, Hq, S]`` logits of one query a head and their ``[B, Hq]`` lse.

    With ``k_min`` the keys are pages, ``k`` the channel-wise maxima and ``k_min`` the minima, and the
    product is Quest's bound ``sum_c max(q_c k_c, q_c k_min_c) = <max(q, 0), k> + <min(q, 0), k_min>``. With
    ``block_table`` both are pools (see ``gather_pages``), and holes are masked.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    held = None
    if block_table is not None:
        k_min = None if k_min is None else gather_pages(k_min, block_table)[0]
        k, held = gather_pages(k, block_table, quantized)
    if k_min is not None:
        q = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
        k = torch.cat([k, k_min], dim=-1)
    if lengths is not None and lengths.dim() == 2:
        own = torch.arange(k.shape[2]) < lengths.cpu()[..., None]
        held, lengths = own if held is None else own & held, None
    z = attention_logits(
        q[:, :, None],
        k,
        scale=scale,
        key_bias=key_bias,
        softcap=softcap,
        lengths=lengths,
        starts=starts,
        causal=False,
        dtype=dtype,
    )[:, :, 0]
    if held is not None:
        z = torch.where(held.repeat_interleave(q.shape[1] // k.shape[1], dim=1), z, -INF)
    return z, _lse(z)


def head_vote(
    scores: Tensor,
    lse: Tensor | None = None,
    *,
    mode: str = "softmax_sum",
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``[B, groups, S]`` from ``[B, Hq, S]``; -inf where every head of the group says -inf (or NaN)."""
    batch, heads, keys = scores.shape
    s = scores.to(dtype)
    s = torch.where(s.isnan(), -INF, s).view(batch, groups, heads // groups, keys)
    masked = (s == -INF).all(2)
    if mode == "softmax_sum":
        known = torch.ones(batch, heads) if lse is None else lse
        known = known.view(batch, groups, heads // groups, 1).to(dtype)
        vote = torch.where(known.isfinite(), torch.exp(s - known.nan_to_num(0, 0, 0)), 0.0).sum(2)
    else:
        vote = {"sum": s.sum(2), "mean": s.mean(2), "max": s.amax(2)}[mode]
    return torch.where(masked, -INF, vote)


def decay_score_(
    score: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    *,
    gamma: float = 1.0,
    lengths: Tensor | None = None,
    heads: str = "kv_sum",
    power: int = 1,
    count: Tensor | None = None,
    last: Tensor | None = None,
    interval: Tensor | None = None,
    step: int = 0,
    alpha: float = INF,
) -> None:
    """One decode step on the states, in place and in ``score``'s dtype (see ``ops.decay_score_``)."""
    dtype, (batch, rows, keys) = score.dtype, score.shape
    z = logits.to(dtype)
    if lse is None:
        p = torch.where(z.isnan(), 0.0, z)
    else:
        known = lse.isfinite()[..., None]
        p = torch.where(known, torch.exp(z - lse.to(dtype).nan_to_num(0, 0, 0)[..., None]), 0.0)
        p = torch.where(z.isnan(), 0.0, p)
    length = torch.full((batch,), keys) if lengths is None else lengths.long()
    live = (torch.arange(keys) < length[:, None])[:, None].expand(batch, rows, keys)
    received = reduce_heads(p**power, rows if heads.startswith("kv") else 1, heads)
    score.copy_(torch.where(live, gamma * score + received, score))
    if count is not None:
        count.copy_(torch.where(live, count + 1, count))
    if last is not None:
        strongest = p.view(batch, rows, p.shape[1] // rows, keys).amax(2)
        active = live & (strongest >= alpha)
        if interval is not None:
            longest = torch.maximum(interval, step - last)
            interval.copy_(torch.where(active, longest, interval))
        last.copy_(torch.where(active, step, last))
