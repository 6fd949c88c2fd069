"""Which attention calls our kernels take, and those calls: ``ops.flash_prefill`` for many rows,
``ops.paged_decode`` on dense keys for few.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.ops.score import Heads

Kernel = Literal["auto", "tokencomp", "torch"]
KERNELS = ("auto", "tokencomp", "torch")
FEW_ROWS = 8  # as many as a decode step may have
MANY_ROWS = 32  # with fewer, packing all keys costs more than it saves; measured, see bench/NOTES.md
WIDEST_HEAD = 256


class Rule(NamedTuple):
    """Who sees whom, and how logits are made."""

    scale: float
    mask: Tensor | None
    key_mask: Tensor | None
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float


class Computed(NamedTuple):
    """What a kernel gave: ``output``, ``lse`` and, where asked for, column sums."""

    output: Tensor
    lse: Tensor
    columns: Tensor | None


def takes(op: str, kernel: str, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> bool:
    """Whether our kernels compute this call, by the rule that ``kernel`` documents. Raises ValueError where
    they are told to and cannot.
    """
    if kernel not in KERNELS:
        raise ValueError(f"{op}: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if kernel == "torch":
        return False
    obstacle = _obstacle(q, k, v, rule)
    if kernel == "tokencomp" and obstacle:
        raise ValueError(f"{op}: kernel 'tokencomp' takes no {obstacle}; use kernel='torch'")
    rows = q.shape[2]
    better = q.device.type == "cpu" and (rows <= FEW_ROWS or rows >= MANY_ROWS)
    return kernel == "tokencomp" or (not obstacle and better)


def compute(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, rule: Rule, columns: bool, heads: Heads
) -> Computed:
    """The call, which ``takes`` has found to be one of ours."""
    bias = key_bias(rule, q, k)
    options: dict[str, Any] = {"scale": rule.scale, "key_bias": bias, "softcap": rule.softcap}
    sight: dict[str, Any] = {"causal": rule.causal, "window": rule.window}
    if 0 < q.shape[2] <= FEW_ROWS:
        lengths = torch.full(k.shape[:2], k.shape[2], dtype=torch.int32, device=k.device)
        output, lse, _ = ops.paged_decode(q, k, v, None, lengths, sinks=rule.sinks, **options, **sight)
    else:
        output, lse = ops.flash_prefill(q, k, v, sinks=rule.sinks, **options, **sight)
    summed = None
    if columns:
        summed = ops.column_score(q, k, lse, row_weight=weights, heads=heads, **options, **sight)
    return Computed(output, lse, summed)


def key_bias(rule: Rule, q: Tensor, k: Tensor) -> Tensor | None:
    """``[B, S]`` float32: 0 and -inf of ``key_mask``, or the mask of a single row; None without either."""
    if rule.mask is not None:
        shape = (q.shape[0], 1, 1, k.shape[2])
        mask = rule.mask.expand(shape)[:, 0, 0]
        if mask.dtype != torch.bool:
            return mask.float()
        return torch.zeros(mask.shape, device=k.device).masked_fill(~mask, -math.inf)
    if rule.key_mask is None:
        return None
    return torch.zeros(rule.key_mask.shape, device=k.device).masked_fill(~rule.key_mask, -math.inf)


def _obstacle(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> str:
    """What of this call our kernels do not take; empty where they take it."""
    inputs = [q, k, v] + ([] if rule.sinks is None else [rule.sinks])
    if rule.mask is not None and not _by_key(rule.mask, q):
        return "attn_mask"
    if rule.dropout:
        return "dropout"
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return "gradients"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    if not (0 < q.shape[-1] <= WIDEST_HEAD and 0 < v.shape[-1] <= WIDEST_HEAD):
        return f"head dimensions {q.shape[-1]}, {v.shape[-1]}"
    if any(t.stride(-1) != 1 and t.shape[-1] != 1 for t in (q, k, v)):
        return "heads that are not contiguous"
    return ""


def _by_key(mask: Tensor, q: Tensor) -> bool:
    """Whether ``mask`` says the same of all heads, for the one row there is."""
    one_row = q.shape[2] == 1 and mask.dim() >= 2
    return one_row and (mask.dim() < 4 or mask.shape[-3] == 1) and not mask.requires_grad
