"""What the merging methods share: from a matching of tokens to one map, and from the map to merged tokens.

A merge is one int32 ``token_map`` ``[B, N]``: the row of the output that each token goes into, -1 where it is
dropped. Nothing here waits for the device. What is merged where is a constant to autograd: gradients reach
the tokens through their averages alone.

Padding is never merged and never merged into. Every item of a batch gives up the same number of tokens; one
with too few valid pairs gives up padding instead, the last tokens first. There always is enough of it, since
no step takes more than half of the mergeable tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tokencomp import ops, token_map
from tokencomp.methods.layers import LayerView, Reduced
from tokencomp.ops.merge import Mode, Order


class Plan(NamedTuple):
    """A merge of ``N`` tokens to ``out_tokens``."""

    token_map: Tensor  # [B, N] int32, -1: dropped
    out_tokens: int

    def merge(self, x: Tensor, *, size: Tensor | None = None) -> Tensor:
        """``x`` ``[B, N, C]`` averaged over the tokens of each row, weighted by ``size``: ``[B, M, C]``."""
        return merge(x, self, size=size)[0]

    def unmerge(self, y: Tensor) -> Tensor:
        """``y`` ``[B, M, C]`` back at all N tokens: each gets a copy of its row, dropped ones get zeros."""
        return token_map.unmerge(y, self.token_map)


class Pairing(NamedTuple):
    """Which tokens of each item look for a partner among which."""

    a: Tensor | None = None  # [B, Na] int64, tokens that look; None: the even ones
    b: Tensor | None = None  # [B, Nb] int64, tokens that are found; None: the odd ones
    rest: Tensor | None = None  # [B, Nr] int64, tokens of neither, in the order in which they shall stand
    order: Order = "tome"  # of the tokens that stay, see ``pair_up``


class Match(NamedTuple):
    """Two lists of tokens of each item, and the best of ``b`` for each of ``a``."""

    value: Tensor  # [B, Na] float32, the similarity, -inf where there is none
    column: Tensor  # [B, Na] int32 into b, -1 where there is none
    a: Tensor | None = None  # [B, Na] int32; None: the even tokens
    b: Tensor | None = None  # [B, Nb] int32; None: the odd tokens


def dense(x: Tensor) -> Tensor:
    """``x`` with its channels contiguous, as the operators take it.

    Tokens are not where they come from a convolution and nothing was put in front of them (no CLS token).
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def merge(
    x: Tensor, plan: Plan, *, size: Tensor | None = None, weight: Tensor | None = None, mode: Mode = "mean"
) -> tuple[Tensor, Tensor]:
    """``x`` ``[B, N, C]`` and its sizes by ``plan``; see ``ops.merge_tokens``."""
    return ops.merge_tokens(dense(x), plan.token_map, plan.out_tokens, size=size, weight=weight, mode=mode)


def merged(view: LayerView, plan: Plan) -> Reduced | None:
    """The tokens of ``view``, averaged with their sizes as weights; None where ``plan`` keeps all."""
    if plan.out_tokens == view.tokens:
        return None
    x, size = merge(view.x, plan, size=view.size)
    return Reduced(x, size, plan.token_map)


