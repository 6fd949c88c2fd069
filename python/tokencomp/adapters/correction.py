"""Keys and values of tokens that were decoded sparsely, made anew densely (TidalDecode, arXiv 2410.05076)."""

from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.kv_handle import CompressedCache
from tokencomp.cache import KeepAll


@torch.no_grad()
def recompute_newest(
    handle: CompressedCache, input_ids: Tensor, count: int, *, attention_mask: Tensor | None = None
) -> Tensor:
    """Overwrite the newest ``count`` tokens of the last cache with those of a dense forward.

    Args:
        handle: of a model with a sparse method and no other.
        input_ids: ``[B, n]``, all tokens the cache has seen.
        count: in [1, n).
        attention_mask: ``[B, n]``, 0 where there is padding.

    Returns:
        The dense logits of the newest token, ``[B, V]``.

    Raises:
        ValueError: a cache from which tokens are evicted, or tokens that are not those it has seen.
    """
    cache = handle.cache
    if type(handle.method) is not KeepAll:
        name = type(handle.method).__name__
        raise ValueError(f"recompute_newest: the cache must keep every token, {name} evicts some")
    seen = cache.get_seq_length()
    if input_ids.shape[1] != seen:
        raise ValueError(f"recompute_newest: input_ids must be [B, {seen}], got {list(input_ids.shape)}")
    if not 1 <= count < seen:
        raise ValueError(f"recompute_newest: count must be in [1, n={seen}), got {count}")
    given: dict[str, Any] = {}
    if attention_mask is not None:
        position = (attention_mask.cumsum(1) - 1).clamp(min=0)
        given = {"attention_mask": attention_mask, "position_ids": position[:, seen - count :]}
    cache.crop(-count)
    readers = [paged.layer.reader for paged in cache.paged if paged.layer.reader is not None]
    try:
        for reader in readers:
            reader.paused = True
        output: Any = handle.model(
            input_ids=input_ids[:, seen - count :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **given,
        )
    finally:
        for reader in readers:
            reader.paused = False
    logits: Tensor = output.logits[:, -1]
    return logits


class Correction:
    """``recompute_newest`` of the last ``every`` tokens every so many steps of ``generate``, whose logits the
    step then has: ``model.generate(ids, logits_processor=[Correction(handle, every=32)])``.

    Args:
        handle: of the model that generates, without beams.
        every: steps between corrections, >= 1.
        attention_mask: of the prompt.
    """

    def __init__(self, handle: CompressedCache, every: int, attention_mask: Tensor | None = None) -> None:
        if every < 1:
            raise ValueError(f"Correction: every must be >= 1, got {every}")
        self.handle, self.every, self.mask = handle, every, attention_mask
        self.calls = -1  # the first is that of the prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of the next token, corrected where it is time."""
        self.calls += 1
        if self.calls == 0 or self.calls % self.every:
            return scores
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], 1)
        logits = recompute_newest(self.handle, input_ids, self.every, attention_mask=mask)
        return logits.to(scores.dtype)
