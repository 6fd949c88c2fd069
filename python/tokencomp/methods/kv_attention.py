"""The attention of a layer as methods on its cache score it: where they meet the score operators.

The attention matrix is never formed. Heads may hold different numbers of slots, so every (sequence, kv head)
is a batch item of its own here, with the G query heads of its group: ``R = B * Hkv`` rows.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods.kv import KVView
from tokencomp.ops.score import Heads


@dataclass(frozen=True)
class Rows:
    """Queries among the slots of their kv head."""

    q: Tensor  # [R, G, T, D]
    slot: Tensor  # [R, T] int32, where each query's own key is, -1 at padding
    age: Tensor  # [R, T] int64, 0 for the newest query of its sequence, negative at padding


def row_lengths(view: KVView) -> Tensor:
    """``[R]`` int32."""
    return view.lengths.flatten()


def row_keys(view: KVView) -> Tensor:
    """``[R, 1, S, D]`` with ``S = view.size``."""
    return view.keys()[:, :, : view.size].flatten(0, 1)[:, None]


def by_head(view: KVView, rows: Tensor) -> Tensor:
    """``[B, Hkv, ...]`` of ``[R, ...]``."""
    return rows.view(*view.lengths.shape, *rows.shape[1:])


def grouped(view: KVView, t: Tensor) -> Tensor:
    """``[R, G, ...]`` of ``[B, Hq, ...]``; a copy only where strides ask for one."""
    rows: Tensor = t.unflatten(1, (view.lengths.shape[1], -1)).flatten(0, 1)
    return rows


def rows_of(view: KVView, newest: int = 0) -> Rows:
    """The queries of this forward; of a forward without padding only the ``newest``, where that is not 0."""
    q, device = view.q, view.q.device
    if newest and view.counts is None:
        q = q[:, :, max(0, q.shape[2] - newest) :]
    age = torch.arange(q.shape[2] - 1, -1, -1, device=device).expand(q.shape[0], -1)
    if view.counts is not None and view.starts is not None:
        end = (view.starts + view.counts)[:, None]
        age = end - 1 - torch.arange(q.shape[2], device=device)
        age = torch.where(age < view.counts[:, None], age, -1)
    age = age.long().repeat_interleave(view.lengths.shape[1], 0)
    slot = torch.where(age >= 0, row_lengths(view)[:, None] - 1 - age, -1)
    return Rows(grouped(view, q), slot.int(), age)


def received(
    view: KVView,
    *,
    gamma: float = 1.0,
    newest: int = 0,
    row_weight: Tensor | None = None,
    heads: Heads = "kv_sum",
    reduce: Literal["sum", "max"] = "sum",
    power: int = 1,
) -> Tensor:
    """``[B, Hkv, size]`` float32: the attention each slot received from the queries of this forward.

    ``sum_t gamma ** age_t P[t, j] ** power`` (or the largest of them), of the G heads of a group reduced as
    ``heads`` says.

    Args:
        gamma: forgetting factor in (0, 1]; ``newest`` > 0 counts that many newest queries only.
        row_weight: ``[B, T]``, besides; 0 at padding.
    """
    rows = rows_of(view, newest)
    if rows.q.shape[2] == 0:
        return view.q.new_zeros((*view.lengths.shape, view.size), dtype=torch.float32)
    counted = (rows.age >= 0) & (rows.age < newest) if newest else rows.age >= 0
    weight = torch.where(counted, gamma ** rows.age.clamp(min=0).double(), 0.0).float()
    if row_weight is not None:
        weight = weight * row_weight.repeat_interleave(view.lengths.shape[1], 0)
    k = row_keys(view)
    sides = _sides(view, rows)
    if view.lse is None:
        lse = ops.attention_lse(rows.q, k, **sides)
    else:
        lse = grouped(view, view.lse[:, :, view.lse.shape[2] - rows.q.shape[2] :])
    score = ops.column_score(
        rows.q, k, lse, row_weight=weight, rows=reduce, heads=heads, power=power, **sides
    )
    return by_head(view, score[:, 0])


def accumulate_prompt_(view: KVView, name: str, *, gamma: float = 1.0, **options: Any) -> None:
    """``state[name] = gamma ** n * state[name] + received(...)``, n being a sequence's queries in this
    forward.
    """
    state = view.state[name]
    if gamma < 1:
        n = view.counts if view.counts is not None else torch.full_like(view.lengths[:, 0], view.q.shape[2])
        state *= (gamma ** n.double()).float()[:, None, None]
    state[:, :, : view.size] += received(view, gamma=gamma, **options)


def accumulate_step_(
    view: KVView,
    score: Tensor,
    *,
    gamma: float = 1.0,
    heads: Heads = "kv_sum",
    power: int = 1,
    **clocks: Any,
) -> None:
    """One ``decay_score_`` per query of a decode step, in place on ``score`` ``[B, Hkv, C]``.

    ``clocks``: ``count``, ``last``, ``interval`` ``[B, Hkv, C]`` int32, ``step`` and ``alpha``.
    """
    width = score.shape[2]
    sides: dict[str, Any] = {
        key: t.view(-1, 1, width) if isinstance(t, Tensor) else t for key, t in clocks.items()
    }
    logits, lse = step_logits(view)
    for t in range(logits.shape[2]):
        ops.decay_score_(
            score.view(-1, 1, width),
            _fitted(logits[:, :, t], width),
            lse[:, :, t].contiguous(),
            gamma=gamma,
            heads=heads,
            power=power,
            lengths=row_lengths(view) - (logits.shape[2] - 1 - t),
            **sides,
        )


def step_logits(view: KVView) -> tuple[Tensor, Tensor]:
    """Logits ``[R, G, T, >= size]``, -inf where masked, and lse ``[R, G, T]`` of a decode step's queries."""
    if view.logits is not None and view.lse is not None:
        return grouped(view, view.logits), grouped(view, view.lse)
    q, k, rows = grouped(view, view.q), row_keys(view), view.q.shape[2]
    each = [
        ops.qk_scores(
            q[:, :, t].contiguous(),
            k,
            scale=view.scale,
            softcap=view.softcap,
            lengths=row_lengths(view) - (rows - 1 - t),
        )
        for t in range(rows)
    ]
    return torch.stack([logits for logits, _ in each], 2), torch.stack([lse for _, lse in each], 2)


