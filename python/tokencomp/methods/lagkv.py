"""LagKV: tokens that stand out from those of the next lag (arXiv 2504.04704)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.kv import KVView
from tokencomp.recipes.common import require


@base.register("lagkv", paper="2504.04704", stage="kv")
@dataclass(frozen=True)
class LagKV(eviction.Eviction):
    """Slots whose keys and values vary most over channels, measured by the range of the lag that follows.

    Behind the sinks a row is cut into lags. A channel of a slot is put on the scale of the next lag, where
    that lag's smallest value is 0 and its largest 1; the slot's score is the softmax within its lag of the
    standard deviation over channels, the mean of that of keys and of values. Slots compete by their rank
    within their lag, with ``across`` by the scores themselves. The last whole lag and what follows have no
    next one: they score best, as sinks do. Rows of fewer than two lags keep the newest. No queries are
    looked at. Channels that do not vary in the next lag count as 0.
    """

    lag: int = field(default=128, metadata={"help": "slots of a lag"})
    sinks: int = field(default=4, metadata={"help": eviction.SINKS_HELP})
    across: bool = field(default=False, metadata={"help": "lags compete with each other"})

    def __post_init__(self) -> None:
        require(self.lag >= 2, "LagKV", "lag", ">= 2", self.lag)
        super().__post_init__()

    def score(self, view: KVView) -> Tensor:
        """``[B, Hkv, size]`` in [0, 1]."""
        size, lag = view.size, self.lag
        slot = torch.arange(size, device=view.lengths.device)
        newest = slot / max(size, 1)
        lags = max(size - self.sinks, 0) // lag
        if lags < 2:
            return newest.expand(*view.lengths.shape, -1)
        cut = slice(self.sinks, self.sinks + lags * lag)
        keys, values = (
            lag_scores(x[:, :, cut].float().unflatten(2, (lags, lag))) for x in (view.keys(), view.values())
        )
        inner = (keys + values) / 2
        if not self.across:
            inner = inner.argsort(dim=-1, stable=True).argsort(dim=-1) / lag
        score = torch.ones(*view.lengths.shape, size, device=inner.device)
        score[:, :, self.sinks : cut.stop - lag] = inner.flatten(2)
        whole = (view.lengths - self.sinks).clamp(min=0) // lag  # lags of each row
        scored = self.sinks + (whole - 1)[..., None] * lag
        score = torch.where(slot < scored, score, 1.0)
        return torch.where((whole < 2)[..., None] & (slot >= self.sinks), newest, score)


def lag_scores(x: Tensor) -> Tensor:
    """``[..., lags - 1, lag]``: the softmax within each lag of how much the channels of a slot vary, on the
    scale of the next lag. ``x`` is ``[..., lags, lag, D]`` float32.
    """
    lowest, highest = x[..., 1:, :, :].aminmax(dim=-2, keepdim=True)
    span = highest - lowest
    scaled = torch.where(span > 0, (x[..., :-1, :, :] - lowest) / span, 0.0)
    return scaled.std(dim=-1).softmax(dim=-1)
