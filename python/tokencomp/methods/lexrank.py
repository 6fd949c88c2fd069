"""LexRank: the centrality of tokens in their similarity graph (arXiv 1109.2128)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.methods import base, pruning
from tokencomp.methods.visual import VisualKeep, VisualView

Kernel = Literal["linear", "relu", "threshold"]
KERNELS = ("linear", "relu", "threshold")


@base.register("lexrank", paper="1109.2128", stage="visual tokens, before the first LLM layer; any token set")
@dataclass(frozen=True)
class LexRank:
    """Keeps the most central tokens: PageRank over similarities, ``p <- d / n + (1 - d) K D^-1 p``.

    K_uv is the edge between two tokens, D its row sums (degrees). ``linear``: ``(1 + cos) / 2``, never
    formed: a step costs O(N C). ``relu``: ``max(cos, 0)``. ``threshold``: 1 where ``cos >= threshold`` (the
    original, for texts, with threshold 0.1). The latter two hold the matrix. A token without any edge gives
    its share to all evenly, so that the sum of p stays 1.
    """

    keep: float = field(default=0.5, metadata={"help": "ratio of tokens kept, or their count as an int"})
    kernel: Kernel = field(default="linear", metadata={"help": f"edges: {', '.join(KERNELS)}"})
    threshold: float = field(default=0.1, metadata={"help": "cosine from which the threshold kernel links"})
    damping: float = field(default=0.15, metadata={"help": "d, share of every vote that is spread evenly"})
    iterations: int = field(default=50, metadata={"help": "steps of the power iteration"})

    def __post_init__(self) -> None:
        base.check_keep("LexRank", self.keep)
        if self.kernel not in KERNELS:
            raise ValueError(f"LexRank: kernel must be one of {KERNELS}, got {self.kernel!r}")
        if not 0.0 <= self.damping <= 1.0:
            raise ValueError(f"LexRank: damping must be in [0, 1], got {self.damping!r}")
        base.check_iterations("LexRank", self.iterations)

    def score(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``[B, N]`` float32 centrality of the tokens ``x`` ``[B, N, C]``, sums to 1; norms do not matter.

        ``mask``: ``[B, N]`` bool, False at padding. Padding and tokens whose float32 sum of squares is not
        finite have no edges and score 0.
        """
        there = _there(x, mask)
        even = there / there.sum(1, keepdim=True).clamp(min=1)
        vote = _Linear(x, there) if self.kernel == "linear" else _Dense(x, there, self._edges)
        isolated = vote.degree == 0
        share = torch.where(isolated, 0, 1 / vote.degree)
        p = even
        for _ in range(self.iterations):
            lost = (p * isolated).sum(1, keepdim=True)
            p = self.damping * even + (1 - self.damping) * (vote(p * share) + lost * even)
        return p

    def degree(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``[B, N]`` float32, degree centrality: the sum of a token's edges, its own included."""
        there = _there(x, mask)
        return (_Linear(x, there) if self.kernel == "linear" else _Dense(x, there, self._edges)).degree

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``: all crops of an image together."""
        x, lengths = view.by_image(view.x)
        return VisualKeep(view.to_crops(self.select(x, lengths=lengths)))

    def select(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """The most central tokens of ``x`` ``[B, N, C]``, ascending: ``[B, K]`` int32, -1 beyond an item's
        budget.

        ``lengths``: ``[B]`` integers, the valid tokens of each item; the budget is taken of these.
        """
        return base.ascending(self.picks(x, lengths=lengths))

    def picks(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Like ``select``, the most central first."""
        mask = None
        if lengths is not None:
            mask = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
        counts = base.budgets(self.keep, x, lengths)
        ranked = pruning.order(self.score(x, mask=mask), mask=mask)[:, : max([1, *counts])]
        return base.first_picks(ranked.to(torch.int32), counts)

    def _edges(self, cosine: Tensor) -> Tensor:
        if self.kernel == "relu":
            return cosine.clamp(min=0)
        return (cosine >= self.threshold).to(cosine.dtype)


class _Linear:
    """``K p`` with ``K = (1 + U U^T) / 2`` and U the normalised tokens; padding has no edges."""

    def __init__(self, x: Tensor, there: Tensor) -> None:
        self.unit, self.there = _unit(x, there), there
        self.degree = self(there)

    def __call__(self, p: Tensor) -> Tensor:
        cosines = (self.unit @ (self.unit.mT @ p[..., None]))[..., 0]
        return (p.sum(1, keepdim=True) + cosines) / 2 * self.there


class _Dense:
    """``K p`` with the matrix K in memory."""

    def __init__(self, x: Tensor, there: Tensor, edges: Callable[[Tensor], Tensor]) -> None:
        unit = _unit(x, there)
        self.matrix = edges(unit @ unit.mT) * there[:, :, None] * there[:, None, :]
        self.degree = self.matrix.sum(2)

    def __call__(self, p: Tensor) -> Tensor:
        return (self.matrix @ p[..., None])[..., 0]


def _unit(x: Tensor, there: Tensor) -> Tensor:
    return normalize(x.float().masked_fill((there == 0)[..., None], 0), dim=-1)


def _there(x: Tensor, mask: Tensor | None) -> Tensor:
    finite = x.float().square().sum(-1).isfinite()
    return (finite if mask is None else finite & mask).float()
