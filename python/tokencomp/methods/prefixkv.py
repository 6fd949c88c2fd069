"""PrefixKV: each layer keeps the prefix of its ranking that holds the same share of attention (arXiv
2412.03409).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, eviction
from tokencomp.methods.h2o import Accumulating
from tokencomp.methods.kv import Keep, KVView
from tokencomp.recipes.common import require

OFFSET = 25  # of the slot that goes in decode, from the end of what the prompt left


@base.register("prefixkv", paper="2412.03409", stage="kv")
@dataclass(frozen=True)
class PrefixKV(Accumulating):
    """Budgets of layers from calibration, slots by the attention of all queries and heads: one set a layer.

    ``forget`` holds the share each layer forgets, as ``calibrate`` finds it; its mean must be one less
    ``budget``. Without it all layers forget the same. In decode a row is held at that share of all tokens
    seen by dropping the slots that were ``OFFSET`` from the end after the prompt, without looking. Positions
    are the true ones; the official code's fall behind after an eviction.
    """

    budget: float = field(default=0.5, metadata={"help": "share of the tokens seen that is kept, in (0, 1]"})
    sinks: int = field(default=1, metadata={"help": eviction.SINKS_HELP})
    recent: int = field(default=1, metadata={"help": eviction.RECENT_HELP})
    forget: tuple[float, ...] | None = field(default=None, metadata={"help": "share each layer forgets"})

    def __post_init__(self) -> None:
        share = isinstance(self.budget, float)
        require(share, "PrefixKV", "budget", "a share in (0, 1] (a float)", repr(self.budget))
        super().__post_init__()
        if self.forget is not None:
            good = len(self.forget) > 0 and all(0 <= f < 1 for f in self.forget)
            require(good, "PrefixKV", "forget", "shares in [0, 1)", self.forget)
            mean = sum(self.forget) / len(self.forget)
            close = abs(mean - (1 - self.budget)) <= 0.02
            require(close, "PrefixKV", "mean of forget", f"1 - budget={1 - self.budget:.3f}", f"{mean:.3f}")

    @staticmethod
    def calibrate(scores: Sequence[Tensor], budget: float, *, protect: int = 2) -> tuple[float, ...]:
        """``forget`` from ``[n, N]`` scores of all n layers, one tensor a sample.

        The scores are ``recipes.accumulated_attention(heads="mean")``, ``protect`` tokens are never
        forgotten. See ``recipes.prefix_budget``.
        """
        require(len(scores) > 0, "PrefixKV.calibrate", "scores", "of one sample at least", "none")
        forget = [
            [f / s.shape[1] for f in recipes.prefix_budget(s, 1 - budget, protect=protect)] for s in scores
        ]
        return tuple(sum(layer) / len(layer) for layer in zip(*forget, strict=True))

    @property
    def needs_logits(self) -> bool:
        """Decode looks at nothing."""
        return False

    def layer_slots(self, budget: int, tokens: int, layers: int) -> tuple[int, ...]:
        """What calibration leaves of ``tokens``."""
        if self.forget is None:
            return (budget,) * layers
        require(len(self.forget) == layers, "PrefixKV", "forget", f"of {layers} layers", len(self.forget))
        return tuple(tokens - round(share * tokens) for share in self.forget)

    def score(self, view: KVView) -> Tensor:
        """``[B, 1, S]``: the mean over heads."""
        return view.over_heads(view.state["score"][:, :, : view.size])

    def evict(self, view: KVView) -> Keep | None:
        """As ever at the end of a prompt; remembers where decode will cut."""
        left = torch.minimum(eviction.held(view), torch.tensor(self.slots(view)))
        view.scratch["held"] = left
        view.scratch["cut"] = torch.where(left > OFFSET, left - OFFSET, left // 2)
        return super().evict(view)

    def after_step(self, view: KVView) -> Keep | None:
        """Drops what is too much, at the fixed place."""
        left = eviction.held(view)
        if self.every == 0 or view.step % self.every:
            return None
        seen = torch.tensor(view.seen)
        share = 1 - self.budget if self.forget is None else self.forget[view.layer]
        cut = view.scratch["cut"]
        spare = (left - cut - self.recent).clamp(min=0)
        surplus = (left - seen * (1 - share)).floor().long().clamp(min=0).minimum(spare)
        if not surplus.any():
            return None
        view.scratch["held"] = left - surplus
        slot, heads = torch.arange(view.size), view.lengths.shape[1]
        gone = (slot >= cut[:, None]) & (slot < (cut + surplus)[:, None])
        stays = ((slot < left[:, None]) & ~gone)[:, None].expand(-1, heads, -1)
        index = eviction.packed(stays, int((left - surplus).max())).to(view.lengths.device)
        return Keep(index, (left - surplus)[:, None].expand(-1, heads).int().to(index.device), ragged=True)
