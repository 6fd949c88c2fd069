"""Token merging the way PyTorch users write it: what the operators' speed is compared with.

Matrices of all pairs, argsort, gathers with expanded indices, scatter sums. The specification is
``merge.py``.
"""

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize


def plain_tome(x: Tensor, metric: Tensor, size: Tensor, r: int, *, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """One bipartite step: normalise, multiply, row maxima, argsort, gather, scatter.

    Args:
        x: tokens ``[B, N, C]``.
        metric: ``[B, N, D]``.
        size: ``[B, N, 1]``.
        r: tokens to merge.
        prefix: 0 or 1 tokens that stay.

    Returns:
        Tokens ``[B, N - r, C]`` and sizes ``[B, N - r, 1]``: the kept even tokens, then all odd ones.
    """
    unit = normalize(metric, dim=-1)
    similarity = unit[:, 0::2] @ unit[:, 1::2].mT
    if prefix:
        similarity[:, 0] = -torch.inf
    value, column = similarity.max(dim=-1)
    order = value.argsort(dim=-1, descending=True)[..., None]
    source, kept = order[:, :r], order[:, r:]
    if prefix:
        kept = kept.sort(dim=1).values
    return _merge(
        x, size, slice(0, None, 2), slice(1, None, 2), source, kept, column[..., None].gather(1, source)
    )


def _merge(
    x: Tensor, size: Tensor, a: slice, b: slice, source: Tensor, kept: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    def reduce(t: Tensor) -> Tensor:
        left, right = t[:, a], t[:, b]
        wide = (-1, -1, t.shape[-1])
        moved = left.gather(1, source.expand(*wide))
        summed = right.scatter_reduce(1, target.expand(*wide), moved, reduce="sum")
        return torch.cat([left.gather(1, kept.expand(*wide)), summed], dim=1)

    total = reduce(size)
    return reduce(x * size) / total, total


def plain_pitome(metric: Tensor, margin: float, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The energy of PiToMe and the match inside its merge set, through the N x N matrix.

    Args:
        metric: ``[B, N, D]``.
        margin: cosine below which tokens repel.
        r: tokens to merge; the 2 r of highest energy are matched.

    Returns:
        The energy order ``[B, N]``, and value and column ``[B, r]`` of each match.
    """
    unit = normalize(metric, dim=-1)
    similarity = unit @ unit.mT
    energy = elu(similarity - margin).mean(dim=-1)
    order = energy.argsort(dim=-1, descending=True)
    a, b = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
    n = similarity.shape[-1]
    rows = similarity.gather(1, a[..., None].expand(-1, -1, n))
    value, column = rows.gather(2, b[:, None].expand(-1, r, -1)).max(dim=-1)
    return order, value, column
