"""Which slots or pages of an engine's paged KV cache stay: functions of tensors on the engine's own layout.

Scores come from any method on the KV cache (``kv_scores``) or from the engine; ``kept_slots`` and
``kept_pages`` choose; ``compact_`` moves what stays to the front, where an engine does not just drop pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp import methods, ops
from tokencomp._typed import typed
from tokencomp.integrations.paged import PagedKV
from tokencomp.methods.eviction import Evicting
from tokencomp.methods.kv import KVView
from tokencomp.recipes.common import existing, require, require_dims

Reduce = Literal["mean", "max", "sum"]
Across = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class KeptSlots:
    """Slots that stay, ascending, then -1; H is Hkv with ``per_head``, else there is no H."""

    index: Tensor  # [B, (H,) K] int32
    count: Tensor  # [B, (H)] int32


@dataclass(frozen=True)
class KeptPages:
    """Pages that stay, in order; H as in ``KeptSlots``."""

    index: Tensor  # [B, (H,) K] int32 places in the old table, ascending, then -1
    count: Tensor  # [B, (H)] int32
    block_table: Tensor  # [B, (H,) K] int32, the new one
    seq_lens: Tensor  # [B, (H)] int32, slots in it
    freed: Tensor  # [B, (H,) places] int32, page numbers that go, -1 elsewhere


@typed
def last_queries(q: Tensor, query_start_loc: Tensor, window: int) -> Tensor:
    """The last queries of each sequence from an engine's packed ones.

    Args:
        q: ``[tokens, Hq, D]``, sequences one after the other.
        query_start_loc: ``[B + 1]`` int32, where each begins.
        window: w >= 1.

    Returns:
        ``[B, Hq, w, D]``, the newest last; zeros before the first query of a sequence with fewer.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "last_queries"
    require_dims(op, "q", q, "[tokens, Hq, D]")
    require(query_start_loc.dim() == 1 and query_start_loc.shape[0] >= 1, op, "query_start_loc", "[B + 1]",
            list(query_start_loc.shape))  # fmt: skip
    require(window >= 1, op, "window", ">= 1", window)
    token = query_start_loc[1:, None] - window + torch.arange(window, device=q.device)
    there = token >= query_start_loc[:-1, None]
    if q.shape[0] == 0:
        return q.new_zeros(*token.shape, *q.shape[1:]).transpose(1, 2)
    found = q[token.clamp(min=0).long()].masked_fill(~there[..., None, None], 0)
    return found.transpose(1, 2)


@typed
def kv_scores(
    pages: PagedKV,
    method: str | Evicting = "keydiff",
    *,
    q: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    layer: int = 0,
    layers: int = 1,
) -> Tensor:
    """What every slot of a layer is worth to ``method``: keys in pages (and queries) in, scores out.

    Keys (and values) are gathered for the call; nothing of the engine is written to. Methods that look at
    keys alone (``knorm``, ``keydiff``, ``lagkv``) need no queries.

    Args:
        pages: one layer's, with the tokens of ``q`` stored already.
        method: name or object of a method on the KV cache that scores slots (``python -m tokencomp
            methods``).
        q: ``[B, Hq, T, D]``, the last T queries of each sequence as attention used them (see
            ``last_queries``); of a sequence shorter than T only the last ones count. ``SnapKV`` and ``RKV``
            want their ``window``, ``H2O`` and ``A2SF`` all of the prompt.
        scale: of the logits; default ``D ** -0.5``.
        softcap: of the logits.
        layer, layers: which of how many, for methods that treat them differently.

    Returns:
        ``[B, H, longest]`` float32, H being 1 where the method has one set a layer, else Hkv; -inf behind a
        sequence's last slot, and where a method protects slots otherwise (its window: ``recent``).

    Raises:
        ValueError: a method that scores nothing or looks at queries that were not given, or another value
            that is not as above; RuntimeError as in the operators.
    """
    op, chosen = "kv_scores", _method(method)
    _check_queries(op, chosen, pages, q)
    k, v = pages.gather()
    batch, heads, size, dim = k.shape
    queries = k.new_zeros(batch, heads, 0, dim) if q is None else q
    counts = torch.tensor([min(n, queries.shape[2]) for n in pages.host_lens], dtype=torch.int32)
    starts = (queries.shape[2] - counts).to(k.device)
    view = KVView(
        layer=layer, layers=layers, lengths=pages.lengths(), size=size,
        position=torch.arange(size, dtype=torch.int32, device=k.device).expand(batch, heads, -1).contiguous(),
        seen=pages.host_lens, step=0, q=queries, scale=dim**-0.5 if scale is None else scale,
        keys=lambda: k, values=lambda: v, softcap=softcap, starts=starts, counts=counts.to(k.device),
        state={
            name: torch.full((batch, heads, size), side.fill, dtype=side.dtype, device=k.device)
            for name, side in chosen.sides.items()
        },
        page=pages.page_size, slot_bytes=(dim + v.shape[3]) * k.element_size(),
    )  # fmt: skip
    if size == 0:
        return k.new_zeros(batch, heads, 0, dtype=torch.float32)
    if q is not None:
        chosen.record_prompt(view)
    score = chosen.score(view)[:, :, :size].float()
    return torch.where(existing(score, pages.seq_lens), score, -torch.inf)


