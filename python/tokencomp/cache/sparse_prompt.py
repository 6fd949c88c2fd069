"""Attention of a prompt to listed blocks and columns, or of some of its tokens alone."""

from typing import Any

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.block_lists import BlockLists, causal_blocks
from tokencomp.cache.forward import Rule
from tokencomp.methods.sparse import Subset


def attend_listed(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, end: Tensor, first: Tensor | None, rule: Rule
) -> Tensor:
    """Causal attention of ``q`` ``[B, Hq, T, D]``, the last T of the keys, to what ``lists`` names.

    Row (b, h) has keys in ``[first, end)``, both ``[B, Hkv]``; None: from 0.
    """
    if first is None or bool((first == first[:, :1]).all()):
        starts = None if first is None else first[:, 0].contiguous()
        return _prefill(q, k, v, rule, end[:, 0].contiguous(), starts, **lists.arguments())
    batch, heads, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    parts = []
    for head in range(heads):
        own, kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
        sinks = None if rule.sinks is None else rule.sinks[own]
        listed = _of_head(lists, batch, head, heads, group, -(-q.shape[2] // lists.block_q))
        parts.append(
            _prefill(
                q[:, own], k[:, kv], v[:, kv], rule._replace(sinks=sinks), end[:, head].contiguous(),
                first[:, head].contiguous(), **listed.arguments(),
            )
        )  # fmt: skip
    return torch.cat(parts, 1)


def attend_subset(
    q: Tensor, k: Tensor, v: Tensor, subset: Subset, end: Tensor, first: Tensor | None, rule: Rule
) -> Tensor:
    """Causal attention of the rows ``subset`` names to each other and to what lies before all rows."""
    rows, before = q.shape[2], k.shape[2] - q.shape[2]
    width = subset.tokens.shape[1]
    rank = torch.arange(width, device=q.device)
    there = (rank < subset.count[:, None]) & (subset.tokens >= 0)
    there &= subset.tokens < (end[:, :1] - before)
    token = torch.where(there, subset.tokens, 0).long()

    def some(x: Tensor, offset: int) -> Tensor:
        index = (token + offset)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    k, v = (torch.cat([x[:, :, :before], some(x, before)], 2) for x in (k, v))
    count = there.sum(1, dtype=torch.int32)
    position = torch.where(there, before + rank, -1).int()
    ends = (before + count)[:, None].expand_as(end)
    parts = []
    for head, heads in _equal_starts(first, k.shape[1]):
        own = slice(head * (q.shape[1] // k.shape[1]), (head + heads) * (q.shape[1] // k.shape[1]))
        kv = slice(head, head + heads)
        sinks = None if rule.sinks is None else rule.sinks[own]
        starts = None if first is None else first[:, head].contiguous()
        parts.append(
            _prefill(
                some(q[:, own], 0), k[:, kv], v[:, kv], rule._replace(sinks=sinks),
                ends[:, head].contiguous(), starts, q_position=position,
            )
        )  # fmt: skip
    found = torch.cat(parts, 1)
    output = found.new_zeros(*q.shape[:2], rows + 1, v.shape[3])
    place = torch.where(there, token, rows)[:, None, :, None]
    output.scatter_(2, place.expand_as(found), found)
    return output[:, :, :rows]


def pairs_listed(lists: BlockLists, q: Tensor, keys: int) -> Tensor:
    """Share of the pairs of a causal prompt in listed blocks and columns, counted to whole blocks."""
    blocks = causal_blocks(q.shape[2], keys, lists.block_q, lists.block_k, q.device).sum()
    each = (len(lists.indptr) - 1) // max(1, -(-q.shape[2] // lists.block_q))  # B * H
    listed = lists.indptr[-1].double()
    if lists.column_ptr is not None:
        columns = (len(lists.column_ptr) - 1) // max(1, -(-q.shape[2] // lists.block_q))
        listed = listed + lists.column_ptr[-1] / lists.block_k * (each / max(columns, 1))
    return listed / (blocks * each).clamp(min=1)


def pairs_of_subset(subset: Subset, rows: int, before: int) -> Tensor:
    """Share of the pairs of a causal prompt that the rows of ``subset`` make."""
    count = subset.count.double()
    return (count * (before + (count + 1) / 2)).mean() / max(rows * (before + (rows + 1) / 2), 1)


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, end: Tensor, starts: Tensor | None, **options: Any
) -> Tensor:
    return ops.flash_prefill(
        q, k, v, causal=True, scale=rule.scale, softcap=rule.softcap, sinks=rule.sinks, lengths=end,
        starts=starts, **options,
    )[0]  # fmt: skip


def _equal_starts(first: Tensor | None, heads: int) -> list[tuple[int, int]]:
    """Runs of kv heads that one call can take: first head and number."""
    if first is None or bool((first == first[:, :1]).all()):
        return [(0, heads)]
    return [(head, 1) for head in range(heads)]


def _of_head(lists: BlockLists, batch: int, head: int, heads: int, group: int, blocks: int) -> BlockLists:
    """The lists of kv head ``head`` and its query heads."""

    def own(ptr: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        listed = (len(ptr) - 1) // max(1, batch * blocks)  # 1, Hkv or Hq
        part = slice(None) if listed == 1 else slice(head * listed // heads, (head + 1) * listed // heads)
        number = torch.arange(len(ptr) - 1, device=ptr.device).view(batch, listed, blocks)[:, part].flatten()
        return _lists(ptr, values, number)

    indptr, indices = own(lists.indptr, lists.indices)
    column_ptr, columns = lists.column_ptr, lists.columns
    if column_ptr is not None and columns is not None:
        column_ptr, columns = own(column_ptr, columns)
    return BlockLists(indptr, indices, lists.block_q, lists.block_k, column_ptr, columns)


def _lists(ptr: Tensor, values: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The lists ``number`` of a CSR array, in that order; the values keep their length."""
    count = (ptr[1:] - ptr[:-1])[number]
    own = torch.zeros(len(number) + 1, dtype=torch.int32, device=ptr.device)
    own[1:] = count.cumsum(0)
    place = torch.arange(len(values), dtype=torch.int32, device=ptr.device)
    at = torch.searchsorted(own[1:].contiguous(), place, right=True).clamp(max=max(len(number) - 1, 0))
    source = ptr[number[at]] + place - own[at]
    inside = place < own[-1]
    return own, torch.where(inside, values[torch.where(inside, source, 0).long()], 0).int()
