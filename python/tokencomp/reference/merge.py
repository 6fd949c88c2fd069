"""Token merging in plain PyTorch: the specification of ``tokencomp.ops.merge``.

Matrices of all pairs, loops over groups: short and float64-capable, not fast.
"""

import math

import torch
from torch import Tensor

INF = float("inf")


def _unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms, and which are finite. A zero row (see ops) stays zero."""
    square = x.float().square().sum(-1)
    finite = torch.isfinite(square)
    rows = torch.where(finite[..., None], x.to(dtype), 0)
    norm = rows.square().sum(-1, keepdim=True).sqrt()
    counts = finite & (square >= torch.finfo(torch.float32).tiny)
    return torch.where(counts[..., None], rows / norm, 0), finite


def _take(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The selected rows of ``x`` [B, N, C] and the token number of each, -1 where there is none."""
    if index is None:
        return x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    position = torch.where((index >= 0) & (index < x.shape[1]), index, -1).long()
    if x.shape[1] == 0:
        return x.new_zeros(*index.shape, x.shape[2]), position
    return x.gather(1, position.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])), position


def cosine_match(
    a: Tensor,
    b: Tensor,
    *,
    a_index: Tensor | None = None,
    b_index: Tensor | None = None,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    alpha: float = 1.0,
    a_weight: Tensor | None = None,
    b_weight: Tensor | None = None,
    band: int = -1,
    protect_a: int = 0,
    protect_b: int = 0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    min_similarity: float = -INF,
    top: int = 1,
    exclude_self: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``tokencomp.ops.cosine_match`` with the same arguments, computed in ``dtype``.

    Returns:
        ``value`` of ``dtype`` and ``index`` int32, each ``[B, Ra]``, or ``[B, Ra, top]`` where ``top > 1``.
    """
    similarity = match_matrix(
        a, b, a_index=a_index, b_index=b_index, a2=a2, b2=b2, alpha=alpha, a_weight=a_weight,
        b_weight=b_weight, band=band, protect_a=protect_a, protect_b=protect_b, mask_a=mask_a,
        mask_b=mask_b, exclude_self=exclude_self, dtype=dtype,
    )  # fmt: skip
    missing = max(0, top - similarity.shape[2])
    similarity = torch.nn.functional.pad(similarity, (0, missing), value=-INF)
    value, index = similarity.sort(dim=-1, descending=True, stable=True)
    value, index = value[..., :top], index[..., :top].to(torch.int32)
    index = torch.where((value > -INF) & (value >= min_similarity), index, -1)
    return (value[..., 0], index[..., 0]) if top == 1 else (value, index)


def match_matrix(
    a: Tensor,
    b: Tensor,
    *,
    a_index: Tensor | None = None,
    b_index: Tensor | None = None,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    alpha: float = 1.0,
    a_weight: Tensor | None = None,
    b_weight: Tensor | None = None,
    band: int = -1,
    protect_a: int = 0,
    protect_b: int = 0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    exclude_self: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """All similarities ``[B, Ra, Rb]`` that ``cosine_match`` ranks; -inf where a pair may not match."""
    (rows, row_token), (columns, column_token) = _take(a, a_index), _take(b, b_index)
    (u, row_ok), (v, column_ok) = _unit(rows, dtype), _unit(columns, dtype)
    similarity = u @ v.mT
    if a2 is not None and b2 is not None:
        (u2, row_ok2), (v2, column_ok2) = (
            _unit(_take(x, i)[0], dtype) for x, i in ((a2, a_index), (b2, b_index))
        )
        similarity = alpha * similarity + (1 - alpha) * (u2 @ v2.mT)
        row_ok, column_ok = row_ok & row_ok2, column_ok & column_ok2
    if a_weight is not None:
        similarity = similarity * a_weight.to(dtype)[:, :, None]
    if b_weight is not None:
        similarity = similarity * b_weight.to(dtype)[:, None, :]
    row_ok = row_ok & (row_token >= 0) & (torch.arange(rows.shape[1], device=a.device) >= protect_a)
    column_ok = (
        column_ok & (column_token >= 0) & (torch.arange(columns.shape[1], device=a.device) >= protect_b)
    )
    row_ok = row_ok if mask_a is None else row_ok & mask_a
    column_ok = column_ok if mask_b is None else column_ok & mask_b
    allowed = row_ok[:, :, None] & column_ok[:, None, :]
    apart = (row_token[:, :, None] - column_token[:, None, :]).abs()
    if band >= 0:
        allowed = allowed & (apart <= band)
    if exclude_self:
        allowed = allowed & (apart > 0)
    return torch.where(allowed & ~similarity.isnan(), similarity, -INF)


def energy_score(
    x: Tensor,
    margin: float,
    *,
    alpha: float = 1.0,
    kind: str = "elu",
    prefix: int = 0,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``tokencomp.ops.energy_score`` with the same arguments, computed in ``dtype``."""
    unit, takes_part = _unit(x, dtype)
    takes_part = takes_part & (torch.arange(x.shape[1], device=x.device) >= prefix)
    takes_part = takes_part if mask is None else takes_part & mask
    similarity = unit @ unit.mT
    z = similarity - margin
    if kind == "gauss":
        sigma = 1 - margin
        energy = torch.exp(-((1 - similarity) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    else:
        above = similarity if kind == "paper" else z
        energy = torch.where(z >= 0, above, alpha * torch.expm1(z.clamp(max=0)))
    energy = torch.where(takes_part[:, None, :], energy, 0).sum(-1) / takes_part.sum(-1, keepdim=True)
    return torch.where(takes_part, energy, -INF)


def bipartite_map(
    value: Tensor,
    index: Tensor,
    r: int,
    tokens: int,
    *,
    prefix: int = 1,
    distill: bool = False,
    order: str = "tome",
    a_tokens: Tensor | None = None,
    b_tokens: Tensor | None = None,
    rest_tokens: Tensor | None = None,
) -> Tensor:
    """``tokencomp.ops.bipartite_map`` with the same arguments, one item after the other."""
    split = a_tokens is None
    prefix = min(prefix + int(distill), tokens)
    r = min(r, (tokens - prefix) // 2 if split else value.shape[1])
    rows = []
    for item in range(value.shape[0]):
        a = list(range(0, tokens, 2)) if a_tokens is None else a_tokens[item].tolist()
        b = list(range(1, tokens, 2)) if b_tokens is None else b_tokens[item].tolist()
        rest = [] if rest_tokens is None else rest_tokens[item].tolist()
        rows.append(
            _item_map(value[item].tolist(), index[item].tolist(), r, tokens, prefix, order, a, b, rest)
        )
    return torch.tensor(rows, dtype=torch.int32, device=value.device).reshape(value.shape[0], tokens)


def _item_map(
    value: list[float], index: list[int], r: int, tokens: int, prefix: int, order: str,
    a: list[int], b: list[int], rest: list[int],
) -> list[int]:  # fmt: skip
    score = [-INF if math.isnan(v) else v for v in value]
    ranked = sorted(range(len(a)), key=lambda i: (a[i] < prefix, -score[i], i))
    merged, unmerged = ranked[:r], ranked[r:]
    if order == "index" or (order == "tome" and prefix > 0):
        unmerged = sorted(unmerged)
    listed = {*a, *b, *rest}
    survivors = [t for t in range(tokens) if t not in listed] + rest + [a[i] for i in unmerged] + b
    survivors = [t for t in survivors if t >= prefix]
    if order == "position":
        survivors = sorted(survivors)
    gone = {a[i] for i in merged}
    survivors = [t for t in range(prefix) if t not in gone] + survivors
    where = {token: m for m, token in enumerate(survivors)}
    target = {a[i]: (where.get(b[index[i]], -1) if 0 <= index[i] < len(b) else -1) for i in merged}
    return [target[t] if t in target else where[t] for t in range(tokens)]


def merge_tokens(
    x: Tensor,
    token_map: Tensor,
    out_tokens: int,
    *,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``tokencomp.ops.merge_tokens`` with the same arguments; both results are of ``dtype``."""
    rows = x.to(dtype)
    batch, n = x.shape[:2]
    size = torch.ones(batch, n, dtype=dtype, device=x.device) if size is None else size.to(dtype)
    factor = size if weight is None else size * weight.to(dtype)
    group = torch.where((token_map >= 0) & (token_map < out_tokens), token_map, out_tokens).long()
    if mode == "drop":
        group = torch.where(_heads(group, weight, out_tokens), group, out_tokens)

    def collect(values: Tensor, reduce: str) -> Tensor:
        """``values`` [B, N, c] reduced over each group, 0 where one is empty; what is dropped goes last."""
        into = values.new_zeros(batch, out_tokens + 1, values.shape[2])
        where = group[..., None].expand(values.shape)
        return into.scatter_reduce(1, where, values, reduce, include_self=False)[:, :out_tokens]

    total_size = collect(size[..., None], "sum")[..., 0]
    if mode in ("drop", "amax"):
        return collect(rows, "amax"), total_size
    summed = collect(factor[..., None] * rows, "sum")
    if mode == "sum":
        return summed, total_size
    total = collect(factor[..., None], "sum")
    mean = torch.where(total != 0, summed / total, 0)
    if mode == "mean":
        return mean, total_size
    largest = collect(rows.square().sum(-1, keepdim=True).sqrt(), "amax")
    length = mean.square().sum(-1, keepdim=True).sqrt()
    alone = collect(torch.ones_like(factor)[..., None], "sum") == 1
    return torch.where(alone, mean, torch.where(length != 0, mean / length * largest, 0)), total_size


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    prefix: int = 1,
    order: str = "tome",
    mode: str = "mean",
    a_tokens: Tensor | None = None,
    b_tokens: Tensor | None = None,
    rest_tokens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokencomp.ops.bipartite_merge`` with the same arguments: the three functions above in turn."""
    tokens = x.shape[1]
    if a_tokens is None:
        led = min(prefix, tokens)
        value, index = cosine_match(
            metric[:, 0::2], metric[:, 1::2], protect_a=(led + 1) // 2, protect_b=led // 2, dtype=dtype
        )
    else:
        value, index = cosine_match(metric, metric, a_index=a_tokens, b_index=b_tokens, dtype=dtype)
    token_map = bipartite_map(
        value, index, r, tokens, prefix=prefix, order=order,
        a_tokens=a_tokens, b_tokens=b_tokens, rest_tokens=rest_tokens,
    )  # fmt: skip
    most = (tokens - min(prefix, tokens)) // 2 if a_tokens is None else a_tokens.shape[1]
    left = tokens - min(r, most)
    return *merge_tokens(x, token_map, left, size=size, weight=weight, mode=mode, dtype=dtype), token_map


def _heads(group: Tensor, weight: Tensor | None, out_tokens: int) -> Tensor:
    """``[B, N]`` bool: the member of largest weight of each group, the first of several."""
    rank = torch.zeros(group.shape, device=group.device) if weight is None else weight
    rank = rank.nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    best = torch.full_like(rank[:, :1], -INF).repeat(1, out_tokens + 1)
    best = best.scatter_reduce(1, group, rank, "amax", include_self=False)
    place = torch.arange(group.shape[1], device=group.device).expand(group.shape)
    candidate = torch.where(rank == best.gather(1, group), place, group.shape[1])
    first = torch.full_like(best, group.shape[1], dtype=torch.long)
    first = first.scatter_reduce(1, group, candidate, "amin", include_self=False)
    return place == first.gather(1, group)
