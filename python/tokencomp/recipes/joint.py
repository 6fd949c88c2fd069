"""Scores that join several signals: EMS (global and local attention), CRITIC (attention, entropy, gradient).

EMS has no public code: what the paper leaves open is stated where it is decided.
"""

import math

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.recipes.common import existing, minmax, require, require_dims


def global_local_score(glob: Tensor, local: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """The larger of global and local attention, the global one scaled to the local mean (EMS, arXiv
    2412.08521).

    ``max(glob * mean(local) / mean(glob), local)``, means over the keys of a head.

    Args:
        glob: ``[B, H, S]`` float, attention from all queries (``accumulated_attention``).
        local: ``[B, H, S]`` float, attention from the last w queries.
        lengths: ``[B]`` keys of each sequence.

    Returns:
        ``[B, H, S]`` float32, 0 at padding; a head without global attention has its local one.

    Raises:
        ValueError: a shape that is not as above.
    """
    op = "global_local_score"
    require_dims(op, "glob", glob, "[B, H, S]")
    require(local.shape == glob.shape, op, "local", f"of shape {list(glob.shape)}", list(local.shape))
    exists = existing(glob, lengths)
    glob, local = (torch.where(exists, t.float(), 0.0) for t in (glob, local))
    total = glob.sum(-1, keepdim=True)
    factor = torch.where(total > 0, local.sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0), 0.0)
    return torch.maximum(glob * factor, local)


