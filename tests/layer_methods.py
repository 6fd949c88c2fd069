"""Methods between attention and MLP for the tests of adapters, in plain PyTorch."""

from dataclasses import dataclass
from typing import Any

import torch
from tokencomp.methods.layers import LayerView, Reduced
from torch import Tensor


def merge(view: LayerView, token_map: Tensor, tokens: int, sizes: bool = True) -> Reduced:
    """The size-weighted means of the groups of ``token_map``."""
    group = torch.where(token_map < 0, tokens, token_map).long()
    size = view.sizes()
    total = size.new_zeros(size.shape[0], tokens + 1).scatter_add(1, group, size)[:, :tokens]
    weighted = view.x.double() * size[..., None]
    into = weighted.new_zeros(weighted.shape[0], tokens + 1, weighted.shape[2])
    summed = into.scatter_add(1, group[..., None].expand_as(weighted), weighted)[:, :tokens]
    return Reduced((summed / total[..., None]).to(view.x.dtype), total if sizes else None, token_map)


def nothing_done(self: Any, x: Tensor, prefix: int, grid: Any, state: dict[str, Any]) -> None:
    state["begun"] = state.get("begun", 0) + 1


@dataclass(frozen=True)
class Pairs:
    """Bipartite soft matching of even and odd patches: the r most similar pairs, in position order."""

    r: int | tuple[int, ...] = 4
    proportional: bool = True

    begin = nothing_done

    def reduce(self, view: LayerView) -> Reduced | None:
        """Merge r pairs of patches."""
        r = self.r if isinstance(self.r, int) else self.r[view.layer]
        patches = view.tokens - view.prefix
        r = min(r, patches // 2)
        if r == 0:
            return None
        metric = torch.nn.functional.normalize(view.metric()[:, view.prefix :], dim=-1)
        similarity = metric[:, 0::2] @ metric[:, 1::2].mT
        if view.mask is not None:
            known = view.mask[:, view.prefix :]
            both = known[:, 0::2, None] & known[:, None, 1::2]
            neither = ~known[:, 0::2, None] & ~known[:, None, 1::2]
            similarity = torch.where(both, similarity, torch.where(neither, -2.0, float("-inf")))
        value, target = similarity.max(dim=-1)
        order = value.sort(dim=-1, descending=True, stable=True).indices
        goes = torch.zeros_like(value, dtype=torch.bool).scatter(1, order[:, :r], True)
        gone = torch.zeros(view.x.shape[:2], dtype=torch.bool)
        gone[:, view.prefix :][:, 0::2] = goes
        row = (~gone).to(torch.int32).cumsum(1) - 1
        into = row.gather(1, view.prefix + 2 * target + 1)
        token_map = row.clone()
        token_map[:, view.prefix :][:, 0::2] = torch.where(goes, into, row[:, view.prefix :][:, 0::2])
        return merge(view, token_map.to(torch.int32), view.tokens - r)


@dataclass(frozen=True)
class Drop:
    """Drop r random patches a layer, the same number for every item; sizes are not tracked."""

    r: int = 4
    proportional: bool = False

    begin = nothing_done

    def reduce(self, view: LayerView) -> Reduced | None:
        """Keep all but r patches."""
        patches = view.tokens - view.prefix
        r = min(self.r, patches - 1)
        if r <= 0:
            return None
        score = torch.rand(view.x.shape[0], patches)
        gone = torch.zeros(view.x.shape[:2], dtype=torch.bool)
        gone[:, view.prefix :].scatter_(1, score.argsort(1)[:, :r], True)
        row = (~gone).to(torch.int32).cumsum(1) - 1
        keep = (~gone).nonzero()[:, 1].view(view.x.shape[0], -1)
        x = view.x.gather(1, keep[..., None].expand(-1, -1, view.x.shape[2]))
        return Reduced(x, None, torch.where(gone, -1, row).to(torch.int32))


@dataclass(frozen=True)
class Duplicates:
    """Merge patch 2i + 1 into patch 2i at one layer, whatever they are."""

    layer: int = 0
    proportional: bool = True

    begin = nothing_done

    def reduce(self, view: LayerView) -> Reduced | None:
        """Halve the patches."""
        if view.layer != self.layer:
            return None
        place = torch.arange(view.tokens, dtype=torch.int32)
        half = torch.where(place < view.prefix, place, view.prefix + (place - view.prefix) // 2)
        tokens = view.prefix + (view.tokens - view.prefix + 1) // 2
        return merge(view, half.expand(view.x.shape[0], -1).contiguous(), tokens)


@dataclass(frozen=True)
class Nothing:
    """Leaves every layer as it is and keeps what it was shown."""

    proportional: bool = True
    seen: Any = None

    begin = nothing_done

    def reduce(self, view: LayerView) -> Reduced | None:
        """None, always."""
        if self.seen is not None:
            self.seen.append(view)
        return None
