"""SCOPE: visual tokens that cover the others, weighted by saliency (NeurIPS 2025)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, unit


@base.register("scope", paper="2510.24214", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class Scope:
    """Greedy facility location: the token whose gain in coverage, times its saliency, is largest.

    ``gain_i = sum_j max(0, cos_ij - m_j) a_i^alpha`` with ``m_j`` the largest cosine of j to a kept token so
    far (0 at first) and a the attention of CLS, summed over heads; ``n = round(keep N)`` steps in each crop,
    on the encoder's features. Holds the ``[M, N, N]`` cosines in float32.
    """

    keep: float = field(default=0.1, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    alpha: float = field(default=1.0, metadata={"help": "power of the saliency"})
    layer: int = field(
        default=-2, metadata={"help": "encoder layer of the attention; negative: from the end"}
    )

    def __post_init__(self) -> None:
        base.check_keep("Scope", self.keep)
        if not self.alpha >= 0:
            raise ValueError(f"Scope: alpha must be >= 0, got {self.alpha!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``."""
        return (at_layer("Scope", self.layer, layers),)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        saliency = view.encoder.cls(self.looks_at(view.encoder.layers)[0])
        features = view.encoder.features()
        picks = coverage_picks(features, saliency**self.alpha, base.budget(self.keep, features.shape[1]))
        return VisualKeep(base.ascending(picks))


def coverage_picks(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """``[M, count]`` int32 in the order of picking, from ``x`` ``[M, N, C]`` and ``weight`` ``[M, N]``."""
    cosine = unit(x) @ unit(x).mT
    covered = cosine.new_zeros(weight.shape)
    open_ = torch.ones_like(covered, dtype=torch.bool)
    picks = []
    for _ in range(count):
        gain = (cosine - covered[:, None]).clamp(min=0).sum(2) * weight
        pick = gain.masked_fill(~open_, -torch.inf).argmax(1, keepdim=True)
        open_.scatter_(1, pick, False)
        row = cosine.gather(1, pick[..., None].expand(-1, -1, cosine.shape[2]))[:, 0]
        covered = torch.maximum(covered, row)
        picks.append(pick)
    return torch.cat(picks, 1).to(torch.int32)
