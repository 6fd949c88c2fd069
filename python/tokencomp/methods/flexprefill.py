"""FlexPrefill: each head chooses between two patterns, and how much of them (arXiv 2502.20766)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp import block_lists, ops
from tokencomp.block_lists import BlockLists
from tokencomp.methods import base
from tokencomp.methods.prompts import PromptMethod
from tokencomp.prompt_rows import PromptRows


@base.register("flexprefill", paper="2502.20766", stage="attention")
@dataclass(frozen=True)
class FlexPrefill(PromptMethod):
    """Columns and diagonals up to a share of the attention; some heads take blocks by pooling as well.

    With ``P`` the softmax of the last ``block`` rows: the estimate ``softmax(mean q . mean k)`` of blocks and
    the block sums of P differ by the Jensen-Shannon distance ``sqrt(JSD)``; below ``tau`` the head is
    query-aware. Every head takes ``count // block + 1`` blocks of columns, ``count`` being the fewest columns
    of P that hold ``gamma`` of it, and likewise blocks of diagonals, by their sums of P, between
    ``min_budget`` and ``max_budget`` tokens; the first and the diagonal always. A query-aware head adds the
    fewest blocks that hold ``gamma`` of the softmax of pooled products over all query blocks together.

    The official code lists one key block a query block for each block of diagonals; its pairs lie in two, and
    both are listed here. It reads P without soft caps; here they are in P, not in the pooled products.
    """

    gamma: float = field(default=0.9, metadata={"help": "share of the attention"})
    tau: float = field(default=0.1, metadata={"help": "largest distance of a query-aware head; 0: none is"})
    min_budget: int = field(default=1024, metadata={"help": "fewest tokens of columns, and of diagonals"})
    max_budget: int | None = field(default=None, metadata={"help": "most tokens of columns, of diagonals"})
    block: int = field(default=128, metadata={"help": "rows and keys of a block, 64 or 128"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0 < self.gamma <= 1, "gamma", "in (0, 1]", self.gamma)
        self._check(self.tau >= 0, "tau", ">= 0", self.tau)
        self._check(self.min_budget >= 0, "min_budget", ">= 0", self.min_budget)
        above = self.max_budget is None or self.max_budget >= max(1, self.min_budget)
        self._check(above, "max_budget", f"None or >= min_budget={self.min_budget}", self.max_budget)
        self._check(self.block in (64, 128), "block", "64 or 128", self.block)

    def lists(self, rows: PromptRows, layer: int) -> BlockLists | None:
        """See ``PromptMethod``."""
        block = self.block
        q, position = rows.newest(min(block, rows.rows))
        received, along = rows.received(q, position, diagonals=True)
        assert received is not None and along is not None  # noqa: PT018  (for the type checker)
        visible = rows.visible(block, block)
        low, high = rows.blocks(block)
        columns = self._blocks(received, rows)[:, :, None] & visible
        near = self._blocks(along, rows)
        number = torch.arange(near.shape[2], device=near.device)
        # Offsets [o * block, (o + 1) * block) cross what the slashes at both of their ends cross.
        ends = torch.stack([number * block, (number + 1) * block - 1], -1)
        slashes = torch.where(near[..., None], ends, -1).flatten(2)
        chosen = columns | block_lists.crossed_blocks(slashes, low, high, rows.keys, block)
        aware = self._query_aware(rows, q, position, received)
        best = self._by_pooling(rows, visible) & aware[..., None, None]
        return block_lists.lists_of((chosen | best) & visible, block, block)

    def _blocks(self, score: Tensor, rows: PromptRows) -> Tensor:
        """``[R, G, N]`` bool: the blocks of columns or diagonals that are taken, the first among them."""
        lengths = rows.lengths[:, None].expand(score.shape[:2]).flatten()
        _, count = ops.topp_select(score.flatten(0, 1), self.gamma, score.shape[2], lengths=lengths)
        pooled = _block_sums(score, self.block).flatten(0, 1)
        most = pooled.shape[1] if self.max_budget is None else -(-self.max_budget // self.block)
        wanted = (count // self.block + 1).clamp(-(-self.min_budget // self.block), most)
        wanted = wanted.clamp(max=pooled.shape[1])
        index, _ = ops.topk_select(pooled, pooled.shape[1], k_per_row=wanted, head=1)
        taken = torch.zeros(pooled.shape[0], pooled.shape[1] + 1, dtype=torch.bool, device=score.device)
        taken.scatter_(1, torch.where(index < 0, pooled.shape[1], index).long(), True)
        return taken[:, :-1].view(*score.shape[:2], -1)

    def _query_aware(self, rows: PromptRows, q: Tensor, position: Tensor, received: Tensor) -> Tensor:
        """``[R, G]`` bool: whether pooling estimates the attention of the last rows."""
        true = _block_sums(received, self.block)
        true = true / true.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        there = (position >= 0)[:, None, :, None]
        mean = torch.where(there, q.float(), 0.0).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(
            min=1
        )
        keys = rows.pooled_keys(self.block)
        exists = torch.arange(true.shape[2], device=q.device) * self.block < rows.lengths[:, None]
        z = rows.products(mean, keys)[:, :, 0].masked_fill(~exists[:, None], -torch.inf)
        return jensen_shannon(torch.softmax(z, -1).nan_to_num(0.0), true) < self.tau

    def _by_pooling(self, rows: PromptRows, visible: Tensor) -> Tensor:
        """``[R, G, M, N]`` bool."""
        z = rows.pooled_logits(self.block, self.block).masked_fill(~visible, -torch.inf)
        p = torch.where(visible, torch.softmax(z, -1), 0.0)
        flat = p.flatten(2)[:, :, None]
        return block_lists.topp_blocks(flat, self.gamma).view(p.shape)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """``[...]`` distance ``sqrt((KL(p | m) + KL(q | m)) / 2)`` with ``m = (p + q) / 2``, natural logarithms.

    ``p`` and ``q`` are distributions over the last dimension.
    """
    m = (p + q) / 2
    kl = (torch.xlogy(p, p) - torch.xlogy(p, m)).sum(-1) + (torch.xlogy(q, q) - torch.xlogy(q, m)).sum(-1)
    return (kl / 2).clamp(min=0).sqrt()


def _block_sums(score: Tensor, block: int) -> Tensor:
    padded = functional.pad(score, (0, -score.shape[-1] % block))
    summed: Tensor = padded.unflatten(-1, (-1, block)).sum(-1)
    return summed
