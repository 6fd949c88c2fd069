"""Patches of an image that a vision transformer drops behind its embeddings: the oracle of token selection.

- ``gathered``: the layers run on the special tokens and the kept patches alone.
- ``masked``: the layers run on all tokens, and no query sees the key of a dropped patch.

What the special tokens and the kept patches become is the same in both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.reference.kept_keys import Form

Select = Callable[[Tensor], Tensor]
"""``(x [B, N, C]) -> [B, K]`` kept tokens, ascending."""


@dataclass
class KeptTokens:
    """What became of the latest images."""

    total: int = 0  # tokens of an image
    index: Tensor | None = None  # [B, K] int64
    features: Tensor | None = None  # [B, N, C], what was selected from


@contextmanager
def kept_patches(model: Any, select: Select, *, form: Form = "gathered") -> Iterator[KeptTokens]:
    """Drop patches of ``model``, a Hugging Face ViT, while the context lasts; as before afterwards.

    ``select`` gets the patch embeddings with their positions added, without the special tokens in front
    (CLS, registers), which are always kept.

    Raises ValueError for an unknown form or a selection out of range or order, TypeError for a model without
    patch embeddings or layers.
    """
    if form not in ("gathered", "masked"):
        raise ValueError(f"kept_patches: form must be gathered or masked, got {form!r}")
    embeddings, layers = _parts(model)
    kept, patches, bias = KeptTokens(), [0], [torch.empty(0)]

    def count(module: Any, args: Any, output: Tensor) -> None:
        patches[0] = output.shape[1]

    def drop(module: Any, args: Any, output: Tensor) -> Tensor | None:
        prefix = output.shape[1] - patches[0]
        index = checked("kept_patches", select(output[:, prefix:]), output[:, prefix:])
        kept.total, kept.index, kept.features = patches[0], index, output[:, prefix:]
        if form == "gathered":
            rest = output[:, prefix:].gather(1, index[..., None].expand(-1, -1, output.shape[2]))
            return torch.cat([output[:, :prefix], rest], dim=1)
        bias[0] = output.new_full((len(output), 1, 1, output.shape[1]), float("-inf"))
        bias[0][..., :prefix] = 0
        bias[0].scatter_(3, index[:, None, None] + prefix, 0.0)
        return None

    def hide(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if given is not None:
            raise ValueError("kept_patches: form='masked' takes no attention_mask of the caller")
        return (args[0],), kwargs | {"attention_mask": bias[0]}

    hooks = [
        embeddings.patch_embeddings.register_forward_hook(count),
        embeddings.register_forward_hook(drop),
    ]
    if form == "masked":
        hooks += [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def checked(name: str, index: Tensor, x: Tensor) -> Tensor:
    """``index`` as int64, if it is ``[B, K]`` of ascending tokens of ``x`` ``[B, N, C]``; else ValueError."""
    index = index.to(x.device, torch.int64)
    batch, total = x.shape[:2]
    if index.ndim != 2 or len(index) != batch or index.shape[1] < 1:
        raise ValueError(f"{name}: selection must be [B={batch}, K >= 1], got {list(index.shape)}")
    if index.min() < 0 or index.max() >= total or not (index.diff(dim=1) > 0).all():
        raise ValueError(f"{name}: kept tokens must ascend within [0, N={total})")
    return index


def _parts(model: Any) -> tuple[Any, list[Any]]:
    """The module that embeds, and the layers behind it."""
    for module in model.modules():
        embeddings = getattr(module, "embeddings", None)
        if embeddings is not None and hasattr(embeddings, "patch_embeddings"):
            layers = getattr(module, "layers", None)
            if layers is None:  # transformers before 5.20 keeps them one level deeper
                layers = module.encoder.layer
            return embeddings, list(layers)
    raise TypeError(f"kept_patches: model must have patch embeddings, got {type(model).__name__}")
