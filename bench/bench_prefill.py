"""Prefill attention, dense and block-sparse, against torch itself, in one run.

    python bench/bench_prefill.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

Shapes are one layer of an 8B language model scaled to 8 query heads, causal. Sparse contenders list, beside
the diagonal, a random share of the visible 64 x 64 blocks of each head (on CUDA, where another kernel takes
them, of 128 x 64 blocks too); their peer is torch's dense attention, the time a user would otherwise pay.
GFLOP/s are of the pairs a contender computes: those seen by a row, or of the listed blocks. Contenders take
turns and the best of each counts. At 4096 tokens ``flex_attention`` takes part, compiled, causal and with the
same blocks.

Pages: the last rows of a prompt over a cache in pages of 64, its history in working pages or in int4, against
the same keys and values laid out densely.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import engines
import torch
from common import Row, command, interleaved_seconds
from tokencomp import block_lists, ops, reference
from tokencomp.ops.kvquant_pages import PageFormat, page_entry
from tokencomp.ops.page_pools import PagePools
from torch import Tensor
from torch.nn import functional

HQ, HKV, D = 8, 2, 128
BLOCK, PAGE = 64, 64
FLEX = 4096  # tokens at which flex_attention is measured: it compiles for each problem
DENSITIES = (0.25, 0.1)


@dataclass(frozen=True)
class Problem:
    """``rows`` queries at the end of ``keys`` keys."""

    rows: int
    keys: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"flash_prefill Hq={HQ} Hkv={HKV} T={self.rows} S={self.keys} D={D} {dtype}"

    @property
    def pairs(self) -> float:
        """Pairs of row and key that are visible."""
        return self.rows * (self.keys - (self.rows - 1) / 2)

    @property
    def bytes(self) -> float:
        return float((HKV * self.keys + HQ * self.rows) * 2 * D * self.dtype.itemsize)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        q = torch.randn(1, HQ, self.rows, D, generator=g)
        k, v = (torch.randn(1, HKV, self.keys, D, generator=g) for _ in range(2))
        return q.to(device, self.dtype), k.to(device, self.dtype), v.to(device, self.dtype)

    def blocks(self, density: float, block_q: int, device: str) -> Tensor:
        """``[1, HQ, M, N]`` bool: about ``density`` of the visible blocks, the diagonal among them."""
        g = torch.Generator().manual_seed(1)
        here = torch.device("cpu")
        causal = block_lists.causal_blocks(self.rows, self.keys, block_q, BLOCK, here)
        diagonal = block_lists.diagonal_blocks(self.rows, self.keys, block_q, BLOCK, here)
        others = causal & ~diagonal
        share = (density * causal.sum() - diagonal.sum()) / others.sum()
        chosen = torch.rand(1, HQ, *causal.shape, generator=g) < share
        return ((chosen & others) | diagonal).to(device)


def problems(quick: bool) -> list[Problem]:
    if quick:
        return [Problem(1024, 1024, torch.bfloat16), Problem(512, 2048, torch.bfloat16)]
    square = [Problem(n, n, torch.bfloat16) for n in (2048, 4096, 8192)]
    return [*square, Problem(512, 8192, torch.bfloat16), Problem(2048, 2048, torch.float32)]


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, keys = q.shape[2], k.shape[2]
    mask = None
    if rows != keys:  # a chunk: torch aligns its causal mask at the top left
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)


def _sparse(q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, indices: Tensor, block_q: int, _: int) -> Tensor:
    return ops.flash_prefill(q, k, v, indptr=indptr, indices=indices, block_q=block_q)[0]


def flex(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Callable[[int], Any]:
    """torch's compiled attention over the chosen blocks, below the diagonal."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    diagonal = torch.eye(chosen.shape[-1], dtype=torch.bool, device=chosen.device)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()

    # whole blocks need no look at their pairs, those on the diagonal do
    mask = BlockMask.from_kv_blocks(
        *ordered(chosen & diagonal), *ordered(chosen & ~diagonal), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=causal
    )
    compiled: Any = torch.compile(flex_attention)
    return lambda _: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


