"""Paged keys and values of other engines, seen as our operators take them: by strides, nothing is copied.

vLLM and FlashAttention keep ``[pages, P, Hkv, D]`` with a ``block_table`` ``[B, places]`` and ``seq_lens``;
FlashInfer ``[pages, 2, P, Hkv, D]`` (NHD) or ``[pages, 2, Hkv, P, D]`` (HND) with ``indptr``, ``indices`` and
``last_page_len``. The heads of a sequence share its pages in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp._typed import typed
from tokencomp.recipes.common import require, require_dims

Layout = Literal["NHD", "HND"]


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of one layer. Made by ``flash_pages`` or ``flashinfer_pages``."""

    k: Tensor  # [pages, Hkv, P, D], a view of the engine's buffer
    v: Tensor  # [pages, Hkv, P, Dv]
    block_table: Tensor  # [B, places] int32
    seq_lens: Tensor  # [B] int32
    host_lens: tuple[int, ...]  # the same numbers

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.k.shape[2]

    @property
    def longest(self) -> int:
        """Slots of the longest sequence."""
        return max(self.host_lens, default=0)

    def table(self) -> Tensor:
        """``[B, Hkv, places]`` as the operators take it; a view."""
        return self.block_table[:, None].expand(-1, self.k.shape[1], -1)

    def lengths(self) -> Tensor:
        """``[B, Hkv]`` int32."""
        return self.seq_lens[:, None].expand(-1, self.k.shape[1]).contiguous()

    def gather(self) -> tuple[Tensor, Tensor]:
        """Keys and values in order of slot, ``[B, Hkv, longest, D]``, zeros behind a sequence's last: the
        only copy made here.
        """
        if self.page_size in (16, 32, 64):
            return ops.kv_gather(self.k, self.v, self.table(), self.lengths(), size=self.longest)
        slot = torch.arange(self.longest, device=self.k.device)  # pages of sizes the operators do not know
        there = slot < self.seq_lens[:, None]
        page = torch.where(there, self.block_table[:, slot // self.page_size], 0).long()
        inside = (slot % self.page_size).expand_as(page)
        dense = (pages[page, :, inside].transpose(1, 2) for pages in (self.k, self.v))
        k, v = (x.masked_fill(~there[:, None, :, None], 0) for x in dense)
        return k, v


@typed
def flash_pages(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    host_lens: Sequence[int] | None = None,
) -> PagedKV:
    """The layout of FlashAttention and vLLM.

    Args:
        k_cache, v_cache: ``[pages, P, Hkv, D]`` and ``[pages, P, Hkv, Dv]`` of one layer, any strides with
            the channels contiguous; vLLM's buffer of both is unbound first: ``flash_pages(*kv.unbind(0),
            ...)``.
        block_table: ``[B, places]`` int32; entries behind a sequence's last page are not looked at.
        seq_lens: ``[B]`` int32.
        host_lens: ``seq_lens`` as the scheduler knows them; without, they are asked of the device.

    Raises:
        ValueError: a shape or dtype that is not as above, or a length the table has no places for.
    """
    op = "flash_pages"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require_dims(op, name, cache, "[pages, P, Hkv, D]")
    return _paged(op, k_cache.transpose(1, 2), v_cache.transpose(1, 2), block_table, seq_lens, host_lens)


@typed
def flashinfer_pages(
    kv_cache: Tensor | tuple[Tensor, Tensor],
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    *,
    layout: Layout = "NHD",
    places: int | None = None,
    host_lens: Sequence[int] | None = None,
) -> PagedKV:
    """The layout of FlashInfer.

    Args:
        kv_cache: ``[pages, 2, P, Hkv, D]`` (NHD) or ``[pages, 2, Hkv, P, D]`` (HND), or keys and values
            apart, without the 2; any strides with the channels contiguous.
        indptr, indices, last_page_len, places: as in ``flashinfer_table``.
        host_lens: the lengths as the scheduler knows them; without, they are asked of the device.

    Raises:
        ValueError: a shape or dtype that is not as above.
    """
    op, inner = "flashinfer_pages", "P, Hkv, D" if layout == "NHD" else "Hkv, P, D"
    require(layout in ("NHD", "HND"), op, "layout", "'NHD' or 'HND'", repr(layout))
    if isinstance(kv_cache, Tensor):
        both = kv_cache.dim() == 5 and kv_cache.shape[1] == 2
        require(both, op, "kv_cache", f"[pages, 2, {inner}]", list(kv_cache.shape))
        k, v = kv_cache.unbind(1)
    else:
        k, v = kv_cache
        for name, cache in (("kv_cache[0]", k), ("kv_cache[1]", v)):
            require_dims(op, name, cache, f"[pages, {inner}]")
    if layout == "NHD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    table, lens = flashinfer_table(indptr, indices, last_page_len, k.shape[2], places=places)
    return _paged(op, k, v, table, lens, host_lens)


@typed
def flashinfer_table(
    indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int, *, places: int | None = None
) -> tuple[Tensor, Tensor]:
    """FlashInfer's lists of pages as a table.

    Args:
        indptr: ``[B + 1]`` int32; sequence b has the pages ``indices[indptr[b] : indptr[b + 1]]``.
        indices: ``[n]`` int32.
        last_page_len: ``[B]`` int32, slots in use of the last page, in [1, page_size]; without pages ignored.
        page_size: slots of a page.
        places: columns of the table; without, the most that a sequence has, which is asked of the device.

    Returns:
        ``block_table`` ``[B, places]`` int32, -1 behind the last page; ``seq_lens`` ``[B]`` int32.

    Raises:
        ValueError: a shape, dtype or number that is not as above.
    """
    op = "flashinfer_table"
    for name, t in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
        require(t.dim() == 1 and t.dtype == torch.int32, op, name, "int32 with one dimension",
                f"{t.dtype} {list(t.shape)}")  # fmt: skip
    batch = last_page_len.shape[0]
    require(indptr.shape[0] == batch + 1, op, "indptr", f"[B + 1 = {batch + 1}]", list(indptr.shape))
    require(page_size >= 1, op, "page_size", ">= 1", page_size)
    pages = indptr[1:] - indptr[:-1]
    width = (int(pages.max()) if batch else 0) if places is None else places
    place = torch.arange(width, device=indptr.device)
    entry = (indptr[:-1, None] + place).clamp(max=max(indices.shape[0] - 1, 0)).long()
    there = place < pages[:, None]
    found = indices[entry] if indices.shape[0] else entry
    table = torch.where(there, found, -1).to(torch.int32)
    lens = torch.where(pages > 0, (pages - 1) * page_size + last_page_len, 0)
    return table, lens.to(torch.int32)


@typed
def flashinfer_lists(block_table: Tensor, seq_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A table as FlashInfer's lists: ``indptr`` ``[B + 1]``, ``indices``, ``last_page_len`` ``[B]``, int32.

    Args:
        block_table: ``[B, places]`` int32; entries behind a sequence's last page are not looked at.
        seq_lens: ``[B]`` int32.
        page_size: slots of a page.

    ``indices`` has B * places entries, of which the first ``indptr[B]`` count, so that nothing waits for the
    device; ``last_page_len`` is 0 of a sequence without slots.

    Raises:
        ValueError: a shape or dtype that is not as above.
    """
    op = "flashinfer_lists"
    _check_table(op, block_table, seq_lens)
    require(page_size >= 1, op, "page_size", ">= 1", page_size)
    pages = (seq_lens + page_size - 1).div(page_size, rounding_mode="floor")
    indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0))
    there = torch.arange(block_table.shape[1], device=block_table.device) < pages[:, None]
    order = (~there).flatten().to(torch.int8).argsort(stable=True)
    indices = block_table.flatten()[order]
    last = torch.where(seq_lens > 0, (seq_lens - 1) % page_size + 1, 0)
    return indptr.to(torch.int32), indices, last.to(torch.int32)


def _paged(
    op: str, k: Tensor, v: Tensor, block_table: Tensor, seq_lens: Tensor, host_lens: Sequence[int] | None
) -> PagedKV:
    require(k.shape[:3] == v.shape[:3], op, "v", f"[pages, heads, P] = {list(k.shape[:3])} as keys have",
            list(v.shape[:3]))  # fmt: skip
    _check_table(op, block_table, seq_lens)
    lens = tuple(int(n) for n in (seq_lens.tolist() if host_lens is None else host_lens))
    require(len(lens) == seq_lens.shape[0], op, "host_lens", f"B={seq_lens.shape[0]} numbers", len(lens))
    most = block_table.shape[1] * k.shape[2]
    for b, n in enumerate(lens):
        require(0 <= n <= most, op, f"seq_lens[{b}]", f"in [0, places * P = {most}]", n)
    return PagedKV(k, v, block_table, seq_lens, lens)


def _check_table(op: str, block_table: Tensor, seq_lens: Tensor) -> None:
    for name, t, dims in (("block_table", block_table, 2), ("seq_lens", seq_lens, 1)):
        shape = "[B, places]" if dims == 2 else "[B]"
        fits = t.dim() == dims and t.dtype == torch.int32
        require(fits, op, name, f"int32 {shape}", f"{t.dtype} {list(t.shape)}")
    same = block_table.shape[0] == seq_lens.shape[0]
    require(same, op, "seq_lens", f"[B={block_table.shape[0]}]", list(seq_lens.shape))
