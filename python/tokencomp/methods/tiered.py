"""Eviction and mixed precision in one policy, over the scores of any method."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

from tokencomp.methods import base, kv, quantizing
from tokencomp.methods.a2sf import A2SF
from tokencomp.methods.eviction import Evicting
from tokencomp.methods.kv import Keep, KVView, PageSpec
from tokencomp.ops.kvquant import Axis
from tokencomp.recipes.common import require

Tiers = tuple[tuple[int | str, float], ...]
EXACT, EVICT = 16, "evict"
TIERS: Tiers = ((EXACT, 0.05), (4, 0.35), (2, 0.4), (EVICT, 0.2))


def _shares(tiers: Any) -> dict[Any, float]:
    try:
        shares = dict(tiers)
    except (TypeError, ValueError):
        shares = {}
    numbers = all(isinstance(share, int | float) for share in shares.values())
    require(bool(shares) and numbers, "Tiered", "tiers", "shares by bits", repr(tiers))
    return shares


@base.register("tiered", paper="", stage="kv-quant")
@dataclass(frozen=True)
class Tiered(quantizing.Quantizing):
    """Eviction and precision in one ranking: the better a token scores, the more bits it keeps.

    ``Tiered(A2SF(1.0), {16: 0.05, 4: 0.35, 2: 0.4, "evict": 0.2})``: ``tiers`` are shares of the tokens seen
    so far, by bits, 16 being the working dtype; what they leave of 1 is evicted too. Protected tokens are
    exact, and the first of that share. Tokens change tier, or go, from the exact one alone, since nothing is
    quantized twice, so shares hold within a page; where tokens must go, whole pages of low mean score compete
    with exact tokens. A scorer's own budget and protected slots are not looked at.

    ``budget`` bounds the tokens of all tiers together, which then share it: a count, a share of the prompt,
    or bytes. These count quantized pages as what they take, and everything that may be exact between two
    times of quantizing (``resolve`` takes the working dtype to be of 16 bits, caches know).
    """

    method: Evicting = field(default=A2SF(1.0), metadata={"help": "whose scores rank the tokens"})
    tiers: Any = field(
        default=TIERS, metadata={"help": "share of tokens by bits (16, 8, 4, 3, 2) or 'evict'"}
    )
    budget: Any = field(default=None, metadata={"help": kv.BUDGET_HELP + "; None: as tiers say"})
    k_axis: Axis = field(default="channel", metadata={"help": "what a key's grid spans: channel or token"})
    group: int = field(default=-1, metadata={"help": "elements of a grid; -1: the page, or the head"})

    def __post_init__(self) -> None:
        given = _shares(self.tiers)
        known = (EXACT, *sorted(quantizing.BITS, reverse=True), EVICT)
        shares = all(key in known and 0 <= share <= 1 for key, share in given.items())
        require(shares, "Tiered", "tiers", f"shares in [0, 1] by {list(known)}", given)
        total = sum(given.values())
        fits = total <= 1 + 1e-9 and (EVICT not in given or total >= 1 - 1e-9) and given.get(EVICT, 0) < 1
        require(fits, "Tiered", "tiers", "shares that add up to 1, not all of them evicted", given)
        ordered = tuple((key, float(given[key])) for key in known if given.get(key))
        object.__setattr__(self, "tiers", ordered)
        object.__setattr__(self, "method", replace(cast(Any, self.method), every=self.every))
        window = getattr(self.method, "window", 0)
        require(self.recent >= window, "Tiered", "recent", f">= the scorer's window={window}", self.recent)
        if self.budget is not None:
            kv.check_budget("Tiered", self.budget, max(1, self.sinks + self.recent))
        super().__post_init__()

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """One of every share."""
        options: dict[str, Any] = {"k_axis": self.k_axis, "k_group": self.group, "v_group": self.group}
        bits = [key for key, _ in self.tiers if key in quantizing.BITS]
        return tuple(quantizing.page_spec(n, **options) for n in bits)

    @property
    def scorer(self) -> Evicting:
        """The method."""
        return self.method

    def evict(self, view: KVView) -> Keep | None:
        """As ever. Raises ValueError in decode where the last slots may not be a scorer's own window."""
        window = getattr(self.method, "window", 0)
        fits = view.step == 0 or window == 0 or self.sinks + self.recent >= window + view.page
        require(
            fits,
            "Tiered",
            "recent",
            f">= {window + view.page - self.sinks}, the scorer's window and a page",
            self.recent,
        )
        return super().evict(view)

    def split(self, tokens: int) -> tuple[int, ...]:
        """Each share of the tokens held, rounded down; the rest is exact."""
        left = 1 - self._evicted
        return tuple(
            math.floor(share / left * tokens + 1e-9) for key, share in self.tiers if key in quantizing.BITS
        )

    def held(self, view: KVView) -> list[int]:
        """What the shares, or the budget, leave of each sequence."""
        if self.budget is None:
            return [n - self._gone(n) for n in view.seen]
        prompt = view.scratch["prompt"].tolist() if "prompt" in view.scratch else view.seen
        sizes: dict[str, Any] = {"rows": view.rows, "slot_bytes": view.slot_bytes, "page": view.page}
        most = {
            n: self._capacity(n, view.layers, element_bytes=view.q.element_size(), **sizes)
            for n in set(prompt)
        }
        return [min(most[n], seen) for n, seen in zip(prompt, view.seen, strict=True)]

    def resolve(
        self, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
    ) -> tuple[int, ...]:
        """Tokens of all tiers together. Raises ValueError where protected ones do not fit."""
        slots = self._capacity(tokens, layers, rows=rows, slot_bytes=slot_bytes, page=page)
        return (min(tokens, slots),) * layers

    @property
    def _evicted(self) -> float:
        return 1.0 - float(sum(share for key, share in self.tiers if key != EVICT))

    def _gone(self, tokens: int) -> int:
        return min(math.floor(self._evicted * tokens + 1e-9), max(0, tokens - self.sinks - self.recent))

    def _capacity(
        self,
        tokens: int,
        layers: int,
        *,
        rows: int,
        slot_bytes: int,
        page: int,
        element_bytes: int = 2,
    ) -> int:
        if self.budget is None:
            return tokens - self._gone(tokens)
        if isinstance(self.budget, str):
            slots = self._paid_for(layers, rows, slot_bytes, page, element_bytes)
        else:
            slots = kv.slots_of(self.budget, tokens, layers)
        if tokens > slots:
            kv.check_least("Tiered", self.budget, slots, max(1, self.sinks + self.recent))
        return slots

    def _paid_for(self, layers: int, rows: int, slot_bytes: int, page: int, element_bytes: int) -> int:
        """The most tokens whose pages fit into the budget."""
        kv.slots_of(self.budget, 1, layers, rows=rows, slot_bytes=slot_bytes)  # checks these
        sizes = {"head_dim": slot_bytes // (2 * element_bytes), "page": page, "element_bytes": element_bytes}
        spare = len(self.specs) * (page - 1) + max(0, self.every - 1)  # exact between two times, at most
        room = kv.parse_bytes(self.budget)
        low, high = 0, max(1, room)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.stored_bytes(middle, layers, rows=rows, spare=spare, **sizes) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
