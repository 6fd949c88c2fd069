"""Token merging against its plain PyTorch formulation and against a clone of the tokens, in one run.

    python bench/bench_merge.py [--device cpu|cuda] [--threads n] [--out file.json] [--check] [--quick]

Shapes: ViT-B/16 (197 tokens of 768 channels), ViT-L/14 at 336 pixels (577 of 1024), and 4096 tokens of which
half merge; keys of 64 channels are the metric. ToMeSD merges half of a diffusion model's grid ahead of a
block and copies the block's result back behind it; its peer is the package tomesd, where it is installed.
Contenders take turns, and the best time of each counts.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from common import Row, command, interleaved_seconds, rotating
from tokencomp import ops, token_map
from tokencomp.methods import ToMeSD
from tokencomp.reference.merge_plain import plain_pitome, plain_tome
from torch import Tensor

D = 64
SHAPES = ((8, 197, 768, 16), (8, 577, 1024, 16), (8, 4096, 1024, 2047))
DTYPES = (torch.float32, torch.bfloat16)
GRIDS = ((2, 64, 320), (2, 96, 320))  # first blocks of Stable Diffusion 1.5 and 2.1: batch, side, channels
MARGIN = 0.5


@dataclass(frozen=True)
class Problem:
    """One shape; the tensors are the same every time."""

    B: int
    N: int
    C: int
    r: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.B}x{self.N}x{self.C} r={self.r} {str(self.dtype).removeprefix('torch.')}"

    @property
    def count(self) -> int:
        return token_map.merged_count(self.N, self.r)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        x, metric = (torch.randn(self.B, self.N, c, generator=g).to(self.dtype) for c in (self.C, D))
        size = torch.randint(1, 4, (self.B, self.N), generator=g).float()
        return x.to(device), metric.to(device), size.to(device)

    def clone_bytes(self) -> float:
        return 2.0 * self.B * self.N * self.C * self.dtype.itemsize

    def merge_bytes(self) -> float:
        return float(self.B * (self.N + self.count) * self.C * self.dtype.itemsize)


def tome(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The product's version of ``plain_tome``."""
    return ops.bipartite_merge(x, metric, r, size=size)[:2]


def tome_in_steps(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The same by the three operators it is made of."""
    return ops.merge_tokens(x, tome_map(metric, r), token_map.merged_count(x.shape[1], r), size=size)


def tome_map(metric: Tensor, r: int) -> Tensor:
    value, index = ops.cosine_match(metric[:, 0::2], metric[:, 1::2], protect_a=1)
    return ops.bipartite_map(value, index, r, metric.shape[1])


def pitome(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product's version of ``plain_pitome``."""
    order = ops.energy_score(metric, MARGIN).argsort(dim=-1, descending=True)
    value, column = ops.cosine_match(
        metric, metric, a_index=order[:, : 2 * r : 2], b_index=order[:, 1 : 2 * r : 2]
    )
    return order, value, column


Contenders = dict[str, Callable[[int], object]]


def stages(p: Problem, device: str) -> Iterator[tuple[str, float, float, Contenders]]:
    """What is measured: a name, operations, bytes, and who does it. The plain peers work in float32."""
    x, metric, size = p.tensors(device)
    copies = rotating(x)
    apart = len(copies) // 3  # who comes second must not find the tokens of the first in the caches

    def tokens(turn: int, place: int = 0) -> Tensor:
        return copies[(turn + place * apart) % len(copies)]

    column = size[..., None]
    pairs = 2.0 * p.B * (p.N // 2) * ((p.N + 1) // 2) * D
    yield (
        f"match + merge {p.name}",
        pairs,
        p.merge_bytes(),
        {
            "tokencomp": lambda i: tome(tokens(i), metric, size, p.r),
            "three operators": lambda i: tome_in_steps(tokens(i, 1), metric, size, p.r),
            "plain": lambda i: plain_tome(tokens(i, 2).float(), metric.float(), column, p.r),
        },
    )
    mapped = tome_map(metric, p.r)
    yield (
        f"merge {p.name}",
        0.0,
        p.merge_bytes(),
        {
            "tokencomp": lambda i: ops.merge_tokens(tokens(i), mapped, p.count, size=size),
            "clone": lambda i: tokens(i, 1).clone(),
        },
    )
    r = min(p.r, p.N // 2)
    yield (
        f"energy + match {p.name}",
        2.0 * p.B * p.N * p.N * D,
        float(metric.numel() * metric.element_size()),
        {
            "tokencomp": lambda _: pitome(metric, r),
            "plain": lambda _: plain_pitome(metric.float(), MARGIN, r),
        },
    )


def sd_ours(x: Tensor, side: int) -> Tensor:
    plan = ToMeSD().plan(x, side, side)
    return plan.unmerge(plan.merge(x))


def sd_peer(x: Tensor, side: int) -> Tensor:
    matching = import_module("tomesd.merge").bipartite_soft_matching_random2d
    merge, unmerge = matching(x, side, side, 2, 2, x.shape[1] // 2, no_rand=True)
    found: Tensor = unmerge(merge(x))
    return found


def diffusion(
    batch: int, side: int, channels: int, dtype: torch.dtype, device: str
) -> tuple[str, Contenders]:
    """Around a block that does nothing, of both results the same."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, side * side, channels, generator=g).to(device, dtype)
    calls: Contenders = {"tokencomp": lambda _: sd_ours(x, side)}
    if find_spec("tomesd"):
        calls["tomesd"] = lambda _: sd_peer(x, side)
        error = (sd_ours(x, side) - sd_peer(x, side)).abs().max().item()
        if dtype == torch.float32 and not error < 1e-5:
            raise SystemExit(f"merge: ToMeSD on {side} x {side} tokens differs from tomesd by {error:.3g}")
    return f"ToMeSD {batch}x{side}x{side}x{channels} half {str(dtype).removeprefix('torch.')}", calls


def check(p: Problem, device: str) -> None:
    """The merged tokens equal those of the plain formulation, in float32, where no two similarities tie."""
    if p.dtype != torch.float32:
        return
    x, metric, size = p.tensors(device)
    got = tome(x, metric, size, p.r)
    want = plain_tome(x, metric, size[..., None], p.r)
    if not (torch.equal(got[1], want[1][..., 0]) and torch.allclose(got[0], want[0], rtol=1e-5, atol=1e-5)):
        raise SystemExit(f"{p.name}: merged tokens differ from the plain formulation")


def measured(name: str, flops: float, size: float, contenders: Contenders, device: str) -> list[Row]:
    times = interleaved_seconds(contenders, device)
    print(f"{name}: " + ", ".join(f"{who} {s * 1e3:.3f} ms" for who, s in times.items()), file=sys.stderr)
    return [
        Row("merge", name, who, seconds, flops, size, baseline=who in ("plain", "clone", "tomesd"))
        for who, seconds in times.items()
    ]


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for shape in SHAPES[: 1 if quick else None]:
        for dtype in DTYPES:
            p = Problem(*shape, dtype)
            if checked:
                check(p, device)
            for name, flops, size, contenders in stages(p, device):
                rows += measured(name, flops, size, contenders, device)
    for grid in GRIDS[: 1 if quick else None]:
        for dtype in DTYPES:
            name, contenders = diffusion(*grid, dtype, device)
            batch, side, channels = grid
            pairs = batch * (side**2 // 4) * (side**2 * 3 // 4)
            size = 4.0 * batch * side**2 * channels * dtype.itemsize
            rows += measured(name, 2.0 * pairs * channels, size, contenders, device)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
