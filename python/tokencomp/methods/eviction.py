"""The common body of the methods on the KV cache: budgets, protected slots, when to evict, and selection.

A method is a scorer (what a slot is worth), a budget of each layer and head, and a way to merge what goes.
``Eviction`` is all three with the plainest choice of each; subclasses score, wrappers replace one of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import kv
from tokencomp.methods.kv import Keep, KVView, MergeSpec, PageSpec, Side
from tokencomp.recipes.common import require

EVERY_HELP = "decode steps between evictions, by which a row grows; 0: only prompts are compressed"
SINKS_HELP = "first slots of a sequence that always stay"
RECENT_HELP = "last slots that always stay: a count, or a share of the budget (a float in [0, 1])"


class Evicting:
    """What methods share: evict at the end of prompts and every so many decode steps."""

    budget: kv.Budget
    every: int

    # --- what subclasses and wrappers replace

    @property
    def needs_logits(self) -> bool:
        """See ``KVMethod``."""
        return False

    @property
    def needs_lse(self) -> bool:
        """See ``KVMethod``."""
        return False

    @property
    def queries(self) -> int:
        """See ``KVMethod``."""
        return 0

    @property
    def rerotates(self) -> bool:
        """See ``KVMethod``."""
        return False

    @property
    def formats(self) -> Sequence[PageSpec]:
        """See ``KVMethod``."""
        return ()

    @property
    def rotation(self) -> Literal["none", "keys", "both"]:
        """See ``KVMethod``."""
        return "none"

    @property
    def sides(self) -> Mapping[str, Side]:
        """See ``KVMethod``."""
        return {}

    @property
    def evicts_prompts(self) -> bool:
        """Whether the end of a prompt is a time to evict."""
        return True

    def protected(self, slots: int) -> tuple[int, int]:
        """First and last slots that always stay in a row that keeps ``slots``."""
        recent = getattr(self, "recent", 0)
        tail = int(recent * slots) if isinstance(recent, float) else recent
        return getattr(self, "sinks", 0), tail

    def record_prompt(self, view: KVView) -> None:
        """Takes in the queries of a prompt or chunk."""

    def record_step(self, view: KVView) -> None:
        """Takes in the query of a decode step (or a few)."""

    def skip_step(self, view: KVView) -> None:
        """A decode step goes by unrecorded, because nothing is evicted in decode."""

    def score(self, view: KVView) -> Tensor:
        """``[B, Hkv, S]``, or ``[B, 1, S]`` for one set a layer, S >= ``view.size``: what slots are worth.

        Values at protected slots and beyond a row's length are not looked at. NaN and -inf go first.
        Never called of a method that evicts nothing: that needs none.
        """
        raise NotImplementedError

    def layer_slots(self, budget: int, tokens: int, layers: int) -> tuple[int, ...]:
        """Slots of each layer, after a prompt of ``tokens``, when ``budget`` is their mean."""
        return (budget,) * layers

    def select(self, view: KVView, score: Tensor, slots: Sequence[int]) -> Keep:
        """The best ``slots[b]`` of each row of sequence b."""
        return keep_best(view, score, slots, [self.protected(k) for k in slots])

    def merging(self, view: KVView, score: Tensor, keep: Keep) -> MergeSpec | None:
        """How what goes enters what stays."""
        return None

    # --- the protocol

    def resolve(
        self, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
    ) -> tuple[int, ...]:
        """See ``KVMethod``. In bytes, the slots that come in between two evictions are paid for."""
        budget = kv.slots_of(self.budget, tokens, layers, rows=rows, slot_bytes=slot_bytes, page=page)
        if isinstance(self.budget, str):
            budget -= max(0, self.every - 1)
        return tuple(self._checked(slots, tokens) for slots in self.layer_slots(budget, tokens, layers))

    def after_prefill(self, view: KVView) -> Keep | None:
        """See ``KVMethod``."""
        self._check_queries(view)
        view.scratch["prompted"] = True  # until the next decode step
        view.scratch["prompt"] = torch.tensor(view.seen)  # on the host; a share is of what prompts ended with
        self.record_prompt(view)
        return None if view.more or not self.evicts_prompts else self.evict(view)

    def after_step(self, view: KVView) -> Keep | None:
        """See ``KVMethod``."""
        if self.every == 0:
            self.skip_step(view)
            return None
        self._check_queries(view)
        view.scratch["prompted"] = False
        self.record_step(view)
        return self.evict(view) if view.step % self.every == 0 else None

    def evict(self, view: KVView) -> Keep | None:
        """See ``KVMethod``."""
        slots = self.slots(view)
        if view.size <= min(slots) or (view.step == 0 and not self.evicts_prompts):
            return None
        score = self.score(view)[:, :, : view.size]
        keep = self.select(view, score, slots)
        return replace(keep, merge=self.merging(view, score, keep))

    def slots(self, view: KVView) -> list[int]:
        """Slots each sequence keeps in this layer."""
        prompt = view.scratch["prompt"].tolist() if "prompt" in view.scratch else view.seen
        sizes = {"rows": view.rows, "slot_bytes": view.slot_bytes, "page": view.page}
        each = {n: self.resolve(n, view.layers, **sizes)[view.layer] for n in set(prompt)}
        return [each[n] for n in prompt]

    def _check_queries(self, view: KVView) -> None:
        shown = view.q.shape[2] > 0 or self.queries == 0
        require(shown, type(self).__name__, "q of the view", "all queries of the forward", "none")

    def _checked(self, slots: int, tokens: int) -> int:
        """``slots``, unless a row of ``tokens`` would lose protected ones."""
        if tokens > slots:
            kv.check_least(type(self).__name__, self.budget, slots, max(1, sum(self.protected(slots))))
        return slots


@dataclass(frozen=True)
class Eviction(Evicting):
    """Keeps the slots of largest ``score`` and the protected ones: the same number in each layer and head."""

    budget: kv.Budget = field(default=0.25, metadata={"help": kv.BUDGET_HELP})
    every: int = field(default=0, metadata={"help": EVERY_HELP})

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(self.every >= 0, name, "every", ">= 0", self.every)
        recent = getattr(self, "recent", 0)
        share = not isinstance(recent, float) or 0 <= recent <= 1
        require(share, name, "recent", "a count or a share in [0, 1]", recent)
        head, tail = self.protected(0)
        require(min(head, tail) >= 0, name, "sinks and recent", ">= 0", (head, tail))
        kv.check_budget(name, self.budget, max(1, head + tail))


@dataclass(frozen=True)
class Wrapper(Evicting):
    """Another method with one of its parts replaced; wrappers may be wrapped."""

    method: Evicting
    budget: Any = field(default=None, metadata={"help": kv.BUDGET_HELP + "; None: the method's"})
    every: Any = field(default=None, metadata={"help": EVERY_HELP + "; None: the method's"})

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("budget", "every")}
        given = {name: value for name, value in given.items() if value is not None}
        object.__setattr__(self, "method", replace(cast(Any, self.method), **given))
        object.__setattr__(self, "budget", self.method.budget)
        object.__setattr__(self, "every", self.method.every)

    @property
    def needs_logits(self) -> bool:
        """The method's."""
        return self.method.needs_logits

    @property
    def needs_lse(self) -> bool:
        """The method's."""
        return self.method.needs_lse

    @property
    def queries(self) -> int:
        """The method's."""
        return self.method.queries

    @property
    def rerotates(self) -> bool:
        """The method's."""
        return self.method.rerotates

    @property
    def formats(self) -> Sequence[PageSpec]:
        """The method's."""
        return self.method.formats

    @property
    def rotation(self) -> Literal["none", "keys", "both"]:
        """The method's."""
        return self.method.rotation

    @property
    def sides(self) -> Mapping[str, Side]:
        """The method's."""
        return self.method.sides

    @property
    def evicts_prompts(self) -> bool:
        """The method's."""
        return self.method.evicts_prompts

    def protected(self, slots: int) -> tuple[int, int]:
        """The method's."""
        return self.method.protected(slots)

    def record_prompt(self, view: KVView) -> None:
        """The method's."""
        self.method.record_prompt(view)

    def record_step(self, view: KVView) -> None:
        """The method's."""
        self.method.record_step(view)

    def skip_step(self, view: KVView) -> None:
        """The method's."""
        self.method.skip_step(view)

    def score(self, view: KVView) -> Tensor:
        """The method's."""
        return self.method.score(view)

    def layer_slots(self, budget: int, tokens: int, layers: int) -> tuple[int, ...]:
        """The method's."""
        return self.method.layer_slots(budget, tokens, layers)

    def select(self, view: KVView, score: Tensor, slots: Sequence[int]) -> Keep:
        """The method's."""
        return self.method.select(view, score, slots)

    def merging(self, view: KVView, score: Tensor, keep: Keep) -> MergeSpec | None:
        """The method's."""
        return self.method.merging(view, score, keep)


