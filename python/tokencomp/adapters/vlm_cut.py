"""Fewer patches between the layers of the vision encoder of a vision-language model.

What an ``EncoderMethod`` cuts is really gone from later layers. Behind the encoder its rows are there again,
as zeros, so that a model packs and checks its visual tokens as ever; ``survivors`` says which rows count, and
only those go on.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.flops import tower_flops
from tokencomp.adapters.patch import Patches
from tokencomp.adapters.vit_attention import show_attention
from tokencomp.methods.encoder import EncoderKeep, EncoderMethod, EncoderView


class _Watch:
    """Stands where ``vit_attention`` expects a stack and its run: it keeps what one layer attended with."""

    reduced = False

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    @property
    def run(self) -> "_Watch":
        return self

    def saw(self, query: Tensor, key: Tensor, scaling: float | None, value: Tensor | None = None) -> None:
        assert value is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.seen.append((query.detach(), key.detach(), value.detach(), scale))

    def taken(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """``q``, ``k``, ``v`` of all calls side by side; forgets them."""
        parts, scale = list(zip(*self.seen, strict=True)), self.seen[0][3]
        self.seen.clear()
        q, k, v = (torch.cat(tensors, 2) for tensors in parts[:3])
        return q, k, v, scale


@dataclass
class Cut(ABC):
    """An encoder with a method between its layers; the base of the two ways encoders hold their patches.

    Attributes:
        tower: the encoder.
        attentions: those of its layers, in order.
        last: the layer whose output becomes the features.
        prefix: tokens in front of the patches of a crop.
        groups: a function of the number of patches, or of the rows and columns of their grid, that names
            those of each visual token, ``[N, g]``; None where each is one.
    """

    tower: Any
    attentions: list[nn.Module]
    method: EncoderMethod
    last: int
    prefix: int = 0
    groups: Callable[..., Tensor] | None = None
    watches: dict[int, _Watch] = field(default_factory=dict)
    layers: list[nn.Module] = field(default_factory=list)
    lengths: list[tuple[list[int], list[int]]] = field(default_factory=list)  # of a pass, layer by layer: the
    # tokens of each set that attended to itself, and those it would have had

    def attach(self, patches: Patches) -> list[Any]:
        """Patch the attention of the layers; returns hooks to remove at the end."""
        self.layers = layers_of(self.tower, self.attentions)
        self.watches = {number: _Watch() for number in self.method.cuts_after(self.last)}
        for number, watch in self.watches.items():
            show_attention(patches, self.attentions[number], watch)
        hooks = [self.tower.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for number, layer in enumerate(self.layers):
            hooks += self._hooks(number, layer)
        return hooks + self._behind()

    @abstractmethod
    def survivors(self) -> Any:
        """The visual tokens that got through the last pass: ``[M, K]`` int32, or a list of such."""

    @abstractmethod
    def entering(self, layer: int) -> Any:
        """The patches that entered ``layer``, ``[M, n]`` int64, and of how many, or a list of such."""

    def flops(self) -> tuple[int, int]:
        """Floating-point operations of the layers in the last pass, and those without a cut."""
        run = len(self.lengths)  # the model may leave the last ones out
        parts = list(zip(self.layers[:run], self.attentions[:run], self.lengths, strict=True))
        done = sum(tower_flops(layer, attention, lengths) for layer, attention, (lengths, _) in parts)
        dense = sum(tower_flops(layer, attention, lengths) for layer, attention, (_, lengths) in parts)
        return done, dense

    @abstractmethod
    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the tower's forward."""

    @abstractmethod
    def _hooks(self, number: int, layer: nn.Module) -> list[Any]:
        """On a layer."""

    @abstractmethod
    def _behind(self) -> list[Any]:
        """Hooks that put what is left into its places."""

    def _token_of(self, *size: int, device: torch.device) -> Tensor | None:
        """``[N]`` int64: the visual token of each patch of a crop of that size; None where each is one."""
        if self.groups is None:
            return None
        groups = self.groups(*size).to(device)
        number = torch.arange(len(groups), device=device)[:, None].expand_as(groups)
        return torch.empty_like(number.flatten()).scatter(0, groups.flatten(), number.flatten())


