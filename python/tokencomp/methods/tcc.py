"""Token-level correlation-guided compression: like keys set budgets, CLS chooses (arXiv 2407.14439)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base
from tokencomp.methods.prumerge import outlier_count
from tokencomp.methods.visual import VisualKeep, VisualView, at_layer, best, merged_into, unit


@base.register("tcc", paper="2407.14439", stage="visual tokens, before the first LLM layer; merges")
@dataclass(frozen=True)
class TCC:
    """Crops with many like patches keep few: as many as patches that are not redundant.

    Patch i is redundant where more than ``count`` of the other patches of its crop have a cosine of keys
    above ``similar``; ``n = max(least, ceil(d N))``, d the share that is not. Kept are the outliers of the
    deep layer's CLS attention (above ``Q3 + 1.5 (Q3 - Q1)``, at most n), then the largest of the shallow
    layer's; others go into the kept one of most similar key, as a mean.

    Reconstructed: neither code nor constants are public, so thresholds and layers have no defaults.
    """

    similar: float = field(metadata={"help": "cosine of keys above which patches are alike"})
    count: float = field(metadata={"help": "share of the other patches that makes one redundant"})
    shallow: int = field(metadata={"help": "encoder layer of the local choice; negative: from the end"})
    deep: int = field(metadata={"help": "encoder layer of the global choice and of the keys"})
    least: int = field(default=1, metadata={"help": "tokens that each crop keeps at least"})
    merge: bool = field(default=True, metadata={"help": "whether other tokens go into kept ones"})

    def __post_init__(self) -> None:
        if not -1.0 <= self.similar <= 1.0 or not 0.0 <= self.count <= 1.0:
            raise ValueError(
                f"TCC: similar must be in [-1, 1], count in [0, 1], got {self.similar!r} and {self.count!r}"
            )
        if self.least < 1:
            raise ValueError(f"TCC: least must be >= 1, got {self.least!r}")

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: the shallow layer, then the deep one."""
        return at_layer("TCC", self.shallow, layers), at_layer("TCC", self.deep, layers)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``."""
        shallow, deep = self.looks_at(view.encoder.layers)
        key = view.encoder.keys(deep).float()
        direction = unit(key.transpose(1, 2).flatten(2))
        cosine = direction @ direction.mT
        counts = self.budgets(cosine)
        total = view.encoder.cls(deep)
        number = torch.minimum(outlier_count(total), counts).tolist()
        outliers = best(total, [max(1, n) for n in number])
        forced = (
            ragged.kept_mask(outliers, total.shape[1])
            & (torch.tensor(number, device=total.device) > 0)[:, None]
        )
        index = best(view.encoder.cls(shallow), counts.tolist(), keep=forced)
        if not self.merge:
            return VisualKeep(index)
        place = index.clamp(min=0).long()[:, None].expand(-1, cosine.shape[1], -1)
        like = cosine.gather(2, place).masked_fill((index < 0)[:, None], -2.0)
        member = ~ragged.kept_mask(index, total.shape[1])
        return VisualKeep(index, merged_into(view.x, index, like.argmax(2), member))

    def budgets(self, cosine: Tensor) -> Tensor:
        """``[M]`` int64: the tokens each crop keeps, from the cosines ``[M, N, N]`` of its keys."""
        tokens = cosine.shape[1]
        others = (cosine > self.similar).sum(2) - (cosine.diagonal(dim1=1, dim2=2) > self.similar).long()
        distinct = (others <= self.count * max(1, tokens - 1)).sum(1)
        return distinct.clamp(min=min(self.least, tokens))
