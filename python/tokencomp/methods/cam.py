"""CaM: the values of evicted slots are spread over those that come next (ICML 2024)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.h2o import H2O
from tokencomp.methods.kv import Keep, KVView, MergeSpec
from tokencomp.recipes.common import require


@base.register("cam", paper="openreview LCTmppB165", stage="kv")
@dataclass(frozen=True)
class CaM(eviction.Wrapper):
    """Any method, and an evicted value is added, in equal parts, to the m next slots that stay.

    It is, with the probability ``min(1, score / largest score that stays)`` as in the official code, or
    ``"mean"``: over the mean score of those m slots, as in the paper. Sums are never divided again: in long
    runs ``"mean"`` lets values grow wherever attention is flat. In decode only, unless ``prompts``. Draws are
    a hash of seed, step, layer, row and position, so that runs repeat. Published with H2O.
    """

    method: eviction.Evicting = field(default=H2O(), metadata={"help": "who decides what goes"})
    targets: int = field(default=32, metadata={"help": "m, the slots a value is spread over"})
    against: Literal["max", "mean"] = field(default="max", metadata={"help": "what scores are compared with"})
    prompts: bool = field(default=False, metadata={"help": "merge at the end of prompts too"})
    seed: int = field(default=0, metadata={"help": "of the draws"})

    def __post_init__(self) -> None:
        require(self.targets >= 1, "CaM", "targets", ">= 1", self.targets)
        require(self.against in ("max", "mean"), "CaM", "against", "'max' or 'mean'", repr(self.against))
        super().__post_init__()

    def merging(self, view: KVView, score: Tensor, keep: Keep) -> MergeSpec | None:
        """Every evicted slot is a member m times."""
        if view.scratch.get("prompted", True) and not self.prompts:
            return None
        gone = eviction.evicted(view, keep)
        member = eviction.packed(gone, view.size - (0 if keep.ragged else keep.index.shape[2]))
        slot = torch.where(keep.index < 0, view.size, keep.index).contiguous()
        first = torch.searchsorted(slot, member.contiguous())  # rank of the next slot that stays
        rank = first[..., None] + torch.arange(self.targets, device=member.device)
        there = (rank < keep.count[..., None, None]) & (member >= 0)[..., None]
        number = there.sum(-1, keepdim=True).clamp(min=1)
        stays = eviction.at(score, keep.index).nan_to_num(0.0)
        if self.against == "max":
            other = stays.amax(-1, keepdim=True)
        else:
            near = stays.gather(2, rank.clamp(max=slot.shape[2] - 1).flatten(2)).view(rank.shape)
            other = (torch.where(there, near, 0.0) / number).sum(-1)
        own = eviction.at(score, member).nan_to_num(0.0)
        probability = torch.where(other > 0, own / torch.where(other > 0, other, 1.0), 1.0)
        drawn = eviction.at(eviction.draws(view, self.seed + view.step), member) < probability
        taken = there & drawn[..., None]
        many = member[..., None].expand(rank.shape)
        return MergeSpec(
            torch.where(taken, many, -1).flatten(2),
            torch.where(taken, rank, -1).int().flatten(2),
            weight=torch.where(taken, 1 / number, 0.0).flatten(2),
            center=torch.ones(keep.index.shape, device=member.device),
            values="sum",
        )