@typed
def kept_slots(
    scores: Tensor | Sequence[Tensor],
    seq_lens: Tensor,
    budget: int,
    *,
    budgets: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    per_head: bool = False,
    across: Across | None = None,
) -> KeptSlots:
    """The slots of largest score, ascending: one set for all heads and layers, or one a head.

    Engines whose layers and heads share a block table need one set: the mean over heads, summed over the
    layers given. Ties go to the lower slot, NaN counts as -inf; ``topk_select`` chooses.

    Args:
        scores: ``[B, H, S]`` float of a layer, or of several layers.
        seq_lens: ``[B]`` int32, slots in use, at most S.
        budget: slots to keep, >= sinks + recent; a sequence with fewer is kept whole.
        budgets: ``[B]`` integers in [0, budget], for each sequence instead; protected slots are inside.
        sinks, recent: first and last slots that always stay.
        per_head: a set for each of the H heads of one layer.
        across: mean over tensor-parallel processes, of the reduced scores ``[B, 1, S]``: without it ranks
            choose different slots.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "kept_slots"
    score = _reduced(op, scores, seq_lens, per_head, across)
    require(min(sinks, recent) >= 0, op, "sinks and recent", ">= 0", (sinks, recent))
    least = max(1, sinks + recent)
    require(budget >= least, op, "budget", f">= {least} (sinks + recent, and 1)", budget)
    rows = None
    if budgets is not None:
        require(
            budgets.shape == seq_lens.shape, op, "budgets", f"[B={seq_lens.shape[0]}]", list(budgets.shape)
        )
        rows = budgets.repeat_interleave(score.shape[1])
    lens = seq_lens.repeat_interleave(score.shape[1])
    index, count = ops.topk_select(
        score.flatten(0, 1), budget, k_per_row=rows, head=sinks, tail=recent, lengths=lens
    )
    shape = score.shape[:2] if per_head else score.shape[:1]
    return KeptSlots(index.view(*shape, budget), count.view(shape))


@typed
def kept_pages(
    scores: Tensor | Sequence[Tensor],
    block_table: Tensor,
    seq_lens: Tensor,
    budget: int,
    *,
    page_size: int,
    first: int = 1,
    recent: int = 1,
    reduce: Reduce = "mean",
    per_head: bool = False,
    across: Across | None = None,
) -> KeptPages:
    """Whole pages by the scores of their slots: entries of the table go, no key is moved.

    The new table is what attention reads from now on (eviction), or in this step only (selection, as Quest).
    The last page, which fills up, always stays, so the new length has no gaps. With pages of one slot this is
    ``kept_slots``.

    Args:
        scores, per_head, across: as in ``kept_slots``. A page of which a slot is -inf or NaN has mean and sum
            -inf.
        block_table: ``[B, places]`` int32.
        seq_lens: ``[B]`` int32, slots in use.
        budget: pages to keep, >= first + recent; a sequence with fewer is kept whole.
        page_size: slots of a page.
        first, recent: first and last pages that always stay; recent >= 1.
        reduce: of the slots in use of a page.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "kept_pages"
    score = _reduced(op, scores, seq_lens, per_head, across)
    require(page_size >= 1, op, "page_size", ">= 1", page_size)
    require(first >= 0 and recent >= 1, op, "first and recent", ">= 0 and >= 1", (first, recent))
    require(budget >= first + recent, op, "budget", f">= first + recent = {first + recent} pages", budget)
    fits = block_table.dim() == 2 and block_table.shape[0] == seq_lens.shape[0]
    expected, got = f"int32 [B={seq_lens.shape[0]}, places]", f"{block_table.dtype} {list(block_table.shape)}"
    require(fits and block_table.dtype == torch.int32, op, "block_table", expected, got)
    batch, heads, places = *score.shape[:2], block_table.shape[1]
    worth = _of_pages(score, seq_lens, places, page_size, reduce)
    held = (seq_lens + page_size - 1).div(page_size, rounding_mode="floor").to(torch.int32)
    index, count = ops.topk_select(
        worth.flatten(0, 1), budget, head=first, tail=recent, lengths=held.repeat_interleave(heads)
    )
    index, count = index.view(batch, heads, budget), count.view(batch, heads)
    table = block_table[:, None].expand(-1, heads, -1)
    new = torch.where(index < 0, -1, table.gather(2, index.clamp(min=0).long())) if places else index
    place = torch.arange(places, device=index.device)
    stays = torch.zeros(batch, heads, places + 1, dtype=torch.bool, device=index.device)
    stays.scatter_(2, torch.where(index < 0, places, index).long(), True)
    freed = torch.where(~stays[..., :places] & (place < held[:, None, None]), table, -1)
    lens = (seq_lens[:, None] - (held[:, None] - count) * page_size).to(torch.int32)
    out = (index, count, new, lens, freed)
    return KeptPages(*out) if per_head else KeptPages(*(t[:, 0].contiguous() for t in out))


