"""FlowCut, second stage: visual tokens that information still flows to in the decoder (arXiv 2505.19536)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base, decoder, flowcut
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning


@base.register("flowcut_stage2", paper="2505.19536", stage="between decoder layers")
@dataclass(frozen=True)
class FlowCutStage2(Pruning):
    """Keeps visual tokens that the last token attends to and is like in value, and whose values are large.

    Behind layer ``layer`` (1, the second, as published) ``round(keep n)`` of the n visual tokens of the first
    layer go on, of largest ``(r + w) |mean_h v|_1``: r the softmax over visual tokens alone of the last
    token's logits, w that of ``v_last . v / sqrt D``, means over heads. The encoder leaves twice as many
    tokens then (LLaVA-NeXT, Qwen2-VL; for LLaVA-1.5 the authors use the first stage alone). Compose it with
    that: ``compress(model, FlowCut(keep=2 / 9), FlowCutStage2())``.

    Departures: the last token is that of the prompt, as in the authors' code for Qwen2-VL; the one for
    LLaVA-NeXT takes the last of the instruction, before the template's end. Kept tokens keep their positions
    also on LLaVA, where that code numbers anew.
    """

    keep: float = field(default=0.5, metadata={"help": "ratio of visual tokens kept, or their count"})
    layer: int = field(default=1, metadata={"help": "layer that is looked at, from 0"})

    def __post_init__(self) -> None:
        base.check_keep("FlowCutStage2", self.keep)

    @property
    def watches(self) -> tuple[str, ...]:
        """See ``DecoderMethod``."""
        return ("value",)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for a layer out of range."""
        decoder.check_layers("FlowCutStage2", "layer", (self.layer,), 0, layers - 2)
        return (self.layer,)

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``. Raises ValueError for a view without values."""
        if view.value is None:
            raise ValueError("FlowCutStage2: the view must have values, got none")
        score = flow(view.own.products(view.last)[:, :, 0], view.value.float(), view.last, view.visual)
        return DecoderKeep(decoder.best(view, score, decoder.budgets(view, self.keep)))


def flow(logits: Tensor, v: Tensor, last: Tensor, visual: Tensor) -> Tensor:
    """``[B, W]`` float32: ``(r + w) |mean_h v|_1`` of visual tokens, NaN in sequences without any.

    Args:
        logits: ``[B, Hq, W]`` of the last token and all rows.
        v: ``[B, Hkv, W, D]`` values of all rows.
        last, visual: ``[B, W]`` bool, the last token and the visual ones.
    """
    index, _, _ = ragged.compact_rows(last, 1)
    at = index.long()[:, None, :, None].expand(-1, v.shape[1], -1, v.shape[3])
    like = (v.gather(2, at) @ v.mT)[:, :, 0] * v.shape[3] ** -0.5

    def among_visual(x: Tensor) -> Tensor:
        return x.masked_fill(~visual[:, None], -torch.inf).softmax(-1).mean(1)

    return flowcut.score(among_visual(logits), among_visual(like), v)