def keep_best(
    view: KVView,
    score: Tensor,
    slots: Sequence[int],
    protected: Sequence[tuple[int, int]],
    *,
    counts: Tensor | None = None,
) -> Keep:
    """The slots of largest ``score`` ``[B, H, size]`` in each row, H being 1 or Hkv; ties: the lower slot.

    ``slots[b]`` of each row of sequence b; where ``counts`` ``[B, Hkv]`` are given so many, and ``slots`` are
    the most there may be. ``protected[b]`` first and last slots of the row are among them.
    """
    batch, heads = view.lengths.shape
    shared = score.shape[1] == 1
    lengths = view.lengths[:, :1] if shared else view.lengths
    k = min(max(slots), view.size)
    ragged = min(slots) < k
    options: dict[str, Any] = {"lengths": lengths.flatten()}
    if counts is not None:
        options["k_per_row"], ragged = counts.int().clamp(0, k).flatten(), True
    elif ragged:
        options["k_per_row"] = _per_row(slots, lengths).clamp(max=k)
    if len(set(protected)) == 1:
        options["head"], options["tail"] = protected[0]
    else:
        slot = torch.arange(view.size, device=score.device)
        head = _per_row([h for h, _ in protected], lengths)[:, None]
        tail = _per_row([t for _, t in protected], lengths)[:, None]
        options["keep"] = (slot < head) | (slot >= lengths.flatten()[:, None] - tail)
    index, count = ops.topk_select(score.float().flatten(0, 1), k, **options)
    index, count = index.view(batch, -1, k), count.view(batch, -1)
    if shared:
        index, count = index.expand(-1, heads, -1).contiguous(), count.expand(-1, heads).contiguous()
    return Keep(index, count, ragged=ragged)


