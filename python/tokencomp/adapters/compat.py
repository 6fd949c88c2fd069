"""What differs between the versions of transformers that are supported, 5.4 and newer, in one place.

- ``crop``: up to 5.10 a number >= 0 is the length to keep; later only numbers <= 0 are taken, to remove.
- ``get_mask_sizes``: before 5.4 it got positions, later the number of queries; ``PagedLayer`` takes both.
- the largest length is ``get_max_cache_shape()`` before 5.20 and ``get_max_length()`` since; ``PagedLayer``
  has both.
- Rotary frequencies of models with several kinds of layers are named after the kind.
"""

import functools
import inspect
from typing import Any

from torch import Tensor, nn

# Rotary embeddings whose frequencies change with the length: a key cannot be moved to another position.
CHANGING_ROPE = {"dynamic", "longrope"}
# Model types that rotate channel i with channel i + D/2, as ``ops.rope_shift_`` does by default.
HALF_ROTATED = {
    "gemma", "gemma2", "gemma3_text", "gpt_oss", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
}  # fmt: skip


@functools.cache
def crop_takes_length() -> bool:
    """Whether ``Cache.crop`` of the installed version takes the length to keep."""
    from transformers.cache_utils import Cache

    return "tokens_to_remove" not in inspect.signature(Cache.crop).parameters


def columns_to_remove(given: int, columns: int) -> int:
    """What the argument of ``crop`` means for a cache of ``columns``. Raises ValueError for nonsense."""
    if given < 0 or (given == 0 and not crop_takes_length()):
        return -given
    if not crop_takes_length():
        raise ValueError(f"crop: tokens_to_remove must be <= 0, got {given}")
    return max(columns - given, 0)


def rope_frequencies(decoder: nn.Module, kind: str) -> Tensor:
    """``[D_rot / 2]`` frequencies of the rotary embedding of ``decoder`` for layers of this kind.

    Raises ValueError where keys cannot be rotated to other positions.
    """
    config: Any = decoder.config
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or config.model_type not in HALF_ROTATED:
        raise ValueError(
            f"compress: keys of model type {config.model_type!r} are not known to be rotated by halves; "
            f"re-rotation works with {', '.join(sorted(HALF_ROTATED))}"
        )
    types = getattr(rotary, "rope_type", "default")
    rope = types.get(kind, "default") if isinstance(types, dict) else types
    if rope in CHANGING_ROPE:
        raise ValueError(
            f"compress: {rope!r} rotary frequencies change with the length; keys cannot be re-rotated"
        )
    found = getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None))
    if not isinstance(found, Tensor):
        raise ValueError(f"compress: found no rotary frequencies in {type(rotary).__name__}")
    return found
