"""What a method on visual tokens sees between the vision encoder and the language model, and what it answers.

Images come as crops: one image is one crop, or an overview (thumbnail) and its tiles, or the frames of a
video. All crops of a batch have N tokens, in raster order of ``grid``. Methods know tensors and
``tokencomp.ops`` only; adapters (``adapters.vlm``) know models.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.methods import base


class Encoder(Protocol):
    """What the vision encoder computed for M crops; layers count from 0, negative ones from the end.

    Only layers that a method announced in ``looks_at`` are known. Tensors have no entry for CLS and other
    tokens that are not patches.
    """

    @property
    def layers(self) -> int:
        """Their number L."""

    @property
    def has_cls(self) -> bool:
        """Whether there is a CLS token; without one ``cls`` is ``columns``."""

    def cls(self, layer: int) -> Tensor:
        """``[M, N]`` float32: softmax attention of CLS to the patches, a mean over heads."""

    def logits(self, layer: int) -> Tensor:
        """``[M, N]`` float32: the scaled products behind it, a mean over heads."""

    def columns(self, layer: int) -> Tensor:
        """``[M, N]`` float32: attention a patch receives, a mean over heads and all queries."""

    def keys(self, layer: int) -> Tensor:
        """``[M, H, N, D]``: keys as the layer attends with them."""

    def cls_query(self, layer: int) -> tuple[Tensor, Tensor]:
        """The query of CLS, ``[M, H, D]``, and its own key; without CLS the mean query and none, ``[M, H, 0,
        D]``.
        """

    def features(self) -> Tensor:
        """``[M, N, Cv]``: what the projector gets."""

    @property
    def projector(self) -> Any:
        """The module that makes embeddings of them."""

    def project(self, features: Tensor) -> Tensor:
        """The projector, on ``[..., Cv]``, in the dtype of ``features``."""

    def survivors(self) -> Tensor:
        """``[M, K]`` int32, ascending, then -1: the tokens that an ``EncoderMethod`` left."""


@dataclass
class VisualView:
    """The visual tokens of M crops on their way into the prompt."""

    x: Tensor  # [M, N, C], as the language model would get them
    encoder: Encoder
    grid: tuple[int, int] | None = None  # rows and columns, N their product
    images: Sequence[int] = ()  # crops of each image, summing to M; empty: one each
    overview: bool = False  # whether the first of an image's several crops shows all of it
    tiles: Sequence[tuple[int, int]] = ()  # of each image: rows and columns of its crops but the overview
    text: Tensor | None = None  # [images, T, C] embeddings of the prompt's text
    text_mask: Tensor | None = None  # [images, T] bool, None: all count
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Crops of each image."""
        return list(self.images) or [1] * self.x.shape[0]

    def owner(self) -> Tensor:
        """``[M]`` int64: the image of each crop."""
        counts = torch.tensor(self.counts)
        return torch.arange(len(counts)).repeat_interleave(counts).to(self.x.device)

    def by_image(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``values`` ``[M, N, ...]`` with the crops of an image side by side, ``[images, n, ...]``, zeros
        behind the last, and how many entries are real, ``[images]`` int32.
        """
        counts, tokens = self.counts, values.shape[1]
        joined = values.new_zeros(len(counts), max(counts) * tokens, *values.shape[2:])
        for image, crops in enumerate(values.split(counts)):
            joined[image, : crops.shape[0] * tokens] = crops.flatten(0, 1)
        lengths = torch.tensor([count * tokens for count in counts], dtype=torch.int32, device=values.device)
        return joined, lengths

    def to_crops(self, index: Tensor) -> Tensor:
        """Tokens ``index`` ``[images, K]`` of joined crops, -1: none, as tokens of each crop: ``[M, W]``
        int32, ascending, then -1.
        """
        tokens, first = self.x.shape[1], 0
        mask = torch.zeros(self.x.shape[0], tokens, dtype=torch.bool, device=index.device)
        for image, count in enumerate(self.counts):
            kept = ragged.kept_mask(index[image : image + 1], count * tokens)
            mask[first : first + count] = kept.view(count, tokens)
            first += count
        return of_mask(mask)


@dataclass(frozen=True)
class VisualKeep:
    """The tokens of each crop that go on, in raster order."""

    index: Tensor  # [M, K] int32, ascending, then -1
    x: Tensor | None = None  # [M, K, C] what they have become; None: what they were
    key: Tensor | None = None  # [M, K] bool, those that a method between decoder layers is told of


@runtime_checkable
class VisualMethod(Protocol):
    """Chooses visual tokens between encoder and language model. Immutable."""

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """Layers of an encoder of so many whose attention it looks at, from 0."""

    def choose(self, view: VisualView) -> VisualKeep:
        """What goes on."""


def at_layer(method: str, layer: int, layers: int) -> int:
    """``layer``, from the end where negative, as a number from 0. Raises ValueError where there is none."""
    if not -layers <= layer < layers:
        raise ValueError(f"{method}: layer must be in [-{layers}, {layers}) for this encoder, got {layer}")
    return layer % layers


def best(score: Tensor, counts: int | Sequence[int], *, keep: Tensor | None = None) -> Tensor:
    """The ``counts[m]`` largest of ``score`` ``[M, N]``, ``keep`` ``[M, N]`` first: ``[M, K]`` int32
    ascending, then -1. Ties: the lower token; NaN: last.
    """
    rows = score.shape[0]
    numbers = [counts] * rows if isinstance(counts, int) else list(counts)
    per_row = torch.tensor(numbers, dtype=torch.int32, device=score.device)
    index, _ = ops.topk_select(score.float().contiguous(), max([1, *numbers]), k_per_row=per_row, keep=keep)
    return index


def of_mask(mask: Tensor) -> Tensor:
    """``[M, K]`` int32: the tokens that ``mask`` ``[M, N]`` names, ascending, then -1; K >= 1."""
    width = max(1, int(mask.sum(1).max())) if mask.numel() else 1
    return ragged.compact_rows(mask, width)[0]


def unit(x: Tensor) -> Tensor:
    """``x`` float32 with rows of length 1; zero rows stay."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def min_max(score: Tensor) -> Tensor:
    """``score`` ``[M, N]`` scaled to [0, 1] in each row; a constant row is all ones."""
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    return torch.where(high > low, (score - low) / (high - low).clamp(min=1e-12), torch.ones_like(score))


def merged_into(x: Tensor, index: Tensor, target: Tensor, member: Tensor) -> Tensor:
    """``[M, K, C]``: each kept token ``index`` ``[M, K]`` of ``x`` ``[M, N, C]`` as the mean of itself and
    the tokens ``member`` ``[M, N]`` bool whose ``target`` ``[M, N]`` is its rank in ``index``.
    """
    token_map = torch.where(member, target.int(), ragged.position_map(index, x.shape[1]))
    return ops.merge_tokens(x, token_map, index.shape[1])[0]


class TopScore(ABC):
    """The body of methods that keep, in each crop, the tokens of largest score."""

    keep: float

    @abstractmethod
    def score(self, view: VisualView) -> Tensor:
        """``[M, N]`` float32."""

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        return VisualKeep(best(self.score(view), base.budget(self.keep, view.x.shape[1])))
