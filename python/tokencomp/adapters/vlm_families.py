"""How vision-language models get from patches to visual tokens: one small class a way.

To add one, write a ``Way`` with ``matches``, ``look`` and ``encoded`` and put it into ``WAYS``. A pass of the
encoder becomes ``Encoded`` images. Which rows of an image's packed tokens come from where is found by sending
numbers through the model's own reordering, so no model code is repeated.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tokencomp.adapters.vlm_cut import CropCut, square
from tokencomp.adapters.vlm_encoder import EncoderLook
from tokencomp.adapters.vlm_packed import PackedCut
from tokencomp.methods.encoder import EncoderMethod
from tokencomp.methods.visual import VisualMethod
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

    def kinds(self, base: Any) -> tuple[str, ...]:
        """Which of ``image`` and ``video`` it takes."""
        return ("image",)

    def look(self, base: Any, method: VisualMethod) -> EncoderLook:
        """What looks on while the encoder runs, and cuts where the method does."""
        look = EncoderLook(base.vision_tower, base.multi_modal_projector, method.looks_at)
        if cuts(method, look.layers):
            depth = base.config.vision_feature_layer
            last = max(d % (look.layers + 1) for d in (depth if isinstance(depth, list) else [depth])) - 1
            groups = self.groups(base)
            look.cut = CropCut(base.vision_tower, look.attentions, method, last, look.prefix, groups)
        return look

    def groups(self, base: Any) -> Callable[[int], Tensor] | None:
        """A function of the number of patches: ``[N, g]``, those of each token; None where each is one."""
        return None

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any], kind: str
    ) -> list[Encoded]:
        """What is in a pass, in order; ``given`` are the arguments of ``get_image_features`` (or video)."""
        x = torch.stack(features)
        images = [Image(f, [i], torch.arange(len(f), device=f.device)) for i, f in enumerate(features)]
        return [Encoded(look.taken(), x, square(x.shape[1]), images)]


class Tiled(Way):
    """LLaVA-NeXT: an overview and tiles, stitched, without their padding, a newline behind every row."""

    def matches(self, base: Any) -> bool:
        """See ``Way``."""
        return super().matches(base) and hasattr(base, "pack_image_features")

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any], kind: str
    ) -> list[Encoded]:
        """See ``Way``. Where the model resizes tiles, packed tokens are those of one crop without a grid."""
        x, encoder, sizes = look.projected(), look.taken(), given.get("image_sizes")
        if x is None or sizes is None:
            raise ValueError("compress: images of this model need image_sizes")
        counts = self._counts(base, sizes, x.shape[0], given.get("batch_num_images"))
        number = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[None, :, None]
        numbers = [number + torch.arange(c, device=x.device)[:, None, None] * x.shape[1] for c in counts]
        newline = torch.full((1,), -1.0, dtype=torch.float64, device=x.device)
        options = {
            name: given.get(name) or getattr(base.config, name)
            for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
            if name in inspect.signature(base.pack_image_features).parameters
        }
        packed, _ = base.pack_image_features(numbers, sizes, image_newline=newline, **options)
        images, first = [], 0
        for f, rows, count in zip(features, packed, counts, strict=True):
            source = rows.flatten().round().long()
            if len(source) != len(f) or not torch.equal(source.double(), rows.flatten()):
                return [joined(encoder, f) for f in features]
            crops = list(range(first, first + count))
            images.append(Image(f, crops, source, _layout(source, x.shape[1], count)))
            first += count
        return [Encoded(encoder, x, square(x.shape[1]), images, overview=True)]

    def _counts(self, base: Any, sizes: Any, total: int, together: Any) -> list[int]:
        """Crops of each image; ``together``: how many images each prompt has, several being one crop each."""
        function = getattr(sys.modules[_plain(base).__module__], "image_size_to_num_patches", None)
        if function is None:
            return [1] * total
        side = base.config.vision_config.image_size
        counts = [
            function(image_size=s, grid_pinpoints=base.config.image_grid_pinpoints, patch_size=side)
            for s in sizes
        ]
        if together is not None:
            alone = [n == 1 for n in together for _ in range(n)]
            counts = [count if single else 1 for count, single in zip(counts, alone, strict=True)]
        return counts if sum(counts) == total else [1] * total


class OneVision(Tiled):
    """LLaVA-OneVision: as LLaVA-NeXT; of a video, smaller maps of its frames, and a newline at its end."""

    def matches(self, base: Any) -> bool:
        """See ``Way``."""
        return super().matches(base) and hasattr(base, "apply_pooling")

    def kinds(self, base: Any) -> tuple[str, ...]:
        """See ``Way``."""
        return ("image", "video")

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any], kind: str
    ) -> list[Encoded]:
        """See ``Way``."""
        if kind == "image":
            return super().encoded(base, look, features, given, kind)
        if "pixel_values_videos" not in given:  # transformers 5.4 puts the newline elsewhere
            raise ValueError("compress: videos of LLaVA-OneVision need a newer transformers (5.23 works)")
        encoder, frames = look.taken(), int(given["pixel_values_videos"].shape[1])
        if encoder.left is not None:
            raise ValueError(
                "compress: frames of this model are made smaller behind the encoder; choose tokens there"
            )
        encoder.pool = base.apply_pooling
        tokens, x = (len(features[0]) - 1) // frames, torch.stack(features)
        source = torch.arange(len(features[0]), device=x.device)
        source[-1] = -1
        images = [Image(f, list(range(i * frames, (i + 1) * frames)), source) for i, f in enumerate(features)]
        return [Encoded(encoder, x[:, :-1].reshape(-1, tokens, x.shape[2]), square(tokens), images)]


class Shuffled(Way):
    """InternVL: two by two patches become one token."""

    def matches(self, base: Any) -> bool:
        """See ``Way``."""
        return super().matches(base) and hasattr(base, "pixel_shuffle")

    def groups(self, base: Any) -> Callable[[int], Tensor]:
        """See ``Way``: by the model's own reordering."""

        def of(patches: int) -> Tensor:
            side = round(patches**0.5)
            number = torch.arange(side * side, dtype=torch.float64).view(1, side, side, 1)
            groups = base.pixel_shuffle(number, scale_factor=base.config.downsample_ratio)
            return groups.reshape(-1, groups.shape[-1]).round().long()  # type: ignore[no-any-return]

        return of

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any], kind: str
    ) -> list[Encoded]:
        """See ``Way``."""
        found = super().encoded(base, look, features, given, kind)
        encoder = found[0].encoder
        patches = encoder.patches()
        if patches is not None:
            encoder.groups = self.groups(base)(patches).to(found[0].x.device)
        return found


