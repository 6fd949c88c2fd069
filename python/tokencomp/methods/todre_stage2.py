"""ToDRE, second stage: no visual tokens at all once the text has read them (arXiv 2505.18757)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import decoder
from tokencomp.methods.base import register
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning
from tokencomp.methods.todre import ToDRE


@register("todre_stage2", paper="2505.18757", stage="between decoder layers")
@dataclass(frozen=True)
class ToDREStage2(Pruning):
    """Drops all visual tokens behind a late layer if text and visual tokens hardly attend to each other.

    In layer ``floor(7 L / 8)``, and never later than the last but one, the shares of attention that the text
    behind the first image spends on visual tokens and that these spend on that text, means over heads and
    rows, are compared with ``tau``; see ``ToDRE.stage2_prune``. Sequences decide each for itself; one without
    text behind its image keeps everything. The paper gives neither the base of the layer's number nor what
    becomes of earlier caches: here it counts from 0, and they keep visual tokens unless ``free``.
    Compose it with the first stage: ``compress(model, ToDRE(keep=0.1), ToDREStage2())``.
    """

    tau: float = field(default=0.1, metadata={"help": "share of attention below which visual tokens go"})
    layer: int | None = field(default=None, metadata={"help": "layer that is looked at, from 0; None: 7 / 8"})
    free: bool = field(default=False, metadata={"help": "whether earlier layers' caches drop them, too"})

    def __post_init__(self) -> None:
        ToDRE(tau=self.tau)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for a layer out of range."""
        layer = min(ToDRE.probe_layer(layers), layers - 2) if self.layer is None else self.layer
        decoder.check_layers("ToDREStage2", "layer", (layer,), 0, layers - 2)
        return (layer,)

    def frees(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``."""
        return tuple(range(self.acts_after(layers)[0] + 1)) if self.free else ()

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        gone = ToDRE(tau=self.tau).stage2_prune(*self.masses(view)) & view.text.any(1)
        return DecoderKeep(view.visual & ~gone[:, None])

    @staticmethod
    def masses(view: DecoderView) -> tuple[Tensor, Tensor]:
        """``[B]`` each: the shares of attention that text spends on visual tokens, and these on text."""

        def share(rows: Tensor, columns: Tensor) -> Tensor:
            received = view.own.received(rows)[:, 0]
            return decoder.mean_over(rows, (received * columns).sum(1))

        text_to_visual = share(view.text, view.visual)
        ahead = view.text & (view.visual.flip(1).cumsum(1).flip(1) > 0)  # text that visual tokens can see
        if not bool(ahead.any()):
            return text_to_visual, torch.zeros_like(text_to_visual)
        return text_to_visual, share(view.visual, view.text)
