"""What ``tokencomp.compress`` gives for a method on visual tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters import vlm
from tokencomp.adapters.restoring import Restoring
from tokencomp.visual import visualize


class CompressedVisual(Restoring):
    """A vision-language model whose visual tokens a method chooses, its cache compressed or not.

    A context manager: leaving it, also by an exception, restores the model.
    """

    def __init__(self, model: nn.Module, stack: vlm.VisualStack, cache: Any = None) -> None:
        self.model, self.cache_handle = model, cache
        self._stack = stack

    def _restore(self) -> None:
        vlm.detach(self._stack)
        if self.cache_handle is not None:
            self.cache_handle.remove()

    def report(self) -> vlm.VisualReport:
        """What became of the visual tokens of the last prompt; ``report().cache`` is that of the cache.

        Raises RuntimeError before the first forward pass.
        """
        report = self._stack.report
        if not report.prompts:
            raise RuntimeError("compress: there was no prompt yet")
        if self.cache_handle is not None:
            report.cache = self.cache_handle.report()
        return report

    def new_cache(self) -> Any:
        """An empty cache for this model; raises RuntimeError where its cache is not compressed."""
        if self.cache_handle is None:
            raise RuntimeError("compress: no method on the KV cache was given")
        return self.cache_handle.new_cache()

    def overlay(self, image: Tensor, *, number: int = 0, path: str | Path | None = None) -> Tensor:
        """A picture of the tokens of a crop that went on; see ``tokencomp.visualize``.

        Args:
            image: ``[3, H, W]`` or ``[1, H, W]``, the pixels of the crop.
            number: of the crop, among all of the last prompt's.
            path: where to write a PNG.

        Raises RuntimeError before a prompt with images, ValueError for a number out of range or tokens that
        are no grid.
        """
        report = self.report()
        crops = [(row, grid) for rows, grid in zip(report.index, report.grid, strict=True) for row in rows]
        if not 0 <= number < len(crops):
            raise ValueError(f"overlay: number must be in [0, {len(crops)}), got {number}")
        kept, grid = crops[number]
        if grid is None:
            raise ValueError("overlay: the tokens of this image are not a grid")
        token_map = torch.full((grid[0] * grid[1],), -1, dtype=torch.long)
        place = kept[kept >= 0].long().cpu()
        token_map[place] = torch.arange(len(place))
        return visualize(image, token_map, grid, prefix=0, path=path)
