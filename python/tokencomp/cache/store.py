"""The slots of one layer: working rows, quantized pages beside them, and the method's side arrays of both."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tokencomp import ops
from tokencomp.cache import retier
from tokencomp.cache.forward import Decoded
from tokencomp.cache.pool import Ints, Pages, Pool
from tokencomp.cache.rows import Rows
from tokencomp.cache.tiers import Tiers
from tokencomp.methods.kv import Keep, Side
from tokencomp.ops.page_pools import PagePools


class LayerStore:
    """Keys and values of one layer, ragged over rows (b, h) of sequences and kv heads.

    Slots are numbered as they are seen (see ``methods.kv``); where no page is quantized that is as they lie
    in the working rows.

    Args:
        pool: where the pages come from; other layers may share it.
        batch: B, sequences.
        heads: Hkv, kv heads.
        sides: the side arrays to keep, as ``KVMethod.sides``.
    """

    def __init__(self, pool: Pool, batch: int, heads: int, sides: Mapping[str, Side]) -> None:
        self.sides = dict(sides)
        self.scratch: dict[str, Any] = {}
        self.rows = Rows(pool, batch, heads)
        self.tiers = Tiers(self.rows) if pool.quantized else None
        self.state = self._new_state()

    # ---- what there is -----------------------------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        """Of the working pages; it knows those of the quantized ones."""
        return self.rows.pool

    @property
    def quantizes(self) -> bool:
        """Whether there are quantized pages now."""
        return self.tiers is not None and self.tiers.active

    @property
    def _all(self) -> Any:
        """What knows table, lengths and size of all slots together."""
        return self.tiers if self.quantizes else self.rows

    @property
    def host_lengths(self) -> Ints:
        """``[B, Hkv]`` slots in use."""
        lengths: Ints = self._all.host_lengths
        return lengths

    @property
    def lengths(self) -> Tensor:
        """The same where operators read them."""
        lengths: Tensor = self._all.lengths
        return lengths

    @property
    def size(self) -> int:
        """The largest of them."""
        return int(self._all.size)

    @property
    def room(self) -> int:
        """Slots that every row has still before it needs a page."""
        return self.rows.room

    @property
    def shared(self) -> bool:
        """Whether working pages may have other users."""
        return self.rows.shared

    @property
    def width(self) -> int:
        """Slots that the tables have room for; the side arrays are as wide."""
        return int(self._all.width)

    @property
    def slot_bytes(self) -> int:
        """Bytes of key and value of one slot in the working dtype."""
        return self.pool.page_bytes // self.pool.page

    @property
    def pages(self) -> Ints:
        """Numbers of all working pages in use, those of shared pages once for every user."""
        return self.rows.pages

    def pages_of(self, kind: int) -> Ints:
        """The same of a type: 0 working, i the i-th quantized one."""
        return self.pages if kind == 0 or self.tiers is None else self.tiers.numbers(kind)

    def tokens(self, kind: int) -> int:
        """Slots of all rows in pages of a type."""
        return int((self.rows.host_lengths if self.tiers is None else self.tiers.tokens(kind)).sum())

    @property
    def whole(self) -> bool:
        """Whether every token is there still, in slots in its order."""
        return not self.quantizes and self.rows.whole

    def position(self) -> Tensor:
        """``[B, Hkv, width]`` int32: the original position of every slot, without padding."""
        return self.tiers.positions() if self.tiers is not None and self.quantizes else self.rows.position()

    def kinds(self) -> Tensor:
        """``[B, Hkv, width]`` int32: the type of the page that every slot is in."""
        if self.tiers is not None:
            return self.tiers.kinds()
        return torch.zeros(*self.host_lengths.shape, self.width, dtype=torch.int32, device=self.pool.device)

    def side_bytes(self) -> int:
        """Bytes of everything but pages."""
        held = [*self.rows.tensors(), *([] if self.tiers is None else self.tiers.tensors())]
        held += [*self.state.values(), *(x for x in self.scratch.values() if isinstance(x, Tensor))]
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
        if self.tiers is None or not self.tiers.active:
            before = self.rows.table
            self.rows.append(k, v, starts, counts, grown)
            if self.state and self.rows.table is not before:
                self._widen_state()
            return
        slots = self.tiers.slots() if self.state and (k.shape[2] > self.room or self.shared) else None
        self.rows.append(k, v, starts, counts, grown)
        self.tiers.advance(grown)
        if slots is not None:  # the order of pages may be another
            self._settle(*slots)

    def fill(self, k: Tensor, v: Tensor, keep: Keep, seen: Ints, inv_freq: Tensor | None = None) -> int:
        """Store of a first prompt ``[B, Hkv, T, D]`` the tokens ``keep`` alone; the others never get a page.

        What ``keep`` quantizes is never stored otherwise. Returns how many tokens were not stored.
        """
        before = np.broadcast_to(seen[:, None], self.host_lengths.shape)
        if self.tiers is not None and keep.kind is not None:
            parts = retier.split_of(self.tiers, keep, (k, v))
            self._settle(*retier.demote(self.tiers, parts, keep, seen, (k, v)))
            return int((before - self.host_lengths).sum())
        index = keep.index.long().clamp(min=0)[..., None]
        kept = self._kept_lengths(keep, before)
        position = keep.index.clone()
        k, v = (x.gather(2, index.expand(*index.shape[:3], x.shape[-1])) for x in (k, v))
        old = self.state
        self.rows.append(k, v, None, None, k.shape[2])
        self.rows.truncate(kept)
        self.state = self._taken(old, keep.index)
        self.rows.rebase(position, seen, keep.index, inv_freq)
        return int((before - kept).sum())

    def widen(self, slots: int) -> None:
        """Tables and side arrays for at least ``slots`` slots; before there is a quantized page."""
        if self.rows.widen(slots):
            self._widen_state()

    def expect(self, times: int) -> None:
        """Room for so many other layers with as many pages of all types as this one, beside what is free."""
        for kind, pool in enumerate((self.pool, *self.pool.quantized)):
            pool.expect_like(len(self.pages_of(kind)), times)

    def pages_for(self, grown: int | Ints) -> int:
        """New pages that appending ``grown`` tokens to the rows takes."""
        return self.rows.pages_for(grown)

    # ---- tokens go ---------------------------------------------------------------------------------------

    def compact(self, keep: Keep, seen: Ints, inv_freq: Tensor | None = None) -> int:
        """Let the slots outside ``keep`` go and give their pages back; returns how many slots went.

        Args:
            keep: what stays.
            seen: tokens seen so far, ``[B]``.
            inv_freq: ``[D_rot / 2]`` frequencies of the rotary embedding; kept keys are then rotated to the
                positions just before the next token, without gaps.

        Raises MemoryError, and changes nothing, where shared pages cannot be copied, or quantized ones made.
        """
        if self.tiers is not None and (self.tiers.active or keep.kind is not None):
            return self._compact_tiers(self.tiers, keep, seen)
        kept = self._kept_lengths(keep, self.host_lengths)
        gone = int((self.host_lengths - kept).sum())
        if gone == 0 and keep.merge is None:
            return 0
        position = self.rows.position().gather(2, keep.index.long().clamp(min=0)).to(torch.int32)
        if keep.merge is not None:
            self.rows.merge(keep.index, keep.count, keep.merge)
        whole = keep.whole_pages and keep.merge is None
        self.rows.move(keep.index, keep.count, kept, whole_pages=whole)
        self.rows.truncate(kept)
        self.state = self._taken(self.state, keep.index)
        self.rows.rebase(position, seen, keep.index, inv_freq)
        return gone

    def _compact_tiers(self, tiers: Tiers, keep: Keep, seen: Ints) -> int:
        if keep.merge is not None:
            raise ValueError("cache: slots cannot be merged where pages are quantized")
        parts, before = retier.split_of(tiers, keep), self.host_lengths
        changes = parts.demoted or (parts.kept < self.rows.host_lengths).any()
        if not changes and parts.pages.sum() == tiers.count.sum():
            return 0
        self._settle(*retier.demote(tiers, parts, keep, seen))
        return int((before - self.host_lengths).sum())

    def _settle(self, quantized: Tensor, working: Tensor) -> None:
        """Slots of pages of either kind are now what was seen there."""
        if self.state and self.tiers is not None:
            working = pad(working, (0, self.rows.width - working.shape[2]), value=-1)
            self.state = self._taken(self.state, self.tiers.seen(quantized, working))

    def crop(self, seen: Ints) -> None:
        """Let all tokens at positions ``seen[b]`` and later go.

        A quantized page all of whose tokens stay stays; the tokens that stay of one that is cut become
        working slots again, as they were dequantized. Raises MemoryError, and changes nothing, where there
        is no room for these.
        """
        limit = torch.from_numpy(seen).to(self.pool.device)
        slot = torch.arange(self.width, device=self.pool.device)
        held = (self.position() < limit[:, None, None]) & (slot < self.lengths[..., None])
        if self.tiers is not None and self.quantizes:
            self._settle(*retier.crop(self.tiers, seen, held.cpu().numpy()))
            return
        for name, side in self.sides.items():
            self.state[name].masked_fill_(~held, side.fill)
        self.rows.crop(limit)
        self.state = {name: values[..., : self.width].contiguous() for name, values in self.state.items()}

    def renumber(self, pool: Pages, number: Ints) -> None:
        """Page i of ``pool`` has become page ``number[i]``."""
        if pool is self.pool:
            self.rows.renumber(number)
        if self.tiers is not None:
            self.tiers.renumber(pool, number)

    def release(self) -> None:
        """Give all pages back."""
        self.rows.release()
        if self.tiers is not None:
            self.tiers.release()
        self.scratch.clear()
        self.state = self._new_state()

    @staticmethod
    def _kept_lengths(keep: Keep, lengths: Ints) -> Ints:
        kept = keep.count.cpu().numpy() if keep.ragged else np.minimum(lengths, keep.index.shape[2])
        return kept.astype(np.int32)

    # ---- side arrays -------------------------------------------------------------------------------------

    def _new_state(self) -> dict[str, Tensor]:
        shape, device = (*self.host_lengths.shape, self.width), self.pool.device
        return {
            name: torch.full(shape, side.fill, dtype=side.dtype, device=device)
            for name, side in self.sides.items()
        }

    def _widen_state(self) -> None:
        state = self._new_state()
        for name, values in self.state.items():
            state[name][..., : values.shape[2]] = values
        self.state = state

    def _taken(self, old: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Side arrays in which slot i has what slot ``index[i]`` had; its fill where that is not there."""
        if not old:
            return old
        state = self._new_state()
        width = min(index.shape[2], self.width)
        index = index[..., :width].long()
        there = torch.arange(width, device=index.device) < self.lengths[..., None]
        for name, side in self.sides.items():
            was = old[name].shape[2]
            values = old[name].gather(2, index.clamp(0, was - 1))
            gone = ~there | (index < 0) | (index >= was)
            state[name][..., :width] = values.masked_fill(gone, side.fill)
        return state

    # ---- rows move ---------------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of what sequence ``rows[i]`` was; pages are shared until written."""
        order, rows = rows.cpu().numpy(), rows.to(self.pool.device)
        self.rows.select(order, rows)
        if self.tiers is not None:
            self.tiers.select(order, rows)
        self.state = {name: values[rows, :, : self.width] for name, values in self.state.items()}
        for name, value in self.scratch.items():
            if isinstance(value, Tensor):
                self.scratch[name] = value[rows.to(value.device)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerStore":
        return self.on(copy.deepcopy(self.pool, memo))

    def on(self, pool: Pool) -> "LayerStore":
        """A copy whose pages are those of the same numbers in ``pool``."""
        other = copy.copy(self)
        other.rows = self.rows.on(pool)
        other.tiers = None if self.tiers is None else self.tiers.on(other.rows)
        other.state = {name: values.to(pool.device, copy=True) for name, values in self.state.items()}
        other.scratch = {
            name: value.to(pool.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self.scratch.items()
        }
        return other

    # ---- attention ---------------------------------------------------------------------------------------

    def decode(
        self,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        logits: bool,
        index: Tensor | None = None,
        index_count: Tensor | None = None,
    ) -> Decoded:
        """Attention of the newest tokens ``[B, Hq, T <= 8, D]`` over all slots, or over the lists ``index``
        ``[B, Hkv or Hq, K]``.
        """
        table, lengths, order, quantized = self._read(q.shape[2])
        if index is not None and index.shape[1] != table.shape[1]:
            each = index.shape[1] // table.shape[1]
            table, lengths = table.repeat_interleave(each, 1), lengths.repeat_interleave(each, 1)
            order = None if order is None else order.repeat_interleave(each, 1)
            quantized = None if quantized is None else quantized.repeated(each)
        if index is not None and order is not None:
            index = torch.where(index < 0, -1, order.gather(2, index.clamp(min=0).long()))
        found = Decoded(
            *ops.paged_decode(
                q, self.pool.k_pages, self.pool.v_pages, table, lengths, scale=scale, softcap=softcap,
                sinks=sinks, logits_out=logits, index=index, index_count=index_count, quantized=quantized,
            )
        )  # fmt: skip
        return found if order is None or not logits else found._replace(logits=self._ordered(found, order))

    def prefill(
        self, q: Tensor, counts: Tensor | None, *, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of the newest tokens ``[B, Hq, T, D]``, any T, over all slots, and log-sum-exps.

        ``counts[b]`` of the T rows, the first, are tokens. Quantized pages are read tile by tile.
        """
        table, lengths, _, quantized = self._read(q.shape[2])
        return ops.flash_prefill(
            q, self.pool.k_pages, self.pool.v_pages, scale=scale, softcap=softcap, sinks=sinks,
            block_table=table, lengths=lengths, quantized=quantized, q_counts=counts,
        )  # fmt: skip

    def _read(self, rows: int) -> tuple[Tensor, Tensor, Tensor | None, PagePools | None]:
        """Table, lengths, the slots as the table has them where that differs, and the quantized pools, for
        attention of the newest ``rows`` tokens.
        """
        if self.tiers is None or not self.tiers.active:
            return self.rows.table, self.rows.lengths, None, None
        table, order = self.tiers.table_for(rows)
        return table, self.tiers.lengths, order, self.tiers.quantized()

    def _ordered(self, found: Decoded, order: Tensor) -> Tensor:
        """Logits by slot, of attention over a table in which slot i was slot ``order[i]``."""
        heads = found.logits.shape[1] // order.shape[1]
        there = torch.arange(order.shape[2], device=order.device) < self.lengths[..., None]
        index, there = (x.repeat_interleave(heads, 1)[:, :, None] for x in (order, there))
        logits = found.logits.gather(3, index.expand(-1, -1, found.logits.shape[2], -1))
        return logits.masked_fill(~there, -torch.inf)

    def gather(self) -> tuple[Tensor, Tensor]:
        """All keys and values, ``[B, Hkv, size, D]``, dequantized, zero beyond the lengths."""
        if self.tiers is not None and self.quantizes:
            return self.tiers.gather()
        return self.rows.gather(size=self.rows.size)
