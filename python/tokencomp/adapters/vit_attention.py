"""Attention of compressed encoders: show queries and keys to the method, add the key bias.

Hugging Face attention asks its configuration which implementation to call. Configurations may be shared
between models, so ours is not written there: a patched attention module reads ``tokencomp_vit`` from a
view of its configuration that only it has. That name stands for ``shown_attention``, which calls the
implementation the configuration names. Queries and keys are therefore those attention uses, after norms
and rotation, which hooks on the projections would not see.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokencomp import merged
from tokencomp.adapters.patch import Patches, original_class

IMPLEMENTATION = "tokencomp_vit"
WITH_BIAS = ("eager", "sdpa")  # implementations that add a float mask to their logits


class _ConfigView:
    """A configuration that names our implementation and is otherwise the model's."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def implementation(config: Any) -> str:
    """What the user chose: ``sdpa``, ``eager`` or another registered name."""
    return getattr(config, "_attn_implementation", None) or "eager"


def show_attention(patches: Patches, attention: nn.Module, stack: Any) -> None:
    """Patch a Hugging Face attention module so that each call goes through ``shown_attention``."""
    _register()
    config: Any = attention.config
    view = _ConfigView(config)
    eager = getattr(sys.modules[original_class(attention).__module__], "eager_attention_forward", None)
    patches.add(
        attention,
        config=property(lambda self: view),
        _tokencomp_stack=stack,
        _tokencomp_config=config,
        _tokencomp_eager=staticmethod(eager) if eager is not None else None,
    )


def shown_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of ``transformers.AttentionInterface``: the user's, with the run looking on.

    Args:
        module: the attention module.
        query: ``[B, H, N, D]``.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, D]``.
        attention_mask: the model's own mask, or our key bias ``[B, 1, 1, N]`` float32.
        scaling: of the logits; None is ``D ** -0.5``.
        dropout: probability.
        kwargs: for the user's implementation.
    """
    run = module._tokencomp_stack.run
    run.saw(query, key, scaling, value)
    name = implementation(module._tokencomp_config)
    if run.reduced and attention_mask is None:
        attention_mask = run.bias  # of layers that hand no mask on
    if run.reduced and attention_mask is not None:
        check_bias(name)
        attention_mask = merged.as_bias(attention_mask, query.dtype)
    function = _function(name, module._tokencomp_eager)
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def check_bias(name: str) -> None:
    """Raise ValueError where the implementation cannot add a key bias."""
    if name not in WITH_BIAS:
        raise ValueError(
            f"compress: attn_implementation {name!r} cannot add log sizes or padding to its logits; "
            f"use one of {', '.join(WITH_BIAS)}, or a method with proportional=False on unpadded input"
        )


def _function(name: str, eager: Callable[..., Any] | None) -> Callable[..., Any]:
    if name == "eager":
        if eager is None:
            raise ValueError("compress: the model has no eager attention of its own; choose sdpa")
        return eager
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
    return function


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, shown_attention)
