"""How much encoders and decoders compute for given tokens per layer."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokencomp.adapters.families import layer_width
from tokencomp.adapters.vit import the_one


def encoder_flops(model: nn.Module, tokens: Sequence[int]) -> int:
    """Floating-point operations of the encoder's layers for one item: linear layers and attention.

    ``sum over layers of 2 (n_in W_attention + n_out W_rest) + 4 n_in^2 C``, with W the weights of linear
    layers, n_in the tokens a layer's attention works on and n_out those its MLP works on; a multiply-add
    counts as two. Norms, softmax, embeddings, heads and the method itself are not counted.

    Args:
        model: the whole model, compressed or not.
        tokens: N0 and then the tokens after each layer's reduction, L + 1 numbers as ``Report.tokens``
            has them.

    Raises:
        ValueError: another count of numbers, or not exactly one known encoder.
    """
    place, _ = the_one(model)
    if len(tokens) != len(place.layers) + 1:
        raise ValueError(
            f"encoder_flops: tokens must hold L + 1 = {len(place.layers) + 1} numbers, got {len(tokens)}"
        )
    total = 0
    for layer, entering, left in zip(place.layers, tokens[:-1], tokens[1:], strict=True):
        inside = {m for part in place.family.attention_modules(layer) for m in part.modules()}
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        attention = sum(module.weight.numel() for module in linear if module in inside)
        rest = sum(module.weight.numel() for module in linear if module not in inside)
        total += 2 * (entering * attention + left * rest) + 4 * entering**2 * layer_width(layer)
    return total


def decoder_flops(layer: nn.Module, tokens: Sequence[int], before: int = 0) -> int:
    """Floating-point operations of one decoder layer for a prompt: linear layers and causal attention.

    ``sum over sequences of 2 n W + 4 C (n before + n (n + 1) / 2)``, with W the weights of linear layers, C
    the width of all query heads; a multiply-add counts as two. Norms, softmax and experts that are no linear
    layers are not counted.

    Args:
        layer: of a Hugging Face decoder.
        tokens: n of each sequence.
        before: tokens that the cache holds for each sequence already.
    """
    weights = [module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear)]
    attention: Any = layer.self_attn
    width: int = attention.o_proj.in_features
    pairs = sum(n * before + n * (n + 1) // 2 for n in tokens)
    return 2 * sum(tokens) * sum(weights) + 4 * width * pairs
