"""Lists of key blocks for ``ops.flash_prefill``: from masks, from columns and slashes, from block scores.

Everything here is a pure function of tensors, on their device and without waiting for it: shapes never depend
on values. Lists live in arrays as long as the worst case; what is behind the last pointer is not used.
Ties: larger score first, then smaller index.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokencomp import ops


class BlockLists(NamedTuple):
    """What each query block of each head attends to, in the arguments of ``ops.flash_prefill``:
    ``flash_prefill(q, k, v, **lists.arguments())``.
    """

    indptr: Tensor
    indices: Tensor
    block_q: int = 64
    block_k: int = 64
    column_ptr: Tensor | None = None
    columns: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments."""
        return self._asdict()


def _block_count(tokens: int, block: int) -> int:
    return -(-tokens // block)


def block_mask_to_csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(indptr, indices)`` of the True entries of ``mask``, list after list.

    Args:
        mask: ``[B, H, M, N]`` bool: which of N key blocks (or keys) each of M query blocks lists.

    Returns:
        ``indptr`` ``[B * H * M + 1]`` int32 and ``indices`` ``[B * H * M * N]`` int32, ascending in each
        list; entries behind ``indptr[-1]`` are 0.

    Raises:
        ValueError: a mask of another shape or dtype, or of 2**31 entries or more.
    """
    if mask.dim() != 4 or mask.dtype != torch.bool:
        raise ValueError(
            f"block_mask_to_csr: mask must be bool [B, H, M, N], got {mask.dtype} {list(mask.shape)}"
        )
    if mask.numel() >= 1 << 31:
        raise ValueError(f"block_mask_to_csr: mask must have fewer than 2**31 entries, got {mask.numel()}")
    flat = mask.reshape(-1)
    before = flat.cumsum(0, dtype=torch.int32)
    indptr = torch.zeros(mask.shape[:3].numel() + 1, dtype=torch.int32, device=mask.device)
    if mask.shape[3]:
        indptr[1:] = before[mask.shape[3] - 1 :: mask.shape[3]]
    number = torch.arange(mask.shape[3], dtype=torch.int32, device=mask.device).expand(mask.shape).reshape(-1)
    # Entries that are not listed all go to one more place, which is cut off.
    place = torch.where(flat, before.long() - 1, flat.numel())
    indices = number.new_zeros(flat.numel() + 1).scatter_(0, place, torch.where(flat, number, 0))
    return indptr, indices[:-1]


def causal_blocks(rows: int, keys: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """``[M, N]`` bool: blocks of which at least one pair is visible; the rows are the last of the keys."""
    last = torch.arange(_block_count(rows, block_q), device=device) * block_q + block_q - 1
    last = last.clamp(max=rows - 1) + keys - rows
    return torch.arange(_block_count(keys, block_k), device=device) * block_k <= last[:, None]


def diagonal_blocks(rows: int, keys: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """``[M, N]`` bool: blocks that hold the own position of at least one row of a query block."""
    first = torch.arange(_block_count(rows, block_q), device=device) * block_q
    last = (first + block_q - 1).clamp(max=rows - 1) + keys - rows
    block = torch.arange(_block_count(keys, block_k), device=device)
    low = torch.div(first + keys - rows, block_k, rounding_mode="floor")
    return (block >= low[:, None]) & (block <= torch.div(last, block_k, rounding_mode="floor")[:, None])


def vertical_slash_index(
    columns: Tensor,
    slashes: Tensor,
    rows: int,
    keys: int,
    *,
    block_q: int = 64,
    block_k: int = 64,
    max_columns: int | None = None,
) -> BlockLists:
    """Lists of the vertical-slash pattern (MInference, arXiv 2407.02490): columns that every row sees, and
    diagonals.

    A slash of offset o is the pairs with ``position - key = o``; a query block lists the blocks that its
    slashes cross, and the columns that lie in none of these and not behind its last row.

    Args:
        columns: ``[B, H, V]`` integers, keys in any order; a negative one is a hole.
        slashes: ``[B, H, W]`` integers, offsets >= 0 in any order; a negative one is a hole. Offset 0, the
            diagonal, is not added by itself.
        rows: number of query rows T, the last of the keys.
        keys: number of keys S.
        block_q: rows of a query block, 64 or 128.
        block_k: keys of a block, 64 or 128.
        max_columns: entries kept for the columns of a query block; default V.

    Returns:
        Lists of H heads.

    Raises:
        ValueError: columns and slashes that are not ``[B, H, n]`` of the same B and H.
    """
    if columns.dim() != 3 or slashes.dim() != 3 or columns.shape[:2] != slashes.shape[:2]:
        raise ValueError(
            "vertical_slash_index: columns and slashes must be [B, H, n] of the same B and H, got "
            f"{list(columns.shape)} and {list(slashes.shape)}"
        )
    device, blocks = columns.device, _block_count(rows, block_q)
    first = torch.arange(blocks, device=device) * block_q + keys - rows
    last = (first + block_q - 1).clamp(max=keys - 1)
    chosen = _crossed(slashes, first, last, keys, block_k)
    indptr, indices = block_mask_to_csr(chosen)

    single = torch.zeros(*columns.shape[:2], keys + 1, dtype=torch.bool, device=device)
    real = (columns >= 0) & (columns < keys)
    single.scatter_(2, torch.where(real, columns, keys).long(), True)  # holes go to one more key
    order = columns.shape[2] if max_columns is None else max_columns
    ascending = torch.where(single[..., :keys], torch.arange(keys, device=device), keys).sort(-1).values
    ascending = ascending[..., :order]
    at = ascending.clamp(max=max(keys - 1, 0))
    taken = chosen.gather(3, (at // block_k)[:, :, None].expand(-1, -1, blocks, -1))
    kept = (ascending[:, :, None] < keys) & (ascending[:, :, None] <= last[:, None]) & ~taken
    column_ptr, place = block_mask_to_csr(kept)
    # `place` counts within the ascending columns of its head.
    lists = torch.searchsorted(
        column_ptr[1:].contiguous(), torch.arange(place.numel(), device=device, dtype=torch.int32), right=True
    ).clamp(max=max(len(column_ptr) - 2, 0))
    heads = torch.div(lists, max(blocks, 1), rounding_mode="floor")
    members = at.reshape(-1, at.shape[2])[heads, place.long()] if place.numel() else place
    return BlockLists(indptr, indices, block_q, block_k, column_ptr, members.int())


def _crossed(slashes: Tensor, first: Tensor, last: Tensor, keys: int, block_k: int) -> Tensor:
    """``[B, H, M, N]``: key blocks that a slash crosses within the positions ``first`` ... ``last``."""
    count = _block_count(keys, block_k)
    real = slashes >= 0
    low, high = first[:, None] - slashes[:, :, None], last[:, None] - slashes[:, :, None]  # keys of a slash
    real = real[:, :, None] & (high >= 0)
    low = torch.div(low.clamp(0, max(keys - 1, 0)), block_k, rounding_mode="floor")
    high = torch.div(high.clamp(0, max(keys - 1, 0)), block_k, rounding_mode="floor")
    # +1 where a run of blocks begins and -1 behind its end: what sums to more than 0 is crossed.
    edges = torch.zeros(*low.shape[:3], count + 1, dtype=torch.int32, device=slashes.device)
    step = real.int()
    edges.scatter_add_(3, low.long(), step)
    edges.scatter_add_(3, (high + 1).long(), -step)
    return edges.cumsum(3)[..., :count] > 0


def block_pool(x: Tensor, block: int, mode: str = "mean") -> Tensor:
    """Blocks of neighbouring tokens to one vector each, in float32.

    Args:
        x: ``[B, H, N, D]`` queries or keys.
        block: tokens of a block; the last may be shorter and is pooled over what it has.
        mode: ``mean``, ``min`` or ``max`` of each channel.

    Returns:
        ``[B, H, ceil(N / block), D]`` float32.

    Raises:
        ValueError: another mode, block < 1, or x not of four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"block_pool: x must have shape [B, H, N, D], got {list(x.shape)}")
    if block < 1:
        raise ValueError(f"block_pool: block must be >= 1, got {block}")
    if mode not in ("mean", "min", "max"):
        raise ValueError(f"block_pool: mode must be one of 'mean', 'min', 'max', got {mode!r}")
    tokens, blocks = x.shape[2], _block_count(x.shape[2], block)
    fill = {"mean": 0.0, "min": torch.inf, "max": -torch.inf}[mode]
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block - tokens), value=fill)
    grouped: Tensor = padded.unflatten(2, (blocks, block))
    if mode == "min":
        return grouped.amin(3)
    if mode == "max":
        return grouped.amax(3)
    size = (tokens - torch.arange(blocks, device=x.device) * block).clamp(max=block)
    return grouped.sum(3) / size[:, None]


