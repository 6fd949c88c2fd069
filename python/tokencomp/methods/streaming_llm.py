"""StreamingLLM: the first tokens and the last ones (arXiv 2309.17453)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.kv import KVView


@base.register("streaming_llm", paper="2309.17453", stage="kv")
@dataclass(frozen=True)
class StreamingLLM(eviction.Eviction):
    """Attention sinks and a recent window, whatever they hold.

    ``sinks`` first tokens and the ``budget - sinks`` last ones stay. With ``rerotate`` kept keys are rotated
    to the positions 0, 1, ... of their slots after each eviction and later queries count on from there, as
    the paper does; without, all keep their own positions, as most presses do. The paper evicts in every step
    (``every=1``); between two evictions a row holds up to ``every - 1`` more.
    """

    every: int = field(default=16, metadata={"help": eviction.EVERY_HELP})
    sinks: int = field(default=4, metadata={"help": eviction.SINKS_HELP})
    rerotate: bool = field(default=False, metadata={"help": "rotate kept keys to their slots' positions"})

    @property
    def rerotates(self) -> bool:
        """As asked for."""
        return self.rerotate

    def score(self, view: KVView) -> Tensor:
        """The slot number: newer is better."""
        slot = torch.arange(view.size, dtype=torch.float32, device=view.lengths.device)
        return slot.expand(*view.lengths.shape, -1)
