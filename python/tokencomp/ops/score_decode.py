"""Scores of a decode step: wrappers and fake kernels of the operators that select with one query a head."""

from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace, _page_checks, _score_sides
from tokencomp.ops.page_pools import PagePools, arguments_of
from tokencomp.ops.score import Heads

Vote = Literal["softmax_sum", "sum", "max", "mean"]


@typed
def qk_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    k_min: Tensor | None = None,
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    softcap: float | None = None,
    quantized: PagePools | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of one query a head against all keys, and their log-sum-exp: what a decode step selects by.

    ``scores[h, j] = scale <q_h, k_j>``, soft-capped if asked for, plus ``key_bias`` (TokenSelect, arXiv
    2411.02886, uses ``scale=1``). The keys may be pooled ones: pages, chunks, centroids. With ``k_min`` they
    are pages of which ``k`` holds the largest and ``k_min`` the smallest value of each channel, and the
    score is Quest's upper bound ``scale * sum_c max(q_c k_c, q_c k_min_c)`` (arXiv 2406.10774), computed as
    the one product ``<max(q, 0), k> + <min(q, 0), k_min>``. Every key is read once for all heads of its
    group.

    With ``block_table`` the keys are read where a paged cache holds them: slot j of (b, kv head h) is slot
    ``j % P`` of page ``block_table[b, h, j // P]``, and ``S = P * pages of a sequence``. Keys of quantized
    pages (Twilight, arXiv 2502.02770, scores 4-bit keys) are read a tile at a time through the numbers that
    ``kv_page_read`` gives in the dtype of q.

    Args:
        q: ``[B, Hq, D]``, float32, float16 or bfloat16, D <= 256.
        k: ``[B, Hkv, S, D]`` of the same dtype; with ``block_table`` a pool ``[pages, Hx, P, D]``, Hx = 1 for
            pages of one head, Hx = Hkv for pages that hold all heads; P a power of two. Any strides with D
            contiguous.
        scale: factor of the products; default ``D ** -0.5``.
        block_table: ``[B, Hkv, pages of a sequence]`` integers, for Hx = Hkv possibly one table expanded over
            the heads. The upper four bits of an entry are the page's type: 0 a page of ``k``, i a page of the
            i-th pool of ``quantized``; -1 is no page, and its slots are masked. Entries behind a sequence's
            length are not looked at.
        k_min: of the shape and strides of ``k``; not beside quantized pools.
        key_bias: as in ``column_score``.
        lengths: ``[B]`` or ``[B, Hkv]`` keys, in [0, S].
        starts, softcap: as in ``column_score``.
        quantized: pools of quantized pages, for pages of 16, 32 or 64 slots.

    Returns:
        ``scores`` ``[B, Hq, S]`` float32, -inf at keys that are masked or whose logit is NaN; ``lse`` ``[B,
        Hq]`` float32, -inf where no key is left.

    Raises:
        RuntimeError: a shape, dtype, device or choice that is not as above.
        ValueError: values of ``block_table``, ``key_bias``, ``lengths`` or ``starts`` that are not as above
            (on CUDA only under ``TOKENCOMP_CHECKED=1``; unchecked, an entry that names no page is a hole).
    """
    keys = _page_checks.slots(k, block_table)
    side = _score_sides.attention_sides("qk_scores", q, keys, None, key_bias, None, lengths, starts)
    del side["row_weight"], side["q_position"]
    if block_table is not None:
        _page_checks.check_table("qk_scores", block_table, lengths, k, quantized)
    scores, lse = _namespace.op("qk_scores")(
        q,
        k,
        scale=_score_sides.scale(q, scale),
        block_table=_page_checks.as_table(block_table),
        k_min=k_min,
        **side,
        softcap=softcap,
        **arguments_of(quantized),
    )
    return scores, lse


@typed
def head_vote(
    scores: Tensor, lse: Tensor | None = None, *, mode: Vote = "softmax_sum", groups: int = 1
) -> Tensor:
    """One score a key from the scores of several heads.

    Args:
        scores: ``[B, Hq, S]`` float32, -inf (or NaN) where masked.
        lse: ``[B, Hq]`` float32, needed by ``softmax_sum``; a head whose lse is not finite does not vote.
        mode: ``softmax_sum`` (the heads' probabilities, TokenSelect's soft vote), ``sum``, ``mean`` or
            ``max`` of the scores themselves (R-KV, arXiv 2505.24133: ``max``).
        groups: heads are cut into this many equal groups that vote apart: 1 for a shared set, Hkv for one
            set a kv head.

    Returns:
        ``[B, groups, S]`` float32; -inf where all heads of the group are masked, so that padding never wins.

    Raises:
        RuntimeError: a shape, dtype, device or choice that is not as above.
    """
    out: Tensor = _namespace.op("head_vote")(
        _score_sides.float32(scores), _score_sides.float32(lse), mode=mode, groups=groups
    )
    return out


@typed
def decay_score_(
    score: Tensor,
    logits: Tensor,
    lse: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lengths: Tensor | None = None,
    heads: Heads = "kv_sum",
    power: int = 1,
    count: Tensor | None = None,
    last: Tensor | None = None,
    interval: Tensor | None = None,
    step: int = 0,
    alpha: float = 1.0,
) -> None:
    """One decode step of accumulated attention, in place: ``score = gamma * score + reduce_h p ** power``.

    p is ``exp(logits - lse)``, or ``logits`` itself where no lse is given. ``gamma=1`` is H2O (arXiv
    2306.14048), ``gamma<1`` A2SF (arXiv 2407.20485); ``count`` divides it (observed attention). ``last`` and
    ``interval`` are LazyEviction's clocks (arXiv 2506.15969): where the group's strongest p is at least
    ``alpha``, ``interval = max(interval, step - last)`` and then ``last = step``. A new slot starts with
    score 0, count 0, last ``step - 1`` and interval 0. For a chunk of m queries multiply by ``gamma ** m``
    and add a ``column_score`` with ``forgetting_weights``.

    Args:
        score: ``[B, H, S]`` float32, contiguous, updated.
        logits: ``[B, Hq, S]`` float32, of one query a head; NaN and -inf give p = 0.
        lse: ``[B, Hq]`` float32; a head whose lse is not finite gives p = 0.
        gamma: forgetting factor in (0, 1].
        lengths: ``[B]`` slots in use; the states of the others are left alone.
        heads: how the ``Hq / H`` heads of a state are reduced; H is Hq for ``none``, 1 for ``mean`` and
        ``rms``. power: 1 or 2.
        count, last, interval: ``[B, H, S]`` int32, contiguous, updated; any may be absent, but ``interval``
            needs ``last``.
        step: clock of this step, >= 0.
        alpha: activation threshold, >= 0.

    Raises:
        RuntimeError: a shape, dtype, device, choice or number that is not as above.
        ValueError: ``lengths`` outside [0, S] (checked as in ``column_score``).
    """
    if score.dim() == 3 and lengths is not None and _check.checked(score, lengths):
        _score_sides.check_bounds("decay_score_", "lengths", lengths, score.shape[2])
    _namespace.op("decay_score_")(
        score,
        _score_sides.float32(logits),
        _score_sides.float32(lse),
        gamma=gamma,
        lengths=_check.as_int32(lengths),
        heads=heads,
        power=power,
        count=count,
        last=last,
        interval=interval,
        step=step,
        alpha=alpha,
    )


@_namespace.fake("qk_scores")
def _qk_scores_fake(
    q: Tensor, k: Tensor, *, block_table: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    _score_sides.check_dim("qk_scores", "q", q, "[B, Hq, D]")
    _score_sides.check_dim("qk_scores", "k", k, "[B, Hkv, S, D]")
    keys = k.shape[2]
    if block_table is not None:
        _score_sides.check_dim("qk_scores", "block_table", block_table, "[B, Hkv, pages]")
        keys = keys * block_table.shape[2]
    scores = q.new_empty((*q.shape[:2], keys), dtype=torch.float32)
    return scores, q.new_empty(q.shape[:2], dtype=torch.float32)


@_namespace.fake("head_vote")
def _head_vote_fake(scores: Tensor, lse: Tensor | None = None, *, groups: int = 1, **_: Any) -> Tensor:
    _score_sides.check_dim("head_vote", "scores", scores, "[B, Hq, S]")
    return scores.new_empty((scores.shape[0], groups, scores.shape[2]))


@_namespace.fake("decay_score_")
def _decay_score_fake(score: Tensor, logits: Tensor, lse: Tensor | None = None, **_: Any) -> None:
    _score_sides.check_dim("decay_score_", "score", score, "[B, H, S]")
