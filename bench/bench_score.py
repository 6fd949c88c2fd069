"""Attention scores against the eager formulation, in one run.

    python bench/bench_score.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

Shapes are one layer of an 8B language model, scaled to 8 query heads: a causal prompt, a window of 64 queries
at the end of a long one, a decode step. The eager peer multiplies, masks, softmaxes and sums in float32, in
chunks of rows that stop at the diagonal. ``read`` reads the keys once (a maximum of words): the floor of
everything that is not bound by arithmetic; ``paged`` scores the same keys as shuffled pages of 16.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import Row, command, median_seconds, rotating
from tokencomp import ops, reference
from torch import Tensor

CHUNK = 128  # rows of the eager matrix held at a time: the fastest of 16 ... 512
HQ, HKV, D = 8, 2, 128
PAGE = 16


@dataclass(frozen=True)
class Problem:
    """``rows`` queries at the end of ``keys`` keys; ``tensors`` makes the same data every time."""

    what: str  # column_score | column_max | attention_lse | diagonal_score | qk_scores
    rows: int
    keys: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.what} Hq={HQ} Hkv={HKV} T={self.rows} S={self.keys} D={D} {dtype}"

    @property
    def pairs(self) -> float:
        """Pairs of row and key that are visible."""
        return self.rows * (self.keys - (self.rows - 1) / 2)

    @property
    def flops(self) -> float:
        return 2.0 * HQ * D * self.pairs

    @property
    def bytes(self) -> float:
        return float(HKV * self.keys * D * self.dtype.itemsize)

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        q = torch.randn(1, HQ, self.rows, D, generator=g).to(self.dtype).to(device)
        return q, torch.randn(1, HKV, self.keys, D, generator=g).to(self.dtype).to(device)


def problems(quick: bool) -> list[Problem]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        full = [("column_score", 1024 if quick else 4096, 1024 if quick else 4096)]
        window = [("column_score", 64, 4096 if quick else 32768)]
        if not quick:
            full += [("column_max", 4096, 4096), ("attention_lse", 4096, 4096)]
            window += [("attention_lse", 64, 32768), ("diagonal_score", 64, 32768), ("qk_scores", 1, 32768)]
        found += [Problem(*shape, dtype) for shape in full + window]
    return found


def eager_rows(q: Tensor, k: Tensor, fold: Callable[[Tensor, int], None]) -> None:
    """Calls ``fold(logits, first row)`` with float32 logits of a chunk of rows, up to its last key."""
    rows, keys = q.shape[2], k.shape[2]
    wide = k.float().repeat_interleave(HQ // HKV, dim=1).transpose(-1, -2)
    key = torch.arange(keys, device=q.device)
    for t in range(0, rows, CHUNK):
        position = torch.arange(t, min(rows, t + CHUNK), device=q.device) + keys - rows
        end = keys - rows + t + len(position)
        z = (q[:, :, t : t + CHUNK].float() @ wide[..., :end]).mul_(D**-0.5)
        fold(z.masked_fill_(key[:end] > position[:, None], float("-inf")), t)


def eager(what: str, q: Tensor, k: Tensor) -> Tensor:
    """The plain PyTorch formulation."""
    if what == "qk_scores":
        wide = k.float().repeat_interleave(HQ // HKV, dim=1)
        scores: Tensor = (q.float() @ wide.transpose(-1, -2))[:, :, 0] * D**-0.5
        return scores
    out = torch.zeros(1, HQ, q.shape[2] if what == "attention_lse" else k.shape[2], device=q.device)

    def fold(z: Tensor, t: int) -> None:
        if what == "attention_lse":
            out[:, :, t : t + z.shape[2]] = z.logsumexp(-1)
            return
        p = z.softmax(-1)
        seen = out[..., : p.shape[3]]
        if what == "column_score":
            seen.add_(p.sum(2))
        elif what == "column_max":
            torch.maximum(seen, p.amax(2), out=seen)
        else:
            for i in range(p.shape[2]):  # row t sees offsets 0 ... position
                position = k.shape[2] - q.shape[2] + t + i
                out[..., : position + 1] += p[:, :, i, : position + 1].flip(-1)

    eager_rows(q, k, fold)
    return out


def ours(what: str, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    if what == "qk_scores":
        return ops.qk_scores(q[:, :, 0], k)[0]
    if what == "attention_lse":
        return ops.attention_lse(q, k)
    if what == "diagonal_score":
        return ops.diagonal_score(q, k, lse)
    return ops.column_score(q, k, lse, rows="max" if what == "column_max" else "sum")


def paged(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    """``qk_scores`` over the same keys as pages, which lie about at random."""
    return ops.qk_scores(q[:, :, 0], k.view(-1, 1, PAGE, D), block_table=table)[0]


def read(k: Tensor) -> Tensor:
    return k.view(torch.int32).max()


def _turn(function: Callable[[Tensor], Tensor], copies: list[Tensor], turn: int) -> Tensor:
    return function(copies[turn % len(copies)])


def measure(p: Problem, device: str) -> list[Row]:
    q, k = p.tensors(device)
    lse, copies = ops.attention_lse(q, k), rotating(k)
    contenders: dict[str, Callable[[Tensor], Tensor]] = {
        "tokencomp": lambda keys: ours(p.what, q, keys, lse),
        "eager": lambda keys: eager(p.what, q, keys),
        "read": read,
    }
    if p.what == "qk_scores":
        pages = torch.randperm(p.keys * HKV // PAGE, generator=torch.Generator().manual_seed(0))
        table = pages.view(1, HKV, -1).int().to(device)
        contenders["paged"] = lambda keys: paged(q, keys, table)
    rows = []
    for name, function in contenders.items():
        seconds = median_seconds(partial(_turn, function, copies), device)
        flops = 0.0 if name == "read" else p.flops
        rows.append(Row("score", p.name, name, seconds, flops, p.bytes, baseline=name in ("eager", "read")))
    return rows


def check(p: Problem, device: str) -> None:
    """The call agrees with float64 on rows that float64 can afford, and keeps the sum of weights."""
    q, k = p.tensors(device)
    lse = ops.attention_lse(q, k)
    rows = slice(max(0, p.rows - 8), p.rows)
    exact = reference.attention_lse(q[:, :, rows].cpu(), k.cpu())
    error = (lse[:, :, rows].cpu().double() - exact).abs().max().item()
    total = ops.column_score(q, k, lse).double().sum(-1)
    drift = (total / p.rows - 1).abs().max().item()
    peer = (ours(p.what, q, k, lse) - eager(p.what, q, k)).abs().max().item()
    if not (error < 1e-5 and drift < 1e-5 and peer < 1e-3):
        raise SystemExit(
            f"{p.name}: lse error {error:.3g}, sum drift {drift:.3g}, off the peer by {peer:.3g}"
        )


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for p in problems(quick):
        if checked:
            check(p, device)
        first = len(rows)
        rows += measure(p, device)
        print(
            f"{p.name}: " + ", ".join(f"{r.name} {r.seconds * 1e3:.3f} ms" for r in rows[first:]),
            file=sys.stderr,
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
