"""``attn_implementation="tokencomp"`` for Hugging Face models, and what each key received, layer by layer.

``register_attention()`` registers an attention function and its mask function; with
``model.set_attn_implementation("tokencomp")`` the model computes what it does under ``sdpa``, and
``output_attentions=True`` gives column sums ``[B, Hq, S]`` where ``eager`` gives matrices ``[B, Hq, T, S]``.
``attention_scores(model)`` needs no such switch and leaves the model as it was.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokencomp import attention
from tokencomp.adapters.patch import Patches
from tokencomp.autocast import casting
from tokencomp.ops.score import Heads

IMPLEMENTATION = "tokencomp"
PADDING = "_tokencomp_padding"
COLLECTOR = "_tokencomp_scores"

Weights = Tensor | Callable[[int], Tensor] | None


class Padding(NamedTuple):
    """What a mask was made from: ``rows`` ``[B, T]`` real queries, and ``keys`` ``[B, S]`` real keys if the
    rest of the mask is plain causality, in a sliding window of ``window`` keys if there is one.
    """

    rows: Tensor | None
    keys: Tensor | None
    window: int | None = None


class AttentionScores:
    """Column sums of every forward in a ``with attention_scores(model)`` block.

    ``forwards[i][layer]`` is ``[B, H*, S]`` float32: one list a forward, layers in the order they ran.
    """

    def __init__(self, weights: Weights, heads: Heads) -> None:
        self.forwards: list[list[Tensor]] = []
        self.heads = heads
        self._weights = weights

    @property
    def last(self) -> list[Tensor]:
        """The layers of the last forward. Raises RuntimeError where there was none."""
        if not self.forwards:
            raise RuntimeError("attention_scores: no forward was run inside the with block")
        return self.forwards[-1]

    def weights(self, query: Tensor) -> Tensor | None:
        """The row weights for queries ``[B, H, T, D]``."""
        if callable(self._weights):
            return self._weights(query.shape[2]).to(query.device)
        return None if self._weights is None else self._weights.to(query.device)

    def add(self, columns: Tensor) -> None:
        """A layer of the current forward."""
        if not self.forwards:  # an attention module was called by itself
            self.forwards.append([])
        self.forwards[-1].append(columns)


def register_attention(name: str = IMPLEMENTATION) -> str:
    """Register our attention and mask functions with transformers under ``name``; return the name.

    May be called again. Afterwards ``model.set_attn_implementation(name)`` or
    ``from_pretrained(..., attn_implementation=name)``.

    Raises:
        ValueError: a name that transformers would treat as something else, or that others registered.
        ImportError: transformers is not installed.
    """
    register_functions(name, hf_attention, hf_mask)
    return name


def register_functions(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and its mask function; raises as ``register_attention``."""
    _check_name(name)
    attentions, masks = _interfaces()
    for kind, registered, ours in (("attention", attentions, attention), ("mask", masks, mask)):
        known = registered.get(name)
        if known is not None and not _is_or_wraps(known, ours):
            raise ValueError(
                f"register_attention: {name!r} is taken by another {kind} function; choose another name"
            )
    for registered, ours in ((attentions, attention), (masks, mask)):
        if registered.get(name) is None:
            type(registered).register(name, ours)


def _is_or_wraps(known: Any, ours: Callable[..., Any]) -> bool:
    """Whether ``known`` is ours or a function around it: kvpress wraps all that is registered when it is
    imported, which shows in the closure alone.
    """
    found = [known]
    for function in found:  # grows
        if function is ours:
            return True
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # it is empty
                inner = cell.cell_contents
                if callable(inner) and not any(inner is f for f in found):
                    found.append(inner)
    return False


@contextmanager
def attention_scores(
    model: nn.Module, weights: Weights = None, heads: Heads = "none"
) -> Iterator[AttentionScores]:
    """Collect what each key receives in each layer of each forward of ``model`` inside the block.

    The model attends through ``tokencomp`` meanwhile. Configurations, which models may share, are not
    written to, and the model is what it was afterwards, also after an exception.

    Args:
        model: a Hugging Face model whose attention goes through ``AttentionInterface``.
        weights: of the query rows; a tensor as in ``ops.column_score``, or a function of their number such as
            ``lambda rows: tokencomp.scores.forgetting_weights(rows, 0.99)``. Default 1.
        heads: reduction over heads, as in ``ops.column_score``.

    Yields:
        ``AttentionScores``, filled by every forward.

    Raises:
        ValueError: the model has no attention implementation to choose, or is compressed already.
    """
    name = register_attention()
    scores = AttentionScores(weights, heads)
    patches = Patches()
    switched: dict[int, Any] = {}
    hook = None
    try:
        for module in model.modules():
            config = vars(module).get("config")
            if getattr(config, "_attn_implementation", None) is None:
                continue
            view = switched.setdefault(id(config), switched_config(config, name))
            members = {"config": property(_always(view)), COLLECTOR: scores}
            patches.add(module, **members)
        if not switched:
            kind = type(model).__name__
            raise ValueError(
                f"attention_scores: {kind} is not a Hugging Face model with a choice of attention"
            )
        hook = model.register_forward_pre_hook(lambda *_: scores.forwards.append([]))
        yield scores
    finally:
        if hook is not None:
            hook.remove()
        patches.restore()


