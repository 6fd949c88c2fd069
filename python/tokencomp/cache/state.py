"""What all caches of a compressed model, and all layers of one cache, have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.autocast import cast
from tokencomp.cache.forward import Forward
from tokencomp.cache.keep_all import KeepAll
from tokencomp.cache.layer import Chunks
from tokencomp.cache.narrow import Absent
from tokencomp.cache.pool import Account, Ints, Pool, page_size
from tokencomp.cache.store import LayerStore
from tokencomp.methods.kv import KVMethod
from tokencomp.methods.sparse import SparseMethod


@dataclass(frozen=True)
class Plan:
    """What all caches of one compressed model have in common."""

    method: KVMethod
    owner: Any  # a weak reference to the decoder they are for
    chunks: Chunks = "each"
    page: int | None = None  # slots; None: as the device likes
    limit: int | None = None  # bytes of all pages of a cache
    store_only: bool = True  # attention is ours and reads the pages; False: it is handed all keys and values
    inv_freq: dict[int, Tensor] = field(default_factory=dict)  # of each layer, where the method rotates
    active: Callable[[], bool] = lambda: True  # whether the model is compressed still
    across: Callable[[Tensor], Tensor] | None = None  # see ``KVView``
    sparse: SparseMethod | None = None  # restricts what is read
    rotary: dict[int, Tensor] = field(default_factory=dict)  # of each layer, for ``SparseView.inv_freq``

    @property
    def name(self) -> str:
        """Of the methods."""
        if self.sparse is None:
            return type(self.method).__name__
        alone = type(self.method) is KeepAll
        return ("" if alone else f"{type(self.method).__name__} + ") + type(self.sparse).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self

    def fits(self, other: "Plan") -> bool:
        """Whether a cache made for ``other`` may go on under this plan."""
        mine, its = ((p.method, p.sparse, p.chunks, p.store_only, p.owner()) for p in (self, other))
        return mine[:-1] == its[:-1] and mine[-1] is its[-1]


@dataclass
class State:
    """What the layers of one cache share."""

    plan: Plan
    columns: int = 0  # of all forwards, padding included
    steps: int = 0  # decode forwards
    seen: Ints = field(default_factory=lambda: np.zeros(0, np.int32))  # [B] tokens of each sequence
    prompt: Ints = field(default_factory=lambda: np.zeros(0, np.int32))  # of the first forward
    pools: dict[Any, Pool] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)  # what the layers' sparse method leaves for the next
    padding: list[tuple[int, Tensor]] = field(default_factory=list)  # first column, [B, T] real ones
    current: Forward | None = None  # the forward that is going on
    absent: Absent = field(default_factory=Absent)  # tokens that some layers never got
    pending: Any = None  # the ``PagedLayer`` that was updated, and not yet attended to
    account: Account | None = None  # of the bytes of all pools

    def update(self, layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.current is None or not self.plan.active():
            raise RuntimeError(
                "PagedKVCache: this cache works only with the model it was made for, while that is compressed"
            )
        if not self.plan.store_only:
            k, v = cast(k, v)
            attended: tuple[Tensor, Tensor] = layer.layer.append(k, v, self.current, self.pool(layer, k, v))
            return attended
        self.check_consumed()
        self.pending = layer
        return k, v

    def check_consumed(self) -> None:
        if self.pending is not None:
            raise RuntimeError(
                f"PagedKVCache: the attention of layer {self.pending.number} did not go through "
                "transformers' AttentionInterface, so nothing was stored; try attention='model'"
            )

    def pool(self, layer: Any, k: Tensor, v: Tensor) -> Pool:
        store: LayerStore | None = layer.layer.store
        if store is not None:
            if (store.pool.device, store.pool.dtype) != (k.device, k.dtype):
                raise ValueError(
                    f"PagedKVCache: it is {store.pool.dtype} on {store.pool.device}, got {k.dtype} on "
                    f"{k.device}; move it with to(device)"
                )
            return store.pool
        page = self.plan.page or page_size(k.device)
        key = (page, k.shape[3], v.shape[3], k.dtype, k.device)
        if key not in self.pools:
            self.account = self.account or Account(self.plan.limit)
            self.pools[key] = Pool(*key, limit=self.account, formats=self.plan.method.formats)
        return self.pools[key]

    def move(self, device: torch.device) -> dict[int, Pool]:
        """All pools to another device. Returns the new ones by the ids of the old."""
        self.account = Account(self.plan.limit)
        moved = {id(pool): pool.to(device, self.account) for pool in self.pools.values()}
        self.pools = {(*key[:-1], device): moved[id(pool)] for key, pool in self.pools.items()}
        return moved
