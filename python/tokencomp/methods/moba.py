"""MoBA: each row attends to the chunks whose mean key it likes best (arXiv 2502.13189)."""

from dataclasses import dataclass, field

from torch.nn import functional

from tokencomp import block_lists
from tokencomp.block_lists import BlockLists
from tokencomp.methods import base
from tokencomp.methods.prompts import PromptMethod
from tokencomp.prompt_rows import PromptRows
from tokencomp.sparse import selected

BLOCK = 64


@base.register("moba", paper="2502.13189", stage="attention")
@dataclass(frozen=True)
class MoBA(PromptMethod):
    """The chunks of largest product of a query and the mean key, its own chunk always and counted.

    A query block of 64 rows lists what any of its rows chose, a superset of MoBA for each of them; what only
    another row chose is attended to as well. ``sparse.chunk_attention`` is exact, row by row. For models that
    were trained with it.
    """

    chunk: int = field(default=2048, metadata={"help": "keys of a chunk, a multiple of 64"})
    top: int = field(default=3, metadata={"help": "chunks of a row, its own included"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.chunk >= 1 and self.chunk % BLOCK == 0, "chunk", "a multiple of 64", self.chunk)
        self._check(self.top >= 1, "top", ">= 1", self.top)

    def lists(self, rows: PromptRows, layer: int) -> BlockLists | None:
        """See ``PromptMethod``."""
        chosen = selected.choose_chunks(rows, self.chunk, self.top)
        padded = functional.pad(chosen, (0, 0, 0, -rows.rows % BLOCK))
        any_row = padded.unflatten(2, (-1, BLOCK)).any(3)
        visible = rows.visible(BLOCK, BLOCK)
        blocks = any_row.repeat_interleave(self.chunk // BLOCK, dim=3)[..., : visible.shape[3]]
        return block_lists.lists_of(blocks & visible, BLOCK, BLOCK)
