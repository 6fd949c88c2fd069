"""Test data of the score family: shapes, options and what is unusual about the rows, and how they become
tensors. The same cases feed the tests, opcheck, the per-ISA checks and the emulator.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from tokencomp import reference
from torch import Tensor

HEADS = ("none", "kv_sum", "kv_mean", "kv_max", "mean", "rms")
INF = float("inf")


@dataclass(frozen=True)
class Call:
    """Queries, keys, the rows' true lse, and options as the wrappers take them."""

    q: Tensor
    k: Tensor
    lse: Tensor
    sight: dict[str, Any]  # who sees whom, biases, caps: what every operator takes
    rows: dict[str, Any]  # weights, reductions and powers of column scores


@dataclass(frozen=True)
class ScoreCase:
    """One problem of attention scores."""

    B: int
    Hq: int
    Hkv: int
    T: int
    S: int
    D: int
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    bias: str = ""  # batch | head | masked (a third of the keys at -inf)
    weight: str = ""  # decay | sparse (most are 0) | head | zero
    position: str = ""  # shared (a subset, in disorder) | batch (holes too)
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    reduce: str = "sum"
    heads: str = "none"
    power: int = 1
    layout: str = ""  # hf: [B, N, H, D] transposed | sliced: rows inside wider ones, off by one element
    sharp: float = 1.0  # factor of the queries: larger, more peaked
    bad: bool = False  # NaN and infinities in some rows
    slow: bool = False

    @property
    def work(self) -> int:
        """Multiply-adds, for limits on slow back ends."""
        return self.B * self.Hq * self.T * self.S * self.D

    @property
    def name(self) -> str:
        parts = [f"{self.B}x{self.Hq}/{self.Hkv}x{self.T}x{self.S}x{self.D}", self.dtype]
        parts += ["all"] * (not self.causal) + [f"window{self.window}"] * (self.window is not None)
        parts += [f"cap{self.softcap}"] * (self.softcap is not None)
        parts += [f"{key}_{value}" for key, value in self._words() if value]
        parts += ["ragged"] * (self.lengths is not None) + ["left"] * (self.starts is not None)
        parts += [self.reduce] * (self.reduce != "sum") + [self.heads] * (self.heads != "none")
        parts += ["squared"] * (self.power == 2) + [self.layout] * bool(self.layout)
        parts += [f"sharp{self.sharp}"] * (self.sharp != 1) + ["bad"] * self.bad
        return "-".join(parts)

    def _words(self) -> list[tuple[str, str]]:
        return [("bias", self.bias), ("weight", self.weight), ("position", self.position)]

    def call(self) -> Call:
        """The tensors of the case: the same every time (seeded by its name)."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        q = (self.sharp * torch.randn(self.B, self.Hq, self.T, self.D, generator=g)).to(self._dtype)
        k = torch.randn(self.B, self.Hkv, self.S, self.D, generator=g).to(self._dtype)
        if self.bad:
            q[:, :, 0, 0], k[:, :, 0, 0], k[:, :, self.S // 2] = float("nan"), float("nan"), INF
        q, k = laid_out(q, self.layout), laid_out(k, self.layout)
        sight: dict[str, Any] = {"causal": self.causal, "scale": self.D**-0.5}
        sight |= {"window": self.window, "softcap": self.softcap}
        if self.bias:
            sight["key_bias"] = self._bias(g)
        if self.position:
            sight["q_position"] = self._position(g)
        for name, values in (("lengths", self.lengths), ("starts", self.starts)):
            if values is not None:
                sight[name] = torch.tensor(values, dtype=torch.int32)
        rows: dict[str, Any] = {"heads": self.heads, "power": self.power, "rows": self.reduce}
        if self.weight:
            rows["row_weight"] = self._weight(g)
        lse = reference.attention_lse(q, k, **sight).float()
        return Call(q, k, lse, sight, rows)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _bias(self, g: torch.Generator) -> Tensor:
        shape = (self.B, self.Hkv, self.S) if self.bias == "head" else (self.B, self.S)
        bias = torch.randn(shape, generator=g)
        if self.bias == "masked":
            bias = torch.where(torch.rand(shape, generator=g) < 0.3, -INF, bias)
        return bias

    def _position(self, g: torch.Generator) -> Tensor:
        batch = self.B if self.position == "batch" else 1
        rows = [torch.randperm(max(self.S, self.T), generator=g)[: self.T] for _ in range(batch)]
        position = torch.stack(rows).int()
        if self.position == "batch" and self.T > 2:
            position[:, 1] = -1
        return position if self.position == "batch" else position[0]

    def _weight(self, g: torch.Generator) -> Tensor:
        if self.weight == "decay":
            return torch.exp2(torch.arange(self.T) * 0.1 - 0.1 * self.T)
        if self.weight == "zero":
            return torch.zeros(self.T)
        shape = (self.B, self.Hq, self.T) if self.weight == "head" else (self.B, self.T)
        weight = torch.rand(shape, generator=g)
        return torch.where(weight < 0.7, 0.0, weight) if self.weight == "sparse" else weight


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` with the strides that ``layout`` names."""
    if layout == "hf":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        store = x.new_full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
        store[..., 3 : 3 + x.shape[-1]] = x
        return store[..., 3 : 3 + x.shape[-1]]
    return x


