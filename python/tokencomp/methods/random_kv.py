"""Random keys: keep slots of a cache by chance, the baseline every method has to beat."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.kv import KVView


@base.register("random_kv", paper="", stage="kv")
@dataclass(frozen=True)
class RandomKV(eviction.Eviction):
    """A uniformly random subset of the slots, another one in each layer, sequence and kv head.

    Every token has a priority of its own, a hash of seed, layer, row and position: so after many evictions
    the survivors are still a uniform sample of all tokens seen, not mostly new ones. Runs repeat.
    """

    sinks: int = field(default=0, metadata={"help": eviction.SINKS_HELP})
    recent: int | float = field(default=0, metadata={"help": eviction.RECENT_HELP})
    seed: int = field(default=0, metadata={"help": "of the priorities"})

    def score(self, view: KVView) -> Tensor:
        """The priorities, in [0, 1)."""
        return eviction.draws(view, self.seed)
