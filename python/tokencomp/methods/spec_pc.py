"""SpecPC: a small model reads a prompt and says which tokens the large one needs (arXiv 2506.08373)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base
from tokencomp.methods.sparse import Sparse, SparseView
from tokencomp.recipes.common import require

SCORE = "prompt score"


@base.register("spec_pc", paper="2506.08373", stage="prompts, in a draft model")
@dataclass(frozen=True)
class SpecPC(Sparse):
    """Scores prompt tokens with the attention of a draft model, whose tokenizer the large model shares.

    The score of a token is the most attention it gets from the last ``window`` queries in any head of any
    layer from ``first`` on, rows weighted by a ramp from 0 to 1, max-pooled (``recipes.specpc_score``). The
    best tokens and their neighbours are kept, and the last ``window`` (``recipes.expand_select``). On the
    draft it restricts nothing; ``adapters.shorten_prompt`` does all of it. Published: lookahead tokens of
    the draft may score too; by default they do not, and here they cannot.
    """

    keep: int = field(default=1024, metadata={"help": "tokens of the shortened prompt"})
    window: int = field(default=64, metadata={"help": "last queries that score; their tokens stay"})
    kernel: int = field(default=32, metadata={"help": "pooling width"})
    neighbours: int = field(default=0, metadata={"help": "tokens kept around a pick; 0: the pooling width"})
    first: int = field(default=8, metadata={"help": "first layer of the draft that scores"})

    def __post_init__(self) -> None:
        require(self.window >= 1, "SpecPC", "window", ">= 1", self.window)
        require(self.keep >= self.window, "SpecPC", "keep", f">= window={self.window}", self.keep)
        require(self.kernel >= 1, "SpecPC", "kernel", ">= 1", self.kernel)
        require(self.neighbours >= 0, "SpecPC", "neighbours", ">= 0", self.neighbours)
        require(self.first >= 0, "SpecPC", "first", ">= 0", self.first)

    def choose_prompt(self, view: SparseView) -> None:
        """Scores the prompt and restricts nothing. Raises ValueError for padding and for chunks."""
        require(self.first < view.layers, "SpecPC", "first", f"< layers={view.layers}", self.first)
        whole = view.counts is None and view.size == view.rows and view.softcap is None
        require(whole, "SpecPC", "prompt", "one without padding, in one piece, logits not capped", "another")
        if view.layer < self.first:
            return
        window = min(self.window, view.rows)
        q = view.q[:, :, view.rows - window :]
        score = recipes.specpc_score(q, view.keys(), kernel=self.kernel, scale=view.scale)
        before = view.shared.get(SCORE)
        view.shared[SCORE] = score if before is None or view.layer == self.first else before.maximum(score)

    def select(self, score: Tensor) -> Tensor:
        """``[K]`` int64, ascending: the tokens that stay of ``score`` ``[1, n]``."""
        if score.shape[1] <= self.keep:
            return torch.arange(score.shape[1], device=score.device)
        index, count = recipes.expand_select(
            score, self.keep, neighbours=self.neighbours or self.kernel, window=self.window
        )
        return index[0, : int(count[0])].long()