def _shapes() -> list[ScoreCase]:
    """Every group size, head dimension and dtype, on sizes that are nothing round; around the tiles."""
    cases = []
    for i, dim in enumerate((64, 96, 128, 192, 256)):
        for j, (hq, hkv) in enumerate(((2, 2), (4, 1), (7, 1), (8, 1))):
            cases.append(ScoreCase(1 + (i + j) % 2, hq, hkv, 19 + 8 * j, 67 + i, dim, DTYPES[(i + j) % 3]))
    sizes = [(1, 1), (1, 5), (5, 1), (7, 3), (33, 33), (64, 64), (65, 257), (100, 96), (1, 300), (3, 513)]
    cases += [ScoreCase(2, 4, 2, t, s, 32, DTYPES[i % 3]) for i, (t, s) in enumerate(sizes)]
    cases += [ScoreCase(1, 2, 1, 11, 40, d, t) for d in (1, 3, 8, 16, 17, 33, 80, 112, 250) for t in DTYPES]
    cases += [ScoreCase(1, 2, 1, 200, 700, 64, d) for d in DTYPES]
    cases += [replace(c, causal=False) for c in cases[::5]]
    cases += [ScoreCase(1, 8, 2, 256, 1024, 128, d, slow=True) for d in DTYPES]
    return cases


def _options() -> list[ScoreCase]:
    base = ScoreCase(B=2, Hq=6, Hkv=2, T=41, S=83, D=24)
    cases = [replace(base, heads=h, reduce=r, power=p) for h in HEADS for r in ("sum", "max") for p in (1, 2)]
    cases += [
        replace(base, weight=w, heads=h) for w in ("decay", "sparse", "head", "zero") for h in HEADS[:2]
    ]
    cases += [
        replace(base, weight="sparse", power=2, reduce="max"),
        replace(base, weight="head", reduce="max"),
    ]
    for dtype in DTYPES:
        one = replace(base, dtype=dtype)
        cases += [replace(one, bias=b) for b in ("batch", "head", "masked")]
        cases += [replace(one, position=p) for p in ("shared", "batch")]
        cases += [replace(one, lengths=(83, 30)), replace(one, starts=(0, 52)), replace(one, layout="hf")]
        cases += [replace(one, layout="sliced"), replace(one, window=9), replace(one, softcap=2.0)]
        cases += [replace(one, sharp=8.0), replace(one, bad=True), replace(one, bad=True, softcap=3.0)]
    cases += [replace(base, causal=False, lengths=(83, 7), starts=(80, 3), position="batch")]
    cases += [replace(base, causal=False, lengths=(0, 83)), replace(base, lengths=(60, 20), starts=(60, 10))]
    cases += [
        replace(base, bias="masked", weight="sparse", position="batch", softcap=1.5, power=2, window=50)
    ]
    cases += [replace(base, T=300, S=300, window=3, dtype="bfloat16"), replace(base, T=83, sharp=40.0)]
    cases += [replace(base, layout="hf", D=64, dtype="bfloat16"), replace(base, layout="sliced", D=128)]
    return cases


def _empty() -> list[ScoreCase]:
    base = ScoreCase(B=2, Hq=4, Hkv=2, T=5, S=9, D=16)
    return [replace(base, **change) for change in ({"B": 0}, {"T": 0}, {"S": 0}, {"T": 0, "S": 0})]


SCORE_CASES = _shapes() + _options() + _empty()


def operator_arguments(name: str, case: ScoreCase) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the operator ``name`` below its wrapper."""
    c = case.call()
    sight, rows = dict(c.sight), dict(c.rows)
    for options, key in ((sight, "key_bias"), (rows, "row_weight")):
        if key in options and options[key].dim() < 3:
            t = options[key]
            options[key] = t[None, None] if t.dim() == 1 else t[:, None].contiguous()
    if sight.get("q_position") is not None:
        sight["q_position"] = sight["q_position"].reshape(-1, case.T)
    if name == "attention_lse":
        return (c.q, c.k), sight
    if name == "column_score":
        return (c.q, c.k, c.lse), sight | rows
    if name == "diagonal_score":
        return (c.q, c.k, c.lse), sight | {key: v for key, v in rows.items() if key != "rows"}
    options = {key: v for key, v in sight.items() if key not in ("causal", "window", "q_position")}
    query = c.q[:, :, :1].sum(2) if case.T == 0 else c.q[:, :, 0]
    if name == "qk_scores":
        pages = case.layout == "" and case.D <= 128
        return (query, c.k), options | {"k_min": c.k - 0.5 if pages else None}
    scores, lse = reference.qk_scores(query, c.k, **options, dtype=torch.float32)
    if name == "head_vote":
        return (scores, lse), {"mode": "softmax_sum", "groups": case.Hkv}
    shape = (case.B, case.Hkv, case.S)
    clocks = {key: torch.zeros(shape, dtype=torch.int32) for key in ("count", "last", "interval")}
    return (torch.zeros(shape), scores, lse), {"gamma": 0.9, "step": 3, "alpha": 0.1, **clocks}