def topp_blocks(
    scores: Tensor, p: float, *, visible: Tensor | None = None, forced: Tensor | None = None
) -> Tensor:
    """The largest block scores of each row until they hold a share ``p`` of the row's sum.

    ``forced`` blocks are taken first and count; then the largest until the sum taken reaches ``p`` of the
    whole (XAttention, arXiv 2503.16428).

    Args:
        scores: ``[B, H, M, N]``, finite and not negative, e.g. ``antidiagonal_scores``.
        p: share, in (0, 1].
        visible: ``[M, N]`` bool, blocks that may be listed at all, e.g. ``causal_blocks``.
        forced: ``[M, N]`` bool, blocks that are listed whatever their score, as far as they are visible.

    Returns:
        ``[B, H, M, N]`` bool, for ``block_mask_to_csr``.

    Raises:
        ValueError: p out of range, or scores not of four dimensions.
    """
    if not 0 < p <= 1:
        raise ValueError(f"topp_blocks: p must be in (0, 1], got {p}")
    if scores.dim() != 4:
        raise ValueError(f"topp_blocks: scores must have shape [B, H, M, N], got {list(scores.shape)}")
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if visible is not None:
        allowed = allowed & visible
    first = torch.zeros_like(allowed) if forced is None else allowed & forced
    mass = torch.where(allowed, scores.float(), 0.0)
    forced_mass = torch.where(first, mass, 0.0).double().sum(-1, keepdim=True)
    needed = p * mass.double().sum(-1, keepdim=True) - forced_mass
    rest = torch.where(allowed & ~first, mass, -1.0)
    ordered, index = rest.sort(dim=-1, descending=True, stable=True)
    positive = ordered.clamp(min=0).double()
    taken = (positive.cumsum(-1) - positive < needed) & (positive > 0)
    return first | torch.zeros_like(allowed).scatter_(-1, index, taken)


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 16,
    block: int = 128,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention mass of blocks, estimated from strided antidiagonals (XAttention, arXiv 2503.16428).

    Groups of ``stride`` rows and keys: the sum of the products of row i and key ``stride - 1 - i`` of two
    groups, over i, is one product of concatenated vectors. Its softmax over the groups that a group of rows
    sees, with ``scale / stride``, is summed over the groups of a block of rows and of keys. The cost is that
    of the products divided by ``stride``.

    Args:
        q: queries ``[B, Hq, T, D]``, the last T of the S positions under ``causal``.
        k: keys ``[B, Hkv, S, D]``; query head h uses kv head ``h // (Hq / Hkv)``.
        stride: rows and keys of a group; divides ``block``.
        block: rows and keys of a block.
        causal: a group of rows sees the groups of keys up to its own.
        scale: factor of the products; default ``D ** -0.5``.

    Returns:
        ``[B, Hq, ceil(T / block), ceil(S / block)]`` float32; a row of it sums to at most
        ``block / stride``. Missing rows and keys at the ends count as zeros that nobody weighs.

    Raises:
        ValueError: stride does not divide block, or T > S under ``causal``.
    """
    rows, keys, dim = q.shape[2], k.shape[2], q.shape[3]
    if stride < 1 or block % stride:
        raise ValueError(f"antidiagonal_scores: stride must divide block={block}, got {stride}")
    if causal and rows > keys:
        raise ValueError(f"antidiagonal_scores: T must be at most S={keys} under causal, got {rows}")
    factor = (dim**-0.5 if scale is None else scale) / stride
    wide_q = _groups(q, stride, block).flip(3).flatten(3)
    wide_k = _groups(k, stride, block).flatten(3).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    m, n, per = wide_q.shape[2], wide_k.shape[2], block // stride
    key = torch.arange(n, device=q.device)
    found = []
    for first in range(0, m, 16 * per):  # a few blocks of rows at a time: the matrix is never whole
        some = wide_q[:, :, first : first + 16 * per]
        z = (some @ wide_k.mT).float() * factor
        group = torch.arange(first, first + some.shape[2], device=q.device)
        seen = (key * stride < keys).expand(some.shape[2], n)
        if causal:  # up to the group of the last row of the group
            last = (group * stride + stride - 1).clamp(max=max(rows - 1, 0)) + keys - rows
            seen = seen & (key * stride <= last[:, None])
        weight = torch.softmax(z.masked_fill(~seen, -torch.inf), -1)
        weight = weight * (group * stride < rows)[:, None]
        found.append(weight.unflatten(2, (-1, per)).unflatten(4, (-1, per)).sum((3, 5)))
    if not found or not n:
        return q.new_zeros((*q.shape[:2], m // per, n // per), dtype=torch.float32)
    return torch.cat(found, 2)


def _groups(x: Tensor, stride: int, block: int) -> Tensor:
    """``[B, H, groups, stride, D]``, padded with zeros to whole blocks."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
    groups: Tensor = padded.unflatten(2, (-1, stride))
    return groups


def topk_blocks(scores: Tensor, count: int, *, visible: Tensor, forced: Tensor | None = None) -> Tensor:
    """The ``count`` visible blocks of largest score of each row, ``forced`` ones first and counted.

    Args:
        scores: ``[B, H, M, N]``.
        count: blocks of a row, at least 1; a row that sees fewer lists all it sees.
        visible: ``[M, N]`` bool, e.g. ``causal_blocks``.
        forced: ``[M, N]`` bool, e.g. ``diagonal_blocks``.

    Returns:
        ``[B, H, M, N]`` bool, for ``block_mask_to_csr``.
    """
    first = None if forced is None else (visible & forced).expand(scores.shape).flatten(0, 2)
    flat = torch.where(visible, scores, -torch.inf).flatten(0, 2)
    index, kept = ops.topk_select(flat, min(count, scores.shape[3]), keep=first)
    real = torch.arange(index.shape[1], device=index.device) < kept[:, None]
    place = torch.where(real, index, scores.shape[3])
    chosen = torch.zeros(flat.shape[0], scores.shape[3] + 1, dtype=torch.bool, device=flat.device)
    chosen.scatter_(1, place.long(), True)
    return chosen[:, :-1].view(scores.shape) & visible
