"""k-center selection: the wrapper and the fake kernel of ``torch.ops.tokencomp.kcenter_greedy``."""

from typing import Literal

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace

Objective = Literal["max_min", "max_sum"]
Metric = Literal["cosine", "l2", "dot"]
First = Literal["largest_nn", "index0", "centroid"]

_OP = "kcenter_greedy"


@typed
def kcenter_greedy(
    x: Tensor,
    k: int,
    *,
    objective: Objective = "max_min",
    metric: Metric = "cosine",
    first: First = "largest_nn",
    seed: Tensor | None = None,
    weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick ``k`` tokens that cover the others, one at a time: always the farthest from those picked so far.

    With C the tokens picked so far and d the distance (cosine: ``1 - cos``; l2: Euclidean; dot: ``-<x, c>``),
    the next pick is the token not in C with the largest

    - ``max_min``:  ``w_i * min_{c in C} d(i, c)``, farthest-first traversal: a 2-approximation of the
      k-center optimum where d is a metric (Gonzalez 1985; DivPrune, arXiv 2503.02175);
    - ``max_sum``:  ``w_i * sum_{c in C} d(i, c)``, greedy max-sum diversification, i.e. the smallest summed
      similarity (ToDRE, arXiv 2505.18757).

    Without weights every w_i is 1. Ties go to the lowest index. The result is bit-identical from run to run
    and for any number of threads. Fewer picks are a prefix of more (but for near-ties: few and many picks may
    round differently).

    Args:
        x: tokens ``[B, N, C]``, float32, float16 or bfloat16, any strides with the channels contiguous.
            Arithmetic is float32. A row of zeros (float32 sum of squares below 1.2e-38) has similarity 0 to
            everything. A row whose float32 sum of squares is not finite (NaN, infinity, overflow) is picked
            only after all others and is no centre.
        k: picks per item, in [1, N].
        objective: ``max_min`` or ``max_sum``, see above.
        metric: ``cosine`` (norms do not matter), ``l2`` or ``dot``.
        first: the first pick where no ``seed`` is given. ``largest_nn``: the token whose nearest other token
            is farthest (times its weight). ``index0``: the first token. ``centroid``: the token nearest to
            the mean of the tokens (cosine: of the normalised tokens; dot: largest product), without weights.
        seed: ``[B, s]`` integers with s in [1, k], the first s picks of each item in that order; distinct and
            below the item's length. One that names a non-finite row is skipped: that pick is made as if it
            were not given.
        weight: ``[B, N]`` factors of the distance, finite and not negative (ZOO-Prune, arXiv 2509.24837).
        lengths: ``[B]`` integers in [0, N]: item b has only its first ``lengths[b]`` tokens.

    Returns:
        ``index`` ``[B, k]`` int32 in pick order, -1 where ``k`` exceeds the item's length; ``value`` ``[B,
        k]`` float32, the weighted distance of each pick to the picks before it (min or sum, in the metric's
        own unit): for the first pick infinity under ``max_min`` and 0 under ``max_sum``, for holes and
        non-finite rows -infinity. Under ``max_min`` without weights ``value[:, j]`` is the covering radius
        that the first j picks reach.

    Raises:
        RuntimeError: a shape, dtype, device, choice or ``k`` that is not as above.
        ValueError: a value in ``seed``, ``weight`` or ``lengths`` that is not as above. Checked on CPU, on
        CUDA only
            under ``TOKENCOMP_CHECKED=1``, never inside torch.compile. Unchecked, a seed that is out of range
            or repeated is skipped too and lengths are clamped.
    """
    if x.dim() == 3 and _check.checked(x, seed, weight, lengths):
        _check_values(x, seed, weight, lengths)
    index, value = _namespace.op(_OP)(
        x,
        k,
        objective=objective,
        metric=metric,
        first=first,
        seed=_check.as_int32(seed),
        weight=_check.as_float32(weight),
        lengths=_check.as_int32(lengths),
    )
    return index, value


def _check_values(x: Tensor, seed: Tensor | None, weight: Tensor | None, lengths: Tensor | None) -> None:
    batch, n = x.shape[0], x.shape[1]
    if lengths is not None and lengths.shape != (batch,):
        return  # the operator refuses the shape
    if lengths is not None:
        _check.check_lengths(_OP, lengths, n)
    if seed is not None and seed.dim() == 2 and seed.shape[0] == batch:
        _check.check_seed(_OP, seed, n, lengths)
    if weight is not None and not weight.is_complex():
        _check.check_weight(_OP, weight)


@_namespace.fake(_OP)
def _kcenter_greedy_fake(
    x: Tensor,
    k: int,
    *,
    objective: str = "max_min",
    metric: str = "cosine",
    first: str = "largest_nn",
    seed: Tensor | None = None,
    weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if x.dim() != 3:
        raise RuntimeError(f"{_OP}: x must have shape [B, N, C], got {list(x.shape)}")
    batch = x.shape[0]
    return x.new_empty((batch, k), dtype=torch.int32), x.new_empty((batch, k), dtype=torch.float32)
