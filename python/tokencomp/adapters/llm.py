"""Compress the KV cache of a decoder: its own caches become pages, and its attention reads them.

``attach`` gives the decoder a subclass whose forward hands every layer the same ``PagedKVCache``, and its
modules a view of their configuration that names our attention function. Configurations, which models may
share, are not written to.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, distributed, nn

from tokencomp.adapters import compat
from tokencomp.adapters.attention import hf_attention, hf_mask, register_functions, switched_config
from tokencomp.adapters.outputs import signed
from tokencomp.adapters.patch import Patches, all_or_nothing, is_patched
from tokencomp.autocast import casting
from tokencomp.methods.kv import KVMethod
from tokencomp.methods.sparse import SparseMethod
from tokencomp.ops.kvquant_pages import MAX_PAGE_TYPES

IMPLEMENTATION = "tokencomp_paged"
Attention = Literal["paged", "model"]

Look = Callable[[nn.Module, Tensor, Tensor, Tensor, float, float | None], bool]

_thread = threading.local()  # cache: of the forward that the thread is in; look: see ``looking``


class Stack:
    """A compressed decoder."""

    def __init__(self, decoder: nn.Module, plan: Any) -> None:
        self.decoder, self.plan = decoder, plan
        self.patches = Patches()
        self.chosen: list[tuple[Any, str]] = []  # configurations and views of them, their implementation
        self.closed = False
        self.last: Any = None  # the cache of the last forward

    def new_cache(self) -> Any:
        """An empty cache for this model."""
        from transformers import DynamicCache

        from tokencomp.cache import PagedKVCache

        return PagedKVCache.adopt(DynamicCache(config=self.decoder.config), self.plan, self.decoder.config)  # type: ignore[arg-type]

    def forward(self, forward: Callable[..., Any], decoder: Any, kwargs: dict[str, Any]) -> Any:
        """The decoder's forward with one of our caches."""
        from tokencomp.cache import PagedKVCache

        self._check_attention()
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids") if given is None else given
        cache = kwargs.get("past_key_values")
        caching = kwargs.get("use_cache")
        caching = decoder.config.use_cache if caching is None else caching
        if given is None or (cache is None and not caching):
            return forward(decoder, **kwargs)
        cache = self.new_cache() if cache is None else PagedKVCache.adopt(cache, self.plan, decoder.config)
        batch, tokens = given.shape[:2]
        rows = _rows(kwargs.get("attention_mask"), cache.get_seq_length(), tokens)
        if not self.plan.store_only:
            kwargs["attention_mask"] = cache.mask_of_held(kwargs.get("attention_mask"), tokens)
        kwargs["past_key_values"] = cache
        outer, _thread.cache, self.last = _current_cache(), cache, cache
        try:
            with cache.forward(tokens, batch, rows, given.device):
                return forward(decoder, **kwargs)
        finally:
            _thread.cache = outer

    def _check_attention(self) -> None:
        for config, chosen in self.chosen:
            if config._attn_implementation != chosen:
                raise RuntimeError(
                    f"compress: the attention implementation was changed to {config._attn_implementation!r} "
                    "while the model is compressed; leave the context first, or compress(..., "
                    "attention='model')"
                )


@all_or_nothing()
def attach(
    model: nn.Module,
    method: KVMethod,
    *,
    page: int | None = None,
    limit: int | None = None,
    chunks: Literal["each", "last"] = "each",
    attention: Attention = "paged",
    sparse: SparseMethod | None = None,
) -> Stack:
    """Compress the cache of the one decoder in ``model`` until ``detach``; see ``tokencomp.compress``."""
    if any(is_patched(module) for module in model.modules()):
        raise ValueError(f"compress: this {type(model).__name__} is compressed already; remove() that first")
    decoder = the_decoder(model)
    from tokencomp.cache.state import Plan

    _check_options(method, page, limit, chunks, attention)
    if sparse is not None and attention == "model":
        raise ValueError(f"compress: {type(sparse).__name__} restricts our attention; use attention='paged'")
    stack = Stack(decoder, None)
    stack.plan = Plan(
        method, weakref.ref(decoder), chunks, page, limit, attention == "paged",
        _frequencies(decoder) if method.rerotates else {}, lambda: not stack.closed, _across(decoder),
        sparse, _known_frequencies(decoder) if sparse is not None else {},
    )  # fmt: skip
    stack.new_cache()  # says now whether there is anything to compress
    if attention == "paged":
        register_functions(IMPLEMENTATION, paged_attention, paged_mask)
        _switch_attention(stack)
    else:
        stack.patches.add(decoder, forward=_forward(type(decoder).forward, stack))
    if model is not decoder and hasattr(type(model), "init_continuous_batching"):
        stack.patches.add(model, init_continuous_batching=_no_batches)
    return stack


