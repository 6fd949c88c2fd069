"""Pages of quantized keys and values: their format, and the operators that write and read whole pages.

A page holds P tokens of one sequence and KV head in one blob, ``[K codes | K params | V codes | V params]``,
sections on 16-byte boundaries (``csrc/core/page_blob.h``). Pages of one format live in a pool ``[pages,
page_bytes]`` of uint8. An entry of a page table is a page number with the page's type in its upper four bits:
0 is a working page, i the i-th quantized pool (``page_pools.PagePools``).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace
from tokencomp.ops.kvquant import Axis, kv_repack

Tier = Literal["fp8", "int8", "int4", "int3", "int2"]

TIERS = ("working", "fp8", "int8", "int4", "int3", "int2")
"""Names of the number formats by their numbers; 0 is the working dtype, not quantized."""

TIER_BITS = {"fp8": 8, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
MAX_PAGE_TYPES = 7
_NUMBER_BITS = 28


def page_entry(kind: int, number: int) -> int:
    """The entry of a page table: the page's type in the upper four bits, its number below."""
    if not 0 <= kind <= MAX_PAGE_TYPES:
        raise ValueError(f"page_entry: kind must be in [0, {MAX_PAGE_TYPES}], got {kind}")
    if not 0 <= number < 1 << _NUMBER_BITS:
        raise ValueError(f"page_entry: number must be in [0, 2^{_NUMBER_BITS}), got {number}")
    return kind << _NUMBER_BITS | number


def page_type(entry: Tensor) -> Tensor:
    """Page types of int32 table entries: 0 working, i the i-th quantized pool, 15 for -1, no page."""
    return (entry >> _NUMBER_BITS) & 15


def page_number(entry: Tensor) -> Tensor:
    """Page numbers of int32 table entries."""
    return entry & ((1 << _NUMBER_BITS) - 1)


@dataclass(frozen=True)
class PageFormat:
    """How the pages of a pool are stored; keys and values are independent.

    Args:
        tier_k, tier_v: number format.
        tokens: P, 16, 32 or 64.
        head_dim: D.
        axis_k, axis_v: groups of channels of a token, or of tokens of a channel.
        group_k, group_v: size of a group; -1 is all channels, or all tokens of the page. A group divides D
            or P.
        layout: ``linear`` (CPU) or ``mma16`` (tensor cores).
    """

    tier_k: Tier = "int4"
    tier_v: Tier = "int4"
    tokens: int = 64
    head_dim: int = 128
    axis_k: Axis = "channel"
    axis_v: Axis = "token"
    group_k: int = -1
    group_v: int = -1
    layout: Literal["linear", "mma16"] = "linear"

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Byte offsets of K codes, K params, V codes and V params in a page."""
        parts = [
            part
            for tier, axis, group in (
                (self.tier_k, self.axis_k, self.group_k),
                (self.tier_v, self.axis_v, self.group_v),
            )
            for part in (self._code_bytes(tier), self._param_bytes(axis, group))
        ]
        k_params = _aligned(parts[0])
        v_codes = k_params + _aligned(parts[1])
        return 0, k_params, v_codes, v_codes + _aligned(parts[2])

    @property
    def page_bytes(self) -> int:
        """Bytes of a page. Raises ValueError for an unknown tier or a group below 1."""
        return self.sections[3] + _aligned(self._param_bytes(self.axis_v, self.group_v))

    @property
    def bits(self) -> float:
        """Bits an element of keys and values, parameters included."""
        return self.page_bytes * 8 / (2 * self.tokens * self.head_dim)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operators."""
        names = ("tier_k", "axis_k", "group_k", "tier_v", "axis_v", "group_v", "layout")
        return {name: getattr(self, name) for name in names}

    def _code_bytes(self, tier: str) -> int:
        if tier not in TIER_BITS:
            raise ValueError(f"PageFormat: a tier must be one of {', '.join(TIER_BITS)}, got {tier!r}")
        return self.tokens * self.head_dim * TIER_BITS[tier] // 8

    def _param_bytes(self, axis: str, group: int) -> int:
        if group == -1:
            group = self.head_dim if axis == "token" else self.tokens
        if group < 1:
            raise ValueError(f"PageFormat: a group must be -1 or >= 1, got {group}")
        return 4 * self.tokens * self.head_dim // group


def _aligned(size: int) -> int:
    return (size + 15) // 16 * 16