@casting
def hf_attention(
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
    position_bias: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool = False,
    column_weights: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of ``transformers.AttentionInterface``.

    Args:
        module: the attention module; its ``is_causal`` counts where the argument is None.
        query: ``[B, Hq, T, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        attention_mask: None, or a bool or float mask ``[B, 1 or Hq, T, S]``, sliding windows included.
        scaling: of the logits; None is ``D ** -0.5``.
        dropout: probability.
        is_causal: counts where there is no mask.
        softcap: of the logits.
        s_aux: sinks ``[Hq]``.
        position_bias: not supported.
        cache: a paged cache of continuous batching; not supported.
        output_attentions: return column sums.
        column_weights: of the rows, for the column sums.
        kwargs: what else the model passes on; not used.

    Returns:
        The output ``[B, T, Hq, Dv]``, and column sums ``[B, Hq, S]`` or None.
    """
    for name, given in (("position_bias", position_bias), ("a paged cache", cache)):
        if given is not None:
            raise ValueError(f"attn_implementation {IMPLEMENTATION!r} does not support {name}; use sdpa")
    collector: AttentionScores | None = getattr(module, COLLECTOR, None)
    wanted = output_attentions or collector is not None
    if collector is not None:
        column_weights = collector.weights(query)
    causal = attention_mask is None and _is_causal(module, is_causal)
    padding = Padding(None, None)
    if wanted and attention_mask is not None:
        padding = getattr(attention_mask, PADDING, padding)
        if padding.keys is not None:
            attention_mask, causal = None, True
    result = attention.attend(
        query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=True,
        return_columns=wanted, column_weights=column_weights if wanted else None,
        heads="none" if collector is None else collector.heads, key_mask=padding.keys,
        query_mask=padding.rows, window=padding.window, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    if collector is not None and result.columns is not None:
        collector.add(result.columns)
    return result.output.transpose(1, 2).contiguous(), result.columns


def hf_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of ``transformers.AttentionMaskInterface``: that of ``sdpa``, with a note of
    the padding it was made from.

    None is returned only where the rows are the last of the keys: torch's alignment is not ours. The note is
    what lets column sums be computed without the mask; a mask that lost it gives the same sums, slower,
    except that rows of right padding then count.

    Args:
        batch_size: B.
        q_length: T.
        kv_length: S.
        q_offset: place of the first row among all tokens; a tensor with static caches.
        kv_offset: place of the first key.
        mask_function: the pattern without padding.
        attention_mask: the user's ``[B, tokens]`` bool.
        allow_is_causal_skip: whether None may be returned.
        kwargs: for the mask function of ``sdpa``.
    """
    # torch 2.10 compiles no import of a module out of transformers
    from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

    if mask_function is None:
        mask_function = causal_mask_function
    known = isinstance(q_offset, int) and isinstance(kv_offset, int)
    aligned = known and q_offset + q_length == kv_offset + kv_length
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and aligned, **kwargs,
    )  # fmt: skip
    both_ways = "allow_is_bidirectional_skip" in kwargs  # rows may then be of another sequence than keys
    if mask is None or both_ways or not aligned or torch.compiler.is_compiling():
        return mask
    rows = keys = None
    window = _sliding_window(mask_function)
    plain = window is not None or mask_function is causal_mask_function
    if attention_mask is not None:
        padding: Any = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        rows = padding[:, q_offset : q_offset + q_length]
        keys = padding[:, kv_offset : kv_offset + kv_length] if plain else None
    elif plain:
        keys = mask.new_ones(batch_size, kv_length)
    setattr(mask, PADDING, Padding(rows, keys, window))
    return mask


def _sliding_window(mask_function: Callable[..., Any]) -> int | None:
    """The window of transformers' own sliding-window causal mask function; None for any other function.

    It is a closure over its parts, so that a pattern somebody added to is another closure and not taken for
    it.
    """
    from transformers import masking_utils

    def parts(function: Any, like: Any, name: str) -> Any:
        same = inspect.isfunction(function) and function.__code__ is like.__code__
        return inspect.getclosurevars(function).nonlocals.get(name) if same else None

    both = parts(mask_function, masking_utils.and_masks(), "mask_functions")
    if not both or len(both) != 2 or both[1] is not masking_utils.causal_mask_function:
        return None
    window: int | None = parts(both[0], masking_utils.sliding_window_overlay(1), "sliding_window")
    return window


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda self: value


def switched_config(config: Any, name: str) -> Any:
    """A copy of ``config``, its sub-configurations shared, that names another attention implementation."""
    switched = copy.copy(config)
    switched._attn_implementation_internal = name
    return switched


def _check_name(name: str) -> None:
    if not name or name == "eager":
        raise ValueError(f"register_attention: {name!r} cannot be registered with transformers")
    if "flash" in name:
        raise ValueError(
            "register_attention: transformers imports flash-attn for any name with 'flash' in it, got "
            f"{name!r}"
        )
    if "/" in name or "|" in name:
        raise ValueError(
            "register_attention: transformers takes a name with '/' or '|' for a kernel of the Hub or a "
            f"paged one, got {name!r}"
        )


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        message = "attn_implementation 'tokencomp' needs transformers: pip install tokencomp[hf]"
        raise ImportError(message) from error
    return ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
