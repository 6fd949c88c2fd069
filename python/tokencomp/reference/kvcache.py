"""Oracle of the paged KV cache: every operator as loops over rows and slots of plain tensors.

``slots`` names the place of every slot of a row; all else is indexing. The arguments are those of
``tokencomp.ops``; in-place operators change the tensors they are given.
"""

from typing import Literal

import torch
from torch import Tensor

NO_PAGE = -1
Order = Literal["stable", "holefill"]


def slots(pages: Tensor, block_table: Tensor, b: int, h: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Page, head and place within the page of the first ``count`` slots of row (b, h) of ``pages``."""
    slot = torch.arange(count, device=pages.device)
    page = block_table[b, h].long()[slot // pages.shape[2]] & 0x0FFFFFFF
    return page, torch.full_like(slot, h if pages.shape[1] > 1 else 0), slot % pages.shape[2]


def read_row(pages: Tensor, block_table: Tensor, lengths: Tensor, b: int, h: int) -> Tensor:
    """``[length, D]``: the slots of one row, a copy."""
    return pages[slots(pages, block_table, b, h, int(lengths[b, h]))].clone()


def write_row(pages: Tensor, block_table: Tensor, b: int, h: int, first: int, x: Tensor) -> None:
    """``x`` ``[n, D]`` into slots ``first`` to ``first + n`` of a row."""
    page, head, place = (t[first:] for t in slots(pages, block_table, b, h, first + x.shape[0]))
    pages[page, head, place] = x.to(pages.dtype)


def rows_of(lengths: Tensor) -> list[tuple[int, int]]:
    """Every (b, h)."""
    return [(b, h) for b in range(lengths.shape[0]) for h in range(lengths.shape[1])]


def kv_append_(
    k_pages: Tensor,
    v_pages: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Tokens ``starts[b]`` to ``starts[b] + counts[b]`` of every row behind its last slot."""
    for b, h in rows_of(lengths):
        start = 0 if starts is None else int(starts[b])
        end = k.shape[2] if counts is None else start + int(counts[b])
        for pages, x in ((k_pages, k), (v_pages, v)):
            write_row(pages, block_table, b, h, int(lengths[b, h]), x[b, h, start:end])


def hole_order(index: Tensor, count: Tensor) -> Tensor:
    """Where each slot comes from after ``order="holefill"``: ``[B, Hkv, K]`` int32, -1 beyond ``count``.

    Kept slots below the new length stay; the holes, lowest first, take the kept slots from the last one
    backwards (KV-Compress, arXiv 2410.00161).
    """
    order = torch.full_like(index, -1)
    for b, h in rows_of(count):
        n = int(count[b, h])
        kept = index[b, h, :n].tolist()
        tail = [slot for slot in reversed(kept) if slot >= n]
        moved = [slot if slot in set(kept) else tail.pop(0) for slot in range(n)]
        order[b, h, :n] = torch.tensor(moved, dtype=order.dtype)
    return order


def kv_compact_(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    order: Order = "stable",
    out_table: Tensor | None = None,
) -> None:
    """The kept slots ``index`` of every row to the front of the row, or into the pages of ``out_table``."""
    source = index if order == "stable" else hole_order(index, count)
    target = block_table if out_table is None else out_table
    kept = [
        (pages, b, h, read_row(pages, block_table, lengths, b, h)[source[b, h, : int(count[b, h])].long()])
        for pages in (k_pages, v_pages)
        for b, h in rows_of(lengths)
    ]
    for pages, b, h, x in kept:
        write_row(pages, target, b, h, 0, x)


def kv_gather(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    index: Tensor | None = None,
    count: Tensor | None = None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The slots of every row, or those listed, as dense tensors with zeros where there is none."""
    return (
        _gather(k_pages, block_table, lengths, index, count, size),
        _gather(v_pages, block_table, lengths, index, count, size),
    )


def _gather(
    pages: Tensor, block_table: Tensor, lengths: Tensor, index: Tensor | None, count: Tensor | None, size: int
) -> Tensor:
    out = pages.new_zeros((*lengths.shape, size, pages.shape[3]))
    for b, h in rows_of(lengths):
        row = read_row(pages, block_table, lengths, b, h)
        listed = torch.arange(len(row)) if index is None else index[b, h].long()
        listed = listed[: size if count is None else min(size, int(count[b, h]))]
        there = (listed >= 0).nonzero()[:, 0]
        out[b, h, there] = row[listed[there]]
    return out


def rope_shift_(
    k_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    old_position: Tensor,
    new_position: Tensor,
    inv_freq: Tensor,
    *,
    layout: Literal["half", "interleaved"] = "half",
    dtype: torch.dtype = torch.float64,
) -> None:
    """Keys turned from their old to their new positions, in place."""
    for b, h in rows_of(lengths):
        n = int(lengths[b, h])
        delta = (new_position[b, h, :n] - old_position[b, h, :n]).to(dtype)
        angle = delta[:, None] * inv_freq.to(dtype)
        keys = read_row(k_pages, block_table, lengths, b, h).to(dtype)
        write_row(k_pages, block_table, b, h, 0, rotate(keys, angle, layout))


def rotate(x: Tensor, angle: Tensor, layout: str = "half") -> Tensor:
    """``x`` ``[n, D]`` with its pairs of channels turned by ``angle`` ``[n, pairs]``."""
    pairs = angle.shape[1]
    first = slice(0, pairs) if layout == "half" else slice(0, 2 * pairs, 2)
    second = slice(pairs, 2 * pairs) if layout == "half" else slice(1, 2 * pairs, 2)
    out, cos, sin = x.clone(), angle.cos(), angle.sin()
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out
