"""Token merging: match, score, map, merge. Wrappers and fake kernels of four operators.

One int32 ``token_map`` is the only representation of a merge: ``token_map[b, i]`` is the output row of token
i, -1 where it is dropped. ``tokencomp.token_map`` composes, inverts and draws such maps.
"""

from typing import Literal

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace

Energy = Literal["elu", "paper", "gauss"]
Order = Literal["tome", "index", "similarity", "position"]
Mode = Literal["mean", "sum", "amax", "drop", "mlerp"]

INF = float("inf")


@typed
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
) -> tuple[Tensor, Tensor]:
    """For each row of ``a`` the most similar row of ``b``; the matrix of similarities is never in memory.

    ``similarity(i, j) = (alpha * cos(a_i, b_j) + (1 - alpha) * cos(a2_i, b2_j)) * a_weight_i * b_weight_j``.

    Rows and columns of the match are the rows of ``a`` and ``b`` in the order of ``a_index`` and ``b_index``
    where these are given: Ra = Ka or Na of them, and Rb = Kb or Nb. Larger similarity first, then smaller
    column. Bipartite soft matching (ToMe, arXiv 2210.09461) is ``cosine_match(x[:, 0::2], x[:, 1::2])``; the
    halves are views, nothing is copied. For (1 + cos) / 2 in place of cos pass ``alpha=0.5`` and, as second
    features, ones ``[B, N, 1]``.

    Args:
        a: ``[B, Na, C]``, float32, float16 or bfloat16, any strides with the channels contiguous. Arithmetic
            is float32. A row of zeros (float32 sum of squares below 1.2e-38) has cosine 0 to everything. A
            row whose float32 sum of squares is not finite takes no part.
        b: ``[B, Nb, C]`` of the dtype of ``a``.
        a_index: ``[B, Ka]`` integers, which rows of ``a``; -1 marks a hole, which takes no part.
        b_index: ``[B, Kb]`` integers, which rows of ``b``; -1 marks a hole.
        a2: ``[B, Na, C2]``, second features (ToSA, arXiv 2506.20066), selected by the same indices.
        b2: ``[B, Nb, C2]``.
        alpha: share of the first features; needs ``a2`` and ``b2`` unless 1.
        a_weight: ``[B, Ra]`` factors of the rows (MCTF, arXiv 2403.10030).
        b_weight: ``[B, Rb]`` factors of the columns.
        band: where not negative, only pairs with ``|p - q| <= band`` match, p and q being the row numbers in
            ``a`` and ``b``: ``a_index[i]`` and ``b_index[j]`` where given, else i and j.
        protect_a: the first ``protect_a`` rows take no part (a prefix that must stay).
        protect_b: the first ``protect_b`` columns are never matched.
        mask_a: ``[B, Ra]`` bool, True where the row takes part.
        mask_b: ``[B, Rb]`` bool, True where the column takes part.
        min_similarity: a similarity below it keeps its value but gets index -1, the zero class (EMS, arXiv
            2412.08521).
        top: how many columns for each row, in [1, 32].
        exclude_self: no row matches the column of its own number (p = q as in ``band``): for ``b`` the same
            tokens as ``a``, whole or by lists.

    Returns:
        ``value`` float32 and ``index`` int32, each ``[B, Ra]``, or ``[B, Ra, top]`` where ``top > 1``. The
        index is a column of the match, in [0, Rb). Rows that take no part, and places for which no column
        is left, hold -inf and -1. A NaN similarity counts as -inf.

    Raises:
        RuntimeError: a shape, dtype, device or number that is not as above.
        ValueError: an entry of ``a_index`` or ``b_index`` outside [-1, N). Checked on CPU, on CUDA only under
            ``TOKENCOMP_CHECKED=1``, never inside torch.compile; unchecked it is a hole.
    """
    if _check.checked(a, a_index):
        _check.check_index(_MATCH, "a_index", a_index, a)
    if _check.checked(b, b_index):
        _check.check_index(_MATCH, "b_index", b_index, b)
    value, index = _namespace.op(_MATCH)(
        a,
        b,
        a_index=_check.as_int32(a_index),
        b_index=_check.as_int32(b_index),
        a2=a2,
        b2=b2,
        alpha=alpha,
        a_weight=_check.as_float32(a_weight),
        b_weight=_check.as_float32(b_weight),
        band=band,
        protect_a=protect_a,
        protect_b=protect_b,
        mask_a=_check.as_mask(mask_a),
        mask_b=_check.as_mask(mask_b),
        min_similarity=None if min_similarity == -INF else min_similarity,
        top=top,
        exclude_self=exclude_self,
    )
    return value, index


