"""SpecPC (arXiv 2506.08373): prompt tokens that survive, picked by score and widened to their neighbours."""

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.recipes.common import existing, require, require_dims


def expand_select(
    score: Tensor, keep: int, *, neighbours: int, window: int = 64, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep ``keep`` tokens: the last ``window`` ones, then the best by score, each with its neighbours.

    The best ``keep`` tokens are taken in order of score, each as the ``neighbours`` tokens at the offsets
    ``-((neighbours - 1) // 2) ... neighbours // 2`` around it, the nearest first (of two at a distance the
    earlier first), clamped to the prompt. The first ``keep`` tokens of that sequence, repetitions skipped,
    stay.

    Args:
        score: ``[B, n]`` float, of ``specpc_score`` (the maximum over layers); NaN counts as -inf, ties go to
            the lower index.
        keep: tokens that stay, at least ``window``.
        neighbours: >= 1; the paper takes the pooling width.
        window: last tokens, which always stay; >= 0.
        lengths: ``[B]`` tokens of each prompt, right-padded.

    Returns:
        ``index`` ``[B, keep]`` int32, ascending, then -1; ``count`` ``[B]`` int32.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "expand_select"
    require_dims(op, "score", score, "[B, n]")
    require(neighbours >= 1, op, "neighbours", ">= 1", neighbours)
    require(window >= 0, op, "window", ">= 0", window)
    require(keep >= window, op, "keep", f">= window={window}", keep)
    batch, tokens = score.shape
    end = torch.full((batch,), tokens, device=score.device) if lengths is None else lengths.long()
    turn = _turns(score, keep, neighbours, lengths, end)
    token = torch.arange(tokens, device=score.device)
    turn = torch.where(token >= (end - window)[:, None], -1, turn)
    never = torch.iinfo(torch.int64).max
    turn = torch.where(token < end[:, None], turn, never)
    first = turn.argsort(dim=1, stable=True)[:, :keep]
    chosen = torch.zeros_like(turn, dtype=torch.bool).scatter(1, first, turn.gather(1, first) < never)
    index, _, count = ragged.compact_rows(chosen, keep)
    return index, count


def _turns(score: Tensor, keep: int, neighbours: int, lengths: Tensor | None, end: Tensor) -> Tensor:
    """``[B, n]`` int64: when each token first appears in the widened sequence; the largest integer: never."""
    batch, tokens = score.shape
    turn = torch.full((batch, tokens), torch.iinfo(torch.int64).max, device=score.device)
    if tokens == 0:
        return turn
    counts = existing(score, lengths) & ~score.isnan()
    ranked = torch.where(counts, score.float(), -torch.inf)
    picks = ranked.argsort(dim=1, descending=True, stable=True)[:, :keep]
    offset = sorted(range(-((neighbours - 1) // 2), neighbours // 2 + 1), key=lambda o: (abs(o), o))
    offsets = torch.tensor(offset, device=score.device)
    near = (picks[..., None] + offsets).clamp(min=0)
    near = torch.minimum(near, (end - 1).clamp(min=0)[:, None, None]).flatten(1)
    place = torch.arange(near.shape[1], device=score.device).view(-1, neighbours)
    real = torch.arange(picks.shape[1], device=score.device) < end[:, None]  # no pick behind the end
    place = torch.where(real[..., None], place, torch.iinfo(torch.int64).max).flatten(1)
    return turn.scatter_reduce(1, near, place, "amin")
