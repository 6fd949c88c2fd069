"""A2SF: accumulated attention with a forgetting factor (arXiv 2407.20485)."""

from dataclasses import dataclass, field

from tokencomp import scores
from tokencomp.methods import base, eviction
from tokencomp.methods.h2o import Accumulating
from tokencomp.recipes.common import require


@base.register("a2sf", paper="2407.20485", stage="kv")
@dataclass(frozen=True)
class A2SF(Accumulating):
    """Heavy hitters whose old attention is forgotten, so that early tokens have no head start.

    ``S <- gamma S + P`` per query, in prompts and in decode; a new token starts at 0 and gets its own P.
    ``gamma=1`` is H2O. The later official code scores prompts only (``every=0``) and protects 16 recent
    tokens. Queries so old that they could add at most ``truncate`` to a slot are skipped, 0: none is.
    """

    recent: int | float = field(default=16, metadata={"help": eviction.RECENT_HELP})
    gamma: float = field(default=0.95, metadata={"help": "forgetting factor in (0, 1]"})
    truncate: float = field(default=1e-6, metadata={"help": "what a slot may lose to skipped old queries"})

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, "A2SF", "gamma", "in (0, 1]", self.gamma)
        require(self.truncate >= 0, "A2SF", "truncate", ">= 0", self.truncate)
        super().__post_init__()

    @property
    def forgetting(self) -> float:
        """gamma."""
        return self.gamma

    @property
    def newest(self) -> int:
        """Queries until the forgetting horizon; 0: all."""
        if self.truncate == 0 or self.gamma == 1:
            return 0
        return scores.forgetting_horizon(self.gamma, self.truncate)
