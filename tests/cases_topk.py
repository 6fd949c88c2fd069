"""Test data of the topk family: calls of ``topk_select``, ``topp_select`` and ``topk_budget``.

Scores are compared and masses added exactly, so every case has one right answer, bit for bit.
"""

import itertools
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cases import DTYPES
from torch import Tensor

NAN, INF = float("nan"), float("inf")
ODD = (NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1e-45, 1e38, 3.4e38, -3.4e38, 1.0, -2.0)
DATA = ("gauss", "softmax", "few", "zero", "nan", "inf", "odd", "denormal", "sorted", "sparse")


@dataclass(frozen=True)
class TopkCase:
    """One call of an operator of the family. ``options`` are passed on; tensors are made from the shape."""

    op: str
    shape: tuple[int, ...]  # [R, S], of topk_budget [B, H, S]
    k: int
    dtype: str = "float32"
    data: str = "gauss"
    layout: str = "contiguous"  # contiguous | rows (every other one) | slots (a slice of them)
    lengths: tuple[int, ...] | None = None  # of the flattened rows
    k_per_row: tuple[int, ...] | None = None
    keep: float | None = None  # share of tokens protected by the mask
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    slow: bool = False

    @property
    def work(self) -> int:
        """In multiply-adds, for limits on slow back ends."""
        return 100 * torch.Size(self.shape).numel()

    @property
    def name(self) -> str:
        parts = [self.op, "x".join(map(str, self.shape)) + f"k{self.k}", self.dtype, self.data]
        parts += [self.layout] * (self.layout != "contiguous")
        parts += ["ragged" + "_".join(map(str, self.lengths or ()))] * bool(self.lengths)
        parts += ["ks" + "_".join(map(str, self.k_per_row or ()))] * bool(self.k_per_row)
        parts += [f"keep{self.keep}"] * (self.keep is not None)
        return "-".join(parts + [f"{key}{value}" for key, value in self.options.items()])

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments: the same every time (seeded by the name)."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        options = dict(self.options)
        score = laid_out(scores(self.data, self.shape, g).to(getattr(torch, self.dtype)), self.layout)
        if self.lengths is not None:
            options["lengths"] = torch.tensor(self.lengths, dtype=torch.int32).reshape(self.shape[:-1])
        if self.k_per_row is not None:
            options["k_per_row"] = torch.tensor(self.k_per_row, dtype=torch.int32)
        if self.keep is not None:
            options["keep"] = torch.rand(self.shape, generator=g) < self.keep
        share = (options.pop("p"),) if self.op == "topp_select" else ()
        return (score, *share, self.k), options