def merge_groups(
    score: Tensor, centers: int, merged: int, *, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split keys by rank: the best are centers, the next are merged into them, the rest are dropped (EMS).

    Args:
        score: ``[B, H, S]`` float of the keys outside the protected window.
        centers: >= 0; merged: >= 0 (our default for it is ``centers``; the paper does not say).
        lengths: ``[B]`` keys of each sequence.

    Returns:
        ``centers`` ``[B, H, centers]`` and ``merged`` ``[B, H, merged]`` int32, ascending, then -1.

    Raises:
        ValueError, RuntimeError: a shape or number that is not as above.
    """
    op = "merge_groups"
    require_dims(op, "score", score, "[B, H, S]")
    require(centers >= 0, op, "centers", ">= 0", centers)
    require(merged >= 0, op, "merged", ">= 0", merged)
    batch, heads, keys = score.shape
    rows = None if lengths is None else lengths[:, None].expand(batch, heads).flatten()
    flat = score.flatten(0, 1)
    center, _ = ops.topk_select(flat, centers, lengths=rows)
    both, _ = ops.topk_select(flat, centers + merged, lengths=rows)
    is_center = torch.zeros(batch * heads, keys + 1, dtype=torch.bool, device=score.device)
    is_center.scatter_(1, torch.where(center < 0, keys, center).long(), True)
    # centers are the prefix of the same order, so removing them leaves the next ranks
    hole = (both < 0) | is_center.gather(1, both.clamp(min=0).long())
    rest = torch.where(hole, keys, both).sort(dim=1).values[:, :merged]
    rest = torch.where(rest == keys, -1, rest)
    return center.view(batch, heads, centers), rest.view(batch, heads, -1)


def merge_assign(
    k: Tensor, v: Tensor, centers: Tensor, merged: Tensor, *, tau: float = 0.6, raw: bool = False
) -> Tensor:
    """The center that each key is merged into: the one of largest ``cos(k, k_c) * cos(v, v_c)`` (EMS).

    Below ``tau`` a key goes to the zero class, it is dropped. Cosines are clamped at 0 first, as two opposite
    ones would look alike; ``raw`` leaves them. Forms the ``[B, H, merged, centers]`` similarities.

    Args:
        k, v: ``[B, H, S, D]`` and ``[B, H, S, Dv]``, computed in float32.
        centers, merged: ``[B, H, C]`` and ``[B, H, M]`` int32 keys, -1 for holes: of ``merge_groups``.
        tau: least similarity (ours; the paper's value is not known).

    Returns:
        ``[B, H, M]`` int32 ranks in ``centers``, ties to the lower, -1 for the zero class and for holes.

    Raises:
        ValueError: a shape that is not as above.
    """
    op = "merge_assign"
    require_dims(op, "k", k, "[B, H, S, D]")
    require_dims(op, "v", v, "[B, H, S, D]")
    require(
        v.shape[:3] == k.shape[:3],
        op,
        "v",
        f"of shape [{', '.join(map(str, k.shape[:3]))}, Dv]",
        list(v.shape),
    )
    for name, t in (("centers", centers), ("merged", merged)):
        require(t.shape[:-1] == k.shape[:2], op, name, f"of shape {[*k.shape[:2], '...']}", list(t.shape))
    if centers.shape[2] == 0:
        return torch.full_like(merged, -1)
    similarity = torch.ones(1, device=k.device)
    for x in (k, v):
        unit = torch.nn.functional.normalize(x.float(), dim=-1)
        target, source = (
            unit.gather(2, index.clamp(min=0).long()[..., None].expand(-1, -1, -1, x.shape[-1]))
            for index in (centers, merged)
        )
        cosine = source @ target.transpose(2, 3)
        similarity = similarity * (cosine if raw else cosine.clamp(min=0))
    similarity = torch.where(centers[:, :, None] < 0, -torch.inf, similarity)
    best = similarity.amax(-1, keepdim=True)
    rank = torch.arange(centers.shape[2], dtype=torch.int32, device=k.device)
    first = torch.where(similarity == best, rank, centers.shape[2]).amin(-1).int()
    return torch.where((best[..., 0] >= tau) & (merged >= 0), first, -1)


def merge_into_centers(
    k: Tensor, v: Tensor, score: Tensor, centers: Tensor, merged: Tensor, assign: Tensor, *, keys: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Centers that have taken up the keys assigned to them, in proportion to the scores (EMS).

    Over a center and what it takes up, ``w`` the scores: the value is the mean ``sum w v / sum w``; the key
    has the mean direction ``sum w k / |k| / sum w`` times the mean norm ``sum w |k| / sum w``, so that keys
    of several directions do get shorter, but long ones do not drown short ones; the score is the sum. The
    zero class is merged into nothing.

    Args:
        k, v: ``[B, H, S, D]`` and ``[B, H, S, Dv]``, computed in float32.
        score: ``[B, H, S]`` float, >= 0; a center without any score around it stays as it is.
        centers, merged, assign: of ``merge_groups`` and ``merge_assign``.
        keys: also merge keys, as the paper does. Rotated keys of distant positions blur each other: without,
            centers keep their own.

    Returns:
        keys ``[B, H, C, D]``, values ``[B, H, C, Dv]`` and scores ``[B, H, C]``, float32, 0 in holes.

    Raises:
        ValueError: a shape that is not as above.
    """
    op = "merge_into_centers"
    require_dims(op, "k", k, "[B, H, S, D]")
    for name, t, want in (
        ("v", v, [*k.shape[:3], v.shape[-1]]),
        ("score", score, list(k.shape[:3])),
        ("centers", centers, [*k.shape[:2], centers.shape[-1]]),
        ("merged", merged, [*k.shape[:2], merged.shape[-1]]),
        ("assign", assign, list(merged.shape)),
    ):
        require(list(t.shape) == want, op, name, f"of shape {want}", list(t.shape))
    both = torch.cat([centers, merged], -1)
    rank = torch.arange(centers.shape[2], dtype=torch.int32, device=k.device)
    target = torch.cat([rank.expand(centers.shape), assign], -1)
    weight = torch.where(both < 0, 0.0, score.float().gather(2, both.clamp(min=0).long()))
    share = torch.where(target[:, :, None] == rank[:, None], weight[:, :, None], 0.0)  # [B, H, C, C + M]
    total = share.sum(-1)
    alone = torch.arange(both.shape[2], device=k.device) == rank[:, None]  # where no score says otherwise
    share = torch.where(total[..., None] > 0, share / torch.where(total > 0, total, 1.0)[..., None], alone)

    def taken(x: Tensor) -> Tensor:
        index = both.clamp(min=0).long()[..., None].expand(-1, -1, -1, x.shape[-1])
        return torch.where(both[..., None] < 0, 0.0, x.float().gather(2, index))

    k_taken = taken(k)
    new_keys = k_taken[:, :, : centers.shape[2]]
    if keys:
        norm = k_taken.norm(dim=-1, keepdim=True)
        new_keys = (share @ norm) * (share @ (k_taken / norm.clamp(min=1e-12)))
    return new_keys, share @ taken(v), total


def attention_entropy(logits: Tensor, lse: Tensor) -> Tensor:
    """``[B, Hq]`` float32 entropy in nats of one attention row a head: ``lse - sum_j p_j z_j``.

    Args:
        logits: ``[B, Hq, S]`` float32, -inf where masked, and lse: ``[B, Hq]``: of ``qk_scores``.

    Raises:
        ValueError: a shape that is not as above.
    """
    probability, logits = _probabilities("attention_entropy", logits, lse)
    return torch.where(lse.isfinite(), lse - (probability * logits).sum(-1), 0.0)


def output_gradients(
    q: Tensor,
    v: Tensor,
    logits: Tensor,
    lse: Tensor,
    previous: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """L1 norms of the gradients of ``mean((output - previous) ** 2)`` by each key and value, in closed form.

    With ``g = 2 (o - previous) / Dv``, ``|dL/dV_j| = p_j |g|``, ``|dL/dK_j| = p_j |<g, V_j - o>| |q| scale``
    (CRITIC, arXiv 2504.01281). The loss is a head's own, the norms of a group's heads are to be added, which
    bounds the norm of their sum.

    Args:
        q: ``[B, Hq, D]`` queries of this step.
        v: ``[B, Hkv, S, Dv]``.
        logits, lse: ``[B, Hq, S]`` and ``[B, Hq]``, of ``qk_scores`` with the same scale.
        previous: ``[B, Hq, Dv]``, the attention output of the step before.
        scale: default ``D ** -0.5``.

    Returns:
        of the keys and of the values, each ``[B, Hq, S]`` float32.

    Raises:
        ValueError: a shape that is not as above.
    """
    op = "output_gradients"
    require_dims(op, "q", q, "[B, Hq, D]")
    require_dims(op, "v", v, "[B, Hkv, S, D]")
    batch, heads, dim = q.shape
    groups, keys, width = v.shape[1:]
    shape = [batch, heads, width]
    require(list(previous.shape) == shape, op, "previous", f"of shape {shape}", list(previous.shape))
    require(groups > 0 and heads % groups == 0, op, "Hq", f"a multiple of Hkv={groups}", heads)
    expected = [batch, heads, keys]
    require(list(logits.shape) == expected, op, "logits", f"of shape {expected}", list(logits.shape))
    probability, _ = _probabilities(op, logits, lse)
    value = v.float()

    def grouped(t: Tensor) -> Tensor:
        return t.reshape(batch, groups, heads // groups, t.shape[-1])

    output = (grouped(probability) @ value).view(batch, heads, width)
    slope = 2 * (output - previous.float()) / width
    along = (grouped(slope) @ value.transpose(2, 3)).view(batch, heads, keys)
    along = along - (slope * output).sum(-1, keepdim=True)
    factor = q.float().abs().sum(-1, keepdim=True) * (dim**-0.5 if scale is None else scale)
    return probability * along.abs() * factor, probability * slope.abs().sum(-1, keepdim=True)


def critic_score(
    received: Tensor,
    entropy: Tensor,
    gradient: Tensor,
    *,
    weights: tuple[float, float, float] = (0.5, 0.25, 0.25),
    eps: float = 1e-6,
    lengths: Tensor | None = None,
) -> Tensor:
    """``minmax(w_a minmax(received) + w_e minmax(entropy) + w_g minmax(gradient))`` (CRITIC, arXiv
    2504.01281).

    The paper's own attention term is the sum of a softmax row, a constant; here it is the attention a key
    received.

    Args:
        received, entropy, gradient: ``[B, S]`` float, summed or averaged over heads; the entropy is of the
            row of the token as a query, kept from when it was one.
        weights: not negative, adding up to 1; the paper gives none, these are ours.
        eps: of ``minmax``.
        lengths: ``[B]`` keys of each sequence.

    Returns:
        ``[B, S]`` float32 in [0, 1], 0 at padding.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "critic_score"
    require_dims(op, "received", received, "[B, S]")
    for name, t in (("entropy", entropy), ("gradient", gradient)):
        require(t.shape == received.shape, op, name, f"of shape {list(received.shape)}", list(t.shape))
    good = min(weights) >= 0 and math.isclose(sum(weights), 1, abs_tol=1e-6)
    require(good, op, "weights", ">= 0 and adding up to 1", weights)
    parts = (minmax(t, eps=eps, lengths=lengths) for t in (received, entropy, gradient))
    joint = torch.stack([w * t for w, t in zip(weights, parts, strict=True)]).sum(0)
    return minmax(joint, eps=eps, lengths=lengths)


def critic_budget(tokens: int, ratio: float, least: int) -> int:
    """Keys that CRITIC keeps of ``tokens``: ``min(max(least, floor((1 - ratio) tokens)), tokens - 1)``.

    Nothing happens, and all are kept, while ``tokens <= least`` is the caller's rule. Raises ValueError for
    ``tokens < 1``, ``ratio`` outside [0, 1] or ``least < 0``.
    """
    op = "critic_budget"
    require(tokens >= 1, op, "tokens", ">= 1", tokens)
    require(0 <= ratio <= 1, op, "ratio", "in [0, 1]", ratio)
    require(least >= 0, op, "least", ">= 0", least)
    kept = math.floor((1 - ratio) * tokens + 1e-9)  # 1 - 0.9 is a little less than 0.1
    return min(max(least, kept), tokens - 1)


def _probabilities(op: str, logits: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and logits with 0 where masked; a head whose lse is not finite gives 0."""
    require_dims(op, "logits", logits, "[B, Hq, S]")
    require(lse.shape == logits.shape[:2], op, "lse", f"of shape {list(logits.shape[:2])}", list(lse.shape))
    there = logits.isfinite() & lse.isfinite()[..., None]
    probability = torch.where(there, (logits.float() - lse.float()[..., None]).exp(), 0.0)
    return probability, torch.where(there, logits.float(), 0.0)
