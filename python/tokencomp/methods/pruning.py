"""What methods that drop tokens between attention and MLP share: per-layer knobs, ranking, the dropping."""

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from tokencomp import ragged
from tokencomp.methods import base
from tokencomp.methods.layers import LayerView, Reduced, Stateless

T = TypeVar("T", int, float)

LAYERS_HELP = "layers (0-based) that act; None: all"
KEEP_HELP = "share (or int: count) of a layer's image tokens kept; a list is indexed by layer, then all stay"


class Dropping(Stateless):
    """Base of the layer methods that only drop: all tokens left stand for one."""

    proportional: ClassVar[bool] = False


def at(value: T | Sequence[T], layer: int, beyond: T) -> T:
    """A per-layer knob at ``layer``: a number holds for all layers, a list is indexed by layer.

    Behind the end of the list it is ``beyond``.
    """
    if not isinstance(value, Sequence):
        return value
    return value[layer] if layer < len(value) else beyond


def check_keep(method: str, keep: float | Sequence[float]) -> None:
    """Raise ValueError unless every ``keep`` is a ratio in (0, 1] or a count >= 1."""
    for each in keep if isinstance(keep, Sequence) else (keep,):
        base.check_keep(method, each)


def budget(keep: float | Sequence[float], layers: Sequence[int] | None, view: LayerView) -> int:
    """Image tokens that stay at this layer; all of them where the method does not act."""
    image = view.tokens - view.prefix
    if image == 0 or (layers is not None and view.layer not in layers):
        return image
    return base.budget(at(keep, view.layer, 1.0), image)


def check_protect(method: str, protect: Sequence[int], tokens: int) -> list[int]:
    """``protect`` ascending and without repetition; ValueError unless all are in [0, tokens)."""
    if any(not 0 <= token < tokens for token in protect):
        raise ValueError(f"{method}: protect must be in [0, N={tokens}), got {list(protect)}")
    return sorted(set(protect))


def order(
    score: Tensor, *, prefix: int = 0, protect: Sequence[int] = (), mask: Tensor | None = None
) -> Tensor:
    """All tokens by rank, ``[B, N]`` int64: protected, then score descending, then padding; ties: lowest
    index.

    Args:
        score: ``[B, N]``; NaN counts as -inf, and both rank above padding.
        prefix: leading tokens that rank first, in their order.
        protect: other tokens that rank first, e.g. a CLS token in the middle.
        mask: ``[B, N]`` bool, False at padding.
    """
    lowest = torch.finfo(score.dtype).min
    known = score.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.finfo(score.dtype).max)
    if mask is not None:
        known = known.masked_fill(~mask, float("-inf"))
    first = torch.arange(score.shape[1], device=score.device) < prefix
    for token in protect:
        first[token] = True
    return known.masked_fill(first, float("inf")).sort(dim=1, descending=True, stable=True).indices


def top(score: Tensor, k: int, *, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
    """The prefix and the ``k`` best other tokens of ``score`` ``[B, N]``, ascending: ``[B, prefix + k]``
    int32.

    Ranked as in ``order``: padding is kept only where an item has fewer than ``k`` other tokens.
    """
    return order(score, prefix=prefix, mask=mask)[:, : prefix + k].sort(dim=1).values.to(torch.int32)


def drop(view: LayerView, kept: Tensor) -> Reduced:
    """Goes on with the tokens ``kept`` ``[B, K]``, ascending and with the prefix among them."""
    size = None if view.size is None else ragged.gather_rows(view.size, kept)
    return Reduced(ragged.gather_rows(view.x, kept), size, ragged.position_map(kept, view.tokens))