def detach(stack: Stack) -> None:
    """Give the model its own classes back; its caches stay, for when it is compressed again."""
    stack.closed = True
    stack.patches.restore()


def the_decoder(model: nn.Module) -> nn.Module:
    """The one module in ``model`` that runs through layers with a cache. Raises ValueError without one."""
    modules = dict(model.named_modules())
    attentions = [name for name, module in modules.items() if _is_attention(module)]
    found = {around: None for name in attentions if (around := _owner(name, modules)) is not None}
    if not found:
        raise ValueError(
            f"compress: found no decoder with a key-value cache in {type(model).__name__}; the cache of "
            "Hugging Face causal language models can be compressed (Llama, Mistral, Qwen2, Qwen3, Phi-3, "
            "Gemma 2 and 3, gpt-oss and others that attend through AttentionInterface)"
        )
    if len(found) > 1:
        raise ValueError(
            f"compress: found {len(found)} decoders in {type(model).__name__}: {', '.join(found)}; pass the "
            "one to compress"
        )
    decoder: nn.Module = modules[next(iter(found))]
    config: Any = getattr(decoder, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"compress: {type(model).__name__} has an encoder and cross attention; not supported"
        )
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"compress: layers of {type(model).__name__} share their caches; not supported")
    return decoder


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")


