"""Kept tokens as positions: left-packing of ragged rows, and maps from tokens to the rows they went into.

Indices are int32, -1 is a hole. Nothing but ``right_packed`` waits for the device: a width that depends on
data is the caller's to give.
"""

import torch
from torch import Tensor


def compact_rows(keep: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Pack the kept tokens of every row to the left, in order (MrT5's hard deletion, arXiv 2410.20771).

    Args:
        keep: ``[B, N]`` bool, the tokens that stay.
        width: columns M of the result; None: N, which always suffices. Kept tokens beyond it are left out.

    Returns:
        ``index`` ``[B, M]`` int32, the kept tokens ascending, -1 behind the last; ``mask`` ``[B, M]`` bool,
        where index names a token; ``lengths`` ``[B]`` int32, how many there are. A token's old position is
        what ``index`` says, so positions and relative biases are gathered with it.

    Raises:
        ValueError: ``keep`` is not a bool matrix, or ``width`` is negative.
    """
    if keep.dim() != 2 or keep.dtype != torch.bool:
        raise ValueError(f"compact_rows: keep must be bool [B, N], got {keep.dtype} {list(keep.shape)}")
    batch, tokens = keep.shape
    width = tokens if width is None else width
    if width < 0:
        raise ValueError(f"compact_rows: width must not be negative, got {width}")
    rank = keep.cumsum(1) - 1
    place = torch.where(keep & (rank < width), rank, width)  # one column too many takes what does not stay
    token = torch.arange(tokens, dtype=torch.int32, device=keep.device).expand(batch, tokens)
    index = torch.full((batch, width + 1), -1, dtype=torch.int32, device=keep.device)
    index = index.scatter(1, place, token)[:, :width].contiguous()
    lengths = keep.sum(1).clamp(max=width).to(torch.int32)
    return index, index >= 0, lengths


def right_packed(keep: Tensor) -> Tensor:
    """``[B, W]`` int64: the kept tokens of every row of ``keep`` ``[B, N]`` bool, ascending, behind -1 in
    rows with fewer than W, the most that a row has. Waits for the device.
    """
    column = torch.arange(keep.shape[1], device=keep.device)
    ordered = torch.where(keep, column, -1).sort(1).values
    return ordered[:, keep.shape[1] - int(keep.sum(1).max()) :]


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` ``[B, M]`` of ``x`` ``[B, N, ...]``: ``[B, M, ...]``, zeros in holes."""
    if x.shape[1] == 0:
        return x.new_zeros(*index.shape, *x.shape[2:])
    rows = index.clamp(min=0).long().view(*index.shape, *[1] * (x.dim() - 2))
    taken = x.gather(1, rows.expand(*index.shape, *x.shape[2:]))
    return taken.masked_fill((index < 0).view(rows.shape), 0)


def position_map(index: Tensor, tokens: int) -> Tensor:
    """``[B, tokens]`` int32: the row of ``index`` ``[B, M]`` that names each token, -1 for those it leaves
    out.

    The inverse of a selection without repetition, whatever its order; holes are skipped.
    """
    row = torch.arange(index.shape[1], dtype=torch.int32, device=index.device).expand(index.shape)
    out = torch.full((index.shape[0], tokens + 1), -1, dtype=torch.int32, device=index.device)
    return out.scatter(1, torch.where(index < 0, tokens, index).long(), row)[:, :tokens].contiguous()


def kept_mask(index: Tensor, tokens: int) -> Tensor:
    """``[B, tokens]`` bool: whether ``index`` ``[B, M]`` names the token."""
    return position_map(index, tokens) >= 0
