"""Attention scores: wrappers and fake kernels of the score operators of ``torch.ops.tokencomp``."""

from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _namespace, _score_sides

Rows = Literal["sum", "max"]
Heads = Literal["none", "kv_sum", "kv_mean", "kv_max", "mean", "rms"]


@typed
def column_score(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    rows: Rows = "sum",
    heads: Heads = "none",
    power: int = 1,
) -> Tensor:
    """What each key receives: weighted column sums (or maxima) of the attention matrix, which is never
    formed.

    ``out[h, j] = sum_t w_t exp(z_tj - lse_t) ** power`` over the query rows t that see key j (``rows="max"``:
    the largest term), with ``z = scale <q_t, k_j>``, soft-capped if asked for, plus ``key_bias``; then
    reduced over heads. Accumulated attention (H2O, arXiv 2306.14048), forgetting (A2SF, arXiv 2407.20485),
    observation windows (SnapKV, arXiv 2404.14469), probes (ZipCache, arXiv 2405.14256), PageRank steps
    (Zero-TPrune, arXiv 2305.17328) and ramps (SpecPC, arXiv 2506.08373) are row weights: see
    ``tokencomp.scores``. With the true lse, ``power=1`` and all rows seeing a key, the scores of a head sum
    to the sum of the weights.

    Row t sits at position p and sees the keys j with ``max(starts, p - window + 1) <= j < min(lengths, p +
    1)``, the parts with p only under ``causal``. Where positions are used (``causal``, or ``q_position``
    given) a row outside ``[starts, lengths)`` is padding: it contributes nothing. So does a row of weight 0
    or of an lse that is not finite, and a pair whose logit is NaN. Terms below ``2**-126`` count as 0.
    Memory is O(T + S); the result is bit-identical from run to run and for any number of threads.

    Args:
        q: queries ``[B, Hq, T, D]``, float32, float16 or bfloat16, any strides with D contiguous, D <= 256.
            Products of bfloat16 are exact, sums float32.
        k: keys ``[B, Hkv, S, D]`` of the same dtype; query head h uses kv head ``h // (Hq / Hkv)``.
        lse: ``[B, Hq, T]`` natural log-sum-exp of the rows, as attention kernels return it, or from
            ``attention_lse``.
        scale: factor of the products; default ``D ** -0.5``.
        row_weight: ``[T]``, ``[B, T]``, ``[B, 1, T]`` or ``[B, Hq, T]``, finite and not negative; default 1.
            Rows of weight 0 cost next to nothing.
        key_bias: ``[B, S]`` or ``[B, Hkv, S]``, added to the logits; -inf masks a key.
        q_position: ``[T]`` or ``[B, T]`` integers, where the rows sit among the keys; a negative one is a
            hole. Default ``S - T + t``: the rows are the last T of S. With right-padded ragged batches pass
            the positions, e.g. ``lengths[:, None] - T + arange(T)``.
        lengths: ``[B]`` keys of each sequence, in [0, S].
        starts: ``[B]`` first key of each sequence, in [0, S]: left padding.
        window: sliding window in keys, the row's own included; needs ``causal``.
        softcap: ``z = softcap * tanh(z / softcap)`` before the bias.
        rows: ``sum`` or ``max`` over the rows; ``max`` needs no exponential per pair.
        heads: ``none`` gives ``[B, Hq, S]``; ``kv_sum``, ``kv_mean``, ``kv_max`` reduce each group to ``[B,
            Hkv, S]``; ``mean`` and ``rms`` (root of the mean square) all heads to ``[B, 1, S]``.
        power: 1, or 2 for sums of squared probabilities (KV-Compress, arXiv 2410.00161).

    Returns:
        ``[B, H*, S]`` float32; 0 for a key that nobody sees.

    Raises:
        RuntimeError: a shape, dtype, device or choice that is not as above.
        ValueError: values of ``row_weight``, ``key_bias``, ``lengths`` or ``starts`` that are not as above
            (on CUDA only under ``TOKENCOMP_CHECKED=1``; unchecked, they are clamped or count as 0).
    """
    side = _score_sides.attention_sides(
        "column_score", q, _score_sides.dense_keys(k), row_weight, key_bias, q_position, lengths, starts
    )
    out: Tensor = _namespace.op("column_score")(
        q,
        k,
        _score_sides.float32(lse),
        scale=_score_sides.scale(q, scale),
        **side,
        causal=causal,
        window=window,
        softcap=softcap,
        rows=rows,
        heads=heads,
        power=power,
    )
    return out


