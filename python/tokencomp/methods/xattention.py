"""XAttention: blocks that hold a share of the antidiagonal sums (arXiv 2503.16428)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import block_lists
from tokencomp.block_lists import BlockLists
from tokencomp.methods import base
from tokencomp.methods.prompts import PromptMethod, by_group
from tokencomp.prompt_rows import PromptRows


@base.register("xattention", paper="2503.16428", stage="attention")
@dataclass(frozen=True)
class XAttention(PromptMethod):
    """For each query block, the fewest blocks of largest antidiagonal score that hold a share of all.

    The score of a block sums the softmax, over groups of ``stride`` keys, of the sums of logits along the
    antidiagonals of ``stride`` x ``stride`` tiles: the cost of the products divided by ``stride``. The block
    of the first keys and those of the diagonal come first and count. The official code keeps ``threshold``
    0.9 or one a head, and takes strides of 8 and 16; it tests the mass before a block is added, as here. Soft
    caps are not in the estimate.
    """

    threshold: float | Sequence[Sequence[float]] = field(
        default=0.9, metadata={"help": "share of a query block's score; or of each query head of each layer"}
    )
    stride: int = field(default=16, metadata={"help": "rows and keys of a tile"})
    block: int = field(default=128, metadata={"help": "rows and keys of a block, 64 or 128"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.block in (64, 128), "block", "64 or 128", self.block)
        divides = self.stride >= 1 and self.block % self.stride == 0
        self._check(divides, "stride", f"a divisor of block={self.block}", self.stride)
        table = [[self.threshold]] if isinstance(self.threshold, int | float) else self.threshold
        for share in (share for layer in table for share in layer):
            self._check(0 < share <= 1, "threshold", "in (0, 1]", share)

    def lists(self, rows: PromptRows, layer: int) -> BlockLists | None:
        """See ``PromptMethod``."""
        score = block_lists.antidiagonal_scores(
            rows.q, rows.k, stride=self.stride, block=self.block, scale=rows.scale, first=rows.first,
            lengths=rows.lengths,
        )  # fmt: skip
        chosen = block_lists.topp_blocks(
            score, self._share(rows, layer), visible=rows.visible(self.block, self.block),
            forced=rows.local(self.block, self.block, sinks=1),
        )  # fmt: skip
        return block_lists.lists_of(chosen, self.block, self.block)

    def _share(self, rows: PromptRows, layer: int) -> float | Tensor:
        if isinstance(self.threshold, int | float):
            return float(self.threshold)
        known = len(self.threshold)
        self._check(layer < known, "threshold", f"of at least {layer + 1} layers", f"{known} layers")
        return by_group(torch.tensor(self.threshold[layer]), rows)
