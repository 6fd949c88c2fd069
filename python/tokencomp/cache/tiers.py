"""The quantized pages of one layer beside its working rows, and both as attention and methods see them."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.cache.demotion import Demotion, Layout, Split
from tokencomp.cache.pool import Ints, QuantizedPool
from tokencomp.cache.rows import Rows
from tokencomp.cache.tables import NO_PAGE, padded, pages_of, places_for
from tokencomp.methods.kv import ChannelMaps
from tokencomp.ops.kvquant_pages import page_entry
from tokencomp.ops.page_pools import PagePools

NUMBER = (1 << 28) - 1  # of a page, in an entry


class Tiers:
    """Lists of quantized pages of every row (b, h). They are whole (all slots in use) and nobody writes to
    them, so that rows share them freely.

    ``table``, ``lengths`` and ``size`` are of working and quantized slots together, in the order of
    ``methods.kv``; ``arrange`` makes them.
    """

    host_lengths: Ints
    lengths: Tensor
    table: Tensor
    size: int

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.empty()

    def empty(self) -> None:
        """Without a page; they must have been given back."""
        batch, heads = self.rows.host_lengths.shape
        self.entries = np.full((batch, heads, 0), NO_PAGE, np.int32)  # in the order they came
        self.count = np.zeros((batch, heads), np.int32)
        self.position = torch.zeros(batch, heads, 0, dtype=torch.int32, device=self.rows.pool.device)
        self.maps: ChannelMaps | None = None
        self._older = np.zeros((batch, heads), bool)  # whether the first working slot is the oldest
        self.arrange()

    @property
    def pools(self) -> tuple[QuantizedPool, ...]:
        """By type, from 1 on."""
        return self.rows.pool.quantized

    @property
    def active(self) -> bool:
        """Whether there is a quantized page at all."""
        return self.entries.shape[2] > 0

    @property
    def width(self) -> int:
        """Slots that the table has room for."""
        return int(self.host_table.shape[2]) * self.rows.pool.page

    def tensors(self) -> list[Tensor]:
        """Everything but pages."""
        maps = [] if self.maps is None else [m for m in self.maps if m is not None]
        return [self.position, *maps, *([self.table, self.lengths] if self.active else [])]

    def tokens(self, kind: int) -> Ints:
        """``[B, Hkv]`` tokens in pages of a type; 0: working ones."""
        if kind == 0:
            return self.rows.host_lengths
        return np.asarray(((self.entries >> 28) == kind).sum(2) * self.rows.pool.page, np.int32)

    def numbers(self, kind: int) -> Ints:
        """Page numbers of a type, those of shared pages once for every user."""
        return np.asarray(self.entries[(self.entries >> 28) == kind] & NUMBER)

    # ---- as it is seen -----------------------------------------------------------------------------------

    def arrange(self) -> None:
        """Anew after pages have come or gone, of either kind."""
        rows, page = self.rows, self.rows.pool.page
        self.layout = Layout(page, self.count, self._older & (rows.host_lengths > page) & (self.count > 0))
        self._source: Tensor | None = None
        if not self.active:
            self.host_table, self.host_lengths = rows.host_table, rows.host_lengths
            self.table, self.lengths, self.size = rows.table, rows.lengths, rows.size
            return
        self.host_lengths = rows.host_lengths + self.count * page
        self.lengths = torch.from_numpy(self.host_lengths).to(rows.pool.device)
        self.host_table = self._table_of(self.layout)
        self.table = torch.from_numpy(self.host_table).to(rows.pool.device)
        self._seen_rows = rows.table
        self.size = int(self.host_lengths.max(initial=0))

    def advance(self, grown: int | Ints) -> None:
        """Working rows have got so many slots."""
        if not self.active or self.rows.table is not self._seen_rows:
            self.arrange()
            return
        self.host_lengths += grown
        if self.lengths.device.type != "cpu":
            self.lengths.copy_(torch.from_numpy(self.host_lengths), non_blocking=True)
        self.size = self.size + grown if isinstance(grown, int) else int(self.host_lengths.max(initial=0))

    def _table_of(self, layout: Layout) -> Ints:
        table = np.concatenate([self.entries, self.rows.host_table], 2)
        pages = self.count + pages_of(self.rows.host_lengths, layout.page)
        places = layout.places(self.entries.shape[2], self.rows.host_table.shape[2])
        table = np.take_along_axis(padded(table, table.shape[2] + 1, NO_PAGE), places, 2)
        wanted = places_for(int(pages.max(initial=1)))
        return np.ascontiguousarray(padded(table, wanted, NO_PAGE)[..., :wanted], np.int32)

    def seen(self, quantized: Tensor, working: Tensor) -> Tensor:
        """Side arrays ``[B, Hkv, slots, ...]`` of quantized and of working slots as they are seen,
        ``[B, Hkv, width, ...]``; what is in no slot means nothing.
        """
        both = torch.cat([quantized, working], 2)
        if self._source is None:
            places = self.layout.places(self.entries.shape[2], self.rows.host_table.shape[2])
            self._source = torch.from_numpy(_slots(places, self.layout.page)).to(both.device)
        source = self._source[..., : self.width].clamp(max=both.shape[2] - 1)
        if source.shape[2] < self.width:
            source = torch.nn.functional.pad(source, (0, self.width - source.shape[2]))
        for _ in range(both.dim() - 3):
            source = source[..., None]
        return both.gather(2, source.expand(*source.shape[:3], *both.shape[3:]))

    def slots(self) -> tuple[Tensor, Tensor]:
        """Where the slots of all quantized and of all working pages are seen; see ``seen``."""
        layout, device = self.layout, self.position.device
        quantized = layout.of_quantized(self.entries.shape[2])
        working = layout.of_working(self.rows.host_table.shape[2])
        pair = (torch.from_numpy(_slots(x, layout.page)).to(device) for x in (quantized, working))
        return tuple(pair)  # type: ignore[return-value]

    def positions(self) -> Tensor:
        """``[B, Hkv, width]`` int32, original positions of the slots."""
        if not self.active:
            return self.rows.position()
        return self.seen(self.position, self.rows.position())

    def kinds(self) -> Tensor:
        """``[B, Hkv, width]`` int32, the type of each slot's page; 0 where there is none."""
        if not self.active:
            return torch.zeros_like(self.rows.position())
        kinds = np.where(self.host_table == NO_PAGE, 0, self.host_table >> 28).astype(np.int32)
        return torch.from_numpy(kinds).to(self.position.device).repeat_interleave(self.layout.page, 2)

    # ---- attention ---------------------------------------------------------------------------------------

    def quantized(self) -> PagePools:
        """What operators need besides ``table`` and ``lengths``."""
        maps = {} if self.maps is None else self.maps._asdict()
        return PagePools(
            tuple(pool.data for pool in self.pools), tuple(pool.format for pool in self.pools), **maps
        )

    def table_for(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """The table for attention of the newest ``rows`` tokens, which must be in the last slots of all.

        That is not so where the first working page leads and the newest tokens began in it. Then it comes
        with ``[B, Hkv, width]``, the slot of that table that each slot is.
        """
        begun = self.layout.lead & (self.rows.host_lengths < self.layout.page + rows)
        if rows == 1 or not begun.any():
            return self.table, None
        layout = Layout(self.layout.page, self.count, self.layout.lead & ~begun)
        table = torch.from_numpy(self._table_of(layout)).to(self.position.device)
        quantized = layout.of_quantized(self.entries.shape[2])
        working = layout.of_working(self.rows.host_table.shape[2])
        pair = (torch.from_numpy(_slots(x, layout.page)).to(table.device) for x in (quantized, working))
        return table, self.seen(*pair).clamp(max=self.width - 1)

    def gather(self) -> tuple[Tensor, Tensor]:
        """All keys and values, dequantized, ``[B, Hkv, size, D]``, zero beyond the lengths."""
        page, pool = self.layout.page, self.rows.pool
        places = self.rows.host_table.shape[2]
        working = self.rows.gather(size=places * page)
        shape = (self.entries.size, page, pool.width)
        k, v = (torch.zeros(shape, dtype=pool.dtype, device=pool.device) for _ in "kv")
        flat, heads = self.entries.ravel(), self.entries.shape[2]
        maps = {} if self.maps is None else self.maps._asdict()
        for kind, own in enumerate(self.pools, 1):
            where = np.flatnonzero((flat >> 28) == kind)
            if where.size:
                number, row, at = (
                    torch.from_numpy(x.astype(np.int64)).to(pool.device)
                    for x in (flat[where] & NUMBER, where // heads, where)
                )
                k[at], v[at] = ops.kv_page_read(
                    own.data, number, own.format, dtype=pool.dtype, sequence=row, **maps
                )
        batch = self.entries.shape[:2]
        there = torch.arange(self.size, device=pool.device) < self.lengths[..., None]
        quantized = (x.view(*batch, -1, pool.width) for x in (k, v))
        pair = (
            self.seen(*x)[:, :, : self.size].masked_fill(~there[..., None], 0)
            for x in zip(quantized, working, strict=True)
        )
        return tuple(pair)  # type: ignore[return-value]

    # ---- pages come and go -------------------------------------------------------------------------------

    def reserve(self, demoted: list[Demotion]) -> None:
        """Room for all of ``demoted``. Raises MemoryError, and changes nothing, where there is none."""
        for made in demoted:
            self.pools[made.kind - 1].reserve(len(made.row), slack=True)

    def maps_for(self, given: ChannelMaps | None) -> ChannelMaps | None:
        """``given`` for rows without a quantized page; others keep theirs."""
        new = self.count == 0
        if (given is None and self.maps is None) or not new.any():
            return self.maps
        first = torch.from_numpy(new)[..., None].to(self.position.device)
        pairs = zip(given or ChannelMaps(), self.maps or ChannelMaps(), (1.0, 0.0, 1.0, 0.0), strict=True)
        return ChannelMaps(*(_chosen(first, own, old, fill) for own, old, fill in pairs))

    def write(
        self, demoted: list[Demotion], maps: ChannelMaps | None, dense: tuple[Tensor, Tensor] | None
    ) -> list[Ints]:
        """The entries of new pages, made of working slots, or of tokens of dense keys and values; the
        ``maps`` are theirs and those of all other pages.
        """
        pool, device = self.rows.pool, self.position.device
        options = {} if maps is None else maps._asdict()
        entries = []
        for made in demoted:
            own = self.pools[made.kind - 1]
            number = own.allocate(len(made.row))
            lists = [torch.from_numpy(x.astype(np.int32)).to(device) for x in (made.row, made.slots, number)]
            source = (pool.k_pages, pool.v_pages, self.rows.table) if dense is None else dense
            operator: Any = ops.kv_retier_ if dense is None else ops.kv_page_write_
            try:
                operator(own.data, *source, *lists, own.format, **options)
            except BaseException:
                own.book.free(number)
                raise
            entries.append(np.asarray(number | page_entry(made.kind, 0), np.int32))
        self.maps = maps if demoted else self.maps
        return entries

    def replace(self, parts: Split, entries: list[Ints]) -> Tensor:
        """Only the pages of ``parts`` stay, and its demoted ones come behind them. Returns the slots of all
        pages as they were seen; the caller arranges.
        """
        page, quantized = self.layout.page, self.entries.shape[2]
        gone = ~parts.pages & (self.entries != NO_PAGE)
        for kind, own in enumerate(self.pools, 1):
            own.book.free(self.entries[gone & ((self.entries >> 28) == kind)] & NUMBER)
        seen = _slots(self.layout.of_quantized(quantized), page).reshape(*self.entries.shape, page)
        b, h, _ = np.nonzero(parts.pages)
        lists: list[Any] = [(b * self.count.shape[1] + h, self.entries[parts.pages], seen[parts.pages])]
        for made, new in zip(parts.demoted, entries, strict=True):
            lists.append((made.row, new, made.seen))
        row, entry, slots = (np.concatenate(part) for part in zip(*lists, strict=True))
        order = np.argsort(row, kind="stable")
        row, entry, slots = row[order], entry[order], slots[order]
        count = np.bincount(row, minlength=self.count.size).astype(np.int32)
        rank = np.arange(len(row)) - np.repeat(count.cumsum() - count, count)
        self.count = np.asarray(count.reshape(self.count.shape), np.int32)
        width = int(count.max(initial=0))
        table = np.full((self.count.size, width), NO_PAGE, np.int32)
        table[row, rank] = entry
        self.entries = table.reshape(*self.count.shape, width)
        found = np.zeros((self.count.size, width, page), np.int64)
        found[row, rank] = slots
        return torch.from_numpy(found.reshape(*self.count.shape, -1)).to(self.position.device)

    def settle(self, position: Tensor) -> None:
        """``position`` ``[B, Hkv, Q * P]`` is that of the quantized slots; then arranged."""
        self.position = position
        if not self.active:
            self.maps, self._older = None, np.zeros(self.count.shape, bool)
        else:
            first = (self.rows.position()[..., :1] < position[..., :1]).cpu().numpy()[..., 0]
            self._older = first & (self.count > 0) & (self.rows.host_lengths > 0)
        self.arrange()

    def renumber(self, pool: Any, number: Ints) -> None:
        """Page i of ``pool`` has become page ``number[i]``."""
        for kind, own in enumerate(self.pools, 1):
            if own is pool:
                of = (self.entries >> 28) == kind
                self.entries[of] = number[self.entries[of] & NUMBER] | page_entry(kind, 0)
        self.arrange()

    def release(self) -> None:
        """Give all pages back."""
        for kind, own in enumerate(self.pools, 1):
            own.book.free(self.numbers(kind))
        self.empty()

    def select(self, order: Ints, rows: Tensor) -> None:
        """Sequence i becomes a copy of what sequence ``rows[i]`` was, as its working slots are already."""
        old = [self.numbers(kind) for kind in range(1, len(self.pools) + 1)]
        self.entries, self.count, self._older = self.entries[order], self.count[order], self._older[order]
        for kind, own in enumerate(self.pools, 1):
            own.book.retain(self.numbers(kind))
            own.book.free(old[kind - 1])
        self.position = self.position[rows]
        if self.maps is not None:
            self.maps = ChannelMaps(*(None if m is None else m[rows] for m in self.maps))
        width = int(self.count.max(initial=0))
        self.entries, self.position = (
            self.entries[..., :width],
            self.position[..., : width * self.layout.page],
        )
        self.arrange()

    def on(self, rows: Rows) -> "Tiers":
        """A copy beside ``rows``, whose pool is a copy too."""
        other = copy.copy(self)
        other.rows, device = rows, rows.pool.device
        other.entries, other.count, other._older = (x.copy() for x in (self.entries, self.count, self._older))
        other.position = self.position.to(device, copy=True)
        if self.maps is not None:
            other.maps = ChannelMaps(*(None if m is None else m.to(device, copy=True) for m in self.maps))
        other.arrange()
        return other


def _slots(places: Ints, page: int) -> Any:
    """Slots of places: ``[B, Hkv, n]`` to ``[B, Hkv, n * page]`` int64."""
    slots = places.astype(np.int64)[..., None] * page + np.arange(page)
    return slots.reshape(*places.shape[:2], -1)


def _chosen(new: Tensor, given: Tensor | None, old: Tensor | None, fill: float) -> Tensor | None:
    if given is None and old is None:
        return None
    given, old = (None if x is None else x.float() for x in (given, old))
    shape = (given if given is not None else old).shape  # type: ignore[union-attr]
    given, old = (torch.full(shape, fill, device=new.device) if x is None else x for x in (given, old))
    return torch.where(new, given, old)