def tokens_like(x: Tensor) -> Tensor:
    """``[B, N]`` int64, each token's own index."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def identity(x: Tensor) -> Plan:
    """Every token of ``x`` ``[B, N, ...]`` stays."""
    return Plan(tokens_like(x).to(torch.int32), x.shape[1])


def ranked(score: Tensor) -> Tensor:
    """``[B, N]`` int64, tokens by descending ``score``; ties: lower index first, NaN: -inf.

    The stable sort always: torch's default keeps equal values in order only up to 16 of them.
    """
    return torch.where(score.isnan(), float("-inf"), score).argsort(dim=1, descending=True, stable=True)


def rank_of(order: Tensor) -> Tensor:
    """The inverse of a permutation ``[B, N]``: the place of each token in ``order``."""
    return torch.empty_like(order).scatter_(1, order, tokens_like(order))


@torch.no_grad()
def halves(x: Tensor, prefix: int, mask: Tensor | None = None, band: int = -1) -> Match:
    """The best odd token of every even token of ``x`` ``[B, N, D]`` by cosine.

    Prefix tokens and padding are neither side of a match. With ``band`` >= 0 the i-th even token sees the odd
    ones from the ``i - band``-th to the ``i + band``-th only.
    """
    x = dense(x)
    value, index = ops.cosine_match(
        x[:, 0::2],
        x[:, 1::2],
        band=band,
        protect_a=(prefix + 1) // 2,
        protect_b=prefix // 2,
        mask_a=None if mask is None else mask[:, 0::2].contiguous(),
        mask_b=None if mask is None else mask[:, 1::2].contiguous(),
    )
    return Match(value, index)


@torch.no_grad()
def lists(x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Match:
    """The best of the tokens ``b`` ``[B, Nb]`` of ``x`` for each of the tokens ``a`` ``[B, Na]`` by cosine.

    Padding (False in ``mask`` ``[B, N]``) is neither side of a match.
    """
    x = dense(x)
    value, index = ops.cosine_match(
        x,
        x,
        a_index=a.to(torch.int32),
        b_index=b.to(torch.int32),
        mask_a=None if mask is None else mask.gather(1, a),
        mask_b=None if mask is None else mask.gather(1, b),
    )
    return Match(value, index, a.to(torch.int32), b.to(torch.int32))


def pair_up(
    match: Match,
    r: int,
    tokens: int,
    prefix: int,
    *,
    rest: Tensor | None = None,
    order: Order = "tome",
    mask: Tensor | None = None,
) -> Plan:
    """Merge the ``r`` most similar pairs of ``match``, the ``a`` side into the ``b`` side.

    ``rest`` ``[B, Nr]``: the tokens in neither list. Rows: prefix, ``rest``, ``a`` that stays, ``b``; each as
    listed, but ``a`` by descending similarity with ``order="similarity"``, or with "tome" and no prefix. With
    ``order="position"`` all stay in the order they had.
    """
    if mask is None:
        mapped = ops.bipartite_map(
            match.value,
            match.column,
            r,
            tokens,
            prefix=prefix,
            order=order,
            a_tokens=match.a,
            b_tokens=match.b,
            rest_tokens=rest,
        )
        return Plan(mapped, tokens - r)
    own = tokens_like(mask)
    a = own[:, 0::2] if match.a is None else match.a.long()
    b = own[:, 1::2] if match.b is None else match.b.long()
    place = rank_of(ranked(match.value))
    goes = (place < r) & (match.column >= 0)
    into = torch.where(goes, b.gather(1, match.column.long().clamp_min(0)), a)
    target = own.scatter(1, a, into)
    key = own.clone()
    if order != "position":
        if rest is not None:
            key.scatter_(1, rest.long(), tokens_like(rest) + tokens)
        by_list = order == "index" or (order == "tome" and prefix > 0)
        key.scatter_(1, a, (tokens_like(a) if by_list else place) + 2 * tokens)
        key.scatter_(1, b, tokens_like(b) + 3 * tokens)
        key[:, :prefix] = own[:, :prefix]
    return assemble(target, key, tokens - r, mask)


def plan_pairs(
    metric: Tensor, r: int, prefix: int, pairing: Pairing | None = None, mask: Tensor | None = None
) -> Plan:
    """Merge the ``r`` most similar pairs by ``metric`` ``[B, N, D]``; even with odd tokens by default."""
    how = pairing or Pairing()
    if how.a is None or how.b is None:
        match = halves(metric, prefix, mask)
    else:
        match = lists(metric, how.a, how.b, mask)
    return pair_up(match, r, metric.shape[1], prefix, rest=how.rest, order=how.order, mask=mask)


def merge_pairs(
    view: LayerView,
    metric: Tensor,
    r: int,
    pairing: Pairing | None = None,
    *,
    sized: bool = True,
    weight: Tensor | None = None,
    mode: Mode = "mean",
) -> Reduced | None:
    """The tokens of ``view`` by what ``plan_pairs`` says; None where ``r`` is 0.

    One operator does all of it; padding, which it does not know, takes the long way. Where not ``sized``,
    sizes have no part in it and none are tracked.
    """
    if r == 0:
        return None
    size = view.size if sized else None
    if view.mask is not None:
        plan = plan_pairs(metric, r, view.prefix, pairing, view.mask)
        x, merged_size = merge(view.x, plan, size=size, weight=weight, mode=mode)
        return Reduced(x, merged_size if sized else None, plan.token_map)
    how = pairing or Pairing()
    x, merged_size, token_map = ops.bipartite_merge(
        dense(view.x),
        dense(metric.detach()),
        r,
        size=size,
        weight=weight,
        prefix=view.prefix,
        order=how.order,
        mode=mode,
        a_tokens=how.a,
        b_tokens=how.b,
        rest_tokens=how.rest,
    )
    return Reduced(x, merged_size if sized else None, token_map)


def assemble(target: Tensor, key: Tensor, out_tokens: int, mask: Tensor | None = None) -> Plan:
    """The plan in which token i goes into token ``target[b, i]``.

    Args:
        target: ``[B, N]`` int64; itself where a token stays, -1 where it is dropped. Targets stay.
        key: ``[B, N]`` int64; the tokens that stay are put in ascending order of it.
        out_tokens: how many stay. More may only where the ``mask`` has padding to give up instead.
        mask: ``[B, N]`` bool, False at padding.
    """
    own = tokens_like(target)
    if mask is not None:
        missing = target.shape[1] - out_tokens - (target != own).sum(dim=1, keepdim=True)
        from_last = (~mask).flip(1).cumsum(dim=1).flip(1)
        target = torch.where(~mask & (from_last <= missing), -1, target)
    last = torch.iinfo(key.dtype).max
    order = torch.where(target == own, key, last).argsort(dim=1, stable=True)[:, :out_tokens]
    row = torch.full_like(target, -1).scatter_(1, order, own[:, :out_tokens])
    mapped = torch.where(target < 0, -1, row.gather(1, target.clamp_min(0)))
    return Plan(mapped.to(torch.int32), out_tokens)
