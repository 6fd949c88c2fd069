"""ToFu: drop the matched tokens of early layers, merge norm-preserving later (arXiv 2312.01026)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, matching, schedule
from tokencomp.methods.layers import LayerView, Reduced, Stateless
from tokencomp.methods.matching import Plan
from tokencomp.methods.schedule import Rate
from tokencomp.ops.merge import Mode


@base.register("tofu", paper="2312.01026", stage="every encoder layer, between attention and MLP")
@dataclass(frozen=True)
class ToFu(Stateless):
    """Matches like ToMe; early layers keep the target alone, later ones take MLERP of the group.

    Early layers react to averages they never saw, so up to layer ``floor(layers / 2)`` a merged token is
    dropped in favour of its target. Later ``x' = mean / |mean| * max_i |x_i|``, which keeps the norm that
    averaging loses. Sizes are not tracked: attention has no bias and averages no weights. A mean of norm 0
    stays 0.
    """

    r: Rate = field(default=16, metadata={"help": schedule.HELP})
    early: float = field(
        default=0.5, metadata={"help": "share of the layers, first one always included, that drop"}
    )

    def __post_init__(self) -> None:
        schedule.check_rate("ToFu", self.r)
        if not 0.0 <= self.early <= 1.0:
            raise ValueError(f"ToFu: early must be in [0, 1], got {self.early!r}")

    @property
    def proportional(self) -> bool:
        """Never: there are no sizes."""
        return False

    def drops(self, layer: int, layers: int) -> bool:
        """Whether ``layer`` drops: ``layer <= floor(early * layers)``."""
        return layer <= int(self.early * layers)

    def count(self, layer: int, layers: int, tokens: int, prefix: int) -> int:
        """r of ``layer`` that has ``tokens``, prefix included."""
        return schedule.cap(schedule.per_layer(self.r, layers)[layer], tokens, prefix)

    def plan(
        self, metric: Tensor, *, prefix: int = 1, layer: int = 0, layers: int = 1, mask: Tensor | None = None
    ) -> Plan:
        """What ``layer`` of ``layers`` matches, like ``ToMe.plan``: also a dropped token names its target."""
        r = self.count(layer, layers, metric.shape[1], prefix)
        return matching.identity(metric) if r == 0 else matching.plan_pairs(metric, r, prefix, mask=mask)

    def apply(self, x: Tensor, plan: Plan, *, layer: int = 0, layers: int = 1) -> Tensor:
        """``x`` ``[B, N, C]`` by ``plan`` in the manner of ``layer``: ``[B, M, C]``."""
        weight, mode = self._manner(x, layer, layers)
        return matching.merge(x, plan, weight=weight, mode=mode)[0]

    def _manner(self, x: Tensor, layer: int, layers: int) -> tuple[Tensor | None, Mode]:
        if not self.drops(layer, layers):
            return None, "mlerp"
        odd = torch.zeros(x.shape[:2], device=x.device)
        odd[:, 1::2] = 1.0  # the target of a group is its odd token, and "drop" keeps that of largest weight
        return odd, "drop"

    def reduce(self, view: LayerView) -> Reduced | None:
        """Match by the keys of this layer."""
        r = self.count(view.layer, view.layers, view.tokens, view.prefix)
        if r == 0:
            return None
        weight, mode = self._manner(view.x, view.layer, view.layers)
        return matching.merge_pairs(view, view.metric(), r, sized=False, weight=weight, mode=mode)
