"""Prefill attention in plain PyTorch: the specification of ``tokencomp.ops.flash_prefill``.

Who sees whom, and the logits, are those of ``reference.score``. With lists a row sees, of those keys, only
the ones in the key blocks and columns that its query block lists.
"""

import torch
from torch import Tensor

from tokencomp.ops.page_pools import PagePools
from tokencomp.reference.page_rows import gather_pages
from tokencomp.reference.score import attention_logits

INF = float("inf")
INDEX_BITS = 0x7FFFFFFF  # of an entry of ``indices``; the highest bit is a mark of other kernels


def listed(
    batch: int,
    query_heads: int,
    rows: int,
    keys: int,
    indptr: Tensor,
    indices: Tensor,
    column_ptr: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """``[B, Hq, T, S]`` bool: which keys the lists give each row, seen or not."""
    blocks = -(-rows // block_q)
    found = torch.zeros(batch, query_heads, rows, keys, dtype=torch.bool)
    for pointers, entries, width in ((indptr, indices, block_k), (column_ptr, columns, 1)):
        if pointers is None or entries is None or not batch * blocks:
            continue
        bounds, members = pointers.cpu().long(), entries.cpu().long() & INDEX_BITS
        heads = (len(bounds) - 1) // (batch * blocks)
        for row in range(len(bounds) - 1):
            b, h, m = row // (heads * blocks), row // blocks % heads, row % blocks
            group = slice(h * query_heads // heads, (h + 1) * query_heads // heads)
            for j in members[bounds[row] : bounds[row + 1]].tolist():
                found[b, group, m * block_q : (m + 1) * block_q, j * width : (j + 1) * width] = True
    return found


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    indptr: Tensor | None = None,
    indices: Tensor | None = None,
    column_ptr: Tensor | None = None,
    columns: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    key_bias: Tensor | None = None,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    quantized: PagePools | None = None,
    q_starts: Tensor | None = None,
    q_counts: Tensor | None = None,
    round_to: torch.dtype | None = None,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """``[B, Hq, T, Dv]`` attention outputs in ``dtype`` and ``[B, Hq, T]`` log-sum-exps.

    ``round_to`` rounds probabilities and outputs to a narrower type, as kernels in that type must.
    """
    held = torch.ones(q.shape[0], k.shape[1], k.shape[2], dtype=torch.bool)
    if block_table is not None:
        v = gather_pages(v, block_table, quantized, values=True)[0]
        k, held = gather_pages(k, block_table, quantized)
    length = torch.full(held.shape[:2], k.shape[2])
    if lengths is not None:
        length = (lengths[:, None] if lengths.dim() == 1 else lengths).cpu().long().expand_as(length)
    padded = q_starts is not None or q_counts is not None
    at_end = padded or (block_table is not None and bool(options.get("causal", True)))
    bias = key_bias[:, None] if key_bias is not None and key_bias.dim() == 2 else key_bias
    group, z_of = q.shape[1] // k.shape[1], []
    for head in range(k.shape[1]):  # heads may hold different numbers of keys
        position = q_position
        if position is None and at_end:
            position = last_rows(q.shape[2], length[:, head], q_starts, q_counts)
        own = None if bias is None else bias[:, min(head, bias.shape[1] - 1)]
        sight = {"q_position": position, "lengths": length[:, head], "starts": starts, "key_bias": own}
        rows = q[:, head * group : (head + 1) * group]
        z_of.append(attention_logits(rows, k[:, head : head + 1], dtype=dtype, **sight, **options))  # type: ignore[arg-type]
    z = torch.cat(z_of, 1)
    z = torch.where(held.repeat_interleave(group, 1)[:, :, None].to(z.device), z, -INF)
    if indptr is not None and indices is not None:
        sizes = {"block_q": block_q, "block_k": block_k}
        batch, heads, n, keys = z.shape
        seen = listed(batch, heads, n, keys, indptr, indices, column_ptr, columns, **sizes)
        z = torch.where(seen.to(z.device), z, -INF)
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -INF)
    top = top if sinks is None else torch.maximum(top, sinks.to(dtype)[None, :, None, None])
    top = torch.where(top > -INF, top, 0.0)
    p = torch.exp(z - top)
    total = p.sum(-1, keepdim=True)
    rest = total.new_zeros(()) if sinks is None else torch.exp(sinks.to(dtype)[None, :, None, None] - top)
    lse = (top + torch.log(total + rest))[..., 0]
    lse = torch.where(top[..., 0] == INF, INF, lse)
    values = _existing(v.to(dtype), length, starts).repeat_interleave(group, dim=1)
    out = (p if round_to is None else p.to(round_to).to(dtype)) @ values
    out = torch.where(total > 0, out / (total + rest), torch.where(total == 0, 0.0, total))
    return (out if round_to is None else out.to(round_to).to(dtype)), lse


def last_rows(rows: int, length: Tensor, starts: Tensor | None, counts: Tensor | None) -> Tensor:
    """``[B, T]``: where rows sit that are the last keys of sequences of ``length``; -1 for padding."""
    row = torch.arange(rows).expand(len(length), rows)
    start = torch.zeros_like(length) if starts is None else starts.cpu().long()
    count = rows - start if counts is None else counts.cpu().long()
    own = row - start[:, None]
    return torch.where((own >= 0) & (own < count[:, None]), (length - count)[:, None] + own, -1)


def _existing(v: Tensor, length: Tensor, starts: Tensor | None) -> Tensor:
    """The values, 0 where a sequence has no key: padding may hold anything."""
    key = torch.arange(v.shape[2], device=v.device)
    there = key < length.to(v.device)[..., None]
    if starts is not None:
        there &= key >= starts.to(v.device)[:, None, None]
    return torch.where(there[..., None], v, 0.0)
