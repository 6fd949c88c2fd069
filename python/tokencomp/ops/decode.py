"""Attention of a decode step over paged keys and values: wrappers and fake kernels of the decode family."""

from typing import Any

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace, _score_sides
from tokencomp.ops.page_pools import PagePools, arguments_of, check_entries


@typed
def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    *,
    scale: float | None = None,
    index: Tensor | None = None,
    index_count: Tensor | None = None,
    key_bias: Tensor | None = None,
    position: Tensor | None = None,
    q_position: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    logits_out: bool = False,
    quantized: PagePools | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the newest ``T`` tokens over the slots of a paged cache, all of them or a list.

    ``z = scale <q, k_s>``, soft-capped if asked for, plus ``key_bias[s]``; ``p = softmax(z)`` over the slots
    that the row sees, and the sink if there is one; ``out = sum_s p_s v_s``. Every key and value is read once
    for all heads of its group and all T rows; long rows are cut into parts that are merged in order
    (flash-decoding, arXiv 2311.01282), so the result does not depend on the number of threads.

    Args:
        q: ``[B, Hq, T, D]``, float32, float16 or bfloat16, T <= 8, D <= 256. With ``causal`` the T rows are
            those of the last T slots of every (b, h): row t sees slots below ``lengths - (T - 1 - t)``.
        k_pages, v_pages: ``[N, Hx, P, D]`` and ``[N, Hx, P, Dv]`` of the dtype of q, P 16, 32 or 64, any
            strides with a contiguous last dimension. Hx = 1: a page belongs to one (sequence, kv head); Hx =
            Hkv: a page holds all heads, as in FlashInfer and vLLM, whose buffers are permuted views. Without
            a table: dense keys and values ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``, slots are their rows.
        block_table: ``[B, Hkv, max_pages]`` int32: the page of slots ``[i P, (i + 1) P)``, -1 for none (its
            slots are not seen). Any strides with a contiguous last dimension, so an engine's ``[B,
            max_pages]`` is expanded. The upper four bits name the pool: 0 ``k_pages`` and ``v_pages``, i the
            i-th of ``quantized``. None: no pages.
        lengths: ``[B, Hkv]`` slots in use.
        scale: factor of the products; default ``D ** -0.5``.
        index: ``[B, Hkv, K]`` distinct slots to look at, -1 for a hole; others are not read (ascending is
            fastest).
        index_count: ``[B, Hkv]`` entries of each list that count; default K.
        key_bias: ``[B, Hkv, S]`` or ``[B, S]`` float32 by slot, finite or -inf, S >= lengths.
        position: ``[B, Hkv, S]`` int32, the original position of each slot, ascending, for ``window``;
            default the slot itself.
        q_position: ``[B, T]`` positions of the rows, for ``window``; default those of the rows' own slots.
        window: row t sees only slots with ``position > q_position[t] - window``.
        softcap: ``z = softcap * tanh(z / softcap)``.
        sinks: ``[Hq]`` a logit per head that takes its share of the softmax and gives nothing (gpt-oss).
        logits_out: also return z.
        quantized: pools of quantized pages (P as the working ones, D = Dv), which the table may name beside
            working ones in any order, in one launch: every type in one row, keys and values in tiers of their
            own, each with maps per channel. The result is that of the dequantized values. They are not
            formed: with ``x = s c + m`` per token ``<q, x> = s <q, c> + m sum q`` and ``sum p x = sum (p s)
            c + sum p m``; per channel ``<q, x> = <q s, c> + <q, m>`` and ``sum p x = s sum p c + m sum p``
            (KIVI, arXiv 2402.02750; QServe, arXiv 2405.04532). Groups that no vector holds, and pages that a
            list points into, are dequantized row by row to the dtype of q.

    Returns:
        ``out`` ``[B, Hq, T, Dv]`` of the dtype of q; ``lse`` ``[B, Hq, T]`` float32, natural logarithm, sink
        included; ``logits`` ``[B, Hq, T, S]`` float32 by slot, S = ``max_pages * P`` or that of dense keys,
        -inf where not seen (no slots unless ``logits_out``). A row that sees nothing: out 0, lse -inf (or its
        sink).

    Raises:
        RuntimeError: a shape, dtype, device, stride or number that is not as above.
        ValueError: lengths, table or list out of range, a bias that is NaN or +inf. Checked only under
            ``TOKENCOMP_CHECKED=1``, on every device: a decode step is too short for it. Unchecked, such
            slots are not seen.
    """
    sides = {
        "index": _check.as_int32(index),
        "index_count": _check.as_int32(index_count),
        "key_bias": _by_slot(key_bias, torch.float32),
        "position": _by_slot(position, torch.int32),
        "q_position": _check.as_int32(_with_batch(q_position)),
        "sinks": None if sinks is None else sinks.to(torch.float32).contiguous(),
    }
    lengths = lengths if lengths.dtype == torch.int32 and lengths.is_contiguous() else _as_int32(lengths)
    if _check.asked() and _check.checked(lengths, block_table, *sides.values()):
        _check_values(k_pages, block_table, lengths, sides, quantized)
    out: tuple[Tensor, Tensor, Tensor] = _namespace.op("paged_decode")(
        q,
        k_pages,
        v_pages,
        block_table,
        lengths,
        scale=_score_sides.scale(q, scale),
        window=window,
        softcap=softcap,
        causal=causal,
        logits_out=logits_out,
        **sides,
        **arguments_of(quantized),
    )
    return out


@typed
def merge_states(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys from the attention over each.

    ``lse = log sum_s exp lse_s``, ``out = sum_s exp(lse_s - lse) out_s``, in order of s, in float32.

    Args:
        out: ``[S, ..., Dv]``, float32, float16 or bfloat16, contiguous.
        lse: ``[S, ...]`` float32, natural logarithm; -inf (or NaN) for a part without keys, whose ``out`` is
            not looked at.

    Returns:
        ``out`` ``[..., Dv]``, ``lse`` ``[...]``; 0 and -inf where no part has keys.

    Raises:
        RuntimeError: a shape, dtype, device or stride that is not as above.
    """
    merged: tuple[Tensor, Tensor] = _namespace.op("merge_states")(out, lse)
    return merged