def measure(p: Problem, device: str) -> list[Row]:
    q, k, v = p.tensors(device)
    calls: dict[str, Callable[[int], Any]] = {
        "tokencomp": lambda _: ops.flash_prefill(q, k, v),
        "torch": lambda _: torch_attention(q, k, v),
    }
    flops = dict.fromkeys(calls, 4.0 * HQ * D * p.pairs)
    calls |= engines.prefill(q, k, v)
    flops |= dict.fromkeys(calls, flops["torch"])
    flexed = p.rows == p.keys == FLEX and p.dtype == torch.bfloat16
    if flexed:
        calls["flex"] = flex(q, k, v, p.blocks(1.0, BLOCK, device))
        flops["flex"] = flops["torch"]
    for density, block_q in product(DENSITIES, (64,) if device == "cpu" else (64, 128)):
        chosen = p.blocks(density, block_q, device)
        name = f"tokencomp {100 * density:.0f} % of blocks" + " of 128 rows" * (block_q == 128)
        indptr, indices = block_lists.block_mask_to_csr(chosen)
        calls[name] = partial(_sparse, q, k, v, indptr, indices, block_q)
        flops[name] = 4.0 * D * block_q * BLOCK * float(chosen.sum())
        if flexed and block_q == BLOCK:
            peer = f"flex {100 * density:.0f} % of blocks"
            calls[peer], flops[peer] = flex(q, k, v, chosen), flops[name]
    best = interleaved_seconds(calls, device, repeats=20, budget=12)
    return [
        Row("prefill", p.name, name, seconds, flops[name], p.bytes, baseline=not name.startswith("tokencomp"))
        for name, seconds in best.items()
    ]


def in_pages(k: Tensor, v: Tensor, history: int) -> dict[str, Any]:
    """Arguments of ``flash_prefill``: the first ``history`` keys in int4 pages, the rest in working ones."""
    layout = "mma16" if k.is_cuda else "linear"
    page = PageFormat("int4", "int4", PAGE, D, layout=layout)  # type: ignore[arg-type]
    places, old, device = k.shape[2] // PAGE, history // PAGE, k.device
    table = torch.arange(HKV * places, device=device).view(1, HKV, places)
    pages = {"k": k.reshape(-1, 1, PAGE, D), "v": v.reshape(-1, 1, PAGE, D), "block_table": table}
    if not old:
        return pages
    number = torch.arange(HKV * old, device=device)
    pool = torch.zeros(HKV * old, page.page_bytes, dtype=torch.uint8, device=device)
    index = torch.arange(history, device=device).view(old, PAGE).repeat(HKV, 1)
    ops.kv_page_write_(pool, k, v, number // old, index, number, page)
    table[0, :, :old] = number.view(HKV, old) + page_entry(1, 0)
    return pages | {"quantized": PagePools((pool,), (page,))}


def measure_pages(p: Problem, device: str) -> list[Row]:
    q, k, v = p.tensors(device)
    working, mixed = in_pages(k, v, 0), in_pages(k, v, p.keys - p.rows)
    calls: dict[str, Callable[[int], Any]] = {
        "dense": lambda _: ops.flash_prefill(q, k, v),
        "working pages": lambda _: ops.flash_prefill(q, **working),
        "int4 history": lambda _: ops.flash_prefill(q, **mixed),
    }
    best = interleaved_seconds(calls, device, repeats=20, budget=12)
    name, flops = p.name.replace("flash_prefill", "flash_prefill of pages"), 4.0 * HQ * D * p.pairs
    return [
        Row("prefill", name, who, seconds, flops, p.bytes, baseline=who == "dense")
        for who, seconds in best.items()
    ]


def check(p: Problem, device: str) -> None:
    """The last rows agree with float64, and dense with torch."""
    q, k, v = p.tensors(device)
    rows = slice(max(0, p.rows - 8), p.rows)
    out, lse = ops.flash_prefill(q, k, v)
    exact = reference.flash_prefill(q[:, :, rows].cpu(), k.cpu(), v.cpu())
    error = (out[:, :, rows].cpu().double() - exact[0]).abs().max().item()
    drift = (lse[:, :, rows].cpu().double() - exact[1]).abs().max().item()
    peer = (out.float() - torch_attention(q, k, v).float()).abs().max().item()
    bound = 1e-5 if p.dtype == torch.float32 else 0.05
    for name, call in engines.prefill(q, k, v).items():
        off = (call(0).view(p.rows, HQ, D).transpose(0, 1).float() - out[0].float()).abs().max().item()
        if not off < bound:
            raise SystemExit(f"{p.name}: {name} is off by {off:.3g}: not called as it should be")
    if not (error < bound and drift < 1e-5 and peer < bound):
        raise SystemExit(f"{p.name}: output error {error:.3g}, lse {drift:.3g}, off torch by {peer:.3g}")


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for p in problems(quick):
        if checked:
            check(p, device)
        measured = measure(p, device) + (measure_pages(p, device) if p.rows < p.keys else [])
        rows += measured
        times = ", ".join(f"{r.name} {r.seconds * 1e3:.3f} ms" for r in measured)
        print(f"{p.name}: {times}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__, products=True))
