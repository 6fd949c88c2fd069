"""Lists of key blocks for ``ops.flash_prefill``: from masks, from columns and slashes, from block scores.

Everything here is a pure function of tensors, on their device and without waiting for it: shapes never depend
on values. Lists live in arrays as long as the worst case; what is behind the last pointer is not used.
Ties: larger score first, then smaller index.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.block_scores import antidiagonal_scores, block_pool

__all__ = [
    "BlockLists",
    "antidiagonal_scores",
    "block_mask_to_csr",
    "block_pool",
    "block_positions",
    "causal_blocks",
    "crossed_blocks",
    "density",
    "diagonal_blocks",
    "lists_of",
    "local_blocks",
    "topk_blocks",
    "topp_blocks",
    "vertical_slash_index",
]


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
    number = torch.arange(mask.shape[3], dtype=torch.int32, device=mask.device)
    return _csr(mask, number.expand(mask.shape))


def _csr(mask: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """``(pointers, entries)``: the entries of ``member`` where ``mask`` ``[B, H, M, N]`` is True."""
    flat = mask.reshape(-1)
    before = flat.cumsum(0, dtype=torch.int32)
    pointers = torch.zeros(mask.shape[:3].numel() + 1, dtype=torch.int32, device=mask.device)
    if mask.shape[3]:
        pointers[1:] = before[mask.shape[3] - 1 :: mask.shape[3]]
    # Entries that are not listed all go to one more place, which is cut off.
    place = torch.where(flat, before.long() - 1, flat.numel())
    entries = torch.zeros(flat.numel() + 1, dtype=torch.int32, device=mask.device)
    entries.scatter_(0, place, torch.where(flat, member.reshape(-1).int(), 0))
    return pointers, entries[:-1]


def block_positions(
    rows: int,
    keys: int,
    block_q: int,
    device: torch.device,
    first: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """First and last position of the rows of each query block, ``[M]``, or ``[B, 1, M]`` where ragged.

    Args:
        first: ``[B]`` position of row 0; default ``keys - rows``: the rows are the last of the keys.
        lengths: ``[B]`` keys of each sequence: rows at or behind it are padding. The last position of a
            block of padding is below its first.
    """
    start = torch.arange(_block_count(rows, block_q), device=device) * block_q
    end = (start + block_q).clamp(max=rows) - 1
    at = keys - rows if first is None else first[:, None, None]
    last = end + at
    return start + at, last if lengths is None else torch.minimum(last, lengths[:, None, None] - 1)


def causal_blocks(
    rows: int,
    keys: int,
    block_q: int,
    block_k: int,
    device: torch.device,
    first: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``[M, N]`` bool: blocks of which at least one pair is visible; the rows are the last of the keys.

    ``[B, 1, M, N]`` with ``first`` or ``lengths``, see ``block_positions``.
    """
    low, high = block_positions(rows, keys, block_q, device, first, lengths)
    behind = torch.arange(_block_count(keys, block_k), device=device) * block_k <= high[..., None]
    return behind & (low <= high)[..., None]


