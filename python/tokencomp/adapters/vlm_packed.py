"""Fewer patches between the layers of vision encoders that hold all images one behind the other."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.vlm_cut import Crops, Cut


@dataclass
class PackedCut(Cut):
    """Encoders that hold the patches of all images as ``[S, C]`` and attend chunk by chunk: Qwen2-VL's,
    Qwen2.5-VL's and Qwen3-VL's. An image is cut by itself, frames of a video are crops of one. Where layers
    attend in windows, what is left of a window stays together, and empty ones are gone.
    """

    images: list[Crops] = field(default_factory=list)  # and videos
    patches: list[int] = field(default_factory=list)  # of each, in a frame, to begin with
    steps: list[list[Tensor]] = field(default_factory=list)  # of each layer and image [frames, n] that enter
    cut_yet: bool = False

    @property
    def begun(self) -> int:
        """Patches of the pass."""
        return sum(n * len(crops.patch) for n, crops in zip(self.patches, self.images, strict=True))

    def survivors(self) -> list[Tensor]:
        """Of each image ``[frames, K]`` int32."""
        return [crops.kept.int() for crops in self.images]

    def entering(self, layer: int) -> list[tuple[Tensor, int]]:
        """See ``Cut``."""
        return list(zip(self.steps[layer], self.patches, strict=True))

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sizes: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self.images, self.patches, self.steps, self.lengths, self.cut_yet = [], [], [], [], False
        merge = self.tower.spatial_merge_size
        for frames, height, width in sizes.tolist():
            token = self._token_of(height, width, device=sizes.device)
            grid = height // merge, width // merge
            self.patches.append(height * width)
            self.images.append(Crops.all(frames, height * width, token, sizes.device, grid))

    def _hooks(self, number: int, layer: nn.Module) -> list[Any]:
        return [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(functools.partial(self._after, number)),
        ]

    def _behind(self) -> list[Any]:
        mergers = [self.tower.merger, *(getattr(self.tower, "deepstack_merger_list", None) or [])]
        return [merger.register_forward_hook(self._whole) for merger in mergers]

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer for the patches left; sets that attend to themselves keep their own."""
        self.steps.append([crops.patch for crops in self.images])
        begun: Tensor = kwargs["cu_seqlens"]
        dense = begun.diff().tolist()
        if not self.cut_yet:
            self.lengths.append((dense, dense))
            return None
        patch = self._patch()
        ends = torch.searchsorted(patch, begun.to(patch)).unique_consecutive()
        self.lengths.append((ends.diff().tolist(), dense))
        kwargs = {**kwargs, "cu_seqlens": ends.to(begun)}
        if kwargs.get("max_seqlen") is not None:
            most = ends.diff().max()
            tensor = isinstance(kwargs["max_seqlen"], Tensor)
            kwargs["max_seqlen"] = most.to(kwargs["max_seqlen"]) if tensor else int(most)
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(t[patch] for t in kwargs["position_embeddings"])
        if kwargs.get("rotary_pos_emb") is not None:
            kwargs["rotary_pos_emb"] = kwargs["rotary_pos_emb"][patch]
        return args, kwargs

    def _after(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        watch = self.watches.get(number)
        if watch is None:
            return None
        *seen, scale = watch.taken()
        sizes = [crops.patch.numel() for crops in self.images]
        split = zip(output.split(sizes), *(t[0].split(sizes, 1) for t in seen), strict=True)
        found = []
        for crops, (x, *own) in zip(self.images, split, strict=True):
            frames = len(crops.patch)
            q, k, v = (t.unflatten(1, (frames, -1)).transpose(0, 1) for t in own)
            view = crops.view(number, self.last, x.unflatten(0, (frames, -1)), (q, k, v, scale), 0)
            shorter = crops.after(self.method, view)
            self.cut_yet = self.cut_yet or shorter is not None
            found.append(x if shorter is None else shorter.flatten(0, 1))
        return torch.cat(found) if self.cut_yet else None

    def _patch(self) -> Tensor:
        """``[S']`` int64, ascending: the patches left, among all of the pass."""
        first, found = 0, []
        for crops, n in zip(self.images, self.patches, strict=True):
            frame = torch.arange(len(crops.patch), device=crops.patch.device)[:, None]
            found.append((crops.patch + frame * n + first).flatten())
            first += len(frame) * n
        return torch.cat(found)

    def _whole(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """A row for every token again, zeros for those that are gone, in the order of the layers."""
        if not self.cut_yet:
            return None
        group = self.tower.spatial_merge_size**2
        token = self._patch().view(-1, group)[:, 0] // group
        whole = output.new_zeros(self.begun // group, output.shape[1])
        return whole.index_copy(0, token, output)
