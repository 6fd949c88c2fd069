"""ToMe for diffusion models: merge ahead of a block, unmerge behind it (arXiv 2303.17604)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, matching
from tokencomp.methods.matching import Plan


@base.register("tomesd", paper="2303.17604", stage="around any block on a grid of tokens, e.g. attention")
@dataclass(frozen=True)
class ToMeSD:
    """Merges tokens into one of each cell of the grid; the block's result is copied back to all of them.

    Of every complete cell of ``cell`` rows and columns one token is a target, all others are sources. Each
    source finds the target of largest cosine; the ``floor(N * ratio)`` most similar go into theirs, as plain
    averages. At most the sources can go: 1 - 1 / (rows * columns) of the tokens.

    ``plan = ToMeSD().plan(x, h, w); x = x + plan.unmerge(block(plan.merge(x)))``. The paper merges around
    self-attention, in the blocks of full resolution.
    """

    ratio: float = field(default=0.5, metadata={"help": "share of the tokens that is merged, in [0, 1)"})
    cell: tuple[int, int] = field(default=(2, 2), metadata={"help": "rows, columns of a cell"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ToMeSD: ratio must be in [0, 1), got {self.ratio!r}")
        if min(self.cell) < 1:
            raise ValueError(f"ToMeSD: cell must be rows and columns >= 1, got {self.cell!r}")

    def plan(self, x: Tensor, rows: int, columns: int, *, generator: torch.Generator | None = None) -> Plan:
        """How ``x`` ``[B, rows * columns, C]`` is merged: a plan with ``merge`` and ``unmerge``.

        Args:
            x: the block's input, which is compared; zero rows have similarity 0 to all.
            rows, columns: of the grid.
            generator: draws the target of each cell, the same for the whole batch. None: the top left one.

        Rows: sources that stay, then targets, each in ascending order.

        Raises:
            ValueError: the number of tokens does not fit the grid.
        """
        n = x.shape[1]
        if n != rows * columns:
            raise ValueError(f"ToMeSD: number of tokens must be {rows} * {columns}, got {n}")
        target = self.targets(rows, columns, generator, x.device)
        is_target = torch.zeros(n, dtype=torch.bool, device=x.device).index_fill(0, target, True)
        order = matching.ranked(is_target[None].float())  # targets first, stable
        b, a = (part.expand(x.shape[0], -1) for part in order.tensor_split([len(target)], dim=1))
        r = min(int(n * self.ratio), a.shape[1]) if len(target) > 0 else 0
        if r == 0:
            return matching.identity(x)
        return matching.pair_up(matching.lists(x, a, b), r, n, 0, order="index")

    def targets(
        self,
        rows: int,
        columns: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """``[cells]`` int64 by cell, the target of each: drawn by ``generator``, or the top left one."""
        high, wide = self.cell
        y = torch.arange(rows // high, device=device)[:, None] * high
        x = torch.arange(columns // wide, device=device)[None] * wide
        corner = (y * columns + x).flatten()
        if generator is None:
            return corner
        drawn = torch.randint(high * wide, corner.shape, generator=generator, device=generator.device)
        drawn = drawn.to(corner.device)
        return corner + drawn // wide * columns + drawn % wide
