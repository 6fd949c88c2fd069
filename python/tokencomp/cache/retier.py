"""Slots change the type of their page: by ``Keep.kind``, and back where a crop cuts a quantized one."""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tokencomp.cache.demotion import Demotion, Split, holdable, split
from tokencomp.cache.pool import Ints
from tokencomp.cache.tables import NO_PAGE
from tokencomp.cache.tiers import Tiers
from tokencomp.methods.kv import ChannelMaps, Keep

Dense: TypeAlias = tuple[Tensor, Tensor]
Seen: TypeAlias = tuple[Tensor, Tensor]
"""Where the slots of quantized and of working pages, as they are now, were seen before: [B, Hkv, slots]."""


def split_of(tiers: Tiers, keep: Keep, dense: Dense | None = None) -> Split:
    """What becomes of the slots of ``keep``, or of the tokens of a prompt that nothing is stored of.

    A token that no grid can hold stays as it is.
    """
    there = np.arange(keep.index.shape[2]) < keep.count.cpu().numpy()[..., None]
    index = np.where(there, keep.index.cpu().numpy(), -1)
    kind = None if keep.kind is None else keep.kind.cpu().numpy()
    able, maps = np.ones(index.shape, bool), tiers.maps_for(keep.maps)
    if dense is not None and kind is not None:
        able = np.take_along_axis(holdable(*dense, maps).cpu().numpy(), index.clip(min=0), 2)
    while True:
        parts = split(index, kind, able, tiers.layout, tiers.entries.shape[2], len(tiers.pools))
        if dense is not None or all([_holds(tiers, made, able, maps) for made in parts.demoted]):
            return parts


def _holds(tiers: Tiers, made: Demotion, able: Any, maps: ChannelMaps | None) -> bool:
    """Whether quantized pages can hold all these working slots; those that they cannot leave ``able``."""
    shape, rows = tiers.count.shape, tiers.count.size
    each = np.bincount(made.row, minlength=rows)
    rank = np.arange(len(made.row)) - np.repeat(each.cumsum() - each, each)
    slots = np.full((rows, int(each.max()), made.slots.shape[1]), -1, np.int32)
    slots[made.row, rank] = made.slots
    index = torch.from_numpy(slots.reshape(*shape, -1)).to(tiers.position.device)
    held = holdable(*tiers.rows.gather(index, size=index.shape[2]), maps).cpu().numpy()
    bad = ~held.reshape(slots.shape)[made.row, rank]
    row = np.broadcast_to(made.row[:, None], bad.shape)
    able.reshape(rows, -1)[row[bad], made.at[bad]] = False
    return not bad.any()


def demote(tiers: Tiers, parts: Split, keep: Keep, seen: Ints, dense: Dense | None = None) -> Seen:
    """Make the pages of ``parts``, and let all slots go that are not in it.

    Raises MemoryError, and changes nothing, where a pool has no room.
    """
    rows, device = tiers.rows, tiers.position.device
    tiers.reserve(parts.demoted)
    rows.pool.reserve(rows.copies_for(parts.kept) if dense is None else rows.pages_for(int(parts.kept.max())))
    working = torch.from_numpy(parts.seen).to(device).long()
    position = None if dense is not None else tiers.positions()
    entries = tiers.write(parts.demoted, tiers.maps_for(keep.maps), dense)
    quantized = tiers.replace(parts, entries)
    if position is None or dense is not None:  # tokens of a first prompt are where they are
        _fill(tiers, parts, working, seen, dense)
        tiers.settle(quantized.int())
        return quantized, working
    if (parts.kept < rows.host_lengths).any():
        index, count = (torch.from_numpy(x).to(device) for x in (parts.index, parts.kept))
        rows.move(index, count, parts.kept, whole_pages=keep.whole_pages and not parts.demoted)
        rows.truncate(parts.kept)
    rows.rebase(position.gather(2, working), seen)
    tiers.settle(position.gather(2, quantized))
    return quantized, working


def _fill(tiers: Tiers, parts: Split, working: Tensor, seen: Ints, dense: Any) -> None:
    if not parts.kept.any():
        return tiers.rows.rebase(working.int(), seen)
    index = working[..., None]
    k, v = (x.gather(2, index.expand(*working.shape, x.shape[-1])) for x in dense)
    return tiers.rows.fill(k, v, parts.kept, working.int(), seen)


def crop(tiers: Tiers, seen: Ints, held: Any) -> Seen:
    """Let the slots outside ``held`` ``[B, Hkv, width]`` go: all those at positions ``seen[b]`` and later.

    A quantized page all of whose tokens stay stays; the tokens that stay of one that is cut become working
    slots, as they were dequantized. Raises MemoryError, and changes nothing, where these have no room.
    """
    rows, page, position = tiers.rows, tiers.layout.page, tiers.positions()
    quantized = tiers.kinds().cpu().numpy() > 0
    whole = np.repeat(held.reshape(*held.shape[:2], -1, page).all(3), page, 2) & quantized
    left = held & ~whole
    pages = np.take_along_axis(whole[..., ::page], tiers.layout.of_quantized(tiers.entries.shape[2]), 2)
    kept = left.sum(2).astype(np.int32)
    order = np.where(left, position.cpu().numpy(), np.iinfo(np.int32).max).argsort(2, kind="stable")
    working = torch.from_numpy(order[..., : max(1, int(kept.max(initial=0)))]).to(position.device)
    if (left & quantized).any():
        fresh = kept.size * -(-int(kept.max()) // page)
        own = int((rows.pool.book.refcount(rows.pages) == 1).sum())
        rows.pool.reserve(max(0, fresh - own))
        index = working[..., None].expand(*working.shape, rows.pool.width)
        k, v = (x.gather(2, index.clamp(max=x.shape[2] - 1)) for x in tiers.gather())
        rows.release()
        rows.fill(k, v, kept, position.gather(2, working), seen)
    else:
        rows.crop(torch.from_numpy(seen).to(position.device))
    none = np.zeros((0,), np.int32)
    of_pages = tiers.replace(Split([], pages & (tiers.entries != NO_PAGE), none, none, kept), [])
    tiers.settle(position.gather(2, of_pages))
    return of_pages, working
