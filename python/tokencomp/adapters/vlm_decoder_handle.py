"""What ``tokencomp.compress`` gives for a method between decoder layers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters import vlm_decoder
from tokencomp.adapters.flops import decoder_flops, prefill_flops
from tokencomp.adapters.kv_handle import CompressedCache
from tokencomp.adapters.restoring import Restoring
from tokencomp.adapters.vlm_handle import CompressedVisual


@dataclass(frozen=True)
class DecoderReport:
    """What became of the visual tokens of the last prompt with images, layer by layer."""

    method: str
    tokens: tuple[list[int], ...] = ()  # of each sequence in each layer; empty without an image
    visual: tuple[list[int], ...] = ()  # visual ones of them
    columns: tuple[Tensor, ...] = ()  # [B, W] int64 of the prompt that each layer got, -1: none
    flops: int = 0  # of the layers in that prompt, and those of ``chosen.encoder_flops``
    dense_flops: int = 0  # the same with all visual tokens in all layers, also those that a method before the
    # first layer left out: ``chosen.dense_flops``; what that one saved alone is ``chosen.saved``
    seconds: float = 0.0  # of the host, in scoring and choosing
    prompts: int = 0  # seen so far, with images or without
    cache: Any = None  # the report of the cache
    chosen: Any = None  # that of the method before the first layer, where there is one

    @property
    def saved(self) -> float:
        """Share of the floating-point operations that were not done."""
        return 1 - self.flops / self.dense_flops if self.dense_flops else 0.0

    def __str__(self) -> str:
        if not self.tokens:
            return f"{self.method}: no image in the prompt, nothing done"
        left = " ".join(str(sum(layer)) for layer in self.visual)
        cut = self.chosen is not None and self.chosen.encoder_dense_flops
        first = "" if self.chosen is None else f", {self.chosen.saved:.1%} before the first of them"
        return (
            f"{self.method}: visual tokens by layer {left}; {self.saved:.1%} of the FLOPs of "
            f"{len(self.tokens)} layers{' and the encoder' if cut else ''} saved{first}, chosen in "
            f"{self.seconds:.3f} s"
        )


class CompressedDecoder(Restoring):
    """A vision-language model with a method between the layers of its decoder, whose cache is in pages.

    A context manager: leaving it, also by an exception, restores the model.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: vlm_decoder.DecoderStack,
        cache: CompressedCache,
        visual: CompressedVisual | None = None,
    ) -> None:
        self.model, self.cache_handle, self.visual_handle = model, cache, visual
        self._stack = stack

    def _restore(self) -> None:
        vlm_decoder.detach(self._stack)
        if self.visual_handle is not None:
            self.visual_handle.remove()
        self.cache_handle.remove()

    def report(self) -> DecoderReport:
        """What became of the visual tokens of the last prompt with images; ``report().cache`` is that of the
        cache, ``report().chosen`` that of the method before the first layer.

        Raises RuntimeError before the first prompt.
        """
        past, stack = self._stack.past, self._stack
        if not past.prompts:
            raise RuntimeError("compress: there was no prompt yet")
        tokens = tuple(count.tokens.tolist() for count in past.counts)
        layers = stack.layers if tokens else []
        chosen = None if self.visual_handle is None else self.visual_handle.report()
        flops = sum(
            decoder_flops(layer, n, past.held.get(i, past.before))
            for i, (layer, n) in enumerate(zip(layers, tokens, strict=True))
        )
        dense = prefill_flops(layers, past.whole, past.before)
        if chosen is not None and chosen.images and tokens:
            flops, dense = flops + chosen.encoder_flops, chosen.dense_flops
        return DecoderReport(
            method=type(stack.method).__name__,
            tokens=tokens,
            visual=tuple(count.visual.tolist() for count in past.counts),
            columns=tuple(past.columns),
            flops=flops,
            dense_flops=dense,
            seconds=past.seconds,
            prompts=past.prompts,
            cache=self.cache_handle.report(),
            chosen=chosen,
        )

    def new_cache(self) -> Any:
        """An empty cache for this model."""
        return self.cache_handle.new_cache()
