"""A layer of Hugging Face's dynamic cache that holds some of the tokens it has seen (needs transformers)."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class KeptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values of kept tokens, and of everything appended later.

    It tells two lengths: ``get_seq_length()`` is how many tokens it has seen, which positions are counted
    from, and ``get_mask_sizes()`` how many it holds, which masks are made for. So that appended tokens see
    all that is held, the held ones are presented as the last positions before them.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, seen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.seen = self.prompt = seen

    @classmethod
    def of(cls, layer: Any, kept: Tensor) -> "KeptLayer":
        """``layer`` with the tokens ``kept`` ``[B, Hkv, K]`` alone, in storage of their own."""
        index = kept[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        values = kept[..., None].expand(-1, -1, -1, layer.values.shape[-1])
        return cls(layer.keys.gather(2, index), layer.values.gather(2, values), layer.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        rows = len(query_length) if isinstance(query_length, Tensor) else query_length  # positions before 5.4
        held = self.keys.shape[-2]
        return held + rows, self.seen - held

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. Raises ValueError where that reaches into the compressed prompt."""
        count = abs(tokens_to_remove)
        if tokens_to_remove > 0 or count > self.seen - self.prompt:
            raise ValueError(
                f"crop: tokens_to_remove must be in [{self.prompt - self.seen}, 0], got {tokens_to_remove}"
            )
        super().crop(tokens_to_remove)
        self.seen -= count

    def reset(self) -> None:
        """Refused: what was dropped cannot come back, and an empty layer is not one of these."""
        raise NotImplementedError("KeptLayer cannot be reset; start with a new cache")
