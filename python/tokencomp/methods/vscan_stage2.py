"""VScan, second stage: fewer visual tokens in the middle of the language model (arXiv 2505.22654)."""

from dataclasses import dataclass, field

from tokencomp.methods import base, decoder
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning


@base.register("vscan_stage2", paper="2505.22654", stage="between decoder layers")
@dataclass(frozen=True)
class VScanStage2(Pruning):
    """Keeps the visual tokens that the prompt's last token attends to most in the middle layer.

    Behind layer ``L // 2`` (16 of 32, 14 of 28 as published) ``round(keep n)`` of the n visual tokens of the
    first layer go on, by that layer's attention, a mean over heads. Departures: kept tokens keep their
    positions also on LLaVA, and on Qwen rotated queries and keys are compared, as the layer attends with.
    Compose it with the first stage: ``compress(model, VScan(keep=1 / 6), VScanStage2())``.
    """

    keep: float = field(default=1 / 3, metadata={"help": "ratio of visual tokens kept, or their count"})
    layer: int | None = field(default=None, metadata={"help": "layer that is looked at, from 0; None: half"})

    def __post_init__(self) -> None:
        base.check_keep("VScanStage2", self.keep)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for a layer out of range."""
        layer = min(layers // 2, layers - 2) if self.layer is None else self.layer
        decoder.check_layers("VScanStage2", "layer", (layer,), 0, layers - 2)
        return (layer,)

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        score = view.own.received(view.last)[:, 0]
        return DecoderKeep(decoder.best(view, score, decoder.budgets(view, self.keep)))
