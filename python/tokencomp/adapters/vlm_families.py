"""How vision-language models get from patches to visual tokens: one small class a way.

A pass of the encoder becomes ``Encoded`` images. Which rows of an image's packed tokens come from where is
found by sending numbers through the model's own reordering, so no model code is repeated.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.vlm_encoder import EncoderLook
from tokencomp.visual_attention import SeenEncoder


@dataclass
class Image:
    """One image of a pass."""

    features: Tensor  # [n, C], as the model puts them into the prompt
    crops: list[int]  # its rows of the pass
    source: Tensor  # [n] int64: ``place in crops * N + token`` of each row, -1: a newline
    tiles: tuple[int, int] = (0, 0)  # rows and columns of the crops but the overview


@dataclass
class Encoded:
    """Images whose crops have equally many tokens."""

    encoder: SeenEncoder
    x: Tensor  # [M, N, C] behind the projector
    grid: tuple[int, int] | None
    images: list[Image]
    overview: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Way:
    """LLaVA-1.5 and others: every image is one crop, its tokens are the projector's rows."""

    parts: tuple[str, ...] = ("vision_tower", "multi_modal_projector", "language_model")

    def matches(self, base: Any) -> bool:
        """Whether ``base`` goes this way."""
        has = all(isinstance(getattr(base, part, None), nn.Module) for part in self.parts)
        return has and hasattr(base, "get_image_features") and hasattr(base, "get_placeholder_mask")

    def look(self, base: Any, wanted: Any) -> EncoderLook:
        """What looks on while the encoder runs."""
        return EncoderLook(base.vision_tower, base.multi_modal_projector, wanted)

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any]
    ) -> list[Encoded]:
        """The images of a pass, in order; ``given`` are the arguments of ``get_image_features``."""
        x = torch.stack(features)
        images = [Image(f, [i], torch.arange(len(f), device=f.device)) for i, f in enumerate(features)]
        return [Encoded(look.taken(), x, square(x.shape[1]), images)]


class Tiled(Way):
    """LLaVA-NeXT: an overview and tiles, stitched, without their padding, a newline behind every row."""

    def matches(self, base: Any) -> bool:
        """See ``Way``."""
        return super().matches(base) and hasattr(base, "pack_image_features")

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any]
    ) -> list[Encoded]:
        """See ``Way``. Where the model resizes tiles, packed tokens are those of one crop without a grid."""
        x, encoder, sizes = look.projected(), look.taken(), given.get("image_sizes")
        if x is None or sizes is None:
            raise ValueError("compress: images of this model need image_sizes")
        counts = self._counts(base, sizes, x.shape[0])
        number = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[None, :, None]
        numbers = [number + torch.arange(c, device=x.device)[:, None, None] * x.shape[1] for c in counts]
        newline = torch.full((1,), -1.0, dtype=torch.float64, device=x.device)
        strategy = given.get("vision_feature_select_strategy") or base.config.vision_feature_select_strategy
        packed, _ = base.pack_image_features(
            numbers, sizes, vision_feature_select_strategy=strategy, image_newline=newline
        )
        images, first = [], 0
        for f, rows, count in zip(features, packed, counts, strict=True):
            source = rows.flatten().round().long()
            if len(source) != len(f) or not torch.equal(source.double(), rows.flatten()):
                return [joined(encoder, f) for f in features]
            crops = list(range(first, first + count))
            images.append(Image(f, crops, source, _layout(source, x.shape[1], count)))
            first += count
        return [Encoded(encoder, x, square(x.shape[1]), images, overview=True)]

    def _counts(self, base: Any, sizes: Any, total: int) -> list[int]:
        function = getattr(sys.modules[_plain(base).__module__], "image_size_to_num_patches", None)
        if function is None:
            return [1] * total
        side = base.config.vision_config.image_size
        counts = [
            function(image_size=s, grid_pinpoints=base.config.image_grid_pinpoints, patch_size=side)
            for s in sizes
        ]
        return counts if sum(counts) == total else [1] * total