@typed
def compact_(pages: PagedKV, kept: KeptSlots) -> Tensor:
    """Move the kept slots of every sequence to its first ones, in order, in place in the engine's buffers.

    Keys keep the positions they were rotated to. What the engine does after: it writes new tokens behind the
    returned lengths, computes positions from tokens seen (not from these lengths), frees the pages behind
    them, and never does this to pages that another request shares (prefix caching): copy those first.

    Args:
        pages: of one layer; pages of 16, 32 or 64 slots. (With pages of one slot drop the entries of the
            table: ``kept_pages``.)
        kept: ``[B, K]`` for all heads, or ``[B, Hkv, K]``; every head of a sequence keeps as many.

    Returns:
        ``[B]`` int32, the new lengths.

    Raises:
        ValueError: shapes that do not fit; RuntimeError as in ``kv_compact_``, for shared pages too.
    """
    op, (batch, heads) = "compact_", (pages.seq_lens.shape[0], pages.k.shape[1])
    index, count = kept.index, kept.count
    shared = index.dim() == 2
    index = index[:, None].expand(-1, heads, -1) if shared else index
    count = count[:, None].expand(-1, heads) if shared else count
    fits = index.dim() == 3 and index.shape[:2] == (batch, heads) == count.shape
    require(fits, op, "kept.index", f"[B={batch}, K] or [B={batch}, Hkv={heads}, K]", list(kept.index.shape))
    ops.kv_compact_(pages.k, pages.v, pages.table(), pages.lengths(), index.contiguous(), count.contiguous())
    return count[:, 0].contiguous()


def _method(method: str | Evicting) -> Evicting:
    entries = {entry.name: entry.cls for entry in methods.all_methods() if issubclass(entry.cls, Evicting)}
    wraps = {name for name, cls in entries.items() if "method" in getattr(cls, "__dataclass_fields__", {})}
    if not isinstance(method, str):
        require(
            isinstance(method, Evicting), "kv_scores", "method", "a method that scores slots", repr(method)
        )
        return method
    known = sorted(set(entries) - wraps)
    require(method in known, "kv_scores", "method", f"one of {known} or an object", repr(method))
    made: Evicting = entries[method]()
    return made


def _check_queries(op: str, method: Evicting, pages: PagedKV, q: Tensor | None) -> None:
    name, heads = type(method).__name__, pages.k.shape[1]
    if q is None:
        require(method.queries == 0, op, "q", f"[B, Hq, T, D] for {name}, which looks at queries", None)
        return
    shape: Any = (pages.seq_lens.shape[0], q.shape[2] if q.dim() == 4 else 0, pages.k.shape[3])
    fits = q.dim() == 4 and (q.shape[0], q.shape[2], q.shape[3]) == shape and q.shape[1] % heads == 0
    expected = f"[B={shape[0]}, a multiple of Hkv={heads}, T, D={shape[2]}]"
    require(fits, op, "q", expected, list(q.shape))


def _reduced(
    op: str, scores: Tensor | Sequence[Tensor], seq_lens: Tensor, per_head: bool, across: Across | None
) -> Tensor:
    """``[B, H, S]`` with ``per_head``, else ``[B, 1, S]``, float32."""
    layers = [scores] if isinstance(scores, Tensor) else list(scores)
    require(len(layers) >= 1, op, "scores", "of one layer or more", "none")
    require(
        not per_head or len(layers) == 1, op, "scores", "of one layer with per_head", f"{len(layers)} layers"
    )
    require(not (per_head and across), op, "across", "None with per_head", "a function")
    for i, score in enumerate(layers):
        name = "scores" if isinstance(scores, Tensor) else f"scores[{i}]"
        require_dims(op, name, score, "[B, H, S]")
        same = score.shape[0] == seq_lens.shape[0] and score.shape[2] == layers[0].shape[2]
        expected = f"[B={seq_lens.shape[0]}, H, S={layers[0].shape[2]}]"
        require(same, op, name, expected, list(score.shape))
    if per_head:
        return layers[0].float()
    total = sum(
        (score.float().mean(1, keepdim=True) for score in layers[1:]), layers[0].float().mean(1, keepdim=True)
    )
    return total if across is None else across(total)


def _of_pages(score: Tensor, seq_lens: Tensor, places: int, page: int, reduce: Reduce) -> Tensor:
    """``[B, H, places]`` float32."""
    require(reduce in ("mean", "max", "sum"), "kept_pages", "reduce", "'mean', 'max' or 'sum'", repr(reduce))
    room = places * page - score.shape[2]
    score = score[..., : places * page] if room < 0 else torch.nn.functional.pad(score, (0, room))
    there = existing(score, seq_lens)
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    fill = -torch.inf if reduce == "max" else 0.0
    cells = torch.where(there, score, fill).unflatten(2, (places, page))
    worth: Tensor = cells.amax(-1) if reduce == "max" else cells.sum(-1)
    if reduce == "mean":
        worth = worth / there.unflatten(2, (places, page)).sum(-1).clamp(min=1)
    return worth