@typed
def energy_score(
    x: Tensor,
    margin: float,
    *,
    alpha: float = 1.0,
    kind: Energy = "elu",
    prefix: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """How much each token is inside a cluster: the mean over all tokens, itself included, of f(cosine).

    High energy means many similar tokens (mergeable), low energy an isolated token (to be protected); PiToMe,
    arXiv 2405.16148. Working memory is O(N). With G the cosine and m the margin:

    - ``elu`` (its code):   f = G - m where G > m, else alpha * (exp(G - m) - 1);
    - ``paper`` (its text): f = G where G >= m, else alpha * (exp(G - m) - 1);
    - ``gauss`` (its text variant): f = exp(-(1 - G)^2 / (2 s^2)) / (s sqrt(2 pi)) with s = 1 - m.

    Args:
        x: ``[B, N, C]``, float32, float16 or bfloat16, any strides with the channels contiguous. Arithmetic
            is float32. Zero rows have cosine 0 to everything, themselves included.
        margin: m; below 1 for ``gauss``.
        alpha: weight of the dissimilar pairs; not used by ``gauss``.
        kind: which f, see above.
        prefix: the first ``prefix`` tokens take no part.
        mask: ``[B, N]`` bool, True where the token takes part (padding: False).

    Returns:
        ``[B, N]`` float32. Tokens that take no part, which includes those whose float32 sum of squares is not
        finite, have energy -inf and are in nobody's mean.

    Raises:
        RuntimeError: a shape, dtype, device, choice or number that is not as above.
    """
    energy: Tensor = _namespace.op(_ENERGY)(
        x, margin, alpha=alpha, kind=kind, prefix=prefix, mask=_check.as_mask(mask)
    )
    return energy


@typed
def bipartite_map(
    value: Tensor,
    index: Tensor,
    r: int,
    tokens: int,
    *,
    prefix: int = 1,
    distill: bool = False,
    order: Order = "tome",
    a_tokens: Tensor | None = None,
    b_tokens: Tensor | None = None,
    rest_tokens: Tensor | None = None,
) -> Tensor:
    """Turn a match into a map: the r rows of A of largest value move to their columns of B.

    Rows are ranked by value, then by row number. A row among the r without a column (index -1) is dropped.
    By default A holds the even tokens and B the odd ones. The output has ``tokens - r`` rows
    (``tokencomp.token_map.merged_count`` counts them):

    1. the prefix tokens, ascending: they lead and never move;
    2. tokens in no list, ascending, then ``rest_tokens`` as listed;
    3. the rows of A that stay: ascending (``index``), or by descending value (``similarity``); ``tome`` means
       ``index`` where there is a prefix and ``similarity`` where there is none, as ToMe (arXiv 2210.09461)
       does;
    4. the tokens of B in their order.

    ``position`` lists everything that stays after the prefix by token number instead: survivors keep their
    order, which is what scans, rotary positions and causal masks want.

    ========================  ===============================================================================
    ToMe                      ``prefix=1`` (0 without CLS); ``distill=True`` with a distillation token
    DINOv2 with 4 registers   ``prefix=5``
    vid-TLDR                  ``prefix=0, order="index"``
    PiToMe                    o = tokens by descending energy, ``a_tokens=o[:, :2r:2], b_tokens=o[:, 1:2r:2],
                              rest_tokens=o[:, 2r:]``
    PiToMe, "bsm"             ``a_tokens=o[:, 0::2], b_tokens=o[:, 1::2], order="similarity"``
    ========================  ===============================================================================

    Args:
        value: ``[B, Ra]`` float32 from ``cosine_match``. NaN counts as -inf.
        index: ``[B, Ra]`` integers, columns in [0, Rb) or -1.
        r: how many tokens to merge, not negative; at most ``(tokens - prefix) // 2`` with the even/odd split,
            at most Ra with lists: larger values are capped, as upstream does.
        tokens: N, how many tokens there are.
        prefix: protected tokens at the front (CLS, registers). With the even/odd split ``cosine_match``
            should have been told ``protect_a=(prefix + 1) // 2, protect_b=prefix // 2``.
        distill: one more prefix token.
        order: see above.
        a_tokens: ``[B, Ra]`` integers, the token of each row; given together with ``b_tokens``. Prefix tokens
            among them rank last; keep r small enough to spare them.
        b_tokens: ``[B, Rb]`` integers, the token of each column.
        rest_tokens: ``[B, Rr]`` integers, tokens of neither, in the order in which they shall stand.

    Returns:
        ``token_map`` ``[B, tokens]`` int32.

    Raises:
        RuntimeError: a shape, dtype, device, choice or number that is not as above.
        ValueError: lists that are not distinct tokens in [0, tokens), or an index outside [-1, Rb). Checked
            on CPU, on CUDA only under ``TOKENCOMP_CHECKED=1``, never inside torch.compile. Unchecked, the
            map is of no use, but nothing outside it is written.
    """
    lists = (a_tokens, b_tokens, rest_tokens)
    if tokens >= 0 and _check.checked(index, *lists):
        _check_lists(index, tokens, *lists)
    token_map: Tensor = _namespace.op(_MAP)(
        value.contiguous(),
        _check.as_int32(index),
        r,
        tokens,
        prefix=prefix,
        distill=distill,
        order=order,
        a_tokens=_check.as_int32(a_tokens),
        b_tokens=_check.as_int32(b_tokens),
        rest_tokens=_check.as_int32(rest_tokens),
    )
    return token_map


@typed
def merge_tokens(
    x: Tensor,
    token_map: Tensor,
    out_tokens: int,
    *,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: Mode = "mean",
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of each group (all i with ``token_map[i] = m``) into output row m.

    With s the sizes and w the weights (1 where not given), sums and maxima over the group:

    - ``mean``:  y = sum(s w x) / sum(s w), ToMe's size-weighted average; 0 where the denominator is 0;
    - ``sum``:   y = sum(s w x);
    - ``amax``:  y = max(x), channel by channel (masks, source matrices); NaN wins;
    - ``drop``:  y = x of the member of largest weight, the first of several: pass weight 1 for destinations
      and 0 for sources (ToFu, Zero-TPrune);
    - ``mlerp``: the mean rescaled to the largest norm of the group (ToFu, arXiv 2312.01026).

    The size of an output is sum(s), of the kept member alone under ``drop``. A row of the output that no
    token maps to is 0 with size 0. Sums are float32 in the order of the tokens, rounded once.

    Gradients reach ``x`` under ``mean``, ``sum`` and ``drop`` (the backward is a gather); sizes and weights
    are constants.

    Args:
        x: ``[B, N, C]``, float32, float16 or bfloat16, any strides with the channels contiguous.
        token_map: ``[B, N]`` integers in [-1, out_tokens); -1 drops the token.
        out_tokens: M, rows of the output.
        size: ``[B, N]``, how many original tokens each token stands for; fractions are allowed.
        weight: ``[B, N]``, factors of the values that do not count as size.
        mode: see above.

    Returns:
        ``y`` ``[B, M, C]`` of the dtype of ``x`` and ``size`` ``[B, M]`` float32.

    Raises:
        RuntimeError: a shape, dtype, device, choice or number that is not as above; a gradient that is not
            defined.
        ValueError: an entry of ``token_map`` outside [-1, out_tokens). Checked on CPU, on CUDA only under
            ``TOKENCOMP_CHECKED=1``, never inside torch.compile; unchecked the token is dropped.
    """
    if out_tokens >= 0 and _check.checked(token_map):
        _check.check_range(_MERGE, "token_map", token_map, -1, out_tokens, "out_tokens")
    y, merged_size = _namespace.call(
        _MERGE,
        x,
        _check.as_int32(token_map),
        out_tokens,
        _check.as_float32(size),
        _check.as_float32(weight),
        mode,
    )
    return y, merged_size


@typed
def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    prefix: int = 1,
    order: Order = "tome",
    mode: Mode = "mean",
    a_tokens: Tensor | None = None,
    b_tokens: Tensor | None = None,
    rest_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match, map and merge in one call: what every layer of a merging encoder does.

    The same, bit for bit, as ``cosine_match`` of the even tokens of ``metric`` with the odd ones (or of
    ``a_tokens`` with ``b_tokens``), ``bipartite_map`` of the result and ``merge_tokens`` of ``x`` by that
    map. On the CPU an item of a batch goes through all three at once, which saves two calls and two wakes of
    the threads (7 to 34 % of the time at the sizes of a vision transformer); on CUDA the same kernels run one
    after the other.

    Args:
        x: ``[B, N, C]``, float32, float16 or bfloat16, any strides with the channels contiguous.
        metric: ``[B, N, D]``, what is compared, of any of these dtypes.
        r: how many tokens to merge; capped as in ``bipartite_map``.
        size: see ``merge_tokens``, as ``weight`` and ``mode``.
        weight: see there.
        prefix: protected tokens at the front, of whatever kind. They are matched with nothing, but where
            they are among ``a_tokens`` or ``b_tokens``.
        order: see ``bipartite_map``, as ``a_tokens``, ``b_tokens`` and ``rest_tokens``.
        mode: see ``merge_tokens``.
        a_tokens: ``[B, Ra]`` integers, given together with ``b_tokens``.
        b_tokens: ``[B, Rb]`` integers.
        rest_tokens: ``[B, Rr]`` integers.

    Returns:
        ``y`` ``[B, N - r, C]`` of the dtype of ``x``, ``size`` ``[B, N - r]`` float32 and ``token_map``
        ``[B, N]`` int32. Gradients reach ``x`` as in ``merge_tokens``; what is merged is a constant.

    Raises:
        RuntimeError: a shape, dtype, device, choice or number that is not as above; a gradient that is not
            defined.
        ValueError: lists that are not distinct tokens in [0, N); checked as in ``bipartite_map``.
    """
    lists = (a_tokens, b_tokens, rest_tokens)
    if a_tokens is not None and _check.checked(*lists):
        _check_tokens(_STEP, x.shape[0], x.shape[1] if x.dim() == 3 else 0, *lists)
    y, merged_size, token_map = _namespace.call(
        _STEP,
        x,
        metric,
        r,
        _check.as_float32(size),
        _check.as_float32(weight),
        prefix,
        order,
        mode,
        _check.as_int32(a_tokens),
        _check.as_int32(b_tokens),
        _check.as_int32(rest_tokens),
    )
    return y, merged_size, token_map


_MATCH, _ENERGY, _MAP, _MERGE = "cosine_match", "energy_score", "bipartite_map", "merge_tokens"
_STEP = "bipartite_merge"


def _check_lists(
    index: Tensor, tokens: int, a_tokens: Tensor | None, b_tokens: Tensor | None, rest_tokens: Tensor | None
) -> None:
    columns = tokens // 2 if b_tokens is None else b_tokens.shape[-1]
    _check.check_range(_MAP, "index", index, -1, columns, "Rb")
    if a_tokens is not None or b_tokens is not None or rest_tokens is not None:
        _check_tokens(_MAP, index.shape[0], tokens, a_tokens, b_tokens, rest_tokens)


def _check_tokens(
    op: str,
    batch: int,
    tokens: int,
    a_tokens: Tensor | None,
    b_tokens: Tensor | None,
    rest_tokens: Tensor | None,
) -> None:
    named = {"a_tokens": a_tokens, "b_tokens": b_tokens, "rest_tokens": rest_tokens}
    given = [t.long() for t in named.values() if t is not None and t.dim() == 2]
    if any(t.shape[0] != batch for t in given):
        return  # the operator refuses the shape
    for name, t in named.items():
        if t is not None:
            _check.check_range(op, name, t, 0, tokens, "tokens")
    if given:
        _check.check_distinct(op, "a_tokens, b_tokens and rest_tokens", torch.cat(given, dim=1))
