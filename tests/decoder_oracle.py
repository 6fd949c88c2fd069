"""What pruning between decoder layers must equal: everything is computed, dropped columns are masked."""

from collections.abc import Mapping
from typing import Any

import torch
from tiny_vlms import IMAGE
from torch import Tensor

HIDDEN = -1e30


def positions(model: Any, made: dict[str, Any], tokens: int, mask: Tensor | None = None) -> Tensor:
    """Of all tokens and those that follow, as without compression: ``[B, S]`` or ``[3, B, S]``."""
    ids = made["input_ids"]
    rest = torch.arange(tokens - ids.shape[1])
    if not hasattr(model.model, "get_rope_index"):
        if mask is None:
            return torch.arange(tokens).expand(len(ids), -1)
        front = (mask.cumsum(1) - 1).clamp(min=0)
        return torch.cat([front, front[:, -1:] + 1 + rest], 1)
    given = {"input_ids": ids, "image_grid_thw": made["image_grid_thw"]}
    position, _ = model.model.get_rope_index(**given, mm_token_type_ids=made["mm_token_type_ids"])
    return torch.cat([position, position[:, :, -1:] + 1 + rest], 2)


@torch.no_grad()
def masked(
    model: Any,
    made: dict[str, Any],
    said: Tensor,
    stays: Mapping[int, Tensor],
    mask: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Logits of all tokens of the prompt ``made`` and of ``said`` ``[B, T]`` behind it, all in one forward.

    Layer l sees, besides what follows the prompt, the columns ``stays[l]`` ``[B, S]`` of the prompt (all,
    where it is not in there). ``mask`` is the padding of the prompt.
    """
    ids = torch.cat([made["input_ids"], said], 1)
    past = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    real = torch.ones_like(made["input_ids"]) if mask is None else mask
    hooks = []
    for number, layer in enumerate(model.model.language_model.layers):
        seen = torch.cat([stays.get(number, real).bool() & real.bool(), torch.ones_like(said).bool()], 1)
        bias = torch.where(past & seen[:, None, None], 0.0, HIDDEN).double()
        hooks.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias}),
                with_kwargs=True,
            )
        )
    position = positions(model, made, ids.shape[1], mask) if position is None else position
    more: dict[str, Any] = {"position_ids": position}
    if "mm_token_type_ids" in made:
        more["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"], torch.zeros_like(said).int()], 1)
    try:
        logits: Tensor = model(**made | {"input_ids": ids} | more, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits


def share(ids: Tensor, every: int, first: int = 0) -> Tensor:
    """``[B, S]`` bool: all text, and of the image tokens of row b those whose number is first modulo every,
    one more of which is skipped in every later row: rows keep different numbers.
    """
    image = ids == IMAGE
    number = image.long().cumsum(1) - 1
    row = torch.arange(len(ids))[:, None]
    return ~image | ((number % (every + row)) == first)
