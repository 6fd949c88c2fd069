"""``attn_implementation="tokencomp"`` in models with sliding windows."""

from typing import Any

import pytest
import tokencomp
import torch
from test_adapters_attention import (  # registered is a fixture
    LEFT,
    RIGHT,
    close,
    eager_sums,
    prompt,
    registered,  # noqa: F401
    using,
)
from tokencomp.adapters import attention
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="models need the extra hf")


def mistral() -> Any:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, sliding_window=6, initializer_range=0.3,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
def test_attention_scores_of_sliding_windows(mask: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = mistral(), prompt()
    theirs = eager_sums(model, ids, mask)
    logits = using(model, "sdpa")(ids, attention_mask=mask).logits
    monkeypatch.delattr(tokencomp.attention, "_by_rows")  # the sums come from the operators
    with tokencomp.attention_scores(model) as scores:
        ours = model(ids, attention_mask=mask).logits
    close(scores.last, theirs)
    torch.testing.assert_close(ours[:, -1], logits[:, -1], atol=1e-5, rtol=1e-5)
    real = torch.full((2,), 20) if mask is None else mask.sum(1)
    for layer in scores.last:  # the rows of the attention matrix sum to 1
        torch.testing.assert_close(layer.sum(-1), real[:, None].expand(2, 8).float(), atol=1e-4, rtol=0)


def test_attention_scores_of_sliding_windows_in_chunks() -> None:
    """The cache of a layer with a window forgets keys, so that a row's own position is not its place."""
    model, ids = mistral(), prompt()
    using(model, "eager")
    matrices = model(ids, output_attentions=True).attentions
    cache = transformers.DynamicCache(config=model.config)
    with tokencomp.attention_scores(model) as scores:
        for first, last in ((0, 9), (9, 18), (18, 19), (19, 20)):
            model(ids[:, first:last], past_key_values=cache)
    for part, (first, last) in zip(scores.forwards, ((0, 9), (9, 18), (18, 19), (19, 20)), strict=True):
        keys = part[0].shape[-1]
        close(part, [p[:, :, first:last, last - keys : last].sum(2) for p in matrices])
    assert scores.last[0].shape[-1] == 6


def test_only_a_plain_sliding_window_is_taken_for_one() -> None:
    masks = transformers.masking_utils
    plain = masks.sliding_window_causal_mask_function(6)
    padding = torch.zeros(2, dtype=torch.long)
    others = {
        "causal": masks.causal_mask_function,
        "chunked": masks.chunked_causal_mask_function(6, padding),
        "both ways": masks.sliding_window_bidirectional_mask_function(6),
        "narrower": masks.and_masks(plain, masks.causal_mask_function),
        "wider": masks.or_masks(plain, masks.causal_mask_function),
        "three": masks.and_masks(masks.sliding_window_overlay(6), masks.causal_mask_function, plain),
        "mine": lambda b, h, q, k: k <= q,
    }
    assert attention._sliding_window(plain) == 6
    assert [name for name, function in others.items() if attention._sliding_window(function)] == []
    note = getattr(attention.hf_mask(2, 20, 20, mask_function=plain, local_size=6), attention.PADDING)
    assert (note.window, note.rows, bool(note.keys.all())) == (6, None, True)
    wider = attention.hf_mask(2, 20, 20, mask_function=others["wider"], allow_is_causal_skip=False)
    assert getattr(wider, attention.PADDING) == (None, None, None)
