"""Stride: keep every n-th token, the baseline that looks at nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, pruning
from tokencomp.methods.layers import LayerView, Reduced


@base.register("stride", paper="", stage="visual tokens before the first LLM layer, or encoder layers")
@dataclass(frozen=True)
class Stride(pruning.Dropping):
    """Evenly spaced image tokens.

    Of n the K at ``floor((2 i + 1) n / (2 K))``, i < K: the middles of K equal stretches.
    """

    keep: float | Sequence[float] = field(default=0.5, metadata={"help": pruning.KEEP_HELP})
    layers: Sequence[int] | None = field(default=(0,), metadata={"help": pruning.LAYERS_HELP})

    def __post_init__(self) -> None:
        pruning.check_keep("Stride", self.keep)

    def select(self, x: Tensor) -> Tensor:
        """The kept tokens of ``x`` ``[B, N, C]``, ascending: ``[B, K]`` int32."""
        batch, n = x.shape[:2]
        return _middles(base.budget(pruning.at(self.keep, 0, 1.0), n), n, x.device).repeat(batch, 1)

    def reduce(self, view: LayerView) -> Reduced | None:
        """Drops all but evenly spaced tokens; see ``LayerMethod``. Padding goes first."""
        image = view.tokens - view.prefix
        kept = pruning.budget(self.keep, self.layers, view)
        if kept == image:
            return None
        score = torch.zeros(view.x.shape[:2], device=view.x.device)
        score[:, view.prefix + _middles(kept, image, view.x.device).long()] = 1.0
        return pruning.drop(view, pruning.top(score, kept, prefix=view.prefix, mask=view.mask))


def _middles(k: int, n: int, device: torch.device) -> Tensor:
    stretch = torch.arange(k, device=device)
    return ((2 * stretch + 1) * n // (2 * k)).to(torch.int32)
