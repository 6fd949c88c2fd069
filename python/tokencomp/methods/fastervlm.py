"""FasterVLM: the visual tokens that CLS attends to (arXiv 2412.01818, first version)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp.methods import base
from tokencomp.methods.visual import TopScore, VisualView, at_layer


@base.register("fastervlm", paper="2412.01818", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class FasterVLM(TopScore):
    """The tokens of each crop with the largest attention of CLS, a mean over heads of one encoder layer.

    ``s_j = mean_h softmax(q_cls k^T / sqrt(d))_j`` over CLS and patches; the paper's layer is the one that
    made the features (-2 of CLIP in LLaVA). An encoder without CLS has the mean query in its place, a
    departure the paper has no case of.
    """

    keep: float = field(default=0.25, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    layer: int = field(
        default=-2, metadata={"help": "encoder layer of the attention; negative: from the end"}
    )

    def __post_init__(self) -> None:
        base.check_keep("FasterVLM", self.keep)

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``."""
        return (at_layer("FasterVLM", self.layer, layers),)

    def score(self, view: VisualView) -> Tensor:
        """``[M, N]``."""
        return view.encoder.cls(self.looks_at(view.encoder.layers)[0])
