"""AdaKV: the heads of a layer share one budget (arXiv 2407.11550)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, eviction
from tokencomp.methods.kv import Keep, KVView
from tokencomp.methods.snapkv import SnapKV
from tokencomp.recipes.common import require


@base.register("adakv", paper="2407.11550", stage="kv")
@dataclass(frozen=True)
class AdaKV(eviction.Wrapper):
    """Any method whose heads compete for slots: a head with much to remember keeps more.

    Published with SnapKV, ``AdaKV(SnapKV(budget=512))``, and PyramidKV, ``AdaKV(PyramidKV(SnapKV()))``. Heads
    really hold different numbers of slots, in total ``Hkv * budget`` a layer. Protected slots do not compete;
    the share ``alpha`` of the rest is every head's own. ``form="code"`` rounds as the official code, whose
    total drifts.
    """

    method: eviction.Evicting = field(default=SnapKV(), metadata={"help": "whose scores are used"})
    alpha: float = field(default=0.2, metadata={"help": "share of the budget that is not competed for"})
    normalize: bool = field(
        default=False, metadata={"help": "scale heads by the share their best slots hold"}
    )
    form: Literal["exact", "code"] = field(default="exact", metadata={"help": "exact total, or as the code"})

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "AdaKV", "alpha", "in [0, 1]", self.alpha)
        require(self.form in ("exact", "code"), "AdaKV", "form", "'exact' or 'code'", repr(self.form))
        super().__post_init__()

    def select(self, view: KVView, score: Tensor, slots: Sequence[int]) -> Keep:
        """As many of each head as it won."""
        heads = view.lengths.shape[1]
        if score.shape[1] != heads:
            name = type(self.method).__name__
            raise ValueError(
                f"AdaKV: method must score each of the {heads} kv heads, {name} has one set a layer"
            )
        counts = torch.zeros_like(view.lengths)
        for k in set(slots):
            rows = torch.tensor([b for b, own in enumerate(slots) if own == k], device=score.device)
            head, tail = self.protected(k)
            lengths = view.lengths[rows]
            won = recipes.adakv_budget(
                score[rows, :, head:],
                k - head - tail,
                alpha=self.alpha,
                normalize=self.normalize,
                form=self.form,
                lengths=(lengths - head - tail).clamp(min=0),
            )
            counts[rows] = torch.where(lengths <= k, lengths, won + head + tail)
        protected = [self.protected(k) for k in slots]
        most = [heads * (k - sum(p)) + sum(p) for k, p in zip(slots, protected, strict=True)]
        return eviction.keep_best(view, score, most, protected, counts=counts)
