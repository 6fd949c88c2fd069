"""What blocks of queries and keys have to do with each other, estimated without the attention matrix."""

import torch
from torch import Tensor


def _block_count(tokens: int, block: int) -> int:
    return -(-tokens // block)


def block_pool(
    x: Tensor,
    block: int,
    mode: str = "mean",
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Blocks of neighbouring tokens to one vector each, in float32.

    Args:
        x: ``[B, H, N, D]`` queries or keys.
        block: tokens of a block; the last may be shorter and is pooled over what it has.
        mode: ``mean``, ``min`` or ``max`` of each channel.
        lengths: ``[B]`` end of the tokens of each sequence; others may hold anything. Default N.
        starts: ``[B]`` first token of each sequence. Default 0.

    Returns:
        ``[B, H, ceil(N / block), D]`` float32; with lengths 0, inf or -inf in blocks without a token.

    Raises:
        ValueError: another mode, block < 1, or x not of four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"block_pool: x must have shape [B, H, N, D], got {list(x.shape)}")
    if block < 1:
        raise ValueError(f"block_pool: block must be >= 1, got {block}")
    if mode not in ("mean", "min", "max"):
        raise ValueError(f"block_pool: mode must be one of 'mean', 'min', 'max', got {mode!r}")
    tokens, blocks = x.shape[2], _block_count(x.shape[2], block)
    fill = {"mean": 0.0, "min": torch.inf, "max": -torch.inf}[mode]
    exists = _existing(tokens, starts, lengths, x.device)
    x = torch.where(exists[:, None, :, None], x.float(), fill)
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * block - tokens), value=fill)
    grouped: Tensor = padded.unflatten(2, (blocks, block))
    if mode == "min":
        return grouped.amin(3)
    if mode == "max":
        return grouped.amax(3)
    size: Tensor = torch.nn.functional.pad(exists, (0, -tokens % block)).unflatten(1, (blocks, block)).sum(2)
    mean: Tensor = grouped.sum(3) / size.clamp(min=1)[:, None, :, None]
    return mean


def _existing(tokens: int, starts: Tensor | None, lengths: Tensor | None, device: torch.device) -> Tensor:
    """``[B or 1, tokens]`` bool: starts <= token < lengths."""
    token = torch.arange(tokens, device=device)[None]
    exists: Tensor = token >= 0 if lengths is None else token < lengths[:, None]
    if starts is not None:
        exists = exists & (token >= starts[:, None])
    return exists


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 16,
    block: int = 128,
    causal: bool = True,
    scale: float | None = None,
    first: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention mass of blocks, estimated from strided antidiagonals (XAttention, arXiv 2503.16428).

    Groups of ``stride`` rows and keys: the sum of the products of row i and key ``stride - 1 - i`` of two
    groups, over i, is one product of concatenated vectors. Its softmax over the groups that a group of rows
    sees, with ``scale / stride``, is summed over the groups of a block of rows and of keys. The cost is that
    of the products divided by ``stride``.

    Args:
        q: queries ``[B, Hq, T, D]``, the last T of the S positions under ``causal``.
        k: keys ``[B, Hkv, S, D]``; query head h uses kv head ``h // (Hq / Hkv)``.
        stride: rows and keys of a group; divides ``block``.
        block: rows and keys of a block.
        causal: a group of rows sees the groups of keys up to its own.
        scale: factor of the products; default ``D ** -0.5``.
        first: ``[B]`` position of row 0; default ``S - T``.
        lengths: ``[B]`` end of the keys of each sequence; what lies behind it, keys or rows, is padding.
        starts: ``[B]`` first key of each sequence; so is what lies before it.

    Returns:
        ``[B, Hq, ceil(T / block), ceil(S / block)]`` float32; a row of it sums to at most
        ``block / stride``. Missing rows and keys at the ends count as zeros that nobody weighs.

    Raises:
        ValueError: stride does not divide block, or T > S under ``causal``.
    """
    rows, keys, dim = q.shape[2], k.shape[2], q.shape[3]
    if stride < 1 or block % stride:
        raise ValueError(f"antidiagonal_scores: stride must divide block={block}, got {stride}")
    if causal and rows > keys:
        raise ValueError(f"antidiagonal_scores: T must be at most S={keys} under causal, got {rows}")
    factor = (dim**-0.5 if scale is None else scale) / stride
    device = q.device
    base = torch.full((1,), keys - rows, device=device) if first is None else first
    exists = _existing(keys, starts, lengths, device)
    here = torch.ones(1, rows, dtype=torch.bool, device=device)
    if causal and (lengths is not None or starts is not None):
        position = base[:, None] + torch.arange(rows, device=device)
        here = (position < (keys if lengths is None else lengths[:, None])) & (
            position >= (0 if starts is None else starts[:, None])
        )
    q = torch.where(here[:, None, :, None], q, 0)
    k = torch.where(exists[:, None, :, None], k, 0)
    wide_q = _groups(q, stride, block).flip(3).flatten(3)
    wide_k = _groups(k, stride, block).flatten(3).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    m, n, per = wide_q.shape[2], wide_k.shape[2], block // stride
    some_key = _groups(exists[:, None, :, None], stride, block).any(3)[:, :, None, :, 0]
    some_row = _groups(here[:, None, :, None], stride, block).any(3)[:, 0, :, 0]
    key = torch.arange(n, device=device) * stride
    base = base[:, None, None, None]
    found = []
    for begin in range(0, m, 16 * per):  # a few blocks of rows at a time: the matrix is never whole
        some = wide_q[:, :, begin : begin + 16 * per]
        z = (some @ wide_k.mT).float() * factor
        row = torch.arange(begin, begin + some.shape[2], device=device)[:, None] * stride
        seen = some_key
        if causal:  # up to the group of the last row of the group
            seen = seen & (key <= (row + stride - 1).clamp(max=max(rows - 1, 0)) + base)
        weight = torch.softmax(z.masked_fill(~seen, -torch.inf), -1)
        there = some_row[:, None, begin : begin + some.shape[2], None]
        weight = torch.where(there & seen, weight, 0.0)
        found.append(weight.unflatten(2, (-1, per)).unflatten(4, (-1, per)).sum((3, 5)))
    if not found or not n:
        return q.new_zeros((*q.shape[:2], m // per, n // per), dtype=torch.float32)
    return torch.cat(found, 2)


def _groups(x: Tensor, stride: int, block: int) -> Tensor:
    """``[B, H, groups, stride, D]``, padded with zeros to whole blocks."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
    groups: Tensor = padded.unflatten(2, (-1, stride))
    return groups
