"""The attention of a layer as methods score it: column sums, diagonal, entropy, PageRank.

The one place where methods meet the score operators. The attention matrix is not formed, but where a
function says so.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokencomp import ops, ragged, scores
from tokencomp.methods import matching
from tokencomp.methods.layers import LayerView

_ENTROPY_ROWS = 128  # rows of the attention matrix formed at a time


@dataclass(frozen=True)
class Attention:
    """``A = softmax_j(scale * q_i . k_j + key_bias_j)`` of every head, ``[B, H, N, N]``, rows are queries."""

    q: Tensor  # [B, H, N, D]
    k: Tensor  # [B, H, N, D]
    scale: float
    key_bias: Tensor | None  # [B, N] float32
    mask: Tensor | None  # [B, N] bool, False at padding: no key and no voter
    lse: Tensor  # [B, H, N] float32, log of the sum of exponentials of each row

    def columns(self, row_weight: Tensor | None = None) -> Tensor:
        """``[B, H, N]`` float32: ``sum_i w_i A_ij``, what each token j receives.

        ``row_weight``: ``[B, H, N]``, the voice of each token i; None: 1 each. Padding has none.
        """
        weight = self._heard(row_weight)
        return ops.column_score(
            self.q,
            self.k,
            self.lse,
            scale=self.scale,
            row_weight=weight,
            key_bias=self.key_bias,
            causal=False,
        )

    def row(self, token: int) -> Tensor:
        """``[B, H, N]`` float32: the attention that ``token`` pays, e.g. CLS with 0."""
        bias = 0 if self.key_bias is None else self.key_bias[:, None]
        logits = (self.q[:, :, token, None].float() * self.k.float()).sum(-1) * self.scale + bias
        return _probability(logits, self.lse[:, :, token, None])

    def diagonal(self) -> Tensor:
        """``[B, H, N]`` float32: ``A_ii``, the attention each token pays to itself."""
        bias = 0 if self.key_bias is None else self.key_bias[:, None]
        logits = (self.q.float() * self.k.float()).sum(-1) * self.scale + bias
        return _probability(logits, self.lse)

    def negative_entropy(self) -> Tensor:
        """``[B, N]`` float32: ``sum_j a_ij log a_ij`` of the head mean a, each row i; 0 is the sharpest.

        Forms 128 rows of the matrix at a time.
        """
        out = self.lse.new_zeros(self.q.shape[0], self.q.shape[2])
        for start in range(0, out.shape[1], _ENTROPY_ROWS):
            rows = slice(start, start + _ENTROPY_ROWS)
            a = self.probabilities(rows).mean(1)
            out[:, rows] = torch.special.xlogy(a, a).sum(-1)
        return out

    def probabilities(self, rows: slice = slice(None)) -> Tensor:
        """``[B, H, rows, N]`` float32: the matrix itself, of all or some rows."""
        logits = self.q[:, :, rows].float() @ self.k.float().mT * self.scale
        if self.key_bias is not None:
            logits = logits + self.key_bias[:, None, None]
        return _probability(logits, self.lse[:, :, rows, None])

    def pagerank(self, start: Tensor, iterations: int, damping: float = 0.0) -> Tensor:
        """``[B, H, N]`` float32 after ``iterations`` of ``s <- (1 - d) A^T s + d / n``, from ``s = start``.

        Token i votes for the tokens it attends to, with its own importance. The sum of s is kept.

        Args:
            start: ``[B, H, N]`` or ``[B, 1, N]``, sums to 1 over the tokens and is 0 at padding.
            iterations: number of votes, >= 0.
            damping: d, the share of the mass spread evenly over the n tokens that are not padding.
        """
        shape = self.lse.shape
        even = torch.ones_like(self.lse) if self.mask is None else self.mask[:, None].expand(shape).float()
        even = even / even.sum(-1, keepdim=True).clamp(min=1)
        return scores.power_steps(self.columns, start.float().expand(shape), even, iterations, damping)

    def subset(self, index: Tensor) -> "Attention":
        """The attention the tokens ``index`` ``[B, M]`` would pay among themselves: rows sum to 1 again."""
        bias = None if self.key_bias is None else ragged.gather_rows(self.key_bias, index)
        mask = None if self.mask is None else ragged.gather_rows(self.mask, index)
        q, k = (ragged.gather_rows(t.transpose(1, 2), index).transpose(1, 2) for t in (self.q, self.k))
        return replace(self, q=q, k=k, key_bias=bias, mask=mask, lse=_lse(q, k, self.scale, bias))

    def _heard(self, row_weight: Tensor | None) -> Tensor | None:
        if self.mask is None:
            return row_weight
        voice = self.mask[:, None].expand(self.lse.shape)
        return voice.float() if row_weight is None else row_weight.masked_fill(~voice, 0)


def of(view: LayerView, *, proportional: bool = False) -> Attention:
    """The attention of a layer. ``proportional``: log size was added to its logits."""
    bias = view.key_bias() if proportional else None
    if view.mask is not None:
        bias = torch.zeros_like(view.mask, dtype=torch.float32) if bias is None else bias
        bias = bias.masked_fill(~view.mask, float("-inf"))
    q, k = matching.dense(view.q), matching.dense(view.k)
    return Attention(q, k, view.scale, bias, view.mask, _lse(q, k, view.scale, bias))


def _lse(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return ops.attention_lse(q, k, scale=scale, key_bias=bias, causal=False)


def _probability(logits: Tensor, lse: Tensor) -> Tensor:
    """Rows without any key have lse -inf and pay nothing; a logit that is NaN counts as -inf."""
    return torch.where(lse.isneginf() | logits.isnan(), 0, (logits - lse).exp())
