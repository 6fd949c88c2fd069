"""ZOO-Prune: visual tokens the projector is sensitive to, far from one another (arXiv 2509.24837)."""

from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, min_max

_products: WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = WeakKeyDictionary()


@base.register("zoo_prune", paper="2509.24837", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class ZOOPrune:
    """Farthest-first traversal of projected tokens, distances weighted by how the projector reacts.

    Sensitivity ``S_i = (1 / m) sum_j |M(x_i + h u_j) - M(x_i - h u_j)| / (2 h)`` over m unit directions that
    all tokens share, M the projector and x its input; ``w`` is S scaled to [0, 1] over the tokens of an
    image. The first token has the largest w, each next one the largest ``w_i min_c (1 - cos(z_i, z_c))`` over
    kept c, z behind the projector. ``round(keep n)`` of an image (the paper: the same quota for each crop,
    ``per_crop``). Everything is computed in float32: in half precision a step of 0.01 is half rounding.

    ``directions=None`` is ours: all of them at once, ``S_i = |J_i| / sqrt(d)`` with the Frobenius norm of M's
    derivative at ``x_i`` and d its inputs, the root of the mean square in place of the mean. Of a projector
    ``W2 act(W1 x + b)`` it is ``sqrt(s Q s / d)``, ``s = act'(W1 x + b)`` and ``Q = (W1 W1^T) (W2^T W2)``
    element by element, made once: one product a token instead of ``2 m`` projections.
    """

    keep: float = field(default=0.1111, metadata={"help": "ratio of tokens kept, or their count"})
    directions: int | None = field(
        default=64, metadata={"help": "m, random directions; None: all, where the projector is two layers"}
    )
    step: float = field(default=0.01, metadata={"help": "h, length of a step"})
    seed: int = field(default=0, metadata={"help": "of the directions"})
    quota: Literal["image", "per_crop"] = field(
        default="per_crop", metadata={"help": "whether crops share the budget of their image"}
    )

    def __post_init__(self) -> None:
        base.check_keep("ZOOPrune", self.keep)
        if (self.directions is not None and self.directions < 1) or not self.step > 0:
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
        features = view.encoder.features().float()
        if self.directions is None:
            return exact_sensitivity(view.encoder.projector, features)
        generator = torch.Generator().manual_seed(self.seed)
        u = torch.randn(self.directions, features.shape[2], generator=generator).to(features.device)
        u = torch.nn.functional.normalize(u, dim=1)
        total = features.new_zeros(features.shape[:2], dtype=torch.float32)
        for direction in u:
            ahead, behind = (view.encoder.project(features + h * direction) for h in (self.step, -self.step))
            total += (ahead.float() - behind.float()).norm(dim=2)
        return total / (2 * self.step * self.directions)


def exact_sensitivity(projector: Any, features: Tensor) -> Tensor:
    """``[M, N]``: ``|J| / sqrt(d)``, J the derivative of ``projector`` at ``features`` ``[M, N, d]``.

    Raises ValueError unless it is a linear layer, an activation and a linear layer.
    """
    modules = list(projector.modules()) if isinstance(projector, nn.Module) else []
    leaves: list[Any] = [module for module in modules if not list(module.children())]
    kinds = [isinstance(leaf, nn.Linear) for leaf in leaves]
    if kinds != [True, False, True] or list(leaves[1].parameters()):
        found = [type(leaf).__name__ for leaf in leaves] or type(projector).__name__
        raise ValueError(
            "ZOOPrune: directions=None needs a projector of a linear layer, an activation, a linear layer; "
            f"give a number for one of {found}"
        )
    first, activation, second = leaves
    both = _product(projector, first.weight, second.weight, features.dtype)
    with torch.inference_mode(False), torch.enable_grad():
        weight = first.weight.detach().to(features.dtype)
        bias = None if first.bias is None else first.bias.detach().to(features.dtype)
        inner = nn.functional.linear(features.clone(), weight, bias).detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(inner).sum(), inner)
    square: Tensor = torch.einsum("mnh,mnh->mn", slope @ both, slope)
    norm: Tensor = square.clamp(min=0).div(features.shape[-1]).sqrt()
    return norm


def _product(projector: nn.Module, first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """``(W1 W1^T) (W2^T W2)`` ``[h, h]``; kept, as it takes longer than the rest, until weights change."""
    state = [(t.data_ptr(), 0 if t.is_inference() else t._version, t.device, dtype) for t in (first, second)]
    known = _products.get(projector)
    if known is None or known[0] != state:
        before, behind = first.detach().to(dtype), second.detach().to(dtype)
        known = _products[projector] = (state, (before @ before.T) * (behind.T @ behind))
    return known[1]


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
