"""What the native module knows, with names and types: the plans of kernels, and the book of pages.

``tokencomp._native`` uses Python's limited API (3.10), so that one file serves every later Python; that API
has no arrays and few conveniences: they are here.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

import tokencomp._native as _native

OutOfPages: type[MemoryError] = _native.OutOfPages
Plan = dict[str, Any]


class PagePool:
    """Which pages of a pool are in use, and by how many rows.

    Pages are numbers from 0; lists of them are any integers, of any shape, in which -1 is skipped. A call
    that raises changes nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._pool = _native.PagePool(capacity)

    def allocate(self, count: int) -> NDArray[np.int32]:
        """The ``count`` lowest free pages, ascending int32, each used once. Raises OutOfPages (a
        MemoryError).
        """
        return np.frombuffer(self._pool.allocate(count), np.int32)

    def retain(self, pages: ArrayLike) -> None:
        """One use more of each page. Raises ValueError for a free page, IndexError for none."""
        self._pool.retain(_pages("retain", pages).tobytes())

    def free(self, pages: ArrayLike) -> None:
        """One use less of each page; what nobody uses any more is free again. Raises ValueError for a page
        that is free already, IndexError for none.
        """
        self._pool.free(_pages("free", pages).tobytes())

    def refcount(self, pages: ArrayLike) -> NDArray[np.int64]:
        """How many use each page, in the shape of ``pages``; 0: free."""
        given = _pages("refcount", pages)
        return np.frombuffer(self._pool.refcount(given.tobytes()), np.int64).reshape(given.shape)

    def grow(self, capacity: int) -> None:
        """More pages; those there are stay as they are."""
        self._pool.grow(capacity)

    def statistics(self) -> dict[str, int]:
        """Pages: capacity, in_use, free, peak (most in use at a time), allocations (ever)."""
        numbers: dict[str, int] = self._pool.statistics()
        return numbers

    @property
    def capacity(self) -> int:
        """Pages there are."""
        return int(self._pool.capacity)

    @property
    def in_use(self) -> int:
        """Pages somebody uses."""
        return int(self._pool.in_use)

    @property
    def peak(self) -> int:
        """The most that were in use at a time."""
        return int(self._pool.peak)


def _pages(method: str, pages: ArrayLike) -> NDArray[np.int64]:
    """Any array or list of integers."""
    try:
        given = np.asarray(pages)
    except (TypeError, ValueError) as error:
        raise TypeError(f"PagePool.{method}: pages must be integers, got {type(pages)}") from error
    if given.size > 0 and given.dtype.kind not in "iu":
        raise TypeError(f"PagePool.{method}: pages must be integers, got {given.dtype}")
    return given.astype(np.int64, copy=False)


def kcenter_cpu_plan(
    *,
    objective: Literal["max_min", "max_sum"],
    nonnegative_weights: bool = True,
    all_pairs: bool = False,
    B: int,
    N: int,
    k: int,
    item_bytes: int,
    threads: int,
) -> Plan:
    """How kcenter_greedy runs a problem on the CPU: path (lazy, stream, gram) and across_items."""
    plan: Plan = _native.kcenter_cpu_plan(
        objective, nonnegative_weights, all_pairs, B, N, k, item_bytes, threads
    )
    return plan


def kcenter_cuda_plans(
    *,
    B: int,
    N: int,
    C: int,
    k: int,
    element_bytes: int,
    l2: bool = False,
    shrinking: bool = True,
    first: Literal["largest_nn", "index0", "centroid"],
    sm_count: int = 132,
    smem_per_block: int = 227 << 10,
    max_cluster: int = 8,
) -> list[Plan]:
    """How kcenter_greedy could run a problem on a CUDA device (default: H200): the plan it takes, then every
    candidate with its floor in microseconds, or the reason why it is refused.
    """
    plans: list[Plan] = _native.kcenter_cuda_plans(
        B, N, C, k, element_bytes, l2, shrinking, first, sm_count, smem_per_block, max_cluster
    )
    return plans


def topk_cuda_plans(
    *,
    R: int,
    S: int,
    element_bytes: int,
    by_mass: bool = False,
    sm_count: int = 132,
    smem_per_block: int = 227 << 10,
    max_cluster: int = 8,
) -> list[Plan]:
    """How topk_select (topp_select: by_mass) could run a problem on a CUDA device (default: H200): the plan
    it takes, then every candidate with its floor in microseconds, or the reason why it is refused.
    """
    plans: list[Plan] = _native.topk_cuda_plans(
        R, S, element_bytes, by_mass, sm_count, smem_per_block, max_cluster
    )
    return plans


def decode_cuda_parts(*, units: int, keys: int, resident: int = 3 * 132) -> int:
    """Into how many parts paged_decode cuts ``keys`` on a CUDA device (default: H200) for ``units`` pairs of
    (sequence, kv head), where ``resident`` blocks run at a time.
    """
    return int(_native.decode_cuda_parts(units, keys, resident))
