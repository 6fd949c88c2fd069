"""TransPrune: visual tokens by how much layers change them, and by the question (arXiv 2507.20630)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp.methods import base, decoder
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning, Transition


@base.register("trans_prune", paper="2507.20630", stage="between decoder layers")
@dataclass(frozen=True)
class TransPrune(Pruning):
    """Keeps tokens whose vectors attention and MLP lengthen and turn most, and that the question looks at.

    A module that makes y of its normed input x changes a token by ``|y| / |x|``, times the softmax over all
    tokens of ``1 - cos(x, y)``; attention and MLP of a layer add up, and so do layers from ``since`` on. In
    front of each of ``layers`` the sums of the visual tokens, divided by their total, and the attention that
    the text behind the first image would pay them in that layer, a mean over heads and rows and divided by
    its total, are weighed ``alpha`` to ``1 - alpha``; ``round(keep[s] n)`` tokens go on.

    Departures: positions are kept where the authors' code numbers anew; the softmax is of each sequence, not
    of the batch; sums are float32. ``direction="abs"`` is the paper's ``1 - |cos|``, ``"cos"`` the code's.
    """

    keep: tuple[float, ...] = field(
        default=(0.875, 0.625, 0.125), metadata={"help": "ratios or counts of visual tokens, stage by stage"}
    )
    layers: tuple[int, ...] = field(
        default=(7, 9, 12), metadata={"help": "first layers that get fewer, from 0"}
    )
    since: int = field(default=6, metadata={"help": "first layer whose changes count, from 0"})
    alpha: float = field(default=0.5, metadata={"help": "weight of the changes against the question's"})
    direction: Literal["cos", "abs"] = field(
        default="cos", metadata={"help": "cos: turning back counts most; abs: like staying"}
    )

    def __post_init__(self) -> None:
        decoder.check_stages("TransPrune", self.keep, self.layers)
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"TransPrune: alpha must be in [0, 1], got {self.alpha!r}")
        if self.direction not in ("cos", "abs"):
            raise ValueError(f"TransPrune: direction must be cos or abs, got {self.direction!r}")
        if not 0 <= self.since < min(self.layers):
            raise ValueError(f"TransPrune: since must be in [0, {min(self.layers)}), got {self.since!r}")

    @property
    def watches(self) -> tuple[str, ...]:
        """See ``DecoderMethod``."""
        return ("transition",)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for layers out of range."""
        decoder.check_layers("TransPrune", "layers", self.layers, 1, layers - 1)
        return tuple(range(self.since, self.layers[-1]))

    def prune(self, view: DecoderView) -> DecoderKeep | None:
        """See ``DecoderMethod``."""
        if view.transition is None:
            raise ValueError("TransPrune: the view must have transitions, got none")
        change = sum(transition_value(part, view.real, self.direction) for part in view.transition)
        total = view.scratch.get("change", 0) + view.by_column(torch.as_tensor(change))
        view.scratch["change"] = total
        if view.layer + 1 not in self.layers:
            return None
        asked = view.next().received(view.text)[:, 0]
        score = self.alpha * _of_visual(view, view.by_row(total))
        score = score + (1 - self.alpha) * _of_visual(view, asked)
        keep = self.keep[self.layers.index(view.layer + 1)]
        return DecoderKeep(decoder.best(view, score, decoder.budgets(view, keep)))


def transition_value(part: Transition, real: Tensor, direction: Literal["cos", "abs"] = "cos") -> Tensor:
    """``[B, W]`` float32: how much a module changed each token; 0 where ``real`` ``[B, W]`` is False."""
    x, y = part.before.float(), part.after.float()
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    turn = 1 - (cosine.abs() if direction == "abs" else cosine)
    weight = turn.masked_fill(~real, -torch.inf).softmax(1)
    length = x.norm(dim=-1)
    return torch.where(real & (length > 0), y.norm(dim=-1) / length, 0.0) * weight


def _of_visual(view: DecoderView, score: Tensor) -> Tensor:
    """``score`` ``[B, W]`` of visual tokens, divided by their sum."""
    score = score * view.visual
    return score / (score.sum(1, keepdim=True) + 1e-8)
