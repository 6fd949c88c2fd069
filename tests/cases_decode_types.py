"""Decode steps over pages of several types in one table, as data for the tests, opcheck, the per-ISA checks
and the emulator. Which type a page has, and where it lies, is drawn page by page.
"""

import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from tokencomp import ops
from tokencomp.ops.kvquant_pages import PageFormat, page_entry
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

INF = float("inf")


def parsed(text: str, P: int, D: int, layout: str) -> PageFormat:
    """``int4c+int2t32``: keys in int4 by channel over the page, values in int2 by 32 channels of a token."""
    halves = [re.fullmatch(r"(fp8|int[2348])([ct])(\d*)", half) for half in text.split("+")]
    (tier_k, axis_k, group_k), (tier_v, axis_v, group_v) = (half.groups() for half in halves if half)
    axes: Any = {"c": "channel", "t": "token"}
    groups = [int(group or -1) for group in (group_k, group_v)]
    kinds: Any = (tier_k, tier_v, layout)
    return PageFormat(kinds[0], kinds[1], P, D, axes[axis_k], axes[axis_v], *groups, layout=kinds[2])


@dataclass(frozen=True)
class TypesCase:
    """One decode step: ``B * Hkv`` lengths, repeated as needed from ``lengths``; pools in order of types."""

    formats: tuple[str, ...]
    B: int
    Hq: int
    Hkv: int
    T: int
    lengths: tuple[int, ...]
    D: int
    dtype: str = "float32"
    P: int = 32
    tail: str = "working"  # any: the last page of a row may be quantized too, partly filled
    working: bool = True  # pages that are not quantized, besides the last
    maps: str = ""  # k_scale, k_bias, v_scale, v_bias
    holes: bool = False  # entries of no page: -1, of no pool, beyond a pool
    lists: str = ""  # some | counted (with holes, and counts)
    bias: str = ""  # head | masked (a third at -inf)
    window: int | None = None
    position: bool = False  # gaps
    softcap: float | None = None
    sinks: bool = False
    causal: bool = True
    logits: bool = False
    offset: float = 0.0  # of some channels of the keys
    layout: str = "linear"
    slow: bool = False

    @property
    def places(self) -> int:
        return max(self.lengths) // self.P + 1

    @property
    def work(self) -> int:
        """Multiply-adds, for limits on slow back ends."""
        return 2 * self.B * self.Hq * self.T * max(self.lengths) * self.D

    @property
    def name(self) -> str:
        lengths = "_".join(str(n) for n in self.lengths)
        size = f"{self.B}x{self.Hq}/{self.Hkv}x{self.T}x{lengths}x{self.D}"
        parts = ["|".join(self.formats), size, self.dtype, f"page{self.P}"]
        words = {"tail": self.tail.replace("working", ""), "maps": self.maps.replace(" ", "+"),
                 "lists": self.lists, "bias": self.bias}  # fmt: skip
        parts += [f"{key}_{value}" for key, value in words.items() if value]
        parts += ["quantized"] * (not self.working) + ["holes"] * self.holes + ["sinks"] * self.sinks
        parts += [f"window{self.window}"] * (self.window is not None) + ["position"] * self.position
        parts += [f"cap{self.softcap}"] * (self.softcap is not None) + ["all"] * (not self.causal)
        parts += ["logits"] * self.logits + [f"offset{self.offset}"] * bool(self.offset)
        return "-".join(parts)

    def on(self, backend: str) -> "TypesCase":
        """The same data in the layout that a back end reads."""
        return replace(self, layout="linear" if backend == "cpu" else "mma16")

    def call(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Arguments and options as the wrapper takes them: the same every time (seeded by its name)."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        dtype = getattr(torch, self.dtype)
        q = torch.randn(self.B, self.Hq, self.T, self.D, generator=g).to(dtype)
        rows = self.B * self.Hkv
        lengths = torch.tensor(self.lengths).repeat(rows)[:rows].view(self.B, self.Hkv).int()
        shape = (self.B, self.Hkv, self.places * self.P, self.D)
        k, v = (torch.randn(shape, generator=g) for _ in "kv")
        k[..., :: max(1, self.D // 5)] += self.offset
        k, v = k.to(dtype), v.to(dtype)
        maps = {name: torch.rand(self.B, self.Hkv, self.D, generator=g) + 0.5 for name in self.maps.split()}
        k_pages, v_pages, table, quantized = self._store(k, v, lengths, maps, g)
        options: dict[str, Any] = {"scale": self.D**-0.5, "causal": self.causal, "logits_out": self.logits}
        options |= {"window": self.window, "softcap": self.softcap, "quantized": quantized}
        options |= self._sides(g)
        return (q, k_pages, v_pages, table, lengths), options

    def arguments(self) -> tuple[list[Tensor], dict[str, Any]]:
        """The same as the operator below the wrapper takes them."""
        positional, options = self.call()
        return list(positional), options | options.pop("quantized").arguments()

    def types(self, lengths: Tensor, g: torch.Generator) -> Tensor:
        """``[B, Hkv, places]``: 0 working, else the number of the pool, counted from 1."""
        low = 0 if self.working else 1
        drawn = torch.randint(low, len(self.formats) + 1, (self.B, self.Hkv, self.places), generator=g)
        last = (lengths.long() - 1).clamp(min=0)[..., None] // self.P
        if self.tail == "working":
            drawn.scatter_(2, last, 0)
        return drawn

    def _store(
        self, k: Tensor, v: Tensor, lengths: Tensor, maps: dict[str, Tensor], g: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, PagePools]:
        """Every page where its type says, in disorder; what nobody owns or wrote is NaN."""
        types = self.types(lengths, g)
        table = torch.full(types.shape, -1, dtype=torch.int32)
        pools: list[Tensor] = []
        formats = tuple(parsed(text, self.P, self.D, self.layout) for text in self.formats)
        unused = torch.arange(k.shape[2]) >= lengths[..., None]
        own = k.masked_fill(unused[..., None], torch.nan), v.masked_fill(unused[..., None], torch.nan)
        k_pages, v_pages = (self._working(x, types, table, g) for x in own)
        for kind, page in enumerate(formats, 1):
            where = (types == kind).nonzero()
            total = len(where) + 3
            pool = torch.full((total, page.page_bytes), 255, dtype=torch.uint8)
            number = torch.randperm(total, generator=g)[: len(where)]
            slots = where[:, 2:] * self.P + torch.arange(self.P)
            index = torch.where(slots < lengths[where[:, 0], where[:, 1]][:, None], slots, -1)
            sequence = where[:, 0] * self.Hkv + where[:, 1]
            ops.kv_page_write_(pool, k, v, sequence, index, number, page, **maps)
            table[tuple(where.T)] = (page_entry(kind, 0) | number).int()
            pools.append(pool)
        if self.holes:
            strays = [-1, 5, page_entry(0, len(k_pages)), page_entry(1, len(pools[0]))]
            strays[1] = page_entry(len(pools) + 1, 0) if len(pools) < 7 else page_entry(7, len(pools[6]))
            flat = table.view(-1)[::5]
            flat[:] = torch.tensor(strays, dtype=torch.int32).repeat(len(flat))[: len(flat)]
        return k_pages, v_pages, table, PagePools(tuple(pools), formats, **maps)

    def _working(self, x: Tensor, types: Tensor, table: Tensor, g: torch.Generator) -> Tensor:
        """The pool of working pages; their numbers are those of the keys, which come first."""
        where = (types == 0).nonzero()
        if not bool((table[types == 0] >= 0).any()):
            table[tuple(where.T)] = torch.randperm(len(where) + 3, generator=g)[: len(where)].int()
        pages = x.new_full((len(where) + 3, 1, self.P, self.D), torch.nan)
        tiles = x.view(*x.shape[:2], self.places, self.P, self.D)
        pages[table[tuple(where.T)].long(), 0] = tiles[tuple(where.T)]
        return pages

    def _sides(self, g: torch.Generator) -> dict[str, Any]:
        slots, shape = self.places * self.P, (self.B, self.Hkv)
        options: dict[str, Any] = {}
        if self.sinks:
            options["sinks"] = torch.randn(self.Hq, generator=g)
        if self.bias:
            bias = torch.randn(*shape, slots + 3, generator=g)
            hidden = torch.rand(bias.shape, generator=g) < 0.3
            options["key_bias"] = torch.where(hidden, -INF, bias) if self.bias == "masked" else bias
        if self.position:
            options["position"] = torch.randint(1, 4, (*shape, slots), generator=g).cumsum(2).int()
        if self.lists:
            drawn = torch.rand(*shape, slots, generator=g).argsort(2)[..., : max(1, slots // 3)]
            index = drawn.sort(2).values.int()
            if self.lists == "counted":
                index[..., 1::5] = -1
                options["index_count"] = torch.randint(0, index.shape[2] + 1, shape, generator=g).int()
            options["index"] = index
        return options


EVERY = ("fp8c+int8t", "int8t+fp8t64", "int4c+int2t32", "int3t+int4t", "int2t32+int3c", "int4t64+int4c16")
SEVEN = ("int4c+int4t", "int4t+int4t", "int2c32+int2t32", "int8c+int2t", "fp8t+fp8t", "int3c+int3t64",
         "int8t+int8c")  # fmt: skip
SHARED = ("k_scale k_bias v_scale v_bias", "k_scale", "v_bias", "k_bias v_scale")


def _shapes() -> list[TypesCase]:
    """Group sizes, query rows, head dimensions, page sizes, dtypes; lengths around pages and parts."""
    cases = []
    for i, (hq, hkv) in enumerate(((2, 2), (4, 1), (7, 1), (16, 2), (16, 1))):
        for j, (dim, page) in enumerate(((64, 16), (128, 32), (256, 64))):
            formats = tuple(text.replace("c32", "c16") if page == 16 else text for text in EVERY)
            lengths = (3 * page + 1, 5 * page, 7 * page + 9)
            rows, dtype, tail = 1 + (3 * i + j) % 8, DTYPES[(i + j) % 3], "any" if j == 1 else "working"
            cases.append(TypesCase(formats, 1, hq, hkv, rows, lengths, dim, dtype, page, tail))
    base = TypesCase(SEVEN, 2, 8, 2, 1, (400, 129, 0, 33), 128, P=64)
    cases += [replace(base, dtype=dtype, P=page) for dtype in DTYPES for page in (32, 64)]
    cases += [replace(base, lengths=(1100, 40, 513, 700), dtype=d, slow=d != "bfloat16") for d in DTYPES]
    cases += [replace(base, B=1, lengths=(1, 65, 64, 63), dtype=d, tail="any") for d in DTYPES]
    return cases


def _options() -> list[TypesCase]:
    cases = []
    for dtype in DTYPES:
        one = TypesCase(
            ("int4c+int2t32", "int8t+int2c", "fp8c+int4t"), 2, 6, 2, 1, (83, 40, 150, 17), 64, dtype
        )
        many = replace(one, T=3, P=16)
        for case in (one, many):
            cases += [replace(case, maps=maps) for maps in SHARED] + [replace(case, holes=True)]
            cases += [replace(case, lists=x, tail="any", logits=True) for x in ("some", "counted")]
            cases += [replace(case, window=20), replace(case, window=30, position=True, causal=False)]
            cases += [replace(case, bias="masked", logits=True), replace(case, softcap=2.0, sinks=True)]
        cases += [replace(one, bias="head"), replace(one, lists="counted", maps=SHARED[0], softcap=3.0)]
        cases += [replace(one, working=False), replace(one, working=False, tail="any", offset=8.0)]
        cases += [replace(many, offset=8.0, maps="k_scale k_bias", window=25, logits=True, sinks=True)]
        cases += [replace(one, formats=(text,), lengths=(200,), Hq=4, Hkv=1, D=128) for text in EVERY]
    return cases


def _linear() -> list[TypesCase]:
    """Head dimensions and groups that only the layout ``linear`` holds."""
    base = TypesCase(
        ("int4c+int4t", "int2t20+int8t16", "int3c4+int2c2", "fp8t5+int4t40"), 1, 4, 2, 2, (90, 55), 80
    )
    cases = [replace(base, dtype=dtype, tail="any", maps=SHARED[0]) for dtype in DTYPES]
    cases += [replace(base, dtype=dtype, T=1, P=16, lists="counted") for dtype in DTYPES]
    cases += [
        replace(base, D=8, formats=("int3t4+int2t1", "int8c+int4c8")),
        replace(base, D=1, formats=("int8t+fp8c",)),
    ]
    cases += [
        replace(base, D=d, formats=("int4t+int2c", "int3c+int8t"), dtype=t) for d in (40, 200) for t in DTYPES
    ]
    return cases


TYPES_CASES, LINEAR_CASES = _shapes() + _options(), _linear()
