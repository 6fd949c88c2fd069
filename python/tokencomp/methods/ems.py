"""EMS: evict, then merge, by global and local attention (arXiv 2412.08521)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.h2o import Accumulating
from tokencomp.methods.kv import Keep, KVView, MergeSpec, Side
from tokencomp.recipes.common import require

_MEMBERS = 256  # members matched with all centers at a time


@base.register("ems", paper="2412.08521", stage="kv")
@dataclass(frozen=True)
class EMS(Accumulating):
    """The best slots are centers; the next ones are merged into the center they resemble, or dropped.

    The score is the larger of global attention (all queries) and local attention (the last ``window``),
    aligned in the mean. Of what does not stay the best ``ratio`` times as many as there are centers are
    members: each joins the center of largest ``cos(k, k_c) cos(v, v_c)``, cosines clamped at 0, or the zero
    class, where that is below ``tau``; the rest goes. Members and center are averaged with the scores as
    weights. The paper has no public code: ``ratio``, ``tau``, the clamp and the weights are ours. Keys are
    left alone by default, as averaging rotated keys of distant positions blurs them; ``merge_keys`` averages
    their directions and norms apart, as the paper does.
    """

    window: int = field(default=16, metadata={"help": "last queries of the local score; their tokens stay"})
    tau: float = field(default=0.6, metadata={"help": "least similarity to a center; inf: evict only"})
    ratio: float = field(default=1.0, metadata={"help": "members for each center, at most"})
    merge_keys: bool = field(default=False, metadata={"help": "merge keys as well as values"})
    raw: bool = field(default=False, metadata={"help": "do not clamp negative cosines at 0"})

    def __post_init__(self) -> None:
        require(self.window >= 1, "EMS", "window", ">= 1", self.window)
        require(self.ratio >= 0, "EMS", "ratio", ">= 0", self.ratio)
        super().__post_init__()

    @property
    def sides(self) -> Mapping[str, Side]:
        """The global score."""
        return {"score": Side(torch.float32, 0)}

    def protected(self, slots: int) -> tuple[int, int]:
        """Sinks, and the window."""
        return self.sinks, self.window

    def record_prompt(self, view: KVView) -> None:
        """Global attention, and the window's queries."""
        super().record_prompt(view)
        kv_attention.remember_queries(view, self.window)

    def record_step(self, view: KVView) -> None:
        """The same of a decode step."""
        super().record_step(view)
        kv_attention.remember_queries(view, self.window)

    def skip_step(self, view: KVView) -> None:
        """The window starts anew with the next prompt."""
        kv_attention.forget_queries(view)

    def score(self, view: KVView) -> Tensor:
        """``recipes.global_local_score``."""
        everywhere = view.state["score"][:, :, : view.size]
        local = kv_attention.window_received(view, self.window)
        return recipes.global_local_score(everywhere, local, lengths=view.lengths)

    def merging(self, view: KVView, score: Tensor, keep: Keep) -> MergeSpec | None:
        """Members are the next best slots."""
        if self.ratio == 0 or self.tau == torch.inf:
            return None
        slots, protected = self.slots(view), [self.protected(0)] * len(view.seen)
        more = [int(self.ratio * max(0, k - sum(self.protected(k)))) for k in slots]
        both = eviction.keep_best(view, score, [k + m for k, m in zip(slots, more, strict=True)], protected)
        next_best = eviction.evicted(view, keep) & ~eviction.evicted(view, both)
        member = eviction.packed(next_best, min(max(more), view.size))
        head, tail = self.protected(0)
        free = (keep.index >= head) & (keep.index < view.lengths[..., None] - tail)
        centers = torch.where(free, keep.index, -1)  # protected slots are no centers
        keys, values = view.keys()[:, :, : view.size], view.values()[:, :, : view.size]
        target = [
            recipes.merge_assign(keys, values, centers, part.contiguous(), tau=self.tau, raw=self.raw)
            for part in member.split(_MEMBERS, 2)
        ]
        return MergeSpec(
            member,
            torch.cat(target, 2),
            weight=eviction.at(score, member),
            center=eviction.at(score, keep.index),
            keys="direction" if self.merge_keys else "keep",
        )
