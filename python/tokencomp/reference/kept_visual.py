"""Visual tokens of a LLaVA-like model that are dropped behind its projector: the oracle of their selection.

The model embeds image and text as ever; then some visual tokens are left out. Everything that is left keeps
the position it had, and text that is appended later goes on behind the whole prompt.

- ``gathered``: the language model runs on, and remembers, what is left.
- ``masked``: it runs on everything, and the attention mask hides what is dropped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.reference.kept_keys import Form
from tokencomp.reference.kept_patches import KeptTokens, Select, checked

_ENCODER = ("vision_feature_layer", "vision_feature_select_strategy")


@dataclass
class KeptVisual(KeptTokens):
    """What became of the latest prompt with an image."""

    prompt: int = 0  # its tokens L, with all visual tokens
    place: Tensor | None = None  # [B, M] int64, positions of what is left
    mask: Tensor | None = None  # [B, L] int64, ``masked``: the mask of the prompt
    cache: Any = None


@contextmanager
def kept_visual(model: Any, select: Select, *, form: Form = "gathered") -> Iterator[KeptVisual]:
    """Drop visual tokens of ``model`` (``LlavaForConditionalGeneration`` or alike) while the context lasts.

    A prompt is a call with ``input_ids`` and ``pixel_values``, one image a row; later calls go on with the
    cache it returned, by hand or by ``generate``. ``select`` gets the projected features ``[B, N, C]``. With
    ``gathered`` the logits of the prompt are those of what is left.

    Raises ValueError for an unknown form, a selection out of range or order, rows with other than one image,
    labels, or the cache of another prompt, TypeError for positional arguments.
    """
    if form not in ("gathered", "masked"):
        raise ValueError(f"kept_visual: form must be gathered or masked, got {form!r}")
    kept = KeptVisual()

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            raise TypeError("kept_visual: the model must be called with keyword arguments")
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            kept.cache = kept.place = kept.index = None
            return (), _prompt(model, kept, select, form, dict(kwargs)) if _has_image(kwargs) else kwargs
        if past is not kept.cache:
            raise ValueError("kept_visual: past_key_values must come from the latest prompt, got another")
        return None if kept.place is None else ((), _later(kept, form, dict(kwargs)))

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kept.cache is None:
            kept.cache = getattr(output, "past_key_values", None)

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _has_image(kwargs: dict[str, Any]) -> bool:
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return kwargs.get("pixel_values") is not None or encoded.get("image") is not None


def _features(model: Any, kwargs: dict[str, Any]) -> Tensor:
    """Projected features ``[B, N, C]``: of the pixels, or those that ``generate`` has computed before."""
    pixels, encoded = kwargs.pop("pixel_values", None), kwargs.pop("mm_encoder_outputs", None) or {}
    options = {key: kwargs.pop(key) for key in _ENCODER if kwargs.get(key) is not None}
    found = encoded.get("image")
    if found is None:
        found = model.get_image_features(pixel_values=pixels, return_dict=True, **options)
    return torch.stack(list(found.pooler_output))


def _prompt(
    model: Any, kept: KeptVisual, select: Callable[[Tensor], Tensor], form: Form, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a prompt, with embeddings in place of ids and pixels."""
    if kwargs.get("labels") is not None:
        raise ValueError("kept_visual: labels must be None, got some")
    ids, features = kwargs.pop("input_ids"), _features(model, kwargs)
    batch, total, _ = features.shape
    is_image = ids == model.config.image_token_id
    if batch != len(ids) or not (is_image.sum(1) == total).all():
        raise ValueError(f"kept_visual: each row must have one image of {total} placeholders")
    index = checked("kept_visual", select(features), features)
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
    left = ~is_image
    left.scatter_(1, is_image.nonzero()[:, 1].view(batch, total).gather(1, index), True)
    place = left.nonzero()[:, 1].view(batch, -1)
    kept.total, kept.index, kept.features = total, index, features
    kept.prompt, kept.place = ids.shape[1], place
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    if form == "masked":
        kept.mask = mask * left
        return kwargs | {"inputs_embeds": embeds, "attention_mask": kept.mask, "position_ids": positions}
    return kwargs | {
        "inputs_embeds": embeds.gather(1, place[..., None].expand(-1, -1, embeds.shape[2])),
        "attention_mask": mask.gather(1, place),
        "position_ids": positions.expand(batch, -1).gather(1, place),
    }


def _later(kept: KeptVisual, form: Form, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that goes on with the prompt's cache."""
    assert kept.place is not None
    new = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    tokens, held = new.shape[1], kwargs["past_key_values"].get_seq_length()
    mask = kwargs.get("attention_mask")
    if form == "masked":
        assert kept.mask is not None
        rest = kept.mask.new_ones(len(kept.mask), held + tokens - kept.prompt)
        rest = rest if mask is None else mask[:, kept.prompt :].to(rest.dtype)
        return kwargs | {"attention_mask": torch.cat([kept.mask, rest], dim=1)}
    dropped = kept.prompt - kept.place.shape[1]
    if mask is not None:
        front = mask[:, : kept.prompt].gather(1, kept.place)
        kwargs["attention_mask"] = torch.cat([front, mask[:, kept.prompt :]], dim=1)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (torch.arange(tokens, device=new.device) + held + dropped)[None]
    return kwargs
