"""From scores of slots to lists of slots: what the sparse methods share.

Scores come per query head and query row; a list is per kv head (or per query head, at G times the reading).
Queries of a few decode tokens at once share one list, in which all of their own slots are.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods.sparse import SlotLists, SparseView

Share = Literal["kv", "q"]
Reduce = Literal["max", "softmax_sum"]
SHARE_HELP = "kv: one list a kv head; q: one a query head, as published, which reads keys once for each"
REDUCE_HELP = "over the heads of a list: max of the logits, or softmax_sum of the probabilities"
DENSE_HELP = "first layers that read everything"
SINKS_HELP = "first slots that are always read"
RECENT_HELP = "newest slots that are always read"


def real_rows(view: SparseView) -> Tensor | None:
    """``[B, T]`` bool: rows of ``q`` that are tokens; None: all."""
    if view.starts is None or view.counts is None:
        return None
    row = torch.arange(view.rows, device=view.q.device)
    return (row >= view.starts[:, None]) & (row < (view.starts + view.counts)[:, None])


def flat_queries(view: SparseView) -> Tensor:
    """``[B, Hq * T, D]``: every row as a head of its own, the T rows of a head side by side."""
    return view.q.flatten(1, 2)


def votes(
    view: SparseView, scores: Tensor, lse: Tensor | None, reduce: Reduce, lists: int, share: bool = False
) -> Tensor:
    """``[B, lists, S]`` float32 from ``scores`` ``[B, Hq * T, S]``; -inf where nobody sees a slot.

    ``share``: of ``softmax_sum`` the mean over the heads and rows of a list, which sums to 1.
    """
    real = real_rows(view)
    if real is not None:
        rows = real[:, None].expand(-1, view.q.shape[1], -1).flatten(1)
        scores = scores.masked_fill(~rows[..., None], -torch.inf)
        lse = None if lse is None else lse.masked_fill(~rows, -torch.inf)
    found = ops.head_vote(scores, lse if reduce == "softmax_sum" else None, mode=reduce, groups=lists)
    if not share:
        return found
    heads = view.q.shape[1] // lists
    each = heads * view.rows if real is None else (heads * real.sum(1)).clamp(min=1)[:, None, None]
    return found / each


def list_lengths(view: SparseView, lists: int) -> Tensor:
    """``[B, lists]`` int32: slots in use, for kv heads or query heads."""
    return view.lengths.repeat_interleave(lists // view.lengths.shape[1], 1)


def best_slots(
    score: Tensor, lengths: Tensor, k: int, *, head: int = 0, tail: int = 0, **options: Any
) -> SlotLists:
    """The ``k`` best slots of ``score`` ``[B, H, S]`` below ``lengths`` ``[B, H]``, protected ones first."""
    index, count = ops.topk_select(
        score.flatten(0, 1),
        min(k, score.shape[2]),
        head=head,
        tail=tail,
        lengths=lengths.flatten(),
        **options,
    )
    return SlotLists(index.view(*lengths.shape, -1), count.view(lengths.shape))


def slots_of_chunks(index: Tensor, count: Tensor, chunk: int, lengths: Tensor) -> SlotLists:
    """All slots below ``lengths`` ``[B, H]`` of the chunks ``index`` ``[B, H, n]``, ascending, then -1."""
    slot = index[..., None] * chunk + torch.arange(chunk, dtype=torch.int32, device=index.device)
    there = (index[..., None] >= 0) & (slot < lengths[..., None, None])
    listed = torch.arange(index.shape[2], device=index.device) < count[..., None]
    there &= listed[..., None]
    slots = torch.where(there, slot, -1).flatten(2)
    return SlotLists(slots, (count * chunk).int())


def parts(*pieces: Tensor) -> SlotLists:
    """Lists put one behind the other: ascending slots with -1 as holes."""
    index = torch.cat(pieces, 2)
    return SlotLists(
        index, torch.full(index.shape[:2], index.shape[2], dtype=torch.int32, device=index.device)
    )


def sink_slots(lengths: Tensor, sinks: int) -> Tensor:
    """``[B, H, sinks]`` int32: the first slots, -1 where there are none."""
    slot = torch.arange(sinks, dtype=torch.int32, device=lengths.device).expand(*lengths.shape, -1)
    return torch.where(slot < lengths[..., None], slot, -1)


def newest_slots(lengths: Tensor, count: int, least: int = 0) -> Tensor:
    """``[B, H, count]`` int32: the last slots, -1 where there are none at or behind ``least``."""
    slot = lengths[..., None] - count + torch.arange(count, dtype=torch.int32, device=lengths.device)
    return torch.where(slot >= least, slot, -1).int()


def by_position(view: SparseView, position: Tensor) -> Tensor:
    """``[B, H, K]`` int32: the slots that hold the tokens ``position`` ``[B, H, K]``, -1 where none does."""
    if view.whole:
        return position
    heads = position.shape[1] // view.lengths.shape[1]
    there = view.position()[:, :, : view.size]
    slot = torch.arange(view.size, device=there.device)
    last = torch.iinfo(torch.int32).max
    ascending = torch.where(slot < view.lengths[..., None], there, last).repeat_interleave(heads, 1)
    place = torch.searchsorted(ascending.contiguous(), position.contiguous()).clamp(max=max(view.size - 1, 0))
    found = (position >= 0) & (ascending.gather(2, place) == position)
    return torch.where(found, place, -1).int()


def at_rows(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places ``index`` ``[B, H, n]`` of a ``[B, H, N, ...]``, as its subscripts: on a CPU 80 times as fast as
    ``gather`` and ``scatter`` with an index expanded to the channels.
    """
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    return batch, torch.arange(index.shape[1], device=index.device)[:, None], index.long()
