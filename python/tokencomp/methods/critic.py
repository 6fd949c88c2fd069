"""CRITIC: attention received, entropy of the token's own row, and a gradient (arXiv 2504.01281)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp import ops, recipes
from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.h2o import Accumulating
from tokencomp.methods.kv import KVView, Side
from tokencomp.recipes.common import require

_ENTROPY_ROWS = 128  # rows of the attention matrix formed at a time


@base.register("critic", paper="2504.01281", stage="kv")
@dataclass(frozen=True)
class CRITIC(Accumulating):
    """Three importances scaled to [0, 1] and added: one set a layer, from all heads together.

    ``attention`` is what a token received (the paper's own term, a sum over a softmax row, is constant);
    ``entropy`` that of the token's row when it was the query, kept with its slot; ``gradient`` that of the
    squared change of the layer's attention output between the last two queries, in closed form. The paper
    gives neither weights nor protected tokens: both are ours. Prompt rows' entropies form 128 rows of the
    attention matrix at a time.
    """

    recent: int | float = field(default=8, metadata={"help": eviction.RECENT_HELP})
    weights: tuple[float, float, float] = field(
        default=(0.5, 0.25, 0.25), metadata={"help": "of attention, entropy and gradient; they add up to 1"}
    )

    def __post_init__(self) -> None:
        good = min(self.weights) >= 0 and abs(sum(self.weights) - 1) < 1e-6
        require(good, "CRITIC", "weights", ">= 0 and adding up to 1", self.weights)
        super().__post_init__()

    @property
    def sides(self) -> Mapping[str, Side]:
        """Attention received, and the entropy of each token as a query."""
        return {"score": Side(torch.float32, 0), "entropy": Side(torch.float32, 0)}

    def record_prompt(self, view: KVView) -> None:
        """Attention and entropies of the prompt, and its last two queries."""
        super().record_prompt(view)
        rows = kv_attention.rows_of(view)
        for begin in range(0, rows.q.shape[2], _ENTROPY_ROWS):
            part = slice(begin, begin + _ENTROPY_ROWS)
            entropy = _row_entropy(view, rows.q[:, :, part], rows.slot[:, part])
            _store_entropy_(view, entropy, rows.slot[:, part])
        kv_attention.remember_queries(view, 2)

    def record_step(self, view: KVView) -> None:
        """The same of a decode step."""
        super().record_step(view)
        logits, lse = kv_attention.step_logits(view)
        entropy = [recipes.attention_entropy(logits[:, :, t], lse[:, :, t]) for t in range(logits.shape[2])]
        _store_entropy_(view, torch.stack(entropy, -1), kv_attention.rows_of(view).slot)
        kv_attention.remember_queries(view, 2)

    def score(self, view: KVView) -> Tensor:
        """``[B, 1, S]``: ``recipes.critic_score``."""
        parts = [view.state[name][:, :, : view.size] for name in ("score", "entropy")]
        received, entropy, gradient = (view.over_heads(x)[:, 0] for x in (*parts, _gradient(view)))
        score = recipes.critic_score(
            received, entropy, gradient, weights=self.weights, lengths=view.lengths[:, 0]
        )
        return score[:, None]


def _row_entropy(view: KVView, q: Tensor, slot: Tensor) -> Tensor:
    """``[R, G, T]`` entropies in nats of the rows ``q`` at ``slot`` ``[R, T]``; 0 at padding."""
    logits = q.float() @ kv_attention.row_keys(view).float().mT * view.scale
    if view.softcap is not None:
        logits = view.softcap * torch.tanh(logits / view.softcap)
    key = torch.arange(view.size, device=q.device)
    logits = logits.masked_fill(key > slot[:, None, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    mass = torch.where(logits.isfinite(), (logits - lse[..., None]).exp() * logits, 0.0).sum(-1)
    return torch.where(lse.isfinite(), lse - mass, 0.0)


def _store_entropy_(view: KVView, entropy: Tensor, slot: Tensor) -> None:
    """Keeps entropies ``[R, G, T]``, averaged over all heads, at their slots ``[R, T]``; -1 is none."""
    heads = view.lengths.shape[1]
    mean = kv_attention.by_head(view, entropy).mean((1, 2))[:, None].expand(-1, heads, -1)
    state, place = view.state["entropy"], kv_attention.by_head(view, slot)
    padded = torch.nn.functional.pad(state, (0, 1))  # one slot too many takes padding
    padded.scatter_(2, torch.where(place < 0, state.shape[2], place).long(), mean)
    state.copy_(padded[..., :-1])


def _gradient(view: KVView) -> Tensor:
    """``[B, Hkv, size]``: L1 norms by key and value of the output's change, summed over query heads."""
    q = kv_attention.grouped(view, kv_attention.recent_queries(view, 2))
    k, lengths = kv_attention.row_keys(view), kv_attention.row_lengths(view)
    v = view.values()[:, :, : view.size].flatten(0, 1)[:, None]
    older, newer = q[:, :, 0].contiguous(), q[:, :, 1].contiguous()
    sides: dict[str, Any] = {"scale": view.scale, "softcap": view.softcap}
    logits, lse = ops.qk_scores(older, k, lengths=(lengths - 1).clamp(min=0), **sides)
    before = torch.where(lse.isfinite()[..., None], (logits - lse[..., None]).exp(), 0.0)
    previous = before @ v[:, 0].float()
    logits, lse = ops.qk_scores(newer, k, lengths=lengths, **sides)
    by_key, by_value = recipes.output_gradients(newer, v, logits, lse, previous, scale=view.scale)
    return kv_attention.by_head(view, by_key + by_value).sum(2)
