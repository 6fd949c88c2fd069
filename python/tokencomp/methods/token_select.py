"""TokenSelect: one set of tokens for all heads of a layer, by their soft vote (arXiv 2411.02886)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp import ops
from tokencomp.block_lists import BlockLists, block_mask_to_csr, causal_blocks
from tokencomp.methods import base
from tokencomp.methods import sparse_select as select
from tokencomp.methods.sparse import PromptChoice, SlotLists, Sparse, SparseView
from tokencomp.recipes.common import pool_scores, require

BLOCK = 64  # rows and keys of a block of a prompt


@base.register("token_select", paper="2411.02886", stage="attention")
@dataclass(frozen=True)
class TokenSelect(Sparse):
    """Reads the first, the newest, and the ``k`` tokens between that the heads of a layer vote for.

    Every head votes with its softmax over the candidates, ``vote_j = sum_h softmax_j(vote_scale <q_h,
    k_j>)``, max-pooled over ``pool`` neighbours where asked for; ties go to the earlier token. A selection
    holds while the queries of a layer, all heads one behind the other, have a cosine of ``theta`` or more
    with those it was made for; sinks and newest tokens go on with the step. A prompt is read in chunks of
    ``chunk`` queries, each with one selection by their mean. Rows shorter than ``sinks + k + recent`` are
    read whole.

    ``vote_scale=1`` is the official code, whose kernel also pairs query head h with kv head ``h mod Hkv``
    (``kv_map="mod"``); attention pairs it with ``h // G``, and so does ``"div"``. There keys are cached
    before the rotary embedding, voted on at one distance from the query, ``recent`` tokens, and attended to
    at the positions they have in the list, which is what lets it read beyond the trained context. Our
    caches hold rotated keys: they are voted on and attended to where they stand in the text, so that votes
    follow the attention that a dense step pays, and no context is extended. Its selection cache is switched
    off in the code; this is the paper's. After an eviction heads may hold different tokens: then every kv
    head votes for itself. Of several sequences each keeps or renews its selection for itself; whether
    anything is renewed is asked of the device once a layer and step (``theta=None``: never reused, never
    asked).
    """

    k: int = field(default=2048, metadata={"help": "tokens voted for"})
    sinks: int = field(default=128, metadata={"help": select.SINKS_HELP})
    recent: int = field(default=512, metadata={"help": select.RECENT_HELP})
    theta: float | None = field(
        default=0.9, metadata={"help": "cosine at which a selection holds; None: never"}
    )
    vote_scale: float = field(default=1.0, metadata={"help": "factor of the products in the vote"})
    kv_map: Literal["div", "mod"] = field(default="div", metadata={"help": "kv head a query head votes with"})
    pool: int = field(default=1, metadata={"help": "width of the max-pool over votes; 1: none"})
    chunk: int = field(default=512, metadata={"help": "queries of a prompt per selection; 0: dense prompts"})

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("sinks", 0), ("recent", 1), ("pool", 1), ("chunk", 0)):
            require(getattr(self, name) >= least, "TokenSelect", name, f">= {least}", getattr(self, name))
        in_range = self.theta is None or -1 <= self.theta <= 1
        require(in_range, "TokenSelect", "theta", "in [-1, 1] or None", self.theta)
        require(self.vote_scale > 0, "TokenSelect", "vote_scale", "> 0", self.vote_scale)
        require(self.kv_map in ("div", "mod"), "TokenSelect", "kv_map", "'div' or 'mod'", repr(self.kv_map))
        require(self.chunk % BLOCK == 0, "TokenSelect", "chunk", f"a multiple of {BLOCK}", self.chunk)

    # ---- decode ------------------------------------------------------------------------------------------

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        recent = max(self.recent, view.rows)
        if self.sinks + self.k + recent >= view.size:
            view.scratch.clear()
            return None
        q = _mean_query(view.q, select.real_rows(view))
        chosen, reused = self._chosen(view, q, recent)
        heads = view.lengths.shape[1]
        middle = chosen.expand(-1, heads, -1)
        middle = torch.where(middle < (view.lengths - recent)[..., None], middle, -1)
        found = select.parts(
            select.sink_slots(view.lengths, self.sinks), middle,
            select.newest_slots(view.lengths, recent, self.sinks),
        )  # fmt: skip
        return SlotLists(found.index, found.count, reused)

    def _chosen(self, view: SparseView, q: Tensor, recent: int) -> tuple[Tensor, bool]:
        """``[B, 1 or Hkv, k]`` slots, -1 a hole, and whether all are of an earlier step."""
        before, slots = view.scratch.get("query"), view.scratch.get("slots")
        alike = None
        if self.theta is not None and before is not None and slots is not None and view.fresh <= view.rows:
            alike = _cosine(q, before) >= self.theta
            if bool(alike.all()):
                return slots, True
        end = (view.lengths - recent).clamp(min=0)
        chosen = self._best(view, q, end, 1 if view.whole else view.lengths.shape[1])
        if alike is not None and before is not None and slots is not None and slots.shape == chosen.shape:
            chosen = torch.where(alike[:, None, None], slots, chosen)
            q = torch.where(alike[:, None, None], before, q)
        view.scratch["query"], view.scratch["slots"] = q, chosen
        return chosen, False

    def _best(self, view: SparseView, q: Tensor, end: Tensor, lists: int) -> Tensor:
        """``[B, lists, k]`` int32, ascending: slots in ``[sinks, end)`` of most votes, -1 a hole."""
        if self.kv_map == "mod":
            heads = view.lengths.shape[1]
            q = q.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)
        starts = end.new_full(end.shape[:1], self.sinks) if self.sinks else None
        scores, lse = view.scores(q.contiguous(), scale=self.vote_scale, lengths=end, starts=starts)
        vote = ops.head_vote(scores, lse, groups=lists)
        if self.pool > 1:
            vote = pool_scores(vote, self.pool, kind="max").masked_fill(vote == -torch.inf, -torch.inf)
        found = select.best_slots(vote, end[:, :lists].contiguous(), self.k).index
        return torch.where(found >= self.sinks, found, -1)

    # ---- prompts -----------------------------------------------------------------------------------------

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """See ``SparseMethod``. Sinks and newest tokens are rounded outwards to blocks of 64."""
        if not self.chunk or self.sinks + self.k + max(self.recent, 1) >= view.size:
            return None
        before, device = view.size - view.rows, view.q.device
        blocks = (
            causal_blocks(view.rows, view.size, BLOCK, BLOCK, device).expand(len(view.q), 1, -1, -1).clone()
        )
        lists = -torch.ones(len(view.q), 1, blocks.shape[2], self.k, dtype=torch.int32, device=device)
        for first in range(0, view.rows, self.chunk):
            rows = min(self.chunk, view.rows - first)
            size = before + first + rows
            recent = max(self.recent, rows)
            if self.sinks + self.k + recent >= size:
                continue
            own = slice(first // BLOCK, -(-(first + rows) // BLOCK))
            blocks[:, :, own] &= self._near(view, size - recent)
            end = view.lengths.clamp(max=size) - recent
            real = _rows_of(view, first, rows)
            q = _mean_query(view.q[:, :, first : first + rows], real)
            chosen = self._best(view, q, end.clamp(min=0), 1)
            lists[:, :, own] = chosen[:, :, None]
        listed = blocks.gather(3, torch.div(lists, BLOCK, rounding_mode="floor").clamp(min=0).long())
        keep = (lists >= 0) & ~listed
        indptr, indices = block_mask_to_csr(blocks)
        column_ptr, columns = _columns(lists, keep)
        return BlockLists(indptr, indices, BLOCK, BLOCK, column_ptr, columns)

    def _near(self, view: SparseView, newest: int) -> Tensor:
        """``[B, 1, 1, N]`` bool: key blocks of sinks and of slots from ``newest`` on."""
        block = torch.arange(-(-view.size // BLOCK), device=view.q.device) * BLOCK
        begin = torch.zeros_like(view.lengths[:, :1]) if view.first is None else view.first[:, :1]
        first = (block + BLOCK > begin) & (block < begin + self.sinks)
        return (first | (block + BLOCK > newest))[:, None, None]


def _mean_query(q: Tensor, real: Tensor | None) -> Tensor:
    """``[B, Hq, D]``: the mean over the rows of ``q`` ``[B, Hq, T, D]`` that are tokens."""
    if real is None:
        return q[:, :, 0] if q.shape[2] == 1 else q.float().mean(2).to(q.dtype)
    weight = real.float()[:, None, :, None]
    return ((q.float() * weight).sum(2) / weight.sum(2).clamp(min=1)).to(q.dtype)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """``[B]``: of all heads one behind the other."""
    return functional.cosine_similarity(a.flatten(1).float(), b.flatten(1).float())


def _rows_of(view: SparseView, first: int, rows: int) -> Tensor | None:
    real = select.real_rows(view)
    return None if real is None else real[:, first : first + rows]


def _columns(values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """CSR lists of the ``values`` ``[B, H, M, V]`` that ``keep`` names."""
    pointer, _ = block_mask_to_csr(keep)
    flat = keep.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
    listed = values.new_zeros(flat.numel() + 1).scatter_(0, place, torch.where(flat, values.flatten(), 0))
    return pointer, listed[:-1]
