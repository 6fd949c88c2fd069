"""The working slots of one layer: page tables, lengths and positions over a shared pool."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.cache.pool import Ints, Pool
from tokencomp.cache.tables import NO_PAGE, padded, pages_of, places_for, without_pages
from tokencomp.methods.kv import MergeSpec


class Rows:
    """Keys and values of one layer in the working dtype, ragged over rows (b, h) of sequences and kv heads.

    The host knows lengths and pages, so that nothing waits for a device; on a CPU the tensors that operators
    get are views of the same memory.

    Args:
        pool: where the pages come from; other layers may share it.
        batch: B, sequences.
        heads: Hkv, kv heads.
    """

    host_lengths: Ints
    host_table: Ints
    lengths: Tensor
    table: Tensor

    def __init__(self, pool: Pool, batch: int, heads: int) -> None:
        self.pool = pool
        self.empty(batch, heads)

    def empty(self, batch: int, heads: int) -> None:
        """Start over without a slot; pages must have been given back."""
        self._set(np.zeros((batch, heads), np.int32), np.full((batch, heads, 1), NO_PAGE, np.int32))
        self.shared = False
        self._kept: Tensor | None = None  # [B, Hkv, K] original positions of what an eviction left
        self._base = torch.zeros_like(self.lengths)  # slots at that time; later ones follow without a gap
        self._base_seen = self._base.new_zeros(batch)  # tokens seen at that time

    # ---- what there is -----------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Slots that the tables have room for."""
        return int(self.host_table.shape[2]) * self.pool.page

    @property
    def pages(self) -> Ints:
        """All page numbers in use, those of shared pages once for every user."""
        return np.asarray(self.host_table[self.host_table != NO_PAGE])

    @property
    def whole(self) -> bool:
        """Whether nothing was evicted."""
        return self._kept is None

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

    def tensors(self) -> list[Tensor]:
        """Everything but pages."""
        held = [self.table, self.lengths, self._base, self._base_seen]
        return held if self._kept is None else [*held, self._kept]

    # ---- tokens come -------------------------------------------------------------------------------------

    def append(
        self, k: Tensor, v: Tensor, starts: Tensor | None, counts: Tensor | None, grown: int | Ints
    ) -> None:
        """Store new tokens ``[B, Hkv, T, D]`` behind the others; see ``ops.kv_append_``.

        ``grown`` is how many a row gets, on the host. Raises MemoryError, and changes nothing, where the
        pool cannot grow.
        """
        if k.shape[2] > self.room or self.shared:
            self._make_room(grown)
        ops.kv_append_(
            self.pool.k_pages, self.pool.v_pages, k, v, self.table, self.lengths, starts=starts, counts=counts
        )
        self._advance(grown)

    def fill(self, k: Tensor, v: Tensor, kept: Ints, position: Tensor, seen: Ints) -> None:
        """Of ``[B, Hkv, K, D]``, tokens of these positions, the first ``kept[b, h]``; rows are empty before.

        Heads that keep fewer than the others have pages for a moment that they give back.
        """
        self.append(k, v, None, None, k.shape[2])
        self.truncate(kept)
        self.rebase(position, seen)

    def widen(self, slots: int) -> bool:
        """Tables for at least ``slots`` slots; whether they were narrower."""
        if slots <= self.width:
            return False
        self._widen(-(-slots // self.pool.page))
        self._publish_table()
        return True

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

    def copies_for(self, kept: Ints) -> int:
        """Pages that letting all but ``kept`` slots go takes: of those that others use too."""
        return 0 if not self.shared else int(self._shared_pages(kept).sum())

    def move(self, index: Tensor, count: Tensor, kept: Ints, *, whole_pages: bool = False) -> None:
        """The slots ``index`` of every row, ascending, go to its front; then ``truncate``, ``rebase``.

        ``whole_pages``: what goes are whole pages, whose entries leave the table, and nothing moves.
        """
        if whole_pages:
            self.host_table, gone = without_pages(self.host_table, index.cpu().numpy(), self.pool.page)
            self.pool.book.free(gone)
            return
        target = self._fresh_table(kept) if self.shared else None
        ops.kv_compact_(
            self.pool.k_pages, self.pool.v_pages, self.table, self.lengths, index, count,
            out_table=None if target is None else torch.from_numpy(target).to(self.pool.device),
        )  # fmt: skip
        if target is not None:
            self.pool.book.free(self.host_table[(self.host_table != target) & (self.host_table != NO_PAGE)])
            self.host_table = target

    def merge(self, index: Tensor, count: Tensor, merge: MergeSpec) -> None:
        """Slots that go into slots that stay; see ``ops.evict_merge_``."""
        self._unshare()
        ops.evict_merge_(
            self.pool.k_pages, self.pool.v_pages, self.table, self.lengths, index, count,
            merge.member, merge.target, merge.weight, merge.center, values=merge.values, keys=merge.keys,
        )  # fmt: skip

    def crop(self, limit: Tensor) -> None:
        """Let all tokens at positions ``limit[b]`` and later go."""
        slot = torch.arange(self.width, device=self.pool.device)
        held = (self.position() < limit[:, None, None]) & (slot < self.lengths[..., None])
        kept = held.sum(-1).to(torch.int32)
        self._base = torch.minimum(self._base, kept)
        self._base_seen = torch.minimum(self._base_seen, limit.to(torch.int32))
        self.truncate(kept.cpu().numpy().copy())

    def renumber(self, number: Ints) -> None:
        """Page i of the pool has become page ``number[i]``."""
        self.host_table = np.where(self.host_table == NO_PAGE, NO_PAGE, number[self.host_table])
        self._publish_table()

    def release(self) -> None:
        """Give all pages back."""
        self.pool.book.free(self.pages)
        self.empty(*self.host_lengths.shape)

    def truncate(self, kept: Ints) -> None:
        """Only the first ``kept[b, h]`` slots stay."""
        used = pages_of(kept, self.pool.page)
        place = np.arange(self.host_table.shape[2])
        free = (place >= used[..., None]) & (self.host_table != NO_PAGE)
        self.pool.book.free(self.host_table[free])
        self.host_table[free] = NO_PAGE
        self._set(kept, self.host_table[..., : places_for(int(used.max(initial=1)))])

    def rebase(
        self, position: Tensor, seen: Ints, index: Tensor | None = None, inv_freq: Tensor | None = None
    ) -> None:
        """Slot i has original position ``position[i]``; the next token of each sequence has ``seen[b]``.

        With ``inv_freq``: slot i was slot ``index[i]``, and its key is rotated to where it lies now, just
        before the next token, without gaps.
        """
        shift = self._base_seen[:, None] - self._base  # rotated keys lie at the positions slot + shift
        self._kept = position
        self._base = self.lengths.clone()
        self._base_seen = torch.from_numpy(seen.astype(np.int32)).to(self.pool.device)
        if inv_freq is not None and index is not None:
            slot = torch.arange(index.shape[2], dtype=torch.int32, device=index.device)
            after = slot + (self._base_seen[:, None] - self._base)[..., None]
            before = torch.where(slot < self._base[..., None], index + shift[..., None], after)
            ops.rope_shift_(self.pool.k_pages, self.table, self.lengths, before, after, inv_freq)

    # ---- rows move ---------------------------------------------------------------------------------------

    def select(self, order: Ints, rows: Tensor) -> None:
        """Sequence i becomes a copy of what sequence ``rows[i]`` was; pages are shared until written."""
        table, lengths = self.host_table[order], self.host_lengths[order]
        old = self.pages
        self.pool.book.retain(table[table != NO_PAGE])
        self.pool.book.free(old)
        self._base, self._base_seen = self._base[rows], self._base_seen[rows]
        self._kept = None if self._kept is None else self._kept[rows]
        self._set(lengths, table)
        self.shared = bool((self.pool.book.refcount(self.pages) > 1).any())

    def _unshare(self) -> None:
        if self.shared:
            shared = self._shared_pages(self.host_lengths)
            self._replace(shared, self.pool.allocate(int(shared.sum())))
            self._publish_table()
            self.shared = False

    def gather(self, index: Tensor | None = None, *, size: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, or of ``index``, ``[B, Hkv, size, D]``, zero where there is none."""
        return ops.kv_gather(
            self.pool.k_pages, self.pool.v_pages, self.table, self.lengths, index=index, size=size
        )

    # ---- tables ------------------------------------------------------------------------------------------

    def _set(self, lengths: Ints, table: Ints) -> None:
        self.host_lengths = np.ascontiguousarray(lengths, np.int32)
        self.host_table = np.ascontiguousarray(table, np.int32)
        self.lengths = torch.from_numpy(self.host_lengths).to(self.pool.device)
        self._publish_table()
        self._measure()

    def _publish_table(self) -> None:
        """A new tensor every time: who reads another table made from this one sees that it has changed."""
        self.table = torch.from_numpy(self.host_table).to(self.pool.device)

    def _measure(self) -> None:
        lengths, page = self.host_lengths, self.pool.page
        self.size = int(lengths.max(initial=0))
        self.room = int((pages_of(lengths, page) * page - lengths).min(initial=page))

    def _widen(self, places: int) -> None:
        self.host_table = padded(self.host_table, places_for(places), NO_PAGE)

    def _shared_pages(self, kept: Ints) -> Any:
        """``[B, Hkv, places]`` bool: pages of the first ``kept`` slots that others use too."""
        shared = np.arange(self.host_table.shape[2]) < pages_of(kept, self.pool.page)[..., None]
        shared &= self.host_table != NO_PAGE
        shared[shared] = self.pool.book.refcount(self.host_table[shared]) > 1
        return shared

    def _fresh_table(self, kept: Ints) -> Ints:
        """A table for ``kept`` slots in which shared pages are replaced by new ones."""
        shared = self._shared_pages(kept)
        used = np.arange(self.host_table.shape[2]) < pages_of(kept, self.pool.page)[..., None]
        target = np.where(used, self.host_table, NO_PAGE).astype(np.int32)
        target[shared] = self.pool.allocate(int(shared.sum()))
        return np.asarray(target)

    def on(self, pool: Pool) -> "Rows":
        """A copy whose pages are those of the same numbers in ``pool``."""
        other = copy.copy(self)
        other.pool = pool

        def move(t: Tensor) -> Tensor:
            return t.to(pool.device, copy=True)

        other._set(self.host_lengths.copy(), self.host_table.copy())
        other._base, other._base_seen = move(self._base), move(self._base_seen)
        other._kept = None if self._kept is None else move(self._kept)
        return other
