"""SnapKV: what the end of the prompt attends to (arXiv 2404.14469)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.kv import KVView
from tokencomp.recipes.common import Pool, check_kernel, require


@dataclass(frozen=True)
class Windowed(eviction.Eviction):
    """Scores with the last ``window`` queries, whose own tokens always stay."""

    window: int = field(default=32, metadata={"help": "last queries that score; their tokens always stay"})

    def __post_init__(self) -> None:
        require(self.window >= 1, type(self).__name__, "window", ">= 1", self.window)
        super().__post_init__()

    @property
    def queries(self) -> int:
        """The window."""
        return self.window

    def protected(self, slots: int) -> tuple[int, int]:
        """Sinks, and the window."""
        return getattr(self, "sinks", 0), self.window

    def record_prompt(self, view: KVView) -> None:
        """Remembers the window's queries."""
        kv_attention.remember_queries(view, self.window)

    def record_step(self, view: KVView) -> None:
        """Remembers the query."""
        kv_attention.remember_queries(view, self.window)

    def skip_step(self, view: KVView) -> None:
        """The window would have a gap: it starts anew with the next prompt."""
        kv_attention.forget_queries(view)


@base.register("snapkv", paper="2404.14469", stage="kv")
@dataclass(frozen=True)
class SnapKV(Windowed):
    """Slots that an observation window at the end of the prompt attends to, pooled along the sequence.

    The softmax runs over all slots; its sums over the window are averaged over the heads of a kv head and
    pooled over the slots before the window. The official code scores query heads apart and holds a copy of
    each kv head for every one of them; one set a kv head is as good and G times smaller. kvpress has
    ``window=64, kernel=5, pool="avg"``. In prompts only; with ``every`` also in decode, by the last queries.
    """

    kernel: int = field(default=7, metadata={"help": "pooling width"})
    pool: Pool = field(default="max", metadata={"help": "avg (zeros outside count) or max"})
    sinks: int = field(default=0, metadata={"help": eviction.SINKS_HELP})

    def __post_init__(self) -> None:
        check_kernel("SnapKV", self.kernel)
        require(self.pool in ("avg", "max"), "SnapKV", "pool", "'avg' or 'max'", repr(self.pool))
        super().__post_init__()

    def score(self, view: KVView) -> Tensor:
        """``recipes.window_score`` per kv head."""
        score = recipes.window_score(
            kv_attention.grouped(view, kv_attention.recent_queries(view, self.window)),
            kv_attention.row_keys(view),
            kernel=self.kernel,
            pool=self.pool,
            scale=view.scale,
            softcap=view.softcap,
            lengths=kv_attention.row_lengths(view),
        )
        return kv_attention.by_head(view, score[:, 0])
