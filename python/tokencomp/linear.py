"""Slopes of linear attention with decay, as published."""

import math

import torch
from torch import Tensor

from tokencomp.recipes.common import require


def decay_slopes(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """``[heads]`` float32 slopes of a layer of MiniMax-Text-01 (arXiv 2501.08313), for
    ``ops.decay_linear_attention``.

    Head h of a power of two n has ``2 ** (-8 (h + 1) / n)``, as in ALiBi (arXiv 2108.12409). Other numbers of
    heads take those of the next lower power of two, then every second of the next higher one. With more than
    one layer times ``1 - layer / (layers - 1) + 1e-5``: later layers forget less.

    Raises:
        ValueError: a number of heads or layers below 1, or a layer that there is not.
    """
    op = "decay_slopes"
    require(heads >= 1, op, "heads", ">= 1", heads)
    require(layers >= 1, op, "layers", ">= 1", layers)
    require(0 <= layer < layers, op, "layer", f"in [0, layers={layers})", layer)
    lower = 1 << (heads.bit_length() - 1)
    slopes = _powers(lower) + _powers(2 * lower)[0::2][: heads - lower]
    factor = 1 - layer / (layers - 1) + 1e-5 if layers > 1 else 1.0
    return torch.tensor([factor * slope for slope in slopes], dtype=torch.float32)


def _powers(heads: int) -> list[float]:
    return [math.pow(2.0, -8.0 * (h + 1) / heads) for h in range(heads)]
