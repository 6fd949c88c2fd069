"""R-KV: important keys that repeat no other (arXiv 2505.24133)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.kv import KVView
from tokencomp.methods.snapkv import Windowed
from tokencomp.recipes.common import check_kernel, require


@base.register("rkv", paper="2505.24133", stage="kv")
@dataclass(frozen=True)
class RKV(Windowed):
    """Importance to the last queries minus redundancy among keys, for long reasoning chains.

    See ``recipes.rkv_score``. Every ``every`` decode steps (the paper's buffer), and after the prompt unless
    ``prompts=False``; the eviction comes after the step's attention, which still sees everything. Finding
    similar keys costs time in S^2 but no memory.
    """

    every: int = field(default=128, metadata={"help": eviction.EVERY_HELP})
    window: int = field(default=8, metadata={"help": "last queries that score; their tokens always stay"})
    trade_off: float = field(default=0.1, metadata={"help": "share of importance against redundancy"})
    kernel: int = field(default=7, metadata={"help": "width of the max pooling of importance"})
    threshold: float = field(default=0.5, metadata={"help": "cosine from which keys repeat each other"})
    prompts: bool = field(default=True, metadata={"help": "evict at the end of prompts too"})

    def __post_init__(self) -> None:
        require(0 <= self.trade_off <= 1, "RKV", "trade_off", "in [0, 1]", self.trade_off)
        require(0 <= self.threshold < 1, "RKV", "threshold", "in [0, 1)", self.threshold)
        check_kernel("RKV", self.kernel)
        super().__post_init__()

    @property
    def evicts_prompts(self) -> bool:
        """As asked for."""
        return self.prompts

    def score(self, view: KVView) -> Tensor:
        """``recipes.rkv_score`` per kv head."""
        score = recipes.rkv_score(
            kv_attention.grouped(view, kv_attention.recent_queries(view, self.window)),
            kv_attention.row_keys(view),
            trade_off=self.trade_off,
            kernel=self.kernel,
            threshold=self.threshold,
            scale=view.scale,
            softcap=view.softcap,
            lengths=kv_attention.row_lengths(view),
        )
        return kv_attention.by_head(view, score[:, 0])
