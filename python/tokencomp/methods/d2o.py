"""D2O: what is evicted is merged into the kept slot with the most similar key (arXiv 2406.13035)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.h2o import H2O
from tokencomp.methods.kv import Keep, KVView, MergeSpec
from tokencomp.recipes.common import require


@base.register("d2o", paper="2406.13035", stage="kv")
@dataclass(frozen=True)
class D2O(eviction.Wrapper):
    """Any method, and evicted slots join the kept one with the most similar key, if it is similar enough.

    Enough is a threshold of each kv head: the mean over the evicted of their largest cosine, smoothed from
    one eviction to the next, ``t = beta mean + (1 - beta) t``. Weights are ``e`` for the kept slot and
    ``exp(cos)`` for what joins it. Published with H2O and budgets of layers by the variance of their
    attention, which needs all layers before the first can be evicted: put ``PyramidKV`` around the method
    instead. The paper merges keys as well (``merge_keys=True``); by default they stay, see ``EMS``.
    """

    method: eviction.Evicting = field(default=H2O(), metadata={"help": "who decides what goes"})
    beta: float = field(default=0.7, metadata={"help": "weight of the newest in the smoothed threshold"})
    merge_keys: bool = field(default=False, metadata={"help": "merge keys as well as values"})

    def __post_init__(self) -> None:
        require(0 <= self.beta <= 1, "D2O", "beta", "in [0, 1]", self.beta)
        super().__post_init__()

    def merging(self, view: KVView, score: Tensor, keep: Keep) -> MergeSpec | None:
        """Nearest kept keys, by ``ops.cosine_match``: the matrix of similarities is not formed."""
        gone = eviction.evicted(view, keep)
        member = eviction.packed(gone, view.size - (0 if keep.ragged else keep.index.shape[2]))
        keys = view.keys()[:, :, : view.size].flatten(0, 1)
        similarity, target = ops.cosine_match(
            keys, keys, a_index=member.flatten(0, 1), b_index=keep.index.flatten(0, 1)
        )
        similarity, target = (kv_attention.by_head(view, t) for t in (similarity, target))
        there = target >= 0
        known = torch.where(there, similarity, 0.0)
        number = there.sum(-1)
        mean = known.sum(-1) / number.clamp(min=1)
        before = view.scratch.get("threshold", mean)
        threshold = torch.where(number > 0, self.beta * mean + (1 - self.beta) * before, before)
        view.scratch["threshold"] = threshold
        joins = there & (known >= threshold[..., None])
        return MergeSpec(
            member,
            torch.where(joins, target, -1),
            weight=known.exp(),
            center=torch.full(keep.index.shape, math.e, device=known.device),
            keys="mean" if self.merge_keys else "keep",
        )
