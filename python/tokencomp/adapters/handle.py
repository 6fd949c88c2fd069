"""``tokencomp.compress``: attach methods to a model, and take them off again."""

from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor, nn

from tokencomp import token_map
from tokencomp.adapters import llm, patch, vit, vlm, vlm_decoder
from tokencomp.adapters.kv_handle import CompressedCache
from tokencomp.adapters.restoring import Restoring
from tokencomp.adapters.vlm_decoder_handle import CompressedDecoder
from tokencomp.adapters.vlm_handle import CompressedVisual
from tokencomp.adapters.vlm_rows import Newlines
from tokencomp.cache import KeepAll
from tokencomp.methods import base, kv
from tokencomp.methods.decoder import DecoderMethod
from tokencomp.methods.kv import KVMethod
from tokencomp.methods.layers import LayerMethod
from tokencomp.methods.sparse import SparseMethod
from tokencomp.methods.visual import VisualMethod

CACHE, SPARSE, LAYERS = "method on the KV cache", "sparse method", "method on encoders"
VISUAL, DECODER = "method on visual tokens", "method between decoder layers"


@dataclass(frozen=True)
class Report:
    """What one forward pass of a compressed encoder did."""

    method: str
    family: str
    attention: str  # the implementation the user chose; it is the one that runs
    key_bias: bool  # whether log sizes or padding came to it as a float mask, which flash kernels refuse
    dense: bool  # whether the encoder's outputs were unmerged
    tokens: tuple[int, ...]  # that enter the first layer, then those each layer's MLP works on
    prefix: int
    grid: tuple[int, int] | None  # rows and columns of patches
    token_map: Tensor  # [B, N0] int32: the final token each input token went into, -1 where it was dropped
    size: Tensor | None  # [B, M] float32

    def __str__(self) -> str:
        steps = " ".join(str(count) for count in self.tokens)
        return f"{self.method} on {self.family} ({self.attention}): tokens {steps}"


