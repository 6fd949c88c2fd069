"""SpecKV: a draft of the answer says which keys the answer will need (arXiv 2506.08373)."""

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, kv_attention
from tokencomp.methods.kv import KVView
from tokencomp.methods.snapkv import Windowed
from tokencomp.recipes.common import require


@base.register("spec_kv", paper="2506.08373", stage="kv, with a draft model")
@dataclass(frozen=True)
class SpecKV(Windowed):
    """Slots that the end of the prompt or a drafted answer attends to, in any head of a kv head.

    The prompt ends with ``lookahead`` tokens that a draft model wrote. A slot's score is the largest
    attention from the last ``window + lookahead + 1`` queries, max-pooled over neighbours. Those
    ``lookahead + 1`` last tokens are kept beyond the budget, until ``adapters.draft_prefill``, which does
    all of it, takes them back: ``budget`` slots are left, ``window`` of them the last tokens of the prompt
    but one, which is decoded first. Prompts are read densely (published: along vertical lines and a window
    from 4096 tokens on).
    """

    lookahead: int = field(default=64, metadata={"help": "tokens at the end of the prompt that are a draft"})
    kernel: int = field(default=7, metadata={"help": "pooling width"})

    def __post_init__(self) -> None:
        require(self.lookahead >= 0, "SpecKV", "lookahead", ">= 0", self.lookahead)
        require(self.kernel >= 1, "SpecKV", "kernel", ">= 1", self.kernel)
        require(self.every == 0, "SpecKV", "every", "0: it compresses prompts", self.every)
        super().__post_init__()

    @property
    def queries(self) -> int:
        """The window and the draft."""
        return self.window + self.lookahead + 1

    def protected(self, slots: int) -> tuple[int, int]:
        """The window; and the draft, where there is room for it beside the budget."""
        return 0, self.queries if slots else self.window

    def layer_slots(self, budget: int, tokens: int, layers: int) -> tuple[int, ...]:
        """The budget and what is taken back."""
        return (budget + self.lookahead + 1,) * layers

    def record_prompt(self, view: KVView) -> None:
        """Remembers the queries."""
        kv_attention.remember_queries(view, self.queries)

    def score(self, view: KVView) -> Tensor:
        """``recipes.window_score`` by maxima."""
        score = recipes.window_score(
            kv_attention.grouped(view, kv_attention.recent_queries(view, self.queries)),
            kv_attention.row_keys(view),
            kernel=self.kernel,
            rows="max",
            heads="kv_max",
            scale=view.scale,
            softcap=view.softcap,
            lengths=kv_attention.row_lengths(view),
        )
        return kv_attention.by_head(view, score[:, 0])