def _as_int32(t: Tensor) -> Tensor:
    converted = _check.as_int32(t)
    assert converted is not None
    return converted


def _check_values(
    k_pages: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    sides: dict[str, Tensor | None],
    quantized: PagePools | None,
) -> None:
    op, slots = "paged_decode", _slots(k_pages, block_table)
    covered = min(
        [slots] + [t.shape[-1] for name in ("key_bias", "position") if (t := sides[name]) is not None]
    )
    _check.check_within(op, "lengths", lengths, 0, covered, "S")
    if block_table is not None:
        check_entries(op, block_table, k_pages.shape[0], quantized)
    index, count, bias = sides["index"], sides["index_count"], sides["key_bias"]
    if index is not None:
        _check.check_range(op, "index", index, -1, slots, "S")
    if index is not None and count is not None:
        _check.check_within(op, "index_count", count, 0, index.shape[-1], "K")
    if bias is not None:
        _check.check_bias(op, bias)


def _slots(k_pages: Tensor, block_table: Tensor | None) -> int:
    return k_pages.shape[2] * (1 if block_table is None else block_table.shape[-1])


def _with_batch(t: Tensor | None) -> Tensor | None:
    return t[None] if t is not None and t.dim() == 1 else t


def _by_slot(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``[B, S]`` as ``[B, 1, S]``, numbers of any kind as ``dtype``; strides are kept."""
    if t is None:
        return None
    wide = t[:, None] if t.dim() == 2 else t
    if wide.dtype == dtype or wide.dtype == torch.bool or wide.is_complex():
        return wide
    return wide if dtype == torch.int32 and wide.is_floating_point() else wide.to(dtype)


@_namespace.fake("paged_decode")
def _paged_decode_fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    *,
    logits_out: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    for name, t, shape in (
        ("q", q, "[B, Hq, T, D]"),
        ("k_pages", k_pages, "[N, Hx, P, D]"),
        ("v_pages", v_pages, "[N, Hx, P, D]"),
        ("block_table", block_table, "[B, Hkv, max_pages]"),
        ("lengths", lengths, "[B, Hkv]"),
    ):
        if t is not None and t.dim() != shape.count(",") + 1:
            raise RuntimeError(f"paged_decode: {name} must have shape {shape}, got {list(t.shape)}")
    rows = q.shape[:3]
    slots = _slots(k_pages, block_table) if logits_out else 0
    lse, logits = (q.new_empty(shape, dtype=torch.float32) for shape in (rows, (*rows, slots)))
    return q.new_empty((*rows, v_pages.shape[3])), lse, logits


@_namespace.fake("merge_states")
def _merge_states_fake(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    if out.dim() < 2:
        raise RuntimeError(f"merge_states: out must have shape [S, ..., Dv], got {list(out.shape)}")
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])
