"""Cases of token maps and merges as data."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from cases_merge import LAYOUTS, Call, generator, laid_out, name_of, spoil, tokens

ORDERS = ("tome", "index", "similarity", "position")
MODES = ("mean", "sum", "amax", "drop", "mlerp")


@dataclass(frozen=True)
class MapCase:
    """One call of ``bipartite_map``."""

    B: int
    N: int
    r: int
    prefix: int = 1
    distill: bool = False
    order: str = "tome"
    lists: tuple[int, int, int] | None = None  # lengths of a_tokens, b_tokens, rest_tokens
    ties: bool = False
    holes: float = 0.0  # share of rows without a column
    slow: bool = False

    @property
    def name(self) -> str:
        return name_of(self)

    @property
    def work(self) -> int:
        return self.B * self.N * 4000

    def inputs(self) -> Call:
        g = generator(self.name)
        ra, rb, rr = self.lists or ((self.N + 1) // 2, self.N // 2, 0)
        value = torch.rand(self.B, ra, generator=g)
        value = (4 * value).round() if self.ties else value
        index = torch.randint(0, max(rb, 1), (self.B, ra), generator=g, dtype=torch.int32)
        hole = (torch.rand(self.B, ra, generator=g) < self.holes) | (rb == 0)
        value, index = value.masked_fill(hole, float("-inf")), index.masked_fill(hole, -1)
        if self.holes and ra:
            value[:, 0] = float("nan")
        options: dict[str, Any] = {"prefix": self.prefix, "distill": self.distill, "order": self.order}
        if self.lists:
            mixed = torch.stack([torch.randperm(self.N, generator=g) for _ in range(self.B)]).to(torch.int32)
            options["a_tokens"], options["b_tokens"] = (
                mixed[:, :ra].contiguous(),
                mixed[:, ra : ra + rb].contiguous(),
            )
            if rr:
                options["rest_tokens"] = mixed[:, ra + rb : ra + rb + rr].contiguous()
        return Call((value, index, self.r, self.N), options)


def _map_cases() -> list[MapCase]:
    cases = [
        MapCase(2, n, r, prefix=p) for n in (1, 2, 5, 16, 197) for r in (0, 1, 16, 1000) for p in (0, 1, 2, 5)
    ]
    base = MapCase(3, 61, 13)
    cases += [
        replace(base, order=o, prefix=p, ties=t) for o in ORDERS for p in (0, 1, 5) for t in (False, True)
    ]
    cases += [replace(base, distill=True, order=o) for o in ORDERS]
    cases += [replace(base, holes=h, order=o) for h in (0.5, 1.0) for o in ORDERS]
    for o in ORDERS:
        cases += [
            replace(base, lists=lists, order=o, prefix=0)
            for lists in ((13, 13, 35), (30, 31, 0), (20, 5, 9), (40, 0, 0))
        ]
        cases += [replace(base, lists=(20, 20, 10), r=r, order=o, prefix=3, ties=True) for r in (0, 20, 99)]
    return [
        *cases,
        MapCase(2, 0, 3),
        MapCase(0, 9, 2),
        MapCase(1, 4096, 2048),
        MapCase(1, 4099, 700, order="similarity", ties=True),
    ]


@dataclass(frozen=True)
class MergeCase:
    """One call of ``merge_tokens``."""

    B: int
    N: int
    C: int
    M: int
    dtype: str = "float32"
    mode: str = "mean"
    sized: bool = False
    weighted: bool = False
    groups: str = "random"  # random (some empty, some dropped) | one | none | copy
    layout: str = "contiguous"
    nan: bool = False
    slow: bool = False

    @property
    def name(self) -> str:
        return name_of(self)

    @property
    def work(self) -> int:
        return self.B * (self.N + self.M) * (self.C + 64) * 4

    def inputs(self) -> Call:
        g = generator(self.name)
        x = torch.randn(self.B, self.N, self.C, generator=g).to(getattr(torch, self.dtype))
        if self.nan and self.N:
            x[:, self.N // 2, 0], x[:, 0, self.C - 1] = float("nan"), float("inf")
        token_map = torch.randint(-1, max(self.M, 0), (self.B, self.N), generator=g, dtype=torch.int32)
        if self.groups != "random":
            constant = torch.arange(self.N, dtype=torch.int32).repeat(self.B, 1)
            token_map = {
                "one": constant * 0,
                "none": constant * 0 - 1,
                "copy": constant.flip(1).contiguous(),
            }[self.groups]
        options: dict[str, Any] = {"mode": self.mode}
        if self.sized:
            options["size"] = torch.randint(1, 9, (self.B, self.N), generator=g).float()
        if self.weighted:
            options["weight"] = torch.randint(0, 5, (self.B, self.N), generator=g).float() / 4
        return Call((laid_out(x, self.layout), token_map, self.M), options)


def _merge_cases() -> list[MergeCase]:
    base = MergeCase(B=2, N=41, C=37, M=23)
    cases = [
        replace(base, mode=m, dtype=d, sized=s, weighted=w)
        for m in MODES
        for d in DTYPES
        for s, w in ((False, False), (True, True))
    ]
    cases += [
        replace(base, mode=m, layout=layout, dtype=d)
        for m in MODES
        for layout, d in zip(LAYOUTS[1:], DTYPES, strict=True)
    ]
    cases += [
        replace(base, mode=m, groups=k, M=M)
        for m in MODES
        for k, M in (("one", 1), ("one", 3), ("none", 4), ("copy", 41))
    ]
    cases += [replace(base, mode=m, nan=True, dtype=d) for m in MODES for d in ("float32", "bfloat16")]
    shapes = [
        (1, 1, 1, 1),
        (3, 2, 64, 1),
        (1, 17, 129, 40),
        (2, 64, 8, 3),
        (2, 0, 4, 3),
        (2, 4, 4, 0),
        (0, 3, 3, 2),
        (1, 197, 768, 181),
    ]
    cases += [MergeCase(*shape, mode=MODES[i % 5], sized=bool(i % 2)) for i, shape in enumerate(shapes)]
    cases += [replace(base, C=c, dtype=d) for c in (1, 8, 64, 192) for d in DTYPES]
    return [
        *cases,
        MergeCase(1, 5000, 8, 900, sized=True),
        MergeCase(1, 3000, 4, 1),
        MergeCase(8, 577, 1024, 561, dtype="float16", slow=True),
    ]


@dataclass(frozen=True)
class StepCase:
    """One call of ``bipartite_merge``."""

    B: int
    N: int
    C: int
    D: int
    r: int
    dtype: str = "float32"
    metric: str = "float32"
    prefix: int = 1
    order: str = "tome"
    mode: str = "mean"
    sized: bool = True
    lists: tuple[int, int, int] | None = None  # lengths of a_tokens, b_tokens, rest_tokens
    data: str = "gauss"
    layout: str = "contiguous"
    bad: tuple[int, ...] = ()
    slow: bool = False

    @property
    def name(self) -> str:
        return name_of(self)

    @property
    def work(self) -> int:
        return self.B * (max(self.N, 64) ** 2 * self.D // 4 + self.N * (self.C + 4000))

    def inputs(self) -> Call:
        g = generator(self.name)
        x = torch.randn(self.B, self.N, self.C, generator=g).to(getattr(torch, self.dtype))
        metric = tokens((self.B, self.N, self.D), self.data, g).to(getattr(torch, self.metric))
        metric = spoil(metric, (), self.bad)
        options: dict[str, Any] = {"prefix": self.prefix, "order": self.order, "mode": self.mode}
        if self.sized:
            options["size"] = torch.randint(1, 9, (self.B, self.N), generator=g).float()
            options["weight"] = torch.randint(1, 5, (self.B, self.N), generator=g).float() / 4
        if self.lists:
            mixed = torch.stack([torch.randperm(self.N, generator=g) for _ in range(self.B)]).to(torch.int32)
            split = mixed[:, : sum(self.lists)].split(self.lists, dim=1)
            for key, part in zip(("a_tokens", "b_tokens", "rest_tokens"), split, strict=True):
                options[key] = part.contiguous()
        return Call((laid_out(x, self.layout), laid_out(metric, self.layout), self.r), options)


def _step_cases() -> list[StepCase]:
    base = StepCase(B=3, N=41, C=37, D=19, r=9)
    cases = [replace(base, dtype=d, metric=m) for d in DTYPES for m in DTYPES]
    cases += [replace(base, mode=m, sized=s, dtype="bfloat16") for m in MODES for s in (False, True)]
    cases += [replace(base, order=o, prefix=p) for o in ORDERS for p in (0, 2, 5, 40, 99)]
    cases += [replace(base, r=r, prefix=p) for r in (0, 1, 1000) for p in (0, 1)]
    cases += [replace(base, lists=lists, r=7, order=o) for lists in ((9, 9, 20), (21, 20, 0)) for o in ORDERS]
    cases += [replace(base, lists=(7, 12, 5), r=99, prefix=0, metric="bfloat16", mode="mlerp")]
    cases += [replace(base, D=16, layout=layout, data="lattice") for layout in LAYOUTS]
    cases += [replace(base, bad=(2, 7, 8), prefix=p) for p in (0, 1)]
    shapes = [(1, 1, 1, 1, 1), (2, 2, 3, 5, 1), (1, 0, 4, 3, 2), (0, 5, 4, 3, 2), (1, 197, 64, 64, 16)]
    cases += [StepCase(*shape, prefix=p) for shape in shapes for p in (0, 1)]
    return [*cases, StepCase(9, 97, 48, 32, 11), StepCase(8, 577, 1024, 64, 16, dtype="float16", slow=True)]


MAP_CASES, MERGE_CASES, STEP_CASES = _map_cases(), _merge_cases(), _step_cases()
