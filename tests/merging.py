"""What the tests of merging methods share: the six-token example, views of a layer, a row per method."""

import math
from dataclasses import replace
from typing import Any

import torch
from tokencomp.methods import ALGM, MCTF, DiffRate, LayerView, LocalMerge, PiToMe, ToFu, ToMe, ToMeSD
from torch import Tensor

# Every method that works between attention and MLP, as it acts on layer 1 of 4 of `random_view`.
LAYER_CASES: dict[str, Any] = {
    "tome": ToMe(r=7),
    "tome pair": ToMe(r=(6, -0.5)),
    "tome list": ToMe(r=[0, 9]),
    "tome tokens": ToMe(r=7, metric="tokens"),
    "tome half": ToMe(r=1000, proportional=False),
    "pitome plain": PiToMe(keep=0.7),
    "pitome bsm": PiToMe(keep=0.7, flavour="bsm", energy="paper"),
    "pitome text": PiToMe(keep=0.8, flavour="text", margin=0.5),
    "pitome tome": PiToMe(keep=0.8, flavour="tome"),
    "pitome tokens": PiToMe(keep=0.6, metric="tokens", weighted=False, proportional=False),
    "diffrate": DiffRate(prune=(99, 20, 9), merge=(99, 14, 9)),
    "diffrate merge": DiffRate(prune=(), merge=(99, 14)),
    "diffrate prune": DiffRate(prune=(99, 14), merge=()),
    "tofu drop": ToFu(r=6),
    "tofu mlerp": ToFu(r=6, early=0.0),
    "mctf": MCTF(r=7),
    "mctf one way": MCTF(r=7, t_sim=0.5, t_info=0.0, t_size=1.0, bidirectional=False),
    "algm local": ALGM(local_layer=1, threshold=-0.5),
    "algm global": ALGM(global_layer=1),
    "algm global counts": ALGM(global_layer=1, counts=(2, 3)),
    "local": LocalMerge(r=6, band=2),
    "local half": LocalMerge(r=1000, band=1),
}

# Every method that wraps a block on a grid: method, rows, columns, tokens left.
BLOCK_CASES: list[tuple[Any, int, int, int]] = [
    (ToMeSD(ratio=0.9), 4, 4, 4),  # never more than 3 of 4
    (ToMeSD(ratio=0.5), 1, 9, 9),  # no complete cell
    (ToMeSD(ratio=0.0), 4, 4, 16),
    (ToMeSD(ratio=0.3), 3, 3, 7),  # int(2.7)
    (ToMeSD(ratio=0.9, cell=(1, 1)), 3, 3, 9),
    (ToMeSD(), 0, 5, 0),
]


def plane(*degrees: float) -> Tensor:
    """Unit vectors in the plane, ``[1, n, 2]``."""
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[None].float()


def six() -> tuple[Tensor, Tensor]:
    """The worked example of the papers' facts: a metric of six directions, and values 1 .. 6."""
    return plane(0, 10, 80, 90, 12, 85), torch.arange(1.0, 7.0)[None, :, None]


def random_view(
    prefix: int = 1,
    *,
    batch: int = 3,
    grid: tuple[int, int] = (5, 6),
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LayerView:
    """Layer 1 of 4 over random tokens; the items of a masked one have all, few, one and no valid patches."""
    n, heads, dim = prefix + grid[0] * grid[1], 2, 8
    q, k = (torch.randn(batch, heads, n, dim).to(dtype) for _ in range(2))
    mask = None
    if masked:
        valid = torch.tensor([grid[0] * grid[1], 11, 1, 0]).repeat(batch)[:batch] + prefix
        mask = torch.arange(n) < valid[:, None]
    x = torch.randn(batch, n, 12).to(dtype)
    source = torch.arange(n, dtype=torch.int32).repeat(batch, 1)
    return LayerView(
        layer=1, layers=4, x=x, q=q, k=k, scale=dim**-0.5, size=None, source=source,
        prefix=prefix, grid=grid, mask=mask,
    )  # fmt: skip


def permuted(view: LayerView, order: Tensor) -> LayerView:
    """The same items in another order."""
    size = None if view.size is None else view.size[order]
    mask = None if view.mask is None else view.mask[order]
    return replace(
        view,
        x=view.x[order],
        q=view.q[order],
        k=view.k[order],
        size=size,
        source=view.source[order],
        mask=mask,
    )


def needs_cls(name: str) -> bool:
    return name.startswith("diffrate")


def bipartite(similarity: list[list[float]], r: int) -> tuple[list[int], list[int], list[int]]:
    """Row numbers that go (best first), their columns, and rows that stay (best first), by plain loops."""
    best = [max(range(len(row)), key=lambda j: (row[j], -j)) for row in similarity]
    ranked = sorted(range(len(similarity)), key=lambda i: (-similarity[i][best[i]], i))
    return ranked[:r], [best[i] for i in ranked[:r]], ranked[r:]
