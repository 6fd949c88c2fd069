"""KVCrush (arXiv 2503.00022): representatives of what a score would drop, found by binary signatures.

The rows of the anchors, distances and picks are tokens (one bit a head) or pages (one bit a token).
"""

from typing import Literal

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.recipes.common import require, require_dims

Anchor = Literal["zeros", "ones", "alternating", "mean", "inverse_mean", "random"]
Spacing = Literal["step", "linspace"]


def page_scores(score: Tensor, page: int) -> Tensor:
    """``[B, H, S / page]`` float32: the sum over each page's keys of ``score`` ``[B, H, S]``.

    Raises ValueError where ``page`` does not divide S.
    """
    return _paged("page_scores", score, page).float().sum(-1)


def token_signatures(score: Tensor, *, share: float = 0.5) -> Tensor:
    """``[B, S, H]`` bool: bit h is set where the key is among the best ``floor(share * S)`` of head h.

    Args:
        score: ``[B, H, S]`` float of the keys that may be evicted.
        share: in [0, 1].

    Raises:
        ValueError: a shape or number that is not as above.
    """
    return _top_share("token_signatures", score, share).transpose(1, 2).contiguous()


def page_signatures(score: Tensor, page: int, *, share: float = 0.5) -> Tensor:
    """``[B, S / page, page * H]`` bool: which keys of a page are in the best ``floor(share * S)`` of each
    head, tokens before heads.

    Args:
        score: ``[B, H, S]`` float of the keys that may be evicted; accumulated, not divided by counts.
        page: keys of a page; divides S.
        share: in [0, 1].

    Raises:
        ValueError: a shape or number that is not as above.
    """
    bits = _paged("page_signatures", _top_share("page_signatures", score, share), page)
    return bits.permute(0, 2, 3, 1).flatten(2)


def anchor_bits(signature: Tensor, kind: Anchor, *, seed: int = 0) -> Tensor:
    """The signature that all others are compared with, ``[B, bits]`` bool.

    Args:
        signature: ``[B, n, bits]`` bool.
        kind: ``zeros``; ``ones``; ``alternating`` (bit i is i mod 2); ``mean``: set where more than half of
            the signatures have it, ``inverse_mean`` where fewer than half; ``random``: by a generator of its
            own, seeded with ``seed``.

    Raises:
        ValueError: a shape or choice that is not as above.
    """
    op = "anchor_bits"
    require_dims(op, "signature", signature, "[B, n, bits]")
    batch, count, bits = signature.shape
    if kind in ("mean", "inverse_mean"):
        twice = 2 * signature.sum(1)
        return twice > count if kind == "mean" else twice < count
    if kind == "random":
        drawn = torch.rand(bits, generator=torch.Generator().manual_seed(seed)) < 0.5
        return drawn.to(signature.device).expand(batch, bits).clone()
    patterns = {"zeros": (0, 0), "ones": (1, 1), "alternating": (0, 1)}
    require(
        kind in patterns, op, "kind", f"one of {[*patterns, 'mean', 'inverse_mean', 'random']}", repr(kind)
    )
    even, odd = patterns[kind]
    odd_bit = torch.arange(bits, device=signature.device) % 2 == 1
    return torch.where(odd_bit, bool(odd), bool(even)).expand(batch, bits).clone()


def hamming_distance(signature: Tensor, anchor: Tensor) -> Tensor:
    """``[B, n]`` int32: bits in which ``signature`` ``[B, n, bits]`` differs from ``anchor`` ``[B, bits]``.

    Raises ValueError for other shapes.
    """
    op = "hamming_distance"
    require_dims(op, "signature", signature, "[B, n, bits]")
    expected = [signature.shape[0], signature.shape[2]]
    require(list(anchor.shape) == expected, op, "anchor", f"of shape {expected}", list(anchor.shape))
    return (signature != anchor[:, None]).sum(-1, dtype=torch.int32)


def bucket_picks(
    distance: Tensor, candidate: Tensor, count: int, *, spacing: Spacing = "step"
) -> tuple[Tensor, Tensor]:
    """Representatives evenly spaced along the candidates sorted by (distance, index).

    Of c candidates m = min(count, c) are taken: number ``i * (c // m)`` (``step``, OpenVINO) or ``i * (c - 1)
    // (m - 1)`` (``linspace``, from end to end), for i in [0, m).

    Args:
        distance: ``[B, n]`` integers.
        candidate: ``[B, n]`` bool, the tokens or pages marked for eviction.
        count: representatives of a row, >= 0.

    Returns:
        ``index`` ``[B, count]`` int32, ascending, then -1; ``taken`` ``[B]`` int32.

    Raises:
        ValueError: a shape, number or choice that is not as above.
    """
    op = "bucket_picks"
    require_dims(op, "distance", distance, "[B, n]")
    require(
        candidate.shape == distance.shape and candidate.dtype == torch.bool,
        op,
        "candidate",
        f"bool {list(distance.shape)}",
        f"{candidate.dtype} {list(candidate.shape)}",
    )
    require(count >= 0, op, "count", ">= 0", count)
    require(spacing in ("step", "linspace"), op, "spacing", "'step' or 'linspace'", repr(spacing))
    far = torch.iinfo(torch.int64).max
    order = torch.where(candidate, distance.long(), far).argsort(dim=1, stable=True)
    candidates = candidate.sum(1, keepdim=True)
    picks = candidates.clamp(max=count)
    i = torch.arange(count, device=distance.device)
    if spacing == "step":
        place = i * (candidates // picks.clamp(min=1))
    else:
        place = i * (candidates - 1) // (picks - 1).clamp(min=1)
    chosen = torch.zeros(distance.shape[0], distance.shape[1] + 1, dtype=torch.bool, device=distance.device)
    hole = distance.shape[1]
    padded = torch.nn.functional.pad(order, (0, 1), value=hole)
    picked = padded.gather(1, torch.where(i < picks, place, hole))
    chosen.scatter_(1, picked, True)
    index, _, taken = ragged.compact_rows(chosen[:, :hole], count)
    return index, taken


def _top_share(op: str, score: Tensor, share: float) -> Tensor:
    """``[B, H, S]`` bool: the best ``floor(share * S)`` keys of each head."""
    require_dims(op, "score", score, "[B, H, S]")
    require(0 <= share <= 1, op, "share", "in [0, 1]", share)
    keys = score.shape[2]
    index, _ = ops.topk_select(score.flatten(0, 1), int(share * keys))
    return ragged.kept_mask(index, keys).view(score.shape)


def _paged(op: str, score: Tensor, page: int) -> Tensor:
    """``[B, H, S / page, page]``."""
    require_dims(op, "score", score, "[B, H, S]")
    require(page >= 1 and score.shape[2] % page == 0, op, "page", f"a divisor of S={score.shape[2]}", page)
    return score.unflatten(2, (-1, page)) if score.shape[2] else score.new_empty(*score.shape[:2], 0, page)
