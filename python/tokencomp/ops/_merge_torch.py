"""What PyTorch must know of the merge operators besides their kernels: shapes and gradients."""

from typing import Any

import torch
from torch import Tensor

from tokencomp.ops import _namespace
from tokencomp.token_map import unmerge

_INFINITY = float("inf")


@_namespace.fake("cosine_match")
def _cosine_match_fake(
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
    min_similarity: float | None = None,
    top: int = 1,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_rank("cosine_match", "a", a, 3, "[B, N, C]")
    rows = a.shape[1] if a_index is None else a_index.shape[1]
    shape = (a.shape[0], rows) if top == 1 else (a.shape[0], rows, top)
    return a.new_empty(shape, dtype=torch.float32), a.new_empty(shape, dtype=torch.int32)


@_namespace.fake("energy_score")
def _energy_score_fake(
    x: Tensor,
    margin: float,
    *,
    alpha: float = 1.0,
    kind: str = "elu",
    prefix: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    _check_rank("energy_score", "x", x, 3, "[B, N, C]")
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@_namespace.fake("bipartite_map")
def _bipartite_map_fake(
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
    _check_rank("bipartite_map", "value", value, 2, "[B, Ra]")
    return value.new_empty((value.shape[0], tokens), dtype=torch.int32)


@_namespace.fake("merge_tokens")
def _merge_tokens_fake(
    x: Tensor,
    token_map: Tensor,
    out_tokens: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
) -> tuple[Tensor, Tensor]:
    _check_rank("merge_tokens", "x", x, 3, "[B, N, C]")
    y = x.new_empty((x.shape[0], out_tokens, x.shape[2]))
    return y, x.new_empty((x.shape[0], out_tokens), dtype=torch.float32)


@_namespace.fake("bipartite_merge")
def _bipartite_merge_fake(
    x: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    prefix: int = 1,
    order: str = "tome",
    mode: str = "mean",
    a_tokens: Tensor | None = None,
    b_tokens: Tensor | None = None,
    rest_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rank("bipartite_merge", "x", x, 3, "[B, N, C]")
    batch, tokens, channels = x.shape
    most = (tokens - min(prefix, tokens)) // 2 if a_tokens is None else a_tokens.shape[1]
    left = tokens - min(r, most)
    y = x.new_empty((batch, left, channels))
    return y, y.new_empty((batch, left), dtype=torch.float32), y.new_empty((batch, tokens), dtype=torch.int32)


def _check_rank(op: str, argument: str, t: Tensor, rank: int, shape: str) -> None:
    if t.dim() != rank:
        raise RuntimeError(f"{op}: {argument} must have shape {shape}, got {list(t.shape)}")


def _save_for_merge_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, token_map, out_tokens, size, weight, mode = inputs
    _save(ctx, "merge_tokens", token_map, out_tokens, size, weight, mode)
    ctx.mark_non_differentiable(output[1])


def _save_for_step_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    size, weight, mode = inputs[3], inputs[4], inputs[7]
    _save(ctx, "bipartite_merge", output[2], output[0].shape[1], size, weight, mode)
    ctx.mark_non_differentiable(output[1], output[2])


def _save(
    ctx: Any,
    op: str,
    token_map: Tensor,
    out_tokens: int,
    size: Tensor | None,
    weight: Tensor | None,
    mode: str,
) -> None:
    for name, t in (("size", size), ("weight", weight)):
        if t is not None and t.requires_grad:
            raise RuntimeError(f"{op}: {name} must not require a gradient: there is none, got one that does")
    ctx.mode, ctx.out_tokens = mode, out_tokens
    if mode in ("amax", "mlerp") and ctx.needs_input_grad[0]:
        raise RuntimeError(
            f"{op}: mode must be one of 'mean', 'sum', 'drop' where x requires a gradient, got '{mode}'"
        )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(token_map, size, weight)


def _merge_backward(ctx: Any, grad_y: Tensor | None, _grad_size: Tensor | None) -> tuple[Tensor | None, ...]:
    return _grad_of_x(ctx, grad_y), *(None,) * 5


def _step_backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _grad_of_x(ctx, grad_y), *(None,) * 10


def _grad_of_x(ctx: Any, grad_y: Tensor | None) -> Tensor | None:
    if grad_y is None or not ctx.needs_input_grad[0]:
        return None
    token_map, size, weight = ctx.saved_tensors
    share = _shares(token_map, size, weight, ctx.out_tokens, ctx.mode)
    rows = unmerge(grad_y, torch.where(share != 0, token_map, -1))
    return (share[..., None] * rows).to(grad_y.dtype)


def _shares(
    token_map: Tensor, size: Tensor | None, weight: Tensor | None, out_tokens: int, mode: str
) -> Tensor:
    """``[B, N]`` float32: what each token's row is multiplied by in the output row of its group."""
    kept = (token_map >= 0) & (token_map < out_tokens)
    group = torch.where(kept, token_map, out_tokens).long()
    ones = torch.ones_like(token_map, dtype=torch.float32)
    weight = ones if weight is None else weight
    if mode == "drop":
        return _is_head(group, weight, out_tokens).float() * kept
    factor = weight if size is None else weight * size
    share = torch.where(kept, factor, 0)
    if mode == "sum":
        return share
    total = (
        torch.zeros_like(share[:, :1]).repeat(1, out_tokens + 1).scatter_add(1, group, share).gather(1, group)
    )
    return torch.where(total != 0, share / total, 0)


def _is_head(group: Tensor, weight: Tensor, out_tokens: int) -> Tensor:
    """Whether a token is the member of largest weight of its group, the first of several."""
    rank = weight.nan_to_num(nan=-_INFINITY, posinf=_INFINITY, neginf=-_INFINITY)
    best = torch.full_like(rank[:, :1], -_INFINITY).repeat(1, out_tokens + 1)
    best = best.scatter_reduce(1, group, rank, "amax", include_self=False)
    tokens = group.shape[1]
    place = torch.arange(tokens, device=group.device).expand(group.shape)
    candidate = torch.where(rank == best.gather(1, group), place, tokens)
    first = torch.full_like(best, tokens, dtype=torch.long).scatter_reduce(1, group, candidate, "amin")
    return place == first.gather(1, group)


_namespace.gradient("merge_tokens", _merge_backward, _save_for_merge_backward)
_namespace.gradient("bipartite_merge", _step_backward, _save_for_step_backward)
