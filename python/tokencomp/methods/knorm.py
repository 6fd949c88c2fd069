"""KNorm: keys of small norm stay (arXiv 2406.11430)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.kv import KVView


@base.register("knorm", paper="2406.11430", stage="kv")
@dataclass(frozen=True)
class KNorm(eviction.Eviction):
    """Slots whose key has the smallest L2 norm, which attract most attention in trained models.

    Looks at no query. The official code leaves the first two layers alone; here all are treated alike, as in
    kvpress.
    """

    sinks: int = field(default=0, metadata={"help": eviction.SINKS_HELP})
    recent: int | float = field(default=0, metadata={"help": eviction.RECENT_HELP})

    def score(self, view: KVView) -> Tensor:
        """``-|k|``."""
        norm: Tensor = view.keys()[:, :, : view.size].float().norm(dim=-1)
        return -norm