def last_received(view: KVView, reduce: Literal["sum", "max"] = "sum") -> Tensor:
    """``[B, Hkv, size]`` float32: the attention each slot received from the newest query of a decode step, of
    the heads of a group the sum or the largest.
    """
    logits, lse = step_logits(view)
    p = (logits[:, :, -1].float() - lse[:, :, -1:].float()).exp()
    p = p.amax(1) if reduce == "max" else p.sum(1)
    return by_head(view, p[:, : view.size])


def remember_queries(view: KVView, window: int) -> None:
    """Keep the last ``window`` queries of each sequence in ``scratch``.

    A ring, written in place by decode steps of one token; put in order where it is read.
    """
    new, ring = view.q, view.scratch.get("queries")
    if new.shape[2] == 1 and ring is not None and view.counts is None:
        ring[:, :, view.scratch["queries_next"]] = new[:, :, 0]
        view.scratch["queries_next"] = (view.scratch["queries_next"] + 1) % window
        return
    if ring is None:
        ring = new.new_zeros(*new.shape[:2], window, new.shape[3])
    else:
        ring = recent_queries(view, window)
    if view.counts is not None and view.starts is not None:
        new = _packed_right(new, view.starts, view.counts)
        both = torch.cat([ring, new], 2)
        # the newest `counts` of `new` are tokens: the window lies there or reaches back into the ring
        i, count = torch.arange(window, device=new.device), view.counts[:, None].long()
        place = torch.where(i >= window - count, i + new.shape[2], i + count)
        index = place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        view.scratch["queries"] = both.gather(2, index.clamp(max=both.shape[2] - 1))
    else:
        view.scratch["queries"] = torch.cat([ring, new], 2)[:, :, -window:].clone()
    view.scratch["queries_next"] = 0


def recent_queries(view: KVView, window: int) -> Tensor:
    """``[B, Hq, window, D]``, the last queries of each sequence, newest last; zeros before its first."""
    ring: Tensor = view.scratch["queries"]
    return ring.roll(-view.scratch["queries_next"], dims=2) if view.scratch["queries_next"] else ring


def window_received(view: KVView, window: int, *, power: int = 1) -> Tensor:
    """``[B, Hkv, size]`` float32: the attention each slot received from the last ``window`` queries.

    They must be remembered, and the last ``window`` slots their own keys. Sum over the heads of a group of
    probabilities to the ``power``.
    """
    q = grouped(view, recent_queries(view, window))
    k, lengths = row_keys(view), row_lengths(view)
    slot = lengths[:, None] - window + torch.arange(window, device=q.device)
    rows = Rows(q, slot.int(), slot)  # a negative slot is a hole: the sequence is shorter than the window
    sides = _sides(view, rows)
    lse = ops.attention_lse(q, k, **sides)
    return by_head(view, ops.column_score(q, k, lse, heads="kv_sum", power=power, **sides)[:, 0])


def forget_queries(view: KVView) -> None:
    """The window ends here: queries were seen that are not remembered."""
    view.scratch.pop("queries", None)


def _packed_right(q: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """``q`` with the tokens of each sequence moved to the end."""
    rows = q.shape[2]
    place = torch.arange(rows, device=q.device) - (rows - starts - counts)[:, None].long()
    index = place.clamp(0, max(rows - 1, 0))[:, None, :, None]
    return q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))


def _sides(view: KVView, rows: Rows) -> dict[str, Any]:
    return {
        "scale": view.scale,
        "softcap": view.softcap,
        "q_position": rows.slot,
        "lengths": row_lengths(view),
    }


def _fitted(logits: Tensor, width: int) -> Tensor:
    """``[R, G, width]`` contiguous: cut, or filled up with -inf."""
    missing = width - logits.shape[2]
    if missing > 0:
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    return logits[:, :, :width].contiguous()
