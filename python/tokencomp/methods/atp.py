"""ATP-LLaVA's spatial rule: an even grid of visual tokens always stays (arXiv 2412.00447)."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, best


@base.register("atp", paper="2412.00447", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class ATP:
    """Every s-th row and column of a crop, and the best of another method's score.

    The grid has stride ``s = round(1 / sqrt(rate))`` from the upper left; then the largest scores until
    ``round(keep N)`` tokens are kept. Where the grid alone is more, the lowest numbers of it. This is the
    training-free part: ATP-LLaVA's learned thresholds are not public.
    """

    method: Any = field(metadata={"help": "a method with score(view), such as FasterVLM()"})
    keep: float = field(default=0.25, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    rate: float = field(default=1 / 16, metadata={"help": "share of tokens on the grid"})

    def __post_init__(self) -> None:
        base.check_keep("ATP", self.keep)
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"ATP: rate must be in (0, 1], got {self.rate!r}")
        if not hasattr(self.method, "score"):
            raise ValueError(f"ATP: method must have score(view), got {self.method!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: what the other method looks at."""
        looked: tuple[int, ...] = self.method.looks_at(layers)
        return looked

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError without a grid."""
        if view.grid is None:
            raise ValueError("ATP: the tokens must be a grid, got none")
        score, count = self.method.score(view), base.budget(self.keep, view.x.shape[1])
        grid = grid_mask(view.grid, self.rate, view.x.device).expand(view.x.shape[0], -1)
        first = ragged.compact_rows(grid, count)[0]
        return VisualKeep(best(score, count, keep=ragged.kept_mask(first, view.x.shape[1])))


def grid_mask(grid: tuple[int, int], rate: float, device: torch.device) -> Tensor:
    """``[1, N]`` bool: the tokens of an even grid that is ``rate`` of all."""
    stride = max(1, min(round(1 / math.sqrt(rate)), max(grid)))
    row = torch.arange(grid[0], device=device) % stride == 0
    column = torch.arange(grid[1], device=device) % stride == 0
    return (row[:, None] & column).view(1, -1)
