"""Draft models: a small one of the same tokenizer reads, or answers, before the large one does."""

from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.handle import compress
from tokencomp.adapters.kv_handle import CompressedCache
from tokencomp.methods.spec_kv import SpecKV
from tokencomp.methods.spec_pc import SCORE, SpecPC


@torch.no_grad()
def shorten_prompt(draft: nn.Module, input_ids: Tensor, method: SpecPC) -> Tensor:
    """The part of a prompt that a large model needs, by the attention of a small one (SpecPC).

    ``model.generate(shorten_prompt(draft, input_ids, SpecPC(keep=1024)))``: positions count anew.

    Args:
        draft: a decoder of Hugging Face.
        input_ids: ``[1, n]``.
        method: what to keep.

    Returns:
        ``[1, min(n, method.keep)]``, in the order of the prompt.

    Raises:
        ValueError: more than one sequence, a draft with too few layers, or as ``compress``.
    """
    _check_ids("shorten_prompt", input_ids)
    with compress(draft, method) as handle:
        draft(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        score = handle.cache.state.shared[SCORE]
    return input_ids[:, method.select(score).to(input_ids.device)]


@torch.no_grad()
def draft_prefill(handle: CompressedCache, draft: Any, input_ids: Tensor) -> Any:
    """A cache of a prompt without its last token, of which a drafted answer chose the keys (SpecKV).

    ``with compress(model, SpecKV(budget=512)) as handle: model.generate(input_ids,
    past_key_values=draft_prefill(handle, draft, input_ids))``.

    Args:
        handle: of the large model with ``SpecKV``.
        draft: a model of Hugging Face that generates, of the same tokenizer.
        input_ids: ``[1, n]``, n >= 2.

    Returns:
        A ``PagedKVCache`` of ``n - 1`` columns, at most the method's budget of slots a kv head.

    Raises:
        ValueError: more than one sequence, or a handle of another method.
    """
    _check_ids("draft_prefill", input_ids)
    method = handle.method
    if not isinstance(method, SpecKV):
        raise ValueError(f"draft_prefill: the handle must be of SpecKV, got {type(method).__name__}")
    ids = input_ids
    if method.lookahead:
        count = {"max_new_tokens": method.lookahead, "min_new_tokens": method.lookahead}
        ids = draft.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **count)
    cache = handle.new_cache()
    handle.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.crop(-(ids.shape[1] - input_ids.shape[1] + 1))
    return cache


def _check_ids(name: str, input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"{name}: input_ids must be [1, n] with n >= 2, got {list(input_ids.shape)}")
