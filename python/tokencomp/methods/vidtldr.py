"""vid-TLDR: merge tokens early, background with little say, by attention entropy (arXiv 2403.13347)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import attention, base, pruning
from tokencomp.methods.layers import LayerView, Reduced, Stateless


@base.register("vidtldr", paper="2403.13347", stage="first encoder layers, between attention and MLP")
@dataclass(frozen=True)
class VidTLDR(Stateless):
    """Bipartite merging in the first layers where a merged-away token counts by its saliency.

    Saliency g: negative entropy of the head-mean attention rows, min-max scaled; what is below the mean
    becomes 0, the rest is ``(g - mean) / max(g - mean)``. Even tokens are matched with odd ones by the
    cosine of x; the r best pairs merge: ``x' = (s_d x_d + sum_s g_s s_s x_s) / s'`` with ``s' = s_d + sum_s
    g_s s_s``, so that a token of no saliency leaves no trace (its map still says where its nearest relative
    went). Sizes therefore do not sum to the number of input tokens.

    The saliency of prefix tokens is not looked at and they take no part (the paper's models have none).
    Tokens of equal saliency all count fully, where the paper's code divides 0 by 0.
    """

    r: float | Sequence[float] = field(
        default=(600, 200, 100),
        metadata={
            "help": "tokens merged a layer: a count (int) or a share of all; a list is indexed by layer"
        },
    )
    proportional: bool = field(
        default=False, metadata={"help": "later layers add log size to their attention logits"}
    )

    def __post_init__(self) -> None:
        for r in self.r if isinstance(self.r, Sequence) else (self.r,):
            if not (r >= 0 if isinstance(r, int) else 0.0 <= r < 1.0):
                raise ValueError(f"VidTLDR: r must be a count >= 0 or a share in [0, 1), got {r!r}")

    def reduce(self, view: LayerView) -> Reduced | None:
        """Merges the layer's tokens; see ``LayerMethod``."""
        wanted = pruning.at(self.r, view.layer, 0)
        count = wanted if isinstance(wanted, int) else int(view.tokens * wanted)
        r = min(count, (view.tokens - view.prefix) // 2)
        if r <= 0:
            return None
        graph = attention.of(view, proportional=self.proportional)
        g = saliency(graph.negative_entropy(), view.prefix, view.mask)
        return merge(view, g, r)


def saliency(negative_entropy: Tensor, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
    """``[B, N]`` in [0, 1] of ``negative_entropy`` ``[B, N]``; 0 for prefix and padding (``mask`` False)."""
    counted = torch.arange(negative_entropy.shape[1], device=negative_entropy.device) >= prefix
    counted = counted.expand(negative_entropy.shape) if mask is None else counted & mask
    low = negative_entropy.masked_fill(~counted, float("inf")).amin(1, keepdim=True)
    high = negative_entropy.masked_fill(~counted, -float("inf")).amax(1, keepdim=True)
    flat = ~(high > low)  # also where nothing is counted
    scaled = ((negative_entropy - low) / (high - low)).masked_fill(~counted | flat, 0)
    mean = scaled.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    sharp = ((scaled - mean) / (1 - mean)).clamp(min=0)  # the largest scaled value is 1
    return torch.where(flat, 1.0, sharp).masked_fill(~counted, 0)


def merge(view: LayerView, g: Tensor, r: int) -> Reduced:
    """Merges the ``r`` best pairs of even and odd tokens, sources weighted by ``g`` ``[B, N]``.

    Padding is never merged into, and goes first where it is an even token.
    """
    first, second = (view.prefix + 1) // 2, view.prefix // 2
    even, odd = view.x[:, 0::2], view.x[:, 1::2]
    real_even, real_odd = (None, None) if view.mask is None else (view.mask[:, 0::2], view.mask[:, 1::2])
    value, index = ops.cosine_match(
        even, odd, protect_a=first, protect_b=second, mask_a=real_even, mask_b=real_odd
    )
    if real_even is not None:
        value = value.masked_fill(~real_even, float("inf"))
    token_map = ops.bipartite_map(value, index, r, view.tokens, prefix=view.prefix, order="index")
    share = torch.where(_is_source(token_map), g, 1.0)
    x, size = ops.merge_tokens(view.x, token_map, view.tokens - r, size=view.sizes() * share)
    return Reduced(x, size, token_map)


def _is_source(token_map: Tensor) -> Tensor:
    """``[B, N]`` bool: even tokens that share the row of an odd one, whose rows are their own."""
    odd = torch.zeros_like(token_map, dtype=torch.bool)
    odd[:, 1::2] = True
    rows = token_map.masked_fill(token_map < 0, token_map.shape[1]).long()
    taken = torch.zeros(token_map.shape[0], token_map.shape[1] + 1, device=token_map.device)
    taken = taken.scatter_reduce(1, rows, odd.float(), "amax")
    return (taken.gather(1, rows) > 0) & ~odd
