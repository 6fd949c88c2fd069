"""One prompt with images on its way through a decoder whose later layers get fewer visual tokens."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp import ops, ragged
from tokencomp.methods.decoder import DecoderKeep, DecoderMethod, DecoderView, Transition
from tokencomp.methods.decoder_attention import PromptAttention, prompt_attention


@dataclass
class Deep:
    """Features that the model adds to visual tokens behind its first layers (Qwen3-VL)."""

    row: Tensor  # [B, W0] int64 of the features, by column of the prompt; -1: none
    features: list[Tensor]  # of each layer [n, C]


@dataclass
class Counts:
    """Tokens of each sequence in one layer, ``[B]``."""

    tokens: Tensor
    visual: Tensor


@dataclass
class Run:
    """A prompt between the first layer and the last."""

    method: DecoderMethod
    stops: frozenset[int]
    layers: int
    cache: Any  # PagedKVCache
    embeds: Tensor  # [B, W0, C]
    visual: Tensor  # [B, W] bool, of the rows there are now
    column: Tensor  # [B, W] int64, their columns, -1: padding
    deep: Deep | None = None
    key: Tensor | None = None  # [B, W0] bool, see ``DecoderView.key``
    counts: list[Counts] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)  # of the rows of each layer
    seconds: float = 0.0  # of the host, in scoring and choosing
    scratch: dict[str, Any] = field(default_factory=dict)
    seen: Any = None  # (q, k, scale, softcap, past, lengths) of the layer that a stop is behind
    transitions: list[Transition] = field(default_factory=list)
    activation: Tensor | None = None
    value: Tensor | None = None
    probing: bool = False
    whole: Any = None  # the cache's ``Forward`` of the prompt
    _rope: tuple[Tensor, Tensor] | None = None
    tokens: list[int] = field(default_factory=list)  # of each sequence of the whole prompt
    _visual: list[int] = field(default_factory=list)  # visual ones of them
    _narrow: bool = False

    def __post_init__(self) -> None:
        self._visual = self.visual.sum(1).tolist()
        self.tokens = (self.column >= 0).sum(1).tolist()
        order = self.visual.long().cumsum(1) > 0
        self._text = order & ~self.visual & (self.column >= 0)

    # ---- what happens to a layer -------------------------------------------------------------------------

    def enter(self, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """What layer ``number`` gets: hidden states and keyword arguments."""
        if self.whole is None:
            self.whole = self.cache.state.current
        if number - 1 in self.stops:
            begin, before = time.perf_counter(), self.column
            hidden = self._stop(number - 1, layer, hidden, self._narrowed(kwargs))
            self.seconds += time.perf_counter() - begin
            if self.column is not before:
                self.cache.narrow(self.whole, self.column, number)
        self.seen = self.activation = self.value = None
        self.transitions.clear()
        self.counts.append(Counts((self.column >= 0).sum(1), self.visual.sum(1)))
        self.columns.append(self.column)
        return hidden, self._narrowed(kwargs)

    def leave(self, number: int, hidden: Tensor) -> Tensor:
        """What layer ``number`` gives, with the features that the model adds there."""
        if self.deep is None or number >= len(self.deep.features):
            return hidden
        row = self.deep.row.gather(1, self.column.clamp(min=0))
        there = (row >= 0) & (self.column >= 0)
        added = self.deep.features[number].to(hidden)[row.clamp(min=0)]
        return torch.where(there[..., None], hidden + added, hidden)

    def saw(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> bool:
        """Queries, keys and values of a layer; whether they were all that was wanted."""
        number = module.layer_idx
        if number in self.stops and not self.probing and "value" in self.method.watches:
            self.value = v
        if number in self.stops or self.probing:
            self.seen = (q, k, scale, softcap, *self._past(number))
        return self.probing

    # ---- a stop ------------------------------------------------------------------------------------------

    def _stop(self, behind: int, following: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        real = self.column >= 0
        both = (self.transitions[0], self.transitions[1]) if len(self.transitions) == 2 else None
        view = DecoderView(
            layer=behind, layers=self.layers, x=hidden, visual=self.visual, text=self._text,
            column=self.column, tokens=self._visual, embeds=self.embeds,
            attention=None if self.seen is None else self._attention(real),
            following=lambda: self._probe(following, hidden, kwargs, real),
            transition=both, activation=self.activation, value=self.value, scratch=self.scratch,
            key=None if self.key is None else self.key.gather(1, self.column.clamp(min=0)) & real,
        )  # fmt: skip
        with torch.no_grad():
            keep = self.method.prune(view)
        return hidden if keep is None else self._kept(hidden, keep, view.last)

    def _kept(self, hidden: Tensor, keep: DecoderKeep, last: Tensor) -> Tensor:
        if keep.x is not None:
            changed = self.visual & keep.keep
            hidden = torch.where(changed[..., None], keep.x.to(hidden.dtype), hidden)
        real = self.column >= 0
        stays = real & (~self.visual | keep.keep | last)
        if bool((stays == real).all()):
            return hidden
        at = ragged.right_packed(stays)
        there, place = at >= 0, at.clamp(min=0)
        self.column = torch.where(there, self.column.gather(1, place), -1)
        self.visual = self.visual.gather(1, place) & there
        self._text = self._text.gather(1, place) & there
        self._narrow, self._rope = True, None
        return hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2])) * there[..., None]

    def _attention(self, real: Tensor) -> PromptAttention:
        q, k, scale, softcap, past, lengths = self.seen
        return prompt_attention(
            q, k, scale=scale, softcap=softcap, real=real, past=past, past_lengths=lengths
        )

    def _probe(self, layer: Any, hidden: Tensor, kwargs: dict[str, Any], real: Tensor) -> PromptAttention:
        """Queries and keys that ``layer`` makes of ``hidden``; its attention itself is left out."""
        given = {**kwargs, "past_key_values": None, "attention_mask": None, "use_cache": False}
        self.probing = True
        try:
            layer.self_attn(hidden_states=layer.input_layernorm(hidden), **given)
        finally:
            self.probing = False
        return self._attention(real)

    def _past(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Keys that the cache of a layer holds, as the layer made them, and their numbers ``[B, Hkv]``."""
        paged = next(paged for paged in self.cache.paged if paged.number == number)
        store = paged.layer.store
        if store is None or store.size == 0:
            return None, None
        keys = store.gather()[0]
        rotated = self.cache.state.plan.method.rotation != "none"
        return ops.hadamard(keys) if rotated else keys, store.lengths.clone()

    def _narrowed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer for the rows there are."""
        if not self._narrow:
            return kwargs
        if self._rope is None:
            place = self.column.clamp(min=0)
            cos, sin = kwargs["position_embeddings"]
            self._rope = _rows_of(cos, place), _rows_of(sin, place)
        return {**kwargs, "position_embeddings": self._rope, "position_ids": None}


def _rows_of(x: Tensor, place: Tensor) -> Tensor:
    """Rows ``place`` ``[B, W]`` of ``x`` ``[..., B or 1, W0, D]``."""
    lead = x.shape[:-3]
    x = x.expand(*lead, place.shape[0], *x.shape[-2:])
    return x.gather(-2, place[..., None].expand(*lead, *place.shape, x.shape[-1]))
