"""Eviction as a mask over a whole text, for evaluation by teacher forcing: what each row would still have
seen.
"""

import torch
from torch import Tensor

from tokencomp.recipes.common import require, require_dims


def forgetting_mask(
    attention: Tensor, select: int, recent: int, *, prefix: int = 0, gamma: float = 1.0
) -> Tensor:
    """The pairs that are left when one key a row is evicted by accumulated attention (A2SF, arXiv 2407.20485,
    and H2O, arXiv 2306.14048, as they are evaluated).

    The cache holds ``C = prefix + select + recent`` keys. Rows before C see all and add to the scores, ``s
    = gamma s + row``. From row C on a row is first renormalised over the keys that survive, then added;
    then the key of smallest score in ``[prefix, q - recent]`` goes, for the rows after q. So a row sees C
    survivors and itself. Of equal scores the later goes, as the lower index wins everywhere.

    Args:
        attention: ``[B, H, T, T]`` probabilities of causal attention over all keys; computed in float32.
        select: keys kept by score, >= 0.
        recent: newest keys that stay, >= 1.
        prefix: first keys that stay, >= 0.
        gamma: forgetting factor in [0, 1]; 0 scores by the last row alone.

    Returns:
        ``[B, H, T, T]`` bool, the lower triangle of what is seen.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "forgetting_mask"
    require_dims(op, "attention", attention, "[B, H, T, T]")
    batch, heads, rows, keys = attention.shape
    require(rows == keys, op, "attention", "square", list(attention.shape))
    for name, number, least in (("select", select, 0), ("recent", recent, 1), ("prefix", prefix, 0)):
        require(number >= least, op, name, f">= {least}", number)
    require(0 <= gamma <= 1, op, "gamma", "in [0, 1]", gamma)
    budget, device = prefix + select + recent, attention.device
    alive = torch.ones(batch, heads, keys, dtype=torch.bool, device=device)
    score = torch.zeros(batch, heads, keys, device=device)
    key = torch.arange(keys, device=device)
    seen = torch.zeros(batch, heads, rows, keys, dtype=torch.bool, device=device)
    for q in range(rows):
        seen[:, :, q] = alive & (key <= q)
        row = torch.where(seen[:, :, q], attention[:, :, q].float(), 0.0)
        if q < budget:
            score = gamma * score + row
            continue
        mass = row.sum(-1, keepdim=True)
        score = gamma * score + torch.where(mass > 0, row / torch.where(mass > 0, mass, 1.0), 0.0)
        candidate = alive & (key >= prefix) & (key <= q - recent)
        worst = torch.where(candidate, score, torch.inf).flip(-1).argmin(-1, keepdim=True)
        worst = keys - 1 - worst  # of the first among equals of the flipped row: the last
        alive = alive & ~(candidate & (key == worst))
    return seen
