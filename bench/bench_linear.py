"""Linear attention with decay against the same chunks in plain PyTorch, in one run.

    python bench/bench_linear.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

Shapes are one layer of MiniMax-Text-01 scaled to 16 heads of 128. The peer is its published chunked form,
blocks of 256 rows, in float32 by torch's matrix products. GFLOP/s are of that form's products: with smaller
chunks fewer are needed. Contenders take turns and the best of each counts.
"""

import sys
from dataclasses import dataclass

import torch
from common import Row, command, interleaved_seconds
from tokencomp import ops, reference
from tokencomp.linear import decay_slopes
from torch import Tensor

HEADS, D, BLOCK = 16, 128, 256


@dataclass(frozen=True)
class Problem:
    """``rows`` tokens of ``batch`` sequences behind a state."""

    batch: int
    rows: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"decay_linear_attention B={self.batch} H={HEADS} T={self.rows} D={D} {dtype}"

    @property
    def flops(self) -> float:
        block = min(BLOCK, self.rows)
        return 4.0 * self.batch * HEADS * self.rows * D * (block + D)

    @property
    def bytes(self) -> float:
        state = 2 * D * D * 4
        return float(self.batch * HEADS * (4 * self.rows * D * self.dtype.itemsize + state))

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(self.batch, HEADS, self.rows, D, generator=g) for _ in range(3))
        state = torch.randn(self.batch, HEADS, D, D, generator=g)
        moved = (x.to(device, self.dtype) for x in (q, k, v))
        return *moved, decay_slopes(HEADS).to(device), state.to(device)


def problems(quick: bool) -> list[Problem]:
    if quick:
        return [Problem(1, 512, torch.bfloat16)]
    sizes = ((1, 1), (16, 1), (1, 512), (1, 4096))
    return [Problem(*size, dtype) for dtype in (torch.bfloat16, torch.float32) for size in sizes]


def torch_blocks(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The published form, a block of rows at a time."""
    block = min(BLOCK, q.shape[2])
    age = torch.arange(block, device=q.device)
    decay = torch.exp(-slope[:, None] * torch.arange(block + 1, device=q.device))
    between = torch.tril(torch.exp(-slope[:, None, None] * (age[:, None] - age).clamp(min=0)))
    done = []
    for first in range(0, q.shape[2], block):
        some = [x[:, :, first : first + block].float() for x in (q, k, v)]
        m = some[0].shape[2]
        inner = (some[0] @ some[1].mT * between[:, :m, :m]) @ some[2]
        done.append(inner + some[0] * decay[:, 1 : m + 1, None] @ state)
        fading = decay[:, :m].flip(1)[..., None]
        state = decay[:, m, None, None] * state + (some[1] * fading).mT @ some[2]
    return torch.cat(done, 2).to(q.dtype), state


def measure(p: Problem, device: str) -> list[Row]:
    q, k, v, slope, state = p.tensors(device)
    calls = {
        "tokencomp": lambda _: ops.decay_linear_attention(q, k, v, slope, state=state),
        "torch": lambda _: torch_blocks(q, k, v, slope, state),
    }
    best = interleaved_seconds(calls, device, repeats=20, budget=6)
    return [
        Row("linear", p.name, name, seconds, p.flops, p.bytes, baseline=name == "torch")
        for name, seconds in best.items()
    ]


def check(p: Problem, device: str) -> None:
    """Both agree with each other, and the first rows with float64."""
    q, k, v, slope, state = p.tensors(device)
    out, _ = ops.decay_linear_attention(q, k, v, slope, state=state)
    peer, _ = torch_blocks(q, k, v, slope, state)
    few = [x[:, :, :64].cpu() for x in (q, k, v)]
    exact, _ = reference.decay_linear_attention(few[0], few[1], few[2], slope.cpu(), state=state.cpu())
    size = float(exact.abs().max())
    error = (out[:, :, :64].cpu().double() - exact).abs().max().item() / size
    drift = (out.float() - peer.float()).abs().max().item() / float(peer.abs().max())
    bound = 1e-5 if p.dtype == torch.float32 else 0.01
    if not (error < bound and drift < bound):
        raise SystemExit(f"{p.name}: error {error:.3g} of the largest, off torch by {drift:.3g}")


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for p in problems(quick):
        if checked:
            check(p, device)
        measured = measure(p, device)
        rows += measured
        times = ", ".join(f"{r.name} {r.seconds * 1e3:.3f} ms" for r in measured)
        print(f"{p.name}: {times}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__, products=True))
