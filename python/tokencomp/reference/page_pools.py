"""Keys and values of pages of all types by slot, in plain PyTorch: what a table and its pools mean."""

from typing import Literal

import torch
from torch import Tensor

from tokencomp.ops.kvquant_pages import TIER_BITS, PageFormat, page_number, page_type
from tokencomp.ops.page_pools import PagePools
from tokencomp.reference.kvquant import kv_dequantize
from tokencomp.reference.kvquant_layout import Layout

Half = Literal["k", "v"]


def pool_rows(pool: Tensor, page: PageFormat, half: Half, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[pages, P, D]``: the keys or the values of every page, before their channels' maps."""
    tier, axis, group = (getattr(page, f"{name}_{half}") for name in ("tier", "axis", "group"))
    begin, after = page.sections[:2] if half == "k" else page.sections[2:]
    tokens, dim, pages = page.tokens, page.head_dim, pool.shape[0]
    if group == -1:
        group = dim if axis == "token" else tokens
    bits = TIER_BITS[tier]
    codes = pool[:, begin : begin + tokens * dim * bits // 8].reshape(pages, 1, tokens, -1)
    params = pool[:, after : after + 4 * tokens * dim // group].contiguous().view(torch.float16)
    rows = (tokens, dim // group) if axis == "token" else (tokens // group, dim)
    layouts: dict[Half, Layout] = {"k": "mma16_k", "v": "mma16_v"}
    layout: Layout = layouts[half] if page.layout == "mma16" else "linear"
    kind: Literal["int", "fp8"] = "fp8" if tier == "fp8" else "int"
    numbers = kv_dequantize(
        codes, params.reshape(pages, 1, *rows, 2), bits,
        axis=axis, group=group, layout=layout, kind=kind, dtype=dtype,
    )  # fmt: skip
    return numbers[:, 0]


def paged_rows(
    pages: Tensor,
    block_table: Tensor,
    *,
    quantized: PagePools | None = None,
    half: Half = "k",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows ``[B, Hkv, max_pages * P, D]`` by slot, 0 where there is none; and which there are.

    Working pages are type 0 of the table's entries, pool i of ``quantized`` is type i + 1. An entry of
    another type, or a number beyond its pool, names no page. ``dtype`` is that of the rows, default that of
    ``pages``.
    """
    dtype = pages.dtype if dtype is None else dtype
    size = pages.shape[2]
    entry = block_table.repeat_interleave(size, dim=2)
    rows = torch.zeros(*entry.shape, pages.shape[3], dtype=dtype, device=pages.device)
    there = torch.zeros_like(entry, dtype=torch.bool)
    slot = torch.arange(size, device=pages.device).repeat(block_table.shape[2])
    head = torch.arange(entry.shape[1], device=pages.device)[:, None] % pages.shape[1]
    pools = [] if quantized is None else list(zip(quantized.pools, quantized.formats, strict=True))
    for kind in range(len(pools) + 1):
        count = pages.shape[0] if kind == 0 else pools[kind - 1][0].shape[0]
        own = (page_type(entry) == kind) & (page_number(entry) < count)
        there |= own
        if count == 0:
            continue
        number = torch.where(own, page_number(entry), 0).long()
        if kind == 0:
            found = pages[number, head.expand_as(number), slot.expand_as(number)].to(dtype)
        else:
            found = pool_rows(*pools[kind - 1], half, dtype=torch.promote_types(dtype, torch.float32))
            found = _through_maps(found[number, slot.expand_as(number)], quantized, half).to(dtype)
        rows = torch.where(own[..., None], found, rows)
    return rows, there


def _through_maps(y: Tensor, quantized: PagePools | None, half: Half) -> Tensor:
    """``x = y / scale + bias`` of each channel."""
    for name in ("scale", "bias"):
        values = getattr(quantized, f"{half}_{name}")
        if values is not None:
            wide = values[:, :, None].to(y.dtype)
            y = y / wide if name == "scale" else y + wide
    return y
