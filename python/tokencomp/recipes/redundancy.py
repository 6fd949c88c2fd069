"""R-KV (arXiv 2505.24133): keys that matter to the last queries and repeat no other key."""

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.recipes.common import existing, pool_scores, require, require_dims


def past_importance(
    q: Tensor,
    k: Tensor,
    *,
    kernel: int = 7,
    scale: float | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention of the last ``w`` queries to the keys before them, which alone share the softmax.

    Logits are reduced over a group by their maximum before the softmax, so that a key one head needs is not
    averaged away; then the mean over the window and max pooling.

    Args:
        q: ``[B, Hq, w, D]``, the last queries of each sequence, in any order.
        k: ``[B, Hkv, S, D]``, S >= w; the window's own keys are the last w.
        kernel: pooling width, >= 1.
        scale: default ``D ** -0.5``.
        softcap: of the logits, as in ``column_score``.
        lengths: ``[B]`` keys of each sequence, window included.

    Returns:
        ``[B, Hkv, S]`` float32, -inf inside the window and at padding.

    Raises:
        ValueError: a shape or number that is not as above; RuntimeError as in ``qk_scores``.
    """
    op = "past_importance"
    require_dims(op, "q", q, "[B, Hq, w, D]")
    require_dims(op, "k", k, "[B, Hkv, S, D]")
    batch, heads, window, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    require(1 <= window <= keys, op, "w", f"in [1, S={keys}]", window)
    require(groups > 0 and heads % groups == 0, op, "Hq", f"a multiple of Hkv={groups}", heads)
    end = torch.full((batch,), keys, device=q.device) if lengths is None else lengths
    past = (end - window).clamp(min=0)
    # the window's queries as more heads of the group: every key is read once for all of them
    rows = q.view(batch, groups, heads // groups, window, dim).transpose(2, 3).reshape(batch, -1, dim)
    logits, _ = ops.qk_scores(rows, k, scale=scale, softcap=softcap, lengths=past)
    logits = ops.head_vote(logits, mode="max", groups=groups * window)
    weight = torch.where(logits == -torch.inf, 0.0, logits.softmax(-1))  # a row without past keys is NaN
    score = weight.view(batch, groups, window, keys).mean(2)
    return pool_scores(score, kernel, kind="max", lengths=past)


def key_redundancy(
    k: Tensor,
    *,
    threshold: float = 0.5,
    eps: float = 1e-8,
    lengths: Tensor | None = None,
    tile: int = 1024,
) -> Tensor:
    """How much each key repeats the others: softmax over the keys of their mean cosine to all rows.

    Of each row i the diagonal and its last hit, the largest j with ``cos(i, j) > threshold`` (0 if there is
    none), count as 0: the newest of a set of similar keys is not held against. The matrix is never formed:
    the mean over rows of column j is ``(<u_j, sum_i u_i> - |u_j|^2 - sum over last(i) = j of cos(i, j)) / n``
    with unit keys u, and the last hits are found ``tile`` columns at a time in O(S tile) memory.

    Args:
        k: ``[B, Hkv, S, D]`` float; computed in float32.
        threshold: in [0, 1).
        eps: added to each norm.
        lengths: ``[B]`` keys of each sequence.
        tile: columns at a time, >= 1; no effect on the result but rounding.

    Returns:
        ``[B, Hkv, S]`` float32, 0 at padding; sums to 1 where there are keys.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "key_redundancy"
    require_dims(op, "k", k, "[B, Hkv, S, D]")
    require(0 <= threshold < 1, op, "threshold", "in [0, 1)", threshold)
    require(tile >= 1, op, "tile", ">= 1", tile)
    exists = existing(k[..., 0], lengths).expand(k.shape[:3])
    unit = torch.where(exists[..., None], k.float(), 0.0)
    unit = unit / (unit.norm(dim=-1, keepdim=True) + eps)
    total = (unit * unit.sum(2, keepdim=True)).sum(-1) - unit.square().sum(-1)
    hits = _last_hits(unit, threshold, tile)
    count = exists.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(exists, (total - hits) / count, -torch.inf)
    return torch.where(exists, mean.softmax(-1), 0.0)


def rkv_score(
    q: Tensor,
    k: Tensor,
    *,
    trade_off: float = 0.1,
    kernel: int = 7,
    threshold: float = 0.5,
    scale: float | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Joint score of R-KV: ``trade_off * past_importance - (1 - trade_off) * key_redundancy``.

    Keep with ``select_per_head(out, budget, tail=w)``.

    Args:
        q, k, kernel, threshold, scale, softcap, lengths: as in the two parts.
        trade_off: lambda in [0, 1]; the paper has 0.1, its code 0.07.

    Returns:
        ``[B, Hkv, S]`` float32, -inf inside the window and at padding.

    Raises:
        ValueError: a shape or number that is not as above; RuntimeError as in ``qk_scores``.
    """
    require(0 <= trade_off <= 1, "rkv_score", "trade_off", "in [0, 1]", trade_off)
    importance = past_importance(q, k, kernel=kernel, scale=scale, softcap=softcap, lengths=lengths)
    redundancy = key_redundancy(k, threshold=threshold, lengths=lengths)
    joint = trade_off * importance - (1 - trade_off) * redundancy
    return torch.where(importance == -torch.inf, -torch.inf, joint)  # not 0 * -inf


def _last_hits(unit: Tensor, threshold: float, tile: int) -> Tensor:
    """``[B, H, S]``: for each column the sum of the cosines of the rows whose last hit it is.

    From the last columns to the first: where a row's hit is found first, it is the last one.
    """
    keys = unit.shape[2]
    row = torch.arange(keys, device=unit.device)[:, None]
    searching = torch.ones(unit.shape[:3], dtype=torch.bool, device=unit.device)
    sums = [unit.new_zeros(*unit.shape[:2], 0)]
    for begin in range((keys - 1) // tile * tile, -1, -tile):
        column = torch.arange(begin, min(begin + tile, keys), device=unit.device)
        block = unit @ unit[:, :, begin : begin + tile].transpose(2, 3)
        block = torch.where(row == column, 0.0, block)
        hit = torch.where(block > threshold, column, -1).amax(-1)
        if begin == 0:
            hit = hit.clamp(min=0)  # rows without any hit give up column 0
        taken = (column == hit[..., None]) & searching[..., None]
        sums.insert(0, torch.where(taken, block, 0.0).sum(2))
        searching &= hit < 0
    return torch.cat(sums, -1)