class Packed(Way):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size, four patches a token; frames are crops."""

    parts = ("visual", "language_model")

    def kinds(self, base: Any) -> tuple[str, ...]:
        """See ``Way``."""
        return ("image", "video") if hasattr(base, "get_video_features") else ("image",)

    def look(self, base: Any, method: VisualMethod) -> EncoderLook:
        """See ``Way``."""
        look = EncoderLook(base.visual, base.visual.merger, method.looks_at)
        if cuts(method, look.layers):

            def groups(height: int, width: int) -> Tensor:
                return self._groups(base, (1, height, width), base.visual.spatial_merge_size)

            look.cut = PackedCut(base.visual, look.attentions, method, look.layers - 1, 0, groups)
        return look

    def encoded(
        self, base: Any, look: EncoderLook, features: list[Tensor], given: dict[str, Any], kind: str
    ) -> list[Encoded]:
        """See ``Way``: each by itself. Raises ValueError where a layer attends in windows."""
        grids = given["image_grid_thw" if "image_grid_thw" in given else "video_grid_thw"].tolist()
        merge = base.visual.spatial_merge_size
        encoders = look.taken_by_image([(t, h * w) for t, h, w in grids])
        found = []
        for (t, h, w), f, encoder in zip(grids, features, encoders, strict=True):
            encoder.groups = self._groups(base, (1, h, w), merge).to(f.device)
            image = Image(f, list(range(t)), torch.arange(len(f), device=f.device))
            x = f.view(t, -1, f.shape[1])
            found.append(Encoded(encoder, x, (h // merge, w // merge), [image]))
        return found

    def _groups(self, base: Any, grid: tuple[int, int, int], merge: int) -> Tensor:
        """``[n, merge * merge]``: the patches of each token, in the order in which layers have them."""
        patches = grid[0] * grid[1] * grid[2]
        groups = torch.arange(patches).view(-1, merge * merge)
        visual, sizes = base.visual, torch.tensor([grid])
        if hasattr(visual, "get_window_index"):  # before transformers 5.10 or so
            index = visual.get_window_index(sizes)[0]
        else:
            function = getattr(sys.modules[_plain(base).__module__], "get_vision_window_index", None)
            if function is None:
                return groups
            index = function(sizes, merge, visual.window_size, visual.patch_size)[0]
        index = torch.as_tensor(index)
        place = torch.empty_like(index)
        place[index] = torch.arange(len(index))
        return groups[place]


WAYS: tuple[Way, ...] = (Shuffled(), OneVision(), Tiled(), Way(), Packed())
FAMILIES = (
    "LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and others built like "
    "them"
)


def cuts(method: VisualMethod, layers: int) -> TypeGuard[EncoderMethod]:
    """Whether ``method`` leaves patches out of an encoder of so many layers."""
    return isinstance(method, EncoderMethod) and bool(method.cuts_after(layers - 1))


def way_of(base: nn.Module) -> Way | None:
    """How ``base`` makes visual tokens; None where it makes none that is known."""
    return next((way for way in WAYS if way.matches(base)), None)


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
