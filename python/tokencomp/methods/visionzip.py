"""VisionZip: dominant visual tokens, and contextual ones that take in the others (arXiv 2412.04467)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, best, of_mask, unit


@base.register("visionzip", paper="2412.04467", stage="visual tokens, before the first LLM layer; merges")
@dataclass(frozen=True)
class VisionZip:
    """The tokens CLS attends to most, and evenly spaced others, each with the mean of those like it added.

    Of ``n = round(keep N)`` tokens of a crop ``contextual n`` (rounded) are contextual, the others dominant:
    the largest attention of CLS, summed over heads. Of the M' tokens left, every ``max(1, M' // c)``-th is a
    contextual target, up to c; every other one goes to the target of most similar key (mean over heads), and
    ``y_t = x_t + mean(members)``, not divided further. Kept in raster order (the paper: dominant ones first).
    Merging is done on what the language model gets (the paper: before the projector).
    """

    keep: float = field(
        default=64 / 576, metadata={"help": "ratio of tokens kept in each crop, or their count"}
    )
    contextual: float = field(default=10 / 64, metadata={"help": "share of the kept that take in others"})
    layer: int = field(
        default=-2, metadata={"help": "encoder layer of attention and keys; negative: from the end"}
    )

    def __post_init__(self) -> None:
        base.check_keep("VisionZip", self.keep)
        if not 0.0 <= self.contextual <= 1.0:
            raise ValueError(f"VisionZip: contextual must be in [0, 1], got {self.contextual!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``."""
        return (at_layer("VisionZip", self.layer, layers),)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        layer = self.looks_at(view.encoder.layers)[0]
        count = base.budget(self.keep, view.x.shape[1])
        context = min(round(count * self.contextual), count)
        dominant = torch.zeros(view.x.shape[:2], dtype=torch.bool, device=view.x.device)
        if count > context:
            dominant = ragged.kept_mask(best(view.encoder.cls(layer), count - context), view.x.shape[1])
        if not context:
            return VisualKeep(of_mask(dominant))
        return self.absorb(view.x, view.encoder.keys(layer).float().mean(1), dominant, context)

    def absorb(self, x: Tensor, key: Tensor, dominant: Tensor, context: int) -> VisualKeep:
        """Dominant tokens of ``x`` ``[M, N, C]`` and ``context`` targets with the others in them."""
        rest, _, left = ragged.compact_rows(~dominant)
        step = (left // context).clamp(min=1)[:, None]
        rank = torch.arange(rest.shape[1], device=x.device)
        is_target = (rank % step == 0) & (rank // step < context) & (rank < left[:, None])
        place = torch.where(is_target, rest, -1)
        target = ragged.kept_mask(place, x.shape[1])
        member = ~dominant & ~target
        cosine = unit(key) @ unit(key).mT
        nearest = cosine.masked_fill(~target[:, None], -2.0).argmax(2)
        mean, _ = ops.merge_tokens(x.float(), torch.where(member, nearest, -1), x.shape[1])
        y = (x.float() + mean).to(x.dtype)
        index = of_mask(dominant | target)
        return VisualKeep(index, ragged.gather_rows(y, index))
