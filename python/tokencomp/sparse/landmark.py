"""Landmark attention: a landmark token at the end of each block gates the block (arXiv 2305.16300)."""

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.recipes.common import require, require_dims
from tokencomp.sparse.selected import merge


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    top: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention with the grouped softmax of a model trained with landmarks.

    The last token of each block of ``block`` is its landmark. For a row, the tokens of its own block and the
    landmarks of all blocks before it share one softmax ``g``; the tokens of an earlier block b share one of
    their own, ``w``, and count ``g_b w_j``. Landmarks have no value, and that of the own block is not seen.
    So ``out = sum_own g_j v_j + sum_b g_b O_b`` with ``O_b`` ordinary attention within b: a merge of partial
    results of which that of b has the logit of its landmark as its log-sum-exp. Exact, by one pass of
    attention over each block; the matrix is never formed.

    Args:
        q: ``[B, Hq, T, D]``, the last T of the S positions; T = 1 is a decode step.
        k, v: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``, rotated as the model wants it.
        block: tokens of a block, its landmark included, >= 2. The last block may be incomplete.
        top: blocks before its own that a row sees, those of largest landmark logit (ties: the lower block);
            default all. For decoding from retrieved blocks alone, give a cache of these.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, T, Dv]`` of the dtype of q. The row of a block of which it is the first token sees its own
        token, a landmark sees its block's others.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "landmark_attention"
    for name, t in (("q", q), ("k", k), ("v", v)):
        require_dims(op, name, t, "[B, H, N, D]")
    require(block >= 2, op, "block", ">= 2", block)
    require(top is None or top >= 0, op, "top", "None or >= 0", top)
    rows, keys = q.shape[2], k.shape[2]
    require(rows <= keys, op, "T", f"at most S={keys}", rows)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    gate = _gates(q, k, block, top, factor)
    first = keys - rows
    done = []
    for begin in range(first - first % block, keys, block):  # the rows of one block at a time
        own = slice(max(begin, first) - first, min(begin + block, keys) - first)
        done.append(_rows_of_block(q[:, :, own], k, v, gate[:, :, own], begin, block, factor))
    return torch.cat(done, 2) if done else q.new_zeros(*q.shape[:3], v.shape[3])


def _gates(q: Tensor, k: Tensor, block: int, top: int | None, scale: float) -> Tensor:
    """``[B, Hq, T, blocks]`` float32 logits of the landmarks that a row sees, -inf elsewhere."""
    rows, keys = q.shape[2], k.shape[2]
    marks = k[:, :, block - 1 :: block]
    z: Tensor = q.float().unflatten(1, (k.shape[1], -1)) @ marks[:, :, None].float().mT * scale
    own = torch.arange(keys - rows, keys, device=q.device)[:, None] // block
    z = z.flatten(1, 2).masked_fill(torch.arange(marks.shape[2], device=q.device) >= own, -torch.inf)
    if top is None or top >= marks.shape[2]:
        return z
    index, _ = ops.topk_select(z.flatten(0, 2), top)
    taken = torch.zeros(*z.shape[:3], z.shape[3] + 1, dtype=torch.bool, device=q.device)
    place = torch.where(index < 0, z.shape[3], index).view(*z.shape[:3], top)
    taken.scatter_(3, place.long(), True)
    return z.masked_fill(~taken[..., :-1], -torch.inf)


def _rows_of_block(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, begin: int, block: int, scale: float
) -> Tensor:
    """Output of the rows that lie in the block from ``begin`` on."""
    end = min(begin + block - 1, k.shape[2])  # its landmark, or the end of an incomplete block
    last = begin + block if k.shape[2] >= begin + block else end
    bias = torch.zeros(1, last - begin, device=q.device)
    bias[:, block - 1 :] = -torch.inf
    own = slice(begin, last)
    # The rows are the last of these only if the block was cut by the end of the keys or reaches it.
    at = torch.arange(last - begin - q.shape[2], last - begin, device=q.device)
    state = ops.flash_prefill(
        q, k[:, :, own], v[:, :, own], scale=scale, key_bias=bias.expand(q.shape[0], -1), q_position=at
    )
    out, lse = state[0].float(), state[1]
    for number in range(begin // block):
        past = slice(number * block, number * block + block - 1)
        inside, _ = ops.flash_prefill(q, k[:, :, past], v[:, :, past], scale=scale, causal=False)
        out, lse = merge((out, lse), (inside.float(), gate[..., number].contiguous()))
    return out.to(q.dtype)
