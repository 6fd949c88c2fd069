"""Twilight: as many tokens as hold a share of the attention (arXiv 2502.02770)."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods import sparse_select as select
from tokencomp.methods.sparse import PromptChoice, SlotLists, Sparse, SparseMethod, SparseView
from tokencomp.recipes.common import require


@base.register("twilight", paper="2502.02770", stage="attention")
@dataclass(frozen=True)
class Twilight(Sparse):
    """Of what a base method would read, the fewest tokens that hold a share ``p`` of the attention.

    The weights of a kv head are the mean of its heads' softmax over the candidates; the largest of them are
    taken until they sum to ``p``, the newest token among them. Published: one set a query head, weights
    estimated from a 4-bit copy of the keys; here from the keys themselves, of the candidates alone, which
    is exact and reads each candidate's key twice. Without a base all tokens are candidates, which reads
    every key: fewer values are read then, and that is all that is saved.
    """

    method: SparseMethod | None = field(default=None, metadata={"help": "the base; None: everything"})
    p: float = field(default=0.85, metadata={"help": "share of the attention to hold"})
    least: int = field(default=1, metadata={"help": "fewest tokens read"})
    dense: int = field(default=2, metadata={"help": select.DENSE_HELP})

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, "Twilight", "p", "in (0, 1]", self.p)
        require(self.least >= 1, "Twilight", "least", ">= 1", self.least)
        require(self.dense >= 0, "Twilight", "dense", ">= 0", self.dense)
        known = self.method is None or isinstance(self.method, SparseMethod)
        require(known, "Twilight", "method", "a sparse method or None", self.method)
        own = getattr(self.method, "share", "kv") == "kv"
        require(own, "Twilight", "method", "one with a list a kv head", self.method)

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        base = None if self.method is None else self.method.choose(view)
        if view.layer < self.dense or (base is None and self.wants_logits(view)):
            return base
        if base is None:
            scores, lse = view.scores(select.flat_queries(view), scale=view.scale, softcap=view.softcap)
            return self._fewest(view, scores[..., : view.size], lse, view.lengths)
        return self._among(view, base)

    def wants_logits(self, view: SparseView) -> bool:
        """See ``SparseMethod``."""
        return self.method is not None and self.method.wants_logits(view)

    def observe(self, view: SparseView, logits: Tensor, lse: Tensor) -> None:
        """See ``SparseMethod``."""
        if self.method is not None:
            self.method.observe(view, logits, lse)

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """The base method's."""
        return None if self.method is None else self.method.choose_prompt(view)

    def _among(self, view: SparseView, listed: SlotLists) -> SlotLists:
        entry = torch.arange(listed.index.shape[2], device=listed.index.device)
        there = (listed.index >= 0) & (entry < listed.count[..., None])
        assert view.keys_at is not None
        keys = view.keys_at(listed.index.clamp(min=0))
        scores, lse = ops.qk_scores(
            select.flat_queries(view), keys, scale=view.scale, softcap=view.softcap,
            key_bias=torch.where(there, 0.0, -torch.inf),
        )  # fmt: skip
        end = ((entry + 1) * there).amax(2).int()  # behind the newest token's entry
        chosen = self._fewest(view, scores, lse, end)
        slots = listed.index.gather(2, chosen.index.clamp(min=0).long())
        slots = torch.where((chosen.index >= 0), slots, -1)
        return replace(chosen, index=slots, reused=listed.reused)

    def _fewest(self, view: SparseView, scores: Tensor, lse: Tensor, lengths: Tensor) -> SlotLists:
        mass = select.votes(view, scores, lse, "softmax_sum", view.lengths.shape[1], share=True)
        index, count = ops.topp_select(
            mass.flatten(0, 1), self.p, scores.shape[2], min_k=min(self.least, scores.shape[2]),
            tail=view.rows, lengths=lengths.flatten(),
        )  # fmt: skip
        return SlotLists(index.view(*lengths.shape, -1), count.view(lengths.shape))
