"""Keys and values of a prompt that a language model forgets: the oracle of every eviction from its cache.

``with kept_keys(model, select):`` the first forward that fills a cache with more than one token runs as ever;
then ``select`` names, for each layer, row and key-value head, the tokens that later queries may see.

- ``gathered``: the others are taken out of the cache, and their memory is freed.
- ``masked``: nothing is taken out; later queries get -inf for them, in every layer and head.

Both compute the same function. The second changes only attention masks, one dense mask a layer, and is what a
real eviction is tested against; the first is what its bytes are compared with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Form = Literal["gathered", "masked"]
Select = Callable[[int, Tensor, Tensor | None], Tensor]
"""``(layer, keys [B, Hkv, N, D], valid [B, N] bool or None) -> [B, Hkv, K]`` kept tokens, ascending; -1 is a
hole (``masked`` only). Padding must not be kept."""


@dataclass
class Kept:
    """What became of the latest prompt."""

    total: int = 0  # its tokens, with padding
    index: list[Tensor] = field(default_factory=list)  # a layer: [B, Hkv, K] int64
    cache: Any = None


@contextmanager
def kept_keys(model: Any, select: Select, *, form: Form = "gathered") -> Iterator[Kept]:
    """Compress the cache of ``model``, a Hugging Face causal language model, while the context lasts.

    Args:
        model: stock; called with keyword arguments, by hand or by ``generate``.
        select: see ``Select``. Layers may keep different numbers of tokens; ``gathered`` then appends one
            token at a time only, because the model makes one mask for all its layers.
        form: ``gathered`` or ``masked``.

    Yields the state of the latest prompt. The model is as before afterwards; a gathered cache stays usable
    outside where its prompt had no padding.

    Raises:
        ValueError: unknown form; a selection that is not ascending, out of range, or of padding.
        TypeError: a cache that does not hold all tokens in each layer (sliding, static).
    """
    if form not in ("gathered", "masked"):
        raise ValueError(f"kept_keys: form must be gathered or masked, got {form!r}")
    kept = Kept()
    hooks = [
        model.register_forward_pre_hook(_before(kept, form), with_kwargs=True),
        model.register_forward_hook(_after(kept, select, form), with_kwargs=True),
    ]
    if form == "masked":
        hooks += [m.register_forward_pre_hook(_hide(kept), with_kwargs=True) for m in attentions(model)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def attentions(model: Any) -> list[Any]:
    """The self-attention modules of a decoder, by layer. Raises TypeError where there are none."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    if not found:
        raise TypeError(f"kept_keys: model must have decoder layers with self-attention, got {type(model)}")
    return sorted(found, key=lambda module: int(module.layer_idx))


def _before(kept: Kept, form: Form) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            return None
        if cache is not kept.cache:
            raise ValueError("kept_keys: past_key_values must come from the latest prompt, got another cache")
        if len(args) > 1:
            raise TypeError("kept_keys: the model must be called with keyword arguments")
        if form == "masked":
            return None
        given = kwargs.get("input_ids", args[0] if args else None)
        tokens = int((kwargs["inputs_embeds"] if given is None else given).shape[1])
        held = {index.shape[2] for index in kept.index}
        if tokens > 1 and len(held) > 1:
            raise ValueError(
                f"kept_keys: layers that keep {sorted(held)} tokens can be appended one token at a time, got "
                f"{tokens}; form='masked' has no such limit"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if mask.ndim != 2 or not mask[:, kept.total :].all():
                raise ValueError("kept_keys: attention_mask must be [B, N] without padding after the prompt")
            kwargs["attention_mask"] = None  # its columns are those of the whole prompt; no padding is held
        return args, kwargs

    return hook


def _after(kept: Kept, select: Select, form: Form) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is None or cache is kept.cache or cache.get_seq_length() < 2:
            return
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"kept_keys: attention_mask must be [B, N], got {mask.ndim} dimensions")
        valid = None if mask is None else mask.bool()
        kept.index, kept.total, kept.cache = [], cache.get_seq_length(), cache
        for layer, stored in enumerate(cache.layers):
            if type(stored).__name__ != "DynamicLayer":
                raise TypeError(f"kept_keys: cache layers must be DynamicLayer, got {type(stored).__name__}")
            index = select(layer, stored.keys, valid).to(stored.keys.device, torch.int64)
            _check(index, stored.keys, valid, form)
            kept.index.append(index)
            if form == "gathered":
                from tokencomp.reference.kept_cache import KeptLayer

                cache.layers[layer] = KeptLayer.of(stored, index)

    return hook


def _check(index: Tensor, keys: Tensor, valid: Tensor | None, form: Form) -> None:
    batch, heads, total, _ = keys.shape
    if index.ndim != 3 or index.shape[:2] != (batch, heads) or index.shape[2] < 1:
        raise ValueError(
            f"kept_keys: selection must be [B={batch}, Hkv={heads}, K >= 1], got {list(index.shape)}"
        )
    hole = index < 0
    if hole.any() and form == "gathered":
        raise ValueError("kept_keys: a selection with holes (-1) needs form='masked'")
    ordered = torch.where(hole, total + torch.arange(index.shape[2], device=index.device), index)
    if index.max() >= total or not (ordered.diff(dim=2) > 0).all():
        raise ValueError(f"kept_keys: kept tokens must ascend below N={total}, holes last")
    if valid is not None:
        held = valid[:, None].expand(-1, heads, -1).gather(2, index.clamp(min=0)) | hole
        if not held.all():
            raise ValueError("kept_keys: kept tokens must not be padding")


def _hide(kept: Kept) -> Callable[..., Any]:
    """Pre-hook of one self-attention: the mask of the model, and -inf for what this layer's heads forgot."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache, states = kwargs.get("past_key_values"), kwargs.get("hidden_states", args[0] if args else None)
        if cache is None or cache is not kept.cache or states is None:
            return None
        layer, rows = int(module.layer_idx), states.shape[1]
        columns = cache.layers[layer].keys.shape[2] + rows  # this layer appends after the hook
        index = kept.index[layer]
        batch, heads, _ = index.shape
        seen = torch.zeros(batch, heads, columns + 1, dtype=torch.bool, device=index.device)
        seen.scatter_(2, torch.where(index < 0, columns, index), True)
        seen = seen[..., :columns]
        seen[..., kept.total :] = True
        place = torch.arange(columns, device=index.device)
        causal = place <= place[columns - rows :, None]
        mask = kwargs.get("attention_mask")
        visible = seen[:, :, None] & causal
        groups = int(module.num_key_value_groups)
        bias = torch.zeros(batch, heads * groups, rows, columns, dtype=states.dtype, device=states.device)
        bias.masked_fill_(~visible.repeat_interleave(groups, dim=1), float("-inf"))
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
        kwargs["attention_mask"] = bias
        return args, kwargs

    return hook
