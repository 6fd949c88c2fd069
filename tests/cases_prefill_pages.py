"""Test data of prefill over pages: working and quantized pages, heads of different lengths, padded rows."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from cases_prefill import lists_of
from tokencomp import ops
from tokencomp.ops.kvquant_pages import PageFormat, page_entry
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

# Names of formats: keys and values of two axes, groups and numbers of bits.
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"tier_k": "int4", "tier_v": "int4"},
    "fp8": {"tier_k": "fp8", "tier_v": "int8", "axis_k": "token", "group_v": 32},
    "int3": {"tier_k": "int3", "tier_v": "int2", "group_k": 16, "group_v": 16},
    "int2": {"tier_k": "int2", "tier_v": "int3", "axis_k": "token", "group_k": 32, "axis_v": "channel"},
}


@dataclass(frozen=True)
class PagedCase:
    """One prompt, or the end of one, over a paged cache."""

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    T: int = 41
    D: int = 64
    P: int = 16
    places: int = 7
    dtype: str = "float32"
    formats: tuple[str, ...] = ()  # of the pools; pages take turns, working ones among them unless ``only``
    only: bool = False
    maps: bool = False
    dv: int | None = None
    holes: bool = False
    shared: bool = False  # a page holds all heads, and one table serves them
    layout: str = ""  # slots: [pages, P, heads, D] transposed
    lengths: str = "head"  # head: [B, Hkv] | batch: [B] | "": all slots
    rows: str = ""  # position: q_position | counts: q_counts | left: q_starts and q_counts
    bias: str = ""  # batch | head
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lists: bool = False  # with columns
    block: int = 64

    @property
    def S(self) -> int:
        """Slots of a row."""
        return self.P * self.places

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return 2 * self.B * self.Hq * self.T * self.S * self.D

    @property
    def name(self) -> str:
        parts = [f"{self.B}x{self.Hq}/{self.Hkv}x{self.T}x{self.D}", f"{self.places}x{self.P}", self.dtype]
        parts += list(self.formats) + [f"v{self.dv}"] * (self.dv is not None) + [f"lengths_{self.lengths}"]
        for name in ("only", "maps", "holes", "shared", "sinks", "lists"):
            parts += [name] * getattr(self, name)
        parts += [str(p) for p in (self.layout, self.rows, self.bias) if p] + ["full"] * (not self.causal)
        parts += [f"window{self.window}"] * (self.window is not None)
        return "-".join(
            parts + [f"cap{self.softcap}"] * (self.softcap is not None) + [f"b{self.block}"] * self.lists
        )

    def call(self, page_layout: str = "linear") -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Queries, pools and options of ``ops.flash_prefill``: the same every time."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        dtype, dv = getattr(torch, self.dtype), self.dv or self.D
        tables, heads = self.B * (1 if self.shared else self.Hkv), self.Hkv if self.shared else 1
        count = tables * self.places + 3
        q = torch.randn(self.B, self.Hq, self.T, self.D, generator=g).to(dtype)
        k = self._laid_out(torch.randn(count, heads, self.P, self.D, generator=g).to(dtype))
        v = self._laid_out(torch.randn(count, heads, self.P, dv, generator=g).to(dtype))
        table = torch.randperm(count, generator=g)[: tables * self.places].int()
        table = table.view(self.B, 1 if self.shared else self.Hkv, self.places).expand(-1, self.Hkv, -1)
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        if self.formats:
            table, options["quantized"] = self._quantized(table, page_layout, g)
        if self.holes:
            table = torch.where(torch.rand(table.shape, generator=g) < 0.3, -1, table)
        options["block_table"] = table
        self._add_rows(options, g)
        if self.bias:
            shape = (self.B, self.S) if self.bias == "batch" else (self.B, self.Hkv, self.S)
            options["key_bias"] = torch.randn(shape, generator=g)
        if self.sinks:
            options["sinks"] = torch.randn(self.Hq, generator=g)
        if self.lists:
            options |= self._lists(g)
        return (q, k, v), options

    def _add_rows(self, options: dict[str, Any], g: torch.Generator) -> None:
        if self.lengths:
            shape = (self.B, self.Hkv) if self.lengths == "head" else (self.B,)
            options["lengths"] = torch.randint(self.S // 2, self.S + 1, shape, generator=g).int()
            options["lengths"].view(-1)[:1] = self.S - 1 if self.B * self.Hkv == 1 else 3
        if self.rows == "position":
            options["q_position"] = torch.randint(-1, self.S, (self.B, self.T), generator=g).int()
        if self.rows in ("counts", "left"):
            options["q_counts"] = torch.randint(0, self.T + 1, (self.B,), generator=g).int()
        if self.rows == "left":
            options["q_starts"] = self.T - options["q_counts"]

    def _quantized(self, table: Tensor, layout: str, g: torch.Generator) -> tuple[Tensor, PagePools]:
        """Pages of dense keys and values that a table then names instead of working ones."""
        slots = (self.B, self.Hkv, self.S)
        k = torch.randn(*slots, self.D, generator=g) + 3 * torch.randn(self.D, generator=g)
        v = torch.randn(*slots, self.D, generator=g)
        maps = {name: None for name in ("k_scale", "k_bias", "v_scale", "v_bias")}
        if self.maps:
            shape = (self.B, self.Hkv, self.D)
            maps = {name: torch.rand(shape, generator=g) + 0.5 for name in maps}
        formats = tuple(
            PageFormat(**FORMATS[name], tokens=self.P, head_dim=self.D, layout=layout)  # type: ignore[arg-type]
            for name in self.formats
        )
        kinds = torch.randint(int(self.only), len(formats) + 1, table.shape, generator=g)
        table, pools = table.clone(), []
        for i, page in enumerate(formats):
            where = (kinds == i + 1).nonzero()
            pool = torch.zeros(len(where) + 2, page.page_bytes, dtype=torch.uint8)
            number = torch.randperm(len(pool), generator=g)[: len(where)]
            index = (where[:, 2:] * self.P + torch.arange(self.P)).int()
            sequence = where[:, 0] * self.Hkv + where[:, 1]
            ops.kv_page_write_(pool, k, v, sequence, index, number, page, **maps)
            table[kinds == i + 1] = (number + page_entry(i + 1, 0)).int()
            pools.append(pool)
        return table, PagePools(tuple(pools), formats, **maps)  # type: ignore[arg-type]

    def _lists(self, g: torch.Generator) -> dict[str, Any]:
        rows, blocks = -(-self.T // self.block), -(-self.S // self.block)
        chosen = torch.rand(self.B, self.Hkv, rows, blocks, generator=g) < 0.5
        taken = chosen.repeat_interleave(self.block, -1)[..., : self.S]
        wanted = (torch.rand(taken.shape, generator=g) < 0.3) & ~taken
        (indptr, indices), (column_ptr, columns) = lists_of(chosen), lists_of(wanted)
        sizes = {"block_q": self.block, "block_k": self.block}
        return {"indptr": indptr, "indices": indices, "column_ptr": column_ptr, "columns": columns, **sizes}

    def _laid_out(self, pool: Tensor) -> Tensor:
        return pool.transpose(1, 2).contiguous().transpose(1, 2) if self.layout == "slots" else pool


def operator_arguments(
    case: PagedCase, page_layout: str = "linear"
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of the operator below its wrapper."""
    arguments, options = case.call(page_layout)
    options["scale"] = case.D**-0.5
    if "key_bias" in options and options["key_bias"].dim() == 2:
        options["key_bias"] = options["key_bias"][:, None].contiguous()
    quantized = options.pop("quantized", None)
    return arguments, options | ({} if quantized is None else quantized.arguments())


