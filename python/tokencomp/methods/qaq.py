"""QAQ: bits from what a token's error would do to the attention's output (arXiv 2403.04643)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, kv_attention, quantizing
from tokencomp.methods.kv import KVView, PageSpec, Side
from tokencomp.ops.kvquant import Axis
from tokencomp.recipes.common import require

PAIRS = ((8, 8), (8, 4), (4, 8), (4, 4), (4, 2), (2, 4), (2, 2))


@base.register("qaq", paper="2403.04643", stage="kv-quant")
@dataclass(frozen=True)
class QAQ(quantizing.Quantizing):
    """Keys and values of a token get the bits that keep the error of the output at about ``error``.

    Keys: by the spread of the token's key; values: by theirs, and by the largest attention that the token
    gets from the last query over the heads of a kv head (``recipes.qaq_key_bits``,
    ``recipes.qaq_value_bits``). Only the allocator is QAQ's: its bits are rounded up to pages of 2, 4 or 8 (8
    and 2 together to 8 and 4), grids are asymmetric, and outliers are not kept apart. Tokens of a kind wait
    in the working dtype until they fill a page, so that a head may hold up to ``7 (page - 1)`` exact ones.
    """

    error: float = field(default=1.0, metadata={"help": "of the attention's output, > 0"})
    high: int = field(default=4, metadata={"help": "most bits: 4 or 8"})
    q_norm: float = field(default=300.0, metadata={"help": "norm of a query, a constant of the method"})
    k_axis: Axis = field(default="channel", metadata={"help": "what a key's grid spans: channel or token"})

    def __post_init__(self) -> None:
        require(self.error > 0, "QAQ", "error", "> 0", self.error)
        require(self.q_norm > 0, "QAQ", "q_norm", "> 0", self.q_norm)
        require(self.high in (4, 8), "QAQ", "high", "4 or 8", self.high)
        require(
            self.k_axis in ("token", "channel"), "QAQ", "k_axis", "'token' or 'channel'", repr(self.k_axis)
        )
        super().__post_init__()

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """Pairs of bits of keys and values."""
        pairs = (pair for pair in PAIRS if max(pair) <= self.high)
        return tuple(quantizing.page_spec(k, v, k_axis=self.k_axis) for k, v in pairs)

    @property
    def needs_logits(self) -> bool:
        """Where every step quantizes; otherwise they are computed for the step that does."""
        return self.every == 1

    @property
    def needs_lse(self) -> bool:
        """For the last query of a prompt."""
        return True

    @property
    def queries(self) -> int:
        """The last one."""
        return 1

    @property
    def sides(self) -> Mapping[str, Side]:
        """The largest weight that the last query gave each token."""
        return {"attention": Side(torch.float32, 0)}

    def split(self, tokens: int) -> tuple[int, ...]:
        """All in the best tier, the most there may be: the tokens decide."""
        return (tokens, *(0 for _ in self.specs[1:]))

    def record_prompt(self, view: KVView) -> None:
        """Looks at the last query."""
        found = kv_attention.received(view, newest=1, heads="kv_max", reduce="max")
        view.state["attention"][:, :, : view.size] = found

    def record_step(self, view: KVView) -> None:
        """The same, for the step that quantizes."""
        if view.step % self.every == 0:
            view.state["attention"][:, :, : view.size] = kv_attention.last_received(view, "max")

    def assign(self, view: KVView, kind: Tensor, free: Tensor, held: list[int]) -> tuple[Tensor, Tensor]:
        """The page type each token asks for; of each type whole pages, the oldest first."""
        wanted = torch.where(free, self._types(view), 0)
        target = kind.clone()
        for number in range(1, len(self.formats) + 1):
            asks = wanted == number
            count = asks.sum(-1, keepdim=True) // view.page * view.page
            target[asks & (asks.cumsum(-1) <= count)] = number
        return target, torch.zeros_like(free)

    def _types(self, view: KVView) -> Tensor:
        """``[B, Hkv, size]``: the type of this layer with the least bits that do."""
        spread = [x.float().amax(-1) - x.float().amin(-1) for x in self._shown(view)]
        attention = view.state["attention"][:, :, : view.size]
        limits: dict[str, Any] = {"error": self.error, "low": 2, "high": 8, "recent": 0}
        each = [
            (
                recipes.qaq_key_bits(spread[0][b], max(2, n), q_norm=self.q_norm, **limits),
                recipes.qaq_value_bits(spread[1][b], attention[b], max(2, n), **limits),
            )
            for b, n in enumerate(view.seen)
        ]
        k, v = (torch.stack(bits) for bits in zip(*each, strict=True))
        k, v = (torch.where(bits > 4, 8, torch.where(bits > 2, 4, 2)).clamp(max=self.high) for bits in (k, v))
        k, v = torch.where(v == 8, k.clamp(min=4), k), torch.where(k == 8, v.clamp(min=4), v)
        formats, types = list(self.formats), torch.zeros_like(k)
        pairs = [pair for pair in PAIRS if max(pair) <= self.high]
        for pair, spec in zip(pairs, self.layer_specs(view.layer, view.layers), strict=True):
            types = torch.where((k == pair[0]) & (v == pair[1]), formats.index(spec) + 1, types)
        return types

    @staticmethod
    def _shown(view: KVView) -> tuple[Tensor, Tensor]:
        return view.keys()[:, :, : view.size], view.values()[:, :, : view.size]
