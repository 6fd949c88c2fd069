"""Decode attention over pages in plain PyTorch: the specification of ``tokencomp.ops.decode``.

Slot s of (b, h) lies in page ``block_table[b, h, s // P]`` at ``s % P``; entries that name no page of any
pool hide their slots. Without a table it is row s of dense keys and values ``[B, Hkv, S, D]``. Query row t
sees slot s of the ``n = lengths[b, h]`` in use if

    s < n - (T - 1 - t)                            (``causal``, else s < n)
    position[s] > q_position[t] - window           (under a ``window``)
    s is listed in ``index``                       (where there is a list)

``position`` defaults to the slot itself, ``q_position`` to the position of the row's own slot, ``n - T + t``.
"""

import torch
from torch import Tensor

from tokencomp.ops.page_pools import PagePools
from tokencomp.reference.page_pools import paged_rows

INF = float("inf")


def decode_visible(
    slots: int,
    lengths: Tensor,
    rows: int,
    *,
    index: Tensor | None = None,
    index_count: Tensor | None = None,
    position: Tensor | None = None,
    q_position: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """``[B, Hkv, T, slots]`` bool: which slots each query row sees."""
    slot = torch.arange(slots, device=lengths.device)
    own = lengths.long()[..., None] - rows + torch.arange(rows, device=lengths.device)  # [B, Hkv, T]
    end = own + 1 if causal else lengths.long()[..., None].expand_as(own)
    seen = slot < end[..., None]
    if window is not None:
        where = slot.expand(*lengths.shape, slots)
        if position is not None:
            where = where.clone()
            covered = min(slots, position.shape[2])
            where[..., :covered] = position.long().expand(*lengths.shape, -1)[..., :covered]
        if q_position is None:
            from_own = where.gather(2, own.clamp(0, max(slots - 1, 0))) if slots else own
            floor = torch.where(own >= 0, from_own - window, torch.iinfo(torch.int32).max)
        else:
            floor = (q_position.long() - window).expand(lengths.shape[0], rows)[:, None].expand_as(own)
        seen = seen & (where[:, :, None] > floor[..., None])
    if index is not None:
        counted = torch.arange(index.shape[2], device=index.device).expand_as(index)
        limit = index.shape[2] if index_count is None else index_count[..., None]
        listed = torch.zeros(*lengths.shape, slots + 1, dtype=torch.bool, device=lengths.device)
        inside = (counted < limit) & (index >= 0) & (index < slots)
        listed.scatter_(2, torch.where(inside, index.long(), slots), True)
        seen = seen & listed[:, :, None, :slots]
    return seen


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    *,
    scale: float | None = None,
    index: Tensor | None = None,
    index_count: Tensor | None = None,
    key_bias: Tensor | None = None,
    position: Tensor | None = None,
    q_position: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    logits_out: bool = False,
    quantized: PagePools | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out`` [B, Hq, T, Dv], ``lse`` [B, Hq, T] and ``logits`` [B, Hq, T, slots] (or 0 slots)."""
    batch, heads, rows, dim = q.shape
    group = heads // lengths.shape[1]
    k, v = k_pages, v_pages
    there = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
    if block_table is not None:
        kept = None if quantized is None else dtype
        k, there = paged_rows(k_pages, block_table, quantized=quantized, half="k", dtype=kept)
        v, _ = paged_rows(v_pages, block_table, quantized=quantized, half="v", dtype=kept)
    slots = k.shape[2]
    limit = min([slots] + [t.shape[-1] for t in (key_bias, position) if t is not None])
    seen = decode_visible(
        slots,
        lengths.clamp(0, limit),
        rows,
        index=index,
        index_count=index_count,
        position=position,
        q_position=q_position,
        window=window,
        causal=causal,
    )
    seen = (seen & there[:, :, None]).repeat_interleave(group, dim=1)
    z = q.to(dtype) @ k.to(dtype).repeat_interleave(group, dim=1).transpose(-1, -2)
    z = z * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if key_bias is not None:
        bias = key_bias[:, None] if key_bias.dim() == 2 else key_bias
        bias = bias.to(dtype).expand(batch, lengths.shape[1], -1).repeat_interleave(group, dim=1)
        z[..., : bias.shape[2]] += bias[:, :, None, :slots]
    z = torch.where(seen & ~z.isnan(), z, -INF)
    whole = (
        z if sinks is None else torch.cat([z, sinks.to(dtype)[:, None, None].expand(batch, -1, rows, 1)], 3)
    )
    lse = torch.logsumexp(whole, -1) if whole.shape[-1] else z.new_full(z.shape[:-1], -INF)
    p = torch.where(z > -INF, torch.exp(z - lse[..., None]), 0.0)
    values = v.to(dtype).repeat_interleave(group, dim=1)
    values = torch.where((z > -INF).any(2)[..., None], values, 0.0)
    return p @ values, lse, z if logits_out else z[..., :0]


def merge_states(out: Tensor, lse: Tensor, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``[S, ..., Dv]`` and ``[S, ...]`` of attention over disjoint parts to that over their union."""
    states = torch.where(lse.isnan(), -INF, lse.to(dtype))
    total = torch.logsumexp(states, 0) if len(states) else states.new_full(states.shape[1:], -INF)
    weight = torch.where(states > -INF, torch.exp(states - total), 0.0)[..., None]
    return torch.where(weight > 0, weight * out.to(dtype), 0.0).sum(0), total
