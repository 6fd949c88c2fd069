"""Arithmetic on token maps: what was merged where. Plain PyTorch gathers, differentiable in the tokens.

A map ``[B, N]`` of integers gives for each token its row in the output of a merge, -1 where it was dropped.
"""

import torch
from torch import Tensor

from tokencomp import ragged


def merged_count(tokens: int, r: int, *, prefix: int = 1) -> int:
    """How many tokens ``bipartite_map`` leaves of ``tokens`` with its even/odd split: r is capped there."""
    return tokens - max(0, min(r, (tokens - min(prefix, tokens)) // 2))


def identity(batch: int, tokens: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The map ``[batch, tokens]`` int32 that leaves every token where it is."""
    return torch.arange(tokens, dtype=torch.int32, device=device).repeat(batch, 1)


def compose(first: Tensor, then: Tensor) -> Tensor:
    """The map of two merges, one after the other: ``then[first[i]]``.

    Args:
        first: ``[B, N]`` integers in [-1, M).
        then: ``[B, M]`` integers.

    Returns:
        ``[B, N]`` int32, -1 where either merge dropped the token.
    """
    dropped = first < 0
    if then.shape[1] == 0:
        return torch.full_like(first, -1, dtype=torch.int32)
    later = then.gather(1, first.clamp(min=0).long())
    return torch.where(dropped, -1, later).to(torch.int32)


def unmerge(y: Tensor, token_map: Tensor) -> Tensor:
    """Give every token the row of its group: ``x[i] = y[token_map[i]]``, 0 for dropped tokens.

    Args:
        y: ``[B, M, C]``.
        token_map: ``[B, N]`` integers in [-1, M).

    Returns:
        ``[B, N, C]`` of the dtype of ``y``.
    """
    return ragged.gather_rows(y, token_map)


def group_sizes(token_map: Tensor, out_tokens: int, size: Tensor | None = None) -> Tensor:
    """Sizes ``[B, out_tokens]`` float32 of the groups: members counted, or their ``size`` [B, N] added."""
    size = torch.ones_like(token_map, dtype=torch.float32) if size is None else size.float()
    group = torch.where(token_map < 0, out_tokens, token_map).long()
    return size.new_zeros(token_map.shape[0], out_tokens + 1).scatter_add(1, group, size)[:, :out_tokens]


def source_matrix(token_map: Tensor, out_tokens: int) -> Tensor:
    """Which tokens each output row stands for, ``[B, out_tokens, N]`` bool. For pictures: O(M N) memory."""
    rows = torch.arange(out_tokens, device=token_map.device)
    return token_map[:, None, :] == rows[:, None]
