"""MustDrop: visual tokens go in the encoder's grid, in the prompt and from the cache (arXiv 2411.10803)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.methods import decoder
from tokencomp.methods.base import register
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning
from tokencomp.methods.encoder import EncoderKeep, EncoderView
from tokencomp.methods.visual import VisualKeep, VisualView, best, of_mask, unit


@register("must_drop", paper="2411.10803", stage="between decoder layers; visual tokens before the first")
@dataclass(frozen=True)
class MustDrop(Pruning):
    """Merges like windows, drops what no word looks at, and frees the caches of earlier layers of it.

    Behind the first layer of the encoder (``inside``) windows of ``window x window`` tokens whose mean cosine
    among each other is at least ``merge`` become the mean of their tokens, at the last one's place; crops
    that run together merge equally many windows, those most alike. Of what is left the ``ceil(key n)`` tokens
    that CLS of the last encoder layer attends to most are key tokens, which always stay (in towers without
    CLS: those that receive most). Behind each of ``layers``, with A the head-mean attention of text behind
    the first image, a visual token j goes if ``sum_i A_ij < share * (the same of all visual tokens)`` and
    ``max_i A_ij < peak``. After the prompt the caches of layers from the first to the last stop drop what did
    not stay. The image decides how many tokens stay: there is no budget.

    Where several patches make a token, tokens merge patch by patch. Without ``inside`` cosines are of keys of
    the encoder's second layer and tokens merge behind the projector, each crop for itself: for tiles, where
    one without like windows keeps all others from merging, and for videos of LLaVA-OneVision.

    Departures: means stay in raster order; the authors put them in front. Their code numbers positions anew
    at every layer and so contradicts itself in decode steps; here positions stay. Their defaults of share
    and peak never drop anything; these are of their script for about 64 of 576.
    """

    layers: tuple[int, ...] = field(default=(2, 6, 10, 14), metadata={"help": "layers of the stops, from 0"})
    share: float = field(default=0.011, metadata={"help": "share of all attention below which a token goes"})
    peak: float = field(default=0.01, metadata={"help": "largest attention below which a token goes"})
    merge: float | None = field(default=0.8, metadata={"help": "cosine of windows that merge; None: none do"})
    window: int = field(default=3, metadata={"help": "tokens along a window's side"})
    key: float = field(default=0.08, metadata={"help": "share of tokens that always stay"})
    inside: bool = field(
        default=True, metadata={"help": "whether windows merge in the encoder, or behind it"}
    )
    free: bool = field(default=True, metadata={"help": "whether caches drop what did not stay to the end"})

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("peak", self.peak), ("key", self.key)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"MustDrop: {name} must be in [0, 1], got {value!r}")
        if self.window < 2:
            raise ValueError(f"MustDrop: window must be >= 2, got {self.window!r}")

    # --- in the encoder

    def cuts_after(self, last: int) -> tuple[int, ...]:
        """See ``EncoderMethod``: the first layer, if windows merge there and it is not the last."""
        return (0,) if self.inside and self.merge is not None and last > 0 else ()

    def cut(self, view: EncoderView) -> EncoderKeep | None:
        """See ``EncoderMethod``. Raises ValueError for windows without a grid."""
        patch = view.patches()
        row = patch.flatten(1)[..., None].expand(-1, -1, view.x.shape[2])
        x = view.x[:, view.prefix :].gather(1, row).view(*patch.shape[:2], -1)
        group = even_windows(x, self._grid(view.grid), self.window, self._least)
        index = of_mask(group == torch.arange(group.shape[1], device=group.device))
        if index.shape[1] == view.left:
            return None
        token_map = ragged.position_map(index, view.left).gather(1, group)
        merged, _ = ops.merge_tokens(x, token_map, index.shape[1])
        order = patch.gather(1, index.long()[..., None].expand(-1, -1, patch.shape[2])).flatten(1).argsort(1)
        merged = merged.view(len(order), order.shape[1], -1)
        return EncoderKeep(index, merged.gather(1, order[..., None].expand_as(merged)))

    # --- before the first layer

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: the last layer for key tokens, without ``inside`` the second for windows."""
        behind = self.merge is not None and not self.cuts_after(layers - 1)
        return (min(1, layers - 1), layers - 1) if behind else (layers - 1,)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError for windows without a grid."""
        layers, x = view.encoder.layers, None
        score = view.encoder.cls(layers - 1)
        if self.cuts_after(layers - 1):
            index = view.encoder.survivors()
            score = ragged.gather_rows(score[..., None], index)[..., 0]
        elif self.merge is None:
            index = of_mask(torch.ones(view.x.shape[:2], dtype=torch.bool, device=view.x.device))
        else:
            keys = view.encoder.keys(min(1, layers - 1)).transpose(1, 2).flatten(2)
            group = merged_windows(keys, self._grid(view.grid), self.window, self._least)
            index = of_mask(group == torch.arange(group.shape[1], device=group.device))
            token_map = ragged.position_map(index, group.shape[1]).gather(1, group)
            x, _ = ops.merge_tokens(view.x, token_map, index.shape[1])
            score = ops.merge_tokens(score[..., None], token_map, index.shape[1])[0][..., 0]
        there = index >= 0
        counts = [math.ceil(self.key * n) for n in there.sum(1).tolist()]
        first = best(score.masked_fill(~there, -torch.inf), counts)
        return VisualKeep(index, x, ragged.kept_mask(first, index.shape[1]) & there)

    @property
    def _least(self) -> float:
        return math.inf if self.merge is None else self.merge

    def _grid(self, grid: tuple[int, int] | None) -> tuple[int, int]:
        if grid is None:
            raise ValueError("MustDrop: windows need tokens on a grid, got none; merge=None leaves them")
        return grid

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
    place, member = windows_of(grid, window, metric.device)
    return _merging(place, member, window_similarity(metric, member) >= least)


def even_windows(metric: Tensor, grid: tuple[int, int], window: int, least: float) -> Tensor:
    """The same with as many windows in each of the M crops: the fewest of any, those of largest mean cosine.
    Ties: the first window.
    """
    place, member = windows_of(grid, window, metric.device)
    like = window_similarity(metric, member)
    if not len(member):
        return _merging(place, member, like >= least)
    fewest = int((like >= least).sum(1).min())  # waits for a GPU
    chosen = best(like, fewest) if fewest else like.new_full((len(like), 1), -1, dtype=torch.int32)
    return _merging(place, member, ragged.kept_mask(chosen, len(member)))


def windows_of(grid: tuple[int, int], window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[N]`` and ``[windows, window * window]`` int64: all tokens, and those of whole windows."""
    rows, columns = grid[0] // window, grid[1] // window
    place = torch.arange(grid[0] * grid[1], device=device)
    whole = place.view(grid)[: rows * window, : columns * window]
    inside = whole.reshape(rows, window, columns, window).transpose(1, 2)
    return place, inside.reshape(rows * columns, window * window)


def _merging(place: Tensor, member: Tensor, merges: Tensor) -> Tensor:
    """``[M, N]`` int64: where tokens go if the windows ``merges`` ``[M, windows]`` bool merge."""
    target = torch.where(merges[..., None], member[:, -1:], member).flatten(1)
    group = place.expand(len(merges), -1)
    return group.scatter(1, member.flatten().expand_as(target), target)


def window_similarity(metric: Tensor, member: Tensor) -> Tensor:
    """``[M, windows]`` float32: the mean cosine of all pairs of the tokens ``member`` ``[windows, m]``."""
    m = member.shape[1]
    total = unit(metric)[:, member].sum(2).square().sum(2)
    return (total - m) / (m * (m - 1))
