"""Cases of the methods that act on a layer or on tensors of their own: one row for each at least."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from tokencomp import token_map
from tokencomp.methods import GTP, MTR, LexRank, PruMerge, Random, Stride, ToPViM, VidTLDR, ZeroTPrune
from tokencomp.methods.layers import LayerMethod, LayerView
from torch import Tensor

# The attention of CLS and four image tokens; the last one gets, and pays itself, the least.
ATTENTION = torch.tensor(
    [
        [0.2, 0.3, 0.2, 0.2, 0.1],
        [0.1, 0.5, 0.2, 0.1, 0.1],
        [0.1, 0.3, 0.4, 0.1, 0.1],
        [0.1, 0.2, 0.3, 0.3, 0.1],
        [0.2, 0.3, 0.2, 0.2, 0.1],
    ]
)


def view_of(attention: Tensor, x: Tensor, **options: Any) -> LayerView:
    """A layer of one item whose heads attend as ``attention`` ``[N, N]`` or ``[H, N, N]`` says."""
    heads = attention.view(-1, *attention.shape[-2:])
    tokens = heads.shape[-1]
    view = LayerView(
        layer=0,
        layers=12,
        x=x[None],
        q=heads.log()[None],
        k=torch.eye(tokens).expand(1, len(heads), -1, -1),
        scale=1.0,
        size=None,
        source=token_map.identity(1, tokens),
    )
    return replace(view, **options)


def small_view() -> LayerView:
    """CLS and a 2 x 2 grid; x of the image tokens is 1, 2, 3, 4 in the first channel."""
    x = torch.tensor([[9.0, 0.0], [1.0, 0.5], [2.0, 0.0], [3.0, 1.0], [4.0, -9.0]])
    return view_of(ATTENTION, x, grid=(2, 2))


def random_view(
    batch: int = 3, image: int = 36, prefix: int = 1, *, heads: int = 3, seed: int = 0, **options: Any
) -> LayerView:
    """A layer of random tokens, on a grid where ``image`` is a square."""
    g, tokens = torch.Generator().manual_seed(seed), image + prefix
    side = round(image**0.5)
    view = LayerView(
        layer=1,
        layers=12,
        x=torch.randn(batch, tokens, 12, generator=g),
        q=torch.randn(batch, heads, tokens, 8, generator=g) * 2,
        k=torch.randn(batch, heads, tokens, 8, generator=g),
        scale=8**-0.5,
        size=None,
        source=token_map.identity(batch, tokens),
        prefix=prefix,
        grid=(side, side) if side * side == image else None,
    )
    return replace(view, **options)


def to(view: LayerView, device: str) -> LayerView:
    """The view with all its tensors on a device."""
    tensors = {f.name: getattr(view, f.name) for f in fields(view)}
    return replace(view, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


def run(method: LayerMethod, view: LayerView) -> Any:
    """``begin`` on the view's own tokens, then ``reduce``."""
    state: dict[str, Any] = {}
    method.begin(view.x, view.prefix, view.grid, state)
    return method.reduce(replace(view, state=state))


# method, the map of the tokens of ``small_view``
LAYER_METHOD_CASES: list[tuple[LayerMethod, list[int]]] = [
    (GTP(drop=1, graph="spatial", alpha=0.3), [0, 1, 2, 3, -1]),
    (GTP(drop=2, score="cls_mean", passing="none"), [0, 1, 2, -1, -1]),
    (GTP(drop=1, score="column_mean", passing="mean"), [0, 1, 2, 3, 4]),
    (ZeroTPrune(keep=2, layers=None, similar=0.0), [0, 1, 2, -1, -1]),
    (ZeroTPrune(keep=3, layers=None, similar=1.0), [0, 1, 2, -1, 3]),
    (VidTLDR(r=1), [0, 2, 3, 3, 1]),
    (Random(keep=2, seed=1), [0, 1, 2, -1, -1]),
    (Stride(keep=2), [0, -1, 1, -1, 2]),
]

PLANE = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.0], [0.0, 1.0], [-0.1, 1.0], [0.7, 0.7]])[None]
SPIKES = torch.tensor([[1.0, 9, 1, 2, 1, 1, 2, 8]])

# method, how it is called, what comes out
TENSOR_METHOD_CASES: list[tuple[Any, Callable[[Any, str], Tensor], Any]] = [
    (LexRank(keep=3), lambda m, device: m.select(PLANE.to(device)), [[0, 1, 5]]),
    (PruMerge(), lambda m, device: m.picks(SPIKES.to(device)), [[1, 7]]),
    (PruMerge(plus=True), lambda m, device: m.select(SPIKES.to(device)), [[0, 1, 2, 3, 4, 5, 6, 7]]),
    (ToPViM(keep=3), lambda m, device: m.select((PLANE - 0.75).to(device)), [[0, 3, 4]]),
    (Random(keep=3), lambda m, device: m.select(PLANE.to(device)), [[0, 1, 5]]),
    (Stride(keep=3), lambda m, device: m.select(PLANE.to(device)), [[1, 3, 5]]),
    (
        MTR(keep=4),
        lambda m, device: m.plan(PLANE.to(device), torch.tensor([[6.0, 1, 3, 4, 2, 5]], device=device))[0],
        [[0, 1, 1, 2, 2, 3]],
    ),
]
