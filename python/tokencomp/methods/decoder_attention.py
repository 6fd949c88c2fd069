"""The attention of a prompt in one decoder layer, as methods between layers score it.

Queries and keys are those the layer attends with. The attention matrix of all heads and rows is never formed.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.ops.score import Heads


@dataclass(frozen=True)
class PromptAttention:
    """Queries of W rows, keys of those and of what lies before them in the cache."""

    q: Tensor  # [B, Hq, W, D], rotated
    k: Tensor  # [B, Hkv, S, D], S >= W; the last W are the rows'
    scale: float  # logits are ``scale * <q, k>``
    softcap: float | None = None  # of the logits
    bias: Tensor | None = None  # [B, Hkv, S] float32: -inf where there is no token

    @property
    def before(self) -> int:
        """Keys before those of the rows."""
        return self.k.shape[2] - self.q.shape[2]

    def received(
        self,
        rows: Tensor,
        *,
        heads: Heads = "mean",
        reduce: Literal["sum", "max"] = "sum",
    ) -> Tensor:
        """``[B, H*, W]`` float32: attention that each row's key receives from the queries of ``rows`` ``[B,
        W]`` bool, summed over these (or the largest), then over heads as ``heads`` says.
        """
        q, sides = self._queries(rows)
        lse = ops.attention_lse(q, self.k, **sides)
        found = ops.column_score(q, self.k, lse, heads=heads, rows=reduce, **sides)
        return found[:, :, self.before :]

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The attention of ``rows`` ``[B, W]`` bool to the keys of all rows, a mean over heads: ``[B, R, W]``
        float32, and ``[B, R]`` bool, which of the R there are. Head by head: for few rows.
        """
        q, sides = self._queries(rows)
        lse = ops.attention_lse(q, self.k, **sides)
        position, group = sides["q_position"], q.shape[1] // self.k.shape[1]
        key = torch.arange(self.k.shape[2], device=q.device)
        seen = key <= position[..., None]
        total = torch.zeros(*seen.shape, device=q.device)
        for head in range(q.shape[1]):
            logits = self.scale * (q[:, head].float() @ self.k[:, head // group].float().mT)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            if self.bias is not None:
                logits = logits + self.bias[:, head // group, None]
            p = (logits - lse[:, head, :, None]).exp()
            total += torch.where(seen, p, 0.0)
        return (total / q.shape[1])[:, :, self.before :], position >= 0

    def products(self, rows: Tensor) -> Tensor:
        """``[B, Hq, R, W]`` float32: logits of the queries of ``rows`` ``[B, W]`` bool and the keys of all
        rows, whether these see them or not. For few rows.
        """
        q, _ = self._queries(rows)
        k = self.k[:, :, self.before :].float()
        shared = q.float().unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G R, D]
        logits = (self.scale * (shared @ k.mT)).view(*q.shape[:3], -1)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def stationary(self, alive: Tensor, *, temperature: float, iterations: int, damping: float = 0) -> Tensor:
        """``[B, W]`` float32: importance by power iteration on the attention among ``alive`` rows.

        With ``M = softmax(z / temperature)`` among the alive and ``p = 1 / n``, ``p <- (1 - damping) p M +
        damping / n`` so many times in each head; then the root of the mean square over heads.
        """
        n = alive.sum(1).clamp(min=1).view(-1, 1, 1)
        there = torch.where(alive, 0.0, -torch.inf)[:, None].expand(-1, self.k.shape[1], -1)
        row = torch.arange(alive.shape[1], dtype=torch.int32, device=alive.device)
        k = self.k[:, :, self.before :]
        sides: dict[str, Any] = {
            "scale": self.scale / temperature,
            "softcap": None if self.softcap is None else self.softcap / temperature,
            "key_bias": there.contiguous(),
            "q_position": torch.where(alive, row, -1),
        }
        lse = ops.attention_lse(self.q, k, **sides)
        p = (alive[:, None] / n).expand(-1, self.q.shape[1], -1).float()
        for _ in range(iterations):
            p = ops.column_score(self.q, k, lse, row_weight=p.contiguous(), **sides)
            p = ((1 - damping) * p + damping / n) * alive[:, None]
        return p.square().mean(1).sqrt()

    def _queries(self, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The queries of ``rows``, ``[B, Hq, R, D]``, and where they are."""
        index, there, _ = ragged.compact_rows(rows, max(1, int(rows.sum(1).max())))
        place = index.clamp(min=0).long()[:, None, :, None]
        q = self.q.gather(2, place.expand(-1, self.q.shape[1], -1, self.q.shape[3]))
        position = torch.where(there, index + self.before, -1).to(torch.int32)
        return q, {
            "scale": self.scale, "softcap": self.softcap, "key_bias": self.bias, "q_position": position,
        }  # fmt: skip


def prompt_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    real: Tensor | None = None,
    past: Tensor | None = None,
    past_lengths: Tensor | None = None,
) -> PromptAttention:
    """``PromptAttention`` of ``q`` ``[B, Hq, W, D]`` and ``k`` ``[B, Hkv, W, D]``.

    Args:
        q, k: of one forward.
        scale, softcap: of the logits.
        real: ``[B, W]`` bool, False is padding.
        past: ``[B, Hkv, P, D]`` keys before them.
        past_lengths: ``[B, Hkv]``, how many of the P there are.
    """
    padded = real is not None and not bool(real.all())
    if past is None and not padded:
        return PromptAttention(q, k, scale, softcap)
    there = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if real is None else real
    there = there[:, None].expand(-1, k.shape[1], -1)
    if past is not None and past_lengths is not None:
        held = torch.arange(past.shape[2], device=q.device) < past_lengths[..., None]
        there, k = torch.cat([held, there], 2), torch.cat([past.to(k.dtype), k], 2)
    return PromptAttention(q, k, scale, softcap, torch.where(there, 0.0, -torch.inf).contiguous())
