"""HiPrune: anchors of a middle layer, their neighbours, registers of a deep layer (arXiv 2508.00553)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, best


@base.register("hiprune", paper="2508.00553", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class HiPrune:
    """Objects from a middle layer's attention, their surroundings, and global tokens from a deep layer's.

    With ``g`` the attention a patch receives, a mean over heads and all queries, and n tokens to keep in each
    crop: anchors are the ``round(alpha n / 5)`` largest of the middle layer, each with its left, right, upper
    and lower neighbour (numbers clamped to the crop, so that neighbours of edges wrap to the next row as in
    the paper's code); the rest are the largest of the deep layer among the others. Exactly n are kept: where
    anchors and neighbours are more than n, the lowest numbers of them.

    The paper's code for encoders without CLS subtracts 1 from taken scores instead of leaving them out, and
    may keep fewer; here they are left out.
    """

    keep: float = field(default=1 / 3, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    alpha: float = field(default=0.1, metadata={"help": "share of the budget for anchors and neighbours"})
    middle: float = field(
        default=9, metadata={"help": "layer of the anchors, from 1 (the paper's 9 of 24), or a share of them"}
    )
    deep: int = field(default=-2, metadata={"help": "layer of the registers; negative: from the end"})

    def __post_init__(self) -> None:
        base.check_keep("HiPrune", self.keep)
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"HiPrune: alpha must be in [0, 1], got {self.alpha!r}")
        whole = isinstance(self.middle, int)
        if not (self.middle >= 1 if whole else 0.0 < self.middle <= 1.0):
            raise ValueError(
                f"HiPrune: middle must be a layer >= 1 or a share in (0, 1], got {self.middle!r}"
            )

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: the middle layer, then the deep one."""
        middle = self.middle if isinstance(self.middle, int) else max(1, round(self.middle * layers))
        return at_layer("HiPrune", int(middle) - 1, layers), at_layer("HiPrune", self.deep, layers)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError without a grid."""
        if view.grid is None:
            raise ValueError("HiPrune: the tokens must be a grid, got none")
        middle, deep = (view.encoder.columns(layer) for layer in self.looks_at(view.encoder.layers))
        return VisualKeep(
            select(middle, deep, view.grid, base.budget(self.keep, middle.shape[1]), self.alpha)
        )


def select(middle: Tensor, deep: Tensor, grid: tuple[int, int], count: int, alpha: float) -> Tensor:
    """``[M, count]`` int32, ascending: anchors of ``middle`` ``[M, N]``, neighbours, the best of ``deep``."""
    tokens, width = middle.shape[1], grid[1]
    object_like = torch.zeros_like(middle, dtype=torch.bool)
    anchors = round(count * alpha / 5)
    if anchors:
        around = torch.tensor([0, -1, 1, -width, width], device=middle.device)
        near = (best(middle, anchors).long()[..., None] + around).clamp(0, tokens - 1)
        object_like.scatter_(1, near.flatten(1), True)
    kept = ragged.compact_rows(object_like, count)[0]
    return best(deep, count, keep=ragged.kept_mask(kept, tokens))
