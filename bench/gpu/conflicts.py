"""Small calls that run on the emulator, to count how ldmatrix and stmatrix use the banks of shared memory."""

from collections.abc import Callable
from typing import Any

import torch
from tokencomp import ops
from tokencomp.ops.kvquant_pages import PageFormat, page_entry
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

HQ, HKV, PAGE, SLOTS = 4, 1, 64, 256


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def decode(dim: int) -> Any:
    pool = half(HKV * SLOTS // PAGE, 2, PAGE, dim)
    table = torch.arange(SLOTS // PAGE, dtype=torch.int32).view(1, HKV, -1)
    lengths = torch.full((1, HKV), SLOTS, dtype=torch.int32)
    return ops.paged_decode(half(1, HQ, 1, dim), pool[:, :1], pool[:, 1:], table, lengths)


def decode_types(dim: int) -> Any:
    form = PageFormat("int4", "int4", PAGE, dim, layout="mma16")
    places = SLOTS // PAGE
    pool = torch.zeros(places, form.page_bytes, dtype=torch.uint8)
    working = half(1, 1, PAGE, dim)
    table = torch.arange(places, dtype=torch.int32).view(1, HKV, -1) + page_entry(1, 0)
    lengths = torch.full((1, HKV), SLOTS, dtype=torch.int32)
    quantized = PagePools((pool,), (form,))
    return ops.paged_decode(half(1, HQ, 1, dim), working, working, table, lengths, quantized=quantized)


def prefill(dim: int) -> Any:
    k = half(1, HKV, 96, dim)
    return ops.flash_prefill(half(1, HQ, 96, dim), k, k, q_position=None)


def score(dim: int) -> Any:
    q, k = half(1, HQ, 96, dim), half(1, HKV, 128, dim)
    lse = ops.attention_lse(q, k)
    ops.diagonal_score(q, k, lse)
    return ops.column_score(q[:, :, :32], k, lse[:, :, :32])


def every() -> dict[str, Callable[[], Any]]:
    """Calls by name."""
    found: dict[str, Callable[[], Any]] = {}
    for dim in (64, 128):
        found[f"paged_decode D={dim}"] = lambda dim=dim: decode(dim)  # type: ignore[misc]
        found[f"paged_decode, int4 pages D={dim}"] = lambda dim=dim: decode_types(dim)  # type: ignore[misc]
        found[f"flash_prefill D={dim}"] = lambda dim=dim: prefill(dim)  # type: ignore[misc]
        found[f"attention_lse, diagonal_score, column_score D={dim}"] = lambda dim=dim: score(dim)  # type: ignore[misc]
    found["flash_prefill D=256"] = lambda: prefill(256)
    x = half(1, 70, 96)
    found["kcenter_greedy C=96"] = lambda: ops.kcenter_greedy(x, 5)
    found["cosine_match C=96"] = lambda: ops.cosine_match(x[:, 0::2], x[:, 1::2])
    found["decay_linear_attention D=64"] = lambda: ops.decay_linear_attention(
        half(1, 2, 70, 64), half(1, 2, 70, 64), half(1, 2, 70, 64), torch.zeros(2)
    )
    return found