def _owner(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The innermost module around ``name`` that has a list of layers and whose forward takes a cache."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        around = ".".join(parts[:depth])
        module = modules[around]
        if _takes_cache(module) and any(isinstance(child, nn.ModuleList) for child in module.children()):
            return around
    return None


def _takes_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(module.forward).parameters


def _check_options(method: Any, page: Any, limit: Any, chunks: str, attention: str) -> None:
    if page not in (None, 16, 32, 64):
        raise ValueError(f"compress: page must be 16, 32 or 64 slots, got {page!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"compress: memory_limit must be >= 1 byte, got {limit!r}")
    if chunks not in ("each", "last"):
        raise ValueError(f"compress: chunks must be 'each' or 'last', got {chunks!r}")
    if attention not in ("paged", "model"):
        raise ValueError(f"compress: attention must be 'paged' or 'model', got {attention!r}")
    name = type(method).__name__
    looks = method.queries != 0 or method.needs_logits or method.needs_lse
    if attention == "model" and looks:
        raise ValueError(
            f"compress: {name} looks at queries, which attention='model' does not see; use attention='paged'"
        )
    if attention == "model" and (method.formats or method.rotation != "none"):
        raise ValueError(f"compress: {name} quantizes or rotates pages, which needs attention='paged'")
    if method.rerotates and (method.formats or method.rotation != "none"):
        raise ValueError(
            f"compress: {name} moves keys to other positions, where quantized or rotated ones cannot go"
        )
    if len(method.formats) > MAX_PAGE_TYPES:
        raise ValueError(
            f"compress: {name} must have at most {MAX_PAGE_TYPES} formats, got {len(method.formats)}"
        )
    if attention == "model" and method.rerotates:
        raise ValueError(f"compress: {name} rotates keys, which needs attention='paged'")


def _across(decoder: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The mean over the processes among which the heads of ``decoder`` are divided: its attention's weights
    are then ``DTensor`` with shards. None where nobody else has heads.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    from torch.distributed.tensor import DTensor

    for module in filter(_is_attention, decoder.modules()):
        for weight in module.parameters():
            if isinstance(weight, DTensor):
                mesh = weight.device_mesh
                groups = [mesh.get_group(i) for i, how in enumerate(weight.placements) if how.is_shard()]
                if groups:
                    return functools.partial(_mean_of, groups[0])
    return None


def _mean_of(group: Any, x: Tensor) -> Tensor:
    total = x.clone()
    distributed.all_reduce(total, group=group)
    return total / distributed.get_world_size(group)


def _frequencies(decoder: nn.Module) -> dict[int, Tensor]:
    config: Any = decoder.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return {
        layer: compat.rope_frequencies(decoder, kind)
        for layer, kind in enumerate(kinds)
        if kind == "full_attention"
    }


def _known_frequencies(decoder: nn.Module) -> dict[int, Tensor]:
    """Those of a decoder whose keys are known to be rotated, and how; none of any other."""
    try:
        return _frequencies(decoder)
    except ValueError:
        return {}


def _switch_attention(stack: Stack) -> None:
    views: dict[int, Any] = {}
    configs: dict[int, Any] = {}  # set_attn_implementation writes to these in some versions
    for module in stack.decoder.modules():
        members: dict[str, Any] = {}
        config = vars(module).get("config")
        if getattr(config, "_attn_implementation", None) is not None:
            view = views.setdefault(id(config), switched_config(config, IMPLEMENTATION))
            configs[id(config)] = config
            members["config"] = property(_always(view))
        if module is stack.decoder:
            members["forward"] = _forward(type(module).forward, stack)
        if members:
            stack.patches.add(module, **members)
    stack.chosen = [(view, IMPLEMENTATION) for view in views.values()]
    stack.chosen += [(config, config._attn_implementation) for config in configs.values()]


def _no_batches(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Otherwise its background thread would log an error a request, and return nothing.
    raise RuntimeError(
        f"compress: generate_batch of {type(self).__name__} has a paged cache of its own, which cannot be "
        "compressed; use generate, or remove() what compresses the model first"
    )


def _forward(forward: Callable[..., Any], stack: Stack) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)[1:]

    def compressed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return stack.forward(forward, self, kwargs)

    return signed(compressed, forward)


def _rows(mask: Any, columns: int, tokens: int) -> Tensor | None:
    """``[B, T]`` bool: which columns of this forward are tokens. Raises ValueError for other shapes."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < columns + tokens:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"compress: attention_mask must be [B, {columns + tokens}], all columns so far and 0 where there "
            f"is padding, got {shape}"
        )
    return mask[:, columns : columns + tokens].bool()


@casting
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of ``transformers.AttentionInterface``: over the pages of a compressed layer, and
    that of ``attn_implementation="tokencomp"`` anywhere else. Arguments as there.
    """
    look: Look | None = getattr(_thread, "look", None)
    if look is not None:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        if look(module, query.detach(), key.detach(), value.detach(), scale, softcap):
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    cache = _current_cache()
    layer = None if cache is None else cache.state.pending
    if layer is None or layer.number != module.layer_idx:
        return hf_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap, s_aux, **kwargs
        )
    if attention_mask is not None or dropout > 0:
        what = "dropout" if dropout > 0 else "masks other than padding and the future"
        raise ValueError(f"compress: {what} cannot be had with a compressed cache")
    from tokencomp.cache.forward import Rule

    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    output = cache.attend(layer, query, key, value, Rule(scale, softcap, s_aux))
    return output.transpose(1, 2), None


def paged_mask(mask_function: Callable[..., Any] | None = None, **kwargs: Any) -> Tensor | None:
    """A mask function of ``transformers.AttentionMaskInterface``: none where pages are attended to, which
    know what lies before and what is padding, and that of ``attn_implementation="tokencomp"`` anywhere else.
    """
    from transformers import masking_utils

    plain = mask_function is None or mask_function is masking_utils.causal_mask_function
    if plain and _current_cache() is not None:
        return None
    return hf_mask(mask_function=mask_function, **kwargs)


def looking(look: Look | None) -> Look | None:
    """From now on, in this thread, ``look`` gets module, queries, keys, values, scale and soft cap before
    attention; where it returns True, attention is left out and its output 0. Returns what was there before.
    """
    before: Look | None = getattr(_thread, "look", None)
    _thread.look = look
    return before


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda self: value


def _current_cache() -> Any:
    return getattr(_thread, "cache", None)
