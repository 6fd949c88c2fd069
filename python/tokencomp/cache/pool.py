"""Pages of keys and values: one tensor, and the book of who uses which page."""

import contextlib
import copy
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokencomp._host import PagePool

Ints: TypeAlias = NDArray[np.int32]

PAGE_CPU, PAGE_CUDA = 32, 64
SLACK = 4  # a pool that must grow takes a share 1/SLACK more than is needed now


def page_size(device: torch.device) -> int:
    """Slots of a page where nobody chooses: 32 on a CPU, 64 on CUDA."""
    return PAGE_CUDA if device.type == "cuda" else PAGE_CPU


class Pool:
    """Pages of ``page`` slots each; a page holds keys and values of one (sequence, kv head) of any layer.

    Args:
        page: slots of a page, 16, 32 or 64.
        width: D, channels of a key.
        value_width: Dv, channels of a value.
        dtype: of both.
        device: of the pages.
        limit: bytes that are never exceeded; None: no limit.
    """

    def __init__(
        self,
        page: int,
        width: int,
        value_width: int,
        dtype: torch.dtype,
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        if page not in (16, 32, 64):
            raise ValueError(f"cache: page must be 16, 32 or 64 slots, got {page}")
        self.page, self.width, self.value_width = page, width, value_width
        self.dtype, self.device, self.limit = dtype, device, limit
        self.page_bytes = page * (width + value_width) * dtype.itemsize
        self.book = PagePool(0)
        self._peak = 0  # of books before this one
        self._use(torch.empty(0, page * (width + value_width), dtype=dtype, device=device))

    @property
    def capacity(self) -> int:
        """Pages there are."""
        return self._data.shape[0]

    @property
    def peak(self) -> int:
        """The most pages that were in use at a time."""
        return max(self._peak, int(self.book.peak))

    def reserve(self, pages: int, *, slack: bool = False) -> None:
        """See to it that ``pages`` are free.

        Raises MemoryError, and changes nothing, where the limit or the device has no room for them.
        """
        wanted = self.book.in_use + pages
        if wanted <= self.capacity:
            return
        most = None if self.limit is None else self.limit // self.page_bytes
        if most is not None and wanted > most:
            raise MemoryError(f"cache: {self._wants(pages)}; the limit of {self.limit} bytes is {most} pages")
        grown = wanted + wanted // SLACK if slack else wanted
        grown = grown if most is None else min(grown, most)
        try:
            data = torch.empty(grown, self._data.shape[1], dtype=self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise MemoryError(
                f"cache: {self._wants(pages)}, and {self.device} has no room: {error}"
            ) from error
        data[: self.capacity] = self._data
        self._use(data)
        self.book.grow(grown)

    def expect(self, pages: int) -> None:
        """Have room for ``pages`` more, if there is any to be had, so that it need not grow step by step."""
        most = pages if self.limit is None else self.limit // self.page_bytes - self.book.in_use
        with contextlib.suppress(MemoryError):
            self.reserve(max(0, min(pages, most)))

    def allocate(self, pages: int) -> Ints:
        """``pages`` page numbers, the lowest free ones first; grows where needed. Raises as ``reserve``."""
        self.reserve(pages, slack=True)
        return np.asarray(self.book.allocate(pages), dtype=np.int32)

    def shrink(self) -> Ints | None:
        """Give the free pages back to the device where they are more than an eighth of those in use.

        Pages in use move to the front, in order. Returns the new number of every page, None where nothing
        was done. For a moment both pools are there.
        """
        uses = self.book.refcount(np.arange(self.capacity, dtype=np.int32))
        used = np.flatnonzero(uses)
        if self.capacity <= len(used) + len(used) // 8:
            return None
        data = self._data[torch.from_numpy(used).to(self.device)]
        self._peak, self.book = self.peak, _book(uses[used])
        self._use(data)
        number = np.zeros(len(uses), np.int32)
        number[used] = np.arange(len(used), dtype=np.int32)
        return number

    def copy_pages(self, source: Ints, target: Ints) -> None:
        """The contents of pages ``source`` into pages ``target``."""
        self._data[torch.from_numpy(target).to(self.device)] = self._data[
            torch.from_numpy(source).to(self.device)
        ]

    def to(self, device: torch.device) -> "Pool":
        """The same pages, with their numbers, on another device."""
        moved = copy.copy(self)
        moved.device = device
        moved.book = _book(self.book.refcount(np.arange(self.capacity, dtype=np.int32)))
        moved._use(self._data.to(device, copy=True))
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pool":
        return self.to(self.device)

    def _use(self, data: Tensor) -> None:
        self._data = data
        keys = self.page * self.width
        self.k_pages = data[:, :keys].unflatten(1, (1, self.page, self.width))
        self.v_pages = data[:, keys:].unflatten(1, (1, self.page, self.value_width))

    def _wants(self, pages: int) -> str:
        return (
            f"{pages} more pages of {self.page} slots ({pages * self.page_bytes} bytes) are needed where "
            f"{self.book.in_use} of {self.capacity} are in use"
        )


def _book(uses: Ints) -> PagePool:
    """A book of as many pages, each used so often."""
    book = PagePool(len(uses))
    book.allocate(len(uses))
    book.free(np.flatnonzero(uses == 0))
    for more in range(1, int(uses.max(initial=0))):
        book.retain(np.flatnonzero(uses > more))
    return book
