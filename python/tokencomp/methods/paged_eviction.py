"""PagedEviction: value norm over key norm, a page at a time (arXiv 2509.04377)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, eviction
from tokencomp.methods.kv import Keep, KVView
from tokencomp.recipes.common import require


@base.register("paged_eviction", paper="2509.04377", stage="kv")
@dataclass(frozen=True)
class PagedEviction(eviction.Eviction):
    """Tokens are worth ``|v| / |k|``; decode drops the page of lowest mean whenever the newest is full.

    Looks at no query and moves no data in decode. The prompt loses its lowest tokens before. One set a layer,
    by the mean over heads (the paper does not say), or with ``shared=False`` one a kv head. The page that has
    just filled is never the one that goes. A row holds the budget and up to ``page`` slots.
    """

    every: int = field(default=1, metadata={"help": "1: evict when a page is full; 0: only prompts"})
    page: int = field(default=0, metadata={"help": "slots of a page; 0: the cache's"})
    shared: bool = field(default=True, metadata={"help": "one set a layer"})

    def __post_init__(self) -> None:
        require(self.page >= 0, "PagedEviction", "page", ">= 0", self.page)
        require(self.every in (0, 1), "PagedEviction", "every", "0 or 1", self.every)
        super().__post_init__()

    def score(self, view: KVView) -> Tensor:
        """``|v| / |k|``."""
        k, v = (t[:, :, : view.size].float().norm(dim=-1) for t in (view.keys(), view.values()))
        score: Tensor = v / k.clamp(min=1e-6)
        return view.over_heads(score) if self.shared else score

    def evict(self, view: KVView) -> Keep | None:
        """Tokens, at the end of a prompt."""
        view.scratch["held"] = torch.minimum(eviction.held(view), torch.tensor(self.slots(view)))
        return super().evict(view)

    def after_step(self, view: KVView) -> Keep | None:
        """A page of each sequence whose newest page is full."""
        left, page = eviction.held(view), self.page or view.page
        if self.every == 0:
            return None
        due = (left % page == 0) & (left > torch.tensor(self.slots(view))) & (left >= 2 * page)
        if not due.any():
            return None
        view.scratch["held"] = left - page * due
        worst = self._worst_page(view, page)
        slot = torch.arange(view.size, device=worst.device)
        gone = (slot // page == worst[..., None]) & due.to(worst.device)[:, None, None]
        stays = (slot < view.lengths[..., None]) & ~gone
        index = eviction.packed(stays, int(view.scratch["held"].max()))
        return Keep(index, stays.sum(-1).int(), ragged=True, whole_pages=page == view.page)

    def _worst_page(self, view: KVView, page: int) -> Tensor:
        """``[B, H]``: the full page of lowest mean before the newest; ties: the first."""
        score, pages = self.score(view), -(-view.size // page)
        score = torch.nn.functional.pad(score, (0, pages * page - view.size)).nan_to_num(nan=-torch.inf)
        mean = score.unflatten(2, (pages, page)).mean(-1)
        older = torch.arange(pages, device=mean.device) < view.lengths[..., None] // page - 1
        mean = torch.where(older[:, : mean.shape[1]], mean, torch.inf)
        lowest = mean == mean.amin(-1, keepdim=True)
        return torch.where(lowest, torch.arange(pages, device=mean.device), pages).amin(-1)
