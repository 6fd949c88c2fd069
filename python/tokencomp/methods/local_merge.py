"""Local merging: the most similar neighbours in a sequence, order kept (arXiv 2511.14806)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp.methods import base, matching, schedule
from tokencomp.methods.layers import LayerView, Reduced, Stateless
from tokencomp.methods.matching import Plan
from tokencomp.methods.schedule import Rate


@base.register("local_merge", paper="2511.14806", stage="every encoder layer, between attention and MLP")
@dataclass(frozen=True)
class LocalMerge(Stateless):
    """Merges like ToMe, but only tokens near each other, and leaves the sequence in order.

    The i-th even token sees the odd tokens from the (i - band)-th to the (i + band)-th; the r most similar
    pairs of the whole sequence are merged, as averages weighted by size. This is the matching step of
    MergeDNA without its trained grouping; ``plan.unmerge`` gives every token its group's value back.
    r is capped at half of the tokens that are no prefix.
    """

    r: Rate = field(default=16, metadata={"help": schedule.HELP})
    band: int = field(default=16, metadata={"help": "how far apart partners may be, in pairs, >= 1"})
    proportional: bool = field(default=True, metadata={"help": "add log size to the attention logits"})

    def __post_init__(self) -> None:
        schedule.check_rate("LocalMerge", self.r)
        if self.band < 1:  # 0 would leave the last even token of an odd number without a partner
            raise ValueError(f"LocalMerge: band must be >= 1, got {self.band!r}")

    def plan(
        self, metric: Tensor, *, prefix: int = 0, layer: int = 0, layers: int = 1, mask: Tensor | None = None
    ) -> Plan:
        """What ``layer`` of ``layers`` merges: ``(token_map [B, N] int32, out_tokens)``.

        Args:
            metric: ``[B, N, D]``, what is compared; zero rows have similarity 0 to all.
            prefix: tokens at the front that stay as they are.
            mask: ``[B, N]`` bool, False at padding.

        Rows: the tokens that stay (every group's odd one among them), in the order they had.
        """
        n = metric.shape[1]
        r = schedule.cap(schedule.per_layer(self.r, layers)[layer], n, prefix)
        if r == 0:
            return matching.identity(metric)
        match = matching.halves(metric, prefix, mask, self.band)
        return matching.pair_up(match, r, n, prefix, order="position", mask=mask)

    def reduce(self, view: LayerView) -> Reduced | None:
        """Merge by the keys of this layer."""
        plan = self.plan(
            view.metric(), prefix=view.prefix, layer=view.layer, layers=view.layers, mask=view.mask
        )
        return matching.merged(view, plan)
