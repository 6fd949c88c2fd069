"""The queries of a prompt among its keys, as estimates of its attention look at them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokencomp import block_lists, ops


class PromptRows(NamedTuple):
    """Rows of queries, each behind some keys: whole prompts, or chunks of them."""

    q: Tensor  # [B, Hq, T, D]
    k: Tensor  # [B, Hkv, S, D]; what lies behind ``lengths`` may be anything
    first: Tensor  # [B] int32 position of row 0 among the keys
    lengths: Tensor  # [B] int32 keys of each sequence; rows at or behind it are padding
    scale: float
    softcap: float | None = None
    starts: Tensor | None = None  # [B] int32 first key of each sequence; what lies before may be anything

    @property
    def rows(self) -> int:
        """T."""
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        """S."""
        return self.k.shape[2]

    def position(self) -> Tensor:
        """``[B, T]`` int32 position of each row; padding is at or behind ``lengths``."""
        return self.first[:, None] + torch.arange(self.rows, device=self.q.device, dtype=torch.int32)

    def blocks(self, block_q: int) -> tuple[Tensor, Tensor]:
        """First and last position of each query block, ``[B, 1, M]``; see ``block_lists``."""
        return block_lists.block_positions(
            self.rows, self.keys, block_q, self.q.device, self.first, self.lengths
        )

    def visible(self, block_q: int, block_k: int) -> Tensor:
        """``[B, 1, M, N]`` bool: blocks with at least one visible pair."""
        sides = (self.rows, self.keys, block_q, block_k, self.q.device, self.first, self.lengths)
        return block_lists.causal_blocks(*sides)

    def local(self, block_q: int, block_k: int, window: int | Tensor = 1, sinks: int | Tensor = 0) -> Tensor:
        """``[B, 1 or H, M, N]`` bool: blocks near the diagonal and at the start; see ``local_blocks``."""
        return block_lists.local_blocks(*self.blocks(block_q), self.keys, block_k, window, sinks, self.starts)

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The last ``count`` rows that are tokens, ``[B, Hq, count, D]``, and their positions, -1 where a
        sequence has fewer.
        """
        age = torch.arange(count - 1, -1, -1, device=self.q.device, dtype=torch.int32)
        return self.at((self.lengths - self.first)[:, None] - 1 - age)

    def at(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The rows ``[B, n]`` of q, and their positions; -1 for a row that is not there."""
        there = (row >= 0) & (row < self.rows) & (row + self.first[:, None] < self.lengths[:, None])
        index = torch.where(there, row, 0).long()[:, None, :, None]
        q = self.q.gather(2, index.expand(-1, self.q.shape[1], -1, self.q.shape[3]))
        return q, torch.where(there, row + self.first[:, None], -1).int()

    def received(
        self, q: Tensor, position: Tensor, *, columns: bool = True, diagonals: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Column sums and sums along diagonals of the softmax of some rows, ``[B, Hq, S]`` float32 each."""
        sides = {
            "scale": self.scale, "softcap": self.softcap, "q_position": position, "lengths": self.lengths,
            "starts": self.starts,
        }  # fmt: skip
        lse = ops.attention_lse(q, self.k, **sides)  # type: ignore[arg-type]
        return (
            ops.column_score(q, self.k, lse, **sides) if columns else None,  # type: ignore[arg-type]
            ops.diagonal_score(q, self.k, lse, **sides) if diagonals else None,  # type: ignore[arg-type]
        )

    def pooled_logits(self, block_q: int, block_k: int) -> Tensor:
        """``[B, Hq, M, N]`` float32: products of the mean query and the mean key of blocks, scaled."""
        tokens = (self.lengths - self.first).clamp(min=0)
        q = block_lists.block_pool(self.q, block_q, lengths=tokens)
        return self.products(q, self.pooled_keys(block_k))

    def pooled_keys(self, block: int) -> Tensor:
        """``[B, Hkv, N, D]`` float32 mean keys of blocks."""
        return block_lists.block_pool(self.k, block, lengths=self.lengths, starts=self.starts)

    def sides(self) -> dict[str, Any]:
        """How all rows attend, in keyword arguments of ``ops.flash_prefill`` and ``ops.attention_lse``."""
        return {
            "scale": self.scale, "softcap": self.softcap, "q_position": self.position(),
            "lengths": self.lengths, "starts": self.starts,
        }  # fmt: skip

    def is_sink(self, sinks: int) -> Tensor:
        """``[B, 1, S]`` bool: the first ``sinks`` keys of each sequence."""
        key = torch.arange(self.keys, device=self.k.device)[None]
        begin = torch.zeros_like(self.lengths) if self.starts is None else self.starts
        return ((key >= begin[:, None]) & (key < begin[:, None] + sinks))[:, None]

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, Hq, M, N]`` scaled products of ``[B, Hq, M, D]`` and ``[B, Hkv, N, D]``."""
        z: Tensor = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT
        return z.flatten(1, 2) * self.scale


def last_rows(q: Tensor, k: Tensor, scale: float | None = None, softcap: float | None = None) -> PromptRows:
    """The rows ``q`` ``[B, Hq, T, D]`` as the last T of the keys ``[B, Hkv, S, D]``."""
    full = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
    return PromptRows(q, k, full - q.shape[2], full, q.shape[3] ** -0.5 if scale is None else scale, softcap)
