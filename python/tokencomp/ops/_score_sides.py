"""Side arrays and scalars of the score operators, from what users pass to what the operators take."""

from typing import Any

import torch
from torch import Tensor

from tokencomp.ops import _check


def scale(q: Tensor, scale: float | None) -> float:
    """The factor of the products: ``scale``, or ``D ** -0.5``."""
    if scale is not None:
        return scale
    return float(q.shape[-1]) ** -0.5 if q.dim() and q.shape[-1] else 1.0


def float32(t: Tensor | None) -> Any:
    """float16, bfloat16 and float64 to contiguous float32; another dtype is left for the operator to
    refuse.
    """
    return t.to(torch.float32).contiguous() if t is not None and t.is_floating_point() else t


def attention_sides(
    op: str,
    q: Tensor,
    keys: int | None,
    row_weight: Tensor | None,
    key_bias: Tensor | None,
    q_position: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
) -> dict[str, Tensor | None]:
    """Side arrays as the operator takes them, values checked where they may be looked at. ``keys`` is S, None
    where the operator will refuse the keys.
    """
    if row_weight is not None:
        if _check.checked(row_weight) and not row_weight.is_complex():
            _check.check_weight(op, row_weight, "row_weight")
        row_weight = _as_batch_head(row_weight)
    if key_bias is not None:
        if _check.checked(key_bias):
            _check.check_bias(op, key_bias)
        key_bias = _as_batch_head(key_bias) if key_bias.dim() == 2 else key_bias
    if keys is not None:
        for name, bound in (("lengths", lengths), ("starts", starts)):
            if bound is not None and _check.checked(bound):
                check_bounds(op, name, bound, keys)
    return {
        "row_weight": _check.as_float32(row_weight),
        "key_bias": _check.as_float32(key_bias),
        "q_position": _check.as_int32(
            q_position[None] if q_position is not None and q_position.dim() == 1 else q_position
        ),
        "lengths": _check.as_int32(lengths),
        "starts": _check.as_int32(starts),
    }


def dense_keys(k: Tensor) -> int | None:
    """S of keys ``[B, Hkv, S, D]``; None for another shape."""
    return k.shape[2] if k.dim() == 4 else None


def _as_batch_head(t: Tensor) -> Tensor:
    """``[N]`` to ``[1, 1, N]`` and ``[B, N]`` to ``[B, 1, N]``."""
    if t.dim() == 1:
        return t[None, None]
    return t[:, None] if t.dim() == 2 else t


def check_bounds(op: str, name: str, values: Tensor, keys: int) -> None:
    """Raise ValueError unless every integer is in [0, S]; the operator refuses other dtypes."""
    if not values.is_floating_point() and not values.is_complex():
        _check.check_within(op, name, values, 0, keys, "S")


def check_dim(op: str, name: str, t: Tensor, shape: str) -> None:
    """What a fake kernel checks: the number of dimensions."""
    if t.dim() != shape.count(",") + 1:
        raise RuntimeError(f"{op}: {name} must have shape {shape}, got {list(t.shape)}")
