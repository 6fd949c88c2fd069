"""StrideVisual: keep evenly spaced visual tokens, the baseline that looks at nothing."""

from dataclasses import dataclass, field

import torch

from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView


@base.register("stride_visual", paper="", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class StrideVisual:
    """The K tokens of each crop at ``floor((2 i + 1) n / (2 K))``, i < K: middles of equal stretches.

    With ``average`` each becomes the mean of its stretch of a crop's grid, by rows and columns: roughly what
    a smaller image would have given. K is then the largest ``h x w`` map that fits.
    """

    keep: float = field(default=0.25, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    average: bool = field(default=False, metadata={"help": "average pooling of the grid (down-sampling)"})

    def __post_init__(self) -> None:
        base.check_keep("StrideVisual", self.keep)

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError for ``average`` without a grid."""
        crops, tokens = view.x.shape[:2]
        count = base.budget(self.keep, tokens)
        if not self.average:
            index = _middles(count, tokens, view.x.device)
            return VisualKeep(index.to(torch.int32).repeat(crops, 1))
        if view.grid is None:
            raise ValueError("StrideVisual: average needs the grid of the tokens, got none")
        high = min(view.grid[0], round((count * view.grid[0] / view.grid[1]) ** 0.5)) or 1
        wide = max(1, min(view.grid[1], count // high))
        row, column = _middles(high, view.grid[0], view.x.device), _middles(wide, view.grid[1], view.x.device)
        index = (row[:, None] * view.grid[1] + column).flatten().to(torch.int32)
        maps = view.x.float().transpose(1, 2).unflatten(2, view.grid)
        pooled = torch.nn.functional.adaptive_avg_pool2d(maps, (high, wide)).flatten(2).transpose(1, 2)
        return VisualKeep(index.repeat(crops, 1), pooled.to(view.x.dtype))


def _middles(count: int, n: int, device: torch.device) -> torch.Tensor:
    return (2 * torch.arange(count, device=device) + 1) * n // (2 * count)