def evicted(view: KVView, keep: Keep) -> Tensor:
    """``[B, Hkv, size]`` bool: slots in use that ``keep`` does not name."""
    width = view.size
    stays = torch.zeros(*view.lengths.shape, width + 1, dtype=torch.bool, device=keep.index.device)
    stays.scatter_(2, torch.where(keep.index < 0, width, keep.index).long(), True)
    slot = torch.arange(width, device=keep.index.device)
    return (slot < view.lengths[..., None]) & ~stays[..., :width]


def packed(mask: Tensor, width: int) -> Tensor:
    """``[B, H, width]`` int32: the slots ``mask`` ``[B, H, S]`` names, ascending, then -1."""
    slot = torch.arange(mask.shape[2], dtype=torch.int32, device=mask.device)
    last = torch.iinfo(torch.int32).max
    ordered = torch.where(mask, slot, last).sort(-1).values[..., :width]
    return torch.where(ordered == last, -1, ordered)


def at(values: Tensor, index: Tensor, hole: float = 0.0) -> Tensor:
    """``values`` ``[B, H, S]`` at slots ``index`` ``[B, H, K]``, ``hole`` where it is -1."""
    values = values.expand(*index.shape[:2], -1)
    return torch.where(index < 0, hole, values.gather(2, index.clamp(min=0).long()))


def draws(view: KVView, seed: int) -> Tensor:
    """``[B, Hkv, size]`` in [0, 1): one number a token, a hash of seed, layer, row and original position."""
    row = torch.arange(view.rows, device=view.lengths.device).view(*view.lengths.shape, 1)
    key = _mix(_mix(row + (seed << 20)) + view.layer)
    key = _mix(key + view.position[:, :, : view.size].long())
    return (key >> 40 & 0xFFFFFF).float() / 2**24


def held(view: KVView) -> Tensor:
    """``[B]`` on the host: slots each sequence holds, for methods that keep the same number in all heads.

    Call once a forward, and take off what goes.
    """
    seen = torch.tensor(view.seen)
    before = view.scratch.get("seen", torch.zeros_like(seen))
    view.scratch["held"] = view.scratch.get("held", torch.zeros_like(seen)) + seen - before
    view.scratch["seen"] = seen
    number: Tensor = view.scratch["held"]
    return number


def _per_row(numbers: Sequence[int], lengths: Tensor) -> Tensor:
    """``[R]`` int32: number b for each of the rows of sequence b."""
    each = torch.tensor(numbers, dtype=torch.int32, device=lengths.device)
    return each.repeat_interleave(lengths.shape[1])


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 whose bits look random (splitmix64)."""
    x = x + -7046029254386353131
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)
