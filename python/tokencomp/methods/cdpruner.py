"""CDPruner: relevant visual tokens that differ, by a determinantal point process (arXiv 2506.10967)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, min_max, unit

Relevance = Callable[[VisualView], Tensor]


@base.register("cdpruner", paper="2506.10967", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class CDPruner:
    """Greedy MAP of the kernel ``diag(r) cos(X) diag(r)``, r the relevance of a token to the text.

    Each step takes the token of largest ``d_j^2`` (its own part that the kept ones do not span), with ``e =
    (K_j - sum_t c_t[j] c_t) / d_j`` and ``d^2 <- d^2 - e^2``. ``round(keep n)`` of the n tokens of an image,
    all crops together.

    The paper's relevance is ``-cos`` of CLIP-projected patches and CLIP's text tower, scaled to [0, 1]; most
    language models do not come with that tower, so ``relevance`` is a callable ``view -> [M, N]``. Without
    one it is the mean cosine of a token to the embeddings of the prompt's text, or 1 without text (plain
    DPP): both departures.
    """

    keep: float = field(default=0.1, metadata={"help": "ratio of tokens kept of an image, or their count"})
    relevance: Relevance | None = field(default=None, metadata={"help": "view -> [M, N]; None: see above"})

    def __post_init__(self) -> None:
        base.check_keep("CDPruner", self.keep)

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        given = text_cosine(view) if self.relevance is None else self.relevance(view)
        x, lengths = view.by_image(view.x)
        score, _ = view.by_image(torch.ones(view.x.shape[:2], device=x.device) if given is None else given)
        counts = base.budgets(self.keep, x, lengths)
        picks = torch.full((x.shape[0], max(counts)), -1, dtype=torch.int32, device=x.device)
        for i, (length, count) in enumerate(zip(lengths.tolist(), counts, strict=True)):
            weight = min_max(score[i : i + 1, :length].float())
            picks[i, :count] = dpp_picks(x[i : i + 1, :length], weight, count)[0]
        return VisualKeep(view.to_crops(picks))


def dpp_picks(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """``[M, count]`` int32 in the order of picking, from ``x`` ``[M, N, C]`` and ``weight`` ``[M, N]``.

    O(count N (C + count)) time and O(count N) memory beside x: kernel rows are made when they are needed.
    """
    scaled = unit(x) * weight[..., None]
    left = scaled.square().sum(2)
    open_ = torch.ones_like(left, dtype=torch.bool)
    basis = left.new_zeros(x.shape[0], count, x.shape[1])
    picks = []
    for step in range(count):
        pick = left.masked_fill(~open_, -torch.inf).argmax(1, keepdim=True)
        own = scaled.gather(1, pick[..., None].expand(-1, -1, scaled.shape[2]))
        kernel = (scaled @ own.mT)[..., 0]
        known = basis[:, :step]
        kernel = kernel - (known.gather(2, pick[:, None].expand(-1, step, -1)) * known).sum(1)
        e = kernel / left.gather(1, pick).clamp(min=1e-12).sqrt()
        basis[:, step] = e
        left = left - e.square()
        open_.scatter_(1, pick, False)
        picks.append(pick)
    return torch.cat(picks, 1).to(torch.int32)


def text_cosine(view: VisualView) -> Tensor | None:
    """``[M, N]``: the mean cosine of each token to the embeddings of its prompt's text; None without text."""
    if view.text is None or view.text.shape[1] == 0:
        return None
    text = unit(view.text)
    mask = (
        torch.ones(text.shape[:2], device=text.device) if view.text_mask is None else view.text_mask.float()
    )
    mean = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return (unit(view.x) @ mean[view.owner(), :, None])[..., 0]
