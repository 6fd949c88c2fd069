"""Attention matrices for the tests of the recipes: given ones as queries and keys, dense ones in float64."""

import torch
from torch import Tensor


def sides_of(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """``q`` and ``k`` ``[1, 1, T, T]`` whose causal attention at ``scale=1`` is the triangle ``rows``."""
    tokens = len(rows)
    q = torch.zeros(1, 1, tokens, tokens)
    for t, row in enumerate(rows):
        q[0, 0, t, : len(row)] = torch.tensor(row).log()
    return q, torch.eye(tokens)[None, None]


def random_sides(
    batch: int, heads: int, kv_heads: int, rows: int, keys: int, dim: int = 12, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random ``q`` ``[B, Hq, T, D]`` and ``k`` ``[B, Hkv, S, D]`` with peaks worth telling apart."""
    g = torch.Generator().manual_seed(seed)
    q = 1.5 * torch.randn(batch, heads, rows, dim, generator=g)
    return q, torch.randn(batch, kv_heads, keys, dim, generator=g)


def dense_logits(q: Tensor, k: Tensor) -> Tensor:
    """``[B, Hq, T, S]`` float64 scaled logits, without a mask."""
    group = q.shape[1] // k.shape[1]
    return q.double() @ k.double().repeat_interleave(group, 1).transpose(2, 3) / q.shape[-1] ** 0.5


def dense_attention(q: Tensor, k: Tensor) -> Tensor:
    """``[B, Hq, T, S]`` float64, causal, the rows the last T."""
    rows, keys = q.shape[2], k.shape[2]
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    return dense_logits(q, k).masked_fill(~seen, -torch.inf).softmax(-1)


def grouped(score: Tensor, kv_heads: int) -> Tensor:
    """``[B, Hkv, G, ...]`` of ``[B, Hq, ...]``."""
    return score.unflatten(1, (kv_heads, -1))


def kept(index: Tensor) -> list[int]:
    """The indices of one row, without holes."""
    return [int(i) for i in index.flatten() if i >= 0]


def close(got: Tensor, want: Tensor | list[float], tolerance: float = 2e-6) -> None:
    """Hold float32 results to float64 ones, or to printed digits; infinities must agree."""
    assert got.dtype == torch.float32
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double().view(want.shape), want, rtol=tolerance, atol=tolerance)
