"""One layer of a compressed cache: stores what a forward brings, attends to it, and lets its method evict."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp import attention, ops, ragged
from tokencomp.cache.forward import Forward, Rule
from tokencomp.cache.keep_all import KeepAll
from tokencomp.cache.pool import Ints, Pool
from tokencomp.cache.sparse import Reader
from tokencomp.cache.store import LayerStore
from tokencomp.methods.kv import Keep, KVMethod, KVView

Chunks = Literal["each", "last"]


@dataclass
class Events:
    """What a layer has done."""

    prompt: Ints | None = None  # [B, Hkv] slots that the first prompt left
    evictions: int = 0
    evicted: int = 0  # slots, of all rows
    seconds: float = 0.0  # of the host in scoring, selecting and moving


class View(KVView):
    """A view whose positions are computed when a method looks at them."""

    _store: LayerStore | None = None
    _position: Tensor | None = None

    @property
    def position(self) -> Tensor:
        """``[B, Hkv, C]`` int32."""
        if self._position is None:
            assert self._store is not None
            self._position = self._store.position()
        return self._position

    @position.setter
    def position(self, value: Tensor | None) -> None:
        self._position = value


class Layer:
    """One layer.

    Args:
        index: among the layers of this cache.
        layers: their number.
        method: decides what stays.
        chunks: ``each``: every chunk of a prompt is followed by an eviction; ``last``: there is one, before
            the first decode step, which alone tells that the prompt has ended.
    """

    def __init__(self, index: int, layers: int, method: KVMethod, chunks: Chunks) -> None:
        self.index, self.layers, self.method, self.chunks = index, layers, method, chunks
        self.idle = type(method) is KeepAll
        self.store: LayerStore | None = None
        self.events = Events()
        self.inv_freq: Tensor | None = None  # where the method rotates kept keys
        self.across: Callable[[Tensor], Tensor] | None = None  # see ``KVView``
        self.reader: Reader | None = None  # where a method restricts what is read
        self._owes = False  # a prompt was stored whole, and the eviction is still to come

    # ---- a forward ---------------------------------------------------------------------------------------

    def forward(self, q: Tensor, k: Tensor, v: Tensor, what: Forward, rule: Rule, pool: Pool) -> Tensor:
        """Store the tokens of a forward and attend: ``[B, Hq, T, Dv]`` of ``q`` ``[B, Hq, T, D]``."""
        rotation = self.method.rotation
        if rotation == "none":
            return self._forward(q, k, v, what, rule, pool)
        _check_rotation(self.method, k, v)
        q, k = ops.hadamard(q), ops.hadamard(k)
        if rotation == "keys":
            return self._forward(q, k, v, what, rule, pool)
        return ops.hadamard(self._forward(q, k, ops.hadamard(v), what, rule, pool))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, what: Forward, rule: Rule, pool: Pool) -> Tensor:
        store = self._store(k, pool)
        packing = what.packing
        if packing is None:
            return self._attend(store, q.detach(), k.detach(), v.detach(), what, rule)
        if packing.order.shape[1] == 0:
            return v.new_zeros(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
        q, k, v = (packing.pack(x.detach()) for x in (q, k, v))
        return packing.unpack(self._attend(store, q, k, v, what, rule))

    def append(self, k: Tensor, v: Tensor, what: Forward, pool: Pool) -> tuple[Tensor, Tensor]:
        """Store the tokens of a forward and return all keys and values that are attended to by others.

        ``[B, Hkv, held + T, D]``: what was held, at the right, then this forward's columns as they are.
        """
        store = self._store(k, pool)
        held = _to_end(store, *store.gather()) if store.size else None
        whole = (
            (k, v) if held is None else tuple(torch.cat(pair, 2) for pair in zip(held, (k, v), strict=True))
        )
        packed = k.detach(), v.detach()
        if what.packing is not None:
            packed = what.packing.pack(packed[0]), what.packing.pack(packed[1])
        none = packed[0][:, :, :0]
        if what.step:
            self._settle(store, none, what, Rule(1.0))
            self._append(store, *packed, what)
            if not self.idle:
                self._answer(store, self.method.after_step, self._view(store, none, what, Rule(1.0)), what)
        elif store.size:
            self._append(store, *packed, what)
            self._after_prompt(store, self._view(store, none, what, Rule(1.0)), what)
        else:
            self._first(store, none, *packed, what, Rule(1.0), None)
        return whole[0], whole[1]

    def _attend(
        self, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, what: Forward, rule: Rule
    ) -> Tensor:
        if what.step:
            return self._step(store, q, k, v, what, rule)
        if store.size:
            return self._chunk(store, q, k, v, what, rule)
        read = None if self.reader is None else self.reader.prompt(q, k, v, None, what, rule)
        if read is not None:
            self._first(store, q, k, v, what, rule, None)
            return read
        result = attention.attend(
            q, k, v, is_causal=True, scale=rule.scale, enable_gqa=True, softcap=rule.softcap,
            sinks=rule.sinks, return_lse=self.method.needs_lse,
        )  # fmt: skip
        self._first(store, q, k, v, what, rule, result.lse)
        return result.output

    def _step(self, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, what: Forward, rule: Rule) -> Tensor:
        if self._owes:
            self._settle(store, q[:, :, :0], what, rule)
        self._append(store, k, v, what)
        wanted = not self.idle and self.method.needs_logits
        if self.reader is None:
            found = store.decode(q, scale=rule.scale, softcap=rule.softcap, sinks=rule.sinks, logits=wanted)
        else:
            found = self.reader.step(store, q, what, rule, wanted)
        if not self.idle:
            begin = time.perf_counter()
            view = self._view(store, q, what, rule)
            if wanted:
                view.lse, view.logits = found.lse, found.logits
            keep = self.method.after_step(view)
            if keep is not None:
                self._evict(store, keep, what.seen)
            self.events.seconds += time.perf_counter() - begin
        return found.output

    def _first(
        self,
        store: LayerStore,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        what: Forward,
        rule: Rule,
        lse: Tensor | None,
    ) -> None:
        """The first prompt: what is evicted at once is never stored."""
        begin = time.perf_counter()
        keep = None
        if not self.idle:
            store.widen(k.shape[2])
            view = self._view(store, q, what, rule)
            view.lengths = store.lengths + (
                k.shape[2] if what.packing is None else what.packing.counts[:, None]
            )
            view.size, view.lse = k.shape[2], lse
            view.keys, view.values = lambda: k, lambda: v
            keep = self._asked(view)
        if self.index == 0 and store.tiers is None:
            self._expect(store, what)
        if keep is None or keep.merge is not None:
            self._append(store, k, v, what)
            if keep is not None:
                self._evict(store, keep, what.seen)
        else:
            gone = store.fill(k, v, keep, what.seen, self.inv_freq)
            self.events.evictions += gone > 0
            self.events.evicted += gone
        if store.tiers is not None:
            store.expect(self._alike())
        self.events.prompt = store.host_lengths.copy()
        self.events.seconds += time.perf_counter() - begin

    def _alike(self) -> int:
        """How many later layers have the types of pages that this one is the first to have; else 0."""
        types = getattr(self.method, "layer_specs", lambda layer, layers: ())
        same = [i for i in range(self.layers) if types(i, self.layers) == types(self.index, self.layers)]
        return len(same) - 1 if same[0] == self.index else 0

    def _expect(self, store: LayerStore, what: Forward) -> None:
        """Pages for all layers at once, as the method budgets them."""
        page, rows = store.pool.page, store.host_lengths.size
        budgets = self.method.resolve(
            max(what.rows), self.layers, rows=rows, slot_bytes=store.slot_bytes, page=page
        )
        store.pool.expect(rows * sum(-(-min(slots, max(what.rows)) // page) for slots in budgets))

    def _chunk(self, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, what: Forward, rule: Rule) -> Tensor:
        """A prompt on top of what is held."""
        held, output, lse = store.host_lengths.copy(), None, None
        if self.reader is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(store.gather(), (k, v), strict=True))
            output = self.reader.prompt(q, keys, values, held, what, rule)
        self._append(store, k, v, what)
        if output is None:
            counts = None if what.packing is None else what.packing.counts
            output, lse = store.prefill(
                q, counts, scale=rule.scale, softcap=rule.softcap, sinks=rule.sinks
            )  # fmt: skip
        if not self.idle:
            view = self._view(store, q, what, rule)
            view.lse = lse if self.method.needs_lse else None
            self._after_prompt(store, view, what)
        return output

    # ---- the method --------------------------------------------------------------------------------------

    def _asked(self, view: KVView) -> Keep | None:
        view.more = self.chunks == "last"
        self._owes = view.more
        return self.method.after_prefill(view)

    def _after_prompt(self, store: LayerStore, view: KVView, what: Forward) -> None:
        if not self.idle:
            self._answer(store, self._asked, view, what)

    def _settle(self, store: LayerStore, none: Tensor, what: Forward, rule: Rule) -> None:
        """The eviction that a prompt of unknown end has left to the first decode step."""
        if self._owes:
            self._owes = False
            before = what.seen - (what.tokens if what.counts is None else what.counts)
            view = self._view(store, none, replace(what, seen=before, rows=before.tolist()), rule)
            view.starts = view.counts = None
            self._answer(store, self.method.evict, view, what, before)

    def _answer(
        self, store: LayerStore, ask: Any, view: KVView, what: Forward, seen: Ints | None = None
    ) -> None:
        begin = time.perf_counter()
        keep = ask(view)
        if keep is not None:
            self._evict(store, keep, what.seen if seen is None else seen)
        self.events.seconds += time.perf_counter() - begin

    def _evict(self, store: LayerStore, keep: Keep, seen: Ints) -> None:
        gone = store.compact(keep, seen, self.inv_freq)
        if self.reader is not None:
            self.reader.moved()
        self.events.evictions += gone > 0
        self.events.evicted += gone

    def _view(self, store: LayerStore, q: Tensor, what: Forward, rule: Rule) -> View:
        packing = what.packing
        gathered: list[tuple[Tensor, Tensor]] = []

        def dense(which: int) -> Tensor:
            if not gathered:
                gathered.append(store.gather())
            return gathered[0][which]

        view = View(
            layer=self.index, layers=self.layers, lengths=store.lengths, size=store.size,
            position=None,  # type: ignore[arg-type]
            seen=what.rows, step=what.number, q=q, scale=rule.scale, keys=lambda: dense(0),
            values=lambda: dense(1), softcap=rule.softcap, starts=None if packing is None else packing.starts,
            counts=None if packing is None else packing.counts, state=store.state, scratch=store.scratch,
            page=store.pool.page, slot_bytes=store.slot_bytes, across=self.across,
            kind=None if store.tiers is None else store.kinds,
        )  # fmt: skip
        view._store = store
        return view

    # ---- the store ---------------------------------------------------------------------------------------

    def _store(self, k: Tensor, pool: Pool) -> LayerStore:
        if self.store is None:
            self.store = LayerStore(pool, k.shape[0], k.shape[1], self.method.sides)
        return self.store

    @staticmethod
    def _append(store: LayerStore, k: Tensor, v: Tensor, what: Forward) -> None:
        packing = what.packing
        if packing is None:
            store.append(k, v)
        else:
            store.append(k, v, packing.starts, packing.counts, what.counts)

    def keep_only(self, stays: Tensor, first: Ints, seen: Ints) -> None:
        """Of the tokens from ``first[b]`` on, let go of those that ``stays`` ``[B, T]`` bool does not name;
        ``seen[b]`` there were so far.
        """
        store = self.store
        assert store is not None
        slot = torch.arange(store.width, device=stays.device)
        number = store.position() - torch.from_numpy(first).to(stays.device)[:, None, None]
        place = number.clamp(0, stays.shape[1] - 1).long().flatten(1)
        stay = (number < 0) | stays.gather(1, place).view(number.shape)
        stay = stay & (slot < store.lengths[..., None])
        index, _, count = ragged.compact_rows(stay.flatten(0, 1), max(1, int(stay.sum(-1).max())))
        shape = store.lengths.shape
        self._evict(store, Keep(index.view(*shape, -1), count.view(shape), ragged=True), seen)

    def crop(self, seen: Ints) -> None:
        """Back to ``seen[b]`` tokens of each sequence; what was evicted does not come back."""
        if self.store is not None:
            self.store.crop(seen)
            if self.reader is not None:
                self.reader.cropped(self.store)

    def select(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of what sequence ``rows[i]`` was."""
        if self.store is not None:
            self.store.select(rows)
            if self.reader is not None:
                self.reader.select(rows)

    def reset(self) -> None:
        """Nothing is held, and the method remembers nothing."""
        if self.store is not None:
            self.store.release()
        self.store, self._owes = None, False
        if self.reader is not None:
            self.reader.reset()


def _check_rotation(method: KVMethod, k: Tensor, v: Tensor) -> None:
    for name, x in (("keys", k), ("values", v)):
        if x.shape[3] & (x.shape[3] - 1) and method.rotation in (name, "both"):
            raise ValueError(
                f"compress: {type(method).__name__} rotates {name}, whose head dimension must be a power "
                f"of two, got {x.shape[3]}"
            )


def _to_end(store: LayerStore, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``[B, Hkv, size, D]`` that are shorter than size moved to the right."""
    if (store.host_lengths == store.size).all():
        return k, v
    slot = torch.arange(store.size, device=k.device) - (store.size - store.lengths[..., None])
    index = slot.clamp(min=0).long()[..., None]
    moved = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
    return tuple(moved)  # type: ignore[return-value]
