"""The slots of one layer: page tables, lengths, positions and the method's side arrays over a shared pool."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.cache.forward import Decoded
from tokencomp.cache.pool import Ints, Pool
from tokencomp.cache.tables import NO_PAGE, padded, pages_of, places_for, without_pages
from tokencomp.methods.kv import Keep, Side


class LayerStore:
    """Keys and values of one layer, ragged over rows (b, h) of sequences and kv heads.

    The host knows lengths and pages, so that nothing waits for a device; on a CPU the tensors that operators
    get are views of the same memory.

    Args:
        pool: where the pages come from; other layers may share it.
        batch: B, sequences.
        heads: Hkv, kv heads.
        sides: the side arrays to keep, as ``KVMethod.sides``.
    """

    host_lengths: Ints
    host_table: Ints
    lengths: Tensor
    table: Tensor

    def __init__(self, pool: Pool, batch: int, heads: int, sides: Mapping[str, Side]) -> None:
        self.pool, self.sides = pool, dict(sides)
        self.scratch: dict[str, Any] = {}
        self.empty(batch, heads)

    def empty(self, batch: int, heads: int) -> None:
        """Start over without a slot; pages must have been given back."""
        self._set_rows(np.zeros((batch, heads), np.int32), np.full((batch, heads, 1), NO_PAGE, np.int32))
        self.scratch.clear()
        self.shared = False
        self._kept: Tensor | None = None  # [B, Hkv, K] original positions of what an eviction left
        self._base = torch.zeros_like(self.lengths)  # slots at that time; later ones follow without a gap
        self._base_seen = self._base.new_zeros(batch)  # tokens seen at that time
        self.state = self._new_state()

    # ---- what there is -----------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Slots that the tables have room for; the side arrays are as wide."""
        return int(self.host_table.shape[2]) * self.pool.page

    @property
    def slot_bytes(self) -> int:
        """Bytes of key and value of one slot."""
        return self.pool.page_bytes // self.pool.page

    @property
    def pages(self) -> Ints:
        """All page numbers in use, those of shared pages once for every user."""
        return np.asarray(self.host_table[self.host_table != NO_PAGE])

    def position(self) -> Tensor:
        """``[B, Hkv, width]`` int32: the original position of every slot, without padding."""
        slot = torch.arange(self.width, dtype=torch.int32, device=self.pool.device)
        base = self._base[..., None]
        position = slot - base + self._base_seen[:, None, None]
        if self._kept is not None:
            old = slot[: self._kept.shape[2]]
            kept = self._kept[..., : len(old)]
            position[..., : len(old)] = torch.where(old < base, kept, position[..., : len(old)])
        return position

    def side_bytes(self) -> int:
        """Bytes of everything but pages."""
        held = [self.table, self.lengths, self._base, self._base_seen, *self.state.values()]
        held += [value for value in self.scratch.values() if isinstance(value, Tensor)]
        held += [] if self._kept is None else [self._kept]
        return sum(t.numel() * t.element_size() for t in held)

    # ---- tokens come -------------------------------------------------------------------------------------

    def append(
        self,
        k: Tensor,
        v: Tensor,
        starts: Tensor | None = None,
        counts: Tensor | None = None,
        host_counts: Ints | None = None,
    ) -> None:
        """Store new tokens ``[B, Hkv, T, D]`` behind the others; see ``ops.kv_append_``.

        ``host_counts`` are the ``counts``, on the host. Raises MemoryError, and changes nothing, where the
        pool cannot grow.
        """
        grown: int | Ints = k.shape[2] if host_counts is None else host_counts[:, None]
        if k.shape[2] > self.room or self.shared:
            self._make_room(grown)
        ops.kv_append_(
            self.pool.k_pages, self.pool.v_pages, k, v, self.table, self.lengths, starts=starts, counts=counts
        )
        self._advance(grown)

    def fill(self, k: Tensor, v: Tensor, keep: Keep, seen: Ints, inv_freq: Tensor | None = None) -> int:
        """Store of a first prompt ``[B, Hkv, T, D]`` the tokens ``keep`` alone; the others never get a page.

        Heads that keep fewer than the others have pages for a moment that they give back. Returns how many
        tokens were not stored.
        """
        index = keep.index.long().clamp(min=0)[..., None]
        kept = self._kept_lengths(keep, np.broadcast_to(seen[:, None], self.host_lengths.shape))
        position = keep.index.clone()
        k, v = (x.gather(2, index.expand(*index.shape[:3], x.shape[-1])) for x in (k, v))
        self.append(k, v)
        self._state_of(keep, kept)
        self._truncate(kept)
        self._rebase(position, seen, keep.index, inv_freq)
        return int((seen[:, None] - kept).sum())

    def widen(self, slots: int) -> None:
        """Tables and side arrays for at least ``slots`` slots."""
        if slots > self.width:
            self._widen(-(-slots // self.pool.page))
            self._publish_table()

    def pages_for(self, grown: int | Ints) -> int:
        """New pages that appending ``grown`` tokens to the rows takes."""
        fresh, written = self._places_for(grown)
        return int(fresh.sum() + written.sum())

    def _make_room(self, grown: int | Ints) -> None:
        fresh, written = self._places_for(grown)
        count = int(fresh.sum())
        new = self.pool.allocate(count + int(written.sum()))
        if fresh.shape[2] > self.host_table.shape[2]:
            self._widen(fresh.shape[2])
            fresh, written = (padded(where, self.host_table.shape[2], False) for where in (fresh, written))
        self.host_table[fresh] = new[:count]
        if written.any():
            self._replace(written, new[count:])
        self._publish_table()

    def _places_for(self, grown: int | Ints) -> tuple[Any, Any]:
        """``[B, Hkv, places]`` bool: where new pages go, and where a page of others too is written."""
        page, lengths = self.pool.page, self.host_lengths
        have, want = pages_of(lengths, page), pages_of(lengths + grown, page)
        place = np.arange(max(self.host_table.shape[2], int(want.max(initial=0))))
        fresh = (place >= have[..., None]) & (place < want[..., None])
        written = np.zeros_like(fresh)
        if self.shared:
            table = padded(self.host_table, len(place), NO_PAGE)
            last = (place == (lengths // page)[..., None]) & (table != NO_PAGE)
            written = last & np.broadcast_to(np.asarray(grown) > 0, lengths.shape)[..., None]
            written[written] = self.pool.book.refcount(table[written]) > 1
        return fresh, written

    def _replace(self, where: Any, new: Ints) -> None:
        old = self.host_table[where]
        self.pool.copy_pages(old, new)
        self.host_table[where] = new
        self.pool.book.free(old)

    def _advance(self, grown: int | Ints) -> None:
        self.host_lengths += grown
        if self.lengths.device.type != "cpu":
            self.lengths.copy_(torch.from_numpy(self.host_lengths), non_blocking=True)
        if isinstance(grown, int):
            self.size += grown
            self.room -= grown
            if self.room < 0:
                self._measure()
        else:
            self._measure()

    # ---- tokens go ---------------------------------------------------------------------------------------

    def compact(self, keep: Keep, seen: Ints, inv_freq: Tensor | None = None) -> int:
        """Let the slots outside ``keep`` go and give their pages back; returns how many slots went.

        Args:
            keep: what stays.
            seen: tokens seen so far, ``[B]``.
            inv_freq: ``[D_rot / 2]`` frequencies of the rotary embedding; kept keys are then rotated to the
                positions just before the next token, without gaps.

        Raises MemoryError, and changes nothing, where shared pages cannot be copied.
        """
        kept = self._kept_lengths(keep, self.host_lengths)
        gone = int((self.host_lengths - kept).sum())
        if gone == 0 and keep.merge is None:
            return 0
        position = self.position().gather(2, keep.index.long().clamp(min=0)).to(torch.int32)
        if keep.merge is not None:
            self._unshare()
            self._merge(keep)
        if keep.whole_pages and keep.merge is None:
            self._drop_pages(keep)
        else:
            self._move(keep, kept)
        self._state_of(keep, kept)
        self._truncate(kept)
        self._rebase(position, seen, keep.index, inv_freq)
        return gone

    def _move(self, keep: Keep, kept: Ints) -> None:
        target = self._fresh_table(kept) if self.shared else None
        ops.kv_compact_(
            self.pool.k_pages, self.pool.v_pages, self.table, self.lengths, keep.index, keep.count,
            out_table=None if target is None else torch.from_numpy(target).to(self.pool.device),
        )  # fmt: skip
        if target is not None:
            self.pool.book.free(self.host_table[(self.host_table != target) & (self.host_table != NO_PAGE)])
            self.host_table = target

    def _drop_pages(self, keep: Keep) -> None:
        """What goes are whole pages: their entries leave the table, and nothing moves."""
        self.host_table, gone = without_pages(self.host_table, keep.index.cpu().numpy(), self.pool.page)
        self.pool.book.free(gone)

    def crop(self, seen: Ints) -> None:
        """Let all tokens at positions ``seen[b]`` and later go."""
        limit = torch.from_numpy(seen).to(self.pool.device)
        slot = torch.arange(self.width, device=self.pool.device)
        held = (self.position() < limit[:, None, None]) & (slot < self.lengths[..., None])
        kept = held.sum(-1).to(torch.int32)
        for name, side in self.sides.items():
            self.state[name].masked_fill_(~held, side.fill)
        self._base = torch.minimum(self._base, kept)
        self._base_seen = torch.minimum(self._base_seen, limit.to(torch.int32))
        self._truncate(kept.cpu().numpy().copy())

    def renumber(self, number: Ints) -> None:
        """Page i of the pool has become page ``number[i]``."""
        self.host_table = np.where(self.host_table == NO_PAGE, NO_PAGE, number[self.host_table])
        self._publish_table()

    def release(self) -> None:
        """Give all pages back."""
        self.pool.book.free(self.pages)
        self.empty(*self.host_lengths.shape)

    def _merge(self, keep: Keep) -> None:
        merge: Any = keep.merge
        ops.evict_merge_(
            self.pool.k_pages, self.pool.v_pages, self.table, self.lengths, keep.index, keep.count,
            merge.member, merge.target, merge.weight, merge.center, values=merge.values, keys=merge.keys,
        )  # fmt: skip

    def _kept_lengths(self, keep: Keep, lengths: Ints) -> Ints:
        kept = keep.count.cpu().numpy() if keep.ragged else np.minimum(lengths, keep.index.shape[2])
        return kept.astype(np.int32)

    def _truncate(self, kept: Ints) -> None:
        used = pages_of(kept, self.pool.page)
        place = np.arange(self.host_table.shape[2])
        free = (place >= used[..., None]) & (self.host_table != NO_PAGE)
        self.pool.book.free(self.host_table[free])
        self.host_table[free] = NO_PAGE
        places = places_for(int(used.max(initial=1)))
        self.state = {
            name: values[..., : places * self.pool.page].contiguous() for name, values in self.state.items()
        }
        self._set_rows(kept, self.host_table[..., :places])

    def _rebase(self, position: Tensor, seen: Ints, index: Tensor, inv_freq: Tensor | None) -> None:
        """Slot i, of original position ``position[i]``, was slot ``index[i]``."""
        shift = self._base_seen[:, None] - self._base  # rotated keys lie at the positions slot + shift
        self._kept = position
        self._base = self.lengths.clone()
        self._base_seen = torch.from_numpy(seen.astype(np.int32)).to(self.pool.device)
        if inv_freq is not None:
            slot = torch.arange(index.shape[2], dtype=torch.int32, device=index.device)
            after = slot + (self._base_seen[:, None] - self._base)[..., None]
            before = torch.where(slot < self._base[..., None], index + shift[..., None], after)
            ops.rope_shift_(self.pool.k_pages, self.table, self.lengths, before, after, inv_freq)

    def _state_of(self, keep: Keep, kept: Ints) -> None:
        if not self.state:
            return
        index = keep.index.long().clamp(min=0)
        there = (
            torch.arange(index.shape[2], device=index.device)
            < torch.from_numpy(kept).to(index.device)[..., None]
        )
        compacted = self._new_state()
        for name, side in self.sides.items():
            values = self.state[name].gather(2, index)
            compacted[name][..., : index.shape[2]] = values.masked_fill(~there, side.fill)
        self.state = compacted

    # ---- rows move ---------------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of what sequence ``rows[i]`` was; pages are shared until written."""
        order = rows.cpu().numpy()
        table, lengths = self.host_table[order], self.host_lengths[order]
        old = self.pages
        self.pool.book.retain(table[table != NO_PAGE])
        self.pool.book.free(old)
        rows = rows.to(self.pool.device)
        self._base, self._base_seen = self._base[rows], self._base_seen[rows]
        self._kept = None if self._kept is None else self._kept[rows]
        self.state = {name: values[rows] for name, values in self.state.items()}
        for name, value in self.scratch.items():
            if isinstance(value, Tensor):
                self.scratch[name] = value[rows.to(value.device)]
        self._set_rows(lengths, table)
        self.shared = bool((self.pool.book.refcount(self.pages) > 1).any())

    def _unshare(self) -> None:
        if self.shared:
            shared = self.host_table != NO_PAGE
            shared[shared] = self.pool.book.refcount(self.host_table[shared]) > 1
            self._replace(shared, self.pool.allocate(int(shared.sum())))
            self._publish_table()
            self.shared = False

    # ---- attention ---------------------------------------------------------------------------------------

    def decode(
        self, q: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None, logits: bool
    ) -> Decoded:
        """Attention of the newest tokens ``[B, Hq, T <= 8, D]`` over all slots."""
        return Decoded(
            *ops.paged_decode(
                q, self.pool.k_pages, self.pool.v_pages, self.table, self.lengths, scale=scale,
                softcap=softcap, sinks=sinks, logits_out=logits,
            )
        )  # fmt: skip

    def gather(self) -> tuple[Tensor, Tensor]:
        """All keys and values, ``[B, Hkv, size, D]``, zero beyond the lengths."""
        return ops.kv_gather(self.pool.k_pages, self.pool.v_pages, self.table, self.lengths, size=self.size)

    # ---- tables ------------------------------------------------------------------------------------------

    def _set_rows(self, lengths: Ints, table: Ints) -> None:
        self.host_lengths = np.ascontiguousarray(lengths, np.int32)
        self.host_table = np.ascontiguousarray(table, np.int32)
        self.lengths = torch.from_numpy(self.host_lengths).to(self.pool.device)
        self._publish_table()
        self._measure()

    def _publish_table(self) -> None:
        self.table = torch.from_numpy(self.host_table).to(self.pool.device)

    def _measure(self) -> None:
        lengths, page = self.host_lengths, self.pool.page
        self.size = int(lengths.max(initial=0))
        self.room = int((pages_of(lengths, page) * page - lengths).min(initial=page))

    def _widen(self, places: int) -> None:
        self.host_table = padded(self.host_table, places_for(places), NO_PAGE)
        state, old = self._new_state(), self.state
        for name, values in old.items():
            state[name][..., : values.shape[2]] = values
        self.state = state

    def _new_state(self) -> dict[str, Tensor]:
        shape, device = (*self.host_lengths.shape, self.width), self.pool.device
        return {
            name: torch.full(shape, side.fill, dtype=side.dtype, device=device)
            for name, side in self.sides.items()
        }

    def _fresh_table(self, kept: Ints) -> Ints:
        """A table for ``kept`` slots in which shared pages are replaced by new ones."""
        place = np.arange(self.host_table.shape[2])
        used = place < pages_of(kept, self.pool.page)[..., None]
        target = np.where(used, self.host_table, NO_PAGE).astype(np.int32)
        shared = used.copy()
        shared[used] = self.pool.book.refcount(self.host_table[used]) > 1
        target[shared] = self.pool.allocate(int(shared.sum()))
        return np.asarray(target)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerStore":
        return self.on(copy.deepcopy(self.pool, memo))

    def on(self, pool: Pool) -> "LayerStore":
        """A copy whose pages are those of the same numbers in ``pool``."""
        other = copy.copy(self)
        other.pool = pool

        def move(t: Tensor) -> Tensor:
            return t.to(pool.device, copy=True)

        other._set_rows(self.host_lengths.copy(), self.host_table.copy())
        other._base, other._base_seen = move(self._base), move(self._base_seen)
        other._kept = None if self._kept is None else move(self._kept)
        other.state = {name: move(values) for name, values in self.state.items()}
        other.scratch = {
            name: move(value) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self.scratch.items()
        }
        return other
