"""The paged KV cache: wrappers and fake kernels of the operators that compute with slots.

Pages, ``block_table`` and ``lengths`` are those of ``tokencomp.ops.kvcache``.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace
from tokencomp.ops.kvcache import as_table, check_pages

Layout = Literal["half", "interleaved"]
Similarity = Literal["k", "kv"]
Values = Literal["mean", "sum"]
Keys = Literal["keep", "mean", "direction"]


@typed
def rope_shift_(
    k_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    old_position: Tensor,
    new_position: Tensor,
    inv_freq: Tensor,
    *,
    layout: Layout = "half",
) -> None:
    """Turn keys that carry a rotary position from their old to their new one, in place.

    Channels i and j of a pair become ``(k_i cos - k_j sin, k_j cos + k_i sin)`` of the angle ``(new - old) *
    inv_freq``, computed to fp32 accuracy at any distance and written once in the pages' dtype. Exact for
    default, linear, Llama-3 and YaRN frequencies (``tokencomp.rope.inverse_frequencies``; YaRN's factor on
    the keys is in them already), wrong for dynamic NTK, whose frequencies change with the length. Errors of
    16-bit keys add up over repeated turns. StreamingLLM (arXiv 2309.17453) turns to the place in the cache.

    Args:
        k_pages: ``[N, Hx, P, D]``, changed. block_table, lengths: as in ``kv_append_``.
        old_position, new_position: ``[B, Hkv, S]`` int32 by slot, S at least the longest length.
        inv_freq: ``[pairs]`` float32, radians a position; channels from ``2 * pairs`` on stay as they are.
        layout: pairs are ``(i, i + pairs)`` for ``half`` (Hugging Face), ``(2 i, 2 i + 1)`` for
            ``interleaved``.

    Raises:
        RuntimeError: a shape, dtype, device or choice that is not as above; a slot without a page (values as
            in ``kv_append_``).
    """
    _namespace.op("rope_shift_")(
        k_pages,
        as_table(block_table),
        as_table(lengths),
        _check.as_int32(old_position),
        _check.as_int32(new_position),
        _check.as_float32(inv_freq),
        layout=layout,
    )


@typed
def evict_assign(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    keep_index: Tensor,
    keep_count: Tensor,
    member_index: Tensor,
    *,
    similarity: Similarity = "k",
    clamp: bool = True,
    min_similarity: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The kept slot that every member is most similar to, without a matrix of members and kept slots.

    ``k``: cosine of keys (D2O, arXiv 2406.13035). ``kv``: cosine of keys times cosine of values, each clamped
    at 0 first, lest two opposites make a match (EMS, arXiv 2412.08521). A best similarity below
    ``min_similarity`` is EMS's zero class: the member goes into nothing.

    Args:
        k_pages, v_pages, block_table, lengths: as in ``kv_append_``.
        keep_index: ``[B, Hkv, K]`` int32 kept slots, ascending. keep_count: ``[B, Hkv]`` int32.
        member_index: ``[B, Hkv, M]`` int32, slots that are not kept, -1 for none.
        clamp: False leaves negative cosines as they are.

    Returns:
        ``target`` ``[B, Hkv, M]`` int32, ranks in ``keep_index`` (the lower of several equal), -1 for none;
        ``similarity`` ``[B, Hkv, M]`` float32, -inf where there is no kept slot or no number.

    Raises:
        RuntimeError: a shape, dtype, device or choice that is not as above; lists that are not as above
            (values as in ``kv_append_``).
    """
    target, value = _namespace.op("evict_assign")(
        k_pages,
        v_pages,
        as_table(block_table),
        as_table(lengths),
        _check.as_int32(keep_index),
        _check.as_int32(keep_count),
        _check.as_int32(member_index),
        similarity=similarity,
        clamp=clamp,
        min_similarity=min_similarity,
    )
    return target, value


@typed
def evict_merge_(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    keep_index: Tensor,
    keep_count: Tensor,
    member_index: Tensor,
    target: Tensor,
    weight: Tensor,
    center: Tensor,
    *,
    values: Values = "mean",
    keys: Keys = "keep",
    by_norm: bool = False,
) -> None:
    """Mix members into the kept slots they go to, in place, before the row is compacted.

    Kept slot c of rank r, with own weight ``a = center[r]`` and the members i of ``target[i] = r``, becomes
    ``(a V_c + sum_i w_i V_i) / (a + sum_i w_i)`` (``mean``) or ``V_c + sum_i w_i V_i`` (``sum``). Keys stay
    (``keep``), become the same mean (``mean``), or the mean of directions times the mean of lengths
    (``direction``). Sums are fp32 in the order of the lists; a kept slot without members, or with no weight
    at all, is left alone. So are made

    - EMS (arXiv 2412.08521): weights are scores, keys ``direction``;
    - D2O (arXiv 2406.13035): ``w = exp(similarity)``, ``a = e``, keys ``mean``;
    - CaM (ICML 2024): ``sum`` with ``w = draw / m`` and a member listed once for each of its m targets;
    - norm-weighted values (kvpress): ``w = max(similarity, 0)``, ``a = 1``, ``by_norm``.

    Args:
        k_pages, v_pages, block_table, lengths: as in ``kv_append_``.
        keep_index, keep_count, member_index: as in ``evict_assign``; a member may be listed several times.
        target: ``[B, Hkv, M]`` int32 ranks in ``keep_index``, -1: the member goes into nothing.
        weight: ``[B, Hkv, M]`` float32, finite and >= 0. center: ``[B, Hkv, K]`` likewise.
        by_norm: multiply every weight by ``|V_i| / (|V_i| + |V_c|)``.

    Raises:
        RuntimeError: a shape, dtype, device or choice that is not as above; lists or ranks that are not as
            above (values as in ``kv_append_``).
        ValueError: a weight that is not finite or negative (looked at where values are).
    """
    if _check.checked(weight, center):
        _check.check_weight("evict_merge_", weight)
        _check.check_weight("evict_merge_", center, "center")
    _namespace.op("evict_merge_")(
        k_pages,
        v_pages,
        as_table(block_table),
        as_table(lengths),
        _check.as_int32(keep_index),
        _check.as_int32(keep_count),
        _check.as_int32(member_index),
        _check.as_int32(target),
        _check.as_float32(weight),
        _check.as_float32(center),
        values=values,
        keys=keys,
        by_norm=by_norm,
    )


@_namespace.fake("rope_shift_")
def _rope_shift_fake(k_pages: Tensor, *_: Any, **__: Any) -> None:
    check_pages("rope_shift_", k_pages)


@_namespace.fake("evict_assign")
def _evict_assign_fake(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    keep_index: Tensor,
    keep_count: Tensor,
    member_index: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    check_pages("evict_assign", k_pages)
    target = member_index.new_empty(member_index.shape)
    return target, torch.empty_like(target, dtype=torch.float32)


@_namespace.fake("evict_merge_")
def _evict_merge_fake(k_pages: Tensor, *_: Any, **__: Any) -> None:
    check_pages("evict_merge_", k_pages)
