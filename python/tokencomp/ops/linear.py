"""Linear attention with decay: wrapper and fake kernel of ``torch.ops.tokencomp.decay_linear_attention``."""

from typing import Any

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace, _score_sides

NAME = "decay_linear_attention"


@typed
def decay_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention without a softmax, whose past fades: its cache is one matrix a head at any length.

    ``S_t = exp(-slope) S_{t-1} + k_t v_t^T`` and ``out_t = scale q_t S_t``, so ``out_t = scale sum_{s <= t}
    exp(-slope (t - s)) <q_t, k_s> v_s``: the lightning attention of MiniMax-Text-01 and M1 (arXiv 2501.08313,
    2506.13585), between its projections and its norm. Computed in chunks of rows, in O(T); sums are float32
    and in one order, so results are bit-identical from run to run and for any number of threads, but not from
    one division of a sequence into calls to another.

    Args:
        q: ``[B, Hq, T, D]``, float32, float16 or bfloat16, any strides with D contiguous, D <= 256; T = 1 is
            a decode step.
        k: ``[B, Hkv, T, D]`` of the same dtype; query head h uses kv head ``h // (Hq / Hkv)``.
        v: ``[B, Hkv, T, Dv]`` of the same dtype, Dv <= 256.
        slope: ``[Hq]`` float, >= 0, the decay of a token as a natural exponent; see ``linear.decay_slopes``.
        scale: factor of the output, > 0; MiniMax has 1.
        state: ``[B, Hq, D, Dv]`` float32, what an earlier call returned; default zeros.
        lengths: ``[B]`` integers in [0, T]: rows from there on are padding, their output is 0 and the state
            is that before them. Rows of zeros before the first token change nothing without a state.

    Returns:
        ``(out, state)``: ``[B, Hq, T, Dv]`` of the dtype of q, contiguous, and ``[B, Hq, D, Dv]`` float32.

    Raises:
        RuntimeError: a shape, dtype, device or number that is not as above.
        ValueError: values of ``slope`` or ``lengths`` that are not as above (on CUDA only under
            ``TOKENCOMP_CHECKED=1``; unchecked, lengths are clamped).
    """
    slope = _score_sides.float32(slope)
    if _check.checked(slope, lengths):
        if not slope.is_complex() and not bool(((slope >= 0) & slope.isfinite()).all()):
            raise ValueError(f"{NAME}: slope must be finite and >= 0, got {slope.tolist()}")
        if lengths is not None and q.dim() == 4 and lengths.shape == q.shape[:1]:
            _check.check_within(NAME, "lengths", lengths, 0, q.shape[2], "T")
    out, new = _namespace.op(NAME)(
        q, k, v, slope, scale=scale, state=_check.as_float32(state), lengths=_check.as_int32(lengths)
    )
    return out, new


@_namespace.fake(NAME)
def _decay_linear_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    _score_sides.check_dim(NAME, "q", q, "[B, Hq, T, D]")
    _score_sides.check_dim(NAME, "v", v, "[B, Hkv, T, Dv]")
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty((q.shape[0], q.shape[1], q.shape[3], v.shape[3]), dtype=torch.float32)
