"""Methods that quantize the KV cache for the tests: small instances of each, and what a trace tells."""

from collections.abc import Iterator
from typing import Any

import torch
from kv_methods import random_qkv
from tokencomp.methods import (
    A2SF,
    KIVI,
    QAQ,
    KVTuner,
    MiKV,
    QServe,
    SnapKV,
    Tiered,
    Uniform,
    ZipCache,
    ZipVL,
)
from tokencomp.reference.kv_policy import Trace, run_policy

PROMPT, STEPS, PAGE = 64, 18, 4
SMALL: dict[str, Any] = {"every": 4, "sinks": 2, "recent": 9}
NOTHING: dict[str, Any] = {"sinks": 0, "recent": 0, "edges": 0}  # protected
INNER = SMALL | {"edges": 0}  # the tests' one layer is at both edges

# Every method, small enough for 64 prompt tokens and some decode steps.
QUANT_METHODS: dict[str, Any] = {
    "uniform": Uniform(4, **SMALL),
    "uniform-8": Uniform(8, 4, **SMALL),
    "uniform-edges": Uniform(2, **SMALL),
    "uniform-rotated": Uniform(2, k_axis="token", rotate="both", **INNER),
    "uniform-keys-rotated": Uniform(3, k_axis="token", k_group=8, rotate="keys", **INNER),
    "uniform-centered": Uniform(2, k_axis="token", center=True, balance=True, **INNER),
    "kivi": KIVI(**INNER),
    "kivi-4": KIVI(4, group=8, **INNER),
    "qserve": QServe(**SMALL),
    "mikv": MiKV(0.3, group=8, **INNER),
    "mikv-each-step": MiKV(0.3, group=8, balance=False, **INNER | {"every": 1}),
    "mikv-int8": MiKV(0.5, high=8, **INNER),
    "mikv-edges": MiKV(0.5, high=8, **SMALL),
    "zipcache": ZipCache(**INNER),
    "zipcache-code": ZipCache(norm="rows_all", k_axis="token", ratio=0.7, **INNER | {"every": 1}),
    "zipvl": ZipVL(tau=0.7, **INNER),
    "zipvl-none": ZipVL(tau=0.5, norm="none", **SMALL),
    "kvtuner": KVTuner(((8, 4),), **SMALL),
    "qaq": QAQ(error=0.3, high=8, **INNER),
    "qaq-edges": QAQ(error=0.3, **SMALL),
    "tiered": Tiered(**INNER),
    "tiered-snapkv": Tiered(
        SnapKV(1.0, window=4), {16: 0.2, 8: 0.2, 3: 0.3}, group=8, **INNER | {"recent": 20}
    ),
    "tiered-count": Tiered(A2SF(1.0), {4: 0.5, 2: 0.5}, 48, **INNER),
    "tiered-share": Tiered(A2SF(1.0), {8: 0.6, "evict": 0.4}, 0.5, **SMALL),
    "tiered-evicts": Tiered(A2SF(1.0), {16: 0.4, "evict": 0.6}, **SMALL),
}
PROBED = {"zipcache", "zipcache-code", "zipvl", "zipvl-none"}  # probes are drawn of each forward


def run(method: Any, *sides: Any, **options: Any) -> Trace:
    """One layer of two kv heads and 16 channels over a prompt and decode steps."""
    method = QUANT_METHODS[method] if isinstance(method, str) else method
    given = sides or random_qkv(tokens=PROMPT + STEPS, dim=16)
    return run_policy(method, *given, **{"chunks": [PROMPT], "page": PAGE} | options)


def rows(trace: Trace, forward: int = -1) -> Iterator[dict[int, int]]:
    """Of each row after a forward, the page type of each position held."""
    for held, kinds in zip(trace.held[forward], trace.kinds[forward], strict=True):
        yield from (dict(zip(*row, strict=True)) for row in zip(held, kinds, strict=True))


def uncompressed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, is_causal=True)
