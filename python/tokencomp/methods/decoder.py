"""What a method between the layers of a language model sees of a prompt with images, and what it answers.

Where a method stops a prompt, behind a decoder layer, it names the visual tokens that later layers get; text
always goes on. Rows are the tokens the layer had, W of them; columns are those of the prompt as it entered
the first layer. Methods know tensors and ``tokencomp.ops`` only; adapters (``adapters.vlm_decoder``) know
models.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base, visual
from tokencomp.methods.decoder_attention import PromptAttention

WATCHES = ("transition", "activation", "value")


class Transition(NamedTuple):
    """What a module of a layer made of its input, both ``[B, W, C]``."""

    before: Tensor  # behind its norm
    after: Tensor  # before it is added


@dataclass
class DecoderView:
    """A prompt behind a decoder layer."""

    layer: int  # from 0; -1: before the first
    layers: int
    x: Tensor  # [B, W, C] hidden states
    visual: Tensor  # [B, W] bool
    text: Tensor  # [B, W] bool, other tokens behind the first visual one
    column: Tensor  # [B, W] int64, of the prompt; -1: padding
    tokens: Sequence[int]  # visual tokens of each sequence in the first layer
    embeds: Tensor  # [B, W0, C] the prompt, as it entered the first layer
    attention: PromptAttention | None = None  # of this layer; None before the first
    following: Callable[[], PromptAttention] | None = None  # of the next layer, to these hidden states
    transition: tuple[Transition, Transition] | None = None  # of attention and MLP; see ``DecoderMethod``
    activation: Tensor | None = None  # [B, W, F] what the MLP projects down; see ``DecoderMethod``
    key: Tensor | None = None  # [B, W] bool: ``VisualKeep.key`` of the method before the first layer
    value: Tensor | None = None  # [B, Hkv, W, D] of this layer's attention; see ``DecoderMethod``
    scratch: dict[str, Any] = field(default_factory=dict)  # of this prompt, for all layers

    @property
    def real(self) -> Tensor:
        """``[B, W]`` bool: what is no padding."""
        return self.column >= 0

    @property
    def last(self) -> Tensor:
        """``[B, W]`` bool: the last token of each sequence."""
        return self.real & (self.column == self.column.amax(1, keepdim=True))

    @property
    def own(self) -> PromptAttention:
        """``attention``. Raises ValueError before the first layer."""
        if self.attention is None:
            raise ValueError("DecoderView: there is no layer before the first one to look at")
        return self.attention

    def next(self) -> PromptAttention:
        """What the next layer attends with to the hidden states as they are: its queries and keys."""
        if self.following is None:
            raise ValueError("DecoderView: there is no next layer to look at")
        return self.following()

    def by_column(self, values: Tensor) -> Tensor:
        """``values`` ``[B, W]`` where the prompt had them, ``[B, W0]``, 0 elsewhere."""
        wide = values.new_zeros(values.shape[0], self.embeds.shape[1] + 1)
        place = torch.where(self.real, self.column, self.embeds.shape[1])
        return wide.scatter(1, place, values)[:, :-1]

    def by_row(self, values: Tensor) -> Tensor:
        """``values`` ``[B, W0]`` of the prompt as rows, ``[B, W]``, 0 at padding."""
        return values.gather(1, self.column.clamp(min=0)) * self.real


@dataclass(frozen=True)
class DecoderKeep:
    """The visual tokens that later layers get."""

    keep: Tensor  # [B, W] bool; other tokens go on whatever it says
    x: Tensor | None = None  # [B, W, C] what kept visual tokens have become; None: what they were


@runtime_checkable
class DecoderMethod(Protocol):
    """Leaves visual tokens out between decoder layers, in prompts. Immutable; what it remembers of a prompt
    is in ``view.scratch``.
    """

    @property
    def watches(self) -> Collection[str]:
        """What views are to have beside attention, some of ``WATCHES``."""

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """Layers, of so many, behind which it is asked: in [-1, layers - 2], -1 being before the first.
        Raises ValueError where the model has too few.
        """

    def prune(self, view: DecoderView) -> DecoderKeep | None:
        """What goes on; None: everything."""

    def frees(self, layers: int) -> tuple[int, ...]:
        """Layers whose caches, after the prompt, give up what did not get to the last layer."""


class Pruning:
    """The plainest of everything."""

    @property
    def watches(self) -> Collection[str]:
        """See ``DecoderMethod``: nothing."""
        return ()

    def frees(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``: none."""
        return ()


def check_layers(method: str, name: str, layers: Sequence[int], low: int, high: int) -> None:
    """Raise ValueError unless ``layers``, one or more, are ascending in [low, high]."""
    if not layers or list(layers) != sorted(set(layers)) or not all(low <= layer <= high for layer in layers):
        raise ValueError(
            f"{method}: {name} must be ascending in [{low}, {high}] for this model, got {tuple(layers)}"
        )


def check_stages(method: str, keep: Sequence[float], layers: Sequence[int] | None) -> None:
    """Raise ValueError unless there are as many shares as layers, and they never grow."""
    for share in keep:
        base.check_keep(method, share)
    if not keep or (layers is not None and len(keep) != len(layers)):
        stages = "stages" if layers is None else f"{len(layers)} layers"
        raise ValueError(f"{method}: keep must have one entry for each of the {stages}, got {tuple(keep)}")
    if len({isinstance(share, int) for share in keep}) > 1 or list(keep) != sorted(keep, reverse=True):
        raise ValueError(f"{method}: keep must be counts or ratios that never grow, got {tuple(keep)}")


def budgets(view: DecoderView, keep: float) -> list[int]:
    """Visual tokens that each sequence keeps: ``keep``, a ratio or a count, of those in the first layer, and
    no more than there are.
    """
    left = view.visual.sum(1).tolist()
    return [min(base.budget(keep, max(1, n)), now) for n, now in zip(view.tokens, left, strict=True)]


def best(view: DecoderView, score: Tensor, counts: Sequence[int], *, always: Tensor | None = None) -> Tensor:
    """``[B, W]`` bool: the ``counts[b]`` visual tokens of largest ``score`` ``[B, W]``, those of ``always``
    ``[B, W]`` bool first. Ties: the lower row; NaN: last.
    """
    low = torch.finfo(torch.float32).min  # above -inf, which is for what is no visual token
    known = torch.where(score.isnan(), low, score.float()).clamp(min=low)
    must = None if always is None else always & view.visual
    index = visual.best(torch.where(view.visual, known, float("-inf")), counts, keep=must)
    return ragged.kept_mask(index, score.shape[1]) & view.visual


def mean_over(rows: Tensor, total: Tensor) -> Tensor:
    """``total`` ``[B, ...]``, a sum over ``rows`` ``[B, W]`` bool, as a mean; 0 without a row."""
    count = rows.sum(1).clamp(min=1).view(-1, *[1] * (total.dim() - 1))
    return total / count
