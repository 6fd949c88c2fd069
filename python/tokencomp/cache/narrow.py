"""Prompts of which later layers get fewer tokens: what each layer then counts.

A layer numbers the tokens that it gets, so a layer that never got some just sees a shorter sequence. The
cache counts them all; ``Absent`` translates.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokencomp.cache.forward import Forward, packing_of
from tokencomp.cache.pool import Ints

NEVER = np.iinfo(np.int32).max


class Absent:
    """The tokens that layers never got. Immutable.

    Args:
        numbers: of each layer of the model ``[B, n]``, ascending, ``NEVER`` behind the last.
    """

    def __init__(self, numbers: Mapping[int, Ints] | None = None) -> None:
        self._numbers = dict(numbers or {})

    def seen_by(self, layer: int, seen: Ints) -> Ints:
        """How many of the first ``seen[b]`` tokens ``layer`` got, ``[B]``."""
        gone = self._numbers.get(layer)
        return seen if gone is None else seen - (gone < seen[:, None]).sum(1).astype(np.int32)

    def of_layer(self, layer: int, what: Forward) -> Forward:
        """The forward as ``layer`` counts."""
        if layer not in self._numbers:
            return what
        seen = self.seen_by(layer, what.seen)
        return replace(what, seen=seen, rows=seen.tolist())

    def with_gone(self, layers: Iterable[int], gone: Ints) -> "Absent":
        """The same where these layers do not get the tokens ``gone`` ``[B, n]`` either."""
        numbers = dict(self._numbers)
        for layer in layers:
            numbers[layer] = _union(numbers[layer], gone) if layer in numbers else gone
        return Absent(numbers)

    def before(self, seen: Ints) -> "Absent":
        """The same without tokens at ``seen[b]`` and later."""
        limit = seen[:, None]
        return Absent({layer: np.where(gone < limit, gone, NEVER) for layer, gone in self._numbers.items()})

    def select(self, order: Ints) -> "Absent":
        """Sequence i becomes what sequence ``order[i]`` was."""
        return Absent({layer: gone[order] for layer, gone in self._numbers.items()})


def narrowed(whole: Forward, columns: Tensor) -> tuple[Forward, Ints]:
    """``whole`` with only ``columns`` ``[B, W]`` of its own, ascending, -1 in front of shorter rows; and the
    numbers ``[B, n]`` of the tokens that are not among them, ``NEVER`` behind the last.
    """
    there = columns >= 0
    packing = None if bool(there.all()) else packing_of(there, to_end=False)
    counts = None if packing is None else packing.counts.cpu().numpy().astype(np.int32)
    shape = (columns.shape[0], whole.tokens)
    real = np.ones(shape, bool) if whole.packing is None else whole.packing.real.cpu().numpy()
    kept = torch.zeros(shape[0], shape[1] + 1, dtype=torch.bool, device=columns.device)
    kept = kept.scatter(1, torch.where(there, columns, whole.tokens), True)[:, : whole.tokens]
    before = whole.seen - (np.int32(whole.tokens) if whole.counts is None else whole.counts)
    number = before[:, None] + real.cumsum(1, dtype=np.int32) - 1
    gone = np.sort(np.where(real & ~kept.cpu().numpy(), number, NEVER).astype(np.int32), axis=1)
    gone = gone[:, : max(1, int((gone < NEVER).sum(1).max(initial=0)))]
    return replace(whole, tokens=columns.shape[1], packing=packing, counts=counts), gone


def _union(some: Ints, more: Ints) -> Ints:
    """Rows with the numbers of both, each once."""
    both = np.sort(np.concatenate([some, more], 1), axis=1)
    both[:, 1:][both[:, 1:] == both[:, :-1]] = NEVER
    return np.sort(both, axis=1)
