"""A probe of the first layer chooses visual tokens before the language model runs (arXiv 2506.01097)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, decoder
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning

Scorer = Callable[[Tensor], Tensor]


@base.register("probe", paper="2506.01097", stage="between decoder layers, before the first")
@dataclass(frozen=True)
class Probe(Pruning):
    """Keeps the visual tokens that the question attends to in the first layer, or what a scorer makes of it.

    Queries and keys of layer 0 are made of the whole prompt; the attention of the text behind the first image
    to each of n visual tokens, a mean over heads and rows, is ``scorer``'s input ``[n]`` and its answer the
    score; without a scorer the attention itself is. ``round(keep n)`` tokens enter the first layer. The
    paper's scorer is a small trained network whose weights are not public: any callable goes here;
    ``relevance_rollout`` gives the targets it learns.
    """

    keep: float = field(default=0.5, metadata={"help": "ratio of visual tokens kept, or their count"})
    scorer: Scorer | None = field(default=None, metadata={"help": "attention [n] -> scores [n]; None: it"})

    def __post_init__(self) -> None:
        base.check_keep("Probe", self.keep)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``."""
        return (-1,)

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``. Raises ValueError where the scorer's answer has another shape."""
        rows = torch.where(view.text.any(1, keepdim=True), view.text, view.last)
        score = decoder.mean_over(rows, view.next().received(rows)[:, 0])
        if self.scorer is not None:
            pairs = zip(score, view.visual, strict=True)
            score = torch.stack([self._scored(attention, visual) for attention, visual in pairs])
        return DecoderKeep(decoder.best(view, score, decoder.budgets(view, self.keep)))

    def _scored(self, attention: Tensor, visual: Tensor) -> Tensor:
        assert self.scorer is not None
        given = attention[visual]
        found = self.scorer(given).float() if len(given) else given
        if found.shape != given.shape:
            raise ValueError(
                f"Probe: scorer must give one number for each of {len(given)} tokens, got {list(found.shape)}"
            )
        return torch.zeros_like(attention).masked_scatter(visual, found)


def relevance_rollout(attention: Sequence[Tensor], gradient: Sequence[Tensor]) -> Tensor:
    """What each token owes to each other one: ``[L, L]``, of one answer.

    ``R = I``, then for every layer ``R <- R + mean_h((A * G)^+) R``, with attention probabilities A ``[H, L,
    L]`` and G the gradient of the answer's logit by them. The last row's visual columns, averaged over the
    answer's tokens, are the relevance of visual tokens; eager attention with gradients gives A and G.

    Args:
        attention: A of every layer, in order.
        gradient: G of every layer.

    Raises ValueError where there are not as many of both, or shapes differ.
    """
    if len(attention) != len(gradient) or not attention:
        raise ValueError(
            "relevance_rollout: attention and gradient must be equally many layers, got "
            f"{len(attention)} and {len(gradient)}"
        )
    tokens = attention[0].shape[-1]
    relevance = torch.eye(tokens, dtype=attention[0].dtype, device=attention[0].device)
    for number, (a, g) in enumerate(zip(attention, gradient, strict=True)):
        if a.shape != g.shape or a.shape[-2:] != (tokens, tokens):
            raise ValueError(
                f"relevance_rollout: layer {number} must have two of [H, {tokens}, {tokens}], got "
                f"{list(a.shape)} and {list(g.shape)}"
            )
        relevance = relevance + (a * g).clamp(min=0).mean(0) @ relevance
    return relevance
