"""ZipVL: each layer keeps in more bits as many tokens as hold its attention (arXiv 2410.08584)."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods.kv import Keep, KVView
from tokencomp.methods.zipcache import Probed
from tokencomp.recipes.common import require


@base.register("zipvl", paper="2410.08584", stage="kv-quant")
@dataclass(frozen=True)
class ZipVL(Probed):
    """Mixed precision whose share of important tokens each layer finds from its own attention.

    With the attention a_j that token j receives from probe rows, mean over heads: important are p tokens, p
    the fewest whose largest a_j sum up to ``tau`` of all; they are those of largest ``a_j / probes that see
    j``, the same in all heads of the layer. No code is published; tau and the probes are recollections. This
    is the cache of the first version (4 and 2 bits); its sparse prefill is not done here, and the second
    version drops the unimportant tokens instead. In decode the layer's share stays that of the last prompt.
    """

    tau: float = field(default=0.975, metadata={"help": "share of the attention that is kept, in [0, 1]"})

    def __post_init__(self) -> None:
        require(0 <= self.tau <= 1, "ZipVL", "tau", "in [0, 1]", self.tau)
        super().__post_init__()

    def split(self, tokens: int) -> tuple[int, ...]:
        """All in the better tier, the most there may be: a layer's attention decides."""
        return max(0, tokens - sum(self.protected(tokens))), 0

    def parts(self, view: KVView, held: list[int]) -> list[tuple[int, ...]]:
        """What this layer's share makes of the tokens that are not protected."""
        important = view.scratch["important"].tolist()
        return [self._of(n, Fraction(*map(int, share))) for n, share in zip(held, important, strict=True)]

    def score(self, view: KVView) -> Tensor:
        """``[B, 1, S]``: the mean over heads."""
        return view.over_heads(super().score(view)[:, :, : view.size])

    def evict(self, view: KVView) -> Keep | None:
        """As ever; the end of a prompt tells the layer's share."""
        if view.scratch.get("prompted") or "important" not in view.scratch:
            mass = view.over_heads(view.state["mass"][:, :, : view.size])[:, 0]
            lengths = view.lengths[:, 0]
            _, count = ops.topp_select(mass, self.tau, view.size, lengths=lengths)
            view.scratch["important"] = torch.stack([count, lengths.clamp(min=1)], 1)
        return super().evict(view)

    def _of(self, tokens: int, share: Fraction) -> tuple[int, int]:
        left = max(0, tokens - sum(self.protected(tokens)))
        high = math.ceil(share * left)
        return high, left - high