@dataclass
class Crops:
    """What is left of M crops while an encoder runs."""

    tokens: int  # that each began with
    token: Tensor | None  # [N] int64, of each patch it began with; None: each is one
    kept: Tensor  # [M, left] int64, visual tokens
    patch: Tensor  # [M, n] int64, patches
    grid: tuple[int, int] | None  # of the tokens
    scratch: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def all(
        cls, crops: int, patches: int, token: Tensor | None, device: torch.device, grid: Any = None
    ) -> "Crops":
        """Nothing is cut yet; ``grid`` is that of the tokens, where they are no square."""
        tokens = patches if token is None else int(token.max()) + 1
        kept, patch = (torch.arange(n, device=device).expand(crops, -1) for n in (tokens, patches))
        return cls(tokens, token, kept, patch, grid or square(tokens))

    def rank(self) -> Tensor | None:
        """``[M, n]``: the place of each patch's token among those left."""
        if self.token is None:
            return None
        return torch.searchsorted(self.kept.contiguous(), self.token[self.patch])

    def view(self, layer: int, last: int, x: Tensor, seen: Any, prefix: int) -> EncoderView:
        """Behind ``layer``, whose output is ``x`` ``[M, P + n, C]``."""
        q, k, v, scale = seen
        left = self.kept.shape[1]
        return EncoderView(
            layer, last, x, q, k, v, scale, prefix, self.tokens, left, self.rank(), self.grid, self.scratch
        )

    def after(self, method: EncoderMethod, view: EncoderView) -> Tensor | None:
        """The output of a layer without what ``method`` leaves out; None where that is nothing."""
        with torch.no_grad():
            keep = method.cut(view)
        if keep is None:
            return None
        index = keep.index if isinstance(keep, EncoderKeep) else keep
        row = self.cut(index) + view.prefix
        if isinstance(keep, EncoderKeep):
            return torch.cat([view.x[:, : view.prefix], keep.x.to(view.x.dtype)], 1)
        front = torch.arange(view.prefix, device=row.device).expand(len(row), -1)
        at = torch.cat([front, row], 1)[..., None].expand(-1, -1, view.x.shape[2])
        return view.x.gather(1, at)

    def cut(self, index: Tensor) -> Tensor:
        """Leaves only the tokens ``index`` ``[M, K]`` of those left; returns ``[M, n']``, their patches among
        those there were.
        """
        rank, index = self.rank(), index.long()
        row = index
        if rank is not None:
            stays = torch.zeros_like(self.kept, dtype=torch.bool).scatter(1, index, True).gather(1, rank)
            row = stays.nonzero()[:, 1].view(len(index), -1)
        self.kept, self.patch = self.kept.gather(1, index), self.patch.gather(1, row)
        return row


@dataclass
class CropCut(Cut):
    """Encoders that hold patches as ``[M, P + N, C]``: CLIP, SigLIP, ViT and InternVL's."""

    crops: Crops | None = None
    whole: int = 0  # tokens of a crop without a cut
    steps: list[Tensor] = field(default_factory=list)  # [M, n] patches before the first layer, behind each

    def survivors(self) -> Tensor:
        """``[M, K]`` int32."""
        assert self.crops is not None
        return self.crops.kept.int()

    def entering(self, layer: int) -> tuple[Tensor, int]:
        """See ``Cut``."""
        return self.steps[layer], self.whole - self.prefix

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.crops, self.steps, self.lengths = None, [], []

    def _hooks(self, number: int, layer: nn.Module) -> list[Any]:
        return [layer.register_forward_hook(functools.partial(self._after, number))]

    def _behind(self) -> list[Any]:
        return [self.tower.register_forward_hook(self._whole)]

    def _after(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        patches = x.shape[1] - self.prefix
        if self.crops is None:
            token = self._token_of(patches, device=x.device)
            self.crops = Crops.all(x.shape[0], patches, token, x.device)
            self.whole = x.shape[1]
            self.steps.append(self.crops.patch)
        self.lengths.append(([x.shape[1]] * len(x), [self.whole] * len(x)))
        watch, shorter = self.watches.get(number), None
        if watch is not None:
            view = self.crops.view(number, self.last, x, watch.taken(), self.prefix)
            shorter = self.crops.after(self.method, view)
        self.steps.append(self.crops.patch)
        if shorter is None:
            return None
        return (shorter, *output[1:]) if isinstance(output, tuple) else shorter

    def _whole(self, module: nn.Module, args: Any, output: Any) -> Any:
        """All rows again in the states a model may take its features from."""
        assert self.crops is not None
        count = len(self.crops.token) if self.crops.token is not None else self.crops.tokens
        output.last_hidden_state = self._spread(output.last_hidden_state, self.steps[-1:], count)
        if output.get("hidden_states") is not None:
            states = output.hidden_states
            output.hidden_states = tuple(
                x if x is None or depth == 0 else self._spread(x, self.steps[depth - 1 : depth + 1], count)
                for depth, x in enumerate(states)
            )
        return output

    def _spread(self, x: Tensor, steps: list[Tensor], count: int) -> Tensor:
        """``x`` in its places among ``prefix + count`` rows, zeros elsewhere.

        ``steps``: where it may be from, since a state is taken before or behind the hook that cuts.
        """
        patches = x.shape[1] - self.prefix
        patch = next((p for p in reversed(steps) if p.shape[1] == patches), None)
        if patch is None or patches == count:
            return x
        whole = x.new_zeros(x.shape[0], self.prefix + count, x.shape[2])
        whole[:, : self.prefix] = x[:, : self.prefix]
        at = (patch + self.prefix)[..., None].expand(-1, -1, x.shape[2])
        return whole.scatter(1, at, x[:, self.prefix :])


def layers_of(tower: nn.Module, attentions: list[nn.Module]) -> list[nn.Module]:
    """The layers of ``tower`` that hold ``attentions``, one each. Raises ValueError where there are none."""
    for module in tower.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != len(attentions):
            continue
        if all(a in set(layer.modules()) for a, layer in zip(attentions, module, strict=True)):
            return list(module)
    raise ValueError(
        f"compress: {type(tower).__name__} must have one list of layers with an attention each to leave "
        "patches out between them"
    )


def square(tokens: int) -> tuple[int, int] | None:
    """The grid of so many tokens, if they are a square."""
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None
