"""Prefill attention in plain PyTorch: the specification of ``tokencomp.ops.flash_prefill``.

Who sees whom, and the logits, are those of ``reference.score``. With lists a row sees, of those keys, only
the ones in the key blocks and columns that its query block lists.
"""

import torch
from torch import Tensor

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
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    round_to: torch.dtype | None = None,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """``[B, Hq, T, Dv]`` attention outputs in ``dtype`` and ``[B, Hq, T]`` log-sum-exps.

    ``round_to`` rounds probabilities and outputs to a narrower type, as kernels in that type must.
    """
    z = attention_logits(q, k, lengths=lengths, starts=starts, dtype=dtype, **options)  # type: ignore[arg-type]
    if indptr is not None and indices is not None:
        sizes = {"block_q": block_q, "block_k": block_k}
        batch, heads, rows, keys = z.shape
        seen = listed(batch, heads, rows, keys, indptr, indices, column_ptr, columns, **sizes)
        z = torch.where(seen.to(z.device), z, -INF)
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -INF)
    top = top if sinks is None else torch.maximum(top, sinks.to(dtype)[None, :, None, None])
    top = torch.where(top > -INF, top, 0.0)
    p = torch.exp(z - top)
    total = p.sum(-1, keepdim=True)
    rest = total.new_zeros(()) if sinks is None else torch.exp(sinks.to(dtype)[None, :, None, None] - top)
    lse = (top + torch.log(total + rest))[..., 0]
    lse = torch.where(top[..., 0] == INF, INF, lse)
    values = _existing(v.to(dtype), lengths, starts).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    out = (p if round_to is None else p.to(round_to).to(dtype)) @ values
    out = torch.where(total > 0, out / (total + rest), torch.where(total == 0, 0.0, total))
    return (out if round_to is None else out.to(round_to).to(dtype)), lse


def _existing(v: Tensor, lengths: Tensor | None, starts: Tensor | None) -> Tensor:
    """The values, 0 where a sequence has no key: padding may hold anything."""
    key = torch.arange(v.shape[2], device=v.device)
    there = torch.ones(v.shape[0], v.shape[2], dtype=torch.bool, device=v.device)
    if lengths is not None:
        there &= key < lengths.to(v.device)[:, None]
    if starts is not None:
        there &= key >= starts.to(v.device)[:, None]
    return torch.where(there[:, None, :, None], v, 0.0)
