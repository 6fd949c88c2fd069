"""KeyDiff: keys that differ from the mean direction stay (arXiv 2504.15364)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.kv import KVView
from tokencomp.recipes.common import existing


@base.register("keydiff", paper="2504.15364", stage="kv")
@dataclass(frozen=True)
class KeyDiff(eviction.Eviction):
    """Slots whose key is least similar to the mean direction of all keys of the head.

    ``score_j = -cos(k_j, mean_i k_i / |k_i|)``: distinct keys are attended to most. Looks at no query, in
    time linear in the slots.
    """

    sinks: int = field(default=0, metadata={"help": eviction.SINKS_HELP})
    recent: int | float = field(default=0, metadata={"help": eviction.RECENT_HELP})

    def score(self, view: KVView) -> Tensor:
        """``-cos(k, anchor)``."""
        keys = view.keys()[:, :, : view.size]
        exists = existing(keys[..., 0], view.lengths)[..., None]
        unit = torch.nn.functional.normalize(keys.float(), dim=-1).masked_fill(~exists, 0)
        anchor = torch.nn.functional.normalize(unit.sum(2, keepdim=True), dim=-1)
        return -(unit * anchor).sum(-1)
