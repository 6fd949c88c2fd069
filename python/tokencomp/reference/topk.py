"""Selection by score in plain PyTorch: the specification of ``tokencomp.ops.topk_select`` and its relatives.

Order of a row's valid tokens: protected ones first, then larger score, then lower index. NaN counts as
-infinity and -0 as 0. What is kept is a prefix of that order, written in ascending order of the index.

Scores are compared, never computed with, so the order is that of the scores themselves in any dtype. Masses
are summed exactly, as integers: a row of n tokens counts them in units of ``2**(e - 62 + bits(n))``, rounded
down, where ``2**e`` is the smallest power of two above the largest mass (subnormal ones: 2**-125) and
``bits(n)`` the length of n in binary. So every order of summation gives the same answer.
"""

import math

import torch
from torch import Tensor

INF = float("inf")
LARGEST = torch.finfo(torch.float32).max


def topk_select(
    score: Tensor,
    k: int,
    *,
    k_per_row: Tensor | None = None,
    head: int = 0,
    tail: int = 0,
    keep: Tensor | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The ``k`` tokens of largest score of each row; see ``tokencomp.ops.topk_select``."""
    rows = []
    for r, n in enumerate(_lengths(lengths, score.shape[:1], score.shape[1])):
        guarded = _protected(n, head, tail, score.device)
        if keep is not None:
            guarded |= keep[r, :n]
        budget = k if k_per_row is None else min(max(int(k_per_row[r]), 0), k)
        rows.append(_order(_comparable(score[r, :n], dtype), guarded)[:budget])
    return _padded(rows, k, score)


def topp_select(
    score: Tensor,
    p: float,
    max_k: int,
    *,
    min_k: int = 0,
    head: int = 0,
    tail: int = 0,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The fewest largest masses that hold a share ``p`` of each row; see ``tokencomp.ops.topp_select``.

    With ``dtype`` float64 masses are the exact integers of the operator; with another dtype they are summed
    in that dtype, for comparison.
    """
    rows = []
    for r, n in enumerate(_lengths(lengths, score.shape[:1], score.shape[1])):
        mass = score[r, :n].float().nan_to_num(nan=0.0, posinf=LARGEST, neginf=0.0).clamp(min=0.0)
        guarded = _protected(n, head, tail, score.device)
        order = _order(mass.double(), guarded)
        summands = units(mass) if dtype == torch.float64 else mass.to(dtype)
        reached = _reached(summands[order].cumsum(0), p) if n else 0
        least = max(min_k, int(guarded.sum()), reached)
        rows.append(order[: min(least, max_k)])
    return _padded(rows, max_k, score)


def topk_budget(
    score: Tensor,
    k: int,
    *,
    floor: int = 0,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """How many of the ``k`` best tokens of an item each head holds; see ``tokencomp.ops.topk_budget``."""
    batch, heads, slots = score.shape
    budget = torch.zeros(batch, heads, dtype=torch.int32, device=score.device)
    limits = _lengths(lengths, (batch, heads), slots)
    for b in range(batch):
        flat = _comparable(score[b], dtype)
        valid, pinned = torch.zeros(2, heads, slots, dtype=torch.bool, device=score.device)
        for h in range(heads):
            n = limits[b * heads + h]
            valid[h, :n] = True
            pinned[h, _order(flat[h, :n], valid[h, :n])[:floor]] = True
        where = valid.flatten().nonzero()[:, 0]
        chosen = where[_order(flat.flatten()[where], pinned.flatten()[where])[:k]]
        budget[b] = torch.bincount(chosen // max(slots, 1), minlength=heads)
    return budget


def units(mass: Tensor) -> Tensor:
    """``[n]`` non-negative finite float32 masses as the exact int64 multiples that the operator sums."""
    if not len(mass):
        return mass.long()
    field, fraction = _fields(mass)
    bits = 62 - len(mass).bit_length()
    shift = field.clamp(min=1) - field.amax(0, keepdim=True).clamp(min=1) + bits - 24
    mantissa = fraction + (field > 0) * 2**23
    return torch.where(shift >= 0, mantissa << shift.clamp(min=0), mantissa >> (-shift).clamp(0, 24))


def _fields(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent field and fraction of non-negative floats."""
    bits = mass.contiguous().view(torch.int32).long()
    return bits >> 23, bits & (2**23 - 1)


def _reached(summed: Tensor, p: float) -> int:
    """The shortest prefix whose sum is at least ``p`` times the last one."""
    total = summed[-1].item()
    share = p * float(total)
    if p >= 1 or share >= float(total):
        share = total
    elif not summed.is_floating_point():
        share = math.ceil(share)
    return int((summed < share).sum()) + 1 if share > 0 else 0


def _order(score: Tensor, first: Tensor) -> Tensor:
    """Indices by (first, larger score, lower index); ``score`` has no NaN."""
    by_score = score.sort(descending=True, stable=True).indices
    return by_score[first[by_score].long().sort(descending=True, stable=True).indices]


def _comparable(score: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores in ``dtype`` with NaN as -infinity and without -0."""
    return score.to(dtype).nan_to_num(nan=-INF, posinf=INF, neginf=-INF) + 0.0


def _protected(n: int, head: int, tail: int, device: torch.device) -> Tensor:
    i = torch.arange(n, device=device)
    return (i < head) | (i >= n - tail)


def _lengths(lengths: Tensor | None, shape: tuple[int, ...], slots: int) -> list[int]:
    """Valid tokens of each row, flattened; clamped as the operator does."""
    if lengths is None:
        return [slots] * math.prod(shape)
    return [int(n) for n in lengths.clamp(0, slots).flatten()]


def _padded(rows: list[Tensor], width: int, score: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.full((len(rows), width), -1, dtype=torch.int32, device=score.device)
    for r, row in enumerate(rows):
        index[r, : len(row)] = row.sort().values
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=score.device)
    return index, count
