"""PyramidKV: wide budgets in the first layers, narrow ones in the last (arXiv 2406.02069)."""

from dataclasses import dataclass, field

from tokencomp import recipes
from tokencomp.methods import base, eviction
from tokencomp.methods.snapkv import SnapKV
from tokencomp.recipes.common import require


@base.register("pyramidkv", paper="2406.02069", stage="kv")
@dataclass(frozen=True)
class PyramidKV(eviction.Wrapper):
    """Any method with budgets that fall from layer to layer; the budget is their mean.

    Published with SnapKV: ``PyramidKV(SnapKV(budget=512))``. Protected slots are added to what
    ``recipes.pyramid_budget`` says. A prompt shorter than twice the budget gets it in every layer.
    """

    method: eviction.Evicting = field(default=SnapKV(), metadata={"help": "whose scores are used"})
    beta: int = field(default=20, metadata={"help": "steepness: the last layer keeps about 1 / beta"})

    def __post_init__(self) -> None:
        require(self.beta >= 1, "PyramidKV", "beta", ">= 1", self.beta)
        super().__post_init__()

    def layer_slots(self, budget: int, tokens: int, layers: int) -> tuple[int, ...]:
        """The pyramid."""
        window = sum(self.protected(budget))
        if tokens <= budget:
            return (budget,) * layers
        self._checked(budget, tokens)
        each = recipes.pyramid_budget(budget, window, layers, tokens, beta=self.beta)
        return tuple(slots + window for slots in each)
