"""Test data of the decode family: shapes, options and what is unusual about pages and rows, and how they
become tensors. The same cases feed the tests, opcheck, the per-ISA checks and the emulator.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True)
class DecodeCase:
    """One decode step: ``B * Hkv`` lengths, repeated as needed from ``lengths``."""

    B: int
    Hq: int
    Hkv: int
    T: int
    lengths: tuple[int, ...]
    D: int
    dtype: str = "float32"
    P: int = 16
    Dv: int = 0  # D
    layout: str = ""  # engine: pages of all heads, [N, 2, P, Hkv, D] permuted | sliced: off by one element
    pages: str = ""  # holes: entries of no page, of another tier, beyond the pool
    lists: str = ""  # some | counted (with holes, and counts) | all | none (no entry counts)
    bias: str = ""  # head | batch | masked (a third at -inf) | expanded
    window: int | None = None
    position: str = ""  # gaps (of slots) | both (of rows too)
    softcap: float | None = None
    sinks: bool = False
    causal: bool = True
    logits: bool = False
    sharp: float = 1.0
    bad: bool = False  # NaN in some rows
    slow: bool = False

    @property
    def capacity(self) -> int:
        """Slots that a row of the block table has room for: one page more than is needed."""
        return (max(self.lengths) // self.P + 1) * self.P

    @property
    def work(self) -> int:
        """Multiply-adds, for limits on slow back ends."""
        return 2 * self.B * self.Hq * self.T * max(self.lengths) * self.D

    @property
    def name(self) -> str:
        lengths = "_".join(str(n) for n in self.lengths)
        parts = [f"{self.B}x{self.Hq}/{self.Hkv}x{self.T}x{lengths}x{self.D}", self.dtype, f"page{self.P}"]
        parts += [f"Dv{self.Dv}"] * bool(self.Dv) + [self.layout] * bool(self.layout)
        words = (
            ("pages", self.pages),
            ("lists", self.lists),
            ("bias", self.bias),
            ("position", self.position),
        )
        parts += [f"{key}_{value}" for key, value in words if value]
        parts += [f"window{self.window}"] * (self.window is not None)
        parts += [f"cap{self.softcap}"] * (self.softcap is not None) + ["sinks"] * self.sinks
        parts += ["all"] * (not self.causal) + ["logits"] * self.logits
        parts += [f"sharp{self.sharp}"] * (self.sharp != 1) + ["bad"] * self.bad
        return "-".join(parts)

    def call(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Arguments and options as the wrapper takes them: the same every time (seeded by its name)."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        q = (self.sharp * torch.randn(self.B, self.Hq, self.T, self.D, generator=g)).to(self._dtype)
        lengths = (torch.tensor(self.lengths).repeat(self.B * self.Hkv)[: self.B * self.Hkv]).int()
        lengths = lengths.view(self.B, self.Hkv)
        k, v, table = self._pages(g)
        if not self.layout and not self.pages:
            self._poison(k, v, table, lengths)
        if self.bad:
            q[:, 0, 0, 0] = float("nan")
            k[int(table[0, 0, 0]), :, 1] = float("nan")
        if self.layout == "sliced":
            q = torch.cat([q, q], -1)[..., 1 : self.D + 1]
        options: dict[str, Any] = {"scale": self.D**-0.5, "causal": self.causal, "logits_out": self.logits}
        options |= {"window": self.window, "softcap": self.softcap}
        if self.sinks:
            options["sinks"] = torch.randn(self.Hq, generator=g)
        if self.bias:
            options["key_bias"] = self._bias(g)
        options |= self._lists(g) if self.lists else {}
        options |= self._positions(g, lengths) if self.position else {}
        return (q, k, v, table, lengths), options

    def arguments(self) -> tuple[list[Tensor], dict[str, Any]]:
        """The same as the operator below the wrapper takes them."""
        positional, options = self.call()
        if self.bias == "batch":
            options["key_bias"] = options["key_bias"][:, None]
        return list(positional), options

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _pages(self, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A pool in disorder with three pages to spare; what no row owns is NaN."""
        places, dim_v = self.capacity // self.P, self.Dv or self.D
        rows = self.B if self.layout == "engine" else self.B * self.Hkv
        count = rows * places + 3
        shape = (count, self.P, self.Hkv) if self.layout == "engine" else (count, 1, self.P)
        k, v = (torch.randn(*shape, d, generator=g).to(self._dtype) for d in (self.D, dim_v))
        order = torch.randperm(count, generator=g)
        k[order[-3:]], v[order[-3:]] = float("nan"), float("nan")
        table = order[: rows * places].view(self.B, -1 if self.B else self.Hkv, places).int()
        if self.layout == "engine":
            k, v = k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
            table = table.expand(self.B, self.Hkv, places)
        if self.layout == "sliced":
            k = torch.cat([k, k, k], -1)[..., 1 : self.D + 1]
            v = torch.cat([v, v], -1)[..., 1 : dim_v + 1]
        if self.pages:
            table = table.clone()
            strays = torch.tensor([-1, 1 << 28, count, (1 << 28) - 1], dtype=torch.int32)
            table.view(-1)[::3] = strays.repeat(table.numel())[: len(table.view(-1)[::3])]
        return k, v, table

    def _poison(self, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> None:
        """What no token has written yet."""
        for b, h in torch.cartesian_prod(torch.arange(self.B), torch.arange(self.Hkv)).tolist():
            unused = torch.arange(int(lengths[b, h]), self.capacity)
            page = table[b, h, unused // self.P].long()
            k[page, 0, unused % self.P] = v[page, 0, unused % self.P] = float("nan")

    def _bias(self, g: torch.Generator) -> Tensor:
        shape = (self.B, self.Hkv, self.capacity + 3)
        bias = torch.randn(shape[::2] if self.bias == "batch" else shape, generator=g)
        if self.bias == "masked":
            bias = torch.where(torch.rand(shape, generator=g) < 0.3, -INF, bias)
        return bias[:, :1].expand(shape) if self.bias == "expanded" else bias

    def _lists(self, g: torch.Generator) -> dict[str, Any]:
        slots = self.capacity if self.lists == "all" else max(1, self.capacity // 3)
        rows = self.B * self.Hkv
        drawn = torch.stack([torch.randperm(self.capacity, generator=g)[:slots] for _ in range(rows)])
        index = drawn.sort(1).values.view(self.B, self.Hkv, slots).int()
        if self.lists in ("some", "all"):
            return {"index": index}
        index[..., 1::5] = -1
        most = 0 if self.lists == "none" else slots
        count = torch.randint(0, most + 1, (self.B, self.Hkv), generator=g).int()
        return {"index": index, "index_count": count}

    def _positions(self, g: torch.Generator, lengths: Tensor) -> dict[str, Any]:
        steps = torch.randint(1, 4, (self.B, self.Hkv, self.capacity), generator=g)
        position = steps.cumsum(2).int()
        if self.position == "gaps":
            return {"position": position}
        newest = position.gather(2, (lengths.long() - 1).clamp(min=0)[..., None]).amax(1)
        return {"position": position, "q_position": (newest + torch.arange(self.T)).int()}


def _shapes() -> list[DecodeCase]:
    """Every group size, head dimension, page size and dtype; lengths around tiles, pages and parts."""
    cases = []
    for i, dim in enumerate((64, 96, 128, 256)):
        for j, (hq, hkv) in enumerate(((2, 2), (4, 1), (7, 1), (16, 2))):
            lengths = (67 + i, 33, 128 + j)
            page, rows = (16, 32, 64)[(i + j) % 3], 1 + (i + 2 * j) % 4
            cases.append(DecodeCase(1 + i % 2, hq, hkv, rows, lengths, dim, DTYPES[(i + j) % 3], page))
    sizes = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 129, 511, 512, 513)
    cases += [DecodeCase(1, 4, 1, 1, (n,), 64, DTYPES[i % 3], 16) for i, n in enumerate(sizes)]
    cases += [DecodeCase(2, 8, 2, 1, (1100, 40, 0, 700), 128, d, 32, slow=d != "bfloat16") for d in DTYPES]
    cases += [DecodeCase(1, 2, 1, 1, (70,), d, t, 32) for d in (1, 8, 33, 80, 112, 250) for t in DTYPES]
    cases += [DecodeCase(1, 3, 1, t, (40,), 64, DTYPES[t % 3], 16) for t in range(2, 9)]
    cases += [
        DecodeCase(1, 2, 1, 2, (100,), 64, d, 64, Dv=v) for d, v in zip(DTYPES, (32, 96, 128), strict=True)
    ]
    cases += [
        DecodeCase(1, 16, 1, 8, (150,), 128, "bfloat16", 64),
        DecodeCase(1, 1, 1, 1, (90,), 256, "float16", 32),
    ]
    return cases


def _options() -> list[DecodeCase]:
    cases = []
    for dtype in DTYPES:
        one = DecodeCase(2, 6, 2, 1, (83, 40, 150, 17), 64, dtype, 32)
        many = replace(one, T=3, P=16)
        cases += [replace(one, layout=x) for x in ("engine", "sliced")] + [replace(one, pages="holes")]
        cases += [replace(c, lists=x) for c in (one, many) for x in ("some", "counted", "all", "none")]
        cases += [replace(one, bias=b) for b in ("head", "batch", "masked", "expanded")]
        for c in (one, many):
            cases += [replace(c, window=9), replace(c, window=30, position="gaps"), replace(c, causal=False)]
            cases += [replace(c, window=30, position="both"), replace(c, softcap=2.0), replace(c, sinks=True)]
            cases += [replace(c, logits=True), replace(c, logits=True, lists="counted"), replace(c, bad=True)]
        cases += [replace(one, sharp=20.0), replace(many, logits=True, window=12, bias="masked", bad=True)]
        cases += [
            replace(many, causal=False, window=20, sinks=True, softcap=3.0, lists="counted", bias="head")
        ]
        cases += [replace(one, lengths=(900, 2, 600), window=40, logits=True, D=32)]
    return cases


def _empty() -> list[DecodeCase]:
    base = DecodeCase(2, 4, 2, 2, (0, 5), 32)
    changes: list[dict[str, Any]] = [{}, {"B": 0}, {"T": 0}, {"lengths": (0,)}, {"T": 8, "lengths": (3,)}]
    changes += [{"lengths": (0,), "sinks": True, "logits": True}, {"T": 8, "lengths": (3,), "window": 2}]
    return [replace(base, **change) for change in changes]


DECODE_CASES = _shapes() + _options() + _empty()


@dataclass(frozen=True)
class StatesCase:
    """Partial states to merge."""

    S: int
    shape: tuple[int, ...]
    D: int
    dtype: str = "float32"
    empty: str = ""  # some | all: parts without keys, their values NaN
    slow: bool = False

    @property
    def work(self) -> int:
        """Elements."""
        return self.S * self.D * torch.Size(self.shape).numel()

    @property
    def name(self) -> str:
        return f"{self.S}x{'_'.join(map(str, self.shape))}x{self.D}-{self.dtype}-{self.empty or 'full'}"

    def call(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """``out`` and ``lse``."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        out = torch.randn(self.S, *self.shape, self.D, generator=g).to(getattr(torch, self.dtype))
        lse = 4 * torch.randn(self.S, *self.shape, generator=g)
        if self.empty:
            gone = torch.rand(lse.shape, generator=g) < (0.4 if self.empty == "some" else 2.0)
            lse = torch.where(
                gone, torch.where(torch.rand(lse.shape, generator=g) < 0.5, -INF, float("nan")), lse
            )
            out[gone] = float("nan")
        return (out, lse), {}

    def arguments(self) -> tuple[list[Tensor], dict[str, Any]]:
        """The operator's own arguments: the same."""
        positional, options = self.call()
        return list(positional), options


STATES_CASES = [
    StatesCase(s, shape, d, DTYPES[(i + s) % 3], empty)
    for i, (shape, d) in enumerate((((2, 4, 1), 64), ((7,), 1), ((3, 5), 33), ((1, 300), 128)))
    for s in (1, 2, 5)
    for empty in ("", "some", "all")
]
STATES_CASES += [StatesCase(0, (3,), 4), StatesCase(2, (0, 3), 4), StatesCase(2, (3,), 0)]
