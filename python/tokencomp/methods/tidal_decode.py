"""TidalDecode: two layers choose what all others read (arXiv 2410.05076)."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from tokencomp.methods import base
from tokencomp.methods import sparse_select as select
from tokencomp.methods.sparse import SlotLists, Sparse, SparseView
from tokencomp.recipes.common import require

TOKENS = "tidal tokens"


@base.register("tidal_decode", paper="2410.05076", stage="attention")
@dataclass(frozen=True)
class TidalDecode(Sparse):
    """Layers read the ``k`` tokens that one layer before them, which reads all, gave the largest logits.

    Layers before ``first``, ``first`` itself and ``again`` read everything; the lists of ``first`` hold for
    the layers up to ``again``, those of ``again`` for the rest. Their logits are by-products of the dense
    attention, so a selection costs no pass over the keys.

    Published: a list a query head (``share="q"``), the newest token only where it wins a place
    (``force=False``; its CUDA path forces it), ``again=13`` for Llama-3-8B. Here one list a kv head by the
    largest logit of its heads, or by the sum of their probabilities. Where heads and layers hold different
    tokens, after an eviction, a list names tokens, and a layer reads those that it still has. The
    correction of the paper, which overwrites keys and values of tokens that were decoded sparsely, is
    ``recompute_newest``.
    """

    k: int = field(default=256, metadata={"help": "tokens of a list"})
    first: int = field(default=2, metadata={"help": "first layer that chooses; those before read everything"})
    again: int = field(default=13, metadata={"help": "layer that chooses anew"})
    share: select.Share = field(default="kv", metadata={"help": select.SHARE_HELP})
    vote: select.Reduce = field(default="max", metadata={"help": select.REDUCE_HELP})
    force: bool = field(default=True, metadata={"help": "whether the newest tokens always have a place"})

    def __post_init__(self) -> None:
        require(self.k >= 1, "TidalDecode", "k", ">= 1", self.k)
        require(self.first >= 0, "TidalDecode", "first", ">= 0", self.first)
        require(self.again > self.first, "TidalDecode", "again", f"> first={self.first}", self.again)
        require(self.share in ("kv", "q"), "TidalDecode", "share", "'kv' or 'q'", repr(self.share))
        known = self.vote in ("max", "softmax_sum")
        require(known, "TidalDecode", "vote", "'max' or 'softmax_sum'", repr(self.vote))

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        tokens = view.shared.get(TOKENS)
        if view.layer <= self.first or view.layer == self.again or view.size <= self.k or tokens is None:
            return None
        slots = select.by_position(view, tokens)
        return replace(select.parts(slots), reused=True)

    def wants_logits(self, view: SparseView) -> bool:
        """See ``SparseMethod``."""
        if view.layer == self.first:
            view.shared.pop(TOKENS, None)
        return view.layer in (self.first, self.again) and view.size > self.k

    def observe(self, view: SparseView, logits: Tensor, lse: Tensor) -> None:
        """See ``SparseMethod``."""
        lists = view.lengths.shape[1] if self.share == "kv" else view.q.shape[1]
        scores = logits[..., : view.size].flatten(1, 2)
        score = select.votes(view, scores, lse.flatten(1, 2), self.vote, lists)
        tail = min(view.rows, self.k) if self.force else 0
        chosen = select.best_slots(score, select.list_lengths(view, lists), self.k, tail=tail)
        view.shared[TOKENS] = self._tokens(view, chosen.index)

    @staticmethod
    def _tokens(view: SparseView, slots: Tensor) -> Tensor:
        if view.whole:
            return slots
        heads = slots.shape[1] // view.lengths.shape[1]
        position = view.position().repeat_interleave(heads, 1)
        return position.gather(2, slots.clamp(min=0).long()).masked_fill(slots < 0, -1)