@typed
def kv_page_write_(
    pool: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Tensor,
    index: Tensor,
    pages: Tensor,
    page: PageFormat,
    *,
    k_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> None:
    """Gather tokens of dense keys and values, quantize them, and write them as whole pages.

    Page ``pages[i]`` becomes the tokens ``index[i]`` of the sequence and head ``sequence[i]``: quantized as
    by ``kv_quantize`` with ties to even, from the given dense values only (pages are never requantized).

    Args:
        pool: ``[pages, page_bytes]`` uint8, contiguous, updated.
        k, v: ``[B, H, S, D]``, float32, float16 or bfloat16, any strides with D contiguous.
        sequence: ``[n]`` integers, ``b * H + h`` of each page.
        index: ``[n, P]`` integers, tokens in [0, S), -1 for an empty slot. Empty slots are no part of a grid;
            what they read as has no meaning.
        pages: ``[n]`` distinct page numbers of the pool.
        page: the pool's format.
        k_scale, k_bias, v_scale, v_bias: ``[B, H, D]`` maps per channel, as ``pre_scale`` and ``pre_bias``.

    Raises:
        RuntimeError: a shape, dtype, device or format that is not as above.
        ValueError: a number out of range, or a page given twice. Checked on CPU, on CUDA only under
            ``TOKENCOMP_CHECKED=1``, never inside torch.compile; unchecked, pages out of range are not
            written, tokens out of range are empty slots.
    """
    op = "kv_page_write_"
    if k.dim() == 4 and pool.dim() == 2 and pages.dim() == 1 and _check.checked(pool, sequence, index, pages):
        _check.check_range(op, "sequence", sequence, 0, k.shape[0] * k.shape[1], "B * H")
        _check.check_range(op, "index", index, -1, k.shape[2], "S")
        _check.check_range(op, "pages", pages, 0, pool.shape[0], "number of pages")
        _check_distinct(op, pages)
    if index.dim() == 2 and index.shape[1] != page.tokens:
        raise ValueError(f"{op}: index must have shape [n, P={page.tokens}], got {list(index.shape)}")
    _namespace.op(op)(
        pool,
        k,
        v,
        _check.as_int32(sequence),
        _check.as_int32(index),
        _check.as_int32(pages),
        **page.options(),
        k_scale=_check.as_float32(k_scale),
        k_bias=_check.as_float32(k_bias),
        v_scale=_check.as_float32(v_scale),
        v_bias=_check.as_float32(v_bias),
    )


@typed
def kv_retier_(
    pool: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    sequence: Tensor,
    slots: Tensor,
    pages: Tensor,
    page: PageFormat,
    *,
    k_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> None:
    """Quantize slots of working pages and write them as whole quantized pages: the demotion of a paged cache.

    As ``kv_page_write_`` of the rows' dense keys and values. Working pages, table and lengths stay as they
    are: the caller lets the slots go by ``kv_compact_``.

    Args:
        pool: ``[pages, page_bytes]`` uint8, contiguous, updated.
        k_pages, v_pages: ``[N, Hx, P, D]``, float32, float16 or bfloat16, as in ``kv_append_``.
        block_table: ``[B, Hkv, places]`` int32; entries of other types than working pages may be in it.
        sequence: ``[n]`` integers, ``b * Hkv + h`` of each page.
        slots: ``[n, P]`` integers, slots of the row in working pages, -1 for an empty one.
        pages: ``[n]`` distinct page numbers of the pool.
        page: the pool's format; its pages have as many tokens as the working ones.
        k_scale, k_bias, v_scale, v_bias: ``[B, Hkv, D]`` maps per channel, as in ``kv_page_write_``.

    Raises:
        RuntimeError: a shape, dtype, device or format that is not as above.
        ValueError: a number out of range, a page given twice, a slot that is in no working page. Checked as
            in ``kv_page_write_``; unchecked, such pages are not written, such slots are empty.
    """
    op = "kv_retier_"
    table = _check.as_int32(block_table) if block_table.dtype != torch.int32 else block_table
    assert table is not None
    if k_pages.dim() == 4 and pool.dim() == 2 and pages.dim() == 1 and table.dim() == 3:
        _check_source(op, pool, k_pages, table, sequence, slots, pages)
    if slots.dim() == 2 and slots.shape[1] != page.tokens:
        raise ValueError(f"{op}: slots must have shape [n, P={page.tokens}], got {list(slots.shape)}")
    _namespace.op(op)(
        pool,
        k_pages,
        v_pages,
        table,
        _check.as_int32(sequence),
        _check.as_int32(slots),
        _check.as_int32(pages),
        **page.options(),
        k_scale=_check.as_float32(k_scale),
        k_bias=_check.as_float32(k_bias),
        v_scale=_check.as_float32(v_scale),
        v_bias=_check.as_float32(v_bias),
    )


@typed
def kv_page_read(
    pool: Tensor,
    pages: Tensor,
    page: PageFormat,
    *,
    dtype: torch.dtype = torch.float32,
    sequence: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys and values of whole pages, dequantized.

    Args:
        pool: ``[pages, page_bytes]`` uint8, contiguous.
        pages: ``[n]`` page numbers, in any order, repeated or not.
        page: the pool's format.
        dtype: float32, float16 or bfloat16.
        sequence: ``[n]`` integers, ``b * H + h``; needed with the maps, which are as in ``kv_page_write_``.

    Returns:
        ``k``, ``v``: ``[n, P, D]`` of ``dtype``.

    Raises:
        RuntimeError: a shape, dtype, device or format that is not as above.
        ValueError: a page number out of range (checked as in ``kv_page_write_``; unchecked it reads as NaN).
    """
    op = "kv_page_read"
    if pool.dim() == 2 and _check.checked(pool, pages):
        _check.check_range(op, "pages", pages, 0, pool.shape[0], "number of pages")
    k, v = _namespace.op(op)(
        pool,
        _check.as_int32(pages),
        page.tokens,
        page.head_dim,
        **page.options(),
        sequence=_check.as_int32(sequence),
        k_scale=_check.as_float32(k_scale),
        k_bias=_check.as_float32(k_bias),
        v_scale=_check.as_float32(v_scale),
        v_bias=_check.as_float32(v_bias),
        dtype=dtype,
    )
    return k, v


def kv_pages_repack(pool: Tensor, page: PageFormat, layout: Literal["linear", "mma16"]) -> Tensor:
    """``[pages, page_bytes]`` of format ``page`` in another layout, by ``kv_repack``; a copy unless it is the
    same.
    """
    if layout == page.layout:
        return pool
    out = pool.clone()
    for which, tier, start in (("k", page.tier_k, page.sections[0]), ("v", page.tier_v, page.sections[2])):
        codes = pool[:, start : start + page._code_bytes(tier)]
        rows = codes.reshape(len(pool), 1, page.tokens, codes.shape[1] // page.tokens)
        source, target = (
            "linear" if name == "linear" else f"mma16_{which}" for name in (page.layout, layout)
        )
        packed = kv_repack(rows, TIER_BITS[tier], source, target)  # type: ignore[arg-type]
        out[:, start : start + codes.shape[1]] = packed.flatten(1)
    return out


def _check_source(
    op: str, pool: Tensor, k_pages: Tensor, table: Tensor, sequence: Tensor, slots: Tensor, pages: Tensor
) -> None:
    if not _check.checked(pool, table, sequence, slots, pages):
        return
    rows, size = table.shape[0] * table.shape[1], k_pages.shape[2]
    _check.check_range(op, "sequence", sequence, 0, rows, "B * Hkv")
    _check.check_range(op, "slots", slots, -1, table.shape[2] * size, "places * P")
    _check.check_range(op, "pages", pages, 0, pool.shape[0], "number of pages")
    _check_distinct(op, pages)
    if slots.dim() != 2 or slots.shape[:1] != sequence.shape or slots.numel() * table.shape[2] == 0:
        return
    entry = table.flatten(0, 1)[sequence.long()].gather(1, (slots.clamp(min=0) // size).long())
    entry = entry[slots >= 0]
    bad = entry[(entry < 0) | (entry >= k_pages.shape[0])]
    if bad.numel():
        entry = bad[0]
        what = "-1" if int(entry) < 0 else f"page {int(page_number(entry))} of type {int(page_type(entry))}"
        raise ValueError(
            f"{op}: slots must be in working pages, [0, N={k_pages.shape[0]}) of type 0, got {what}"
        )


def _check_distinct(op: str, pages: Tensor) -> None:
    ordered = pages.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"{op}: pages must be distinct, got {int(repeated[0])} twice")


@_namespace.fake("kv_page_write_")
def _kv_page_write_fake(pool: Tensor, k: Tensor, *_: Any, **__: Any) -> None:
    if pool.dim() != 2:
        raise RuntimeError(f"kv_page_write_: pool must have shape [pages, bytes], got {list(pool.shape)}")


@_namespace.fake("kv_retier_")
def _kv_retier_fake(pool: Tensor, k_pages: Tensor, *_: Any, **__: Any) -> None:
    if k_pages.dim() != 4:
        raise RuntimeError(f"kv_retier_: k_pages must have shape [N, Hx, P, D], got {list(k_pages.shape)}")


@_namespace.fake("kv_page_read")
def _kv_page_read_fake(
    pool: Tensor, pages: Tensor, tokens: int, D: int, *, dtype: torch.dtype, **_: Any
) -> tuple[Tensor, Tensor]:
    shape = (pages.shape[0], tokens, D)
    return pool.new_empty(shape, dtype=dtype), pool.new_empty(shape, dtype=dtype)
