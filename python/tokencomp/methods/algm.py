"""ALGM: merge uniform 2 x 2 windows early, then as many similar pairs as there are (arXiv 2406.09936)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base, matching, schedule
from tokencomp.methods.layers import LayerView, Reduced, Stateless
from tokencomp.methods.matching import Match, Plan


@base.register("algm", paper="2406.09936", stage="two encoder layers, between attention and MLP")
@dataclass(frozen=True)
class ALGM(Stateless):
    """Merges by how alike tokens are: windows of the image in one layer, pairs from everywhere in another.

    Layer ``local_layer``: the mean cosine of the six pairs in each complete 2 x 2 window of the grid; windows
    of at least ``threshold`` become one token each, in place of their last. Layer ``global_layer``: even and
    odd tokens matched as in ToMe; with v the similarities of an item's even tokens, the pairs with
    ``v >= mean(v) + std(v) / (global_layer + 1)`` are merged, mean and (unbiased) standard deviation averaged
    over the batch, the prefix left out. Both compare the tokens x and average with sizes as weights.

    No item of a batch merges more than the one with the fewest, so that all keep the same number of tokens:
    results depend on the batch, and each of the two layers waits for the device once to learn the number.
    ``counts`` says the two numbers beforehand instead: the most similar windows and pairs are merged, however
    similar, nothing waits, and the layers compile. Layers count from 0: the paper's 1 and 5 (ViT-S) are 0 and
    4 here.
    """

    threshold: float = field(
        default=0.88, metadata={"help": "mean cosine from which a window is merged, in [-1, 1]"}
    )
    local_layer: int = field(default=0, metadata={"help": "layer (0-based) that merges windows"})
    global_layer: int = field(default=4, metadata={"help": "layer (0-based) that merges pairs"})
    counts: tuple[int, int] | None = field(
        default=None, metadata={"help": "windows and pairs to merge, whatever the data; None: by likeness"}
    )
    proportional: bool = field(
        default=False, metadata={"help": "add log size to the attention logits (the official code does not)"}
    )

    def __post_init__(self) -> None:
        if not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"ALGM: threshold must be in [-1, 1], got {self.threshold!r}")
        if not 0 <= self.local_layer < self.global_layer:
            got = (self.local_layer, self.global_layer)
            raise ValueError(f"ALGM: layers must be 0 <= local_layer < global_layer, got {got}")
        if self.counts is not None and (len(self.counts) != 2 or min(self.counts) < 0):
            raise ValueError(f"ALGM: counts must be two numbers >= 0, got {self.counts!r}")

    def plan_local(
        self, x: Tensor, grid: tuple[int, int], *, prefix: int = 1, mask: Tensor | None = None
    ) -> Plan:
        """The windows of ``x`` ``[B, prefix + rows * columns, C]`` that are merged.

        Args:
            x: tokens, the patches of the grid row by row behind the prefix.
            grid: rows, columns; the last of an odd number is in no window.
            prefix: tokens at the front that stay as they are.
            mask: ``[B, N]`` bool, False at padding; windows with any are not merged.

        Rows: prefix, merged windows by descending similarity, the other tokens in ascending order.

        Raises:
            ValueError: the number of tokens does not fit the grid; padding, and ``counts`` given.
        """
        rows, columns = grid
        if x.shape[1] != prefix + rows * columns:
            expected = f"prefix + rows * columns = {prefix} + {rows} * {columns}"
            raise ValueError(f"ALGM: number of tokens must be {expected}, got {x.shape[1]}")
        windows = _windows(rows, columns, x.device) + prefix
        likeness = window_similarity(x, windows)
        if mask is not None:
            likeness = likeness.masked_fill(~mask[:, windows].all(dim=2), float("-inf"))
        r = self._windows_merged(likeness, mask)
        if r == 0:
            return matching.identity(x)
        chosen = windows[matching.ranked(likeness)[:, :r]]  # [B, r, 4]
        own, last = matching.tokens_like(x), chosen[:, :, 3:]
        target = own.scatter(1, chosen.flatten(1), last.expand_as(chosen).flatten(1))
        key = own + (own >= prefix) * x.shape[1]
        key = key.scatter(1, last[:, :, 0], prefix + matching.tokens_like(last))
        return matching.assemble(target, key, x.shape[1] - 3 * r)

    def plan_global(self, x: Tensor, *, prefix: int = 1, mask: Tensor | None = None) -> Plan:
        """The pairs of ``x`` ``[B, N, C]`` that are merged: ``(token_map [B, N] int32, out_tokens)``.

        ``prefix``: tokens at the front that stay; ``mask``: ``[B, N]`` bool, False at padding. Rows as in
        ``ToMe.plan``.
        """
        n = x.shape[1]
        match = matching.halves(x, prefix, mask)
        if self.counts is not None:
            return self._pairs(x, match, schedule.cap(self.counts[1], n, prefix), prefix, mask)
        known = match.column >= 0
        count = known.sum(dim=1)
        value = torch.where(known, match.value, 0.0)
        mean = value.sum(dim=1) / count.clamp_min(1)
        spread = torch.where(known, value - mean[:, None], 0.0).square().sum(dim=1)
        std = (spread / (count - 1).clamp_min(1)).sqrt()
        limit = mean.mean() + std.mean() / (self.global_layer + 1)
        r = schedule.cap(_fewest(known & (match.value >= limit)), n, prefix)
        return self._pairs(x, match, r, prefix, mask)

    def _windows_merged(self, likeness: Tensor, mask: Tensor | None) -> int:
        if self.counts is None:
            return _fewest(likeness >= self.threshold)
        if mask is not None:  # how many windows are whole is not known without looking
            raise ValueError("ALGM: counts must be None where there is padding, got two numbers")
        return min(self.counts[0], likeness.shape[1])

    @staticmethod
    def _pairs(x: Tensor, match: Match, r: int, prefix: int, mask: Tensor | None) -> Plan:
        if r == 0:
            return matching.identity(x)
        return matching.pair_up(match, r, x.shape[1], prefix, mask=mask)

    def reduce(self, view: LayerView) -> Reduced | None:
        """Merge windows or pairs, by layer. Raises ValueError where windows have no grid to lie on."""
        if view.layer == self.local_layer:
            if view.grid is None:
                raise ValueError("ALGM: grid must be given, rows and columns of the patches, got None")
            plan = self.plan_local(view.x, view.grid, prefix=view.prefix, mask=view.mask)
        elif view.layer == self.global_layer:
            plan = self.plan_global(view.x, prefix=view.prefix, mask=view.mask)
        else:
            return None
        return matching.merged(view, plan)


@torch.no_grad()
def window_similarity(x: Tensor, windows: Tensor) -> Tensor:
    """``[B, W]`` float32, mean cosine of the pairs of tokens of ``x`` in each of the disjoint ``windows``
    ``[W, T]``; zero rows have cosine 0 to all.

    ``(|sum_i u_i|^2 - sum_i |u_i|^2) / (T (T - 1))`` with u the normalised tokens. These are not stored: the
    sum of tokens weighted by 1 / norm is a merge.
    """
    count, tokens = windows.shape
    norm: Tensor = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32)
    known = norm.square() >= torch.finfo(torch.float32).tiny
    window = torch.full((x.shape[1],), -1, dtype=torch.int32, device=x.device)
    rows = torch.arange(count, dtype=torch.int32, device=x.device)
    window[windows] = rows[:, None].expand_as(windows)
    summed, _ = ops.merge_tokens(
        matching.dense(x.float()),
        window.repeat(x.shape[0], 1),
        count,
        weight=torch.where(known, 1 / norm, 0),
        mode="sum",
    )
    pairs: Tensor = summed.square().sum(dim=2) - known[:, windows].sum(dim=2)
    return pairs / (tokens * (tokens - 1))


def _windows(rows: int, columns: int, device: torch.device) -> Tensor:
    """``[W, 4]``, the patches of each complete 2 x 2 window, row by row."""
    corner = torch.arange(rows // 2, device=device)[:, None] * 2 * columns
    corner = (corner + torch.arange(columns // 2, device=device) * 2).reshape(-1, 1)
    return corner + torch.tensor([0, 1, columns, columns + 1], device=device)


def _fewest(chosen: Tensor) -> int:
    """The smallest count of an item of ``chosen`` ``[B, n]`` bool. Waits for the device."""
    return int(chosen.sum(dim=1).min()) if chosen.numel() > 0 else 0
