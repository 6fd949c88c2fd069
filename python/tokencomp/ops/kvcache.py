"""The paged KV cache: wrappers and fake kernels of the operators that store, move and read slots.

Pages are ``[N, Hx, P, D]`` with P 16, 32 or 64 slots, any strides with contiguous channels. ``Hx = 1``: a
page belongs to one (sequence, kv head). ``Hx = Hkv``: it holds all kv heads of a sequence, as in the buffers
of other engines (FlashInfer's ``[N, P, Hkv, D]`` seen through ``transpose(1, 2)``). ``block_table`` ``[B,
Hkv, places]`` int32 names the page of slots ``[place * P, place * P + P)``, -1 for none; an engine's ``[B,
places]`` is expanded. ``lengths`` ``[B, Hkv]`` int32 counts the slots in use. No operator changes table or
lengths.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace

Order = Literal["stable", "holefill"]


@typed
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
    """Write new tokens behind the last slot of every row, in place.

    Token t of ``[starts[b], starts[b] + counts[b])`` goes to slot ``lengths[b, h] + t - starts[b]`` of row
    (b, h), so that left or right padding is never stored. The pages must be there already; ``lengths`` is
    left to the caller.

    Args:
        k_pages, v_pages: ``[N, Hx, P, D]`` and ``[N, Hx, P, Dv]``, float32, float16 or bfloat16, changed.
        k, v: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]`` of the same dtype, strided, channels contiguous.
        block_table: ``[B, Hkv, places]`` int32.
        lengths: ``[B, Hkv]`` int32, the slots in use before the call.
        starts, counts: ``[B]`` int32; default: from 0, all that follow.

    Raises:
        RuntimeError: a shape, dtype or device that is not as above; a slot without a page, a page outside
            the pool, tokens outside ``[0, T]`` (values are looked at on the CPU, and on CUDA under
            ``TOKENCOMP_CHECKED=1``).
    """
    _namespace.op("kv_append_")(
        k_pages,
        v_pages,
        k,
        v,
        as_table(block_table),
        as_table(lengths),
        starts=as_table(starts),
        counts=as_table(counts),
    )


@typed
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
    """Move the kept slots of every row to its front, in place, or into other pages.

    ``stable``: slot i comes from slot ``index[i]``. ``holefill``: kept slots below the new length stay and
    the holes are filled, lowest first, from the last kept slot backwards: fewest moves, but the order of the
    row is lost (KV-Compress, arXiv 2410.00161); ``hole_order`` says where each slot came from. Slots behind
    ``count`` keep what they had; the caller sets the new lengths and frees the pages behind them. Side arrays
    are compacted by ``gather`` with the same index.

    Args:
        k_pages, v_pages, block_table, lengths: as in ``kv_append_``.
        index: ``[B, Hkv, K]`` int32, ascending slots below the row's length, -1 behind ``count``.
        count: ``[B, Hkv]`` int32, how many are kept.
        order: ``stable`` or ``holefill``.
        out_table: ``[B, Hkv, places]`` int32, where the kept slots go; needed where a page that would change
            is shared with another row (copy on write). A page in it is either nobody's, or the one it
            replaces at the same place.

    Raises:
        RuntimeError: a shape, dtype or device that is not as above; a list that is not ascending, a slot
            without a page, a page that would change and is used elsewhere (values as in ``kv_append_``).
    """
    _namespace.op("kv_compact_")(
        k_pages,
        v_pages,
        as_table(block_table),
        as_table(lengths),
        _check.as_int32(index),
        _check.as_int32(count),
        order=order,
        out_table=as_table(out_table),
    )


@typed
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
    """The slots of every row as dense tensors.

    Args:
        k_pages, v_pages, block_table, lengths: as in ``kv_append_``.
        index: ``[B, Hkv, K]`` int32 slots in any order, -1 for a hole; default: all slots in order.
        count: ``[B, Hkv]`` int32, how many entries of ``index`` count; default: all.
        size: tokens of the result; what lies behind is cut off.

    Returns:
        ``k`` ``[B, Hkv, size, D]`` and ``v`` ``[B, Hkv, size, Dv]`` of the pages' dtype, zero where there is
        no slot.

    Raises:
        RuntimeError: a shape, dtype or device that is not as above; a slot outside the row (values as in
            ``kv_append_``).
    """
    k, v = _namespace.op("kv_gather")(
        k_pages,
        v_pages,
        as_table(block_table),
        as_table(lengths),
        index=_check.as_int32(index),
        count=_check.as_int32(count),
        size=size,
    )
    return k, v


def hole_order(index: Tensor, count: Tensor) -> Tensor:
    """Where each slot comes from after ``kv_compact_`` with ``order="holefill"``, for side arrays.

    Args:
        index, count: as in ``kv_compact_``.

    Returns:
        ``[B, Hkv, K]`` int32, -1 behind ``count``; a side array becomes ``side.gather(2, order)``.
    """
    slot = torch.arange(index.shape[2], dtype=torch.int32, device=index.device).expand_as(index)
    there = slot < count[..., None]
    listed = torch.where(there, index, torch.iinfo(torch.int32).max).contiguous()
    below = torch.searchsorted(listed, slot.contiguous())
    stays = listed.gather(2, below.clamp(max=max(index.shape[2] - 1, 0))) == slot
    last = (count[..., None] - 1 - (slot - below)).clamp(min=0)
    return torch.where(there, torch.where(stays, slot, listed.gather(2, last)), -1).int()


def as_table(t: Tensor | None) -> Tensor | None:
    """Strides are kept where the dtype is right: a table may be expanded, and a decode step must be quick."""
    return t if t is None or t.dtype is torch.int32 else _check.as_int32(t)


@_namespace.fake("kv_append_")
def _kv_append_fake(k_pages: Tensor, v_pages: Tensor, *_: Any, **__: Any) -> None:
    check_pages("kv_append_", k_pages)


@_namespace.fake("kv_compact_")
def _kv_compact_fake(k_pages: Tensor, v_pages: Tensor, *_: Any, **__: Any) -> None:
    check_pages("kv_compact_", k_pages)


@_namespace.fake("kv_gather")
def _kv_gather_fake(
    k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, *, size: int, **_: Any
) -> tuple[Tensor, Tensor]:
    check_pages("kv_gather", k_pages)
    k, v = (pages.new_empty((*lengths.shape, size, pages.shape[3])) for pages in (k_pages, v_pages))
    return k, v


def check_pages(op: str, k_pages: Tensor) -> None:
    """What a fake kernel looks at: the operator itself checks the rest."""
    torch._check(
        k_pages.dim() == 4, lambda: f"{op}: k_pages must have shape [N, Hx, P, D], got {list(k_pages.shape)}"
    )
