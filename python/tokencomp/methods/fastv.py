"""FastV: after the second layer, half of the visual tokens are enough (arXiv 2403.06764)."""

from dataclasses import dataclass, field

from tokencomp.methods import base, decoder
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning


@base.register("fastv", paper="2403.06764", stage="between decoder layers")
@dataclass(frozen=True)
class FastV(Pruning):
    """Keeps the visual tokens that the prompt's last token attends to most in an early layer.

    Layer ``layer`` and later ones get ``round(keep * n)`` of the n visual tokens, those of largest attention
    in the layer before it, a mean over heads. Kept tokens keep their positions, as in the authors' code.
    Departures: that code either masks tokens or, where it removes them, has no KV cache; here they are
    removed and the cache of later layers is shorter. Ties go to the first token.
    """

    keep: float = field(default=0.5, metadata={"help": "ratio of visual tokens kept, or their count"})
    layer: int = field(default=2, metadata={"help": "first layer that gets fewer, from 0 (K in the paper)"})

    def __post_init__(self) -> None:
        base.check_keep("FastV", self.keep)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for a layer out of range."""
        if not 1 <= self.layer < layers:
            raise ValueError(f"FastV: layer must be in [1, {layers}), got {self.layer}")
        return (self.layer - 1,)

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        score = view.own.received(view.last)[:, 0]
        return DecoderKeep(decoder.best(view, score, decoder.budgets(view, self.keep)))
