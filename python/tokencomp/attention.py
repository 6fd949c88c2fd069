"""Attention with torch's signature that also says what each key received.

The output and its log-sum-exps come from our kernels or from torch's (``attention_kernels``, argument
``kernel``, field ``Attention.kernel``), column sums from ``tokencomp.ops``, in O(T + S) memory. What torch's
kernels do not cover (soft caps, sinks, sums under an arbitrary mask) is computed exactly in blocks of rows:
O(block * S) memory, never T * S.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp import attention_kernels, ops
from tokencomp._typed import typed
from tokencomp.attention_kernels import Kernel, Rule, key_bias
from tokencomp.ops.score import Heads

ROW_BLOCK = 128
HEADS = ("none", "kv_sum", "kv_mean", "kv_max", "mean", "rms")
NAME = "scaled_dot_product_attention"


class Attention(NamedTuple):
    """What attention computed: ``output`` as torch returns it and, where asked for, ``lse`` ``[B, Hq, T]``
    and column sums ``columns`` ``[B, H*, S]``, both float32 and without gradient. ``kernel`` says what made
    the output: ``tokencomp`` or ``torch``.
    """

    output: Tensor
    lse: Tensor | None = None
    columns: Tensor | None = None
    kernel: str = "torch"


@typed
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_columns: bool = False,
    column_weights: Tensor | None = None,
    heads: Heads = "none",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor | Attention:
    """``torch.nn.functional.scaled_dot_product_attention`` and, on request, its log-sum-exps and column sums.

    ``columns[h, j] = sum_t w_t p_tj`` is the attention that key j receives (H2O, arXiv 2306.14048), with
    ``p`` the probabilities before dropout and ``w`` the column weights, e.g.
    ``tokencomp.scores.forgetting_weights``. The attention matrix is never formed.

    **Causal rows are the last T of the S keys**: row t sees the keys ``j <= S - T + t``, as decoding needs.
    Torch aligns at the top left, ``j <= t``; both are the same for T = S.

    Args:
        q: queries ``[B, Hq, T, D]``.
        k: keys ``[B, Hkv, S, D]``.
        v: values ``[B, Hkv, S, Dv]``.
        attn_mask: as in torch: bool (True is seen) or added to the logits, broadcast to ``[B, Hq, T, S]``.
        dropout_p: as in torch.
        is_causal: see above; excludes ``attn_mask``.
        scale: factor of the products; default ``D ** -0.5``.
        enable_gqa: allow Hkv < Hq; query head h uses kv head ``h // (Hq / Hkv)``.
        return_lse: natural log-sum-exp of each row, sinks included; -inf for a row that sees no key.
        return_columns: column sums, with weights 1 unless ``column_weights`` are given.
        column_weights: weights of the rows, not negative, ``[T]``, ``[B, T]``, ``[B, 1, T]`` or ``[B, Hq,
            T]``; they ask for columns too.
        heads: reduction of the columns over heads, as in ``ops.column_score``.
        key_mask: ``[B, S]`` bool, False is padding that nobody sees; excludes ``attn_mask``.
        query_mask: ``[B, T]`` bool, False is a padding row, which adds nothing to the columns. Default under
            ``is_causal``: the rows' own places in ``key_mask``.
        window: sliding window in keys, the row's own included; needs ``is_causal``.
        softcap: ``z = softcap * tanh(z / softcap)`` before masks.
        sinks: ``[Hq]`` logits that take part in the softmax and have no value (gpt-oss).
        kernel: ``torch``: torch's kernels. ``tokencomp``: ``ops.paged_decode`` for up to 8 rows, else
            ``ops.flash_prefill``; they take no ``attn_mask`` (but the same for all heads of a single row), no
            dropout and no gradients, float32, float16 or bfloat16, head dimensions up to 256. ``auto``:
            tokencomp on the CPU for up to 8 rows and for 32 or more, where it takes the call; else torch.

    Returns:
        The output ``[B, Hq, T, Dv]``, or ``Attention`` where log-sum-exps or columns are asked for.

    Raises:
        ValueError: arguments that exclude each other, or heads, masks or sinks of a wrong shape, or a call
            that ``kernel="tokencomp"`` does not take.
        RuntimeError: what ``torch`` or ``ops.column_score`` refuse; the latter takes float32, float16 and
            bfloat16, D <= 256.
    """
    result = attend(
        q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse,
        return_columns=return_columns, column_weights=column_weights, heads=heads, key_mask=key_mask,
        query_mask=query_mask, window=window, softcap=softcap, sinks=sinks, kernel=kernel,
    )  # fmt: skip
    return result.output if result.lse is None and result.columns is None else result


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_columns: bool = False,
    column_weights: Tensor | None = None,
    heads: Heads = "none",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Attention:
    """``scaled_dot_product_attention`` that always returns ``Attention``."""
    _check_shapes(q, k, v, enable_gqa, sinks, heads)
    _check_devices(
        q, k=k, v=v, attn_mask=attn_mask, key_mask=key_mask, query_mask=query_mask, sinks=sinks,
        column_weights=column_weights,
    )  # fmt: skip
    _check_masks(q, k, attn_mask, is_causal, key_mask, query_mask, window, softcap)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    rule = Rule(factor, attn_mask, key_mask, is_causal, window, softcap, sinks, dropout_p)
    columns = return_columns or column_weights is not None
    weights = _row_weights(q, k, column_weights, query_mask, rule) if columns else None
    if attention_kernels.takes(NAME, kernel, q, k, v, rule):
        ours = attention_kernels.compute(q, k, v, weights, rule, columns, heads)
        return Attention(ours.output, ours.lse if return_lse else None, ours.columns, "tokencomp")

    if softcap is not None or sinks is not None:
        output, lse, summed = _by_rows(q, k, v, weights, rule, columns)
    else:
        output = _by_torch(q, k, v, rule)
        if not (return_lse or columns):
            return Attention(output)
        if attn_mask is None:
            return Attention(output, *_by_operators(q, k, weights, rule, return_lse, columns, heads))
        _, lse, summed = _by_rows(q.detach(), k.detach(), None, weights, rule, columns)
    assert output is not None
    reduced = None if summed is None else _reduce_heads(summed, k.shape[1], heads)
    return Attention(output, lse if return_lse else None, reduced)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    mask, square = rule.mask, False
    if mask is None:
        simple = rule.key_mask is None and rule.window is None
        square = simple and rule.causal and q.shape[2] == k.shape[2]
        if not simple or (rule.causal and not square and q.shape[2] > 1):
            mask = _visible(rule, q, k, 0, q.shape[2])
    return functional.scaled_dot_product_attention(
        q, k, v, mask, rule.dropout, square, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _by_operators(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    rule: Rule,
    return_lse: bool,
    columns: bool,
    heads: Heads,
) -> tuple[Tensor | None, Tensor | None]:
    q, k, bias = q.detach(), k.detach(), key_bias(rule, q, k)
    lse = ops.attention_lse(q, k, scale=rule.scale, key_bias=bias, causal=rule.causal, window=rule.window)
    summed = None
    if columns:
        summed = ops.column_score(
            q, k, lse, scale=rule.scale, row_weight=weights, key_bias=bias, causal=rule.causal,
            window=rule.window, heads=heads,
        )  # fmt: skip
    return lse if return_lse else None, summed


def _by_rows(
    q: Tensor, k: Tensor, v: Tensor | None, weights: Tensor | None, rule: Rule, columns: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Output, log-sum-exp and columns ``[B, Hq, S]`` under any rule, a block of rows at a time."""
    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, dim=1)
    values = None if v is None else v.float().repeat_interleave(group, dim=1)
    summed = q.new_zeros(q.shape[0], q.shape[1], k.shape[2], dtype=torch.float32) if columns else None
    outputs, lses = [], []
    for first in range(0, q.shape[2], ROW_BLOCK):
        last = min(first + ROW_BLOCK, q.shape[2])
        logits = _logits(q[:, :, first:last].float(), keys, rule, _visible(rule, q, k, first, last))
        p, lse = _softmax(logits, rule.sinks)
        lses.append(lse)
        if summed is not None:
            weight = 1 if weights is None else weights[..., first:last, None]
            summed += (p.detach() * weight).sum(2)
        if values is not None:
            outputs.append((functional.dropout(p, rule.dropout) if rule.dropout else p) @ values)
    lse = torch.cat(lses, 2) if lses else q.new_zeros(q.shape[:3], dtype=torch.float32)
    if v is None:
        return None, lse, summed
    output = torch.cat(outputs, 2).to(q.dtype) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1])
    return output, lse, summed


