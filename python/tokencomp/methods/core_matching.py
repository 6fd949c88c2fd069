"""CoreMatching, token part: tokens that excite the neurons that words do (arXiv 2505.19235)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp.methods import decoder
from tokencomp.methods.base import register
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning


@register("core_matching", paper="2505.19235", stage="between decoder layers")
@dataclass(frozen=True)
class CoreMatching(Pruning):
    """Keeps visual tokens that share many active neurons of the MLP with the text, down to the elbow.

    A neuron is active where what the MLP projects down is positive. A visual token counts its active neurons
    among those of a reference: the ``reference``-th token from the end (``"token"``, the authors' code), or
    the core neurons of the text behind the first image (``"core"``, the paper): each of its tokens names the
    ``rho`` largest share of its positive neurons, and the ``beta`` share of neurons that most name are core.
    Tokens at or above the elbow go on: the count farthest from the line between the largest and the smallest
    in descending order, ``elbow``. So the image decides how many tokens stay.

    Departures: the authors' code overwrites keys and values with zeros, layer by layer from 5 to 18, which
    dilutes attention and saves nothing; here tokens are removed behind each of ``layers``. Its counts are
    strictly above the elbow (``strict``). Decode steps with core neurons alone are left out, and what rho and
    beta were is not published.
    """

    layers: tuple[int, ...] = field(default=(5,), metadata={"help": "layers that are looked at, from 0"})
    mode: Literal["token", "core"] = field(default="token", metadata={"help": "what is the reference"})
    reference: int = field(default=5, metadata={"help": "which token from the end, 1 is the last"})
    rho: float = field(default=0.4, metadata={"help": "core: share of its positive neurons a word names"})
    beta: float = field(default=0.4, metadata={"help": "core: share of all neurons that are core"})
    strict: bool = field(default=False, metadata={"help": "whether tokens at the elbow go"})

    def __post_init__(self) -> None:
        if self.mode not in ("token", "core"):
            raise ValueError(f"CoreMatching: mode must be token or core, got {self.mode!r}")
        if self.reference < 1:
            raise ValueError(f"CoreMatching: reference must be >= 1, got {self.reference!r}")
        for name, share in (("rho", self.rho), ("beta", self.beta)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"CoreMatching: {name} must be in (0, 1], got {share!r}")

    @property
    def watches(self) -> tuple[str, ...]:
        """See ``DecoderMethod``."""
        return ("activation",)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for layers out of range."""
        decoder.check_layers("CoreMatching", "layers", self.layers, 0, layers - 2)
        return self.layers

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        if view.activation is None:
            raise ValueError("CoreMatching: the view must have activations, got none")
        keep = view.visual.clone()
        for row, activation in enumerate(view.activation):
            visual, real = view.visual[row], view.real[row]
            if not bool(visual.any()):
                continue
            if self.mode == "core":
                text = view.text[row] if bool(view.text[row].any()) else view.last[row]
                neurons = core_neurons(activation[text], self.rho, self.beta)
            else:
                place = real.nonzero()[:, 0]
                neurons = activation[place[-min(self.reference, len(place))]] > 0
            count = ((activation[visual] > 0) & neurons).sum(1)
            limit = elbow(count)[1]
            # where all counts are alike, nothing is above the elbow
            above = count > limit if self.strict and bool((count > limit).any()) else count >= limit
            keep[row] = keep[row].masked_scatter(visual, above)
        return DecoderKeep(keep)


def elbow(values: Tensor) -> tuple[int, float]:
    """Of ``values`` ``[n]`` in descending order, the place farthest from the line between the first and the
    last, the first of several, and the value there. Axes are not scaled, so it depends on n.
    """
    ordered = values.double().sort(descending=True, stable=True).values
    place = torch.arange(len(ordered), dtype=torch.float64, device=values.device)
    run, rise = place[-1], ordered[-1] - ordered[0]
    away = (run * (ordered - ordered[0]) - rise * place).abs()  # times the length of the line
    best = int((away == away.max()).nonzero()[0])
    return best, float(ordered[best])


def core_neurons(activation: Tensor, rho: float, beta: float) -> Tensor:
    """``[F]`` bool: the ``ceil(beta F)`` neurons that are most often among the ``ceil(rho p)`` largest of the
    p positive ones of a token of ``activation`` ``[n, F]``. Ties: the lower neuron.
    """
    positive = activation > 0
    most = (rho * positive.sum(1).double()).ceil().long()
    order = activation.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    named = (positive & (order < most[:, None])).sum(0)
    first = named.argsort(descending=True, stable=True)[: int(-(-beta * activation.shape[1] // 1))]
    return torch.zeros_like(positive[0]).index_fill(0, first, True)
