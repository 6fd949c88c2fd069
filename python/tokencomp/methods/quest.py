"""Quest: pages whose keys could score highest (arXiv 2406.10774)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods import sparse_select as select
from tokencomp.methods.sparse import SlotLists, Sparse, SparseView
from tokencomp.recipes.common import require

SLACK = 64  # chunks of room by which the metadata grow


@base.register("quest", paper="2406.10774", stage="attention")
@dataclass(frozen=True)
class Quest(Sparse):
    """Reads the pages of largest upper bound of a logit, from the range of their keys in each channel.

    Of every page of ``chunk`` tokens the largest ``M_c`` and smallest ``m_c`` value of each channel c of the
    keys are kept; ``sum_c max(q_c M_c, q_c m_c) >= <q, k>`` for each of its keys. The ``k // chunk`` pages of
    largest bound are read, the newest and the first ``sinks`` ones among them.

    The metadata are 2 / chunk of the keys, and are updated from the newest page alone. Published: one set of
    pages a query head (``share="q"``), ``chunk=16``, the first two layers dense; here the bounds of the heads
    of a kv head are maximized, so that its keys are read once. The newest page is scored too, and taken
    whatever it scores.
    """

    k: int = field(default=2048, metadata={"help": "slots read, rounded down to pages, at least 3 pages"})
    chunk: int = field(default=16, metadata={"help": "tokens of a page; need not be those of the cache"})
    dense: int = field(default=2, metadata={"help": select.DENSE_HELP})
    sinks: int = field(default=0, metadata={"help": "first pages that are always read"})
    share: select.Share = field(default="kv", metadata={"help": select.SHARE_HELP})

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "Quest", "chunk", ">= 1", self.chunk)
        require(self.k >= self.chunk, "Quest", "k", f">= chunk={self.chunk}", self.k)
        require(self.dense >= 0, "Quest", "dense", ">= 0", self.dense)
        pages = self.pages
        require(0 <= self.sinks < pages, "Quest", "sinks", f"in [0, pages={pages})", self.sinks)
        require(self.share in ("kv", "q"), "Quest", "share", "'kv' or 'q'", repr(self.share))

    @property
    def pages(self) -> int:
        """That are read."""
        return max(3, self.k // self.chunk)

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        if view.layer < self.dense:
            return None
        high, low = self._ranges(view)
        newest = 1 + -(-(view.rows - 1) // self.chunk)
        if max(self.pages, newest) * self.chunk >= view.size:
            return None
        lengths = torch.div(view.lengths + self.chunk - 1, self.chunk, rounding_mode="floor").int()
        bound, _ = ops.qk_scores(select.flat_queries(view), high, k_min=low, scale=1.0, lengths=lengths)
        lists = view.lengths.shape[1] if self.share == "kv" else view.q.shape[1]
        score = select.votes(view, bound, None, "max", lists)
        each = lengths.repeat_interleave(lists // lengths.shape[1], 1)
        chosen = select.best_slots(score, each, max(self.pages, newest), head=self.sinks, tail=newest)
        return select.slots_of_chunks(
            chosen.index, chosen.count, self.chunk, select.list_lengths(view, lists)
        )

    def _ranges(self, view: SparseView) -> tuple[Tensor, Tensor]:
        """``[B, Hkv, pages, D]`` twice: largest and smallest; pages that no slot has begun mean nothing."""
        need = -(-view.size // self.chunk)
        high, low = view.scratch.get("high"), view.scratch.get("low")
        if high is None or low is None or 2 * view.fresh > view.size:
            high, low = self._of_all(view, need)
        else:
            if high.shape[2] < need:
                room = high.new_zeros(*high.shape[:2], need - high.shape[2] + SLACK, high.shape[3])
                high, low = torch.cat([high, room], 2), torch.cat([low, room], 2)
            self._renew_(view, high, low)
        view.scratch["high"], view.scratch["low"] = high, low
        return high[:, :, :need], low[:, :, :need]

    def _of_all(self, view: SparseView, need: int) -> tuple[Tensor, Tensor]:
        keys = view.keys()[:, :, : view.size]
        keys = torch.nn.functional.pad(keys, (0, 0, 0, (need + SLACK) * self.chunk - keys.shape[2]))
        slot = torch.arange(keys.shape[2], device=keys.device)
        return _range(keys, slot < view.lengths[..., None], self.chunk)

    def _renew_(self, view: SparseView, high: Tensor, low: Tensor) -> None:
        """The pages of the ``fresh`` newest slots, of which there are as many in every row."""
        count = 1 + -(-view.fresh // self.chunk)
        newest = torch.div(view.lengths - 1, self.chunk, rounding_mode="floor")
        page = (newest[..., None] - torch.arange(count, device=newest.device)).clamp(min=0)
        slot = (page[..., None] * self.chunk + torch.arange(self.chunk, device=page.device)).flatten(2)
        there = slot < view.lengths[..., None]
        assert view.keys_at is not None
        keys = view.keys_at(torch.where(there, slot, 0).int())
        for target, source in zip((high, low), _range(keys, there, self.chunk), strict=True):
            target[select.at_rows(page)] = source


def _range(keys: Tensor, there: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest of each channel in chunks of ``keys`` ``[B, H, n * chunk, D]``; 0 of none."""
    keys = keys.unflatten(2, (-1, chunk))
    there = there.unflatten(2, (-1, chunk))[..., None]
    some = there.any(3)
    high = torch.where(there, keys, -torch.inf).amax(3).masked_fill(~some, 0)
    low = torch.where(there, keys, torch.inf).amin(3).masked_fill(~some, 0)
    return high, low
