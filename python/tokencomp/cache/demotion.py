"""Which slots become quantized pages: arithmetic of page orders and lists on the host.

A row of a cache with quantized pages has working slots, numbered by themselves, and quantized pages. Seen
together they are in this order: the first working page where it ``leads``, the quantized pages, the other
working pages.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.cache.pool import Ints
from tokencomp.methods.kv import ChannelMaps

LARGEST = 65504.0  # of fp16, in which the grids of groups are stored


@dataclass(frozen=True)
class Layout:
    """Quantized pages of every row, and whether its first working page comes before them."""

    page: int
    count: Ints  # [B, Hkv] quantized pages
    lead: Any  # [B, Hkv] bool

    def places(self, quantized: int, working: int) -> Ints:
        """``[B, Hkv, quantized + working]``: what lies at each place, as a place in the quantized pages
        followed by the working ones; one too far where nothing does.
        """
        place = np.arange(quantized + working)
        count, lead = self.count[..., None], self.lead[..., None].astype(np.int32)
        is_quantized = (place >= lead) & (place < lead + count)
        is_lead = (place == 0) & (lead == 1)
        own = np.where(is_lead, 0, place - count)
        return np.where(is_quantized, place - lead, quantized + np.minimum(own, working))

    def of_quantized(self, pages: int) -> Ints:
        """``[B, Hkv, pages]``: the place of each quantized page."""
        return np.asarray(np.arange(pages) + self.lead[..., None])

    def of_working(self, pages: int) -> Ints:
        """``[B, Hkv, pages]``: the place of each working page."""
        page = np.arange(pages)
        return np.where(self.lead[..., None] & (page == 0), 0, page + self.count[..., None])


@dataclass(frozen=True)
class Demotion:
    """Pages to be made of one type: page i of tokens ``slots[i]`` of row ``row[i]``, rows ascending."""

    kind: int
    row: Ints  # [n] b * Hkv + h
    slots: Ints  # [n, P] working slots
    seen: Ints  # [n, P] the same as they were seen
    at: Ints  # [n, P] where they are in the ``Keep``


@dataclass(frozen=True)
class Split:
    """What becomes of the slots of a ``Keep``."""

    demoted: list[Demotion]
    pages: Any  # [B, Hkv, Q] bool, the quantized pages that stay
    index: Ints  # [B, Hkv, K] working slots that stay working, ascending, then -1
    seen: Ints  # the same as they were seen, 0 where -1
    kept: Ints  # [B, Hkv] how many


def split(index: Ints, kind: Ints | None, able: Any, layout: Layout, quantized: int, kinds: int) -> Split:
    """Sort the slots that stay into quantized pages, pages to be made, and working slots.

    Args:
        index: ``[B, Hkv, K]`` slots as they are seen, ascending, -1 for none.
        kind: ``[B, Hkv, K]`` the type each should be of; None: as it is.
        able: ``[B, Hkv, K]`` bool, which of them a quantized page can hold; None: all.
        layout: of the rows.
        quantized: width of the tables of quantized pages.
        kinds: types of quantized pages.
    """
    page = layout.page
    there, place = index >= 0, index // page
    lead, count = layout.lead[..., None].astype(np.int32), layout.count[..., None]
    ordinal = place - lead
    is_quantized = there & (ordinal >= 0) & (ordinal < count)
    slot = np.where((lead == 1) & (place == 0), index, index - count * page)
    pages = np.zeros((*index.shape[:2], quantized), bool)
    b, h, i = np.nonzero(is_quantized)
    pages[b, h, ordinal[b, h, i]] = True
    rest = there & ~is_quantized
    demoted = []
    for which in range(1, kinds + 1 if kind is not None else 1):
        candidates = rest & (kind == which)
        if able is not None:
            candidates &= able
        rank = candidates.cumsum(2)
        taken = candidates & (rank <= rank[..., -1:] // page * page)
        if taken.any():
            each = taken.sum(2).ravel() // page
            row = np.repeat(np.arange(each.size, dtype=np.int32), each)
            at = np.broadcast_to(np.arange(index.shape[2]), index.shape)
            lists = (x[taken].reshape(-1, page) for x in (slot, index, at))
            demoted.append(Demotion(which, row, *lists))
            rest &= ~taken
    kept = rest.sum(2).astype(np.int32)
    left = np.full((*index.shape[:2], max(1, int(kept.max(initial=0)))), -1, np.int32)
    seen = np.zeros_like(left)
    b, h, i = np.nonzero(rest)
    rank = (rest.cumsum(2) - 1)[b, h, i]
    left[b, h, rank], seen[b, h, rank] = slot[b, h, i], index[b, h, i]
    return Split(demoted, pages, left, seen, kept)


def holdable(k: Tensor, v: Tensor, maps: ChannelMaps | None) -> Tensor:
    """``[B, Hkv, S]``: whether a grid can hold all channels of a token, after the maps: NaN, infinities and
    numbers beyond fp16 would make a group of a page NaN.
    """
    sides = (None, None, None, None) if maps is None else maps
    able: list[Tensor] = []
    for x, scale, bias in ((k, sides[0], sides[1]), (v, sides[2], sides[3])):
        y = x if bias is None else x.float() - bias[:, :, None]
        y = y if scale is None else y.float() * scale[:, :, None]
        able.append(torch.linalg.vector_norm(y, torch.inf, dim=-1) <= LARGEST)
    return able[0] & able[1]
