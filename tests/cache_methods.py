"""Methods on the KV cache that do as a test tells them, and what tests of caches share."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokencomp.cache import KeepAll
from tokencomp.methods.kv import Keep, KVView, Side
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Listed(KeepAll):
    """Keeps listed slots of the first prompt: of each layer ``[B, Hkv, K]``, -1 behind the last."""

    index: Sequence[Tensor] = ()

    def after_prefill(self, view: KVView) -> Keep | None:
        first = not view.scratch.setdefault("listed", False)
        view.scratch["listed"] = True
        return keep(self.index[view.layer]) if first else None


@dataclass(frozen=True)
class Newest(KeepAll):
    """The newest ``budget`` slots and the first one, after every prompt and every ``every`` steps; its
    side array remembers in which step a slot was first seen.
    """

    budget: int = 8
    every: int = 1
    rerotates: bool = False

    @property
    def sides(self) -> Mapping[str, Side]:
        return {"born": Side(torch.int32, -1)}

    def resolve(
        self, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
    ) -> tuple[int, ...]:
        return (self.budget,) * layers

    def after_prefill(self, view: KVView) -> Keep | None:
        self._mark(view)
        return None if view.more else self.evict(view)

    def after_step(self, view: KVView) -> Keep | None:
        self._mark(view)
        return self.evict(view) if view.step % self.every == 0 else None

    def evict(self, view: KVView) -> Keep | None:
        if view.size <= self.budget:
            return None
        slot = torch.arange(self.budget, dtype=torch.int32)
        length = view.lengths[..., None]
        tail = (length - self.budget).clamp(min=0) + slot
        index = torch.where((slot == 0) & (length > 0), 0, tail)
        return Keep(torch.where(slot < length, index, -1), view.lengths.clamp(max=self.budget))

    @staticmethod
    def _mark(view: KVView) -> None:
        slot = torch.arange(view.state["born"].shape[2])
        new = (view.state["born"] == -1) & (slot < view.lengths[..., None])
        view.state["born"].masked_fill_(new, view.step)


def keep(index: Tensor) -> Keep:
    index = index.to(torch.int32)
    return Keep(index, (index >= 0).sum(-1).to(torch.int32), ragged=True)


def tree(cache: Any) -> dict[str, Any]:
    """All a cache holds, to compare before and after."""
    return {
        "columns": cache.get_seq_length(),
        "seen": cache.state.seen.tolist(),
        "layers": [
            (
                store.host_lengths.tolist(),
                [t[..., : store.size].tolist() for t in (store.position(), *store.state.values())],
                [t.tolist() for t in store.gather()],
            )
            for store in (paged.layer.store for paged in cache.paged)
            if store is not None
        ],
        "others": [
            {n: v.tolist() if isinstance(v, Tensor) else v for n, v in vars(layer).items()}
            for layer in cache.layers
            if not any(layer is paged for paged in cache.paged)
        ],
    }


def pages_are_exact(cache: Any) -> None:
    """No page is lost or used by nobody: every pool's pages in use are those of the tables."""
    for pool in cache.state.pools.values():
        stores = [paged.layer.store for paged in cache.paged]
        stores = [store for store in stores if store is not None and store.pool is pool]
        for kind, own in enumerate((pool, *pool.quantized)):
            used: dict[int, int] = {}
            for store in stores:
                for page in store.pages_of(kind).tolist():
                    used[page] = used.get(page, 0) + 1
            assert own.book.in_use == len(used)
            assert all(own.book.refcount([page])[0] == count for page, count in used.items())
        for store in stores:
            full = -(-store.rows.host_lengths // pool.page)
            assert ((store.rows.host_table != -1).sum(-1) == full).all()


__all__ = ["KeepAll", "Listed", "Newest", "dataclasses", "keep", "pages_are_exact", "tree"]
