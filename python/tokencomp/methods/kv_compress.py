"""KV-Compress: pages are freed where they are worth least, across the heads of a layer (arXiv 2410.00161)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.h2o import Accumulating
from tokencomp.methods.kv import Keep, KVView
from tokencomp.recipes.common import require


@base.register("kv_compress", paper="2410.00161", stage="kv")
@dataclass(frozen=True)
class KVCompress(Accumulating):
    """Sums of squared attention; heads give up whole pages in the order of what they lose.

    Freeing one more page of a head costs the score of the last slot that has to go for it, the first page of
    a head only what hangs over a page. Pages are freed, cheapest first, until a layer holds no more than
    ``Hkv * budget`` slots' worth: heads hold different numbers of slots, and every eviction frees real pages.
    The official code also compares layers, which needs the whole prompt uncompressed, and max-pools prompt
    scores; here each layer evicts on its own, unpooled. ``scored`` is the number of prompt queries that
    count.
    """

    sinks: int = field(default=4, metadata={"help": eviction.SINKS_HELP})
    recent: int | float = field(default=16, metadata={"help": eviction.RECENT_HELP})
    scored: int = field(default=32, metadata={"help": "last prompt queries that count; 0: all"})
    squared: bool = field(default=True, metadata={"help": "add up squares of probabilities"})
    page: int = field(default=0, metadata={"help": "slots of a page; 0: the cache's"})

    def __post_init__(self) -> None:
        require(self.scored >= 0, "KVCompress", "scored", ">= 0", self.scored)
        require(self.page >= 0, "KVCompress", "page", ">= 0", self.page)
        super().__post_init__()

    @property
    def queries(self) -> int:
        """As asked for."""
        return self.scored or -1

    @property
    def power(self) -> int:
        """2 unless asked otherwise."""
        return 2 if self.squared else 1

    def record_prompt(self, view: KVView) -> None:
        """All queries at once, or the last ones when the prompt is over."""
        if self.scored == 0:
            super().record_prompt(view)
        else:
            kv_attention.remember_queries(view, self.scored)

    def evict(self, view: KVView) -> Keep | None:
        """Adds what the last queries of the prompt gave, then as ever."""
        if "queries" in view.scratch:
            given = kv_attention.window_received(view, self.scored, power=self.power)
            view.state["score"][:, :, : view.size] += given
            kv_attention.forget_queries(view)
        return super().evict(view)

    def select(self, view: KVView, score: Tensor, slots: Sequence[int]) -> Keep:
        """Whole pages of the cheapest slots."""
        page = self.page or view.page
        protected = [self.protected(k) for k in slots]
        given = _given_up(view, score, slots, protected, page)
        heads = view.lengths.shape[1]
        return eviction.keep_best(
            view, score, [heads * k for k in slots], protected, counts=view.lengths - given
        )


def _given_up(
    view: KVView, score: Tensor, slots: Sequence[int], protected: Sequence[tuple[int, int]], page: int
) -> Tensor:
    """``[B, Hkv]`` int32: slots each row gives up so that its layer holds ``Hkv * slots[b]``, in pages."""
    device, lengths = score.device, view.lengths.long()
    slot = torch.arange(view.size, device=device)
    ends = torch.tensor(protected, device=device)[:, :, None, None]
    open_ = (slot >= ends[:, 0]) & (slot < lengths[..., None] - ends[:, 1])
    worth = torch.where(open_, score.nan_to_num(nan=-torch.inf), torch.inf).sort(-1).values
    hanging = torch.where(lengths > 0, (lengths - 1) % page + 1, 0)
    pages = -(-view.size // page)
    last = hanging[..., None] - 1 + torch.arange(pages, device=device) * page
    cost = worth.gather(2, last.clamp(0, view.size - 1))
    cost = torch.where((last >= 0) & (last < lengths[..., None]), cost, torch.inf).flatten(1)
    budget = torch.tensor(slots, device=device)
    used = ((lengths + page - 1) // page).sum(1)
    surplus = (used - lengths.shape[1] * budget // page).clamp(min=0)
    surplus = torch.where((lengths <= budget[:, None]).all(1), 0, surplus)
    order = cost.sort(dim=1, stable=True).indices
    cheapest = torch.arange(cost.shape[1], device=device) < surplus[:, None]
    freed = torch.zeros_like(cheapest).scatter(1, order, cheapest) & (cost < torch.inf)
    freed = freed.view(*lengths.shape, pages).sum(-1)
    return torch.where(freed > 0, hanging + (freed - 1) * page, 0).int()
