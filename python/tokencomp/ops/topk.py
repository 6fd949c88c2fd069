"""Selection by score: wrappers and fake kernels of ``topk_select``, ``topp_select`` and ``topk_budget``."""

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace

_TOPK, _TOPP, _BUDGET = "topk_select", "topp_select", "topk_budget"


@typed
def topk_select(
    score: Tensor,
    k: int,
    *,
    k_per_row: Tensor | None = None,
    head: int = 0,
    tail: int = 0,
    keep: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the ``k`` tokens of largest score of each row, with some tokens protected, in ascending order.

    The tokens of a row are ordered by (protected first, larger score, lower index), and the first
    ``min(k, length)`` of them are kept. So protected tokens count inside ``k``; where there are more of them
    than ``k``, the best of them by score are kept and nothing else. A row shorter than ``k`` is kept whole.

    NaN counts as -infinity: such tokens are kept only where nothing better is left to fill the row. -0 equals
    0. This is the eviction step of H2O, SnapKV, TOVA, A2SF and their relatives (arXiv 2306.14048, 2404.14469,
    2401.06104, 2407.20485), with ``head`` sinks as in StreamingLLM (arXiv 2309.17453).

    Args:
        score: ``[R, S]``, float32, float16 or bfloat16, any strides with the last dimension contiguous.
        k: tokens to keep, in [0, 2^24], and the width of ``index``; it may exceed S.
        k_per_row: ``[R]`` integers in [0, k], the tokens to keep of each row, instead of ``k``.
        head: the first ``head`` tokens of each row are protected.
        tail: the last ``tail`` tokens before each row's length are protected; may overlap ``head``.
        keep: ``[R, S]`` bool, more protected tokens.
        lengths: ``[R]`` integers in [0, S]: only the first ``lengths[r]`` tokens of row r exist.

    Returns:
        ``index`` ``[R, k]`` int32, ascending, then -1; ``count`` ``[R]`` int32, the tokens kept. Identical on
        CPU and CUDA, from run to run and for any number of threads.

    Raises:
        RuntimeError: a shape, dtype, device, ``k``, ``head`` or ``tail`` that is not as above.
        ValueError: a value in ``k_per_row`` or ``lengths`` that is not as above. Checked on CPU, on CUDA only
            under ``TOKENCOMP_CHECKED=1``, never inside torch.compile. Unchecked, values are clamped.
    """
    if score.dim() == 2 and _check.checked(score, k_per_row, lengths):
        if lengths is not None:
            _check_lengths(_TOPK, score, lengths)
        if k_per_row is not None and k_per_row.shape == score.shape[:1]:
            _check.check_within(_TOPK, "k_per_row", k_per_row, 0, k, "k")
    index, count = _namespace.op(_TOPK)(
        score,
        k,
        k_per_row=_check.as_int32(k_per_row),
        head=head,
        tail=tail,
        keep=None if keep is None else keep.contiguous(),
        lengths=_check.as_int32(lengths),
    )
    return index, count


@typed
def topp_select(
    score: Tensor,
    p: float,
    max_k: int,
    *,
    min_k: int = 0,
    head: int = 0,
    tail: int = 0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the fewest tokens of largest mass that hold a share ``p`` of each row, in ascending order.

    The tokens of a row are ordered as in ``topk_select``. Kept is the shortest prefix of that order that
    holds all protected tokens, at least ``min_k`` tokens, and ``p`` times the mass of the whole row
    (protected tokens included); but never more than ``max_k`` tokens. With ``p = 0`` nothing beyond
    protected tokens and ``min_k`` is kept; with ``p = 1`` every token whose mass counts.

    A mass is a score, for example a softmax weight. NaN and negative scores count as mass 0, +infinity as the
    largest finite float32. Sums are exact: masses are rounded down to multiples of
    ``2**(bits(length) - 62)`` of the power of two above the row's largest, then added as integers, so that no
    result depends on the order of summation. Used by Twilight, FlexPrefill and ZipVL (arXiv 2502.02770,
    2502.20766, 2410.08584).

    Args:
        score: ``[R, S]``, float32, float16 or bfloat16, any strides with the last dimension contiguous.
        p: the share to reach, in [0, 1].
        max_k: most tokens to keep, in [0, 2^24], and the width of ``index``; it may exceed S.
        min_k: fewest tokens to keep (of rows that have as many), in [0, max_k].
        head: the first ``head`` tokens of each row are protected.
        tail: the last ``tail`` tokens before each row's length are protected; may overlap ``head``.
        lengths: ``[R]`` integers in [0, S]: only the first ``lengths[r]`` tokens of row r exist.

    Returns:
        ``index`` ``[R, max_k]`` int32, ascending, then -1; ``count`` ``[R]`` int32, the tokens kept.
        Identical on CPU and CUDA, from run to run and for any number of threads.

    Raises:
        RuntimeError: a shape, dtype, device, or number that is not as above.
        ValueError: a value in ``lengths`` that is not as above. Checked on CPU, on CUDA only under
            ``TOKENCOMP_CHECKED=1``, never inside torch.compile. Unchecked, lengths are clamped.
    """
    if lengths is not None and score.dim() == 2 and _check.checked(score, lengths):
        _check_lengths(_TOPP, score, lengths)
    index, count = _namespace.op(_TOPP)(
        score, p, max_k, min_k=min_k, head=head, tail=tail, lengths=_check.as_int32(lengths)
    )
    return index, count


@typed
def topk_budget(score: Tensor, k: int, *, floor: int = 0, lengths: Tensor | None = None) -> Tensor:
    """Share a budget of ``k`` tokens among the heads of each item by one selection across all of them.

    Of each head the best ``floor`` tokens are taken first, then the best of all remaining tokens of the item,
    until there are ``k``, by (larger score, lower head, lower index). The budget of a head is how many of its
    tokens were taken; they are its best ones, so that ``topk_select(score.flatten(0, 1), width,
    k_per_row=budget.flatten())`` keeps exactly these tokens. This is the budget rule of AdaKV (arXiv
    2407.11550): ``floor = int(alpha * base)`` gives an exact total; its own rounding is
    ``(budget * (1 - alpha) + int(base * alpha)).round()`` with ``floor = 0``.

    For protected tokens outside the competition, such as a recent window of w tokens, give the scores before
    it and add w to the budgets.

    Args:
        score: ``[B, H, S]``, float32, float16 or bfloat16, any strides with the last dimension contiguous.
            NaN counts as -infinity, -0 equals 0.
        k: tokens of each item, over all heads, in [0, 2^30].
        floor: tokens that each head gets at least (if it has them), in [0, k / H].
        lengths: ``[B, H]`` integers in [0, S]: only the first ``lengths[b, h]`` tokens of a head exist.

    Returns:
        ``budget`` ``[B, H]`` int32; each item's sum is ``min(k, sum of its lengths)``. Identical on CPU and
        CUDA, from run to run and for any number of threads.

    Raises:
        RuntimeError: a shape, dtype, device, ``k`` or ``floor`` that is not as above.
        ValueError: a value in ``lengths`` that is not as above. Checked on CPU, on CUDA only under
            ``TOKENCOMP_CHECKED=1``, never inside torch.compile. Unchecked, lengths are clamped.
    """
    if lengths is not None and score.dim() == 3 and _check.checked(score, lengths):
        _check_lengths(_BUDGET, score, lengths)
    budget: Tensor = _namespace.op(_BUDGET)(score, k, floor=floor, lengths=_check.as_int32(lengths))
    return budget


def _check_lengths(op: str, score: Tensor, lengths: Tensor) -> None:
    if lengths.shape == score.shape[:-1]:  # the operator refuses another shape
        _check.check_within(op, "lengths", lengths, 0, score.shape[-1], "S")


def _row_outputs(op: str, score: Tensor, width: int) -> tuple[Tensor, Tensor]:
    if score.dim() != 2:
        raise RuntimeError(f"{op}: score must have shape [R, S], got {list(score.shape)}")
    rows = score.shape[0]
    return score.new_empty((rows, width), dtype=torch.int32), score.new_empty((rows,), dtype=torch.int32)


@_namespace.fake(_TOPK)
def _topk_select_fake(
    score: Tensor,
    k: int,
    *,
    k_per_row: Tensor | None = None,
    head: int = 0,
    tail: int = 0,
    keep: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _row_outputs(_TOPK, score, k)


@_namespace.fake(_TOPP)
def _topp_select_fake(
    score: Tensor,
    p: float,
    max_k: int,
    *,
    min_k: int = 0,
    head: int = 0,
    tail: int = 0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _row_outputs(_TOPP, score, max_k)


@_namespace.fake(_BUDGET)
def _topk_budget_fake(score: Tensor, k: int, *, floor: int = 0, lengths: Tensor | None = None) -> Tensor:
    if score.dim() != 3:
        raise RuntimeError(f"{_BUDGET}: score must have shape [B, H, S], got {list(score.shape)}")
    return score.new_empty(score.shape[:2], dtype=torch.int32)
