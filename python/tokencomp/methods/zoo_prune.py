"""ZOO-Prune: visual tokens the projector is sensitive to, far from one another (arXiv 2509.24837)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, min_max


@base.register("zoo_prune", paper="2509.24837", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class ZOOPrune:
    """Farthest-first traversal of projected tokens, distances weighted by how the projector reacts.

    Sensitivity ``S_i = (1 / m) sum_j |M(x_i + h u_j) - M(x_i - h u_j)| / (2 h)`` over m unit directions that
    all tokens share, M the projector and x its input; ``w`` is S scaled to [0, 1] over the tokens of an
    image. The first token has the largest w, each next one the largest ``w_i min_c (1 - cos(z_i, z_c))`` over
    kept c, z behind the projector. ``round(keep n)`` of an image (the paper: the same quota for each crop,
    ``per_crop``). Everything is computed in float32: in half precision a step of 0.01 is half rounding.
    """

    keep: float = field(default=0.1111, metadata={"help": "ratio of tokens kept, or their count"})
    directions: int = field(default=64, metadata={"help": "m, random directions"})
    step: float = field(default=0.01, metadata={"help": "h, length of a step"})
    seed: int = field(default=0, metadata={"help": "of the directions"})
    quota: Literal["image", "per_crop"] = field(
        default="per_crop", metadata={"help": "whether crops share the budget of their image"}
    )

    def __post_init__(self) -> None:
        base.check_keep("ZOOPrune", self.keep)
        if self.directions < 1 or not self.step > 0:
            raise ValueError(
                f"ZOOPrune: directions must be >= 1 and step > 0, got {self.directions!r} and {self.step!r}"
            )
        if self.quota not in ("image", "per_crop"):
            raise ValueError(f"ZOOPrune: quota must be image or per_crop, got {self.quota!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        score = self.sensitivity(view)
        if self.quota == "per_crop":
            picks = weighted_picks(view.x, score, base.budget(self.keep, view.x.shape[1]))
            return VisualKeep(base.ascending(picks))
        (x, lengths), (score, _) = view.by_image(view.x), view.by_image(score)
        counts = base.budgets(self.keep, x, lengths)
        picks = weighted_picks(x, score, max(counts), lengths)
        return VisualKeep(view.to_crops(base.first_picks(picks, counts)))

    def sensitivity(self, view: VisualView) -> Tensor:
        """``[M, N]`` float32."""
        features = view.encoder.features()
        generator = torch.Generator().manual_seed(self.seed)
        u = torch.randn(self.directions, features.shape[2], generator=generator).to(features.device)
        u = torch.nn.functional.normalize(u, dim=1)
        total = features.new_zeros(features.shape[:2], dtype=torch.float32)
        for direction in u:
            ahead, behind = (
                view.encoder.project(features.float() + h * direction) for h in (self.step, -self.step)
            )
            total += (ahead.float() - behind.float()).norm(dim=2)
        return total / (2 * self.step * self.directions)


def weighted_picks(x: Tensor, score: Tensor, count: int, lengths: Tensor | None = None) -> Tensor:
    """``[B, count]`` int32 in the order of picking, from ``x`` ``[B, N, C]`` and ``score`` ``[B, N]``."""
    token = torch.arange(x.shape[1], device=x.device)
    real = token < (x.shape[1] if lengths is None else lengths[:, None])
    low = score.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    weight = min_max(torch.where(real, score, low))
    index, _ = ops.kcenter_greedy(
        x, count, weight=weight, seed=base.best_token(weight, lengths), lengths=lengths
    )
    return index
