"""QuoTA: tokens of video frames by how well a scorer finds each fits the question (arXiv 2503.08689)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView


@base.register(
    "quota", paper="2503.08689", stage="visual tokens, before the first LLM layer; video frames; merges"
)
@dataclass(frozen=True)
class QuoTA:
    """A budget over frames in proportion to the squares of their scores, and smaller maps of frames.

    ``w_f = s_f^2 / sum s^2`` of the frames (crops) of a video, capped at a whole frame with one pass of
    proportional redistribution, ``n_f = floor(keep F N w_f)``; a frame's map becomes one of ``h x w`` with
    ``h = w = floor(sqrt n_f)``, then ``(h + 1) x w`` where that fits. ``pool`` resizes the map by averages
    (the paper's second variant); ``pick`` takes evenly spaced tokens (its third). ``scorer`` is a callable
    ``view -> [M]`` of numbers >= 0; the paper asks a small vision-language model. Pooled tokens stand at the
    places of the evenly spaced ones.
    """

    scorer: Callable[[VisualView], Tensor] = field(metadata={"help": "view -> [M] scores >= 0 of the frames"})
    keep: float = field(default=0.5, metadata={"help": "ratio of the tokens of all frames"})
    resize: Literal["pool", "pick"] = field(default="pool", metadata={"help": "how a frame's map shrinks"})

    def __post_init__(self) -> None:
        if isinstance(self.keep, int) or not 0.0 < self.keep <= 1.0:
            raise ValueError(f"QuoTA: keep must be a ratio in (0, 1], got {self.keep!r}")
        if self.resize not in ("pool", "pick"):
            raise ValueError(f"QuoTA: resize must be pool or pick, got {self.resize!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: nothing."""
        return ()

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError without a grid, or for scores of a wrong shape or sign."""
        if view.grid is None:
            raise ValueError("QuoTA: the tokens must be a grid, got none")
        score = self.scorer(view).float()
        if score.shape != (view.x.shape[0],) or not bool((score >= 0).all()):
            raise ValueError(
                f"QuoTA: scorer must give one number >= 0 for each of {view.x.shape[0]} frames, got "
                f"{list(score.shape)}"
            )
        shapes = [shape for part in score.split(view.counts) for shape in self.shapes(part, view.grid)]
        rows, index = zip(
            *(self._frame(x, view.grid, shape) for x, shape in zip(view.x, shapes, strict=True)), strict=True
        )
        width = max(1, *(len(i) for i in index))
        holes = view.x.new_full((len(index), width), -1, dtype=torch.int32)
        y = view.x.new_zeros(len(index), width, view.x.shape[2])
        for frame, (row, place) in enumerate(zip(rows, index, strict=True)):
            holes[frame, : len(place)], y[frame, : len(place)] = place, row
        return VisualKeep(holes, y)

    def shapes(self, score: Tensor, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of each frame's map, (0, 0) where nothing is left of it."""
        tokens = grid[0] * grid[1]
        total = self.keep * tokens * len(score)
        return [map_shape(int(total * w), grid) for w in frame_weights(score, tokens / total).tolist()]

    def _frame(self, x: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        high, wide = shape
        row = (2 * torch.arange(high, device=x.device) + 1) * grid[0] // max(1, 2 * high)
        column = (2 * torch.arange(wide, device=x.device) + 1) * grid[1] // max(1, 2 * wide)
        index = (row[:, None] * grid[1] + column).flatten()
        if self.resize == "pick" or not len(index):
            return x[index], index.to(torch.int32)
        pooled = functional.adaptive_avg_pool2d(x.float().T.reshape(1, -1, *grid), shape)
        return pooled[0].flatten(1).T.to(x.dtype), index.to(torch.int32)


def frame_weights(score: Tensor, cap: float) -> Tensor:
    """``score^2`` of frames, normalised; what is above ``cap`` goes to the others in proportion, once."""
    square = score.double().square()
    total = square.sum()
    weight = square / total if total > 0 else torch.full_like(square, 1 / max(1, len(square)))
    over = (weight - cap).clamp(min=0)
    below = torch.where(weight < cap, weight, 0.0)
    if over.sum() > 0 and below.sum() > 0:
        weight = torch.where(weight < cap, weight + over.sum() * below / below.sum(), cap)
    return weight.clamp(max=cap)


def map_shape(count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns, at most those of ``grid``, of the largest nearly square map of ``count`` tokens."""
    side = int(count**0.5)
    side += (side + 1) ** 2 <= count
    if side == 0:
        return 0, 0
    high = side + 1 if (side + 1) * side <= count else side
    return min(high, grid[0]), min(side, grid[1])
