"""SliME's selector: the visual tokens that hold a share of the similarity to the text (arXiv 2406.08487)."""

from dataclasses import dataclass, field

import torch

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, unit


@base.register("slime", paper="2406.08487", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class SliME:
    """The fewest tokens whose similarities to the text hold ``p`` of their softmax, and one more.

    ``s_i = sum_t cos(x_i, e_t)`` over the embeddings of the prompt's text, ``softmax(s / temperature)`` over
    all tokens of an image; kept are the largest n whose sum is at most p, plus one. How many is up to the
    text: a sum over more of it makes the softmax sharper. The rest of SliME is trained and not here.
    """

    p: float = field(default=0.95, metadata={"help": "share of the softmax that is kept, in (0, 1]"})
    temperature: float = field(default=1.0, metadata={"help": "of the softmax"})

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"SliME: p must be in (0, 1], got {self.p!r}")
        if not self.temperature > 0:
            raise ValueError(f"SliME: temperature must be > 0, got {self.temperature!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError where the prompt has no text."""
        if view.text is None or view.text.shape[1] == 0:
            raise ValueError("SliME: the prompt must have text, got none")
        x, lengths = view.by_image(view.x)
        mask = torch.ones(view.text.shape[:2], device=x.device) if view.text_mask is None else view.text_mask
        total = (unit(view.text) * mask[..., None]).sum(1)
        score = (unit(x) @ total[..., None])[..., 0] / self.temperature
        token = torch.arange(x.shape[1], device=x.device)
        share = score.masked_fill(token >= lengths[:, None], -torch.inf).softmax(1)
        ordered = share.sort(dim=1, descending=True, stable=True).values
        count = (ordered.cumsum(1) <= self.p).sum(1).add(1).minimum(lengths)
        index, _ = ops.topk_select(share, int(count.max()), k_per_row=count.to(torch.int32), lengths=lengths)
        return VisualKeep(view.to_crops(index))
