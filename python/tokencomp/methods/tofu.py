"""ToFu: drop the matched tokens of early layers, merge norm-preserving later (arXiv 2312.01026)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, matching, schedule
from tokencomp.methods.layers import LayerView, Reduced, Stateless
from tokencomp.methods.matching import Plan
from tokencomp.methods.schedule import Rate


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

    def plan(
        self, metric: Tensor, *, prefix: int = 1, layer: int = 0, layers: int = 1, mask: Tensor | None = None
    ) -> Plan:
        """What ``layer`` of ``layers`` matches, like ``ToMe.plan``: also a dropped token names its target."""
        r = schedule.cap(schedule.per_layer(self.r, layers)[layer], metric.shape[1], prefix)
        if r == 0:
            return matching.identity(metric)
        return matching.pair_up(matching.halves(metric, prefix, mask), r, metric.shape[1], prefix, mask=mask)

    def apply(self, x: Tensor, plan: Plan, *, layer: int = 0, layers: int = 1) -> Tensor:
        """``x`` ``[B, N, C]`` by ``plan`` in the manner of ``layer``: ``[B, M, C]``."""
        if not self.drops(layer, layers):
            return matching.merge(x, plan, mode="mlerp")[0]
        odd = torch.zeros(plan.token_map.shape, device=x.device)
        odd[:, 1::2] = 1.0  # the target of a group is its odd token, and "drop" keeps that of largest weight
        return matching.merge(x, plan, weight=odd, mode="drop")[0]

    def reduce(self, view: LayerView) -> Reduced | None:
        """Match by the keys of this layer."""
        plan = self.plan(
            view.metric(), prefix=view.prefix, layer=view.layer, layers=view.layers, mask=view.mask
        )
        if plan.out_tokens == view.tokens:
            return None
        return Reduced(self.apply(view.x, plan, layer=view.layer, layers=view.layers), None, plan.token_map)
