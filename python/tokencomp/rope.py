"""Rotary frequencies of a model, from what its Hugging Face configuration says."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KINDS = ("default", "linear", "llama3", "yarn")
_TURN = 2 * math.pi


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int, *, max_position: int | None = None) -> Tensor:
    """Radians a position of each pair of channels: ``theta ** (-2 i / D)``, scaled as ``rope_type`` says.

    ``linear`` divides all by ``factor``. ``llama3`` divides those of long waves by ``factor``, leaves those
    of short waves and blends between (Llama 3.1). ``yarn`` blends between divided and not by the number of
    turns over the original context (arXiv 2309.00071). Keys turned by these frequencies can be turned on to
    another position; those of ``dynamic`` and ``longrope``, which depend on the length, cannot.

    Args:
        rope: a configuration's ``rope_parameters`` (transformers 5) or ``rope_scaling`` together with
            ``rope_theta``: ``rope_type`` (or ``type``; default ``default``), ``rope_theta``, ``factor``, ...,
            ``partial_rotary_factor`` (share of the channels that is rotated; default 1).
        head_dim: channels D of a head.
        max_position: the model's ``max_position_embeddings``, which stands in for a missing
            ``original_max_position_embeddings``, or with it for a missing ``factor``.

    Returns:
        ``[pairs]`` float32.

    Raises:
        ValueError: a type without fixed frequencies, an unknown one, a parameter that is missing or not a
            number it can be.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"inverse_frequencies: rope_type must be one of {KINDS}, got {kind!r}, whose frequencies change "
            "with the length of the text: keys already stored cannot be turned to another position"
        )
    if kind not in KINDS:
        raise ValueError(f"inverse_frequencies: rope_type must be one of {KINDS}, got {kind!r}")
    dim = int(head_dim * _number(rope, "partial_rotary_factor", 1.0, most=1.0))
    if dim < 2 or dim % 2:
        raise ValueError(f"inverse_frequencies: rotated channels must be even and >= 2, got {dim}")
    theta = _number(rope, "rope_theta", 10000.0)
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "default":
        return plain.float()
    factor = _number(rope, "factor", _extension(rope, max_position), least=1.0)
    if kind == "linear":
        return (plain / factor).float()
    if kind == "llama3":
        return _llama3(rope, plain, factor).float()
    return _yarn(rope, plain, factor, theta, dim, max_position).float()


def _extension(rope: Mapping[str, Any], max_position: int | None) -> float | None:
    """YaRN's factor where the configuration leaves it to the lengths of the contexts."""
    context = rope.get("original_max_position_embeddings")
    return max_position / context if max_position and context else None


def _llama3(rope: Mapping[str, Any], plain: Tensor, factor: float) -> Tensor:
    """Turns over the original context: fewer than ``low`` are divided, more than ``high`` are left."""
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if high <= low:
        raise ValueError(f"inverse_frequencies: high_freq_factor must be above {low}, got {high}")
    turns = plain * _number(rope, "original_max_position_embeddings") / _TURN
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept)


def _yarn(
    rope: Mapping[str, Any], plain: Tensor, factor: float, theta: float, dim: int, max_position: int | None
) -> Tensor:
    context = _number(rope, "original_max_position_embeddings", max_position)

    def pair_with(turns: float) -> float:
        """The pair, as a real number, that makes so many turns over the original context."""
        return dim * math.log(context / (turns * _TURN)) / (2 * math.log(theta))

    low, high = (
        pair_with(_number(rope, name, default)) for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    divided = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / factor * divided + plain * (1 - divided)


def _number(
    rope: Mapping[str, Any],
    name: str,
    default: float | None = None,
    *,
    least: float = 0.0,
    most: float = math.inf,
) -> float:
    value = rope.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"inverse_frequencies: {name} must be given, got None")
    if not (isinstance(value, int | float) and value > 0 and least <= value <= most and math.isfinite(value)):
        bound = f"in [{least}, {most}]" if math.isfinite(most) or least else "finite and > 0"
        raise ValueError(f"inverse_frequencies: {name} must be {bound}, got {value!r}")
    return float(value)
