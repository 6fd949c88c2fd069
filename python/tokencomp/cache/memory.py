"""What a cache holds, measured from its pools and tensors."""

from dataclasses import dataclass

import numpy as np

from tokencomp.cache.layer import Events, Layer
from tokencomp.cache.pool import Ints, Pool


@dataclass(frozen=True)
class LayerMemory:
    """One layer."""

    tokens: Ints  # [B, Hkv] slots in use
    pages: int  # shared pages count in every layer and row that uses them
    page_bytes: int
    side_bytes: int  # tables, lengths, positions, what the method keeps
    events: Events

    @property
    def bytes(self) -> int:
        """Pages and side arrays."""
        return self.pages * self.page_bytes + self.side_bytes


@dataclass(frozen=True)
class Memory:
    """A whole cache. ``int(memory)`` is what it holds allocated."""

    used: int  # bytes of pages in use, each counted once
    capacity: int  # bytes of all pages of the pools, in use or free
    side: int  # bytes of tables, lengths, positions, what the method keeps
    other: int  # bytes of layers that are not paged
    peak: int  # most bytes of pages in use at a time
    pages: int  # in use

    @property
    def held(self) -> int:
        """Bytes allocated: pools with their free pages, side arrays, other layers."""
        return self.capacity + self.side + self.other

    def __int__(self) -> int:
        return self.held


def of_layer(layer: Layer) -> LayerMemory:
    """What one layer holds."""
    store = layer.store
    if store is None:
        return LayerMemory(np.zeros((0, 0), np.int32), 0, 0, 0, layer.events)
    return LayerMemory(
        store.host_lengths.copy(), len(store.pages), store.pool.page_bytes, store.side_bytes(), layer.events
    )


def of_pools(pools: list[Pool], layers: list[Layer], other: int) -> Memory:
    """What all layers hold together."""
    stores = [layer.store for layer in layers if layer.store is not None]
    return Memory(
        used=sum(pool.book.in_use * pool.page_bytes for pool in pools),
        capacity=sum(pool.capacity * pool.page_bytes for pool in pools),
        side=sum(store.side_bytes() for store in stores),
        other=other,
        peak=sum(pool.peak * pool.page_bytes for pool in pools),
        pages=sum(pool.book.in_use for pool in pools),
    )


def give_back(pools: list[Pool], layers: list[Layer]) -> None:
    """Shrink pools that needed pages for a moment: to merge, or where heads keep different numbers."""
    stores = [layer.store for layer in layers if layer.store is not None]
    for pool in pools:
        number = pool.shrink()
        for store in stores:
            if number is not None and store.pool is pool:
                store.renumber(number)
