"""Scores from the attention that keys have received: A2SF, H2O, observed attention, TOVA, ZipCache, ZipVL.

The attention matrix is never formed. Where lengths are given the rows of ``q`` are the last T of the S slots,
padding included, so that in a prefill row t is token t.
"""

from typing import Literal

import torch
from torch import Tensor

from tokencomp import ops, scores
from tokencomp.ops.score import Heads
from tokencomp.recipes.common import require, require_dims

Norm = Literal["none", "rows_all", "rows_probe"]


def accumulated_attention(
    q: Tensor,
    k: Tensor,
    *,
    gamma: float = 1.0,
    corrected: bool = False,
    heads: Heads = "kv_sum",
    scale: float | None = None,
    lse: Tensor | None = None,
    lengths: Tensor | None = None,
    truncate: float = 0.0,
) -> Tensor:
    """Attention that each key received from all queries, older queries forgotten by ``gamma``.

    ``out[j] = sum_t gamma ** (n - 1 - t) P[t, j]``, the newest query t = n - 1 counting 1. ``gamma=1`` is H2O
    (arXiv 2306.14048), ``gamma<1`` A2SF (arXiv 2407.20485). ``corrected`` divides by the weight of the rows
    that see the key, ``(1 - gamma ** n_j) / (1 - gamma)``: observed attention, free of the bias towards early
    keys. Keep with ``select_per_head(out, budget, tail=recent)``; update in decode with ``decay_score_``.

    Args:
        q, k: ``[B, Hq, T, D]`` and ``[B, Hkv, S, D]``; the rows are the last T slots.
        gamma: forgetting factor in (0, 1].
        heads: reduction, as in ``column_score`` (``mean``: one set a layer, as PrefixKV, arXiv 2412.03409).
        lse: ``[B, Hq, T]`` of the rows, computed if not given.
        lengths: ``[B]`` keys of each sequence, right-padded; the newest query is the one at ``lengths - 1``.
        truncate: what a key may lose so that old rows are skipped, see ``forgetting_weights``.

    Returns:
        ``[B, H*, S]`` float32, 0 at padding.

    Raises:
        ValueError: a shape or number that is not as above; RuntimeError as in ``column_score``.
    """
    op = "accumulated_attention"
    require_dims(op, "q", q, "[B, Hq, T, D]")
    require_dims(op, "k", k, "[B, Hkv, S, D]")
    require(0 < gamma <= 1, op, "gamma", "in (0, 1]", gamma)
    rows, keys = q.shape[2], k.shape[2]
    weight = _forgetting(rows, keys, gamma, truncate, lengths, q.device)
    if lse is None:
        lse = ops.attention_lse(q, k, scale=scale, lengths=lengths)
    out = ops.column_score(q, k, lse, scale=scale, row_weight=weight, lengths=lengths, heads=heads)
    if not corrected:
        return out
    seen = scores.count_correction(keys, rows, row_weight=weight, lengths=lengths)
    return _divide(out, seen)


