"""Core-context attention: groups of the past pooled to one key each, and a window (arXiv 2412.12465)."""

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.recipes.common import require, require_dims
from tokencomp.sparse.selected import merge


def core_pool(
    q_last: Tensor, k: Tensor, v: Tensor, group: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One key and value for each whole group, ``sum_j a_j k_j`` and ``sum_j a_j v_j``.

    ``a`` is the softmax of the group's keys under its last query, averaged over the query heads of a kv head
    (the official code repeats keys for each query head and pools them apart; the same for G = 1).

    Args:
        q_last: ``[B, Hq, S // group, D]``, the last query of each group, rotated.
        k, v: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``; tokens behind the last whole group are left out.
        group: tokens of a group, >= 1.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hkv, S // group, D]`` and ``[B, Hkv, S // group, Dv]``, of the dtypes of k and v.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "core_pool"
    for name, t in (("q_last", q_last), ("k", k), ("v", v)):
        require_dims(op, name, t, "[B, H, N, D]")
    require(group >= 1, op, "group", ">= 1", group)
    whole = k.shape[2] // group
    require(q_last.shape[2] == whole, op, "q_last", f"of {whole} groups", q_last.shape[2])
    keys, values = (x[:, :, : whole * group].float().unflatten(2, (whole, group)) for x in (k, v))
    queries = q_last.float().unflatten(1, (k.shape[1], -1))
    z = (queries[..., None, :] * keys[:, :, None]).sum(-1) * (k.shape[3] ** -0.5 if scale is None else scale)
    weight = torch.softmax(z, -1).mean(2)[..., None]
    return (weight * keys).sum(3).to(k.dtype), (weight * values).sum(3).to(v.dtype)


def core_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cores: tuple[Tensor, Tensor],
    *,
    group: int = 16,
    window: int = 1024,
    scale: float | None = None,
) -> Tensor:
    """Attention in which each past token counts once: as part of a core, or by itself.

    With n tokens up to a row and itself, it sees the cores of the first ``c = max(0, (n - window) // group)``
    groups and the tokens behind these, one softmax over both. Computed as a merge of up to three parts: the
    cores, a window of ``window``, and the fewer than ``group`` tokens between.

    Args:
        q: ``[B, Hq, T, D]``, the last T of the S positions; T = 1 is a decode step.
        k, v: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``.
        cores: of ``core_pool``, at least ``max(0, (S - window) // group)`` groups.
        group: tokens of a group, >= 1.
        window: tokens that are always seen themselves, >= 1.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, T, Dv]`` of the dtype of q.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "core_context_attention"
    for name, t in (("q", q), ("k", k), ("v", v)):
        require_dims(op, name, t, "[B, H, N, D]")
    require(group >= 1, op, "group", ">= 1", group)
    require(window >= 1, op, "window", ">= 1", window)
    rows, keys = q.shape[2], k.shape[2]
    require(rows <= keys, op, "T", f"at most S={keys}", rows)
    most = max(0, (keys - window) // group)
    require(cores[0].shape[2] >= most, op, "cores", f"of at least {most} groups", cores[0].shape[2])
    near = ops.flash_prefill(q, k, v, scale=scale, window=window)
    state = near[0].float(), near[1]
    before = torch.arange(keys - rows, keys, device=q.device) + 1 - window  # tokens before the window
    if most and rows:
        seen = torch.div(before, group, rounding_mode="floor") - 1
        core_k, core_v = (x[:, :, :most] for x in cores)
        far = ops.flash_prefill(q, core_k, core_v, scale=scale, q_position=seen.clamp(min=-1))
        state = merge(state, (far[0].float(), far[1]))
    if group > 1 and keys > window and rows:
        state = merge(state, _between(q, k, v, before, group, scale))
    return state[0].to(q.dtype)


def _between(
    q: Tensor, k: Tensor, v: Tensor, before: Tensor, group: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of each row to the ``before % group`` first tokens of the group that its window cuts."""
    batch, rows = q.shape[0], q.shape[2]
    number = torch.div(before.clamp(min=0), group, rounding_mode="floor")
    first, last = int(number[0]), int(number[-1])
    # Rows by group: row t is place before % group of its group; those of the first group may miss some.
    lead = int(before.clamp(min=0)[0]) - first * group
    skipped = int((before < 0).sum())  # rows whose window reaches back to the start
    count = last - first + 1
    some = torch.nn.functional.pad(q[:, :, skipped:], (0, 0, lead, count * group - lead - (rows - skipped)))
    some = some.unflatten(2, (count, group)).transpose(1, 2).flatten(0, 1)
    parts = []
    for x in (k, v):
        own = x[:, :, first * group : (last + 1) * group]
        own = torch.nn.functional.pad(own, (0, 0, 0, count * group - own.shape[2]))
        parts.append(own.unflatten(2, (count, group)).transpose(1, 2).flatten(0, 1))
    place = torch.arange(-1, group - 1, device=q.device)
    out, lse = ops.flash_prefill(some, *parts, scale=scale, q_position=place)
    out = out.float().unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
    lse = lse.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
    kept = slice(lead, lead + rows - skipped)
    out = torch.nn.functional.pad(out[:, :, kept], (0, 0, skipped, 0))
    return out, torch.nn.functional.pad(lse[:, :, kept], (skipped, 0), value=-torch.inf)
