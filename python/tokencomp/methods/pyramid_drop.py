"""PyramidDrop: fewer visual tokens stage by stage (arXiv 2410.17247)."""

from dataclasses import dataclass, field

from tokencomp.methods import base, decoder
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning


@base.register("pyramid_drop", paper="2410.17247", stage="between decoder layers")
@dataclass(frozen=True)
class PyramidDrop(Pruning):
    """Keeps, before some layers, what the prompt's last token would attend to in that layer.

    In front of each of ``layers`` the last token's query and all keys of that layer are made of the hidden
    states as they are (its norm, projections and rotary embedding), and the visual tokens of largest
    attention, a mean over heads, go on: ``round(keep[s] n)`` of the n that the first layer had. Departure:
    the authors' code numbers kept tokens anew in later layers; here they keep their positions.
    """

    keep: tuple[float, ...] = field(
        default=(0.5, 0.25, 0.125), metadata={"help": "ratios or counts of visual tokens, stage by stage"}
    )
    layers: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "first layers that get fewer, from 0; default: equal stages (8, 16, 24 of 32)"},
    )

    def __post_init__(self) -> None:
        decoder.check_stages("PyramidDrop", self.keep, self.layers)

    def firsts(self, layers: int) -> tuple[int, ...]:
        """The first layers of a model of so many that get fewer tokens."""
        stages = len(self.keep) + 1
        return self.layers or tuple(stage * layers // stages for stage in range(1, stages))

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for layers out of range."""
        firsts = self.firsts(layers)
        decoder.check_layers("PyramidDrop", "layers", firsts, 1, layers - 1)
        return tuple(first - 1 for first in firsts)

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        keep = self.keep[self.firsts(view.layers).index(view.layer + 1)]
        score = view.next().received(view.last)[:, 0]
        return DecoderKeep(decoder.best(view, score, decoder.budgets(view, keep)))