class Compressed(Restoring):
    """A model with methods on it. A context manager: leaving it, also by an exception, restores the model."""

    def __init__(self, model: nn.Module, stacks: list[vit.Stack]) -> None:
        self.model = model
        self._stacks = stacks

    def _restore(self) -> None:
        for stack in reversed(self._stacks):
            vit.detach(stack)

    def report(self) -> Report:
        """What this thread's last forward pass did. Raises RuntimeError before the first one."""
        stack, run = self._last()
        if run.next_layer != len(stack.layers):
            raise RuntimeError(f"report: the last forward pass ended in layer {run.next_layer}")
        return Report(
            method=type(stack.method).__name__,
            family=stack.family.name,
            attention=stack.family.attention_name(stack.layers[0]),
            key_bias=run.bias is not None,
            dense=stack.dense,
            tokens=tuple(run.tokens),
            prefix=run.prefix,
            grid=run.grid,
            token_map=run.source,
            size=run.size,
        )

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every input token the row it went into: ``[B, M, C]`` to ``[B, N0, C]``, 0 where dropped.

        ``y`` is what the last forward pass returned as ``last_hidden_state``, or anything with its rows.
        Raises ValueError for another number of rows.
        """
        _, run = self._last()
        expected = [run.source.shape[0], run.tokens[-1]]
        if y.dim() != 3 or list(y.shape[:2]) != expected:
            raise ValueError(f"unmerge: y must be {[*expected, 'C']}, got {list(y.shape)}")
        return token_map.unmerge(y, run.source)

    def _last(self) -> tuple[vit.Stack, Any]:
        stack = self._stacks[0]
        run = stack.pass_seen
        if self._removed or run is None:
            raise RuntimeError(
                "compress: there was no forward pass in this thread, or the handle was removed"
            )
        return stack, run


@overload
def compress(model: nn.Module, method: LayerMethod, /, *, dense: bool | None = None) -> Compressed:
    """On an encoder."""


@overload
def compress(
    model: nn.Module,
    method: KVMethod | SparseMethod,
    other: KVMethod | SparseMethod = ...,
    /,
    *,
    page: int | None = None,
    memory_limit: int | str | None = None,
    chunks: Literal["each", "last"] = "each",
    attention: llm.Attention = "paged",
) -> CompressedCache:
    """On the cache of a decoder."""


@overload
def compress(
    model: nn.Module,
    method: VisualMethod,
    /,
    *methods: KVMethod | SparseMethod,
    positions: vlm.Positions = "preserve",
    newlines: Newlines = "rows",
    page: int | None = None,
    memory_limit: int | str | None = None,
    chunks: Literal["each", "last"] = "each",
    attention: llm.Attention = "paged",
) -> CompressedVisual:
    """On the visual tokens of a vision-language model, and on the cache of its decoder."""


@overload
def compress(
    model: nn.Module,
    method: DecoderMethod,
    /,
    *methods: VisualMethod | KVMethod | SparseMethod,
    positions: vlm.Positions = "preserve",
    newlines: Newlines = "rows",
    page: int | None = None,
    memory_limit: int | str | None = None,
    chunks: Literal["each", "last"] = "each",
) -> CompressedDecoder:
    """On visual tokens between the layers of that decoder, and on all of the above."""


@patch.all_or_nothing()
def compress(
    model: nn.Module,
    *methods: Any,
    dense: bool | None = None,
    positions: vlm.Positions = "preserve",
    newlines: Newlines = "rows",
    page: int | None = None,
    memory_limit: int | str | None = None,
    chunks: Literal["each", "last"] = "each",
    attention: llm.Attention = "paged",
) -> Compressed | CompressedCache | CompressedVisual | CompressedDecoder:
    """Make ``model`` process or remember fewer tokens, until the handle is removed or its context left.

    ``with tokencomp.compress(model, methods.ToMe(r=16)) as handle: model(pixel_values=...); handle.report()``
    ``with tokencomp.compress(model, methods.A2SF(budget=512)) as handle: model.generate(...)``

    A method between attention and MLP (``tokencomp.methods.layers.LayerMethod``) works on the one
    encoder in the model. Its layers get a subclass of their class; weights, names, hooks and
    configuration stay untouched, and copies and pickles made meanwhile are of the plain model. A layer
    whose tokens the method leaves alone gives bit for bit what it gave.

    Sizes count: they go into the logits of later attention where the method is ``proportional``, into
    the mean of heads that classify a mean of patches, and into SigLIP's attention pooling. Hidden states
    of different layers have different lengths.

    A method on the KV cache (``tokencomp.methods.kv.KVMethod``) works on the one decoder in the model. Every
    cache the model makes meanwhile is a ``PagedKVCache``, also an empty ``DynamicCache`` that is passed in;
    its full-attention layers hold in pages what the method keeps, sliding ones are those of transformers.
    Padding, which ``attention_mask`` ``[B, N]`` names, is never stored; positions are those of all tokens
    seen. After each layer's attention to a prompt, or a chunk of one, the method evicts; then in decode
    steps, forwards of up to 8 tokens, when it likes. For inference: no gradients flow through the cache.

    A sparse method (``tokencomp.methods.sparse.SparseMethod``) restricts what the attention of that decoder
    reads, of the cache in decode steps and of the keys in prompts; alone, it evicts nothing. It may come with
    one method on the KV cache, in any order: ``compress(model, A2SF(budget=4096), Quest(k=512))``; then it
    chooses among what that keeps, and what a step did not read received no attention in that step.

    A method on visual tokens (``tokencomp.methods.visual.VisualMethod``) works between the vision encoder and
    the decoder of a vision-language model; it may come with methods on that decoder's cache and attention:
    ``compress(model, ToDRE(keep=0.1), ZipCache(), Quest())``. What is left out never enters the decoder, so
    outputs of a prompt have fewer rows; ``generate`` needs no other argument.

    A method between decoder layers (``tokencomp.methods.decoder.DecoderMethod``) leaves visual tokens out
    behind the layers it names; later layers compute and hold fewer. It makes the decoder's caches
    ``PagedKVCache``, and may come with one method of each of the other kinds on that model, in any order:
    ``compress(model, ToDRE(keep=0.25), FastV(), A2SF(budget=512))``.

    Args:
        model: the whole model, head included. Known encoders: ``tokencomp.adapters.families()``; decoders of
            Hugging Face that attend through ``AttentionInterface``.
        methods: one method; on decoders one on the KV cache, a sparse one, or one of each; in front of them
            one on visual tokens, and one between decoder layers.
        positions: of visual tokens that stay: ``preserve`` those they had, or ``compact``, numbered anew.
        newlines: which newline tokens behind rows of tiles stay: those of ``rows`` with a kept token, ``all``
            or ``none``.
        page: slots of a page, 16, 32 or 64; default 32 on a CPU, 64 on CUDA.
        memory_limit: bytes that the pages of one cache never exceed, or ``"2GiB"``; while they are copied to
            get more, the old ones come on top for a moment.
        chunks: when a prompt in several forwards is evicted from, whose last one is not known as such:
            ``each`` after each, which bounds memory; ``last`` at the first decode step, before it is stored.
        attention: ``paged``: ours, which reads pages; ``model``: the implementation the model has, which is
            handed all held keys as one tensor (for methods that look at no queries, with equal numbers of
            tokens in all layers and heads).
        dense: whether the encoder's outputs are unmerged to one row a token. By default they are where
            somebody around it may need that: backbones, heads on every token, vision-language models,
            modules that this package does not know. An encoder by itself and heads on its first token or
            on a mean get merged tokens.

    Raises:
        TypeError: something that is no method, or an argument of the other kind of method.
        ValueError: no known encoder, more than one, one that is compressed already, a forward that
            differs from the known one, an attention implementation that cannot do what the method needs, a
            name of ours that others registered with transformers.
    """
    if not isinstance(model, nn.Module):
        hint = "; load it first, by from_pretrained" if isinstance(model, str) else ""
        hint = "; a pipeline's model is its .model" if hasattr(model, "model") else hint
        raise TypeError(f"compress: model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    given = _by_kind(methods)
    on_layers, visual, between = given.get(LAYERS), given.get(VISUAL), given.get(DECODER)
    placed = positions != "preserve" or newlines != "rows"
    cached = {
        "page": page is not None, "memory_limit": memory_limit is not None, "chunks": chunks != "each",
        "attention": attention != "paged",
    }  # fmt: skip
    if on_layers is not None:
        _refuse(on_layers, "encoders", **cached, positions=placed)
        return Compressed(model, [vit.attach(model, on_layers, dense=dense)])
    first = next(given[kind] for kind in (VISUAL, DECODER, CACHE, SPARSE) if kind in given)
    _refuse(first, "decoders", dense=dense is not None, positions=placed and visual is None)
    if between is not None:
        _refuse(between, "the decoder's own attention", attention=attention != "paged")
    cache = None
    if CACHE in given or SPARSE in given or between is not None:
        limit = kv.parse_bytes(memory_limit) if isinstance(memory_limit, str) else memory_limit
        options: Any = {"page": page, "limit": limit, "chunks": chunks, "attention": attention}
        kept = given.get(CACHE, KeepAll())
        cache = CompressedCache(model, llm.attach(model, kept, sparse=given.get(SPARSE), **options))
    if visual is not None:
        _refuse(visual, "visual tokens without one on the cache", **(cached if cache is None else {}))
    return _attached(model, cache, visual, between, {"positions": positions, "newlines": newlines})


def _attached(
    model: nn.Module, cache: CompressedCache | None, visual: Any, between: Any, options: Any
) -> CompressedCache | CompressedVisual | CompressedDecoder:
    """The handle of a decoder whose cache is compressed already, if it is to be."""
    stack = None
    if visual is not None:
        stack = vlm.attach(model, visual, **options)
    if between is not None:
        assert cache is not None
        layers = vlm_decoder.attach(model, between, cache.stack, stack)
        chosen = None if stack is None else CompressedVisual(model, stack)
        return CompressedDecoder(model, layers, cache, chosen)
    if stack is not None:
        return CompressedVisual(model, stack, cache)
    assert cache is not None
    return cache


def _by_kind(methods: tuple[Any, ...]) -> dict[str, Any]:
    """What ``compress`` was given. Raises TypeError for what does not go together."""
    if not methods:
        raise TypeError("compress: expected one method, got 0")
    found: dict[str, Any] = {}
    for method in methods:
        for kind in _kinds(method):
            if kind in found:
                raise TypeError(f"compress: expected at most one {kind}, got {found[kind]!r} and {method!r}")
            found[kind] = method
    if len(found) > 1 and LAYERS in found:
        raise TypeError(f"compress: {found[LAYERS]!r} is a method of encoders and goes with no other")
    return found


def _kinds(method: Any) -> list[str]:
    """What ``method`` is; several only where it works before and between decoder layers."""
    protocols: dict[str, Any] = {
        CACHE: KVMethod,
        SPARSE: SparseMethod,
        LAYERS: LayerMethod,
        VISUAL: VisualMethod,
        DECODER: DecoderMethod,
    }
    if not isinstance(method, type):
        found = [kind for kind, protocol in protocols.items() if isinstance(method, protocol)]
        if found:
            return found if found == [VISUAL, DECODER] else found[:1]
    raise TypeError(_hint(method))


def _hint(method: Any) -> str:
    """What is wrong with something that is no method."""
    given = method if isinstance(method, str | type) else None
    names = [entry for entry in base.all_methods() if given in (entry.name, entry.cls, entry.cls.__name__)]
    if names:
        cls = names[0].cls.__name__
        return f"compress: a method is an object, tokencomp.methods.{cls}(...), got {method!r}"
    if isinstance(method, str):
        return (
            "compress: a method is an object such as tokencomp.methods.SnapKV(budget=512), got "
            f"{method!r}; `python -m tokencomp methods` lists them"
        )
    return (
        "compress: a method has proportional, begin() and reduce() (tokencomp.methods.layers) or is one "
        "of KV caches (tokencomp.methods.kv), a sparse one (tokencomp.methods.sparse), one of visual "
        "tokens (tokencomp.methods.visual) or one between decoder layers (tokencomp.methods.decoder), got "
        f"{method!r}"
    )


def _refuse(method: object, kind: str, **given: bool) -> None:
    wrong = [name for name, there in given.items() if there]
    if wrong:
        raise TypeError(f"compress: {type(method).__name__} is a method of {kind}, which take no {wrong[0]}")
