"""Stride keys: keep every n-th slot of a cache, the baseline that looks at nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.kv import Keep, KVView


@base.register("stride_kv", paper="", stage="kv")
@dataclass(frozen=True)
class StrideKV(eviction.Eviction):
    """Evenly spaced slots: of n the last of each of K equal parts, ``(i + 1) n // K - 1``.

    So the last one always stays. Evicting again and again thins out old tokens more than new ones.
    """

    def score(self, view: KVView) -> Tensor:
        """None is better than another."""
        return torch.zeros(*view.lengths.shape, view.size, device=view.lengths.device)

    def select(self, view: KVView, score: Tensor, slots: Sequence[int]) -> Keep:
        """The ends of equal parts."""
        slot = torch.arange(view.size, device=score.device)
        n = view.lengths[..., None].long().clamp(min=1)
        k = torch.tensor(slots, device=score.device)[:, None, None].minimum(n)
        # slot s ends part i where (i + 1) n // k = s + 1: where a multiple of n / k lies in [s + 1, s + 2)
        ends = ((slot + 2) * k - 1) // n > ((slot + 1) * k - 1) // n
        score = (ends & (slot < n)).float()
        return eviction.keep_best(view, score, slots, [(0, 0)] * len(slots))
