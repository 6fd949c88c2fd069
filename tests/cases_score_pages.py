"""Test data of paged keys: pools of pages in several layouts, and tables with holes and shuffled pages."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True)
class PagesCase:
    """One decode step over paged keys."""

    B: int
    Hq: int
    Hkv: int
    D: int
    P: int
    pages: int  # of a sequence
    dtype: str = "float32"
    shared: bool = False  # a page holds all heads, and one table serves them
    layout: str = (
        ""  # slots: [pages, P, heads, D] transposed | sliced: rows inside wider ones, off by one element
    )
    holes: bool = False  # a third of the pages
    lengths: str = "head"  # head: [B, Hkv] | batch: [B] | "": all slots
    minima: bool = False
    bias: bool = False
    softcap: float | None = None
    starts: bool = False

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.B * self.Hq * self.P * self.pages * self.D

    @property
    def name(self) -> str:
        parts = [f"{self.B}x{self.Hq}/{self.Hkv}x{self.D}", f"{self.pages}x{self.P}", self.dtype]
        parts += ["shared"] * self.shared + [self.layout] * bool(self.layout) + ["holes"] * self.holes
        parts += [f"lengths_{self.lengths}"] * (self.lengths != "head") + ["minima"] * self.minima
        parts += ["bias"] * self.bias + ["cap"] * (self.softcap is not None) + ["left"] * self.starts
        return "-".join(parts)

    def call(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Queries, the pool, and the options of ``ops.qk_scores``: the same every time."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        dtype, heads = getattr(torch, self.dtype), self.Hkv if self.shared else 1
        tables = self.B * (1 if self.shared else self.Hkv)
        count = tables * self.pages + 3
        q = torch.randn(self.B, self.Hq, self.D, generator=g).to(dtype)
        pool = self._laid_out(torch.randn(count, heads, self.P, self.D, generator=g).to(dtype))
        table = torch.randperm(count, generator=g)[: tables * self.pages].int()
        table = table.view(self.B, 1 if self.shared else self.Hkv, self.pages)
        if self.holes:
            table = torch.where(torch.rand(table.shape, generator=g) < 0.3, -1, table)
        slots = self.P * self.pages
        options: dict[str, Any] = {"block_table": table.expand(-1, self.Hkv, -1), "scale": self.D**-0.5}
        if self.lengths:
            shape = (self.B, self.Hkv) if self.lengths == "head" else (self.B,)
            options["lengths"] = torch.randint(0, slots + 1, shape, generator=g).int()
        if self.minima:
            options["k_min"] = torch.empty_strided(pool.shape, pool.stride(), dtype=dtype).copy_(pool - 0.5)
        if self.bias:
            options["key_bias"] = torch.randn(self.B, self.Hkv, slots, generator=g)
        if self.starts:
            options["starts"] = torch.randint(0, slots + 1, (self.B,), generator=g).int()
        return q, pool, options | {"softcap": self.softcap}

    def arguments(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Of the operator below the wrapper."""
        q, pool, options = self.call()
        return [q, pool], options

    def _laid_out(self, pool: Tensor) -> Tensor:
        if self.layout == "slots":
            return pool.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":
            store = pool.new_full((*pool.shape[:-1], self.D + 5), float("nan"))
            store[..., 3 : 3 + self.D] = pool
            return store[..., 3 : 3 + self.D]
        return pool


def _cases() -> list[PagesCase]:
    base = PagesCase(B=2, Hq=6, Hkv=2, D=32, P=16, pages=5)
    sizes = [(1, 90), (16, 20), (8, 41), (64, 5), (128, 3), (256, 2), (1024, 1), (32, 1)]
    cases = [replace(base, P=p, pages=n, dtype=DTYPES[i % 3]) for i, (p, n) in enumerate(sizes)]
    cases += [replace(c, shared=True, layout="slots") for c in cases[::2]]
    dims = (1, 64, 80, 128, 130, 256)
    cases += [replace(base, D=d, dtype=DTYPES[i % 3], pages=9) for i, d in enumerate(dims)]
    cases += [replace(base, D=64, Hq=hq, Hkv=hkv) for hq, hkv in ((1, 1), (7, 1), (8, 8), (16, 2))]
    for dtype in DTYPES:
        one = replace(base, dtype=dtype)
        cases += [
            replace(one, holes=True),
            replace(one, layout="sliced"),
            replace(one, minima=True, holes=True),
        ]
        cases += [replace(one, minima=True, shared=True, layout="slots", D=64, lengths="batch")]
    cases += [
        replace(base, lengths="batch"),
        replace(base, lengths=""),
        replace(base, bias=True, softcap=2.0),
    ]
    cases += [replace(base, starts=True, holes=True), replace(base, pages=0), replace(base, B=0)]
    return cases


PAGES_CASES = _cases()
