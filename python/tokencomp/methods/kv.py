"""What a method on the KV cache sees of a layer, what it answers, and how its budget is counted.

A cache shows each layer after each forward as a ``KVView``; the method answers with a ``Keep`` or with None.
Methods know tensors and ``tokencomp.ops`` only; caches know methods only through ``KVMethod``.

Tokens live in slots. Row (b, h), sequence b and kv head h, has ``lengths[b, h]`` of them, in ascending order
of original position; padding is never stored. Heads of a sequence may hold different tokens, and different
numbers of them. Where pages are quantized the order is: one page of the first tokens that are not, if these
are older than all that are and more than a page; the quantized pages as they came; the other tokens that are
not. So first slots are first tokens, last slots the newest (but for those in that one page), and ``position``
tells the rest.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from tokencomp.ops.kvquant import Axis
from tokencomp.ops.kvquant_pages import Tier

Budget: TypeAlias = int | float | str
BUDGET_HELP = "slots kept per kv head: a count, a share of the tokens seen in (0, 1], or bytes like '2GiB'"

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class KVView:
    """One layer of a cache after a forward has stored its tokens; tensors are on one device.

    ``C >= size`` is the width of the side arrays. What lies at and beyond a row's length means nothing, in
    ``keys()`` and ``values()`` it is finite. A method writes to ``state`` and ``scratch`` only.
    """

    layer: int  # among the layers this cache compresses
    layers: int  # their number
    lengths: Tensor  # [B, Hkv] int32, slots in use, the tokens of this forward included
    size: int  # the largest of lengths, known without asking the device
    position: Tensor  # [B, Hkv, C] int32, original position of each slot
    seen: Sequence[int]  # B numbers: tokens of each sequence so far, without padding
    step: int  # decode forwards so far, from 1 on; 0 before the first; a later prompt does not reset it
    q: Tensor  # [B, Hq, T, D], all queries of this forward, rotated; [B, Hq, 0, D] where there are none
    scale: float  # logits are ``scale * <q, k>``
    keys: Callable[[], Tensor]  # [B, Hkv, >= size, D], by slot; may gather: ask once
    values: Callable[[], Tensor]  # [B, Hkv, >= size, Dv]
    lse: Tensor | None = None  # [B, Hq, T] float32 of this forward's rows; None: the method computes it
    logits: Tensor | None = None  # [B, Hq, T, >= size] float32 by slot, -inf where masked; decode steps only
    softcap: float | None = None  # of the logits
    starts: Tensor | None = None  # [B] int32: rows [starts, starts + counts) of q are tokens, others padding;
    counts: Tensor | None = None  # [B] int32: both or neither, None: all T are
    state: dict[str, Tensor] = field(default_factory=dict)  # [B, Hkv, C] by slot, as ``KVMethod.sides`` says
    scratch: dict[str, Any] = field(default_factory=dict)  # of this layer and cache; see ``KVMethod``
    more: bool = False  # this was a chunk of a prompt that goes on: record, keep everything
    page: int = 1  # slots of a page
    slot_bytes: int = 0  # key and value of one slot of one kv head
    across: Callable[[Tensor], Tensor] | None = None  # mean over the processes that share the layer's heads
    kind: Callable[[], Tensor] | None = (
        None  # [B, Hkv, C] int32: in which page type a slot is; None: all in 0
    )

    @property
    def rows(self) -> int:
        """Kv heads of all sequences, ``B * Hkv``."""
        return self.lengths.numel()

    def over_heads(self, x: Tensor) -> Tensor:
        """``[B, 1, ...]``: the mean of ``x`` ``[B, H, ...]`` over all heads of the layer.

        Where processes share the heads (tensor parallelism), also over theirs, and the same in each: what
        chooses one set a layer must go through here.
        """
        mean = x.mean(1, keepdim=True)
        return mean if self.across is None else self.across(mean)


@dataclass(frozen=True)
class MergeSpec:
    """How evicted slots go into kept ones, before compaction.

    Kept slot c of rank r becomes ``V_c = (a_r V_c + sum_i w_i V_i) / (a_r + sum_i w_i)`` over the members i
    with ``target_i = r`` (``values="mean"``) or ``V_c + sum_i w_i V_i`` (``"sum"``); a slot may be a member
    several times. Keys stay (``keys="keep"``), become the same mean, or the mean of directions times the mean
    of norms (``"direction"``).
    """

    member: Tensor  # [B, Hkv, M] int32 evicted slots, -1: none
    target: Tensor  # [B, Hkv, M] int32 ranks in ``Keep.index``, -1: dropped, it goes into nothing
    weight: Tensor  # [B, Hkv, M] float32, w >= 0
    center: Tensor  # [B, Hkv, K] float32, a >= 0
    values: Literal["mean", "sum"] = "mean"
    keys: Literal["keep", "mean", "direction"] = "keep"


@dataclass(frozen=True)
class PageSpec:
    """How quantized pages of one type are stored, whatever the device and the head dimension.

    A group of -1 is all channels of a token, or all tokens of a page; others are cut to what there is.
    """

    k: Tier
    v: Tier
    k_axis: Axis = "channel"
    v_axis: Axis = "token"
    k_group: int = -1
    v_group: int = -1


class ChannelMaps(NamedTuple):
    """Per-channel maps ``[B, Hkv, D]`` float32 with which quantized pages of a row are written; see
    ``ops.kv_page_write_``. Constant from the first quantized page of a row on.
    """

    k_scale: Tensor | None = None
    k_bias: Tensor | None = None
    v_scale: Tensor | None = None
    v_bias: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """The slots that stay; all others of the row go.

    ``kind`` says in which page type each should be: 0 the working dtype, i as ``KVMethod.formats[i - 1]``.
    Quantized pages are whole: of what a row newly moves into a type, the store takes the largest multiple of
    a page, oldest tokens first, and the rest stays as it is until the next time. A quantized slot stays as
    it is whatever ``kind`` says (nothing is quantized twice), and goes only when all slots of its page go;
    ``count`` is an upper bound then. A token with a channel that no grid can hold (NaN, infinite, or beyond
    fp16 after the maps) stays in the working dtype. Slots cannot be merged once a page is quantized.
    """

    index: Tensor  # [B, Hkv, K] int32 slots, ascending, then -1
    count: Tensor  # [B, Hkv] int32, how many
    merge: MergeSpec | None = None
    ragged: bool = False  # False: count is min(K, lengths) everywhere, which the host knows
    whole_pages: bool = False  # what goes are whole pages, full ones: their table entries may just be dropped
    kind: Tensor | None = None  # [B, Hkv, K] int32 by rank in ``index``; None: all 0
    maps: ChannelMaps | None = None  # with the first slots that are quantized; later ones are not looked at


class Side(NamedTuple):
    """A number per slot that a method keeps beside the cache."""

    dtype: torch.dtype
    fill: float  # of slots without a token; a new token's slot has it when the method first sees it


@runtime_checkable
class KVMethod(Protocol):
    """Decides which slots of a KV cache stay.

    After each layer's forward the cache calls ``after_prefill`` where the forward was a prompt or a chunk of
    one (any forward of several tokens that ``after_step`` does not get), and ``after_step`` where it was a
    decode step of one token (or a few, in order); then it does what is answered. A method is immutable; what
    it remembers of a layer is in ``view.state``, which the cache extends by ``fill``, compacts with the slots
    and reorders with the sequences, and in ``view.scratch``: there tensors have the sequences as first
    dimension and are reordered with them, other values belong to the layer.

    A prompt in chunks: either every chunk is a prompt of its own (``more=False``), and the cache shrinks
    after each; or all but the last come with ``more=True``. Where the last is not known as such, the first
    decode step tells: then ``evict`` on a view with no queries shrinks the cache first.
    """

    @property
    def needs_logits(self) -> bool:
        """Whether decode steps should bring ``logits`` and ``lse`` (else they are computed again)."""

    @property
    def needs_lse(self) -> bool:
        """Whether prompts should bring ``lse``."""

    @property
    def queries(self) -> int:
        """Queries looked at: 0 none (``q`` may be empty), w the last w tokens of a sequence, -1 all."""

    @property
    def rerotates(self) -> bool:
        """Whether kept keys are rotated to positions 0, 1, ... of their slots; new tokens count on from
        there.
        """

    @property
    def formats(self) -> Sequence[PageSpec]:
        """Types of quantized pages, at most 7; none where the method quantizes nothing."""

    @property
    def rotation(self) -> Literal["none", "keys", "both"]:
        """Whether keys, or keys and values, are stored times a Hadamard matrix (``ops.hadamard``), which
        spreads outliers over the channels. Views then show rotated queries, keys and values.
        """

    @property
    def sides(self) -> Mapping[str, Side]:
        """The arrays of ``view.state``."""

    def resolve(
        self, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
    ) -> tuple[int, ...]:
        """Slots per kv head that each layer holds after a prompt of ``tokens``; a mean where heads differ.

        ``rows`` is ``B * Hkv``; bytes are shared by all rows and layers. Raises ValueError where the budget
        cannot hold what is protected.
        """

    def after_prefill(self, view: KVView) -> Keep | None:
        """Records a prompt or chunk, and unless ``view.more`` says what stays."""

    def after_step(self, view: KVView) -> Keep | None:
        """Records a decode step, and where it is time says what stays."""

    def evict(self, view: KVView) -> Keep | None:
        """What stays; nothing is recorded."""


def parse_bytes(text: str) -> int:
    """Bytes in ``text``: a number and B, KB, MB, GB (powers of 1000), KiB, MiB or GiB (of 1024).

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"budget: bytes must look like '2GiB', '1.5GB' or '300MB', got {text!r}")
    return math.floor(float(match[1]) * _UNITS[match[2]])