def accumulate_chunk(
    score: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    gamma: float = 1.0,
    heads: Heads = "kv_sum",
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Carry accumulated scores over a chunk of m queries: ``gamma ** m * score``, extended by zeros, plus the
    chunk's own (chunked prefill of A2SF, arXiv 2407.20485, and H2O, arXiv 2306.14048).

    Args:
        score: ``[B, H*, S0]`` float32 of the keys before the chunk.
        q: ``[B, Hq, m, D]``, the chunk's queries.
        k: ``[B, Hkv, S0 + m, D]``, survivors and then the chunk's keys.
        gamma, heads, scale, lse: as in ``accumulated_attention``.

    Returns:
        ``[B, H*, S0 + m]`` float32.

    Raises:
        ValueError: a shape or number that is not as above; RuntimeError as in ``column_score``.
    """
    op = "accumulate_chunk"
    require_dims(op, "score", score, "[B, H, S]")
    own = accumulated_attention(q, k, gamma=gamma, heads=heads, scale=scale, lse=lse)
    expected = [*own.shape[:2], own.shape[2] - q.shape[2]]
    require(list(score.shape) == expected, op, "score", f"of shape {expected}", list(score.shape))
    return own + torch.nn.functional.pad(score * gamma ** q.shape[2], (0, q.shape[2]))


def tova_score(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention of the last query, averaged over all query heads: one score a key and layer (TOVA, arXiv
    2401.06104).

    Keep with ``select_per_head(out, cache_size)``: the current token competes too.

    Args:
        q: ``[B, Hq, D]``, the last query of each sequence.
        k: ``[B, Hkv, S, D]``.
        softcap: of the logits, as in ``qk_scores``.
        lengths: ``[B]`` keys of each sequence.

    Returns:
        ``[B, 1, S]`` float32, -inf at padding.

    Raises:
        ValueError, RuntimeError: as in ``qk_scores``.
    """
    require_dims("tova_score", "q", q, "[B, Hq, D]")
    logits, lse = ops.qk_scores(q, k, scale=scale, softcap=softcap, lengths=lengths)
    return ops.head_vote(logits, lse, mode="softmax_sum") / q.shape[1]


def probe_saliency(
    q: Tensor,
    k: Tensor,
    *,
    row_weight: Tensor | None = None,
    norm: Norm = "rows_probe",
    heads: Heads = "kv_sum",
    scale: float | None = None,
    lse: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention received from probe rows, normalised for causality (ZipCache, arXiv 2405.14256; ZipVL, arXiv
    2410.08584).

    Args:
        q, k: ``[B, Hq, T, D]`` and ``[B, Hkv, S, D]``; the rows are the last T slots.
        row_weight: ``[T]`` or ``[B, T]``, which rows are probes; default ``probe_weights(T)``.
        norm: divide by the probes that see the key (``rows_probe``, the paper), by all rows that see it
            (``rows_all``, the official code), or not at all. The two rank differently.
        heads, scale, lse: as in ``column_score``; the lse is computed if not given.
        lengths: ``[B]`` keys of each sequence; then give the probes of each, the default may miss its end.

    Returns:
        ``[B, H*, S]`` float32, 0 for a key that no probe sees.

    Raises:
        ValueError: a shape or choice that is not as above; RuntimeError as in ``column_score``.
    """
    op = "probe_saliency"
    require_dims(op, "q", q, "[B, Hq, T, D]")
    require_dims(op, "k", k, "[B, Hkv, S, D]")
    require(norm in ("none", "rows_all", "rows_probe"), op, "norm", "none, rows_all or rows_probe", norm)
    rows, keys = q.shape[2], k.shape[2]
    weight = scores.probe_weights(rows, device=q.device) if row_weight is None else row_weight
    if lse is None:
        lse = ops.attention_lse(q, k, scale=scale, lengths=lengths)
    out = ops.column_score(q, k, lse, scale=scale, row_weight=weight, lengths=lengths, heads=heads)
    if norm == "none":
        return out
    counted = weight if norm == "rows_probe" else torch.ones(rows, device=q.device)
    return _divide(out, scores.count_correction(keys, rows, row_weight=counted, lengths=lengths))


def zipvl_select(
    mass: Tensor, normalised: Tensor, tau: float = 0.975, *, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many keys from one ranking, which ones from another (ZipVL, arXiv 2410.08584).

    The count is the fewest keys of largest ``mass`` that hold a share ``tau`` of it; kept are as many keys of
    largest ``normalised`` score.

    Args:
        mass: ``[R, S]`` float, ``probe_saliency(norm="none")``.
        normalised: ``[R, S]`` float, ``probe_saliency(norm="rows_probe")``.
        tau: share in [0, 1].
        lengths: ``[R]`` keys of each row.

    Returns:
        ``index`` ``[R, S]`` int32, ascending, then -1; ``count`` ``[R]`` int32.

    Raises:
        ValueError, RuntimeError: a shape or number that is not as above.
    """
    op = "zipvl_select"
    require_dims(op, "mass", mass, "[R, S]")
    require(
        normalised.shape == mass.shape,
        op,
        "normalised",
        f"of shape {list(mass.shape)}",
        list(normalised.shape),
    )
    _, count = ops.topp_select(mass, tau, mass.shape[1], lengths=lengths)
    return ops.topk_select(normalised, mass.shape[1], k_per_row=count, lengths=lengths)


def attention_sinks(mean_attention: Tensor, theta: float = 0.1) -> Tensor:
    """``[B, H, S]`` bool: keys whose mean received attention exceeds ``theta``, but the first of them (ACT,
    arXiv 2406.15765).

    Args:
        mean_attention: ``[B, H, S]``, ``accumulated_attention(corrected=True, heads="none")``.
        theta: threshold, >= 0. The exempt first one is the beginning-of-sequence token.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    require_dims("attention_sinks", "mean_attention", mean_attention, "[B, H, S]")
    require(theta >= 0, "attention_sinks", "theta", ">= 0", theta)
    sink = mean_attention > theta
    return sink & (sink.cumsum(-1) > 1)


def cls_attention(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of the CLS token to each patch, averaged over heads (FasterVLM, arXiv 2412.01818).

    The softmax runs over all tokens, CLS included, and is not renormalised. The sum over layers is VTC-CLS
    (arXiv 2412.05819).

    Args:
        q, k: ``[B, Hq, N, D]`` and ``[B, Hkv, N, D]`` of one encoder layer; token 0 is CLS.

    Returns:
        ``[B, N - 1]`` float32.

    Raises:
        ValueError: ``q`` without tokens or of another rank; RuntimeError as in ``column_score``.
    """
    require_dims("cls_attention", "q", q, "[B, Hq, N, D]")
    require(q.shape[2] >= 1, "cls_attention", "N", ">= 1", q.shape[2])
    row = q[:, :, :1]
    lse = ops.attention_lse(row, k, scale=scale, causal=False)
    return ops.column_score(row, k, lse, scale=scale, causal=False, heads="mean")[:, 0, 1:].contiguous()


def _forgetting(
    rows: int, keys: int, gamma: float, truncate: float, lengths: Tensor | None, device: torch.device
) -> Tensor:
    """``[T]``, or ``[B, T]`` with lengths: the row at ``lengths - 1`` counts 1, later ones are padding."""
    weight = scores.forgetting_weights(rows, gamma, device=device, truncate=truncate)
    if lengths is None or rows == 0:
        return weight
    later = torch.arange(rows, device=device) + (keys - lengths[:, None].long())
    return torch.where(later < rows, weight[later.clamp(0, rows - 1)], 0.0)


def _divide(score: Tensor, count: Tensor) -> Tensor:
    """``score`` ``[B, H, S]`` by ``count`` ``[B, S]``, 0 where nobody counts."""
    count = count[:, None]
    return torch.where(count > 0, score / torch.where(count > 0, count, 1.0), 0.0)
