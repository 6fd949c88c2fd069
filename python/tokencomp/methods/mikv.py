"""MiKV: important tokens in high, the others in low precision (arXiv 2402.18096)."""

import math
from dataclasses import dataclass, field
from typing import Any

from tokencomp.methods import base, quantizing
from tokencomp.methods.eviction import Evicting
from tokencomp.methods.h2o import H2O
from tokencomp.methods.kv import ChannelMaps, KVView, PageSpec
from tokencomp.recipes.common import require


@base.register("mikv", paper="2402.18096", stage="kv-quant")
@dataclass(frozen=True)
class MiKV(quantizing.Quantizing):
    """What H2O would evict stays in few bits, its key channels balanced against the queries.

    Of S tokens seen ``floor(keep S)`` are high, of these ``floor(newest * that)`` the newest and the rest
    those that all queries attended to most; low ones come back as ``I(k b) / b`` with ``b = sqrt(max |q| /
    max |k|)`` by channel. The paper demotes one token a step; here ``page`` of them when there are so many
    too many, which keeps up to ``page + every - 1`` more high. With ``high`` of 8 or 4 bits a token's tier is
    decided for good when it leaves the newest ones, as nothing is quantized twice; the paper does not say.
    Every published choice: ``sinks=0, recent=0, edges=0``, ``group`` half of the head dimension. Without
    ``keep`` (0) it is plain rounding, with 1 the cache as it is.
    """

    keep: float = field(default=0.2, metadata={"help": "share of tokens in the high tier, in [0, 1]"})
    low: int = field(default=2, metadata={"help": "bits of the others: 2, 3 or 4"})
    high: int = field(default=16, metadata={"help": "bits of the high tier: 16 (working dtype), 8 or 4"})
    newest: float = field(default=0.5, metadata={"help": "share of the high tier for the newest tokens"})
    group: int = field(default=64, metadata={"help": "channels of a grid"})
    balance: bool = field(default=True, metadata={"help": "the channel balancer, on keys"})

    def __post_init__(self) -> None:
        require(0 <= self.keep <= 1, "MiKV", "keep", "in [0, 1]", self.keep)
        require(0 <= self.newest <= 1, "MiKV", "newest", "in [0, 1]", self.newest)
        require(self.low in (2, 3, 4), "MiKV", "low", "2, 3 or 4", self.low)
        fits = self.high in (16, 8, 4) and self.high > self.low
        require(fits, "MiKV", "high", f"16, 8 or 4, and more than low={self.low}", self.high)
        super().__post_init__()

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """High where it is quantized, and low; none where all tokens are high and exact."""
        if self.keep == 1 and self.high == 16:
            return ()
        bits = (self.low,) if self.high == 16 else (self.high, self.low)
        options: dict[str, Any] = {"k_axis": "token", "k_group": self.group, "v_group": self.group}
        return tuple(quantizing.page_spec(n, **options) for n in bits)

    @property
    def scorer(self) -> Evicting:
        """H2O."""
        return H2O(budget=1.0, every=self.every)

    @property
    def queries(self) -> int:
        """All."""
        return -1

    def protected(self, slots: int) -> tuple[int, int]:
        """Sinks, and the newest of the high tier or ``recent`` where that is more."""
        return self.sinks, max(self.recent, math.floor(self.newest * self._high(slots) + 1e-9))

    def split(self, tokens: int) -> tuple[int, ...]:
        """What is not high is low; of a quantized high tier, what is not protected."""
        high = self._high(tokens)
        if self.high == 16:
            return (tokens - high,)[: len(self.specs)]
        return max(0, high - sum(self.protected(tokens))), tokens - high

    def record_prompt(self, view: KVView) -> None:
        """Scores, and the range of the queries."""
        super().record_prompt(view)
        self._remember(view)

    def record_step(self, view: KVView) -> None:
        """The same."""
        super().record_step(view)
        self._remember(view)

    def maps(self, view: KVView) -> ChannelMaps | None:
        """The balancer."""
        if not self.balance:
            return None
        return ChannelMaps(quantizing.key_balancer(view, quantizing.row_stats(view, view.keys())))

    def _remember(self, view: KVView) -> None:
        if self.balance:
            quantizing.remember_query_range(view)

    def _high(self, tokens: int) -> int:
        return math.floor(self.keep * tokens + 1e-9)
