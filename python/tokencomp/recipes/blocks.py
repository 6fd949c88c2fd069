"""Eviction of whole pages as OpenVINO does it (openvino.genai): counted scores, page scores, diverse pages.

A page is ``page`` consecutive keys. Dropping one edits a page table and moves no data.
"""

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp import ops, ragged
from tokencomp.recipes.common import pool_scores, require, require_dims
from tokencomp.recipes.crush import page_scores


def window_counts(keys: int, window: int = 8, *, device: torch.device | None = None) -> Tensor:
    """``[keys]`` int32: how many of the last ``window`` rows of a prompt see each key, ``min(window, keys -
    j)``.

    Raises ValueError for a negative number of keys or ``window < 1``.
    """
    op = "window_counts"
    require(keys >= 0, op, "keys", ">= 0", keys)
    require(window >= 1, op, "window", ">= 1", window)
    return torch.arange(keys, 0, -1, dtype=torch.int32, device=device).clamp(max=window)


def count_step(score: Tensor, count: Tensor, received: Tensor, *, kernel: int = 7) -> tuple[Tensor, Tensor]:
    """One decode step of counted scores: pooled attention is added, every counter goes up, a new key starts
    at 1.

    Each new vector is max-pooled over ``kernel`` keys forward before it is added, so that a run before an
    important key stays together. ``score / count`` is what pages are compared by (norm-sum).

    Args:
        score: ``[B, H, S0]`` float32 and count: ``[B, H, S0]`` int32, of the keys before the step.
        received: ``[B, H, S]`` float, attention of the step's query, S >= S0 (``ops.head_vote`` of
            ``ops.qk_scores``).
        kernel: pooling width, >= 1.

    Returns:
        ``score`` ``[B, H, S]`` float32 and ``count`` ``[B, H, S]`` int32; the arguments are left alone.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "count_step"
    require_dims(op, "score", score, "[B, H, S]")
    require(count.shape == score.shape, op, "count", f"of shape {list(score.shape)}", list(count.shape))
    same = received.dim() == 3 and received.shape[:2] == score.shape[:2]
    new = received.shape[-1] - score.shape[2] if same else -1
    expected = f"of shape {[*score.shape[:2], '>= ' + str(score.shape[2])]}"
    require(new >= 0, op, "received", expected, list(received.shape))
    pooled = pool_scores(received, kernel, kind="max", align="forward")
    return functional.pad(score, (0, new)) + pooled, functional.pad(count, (0, new)) + 1


def page_keep(
    score: Tensor,
    page: int,
    budget: int,
    *,
    count: Tensor | None = None,
    start: int = 32,
    recent: int = 128,
) -> tuple[Tensor, Tensor]:
    """The pages that stay: those of the first ``start`` keys, of the last ``recent`` ones, and the best
    others up to ``budget`` keys.

    A page's score is the sum over its keys of ``score``, or of ``score / count`` where counters are given.
    The last page counts as full, also where it is not yet. Ties go to the lower page; OpenVINO evicts the
    lower.

    Args:
        score: ``[B, H, S]`` float of all keys, those of the protected ends included (not looked at).
        page: keys of a page.
        budget: keys that stay between the ends, a multiple of ``page``.
        count: ``[B, H, S]`` int32, of ``count_step``.
        start: first keys and recent: last keys that stay, multiples of ``page``.

    Returns:
        ``index`` ``[B, H, pages]`` int32, ascending, then -1; ``kept`` ``[B, H]`` int32.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "page_keep"
    require_dims(op, "score", score, "[B, H, S]")
    require(page >= 1, op, "page", ">= 1", page)
    for name, number in (("budget", budget), ("start", start), ("recent", recent)):
        require(number >= 0 and number % page == 0, op, name, f"a multiple of page={page}, >= 0", number)
    if count is not None:
        require(count.shape == score.shape, op, "count", f"of shape {list(score.shape)}", list(count.shape))
        score = score / count
    batch, heads, keys = score.shape
    rows = page_scores(functional.pad(score, (0, -keys % page)), page).flatten(0, 1)
    wanted = (start + budget + recent) // page
    index, kept = ops.topk_select(rows, wanted, head=start // page, tail=recent // page)
    return index.view(batch, heads, -1), kept.view(batch, heads)


def page_similarity(k: Tensor, page: int) -> Tensor:
    """``[B, H, S / page]`` float32: the mean cosine of a page's keys with all keys, the less, the more
    diverse.

    In O(S D): the mean of the cosines of a key with all others is its product with the mean unit key.

    Args:
        k: ``[B, H, S, D]``, the keys that may be evicted.
        page: divides S.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    require_dims("page_similarity", "k", k, "[B, H, S, D]")
    unit = functional.normalize(k.float(), dim=-1)
    return page_scores((unit * unit.mean(2, keepdim=True)).sum(-1), page) / page


def diverse_pages(
    mass: Tensor, similarity: Tensor, pages: int, *, share: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Pages that hold a share of the attention, then those that resemble the others least (OpenVINO's
    adaptive form of R-KV, arXiv 2505.24133).

    Args:
        mass: ``[R, n]`` float >= 0, attention of each page (OpenVINO: mean over the last 8 steps).
        similarity: ``[R, n]`` float, of ``page_similarity``.
        pages: that stay. The fewest pages of largest mass that reach ``share`` come first, at most ``pages``.
        share: in [0, 1].

    Returns:
        ``index`` ``[R, pages]`` int32, ascending, then -1; ``count`` ``[R]`` int32.

    Raises:
        ValueError, RuntimeError: a shape or number that is not as above.
    """
    op = "diverse_pages"
    require_dims(op, "mass", mass, "[R, n]")
    require(
        similarity.shape == mass.shape,
        op,
        "similarity",
        f"of shape {list(mass.shape)}",
        list(similarity.shape),
    )
    require(pages >= 0, op, "pages", ">= 0", pages)
    held, _ = ops.topp_select(mass, share, pages)
    return ops.topk_select(-similarity.float(), pages, keep=ragged.kept_mask(held, mass.shape[1]))
