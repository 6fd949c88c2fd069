"""What methods that restrict the attention of prompts share: their rows, and when they leave it dense."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.block_lists import BlockLists
from tokencomp.methods.sparse import PromptChoice, Sparse, SparseView
from tokencomp.prompt_rows import PromptRows
from tokencomp.recipes.common import require


@dataclass(frozen=True)
class PromptMethod(Sparse):
    """Lists of key blocks for prompts; decode steps are left as they are."""

    dense_layers: int = field(
        default=0, kw_only=True, metadata={"help": "first layers whose attention stays dense"}
    )
    shortest: int = field(
        default=0, kw_only=True, metadata={"help": "prompts of fewer tokens, history included, stay dense"}
    )

    def __post_init__(self) -> None:
        self._check(self.dense_layers >= 0, "dense_layers", ">= 0", self.dense_layers)
        self._check(self.shortest >= 0, "shortest", ">= 0", self.shortest)

    def _check(self, holds: bool, knob: str, expected: str, got: object) -> None:
        require(holds, type(self).__name__, knob, expected, got)

    def lists(self, rows: PromptRows, layer: int) -> BlockLists | None:
        """What each query block of each head attends to; None: everything. The rows are kv heads of
        sequences, with the query heads of their group. Not needed where ``choose_prompt`` is replaced.
        """
        raise NotImplementedError

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """See ``SparseMethod``."""
        if view.layer < self.dense_layers or view.size < self.shortest or not view.q.shape[2]:
            return None
        return self.lists(rows_of(view), view.layer)


def rows_of(view: SparseView) -> PromptRows:
    """The queries of a prompt by kv head: ``R = B * Hkv`` sequences of one kv head and G query heads, since
    heads may hold different numbers of slots.
    """
    heads = view.lengths.shape[1]
    lengths, first = view.lengths.flatten().int(), view.first
    return PromptRows(
        view.q.unflatten(1, (heads, -1)).flatten(0, 1),
        view.keys()[:, :, : view.size].flatten(0, 1)[:, None],
        lengths - _tokens(view).repeat_interleave(heads),
        lengths,
        view.scale,
        view.softcap,
        None if first is None else first.flatten().int(),
    )


def _tokens(view: SparseView) -> Tensor:
    """``[B]`` int32: rows up to the last that is a token."""
    if view.counts is None or view.starts is None:
        return torch.full((view.q.shape[0],), view.q.shape[2], dtype=torch.int32, device=view.q.device)
    return (view.starts + view.counts).int()


def by_group(values: Tensor, rows: PromptRows) -> Tensor:
    """``[R, G]`` of one value a query head, ``[Hq]``, for the rows of ``rows_of``."""
    group = rows.q.shape[1]
    grouped = values.to(rows.q.device).view(-1, group)
    return grouped.repeat(rows.q.shape[0] // grouped.shape[0], 1)
