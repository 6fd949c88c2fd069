"""GlobalCom2: an overview tells how much of each tile to keep, and what (arXiv 2501.05179)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp import ops
from tokencomp.methods import base
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, best


@base.register("globalcom2", paper="2501.05179", stage="visual tokens, before the first LLM layer")
@dataclass(frozen=True)
class GlobalCom2:
    """Budgets of tiles from the overview's scores, tokens of tiles from both their own and the overview's.

    With ``s`` the scaled products of CLS with the patches, a mean over heads of the last encoder layer:

    - the overview keeps its ``floor(keep N)`` largest;
    - tile j, a cell of the overview with score sum ``S_j``, keeps ``floor(N r_j)`` tokens, ``r_j = min(1,
      keep (1 + sigma_j - mean sigma))``, ``sigma = softmax((S - max S) / temperature)``;
    - its tokens are scored ``s / |s| + g / |g|`` with g the overview's scores, resized to the tiles
      (bilinear).

    An encoder without CLS scores ``-cos(x, mean x)``, the paper's rule. An image of one crop keeps its
    ``floor(keep N)`` best. Tokens are fed on in raster order (the paper's code feeds the overview's by
    descending score), and padding of tiles is not treated apart.
    """

    keep: float = field(default=0.25, metadata={"help": "ratio of tokens kept"})
    temperature: float = field(default=10.0, metadata={"help": "of the softmax over the tiles' scores"})
    layer: int = field(default=-1, metadata={"help": "encoder layer of the products; negative: from the end"})

    def __post_init__(self) -> None:
        if isinstance(self.keep, int) or not 0.0 < self.keep <= 1.0:
            raise ValueError(f"GlobalCom2: keep must be a ratio in (0, 1], got {self.keep!r}")
        if not self.temperature > 0:
            raise ValueError(f"GlobalCom2: temperature must be > 0, got {self.temperature!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``."""
        return (at_layer("GlobalCom2", self.layer, layers),)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``. Raises ValueError for tiles without a grid."""
        score = self.score(view)
        tokens = score.shape[1]
        own = [max(1, int(tokens * self.keep))] * score.shape[0]
        first = 0
        for image, count in enumerate(view.counts):
            if count > 1 and view.overview:
                if view.grid is None or not view.tiles:
                    raise ValueError("GlobalCom2: tiles need the grid of their tokens and of themselves")
                over, tiles = score[first], slice(first + 1, first + count)
                layout = view.tiles[image]
                shares = tile_shares(over.view(view.grid), layout, self.keep, self.temperature)
                own[tiles] = [max(1, int(tokens * share)) for share in shares]
                spread = spread_over_tiles(over.view(view.grid), layout)
                score = score.clone()
                score[tiles] = functional.normalize(score[tiles], dim=1) + functional.normalize(spread, dim=1)
            first += count
        return VisualKeep(best(score, own))

    def score(self, view: VisualView) -> Tensor:
        """``[M, N]``."""
        if view.encoder.has_cls:
            return view.encoder.logits(self.looks_at(view.encoder.layers)[0])
        features = view.encoder.features().float()
        return -functional.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)


def tile_shares(
    overview: Tensor, layout: tuple[int, int], keep: float, temperature: float
) -> Sequence[float]:
    """The ratio of each tile, in raster order, from the overview's scores ``[H, W]``."""
    rows, columns = layout
    high, wide = overview.shape[0] // rows, overview.shape[1] // columns
    row = (torch.arange(overview.shape[0], device=overview.device) // high).clamp(max=rows - 1)
    column = (torch.arange(overview.shape[1], device=overview.device) // wide).clamp(max=columns - 1)
    cell = (row[:, None] * columns + column).flatten()
    mass, _ = ops.merge_tokens(overview.reshape(1, -1, 1), cell[None], rows * columns, mode="sum")
    total = mass.flatten()
    sigma = ((total - total.max()) / temperature).softmax(0)
    share: list[float] = (keep * (1 + sigma - sigma.mean())).clamp(max=1.0).tolist()
    return share


def spread_over_tiles(overview: Tensor, layout: tuple[int, int]) -> Tensor:
    """The overview's scores ``[H, W]``, resized to all tiles and cut into them: ``[tiles, H * W]``."""
    (high, wide), (rows, columns) = overview.shape, layout
    large = functional.interpolate(
        overview[None, None], (high * rows, wide * columns), mode="bilinear", align_corners=False
    )
    cut = large[0, 0].view(rows, high, columns, wide).transpose(1, 2)
    return cut.reshape(rows * columns, high * wide)
