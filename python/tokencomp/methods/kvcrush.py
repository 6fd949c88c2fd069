"""KVCrush: whole pages go, but representatives of what goes stay (arXiv 2503.00022)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops, ragged, recipes
from tokencomp.methods import base, eviction
from tokencomp.methods.h2o import H2O
from tokencomp.methods.kv import Keep, KVView
from tokencomp.recipes.common import require
from tokencomp.recipes.crush import Anchor, Spacing


@base.register("kvcrush", paper="2503.00022", stage="kv")
@dataclass(frozen=True)
class KVCrush(eviction.Wrapper):
    """Any method on whole pages, a share of whose budget goes to pages that stand for those that go.

    Between the first ``sinks`` and the last ``recent`` slots (rounded up to pages) the pages of largest total
    score stay. A page's signature has a bit per token, set in the better half; of the other pages those at
    even steps along their Hamming distance to an anchor stay as well. They are part of the budget (in
    OpenVINO they come on top), and tables are edited, no data moves. With H2O the whole is OpenVINO's
    eviction, one set a kv head rather than a layer unless ``shared``.
    """

    method: eviction.Evicting = field(default=H2O(recent=0), metadata={"help": "whose scores are used"})
    share: float = field(default=0.25, metadata={"help": "of the pages that stay by choice: representatives"})
    page: int = field(default=0, metadata={"help": "slots of a page; 0: the cache's"})
    sinks: int = field(default=4, metadata={"help": eviction.SINKS_HELP})
    recent: int = field(default=16, metadata={"help": "last slots that always stay"})
    anchor: Anchor = field(default="alternating", metadata={"help": "what signatures are compared with"})
    spacing: Spacing = field(default="step", metadata={"help": "of the representatives: step or linspace"})
    shared: bool = field(default=False, metadata={"help": "one set a layer, by the sum over heads"})
    seed: int = field(default=0, metadata={"help": "of the random anchor"})

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "KVCrush", "share", "in [0, 1]", self.share)
        require(self.page >= 0, "KVCrush", "page", ">= 0", self.page)
        require(min(self.sinks, self.recent) >= 0, "KVCrush", "sinks and recent", ">= 0", self.recent)
        super().__post_init__()

    def score(self, view: KVView) -> Tensor:
        """The method's; the mean over heads where ``shared``."""
        score = self.method.score(view)
        return view.over_heads(score) if self.shared else score

    def protected(self, slots: int) -> tuple[int, int]:
        """Sinks and recent slots before rounding."""
        return self.sinks, self.recent

    def select(self, view: KVView, score: Tensor, slots: Sequence[int]) -> Keep:
        """Chooses pages, rows of equal length at a time. Waits for the lengths where they are on a GPU."""
        page = self.page or view.page
        heads = score.shape[1]
        lengths = view.lengths[:, :heads]
        alike = defaultdict(list)
        for row, length in enumerate(lengths.flatten().tolist()):
            alike[length, slots[row // heads]].append(row)
        flat = score.float().flatten(0, 1)
        stays = torch.arange(view.size, device=score.device) < lengths.flatten()[:, None]
        for (length, k), rows in alike.items():
            if length > k:
                place = torch.tensor(rows, device=score.device)
                stays[place, :length] = self._pages(flat[place, :length], k, page)
        mask = stays.view(*lengths.shape, -1).expand(*view.lengths.shape, -1)
        index = eviction.packed(mask, min(max(slots), view.size))
        return Keep(index, (index >= 0).sum(-1).int(), ragged=True, whole_pages=page == view.page)

    def _pages(self, score: Tensor, k: int, page: int) -> Tensor:
        """``[rows, length]`` bool: what stays of rows of one length, longer than k."""
        length = score.shape[1]
        begin = -(-self.sinks // page) * page
        end = (length - self.recent) // page * page
        number, allowed = (end - begin) // page, (k - begin - (length - end)) // page
        if allowed < 0 or number < 0:
            least = begin + length - end
            raise ValueError(
                f"KVCrush: budget must be >= {least} slots, sinks and recent in pages of {page}, got {k}"
            )
        representatives = int(self.share * allowed)
        inner = torch.nan_to_num(score[:, None, begin:end], nan=0.0)
        total = recipes.page_scores(inner, page)[:, 0]
        chosen = ragged.kept_mask(ops.topk_select(total, allowed - representatives)[0], number)
        signature = recipes.page_signatures(inner, page)
        anchor = recipes.anchor_bits(signature, self.anchor, seed=self.seed)
        distance = recipes.hamming_distance(signature, anchor)
        picks, _ = recipes.bucket_picks(distance, ~chosen, representatives, spacing=self.spacing)
        chosen |= ragged.kept_mask(picks, number)
        stays = torch.ones(score.shape, dtype=torch.bool, device=score.device)
        stays[:, begin:end] = chosen.repeat_interleave(page, 1)
        return stays
