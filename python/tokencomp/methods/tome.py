"""ToMe: merge the most similar tokens of two halves, a fixed number per layer (arXiv 2210.09461)."""

from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor

from tokencomp.methods import base, matching, schedule
from tokencomp.methods.layers import LayerView, Metric, Reduced, Stateless
from tokencomp.methods.matching import Plan
from tokencomp.methods.schedule import Rate


@base.register("tome", paper="2210.09461", stage="every encoder layer, between attention and MLP")
@dataclass(frozen=True)
class ToMe(Stateless):
    """Merges the r most similar pairs of even and odd tokens, as averages weighted by size.

    With m the mean of the keys over heads: every even token finds the odd token of largest cosine; of these
    pairs the r most similar are merged, the even token into the odd one (several may go into the same).
    ``x' = sum(s x) / sum(s)`` and ``s' = sum(s)`` over a group with sizes s. ``proportional`` adds ``log s``
    to the logits of each key, which makes attention the same as over the unmerged tokens where those are
    equal; the paper turns it off for MAE models that were not trained with merging.

    ``metric="tokens"`` compares the tokens themselves, as ToMeSD (arXiv 2303.17604) does, and PiToMe's code
    for CLIP (arXiv 2405.16148). On digits-vit at half of the encoder's operations it keeps 99.4 % of the
    accuracy with the decreasing schedule, the mean of keys 88 % at best; see the README.

    r is capped at half of the tokens that are no prefix. Averages over tokens that a model takes after its
    last layer must be weighted by size, ``sum(s x) / sum(s)`` (MAE's mean pool); that is the adapter's part.
    """

    r: Rate = field(default=16, metadata={"help": schedule.HELP})
    metric: Metric = field(
        default="keys", metadata={"help": "what is compared: keys (mean over heads) or tokens"}
    )
    proportional: bool = field(default=True, metadata={"help": "add log size to the attention logits"})

    def __post_init__(self) -> None:
        schedule.check_rate("ToMe", self.r)
        if self.metric not in get_args(Metric):
            raise ValueError(f"ToMe: metric must be one of {get_args(Metric)}, got {self.metric!r}")

    def count(self, layer: int, layers: int, tokens: int, prefix: int) -> int:
        """r of ``layer`` that has ``tokens``, prefix included."""
        return schedule.cap(schedule.per_layer(self.r, layers)[layer], tokens, prefix)

    def plan(
        self, metric: Tensor, *, prefix: int = 1, layer: int = 0, layers: int = 1, mask: Tensor | None = None
    ) -> Plan:
        """What ``layer`` of ``layers`` merges: ``(token_map [B, N] int32, out_tokens)``.

        Args:
            metric: ``[B, N, D]``, what is compared; zero rows have similarity 0 to all.
            prefix: tokens at the front that stay as they are (CLS, distillation, registers).
            mask: ``[B, N]`` bool, False at padding.

        Rows: prefix, even tokens that stay, odd tokens. The even ones are in ascending order, without a
        prefix by descending similarity; the halves of the next layer depend on it.
        """
        r = self.count(layer, layers, metric.shape[1], prefix)
        return matching.identity(metric) if r == 0 else matching.plan_pairs(metric, r, prefix, mask=mask)

    def reduce(self, view: LayerView) -> Reduced | None:
        """Merge by the keys of this layer, or by the tokens themselves."""
        r = self.count(view.layer, view.layers, view.tokens, view.prefix)
        return matching.merge_pairs(view, view.features(self.metric), r) if r > 0 else None
