"""Prefill attention: wrapper and fake kernel of ``torch.ops.tokencomp.flash_prefill``."""

from typing import Any

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace, _page_checks, _prefill_lists, _score_sides
from tokencomp.ops.page_pools import PagePools, arguments_of

NAME = "flash_prefill"


@typed
def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    indptr: Tensor | None = None,
    indices: Tensor | None = None,
    column_ptr: Tensor | None = None,
    columns: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    key_bias: Tensor | None = None,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    quantized: PagePools | None = None,
    q_starts: Tensor | None = None,
    q_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of many queries, dense or over listed key blocks, and its log-sum-exps, in one pass.

    ``out_t = sum_j exp(z_tj - lse_t) v_j`` over the keys j that row t sees, with ``z = scale <q_t, k_j>``,
    soft-capped if asked for, plus ``key_bias``, and ``lse_t = log sum_j exp z_tj`` (natural logarithm, sinks
    included). The matrix is never formed (FlashAttention, arXiv 2205.14135); time follows the pairs that are
    listed and seen.

    Row t sits at position p and sees the keys j with ``max(starts, p - window + 1) <= j < min(lengths, p +
    1)``, the parts with p only under ``causal``. Where positions are used (``causal``, or ``q_position``
    given) a row outside ``[starts, lengths)`` is padding and sees nothing. Without lists that is all.

    **Lists** (MInference, arXiv 2407.02490; XAttention, arXiv 2503.16428) restrict this further: the rows of
    query block m, ``[m block_q, (m + 1) block_q)``, meet only the keys of the blocks that are listed for m,
    ``[i block_k, (i + 1) block_k)``, and single ``columns``. Who sees whom still applies to each pair, so a
    listed block behind the diagonal is masked where it must be, and a list without the diagonal block is
    allowed: its rows may end up with no key. The highest bit of an index, with which other kernels mark
    blocks that need the mask, is ignored. ``tokencomp.block_lists`` makes lists.

    **Pages** (``block_table``): keys and values are read where a paged cache holds them, working pages as
    they are, quantized ones a tile at a time through the numbers that ``kv_page_read`` gives in the dtype of
    q. Slot j of (b, kv head h) is slot ``j % P`` of page ``block_table[b, h, j // P]``, ``S = P * places``,
    and all that counts keys (lists, columns, window, bias, positions) counts slots. Heads may hold different
    numbers of slots: the rows are the last ones of each, so row t sits at slot ``lengths[b, h] - T + t``.
    Slots of an entry that names no page are masked.

    A row with no key gets output 0 and lse -inf (the sink's logit, where there are sinks). A pair whose
    logit is NaN counts as not seen; a logit of +inf makes the row's output NaN and its lse +inf. Values of
    keys outside ``[starts, lengths)`` are never read; values of other keys must be finite, even if nobody
    sees them. Results are bit-identical from run to run and for any number of threads.

    Args:
        q: queries ``[B, Hq, T, D]``, float32, float16 or bfloat16, any strides with D contiguous, D <= 256.
        k: keys ``[B, Hkv, S, D]`` of the same dtype; query head h uses kv head ``h // (Hq / Hkv)``. With
            ``block_table`` a pool ``[pages, Hx, P, D]``, Hx = 1 for pages of one head, Hx = Hkv for pages
            that hold all heads; P a power of two.
        v: values ``[B, Hkv, S, Dv]`` of the same dtype, Dv <= 256; with ``block_table`` a pool ``[pages, Hx,
            P, Dv]``.
        causal: whether a row sees only keys up to its position.
        scale: factor of the products; default ``D ** -0.5``.
        indptr: ``[B * H * blocks + 1]`` integers with ``blocks = ceil(T / block_q)`` and H one of 1, Hkv and
            Hq: the list of (b, h, m) is ``indices[indptr[i] : indptr[i + 1]]``, ``i = (b H + h) blocks + m``.
        indices: ``[n]`` ascending numbers of key blocks in each list; entries behind ``indptr[-1]`` are not
            used.
        column_ptr: as ``indptr``, for ``columns``; its H may be another.
        columns: ``[n]`` ascending keys in each list, none of them in a block of the same rows.
        block_q: rows of a query block, 64 or 128.
        block_k: keys of a block, 64 or 128.
        key_bias: ``[B, S]`` or ``[B, Hkv, S]``, added to the logits; -inf masks a key.
        q_position: ``[T]`` or ``[B, T]`` integers, where the rows sit among the keys; a negative one is a
            hole. Default ``S - T + t``: the rows are the last T of S; with ``block_table``, ``q_starts`` or
            ``q_counts`` the last of each sequence (and head).
        lengths: ``[B]``, with ``block_table`` also ``[B, Hkv]``: keys of each sequence, in [0, S].
        starts: ``[B]`` first key of each sequence, in [0, S]: left padding.
        window: sliding window in keys, the row's own included; needs ``causal``.
        softcap: ``z = softcap * tanh(z / softcap)`` before the bias.
        sinks: ``[Hq]`` logits that take part in the softmax and have no value.
        block_table: ``[B, Hkv, places]`` integers, for Hx = Hkv possibly one table expanded over the heads;
            -1 is no page. The upper four bits of an entry are the page's type: 0 a page of ``k`` and ``v``, i
            a page of the i-th pool of ``quantized``. Entries behind a length are not looked at.
        quantized: pools of quantized pages, for pages of 16, 32 or 64 slots and D = Dv.
        q_starts, q_counts: ``[B]`` which rows are no padding: ``q_counts[b]`` of them from ``q_starts[b]``
            on; default: from 0, all that follow. They are the last keys of the sequence, row t being key
            ``lengths - q_counts + t - q_starts``; the others see nothing.

    Returns:
        ``(out, lse)``: ``[B, Hq, T, Dv]`` of the dtype of q, contiguous, and ``[B, Hq, T]`` float32.

    Raises:
        RuntimeError: a shape, dtype, device or choice that is not as above.
        ValueError: values of the lists, ``block_table``, ``key_bias``, ``lengths``, ``starts``, ``sinks``,
            ``q_starts`` or ``q_counts`` that are not as above (on CUDA only under ``TOKENCOMP_CHECKED=1``;
            unchecked, list entries out of range are skipped, a key listed twice counts twice, columns out of
            order may be masked wrongly, and an entry that names no page is a hole).
    """
    keys = _page_checks.slots(k, block_table)
    side = _score_sides.attention_sides(NAME, q, keys, None, key_bias, q_position, lengths, starts)
    del side["row_weight"]
    if sinks is not None and _check.checked(sinks):
        _check.check_finite(NAME, "sinks", sinks)
    if block_table is not None:
        _page_checks.check_table(NAME, block_table, lengths, k, quantized)
    if q.dim() == 4:
        for name, rows in (("q_starts", q_starts), ("q_counts", q_counts)):
            if rows is not None and _check.checked(rows):
                _check.check_within(NAME, name, rows, 0, q.shape[2], "T")
    lists = (indptr, indices, column_ptr, columns)
    if q.dim() == k.dim() == 4 and keys is not None and block_q > 0 and block_k > 0:
        _prefill_lists.check(NAME, q, keys, *lists, block_q, block_k)
    indptr, indices, column_ptr, columns = (_check.as_int32(t) for t in lists)
    out: Tensor
    out, lse = _namespace.op(NAME)(
        q,
        k,
        v,
        scale=_score_sides.scale(q, scale),
        indptr=indptr,
        indices=indices,
        column_ptr=column_ptr,
        columns=columns,
        block_q=block_q,
        block_k=block_k,
        **side,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=_check.as_float32(sinks),
        block_table=_page_checks.as_table(block_table),
        q_starts=_check.as_int32(q_starts),
        q_counts=_check.as_int32(q_counts),
        **arguments_of(quantized),
    )
    return out, lse


@_namespace.fake(NAME)
def _flash_prefill_fake(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    _score_sides.check_dim(NAME, "q", q, "[B, Hq, T, D]")
    _score_sides.check_dim(NAME, "v", v, "[B, Hkv, S, Dv]")
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
