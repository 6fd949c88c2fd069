"""ToP-ViM: token pruning for vision state-space models, its training-free part (arXiv 2409.18962)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base, pruning


@base.register("topvim", paper="2409.18962", stage="blocks of a state-space model, after the scan")
@dataclass(frozen=True)
class ToPViM:
    """Keeps the tokens whose positive scan outputs sum highest, in their order.

    Importance ``S_m = sum_d max(0, y_md)`` of the scan's output y at token m. Kept tokens keep their order: a
    one-dimensional scan over them then equals one over all tokens in which a dropped token carries the state
    on unchanged (``carried``); a two-dimensional scan has to walk its original paths and skip the dropped
    tokens (``position_map``), never a new grid of the survivors. The paper's hidden-state alignment beyond
    that, and its fine-tuning, are not covered.

    The paper's Vim-S prunes after blocks 4, 9 and 14 (0-based). Its code scores with the backward branch in
    reversed order without turning it back; say ``reverse=True`` for such a tensor.
    """

    keep: float = field(default=0.8, metadata={"help": "share (or int: count) of the image tokens kept"})
    odd: bool = field(
        default=False, metadata={"help": "keep one more where the count is even, as Vim-S does"}
    )

    def __post_init__(self) -> None:
        base.check_keep("ToPViM", self.keep)

    def count(self, tokens: int) -> int:
        """How many of ``tokens`` image tokens stay: ``ceil(keep * tokens)``, in [1, tokens]."""
        wanted = self.keep if isinstance(self.keep, int) else self.keep * tokens
        kept = math.ceil(round(wanted, 9))  # 0.55 * 100 is 55.00000000000001
        kept += self.odd and kept % 2 == 0
        return min(max(kept, 1), tokens)

    def score(self, y: Tensor, *, reverse: bool = False) -> Tensor:
        """``[B, N]`` float32, the clipped sum over the channels of ``y`` ``[B, N, C]``.

        ``reverse``: y is in reversed token order, as a backward scan leaves it; the result is in token order.
        """
        s = y.float().clamp(min=0).sum(-1)
        return s.flip(1) if reverse else s

    def select(
        self, y: Tensor, *, protect: Sequence[int] = (), reverse: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """The kept tokens, ascending: ``[B, K]`` int32, for ``ragged.gather_rows`` of hidden states and
        residual.

        Args:
            y: ``[B, N, C]``, the scan's output.
            protect: tokens that always stay and are not counted, e.g. a CLS token in the middle.
            reverse: y is in reversed token order; ``protect`` and ``mask`` are in token order.
            mask: ``[B, N]`` bool, False at padding, which goes first.
        """
        tokens = y.shape[1]
        stay = pruning.check_protect("ToPViM", protect, tokens)
        ranked = pruning.order(self.score(y, reverse=reverse), protect=stay, mask=mask)
        kept = ranked[:, : len(stay) + self.count(tokens - len(stay))]
        return kept.sort(dim=1).values.to(torch.int32)


def carried(kept: Tensor, tokens: int, *, reverse: bool = False) -> Tensor:
    """``[B, tokens]`` int32: the row of ``kept`` whose state a scan holds at each token, -1 before the first.

    At a kept token that is its own row, at a dropped one the row of the last kept token the scan has passed:
    the nearest before it, or after it where the scan runs in ``reverse``. ``kept`` ``[B, K]`` is ascending.
    """
    rows = ragged.position_map(kept, tokens)
    if not reverse:
        return rows.cummax(1).values
    none = kept.shape[1]
    nearest = rows.masked_fill(rows < 0, none).flip(1).cummin(1).values.flip(1)
    return nearest.masked_fill(nearest == none, -1)
