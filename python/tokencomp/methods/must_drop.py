"""MustDrop: visual tokens go in the encoder's grid, in the prompt and from the cache (arXiv 2411.10803)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.methods import decoder
from tokencomp.methods.base import register
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning
from tokencomp.methods.visual import VisualKeep, VisualView, best, of_mask, unit


@register("must_drop", paper="2411.10803", stage="between decoder layers; visual tokens before the first")
@dataclass(frozen=True)
class MustDrop(Pruning):
    """Merges like windows, drops what no word looks at, and frees the caches of earlier layers of it.

    Before the first layer: windows of ``window x window`` tokens whose mean cosine among each other is at
    least ``merge`` become the mean of their tokens, at the last one's place; and of all tokens the
    ``ceil(key n)`` that CLS of the last encoder layer attends to most are key tokens, which always stay (in
    towers without CLS: those that receive most). Behind each of ``layers``, with A the head-mean attention of
    text behind the first image, a visual token j goes if ``sum_i A_ij < share * (the same of all visual
    tokens)`` and ``max_i A_ij < peak``. After the prompt the caches of layers from the first to the last stop
    drop what did not stay. The image decides how many tokens stay: there is no budget.

    Departures: the authors merge inside the encoder, behind its first block, which shortens the encoder too;
    here cosines are of keys of the encoder's second layer, and tokens merge behind the projector, each crop
    for itself, in raster order. Their code numbers positions anew at every layer and so contradicts itself in
    decode steps; here positions stay. Their defaults of share and peak never drop anything; these are of
    their script for about 64 of 576.
    """

    layers: tuple[int, ...] = field(default=(2, 6, 10, 14), metadata={"help": "layers of the stops, from 0"})
    share: float = field(default=0.011, metadata={"help": "share of all attention below which a token goes"})
    peak: float = field(default=0.01, metadata={"help": "largest attention below which a token goes"})
    merge: float | None = field(default=0.8, metadata={"help": "cosine of windows that merge; None: none do"})
    window: int = field(default=3, metadata={"help": "tokens along a window's side"})
    key: float = field(default=0.08, metadata={"help": "share of tokens that always stay"})
    free: bool = field(default=True, metadata={"help": "whether caches drop what did not stay to the end"})

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("peak", self.peak), ("key", self.key)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"MustDrop: {name} must be in [0, 1], got {value!r}")
        if self.window < 2:
            raise ValueError(f"MustDrop: window must be >= 2, got {self.window!r}")

    # --- before the first layer

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: the second layer for windows, the last for key tokens."""
        return (layers - 1,) if self.merge is None else (min(1, layers - 1), layers - 1)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError for windows without a grid."""
        index, x = of_mask(torch.ones(view.x.shape[:2], dtype=torch.bool, device=view.x.device)), view.x
        score = view.encoder.cls(view.encoder.layers - 1)
        if self.merge is not None:
            if view.grid is None:
                raise ValueError("MustDrop: windows need tokens on a grid, got none; merge=None leaves them")
            keys = view.encoder.keys(min(1, view.encoder.layers - 1)).transpose(1, 2).flatten(2)
            group = merged_windows(keys, view.grid, self.window, self.merge)
            index = of_mask(group == torch.arange(group.shape[1], device=group.device))
            token_map = ragged.position_map(index, group.shape[1]).gather(1, group)
            x, _ = ops.merge_tokens(view.x, token_map, index.shape[1])
            score = ops.merge_tokens(score[..., None], token_map, index.shape[1])[0][..., 0]
        there = index >= 0
        counts = [math.ceil(self.key * n) for n in there.sum(1).tolist()]
        first = best(score.masked_fill(~there, -torch.inf), counts)
        key = ragged.kept_mask(first, index.shape[1]) & there
        return VisualKeep(index, None if self.merge is None else x, key)

    # --- between layers

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for layers out of range."""
        decoder.check_layers("MustDrop", "layers", self.layers, 0, layers - 2)
        return self.layers

    def frees(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``."""
        return tuple(range(self.layers[0], self.layers[-1] + 1)) if self.free else ()

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        attention, there = view.own.rows(view.text)
        drop = self.unseen(attention * there[..., None], view.visual) & view.text.any(1, keepdim=True)
        keep = view.visual & ~drop
        return DecoderKeep(keep if view.key is None else keep | (view.visual & view.key))

    def unseen(self, attention: Tensor, visual: Tensor) -> Tensor:
        """``[B, W]`` bool: visual tokens that ``attention`` ``[B, R, W]`` of R words passes over."""
        total, most = attention.sum(1) * visual, attention.amax(1)
        limit = self.share * total.sum(1, keepdim=True)
        return visual & (total < limit) & (most < self.peak)


def merged_windows(metric: Tensor, grid: tuple[int, int], window: int, least: float) -> Tensor:
    """``[M, N]`` int64: the last token of the window that each token of ``metric`` ``[M, N, D]`` merges
    into, itself where it does not merge. Tokens beyond whole windows stay.
    """
    rows, columns = grid[0] // window, grid[1] // window
    place = torch.arange(grid[0] * grid[1], device=metric.device).view(grid)
    if rows == 0 or columns == 0:
        return place.flatten().expand(metric.shape[0], -1)
    whole = place[: rows * window, : columns * window]
    inside = whole.unflatten(0, (rows, window)).unflatten(2, (columns, window))
    member = inside.transpose(1, 2).reshape(rows * columns, window * window)
    like = window_similarity(metric, member) >= least
    target = torch.where(like[..., None], member[:, -1:], member)
    return place.flatten().expand(metric.shape[0], -1).scatter(
        1, member.flatten().expand(metric.shape[0], -1), target.flatten(1)
    )  # fmt: skip


def window_similarity(metric: Tensor, member: Tensor) -> Tensor:
    """``[M, windows]`` float32: the mean cosine of all pairs of the tokens ``member`` ``[windows, m]``."""
    m = member.shape[1]
    total = unit(metric)[:, member].sum(2).square().sum(2)
    return (total - m) / (m * (m - 1))
