"""The topk family against torch's own sorting and selecting, in one run.

    python bench/bench_topk.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

The peers give the same form of result: kept indices, ascending. ``topk+sort``: ``torch.topk``, then a sort
of the indices. ``sort+cumsum``: a full sort, then the prefix whose sum reaches the share. ``flat topk``:
AdaKV's counts from one ``torch.topk`` over all heads. ``read`` is one reduction over the scores: what
reading them costs, not a peer. Data: Gaussian scores; softmax weights; weights of which all but a few are 0.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from common import Row, command, median_seconds, rotating
from tokencomp import ops, reference
from torch import Tensor

SHAPES = (
    (64, 131072, 2048), (1, 131072, 2048), (1, 1 << 20, 8192), (8, 32768, 2048), (32, 8192, 2048),
    (256, 4096, 1024), (256, 1024, 128),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
HEADS = 8  # of an item, where budgets are shared
SHARE = 0.9


@dataclass(frozen=True)
class Problem:
    """One problem; ``scores`` makes the same data every time."""

    op: str
    R: int
    S: int
    k: int
    dtype: torch.dtype
    data: str

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.R}x{self.S} k={self.k} {dtype} {self.data}"

    @property
    def bytes(self) -> float:
        """Of the scores, once."""
        return float(self.R * self.S * self.dtype.itemsize)

    def scores(self, device: str) -> Tensor:
        x = torch.randn(self.R, self.S, generator=torch.Generator().manual_seed(0))
        if self.data == "softmax":
            x = (3 * x).softmax(-1)
        if self.data == "sparse":
            x = torch.where(x > 2.6, x, 0.0)
        return x.to(self.dtype).to(device)


def problems(quick: bool) -> Iterator[Problem]:
    for r, s, k in SHAPES[3:4] if quick else SHAPES:
        for dtype in DTYPES:
            for data in ("gauss", "softmax", "sparse"):
                yield Problem("topk_select", r, s, k, dtype, data)
            yield Problem("topp_select", r, s, s // 2, dtype, "softmax")
            if r % HEADS == 0:
                yield Problem("topk_budget", r, s, k * HEADS, dtype, "softmax")


def by_sum(score: Tensor, p: float, most: int) -> Tensor:
    """Top-p the way it is written today: the kept indices ascending, S behind the last."""
    mass, order = score.float().sort(dim=-1, descending=True)
    before = mass.cumsum(-1) - mass
    kept = before < p * mass.sum(-1, keepdim=True)
    return order.masked_fill(~kept, score.shape[-1])[:, :most].sort(dim=-1).values


def by_head(score: Tensor, k: int) -> Tensor:
    """How many of the best k of an item each head holds."""
    chosen = score.flatten(1).topk(k, dim=-1).indices // score.shape[-1]
    counts = torch.zeros(score.shape[:2], dtype=torch.long, device=score.device)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen))


def contenders(p: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Who is measured, ours first."""
    if p.op == "topk_select":
        ours: Callable[[Tensor], Tensor] = lambda x: ops.topk_select(x, p.k)[0]  # noqa: E731
        peer = {"topk+sort": lambda x: x.topk(p.k, dim=-1).indices.sort(dim=-1).values}
    elif p.op == "topp_select":
        ours = lambda x: ops.topp_select(x, SHARE, p.k)[0]  # noqa: E731
        peer = {"sort+cumsum": lambda x: by_sum(x, SHARE, p.k)}
    else:
        ours = lambda x: ops.topk_budget(x.unflatten(0, (-1, HEADS)), p.k)  # noqa: E731
        peer = {"flat topk": lambda x: by_head(x.unflatten(0, (-1, HEADS)), p.k)}
    return {"tokencomp": ours, **peer, "read": lambda x: x.amax(-1)}


def _call(select: Callable[[Tensor], Tensor], copies: list[Tensor], turn: int) -> Tensor:
    return select(copies[turn % len(copies)])


def measure(p: Problem, device: str) -> list[Row]:
    copies = rotating(p.scores(device))
    rows = []
    for name, select in contenders(p).items():
        seconds = median_seconds(partial(_call, select, copies), device)
        rows.append(Row("topk", p.name, name, seconds, 0.0, p.bytes, baseline=name != "tokencomp"))
    return rows


def check(p: Problem, device: str) -> None:
    """Hold the first rows to the specification."""
    x = p.scores(device)[:HEADS]
    if p.op == "topk_budget":
        got: tuple[Tensor, ...] = (ops.topk_budget(x[None], p.k),)
        want: tuple[Tensor, ...] = (reference.topk_budget(x[None].cpu(), p.k),)
    elif p.op == "topp_select":
        got, want = ops.topp_select(x, SHARE, p.k), reference.topp_select(x.cpu(), SHARE, p.k)
    else:
        got, want = ops.topk_select(x, p.k), reference.topk_select(x.cpu(), p.k)
    if not all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True)):
        raise SystemExit(f"{p.name}: not what the reference selects")


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
