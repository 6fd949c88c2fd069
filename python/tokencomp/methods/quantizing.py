"""The common body of the methods that quantize a KV cache: tiers, who moves into which, and what that takes.

A tier is a way to store a token; the working dtype is the best. Every so often the tokens of least score
among those not quantized yet move into the lower tiers, in whole pages, from their originals. A quantized
token stays as it is; only ``Tiered`` lets tokens go.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokencomp import ops, recipes
from tokencomp.methods import eviction, kv_attention
from tokencomp.methods.eviction import Evicting
from tokencomp.methods.kv import ChannelMaps, Keep, KVView, PageSpec, Side
from tokencomp.ops.kvquant import Axis, ChannelStats
from tokencomp.ops.kvquant_pages import MAX_PAGE_TYPES, TIER_BITS, PageFormat, Tier
from tokencomp.recipes.common import require

BITS: dict[int, Tier] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
EDGE_BITS = 4

EVERY_HELP = "decode steps between two times of quantizing; 0: only prompts are quantized"
SINKS_HELP = "first tokens of a sequence that are never quantized"
RECENT_HELP = "newest tokens that are not quantized yet, as a count"
EDGES_HELP = "first and last layers whose tiers have 4 bits at least"


@dataclass(frozen=True)
class Quantizing(Evicting, ABC):
    """Holds every token, all but the protected ones quantized: the oldest first, or those of least score."""

    budget = 1.0
    every: int = field(default=16, kw_only=True, metadata={"help": EVERY_HELP})
    sinks: int = field(default=4, kw_only=True, metadata={"help": SINKS_HELP})
    recent: int = field(default=128, kw_only=True, metadata={"help": RECENT_HELP})
    edges: int = field(default=2, kw_only=True, metadata={"help": EDGES_HELP})

    def __post_init__(self) -> None:
        name = type(self).__name__
        for knob in ("every", "sinks", "recent", "edges"):
            value = getattr(self, knob)
            require(isinstance(value, int) and value >= 0, name, knob, "a count >= 0", repr(value))
        number = len(self.formats)
        require(number <= MAX_PAGE_TYPES, name, "tiers", f"{MAX_PAGE_TYPES} page types at most", number)

    # --- what subclasses say

    @property
    @abstractmethod
    def specs(self) -> tuple[PageSpec, ...]:
        """Quantized tiers, the best first."""

    @property
    def scorer(self) -> Evicting | None:
        """Whose scores tell what tokens are worth; None: their age."""
        return None

    def split(self, tokens: int) -> tuple[int, ...]:
        """Of ``tokens`` held, how many should be in each of ``specs``, before protection and whole pages."""
        return (tokens, *(0 for _ in self.specs[1:]))

    def maps(self, view: KVView) -> ChannelMaps | None:
        """Channel maps of the rows that quantize for the first time; others do not look at them."""
        return None

    def held(self, view: KVView) -> list[int]:
        """Tokens each sequence should hold in a row of this layer."""
        return list(view.seen)

    def layer_specs(self, layer: int, layers: int) -> tuple[PageSpec, ...]:
        """``specs`` as that layer has them."""
        edge = min(layer, layers - 1 - layer) < self.edges
        return tuple(map(raised, self.specs)) if edge else self.specs

    # --- the protocol

    @property
    def formats(self) -> Sequence[PageSpec]:
        """The tiers, and those of the edge layers."""
        edge = map(raised, self.specs) if self.edges else ()
        return tuple(dict.fromkeys([*self.specs, *edge]))

    @property
    def needs_logits(self) -> bool:
        """The scorer's."""
        return self.scorer is not None and self.scorer.needs_logits

    @property
    def needs_lse(self) -> bool:
        """The scorer's."""
        return self.scorer is not None and self.scorer.needs_lse

    @property
    def queries(self) -> int:
        """The scorer's."""
        return 0 if self.scorer is None else self.scorer.queries

    @property
    def sides(self) -> Mapping[str, Side]:
        """The scorer's."""
        return {} if self.scorer is None else self.scorer.sides

    def record_prompt(self, view: KVView) -> None:
        """The scorer's."""
        if self.scorer is not None:
            self.scorer.record_prompt(view)

    def record_step(self, view: KVView) -> None:
        """The scorer's."""
        if self.scorer is not None:
            self.scorer.record_step(view)

    def skip_step(self, view: KVView) -> None:
        """The scorer's."""
        if self.scorer is not None:
            self.scorer.skip_step(view)

    def score(self, view: KVView) -> Tensor:
        """The scorer's, or positions: the oldest go first."""
        return view.position.float() if self.scorer is None else self.scorer.score(view)

    def resolve(
        self, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
    ) -> tuple[int, ...]:
        """All tokens; ``stored_bytes`` says what they take."""
        return (tokens,) * layers

    def evict(self, view: KVView) -> Keep | None:
        """What stays, and in which tier; None where that changes nothing."""
        held = self.held(view)
        kind = kinds_of(view)
        free = (kind == 0) & in_use(view) & ~self._shielded(view, held)
        target, gone = self.assign(view, kind, free, held)
        fresh = (target > 0) & (kind == 0)
        first = fresh.any(-1) & ~(kind > 0).any(-1)
        changes, begins = torch.stack([fresh.any() | gone.any(), first.any()]).tolist()  # waits for a GPU
        if not changes:
            return None
        view.scratch["quantized"] = view.scratch.get("quantized", False) or begins
        return _answer(view, target, gone, self.maps(view) if begins else None)

    def assign(self, view: KVView, kind: Tensor, free: Tensor, held: list[int]) -> tuple[Tensor, Tensor]:
        """The page type of each slot ``[B, Hkv, size]``, and bool which ones go.

        Of ``free`` slots the lowest go until ``held``, then the lowest fill the lowest tier, and so on up.
        """
        score = self.score(view)[:, :, : view.size].expand_as(kind)
        rank, count = ranks(score, free), free.sum(-1, keepdim=True)
        over = (view.lengths - _rows(held, view)[..., 0])[..., None].clamp(min=0)
        gone = torch.zeros_like(free)
        if self.formats and any(n < seen for n, seen in zip(held, view.seen, strict=True)):
            gone = self._pages_out(view, score, kind, free, rank, over)
        begin = torch.minimum(over - gone.sum(-1, keepdim=True), count)
        gone = gone | (free & (rank < begin))
        kind = torch.where(gone, 0, kind)
        target = kind.clone()
        for number, wanted in self._wanted(view, held):
            need = (wanted - (kind == number).sum(-1, keepdim=True)).clamp(min=0)
            need = torch.minimum(need, count - begin) // view.page * view.page
            target[free & (rank >= begin) & (rank < begin + need)] = number
            begin = begin + need
        return target, gone

    def parts(self, view: KVView, held: list[int]) -> list[tuple[int, ...]]:
        """``split`` of what each sequence holds."""
        return [self.split(n) for n in held]

    # --- bytes

    def placed(self, tokens: int, page: int, layer: int, layers: int) -> dict[PageSpec, int]:
        """How many of ``tokens`` held are in each tier of a layer after a prompt, in whole pages."""
        left = max(0, tokens - sum(self.protected(tokens)))
        wanted: dict[PageSpec, int] = {}
        for tier, count in zip(
            reversed(self.layer_specs(layer, layers)), reversed(self.split(tokens)), strict=True
        ):
            wanted[tier] = wanted.get(tier, 0) + count
        counts = {}
        for tier, count in wanted.items():
            counts[tier] = min(count, left) // page * page
            left -= counts[tier]
        return counts

    def stored_bytes(
        self,
        tokens: int,
        layers: int,
        *,
        head_dim: int,
        rows: int = 1,
        page: int = 16,
        element_bytes: int = 2,
        spare: int = 0,
    ) -> int:
        """Bytes of the pages that hold ``tokens`` of every row in all layers, after a prompt.

        Quantized pages with their parameters, and whole pages of ``element_bytes`` an element for the rest
        and ``spare`` tokens more.
        """
        total = 0
        for layer in range(layers):
            counts = self.placed(tokens, page, layer, layers)
            for tier, count in counts.items():
                total += count // page * page_format(tier, page, head_dim).page_bytes
            exact = tokens - sum(counts.values()) + spare
            total += -(-exact // page) * page * 2 * head_dim * element_bytes
        return total * rows

    # --- parts

    def _wanted(self, view: KVView, held: list[int]) -> list[tuple[int, Tensor]]:
        """Page types of this layer, the lowest first, and how many tokens they should hold ``[B, 1, 1]``."""
        found: dict[int, Tensor] = {}
        parts = self.parts(view, held)
        formats = list(self.formats)
        for i, tier in reversed(list(enumerate(self.layer_specs(view.layer, view.layers)))):
            number, wanted = formats.index(tier) + 1, _rows([part[i] for part in parts], view)
            found[number] = found[number] + wanted if number in found else wanted
        return list(found.items())

    def _shielded(self, view: KVView, held: list[int]) -> Tensor:
        """``[B, Hkv, size]`` bool: sinks and recent tokens, which are not quantized."""
        position = view.position[:, :, : view.size]
        ends = [self.protected(n) for n in held]
        first = _rows([sinks for sinks, _ in ends], view)
        last = _rows([seen - recent for seen, (_, recent) in zip(view.seen, ends, strict=True)], view)
        return (position < first) | (position >= last)

    def _pages_out(
        self, view: KVView, score: Tensor, kind: Tensor, free: Tensor, rank: Tensor, over: Tensor
    ) -> Tensor:
        """``[B, Hkv, size]`` bool: slots of quantized pages that go, being worth less than free ones.

        Whole pages compete with as many of the lowest free tokens, by their mean scores; ties: pages stay.
        """
        page = view.page
        padding = (0, -view.size % page)
        worth, quantized, free, rank = (
            torch.nn.functional.pad(t, padding) for t in (score.float(), kind > 0, free, rank)
        )
        pages = worth.unflatten(-1, (-1, page)).mean(-1)
        pages = torch.where(quantized[..., ::page], pages, torch.inf)
        spare = free.sum(-1, keepdim=True)
        place = torch.where(free, rank, worth.shape[-1])  # no two free ones share a rank
        blocks = worth.new_zeros(*worth.shape[:2], worth.shape[-1] + 1).scatter_(2, place, worth)
        blocks = blocks[..., :-1].unflatten(-1, (-1, page)).mean(-1)
        number = torch.arange(blocks.shape[-1], device=blocks.device)
        blocks = torch.where((number + 1) * page <= spare, blocks, torch.inf)
        order = torch.cat([blocks, pages], -1).argsort(dim=-1, stable=True)
        number = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        place = torch.empty_like(order).scatter_(2, order, number)
        out = (place[..., blocks.shape[-1] :] < over // page) & (pages < torch.inf)
        return out.repeat_interleave(page, -1)[..., : view.size]


# --- tiers --------------------------------------------------------------------------------------------------


def page_spec(
    k_bits: int,
    v_bits: int | None = None,
    *,
    k_axis: Axis = "channel",
    v_axis: Axis = "token",
    k_group: int = -1,
    v_group: int = -1,
) -> PageSpec:
    """Integer pages of 2, 3, 4 or 8 bits; ``v_bits`` None: as keys.

    Raises:
        ValueError: other bits, or a group that is neither -1 nor positive.
    """
    v_bits = k_bits if v_bits is None else v_bits
    for name, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
        require(bits in BITS, "page_spec", name, f"one of {list(BITS)}", repr(bits))
    for name, group in (("k_group", k_group), ("v_group", v_group)):
        require(group == -1 or group >= 1, "page_spec", name, "-1 or >= 1", repr(group))
    return PageSpec(BITS[k_bits], BITS[v_bits], k_axis, v_axis, k_group, v_group)


def raised(tier: PageSpec) -> PageSpec:
    """``tier`` with at least 4 bits."""
    k, v = (BITS[EDGE_BITS] if TIER_BITS[name] < EDGE_BITS else name for name in (tier.k, tier.v))
    return replace(tier, k=k, v=v)


def page_format(tier: PageSpec, page: int, head_dim: int) -> PageFormat:
    """``tier`` for pages of ``page`` tokens of ``head_dim`` channels; groups are cut to what there is."""
    groups = [
        -1 if group >= (head_dim if axis == "token" else page) else group
        for axis, group in ((tier.k_axis, tier.k_group), (tier.v_axis, tier.v_group))
    ]
    return PageFormat(tier.k, tier.v, page, head_dim, tier.k_axis, tier.v_axis, groups[0], groups[1])


# --- views --------------------------------------------------------------------------------------------------


def in_use(view: KVView) -> Tensor:
    """``[B, Hkv, size]`` bool."""
    return torch.arange(view.size, device=view.lengths.device) < view.lengths[..., None]


def kinds_of(view: KVView) -> Tensor:
    """``[B, Hkv, size]`` int32, the page type each slot is in; 0 beyond a row's length."""
    if view.kind is None:
        shape = (*view.lengths.shape, view.size)
        return torch.zeros(shape, dtype=torch.int32, device=view.lengths.device)
    return torch.where(in_use(view), view.kind()[:, :, : view.size], 0)


def ranks(score: Tensor, free: Tensor) -> Tensor:
    """``[B, H, S]``: 0 for the free slot of least score, and so on; others after them.

    NaN counts as -inf. Ties: the higher slot is the lower one in rank.
    """
    score = torch.where(score.isnan(), -torch.inf, score).flip(-1)
    order = score.argsort(dim=-1, stable=True)
    order = order.gather(-1, (~free.flip(-1)).gather(-1, order).byte().argsort(dim=-1, stable=True))
    index = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, index).flip(-1)


def row_stats(view: KVView, x: Tensor) -> ChannelStats:
    """``ops.channel_stats`` of ``x`` ``[B, Hkv, >= size, D]`` over the slots in use: ``[B, Hkv, D]`` each."""
    rows = x[:, :, : view.size].flatten(0, 1)[:, None]
    found = ops.channel_stats(rows, lengths=kv_attention.row_lengths(view))
    return ChannelStats(*(kv_attention.by_head(view, t[:, 0]) for t in found))


def remember_query_range(view: KVView) -> None:
    """Keeps ``max |q|`` of each channel in ``scratch``, until something is quantized."""
    if view.scratch.get("quantized"):
        return
    ends = None if view.starts is None or view.counts is None else view.starts + view.counts
    found = ops.channel_stats(view.q, starts=view.starts, lengths=ends).absmax
    before = view.scratch.get("q_absmax")
    view.scratch["q_absmax"] = found if before is None else torch.maximum(before, found)


def key_balancer(view: KVView, stats: ChannelStats, bias: Tensor | None = None) -> Tensor:
    """``recipes.channel_balancer`` of the queries remembered and the keys of ``stats`` without their
    ``bias``, ``[B, Hkv, D]``.
    """
    largest = stats.absmax if bias is None else torch.maximum(stats.max - bias, bias - stats.min)
    return recipes.channel_balancer(view.scratch["q_absmax"], largest)


def _rows(numbers: Sequence[int], view: KVView) -> Tensor:
    """``[B, 1, 1]`` int64, one number a sequence."""
    return torch.tensor(list(numbers), device=view.lengths.device)[:, None, None]


def _answer(view: KVView, target: Tensor, gone: Tensor, maps: ChannelMaps | None) -> Keep:
    stays = in_use(view) & ~gone
    index = eviction.packed(stays, view.size)
    kind = torch.where(index < 0, 0, target.gather(2, index.clamp(min=0).long())).int()
    evicts: Any = bool(gone.any())
    count = stays.sum(-1).int() if evicts else view.lengths.clone()
    return Keep(index, count, ragged=evicts, kind=kind, maps=maps)
