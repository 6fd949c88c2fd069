"""How much encoders and decoders compute for given tokens per layer."""

from collections.abc import Iterable, Mapping, Sequence
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


def tower_flops(layer: nn.Module, attention: nn.Module, lengths: Sequence[int]) -> int:
    """Floating-point operations of one layer of a vision encoder: linear layers and attention.

    ``2 n W + 4 C sum s^2`` with n the sum of the s, W the weights of linear layers, C the width of all heads;
    a multiply-add counts as two. Norms, softmax and the method itself are not counted.

    Args:
        layer: of a Hugging Face encoder.
        attention: its attention.
        lengths: s, the tokens of each set that attends to itself: a crop, a frame or a window.
    """
    parts: Any = attention
    width: int = parts.k_proj.out_features if hasattr(parts, "k_proj") else parts.qkv.out_features // 3
    return 2 * sum(lengths) * _weights(layer) + 4 * width * sum(s * s for s in lengths)


def decoder_flops(layer: nn.Module, tokens: Sequence[int], before: float | Sequence[float] = 0) -> int:
    """Floating-point operations of one decoder layer for a prompt: linear layers and causal attention.

    ``sum over sequences of 2 n W + 4 C (n before + n (n + 1) / 2)``, with W the weights of linear layers, C
    the width of all query heads; a multiply-add counts as two. Norms, softmax and experts that are no linear
    layers are not counted.

    Args:
        layer: of a Hugging Face decoder.
        tokens: n of each sequence.
        before: tokens that the cache holds for each sequence already, or for all; means over heads.
    """
    attention: Any = layer.self_attn
    width: int = attention.o_proj.in_features
    held = before if isinstance(before, Sequence) else [before] * len(tokens)
    pairs = sum(n * b + n * (n + 1) // 2 for n, b in zip(tokens, held, strict=True))
    return 2 * sum(tokens) * _weights(layer) + round(4 * width * pairs)


def decoder_layers(decoder: Any) -> list[nn.Module]:
    """The layers of a Hugging Face decoder; none where it is built in another way."""
    found = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    known = len(found) == 1 and all(hasattr(getattr(x, "self_attn", None), "o_proj") for x in found[0])
    return list(found[0]) if known else []


def prefill_flops(
    layers: Iterable[nn.Module],
    tokens: Sequence[int],
    before: float | Sequence[float] = 0,
    held: Mapping[int, Sequence[float]] | None = None,
) -> int:
    """The sum of ``decoder_flops`` over ``layers``; ``held`` replaces ``before`` in layers it names."""
    own = held or {}
    return sum(decoder_flops(layer, tokens, own.get(i, before)) for i, layer in enumerate(layers))


def held_by(cache: Any) -> dict[int, list[float]]:
    """Tokens that each layer of a compressed cache holds for each sequence, means over heads; nothing for
    other caches.
    """
    stores = {paged.number: paged.layer.store for paged in getattr(cache, "paged", ())}
    return {
        number: store.lengths.float().mean(1).tolist()
        for number, store in stores.items()
        if store is not None
    }


def _weights(layer: nn.Module) -> int:
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return sum(module.in_features * module.out_features for module in linear)
