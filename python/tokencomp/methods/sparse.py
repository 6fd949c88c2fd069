"""What a sparse-attention method sees of a layer that is about to attend, and what it answers.

The cache keeps every token; a method names the slots that the attention of a decode step reads, or the key
blocks that a prompt's does. Methods know tensors and ``tokencomp.ops`` only. They compose with one method on
the KV cache (``methods.kv``): what that evicted is not there to be chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from tokencomp.block_lists import BlockLists


@dataclass
class SparseView:
    """One layer of a cache before it attends; the tokens of this forward are stored already. One device.

    In a prompt the T rows are the last T of ``size`` slots, whatever a row holds: rows that hold less begin
    at slot ``first``, and with padding end at ``lengths``.
    """

    layer: int  # among the layers this cache compresses
    layers: int  # their number
    q: Tensor  # [B, Hq, T, D], rotated
    scale: float  # logits are ``scale * <q, k>``
    softcap: float | None
    lengths: Tensor  # [B, Hkv] int32, slots in use, the tokens of this forward included
    size: int  # the largest of lengths
    step: int  # decode forwards so far, this one included; 0 in a prompt
    page: int  # slots of a page
    keys: Callable[[], Tensor]  # [B, Hkv, >= size, D] by slot; may gather: ask once
    values: Callable[[], Tensor]  # [B, Hkv, >= size, Dv]
    scores: Callable[..., tuple[Tensor, Tensor]]  # ops.qk_scores(q, pages of this layer, ...): without a copy
    position: Callable[[], Tensor]  # [B, Hkv, C] int32, original position of each slot
    starts: Tensor | None = None  # [B] int32: rows [starts, starts + counts) of q are tokens, others padding;
    counts: Tensor | None = None  # [B] int32: both or neither, None: all T are
    scratch: dict[str, Any] = field(default_factory=dict)  # of this layer and cache
    shared: dict[str, Any] = field(default_factory=dict)  # of this cache: what one layer leaves for the next
    inv_freq: Tensor | None = None  # [D_rot / 2] of the rotary embedding, where the model has one
    first: Tensor | None = None  # [B, Hkv] int32, prompts: slots before it are none; None: 0
    fresh: int = 0  # slots but the newest ``fresh`` of each row are as this layer's method last saw them
    whole: bool = True  # nothing was evicted: slot i of each row is token i of its sequence
    keys_at: Callable[[Tensor], Tensor] | None = None  # decode: [B, Hkv, n] slots -> [B, Hkv, n, D]

    @property
    def rows(self) -> int:
        """T."""
        return self.q.shape[2]


@dataclass(frozen=True)
class SlotLists:
    """What a decode step reads: the arguments ``index`` and ``index_count`` of ``ops.paged_decode``.

    With Hq lists a sequence every query head reads its own, and keys are read once for each.
    """

    index: (
        Tensor  # [B, Hkv or Hq, K] int32 distinct slots, ascending, -1 a hole; the newest tokens' among them
    )
    count: Tensor  # [B, Hkv or Hq] int32, entries of index that are looked at
    reused: bool = False  # chosen in an earlier step, or by an earlier layer


@dataclass(frozen=True)
class Subset:
    """A prompt of which some tokens alone attend, to each other and all that was held before; the others'
    output is 0.
    """

    tokens: Tensor  # [B, K] int32 rows of q, ascending, then -1
    count: Tensor  # [B] int32


PromptChoice: TypeAlias = BlockLists | Subset | None


@runtime_checkable
class SparseMethod(Protocol):
    """Names what attention reads. Immutable; what it remembers is in ``scratch`` and ``shared``: tensors
    there have the sequences as first dimension and are reordered with them; other values belong to the cache.
    """

    @property
    def sparse(self) -> bool:
        """True."""

    def choose(self, view: SparseView) -> SlotLists | None:
        """What a decode step of T rows (mostly 1) reads; None: everything."""

    def wants_logits(self, view: SparseView) -> bool:
        """Whether ``observe`` is to be called after this decode step, which ``choose`` left dense."""

    def observe(self, view: SparseView, logits: Tensor, lse: Tensor) -> None:
        """Takes in the logits ``[B, Hq, T, >= size]`` by slot and their log-sum-exps."""

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """What a prompt, or a chunk of one behind ``size - T`` slots, attends to; None: everything."""


class Sparse:
    """The plainest of everything: a method that restricts nothing."""

    @property
    def sparse(self) -> bool:
        """See ``SparseMethod``."""
        return True

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        return None

    def wants_logits(self, view: SparseView) -> bool:
        """See ``SparseMethod``."""
        return False

    def observe(self, view: SparseView, logits: Tensor, lse: Tensor) -> None:
        """See ``SparseMethod``."""

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """See ``SparseMethod``."""
        return None


def newest(lengths: Tensor) -> Tensor:
    """``[B, Hkv, 1]`` int32: the slot of the newest token."""
    return (lengths - 1).clamp(min=0).to(torch.int32)[..., None]
