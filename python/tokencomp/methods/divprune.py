"""DivPrune: keep the visual tokens that solve the max-min diversity problem greedily (arXiv 2503.02175)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView


@base.register("divprune", paper="2503.02175", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class DivPrune:
    """Farthest-first traversal by cosine distance, from the token whose nearest neighbour is farthest.

    The paper keeps ``k = round(keep * n)`` tokens of the image span (0.098 for images: 56 of 576; 0.1 for
    video). Picked tokens are never picked again, also where duplicates leave nothing else at a distance.
    """

    keep: float = field(default=0.098, metadata={"help": "ratio of tokens kept, or their count as an int"})

    def __post_init__(self) -> None:
        base.check_keep("DivPrune", self.keep)

    def picks(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """The kept tokens of ``x`` ``[B, N, C]`` in pick order: ``[B, K]`` int32, -1 beyond an item's budget.

        Args:
            x: visual tokens after the projector; norms do not matter.
            lengths: ``[B]`` integers, the valid tokens of each item; the budget is taken of these.
        """
        counts = base.budgets(self.keep, x, lengths)
        index, _ = ops.kcenter_greedy(x, max([1, *counts]), first="largest_nn", lengths=lengths)
        return base.first_picks(index, counts)

    def select(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Like ``picks``, in ascending order of token: the order in which kept tokens are fed on."""
        return base.ascending(self.picks(x, lengths=lengths), holes=lengths is not None)

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``: all crops of an image together."""
        x, lengths = view.by_image(view.x)
        return VisualKeep(view.to_crops(self.picks(x, lengths=lengths)))
