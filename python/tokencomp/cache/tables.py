"""Arithmetic of page tables ``[B, Hkv, places]`` on the host."""

from typing import Any

import numpy as np

from tokencomp.cache.pool import Ints

NO_PAGE = -1


def pages_of(lengths: Ints, page: int) -> Ints:
    """Pages that hold so many slots."""
    return np.asarray(-(-lengths // page), np.int32)


def places_for(pages: int) -> int:
    """Width of a table for so many pages: a power of two, so that it seldom changes."""
    return 1 << max(pages - 1, 0).bit_length()


def padded(table: Any, places: int, fill: Any) -> Any:
    """``table`` at least ``places`` wide."""
    if table.shape[2] >= places:
        return table
    return np.pad(table, ((0, 0), (0, 0), (0, places - table.shape[2])), constant_values=fill)


def without_pages(table: Ints, index: Ints, page: int) -> tuple[Ints, Ints]:
    """``table`` with only pages that hold slots of ``index`` ``[B, Hkv, K]`` (-1: none), and the others."""
    b, h, i = np.nonzero(index >= 0)
    stays = np.zeros(table.shape, bool)
    stays[b, h, index[b, h, i] // page] = True
    gone = ~stays & (table != NO_PAGE)
    order = np.argsort(~stays, axis=2, kind="stable")
    left = np.take_along_axis(np.where(gone, NO_PAGE, table), order, 2)
    return np.asarray(left, np.int32), np.asarray(table[gone], np.int32)
