"""AIM, second part: visual tokens go layer by layer, by power iteration on attention (arXiv 2412.03248)."""

from dataclasses import dataclass, field

from tokencomp.methods import decoder
from tokencomp.methods.base import register
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning


@register("aim", paper="2412.03248", stage="between decoder layers")
@dataclass(frozen=True)
class AIM(Pruning):
    """Keeps fewer visual tokens behind every layer from the middle on, by their stationary importance.

    Behind layer l the share ``1 - (l - start + 1) / span`` of the visual tokens of the first layer goes on,
    rounded down, none from ``l = start + span - 1``: published are 14 and 8 for 28 layers, 13 and 8 for 32.
    Importance comes of ``iterations`` steps of power iteration on ``softmax(z / temperature)`` of all tokens
    of the layer, per head, then the root of the mean square over heads. Removal equals the authors' masks;
    departure: masked tokens still vote in their first step, removed ones do not.
    The first part is ``AIMMerge``: ``compress(model, AIMMerge(keep=0.25), AIM())``.
    """

    start: int = field(default=14, metadata={"help": "first layer that tokens go behind, from 0"})
    span: int = field(default=8, metadata={"help": "layers over which all of them go"})
    temperature: float = field(default=0.1, metadata={"help": "of the attention that is iterated"})
    iterations: int = field(default=5, metadata={"help": "steps"})
    damping: float = field(default=0.0, metadata={"help": "share of each step that is spread evenly"})

    def __post_init__(self) -> None:
        for name, value in (("span", self.span), ("iterations", self.iterations)):
            if value < 1:
                raise ValueError(f"AIM: {name} must be >= 1, got {value!r}")
        if self.temperature <= 0:
            raise ValueError(f"AIM: temperature must be > 0, got {self.temperature!r}")
        if not 0.0 <= self.damping <= 1.0:
            raise ValueError(f"AIM: damping must be in [0, 1], got {self.damping!r}")

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for a start out of range."""
        decoder.check_layers("AIM", "start", (self.start,), 0, layers - 2)
        return tuple(range(self.start, min(self.start + self.span, layers - 1)))

    def share(self, layer: int) -> float:
        """Of the visual tokens that go on behind ``layer``."""
        return max(0.0, 1 - (layer - self.start + 1) / self.span)

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        importance = view.own.stationary(
            view.real, temperature=self.temperature, iterations=self.iterations, damping=self.damping
        )
        left, share = view.visual.sum(1).tolist(), self.share(view.layer)
        counts = [min(int(n * share + 1e-9), now) for n, now in zip(view.tokens, left, strict=True)]
        return DecoderKeep(decoder.best(view, importance, counts))