def diagonal_blocks(
    rows: int,
    keys: int,
    block_q: int,
    block_k: int,
    device: torch.device,
    first: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``[M, N]`` bool: blocks that hold the own position of at least one row of a query block.

    ``[B, 1, M, N]`` with ``first`` or ``lengths``, see ``block_positions``.
    """
    low, high = block_positions(rows, keys, block_q, device, first, lengths)
    return local_blocks(low, high, keys, block_k, 1)


def local_blocks(
    low: Tensor,
    high: Tensor,
    keys: int,
    block_k: int,
    window: int | Tensor,
    sinks: int | Tensor = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """``[..., M, N]`` bool: blocks with one of the last ``window`` keys of a row or of the first ``sinks``.

    Args:
        low, high: ``[M]`` or ``[B, 1, M]``, of ``block_positions``.
        window: keys up to a row's own, that included, >= 1; or ``[B, H]``, of each head.
        sinks: first keys that every row sees; or ``[B, H]``.
        starts: ``[B]`` where these are; default 0.
    """
    begin = torch.arange(_block_count(keys, block_k), device=low.device) * block_k
    nearest, first = (x[..., None, None] if isinstance(x, Tensor) else x for x in (window, sinks))
    near = begin + block_k > low[..., None] - nearest + 1
    at = 0 if starts is None else starts[:, None, None, None]
    sink = (begin < at + first) & (begin + block_k > at)
    return (sink | near) & (begin <= high[..., None]) & (low <= high)[..., None]


def vertical_slash_index(
    columns: Tensor,
    slashes: Tensor,
    rows: int,
    keys: int,
    *,
    block_q: int = 64,
    block_k: int = 64,
    max_columns: int | None = None,
    first: Tensor | None = None,
    lengths: Tensor | None = None,
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
        first, lengths: ``[B]``, see ``block_positions``.

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
    low, high = block_positions(rows, keys, block_q, columns.device, first, lengths)
    chosen = crossed_blocks(slashes, low, high, keys, block_k)
    return lists_of(chosen, block_q, block_k, columns=columns, last=high, keys=keys, max_columns=max_columns)


def lists_of(
    chosen: Tensor,
    block_q: int,
    block_k: int,
    *,
    columns: Tensor | None = None,
    last: Tensor | None = None,
    keys: int = 0,
    max_columns: int | None = None,
) -> BlockLists:
    """Lists of the blocks ``chosen`` ``[B, H, M, N]`` bool, and of ``columns`` that lie in none of them.

    Args:
        columns: ``[B, H, V]`` keys in any order; one outside ``[0, keys)`` is a hole.
        last: ``[M]`` or ``[B, 1, M]`` last position of each query block; columns behind it are left out.
        max_columns: entries kept for the columns of a query block; default V.
    """
    indptr, indices = block_mask_to_csr(chosen)
    if columns is None or last is None:
        return BlockLists(indptr, indices, block_q, block_k)
    single = torch.zeros(*columns.shape[:2], keys + 1, dtype=torch.bool, device=chosen.device)
    real = (columns >= 0) & (columns < keys)
    single.scatter_(2, torch.where(real, columns, keys).long(), True)  # holes go to one more key
    order = columns.shape[2] if max_columns is None else max_columns
    ascending = (
        torch.where(single[..., :keys], torch.arange(keys, device=chosen.device), keys).sort(-1).values
    )
    ascending = ascending[:, :, None, :order]
    at = ascending.clamp(max=max(keys - 1, 0)).expand(-1, -1, chosen.shape[2], -1)
    taken = chosen.gather(3, at // block_k)
    kept = (ascending < keys) & (ascending <= last[..., None]) & ~taken
    column_ptr, members = _csr(kept, at)
    return BlockLists(indptr, indices, block_q, block_k, column_ptr, members)


def crossed_blocks(slashes: Tensor, low: Tensor, high: Tensor, keys: int, block_k: int) -> Tensor:
    """``[B, H, M, N]``: key blocks that a slash ``[B, H, W]`` crosses within the positions ``low`` ...
    ``high`` of each query block; negative slashes are holes.
    """
    count = _block_count(keys, block_k)
    offset = slashes[:, :, None]
    begin, end = low[..., None] - offset, high[..., None] - offset  # keys of a slash
    real = (offset >= 0) & (end >= 0) & (low <= high)[..., None]
    begin = torch.div(begin.clamp(0, max(keys - 1, 0)), block_k, rounding_mode="floor")
    end = torch.div(end.clamp(0, max(keys - 1, 0)), block_k, rounding_mode="floor")
    # +1 where a run of blocks begins and -1 behind its end: what sums to more than 0 is crossed.
    edges = torch.zeros(*begin.shape[:3], count + 1, dtype=torch.int32, device=slashes.device)
    step = real.int()
    edges.scatter_add_(3, begin.long(), step)
    edges.scatter_add_(3, (end + 1).long(), -step)
    return edges.cumsum(3)[..., :count] > 0


def density(lists: BlockLists, visible: Tensor) -> Tensor:
    """``[B, H]`` float32: listed blocks, and columns as parts of one, per visible block.

    Args:
        visible: ``[M, N]`` or ``[B, 1, M, N]`` bool, of ``causal_blocks``.
    """
    blocks = visible.shape[-2]
    batch = visible.shape[0] if visible.dim() == 4 else 1
    all_blocks = visible.sum((-2, -1)).view(batch, 1)
    found = lists.indptr.diff().view(batch, -1, blocks).sum(-1).float()
    if lists.column_ptr is not None:
        found = found + lists.column_ptr.diff().view(batch, -1, blocks).sum(-1) / lists.block_k
    return found / all_blocks.clamp(min=1)


def topp_blocks(
    scores: Tensor, p: float | Tensor, *, visible: Tensor | None = None, forced: Tensor | None = None
) -> Tensor:
    """The largest block scores of each row until they hold a share ``p`` of the row's sum.

    ``forced`` blocks are taken first and count; then the largest until the sum taken reaches ``p`` of the
    whole (XAttention, arXiv 2503.16428).

    Args:
        scores: ``[B, H, M, N]``, finite and not negative, e.g. ``antidiagonal_scores``.
        p: share, in (0, 1]; or ``[B, H]`` float, of each head.
        visible: ``[M, N]`` bool, blocks that may be listed at all, e.g. ``causal_blocks``.
        forced: ``[M, N]`` bool, blocks that are listed whatever their score, as far as they are visible.

    Returns:
        ``[B, H, M, N]`` bool, for ``block_mask_to_csr``.

    Raises:
        ValueError: p out of range, or scores not of four dimensions.
    """
    if not isinstance(p, Tensor) and not 0 < p <= 1:
        raise ValueError(f"topp_blocks: p must be in (0, 1], got {p}")
    if scores.dim() != 4:
        raise ValueError(f"topp_blocks: scores must have shape [B, H, M, N], got {list(scores.shape)}")
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if visible is not None:
        allowed = allowed & visible
    first = torch.zeros_like(allowed) if forced is None else allowed & forced
    mass = torch.where(allowed, scores.float(), 0.0)
    forced_mass = torch.where(first, mass, 0.0).double().sum(-1, keepdim=True)
    share = p.double()[..., None, None] if isinstance(p, Tensor) else p
    needed = share * mass.double().sum(-1, keepdim=True) - forced_mass
    rest = torch.where(allowed & ~first, mass, -1.0)
    ordered, index = rest.sort(dim=-1, descending=True, stable=True)
    positive = ordered.clamp(min=0).double()
    taken = (positive.cumsum(-1) - positive < needed) & (positive > 0)
    return first | torch.zeros_like(allowed).scatter_(-1, index, taken)


def topk_blocks(
    scores: Tensor, count: int | Tensor, *, visible: Tensor, forced: Tensor | None = None
) -> Tensor:
    """The ``count`` visible blocks of largest score of each row, ``forced`` ones first and counted.

    Args:
        scores: ``[B, H, M, N]``.
        count: blocks of a row; one that sees fewer lists all it sees. Or ``[B, H]`` integers, of each head.
        visible: ``[M, N]`` bool, e.g. ``causal_blocks``.
        forced: ``[M, N]`` bool, e.g. ``diagonal_blocks``.

    Returns:
        ``[B, H, M, N]`` bool, for ``block_mask_to_csr``.
    """
    first = None if forced is None else (visible & forced).expand(scores.shape).flatten(0, 2)
    flat = torch.where(visible, scores, -torch.inf).flatten(0, 2)
    width, each = scores.shape[3], None
    if isinstance(count, Tensor):
        each = count.clamp(0, width)[..., None].expand(scores.shape[:3]).flatten()
    index, kept = ops.topk_select(
        flat, width if isinstance(count, Tensor) else min(count, width), keep=first, k_per_row=each
    )
    real = torch.arange(index.shape[1], device=index.device) < kept[:, None]
    place = torch.where(real, index, scores.shape[3])
    chosen = torch.zeros(flat.shape[0], scores.shape[3] + 1, dtype=torch.bool, device=flat.device)
    chosen.scatter_(1, place.long(), True)
    return chosen[:, :-1].view(scores.shape) & visible
