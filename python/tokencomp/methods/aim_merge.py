"""AIM, first part: similar visual tokens become one before the language model (arXiv 2412.03248)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp.methods import base, matching
from tokencomp.methods.matching import Plan
from tokencomp.methods.visual import VisualKeep, VisualView


@base.register("aim_merge", paper="2412.03248", stage="visual tokens, before the first LLM layer; merges")
@dataclass(frozen=True)
class AIMMerge:
    """Rounds of bipartite merging in each crop: even tokens into the odd ones most like them.

    A round merges ``min(n // 2, n - k)`` of n tokens, the pairs of largest cosine, each group to the plain
    mean of its members whatever they stand for, until ``k = round(keep N)`` are left: 196 to 98 to 49 of a
    frame. Cosines are those of the tokens themselves (video), or of the keys of the last encoder layer, which
    merge along (images of LLaVA-1.5). Departures: tokens stay in raster order, at the place of their odd
    one, where the authors' code puts unmerged even tokens first; ties go to the lower token.
    """

    keep: float = field(default=0.25, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    metric: Literal["tokens", "keys"] = field(
        default="tokens", metadata={"help": "what is compared: tokens, or keys of the last encoder layer"}
    )

    def __post_init__(self) -> None:
        base.check_keep("AIMMerge", self.keep)
        if self.metric not in ("tokens", "keys"):
            raise ValueError(f"AIMMerge: metric must be tokens or keys, got {self.metric!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: the last layer, for keys."""
        return (layers - 1,) if self.metric == "keys" else ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        x, metric = view.x, view.x
        if self.metric == "keys":
            metric = view.encoder.keys(view.encoder.layers - 1).transpose(1, 2).flatten(2).to(x.dtype)
        index = matching.tokens_like(x).to(torch.int32)
        target = base.budget(self.keep, x.shape[1])
        while x.shape[1] > target:
            plan = self.round(metric, min(x.shape[1] // 2, x.shape[1] - target))
            x, metric, index = plan.merge(x), plan.merge(metric), _places(index, plan)
        return VisualKeep(index, x)

    @staticmethod
    def round(metric: Tensor, r: int) -> Plan:
        """Merges the ``r`` most similar pairs of ``metric`` ``[B, n, C]``."""
        n = metric.shape[1]
        return matching.pair_up(matching.halves(metric, 0), r, n, 0, order="position")


def _places(index: Tensor, plan: Plan) -> Tensor:
    """``[B, M]`` int32: where each row's odd token stands, or its only one."""
    where = torch.empty(index.shape[0], plan.out_tokens, dtype=index.dtype, device=index.device)
    for first in (0, 1):  # odd tokens last: they stay
        where = where.scatter(1, plan.token_map[:, first::2].long(), index[:, first::2])
    return where
