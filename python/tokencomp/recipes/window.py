"""Scores from an observation window, the last queries of a prompt: SnapKV, SpecKV, SpecPC."""

from typing import Any

import torch
from torch import Tensor

from tokencomp import ops, scores
from tokencomp.ops.score import Heads, Rows
from tokencomp.recipes.common import Pool, pool_scores, require, require_dims


def window_score(
    q: Tensor,
    k: Tensor,
    *,
    kernel: int = 7,
    pool: Pool = "max",
    rows: Rows = "sum",
    heads: Heads = "kv_mean",
    scale: float | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Pooled attention of the last ``w`` queries to the keys before them.

    The softmax runs over all keys, causal inside the window; its probabilities are reduced over the window's
    rows, then over the heads of a group, then pooled over the keys before the window. SnapKV (arXiv
    2404.14469): ``rows="sum"``, pooling ``avg`` 5 or ``max`` 7, ``heads="none"`` as its code or ``kv_mean``.
    SpecKV (arXiv 2506.08373): ``rows="max", heads="kv_max"``, the draft's lookahead inside the window.
    Keep with ``select_per_head(out, capacity, tail=w)``.

    Args:
        q: ``[B, Hq, w, D]``, the last queries of each sequence.
        k: ``[B, Hkv, S, D]``, S >= w.
        kernel: pooling width, >= 1.
        softcap: of the logits, as in ``column_score``.
        lengths: ``[B]`` keys of each sequence, right-padded; the window is the last w of them. Rows before
            the start of a shorter sequence are nothing.

    Returns:
        ``[B, H*, S]`` float32, -inf inside the window and at padding.

    Raises:
        ValueError: a shape or number that is not as above; RuntimeError as in ``column_score``.
    """
    op = "window_score"
    window = _check_window(op, q, k)
    end = torch.full((q.shape[0],), k.shape[2], device=q.device) if lengths is None else lengths.long()
    position = end[:, None] - window + torch.arange(window, device=q.device)
    sides: dict[str, Any] = {"scale": scale, "softcap": softcap, "lengths": lengths, "q_position": position}
    lse = ops.attention_lse(q, k, **sides)
    score = ops.column_score(q, k, lse, **sides, rows=rows, heads=heads)
    return pool_scores(score, kernel, kind=pool, lengths=(end - window).clamp(min=0))


def specpc_score(q: Tensor, k: Tensor, *, kernel: int = 32, scale: float | None = None) -> Tensor:
    """One score a prompt token from one layer of a draft model (SpecPC, arXiv 2506.08373).

    The largest, over heads and the last w rows, of the attention weighted by a ramp from 0 to 1 over those
    rows, max-pooled. Take the maximum over layers before pooling or after: it is the same.

    Args:
        q: ``[B, Hq, w, D]``, the last queries of the prompt.
        k: ``[B, Hkv, S, D]``, S >= w.
        kernel: pooling width, >= 1.

    Returns:
        ``[B, S]`` float32, the window's own keys included.

    Raises:
        ValueError: a shape or number that is not as above; RuntimeError as in ``column_score``.
    """
    window = _check_window("specpc_score", q, k)
    ramp = scores.ramp_weights(window, window, device=q.device)
    lse = ops.attention_lse(q, k, scale=scale)
    score = ops.column_score(q, k, lse, scale=scale, row_weight=ramp, rows="max", heads="none")
    return pool_scores(score.amax(1, keepdim=True), kernel, kind="max")[:, 0]


def _check_window(op: str, q: Tensor, k: Tensor) -> int:
    require_dims(op, "q", q, "[B, Hq, w, D]")
    require_dims(op, "k", k, "[B, Hkv, S, D]")
    window, keys = q.shape[2], k.shape[2]
    require(1 <= window <= keys, op, "w", f"in [1, S={keys}]", window)
    return window
