"""DiffRate: drop what CLS does not read, then merge the rest, by learned counts (arXiv 2305.17997)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import attention, base, matching
from tokencomp.methods.layers import LayerView, Reduced, Stateless
from tokencomp.methods.matching import Plan

# model: tokens, CLS included, after pruning and after merging in each layer
PRESETS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "deit_s_2.7g": (
        (197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3),
        (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3),
    ),
}


@base.register("diffrate", paper="2305.17997", stage="every encoder layer, between attention and MLP")
@dataclass(frozen=True)
class DiffRate(Stateless):
    """Sorts tokens by the attention of CLS, drops the tail, merges the next ones into the most similar head.

    In each layer: tokens by descending attention of CLS (mean over heads), prefix first; only the first
    ``prune[l]`` stay. Of these, each one from ``merge[l]`` on goes into the most similar of those before,
    never the prefix, by cosine of the tokens x. Values are averaged without weights; a size counts by its
    similarity: ``s_dst + sum cos * s_src``, so that sizes do not sum to the number of tokens. Cosines below 0
    count as 0 (a size must stay positive: its logarithm is the attention bias).

    Counts include the prefix; layers beyond a list, and counts above what a layer has, drop or merge nothing.
    The defaults are the published ones of DeiT-S at 2.7 GFLOPs.
    """

    prune: tuple[int, ...] = field(
        default=PRESETS["deit_s_2.7g"][0], metadata={"help": "tokens kept by pruning, per layer"}
    )
    merge: tuple[int, ...] = field(
        default=PRESETS["deit_s_2.7g"][1], metadata={"help": "tokens kept by merging after that, per layer"}
    )

    def __post_init__(self) -> None:
        for name, counts in (("prune", self.prune), ("merge", self.merge)):
            if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
                raise ValueError(f"DiffRate: {name} must hold counts >= 1, got {counts!r}")

    @property
    def proportional(self) -> bool:
        """Always: the similarity in the sizes has no other use."""
        return True

    @classmethod
    def preset(cls, name: str) -> "DiffRate":
        """The published counts for ``name``: one of ``PRESETS``. Raises KeyError with the known names."""
        if name not in PRESETS:
            raise KeyError(f"DiffRate: preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(*PRESETS[name])

    def counts(self, layer: int, tokens: int, prefix: int) -> tuple[int, int]:
        """Tokens after pruning and after merging of a layer that has ``tokens``; one always stays."""
        least = min(prefix + 1, tokens)
        pruned = self.prune[layer] if layer < len(self.prune) else tokens
        pruned = max(min(pruned, tokens), least)
        merged = self.merge[layer] if layer < len(self.merge) else tokens
        return pruned, max(min(merged, pruned), least)

    def plan(
        self,
        x: Tensor,
        importance: Tensor,
        *,
        prefix: int = 1,
        layer: int = 0,
        mask: Tensor | None = None,
    ) -> tuple[Plan, Tensor]:
        """What ``layer`` drops and merges: ``(token_map, out_tokens)`` and each token's share of its size.

        Args:
            x: ``[B, N, C]``, what is compared.
            importance: ``[B, N]``, the attention of CLS; entries of the prefix do not matter.
            prefix: tokens at the front that stay as they are.
            mask: ``[B, N]`` bool, False at padding: least important, and dropped where others merge.

        Rows: prefix, then by descending importance. The share is ``max(cos, 0)`` for a token that is merged
        into another and 1 for all others.
        """
        pruned, kept = self.counts(layer, x.shape[1], prefix)
        if mask is not None:
            importance = importance.masked_fill(~mask, float("-inf"))
        order = prefix + matching.ranked(importance[:, prefix:])
        tail, head = order[:, kept - prefix : pruned - prefix], order[:, : kept - prefix]
        target = matching.tokens_like(x).scatter(1, order[:, pruned - prefix :], -1)
        share = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        if tail.shape[1] > 0:
            match = matching.lists(x, tail, head, mask)
            into = torch.where(match.column < 0, -1, head.gather(1, match.column.long().clamp_min(0)))
            target = target.scatter(1, tail, into)
            share = share.scatter(1, tail, match.value.clamp_min(0.0))
        key = matching.tokens_like(x).scatter(1, order, prefix + matching.tokens_like(order))
        return matching.assemble(target, key, kept), share

    def apply(
        self, x: Tensor, plan: Plan, share: Tensor, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x`` ``[B, N, C]`` and ``size`` ``[B, N]`` by ``plan``: ``[B, M, C]`` and ``[B, M]`` float32."""
        y, _ = matching.merge(x, plan)
        counted = share if size is None else share * size
        return y, matching.merge(counted[..., None], plan, mode="sum")[0][..., 0]

    def reduce(self, view: LayerView) -> Reduced | None:
        """Drop and merge by this layer's attention. Raises ValueError where there is no CLS token."""
        if view.prefix < 1:
            raise ValueError(f"DiffRate: prefix must be >= 1, a CLS token, got {view.prefix}")
        if self.counts(view.layer, view.tokens, view.prefix)[1] == view.tokens:
            return None
        importance = attention.of(view, proportional=True).row(0).mean(dim=1)
        plan, share = self.plan(view.x, importance, prefix=view.prefix, layer=view.layer, mask=view.mask)
        x, size = self.apply(view.x, plan, share, view.size)
        return Reduced(x, size, plan.token_map)
