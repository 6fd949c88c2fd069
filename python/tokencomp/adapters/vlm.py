"""Fewer visual tokens between the vision encoder and the language model of a vision-language model.

``attach`` lets the model embed images and text as ever; on the way into the decoder, what a
``VisualMethod`` leaves out is left out of embeddings, positions and masks. What is left keeps the positions
it had unless they are to be ``compact``. Nothing is written to modules or configurations.
"""

import functools
import inspect
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokencomp import ragged
from tokencomp.adapters.flops import decoder_layers, prefill_flops
from tokencomp.adapters.outputs import signed
from tokencomp.adapters.patch import Patches, all_or_nothing, is_patched
from tokencomp.adapters.vlm_encoder import EncoderLook
from tokencomp.adapters.vlm_families import FAMILIES, Way, way_of
from tokencomp.adapters.vlm_prompt import Chosen, Passes, placeholders
from tokencomp.adapters.vlm_rows import Newlines, Rows, joined, rows_of, view_of
from tokencomp.methods.visual import VisualMethod

Positions = Literal["preserve", "compact"]


@dataclass
class Kept:
    """Which columns of all that were given a cache (or a forward without one) went on."""

    place: Tensor  # [B, W] int64, -1 where a shorter row has none
    columns: int  # that were given
    removed: Tensor  # [B] int64


@dataclass
class VisualReport:
    """What became of the visual tokens of the last prompt with images."""

    method: str
    tokens: int = 0  # visual tokens of the prompt, all images
    kept: int = 0
    images: int = 0
    index: list[Tensor] = field(default_factory=list)  # of each group of like images [M, K] int32, by crop
    grid: list[tuple[int, int] | None] = field(default_factory=list)
    key: Tensor | None = None  # [B, W] bool of the prompt that is left, see ``VisualKeep.key``
    text: int = 0  # other tokens of the prompt, all rows, no padding
    flops: int = 0  # of the decoder's layers in that prompt, and of the encoder's where a method cuts there
    dense_flops: int = 0  # the same with all visual tokens, also those of earlier prompts; see ``saved``
    encoder_flops: int = 0  # the encoder's part of both, see ``adapters.flops.tower_flops``
    encoder_dense_flops: int = 0
    seconds: float = 0.0  # of the host, in scoring and choosing
    prompts: int = 0  # seen so far, with images or without
    cache: Any = None  # the report of the cache, where that is compressed too

    @property
    def saved(self) -> float:
        """Share of the floating-point operations that were not done: of the decoder's layers, and of the
        encoder's where patches were cut out between them. Projector, scoring and what a cache evicted of
        earlier prompts are not counted.
        """
        return 1 - self.flops / self.dense_flops if self.dense_flops else 0.0

    def __str__(self) -> str:
        if not self.images:
            return f"{self.method}: no image in the prompt, nothing done"
        layers = "encoder and decoder" if self.encoder_dense_flops else "decoder"
        return (
            f"{self.method}: {self.kept} of {self.tokens} visual tokens of {self.images} images, "
            f"{self.kept + self.text} of {self.tokens + self.text} tokens of the prompt; {self.saved:.1%} of "
            f"the FLOPs of {layers} layers saved, chosen in {self.seconds:.3f} s"
            + ("" if self.cache is None else f"; {self.cache}")
        )


@dataclass
class VisualStack:
    """A vision-language model with a method on its visual tokens."""

    base: Any
    method: VisualMethod
    positions: Positions
    newlines: Newlines
    way: Way
    look: EncoderLook
    patches: Patches = field(default_factory=Patches)
    report: VisualReport = field(default_factory=lambda: VisualReport(""))
    passes: Passes = field(default_factory=Passes)  # of the encoder, not used yet
    caches: "weakref.WeakKeyDictionary[Any, Kept]" = field(default_factory=weakref.WeakKeyDictionary)
    thread: threading.local = field(default_factory=threading.local)


