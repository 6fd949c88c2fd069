"""Zero-TPrune: drop tokens by PageRank on the attention graph, and similar ones first (arXiv 2305.17328)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.methods import attention, base, pruning
from tokencomp.methods.layers import LayerView, Reduced

Init = Literal["cls", "uniform"]


@base.register("zerotprune", paper="2305.17328", stage="chosen encoder layers, between attention and MLP")
@dataclass(frozen=True)
class ZeroTPrune(pruning.Dropping):
    """Two stages a layer: similar tokens lose their less important partner, then the least important go.

    I' stage: one vote of the weighted PageRank ``s <- A^T s`` ranks the image tokens. S stage: every token of
    the less important half finds the most similar key (cosine of the head mean) in the other half; of the
    most similar pairs the former is dropped, not merged. I stage: PageRank with ``iterations`` votes on the
    attention among the survivors; the least important are dropped.

    The authors' code and their layers, shares and iterations were never published; our choices: the defaults
    of ``keep``, ``layers`` and ``similar``, the head mean of keys, and that the attention of the survivors is
    normalised again for the I stage (then the sum of s is kept).
    """

    keep: float | Sequence[float] = field(default=0.8, metadata={"help": pruning.KEEP_HELP})
    layers: Sequence[int] | None = field(default=(1, 3, 6, 9), metadata={"help": pruning.LAYERS_HELP})
    similar: float = field(
        default=0.25, metadata={"help": "share of the dropped tokens that the similarity stage drops"}
    )
    iterations: int | Sequence[int] | None = field(
        default=None,
        metadata={"help": "votes, a list is indexed by layer; None: 40, 8, 1 (first 3, last 3)"},
    )
    init: Init = field(
        default="cls", metadata={"help": "start: cls (sqrt(N) times the others' weight) or uniform"}
    )
    v_min: float = field(default=0.01, metadata={"help": "smallest variance of N s of a head that is heard"})
    v_max: float = field(default=0.7, metadata={"help": "largest variance of N s of a head that is heard"})
    damping: float = field(default=0.0, metadata={"help": "share of every vote spread evenly; paper: none"})

    def __post_init__(self) -> None:
        pruning.check_keep("ZeroTPrune", self.keep)
        if not 0.0 <= self.similar <= 1.0:
            raise ValueError(f"ZeroTPrune: similar must be in [0, 1], got {self.similar!r}")
        if self.init not in ("cls", "uniform"):
            raise ValueError(f"ZeroTPrune: init must be cls or uniform, got {self.init!r}")
        if not 0.0 <= self.damping <= 1.0:
            raise ValueError(f"ZeroTPrune: damping must be in [0, 1], got {self.damping!r}")
        listed = self.iterations if isinstance(self.iterations, Sequence) else (self.iterations or 0,)
        for iterations in listed:
            base.check_iterations("ZeroTPrune", iterations)

    def reduce(self, view: LayerView) -> Reduced | None:
        """Drops the layer's share of image tokens; see ``LayerMethod``."""
        image = view.tokens - view.prefix
        kept = pruning.budget(self.keep, self.layers, view)
        if kept == image:
            return None
        graph = attention.of(view)
        survivors = None
        alike = min(round(self.similar * (image - kept)), image // 2)
        if alike:
            votes = self.importance(graph, 1, view.prefix)
            survivors = different(view.metric(), votes, alike, view.prefix, view.mask)
            graph = graph.subset(survivors)
        score = self.importance(graph, self.votes(view.layer, view.layers), view.prefix)
        rows = pruning.top(score, kept, prefix=view.prefix, mask=graph.mask)
        return pruning.drop(view, rows if survivors is None else ragged.gather_rows(survivors, rows))

    def votes(self, layer: int, layers: int) -> int:
        """PageRank iterations of a layer. The paper gives 30-50 in the first three layers, 5-10 in the middle
        and 1 in the last three.
        """
        if self.iterations is not None:
            return pruning.at(self.iterations, layer, 1)
        if layer >= layers - 3:
            return 1
        return 40 if layer < 3 else 8

    def importance(self, graph: attention.Attention, iterations: int, prefix: int) -> Tensor:
        """``[B, N]`` float32: PageRank of every head, heads filtered by variance, root mean square of the
        rest.
        """
        s = graph.pagerank(start(graph, self.init if prefix else "uniform"), iterations, self.damping)
        return rms_over_heads(s, heard_heads(s, self.v_min, self.v_max, graph.mask))


def start(graph: attention.Attention, init: Init) -> Tensor:
    """``[B, 1, N]`` float32 that sums to 1: even, or the first token ``sqrt(N)`` times the others; 0 at
    padding.
    """
    batch, _, tokens = graph.lse.shape
    s = torch.ones(batch, 1, tokens, device=graph.lse.device)
    if graph.mask is not None:
        s = s * graph.mask[:, None]
    if init == "cls":
        count = s.sum(-1)
        s[..., 0] = s[..., 0] * count.sqrt()
    return s / s.sum(-1, keepdim=True).clamp(min=1e-30)


def heard_heads(s: Tensor, v_min: float, v_max: float, mask: Tensor | None = None) -> Tensor:
    """``[B, H]`` bool: heads whose importance varies over tokens neither too little nor too much.

    The (biased) variance is that of ``n s``, whose mean is 1: that of s itself, which sums to 1, is at most
    ``1 / n``, below the paper's bounds. Where no head of an item passes, all are heard.

    Args:
        s: ``[B, H, N]``, sums to 1 over the tokens of each head.
        v_min: smallest variance.
        v_max: largest variance.
        mask: ``[B, N]`` bool, False at padding.
    """
    valid = torch.ones_like(s[:, :1]) if mask is None else mask[:, None].to(s.dtype)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    scaled = s * count
    mean = (scaled * valid).sum(-1, keepdim=True) / count
    variance = ((scaled - mean).square() * valid).sum(-1) / count[..., 0]
    heard = (variance >= v_min) & (variance <= v_max)
    return heard | ~heard.any(1, keepdim=True)


def rms_over_heads(s: Tensor, heard: Tensor) -> Tensor:
    """``[B, N]``: ``sqrt(sum_h f_h s_h^2 / sum_h f_h)`` of ``s`` ``[B, H, N]`` and ``heard`` ``[B, H]``."""
    f = heard.to(s.dtype)
    return ((s.square() * f[..., None]).sum(1) / f.sum(1, keepdim=True)).sqrt()


def different(metric: Tensor, score: Tensor, r: int, prefix: int, mask: Tensor | None = None) -> Tensor:
    """The S stage, Sequential-U: all tokens but the ``r`` less important ones that are the most similar to
    a more important one.

    Args:
        metric: ``[B, N, D]``, norms do not matter.
        score: ``[B, N]`` importance; the lower half (rounded down) of the image tokens may be dropped.
        r: tokens dropped, at most that half.
        prefix: leading tokens that take no part.
        mask: ``[B, N]`` bool, False at padding, which goes first.

    Returns:
        ``[B, N - r]`` int32, ascending.

    Raises:
        ValueError: ``r`` is not in [0, half].
    """
    image = score.shape[1] - prefix
    if not 0 <= r <= image // 2:
        raise ValueError(f"different: r must be in [0, {image // 2}], half of the image tokens, got {r}")
    ranked = pruning.order(score, prefix=prefix, mask=mask)[:, prefix:].to(torch.int32)
    half = image - image // 2
    high, low = ranked[:, :half].sort(dim=1).values, ranked[:, half:].sort(dim=1).values
    value, _ = ops.cosine_match(metric, metric, a_index=low, b_index=high, mask_b=_of(mask, high))
    if mask is not None:
        value = value.masked_fill(~ragged.gather_rows(mask, low), math.inf)
    lost = ragged.gather_rows(low, pruning.order(value)[:, :r].to(torch.int32))
    keep = ~ragged.kept_mask(lost, score.shape[1])
    return ragged.compact_rows(keep, score.shape[1] - r)[0]


def _of(mask: Tensor | None, index: Tensor) -> Tensor | None:
    return None if mask is None else ragged.gather_rows(mask, index)
