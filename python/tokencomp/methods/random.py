"""Random: keep tokens by chance, the baseline every method has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, pruning
from tokencomp.methods.layers import LayerView, Reduced


@base.register("random", paper="", stage="visual tokens before the first LLM layer, or encoder layers")
@dataclass(frozen=True)
class Random(pruning.Dropping):
    """A uniformly random subset of the image tokens.

    Item b of a batch gets the b-th draw of its seed (and layer), whatever the batch holds: runs repeat, and
    one seed shows as many patterns as a batch has items.
    """

    keep: float | Sequence[float] = field(default=0.5, metadata={"help": pruning.KEEP_HELP})
    layers: Sequence[int] | None = field(default=(0,), metadata={"help": pruning.LAYERS_HELP})
    seed: int = field(default=0, metadata={"help": "of the draws"})

    def __post_init__(self) -> None:
        pruning.check_keep("Random", self.keep)

    def select(self, x: Tensor) -> Tensor:
        """The kept tokens of ``x`` ``[B, N, C]``, ascending: ``[B, K]`` int32."""
        return pruning.top(self._draw(x, 0), base.budget(pruning.at(self.keep, 0, 1.0), x.shape[1]))

    def reduce(self, view: LayerView) -> Reduced | None:
        """Drops at random; see ``LayerMethod``."""
        kept = pruning.budget(self.keep, self.layers, view)
        if kept == view.tokens - view.prefix:
            return None
        score = self._draw(view.x, view.layer)
        return pruning.drop(view, pruning.top(score, kept, prefix=view.prefix, mask=view.mask))

    def _draw(self, x: Tensor, layer: int) -> Tensor:
        """``[B, N]`` in [0, 1), made on the CPU, so that every device draws the same."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        return torch.rand(x.shape[0], x.shape[1], generator=generator).to(x.device)
