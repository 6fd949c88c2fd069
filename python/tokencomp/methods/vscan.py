"""VScan, first stage: visual tokens of windows and of the whole take in the others (arXiv 2505.22654)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, best, merged_into, unit


@base.register("vscan", paper="2505.22654", stage="visual tokens, before the first LLM layer; merges")
@dataclass(frozen=True)
class VScan:
    """Half by the attention of CLS in a shallow layer, window by window, half in a deep layer; others merge.

    With ``n = round(keep N)`` of a crop: from each of ``windows x windows`` equal windows the ``floor(n / 2 /
    windows^2)`` tokens that CLS attends to most in the shallow layer; then the best of the deep layer among
    the others, until n are kept. Every other token goes into the kept one of largest cosine, which becomes
    the mean of itself and its members. (The paper's code keeps ``n / 2`` of the deep layer and so may keep
    fewer than n.) The second stage, inside the language model, is that of an in-decoder method.
    """

    keep: float = field(
        default=96 / 576, metadata={"help": "ratio of tokens kept in each crop, or their count"}
    )
    windows: int = field(default=4, metadata={"help": "windows along a side"})
    shallow: int = field(default=5, metadata={"help": "encoder layer of the windows; negative: from the end"})
    deep: int = field(default=-2, metadata={"help": "encoder layer of the whole; negative: from the end"})
    merge: bool = field(default=True, metadata={"help": "whether other tokens go into kept ones"})

    def __post_init__(self) -> None:
        base.check_keep("VScan", self.keep)
        if self.windows < 1:
            raise ValueError(f"VScan: windows must be >= 1, got {self.windows!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: the shallow layer, then the deep one."""
        return at_layer("VScan", self.shallow, layers), at_layer("VScan", self.deep, layers)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError without a grid."""
        if view.grid is None:
            raise ValueError("VScan: the tokens must be a grid, got none")
        shallow, deep = (view.encoder.cls(layer) for layer in self.looks_at(view.encoder.layers))
        count = base.budget(self.keep, deep.shape[1])
        local = window_best(shallow, view.grid, self.windows, count // 2 // self.windows**2)
        index = best(deep, count, keep=local)
        if not self.merge:
            return VisualKeep(index)
        return VisualKeep(index, into_nearest(view.x, index))


def window_best(score: Tensor, grid: tuple[int, int], windows: int, count: int) -> Tensor:
    """``[M, N]`` bool: the ``count`` best of ``score`` ``[M, N]`` in each of ``windows ** 2`` windows."""
    high, wide = grid
    row = torch.arange(high, device=score.device) * windows // high
    column = torch.arange(wide, device=score.device) * windows // wide
    window = (row[:, None] * windows + column).flatten()
    chosen = torch.zeros_like(score, dtype=torch.bool)
    for number in range(windows * windows if count else 0):
        token = (window == number).nonzero()[:, 0]
        inside = best(score[:, token], min(count, len(token))).long()
        chosen.scatter_(1, token[inside.clamp(min=0)], True)
    return chosen


def into_nearest(x: Tensor, index: Tensor) -> Tensor:
    """``[M, K, C]``: kept tokens ``index`` of ``x`` ``[M, N, C]``, all others in the one most like them."""
    direction, kept = unit(x), ragged.gather_rows(unit(x), index)
    like = (direction @ kept.mT).masked_fill((index < 0)[:, None], -2.0)
    return merged_into(x, index, like.argmax(2), ~ragged.kept_mask(index, x.shape[1]))
