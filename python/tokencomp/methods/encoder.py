"""What a method that leaves patches out between the layers of a vision encoder sees, and what it answers.

Such a method is one on visual tokens as well: what the encoder still has at its end is what the language
model gets. Methods know tensors and ``tokencomp.ops`` only; adapters (``adapters.vlm_cut``) know models.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods.visual import VisualKeep, VisualView


@dataclass
class EncoderView:
    """M crops behind an encoder layer: P tokens such as CLS in front, then n patches, those of ``left``
    visual tokens.
    """

    layer: int  # from 0
    last: int  # the layer whose output becomes the features
    x: Tensor  # [M, P + n, C] output of the layer
    q: Tensor  # [M, H, P + n, D], as its attention used them
    k: Tensor
    v: Tensor
    scale: float
    prefix: int  # P
    tokens: int  # visual tokens a crop began with
    left: int  # of these, that are still there
    token: Tensor | None = None  # [M, n] int64 in [0, left): of each patch; None: each is one
    grid: tuple[int, int] | None = None  # rows and columns of the ``tokens``, whose order is by row
    scratch: dict[str, Any] = field(default_factory=dict)  # of this pass, for all layers

    def by_token(self, score: Tensor) -> Tensor:
        """``score`` ``[M, n]`` of patches as means over those of a token, ``[M, left]``."""
        if self.token is None:
            return score
        mean, _ = ops.merge_tokens(score[..., None], self.token, self.left)
        return mean[..., 0]

    def patches(self) -> Tensor:
        """``[M, left, g]`` int64: the patches of each token, ascending."""
        if self.token is None:
            return torch.arange(self.left, device=self.x.device).expand(self.x.shape[0], -1)[..., None]
        return self.token.sort(stable=True, dim=1).indices.view(self.x.shape[0], self.left, -1)


@dataclass(frozen=True)
class EncoderKeep:
    """The tokens that go on, where their patches are to become something else."""

    index: Tensor  # [M, K] int32, ascending, of those left
    x: Tensor  # [M, n', C] their patches, in the order in which the layer has them


@runtime_checkable
class EncoderMethod(Protocol):
    """Leaves patches out between encoder layers. Immutable; what it remembers is in ``view.scratch``."""

    def cuts_after(self, last: int) -> tuple[int, ...]:
        """Layers, of those before ``last``, behind which it looks on and may cut; from 0."""

    def cut(self, view: EncoderView) -> Tensor | EncoderKeep | None:
        """``[M, K]`` int32: which of the tokens left go on, ascending; None: all."""


class CutInEncoder:
    """The side of such a method that ``VisualMethod`` is: the language model gets what is left."""

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing at the end."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        return VisualKeep(view.encoder.survivors())


def first_query(view: EncoderView) -> Tensor:
    """``[M, H, 1, D]`` float32: the query of CLS, or without one the mean query."""
    if view.prefix:
        return view.q[:, :, :1].float()
    return view.q.float().mean(2, keepdim=True)


def softmax_row(query: Tensor, keys: Tensor, scale: float, prefix: int) -> Tensor:
    """``[M, n]`` float32: ``softmax(query . key * scale)``, a mean over heads, of the patches.

    Args:
        query: ``[M, H, 1, D]``. keys: ``[M, H, P + n, D]``.
    """
    row = torch.softmax((query.float() @ keys.float().mT) * scale, -1)
    return row[:, :, 0].mean(1)[:, prefix:]
