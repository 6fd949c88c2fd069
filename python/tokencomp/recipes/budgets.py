"""How many keys each layer or head keeps: PyramidKV, AdaKV, PrefixKV."""

from typing import Literal

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.recipes.common import existing, require, require_dims


def pyramid_budget(
    capacity: int, window: int, layers: int, tokens: int, *, beta: int = 20
) -> tuple[int, ...]:
    """Keys each layer keeps before its observation window, in an arithmetic progression (PyramidKV, arXiv
    2406.02069).

    With ``c = capacity - window``: from ``2 c - c // beta`` in the first layer, at most ``tokens - window``,
    down to ``c // beta`` or what mirrors the first, in equal whole steps. Prompts shorter than ``2 c`` give
    ``c`` in every layer, shorter than ``capacity`` all they have.

    Args:
        capacity: mean keys a layer, window included, >= window.
        window: keys of the observation window, >= 0, kept besides.
        layers: >= 1; a single layer gets ``c``.
        tokens: prompt length, >= 0.
        beta: steepness, >= 1.

    Returns:
        One int a layer. The mean may miss ``c`` by the rounding of the step.

    Raises:
        ValueError: a number that is not as above.
    """
    op = "pyramid_budget"
    require(window >= 0, op, "window", ">= 0", window)
    require(capacity >= window, op, "capacity", f">= window={window}", capacity)
    require(layers >= 1, op, "layers", ">= 1", layers)
    require(tokens >= 0, op, "tokens", ">= 0", tokens)
    require(beta >= 1, op, "beta", ">= 1", beta)
    base, before = capacity - window, max(0, tokens - window)
    if tokens < capacity:
        return (before,) * layers
    if tokens < 2 * base or layers == 1:
        return (min(base, before),) * layers
    least = base // beta
    most = 2 * base - least
    if most >= before:
        most = before
        least = 2 * base - most
    step = (most - least) // (layers - 1)
    return tuple(most - layer * step for layer in range(layers))


def adakv_budget(
    score: Tensor,
    base: int,
    *,
    alpha: float = 0.2,
    normalize: bool = False,
    form: Literal["exact", "code"] = "exact",
    lengths: Tensor | None = None,
) -> Tensor:
    """Keys that each head keeps before its observation window: one competition across heads, with a floor
    (AdaKV, arXiv 2407.11550).

    ``exact``: each head its best ``int(alpha * base)``, the rest to the best of all heads; the total is
    ``H * base`` wherever there are as many keys. ``code``: heads' shares ``raw`` of the best ``H * base`` of
    all, then ``round(raw * (1 - alpha) + int(alpha * base))``, halves to even, as the official code, whose
    total drifts. Keep with ``topk_select(..., k_per_row=...)``.

    Args:
        score: ``[B, H, S]`` float, the pooled window attention of the keys before the window.
        base: mean keys a head, >= 0.
        alpha: share that is not competed for, in [0, 1].
        normalize: scale each head by the share its best ``base`` keys have of its mass, first.
        lengths: ``[B]`` keys of each sequence that compete, or ``[B, H]`` of each head.

    Returns:
        ``[B, H]`` int32.

    Raises:
        ValueError, RuntimeError: a shape, number or choice that is not as above.
    """
    op = "adakv_budget"
    require_dims(op, "score", score, "[B, H, S]")
    require(base >= 0, op, "base", ">= 0", base)
    require(0 <= alpha <= 1, op, "alpha", "in [0, 1]", alpha)
    require(form in ("exact", "code"), op, "form", "'exact' or 'code'", repr(form))
    batch, heads, keys = score.shape
    if normalize:
        mass = torch.where(existing(score, lengths), score.float(), 0.0)
        best = mass.topk(min(base, keys), dim=-1).values.sum(-1, keepdim=True)
        total = mass.sum(-1, keepdim=True)
        score = torch.where(total > 0, score.float() * best / torch.where(total > 0, total, 1.0), score)
    ends = lengths
    if lengths is not None and lengths.dim() == 1:
        ends = lengths[:, None].expand(batch, heads).contiguous()
    floor = int(alpha * base)
    if form == "exact":
        return ops.topk_budget(score, heads * base, floor=floor, lengths=ends)
    raw = ops.topk_budget(score, heads * base, lengths=ends)
    return (raw.double() * (1 - alpha) + floor).round().int()


def prefix_budget(
    score: Tensor, ratio: float, *, protect: int = 2, tolerance: int = 5, rescale: bool = True
) -> tuple[int, ...]:
    """Keys each layer forgets, so that all layers keep the same share of their attention (PrefixKV, arXiv
    2412.03409).

    A layer keeps its best keys until they hold a share ``p`` of its mass: ``forget = max(0, N - kept(p) -
    protect)``. p is found by bisection so that the layers together forget ``ratio * n * N`` keys; what is
    left of the difference is taken out by scaling, rounding down. Offline calibration, on the host: divide by
    N and average over samples; at run time drop ``round(share * T)`` keys, e.g. by ``topk_select(score, T -
    forget, head=start, tail=1)``.

    Args:
        score: ``[n, N]``, not negative, of each layer: ``accumulated_attention(heads="mean")``.
        ratio: share of all keys to forget, in [0, 1].
        protect: keys that are never forgotten, the official ``start_size + 1``, >= 0.
        tolerance: the bisection stops within this many keys of its target, >= 1.
        rescale: scale to the target.

    Returns:
        One int a layer.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "prefix_budget"
    require_dims(op, "score", score, "[n, N]")
    require(0 <= ratio <= 1, op, "ratio", "in [0, 1]", ratio)
    require(protect >= 0, op, "protect", ">= 0", protect)
    require(tolerance >= 1, op, "tolerance", ">= 1", tolerance)
    layers, keys = score.shape
    if keys == 0:
        return (0,) * layers
    mass = score.detach().double().cpu()
    require(bool((mass >= 0).all()), op, "score", ">= 0 and not NaN", "another value")
    mass = mass.sort(dim=1, descending=True).values.cumsum(1)
    share = (mass / mass[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)).contiguous()
    target = ratio * (layers * keys)
    forget, low, high = [0] * layers, 0.0, 1.0
    for _ in range(53):  # then p no longer changes
        p = (low + high) / 2
        forget = _forget(share, p, protect)
        difference = sum(forget) - target
        if abs(difference) < tolerance:
            break
        low, high = (low, p) if difference < 0 else (p, high)
    total = sum(forget)
    if rescale and total > 0:
        forget = [min(int(f * target / total), max(0, keys - protect)) for f in forget]
    return tuple(forget)


def _forget(share: Tensor, p: float, protect: int) -> list[int]:
    """Keys that each layer forgets when it keeps a share p of its mass."""
    threshold = torch.full((share.shape[0], 1), p, dtype=share.dtype)
    kept = torch.searchsorted(share, threshold)[:, 0] + 1
    return [int(f) for f in (share.shape[1] - kept - protect).clamp(min=0)]
