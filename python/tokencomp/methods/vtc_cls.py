"""VTC-CLS: the visual tokens that CLS attends to over several layers (arXiv 2412.05819)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp.methods import base
from tokencomp.methods.visual import TopScore, VisualView, at_layer


@base.register("vtc_cls", paper="2412.05819", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class VTCCLS(TopScore):
    """CLS attention, a mean over heads, summed over the last encoder layers but the very last.

    ``s_j = sum_{l = first}^{L - 2} mean_h A^l_{cls, j}``, not normalised in between; the paper's code starts
    at layer 16 of CLIP's 24, which is ``last=7``. Several crops are treated one by one (the paper has one).
    """

    keep: float = field(default=0.25, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    last: int = field(default=7, metadata={"help": "layers that are summed, ending with the last but one"})
    combine: Literal["sum", "min", "max"] = field(default="sum", metadata={"help": "over layers"})

    def __post_init__(self) -> None:
        base.check_keep("VTCCLS", self.keep)
        if self.last < 1:
            raise ValueError(f"VTCCLS: last must be >= 1, got {self.last!r}")
        if self.combine not in ("sum", "min", "max"):
            raise ValueError(f"VTCCLS: combine must be sum, min or max, got {self.combine!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``. Fewer where the encoder has fewer."""
        end = at_layer("VTCCLS", -2, layers) + 1
        return tuple(range(max(0, end - self.last), end))

    def score(self, view: VisualView) -> Tensor:
        """``[M, N]``."""
        each = torch.stack([view.encoder.cls(layer) for layer in self.looks_at(view.encoder.layers)])
        if self.combine == "sum":
            return each.sum(0)
        return each.amin(0) if self.combine == "min" else each.amax(0)
