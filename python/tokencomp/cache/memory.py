"""What a cache holds, measured from its pools and tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokencomp.cache.layer import Events, Layer
from tokencomp.cache.pool import Ints, Pages, Pool, QuantizedPool


@dataclass(frozen=True)
class PagesMemory:
    """Pages of one type."""

    name: str  # the working dtype, or the number formats of keys and values: int4, int4/int2
    tokens: int  # of all rows
    pages: int  # in use; shared pages count in every layer and row that uses them
    bytes: int  # of these
    bits: float  # an element of a token in such a page takes, the parameters of its grids included


@dataclass(frozen=True)
class LayerMemory:
    """One layer."""

    tokens: Ints  # [B, Hkv] slots in use
    kinds: tuple[PagesMemory, ...]  # working pages, then those of every quantized type
    side_bytes: int  # tables, lengths, positions, maps, what the method keeps
    events: Events

    @property
    def pages(self) -> int:
        """Of all types."""
        return sum(kind.pages for kind in self.kinds)

    @property
    def bytes(self) -> int:
        """Pages and side arrays."""
        return sum(kind.bytes for kind in self.kinds) + self.side_bytes


@dataclass(frozen=True)
class Memory:
    """A whole cache. ``int(memory)`` is what it holds allocated."""

    used: int  # bytes of pages in use, each counted once
    capacity: int  # bytes of all pages of the pools, in use or free
    side: int  # bytes of tables, lengths, positions, maps, what the method keeps
    other: int  # bytes of layers that are not paged
    peak: int  # most bytes of pages in use at a time, of each pool by itself
    pages: int  # in use
    kinds: tuple[PagesMemory, ...] = ()  # by type; here too pages count once

    @property
    def held(self) -> int:
        """Bytes allocated: pools with their free pages, side arrays, other layers."""
        return self.capacity + self.side + self.other

    @property
    def bits(self) -> float:
        """Bits an element of keys and values takes, parameters of grids included, empty slots not."""
        return bits_of(self.kinds)

    def __int__(self) -> int:
        return self.held


def bits_of(kinds: Sequence[PagesMemory]) -> float:
    """The mean over the tokens of all types; 0 without any."""
    tokens = sum(kind.tokens for kind in kinds)
    return sum(kind.tokens * kind.bits for kind in kinds) / tokens if tokens else 0.0


def of_layer(layer: Layer) -> LayerMemory:
    """What one layer holds."""
    store = layer.store
    if store is None:
        return LayerMemory(np.zeros((0, 0), np.int32), (), 0, layer.events)
    kinds = tuple(
        _kind(pool, store.tokens(kind), len(store.pages_of(kind)))
        for kind, pool in enumerate((store.pool, *store.pool.quantized))
    )
    side = store.side_bytes() + (0 if layer.reader is None else layer.reader.bytes())
    return LayerMemory(store.host_lengths.copy(), kinds, side, layer.events)


def of_pools(working: list[Pool], layers: list[Layer], other: int) -> Memory:
    """What all layers hold together."""
    stores = [layer.store for layer in layers if layer.store is not None]
    pools = [pool for own in working for pool in (own, *own.quantized)]
    kinds = tuple(
        _kind(pool, sum(store.tokens(kind) for store in stores if store.pool is own), pool.book.in_use)
        for own in working
        for kind, pool in enumerate((own, *own.quantized))
    )
    return Memory(
        used=sum(pool.book.in_use * pool.page_bytes for pool in pools),
        capacity=sum(pool.capacity * pool.page_bytes for pool in pools),
        side=sum(store.side_bytes() for store in stores)
        + sum(layer.reader.bytes() for layer in layers if layer.reader is not None),
        other=other,
        peak=sum(pool.peak * pool.page_bytes for pool in pools),
        pages=sum(pool.book.in_use for pool in pools),
        kinds=kinds,
    )


def _kind(pool: Pages, tokens: int, pages: int) -> PagesMemory:
    name, bits = str(pool.dtype).removeprefix("torch."), 8.0 * pool.dtype.itemsize
    if isinstance(pool, QuantizedPool):
        k, v, bits = pool.format.tier_k, pool.format.tier_v, pool.format.bits
        name = k if k == v else f"{k}/{v}"
    return PagesMemory(name, tokens, pages, pages * pool.page_bytes, bits)


def give_back(pools: list[Pool], layers: list[Layer]) -> None:
    """Shrink pools that needed pages for a moment: to merge, or where heads keep different numbers."""
    stores = [layer.store for layer in layers if layer.store is not None]
    for working in pools:
        for pool in (working, *working.quantized):
            number = pool.shrink()
            for store in stores:
                if number is not None and store.pool is working:
                    store.renumber(pool, number)
