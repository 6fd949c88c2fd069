"""Fewer visual tokens between the layers of the decoder of a vision-language model.

``attach`` puts hooks on a decoder whose cache is one of ours: where a ``DecoderMethod`` stops a prompt with
images, what it leaves out is left out of hidden states and rotary embeddings, so later layers compute, and
their caches hold, fewer tokens. Tokens keep the positions they had. Decode steps run as ever.
"""

import functools
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters import llm, vlm
from tokencomp.adapters.flops import held_by
from tokencomp.adapters.patch import Patches, all_or_nothing
from tokencomp.adapters.vlm_decoder_run import Counts, Deep, Run
from tokencomp.adapters.vlm_prompt import placeholders
from tokencomp.cache.forward import STEP_TOKENS
from tokencomp.methods.decoder import WATCHES, DecoderMethod, Transition


@dataclass
class Past:
    """What there is to say about the last prompt."""

    prompts: int = 0  # seen so far, with images or without
    counts: list[Counts] = field(default_factory=list)  # of each layer; none without images
    columns: list[Tensor] = field(default_factory=list)  # [B, W] that each layer got, -1: padding
    held: dict[int, list[float]] = field(default_factory=dict)  # of each layer, see ``flops.held_by``
    before: list[int] = field(default_factory=list)  # tokens of each sequence before the prompt
    whole: list[int] = field(default_factory=list)  # and in it, as it entered the first layer
    seconds: float = 0.0


@dataclass
class DecoderStack:
    """A decoder with a method between its layers."""

    base: Any
    decoder: Any
    layers: list[Any]
    method: DecoderMethod
    stops: frozenset[int]
    cache: llm.Stack
    visual: vlm.VisualStack | None  # that chooses visual tokens before the first layer
    patches: Patches = field(default_factory=Patches)
    past: Past = field(default_factory=Past)
    thread: threading.local = field(default_factory=threading.local)


@all_or_nothing()
def attach(
    model: nn.Module, method: DecoderMethod, cache: llm.Stack, visual: vlm.VisualStack | None = None
) -> DecoderStack:
    """Put ``method`` between the layers of the decoder of ``model`` until ``detach``.

    Args:
        model: a vision-language model of Hugging Face.
        method: chooses.
        cache: what is on the decoder's cache, which has to be ours: a layer that gets fewer tokens then
            holds fewer, and positions go on behind all of them.
        visual: what is on its visual tokens before the first layer.

    Raises ValueError for models without visual tokens or of an unknown make, for layers that are not there,
    sliding or built in another way.
    """
    base, _ = vlm.the_vlm(model)
    layers = list(_layers(cache.decoder))
    stops = frozenset(method.acts_after(len(layers)))
    stack = DecoderStack(base, cache.decoder, layers, method, stops, cache, visual)
    _check(stack)
    _hook(stack)
    return stack


def detach(stack: DecoderStack) -> None:
    """Give the model back as it was."""
    stack.patches.restore()


def _layers(decoder: Any) -> nn.ModuleList:
    found = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if len(found) != 1:
        raise ValueError(f"compress: {type(decoder).__name__} must have one list of layers, got {len(found)}")
    return found[0]


def _check(stack: DecoderStack) -> None:
    name, method = type(stack.decoder).__name__, type(stack.method).__name__
    for layer in stack.layers:
        parts = ("self_attn", "input_layernorm", "mlp")
        if not all(isinstance(getattr(layer, part, None), nn.Module) for part in parts):
            raise ValueError(f"compress: layers of {name} must have {', '.join(parts)} for {method}")
    unknown = sorted(set(stack.method.watches) - set(WATCHES))
    if unknown:
        raise ValueError(f"compress: {method} must watch some of {', '.join(WATCHES)}, got {unknown}")
    if "activation" in stack.method.watches and not all(hasattr(x.mlp, "down_proj") for x in stack.layers):
        raise ValueError(f"compress: MLPs of {name} must have a down_proj for {method}")
    paged = stack.cache.new_cache().paged
    if len(paged) != len(stack.layers):
        raise ValueError(
            f"compress: {method} needs full attention in all {len(stack.layers)} layers of {name}, got "
            f"{len(paged)} of them"
        )


def _hook(stack: DecoderStack) -> None:
    def on(register: Any, function: Any, *given: Any, **options: Any) -> None:
        stack.patches.hook(register, functools.partial(function, stack, *given), **options)

    on(stack.base.register_forward_pre_hook, _before_model, with_kwargs=True)
    on(stack.decoder.register_forward_pre_hook, _before_decoder, with_kwargs=True)
    on(stack.decoder.register_forward_hook, _after_decoder, always_call=True)
    for number, layer in enumerate(stack.layers):
        on(layer.register_forward_pre_hook, _before_layer, number, with_kwargs=True)
        on(layer.register_forward_hook, _after_layer, number)
        if number in stack.stops and "transition" in stack.method.watches:
            on(layer.self_attn.register_forward_hook, _after_module, with_kwargs=True)
            on(layer.mlp.register_forward_hook, _after_module, with_kwargs=True)
        if number in stack.stops and "activation" in stack.method.watches:
            on(layer.mlp.down_proj.register_forward_pre_hook, _before_down)


