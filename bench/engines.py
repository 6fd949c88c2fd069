"""flash-attn and FlashInfer beside our attention, where they are installed and there is a GPU.

Written after their documentation, **never run with them**: no machine this was written on had a GPU and
either package. Tests call it with stand-ins that have their signatures; a bench with ``--check`` holds every
peer to the float64 result before it is timed.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Call = Callable[[int], Any]
PAGE = 256  # flash-attn reads pages of multiples of it
WORKSPACE = 128 << 20  # bytes, what FlashInfer recommends


def decode(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """One new token over pages in disorder; the results are laid out as they are there.

    Args:
        q: ``[B, Hq, 1, D]``. k, v: ``[B, Hkv, S, D]``, 16 bit.
    """
    if not q.is_cuda or q.dtype == torch.float32 or k.shape[2] % PAGE:
        return {}
    found: dict[str, Call] = {}
    if find_spec("flash_attn"):
        found["flash-attn"] = flash_attn_decode(q, k, v)
    if find_spec("flashinfer"):
        found["flashinfer"] = flashinfer_decode(q, k, v)
    return found


def prefill(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """A causal prompt of batch 1, the rows the last of the keys; ``q`` ``[1, Hq, T, D]``."""
    if not q.is_cuda or q.dtype == torch.float32:
        return {}
    found: dict[str, Call] = {}
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # [1, tokens, heads, D]
    if find_spec("flash_attn"):
        attend: Any = import_module("flash_attn").flash_attn_func
        found["flash-attn"] = lambda _: attend(*turned, causal=True)
    if find_spec("flashinfer"):
        single: Any = import_module("flashinfer").single_prefill_with_kv_cache
        found["flashinfer"] = lambda _: single(*(x[0] for x in turned), causal=True)
    return found


def flash_attn_decode(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Results ``[B, 1, Hq, D]``."""
    attend: Any = import_module("flash_attn").flash_attn_with_kvcache
    keys, values, table = pages(k, v)
    lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
    query = q.transpose(1, 2).contiguous()
    return lambda _: attend(query, keys, values, cache_seqlens=lengths, block_table=table)


def flashinfer_decode(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Results ``[B, Hq, D]``; planning is not timed."""
    wrapper_of: Any = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    keys, values, table = pages(k, v)
    batch, heads = q.shape[:2]
    wrapper = wrapper_of(torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device), "NHD")
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * table.shape[1]
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=q.device)
    wrapper.plan(
        indptr, table.flatten(), last, heads, k.shape[1], q.shape[3], PAGE,
        q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    query = q[:, :, 0].contiguous()
    return lambda _: wrapper.run(query, (keys, values))


def pages(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[pages, PAGE, Hkv, D]`` and the table ``[B, pages of a sequence]`` int32."""
    batch, heads, tokens, dim = k.shape
    places = batch * tokens // PAGE
    order = torch.randperm(places, generator=torch.Generator().manual_seed(2)).to(k.device)
    made = []
    for x in (k, v):
        pool = torch.empty(places, PAGE, heads, dim, dtype=x.dtype, device=x.device)
        pool[order] = x.transpose(1, 2).reshape(places, PAGE, heads, dim)
        made.append(pool)
    return made[0], made[1], order.view(batch, -1).int()
