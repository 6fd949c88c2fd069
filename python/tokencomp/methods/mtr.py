"""MTR: training-free token reduction for vision Mamba by merging unimportant tokens (arXiv 2507.14042)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp import token_map as maps
from tokencomp.methods import base, pruning


@base.register("mtr", paper="2507.14042", stage="blocks of a state-space model")
@dataclass(frozen=True)
class MTR:
    """Merges the least important tokens into the most similar of the moderately important ones, in order.

    Importance is the mean step size Delta_t of a token. Ranked by it the tokens fall into three groups: Keep
    (the most important, untouched), Target, and Source (the least important). Every source merges into its
    most similar target (cosine; plain mean of a target and its sources), then the original order is restored.

    The sizes of the groups come from a summary of the paper that does not give them: ``targets`` is our
    choice.
    """

    keep: float = field(default=0.8, metadata={"help": "share (or int: count) of the tokens left"})
    targets: float = field(
        default=0.5,
        metadata={"help": "share of the tokens left, the least important, that sources merge into"},
    )

    def __post_init__(self) -> None:
        base.check_keep("MTR", self.keep)
        if not 0.0 < self.targets <= 1.0:
            raise ValueError(f"MTR: targets must be in (0, 1], got {self.targets!r}")

    def score(self, delta: Tensor) -> Tensor:
        """``[B, N]`` float32: mean over channels of the step sizes ``[B, N, E]``, or ``[B, G, N, E]``
        summed over the scan heads G first.
        """
        delta = delta.float()
        return (delta if delta.dim() == 3 else delta.sum(1)).mean(-1)

    def plan(
        self, x: Tensor, score: Tensor, *, protect: Sequence[int] = (), mask: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """The map ``[B, N]`` int32 of every token's row afterwards, and the number of rows.

        Args:
            x: ``[B, N, C]``, what similarity is taken of.
            score: ``[B, N]`` importance.
            protect: tokens in no group, e.g. a CLS token in the middle of the sequence.
            mask: ``[B, N]`` bool, False at padding: it is dropped (-1) first and never merged into.
        """
        tokens = x.shape[1]
        stay = pruning.check_protect("MTR", protect, tokens)
        free = tokens - len(stay)
        left = base.budget(self.keep, free) if free else 0
        sources = free - left
        if sources == 0:
            return maps.identity(x.shape[0], tokens, device=x.device), tokens
        # Without the protected, the most important first.
        ranked = pruning.order(score, protect=stay, mask=mask)[:, len(stay) :].to(torch.int32)
        target = ranked[:, left - max(1, round(self.targets * left)) : left].sort(dim=1).values
        source = ranked[:, left:].sort(dim=1).values
        mask_a = None if mask is None else ragged.gather_rows(mask, source)
        mask_b = None if mask is None else ragged.gather_rows(mask, target)
        value, index = ops.cosine_match(x, x, a_index=source, b_index=target, mask_a=mask_a, mask_b=mask_b)
        token_map = ops.bipartite_map(
            value, index, sources, tokens, prefix=0, order="position", a_tokens=source, b_tokens=target
        )
        return token_map, tokens - sources

    def reduce_tokens(
        self, x: Tensor, score: Tensor, *, protect: Sequence[int] = (), mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The merged tokens ``[B, M, C]`` in their order, and the map ``[B, N]``; arguments as for
        ``plan``.
        """
        token_map, left = self.plan(x, score, protect=protect, mask=mask)
        return ops.merge_tokens(x, token_map, left)[0], token_map