@typed
def diagonal_score(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    heads: Heads = "none",
    power: int = 1,
) -> Tensor:
    """What each offset receives: sums along the diagonals of the attention matrix, which is never formed.

    ``out[h, o]`` sums ``w_t exp(z_tj - lse_t) ** power`` over the pairs with ``position(t) - j = o``, for o
    in [0, S): the slashes of vertical-slash patterns (MInference, arXiv 2407.02490; FlexPrefill, arXiv
    2502.20766). Arguments, visibility and errors as in ``column_score``. Meant for a window of rows: keys
    are read once per 96 rows.

    Returns:
        ``[B, H*, S]`` float32.
    """
    side = _score_sides.attention_sides(
        "diagonal_score", q, _score_sides.dense_keys(k), row_weight, key_bias, q_position, lengths, starts
    )
    out: Tensor = _namespace.op("diagonal_score")(
        q,
        k,
        _score_sides.float32(lse),
        scale=_score_sides.scale(q, scale),
        **side,
        causal=causal,
        window=window,
        softcap=softcap,
        heads=heads,
        power=power,
    )
    return out


@typed
def attention_lse(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Natural log-sum-exp of each attention row, ``log sum_j exp z_tj`` over the keys the row sees.

    For rows whose attention was computed by a kernel that does not return it. Arguments, visibility and
    errors as in ``column_score``. Keys are split between workers where rows are few; the split depends on
    shapes only.

    Returns:
        ``[B, Hq, T]`` float32; -inf for a row that sees no key.
    """
    side = _score_sides.attention_sides(
        "attention_lse", q, _score_sides.dense_keys(k), None, key_bias, q_position, lengths, starts
    )
    del side["row_weight"]
    out: Tensor = _namespace.op("attention_lse")(
        q, k, scale=_score_sides.scale(q, scale), **side, causal=causal, window=window, softcap=softcap
    )
    return out


def _heads_out(heads: str, query_heads: int, kv_heads: int) -> int:
    if heads in ("mean", "rms"):
        return 1
    return query_heads if heads == "none" else kv_heads


@_namespace.fake("column_score")
def _column_score_fake(q: Tensor, k: Tensor, lse: Tensor, *, heads: str = "none", **_: Any) -> Tensor:
    _score_sides.check_dim("column_score", "q", q, "[B, Hq, T, D]")
    _score_sides.check_dim("column_score", "k", k, "[B, Hkv, S, D]")
    return q.new_empty(
        (q.shape[0], _heads_out(heads, q.shape[1], k.shape[1]), k.shape[2]), dtype=torch.float32
    )


@_namespace.fake("diagonal_score")
def _diagonal_score_fake(q: Tensor, k: Tensor, lse: Tensor, *, heads: str = "none", **_: Any) -> Tensor:
    _score_sides.check_dim("diagonal_score", "q", q, "[B, Hq, T, D]")
    _score_sides.check_dim("diagonal_score", "k", k, "[B, Hkv, S, D]")
    return q.new_empty(
        (q.shape[0], _heads_out(heads, q.shape[1], k.shape[1]), k.shape[2]), dtype=torch.float32
    )


@_namespace.fake("attention_lse")
def _attention_lse_fake(q: Tensor, k: Tensor, **_: Any) -> Tensor:
    _score_sides.check_dim("attention_lse", "q", q, "[B, Hq, T, D]")
    return q.new_empty(q.shape[:3], dtype=torch.float32)
