"""What an encoder needs once a token stands for several: key bias, rotary angles, weights of a mean."""

import torch
from torch import Tensor

from tokencomp import ops


def key_bias(size: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What attention adds to its logits: ``log size``, and the lowest number where a key is padding.

    With ``log size`` a key of size s counts like s equal keys (proportional attention, arXiv 2210.09461).

    Args:
        size: ``[B, N]`` float32, None where sizes do not count.
        mask: ``[B, N]`` bool, False at padding, None where there is none.

    Returns:
        ``[B, 1, 1, N]`` float32, or None where nothing is to be added.
    """
    if size is None and mask is None:
        return None
    bias = torch.zeros(mask.shape, device=mask.device) if size is None and mask is not None else None
    bias = size.log() if size is not None else bias
    assert bias is not None
    if mask is not None:
        bias = torch.where(mask, bias, torch.finfo(torch.float32).min)
    return bias[:, None, None, :]


def as_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``bias`` in the dtype of the queries; the lowest number of one stays finite in the other."""
    if bias.dtype == dtype or bias.dtype == torch.bool:
        return bias
    lowest = max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)
    return bias.clamp(min=lowest).to(dtype)


def merge_mask(mask: Tensor, token_map: Tensor, tokens: int) -> Tensor:
    """The mask ``[B, tokens]`` after a merge: True where any member of the group is not padding."""
    group = torch.where(token_map < 0, tokens, token_map).long()
    members = torch.zeros(mask.shape[0], tokens + 1, dtype=torch.int32, device=mask.device)
    return members.scatter_add(1, group, mask.to(torch.int32))[:, :tokens] > 0


def merge_rotation(
    cos: Tensor, sin: Tensor, source: Tensor, tokens: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Rotary tables of merged tokens: the circular mean over the patches that each stands for.

    Args:
        cos: ``[N0 - prefix, D]``, of the patches; the ``prefix`` tokens are not rotated.
        sin: ``[N0 - prefix, D]``.
        source: ``[B, N0]`` int32, the token each input token went into, -1 where it was dropped.
        tokens: M, how many tokens there are now, the prefix included.
        prefix: tokens at the front that stay where they are.

    Returns:
        Both tables, ``[B, 1, M - prefix, D]``, for broadcast over heads.
    """
    patches = source[:, prefix:]
    token_map = torch.where(patches < 0, -1, patches - prefix)
    table = torch.cat([cos, sin], dim=-1).float().expand(source.shape[0], -1, -1).contiguous()
    mean, _ = ops.merge_tokens(table, token_map, tokens - prefix)
    x, y = mean.chunk(2, dim=-1)
    length = torch.hypot(x, y)
    # patches that lie opposite each other have no mean direction: they are not rotated
    known = length > 1e-6
    x, y = torch.where(known, x / length, 1.0), torch.where(known, y / length, 0.0)
    return x[:, None].to(cos.dtype), y[:, None].to(sin.dtype)


def weigh_rows(x: Tensor, size: Tensor, prefix: int) -> Tensor:
    """Scale the patch rows of ``x`` so that their plain mean is the mean weighted by size.

    ``y_i = x_i * s_i * (M - prefix) / sum(s)`` over the M - prefix patches; prefix rows are left as they are.

    Args:
        x: ``[B, M, C]``.
        size: ``[B, M]`` float32.
        prefix: tokens at the front that are not in the mean.
    """
    patches = size[:, prefix:]
    weight = patches * patches.shape[1] / patches.sum(dim=1, keepdim=True)
    rows = (x[:, prefix:].float() * weight[..., None]).to(x.dtype)
    return torch.cat([x[:, :prefix], rows], dim=1)
