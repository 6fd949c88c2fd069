"""One forward of a model, as all layers of its cache see it: which columns are tokens, and where they go."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokencomp.cache.pool import Ints

STEP_TOKENS = 8  # a forward of up to so many tokens on a cache with tokens is a decode step


@dataclass(frozen=True)
class Packing:
    """Columns that are tokens, packed: to the front of a prompt, to the end of a decode step."""

    order: Tensor  # [B, T'] int64 column of each packed row
    place: Tensor  # [B, T] int64 packed row of each column
    real: Tensor  # [B, T] bool, False is padding
    starts: Tensor  # [B] int32 first packed row that is a token
    counts: Tensor  # [B] int32 tokens

    def pack(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` to ``[B, H, T', D]``."""
        return x.gather(2, self.order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def unpack(self, x: Tensor) -> Tensor:
        """``[B, H, T', D]`` to ``[B, H, T, D]``, 0 in padding."""
        place = self.place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, place).masked_fill(~self.real[:, None, :, None], 0)


@dataclass(frozen=True)
class Forward:
    """What comes in."""

    tokens: int  # T, columns
    step: bool  # a decode step
    seen: Ints  # [B] tokens of each sequence, these included
    rows: list[int]  # the same
    counts: Ints | None  # [B] tokens of this forward; None: T in every row
    packing: Packing | None  # None: every column is a token
    number: int  # decode forwards so far, this one included; 0 in the first prompt


def forward_of(
    tokens: int, batch: int, columns: int, seen: Ints, steps: int, mask: Tensor | None, device: torch.device
) -> Forward:
    """Describe a forward of ``tokens`` columns behind ``columns`` others.

    Args:
        tokens: T.
        batch: B.
        columns: of earlier forwards, padding included.
        seen: ``[B]`` tokens of earlier forwards.
        steps: decode forwards so far.
        mask: ``[B, T]`` bool, False is padding; None: none.
        device: of the keys.
    """
    step = columns > 0 and tokens <= STEP_TOKENS
    packing = None if mask is None or bool(mask.all()) else packing_of(mask.to(device), to_end=step)
    counts = None if packing is None else packing.counts.cpu().numpy().astype(np.int32)
    after = seen + (np.int32(tokens) if counts is None else counts)
    return Forward(tokens, step, after, after.tolist(), counts, packing, steps + 1 if step else steps)


def packing_of(real: Tensor, *, to_end: bool) -> Packing:
    """The columns ``real`` ``[B, T]`` bool packed to the front, or to the end."""
    counts = real.sum(1)
    longest = int(counts.max())
    if to_end:
        order = real.to(torch.int8).argsort(dim=1, stable=True)[:, real.shape[1] - longest :]
        starts = longest - counts
    else:
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        starts = torch.zeros_like(counts)
    place = real.cumsum(1) - 1 + starts[:, None]
    place = place.masked_fill(~real, 0)
    return Packing(order, place, real, starts.to(torch.int32), counts.to(torch.int32))


class Rule(NamedTuple):
    """How a layer attends."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


class Decoded(NamedTuple):
    """What attention over the slots computed; see ``ops.paged_decode``."""

    output: Tensor
    lse: Tensor
    logits: Tensor