def _logits(q: Tensor, keys: Tensor, rule: Rule, mask: Tensor | None) -> Tensor:
    z = q @ keys.mT * rule.scale
    if rule.softcap is not None:
        z = rule.softcap * torch.tanh(z / rule.softcap)
    if mask is None:
        return z
    return z.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else z + mask


def _softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, 0 in a row that sees no key, and log-sum-exps without gradient."""
    blind = (logits == -math.inf).all(-1)
    logits = logits.masked_fill(blind[..., None], 0)  # the gradient of a row of -inf would be NaN
    lse = torch.logsumexp(logits, -1)
    nothing = torch.full_like(lse, -math.inf)
    if sinks is not None:
        nothing = sinks.float()[None, :, None].expand_as(lse)
        lse = torch.logaddexp(lse, nothing)
    p = (logits - lse[..., None]).exp().masked_fill(blind[..., None], 0)
    return p, torch.where(blind, nothing, lse).detach()


def _visible(rule: Rule, q: Tensor, k: Tensor, first: int, last: int) -> Tensor | None:
    """The mask of the rows [first, last), broadcast to ``[B, Hq, rows, S]``; None where all see all."""
    if rule.mask is not None:
        mask = rule.mask.expand(*rule.mask.shape[:-2], q.shape[2], -1) if rule.mask.dim() > 1 else rule.mask
        return mask[..., first:last, :] if mask.dim() > 1 else mask
    seen = None if rule.key_mask is None else rule.key_mask[:, None, None]
    if rule.causal:
        rows, keys = q.shape[2], k.shape[2]
        position = torch.arange(keys - rows + first, keys - rows + last, device=k.device)[:, None]
        key = torch.arange(keys, device=k.device)
        past = key <= position
        if rule.window is not None:
            past = past & (key > position - rule.window)
        seen = past if seen is None else seen & past
    return seen


def _row_weights(
    q: Tensor, k: Tensor, weights: Tensor | None, query_mask: Tensor | None, rule: Rule
) -> Tensor | None:
    """Weights with 0 for padding rows, broadcast to ``[B, Hq, T]``."""
    rows, keys = q.shape[2], k.shape[2]
    if query_mask is None and rule.causal and rule.key_mask is not None and rows <= keys:
        query_mask = rule.key_mask[:, keys - rows :]
    if weights is not None:
        if weights.shape[-1] != rows:
            raise ValueError(f"{NAME}: column_weights must be of T={rows} rows, got {list(weights.shape)}")
        weights = weights.float()
        weights = weights[None, None] if weights.dim() == 1 else weights
        weights = weights[:, None] if weights.dim() == 2 else weights
    if query_mask is None:
        return weights
    real = query_mask[:, None].float()
    return real if weights is None else (real * weights).contiguous()


def _reduce_heads(columns: Tensor, kv_heads: int, heads: Heads) -> Tensor:
    """As ``ops.column_score`` reduces: ``[B, Hq, S]`` to ``[B, H*, S]``."""
    if heads == "none":
        return columns
    if heads == "mean":
        return columns.mean(1, keepdim=True)
    if heads == "rms":
        return columns.square().mean(1, keepdim=True).sqrt()
    groups: Tensor = columns.unflatten(1, (kv_heads, -1))
    if heads == "kv_max":
        return groups.amax(2)
    return groups.sum(2) if heads == "kv_sum" else groups.mean(2)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, gqa: bool, sinks: Tensor | None, heads: str) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{NAME}: {name} must have shape [B, H, N, D], got {list(t.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{NAME}: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    query, kv = q.shape[1], k.shape[1]
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{NAME}: q and k must agree in B and D, got {list(q.shape)}, {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{NAME}: k and v must agree in [B, Hkv, S], got {list(k.shape)}, {list(v.shape)}")
    if query != kv and not gqa:
        raise ValueError(f"{NAME}: k must have Hq={query} heads without enable_gqa, got {kv}")
    if kv == 0 or query % kv:
        raise ValueError(f"{NAME}: Hkv must divide Hq={query}, got {kv}")
    if sinks is not None and sinks.shape != (query,):
        raise ValueError(f"{NAME}: sinks must have shape [Hq={query}], got {list(sinks.shape)}")
    if heads not in HEADS:
        raise ValueError(f"{NAME}: heads must be one of {', '.join(HEADS)}, got {heads!r}")


def _check_devices(q: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != q.device:
            raise ValueError(f"{NAME}: {name} must be on the device of q, {q.device}, got {t.device}")


def _check_masks(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    causal: bool,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    if attn_mask is not None and (causal or key_mask is not None):
        raise ValueError(f"{NAME}: attn_mask excludes is_causal and key_mask; put all into the mask")
    if attn_mask is not None:
        wanted = (*q.shape[:3], k.shape[2])
        pairs = zip(reversed(attn_mask.shape), reversed(wanted), strict=False)
        if attn_mask.dim() > 4 or any(have not in (1, want) for have, want in pairs):
            raise ValueError(
                f"{NAME}: attn_mask must broadcast to {list(wanted)}, got {list(attn_mask.shape)}"
            )
    if window is not None and not causal:
        raise ValueError(f"{NAME}: window needs is_causal=True")
    if window is not None and window < 1:
        raise ValueError(f"{NAME}: window must be >= 1, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{NAME}: softcap must be finite and > 0, got {softcap}")
    for name, mask, size in (("key_mask", key_mask, k.shape[2]), ("query_mask", query_mask, q.shape[2])):
        if mask is None:
            continue
        if mask.dtype != torch.bool or mask.shape != (q.shape[0], size):
            want = f"bool of shape [B={q.shape[0]}, {size}]"
            raise ValueError(f"{NAME}: {name} must be {want}, got {mask.dtype} {list(mask.shape)}")
