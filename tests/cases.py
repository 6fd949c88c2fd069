"""Test data as data: one list of cases per operator family, and how each becomes tensors.

A case is a shape, the operator's options, and what is unusual about the tokens. The same cases feed the
replay tests, the exact tests, opcheck and the per-ISA checks.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

OBJECTIVES = ("max_min", "max_sum")
METRICS = ("cosine", "l2", "dot")
FIRSTS = ("largest_nn", "index0", "centroid")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one operator call."""

    x: Tensor
    k: int
    options: dict[str, Any]

    def to(self, device: str) -> "Inputs":
        moved = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in self.options.items()}
        return Inputs(keep_strides(self.x, device), self.k, moved)


def keep_strides(x: Tensor, device: str) -> Tensor:
    """``x`` on another device with the same strides (``Tensor.to`` would make a sliced tensor dense)."""
    if x.device.type == device:
        return x
    span = (
        1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if x.numel()
        else 0
    )
    return x.as_strided((span,), (1,)).to(device).as_strided(x.shape, x.stride())


@dataclass(frozen=True)
class KCenterCase:
    """One call of ``kcenter_greedy``."""

    B: int
    N: int
    C: int
    k: int
    dtype: str = "float32"
    objective: str = "max_min"
    metric: str = "cosine"
    first: str = "largest_nn"
    seeds: int = 0
    weighted: bool = False
    lengths: tuple[int, ...] | None = None
    data: str = "gauss"  # gauss | clusters | lattice (exact arithmetic)
    layout: str = "contiguous"  # contiguous | rows (strided N) | batch (transposed) | channels (sliced)
    zero_rows: tuple[int, ...] = ()
    bad_rows: tuple[int, ...] = ()  # NaN, inf, -inf, overflow in turn
    copies: tuple[tuple[int, int], ...] = ()  # (from, to): exact duplicates
    slow: bool = False

    @property
    def work(self) -> int:
        """Multiply-adds, for limits on slow back ends."""
        passes = self.N if self.first == "largest_nn" and not self.seeds else self.k
        return self.B * self.N * self.C * max(passes, self.k)

    @property
    def name(self) -> str:
        parts = [f"{self.B}x{self.N}x{self.C}k{self.k}", self.dtype, self.objective, self.metric, self.first]
        parts += [f"seeds{self.seeds}"] * bool(self.seeds) + ["weighted"] * self.weighted
        parts += ["ragged"] * (self.lengths is not None) + [self.data] * (self.data != "gauss")
        parts += [self.layout] * (self.layout != "contiguous") + ["zero"] * bool(self.zero_rows)
        parts += ["bad"] * bool(self.bad_rows) + ["copies"] * bool(self.copies)
        return "-".join(parts)

    def inputs(self) -> Inputs:
        """The tensors of the case: the same every time (seeded by its name)."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        x = self._rows(g)
        for source, target in self.copies:
            x[:, target] = x[:, source]
        for row in self.zero_rows:
            x[:, row] = 0
        x = x.to(getattr(torch, self.dtype))
        for i, row in enumerate(self.bad_rows):
            huge = 3e38 if self.dtype != "float16" else float("inf")
            x[:, row, (7 * i) % self.C] = (float("nan"), float("inf"), float("-inf"), huge)[i % 4]
        options: dict[str, Any] = {"objective": self.objective, "metric": self.metric, "first": self.first}
        if self.lengths is not None:
            options["lengths"] = torch.tensor(self.lengths, dtype=torch.int32)
        if self.weighted:
            options["weight"] = torch.randint(1, 9, (self.B, self.N), generator=g).float() / 4
        if self.seeds:
            options["seed"] = self._seeds(g)
        return Inputs(_laid_out(x, self.layout), self.k, options)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the operator."""
        call = self.inputs()
        return (call.x, call.k), call.options

    def _rows(self, g: torch.Generator) -> Tensor:
        shape = (self.B, self.N, self.C)
        if self.data == "lattice":
            return lattice(shape, self.metric, g)
        x = torch.randn(shape, generator=g)
        if self.data == "clusters":
            centres = torch.randn(self.B, max(2, self.N // 16), self.C, generator=g)
            which = torch.randint(0, centres.shape[1], (self.B, self.N), generator=g)
            x = centres.gather(1, which[..., None].expand(shape)) + 0.1 * x
        return x

    def _seeds(self, g: torch.Generator) -> Tensor:
        rows = []
        for b in range(self.B):
            n = self.N if self.lengths is None else self.lengths[b]
            rows.append(torch.randperm(max(n, self.seeds), generator=g)[: self.seeds])
        return torch.stack(rows).to(torch.int32)


def lattice(shape: tuple[int, int, int], metric: str, g: torch.Generator) -> Tensor:
    """Tokens on which float32 arithmetic is exact whatever the order of sums, with plenty of ties.

    l2 and dot: entries in {-2..2}. cosine: +-1, which needs C to be a power of 4 so that norms are powers of
    2.
    """
    if metric != "cosine":
        return torch.randint(-2, 3, shape, generator=g).float()
    channels = shape[2]
    if channels & (channels - 1) or channels.bit_length() % 2 == 0:
        raise ValueError(f"lattice: C must be a power of 4 for cosine, got {channels}")
    return torch.randint(0, 2, shape, generator=g).float() * 2 - 1


def _laid_out(x: Tensor, layout: str) -> Tensor:
    batch, n, c = x.shape
    if layout == "rows":
        store = x.new_full((batch, 2 * n + 1, c), float("nan"))
        view = store[:, 1::2]
    elif layout == "batch":
        store = x.new_full((n, batch, c), float("nan"))
        view = store.transpose(0, 1)
    elif layout == "channels":
        store = x.new_full((batch, n, c + 5), float("nan"))
        view = store[:, :, 3 : 3 + c]
    else:
        return x
    view.copy_(x)
    return view


def _every_choice() -> list[KCenterCase]:
    """Each objective, metric and first rule with each dtype, on a size that is nothing round."""
    base = KCenterCase(B=2, N=67, C=37, k=13)
    return [
        replace(base, dtype=d, objective=o, metric=m, first=f)
        for d in DTYPES
        for o in OBJECTIVES
        for m in METRICS
        for f in FIRSTS
    ]


def _sizes() -> list[KCenterCase]:
    shapes = [
        (1, 1, 1, 1),
        (3, 1, 64, 1),
        (1, 2, 3, 2),
        (1, 17, 1, 5),
        (2, 31, 7, 31),
        (1, 64, 64, 16),
        (1, 127, 129, 20),
    ]
    shapes += [
        (1, 257, 96, 33),
        (256, 5, 8, 3),
        (17, 33, 65, 7),
        (1, 576, 1024, 8),
        (1, 1031, 16, 40),
        (1, 4099, 8, 6),
    ]
    cases = [
        KCenterCase(*shape, objective=o, metric=m)
        for i, shape in enumerate(shapes)
        for o, m in [(OBJECTIVES[i % 2], "cosine"), (OBJECTIVES[(i + 1) % 2], METRICS[1 + i % 2])]
    ]
    cases += [KCenterCase(1, 100, 12, 100, objective=o, metric="l2") for o in OBJECTIVES]
    cases += [
        KCenterCase(1, 16384, 4, 5, first="index0"),
        KCenterCase(1, 65536, 3, 4, metric="l2", first="centroid"),
    ]
    cases += [
        KCenterCase(2, 576, 1024, 58, dtype=d, objective=o, slow=True) for d in DTYPES for o in OBJECTIVES
    ]
    cases += [
        KCenterCase(1, 2880, 1024, 288, dtype="bfloat16", objective="max_sum", first="index0", slow=True)
    ]
    cases += [KCenterCase(1, 4096, 64, 30, metric="l2", slow=True)]
    cases += [KCenterCase(1, 65536, 16, 16, metric="dot", first="index0", slow=True)]
    return cases


def _special() -> list[KCenterCase]:
    base = KCenterCase(B=3, N=41, C=24, k=12)
    cases = [
        replace(base, seeds=s, objective=o, metric=m) for s in (1, 2, 3) for o in OBJECTIVES for m in METRICS
    ]
    cases += [replace(base, weighted=True, objective=o, metric=m) for o in OBJECTIVES for m in METRICS]
    cases += [
        replace(base, weighted=True, seeds=2, dtype="bfloat16"),
        replace(base, weighted=True, first="centroid"),
    ]
    cases += [replace(base, weighted=True, first="index0", lengths=(41, 9, 3))]
    for first in FIRSTS:
        cases += [
            replace(base, lengths=(0, 41, 7), first=first),
            replace(base, lengths=(1, 12, 2), first=first),
        ]
        cases += [
            replace(base, bad_rows=(0, 11, 24, 40), first=first),
            replace(base, zero_rows=(0, 5, 6), first=first),
        ]
        cases += [replace(base, bad_rows=(3, 2, 1, 4), lengths=(5, 3, 41), first=first, metric="l2")]
    for metric in METRICS:
        cases += [
            replace(base, zero_rows=(2, 3), bad_rows=(0, 7), metric=metric, objective="max_sum", seeds=1)
        ]
        cases += [replace(base, copies=((1, 9), (1, 30), (5, 0)), metric=metric, k=41)]
        cases += [replace(base, data="clusters", metric=metric, objective=o) for o in OBJECTIVES]
        cases += [replace(base, layout=layout, metric=metric) for layout in ("rows", "batch", "channels")]
    cases += [
        replace(base, layout="channels", dtype=d, objective="max_sum", C=23) for d in ("float16", "bfloat16")
    ]
    cases += [replace(base, bad_rows=tuple(range(41)), k=5), replace(base, zero_rows=tuple(range(41)), k=5)]
    return cases


def _exact() -> list[KCenterCase]:
    """Lattice data: every back end must equal the reference bit for bit, ties included."""
    cases = []
    for o in OBJECTIVES:
        for m in METRICS:
            base = KCenterCase(B=2, N=128, C=16, k=40, objective=o, metric=m, data="lattice")
            cases += [replace(base, first=f, dtype=d) for f, d in zip(FIRSTS, DTYPES, strict=True)]
            cases += [
                replace(base, seeds=3),
                replace(base, weighted=True),
                replace(base, k=128, first="index0"),
            ]
            cases += [replace(base, N=77, k=20, lengths=(77, 13)), replace(base, zero_rows=(0, 64, 127))]
            cases += [
                replace(base, bad_rows=(0, 3, 100, 127), k=128),
                replace(base, layout="channels", dtype="bfloat16"),
            ]
            cases += [
                replace(base, N=300, C=64, k=50, B=1),
                replace(base, N=33, C=4, B=9, k=33, weighted=True, seeds=2),
            ]
            cases += [replace(base, N=640, C=1024, k=20, B=1, dtype="bfloat16", first="index0")]
            cases += [replace(base, N=2048, C=4, k=9, B=1), replace(base, N=512, C=256, k=64, B=2, slow=True)]
    return cases


KCENTER_EXACT = _exact()
KCENTER_CASES = _every_choice() + _sizes() + _special()
