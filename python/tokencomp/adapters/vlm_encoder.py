"""What the vision encoder of a vision-language model attended with, for methods that look at it."""

from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.families import special_tokens
from tokencomp.adapters.patch import Patches
from tokencomp.adapters.vit_attention import show_attention
from tokencomp.visual_attention import Seen, SeenEncoder


class _Layer:
    """Stands where ``vit_attention`` expects a stack and its run: it remembers queries and keys."""

    reduced = False

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    @property
    def run(self) -> "_Layer":
        return self

    def saw(self, query: Tensor, key: Tensor, scaling: float | None, value: Tensor | None = None) -> None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.seen.append((query.detach(), key.detach(), scale))


class EncoderLook:
    """Looks on while a tower of attention layers, and the projector behind it, run.

    Args:
        tower: the vision encoder.
        projector: what makes language-model embeddings of its features.
        wanted: layers to look at, given their number.
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, wanted: Any) -> None:
        self.projector = projector
        self.attentions = [m for m in tower.modules() if is_vision_attention(m)]
        self.layers = len(self.attentions)
        self.cut: Any = None  # vlm_cut.Cut, where a method leaves patches out of the tower
        inner: Any = tower if hasattr(tower, "embeddings") else getattr(tower, "vision_model", tower)
        embeddings = getattr(inner, "embeddings", None)  # one level below before transformers 5.23
        self.prefix = 0 if embeddings is None else special_tokens(embeddings)
        self._layers = {layer: _Layer() for layer in sorted(set(wanted(self.layers)))}
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def attach(self, patches: Patches) -> None:
        """Patch the layers."""
        for number, layer in self._layers.items():
            show_attention(patches, self.attentions[number], layer)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._input, self._output = args[0].detach(), output.detach()

        patches.hook(self.projector.register_forward_hook, after)
        for handle in [] if self.cut is None else self.cut.attach(patches):
            patches.keep(handle)

    def projected(self) -> Tensor | None:
        """What the projector gave last."""
        return self._output

    def taken(self) -> SeenEncoder:
        """What was seen since the last time, of crops in one batch; forgets it."""
        seen = {number: layer.seen[-1] for number, layer in self._layers.items() if layer.seen}
        encoder = SeenEncoder(self.layers, self.prefix, self.projector, seen, self._input)
        if self.cut is not None:
            encoder.left = self.cut.survivors()
            encoder.present = {number: self.cut.entering(number) for number in self._layers}
        self._forget()
        return encoder

    def taken_by_image(self, grids: list[tuple[int, int]]) -> list[SeenEncoder]:
        """The same where every layer attends frame by frame: of each image or video with so many frames of so
        many patches, its frames as crops.

        Raises ValueError for a layer that attends in windows.
        """
        for number, layer in self._layers.items():
            chunks = [query.shape[2] for query, _, _ in layer.seen]
            whole = [patches for frames, patches in grids for _ in range(frames)]
            if self.cut is not None:
                whole = [patch.shape[1] for patch, _ in self.cut.entering(number) for _ in patch]
            if chunks != whole:
                raise ValueError(
                    f"compress: encoder layer {number} attends in windows, not to whole images; look at a "
                    "layer of full attention"
                )
        found, first = [], 0
        for frames, _ in grids:
            seen = {
                number: _joined(layer.seen[first : first + frames]) for number, layer in self._layers.items()
            }
            found.append(SeenEncoder(self.layers, self.prefix, self.projector, seen, None))
            if self.cut is not None:
                image = len(found) - 1
                found[-1].left = self.cut.survivors()[image]
                found[-1].present = {number: self.cut.entering(number)[image] for number in self._layers}
            first += frames
        self._forget()
        return found

    def _forget(self) -> None:
        self._input = self._output = None
        for layer in self._layers.values():
            layer.seen.clear()


def is_vision_attention(module: nn.Module) -> bool:
    """Whether ``module`` calls the attention interface for patches."""
    apart = all(isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj"))
    fused = isinstance(getattr(module, "qkv", None), nn.Module)
    return (apart or fused) and getattr(module, "config", None) is not None


def _joined(frames: list[Seen]) -> Seen:
    return torch.cat([q for q, _, _ in frames]), torch.cat([k for _, k, _ in frames]), frames[0][2]