class Shuffled(Way):
    """InternVL: two by two patches become one token."""

    def matches(self, base: Any) -> bool:
        """See ``Way``."""
        return super().matches(base) and hasattr(base, "pixel_shuffle")

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any]
    ) -> list[Encoded]:
        """See ``Way``."""
        found = super().encoded(base, look, features, given)
        encoder = found[0].encoder
        patches = encoder.patches()
        if patches is not None:
            side = round(patches**0.5)
            number = torch.arange(side * side, dtype=torch.float64).view(1, side, side, 1)
            groups = base.pixel_shuffle(number, scale_factor=base.config.downsample_ratio)
            encoder.groups = groups.reshape(-1, groups.shape[-1]).round().long().to(found[0].x.device)
        return found


class Packed(Way):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size, four patches a token."""

    parts = ("visual", "language_model")

    def look(self, base: Any, wanted: Any) -> EncoderLook:
        """See ``Way``."""
        return EncoderLook(base.visual, base.visual.merger, wanted)

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any]
    ) -> list[Encoded]:
        """See ``Way``: each image by itself. Raises ValueError where a layer attends in windows."""
        grids, merge = given["image_grid_thw"].tolist(), base.visual.spatial_merge_size
        encoders = look.taken_by_image([t * h * w for t, h, w in grids])
        found = []
        for (t, h, w), f, encoder in zip(grids, features, encoders, strict=True):
            encoder.groups = self._groups(base, (t, h, w), merge, f.device)
            grid = (h // merge, w // merge) if t == 1 else None
            image = Image(f, [0], torch.arange(len(f), device=f.device))
            found.append(Encoded(encoder, f[None], grid, [image]))
        return found

    def _groups(self, base: Any, grid: tuple[int, int, int], merge: int, device: torch.device) -> Tensor:
        """``[n, merge * merge]``: the patches of each token, in the order in which layers have them."""
        patches = grid[0] * grid[1] * grid[2]
        groups = torch.arange(patches, device=device).view(-1, merge * merge)
        visual, sizes = base.visual, torch.tensor([grid], device=device)
        if hasattr(visual, "get_window_index"):  # before transformers 5.10 or so
            index = visual.get_window_index(sizes)[0]
        else:
            function = getattr(sys.modules[_plain(base).__module__], "get_vision_window_index", None)
            if function is None:
                return groups
            index = function(sizes, merge, visual.window_size, visual.patch_size)[0]
        index = torch.as_tensor(index, device=device)
        place = torch.empty_like(index)
        place[index] = torch.arange(len(index), device=device)
        return groups[place]


WAYS: tuple[Way, ...] = (Shuffled(), Tiled(), Way(), Packed())
FAMILIES = "LLaVA-1.5, LLaVA-NeXT, InternVL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and others built like them"


def way_of(base: nn.Module) -> Way | None:
    """How ``base`` makes visual tokens; None where it makes none that is known."""
    return next((way for way in WAYS if way.matches(base)), None)


def square(tokens: int) -> tuple[int, int] | None:
    """The grid of so many tokens, if they are a square."""
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None


def _layout(source: Tensor, tokens: int, crops: int) -> tuple[int, int]:
    """Rows and columns of the tiles: how many crops the first stitched row of tokens runs through."""
    if crops == 1:
        return 0, 0
    behind = source[tokens:]
    line = behind[: int((behind < 0).nonzero()[0])] if bool((behind < 0).any()) else behind
    columns = max(1, len((line // tokens).unique()))
    return max(1, (crops - 1) // columns), columns


def joined(encoder: SeenEncoder, features: Tensor) -> Encoded:
    """An image whose tokens cannot be told apart by crop."""
    encoder.forget("tiles were resized, so attention of the encoder cannot be given to tokens")
    image = Image(features, [0], torch.arange(len(features), device=features.device))
    return Encoded(encoder, features[None], None, [image])


def _plain(module: nn.Module) -> type:
    from tokencomp.adapters.patch import original_class

    return original_class(module)
