"""RandomVisual: keep visual tokens by chance, the baseline every method has to beat."""

from dataclasses import dataclass, field

import torch

from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, best


@base.register("random_visual", paper="", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class RandomVisual:
    """A uniformly random subset of the tokens of each crop; crop m gets the m-th draw of the seed."""

    keep: float = field(default=0.25, metadata={"help": "ratio of tokens kept in each crop, or their count"})
    seed: int = field(default=0, metadata={"help": "of the draws"})

    def __post_init__(self) -> None:
        base.check_keep("RandomVisual", self.keep)

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Draws are made on the CPU, so that every device draws the same."""
        crops, tokens = view.x.shape[:2]
        draws = torch.rand(crops, tokens, generator=torch.Generator().manual_seed(self.seed))
        return VisualKeep(best(draws.to(view.x.device), base.budget(self.keep, tokens)))
