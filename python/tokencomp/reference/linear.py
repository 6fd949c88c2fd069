"""Linear attention with decay in plain PyTorch: the specification of ``ops.decay_linear_attention``."""

import torch
from torch import Tensor


def decay_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``[B, Hq, T, Dv]`` outputs and ``[B, Hq, D, Dv]`` states in ``dtype``, token after token."""
    group, rows = q.shape[1] // k.shape[1], q.shape[2]
    q = q.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    decay = torch.exp(-slope.to(dtype))[:, None, None]
    shape = (*q.shape[:2], q.shape[3], v.shape[3])
    held = q.new_zeros(shape) if state is None else state.to(dtype)
    end = torch.full((q.shape[0],), rows) if lengths is None else lengths.cpu()
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for t in range(rows):
        there = (t < end).to(q.device)[:, None, None, None]
        new = decay * held + k[:, :, t, :, None] * v[:, :, t, None, :]
        held = torch.where(there, new, held)
        said = scale * (q[:, :, t, None, :] @ held)[:, :, 0]
        out[:, :, t] = torch.where(there[..., 0], said, 0.0)
    return out, held
