"""Paged keys and values as dense ones, in plain PyTorch: the specification of what a page table means."""

import torch
from torch import Tensor

from tokencomp.ops.kvquant import Layout
from tokencomp.ops.kvquant_pages import TIER_BITS, PageFormat, page_number, page_type
from tokencomp.ops.page_pools import PagePools
from tokencomp.reference.kvquant import kv_dequantize


def gather_pages(
    pool: Tensor, block_table: Tensor, quantized: PagePools | None = None, *, values: bool = False
) -> tuple[Tensor, Tensor]:
    """Dense keys (or values) ``[B, Hkv, S, D]`` of a pool ``[pages, 1 or Hkv, P, D]`` and of the quantized
    pools beside it, in the dtype of ``pool``, and which of them a page holds.

    Entry ``block_table[b, h, i]`` names the page of slots ``[i P, (i + 1) P)``; where it names no page of any
    pool there is a hole, and its rows are 0.
    """
    batch, heads, pages = block_table.shape
    entry = block_table.long()
    kind, number = page_type(entry), page_number(entry)
    there = entry >= 0
    held = there & (kind == 0) & (number < pool.shape[0])
    head = torch.arange(heads)[:, None] if pool.shape[1] > 1 else torch.zeros(heads, 1, dtype=torch.long)
    rows = pool.new_zeros(batch, heads, pages, *pool.shape[2:])
    if pool.shape[0]:
        rows = torch.where(held[..., None, None], pool[number.where(held, 0), head], rows)
    for i, blob in enumerate(() if quantized is None else quantized.pools):
        own = there & (kind == i + 1) & (number < len(blob))
        if quantized is not None and bool(own.any()):
            rows[own] = _pages_of(quantized, i, number[own], own.nonzero(), values).to(rows.dtype)
        held = held | own
    return rows.flatten(2, 3), held.repeat_interleave(pool.shape[2], dim=2)


def _pages_of(quantized: PagePools, i: int, number: Tensor, where: Tensor, values: bool) -> Tensor:
    """``[n, P, D]``: pages of pool i, whose rows are ``where[:, :2]``, in float32 as operators compute it."""
    page, blobs = quantized.formats[i], quantized.pools[i][number]
    codes, params = _sections(page, blobs)[2:] if values else _sections(page, blobs)[:2]
    tier, axis, group = (
        (page.tier_v, page.axis_v, page.group_v) if values else (page.tier_k, page.axis_k, page.group_k)
    )
    maps = (quantized.v_scale, quantized.v_bias) if values else (quantized.k_scale, quantized.k_bias)
    scale, bias = (None if m is None else m[where[:, 0], where[:, 1]][:, None] for m in maps)
    group = (page.head_dim if axis == "token" else page.tokens) if group == -1 else group
    shape = (
        (page.tokens, page.head_dim // group) if axis == "token" else (page.tokens // group, page.head_dim)
    )
    layout: Layout = "linear" if page.layout == "linear" else "mma16_v" if values else "mma16_k"
    bits = TIER_BITS[tier]
    return kv_dequantize(
        codes.reshape(len(blobs), 1, page.tokens, page.head_dim * bits // 8),
        params.view(torch.float16).reshape(len(blobs), 1, *shape, 2),
        bits,
        axis=axis,
        group=group,
        pre_scale=scale,
        pre_bias=bias,
        layout=layout,
        kind="fp8" if tier == "fp8" else "int",
        dtype=torch.float32,
    )[:, 0]


def _sections(page: PageFormat, blobs: Tensor) -> list[Tensor]:
    """K codes, K params, V codes and V params of pages, without the bytes that fill the boundaries."""
    sizes = []
    for tier, axis, group in (
        (page.tier_k, page.axis_k, page.group_k),
        (page.tier_v, page.axis_v, page.group_v),
    ):
        whole = page.head_dim if axis == "token" else page.tokens
        elements = page.tokens * page.head_dim
        sizes += [elements * TIER_BITS[tier] // 8, 4 * elements // (whole if group == -1 else group)]
    parts = [blobs[:, at : at + size] for at, size in zip(page.sections, sizes, strict=True)]
    return [part.contiguous() for part in parts]
