"""One layer's decode step over an int4 cache: paged_decode against transformers' QuantizedCache.

    PYTHONPATH=python:bench build/quantized/bin/python bench/peers/quantized_cache/step.py [--tokens N]

A layer of an 8B language model (Hq=32, Hkv=8, D=128) in bfloat16 and one new token: both store it, then
attend. ``hf`` is what a model runs: ``update`` of QuantizedCache's layer with its defaults (int4, groups of
64), which dequantizes the whole cache, then transformers' own SDPA attention. Ours keeps grids of 128
channels and the newest 64 tokens in 16 bits. Contenders take turns, and the best time of each counts.
"""

import argparse
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import interleaved_seconds
from decode_types import HKV, HQ, PAGE, D, make_store
from tokencomp import ops
from tokencomp.ops.kvquant_pages import page_entry
from torch import Tensor


def hf_step(backend: str, k: Tensor, v: Tensor, q: Tensor, new: Tensor) -> Callable[[int], Any]:
    """A layer that holds k and v; every fourth step the tokens since the prompt are forgotten."""
    from transformers import cache_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    made: Any = {"quanto": cache_utils.QuantoQuantizedLayer, "hqq": cache_utils.HQQQuantizedLayer}[backend]
    axis = {"quanto": 0, "hqq": 1}[backend]
    layer = made(nbits=4, axis_key=axis, axis_value=axis)
    layer.update(k, v)
    module = SimpleNamespace(num_key_value_groups=HQ // HKV, is_causal=True, training=False)

    def step(turn: int) -> Any:
        if turn % 4 == 0:
            layer.keys, layer.values = (torch.tensor([], dtype=k.dtype) for _ in "kv")
        keys, values = layer.update(new, new)
        return sdpa_attention_forward(module, q, keys, values, None, scaling=D**-0.5)[0]  # type: ignore[arg-type]

    return step


def our_step(k: Tensor, v: Tensor, q: Tensor, new: Tensor) -> Callable[[int], Any]:
    """Pages of int4 and an open page of 16 bits, nearly full."""
    store = make_store("int4 t128", k, v)
    tokens = k.shape[2]
    pages = torch.zeros(HKV, 2, PAGE, D, dtype=k.dtype)
    open_page = torch.tensor([page_entry(0, h) for h in range(HKV)], dtype=torch.int32).view(1, HKV, 1)
    table = torch.cat([store.table, open_page], -1)
    before = torch.full((1, HKV), tokens + PAGE - 1, dtype=torch.int32)
    keys, values = pages[:, 0:1], pages[:, 1:2]

    def step(turn: int) -> Any:
        ops.kv_append_(keys, values, new, new, table, before)
        pools = store.pools[turn % len(store.pools)]
        return ops.paged_decode(q, keys, values, table, before + 1, quantized=pools)[0]

    return step


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", type=int, default=65536, help="a multiple of 64")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=60.0, help="seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, HKV, args.tokens, D, generator=g).bfloat16() for _ in "kv")
    q, new = (torch.randn(1, heads, 1, D, generator=g).bfloat16() for heads in (HQ, HKV))
    calls = {"tokencomp": our_step(k, v, q, new)}
    calls |= {f"hf {backend}": hf_step(backend, k, v, q, new) for backend in ("quanto", "hqq")}
    with torch.no_grad():
        seconds = interleaved_seconds(calls, "cpu", repeats=40, budget=args.budget)
    for name, s in seconds.items():
        print(f"{name:12s} {s * 1e3:9.2f} ms  {s / seconds['tokencomp']:6.1f} x tokencomp")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
