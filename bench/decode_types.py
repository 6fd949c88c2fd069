"""The part of bench_decode.py about quantized pages: what is stored, and who reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_kvquant import plain_quantize
from common import Row, interleaved_seconds, rotating
from tokencomp import ops
from tokencomp.ops.kvquant_pages import PageFormat, page_entry
from tokencomp.ops.page_pools import PagePools
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

HQ, HKV, D, PAGE = 32, 8, 128, 64

# name -> tiers, axes and groups of keys and values, and the share of pages that stay in 16 bits
STORES: dict[str, tuple[tuple[Any, ...], float]] = {
    "int8 t128": (("int8", "int8", "token", "token", 128, 128), 0.0),
    "int4 t128": (("int4", "int4", "token", "token", 128, 128), 0.0),
    "int4 c64 t128": (("int4", "int4", "channel", "token", 64, 128), 0.0),
    "int2 t128": (("int2", "int2", "token", "token", 128, 128), 0.0),
    "int2 c64 t128": (("int2", "int2", "channel", "token", 64, 128), 0.0),
    "int2 KIVI c32 t32": (("int2", "int2", "channel", "token", 32, 32), 0.0),
    "MiKV 20% 16 bit, int2 t64": (("int2", "int2", "token", "token", 64, 64), 0.2),
}


@dataclass(frozen=True)
class Store:
    """Pages of a row in disorder, some of them working pages; two copies where caches would hold one."""

    pool: Tensor  # [pages, 2, P, D]
    pools: list[PagePools]
    table: Tensor
    bytes: float


def make_store(name: str, k: Tensor, v: Tensor) -> Store:
    (tier_k, tier_v, axis_k, axis_v, group_k, group_v), share = STORES[name]
    layout = "mma16" if k.is_cuda else "linear"
    page = PageFormat(tier_k, tier_v, PAGE, D, axis_k, axis_v, group_k, group_v, layout)  # type: ignore[arg-type]
    tokens = k.shape[2]
    slots = torch.arange(tokens, device=k.device).view(-1, PAGE)
    places, g = len(slots), torch.Generator().manual_seed(1)
    working = torch.rand(HKV, places, generator=g) < share
    table = torch.zeros(1, HKV, places, dtype=torch.int32)
    for kind in (0, 1):
        own = working if kind == 0 else ~working
        table[0, own] = torch.randperm(int(own.sum()), generator=g).int() | page_entry(kind, 0)
    table, working = table.to(k.device), working.to(k.device)
    heads, place = (~working).nonzero().T
    pool = torch.zeros(len(heads), page.page_bytes, dtype=torch.uint8, device=k.device)
    number = (table[0, heads, place] & (page_entry(1, 0) - 1)).int()
    ops.kv_page_write_(pool, k, v, heads, slots[place], number, page)
    rest = torch.zeros(max(1, int(working.sum())), 2, PAGE, D, dtype=k.dtype, device=k.device)
    for i, x in enumerate((k, v)):
        rest[table[0][working].long(), i] = x.view(HKV, places, PAGE, D)[working]
    size = float(pool.numel()) + rest.numel() * rest.element_size() * bool(share)
    return Store(rest, [PagePools((copy,), (page,)) for copy in rotating(pool)], table, size)


def reads(q: Tensor, s: Store, lengths: Tensor, turn: int) -> Tensor:
    k, v = s.pool[:, 0:1], s.pool[:, 1:2]
    return ops.paged_decode(q, k, v, s.table, lengths, quantized=s.pools[turn % len(s.pools)])[0]


def plain_dequantize(packed: Tensor, params: Tensor, dtype: torch.dtype) -> Tensor:
    """As quanto has it: unpack all, then scale and shift in the model's dtype, groups of 64 channels."""
    b, h, s, _ = packed.shape
    codes = torch.stack([packed & 15, packed >> 4], -1).view(b, h, s, -1, 64)
    step, low = params.to(dtype).unbind(-1)
    return (codes.to(dtype) * step + low).view(b, h, s, -1)


def dequantized(k: Tensor, v: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """HF's QuantizedCache in int4: everything is dequantized, then attended to."""
    ours = [ops.kv_quantize(x, 4, group=64) for x in (k, v)]
    plain = [plain_quantize(x, 4, "token", 64) for x in (k, v)]

    def fast(q: Tensor) -> Any:
        keys, values = (ops.kv_dequantize(*x, 4, group=64, dtype=q.dtype) for x in ours)
        return sdpa(q, keys, values, enable_gqa=True)

    def slow(q: Tensor) -> Any:
        keys, values = (plain_dequantize(*x, q.dtype) for x in plain)
        return sdpa(q, keys, values, enable_gqa=True)

    return {"int4: kv_dequantize, sdpa": fast, "int4: PyTorch dequantize, sdpa": slow}


def _alone(call: Callable[[Tensor], Any], q: Tensor, _turn: int) -> Any:
    return call(q)


def measure(device: str, *, quick: bool = False, peers: bool = True) -> list[Row]:
    tokens = 8192 if quick else 65536
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, HKV, tokens, D, generator=g).to(torch.bfloat16).to(device) for _ in "kv")
    q = torch.randn(1, HQ, 1, D, generator=g).to(torch.bfloat16).to(device)
    lengths = torch.full((1, HKV), tokens, dtype=torch.int32, device=device)
    order = torch.randperm(HKV * tokens // PAGE, generator=g).to(device)
    pool = torch.stack([x.view(-1, PAGE, D)[order.argsort()] for x in (k, v)], 1)
    table = order.view(1, HKV, -1).int()
    in_order = torch.arange(order.numel(), device=device).view(1, HKV, -1).int()
    stores = {name: make_store(name, k, v) for name in STORES}
    calls: dict[str, Callable[[int], Any]] = {
        "16 bit": lambda _: ops.paged_decode(q, pool[:, 0:1], pool[:, 1:2], table, lengths),
        "16 bit, pages in order": lambda _: ops.paged_decode(
            q, pool[:, 0:1], pool[:, 1:2], in_order, lengths
        ),
        "read": lambda _: pool.view(torch.int32).max(),
    }
    size = dict.fromkeys(calls, float(pool.numel() * 2))
    for name, store in stores.items():
        calls[name] = partial(reads, q, store, lengths)
        size[name] = store.bytes
    seconds = interleaved_seconds(calls, device, repeats=60, budget=20)
    if peers:
        others: dict[str, Callable[[int], Any]] = {
            name: partial(_alone, call, q) for name, call in dequantized(k, v).items()
        }
        seconds |= interleaved_seconds(others, device, repeats=5, budget=5)
        size |= dict.fromkeys(others, stores["int4 t128"].bytes)
    case = f"paged_decode by page type Hq={HQ} Hkv={HKV} S={tokens} D={D} P={PAGE} bfloat16"
    flops, baselines = (
        4.0 * HQ * tokens * D,
        ("16 bit", "read", *(n for n in seconds if n.startswith("int4:"))),
    )
    return [
        Row("decode", case, n, s, 0.0 if n == "read" else flops, size[n], n in baselines)
        for n, s in seconds.items()
    ]