def scores(data: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """float32 scores of a kind."""
    x = torch.randn(shape, generator=g)
    if data == "softmax":
        return (3 * x).softmax(-1)
    if data == "few":
        return torch.randint(-3, 4, shape, generator=g).float()
    if data in ("zero", "nan", "inf"):
        return torch.full(shape, {"zero": 0.0, "nan": NAN, "inf": INF}[data])
    if data in ("odd", "denormal"):
        values = torch.tensor(ODD if data == "odd" else [1e-45, 3e-45, 1e-40, 5e-39, 1.2e-38, 0.0, -1e-41])
        return values[torch.randint(0, len(values), shape, generator=g)]
    if data == "sorted":
        return x.sort(-1).values
    if data == "sparse":  # a few scores, the rest exactly equal
        return torch.where(x > 2, x, 0.25)
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` with other strides, between elements that no operator may look at."""
    if layout == "rows":
        store = x.new_full((*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1]), NAN)
        view = store[..., 1::2, :]
    elif layout == "slots":
        store = x.new_full((*x.shape[:-1], x.shape[-1] + 5), INF)
        view = store[..., 3 : 3 + x.shape[-1]]
    else:
        return x
    view.copy_(x)
    return view


def _select() -> list[TopkCase]:
    base = TopkCase("topk_select", (3, 301), 40)
    cases = [replace(base, data=data, dtype=dtype) for data in DATA for dtype in DTYPES]
    sizes = (0, 1, 2, 3, 15, 16, 17, 31, 127, 1023, 1024, 1025, 4097, 9001)
    cases += [replace(base, shape=(2, s), k=k) for s in sizes for k in (0, 1, s // 3, s, s + 3)]
    cases += [replace(base, shape=(r, 67), k=9) for r in (0, 1, 2, 17, 130)]
    guards = ((0, 1), (1, 0), (4, 16), (20, 20), (25, 30), (301, 0), (0, 400), (200, 200), (1000, 1000))
    for (head, tail), data in itertools.product(guards, ("gauss", "few")):
        guarded = replace(base, data=data, options={"head": head, "tail": tail})
        cases += [
            guarded,
            replace(guarded, lengths=(0, 7, 300)),
            replace(guarded, keep=0.05, lengths=(301, 45, 1)),
        ]
    cases += [
        replace(base, keep=share, data=data)
        for share in (0, 0.05, 0.3, 1)
        for data in ("gauss", "few", "nan")
    ]
    cases += [replace(base, k_per_row=(0, 40, 13), lengths=lengths) for lengths in (None, (301, 12, 100))]
    cases += [
        replace(base, k_per_row=(3, 5, 9), keep=0.1, options={"head": 4, "tail": 4}, dtype=d) for d in DTYPES
    ]
    cases += [replace(base, layout=layout, dtype=d, keep=0.1) for layout in ("rows", "slots") for d in DTYPES]
    # Rows long enough to be sampled on the CPU, and data for which the sample is of no use.
    for data, dtype in itertools.product(DATA, ("float32", "bfloat16")):
        cases.append(replace(base, shape=(2, 20011), k=700, data=data, dtype=dtype))
    long = replace(base, shape=(2, 20011), k=900)
    cases += [
        replace(long, keep=share, options={"head": 5, "tail": 70}) for share in (0.001, 0.02, 0.04, 0.2)
    ]
    cases += [replace(long, lengths=(20011, 9000), k_per_row=(17, 900), layout="slots", dtype="float16")]
    # Rows that threads share.
    cases += [
        replace(base, shape=(1, 300007), k=k, data=data) for k in (3000, 150000) for data in ("gauss", "few")
    ]
    cases += [replace(base, shape=(1, 1 << 20), k=8192, keep=0.001, options={"tail": 64}, slow=True)]
    return cases


def _topp() -> list[TopkCase]:
    base = TopkCase("topp_select", (3, 301), 301, data="softmax", options={"p": 0.9})
    cases = [replace(base, data=data, dtype=dtype) for data in DATA for dtype in DTYPES]
    cases += [replace(base, options={"p": p}, data=d) for p in (0.0, 1e-9, 0.5, 0.999999, 1.0) for d in DATA]
    sizes = (0, 1, 2, 17, 127, 1023, 1025, 9001)
    cases += [replace(base, shape=(2, s), k=k) for s in sizes for k in (0, 1, s // 3, s + 3)]
    for p, guard in itertools.product((0.3, 0.95), ((4, 16), (25, 30), (400, 0), (200, 200))):
        options = {"p": p, "head": guard[0], "tail": guard[1]}
        cases += [
            replace(base, options=options | {"min_k": m}, k=60, lengths=(301, 0, 44)) for m in (0, 30, 60)
        ]
    cases += [replace(base, layout=layout, dtype=d) for layout in ("rows", "slots") for d in DTYPES]
    cases += [replace(base, shape=(2, 20011), k=20011, data=data, lengths=(20011, 15000)) for data in DATA]
    cases += [replace(base, shape=(1, 300007), k=300000, options={"p": p, "tail": 3}) for p in (0.5, 0.99)]
    return cases


def _budget() -> list[TopkCase]:
    base = TopkCase("topk_budget", (2, 4, 131), 100)
    cases = [replace(base, data=data, dtype=dtype) for data in DATA for dtype in DTYPES]
    for floor, data in itertools.product((0, 1, 10, 25), ("gauss", "few", "zero", "odd")):
        floored = replace(base, data=data, options={"floor": floor})
        cases += [floored, replace(floored, lengths=(131, 7, 0, 50, 0, 0, 1, 2))]
    cases += [replace(base, k=k) for k in (0, 1, 3, 4, 523, 524, 525, 10000)]
    shapes = ((0, 3, 9), (2, 0, 9), (2, 3, 0), (1, 1, 1), (1, 33, 17), (3, 300, 5), (1, 8, 9001))
    cases += [replace(base, shape=shape, k=50) for shape in shapes]
    cases += [replace(base, layout=layout, dtype=d) for layout in ("rows", "slots") for d in DTYPES]
    return cases


TOPK_CASES = _select() + _topp() + _budget()
TOPK_OPS = ("topk_select", "topp_select", "topk_budget")