def check_budget(method: str, budget: Budget, least: int = 1) -> None:
    """Raise ValueError unless ``budget`` is a count >= ``least``, a share in (0, 1] or a number of bytes."""
    if isinstance(budget, str):
        parse_bytes(budget)
        return
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if isinstance(budget, int) and number:
        check_least(method, budget, budget, least)
    elif not (number and 0.0 < budget <= 1.0):
        raise ValueError(
            f"{method}: budget must be a count >= {least}, a share in (0, 1] or bytes such as '2GiB', got "
            f"{budget!r}"
        )


def check_least(method: str, budget: Budget, slots: int, least: int) -> None:
    """Raise ValueError unless ``slots``, what ``budget`` comes to, can hold the ``least`` protected ones."""
    if slots < least:
        meaning = "" if budget == slots and isinstance(budget, int) else f" (budget={budget!r})"
        raise ValueError(
            f"{method}: budget must be >= {least} slots, the protected ones (sinks + recent), got {slots}"
            f"{meaning}"
        )


def slots_of(
    budget: Budget, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
) -> int:
    """Slots per kv head that ``budget`` pays for, >= 1: a count as it is, a share of ``tokens`` rounded half
    to even, bytes in whole pages of all rows and layers (in single slots where not even one page fits).

    Raises ValueError for bytes where ``slot_bytes`` is not known.
    """
    if isinstance(budget, int):
        return budget
    if isinstance(budget, float):
        return max(1, round(budget * tokens))
    if slot_bytes < 1 or rows < 1 or layers < 1:
        raise ValueError(
            f"budget: bytes need layers, rows and slot_bytes >= 1, got {layers}, {rows} and {slot_bytes}"
        )
    slots = parse_bytes(budget) // (layers * rows * slot_bytes)
    return slots // page * page if slots >= page else slots
