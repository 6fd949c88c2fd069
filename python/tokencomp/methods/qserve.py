"""QServe's KV4: 4 bits by token, keys smoothed by channel (arXiv 2405.04532)."""

from dataclasses import dataclass, field

from tokencomp.methods import base, quantizing
from tokencomp.methods.kv import ChannelMaps, KVView, PageSpec
from tokencomp.recipes.common import require


@base.register("qserve", paper="2405.04532", stage="kv-quant")
@dataclass(frozen=True)
class QServe(quantizing.Quantizing):
    """One grid a token and head, for keys and values; SmoothAttention makes key channels alike.

    Keys are stored over ``lambda = max(|k|) ** alpha``, the larger of the two channels that rotate together,
    (d, d + D/2). Official: lambda is calibrated and folded into weights, here it is the prompt's, frozen when
    a row first quantizes; zero-points are fractional, here minima are added; every token is quantized at once
    (``sinks=0, recent=0, edges=0``), here whole pages, and protected tokens are not.
    """

    bits: int = field(default=4, metadata={"help": "4 (KV4) or 8 (KV8)"})
    alpha: float = field(default=0.5, metadata={"help": "power of the largest |k|; 0: keys as they are"})

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "QServe", "alpha", "in [0, 1]", self.alpha)
        super().__post_init__()

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """The one."""
        return (quantizing.page_spec(self.bits, k_axis="token"),)

    def maps(self, view: KVView) -> ChannelMaps | None:
        """``1 / lambda`` on keys; 1 where a pair of channels is 0."""
        if self.alpha == 0:
            return None
        largest = quantizing.row_stats(view, view.keys()).absmax
        half = largest.shape[-1] // 2
        pair = largest[..., : 2 * half].unflatten(-1, (2, half)).amax(-2, keepdim=True)
        largest[..., : 2 * half] = pair.expand(*pair.shape[:-2], 2, half).flatten(-2)
        return ChannelMaps(k_scale=largest.where(largest > 0, 1.0) ** -self.alpha)
