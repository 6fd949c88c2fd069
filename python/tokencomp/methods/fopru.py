"""FoPru: the visual tokens, or rows of them, that the encoder attends to (arXiv 2411.14164)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, best


@base.register("fopru", paper="2411.14164", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class FoPru:
    """The tokens (``rank``) or whole grid rows (``row``) of largest significance, each crop by itself.

    Significance is the attention a patch receives from all queries, a mean over heads, or that of CLS;
    a row has the sum of its patches. Reconstructed: the paper is public, its code is not, and its layer and
    sum are stated here as the best reading (layer -2, which made LLaVA's features). Kept are ``round(keep
    N)`` tokens or ``round(keep H)`` rows.
    """

    keep: float = field(default=0.25, metadata={"help": "ratio of tokens (or rows) kept, or their count"})
    strategy: Literal["rank", "row"] = field(default="rank", metadata={"help": "tokens, or whole grid rows"})
    score_from: Literal["columns", "cls"] = field(
        default="columns", metadata={"help": "attention of all queries, or of CLS"}
    )
    layer: int = field(
        default=-2, metadata={"help": "encoder layer of the attention; negative: from the end"}
    )

    def __post_init__(self) -> None:
        base.check_keep("FoPru", self.keep)
        if self.strategy not in ("rank", "row"):
            raise ValueError(f"FoPru: strategy must be rank or row, got {self.strategy!r}")
        if self.score_from not in ("columns", "cls"):
            raise ValueError(f"FoPru: score_from must be columns or cls, got {self.score_from!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``."""
        return (at_layer("FoPru", self.layer, layers),)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError for rows of tokens without a grid."""
        layer = self.looks_at(view.encoder.layers)[0]
        score = view.encoder.cls(layer) if self.score_from == "cls" else view.encoder.columns(layer)
        if self.strategy == "rank":
            return VisualKeep(best(score, base.budget(self.keep, score.shape[1])))
        if view.grid is None:
            raise ValueError("FoPru: strategy='row' needs the grid of the tokens, got None")
        return VisualKeep(rows_of(score, view.grid, base.budget(self.keep, view.grid[0])))


def rows_of(score: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """The tokens of the ``count`` grid rows of largest summed ``score`` ``[M, N]``: ``[M, count * W]``."""
    height, width = grid
    rows = best(score.view(-1, height, width).sum(2), count)
    token = rows[..., None] * width + torch.arange(width, dtype=rows.dtype, device=rows.device)
    return token.flatten(1)
