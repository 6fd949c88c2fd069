"""Under ``torch.autocast`` rotary embeddings leave queries and keys in float32, values in half precision."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, as torch's attention takes them; without it as they are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


def casting(attend: F) -> F:
    """Decorator of an attention function ``(module, query, key, value, ...)``: under autocast it gets these
    in one dtype, and computes with autocast off, so that scores stay float32.
    """

    @wraps(attend)
    def call(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = query.device.type
        if not torch.is_autocast_enabled(kind):
            return attend(module, query, key, value, *args, **kwargs)
        query, key, value = cast(query, key, value)
        with torch.autocast(kind, enabled=False):
            return attend(module, query, key, value, *args, **kwargs)

    decorated: Any = call
    return decorated  # type: ignore[no-any-return]
