"""What the recipes share: selection per head, pooling along the keys, scaling to [0, 1]."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp import ops

Pool = Literal["avg", "max"]


def select_per_head(
    score: Tensor, k: int, *, head: int = 0, tail: int = 0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep ``k`` keys a head, protected ones inside ``k``: ``topk_select`` on scores with heads.

    Args:
        score: ``[B, H, S]`` float.
        k, head, tail: as in ``topk_select``.
        lengths: ``[B]`` keys of each sequence.

    Returns:
        ``index`` ``[B, H, k]`` int32, ascending, then -1; ``count`` ``[B, H]`` int32.

    Raises:
        ValueError, RuntimeError: a shape or number that is not as above.
    """
    require_dims("select_per_head", "score", score, "[B, H, S]")
    batch, heads = score.shape[:2]
    rows = None if lengths is None else lengths[:, None].expand(batch, heads).flatten()
    index, count = ops.topk_select(score.flatten(0, 1), k, head=head, tail=tail, lengths=rows)
    return index.view(batch, heads, k), count.view(batch, heads)


def check_kernel(op: str, kernel: int) -> None:
    """Raise ValueError unless ``kernel`` is a width ``pool_scores`` takes: rows are padded by as much."""
    require(1 <= kernel <= 4096, op, "kernel", "in [1, 4096]", kernel)


def pool_scores(
    score: Tensor,
    kernel: int,
    *,
    kind: Pool = "avg",
    align: Literal["center", "forward"] = "center",
    lengths: Tensor | None = None,
) -> Tensor:
    """Pool scores along the keys with stride 1: neighbours of an important key become important.

    What lies outside the row counts as 0 for ``avg``, which always divides by ``kernel``, and as -inf for
    ``max`` (SnapKV, arXiv 2404.14469). Key j takes the keys ``[j - (kernel - 1) // 2, j + kernel // 2]``, or
    ``[j, j + kernel - 1]`` for ``align="forward"`` (KVCrush, arXiv 2503.00022).

    Args:
        score: ``[B, H, S]`` float, pooled in float32.
        kernel: in [1, 4096]; 1 changes nothing.
        lengths: ``[B]``: only the first ``lengths[b]`` keys of an item exist.

    Returns:
        ``[B, H, S]`` float32, -inf at keys that do not exist.

    Raises:
        ValueError: a shape, number or choice that is not as above.
    """
    op = "pool_scores"
    require_dims(op, "score", score, "[B, H, S]")
    check_kernel(op, kernel)
    require(kind in ("avg", "max"), op, "kind", "'avg' or 'max'", repr(kind))
    require(align in ("center", "forward"), op, "align", "'center' or 'forward'", repr(align))
    outside = 0.0 if kind == "avg" else -torch.inf
    exists = existing(score, lengths)
    score = torch.where(exists, score.float(), outside)
    if score.numel() and kernel > 1:
        before = (kernel - 1) // 2 if align == "center" else 0
        padded = functional.pad(score, (before, kernel - 1 - before), value=outside)
        pool = functional.avg_pool1d if kind == "avg" else functional.max_pool1d
        score = pool(padded, kernel, stride=1)
    return torch.where(exists, score, -torch.inf)


def minmax(x: Tensor, *, eps: float = 1e-6, lengths: Tensor | None = None) -> Tensor:
    """``(x - min) / (max - min + eps)`` along the last dimension of ``[B, ..., S]``, float32; 0 beyond
    ``lengths`` ``[B]``.
    """
    exists = existing(x, lengths)
    if x.shape[-1] == 0:
        return x.float()
    x = x.float()
    low = torch.where(exists, x, torch.inf).amin(-1, keepdim=True)
    high = torch.where(exists, x, -torch.inf).amax(-1, keepdim=True)
    return torch.where(exists, (x - low) / (high - low + eps), 0.0)


def existing(score: Tensor, lengths: Tensor | None) -> Tensor:
    """Bool mask of the keys that exist, broadcastable to ``score`` ``[B, ..., S]``; lengths ``[B]`` or ``[B,
    H]``.
    """
    key = torch.arange(score.shape[-1], device=score.device)
    if lengths is None:
        return key >= 0
    return key < lengths.view(*lengths.shape, *[1] * (score.dim() - lengths.dim()))


def require(holds: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ValueError, naming function, argument, what was expected and what was got."""
    if not holds:
        raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def require_dims(op: str, argument: str, t: Tensor, shape: str) -> None:
    """Raise ValueError unless ``t`` has as many dimensions as ``shape``, e.g. ``[B, H, S]``."""
    if t.dim() != shape.count(",") + 1:
        raise ValueError(f"{op}: {argument} must have shape {shape}, got {list(t.shape)}")