def _working() -> list[PagedCase]:
    base = PagedCase()
    cases = [replace(base, D=d, dtype=DTYPES[i % 3]) for i, d in enumerate((64, 96, 128, 192, 256, 33, 1))]
    cases += [
        replace(base, P=p, places=n, dtype=DTYPES[i % 3])
        for i, (p, n) in enumerate(((32, 5), (64, 3), (8, 9)))
    ]
    cases += [replace(base, T=t, places=9) for t in (1, 64, 97, 140)]
    cases += [replace(base, Hq=hq, Hkv=hkv, D=32) for hq, hkv in ((1, 1), (7, 1), (8, 8), (8, 1))]
    for dtype in DTYPES:
        one = replace(base, dtype=dtype, D=40)
        cases += [replace(one, holes=True), replace(one, shared=True, layout="slots", lengths="batch")]
        cases += [replace(one, T=37, rows=rows, dv=24) for rows in ("position", "counts", "left")]
        cases += [replace(one, bias="head", softcap=2.0, sinks=True), replace(one, window=9, bias="batch")]
        cases += [
            replace(one, lists=True, T=150, places=12),
            replace(one, lists=True, T=150, places=12, block=128),
        ]
    cases += [
        replace(base, causal=False),
        replace(base, causal=False, rows="counts"),
        replace(base, lengths=""),
    ]
    cases += [
        replace(base, places=0, lengths=""),
        replace(base, B=0),
        replace(base, T=0),
        replace(base, T=200),
    ]
    return cases


def _quantized() -> list[PagedCase]:
    base, cases = PagedCase(T=43, places=9), []
    for i, name in enumerate(FORMATS):
        one = replace(base, formats=(name,), dtype=DTYPES[i % 3], P=(16, 32, 64)[i % 3])
        cases += [
            replace(one, only=True),
            replace(one, maps=True),
            replace(one, D=128, dtype=DTYPES[(i + 1) % 3]),
        ]
        cases += [replace(one, D=256, T=20, Hq=2, Hkv=1, dtype=DTYPES[(i + 2) % 3])]
    for dtype in DTYPES:
        one = replace(base, formats=tuple(FORMATS), dtype=dtype, T=71)
        cases += [replace(one, holes=True, maps=True), replace(one, P=64, places=3, rows="left", sinks=True)]
        cases += [
            replace(one, lists=True, maps=True, P=32),
            replace(one, T=150, D=128, places=20, Hq=2, Hkv=1),
        ]
        cases += [
            replace(one, window=20, softcap=3.0, bias="head"),
            replace(one, causal=False, lengths="batch"),
        ]
    return cases


PAGED_CASES = _working() + _quantized()
