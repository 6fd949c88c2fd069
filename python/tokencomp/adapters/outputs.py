"""What comes after the last layer of a compressed encoder: poolings, heads, models that want patches."""

import functools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokencomp import merged, token_map
from tokencomp.adapters.families import class_names
from tokencomp.adapters.patch import Patches
from tokencomp.adapters.run import Run

# Models around an encoder that read its first token or its pooled output, or hand its tokens on as they are.
TAKES_MERGED = re.compile(
    r"(ForImageClassification(WithTeacher(Output)?)?|VisionModel(WithProjection)?|ForSequenceClassification"
    r"|ForMultipleChoice|ForNextSentencePrediction|^(CLIP|Siglip)Model)$"
)
# Of these, those that classify the plain mean of the patches.
TAKES_MEAN = {
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "CLIPForImageClassification",
    "SiglipForImageClassification",
}
WRAPPERS = {"OptimizedModule", "DataParallel", "DistributedDataParallel"}


def signed(function: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the signature and docstring of ``like``."""
    return functools.wraps(like)(function)


def wants_dense(around: tuple[nn.Module, ...], root: nn.Module) -> bool:
    """Whether somebody around the encoder may need one token a patch: everybody not known to do without."""
    if any(name.endswith("Backbone") for name in class_names(root)):
        return True
    outside = around[: around.index(root)]
    known = (
        bool(WRAPPERS & class_names(module)) or any(TAKES_MERGED.search(name) for name in class_names(module))
        for module in outside
    )
    return not all(known)


def patch(
    patches: Patches, stack: Any, around: tuple[nn.Module, ...], root: nn.Module, dense: bool | None
) -> None:
    """Patch what consumes the tokens of ``stack``.

    Args:
        patches: takes the patches.
        stack: the compressed encoder.
        around: the modules around its layers, outermost first.
        root: the one of them with the embeddings.
        dense: whether outputs are unmerged; None: where ``wants_dense``.
    """
    stack.dense = wants_dense(around, root) if dense is None else dense
    family = stack.family
    if family.outputs == "features":
        family.patch_outputs(patches, root, stack, stack.dense)
        return
    holder = around[-1] if family.outputs == "owner" else root
    mean = any(TAKES_MEAN & class_names(module) for module in around[: around.index(root)])
    if stack.dense:
        patches.add(holder, forward=_dense_forward(type(holder).forward, stack))
        outside = around[: around.index(root)]
        if holder is root and outside and type(outside[-1]).__name__.endswith("VisionModel"):
            # SigLIP of transformers 5.4: the module around the encoder collects the layers' hidden states
            patches.add(outside[-1], forward=_dense_hidden(type(outside[-1]).forward, stack))
    elif mean:
        patches.add(root, forward=_mean_forward(type(root).forward, stack))
    head = getattr(getattr(root, "head", None), "attention", None)
    if isinstance(head, nn.MultiheadAttention) and stack.method.proportional:
        patches.add(head, forward=_biased_forward(type(head).forward, stack))


def unmerge(y: Tensor, run: Run, layer: int = -1) -> Tensor:
    """``y`` ``[B, M, C]`` after ``layer`` as ``[B, N0, C]``; dropped tokens are 0."""
    source = run.sources[layer]
    return y if source is None else token_map.unmerge(y, source)


def _dense_forward(forward: Callable[..., Any], stack: Any) -> Callable[..., Any]:
    def dense(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        run = stack.run
        if not run.reduced:
            return result
        if isinstance(result, Tensor):
            return unmerge(result, run)
        if isinstance(result, tuple):
            return (unmerge(result[0], run), *(_dense_states(value, run) for value in result[1:]))
        result["last_hidden_state"] = unmerge(result["last_hidden_state"], run)
        if result.get("hidden_states") is not None:
            result["hidden_states"] = _dense_states(result["hidden_states"], run)
        return result

    return signed(dense, forward)


def _dense_hidden(forward: Callable[..., Any], stack: Any) -> Callable[..., Any]:
    def dense(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        run = stack.run
        if run.reduced and isinstance(result, tuple):
            return (*result[:1], *(_dense_states(value, run) for value in result[1:]))
        if run.reduced and result.get("hidden_states") is not None:
            result["hidden_states"] = _dense_states(result["hidden_states"], run)
        return result

    return signed(dense, forward)


def _dense_states(states: Any, run: Run) -> Any:
    """The hidden states after the embeddings and after each layer, unmerged; anything else as it is."""
    tensors = isinstance(states, tuple) and len(states) == len(run.sources)
    if not tensors or any(state is not None and state.dim() != 3 for state in states):
        return states
    return tuple(
        state if state is None or state.shape[1] == run.tokens[0] else unmerge(state, run, layer)
        for layer, state in enumerate(states)
    )


def _mean_forward(forward: Callable[..., Any], stack: Any) -> Callable[..., Any]:
    """The classifier around this model takes the plain mean of the patches: hand it weighted rows."""

    def weighted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        run = stack.run
        if run.size is not None:
            rows = merged.weigh_rows(result["last_hidden_state"], run.size, run.prefix)
            result["last_hidden_state"] = rows
        return result

    return signed(weighted, forward)


def _biased_forward(forward: Callable[..., Any], stack: Any) -> Callable[..., Any]:
    """Attention pooling (SigLIP) over merged tokens: ``log size`` on keys of ``nn.MultiheadAttention``."""

    def biased(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = stack.last(key)
        if run is None or run.bias is None:
            return forward(self, query, key, value, *args, **kwargs)
        bias = merged.as_bias(run.bias, query.dtype)[:, 0]
        heads = bias.expand(-1, query.shape[1], -1).repeat_interleave(self.num_heads, dim=0)
        return forward(self, query, key, value, *args, attn_mask=heads, **kwargs)

    return signed(biased, forward)
