"""``kcenter_greedy`` against the plain PyTorch loop and the N x N formulation, in one run.

    python bench/bench_kcenter.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

Shapes: LLaVA-1.5 (576 tokens of 1024 channels, 10 %), LLaVA-NeXT (2880 tokens, 10 %) before and after its
projector, a batch of 8. Gaussian tokens are the worst case of farthest-first traversal; real tokens come in
clusters.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from common import Row, command, median_seconds, rotating
from tokencomp import ops, reference
from tokencomp.ops.kcenter import First, Objective
from tokencomp.reference.kcenter_plain import plain_loop, plain_matrix
from torch import Tensor

SHAPES = ((1, 576, 1024, 58), (1, 2880, 1024, 288), (1, 2880, 4096, 288), (8, 576, 1024, 64))
DTYPES = (torch.float32, torch.bfloat16)
OBJECTIVES: tuple[Objective, ...] = ("max_min", "max_sum")
FIRSTS: tuple[First, ...] = ("index0", "largest_nn")
DATA = ("gauss", "clusters")
CHECKED_PICKS = 12


@dataclass(frozen=True)
class Problem:
    """One problem; ``tokens`` makes the same data every time."""

    B: int
    N: int
    C: int
    k: int
    dtype: torch.dtype
    objective: Objective
    first: First
    data: str

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.B}x{self.N}x{self.C} k={self.k} {dtype} {self.objective} {self.first} {self.data}"

    @property
    def flops(self) -> float:
        """k passes of matrix-vector products; ``largest_nn`` needs each pair once."""
        pairs = self.N / 2 if self.first == "largest_nn" else 0
        return 2.0 * self.B * self.N * self.C * (self.k + pairs)

    @property
    def bytes(self) -> float:
        """Token bytes the plain loop reads; a rate above the copy rate means that work was avoided."""
        return float(self.B * self.N * self.C * self.dtype.itemsize * self.k)

    def tokens(self, device: str) -> Tensor:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.B, self.N, self.C, generator=g)
        if self.data == "clusters":
            centres = torch.randn(self.B, self.N // 16, self.C, generator=g)
            which = torch.randint(0, centres.shape[1], (self.B, self.N), generator=g)
            x = torch.stack([c[w] for c, w in zip(centres, which, strict=True)]) + 0.3 * x
        return x.to(self.dtype).to(device)


def problems(quick: bool) -> Iterator[Problem]:
    shapes = SHAPES[:1] if quick else SHAPES
    for (b, n, c, k), dtype, objective in itertools.product(shapes, DTYPES, OBJECTIVES):
        for first, data in itertools.product(FIRSTS, DATA):
            yield Problem(b, n, c, k, dtype, objective, first, data)


def contenders(p: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Who is measured. The peers work in float32: on a CPU that is faster, and as exact as we are."""
    return {
        "tokencomp": lambda x: ops.kcenter_greedy(x, p.k, objective=p.objective, first=p.first)[0],
        "loop": lambda x: plain_loop(x.float(), p.k, objective=p.objective, first=p.first),
        "matrix": lambda x: plain_matrix(x.float(), p.k, objective=p.objective, first=p.first),
    }


def _call(select: Callable[[Tensor], Tensor], copies: list[Tensor], turn: int) -> Tensor:
    return select(copies[turn % len(copies)])


def measure(p: Problem, device: str) -> list[Row]:
    copies = rotating(p.tokens(device))
    rows = []
    for name, select in contenders(p).items():
        seconds = median_seconds(partial(_call, select, copies), device)
        rows.append(Row("kcenter", p.name, name, seconds, p.flops, p.bytes, baseline=name != "tokencomp"))
    return rows


def check(p: Problem, device: str) -> None:
    """Hold the first picks to the specification: no better token was left, up to float32 rounding."""
    x = p.tokens(device)
    index, _ = ops.kcenter_greedy(x, p.k, objective=p.objective, first=p.first)
    index, x = index.cpu(), x.cpu()
    if any(len(set(picks)) != p.k for picks in index.tolist()):
        raise SystemExit(f"{p.name}: a token was picked twice")
    few = index[:, :CHECKED_PICKS]
    gap = reference.replay(x, few, objective=p.objective, seed=few[:, :1]).gap.max().item()
    rounding = 2 * CHECKED_PICKS * p.C**0.5 * torch.finfo(torch.float32).eps
    if not gap <= rounding:
        raise SystemExit(
            f"{p.name}: a pick misses the best score by {gap:.3g}, rounding explains {rounding:.3g}"
        )


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for p in problems(quick):
        if checked:
            check(p, device)
        rows += measure(p, device)
        print(
            f"{p.name}: " + ", ".join(f"{r.name} {r.seconds * 1e3:.3f} ms" for r in rows[-3:]),
            file=sys.stderr,
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
