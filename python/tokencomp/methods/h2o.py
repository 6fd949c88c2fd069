"""H2O: heavy hitters by accumulated attention (arXiv 2306.14048)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.kv import KVView, Side


@dataclass(frozen=True)
class Accumulating(eviction.Eviction):
    """Scores by the attention received from all queries, prompt and decode, in float32 side arrays.

    ``S_j = sum_q gamma ** (age of q) P[q, j]``, summed over the query heads of a kv head; a slot carries its
    score through evictions.
    """

    every: int = field(default=16, metadata={"help": eviction.EVERY_HELP})
    sinks: int = field(default=0, metadata={"help": eviction.SINKS_HELP})

    @property
    def forgetting(self) -> float:
        """gamma."""
        return 1.0

    @property
    def newest(self) -> int:
        """Newest queries of a prompt that count; 0: all."""
        return 0

    @property
    def power(self) -> int:
        """Of the probabilities that are added up: 1 or 2."""
        return 1

    @property
    def counts(self) -> bool:
        """Whether scores are divided by the number of queries that saw the slot."""
        return False

    @property
    def needs_logits(self) -> bool:
        """For ``decay_score_``, where decode steps are recorded."""
        return self.every > 0

    @property
    def needs_lse(self) -> bool:
        """For the column sums."""
        return True

    @property
    def queries(self) -> int:
        """All that count."""
        return self.newest or -1

    @property
    def sides(self) -> Mapping[str, Side]:
        """The accumulated score, and where asked for the queries that saw a slot."""
        sides = {"score": Side(torch.float32, 0)}
        return sides | ({"count": Side(torch.int32, 0)} if self.counts else {})

    def record_prompt(self, view: KVView) -> None:
        """Adds the column sums of the prompt's attention."""
        kv_attention.accumulate_prompt_(
            view, "score", gamma=self.forgetting, newest=self.newest, power=self.power
        )
        if self.counts:
            _count_rows_(view)

    def record_step(self, view: KVView) -> None:
        """``S <- gamma S + P``."""
        counts: dict[str, Any] = {"count": view.state["count"]} if self.counts else {}
        kv_attention.accumulate_step_(
            view, view.state["score"], gamma=self.forgetting, power=self.power, **counts
        )

    def score(self, view: KVView) -> Tensor:
        """The accumulated score."""
        score = view.state["score"]
        return score / view.state["count"].clamp(min=1) if self.counts else score


@base.register("h2o", paper="2306.14048", stage="kv")
@dataclass(frozen=True)
class H2O(Accumulating):
    """Heavy hitters: the slots that all queries together attended to most, and a recent window.

    ``recent`` is half of the budget, as in the paper. Scores are per kv head (the sum over its query heads);
    the paper's models have one. Evicting in every step is the paper's (``every=1``). ``corrected`` divides by
    the queries that saw a slot (observed attention; ``recent=0`` then keeps what kvpress keeps).
    """

    recent: int | float = field(default=0.5, metadata={"help": eviction.RECENT_HELP})
    corrected: bool = field(default=False, metadata={"help": "divide by the queries that saw a slot"})

    @property
    def counts(self) -> bool:
        """As asked for."""
        return self.corrected


def _count_rows_(view: KVView) -> None:
    """Adds to ``state["count"]`` the queries of this forward that see each slot."""
    n = view.counts if view.counts is not None else torch.full_like(view.lengths[:, 0], view.q.shape[2])
    slot = torch.arange(view.size, device=view.lengths.device)
    younger = (view.lengths[..., None] - slot).clamp(min=0)
    view.state["count"][:, :, : view.size] += torch.minimum(younger, n[:, None, None]).int()
