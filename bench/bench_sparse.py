"""Decode steps that choose what they read, and those that read what was chosen, against dense ones.

    python bench/bench_sparse.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

One layer of an 8B language model (Hq=32, Hkv=8, D=128, bfloat16), one new token, some 2048 slots read. A
row is the whole step of the layer as the cache makes it: the method's choice, its tables, and the
attention. ``dense`` reads everything. ``chooses``: the step makes its list; ``reuses``: it takes one over,
as TokenSelect does between similar queries and TidalDecode in most layers; ``8 steps``: one choice and
seven steps that reuse it, per step. ``read`` is the attention to a given list alone. Steps take turns and
the best time counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import Row, command, interleaved_seconds
from tokencomp import methods, ops
from tokencomp.cache import Forward, LayerStore, Pool, Reader, Rule, page_size
from torch import Tensor

HQ, HKV, D, LISTED = 32, 8, 128, 2048
RULE = Rule(D**-0.5)

CHOOSES: dict[str, Any] = {
    "TokenSelect": methods.TokenSelect(k=1408, sinks=128, recent=512, theta=None),
    "Quest": methods.Quest(k=LISTED),
    "Quest, list a query head": methods.Quest(k=LISTED, share="q"),
    "InfLLM": methods.InfLLM(blocks=11, sinks=128, recent=512),
    "Twilight(Quest 8192)": methods.Twilight(methods.Quest(k=8192), p=0.85),
    "Twilight alone": methods.Twilight(p=0.05),
    "DuoAttention, all stream": methods.DuoAttention(sinks=128, recent=1920),
    "DuoAttention, half stream": methods.DuoAttention(gates=((1.0, 0.0) * 4,) * 32, sinks=128, recent=1920),
}


@dataclass(frozen=True)
class Layer:
    """A layer with ``keys`` tokens in pages."""

    store: LayerStore
    q: Tensor
    index: Tensor

    @property
    def what(self) -> Forward:
        seen = np.full(1, self.store.size, np.int32)
        return Forward(1, True, seen, seen.tolist(), None, None, 1)


def layer(keys: int, device: str) -> Layer:
    g = torch.Generator().manual_seed(0)
    pool = Pool(page_size(torch.device(device)), D, D, torch.bfloat16, torch.device(device))
    store = LayerStore(pool, 1, HKV, {})
    k, v = (torch.randn(1, HKV, keys, D, generator=g).to(device, torch.bfloat16) for _ in range(2))
    store.append(k, v)
    q = torch.randn(1, HQ, 1, D, generator=g).to(device, torch.bfloat16)
    listed = torch.stack([torch.randperm(keys, generator=g)[:LISTED] for _ in range(HKV)])
    return Layer(store, q, listed.sort(1).values[None].int().to(device))


def step(
    at: Layer, method: Any, index: int = 5, shared: dict[str, Any] | None = None
) -> Callable[[int], Any]:
    reader = Reader(method, index, 32, {} if shared is None else shared)
    return lambda _: reader.step(at.store, at.q, at.what, RULE, False)


def over_eight(at: Layer) -> Callable[[int], Any]:
    """One choice of TokenSelect, then seven steps that keep it."""
    reader = Reader(methods.TokenSelect(k=1408, sinks=128, recent=512), 5, 32, {})

    def steps(_: int) -> None:
        reader.scratch.clear()
        for _ in range(8):
            reader.step(at.store, at.q, at.what, RULE, False)

    return steps


def measure(keys: int, device: str) -> list[Row]:
    at, shared = layer(keys, device), dict[str, Any]()
    tidal = methods.TidalDecode(k=LISTED)
    pool, store = at.store.pool, at.store
    calls: dict[str, Callable[[int], Any]] = {
        "dense": lambda _: store.decode(at.q, scale=RULE.scale, softcap=None, sinks=None, logits=False),
        "read": lambda _: ops.paged_decode(
            at.q, pool.k_pages, pool.v_pages, store.rows.table, store.lengths, index=at.index
        ),
        **{f"{name}: chooses": step(at, method) for name, method in CHOOSES.items()},
        "TidalDecode: chooses": step(at, tidal, tidal.first, shared),
        "TidalDecode: reuses": step(at, tidal, tidal.first + 1, shared),
        "TokenSelect: reuses": step(at, methods.TokenSelect(k=1408, sinks=128, recent=512)),
        "TokenSelect: 8 steps": over_eight(at),
    }
    seconds = interleaved_seconds(calls, device, repeats=40, budget=20.0)
    seconds["TokenSelect: 8 steps"] /= 8
    case = f"step B=1 Hq={HQ} Hkv={HKV} S={keys} D={D} read {LISTED} bfloat16"
    size = 4.0 * HKV * keys * D
    flops = 4.0 * HQ * keys * D
    return [Row("sparse", case, name, s, flops, size, name == "dense") for name, s in seconds.items()]


def check(keys: int, device: str) -> None:
    """A list of all slots is the dense step to the bit."""
    at = layer(keys, device)
    pool, store = at.store.pool, at.store
    every = torch.arange(keys, dtype=torch.int32, device=device).expand(1, HKV, -1).contiguous()
    found = ops.paged_decode(at.q, pool.k_pages, pool.v_pages, store.rows.table, store.lengths, index=every)[
        0
    ]
    dense = store.decode(at.q, scale=RULE.scale, softcap=None, sinks=None, logits=False).output
    worst = (found.float() - dense.float()).abs().max().item()
    if worst > 2**-7 * dense.float().abs().max().item():
        raise SystemExit(f"S={keys}: a list of all slots is off by {worst:.3g}")


@torch.no_grad()
def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for keys in (4096,) if quick else (8192, 32768):
        if checked:
            check(keys, device)
        rows += measure(keys, device)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
