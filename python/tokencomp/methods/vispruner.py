"""VisPruner: visual tokens by attention, and then the least repeated of the others (arXiv 2412.01818)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, best, of_mask, unit


@base.register("vispruner", paper="2412.01818", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class VisPruner:
    """Half by the attention of CLS, half by taking repeated tokens away (second version of FasterVLM).

    Of ``n = round(keep N)`` tokens of a crop ``floor(important n)`` have the largest attention of CLS. The
    others stand in a list by descending attention, which shrinks by up to 8 at a time: tokens at even places
    of largest cosine to one at an odd place go; the list is then the even ones left (least repeated last, by
    descending score) and the odd ones. The paper's code fails where an odd number is left; here the last one
    counts as even.
    """

    keep: float = field(
        default=64 / 576, metadata={"help": "ratio of tokens kept in each crop, or their count"}
    )
    important: float = field(default=0.5, metadata={"help": "share of the kept that attention chooses"})
    at_once: int = field(default=8, metadata={"help": "tokens taken away between two looks at the list"})
    layer: int = field(
        default=-2, metadata={"help": "encoder layer of the attention; negative: from the end"}
    )

    def __post_init__(self) -> None:
        base.check_keep("VisPruner", self.keep)
        if not 0.0 <= self.important <= 1.0:
            raise ValueError(f"VisPruner: important must be in [0, 1], got {self.important!r}")
        if self.at_once < 1:
            raise ValueError(f"VisPruner: at_once must be >= 1, got {self.at_once!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``."""
        return (at_layer("VisPruner", self.layer, layers),)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        score = view.encoder.cls(self.looks_at(view.encoder.layers)[0])
        features = view.encoder.features()
        count = base.budget(self.keep, score.shape[1])
        important = int(count * self.important)
        kept = torch.zeros_like(score, dtype=torch.bool)
        if important:
            kept = ragged.kept_mask(best(score, important), score.shape[1])
        if count > important:
            left = score.shape[1] - important
            ranked = score.masked_fill(kept, -torch.inf).argsort(dim=1, descending=True, stable=True)[
                :, :left
            ]
            diverse = diverse_of(features, ranked, count - important, self.at_once)
            kept = kept.scatter(1, diverse, True)
        return VisualKeep(of_mask(kept))


def diverse_of(x: Tensor, order: Tensor, count: int, at_once: int) -> Tensor:
    """``[M, count]`` of the tokens ``order`` ``[M, R]`` of ``x`` ``[M, N, C]``, unlike each other."""
    direction = unit(x)
    while (many := order.shape[1] - count) > 0:
        even, odd = order[:, ::2], order[:, 1::2]
        if odd.shape[1] == 0:
            return even[:, :count]
        like = _rows(direction, even) @ _rows(direction, odd).mT
        drop = min(at_once, many, even.shape[1])
        by_score = like.amax(2).argsort(dim=1, descending=True, stable=True)
        order = torch.cat([even.gather(1, by_score[:, drop:]), odd], 1)
    return order


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
