"""Untrained Hugging Face models of a few thousand parameters, for tests of what acts on them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

IMAGE = 60  # placeholder token of the vision-language model
PATCHES = 16


def _transformers() -> Any:
    return pytest.importorskip("transformers", reason="models need the extra hf")


def llama(vocabulary: int = 64, implementation: str = "sdpa", layers: int = 3) -> Any:
    transformers = _transformers()
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    return model


def vit(implementation: str = "sdpa") -> Any:
    transformers = _transformers()
    torch.manual_seed(2)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.set_attn_implementation(implementation)
    return model


def llava(implementation: str = "sdpa") -> Any:
    transformers = _transformers()
    torch.manual_seed(3)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(implementation)
    return model


def state(model: Any) -> tuple[Any, ...]:
    """What a context must leave as it was: hooks of all modules, implementations, weights."""
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(vars(m))) for m in model.modules()]
    return hooks, model.config._attn_implementation, [p.data_ptr() for p in model.parameters()]


def lists(layers: int, batch: int, heads: int, tokens: int, kept: int, seed: int = 0) -> list[Tensor]:
    """Different kept tokens in every layer, row and head: ``[B, Hkv, K]`` a layer, ascending."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(batch, heads, tokens, generator=generator).argsort(-1) for _ in range(layers)]
    return [order[..., :kept].sort(-1).values for order in draw]


def ids(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(3, 59, shape, generator=torch.Generator().manual_seed(seed))


def decode(model: Any, prompt: dict[str, Any], steps: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Last logits of the prompt, then all logits of each step, ``[B, 1 + sum T, V]``."""
    output = model(**prompt, attention_mask=mask, use_cache=True, logits_to_keep=1)
    said = [output.logits]
    for step in steps:
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        output = model(
            input_ids=step, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
        )
        said.append(output.logits)
    return torch.cat(said, dim=1)


def pixels(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def some(kept: int) -> Callable[[Tensor], Tensor]:
    return lambda x: lists(1, len(x), 1, x.shape[1], kept)[0][:, 0]


def prompt(batch: int = 2) -> dict[str, Tensor]:
    image = torch.full((batch, PATCHES), IMAGE)
    tokens = torch.cat([torch.ones(batch, 1, dtype=torch.long), ids(batch, 3), image, ids(batch, 5)], 1)
    return {"input_ids": tokens, "pixel_values": pixels(batch)}
