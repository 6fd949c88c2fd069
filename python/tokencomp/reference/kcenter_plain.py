"""k-center selection the way PyTorch users write it today: what the operator's speed is compared with.

Idiomatic, batched, cosine only. Ties and unusual tokens are left to ``argmin``; the specification is
``kcenter.py``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize


def plain_loop(x: Tensor, k: int, *, objective: str = "max_min", first: str = "largest_nn") -> Tensor:
    """Normalise once, then a matrix-vector product, an update and an argmin a pick: O(k N C).

    Args:
        x: tokens ``[B, N, C]``; the arithmetic is done in their dtype.
        k: picks per item.
        objective: ``max_min`` or ``max_sum``.
        first: ``largest_nn`` (which needs all pairs once) or ``index0``.

    Returns:
        Picks ``[B, k]`` int64 in pick order.
    """
    unit = normalize(x, dim=-1)
    items = torch.arange(x.shape[0], device=x.device)
    pick = _first(unit @ unit.mT) if first == "largest_nn" else items * 0
    return _greedy(k, objective, pick, lambda pick: _products(unit, unit[items, pick]))


def plain_matrix(x: Tensor, k: int, *, objective: str = "max_min", first: str = "largest_nn") -> Tensor:
    """All pairs at once, then a row a pick: O(N^2 C), N x N memory. Arguments as ``plain_loop``."""
    unit = normalize(x, dim=-1)
    similarity = unit @ unit.mT
    items = torch.arange(x.shape[0], device=x.device)
    pick = _first(similarity) if first == "largest_nn" else items * 0
    return _greedy(k, objective, pick, lambda pick: similarity[items, pick])


def _products(unit: Tensor, centre: Tensor) -> Tensor:
    # The row times the matrix: the matrix times the column takes ten times as long for a batch on a CPU.
    return torch.bmm(centre[:, None], unit.mT)[:, 0]


def _first(similarity: Tensor) -> Tensor:
    """The token whose nearest other token is farthest."""
    others = similarity.masked_fill(
        torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device), -torch.inf
    )
    return others.amax(-1).argmin(-1)


def _greedy(k: int, objective: str, pick: Tensor, row: Callable[[Tensor], Tensor]) -> Tensor:
    """Follow the smallest largest or summed similarity; ``row`` gives those to the latest pick."""
    items = torch.arange(len(pick), device=pick.device)
    state, picks = row(pick), [pick]
    state[items, pick] = torch.inf
    for _ in range(k - 1):
        pick = state.argmin(-1)
        picks.append(pick)
        state = torch.maximum(state, row(pick)) if objective == "max_min" else state + row(pick)
        state[items, pick] = torch.inf
    return torch.stack(picks, dim=1)
