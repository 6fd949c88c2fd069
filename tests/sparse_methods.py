"""Sparse methods for the tests: one small instance of each, views to show them, and what they make of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tokencomp import ops
from tokencomp.block_lists import BlockLists
from tokencomp.cache import sparse
from tokencomp.cache.forward import Rule
from tokencomp.methods import (
    DuoAttention,
    InfLLM,
    Quest,
    SlotLists,
    SparseView,
    SpecKV,
    SpecPC,
    Subset,
    TidalDecode,
    TokenSelect,
    Twilight,
)
from torch import Tensor

# Every method, small enough for prompts of some 60 tokens and a few decode steps in three layers.
SPARSE_METHODS: dict[str, Any] = {
    "token-select": TokenSelect(k=8, sinks=2, recent=6, chunk=0),
    "token-select-mod": TokenSelect(k=8, sinks=0, recent=1, theta=None, kv_map="mod", pool=4, chunk=0),
    "token-select-prompt": TokenSelect(k=8, sinks=2, recent=6, chunk=64, theta=0.2),
    "tidal": TidalDecode(k=12, first=0, again=2),
    "tidal-q": TidalDecode(k=12, first=0, again=2, share="q", force=False),
    "tidal-sum": TidalDecode(k=12, first=0, again=1, vote="softmax_sum"),
    "quest": Quest(k=16, chunk=4, dense=0),
    "quest-q": Quest(k=20, chunk=5, dense=0, sinks=1, share="q"),
    "infllm": InfLLM(blocks=2, block=8, representatives=2, sinks=4, recent=8, window=16),
    "twilight": Twilight(p=0.6, dense=0),
    "twilight-quest": Twilight(Quest(k=24, chunk=4, dense=0), p=0.7, dense=1, least=3),
    "twilight-tidal": Twilight(TidalDecode(k=16, first=0, again=2), p=0.8, dense=1),
    "streaming": DuoAttention(sinks=2, recent=9),
    "duo": DuoAttention(gates=((0.9, 0.1), (0.1, 0.2), (0.7, 0.8)), sinks=2, recent=9),
}
DRAFT_METHODS = (SpecPC(keep=24, window=4, kernel=3, first=0), SpecKV(20, window=4, lookahead=6))
ONE_LAYER = {"duo"}  # whose knobs say how many layers there are


def view(
    q: Tensor, k: Tensor, lengths: list[int] | None = None, *, layer: int = 2, **options: Any
) -> SparseView:
    """Of queries ``[B, Hq, T, D]`` and keys ``[B, Hkv, S, D]`` of a decode step."""
    size = k.shape[2]
    each = torch.tensor([size] * len(k) if lengths is None else lengths, dtype=torch.int32, device=k.device)
    rows = each[:, None].expand(-1, k.shape[1]).contiguous()
    position = torch.arange(size, dtype=torch.int32, device=k.device).expand(*k.shape[:3])

    def scores(q: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return ops.qk_scores(q, k, **{"lengths": rows, **given})

    def keys_at(slots: Tensor) -> Tensor:
        return k.gather(2, slots.long()[..., None].expand(-1, -1, -1, k.shape[3]))

    given: dict[str, Any] = {
        "step": 1,
        "fresh": size,
        "scale": q.shape[3] ** -0.5,
        "softcap": None,
        **options,
    }
    return SparseView(
        layer=layer, layers=32, q=q, lengths=rows, size=size, page=16, keys=lambda: k, values=lambda: k,
        scores=scores, position=lambda: position, keys_at=keys_at, **given,
    )  # fmt: skip


def slots(lists: SlotLists | None) -> list[list[list[int]]]:
    """The slots that are read, of each row and head."""
    assert lists is not None
    assert lists.index.dtype == lists.count.dtype == torch.int32
    found = []
    for rows, counts in zip(lists.index.tolist(), lists.count.tolist(), strict=True):
        found.append([[s for s in row[:n] if s >= 0] for row, n in zip(rows, counts, strict=True)])
    for row in (row for rows in found for row in rows):
        assert row == sorted(set(row))
    return found


@dataclass
class Reading:
    """What went into and came out of one attention of one layer, and what it was told to read."""

    q: Tensor
    k: Tensor  # new ones
    v: Tensor
    rule: Rule
    starts: list[int]  # rows [starts, starts + counts) of the forward are tokens
    counts: list[int]
    told: Any = None  # SlotLists, BlockLists, Subset or None
    first: Tensor | None = None  # [B, Hkv] where the keys of each row begin in what it was told of
    width: int = 0  # slots of that
    output: Tensor | None = None


@dataclass
class Recorder:
    """All readings of a run, by layer."""

    readings: dict[int, list[Reading]] = field(default_factory=dict)

    def __init__(self, monkeypatch: Any) -> None:
        self.readings = {}
        self._now: Any = None
        from tokencomp.cache import layer as layers

        attend, decode = layers.Layer._attend, sparse._decode
        listed, subset = sparse.attend_listed, sparse.attend_subset

        def attending(
            layer: Any, store: Any, q: Tensor, k: Tensor, v: Tensor, what: Any, rule: Rule
        ) -> Tensor:
            packing = what.packing
            starts = [0] * len(q) if packing is None else packing.starts.tolist()
            counts = [q.shape[2]] * len(q) if packing is None else packing.counts.tolist()
            reading = self._now = Reading(q, k, v, rule, starts, counts)
            reading.output = attend(layer, store, q, k, v, what, rule)
            self.readings.setdefault(layer.index, []).append(reading)
            return reading.output

        def decoding(store: Any, q: Tensor, rule: Rule, lists: Any, logits: bool) -> Any:
            self._now.told = lists
            return decode(store, q, rule, lists, logits)

        def listing(q: Tensor, k: Tensor, v: Tensor, told: Any, *rest: Any) -> Tensor:
            self._now.told, self._now.first, self._now.width = told, rest[1], k.shape[2]
            return listed(q, k, v, told, *rest)

        def choosing(q: Tensor, k: Tensor, v: Tensor, told: Any, *rest: Any) -> Tensor:
            self._now.told = told
            return subset(q, k, v, told, *rest)

        monkeypatch.setattr(layers.Layer, "_attend", attending)
        monkeypatch.setattr(sparse, "_decode", decoding)
        monkeypatch.setattr(sparse, "attend_listed", listing)
        monkeypatch.setattr(sparse, "attend_subset", choosing)

    def told(self) -> list[Any]:
        return [reading.told for readings in self.readings.values() for reading in readings]

    def check(self, **tolerance: float) -> None:
        """Every output is the masked attention, in float64, that the lists say; nothing was evicted."""
        for readings in self.readings.values():
            for b in range(len(readings[0].q)):
                keys = values = None
                for reading in readings:
                    own = slice(reading.starts[b], reading.starts[b] + reading.counts[b])
                    k, v = (x[b, :, own].double() for x in (reading.k, reading.v))
                    keys = k if keys is None else torch.cat([keys, k], 1)
                    values = v if values is None else torch.cat([values, v], 1)
                    q = reading.q[b, :, own].double()
                    expected = masked(q, keys, values, reading.rule, allowed(reading, b, q, keys.shape[1]))
                    assert reading.output is not None
                    torch.testing.assert_close(reading.output[b, :, own].double(), expected, **tolerance)


def allowed(reading: Reading, b: int, q: Tensor, size: int) -> Tensor:
    """``[Hq, T, S]`` bool: what the rows of sequence b were told to look at."""
    heads, rows = q.shape[:2]
    told = reading.told
    seen = torch.ones(heads, rows, size, dtype=torch.bool)
    if isinstance(told, SlotLists):
        listed = torch.zeros(told.index.shape[1], size, dtype=torch.bool)
        for head, row in enumerate(slots(told)[b]):
            listed[head, row] = True
        seen &= listed.repeat_interleave(heads // len(listed), 0)[:, None]
    elif isinstance(told, BlockLists):
        first = 0 if reading.first is None else int(reading.first[b, 0])
        wide = _of_blocks(told, b, len(reading.q), heads, reading.q.shape[2], reading.width, rows)
        seen &= wide[..., first : first + size]
    elif isinstance(told, Subset):
        some = torch.zeros(rows, dtype=torch.bool)
        some[told.tokens[b, : told.count[b]].long()] = True
        seen &= some[:, None]
        seen[..., size - rows :] &= some
    return seen


def _of_blocks(lists: BlockLists, b: int, batch: int, heads: int, width: int, size: int, rows: int) -> Tensor:
    blocks = -(-width // lists.block_q)
    seen = torch.zeros(heads, rows, size, dtype=torch.bool)

    def each(ptr: Tensor | None, values: Tensor | None, span: int) -> None:
        if ptr is None or values is None:
            return
        listed = (len(ptr) - 1) // (batch * blocks)
        for head in range(heads):
            for m in range(-(-rows // lists.block_q)):
                i = (b * listed + head * listed // heads) * blocks + m
                for at in values[ptr[i] : ptr[i + 1]].tolist():
                    seen[head, m * lists.block_q : (m + 1) * lists.block_q, at * span : (at + 1) * span] = (
                        True
                    )

    each(lists.indptr, lists.indices, lists.block_k)
    each(lists.column_ptr, lists.columns, 1)
    return seen


def masked(q: Tensor, k: Tensor, v: Tensor, rule: Rule, seen: Tensor) -> Tensor:
    """Causal attention of ``q`` ``[Hq, T, D]``, the last of ``k``, in float64; a row without keys is 0."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    z = q @ k.mT * rule.scale
    if rule.softcap is not None:
        z = rule.softcap * torch.tanh(z / rule.softcap)
    rows, size = z.shape[1:]
    causal = torch.arange(size) <= torch.arange(size - rows, size)[:, None]
    z = z.masked_fill(~(seen & causal), -torch.inf)
    if rule.sinks is not None:
        z = torch.cat([z, rule.sinks.double()[:, None, None].expand(-1, rows, 1)], 2)
    p = torch.softmax(z, -1).nan_to_num(0.0)
    return p[..., :size] @ v
