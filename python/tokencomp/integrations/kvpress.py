"""A press for kvpress that scores by the attention each key received, without eager attention.

Needs kvpress (0.5.5 runs with transformers < 5.3); nothing else of the package imports this module.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp import ops, scores
from tokencomp.recipes.common import require

try:
    from kvpress import ScorerPress
    from kvpress.utils import get_prerope_query_states
except ImportError as error:
    raise ImportError(
        f"tokencomp.integrations.kvpress needs kvpress: pip install kvpress ({error})"
    ) from error


@dataclass
class ColumnSumPress(ScorerPress):  # type: ignore[misc]  # kvpress is untyped
    """H2O and A2SF as a press: ``sum_t gamma ** (T - 1 - t) P[t, j]`` for each key j, the mean over a group.

    ``ObservedAttentionPress`` needs ``attn_implementation="eager"`` and a matrix ``[B, Hq, T, S]`` a layer;
    this one runs under any attention, in memory linear in the prompt: where the model returns no attention it
    projects the layer's queries once more, as kvpress' window presses do, and takes column sums of softmax in
    blocks. With ``gamma=1, corrected=True`` scores are those of ``ObservedAttentionPress``. A wrapper such as
    ``AdaKVPress`` takes it like any ``ScorerPress``.

    Where the model does return attention it is used: matrices ``[B, Hq, T, S]`` of eager attention, or
    column sums ``[B, Hq, S]``, as ``attn_implementation="tokencomp"`` returns them (``gamma=1`` only: their
    rows are summed already).

    As in every press, padding counts as tokens; the attention is taken as causal and dense, so layers with a
    sliding window are refused. Prompts in one piece.
    """

    compression_ratio: float = 0.0
    gamma: float = field(default=1.0, metadata={"help": "forgetting factor in (0, 1]"})
    corrected: bool = field(default=False, metadata={"help": "divide by the rows that see a key"})
    sinks: int = field(default=0, metadata={"help": "first tokens that always stay"})
    recent: int = field(default=0, metadata={"help": "last tokens that always stay"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.gamma <= 1, "ColumnSumPress", "gamma", "in (0, 1]", self.gamma)
        sides = (self.sinks, self.recent)
        require(min(sides) >= 0, "ColumnSumPress", "sinks and recent", ">= 0", sides)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Any,
        kwargs: Any,
    ) -> Tensor:
        """``[B, Hkv, S]`` float32; see ``kvpress.ScorerPress``."""
        heads, size = keys.shape[1:3]
        if attentions is None:
            score = self._from_queries(module, hidden_states, keys, kwargs)
        else:
            score = self._from_attention(attentions).unflatten(1, (heads, -1)).mean(2)
        if self.corrected:
            score = score / scores.count_correction(size, size, row_weight=self._weights(keys))[:, None]
        slot = torch.arange(size, device=keys.device)
        stays = (slot < self.sinks) | (slot >= size - self.recent)
        return score.masked_fill(stays, torch.finfo(torch.float32).max)

    def _from_attention(self, attentions: Tensor) -> Tensor:
        """``[B, Hq, S]``."""
        if attentions.dim() == 4:
            return (attentions.float() * self._weights(attentions)[:, None]).sum(2)
        require(self.gamma == 1, "ColumnSumPress", "gamma", "1 where column sums are given", self.gamma)
        return attentions.float()

    def _from_queries(self, module: Any, hidden_states: Tensor, keys: Tensor, kwargs: Any) -> Tensor:
        """``[B, Hkv, S]``."""
        name, tokens, size = "ColumnSumPress", hidden_states.shape[1], keys.shape[2]
        require(size == tokens, name, "keys of the layer", f"of all {tokens} tokens", f"{size} keys")
        window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        dense = window is None or window >= size
        require(dense, name, f"attention of {tokens} tokens", "dense", f"a sliding window of {window}")
        q = _rotated(get_prerope_query_states(module, hidden_states), *kwargs["position_embeddings"])
        softcap = getattr(module, "attn_logit_softcapping", None)
        sides: dict[str, Any] = {"scale": module.scaling, "softcap": softcap}
        q = q.to(keys.dtype)
        lse = ops.attention_lse(q, keys, **sides)
        weight = self._weights(q)
        return ops.column_score(q, keys, lse, row_weight=weight, heads="kv_mean", **sides)

    def _weights(self, like: Tensor) -> Tensor:
        """``[T]``."""
        return scores.forgetting_weights(like.shape[2], self.gamma, device=like.device)


def _rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``q`` ``[B, H, T, D]`` rotated by halves; ``cos`` and ``sin`` ``[B, T, R]``, R <= D."""
    width = cos.shape[-1]
    q, rest = q[..., :width], q[..., width:]
    cos, sin = cos[:, None], sin[:, None]
    left, right = q.chunk(2, dim=-1)
    return torch.cat([q * cos + torch.cat([-right, left], -1) * sin, rest], -1)
