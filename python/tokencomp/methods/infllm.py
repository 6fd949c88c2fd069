"""InfLLM: blocks of the past by a few representative keys (arXiv 2402.04617)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods import sparse_select as select
from tokencomp.methods.sparse import SlotLists, Sparse, SparseView
from tokencomp.recipes.common import require

RECEIVED = "received"


@base.register("infllm", paper="2402.04617", stage="attention")
@dataclass(frozen=True)
class InfLLM(Sparse):
    """Reads the first and newest tokens, and the ``blocks`` blocks between of best representatives.

    A block of ``block`` tokens stands for itself with the ``representatives`` tokens that received the most
    attention from the queries after them: in a prompt from those of their own stretch of ``window`` tokens
    and of the next one, ``sum_t P[t, j]``; the tokens of a block that decode steps completed from the query
    that completed it. The score of a block is ``sum_h mean_r <q_h, k_r>`` over the heads of a kv head.

    Published: one set for all heads (the sum over all of them), ``block=128, blocks=16, recent=4096``,
    distant keys at one rotary angle, which extends the context; here keys stand where they stand. Blocks
    lie at multiples of ``block`` slots, those that sinks or newest tokens cover are not chosen. After an
    eviction, which moves slots, representatives are chosen anew by the next query.
    """

    blocks: int = field(default=16, metadata={"help": "blocks read beside sinks and newest tokens"})
    block: int = field(default=128, metadata={"help": "tokens of a block"})
    representatives: int = field(default=4, metadata={"help": "tokens that stand for a block"})
    sinks: int = field(default=128, metadata={"help": select.SINKS_HELP})
    recent: int = field(default=512, metadata={"help": select.RECENT_HELP})
    window: int = field(default=512, metadata={"help": "tokens of a stretch of a prompt"})

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("block", 1), ("sinks", 0), ("recent", 1), ("window", 1)):
            require(getattr(self, name) >= least, "InfLLM", name, f">= {least}", getattr(self, name))
        count, most = self.representatives, self.block
        require(1 <= count <= most, "InfLLM", "representatives", f"in [1, block={most}]", count)

    # ---- prompts: who stands for a block ------------------------------------------------------------------

    def choose_prompt(self, view: SparseView) -> None:
        """Looks at the prompt and restricts nothing."""
        view.scratch.clear()
        if view.first is None and view.size == view.rows:
            view.scratch[RECEIVED] = self._received(view)

    def _received(self, view: SparseView) -> Tensor:
        """``[B, Hkv, T]`` float32."""
        k, step = view.keys(), self.window
        found = torch.zeros(*view.lengths.shape, view.rows, device=k.device)
        for first in range(0, view.rows, step):
            rows, begin = min(step, view.rows - first), max(first - step, 0)
            sides: dict[str, Any] = {"scale": view.scale, "softcap": view.softcap}
            sides["lengths"] = (view.lengths[:, 0] - begin).clamp(0, first + rows - begin).contiguous()
            position = torch.arange(first - begin, first - begin + rows, device=k.device)
            q, keys = view.q[:, :, first : first + rows], k[:, :, begin : first + rows]
            lse = ops.attention_lse(q, keys, q_position=position, **sides)
            seen = ops.column_score(q, keys, lse, q_position=position, heads="kv_sum", **sides)
            found[:, :, begin : first + rows] += seen
        return found

    # ---- decode --------------------------------------------------------------------------------------------

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        recent = max(self.recent, view.rows)
        keys = self._representatives(view)
        if self.sinks + self.blocks * self.block + recent >= view.size:
            return None
        count = torch.div((view.lengths - recent).clamp(min=0), self.block, rounding_mode="floor").int()
        flat = keys.flatten(2, 3).contiguous()
        scores, _ = ops.qk_scores(
            select.flat_queries(view), flat, scale=1.0, lengths=count * self.representatives
        )
        real = select.real_rows(view)
        if real is not None:
            rows = real[:, None].expand(-1, view.q.shape[1], -1).flatten(1)[..., None]
            scores = torch.where(rows, scores, 0.0)
        score = scores.unflatten(2, (-1, self.representatives)).mean(3)
        score = score.unflatten(1, (view.lengths.shape[1], -1)).sum(2)
        covered = torch.arange(score.shape[2], device=score.device) < -(-self.sinks // self.block)
        score = score.masked_fill(covered, -torch.inf)
        chosen = select.best_slots(score, count, self.blocks)
        block = torch.where(chosen.index >= -(-self.sinks // self.block), chosen.index, -1)
        end = view.lengths - recent
        middle = select.slots_of_chunks(block, chosen.count, self.block, end.clamp(min=0))
        sinks = -(-self.sinks // self.block) * self.block  # to the end of the block they end in
        return select.parts(
            select.sink_slots(end.clamp(min=0), sinks), middle.index,
            select.newest_slots(view.lengths, recent),
        )  # fmt: skip

    def _representatives(self, view: SparseView) -> Tensor:
        """``[B, Hkv, n, representatives, D]``; of a block that is not complete it means nothing."""
        need = -(-view.size // self.block)
        stored = view.scratch.get("representatives")
        complete = torch.div(view.lengths, self.block, rounding_mode="floor")
        if stored is None or 2 * view.fresh > view.size:
            stored = self._of_all(view, need)
        elif self.block == 1 or view.fresh >= 1:
            if stored.shape[2] < need:
                room = stored.new_zeros(*stored.shape[:2], need + 16 - stored.shape[2], *stored.shape[3:])
                stored = torch.cat([stored, room], 2)
            self._renew_(view, stored, complete)
        view.scratch["representatives"] = stored
        return stored[:, :, :need]

    def _of_all(self, view: SparseView, need: int) -> Tensor:
        keys, slots = view.keys()[:, :, : view.size], need * self.block
        received = view.scratch.pop(RECEIVED, None)
        score = self._by_query(view, keys)
        if received is not None and view.whole:
            score[..., : received.shape[2]] = received[..., : score.shape[2]]
        pad = slots - keys.shape[2]
        there = torch.arange(slots, device=keys.device) < view.lengths[..., None]
        score = torch.nn.functional.pad(score, (0, pad)).masked_fill(~there, -torch.inf)
        return self._pick(torch.nn.functional.pad(keys, (0, 0, 0, pad)), score)

    def _renew_(self, view: SparseView, stored: Tensor, complete: Tensor) -> None:
        """Blocks that the ``fresh`` newest slots lie in."""
        count = 1 + -(-view.fresh // self.block)
        newest = torch.div(view.lengths - 1, self.block, rounding_mode="floor")
        block = (newest[..., None] - torch.arange(count, device=newest.device)).clamp(min=0)
        slot = (block[..., None] * self.block + torch.arange(self.block, device=block.device)).flatten(2)
        there = slot < view.lengths[..., None]
        done = (block < complete[..., None]) & (block >= torch.div(view.lengths - view.fresh, self.block,
                rounding_mode="floor")[..., None])  # fmt: skip
        assert view.keys_at is not None
        keys = view.keys_at(torch.where(there, slot, 0).int())
        score = self._by_query(view, keys).masked_fill(~there, -torch.inf)
        place = select.at_rows(block)
        stored[place] = torch.where(done[..., None, None], self._pick(keys, score), stored[place])

    def _by_query(self, view: SparseView, keys: Tensor) -> Tensor:
        """``[B, Hkv, n]``: products of ``keys`` with the newest queries, summed over the heads."""
        scores, _ = ops.qk_scores(view.q[:, :, -1].contiguous(), keys, scale=view.scale)
        summed: Tensor = scores.unflatten(1, (view.lengths.shape[1], -1)).sum(2)
        return summed

    def _pick(self, keys: Tensor, score: Tensor) -> Tensor:
        """The keys of largest ``score`` in each block of ``keys`` ``[B, Hkv, n * block, D]``."""
        rows = score.unflatten(2, (-1, self.block))
        index, _ = ops.topk_select(rows.flatten(0, 2).float().contiguous(), self.representatives)
        place = index.view(*rows.shape[:3], -1).clamp(min=0).long()
        each = keys.unflatten(2, (-1, self.block))
        best: Tensor = each.gather(3, place[..., None].expand(*place.shape, keys.shape[3]))
        return best