# ---- hooks -----------------------------------------------------------------------------------------------


def _before_model(stack: DecoderStack, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    stack.thread.ids = ids if isinstance(ids, Tensor) else None


def _before_decoder(stack: DecoderStack, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ids, stack.thread.ids = getattr(stack.thread, "ids", None), None
    embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
    before = 0 if cache is None else cache.get_seq_length()
    visual = None if ids is None or embeds is None else _visual(stack, ids, embeds.shape[1])
    step = before > 0 and embeds is not None and embeds.shape[1] <= STEP_TOKENS
    if embeds is None or visual is None or step or not bool(visual.any()):
        if before == 0:
            stack.past = Past(stack.past.prompts + 1)
        return None
    kwargs = dict(kwargs)
    stack.thread.asked = kwargs.get("use_cache")
    if cache is None:
        cache = kwargs["past_key_values"] = stack.cache.new_cache()
    mask = kwargs.get("attention_mask")
    given = torch.ones(len(visual), before + visual.shape[1], dtype=torch.bool, device=visual.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        given = mask[:, : before + visual.shape[1]].to(visual.device).bool()
    real = given[:, before:]
    column = torch.arange(visual.shape[1], device=visual.device)
    run = Run(
        stack.method, stack.stops, len(stack.layers), cache, embeds, visual & real,
        torch.where(real, column, -1), _deep(kwargs),
        None if stack.visual is None else stack.visual.thread.key,
    )  # fmt: skip
    stack.thread.run = run
    stack.thread.held = (held_by(cache) if before else {}), given[:, :before].sum(1).tolist()
    stack.thread.look = llm.looking(run.saw)
    return args, kwargs


def _after_decoder(stack: DecoderStack, module: Any, args: tuple[Any, ...], output: Any) -> Any:
    run: Run | None = getattr(stack.thread, "run", None)
    if run is None:
        return None
    llm.looking(stack.thread.look)
    stack.thread.run = stack.thread.look = None
    if output is None:  # the forward failed
        return None
    freed = stack.method.frees(len(stack.layers))
    if freed:
        left = torch.zeros(run.embeds.shape[0], run.embeds.shape[1] + 1, dtype=torch.bool)
        left = left.to(run.column.device)
        left = left.scatter(1, torch.where(run.column < 0, run.embeds.shape[1], run.column), True)[:, :-1]
        run.cache.release(freed, dict(enumerate(run.columns)), left)
    held, before = stack.thread.held
    stack.past = Past(stack.past.prompts + 1, run.counts, run.columns, held, before, run.tokens, run.seconds)
    if stack.thread.asked is False and hasattr(output, "past_key_values"):
        output.past_key_values = None
    return output


def _before_layer(
    stack: DecoderStack, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    run: Run | None = getattr(stack.thread, "run", None)
    if run is None:
        return None
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states")
    hidden, kwargs = run.enter(number, module, hidden, kwargs)
    return (hidden, *args[1:]), kwargs


def _after_layer(stack: DecoderStack, number: int, module: Any, args: tuple[Any, ...], output: Any) -> Any:
    run: Run | None = getattr(stack.thread, "run", None)
    return None if run is None or run.deep is None else run.leave(number, output)


def _after_module(
    stack: DecoderStack, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    run: Run | None = getattr(stack.thread, "run", None)
    if run is not None and not run.probing:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        run.transitions.append(Transition(before.detach(), after.detach()))


def _before_down(stack: DecoderStack, module: Any, args: tuple[Any, ...]) -> None:
    run: Run | None = getattr(stack.thread, "run", None)
    if run is not None:
        run.activation = args[0].detach()


# ---- a prompt --------------------------------------------------------------------------------------------


def _visual(stack: DecoderStack, ids: Tensor, width: int) -> Tensor | None:
    """``[B, width]`` bool: which of the tokens that enter the decoder are visual; None where none can be
    told.
    """
    visual = placeholders(stack.base, ids)
    kept = None if stack.visual is None else getattr(stack.visual.thread, "kept", None)
    if kept is not None:  # a prompt that was shortened
        own = kept.place[:, kept.place.shape[1] - width :]
        at = own - (kept.columns - ids.shape[1])
        visual = visual.gather(1, at.clamp(min=0)) & (own >= 0)
    return visual if visual.shape[1] == width else None


def _deep(kwargs: dict[str, Any]) -> Deep | None:
    """Takes over what the decoder would add behind its first layers."""
    mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if mask is None or not features:
        return None
    kwargs["visual_pos_masks"] = kwargs["deepstack_visual_embeds"] = None
    order = (mask.flatten().long().cumsum(0) - 1).view(mask.shape)
    return Deep(torch.where(mask, order, -1), list(features))
