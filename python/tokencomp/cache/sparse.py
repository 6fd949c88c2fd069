"""What a layer reads where a sparse method restricts it: asks the method, attends, and counts."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.cache.forward import Decoded, Forward, Rule
from tokencomp.cache.pool import Ints
from tokencomp.cache.sparse_prompt import attend_listed, attend_subset, pairs_listed, pairs_of_subset
from tokencomp.cache.store import LayerStore
from tokencomp.methods.sparse import SlotLists, SparseMethod, SparseView, Subset


@dataclass
class SparseEvents:
    """What a layer has read. Tensors are sums on the device, so that counting waits for nothing."""

    steps: int = 0  # decode steps
    dense: int = 0  # of them, those that read every slot
    chosen: int = 0  # lists that were chosen
    reused: int = 0  # lists that were taken over from an earlier step or layer
    held: int = 0  # slots in use, of all rows and steps
    read: int | Tensor = 0  # of them, those that were read; of query heads with own lists the mean
    prompts: int = 0  # prompts and chunks
    dense_prompts: int = 0
    shares: float | Tensor = (
        0.0  # sum over prompts: pairs of query and key listed, of those a dense prompt has
    )
    seconds: float = 0.0  # of the host in choosing

    @property
    def density(self) -> float:
        """Share of the slots that decode steps read; 1 without steps."""
        return int(self.read) / self.held if self.held else 1.0

    @property
    def prompt_density(self) -> float:
        """Share of the pairs that prompts computed, to whole blocks; 1 without prompts."""
        return float(self.shares) / self.prompts if self.prompts else 1.0


@dataclass
class Reader:
    """The sparse method of one layer and what it remembers."""

    method: SparseMethod
    index: int  # among the layers of the cache
    layers: int
    shared: dict[str, Any]  # with the other layers
    inv_freq: Tensor | None = None
    scratch: dict[str, Any] = field(default_factory=dict)
    events: SparseEvents = field(default_factory=SparseEvents)
    paused: bool = False  # everything is read for the time being
    known: Ints | None = None  # [B, Hkv] slots that are as the method last saw them; None: no slot is

    # ---- forwards ----------------------------------------------------------------------------------------

    def step(self, store: LayerStore, q: Tensor, what: Forward, rule: Rule, logits: bool) -> Decoded:
        """A decode step ``[B, Hq, T, D]``, whose tokens are stored already."""
        begin = time.perf_counter()
        view = self._slots(store, q, what, rule)
        lists = None if self.paused else self.method.choose(view)
        wanted = not self.paused and lists is None and self.method.wants_logits(view)
        chosen = time.perf_counter() - begin
        found = _decode(store, q, rule, lists, logits or wanted)
        begin = time.perf_counter()
        if wanted:
            self.method.observe(view, found.logits, found.lse)
        self.known = None if self.paused else store.host_lengths.copy()
        self._count(store, lists, wanted)
        self.events.seconds += chosen + time.perf_counter() - begin
        return found

    def prompt(
        self, q: Tensor, k: Tensor, v: Tensor, held: Ints | None, what: Forward, rule: Rule
    ) -> Tensor | None:
        """A prompt, or a chunk behind others, where the method restricts it: ``[B, Hq, T, Dv]``.

        Args:
            q: ``[B, Hq, T, D]``; with padding the tokens are the first rows.
            k, v: ``[B, Hkv, size + T, D]``: before the last T what was held.
            held: ``[B, Hkv]`` slots of it that are in use, the first ones; None: it is the first prompt.
            what: the forward.
            rule: how to attend.
        """
        begin = time.perf_counter()
        before, first = k.shape[2] - q.shape[2], None
        if held is not None and not (held == before).all():
            first = torch.from_numpy(before - held).to(q.device)
            k, v = (_behind_holes(x, first, before) for x in (k, v))
        end = torch.full(k.shape[:2], k.shape[2], dtype=torch.int32, device=k.device)
        if what.packing is not None:
            end = (before + what.packing.counts)[:, None].expand(k.shape[:2]).contiguous()
        view = self._prompt(q, k, v, end, first, what, rule)
        choice = None if self.paused else self.method.choose_prompt(view)
        self.known = None
        self.events.prompts += 1
        self.events.seconds += time.perf_counter() - begin
        if choice is None:
            self.events.dense_prompts += 1
            self.events.shares = self.events.shares + 1.0
            return None
        if isinstance(choice, Subset):
            self.events.shares = self.events.shares + pairs_of_subset(choice, q.shape[2], before)
            return attend_subset(q, k, v, choice, end, first, rule)
        self.events.shares = self.events.shares + pairs_listed(choice, q, k.shape[2])
        return attend_listed(q, k, v, choice, end, first, rule)

    # ---- slots and sequences move ------------------------------------------------------------------------

    def moved(self) -> None:
        """Slots hold other tokens than before."""
        self.known = None

    def cropped(self, store: LayerStore) -> None:
        """The last slots of ``store`` have gone."""
        if self.known is not None:
            self.known = self.known.clip(max=store.host_lengths)

    def select(self, rows: Tensor) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was."""
        reorder(self.scratch, rows)
        if self.known is not None:
            self.known = self.known[rows.cpu().numpy()]

    def reset(self) -> None:
        """Everything is forgotten but the counts."""
        self.scratch.clear()
        self.known = None

    def to(self, device: torch.device) -> None:
        """Move what is remembered."""
        to_device(self.scratch, device)
        self.inv_freq = None if self.inv_freq is None else self.inv_freq.to(device)

    def bytes(self) -> int:
        """Of what is remembered, and in the first layer of what all share."""
        values = [*self.scratch.values(), *(self.shared.values() if self.index == 0 else ())]
        return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))

    # ---- views -------------------------------------------------------------------------------------------

    def _slots(self, store: LayerStore, q: Tensor, what: Forward, rule: Rule) -> SparseView:
        gathered: list[tuple[Tensor, Tensor]] = []

        def dense(which: int) -> Tensor:
            if not gathered:
                gathered.append(store.gather())
            return gathered[0][which]

        def scores(q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            options = {"lengths": store.lengths, **options}
            if store.quantizes:
                return ops.qk_scores(q, dense(0), **options)
            return ops.qk_scores(q, store.pool.k_pages, block_table=store.rows.table, **options)

        def keys_at(slots: Tensor) -> Tensor:
            if store.quantizes:
                place = slots.long()[..., None].expand(-1, -1, -1, q.shape[3])
                return dense(0).gather(2, place.clamp(max=store.size - 1))
            page = store.pool.page
            number = store.rows.table.gather(2, torch.div(slots, page, rounding_mode="floor").long())
            return _slots_of(store.pool.k_pages, number.long().clamp(min=0), slots.long() % page)

        fresh = store.size if self.known is None else int((store.host_lengths - self.known).max(initial=0))
        return self._view(
            q, what, rule, lengths=store.lengths, size=store.size, step=what.number, page=store.pool.page,
            keys=lambda: dense(0), values=lambda: dense(1), scores=scores, position=store.position,
            fresh=fresh, whole=store.whole, keys_at=keys_at,
        )  # fmt: skip

    def _prompt(
        self, q: Tensor, k: Tensor, v: Tensor, end: Tensor, first: Tensor | None, what: Forward, rule: Rule
    ) -> SparseView:
        def scores(q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            options = {"lengths": end, **options}
            if first is not None:
                slot = torch.arange(k.shape[2], device=k.device)
                holes = torch.where(slot < first[..., None], -torch.inf, 0.0)
                options["key_bias"] = holes + options.get("key_bias", 0.0)
            return ops.qk_scores(q, k, **options)

        def position() -> Tensor:
            return torch.arange(k.shape[2], dtype=torch.int32, device=k.device).expand(*k.shape[:3])

        return self._view(
            q, what, rule, lengths=end, size=k.shape[2], step=0, page=1, keys=lambda: k, values=lambda: v,
            scores=scores, position=position, first=first, fresh=k.shape[2],
        )  # fmt: skip

    def _view(self, q: Tensor, what: Forward, rule: Rule, **parts: Any) -> SparseView:
        packing = what.packing
        return SparseView(
            layer=self.index, layers=self.layers, q=q, scale=rule.scale, softcap=rule.softcap,
            starts=None if packing is None else packing.starts,
            counts=None if packing is None else packing.counts, scratch=self.scratch, shared=self.shared,
            inv_freq=self.inv_freq, **parts,
        )  # fmt: skip

    def _count(self, store: LayerStore, lists: SlotLists | None, chosen: bool) -> None:
        events, held = self.events, int(store.host_lengths.sum())
        events.steps += 1
        events.held += held
        events.chosen += chosen
        if lists is None:
            events.dense += 1
            events.read = events.read + held
            return
        events.reused += lists.reused
        events.chosen += not lists.reused
        entry = torch.arange(lists.index.shape[2], device=lists.index.device) < lists.count[..., None]
        read = ((lists.index >= 0) & entry).sum()
        events.read = events.read + torch.div(read * store.host_lengths.shape[1], lists.index.shape[1])


def _decode(store: LayerStore, q: Tensor, rule: Rule, lists: SlotLists | None, logits: bool) -> Decoded:
    options: dict[str, Any] = {
        "scale": rule.scale, "softcap": rule.softcap, "sinks": rule.sinks, "logits": logits
    }  # fmt: skip
    if lists is None:
        return store.decode(q, **options)
    rows, heads = lists.index.shape[1], store.lengths.shape[1]
    if rows not in (q.shape[1], heads):
        raise ValueError(
            f"sparse attention: lists must be for {heads} kv heads or {q.shape[1]} query heads, got {rows}"
        )
    return store.decode(q, **options, index=lists.index, index_count=lists.count)


def _slots_of(pages: Tensor, number: Tensor, slot: Tensor) -> Tensor:
    """``[..., D]``: slots of the pages ``number`` of ``pages`` ``[N, 1, P, D]``."""
    step, row = pages.stride(0), pages.stride(2)
    if step % row:
        found: Tensor = pages[number, 0, slot]
        return found
    # as rows of one matrix: index_select copies rows, subscripts copy numbers (6 times slower on a CPU)
    rows = (len(pages) - 1) * (step // row) + pages.shape[2]
    flat = pages.as_strided((rows, pages.shape[3]), (row, 1))
    return flat.index_select(0, (number * (step // row) + slot).flatten()).view(*number.shape, -1)


def _behind_holes(x: Tensor, first: Tensor, before: int) -> Tensor:
    """``x`` ``[B, H, before + T, D]`` with the first ``before - first`` slots of each row moved right."""
    slot = torch.arange(x.shape[2], device=x.device).expand(*x.shape[:2], -1)
    source = torch.where(slot < before, (slot - first[..., None]).clamp(min=0), slot)
    return x.gather(2, source[..., None].expand(-1, -1, -1, x.shape[3]))


def reorder(values: dict[str, Any], rows: Tensor) -> None:
    """Tensors of ``values``, whose first dimension are the sequences, as ``rows`` says."""
    _map(values, lambda t: t[rows.to(t.device)])


def to_device(values: dict[str, Any], device: torch.device) -> None:
    """Tensors of ``values`` on ``device``."""
    _map(values, lambda t: t.to(device))


def _map(values: dict[str, Any], change: Callable[[Tensor], Tensor]) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = change(value)
