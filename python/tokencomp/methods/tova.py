"""TOVA: the attention of the last query decides (arXiv 2401.06104)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp import ops, recipes
from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.kv import KVView


@base.register("tova", paper="2401.06104", stage="kv")
@dataclass(frozen=True)
class TOVA(eviction.Eviction):
    """What the last query attends to least, averaged over all heads, goes: one set a layer.

    The current token competes too; ``recent=1`` keeps it, as kvpress does. The paper evicts in every step
    (``every=1``).
    """

    every: int = field(default=16, metadata={"help": eviction.EVERY_HELP})
    sinks: int = field(default=0, metadata={"help": eviction.SINKS_HELP})
    recent: int | float = field(default=0, metadata={"help": eviction.RECENT_HELP})

    @property
    def needs_logits(self) -> bool:
        """Where every step evicts; otherwise they are computed for the step that does."""
        return self.every == 1

    @property
    def queries(self) -> int:
        """The last one."""
        return 1

    def record_prompt(self, view: KVView) -> None:
        """Remembers the last query."""
        kv_attention.remember_queries(view, 1)

    def record_step(self, view: KVView) -> None:
        """Remembers the query, for the step that evicts."""
        if view.step % self.every == 0:
            kv_attention.forget_queries(view)
            kv_attention.remember_queries(view, 1)

    def score(self, view: KVView) -> Tensor:
        """``[B, 1, S]``: mean over all query heads of the last query's attention."""
        lengths = view.lengths[:, 0]  # one set a layer: the same in all heads
        if view.logits is not None and view.lse is not None:
            votes = ops.head_vote(view.logits[:, :, -1].contiguous(), view.lse[:, :, -1].contiguous())
            return view.over_heads(votes / view.logits.shape[1])
        q = kv_attention.recent_queries(view, 1)[:, :, 0]
        keys = view.keys()[:, :, : view.size]
        score = recipes.tova_score(q, keys, scale=view.scale, softcap=view.softcap, lengths=lengths)
        return view.over_heads(score)