@all_or_nothing()
def attach(
    model: nn.Module,
    method: VisualMethod,
    *,
    positions: Positions = "preserve",
    newlines: Newlines = "rows",
) -> VisualStack:
    """Put ``method`` on the visual tokens of ``model`` until ``detach``.

    Args:
        model: a vision-language model of Hugging Face.
        method: chooses.
        positions: ``preserve``: kept tokens stay where they were; ``compact``: they are numbered anew.
        newlines: which newline tokens behind rows of tiles stay: those of ``rows`` with a kept token,
            ``all`` or ``none``.

    Raises ValueError for models without visual tokens, or of an unknown make.
    """
    for name, value, known in (
        ("positions", positions, ("preserve", "compact")), ("newlines", newlines, ("rows", "all", "none")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"compress: {name} must be {' or '.join(known)}, got {value!r}")
    base, way = the_vlm(model)
    if is_patched(base):
        raise ValueError(f"compress: this {type(model).__name__} is compressed already; remove() that first")
    look = way.look(base, method)
    stack = VisualStack(
        base, method, positions, newlines, way, look, report=VisualReport(type(method).__name__)
    )
    look.attach(stack.patches)
    cls: Any = type(base)
    stack.patches.add(
        base,
        forward=_forward(cls.forward, stack),
        **{
            f"get_{kind}_features": _features(getattr(cls, f"get_{kind}_features"), stack, kind)
            for kind in way.kinds(base)
        },
    )
    hook = functools.partial(_before_decoder, stack)
    stack.patches.hook(stack.base.language_model.register_forward_pre_hook, hook, with_kwargs=True)
    return stack


def detach(stack: VisualStack) -> None:
    """Give the model back as it was."""
    stack.patches.restore()


def the_vlm(model: nn.Module) -> tuple[nn.Module, Way]:
    """The module of ``model`` that holds encoder and decoder, and how it makes visual tokens. Raises
    ValueError without one.
    """
    for module in model.modules():
        way = way_of(module)
        if way is not None:
            return module, way
    raise ValueError(
        f"compress: found no vision-language model in {type(model).__name__} whose visual tokens could be "
        f"chosen; known: {FAMILIES}. Another one needs a Way in tokencomp.adapters.vlm_families"
    )


def _features(original: Any, stack: VisualStack, kind: str) -> Any:
    names = list(inspect.signature(original).parameters)[1:]

    def get_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(stack.passes.waiting)
        found = original(self, *args, **kwargs)
        if len(stack.passes.waiting) > before:  # videos that went through the function for images
            stack.passes.rename(kind)
            return found
        features = found.pooler_output if hasattr(found, "pooler_output") else found
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        encoded = stack.way.encoded(stack.base, stack.look, list(features), given, kind)
        stack.passes.add(kind, encoded, (0, 0) if stack.look.cut is None else stack.look.cut.flops())
        return found

    return functools.wraps(original)(get_features)


def _forward(original: Any, stack: VisualStack) -> Any:
    names = list(inspect.signature(original).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        stack.thread.prompt = {
            "ids": kwargs.get("input_ids"),
            "outputs": kwargs.get("mm_encoder_outputs"),
            "positions": kwargs.get("position_ids") is not None,
        }
        stack.thread.kept = stack.thread.key = None
        try:
            output = original(self, **kwargs)
        finally:
            stack.thread.prompt = None
        cache = getattr(output, "past_key_values", None)
        if stack.thread.kept is not None and cache is not None:
            stack.caches[cache] = stack.thread.kept
        return output

    return signed(forward, original)


def _before_decoder(
    stack: VisualStack, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    prompt, cache = getattr(stack.thread, "prompt", None), kwargs.get("past_key_values")
    before = None if cache is None else stack.caches.get(cache)
    if before is not None and cache is not None and cache.get_seq_length() == 0:
        before = None  # it was reset
    images = None if prompt is None else stack.passes.of(stack.base, prompt["ids"], prompt["outputs"])
    if images is None:
        if prompt is not None and before is None:
            stack.report = VisualReport(type(stack.method).__name__, prompts=stack.report.prompts + 1)
        own = prompt is None or prompt["positions"]
        return None if before is None else (args, _later(stack, before, dict(kwargs), own))
    ids: Tensor = (prompt or {})["ids"]
    return args, _shortened(stack, images, placeholders(stack.base, ids), ids, before, dict(kwargs))


def _shortened(
    stack: VisualStack, images: Chosen, mask: Tensor, ids: Tensor, before: Kept | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The decoder's arguments for a prompt, without the visual tokens that do not go on."""
    embeds, tokens = kwargs["inputs_embeds"], mask.shape[1]
    rows = _choose(stack, images, mask, embeds)
    embeds = embeds.masked_scatter(mask[..., None], rows.values.to(embeds.dtype))
    stays = (~mask).masked_scatter(mask, rows.kept)
    padding = kwargs.get("attention_mask")
    past = 0 if before is None else before.columns
    real = torch.ones(len(ids), past + tokens, dtype=torch.bool, device=ids.device)
    if padding is not None and padding.dim() == 2:
        real = padding[:, : past + tokens].bool()
    stays = stays & real[:, past:]
    _count(stack, real, stays, before)
    place = ragged.right_packed(stays)
    there = place >= 0
    at = place.clamp(min=0)
    if rows.key is not None:
        key = torch.zeros_like(mask).masked_scatter(mask, rows.key)
        stack.report.key = stack.thread.key = key.gather(1, at) & there
    kwargs["inputs_embeds"] = _take(embeds, at) * there[..., None]
    kwargs["position_ids"] = _positions(stack, kwargs.get("position_ids"), at, there, before, past)
    if kwargs.get("visual_pos_masks") is not None:  # features that the first decoder layers add
        deep = kwargs.get("deepstack_visual_embeds") or []
        kwargs["visual_pos_masks"] = mask.gather(1, at) & there
        kwargs["deepstack_visual_embeds"] = [layer[stays[mask]] for layer in deep]
    own = torch.where(there, place + past, -1)
    whole = own if before is None else torch.cat([before.place, own], 1)
    kwargs["attention_mask"] = (whole >= 0).to(ids.dtype)
    removed = tokens - there.sum(1) + (0 if before is None else before.removed)
    stack.thread.kept = Kept(whole, past + tokens, removed)
    return kwargs


def _count(stack: VisualStack, real: Tensor, stays: Tensor, before: Kept | None) -> None:
    """Into the report: tokens that are no padding, and what layers compute for them.

    Args:
        real: ``[B, past + S]`` bool, no padding, of all columns given. stays: ``[B, S]`` bool.
    """
    report, layers = stack.report, decoder_layers(stack.base.language_model)
    past = real.shape[1] - stays.shape[1]
    held = dense = real[:, :past].sum(1)
    if before is not None:
        held = (real.gather(1, before.place.clamp(min=0)) & (before.place >= 0)).sum(1)
    whole = real[:, past:].sum(1).tolist()
    report.text = sum(whole) - report.tokens
    report.encoder_flops, report.encoder_dense_flops = stack.passes.flops
    report.flops = report.encoder_flops + prefill_flops(layers, stays.sum(1).tolist(), held.tolist())
    report.dense_flops = report.encoder_dense_flops + prefill_flops(layers, whole, dense.tolist())


def _choose(stack: VisualStack, images: Chosen, mask: Tensor, embeds: Tensor) -> Rows:
    """All packed visual rows, in order."""
    sizes = [len(image.features) for _, image in images]
    row = mask.nonzero()[torch.tensor([0, *sizes[:-1]]).cumsum(0).to(mask.device), 0]  # of each image
    stack.report = VisualReport(
        type(stack.method).__name__, sum(sizes), images=len(images), prompts=stack.report.prompts + 1
    )
    begin = time.perf_counter()
    found: dict[int, Rows] = {}
    for encoded in {id(e): e for e, _ in images}.values():
        mine = [i for i, (e, _) in enumerate(images) if e is encoded]
        view = view_of(encoded, [images[i][1] for i in mine], embeds[row[mine]], ~mask[row[mine]])
        with torch.no_grad():
            keep = stack.method.choose(view)
        stack.report.index.append(keep.index)
        stack.report.grid.append(view.grid)
        first = 0
        for i in mine:
            image = images[i][1]
            crops = slice(first, first + len(image.crops))
            found[i] = rows_of(image, keep, crops, view.x, stack.newlines)
            first += len(image.crops)
    rows = joined([found[i] for i in range(len(images))])
    stack.report.kept = int(rows.kept.sum())
    stack.report.seconds = time.perf_counter() - begin
    return rows


def _take(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def _positions(
    stack: VisualStack, given: Tensor | None, at: Tensor, there: Tensor, before: Kept | None, past: int
) -> Tensor:
    if stack.positions == "compact":
        start = 0 if before is None else (before.columns - before.removed)[:, None]
        compact = (there.long().cumsum(1) - 1).clamp(min=0) + start
        return compact if given is None or given.dim() == 2 else compact.expand(given.shape[0], *at.shape)
    if given is None:
        return at + past
    lead = given.shape[:-2]
    position = given.expand(*lead, at.shape[0], -1).gather(-1, at.expand(*lead, *at.shape))
    if position.dim() == 3 and position.shape[0] == 4:  # the first says where packed sequences begin
        position[0] = there.long().cumsum(1) - 1
    return position


def _later(stack: VisualStack, before: Kept, kwargs: dict[str, Any], own: bool) -> dict[str, Any]:
    """The decoder's arguments for text that goes on behind a shortened prompt.

    ``own``: positions were given from outside; those a model makes itself go by what the cache holds.
    """
    embeds = kwargs["inputs_embeds"]
    batch, tokens = embeds.shape[:2]
    new = torch.arange(before.columns, before.columns + tokens, device=embeds.device).expand(batch, -1)
    position = kwargs.get("position_ids")
    if position is None:
        position = new
    elif not own:
        position = position + before.columns - before.place.shape[1]
    if stack.positions == "compact":
        position = position - before.removed[:, None]
    kwargs["position_ids"] = position
    mask, place = kwargs.get("attention_mask"), torch.cat([before.place, new], 1)
    held = torch.ones_like(place)
    if mask is not None and mask.dim() == 2:
        held = mask.gather(1, place.clamp(min=0, max=mask.shape[1] - 1)).to(torch.long)
    if mask is not None or bool((before.place < 0).any()):
        kwargs["attention_mask"] = held.masked_fill(place < 0, 0)
    stack.thread.kept = Kept(place, before.columns + tokens, before.removed)
    return kwargs
