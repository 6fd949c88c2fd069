"""Tiny untrained decoders of the families that are declared to be supported, and inputs for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
TWO_SLIDE = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 6, "layer_types": TWO_SLIDE,
                          "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 6, "layer_types": TWO_SLIDE}),
    "gpt_oss": ("GptOss", {"head_dim": 16, "sliding_window": 6, "layer_types": TWO_SLIDE,
                           "num_local_experts": 2, "num_experts_per_tok": 1}),
}  # fmt: skip
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


def decoder(family: str = "llama", implementation: str | None = None, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="models need the extra hf")
    name, own = FAMILIES[family]
    config_class, model_class = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**SIZES, **own, **options})
    model = getattr(transformers, model_class)(config).eval()
    if family == "gpt_oss":  # its sinks are not initialized
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
            for name in ("gate_up_proj_bias", "down_proj_bias"):
                torch.nn.init.zeros_(getattr(layer.mlp.experts, name))
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def prompt(batch: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def left(batch: int = 2, length: int = 20, pads: int = 5) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :pads] = 0
    return mask


def answer(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    if settings["do_sample"]:
        torch.manual_seed(3)
    mask = torch.ones_like(ids) if mask is None else mask
    out: Tensor = model.generate(ids, attention_mask=mask, **settings)
    return out


def steps(model: Any, ids: Tensor, mask: Tensor | None, chunks: list[int], cache: Any = None) -> Tensor:
    """Logits ``[B, N, V]`` of ``ids`` fed in chunks, with the positions ``generate`` would give."""
    mask = torch.ones_like(ids) if mask is None else mask
    position = (mask.cumsum(1) - 1).clamp(min=0)
    said, first = [], 0
    for size in chunks:
        end = first + size
        output = model(
            input_ids=ids[:, first:end], attention_mask=mask[:, :end], position_ids=position[:, first:end],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache, first = output.past_key_values, end
        said.append(output.logits)
    return torch.cat(said, 1)
