"""What a method that works between attention and MLP sees of a layer, and what it gives back.

An adapter shows every encoder layer's tokens as a ``LayerView`` and goes on with the ``Reduced`` tokens that
``LayerMethod.reduce`` returns. Methods know tensors and ``tokencomp.ops`` only; adapters know models only.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Metric = Literal["keys", "tokens"]


@dataclass(frozen=True)
class LayerView:
    """One encoder layer between its attention and its MLP, residual added.

    All items of a batch have the same number N of tokens here; ``N0`` is the number the encoder began with,
    the ``prefix`` tokens (CLS, distillation, registers) included in both. Prefix tokens come first, keep
    their places and are never merged, merged into, or dropped.
    """

    layer: int  # 0-based
    layers: int  # of the encoder
    x: Tensor  # [B, N, C], the residual stream
    q: Tensor  # [B, H, N, D], as this layer's attention used it
    k: Tensor  # [B, H, N, D]
    scale: float  # of the logits, q . k * scale
    size: Tensor | None  # [B, N] float32, input tokens each stands for; None: one each
    source: Tensor  # [B, N0] int32, the token each input token went into, -1 where it was dropped
    prefix: int = 1
    distill: bool = False  # the second prefix token is a distillation token
    grid: tuple[int, int] | None = None  # rows, columns of the N0 - prefix patches
    mask: Tensor | None = None  # [B, N] bool, False at padding; None: no padding
    state: dict[str, Any] = field(default_factory=dict)  # of this forward pass; what a method leaves it finds

    @property
    def tokens(self) -> int:
        return self.x.shape[1]

    def metric(self) -> Tensor:
        """``[B, N, D]`` float32: the mean of the keys over heads, the usual feature for matching."""
        return self.k.float().mean(dim=1)

    def features(self, name: Metric) -> Tensor:
        """``[B, N, D]``, what a method compares: ``metric()`` or the tokens ``x``."""
        return self.metric() if name == "keys" else self.x

    def sizes(self) -> Tensor:
        """``[B, N]`` float32, ones where no size is tracked yet."""
        if self.size is not None:
            return self.size
        return torch.ones(self.x.shape[:2], dtype=torch.float32, device=self.x.device)

    def key_bias(self) -> Tensor | None:
        """``[B, N]`` float32, what proportional attention adds to the logits: ``log size``."""
        return None if self.size is None else self.size.log()


@dataclass(frozen=True)
class Reduced:
    """The tokens a layer goes on with."""

    x: Tensor  # [B, M, C]
    size: Tensor | None  # [B, M] float32; None: sizes are not tracked
    token_map: Tensor  # [B, N] int32, row of ``x`` each token went into, -1 where it was dropped


@runtime_checkable
class LayerMethod(Protocol):
    """A method between attention and MLP of an encoder's layers."""

    @property
    def proportional(self) -> bool:
        """Whether the attention of later layers adds ``log size`` to its logits."""

    def begin(self, x: Tensor, prefix: int, grid: tuple[int, int] | None, state: dict[str, Any]) -> None:
        """Called once per forward pass with the tokens ``[B, N0, C]`` that enter the first layer."""

    def reduce(self, view: LayerView) -> Reduced | None:
        """The tokens to go on with, or None to leave the layer as it is (then it is bit-identical)."""


class Stateless:
    """Base of the layer methods that prepare nothing before the first layer."""

    def begin(self, x: Tensor, prefix: int, grid: tuple[int, int] | None, state: dict[str, Any]) -> None:
        """Nothing to prepare."""
