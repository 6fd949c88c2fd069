"""LazyEviction (arXiv 2506.15969): evict late, by when a key was last needed and how often it recurs."""

from typing import Literal

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.ops.score import Heads
from tokencomp.recipes.common import require, require_dims


def recurrence_clocks(
    last: Tensor,
    interval: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    *,
    step: int,
    alpha: float,
    heads: Heads = "kv_max",
) -> tuple[Tensor, Tensor]:
    """The clocks after one decode step: last activation and largest recurrence interval of every slot.

    A key is active where its probability (the largest of the group) reaches ``alpha``: ``interval =
    max(interval, step - last)``, then ``last = step``. Slots appended by this step start with last ``step -
    1`` and interval 0, so that a key active in its own step gets interval 1. After a prefill both are 0.
    Steps count from 1. ``decay_score_`` does the same in place, next to other states.

    Args:
        last, interval: ``[B, H, S0]`` int32, the states before the step.
        logits: ``[B, Hq, S]`` float32 with S >= S0, of one query a head.
        lse: ``[B, Hq]`` float32, or None where ``logits`` are probabilities already.
        alpha: activation threshold, >= 0.
        heads: ``kv_max`` for states of kv heads, ``none`` for states of query heads (the official code).

    Returns:
        ``last`` and ``interval`` ``[B, H, S]`` int32, new tensors.

    Raises:
        ValueError: a shape or number that is not as above; RuntimeError as in ``decay_score_``.
    """
    op = "recurrence_clocks"
    require_dims(op, "last", last, "[B, H, S]")
    require_dims(op, "logits", logits, "[B, Hq, S]")
    require(
        interval.shape == last.shape, op, "interval", f"of shape {list(last.shape)}", list(interval.shape)
    )
    new = logits.shape[2] - last.shape[2]
    require(new >= 0, op, "S of logits", f">= S0={last.shape[2]}", logits.shape[2])
    require(step >= 1, op, "step", ">= 1", step)
    last = torch.nn.functional.pad(last, (0, new), value=step - 1).clone()
    interval = torch.nn.functional.pad(interval, (0, new)).clone()
    unused = torch.zeros(last.shape, device=last.device)
    ops.decay_score_(unused, logits, lse, heads=heads, last=last, interval=interval, step=step, alpha=alpha)
    return last, interval


def recurrence_importance(
    last: Tensor, interval: Tensor, step: int, *, form: Literal["code", "paper"] = "code"
) -> Tensor:
    """Importance of each slot at ``step``: ``H1 + H2``, both in [0, 1].

    With ``age = step - last``: the official code has ``H1 = 2 sigmoid(-(1 + age / (interval + 1e-5)))``, the
    paper ``H1 = 2 sigmoid(-age / interval)``, which is 1 at age 0 and 0 where only the interval is 0. ``H2 =
    2 sigmoid(1 - interval)``, 0 where the interval is 0. A key that was never active has 0 in both.
    When more than ``capacity`` slots are held and ``step % W == 0``, keep with ``select_per_head(out,
    capacity, tail=W)``.

    Args:
        last, interval: ``[B, H, S]`` integers, of ``recurrence_clocks``.
        step: clock, not before any ``last``.

    Returns:
        ``[B, H, S]`` float32.

    Raises:
        ValueError: a shape or choice that is not as above.
    """
    op = "recurrence_importance"
    require(
        interval.shape == last.shape, op, "interval", f"of shape {list(last.shape)}", list(interval.shape)
    )
    require(form in ("code", "paper"), op, "form", "'code' or 'paper'", repr(form))
    age, span = (step - last).float(), interval.float()
    if form == "code":
        recent = 2 * torch.sigmoid(-(1 + age / (span + 1e-5)))
    else:
        recent = 2 * torch.sigmoid(-torch.where(age == 0, 0.0, age / span))
    return recent + torch.where(interval == 0, 0.0, 2 * torch.sigmoid(1 - span))
