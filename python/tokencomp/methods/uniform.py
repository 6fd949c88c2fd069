"""One format for all tokens but the protected ones: the plainest quantized KV cache."""

from dataclasses import dataclass, field
from typing import Literal

from tokencomp import recipes
from tokencomp.methods import base, quantizing
from tokencomp.methods.kv import ChannelMaps, KVView, PageSpec
from tokencomp.ops.kvquant import Axis
from tokencomp.recipes.common import require


@base.register("uniform", paper="", stage="kv-quant")
@dataclass(frozen=True)
class Uniform(quantizing.Quantizing):
    """Every token in the same number of bits once it leaves the recent window; the oldest page first.

    Keys share a grid among the tokens of a page in each channel, values among the channels of each token:
    what keys with large channel means need (Qwen2.5). Where keys are quantized by token, one of ``rotate``
    (Hadamard, arXiv 2404.00456), ``center`` (a frozen mean off every channel, which attention does not see)
    and ``balance`` (arXiv 2402.18096) spares them such channels; maps are frozen when a row first quantizes.
    """

    bits: int = field(default=4, metadata={"help": "of keys: 2, 3, 4 or 8"})
    v_bits: int | None = field(default=None, metadata={"help": "of values; None: as keys"})
    k_axis: Axis = field(default="channel", metadata={"help": "what a key's grid spans: token or channel"})
    k_group: int = field(default=-1, metadata={"help": "elements of a key's grid; -1: the page, or the head"})
    v_group: int = field(default=-1, metadata={"help": "channels of a value's grid; -1: the head"})
    rotate: Literal["none", "keys", "both"] = field(
        default="none", metadata={"help": "store keys, or keys and values, times a Hadamard matrix"}
    )
    center: bool = field(default=False, metadata={"help": "take the mean of the prompt off key channels"})
    balance: bool = field(default=False, metadata={"help": "key channels in the size queries weigh them"})

    def __post_init__(self) -> None:
        choices = ("none", "keys", "both")
        require(self.rotate in choices, "Uniform", "rotate", "'none', 'keys' or 'both'", repr(self.rotate))
        axes = ("token", "channel")
        require(self.k_axis in axes, "Uniform", "k_axis", "'token' or 'channel'", repr(self.k_axis))
        fits = self.rotate == "none" or self.k_axis == "token"
        require(fits, "Uniform", "k_axis", f"'token' with rotate={self.rotate!r}", repr(self.k_axis))
        super().__post_init__()

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """The one."""
        return (
            quantizing.page_spec(
                self.bits, self.v_bits, k_axis=self.k_axis, k_group=self.k_group, v_group=self.v_group
            ),
        )

    @property
    def rotation(self) -> Literal["none", "keys", "both"]:
        """As asked for."""
        return self.rotate

    @property
    def queries(self) -> int:
        """All, for the balancer."""
        return -1 if self.balance else 0

    def record_prompt(self, view: KVView) -> None:
        """The range of the queries, for the balancer."""
        if self.balance:
            quantizing.remember_query_range(view)

    def record_step(self, view: KVView) -> None:
        """The same."""
        self.record_prompt(view)

    def maps(self, view: KVView) -> ChannelMaps | None:
        """Mean and balancer of keys."""
        if not (self.center or self.balance):
            return None
        stats = quantizing.row_stats(view, view.keys())
        mean = recipes.mean_bias(stats) if self.center else None
        return ChannelMaps(quantizing.key_balancer(view, stats, mean) if self.balance else None, mean)
